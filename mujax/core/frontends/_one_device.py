"""A model whose programs are traced on one device, whatever mesh is in context.

A base is only read. Its widths need not be multiples of the mesh that the target trains on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from mujax.core.frontends._call import Annotation, Call, Frontend, Initial, Static
from mujax.core.frontends._mesh import mesh_of_one


@dataclasses.dataclass(frozen=True)
class OneDevice:
    """The front end of a model, on a mesh of one device.

    Attributes:
        end: the model's own front end.
    """

    end: Frontend

    def trace_init(self, inputs: Sequence[Any], kwargs: Static) -> Initial:
        with mesh_of_one():
            return self.end.trace_init(inputs, kwargs)

    def sample_init(self, inputs: Sequence[Any], kwargs: Static, key: Any, paths: Sequence[str]) -> list[Any]:
        with mesh_of_one():
            return self.end.sample_init(inputs, kwargs, key, paths)

    def init(self, key: Any, inputs: Sequence[Any], kwargs: Static) -> Any:
        with mesh_of_one():
            return self.end.init(key, inputs, kwargs)

    def example(self, variables: Any, inputs: Sequence[Any], kwargs: Static) -> Call:
        with mesh_of_one():
            return on_one_device(self.end.example(variables, inputs, kwargs))

    def call(self, variables: Any, inputs: Sequence[Any], kwargs: Static) -> Call:
        return on_one_device(self.end.call(variables, inputs, kwargs))

    # Nothing of the following depends on a mesh.

    def scale_params(self, variables: Any, scale: Callable[[str, Any], Any]) -> Any:
        return self.end.scale_params(variables, scale)

    def annotations(self, initial: Initial) -> dict[str, Annotation]:
        return self.end.annotations(initial)

    def split(self, variables: Any) -> tuple[Any, Any]:
        return self.end.split(variables)

    def run(
        self,
        apply: Callable[..., Any],
        params: Any,
        state: Any,
        inputs: Sequence[Any],
        key: Any,
        kwargs: Static,
    ) -> tuple[Any, Any]:
        return self.end.run(apply, params, state, inputs, key, kwargs)

    def follow(self, target: Frontend, variables: Any) -> Any:
        return self.end.follow(target, variables)

    def leaves(self, variables: Any) -> list[Any]:
        return self.end.leaves(variables)

    def finish(self, variables: Any, result: Any) -> Any:
        return self.end.finish(variables, result)


def on_one_device(call: Call) -> Call:
    """The call, traced on one device."""
    return dataclasses.replace(call, one_device=True)
