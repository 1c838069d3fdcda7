"""One worker of a search: leases trials, runs those that share a program together, and stores the results."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from mujax.errors import ConfigError, MujaxError
from mujax.train import CompiledRuns, Job, Metrics, Mode, run_lanes
from mujax.tune._results import SweepProgress, Trial, read_trials
from mujax.tune._user_code import summary_of

if TYPE_CHECKING:
    from mujax.tune.study import Lease, SharedStudy

_LANES: Final = {"cpu": 16}
_LANES_ELSE: Final = 128
_POLL: Final = 2.0


class Reporter:
    """Reports the progress of the study, and counts its finished trials only when these can have changed."""

    def __init__(
        self, shared: SharedStudy, total: int, progress: Callable[[SweepProgress], None] | None
    ) -> None:
        self._shared, self._total, self._progress = shared, total, progress
        self._done, self._best = 0, None
        self.count()

    def count(self) -> None:
        """Counts the study's finished trials again."""
        if self._progress is None:
            return
        records = read_trials(self._shared)
        self._done = len(records)
        losses = [trial.loss for trial in records if trial.loss is not None and not trial.pruned]
        self._best = min(losses, default=None)

    def update(self, share: float, running: int, doing: str) -> None:
        """Reports the progress of this worker's batch."""
        if self._progress is not None:
            self._progress(SweepProgress(self._done, self._total, share, running, self._best, doing))


@contextlib.contextmanager
def _put_back(shared: SharedStudy, leases: list[Lease]) -> Iterator[None]:
    """Puts the unfinished trials of a batch back in the queue if anything is raised.

    Args:
        shared: the study.
        leases: the batch; finished trials are removed from it.
    """
    try:
        yield
    except BaseException as error:
        summary = summary_of(error)
        with contextlib.suppress(MujaxError):
            shared.release(leases, summary)
        if isinstance(error, MujaxError) or not isinstance(error, Exception):
            raise
        raise MujaxError(
            where="run",
            expected=f"it to run with {leases[0].params if leases else {}}",
            got=summary,
            remedy=f"its {len(leases)} trials are put back, and trials finished before are stored",
        ) from error


class Worker:
    """Runs trials of a study; keeps a program for each combination of static hyperparameters.

    Attributes:
        modes: trials that it has run in each mode.
    """

    def __init__(
        self,
        job: Job,
        fixed: Mapping[str, Any],
        floats: set[str],
        objective: str,
        *,
        seeds: int,
        seed: int,
        rungs: int,
        pruned: bool,
        mode: Mode | None,
        lanes: int | None,
    ) -> None:
        """For a search.

        Args:
            job: a run of a trial.
            fixed: hyperparameters that are not tuned.
            floats: names of the hyperparameters that are traced.
            objective: the metric to minimise.
            seeds: runs of each trial.
            seed: the first of them.
            rungs: evaluations of a run, the last one included.
            pruned: whether the study may stop a run at a rung.
            mode: how to run lanes; None measures.
            lanes: runs at a time; None depends on the platform.
        """
        self._job, self._fixed, self._floats, self._objective = job, fixed, floats, objective
        self._seeds, self._seed, self._rungs, self._pruned = seeds, seed, rungs, pruned
        self._mode: Mode | None = mode
        self._devices = jax.local_devices()
        self._lanes = lanes or _LANES.get(self._devices[0].platform, _LANES_ELSE)
        self._keys = [jax.random.key(number) for number in range(seed, seed + seeds)]
        self._groups: dict[Any, CompiledRuns] = {}
        self.modes: dict[str, int] = {}

    @property
    def compile_seconds(self) -> float:
        """Seconds of compilation so far."""
        return sum(group.compile_seconds for group in self._groups.values())

    def work(
        self, shared: SharedStudy, total: int, reporter: Reporter, finished: Callable[[Trial], None] | None
    ) -> None:
        """Runs trials until the study is complete.

        Args:
            shared: the study.
            total: number of trials of a complete study.
            reporter: takes the progress.
            finished: called with each trial that this worker has stored.
        """
        while True:
            leases = shared.lease(total, max(1, self._lanes // self._seeds))
            if leases:
                with _put_back(shared, leases):
                    self._run(shared, leases, reporter, finished, total)
                continue
            if not shared.pending(total):
                return
            reporter.update(0.0, 0, "waiting for other workers")
            time.sleep(min(_POLL, shared.heartbeat))

    def _run(
        self,
        shared: SharedStudy,
        leases: list[Lease],
        reporter: Reporter,
        finished: Callable[[Trial], None] | None,
        total: int,
    ) -> None:
        """Runs trials and stores them; removes the finished ones from the list."""
        groups: dict[Any, tuple[CompiledRuns, list[Lease]]] = {}
        for lease in leases:
            key, group = self._group(lease)
            groups.setdefault(key, (group, []))[1].append(lease)
        for group, members in groups.values():
            left = max(shared.pending(total), len(members)) * self._seeds * group.steps
            for lease, trial, attrs in self._batch(shared, group, members, reporter, left):
                state = "pruned" if trial.pruned else "complete"
                if shared.finish(lease, trial.loss, attrs, state=state) and finished is not None:
                    finished(trial)
                leases.remove(lease)
            reporter.count()

    def _group(self, lease: Lease) -> tuple[Any, CompiledRuns]:
        hparams = {**self._fixed, **lease.params}
        static = {name: value for name, value in hparams.items() if name not in self._floats}
        key = tuple(sorted(static.items()))
        if key not in self._groups:
            self._groups[key] = CompiledRuns(
                self._job,
                static,
                mode=self._mode,
                devices=self._devices,
                lost=None if self._pruned else self._is_lost,
            )
        return key, self._groups[key]

    def _batch(
        self, shared: SharedStudy, group: CompiledRuns, leases: Sequence[Lease], reporter: Reporter, left: int
    ) -> list[tuple[Lease, Trial, dict[str, Any]]]:
        seeds, started = self._seeds, time.perf_counter()
        hparams = [{**self._fixed, **lease.params} for lease in leases]
        traced = {
            name: np.repeat([float(values[name]) for values in hparams], seeds)
            for name in sorted(self._floats & set(hparams[0]))
        }
        keys = jnp.stack(self._keys * len(leases))
        rungs: list[dict[int, float]] = [{} for _ in leases]
        pruned: set[int] = set()
        stopped: set[int] = set()
        running = (
            f"trials {leases[0].number} to {leases[-1].number}" if leases[1:] else f"trial {leases[0].number}"
        )
        reporter.update(0.0, len(leases), running)

        def watch(steps: int, metrics: Mapping[int, Metrics]) -> list[int]:
            gone: list[int] = []
            for place, lease in enumerate(leases):
                mine = [lane for lane in range(place * seeds, (place + 1) * seeds) if lane in metrics]
                if not mine:
                    continue
                value = self._mean([metrics[lane] for lane in mine], at_rung=True)
                if value is None:
                    stopped.add(place)
                elif steps not in rungs[place]:
                    rungs[place][steps] = value
                    if steps < group.steps and shared.report(lease, steps, value):
                        pruned.add(place)
                if place in stopped | pruned:
                    gone += mine
            reporter.update(steps / group.steps, len(leases), running)
            return gone

        stops = [round(group.steps * rung / self._rungs) for rung in range(1, self._rungs)]
        found = run_lanes(group, traced, keys, rungs=stops, watch=watch, left=left)
        seconds = (time.perf_counter() - started) / len(leases)
        mode = group.last_mode
        self.modes[mode] = self.modes.get(mode, 0) + len(leases)
        out = []
        for place, lease in enumerate(leases):
            mine = found[place * seeds : (place + 1) * seeds]
            ended = max(rungs[place], default=0)
            # A run that diverged was stopped at the rung after its last finite one.
            taken = (
                ended
                if place in pruned
                else min((stop for stop in stops if stop > ended), default=group.steps)
            )
            flops = None if group.flops is None else group.flops * seeds * taken / group.steps
            loss = self._mean(mine, at_rung=place in stopped | pruned)
            trial = _trial(lease, mine, loss, rungs[place], place in pruned, flops)
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

    def _value(self, metrics: Metrics, *, at_rung: bool) -> Any:
        """The objective; at a rung the loss, where the objective is measured at the end only."""
        name = self._objective if self._objective in metrics or not at_rung else "loss"
        check_objective(name, {name: np.shape(value) for name, value in metrics.items()})
        return metrics[name]

    def _is_lost(self, metrics: Metrics) -> Bool[Array, ""]:
        """Whether a run diverged before a rung, as `_mean` has it."""
        return ~jnp.isfinite(self._value(metrics, at_rung=True)) | metrics.get("diverged", False)

    def _mean(self, lanes: Sequence[Metrics], *, at_rung: bool) -> float | None:
        """The objective, the mean over lanes; None where one diverged."""
        values = [float(self._value(metrics, at_rung=at_rung)) for metrics in lanes]
        is_fine = all(math.isfinite(value) for value in values)
        if not is_fine or any(bool(metrics.get("diverged", False)) for metrics in lanes):
            return None
        return statistics.fmean(values)


def _trial(
    lease: Lease,
    lanes: Sequence[Metrics],
    loss: float | None,
    rungs: Mapping[int, float],
    is_pruned: bool,
    flops: float | None,
) -> Trial:
    scalars = {
        name: statistics.fmean(float(metrics[name]) for metrics in lanes)
        for name, first in lanes[0].items()
        if np.shape(first) == () and all(name in metrics for metrics in lanes) and name != "diverged"
    }
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


def check_objective(objective: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses an objective that a run does not return as a scalar.

    Args:
        objective: the metric to minimise.
        shapes: the shape of each metric that the run returns.
    """
    if objective not in shapes:
        raise ConfigError(
            where="run",
            expected=f"the metric {objective!r} to minimise",
            got=sorted(shapes),
            remedy="return it, or name another with objective=",
        )
    if shapes[objective] != ():
        raise ConfigError(
            where="run", expected=f"a scalar {objective!r}", got=f"an array of shape {shapes[objective]}"
        )
