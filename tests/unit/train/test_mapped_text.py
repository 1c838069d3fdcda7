"""Batches of a text that stays in its file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mujax.data import text_batches
from mujax.errors import DataError
from mujax.train import mapped_text

TOKENS = (np.arange(4000) * 37 % 251).astype(np.uint16)
KEY = jax.random.key(3)


def test_its_batches_are_those_of_a_text_in_memory():
    expected = text_batches(TOKENS, KEY, batch=4, length=8, steps=3)
    batches = mapped_text(TOKENS, length=8)
    starts = batches.draw(batches.data, KEY, 4, 3)
    fetch = jax.jit(lambda drawn: batches.fetch((), drawn))
    for step in range(3):
        jax.tree.map(
            np.testing.assert_array_equal,
            tuple(fetch(starts[step])),
            (expected.inputs[step], expected.targets[step]),
        )
    # All steps at a time, as lanes are.
    inputs, _ = jax.vmap(fetch)(starts)
    np.testing.assert_array_equal(inputs, expected.inputs)
    assert not np.array_equal(inputs[0], inputs[1])


def test_a_text_with_more_places_than_an_int32_holds():
    """Nothing is allocated: every token is at the same address."""
    long = np.lib.stride_tricks.as_strided(np.uint16([7]), (2**33,), (0,))
    batches = mapped_text(long, length=4)
    drawn = batches.draw((), KEY, 3, 2)
    assert (drawn.shape, drawn.dtype) == ((2, 3, 2), jnp.uint32)
    inputs, targets = jax.jit(lambda drawn: batches.fetch((), drawn))(drawn[0])
    assert inputs.shape == targets.shape == (3, 4)
    assert (np.asarray(inputs) == 7).all()


def test_its_fingerprint_tells_texts_apart():
    batches = mapped_text(TOKENS, length=8)
    assert batches.digest() == mapped_text(TOKENS.copy(), length=9).digest()
    for other in (TOKENS[:-1], TOKENS.astype(np.uint32), np.where(np.arange(4000) == 1234, 3, TOKENS)):
        assert mapped_text(other, length=8).digest() != batches.digest()


def test_a_text_that_is_too_short_is_refused_when_it_is_drawn_from():
    with pytest.raises(DataError, match="expected more than length=4000 tokens"):
        mapped_text(TOKENS, length=4000).draw((), KEY, 2, 1)
    assert mapped_text(TOKENS, length=3999).draw((), KEY, 2, 1).tolist() == [[0, 0]]
