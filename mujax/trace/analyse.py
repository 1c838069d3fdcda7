"""The two questions asked of a pair of programs."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mujax.errors import TraceMismatchError
from mujax.trace.interpret import Interpreter, Product, Use
from mujax.trace.primitives import PRIMITIVES
from mujax.trace.values import Value, fit, whole


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What a pair of programs says.

    Attributes:
        uses: per parameter path, its uses in program order.
        products: products of two activations that contract an axis which grows with width.
    """

    uses: Mapping[str, Sequence[Use]]
    products: Sequence[Product]


def analyse(base: Any, target: Any, params: Mapping[int, str]) -> Analysis:
    """Follows every parameter through the forward programs of base and target.

    Args:
        base: the base's `ClosedJaxpr`.
        target: the target's `ClosedJaxpr`.
        params: which inputs are parameters, by position, and their paths.

    Raises:
        TraceMismatchError: the programs differ in more than sizes.
        ShapeMismatchError: an axis that is looked up by index grows.
    """
    inputs, shapes = [], {}
    for position, (small, big) in enumerate(zip(base.jaxpr.invars, target.jaxpr.invars, strict=True)):
        shape = tuple(getattr(big.aval, "shape", ()))
        base_shape = fit(tuple(getattr(small.aval, "shape", ())), shape)
        path = params.get(position)
        if path is None:
            inputs.append(Value(shape, base_shape, "data"))
        else:
            shapes[path] = (shape, base_shape)
            inputs.append(Value(shape, base_shape, "param", views=(whole(path, shape, base_shape),)))
    interpreter = Interpreter(PRIMITIVES, shapes)
    interpreter.run(base, target, inputs)
    uses: dict[str, list[Use]] = collections.defaultdict(list)
    for use in interpreter.uses():
        uses[use.path].append(use)
    return Analysis(dict(uses), interpreter.products())


def read_scales(base: Any, target: Any) -> list[float | None]:
    """How the outputs of two initialisers scale: entries of the target over those of the base.

    Returns:
        Per output, the ratio; 0 for identically zero; None where the program does not tell.
    """
    inputs = [
        Value(shape := tuple(getattr(big.aval, "shape", ())), fit(_shape(small), shape), "data")
        for small, big in zip(base.jaxpr.invars, target.jaxpr.invars, strict=True)
    ]
    try:
        outs = Interpreter(PRIMITIVES, {}).run(base, target, inputs)
    except TraceMismatchError:
        return [None] * len(target.jaxpr.outvars)
    return [value.scale for value in outs]


def _shape(var: Any) -> tuple[int, ...]:
    return tuple(getattr(var.aval, "shape", ()))
