"""`mujax tune`: searches for hyperparameters on a small model, in a study that workers can share."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import pathlib
import re
import shlex
from typing import TYPE_CHECKING, Annotated, Any, Final

from mujax.cli import _arguments, _config_file as config_files
from mujax.cli._arguments import numbers, option, positional
from mujax.cli._display import (
    StoppedError,
    as_folder,
    display,
    fail,
    gentle_interrupts,
    make_folder,
    number,
    operations,
    output,
    print_table,
    shown,
    write_aside,
)
from mujax.errors import ConfigError, MujaxError
from mujax.train import transfers
from mujax.tune import (
    TASKS,
    Sweep,
    SweepProgress,
    Trial,
    TuneConfig,
    read_study,
    study_module,
    tensorboard_writer,
    tune,
)

if TYPE_CHECKING:
    from rich.console import Console

REPORT: Final = "tune.json"
PICTURE: Final = "tune.png"
_BEST: Final = 10


def _by_task(field: str) -> str:
    return (
        "(default: " + ", ".join(f"{getattr(task, field)} for {name}" for name, task in TASKS.items()) + ")"
    )


@dataclasses.dataclass(frozen=True)
class Tune:
    """Tune hyperparameters on a small model, for a large one that is then trained once with the best.

    Any number of workers on any number of machines can share a study: start the same command on each. Writes
    tune.json and tune.png. Interrupt it at any time: the same command resumes. Numbers may be powers such as
    2**-8 or 2^-8.
    """

    task: Annotated[
        str | None,
        positional(),
        option("TASK", f"{', '.join(TASKS)}, or package.module:factory of your own.", "(default: mnist-mlp)"),
    ] = None
    study: Annotated[
        str | None, option("NAME", "Name to store the trials under.", "(default: the task's)")
    ] = None
    storage: Annotated[
        str | None, option("URL|FILE", "Database, or an SQLite file.", "(default: mujax.db)")
    ] = None
    trials: Annotated[
        int | None,
        numbers(int),
        option("N", "Trials that the study is to hold, from all workers.", "(default: 64)"),
    ] = None
    sampler: Annotated[
        str | None, option("NAME", "random, grid, tpe, or another of Optuna's.", "(default: random)")
    ] = None
    pruner: Annotated[
        str | None, option("NAME", "asha, hyperband, median, percentile or none.", "(default: none)")
    ] = None
    width: Annotated[
        int | None, numbers(int), option("N", "Width of the small model, the proxy.", _by_task("proxy"))
    ] = None
    data: Annotated[
        pathlib.Path | None,
        option("FILE", "Data for your own model or text-transformer: text, .npz, .npy, IDX, .bin.", ""),
    ] = None
    length: Annotated[
        int | None, numbers(int), option("N", "Tokens of a sequence of text.", "(default: 64)")
    ] = None
    optimizer: Annotated[str | None, option("NAME", "optax's name of an optimizer.", "(default: adam)")] = (
        None
    )
    parametrization: Annotated[
        str | None, option("NAME", "One of mup, table3, table9, sp.", "(default: mup)")
    ] = None
    seeds: Annotated[int | None, numbers(int), option("N", "Runs of each trial.", "(default: 1)")] = None
    seed: Annotated[int | None, numbers(int), option("N", "The first of them.", "(default: 0)")] = None
    steps: Annotated[int | None, numbers(int), option("N", "Steps of a run.", _by_task("steps"))] = None
    batch: Annotated[int | None, numbers(int), option("N", "Examples a step.", _by_task("batch"))] = None
    objective: Annotated[
        str | None,
        option("NAME", "What to minimise: loss, mean_loss or valid_loss.", "(default: loss)"),
    ] = None
    tune: Annotated[
        tuple[str, ...] | None,
        option(
            "NAME=... ...",
            "What to search, in place of the default: NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=A,B,C.",
            "",
        ),
    ] = None
    set: Annotated[
        tuple[str, ...] | None, option("NAME=VALUE ...", "Hyperparameters that are not tuned.", "")
    ] = None
    zero_init: Annotated[
        tuple[str, ...] | None, option("NAME ...", "What starts at zero: readout, query.", "")
    ] = None
    heartbeat: Annotated[
        float | None, numbers(float), option("X", "Seconds between signs of life.", "(default: 60)")
    ] = None
    mode: Annotated[
        str | None,
        option("NAME", "How to run lanes: loop, map or vmap.", "(default: the fastest, measured)"),
    ] = None
    lanes: Annotated[
        int | None, numbers(int), option("N", "Runs at a time.", "(default: 16 on a CPU, 128 elsewhere)")
    ] = None
    config: Annotated[
        pathlib.Path | None,
        option("FILE", "YAML, JSON or Python with settings; options override it.", ""),
    ] = None
    tensorboard: Annotated[
        pathlib.Path | None, option("DIR", "Folder for TensorBoard's event files.", "")
    ] = None
    out: Annotated[pathlib.Path | None, option("DIR", "Folder for the results.", "(default: tune-STUDY)")] = (
        None
    )


def configured(options: Tune) -> TuneConfig:
    """The search: the settings of the file, overridden by the options.

    Raises:
        ConfigError: options or settings that make no sense.
    """
    settings = (
        config_files.Settings({}, pathlib.Path())
        if options.config is None
        else config_files.read(options.config)
    )
    others = ("set", "tune", "config", "tensorboard", "out")
    given = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if field.name not in others
    }
    tuned = None if options.tune is None else _arguments.space("tune", options.tune)
    fixed = _arguments.fixed("set", options.set or ())
    if both := sorted(set(tuned or ()) & set(fixed)):
        raise ConfigError(
            where=both[0], expected="it in --tune or in --set", got="it in both", remedy="leave one out"
        )
    given["space"] = tuned
    file_fixed = settings.get("fixed")
    if isinstance(file_fixed, dict):
        # The command line overrides the file for each hyperparameter separately.
        fixed = {**{name: value for name, value in file_fixed.items() if name not in (tuned or ())}, **fixed}
    given["fixed"] = fixed or None
    config = config_files.filled(TuneConfig, settings, given)
    return config if config.study_name else dataclasses.replace(config, study=_default_name(config))


def _default_name(config: TuneConfig) -> str:
    """The task's name, as the name of a study and of a folder."""
    if isinstance(config.task, str):
        return config.task.replace(":", ".")
    return getattr(config.task, "__name__", "mine")


def run(options: Tune) -> int:
    """Tunes, prints and draws; 1 if no trial reached its end."""
    from rich.console import Console

    # Imported before the sweep: a missing package must not show at the very end.
    plot = importlib.import_module("mujax.plot")
    study_module()
    config = configured(options)
    finished = None
    if options.tensorboard is not None:
        finished = tensorboard_writer(options.tensorboard)
    out = options.out or pathlib.Path(f"tune-{as_folder(str(config.study_name))}")
    make_folder(out)

    def count(now: SweepProgress) -> None:
        best = "" if now.best is None else f", best {now.best:.4f}"
        if now.done < now.total:
            screen.show(now.doing, now.work_done, f"{now.done} of {now.total} trials{best}")
        check()

    try:
        with gentle_interrupts() as check, display(Console(stderr=True), "reading data") as screen:
            found = tune(config, progress=count, finished=finished, say=screen.say)
    except KeyboardInterrupt:
        raise StoppedError(_interrupted(config, out, plot)) from None
    _write(found, config, out, plot)
    console = output()
    best = found.best
    if best is not None:
        _print_best(console, found)
    for sentence in _summary(found, config, options):
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"\nWritten: {out / REPORT}, {out / PICTURE}", highlight=False, markup=False, soft_wrap=True
    )
    if best is None:
        return fail("no trial reached its end; tune lower learning rates.", 1)
    return 0


def _write(found: Sweep, config: TuneConfig, out: pathlib.Path, plot: Any) -> None:
    write_aside(out / REPORT, found.to_json())
    title = f"{config.title}: width {config.proxy}, {config.optimizer}"
    write_aside(out / PICTURE, lambda path: plot.plot_sweep(found, path, title, space=config.whole_space))


def _interrupted(config: TuneConfig, out: pathlib.Path, plot: Any) -> str:
    """Writes the results so far; returns the sentence to print."""
    found = None
    # There may be no study yet; and a second Ctrl-C means at once.
    with contextlib.suppress(MujaxError, KeyboardInterrupt):
        found = read_study(config)
    if found is None or not found.trials:
        return "interrupted; no trial is stored, the same command starts again."
    _write(found, config, out, plot)
    where = f"study {config.study_name} of {without_password(config.study_storage)}"
    return (
        f"interrupted; {len(found.trials)} of {config.trials} trials are stored in {where}, the same command "
        f"resumes there. Written: {out / REPORT}, {out / PICTURE}."
    )


def without_password(storage: str | pathlib.Path | None) -> str:
    """A database, to print.

    >>> without_password("postgresql://ann:secret@host/db")
    'postgresql://ann:***@host/db'
    """
    return re.sub(r"(://[^:/@]+):[^@]*@", r"\1:***@", str(storage or "mujax.db"))


def _print_best(console: Console, found: Sweep) -> None:
    best = sorted(
        (trial for trial in found.trials if trial.loss is not None and not trial.pruned),
        key=lambda trial: (trial.loss, trial.number),
    )[:_BEST]
    names = list(dict.fromkeys(name for trial in best for name in trial.hparams))
    count = f"{len(best)} best of {len(found.trials)}" if len(best) < len(found.trials) else f"{len(best)}"
    headings = [_folded(heading) for heading in ("trial", found.objective, *names)]
    rows = [
        (
            (str(trial.number), number(trial.loss), *_values(trial, names)),
            "green" if trial is best[0] else "",
        )
        for trial in best
    ]
    print_table(console, f"Study {found.study}: the {count} trials", headings, rows, right=True)


def _folded(heading: str) -> str:
    """A heading in two lines, so that many columns fit."""
    head, _, last = heading.rpartition("_")
    return f"{head}_\n{last}" if head and len(heading) > 8 else heading


def _values(trial: Trial, names: list[str]) -> list[str]:
    return [shown(trial.hparams[name]) if name in trial.hparams else "" for name in names]


def _summary(found: Sweep, config: TuneConfig, options: Tune) -> list[str]:
    diverged = sum(trial.diverged for trial in found.trials)
    pruned = sum(trial.pruned for trial in found.trials)
    seeds = f" of {found.seeds} seeds" if found.seeds > 1 else ""
    trials = "1 trial" if len(found.trials) == 1 else f"{len(found.trials)} trials"
    spent = operations(found.flops)
    lines = [f"{trials}{seeds}, {diverged} diverged, {pruned} pruned; {spent} spent on them."]
    if found.best is not None:
        lines.append(f"To train the target with the best: {_next(found, config, options)}")
        left = [name for name in found.best.hparams if not transfers(name)]
        if left:
            what = " and ".join(left)
            lines.append(
                f"Across width {what} can't be expected to transfer: pass --set {left[0]}=VALUE, or "
                f"--also {left[0]} for the proxy's all the same."
            )
    return lines


def _next(found: Sweep, config: TuneConfig, options: Tune) -> str:
    words = ["mujax", "transfer", "--study", str(found.study)]
    if config.study_storage is not None:
        words += ["--storage", without_password(config.study_storage)]
    if options.config is not None:
        words += ["--config", str(options.config)]
    command = shlex.join(words)
    return command if config.target is not None else f"{command} --width N"
