"""Analysis of a pair of programs: of two calls, and of two initialisers."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jax.extend import core as jex

from mujax.core.program import LAYOUT, ClosedJaxpr, EqnPath, Var, rebuilt
from mujax.core.trace._interpreter import Interpreter
from mujax.core.trace._uses import Finding, Fix, Flow, Product, Record, Use
from mujax.core.trace._values import Scale, Value, fit, parameter
from mujax.core.trace.primitives import ELEMENTWISE, PRIMITIVES
from mujax.errors import TraceMismatchError


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What is read off a pair of programs.

    Attributes:
        uses: per parameter path, its uses in program order.
        products: products of two activations.
        output_params: parameters whose product is an output of the program.
        last_params: parameters of whose product an output is an entrywise function, or that goes into an
            exponential as the logits of a softmax do.
        activations: per product, which of its operands is an activation.
        flow: which value is computed from which.
        fixes: what scales with width through constants in the program, and what would correct it.
        unscaled: products of readouts that must not get a factor.
        findings: places that cannot be corrected.
        scales: how values scale, target over base, that are neither corrected nor reported: a sum over the
            width that something which grows as much is divided by later, a returned vector of unit norm.
    """

    uses: Mapping[str, Sequence[Use]]
    products: Sequence[Product]
    output_params: Sequence[str]
    last_params: Sequence[str]
    activations: Mapping[EqnPath, int]
    flow: Flow
    fixes: Sequence[Fix]
    unscaled: frozenset[EqnPath]
    findings: Sequence[Finding]
    scales: Mapping[EqnPath, float]


def analyse(
    base: ClosedJaxpr,
    target: ClosedJaxpr,
    params: Mapping[int, str],
    state: Mapping[int, float] | None = None,
    prescribed: Mapping[str, float] | None = None,
) -> Analysis:
    """Follows every parameter through the forward programs of base and target.

    Args:
        base: the base's program.
        target: the target's program.
        params: which inputs are parameters, by position, and their paths.
        state: which inputs are other state of the model (batch statistics, stored constants), by position,
            and how their entries scale, target over base.
        prescribed: how the entries of each parameter scale as the parametrization has them, target over
            base; needed for `fixes` and `findings` of models that normalise their weights.

    Raises:
        TraceMismatchError: the programs differ in more than sizes.
        ShapeMismatchError: an axis that is looked up by index grows.
    """
    inputs, shapes = [], {}
    for position, (small, big) in enumerate(zip(base.jaxpr.invars, target.jaxpr.invars, strict=True)):
        shape = tuple(getattr(big.aval, "shape", ()))
        base_shape = fit(tuple(getattr(small.aval, "shape", ())), shape)
        path = params.get(position)
        if path is None:
            stored = (state or {}).get(position)
            scale = Scale(1.0 if stored is None else stored)
            raw = stored is not None or shape == base_shape
            inputs.append(Value(shape, base_shape, "data", scale=scale, state=stored is not None, raw=raw))
        else:
            shapes[path] = (shape, base_shape)
            scale = Scale((prescribed or {}).get(path, 1.0))
            inputs.append(parameter(path, shape, base_shape, scale))

    def walk(sums: frozenset[EqnPath], fixed: Mapping[EqnPath, Fix]) -> Record:
        interpreter = Interpreter(PRIMITIVES, shapes, prescribed, sums=sums, fixed=fixed)
        interpreter.run(base, target, inputs)
        return interpreter.record

    sums: frozenset[EqnPath] = frozenset()
    first = walk(sums, {})
    if prescribed and (sums := first.sums()):
        # Whether `(x * kernel).sum()` is a product or a gain and a mean shows only at the end.
        first = walk(sums, {})
    record = first
    fixed: dict[EqnPath, Fix] = {}
    together = True
    while fixes := record.unforeseen(fixed):
        fixed |= fixes if together else dict([min(fixes.items())])
        record = walk(sums, fixed)
        if together and record.misfits:
            # One of them changes what another is for: one after the other.
            record, fixed, together = first, {}, False
    uses: dict[str, list[Use]] = collections.defaultdict(list)
    for use in record.resolved_uses():
        uses[use.path].append(use)
    return Analysis(
        dict(uses),
        list(record.products.values()),
        list(record.output_params),
        list(dict.fromkeys((*record.output_params, *record.exponents, *_sources(record.flow)))),
        record.activations,
        record.flow,
        record.undisputed_fixes(),
        frozenset(record.unscaled),
        list(record.findings.values()),
        record.kept_scales(),
    )


def _sources(flow: Flow) -> dict[str, None]:
    """The parameters whose product an output of the program is an entrywise function of."""
    found: dict[str, None] = {}
    seen: set[EqnPath | None] = set()
    left = list(flow.outputs)
    while left:
        site = left.pop()
        if site is None or site in seen or (visit := flow.visits.get(site)) is None:
            continue
        seen.add(site)
        products = [use.path for use in visit.uses if use.kind == "contraction"]
        found |= dict.fromkeys(products)
        if not products and (visit.eqn is None or visit.eqn.primitive.name in ELEMENTWISE.keys() | LAYOUT):
            left.extend(operand.origin for operand in visit.operands)
    return found


def flow_of(program: ClosedJaxpr) -> Flow:
    """Which value of an initialiser is computed from which."""
    _, flow = _initial(program, program)
    return flow


class InitialValues(NamedTuple):
    """The properties of one output of an initialiser, read from its program.

    Attributes:
        ratio: entries of the target over those of the base; 0 for identically zero, None where it does not
            show.
        mean: the mean of the target's entries; None where it does not show.
        mean_ratio: their mean over the mean of the base's, where it scales unlike the entries; `ratio` is
            that of their deviation then.
    """

    ratio: float | None
    mean: float | None
    mean_ratio: float | None = None


def read_initial_values(base: ClosedJaxpr, target: ClosedJaxpr) -> list[InitialValues]:
    """How the outputs of two initialisers scale, and the mean of the target's."""
    try:
        return [InitialValues(value.scale.total, _mean(value)) for value in _initial(base, target)[0]]
    except TraceMismatchError:
        count = len(target.jaxpr.outvars)
        if count == 1:
            return [InitialValues(None, None)]
        # One initialiser that branches on a size must not cost all the others their exactness.
        halves = (slice(0, count // 2), slice(count // 2, count))
        return [
            values
            for half in halves
            for values in read_initial_values(_only(base, half), _only(target, half))
        ]


def _mean(value: Value) -> float | None:
    if value.const is not None:
        return value.const[1]
    return None if value.spread is None else value.spread.mean


def read_constants(base: ClosedJaxpr, target: ClosedJaxpr) -> list[float | None]:
    """How those outputs of two initialisers scale that are one known number; None for the others."""
    try:
        return [value.scale.total if value.const else None for value in _initial(base, target)[0]]
    except TraceMismatchError:
        return [None] * len(target.jaxpr.outvars)


def _initial(base: ClosedJaxpr, target: ClosedJaxpr) -> tuple[list[Value], Flow]:
    """The outputs of two initialisers, and how the values flow to them."""
    inputs = [
        Value(shape := _shape(big), fit(_shape(small), shape), "data")
        for small, big in zip(base.jaxpr.invars, target.jaxpr.invars, strict=True)
    ]
    interpreter = Interpreter(PRIMITIVES, {}, exact=True)
    outs = interpreter.run(base, target, inputs)
    return outs, interpreter.record.flow


def _only(program: ClosedJaxpr, which: slice) -> ClosedJaxpr:
    """The program with some of its outputs, and nothing that they do not need."""
    jaxpr = program.jaxpr
    outs = jaxpr.outvars[which]
    needed = {atom for atom in outs if not isinstance(atom, jex.Literal)}
    eqns = []
    for eqn in reversed(jaxpr.eqns):
        if not needed.isdisjoint(eqn.outvars):
            eqns.append(eqn)
            needed.update(atom for atom in eqn.invars if not isinstance(atom, jex.Literal))
    return rebuilt(
        jaxpr,
        constvars=jaxpr.constvars,
        consts=program.consts,
        invars=jaxpr.invars,
        outvars=outs,
        eqns=eqns[::-1],
    )


def _shape(var: Var) -> tuple[int, ...]:
    return tuple(getattr(var.aval, "shape", ()))
