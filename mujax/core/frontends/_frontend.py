"""Linen, NNX and plain functions as one thing: an initialiser and a callable on pytrees.

The rest of mujax sees a `Frontend`: it can trace the initialiser, turn a user's call into a pure function
of flat arrays, and say which of these arrays are parameters. The user's module is never changed.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import jax
import numpy as np
from flax import linen as nn, nnx
from flax.core import DenyList
from jax.extend.core import ClosedJaxpr

from mujax.errors import MujaxError, ShapeMismatchError, SpecMismatchError
from mujax.spec import leaf_path

Shape = tuple[int, ...]
Static = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Functional:
    """A model as a pair of pure functions.

    Attributes:
        init: `(key, *inputs, **kwargs) -> params`, a pytree of arrays, all of them parameters.
        apply: `(params, *inputs, **kwargs) -> outputs`.
    """

    init: Callable[..., Any]
    apply: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Call:
    """A user's call as a pure function of flat arrays.

    Attributes:
        function: flat arrays -> any pytree of arrays.
        leaves: the arrays, or their shapes.
        params: which of them are parameters: position -> path.
        state: which of them hold other state of the model (batch statistics): position -> path.
        inputs: which of them are arrays of the user's positional arguments, and of the keyword arguments.
        output: what `function` returns -> what the user's model returns.
        static: everything that `function` depends on apart from the arrays; equal where two functions of
            one model do the same.
    """

    function: Callable[..., Any]
    leaves: Sequence[Any]
    params: Mapping[int, str]
    state: Mapping[int, str]
    inputs: tuple[range, range] = (range(0), range(0))
    output: Callable[[Any], Any] = lambda result: result
    static: tuple[Any, ...] = ()

    def trace(self) -> tuple[ClosedJaxpr, Any]:
        """The function's program, and what it returns, as shapes."""
        return jax.make_jaxpr(self.function, return_shape=True)(*self.leaves)


@dataclasses.dataclass(frozen=True)
class Initial:
    """An initialiser, traced.

    Attributes:
        program: what it runs; the first input is the key.
        variables: the pytree that it returns, with `jax.ShapeDtypeStruct` leaves.
        params: which of its outputs are parameters: position -> path.
        state: which hold other state of the model: position -> path.
    """

    program: ClosedJaxpr
    variables: Any
    params: Mapping[int, str]
    state: Mapping[int, str]

    def shapes(self, which: Mapping[int, str]) -> dict[str, Shape]:
        """Shapes by path of the leaves that `which` selects."""
        leaves = jax.tree.leaves(self.variables)
        return {path: tuple(leaves[position].shape) for position, path in which.items()}


class Frontend(Protocol):
    """What mujax needs of a model."""

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

    def example(self, variables: Any, inputs: Sequence[Any], kwargs: Static) -> Call:
        """The call that is traced to read the roles: random streams given, other state mutable."""
        ...

    def call(self, variables: Any, inputs: Sequence[Any], kwargs: Static) -> Call:
        """A user's call."""
        ...

    def leaves(self, variables: Any) -> list[Any]:
        """The arrays of variables (or of a module) in the order of `example`'s call."""
        ...

    def finish(self, variables: Any, result: Any) -> Any:
        """What the user's call returns, given what the pure function returned."""
        ...


def frontend(model: Any) -> Frontend:
    """The front end of a model.

    Args:
        model: a Linen module, an NNX factory `rngs -> nnx.Module`, or a `Functional`.

    Raises:
        MujaxError: it is none of the three.
    """
    if isinstance(model, nn.Module):
        return _Linen(model)
    if isinstance(model, Functional):
        return _Pure(model)
    if isinstance(model, nnx.Module):
        raise MujaxError(
            f"model: expected an NNX factory (a function rngs -> module), got an instance of "
            f"{type(model).__name__}; pass lambda rngs: {type(model).__name__}(..., rngs=rngs)."
        )
    if isinstance(getattr(model, "module", None), nn.Module):
        raise MujaxError(
            f"model: expected a Flax Linen module, got {type(model).__name__}, which holds one; pass its "
            ".module."
        )
    if callable(model):
        return _NNX(cast(Callable[[nnx.Rngs], nnx.Module], model))
    raise MujaxError(
        "model: expected a Flax Linen module, an NNX factory rngs -> nnx.Module or mujax.Functional(init, "
        f"apply), got {type(model).__name__}."
    )


# ---- arguments -------------------------------------------------------------------------------------


def is_array(leaf: Any) -> bool:
    """Whether an argument is an array (or the shape of one) and not a static setting."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


@dataclasses.dataclass(frozen=True)
class _Arguments:
    """Arguments split into arrays and the static rest."""

    arrays: list[Any]
    rebuild: Callable[[Sequence[Any]], Any]
    positional: int
    static: tuple[Any, ...]

    def after(self, count: int) -> tuple[range, range]:
        """Positions of the positional and of the keyword ones, behind `count` other arrays."""
        middle = count + self.positional
        return range(count, middle), range(middle, count + len(self.arrays))


def _split(tree: tuple[Sequence[Any], Static]) -> _Arguments:
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
    return _Arguments(arrays, rebuild, positional, (structure, tuple(dynamic), static))


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: _with_shape(leaf.shape, leaf) if is_array(leaf) else leaf, tree)


def _with_shape(shape: Shape, leaf: Any) -> jax.ShapeDtypeStruct:
    """An abstract array that differs in shape only: a weak type makes another program, too."""
    return jax.ShapeDtypeStruct(shape, leaf.dtype, weak_type=getattr(leaf, "weak_type", False))


def _paths(tree: Any, prefix: str = "") -> list[str]:
    return [prefix + leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _trace(
    function: Callable[..., Any], key: Any, inputs: Sequence[Any], kwargs: Static
) -> tuple[ClosedJaxpr, Any]:
    arguments = _split((inputs, kwargs))

    def flat(key: Any, *arrays: Any) -> Any:
        args, kw = arguments.rebuild(arrays)
        return function(key, *args, **kw)

    return jax.make_jaxpr(flat, return_shape=True)(key, *_abstract(arguments.arrays))


def _sample(
    function: Callable[..., Any], key: Any, inputs: Sequence[Any], kwargs: Static, pick: Callable[[Any], Any]
) -> list[Any]:
    arguments = _split((inputs, kwargs))

    def flat(key: Any, *arrays: Any) -> Any:
        args, kw = arguments.rebuild(arrays)
        return pick(function(key, *args, **kw))

    # As arguments: the forward pass of constants would be run, one operation after the other.
    return jax.jit(flat)(key, *(jax.numpy.zeros(a.shape, a.dtype) for a in arguments.arrays))


def _call(
    apply: Callable[..., Any],
    variables: Any,
    inputs: Sequence[Any],
    kwargs: Static,
    params: Mapping[int, str],
    state: Mapping[int, str],
) -> Call:
    """The call of a pure `apply(variables, *inputs, **kwargs)`."""
    leaves, structure = jax.tree.flatten(variables)
    arguments = _split((inputs, kwargs))

    def function(*arrays: Any) -> Any:
        args, kw = arguments.rebuild(arrays[len(leaves) :])
        return apply(jax.tree.unflatten(structure, arrays[: len(leaves)]), *args, **kw)

    static = (structure, arguments.static)
    return Call(
        function, [*leaves, *arguments.arrays], params, state, arguments.after(len(leaves)), static=static
    )


# ---- Linen -----------------------------------------------------------------------------------------


def _linen_paths(variables: Any) -> tuple[dict[int, str], dict[int, str]]:
    params: dict[int, str] = {}
    state: dict[int, str] = {}
    for position, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(variables)):
        collection = path[0].key if isinstance(path[0], jax.tree_util.DictKey) else str(path[0])
        if collection == "params":
            params[position] = leaf_path(path[1:])
        else:
            state[position] = leaf_path(path)
    return params, state


@dataclasses.dataclass(frozen=True)
class _Linen:
    model: nn.Module

    def trace_init(self, inputs: Sequence[Any], kwargs: Static) -> Initial:
        program, variables = _trace(self.model.init, jax.random.key(0), inputs, kwargs)
        return Initial(program, variables, *_linen_paths(variables))

    def sample_init(self, inputs: Sequence[Any], kwargs: Static, key: Any, paths: Sequence[str]) -> list[Any]:
        def pick(variables: Any) -> list[Any]:
            params, _ = _linen_paths(variables)
            leaves = jax.tree.leaves(variables)
            by_path = {path: leaves[position] for position, path in params.items()}
            return [by_path[path] for path in paths]

        return _sample(self.model.init, key, inputs, kwargs, pick)

    def init(self, key: Any, inputs: Sequence[Any], kwargs: Static) -> Any:
        return self.model.init(key, *inputs, **kwargs)

    def scale_params(self, variables: Any, scale: Callable[[str, Any], Any]) -> Any:
        if "params" not in variables:
            return variables
        params = jax.tree_util.tree_map_with_path(
            lambda p, leaf: scale(leaf_path(p), leaf), variables["params"]
        )
        return {**variables, "params": params}

    def example(self, variables: Any, inputs: Sequence[Any], kwargs: Static) -> Call:
        # One key serves every stream that the model asks for; sown intermediates are not wanted.
        kwargs = {**kwargs, "rngs": jax.eval_shape(lambda: jax.random.key(0))}
        kwargs.setdefault("mutable", DenyList(("params", "intermediates")))
        # With a cache of keys and values a module takes one token; without, it makes one as in its init.
        variables = {name: leaves for name, leaves in variables.items() if name != "cache"}
        call = self.call(variables, inputs, kwargs)
        return dataclasses.replace(call, output=lambda out: out[0]) if kwargs["mutable"] else call

    def call(self, variables: Any, inputs: Sequence[Any], kwargs: Static) -> Call:
        return _call(self.model.apply, variables, inputs, kwargs, *_linen_paths(variables))

    def leaves(self, variables: Any) -> list[Any]:
        return jax.tree.leaves({name: leaves for name, leaves in variables.items() if name != "cache"})

    def finish(self, variables: Any, result: Any) -> Any:
        return result


# ---- pure functions --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Pure:
    model: Functional

    def trace_init(self, inputs: Sequence[Any], kwargs: Static) -> Initial:
        program, variables = _trace(self.model.init, jax.random.key(0), inputs, kwargs)
        return Initial(program, variables, dict(enumerate(_paths(variables))), {})

    def sample_init(self, inputs: Sequence[Any], kwargs: Static, key: Any, paths: Sequence[str]) -> list[Any]:
        def pick(params: Any) -> list[Any]:
            by_path = dict(zip(_paths(params), jax.tree.leaves(params), strict=True))
            return [by_path[path] for path in paths]

        return _sample(self.model.init, key, inputs, kwargs, pick)

    def init(self, key: Any, inputs: Sequence[Any], kwargs: Static) -> Any:
        return self.model.init(key, *inputs, **kwargs)

    def scale_params(self, variables: Any, scale: Callable[[str, Any], Any]) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, leaf: scale(leaf_path(path), leaf), variables)

    def example(self, variables: Any, inputs: Sequence[Any], kwargs: Static) -> Call:
        return self.call(variables, inputs, kwargs)

    def call(self, variables: Any, inputs: Sequence[Any], kwargs: Static) -> Call:
        return _call(self.model.apply, variables, inputs, kwargs, dict(enumerate(_paths(variables))), {})

    def leaves(self, variables: Any) -> list[Any]:
        return jax.tree.leaves(variables)

    def finish(self, variables: Any, result: Any) -> Any:
        return result


# ---- NNX -------------------------------------------------------------------------------------------


def _nnx_paths(state: Any) -> tuple[dict[int, str], dict[int, str]]:
    params: dict[int, str] = {}
    other: dict[int, str] = {}
    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    for path, variable in jax.tree_util.tree_leaves_with_path(state, is_leaf=is_variable):
        kind = params if isinstance(variable, nnx.Param) else other
        # A variable may hold a tree of arrays.
        for inside, _ in jax.tree_util.tree_leaves_with_path(variable):
            kind[len(params) + len(other)] = leaf_path((*path, *inside))
    return params, other


def _no_static_arrays(module: nnx.Module) -> None:
    """Flax takes a bare array for a static setting where a module is made under a trace, and leaks it."""
    held = {tuple(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(module))}
    for path, node in nnx.iter_modules(module):
        for name, value in vars(node).items():
            if isinstance(value, jax.Array) and (*map(str, path), name) not in held:
                raise MujaxError(
                    f"{'/'.join(map(str, (*path, name)))}: expected the arrays of an NNX module in "
                    "variables, found a bare one; write nnx.data(...) or nnx.Variable(...) around it, or a "
                    "Python number in its place."
                )


@dataclasses.dataclass(frozen=True)
class _NNX:
    factory: Callable[[nnx.Rngs], nnx.Module]

    def _build(self, key: Any) -> nnx.Module:
        module = self.factory(key if isinstance(key, nnx.Rngs) else nnx.Rngs(key))
        if not isinstance(module, nnx.Module):
            raise MujaxError(
                f"model: expected an NNX factory that returns an nnx.Module, got {type(module).__name__}."
            )
        return module

    def trace_init(self, inputs: Sequence[Any], kwargs: Static) -> Initial:
        def state(key: Any) -> Any:
            module = self._build(key)
            _no_static_arrays(module)
            return nnx.state(module)

        program, variables = jax.make_jaxpr(state, return_shape=True)(jax.random.key(0))
        return Initial(program, variables, *_nnx_paths(variables))

    def abstract(self) -> nnx.Module:
        """The module with shapes for arrays."""
        return nnx.merge(*_abstract_parts(self))

    def sample_init(self, inputs: Sequence[Any], kwargs: Static, key: Any, paths: Sequence[str]) -> list[Any]:
        def pick(key: Any) -> list[Any]:
            state = nnx.state(self._build(key))
            params, _ = _nnx_paths(state)
            leaves = jax.tree.leaves(state)
            by_path = {path: leaves[position] for position, path in params.items()}
            return [by_path[path] for path in paths]

        return jax.jit(pick)(key)

    def init(self, key: Any, inputs: Sequence[Any], kwargs: Static) -> Any:
        return self._build(key)

    def scale_params(self, variables: Any, scale: Callable[[str, Any], Any]) -> Any:
        state = nnx.state(variables, nnx.Param)
        scaled = jax.tree_util.tree_map_with_path(lambda path, leaf: scale(leaf_path(path), leaf), state)
        nnx.update(variables, scaled)
        return variables

    def example(self, variables: Any, inputs: Sequence[Any], kwargs: Static) -> Call:
        return self.call(self.abstract(), inputs, kwargs)

    def call(self, variables: Any, inputs: Sequence[Any], kwargs: Static) -> Call:
        graph, state = nnx.split(variables)
        leaves, structure = jax.tree.flatten(state)
        kwargs = dict(kwargs)
        method = kwargs.pop("method", "__call__")
        arguments = _split((inputs, kwargs))

        def function(*arrays: Any) -> Any:
            module = nnx.merge(graph, jax.tree.unflatten(structure, arrays[: len(leaves)]))
            args, kw = arguments.rebuild(arrays[len(leaves) :])
            run = functools.partial(method, module) if callable(method) else getattr(module, method)
            with warnings.catch_warnings():
                if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
                    # Of a call that is only looked at, nothing that it sows is wanted.
                    warnings.filterwarnings("ignore", r"Using 'Module\.sow\(\)'", DeprecationWarning)
                out = run(*args, **kw)
            # Parameters do not change in a call; all other state may.
            return out, nnx.state(module, nnx.Not(nnx.Param))

        where = arguments.after(len(leaves))
        static = (graph, structure, method, arguments.static)
        return Call(
            function, [*leaves, *arguments.arrays], *_nnx_paths(state), where, lambda out: out[0], static
        )

    def leaves(self, variables: Any) -> list[Any]:
        return jax.tree.leaves(nnx.state(variables))

    def finish(self, variables: Any, result: Any) -> Any:
        out, state = result
        nnx.update(variables, state)
        return out


@functools.lru_cache(maxsize=64)
def _abstract_parts(model: _NNX) -> tuple[Any, Any]:
    # Kept in two parts: a module can be changed, these can't.
    return nnx.split(nnx.eval_shape(lambda: model._build(jax.random.key(0))))


# ---- the base's twin of a call ---------------------------------------------------------------------


def shrink(
    base: Frontend,
    target: Frontend,
    variables: Any,
    inputs: Sequence[Any],
    kwargs: Static,
    call: Call,
    sizes: Mapping[str, tuple[Shape, Shape]],
) -> Call:
    """The call that the base would make where the target makes `call`.

    Args:
        base: the base's front end.
        target: the target's.
        variables: the target's variables (or module) in the call.
        inputs: positional arguments, the same for both.
        kwargs: keyword arguments, the same for both.
        call: the target's call.
        sizes: (target, base) shape of each parameter and of each piece of state, by path.

    Raises:
        SpecMismatchError: a shape in the call does not follow from those that `mup_init` saw.
    """
    if isinstance(base, _NNX) and isinstance(target, _NNX):
        twin = base.call(_follow(base.abstract(), target.abstract(), variables), inputs, kwargs)
        small = {
            path: twin.leaves[position].shape
            for which in (twin.params, twin.state)
            for position, path in which.items()
        }
    else:
        twin = base.call(variables, inputs, kwargs)
        small = {}
    leaves = list(twin.leaves)
    for which in (twin.params, twin.state):
        for position, path in which.items():
            leaf = call.leaves[position]
            shape = small[path] if path in small else _base_shape(path, tuple(leaf.shape), sizes)
            leaves[position] = _with_shape(shape, leaf)
    return dataclasses.replace(twin, leaves=leaves)


def _base_shape(path: str, shape: Shape, sizes: Mapping[str, tuple[Shape, Shape]]) -> Shape:
    if path not in sizes:
        raise SpecMismatchError(
            f"{path}: expected only variables that mup_init saw, got another one of shape {shape}; pass "
            "mup_init "
            "the inputs and keyword arguments with which the model creates it."
        )
    target, base = sizes[path]
    if shape == target:
        return base
    if len(shape) != len(target):
        raise SpecMismatchError(f"{path}: expected shape {target} as in mup_init, got {shape}.")
    out = []
    for size, big, small in zip(shape, target, base, strict=True):
        if big != small and size * small % big:
            raise SpecMismatchError(
                f"{path}: expected a multiple of {big // small} along the axis that grows with width (shape "
                f"{target} in mup_init), got shape {shape}."
            )
        out.append(size if big == small else size * small // big)
    return tuple(out)


def _follow(base: nnx.Module, before: nnx.Module, now: nnx.Module) -> nnx.Module:
    """The base's module in the mode that the target's is in now (`eval()`, a changed setting)."""
    for (path, changed), (_, old), (_, mine) in zip(
        nnx.iter_modules(now), nnx.iter_modules(before), nnx.iter_modules(base), strict=False
    ):
        for name, value in vars(changed).items():
            if name.startswith("_") or not isinstance(value, bool | int | float | str | type(None)):
                continue
            if hasattr(old, name) and getattr(old, name) != value:
                if not hasattr(mine, name):
                    raise ShapeMismatchError(
                        f"{'/'.join(map(str, path))}.{name}: expected it in the base as in the target, "
                        "found none."
                    )
                setattr(mine, name, value)
    return base
