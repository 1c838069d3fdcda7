"""The leases of one worker: trials that it took from the queue, keeps alive, and finishes or puts back."""

from __future__ import annotations

import dataclasses
import math
import uuid
from collections.abc import Sequence
from typing import Any

from optuna.trial import Trial

from mujax.errors import ConfigError
from mujax.tune.study._connection import Connection
from mujax.tune.study._database import CONNECT_TIMEOUT, LONGEST_PAUSE
from mujax.tune.study._heartbeat import Heartbeat
from mujax.tune.study._lock import Lock
from mujax.tune.study._queue import Entry, Queue, is_sweep_due
from mujax.tune.study._trials import Trials


@dataclasses.dataclass(frozen=True)
class Lease:
    """A trial that this worker is to run.

    Attributes:
        number: of the trial in the study.
        params: its hyperparameters.
    """

    number: int
    params: dict[str, Any]


@dataclasses.dataclass
class Held:
    """A leased trial that is not finished."""

    trial: Trial
    trial_id: int
    steps: set[int] = dataclasses.field(default_factory=set)
    taken_away: bool = False

    def report(self, step: int, value: float) -> bool:
        """Stores a value, once; returns whether the pruner stops the trial. May be repeated."""
        if step not in self.steps:
            self.trial.report(value if math.isfinite(value) else math.inf, step)
            self.steps.add(step)
        return self.trial.should_prune()


class Leases:
    """Takes trials from the queue for one worker, while no other worker does."""

    def __init__(self, connection: Connection, trials: Trials, lock: Lock, heartbeat: Heartbeat) -> None:
        self._connection = connection
        self._trials = trials
        self._lock = lock
        self._heartbeat = heartbeat
        self._held: dict[int, Held] = {}
        self._swept_at = -math.inf

    def queue(self, total: int) -> Queue:
        """The study's trials now."""
        sampling = self._trials.sampling
        return Queue(self._trials.entries(), total, None if sampling is None else sampling.grid)

    def take(self, total: int, at_most: int) -> list[Lease]:
        """Takes trials to run; see `SharedStudy.lease`."""
        if self._trials.sampling is None:
            raise ConfigError(
                where="lease", expected="a study opened with its space", got="one opened to read"
            )
        queue = self._connection.persist(lambda: self.queue(total))
        if at_most < 1 or (queue.free < 1 and not self._is_sweep_due()):
            return []
        token = uuid.uuid4().hex
        taken: dict[int, dict[str, Any]] = {}
        try:
            # Repeated if the lock was lost meanwhile, to see which trials are still leased.
            while not self._connection.persist(
                lambda: self._lock.run_alone(token, lambda: self._fill(total, at_most, taken)),
            ):
                pass
        except BaseException:
            # Not run by this worker, so there must be no sign of life from them: they are run elsewhere.
            for number in taken:
                self.drop(number)
            raise
        return [Lease(number, params) for number, params in taken.items()]

    def put_back(self, leases: Sequence[Lease], why: str) -> None:
        """Puts trials back in the queue; see `SharedStudy.release`."""
        numbers = [lease.number for lease in leases if lease.number in self._held]
        if not numbers:
            return
        token = uuid.uuid4().hex

        def operation() -> None:
            live = {entry.identity for entry in self._trials.entries() if entry.state != "failed"}
            for number in numbers:
                trial_id = self._held[number].trial_id
                entry = self._trials.entry(trial_id)
                if entry.state == "running":
                    self._trials.release(trial_id, why)
                elif entry.state != "failed" or entry.identity in live:
                    continue
                self._trials.run_again(trial_id)
                live.add(entry.identity)

        try:
            # Alone, or another worker would fill the place of a trial between its end and its return.
            self._connection.persist(lambda: self._lock.run_alone(token, operation))
        finally:
            for number in numbers:
                self.drop(number)

    # ---- what this worker holds

    def held(self, lease: Lease) -> Held:
        """The trial of a lease.

        Raises:
            ConfigError: it is not this worker's, or it is finished.
        """
        if lease.number not in self._held:
            raise ConfigError(
                where="lease",
                expected="a trial that this worker leased and has not finished",
                got=lease.number,
            )
        return self._held[lease.number]

    def hold(self, trial: Trial, trial_id: int) -> None:
        """Keeps a trial alive from now on."""
        self._held[trial.number] = Held(trial, trial_id)
        self._heartbeat.keep_alive(each.trial_id for each in self._held.values())
        self._heartbeat.start()

    def drop(self, number: int) -> None:
        """Keeps a trial alive no longer."""
        self._held.pop(number, None)
        self._heartbeat.keep_alive(each.trial_id for each in self._held.values())

    def say_taken_away(self, number: int) -> None:
        """Reports, once, that another worker took a trial."""
        held = self._held[number]
        if not held.taken_away:
            held.taken_away = True
            self._connection.say(
                f"trial {number} was taken away, since there was no sign of life from this worker for "
                f"{self._heartbeat.timeout:g} s; it is run again, and this result is dropped."
            )

    # ---- with the lock

    def _is_sweep_due(self) -> bool:
        return is_sweep_due(
            self._connection.clock.now(),
            lost_at=self._connection.lost_at,
            swept_at=self._swept_at,
            settling=min(self._heartbeat.timeout, 2 * (LONGEST_PAUSE + CONNECT_TIMEOUT)),
            heartbeat=self._heartbeat.interval,
        )

    def _fill(self, total: int, at_most: int, taken: dict[int, dict[str, Any]]) -> None:
        """Fills `taken`; entries of an earlier attempt may not be ours any more."""
        if self._is_sweep_due():
            self._trials.fail_stale()
            self._swept_at = self._connection.clock.now()
        queue = self._without_surplus(total, taken)
        want = max(0, min(at_most - len(taken), queue.free))
        if slots := queue.next_slots(want - len(queue.waiting)):
            for slot in slots:
                self._trials.add(slot)
            queue = self._without_surplus(total, taken)
        for entry in queue.waiting[:want]:
            if not self._take(entry, taken):
                break

    def _without_surplus(self, total: int, taken: dict[int, dict[str, Any]]) -> Queue:
        queue = self.queue(total)
        surplus = queue.surplus(taken)
        for number in surplus:
            self._trials.fail(self._trials.id_of(number))
            taken.pop(number, None)
            self.drop(number)
        return queue.without(surplus)

    def _take(self, entry: Entry, taken: dict[int, dict[str, Any]]) -> bool:
        """Takes the first trial of the queue; False if another worker was quicker."""
        assert self._trials.sampling is not None
        space = self._trials.sampling.space
        trial_id = self._trials.id_of(entry.number)
        for name, value in entry.enqueued.items():
            try:
                if name in space:
                    space[name].to_internal_repr(value)
            except ValueError:
                self._connection.say(
                    f"trial {entry.number} is dropped: its {name} = {value!r} is not in the space."
                )
                self._trials.fail(trial_id)
                return True
        # Before it runs: if a worker is killed in between, its trial must be recognisable as stale.
        self._heartbeat.sign(trial_id)
        trial = self._trials.start(entry.number)
        if trial is None:
            return False
        self.hold(trial, trial_id)
        taken[trial.number] = {name: trial.params[name] for name in space}
        return True
