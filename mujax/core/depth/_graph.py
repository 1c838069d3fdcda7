"""A program as a graph of its floating-point values, with loops and calls opened up."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core as jex

from mujax.core.program import SUBPROGRAMS, EqnPath, scope

Kind = Literal["const", "param", "data"]
_ORDER: Final[Mapping[Kind, int]] = {"const": 0, "param": 1, "data": 2}
_LAYOUT: Final = frozenset(
    [
        *["reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "rev", "slice", "split"],
        *["dynamic_slice", "gather", "convert_element_type", "copy", "name", "sharding_constraint"],
        "optimization_barrier",
    ]
)
_PARTS: Final = frozenset(["slice", "dynamic_slice", "gather", "split", "unstack"])
PRODUCTS: Final = frozenset(["dot_general", "conv_general_dilated", "ragged_dot_general"])
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
class Atom:
    """What is known of one value.

    Attributes:
        kind: what it depends on.
        node: its node; None for integers, booleans and constants.
        roots: parameters that it is a function of, if of nothing else.
        number: the number that it is throughout, if it is one.
        axes: which of the parameter's axes each of its axes is, of a parameter that was only transposed.
        whole: whether it is made from whole parameters, and not from one layer's part of them.
    """

    kind: Kind
    node: int | None = None
    roots: frozenset[str] = frozenset()
    number: float | None = None
    axes: tuple[int, ...] | None = None
    whole: bool = False


_CONST: Final = Atom("const")


@dataclasses.dataclass
class Node:
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
        whole: those of the uses that are of a whole parameter, and not of one layer's part of it.
    """

    eqn: Any
    site: EqnPath
    operands: tuple[Atom, ...]
    parents: tuple[int, ...]
    data: bool
    uses: frozenset[str]
    product: bool
    loops: tuple[EqnPath, ...]
    scope: str
    whole: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Scan:
    """A scan: its carry, the length, and the axes of the parameters that it strips."""

    carry: tuple[int, ...]
    length: int
    stripped: tuple[tuple[str, int], ...]


class Graph:
    """The floating-point values of a program, in program order."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.scans: dict[EqnPath, Scan] = {}
        self.ends: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self.outs: list[Atom] = []

    @classmethod
    def of(cls, program: Any, params: Mapping[int, str]) -> Graph:
        """Reads a `ClosedJaxpr`."""
        graph = cls()
        inputs = []
        for position, var in enumerate(program.jaxpr.invars):
            path = params.get(position)
            roots = frozenset[str]() if path is None else frozenset([path])
            kind: Kind = "data" if path is None else "param"
            axes = tuple(range(len(shape_of(var)))) if path is not None else None
            node = graph._add(None, (), (), kind == "data", (), "") if is_float(var) else None
            inputs.append(Atom(kind, node, roots, None, axes, path is not None))
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

    def constants(self, atom: Atom, past: int = 0) -> Iterator[float]:
        """The numbers that a value was multiplied with since its last product, and that product's weight."""
        while atom.node is not None and not past >> atom.node & 1:
            node = self.nodes[atom.node]
            if node.eqn is None:
                return
            name = node.eqn.primitive.name
            own = [one for one in node.operands if one.node is not None]
            numbers = [one.number for one in node.operands if one.number is not None]
            moving = [one for one in own if one.kind == "data"] or own
            if name in PRODUCTS:
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
        operands: Sequence[Atom],
        data: bool,
        loops: tuple[EqnPath, ...],
        name: str,
        uses: frozenset[str] = frozenset(),
        product: bool = False,
    ) -> int:
        parents = tuple(dict.fromkeys(atom.node for atom in operands if atom.node is not None))
        whole = uses & frozenset(path for atom in operands if atom.whole for path in atom.roots)
        self.nodes.append(Node(eqn, site, tuple(operands), parents, data, uses, product, loops, name, whole))
        return len(self.nodes) - 1

    def _walk(
        self,
        program: Any,
        consts: Sequence[Atom],
        inputs: Sequence[Atom],
        site: EqnPath,
        loops: tuple[EqnPath, ...],
        name: str,
    ) -> list[Atom]:
        env: dict[Any, Atom] = dict(zip(program.constvars, consts, strict=True))
        env.update(zip(program.invars, inputs, strict=True))

        def read(atom: Any) -> Atom:
            return _literal(atom) if isinstance(atom, jex.Literal) else env[atom]

        for index, eqn in enumerate(program.eqns):
            ins = [read(atom) for atom in eqn.invars]
            inner = "/".join(part for part in (name, scope(eqn)) if part)
            outs = self._equation(eqn, ins, (*site, index), loops, inner)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in program.outvars]

    def _sub(
        self, program: Any, ins: Sequence[Atom], site: EqnPath, loops: tuple[EqnPath, ...], name: str
    ) -> list[Atom]:
        if isinstance(program, jex.ClosedJaxpr):
            consts = [_closed_over(array) for array in program.consts]
            return self._walk(program.jaxpr, consts, ins, site, loops, name)
        return self._walk(program, (), ins, site, loops, name)

    def _equation(
        self, eqn: Any, ins: Sequence[Atom], site: EqnPath, loops: tuple[EqnPath, ...], name: str
    ) -> Sequence[Atom]:
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
        self, eqn: Any, ins: Sequence[Atom], site: EqnPath, loops: tuple[EqnPath, ...], name: str
    ) -> list[Atom]:
        primitive = eqn.primitive.name
        kind = _widest(ins)
        roots = frozenset[str]().union(*(atom.roots for atom in ins)) if ins else frozenset[str]()
        if kind == "const":
            number = _folded(eqn, ins)
            return [dataclasses.replace(_CONST, number=number) for _ in eqn.outvars]
        if not any(is_float(var) for var in eqn.outvars):
            return [Atom(kind) for _ in eqn.outvars]
        data = kind == "data"
        uses = frozenset[str]()
        if data:
            # A number computed from a parameter (a penalty) is no use of it.
            uses = uses.union(
                *(
                    atom.roots
                    for atom, var in zip(ins, eqn.invars, strict=True)
                    if any(size != 1 for size in shape_of(var)) or atom.axes is not None
                )
            )
        opaque = any(isinstance(value, jex.Jaxpr | jex.ClosedJaxpr) for value in eqn.params.values())
        product = data and (
            (opaque and bool(uses))
            or (primitive in PRODUCTS and all(atom.kind != "const" for atom in ins[:2]))
        )
        node = self._add(eqn, site, ins, data, loops, name, uses, product)
        axes = _axes_after(eqn, ins)
        kept = frozenset[str]() if data else roots
        whole = primitive not in _PARTS and all(atom.whole for atom in ins if atom.roots)
        return [Atom(kind, node if is_float(var) else None, kept, None, axes, whole) for var in eqn.outvars]

    def _scan(
        self, eqn: Any, ins: Sequence[Atom], site: EqnPath, loops: tuple[EqnPath, ...], name: str
    ) -> list[Atom]:
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
            if node is not None and is_float(var):
                node = self._add(None, site, [atom], atom.kind == "data", inside, name)
            slices.append(
                dataclasses.replace(
                    atom, node=node, number=None, axes=atom.axes[1:] if atom.axes else None, whole=False
                )
            )
        nodes = tuple(atom.node for atom in carry if atom.node is not None)
        self.scans[site] = Scan(nodes, length, tuple(stripped))
        outs = self._sub(body, [*ins[:consts], *carry, *slices], (*site, "jaxpr"), inside, name)
        self._close(carry, outs[:count])
        return [dataclasses.replace(atom, number=None, axes=None) for atom in outs]

    def _while(
        self, eqn: Any, ins: Sequence[Atom], site: EqnPath, loops: tuple[EqnPath, ...], name: str
    ) -> list[Atom]:
        first = eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
        body = eqn.params["body_jaxpr"]
        inside = (*loops, site)
        carry = self._carry(ins[first:], body.jaxpr.invars[eqn.params["body_nconsts"] :], inside, name)
        given = [*ins[eqn.params["cond_nconsts"] : first], *carry]
        outs = self._sub(body, given, (*site, "body_jaxpr"), inside, name)
        self._close(carry, outs)
        return [dataclasses.replace(atom, number=None, axes=None) for atom in outs]

    def _carry(
        self, atoms: Sequence[Atom], variables: Sequence[Any], loops: tuple[EqnPath, ...], name: str
    ) -> list[Atom]:
        """What a loop carries as its body sees it: data, whatever it starts from."""
        return [
            Atom("data", self._add(None, loops[-1], [atom], True, loops, name) if is_float(var) else None)
            for atom, var in zip(atoms, variables, strict=True)
        ]

    def _close(self, carry: Sequence[Atom], outs: Sequence[Atom]) -> None:
        self.ends.append(
            (
                tuple(atom.node for atom in carry if atom.node is not None),
                tuple(atom.node for atom in outs if atom.node is not None),
            )
        )

    def _cond(
        self, eqn: Any, ins: Sequence[Atom], site: EqnPath, loops: tuple[EqnPath, ...], name: str
    ) -> list[Atom]:
        branches = [
            self._sub(program, ins[1:], (*site, f"branches:{number}"), loops, name)
            for number, program in enumerate(eqn.params["branches"])
        ]
        outs = []
        for values, var in zip(zip(*branches, strict=True), eqn.outvars, strict=True):
            kind = _widest([*values, ins[0]])
            roots = frozenset[str]().union(*(value.roots for value in values))
            node = self._add(None, site, values, kind == "data", loops, name) if is_float(var) else None
            outs.append(Atom(kind, node, roots if kind == "param" else frozenset()))
        return outs


def shape_of(var: Any) -> tuple[int, ...]:
    return tuple(getattr(var.aval, "shape", ()))


def is_float(var: Any) -> bool:
    dtype = getattr(var.aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def _widest(atoms: Sequence[Atom]) -> Kind:
    kinds: list[Kind] = ["const", *(atom.kind for atom in atoms)]
    return max(kinds, key=lambda kind: _ORDER[kind])


def _literal(atom: Any) -> Atom:
    return dataclasses.replace(_CONST, number=_number(atom.val))


def _closed_over(array: Any) -> Atom:
    return _CONST if isinstance(array, Tracer) else dataclasses.replace(_CONST, number=_number(array))


def _number(value: Any) -> float | None:
    floating = isinstance(value, float) or jnp.issubdtype(getattr(value, "dtype", np.int32), jnp.floating)
    return float(np.asarray(value).reshape(())) if floating and np.size(value) == 1 else None


def _folded(eqn: Any, ins: Sequence[Atom]) -> float | None:
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


def _axes_after(eqn: Any, ins: Sequence[Atom]) -> tuple[int, ...] | None:
    """The axes of a parameter that was only transposed or cast."""
    if not ins or ins[0].kind != "param" or ins[0].axes is None or len(ins) != 1:
        return None
    if eqn.primitive.name == "transpose":
        return tuple(ins[0].axes[axis] for axis in eqn.params["permutation"])
    same = eqn.primitive.name in ("convert_element_type", "copy", "sharding_constraint", "device_put")
    return ins[0].axes if same else None


def bits(nodes: int) -> Iterator[int]:
    """The nodes of a set, last first."""
    while nodes:
        top = nodes.bit_length() - 1
        yield top
        nodes ^= 1 << top
