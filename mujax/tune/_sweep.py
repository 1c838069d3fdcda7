"""`sweep`: a search for hyperparameters that runs many trials at a time, stored in a study to be shared.

Trials and seeds that share shapes are lanes of one program (`mujax.train`). What was tried and what came out
is in an Optuna study (`mujax.tune.study`), where any number of workers, on any number of machines, take
trials from.

Reference:
    Yang et al., Tensor Programs V, arXiv 2203.03466, Section 7 and Appendix F: random search on the proxy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from mujax.errors import ConfigError, MujaxError
from mujax.train import MODES, CompiledRuns, FunctionJob, Job, Metrics, Mode, run_lanes
from mujax.tune._user_code import said

if TYPE_CHECKING:
    from mujax.tune.study import Lease, Record, SharedStudy

Run = Callable[[dict[str, Any], Key[Array, ""]], Mapping[str, Any]]
"""(hyperparameters, key) -> metrics, scalars by name: a pure function that can be traced."""

RUNGS: Final = 10
"""Looks at a run before its end: where it is found to have diverged, and may be pruned."""

_LANES: Final = {"cpu": 16}
_LANES_ELSE: Final = 128
_POLL: Final = 2.0


@dataclasses.dataclass(frozen=True)
class Trial:
    """A trial that is finished.

    Attributes:
        number: of the trial in its study.
        hparams: what was tuned in it.
        loss: the objective, the mean over seeds; None where a seed diverged.
        pruned: given up at a rung; `loss` is what it was there.
        metrics: all scalar metrics, the mean over seeds.
        flops: operations spent on it, by the compiled program; None where they can't be told.
        rungs: steps -> objective there, the mean over seeds.
        curve: loss of every step, the mean over seeds, of a trial that this worker has run to its end.
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
        """Whether it has no loss, since it diverged."""
        return self.loss is None


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a study holds.

    Attributes:
        study: its name; None for one that is not stored.
        trials: all finished trials, by number, whichever worker ran them.
        objective: the metric that was minimised.
        seeds: runs of each trial.
        settings: what the study was started with.
        seconds: how long this call took.
        compile_seconds: what compiling took of that.
        modes: trials that this call has run in each mode.
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
        """The trial of the lowest loss that was neither pruned nor diverged; None where there is none."""
        whole = [trial for trial in self.trials if trial.loss is not None and not trial.pruned]
        return min(whole, key=lambda trial: trial.loss or 0.0, default=None)

    @property
    def flops(self) -> float | None:
        """Operations of all trials; None where those of one can't be told."""
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
            lines.append("No trial has come to its end: try lower learning rates.")
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
    """How far a study is.

    Attributes:
        done: trials finished by anybody.
        total: trials that there will be.
        share: of this batch's steps that are taken, from 0 to 1.
        running: trials that this worker runs.
        best: lowest loss so far; None for none yet.
        doing: what goes on, for a person to read.
    """

    done: int
    total: int
    share: float
    running: int
    best: float | None
    doing: str

    @property
    def work_done(self) -> float:
        """From 0 to 1."""
        return min(1.0, (self.done + self.share * self.running) / max(self.total, 1))


def sweep(
    run: Run | Job,
    space: Mapping[str, Any],
    *,
    trials: int,
    seeds: int = 1,
    seed: int = 0,
    fixed: Mapping[str, Any] | None = None,
    objective: str = "loss",
    study: str | None = None,
    storage: str | pathlib.Path | None = None,
    sampler: Any = "random",
    pruner: Any = None,
    rungs: int = RUNGS,
    mode: Mode | None = None,
    lanes: int | None = None,
    devices: Sequence[Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    notes: Mapping[str, Any] | None = None,
    heartbeat: float = 60.0,
    patience: float = 300.0,
    progress: Callable[[SweepProgress], None] | None = None,
    finished: Callable[[Trial], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Sweep:
    """Searches for hyperparameters, many trials at a time, and stores all of them in a study.

    Hyperparameters that are floats are traced: trials that differ in nothing else share one program, as do
    their seeds. The others (whole numbers, names, and what the job itself needs as Python values) are part of
    the shapes: each combination of them is compiled once.

    On an accelerator the trials of a batch are vmapped. On a CPU they are looped over by as many threads as
    there are cores, mapped, or vmapped: each way is measured once where that is worth compiling it, and the
    fastest kept. Several local devices share the lanes. A batch that does not fit into memory is halved.

    Args:
        run: `(hparams, key) -> metrics`, pure and traceable, or a job such as `mujax.training_run` returns,
            which can be given up at a rung.
        space: hyperparameter -> `[value, ...]`, `{"low": ..., "high": ..., "log": True}`, or one of
            `optuna.distributions`.
        trials: how many the study is to hold, over all its workers: a study that has as many is done.
        seeds: runs of each trial; the objective is their mean.
        seed: the first of them, and what a sampler begins with.
        fixed: hyperparameters that are not tuned.
        objective: the metric to minimise.
        study: a name to store it under; None keeps it in memory.
        storage: a database URL, or the path of an SQLite file; `mujax.db` by default.
        sampler: `"random"`, `"grid"`, `"tpe"`, any other of Optuna's by name, or a sampler of its.
        pruner: `"asha"`, `"hyperband"`, `"median"`, any other of Optuna's, or None.
        rungs: looks at a run before its end.
        mode: `"loop"`, `"map"` or `"vmap"`; None finds out.
        lanes: runs at a time, seeds counted; by default 16 on a CPU and 128 elsewhere.
        devices: where to run; None for all local devices.
        settings: what else the runs depend on, to be stored: a study resumes only if these are unchanged.
        notes: what else to store with a study that is started.
        heartbeat: seconds between the signs of life of a worker; one that has given none for three times as
            long is taken for dead and its trials are run by another.
        patience: seconds for which to wait for a database that can't be reached.
        progress: called at each rung.
        finished: called with each trial that this worker has finished.
        say: called with a sentence about what a person should know (a lost connection).

    Raises:
        ConfigError: arguments that make no sense, or a study with other settings.
        StudyError: a database that can't be used.
        MujaxError: `run` raised; its trials are put back.

    Example:
        >>> def run(hparams, key):
        ...     return {"loss": (hparams["x"] - 1) ** 2}
        >>> sweep(run, {"x": [0.0, 1.0, 2.0]}, trials=3, sampler="grid").best.hparams
        {'x': 1.0}

    Reference:
        Yang et al., Tensor Programs V, arXiv 2203.03466, Algorithm 1.
    """
    studies = study_module()
    for name, value in (("trials", trials), ("seeds", seeds), ("rungs", rungs), ("lanes", lanes)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}: expected at least 1, got {value}.")
    if mode is not None and mode not in MODES:
        raise ConfigError(f"mode: expected one of {', '.join(map(repr, MODES))} or None, got {mode!r}.")
    job: Any = run if hasattr(type(run), "advance") else FunctionJob(run)  # pyright: ignore[reportArgumentType]
    given = dict(fixed or {})
    if both := sorted(set(given) & set(space)):
        raise ConfigError(f"{both[0]}: expected it in the space or fixed, found it in both.")
    parsed = studies.distributions(space)
    job.check({**given, **{name: _first(values) for name, values in parsed.items()}})
    floats = {name for name, values in parsed.items() if _is_traced(values) and name not in job.static}
    floats |= {name for name, value in given.items() if isinstance(value, float) and name not in job.static}
    devices = list(devices or jax.local_devices())
    at_once = lanes or _LANES.get(devices[0].platform, _LANES_ELSE)
    worker = _Worker(job, given, floats, objective, seeds, seed, rungs, mode, devices)
    begun = time.perf_counter()
    started_with = {
        "seeds": seeds,
        "seed": seed,
        "objective": objective,
        "fixed": given,
        # Workers that searched differently would not share one search.
        "sampler": sampler if isinstance(sampler, str) else type(sampler).__name__,
        **(settings or {}),
    }
    opened = studies.SharedStudy.open(
        study or "sweep",
        parsed,
        storage=studies.in_memory() if study is None and storage is None else storage,
        sampler=sampler,
        pruner=pruner,
        seed=seed,
        settings=started_with,
        attributes=notes,
        heartbeat=heartbeat,
        patience=patience,
        say=say,
    )
    with opened as shared:
        show = _Show(shared, trials, progress)
        while True:
            leases = shared.lease(trials, max(1, at_once // seeds))
            if leases:
                with _put_back(shared, leases):
                    worker.run(shared, leases, show, finished, trials)
                continue
            if not shared.pending(trials):
                break
            show(0.0, 0, "waiting for other workers")
            time.sleep(min(_POLL, heartbeat))
        show.count()
        show(0.0, 0, "done")
        return Sweep(
            study=study,
            trials=read_trials(shared),
            objective=objective,
            seeds=seeds,
            settings=dict(shared.settings),
            seconds=time.perf_counter() - begun,
            compile_seconds=worker.compile_seconds,
            modes=worker.modes,
        )


def _first(distribution: Any) -> Any:
    """Some value of it."""
    choices = getattr(distribution, "choices", None)
    return distribution.low if choices is None else choices[0]


def _is_traced(distribution: Any) -> bool:
    """Whether all values are numbers, and not all whole ones."""
    values = getattr(distribution, "choices", None) or (distribution.low, distribution.high)
    kinds = {type(value) for value in values}
    return float in kinds and kinds <= {int, float}


def study_module() -> Any:
    """`mujax.tune.study`, which needs Optuna: imported where it is used, so that the rest does without.

    Raises:
        ConfigError: Optuna is not installed.
    """
    try:
        return importlib.import_module("mujax.tune.study")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"sweep: expected the package {error.name} to store trials with, found it is not installed; "
            'pip install "mujax-mup[cli]".'
        ) from error


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


class _Show:
    """Tells how far the study is, and keeps the counts that change with finished trials only."""

    def __init__(
        self, shared: SharedStudy, total: int, progress: Callable[[SweepProgress], None] | None
    ) -> None:
        self._shared, self._total, self._progress = shared, total, progress
        self._done, self._best = 0, None
        self.count()

    def count(self) -> None:
        """Looks at the study anew."""
        if self._progress is None:
            return
        records = read_trials(self._shared)
        self._done = len(records)
        losses = [trial.loss for trial in records if trial.loss is not None and not trial.pruned]
        self._best = min(losses, default=None)

    def __call__(self, share: float, running: int, doing: str) -> None:
        """Shows this worker's batch, too."""
        if self._progress is not None:
            self._progress(SweepProgress(self._done, self._total, share, running, self._best, doing))


@contextlib.contextmanager
def _put_back(shared: SharedStudy, leases: list[Lease]) -> Iterator[None]:
    """Whatever happens to a batch, the trials of it that are not finished will be run by somebody.

    Args:
        shared: the study.
        leases: the batch; those that are finished are taken out of it.
    """
    try:
        yield
    except BaseException as error:
        why = said(error)
        with contextlib.suppress(MujaxError):
            shared.release(leases, why)
        if isinstance(error, MujaxError) or not isinstance(error, Exception):
            raise
        hparams = leases[0].params if leases else {}
        raise MujaxError(
            f"run: expected it to run with {hparams}, got {why}; its {len(leases)} trials are put back, and "
            "what was finished before is stored."
        ) from error


class _Worker:
    """Runs batches of trials: finds out which share a program, and keeps the programs."""

    def __init__(
        self,
        job: Job,
        fixed: Mapping[str, Any],
        floats: set[str],
        objective: str,
        seeds: int,
        seed: int,
        rungs: int,
        mode: Mode | None,
        devices: Sequence[Any],
    ) -> None:
        self._job, self._fixed, self._floats, self._objective = job, fixed, floats, objective
        self._seeds, self._seed, self._rungs = seeds, seed, rungs
        self._mode: Mode | None = mode
        self._devices = devices
        self._keys = [jax.random.key(number) for number in range(seed, seed + seeds)]
        self._groups: dict[Any, CompiledRuns] = {}
        self.modes: dict[str, int] = {}

    @property
    def compile_seconds(self) -> float:
        """What compiling has taken so far."""
        return sum(group.compile_seconds for group in self._groups.values())

    def run(
        self,
        shared: SharedStudy,
        leases: list[Lease],
        show: _Show,
        finished: Callable[[Trial], None] | None,
        total: int,
    ) -> None:
        """Runs trials and stores them; what is finished leaves the list."""
        groups: dict[Any, tuple[CompiledRuns, list[Lease]]] = {}
        for lease in leases:
            key, group = self._group(lease)
            groups.setdefault(key, (group, []))[1].append(lease)
        for group, members in groups.values():
            left = max(shared.pending(total), len(members)) * self._seeds * group.steps
            for lease, trial, attrs in self._batch(shared, group, members, show, left):
                state = "pruned" if trial.pruned else "complete"
                if shared.finish(lease, trial.loss, attrs, state=state) and finished is not None:
                    finished(trial)
                leases.remove(lease)
            show.count()

    def _group(self, lease: Lease) -> tuple[Any, CompiledRuns]:
        hparams = {**self._fixed, **lease.params}
        static = {name: value for name, value in hparams.items() if name not in self._floats}
        key = tuple(sorted(static.items()))
        if key not in self._groups:
            self._groups[key] = CompiledRuns(self._job, static, mode=self._mode, devices=self._devices)
        return key, self._groups[key]

    def _batch(
        self, shared: SharedStudy, group: CompiledRuns, leases: Sequence[Lease], show: _Show, left: int
    ) -> list[tuple[Lease, Trial, dict[str, Any]]]:
        seeds, begun = self._seeds, time.perf_counter()
        hparams = [{**self._fixed, **lease.params} for lease in leases]
        traced = {
            name: np.repeat([float(values[name]) for values in hparams], seeds)
            for name in sorted(self._floats & set(hparams[0]))
        }
        keys = jnp.stack(self._keys * len(leases))
        rungs: list[dict[int, float]] = [{} for _ in leases]
        pruned: set[int] = set()
        running = (
            f"trials {leases[0].number} to {leases[-1].number}" if leases[1:] else f"trial {leases[0].number}"
        )
        show(0.0, len(leases), running)

        def watch(steps: int, metrics: Mapping[int, Metrics]) -> list[int]:
            gone: list[int] = []
            for place, lease in enumerate(leases):
                mine = [lane for lane in range(place * seeds, (place + 1) * seeds) if lane in metrics]
                if not mine:
                    continue
                value = self._mean([metrics[lane] for lane in mine])
                if value is None:
                    gone += mine
                elif steps not in rungs[place]:
                    rungs[place][steps] = value
                    if steps < group.steps and shared.report(lease, steps, value):
                        pruned.add(place)
                        gone += mine
            show(steps / group.steps, len(leases), running)
            return gone

        stops = [round(group.steps * rung / self._rungs) for rung in range(1, self._rungs)]
        found = run_lanes(group, traced, keys, rungs=stops, watch=watch, left=left)
        seconds = (time.perf_counter() - begun) / len(leases)
        mode = group.last_mode
        self.modes[mode] = self.modes.get(mode, 0) + len(leases)
        out = []
        for place, lease in enumerate(leases):
            mine = found[place * seeds : (place + 1) * seeds]
            ended = max(rungs[place], default=0)
            # Where it diverged, the rung at which that was seen is the one after.
            taken = (
                ended
                if place in pruned
                else min((stop for stop in stops if stop > ended), default=group.steps)
            )
            flops = None if group.flops is None else group.flops * seeds * taken / group.steps
            trial = self._trial(lease, mine, rungs[place], place in pruned, flops)
            attrs = {
                "hparams": {**self._fixed, **lease.params},
                "metrics": {name: value for name, value in trial.metrics.items() if math.isfinite(value)},
                "seed": self._seed,
                "seeds": seeds,
                "flops": flops,
                "seconds": seconds,
                "mode": mode,
                "steps": group.steps,
            }
            out.append((lease, trial, attrs))
        return out

    def _mean(self, lanes: Sequence[Metrics]) -> float | None:
        """The objective, or the loss at a rung that does not know it; None where a seed diverged."""
        values = []
        for metrics in lanes:
            name = self._objective if self._objective in metrics else "loss"
            if name not in metrics:
                raise ConfigError(
                    f"run: expected the metric {self._objective!r} to minimise, got {sorted(metrics)}; "
                    "return it, or name another with objective=."
                )
            if np.shape(metrics[name]) != ():
                raise ConfigError(
                    f"run: expected a scalar {name!r}, got an array of shape {np.shape(metrics[name])}."
                )
            values.append(float(metrics[name]))
        is_fine = all(math.isfinite(value) for value in values)
        if not is_fine or any(bool(metrics.get("diverged", False)) for metrics in lanes):
            return None
        return statistics.fmean(values)

    def _trial(
        self,
        lease: Lease,
        lanes: Sequence[Metrics],
        rungs: Mapping[int, float],
        is_pruned: bool,
        flops: float | None,
    ) -> Trial:
        scalars = {
            name: statistics.fmean(float(metrics[name]) for metrics in lanes)
            for name, first in lanes[0].items()
            if np.shape(first) == () and all(name in metrics for metrics in lanes) and name != "diverged"
        }
        loss = self._mean(lanes)
        curves = [metrics["curve"] for metrics in lanes if "curve" in metrics]
        return Trial(
            number=lease.number,
            hparams=dict(lease.params),
            loss=loss,
            pruned=is_pruned and loss is not None,
            metrics=scalars,
            flops=flops,
            rungs=dict(rungs),
            curve=np.mean(curves, axis=0) if len(curves) == len(lanes) else None,
        )
