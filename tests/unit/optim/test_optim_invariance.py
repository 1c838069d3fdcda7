"""Tables 3, 8 and 9 are one training run written three ways.

For any θ > 0, (factor · θ, initial values / θ, SGD learning rate / θ², Adam learning rate / θ) is the same
function at every step. Here a network with its factors written by hand is trained in float64 in each.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mujax import rules
from mujax.optim import mup_adam, mup_adamw, mup_scale_by_sgd, mup_sgd, mup_wrap
from mujax.spec import MupSpec, ParamSpec

# Widths grow by 3 and by 5, which are no powers of two and not the same.
PARAMS = {
    "w1": ParamSpec((6, 12), (6, 4), fan_in=(0,), fan_out=(1,), infinite=(1,)),
    "b1": ParamSpec((12,), (4,), fan_out=(0,), infinite=(0,)),
    "w2": ParamSpec((12, 20), (4, 4), fan_in=(0,), fan_out=(1,), infinite=(0, 1)),
    "b2": ParamSpec((20,), (4,), fan_out=(0,), infinite=(0,)),
    "w3": ParamSpec((20, 3), (4, 3), fan_in=(0,), fan_out=(1,), infinite=(0,)),
    "b3": ParamSpec((3,), (3,), fan_out=(0,)),
}
HALF = rules.interpolate("table9", "mup", 0.5)
STEPS = 20
SAME, OTHER = 1e-9, 1e-5

OPTIMIZERS = {
    "momentum": lambda spec: mup_sgd(0.05, spec, momentum=0.9),
    "nesterov": lambda spec: mup_sgd(0.05, spec, momentum=0.9, nesterov=True),
    "decay through momentum": lambda spec: optax.chain(
        mup_scale_by_sgd(spec), optax.add_decayed_weights(0.1), optax.trace(0.9), optax.scale(-0.05)
    ),
    "adam": lambda spec: mup_adam(0.01, spec, eps=1e-30),
    "adam with epsilon": lambda spec: mup_adam(0.01, spec, eps=1e-2, eps_root=1e-4),
    "adamw": lambda spec: mup_adamw(
        optax.cosine_decay_schedule(0.02, STEPS), spec, weight_decay=1.0, nesterov=True
    ),
    "lion": lambda spec: optax.chain(
        mup_wrap(optax.scale_by_lion(), spec, family="adam"),
        optax.add_decayed_weights(0.5),
        optax.scale(-0.01),
    ),
    "adagrad": lambda spec: mup_wrap(optax.adagrad(0.05), spec, family="adam"),
}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def make_spec(chosen):
    return MupSpec(PARAMS, rules.parametrization(chosen))


def curve(chosen, make_tx):
    """The losses of a training run, in the given parametrization."""
    spec = make_spec(chosen)
    chosen = spec.parametrization
    rng = np.random.default_rng(0)
    params = {
        path: jnp.asarray(rng.normal(size=param.shape)) * 0.5 * rules.init_scale(param, chosen, 1.0)
        for path, param in spec.items()
    }
    factor = {path: rules.forward_factor(param, chosen) for path, param in spec.items()}
    x, y = jnp.asarray(rng.normal(size=(16, 6))), jnp.asarray(rng.integers(3, size=16))

    def loss(params):
        h = jnp.tanh(x @ (factor["w1"] * params["w1"]) + factor["b1"] * params["b1"])
        h = jnp.tanh(factor["w2"] * (h @ params["w2"]) + factor["b2"] * params["b2"])
        logits = factor["w3"] * (h @ params["w3"]) + params["b3"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    tx = make_tx(spec)

    def step(carry, _):
        params, state = carry
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=STEPS)[1])
    losses = np.asarray(run((params, tx.init(params))))
    assert losses.dtype == np.float64
    return losses


@functools.cache
def reference(optimizer):
    losses = curve("mup", OPTIMIZERS[optimizer])
    assert losses[-1] < 0.95 * losses[0]  # or there would be nothing to compare
    return losses


def distance(losses, others):
    return np.max(np.abs(losses / others - 1))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("chosen", ["table3", "table9"])
def test_same_run(chosen, optimizer):
    assert distance(curve(chosen, OPTIMIZERS[optimizer]), reference(optimizer)) < SAME


@pytest.mark.parametrize("optimizer", ["momentum", "adam with epsilon"])
def test_same_run_between_two_tables(optimizer):
    assert distance(curve(HALF, OPTIMIZERS[optimizer]), reference(optimizer)) < SAME


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_standard_parametrization_is_another_run(optimizer):
    assert distance(curve("sp", OPTIMIZERS[optimizer]), reference(optimizer)) > OTHER


@pytest.mark.parametrize(
    ("table", "role", "axis"),
    [
        ("table9", "input", 1),
        ("table9", "hidden", 0),
        ("table9", "hidden", 1),
        ("table9", "output", 0),
        ("table3", "output", 0),
    ],
)
@pytest.mark.parametrize(("optimizer", "family"), [("momentum", "sgd"), ("adam", "adam")])
def test_a_wrong_learning_rate_exponent_shows(monkeypatch, table, role, axis, optimizer, family):
    row = rules.TABLES[table][role]
    exponents = list(row.lr[family])
    exponents[axis] += 0.5
    wrong = dataclasses.replace(row, lr={**row.lr, family: tuple(exponents)})
    monkeypatch.setitem(rules.TABLES, table, {**rules.TABLES[table], role: wrong})
    assert distance(curve(table, OPTIMIZERS[optimizer]), reference(optimizer)) > OTHER


@pytest.mark.parametrize("chosen", ["table3", "table9"])
def test_an_epsilon_that_is_not_scaled_shows(chosen):
    def make_tx(spec):
        return mup_adam(0.01, spec, eps=1e-2, eps_root=1e-4, scale_eps=False)

    assert distance(curve(chosen, make_tx), curve("mup", make_tx)) > OTHER


@pytest.mark.parametrize("chosen", ["table3", "table9"])
def test_decay_inside_of_the_factor_shows(chosen):
    """What optax.adamw inside of µP factors would do: each table would decay otherwise."""

    def make_tx(spec):
        factors = {path: rules.lr_factor(param, spec.parametrization, "adam") for path, param in spec.items()}
        scaled = optax.stateless(lambda updates, _: {path: factors[path] * u for path, u in updates.items()})
        adamw = optax.scale_by_adam(eps=1e-30), optax.add_decayed_weights(1.0)
        return optax.chain(*adamw, scaled, optax.scale(-0.01))

    assert distance(curve(chosen, make_tx), curve("mup", make_tx)) > OTHER
