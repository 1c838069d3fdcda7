"""Kernels that are computed before their product: with data, by functions, from mixtures, from complex parts.

Each case is a function of a kernel whose result is the kernel of a hidden layer. A case that is read has the
role, and its product the size, of that kernel alone; one that is not has a finding.
"""

import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mujax

BASE = 16
X = jax.ShapeDtypeStruct((2, 7), jnp.float32)
KEY = jax.eval_shape(lambda: jax.random.key(0))
STEP = jax.ShapeDtypeStruct((), jnp.float32)


def model(width: int, make: Callable, shape: Callable = lambda w: (w, w), out: int | None = None):
    """first -> the computed kernel -> outputs; `make(k, key, step)` computes the kernel."""

    def init(key, x, noise, step):
        kernel = jax.random.normal(key, shape(width)) / jnp.sqrt(width)
        return {"first": jax.random.normal(key, (7, width)), "k": kernel}

    def apply(params, x, noise, step):
        h = jax.nn.relu(x @ params["first"])
        return make(params["k"], h, noise, step)

    return mujax.Functional(init, apply)


def read(make: Callable, width: int = 64, *, strict: bool = True, **shape) -> mujax.MupModel:
    with warnings.catch_warnings():
        warnings.simplefilter("error" if strict else "ignore")
        return mujax.mup_init(
            model(width, make, **shape), model(BASE, make, **shape), X, KEY, STEP, strict=strict
        )


def growth(make: Callable, **shape) -> float:
    """Size of the product at a width of 1024 over that at 128."""
    sizes = []
    for width in (128, 1024):
        mup = read(make, width, strict=False, **shape)
        x = jax.random.normal(jax.random.key(1), X.shape)
        outs = []
        for seed in range(4):
            key = jax.random.key(seed)
            params = mup.init(key, x, key, jnp.float32(0.01))
            outs.append(mup.apply(params, x, jax.random.key(100 + seed), jnp.float32(0.01)))
        sizes.append(float(jnp.sqrt(jnp.mean(jnp.square(jnp.stack(outs))))))
    return sizes[1] / sizes[0]


def noise(key, k):
    return jax.random.normal(key, k.shape)


def quantised(k):
    step = jnp.abs(k).max() / 127
    return jnp.clip(jnp.round(k / step), -128, 127) * step


def in_a_loop(k, h, key):
    def layer(h, key):
        return jax.nn.relu(h @ (k + 0.3 * noise(key, k))), None

    return lax.scan(layer, h, jax.random.split(key, 2))[0]


NOISY = {
    "normal": lambda k, h, key, step: h @ (k + 0.3 * noise(key, k)),
    "uniform about zero": lambda k, h, key, step: h @ (k + jax.random.uniform(key, k.shape, minval=-1)),
    "cut off": lambda k, h, key, step: h @ (0.1 * jax.random.truncated_normal(key, -2, 2, k.shape) + k),
    "in place of dropped entries": lambda k, h, key, step: (
        h @ jnp.where(jax.random.bernoulli(jax.random.fold_in(key, 1), 0.5, k.shape), k, 0.3 * noise(key, k))
    ),
    "transposed": lambda k, h, key, step: h @ (k.T + 0.3 * noise(key, k)).T,
    "read elsewhere too": lambda k, h, key, step: h @ (k + (n := noise(key, k))) + h @ n / k.shape[0] ** 0.5,
    "in a loop": lambda k, h, key, step: in_a_loop(k, h, key),
}
"""Noise that keeps its size at every width, added to a kernel."""

WITH_DATA = {
    "times noise": lambda k, h, key, step: h @ (k * noise(key, k)),
    "dropped connections": lambda k, h, key, step: h @ jnp.where(noise(key, k) > 0, k, 0.0),
    "dropped rows": lambda k, h, key, step: h @ (k * (noise(key, k[:, :1]) > 0)),
    "clipped": lambda k, h, key, step: h @ jnp.clip(k * noise(key, k), -1, 1),
    "scaled by an input": lambda k, h, key, step: h @ (k * step),
    "divided by a stored scale": lambda k, h, key, step: h @ (k / (1 + step)),
    "noise in proportion": lambda k, h, key, step: h @ (k + 0.1 * k * noise(key, k)),
    "another dtype on the way": lambda k, h, key, step: h @ (k.astype(jnp.bfloat16) * step).astype(h.dtype),
    "laid out again after it": lambda k, h, key, step: (
        h @ (k * noise(key, k)).reshape(-1, 4, k.shape[1]).reshape(k.shape)
    ),
    "quantised by its largest entry": lambda k, h, key, step: h @ quantised(k),
    "sign times its mean": lambda k, h, key, step: h @ (jnp.sign(k) * jnp.abs(k).mean()),
    "maximum norm": lambda k, h, key, step: h @ (k * jnp.minimum(1.0, 3 / jnp.linalg.norm(k, axis=0))),
    "noise of mean zero": NOISY["normal"],
    "noise in a loop": NOISY["in a loop"],
}
THROUGH_FUNCTIONS = {
    name: lambda k, h, key, step, f=function: h @ f(k)
    for name, function in {
        "tanh": jnp.tanh,
        "sin": jnp.sin,
        "erf": lax.erf,
        "expm1": jnp.expm1,
        "sinh": jnp.sinh,
        "arctan": jnp.arctan,
        "cube": lambda k: k**3,
        "soft threshold": lambda k: jnp.sign(k) * jnp.abs(k),
        "centred square": lambda k: jnp.square(k) * jnp.sign(k),
    }.items()
}
MIXED = {
    "kernel first": lambda k, h, key, step: jnp.einsum(
        "bi,bio->bo", h, jnp.einsum("be,eio->bio", jax.nn.softmax(h[:, :4]), k)
    ),
    "experts first": lambda k, h, key, step: jnp.einsum(
        "be,beo->bo", jax.nn.softmax(h[:, :4]), jnp.einsum("bi,eio->beo", h, k)
    ),
    "one mixture for all": lambda k, h, key, step: h @ jnp.einsum("e,eio->io", jax.nn.softmax(h[0, :4]), k),
    "product and sum": lambda k, h, key, step: jnp.einsum(
        "bi,bio->bo", h, (jax.nn.softmax(h[:, :4])[:, :, None, None] * k).sum(1)
    ),
    "transposed mixture": lambda k, h, key, step: jnp.einsum(
        "bi,boi->bo", h, jnp.einsum("be,eio->bio", jax.nn.softmax(h[:, :4]), k).transpose(0, 2, 1)
    ),
}
COMPLEX = {
    "complex": lambda k, h, key, step: (h @ lax.complex(k[0], k[1])).real,
    "sum": lambda k, h, key, step: (h @ (k[0] + 1j * k[1])).real,
    "conjugate": lambda k, h, key, step: (h @ lax.complex(k[0], k[1]).conj()).imag,
    "both complex": lambda k, h, key, step: (lax.complex(h, h) @ lax.complex(k[0], k[1])).real,
    "absolute value": lambda k, h, key, step: jnp.abs(h @ lax.complex(k[0], k[1])),
    "turned": lambda k, h, key, step: (h @ (lax.complex(k[0], k[1]) * 1j)).imag,
}
EXPERTS = {"shape": lambda w: (4, w, w)}
PAIR = {"shape": lambda w: (2, w, w)}


@pytest.mark.parametrize("name", WITH_DATA)
def test_a_kernel_that_meets_what_does_not_grow_is_a_kernel(name):
    mup = read(WITH_DATA[name])
    assert (mup.spec["k"].role, mup.spec["k"].fan_in, mup.spec["k"].r_in) == ("hidden", (0,), 4.0)


@pytest.mark.parametrize("name", THROUGH_FUNCTIONS)
def test_a_kernel_through_a_function_that_is_odd_keeps_its_role(name):
    assert read(THROUGH_FUNCTIONS[name]).spec["k"].role == "hidden"


@pytest.mark.parametrize("name", MIXED)
def test_a_mixture_of_kernels_is_read_alike_in_every_order(name):
    param = read(MIXED[name], **EXPERTS).spec["k"]
    assert (param.role, param.fan_in, param.r_in, param.r_out) == ("hidden", (1,), 4.0, 4.0)


@pytest.mark.parametrize("name", COMPLEX)
def test_a_complex_kernel_has_no_factor_of_its_own(name):
    mup = read(COMPLEX[name], **PAIR)
    assert mup.spec["k"].role == "hidden"
    assert mup.corrections == ()


@pytest.mark.parametrize(
    ("cases", "name", "shape"),
    [
        *[(WITH_DATA, name, {}) for name in ("dropped connections", "quantised by its largest entry")],
        *[(THROUGH_FUNCTIONS, name, {}) for name in ("tanh", "cube")],
        (MIXED, "kernel first", EXPERTS),
        (COMPLEX, "complex", PAIR),
    ],
)
def test_the_product_of_a_kernel_that_is_read_is_of_one_size(cases, name, shape):
    assert growth(cases[name], **shape) == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("name", NOISY)
def test_noise_on_a_kernel_is_scaled_as_the_kernel(name):
    mup = read(NOISY[name])
    assert mup.spec["k"].role == "hidden"
    factors = [correction.factor for correction in mup.corrections if correction.kind == "scale"]
    assert factors[0] == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["normal", "in place of dropped entries", "in a loop"])
def test_a_noisy_product_is_of_one_size(name):
    assert growth(NOISY[name]) == pytest.approx(1.0, abs=0.2)


def test_the_larger_of_kernel_and_noise_is_reported():
    mup = read(lambda k, h, key, step: h @ jnp.maximum(k, noise(key, k)), strict=False)
    assert [finding.kind for finding in mup.findings] == ["kernel with a mean"]


def test_without_its_factor_noise_outgrows_the_kernel():
    def unscaled(k, h, key, step):
        return h @ k + h @ (0.3 * noise(key, k))

    assert growth(unscaled) > 1.8


REPORTED = {
    "plus noise with a mean": (
        "unlike terms",
        lambda k: k,
        lambda k, key: k + 0.3 * jax.random.uniform(key, k.shape),
    ),
    "plus noise that inputs share": (
        "unlike terms",
        lambda k: k,
        lambda k, key: k + jax.random.normal(key, (1, k.shape[1])),
    ),
    "plus a product of noise": (
        "unlike terms",
        lambda k: k,
        lambda k, key: k + noise(key, k) * noise(jax.random.fold_in(key, 1), k),
    ),
    "plus noise of an unknown size": (
        "unlike terms",
        lambda k: k,
        lambda k, key: k + jnp.float32(jax.random.key_data(key)[0]) * noise(key, k),
    ),
    "softplus": ("kernel through a function", jax.nn.softplus, None),
    "sigmoid": ("kernel through a function", jax.nn.sigmoid, None),
    "exp": ("kernel through a function", jnp.exp, None),
    "softmax": ("kernel through a function", lambda k: jax.nn.softmax(k, 0), None),
    "cosine": ("kernel through a function", jnp.cos, None),
    "a gate of its own": ("kernel through a function", lambda k: k * jax.nn.sigmoid(k), None),
    "absolute value": ("kernel with a mean", jnp.abs, None),
    "relu": ("kernel with a mean", jax.nn.relu, None),
    "square": ("kernel with a mean", jnp.square, None),
    "shifted": ("kernel with a mean", lambda k: k + 0.1, None),
    "a triangle added": ("kernel with a mean", lambda k: k + 0.3 * jnp.tri(*k.shape), None),
    "below a bound": ("kernel with a mean", lambda k: jnp.minimum(k, 0.0), None),
    "rounded": ("fixed steps", lambda k: jnp.round(k * 16) / 16, None),
    "rounded down": ("fixed steps", lambda k: jnp.floor(k * 16) / 16, None),
}


@pytest.mark.parametrize("name", REPORTED)
def test_a_kernel_whose_size_no_rule_gives_is_reported(name):
    kind, function, with_noise = REPORTED[name]
    make = with_noise or (lambda k, key: function(k))
    mup = read(lambda k, h, key, step: h @ make(k, key), strict=False)
    assert kind in {finding.kind for finding in mup.findings}
    assert not [correction for correction in mup.corrections if correction.kind == "scale"]
    finding = next(finding for finding in mup.findings if finding.kind == kind)
    assert finding.message.startswith(("k ", "the kernel that is computed from k "))


def test_a_number_that_multiplies_a_kernel_hides_no_mean():
    """Its sign is that of all terms of the sum."""
    build = with_gain(lambda k, g, h: h @ ((k + 0.1) * g), lambda w: (), 1.0)
    assert "kernel with a mean" in {finding.kind for finding in mujax.audit(build(64), build(BASE), X)}
    strict = with_gain(lambda k, g, h: h @ ((k - k.mean(0)) * g), lambda w: (), 1.0)
    mujax.mup_init(strict(64), strict(BASE), X, strict=True)


@pytest.mark.parametrize("function", [jnp.sin, jnp.tanh, jnp.arctan])
def test_a_readout_through_a_function_of_another_width_is_reported(function):
    """A readout's entries keep their size: a constant that grows makes the function another one."""

    def build(width, power):
        make = lambda k, g, h: h @ k @ function(g * power(width))  # noqa: E731
        return with_gain(make, lambda w: (w, 3), with_signs)(width)

    (finding,) = mujax.audit(build(64, lambda w: w**0.5), build(BASE, lambda w: w**0.5), X)
    assert finding.kind == "kernel through a function"
    assert finding.message.startswith("g goes into")
    assert not mujax.audit(build(64, lambda w: 2.0), build(BASE, lambda w: 2.0), X)


UNLIKE = {
    "divided": lambda k: k / k.shape[0] ** 0.5,
    "normed": lambda k: (k - k.mean(0)) / (k.std(0) + 1e-5) / k.shape[0] ** 0.5,
    "times the width": lambda k: k * k.shape[0],
}


JOINED = {
    "sum": lambda a, b: a + b,
    "complex number": lambda a, b: (jax.lax.complex(a, b) * (0.6 + 0.8j)).real,
    "choice": lambda a, b: jnp.where(jnp.eye(*a.shape) > 0, a, b),
}


@pytest.mark.parametrize("name", UNLIKE)
@pytest.mark.parametrize("join", JOINED)
def test_two_readouts_of_unlike_scales_in_one_kernel_are_reported(name, join):
    combine = JOINED[join]

    def build(width, function):
        def init(key, x):
            keys = jax.random.split(key, 3)
            return {
                "first": jax.random.normal(keys[0], (7, width)),
                "a": jax.random.normal(keys[1], (width, 3)),
                "b": jax.random.normal(keys[2], (width, 3)),
            }

        def apply(params, x):
            kernel = combine(function(params["a"]), params["b"])
            return jax.nn.relu(x @ params["first"]) @ kernel

        return mujax.Functional(init, apply)

    function = UNLIKE[name]
    found = mujax.audit(build(64, function), build(BASE, function), X)
    assert "unlike terms" in {finding.kind for finding in found}
    assert not mujax.audit(build(64, lambda k: 0.5 * k), build(BASE, lambda k: 0.5 * k), X)


@pytest.mark.parametrize("name", ["softplus", "absolute value", "shifted"])
def test_what_is_reported_does_grow(name):
    """The twin: without the finding, this would be a silent fault."""
    function = REPORTED[name][1]
    assert growth(lambda k, h, key, step: h @ function(k)) > 2


def test_a_bias_a_gain_and_positions_are_no_kernels():
    """They meet activations, which have a width of their own."""

    def make(k, h, key, step):
        return jax.nn.relu(h * k[0] + k[1]) @ jnp.ones((h.shape[-1], 3)) / h.shape[-1]

    assert read(make, shape=lambda w: (2, w), strict=False).spec["k"].role == "input"


def test_a_table_that_is_masked_before_its_lookup_is_an_embedding():
    def make(k, h, key, step):
        mask = jax.random.bernoulli(key, 0.9, (k.shape[0], 1))
        return (k * mask)[jnp.array([0, 3])] + h

    param = read(make, shape=lambda w: (5, w)).spec["k"]
    assert (param.role, param.fan_in, param.fan_out) == ("input", (0,), (1,))


GAINS = {
    "of its inputs": lambda k, g, h: h @ (g[:, None] * k),
    "of its outputs": lambda k, g, h: h @ (k * g),
    "about one": lambda k, g, h: h @ (k * (1 + g)[:, None]),
    "through a function": lambda k, g, h: h @ (jnp.exp(g)[:, None] * k),
    "after a norm": lambda k, g, h: h @ (k / jnp.linalg.norm(k, axis=0) * g[:, None]),
    "of its inputs, laid out again": lambda k, g, h: h @ (k.T * g).T,
}


def with_signs(shape):
    return jax.random.normal(jax.random.key(7), shape)


def with_gain(make: Callable, shape: Callable, start):
    """A hidden layer of a kernel and a parameter `g` that multiplies it."""

    def build(width):
        def init(key, x):
            first, kernel = jax.random.split(key)
            return {
                "first": jax.random.normal(first, (7, width)),
                "k": jax.random.normal(kernel, (width, width)) / width**0.5,
                "g": start(shape(width)) if callable(start) else jnp.full(shape(width), start),
            }

        def apply(params, x):
            return make(params["k"], params["g"], jax.nn.relu(x @ params["first"]))

        return mujax.Functional(init, apply)

    return build


def growth_of_gain(make: Callable, shape: Callable, start: float, **options) -> float:
    """Size of the product at a width of 1024 over that at 128."""
    build, x, sizes = with_gain(make, shape, start), jax.random.normal(jax.random.key(1), (8, 7)), []
    for width in (128, 1024):
        mup = mujax.mup_init(build(width), build(BASE), x, **options)
        outs = [mup.apply(mup.init(jax.random.key(seed), x), x) for seed in range(2)]
        sizes.append(float(jnp.sqrt(jnp.mean(jnp.square(jnp.stack(outs))))))
    return sizes[1] / sizes[0]


@pytest.mark.parametrize("name", GAINS)
def test_a_vector_that_multiplies_a_kernel_is_a_gain(name):
    build = with_gain(GAINS[name], lambda w: (w,), 1.0)
    spec = mujax.mup_init(build(64), build(BASE), X, strict=True).spec
    assert (spec["g"].role, spec["k"].role, spec["k"].fan_in) == ("input", "hidden", (0,))


LOW_RANK_GAINS = {
    "of its inputs": lambda p, h: h @ (p["g"][:, None] * (p["u"] @ p["v"])),
    "of its outputs": lambda p, h: h @ (p["u"] @ p["v"] * p["g"]),
    "about one": lambda p, h: h @ (p["u"] @ p["v"] * (1 + p["g"])[:, None]),
    "through a function": lambda p, h: h @ (jnp.exp(p["g"])[:, None] * (p["u"] @ p["v"])),
    "of a sum with it": lambda p, h: h @ (p["g"][:, None] * (p["k"] + p["u"] @ p["v"])),
    "of a kernel that is laid out again": lambda p, h: h @ ((p["u"] @ p["v"])[::-1] * p["g"][:, None]),
}


def with_low_rank(make: Callable):
    """A layer of the kernel `k`, and one of the low-rank kernel `u @ v` that `g` multiplies."""

    def build(width):
        def init(key, x):
            keys = jax.random.split(key, 4)
            return {
                "first": jax.random.normal(keys[0], (7, width)),
                "k": jax.random.normal(keys[1], (width, width)) / width**0.5,
                "u": jax.random.normal(keys[2], (width, 3)) / width**0.5,
                "v": jax.random.normal(keys[3], (3, width)),
                "g": jnp.ones(width),
            }

        def apply(params, x):
            return make(params, jax.nn.relu(jax.nn.relu(x @ params["first"]) @ params["k"]))

        return mujax.Functional(init, apply)

    return build


@pytest.mark.parametrize("name", LOW_RANK_GAINS)
def test_a_vector_that_multiplies_a_low_rank_kernel_is_a_gain(name):
    build = with_low_rank(LOW_RANK_GAINS[name])
    mup = mujax.mup_init(build(64), build(BASE), X)
    assert (mup.spec["g"].role, mup.spec["u"].role, mup.spec["v"].role) == ("input", "output", "input")
    # One factor for the product, and not one for each of the parameters that its sum shows.
    assert [(one.kind, one.path) for one in mup.corrections] == [("readout", "u")]


def test_a_vector_that_is_added_to_a_low_rank_kernel_is_no_gain():
    build = with_low_rank(lambda p, h: h @ (p["u"] @ p["v"] + p["g"][:, None]))
    mup = mujax.mup_init(build(64), build(BASE), X)
    assert {one.path for one in mup.corrections} == {"u", "g"}


def test_a_vector_that_is_added_to_a_kernel_is_no_gain():
    """It is a readout of its own: the sum over the fan-in is coherent."""
    build = with_gain(lambda k, g, h: h @ (k + g[:, None]), lambda w: (w,), 0.0)
    with pytest.raises(mujax.RoleError, match="one factor for their common product"):
        mujax.mup_init(build(64), build(BASE), X)


def test_the_mean_of_a_kernel_that_signs_multiply_does_not_add_up():
    def square(w):
        return (w, w)

    assert growth_of_gain(lambda k, g, h: h @ (g * k), square, 1.0) == pytest.approx(1.0, abs=0.15)
    # The twin: by itself it does.
    build = with_gain(lambda k, g, h: h @ g + h @ k, square, 1.0)
    mup = mujax.mup_init(build(64), build(BASE), X)
    assert "g" in mup.init_shifts


SHARED_SIGNS = {
    "a number": (lambda k, g, h: h @ (g * k), lambda w: (), "k"),
    "a number through a function": (lambda k, g, h: h @ (jnp.tanh(g) * k), lambda w: (), "k"),
    "a gain of its outputs": (lambda k, g, h: h @ (k * g), lambda w: (w,), "k"),
    "of one output each": (lambda k, g, h: h @ (k.T * g[:, None]).T, lambda w: (w,), "k"),
    "a number on the inputs": (lambda k, g, h: (g * h) @ k, lambda w: (), "k"),
}


def with_a_mean(build: Callable):
    """The model of `with_gain` whose kernel starts with a mean."""

    def with_mean(width):
        plain = build(width)

        def init(key, x):
            params = plain.init(key, x)
            return params | {"k": 0.1 + params["k"]}

        return mujax.Functional(init, plain.apply)

    return with_mean


@pytest.mark.parametrize("name", SHARED_SIGNS)
def test_signs_that_all_terms_share_leave_a_mean_coherent(name):
    make, shape, path = SHARED_SIGNS[name]
    build = with_a_mean(with_gain(make, shape, 1.0))
    mup = mujax.mup_init(build(64), build(BASE), X)
    # The mean follows the coherent rule: 0.1 / 4 and not 0.1 / 2.
    assert mup.init_scales[path] * 0.1 + mup.init_shifts[path] == pytest.approx(0.1 / 4)


ALONG_THE_FAN_IN = [lambda k, g, h: h @ (g * k), lambda k, g, h: h @ (k.T * g.T).T]


@pytest.mark.parametrize("make", ALONG_THE_FAN_IN)
def test_signs_along_the_fan_in_do_not(make):
    build = with_a_mean(with_gain(make, lambda w: (w, w), with_signs))
    assert not mujax.mup_init(build(64), build(BASE), X).init_shifts


@pytest.mark.parametrize("make", ALONG_THE_FAN_IN)
def test_a_gain_that_starts_at_one_has_no_signs(make):
    build = with_a_mean(with_gain(make, lambda w: (w, w), 1.0))
    mup = mujax.mup_init(build(64), build(BASE), X)
    assert list(mup.init_shifts) == ["k"]
    assert mup.init_scales["k"] * 0.1 + mup.init_shifts["k"] == pytest.approx(0.1 / 4, rel=0.05)


@pytest.mark.parametrize(("left", "right"), [(0.1, 0.1), (0.1, 0.0), (0.0, 0.1), (0.0, 0.0)])
def test_a_mean_of_the_first_factor_of_a_low_rank_kernel_adds_up(left, right):
    def build(width):
        def init(key, x):
            keys = jax.random.split(key, 3)
            return {
                "first": jax.random.normal(keys[0], (7, width)),
                "left": left + jax.random.normal(keys[1], (width, 3)) / width**0.5,
                "right": right + jax.random.normal(keys[2], (3, width)),
            }

        def apply(params, x):
            return jax.nn.relu(x @ params["first"]) @ (params["left"] @ params["right"])

        return mujax.Functional(init, apply)

    # Whatever the signs of the second factor: they are the same for all terms of the sum.
    assert list(mujax.mup_init(build(64), build(BASE), X).init_shifts) == (["left"] if left else [])


@pytest.mark.parametrize("function", [jax.nn.gelu, jnp.abs, lambda k: k + 0.1])
def test_what_meets_a_kernel_with_a_mean_is_brought_to_order_one(function):
    """Nothing is known of the product, but its other operand is right, and so is what else reads it."""
    build = with_gain(lambda k, g, h: (h * h.shape[-1] ** 0.5) @ function(k) * g, lambda w: (), 1.0)
    with pytest.warns(mujax.MujaxWarning):
        mup = mujax.mup_init(build(64), build(BASE), X)
    assert [(one.kind, one.factor) for one in mup.corrections] == [
        ("scale", pytest.approx((BASE / 64) ** 0.5))
    ]


@pytest.mark.parametrize("known", [True, False])
def test_a_kernel_times_numbers_of_unknown_scale_is_reported(known):
    def make(k, g, h):
        ramp = jnp.arange(k.shape[0])[:, None]
        return h @ (k * (ramp if known else ramp + ramp**2)) * g

    build = with_gain(make, lambda w: (), 1.0)
    found = mujax.audit(build(64), build(BASE), X)
    assert [finding.kind for finding in found] == ["computed kernel"] * (not known)


def test_a_finding_on_another_parameter_whose_name_starts_alike_hides_none():
    def build(width):
        def init(key, x):
            keys = jax.random.split(key, 3)
            shapes = {"first": (7, width), "w": (width, width), "w2": (width, width)}
            return {
                name: jax.random.normal(k, s) / s[0] ** 0.5
                for k, (name, s) in zip(keys, shapes.items(), strict=True)
            }

        def apply(params, x):
            ramp = jnp.arange(width)[:, None]
            h = jax.nn.relu(x @ params["first"])
            h = jnp.tanh(h @ (1 + params["w2"]) / width)
            return h @ (params["w"] * (ramp + ramp**2))

        return mujax.Functional(init, apply)

    found = mujax.audit(build(64), build(BASE), X)
    assert [(one.kind, one.message.split()[0]) for one in found if one.kind != "kernel with a mean"] == [
        ("unlike terms", "w2"),
        ("computed kernel", "w"),
    ]


MODULATED = {
    "as it is": lambda k: k,
    "through a function": jnp.sin,
    "with a mean of zero": lambda k: k - k.mean(0),
    "normed": lambda k: (k - k.mean(0)) / (k.std(0) + 1e-5) / k.shape[0] ** 0.5,
    "transposed": lambda k: k.T,
}


def of_low_rank(make: Callable):
    """A hidden layer of the kernel k @ g of rank 3."""

    def build(width):
        plain = with_gain(lambda k, g, h: make(k @ g, h), lambda w: (3, w), 0.5)(width)

        def init(key, x):
            return plain.init(key, x) | {"k": jax.random.normal(key, (width, 3)) / width**0.5}

        return mujax.Functional(init, plain.apply)

    return build


def of_full_rank(make: Callable):
    return with_gain(lambda k, g, h: make(k * g, h), lambda w: (), 0.5)


@pytest.mark.parametrize("rank", [of_full_rank, of_low_rank])
@pytest.mark.parametrize("name", MODULATED)
def test_a_kernel_that_activations_modulate_is_reported(name, rank):
    def make(k, h):
        return jnp.einsum("bio,bi->bo", MODULATED[name](k)[None] * (1 + h)[:, :, None], h)

    (finding,) = mujax.audit(rank(make)(64), rank(make)(BASE), X)
    assert finding.kind == "computed kernel"
    # The one whose axis is summed: transposed, that is the other one of the pair.
    path = "g" if (name, rank) == ("transposed", of_low_rank) else "k"
    assert finding.message.split()[0] == path


@pytest.mark.parametrize("name", ["as it is", "normed", "with a mean of zero"])
@pytest.mark.parametrize("rank", [of_full_rank, of_low_rank])
@pytest.mark.parametrize("normed", [True, False])
def test_a_norm_of_the_product_of_a_kernel_of_low_rank_is_one_of_a_readout(name, rank, normed):
    def make(k, h):
        out = h @ MODULATED[name](k)
        return jax.nn.standardize(out) if normed else out

    found = mujax.audit(rank(make)(64), rank(make)(BASE), X)
    assert [one.kind for one in found] == ["normalised readout"] * (normed and rank is of_low_rank)


@pytest.mark.parametrize("rank", [of_full_rank, of_low_rank])
def test_a_kernel_that_nothing_modulates_is_not(rank):
    def make(k, h):
        return h @ k

    assert mujax.audit(rank(make)(64), rank(make)(BASE), X) == ()


def test_a_number_added_to_a_kernel_that_shrinks_is_reported():
    build = with_gain(lambda k, g, h: h @ ((1 + g) * k), lambda w: (w, w), 0.0)
    with pytest.warns(mujax.MujaxWarning, match="g is combined with something that scales differently"):
        mup = mujax.mup_init(build(64), build(BASE), X)
    assert [finding.kind for finding in mup.findings] == ["unlike terms"]
    assert mup.corrections == ()


SOFT_SIGN = {
    "of its size": lambda k: k / (1 + jnp.abs(k)),
    "of its square": lambda k: k / jnp.sqrt(1 + k**2),
    "of a small shift": lambda k: k * (0.1 - k),
}
NORMED_READOUT = {
    "by its deviation": lambda k: (k - k.mean(0)) / (k.std(0) + 1e-5) / k.shape[0] ** 0.5,
    "by its norm": lambda k: k / jnp.linalg.norm(k, axis=0, keepdims=True),
}


def of_readout(make: Callable):
    return with_gain(lambda k, g, h: h @ make(g), lambda w: (w, 3), with_signs)


@pytest.mark.parametrize("function", SOFT_SIGN)
@pytest.mark.parametrize("norm", NORMED_READOUT)
def test_a_number_added_to_a_readout_that_its_norm_shrinks_is_reported(norm, function):
    build = of_readout(lambda k: SOFT_SIGN[function](NORMED_READOUT[norm](k)))
    found = mujax.audit(build(64), build(BASE), X)
    assert "unlike terms" in {finding.kind for finding in found}


@pytest.mark.parametrize("norm", NORMED_READOUT)
def test_a_readout_that_is_normed_or_through_a_function_alone_is_not(norm):
    for make in (NORMED_READOUT[norm], SOFT_SIGN["of its size"], SOFT_SIGN["of its square"]):
        build = of_readout(make)
        found = mujax.audit(build(64), build(BASE), X)
        assert {finding.kind for finding in found} == {"unused parameter"}


# ---- kernels of several parameters ------------------------------------------------------------------------

LOW_RANK = {
    "a sum": lambda p, h, key: h @ (p["k"] + p["a"] @ p["b"]),
    "a scaled term": lambda p, h, key: h @ (p["k"] - 0.5 * (p["a"] @ p["b"])),
    "as an einsum": lambda p, h, key: jnp.einsum(
        "bi,io->bo", h, p["k"] + jnp.einsum("ir,ro->io", p["a"], p["b"])
    ),
    "transposed": lambda p, h, key: h @ (p["k"].T + (p["a"] @ p["b"]).T).T,
    "with noise": lambda p, h, key: h @ (p["k"] + p["a"] @ p["b"] + 0.3 * noise(key, p["k"])),
    "in a branch of its own": lambda p, h, key: h @ p["k"] + (h @ p["a"]) @ p["b"],
}


def low_rank(make: Callable):
    def build(width):
        def init(key, x, noise):
            first, kernel, down = jax.random.split(key, 3)
            return {
                "first": jax.random.normal(first, (7, width)),
                "k": jax.random.normal(kernel, (width, width)) / width**0.5,
                "a": jax.random.normal(down, (width, 3)) / width**0.5,
                "b": jnp.zeros((3, width)),
            }

        def apply(params, x, noise):
            return make(params, jax.nn.relu(x @ params["first"]), noise)

        return mujax.Functional(init, apply)

    return build


@pytest.mark.parametrize("name", LOW_RANK)
def test_a_low_rank_term_of_a_kernel_has_its_own_factor(name):
    """As in a branch of its own: read out to the rank, and read in from it."""
    build = low_rank(LOW_RANK[name])
    mup = mujax.mup_init(build(64), build(BASE), X, KEY, strict=True)
    assert {path: mup.spec[path].role for path in "kab"} == {"k": "hidden", "a": "output", "b": "input"}
    assert [(c.path, c.factor) for c in mup.corrections if c.kind == "readout"] == [("a", 0.25)]


def test_a_low_rank_term_of_a_readout_has_one_factor():
    def build(width):
        def init(key, x):
            shapes = {"in": (7, width), "w": (width, 5), "a": (width, 3), "b": (3, 5)}
            return {name: jax.random.normal(key, shape) for name, shape in shapes.items()}

        def apply(p, x):
            return jax.nn.relu(x @ p["in"]) @ (p["w"] + p["a"] @ p["b"])

        return mujax.Functional(init, apply)

    mup = mujax.mup_init(build(64), build(BASE), X, strict=True)
    assert {path: mup.spec[path].role for path in "wab"} == {"w": "output", "a": "output", "b": "finite"}
    assert [correction.factor for correction in mup.corrections] == [0.25]


def test_the_factor_is_on_the_low_rank_term_alone():
    x, key = jax.random.normal(jax.random.key(1), (2, 7)), jax.random.key(0)
    outs = []
    for name in ("a sum", "in a branch of its own"):
        build = low_rank(LOW_RANK[name])
        mup = mujax.mup_init(build(64), build(BASE), X, KEY)
        params = mup.init(key, x, key) | {"b": jnp.ones((3, 64))}
        outs.append(mup.apply(params, x, key))
    np.testing.assert_allclose(outs[0], outs[1], rtol=1e-4, atol=1e-4)


def test_a_gated_mixture_of_readouts_keeps_the_scale_of_what_it_reads():
    """The gate is a scalar through a sigmoid; the model's own 1/sqrt(width) behind the product is held."""

    def build(width, gated=True):
        def init(key, x):
            shapes = {"in": (7, width), "w": (width, 5), "v": (width, 5), "s": ()}
            return {name: jax.random.normal(key, shape) for name, shape in shapes.items()}

        def apply(p, x):
            gate = jax.nn.sigmoid(p["s"])
            kernel = gate * p["w"] + (1 - gate) * p["v"] if gated else p["w"] + p["v"]
            return (jax.nn.relu(x @ p["in"]) * width**0.5) @ kernel / width

        return mujax.Functional(init, apply)

    for gated in (True, False):
        mup = mujax.mup_init(build(64, gated), build(BASE, gated), X)
        assert [c.factor for c in mup.corrections if c.kind == "readout"] == [0.25]
        assert [c.factor for c in mup.corrections if c.kind == "scale"] == pytest.approx([0.5, 4.0])


@pytest.mark.parametrize("axis", [0, 1])
def test_a_kernel_that_is_rolled_is_a_kernel(axis):
    param = read(lambda k, h, key, step: h @ jnp.roll(k, 1, axis)).spec["k"]
    assert (param.role, param.fan_in, param.fan_out) == ("hidden", (0,), (1,))


HYPERNETWORKS = {
    "kernel first": lambda k, h, key, step: jnp.einsum(
        "bio,bi->bo", jnp.einsum("bf,fio->bio", noisy_inputs(key), k), h
    ),
    "one einsum": lambda k, h, key, step: jnp.einsum("bf,fio,bi->bo", noisy_inputs(key), k, h),
    "one kernel for all": lambda k, h, key, step: (
        h @ jnp.tensordot(jax.nn.softmax(noisy_inputs(key)[0]), k, 1)
    ),
}


def noisy_inputs(key):
    """Data without a width, as the model's inputs are."""
    return jax.random.normal(key, (2, 4))


@pytest.mark.parametrize("name", HYPERNETWORKS)
def test_a_kernel_that_inputs_mix_is_a_kernel(name):
    param = read(HYPERNETWORKS[name], **EXPERTS).spec["k"]
    assert (param.role, param.r_in, param.r_out) == ("hidden", 4.0, 4.0)


# ---- sums of squares -------------------------------------------------------------------------------------


def _distances(k, h, terms):
    found = -2 * h @ k.T
    if "c" in terms:
        found = (k**2).sum(-1) + found
    if "z" in terms:
        found = (h**2).sum(-1, keepdims=True) + found
    return found


CODES = {"shape": lambda w: (5, w)}


@pytest.mark.parametrize("terms", ["c", "z", "cz"])
def test_one_term_of_an_expanded_square_gets_no_factor(terms):
    mup = read(lambda k, h, key, step: jnp.argmin(_distances(k, h, terms), -1), strict=False, **CODES)
    assert "expanded square" in {finding.kind for finding in mup.findings}
    assert mup.corrections == ()


def test_the_nearest_code_is_picked():
    def make(k, h, key, step):
        return h, k, jnp.argmin(_distances(k, h, "cz"), -1)

    mup = read(make, 256, strict=False, **CODES)
    x, key = jax.random.normal(jax.random.key(1), (64, 7)), jax.random.key(0)
    h, codes, picked = mup.apply(mup.init(key, x, key, jnp.float32(1)), x, key, jnp.float32(1))
    np.testing.assert_array_equal(picked, jnp.argmin(((h[:, None] - codes) ** 2).sum(-1), -1))


def test_a_readout_alone_has_its_factor():
    mup = read(lambda k, h, key, step: _distances(k, h, ""), **CODES)
    assert [correction.kind for correction in mup.corrections] == ["readout"]


@pytest.mark.parametrize("scaled", [False, True])
def test_a_hidden_product_beside_a_sum_over_a_state_is_no_square(scaled):
    """A state-space model whose state grows: the sum over the state is at fault, not what is added to it."""

    def make(k, h, key, step):
        read_in, read_out, v = jnp.split(h @ k, 3, -1)
        mixing = read_out @ read_in.T
        return (mixing / h.shape[-1] if scaled else mixing) @ v + v

    mup = read(make, shape=lambda w: (w, 3 * w), strict=False)
    assert [finding.kind for finding in mup.findings] == ([] if scaled else ["unscaled sum"])
    assert mup.spec["k"].role == "hidden"


# ---- experts ---------------------------------------------------------------------------------------------


def test_experts_are_copies_in_the_first_layer_as_in_the_second():
    """The first product makes an axis of the experts, the second has it as its batch."""

    def make(k, h, key, step):
        inside = jax.nn.relu(jnp.einsum("bd,edf->bef", h, k[0]))
        return jnp.einsum("bef,efd->bed", inside, k[1]).sum(1)

    param = read(make, shape=lambda w: (2, 4, w, w)).spec["k"]
    assert (param.stack, param.fan_in, param.fan_out) == ((0, 1), (2,), (3,))


@pytest.mark.parametrize("shape", [lambda w: (w, 4, w // 4), lambda w: (w, w // 8, 8), lambda w: (w, w)])
def test_groups_of_features_are_no_copies(shape):
    """More of them in a wider model: the fan-out of the layer in front of them."""

    def build(width):
        def init(key, x):
            keys = jax.random.split(key, 3)
            return {
                "first": jax.random.normal(keys[0], (7, width)),
                "k": jax.random.normal(keys[1], shape(width)) / width**0.5,
                "groups": jax.random.normal(keys[2], (width // 8, 8, 8)) / 8**0.5,
            }

        def apply(params, x):
            h = jax.nn.relu(x @ params["first"]) @ params["k"].reshape(width, width)
            groups = jax.nn.relu(h).reshape(-1, width // 8, 8)
            return jnp.einsum("bhi,hio->bho", groups, params["groups"]).reshape(-1, width)[:, :3]

        return mujax.Functional(init, apply)

    mup = mujax.mup_init(build(64), build(BASE), X, strict=True)
    assert mup.spec["k"].role == "hidden"
    assert not mup.corrections


def test_heads_that_are_summed_are_no_copies():
    def make(k, h, key, step):
        heads = jnp.einsum("bd,dhf->bhf", h, k)
        return jax.nn.relu(heads).sum(1)

    param = read(make, shape=lambda w: (w, 4, w)).spec["k"]
    assert (param.stack, param.fan_out) == ((), (1, 2))
