"""The kinds of the optimizers' arguments, read off their signatures: optax's own have no checks."""

from __future__ import annotations

import collections.abc
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mujax._arguments import (
    COUNT,
    FLAG,
    KEY,
    NONE,
    SCALAR,
    SCALAR_NOT_NEGATIVE,
    SCALAR_SHARE,
    SEED,
    TEXT,
    TEXTS,
    TRANSFORM,
    TREE,
    Kind,
    at_least,
    function,
    instance,
    one_of,
    several,
    takes,
)
from mujax.errors import ParametrizationError
from mujax.spec import ROLES, MupSpec

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _is_mask(value: Any) -> bool:
    return all(isinstance(leaf, bool | np.bool_) for leaf in jax.tree.leaves(value))


SPEC: Final = instance(MupSpec, "a MupSpec", "mup.spec, of the result of mup_init")
SCHEDULE: Final = function("a schedule of the step", 1, "optax.constant_schedule(0.01)")
MASK: Final = Kind("a tree of True and False", _is_mask, "None") | function(
    "a function from parameters to one", 1, ""
)
DTYPE: Final = Kind(
    "a floating-point dtype",
    lambda value: value is not None and jnp.issubdtype(jnp.dtype(value), jnp.inexact),
    "jnp.float32",
)
LR_MULTS: Final = Kind(
    "a dict of multiples by role or by glob of parameter paths",
    lambda value: isinstance(value, Mapping) and all(isinstance(name, str) for name in value),
    '{"hidden": 2.0}',
    ParametrizationError,
)


def _are_numbers(value: Any) -> bool:
    return not isinstance(value, str | bytes) and len(value) > 0 and all(map(SCALAR.accepts, value))


COEFFICIENTS: Final = Kind("the name of a preset", lambda value: isinstance(value, str), '"standard"') | Kind(
    "coefficients, three or a sequence of three for each step",
    lambda value: _are_numbers(value) or (len(value) > 0 and all(map(_are_numbers, value))),
    "",
)

_DIMENSIONS = optax.contrib.MuonDimensionNumbers
DIMENSION_NUMBERS: Final = Kind(
    "a tree of optax.contrib.MuonDimensionNumbers and None",
    lambda value: all(
        isinstance(leaf, _DIMENSIONS)
        for leaf in jax.tree.leaves(value, is_leaf=lambda node: isinstance(node, _DIMENSIONS))
    ),
    "None",
) | function("a function from parameters to one", 1, "")

_BY_NAME: Final[Mapping[str, Kind]] = {
    "spec": SPEC,
    "tx": TRANSFORM,
    "gradients": TREE,
    "decay_roles": several(
        f"a tuple out of {', '.join(map(repr, ROLES))}",
        one_of(ROLES),
        '("hidden", "output")',
        error=ParametrizationError,
    )
    | NONE,
    "lr_mults": LR_MULTS | NONE,
    "zero_init": TEXT | TEXTS,
    "key": KEY | SEED | NONE,
    "seed": SEED | NONE,
    "ns_coeffs": COEFFICIENTS,
    "ns_steps": SCALAR_NOT_NEGATIVE,
    "min_dim_size_to_factor": COUNT,
    "warmup_steps": at_least(0) | NONE,
    "peak_learning_rate": SCALAR_NOT_NEGATIVE | NONE,
    **dict.fromkeys(["b1", "b2", "adam_b1", "adam_b2"], SCALAR_SHARE),
}

_NOT_NEGATIVE: Final = (
    "eps",
    "initial_",
    "min_",
    "max_",
    "weight_decay",
    "adam_weight_decay",
    "adam_eps",
    "clip",
)

# optax's own take no schedule: Rprop's step sizes are part of its state.
_WITHOUT_SCHEDULE: Final = frozenset({"mup_optimistic_adam", "mup_rprop", "mup_scale_by_rprop", "mup_sm3"})


def kinds_of(name: str, signature: inspect.Signature) -> dict[str, Kind]:
    """The kinds of a function's arguments by the names, defaults and annotations of its signature.

    Args:
        name: of the function.
        signature: with its annotations evaluated.

    Returns:
        By argument. `family` is checked where it is read.
    """
    # The spec first: where learning rate and spec are swapped, the spec is what to name.
    ordered = sorted(signature.parameters.values(), key=lambda each: each.name != "spec")
    found = {each.name: kind for each in ordered if (kind := _kind(each)) is not None}
    if "learning_rate" in found and name not in _WITHOUT_SCHEDULE:
        found["learning_rate"] = _with_schedule(found["learning_rate"])
    return found


def _kind(parameter: inspect.Parameter) -> Kind | None:
    name, default = parameter.name, parameter.default
    options = typing.get_args(parameter.annotation)
    if name in _BY_NAME:
        return _BY_NAME[name]
    if name.endswith("mask"):
        return MASK | NONE
    if "dtype" in name:
        return DTYPE | NONE
    if isinstance(default, bool):
        return FLAG
    if isinstance(default, optax.GradientTransformation):
        return TRANSFORM
    if callable(default) and default is not inspect.Parameter.empty:
        return Kind("a function", callable, name)
    if isinstance(default, str):
        return one_of(options, ParametrizationError)
    if name.endswith("dimension_numbers"):
        return DIMENSION_NUMBERS | NONE
    if name == "family":
        return None
    kind = SCALAR_NOT_NEGATIVE if name.startswith(_NOT_NEGATIVE) else SCALAR
    takes_schedule = any(typing.get_origin(option) is collections.abc.Callable for option in options)
    if takes_schedule or name == "weight_decay":
        kind = _with_schedule(kind)
    return kind | NONE if default is None or type(None) in options else kind


def _with_schedule(kind: Kind) -> Kind:
    return Kind(
        f"{kind.expected}, or a schedule of the step",
        lambda value: kind.accepts(value) or SCHEDULE.accepts(value),
        kind.example,
    )


def checked(function: _Function) -> _Function:
    """Checks the arguments of an optimizer or transform by `kinds_of` its signature."""
    return takes(**kinds_of(function.__name__, inspect.signature(function, eval_str=True)))(function)
