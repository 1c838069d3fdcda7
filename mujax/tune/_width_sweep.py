"""A grid of learning rates at several widths, in µP and in standard parametrization.

`sweep_widths` says for each of the two where the best learning rate is, how far it moves with width, and what
a target loses when it is trained once with the proxy's best.

Reference:
    Yang et al., Tensor Programs V, arXiv 2203.03466, Figures 1 and 3.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import importlib.metadata
import itertools
import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TextIO

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mujax import data, rules
from mujax.check import best_index, fitted_optimum, mean
from mujax.core import MupModel, mup_init
from mujax.errors import ConfigError
from mujax.optim import mup_adam, mup_adamw, mup_sgd
from mujax.spec import MupSpec
from mujax.train import Losses, init_state, tail, train_scan
from mujax.tune._tasks import TASKS

RUNS: Final = "runs.csv"
REPORT: Final = "report.json"
LOSS_MEASURE: Final = "training loss, mean over the run"

OPTIMIZERS: Final[Mapping[str, Callable[[Any, MupSpec, float], optax.GradientTransformation]]] = {
    "adam": lambda lr, spec, _: mup_adam(lr, spec),
    "adamw": lambda lr, spec, _: mup_adamw(lr, spec),
    "sgd": lambda lr, spec, momentum: mup_sgd(lr, spec, momentum=momentum),
}

_TITLES: Final = {"sp": "Standard parametrization", "mup": "µP"}


def parametrization_title(name: str) -> str:
    """What tables and pictures call a parametrization."""
    return _TITLES.get(name, name)


# ---- configuration --------------------------------------------------------------------------------------


def _one_of(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ConfigError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}.")


@dataclasses.dataclass(frozen=True)
class TransferConfig:
    """What to sweep. `for_task` fills in the defaults of a task.

    Attributes:
        task: a key of `TASKS`.
        widths: the widths to train at, ascending; the base width is added where it is missing.
        base_width: the proxy: where the learning rate is tuned, and µP's base.
        log2_lrs: the grid of learning rates, as powers of two, ascending.
        seeds: how many seeds to average over.
        seed: the first of them.
        steps: steps of each run.
        batch: examples a step.
        optimizer: a key of `OPTIMIZERS`.
        momentum: of `"sgd"`; the others do not read it.
        parametrizations: names of rule tables, each swept.
        text: for a task on text, the user's own file; None for the text that comes with a package.
        out: the folder for `runs.csv` and `report.json`; None keeps everything in memory.

    Raises:
        ConfigError: a value that makes no sense, alone or with the others.
    """

    task: str
    widths: tuple[int, ...]
    base_width: int
    log2_lrs: tuple[float, ...]
    seeds: int
    steps: int
    batch: int
    seed: int = 0
    optimizer: str = "adam"
    momentum: float = 0.9
    parametrizations: tuple[str, ...] = ("sp", "mup")
    text: pathlib.Path | None = None
    out: pathlib.Path | None = None

    def __post_init__(self) -> None:
        _one_of("task", self.task, TASKS)
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        for name in self.parametrizations:
            _one_of("parametrizations", name, rules.TABLES)
        if not self.parametrizations:
            raise ConfigError("parametrizations: expected at least one, got none.")
        for name in ("seeds", "steps", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}.")
        if not self.widths:
            raise ConfigError("widths: expected at least one, got none.")
        step = TASKS[self.task].width_step
        for width in (*self.widths, self.base_width):
            if width < 1 or width % step:
                kind = "positive numbers" if step == 1 else f"positive multiples of {step}"
                raise ConfigError(f"widths: expected {kind} for the task {self.task!r}, got {width}.")
        if not 0 <= self.seed < 2**31 - self.seeds:
            raise ConfigError(f"seed: expected a number from 0 up to 2^31, got {self.seed}.")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum: expected a number from 0 up to 1, 1 excluded, got {self.momentum}.")
        object.__setattr__(self, "widths", tuple(sorted({*self.widths, self.base_width})))
        object.__setattr__(self, "log2_lrs", tuple(sorted({float(rate) for rate in self.log2_lrs})))
        object.__setattr__(self, "parametrizations", tuple(dict.fromkeys(self.parametrizations)))
        if len(self.widths) < 2:
            raise ConfigError(
                f"widths: expected at least one besides the base width {self.base_width}, got {self.widths}."
            )
        if len(self.log2_lrs) < 3 or not all(-126 <= rate <= 126 for rate in self.log2_lrs):
            raise ConfigError(
                "log2_lrs: expected at least three different powers of two from -126 to 126, "
                f"got {self.log2_lrs}."
            )
        if self.text is not None and not TASKS[self.task].takes_text:
            raise ConfigError(
                f"text: the task {self.task!r} does not read a text; leave it out or take another task."
            )

    @classmethod
    def for_task(
        cls, task: str = "text-transformer", *, optimizer: str = "adam", quick: bool = False, **given: Any
    ) -> TransferConfig:
        """The defaults of a task, with `given` in place of some.

        Args:
            task: a key of `TASKS`.
            optimizer: a key of `OPTIMIZERS`; the default grid of learning rates depends on it.
            quick: few widths, rates and steps and a single seed, to see that everything works.
            **given: fields of `TransferConfig`; those that are None are left at their defaults.

        Raises:
            ConfigError: a value that makes no sense, alone or with the others.

        >>> TransferConfig.for_task("text-transformer", seeds=5).seeds
        5
        """
        _one_of("task", task, TASKS)
        _one_of("optimizer", optimizer, OPTIMIZERS)
        chosen = TASKS[task]
        grid = chosen.log2_lrs[optimizer]
        default: dict[str, Any] = {
            "widths": chosen.widths,
            "log2_lrs": grid,
            "seeds": chosen.seeds,
            "steps": chosen.steps,
            "batch": chosen.batch,
        }
        if quick:
            default |= {"widths": chosen.widths[:2], "log2_lrs": grid[::-2], "seeds": 1, "steps": 40}
        default |= {name: value for name, value in given.items() if value is not None}
        default.setdefault("base_width", min(default["widths"], default=0))
        return cls(task=task, optimizer=optimizer, **default)

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """Every seed: `seeds` consecutive ones from `seed`."""
        return tuple(range(self.seed, self.seed + self.seeds))


class Run(NamedTuple):
    """One training run of a sweep."""

    parametrization: str
    width: int
    log2_lr: float
    seed: int


Runs = Mapping[Run, float | None]
"""The loss of each run; None where it diverged."""


def _all_runs(config: TransferConfig) -> list[Run]:
    return [
        Run(parametrization, width, log2_lr, seed)
        for parametrization in config.parametrizations
        for width in config.widths
        for seed in config.all_seeds
        for log2_lr in config.log2_lrs
    ]


# ---- the report -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Report:
    """What a sweep found. Everything but `config` is by parametrization.

    Attributes:
        config: what was swept.
        loss: width -> loss at each learning rate, the mean over seeds; None where a seed diverged.
        standard_error: width -> standard error of that mean; None where it diverged or with a single seed.
        best_log2_lr: width -> the fitted optimum, see `fitted_optimum`; None where everything diverged.
        on_grid_edge: widths whose best learning rate is an end of the grid: their optimum may lie beyond.
        transferred_log2_lr: the proxy's best learning rate on the grid: what the targets are trained with.
        drift_log2: the largest optimum minus the smallest, over widths.
        regret: width -> loss at the transferred learning rate minus the best loss at that width; None where
            it diverged.
        wider_is_better: at the transferred learning rate, from each width to the next, the loss never rises
            by more than two standard errors of the difference.
    """

    config: TransferConfig
    loss: dict[str, dict[int, tuple[float | None, ...]]]
    standard_error: dict[str, dict[int, tuple[float | None, ...]]]
    best_log2_lr: dict[str, dict[int, float | None]]
    on_grid_edge: dict[str, tuple[int, ...]]
    transferred_log2_lr: dict[str, float | None]
    drift_log2: dict[str, float | None]
    regret: dict[str, dict[int, float | None]]
    wider_is_better: dict[str, bool]

    def to_json(self) -> str:
        """The report as strict JSON text: null, never NaN."""
        config = self.config
        head = {
            "task": config.task,
            "widths": config.widths,
            "base_width": config.base_width,
            "log2_lrs": config.log2_lrs,
            "seeds": config.all_seeds,
            "steps": config.steps,
            "batch": config.batch,
            "optimizer": config.optimizer,
            "parametrizations": config.parametrizations,
            "loss_measure": LOSS_MEASURE,
        }
        found = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "config"
        }
        return json.dumps(head | found, indent=1, allow_nan=False) + "\n"


def summarise(config: TransferConfig, runs: Runs) -> Report:
    """The report on finished runs.

    Args:
        config: what was swept.
        runs: the loss of every run that `config` asks for; others are not looked at.
    """
    cells = {
        (name, width, rate): [runs[Run(name, width, rate, seed)] for seed in config.all_seeds]
        for name in config.parametrizations
        for width in config.widths
        for rate in config.log2_lrs
    }

    def table(of: Callable[[Sequence[float | None]], float | None]) -> dict[str, dict[int, Any]]:
        return {
            name: {
                width: tuple(of(cells[name, width, rate]) for rate in config.log2_lrs)
                for width in config.widths
            }
            for name in config.parametrizations
        }

    loss, standard_error = table(mean), table(_standard_error)
    optima = {
        name: {width: fitted_optimum(config.log2_lrs, curve) for width, curve in curves.items()}
        for name, curves in loss.items()
    }
    transferred = {name: best_index(curves[config.base_width]) for name, curves in loss.items()}
    return Report(
        config=config,
        loss=loss,
        standard_error=standard_error,
        best_log2_lr={
            name: {width: optimum.log2_lr for width, optimum in found.items()}
            for name, found in optima.items()
        },
        on_grid_edge={
            name: tuple(width for width, optimum in found.items() if optimum.on_edge)
            for name, found in optima.items()
        },
        transferred_log2_lr={
            name: None if index is None else config.log2_lrs[index] for name, index in transferred.items()
        },
        drift_log2={
            name: _drift([optimum.log2_lr for optimum in found.values()]) for name, found in optima.items()
        },
        regret={
            name: {width: _regret(curve, transferred[name]) for width, curve in curves.items()}
            for name, curves in loss.items()
        },
        wider_is_better={
            name: _wider_is_better(
                [None if index is None else curve[index] for curve in loss[name].values()],
                [None if index is None else curve[index] for curve in standard_error[name].values()],
            )
            for name, index in transferred.items()
        },
    )


def _standard_error(losses: Sequence[float | None]) -> float | None:
    finite = [loss for loss in losses if loss is not None]
    if len(finite) < max(2, len(losses)):
        return None
    return statistics.stdev(finite) / math.sqrt(len(finite))


def _drift(optima: Sequence[float | None]) -> float | None:
    finite = [optimum for optimum in optima if optimum is not None]
    return max(finite) - min(finite) if len(finite) == len(optima) else None


def _regret(curve: Sequence[float | None], transferred: int | None) -> float | None:
    best = best_index(curve)
    if best is None or transferred is None:
        return None
    at, lowest = curve[transferred], curve[best]
    return None if at is None or lowest is None else at - lowest


def _wider_is_better(losses: Sequence[float | None], errors: Sequence[float | None]) -> bool:
    finite = [loss for loss in losses if loss is not None]
    if len(finite) < len(losses):
        return False
    # With a single seed there is no standard error, and any rise counts.
    tolerances = [2 * math.hypot(narrow or 0.0, wide or 0.0) for narrow, wide in itertools.pairwise(errors)]
    rises = [wide - narrow for narrow, wide in itertools.pairwise(finite)]
    return all(rise <= tolerance for rise, tolerance in zip(rises, tolerances, strict=True))


# ---- what is stored -------------------------------------------------------------------------------------

_SETTINGS: Final = ("task", "data", "base_width", "steps", "batch", "optimizer", "momentum", "mujax")
_COLUMNS: Final = (*_SETTINGS, *Run._fields, "loss", "final_loss", "seconds")


def _settings(config: TransferConfig, train: Any) -> dict[str, str]:
    """What a run's loss depends on besides the run's own place in the sweep, as written in `runs.csv`.

    Widths, learning rates, seeds and parametrizations are not part of it: a sweep may grow, and what it has
    in common with the one before is not run again.
    """
    values = {
        "data": data.digest(train),
        "momentum": repr(config.momentum) if config.optimizer == "sgd" else "",
        "mujax": importlib.metadata.version("mujax-mup"),
    }
    return {name: values[name] if name in values else str(getattr(config, name)) for name in _SETTINGS}


class RunsFile:
    """The finished runs of a sweep, a line each, written as soon as they are known.

    Attributes:
        runs: what the file held when it was opened and what was appended since.

    Raises:
        ConfigError: the folder can't be made, or its file holds runs with other settings or something else.
            Nothing is written then.
    """

    def __init__(self, folder: pathlib.Path, settings: Mapping[str, str]) -> None:
        self._path = folder / RUNS
        self._settings = dict(settings)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            whole, self.runs = self._read()
            self._file: TextIO = self._path.open("a", encoding="utf-8", newline="")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"out: expected a folder to write to, found that {folder} is not ({error}); take another."
            ) from error
        # An interrupted run may have left half a line: its run is done again.
        self._file.truncate(whole)
        self._writer = csv.writer(self._file, lineterminator="\n")
        if not whole:
            self._write(_COLUMNS)

    def __enter__(self) -> RunsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, run: Run, losses: Losses, seconds: float) -> None:
        """Stores a run; the loss of one that diverged is an empty field."""
        kept = losses.kept
        numbers = ("" if loss is None else repr(loss) for loss in (kept, kept and losses.final))
        self._write((*self._settings.values(), *map(str, run), *numbers, f"{seconds:.3f}"))
        self.runs[run] = kept

    def _write(self, fields: Iterable[str]) -> None:
        self._writer.writerow(fields)
        self._file.flush()

    def _read(self) -> tuple[int, dict[Run, float | None]]:
        """How many bytes of the file are whole lines, and the runs in them."""
        if not self._path.exists():
            return 0, {}
        content = self._path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if not whole:
            return 0, {}
        header, *lines = csv.reader(content[:whole].decode("utf-8").splitlines())
        if header != list(_COLUMNS):
            raise ConfigError(
                f"out: expected {self._path} to be the runs of a sweep, found something else; "
                "take another folder."
            )
        return whole, dict(self._parse(number, line) for number, line in enumerate(lines, start=2))

    def _parse(self, number: int, fields: list[str]) -> tuple[Run, float | None]:
        row = dict(zip(_COLUMNS, fields, strict=False))
        try:
            run = Run(row["parametrization"], int(row["width"]), float(row["log2_lr"]), int(row["seed"]))
            loss = float(row["loss"]) if row["loss"] else None
            if len(fields) != len(_COLUMNS) or not math.isfinite(loss or 0.0):
                raise ValueError
        except (KeyError, ValueError):
            raise ConfigError(
                f"out: expected line {number} of {self._path} to be a run, found {','.join(fields)!r}; "
                "take that line out or take another folder."
            ) from None
        for name, here in self._settings.items():
            if row[name] != here:
                raise ConfigError(
                    f"out: expected runs with {name} {here} in {self._path}, found runs with {name} "
                    f"{row[name]}; take another folder, or the same settings to go on with them."
                )
        return run, loss


# ---- running --------------------------------------------------------------------------------------------


Program = Callable[[Any, Float[Array, ""], Int[Array, ""]], Losses]


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


# What compiling costs, in steps of the narrowest model.
_COMPILE_WORK: Final = 1000.0


def _work(config: TransferConfig, width: int) -> float:
    # In steps of the narrowest model: what every step costs, and what grows with the kernels.
    return config.steps * (1 + (width / config.widths[0]) ** 2 / 8)


def _program(config: TransferConfig, parametrization: str, width: int) -> Program:
    """One compiled program for all learning rates and seeds: training data, learning rate, seed -> losses."""
    task = TASKS[config.task]
    model, inputs = task.build(width)
    base, _ = task.build(config.base_width)
    # The delta says what is infinite where the model itself has the base's widths.
    delta, _ = task.build(2 * config.base_width)
    mup: MupModel = mup_init(model, base, *inputs, delta=delta, parametrization=parametrization)

    def cross_entropy(params: Any, examples: data.Examples) -> Float[Array, ""]:
        logits = mup.apply({"params": params}, examples.inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, examples.targets).mean()

    @jax.jit
    def run(train: Any, lr: Float[Array, ""], seed: Int[Array, ""]) -> Losses:
        init_key, draw_key = jax.random.split(jax.random.key(seed))
        params = mup.init(init_key)["params"]
        drawn = task.draw(train, draw_key, config.batch, config.steps)

        def loss(params: Any, state: Any, batch: Any, _: Any) -> tuple[Float[Array, ""], tuple[Any, Any]]:
            return cross_entropy(params, task.fetch(train, batch)), (state, {})

        tx = OPTIMIZERS[config.optimizer](lr, mup.spec, config.momentum)
        _, metrics = train_scan(loss, tx, donate=False)(init_state(params, tx), drawn)
        last = jax.tree.map(lambda leaf: leaf[-tail(config.steps) :], drawn)
        untrained = jax.lax.map(lambda batch: cross_entropy(params, task.fetch(train, batch)), last)
        losses = metrics["loss"]
        return Losses(losses.mean(), losses[-tail(config.steps) :].mean(), untrained.mean())

    return run


def sweep_widths(
    config: TransferConfig | None = None, *, progress: Callable[[Progress], None] | None = None
) -> Report:
    """Sweeps the learning rate at every width in every parametrization and says what transfers.

    All runs of one seed see the same batches in the same order. With `config.out`, each run is stored as
    soon as it is finished and is not done again by a later call with the same settings; the report is
    written there at the end.

    Args:
        config: what to sweep; `TransferConfig.for_task()` by default.
        progress: called before the first run of each parametrization and width and after every run.

    Raises:
        ConfigError: `config.out` holds runs with other settings.
        DataError: the data can't be found or read.

    Example:
        >>> config = TransferConfig.for_task(quick=True, widths=(16, 32), steps=3)
        >>> sorted(sweep_widths(config).best_log2_lr)
        ['mup', 'sp']

    Reference:
        Yang et al., Tensor Programs V, arXiv 2203.03466, Algorithm 1 and Figure 1.
    """
    config = TransferConfig.for_task() if config is None else config
    task = TASKS[config.task]
    train, _ = task.load(config.text)
    with contextlib.ExitStack() as stack:
        stored = None
        if config.out is not None:
            stored = stack.enter_context(RunsFile(config.out, _settings(config, train)))
        runs = _sweep(config, train, stored, progress or (lambda _: None))
    report = summarise(config, runs)
    if config.out is not None:
        # Written aside and moved, so that there is never half a report.
        aside = config.out / (REPORT + ".part")
        aside.write_text(report.to_json(), encoding="utf-8")
        aside.replace(config.out / REPORT)
    return report


def _sweep(
    config: TransferConfig, train: Any, stored: RunsFile | None, progress: Callable[[Progress], None]
) -> Runs:
    wanted = _all_runs(config)
    runs = {run: stored.runs[run] for run in wanted if stored is not None and run in stored.runs}
    missing = [
        (kind, list(group))
        for kind, group in itertools.groupby(
            (run for run in wanted if run not in runs), key=lambda run: run[:2]
        )
    ]
    finished = sum(_work(config, run.width) for run in runs)
    whole = sum(_work(config, run.width) for run in wanted) + _COMPILE_WORK * len(missing)
    for (parametrization, width), group in missing:
        progress(Progress(parametrization, width, len(runs), len(wanted), finished / whole))
        program = _program(config, parametrization, width)
        finished += _COMPILE_WORK
        for run in group:
            start = time.perf_counter()
            lr, seed = jnp.float32(2.0**run.log2_lr), jnp.int32(run.seed)
            losses = Losses(*map(float, program(train, lr, seed)))
            if stored is not None:
                stored.append(run, losses, time.perf_counter() - start)
            runs[run] = losses.kept
            finished += _work(config, width)
            progress(Progress(parametrization, width, len(runs), len(wanted), finished / whole))
    return runs
