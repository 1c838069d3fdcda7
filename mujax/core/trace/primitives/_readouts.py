"""Products that start small in a wide model and are divided by a norm of their own.

The product of an output weight, or of queries and keys, starts at a size of 1/sqrt(width) and becomes of
order one as it learns: its terms are independent at first and add up later (Tensor Programs V, Appendix J). A
norm brings it to order one from the start, so that the first steps change the normed value in proportion to
sqrt(width).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Final

from mujax.core.program import LAYOUT, LINEAR_AT_ZERO, PRODUCTS, RESHAPES, Atom, EqnPath, JaxprEqn, shape_of
from mujax.core.trace._interpreter import Interpreter
from mujax.core.trace._uses import Pair, Visit
from mujax.core.trace._values import NORMALISED_READOUT, Power, Value

# Of each axis, the indices that are taken.
_Ranges = tuple[range, ...]

# The largest number that counts as a norm's epsilon.
EPSILON: Final = 0.01


def readout(path: str) -> Power:
    """The product of a readout."""
    return Power(
        f"the product of {path}, which sums over an axis that grows and leaves none that does,",
        "put the norm in front of the layer or leave it out, or let the layer's outputs grow with width",
        1.0,
    )


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
    if not (wide and left.linear_in and right.linear_in):
        return None
    operands = zip((left, right), pair.target.invars[:2], strict=True)
    ours, theirs = (_signed_parts(interp, value.origin, var) for value, var in operands)
    if ours is None or theirs is None:
        return None
    if left.linear_in & right.linear_in and not all(a.is_apart(b) for a in ours for b in theirs):
        return None
    one, other = min(left.linear_in), min(right.linear_in)
    both = f"the product of {one} with {'another part of it' if one == other else f'that of {other}'}"
    return Power(
        f"{both}, which sums over an axis that grows,",
        "take a softmax of the products, or leave the norm out",
        1.0,
    )


@dataclasses.dataclass(frozen=True)
class _Part:
    """Part of a layer's product.

    Attributes:
        site: the product.
        paths: its kernels.
        cuts: what was taken of it: the value that was cut (`_identity`), and what is left of each axis.
    """

    site: EqnPath
    paths: frozenset[str]
    cuts: frozenset[tuple[Hashable, _Ranges]] = frozenset()

    def is_apart(self, other: _Part) -> bool:
        """Whether they are of different kernels, or no entry of the product is in both: fused projections."""
        if self.site != other.site:
            return not self.paths & other.paths
        return any(
            whole == other_whole and any(map(_are_disjoint, mine, theirs))
            for whole, mine in self.cuts
            for other_whole, theirs in other.cuts
        )


def _are_disjoint(one: range, other: range) -> bool:
    """Whether two ranges of positive steps are seen to have nothing in common."""
    return (
        one.stop <= other.start
        or other.stop <= one.start
        or (one.start - other.start) % math.gcd(one.step, other.step) != 0
    )


def _identity(visits: Mapping[EqnPath, Visit], site: EqnPath | None) -> Hashable:
    """What is equal for equal values: a value's place, but for a reshape what is reshaped, and how."""
    visit = None if site is None else visits.get(site)
    eqn = None if visit is None else visit.eqn
    if visit is None or eqn is None or eqn.primitive.name not in RESHAPES:
        return site
    return eqn.primitive.name, str(eqn.params), _identity(visits, visit.operands[0].origin)


def _signed_parts(interp: Interpreter, site: EqnPath | None, var: Atom) -> frozenset[_Part] | None:
    """The products that a value has its signs from; None where it has none or a function cuts them off."""
    visits = interp.record.flow.visits

    # Kept, since values that are used often are reached in many ways.
    @functools.cache
    def parts(site: EqnPath | None, var: Atom) -> frozenset[_Part] | None:
        visit = None if site is None else visits.get(site)
        eqn = None if visit is None else visit.eqn
        if site is None or visit is None or eqn is None:
            return None
        name = eqn.primitive.name
        if name in PRODUCTS:
            return frozenset({_Part(site, frozenset(use.path for use in visit.uses))})
        operands = [
            (one.origin, atom)
            for one, atom in zip(visit.operands, eqn.invars, strict=True)
            if one.kind == "data"
        ]
        if name == "div":
            return parts(visit.operands[0].origin, eqn.invars[0])
        found = [parts(*operand) for operand in operands]
        if name == "mul" and len({origin for origin, _ in operands}) == len(operands):
            # Signs times a size, or times other signs.
            found = [one for one in found if one is not None]
        elif name not in LAYOUT and name not in ("neg", "add", "sub"):
            return None
        if not found or None in found:
            return None
        out = frozenset[_Part]().union(*(one for one in found if one is not None))
        cut = _ranges_left(eqn, var)
        if cut is None:
            return out
        taken = {(_identity(visits, visit.operands[0].origin), cut)}
        return frozenset(dataclasses.replace(part, cuts=part.cuts | taken) for part in out)

    return parts(site, var)


def _ranges_left(eqn: JaxprEqn, var: Atom) -> _Ranges | None:
    """What an output has of each axis of the operand, where the equation takes a part."""
    name, params = eqn.primitive.name, eqn.params
    if name == "slice":
        starts, stops = params["start_indices"], params["limit_indices"]
        return tuple(map(range, starts, stops, params["strides"] or [1] * len(starts)))
    if name not in ("split", "unstack") or var not in eqn.outvars:
        return None
    number, axis = eqn.outvars.index(var), params["axis"]
    sizes = params["sizes"] if name == "split" else [1] * len(eqn.outvars)
    whole = [range(size) for size in shape_of(eqn.invars[0])]
    whole[axis] = range(sum(sizes[:number]), sum(sizes[: number + 1]))
    return tuple(whole)


def power_of_readout(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> Power | None:
    """The power of such a product that an elementwise result is, where it is one.

    Division by a function of the same product, of the same degree, is reported.
    """
    if not any(value.power for value in ins):
        return None
    rule = _RULES.get(pair.name)
    out = rule(pair, ins) if rule else None
    if out is not None and out.exponent == 0:
        _report(interp, pair, out)
        return None
    return out


def _report(interp: Interpreter, pair: Pair, power: Power) -> None:
    if interp.scales_are_known:
        interp.find(
            NORMALISED_READOUT,
            pair.site,
            pair.place,
            f"{power.product} is divided here by a norm of its own or of a layer on it: it starts at a size "
            "of 1/sqrt(width) and learns one of order one, so the first steps change the normed value in "
            f"proportion to sqrt(width); {power.remedy}",
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
    if any(number is None or abs(number[1]) > EPSILON for number in numbers):
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
