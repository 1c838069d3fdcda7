"""Arithmetic on known numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from mujax.core.program import dtype_of
from mujax.core.trace._uses import Pair
from mujax.core.trace._values import (
    Shape,
    Value,
    constant,
)


def _cast(pair: Pair, numbers: Sequence[float]) -> float:
    dtype = np.dtype(dtype_of(pair.target.outvars[0]))
    return float(int(numbers[0])) if np.issubdtype(dtype, np.integer) else float(numbers[0])


def _divide(pair: Pair, numbers: Sequence[float]) -> float:
    dtype = np.dtype(dtype_of(pair.target.outvars[0]))
    exact = numbers[0] / numbers[1]
    return float(math.trunc(exact)) if np.issubdtype(dtype, np.integer) else exact


def _fold(function: Callable[..., Any]) -> Callable[[Pair, Sequence[float]], float]:
    return lambda _, numbers: float(function(*numbers))


FOLD: Final[Mapping[str, Callable[[Pair, Sequence[float]], float]]] = {
    "convert_element_type": _cast,
    "div": _divide,
    "integer_pow": lambda pair, numbers: float(numbers[0] ** pair.params["y"]),
    "select_n": lambda _, numbers: numbers[1 + int(numbers[0])],
    **{
        name: _fold(function)
        for name, function in {
            "abs": abs,
            "add": lambda a, b: a + b,
            "add_any": lambda a, b: a + b,
            "and": lambda a, b: int(a) & int(b),
            "ceil": math.ceil,
            "clamp": lambda low, x, high: min(max(low, x), high),
            "copy": lambda a: a,
            "copy_p": lambda a: a,
            "cos": math.cos,
            "eq": lambda a, b: a == b,
            "erf": math.erf,
            "exp": math.exp,
            "exp2": lambda a: 2**a,
            "expm1": math.expm1,
            "floor": math.floor,
            "ge": lambda a, b: a >= b,
            "gt": lambda a, b: a > b,
            "le": lambda a, b: a <= b,
            "log": math.log,
            "log1p": math.log1p,
            "log2": math.log2,
            "logistic": lambda a: 1 / (1 + math.exp(-a)),
            "lt": lambda a, b: a < b,
            "max": max,
            "min": min,
            "mul": lambda a, b: a * b,
            "ne": lambda a, b: a != b,
            "neg": lambda a: -a,
            "nextafter": lambda a, b: math.nextafter(a, b),
            "one_minus_square": lambda a: 1 - a * a,
            "or": lambda a, b: int(a) | int(b),
            "polynomial": lambda x, *coefficients: functools.reduce(
                lambda value, coefficient: value * x + coefficient, reversed(coefficients), 0.0
            ),
            "pow": lambda a, b: a**b,
            "reduce_precision": lambda a: a,
            "reciprocal": lambda a: 1 / a,
            "rem": math.fmod,
            "rsqrt": lambda a: 1 / math.sqrt(a),
            "sign": lambda a: (a > 0) - (a < 0),
            "sin": math.sin,
            "sqrt": math.sqrt,
            "square": lambda a: a * a,
            "stop_gradient": lambda a: a,
            "sub": lambda a, b: a - b,
            "tanh": math.tanh,
        }.items()
    },
}
"""Arithmetic on known numbers, in double precision."""


def fold_constants(pair: Pair, ins: Sequence[Value], shape: Shape, base: Shape) -> Value | None:
    function = FOLD.get(pair.name)
    if function is None:
        return None
    numbers = [value.const for value in ins]
    if any(number is None for number in numbers):
        return None
    try:
        both = [function(pair, [number[side] for number in numbers if number]) for side in (0, 1)]
    except (ArithmeticError, ValueError):
        return None
    return constant(both[0], both[1], shape, base)
