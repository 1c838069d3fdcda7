"""The results of a search: trials, the sweep that holds them, and its progress."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mujax.tune.study import Record, SharedStudy


@dataclasses.dataclass(frozen=True)
class Trial:
    """A finished trial.

    Attributes:
        number: of the trial in its study.
        hparams: the values of the tuned hyperparameters.
        loss: the objective, the mean over seeds; None where a seed diverged.
        pruned: stopped at a rung; `loss` is the objective there.
        metrics: all scalar metrics, the mean over seeds.
        flops: operations spent on it, as XLA counts them before it optimises; None if unknown.
        rungs: steps -> objective there, the mean over seeds.
        curve: loss of every step, the mean over seeds; only for a trial that this worker ran to its end.
    """

    number: int
    hparams: dict[str, Any]
    loss: float | None
    pruned: bool = False
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    flops: float | None = None
    rungs: dict[int, float] = dataclasses.field(default_factory=dict)
    curve: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def diverged(self) -> bool:
        """Whether a seed diverged, so that there is no loss."""
        return self.loss is None


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The finished trials of a study.

    Attributes:
        study: its name; None if it is not stored.
        trials: all finished trials, by number, whichever worker ran them.
        objective: the metric that was minimised.
        seeds: runs of each trial.
        settings: those that the study was started with.
        seconds: duration of this call.
        compile_seconds: the part of it spent on compilation.
        modes: trials that this call ran in each mode.
    """

    study: str | None
    trials: tuple[Trial, ...]
    objective: str
    seeds: int
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    compile_seconds: float = 0.0
    modes: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def best(self) -> Trial | None:
        """The trial with the lowest loss that was neither pruned nor diverged, if any."""
        whole = [trial for trial in self.trials if trial.loss is not None and not trial.pruned]
        return min(whole, key=lambda trial: trial.loss or 0.0, default=None)

    @property
    def flops(self) -> float | None:
        """Operations of all trials; None if those of one are unknown."""
        spent = [trial.flops for trial in self.trials]
        known = [flops for flops in spent if flops is not None]
        return sum(known) if len(known) == len(spent) else None

    def to_json(self) -> str:
        """The result as strict JSON text: null, never NaN."""
        return (
            json.dumps(
                {
                    "study": self.study,
                    "objective": self.objective,
                    "seeds": self.seeds,
                    "settings": self.settings,
                    "flops": self.flops,
                    "best": None if self.best is None else _plain(self.best),
                    "trials": [_plain(trial) for trial in self.trials],
                },
                indent=1,
                allow_nan=False,
            )
            + "\n"
        )

    def __str__(self) -> str:
        best = self.best
        diverged = sum(trial.diverged for trial in self.trials)
        pruned = sum(trial.pruned for trial in self.trials)
        name = "" if self.study is None else f" of study {self.study}"
        lines = [f"{len(self.trials)} trials{name}, {diverged} diverged, {pruned} pruned."]
        if best is None:
            lines.append("No trial reached its end: try lower learning rates.")
        else:
            lines.append(f"Best: trial {best.number}, {self.objective} {best.loss:.4f}")
            lines += [f"  {name} = {_shown(value)}" for name, value in best.hparams.items()]
        return "\n".join(lines)


def _plain(trial: Trial) -> dict[str, Any]:
    fields = {field.name: getattr(trial, field.name) for field in dataclasses.fields(trial)}
    del fields["curve"]
    finite = {name: value for name, value in trial.metrics.items() if math.isfinite(value)}
    return {**fields, "metrics": finite}


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclasses.dataclass(frozen=True)
class SweepProgress:
    """The progress of a study.

    Attributes:
        done: trials finished by all workers.
        total: trials that the study is to hold.
        share: of the steps of this worker's batch that are done, from 0 to 1.
        running: trials in this worker's batch.
        best: lowest loss so far; None before the first.
        doing: the present activity in words.
    """

    done: int
    total: int
    share: float
    running: int
    best: float | None
    doing: str

    @property
    def work_done(self) -> float:
        """Share of all trials that is done, from 0 to 1."""
        return min(1.0, (self.done + self.share * self.running) / max(self.total, 1))


def read_trials(shared: SharedStudy) -> tuple[Trial, ...]:
    """The finished trials of a study, by number."""
    return tuple(_trial(record) for record in shared.records() if record.state in ("complete", "pruned"))


def _trial(record: Record) -> Trial:
    return Trial(
        number=record.number,
        hparams=dict(record.params),
        loss=None if record.diverged else record.value,
        pruned=record.state == "pruned",
        metrics=dict(record.attrs.get("metrics", {})),
        flops=record.attrs.get("flops"),
        rungs=dict(record.intermediate),
    )
