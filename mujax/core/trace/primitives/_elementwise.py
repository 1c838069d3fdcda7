"""Elementwise primitives: what they do to scales, and what they are linear in."""

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
    Scale,
    Value,
    common,
    product,
    widest,
)
from mujax.core.trace.primitives._fold import fold_constants
from mujax.core.trace.primitives._moves import broadcast_pending, broadcast_view

ScaleRule = Callable[[Interpreter, Pair, Sequence[Value], Sequence[Scale]], Scale]
"""Scale of a result from the operands and the scales that they bring."""


def common_scale(interp: Interpreter, pair: Pair, ins: Sequence[Value], scales: Sequence[Scale]) -> Scale:
    """A sum or a choice: terms of one scale, or each is corrected first.

    A constant term (a mask, an epsilon) does not count, except in an initialiser.
    """
    moving = [
        scale for value, scale in zip(ins, scales, strict=True) if interp.exact or value.kind != "const"
    ]
    alike = common(moving or scales)
    if alike is not None:
        return interp.scale_at(pair, alike)
    if interp.exact or any(scale.total is None for scale in moving) or all(v.kind != "data" for v in ins):
        return UNKNOWN
    for value in ins:
        interp.require_order_one(pair.place, value)
    return ONE


def order_one(interp: Interpreter, pair: Pair, ins: Sequence[Value], scales: Sequence[Scale]) -> Scale:
    """A nonlinear function: its arguments must be of one scale at every width."""
    if interp.exact:
        return ONE if all(scale.is_one for scale in scales) else UNKNOWN
    for value in ins:
        interp.require_order_one(pair.place, value)
    return ONE


def _exponential(interp: Interpreter, pair: Pair, ins: Sequence[Value], scales: Sequence[Scale]) -> Scale:
    interp.logits(ins[0])
    return order_one(interp, pair, ins, scales)


def _always_one(interp: Interpreter, pair: Pair, ins: Sequence[Value], scales: Sequence[Scale]) -> Scale:
    return ONE


def _comparison(interp: Interpreter, pair: Pair, ins: Sequence[Value], scales: Sequence[Scale]) -> Scale:
    """Zeros and ones. Their shares are the same at every width if the scale of the entries is."""
    if interp.exact and not all(scale.is_one for scale in scales):
        return UNKNOWN
    return ONE


def _chosen(interp: Interpreter, pair: Pair, ins: Sequence[Value], scales: Sequence[Scale]) -> Scale:
    if interp.exact and not scales[0].is_one:
        return UNKNOWN
    return common_scale(interp, pair, ins[1:], scales[1:])


def _power_of(exponent: float) -> ScaleRule:
    def scale(interp: Interpreter, pair: Pair, ins: Sequence[Value], scales: Sequence[Scale]) -> Scale:
        return interp.scale_at(pair, scales[0].power(exponent))

    return scale


def _integer_pow(interp: Interpreter, pair: Pair, ins: Sequence[Value], scales: Sequence[Scale]) -> Scale:
    return interp.scale_at(pair, scales[0].power(float(pair.params["y"])))


def _pow(interp: Interpreter, pair: Pair, ins: Sequence[Value], scales: Sequence[Scale]) -> Scale:
    exponent = ins[1].const
    if exponent is not None and exponent[0] == exponent[1]:
        return interp.scale_at(pair, scales[0].power(exponent[1]))
    return order_one(interp, pair, ins, scales)


def _one_minus_square(
    interp: Interpreter, pair: Pair, ins: Sequence[Value], scales: Sequence[Scale]
) -> Scale:
    """`1 - x * x`, one primitive since JAX 0.11: as the difference of a constant and a square."""
    if interp.exact:
        return ONE if scales[0].is_one else UNKNOWN
    return interp.scale_at(pair, scales[0].power(2))


def _quotient(interp: Interpreter, pair: Pair, ins: Sequence[Value], scales: Sequence[Scale]) -> Scale:
    both = (scales[0], scales[1].power(-1))
    return interp.scale_at(pair, product(both), *both)


def _product(interp: Interpreter, pair: Pair, ins: Sequence[Value], scales: Sequence[Scale]) -> Scale:
    return interp.scale_at(pair, product(scales), *scales)


@dataclasses.dataclass(frozen=True)
class Elementwise:
    """An elementwise primitive.

    Attributes:
        scale: the scale of the result.
        linear: operands that the result is linear in, with the others fixed.
        logits: whether logits remain logits: linear steps, choices, a soft cap.
    """

    scale: ScaleRule = order_one
    linear: tuple[int, ...] = ()
    logits: bool = True

    def __call__(self, interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
        """Applies the rule."""
        ((shape, base),) = pair.shapes()
        folded = fold_constants(pair, ins, shape, base)
        if folded is not None:
            return [folded]
        kind = widest(value.kind for value in ins)
        scales = [interp.scale_against_prescribed(value) if kind == "data" else value.scale for value in ins]
        scale = self.scale(interp, pair, ins, scales)
        if kind != "data":
            views = [broadcast_view(view, value, shape, base) for value in ins for view in value.views]
            return [Value(shape, base, kind, views=tuple(dict.fromkeys(views)), scale=scale)]
        pending: list[Pending] = []
        for position, value in enumerate(ins):
            if position not in self.linear:
                interp.becomes_data(pair, value)
                continue
            pending += broadcast_pending(value, shape, base)
            for view in value.views:
                use = interp.use(pair, view, "lookup" if view.picked else "elementwise", decided=False)
                pending.append(Pending(use, broadcast_view(view, value, shape, base)))
        out = Value(shape, base, kind, scale=scale, pending=tuple(pending))
        if self.logits:
            out.products = frozenset[EqnPath]().union(*(value.products for value in ins))
            out.linear_in = frozenset[str]().union(*(value.linear_in for value in ins))
        return [out]


_IDENTITY: Final = Elementwise(common_scale, linear=(0,))


ELEMENTWISE: Final[Mapping[str, Elementwise]] = {
    **dict.fromkeys(
        ["convert_element_type", "neg", "real", "imag", "reduce_precision", "conj"],
        _IDENTITY,
    ),
    "stop_gradient": Elementwise(common_scale),
    "bitcast_convert_type": Elementwise(common_scale, logits=False),
    "mul": Elementwise(_product, linear=(0, 1)),
    "div": Elementwise(_quotient, linear=(0,)),
    **dict.fromkeys(["add", "add_any", "sub", "clamp"], Elementwise(common_scale)),
    **dict.fromkeys(["max", "min", "rem", "nextafter"], Elementwise(common_scale, logits=False)),
    "select_n": Elementwise(_chosen),
    "abs": Elementwise(common_scale, logits=False),
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
