"""Readouts whose product is divided by a norm of its own.

The product of an output weight starts at a size of 1/sqrt(width) and becomes of order one as it learns: its
terms are independent at first and add up later (Tensor Programs V, Appendix J). A norm brings it to order one
from the start, so that the first steps change the normed value in proportion to sqrt(width).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from mujax.core.trace._interpreter import Interpreter
from mujax.core.trace._uses import Pair
from mujax.core.trace._values import Power, Value


def power_of_readout(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> Power | None:
    """The power of a readout's product that an elementwise result is, where it is one.

    Division by a function of the same product, of the same degree, is reported.
    """
    if not any(value.power for value in ins):
        return None
    rule = _RULES.get(pair.name)
    out = rule(pair, ins) if rule else None
    if out is not None and out.exponent == 0:
        _report(interp, pair, out.path)
        return None
    return out


def _report(interp: Interpreter, pair: Pair, path: str) -> None:
    if interp.scales_are_known:
        interp.find(
            "normalised readout",
            pair.site,
            pair.place,
            f"the product of {path}, which sums over an axis that grows and leaves none that does, is "
            "divided here by a norm of its own or of a layer on it: it starts at a size of 1/sqrt(width) and "
            "learns one of order one, so the first steps change the normed value in proportion to "
            "sqrt(width); put the norm in front of the layer or leave it out, or let the layer's outputs "
            "grow with width",
        )


def _product(sign: int) -> Callable[[Pair, Sequence[Value]], Power | None]:
    def rule(pair: Pair, ins: Sequence[Value]) -> Power | None:
        left, right = (value.power for value in ins)
        if left is None or right is None:
            return left or (right and right._replace(exponent=sign * right.exponent))
        if left.path != right.path:
            return None
        return left._replace(exponent=left.exponent + sign * right.exponent)

    return rule


def _terms(pair: Pair, ins: Sequence[Value]) -> Power | None:
    """A sum or a choice: one power in all terms but numbers (an epsilon) and parameters (a bias)."""
    first = 1 if pair.name == "select_n" else 0
    powers = {value.power for value in ins[first:] if value.kind == "data"}
    return powers.pop() if len(powers) == 1 else None


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
    **dict.fromkeys(["add", "add_any", "sub", "max", "min", "select_n", "clamp"], _terms),
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
