"""Random searches on a proxy and trainings with what they find: what F5 to F8 share."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

import mujax
from benchmarks.paper._figure import Row
from benchmarks.paper._results import Progress, Results
from mujax.errors import DataError
from mujax.train import CompiledRuns, Training, run_lanes, threads
from mujax.tune import Front, SweepProgress, front

Apply = Callable[..., Any]
"""Inputs of a batch -> the trained model's outputs."""


@dataclasses.dataclass
class Scored(Training):
    """A training that also measures more on the held-out data than the mean loss.

    Attributes:
        score: (the trained model, held-out batches) -> scalars by name.
    """

    score: Callable[[Apply, Any], Mapping[str, Any]] | None = None

    def finish(self, hparams: Mapping[str, Any], state: Any, data: Any, /) -> Mapping[str, Any]:
        """The training's own metrics and the scores."""
        assert self.score is not None
        metrics = super().finish(hparams, state, data)
        mults = {
            name: hparams[name] for name in ("output_mult", "attention_mult", "input_mult") if name in hparams
        }
        mup, train = self.built(hparams).mup, state["train"]
        replay = (mup.with_multipliers(**mults) if mults else mup).replay

        def apply(*inputs: Any) -> Any:
            return replay.apply(train.params, train.model_state, inputs, key=train.key)[0]

        return {**metrics, **self.score(apply, data[1])}


def scored(training: Training, score: Callable[[Apply, Any], Mapping[str, Any]]) -> Scored:
    """The training with further scores of the trained model."""
    fields = {field.name: getattr(training, field.name) for field in dataclasses.fields(training)}
    return Scored(**fields, score=score)


def held_out(arrays: Sequence[Any], *, batch: int, batches: int) -> list[tuple[Any, ...]]:
    """Held-out examples in whole batches: as many as are asked for, or as there are.

    Args:
        arrays: of examples along the first axis.
        batch: examples.
        batches: at most.

    Raises:
        DataError: there is not one batch.

    >>> held_out(([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]), batch=2, batches=3)
    [([1, 2], [6, 7]), ([3, 4], [8, 9])]
    """
    have = len(arrays[0])
    if have < batch:
        raise DataError(
            where="held-out data",
            expected=f"at least one batch of {batch} examples",
            got=have,
            remedy="give more data",
        )
    starts = range(0, min(have // batch, batches) * batch, batch)
    return [tuple(array[first : first + batch] for array in arrays) for first in starts]


def search(
    results: Results,
    name: str,
    training: Callable[[], Training],
    space: Mapping[str, Any],
    *,
    trials: int,
    seeds: int = 1,
    fixed: Mapping[str, Any] | None = None,
    objective: str = "valid_loss",
) -> None:
    """A random search, stored as one record; what was interrupted is resumed from its study.

    Args:
        results: where it is found or added, as `("search", name)`.
        name: of the search.
        training: makes the run; called only if the search is missing.
        space: as for `mujax.sweep`.
        trials: their number.
        seeds: runs of each trial.
        fixed: hyperparameters that are not tuned.
        objective: the metric to minimise.
    """
    if ("search", name) in results:
        return
    studies = results.path.with_suffix(".db").absolute()
    started, watch = time.perf_counter(), _Watch(name, trials)
    found = mujax.sweep(
        training(),
        space,
        trials=trials,
        seeds=seeds,
        fixed=fixed,
        objective=objective,
        study=mujax.Study(name, f"sqlite:///{studies}", settings=results.settings),
        progress=watch,
    )
    watch.end()
    results.add(
        ("search", name),
        {
            "trials": [
                {
                    "hparams": one.hparams,
                    "loss": one.loss,
                    "flops": one.flops,
                    "metrics": _finite(one.metrics),
                }
                for one in found.trials
            ]
        },
        time.perf_counter() - started,
        found.flops,
    )


class _Watch:
    """Prints the progress of a search."""

    def __init__(self, name: str, trials: int) -> None:
        self._name, self._trials = name, trials
        self._progress: Progress | None = None
        self._last = 0, 0.0

    def __call__(self, now: SweepProgress) -> None:
        if self._progress is None:
            # Trials of an earlier call took no time of this one.
            self._progress = Progress(self._trials, now.done)
            self._progress.work_left = 1 - now.work_done
        else:
            done, work = self._last
            self._progress.step(now.done - done, now.work_done - work, self._name)
        self._last = now.done, now.work_done

    def end(self) -> None:
        if self._progress is not None:
            self._progress.end()


def best(results: Results, name: str) -> dict[str, Any] | None:
    """The hyperparameters of the best trial of a search; None if all diverged."""
    whole = [trial for trial in results["search", name]["trials"] if trial["loss"] is not None]
    return min(whole, key=lambda trial: trial["loss"])["hparams"] if whole else None


def repeat(
    results: Results,
    name: str,
    training: Callable[[], Training],
    hparams: Mapping[str, Any],
    seeds: Sequence[int],
) -> None:
    """Trains with given hyperparameters at each seed, stored as `("trained", name, seed)`.

    Args:
        results: where runs are found and added.
        name: of the runs.
        training: makes them; called only if one is missing.
        hparams: their hyperparameters; those that are not floats are compiled in.
        seeds: of the runs.
    """
    missing = [seed for seed in seeds if ("trained", name, seed) not in results]
    if not missing:
        return
    job = training()
    traced = {
        key: value for key, value in hparams.items() if isinstance(value, float) and key not in job.static
    }
    static = {key: value for key, value in hparams.items() if key not in traced}
    on_cpu = jax.default_backend() == "cpu"
    group = CompiledRuns(job, static, mode="loop" if on_cpu else None)
    at_once = threads() if on_cpu else len(missing)
    progress = Progress(len(seeds), len(seeds) - len(missing))
    progress.work_left = float(len(missing))
    for first in range(0, len(missing), at_once):
        part = missing[first : first + at_once]
        started = time.perf_counter()
        lanes = run_lanes(
            group,
            {key: np.full(len(part), value) for key, value in traced.items()},
            jax.vmap(jax.random.key)(jnp.array(part)),
        )
        seconds = (time.perf_counter() - started) / len(part)
        for seed, metrics in zip(part, lanes, strict=True):
            curve = np.asarray(metrics["curve"])
            finite = _finite({key: value for key, value in metrics.items() if np.ndim(value) == 0})
            lost = bool(metrics["diverged"])
            results.add(
                ("trained", name, seed),
                {
                    "hparams": dict(hparams),
                    "metrics": {} if lost else finite,
                    "diverged": lost,
                    "curve": [
                        float(f"{one.mean():.5g}") for one in np.array_split(curve, min(100, len(curve)))
                    ]
                    if np.isfinite(curve).all()
                    else None,
                },
                seconds,
                group.flops,
            )
        progress.step(len(part), float(len(part)), name)
    progress.end()


def _finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if math.isfinite(float(value))}


# ---- what they are worth --------------------------------------------------------------------------------


def values(results: Results, name: str, seeds: Sequence[int], metric: str) -> list[float] | None:
    """The metric of each seed's run; None if one diverged or was not made."""
    runs = [results.records.get(("trained", name, seed)) for seed in seeds]
    found = [None if run is None else run["metrics"].get(metric) for run in runs]
    known = [value for value in found if value is not None]
    return known if len(known) == len(seeds) else None


def worded(found: Sequence[float] | None) -> str:
    """Mean and standard error, as in a table."""
    if found is None:
        return "diverges"
    error = f" ± {statistics.stdev(found) / math.sqrt(len(found)):.4f}" if len(found) > 1 else ""
    return f"{statistics.fmean(found):.4f}{error}"


def compared(
    claim: str,
    ours: Sequence[float] | None,
    other: Sequence[float] | None,
    *,
    higher: bool = False,
) -> Row:
    """The claim that ours is lower (or higher) than the other, by Welch's interval of the difference.

    Args:
        claim: in words.
        ours: a value for each seed; None where one diverged.
        other: likewise.
        higher: whether more is better.

    >>> compared("a is below b", [1.0, 1.1], [2.0, 2.1]).holds
    True
    """
    measured = f"{worded(ours)} against {worded(other)}"
    if ours is None or other is None:
        return Row(claim, measured, "-", None if ours is other else ours is not None)
    if min(len(ours), len(other)) < 2:
        return Row(claim, measured, "- (one seed)", None)
    low, high = _welch(ours, other)
    least, most = (low, high) if higher else (-high, -low)
    holds = True if least > 0 else False if most < 0 else None
    return Row(claim, measured, f"difference {low:+.4f} to {high:+.4f} (95 %)", holds)


def _welch(ours: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    difference = statistics.fmean(ours) - statistics.fmean(other)
    if statistics.pvariance([*ours]) + statistics.pvariance([*other]) == 0:
        return difference, difference
    found = scipy.stats.ttest_ind(ours, other, equal_var=False).confidence_interval(0.95)
    return float(found.low), float(found.high)


def cost(claim: str, results: Results, search: str, target: str, seed: int, limit: float) -> Row:
    """The claim that a search costs at most a share of one training of the target."""
    spent = sum(trial["flops"] or 0.0 for trial in results["search", search]["trials"])
    once = results["trained", target, seed]["flops"]
    if not spent or not once:
        return Row(claim, "operations not counted", "-", None)
    return Row(
        claim, f"{spent / once:.1%} ({spent:.3g} of {once:.3g} operations)", "exact", spent <= limit * once
    )


def fronts(
    results: Results, searches: Mapping[str, str], worth: Mapping[str, Sequence[float | None]], resamples: int
) -> dict[str, Front]:
    """The front of each search: what its best trial is worth against what the search cost.

    Args:
        results: with all searches.
        searches: title -> name of the search.
        worth: title -> worth of each trial at the target, lower is better.
        resamples: searches of each size.
    """
    found = {}
    for title, name in searches.items():
        trials = results["search", name]["trials"]
        found[title] = front(
            [trial["loss"] for trial in trials],
            [trial["flops"] or 0.0 for trial in trials],
            worth[title],
            resamples=resamples,
        )
    return found
