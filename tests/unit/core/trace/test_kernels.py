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


REPORTED = {
    "plus noise": ("unlike terms", lambda k: k, lambda k, key: k + 0.3 * noise(key, k)),
    "the larger of two": ("unlike terms", lambda k: k, lambda k, key: jnp.maximum(k, noise(key, k))),
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


def test_heads_that_are_summed_are_no_copies():
    def make(k, h, key, step):
        heads = jnp.einsum("bd,dhf->bhf", h, k)
        return jax.nn.relu(heads).sum(1)

    param = read(make, shape=lambda w: (w, 4, w)).spec["k"]
    assert (param.stack, param.fan_out) == ((), (1, 2))
