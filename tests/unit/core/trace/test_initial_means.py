"""The mean of initial values: read off the program of an initialiser, and scaled by its own rule."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import random

import mujax
from mujax.core.trace import read_initial_values

INIT = nn.initializers

READ = {
    "normal": (INIT.normal(0.1), 0.0),
    "lecun": (INIT.lecun_normal(), 0.0),
    "truncated": (INIT.truncated_normal(0.3), 0.0),
    "he uniform": (INIT.he_uniform(), 0.0),
    "bfloat16": (lambda key, shape: INIT.normal(0.1)(key, shape, jnp.bfloat16), 0.0),
    "orthogonal": (INIT.orthogonal(2.0), 0.0),
    "zeros": (INIT.zeros, 0.0),
    "ones": (INIT.ones, 1.0),
    "uniform": (INIT.uniform(0.1), 0.05),
    "uniform between": (lambda key, shape: random.uniform(key, shape, minval=1.0, maxval=2.0), 1.5),
    "one and a normal": (lambda key, shape: 1 + 0.1 * random.normal(key, shape), 1.0),
    "small beside a normal": (lambda key, shape: 0.004 + 0.1 * random.normal(key, shape), 0.004),
    "smaller in wider models": (
        lambda key, shape: 0.1 / shape[0] + random.normal(key, shape) / shape[0] ** 0.5,
        0.1 / 32,
    ),
    "less a small mean": (lambda key, shape: random.truncated_normal(key, -2, 2, shape) - 0.003, -0.003),
    "one of two normals": (
        lambda key, shape: jnp.where(jnp.arange(shape[1]) > 3, *(0.002 + random.normal(key, (2, *shape)))),
        0.002,
    ),
    "over the fan-in": (lambda key, shape: random.uniform(key, shape) / shape[0], 0.5 / 32),
    "vmapped": (
        lambda key, shape: jax.vmap(lambda k: random.uniform(k, shape[1:]))(random.split(key, 32)),
        0.5,
    ),
}
NOT_READ = {
    "absolute": lambda key, shape: jnp.abs(random.normal(key, shape)),
    "log uniform": lambda key, shape: jnp.log(random.uniform(key, shape, minval=1.0, maxval=16.0)),
    "squared": lambda key, shape: random.normal(key, shape) ** 2,
    "silu": lambda key, shape: nn.silu(random.normal(key, shape)),
    "sign of a draw": lambda key, shape: (lambda x: x * jnp.sign(x))(random.normal(key, shape)),
    "product with itself": lambda key, shape: (lambda x: x * x)(random.normal(key, shape)),
}


def mean_of(init):
    programs = [jax.make_jaxpr(lambda key, n=n: init(key, (n, n)))(random.key(0)) for n in (8, 32)]
    (found,) = read_initial_values(*programs)
    return found.mean


@pytest.mark.parametrize("name", READ)
def test_the_mean_is_that_of_the_values(name):
    init, expected = READ[name]
    assert mean_of(init) == pytest.approx(expected, abs=1e-6)
    drawn = np.asarray(init(random.key(1), (32, 32)), np.float64)
    assert abs(drawn.mean() - expected) < 5 * drawn.std() / 32 + 1e-3


def test_a_mean_that_rounding_may_make_is_none():
    assert mean_of(lambda key, shape: 1e-7 + random.normal(key, shape)) == 0
    # The twin: a hundred times as much, of a deviation as much smaller.
    assert mean_of(lambda key, shape: 1e-7 + 1e-4 * random.normal(key, shape)) == pytest.approx(1e-7)


@pytest.mark.parametrize("name", NOT_READ)
def test_a_mean_that_does_not_show_is_not_guessed(name):
    assert mean_of(NOT_READ[name]) is None


def linen(width, init):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.relu(nn.Dense(width)(x))
            return nn.Dense(width, kernel_init=init, name="mid")(h)

    return Net()


def nnx_net(width, init):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(8, width, rngs=rngs)
            self.mid = nnx.Linear(width, width, kernel_init=init, rngs=rngs)

        def __call__(self, x):
            return self.mid(nnx.relu(self.first(x)))

    return lambda rngs: Net(rngs)


X = random.normal(random.key(1), (16, 8))


def sizes(net, init, widths=(64, 1024), **kwargs):
    found = []
    for width in widths:
        mup = mujax.mup_init(net(width, init), net(32, init), X, **kwargs)
        found.append(float(jnp.abs(mup.apply(mup.init(random.key(0), X), X)).mean()))
    return found


@pytest.mark.parametrize("net", [linen, nnx_net])
@pytest.mark.parametrize(
    "init", [INIT.uniform(0.1), INIT.ones, lambda key, shape, dtype=None: jnp.abs(random.normal(key, shape))],
    ids=["uniform", "ones", "absolute"],
)  # fmt: skip
def test_a_mean_adds_up_to_the_same_at_every_width(net, init):
    small, large = sizes(net, init)
    assert large == pytest.approx(small, rel=0.3)


def test_with_the_deviations_rule_it_grows():
    """The twin: what the rule for centred values does to a mean."""
    small, large = sizes(linen, INIT.uniform(0.1), roles={"mid/kernel": "input"}, parametrization="sp")
    assert large > 3 * small


def test_the_deviation_keeps_its_rule_and_it_is_explained():
    mup = mujax.mup_init(linen(512, INIT.uniform(0.1)), linen(32, INIT.uniform(0.1)), X)
    kernel = mup.init(random.key(0), X)["params"]["mid"]["kernel"]
    assert float(kernel.mean()) == pytest.approx(0.05 * 32 / 512, rel=0.01)
    assert float(kernel.std()) == pytest.approx(0.1 / np.sqrt(12) / 4, rel=0.01)
    assert "Initial values with a mean" in mup.explain()


def test_centred_values_are_not_shifted():
    mup = mujax.mup_init(linen(512, INIT.orthogonal()), linen(32, INIT.orthogonal()), X)
    assert mup.init_shifts == {}
    assert "Initial values with a mean" not in mup.explain()


# ---- a mean and a deviation that scale differently -----------------------------------------------------

APART = {
    "a constant mean": lambda key, shape: 0.2 + random.normal(key, shape) / shape[0] ** 0.5,
    "a constant deviation": lambda key, shape: 3.0 / shape[0] + 0.2 * random.normal(key, shape),
    "neither is constant": lambda key, shape: 3.0 / shape[0] + random.normal(key, shape) / shape[0] ** 0.5,
    "both are constant": lambda key, shape: 0.2 + 0.3 * random.normal(key, shape),
}


@pytest.mark.parametrize("name", APART)
def test_mean_and_deviation_have_a_rule_each(name):
    def net(width):
        hidden = nn.Dense(width, kernel_init=lambda key, shape, _: APART[name](key, shape))
        return nn.Sequential([nn.Dense(width), nn.relu, hidden, nn.relu, nn.Dense(3)])

    def kernel(width):
        x = jnp.ones((2, 5))
        return mujax.mup_init(net(width), net(64), x).init(random.key(1), x)["params"]["layers_2"]["kernel"]

    small, big = kernel(64), kernel(256)
    # A quarter of the mean, by the coherent rule; half of the deviation.
    assert big.mean() / small.mean() == pytest.approx(1 / 4, rel=0.1)
    assert big.std() / small.std() == pytest.approx(1 / 2, rel=0.05)
