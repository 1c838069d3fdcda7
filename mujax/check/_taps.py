"""Taps: the places where a model's activations are read to check its parametrization.

A tap is an equation of the traced program: each product with a parameter, lookup, bias and gain, each
product of two activations, each norm, and each output. A module that is called twice has a tap for each
call; one in a scan has one for all iterations.
"""

import collections
import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jax.extend import core as jex

from mujax.core.program import (
    IDENTITIES,
    PRODUCTS,
    RESHAPES,
    ClosedJaxpr,
    EqnPath,
    Jaxpr,
    JaxprEqn,
    Var,
    equation_at,
    equations,
    program_at,
    scope,
    source_line,
    subprograms,
    tappable,
)
from mujax.core.trace import Analysis, Operand, Use, axes_of_use
from mujax.spec import ParamSpec

TapKind = Literal["product", "readout", "lookup", "vector", "logits", "mixing", "norm", "output"]

FALLS_AT_FIRST: frozenset[TapKind] = frozenset({"readout", "logits", "output"})
"""Kinds that may fall as one over the root of the width at initialisation: sums of independent terms over a
growing axis, divided by its length."""


@dataclasses.dataclass(frozen=True)
class Tap:
    """A place where activations are read.

    Attributes:
        name: module path or parameter; unique.
        kind: `"product"`: with a parameter, of growing or finite fan-in; `"readout"`: with a parameter,
            from a growing axis to a finite one; `"lookup"`; `"vector"`: a bias is added or a gain
            multiplied; `"logits"`: a product of two activations on its way to a softmax; `"mixing"`: any
            other product of two activations; `"norm"`: what goes into a normalisation; `"output"`.
        site: the equation; None for an output of the program.
        where: `file:line` in the user's code.
        params: the parameters that it multiplies, adds or looks up.
        operand: which operand is made of parameters (in a product of two activations: the first); -1
            where the change cannot be split.
        output: number of the output, if it is one.
        reads: the operand whose size is looked at; None for the equation's result.
    """

    name: str
    kind: TapKind
    site: EqnPath | None
    where: str
    params: tuple[str, ...] = ()
    operand: int = -1
    output: int | None = None
    reads: int | None = None

    @property
    def falls_at_first(self) -> bool:
        """Whether it may fall as one over the root of the width at initialisation."""
        return self.kind in FALLS_AT_FIRST


def find_taps(
    program: ClosedJaxpr, analysis: Analysis, params: Mapping[str, ParamSpec], outputs: Sequence[str]
) -> tuple[Tap, ...]:
    """The taps of a program, in its order.

    Args:
        program: the target's program.
        analysis: of base and target, which must differ in width, so that growing axes are known.
        params: the parameters, whose shapes show which of their axes grow.
        outputs: names of the outputs to read.
    """
    found: dict[EqnPath, Tap] = {}
    eqns = dict(equations(program))
    uses: dict[EqnPath, list[Use]] = collections.defaultdict(list)
    for of_param in analysis.uses.values():
        for use in of_param:
            uses[use.site].append(use)
    for site, here in uses.items():
        if kind := _kind(here, params):
            paths = tuple(dict.fromkeys(use.path for use in here))
            operand = _param_operand(eqns[site], analysis.flow.operands(site))
            found[site] = Tap(paths[0], kind, site, here[0].where, paths, operand)
    for product in analysis.products:
        kind = "logits" if product.logits else "mixing"
        eqn = eqns[product.site]
        operand = 0 if eqn.primitive.name in _BILINEAR else -1
        name = _module(eqn) or product.where
        found[product.site] = Tap(f"{name} {kind}", kind, product.site, product.where, (), operand)
    for site, reads in _norms(program, analysis):
        if site not in found:
            name = _module(eqns[site]) or source_line(eqns[site])
            found[site] = Tap(f"{name} norm", "norm", site, source_line(eqns[site]), reads=reads)
    order = {site: number for number, site in enumerate(eqns)}
    taps = [
        found[site]
        for site in sorted(found, key=order.__getitem__)
        if tappable(program, site) and not isinstance(eqns[site].outvars[0], jex.DropVar)
    ]
    taps += [
        Tap(name, "output", None, "the model's output", output=number) for number, name in enumerate(outputs)
    ]
    return tuple(_with_unique_names(taps))


_BILINEAR = PRODUCTS | {"mul"}
_LINEAR = frozenset({"add", "sub", "gather", "dynamic_slice", *_BILINEAR})


def _module(eqn: JaxprEqn) -> str:
    """The module path, without the model's own name in front and an einsum's formula behind."""
    _, *parts = scope(eqn).split("/")
    return "/".join(part for part in parts if "->" not in part and "jit(" not in part)


def _kind(uses: Sequence[Use], params: Mapping[str, ParamSpec]) -> TapKind | None:
    use = uses[0]
    if use.kind == "lookup":
        return "lookup"
    if use.kind == "elementwise":
        return "vector"
    if use.kind in ("contraction", "statistic"):
        param = params[use.path]
        is_readout = axes_of_use(use, param.shape, param.base_shape).role == "output"
        return "readout" if is_readout else "product"
    return None


def _param_operand(eqn: JaxprEqn, operands: Sequence[Operand]) -> int:
    """The operand that is made of parameters, if the output is linear in it; else -1."""
    mine = [number for number, operand in enumerate(operands) if operand.kind == "param"]
    if eqn.primitive.name not in _LINEAR or len(mine) != 1:
        return -1
    return mine[0]


def _with_unique_names(taps: Sequence[Tap]) -> Iterator[Tap]:
    counts = collections.Counter(tap.name for tap in taps)
    seen: collections.Counter[str] = collections.Counter()
    for tap in taps:
        if counts[tap.name] == 1:
            yield tap
        else:
            seen[tap.name] += 1
            yield dataclasses.replace(tap, name=f"{tap.name} #{seen[tap.name]}")


# ---- norms -----------------------------------------------------------------------------------------

_RELAYS = RESHAPES | IDENTITIES | {"convert_element_type"}


def _norms(program: ClosedJaxpr, analysis: Analysis, site: EqnPath = ()) -> Iterator[tuple[EqnPath, int]]:
    """Places where an activation is multiplied by the reciprocal root of a statistic, or divided by the root.

    Yields:
        The place, and the operand that is the activation.
    """
    roots: dict[Var, str] = {}
    for index, eqn in enumerate(program.jaxpr.eqns):
        here = (*site, index)
        for inner in subprograms(eqn):
            yield from _norms(inner.program, analysis, (*here, inner.step))
        operands = analysis.flow.operands(here)
        name, atoms = eqn.primitive.name, eqn.invars
        from_root = [None if isinstance(atom, jex.Literal) else roots.get(atom) for atom in atoms]
        if name in ("rsqrt", "sqrt") and operands and operands[0].kind == "data":
            roots[eqn.outvars[0]] = name
        elif name in _RELAYS and from_root[0]:
            roots[eqn.outvars[0]] = from_root[0]
        elif name == "mul" and "rsqrt" in from_root and len(operands) == 2:
            other = from_root.index("rsqrt") ^ 1
            if operands[other].kind != "data" or from_root[other]:
                roots[eqn.outvars[0]] = "rsqrt"
            else:
                yield here, other
        elif name in ("max", "add") and "sqrt" in from_root and len(operands) == 2:
            roots[eqn.outvars[0]] = "sqrt"
        elif name == "div" and from_root[1] == "sqrt" and operands and operands[0].kind == "data":
            yield here, 0


# ---- the user's own constants ----------------------------------------------------------------------


def downstream(
    program: ClosedJaxpr, analysis: Analysis, factors: Mapping[EqnPath, float], site: EqnPath
) -> float:
    """The constants that the output of an equation is multiplied with before anything else is done to it.

    A µP written by hand divides logits after the readout's product, and after its bias: what counts is
    how large the product is then. What queries are divided by on their way to attention logits belongs to
    the logits and does not count.

    Args:
        program: the program that the equation is in.
        analysis: of its operands.
        factors: factors that are inserted, by place.
        site: the place of the equation.
    """
    factor = 1.0
    for step in chain(program, analysis, site):
        if step.product:
            return 1.0
        factor *= step.constant * factors.get(step.site, 1.0)
    return factor


class Step(NamedTuple):
    """A later equation that only multiplies with a constant.

    Attributes:
        site: its place.
        constant: the constant; 1 for a change of layout or an added parameter.
        product: whether it is the product of two activations that ends a chain.
    """

    site: EqnPath
    constant: float
    product: bool = False


def chain(program: ClosedJaxpr, analysis: Analysis, site: EqnPath) -> Iterator[Step]:
    """The equations that an output goes through one after the other, for as long as they only scale it.

    The last one is the product that it goes into, if that is what ends the chain.

    Args:
        program: the program that the equation is in.
        analysis: of its operands.
        site: the place of the equation.
    """
    products = {product.site for product in analysis.products}
    jaxpr = program_at(program, site).jaxpr
    yield from _onward(program, analysis, products, jaxpr, site, jaxpr.eqns[int(site[-1])].outvars[0])


def _onward(
    program: ClosedJaxpr,
    analysis: Analysis,
    products: Collection[EqnPath],
    jaxpr: Jaxpr,
    site: EqnPath,
    out: Var,
) -> Iterator[Step]:
    """The rest of a chain, from an output of the equation at `site` in `jaxpr`."""
    rest = [
        _through(program, analysis, products, jaxpr, site, out, index)
        for index in _readers(jaxpr).get(out, [])
    ]
    if len(rest) == 1:
        yield from rest[0]
        return
    # A query that goes into a product with the keys and one with their distances belongs to both.
    ends = [step for steps in rest for step in collections.deque(steps, maxlen=1)]
    if ends and len(ends) == len(rest) and all(step.product for step in ends):
        yield ends[0]


def _through(
    program: ClosedJaxpr,
    analysis: Analysis,
    products: Collection[EqnPath],
    jaxpr: Jaxpr,
    site: EqnPath,
    out: Var,
    index: int,
) -> Iterator[Step]:
    """The rest of a chain through one of the equations that read `out`."""
    if index == _OUTPUT:
        site = site[:-2]
        if site and subprograms(caller := equation_at(program, site))[0].kind == "call":
            outer = program_at(program, site).jaxpr
            out = caller.outvars[jaxpr.outvars.index(out)]
            yield from _onward(program, analysis, products, outer, site, out)
        return
    site = (*site[:-1], index)
    if site in products:
        yield Step(site, 1.0, product=True)
        return
    eqn = jaxpr.eqns[index]
    constant = _constant_step(eqn, eqn.invars.index(out), analysis.flow.operands(site))
    if constant is not None:
        yield Step(site, constant)
        yield from _onward(program, analysis, products, jaxpr, site, eqn.outvars[0])


_OUTPUT = -1


@functools.lru_cache(maxsize=64)
def _readers(jaxpr: Jaxpr) -> Mapping[Var, Sequence[int]]:
    """The equations that read each variable, by index; `_OUTPUT` for the program's own outputs."""
    readers: dict[Any, list[int]] = collections.defaultdict(list)
    for index, atoms in [*enumerate(eqn.invars for eqn in jaxpr.eqns), (_OUTPUT, jaxpr.outvars)]:
        for atom in atoms:
            if not isinstance(atom, jex.Literal):
                readers[atom].append(index)
    return readers


def _constant_step(eqn: JaxprEqn, position: int, operands: Sequence[Operand]) -> float | None:
    name = eqn.primitive.name
    if name in _RELAYS or name == "neg":
        return 1.0
    if len(operands) != 2:
        return None
    other = operands[1 - position]
    if name == "mul" and other.number is not None:
        return abs(other.number)
    if name == "div" and position == 0 and other.number:
        return 1 / abs(other.number)
    # A bias is scaled by what comes after it, as the product is.
    return 1.0 if name in ("add", "sub") and other.kind == "param" else None
