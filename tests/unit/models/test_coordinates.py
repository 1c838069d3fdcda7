"""A coordinate check with relative positions, where queries go into two products."""

import jax

import mujax
from mujax import models


def relative(width):
    return models.Transformer(
        models.TransformerConfig(d_model=width, n_layers=1, vocab_size=23, max_len=8, relative_positions=True)
    )


def checked(parametrization):
    tokens = jax.random.randint(jax.random.key(0), (4, 6), 1, 23)
    return mujax.coord_check(
        relative, (32, 128), tokens, steps=3, learning_rates=(2.0**-8,), parametrization=parametrization
    )


def test_mup_passes():
    check = checked("mup")
    assert check.verdict == "pass", str(check)
    assert not check.faults


def test_standard_parametrization_fails():
    check = checked("sp")
    assert check.verdict == "fail"
    assert any("distance_embedding" in fault.name for fault in check.faults), str(check)
