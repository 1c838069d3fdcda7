"""Residual branches: where a program adds `f(x)` to `x`, and what stands inside of `f`.

The program is read as a graph of its floating-point values, with the bodies of loops and calls in the place
of the equation that holds them. A set of nodes is an integer with a bit for each.

At an addition the *split* is what both operands were last computed from alike. The operand that goes from
there through products with parameters is the branch; the one that does not is the stream. Past an addition
that was found, only the stream counts as its past: so `(x + attention(x)) + mlp(x)` is two branches from one
split.

References:
    Yang, Yu, Zhu and Hayou, Tensor Programs VI, arXiv 2310.02244.
    Dey et al., Don't be lazy: CompleteP, arXiv 2505.01618.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal

import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jax.extend import core as jex
from jaxtyping import Array, Shaped

from mujax.errors import DepthError
from mujax.infshape import ParamSpec
from mujax.trace import EqnPath, Fix
from mujax.trace.interpret import SUBPROGRAMS
from mujax.trace.source import scope, where

MARK: Final = "mujax.residual_branch"
_REMEDY: Final = (
    "name the branches with residual=[...] (globs of module scopes or of parameters) or mark what each adds "
    "with "
    "mujax.residual_branch(...)"
)


def residual_branch(y: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """Marks a value as the output of a residual branch; returns it unchanged.

    Only needed where `mup_init(..., depth=...)` can't tell the branches of a model by itself. With one mark
    in a program only what is marked counts as a branch. It costs nothing when the program runs.

    Args:
        y: what is then added to the stream, maybe after a norm or a dropout.

    >>> import jax, jax.numpy as jnp
    >>> print(jax.make_jaxpr(lambda x: x + residual_branch(2 * x))(1.0).eqns[1].params["name"])
    mujax.residual_branch
    """
    return checkpoint_name(y, MARK)


@dataclasses.dataclass(frozen=True)
class Depth:
    """How deep base and target are.

    Attributes:
        base: layers of the base.
        target: layers of the target.
        residual: globs of module scopes or of parameters that make up the branches; empty to find them.
    """

    base: int
    target: int
    residual: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """m_L: layers of the target over layers of the base."""
        return self.target / self.base


@dataclasses.dataclass(frozen=True)
class Branch:
    """One addition of a residual branch to its stream.

    Attributes:
        site: the addition.
        operand: which of its operands is the branch.
        params: the parameters inside of the branch.
        repeats: how often loops run the addition.
        constants: the numbers that the branch's output is multiplied with between its last product and the
            addition, and that product's weight; those of the stream are left out.
        nodes: the nodes of the graph that are inside.
        eqn: the addition's equation.
        exact: whether its numbers are of single or double precision.
    """

    site: EqnPath
    operand: int
    params: frozenset[str]
    repeats: int
    constants: tuple[float, ...]
    nodes: int
    eqn: Any
    exact: bool

    @property
    def where(self) -> str:
        """`file:line` in the user's code."""
        return where(self.eqn)


@dataclasses.dataclass(frozen=True)
class Branches:
    """What a program says of its depth.

    Attributes:
        found: the residual branches, in program order.
        layers: axes of parameters that a scan over layers strips: path -> axes.
        sites: the equations inside of branches.
        stream: parameters on the stream between branches, with the place of a use.
    """

    found: tuple[Branch, ...]
    layers: Mapping[str, frozenset[int]]
    sites: frozenset[EqnPath]
    stream: Mapping[str, str]

    @property
    def params(self) -> frozenset[str]:
        """The parameters inside of branches."""
        return frozenset[str]().union(*(branch.params for branch in self.found))

    @property
    def count(self) -> int:
        """Number of branches that a run goes through."""
        return sum(branch.repeats for branch in self.found)


def scanned_layers(program: Any, params: Mapping[int, str]) -> dict[str, frozenset[int]]:
    """Axes of parameters that a scan over layers strips: it carries an activation through their products.

    Args:
        program: a `ClosedJaxpr`.
        params: which of its inputs are parameters: position -> path.
    """
    return _Graph.of(program, params).layers()


def find_branches(
    program: Any, params: Mapping[int, str], residual: Sequence[str] = (), *, part: bool = False
) -> Branches:
    """Finds the residual branches of a program.

    Args:
        program: a `ClosedJaxpr`.
        params: which of its inputs are parameters: position -> path.
        residual: globs of module scopes or of parameters that make up the branches; all others are none then.
        part: whether the program may be a part of the model, which some globs do not match.

    Raises:
        DepthError: an addition may or may not be that of a branch.
    """
    graph = _Graph.of(program, params)
    return _Search(graph, tuple(residual), part).run()


# ---- factors that a model has of its own -----------------------------------------------------------

_POWERS: Final = (0.5, 1.0)
_OWN_REMEDY: Final = "take it out of the model, or leave out depth="


def refuse_own_factors(base: Branches, target: Branches, depth: Depth, fixes: Sequence[Fix]) -> None:
    """Refuses a model whose branches are multiplied with a power of the depth already.

    It shows as a constant that differs between base and target, and, where both have the same number of
    layers, as a constant that is 1/L, 1/sqrt(L) or the like.

    Args:
        base: the branches of the base.
        target: the branches of the target.
        depth: how deep the two are.
        fixes: constants that scale from base to target.

    Raises:
        DepthError: there is one.
    """
    if depth.ratio == 1:
        return
    for small, big in zip(base.found, target.found, strict=True):
        tolerance = 1e-5 if big.exact else 5e-3
        for before, after in zip(small.constants, big.constants, strict=False):
            if math.isclose(before, after, rel_tol=tolerance):
                named = _power_of_depth(after, depth, target.count, tolerance)
                if named is not None:
                    raise DepthError(
                        f"{big.where}: expected a residual branch without a factor for depth, found one "
                        "multiplied "
                        f"with {after:.4g}, which is {named}; {_OWN_REMEDY}."
                    )
            elif (power := _power(after / before if before else 0.0, depth.ratio, tolerance)) is not None:
                raise DepthError(
                    f"{big.where}: expected a residual branch without a factor for depth, found one "
                    "multiplied "
                    f"with {before:.4g} in the base and {after:.4g} in the target, which falls with the "
                    "power "
                    f"{power:g} of the depth; {_OWN_REMEDY}."
                )
    for fix in fixes:
        power = _power(1 / fix.factor, depth.ratio, 1e-5)
        if fix.site in target.sites and not fix.attention and power is not None:
            raise DepthError(
                f"{fix.where}: expected nothing inside of residual branches to scale with depth, found a "
                "constant "
                f"that falls with its power {power:g} from base to target; {_OWN_REMEDY}."
            )


def _power(ratio: float, depth: float, tolerance: float) -> float | None:
    """The power of the depth that a ratio falls with."""
    return next((p for p in _POWERS if math.isclose(ratio, depth**-p, rel_tol=tolerance)), None)


def _power_of_depth(number: float, depth: Depth, branches: int, tolerance: float) -> str | None:
    """How a number is made from the depth of the target, if it is."""
    counts = {
        "L": depth.target,
        "branches": branches,
        "2 L": 2 * depth.target,
        "L / base L": depth.ratio,
    }
    for name, count in counts.items():
        for power, text in zip(_POWERS, ("1/sqrt", "1/"), strict=True):
            if count > 1 and math.isclose(number, count**-power, rel_tol=tolerance):
                return f"{text}({name}) for {depth.target} layers"
    return None


def refuse_scaled_init(
    spec: Mapping[str, ParamSpec],
    branches: Branches,
    depth: Depth,
    own: Mapping[str, float],
    program: Any,
    outputs: Mapping[int, str],
) -> None:
    """Refuses a model that initialises what is inside of its branches by the depth.

    Args:
        spec: the parameters.
        branches: the target's branches.
        depth: how deep base and target are.
        own: std of the model's own initial values at the target over that at the base, by path.
        program: the target's initialiser, a `ClosedJaxpr`.
        outputs: which of its outputs are parameters: position -> path.

    Raises:
        DepthError: it does.
    """
    if depth.ratio == 1:
        return
    for path in sorted(branches.params):
        param = spec[path]
        laws = _width_laws(param)
        ratio = own.get(path, 0.0)
        if not param.layers or not ratio or any(math.isclose(ratio, law, rel_tol=1e-4) for law in laws):
            continue
        power = next((p for law in laws if (p := _power(ratio / law, depth.ratio, 1e-4)) is not None), None)
        if power is not None:
            raise DepthError(
                f"{path}: expected initial values whose scale does not depend on depth, found a standard "
                "deviation "
                f"that falls with its power {power:g} from base to target. Use an initialiser that does not "
                "know "
                "the number of layers (with batch_axis= where it makes all layers at once), or leave out "
                "depth=."
            )
    scales = _init_constants(program, outputs)
    for branch in branches.found:
        _refuse_odd_ones(branch, spec, scales, depth, branches.count)


def _refuse_odd_ones(
    branch: Branch, spec: Mapping[str, ParamSpec], scales: Mapping[str, float], depth: Depth, count: int
) -> None:
    """Refuses a kernel whose constant is a power of the depth times that of its neighbours."""
    kernels = {path: spec[path] for path in sorted(branch.params) if spec[path].fan_in and scales.get(path)}
    plain = {path: scales[path] for path in kernels}
    by_fan_in = {
        path: plain[path] * math.sqrt(math.prod(param.shape[axis] for axis in param.fan_in))
        for path, param in kernels.items()
    }
    for measure in (plain, by_fan_in):
        if len(measure) < 2 or max(measure.values()) <= min(measure.values()) * (1 + 1e-4):
            return
    for measure in (plain, by_fan_in):
        for path, scale in measure.items():
            for other, reference in measure.items():
                named = _power_of_depth(scale / reference, depth, count, 1e-4)
                if named is not None:
                    raise DepthError(
                        f"{path}: expected initial values whose scale does not depend on depth, found those "
                        "of "
                        f"{other} times {scale / reference:.4g}, which is {named}. Use the same initialiser "
                        "for "
                        "both, or leave out depth=."
                    )


def _width_laws(param: ParamSpec) -> list[float]:
    """How initialisers make the standard deviation depend on width: target over base."""
    fans = [
        [math.prod(shape[axis] for axis in axes) for axes in (param.fan_in, param.fan_out)]
        for shape in (param.shape, param.base_shape)
    ]
    mean = math.sqrt(sum(fans[1]) / sum(fans[0])) if sum(fans[0]) else 1.0
    return [1.0, param.r_in**-0.5, param.r_out**-0.5, mean, 1 / param.r_in, 1 / param.r_out]


def _init_constants(program: Any, outputs: Mapping[int, str]) -> dict[str, float]:
    """What random numbers of a fixed scale are multiplied with, by path."""
    graph = _Graph.of(program, {})
    found = {}
    for position, path in outputs.items():
        constants = list(graph.constants(graph.outs[position]))
        if constants:
            found[path] = abs(math.prod(constants))
    return found


# ---- the graph -------------------------------------------------------------------------------------

Kind = Literal["const", "param", "data"]
_ORDER: Final[Mapping[Kind, int]] = {"const": 0, "param": 1, "data": 2}
_LAYOUT: Final = frozenset(
    [
        *["reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "rev", "slice", "split"],
        *["dynamic_slice", "gather", "convert_element_type", "copy", "name", "sharding_constraint"],
        "optimization_barrier",
    ]
)
_PRODUCTS: Final = frozenset(["dot_general", "conv_general_dilated", "ragged_dot_general"])
_ADDS: Final = frozenset(["add", "add_any", "sub"])
_NONLINEAR: Final = frozenset(
    [
        *["max", "min", "tanh", "logistic", "erf", "erfc", "exp", "exp2", "sin", "cos", "abs", "pow"],
        *["integer_pow", "square", "expm1", "log1p", "log"],
    ]
)
_FOLD: Final[Mapping[str, Callable[..., float]]] = {
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "sqrt": math.sqrt,
    "rsqrt": lambda a: 1 / math.sqrt(a),
    "pow": lambda a, b: a**b,
    "neg": lambda a: -a,
    "square": lambda a: a * a,
}
_KEEPS: Final = frozenset([*_LAYOUT, "neg", "reduce_precision", "select_n", "device_put"])


@dataclasses.dataclass(frozen=True)
class _Atom:
    """What is known of one value.

    Attributes:
        kind: what it depends on.
        node: its node; None for integers, booleans and constants.
        roots: parameters that it is a function of, or, of kind "data", one of whose rows it is.
        number: the number that it is throughout, if it is one.
        axes: which of the parameter's axes each of its axes is, of a parameter that was only transposed.
    """

    kind: Kind
    node: int | None = None
    roots: frozenset[str] = frozenset()
    number: float | None = None
    axes: tuple[int, ...] | None = None


_CONST: Final = _Atom("const")


@dataclasses.dataclass
class _Node:
    """One floating-point value of the program.

    Attributes:
        eqn: the equation that makes it; None for inputs and the carry of a loop.
        site: its place.
        operands: what the equation reads.
        parents: the nodes among them.
        data: whether it depends on the program's data.
        uses: parameters that meet the data here.
        product: whether it is a product that a branch may consist of.
        loops: the loops around it.
        scope: the module scope, outer scopes included.
    """

    eqn: Any
    site: EqnPath
    operands: tuple[_Atom, ...]
    parents: tuple[int, ...]
    data: bool
    uses: frozenset[str]
    product: bool
    loops: tuple[EqnPath, ...]
    scope: str


@dataclasses.dataclass(frozen=True)
class _Scan:
    """A scan: its carry, the length, and the axes of the parameters that it strips."""

    carry: tuple[int, ...]
    length: int
    stripped: tuple[tuple[str, int], ...]


class _Graph:
    """The floating-point values of a program, in program order."""

    def __init__(self) -> None:
        self.nodes: list[_Node] = []
        self.scans: dict[EqnPath, _Scan] = {}
        self.ends: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self.outs: list[_Atom] = []

    @classmethod
    def of(cls, program: Any, params: Mapping[int, str]) -> _Graph:
        """Reads a `ClosedJaxpr`."""
        graph = cls()
        inputs = []
        for position, var in enumerate(program.jaxpr.invars):
            path = params.get(position)
            roots = frozenset[str]() if path is None else frozenset([path])
            kind: Kind = "data" if path is None else "param"
            axes = tuple(range(len(_shape(var)))) if path is not None else None
            node = graph._add(None, (), (), kind == "data", (), "") if _is_float(var) else None
            inputs.append(_Atom(kind, node, roots if kind == "param" else frozenset(), None, axes))
        consts = [_closed_over(array) for array in program.consts]
        graph.outs = graph._walk(program.jaxpr, consts, inputs, (), (), "")
        return graph

    def layers(self) -> dict[str, frozenset[int]]:
        """Axes of parameters that a scan strips whose carry goes through a product with one of them."""
        descends = self.descendants()
        found: dict[str, frozenset[int]] = {}
        for scan in self.scans.values():
            after = 0
            for node in scan.carry:
                after |= descends[node]
            paths = {path for path, _ in scan.stripped}
            if any(
                node.product and paths & node.uses and after >> i & 1 for i, node in enumerate(self.nodes)
            ):
                for path, axis in scan.stripped:
                    found[path] = found.get(path, frozenset()) | {axis}
        return found

    def descendants(self) -> list[int]:
        """Per node the nodes computed from it."""
        out = [0] * len(self.nodes)
        for number in range(len(self.nodes) - 1, -1, -1):
            for parent in self.nodes[number].parents:
                out[parent] |= out[number] | 1 << number
        return out

    def readers(self) -> list[int]:
        """Per node the nodes that read it."""
        out = [0] * len(self.nodes)
        for number, node in enumerate(self.nodes):
            for parent in node.parents:
                out[parent] |= 1 << number
        return out

    def constants(self, atom: _Atom, past: int = 0) -> Iterator[float]:
        """The numbers that a value was multiplied with since its last product, and that product's weight."""
        while atom.node is not None and not past >> atom.node & 1:
            node = self.nodes[atom.node]
            if node.eqn is None:
                return
            name = node.eqn.primitive.name
            own = [one for one in node.operands if one.node is not None]
            numbers = [one.number for one in node.operands if one.number is not None]
            moving = [one for one in own if one.kind == "data"] or own
            if name in _PRODUCTS:
                weights = [one for one in own if one.kind == "param"]
                if len(own) == 2 and len(weights) == 1:
                    yield from self.constants(weights[0])
                return
            if name == "mul" and numbers:
                yield numbers[0]
            elif name == "div" and numbers and node.operands[1].number is not None:
                yield 1 / numbers[-1] if numbers[-1] else math.inf
            elif name not in _KEEPS and name not in ("mul", "add", "add_any"):
                return
            if len(moving) != 1:
                return
            atom = moving[0]

    def _add(
        self,
        eqn: Any,
        site: EqnPath,
        operands: Sequence[_Atom],
        data: bool,
        loops: tuple[EqnPath, ...],
        name: str,
        uses: frozenset[str] = frozenset(),
        product: bool = False,
    ) -> int:
        parents = tuple(dict.fromkeys(atom.node for atom in operands if atom.node is not None))
        self.nodes.append(_Node(eqn, site, tuple(operands), parents, data, uses, product, loops, name))
        return len(self.nodes) - 1

    def _walk(
        self,
        program: Any,
        consts: Sequence[_Atom],
        inputs: Sequence[_Atom],
        site: EqnPath,
        loops: tuple[EqnPath, ...],
        name: str,
    ) -> list[_Atom]:
        env: dict[Any, _Atom] = dict(zip(program.constvars, consts, strict=True))
        env.update(zip(program.invars, inputs, strict=True))

        def read(atom: Any) -> _Atom:
            return _literal(atom) if isinstance(atom, jex.Literal) else env[atom]

        for index, eqn in enumerate(program.eqns):
            ins = [read(atom) for atom in eqn.invars]
            inner = "/".join(part for part in (name, scope(eqn)) if part)
            outs = self._equation(eqn, ins, (*site, index), loops, inner)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in program.outvars]

    def _sub(
        self, program: Any, ins: Sequence[_Atom], site: EqnPath, loops: tuple[EqnPath, ...], name: str
    ) -> list[_Atom]:
        if isinstance(program, jex.ClosedJaxpr):
            consts = [_closed_over(array) for array in program.consts]
            return self._walk(program.jaxpr, consts, ins, site, loops, name)
        return self._walk(program, (), ins, site, loops, name)

    def _equation(
        self, eqn: Any, ins: Sequence[_Atom], site: EqnPath, loops: tuple[EqnPath, ...], name: str
    ) -> Sequence[_Atom]:
        primitive = eqn.primitive.name
        if primitive == "scan":
            return self._scan(eqn, ins, site, loops, name)
        if primitive == "while":
            return self._while(eqn, ins, site, loops, name)
        if primitive == "cond":
            return self._cond(eqn, ins, site, loops, name)
        for key in SUBPROGRAMS:
            inner = eqn.params.get(key)
            if len(getattr(getattr(inner, "jaxpr", inner), "invars", ())) == len(ins) and inner is not None:
                return self._sub(inner, ins, (*site, key), loops, name)
        return self._plain(eqn, ins, site, loops, name)

    def _plain(
        self, eqn: Any, ins: Sequence[_Atom], site: EqnPath, loops: tuple[EqnPath, ...], name: str
    ) -> list[_Atom]:
        primitive = eqn.primitive.name
        kind = _widest(ins)
        roots = frozenset[str]().union(*(atom.roots for atom in ins)) if ins else frozenset[str]()
        if kind == "const":
            number = _folded(eqn, ins)
            return [dataclasses.replace(_CONST, number=number) for _ in eqn.outvars]
        if not any(_is_float(var) for var in eqn.outvars):
            return [_Atom(kind) for _ in eqn.outvars]
        data = kind == "data"
        # Rows of a parameter that were picked by index (an expert's kernel) are that parameter still.
        picked = data and primitive in _LAYOUT and bool(ins[0].roots)
        uses = frozenset[str]()
        if data:
            # A number computed from a parameter (a penalty) is no use of it.
            uses = uses.union(
                *(
                    atom.roots
                    for atom, var in zip(ins, eqn.invars, strict=True)
                    if math.prod(_shape(var)) > 1 or atom.axes is not None
                )
            )
        opaque = any(isinstance(value, jex.Jaxpr | jex.ClosedJaxpr) for value in eqn.params.values())
        product = data and (
            (opaque and bool(uses))
            or (primitive in _PRODUCTS and all(atom.kind != "const" for atom in ins[:2]))
        )
        node = self._add(eqn, site, ins, data, loops, name, uses, product)
        axes = _axes_after(eqn, ins)
        kept = roots if not data else ins[0].roots if picked else frozenset[str]()
        return [_Atom(kind, node if _is_float(var) else None, kept, None, axes) for var in eqn.outvars]

    def _scan(
        self, eqn: Any, ins: Sequence[_Atom], site: EqnPath, loops: tuple[EqnPath, ...], name: str
    ) -> list[_Atom]:
        consts, count = eqn.params["num_consts"], eqn.params["num_carry"]
        body, length = eqn.params["jaxpr"], eqn.params["length"]
        inside = (*loops, site)
        carry = self._carry(
            ins[consts : consts + count], body.jaxpr.invars[consts : consts + count], inside, name
        )
        slices, stripped = [], []
        for atom, var in zip(ins[consts + count :], body.jaxpr.invars[consts + count :], strict=True):
            if atom.kind == "param" and atom.axes and len(atom.roots) == 1:
                stripped.append((next(iter(atom.roots)), atom.axes[0]))
            node = atom.node
            if node is not None and _is_float(var):
                node = self._add(None, site, [atom], atom.kind == "data", inside, name)
            slices.append(
                dataclasses.replace(atom, node=node, number=None, axes=atom.axes[1:] if atom.axes else None)
            )
        nodes = tuple(atom.node for atom in carry if atom.node is not None)
        self.scans[site] = _Scan(nodes, length, tuple(stripped))
        outs = self._sub(body, [*ins[:consts], *carry, *slices], (*site, "jaxpr"), inside, name)
        self._close(carry, outs[:count])
        return [dataclasses.replace(atom, number=None, axes=None) for atom in outs]

    def _while(
        self, eqn: Any, ins: Sequence[_Atom], site: EqnPath, loops: tuple[EqnPath, ...], name: str
    ) -> list[_Atom]:
        first = eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
        body = eqn.params["body_jaxpr"]
        inside = (*loops, site)
        carry = self._carry(ins[first:], body.jaxpr.invars[eqn.params["body_nconsts"] :], inside, name)
        given = [*ins[eqn.params["cond_nconsts"] : first], *carry]
        outs = self._sub(body, given, (*site, "body_jaxpr"), inside, name)
        self._close(carry, outs)
        return [dataclasses.replace(atom, number=None, axes=None) for atom in outs]

    def _carry(
        self, atoms: Sequence[_Atom], variables: Sequence[Any], loops: tuple[EqnPath, ...], name: str
    ) -> list[_Atom]:
        """What a loop carries as its body sees it: data, whatever it starts from."""
        return [
            _Atom("data", self._add(None, loops[-1], [atom], True, loops, name) if _is_float(var) else None)
            for atom, var in zip(atoms, variables, strict=True)
        ]

    def _close(self, carry: Sequence[_Atom], outs: Sequence[_Atom]) -> None:
        self.ends.append(
            (
                tuple(atom.node for atom in carry if atom.node is not None),
                tuple(atom.node for atom in outs if atom.node is not None),
            )
        )

    def _cond(
        self, eqn: Any, ins: Sequence[_Atom], site: EqnPath, loops: tuple[EqnPath, ...], name: str
    ) -> list[_Atom]:
        branches = [
            self._sub(program, ins[1:], (*site, f"branches:{number}"), loops, name)
            for number, program in enumerate(eqn.params["branches"])
        ]
        outs = []
        for values, var in zip(zip(*branches, strict=True), eqn.outvars, strict=True):
            kind = _widest([*values, ins[0]])
            roots = frozenset[str]().union(*(value.roots for value in values))
            node = self._add(None, site, values, kind == "data", loops, name) if _is_float(var) else None
            outs.append(_Atom(kind, node, roots if kind == "param" else frozenset()))
        return outs


def _shape(var: Any) -> tuple[int, ...]:
    return tuple(getattr(var.aval, "shape", ()))


def _is_float(var: Any) -> bool:
    dtype = getattr(var.aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def _widest(atoms: Sequence[_Atom]) -> Kind:
    kinds: list[Kind] = ["const", *(atom.kind for atom in atoms)]
    return max(kinds, key=lambda kind: _ORDER[kind])


def _literal(atom: Any) -> _Atom:
    return dataclasses.replace(_CONST, number=_number(atom.val))


def _closed_over(array: Any) -> _Atom:
    return _CONST if isinstance(array, Tracer) else dataclasses.replace(_CONST, number=_number(array))


def _number(value: Any) -> float | None:
    if np.size(value) != 1 or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        return None
    return float(np.asarray(value).reshape(()))


def _folded(eqn: Any, ins: Sequence[_Atom]) -> float | None:
    """The number that a constant's equation makes."""
    numbers = [atom.number for atom in ins]
    if not numbers or any(number is None for number in numbers):
        return None
    name = eqn.primitive.name
    known = [number for number in numbers if number is not None]
    if name in _KEEPS and len(known) == 1 and name != "neg":
        return known[0]
    if name == "integer_pow":
        return known[0] ** eqn.params["y"]
    function = _FOLD.get(name)
    try:
        return None if function is None else float(function(*known))
    except (ArithmeticError, ValueError, TypeError):
        return None


def _axes_after(eqn: Any, ins: Sequence[_Atom]) -> tuple[int, ...] | None:
    """The axes of a parameter that was only transposed or cast."""
    if not ins or ins[0].kind != "param" or ins[0].axes is None or len(ins) != 1:
        return None
    if eqn.primitive.name == "transpose":
        return tuple(ins[0].axes[axis] for axis in eqn.params["permutation"])
    same = eqn.primitive.name in ("convert_element_type", "copy", "sharding_constraint", "device_put")
    return ins[0].axes if same else None


# ---- the search ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Sum:
    """An addition of two values with a common past.

    Attributes:
        node: the addition.
        sides: the nodes of its two operands.
        past: what both are computed from.
        splits: the last of these.
    """

    node: int
    sides: tuple[int, int]
    past: int
    splits: tuple[int, ...]


class _Search:
    """Goes through the additions of a graph in program order."""

    def __init__(self, graph: _Graph, residual: tuple[str, ...], part: bool) -> None:
        self.graph = graph
        self.part = part
        self.residual = residual
        self.above: list[int] = []
        """Per node itself and what it was computed from, along the streams."""
        self.below = graph.descendants()
        self.readers = graph.readers()
        self.products = self._where(lambda node: node.product)
        self.users = self._where(lambda node: bool(node.uses))
        self.data = self._where(lambda node: node.data)
        self.marked, self.by_glob = self._marks()
        self.explicit = bool(residual) or bool(self.marked)
        self.branches: dict[int, tuple[int, int, int]] = {}
        """Addition -> (operand, what both operands are computed from, inside)."""
        self.projections: set[int] = set()
        self.open: list[tuple[_Sum, str]] = []

    def _where(self, holds: Callable[[_Node], bool]) -> int:
        return sum(1 << number for number, node in enumerate(self.graph.nodes) if holds(node))

    def _marks(self) -> tuple[int, dict[str, int]]:
        by_glob = dict.fromkeys(self.residual, 0)
        marked = 0
        for number, node in enumerate(self.graph.nodes):
            if not node.data or node.eqn is None:
                continue
            if _is_mark(node):
                marked |= 1 << number
            for glob in self.residual:
                if _matches(node.scope, glob) or any(_matches(path, glob) for path in node.uses):
                    by_glob[glob] |= 1 << number
        for glob, found in by_glob.items():
            if not (found or self.part):
                raise DepthError(
                    f"residual: expected globs of module scopes or of parameters, but {glob!r} matches "
                    "nothing "
                    f"in the traced call; the first scope with a parameter is {self._first_scope()!r}."
                )
            marked |= found
        return marked, by_glob

    def _first_scope(self) -> str:
        return next((node.scope for node in self.graph.nodes if node.uses and node.scope), "")

    # ---- the walk ----------------------------------------------------------------------------------

    def run(self) -> Branches:
        """All branches.

        Raises:
            DepthError: an addition may or may not be that of a branch.
        """
        for number, node in enumerate(self.graph.nodes):
            past = 1 << number
            skip = self._skip(number, node)
            for parent in node.parents if skip is None else (skip,):
                past |= self.above[parent]
            self.above.append(past)
        self._settle_open()
        self._leave_out_shared()
        self._check_nested()
        self._check_marks()
        found = tuple(self._branch(number) for number in sorted(self.branches))
        result = Branches(found, self.graph.layers(), self._sites(), self._stream())
        self._check_shared(result)
        return result

    def _skip(self, number: int, node: _Node) -> int | None:
        """The stream's operand if the node adds a residual branch."""
        total = self._sum(number, node)
        if total is None:
            return None
        sides = [self._region(total, side) for side in (0, 1)]
        if self.explicit:
            # A sum inside of what is named is its own.
            if self.marked >> number & 1:
                return None
            inside = [bool(region & self.marked) for region in sides]
            if inside[0] == inside[1]:
                return None
            return self._take(total, int(inside[1]))
        with_products = [bool(region & self.products) for region in sides]
        with_params = [bool(region & self.users) for region in sides]
        if with_products == [True, True]:
            self.open.append(
                (total, "products with parameters or between activations on both sides of the sum")
            )
            return None
        if with_products == [False, False]:
            if with_params in ([True, False], [False, True]):
                self.open.append((total, "parameters but no product on one side of the sum"))
            return None
        branch = int(with_products[1])
        if not with_params[branch]:
            return None
        if any(self._gates(inner) for inner in _bits(sides[1 - branch])):
            self.open.append((total, "a stream that is multiplied with another activation"))
            return None
        return self._take(total, branch)

    def _gates(self, number: int) -> bool:
        node = self.graph.nodes[number]
        return (
            node.eqn is not None
            and node.eqn.primitive.name in ("mul", "div")
            and [atom.kind for atom in node.operands] == ["data", "data"]
        )

    def _sum(self, number: int, node: _Node) -> _Sum | None:
        if (
            node.eqn is None
            or node.eqn.primitive.name not in _ADDS
            or not node.data
            or len(node.parents) != 2
        ):
            return None
        shapes = {_shape(var) for var in (*node.eqn.invars, *node.eqn.outvars)}
        if len(shapes) != 1 or shapes == {()}:
            return None
        left, right = node.parents
        common = self.above[left] & self.above[right]
        if not (common >> left & 1 or common >> right & 1):
            common &= self.data
        if not common:
            return None
        return _Sum(number, (left, right), common, tuple(self._last(common)))

    def _last(self, nodes: int) -> Iterator[int]:
        while nodes:
            top = nodes.bit_length() - 1
            yield top
            nodes &= ~self.above[top]

    def _region(self, total: _Sum, side: int) -> int:
        return self.above[total.sides[side]] & ~total.past

    def _take(self, total: _Sum, branch: int) -> int:
        self.branches[total.node] = (branch, total.past, self._inside(total, branch))
        return total.sides[1 - branch]

    def _inside(self, total: _Sum, branch: int) -> int:
        """The nodes between split and addition, and what is computed for them alone."""
        end = total.sides[branch]
        region = self._region(total, branch)
        after = 0
        for split in total.splits:
            after |= self.below[split]
        inside = region & after | 1 << end
        loops = self.graph.nodes[total.node].loops
        for number in _bits(region & ~inside):
            node = self.graph.nodes[number]
            readers = self.readers[number]
            if node.loops[: len(loops)] == loops and readers and not readers & ~inside:
                inside |= 1 << number
        return inside

    # ---- what is left over -------------------------------------------------------------------------

    def _settle_open(self) -> None:
        """Sums that are inside of a branch are that branch's own; of the others none may be left."""
        within = 0
        for _, _, inside in self.branches.values():
            within |= inside
        for total, found in self.open:
            if within >> total.node & 1:
                continue
            branch = self._projected(total)
            if branch is None:
                node = self.graph.nodes[total.node]
                raise DepthError(
                    f"{where(node.eqn)}: expected an addition x + f(x) whose branch can be told from its "
                    "stream, "
                    f"found {found}; {_REMEDY}."
                )
            inside = self._inside(total, branch)
            self.branches[total.node] = (branch, total.past, inside)
            self.projections.add(total.node)
            within |= inside

    def _leave_out_shared(self) -> None:
        """What a branch computes from the stream for other branches, too, is inside of none."""
        outside = {}
        for number, (branch, past, inside) in self.branches.items():
            end = self.graph.nodes[number].parents[branch]
            outside[number] = self.above[end] & ~past & ~inside
        for number, (branch, past, inside) in self.branches.items():
            for other, region in outside.items():
                if other != number:
                    inside &= ~region
            self.branches[number] = (branch, past, inside)

    def _projected(self, total: _Sum) -> int | None:
        """The branch of a sum whose other side is a projection shortcut: one product and no way around."""
        if len(total.splits) != 1:
            return None
        (split,) = total.splits
        counts = [(self._region(total, side) & self.products).bit_count() for side in (0, 1)]
        if sorted(counts)[0] != 1 or counts[0] == counts[1]:
            return None
        branch = int(counts[1] > counts[0])
        region = self._region(total, branch)
        if self._fewest(total.sides[branch], region, split) < 2:
            return None
        if not any(
            node.eqn is not None and node.eqn.primitive.name in _NONLINEAR
            for node in (self.graph.nodes[number] for number in _bits(region & self.below[split]))
        ):
            return None
        after = self.below[total.node]
        around = self.below[split] & ~after & ~self.above[total.node] & ~(1 << total.node)
        return None if any(self.readers[number] & after for number in _bits(around)) else branch

    def _fewest(self, end: int, region: int, split: int) -> float:
        """Products on the way with the fewest of them."""
        fewest: dict[int, float] = {split: 0.0}
        for number in sorted(_bits(region)):
            node = self.graph.nodes[number]
            best = min((fewest.get(parent, math.inf) for parent in node.parents), default=math.inf)
            fewest[number] = best + node.product
        return fewest.get(end, math.inf)

    def _check_nested(self) -> None:
        additions = sum(1 << number for number in self.branches)
        for number, (_, _, inside) in self.branches.items():
            inner = inside & additions
            if inner:
                one = self.graph.nodes[(inner & -inner).bit_length() - 1]
                raise DepthError(
                    f"{where(self.graph.nodes[number].eqn)}: expected residual branches one after the "
                    "other, found "
                    f"one whose inside has another that is added at {where(one.eqn)}; {_REMEDY}."
                )

    def _check_marks(self) -> None:
        within = 0
        for _, _, inside in self.branches.values():
            within |= inside
        for number in _bits(self._where(_is_mark) & ~within):
            raise DepthError(
                f"{where(self.graph.nodes[number].eqn)}: expected what mujax.residual_branch marks to be "
                "added to "
                "a stream of its shape, found no such addition; put the mark on what is added."
            )
        for glob, found in self.by_glob.items():
            if found and not found & within:
                raise DepthError(
                    f"residual: expected {glob!r} to name what is inside of residual branches, but nothing "
                    "that "
                    "it matches is on one side only of an addition to a stream; mark what is added with "
                    "mujax.residual_branch(...)."
                )

    def _check_shared(self, result: Branches) -> None:
        """Refuses a parameter that is used inside of branches and outside."""
        within = 0
        for branch in result.found:
            within |= branch.nodes
        inside = result.params
        for number in _bits(self.users & ~within):
            for path in sorted(self.graph.nodes[number].uses & inside):
                raise DepthError(
                    f"{path}: expected it to be used inside of residual branches or outside of them, found "
                    "both; "
                    f"outside at {where(self.graph.nodes[number].eqn)}. Use separate parameters, or "
                    f"{_REMEDY}."
                )

    # ---- what is said of them ----------------------------------------------------------------------

    def _branch(self, number: int) -> Branch:
        operand, past, inside = self.branches[number]
        node = self.graph.nodes[number]
        params = frozenset[str]().union(*(self.graph.nodes[n].uses for n in _bits(inside & self.users)))
        repeats = math.prod(self.graph.scans[loop].length for loop in node.loops if loop in self.graph.scans)
        stream = list(self.graph.constants(node.operands[1 - operand], past))
        constants = []
        for constant in self.graph.constants(node.operands[operand], past):
            if constant in stream:
                # Both terms of a weighted sum: that is no matter of depth.
                stream.remove(constant)
            else:
                constants.append(constant)
        exact = jnp.finfo(node.eqn.outvars[0].aval.dtype).bits >= 32
        return Branch(node.site, operand, params, repeats, tuple(constants), inside, node.eqn, exact)

    def _sites(self) -> frozenset[EqnPath]:
        sites: set[EqnPath] = set()
        for _, _, inside in self.branches.values():
            sites.update(self.graph.nodes[number].site for number in _bits(inside))
        return frozenset(sites)

    def _stream(self) -> dict[str, str]:
        """Parameters that each layer applies to the stream itself, as a norm after the addition does."""
        within = additions = 0
        for number, (_, _, inside) in self.branches.items():
            within |= inside
            additions |= 1 << number
        outside = self.users & ~within
        found: dict[str, str] = {}
        for starts, stops in self.graph.ends:
            for stop in stops:
                past = self.above[stop]
                if past & additions:
                    for start in starts:
                        found |= self._used(past & self.below[start] & outside)
        between: list[dict[str, str]] = []
        for number, (branch, _, _) in self.branches.items():
            past = self.above[self.graph.nodes[number].parents[1 - branch]]
            before = past & additions
            # A projection where a stage begins is not one in each layer.
            if before and number not in self.projections:
                between.append(self._used(past & self.below[before.bit_length() - 1] & outside))
        busy = [used for used in between if used]
        if busy and len(busy) * 2 >= len(between):
            for used in busy:
                found |= used
        return found

    def _used(self, nodes: int) -> dict[str, str]:
        return {
            path: where(self.graph.nodes[number].eqn)
            for number in _bits(nodes)
            for path in sorted(self.graph.nodes[number].uses)
        }


def _bits(nodes: int) -> Iterator[int]:
    """The nodes of a set, last first."""
    while nodes:
        top = nodes.bit_length() - 1
        yield top
        nodes ^= 1 << top


def _is_mark(node: _Node) -> bool:
    eqn = node.eqn
    return node.data and eqn is not None and eqn.primitive.name == "name" and eqn.params["name"] == MARK


def _matches(name: str, glob: str) -> bool:
    """Whether a glob names a scope or a path, or some of its successive parts."""
    return bool(name) and fnmatch.fnmatchcase(f"/{name}/", f"*/{glob.strip('/')}/*")
