"""What each primitive does to the facts: one rule per primitive, in one table.

Rules read shapes from the equations and axes from their parameters. A primitive without a rule makes its
outputs plain data and its parameter operands opaque; nothing is guessed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

import numpy as np

from mujax.core.program import IDENTITIES, EqnPath, dtype_of, where
from mujax.core.trace._interpreter import Interpreter, Pair, Rule, resized
from mujax.core.trace._values import (
    ONE,
    UNKNOWN,
    Axis,
    Factor,
    Pending,
    Shape,
    Size,
    Value,
    View,
    broadcast_axis,
    common,
    constant,
    product,
    ratio,
    regroup,
    widest,
)
from mujax.errors import ShapeMismatchError

Move = Callable[[tuple[Axis, ...]], tuple[Axis, ...] | None]

# ---- helpers ---------------------------------------------------------------------------------------


def _aligned(view: View, value: Value, shape: Shape, base: Shape) -> View:
    """A view after numpy broadcasting of its value to a shape."""
    if not value.shape:
        return dataclasses.replace(
            view, axes=tuple(broadcast_axis(s, b) for s, b in zip(shape, base, strict=True))
        )
    axes = tuple(
        axis if old == size else broadcast_axis(size, small)
        for axis, old, size, small in zip(view.axes, value.shape, shape, base, strict=True)
    )
    return dataclasses.replace(view, axes=axes)


def _pendings(value: Value, shape: Shape, base: Shape) -> tuple[Pending, ...]:
    return tuple(Pending(p.use, _aligned(p.view, value, shape, base)) for p in value.pending)


def _moved(interp: Interpreter, pair: Pair, value: Value, shape: Shape, base: Shape, move: Move) -> Value:
    """The value with its axes rearranged; what can't be followed becomes opaque."""

    def apply(view: View) -> View | None:
        axes = move(view.axes)
        return None if axes is None else dataclasses.replace(view, axes=axes)

    views = []
    for view in value.views:
        moved = apply(view)
        if moved is None:
            interp.use(pair, view, "opaque")
        else:
            views.append(moved)
    pending = []
    for p in value.pending:
        moved = apply(p.view)
        if moved is None:
            interp.decide(Value((), (), "data", pending=(p,)))
        else:
            pending.append(Pending(p.use, moved))
    return value.replace(shape=shape, base=base, views=tuple(views), pending=tuple(pending))


# ---- elementwise -----------------------------------------------------------------------------------

SizeRule = Callable[[Interpreter, Pair, Sequence[Value], Sequence[Size]], Size]
"""Size of a result from the operands and the sizes that they bring."""


def _agree(interp: Interpreter, pair: Pair, ins: Sequence[Value], sizes: Sequence[Size]) -> Size:
    """A sum or a choice: terms of one size, or each is put right first.

    A constant term (a mask, an epsilon) has no say, but for an initialiser, where it is all there is.
    """
    moving = [size for value, size in zip(ins, sizes, strict=True) if interp.exact or value.kind != "const"]
    alike = common(moving or sizes)
    if alike is not None:
        return interp.sized(pair, alike)
    if interp.exact or any(size.total is None for size in moving) or all(v.kind != "data" for v in ins):
        return UNKNOWN
    for value in ins:
        interp.settle(pair.place, value)
    return ONE


def _of_order_one(interp: Interpreter, pair: Pair, ins: Sequence[Value], sizes: Sequence[Size]) -> Size:
    """A nonlinear function: its arguments must be of one size at every width."""
    if interp.exact:
        return ONE if all(size.is_one for size in sizes) else UNKNOWN
    for value in ins:
        interp.settle(pair.place, value)
    return ONE


def _exponential(interp: Interpreter, pair: Pair, ins: Sequence[Value], sizes: Sequence[Size]) -> Size:
    interp.logits(ins[0])
    return _of_order_one(interp, pair, ins, sizes)


def _always_one(interp: Interpreter, pair: Pair, ins: Sequence[Value], sizes: Sequence[Size]) -> Size:
    return ONE


def _comparison(interp: Interpreter, pair: Pair, ins: Sequence[Value], sizes: Sequence[Size]) -> Size:
    """Zeros and ones. How many of each there are tells only on entries of the same size at every width."""
    if interp.exact and not all(size.is_one for size in sizes):
        return UNKNOWN
    return ONE


def _chosen(interp: Interpreter, pair: Pair, ins: Sequence[Value], sizes: Sequence[Size]) -> Size:
    if interp.exact and not sizes[0].is_one:
        return UNKNOWN
    return _agree(interp, pair, ins[1:], sizes[1:])


def _power_of(exponent: float) -> SizeRule:
    def size(interp: Interpreter, pair: Pair, ins: Sequence[Value], sizes: Sequence[Size]) -> Size:
        return interp.sized(pair, sizes[0].power(exponent))

    return size


def _integer_pow(interp: Interpreter, pair: Pair, ins: Sequence[Value], sizes: Sequence[Size]) -> Size:
    return interp.sized(pair, sizes[0].power(float(pair.params["y"])))


def _pow(interp: Interpreter, pair: Pair, ins: Sequence[Value], sizes: Sequence[Size]) -> Size:
    exponent = ins[1].const
    if exponent is not None and exponent[0] == exponent[1]:
        return interp.sized(pair, sizes[0].power(exponent[1]))
    return _of_order_one(interp, pair, ins, sizes)


def _one_minus_square(interp: Interpreter, pair: Pair, ins: Sequence[Value], sizes: Sequence[Size]) -> Size:
    """`1 - x * x`, one primitive since JAX 0.11: as the difference of a constant and a square."""
    if interp.exact:
        return ONE if sizes[0].is_one else UNKNOWN
    return interp.sized(pair, sizes[0].power(2))


def _quotient(interp: Interpreter, pair: Pair, ins: Sequence[Value], sizes: Sequence[Size]) -> Size:
    both = (sizes[0], sizes[1].power(-1))
    return interp.sized(pair, product(both), *both)


def _product(interp: Interpreter, pair: Pair, ins: Sequence[Value], sizes: Sequence[Size]) -> Size:
    return interp.sized(pair, product(sizes), *sizes)


def _cast(pair: Pair, numbers: Sequence[float]) -> float:
    dtype = np.dtype(dtype_of(pair.target.outvars[0]))
    return float(int(numbers[0])) if np.issubdtype(dtype, np.integer) else float(numbers[0])


def _divide(pair: Pair, numbers: Sequence[float]) -> float:
    dtype = np.dtype(dtype_of(pair.target.outvars[0]))
    exact = numbers[0] / numbers[1]
    return float(math.trunc(exact)) if np.issubdtype(dtype, np.integer) else exact


def _fold(function: Callable[..., Any]) -> Callable[[Pair, Sequence[float]], float]:
    return lambda _, numbers: float(function(*numbers))


FOLD: Final[Mapping[str, Callable[[Pair, Sequence[float]], float]]] = {
    "convert_element_type": _cast,
    "div": _divide,
    "integer_pow": lambda pair, numbers: float(numbers[0] ** pair.params["y"]),
    "select_n": lambda _, numbers: numbers[1 + int(numbers[0])],
    **{
        name: _fold(function)
        for name, function in {
            "abs": abs,
            "add": lambda a, b: a + b,
            "add_any": lambda a, b: a + b,
            "and": lambda a, b: int(a) & int(b),
            "ceil": math.ceil,
            "clamp": lambda low, x, high: min(max(low, x), high),
            "copy": lambda a: a,
            "copy_p": lambda a: a,
            "cos": math.cos,
            "eq": lambda a, b: a == b,
            "erf": math.erf,
            "exp": math.exp,
            "exp2": lambda a: 2**a,
            "expm1": math.expm1,
            "floor": math.floor,
            "ge": lambda a, b: a >= b,
            "gt": lambda a, b: a > b,
            "le": lambda a, b: a <= b,
            "log": math.log,
            "log1p": math.log1p,
            "log2": math.log2,
            "logistic": lambda a: 1 / (1 + math.exp(-a)),
            "lt": lambda a, b: a < b,
            "max": max,
            "min": min,
            "mul": lambda a, b: a * b,
            "ne": lambda a, b: a != b,
            "neg": lambda a: -a,
            "nextafter": lambda a, b: math.nextafter(a, b),
            "one_minus_square": lambda a: 1 - a * a,
            "or": lambda a, b: int(a) | int(b),
            "polynomial": lambda x, *coefficients: functools.reduce(
                lambda value, coefficient: value * x + coefficient, reversed(coefficients), 0.0
            ),
            "pow": lambda a, b: a**b,
            "reduce_precision": lambda a: a,
            "reciprocal": lambda a: 1 / a,
            "rem": math.fmod,
            "rsqrt": lambda a: 1 / math.sqrt(a),
            "sign": lambda a: (a > 0) - (a < 0),
            "sin": math.sin,
            "sqrt": math.sqrt,
            "square": lambda a: a * a,
            "stop_gradient": lambda a: a,
            "sub": lambda a, b: a - b,
            "tanh": math.tanh,
        }.items()
    },
}
"""Arithmetic on known numbers, in double precision."""


@dataclasses.dataclass(frozen=True)
class Elementwise:
    """An elementwise primitive.

    Attributes:
        size: the size of the result.
        linear: operands that the result is linear in, with the others fixed.
        logits: whether logits that go in are logits still: linear steps, choices, a soft cap.
    """

    size: SizeRule = _of_order_one
    linear: tuple[int, ...] = ()
    logits: bool = True

    def __call__(self, interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
        """Applies the rule."""
        ((shape, base),) = pair.shapes()
        folded = _folded(pair, ins, shape, base)
        if folded is not None:
            return [folded]
        kind = widest(value.kind for value in ins)
        sizes = [interp.meet(value) if kind == "data" else value.size for value in ins]
        size = self.size(interp, pair, ins, sizes)
        if kind != "data":
            views = [_aligned(view, value, shape, base) for value in ins for view in value.views]
            return [Value(shape, base, kind, views=tuple(dict.fromkeys(views)), size=size)]
        pending: list[Pending] = []
        for position, value in enumerate(ins):
            if position not in self.linear:
                interp.becomes_data(pair, value)
                continue
            pending += _pendings(value, shape, base)
            for view in value.views:
                use = interp.use(pair, view, "lookup" if view.picked else "elementwise", decided=False)
                pending.append(Pending(use, _aligned(view, value, shape, base)))
        out = Value(shape, base, kind, size=size, pending=tuple(pending))
        if self.logits:
            out.products = frozenset[EqnPath]().union(*(value.products for value in ins))
            out.heads = frozenset[str]().union(*(value.heads for value in ins))
        return [out]


def _folded(pair: Pair, ins: Sequence[Value], shape: Shape, base: Shape) -> Value | None:
    function = FOLD.get(pair.name)
    if function is None:
        return None
    numbers = [value.const for value in ins]
    if any(number is None for number in numbers):
        return None
    try:
        both = [function(pair, [number[side] for number in numbers if number]) for side in (0, 1)]
    except (ArithmeticError, ValueError):
        return None
    return constant(both[0], both[1], shape, base)


_IDENTITY: Final = Elementwise(_agree, linear=(0,))

ELEMENTWISE: Final[Mapping[str, Elementwise]] = {
    **dict.fromkeys(
        ["convert_element_type", "neg", "real", "imag", "reduce_precision", "conj"],
        _IDENTITY,
    ),
    "stop_gradient": Elementwise(_agree),
    "bitcast_convert_type": Elementwise(_agree, logits=False),
    "mul": Elementwise(_product, linear=(0, 1)),
    "div": Elementwise(_quotient, linear=(0,)),
    **dict.fromkeys(["add", "add_any", "sub", "clamp"], Elementwise(_agree)),
    **dict.fromkeys(["max", "min", "rem", "nextafter"], Elementwise(_agree, logits=False)),
    "select_n": Elementwise(_chosen),
    "abs": Elementwise(_agree, logits=False),
    "square": Elementwise(_power_of(2), logits=False),
    "sqrt": Elementwise(_power_of(0.5), logits=False),
    "one_minus_square": Elementwise(_one_minus_square, logits=False),
    "reciprocal": Elementwise(_power_of(-1), logits=False),
    "cbrt": Elementwise(_power_of(1 / 3), logits=False),
    "rsqrt": Elementwise(_power_of(-0.5), logits=False),
    "integer_pow": Elementwise(_integer_pow, logits=False),
    "pow": Elementwise(_pow, logits=False),
    **dict.fromkeys(
        ["eq", "ne", "lt", "le", "gt", "ge", "eq_to", "le_to", "lt_to"],
        Elementwise(_comparison, logits=False),
    ),
    **dict.fromkeys(["sign", "is_finite", "atan2"], Elementwise(_always_one, logits=False)),
    **dict.fromkeys(["exp", "exp2"], Elementwise(_exponential, logits=False)),
    "tanh": Elementwise(),
    # Linear in its coefficients, which stand behind the variable.
    "polynomial": Elementwise(linear=tuple(range(1, 256)), logits=False),
    **dict.fromkeys(
        [
            *["acos", "acosh", "and", "asin", "asinh", "atan", "atanh", "bessel_i0e", "bessel_i1e", "ceil"],
            *["clz", "complex", "cos", "cosh", "digamma", "erf", "erf_inv", "erfc", "expm1"],
            *[
                "floor",
                "igamma",
                "igamma_grad_a",
                "igammac",
                "lgamma",
                "log",
                "log1p",
                "log2",
                "logistic",
                "mulhi",
                "not",
                "or",
            ],
            *["polygamma", "population_count", "random_gamma_grad", "regularized_incomplete_beta", "round"],
            *["shift_left", "shift_right_arithmetic", "shift_right_logical", "sin", "sinh", "tan", "xor"],
            *["zeta"],
        ],
        Elementwise(logits=False),
    ),
}


# ---- layout ----------------------------------------------------------------------------------------


def _identity(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> Sequence[Value]:
    """One output per operand, unchanged."""
    return [value.replace() for value in ins]


def _transpose(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    ((shape, base),) = pair.shapes()
    order = pair.params["permutation"]
    return [_moved(interp, pair, ins[0], shape, base, lambda axes: tuple(axes[axis] for axis in order))]


def _reshape(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    ((shape, base),) = pair.shapes()
    order = pair.params["dimensions"]

    def move(axes: tuple[Axis, ...]) -> tuple[Axis, ...] | None:
        return regroup(axes if order is None else [axes[axis] for axis in order], shape, base)

    return [_moved(interp, pair, ins[0], shape, base, move)]


def _broadcast_in_dim(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    ((shape, base),) = pair.shapes()
    source_of = {out: axis for axis, out in enumerate(pair.params["broadcast_dimensions"])}
    old = ins[0].shape

    def move(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
        return tuple(
            axes[source_of[axis]]
            if axis in source_of and old[source_of[axis]] == shape[axis]
            else broadcast_axis(shape[axis], base[axis])
            for axis in range(len(shape))
        )

    return [_moved(interp, pair, ins[0], shape, base, move)]


def _squeeze(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    ((shape, base),) = pair.shapes()
    gone = pair.params["dimensions"]
    return [
        _moved(
            interp, pair, ins[0], shape, base,
            lambda axes: tuple(axis for position, axis in enumerate(axes) if position not in gone),
        )
    ]  # fmt: skip


def _cut(axis: Axis, old: tuple[int, int], new: tuple[int, int]) -> tuple[Axis, frozenset[int]] | None:
    """The factors of an axis after a slice, and those of which one entry is left; None: unknown."""
    if old == new:
        return axis, frozenset()
    if new == (1, 1):
        return (), frozenset(factor.axis for factor in axis if factor.axis is not None)
    if len(axis) <= 1:
        return tuple(Factor(factor.axis, *new) for factor in axis), frozenset()
    size, base = 1, 1
    for position in range(len(axis) - 1, -1, -1):
        size, base = size * axis[position].size, base * axis[position].base
        if (size, base) == new:
            picked = frozenset(factor.axis for factor in axis[:position] if factor.axis is not None)
            return axis[position:], picked
    # A part of the major factor, and all of the others.
    size, base = math.prod(f.size for f in axis[1:]), math.prod(f.base for f in axis[1:])
    if size and base and new[0] % size == 0 and new[1] % base == 0:
        return (Factor(axis[0].axis, new[0] // size, new[1] // base), *axis[1:]), frozenset()
    return None


def _sliced(interp: Interpreter, pair: Pair, value: Value, shape: Shape, base: Shape) -> Value:
    """A slice of each axis; an axis of which one entry is left was picked from by index."""

    def cut(view: View) -> View | None:
        axes: list[Axis] = []
        picked = view.picked
        for axis, *sizes in zip(
            view.axes,
            zip(value.shape, value.base, strict=True),
            zip(shape, base, strict=True),
            strict=True,
        ):
            part = _cut(axis, *sizes)
            if part is None:
                return None
            axes.append(part[0])
            picked |= part[1]
        return dataclasses.replace(view, axes=tuple(axes), picked=picked)

    views = []
    for view in value.views:
        part = cut(view)
        if part is None:
            interp.use(pair, view, "opaque")
        else:
            views.append(part)
    interp.decide(value)
    const = value.const
    return value.replace(shape=shape, base=base, const=const, views=tuple(views), pending=())


def _slice(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    """`slice`, `dynamic_slice`, `split`: parts of the first operand; the others are indices."""
    for index in ins[1:]:
        interp.becomes_data(pair, index)
    return [_sliced(interp, pair, ins[0], shape, base) for shape, base in pair.shapes()]


def _pad(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    interp.becomes_data(pair, ins[1])
    ((shape, base),) = pair.shapes()
    out = _sliced(interp, pair, ins[0], shape, base)
    return [out.replace(size=_agree(interp, pair, ins, [value.size for value in ins]), const=None)]


def _concatenate(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    ((shape, base),) = pair.shapes()
    kind = widest(value.kind for value in ins)
    size = _agree(interp, pair, ins, [interp.meet(v) if kind == "data" else v.size for v in ins])
    if kind == "data":
        for value in ins:
            interp.becomes_data(pair, value)
        return [Value(shape, base, "data", size=size)]
    at = pair.params["dimension"]
    views = tuple(
        dict.fromkeys(_part(view, at, value, shape[at], base[at]) for value in ins for view in value.views)
    )
    return [Value(shape, base, kind, views=views, size=size)]


def _part(view: View, at: int, value: Value, size: int, base: int) -> View:
    """The view of one part of a concatenation, over the whole of the joined axis."""
    old, old_base = value.shape[at], value.base[at]
    axis = view.axes[at]
    if old and old_base and size % old == 0 and base % old_base == 0:
        axis = (*broadcast_axis(size // old, base // old_base), *axis)
    else:
        # Uneven parts: the axis as a whole is the part's, as far as growing is concerned.
        axis = tuple(Factor(factor.axis, size, base) for factor in axis[:1])
    return dataclasses.replace(view, axes=(*view.axes[:at], axis, *view.axes[at + 1 :]))


def _stack(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    """Values laid side by side along a new axis."""
    ((shape, base),) = pair.shapes()
    kind = widest(value.kind for value in ins)
    size = _agree(interp, pair, ins, [interp.meet(v) if kind == "data" else v.size for v in ins])
    if kind == "data":
        for value in ins:
            interp.becomes_data(pair, value)
        return [Value(shape, base, "data", size=size)]
    at = pair.params["axis"]

    def insert(view: View) -> View:
        new = broadcast_axis(shape[at], base[at])
        return dataclasses.replace(view, axes=(*view.axes[:at], new, *view.axes[at:]))

    views = tuple(dict.fromkeys(insert(view) for value in ins for view in value.views))
    return [Value(shape, base, kind, views=views, size=size)]


def _unstack(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    """The entries along an axis, one output each."""
    at = pair.params["axis"]
    value = ins[0]
    outs = []
    for shape, base in pair.shapes():
        one = (*shape[:at], 1, *shape[at:])
        part = _sliced(interp, pair, value, one, (*base[:at], 1, *base[at:]))
        outs.append(_moved(interp, pair, part, shape, base, lambda axes: (*axes[:at], *axes[at + 1 :])))
    return outs


def _tile(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    """Copies laid side by side: an axis that is repeated no longer shows one parameter axis."""
    ((shape, base),) = pair.shapes()
    reps, small = pair.params["reps"], pair.base.params["reps"]

    def move(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
        return tuple(
            axis if (n, m) == (1, 1) else (*broadcast_axis(n, m), *axis)
            for axis, n, m in zip(axes, reps, small, strict=True)
        )

    return [_moved(interp, pair, ins[0], shape, base, move)]


def _iota(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    ((shape, base),) = pair.shapes()
    axis = pair.params["dimension"]
    grows = ratio(base[axis], shape[axis])
    # Entries 0, 1, 2, ... scale about as their number does: near enough for everything but an initialiser.
    return [Value(shape, base, "const", size=UNKNOWN if interp.exact and grows != 1 else Size(grows))]


# ---- reductions ------------------------------------------------------------------------------------


def _reduced(interp: Interpreter, pair: Pair, value: Value, shape: Shape, base: Shape) -> Value:
    """The value without the axes that a reduction removes."""
    gone = pair.params["axes"]

    def statistic(view: View) -> View:
        lost = [f for axis in gone for f in view.axes[axis] if f.axis is not None and f.size > 1]
        grows = any(f.size != f.base for f in lost)
        return dataclasses.replace(
            view, reduced=view.reduced or grows, thinned=view.thinned or (bool(lost) and not grows)
        )

    value = dataclasses.replace(value, views=tuple(statistic(view) for view in value.views))
    return _moved(
        interp, pair, value, shape, base,
        lambda axes: tuple(axis for position, axis in enumerate(axes) if position not in gone),
    )  # fmt: skip


def _reduce(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    """`reduce_max` and the like: axes go away, entries keep their size."""
    interp.decide(ins[0])
    alone = dataclasses.replace(ins[0], pending=())
    return [_reduced(interp, pair, alone, shape, base) for shape, base in pair.shapes()]


def _reduce_sum(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    """A sum over axes; over the axes of a parameter that was multiplied in, it is a contraction."""
    value, gone = ins[0], pair.params["axes"]
    ((shape, base),) = pair.shapes()
    base_size, size = value.sizes(gone)
    if value.const is not None:
        if all(isinstance(value.shape[axis], int) for axis in gone):
            return [constant(value.const[0] * base_size, value.const[1] * size, shape, base)]
        value = dataclasses.replace(value, const=None)
    # A row that was looked up and is summed whole is an embedding that is pooled, and no kernel.
    pooled = tuple(p for p in value.pending if p.view.picked and not _leaves_axes(p.view, gone))
    interp.decide(dataclasses.replace(value, pending=pooled))
    value = dataclasses.replace(value, pending=tuple(p for p in value.pending if p not in pooled))
    kernels = (
        frozenset(p.view.path for p in value.pending) if interp.contract_later(pair, value, gone) else None
    )
    # A use that this sum contracts is settled by it; one that it leaves alone stays linear in the result.
    left = tuple(
        p for p in value.pending
        if not any(f.axis is not None for axis in gone for f in p.view.axes[axis])
    )  # fmt: skip
    out = _reduced(interp, pair, dataclasses.replace(value, pending=left), shape, base)
    if kernels is not None:
        out.heads = kernels
        if pair.site in interp.known_sums:
            # Over the parameter's own axes: of order one by its rule, as any product with it.
            base_size, size = value.sizes(axis for axis in gone if not _shows_parameter(value, axis))
    return [out.replace(size=interp.sized(pair, value.size.over(ratio(base_size, size)), value.size))]


def _shows_parameter(value: Value, axis: int) -> bool:
    return any(factor.axis is not None for p in value.pending for factor in p.view.axes[axis])


# ---- products --------------------------------------------------------------------------------------


def _leaves_width(value: Value, gone: Sequence[int]) -> bool:
    """Whether a function of parameters keeps an axis that grows with width when `gone` is contracted."""
    return any(
        factor.axis is not None and factor.size != factor.base
        for view in value.views
        for position, axis in enumerate(view.axes)
        if position not in gone
        for factor in axis
    )


def _is_broadcast(value: Value) -> bool:
    """Whether a function of parameters was repeated along an axis that is not theirs."""
    return any(factor.axis is None for view in value.views for axis in view.axes for factor in axis)


def _grows(view: View) -> bool:
    """Whether the parameter has an axis that grows, as far as the view shows it."""
    return any(f.axis is not None and f.size != f.base for axis in view.axes for f in axis)


def _leaves_axes(view: View, gone: Sequence[int]) -> bool:
    return any(
        factor.axis is not None and (factor.size, factor.base) != (1, 1)
        for position, axis in enumerate(view.axes)
        if position not in gone
        for factor in axis
    )


def _size_of_product(
    interp: Interpreter, pair: Pair, left: Value, right: Value, contracted: tuple[int, int]
) -> Size:
    """Size of a contraction: coherent between activations, of order one with a parameter by its rule."""
    sizes = [interp.meet(left), interp.meet(right)]
    grows = ratio(*contracted)
    kinds = {left.kind, right.kind}
    if kinds == {"param"}:
        # Of the prescribed size if both are.
        return interp.sized(pair, product(sizes))
    if "param" in kinds:
        if left.state or right.state:
            return UNKNOWN
        # Put right what can be before the product, so that each layer's own entries keep their size.
        settled = [
            interp.settle(pair.place, value, report=False) if value.kind == "data" else size
            for value, size in zip((left, right), sizes, strict=True)
        ]
        return interp.sized(pair, product(settled), *settled)
    if grows == 1.0:
        return interp.sized(pair, product(sizes), *sizes)
    if interp.exact:
        return UNKNOWN
    # A constant that is not one number (a mask, a rotation) is taken to keep sizes.
    fixed = any(value.kind == "const" and value.const is None for value in (left, right))
    if fixed:
        return interp.sized(pair, product(sizes), *sizes)
    return interp.sized(pair, product(sizes).over(grows))


@dataclasses.dataclass(frozen=True)
class _Side:
    """One operand of a product with its contracted and batch axes."""

    value: Value
    contract: Sequence[int]
    batch: Sequence[int]

    @property
    def gone(self) -> tuple[int, ...]:
        return (*self.contract, *self.batch)


def _multiply(
    interp: Interpreter, pair: Pair, left: _Side, right: _Side, place: Callable[[View, bool], View]
) -> list[Value]:
    """The product of two values over some axes: who is the weight, who is the activation.

    Args:
        interp: the interpreter, for its log.
        pair: the equation.
        left: the first operand.
        right: the second operand.
        place: a view of an operand (and whether it is the first) as a view of the result.
    """
    ((shape, base),) = pair.shapes()
    contracted = left.value.sizes(left.contract)
    wide = contracted[0] != contracted[1]
    data = Value(
        shape, base, "data", size=_size_of_product(interp, pair, left.value, right.value, contracted)
    )

    def weight(side: _Side, other: _Side) -> Value:
        kind = "statistic" if other.value.state else "contraction"
        for view in side.value.views:
            interp.use(
                pair, view, kind,
                fan_in=side.contract, stack=side.batch, picked="stack", contracted=contracted,
            )  # fmt: skip
        interp.decide(side.value)
        return dataclasses.replace(data, heads=_kernels(side.value, side.contract))

    def activation(side: _Side) -> None:
        interp.becomes_data(pair, side.value)

    kinds = (left.value.kind, right.value.kind)
    interp.activations[pair.site] = 1 if kinds[0] == "param" else 0
    if kinds == ("const", "const"):
        return [dataclasses.replace(data, kind="const")]
    if "param" not in kinds:
        kernels = {_settle(interp, pair, side) for side in (left, right)} - {None}
        if "computed" in kernels:
            return [dataclasses.replace(data, size=UNKNOWN)]
        if kernels:
            # An expert's kernel that was looked up: of order one by its rule, as any kernel's product.
            sizes = [interp.meet(left.value), interp.meet(right.value)]
            return [dataclasses.replace(data, size=interp.sized(pair, product(sizes), *sizes))]
        if "const" in kinds or not left.contract:
            return [data]
        interp.product(pair, contracted, left.value)
        return [dataclasses.replace(data, products=frozenset({pair.site}))]
    if kinds != ("param", "param"):
        side, other = (left, right) if kinds[0] == "param" else (right, left)
        activation(other)
        return [weight(side, other)]
    # Two functions of parameters. Over an infinite axis, the one that leaves finite axes only is a set of
    # learned vectors (latent queries, a class token) and plays the activation.
    if wide:
        broad = [_leaves_width(side.value, side.gone) for side in (left, right)]
        if broad != [True, True]:
            # Of two sets of vectors either may be called the input and the other the readout: Table 8
            # treats the two alike, and their product gets the readout's factor.
            matrix, vectors = (left, right) if broad[0] or _is_broadcast(right.value) else (right, left)
            activation(vectors)
            return [weight(matrix, vectors)]
    views = []
    for side, first in ((left, True), (right, False)):
        for view in side.value.views:
            inner = {f.axis for axis in side.contract for f in view.axes[axis] if f.axis is not None}
            views.append(dataclasses.replace(place(view, first), inner=view.inner | inner))
    return [dataclasses.replace(data, kind="param", views=tuple(views))]


def _kernels(value: Value, contract: Sequence[int]) -> frozenset[str]:
    """The parameters in a function of parameters whose own axes are contracted."""
    return frozenset(
        view.path
        for view in value.views
        if any(factor.axis is not None for axis in contract for factor in view.axes[axis])
    )


def _settle(interp: Interpreter, pair: Pair, side: _Side) -> Literal["picked", "computed"] | None:
    """Settles the undecided uses in an operand: an expert's kernel was looked up, or an embedding was.

    Returns:
        Whether the operand is a kernel: one that was looked up, or one that was computed from data too.
    """
    kernel = None
    for pending in side.value.pending:
        alone = dataclasses.replace(side.value, pending=(pending,))
        if not _grows(pending.view):
            interp.decide(alone)
        elif _leaves_axes(pending.view, side.gone) and interp.contract_later(pair, alone, side.contract):
            interp.is_kernel(pending.use)
            kernel = kernel or "picked"
            if not (pending.view.picked or interp.exact):
                kernel = "computed"
                interp.find(
                    "computed kernel",
                    pair.site,
                    pair.place,
                    f"{pending.view.path} is multiplied with values computed from data or state before it is "
                    "a kernel here, so how the kernel scales is not known; check its size by hand at two "
                    "widths",
                )
        else:
            interp.decide(alone)
    return kernel


def _dot_general(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    (contract_l, contract_r), (batch_l, batch_r) = pair.params["dimension_numbers"]
    return _general_product(
        interp, pair, _Side(ins[0], contract_l, batch_l), _Side(ins[1], contract_r, batch_r)
    )


def _ragged_dot_general(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    """Rows in groups, each with a kernel of its own: the groups are copies, as the batch of a product is."""
    dims = pair.params["ragged_dot_dimension_numbers"]
    (contract_l, contract_r), (batch_l, batch_r) = dims.dot_dimension_numbers
    if set(dims.lhs_ragged_dimensions) & {*contract_l, *batch_l}:
        # Groups along what is contracted: what the gradient of a kernel needs.
        return interp.unknown(pair, ins)
    interp.becomes_data(pair, ins[2])
    groups = (*batch_r, *dims.rhs_group_dimensions)
    return _general_product(
        interp, pair, _Side(ins[0], contract_l, batch_l), _Side(ins[1], contract_r, groups)
    )


def _general_product(interp: Interpreter, pair: Pair, left: _Side, right: _Side) -> list[Value]:
    """A product whose axes are the batch axes, then the left's others, then the right's."""
    free_l, free_r = (
        [axis for axis in range(side.value.ndim) if axis not in side.gone] for side in (left, right)
    )

    def place(view: View, first: bool) -> View:
        other = (right if first else left).value
        mine, theirs = (free_l, free_r) if first else (free_r, free_l)
        blank = [broadcast_axis(other.shape[axis], other.base[axis]) for axis in theirs]
        kept = [view.axes[axis] for axis in mine]
        lead = [view.axes[axis] for axis in (left if first else right).batch]
        return dataclasses.replace(view, axes=tuple(lead + (kept + blank if first else blank + kept)))

    return _multiply(interp, pair, left, right, place)


def _conv(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    """A convolution: input features and spatial axes of the kernel are its fan-in.

    A batching rule lays the copies of a vmapped kernel along its output features; there they are one
    factor of the axis, as many as the convolution has groups.
    """
    dims = pair.params["dimension_numbers"]
    groups = max(pair.params["feature_group_count"], pair.params["batch_group_count"])
    lhs, rhs = ins
    out_axis, in_axis, *space = dims.rhs_spec
    ((shape, base),) = pair.shapes()
    contracted = rhs.sizes((in_axis, *space))
    interp.activations[pair.site] = 0
    data = Value(shape, base, "data", size=_size_of_product(interp, pair, lhs, rhs, contracted))
    if rhs.kind == "param":
        for view in rhs.views:
            axis = view.axes[out_axis]
            copies = (
                frozenset({axis[0].axis})
                if len(axis) > 1 and axis[0].axis is not None and axis[0].size == groups
                else frozenset[int]()
            )
            if copies:
                axes = tuple(axis[1:] if n == out_axis else a for n, a in enumerate(view.axes))
                view = dataclasses.replace(view, axes=axes, stack=view.stack | copies)
            interp.use(pair, view, "contraction", fan_in=(in_axis, *space), contracted=contracted)
        interp.becomes_data(pair, lhs)
    else:
        for value in ins:
            interp.becomes_data(pair, value)
        if lhs.kind == rhs.kind == "data":
            interp.product(pair, contracted, lhs)
    return [dataclasses.replace(data, heads=_kernels(rhs, (in_axis, *space)))]


# ---- lookups ---------------------------------------------------------------------------------------


def _gather(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    """Rows looked up by index. The result is data: which row is chosen depends on it."""
    operand, indices = ins
    interp.becomes_data(pair, indices)
    interp.decide(operand)
    dims = pair.params["dimension_numbers"]
    sizes, small = pair.params["slice_sizes"], pair.base.params["slice_sizes"]
    ((shape, base),) = pair.shapes()
    kind = widest(value.kind for value in ins)
    brought = operand.size if kind == "const" else interp.meet(operand)
    data = Value(shape, base, kind, size=interp.sized(pair, brought, brought), products=operand.products)
    if operand.kind != "param":
        return [data]
    batching = (*dims.operand_batching_dims,)
    window = [
        axis for axis in range(operand.ndim) if axis not in dims.collapsed_slice_dims and axis not in batching
    ]
    place = dict(zip(window, dims.offset_dims, strict=True))
    pending = []
    for view in operand.views:
        axes: list[Axis] = [broadcast_axis(s, b) for s, b in zip(shape, base, strict=True)]
        picked, stack = view.picked, view.stack
        for axis, factors in enumerate(view.axes):
            mine = frozenset(factor.axis for factor in factors if factor.axis is not None)
            full = (sizes[axis], small[axis]) == (operand.shape[axis], operand.base[axis])
            if axis in batching:
                stack |= mine
            elif full and axis in place:
                axes[place[axis]] = factors
            else:
                if any(f.size != f.base for f in factors if f.axis is not None):
                    raise ShapeMismatchError(
                        f"{view.path}: axis {axis} is looked up by index at {where(pair.place)}, so "
                        "its "
                        f"size is a vocabulary and not a width; expected {operand.base[axis]} as in the "
                        "base, "
                        f"got {operand.shape[axis]}. Give base and target the same size there."
                    )
                picked |= mine
        looked_up = dataclasses.replace(view, axes=tuple(axes), picked=picked, stack=stack)
        use = interp.use(pair, looked_up, "lookup", decided=False)
        pending.append(Pending(use, looked_up))
    return [dataclasses.replace(data, kind="data", pending=tuple(pending))]


# ---- the rest --------------------------------------------------------------------------------------


def _data(size: SizeRule, interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    """A primitive that rearranges or summarises data: a parameter in it is opaque."""
    for value in ins:
        interp.opaque(pair, value)
    kind = "const" if all(value.kind == "const" for value in ins) else "data"
    found = size(interp, pair, ins, [value.size if kind == "const" else interp.meet(value) for value in ins])
    return [Value(shape, base, kind, size=found) for shape, base in pair.shapes()]


def _cumulative(interp: Interpreter, pair: Pair, ins: Sequence[Value], sizes: Sequence[Size]) -> Size:
    """A running sum: along an axis that grows its entries have no common size."""
    axis = pair.params.get("axis")
    grows = axis is None or ins[0].shape[axis] != ins[0].base[axis]
    return UNKNOWN if grows else interp.sized(pair, sizes[0], sizes[0])


def _fft(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    """A sum over the transformed axes with weights of order one: like any, it must not be over width."""
    ((shape, base),) = pair.shapes()
    value, first = ins[0], len(shape) - len(pair.params["fft_lengths"])
    if value.shape[first:] != value.base[first:]:
        return interp.unknown(pair, ins)

    def move(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
        return (*axes[:first], *map(broadcast_axis, shape[first:], base[first:]))

    return [_moved(interp, pair, value, shape, base, move)]


def _write(values: Callable[[Sequence[Value]], Sequence[Value]]) -> Rule:
    """Values written into an array by index: a cache, a one-hot."""

    def rule(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
        for value in ins:
            interp.becomes_data(pair, value)
        ((shape, base),) = pair.shapes()
        kind = "const" if all(value.kind == "const" for value in ins) else "data"
        written = values(ins)
        return [
            Value(shape, base, kind, size=_agree(interp, pair, written, [interp.meet(v) for v in written]))
        ]

    return rule


def _qr(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    """The columns of Q have unit norm: its entries are of the size of 1/sqrt(rows)."""
    interp.opaque(pair, ins[0])
    rows = Size(ratio(ins[0].base[-2], ins[0].shape[-2])).power(-0.5)
    sizes = [interp.sized(pair, rows), UNKNOWN, UNKNOWN, UNKNOWN]
    return [
        Value(shape, base, "data", size=size)
        for (shape, base), size in zip(pair.shapes(), sizes[: len(pair.shapes())], strict=True)
    ]


def _collective(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> Sequence[Value]:
    """Communication between devices: the same axes, of a shard or of the whole."""
    shapes = pair.shapes()
    if len(ins) != len(shapes) or any(v.ndim != len(s) for v, (s, _) in zip(ins, shapes, strict=True)):
        return interp.unknown(pair, ins)
    return [resized(value.replace(), *shape) for value, shape in zip(ins, shapes, strict=True)]


def _random(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    """Random bits, keys: of the same distribution at every width."""
    for value in ins:
        interp.becomes_data(pair, value)
    return [Value(shape, base, "data") for shape, base in pair.shapes()]


PRIMITIVES: Final[dict[str, Rule]] = {
    **ELEMENTWISE,
    **dict.fromkeys(IDENTITIES, _identity),
    **dict.fromkeys(
        [
            *["psum", "psum_invariant", "pmax", "pmin", "ppermute", "pbroadcast", "all_to_all", "all_gather"],
            *["all_gather_invariant", "all_gather_reduced", "reduce_scatter", "pbroadcast_dynamic"],
            *["unreduced_psum", "unreduced_pmax", "unreduced_pmin", "unreduced_reduce_scatter"],
        ],
        _collective,
    ),
    "axis_index": _random,
    "transpose": _transpose,
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast_in_dim,
    "squeeze": _squeeze,
    "expand_dims": _broadcast_in_dim,
    "rev": _identity,
    "slice": _slice,
    "dynamic_slice": _slice,
    "split": _slice,
    "pad": _pad,
    "concatenate": _concatenate,
    "stack": _stack,
    "unstack": _unstack,
    "tile": _tile,
    "iota": _iota,
    "reduce_sum": _reduce_sum,
    **dict.fromkeys(["reduce_max", "reduce_min"], _reduce),
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot_general,
    "conv_general_dilated": _conv,
    "gather": _gather,
    **dict.fromkeys(
        [
            *["scatter", "scatter_add", "scatter_sub", "scatter_mul", "scatter_min", "scatter_max"],
            *["scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max"],
        ],
        _write(lambda ins: (ins[0], ins[-1])),
    ),
    "dynamic_update_slice": _write(lambda ins: ins[:2]),
    **dict.fromkeys(
        [
            *["sort", "cummax", "cummin", "reduce_window_max", "reduce_window_min", "top_k", "approx_top_k"],
            *["select_and_gather_add", "select_and_scatter_add"],
        ],
        functools.partial(_data, _agree),
    ),
    **dict.fromkeys(
        [
            *["argmax", "argmin", "reduce_and", "reduce_or", "reduce_xor", "reduce_prod", "cumprod"],
            # With any function of the user's, and of any parameters.
            *["reduce", "reduce_window", "random_gamma"],
        ],
        functools.partial(_data, _of_order_one),
    ),
    **dict.fromkeys(["cumsum", "reduce_window_sum", "cumlogsumexp"], functools.partial(_data, _cumulative)),
    "fft": _fft,
    "qr": _qr,
    **dict.fromkeys(
        [
            *["random_bits", "random_seed", "random_wrap", "random_unwrap", "random_fold_in", "random_split"],
            *["random_clone", "threefry2x32", "rng_bit_generator", "rng_uniform"],
        ],
        _random,
    ),
}
"""The rule of each primitive that is known."""
