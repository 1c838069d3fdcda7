"""Trains a model at several widths over learning rates and seeds, and keeps finished runs in a file.

The one sweep over widths: `transfer_check`, `wider_is_better` and `mujax.tune.sweep_widths` train with it.
"""

from __future__ import annotations

import codecs
import csv
import dataclasses
import itertools
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from mujax.check._models import Optimizer
from mujax.core import MupModel
from mujax.errors import ConfigError
from mujax.train import (
    CompiledRuns,
    Losses,
    Metrics,
    OutputLoss,
    Training,
    as_batches,
    run_lanes,
    tail,
    threads,
    training_run,
)

RUNS: Final = "runs.csv"

# Shares of a run after which it is given up if a loss was not finite.
_LOOKS: Final = (0.1, 0.25, 0.5)

# What compiling costs, in steps of the narrowest model.
_COMPILE_WORK: Final = 1000.0


class Run(NamedTuple):
    """One training run of a sweep."""

    parametrization: str
    width: int
    log2_lr: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Finished:
    """The result of a run.

    Attributes:
        loss: training loss, the mean over all steps; None if the run diverged, see `Losses.kept`.
        final: the mean over the last tenth of the steps; None if it diverged.
        untrained: the initial model's mean loss on the same batches as `final`; None if a file from before
            0.4 does not have it.
        curve: the loss of each batch before the model learned from it; None if the run diverged or was read
            from a file.
        flops: operations of the run, as XLA counts those of the compiled program; None if they are unknown
            or the run was read from a file.
    """

    loss: float | None
    final: float | None
    untrained: float | None
    curve: Float[np.ndarray, " steps"] | None = dataclasses.field(default=None, compare=False, repr=False)
    flops: float | None = dataclasses.field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, metrics: Metrics, flops: float | None = None) -> Finished:
        """From the metrics of a `Training`; a run that was given up early has no curve and diverged."""
        untrained = float(metrics["untrained"]) if "untrained" in metrics else None
        if "curve" not in metrics:
            return cls(None, None, untrained, flops=flops)
        curve = np.asarray(metrics["curve"], np.float64)
        end = float(np.mean(curve[-tail(len(curve)) :]))
        loss = Losses(float(np.mean(curve)), end, untrained).kept
        if loss is None:
            return cls(None, None, untrained, flops=flops)
        return cls(loss, end, untrained, curve, flops)


Runs = Mapping[Run, Finished]


class StoredRuns(Protocol):
    """Where `train_runs` finds finished runs and appends further ones; a `RunsFile`, or one's own."""

    runs: dict[Run, Finished]

    def append(self, run: Run, finished: Finished, seconds: float) -> None:
        """Stores a run and adds it to `runs`."""
        ...


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a sweep is.

    Attributes:
        parametrization: of the run that was finished or, for the first of its kind, is to come.
        width: likewise.
        done: runs finished, those of an earlier call included.
        total: runs in all.
        work_done: share of the work finished, from 0 to 1: a wide model takes longer than a narrow one.
    """

    parametrization: str
    width: int
    done: int
    total: int
    work_done: float


# ---- training -------------------------------------------------------------------------------------------


def train_runs(
    runs: Sequence[Run],
    job: Callable[[str, int], Training],
    *,
    steps: int,
    swept: str = "learning_rate",
    fixed: Mapping[str, float] | None = None,
    stored: StoredRuns | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> dict[Run, Finished]:
    """Trains every run that is not stored yet.

    One compiled program does all runs of a parametrization and width: learning rate and seed are its
    arguments. On a CPU a thread for each core takes one run at a time, elsewhere all of them are one program.

    Args:
        runs: those of one parametrization and width next to each other.
        job: parametrization and width -> the training; called only where runs are missing.
        steps: of each run.
        swept: the hyperparameter that takes the value 2**`log2_lr` of each run.
        fixed: further hyperparameters, the same in all runs.
        stored: where finished runs are read and appended.
        progress: called before the first run of each parametrization and width and after every run.
    """
    show = progress or (lambda _: None)
    found = {run: stored.runs[run] for run in runs if stored is not None and run in stored.runs}
    missing = [
        (kind, list(group))
        for kind, group in itertools.groupby((run for run in runs if run not in found), lambda run: run[:2])
    ]
    narrowest = min(run.width for run in runs)

    def work(run: Run) -> float:
        # In steps of the narrowest model: what every step costs, and what grows with the kernels.
        return steps * (1 + (run.width / narrowest) ** 2 / 8)

    finished = sum(map(work, found))
    whole = sum(map(work, runs)) + _COMPILE_WORK * len(missing)
    for (parametrization, width), group in missing:
        show(Progress(parametrization, width, len(found), len(runs), finished / whole))
        finished += _COMPILE_WORK
        for done, seconds in _trained(job(parametrization, width), group, swept, fixed or {}):
            for run, one in done.items():
                if stored is not None:
                    stored.append(run, one, seconds)
                found[run] = one
                finished += work(run)
                show(Progress(parametrization, width, len(found), len(runs), finished / whole))
    return found


def train_models(
    models: Mapping[int, MupModel],
    batches: Sequence[tuple[Any, Any]],
    optimizer: Optimizer,
    loss: OutputLoss,
    log2_lrs: Sequence[float],
    seeds: Sequence[int],
) -> dict[int, list[list[Finished]]]:
    """Trains ready models on given batches.

    Every run sees the same batches; the seed draws the initial parameters and the model's own randomness.
    State other than the parameters (batch statistics) stays as initialised.

    Args:
        models: by width.
        batches: of every step, as `check_batches` returns them.
        optimizer: (learning rate, spec) -> optimizer.
        loss: (outputs, targets) -> scalar.
        log2_lrs: learning rates, as powers of two.
        seeds: of the runs at each learning rate.

    Returns:
        Width -> learning rate -> seed -> result.
    """
    shared = as_batches(batches)

    def job(_: str, width: int) -> Training:
        return training_run(models[width], shared, of_rate(optimizer), steps=len(batches), loss=loss)

    runs = [Run("", width, rate, seed) for width in models for rate in log2_lrs for seed in seeds]
    found = train_runs(runs, job, steps=len(batches))
    return {
        width: [[found[Run("", width, rate, seed)] for seed in seeds] for rate in log2_lrs]
        for width in models
    }


def of_rate(optimizer: Optimizer) -> Callable[[Mapping[str, Any], Any], Any]:
    """An optimizer of learning rate and spec, as `Training` takes it."""
    return lambda hparams, spec: optimizer(hparams["learning_rate"], spec)


def _trained(
    job: Training, runs: Sequence[Run], swept: str, fixed: Mapping[str, float]
) -> Iterator[tuple[dict[Run, Finished], float]]:
    """The results of some runs at a time, as soon as they are there, with the seconds that each took."""
    on_cpu = jax.default_backend() == "cpu"
    compiled = CompiledRuns(
        job,
        {},
        mode="loop" if on_cpu else None,
        devices=jax.local_devices()[:1] if on_cpu else None,
    )
    looks = [round(share * compiled.steps) for share in _LOOKS]
    at_once = threads() if on_cpu else len(runs)

    def lost(_: int, metrics: Mapping[int, Metrics]) -> list[int]:
        return [lane for lane, found in metrics.items() if not math.isfinite(found["mean_loss"])]

    for first in range(0, len(runs), at_once):
        group = runs[first : first + at_once]
        start = time.perf_counter()
        metrics = run_lanes(
            compiled,
            {
                **{name: np.full(len(group), value) for name, value in fixed.items()},
                swept: np.array([2.0**run.log2_lr for run in group]),
            },
            jax.vmap(jax.random.key)(jnp.array([run.seed for run in group])),
            rungs=looks,
            watch=lost,
            left=(len(runs) - first) * compiled.steps,
        )
        seconds = (time.perf_counter() - start) / len(group)
        found = [Finished.of(each, compiled.flops) for each in metrics]
        yield dict(zip(group, found, strict=True)), seconds


# ---- stored runs ----------------------------------------------------------------------------------------

_FOUND: Final = ("loss", "final_loss", "seconds", "untrained")


class RunsFile:
    """The finished runs of a sweep, a line each, written as soon as they are known.

    Args:
        folder: of the file; made where it does not exist.
        settings: everything that the runs depend on besides their place in the sweep, as text. Widths,
            learning rates, seeds and parametrizations are not part of it: a sweep may grow, and what it has
            in common with the one before is not run again.

    Attributes:
        runs: those in the file when it was opened, and those appended since.

    Raises:
        ConfigError: the folder can't be made, or its file holds runs with other settings or something else.
            Nothing is written then.
    """

    def __init__(self, folder: pathlib.Path, settings: Mapping[str, str]) -> None:
        self._path = folder / RUNS
        self._settings = dict(settings)
        self._columns = (*self._settings, *Run._fields, *_FOUND)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            whole, self.runs = self._read()
            self._file: TextIO = self._path.open("a", encoding="utf-8", newline="")
        except OSError as error:
            raise ConfigError(
                where="out",
                expected="a folder to write to",
                got=f"{folder}, which is not ({error})",
                remedy="take another",
            ) from error
        # An interrupted run may have left half a line: its run is done again.
        self._file.truncate(whole)
        self._writer = csv.writer(self._file, lineterminator="\n")
        if not whole:
            self._write(self._columns)

    def __enter__(self) -> RunsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, run: Run, finished: Finished, seconds: float) -> None:
        """Stores a run; the loss of one that diverged is an empty field."""
        numbers = {
            "loss": finished.loss,
            "final_loss": finished.final,
            "untrained": finished.untrained,
        }
        texts = {name: "" if value is None else repr(value) for name, value in numbers.items()}
        texts["seconds"] = f"{seconds:.3f}"
        last = [texts[name] for name in self._columns if name in texts]
        self._write((*self._settings.values(), *map(str, run), *last))
        self.runs[run] = finished

    def _write(self, fields: Iterable[str]) -> None:
        self._writer.writerow(fields)
        self._file.flush()

    def _read(self) -> tuple[int, dict[Run, Finished]]:
        """How many bytes of the file are whole lines, and the runs in them."""
        if not self._path.exists():
            return 0, {}
        content = self._path.read_bytes()
        whole = content.rfind(b"\n") + 1
        try:
            lines = list(csv.reader(content[:whole].decode("utf-8").splitlines()))
            # Half a line may end within a character.
            torn = codecs.getincrementaldecoder("utf-8")().decode(content[whole:])
        except (UnicodeDecodeError, csv.Error) as error:
            raise self._other(f"something else ({error})") from error
        if not lines:
            if not ",".join(self._columns).startswith(torn):
                raise self._other("something else")
            return 0, {}
        header, *lines = lines
        # Before 0.4 there was no untrained loss; such a file is resumed without it.
        if header not in (list(self._columns), list(self._columns[:-1])):
            raise self._other("something else")
        self._columns = tuple(header)
        return whole, dict(self._parse(number, line) for number, line in enumerate(lines, start=2))

    def _other(self, found: str) -> ConfigError:
        return ConfigError(
            where="out",
            expected=f"{self._path} to be the runs of a sweep",
            got=found,
            remedy="take another folder",
        )

    def _parse(self, number: int, fields: list[str]) -> tuple[Run, Finished]:
        row = dict(zip(self._columns, fields, strict=False))
        try:
            run = Run(row["parametrization"], int(row["width"]), float(row["log2_lr"]), int(row["seed"]))
            loss, final = (float(row[name]) if row[name] else None for name in ("loss", "final_loss"))
            untrained = float(row["untrained"]) if row.get("untrained") else None
            if len(fields) != len(self._columns) or not math.isfinite(loss or 0.0):
                raise ValueError
        except (KeyError, ValueError):
            raise ConfigError(
                where="out",
                expected=f"line {number} of {self._path} to be a run",
                got=repr(",".join(fields)),
                remedy="take that line out or take another folder",
            ) from None
        for name, here in self._settings.items():
            if row[name] != here:
                raise ConfigError(
                    where="out",
                    expected=f"runs with {name} {here} in {self._path}",
                    got=f"runs with {name} {row[name]}",
                    remedy="take another folder, or the same settings to resume",
                )
        return run, Finished(loss, final, untrained)
