"""The mean of random values, read off the program that draws them.

An initialiser turns random bits into numbers of [1, 2), shifts and scales them, and may apply the inverse
error function. As long as the distribution stays symmetric about its middle, its mean is known.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal

import jax.numpy as jnp
import numpy as np

from mujax.core.program import IDENTITIES, RESHAPES, JaxprEqn, dtype_of, shape_of

_CLOSE: Final = 1e-5


@dataclasses.dataclass(frozen=True)
class Spread:
    """A distribution that is symmetric about its middle.

    Attributes:
        middle: the mean.
        reach: how far entries are from it at most; 0 for a constant, perhaps inf.
        of: `"columns"` of an orthogonal matrix, which may be multiplied by any signs, or `"signs"`.
        size: the size of most entries, where they reach further.
        shared: whether entries are repeated: their sum may be coherent though their mean is zero.
    """

    middle: float
    reach: float
    of: Literal["columns", "signs"] | None = None
    shared: bool = False
    size: float = math.inf

    def scaled(self, factor: float) -> Spread:
        """The distribution of a multiple."""
        if not factor:
            return Spread(0.0, 0.0)
        return Spread(self.middle * factor, abs(factor) * self.reach, size=abs(factor) * self.size)

    def plus(self, other: Spread, sign: float = 1.0) -> Spread:
        """The distribution of a sum or a difference."""
        size = self._usual + other._usual
        return Spread(self.middle + sign * other.middle, self.reach + other.reach, size=size)

    @property
    def _usual(self) -> float:
        return min(self.reach, self.size)

    @property
    def is_centred(self) -> bool:
        """Whether the entries vary, about a mean of zero."""
        return self.reach > 0 and self.mean == 0

    @property
    def mean(self) -> float:
        """The middle; 0 where rounding alone moves it."""
        return 0.0 if abs(self.middle) <= _CLOSE * min(self._usual, 1e3) else self.middle


_Rule = Callable[[JaxprEqn, Sequence[Spread | None]], Spread | None]


def spread_of_result(eqn: JaxprEqn, spreads: Sequence[Spread | None]) -> Spread | None:
    """How the result of an initialiser's equation is distributed; None where that is not known.

    Args:
        eqn: the equation.
        spreads: of its operands.
    """
    rule = _RULES.get(eqn.primitive.name)
    out = None if rule is None else rule(eqn, spreads)
    if out is None:
        return None
    repeats = len(set(map(id, eqn.invars))) < len(eqn.invars)
    shared = out.shared or repeats or any(value is not None and value.shared for value in spreads)
    return dataclasses.replace(out, shared=shared and out.reach > 0)


def _of_known(rule: Callable[..., Spread | None]) -> _Rule:
    return lambda _, spreads: None if None in spreads else rule(*spreads)


def _from_bits(eqn: JaxprEqn, spreads: Sequence[Spread | None]) -> Spread | None:
    """Random mantissas under a fixed exponent: numbers of [1, 2)."""
    was, became = (np.dtype(dtype_of(atom)) for atom in (eqn.invars[0], eqn.outvars[0]))
    fresh = spreads[0] is None and np.issubdtype(was, np.integer) and not np.issubdtype(became, np.integer)
    return Spread(1.5, 0.5) if fresh else None


def _product(a: Spread, b: Spread) -> Spread | None:
    if {a.of, b.of} == {"columns", "signs"}:
        return Spread(0.0, 1.0)
    # Two that are not constant may depend on each other.
    if a.reach and b.reach:
        return None
    return a.scaled(b.middle) if b.reach == 0 else b.scaled(a.middle)


def _quotient(a: Spread, b: Spread) -> Spread | None:
    return a.scaled(1 / b.middle) if b.reach == 0 and b.middle else None


def _cut(upper: bool) -> Callable[[Spread, Spread], Spread | None]:
    """A bound beyond which there are no entries; any other spoils the symmetry."""

    def rule(a: Spread, b: Spread) -> Spread | None:
        value, bound = (a, b) if b.reach == 0 else (b, a)
        if bound.reach:
            return None
        past = (bound.middle - value.middle) * (1 if upper else -1) - value.reach
        return value if past >= -_CLOSE * max(1.0, abs(bound.middle)) else None

    return rule


def _clamp(low: Spread, value: Spread, high: Spread) -> Spread | None:
    above = _cut(upper=False)(value, low)
    return None if above is None else _cut(upper=True)(above, high)


def _odd(function: Callable[[float], float]) -> _Rule:
    def rule(eqn: JaxprEqn, spreads: Sequence[Spread | None]) -> Spread | None:
        value = spreads[0]
        # The interval that a normal is drawn from lacks one of its ends.
        eps = float(jnp.finfo(dtype_of(eqn.outvars[0])).eps)
        if value is None or abs(value.middle) > 2 * eps * value.reach:
            return None
        return Spread(0.0, function(value.reach), size=1.0)

    return rule


def _inverse_erf(reach: float) -> float:
    return math.inf if reach >= 0.99 else statistics.NormalDist().inv_cdf((1 + reach) / 2) / math.sqrt(2)


def _broadcast(eqn: JaxprEqn, spreads: Sequence[Spread | None]) -> Spread | None:
    (value,) = spreads[:1]
    sizes = [math.prod(shape_of(atom)) for atom in (eqn.invars[0], eqn.outvars[0])]
    return value if value is None or sizes[0] == sizes[1] else dataclasses.replace(value, shared=True)


def _first(_: JaxprEqn, spreads: Sequence[Spread | None]) -> Spread | None:
    return spreads[0]


def _alike(_: JaxprEqn, spreads: Sequence[Spread | None]) -> Spread | None:
    """One of several, or several side by side."""
    known = [value for value in spreads if value is not None]
    if len(known) < len(spreads) or len({value.mean for value in known}) != 1:
        return None
    return Spread(known[0].mean, max(v.reach for v in known), size=max(v.size for v in known))


_RULES: Final[Mapping[str, _Rule]] = {
    **dict.fromkeys(
        [
            *IDENTITIES,
            *RESHAPES,
            *[
                "convert_element_type",
                "reduce_precision",
                "stop_gradient",
                "rev",
                "slice",
                "split",
                "unstack",
                "real",
            ],
        ],
        _first,
    ),
    **dict.fromkeys(["concatenate", "stack"], _alike),
    "broadcast_in_dim": _broadcast,
    "select_n": lambda eqn, spreads: _alike(eqn, spreads[1:]),
    "bitcast_convert_type": _from_bits,
    **dict.fromkeys(["add", "add_any"], _of_known(lambda a, b: a.plus(b))),
    "sub": _of_known(lambda a, b: a.plus(b, -1.0)),
    "neg": _of_known(lambda a: a.scaled(-1.0)),
    "mul": _of_known(_product),
    "div": _of_known(_quotient),
    "max": _of_known(_cut(upper=False)),
    "min": _of_known(_cut(upper=True)),
    "clamp": _of_known(_clamp),
    "erf_inv": _odd(_inverse_erf),
    "tanh": _odd(math.tanh),
    "qr": lambda *_: Spread(0.0, 1.0, "columns"),
    "sign": lambda *_: Spread(0.0, 1.0, "signs"),
}
