"""The trials of a study in their storage: read as entries of the queue, added, started and finished."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Final, Literal

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from mujax.tune.study._queue import Entry, State
from mujax.tune.study._samplers import Sampling

_DIVERGED: Final = "diverged"
_RELEASED: Final = "released"
# Which of the study's trials this is, counted from 0 without retries: a retry inherits it.
_SLOT: Final = "mujax:slot"
# Optuna's own names, by which it finds the history of a retry.
_FIRST: Final = "failed_trial"
_HISTORY: Final = "retry_history"
_ENQUEUED: Final = "fixed_params"

_STATES: Final[Mapping[TrialState, State]] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


@dataclasses.dataclass(frozen=True)
class Record:
    """A stored trial of the study.

    Attributes:
        number: of the trial in the study; a trial that is run again gets a new one.
        params: its hyperparameters, as far as they are drawn.
        value: the measured value: infinite if it diverged, the last reported if it was pruned, else None.
        state: its state; a `"failed"` trial was given up and is run again under another number.
        diverged: it was finished without a finite value.
        attrs: the values stored with it.
        intermediate: the reported values, by step.
    """

    number: int
    params: dict[str, Any]
    value: float | None
    state: State
    diverged: bool
    attrs: dict[str, Any]
    intermediate: dict[int, float]


def entry_of(trial: FrozenTrial) -> Entry:
    """A trial as the queue sees it."""
    known = trial.system_attrs
    return Entry(
        number=trial.number,
        state=_STATES[trial.state],
        params=_params(trial),
        enqueued=known.get(_ENQUEUED, {}),
        slot=known.get(_SLOT),
        first=known.get(_FIRST),
    )


def slot_of(sampling: Sampling, slot: int) -> FrozenTrial:
    """A new trial, to be stored, that fills a slot."""
    params = sampling.drawn(slot)
    return optuna.create_trial(
        state=TrialState.WAITING,
        params=params,
        distributions={name: sampling.space[name] for name in params},
        system_attrs={_SLOT: slot},
    )


def retry_of(trial: FrozenTrial) -> FrozenTrial:
    """A new trial, to be stored, that runs a failed one again with the same hyperparameters."""
    known = trial.system_attrs
    # Not all system attributes: with a pruner's, the new trial would start where the old one stood.
    attrs: dict[str, Any] = {key: known[key] for key in (_SLOT, _ENQUEUED) if key in known}
    attrs[_FIRST] = known.get(_FIRST, trial.number)
    attrs[_HISTORY] = [*known.get(_HISTORY, []), trial.number]
    user_attrs = {key: value for key, value in trial.user_attrs.items() if key not in (_DIVERGED, _RELEASED)}

    def made(system_attrs: dict[str, Any], **fields: Any) -> FrozenTrial:
        return optuna.create_trial(
            state=TrialState.WAITING, user_attrs=user_attrs, system_attrs=system_attrs, **fields
        )

    try:
        return made(attrs, params=trial.params, distributions=trial.distributions)
    except ValueError:
        # A value that the user enqueued and that is outside its distribution.
        return made(attrs | {_ENQUEUED: _params(trial)})


def run_again(study: optuna.Study, trial: FrozenTrial) -> None:
    """Puts a failed trial back in the queue, under a new number."""
    study.add_trial(retry_of(trial))


def _params(trial: FrozenTrial) -> dict[str, Any]:
    """Of a trial that may still be waiting: then they are partly drawn, partly enqueued."""
    return {**trial.system_attrs.get(_ENQUEUED, {}), **trial.params}


def _record_of(trial: FrozenTrial) -> Record:
    return Record(
        number=trial.number,
        params=_params(trial),
        value=trial.value,
        state=_STATES[trial.state],
        diverged=bool(trial.user_attrs.get(_DIVERGED, False)),
        attrs={key: value for key, value in trial.user_attrs.items() if key != _DIVERGED},
        intermediate=dict(trial.intermediate_values),
    )


class Trials:
    """A study's trials, without regard to workers and to a database that is away."""

    def __init__(
        self, study: optuna.Study, study_id: int, storage: BaseStorage, sampling: Sampling | None
    ) -> None:
        """For a study; without a sampling it can be read only."""
        self.sampling = sampling
        self._study = study
        self._study_id = study_id
        self._storage = storage

    # ---- read

    def stored(self) -> list[FrozenTrial]:
        """All trials, by number."""
        return self._study.get_trials(deepcopy=False)

    def entries(self) -> list[Entry]:
        """All trials as the queue sees them, by number."""
        return [entry_of(trial) for trial in self.stored()]

    def records(self) -> list[Record]:
        """All trials as the user sees them, by number."""
        return [_record_of(trial) for trial in self.stored()]

    def id_of(self, number: int) -> int:
        """The id in the storage of a trial."""
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)

    # ---- the queue

    def fail_stale(self) -> None:
        """Fails the trials of dead workers, and puts them back in the queue."""
        optuna.storages.fail_stale_trials(self._study)

    def fail(self, trial_id: int) -> None:
        """Fails a trial, unless it is finished."""
        with contextlib.suppress(UpdateFinishedTrialError):
            self._storage.set_trial_state_values(trial_id, TrialState.FAIL)

    def add(self, slot: int) -> None:
        """Stores the trial of a slot, for some worker to take."""
        assert self.sampling is not None
        # In one transaction, so that a worker killed here leaves a whole trial or none.
        self._study.add_trial(slot_of(self.sampling, slot))

    def start(self, number: int) -> Trial | None:
        """Starts the first waiting trial.

        Args:
            number: the trial that is expected to be the first.

        Returns:
            The trial; None if another worker was quicker.
        """
        assert self.sampling is not None
        self._study.sampler = self.sampling.of(number)
        trial = self._study.ask(dict(self.sampling.space))
        if trial.number == number:
            return trial
        # A worker of plain Optuna took it, or one that holds the lock by now. The trial that Optuna gave
        # instead was not counted: it is put back, if it was queued at all.
        trial_id = self.id_of(trial.number)
        self.fail(trial_id)
        instead = self._storage.get_trial(trial_id)
        if instead.system_attrs:
            run_again(self._study, instead)
        return None

    def release(self, trial_id: int, why: str) -> None:
        """Fails a running trial, with the reason."""
        self._storage.set_trial_user_attr(trial_id, _RELEASED, why)
        self.fail(trial_id)

    def run_again(self, trial_id: int) -> None:
        """Puts a failed trial back in the queue, under a new number."""
        run_again(self._study, self._storage.get_trial(trial_id))

    def entry(self, trial_id: int) -> Entry:
        """A trial as the queue sees it."""
        return entry_of(self._storage.get_trial(trial_id))

    # ---- results

    def finish(
        self,
        trial: Trial,
        trial_id: int,
        value: float | None,
        attrs: Mapping[str, Any],
        state: Literal["complete", "pruned"],
    ) -> bool:
        """Stores the result of a trial; may be repeated.

        Returns:
            False if it has failed: another worker considered this one dead.
        """
        complete = state == "complete"
        diverged = complete and (value is None or not math.isfinite(value))
        result = (math.inf if diverged or value is None else float(value)) if complete else None
        stored = self._storage.get_trial(trial_id)
        try:
            if not stored.state.is_finished():
                flag = {_DIVERGED: diverged} if diverged or _DIVERGED in stored.user_attrs else {}
                for key, attr in {**attrs, **flag}.items():
                    self._storage.set_trial_user_attr(trial_id, key, attr)
                self._study.tell(trial, result, state=TrialState.COMPLETE if complete else TrialState.PRUNED)
                return True
        except (ValueError, RuntimeError, UpdateFinishedTrialError):
            # Optuna's ways to report that the trial was finished since we looked.
            stored = self._storage.get_trial(trial_id)
            if not stored.state.is_finished():
                raise
        # Finished already: by this worker, if the connection was lost before the answer came, since all that
        # others do to a trial of ours is to fail it.
        return stored.state != TrialState.FAIL
