"""Initial values: the std of each leaf at the target is the base's times the rule's factor.

What the user's own initialiser does between base and target is written here by hand, per initialiser of
`jax.nn.initializers`; mujax must read the same off the traces.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx
from jax.nn import initializers as init

import mujax
from mujax import rules
from mujax.core.frontends._functional import FunctionalFrontend

# fan-in and fan-out of the hidden kernels grow by 3 and by 5, so that no two modes give the same ratio.
BASE, TARGET = (8, 12), (24, 60)
FINITE = 7
KEY = jax.random.key(0)

Fans = tuple[int, int]
Ratio = Callable[[Fans, Fans], float]
"""(base's fan-in and fan-out, target's) -> std at the target over std at the base."""


# ---- what each initialiser does, by hand -----------------------------------------------------------


def fixed(base: Fans, target: Fans) -> float:
    """The std does not depend on the shape."""
    return 1.0


def by(mean: Callable[[int, int], float]) -> Ratio:
    """The variance is one over some mean of fan-in and fan-out."""
    return lambda base, target: math.sqrt(mean(*base) / mean(*target))


MEANS = {
    "fan_in": by(lambda i, o: i),
    "fan_out": by(lambda i, o: o),
    "fan_avg": by(lambda i, o: (i + o) / 2),
    "fan_geo_avg": by(lambda i, o: math.sqrt(i * o)),
}
# Q of the longer side by the shorter has unit columns: the mean square of its entries is 1/longer.
LONGER = by(max)


def _svd(key, shape, dtype=jnp.float32):
    """An orthogonal matrix by another route, which the trace cannot read."""
    u, _, vt = jnp.linalg.svd(jax.random.normal(key, shape, dtype), full_matrices=False)
    return u @ vt


def _fourier(key, shape, dtype=jnp.float32):
    """Normal entries by a transform that the trace cannot read."""
    return jnp.fft.irfft(jnp.fft.rfft(jax.random.normal(key, shape, dtype)), n=shape[-1])


def _he_by_hand(key, shape, dtype=jnp.float32):
    return jax.random.normal(key, shape, dtype) * jnp.sqrt(2.0 / shape[0])


def _fan_out_by_division(key, shape, dtype=jnp.float32):
    bound = 3**0.5 / math.sqrt(shape[-1])
    return jax.random.uniform(key, shape, dtype, -bound, bound)


EXACT: dict[str, tuple[Callable, Ratio]] = {
    **{
        f"variance_scaling-{mode}-{distribution}": (init.variance_scaling(2.0, mode, distribution), ratio)
        for (mode, ratio), distribution in itertools.product(
            MEANS.items(), ["normal", "truncated_normal", "uniform"]
        )
    },
    **{
        f"{name}_{kind}": (getattr(init, f"{name}_{kind}")(), MEANS[mode])
        for name, mode in {
            "lecun": "fan_in",
            "he": "fan_in",
            "kaiming": "fan_in",
            "glorot": "fan_avg",
            "xavier": "fan_avg",
        }.items()
        for kind in ("normal", "uniform")
    },
    "normal": (init.normal(0.02), fixed),
    "uniform": (init.uniform(0.3), fixed),
    "truncated_normal": (init.truncated_normal(0.02), fixed),
    "constant": (init.constant(0.7), fixed),
    "ones": (init.ones, fixed),
    "orthogonal": (init.orthogonal(1.5), LONGER),
    "he_by_hand": (_he_by_hand, MEANS["fan_in"]),
    "fan_out_by_division": (_fan_out_by_division, MEANS["fan_out"]),
}
"""Initialisers whose scale shows in their program, and what it does."""

SHAPES = {"input": (None, 1), "hidden": (0, 1), "output": (1, None)}
"""Which of the widths are the fans of a kernel of each role; None: finite."""


def fans(role: str, widths: Fans) -> Fans:
    first, second = (FINITE if which is None else widths[which] for which in SHAPES[role])
    return first, second


def network(widths: Fans, kernels: dict[str, Callable], roles: Collection[str] = SHAPES) -> mujax.Functional:
    """Kernels of each role with each initialiser, side by side; those of other roles are ones."""

    def make(key, x):
        return {
            name: {role: (kernel if role in roles else init.ones)(key, fans(role, widths)) for role in SHAPES}
            for name, kernel in kernels.items()
        }

    def apply(params, x):
        wide = jnp.broadcast_to(x[:, :1], (x.shape[0], widths[0]))
        return sum((wide @ one["hidden"] + x @ one["input"]) @ one["output"] for one in params.values())

    return mujax.Functional(make, apply)


hidden = functools.partial(network, roles=("hidden",))
X = jax.ShapeDtypeStruct((2, FINITE), jnp.float32)


@functools.cache
def exact_mup(parametrization: str = "mup") -> mujax.MupModel:
    kernels = {name: kernel for name, (kernel, _) in EXACT.items()}
    return mujax.mup_init(
        network(TARGET, kernels), network(BASE, kernels), X, parametrization=parametrization
    )


RULE = {"input": 1.0, "hidden": 3**-0.5, "output": 1.0}
"""Table 8: std at the target over std at the base, for these widths."""


@pytest.mark.parametrize("role", SHAPES)
@pytest.mark.parametrize("name", EXACT)
def test_own_ratio_times_factor_is_the_rule(name, role):
    _, own = EXACT[name]
    ratio = own(fans(role, BASE), fans(role, TARGET))
    mup = exact_mup()
    assert mup.spec[f"{name}/{role}"].role == role
    assert ratio * mup.init_scales[f"{name}/{role}"] == pytest.approx(RULE[role], rel=1e-6)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("table3", {"input": 1.0, "hidden": 3**-0.5, "output": 1 / 5}),
        ("table9", {"input": 5**-0.5, "hidden": 3**-0.5, "output": 5**-0.5}),
    ],
)
def test_the_same_in_the_other_tables(table, expected):
    kernels = {name: EXACT[name][0] for name in ("lecun_normal", "glorot_uniform")}
    mup = mujax.mup_init(network(TARGET, kernels), network(BASE, kernels), X, parametrization=table)
    for name, role in itertools.product(kernels, SHAPES):
        own = EXACT[name][1](fans(role, BASE), fans(role, TARGET))
        assert own * mup.init_scales[f"{name}/{role}"] == pytest.approx(expected[role], rel=1e-6)


def test_the_standard_parametrization_keeps_the_users_own_and_breaks_the_rule():
    """The twin: without the factor, every initialiser but those by luck of 1/sqrt(fan-in) breaks the rule."""
    mup = exact_mup("sp")
    assert set(mup.init_scales.values()) == {1.0}
    broken = {
        name
        for name, (_, own) in EXACT.items()
        if not math.isclose(own(BASE, TARGET), RULE["hidden"], rel_tol=1e-3)
    }
    kept = set(EXACT) - broken
    assert kept == {name for name in EXACT if EXACT[name][1] is MEANS["fan_in"]}


def test_stds_as_measured():
    """The same on actual samples, to within the noise of 1,440 entries."""
    at_base = {"normal": 0.02, "he_uniform": (2 / 8) ** 0.5, "lecun_normal": 8**-0.5}
    kernels = {name: EXACT[name][0] for name in (*at_base, "orthogonal")}
    mup = mujax.mup_init(hidden(TARGET, kernels), hidden(BASE, kernels), X)
    params = jax.jit(mup.init)(KEY)
    for name, base in (at_base | {"orthogonal": 1.5 * 12**-0.5}).items():
        found = np.sqrt(np.mean(np.square(params[name]["hidden"])))
        assert (name, found) == (name, pytest.approx(base * RULE["hidden"], rel=0.08))


# ---- zeros, convolutions, options of initialisers --------------------------------------------------


def test_zeros_have_no_factor_and_stay_zero():
    kernels = {"zeros": init.zeros, "constant": init.constant(0.0)}
    mup = mujax.mup_init(network(TARGET, kernels), network(BASE, kernels), X)
    assert dict(mup.init_scales) == {}
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(mup.init(KEY)))


CONVOLUTIONS: dict[str, tuple[Callable, Ratio]] = {
    "lecun_normal": (init.lecun_normal(), MEANS["fan_in"]),
    "glorot_uniform": (init.glorot_uniform(), MEANS["fan_avg"]),
    "fan_out": (init.variance_scaling(1.0, "fan_out", "normal"), MEANS["fan_out"]),
    "orthogonal": (init.orthogonal(), by(lambda i, o: max(9 * i, o))),
    # One matrix in the middle, of orthogonal rows out of a square one of the output features.
    "delta_orthogonal": (init.delta_orthogonal(1.3), MEANS["fan_out"]),
}


class _Convolutions(nn.Module):
    widths: Fans

    @nn.compact
    def __call__(self, x):
        out = 0.0
        for name, (kernel, _) in CONVOLUTIONS.items():
            y = nn.Conv(self.widths[0], (3, 3), use_bias=False, name=f"{name}-first")(x)
            y = nn.Conv(self.widths[1], (3, 3), kernel_init=kernel, use_bias=False, name=name)(y)
            out = out + nn.Conv(4, (1, 1), use_bias=False, name=f"{name}-out")(y)
        return out


def test_initialisers_of_convolutions():
    x = jax.ShapeDtypeStruct((1, 4, 4, 3), jnp.float32)
    mup = mujax.mup_init(_Convolutions(TARGET), _Convolutions(BASE), x)
    for name, (_, own) in CONVOLUTIONS.items():
        scale = mup.init_scales[f"{name}/kernel"]
        assert (name, own(BASE, TARGET) * scale) == (name, pytest.approx(3**-0.5, rel=1e-6))


def test_axes_named_to_an_initialiser():
    """in_axis, out_axis and batch_axis: what counts is the std, not where the fans stand."""
    batched = init.variance_scaling(1.0, "fan_avg", "uniform", in_axis=-1, out_axis=-2, batch_axis=(0,))

    def model(widths):
        def make(key, x):
            return {
                "first": jax.random.normal(key, (FINITE, widths[0])),
                "stack": batched(key, (3, widths[1], widths[0])),
                "out": jax.random.normal(key, (widths[1], 2)),
            }

        def apply(params, x):
            return jnp.einsum("bi,soi->sbo", x @ params["first"], params["stack"]) @ params["out"]

        return mujax.Functional(make, apply)

    mup = mujax.mup_init(model(TARGET), model(BASE), X)
    spec = mup.spec["stack"]
    assert spec.role == "hidden"
    own = MEANS["fan_avg"](BASE, TARGET)
    assert own * mup.init_scales["stack"] == pytest.approx(spec.r_in**-0.5, rel=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.complex64])
def test_initialisers_in_other_dtypes(dtype):
    kernels = {"he": functools.partial(init.he_normal(), dtype=dtype)}
    mup = mujax.mup_init(network(TARGET, kernels), network(BASE, kernels), X)
    for role in SHAPES:
        own = MEANS["fan_in"](fans(role, BASE), fans(role, TARGET))
        # Constants are rounded to the dtype before the trace sees them.
        tolerance = 1e-6 if dtype == jnp.complex64 else 2.0**-7
        assert own * mup.init_scales[f"he/{role}"] == pytest.approx(RULE[role], rel=tolerance)
    leaves = jax.tree.leaves(jax.eval_shape(mup.init, KEY))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(dtype)}


# ---- initialisers that the trace can't explain -----------------------------------------------------


def test_an_opaque_initialiser_is_sampled():
    kernels = {"svd": _svd, "he": init.he_normal()}
    mup = mujax.mup_init(hidden(TARGET, kernels), hidden(BASE, kernels), X)
    # The mean square of an orthogonal matrix has no noise but rounding.
    assert LONGER(BASE, TARGET) * mup.init_scales["svd/hidden"] == pytest.approx(RULE["hidden"], rel=1e-4)
    # Its neighbour is still read exactly.
    own = MEANS["fan_in"](BASE, TARGET)
    assert own * mup.init_scales["he/hidden"] == pytest.approx(RULE["hidden"], rel=1e-6)


def test_a_model_is_sampled_once(monkeypatch):
    """Neither ratio nor mean of the SVD show in the program; both come from one sample of each model."""
    drawn = []
    own = FunctionalFrontend.sample_init

    def counted(self, inputs, kwargs, key, paths):
        drawn.append((self.model, tuple(paths)))
        return own(self, inputs, kwargs, key, paths)

    monkeypatch.setattr(FunctionalFrontend, "sample_init", counted)
    kernels = {"svd": _svd, "positive": lambda key, shape: jnp.abs(_svd(key, shape))}
    base, target = hidden(BASE, kernels), hidden(TARGET, kernels)
    mup = mujax.mup_init(target, base, X)
    assert sorted(mup.init_shifts) == ["positive/hidden"]
    assert [model for model, _ in drawn] == [base, target]
    assert all({"svd/hidden", "positive/hidden"} <= set(paths) for _, paths in drawn)


def test_sampling_has_noise_and_no_bias():
    """Independent entries: the std of 96 of them is known to 7 percent, of 1,440 to 2."""
    kernels = {"fourier": _fourier}
    mup = mujax.mup_init(hidden(TARGET, kernels), hidden(BASE, kernels), X)
    assert mup.init_scales["fourier/hidden"] == pytest.approx(RULE["hidden"], rel=0.25)


def _sparse(key, shape):
    values, mask = jax.random.split(key)
    return jax.random.normal(values, shape) * jax.random.bernoulli(mask, 4 / shape[0], shape)


def _sparse_by_choice(key, shape):
    values, mask = jax.random.split(key)
    return jnp.where(jax.random.bernoulli(mask, 4 / shape[0], shape), jax.random.normal(values, shape), 0.0)


def _numpy_made(key, shape):
    del key
    return jnp.asarray(np.random.RandomState(0).randn(*shape) / np.sqrt(shape[0]), jnp.float32)


@pytest.mark.parametrize(
    ("kernel", "own", "tolerance"),
    [
        # Mean squares: min(n, m) ones among n·m; 4 of n; 1/n from outside of the program; one row of n, whose
        # mean has a rule of its own.
        (lambda key, shape: jnp.eye(*shape), by(max), 1e-4),
        (_sparse, by(lambda i, o: i), 0.4),
        (_sparse_by_choice, by(lambda i, o: i), 0.4),
        (_numpy_made, by(lambda i, o: i), 0.25),
        (
            lambda key, shape: jnp.ones(shape).at[0].set(shape[0]),
            by(lambda i, o: 1 / (i + 1 - 1 / i - (2 - 1 / i) ** 2)),
            0.05,
        ),
    ],
)
def test_patterns_of_zeros_and_outside_numbers_are_measured(kernel, own, tolerance):
    """How many entries are zero, and what numpy made, is not in the scale of any one entry."""
    mup = mujax.mup_init(hidden(TARGET, {"k": kernel}), hidden(BASE, {"k": kernel}), X)
    found = own(BASE, TARGET) * mup.init_scales["k/hidden"]
    assert found == pytest.approx(RULE["hidden"], rel=tolerance)
    # The twin: as if every entry were of order one.
    assert found != pytest.approx(own(BASE, TARGET) * RULE["hidden"], rel=tolerance)


def test_one_initialiser_that_branches_on_a_size_leaves_the_others_exact():
    """Orthogonal transposes where there are more columns than rows: at the base only, here."""
    base, target = BASE, (60, 24)
    kernels = {"he": init.he_normal(), "orthogonal": init.orthogonal(), "xavier": init.xavier_uniform()}
    mup = mujax.mup_init(hidden(target, kernels), hidden(base, kernels), X)
    rule = (60 / 8) ** -0.5
    for name, own in (("he", MEANS["fan_in"]), ("xavier", MEANS["fan_avg"]), ("orthogonal", LONGER)):
        scale = mup.init_scales[f"{name}/hidden"]
        assert (name, own(base, target) * scale) == (name, pytest.approx(rule, rel=1e-6))


def test_an_opaque_initialiser_that_is_too_large_to_sample_is_an_error():
    kernels = {"fourier": _fourier}
    expected = (
        "fourier/hidden: expected an initialiser whose scale shows in its program, or a parameter of at most "
        "67108864 entries to sample, got shape (8192, 16384)"
    )
    with pytest.raises(mujax.MujaxError, match=re.escape(expected)):
        mujax.mup_init(network((8192, 16384), kernels), network(BASE, kernels), X)


def test_sampling_works_inside_of_jit():
    """mup_init may be called while something else is traced."""
    kernels = {"fourier": _fourier}
    expected = mujax.mup_init(hidden(TARGET, kernels), hidden(BASE, kernels), X).init_scales["fourier/hidden"]

    @jax.jit
    def function(x):
        mup = mujax.mup_init(hidden(TARGET, kernels), hidden(BASE, kernels), X)
        return x * mup.init_scales["fourier/hidden"]

    assert float(function(1.0)) == pytest.approx(expected, rel=1e-6)


# ---- at the base's widths --------------------------------------------------------------------------


class LinenNet(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.width)(x))
        x = nn.LayerNorm()(nn.Dense(self.width, kernel_init=_fourier)(x))
        return nn.Dense(3)(x)


class NNXNet(nnx.Module):
    def __init__(self, width, rngs):
        self.first = nnx.Linear(FINITE, width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.second = nnx.Linear(width, width, kernel_init=_fourier, bias_init=init.normal(1.0), rngs=rngs)
        self.out = nnx.Linear(width, 3, kernel_init=init.xavier_normal(), rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.second(self.norm(self.first(x)))))


def linen(width: int) -> nn.Module:
    return LinenNet(width)


def nnx_factory(width: int) -> Callable:
    return lambda rngs: NNXNet(width, rngs)


def functional(width: int) -> mujax.Functional:
    return hidden((width, 2 * width), {"fourier": _fourier})


def _leaves(model, mup, key) -> tuple[list, list]:
    """The user's own initial values and mujax's."""
    x = jnp.zeros(X.shape, X.dtype)
    if isinstance(model, nn.Module | mujax.Functional):
        theirs, ours = jax.jit(model.init)(key, x), jax.jit(mup.init)(key, x)
    else:
        theirs, ours = (nnx.state(m, nnx.Param) for m in (model(nnx.Rngs(key)), mup.init(key)))
    assert jax.tree.structure(theirs) == jax.tree.structure(ours)
    return jax.tree.leaves(theirs), jax.tree.leaves(ours)


@pytest.mark.parametrize("build", [linen, nnx_factory, functional])
def test_at_the_base_the_same_key_gives_the_users_own_bits(build):
    model = build(8)
    mup = mujax.mup_init(model, build(8), X, delta=build(12), parametrization="table9")
    assert set(mup.init_scales.values()) == {1.0}
    theirs, ours = _leaves(model, mup, jax.random.key(7))
    for one, other in zip(theirs, ours, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("build", [linen, nnx_factory, functional])
def test_away_from_the_base_each_leaf_is_the_users_own_times_its_factor(build):
    """The twin of the test above: some factors are not 1, and each is where it belongs."""
    model = build(24)
    mup = mujax.mup_init(model, build(8), X)
    assert len({round(scale, 6) for scale in mup.init_scales.values()}) > 1
    theirs, ours = _leaves(model, mup, jax.random.key(7))
    # Both trees list their leaves in the order of the spec.
    for path, one, other in zip(mup.spec, theirs, ours, strict=True):
        scale = np.float32(mup.init_scales.get(path, 1.0))
        np.testing.assert_allclose(np.asarray(one) * scale, np.asarray(other), rtol=1e-6, err_msg=path)
        assert one.dtype == other.dtype


def test_the_rule_is_the_one_of_the_tables():
    """init_scales is rules.init_scale of what was read, for every parameter."""
    mup = exact_mup()
    for name, (_, own) in EXACT.items():
        param = mup.spec[f"{name}/hidden"]
        expected = rules.init_scale(param, mup.spec.parametrization, own(BASE, TARGET))
        assert mup.init_scales[f"{name}/hidden"] == pytest.approx(expected, rel=1e-6)
