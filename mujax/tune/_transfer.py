"""`transfer`: trains the target once with the best hyperparameters of a study, and reports the savings.

Reference:
    Yang et al., Tensor Programs V, arXiv 2203.03466, Algorithm 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import jax
import numpy as np
from jax.sharding import Mesh

from mujax._arguments import AXES, CALLBACK, COUNT, MESH, NAMED, NONE, PATH, TEXTS, instance, takes
from mujax.check import Progress
from mujax.errors import ConfigError
from mujax.train import CompiledRuns, make_mesh, refuse_untransferable, transfers
from mujax.tune._cost import Front, front
from mujax.tune._results import Sweep, Trial
from mujax.tune._target import (
    CheckpointRules,
    Clock,
    Speed,
    looks,
    other_processes,
    refuse_bad_rules,
    require_same_on_all,
    run_target,
)
from mujax.tune._tune import TuneConfig, read_study
from mujax.tune._width_sweep import Report, TransferConfig, sweep_widths


@dataclasses.dataclass(frozen=True)
class TargetRun:
    """One training of the target.

    Attributes:
        seed: of the run.
        loss: the objective; None where it diverged.
        metrics: all scalars.
        curve: loss of every step that was run.
    """

    seed: int
    loss: float | None
    metrics: dict[str, float]
    curve: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Transferred:
    """The target, trained with the proxy's best.

    Attributes:
        task: model and data.
        study: the source of the hyperparameters.
        width: the target's.
        proxy: the proxy's.
        trial: the study's best trial.
        hparams: the hyperparameters of the target.
        not_transferred: hyperparameters that do not transfer by the paper's Table 1, and the source of their
            values: `"set"` by the user, or `"taken"` from the proxy by `also`.
        objective: the metric.
        runs: one for each seed.
        steps: of each run.
        tuning_flops: operations of all trials of the study; None if they are not known.
        run_flops: operations of one run of the target.
        direct_flops: operations of the same search at the target.
        proxy_front: the best of the search with fewer trials, at the proxy; None if nothing was found or
            operations are not known.
        params: the parameters of the first seed after training, a tree of dicts by path; None where several
            processes hold them, and the last checkpoint has them.
    """

    task: str
    study: str | None
    width: int
    proxy: int
    trial: Trial
    hparams: dict[str, Any]
    not_transferred: dict[str, str]
    objective: str
    runs: tuple[TargetRun, ...]
    steps: int
    tuning_flops: float | None
    run_flops: float | None
    direct_flops: float | None
    proxy_front: Front | None
    params: Any = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def loss(self) -> float | None:
        """The objective, the mean over seeds; None if one diverged."""
        losses = [run.loss for run in self.runs]
        known = [loss for loss in losses if loss is not None]
        return statistics.fmean(known) if len(known) == len(losses) else None

    @property
    def standard_error(self) -> float | None:
        """Of that mean; None with a single seed or where one diverged."""
        losses = [run.loss for run in self.runs if run.loss is not None]
        if len(losses) < max(2, len(self.runs)):
            return None
        return statistics.stdev(losses) / math.sqrt(len(losses))

    @property
    def saved(self) -> float | None:
        """The cost of the same tuning at the target over its cost at the proxy."""
        if not self.tuning_flops or self.direct_flops is None:
            return None
        return self.direct_flops / self.tuning_flops

    def to_json(self) -> str:
        """As strict JSON text: null, never NaN."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["params"], fields["trial"], fields["runs"], fields["proxy_front"]
        runs = [dataclasses.asdict(run) for run in self.runs]
        for run in runs:
            run["curve"] = [loss if math.isfinite(loss) else None for loss in run["curve"]]
            run["metrics"] = {name: value for name, value in run["metrics"].items() if math.isfinite(value)}
        text = {
            **fields,
            "trial": self.trial.number,
            "proxy_loss": self.trial.loss,
            "loss": self.loss,
            "standard_error": self.standard_error,
            "saved": self.saved,
            "runs": runs,
            "proxy_front": None if self.proxy_front is None else dataclasses.asdict(self.proxy_front),
        }
        return json.dumps(text, indent=1, allow_nan=False) + "\n"


@dataclasses.dataclass(frozen=True)
class TargetProgress:
    """The progress of the target's training.

    Attributes:
        seed: of the run under way.
        step: steps taken of it.
        steps: of each run.
        work_done: of all runs, from 0 to 1.
        loss: the latest; None before the first rung.
        speed: the mean so far; None before the second rung.
    """

    seed: int
    step: int
    steps: int
    work_done: float
    loss: float | None
    speed: Speed | None = None


@overload
def transfer(
    config: TransferConfig | None = None, *, progress: Callable[[Progress], None] | None = None
) -> Report: ...


@overload
def transfer(
    config: TuneConfig,
    *,
    width: int | None = None,
    seeds: int = 1,
    steps: int | None = None,
    batch: int | None = None,
    also: Sequence[str] = (),
    fixed: Mapping[str, Any] | None = None,
    mesh: Mesh | Mapping[str, int] | str | None = None,
    accumulate: int = 1,
    checkpoints: CheckpointRules | str | os.PathLike[str] | None = None,
    progress: Callable[[TargetProgress], None] | None = None,
) -> Transferred: ...


@takes(
    config=instance((TransferConfig, TuneConfig), "a TransferConfig or a TuneConfig", "TuneConfig(...)")
    | NONE,
    width=COUNT | NONE,
    seeds=COUNT,
    steps=COUNT | NONE,
    batch=COUNT | NONE,
    also=TEXTS,
    fixed=NAMED | NONE,
    mesh=AXES | MESH | NONE,
    accumulate=COUNT,
    checkpoints=PATH | instance(CheckpointRules, "CheckpointRules", "...") | NONE,
    progress=CALLBACK | NONE,
)
def transfer(
    config: TransferConfig | TuneConfig | None = None,
    *,
    width: int | None = None,
    seeds: int = 1,
    steps: int | None = None,
    batch: int | None = None,
    also: Sequence[str] = (),
    fixed: Mapping[str, Any] | None = None,
    mesh: Mesh | Mapping[str, int] | str | None = None,
    accumulate: int = 1,
    checkpoints: CheckpointRules | str | os.PathLike[str] | None = None,
    progress: Callable[[Any], None] | None = None,
) -> Report | Transferred:
    """Trains the target once with the best hyperparameters of the proxy's study.

    With a `TransferConfig`, or nothing, it shows µTransfer instead: one grid of learning rates at several
    widths in two parametrizations; see `mujax.tune.sweep_widths`.

    Hyperparameters of the optimizer, initial values and multipliers transfer across width. Regularisation
    does not, nor do batch size, steps and depth, which are scales themselves, nor unknown hyperparameters:
    if the study has tuned one of these, `also` or `fixed` must name it.

    Args:
        config: the tuned configuration, with the study's name and storage.
        width: of the target; the task's own by default.
        seeds: number of trainings of the target, which give the standard error.
        steps: of a training; the proxy's by default.
        batch: examples a step; the proxy's by default.
        also: hyperparameters that do not transfer and are to be taken from the proxy all the same.
        fixed: hyperparameters with values of the target's own.
        mesh: over all devices of all processes, each of which calls this alike; as for
            `mujax.train.make_mesh`. None for one device.
        accumulate: parts of each batch whose gradients are computed one after the other.
        checkpoints: where and when the run is saved. A later call with the same arguments goes on from the
            last checkpoint: to the last bit on the same mesh, up to rounding on another.
        progress: called at each rung; with checkpoints after every ten steps.

    Raises:
        CheckpointError: the last checkpoint is damaged, or is of another run.
        PreemptedError: SIGTERM ended the run; it is saved.
        ProcessError: the processes do not fit together, or another one has ended.
        ConfigError: no such study, a study with other settings, or a hyperparameter that does not transfer.
        StudyError: a database that cannot be used.
        MujaxError: as `mup_init` does.

    Reference:
        Yang et al., Tensor Programs V, arXiv 2203.03466, Algorithm 1, Tables 1 and 2.
    """
    if config is None or isinstance(config, TransferConfig):
        return sweep_widths(config, progress=progress)
    return _train_target(
        config,
        width,
        seeds,
        steps,
        batch,
        tuple(also),
        dict(fixed or {}),
        mesh,
        accumulate,
        checkpoints
        if checkpoints is None or isinstance(checkpoints, CheckpointRules)
        else CheckpointRules(checkpoints),
        progress or (lambda _: None),
    )


def _train_target(
    config: TuneConfig,
    width: int | None,
    seeds: int,
    steps: int | None,
    batch: int | None,
    also: tuple[str, ...],
    fixed: dict[str, Any],
    mesh: Mesh | Mapping[str, int] | str | None,
    accumulate: int,
    checkpoints: CheckpointRules | None,
    progress: Callable[[TargetProgress], None],
) -> Transferred:
    target = config.target if width is None else width
    if target is None:
        raise ConfigError(
            where="width",
            expected="the target's width",
            got=repr(target),
            remedy="pass --width, or width=",
        )
    study = read_study(config)
    best = study.best
    if best is None:
        raise ConfigError(
            where="study",
            expected=f"a trial in {config.study_name!r} that reached its end",
            got=f"{len(study.trials)} that did not",
            remedy="run mujax tune with lower learning rates",
        )
    tuned = set(best.hparams)
    for name in also:
        if name not in tuned:
            raise ConfigError(where="also", expected="hyperparameters that the study tuned", got=repr(name))
    refuse_untransferable(best.hparams, (*also, *fixed))
    settled = {name: "set" if name in fixed else "taken" for name in best.hparams if not transfers(name)}
    hparams = {**config.all_fixed, **best.hparams, **fixed}
    job = config.training(target, steps=steps, batch=batch)
    if mesh is not None:
        job = job.on(mesh if isinstance(mesh, Mesh) else make_mesh(mesh), accumulate=accumulate)
    elif accumulate != 1 or jax.process_count() > 1:
        raise ConfigError(
            where="mesh",
            expected="a mesh, for several processes and for accumulate",
            got="none",
            remedy="pass --mesh data=-1, or mesh={'data': -1}",
        )
    floats = {name for name, value in hparams.items() if isinstance(value, float) and name not in job.static}
    static = {name: value for name, value in hparams.items() if name not in floats}
    # A single lane is a loop of one.
    group = CompiledRuns(job, static, mode="loop", devices=jax.local_devices()[:1])
    traced = {name: hparams[name] for name in sorted(floats)}
    refuse_bad_rules(checkpoints, group.steps)
    built = job.built(static)
    about = {"task": config.name, "width": target, "steps": group.steps, "batch": built.batch, **hparams}
    about["accumulate"] = accumulate
    program = built.mup.replay.program if jax.process_count() > 1 else ""
    versions = [importlib.metadata.version(name) for name in ("mujax-mup", "jax", "flax", "optax")]
    require_same_on_all(f"{versions} {about} {seeds} {checkpoints} {program}")
    runs: list[TargetRun] = []
    params: Any = None
    for number, seed in enumerate(range(config.seed, config.seed + seeds)):
        clock = Clock(group, built.batch)

        def look(
            step: int,
            metrics: Mapping[str, Any],
            number: int = number,
            seed: int = seed,
            clock: Clock = clock,
        ) -> bool:
            done = (number + step / group.steps) / seeds
            loss = float(metrics["loss"]) if "loss" in metrics else None
            progress(TargetProgress(seed, step, group.steps, done, loss, clock.at(step)))
            return loss is None or math.isfinite(loss)

        look(0, {})
        rungs = looks(group.steps, config.rungs, checkpoints)
        with contextlib.ExitStack() as stack:
            stack.enter_context(other_processes(checkpoints and checkpoints.folder))
            saved = checkpoints and stack.enter_context(checkpoints.of(seed, built.mup.spec, about))
            state, metrics = run_target(group, traced, jax.random.key(seed), rungs, look, saved)
            runs.append(_target_run(seed, metrics, config.objective))
        if number == 0 and jax.process_count() == 1:
            params = jax.tree.map(np.asarray, state["train"].params)
    run_flops = group.flops
    if run_flops is not None and job.mesh is not None:
        # XLA counts those of one device.
        run_flops *= job.mesh.size
    direct = None
    if run_flops is not None and study.flops is not None and best.flops:
        # Trials that were stopped early, or were smaller than the best, would also be at the target.
        direct = study.flops / (best.flops / study.seeds) * run_flops
    return Transferred(
        task=config.name,
        study=config.study_name,
        width=target,
        proxy=config.proxy,
        trial=best,
        hparams=hparams,
        not_transferred=settled,
        objective=config.objective,
        runs=tuple(runs),
        steps=group.steps,
        tuning_flops=study.flops,
        run_flops=run_flops,
        direct_flops=direct,
        proxy_front=_proxy_front(study),
        params=params,
    )


def _target_run(seed: int, metrics: Mapping[str, Any], objective: str) -> TargetRun:
    scalars = {
        name: float(value) for name, value in metrics.items() if np.shape(value) == () and name != "diverged"
    }
    value = scalars.get(objective, math.nan)
    diverged = bool(metrics.get("diverged", True)) or not math.isfinite(value)
    curve = tuple(map(float, metrics.get("curve", ())))
    return TargetRun(seed, None if diverged else value, scalars, curve)


def _proxy_front(study: Sweep) -> Front | None:
    flops = [trial.flops for trial in study.trials]
    known = [spent for spent in flops if spent is not None]
    losses = [None if trial.pruned else trial.loss for trial in study.trials]
    if len(known) < len(flops) or all(loss is None for loss in losses):
        return None
    return front(losses, known)
