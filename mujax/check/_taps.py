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

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from mujax.check._inherited import initial_exponents
from mujax.core import MupModel
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
from mujax.core.trace import Analysis, Operand, Use, axes_of_use, informative_uses
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
        scale: how its size scales from the narrowest model to the widest by the model's own design: as a sum
            over the width that something which grows as much is divided by later, or a vector of unit norm.
        falls: the power of the width that it may scale by at initialisation, as what it comes from does.
    """

    name: str
    kind: TapKind
    site: EqnPath | None
    where: str
    params: tuple[str, ...] = ()
    operand: int = -1
    output: int | None = None
    reads: int | None = None
    scale: float = 1.0
    falls: float = 0.0

    @property
    def own_fall(self) -> float:
        """The power of the width that it may fall by at initialisation, whatever it is computed from."""
        return -0.5 if self.kind in FALLS_AT_FIRST else 0.0


def find_taps(mup: MupModel) -> tuple[Tap, ...]:
    """The taps of a model, in its program's order.

    Args:
        mup: the model; it must differ from its base in width, so that growing axes are known.
    """
    program, analysis, params = mup.replay.program, mup.replay.analysis, mup.spec
    found: dict[EqnPath, Tap] = {}
    eqns = dict(equations(program))
    uses: dict[EqnPath, list[Use]] = collections.defaultdict(list)
    for of_param in analysis.uses.values():
        for use in informative_uses(of_param):
            uses[use.site].append(use)
    for site, here in uses.items():
        # A kernel with a gain of its own is a kernel.
        here.sort(key=lambda use: use.kind == "elementwise")
        if kind := _kind(here[0], params):
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
    sums = {product.site for product in analysis.products if product.contracted[0] != product.contracted[1]}
    readouts = {site for site, tap in found.items() if tap.kind == "readout"}
    falls = initial_exponents(analysis, readouts | sums)

    def placed(tap: Tap, maker: EqnPath | None) -> Tap:
        if maker is None:
            return tap
        scale, fall = analysis.scales.get(maker, 1.0), min(falls.get(maker, 0.0), 0.0)
        return dataclasses.replace(tap, scale=scale, falls=fall)

    order = {site: number for number, site in enumerate(eqns)}
    taps = [
        placed(found[site], _maker(analysis, found[site]))
        for site in sorted(found, key=order.__getitem__)
        if tappable(program, site) and not isinstance(eqns[site].outvars[0], jex.DropVar)
    ]
    outputs = makers_of_outputs(mup)
    for number, maker in enumerate(outputs):
        name = "output" if len(outputs) == 1 else f"output {number}"
        taps.append(placed(Tap(name, "output", None, "the model's output", output=number), maker))
    return tuple(_with_unique_names(taps))


def makers_of_outputs(mup: MupModel) -> list[EqnPath | None]:
    """For each array of floats that the model returns, the equation that makes it."""
    replay = mup.replay
    numbers = replay.call.output(replay.result.build(range(len(replay.result.shapes))))
    pairs = zip(jax.tree.leaves(numbers), jax.tree.leaves(replay.output()), strict=True)
    return [replay.analysis.flow.outputs[number] for number, leaf in pairs if floating(leaf)]


def floating(output: Any) -> list[Any]:
    """The arrays of floats that a model returns; what it returns beside them (a string, None) is left out."""
    leaves = (leaf for leaf in jax.tree.leaves(output) if hasattr(leaf, "dtype"))
    return [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]


def _maker(analysis: Analysis, tap: Tap) -> EqnPath | None:
    """The equation that makes what a tap reads."""
    if tap.site is None or tap.reads is None:
        return tap.site
    return analysis.flow.operands(tap.site)[tap.reads].origin


_BILINEAR = PRODUCTS | {"mul"}
_LINEAR = frozenset({"add", "sub", "gather", "dynamic_slice", *_BILINEAR})


def _module(eqn: JaxprEqn) -> str:
    """The module path, without the model's own name in front and an einsum's formula behind."""
    _, *parts = scope(eqn).split("/")
    return "/".join(part for part in parts if "->" not in part and "jit(" not in part)


def _kind(use: Use, params: Mapping[str, ParamSpec]) -> TapKind | None:
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
    program: ClosedJaxpr,
    analysis: Analysis,
    factors: Mapping[EqnPath, float],
    site: EqnPath,
    products: Collection[EqnPath],
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
        products: the places of the products of two activations.
    """
    factor = 1.0
    for step in chain(program, analysis, site, products):
        if step.product:
            return 1.0
        factor *= step.constant * factors.get(step.site, 1.0)
    return factor


def mixing_sites(taps: Sequence[Tap]) -> frozenset[EqnPath]:
    """The places of the products of two activations, as the widest model against the narrowest has them.

    Where nothing grows, queries made of parameters alone are no activation.
    """
    return frozenset(tap.site for tap in taps if tap.site and tap.kind in ("logits", "mixing"))


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


def chain(
    program: ClosedJaxpr, analysis: Analysis, site: EqnPath, products: Collection[EqnPath]
) -> Iterator[Step]:
    """The equations that an output goes through one after the other, for as long as they only scale it.

    The last one is the product that it goes into, if that is what ends the chain.

    Args:
        program: the program that the equation is in.
        analysis: of its operands.
        site: the place of the equation.
        products: the places of the products of two activations.
    """
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
