"""Moves factors out of functions with their own derivative, and out of kernels, to the boundary of these."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from mujax.core.program import Boundary, ClosedJaxpr, EqnPath, boundary, closed_around

Place: TypeAlias = tuple[EqnPath, Hashable]
"""An equation, and a name for the factor there."""


@dataclasses.dataclass(frozen=True)
class Move:
    """One factor that several places inside of an equation share, at its boundary.

    Attributes:
        boundary: where it is applied.
        places: the places that it belongs to.
    """

    boundary: Boundary
    places: frozenset[Place]


Moves: TypeAlias = Mapping[Place, Move]


def move_out(
    program: ClosedJaxpr, factors: Mapping[Place, tuple[int | None, float | None]]
) -> dict[Place, Move]:
    """Moves factors out of the functions that must not be changed inside.

    The logits of each block of keys get the same factor, so that one on the query does for all of them:
    places in one function that share a factor are moved together, and one by one where that fails.

    Args:
        program: the program.
        factors: for each place the operand that is multiplied, None for the output, and the factor; None for
            one whose value is not known, which may be zero.

    Returns:
        The factors that can be applied outside.
    """
    together: dict[tuple[EqnPath, Hashable, Any], list[Place]] = collections.defaultdict(list)
    for (site, name), (_, factor) in factors.items():
        around = closed_around(program, site)
        if around is not None and factor != 1.0:
            rounded = None if factor is None else round(factor, 9)
            together[around, name, rounded].append((site, name))
    moves: dict[Place, Move] = {}
    for (around, *_), places in together.items():
        for group in _tried(places):
            if any(place in moves for place in group):
                continue
            marked = [(site, factors[site, name][0]) for site, name in group]
            known = all(factors[place][1] is not None for place in group)
            found = boundary(program, around, marked)
            if found is not None and (known or all(exponent == 1 for exponent in found.exponents)):
                move = Move(found, frozenset(group))
                moves |= dict.fromkeys(group, move)
    return moves


def _tried(places: Sequence[Place]) -> Iterable[Sequence[Place]]:
    yield places
    if len(places) > 1:
        yield from ([place] for place in places)
