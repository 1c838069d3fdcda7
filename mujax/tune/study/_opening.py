"""Opens a study: checks the options, connects to the database, and composes the parts of a `SharedStudy`."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.study import StudyDirection

from mujax.errors import ConfigError
from mujax.tune.study._connection import Connection
from mujax.tune.study._heartbeat import Heartbeat
from mujax.tune.study._leases import Leases
from mujax.tune.study._lock import SUFFIX, Lock
from mujax.tune.study._samplers import Sampling, check_sampler, make_pruner
from mujax.tune.study._settings import (
    ATTRIBUTES,
    SETTINGS,
    as_json,
    check_name,
    check_seconds,
    check_space,
    settle,
)
from mujax.tune.study._space import distributions
from mujax.tune.study._trials import Trials, run_again


@dataclasses.dataclass(frozen=True)
class Opened:
    """An open study.

    Attributes:
        connection: to its database.
        study: Optuna's.
        trials: of the study.
        lock: of all its workers.
        heartbeat: of this worker.
        leases: of this worker.
        settings: those that the study was started with.
    """

    connection: Connection
    study: optuna.Study
    trials: Trials
    lock: Lock
    heartbeat: Heartbeat
    leases: Leases
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def close(self) -> None:
        """Ends the heartbeat and closes the connections."""
        self.heartbeat.stop()
        self.connection.close()

    @property
    def attributes(self) -> dict[str, Any]:
        """The attributes that the worker that started the study stored with it."""
        return dict(self.connection.persist(lambda: self.study.user_attrs).get(ATTRIBUTES, {}))


def open_to_work(
    name: str,
    space: Mapping[str, Any],
    *,
    storage: str | pathlib.Path | BaseStorage | None,
    sampler: str | BaseSampler,
    pruner: str | BasePruner | None,
    seed: int,
    settings: Mapping[str, Any] | None,
    attributes: Mapping[str, Any] | None,
    heartbeat: float,
    heartbeat_timeout: float | None,
    patience: float,
    say: Callable[[str], None] | None,
) -> Opened:
    """See `SharedStudy.open`."""
    space = distributions(space)
    sampling = Sampling(space, check_sampler(sampler), seed)
    made = make_pruner(pruner)
    given, stored = as_json(settings or {}, "settings"), as_json(attributes or {}, "attributes")
    check_name(name)
    timeout = check_seconds(heartbeat, heartbeat_timeout, patience)
    connection = Connection.to_work(
        name, storage, say=say, heartbeat=heartbeat, heartbeat_timeout=timeout, on_stale=run_again
    )
    with connection.closed_on_error():
        study = _create_study(connection, sampling.initial, made)
        opened = _composed(connection, study, sampling, heartbeat, timeout)
        there = settle(connection, study, opened.lock, given, stored, space)
        check_space(connection, study, opened.trials, space)
    connection.patience = patience
    return dataclasses.replace(opened, settings=there)


def open_to_read(name: str, storage: str | pathlib.Path | BaseStorage | None) -> Opened:
    """See `SharedStudy.load`."""
    connection = Connection.to_read(name, storage)
    with connection.closed_on_error():
        study = _load_study(connection)
        opened = _composed(connection, study)
        there = connection.persist(lambda: study.user_attrs).get(SETTINGS, {})
    return dataclasses.replace(opened, settings=there)


def _composed(
    connection: Connection,
    study: optuna.Study,
    sampling: Sampling | None = None,
    heartbeat: float = 60.0,
    timeout: float = 180.0,
) -> Opened:
    name, storage = connection.name, connection.storage
    study_id = connection.study_id = connection.persist(lambda: storage.get_study_id_from_name(name))
    trials = Trials(study, study_id, storage, sampling)
    lock = Lock(storage, name, connection.clock)
    heart = Heartbeat(storage, name, interval=heartbeat, timeout=timeout, on_failure=connection.mark_lost)
    return Opened(connection, study, trials, lock, heart, Leases(connection, trials, lock, heart))


def _create_study(connection: Connection, sampler: BaseSampler, pruner: BasePruner) -> optuna.Study:
    """Creates a study, or opens the one of that name.

    Raises:
        ConfigError: the study exists, and does not minimize one value.
    """
    study = connection.persist(
        lambda: optuna.create_study(
            storage=connection.storage,
            study_name=connection.name,
            sampler=sampler,
            pruner=pruner,
            direction="minimize",
            load_if_exists=True,
        )
    )
    if connection.persist(lambda: study.directions) != [StudyDirection.MINIMIZE]:
        raise ConfigError(
            where="study",
            expected="one that minimizes one value",
            got=f"{connection.name!r}, which does not",
            remedy="take another study name",
        )
    return study


def _load_study(connection: Connection) -> optuna.Study:
    """Opens an existing study.

    Raises:
        ConfigError: no study has that name; the text lists the existing ones.
    """
    name, storage = connection.name, connection.storage
    names = connection.persist(lambda: optuna.get_all_study_names(storage))
    if name not in names:
        there = [repr(known) for known in names if not known.endswith(SUFFIX)]
        raise ConfigError(
            where="study",
            expected=f"one of {', '.join(there) or 'none yet'} in {connection.shown}",
            got=repr(name),
        )
    return connection.persist(lambda: optuna.load_study(study_name=name, storage=storage))
