"""Training curves: what a run is, on every kind of model, and what diverges."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx

import mujax
from mujax.check import _curves as curves
from mujax.check._curves import Curve, Run, train_curves
from mujax.check._models import optimizer_of
from mujax.errors import ConfigError
from mujax.train._batches import check_batches
from mujax.train._losses import default_loss

STEPS, BATCH, FEATURES = 12, 8, 4


def batches(steps=STEPS):
    x = jax.random.normal(jax.random.key(3), (steps, BATCH, FEATURES))
    return [(each, 2 + jnp.sin(each[:, :1])) for each in x]


def linen(width):
    return nn.Sequential([nn.Dense(width, use_bias=False), nn.relu, nn.Dense(1, use_bias=False)])


def nnx_factory(width):
    return lambda rngs: nnx.Sequential(
        nnx.Linear(FEATURES, width, use_bias=False, rngs=rngs),
        nnx.relu,
        nnx.Linear(width, 1, use_bias=False, rngs=rngs),
    )


def functional(width):
    def init(key, x):
        one, two = jax.random.split(key)
        return {
            "first": jax.random.normal(one, (FEATURES, width)) / 2,
            "readout": jax.random.normal(two, (width, 1)) / jnp.sqrt(width),
        }

    return mujax.Functional(init, lambda params, x: nn.relu(x @ params["first"]) @ params["readout"])


def image_model(width):
    return nn.Sequential(
        [lambda x: x[..., None], nn.Conv(width, (3,)), nn.relu, lambda x: x.mean(1), nn.Dense(1)]
    )


def in_mup(factory, width=16):
    return mujax.mup_init(factory(width), factory(8), batches(1)[0][0])


@pytest.mark.parametrize("factory", [nnx_factory, functional, image_model])
def test_a_curve_is_what_a_loop_by_hand_gives(factory):
    mup, data = in_mup(factory), batches()
    run = Run(-6.0, 1)
    curve = train_curves(mup, data, mujax.mup_adam, default_loss, [run])[run]
    assert curve is not None

    # By hand, through the replayed call: the same initial values, another loop.
    init_key, _ = jax.random.split(jax.random.key(1))
    params, variables = mup.replay.init(init_key)
    tx = mujax.mup_adam(2.0**-6, mup.spec)
    state = tx.init(params)

    def loss(params, batch):
        return default_loss(mup.replay.apply(params, variables, (batch[0],))[0], batch[1])

    untrained = loss(params, data[-1])
    expected = []
    step = jax.jit(jax.value_and_grad(loss))
    for batch in data:
        value, gradient = step(params, batch)
        expected.append(value)
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(curve.losses, expected, rtol=2e-5)
    np.testing.assert_allclose(curve.untrained, untrained, rtol=2e-5)


def test_convolutions_step_in_python_on_cpu_and_nothing_else_does():
    assert curves.steps_in_python(in_mup(image_model).replay.program) == (jax.default_backend() == "cpu")
    assert not curves.steps_in_python(in_mup(linen).replay.program)


def test_both_loops_train_alike(monkeypatch):
    mup, data = in_mup(linen), batches()
    runs = [Run(-5.0, 0), Run(-5.0, 1)]
    one = train_curves(mup, data, mujax.mup_adam, default_loss, runs)
    monkeypatch.setattr(curves, "steps_in_python", lambda program: True)
    other = train_curves(mup, data, mujax.mup_adam, default_loss, runs)
    for run in runs:
        assert one[run].untrained == pytest.approx(other[run].untrained, rel=1e-5)
        np.testing.assert_allclose(one[run].losses, other[run].losses, rtol=1e-5)
    assert not np.allclose(one[runs[0]].losses, one[runs[1]].losses)


def test_a_diverged_run_is_none_and_the_rest_stands():
    runs = [Run(-6.0, 0), Run(20.0, 0)]
    found = train_curves(in_mup(linen), batches(), optimizer_of("sgd"), default_loss, runs)
    assert found[runs[1]] is None
    assert isinstance(found[runs[0]], Curve)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "expected at least one (inputs, targets) pair, got none"),
        ([jnp.zeros((2, 3))], "pair at every step, got ArrayImpl at step 0"),
        (
            [(jnp.zeros(2), jnp.zeros(2)), (jnp.zeros(3), jnp.zeros(3))],
            "(((3,), 'float32'), ((3,), 'float32')) at step 1",
        ),
    ],
)
def test_batches_must_be_pairs_of_the_same_shapes(given, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        check_batches(given)
