"""A model's traced initialiser and its calls, as pure functions of flat arrays."""

from __future__ import annotations

import copy
import dataclasses
import operator
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr

from mujax.core.frontends._mesh import mesh_of_one, moved
from mujax.spec import leaf_path

Shape = tuple[int, ...]

Static = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Call:
    """A user's call as a pure function of flat arrays.

    Attributes:
        function: flat arrays -> any pytree of arrays.
        leaves: the arrays, or their shapes.
        params: the parameters among them: position -> path.
        state: other state of the model among them (batch statistics): position -> path.
        inputs: positions of the arrays in the user's positional arguments, and in the keyword arguments.
        output: takes the model's own output out of the result of `function`.
        static: everything else that `function` depends on; equal where two functions of one model do the
            same.
        one_device: whether it is traced on a mesh of one device in place of the one in context.
    """

    function: Callable[..., Any]
    leaves: Sequence[Any]
    params: Mapping[int, str]
    state: Mapping[int, str]
    inputs: tuple[range, range] = (range(0), range(0))
    output: Callable[[Any], Any] = lambda result: result
    static: tuple[Any, ...] = ()
    one_device: bool = False

    def trace(self) -> tuple[ClosedJaxpr, Result]:
        """The function's program and its result."""
        builds: list[Callable[[Sequence[Any]], Any]] = []

        def flat(*arrays: Any) -> list[Any]:
            outputs, build = _open(self.function(*arrays))
            builds.append(build)
            return outputs

        traced = jax.make_jaxpr(flat, return_shape=True)
        if self.one_device:
            with mesh_of_one():
                program, shapes = traced(*map(moved, self.leaves))
        else:
            program, shapes = traced(*self.leaves)
        return program, Result(shapes, builds[-1])


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a traced call.

    Attributes:
        shapes: its arrays, flat, as shapes.
        build: makes the result from flat arrays. All else in it (a string, None) is as it was in the trace.
    """

    shapes: Sequence[Any]
    build: Callable[[Sequence[Any]], Any]


def _open(result: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The arrays of a result, flat, and a function that makes the result from such arrays.

    A model may return what JAX does not take for a tree: strings, and objects that hold arrays, such as a
    dataclass that was never registered. Of an object the attributes are replaced in a copy.
    """
    leaves, structure = jax.tree.flatten(result)
    arrays: list[Any] = []
    fills: list[Callable[[Sequence[Any]], Any]] = []
    for leaf in leaves:
        if is_array(leaf):
            fills.append(operator.itemgetter(len(arrays)))
            arrays.append(leaf)
            continue
        inside, build = _open(_attributes(leaf))
        if inside:
            taken = slice(len(arrays), len(arrays) + len(inside))
            arrays += inside
            # The arrays of the trace must not outlive it, so the copy is made without them.
            empty = _with_attributes(leaf, dict.fromkeys(_attributes(leaf)))
            fills.append(
                lambda given, taken=taken, build=build, empty=empty: _with_attributes(
                    empty, build(given[taken])
                )
            )
        else:
            fills.append(lambda given, leaf=leaf: leaf)
    return arrays, lambda given: jax.tree.unflatten(structure, [fill(given) for fill in fills])


def _attributes(leaf: Any) -> dict[str, Any]:
    """The attributes of an object that may hold arrays."""
    if isinstance(leaf, type | types.ModuleType) or callable(leaf):
        return {}
    if dataclasses.is_dataclass(leaf):
        return {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)}
    return dict(getattr(leaf, "__dict__", {}))


def _with_attributes(leaf: Any, attributes: Mapping[str, Any]) -> Any:
    made = copy.copy(leaf)
    for name, value in attributes.items():
        object.__setattr__(made, name, value)
    return made


@dataclasses.dataclass(frozen=True)
class Initial:
    """An initialiser, traced.

    Attributes:
        program: its program; the first input is the key.
        variables: the pytree that it returns, with `jax.ShapeDtypeStruct` leaves.
        params: the parameters among its outputs: position -> path.
        state: other state of the model among them: position -> path.
    """

    program: ClosedJaxpr
    variables: Any
    params: Mapping[int, str]
    state: Mapping[int, str]

    def shapes(self, which: Mapping[int, str]) -> dict[str, Shape]:
        """Shapes by path of the leaves that `which` selects."""
        leaves = jax.tree.leaves(self.variables)
        return {path: tuple(leaves[position].shape) for position, path in which.items()}


@dataclasses.dataclass(frozen=True)
class Annotation:
    """The names that a model gives the axes of a parameter, to split it over a mesh.

    Attributes:
        names: for each axis a logical name, an axis of the mesh, several of them, or None.
        rules: the model's own rules from logical names to axes of the mesh, if it has any.
    """

    names: tuple[Any, ...]
    rules: tuple[Any, ...] | None = None


def explicit_axes(initial: Initial) -> dict[str, Annotation]:
    """The axes of an explicit mesh that an initialiser itself splits its parameters over."""
    found: dict[str, Annotation] = {}
    for position, path in initial.params.items():
        sharding = getattr(initial.program.out_avals[position], "sharding", None)
        names = tuple(getattr(sharding, "spec", ()))
        if any(name is not None for name in names):
            found[path] = Annotation(names)
    return found


class Frontend(Protocol):
    """A model of one kind, as mujax uses it."""

    def trace_init(self, inputs: Sequence[Any], kwargs: Static) -> Initial:
        """Traces the user's own initialiser."""
        ...

    def sample_init(self, inputs: Sequence[Any], kwargs: Static, key: Any, paths: Sequence[str]) -> list[Any]:
        """Runs the user's own initialiser for some parameters."""
        ...

    def init(self, key: Any, inputs: Sequence[Any], kwargs: Static) -> Any:
        """Runs the user's own initialiser."""
        ...

    def scale_params(self, variables: Any, scale: Callable[[str, Any], Any]) -> Any:
        """The variables with each parameter replaced by `scale(path, parameter)`."""
        ...

    def annotations(self, initial: Initial) -> dict[str, Annotation]:
        """The axis names that the model gives its parameters, by path."""
        ...

    def split(self, variables: Any) -> tuple[Any, Any]:
        """The parameters, and the other state, of variables (or of a module)."""
        ...

    def run(
        self,
        apply: Callable[..., Any],
        params: Any,
        state: Any,
        inputs: Sequence[Any],
        key: Any,
        kwargs: Static,
    ) -> tuple[Any, Any]:
        """The output of `apply` on such parts, and the other state after it; `key` is for random streams."""
        ...

    def example(self, variables: Any, inputs: Sequence[Any], kwargs: Static) -> Call:
        """The call that is traced to read the roles: random streams given, other state mutable."""
        ...

    def call(self, variables: Any, inputs: Sequence[Any], kwargs: Static) -> Call:
        """A user's call."""
        ...

    def follow(self, target: Frontend, variables: Any) -> Any:
        """What this model, as the base, is called with where `target` is called with `variables`."""
        ...

    def leaves(self, variables: Any) -> list[Any]:
        """The arrays of variables (or of a module) in the order of `example`'s call."""
        ...

    def finish(self, variables: Any, result: Any) -> Any:
        """The result of the user's call, from the result of the pure function."""
        ...


def is_array(leaf: Any) -> bool:
    """Whether an argument is an array (or the shape of one) and not a static setting."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Arguments split into arrays and the static rest."""

    arrays: list[Any]
    rebuild: Callable[[Sequence[Any]], Any]
    positional: int
    static: tuple[Any, ...]

    def after(self, count: int) -> tuple[range, range]:
        """Positions of the positional and of the keyword arrays, behind `count` others."""
        middle = count + self.positional
        return range(count, middle), range(middle, count + len(self.arrays))


def split(tree: tuple[Sequence[Any], Static]) -> Arguments:
    leaves, structure = jax.tree.flatten(tree, is_leaf=lambda leaf: leaf is None)
    dynamic = [position for position, leaf in enumerate(leaves) if is_array(leaf)]

    def rebuild(arrays: Sequence[Any]) -> Any:
        filled = list(leaves)
        for position, array in zip(dynamic, arrays, strict=True):
            filled[position] = array
        return jax.tree.unflatten(structure, filled)

    positional = sum(is_array(leaf) for leaf in jax.tree.leaves(tree[0]))
    # With types, since 1, 1.0 and True are equal.
    static = tuple((type(leaf), leaf) for leaf in leaves if not is_array(leaf))
    arrays = [leaves[position] for position in dynamic]
    return Arguments(arrays, rebuild, positional, (structure, tuple(dynamic), static))


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: with_shape(leaf.shape, leaf) if is_array(leaf) else leaf, tree)


def with_shape(shape: Shape, leaf: Any) -> jax.ShapeDtypeStruct:
    """An abstract array that differs from `leaf` in shape only; its weak type is kept."""
    return jax.ShapeDtypeStruct(shape, leaf.dtype, weak_type=getattr(leaf, "weak_type", False))


def paths_of(tree: Any, prefix: str = "") -> list[str]:
    return [prefix + leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def trace(
    function: Callable[..., Any], key: Any, inputs: Sequence[Any], kwargs: Static
) -> tuple[ClosedJaxpr, Any]:
    arguments = split((inputs, kwargs))

    def flat(key: Any, *arrays: Any) -> Any:
        args, kw = arguments.rebuild(arrays)
        return function(key, *args, **kw)

    return jax.make_jaxpr(flat, return_shape=True)(key, *abstract(arguments.arrays))


def sample(
    function: Callable[..., Any], key: Any, inputs: Sequence[Any], kwargs: Static, pick: Callable[[Any], Any]
) -> list[Any]:
    arguments = split((inputs, kwargs))

    def flat(key: Any, *arrays: Any) -> Any:
        args, kw = arguments.rebuild(arrays)
        return pick(function(key, *args, **kw))

    # As arguments: constants would be folded, one operation after the other.
    return jax.jit(flat)(key, *(jax.numpy.zeros(a.shape, a.dtype) for a in arguments.arrays))


def call_of(
    apply: Callable[..., Any],
    variables: Any,
    inputs: Sequence[Any],
    kwargs: Static,
    params: Mapping[int, str],
    state: Mapping[int, str],
) -> Call:
    """The call of a pure `apply(variables, *inputs, **kwargs)`."""
    leaves, structure = jax.tree.flatten(variables)
    arguments = split((inputs, kwargs))

    def function(*arrays: Any) -> Any:
        args, kw = arguments.rebuild(arrays[len(leaves) :])
        return apply(jax.tree.unflatten(structure, arrays[: len(leaves)]), *args, **kw)

    static = (structure, arguments.static)
    return Call(
        function, [*leaves, *arguments.arrays], params, state, arguments.after(len(leaves)), static=static
    )
