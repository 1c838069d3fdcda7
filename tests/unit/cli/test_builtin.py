"""Defaults of the coordinate check: widths, batches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mujax import data, models
from mujax.cli._builtin import BUILTIN
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
