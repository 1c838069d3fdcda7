"""Models as pairs of pure functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Final

import jax

from mujax._arguments import Kind, check_arguments
from mujax.core.frontends._call import (
    Annotation,
    Call,
    Frontend,
    Initial,
    Static,
    call_of,
    explicit_axes,
    paths_of,
    sample,
    trace,
)
from mujax.spec import leaf_path

_FUNCTION: Final = Kind("a function", callable, "model.init or model.apply, a pure function")


@dataclasses.dataclass(frozen=True)
class Functional:
    """A model as a pair of pure functions.

    Attributes:
        init: `(key, *inputs, **kwargs) -> params`, a pytree of arrays, all of them parameters.
        apply: `(params, *inputs, **kwargs) -> outputs`.
    """

    init: Callable[..., Any]
    apply: Callable[..., Any]

    def __post_init__(self) -> None:
        check_arguments({"init": _FUNCTION, "apply": _FUNCTION}, vars(self))


@dataclasses.dataclass(frozen=True)
class FunctionalFrontend:
    model: Functional

    def trace_init(self, inputs: Sequence[Any], kwargs: Static) -> Initial:
        program, variables = trace(self.model.init, jax.random.key(0), inputs, kwargs)
        return Initial(program, variables, dict(enumerate(paths_of(variables))), {})

    def sample_init(self, inputs: Sequence[Any], kwargs: Static, key: Any, paths: Sequence[str]) -> list[Any]:
        def pick(params: Any) -> list[Any]:
            by_path = dict(zip(paths_of(params), jax.tree.leaves(params), strict=True))
            return [by_path[path] for path in paths]

        return sample(self.model.init, key, inputs, kwargs, pick)

    def init(self, key: Any, inputs: Sequence[Any], kwargs: Static) -> Any:
        return self.model.init(key, *inputs, **kwargs)

    def scale_params(self, variables: Any, scale: Callable[[str, Any], Any]) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, leaf: scale(leaf_path(path), leaf), variables)

    def annotations(self, initial: Initial) -> dict[str, Annotation]:
        return explicit_axes(initial)

    def split(self, variables: Any) -> tuple[Any, Any]:
        return variables, {}

    def run(
        self,
        apply: Callable[..., Any],
        params: Any,
        state: Any,
        inputs: Sequence[Any],
        key: Any,
        kwargs: Static,
    ) -> tuple[Any, Any]:
        return apply(params, *inputs, **kwargs), state

    def example(self, variables: Any, inputs: Sequence[Any], kwargs: Static) -> Call:
        return self.call(variables, inputs, kwargs)

    def call(self, variables: Any, inputs: Sequence[Any], kwargs: Static) -> Call:
        return call_of(self.model.apply, variables, inputs, kwargs, dict(enumerate(paths_of(variables))), {})

    def follow(self, target: Frontend, variables: Any) -> Any:
        return variables

    def leaves(self, variables: Any) -> list[Any]:
        return jax.tree.leaves(variables)

    def finish(self, variables: Any, result: Any) -> Any:
        return result
