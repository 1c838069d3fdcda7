"""A study that any number of workers share."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage

from mujax.tune.study._leases import Lease
from mujax.tune.study._opening import Opened, open_to_read, open_to_work
from mujax.tune.study._settings import as_json
from mujax.tune.study._trials import Record


class SharedStudy:
    """A study that workers share. Use it as a context manager, from one thread.

    Workers that are started alike divide the trials among them and stop together:

        with SharedStudy.open("mlp", space, storage="postgresql://tuner@db/mujax") as study:
            while study.pending(100):
                for lease in study.lease(100, at_most=1):
                    study.finish(lease, train(**lease.params), {})
                # nothing leased: other workers run the rest; wait a moment in case one of them dies

    Every operation outlives a lost connection and a full disk of up to `patience` seconds.
    """

    def __init__(self, opened: Opened) -> None:
        """For `open` and `load`."""
        self._opened = opened
        self._connection = opened.connection
        self._trials = opened.trials
        self._leases = opened.leases

    # ---- open and close

    @classmethod
    def open(
        cls,
        name: str,
        space: Mapping[str, Any],
        *,
        storage: str | pathlib.Path | BaseStorage | None = None,
        sampler: str | BaseSampler = "random",
        pruner: str | BasePruner | None = None,
        seed: int = 0,
        settings: Mapping[str, Any] | None = None,
        attributes: Mapping[str, Any] | None = None,
        heartbeat: float = 60.0,
        heartbeat_timeout: float | None = None,
        patience: float = 300.0,
        say: Callable[[str], None] | None = None,
    ) -> Self:
        """Opens a study to work on it; creates it if it does not exist.

        Args:
            name: of the study in its database.
            space: the hyperparameters, as `distributions` takes them.
            storage: a file or the address of a database; None is `mujax.db` in the working directory. A
                storage object of Optuna's is used as it is.
            sampler: `"random"`, where the k-th trial depends on `seed` and k only, whichever worker runs it;
                `"grid"`, every cell once in the space's own order; the short name of another sampler of
                Optuna's, such as `"tpe"`; or a sampler.
            pruner: consulted by `report`: `"asha"`, `"hyperband"`, `"median"`, `"percentile"`, a pruner, or
                None to stop no trial.
            seed: of the sampler.
            settings: values common to all trials, as JSON: a later worker must give the same.
            attributes: further values to store with the study, as JSON; taken from the worker that starts it.
            heartbeat: seconds between two signs of life.
            heartbeat_timeout: seconds without one after which a worker's trials are run again; None is 3
                heartbeats.
            patience: seconds to wait for a database that cannot be reached.
            say: takes a message for the user: connection lost, connection back, trial taken away.

        Raises:
            ConfigError: an argument is invalid, or the study was started with another.
            StudyError: the database cannot be opened.
        """
        return cls(
            open_to_work(
                name,
                space,
                storage=storage,
                sampler=sampler,
                pruner=pruner,
                seed=seed,
                settings=settings,
                attributes=attributes,
                heartbeat=heartbeat,
                heartbeat_timeout=heartbeat_timeout,
                patience=patience,
                say=say,
            )
        )

    @classmethod
    def load(cls, name: str, storage: str | pathlib.Path | BaseStorage | None = None) -> Self:
        """Opens an existing study to read it.

        Raises:
            ConfigError: no study has that name; the text lists the existing ones.
            StudyError: the database cannot be opened.
        """
        return cls(open_to_read(name, storage))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the heartbeat and closes the connections. Trials not finished are run again elsewhere."""
        self._opened.close()

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the study was started with."""
        return dict(self._opened.settings)

    @property
    def attributes(self) -> dict[str, Any]:
        """The attributes that the worker that started it stored with it."""
        return self._opened.attributes

    @property
    def storage(self) -> str:
        """The database, to print: without its password."""
        return self._connection.shown

    @property
    def heartbeat(self) -> float:
        """Seconds between two signs of life."""
        return self._opened.heartbeat.interval

    # ---- work

    def lease(self, total: int, at_most: int) -> list[Lease]:
        """Takes trials to run, those first that wait to be run (again).

        Args:
            total: number of trials of the whole study; failed ones are not counted. A grid has no more
                than its cells.
            at_most: how many to take.

        Returns:
            The trials; none when all are finished, or other workers run the rest (see `pending`).

        Raises:
            StudyError: the database could not be reached for too long.
        """
        return self._leases.take(total, at_most)

    def pending(self, total: int) -> int:
        """How many of `total` trials are not finished: running, waiting or not started."""
        return self._connection.persist(lambda: self._leases.queue(total)).pending

    def report(self, lease: Lease, step: int, value: float) -> bool:
        """Stores a value of a running trial.

        Returns:
            Whether to stop: the pruner stops the trial, or it was taken away. `finish` it as `"pruned"`.

        Raises:
            StudyError: the database could not be reached for too long.
        """
        held = self._leases.held(lease)
        try:
            return self._connection.persist(lambda: held.report(step, value))
        except UpdateFinishedTrialError:
            self._leases.say_taken_away(lease.number)
            return True

    def finish(
        self,
        lease: Lease,
        value: float | None,
        attrs: Mapping[str, Any],
        *,
        state: Literal["complete", "pruned"] = "complete",
    ) -> bool:
        """Stores the result of a trial.

        Args:
            lease: the trial.
            value: the value to minimize; None or not finite if the trial diverged. Not stored for a pruned
                trial, whose value is the last reported one.
            attrs: values to store with it, as JSON.
            state: `"pruned"` if `report` returned that it must stop.

        Returns:
            False if the trial was taken away, as there was no sign of life from this worker: it is run again
            elsewhere, and this result is dropped.

        Raises:
            StudyError: the database could not be reached for too long. The trial is still this worker's.
        """
        held = self._leases.held(lease)
        attrs = as_json(attrs, "attrs")
        kept = self._connection.persist(
            lambda: self._trials.finish(held.trial, held.trial_id, value, attrs, state)
        )
        if not kept:
            self._leases.say_taken_away(lease.number)
        self._leases.drop(lease.number)
        return kept

    def release(self, leases: Sequence[Lease], why: str) -> None:
        """Puts trials back, to be run again with the same hyperparameters; finished ones are left alone.

        Raises:
            StudyError: the database could not be reached for too long.
        """
        self._leases.put_back(leases, why)

    # ---- read

    def records(self) -> list[Record]:
        """All trials, by number."""
        return self._connection.persist(self._trials.records)
