"""How activations may fall with width at initialisation, because something before them does.

A readout inside the model, as into the latents of an autoencoder, is a sum of independent terms over the
width, divided by its length: it falls as one over the root of the width until it has learned, and what is
computed from it falls with it. So may the difference of two values that are equal but for what falls, such
as two softmaxes of attention logits, each multiplied with the same values.

References:
    Yang et al., Tensor Programs V, arXiv 2203.03466, Appendix D.1.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Final, NamedTuple

from mujax.core.program import LAYOUT, PRODUCTS, EqnPath, JaxprEqn, shape_of
from mujax.core.trace import Analysis, Operand

# Analytic at zero, with a value that is no zero: but for a constant, they fall with their argument.
_CONSTANT_AT_ZERO: Final = frozenset({"exp", "exp2", "logistic", "cos", "cosh", "erfc"})
# With others whose value there is no zero, and what is no activation: they don't fall with their argument.
_STAY: Final = _CONSTANT_AT_ZERO | frozenset(
    {"log", "acos", "acosh", "sign", "gt", "ge", "lt", "le", "eq", "ne", "argmax", "argmin", "is_finite"}
    | {"lgamma", "digamma", "igamma", "igammac"}
)
_POWERS: Final = {"square": 2.0, "sqrt": 0.5, "rsqrt": -0.5, "cbrt": 1 / 3}
# A constant as small as the epsilon of a norm is no term of its own.
_SMALL: Final = 1e-2


class _Limit(NamedTuple):
    """What a value tends to as what falls vanishes.

    Attributes:
        factors: the values that it is a multiple of, by the equations that make them; none for a constant.
        rest: the power of the width that the rest falls by beside it.
    """

    factors: frozenset[EqnPath | None]
    rest: float


def initial_exponents(analysis: Analysis, sums: Collection[EqnPath]) -> Mapping[EqnPath, float]:
    """The power of the width that each value may scale by at initialisation; 0 where that is nothing.

    Args:
        analysis: of the program.
        sums: the products that are sums of independent terms over a growing axis, divided by its length.
    """
    found: dict[EqnPath, float] = {}
    limits: dict[EqnPath | None, _Limit] = {}
    for site, visit in analysis.flow.visits.items():
        data = [operand.origin for operand in visit.operands if operand.kind == "data"]
        if visit.kind != "data" or not data:
            continue
        of_data = [0.0 if origin is None else found.get(origin, 0.0) for origin in data]
        if visit.eqn is None:
            value = max(of_data)
        else:
            value = _of_result(visit.eqn, visit.operands, of_data)
            limit = _limit(visit.eqn, visit.operands, of_data, limits)
            if limit is not None:
                limits[site] = limit
                if visit.eqn.primitive.name == "sub":
                    value += limit.rest
        found[site] = value - 0.5 * (site in sums)
    return found


def _limit(
    eqn: JaxprEqn,
    operands: Sequence[Operand],
    of_data: Sequence[float],
    limits: Mapping[EqnPath | None, _Limit],
) -> _Limit | None:
    """What a result tends to; None where nothing is known, and for what falls itself."""
    name = eqn.primitive.name
    if name in _CONSTANT_AT_ZERO:
        return _Limit(frozenset(), of_data[0]) if of_data[0] < 0 else None
    data = [
        (operand.origin, limits.get(operand.origin), math.prod(shape_of(atom)))
        for operand, atom in zip(operands, eqn.invars, strict=True)
        if operand.kind == "data"
    ]
    known = [limit for _, limit, _ in data if limit is not None]
    if not known:
        return None
    rest = max(limit.rest for limit in known)
    factors = frozenset[EqnPath | None]().union(*(limit.factors for limit in known))
    if name in PRODUCTS or name == "mul" or (name == "div" and operands[1].kind != "data"):
        # A number changes nothing in what a value is a multiple of.
        others = {origin for origin, limit, size in data if limit is None and size > 1}
        return _Limit(factors | others, rest)
    is_whole = len(known) == len(data)
    if name in LAYOUT or name == "neg":
        return known[0]
    if (name == "reduce_sum" and not factors) or (name == "div" and is_whole and not known[-1].factors):
        return _Limit(factors, rest)
    is_alike = len({limit.factors for limit in known}) == 1
    if name in ("add", "sub") and is_whole and len(operands) == len(data) and is_alike:
        return _Limit(factors, rest)
    return None


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
