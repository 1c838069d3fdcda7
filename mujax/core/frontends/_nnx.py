"""Flax NNX modules, from a factory."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
from flax import nnx

from mujax._arguments import KEY, SEED, check_arguments, instance
from mujax.core.frontends._call import Annotation, Call, Frontend, Initial, Static, explicit_axes, split
from mujax.errors import MujaxError, ShapeMismatchError
from mujax.spec import leaf_path

_KEY: Final = KEY | instance(nnx.Rngs, "nnx.Rngs", "") | SEED
_MODULE: Final = instance(nnx.Module, "the module that mup.init returns", "mup.init(key)")
_STATE: Final = instance(nnx.State, "a state that mup.split returns", "mup.split(variables)")


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


def factory_of(model: Callable[..., Any], name: str) -> Callable[[nnx.Rngs], Any]:
    """A factory that takes `nnx.Rngs` as its one positional argument.

    Args:
        model: a callable that takes them so, or as the keyword argument `rngs`, as NNX modules do.
        name: the argument that it was given as, for errors.

    Raises:
        MujaxError: it takes no `nnx.Rngs`, or needs other arguments too.
    """
    call, args, kwargs = model, (), {}
    if isinstance(model, functools.partial):
        call, args, kwargs = model.func, model.args, model.keywords
    if isinstance(call, type):
        call, args = call.__init__, (None, *args)
    try:
        signature = inspect.signature(call)
    except (TypeError, ValueError):
        # Written in C: called as it is.
        return model
    rngs = signature.parameters.get("rngs")
    by_name = rngs is not None and rngs.kind is not inspect.Parameter.POSITIONAL_ONLY and "rngs" not in kwargs
    try:
        if by_name:
            signature.bind(*args, **kwargs, rngs=None)
        else:
            signature.bind(*args, None, **kwargs)
    except TypeError as error:
        kind = getattr(getattr(model, "func", model), "__name__", type(model).__name__)
        raise MujaxError(
            where=name,
            expected="an NNX factory that takes nnx.Rngs and nothing else",
            got=f"{kind}{signature} ({error})",
            remedy="pass lambda rngs: Net(..., rngs=rngs), with your own class for Net",
        ) from error
    return functools.partial(_by_name, model) if by_name else model


def _by_name(model: Callable[..., Any], rngs: nnx.Rngs) -> Any:
    return model(rngs=rngs)


def _hold_arrays(module: nnx.Module) -> None:
    """Makes bare arrays data: under a trace Flax takes them for static settings, unlike outside of one."""
    held = {tuple(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(module))}
    for path, node in nnx.iter_modules(module):
        for name, value in list(vars(node).items()):
            if isinstance(value, jax.Array) and (*map(str, path), name) not in held:
                setattr(node, name, nnx.data(value))


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
        _hold_arrays(module)
        return module

    def trace_init(self, inputs: Sequence[Any], kwargs: Static) -> Initial:
        def state(key: Any) -> Any:
            return nnx.state(self._build(key))

        program, variables = jax.make_jaxpr(state, return_shape=True)(jax.random.key(0))
        return Initial(program, variables, *_nnx_paths(variables))

    def _abstract(self) -> nnx.Module:
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
        check_arguments({"key": _KEY}, {"key": key})
        return self._build(key)

    def scale_params(self, variables: Any, scale: Callable[[str, Any], Any]) -> Any:
        state = nnx.state(variables, nnx.Param)
        scaled = jax.tree_util.tree_map_with_path(lambda path, leaf: scale(leaf_path(path), leaf), state)
        nnx.update(variables, scaled)
        return variables

    def annotations(self, initial: Initial) -> dict[str, Annotation]:
        is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
        specs = nnx.get_partition_spec(initial.variables)
        found: dict[str, Annotation] = {}
        for path, variable in jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_variable):
            names = tuple(variable.get_value() or ()) if isinstance(variable, nnx.Param) else ()
            if any(name is not None for name in names):
                found[leaf_path(path)] = Annotation(names)
        return found or explicit_axes(initial)

    def split(self, variables: Any) -> tuple[Any, Any]:
        check_arguments({"variables": _MODULE}, {"variables": variables})
        return nnx.state(variables, nnx.Param), nnx.state(variables, nnx.Not(nnx.Param))

    def run(
        self,
        apply: Callable[..., Any],
        params: Any,
        state: Any,
        inputs: Sequence[Any],
        key: Any,
        kwargs: Static,
    ) -> tuple[Any, Any]:
        check_arguments({"params": _STATE, "state": _STATE}, {"params": params, "state": state})
        # The module's own streams are part of its state.
        del key
        module = nnx.merge(_abstract_parts(self)[0], params, state)
        out = apply(module, *inputs, **kwargs)
        return out, nnx.state(module, nnx.Not(nnx.Param))

    def example(self, variables: Any, inputs: Sequence[Any], kwargs: Static) -> Call:
        return self.call(self._abstract(), inputs, kwargs)

    def call(self, variables: Any, inputs: Sequence[Any], kwargs: Static) -> Call:
        check_arguments({"variables": _MODULE}, {"variables": variables})
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

    def follow(self, target: Frontend, variables: Any) -> Any:
        # A module holds its mode beside its arrays: the base's own module, in the mode of the target's.
        if not isinstance(target, NNXFrontend):
            return variables
        return _follow_mode(self._abstract(), target._abstract(), variables)

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


def _follow_mode(base: nnx.Module, before: nnx.Module, now: nnx.Module) -> nnx.Module:
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
