"""How well a program is compiled: as its runs deserve."""

import jax
import jax.numpy as jnp
import pytest

from mujax.train._compile import effort


@pytest.fixture(scope="module")
def lowered():
    return jax.jit(lambda x: jnp.tanh(x) @ x).lower(jnp.ones((64, 64)))


@pytest.mark.parametrize(
    ("runs", "in_part", "level"),
    [(1, False, "0"), (1, True, "0"), (5e3, True, "1"), (5e3, False, None), (1e6, True, None)],
)
def test_what_runs_more_often_is_optimised_more(lowered, runs, in_part, level):
    assert effort(lowered, runs, in_part=in_part).get("xla_backend_optimization_level") == level


def test_this_version_of_xla_knows_all_options(lowered):
    options = effort(lowered, 1)
    assert options
    compiled = lowered.compile(options)
    assert jnp.allclose(compiled(jnp.ones((64, 64))), 64 * jnp.tanh(1.0))
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        lowered.compile({**options, "xla_no_such_option": True})
