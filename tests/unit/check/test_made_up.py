"""Inputs and targets that checks make up."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mujax.check._made_up import loss_of_all, loss_of_one, made_up, made_up_for_all, made_up_inputs
from mujax.core._mup_init import mup_init
from mujax.errors import ConfigError

KEY = jax.random.key(0)


class Tokens(nn.Module):
    width: int

    @nn.compact
    def __call__(self, tokens: jax.Array, keep: jax.Array, x: jax.Array) -> jax.Array:
        h = nn.Embed(11, self.width, name="words")(tokens)
        h = h + nn.Embed(300, self.width, name="places")(jnp.arange(6)) + nn.Dense(self.width)(x)
        return nn.Dense(5)(jnp.where(keep, h, 0))


def test_made_up_inputs_are_in_range_and_given_ones_stay() -> None:
    given = jnp.full((4, 6, 3), 7.0)
    abstract = (
        jax.ShapeDtypeStruct((4, 6), jnp.int32),
        jax.ShapeDtypeStruct((4, 6, 1), jnp.bool_),
        jax.ShapeDtypeStruct((4, 6, 3), jnp.float32),
    )
    mup = mup_init(Tokens(16), Tokens(8), *abstract)
    tokens, keep, x = made_up_inputs(abstract, mup, KEY)
    assert (tokens.dtype, tokens.shape) == (jnp.int32, (4, 6))
    # The smaller of the tables: beyond it a lookup would be out of bounds.
    assert set(np.unique(tokens)) <= set(range(11))
    assert len(np.unique(tokens)) > 5
    assert keep.dtype == bool
    assert keep.all()
    assert x.shape == given.shape
    assert 0.5 < float(jnp.std(x)) < 1.5
    assert made_up_inputs((given,), mup, KEY)[0] is given


def test_integers_that_nothing_is_looked_up_by_are_zeros_and_ones() -> None:
    class Counted(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(3)(nn.Dense(self.width)(jax.nn.one_hot(x, 4)))

    abstract = (jax.ShapeDtypeStruct((32,), jnp.int32),)
    (numbers,) = made_up_inputs(abstract, mup_init(Counted(16), Counted(8), *abstract), KEY)
    assert set(np.unique(numbers)) == {0, 1}


class Several(nn.Module):
    """Returns what the function makes of two arrays."""

    width: int
    of: object

    @nn.compact
    def __call__(self, x: jax.Array) -> object:
        h = nn.relu(nn.Dense(self.width)(x))
        return self.of(nn.Dense(5)(h), nn.Dense(1)(h)[:, 0])


X = jnp.ones((4, 3))


def outputs(of: object) -> object:
    mup = mup_init(Several(16, of), Several(8, of), X)
    return mup, mup.apply(mup.init(KEY), X)


def test_an_array_beside_a_string_and_none_is_the_one_array() -> None:
    mup, output = outputs(lambda y, z: (y, "a name", None))
    ((_, targets),) = made_up(mup, (X,), 0)
    assert targets.shape == (4,)
    assert loss_of_one(output, targets) == loss_of_one(output[0], targets)


@pytest.mark.parametrize("of", [lambda y, z: (y, z), lambda y, z: "no array"])
def test_not_one_array_needs_targets(of: object) -> None:
    mup, _ = outputs(of)
    with pytest.raises(ConfigError, match="inputs: expected a model that returns one array"):
        made_up(mup, (X,), 0)


def test_all_arrays_of_floats_have_a_loss() -> None:
    mup, output = outputs(lambda y, z: {"y": y, "z": z, "picked": jnp.argmax(y, -1), "name": "a name"})
    ((_, targets),) = made_up_for_all(mup, (X,), 0)
    assert [(one.shape, one.dtype.kind) for one in targets] == [((4,), "i"), ((4,), "f")]
    parts = [loss_of_one(output[name], target) for name, target in zip("yz", targets, strict=True)]
    np.testing.assert_allclose(loss_of_all(output, targets), sum(parts), rtol=1e-6)
