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

from mujax.core.program import (
    LAYOUT,
    PARTS,
    PRODUCTS,
    ClosedJaxpr,
    EqnPath,
    JaxprEqn,
    Subprogram,
    Var,
    dtype_of,
    holds_programs,
    scope,
    shape_of,
    subprograms,
)

Kind = Literal["const", "param", "data"]
_ORDER: Final[Mapping[Kind, int]] = {"const": 0, "param": 1, "data": 2}
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
_KEEPS: Final = LAYOUT | {"neg", "reduce_precision", "select_n"}


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

    eqn: JaxprEqn | None
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
    def of(cls, program: ClosedJaxpr, params: Mapping[int, str]) -> Graph:
        """Reads a traced program."""
        graph = cls()
        inputs = []
        for position, var in enumerate(program.jaxpr.invars):
            path = params.get(position)
            roots = frozenset[str]() if path is None else frozenset([path])
            kind: Kind = "data" if path is None else "param"
            axes = tuple(range(len(shape_of(var)))) if path is not None else None
            node = graph._add(None, (), (), kind == "data", (), "") if is_float(var) else None
            inputs.append(Atom(kind, node, roots, None, axes, path is not None))
        graph.outs = graph._walk(program, inputs, (), (), "")
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
        eqn: JaxprEqn | None,
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
        program: ClosedJaxpr,
        inputs: Sequence[Atom],
        site: EqnPath,
        loops: tuple[EqnPath, ...],
        name: str,
    ) -> list[Atom]:
        jaxpr = program.jaxpr
        consts = [_closed_over(array) for array in program.consts]
        env: dict[Any, Atom] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Atom:
            return _literal(atom) if isinstance(atom, jex.Literal) else env[atom]

        for index, eqn in enumerate(jaxpr.eqns):
            ins = [read(atom) for atom in eqn.invars]
            inner = "/".join(part for part in (name, scope(eqn)) if part)
            outs = self._equation(eqn, ins, (*site, index), loops, inner)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(
        self, eqn: JaxprEqn, ins: Sequence[Atom], site: EqnPath, loops: tuple[EqnPath, ...], name: str
    ) -> Sequence[Atom]:
        inner = subprograms(eqn)
        match [one.kind for one in inner]:
            case []:
                return self._plain(eqn, ins, site, loops, name)
            case ["call"]:
                return self._walk(inner[0].program, ins, (*site, inner[0].step), loops, name)
            case ["branch", *_]:
                return self._branches(eqn, inner, ins, site, loops, name)
            case _:
                return self._loop(inner[-1], ins, site, loops, name)

    def _plain(
        self, eqn: JaxprEqn, ins: Sequence[Atom], site: EqnPath, loops: tuple[EqnPath, ...], name: str
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
        product = data and (
            (bool(uses) and holds_programs(eqn))
            or (primitive in PRODUCTS and all(atom.kind != "const" for atom in ins[:2]))
        )
        node = self._add(eqn, site, ins, data, loops, name, uses, product)
        axes = _axes_after(eqn, ins)
        kept = frozenset[str]() if data else roots
        whole = primitive not in PARTS and all(atom.whole for atom in ins if atom.roots)
        return [Atom(kind, node if is_float(var) else None, kept, None, axes, whole) for var in eqn.outvars]

    def _loop(
        self, body: Subprogram, ins: Sequence[Atom], site: EqnPath, loops: tuple[EqnPath, ...], name: str
    ) -> list[Atom]:
        inside = (*loops, site)
        variables = body.program.jaxpr.invars
        carried = {number: ins[body.operands[number]] for number, _ in body.carried}
        carry = self._carry(list(carried.values()), [variables[number] for number in carried], inside, name)
        given = [ins[operand] for operand in body.operands]
        for number, atom in zip(carried, carry, strict=True):
            given[number] = atom
        stripped = []
        for number in sorted(body.sliced):
            atom = given[number]
            if atom.kind == "param" and atom.axes and len(atom.roots) == 1:
                stripped.append((next(iter(atom.roots)), atom.axes[0]))
            node = atom.node
            if node is not None and is_float(variables[number]):
                node = self._add(None, site, [atom], atom.kind == "data", inside, name)
            axes = atom.axes[1:] if atom.axes else None
            given[number] = dataclasses.replace(atom, node=node, number=None, axes=axes, whole=False)
        if body.length is not None:
            nodes = tuple(atom.node for atom in carry if atom.node is not None)
            self.scans[site] = Scan(nodes, body.length, tuple(stripped))
        outs = self._walk(body.program, given, (*site, body.step), inside, name)
        self._close(carry, [outs[result] for _, result in body.carried])
        return [dataclasses.replace(atom, number=None, axes=None) for atom in outs]

    def _carry(
        self, atoms: Sequence[Atom], variables: Sequence[Var], loops: tuple[EqnPath, ...], name: str
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

    def _branches(
        self,
        eqn: JaxprEqn,
        inner: Sequence[Subprogram],
        ins: Sequence[Atom],
        site: EqnPath,
        loops: tuple[EqnPath, ...],
        name: str,
    ) -> list[Atom]:
        branches = [
            self._walk(
                one.program, [ins[operand] for operand in one.operands], (*site, one.step), loops, name
            )
            for one in inner
        ]
        outs = []
        for values, var in zip(zip(*branches, strict=True), eqn.outvars, strict=True):
            kind = _widest([*values, ins[0]])
            roots = frozenset[str]().union(*(value.roots for value in values))
            node = self._add(None, site, values, kind == "data", loops, name) if is_float(var) else None
            outs.append(Atom(kind, node, roots if kind == "param" else frozenset()))
        return outs


def is_float(var: Any) -> bool:
    dtype = dtype_of(var)
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


def _folded(eqn: JaxprEqn, ins: Sequence[Atom]) -> float | None:
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


def _axes_after(eqn: JaxprEqn, ins: Sequence[Atom]) -> tuple[int, ...] | None:
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
