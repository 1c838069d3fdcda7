"""Training as a job: what each hyperparameter does, what is measured, Linen, NNX and pure functions alike."""

from __future__ import annotations

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mujax
from mujax.errors import ConfigError
from mujax.train._batches import Batches, as_batches
from mujax.train._lanes import CompiledRuns, run_lanes
from mujax.train._run import SCHEDULES, optimizer_from, schedule, training_run

STEPS = 12
INPUTS = jax.random.normal(jax.random.key(0), (STEPS, 16, 4))
TARGETS = jnp.sin(INPUTS.sum(-1, keepdims=True))
BATCHES = list(zip(INPUTS, TARGETS, strict=True))


def net(width, *, depth=1, act="relu"):
    hidden = [layer for _ in range(depth) for layer in (nn.Dense(width), getattr(nn, act))]
    return nn.Sequential([nn.Dense(width), nn.relu, *hidden, nn.Dense(1)])


class Nnx(nnx.Module):
    def __init__(self, width, *, rngs):
        self.first = nnx.Linear(4, width, rngs=rngs)
        self.hidden = nnx.Linear(width, width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.out = nnx.Linear(width, 1, rngs=rngs)

    def __call__(self, x):
        x = self.norm(nnx.relu(self.hidden(nnx.relu(self.first(x)))))
        return self.out(self.drop(x))


def pure(width):
    def init(key, x):
        one, two = jax.random.split(key)
        return {
            "in": jax.random.normal(one, (4, width)) / 2,
            "out": jax.random.normal(two, (width, 1)) / width**0.5,
        }

    return mujax.Functional(init, lambda params, x: jnp.tanh(x @ params["in"]) @ params["out"])


def trained(job, mode="loop", seeds=(0,), **hparams):
    """Metrics of a run for each seed; whole numbers and names are static."""
    static = {name: value for name, value in hparams.items() if not isinstance(value, float)}
    traced = {name: np.repeat(value, len(seeds)) for name, value in hparams.items() if name not in static}
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    return run_lanes(CompiledRuns(job, static, mode=mode), traced, keys)


def run_of(model=net, width=16, base_width=8, **options):
    return training_run(model, BATCHES, steps=STEPS, width=width, base_width=base_width, **options)


# ---- the run itself --------------------------------------------------------------------------------------


def test_it_is_the_loop_that_one_would_write():
    mup = mujax.mup_init(net(16), net(8), INPUTS[0])
    hparams = {
        "learning_rate": 2.0**-7,
        "b1": 0.8,
        "weight_decay": 0.1,
        "lr_mult_hidden": 0.5,
        "output_mult": 2.0,
    }
    (found,) = trained(run_of(optimizer="adamw"), **hparams)

    init_key, _, _ = jax.random.split(jax.random.key(0), 3)
    variables = mup.init(init_key, INPUTS[0])
    model = mup.with_multipliers(output_mult=2.0)
    tx = mujax.mup_adamw(2.0**-7, mup.spec, b1=0.8, weight_decay=0.1, lr_mults={"hidden": 0.5})
    state = tx.init(variables)

    @jax.jit
    def step(variables, state, x, y):
        def loss(variables):
            return jnp.square(model.apply(variables, x) - y).mean()

        value, gradient = jax.value_and_grad(loss)(variables)
        updates, state = tx.update(gradient, state, variables)
        return optax.apply_updates(variables, updates), state, value

    losses = []
    for x, y in BATCHES:
        variables, state, value = step(variables, state, x, y)
        losses.append(float(value))
    np.testing.assert_allclose(found["curve"], losses, rtol=1e-5)
    assert found["mean_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    # The last tenth of 12 steps is one.
    assert found["loss"] == pytest.approx(losses[-1], rel=1e-5)
    assert not found["diverged"]


@pytest.mark.parametrize("model", [net, lambda width: lambda rngs: Nnx(width, rngs=rngs), pure])
def test_modes_agree_for_linen_nnx_and_functions(model):
    job = run_of(model)
    rates = {"learning_rate": 2.0 ** -np.arange(5.0, 8.0), "init_scale": np.array([0.5, 1.0, 1.5])}
    keys = jnp.stack([jax.random.key(seed) for seed in (0, 1, 0)])
    curves = {
        mode: np.stack(
            [found["curve"] for found in run_lanes(CompiledRuns(job, {}, mode=mode), rates, keys, rungs=[5])]
        )
        for mode in ("loop", "map", "vmap")
    }
    for one, other in itertools.combinations(curves.values(), 2):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    # Another seed and another rate are other curves.
    assert np.abs(curves["loop"][0] / curves["loop"][1] - 1).max() > 0.01
    assert np.abs(curves["loop"][0] / curves["loop"][2] - 1).max() > 0.01


def test_held_out_batches_are_scored_after_training():
    (same,) = trained(run_of(valid=[BATCHES[-1]]), learning_rate=2.0**-6)
    (none,) = trained(run_of(), learning_rate=2.0**-6)
    assert "valid_loss" not in none
    # The batch that was learned from last: better after the step than before it.
    assert same["valid_loss"] < same["loss"]
    assert same["valid_loss"] == pytest.approx(same["loss"], rel=0.5)


def test_a_run_that_diverges_is_told_from_one_that_learns():
    assert [found["diverged"] for found in trained(run_of(), learning_rate=2.0**-8, seeds=(0, 1))] == [0, 0]
    assert [found["diverged"] for found in trained(run_of(), learning_rate=2.0**6, seeds=(0, 1))] == [1, 1]


def test_a_convolution_on_a_cpu_is_stepped_from_python():
    def images(width):
        return nn.Sequential([nn.Conv(width, (3, 3)), nn.relu, lambda x: x.mean((1, 2)), nn.Dense(2)])

    x = jax.random.normal(jax.random.key(0), (3, 4, 8, 8, 1))
    y = jnp.zeros((3, 4), jnp.int32)
    job = training_run(images, zip(x, y, strict=True), steps=3, width=8, base_width=4)
    assert job.in_loop == (jax.default_backend() != "cpu")
    assert run_of().in_loop
    one, other = (trained(job, mode, learning_rate=0.01)[0]["curve"] for mode in ("loop", "vmap"))
    np.testing.assert_allclose(one, other, rtol=1e-5)
    assert one[-1] < one[0]


# ---- hyperparameters -------------------------------------------------------------------------------------


TURNED = {
    "lr_mult_input": (1.0, 0.25),
    "lr_mult_hidden": (1.0, 0.25),
    "lr_mult_output": (1.0, 0.25),
    "b1": (0.9, 0.5),
    "b2": (0.999, 0.5),
    "eps": (1e-8, 0.1),
    "weight_decay": (0.0, 5.0),
    "init_scale": (1.0, 0.5),
    "output_mult": (1.0, 2.0),
    "input_mult": (1.0, 2.0),
    "warmup": (0.0, 0.5),
}


def test_every_hyperparameter_does_something():
    # One lane as it is, and one for each hyperparameter: traced, so a single program.
    traced = {"learning_rate": np.full(1 + len(TURNED), 2.0**-5)}
    for place, (name, (plain, turned)) in enumerate(TURNED.items(), start=1):
        traced[name] = np.full(1 + len(TURNED), plain)
        traced[name][place] = turned
    keys = jnp.stack([jax.random.key(0)] * (1 + len(TURNED)))
    plain, *others = run_lanes(CompiledRuns(run_of(optimizer="adamw"), {}, mode="map"), traced, keys)
    for name, turned in zip(TURNED, others, strict=True):
        assert np.abs(plain["curve"] / turned["curve"] - 1).max() > 1e-3, name
        starts = name in ("init_scale", "output_mult", "input_mult")
        assert (plain["curve"][0] != pytest.approx(turned["curve"][0], rel=1e-6)) == starts, name


def test_attention_has_its_multiplier():
    def attention(width):
        class Model(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = nn.MultiHeadDotProductAttention(2, qkv_features=width)(nn.Dense(width)(x))
                return nn.Dense(1)(x)

        return Model()

    x = jax.random.normal(jax.random.key(0), (4, 2, 5, 4))
    job = training_run(attention, zip(x, x[..., :1], strict=True), steps=4, width=16, base_width=8)
    (plain,), (turned,) = (
        trained(job, learning_rate=2.0**-5, **given) for given in ({}, {"attention_mult": 8.0})
    )
    assert plain["curve"][0] != pytest.approx(turned["curve"][0], rel=1e-4)


def test_sigma_multiplies_weights_and_not_biases_or_gains():
    class Normed(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x):
            x = nn.Dense(self.width, bias_init=nn.initializers.normal(1.0))(x)
            return nn.Dense(1)(nn.LayerNorm()(x))

    job = training_run(Normed, BATCHES, steps=1, width=16, base_width=8)
    key = jax.random.key(0)
    one, two = (
        job.init({"learning_rate": 0.1, "init_scale": scale}, key, job.data)["train"].params
        for scale in (1.0, 3.0)
    )
    ratios = jax.tree.map(
        lambda after, before: float((after / jnp.where(before == 0, 1, before)).max()), two, one
    )
    assert ratios["Dense_0"] == pytest.approx({"kernel": 3.0, "bias": 1.0})
    assert ratios["LayerNorm_0"]["scale"] == 1.0
    assert ratios["Dense_1"]["kernel"] == pytest.approx(3.0)


def test_what_the_factory_takes_is_static_and_reaches_it():
    job = run_of()
    assert job.static == {"depth", "act", "batch", "steps", "schedule"}
    (one,), (two,), (tanh,) = (
        trained(job, learning_rate=2.0**-5, **given) for given in ({}, {"depth": 2}, {"act": "tanh"})
    )
    assert len({round(float(found["curve"][0]), 6) for found in (one, two, tanh)}) == 3


def test_steps_and_batch_are_sizes():
    def draw(data, key, batch, steps):
        return jax.random.randint(key, (steps, batch), 0, len(data))

    pool = Batches(
        INPUTS.reshape(-1, 4), draw, lambda data, places: (data[places], data[places].sum(-1)[:, None])
    )
    job = training_run(net, pool, steps=4, width=16, base_width=8, batch=2)
    assert (job.steps({}), job.steps({"steps": 9})) == (4, 9)
    assert job.built({"batch": 32}).mup.replay.inputs[0].shape == (32, 4)
    assert trained(job, learning_rate=0.01, steps=9)[0]["curve"].shape == (9,)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name):
    hparams = {"learning_rate": 2.0, "schedule": name, "warmup": 0.25, "end": 0.1}
    rate = np.array([float(schedule(hparams, 100)(step)) for step in range(100)])
    assert rate[:25] == pytest.approx(2 * np.arange(1, 26) / 25, rel=1e-6)
    assert rate.max() == pytest.approx(2.0)
    assert (np.diff(rate[25:]) <= 1e-6).all()
    last = {"constant": 2.0, "linear": 0.2, "cosine": 0.2, "inverse_sqrt": 2 * (25 / 100) ** 0.5}[name]
    assert rate[-1] == pytest.approx(last, rel=0.15)
    traced = jax.jit(lambda warmup: schedule({**hparams, "warmup": warmup}, 100)(10))(0.25)
    assert float(traced) == pytest.approx(rate[10])


# ---- what is wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: schedule({"learning_rate": 1.0, "schedule": "step"}, 3),
            "schedule: expected one of 'constant'",
        ),
        (lambda: as_batches(3), "batches: expected an iterable of .* got 3"),
        (lambda: training_run(net, BATCHES, steps=STEPS), "width: expected the width of the model, got none"),
        (lambda: run_of().steps({"steps": 99}), "steps: expected at most 12, the number of batches, got 99"),
        (lambda: run_of().steps({"batch": 8}), "batch: expected batches that can be of any size to tune it"),
        (lambda: run_of().steps({"steps": 0}), "steps: expected a whole number of at least 1, got 0"),
        (lambda: run_of().steps({"steps": 2.5}), "steps: expected a whole number of at least 1, got 2.5"),
        (
            lambda: trained(run_of(optimizer="sgd"), learning_rate=0.1, b1=0.9),
            "b1: expected a hyperparameter of sgd, which takes momentum; leave it out",
        ),
        (lambda: optimizer_from("adamm", 3), "optimizer: expected one of"),
        (
            lambda: training_run(mujax.mup_init(net(16), net(8), INPUTS[0]), BATCHES, steps=3, width=3),
            "training_run: expected a ready MupModel alone",
        ),
    ],
)
def test_what_makes_no_sense_is_one_sentence(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        (
            {"init_scale": 1.0},
            "learning_rate: expected it among the hyperparameters, got none; tune or fix it",
        ),
        ({"learning_rate": 1.0, "lr_mult_hiden": 1.0}, "did you mean 'lr_mult_hidden'?"),
        (
            {"learning_rate": 1.0, "nonsense": 1.0},
            "nonsense: expected a hyperparameter of the training or the",
        ),
        ({"learning_rate": 1.0, "dropout": 0.1}, "dropout: expected a hyperparameter of the training or the"),
        ({"learning_rate": 1.0, "momentum": 0.9}, "momentum: expected a hyperparameter of adam, which takes"),
        (
            {"learning_rate": 1.0, "attention_mult": 2.0},
            "attention_mult: expected a model with something for it",
        ),
    ],
)
def test_hyperparameters_that_would_do_nothing_are_refused_before_anything_is_run(hparams, message):
    job = run_of()
    job.check({"learning_rate": 1.0, "b1": 0.9, "depth": 2, "warmup": 0.1, "output_mult": 2.0})
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        mujax.sweep(job, {name: [value] for name, value in hparams.items()}, trials=1)
    own = run_of(optimizer=lambda hparams, spec: mujax.mup_adam(hparams["nonsense"], spec))
    own.check({"nonsense": 1.0})


def test_a_ready_model_and_a_function_of_the_step_will_do():
    mup = mujax.mup_init(net(16), net(8), INPUTS[0])

    def batch(key, step):
        x = jax.random.normal(jax.random.fold_in(key, step), (16, 4))
        return x, x[:, :1]

    (one, two) = trained(training_run(mup, batch, steps=4), learning_rate=0.01, seeds=(0, 1))
    assert one["curve"].shape == (4,)
    assert len(set(one["curve"].tolist())) == 4
    assert (one["curve"] != two["curve"]).all()
