"""Clipping, and what goes around an optimizer: one run in Tables 3, 8 and 9, and at the base optax's.

A network with its factors written by hand is trained in float64. Widths grow by 3 and by 5.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mujax
from mujax import rules
from mujax.errors import MujaxError, SpecMismatchError
from mujax.spec import MupSpec, ParamSpec

PARAMS = {
    "w1": ParamSpec((6, 12), (6, 4), fan_in=(0,), fan_out=(1,), infinite=(1,)),
    "b1": ParamSpec((12,), (4,), fan_out=(0,), infinite=(0,)),
    "w2": ParamSpec((12, 20), (4, 4), fan_in=(0,), fan_out=(1,), infinite=(0, 1)),
    "w3": ParamSpec((20, 3), (4, 3), fan_in=(0,), fan_out=(1,), infinite=(0,)),
    "b3": ParamSpec((3,), (3,), fan_out=(0,)),
}
STEPS = 18
SAME, OTHER = 1e-9, 1e-5
TABLES = ("mup", "table3", "table9")


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def make_spec(parametrization="mup", *, base=False, params=PARAMS):
    sized = {
        path: dataclasses.replace(param, shape=param.base_shape) if base else param
        for path, param in params.items()
    }
    return MupSpec(sized, rules.parametrization(parametrization))


def initial(spec):
    rng = np.random.default_rng(0)
    return {
        path: jnp.asarray(rng.normal(size=param.shape))
        * 0.5
        * rules.init_scale(param, spec.parametrization, 1.0)
        for path, param in spec.items()
    }


def make_loss(spec):
    f = {path: rules.forward_factor(param, spec.parametrization) for path, param in spec.items()}
    rng = np.random.default_rng(1)
    x, y = jnp.asarray(rng.normal(size=(16, 6))), jnp.asarray(rng.integers(3, size=16))

    def loss(params):
        h = jnp.tanh(x @ (f["w1"] * params["w1"]) + f["b1"] * params["b1"])
        h = jnp.tanh(f["w2"] * (h @ params["w2"]))
        logits = f["w3"] * (h @ params["w3"]) + params["b3"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return loss


# ---- clipping -------------------------------------------------------------------------------------------


@functools.cache
def gradients(spec):
    return jax.jit(jax.grad(make_loss(spec)))(initial(spec))


def at_width(parametrization, width):
    """The base has a readout from width 20."""
    grown = {
        path: dataclasses.replace(
            param,
            base_shape=tuple(
                5 * n if axis in param.infinite else n for axis, n in enumerate(param.base_shape)
            ),
            shape=tuple(width if axis in param.infinite else n for axis, n in enumerate(param.shape)),
        )
        for path, param in PARAMS.items()
    }
    return make_spec(parametrization, params=grown)


class TestGlobalNorm:
    @pytest.mark.parametrize("parametrization", [*TABLES, rules.interpolate("mup", "table9", 0.5)], ids=str)
    def test_it_is_table_8s_in_every_table(self, parametrization):
        spec = make_spec(parametrization)
        expected = float(optax.tree.norm(gradients(make_spec("mup"))))
        assert float(mujax.mup_global_norm(spec, gradients(spec))) == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("parametrization", ["table3", "table9"])
    def test_the_plain_norm_is_another_one(self, parametrization):
        plain = [float(optax.tree.norm(gradients(make_spec(name)))) for name in ("mup", parametrization)]
        assert abs(plain[0] / plain[1] - 1) > 0.1

    def test_by_hand(self):
        """Table 3's readout counts for a fifth of its norm; in Table 9 it is roots, of 3 and of 5."""
        ones = {path: jnp.ones(param.shape) for path, param in PARAMS.items()}
        size = {path: np.prod(param.shape) for path, param in PARAMS.items()}
        table3 = size["w1"] + size["b1"] + size["w2"] + size["w3"] / 25 + size["b3"]
        table9 = size["w1"] / 3 + size["b1"] / 3 + size["w2"] + size["w3"] / 5 + size["b3"]
        for parametrization, square in (("table3", table3), ("table9", table9), ("sp", sum(size.values()))):
            norm = mujax.mup_global_norm(make_spec(parametrization), ones)
            assert float(norm) == pytest.approx(np.sqrt(square), rel=1e-12)

    def test_in_table_3_the_plain_norm_grows_with_width_and_ours_does_not(self):
        specs = [at_width("table3", width) for width in (64, 1024)]
        found = [gradients(spec) for spec in specs]
        plain = [float(optax.tree.norm(gradient)) for gradient in found]
        ours = [
            float(mujax.mup_global_norm(spec, gradient)) for spec, gradient in zip(specs, found, strict=True)
        ]
        assert plain[1] / plain[0] > 2.5
        assert 0.5 < ours[1] / ours[0] < 1.2

    @pytest.mark.parametrize(
        ("name", "base"), [("mup", False), ("table3", True), ("table9", True), ("sp", False)]
    )
    def test_it_is_optaxs_bit_for_bit(self, name, base):
        spec = make_spec(name, base=base)
        found = gradients(spec)
        assert mujax.mup_global_norm(spec, found) == optax.tree.norm(found)
        for max_norm in (0.01, 100.0):
            ours, theirs = mujax.mup_clip_by_global_norm(spec, max_norm), optax.clip_by_global_norm(max_norm)
            clipped, _ = ours.update(found, ours.init(found))
            expected, _ = theirs.update(found, theirs.init(found))
            assert jax.tree.all(jax.tree.map(np.array_equal, clipped, expected))
            assert jax.tree.structure(ours.init(found)) == jax.tree.structure(theirs.init(found))


class TestClip:
    def test_what_is_small_keeps_its_bits_and_what_is_large_has_the_norm(self):
        spec = make_spec("table3")
        found = gradients(spec)
        norm = float(mujax.mup_global_norm(spec, found))
        for max_norm in (2 * norm, 0.5 * norm):
            tx = mujax.mup_clip_by_global_norm(spec, max_norm)
            clipped, _ = jax.jit(tx.update)(found, tx.init(found))
            if max_norm > norm:
                assert jax.tree.all(jax.tree.map(np.array_equal, clipped, found))
            else:
                assert float(mujax.mup_global_norm(spec, clipped)) == pytest.approx(max_norm, rel=1e-12)
                ratio = jax.tree.map(lambda a, b: a / b, clipped, found)
                assert all(np.allclose(leaf, 0.5, rtol=1e-12) for leaf in jax.tree.leaves(ratio))

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
    def test_the_dtype_stays(self, dtype):
        spec = make_spec("table9")
        found = jax.tree.map(lambda g: g.astype(dtype), gradients(spec))
        for tx in (mujax.mup_clip_by_global_norm(spec, jnp.float32(0.01)), mujax.mup_normalize(spec)):
            clipped, _ = jax.eval_shape(tx.update, found, tx.init(found))
            assert {leaf.dtype for leaf in jax.tree.leaves(clipped)} == {jnp.dtype(dtype)}

    def test_a_masked_tree(self):
        spec = make_spec("table3")
        found = gradients(spec) | {"w3": optax.MaskedNode()}
        tx = mujax.mup_clip_by_global_norm(spec, 0.01)
        clipped, _ = tx.update(found, tx.init(found))
        assert float(mujax.mup_global_norm(spec, clipped)) == pytest.approx(0.01)

    @pytest.mark.parametrize("make", [lambda s: mujax.mup_clip_by_global_norm(s, 1.0), mujax.mup_normalize])
    def test_errors(self, make):
        with pytest.raises(MujaxError, match="spec: expected a MupSpec, got a dict of"):
            make(PARAMS)
        with pytest.raises(SpecMismatchError, match=r"w1: expected shape \(6, 12\), got no such path"):
            make(make_spec()).update({"w2": jnp.ones((12, 20))}, ())


# ---- what goes around an optimizer ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Parts:
    """Either mujax's for a spec, or plain optax's."""

    adamw: Callable[..., Any]
    sgd: Callable[..., Any]
    clip: Callable[[float], Any]
    normalize: Callable[[], Any]

    @classmethod
    def ours(cls, spec):
        return cls(
            functools.partial(mujax.mup_adamw, spec=spec, eps=1e-3, weight_decay=0.3),
            functools.partial(mujax.mup_sgd, spec=spec, momentum=0.9),
            functools.partial(mujax.mup_clip_by_global_norm, spec),
            functools.partial(mujax.mup_normalize, spec),
        )


OPTAX = Parts(
    functools.partial(optax.adamw, eps=1e-3, weight_decay=0.3),
    functools.partial(optax.sgd, momentum=0.9),
    optax.clip_by_global_norm,
    optax.contrib.normalize,
)


@dataclasses.dataclass(frozen=True)
class Around:
    """Something around an optimizer.

    Attributes:
        make: the optimizer with it.
        start: what is trained, from the parameters.
        at: what of it the gradient is taken at.
        shown: what of it, and of a running average of it, the recorded loss is taken at.
        loss_scale: what the loss is multiplied with in front of the gradient, and the gradient divided by.
        spoilt: the step whose gradient is not finite.
    """

    make: Callable[[Parts], optax.GradientTransformation]
    start: Callable[[Any], Any] = lambda params: params
    at: Callable[[Any], Any] = lambda trained: trained
    shown: Callable[[Any, Any], Any] = lambda trained, average: trained
    loss_scale: float = 1.0
    spoilt: int | None = None


AROUND = {
    "warm-up and decay": Around(
        lambda p: p.adamw(optax.warmup_cosine_decay_schedule(0.0, 0.02, 4, STEPS, 0.001))
    ),
    "clipping": Around(lambda p: optax.chain(p.clip(0.2), p.sgd(0.05))),
    "accumulation": Around(lambda p: optax.MultiSteps(p.adamw(0.02), 3).gradient_transformation()),
    "average of the parameters": Around(lambda p: p.adamw(0.02), shown=lambda trained, average: average),
    "lookahead": Around(
        lambda p: optax.lookahead(p.adamw(0.02), sync_period=4, slow_step_size=0.5),
        start=optax.LookaheadParams.init_synced,
        at=lambda trained: trained.fast,
        shown=lambda trained, average: trained.slow,
    ),
    "sam": Around(lambda p: optax.contrib.sam(p.sgd(0.05), optax.chain(p.normalize(), optax.sgd(0.1)))),
    "loss scaling": Around(lambda p: p.adamw(0.02), loss_scale=2.0**15),
    "skipped steps": Around(
        lambda p: optax.apply_if_finite(optax.chain(p.clip(0.2), p.adamw(0.02)), 5),
        loss_scale=2.0**15,
        spoilt=7,
    ),
}


def curve(spec, around, parts=None):
    """The losses of a run."""
    tx, loss = around.make(parts or Parts.ours(spec)), make_loss(spec)
    trained = around.start(initial(spec))

    def step(carry, number):
        trained, average, state = carry
        found = jax.grad(lambda p: around.loss_scale * loss(p))(around.at(trained))
        found = jax.tree.map(lambda g: g / around.loss_scale, found)
        if around.spoilt is not None:
            found["w2"] = jnp.where(number == around.spoilt, jnp.inf, found["w2"])
        value = loss(around.shown(trained, average))
        updates, state = tx.update(found, state, trained)
        trained = optax.apply_updates(trained, updates)
        return (trained, optax.incremental_update(trained, average, 0.2), state), value

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(STEPS))[1])
    return np.asarray(run((trained, trained, tx.init(trained))))


def distance(losses, others):
    return np.max(np.abs(losses / others - 1))


@functools.cache
def reference(name):
    losses = curve(make_spec("mup"), AROUND[name])
    assert losses[-1] < 0.95 * losses[0]
    return losses


@pytest.mark.parametrize("name", AROUND)
def test_same_run_in_all_tables(name):
    for table in TABLES[1:]:
        assert distance(curve(make_spec(table), AROUND[name]), reference(name)) < SAME


@pytest.mark.parametrize("name", ["clipping", "accumulation", "lookahead", "sam"])
def test_the_base_model_is_bit_identical_to_optax(name):
    spec = make_spec("table9", base=True)
    np.testing.assert_array_equal(curve(spec, AROUND[name]), curve(spec, AROUND[name], OPTAX))


@pytest.mark.parametrize("name", ["clipping", "sam"])
def test_the_plain_norm_shows(name):
    """The twin: optax's own clipping and perturbation around the same optimizer."""

    def plain(spec):
        ours = Parts.ours(spec)
        return curve(
            spec, AROUND[name], dataclasses.replace(ours, clip=OPTAX.clip, normalize=OPTAX.normalize)
        )

    for table in ("table3", "table9"):
        assert distance(plain(make_spec(table)), plain(make_spec("mup"))) > OTHER


def test_loss_scaling_by_a_power_of_two_changes_no_bit():
    np.testing.assert_array_equal(
        reference("loss scaling"), curve(make_spec(), Around(lambda p: p.adamw(0.02)))
    )


def test_a_skipped_step_is_no_step():
    losses = reference("skipped steps")
    assert losses[8] == losses[7]
    assert losses[9] != losses[8]
    assert np.all(np.isfinite(losses))


def test_accumulation_steps_once_in_three():
    losses = reference("accumulation")
    assert losses[0] == losses[1] == losses[2] != losses[3] == losses[4]


class TestPerturbation:
    @staticmethod
    def change(width, normalize, part, parametrization="mup"):
        """How far a perturbation of one parameter moves the logits."""
        spec = at_width(parametrization, width)
        loss, params = make_loss(spec), initial(spec)
        tx = normalize(spec)
        perturbation, _ = tx.update(gradients(spec), tx.init(params))
        moved = params | {part: params[part] + 0.1 * perturbation[part]}
        return abs(float(loss(moved) - loss(params)))

    @pytest.mark.parametrize("part", ["w1", "w2", "w3"])
    def test_each_layers_share_does_not_depend_on_width(self, part):
        narrow, wide = (self.change(width, mujax.mup_normalize, part) for width in (64, 1024))
        assert 0.5 < wide / narrow < 2

    @pytest.mark.parametrize(("parametrization", "lost"), [("mup", "w1"), ("mup", "w3"), ("table3", "w2")])
    def test_the_plain_one_loses_layers(self, parametrization, lost):
        narrow, wide = (
            self.change(width, lambda _: optax.contrib.normalize(), lost, parametrization)
            for width in (64, 1024)
        )
        assert wide / narrow < 0.4
