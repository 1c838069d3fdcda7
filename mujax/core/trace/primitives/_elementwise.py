"""Elementwise primitives: what they do to sizes, and what they are linear in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from mujax.core.program import EqnPath
from mujax.core.trace._interpreter import Interpreter
from mujax.core.trace._uses import Pair
from mujax.core.trace._values import (
    ONE,
    UNKNOWN,
    Pending,
    Size,
    Value,
    common,
    product,
    widest,
)
from mujax.core.trace.primitives._fold import fold_constants
from mujax.core.trace.primitives._moves import broadcast_pending, broadcast_view

SizeRule = Callable[[Interpreter, Pair, Sequence[Value], Sequence[Size]], Size]
"""Size of a result from the operands and the sizes that they bring."""


def common_size(interp: Interpreter, pair: Pair, ins: Sequence[Value], sizes: Sequence[Size]) -> Size:
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


def order_one(interp: Interpreter, pair: Pair, ins: Sequence[Value], sizes: Sequence[Size]) -> Size:
    """A nonlinear function: its arguments must be of one size at every width."""
    if interp.exact:
        return ONE if all(size.is_one for size in sizes) else UNKNOWN
    for value in ins:
        interp.settle(pair.place, value)
    return ONE


def _exponential(interp: Interpreter, pair: Pair, ins: Sequence[Value], sizes: Sequence[Size]) -> Size:
    interp.logits(ins[0])
    return order_one(interp, pair, ins, sizes)


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
    return common_size(interp, pair, ins[1:], sizes[1:])


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
    return order_one(interp, pair, ins, sizes)


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


@dataclasses.dataclass(frozen=True)
class Elementwise:
    """An elementwise primitive.

    Attributes:
        size: the size of the result.
        linear: operands that the result is linear in, with the others fixed.
        logits: whether logits that go in are logits still: linear steps, choices, a soft cap.
    """

    size: SizeRule = order_one
    linear: tuple[int, ...] = ()
    logits: bool = True

    def __call__(self, interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
        """Applies the rule."""
        ((shape, base),) = pair.shapes()
        folded = fold_constants(pair, ins, shape, base)
        if folded is not None:
            return [folded]
        kind = widest(value.kind for value in ins)
        sizes = [interp.meet(value) if kind == "data" else value.size for value in ins]
        size = self.size(interp, pair, ins, sizes)
        if kind != "data":
            views = [broadcast_view(view, value, shape, base) for value in ins for view in value.views]
            return [Value(shape, base, kind, views=tuple(dict.fromkeys(views)), size=size)]
        pending: list[Pending] = []
        for position, value in enumerate(ins):
            if position not in self.linear:
                interp.becomes_data(pair, value)
                continue
            pending += broadcast_pending(value, shape, base)
            for view in value.views:
                use = interp.use(pair, view, "lookup" if view.picked else "elementwise", decided=False)
                pending.append(Pending(use, broadcast_view(view, value, shape, base)))
        out = Value(shape, base, kind, size=size, pending=tuple(pending))
        if self.logits:
            out.products = frozenset[EqnPath]().union(*(value.products for value in ins))
            out.heads = frozenset[str]().union(*(value.heads for value in ins))
        return [out]


_IDENTITY: Final = Elementwise(common_size, linear=(0,))


ELEMENTWISE: Final[Mapping[str, Elementwise]] = {
    **dict.fromkeys(
        ["convert_element_type", "neg", "real", "imag", "reduce_precision", "conj"],
        _IDENTITY,
    ),
    "stop_gradient": Elementwise(common_size),
    "bitcast_convert_type": Elementwise(common_size, logits=False),
    "mul": Elementwise(_product, linear=(0, 1)),
    "div": Elementwise(_quotient, linear=(0,)),
    **dict.fromkeys(["add", "add_any", "sub", "clamp"], Elementwise(common_size)),
    **dict.fromkeys(["max", "min", "rem", "nextafter"], Elementwise(common_size, logits=False)),
    "select_n": Elementwise(_chosen),
    "abs": Elementwise(common_size, logits=False),
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
