"""A grid of learning rates at several widths, in µP and in standard parametrization.

`sweep_widths` reports for each of the two the best learning rate, how far it moves with width, and
the loss of a target that is trained once with the proxy's best.

Reference:
    Yang et al., Tensor Programs V, arXiv 2203.03466, Figures 1 and 3.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from mujax import rules
from mujax._arguments import (
    CALLBACK,
    COUNT,
    LOG2_LRS,
    LOSS,
    NONE,
    PATH,
    SEED,
    TEXT,
    Kind,
    check_arguments,
    instance,
    one_of,
    several,
    takes,
)
from mujax.check import (
    Finished,
    Progress,
    Run,
    Runs,
    RunsFile,
    TransferCheck,
    best_index,
    judge_runs,
    mean,
    never_worse,
    of_rate,
    standard_error,
    train_runs,
)
from mujax.errors import ConfigError
from mujax.optim import OPTIMIZERS, optimizer as optimizer_by_name
from mujax.train import Training
from mujax.tune._tasks import TASKS
from mujax.tune._tune import TuneConfig

REPORT: Final = "report.json"
LOSS_MEASURE: Final = "training loss, mean over the run"

_TITLES: Final = {"sp": "Standard parametrization", "mup": "µP"}


def parametrization_title(name: str) -> str:
    """The name of a parametrization in tables and pictures."""
    return _TITLES.get(name, name)


# ---- configuration --------------------------------------------------------------------------------------

_OWN: Final[Mapping[str, Any]] = {"widths": (64, 128, 256, 512), "seeds": 3, "steps": 100, "batch": 32}
"""Defaults for a model of the user's own."""

_OWN_LOG2_LRS: Final = {
    "sgd": tuple(map(float, range(-9, 2))),
    "adam": tuple(map(float, range(-12, -2))),
}
"""Learning rates by the family of the optimizer, as powers of two; those of Adam for all but SGD's."""


_KINDS: Final[Mapping[str, Kind]] = {
    "widths": several("at least one width, whole numbers of at least 1", COUNT, "(64, 128)", least=1),
    "base_width": COUNT,
    "log2_lrs": LOG2_LRS,
    "seeds": COUNT,
    "steps": COUNT,
    "batch": COUNT,
    "seed": SEED,
    "momentum": Kind("a number from 0 up to 1, 1 excluded", lambda value: 0 <= value < 1, "0.9"),
    "parametrizations": several(
        f"at least one of {', '.join(map(repr, rules.TABLES))}",
        one_of(rules.TABLES),
        '("sp", "mup")',
        least=1,
    ),
    "text": PATH | NONE,
    "data": PATH | NONE,
    "loss": TEXT | LOSS | NONE,
    "length": COUNT,
    "out": PATH | NONE,
}


@dataclasses.dataclass(frozen=True)
class TransferConfig:
    """The configuration of a sweep over widths. `for_task` fills in defaults.

    Attributes:
        task: a key of `TASKS`; or a model of your own: a factory `width -> module`, or its place,
            `"package.module:factory"`.
        widths: the widths to train at, ascending; the base width is added where it is missing.
        base_width: the proxy's, at which the learning rate is tuned, and µP's base.
        log2_lrs: the grid of learning rates, as powers of two, ascending.
        seeds: how many seeds to average over.
        seed: the first of them.
        steps: steps of each run.
        batch: examples a step.
        optimizer: optax's name.
        momentum: of `"sgd"`; the others do not read it.
        parametrizations: names of rule tables, each swept.
        text: for a task on text, the user's own file; None for the text that comes with a package.
        data: file of data for a model of your own: text, `.npz`, `.npy` or IDX.
        batches: for a model of your own in place of `data`: see `mujax.training_run`.
        loss: `(outputs, targets) -> scalar` of a model of your own, or its place; cross-entropy or
            squared error by default.
        length: tokens of a sequence, for `data` that is a text.
        out: the folder for `runs.csv` and `report.json`; None keeps everything in memory.

    Raises:
        ConfigError: an invalid value, alone or with the others.
    """

    task: Any
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
    data: pathlib.Path | None = None
    batches: Any = None
    loss: Any = None
    length: int = 64
    out: pathlib.Path | None = None

    def __post_init__(self) -> None:
        check_arguments(_KINDS, vars(self))
        optimizer_by_name(self.optimizer)
        for name in ("text", "data", "out"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, pathlib.Path(getattr(self, name)))
        known = TASKS.get(self.task) if isinstance(self.task, str) else None
        step = 1 if known is None else known.width_step
        for width in (*self.widths, self.base_width):
            if width % step:
                raise ConfigError(
                    where="widths", expected=f"multiples of {step} for the task {self.name!r}", got=width
                )
        if not 0 <= self.seed < 2**31 - self.seeds:
            raise ConfigError(where="seed", expected="a number from 0 up to 2^31", got=self.seed)
        object.__setattr__(self, "widths", tuple(sorted({*self.widths, self.base_width})))
        object.__setattr__(self, "log2_lrs", tuple(sorted({float(rate) for rate in self.log2_lrs})))
        object.__setattr__(self, "parametrizations", tuple(dict.fromkeys(self.parametrizations)))
        if len(self.widths) < 2:
            raise ConfigError(
                where="widths",
                expected=f"at least one besides the base width {self.base_width}",
                got=self.widths,
            )
        if self.text is not None and (known is None or not known.takes_text):
            raise ConfigError(
                f"text: the task {self.name!r} does not read a text; leave it out or take another task."
            )
        if known is None and ":" in self.name and (self.data is None) == (self.batches is None):
            raise ConfigError(
                where="data",
                expected="either a file of data or batches for a model of your own",
                got="neither" if self.data is None else "both",
                remedy="pass --data FILE or --batches package.module:function",
            )
        # Checks the task, its data and its batches.
        self.at_proxy(self.parametrizations[0])

    @classmethod
    def for_task(
        cls, task: Any = "text-transformer", *, optimizer: str = "adam", quick: bool = False, **given: Any
    ) -> TransferConfig:
        """The defaults of a task, with `given` in place of some.

        Args:
            task: a key of `TASKS`, or a model of your own.
            optimizer: optax's name; the default grid of learning rates depends on it.
            quick: few widths, rates and steps and a single seed, to check that everything works.
            **given: fields of `TransferConfig`; those that are None are left at their defaults.

        Raises:
            ConfigError: an invalid value, alone or with the others.

        >>> TransferConfig.for_task("text-transformer", seeds=5).seeds
        5
        """
        optimizer_by_name(optimizer)
        family = "sgd" if OPTIMIZERS[optimizer].family == "sgd" else "adam"
        known = TASKS.get(task) if isinstance(task, str) else None
        if known is None:
            default = {**_OWN, "log2_lrs": _OWN_LOG2_LRS[family]}
            # Ready batches are one for each step.
            default["steps"] = getattr(given.get("batches"), "__len__", int)() or _OWN["steps"]
        else:
            default = {name: getattr(known, name) for name in ("widths", "seeds", "steps", "batch")}
            default["log2_lrs"] = known.log2_lrs.get(optimizer, known.log2_lrs[family])
        if quick:
            few = {"widths": default["widths"][:2], "log2_lrs": default["log2_lrs"][::-2], "seeds": 1}
            default |= {**few, "steps": min(40, default["steps"])}
        default |= {name: value for name, value in given.items() if value is not None}
        default.setdefault("base_width", min(default["widths"], default=0))
        return cls(task=task, optimizer=optimizer, **default)

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """Every seed: `seeds` consecutive ones from `seed`."""
        return tuple(range(self.seed, self.seed + self.seeds))

    @property
    def name(self) -> str:
        """The task's name, or the place of its factory."""
        if isinstance(self.task, str):
            return self.task
        return f"{getattr(self.task, '__module__', '?')}:{getattr(self.task, '__qualname__', 'factory')}"

    @property
    def title(self) -> str:
        """The task for a caption."""
        return TASKS[self.task].title if self.name in TASKS else self.name

    def at_proxy(self, parametrization: str) -> TuneConfig:
        """The model and data in a parametrization, as `mujax.tune` takes them.

        Raises:
            ConfigError: invalid task, data or batches.
        """
        return TuneConfig(
            task=self.task,
            width=self.base_width,
            base_width=self.base_width,
            data=self.data if self.text is None else self.text,
            batches=self.batches,
            loss=self.loss,
            length=self.length,
            optimizer=self.optimizer,
            parametrization=parametrization,
            steps=self.steps,
            batch=self.batch,
        )


# ---- the report -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TransferredVsTuned:
    """µP with the proxy's learning rate against standard parametrization tuned at the widest width.

    Attributes:
        width: the widest.
        parametrization: the first that is not `"sp"`.
        loss: its loss at the transferred learning rate, the mean over seeds; None if it diverged.
        sp_log2_lr: the learning rate on the grid at which standard parametrization is best at this width.
        sp_loss: its loss there; None if all diverged.
        difference: `loss` minus `sp_loss`.
        standard_error: of the difference, over pairs of runs with the same seed and so the same batches; None
            with a single seed.
    """

    width: int
    parametrization: str
    loss: float | None
    sp_log2_lr: float | None
    sp_loss: float | None
    difference: float | None
    standard_error: float | None


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of a sweep over widths.

    All fields but `config` and `transferred_vs_tuned_sp` are by parametrization.

    Attributes:
        config: the configuration.
        loss: width -> loss at each learning rate, the mean over seeds; None where a seed diverged.
        standard_error: width -> standard error of that mean; None where it diverged or with a single seed.
        best_log2_lr: width -> the fitted optimum, see `fitted_optimum`; None where everything diverged.
        on_grid_edge: widths whose best learning rate is an end of the grid: their optimum may lie beyond.
        transferred_log2_lr: the proxy's best learning rate on the grid, with which the targets are trained.
        drift_log2: the largest optimum minus the smallest, over widths.
        drift_per_doubling: slope of the optimum over log2 of the width.
        regret: width -> the loss at the proxy's fitted optimum minus that at the width's own, in units of the
            loss; None where it diverges.
        regret_share: width -> the same as a share of the decrease of the loss by training.
        wider_is_better: at the transferred learning rate, no width is worse than the one before it, beyond
            the noise of the seeds; with a single seed any rise counts.
        checks: the transfer check's verdict, with its intervals.
        transferred_vs_tuned_sp: None without standard parametrization and another one.
    """

    config: TransferConfig
    loss: dict[str, dict[int, tuple[float | None, ...]]]
    standard_error: dict[str, dict[int, tuple[float | None, ...]]]
    best_log2_lr: dict[str, dict[int, float | None]]
    on_grid_edge: dict[str, tuple[int, ...]]
    transferred_log2_lr: dict[str, float | None]
    drift_log2: dict[str, float | None]
    drift_per_doubling: dict[str, float | None]
    regret: dict[str, dict[int, float | None]]
    regret_share: dict[str, dict[int, float | None]]
    wider_is_better: dict[str, bool]
    checks: dict[str, TransferCheck]
    transferred_vs_tuned_sp: TransferredVsTuned | None

    def to_json(self) -> str:
        """The report as strict JSON text: null, never NaN."""
        config = self.config
        head = {
            "task": config.name,
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
            if field.name not in ("config", "checks", "transferred_vs_tuned_sp")
        }
        for name in ("verdict", "reasons", "interval", "regret_interval"):
            found[name] = {each: getattr(check, name) for each, check in self.checks.items()}
        compared = self.transferred_vs_tuned_sp
        found["transferred_vs_tuned_sp"] = None if compared is None else dataclasses.asdict(compared)
        return json.dumps(head | found, indent=1, allow_nan=False) + "\n"


def summarise(config: TransferConfig, runs: Runs) -> Report:
    """The report on finished runs.

    Args:
        config: the configuration.
        runs: every run of `config`; others are ignored.
    """

    def of_seeds(name: str, width: int, rate: float) -> list[Finished]:
        return [runs[Run(name, width, rate, seed)] for seed in config.all_seeds]

    def losses(name: str, width: int, rate: float | None) -> list[float | None]:
        if rate is None:
            return [None] * config.seeds
        return [run.loss for run in of_seeds(name, width, rate)]

    def check(name: str) -> TransferCheck:
        cells = {width: [of_seeds(name, width, rate) for rate in config.log2_lrs] for width in config.widths}
        return judge_runs(config.log2_lrs, cells, proxy=config.base_width)

    def by_width(name: str, of: Callable[[Sequence[float | None]], float | None]) -> dict[int, Any]:
        return {
            width: tuple(of(losses(name, width, rate)) for rate in config.log2_lrs) for width in config.widths
        }

    names = config.parametrizations
    checks = {name: check(name) for name in names}
    transferred = {name: _best_rate(config, found.loss[config.base_width]) for name, found in checks.items()}
    return Report(
        config=config,
        loss={name: found.loss for name, found in checks.items()},
        standard_error={name: by_width(name, standard_error) for name in names},
        best_log2_lr={name: found.best_log2_lr for name, found in checks.items()},
        on_grid_edge={name: found.on_grid_edge for name, found in checks.items()},
        transferred_log2_lr=transferred,
        drift_log2={name: found.drift_log2 for name, found in checks.items()},
        drift_per_doubling={name: found.drift_per_doubling for name, found in checks.items()},
        regret={name: found.regret_loss for name, found in checks.items()},
        regret_share={name: found.regret for name, found in checks.items()},
        wider_is_better={
            name: never_worse([losses(name, width, rate) for width in config.widths])
            for name, rate in transferred.items()
        },
        checks=checks,
        transferred_vs_tuned_sp=_compare(config, checks, transferred, losses),
    )


def _best_rate(config: TransferConfig, curve: Sequence[float | None]) -> float | None:
    best = best_index(curve)
    return None if best is None else config.log2_lrs[best]


def _compare(
    config: TransferConfig,
    checks: Mapping[str, TransferCheck],
    transferred: Mapping[str, float | None],
    losses: Callable[[str, int, float | None], list[float | None]],
) -> TransferredVsTuned | None:
    others = [name for name in checks if name != "sp"]
    if "sp" not in checks or not others:
        return None
    name, widest = others[0], config.widths[-1]
    rate = _best_rate(config, checks["sp"].loss[widest])
    one, other = losses(name, widest, transferred[name]), losses("sp", widest, rate)
    ours, theirs = mean(one), mean(other)
    pairs = [None if mine is None or sp is None else mine - sp for mine, sp in zip(one, other, strict=True)]
    return TransferredVsTuned(
        width=widest,
        parametrization=name,
        loss=ours,
        sp_log2_lr=rate,
        sp_loss=theirs,
        difference=None if ours is None or theirs is None else ours - theirs,
        standard_error=standard_error(pairs),
    )


_CONFIG: Final = instance(TransferConfig, "a TransferConfig", "TransferConfig.for_task()")


# ---- running --------------------------------------------------------------------------------------------


def _settings(config: TransferConfig, digest: str) -> dict[str, str]:
    """Everything that a run's loss depends on besides its place in the sweep, as written in `runs.csv`."""
    momentum = repr(config.momentum) if config.optimizer == "sgd" else ""
    return {
        "task": config.name,
        "data": digest,
        "base_width": str(config.base_width),
        "steps": str(config.steps),
        "batch": str(config.batch),
        "optimizer": config.optimizer,
        "momentum": momentum,
        "mujax": importlib.metadata.version("mujax-mup"),
    }


@takes(config=_CONFIG | NONE, progress=CALLBACK | NONE)
def sweep_widths(
    config: TransferConfig | None = None, *, progress: Callable[[Progress], None] | None = None
) -> Report:
    """Sweeps the learning rate at every width in every parametrization and reports whether it transfers.

    All runs of one seed see the same batches in the same order. With `config.out`, each run is stored as
    soon as it is finished and is not done again by a later call with the same settings; the report is
    written there at the end.

    Args:
        config: the configuration; `TransferConfig.for_task()` by default.
        progress: called before the first run of each parametrization and width and after every run.

    Raises:
        ConfigError: `config.out` holds runs with other settings.
        DataError: the data can't be found or read.
        MujaxError: as `mup_init` does.

    Example:
        >>> config = TransferConfig.for_task("mnist-mlp", quick=True, widths=(16, 32), steps=3)
        >>> sorted(sweep_widths(config).best_log2_lr)
        ['mup', 'sp']

    Reference:
        Yang et al., Tensor Programs V, arXiv 2203.03466, Algorithm 1 and Figure 1.
    """
    config = TransferConfig.for_task() if config is None else config
    models = {name: config.at_proxy(name) for name in config.parametrizations}
    extra = {"momentum": config.momentum} if config.optimizer == "sgd" else {}
    make = optimizer_by_name(config.optimizer)

    def job(parametrization: str, width: int) -> Training:
        return dataclasses.replace(
            models[parametrization].training(width),
            optimizer=of_rate(lambda rate, spec: make(rate, spec, **extra)),
            valid=None,
        )

    wanted = [
        Run(parametrization, width, log2_lr, seed)
        for parametrization in config.parametrizations
        for width in config.widths
        for seed in config.all_seeds
        for log2_lr in config.log2_lrs
    ]
    digest = models[config.parametrizations[0]].settings()["data"]
    with contextlib.ExitStack() as stack:
        stored = None
        if config.out is not None:
            stored = stack.enter_context(RunsFile(config.out, _settings(config, digest)))
        runs = train_runs(wanted, job, steps=config.steps, stored=stored, progress=progress)
    report = summarise(config, runs)
    if config.out is not None:
        _save_report(report, config.out)
    return report


def _save_report(report: Report, folder: pathlib.Path) -> None:
    """Written aside and moved, so that a report is never incomplete."""
    aside = folder / (REPORT + ".part")
    try:
        aside.write_text(report.to_json(), encoding="utf-8")
        aside.replace(folder / REPORT)
    except OSError as error:
        raise ConfigError(
            where="out",
            expected=f"{folder / REPORT} to be a file that can be written",
            got=f"an error ({error.strerror or error})",
            remedy="make room for it and run the same again: the finished runs are stored",
        ) from error
