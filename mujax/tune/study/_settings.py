"""What a study is started with: its name, its settings and its space, compared on resume."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping
from typing import Any, Final

import optuna
from optuna.distributions import BaseDistribution

from mujax.errors import ConfigError
from mujax.tune.study._connection import Connection
from mujax.tune.study._lock import SUFFIX, Lock
from mujax.tune.study._trials import Trials

SETTINGS: Final = "mujax"
# Older workers of a study use this name.
ATTRIBUTES: Final = "mujax:notes"


def check_name(name: str) -> None:
    """Refuses a name that no study can have, or that a lock has."""
    if not isinstance(name, str) or not name.strip() or len(name) > 400 or name.endswith(SUFFIX):
        raise ConfigError(
            f"study: expected a name of 1 to 400 characters that does not end in {SUFFIX!r}, got {name!r}."
        )


def check_seconds(heartbeat: float, heartbeat_timeout: float | None, patience: float) -> float:
    """Refuses times that make no sense; returns the heartbeat timeout."""
    given = {"heartbeat": heartbeat, "heartbeat_timeout": heartbeat_timeout, "patience": patience}
    for option, seconds in given.items():
        if seconds is not None and not (math.isfinite(seconds) and seconds >= 0):
            raise ConfigError(f"{option}: expected a number of seconds, got {seconds!r}.")
    timeout = 3 * heartbeat if heartbeat_timeout is None else heartbeat_timeout
    if not 0 < heartbeat < timeout:
        raise ConfigError(
            f"heartbeat_timeout: expected more than the heartbeat of {heartbeat:g} s, got {timeout:g} s; "
            "take 3 heartbeats."
        )
    return timeout


def as_json(values: Mapping[str, Any], what: str) -> dict[str, Any]:
    """What is read back when this is stored: tuples become lists."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        try:
            found[str(key)] = json.loads(json.dumps(value))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{what}: expected what JSON can hold, got {type(value).__name__} at {key!r}; "
                "make it a number, a text, a list or a mapping."
            ) from error
    return found


def settle(
    connection: Connection,
    study: optuna.Study,
    lock: Lock,
    settings: Mapping[str, Any],
    attributes: Mapping[str, Any],
) -> dict[str, Any]:
    """Stores the settings, or compares them with the stored ones.

    Returns:
        The stored ones.

    Raises:
        ConfigError: a setting differs from the stored one.
    """

    def stored() -> dict[str, Any] | None:
        return study.user_attrs.get(SETTINGS)

    def store() -> None:
        if stored() is None:
            study.set_user_attr(ATTRIBUTES, attributes)
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
                f"{key}: expected {old}, with which study {connection.name!r} was started, got {new}; "
                "take another study name, or that setting."
            )
    return there


def check_space(connection: Connection, trials: Trials, space: Mapping[str, BaseDistribution]) -> None:
    """Refuses a space under which stored trials cannot be compared with new ones."""
    first: dict[str, BaseDistribution] = {}
    for trial in reversed(connection.persist(trials.stored)):
        first |= trial.distributions
    for name, new in space.items():
        old = first.get(name, new)
        try:
            optuna.distributions.check_distribution_compatibility(old, new)
        except ValueError:
            raise ConfigError(
                f"{name}: expected {old}, with which study {connection.name!r} was started, got {new}; "
                "take another study name, or that space."
            ) from None
