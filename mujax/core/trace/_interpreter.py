"""The abstract interpreter: walks the programs of base and target side by side.

Two programs that differ in widths only have the same equations in the same order. The interpreter pairs
them up, carries a `Value` per intermediate array and logs each use of a parameter. What a primitive does
to a value is a rule in `_primitives.py`; this module owns the walk, the log and the control flow.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core as jex

from mujax.core.program import (
    IDENTITIES,
    RESHAPES,
    Atom,
    ClosedJaxpr,
    EqnPath,
    Jaxpr,
    JaxprEqn,
    Subprogram,
    is_library_function,
    is_of_user,
    primitive_name,
    subprograms,
    where,
)
from mujax.core.trace._values import (
    ONE,
    UNKNOWN,
    ZERO,
    Axis,
    Factor,
    Pending,
    Shape,
    Size,
    Value,
    View,
    broadcast_axis,
    common,
    constant,
    fit,
    ratio,
    same,
    widest,
)
from mujax.errors import TraceMismatchError

UseKind = Literal["contraction", "lookup", "elementwise", "statistic", "opaque"]
_TOLERANCE = 1e-6
# Closed-over arrays up to this many entries are looked at: is it one number throughout?
_SMALL = 1 << 16

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
            _shapes(base.aval, target.aval)
            for base, target in zip(self.base.outvars, self.target.outvars, strict=True)
        ]


def _shape(aval: Any) -> Shape:
    return tuple(getattr(aval, "shape", ()))


def _shapes(base: Any, target: Any) -> tuple[Shape, Shape]:
    shape = _shape(target)
    return shape, fit(_shape(base), shape)


_Mark = tuple[
    int,
    dict[EqnPath, Product],
    dict[int, list[Use]],
    list[bool],
    dict[EqnPath, Fix],
    set[EqnPath],
    dict[tuple[str, EqnPath], Finding],
]

Rule = Callable[["Interpreter", Pair, Sequence[Value]], Sequence[Value]]


class Interpreter:
    """Walks a pair of programs and logs the uses of parameters.

    Args:
        rules: what each primitive does, by name.
        shapes: (target, base) shape of each parameter.
        prescribed: how the entries of each parameter scale, target over base, as the program gets them;
            1 where left out.
        exact: whether sizes must be exact, as for the program of an initialiser: there a nonlinear
            function of what scales is unknown, and nothing is put right.
        sums: where an earlier walk found that a sum is a product with a parameter.
        fixed: what an earlier walk put right and is put right from the start in this one.

    Attributes:
        exact: as given.
        activations: per product, which of its operands is an activation: the first of two.
        operands: what each equation of the target reads.
    """

    def __init__(
        self,
        rules: dict[str, Rule],
        shapes: dict[str, tuple[Shape, Shape]],
        prescribed: Mapping[str, float] | None = None,
        exact: bool = False,
        sums: frozenset[EqnPath] = frozenset(),
        fixed: Mapping[EqnPath, Fix] | None = None,
    ) -> None:
        self.exact = exact
        self.activations: dict[EqnPath, int] = {}
        self.operands: dict[EqnPath, tuple[Operand, ...]] = {}
        self.known_sums = sums
        self._fixed = fixed or {}
        self._rules = rules
        self._param_shapes = shapes
        self._prescribed = prescribed or {}
        self._caller: tuple[JaxprEqn, Jaxpr] | None = None
        self._heads: dict[str, None] = {}
        self._places: dict[EqnPath, JaxprEqn] = {}
        self._fixes: dict[EqnPath, Fix] = dict(self._fixed)
        self._disputed: set[EqnPath] = set()
        self._unfixed: set[EqnPath] = set()
        self.misfits: set[EqnPath] = set()
        self._findings: dict[tuple[str, EqnPath], Finding] = {}
        self._uses: list[Use] = []
        self._decided: list[bool] = []
        self._contractions: dict[int, list[Use]] = {}
        self._kernels: set[int] = set()
        self._products: dict[EqnPath, Product] = {}

    # ---- the log -----------------------------------------------------------------------------------

    def uses(self) -> list[Use]:
        """The uses of parameters, those that stayed undecided resolved."""
        out: list[Use] = []
        for number, use in enumerate(self._uses):
            contractions = self._contractions.get(number)
            if contractions and (not self._decided[number] or number in self._kernels):
                out.extend(contractions)
            else:
                out.append(use)
        return out

    def products(self) -> list[Product]:
        """The products of two activations."""
        return list(self._products.values())

    def heads(self) -> list[str]:
        """The parameters whose product is, up to linear steps, an output of the program."""
        return list(self._heads)

    def fixes(self) -> list[Fix]:
        """What scales with width through the user's own constants, one entry per equation."""
        return [fix for site, fix in self._fixes.items() if site not in self._disputed]

    def unforeseen(self) -> dict[EqnPath, Fix]:
        """The fixes of values whose size was used elsewhere in this walk as if they had none.

        `h = x * sqrt(d)` is put right for `tanh(h)`; from then on `h / sqrt(d)` has another size.
        """
        sites = self._unfixed.intersection(self._fixes) - self._fixed.keys() - self._disputed
        return {site: self._fixes[site] for site in sites}

    def findings(self) -> list[Finding]:
        """What was seen and can't be put right."""
        return list(self._findings.values())

    def _mark(self) -> _Mark:
        contractions = {number: list(uses) for number, uses in self._contractions.items()}
        return (
            len(self._uses),
            dict(self._products),
            contractions,
            list(self._decided),
            dict(self._fixes),
            set(self._disputed),
            dict(self._findings),
        )

    def _rollback(self, mark: _Mark) -> None:
        (uses, self._products, self._contractions, decided, self._fixes, self._disputed, self._findings) = (
            mark
        )
        del self._uses[uses:]
        self._decided[:] = decided
        self._kernels = {number for number in self._kernels if number < uses}

    def _log(self, use: Use, decided: bool) -> int:
        self._uses.append(use)
        self._decided.append(decided)
        return len(self._uses) - 1

    def use(
        self,
        pair: Pair,
        view: View,
        kind: UseKind,
        *,
        fan_in: Sequence[int] = (),
        stack: Sequence[int] = (),
        picked: AxisRole = "fan_in",
        contracted: tuple[int, int] = (1, 1),
        decided: bool = True,
    ) -> int:
        """Logs a use of the parameter that `view` shows.

        Args:
            pair: the equation.
            view: the parameter's layout in the operand.
            kind: how it is used.
            fan_in: axes of the operand that are contracted.
            stack: axes of the operand that are batch axes of the product.
            picked: role of the axes from which one entry was picked by index.
            contracted: (base, target) size of what the product contracts.
            decided: whether nothing that follows can change the verdict.

        Returns:
            The number of the use, for `decide` and `contract_later`.
        """
        return self._log(
            Use(
                view.path,
                # A norm or a mean of a parameter tells nothing of the axis that it is over.
                "opaque" if view.reduced else "statistic" if view.thinned else kind,
                tuple(self._axes(view, fan_in, stack, picked)),
                pair.site,
                contracted,
                pair.place,
            ),
            decided,
        )

    def _axes(
        self, view: View, fan_in: Sequence[int], stack: Sequence[int], picked: AxisRole
    ) -> list[tuple[int, AxisRole, int, int]]:
        out: list[tuple[int, AxisRole, int, int]] = []

        def add(axis: int, role: AxisRole, size: int, base: int) -> None:
            out.append((axis, role, size, base))

        for position, axis in enumerate(view.axes):
            role: AxisRole = "fan_in" if position in fan_in else "stack" if position in stack else "fan_out"
            for factor in axis:
                if factor.axis is not None:
                    add(factor.axis, role, factor.size, factor.base)
        shape, base = self._param_shapes[view.path]
        marks: list[tuple[frozenset[int], AxisRole]] = [
            (view.stack, "stack"),
            (view.picked, picked),
            (view.inner, "inner"),
        ]
        for axes, role in marks:
            for axis in sorted(axes):
                add(axis, role, shape[axis], base[axis])
        return out

    def sums(self) -> frozenset[EqnPath]:
        """Where undecided uses turned out to be contracted: `(x * kernel).sum()`."""
        return frozenset(
            use.site
            for number, uses in self._contractions.items()
            if not self._decided[number]
            for use in uses
        )

    def decide(self, value: Value) -> None:
        """Confirms the undecided uses that `value` is linear in: it is consumed by something else."""
        for pending in value.pending:
            self._decided[pending.use] = True

    def contract_later(self, pair: Pair, value: Value, axes: Sequence[int]) -> bool:
        """Tells the undecided uses in `value` that these axes of it are now contracted.

        Returns:
            Whether the contraction touches an axis of such a parameter.
        """
        touched = False
        for pending in value.pending:
            mine = [axis for axis in axes if any(f.axis is not None for f in pending.view.axes[axis])]
            if not mine:
                continue
            touched = True
            use = Use(
                pending.view.path,
                "contraction",
                tuple(self._axes(pending.view, mine, (), "stack")),
                pair.site,
                value.sizes(mine),
                pair.place,
            )
            self._contractions.setdefault(pending.use, []).append(use)
        return touched

    def is_kernel(self, use: int) -> None:
        """Notes that an undecided use was contracted as a kernel, whatever else is computed from it."""
        self._kernels.add(use)

    def becomes_data(self, pair: Pair, value: Value) -> None:
        """A function of parameters meets the data elementwise: all its axes are fan-out."""
        if value.kind == "param":
            for view in value.views:
                self.use(pair, view, "lookup" if view.picked else "elementwise")
        self.decide(value)

    def opaque(self, pair: Pair, value: Value) -> None:
        """Something that can't be followed consumes the value."""
        if value.kind == "param":
            for view in value.views:
                self.use(pair, view, "opaque")
        self.decide(value)

    def product(self, pair: Pair, contracted: tuple[int, int], left: Value) -> None:
        """Logs a product of two activations."""
        self._products[pair.site] = Product(pair.site, contracted, left.heads, pair.place)

    def logits(self, value: Value) -> None:
        """Notes that a value goes into an exponential."""
        for site in value.products:
            self._products[site] = dataclasses.replace(self._products[site], logits=True)

    # ---- sizes -------------------------------------------------------------------------------------

    def sized(self, pair: Pair, size: Size, *operands: Size) -> Size:
        """The size of an equation's result, with the place where its scale left 1."""
        fix = self._fixed.get(pair.site)
        if fix is not None:
            size = size.scaled(fix.factor)
            if not size.is_one:
                self.misfits.add(pair.site)
        out = size.at(pair.site, *operands)
        self._unfixed |= size.through - out.origins
        if pair.site in out.origins:
            self._places[pair.site] = pair.place
        return out

    def meet(self, value: Value) -> Size:
        """The size that an operand brings to the data.

        A parameter brings its size relative to what the parametrization prescribes for it: the rules make
        a product with a parameter of the prescribed size come out at 1. An array that the program closes
        over is of order one.
        """
        if value.kind == "data" or value.const is not None:
            return value.size
        if value.kind == "const":
            return value.size if value.size.total == 0 or self.exact else ONE
        scales = {
            self._prescribed.get(view.path, 1.0) for view in value.views if not (view.reduced or view.inner)
        } - {1.0}
        if value.size.total is None or len(scales) > 1:
            return UNKNOWN
        if value.size.total == 0:
            return ZERO
        size = Size(value.size.total / (scales.pop() if scales else 1.0))
        return ONE if size.is_one else size

    def settle(self, place: JaxprEqn | None, value: Value, report: bool = True) -> Size:
        """The value goes where only entries of one size at every width will do: put it right, or say so.

        Constants that scale with width are held at the base's value. A coherent sum that is divided by
        the root of its length (attention logits) is divided by its length; a value that was divided by a
        norm gets back its size. Anything else is reported.

        Args:
            place: the equation that consumes it; None at the end of a program without equations.
            value: the value.
            report: whether to log what can't be put right; else it may still cancel further on.

        Returns:
            Its size from here on.
        """
        size = value.size
        if self.exact or value.kind != "data" or size.total is None or size.is_one:
            return size
        if value.state:
            # A step of a power iteration: it computes a norm, and must compute the same norm.
            return UNKNOWN
        if size.nearly_one:
            return ONE
        constants = size.total / size.summed
        attention = abs(size.degree - 1) < _TOLERANCE
        if attention:
            known = size.summed != 1 and -0.98 < math.log(constants) / math.log(size.summed) < -0.02
        else:
            known = abs(size.degree) < _TOLERANCE or size.normalised
        if not (known or report):
            return size
        for site in size.origins:
            if known:
                self._fix(site, 1 / size.total, attention)
            else:
                eqn = self._places[site]
                self.find(
                    "unscaled sum" if same(constants, 1.0) else "unknown scale",
                    site,
                    eqn,
                    f"the result of {eqn.params.get('name') or eqn.primitive.name} grows {size.total:.4g} "
                    "times from base to target where "
                    f"it is used at {where(place) if place else 'the end'}, and its factor fits no known "
                    "pattern (a mean, 1/sqrt(d), 1/d); write a factor in the model, so that it does not grow "
                    "with width (for attention logits with_multipliers(attention_mult=...) will do)",
                )
        return ONE

    def _fix(self, site: EqnPath, factor: float, attention: bool) -> None:
        known = self._fixes.get(site)
        if known is None:
            self._fixes[site] = Fix(site, factor, attention, self._places[site])
        elif not same(known.factor, factor):
            self._disputed.add(site)
            self.find(
                "disputed scale",
                site,
                known.eqn,
                f"its result is used at two sizes, which ask for the factors {known.factor:.4g} and "
                f"{factor:.4g}; "
                "compute the two uses from separate products",
            )

    def find(self, kind: str, site: EqnPath, eqn: JaxprEqn, message: str) -> None:
        """Logs something that can't be put right."""
        self._findings[kind, site] = Finding(kind, message, where(eqn))

    # ---- the walk ----------------------------------------------------------------------------------

    def run(self, base: ClosedJaxpr, target: ClosedJaxpr, inputs: Sequence[Value]) -> list[Value]:
        """Walks two programs on the given inputs.

        Args:
            base: the base's program.
            target: the target's program.
            inputs: the values of the inputs, in order.

        Returns:
            The values of the outputs.

        Raises:
            TraceMismatchError: the programs differ in more than sizes.
        """
        outs = self._program(base, target, inputs, ())
        for value in outs:
            self.decide(value)
            # Who asks for vectors of unit norm gets them: what is computed from them is not in this program.
            if not value.size.normalised:
                self.settle(_last_line(target), value)
            self._heads.update(dict.fromkeys(sorted(value.heads)))
        return outs

    def _program(
        self, base: ClosedJaxpr, target: ClosedJaxpr, inputs: Sequence[Value], site: EqnPath
    ) -> list[Value]:
        if len(base.consts) != len(target.consts):
            raise TraceMismatchError(
                f"the traced programs of base and target must close over the same arrays; found "
                f"{len(base.consts)} in the base and {len(target.consts)} in the target. Use a larger base, "
                "so that the model's Python code takes the same path at both widths."
            )
        consts = [
            _closed_over(small, big, self.exact)
            for small, big in zip(base.consts, target.consts, strict=True)
        ]
        small: dict[Any, Value] = {}
        big: dict[Any, Value] = {}
        for env, program in ((small, base.jaxpr), (big, target.jaxpr)):
            env.update(zip(program.constvars, consts, strict=True))
            env.update(zip(program.invars, inputs, strict=True))
        eqns, others = base.jaxpr.eqns, target.jaxpr.eqns
        i = j = 0
        while i < len(eqns) or j < len(others):
            b = eqns[i] if i < len(eqns) else None
            t = others[j] if j < len(others) else None
            if b is not None and t is not None and (ins := _match(b, t, small, big)) is not None:
                outs = self._eqn(Pair(b, t, (*site, j), self._caller), ins)
                for env, eqn in ((small, b), (big, t)):
                    env.update(zip(eqn.outvars, outs, strict=True))
                i, j = i + 1, j + 1
            elif b is not None and _is_trivial(b):
                small[b.outvars[0]] = _read_one(b.invars[0], small)
                i += 1
            elif t is not None and _is_trivial(t):
                value = _read_one(t.invars[0], big)
                big[t.outvars[0]] = _reshaped(value, _shape(t.outvars[0].aval))
                j += 1
            else:
                raise _mismatch(b, t)
        return [
            _read(b, t, small, big) for b, t in zip(base.jaxpr.outvars, target.jaxpr.outvars, strict=True)
        ]

    def _eqn(self, pair: Pair, ins: Sequence[Value]) -> Sequence[Value]:
        outs = self._apply(pair, ins)
        self.operands[pair.site] = tuple(
            Operand(value.kind, None if value.const is None else value.const[1]) for value in ins
        )
        if any(value.state for value in ins) and all(value.state or value.kind != "data" for value in ins):
            for value in outs:
                value.state = value.kind == "data"
        return outs

    def _apply(self, pair: Pair, ins: Sequence[Value]) -> Sequence[Value]:
        rule = self._rules.get(pair.name)
        if rule is not None:
            return rule(self, pair, ins)
        inner = list(zip(subprograms(pair.base), subprograms(pair.target), strict=True))
        match [big.kind for _, big in inner]:
            case []:
                return self.unknown(pair, ins)
            case ["call"]:
                return self._call(pair, *inner[0], ins)
            case ["branch", *_]:
                return self._branches(pair, inner, ins)
            case _:
                return self._loop(pair, inner, ins)

    def unknown(self, pair: Pair, ins: Sequence[Value]) -> list[Value]:
        """The outputs of a primitive without a rule: data without facts."""
        for value in ins:
            self.opaque(pair, value)
        kind = widest(value.kind for value in ins)
        if pair.target.outvars and kind != "const":
            self.find(
                "opaque",
                pair.site,
                pair.place,
                f"{primitive_name(pair.target)} can't be looked into: products inside it get no factor, "
                "and how its results scale with width is not known; check that nothing in it depends on the "
                "width",
            )
        return [
            Value(shape, base, "const" if kind == "const" else "data", size=UNKNOWN)
            for shape, base in pair.shapes()
        ]

    # ---- control flow ------------------------------------------------------------------------------

    def _inside(self, pair: Pair, base: Subprogram, target: Subprogram, ins: Sequence[Value]) -> list[Value]:
        """Walks a program inside of an equation."""
        return self._program(base.program, target.program, ins, (*pair.site, target.step))

    def _call(self, pair: Pair, base: Subprogram, target: Subprogram, ins: Sequence[Value]) -> list[Value]:
        """`jit`, `remat`, `custom_jvp`, …: a program that is run once."""
        inner = target.program.jaxpr
        fitted = [
            # A shard has other sizes.
            resized(ins[operand], *_shapes(b.aval, t.aval))
            for operand, b, t in zip(target.operands, base.program.jaxpr.invars, inner.invars, strict=True)
        ]
        # The inside of a library's function is traced once and shared: its source lines may be those of
        # another call.
        caller = self._caller
        if pair.place is pair.target:
            self._caller = (pair.target, inner) if is_library_function(inner) else None
        outs = self._inside(pair, base, target, fitted)
        self._caller = caller
        return [resized(value, shape, base) for value, (shape, base) in zip(outs, pair.shapes(), strict=True)]

    def _loop(
        self, pair: Pair, inner: Sequence[tuple[Subprogram, Subprogram]], ins: Sequence[Value]
    ) -> list[Value]:
        """`scan` and `while`: the last program is the body, one before it the condition."""
        _, body = inner[-1]
        carries = [body.operands[number] for number, _ in body.carried]

        def iteration(state: Sequence[Value]) -> list[Value]:
            current = dict(enumerate(ins)) | dict(zip(carries, state, strict=True))
            outs: list[Value] = []
            for small, big in inner:
                given = [
                    _strip(current[operand]) if number in big.sliced else current[operand]
                    for number, operand in enumerate(big.operands)
                ]
                outs = self._inside(pair, small, big, given)
            return outs

        outs = self._fixpoint(pair, [ins[operand] for operand in carries], iteration, len(carries))
        return [
            _unstrip(value, *pair.shapes()[result]) if number in body.stacked else value
            for number, (value, result) in enumerate(zip(outs, body.results, strict=True))
        ]

    def _fixpoint(
        self,
        pair: Pair,
        state: Sequence[Value],
        body: Callable[[Sequence[Value]], list[Value]],
        carry: int,
    ) -> list[Value]:
        """Runs the body of a loop until the facts about its carry no longer change.

        A carry may have a size of its own if the body keeps it; where it does not, the carry is put right
        when it enters and after each step.
        """
        settled: set[int] = set()
        for value in state:
            self.decide(value)
        entered = self._entering(pair, state, settled)
        while True:
            mark = self._mark()
            outs = body(entered)
            moved = {
                number
                for number, (a, b) in enumerate(zip(entered, outs[:carry], strict=True))
                if number not in settled and common([a.size, b.size]) is None
            }
            if moved:
                self._rollback(mark)
                settled |= moved
                entered = self._entering(pair, state, settled)
                continue
            outs[:carry] = [
                self._settled(pair, value) if number in settled else value
                for number, value in enumerate(outs[:carry])
            ]
            joined = [self._join([a, b]) for a, b in zip(entered, outs[:carry], strict=True)]
            if all(_same_facts(a, b) for a, b in zip(entered, joined, strict=True)):
                for value, out in zip(joined, outs[:carry], strict=True):
                    if value.kind == "data":
                        self.becomes_data(pair, out)
                return [*joined, *outs[carry:]]
            self._rollback(mark)
            for before, after in zip(entered, joined, strict=True):
                if after.kind == "data":
                    self.becomes_data(pair, before)
            entered = joined

    def _entering(self, pair: Pair, state: Sequence[Value], settled: Collection[int]) -> list[Value]:
        """The carry of a loop as it enters; the numbers of those parts that are put right."""
        entered: list[Value] = []
        for number, value in enumerate(state):
            # A counter that starts at a known number does not keep it.
            const = dict[str, object](const=None) if value.const else {}
            value = self._settled(pair, value) if number in settled else value
            entered.append(value.replace(pending=(), products=frozenset(), **const))
        return entered

    def _branches(
        self, pair: Pair, inner: Sequence[tuple[Subprogram, Subprogram]], ins: Sequence[Value]
    ) -> list[Value]:
        """`cond` and `switch`: one of several programs."""
        branches = [
            self._inside(pair, small, big, [ins[operand] for operand in big.operands]) for small, big in inner
        ]
        joined = []
        for values in zip(*branches, strict=True):
            alike = common(value.size for value in values) is not None
            joined.append(self._join(values if alike else [self._settled(pair, value) for value in values]))
        for number, value in enumerate(joined):
            for branch in branches:
                if value.kind == "data":
                    self.becomes_data(pair, branch[number])
                else:
                    self.decide(branch[number])
        return joined

    @staticmethod
    def _join(values: Sequence[Value]) -> Value:
        """What is known of a value that is one of several."""
        first = values[0]
        kind = widest(value.kind for value in values)
        views = tuple(dict.fromkeys(view for value in values for view in value.views))
        const = first.const if all(value.const == first.const for value in values) else None
        size = common(value.size for value in values) or UNKNOWN
        return Value(first.shape, first.base, kind, const, views if kind == "param" else (), size)

    def _settled(self, pair: Pair, value: Value) -> Value:
        return dataclasses.replace(value, size=self.settle(pair.place, value))


def _last_line(program: ClosedJaxpr) -> JaxprEqn | None:
    """Where the program's outputs are made."""
    return program.jaxpr.eqns[-1] if program.jaxpr.eqns else None


def _same_facts(a: Value, b: Value) -> bool:
    if (a.kind, a.const, set(a.views)) != (b.kind, b.const, set(b.views)):
        return False
    if a.size.total is None or b.size.total is None:
        return a.size.total is b.size.total
    return same(a.size.total, b.size.total) and a.size.origins == b.size.origins


def _closed_over(base: Any, target: Any, exact: bool) -> Value:
    """An array that the program closes over: folded if it is the same number throughout."""
    shape = tuple(np.shape(target))
    base_shape = fit(tuple(np.shape(base)), shape)
    numbers = _number(base), _number(target)
    if numbers[0] is None or numbers[1] is None:
        # Values made by numpy for an initialiser: they hold whatever scale their maker gave them.
        unknown = exact and not _identical(base, target)
        return Value(shape, base_shape, "const", size=UNKNOWN if unknown else ONE)
    return constant(numbers[0], numbers[1], shape, base_shape)


def _identical(base: Any, target: Any) -> bool:
    if isinstance(base, Tracer) or isinstance(target, Tracer):
        return base is target
    if np.shape(base) != np.shape(target) or jnp.issubdtype(base.dtype, jax.dtypes.prng_key):
        return np.shape(base) == np.shape(target)
    return np.array_equal(np.asarray(base), np.asarray(target))


def _number(array: Any) -> float | None:
    """The one number that an array holds throughout, if it is small and known."""
    if isinstance(array, Tracer) or not 0 < np.size(array) <= _SMALL:
        return None
    if not (jnp.issubdtype(array.dtype, jnp.number) or jnp.issubdtype(array.dtype, jnp.bool_)):
        return None
    entries = np.asarray(array)
    first = entries.flat[0]
    return float(first) if (entries == first).all() and np.isrealobj(entries) else None


def _literal(base: jex.Literal, target: jex.Literal) -> Value:
    if np.iscomplexobj(base.val) or np.iscomplexobj(target.val):
        return Value((), (), "const", size=Size(ratio(abs(base.val), abs(target.val))))
    try:
        return constant(float(base.val), float(target.val))
    except (TypeError, ValueError):
        return Value((), (), "const")


def _read_one(atom: Atom, env: dict[Any, Value]) -> Value:
    return _literal(atom, atom) if isinstance(atom, jex.Literal) else env[atom]


def _read(b: Atom, t: Atom, small: dict[Any, Value], big: dict[Any, Value]) -> Value:
    if isinstance(b, jex.Literal) and isinstance(t, jex.Literal):
        return _literal(b, t)
    one, other = _read_one(b, small), _read_one(t, big)
    if one is other:
        return other
    if one.const is not None and other.const is not None:
        return constant(one.const[0], other.const[1], other.shape, other.base)
    return other


def _match(b: JaxprEqn, t: JaxprEqn, small: dict[Any, Value], big: dict[Any, Value]) -> list[Value] | None:
    """The operands of two equations if these play the same part, else None."""
    if b.primitive.name != t.primitive.name or len(b.invars) != len(t.invars):
        return None
    if len(b.outvars) != len(t.outvars):
        return None
    ins: list[Value] = []
    for x, y in zip(b.invars, t.invars, strict=True):
        one, other = _read_one(x, small), _read_one(y, big)
        known = one.const is not None and other.const is not None
        if not (known or one.root == other.root or (one.kind == other.kind == "const")):
            return None
        ins.append(_read(x, y, small, big))
    if _wiring(b) != _wiring(t):
        return None
    if _same_rank(b, t) and any(b.params.get(k) != t.params.get(k) for k in _STRUCTURE):
        return None
    return ins


_STRUCTURE = ("dimension_numbers", "permutation", "axes", "dimension")
"""Parameters of equations that hold axes, not sizes."""


def _wiring(eqn: JaxprEqn) -> list[tuple[Any, ...]]:
    """How the programs in an equation are wired to it."""
    return [(one.kind, one.operands, one.results, one.carried, one.sliced) for one in subprograms(eqn)]


def _same_rank(b: JaxprEqn, t: JaxprEqn) -> bool:
    return all(len(_shape(x.aval)) == len(_shape(y.aval)) for x, y in zip(b.invars, t.invars, strict=True))


def _is_trivial(eqn: JaxprEqn) -> bool:
    """Whether an equation only adds or removes axes of size 1."""
    if eqn.primitive.name not in RESHAPES | IDENTITIES or len(eqn.invars) != 1:
        return False
    before, after = _shape(eqn.invars[0].aval), _shape(eqn.outvars[0].aval)
    if eqn.primitive.name == "transpose":
        moved = [axis for axis in eqn.params["permutation"] if before[axis] != 1]
        return moved == sorted(moved)
    return [size for size in before if size != 1] == [size for size in after if size != 1]


def _reshaped(value: Value, shape: Shape) -> Value:
    """The value after a trivial reshape that the base's program does not have."""
    base = fit(value.base, shape)
    rest = [axis for axis, size in enumerate(value.shape) if size != 1]
    order = iter(rest)
    keep = [next(order, None) if size != 1 else None for size in shape]

    def move(view: View) -> View:
        axes = tuple(() if axis is None else view.axes[axis] for axis in keep)
        return dataclasses.replace(view, axes=axes)

    return dataclasses.replace(
        value,
        shape=shape,
        base=base,
        views=tuple(move(view) for view in value.views),
        pending=tuple(Pending(p.use, move(p.view)) for p in value.pending),
    )


def resized(value: Value, shape: Shape, base: Shape) -> Value:
    """The value as a program sees that holds a shard of it: same axes, other sizes."""
    if (value.shape, value.base) == (shape, base) or len(value.shape) != len(shape):
        return value

    def shrink(axis: Axis, size: int, small: int) -> Axis:
        return (Factor(axis[0].axis, size, small),) if len(axis) == 1 else ()

    def move(view: View) -> View:
        axes = tuple(
            axis if (size, small) == old else shrink(axis, size, small)
            for axis, size, small, old in zip(
                view.axes, shape, base, zip(value.shape, value.base, strict=True), strict=True
            )
        )
        return dataclasses.replace(view, axes=axes)

    return dataclasses.replace(
        value,
        shape=shape,
        base=base,
        views=tuple(move(view) for view in value.views),
        pending=tuple(Pending(p.use, move(p.view)) for p in value.pending),
    )


def _strip(value: Value) -> Value:
    """One slice of what a scan runs over: its leading axis is a stack of copies."""

    def strip(view: View) -> View:
        stack = {factor.axis for factor in view.axes[0] if factor.axis is not None}
        return dataclasses.replace(view, axes=view.axes[1:], stack=view.stack | stack)

    return value.replace(
        shape=value.shape[1:],
        base=value.base[1:],
        views=tuple(strip(view) for view in value.views),
        pending=tuple(Pending(p.use, strip(p.view)) for p in value.pending),
    )


def _unstrip(value: Value, shape: Shape, base: Shape) -> Value:
    """What a scan collects: a leading axis of copies is added."""
    lead = broadcast_axis(shape[0], base[0])

    def stack(view: View) -> View:
        return dataclasses.replace(view, axes=(lead, *view.axes))

    return value.replace(
        shape=shape,
        base=base,
        const=value.const,
        views=tuple(stack(view) for view in value.views),
        pending=tuple(Pending(p.use, stack(p.view)) for p in value.pending),
    )


def _mismatch(b: JaxprEqn | None, t: JaxprEqn | None) -> TraceMismatchError:
    def name(eqn: JaxprEqn | None) -> str:
        if eqn is None:
            return "the end of the program"
        shapes = ", ".join(str(_shape(v.aval)) for v in eqn.invars)
        return f"{eqn.primitive.name} on {shapes} at {where(eqn)}"

    return TraceMismatchError(
        f"the programs of base and target must differ in sizes only; the base has {name(b)}, the target "
        f"{name(t)}. Use a larger base (no axis of size 1, no other branch on a size), so that the model's "
        "code takes the same path at both widths."
    )
