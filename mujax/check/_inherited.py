"""How activations may fall with width at initialisation, because something before them does.

A readout inside the model, as into the latents of an autoencoder, is a sum of independent terms over the
width, divided by its length: it falls as one over the root of the width until it has learned, and what is
computed from it falls with it.

References:
    Yang et al., Tensor Programs V, arXiv 2203.03466, Appendix D.1.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final

from mujax.core.program import PRODUCTS, EqnPath, JaxprEqn
from mujax.core.trace import Analysis, Operand

# Functions whose value at zero is no zero, and what is no activation: they don't fall with their argument.
_STAY: Final = frozenset(
    {"exp", "exp2", "logistic", "cos", "cosh", "erfc", "log", "acos", "acosh", "sign", "gt", "ge", "lt", "le"}
    | {"eq", "ne", "argmax", "argmin", "is_finite", "lgamma", "digamma", "igamma", "igammac"}
)
_POWERS: Final = {"square": 2.0, "sqrt": 0.5, "rsqrt": -0.5, "cbrt": 1 / 3}
# A constant as small as the epsilon of a norm is no term of its own.
_SMALL: Final = 1e-2


def initial_exponents(analysis: Analysis, sums: Collection[EqnPath]) -> Mapping[EqnPath, float]:
    """The power of the width that each value may scale by at initialisation; 0 where that is nothing.

    Args:
        analysis: of the program.
        sums: the products that are sums of independent terms over a growing axis, divided by its length.
    """
    found: dict[EqnPath, float] = {}
    for site, visit in analysis.flow.visits.items():
        of_data = [
            0.0 if operand.origin is None else found.get(operand.origin, 0.0)
            for operand in visit.operands
            if operand.kind == "data"
        ]
        if visit.kind == "data" and of_data:
            value = max(of_data) if visit.eqn is None else _of_result(visit.eqn, visit.operands, of_data)
            found[site] = value - 0.5 * (site in sums)
    return found


def _of_result(eqn: JaxprEqn, operands: Sequence[Operand], of_data: Sequence[float]) -> float:
    name = eqn.primitive.name
    if name in _STAY:
        return 0.0
    if name in _POWERS:
        return of_data[0] * _POWERS[name]
    if name == "integer_pow":
        return of_data[0] * eqn.params["y"]
    if name == "mul" or name in PRODUCTS:
        return sum(of_data)
    if name == "div":
        first, *rest = of_data
        return first - sum(rest) if operands[0].kind == "data" else -first
    if name in ("add", "sub") and any(abs(one.number or 0.0) > _SMALL for one in operands):
        return max(0.0, *of_data)
    if name == "select_n":
        of_data = of_data[operands[0].kind == "data" :] or of_data
    return max(of_data)
