"""The name, settings and space of a study; stored at its start, and compared on resume."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping
from typing import Any, Final

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
    json_to_distribution,
)

from mujax.errors import ConfigError
from mujax.tune.study._connection import Connection
from mujax.tune.study._lock import SUFFIX, Lock
from mujax.tune.study._trials import Trials

SETTINGS: Final = "mujax"
# Older workers of a study use this name.
ATTRIBUTES: Final = "mujax:notes"
_SPACE: Final = "mujax:space"


def check_name(name: str) -> None:
    """Refuses a name that no study can have, or that is a lock's."""
    if not isinstance(name, str) or not name.strip() or len(name) > 400 or name.endswith(SUFFIX):
        raise ConfigError(
            where="study",
            expected=f"a name of 1 to 400 characters that does not end in {SUFFIX!r}",
            got=repr(name),
        )


def check_seconds(heartbeat: float, heartbeat_timeout: float | None, patience: float) -> float:
    """Refuses invalid times; returns the heartbeat timeout."""
    given = {"heartbeat": heartbeat, "heartbeat_timeout": heartbeat_timeout, "patience": patience}
    for option, seconds in given.items():
        is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        if seconds is not None and not (is_number and math.isfinite(seconds) and seconds >= 0):
            raise ConfigError(where=option, expected="a number of seconds", got=repr(seconds))
    timeout = 3 * heartbeat if heartbeat_timeout is None else heartbeat_timeout
    if not 0 < heartbeat < timeout:
        raise ConfigError(
            where="heartbeat_timeout",
            expected=f"more than the heartbeat of {heartbeat:g} s",
            got=f"{timeout:g} s",
            remedy="take 3 heartbeats",
        )
    return timeout


def as_json(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values as read back from the storage: tuples become lists."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        try:
            found[str(key)] = json.loads(json.dumps(value))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                where=where,
                expected="what JSON can hold",
                got=f"{type(value).__name__} at {key!r}",
                remedy="make it a number, a text, a list or a mapping",
            ) from error
    return found


def settle(
    connection: Connection,
    study: optuna.Study,
    lock: Lock,
    settings: Mapping[str, Any],
    attributes: Mapping[str, Any],
    space: Mapping[str, BaseDistribution],
) -> dict[str, Any]:
    """Stores settings and space with a new study, or compares the settings with the stored ones.

    Returns:
        The stored settings.

    Raises:
        ConfigError: a setting differs from the stored one.
    """

    def stored() -> dict[str, Any] | None:
        return study.user_attrs.get(SETTINGS)

    def store() -> None:
        if stored() is None:
            study.set_user_attr(ATTRIBUTES, attributes)
            # A study that has trials already was started without mujax: its space is theirs.
            if not study.get_trials(deepcopy=False):
                study.set_user_attr(_SPACE, {name: distribution_to_json(at) for name, at in space.items()})
            study.set_user_attr(SETTINGS, settings)

    if connection.persist(stored) is None:
        # Alone: of two workers with different settings, one must notice.
        token = uuid.uuid4().hex
        connection.persist(lambda: lock.run_alone(token, store))
    there = connection.persist(stored) or {}
    for key in [*there, *(key for key in settings if key not in there)]:
        old, new = (json.dumps(each[key]) if key in each else "nothing" for each in (there, settings))
        if old != new:
            raise ConfigError(
                where=key,
                expected=f"{old}, with which study {connection.name!r} was started",
                got=new,
                remedy="take another study name, or that setting",
            )
    return there


def check_space(
    connection: Connection, study: optuna.Study, trials: Trials, space: Mapping[str, BaseDistribution]
) -> None:
    """Refuses a space other than the one that the study was started with.

    Raises:
        ConfigError: the space differs.
    """
    stored = connection.persist(lambda: study.user_attrs).get(_SPACE)
    if stored is not None:
        old = {name: json_to_distribution(text) for name, text in stored.items()}
    else:
        # Started by mujax 0.3, or by Optuna itself: the space is that of its trials, as far as they have one.
        old = dict(space)
        for trial in reversed(connection.persist(trials.stored)):
            old |= trial.distributions
    if old != dict(space):
        raise ConfigError(
            where="space",
            expected=f"{_shown(old)}, with which study {connection.name!r} was started",
            got=_shown(space),
            remedy="take another study name, or that space",
        )


def _shown(space: Mapping[str, BaseDistribution]) -> str:
    """A space as text: `lr=0.001:1:log, act=relu|tanh`."""
    return ", ".join(f"{name}={_range(distribution)}" for name, distribution in space.items())


def _range(distribution: BaseDistribution) -> str:
    if isinstance(distribution, CategoricalDistribution):
        return "|".join(map(str, distribution.choices))
    if not isinstance(distribution, FloatDistribution | IntDistribution):
        return str(distribution)
    step = distribution.step
    ends = f"{distribution.low:.6g}:{distribution.high:.6g}"
    return (
        f"{ends}{':log' if distribution.log else ''}{'' if step in (None, 1) else f' in steps of {step:g}'}"
    )
