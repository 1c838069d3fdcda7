"""Converts a search space, as the user writes it, to Optuna's distributions."""

from __future__ import annotations

import decimal
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Final

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from mujax.errors import ConfigError
from mujax.tune._numbers import number as parsed_number

_RANGE_KEYS: Final = ("low", "high", "log", "step")


def distributions(space: Mapping[str, Any]) -> dict[str, BaseDistribution]:
    """A search space as Optuna's distributions.

    Args:
        space: for each hyperparameter a list of values, a range `{"low": ..., "high": ...}` with optional
            `"log"` and `"step"`, or a distribution of Optuna's as it is. A range whose ends are whole numbers
            (and the step, if any) holds whole numbers. Ends and step can be texts such as
            `"2**-8"` or `"2^-8"`, since YAML has no powers.

    Returns:
        A distribution for each hyperparameter, in the same order.

    Raises:
        ConfigError: no hyperparameter, or another kind of value.

    >>> distributions({"lr": {"low": "2**-8", "high": 1.0, "log": True}, "layers": {"low": 1, "high": 4}})
    {'lr': FloatDistribution(high=1.0, log=True, low=0.00390625, step=None), \
'layers': IntDistribution(high=4, log=False, low=1, step=1)}
    """
    if not isinstance(space, Mapping):
        raise ConfigError(where="space", expected="a mapping of hyperparameters", got=repr(space))
    if not space:
        raise ConfigError(where="space", expected="at least one hyperparameter", got="none")
    return {name: _distribution(str(name), value) for name, value in space.items()}


def _distribution(name: str, value: Any) -> BaseDistribution:
    if isinstance(value, BaseDistribution):
        return value
    if isinstance(value, Mapping):
        return _range(name, value)
    if isinstance(value, (list, tuple)):
        return _choices(name, value)
    raise ConfigError(
        where=name,
        expected="a list of values or a range",
        got=repr(value),
        remedy='write [1, 2, 4] or {"low": 0.1, "high": 1.0}',
    )


def _choices(name: str, values: Sequence[Any]) -> CategoricalDistribution:
    if not values:
        raise ConfigError(where=name, expected="at least one value to choose from", got="none")
    for value in values:
        if value is not None and not isinstance(value, (bool, int, float, str)):
            raise ConfigError(
                where=name,
                expected="numbers, texts, true, false or null to choose from",
                got=repr(value),
                remedy="give each choice a name and look it up in your own code",
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(where=name, expected="finite values to choose from", got=repr(value))
    # Optuna finds a choice by equality: 1 and True, or 1 and 1.0, would be the same.
    if len(set(values)) < len(values):
        raise ConfigError(where=name, expected="different values to choose from", got=list(values))
    return CategoricalDistribution(values)


def _number(name: str, key: str, value: Any) -> int | float:
    number = parsed_number(value) if isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not -1e300 < number < 1e300:
        raise ConfigError(
            where=name,
            expected=f"a finite number as {key}",
            got=repr(value),
            remedy="write it as 0.001, 1e-3 or 2**-10",
        )
    return number


def _range(name: str, value: Mapping[str, Any]) -> FloatDistribution | IntDistribution:
    for key in value:
        if key not in _RANGE_KEYS:
            raise ConfigError(
                where=name, expected=f"the keys {', '.join(_RANGE_KEYS)} of a range", got=repr(key)
            )
    for key in ("low", "high"):
        if value.get(key) is None:
            raise ConfigError(where=name, expected="low and high of a range", got=f"no {key}")
    low, high = (_number(name, key, value[key]) for key in ("low", "high"))
    log = value.get("log", False)
    step = None if value.get("step") is None else _number(name, "step", value["step"])
    if not isinstance(log, bool):
        raise ConfigError(where=name, expected="true or false as log", got=repr(log))
    if low >= high:
        raise ConfigError(
            where=name,
            expected="low < high",
            got=f"{low!r} and {high!r}",
            remedy="write a list for a single value",
        )
    if log and low <= 0:
        raise ConfigError(where=name, expected="low > 0 on a log scale", got=repr(low), remedy="raise low")
    if step is not None and (log or step <= 0):
        raise ConfigError(
            where=name,
            expected="a positive step and no log scale with it",
            got=f"step {step!r} and log {log!r}",
            remedy="write the values as a list",
        )
    with warnings.catch_warnings():
        # A step that does not end at high ends before it, as in Python's range.
        warnings.filterwarnings("ignore", message="The distribution is specified by")
        if isinstance(low, int) and isinstance(high, int) and (step is None or isinstance(step, int)):
            return IntDistribution(low, high, log=log, step=1 if step is None else step)
        return FloatDistribution(low, high, log=log, step=step)


def axis_of(name: str, distribution: BaseDistribution) -> Sequence[Any]:
    """All values of a hyperparameter, in order."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    if isinstance(distribution, IntDistribution):
        return range(distribution.low, distribution.high + 1, distribution.step)
    if isinstance(distribution, FloatDistribution) and distribution.step is not None:
        low, high, step = (
            # Decimal, as Optuna does: 0.1 three times is 0.3.
            decimal.Decimal(str(end))
            for end in (distribution.low, distribution.high, distribution.step)
        )
        return [float(low + at * step) for at in range(int((high - low) / step) + 1)]
    raise ConfigError(
        where=name,
        expected="finitely many values for a grid",
        got=distribution,
        remedy="write a list, or a range with a step",
    )
