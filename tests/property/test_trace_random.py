"""Random programs: the exponent that the interpreter reports is the slope that running them shows.

A program maps an activation of shape (3, width) to another, step by step. It is run at four widths on
positive inputs, where every sum is coherent, as the interpreter counts it, and with kernels whose products
are of order one, as the rules make them. All entries are alike by symmetry, so that the measured slope is
exact.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, given, settings, strategies as st
from jax import lax

from mujax.core.program import Insertion, evaluate
from mujax.core.trace import analyse
from mujax.core.trace._interpreter import Interpreter
from mujax.core.trace._values import Value, parameter
from mujax.core.trace.primitives import PRIMITIVES

ROWS, WIDTHS = 3, (8, 16, 32, 64)
BASE = WIDTHS[0]
PARAMS = ("kernel", "stack", "readout", "gain")

Step = Callable[[jax.Array, dict[str, jax.Array], int], jax.Array]
"""From the activation, the parameters and the width to the next activation, of the same shape."""


def parameters(width: int) -> dict[str, jax.Array]:
    """Kernels of the size at which their products with ones are ones."""
    return {
        "kernel": jnp.full((width, width), 1 / width),
        "stack": jnp.full((2, width, width), 1 / width),
        "readout": jnp.full((width, ROWS), 1 / width),
        "gain": jnp.ones(width),
    }


@dataclasses.dataclass(frozen=True)
class Named:
    """A step with a name to print."""

    name: str
    step: Step

    def __call__(self, x, params, width):
        return self.step(x, params, width)

    def __repr__(self) -> str:
        return self.name


STEPS: dict[str, Step] = {
    # Products with parameters.
    "hidden": lambda x, p, w: x @ p["kernel"],
    "hidden, stored transposed": lambda x, p, w: lax.dot_general(x, p["kernel"], (((1,), (1,)), ((), ()))),
    "hidden as einsum over heads": lambda x, p, w: jnp.einsum(
        "bhk,hkd->bd", x.reshape(ROWS, 2, w // 2), p["kernel"].reshape(2, w // 2, w)
    ),
    "gain": lambda x, p, w: x * p["gain"],
    "down and up": lambda x, p, w: jnp.repeat(x @ p["readout"], w // 2, axis=1)[:, :w],
    "scaled kernel": lambda x, p, w: x @ (p["kernel"] * w**0.5),
    "scan over kernels": lambda x, p, w: lax.scan(lambda h, k: (jax.nn.relu(h @ k), None), x, p["stack"])[0],
    "scan that collects": lambda x, p, w: lax.scan(lambda h, k: (h @ k, h / jnp.sqrt(w)), x, p["stack"])[
        1
    ].sum(0),
    "loop": lambda x, p, w: lax.fori_loop(0, 2, lambda _, h: jax.nn.relu(h @ p["kernel"]), x),
    # Products of activations.
    "gram over width": lambda x, p, w: (x @ x.T) @ x,
    "gram over sqrt(width)": lambda x, p, w: (x @ x.T / jnp.sqrt(w)) @ x,
    "gram over width, divided": lambda x, p, w: (x @ x.T) * (1 / w) @ x,
    "gram of heads": lambda x, p, w: jnp.einsum(
        "hbc,chd->bhd",
        jnp.einsum("bhd,chd->hbc", x.reshape(ROWS, w // 4, 4), x.reshape(ROWS, w // 4, 4)),
        x.reshape(ROWS, w // 4, 4),
    ).reshape(ROWS, w),
    "gram of growing heads": lambda x, p, w: jnp.einsum(
        "hbc,chd->bhd",
        jnp.einsum("bhd,chd->hbc", x.reshape(ROWS, 2, -1) * (w / 2) ** -0.5, x.reshape(ROWS, 2, -1)),
        x.reshape(ROWS, 2, -1),
    ).reshape(ROWS, w),
    "multiply and sum": lambda x, p, w: (x * x).sum(-1, keepdims=True) * x,
    "mapped dot": lambda x, p, w: jax.vmap(lambda row: jnp.dot(row, row) * row)(x),
    # Constants.
    "times d^1/2": lambda x, p, w: x * w**0.5,
    "times sqrt(d)": lambda x, p, w: jnp.sqrt(w) * x,
    "over sqrt(d)": lambda x, p, w: x / jnp.sqrt(w),
    "over sqrt of the head": lambda x, p, w: x * (w // 4) ** -0.5,
    "over d": lambda x, p, w: x / w,
    "times d^-1/4": lambda x, p, w: x * jnp.full((1, 1), w) ** -0.25,
    "rsqrt": lambda x, p, w: x * lax.rsqrt(jnp.asarray(w, x.dtype)),
    # Sums, means and norms.
    "mean": lambda x, p, w: jnp.broadcast_to(x.mean(-1, keepdims=True), x.shape),
    "sum over sqrt(d)": lambda x, p, w: jnp.broadcast_to(x.sum(-1, keepdims=True) / w**0.5, x.shape),
    "sum over a fixed part": lambda x, p, w: jnp.repeat(x.reshape(ROWS, w // 4, 4).sum(-1), 4, axis=1),
    "over its norm": lambda x, p, w: x / jnp.linalg.norm(x, axis=-1, keepdims=True),
    "over its root mean square": lambda x, p, w: x * lax.rsqrt((x**2).mean(-1, keepdims=True)),
    "maximum": lambda x, p, w: jnp.broadcast_to(x.max(-1, keepdims=True), x.shape),
    # Layout.
    "transpose and back": lambda x, p, w: (x.T * 2.0).T,
    "reshape and back": lambda x, p, w: x.reshape(ROWS, 2, w // 2).swapaxes(1, 2).reshape(ROWS, w),
    "halves": lambda x, p, w: jnp.concatenate(jnp.split(x, 2, axis=1)[::-1], axis=1),
    "pad and cut": lambda x, p, w: jnp.pad(x, ((1, 1), (0, 0)))[1:-1],
    "reversed": lambda x, p, w: x[:, ::-1],
    # Of one degree: they keep sizes.
    "relu": lambda x, p, w: jax.nn.relu(x),
    "absolute, by where": lambda x, p, w: jnp.where(x > 0, x, -x),
    "residual": lambda x, p, w: x + jax.nn.relu(x @ p["kernel"]),
    "in jit": lambda x, p, w: jax.jit(lambda h: h * h.shape[1] ** -0.5)(x),
    "in checkpoint": lambda x, p, w: jax.checkpoint(lambda h: h @ p["kernel"] * w**0.5)(x),
    "in cond": lambda x, p, w: lax.cond(x.sum() > 0, lambda h: h / w, lambda h: 2.0 * h / w, x),
    # Powers.
    "square": lambda x, p, w: x**2,
    "root": lambda x, p, w: jnp.sqrt(x),
    "inverse": lambda x, p, w: 1.0 / x,
}

BOUNDED: dict[str, Step] = {
    "tanh": lambda x, p, w: jnp.tanh(x),
    "attention": lambda x, p, w: jax.nn.softmax(x @ x.T / jnp.sqrt(w) + jnp.eye(ROWS)) @ x,
    "soft cap": lambda x, p, w: 3.0 * jnp.tanh(x / 3.0),
    "bias": lambda x, p, w: x + 0.5 * p["gain"],
    "layer norm": lambda x, p, w: x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-12),
}
"""Steps that need a size of order one."""


def program(steps: Sequence[Step]) -> Callable[..., jax.Array]:
    def run(x, kernel, stack, readout, gain):
        params = dict(zip(PARAMS, (kernel, stack, readout, gain), strict=True))
        for step in steps:
            x = step(x, params, x.shape[1])
        return x

    return run


def arguments(width: int) -> list[jax.Array]:
    return [jnp.full((ROWS, width), 1.25), *parameters(width).values()]


def traced(steps: Sequence[Step], width: int):
    return jax.make_jaxpr(program(steps))(*arguments(width))


class AsItIs(Interpreter):
    """Corrects nothing: scales run through to the outputs."""

    def require_order_one(self, place, value, report=True):
        """The scale of the value."""
        return value.scale


def reported(small, big) -> float | None:
    """The exponent that the interpreter gives to the output."""
    inputs, shapes = [], {}
    for position, (b, t) in enumerate(zip(small.jaxpr.invars, big.jaxpr.invars, strict=True)):
        shape, base = t.aval.shape, b.aval.shape
        if position == 0:
            inputs.append(Value(shape, base, "data"))
        else:
            path = PARAMS[position - 1]
            shapes[path] = (shape, base)
            inputs.append(parameter(path, shape, base))
    (out,) = AsItIs(PRIMITIVES, shapes).run(small, big, inputs)
    ratio = big.jaxpr.invars[0].aval.shape[1] / BASE
    return None if out.scale.total is None else math.log(out.scale.total) / math.log(ratio)


def measured(values: Sequence[float]) -> float:
    return float(np.polyfit(np.log2(WIDTHS), np.log2(values), 1)[0])


def names(table: dict[str, Step]) -> st.SearchStrategy[list[Named]]:
    return st.lists(st.sampled_from([Named(*item) for item in table.items()]), min_size=1, max_size=6)


# A failing example prints itself; the same ones come up each time.
_same_each_time = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)


@settings(_same_each_time, max_examples=30)
@given(names(STEPS))
def test_the_reported_exponent_is_the_measured_slope(steps):
    with jax.enable_x64(True):
        programs = [traced(steps, width) for width in WIDTHS]
        values = [float(jnp.mean(program(steps)(*arguments(width)))) for width in WIDTHS]
        slope = measured(values)
        for one in programs[1:]:
            exponent = reported(programs[0], one)
            assert exponent is not None
            assert abs(exponent - slope) < 1e-3 * max(1.0, abs(slope))


def test_what_is_put_right_is_of_one_size_at_every_width():
    """Without a finding, the fixes bring a result to one size at every width."""
    fixed = []
    settings(_same_each_time, max_examples=30)(
        given(names(STEPS | BOUNDED))(lambda steps: fixed.append(is_put_right(steps)))
    )()
    # Or nothing would have been tested.
    assert sum(fixed) >= 10


def is_put_right(steps):
    """Asserts it of a program without findings; returns whether it is one, with something to correct."""
    # A unit vector that is an output stays one: a bias makes the result need a size.
    steps = [*steps, BOUNDED["bias"]]
    with jax.enable_x64(True):
        base = traced(steps, BASE)
        values, found = [], []
        for width in WIDTHS:
            target = traced(steps, width)
            params = dict(enumerate(PARAMS, start=1))
            analysis = analyse(base, target, params)
            found.append(bool(analysis.findings))
            insertions = {fix.site: Insertion((fix.factor,)) for fix in analysis.fixes}
            (out,) = evaluate(target, arguments(width), insertions)
            values.append(float(jnp.mean(out)))
        if not any(found):
            np.testing.assert_allclose(values, values[0], rtol=1e-4)
        return not any(found) and bool(analysis.fixes)
