"""The abstract interpreter: walks the programs of base and target side by side.

Two programs that differ in widths only have the same equations in the same order. The interpreter pairs
them up, carries a `Value` per intermediate array and records each use of a parameter. What a primitive does
to a value is a rule in `primitives/`; this module owns the walk, the record and the control flow.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from mujax.core.program import (
    ClosedJaxpr,
    EqnPath,
    Jaxpr,
    JaxprEqn,
    Subprogram,
    Var,
    is_float,
    is_library_function,
    primitive_name,
    shape_of,
    source_line,
    subprograms,
)
from mujax.core.trace._align import (
    add_leading,
    closed_over,
    is_trivial,
    last_equation,
    match_operands,
    mismatch_error,
    read_one,
    read_pair,
    reshaped_value,
    resized,
    strip_leading,
)
from mujax.core.trace._parity import INDEPENDENT, Parity, sum_of
from mujax.core.trace._spread import Spread, spread_of_result
from mujax.core.trace._uses import (
    AxisRole,
    Finding,
    Fix,
    Loop,
    Operand,
    Pair,
    Product,
    Record,
    Use,
    UseKind,
    Visit,
    paired_shapes,
)
from mujax.core.trace._values import (
    NORMALISED_READOUT,
    ONE,
    UNKNOWN,
    ZERO,
    Factor,
    Scale,
    Shape,
    Value,
    View,
    common,
    same,
    widest,
)
from mujax.errors import TraceMismatchError

_TOLERANCE = 1e-6


Rule = Callable[["Interpreter", Pair, Sequence[Value]], Sequence[Value]]


class Interpreter:
    """Walks a pair of programs and records the uses of parameters.

    Args:
        rules: what each primitive does, by name.
        shapes: (target, base) shape of each parameter.
        prescribed: how the entries of each parameter scale, target over base, as the program gets them;
            1 where left out.
        exact: whether sizes must be exact, as for the program of an initialiser: there a nonlinear
            function of what scales is unknown, and nothing is corrected.
        sums: where an earlier walk found that a sum is a product with a parameter.
        fixed: what an earlier walk corrected, and this one corrects from the start.

    Attributes:
        exact: as given.
        scales_are_known: whether the parameters' scales are those that the parametrization prescribes.
        record: the results of the walk.
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
        self.scales_are_known = bool(prescribed)
        self.known_sums = sums
        self._fixed = fixed or {}
        self._rules = rules
        self._param_shapes = shapes
        self._prescribed = prescribed or {}
        self._caller: tuple[JaxprEqn, Jaxpr] | None = None
        self.record = Record(fixes=dict(self._fixed))

    # ---- the record -------------------------------------------------------------------------------

    def _log(self, use: Use, decided: bool) -> int:
        self.record.uses.append(use)
        self.record.decided.append(decided)
        return len(self.record.uses) - 1

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
        signs: Parity = INDEPENDENT,
        site: EqnPath | None = None,
    ) -> int:
        """Records a use of the parameter that `view` shows.

        Args:
            pair: the equation.
            view: the parameter's layout in the operand.
            kind: how it is used.
            fan_in: axes of the operand that are contracted.
            stack: axes of the operand that are batch axes of the product.
            picked: role of the axes from which one entry was picked by index.
            contracted: (base, target) size of the contracted axes.
            decided: whether nothing that follows can change its kind.
            signs: the parity, in other parameters, of what multiplies its entries in the product.
            site: where a factor for this parameter belongs, where that is not the equation.

        Returns:
            The number of the use, for `decide` and `contract_later`.
        """
        return self._log(
            Use(
                view.path,
                # A norm or a mean of a parameter shows nothing of the axis that it is over.
                "opaque" if view.reduced else "statistic" if view.thinned else kind,
                tuple(self._axes(view, fan_in, stack, picked)),
                site or pair.site,
                contracted,
                pair.place,
                view.part,
                signs,
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

    def decide(self, value: Value) -> None:
        """Confirms the undecided uses that `value` is linear in: it is consumed by something else."""
        for pending in value.pending:
            self.record.decided[pending.use] = True

    def contract_later(self, pair: Pair, value: Value, axes: Sequence[int]) -> bool:
        """Records that these axes of `value` are now contracted, for the undecided uses in it.

        Returns:
            Whether the contraction touches an axis of such a parameter.
        """
        touched = False
        for pending in value.pending:
            if pending.product:
                continue
            mine = [axis for axis in axes if any(f.axis is not None for f in pending.view.axes[axis])]
            if not mine:
                continue
            touched = True
            kept = [n for n in range(len(pending.view.axes)) if n not in mine]
            batch = [n for n in kept if pending.view.parameter_axes([n]) & pending.shared]
            use = Use(
                pending.view.path,
                "contraction",
                tuple(self._axes(pending.view, mine, batch, "stack")),
                pair.site,
                value.sizes(mine),
                pair.place,
            )
            self.record.contractions.setdefault(pending.use, []).append(use)
        return touched

    def copies(self, value: Value, batch: Sequence[int]) -> None:
        """Notes that these axes of an activation are a batch of a product with a parameter.

        Where they are axes of the kernel that the activation comes from, as those of experts are, that kernel
        is as many matrices as the next one. Groups of features that are more in a wider model are its width.
        """
        for pending in value.pending:
            axes = pending.view.parameter_axes(batch)
            rest = [axis for axis in range(value.ndim) if axis not in batch]
            groups = any(factor.grows for axis in batch for factor in pending.view.axes[axis])
            wide = any(factor.grows for axis in rest for factor in pending.view.axes[axis])
            if pending.product and (wide or not groups):
                known = self.record.copies.get(pending.use, frozenset())
                self.record.copies[pending.use] = known | axes

    def is_kernel(self, use: int) -> None:
        """Records that an undecided use was contracted as a kernel, whatever else is computed from it."""
        self.record.kernels.add(use)

    def becomes_data(self, pair: Pair, value: Value) -> None:
        """A function of parameters meets the data elementwise: all its axes are fan-out."""
        if value.kind == "param":
            for view in value.views:
                self.use(pair, view, "lookup" if view.picked else "elementwise")
        self.decide(value)

    def opaque(self, pair: Pair, value: Value) -> None:
        """Something that cannot be followed consumes the value."""
        if value.kind == "param":
            for view in value.views:
                self.use(pair, view, "opaque")
        self.decide(value)

    def product(self, pair: Pair, contracted: tuple[int, int], left: Value, right: Value) -> None:
        """Records a product of two activations."""
        self.record.products[pair.site] = Product(
            pair.site, contracted, left.linear_in, right.linear_in, pair.place
        )

    def logits(self, value: Value) -> None:
        """Records that a value goes into an exponential."""
        self.record.exponents.update(dict.fromkeys(sorted(value.linear_in)))
        for site in value.products:
            self.record.products[site] = dataclasses.replace(self.record.products[site], logits=True)

    # ---- scales ------------------------------------------------------------------------------------

    def scale_at(self, pair: Pair, scale: Scale, *operands: Scale) -> Scale:
        """The scale of an equation's result, with the place where its scale left 1."""
        fix = self._fixed.get(pair.site)
        if fix is not None:
            scale = scale.scaled(fix.factor)
            if not scale.is_one:
                self.record.misfits.add(pair.site)
        out = scale.at(pair.site, *operands)
        # Where a sum brings it back to 1, it is the scale without a fix that does.
        self.record.unfixed |= (scale.through | scale.origins) - out.origins - {pair.site}
        if pair.site in out.origins:
            self.record.places[pair.site] = pair.place
        return out

    def scale_against_prescribed(self, value: Value) -> Scale:
        """The scale that an operand brings to the data.

        A parameter brings its scale relative to what the parametrization prescribes for it: the rules make
        a product with a parameter of the prescribed scale come out at 1. An array that the program closes
        over is of order one.
        """
        if value.kind == "data" or value.const is not None:
            return value.scale
        if value.kind == "const":
            return value.scale if value.scale.total == 0 or self.exact else ONE
        scales = {
            self._prescribed.get(view.path, 1.0)
            for view in value.views
            if not (view.reduced or view.inner or view.bent)
        } - {1.0}
        if value.scale.total is None or len(scales) > 1:
            return UNKNOWN
        if value.scale.total == 0:
            return ZERO
        scale = Scale(value.scale.total / (scales.pop() if scales else 1.0))
        return ONE if scale.is_one else scale

    def require_order_one(self, place: JaxprEqn | None, value: Value, report: bool = True) -> Scale:
        """Requires entries of order one: inserts a correction, or records a finding.

        Constants that scale with width are held at the base's value. A coherent sum that is divided by
        the root of its length (attention logits) is divided by its length; a value that was divided by a
        norm gets back its scale. Anything else is reported, and so is a sum with a layer before the division.

        Args:
            place: the equation that consumes it; None at the end of a program without equations.
            value: the value.
            report: whether to record what cannot be corrected; else it may still cancel later.

        Returns:
            Its scale from here on.
        """
        scale = value.scale
        if self.exact or value.kind != "data" or scale.total is None or scale.is_one:
            return scale
        if value.state:
            # A step of a power iteration: it computes a norm, and must compute the same norm.
            return UNKNOWN
        if scale.nearly_one:
            return ONE
        constants = scale.total / scale.summed
        attention = abs(scale.degree - 1) < _TOLERANCE
        if attention:
            known = (
                scale.summed != 1
                and not scale.behind
                and -0.98 < math.log(constants) / math.log(scale.summed) < -0.02
            )
        else:
            known = abs(scale.degree) < _TOLERANCE or scale.normalised
        if not (known or report):
            return scale
        for site in scale.origins:
            if known:
                self._fix(site, 1 / scale.total, attention)
            else:
                eqn = self.record.places[site]
                # The first of those that it was computed from, in the order of the program.
                begin = next((s for s in self.record.places if s in scale.through), site)
                since = source_line(self.record.places[begin])
                start = "" if since == source_line(eqn) else f" (the growth starts at {since})"
                self.find(
                    "unscaled sum" if same(constants, 1.0) else "unknown scale",
                    site,
                    eqn,
                    f"the result of {eqn.params.get('name') or eqn.primitive.name} grows {scale.total:.4g} "
                    "times from base to target where it is used at "
                    f"{source_line(place) if place else 'the end'}{start}, and its factor fits no known "
                    "pattern (a mean, 1/sqrt(d), 1/d); write a factor in the model, so that it does not grow "
                    "with width (for attention logits with_multipliers(attention_mult=...) will do)",
                )
        return ONE

    def _fix(self, site: EqnPath, factor: float, attention: bool) -> None:
        known = self.record.fixes.get(site)
        if known is None:
            self.record.fixes[site] = Fix(site, factor, attention, self.record.places[site])
        elif not same(known.factor, factor):
            self.record.disputed.add(site)
            self.find(
                "disputed scale",
                site,
                known.eqn,
                f"its result is used at two sizes, which require the factors {known.factor:.4g} and "
                f"{factor:.4g}; compute the two uses from separate products",
            )

    def scale_noise(self, pair: Pair, operand: int, factor: float) -> None:
        """Records a factor on noise that is added to a kernel, so that it scales as the kernel does."""
        self.record.noise[pair.site] = Fix(pair.site, factor, False, pair.place, operand)

    def find(self, kind: str, site: EqnPath, eqn: JaxprEqn, message: str) -> None:
        """Records something that cannot be corrected."""
        self.record.findings[kind, site] = Finding(kind, message, source_line(eqn))

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
        flow = self.record.flow
        for number, (value, var) in enumerate(zip(inputs, target.jaxpr.invars, strict=True)):
            self._makes(value, var, ("input", number), ())
        outs = self._program(base, target, inputs, ())
        flow.outputs[:] = [value.origin for value in outs]
        for value in outs:
            if value.kind == "param" and value.raw:
                self.becomes_data(Pair(base.jaxpr.eqns[-1], target.jaxpr.eqns[-1], ()), value)
            self.decide(value)
            # Vectors of unit norm may be outputs: what is computed from them is not in this program.
            if not value.scale.normalised:
                self.require_order_one(last_equation(target), value)
            self.record.output_params.update(dict.fromkeys(sorted(value.linear_in)))
        return outs

    def _program(
        self, base: ClosedJaxpr, target: ClosedJaxpr, inputs: Sequence[Value], site: EqnPath
    ) -> list[Value]:
        if len(base.consts) != len(target.consts):
            raise TraceMismatchError(
                expected="programs of base and target that close over the same arrays",
                got=f"{len(base.consts)} in the base and {len(target.consts)} in the target",
                remedy="use a larger base, so that the model's code takes the same path at both widths",
            )
        consts = [
            closed_over(small, big, self.exact) for small, big in zip(base.consts, target.consts, strict=True)
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
            if b is not None and t is not None and (ins := match_operands(b, t, small, big)) is not None:
                outs = self._eqn(Pair(b, t, (*site, j), self._caller), ins)
                for env, eqn in ((small, b), (big, t)):
                    env.update(zip(eqn.outvars, outs, strict=True))
                i, j = i + 1, j + 1
            elif b is not None and is_trivial(b):
                small[b.outvars[0]] = read_one(b.invars[0], small)
                i += 1
            elif t is not None and is_trivial(t):
                value = read_one(t.invars[0], big)
                big[t.outvars[0]] = reshaped_value(value, shape_of(t.outvars[0]))
                j += 1
            else:
                raise mismatch_error(b, t)
        return [
            read_pair(b, t, small, big) for b, t in zip(base.jaxpr.outvars, target.jaxpr.outvars, strict=True)
        ]

    def _eqn(self, pair: Pair, ins: Sequence[Value]) -> Sequence[Value]:
        rule = self._rules.get(pair.name)
        inner = () if rule else tuple(zip(subprograms(pair.base), subprograms(pair.target), strict=True))
        if inner:
            self.record.flow.control[pair.site] = pair.target
            outs = self._control(pair, inner, ins)
        else:
            first = len(self.record.uses)
            outs = rule(self, pair, ins) if rule else self.unknown(pair, ins)
            for value in outs:
                value.origin = pair.site
                if value.kind == "param":
                    value.raw = any(v.raw or v.state for v in ins)
                elif value.kind == "data":
                    value.raw = all(v.kind == "const" or (v.kind == "data" and v.raw) for v in ins)
            if self.exact or all(value.kind == "data" and value.raw for value in outs):
                spread = self._spread(pair, ins)
                for value in outs:
                    value.spread = None if value.const else spread
                    if value.spread and value.spread.is_centred and not self.exact:
                        value.parity = _sign_of_noise(pair, ins)
            self._note_scale(pair.site, outs)
            self.record.flow.visits[pair.site] = Visit(
                pair.target,
                tuple(map(_operand, ins)),
                widest(value.kind for value in outs),
                tuple(self.record.uses[first:]),
            )
        if any(value.state for value in ins) and all(value.state or value.kind != "data" for value in ins):
            for value in outs:
                value.state = value.kind == "data"
        return outs

    def _note_scale(self, site: EqnPath, outs: Sequence[Value]) -> None:
        """Records how a result scales."""
        self.record.scales.pop(site, None)
        if len(outs) == 1 and outs[0].kind == "data" and outs[0].scale.total and not outs[0].scale.is_one:
            self.record.scales[site] = outs[0].scale.total, outs[0].scale.origins

    def _makes(self, value: Value, var: Var, site: EqnPath, sources: Sequence[Value]) -> None:
        """Records a value that no equation makes."""
        value.origin = None
        if is_float(var):
            value.origin = site
            self.record.flow.visits[site] = Visit(None, tuple(map(_operand, sources)), value.kind)

    def _control(
        self, pair: Pair, inner: Sequence[tuple[Subprogram, Subprogram]], ins: Sequence[Value]
    ) -> Sequence[Value]:
        match [big.kind for _, big in inner]:
            case ["call"]:
                return self._call(pair, *inner[0], ins)
            case ["branch", *_]:
                return self._branches(pair, inner, ins)
            case _:
                return self._loop(pair, inner, ins)

    @staticmethod
    def _spread(pair: Pair, ins: Sequence[Value]) -> Spread | None:
        """How the results of an equation that draws or moves random numbers are distributed."""
        spreads = [Spread(v.const[1], 0.0) if v.const else v.spread for v in ins]
        return spread_of_result(pair.target, spreads)

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
            Value(shape, base, "const" if kind == "const" else "data", scale=UNKNOWN)
            for shape, base in pair.shapes()
        ]

    # ---- control flow ------------------------------------------------------------------------------

    def inside(self, pair: Pair, base: Subprogram, target: Subprogram, ins: Sequence[Value]) -> list[Value]:
        """Walks a program inside of an equation."""
        return self._program(base.program, target.program, ins, (*pair.site, target.step))

    def _call(self, pair: Pair, base: Subprogram, target: Subprogram, ins: Sequence[Value]) -> list[Value]:
        """`jit`, `remat`, `custom_jvp`, …: a program that is run once."""
        inner = target.program.jaxpr
        fitted = [
            # A shard has other sizes.
            resized(ins[operand], *paired_shapes(b, t))
            for operand, b, t in zip(target.operands, base.program.jaxpr.invars, inner.invars, strict=True)
        ]
        # The inside of a library's function is traced once and shared: its source lines may be those of
        # another call.
        caller = self._caller
        if pair.place is pair.target:
            self._caller = (pair.target, inner) if is_library_function(inner) else None
        outs = self.inside(pair, base, target, fitted)
        self._caller = caller
        return [resized(value, shape, base) for value, (shape, base) in zip(outs, pair.shapes(), strict=True)]

    def _loop(
        self, pair: Pair, inner: Sequence[tuple[Subprogram, Subprogram]], ins: Sequence[Value]
    ) -> list[Value]:
        """`scan` and `while`: the last program is the body, one before it the condition."""
        _, body = inner[-1]
        variables = body.program.jaxpr.invars
        carries = [body.operands[number] for number, _ in body.carried]
        starts = [ins[operand] for operand in carries]

        def place(number: int) -> EqnPath:
            return (*pair.site, body.step, "carry", number)

        def iteration(state: Sequence[Value]) -> list[Value]:
            for (number, _), value, start in zip(body.carried, state, starts, strict=True):
                self._makes(value, variables[number], place(number), [start])
            current = dict(enumerate(ins)) | dict(zip(carries, state, strict=True))
            outs: list[Value] = []
            for small, big in inner:
                given = [
                    strip_leading(current[operand]) if number in big.sliced else current[operand]
                    for number, operand in enumerate(big.operands)
                ]
                outs = self.inside(pair, small, big, given)
            return outs

        outs = self._fixpoint(pair, starts, iteration, len(carries))
        self.record.flow.loops[pair.site] = Loop(
            body.length,
            tuple(site for number, _ in body.carried if (site := place(number)) in self.record.flow.visits),
            tuple(value.origin for value in outs[: len(carries)] if value.origin is not None),
            tuple(
                layer for number in sorted(body.sliced) for layer in self._layers(ins[body.operands[number]])
            ),
        )
        return [
            add_leading(value, *pair.shapes()[result]) if number in body.stacked else value
            for number, (value, result) in enumerate(zip(outs, body.results, strict=True))
        ]

    def _layers(self, value: Value) -> list[tuple[str, int]]:
        """The parameters in a value that a loop scans over, and the axis of each that comes first, whole."""
        found = []
        for view in value.views if value.kind == "param" else ():
            shape, base = self._param_shapes[view.path]
            for axis, sizes in enumerate(zip(shape, base, strict=True)):
                if view.axes[0] == (Factor(axis, *sizes),):
                    found.append((view.path, axis))
        return found

    def _fixpoint(
        self,
        pair: Pair,
        state: Sequence[Value],
        body: Callable[[Sequence[Value]], list[Value]],
        carry: int,
    ) -> list[Value]:
        """Runs the body of a loop until the facts about its carry no longer change.

        A carry may have a scale of its own if the body keeps it; where it does not, the carry is
        corrected when it enters and after each step.
        """
        settled: set[int] = set()
        for value in state:
            self.decide(value)
        entered = self._entering(pair, state, settled)
        while True:
            before = self.record.copy()
            outs = body(entered)
            moved = {
                number
                for number, (a, b) in enumerate(zip(entered, outs[:carry], strict=True))
                if number not in settled and common([a.scale, b.scale]) is None
            }
            if moved:
                self.record = before
                settled |= moved
                entered = self._entering(pair, state, settled)
                continue
            outs[:carry] = [
                self._settled(pair, value) if number in settled else value
                for number, value in enumerate(outs[:carry])
            ]
            joined = [self.join([a, b]) for a, b in zip(entered, outs[:carry], strict=True)]
            if all(_same_facts(a, b) for a, b in zip(entered, joined, strict=True)):
                for value, out in zip(joined, outs[:carry], strict=True):
                    value.origin = out.origin
                    if value.kind == "data":
                        self.becomes_data(pair, out)
                return [*joined, *outs[carry:]]
            # What is said of a readout's norm holds in the first step, whatever later ones add to the carry.
            first = {key: one for key, one in self.record.findings.items() if key[0] == NORMALISED_READOUT}
            self.record = before
            self.record.findings.update(first)
            for entering, after in zip(entered, joined, strict=True):
                if after.kind == "data":
                    self.becomes_data(pair, entering)
            entered = joined

    def _entering(self, pair: Pair, state: Sequence[Value], settled: Collection[int]) -> list[Value]:
        """The carry of a loop as it enters, with the parts in `settled` corrected."""
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
            self.inside(pair, small, big, [ins[operand] for operand in big.operands]) for small, big in inner
        ]
        joined = []
        for values in zip(*branches, strict=True):
            alike = common(value.scale for value in values) is not None
            joined.append(self.join(values if alike else [self._settled(pair, value) for value in values]))
        for number, (value, var) in enumerate(zip(joined, pair.target.outvars, strict=True)):
            self._makes(value, var, (*pair.site, "join", number), [branch[number] for branch in branches])
            for branch in branches:
                if value.kind == "data":
                    self.becomes_data(pair, branch[number])
                else:
                    self.decide(branch[number])
        return joined

    @staticmethod
    def join(values: Sequence[Value]) -> Value:
        """The facts that hold for each of several values."""
        first = values[0]
        kind = widest(value.kind for value in values)
        views = tuple(dict.fromkeys(view for value in values for view in value.views))
        const = first.const if all(value.const == first.const for value in values) else None
        scale = common(value.scale for value in values) or UNKNOWN
        out = Value(first.shape, first.base, kind, const, views if kind == "param" else (), scale)
        if kind == "param":
            out.parity = sum_of(value.sign for value in values)
        out.power = first.power if all(value.power == first.power for value in values) else None
        out.raw = (any if kind == "param" else all)(value.raw or value.kind == "const" for value in values)
        return out

    def _settled(self, pair: Pair, value: Value) -> Value:
        return dataclasses.replace(value, scale=self.require_order_one(pair.place, value))


def _sign_of_noise(pair: Pair, ins: Sequence[Value]) -> Parity:
    """The parity of random numbers of mean zero: of those that they are computed from, or their own."""
    known = [value.parity for value in ins if value.parity is not None]
    return sum_of(known) if known else Parity.of(f"noise at {pair.site}")


def _operand(value: Value) -> Operand:
    return Operand(value.kind, value.const, value.origin)


def _same_facts(a: Value, b: Value) -> bool:
    if (a.kind, a.const, set(a.views), a.raw, a.power) != (b.kind, b.const, set(b.views), b.raw, b.power):
        return False
    if a.scale.total is None or b.scale.total is None:
        return a.scale.total is b.scale.total
    return same(a.scale.total, b.scale.total) and a.scale.origins == b.scale.origins
