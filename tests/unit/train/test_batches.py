"""Batches: what a list of them has to be, grain datasets of them, and streams."""

import itertools
import re

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mujax import data
from mujax.errors import ConfigError, DataError
from mujax.train import Batches, as_batches, stream, training_run
from mujax.train._batches import check_batches

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
DATASET = grain.MapDataset.range(40).seed(1).shuffle().map(lambda place: (X[place], X[place, :1])).repeat()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "expected at least one (inputs, targets) pair, got none"),
        ([jnp.zeros((2, 3))], "pair at every step, got ArrayImpl at step 0"),
        (
            [(jnp.zeros(2), jnp.zeros(2)), (jnp.zeros(3), jnp.zeros(3))],
            "(((3,), 'float32'), ((3,), 'float32')) at step 1",
        ),
    ],
)
def test_batches_must_be_pairs_of_the_same_shapes(given, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_batches(given)


# Grain


@pytest.mark.parametrize("dataset", [DATASET, DATASET.to_iter_dataset(grain.ReadOptions(1, 4))])
def test_a_run_reads_its_batches_of_a_grain_dataset(dataset):
    """The dataset has no end: no more than the steps are read."""
    found = as_batches(dataset, batch=4, steps=3)
    assert found.limit == 3
    inputs, targets = found.data
    expected = [DATASET[place] for place in range(12)]
    np.testing.assert_array_equal(inputs.reshape(12, 3), np.stack([one for one, _ in expected]))
    np.testing.assert_array_equal(targets.reshape(12, 1), np.stack([other for _, other in expected]))


def test_training_run_takes_a_grain_dataset():
    from flax import linen as nn

    run = training_run(lambda width: nn.Dense(1), DATASET, steps=3, width=8, batch=4)
    assert run.steps({}) == 3
    assert run.batches.data[0].shape == (3, 4, 3)


def test_a_grain_dataset_of_something_else_than_pairs_is_refused():
    with pytest.raises(ConfigError, match=r"an \(inputs, targets\) pair"):
        as_batches(grain.MapDataset.range(9).map(lambda x: (x, x, x)), batch=2)


# Streams


def _function(key, step):
    inputs = jax.random.normal(jax.random.fold_in(key, step), (4, 3))
    return inputs, inputs.sum(-1)


def _drawn():
    """A kind of batches of any size, drawn by a key."""
    split = data.Examples(jnp.asarray(X), jnp.asarray(X[:, 0]))
    return Batches(
        split,
        lambda split, key, batch, steps: data.batch_indices(key, 40, batch=batch, steps=steps),
        lambda split, order: (split.inputs[order], split.targets[order]),
    )


KINDS = {
    "list": [_function(jax.random.key(5), step) for step in range(6)],
    "function": _function,
    "batches": _drawn(),
    "grain": DATASET,
}


@pytest.mark.parametrize("batches", KINDS.values(), ids=KINDS)
def test_a_stream_gives_the_batches_of_a_run_from_any_position(batches):
    """By the seed and the step alone."""
    taken = list(itertools.islice(stream(batches, KEY, batch=4, steps=6), 6))
    jitted = as_batches(batches, batch=4, steps=6)
    drawn = jitted.draw(jitted.data, KEY, 4, 6)
    for step, batch in enumerate(taken):
        expected = jitted.fetch(jitted.data, jax.tree.map(lambda leaf, step=step: leaf[step], drawn))
        for one, other in zip(batch, expected, strict=True):
            # A function of the user's is compiled, and rounds otherwise.
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)
    first = stream(batches, KEY, batch=4, steps=6)
    next(first)
    next(first)
    again = stream(batches, KEY, batch=4, steps=6)
    again.set_state(first.get_state())
    jax.tree.map(np.testing.assert_array_equal, next(again), taken[2])
    assert not np.array_equal(taken[1][0], taken[2][0])


def test_a_stream_ends_with_the_run():
    assert len(list(stream(_function, KEY, batch=4, steps=3))) == 3


def test_a_stream_is_left_as_it_is():
    made = data.grain_stream(DATASET, batch=4)
    assert stream(made, KEY, batch=4, steps=3) is made


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (3, "batches: expected an iterable of .* or a grain dataset, got 3;"),
        (KINDS["list"][:2], "steps: expected at most 2, the number of batches, got 3"),
    ],
)
def test_a_wrong_stream_is_refused(batches, message):
    with pytest.raises(ConfigError, match=message):
        stream(batches, KEY, batch=4, steps=3)


@pytest.mark.parametrize("other", [{"key": jax.random.key(1), "batch": 4}, {"key": KEY, "batch": 5}])
def test_a_position_of_another_seed_or_size_is_refused(other):
    position = stream(_drawn(), KEY, batch=4, steps=3).get_state()
    with pytest.raises(DataError, match="position in the data"):
        stream(_drawn(), steps=3, **other).set_state(position)


def test_several_processes_need_a_sharding(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for make in (
        lambda: stream(_function, KEY, batch=4, steps=3),
        lambda: stream(DATASET, KEY, batch=4, steps=3),
    ):
        with pytest.raises(ConfigError, match=r"sharding: expected how a batch is spread .* all 2 processes"):
            make()
