"""What the interpreter notes of a pair of programs: uses of parameters, products, fixes, findings."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

from mujax.core.program import (
    Atom,
    EqnPath,
    Jaxpr,
    JaxprEqn,
    is_of_user,
    shape_of,
    where,
)
from mujax.core.trace._values import (
    Shape,
    fit,
)

UseKind = Literal["contraction", "lookup", "elementwise", "statistic", "opaque"]


AxisRole = Literal["fan_in", "fan_out", "stack", "inner"]


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a parameter.

    Attributes:
        path: the parameter.
        kind: how it is used.
        axes: (parameter axis, role, target size, base size) of each part of an axis.
        site: where the result appears, as the evaluator addresses it.
        contracted: (base, target) size of what the product contracts.
        eqn: the target's equation, for its place in the user's code.
    """

    path: str
    kind: UseKind
    axes: tuple[tuple[int, AxisRole, int, int], ...]
    site: EqnPath
    contracted: tuple[int, int]
    eqn: JaxprEqn

    @property
    def where(self) -> str:
        """`file:line` in the user's code."""
        return where(self.eqn)


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of two activations.

    Attributes:
        site: where the result appears.
        contracted: (base, target) size of what it contracts.
        left: parameters whose product its first operand is.
        eqn: the target's equation.
        logits: whether it goes into an exponential: the logits of a softmax.
    """

    site: EqnPath
    contracted: tuple[int, int]
    left: frozenset[str]
    eqn: JaxprEqn
    logits: bool = False

    @property
    def where(self) -> str:
        """`file:line` in the user's code."""
        return where(self.eqn)


@dataclasses.dataclass(frozen=True)
class Fix:
    """A value that scales with width through constants of the user's program.

    Attributes:
        site: the equation whose output a factor would put right.
        factor: that factor.
        attention: whether the value is a product of two activations divided by the root of its length.
        eqn: the target's equation at the site.
    """

    site: EqnPath
    factor: float
    attention: bool
    eqn: JaxprEqn

    @property
    def where(self) -> str:
        """`file:line` in the user's code."""
        return where(self.eqn)


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that the interpreter saw and can't put right.

    Attributes:
        kind: a short name, stable across versions.
        message: what was found and the remedy.
        where: `file:line` in the user's code.
    """

    kind: str
    message: str
    where: str


class Operand(NamedTuple):
    """What an equation reads.

    Attributes:
        kind: `"param"` for a function of parameters alone, `"const"` for one of nothing, else `"data"`.
        number: the one number that all of its entries are in the target; None where it is not known.
    """

    kind: str
    number: float | None


@dataclasses.dataclass(frozen=True)
class Pair:
    """An equation of the target with its counterpart in the base.

    Attributes:
        base: the base's equation.
        target: the target's equation.
        site: its place.
        caller: the call of a library's function that it is inside of, if it is, and that function.
    """

    base: JaxprEqn
    target: JaxprEqn
    site: EqnPath
    caller: tuple[JaxprEqn, Jaxpr] | None = None

    @property
    def place(self) -> JaxprEqn:
        """The equation that stands in the user's code: the caller's, inside a library's own code."""
        if self.caller is None:
            return self.target
        eqn, function = self.caller
        return self.target if is_of_user(self.target, function) else eqn

    @property
    def name(self) -> str:
        """Name of the primitive."""
        return self.target.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        """The target equation's parameters."""
        return self.target.params

    def shapes(self) -> list[tuple[Shape, Shape]]:
        """Shapes of the outputs in target and base, on the target's axes."""
        return [
            paired_shapes(base, target)
            for base, target in zip(self.base.outvars, self.target.outvars, strict=True)
        ]


def paired_shapes(base: Atom, target: Atom) -> tuple[Shape, Shape]:
    shape = shape_of(target)
    return shape, fit(shape_of(base), shape)
