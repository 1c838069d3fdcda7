"""A study that any number of workers share: claims, signs of life, results."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import pathlib
import random
import threading
import time
import uuid
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, Final, Literal, Self, TypeVar

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import DuplicatedStudyError, StorageInternalError, UpdateFinishedTrialError
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, RandomSampler
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from mujax.errors import ConfigError, StudyError
from mujax.tune.study._database import (
    CONNECT_TIMEOUT,
    LONGEST_PAUSE,
    begin_immediate,
    check_file,
    connect,
    database_error,
    fault_of,
    first_line,
    may_pass,
    quiet,
    shown_as,
    url_of,
)
from mujax.tune.study._samplers import check_sampler, make_pruner, samplers, seed_of
from mujax.tune.study._space import axis_of, distributions

T = TypeVar("T")

_SETTINGS: Final = "mujax"
_NOTES: Final = "mujax:notes"
_DIVERGED: Final = "diverged"
_RELEASED: Final = "released"
# Which of the study's trials this is, counted from 0 without retries: a retry inherits it.
_SLOT: Final = "mujax:slot"
_CLAIMING: Final = " (claiming)"
_OWNER: Final = "owner"

# Seconds without a sign of life after which a claiming worker is taken for dead.
_CLAIMING_GRACE: Final = 30.0

State = Literal["complete", "pruned", "failed", "running", "waiting"]
_STATES: Final[Mapping[TrialState, State]] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


@dataclasses.dataclass(frozen=True)
class Claim:
    """A trial that this worker is to run.

    Attributes:
        number: of the trial in the study.
        params: its hyperparameters.
    """

    number: int
    params: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Record:
    """A trial as the study knows it.

    Attributes:
        number: of the trial in the study; a trial that is run again gets a new one.
        params: its hyperparameters, as far as they are drawn.
        value: what was measured: infinite if it diverged, the last reported if it was pruned, else None.
        state: where it stands; `"failed"` is one that was given up and is run again under another number.
        diverged: it was finished without a finite value.
        attrs: what was stored with it.
        intermediate: the reported values, by step.
    """

    number: int
    params: dict[str, Any]
    value: float | None
    state: State
    diverged: bool
    attrs: dict[str, Any]
    intermediate: dict[int, float]


@dataclasses.dataclass
class _Held:
    """A claimed trial that is not finished."""

    trial: Trial
    trial_id: int
    steps: set[int] = dataclasses.field(default_factory=set)
    taken: bool = False


def _params(trial: FrozenTrial) -> dict[str, Any]:
    """Of a trial that may still be waiting: then they are partly drawn, partly told."""
    return {**trial.system_attrs.get("fixed_params", {}), **trial.params}


def _identity(trial: FrozenTrial) -> tuple[str, int]:
    """The same for a trial and its retries."""
    slot = trial.system_attrs.get(_SLOT)
    if slot is not None:
        return "slot", slot
    return "trial", trial.system_attrs.get("failed_trial", trial.number)


def _run_again(study: optuna.Study, trial: FrozenTrial) -> None:
    """Puts a failed trial back in the queue, under a new number."""
    known = trial.system_attrs
    # Not all system attributes: with a pruner's, the new trial would start where the old one stood.
    system_attrs: dict[str, Any] = {key: known[key] for key in (_SLOT, "fixed_params") if key in known}
    # The names by which Optuna finds the history of a retry.
    system_attrs["failed_trial"] = known.get("failed_trial", trial.number)
    system_attrs["retry_history"] = [*known.get("retry_history", []), trial.number]
    user_attrs = {key: value for key, value in trial.user_attrs.items() if key not in (_DIVERGED, _RELEASED)}

    def add(**fields: Any) -> None:
        study.add_trial(optuna.create_trial(state=TrialState.WAITING, user_attrs=user_attrs, **fields))

    try:
        add(params=trial.params, distributions=trial.distributions, system_attrs=system_attrs)
    except ValueError:
        # A value that the user enqueued and that is outside its distribution.
        add(system_attrs=system_attrs | {"fixed_params": _params(trial)})


class SharedStudy:
    """A study that workers share. Use it as a context manager, from one thread.

    Workers that are started alike divide the trials among them and stop together:

        with SharedStudy.open("mlp", space, storage="postgresql://tuner@db/mujax") as study:
            while study.pending(100):
                for claim in study.claim(100, at_most=1):
                    study.finish(claim, train(**claim.params), {})
                # nothing claimed: others run what is left; wait a moment in case one of them dies

    Every operation outlives a lost connection and a full disk of up to `patience` seconds.
    """

    _study: optuna.Study
    _study_id: int = -1

    def __init__(
        self,
        name: str,
        storage: BaseStorage,
        shown: str,
        *,
        owned: bool,
        heartbeat: float,
        grace: float,
        say: Callable[[str], None] | None,
    ) -> None:
        """For `open` and `load`."""
        self.name = name
        self._storage = storage
        self._shown = shown
        self._owned = owned
        self._heartbeat = heartbeat
        self._grace = grace
        self._say_to = say
        # No patience until the study is open.
        self._patience = 0.0
        self._claiming_grace = _CLAIMING_GRACE
        # The lock as last seen, and since when.
        self._seen: tuple[tuple[int, str] | None, float] = (None, 0.0)
        self._space: dict[str, BaseDistribution] = {}
        self._axes: list[Sequence[Any]] | None = None
        self._sampler: str | BaseSampler = "random"
        self._seed = 0
        self._settings: dict[str, Any] = {}
        self._held: dict[int, _Held] = {}
        # What the thread reads: replaced, never changed.
        self._beating: tuple[int, ...] = ()
        # A worker just started can't know since when the database can be reached.
        self._unsettled = time.monotonic()
        self._swept = -math.inf
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

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
        notes: Mapping[str, Any] | None = None,
        heartbeat: float = 60.0,
        grace: float | None = None,
        patience: float = 300.0,
        say: Callable[[str], None] | None = None,
    ) -> Self:
        """Opens a study to work on it, and creates it if there is none of that name.

        Args:
            name: of the study in its database.
            space: the hyperparameters, as `distributions` takes them.
            storage: a file or the address of a database; None is `mujax.db` in the working directory. A
                storage object of Optuna's is used as it is.
            sampler: `"random"`, where the k-th trial depends on `seed` and k only, whoever runs it; `"grid"`,
                every cell once in the space's own order; the short name of another sampler of Optuna's, such
                as `"tpe"`; or a sampler.
            pruner: what `report` asks: `"asha"`, `"hyperband"`, `"median"`, `"percentile"`, a pruner, or
                None to stop no trial.
            seed: of the sampler.
            settings: what all trials have in common, as JSON: a later worker must bring the same.
            notes: what else to remember, as JSON, from the worker that begins the study.
            heartbeat: seconds between two signs of life.
            grace: seconds without one after which a worker's trials are run again; None is 3 heartbeats.
            patience: seconds to wait for a database that can't be reached.
            say: takes a sentence for the user: connection lost, connection back, trial taken away.

        Raises:
            ConfigError: an argument makes no sense, or the study was begun with another.
            StudyError: the database can't be opened.
        """
        space = distributions(space)
        checked = check_sampler(sampler)
        axes = [axis_of(*item) for item in space.items()] if checked == "grid" else None
        chosen = make_pruner(pruner)
        given, remembered = _as_json(settings or {}), _as_json(notes or {}, "notes")
        _check_name(name)
        for option, seconds in (("heartbeat", heartbeat), ("grace", grace), ("patience", patience)):
            if seconds is not None and not (math.isfinite(seconds) and seconds >= 0):
                raise ConfigError(f"{option}: expected a number of seconds, got {seconds!r}.")
        grace = 3 * heartbeat if grace is None else grace
        if not 0 < heartbeat < grace:
            raise ConfigError(
                f"grace: expected more than the heartbeat of {heartbeat:g} s, got {grace:g} s; "
                "take 3 heartbeats."
            )
        if isinstance(storage, BaseStorage):
            opened, shown = storage, type(storage).__name__
        else:
            url = url_of(storage)
            shown = shown_as(url)
            opened = connect(
                url,
                shown,
                heartbeat_interval=math.ceil(heartbeat),
                grace_period=math.ceil(grace),
                heartbeat_stale_trial_callback=_run_again,
            )
            if url.get_backend_name() == "sqlite":
                begin_immediate(opened.engine)
        owned = not isinstance(storage, BaseStorage)
        self = cls(name, opened, shown, owned=owned, heartbeat=heartbeat, grace=grace, say=say)
        self._space, self._axes, self._sampler, self._seed = space, axes, checked, seed
        try:
            self._study = self._persist(
                lambda: optuna.create_study(
                    storage=opened,
                    study_name=name,
                    sampler=checked if isinstance(checked, BaseSampler) else RandomSampler(seed=seed),
                    pruner=chosen,
                    direction="minimize",
                    load_if_exists=True,
                )
            )
            self._study_id = self._persist(lambda: opened.get_study_id_from_name(name))
            if self._study.directions != [StudyDirection.MINIMIZE]:
                raise ConfigError(
                    f"study: expected one that minimizes one value, got {name!r}, which does not; "
                    "take another study name."
                )
            self._settle(given, remembered)
            self._check_space()
        except BaseException:
            self.close()
            raise
        self._patience = patience
        return self

    @classmethod
    def load(cls, name: str, storage: str | pathlib.Path | BaseStorage | None = None) -> Self:
        """Opens an existing study to read it.

        Raises:
            ConfigError: there is none of that name; the text lists those that there are.
            StudyError: the database can't be opened.
        """
        if isinstance(storage, BaseStorage):
            opened, shown = storage, type(storage).__name__
        else:
            url = url_of(storage)
            shown = shown_as(url)
            if url.get_backend_name() == "sqlite" and not check_file(url, shown):
                raise ConfigError(f"study: expected {name!r} in {shown}, found no such file.")
            opened = connect(url, shown)
        owned = not isinstance(storage, BaseStorage)
        self = cls(name, opened, shown, owned=owned, heartbeat=60.0, grace=180.0, say=None)
        try:
            names = self._persist(lambda: optuna.get_all_study_names(opened))
            if name not in names:
                there = [repr(known) for known in names if not known.endswith(_CLAIMING)]
                raise ConfigError(
                    f"study: expected one of {', '.join(there) or 'none yet'} in {shown}, got {name!r}."
                )
            self._study = self._persist(lambda: optuna.load_study(study_name=name, storage=opened))
            self._study_id = self._persist(lambda: opened.get_study_id_from_name(name))
            self._settings = self._persist(lambda: self._study.user_attrs).get(_SETTINGS, {})
        except BaseException:
            self.close()
            raise
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the signs of life and closes the connections. Trials not finished are run again elsewhere."""
        self._stop.set()
        self._beating = ()
        if self._thread is not None:
            self._thread.join(timeout=LONGEST_PAUSE)
            self._thread = None
        if self._owned and isinstance(self._storage, RDBStorage):
            self._storage.remove_session()
            self._storage.engine.dispose()

    @property
    def settings(self) -> dict[str, Any]:
        """What the study was begun with."""
        return dict(self._settings)

    @property
    def notes(self) -> dict[str, Any]:
        """What the worker that began it had to remember."""
        return dict(self._persist(lambda: self._study.user_attrs).get(_NOTES, {}))

    @property
    def storage(self) -> str:
        """The database, to print: without its password."""
        return self._shown

    # ---- work

    def claim(self, total: int, at_most: int) -> list[Claim]:
        """Takes trials to run, those first that wait to be run (again).

        Args:
            total: trials that the whole study is to have; failed ones are not counted. A grid has no more
                than its cells.
            at_most: how many to take.

        Returns:
            The trials; none when all are finished, or others run what is left (see `pending`).

        Raises:
            StudyError: the database could not be reached for too long.
        """
        if not self._space:
            raise ConfigError("claim: expected a study opened with its space, got one opened to read.")
        trials = self._persist(self._trials)
        if at_most < 1 or (self._claimable(trials, total) < 1 and not self._sweep_is_due()):
            return []
        token = uuid.uuid4().hex
        taken: dict[int, dict[str, Any]] = {}
        try:
            # Once more if the right to claim was lost meanwhile, to see what of it stands.
            while not self._persist(
                lambda: self._alone(token, lambda: self._claim(total, at_most, taken)),
            ):
                pass
        except BaseException:
            # Not run by this worker, so there must be no sign of life from them: they are run elsewhere.
            for number in taken:
                self._drop(number)
            raise
        return [Claim(number, params) for number, params in taken.items()]

    def pending(self, total: int) -> int:
        """How many of `total` trials are not finished: running, waiting or not begun."""
        trials = self._persist(self._trials)
        finished = sum(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in trials)
        return max(0, self._limit(trials, total) - finished)

    def report(self, claim: Claim, step: int, value: float) -> bool:
        """Stores a value of a running trial.

        Returns:
            The pruner says to stop, or the trial was taken away: `finish` it as `"pruned"` and go on.

        Raises:
            StudyError: the database could not be reached for too long.
        """
        held = self._mine(claim)
        stored = value if math.isfinite(value) else math.inf

        def write() -> bool:
            if step not in held.steps:
                held.trial.report(stored, step)
                held.steps.add(step)
            return held.trial.should_prune()

        try:
            return self._persist(write)
        except UpdateFinishedTrialError:
            self._say_taken(claim.number, held)
            return True

    def finish(
        self,
        claim: Claim,
        value: float | None,
        attrs: Mapping[str, Any],
        *,
        state: Literal["complete", "pruned"] = "complete",
    ) -> bool:
        """Stores the result of a trial.

        Args:
            claim: the trial.
            value: what to minimize; None or not finite if it diverged. Not stored for a pruned trial, whose
                value is the last reported one.
            attrs: what to store with it, as JSON.
            state: `"pruned"` if `report` said to stop.

        Returns:
            False if the trial was taken away, as there was no sign of life from this worker: it is run again
            elsewhere, and this result is dropped.

        Raises:
            StudyError: the database could not be reached for too long. The trial is still this worker's.
        """
        held = self._mine(claim)
        attrs = _as_json(attrs, "attrs")
        complete = state == "complete"
        diverged = complete and (value is None or not math.isfinite(value))
        result = (math.inf if diverged or value is None else float(value)) if complete else None

        def write() -> bool:
            stored = self._storage.get_trial(held.trial_id)
            if not stored.state.is_finished():
                flag = {_DIVERGED: diverged} if diverged or _DIVERGED in stored.user_attrs else {}
                for key, attr in {**attrs, **flag}.items():
                    self._storage.set_trial_user_attr(held.trial_id, key, attr)
                kind = TrialState.COMPLETE if complete else TrialState.PRUNED
                self._study.tell(held.trial, result, state=kind)
                return True
            # Finished already: by this worker, if the connection was lost before the answer came, since all
            # that others do to a trial of ours is to fail it.
            return stored.state != TrialState.FAIL

        def write_once() -> bool:
            try:
                return write()
            except (ValueError, RuntimeError, UpdateFinishedTrialError):
                # Optuna's ways to say that the trial was finished since we looked.
                stored = self._storage.get_trial(held.trial_id)
                if not stored.state.is_finished():
                    raise
                return stored.state != TrialState.FAIL

        kept = self._persist(write_once)
        if not kept:
            self._say_taken(claim.number, held)
        self._drop(claim.number)
        return kept

    def release(self, claims: Sequence[Claim], why: str) -> None:
        """Puts trials back, to be run again with the same hyperparameters; finished ones are left alone.

        Raises:
            StudyError: the database could not be reached for too long.
        """
        numbers = [claim.number for claim in claims if claim.number in self._held]
        if not numbers:
            return
        token = uuid.uuid4().hex

        def put_back() -> None:
            live = {_identity(trial) for trial in self._trials() if trial.state != TrialState.FAIL}
            for number in numbers:
                trial_id = self._held[number].trial_id
                trial = self._storage.get_trial(trial_id)
                if trial.state == TrialState.RUNNING:
                    self._storage.set_trial_user_attr(trial_id, _RELEASED, why)
                    self._fail(trial_id)
                elif trial.state != TrialState.FAIL or _identity(trial) in live:
                    continue
                _run_again(self._study, trial)
                live.add(_identity(trial))

        try:
            # Alone, or another worker would fill the place of a trial between its end and its return.
            self._persist(lambda: self._alone(token, put_back))
        finally:
            for number in numbers:
                self._drop(number)

    # ---- read

    def records(self) -> list[Record]:
        """All trials, by number."""
        return [
            Record(
                number=trial.number,
                params=_params(trial),
                value=trial.value,
                state=_STATES[trial.state],
                diverged=bool(trial.user_attrs.get(_DIVERGED, False)),
                attrs={key: value for key, value in trial.user_attrs.items() if key != _DIVERGED},
                intermediate=dict(trial.intermediate_values),
            )
            for trial in self._persist(self._trials)
        ]

    def best(self) -> Record | None:
        """The complete trial of the lowest value; None if there is none that did not diverge."""
        complete = (record for record in self.records() if record.state == "complete" and not record.diverged)
        finite = [record for record in complete if record.value is not None and math.isfinite(record.value)]
        return min(finite, key=lambda record: (record.value, record.number), default=None)

    # ---- the database

    def _say(self, text: str) -> None:
        if self._say_to is not None:
            self._say_to(f"study {self.name!r}: {text}")

    def _persist(self, operation: Callable[[], T]) -> T:
        """Does something with the database, again and again while that can help.

        The operation may have been done although its answer was lost: it must look before it writes.
        """
        began: float | None = None
        pause = 0.1
        while True:
            try:
                with quiet():
                    result = operation()
                break
            except Exception as error:
                now = time.monotonic()
                inner = database_error(error)
                if inner is None:
                    if isinstance(error, KeyError) and self._is_gone():
                        raise StudyError(
                            f"study {self.name!r}: expected it in {self._shown}, found that somebody deleted "
                            "it; the same command begins it anew."
                        ) from error
                    raise
                fault, line = fault_of(inner), first_line(inner)
                self._unsettled = now
                if not may_pass(inner) or now - (began or now) >= self._patience:
                    waited = "" if began is None else f" for {now - began:.0f} s"
                    raise StudyError(
                        f"study {self.name!r}: {self._shown} {fault.means}{waited} ({line}); {fault.remedy}, "
                        "then give the same command again: what is stored stays, and it goes on from there."
                    ) from error
                if began is None:
                    began = now
                    self._say(
                        f"the database {fault.means} ({line}); results are kept and written when it is back, "
                        f"trying for {self._patience:g} s."
                    )
            # Not in step with the other workers, which lost it at the same moment.
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE)
        if began is not None:
            self._say(f"the database is back after {time.monotonic() - began:.0f} s.")
        return result

    def _is_gone(self) -> bool:
        try:
            return self._storage.get_study_id_from_name(self.name) != self._study_id
        except KeyError:
            return True
        except Exception:
            return False

    def _trials(self, states: Container[TrialState] | None = None) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=states)

    def _fail(self, trial_id: int) -> None:
        # Somebody was first.
        with contextlib.suppress(UpdateFinishedTrialError):
            self._storage.set_trial_state_values(trial_id, TrialState.FAIL)

    def _trial_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)

    # ---- signs of life

    def _beat(self) -> None:
        pause = self._heartbeat
        while not self._stop.wait(pause):
            pause = self._heartbeat
            for trial_id in self._beating:
                try:
                    self._sign(trial_id)
                except Exception:
                    # Whatever it was, the thread must not end: the trials would be taken away. The worker
                    # itself tells the user when it needs the database.
                    self._unsettled = time.monotonic()
                    pause = min(self._heartbeat, LONGEST_PAUSE)
                    break
        if isinstance(self._storage, RDBStorage):
            self._storage.remove_session()

    def _sign(self, trial_id: int) -> None:
        record = getattr(self._storage, "record_heartbeat", None)
        if record is not None:
            record(trial_id)

    def _hold(self, held: _Held) -> None:
        self._held[held.trial.number] = held
        self._beating = tuple(each.trial_id for each in self._held.values())
        # Only a database keeps them; an in-memory storage dies with its worker.
        if self._thread is None and hasattr(self._storage, "record_heartbeat"):
            self._stop.clear()
            self._thread = threading.Thread(target=self._beat, name=f"heartbeat of {self.name}", daemon=True)
            self._thread.start()

    def _drop(self, number: int) -> None:
        self._held.pop(number, None)
        self._beating = tuple(each.trial_id for each in self._held.values())

    def _mine(self, claim: Claim) -> _Held:
        if claim.number not in self._held:
            raise ConfigError(
                f"claim: expected a trial that this worker claimed and has not finished, got {claim.number}."
            )
        return self._held[claim.number]

    def _say_taken(self, number: int, held: _Held) -> None:
        if not held.taken:
            held.taken = True
            self._say(
                f"trial {number} was taken away, since there was no sign of life from this worker for "
                f"{self._grace:g} s; it is run again, and this result is dropped."
            )

    def _sweep_is_due(self) -> bool:
        """Whether it is fair and useful to look for dead workers now.

        When a database was away for long, all workers look dead. Those alive try to reach it every few
        seconds: give them the time.
        """
        now = time.monotonic()
        settled = now - self._unsettled >= min(self._grace, 2 * (LONGEST_PAUSE + CONNECT_TIMEOUT))
        return settled and now - self._swept >= self._heartbeat / 2

    # ---- one worker at a time
    #
    # The lock is a study of its own: of all that try to create it, one succeeds. That is public API and the
    # same on every storage. It is safe without being a perfect lock: a worker that was taken for dead finds,
    # before it runs anything, that the lock no longer carries its token, and settles its claims anew. Two
    # workers whose check succeeds held the lock one after the other: the second counted the first's trials.

    def _lock(self) -> tuple[int, str] | None:
        """The id and the token of the lock."""
        try:
            study_id = self._storage.get_study_id_from_name(self.name + _CLAIMING)
            return study_id, self._storage.get_study_user_attrs(study_id).get(_OWNER, "")
        except KeyError:
            return None

    def _acquire(self, token: str) -> int:
        while True:
            lock = self._lock()
            if lock is None:
                try:
                    made = self._storage.create_new_study([StudyDirection.MINIMIZE], self.name + _CLAIMING)
                    self._storage.set_study_user_attr(made, _OWNER, token)
                    self._seen = None, 0.0
                    return made
                except (DuplicatedStudyError, KeyError):
                    # Another was first, or took this one for dead at once.
                    pass
            elif lock[1] == token:
                # This worker's, from before it lost the connection.
                return lock[0]
            elif lock != self._seen[0]:
                # SQLite gives the same id again and again: the token tells one holder from the next.
                self._seen = lock, time.monotonic()
            elif time.monotonic() - self._seen[1] > self._claiming_grace:
                self._delete_lock(lock[0])
            time.sleep(random.uniform(0.02, 0.2))

    def _delete_lock(self, study_id: int) -> None:
        try:
            self._storage.delete_study(study_id)
        except KeyError:
            pass
        except StorageInternalError as error:
            # Two workers that delete the same one.
            if may_pass(database_error(error) or error):
                raise

    def _alone(self, token: str, operation: Callable[[], object]) -> bool:
        """Does something while no other worker does; False if another took this one for dead meanwhile.

        With the token of an attempt that lost its connection, it goes on with the lock of that attempt.
        """
        mine = (self._acquire(token), token)
        try:
            operation()
        except BaseException as error:
            inner = database_error(error)
            if inner is None or not may_pass(inner):
                with contextlib.suppress(Exception):
                    if self._lock() == mine:
                        self._delete_lock(mine[0])
            raise
        kept = self._lock() == mine
        if kept:
            self._delete_lock(mine[0])
        return kept

    # ---- claiming

    def _limit(self, trials: Sequence[FrozenTrial], total: int) -> int:
        if self._axes is None:
            return total
        # What the user enqueued beside the grid does not take the place of a cell.
        beside = sum(trial.state != TrialState.FAIL and self._cell(trial) is None for trial in trials)
        return min(total, math.prod(map(len, self._axes)) + beside)

    def _claimable(self, trials: Sequence[FrozenTrial], total: int) -> int:
        live = sum(trial.state != TrialState.FAIL for trial in trials)
        waiting = sum(trial.state == TrialState.WAITING for trial in trials)
        return self._limit(trials, total) - live + waiting

    def _claim(self, total: int, at_most: int, taken: dict[int, dict[str, Any]]) -> None:
        """Fills `taken`; what is there already is of an earlier attempt, and may not be ours any more."""
        if self._sweep_is_due():
            optuna.storages.fail_stale_trials(self._study)
            self._swept = time.monotonic()
        trials = self._without_surplus(total, taken)
        want = min(at_most - len(taken), self._claimable(trials, total))
        if self._add(trials, want - sum(trial.state == TrialState.WAITING for trial in trials)):
            trials = self._without_surplus(total, taken)
        waiting = [trial for trial in trials if trial.state == TrialState.WAITING]
        for head in waiting[: max(0, want)]:
            if not self._take(head, taken):
                break

    def _without_surplus(self, total: int, taken: dict[int, dict[str, Any]]) -> list[FrozenTrial]:
        """All trials; fails and leaves out what must not be run."""
        trials = self._trials()
        live = [trial for trial in trials if trial.state != TrialState.FAIL]
        # Twice the same: Optuna stores a new trial again if the connection was lost before the database
        # answered; and another worker may have taken what we took while we had lost the lock.
        live.sort(key=lambda trial: (trial.state == TrialState.WAITING, trial.number in taken, trial.number))
        seen: set[tuple[str, int]] = set()
        surplus = []
        for trial in live:
            if _identity(trial) in seen and (trial.number in taken or trial.state == TrialState.WAITING):
                surplus.append(trial.number)
            seen.add(_identity(trial))
        # Too many, taken while we had lost the lock.
        over = len(live) - len(surplus) - self._limit(live, total)
        kept = [number for number in taken if number not in surplus]
        surplus += kept[max(0, len(kept) - max(0, over)) :]
        for number in surplus:
            self._fail(self._trial_id(number))
            taken.pop(number, None)
            self._drop(number)
        return [trial for trial in trials if trial.number not in surplus]

    def _add(self, trials: Sequence[FrozenTrial], count: int) -> bool:
        """Queues new trials: the first that the study does not have. False if there is nothing to add."""
        live = [trial for trial in trials if trial.state != TrialState.FAIL]
        if self._axes is not None:
            there = {cell for trial in live if (cell := self._cell(trial)) is not None}
        else:
            there = {trial.system_attrs[_SLOT] for trial in live if _SLOT in trial.system_attrs}
        slots = (slot for slot in itertools.count() if slot not in there)
        for slot in itertools.islice(slots, max(0, count)):
            params = self._drawn(slot)
            # In one transaction, so that a worker killed here leaves a whole trial or none.
            self._study.add_trial(
                optuna.create_trial(
                    state=TrialState.WAITING,
                    params=params,
                    distributions={name: self._space[name] for name in params},
                    system_attrs={_SLOT: slot},
                )
            )
        return count > 0

    def _drawn(self, slot: int) -> dict[str, Any]:
        """The hyperparameters of a new trial; none if the sampler wants to see the study first."""
        if self._axes is not None:
            params: dict[str, Any] = {}
            for name, axis in reversed(list(zip(self._space, self._axes, strict=True))):
                slot, at = divmod(slot, len(axis))
                params[name] = axis[at]
            return {name: params[name] for name in self._space}
        if self._sampler == "random":
            alone = optuna.create_study(sampler=RandomSampler(seed=seed_of(self._seed, slot)))
            return alone.ask(self._space).params
        return {}

    def _cell(self, trial: FrozenTrial) -> int | None:
        """The place of a trial in the grid; None if it is beside it."""
        assert self._axes is not None
        params = _params(trial)
        cell = 0
        for name, axis in zip(self._space, self._axes, strict=True):
            at = [index for index, value in enumerate(axis) if value == params.get(name, _NOTHING)]
            if not at:
                return None
            cell = cell * len(axis) + at[0]
        return cell

    def _take(self, head: FrozenTrial, taken: dict[int, dict[str, Any]]) -> bool:
        """Takes the first trial of the queue; False if another worker was quicker."""
        trial_id = self._trial_id(head.number)
        for name, value in head.system_attrs.get("fixed_params", {}).items():
            try:
                if name in self._space:
                    self._space[name].to_internal_repr(value)
            except ValueError:
                self._say(f"trial {head.number} is dropped: its {name} = {value!r} is not in the space.")
                self._fail(trial_id)
                return True
        # Before it runs: a worker killed in between must leave a trial that can be found to be dead.
        self._sign(trial_id)
        self._set_sampler(head.number)
        trial = self._study.ask(self._space)
        if trial.number != head.number:
            # A worker of plain Optuna took it, or one that holds the lock by now. What Optuna gave instead
            # was not counted: back with it, if it was queued at all.
            self._fail(self._trial_id(trial.number))
            instead = self._storage.get_trial(self._trial_id(trial.number))
            if instead.system_attrs:
                _run_again(self._study, instead)
            return False
        self._hold(_Held(trial, trial_id))
        taken[trial.number] = {name: trial.params[name] for name in self._space}
        return True

    def _set_sampler(self, number: int) -> None:
        if isinstance(self._sampler, BaseSampler):
            return
        seed = seed_of(self._seed, number)
        if self._sampler in ("random", "grid"):
            # For what a trial that the user enqueued leaves open.
            self._study.sampler = RandomSampler(seed=seed)
        else:
            cls = samplers()[self._sampler]
            if self._sampler == "qmc":
                # One sequence for all workers, except where the sampler does not follow it.
                sampler = cls(seed=seed_of(self._seed, 0), independent_sampler=RandomSampler(seed=seed))
            else:
                sampler = cls(seed=seed)
            self._study.sampler = self._sampler = sampler

    # ---- what a study is begun with

    def _settle(self, given: dict[str, Any], notes: dict[str, Any]) -> None:
        """Stores the settings, or compares them with the stored ones."""

        def stored() -> dict[str, Any] | None:
            return self._study.user_attrs.get(_SETTINGS)

        def store() -> None:
            if stored() is None:
                self._study.set_user_attr(_NOTES, notes)
                self._study.set_user_attr(_SETTINGS, given)

        if self._persist(stored) is None:
            # Alone: of two workers with different settings, one must notice.
            token = uuid.uuid4().hex
            self._persist(lambda: self._alone(token, store))
        there = self._persist(stored) or {}
        for key in [*there, *(key for key in given if key not in there)]:
            old, new = (json.dumps(each[key]) if key in each else "nothing" for each in (there, given))
            if old != new:
                raise ConfigError(
                    f"{key}: expected {old}, with which study {self.name!r} was begun, got {new}; "
                    "take another study name, or that setting."
                )
        self._settings = there

    def _check_space(self) -> None:
        """That stored trials can be compared with new ones."""
        first: dict[str, BaseDistribution] = {}
        for trial in reversed(self._persist(self._trials)):
            first |= trial.distributions
        for name, new in self._space.items():
            old = first.get(name, new)
            try:
                optuna.distributions.check_distribution_compatibility(old, new)
            except ValueError:
                raise ConfigError(
                    f"{name}: expected {old}, with which study {self.name!r} was begun, got {new}; "
                    "take another study name, or that space."
                ) from None


_NOTHING: Final = object()


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not name.strip() or len(name) > 400 or name.endswith(_CLAIMING):
        raise ConfigError(
            f"study: expected a name of 1 to 400 characters that does not end in {_CLAIMING!r}, got {name!r}."
        )


def _as_json(values: Mapping[str, Any], what: str = "settings") -> dict[str, Any]:
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
