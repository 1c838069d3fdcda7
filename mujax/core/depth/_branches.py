"""Residual branches: where a program adds `f(x)` to `x`, and the contents of `f`.

At an addition the *split* is what both operands were last computed from alike. The operand that goes from
there through products with parameters is the branch; the one that does not is the stream. Past an addition
that was found, only the stream counts as its past: so `(x + attention(x)) + mlp(x)` is two branches from one
split. A set of nodes is an integer with a bit for each.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Shaped

from mujax._arguments import TREE, takes
from mujax.core.depth._nodes import Node, Nodes, bits, scanned_layers
from mujax.core.program import EqnPath, JaxprEqn, checkpoint_label, dtype_of, shape_of, source_line
from mujax.core.trace import Flow
from mujax.errors import DepthError

MARK: Final = "mujax.residual_branch"
_REMEDY: Final = (
    "name the branches with residual=[...] (globs of module scopes or of parameters) or mark what each "
    "adds with mujax.residual_branch(...)"
)


@takes(y=TREE)
def residual_branch(y: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """Marks a value as the output of a residual branch; returns it unchanged.

    Only needed where `mup_init(..., depth=...)` cannot find the branches of a model by itself. Once a program
    has a mark, only marked values count as branches. It costs nothing when the program runs.

    Args:
        y: the value that is added to the stream, possibly after a norm or a dropout.

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
            addition, and that product's weight, each in the base and in the target; those of the stream are
            left out.
        nodes: the nodes that are inside, a bit for each.
        eqn: the addition's equation.
        tolerance: how far its constants may be from what they were written as, relative.
    """

    site: EqnPath
    operand: int
    params: frozenset[str]
    repeats: int
    constants: tuple[tuple[float, float], ...]
    nodes: int
    eqn: JaxprEqn
    tolerance: float

    @property
    def where(self) -> str:
        """`file:line` in the user's code."""
        return source_line(self.eqn)


@dataclasses.dataclass(frozen=True)
class Branches:
    """The residual branches of a program, and what goes with them.

    Attributes:
        found: the residual branches, in program order.
        layers: axes of parameters that a scan over layers strips: path -> axes.
        sites: the equations inside of branches.
        stream: parameters on the stream between branches, with the place of a use.
        shared: parameters that several layers share, and how many branches a run goes through with each.
    """

    found: tuple[Branch, ...]
    layers: Mapping[str, frozenset[int]]
    sites: frozenset[EqnPath]
    stream: Mapping[str, str]
    shared: Mapping[str, int]

    @property
    def params(self) -> frozenset[str]:
        """The parameters inside of branches."""
        return frozenset[str]().union(*(branch.params for branch in self.found))

    @property
    def count(self) -> int:
        """Number of branches that a run goes through."""
        return sum(branch.repeats for branch in self.found)


def find_branches(flow: Flow, residual: Sequence[str] = (), *, part: bool = False) -> Branches:
    """Finds the residual branches of a program.

    Args:
        flow: what the interpreter recorded of the traced call.
        residual: globs of module scopes or of parameters that make up the branches; there are no others then.
        part: whether the program may be a part of the model, which some globs do not match.

    Raises:
        DepthError: an addition may or may not be that of a branch.
    """
    return _Search(Nodes(flow), tuple(residual), part).run()


# ---- the search ------------------------------------------------------------------------------------

_ADDS: Final = frozenset(["add", "add_any", "sub"])
_NONLINEAR: Final = frozenset(
    [
        *["max", "min", "tanh", "logistic", "erf", "erfc", "exp", "exp2", "sin", "cos", "abs", "pow"],
        *["integer_pow", "square", "expm1", "log1p", "log"],
    ]
)


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
    """Goes through the additions of a program in order."""

    def __init__(self, nodes: Nodes, residual: tuple[str, ...], part: bool) -> None:
        self.nodes = nodes.all
        self.constants = nodes.constants
        self.flow = nodes.flow
        self.ends = list(nodes.ends())
        self.part = part
        self.residual = residual
        self.above: list[int] = []
        """Per node itself and what it was computed from, along the streams."""
        self.below = nodes.descendants()
        self.readers = nodes.readers()
        self.products = self._where(lambda node: node.product)
        self.users = self._where(lambda node: bool(node.uses))
        self.data = self._where(lambda node: node.data)
        self.marked, self.by_glob = self._marks()
        self.explicit = bool(residual) or bool(self.marked)
        self.branches: dict[int, tuple[int, int, int]] = {}
        """Addition -> (operand, what both operands are computed from, inside)."""
        self.projections: set[int] = set()
        self.open: list[tuple[_Sum, str]] = []

    def _where(self, holds: Callable[[Node], bool]) -> int:
        return sum(1 << number for number, node in enumerate(self.nodes) if holds(node))

    def _marks(self) -> tuple[int, dict[str, int]]:
        by_glob = dict.fromkeys(self.residual, 0)
        marked = 0
        for number, node in enumerate(self.nodes):
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
                    where="residual",
                    expected="globs of module scopes or of parameters",
                    got=f"{glob!r}, which matches nothing in the traced call",
                    remedy=f"the first scope with a parameter is {self._first_scope()!r}",
                )
            marked |= found
        return marked, by_glob

    def _first_scope(self) -> str:
        return next((node.scope for node in self.nodes if node.uses and node.scope), "")

    # ---- the walk ----------------------------------------------------------------------------------

    def run(self) -> Branches:
        """All branches.

        Raises:
            DepthError: an addition may or may not be that of a branch.
        """
        for number, node in enumerate(self.nodes):
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
        result = Branches(
            found, scanned_layers(self.flow), self._sites(), self._stream(), self._shared(found)
        )
        self._check_shared(result)
        return result

    def _skip(self, number: int, node: Node) -> int | None:
        """The stream's operand if the node adds a residual branch."""
        total = self._sum(number, node)
        if total is None:
            return self._refuse_sum_by_index(number, node)
        sides = [self._region(total, side) for side in (0, 1)]
        if self.explicit:
            # A sum inside of a named scope belongs to that scope.
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
        if any(self._gates(inner) for inner in bits(sides[1 - branch])):
            self.open.append((total, "a stream that is multiplied with another activation"))
            return None
        return self._take(total, branch)

    def _refuse_sum_by_index(self, number: int, node: Node) -> None:
        """Notes `x.at[...].add(f(x))`, which may be a branch that is added to a part of the stream."""
        if node.eqn is None or not node.eqn.primitive.name.startswith("scatter") or len(node.operands) != 3:
            return
        stream, _, added = node.inputs
        if stream is None or added is None or "add" not in node.eqn.primitive.name:
            return
        common = self.above[stream] & self.above[added] & self.data
        region = self.above[added] & ~common
        if common and region & self.products and region & self.users and not self.explicit:
            total = _Sum(number, (stream, added), common, tuple(self._last(common)))
            self.open.append((total, "an addition to a part of an array"))

    def _gates(self, number: int) -> bool:
        node = self.nodes[number]
        return (
            node.eqn is not None
            and node.eqn.primitive.name in ("mul", "div")
            and [operand.kind for operand in node.operands] == ["data", "data"]
        )

    def _sum(self, number: int, node: Node) -> _Sum | None:
        if (
            node.eqn is None
            or node.eqn.primitive.name not in _ADDS
            or not node.data
            or len(node.parents) != 2
        ):
            return None
        shapes = {shape_of(var) for var in (*node.eqn.invars, *node.eqn.outvars)}
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
        loops = self.nodes[total.node].loops
        for number in bits(region & ~inside):
            node = self.nodes[number]
            readers = self.readers[number]
            if node.loops[: len(loops)] == loops and readers and not readers & ~inside:
                inside |= 1 << number
        return inside

    # ---- ambiguous sums --------------------------------------------------------------------------

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
                raise DepthError(
                    where=source_line(self._equation(total.node)),
                    expected="an addition x + f(x) whose branch can be distinguished from its stream",
                    got=found,
                    remedy=_REMEDY,
                )
            inside = self._inside(total, branch)
            self.branches[total.node] = (branch, total.past, inside)
            self.projections.add(total.node)
            within |= inside

    def _leave_out_shared(self) -> None:
        """What a branch computes from the stream for other branches, too, is inside of none."""
        outside = {}
        for number, (branch, past, inside) in self.branches.items():
            end = self.nodes[number].parents[branch]
            outside[number] = self.above[end] & ~past & ~inside
        for number, (branch, past, inside) in self.branches.items():
            for other, region in outside.items():
                if other != number:
                    inside &= ~region
            self.branches[number] = (branch, past, inside)

    def _projected(self, total: _Sum) -> int | None:
        """The branch of a sum whose other side is a projection shortcut: one product and no way around."""
        if len(total.splits) != 1 or self._equation(total.node).primitive.name not in _ADDS:
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
            for node in (self.nodes[number] for number in bits(region & self.below[split]))
        ):
            return None
        after = self.below[total.node]
        around = self.below[split] & ~after & ~self.above[total.node] & ~(1 << total.node)
        return None if any(self.readers[number] & after for number in bits(around)) else branch

    def _fewest(self, end: int, region: int, split: int) -> float:
        """Products on the way with the fewest of them."""
        fewest: dict[int, float] = {split: 0.0}
        for number in sorted(bits(region)):
            node = self.nodes[number]
            best = min((fewest.get(parent, math.inf) for parent in node.parents), default=math.inf)
            fewest[number] = best + node.product
        return fewest.get(end, math.inf)

    def _check_nested(self) -> None:
        additions = sum(1 << number for number in self.branches)
        for number, (_, _, inside) in self.branches.items():
            inner = inside & additions
            if inner:
                one = self._equation((inner & -inner).bit_length() - 1)
                raise DepthError(
                    where=source_line(self._equation(number)),
                    expected="residual branches one after the other",
                    got=f"one that contains another, which is added at {source_line(one)}",
                    remedy=_REMEDY,
                )

    def _check_marks(self) -> None:
        within = 0
        for _, _, inside in self.branches.values():
            within |= inside
        for number in bits(self._where(_is_mark) & ~within):
            raise DepthError(
                where=source_line(self._equation(number)),
                expected="what mujax.residual_branch marks to be added to a stream of its shape",
                got="no such addition",
                remedy="put the mark on what is added",
            )
        for glob, found in self.by_glob.items():
            if found and not found & within:
                raise DepthError(
                    where="residual",
                    expected=f"{glob!r} to name what is inside of residual branches",
                    got="no match on one side only of an addition to a stream",
                    remedy="mark what is added with mujax.residual_branch(...)",
                )

    def _check_shared(self, result: Branches) -> None:
        """Refuses a parameter that is used inside of branches and outside."""
        within = 0
        for branch in result.found:
            within |= branch.nodes
        inside = result.params
        for number in bits(self.users & ~within):
            for path in sorted(inside.intersection(self.nodes[number].uses)):
                raise DepthError(
                    where=path,
                    expected="it to be used inside of residual branches or outside of them",
                    got=f"both, outside at {source_line(self._equation(number))}",
                    remedy=f"use separate parameters, or {_REMEDY}",
                )

    # ---- the result ------------------------------------------------------------------------------

    def _equation(self, number: int) -> JaxprEqn:
        """The equation of a node that is no input and no carry."""
        eqn = self.nodes[number].eqn
        assert eqn is not None
        return eqn

    def _branch(self, number: int) -> Branch:
        operand, past, inside = self.branches[number]
        node = self.nodes[number]
        params = frozenset[str]().union(*(self.nodes[n].uses for n in bits(inside & self.users)))
        repeats = math.prod(self.flow.loops[loop].length or 1 for loop in node.loops)
        stream = list(self.constants(node.inputs[1 - operand], past))
        constants = []
        for constant in self.constants(node.inputs[operand], past):
            if constant in stream:
                # Both terms of a weighted sum: it has nothing to do with depth.
                stream.remove(constant)
            else:
                constants.append(constant)
        eqn = self._equation(number)
        tolerance = max(1e-5, float(jnp.finfo(dtype_of(eqn.outvars[0])).eps))
        return Branch(node.site, operand, params, repeats, tuple(constants), inside, eqn, tolerance)

    def _sites(self) -> frozenset[EqnPath]:
        sites: set[EqnPath] = set()
        for _, _, inside in self.branches.values():
            sites.update(self.nodes[number].site for number in bits(inside))
        return frozenset(sites)

    def _stream(self) -> dict[str, str]:
        """Parameters that each layer applies to the stream itself, as a norm after the addition does."""
        within = additions = 0
        for number, (_, _, inside) in self.branches.items():
            within |= inside
            additions |= 1 << number
        outside = self.users & ~within
        found: dict[str, str] = {}
        for starts, stops in self.ends:
            for stop in stops:
                past = self.above[stop]
                if past & additions:
                    for start in starts:
                        found |= self._used(past & self.below[start] & outside)
        between: list[dict[str, str]] = []
        for number, (branch, _, _) in self.branches.items():
            past = self.above[self.nodes[number].parents[1 - branch]]
            before = past & additions
            # A projection where a stage begins is not one in each layer.
            if before and number not in self.projections:
                between.append(self._used(past & self.below[before.bit_length() - 1] & outside))
        busy = [used for used in between if used]
        if busy and len(busy) * 2 >= len(between):
            for used in busy:
                found |= used
        return found

    def _shared(self, found: Sequence[Branch]) -> dict[str, int]:
        """What more than the two branches of one layer use as a whole."""
        times: dict[str, int] = {}
        for branch in found:
            uses = [self.nodes[number].uses for number in bits(branch.nodes & self.users)]
            for path in sorted({path for one in uses for path, is_part in one.items() if not is_part}):
                times[path] = times.get(path, 0) + branch.repeats
        return {path: count for path, count in times.items() if count > 2}

    def _used(self, nodes: int) -> dict[str, str]:
        return {
            path: source_line(self._equation(number))
            for number in bits(nodes)
            for path in sorted(self.nodes[number].uses)
        }


def _is_mark(node: Node) -> bool:
    return node.data and node.eqn is not None and checkpoint_label(node.eqn) == MARK


def _matches(name: str, glob: str) -> bool:
    """Whether a glob names a scope or a path, or some of its successive parts."""
    return bool(name) and fnmatch.fnmatchcase(f"/{name}/", f"*/{glob.strip('/')}/*")
