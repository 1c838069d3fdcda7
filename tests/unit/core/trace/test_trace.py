"""The interpreter: what it reads off each way in which a program can handle a parameter.

Each case is a tiny pair of pure functions. `h` is an activation of width w made from the data by a first
kernel; `k` is the parameter under test, used the way that the case shows.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mujax
from mujax.core.trace._values import Factor, fit, regroup

BASE, TARGET = 8, 24
X = jax.ShapeDtypeStruct((2, 7), jnp.float32)

HIDDEN, INPUT, OUTPUT, FINITE = "hidden", "input", "output", "finite"


@dataclasses.dataclass(frozen=True)
class Case:
    """A use of a parameter.

    Attributes:
        shape: width -> shape of the parameter (or shapes of several, by name).
        use: (parameter or parameters, activation of shape (2, w), width) -> anything.
        expected: (role, fan-in, fan-out, stack) of the parameter, or of each by name.
    """

    shape: Callable[[int], Any]
    use: Callable[..., Any]
    expected: Any


def build(case: Case, width: int) -> mujax.Functional:
    shapes = case.shape(width)
    shapes = shapes if isinstance(shapes, dict) else {"k": shapes}

    def init(key, x):
        del x
        params = {name: jax.random.normal(key, shape) for name, shape in shapes.items()}
        return {"first": jax.random.normal(key, (7, width)), **params}

    def apply(params, x):
        h = x @ params["first"]
        mine = params["k"] if set(shapes) == {"k"} else params
        return case.use(mine, h, width)

    return mujax.Functional(init, apply)


def read(case: Case, **kwargs) -> mujax.MupModel:
    return mujax.mup_init(build(case, TARGET), build(case, BASE), X, **kwargs)


def spec_of(param: mujax.ParamSpec) -> tuple:
    return (param.role, param.fan_in, param.fan_out, param.stack)


IN_OUT = (HIDDEN, (0,), (1,), ())
OUT_IN = (HIDDEN, (1,), (0,), ())
STACK_IN_OUT = (HIDDEN, (1,), (2,), (0,))
VECTOR = (INPUT, (), (0,), ())


def square(w):
    return (w, w)


def wide(w):
    return (w, 2 * w)


def _scan(k, h, w):
    return lax.scan(lambda h, one: (jnp.tanh(h @ one), None), h, k)[0]


def _conv(numbers, **kwargs):
    def use(k, h, w):
        image = jnp.broadcast_to(h[:, None, None, :], (2, 4, 4, w))
        image = image if numbers[0] == "NHWC" else image.transpose(0, 3, 1, 2)
        return lax.conv_general_dilated(image, k, (1, 1), "SAME", dimension_numbers=numbers, **kwargs)

    return use


def _tokens(h):
    return jnp.argsort(h[:, :3], -1).astype(jnp.int32)


@jax.custom_jvp
def _squared(x):
    return x * x


_squared.defjvp(lambda primals, tangents: (_squared(primals[0]), 2 * primals[0] * tangents[0]))


@jax.custom_vjp
def _straight(x):
    return jnp.round(x)


_straight.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


def _quantised(k):
    step = jnp.abs(k).max() / 127
    return _straight(k / step) * step


@jax.custom_jvp
def _halved(x):
    return x / 2


_halved.defjvp(lambda primals, tangents: (_halved(primals[0]), tangents[0] / 2))


CASES: dict[str, Case] = {
    # ---- products ----
    "matmul": Case(wide, lambda k, h, w: h @ k, IN_OUT),
    "matmul_left": Case(lambda w: (2 * w, w), lambda k, h, w: k @ h.T, OUT_IN),
    "dot_general": Case(
        lambda w: (2 * w, w), lambda k, h, w: lax.dot_general(h, k, (((1,), (1,)), ((), ()))), OUT_IN
    ),
    "einsum": Case(
        lambda w: (w // 4, 3, w, 4), lambda k, h, w: jnp.einsum("bi,ghid->bghd", h, k),
        (HIDDEN, (2,), (0, 1, 3), ()),
    ),
    "tensordot": Case(
        lambda w: (w // 4, 4, w), lambda k, h, w: jnp.tensordot(h.reshape(2, w // 4, 4), k, 2),
        (HIDDEN, (0, 1), (2,), ()),
    ),
    "batched": Case(
        lambda w: (2, w, w), lambda k, h, w: jnp.einsum("bi,bio->bo", h, k), STACK_IN_OUT
    ),
    "block_diagonal": Case(
        # The blocks grow in number: fan-in stays at 4, the pre-activation widens.
        lambda w: (w // 4, 4, 4), lambda k, h, w: jnp.einsum("bgi,gio->bgo", h.reshape(2, w // 4, 4), k),
        (INPUT, (1,), (2,), (0,)),
    ),
    "vmapped": Case(wide, lambda k, h, w: jax.vmap(lambda row: row @ k)(h), IN_OUT),
    "vmapped_kernels": Case(
        lambda w: (2, w, 2 * w), lambda k, h, w: jax.vmap(jnp.matmul)(h, k), STACK_IN_OUT
    ),
    "multiply_and_sum": Case(wide, lambda k, h, w: (h[:, :, None] * k).sum(1), IN_OUT),
    "multiply_and_mean": Case(lambda w: (w,), lambda k, h, w: (h * k).mean(-1), (OUTPUT, (0,), (), ())),
    "inner": Case(lambda w: (w,), lambda k, h, w: h @ k, (OUTPUT, (0,), (), ())),
    "one_hot": Case(
        lambda w: (5, w), lambda k, h, w: jax.nn.one_hot(_tokens(h), 5) @ k, (INPUT, (0,), (1,), ())
    ),
    "mixed_with_data": Case(lambda w: (w, 3), lambda k, h, w: jnp.tanh(h) @ k, (OUTPUT, (0,), (1,), ())),
    # ---- layout ----
    "transpose": Case(lambda w: (2 * w, w), lambda k, h, w: h @ k.T, OUT_IN),
    "transpose_of_four": Case(
        lambda w: (4, w, w // 4, 3), lambda k, h, w: jnp.einsum("bi,iohd->bohd", h, k.transpose(1, 2, 0, 3)),
        (HIDDEN, (1,), (0, 2, 3), ()),
    ),
    "twice_transposed": Case(wide, lambda k, h, w: h @ k.T.T, IN_OUT),
    "merge_outputs": Case(
        lambda w: (w, w // 4, 4), lambda k, h, w: h @ k.reshape(w, w), (HIDDEN, (0,), (1, 2), ())
    ),
    "merge_inputs": Case(
        lambda w: (w // 4, 4, w), lambda k, h, w: h @ k.reshape(w, w), (HIDDEN, (0, 1), (2,), ())
    ),
    "split_outputs": Case(
        square, lambda k, h, w: jnp.einsum("bi,ihd->bhd", h, k.reshape(w, w // 4, 4)), IN_OUT
    ),
    "split_inputs": Case(
        square, lambda k, h, w: jnp.einsum("bhd,hdo->bo", h.reshape(2, w // 4, 4), k.reshape(w // 4, 4, w)),
        IN_OUT,
    ),
    "split_and_merge": Case(
        square, lambda k, h, w: h @ k.reshape(w, 2, w // 2).transpose(0, 2, 1).reshape(w, w), IN_OUT
    ),
    "squeeze": Case(lambda w: (1, w, w), lambda k, h, w: h @ k[0], (HIDDEN, (1,), (0, 2), ())),
    "expand": Case(wide, lambda k, h, w: (h[:, None] @ k[None])[:, 0], IN_OUT),
    "flip": Case(wide, lambda k, h, w: h @ k[::-1], IN_OUT),
    "roll": Case(wide, lambda k, h, w: h @ jnp.roll(k, 2, 0), IN_OUT),
    "cast": Case(wide, lambda k, h, w: h.astype(jnp.bfloat16) @ k.astype(jnp.bfloat16), IN_OUT),
    "stop_gradient": Case(wide, lambda k, h, w: h @ lax.stop_gradient(k), IN_OUT),
    "scaled": Case(wide, lambda k, h, w: h @ (0.5 * k), IN_OUT),
    "masked": Case(square, lambda k, h, w: h @ jnp.tril(k), IN_OUT),
    "where": Case(square, lambda k, h, w: h @ jnp.where(jnp.eye(w, dtype=bool), 0.0, k), IN_OUT),
    "pad": Case(
        lambda w: (w, w), lambda k, h, w: h @ jnp.pad(k, ((0, 0), (1, 1))), IN_OUT
    ),
    # ---- parts ----
    "index": Case(lambda w: (3, w, w), lambda k, h, w: h @ k[1], STACK_IN_OUT),
    "index_last": Case(lambda w: (w, w, 3), lambda k, h, w: h @ k[..., 2], (HIDDEN, (0,), (1,), (2,))),
    "index_each": Case(lambda w: (3, w, w), lambda k, h, w: sum(h @ one for one in k), STACK_IN_OUT),
    "split": Case(
        lambda w: (w, 3 * w), lambda k, h, w: sum(h @ part for part in jnp.split(k, 3, 1)), IN_OUT
    ),
    "slice": Case(lambda w: (w, 3 * w), lambda k, h, w: h @ k[:, w:], IN_OUT),
    "slice_inputs": Case(lambda w: (3 * w, w), lambda k, h, w: h @ k[w : 2 * w], IN_OUT),
    "stride": Case(lambda w: (w, 2 * w), lambda k, h, w: h @ k[:, ::2], IN_OUT),
    "dynamic_index": Case(
        lambda w: (3, w, w),
        lambda k, h, w: h @ lax.dynamic_index_in_dim(k, jnp.argmax(h[0, :3]), keepdims=False),
        STACK_IN_OUT,
    ),
    "dynamic_slice": Case(
        lambda w: (w, 3 * w), lambda k, h, w: h @ lax.dynamic_slice_in_dim(k, jnp.argmax(h[0]), w, 1), IN_OUT
    ),
    "gathered_kernels": Case(
        lambda w: (5, w, w), lambda k, h, w: jnp.einsum("bi,bio->bo", h, k[_tokens(h)[:, 0]]), STACK_IN_OUT
    ),
    "concatenate": Case(
        lambda w: {"k": (w, w), "l": (w, 2 * w)},
        lambda p, h, w: h @ jnp.concatenate([p["k"], p["l"]], 1),
        {"k": IN_OUT, "l": IN_OUT},
    ),
    "concatenate_inputs": Case(
        lambda w: {"k": (w, w), "l": (w, w)},
        lambda p, h, w: jnp.concatenate([h, h], -1) @ jnp.concatenate([p["k"], p["l"]]),
        {"k": IN_OUT, "l": IN_OUT},
    ),
    "stack": Case(
        lambda w: {"k": (w, w), "l": (w, w)},
        lambda p, h, w: jnp.einsum("bi,bio->bo", h, jnp.stack([p["k"], p["l"]])),
        {"k": IN_OUT, "l": IN_OUT},
    ),
    # ---- vectors and scalars ----
    "bias": Case(lambda w: (w,), lambda k, h, w: h + k, VECTOR),
    "gain": Case(lambda w: (w,), lambda k, h, w: h * k, VECTOR),
    "divisor": Case(lambda w: (w,), lambda k, h, w: h / (1 + k**2), VECTOR),
    "exponentiated": Case(lambda w: (w,), lambda k, h, w: h * jnp.exp(k), VECTOR),
    "tiled": Case(lambda w: (w // 4,), lambda k, h, w: h + jnp.tile(k, 4), VECTOR),
    "repeated": Case(lambda w: (w // 4,), lambda k, h, w: h + jnp.repeat(k, 4), VECTOR),
    "grid": Case(lambda w: (2, w), lambda k, h, w: h + k, (INPUT, (), (0, 1), ())),
    "scalar": Case(lambda w: (), lambda k, h, w: h * k, (FINITE, (), (), ())),
    "finite_vector": Case(lambda w: (2,), lambda k, h, w: h * k[:, None], (FINITE, (), (0,), ())),
    "prepended": Case(
        lambda w: (1, w), lambda k, h, w: jnp.concatenate([k, h]), (INPUT, (), (0, 1), ())
    ),
    "maximum": Case(lambda w: (w,), lambda k, h, w: jnp.maximum(h, k), VECTOR),
    "cumulative": Case(
        lambda w: (w,),
        lambda k, h, w: h * lax.associative_scan(jnp.multiply, jnp.broadcast_to(k, (4, w)))[-1],
        VECTOR,
    ),
    "parametric_relu": Case(lambda w: (w,), lambda k, h, w: jnp.where(h > 0, h, k * h), VECTOR),
    # ---- lookups ----
    "take": Case(lambda w: (9, w), lambda k, h, w: jnp.take(k, _tokens(h), 0), (INPUT, (0,), (1,), ())),
    "take_columns": Case(
        lambda w: (w, 9), lambda k, h, w: jnp.take(k, _tokens(h), 1), (INPUT, (1,), (0,), ())
    ),
    "fancy_index": Case(lambda w: (9, w), lambda k, h, w: k[_tokens(h)], (INPUT, (0,), (1,), ())),
    "two_indices": Case(
        lambda w: (9, 5, w), lambda k, h, w: k[_tokens(h), _tokens(h)], (INPUT, (0, 1), (2,), ())
    ),
    "take_of_heads": Case(
        lambda w: (9, w // 4, 4), lambda k, h, w: k[_tokens(h)], (INPUT, (0,), (1, 2), ())
    ),
    "position": Case(lambda w: (16, w), lambda k, h, w: h + k[:2], (INPUT, (), (0, 1), ())),
    # ---- convolutions ----
    "conv": Case(lambda w: (3, 3, w, 2 * w), _conv(("NHWC", "HWIO", "NHWC")), (HIDDEN, (0, 1, 2), (3,), ())),
    "conv_torch": Case(
        lambda w: (2 * w, w, 3, 3), _conv(("NCHW", "OIHW", "NCHW")), (HIDDEN, (1, 2, 3), (0,), ())
    ),
    "conv_dilated": Case(
        lambda w: (3, 3, w, 5), _conv(("NHWC", "HWIO", "NHWC"), rhs_dilation=(2, 2)),
        (OUTPUT, (0, 1, 2), (3,), ()),
    ),
    "conv_grouped": Case(
        lambda w: (3, 3, w // 2, w), _conv(("NHWC", "HWIO", "NHWC"), feature_group_count=2),
        (HIDDEN, (0, 1, 2), (3,), ()),
    ),
    "conv_transposed": Case(
        lambda w: (2, 2, w, w),
        lambda k, h, w: lax.conv_transpose(jnp.zeros((2, 4, 4, w)) + h[:, None, None], k, (2, 2), "SAME"),
        (HIDDEN, (0, 1, 2), (3,), ()),
    ),
    "conv_one_dimension": Case(
        lambda w: (3, w, w),
        lambda k, h, w: lax.conv_general_dilated(
            jnp.zeros((2, 5, w)) + h[:, None], k, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        (HIDDEN, (0, 1), (2,), ()),
    ),
    # ---- control flow ----
    "scan": Case(lambda w: (3, w, w), _scan, STACK_IN_OUT),
    "scan_reverse": Case(
        lambda w: (3, w, w),
        lambda k, h, w: lax.scan(lambda h, one: (h @ one, h), h, k, reverse=True),
        STACK_IN_OUT,
    ),
    "scan_of_pairs": Case(
        lambda w: (2, 3, w, w),
        lambda k, h, w: lax.scan(lambda h, pair: (_scan(pair, h, w), None), h, k)[0],
        (HIDDEN, (2,), (3,), (0, 1)),
    ),
    "scan_transposed": Case(
        lambda w: (w, w, 3), lambda k, h, w: _scan(k.transpose(2, 0, 1), h, w), (HIDDEN, (0,), (1,), (2,))
    ),
    "scan_shared": Case(
        square, lambda k, h, w: lax.scan(lambda h, _: (jnp.tanh(h @ k), None), h, length=3)[0], IN_OUT
    ),
    "scan_bias": Case(
        lambda w: (3, w), lambda k, h, w: lax.scan(lambda h, one: (h + one, None), h, k)[0],
        (INPUT, (), (1,), (0,)),
    ),
    "fori": Case(square, lambda k, h, w: lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ k), h), IN_OUT),
    "fori_index": Case(
        lambda w: (3, w, w), lambda k, h, w: lax.fori_loop(0, 3, lambda i, h: h @ k[i], h), STACK_IN_OUT
    ),
    "while": Case(
        square, lambda k, h, w: lax.while_loop(lambda h: h.mean() < 1, lambda h: jnp.tanh(h @ k), h), IN_OUT
    ),
    "cond": Case(square, lambda k, h, w: lax.cond(h.sum() > 0, lambda: h @ k, lambda: h), IN_OUT),
    "switch": Case(
        square,
        lambda k, h, w: lax.switch(jnp.argmax(h[0, :3]), [lambda: h, lambda: h @ k, lambda: -h @ k]),
        IN_OUT,
    ),
    "remat": Case(square, lambda k, h, w: jax.checkpoint(lambda k, h: jnp.tanh(h @ k))(k, h), IN_OUT),
    "jit": Case(square, lambda k, h, w: jax.jit(lambda k, h: h @ k.T)(k, h), OUT_IN),
    "jit_of_kernel": Case(square, lambda k, h, w: h @ jax.jit(lambda k: k.T)(k), OUT_IN),
    "custom_jvp": Case(square, lambda k, h, w: _squared(h @ k) @ _halved(k), IN_OUT),
    "custom_vjp": Case(square, lambda k, h, w: _straight(h) @ _quantised(k), IN_OUT),
    # ---- functions of several parameters ----
    "sum_of_kernels": Case(
        lambda w: {"k": (w, w), "l": (w, w)}, lambda p, h, w: h @ (p["k"] + p["l"].T),
        {"k": IN_OUT, "l": OUT_IN},
    ),
    "gain_on_a_kernel": Case(
        lambda w: {"k": (w, w), "g": (w,)}, lambda p, h, w: h @ (p["k"] * p["g"]), {"k": IN_OUT, "g": VECTOR}
    ),
    "tied": Case(
        lambda w: (9, w), lambda k, h, w: (h + k[_tokens(h)[:, 0]]) @ k.T, (INPUT, (0,), (1,), ())
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_axis_roles(name):
    case = CASES[name]
    spec = read(case).spec
    expected = case.expected if isinstance(case.expected, dict) else {"k": case.expected}
    assert {path: spec_of(spec[path]) for path in expected} == expected
    assert spec_of(spec["first"]) == (INPUT, (0,), (1,), ())
    assert spec["k"].tied == (name == "tied")


# ---- what a case must not be confused with ---------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "one", "other"),
    [
        # The same shapes used the other way round.
        (square, lambda k, h, w: h @ k, lambda k, h, w: h @ k.T),
        (square, lambda k, h, w: h @ k.reshape(w, w), lambda k, h, w: h @ k.reshape(w, w).T),
        (lambda w: (3, w), lambda k, h, w: h[:, :3] @ k, lambda k, h, w: h @ k.T),
        # A gain, and the same numbers contracted.
        (lambda w: (w,), lambda k, h, w: h * k, lambda k, h, w: h @ k),
        # A bias per row, and an embedding of the row's number.
        (lambda w: (2, w), lambda k, h, w: h + k, lambda k, h, w: k[_tokens(h) % 2]),
    ],
)
def test_another_use_is_another_role(shape, one, other):
    specs = [spec_of(read(Case(shape, use, None)).spec["k"]) for use in (one, other)]
    assert specs[0] != specs[1]


def test_widths_that_do_not_grow_together():
    """Real ratios of each axis, not one width multiplier."""
    case = Case(lambda w: (w, 3 * w - 16), lambda k, h, w: jnp.sin(h @ k).mean(-1), None)
    spec = read(case).spec["k"]
    assert (spec.shape, spec.base_shape) == ((24, 56), (8, 8))
    assert (spec.r_in, spec.r_out) == (3.0, 7.0)


# ---- what can't be followed ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda k, h, w: h @ jnp.linalg.inv(k),
        lambda k, h, w: h @ jnp.fft.fft(k).real,
        lambda k, h, w: h @ jnp.sort(k, 0),
        lambda k, h, w: h @ jnp.cumsum(k, 0),
        lambda k, h, w: jax.pure_callback(np.matmul, jax.ShapeDtypeStruct((2, w), h.dtype), h, k),
    ],
)
def test_what_can_not_be_followed_is_an_error_and_not_a_guess(use):
    case = Case(square, use, None)
    line = use.__code__.co_firstlineno
    with pytest.raises(mujax.RoleError) as caught:
        read(case)
    assert str(caught.value).startswith(
        "k: expected a use that shows which axes of shape (24, 24) are fan-in, got one in "
    )
    assert f"test_trace.py:{line}" in str(caught.value)
    assert 'roles={"k": ...}' in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "use"),
    [
        # Used as an input weight and as a hidden one.
        (square, lambda k, h, w: h[:, :1] * k[:2] + h @ k),
        # Two contractions that grow at different rates.
        (lambda w: (w, w // 4, 4), lambda k, h, w: (h @ k.reshape(w, w), h.reshape(2, w // 4, 4) @ k[0].T)),
    ],
)
def test_uses_that_contradict_each_other_are_an_error(shape, use):
    with pytest.raises(mujax.RoleError, match=r"k: expected one .*roles="):
        read(Case(shape, use, None))


ADDED_VECTOR = Case(
    lambda w: {"k": (w, w), "g": (w, 1)},
    lambda p, h, w: h @ (p["k"] + p["g"]),
    {"k": IN_OUT, "g": (OUTPUT, (0,), (1,), ())},
)
LOW_RANK_UPDATE = Case(
    lambda w: {"k": (w, w), "down": (w, 2), "up": (2, w)},
    lambda p, h, w: h @ (p["k"] + p["down"] @ p["up"]),
    {"k": IN_OUT, "down": (OUTPUT, (0,), (1,), ()), "up": (INPUT, (0,), (1,), ())},
)


@pytest.mark.parametrize(
    ("shape", "use"),
    [
        (lambda w: (w * w,), lambda k, h, w: h @ k.reshape(w, w)),
        (lambda w: (w * w + w,), lambda k, h, w: h @ k[: w * w].reshape(w, w) + k[w * w :]),
        (lambda w: (w * w * 3,), lambda k, h, w: h @ k.reshape(3, w, w)[0]),
    ],
)
def test_a_parameter_stored_flat_is_an_error(shape, use):
    """One axis that is fan-in and fan-out at once: no spec can express that."""
    with pytest.raises(mujax.RoleError) as caught:
        read(Case(shape, use, None))
    text = str(caught.value)
    assert text.startswith("k: expected each axis to be fan-in or fan-out, got parts of axis 0 of shape (")
    assert (
        f"test_trace.py:{use.__code__.co_firstlineno} and grow with width; store the parameter with" in text
    )


@pytest.mark.parametrize(
    ("shape", "use", "role"),
    [
        (lambda w: (3 * w,), lambda k, h, w: h @ k.reshape(w, 3), OUTPUT),
        (lambda w: (3 * w,), lambda k, h, w: h[:, :3] @ k.reshape(3, w), INPUT),
    ],
)
def test_a_flat_parameter_of_which_one_part_grows_is_fine(shape, use, role):
    spec = read(Case(shape, use, None)).spec["k"]
    assert (spec.role, spec.r_in * spec.r_out) == (role, 3.0)


def test_parameters_that_want_different_factors_on_one_product_are_an_error():
    """A vector that is added to a hidden kernel reads out: Table 8 wants a factor on its product alone."""
    with pytest.raises(mujax.RoleError) as caught:
        read(ADDED_VECTOR)
    line = ADDED_VECTOR.use.__code__.co_firstlineno
    assert str(caught.value).startswith("k and g: expected one factor for their common product at")
    assert f"test_trace.py:{line}, got roles that require different ones; use separate products" in str(
        caught.value
    )


def test_a_low_rank_update_of_a_kernel_has_roles_of_its_own():
    for table in ("mup", "table3"):
        spec = read(LOW_RANK_UPDATE, parametrization=table).spec
        assert {path: spec_of(spec[path]) for path in LOW_RANK_UPDATE.expected} == LOW_RANK_UPDATE.expected


@pytest.mark.parametrize(
    "use",
    [
        lambda k, h, w: h,
        lambda k, h, w: (h, (k**2).sum(), k),
        lambda k, h, w: jnp.where(False, 1.0, 2.0) * h,
    ],
    ids=["not at all", "in a penalty", "behind a condition"],
)
def test_a_parameter_that_is_not_used_is_reported_and_keeps_the_bases_values(use):
    with pytest.warns(mujax.MujaxWarning, match=r"k: the traced call does not use it.* roles="):
        mup = read(Case(square, use, None))
    assert [finding.kind for finding in mup.findings] == ["unused parameter"]
    assert (mup.spec["k"].role, mup.spec["k"].r_in, mup.init_scales["k"]) == (INPUT, 1.0, 1.0)
    with pytest.raises(mujax.AuditError, match="does not use it"):
        read(Case(square, use, None), strict=True)
    assert read(Case(square, use, None), roles={"k": "hidden"}, strict=True).spec["k"].r_in == 3.0


def test_a_parameter_that_is_not_used_and_does_not_grow_is_finite():
    spec = read(Case(lambda w: (3, 4), lambda k, h, w: h, None), strict=True).spec["k"]
    assert (spec.role, spec.r_in, spec.r_out) == (FINITE, 1.0, 1.0)


CLASSES = {
    "product": Case(lambda w: (w, w // 4 + 5), lambda k, h, w: h @ k, None),
    "stored the other way": Case(lambda w: (w // 4 + 5, w), lambda k, h, w: h @ k.T, None),
    "masked": Case(
        lambda w: (w, w // 4 + 5), lambda k, h, w: jnp.where(jnp.arange(w // 4 + 5) < 3, h @ k, 0.0), None
    ),
    "convolution": Case(
        lambda w: (1, 1, w, w // 4 + 5),
        lambda k, h, w: lax.conv_general_dilated(
            h[:, None, None], k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        None,
    ),
    "scaled and shifted": Case(lambda w: (w, w // 4 + 5), lambda k, h, w: 3 * (h @ k) + 1, None),
}


@pytest.mark.parametrize("name", CLASSES)
def test_an_output_that_grows_as_no_width_does_is_an_error(name):
    """Another number of classes in base and target; `roles=` declares it a width all the same."""
    with pytest.raises(
        mujax.ShapeMismatchError, match=r"k: expected 7 entries along axis .* an output of the"
    ):
        read(CLASSES[name])
    assert read(CLASSES[name], roles={"k": "hidden"}).spec["k"].r_out == 11 / 7


@pytest.mark.parametrize(
    "case",
    [
        Case(wide, lambda k, h, w: h @ k, None),
        Case(square, lambda k, h, w: jax.nn.relu(h @ k), None),
        Case(lambda w: (w, w // 2, 2), lambda k, h, w: jnp.einsum("bi,ihd->bhd", h, k), None),
    ],
)
def test_features_of_a_backbone_grow_with_its_layers(case):
    assert read(case, strict=True).spec["k"].role == HIDDEN


@pytest.mark.parametrize("feeds", [True, False])
def test_a_projection_that_feeds_layers_is_no_head(feeds):
    """Parts of fixed size beside the width, as in Mamba's `in_proj`, and an output: its cache."""

    def at(width):
        shapes = {"first": (4, width), "mixed": (width, width + 8), "last": (width, 3)}

        def apply(p, x):
            h = jax.nn.relu(x @ p["first"])
            cache = h @ p["mixed"]
            kept, gate = cache[:, :width], cache[:, width:].sum(1, keepdims=True)
            return (kept * gate if feeds else h) @ p["last"], cache

        return mujax.Functional(
            lambda key, x: {
                name: jax.random.normal(jax.random.fold_in(key, n), shape)
                for n, (name, shape) in enumerate(shapes.items())
            },
            apply,
        )

    def read_it():
        return mujax.mup_init(at(24), at(8), jnp.ones((2, 4)), strict=True).spec["mixed"]

    if feeds:
        assert (read_it().role, read_it().r_in, read_it().r_out) == ("hidden", 3, 2)
    else:
        with pytest.raises(mujax.ShapeMismatchError, match="mixed: expected 16 entries along axis 1"):
            read_it()


def test_the_role_of_a_readout_needs_a_product_for_its_factor():
    """With a gain's use there is no product; init and learning rate alone would let the outputs grow."""
    case = Case(lambda w: (w, 3), lambda k, h, w: h * k[:, 0], None)
    with pytest.raises(
        mujax.RoleError, match=r"k: expected a product that contracts it over its fan-in.*got "
    ):
        read(case, roles={"k": "output"})
    product = Case(lambda w: (w, 3), lambda k, h, w: h @ k, None)
    assert len(read(product, roles={"k": "output"}, strict=True).corrections) == 1


def test_a_penalty_beside_a_use_changes_nothing():
    spec = read(Case(square, lambda k, h, w: (h @ k, (k**2).sum(), jnp.abs(k).max()), None)).spec["k"]
    assert spec_of(spec) == IN_OUT


def test_a_looked_up_axis_that_grows_is_a_vocabulary_and_an_error():
    use = lambda k, h, w: k[_tokens(h)]  # noqa: E731
    with pytest.raises(mujax.ShapeMismatchError) as caught:
        read(Case(lambda w: (w, 5), use, None))
    line = use.__code__.co_firstlineno
    assert str(caught.value) == (
        "k: expected 8 entries along axis 0 as in the base, since it is looked up by index at "
        f"tests/unit/core/trace/test_trace.py:{line}: a vocabulary and not a width, got 24; give base and "
        "target the same size there."
    )


# ---- the two programs side by side -----------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda k, h, w: jnp.tanh(h @ k) if w > BASE else h @ k,
        lambda k, h, w: h @ k if w > BASE else h @ k.T,
        lambda k, h, w: sum(h @ k for _ in range(w // BASE)),
    ],
)
def test_python_that_branches_on_a_width_is_an_error_that_names_both_places(use):
    with pytest.raises(mujax.TraceMismatchError) as caught:
        read(Case(square, use, None))
    text = str(caught.value)
    assert text.startswith("expected programs of base and target that differ in sizes only, got ")
    assert " in the base and " in text
    assert "; use a larger base" in text
    assert f"test_trace.py:{use.__code__.co_firstlineno}" in text


ALIGNABLE: dict[str, Callable[..., Any]] = {
    "squeeze": lambda k, h, w: (h[:, None, :] * jnp.ones((1, w // 2, 1))).mean(1) @ k,
    "heads": lambda k, h, w: jnp.einsum("bgi,gij->bj", h.reshape(2, w // 2, 2), k.reshape(w // 2, 2, w)),
    "reshape": lambda k, h, w: h.reshape(2, w // 2, 2).transpose(0, 2, 1).reshape(2, w) @ k,
    "broadcast": lambda k, h, w: (h @ k).reshape(2, w // 2, 2) + jnp.zeros((w // 2, 1)),
}


@pytest.mark.parametrize("name", ALIGNABLE)
def test_a_base_of_width_one_reads_as_a_larger_base_does(name):
    """With a base of width 2 some axes have size 1, and their broadcasts and squeezes fall away."""
    case = Case(square, ALIGNABLE[name], None)
    small, large = (mujax.mup_init(build(case, 8), build(case, base), X).spec["k"] for base in (2, 4))
    assert spec_of(small) == spec_of(large) == IN_OUT


def test_programs_may_differ_in_what_their_constants_are():
    """The same equations with other numbers in them."""
    case = Case(square, lambda k, h, w: h @ (k * (1.0 / w)) + jnp.arange(w), None)
    assert spec_of(read(case).spec["k"]) == IN_OUT


# ---- the domain's helpers --------------------------------------------------------------------------


def _axes(*axes):
    return [tuple(Factor(*factor) for factor in axis) for axis in axes]


A, B = (0, 12, 4), (1, 10, 5)


@pytest.mark.parametrize(
    ("axes", "shape", "base", "expected"),
    [
        # Nothing changes.
        (_axes([A], [B]), (12, 10), (4, 5), _axes([A], [B])),
        # Merged and split again, at the seam and across it.
        (_axes([A], [B]), (120,), (20,), _axes([A, B])),
        (_axes([A, B]), (12, 10), (4, 5), _axes([A], [B])),
        (_axes([A], [B]), (3, 4, 10), (1, 4, 5), _axes([(0, 3, 1)], [(0, 4, 4)], [B])),
        (_axes([A], [B]), (3, 40), (1, 20), _axes([(0, 3, 1)], [(0, 4, 4), B])),
        # Axes of size 1 belong to no axis of the array.
        (_axes([A]), (1, 12, 1), (1, 4, 1), _axes([], [A], [])),
        (_axes([], [A], []), (12,), (4,), _axes([A])),
        # An axis of size 1 in the base only belongs to an axis.
        (_axes([(0, 3, 1)], [B]), (30,), (5,), _axes([(0, 3, 1), B])),
        # Uneven cuts, in the target or in the base.
        (_axes([A], [B]), (8, 15), (4, 5), None),
        (_axes([A]), (6, 2), (3, 2), None),
        # Elements missing or left over.
        (_axes([A]), (12, 2), (4, 2), None),
        (_axes([A], [B]), (12,), (4,), None),
    ],
)
def test_regroup(axes, shape, base, expected):
    assert regroup(axes, shape, base) == (None if expected is None else tuple(expected))


@pytest.mark.parametrize(
    ("base", "shape", "expected"),
    [
        ((4, 5), (8, 5), (4, 5)),
        ((), (), ()),
        ((), (1, 1), (1, 1)),
        # Axes that the base lacks, or has too many of.
        ((5, 4), (5, 2, 4), (5, 1, 4)),
        ((4,), (3, 8), (1, 4)),
        ((5, 1, 4), (5, 4), (5, 4)),
        ((1, 1), (), ()),
        ((2, 7), (2, 3, 7), (2, 1, 7)),
    ],
)
def test_fit(base, shape, expected):
    assert fit(base, shape) == expected
