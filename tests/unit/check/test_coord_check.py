"""The coordinate check passes models in µP, fails others, and measures the sizes that it reports."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mujax
from mujax import models
from mujax.check._measure import STATS, Program, Subject
from mujax.check._slopes import Check, Slope, settled
from mujax.check._taps import find_taps
from mujax.errors import ConfigError
from mujax.testing import assert_mup
from mujax.train._losses import default_loss

X = jax.random.normal(jax.random.key(0), (8, 12))
TOKENS = jax.random.randint(jax.random.key(0), (2, 8), 0, 32)
IMAGES = jax.random.normal(jax.random.key(0), (8, 8, 8, 3))


class MLP(nnx.Module):
    """Two hidden layers."""

    def __init__(self, width, rngs):
        self.first = nnx.Linear(12, width, rngs=rngs)
        self.hidden = nnx.Linear(width, width, rngs=rngs)
        self.readout = nnx.Linear(width, 8, rngs=rngs)

    def __call__(self, x):
        return self.readout(nnx.relu(self.hidden(nnx.relu(self.first(x)))))


def nnx_mlp(width):
    return lambda rngs: MLP(width, rngs)


def linen_mlp(width):
    return nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(width), nn.relu, nn.Dense(8)])


def pure_mlp(width):
    model = linen_mlp(width)
    return mujax.Functional(
        lambda key, x: model.init(key, x)["params"], lambda params, x: model.apply({"params": params}, x)
    )


def transformer(width, **options):
    config = models.TransformerConfig(d_model=width, n_layers=1, vocab_size=32, max_len=8, **options)
    return models.Transformer(config)


def both_growing(width):
    """Four times the width: twice as many heads, twice as large."""
    return transformer(width, head_dim={32: 8, 128: 16}[width])


def resnet(width):
    return models.ResNet(models.ResNetConfig(stage_sizes=(1, 1), stage_widths=(width, 2 * width)))


def momentum(rate, spec):
    return mujax.mup_sgd(rate, spec, momentum=0.9)


SMALL, LARGE = (2.0**-7,), (2.0**-4,)
# Two widths are enough to distinguish pass from fail; one case has three, as is advised.
CONFIGS = {
    "mlp, sgd": (linen_mlp, (32, 128), X, "sgd", LARGE),
    "mlp, adam": (linen_mlp, (32, 64, 128), X, "adam", SMALL),
    "nnx, adam": (nnx_mlp, (32, 128), X, "adam", SMALL),
    "functional, adamw": (pure_mlp, (32, 128), X, "adamw", SMALL),
    "heads grow, adam": (functools.partial(transformer, head_dim=8), (32, 128), TOKENS, "adam", SMALL),
    "head size grows, adamw": (functools.partial(transformer, n_heads=4), (32, 128), TOKENS, "adamw", SMALL),
    "both grow, adam": (both_growing, (32, 128), TOKENS, "adam", SMALL),
    "tied, adam": (functools.partial(transformer, tie_embeddings=True), (32, 128), TOKENS, "adam", SMALL),
    "scanned, adam": (functools.partial(transformer, scan_layers=True), (32, 128), TOKENS, "adam", SMALL),
    "resnet, momentum": (resnet, (8, 32), IMAGES, momentum, (2.0**-6,)),
}


@functools.cache
def run(name, **settings):
    """The check of a case, and the progress that it reported."""
    factory, widths, inputs, optimizer, rates = CONFIGS[name]
    train = {"kwargs": {"train": True}} if factory is resnet else {}
    given, reported = {"steps": 4, "learning_rates": rates, **train, **settings}, []
    return mujax.coord_check(factory, widths, inputs, optimizer, progress=reported.append, **given), reported


def checked(name, **settings):
    return run(name, **settings)[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_mup_passes(name):
    check = checked(name)
    assert check.verdict == "pass", str(check)
    assert check
    assert not check.faults


# One of each kind of mechanism: the others differ in nothing that the standard parametrization would touch.
@pytest.mark.parametrize("name", ["mlp, sgd", "nnx, adam", "tied, adam", "resnet, momentum"])
def test_standard_parametrization_fails(name):
    check = checked(name, parametrization="sp", seeds=3)
    assert check.verdict == "fail", str(check)
    assert check.faults
    # It fails in what was measured, not only by the rules.
    assert any(tap.status == "fail" for tap in check.taps), str(check)


@pytest.mark.parametrize("parametrization", ["table3", "table9"])
def test_other_ways_of_writing_pass(parametrization):
    check = mujax.coord_check(
        linen_mlp, (32, 128), X, steps=4, learning_rates=SMALL, parametrization=parametrization
    )
    assert check.verdict == "pass", str(check)


# ---- what is measured ------------------------------------------------------------------------------


def measured(factory, inputs, width=16, base=8, steps=2):
    mup = mujax.mup_init(factory(width), factory(base), inputs)
    taps = find_taps(mup)
    targets = jnp.zeros(mup.replay.output().shape[:-1], jnp.int32)
    subject = Subject(mup.replay, lambda rate: mujax.mup_adam(rate, mup.spec), taps)
    (run,) = Program(subject, default_loss, [((inputs,), targets)], [0]).run(2.0**-7, steps)
    _, *rows = run
    return mup, taps, [np.asarray(row[0]) for row in rows], targets


def by_hand(mup, targets, steps):
    """The parameters before each step and after the last, trained with mup.apply."""
    variables = mup.init(jax.random.key(0), X)
    tx = mujax.mup_adam(2.0**-7, mup.spec)
    params, out = variables["params"], []
    state = tx.init(params)
    for _ in range(steps + 1):
        out.append(params)
        gradient = jax.grad(lambda params: default_loss(mup.apply({"params": params}, X), targets))(params)
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return out


def test_sizes_are_those_of_the_model_trained_by_hand():
    mup, taps, rows, targets = measured(linen_mlp, X)
    first, _, last = by_hand(mup, targets, 2)

    def layers(params):
        one = X @ params["layers_0"]["kernel"] + params["layers_0"]["bias"]
        two = nn.relu(one) @ params["layers_2"]["kernel"]
        logits = mup.apply({"params": params}, X)
        return one, two, logits

    (_, two_0, logits_0), (one, two, logits) = layers(first), layers(last)
    numbers = {tap.name: number for number, tap in enumerate(taps)}
    row = dict(zip(STATS, rows[-1][numbers["layers_2/kernel"]], strict=True))
    change = last["layers_2"]["kernel"] - first["layers_2"]["kernel"]
    part = nn.relu(one) @ change
    np.testing.assert_allclose(row["size"], np.abs(two).mean(), rtol=1e-5)
    np.testing.assert_allclose(row["change"], np.abs(two - two_0).mean(), rtol=1e-4)
    np.testing.assert_allclose(row["by_weights"], np.abs(part).mean(), rtol=1e-4)
    np.testing.assert_allclose(row["by_inputs"], np.abs(two - two_0 - part).mean(), rtol=1e-4)
    out = rows[-1][numbers["output"]]
    np.testing.assert_allclose(out[0], np.abs(logits).mean(), rtol=1e-5)
    np.testing.assert_allclose(out[1], np.abs(logits - logits_0).mean(), rtol=1e-4)
    # Before the first step nothing has changed.
    assert not rows[0][:, STATS.index("change")].any()


def test_a_model_that_passes_clearly_stops_early_and_another_does_not():
    def run(parametrization):
        options = {"steps": 2, "seeds": 4, "learning_rates": (2.0**-7,), "parametrization": parametrization}
        said = []
        check = mujax.coord_check(linen_mlp, (16, 64, 256), X, progress=said.append, **options)
        assert (said[-1].done, said[-1].work_done) == (12, 1.0)
        return check

    right, wrong = run("mup"), run("sp")
    assert (right.verdict, right.seeds) == ("pass", 2)
    # An early end is never a failure: what does not pass is trained with all seeds.
    assert (wrong.verdict, wrong.seeds) == ("fail", 4)


@pytest.mark.parametrize(
    ("check", "expected"),
    [
        (Check("size", Slope(0.1, -0.1, 0.3), (-0.25, 0.25), "pass"), True),
        (Check("size", Slope(0.1, -0.6, 0.8), (-0.25, 0.25), "pass"), False),
        (Check("size", Slope(0.3, 0.1, 0.4), (-0.25, 0.25), "pass"), False),
        (Check("size", Slope(0.1, 0.0, 0.2), (-0.25, 0.25), "pass", "outside at first"), False),
        (Check("size", None, (-0.25, 0.25), "undecided", "diverges"), False),
    ],
)
def test_a_slope_is_settled_if_its_interval_excludes_the_nearest_fault(check, expected):
    # The rules may hold, so that a wide interval passes: it is not settled.
    assert settled(check) == expected


def test_seeds_at_once_or_one_after_the_other():
    mup = mujax.mup_init(linen_mlp(16), linen_mlp(8), X)
    taps = find_taps(mup)
    subject = Subject(mup.replay, lambda rate: mujax.mup_adam(rate, mup.spec), taps)
    batches = [((X,), jnp.zeros(8, jnp.int32))]
    one, two = (
        list(Program(subject, default_loss, batches, [3, 4, 5, 6], lanes=lanes).run(0.01, 2))
        for lanes in (1, 2)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7), one, two)


def test_layers_in_a_scan_are_seen_as_those_outside_of_one():
    _, taps, rows, _ = measured(functools.partial(transformer, scan_layers=True), TOKENS, 32, 16)
    _, plain_taps, plain_rows, _ = measured(transformer, TOKENS, 32, 16)
    assert [tap.kind for tap in taps] == [tap.kind for tap in plain_taps]
    # Other random numbers, the same distribution.
    size = STATS.index("size")
    np.testing.assert_allclose(rows[0][:-2, size], plain_rows[0][:-2, size], rtol=0.25)


def test_taps_are_named_after_parameters_and_modules():
    mup = mujax.mup_init(transformer(32, n_heads=4), transformer(16, n_heads=4), TOKENS)
    taps = find_taps(mup)
    kinds = {tap.name: tap.kind for tap in taps}
    assert kinds["token_embedding/embedding"] == "lookup"
    assert kinds["block_0/attention/query/kernel"] == "product"
    assert kinds["block_0/attention logits"] == "logits"
    assert kinds["block_0/attention mixing"] == "mixing"
    assert kinds["block_0/ff_norm norm"] == "norm"
    assert kinds["block_0/ff_norm/scale"] == "vector"
    assert kinds["readout/kernel"] == "readout"
    assert kinds["output"] == "output"
    assert all("mujax/models/_" in tap.where for tap in taps if tap.site)


def test_each_call_of_a_reused_module_has_a_tap():
    class Twice(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(self.width, name="layer")
            return nn.Dense(4)(layer(layer(nn.Dense(self.width)(x))))

    mup = mujax.mup_init(Twice(32), Twice(16), X)
    taps = find_taps(mup)
    names = [tap.name for tap in taps]
    assert {"layer/kernel #1", "layer/kernel #2"} <= set(names)
    assert len(set(names)) == len(names)


# ---- arguments and results -------------------------------------------------------------------------


def test_batches_and_a_loss_of_the_users_own():
    batches = [(X + shift, jnp.zeros((8, 8))) for shift in (0.0, 0.5)]
    loss = lambda outputs, targets: jnp.abs(outputs - targets).mean()  # noqa: E731
    check = mujax.coord_check(linen_mlp, (32, 128), batches=batches, loss=loss, steps=2, seeds=3)
    assert check.verdict == "pass", str(check)
    assert len(check.learning_rates) == 2


def test_a_ready_mup_model_is_checked_as_it_is():
    def right(width):
        return mujax.mup_init(linen_mlp(width), linen_mlp(32), X, delta=linen_mlp(2 * width))

    def wrong(width):
        base = linen_mlp(width)
        return mujax.mup_init(linen_mlp(width), base, X, delta=linen_mlp(2 * width))

    assert mujax.coord_check(right, (32, 128), X, steps=2, seeds=3).verdict == "pass"
    assert mujax.coord_check(wrong, (32, 128), X, steps=2, seeds=3).verdict == "fail"


def test_result_is_text_and_json(tmp_path):
    check = checked("mlp, adam", parametrization="sp", seeds=2, steps=2)
    text = str(check)
    assert text.startswith("FAIL: ")
    assert "layers_2/kernel: its learning rate scales as width^0.00 and should scale as width^-1.00" in text
    check.save(tmp_path / "check.json")
    stored = json.loads((tmp_path / "check.json").read_text())
    assert stored["verdict"] == "fail"
    assert stored["widths"] == [32, 64, 128]
    assert {one["rule"] for one in stored["faults"]} >= {"learning rate", "forward factor"}
    tap = next(tap for tap in stored["taps"] if tap["name"] == "layers_2/kernel")
    # (widths, steps + 1, quantities), and None for what can't be: nothing has changed at first.
    assert np.shape(tap["sizes"]["0.0078125"]) == (3, 3, 5)


def test_assert_mup(monkeypatch):
    results = {
        "mup": checked("mlp, adam"),
        "sp": checked("mlp, adam", parametrization="sp", seeds=2, steps=2),
    }
    given = []

    def stand_in(*args, parametrization="mup", **kwargs):
        given.append((args, kwargs))
        return results[parametrization]

    monkeypatch.setattr("mujax.testing.coord_check", stand_in)
    assert assert_mup(linen_mlp, (32, 128), X, "adam", steps=2) is results["mup"]
    assert given == [((linen_mlp, (32, 128), X, "adam"), {"steps": 2})]
    with pytest.raises(AssertionError, match="coordinate check: FAIL"):
        assert_mup(linen_mlp, (32, 128), X, parametrization="sp")


def test_progress_ends_at_one():
    _, reported = run("mlp, adam")
    assert [now.done for now in reported] == sorted(now.done for now in reported)
    assert reported[-1].work_done == 1.0
    # Widths times seeds.
    assert (reported[-1].done, reported[-1].total) == (12, 12)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "inputs: expected either inputs or batches, got both or neither."),
        ({"inputs": X, "steps": 0}, "steps: expected a whole number of at least 1, got 0; pass steps=4."),
        ({"inputs": X, "seeds": 0}, "seeds: expected a whole number of at least 1, got 0; pass seeds=4."),
        (
            {"inputs": X, "loss": default_loss},
            "loss: expected batches with targets beside a loss of your own, got inputs only.",
        ),
    ],
)
def test_bad_arguments(given, message):
    with pytest.raises(ConfigError) as error:
        mujax.coord_check(linen_mlp, (16, 32), **given)
    assert str(error.value) == message


def test_one_width_is_not_enough():
    with pytest.raises(ConfigError, match="widths: expected at least two"):
        mujax.coord_check(linen_mlp, (32,), X)


def test_many_outputs_need_a_loss():
    class Two(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x):
            h = nn.relu(nn.Dense(self.width)(x))
            return nn.Dense(4)(h), nn.Dense(2)(h)

    with pytest.raises(ConfigError, match="expected a model that returns one array"):
        mujax.coord_check(Two, (16, 32), X)
    loss = lambda outputs, targets: jnp.square(outputs[0]).mean() + jnp.square(outputs[1]).mean()  # noqa: E731
    check = mujax.coord_check(Two, (32, 128), batches=[(X, None)], loss=loss, steps=2, seeds=3)
    assert [tap.name for tap in check.taps if tap.kind == "output"] == ["output 0", "output 1"]


class ByHand(nn.Module):
    """µP without mujax, as Table 8 has it: the readout's factor behind the product, before the bias."""

    width: int
    factor: float

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.width, name="first")(x))
        x = nn.relu(nn.Dense(self.width, name="hidden")(x))
        kernel = self.param("readout", nn.initializers.normal(0.2), (self.width, 8))
        return (x @ kernel) * self.factor + self.param("bias", nn.initializers.zeros, (8,))


def adam_by_hand(rate, spec):
    """Adam with the hidden kernel's rate divided by the width."""
    width = spec["hidden/kernel"].shape[0]

    def scale(updates, state, params=None):
        hidden = {**updates["hidden"], "kernel": updates["hidden"]["kernel"] * 32 / width}
        return {**updates, "hidden": hidden}, state

    return optax.chain(optax.adam(rate), optax.GradientTransformation(lambda _: optax.EmptyState(), scale))


def test_mup_by_hand_passes_as_it_is():
    given = {"steps": 3, "learning_rates": (2.0**-7,), "parametrization": "sp"}
    check = mujax.coord_check(lambda w: ByHand(w, 32 / w), (32, 128), X, adam_by_hand, **given)
    assert check.verdict == "pass", str(check)
    without = mujax.coord_check(lambda w: ByHand(w, 1.0), (32, 128), X, adam_by_hand, **given)
    assert [(one.name, one.rule) for one in without.faults] == [("readout", "forward factor")]
