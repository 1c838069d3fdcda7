"""Flax Linen modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import jax
from flax import linen as nn
from flax.core import DenyList
from flax.core.meta import AxisMetadata

from mujax._arguments import KEY, NONE, Kind, check_arguments, instance
from mujax.core.frontends._call import (
    Annotation,
    Call,
    Frontend,
    Initial,
    Static,
    call_of,
    explicit_axes,
    sample,
    trace,
)
from mujax.spec import leaf_path

_KEY: Final = KEY | Kind(
    "a dict of them", lambda value: bool(value) and all(map(KEY.accepts, value.values())), ""
)
_VARIABLES: Final = instance(Mapping, "the variables that mup.init returns", 'mup.init(key), {"params": ...}')

_SPLIT: Final = {
    "params": instance(Mapping, "the parameters that mup.split returns", "mup.split(variables)[0]"),
    "state": instance(Mapping, "the state that mup.split returns", "mup.split(variables)[1]"),
    "key": _KEY | NONE,
}


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
class LinenFrontend:
    model: nn.Module

    def trace_init(self, inputs: Sequence[Any], kwargs: Static) -> Initial:
        program, variables = trace(self.model.init, jax.random.key(0), inputs, kwargs)
        return Initial(program, variables, *_linen_paths(variables))

    def sample_init(self, inputs: Sequence[Any], kwargs: Static, key: Any, paths: Sequence[str]) -> list[Any]:
        def pick(variables: Any) -> list[Any]:
            params, _ = _linen_paths(variables)
            leaves = jax.tree.leaves(variables)
            by_path = {path: leaves[position] for position, path in params.items()}
            return [by_path[path] for path in paths]

        return sample(self.model.init, key, inputs, kwargs, pick)

    def init(self, key: Any, inputs: Sequence[Any], kwargs: Static) -> Any:
        check_arguments({"key": _KEY}, {"key": key})
        return self.model.init(key, *inputs, **kwargs)

    def scale_params(self, variables: Any, scale: Callable[[str, Any], Any]) -> Any:
        if "params" not in variables:
            return variables
        params = jax.tree_util.tree_map_with_path(
            lambda p, leaf: scale(leaf_path(p), leaf), variables["params"]
        )
        return {**variables, "params": params}

    def annotations(self, initial: Initial) -> dict[str, Annotation]:
        boxes = jax.tree_util.tree_leaves_with_path(
            dict(initial.variables).get("params", {}), is_leaf=lambda leaf: isinstance(leaf, AxisMetadata)
        )
        found: dict[str, Annotation] = {}
        for path, box in boxes:
            if isinstance(box, nn.Partitioned) and any(name is not None for name in box.names):
                own = getattr(box, "rules", None)
                is_logical = isinstance(box, nn.LogicallyPartitioned)
                rules = (own or nn.get_logical_axis_rules()) if is_logical else None
                found[leaf_path(path)] = Annotation(tuple(box.names), tuple(rules) if rules else None)
        return found or explicit_axes(initial)

    def split(self, variables: Any) -> tuple[Any, Any]:
        check_arguments({"variables": _VARIABLES}, {"variables": variables})
        rest = {name: leaves for name, leaves in variables.items() if name != "params"}
        return variables.get("params", {}), rest

    def run(
        self,
        apply: Callable[..., Any],
        params: Any,
        state: Any,
        inputs: Sequence[Any],
        key: Any,
        kwargs: Static,
    ) -> tuple[Any, Any]:
        check_arguments(_SPLIT, {"params": params, "state": state, "key": key})
        kwargs = {"rngs": key, **kwargs}
        if not state:
            return apply({"params": params}, *inputs, **kwargs), state
        kwargs = {"mutable": list(state), **kwargs}
        out, changed = apply({"params": params, **state}, *inputs, **kwargs)
        return out, {**state, **changed}

    def example(self, variables: Any, inputs: Sequence[Any], kwargs: Static) -> Call:
        # One key serves every random stream; sown intermediates are left out.
        kwargs = {**kwargs, "rngs": jax.eval_shape(lambda: jax.random.key(0))}
        kwargs.setdefault("mutable", DenyList(("params", "intermediates")))
        # With a cache of keys and values a module takes one token; without one it makes it, as in its init.
        variables = {name: leaves for name, leaves in variables.items() if name != "cache"}
        call = self.call(variables, inputs, kwargs)
        return dataclasses.replace(call, output=lambda out: out[0]) if kwargs["mutable"] else call

    def call(self, variables: Any, inputs: Sequence[Any], kwargs: Static) -> Call:
        check_arguments({"variables": _VARIABLES}, {"variables": variables})
        return call_of(self.model.apply, variables, inputs, kwargs, *_linen_paths(variables))

    def follow(self, target: Frontend, variables: Any) -> Any:
        return variables

    def leaves(self, variables: Any) -> list[Any]:
        return jax.tree.leaves({name: leaves for name, leaves in variables.items() if name != "cache"})

    def finish(self, variables: Any, result: Any) -> Any:
        return result
