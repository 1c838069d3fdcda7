"""What the interpreter records of a pair of programs: flow, uses of parameters, products, fixes, findings."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from mujax.core.program import (
    Atom,
    EqnPath,
    Jaxpr,
    JaxprEqn,
    is_of_user,
    shape_of,
    source_line,
)
from mujax.core.trace._parity import INDEPENDENT, Parity
from mujax.core.trace._values import Kind, Shape, fit

UseKind = Literal["contraction", "lookup", "elementwise", "statistic", "opaque"]


AxisRole = Literal["fan_in", "fan_out", "stack", "inner"]

Part = tuple[int, AxisRole, int, int]
"""Part of an axis: (parameter axis, role, target size, base size)."""


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a parameter.

    Attributes:
        path: the parameter.
        kind: how it is used.
        axes: (parameter axis, role, target size, base size) of each part of an axis.
        site: where the result appears, as the evaluator addresses it.
        contracted: (base, target) size of the contracted axes.
        eqn: the target's equation, for its place in the user's code.
        part: whether only a part of the parameter is used: a slice, or one layer of a stack.
        signs: the parity, in other parameters, of what multiplies its entries in the product. A mean of its
            entries adds up where this does not change its sign.
    """

    path: str
    kind: UseKind
    axes: tuple[Part, ...]
    site: EqnPath
    contracted: tuple[int, int]
    eqn: JaxprEqn
    part: bool = False
    signs: Parity = INDEPENDENT

    @property
    def where(self) -> str:
        """`file:line` in the user's code."""
        return source_line(self.eqn)


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of two activations.

    Attributes:
        site: where the result appears.
        contracted: (base, target) size of the contracted axes.
        left: parameters whose product its first operand is.
        right: parameters whose product its second operand is.
        eqn: the target's equation.
        logits: whether it goes into an exponential: the logits of a softmax.
    """

    site: EqnPath
    contracted: tuple[int, int]
    left: frozenset[str]
    right: frozenset[str]
    eqn: JaxprEqn
    logits: bool = False

    @property
    def where(self) -> str:
        """`file:line` in the user's code."""
        return source_line(self.eqn)


@dataclasses.dataclass(frozen=True)
class Fix:
    """A value that scales with width through constants of the user's program.

    Attributes:
        site: the equation whose output a factor would correct.
        factor: that factor.
        attention: whether the value is a product of two activations divided by the root of its length.
        eqn: the target's equation at the site.
        operand: the operand that the factor belongs to, where it is not the output.
    """

    site: EqnPath
    factor: float
    attention: bool
    eqn: JaxprEqn
    operand: int | None = None

    @property
    def where(self) -> str:
        """`file:line` in the user's code."""
        return source_line(self.eqn)


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that the interpreter found and cannot correct.

    Attributes:
        kind: a short name, stable across versions.
        message: the finding and the remedy.
        where: `file:line` in the user's code.
        count: how many places of the program it stands for, all with this text and this line.
    """

    kind: str
    message: str
    where: str
    count: int = 1


def merged(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The findings without repetitions: one of several with the same text and line, with their number."""
    counts: dict[Finding, int] = {}
    for finding in findings:
        one = dataclasses.replace(finding, count=1)
        counts[one] = counts.get(one, 0) + finding.count
    return tuple(dataclasses.replace(finding, count=count) for finding, count in counts.items())


@dataclasses.dataclass(frozen=True)
class Operand:
    """A value that an equation reads.

    Attributes:
        kind: `"param"` for a function of parameters alone, `"const"` for one of nothing, else `"data"`.
        const: (base, target) number that all of its entries are, where that is known.
        origin: the visit that made it; None for a constant that the program holds.
    """

    kind: Kind
    const: tuple[float, float] | None
    origin: EqnPath | None

    @property
    def number(self) -> float | None:
        """The number that all of its entries are in the target; None where it is not known."""
        return None if self.const is None else self.const[1]


@dataclasses.dataclass(frozen=True)
class Visit:
    """An equation of the target as the walk last saw it, or a value that no equation makes.

    Attributes:
        eqn: the equation; None for an input, the carry of a loop, and the result of a `cond`.
        operands: what it reads.
        kind: what its outputs depend on, as for `Operand`.
        uses: the uses of parameters in it.
    """

    eqn: JaxprEqn | None
    operands: tuple[Operand, ...]
    kind: Kind
    uses: tuple[Use, ...] = ()


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of the target.

    Attributes:
        length: number of iterations, where that is known.
        carry: visits that stand for the carry as an iteration starts.
        ends: visits that make the carry of the next iteration.
        layers: parameters that are scanned over whole, and the axis of each that is stripped.
    """

    length: int | None
    carry: tuple[EqnPath, ...]
    ends: tuple[EqnPath, ...]
    layers: tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True)
class Flow:
    """Which value of the target is computed from which: what depth is read off.

    Attributes:
        visits: equations that hold no program, inputs, carries and results of `cond`, in program order.
        control: the equations that hold programs, by place.
        loops: the loops, by place.
        outputs: for each output of the program, the visit that makes it.
    """

    visits: dict[EqnPath, Visit] = dataclasses.field(default_factory=dict)
    control: dict[EqnPath, JaxprEqn] = dataclasses.field(default_factory=dict)
    loops: dict[EqnPath, Loop] = dataclasses.field(default_factory=dict)
    outputs: list[EqnPath | None] = dataclasses.field(default_factory=list)

    def operands(self, site: EqnPath) -> tuple[Operand, ...]:
        """What an equation reads; nothing where it was not visited or holds a program."""
        visit = self.visits.get(site)
        return () if visit is None else visit.operands


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


def _as_copies(part: Part, copies: frozenset[int]) -> Part:
    axis, role, size, base = part
    return (axis, "stack", size, base) if axis in copies and role == "fan_out" else part


@dataclasses.dataclass
class Record:
    """Everything that a walk records.

    Attributes:
        uses: the uses of parameters, in program order.
        decided: for each of them, whether nothing that follows can change it.
        contractions: what undecided uses turned out to be, where they were contracted: number -> uses.
        copies: axes of a parameter that are a batch of the next layer's product: number of the use -> axes.
        kernels: the undecided uses that were contracted as kernels, whatever else is computed from them.
        products: the products of two activations.
        activations: for each product, which of its operands is an activation: the first of two.
        flow: which value of the target is computed from which.
        output_params: the parameters whose product is, up to linear steps, an output of the program.
        exponents: the parameters whose product is, up to linear steps, what an exponential is taken of.
        places: the equations where a size left 1.
        fixes: what scales with width through the user's own constants.
        disputed: those that are used at two sizes.
        unfixed: values whose size was used as if they had no fix.
        misfits: fixes of an earlier walk that do not bring their value to order one.
        unscaled: products of readouts that must not get a factor.
        noise: factors on noise that is added to kernels.
        findings: places that cannot be corrected.
        scales: how the entries of a result scale where that is not by 1, and where the scale left 1.
    """

    uses: list[Use] = dataclasses.field(default_factory=list)
    decided: list[bool] = dataclasses.field(default_factory=list)
    contractions: dict[int, list[Use]] = dataclasses.field(default_factory=dict)
    copies: dict[int, frozenset[int]] = dataclasses.field(default_factory=dict)
    kernels: set[int] = dataclasses.field(default_factory=set)
    products: dict[EqnPath, Product] = dataclasses.field(default_factory=dict)
    activations: dict[EqnPath, int] = dataclasses.field(default_factory=dict)
    flow: Flow = dataclasses.field(default_factory=Flow)
    output_params: dict[str, None] = dataclasses.field(default_factory=dict)
    exponents: dict[str, None] = dataclasses.field(default_factory=dict)
    places: dict[EqnPath, JaxprEqn] = dataclasses.field(default_factory=dict)
    fixes: dict[EqnPath, Fix] = dataclasses.field(default_factory=dict)
    disputed: set[EqnPath] = dataclasses.field(default_factory=set)
    unfixed: set[EqnPath] = dataclasses.field(default_factory=set)
    misfits: set[EqnPath] = dataclasses.field(default_factory=set)
    unscaled: set[EqnPath] = dataclasses.field(default_factory=set)
    noise: dict[EqnPath, Fix] = dataclasses.field(default_factory=dict)
    findings: dict[tuple[str, EqnPath], Finding] = dataclasses.field(default_factory=dict)
    scales: dict[EqnPath, tuple[float, frozenset[EqnPath]]] = dataclasses.field(default_factory=dict)

    def copy(self) -> Record:
        """A record to go back to: the body of a loop is walked again until its facts no longer change.

        Fields that are keyed by equation are overwritten by each walk, and are shared: a value that enters
        the next walk may have left order one at an equation of the last.
        """
        shared: dict[str, Any] = {
            "activations": self.activations,
            "flow": self.flow,
            "places": self.places,
            "scales": self.scales,
        }
        contractions = {number: list(uses) for number, uses in self.contractions.items()}
        copied: dict[str, Any] = {
            field.name: copy.copy(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name not in shared
        }
        return Record(**{**copied, **shared, "contractions": contractions})

    def resolved_uses(self) -> list[Use]:
        """The uses of parameters, those that stayed undecided resolved."""
        out: list[Use] = []
        for number, use in enumerate(self.uses):
            contractions = self.contractions.get(number)
            if contractions and (not self.decided[number] or number in self.kernels):
                out.extend(contractions)
            else:
                out.append(use)
            copies = self.copies.get(number)
            if copies and out[-1] is use:
                out[-1] = dataclasses.replace(use, axes=tuple(_as_copies(part, copies) for part in use.axes))
        return out

    def sums(self) -> frozenset[EqnPath]:
        """Where undecided uses turned out to be contracted: `(x * kernel).sum()`."""
        return frozenset(
            use.site for number, uses in self.contractions.items() if not self.decided[number] for use in uses
        )

    def undisputed_fixes(self) -> list[Fix]:
        """The fixes whose value is used at one size, one entry per equation, and those of noise."""
        fixes = [fix for site, fix in self.fixes.items() if site not in self.disputed]
        return [*fixes, *self.noise.values()]

    def kept_scales(self) -> dict[EqnPath, float]:
        """How values scale, target over base, that are neither corrected nor reported."""
        known = {*self.fixes, *(site for _, site in self.findings)}
        return {site: total for site, (total, origins) in self.scales.items() if not origins & known}

    def unforeseen(self, foreseen: Mapping[EqnPath, Fix]) -> dict[EqnPath, Fix]:
        """The fixes of values whose size was used elsewhere in this walk as if they had none.

        `h = x * sqrt(d)` is corrected for `tanh(h)`; from then on `h / sqrt(d)` has another size.

        Args:
            foreseen: the fixes that this walk started with.
        """
        sites = self.unfixed.intersection(self.fixes) - foreseen.keys() - self.disputed
        return {site: self.fixes[site] for site in sites}
