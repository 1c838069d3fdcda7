"""Training runs with every optimizer: one run in Tables 3, 8 and 9, steps of the same size at all widths.

For any θ > 0, (factor · θ, initial values / θ, SGD learning rate / θ², Adam learning rate / θ) is the same
function at every step. Here a network with its factors written by hand is trained in float64 in each table.
"""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx

import mujax
from mujax import rules
from mujax.optim import OPTIMIZERS, optimizer
from mujax.spec import MupSpec, ParamSpec

COMPILED = {
    "sophia",
    "novograd",
    "noisy_sgd",
}  # Loops and conditions.


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`optimistic_adam` is deprecated")
        yield


def make_spec(table="mup", width=15, base=(3, 5), features=15, classes=15):
    """A network of two hidden layers; their widths are those of the base times 5 and 3.

    So there are two shapes in all: XLA compiles each operation of each optimizer once for a shape, which
    takes far longer than running it.
    """
    kernel = functools.partial(ParamSpec, fan_in=(0,), fan_out=(1,))
    bias = functools.partial(ParamSpec, fan_out=(0,))
    params = {
        "w1": kernel((features, width), (features, base[0]), infinite=(1,)),
        "b1": bias((width,), (base[0],), infinite=(0,)),
        "w2": kernel((width, width), base, infinite=(0, 1)),
        "b2": bias((width,), (base[1],), infinite=(0,)),
        "w3": kernel((width, classes), (base[1], classes), infinite=(0,)),
        "b3": bias((classes,), (classes,)),
    }
    return MupSpec(params, rules.parametrization(table))


def at_width(width):
    """The same network with few features and classes, which do not hide what depends on width."""
    return make_spec(width=width, base=(32, 32), features=6, classes=3)


RNG = np.random.default_rng(0)
# Inputs and labels by the number of features.
X, Y = {}, {}
X[6], Y[6] = RNG.normal(size=(16, 6)), RNG.integers(3, size=16)
X[15], Y[15] = RNG.normal(size=(16, 15)), RNG.integers(15, size=16)


def forward(params, factor):
    """Of kernels as matrices, where they have several axes of fan-in or fan-out."""
    params = params | {
        "w2": params["w2"].reshape(len(params["w2"]), -1),
        "w3": params["w3"].reshape(-1, params["w3"].shape[-1]),
    }
    h1 = X[len(params["w1"])] @ (factor["w1"] * params["w1"]) + factor["b1"] * params["b1"]
    h2 = factor["w2"] * (jnp.tanh(h1) @ params["w2"]) + factor["b2"] * params["b2"]
    return h1, h2, factor["w3"] * (jnp.tanh(h2) @ params["w3"]) + params["b3"]


def loss(params, factor):
    logits = forward(params, factor)[-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, Y[len(params["w1"])]).mean()


value_and_grad = jax.jit(jax.value_and_grad(loss))
see = jax.jit(forward)


def start(spec, zero=()):
    """Initial values and forward factors; values come from the same random numbers in each table."""
    rng, chosen = np.random.default_rng(1), spec.parametrization
    params = {
        path: jnp.asarray(rng.normal(size=param.shape) * 0.5 * rules.init_scale(param, chosen, 1.0))
        for path, param in spec.items()
    }
    params |= {path: jnp.zeros(spec[path].shape) for path in zero}
    return params, {path: rules.forward_factor(param, chosen) for path, param in spec.items()}


def train(tx, spec, steps, *, zero=(), compiled=False, hessian=False):
    """The losses and what comes of the parameters."""
    params, factor = start(spec, zero)
    update = functools.partial(tx.update, obj_fn=lambda p: loss(p, factor)) if hessian else tx.update
    if compiled:
        update = jax.jit(update)
    state, losses = tx.init(params), []
    for _ in range(steps):
        value, gradients = value_and_grad(params, factor)
        losses.append(float(value))
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return np.array([*losses, float(loss(params, factor))]), params


# ---- three tables, one run --------------------------------------------------------------------------

STEPS = 6
SAME, OTHER = 1e-9, 1e-5
SCHEDULE = optax.linear_schedule(0.1, 0.05, STEPS)
# An estimate of the Hessian's diagonal that is no random one.
SQUARES = optax.stateless(lambda gradients, _: jax.tree.map(jnp.square, gradients))
RUNS = {
    "acprop": (0.05, {"eps_root": 1e-3}),
    "adabelief": (0.05, {"eps": 1e-2}),
    "adadelta": (3.0, {"eps": 1e-2}),
    "adafactor": (0.2, {"min_dim_size_to_factor": 4, "eps": 1e-3, "weight_decay_rate": 1e-2}),
    "adafactor, plain": (
        0.05,
        {"multiply_by_parameter_scale": False, "weight_decay_rate": 0.1},
    ),
    "adagrad": (0.1, {}),
    "adam": (0.05, {"eps": 1e-2}),
    "adamax": (0.05, {"eps": 1e-2}),
    "adamaxw": (0.05, {"weight_decay": 0.5}),
    "adamw": (0.05, {"eps": None, "weight_decay": 0.5}),
    "adamw, arc tangent": (0.05, {"eps": None, "eps_root": 1e-2, "weight_decay": 0.5}),
    "adamw, epsilon": (0.05, {"eps": 1e-2, "eps_root": 1e-4, "weight_decay": 0.5, "nesterov": True}),
    "adan": (0.05, {"weight_decay": 0.5}),
    "ademamix": (0.01, {"weight_decay": 0.5}),
    "adopt": (0.05, {"eps": 1e-2}),
    "amsgrad": (0.05, {"eps_root": 1e-3}),
    "fromage": (SCHEDULE, {"min_norm": 1e-2}),
    "lamb": (0.1, {"weight_decay": 0.5, "eps": 1e-2}),
    "lars": (50.0, {"weight_decay": 0.01, "eps": 1e-2}),
    "lion": (SCHEDULE, {"weight_decay": 0.5, "decay": "decoupled"}),
    "madgrad": (0.05, {"eps": 1e-2}),
    # Compiling takes far longer than running, and with the number of iterations.
    "muon": (0.05, {"ns_steps": 1, "eps": 1e-2, "weight_decay": 0.5, "adam_weight_decay": 0.5}),
    "muon, adaptive": (0.05, {"ns_steps": 1, "eps": 1e-2, "adaptive": True, "consistent_rms": 0.1}),
    "nadam": (0.05, {"eps": 1e-2}),
    "nadamw": (0.05, {"weight_decay": 0.5}),
    "noisy_sgd": (0.2, {"key": 0}),
    "novograd": (0.05, {"eps": 0.1, "weight_decay": 0.5}),
    "optimistic_adam": (0.05, {}),
    "optimistic_adam_v2": (0.05, {"eps": 1e-2}),
    "optimistic_gradient_descent": (0.2, {}),
    "radam": (0.1, {"eps": 1e-2}),
    "rmsprop": (0.02, {"centered": True, "initial_scale": 0.1, "momentum": 0.9}),
    "rprop": (0.02, {}),
    "schedule_free_adamw": (0.1, {"weight_decay": 0.5}),
    "schedule_free_sgd": (0.2, {"weight_decay": 0.1, "warmup_steps": 3}),
    "sgd": (0.2, {"momentum": 0.9}),
    "sgd, nesterov": (0.2, {"momentum": 0.9, "nesterov": True}),
    "sign_sgd": (0.02, {}),
    "signum": (0.02, {}),
    "simplified_ademamix": (0.005, {"weight_decay": 0.5}),
    "sm3": (0.1, {}),
    "sophia": (0.05, {"update_interval": 2, "gamma": 10.0}),
    "sophia, squared gradient": (0.05, {"update_interval": 2, "hessian_diagonal_fn": SQUARES, "gamma": 10.0}),
    "yogi": (0.05, {}),
}
ZERO = {
    "adafactor": ("b1", "b2", "b3"),
    "lamb": ("b1", "b2", "b3", "w3"),
    "lars": ("b1", "b2", "b3", "w3"),
}
CHAINS = {
    "decay through momentum": lambda spec: optax.chain(
        mujax.mup_scale_by_sgd(spec), optax.add_decayed_weights(0.1), optax.trace(0.9), optax.scale(-0.05)
    ),
    "wrapped adagrad": lambda spec: mujax.mup_wrap(optax.adagrad(0.1), spec, family="adam"),
    "wrapped lion": lambda spec: optax.chain(
        mujax.mup_wrap(optax.scale_by_lion(), spec, family="adam"),
        optax.add_decayed_weights(0.5),
        optax.scale(-0.01),
    ),
}
THREE_TABLES = [*CHAINS, *(case for case in RUNS if case not in OPTIMIZERS or not OPTIMIZERS[case].same_run)]


def losses_of(case, table, **kwargs):
    """Where an optimizer reads norms, some parameters start at zero."""
    spec, name = make_spec(table), case.split(",")[0]
    if case in CHAINS:
        return train(CHAINS[case](spec), spec, STEPS)[0]
    rate, given = RUNS[case]
    tx = optimizer(name)(rate, spec, **given, **kwargs)
    zero = ZERO.get(name, ())
    return train(tx, spec, STEPS, zero=zero, compiled=name in COMPILED, hessian=name == "sophia")[0]


@functools.cache
def reference(case):
    return losses_of(case, "mup")


def distance(losses, others):
    return np.max(np.abs(losses / others - 1))


def test_every_optimizer_is_run():
    assert {case.split(",")[0] for case in RUNS} == set(OPTIMIZERS)


@pytest.mark.parametrize("case", THREE_TABLES)
def test_same_run(case):
    losses = reference(case)
    assert abs(losses[-1] / losses[0] - 1) > 1e-3  # or there would be nothing to compare
    for table in ("table3", "table9"):
        assert distance(losses_of(case, table), losses) < SAME, table


@pytest.mark.parametrize("name", [name for name, entry in OPTIMIZERS.items() if entry.same_run])
def test_where_it_is_no_theorem_it_is_not_so(name):
    """The registry says why; near to it they are."""
    assert OTHER < distance(losses_of(name, "table3"), reference(name)) < 0.05


@pytest.mark.parametrize("case", ["sgd", "adam"])
def test_what_lies_between_two_tables_is_the_same_run_and_sp_is_not(case):
    assert distance(losses_of(case, rules.interpolate("table9", "mup", 0.5)), reference(case)) < SAME
    assert distance(losses_of(case, "sp"), reference(case)) > OTHER


@pytest.mark.parametrize(
    ("table", "role", "axis"),
    [
        ("table3", "output", 0),
        ("table9", "input", 1),
        ("table9", "output", 0),
        ("table9", "hidden", 0),
        ("table9", "hidden", 1),
    ],
)
@pytest.mark.parametrize("case", ["adamax", "sgd", "lamb", "novograd"])
def test_a_wrong_learning_rate_exponent_shows(monkeypatch, case, table, role, axis):
    """The twin, for an optimizer of each family whose run is exact."""
    expected = reference(case)
    row, family = rules.TABLES[table][role], OPTIMIZERS[case].family
    exponents = list(row.lr[family])
    exponents[axis] += 0.5
    wrong = dataclasses.replace(row, lr={**row.lr, family: tuple(exponents)})
    monkeypatch.setitem(rules.TABLES, table, {**rules.TABLES[table], role: wrong})
    assert distance(losses_of(case, table), expected) > OTHER


@pytest.mark.parametrize(
    "case", ["adam", "adamw, arc tangent", "adabelief", "lars", "muon", "novograd", "radam"]
)
def test_an_epsilon_that_is_not_scaled_shows(case):
    """Or, for RAdam, first steps that have Adam's rates instead of SGD's."""
    for table in ("table3", "table9"):
        assert distance(losses_of(case, table, scale_eps=False), reference(case)) > OTHER, table


@pytest.mark.parametrize("case", ["muon", "muon, adaptive"])
def test_muon_on_kernels_of_several_axes(case):
    """To 5 heads of size 3, which is 1 at the base, and back: one run in three tables, another in sp."""
    heads = {
        "w2": ParamSpec((15, 5, 3), (3, 5, 1), fan_in=(0,), fan_out=(1, 2), infinite=(0, 2)),
        "w3": ParamSpec((5, 3, 15), (5, 1, 15), fan_in=(0, 1), fan_out=(2,), infinite=(1,)),
    }

    def losses(table, **kwargs):
        spec = MupSpec({**make_spec(table), **heads}, rules.parametrization(table))
        rate, given = RUNS[case]
        return train(mujax.mup_muon(rate, spec, **given, **kwargs), spec, STEPS)[0]

    expected = losses("mup")
    assert abs(expected[-1] / expected[0] - 1) > 1e-3
    for table in ("table3", "table9"):
        assert distance(losses(table), expected) < SAME, table
        assert distance(losses(table, scale_eps=False), expected) > OTHER, table
    assert distance(losses("sp"), expected) > OTHER


@pytest.mark.parametrize("table", ["table3", "table9"])
def test_decay_inside_of_the_factor_shows(table):
    """A µP factor around optax.adamw: each table would decay otherwise."""

    def losses(table):
        spec = make_spec(table)
        factors = {path: rules.lr_factor(param, spec.parametrization, "adam") for path, param in spec.items()}
        scaled = optax.stateless(lambda updates, _: {path: factors[path] * u for path, u in updates.items()})
        adamw = optax.scale_by_adam(eps=1e-30), optax.add_decayed_weights(1.0)
        return train(optax.chain(*adamw, scaled, optax.scale(-0.01)), spec, STEPS)[0]

    assert distance(losses(table), losses("mup")) > OTHER


def test_coupled_decay_is_another_run_in_each_table():
    """The learning rates that it follows are not the same in them."""
    assert (
        distance(
            losses_of("adamaxw", "table3", decay="coupled"), losses_of("adamaxw", "mup", decay="coupled")
        )
        > OTHER
    )
    for table in ("table3", "table9"):
        found = losses_of("adamaxw", table, decay="decoupled")
        assert distance(found, losses_of("adamaxw", "mup", decay="decoupled")) < SAME


# ---- steps of the same size at all widths -----------------------------------------------------------

WIDTHS = (32, 256)
FAMILIES = {
    "sgd": ("sgd", 0.5),
    "adam": ("adam", 1e-3),
    "normalized": ("lamb", 1e-2),
    "normalized_gradient": ("novograd", 1e-2),
    "spectral": ("muon", 1e-2),
}


def spectral(rate, spec, family):
    """Orthogonalises each matrix, by its singular values and not by Newton and Schulz."""

    def update(updates, state, params=None):
        del params

        def flat(leaf):
            if leaf.ndim < 2:
                return leaf / jnp.linalg.norm(leaf)
            u, _, v = jnp.linalg.svd(leaf, full_matrices=False)
            return u @ v

        return jax.tree.map(flat, updates), state

    tx = optax.GradientTransformation(optax.init_empty_state, update)
    return optax.chain(mujax.mup_wrap(tx, spec, family), optax.scale_by_learning_rate(rate))


def slopes(make, zero=(), steps=3, widths=WIDTHS):
    """How the change of each layer's pre-activations goes with width, as a power."""
    sizes = []
    for width in widths:
        spec = at_width(width)
        params, factor = start(spec, zero)
        _, after = train(make(spec), spec, steps, zero=zero, compiled=True)
        pairs = zip(see(params, factor), see(after, factor), strict=True)
        sizes.append([float(jnp.sqrt(jnp.mean((b - a) ** 2))) for a, b in pairs])
    return [np.polyfit(np.log2(widths), np.log2(size), 1)[0] for size in zip(*sizes, strict=True)]


@pytest.mark.parametrize("family", ["sgd", "adam", "normalized", "normalized_gradient"])
def test_steps_are_of_the_same_size(family):
    name, rate = FAMILIES[family]
    found = slopes(lambda spec: optimizer(name)(rate, spec), zero=("w3",))
    assert max(map(abs, found)) < 0.15, found


def test_steps_of_equal_singular_values_are_of_the_same_size():
    """Those of rounding too, which are orthogonal to all that is seen."""
    found = slopes(lambda spec: spectral(1e-2, spec, "spectral"), steps=1)
    assert max(map(abs, found)) < 0.3, found


@pytest.mark.parametrize("family", ["sgd", "adam", "normalized", "normalized_gradient"])
def test_plain_optimizers_steps_are_not(family):
    """The twin: optax's own, on the same model."""
    name, rate = FAMILIES[family]
    found = slopes(lambda spec: OPTIMIZERS[name].constructor(name)(rate), zero=("w3",))
    assert max(map(abs, found)) > 0.3, found


@pytest.mark.parametrize("name", ["lars", "lamb", "adafactor"])
def test_what_starts_at_zero_grows_alike_at_all_widths(name):
    """Biases and a readout of norm 0, which have no trust ratio at first."""
    sizes = []
    for width in WIDTHS:
        spec, zero = at_width(width), ("b1", "b2", "w3")
        tx = optimizer(name)(0.1, spec)
        _, params = train(tx, spec, 3, zero=zero, compiled=True)
        sizes.append([float(jnp.sqrt(jnp.mean(params[path] ** 2))) for path in zero])
    found = [np.polyfit(np.log2(WIDTHS), np.log2(size), 1)[0] for size in zip(*sizes, strict=True)]
    assert max(map(abs, found)) < 0.2, found


def test_without_the_units_a_zero_does_not():
    """The twin: LARS with factors after it only, whose first step of a bias is the bare gradient."""
    sizes = []
    for width in WIDTHS:
        spec, zero = at_width(width), ("b1", "b2", "w3")
        _, params = train(optimizer("lars")(0.1, spec, scale_eps=False), spec, 3, zero=zero, compiled=True)
        sizes.append(float(jnp.sqrt(jnp.mean(params["b1"] ** 2))))
    assert np.polyfit(np.log2(WIDTHS), np.log2(sizes), 1)[0] < -0.5


def test_a_hidden_weight_that_starts_at_zero():
    """Named in zero_init, it moves alike; taken for a random one, less and less."""

    def size(width, **kwargs):
        spec = at_width(width)
        _, params = train(optimizer("lamb")(0.1, spec, **kwargs), spec, 12, zero=("w2",), compiled=True)
        # The spectral norm, which the spectral condition wants to be constant for a square matrix.
        return float(jnp.linalg.norm(params["w2"], 2))

    named, random = (
        np.polyfit(np.log2(WIDTHS), np.log2([size(width, **kwargs) for width in WIDTHS]), 1)[0]
        for kwargs in ({"zero_init": ("w2",)}, {})
    )
    assert abs(named) < 0.1
    assert random < min(named - 0.1, -0.05)


# ---- checkpoints and nnx.Optimizer ------------------------------------------------------------------


class Net(nnx.Module):
    def __init__(self):
        spec = make_spec()
        for path, value in start(spec)[0].items():
            setattr(self, path, nnx.Param(value))


def test_states_pass_through_orbax(tmp_path):
    """All of them at once, after a step, and back into states of their own."""
    spec = make_spec()
    params, _ = start(spec)
    fresh = {
        case: optimizer(case.split(",")[0])(rate, spec, **kwargs).init(params)
        for case, (rate, kwargs) in RUNS.items()
        # An array of random keys is not what Orbax saves; its data is.
        if not case.startswith("noisy")
    }
    moved = jax.tree.map(lambda leaf: ~leaf if leaf.dtype == bool else leaf + 1, fresh)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "states", moved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "states", fresh)
    assert jax.tree.structure(restored) == jax.tree.structure(moved)
    assert jax.tree.all(jax.tree.map(np.array_equal, restored, moved))
    assert not jax.tree.all(jax.tree.map(np.array_equal, restored, fresh))


@pytest.mark.parametrize("case", RUNS)
def test_nnx_optimizer(case):
    """It has the state that the transform has, and does the same step."""
    name, (rate, kwargs) = case.split(",")[0], RUNS[case]
    model, spec = Net(), make_spec()
    tx = optimizer(name)(rate, spec, **kwargs)
    # Sophia's own estimate of the Hessian takes a function; the step is all that it is for.
    extra = {"obj_fn": lambda p: sum(jnp.sum(jnp.cos(leaf)) for leaf in jax.tree.leaves(p))}
    update = functools.partial(tx.update, **(extra if case == "sophia" else {}))
    if name in COMPILED:
        update = jax.jit(update)
    tx = optax.GradientTransformation(tx.init, update)
    wrapped = nnx.Optimizer(model, tx, wrt=nnx.Param)
    state, before = nnx.state(model, nnx.Param), jax.tree.map(jnp.array, nnx.state(model, nnx.Param))
    fresh = jax.tree.leaves(tx.init(nnx.as_pure(state)))
    assert len(jax.tree.leaves(nnx.as_pure(nnx.state(wrapped).get("opt_state", {})))) == len(fresh)
    gradients = jax.tree.map(lambda leaf: 0.1 * leaf, before)
    wrapped.update(model, gradients)
    updates, _ = tx.update(nnx.as_pure(gradients), tx.init(nnx.as_pure(before)), nnx.as_pure(before))
    for path, leaf in nnx.as_pure(nnx.state(model, nnx.Param)).items():
        np.testing.assert_allclose(leaf, nnx.as_pure(before)[path] + updates[path], rtol=1e-12)
