"""Products that start small in a wide model and are divided by a norm of their own.

The product of an output weight, or of queries and keys, starts at a size of 1/sqrt(width) and becomes of
order one as it learns: its terms are independent at first and add up later (Tensor Programs V, Appendix J). A
norm brings it to order one from the start, so that the first steps change the normed value in proportion to
sqrt(width).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from mujax.core.program import LAYOUT, LINEAR_AT_ZERO, PRODUCTS, EqnPath
from mujax.core.trace._interpreter import Interpreter
from mujax.core.trace._uses import Pair
from mujax.core.trace._values import NORMALISED_READOUT, Power, Value

# The largest number that counts as a norm's epsilon.
_EPSILON: Final = 0.01


def readout(path: str) -> Power:
    """The product of a readout."""
    return Power(f"the product of {path}, which sums over an axis that grows and leaves none that does,", 1.0)


def power_of_product(
    interp: Interpreter, pair: Pair, left: Value, right: Value, *, wide: bool
) -> Power | None:
    """The power of a product of two activations: that of one of them, or of its own.

    Args:
        interp: the interpreter.
        pair: the equation.
        left: the first operand.
        right: the second operand.
        wide: whether it sums over an axis that grows.
    """
    if left.power is not None or right.power is not None:
        return _product(1)(pair, (left, right))
    apart = left.linear_in and right.linear_in and not left.linear_in & right.linear_in
    if wide and apart and all(_has_signs(interp, value.origin) for value in (left, right)):
        both = f"the product of {min(left.linear_in)} with that of {min(right.linear_in)}"
        return Power(f"{both}, which sums over an axis that grows,", 1.0)
    return None


def _has_signs(interp: Interpreter, site: EqnPath | None) -> bool:
    """Whether a value has the signs of a kernel's product, and no function has cut them off."""
    visits = interp.record.flow.visits

    # Kept, since values that are used often are reached in many ways.
    @functools.cache
    def signs(site: EqnPath | None) -> bool:
        visit = None if site is None else visits.get(site)
        eqn = None if visit is None else visit.eqn
        if visit is None or eqn is None:
            return False
        name, operands = eqn.primitive.name, [one for one in visit.operands if one.kind == "data"]
        if name in PRODUCTS:
            return True
        if name in LAYOUT or name in ("neg", "add", "sub"):
            return bool(operands) and all(signs(one.origin) for one in operands)
        if name == "mul" and len({one.origin for one in operands}) == len(operands):
            return any(signs(one.origin) for one in operands)
        return name == "div" and signs(visit.operands[0].origin)

    return signs(site)


def power_of_readout(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> Power | None:
    """The power of such a product that an elementwise result is, where it is one.

    Division by a function of the same product, of the same degree, is reported.
    """
    if not any(value.power for value in ins):
        return None
    rule = _RULES.get(pair.name)
    out = rule(pair, ins) if rule else None
    if out is not None and out.exponent == 0:
        _report(interp, pair, out.product)
        return None
    return out


def _report(interp: Interpreter, pair: Pair, product: str) -> None:
    if interp.scales_are_known:
        interp.find(
            NORMALISED_READOUT,
            pair.site,
            pair.place,
            f"{product} is divided here by a norm of its own or of a layer on it: it starts at a size of "
            "1/sqrt(width) and learns one of order one, so the first steps change the normed value in "
            "proportion to sqrt(width); put the norm in front of the layer or leave it out, or let the "
            "layer's outputs grow with width",
        )


def _product(sign: int) -> Callable[[Pair, Sequence[Value]], Power | None]:
    def rule(pair: Pair, ins: Sequence[Value]) -> Power | None:
        left, right = (value.power for value in ins)
        if left is None or right is None:
            return left or (right and right._replace(exponent=sign * right.exponent))
        if left.product != right.product:
            return None
        return left._replace(exponent=left.exponent + sign * right.exponent)

    return rule


def _terms(pair: Pair, ins: Sequence[Value]) -> Power | None:
    """A choice: one power in all alternatives but numbers (a mask) and parameters (a bias)."""
    first = 1 if pair.name == "select_n" else 0
    powers = {value.power for value in ins[first:] if value.kind == "data"}
    return powers.pop() if len(powers) == 1 else None


def _sum(pair: Pair, ins: Sequence[Value]) -> Power | None:
    """A sum: one power in all terms but parameters (a bias) and numbers as small as an epsilon."""
    numbers = [value.const for value in ins if value.kind == "const"]
    if any(number is None or abs(number[1]) > _EPSILON for number in numbers):
        return None
    return _terms(pair, ins)


def _raised(exponent: Callable[[Pair, Sequence[Value]], float | None]):
    def rule(pair: Pair, ins: Sequence[Value]) -> Power | None:
        power, by = ins[0].power, exponent(pair, ins)
        return None if power is None or by is None else power._replace(exponent=power.exponent * by)

    return rule


def _exponent(pair: Pair, ins: Sequence[Value]) -> float | None:
    return None if ins[1].const is None else ins[1].const[1]


_RULES: Final[Mapping[str, Callable[[Pair, Sequence[Value]], Power | None]]] = {
    "mul": _product(1),
    "div": _product(-1),
    **dict.fromkeys(["add", "add_any", "sub"], _sum),
    **dict.fromkeys(["max", "min", "select_n", "clamp"], _terms),
    **dict.fromkeys(
        LINEAR_AT_ZERO,
        lambda pair, ins: power if (power := ins[0].power) and power.exponent > 0 else None,
    ),
    **{
        name: _raised(lambda pair, ins, by=by: by)
        for name, by in {
            **dict.fromkeys(["neg", "abs", "convert_element_type", "stop_gradient", "reduce_precision"], 1.0),
            "square": 2.0,
            "sqrt": 0.5,
            "rsqrt": -0.5,
            "reciprocal": -1.0,
        }.items()
    },
    "integer_pow": _raised(lambda pair, ins: float(pair.params["y"])),
    "pow": _raised(_exponent),
}
