"""The abstract domain: what the interpreter knows about one value of the pair of programs.

A value stands for one intermediate array of the target's program together with the array that plays the
same part in the base's program. Only sizes and facts are kept, never numbers, except for scalars that are
the same everywhere in the array and known at trace time: those are folded.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Final, Literal, NamedTuple

from mujax.core.trace._parity import INDEPENDENT, Parity, product_of
from mujax.core.trace._spread import Spread

Kind = Literal["const", "param", "data"]
_ORDER: dict[Kind, int] = {"const": 0, "param": 1, "data": 2}

Shape = tuple[int, ...]
_token = itertools.count()


class Factor(NamedTuple):
    """A part of an array axis: which parameter axis it comes from (None for a broadcast) and its sizes."""

    axis: int | None
    size: int
    base: int

    @property
    def grows(self) -> bool:
        """Whether it is part of a parameter axis that grows with width."""
        return self.axis is not None and self.size != self.base


Axis = tuple[Factor, ...]
"""One axis of a value as its factors, major to minor; `()` for an axis of size 1 that comes from none."""


@dataclasses.dataclass(frozen=True, slots=True)
class View:
    """How a value is laid out in terms of one parameter's axes.

    Attributes:
        path: the parameter.
        axes: per axis of the value, the parameter axes in it.
        stack: parameter axes that a scan has stripped.
        picked: parameter axes from which one entry was taken by index.
        inner: parameter axes that were contracted with another parameter.
        made: the product with another parameter, where the value is linear in it.
        reduced: whether it is a statistic (a norm, a mean) that lacks an axis which grows.
        thinned: whether it lacks an axis that does not: it still shows what becomes of the others.
        part: whether only a part of the parameter is left: a slice, or one layer of a stack.
        bent: whether it went through a function that does not become linear as its argument shrinks.
    """

    path: str
    axes: tuple[Axis, ...]
    stack: frozenset[int] = frozenset()
    picked: frozenset[int] = frozenset()
    inner: frozenset[int] = frozenset()
    made: tuple[int | str, ...] | None = None
    reduced: bool = False
    thinned: bool = False
    part: bool = False
    bent: bool = False

    @property
    def growing(self) -> int:
        """How many of the value's axes hold an axis of the parameter that grows."""
        return sum(any(factor.grows for factor in axis) for axis in self.axes)

    def parameter_axes(self, axes: Iterable[int]) -> frozenset[int]:
        """The parameter axes that are in some of the value's axes."""
        return frozenset(f.axis for axis in axes for f in self.axes[axis] if f.axis is not None)


@dataclasses.dataclass(frozen=True, slots=True)
class Pending:
    """A use of a parameter whose role shows only in what follows.

    `x * g` is a gain, unless the product is then summed over g's axis: that is a contraction. A row
    that was looked up is an embedding, unless it is then contracted as a kernel.

    Attributes:
        use: number of the use in the interpreter's record.
        view: the parameter's layout in the value at hand.
        entrywise: whether the value is any entrywise function of the parameter and not linear in it.
        product: whether the value is a function of the parameter's product, whose axes the view shows. The
            use is decided; which of those axes are copies shows where they are a batch of another product.
        shared: the parameter's axes that the activation it was multiplied with has too. Those that are not
            summed are a batch of the product.
    """

    use: int
    view: View
    entrywise: bool = False
    product: bool = False
    shared: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True, slots=True)
class Scale:
    """How the entries of a value scale: target over base, as far as the program itself sets it.

    Sums count as coherent: over an axis that grows r times the sum grows r times. That is what happens
    to products of correlated activations and to means, and a sum divided by its length comes out at 1.

    Attributes:
        total: entries in the target over entries in the base; 0 for identically zero, None if it
            cannot be determined.
        summed: the part of `total` that sums over growing axes account for; constants are the rest.
        degree: how many such sums are in it: 1 for a sum, -1/2 for a division by a norm.
        origins: the equations where the scale left 1; a factor there is a factor here.
        through: equations with a scale of their own that it was computed from, and that are not its origins.
        behind: whether a layer came after the scale left 1: constants that follow do not belong to its sums.
        epsilon: whether a small number was added to what falls with width: in a wide model it takes over.
    """

    total: float | None = 1.0
    summed: float = 1.0
    degree: float = 0.0
    origins: frozenset[tuple[int | str, ...]] = frozenset()
    through: frozenset[tuple[int | str, ...]] = frozenset()
    behind: bool = False
    epsilon: bool = False

    @property
    def is_one(self) -> bool:
        """Whether the entries are of the same scale at every width."""
        return self.total is not None and (self.total == 0 or same(self.total, 1.0))

    @property
    def nearly_one(self) -> bool:
        """Whether a sum and constants cancel in the limit: n / (n - 1), of an unbiased variance."""
        if not (self.total and self.degree) or abs(self.degree) > 1:
            return False
        return abs(math.log(self.total) * self.degree) < 0.15 * abs(math.log(self.summed))

    @property
    def normalised(self) -> bool:
        """Whether it was divided by a norm, and by no constant that scales with width."""
        return self.total is not None and self.degree < 0 and same(self.total, self.summed)

    def power(self, exponent: float) -> Scale:
        """The scale of a power of the value."""
        if not self.total:
            return self if exponent > 0 else UNKNOWN
        through = self.origins | self.through
        total, summed = self.total**exponent, self.summed**exponent
        degree = self.degree * exponent
        return Scale(total, summed, degree, through=through, behind=self.behind, epsilon=self.epsilon)

    def scaled(self, factor: float | None) -> Scale:
        """The scale after multiplication with a constant that scales by `factor`."""
        if factor is None or self.total is None:
            return UNKNOWN
        return dataclasses.replace(self, total=self.total * factor)

    def over(self, grows: float | None) -> Scale:
        """The scale of a sum over axes that grow by `grows`."""
        if grows is None or self.total is None:
            return UNKNOWN
        if grows == 1.0:
            return self
        return dataclasses.replace(
            self, total=self.total * grows, summed=self.summed * grows, degree=self.degree + 1
        )

    def at(self, site: tuple[int | str, ...], *operands: Scale) -> Scale:
        """The result of an equation at `site`: where its scale left 1, and nothing if it has not."""
        if self.total is None:
            return self
        if self.is_one:
            return ZERO if self.total == 0 else ONE
        if self.origins:
            return self
        apart = [scale for scale in operands if not scale.is_one]
        origins = apart[0].origins if len(apart) == 1 and apart[0].origins else frozenset({site})
        return dataclasses.replace(self, origins=origins, through=self.through - origins)


ONE: Final = Scale()
ZERO: Final = Scale(0.0)
UNKNOWN: Final = Scale(None)


NORMALISED_READOUT: Final = "normalised readout"
"""The kind of the finding on a norm of what is a `Power`."""


class Power(NamedTuple):
    """A power of a product that starts smaller in a wider model: of a readout, or of queries and keys.

    Attributes:
        product: it in words.
        remedy: what can be done where a norm divides it.
        exponent: the exponent.
    """

    product: str
    remedy: str
    exponent: float


@dataclasses.dataclass(eq=False)
class Memory:
    """A block of memory that a kernel reads and writes.

    Attributes:
        content: all that has been written into it, joined; None for nothing so far.
    """

    content: Value | None = None


@dataclasses.dataclass(slots=True)
class Value:
    """The facts about one value.

    Attributes:
        shape: its shape in the target.
        base: the sizes of the same axes in the base.
        kind: `"const"` depends on nothing, `"param"` on parameters only, `"data"` on anything.
        const: (base, target) where it is one known number throughout.
        views: for kind `"param"`, the parameters that it is a function of, axis by axis.
        scale: how its entries scale.
        pending: undecided uses that this value is linear in.
        products: products of two activations that this value is linear in.
        linear_in: parameters whose product this value is linear in.
        state: whether it depends on parameters and stored state only, and on no input: a statistic.
        origin: the visit that made it; None for a constant that the program holds.
        raw: for kind `"data"`, whether it is computed from inputs without a width, randomness and stored
            state alone, so that it is no activation; for `"param"`, whether such a value is in it.
        parity: how its sign follows the parameters' and, where random numbers of mean zero are in it, theirs;
            None where not yet known.
        clipped: (bound, parity before) of a value that was cut off below, until it is cut off above.
        power: the power of such a product that the value is, up to factors and terms that do not grow.
        spread: of random numbers, the distribution of the entries; None where it is not known.
        memory: the block of memory that it stands for, in a kernel.
        root: identity up to axes of size 1; equal for a value and its trivial reshapes.
    """

    shape: Shape
    base: Shape
    kind: Kind
    const: tuple[float, float] | None = None
    views: tuple[View, ...] = ()
    scale: Scale = ONE
    pending: tuple[Pending, ...] = ()
    products: frozenset[tuple[int | str, ...]] = frozenset()
    linear_in: frozenset[str] = frozenset()
    state: bool = False
    origin: tuple[int | str, ...] | None = None
    raw: bool = False
    parity: Parity | None = None
    clipped: tuple[float, Parity] | None = None
    power: Power | None = None
    spread: Spread | None = None
    memory: Memory | None = None
    root: int = dataclasses.field(default_factory=lambda: next(_token))

    @property
    def ndim(self) -> int:
        """Rank in the target."""
        return len(self.shape)

    @property
    def sign(self) -> Parity:
        """How its sign follows the parameters'."""
        if self.kind != "param":
            return self.parity or INDEPENDENT
        return self.parity or product_of(Parity.of(view.path).any for view in self.views)

    def sizes(self, axes: Iterable[int]) -> tuple[int, int]:
        """Product of the sizes of some axes, in the base and in the target; symbolic batch axes left out."""
        base, target = 1, 1
        for axis in axes:
            if isinstance(self.shape[axis], int):
                base *= self.base[axis]
                target *= self.shape[axis]
        return base, target

    def replace(self, **changes: object) -> Value:
        """A copy with a new identity and some facts changed."""
        return dataclasses.replace(self, root=next(_token), **changes)  # pyright: ignore[reportArgumentType]


def constant(base: float, target: float, shape: Shape = (), base_shape: Shape = ()) -> Value:
    """A value that is one known number throughout."""
    return Value(shape, base_shape, "const", const=(base, target), scale=Scale(ratio(base, target)))


def ratio(base: float, target: float) -> float | None:
    """target / base as a scale: 0 if both vanish, None if it has no meaning."""
    if base == target:
        return 0.0 if target == 0 else 1.0
    if base == 0 or not (math.isfinite(base) and math.isfinite(target)):
        return None
    return target / base


def product(scales: Iterable[Scale]) -> Scale:
    """Scale of a product."""
    total, summed, degree = 1.0, 1.0, 0.0
    through: frozenset[tuple[int | str, ...]] = frozenset()
    unknown = behind = epsilon = False
    for scale in scales:
        if scale.total == 0:
            return ZERO
        unknown |= scale.total is None
        behind |= scale.behind
        epsilon |= scale.epsilon
        total *= scale.total or 1.0
        summed *= scale.summed
        degree += scale.degree
        through |= scale.origins | scale.through
    if unknown:
        return UNKNOWN
    return Scale(total, summed, degree, through=through, behind=behind, epsilon=epsilon)


def same(a: float, b: float) -> bool:
    """Equality of scales up to the rounding of float32 literals."""
    return math.isclose(a, b, rel_tol=1e-5)


def common(scales: Iterable[Scale]) -> Scale | None:
    """The scale of a sum or of a choice of values that scale alike; None if they do not.

    Zeros scale like anything. A factor on the result is a factor on each of the values.
    """
    out = ZERO
    for scale in scales:
        if scale.total is None:
            return None
        if scale.total == 0:
            continue
        if out.total == 0:
            out = scale
        elif out.total is None or not same(out.total, scale.total):
            return None
        else:
            origins, through = out.origins | scale.origins, out.through | scale.through
            behind = out.behind or scale.behind
            out = dataclasses.replace(out, origins=origins, through=through - origins, behind=behind)
    return out


def widest(kinds: Iterable[Kind]) -> Kind:
    """The kind of a value computed from values of these kinds."""
    out: Kind = "const"
    for kind in kinds:
        out = kind if _ORDER[kind] > _ORDER[out] else out
    return out


def whole(path: str, shape: Shape, base: Shape) -> View:
    """The view of a parameter as it is stored."""
    axes = zip(range(len(shape)), shape, base, strict=True)
    return View(path, tuple((Factor(axis, size, small),) for axis, size, small in axes))


def parameter(path: str, shape: Shape, base: Shape, scale: Scale = ONE) -> Value:
    """A parameter as it is stored; its entries start symmetric about zero."""
    return Value(shape, base, "param", views=(whole(path, shape, base),), scale=scale, parity=Parity.of(path))


def broadcast_axis(size: int, base: int) -> Axis:
    """An axis that holds no parameter axis."""
    return () if (size, base) == (1, 1) else (Factor(None, size, base),)


def regroup(axes: Sequence[Axis], shape: Shape, base: Shape) -> tuple[Axis, ...] | None:
    """The factors of a row-major array after a reshape, or None where an axis would be cut unevenly.

    >>> regroup([(Factor(0, 6, 3),), (Factor(1, 4, 4),)], (2, 12), (1, 12))
    ((Factor(axis=0, size=2, base=1),), (Factor(axis=0, size=3, base=3), Factor(axis=1, size=4, base=4)))
    """
    rest = [factor for axis in axes for factor in axis if (factor.size, factor.base) != (1, 1)][::-1]
    out: list[Axis] = []
    for size, small in zip(shape, base, strict=True):
        group: list[Factor] = []
        while (size, small) != (1, 1):
            if not rest:
                return None
            factor = rest.pop()
            if size % factor.size == 0 and small % factor.base == 0:
                group.append(factor)
                size, small = size // factor.size, small // factor.base
            elif factor.size % size == 0 and factor.base % small == 0:
                group.append(Factor(factor.axis, size, small))
                rest.append(Factor(factor.axis, factor.size // size, factor.base // small))
                size = small = 1
            else:
                return None
        out.append(tuple(group))
    return None if rest else tuple(out)


def fit(base: Shape, shape: Shape) -> Shape:
    """The base's sizes on the target's axes, where the base may lack axes of size 1.

    >>> fit((5, 4), (5, 2, 4)), fit((5, 1, 4), (5, 4))
    ((5, 1, 4), (5, 4))
    """
    if len(base) == len(shape):
        return base
    core = [size for size in base if size != 1] if len(base) > len(shape) else list(base)
    out: list[int] = []
    for axis, size in enumerate(shape):
        axes_left = len(shape) - axis
        if core and (core[0] == size or len(core) >= axes_left):
            out.append(core.pop(0))
        else:
            out.append(1)
    return tuple(out)
