"""How the sign of a value follows the signs of parameters, and whether its mean vanishes.

A kernel whose entries have mean zero makes a sum over n of them grow as the square root of n; with any other
mean, the sum grows as n. Parameters start symmetric about zero, so a function of them has mean zero if it
changes its sign with some of them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Final

Names = frozenset[str]


def _reduced(vectors: Iterable[Names]) -> tuple[Names, ...]:
    """A basis of the space over GF(2) that the vectors span."""
    basis: list[Names] = []
    for vector in vectors:
        rest = _remainder(vector, basis)
        if rest:
            basis.append(rest)
            basis.sort(key=min)
    return tuple(basis)


def _remainder(vector: Names, basis: Iterable[Names]) -> Names:
    for row in basis:
        if min(row) in vector:
            vector ^= row
    return vector


@dataclasses.dataclass(frozen=True, slots=True)
class Parity:
    """The terms of a function of parameters, by the parameters in which each term is odd.

    A term is a vector over GF(2), one component per parameter; those of a sum lie in the affine space
    `offset + span(basis)`. A sum of terms changes its sign with a set of parameters if each term is odd in an
    odd number of them. Such a set exists if and only if the space does not contain the zero vector.

    Attributes:
        offset: one of the terms.
        basis: the differences between terms.
    """

    offset: Names = frozenset()
    basis: tuple[Names, ...] = ()

    @property
    def is_centred(self) -> bool:
        """Whether the mean is zero.

        >>> a, b = Parity.of("a"), Parity.of("b")
        >>> [p.is_centred for p in (a, a + b, a * b, a + a * b, a * a, a + a.even, Parity(), a.any)]
        [True, True, True, True, False, False, False, False]
        """
        return bool(_remainder(self.offset, self.basis))

    @property
    def names(self) -> Names:
        """The parameters that it depends on."""
        return self.offset.union(*self.basis)

    @classmethod
    def of(cls, path: str) -> Parity:
        """The parity of a parameter itself."""
        return cls(frozenset({path}))

    def without(self, *paths: str) -> Parity:
        """The parity where some parameters are not symmetric: their signs are no reason for a mean of zero.

        >>> a, b = Parity.of("a"), Parity.of("b")
        >>> [p.without("a").is_centred for p in (a, a * b, b + a * b, a + b)]
        [False, True, True, False]
        """
        return Parity(
            self.offset.difference(paths), _reduced(vector.difference(paths) for vector in self.basis)
        )

    def __add__(self, other: Parity) -> Parity:
        """The parity of a sum, or of one of the two."""
        return Parity(self.offset, _reduced((*self.basis, *other.basis, self.offset ^ other.offset)))

    def __mul__(self, other: Parity) -> Parity:
        """The parity of a product."""
        return Parity(self.offset ^ other.offset, _reduced((*self.basis, *other.basis)))

    @property
    def even(self) -> Parity:
        """The parity of an even function of the value."""
        return Parity(frozenset(), self.basis)

    @property
    def any(self) -> Parity:
        """The parity of any function of the value."""
        return Parity(frozenset(), _reduced((*self.basis, self.offset)))


INDEPENDENT: Final = Parity()
"""Of a value that depends on no parameter."""


def sum_of(parities: Iterable[Parity]) -> Parity:
    """The parity of a sum; of nothing, that of zero."""
    found = list(parities)
    return functools.reduce(Parity.__add__, found) if found else INDEPENDENT


def product_of(parities: Iterable[Parity]) -> Parity:
    """The parity of a product."""
    return functools.reduce(Parity.__mul__, parities, INDEPENDENT)
