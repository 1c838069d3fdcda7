"""The floating-point values of a program, numbered, as the interpreter recorded them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Final

from mujax.core.program import (
    LAYOUT,
    PRODUCTS,
    EqnPath,
    JaxprEqn,
    holds_programs,
    is_float,
    scope,
)
from mujax.core.trace import Flow, Operand, Use, Visit

_KEEPS: Final = LAYOUT | {"neg", "reduce_precision", "select_n", "mul", "add", "add_any"}


@dataclasses.dataclass(frozen=True)
class Node:
    """One floating-point value of the program.

    Attributes:
        eqn: the equation that makes it; None for inputs, the carry of a loop and the result of a `cond`.
        site: its place.
        operands: what the equation reads.
        inputs: for each operand, its node; None for constants and for what is not floating-point.
        data: whether it depends on the program's data.
        uses: parameters that meet the data here, and whether it is only a part of each.
        product: whether it is a product that a branch may consist of.
        loops: the loops around it.
        scope: the module scope, outer scopes included.
    """

    eqn: JaxprEqn | None
    site: EqnPath
    operands: tuple[Operand, ...]
    inputs: tuple[int | None, ...]
    data: bool
    uses: Mapping[str, bool]
    product: bool
    loops: tuple[EqnPath, ...]
    scope: str

    @property
    def parents(self) -> tuple[int, ...]:
        """The nodes that it is computed from."""
        return tuple(dict.fromkeys(number for number in self.inputs if number is not None))


class Nodes:
    """The floating-point values that depend on a program's inputs, in program order.

    Args:
        flow: what the interpreter recorded.

    Attributes:
        all: the nodes.
        flow: as given.
    """

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.all: list[Node] = []
        self._numbers: dict[EqnPath, int] = {}
        for site, visit in flow.visits.items():
            # The condition of a loop makes nothing that is used outside of it.
            if visit.kind != "const" and "condition" not in site and _makes_float(visit):
                self._numbers[site] = len(self.all)
                self.all.append(self._node(site, visit))

    def _node(self, site: EqnPath, visit: Visit) -> Node:
        eqn, operands = visit.eqn, visit.operands
        floats = [True] * len(operands) if eqn is None else map(is_float, eqn.invars)
        inputs = tuple(
            self.at(operand.origin) if is_floating and operand.kind != "const" else None
            for operand, is_floating in zip(operands, floats, strict=True)
        )
        uses: dict[str, bool] = {}
        for use in visit.uses:
            if not _is_penalty(use):
                uses[use.path] = use.part and uses.get(use.path, True)
        data = visit.kind == "data"
        product = (
            eqn is not None
            and data
            and (
                (bool(uses) and holds_programs(eqn))
                or (
                    eqn.primitive.name in PRODUCTS
                    and all(operand.kind != "const" for operand in operands[:2])
                )
            )
        )
        around = [site[: step + 1] for step in range(0, len(site) - 1, 2)]
        loops = tuple(path for path in around if site[len(path)] == "body")
        parts = [scope(self.flow.control[path]) for path in around if path in self.flow.control]
        name = "/".join(part for part in (*parts, "" if eqn is None else scope(eqn)) if part)
        return Node(eqn, site, operands, inputs, data, uses, product, loops, name)

    def at(self, site: EqnPath | None) -> int | None:
        """The node that a visit made; None if it is a constant or not floating-point."""
        return None if site is None else self._numbers.get(site)

    def ends(self) -> Iterator[tuple[list[int], list[int]]]:
        """For each loop, the nodes of its carry and those that the next iteration starts from."""
        for loop in self.flow.loops.values():
            starts, stops = (
                [number for site in sites if (number := self.at(site)) is not None]
                for sites in (loop.carry, loop.ends)
            )
            yield starts, stops

    def descendants(self) -> list[int]:
        """Per node the nodes computed from it."""
        out = [0] * len(self.all)
        for number in range(len(self.all) - 1, -1, -1):
            for parent in self.all[number].parents:
                out[parent] |= out[number] | 1 << number
        return out

    def readers(self) -> list[int]:
        """Per node the nodes that read it."""
        out = [0] * len(self.all)
        for number, node in enumerate(self.all):
            for parent in node.parents:
                out[parent] |= 1 << number
        return out

    def constants(self, number: int | None, past: int = 0) -> Iterator[tuple[float, float]]:
        """The numbers that a value was multiplied with since its last product, and that product's weight.

        Args:
            number: the value.
            past: nodes where to stop.

        Yields:
            Each number in the base and in the target.
        """
        while number is not None and not past >> number & 1:
            node = self.all[number]
            if node.eqn is None:
                return
            name = node.eqn.primitive.name
            own = [(one.kind, n) for one, n in zip(node.operands, node.inputs, strict=True) if n is not None]
            if name in PRODUCTS:
                weights = [n for kind, n in own if kind == "param"]
                if len(own) == 2 and len(weights) == 1:
                    yield from self.constants(weights[0])
                return
            known = [one.const for one in node.operands if one.const is not None]
            if name == "mul" and known:
                yield known[0]
            elif name == "div" and node.operands[1].const is not None:
                base, target = (1 / const if const else math.inf for const in node.operands[1].const)
                yield base, target
            elif name not in _KEEPS:
                return
            moving = [n for kind, n in own if kind == "data"] or [n for _, n in own]
            if len(moving) != 1:
                return
            number = moving[0]


def scanned_layers(flow: Flow) -> dict[str, frozenset[int]]:
    """Axes of parameters that a scan over layers strips: it carries an activation through their products.

    Args:
        flow: what the interpreter recorded of the call.

    Returns:
        The axes by path.
    """
    found: dict[str, frozenset[int]] = {}
    scans = [loop for loop in flow.loops.values() if loop.length is not None and loop.layers]
    if not scans:
        return found
    nodes = Nodes(flow)
    descends = nodes.descendants()
    for scan in scans:
        after = 0
        for site in scan.carry:
            if (number := nodes.at(site)) is not None:
                after |= descends[number]
        paths = {path for path, _ in scan.layers}
        if any(nodes.all[n].product and not paths.isdisjoint(nodes.all[n].uses) for n in bits(after)):
            for path, axis in scan.layers:
                found[path] = found.get(path, frozenset()) | {axis}
    return found


def bits(nodes: int) -> Iterator[int]:
    """The nodes of a set, last first."""
    while nodes:
        top = nodes.bit_length() - 1
        yield top
        nodes ^= 1 << top


def _makes_float(visit: Visit) -> bool:
    return visit.eqn is None or any(is_float(var) for var in visit.eqn.outvars)


def _is_penalty(use: Use) -> bool:
    """Whether it is one of a number that was computed from a parameter, as a penalty is."""
    return not use.axes and use.kind in ("opaque", "statistic")
