"""Flax NNX modules, from a factory."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from mujax.core.frontends._call import Call, Initial, Static, split
from mujax.errors import MujaxError, ShapeMismatchError
from mujax.spec import leaf_path


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
                    where="/".join(map(str, (*path, name))),
                    expected="the arrays of an NNX module in variables",
                    got="a bare one",
                    remedy="write nnx.data(...) or nnx.Variable(...) around it, or a Python number in its "
                    "place",
                )


@dataclasses.dataclass(frozen=True)
class NNXFrontend:
    factory: Callable[[nnx.Rngs], nnx.Module]

    def _build(self, key: Any) -> nnx.Module:
        module = self.factory(key if isinstance(key, nnx.Rngs) else nnx.Rngs(key))
        if not isinstance(module, nnx.Module):
            raise MujaxError(
                where="model",
                expected="an NNX factory that returns an nnx.Module",
                got=type(module).__name__,
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
        arguments = split((inputs, kwargs))

        def function(*arrays: Any) -> Any:
            module = nnx.merge(graph, jax.tree.unflatten(structure, arrays[: len(leaves)]))
            args, kw = arguments.rebuild(arrays[len(leaves) :])
            run = functools.partial(method, module) if callable(method) else getattr(module, method)
            with warnings.catch_warnings():
                if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
                    # A call that is only traced by mujax keeps nothing of what it sows.
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
def _abstract_parts(model: NNXFrontend) -> tuple[Any, Any]:
    # In two parts, which are immutable; a module is not.
    return nnx.split(nnx.eval_shape(lambda: model._build(jax.random.key(0))))


def follow_mode(base: nnx.Module, before: nnx.Module, now: nnx.Module) -> nnx.Module:
    """Gives the base's module the target's present mode (`eval()`, a changed setting)."""
    for (path, changed), (_, old), (_, mine) in zip(
        nnx.iter_modules(now), nnx.iter_modules(before), nnx.iter_modules(base), strict=False
    ):
        for name, value in vars(changed).items():
            if name.startswith("_") or not isinstance(value, bool | int | float | str | type(None)):
                continue
            if hasattr(old, name) and getattr(old, name) != value:
                if not hasattr(mine, name):
                    raise ShapeMismatchError(
                        where=f"{'/'.join(map(str, path))}.{name}",
                        expected="it in the base as in the target",
                        got="none",
                    )
                setattr(mine, name, value)
    return base
