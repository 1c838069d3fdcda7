"""Defaults of the coordinate check: widths, batches, made-up inputs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mujax import data, models
from mujax.cli._builtin import BUILTIN, made_up
from mujax.core._mup_init import mup_init
from mujax.errors import DataError
from mujax.train._losses import default_loss

KEY = jax.random.key(0)


def test_every_model_that_explain_knows_can_be_checked() -> None:
    assert set(BUILTIN) == set(models.BUILD)


@pytest.mark.parametrize("real", [True, False])
@pytest.mark.parametrize("name", BUILTIN)
def test_the_batch_fits_the_model_with_real_data_and_without(
    name: str, real: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise DataError("not installed")

    if not real:
        monkeypatch.setattr(data, "mnist", missing)
        monkeypatch.setattr(data, "text", missing)
    entry = BUILTIN[name]
    inputs, targets = entry.batch(KEY)
    model = entry.build(8)
    variables = jax.eval_shape(model.init, KEY, *inputs)
    output = jax.eval_shape(
        lambda variables: model.apply(variables, *inputs, **entry.kwargs, mutable=["batch_stats"])[0],
        variables,
    )
    assert jax.eval_shape(default_loss, output, targets).shape == ()
    assert 0 <= int(targets.min()) < int(targets.max()) < output.shape[-1]
    assert np.isfinite(np.asarray(inputs[0])).all()
    if jnp.issubdtype(inputs[0].dtype, jnp.integer):
        assert len(np.unique(inputs[0])) > 10
    else:
        assert float(jnp.std(inputs[0])) > 0.3
    assert len(entry.widths) >= 4
    assert entry.widths[-1] == 8 * entry.widths[0]


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
    tokens, keep, x = made_up(abstract, mup, KEY)
    assert (tokens.dtype, tokens.shape) == (jnp.int32, (4, 6))
    # The smaller of the tables: beyond it a lookup would be out of bounds.
    assert set(np.unique(tokens)) <= set(range(11))
    assert len(np.unique(tokens)) > 5
    assert keep.dtype == bool
    assert keep.all()
    assert x.shape == given.shape
    assert 0.5 < float(jnp.std(x)) < 1.5
    assert made_up((given,), mup, KEY)[0] is given


def test_integers_that_nothing_is_looked_up_by_are_zeros_and_ones() -> None:
    class Counted(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(3)(nn.Dense(self.width)(jax.nn.one_hot(x, 4)))

    abstract = (jax.ShapeDtypeStruct((32,), jnp.int32),)
    (numbers,) = made_up(abstract, mup_init(Counted(16), Counted(8), *abstract), KEY)
    assert set(np.unique(numbers)) == {0, 1}
