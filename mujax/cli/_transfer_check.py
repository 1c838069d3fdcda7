"""`mujax transfer-check`: does the best learning rate stay where it is as a model grows wider?"""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Final

from mujax.check import RUNS, Progress
from mujax.cli._arguments import numbers, option, positional
from mujax.cli._display import StoppedError, as_folder, display, gentle_interrupts
from mujax.errors import ConfigError, MujaxError
from mujax.tune import (
    LOSS_MEASURE,
    REPORT,
    TASKS,
    Report,
    TransferConfig,
    TransferredVsTuned,
    imported,
    parametrization_title,
    summary_of,
    sweep_widths,
)

if TYPE_CHECKING:
    from rich.console import Console

PICTURE: Final = "transfer.png"
_TASK: Final = "text-transformer"


def _default(field: str, own: str) -> str:
    """The default of an option that depends on the task, for the help text."""
    values = {name: getattr(TransferConfig.for_task(name), field) for name in TASKS}
    shown = {
        name: " ".join(f"{entry:g}" for entry in value) if isinstance(value, tuple) else value
        for name, value in values.items()
    }
    return "(default: " + ", ".join(f"{value} for {name}" for name, value in shown.items()) + f", {own})"


@dataclasses.dataclass(frozen=True)
class TransferCheckOptions:
    """Check that the best learning rate of a small model is the best of a wide one.

    Trains a model at several widths over a grid of learning rates, in the standard parametrization and in µP,
    and compares the two. Writes runs.csv, report.json and transfer.png. Interrupt it at any time: the same
    command resumes. Exit code 1 if the check of µP fails.
    """

    task: Annotated[
        str | None,
        positional(),
        option(
            "TASK",
            f"{', '.join(TASKS)}, or package.module:factory of your own.",
            "(default: text-transformer)",
        ),
    ] = None
    data: Annotated[
        pathlib.Path | None,
        option("FILE", "Data for your own model or text-transformer: text, .npz, .npy, IDX.", ""),
    ] = None
    batches: Annotated[
        str | None,
        option(
            "NAME",
            "package.module:function for your own model: (key, step) -> (inputs, targets), or () -> a list "
            "with a batch for each step.",
            "",
        ),
    ] = None
    loss: Annotated[
        str | None,
        option(
            "NAME",
            "package.module:function for your own model: (outputs, targets) -> loss.",
            "(default: cross-entropy or squared error)",
        ),
    ] = None
    length: Annotated[
        int | None, numbers(int), option("N", "Tokens of a sequence of text.", "(default: 64)")
    ] = None
    widths: Annotated[
        tuple[int, ...] | None,
        numbers(int, many=True),
        option("N ...", "Widths.", _default("widths", "64 128 256 512 for your own")),
    ] = None
    base_width: Annotated[
        int | None,
        numbers(int),
        option("N", "Width of the proxy, where the rate is tuned.", "(default: the smallest width)"),
    ] = None
    log2_lrs: Annotated[
        tuple[float, ...] | None,
        numbers(float, many=True),
        option(
            "X ...",
            "Learning rates, as powers of two.",
            _default("log2_lrs", "-12 to -3 for your own") + " with adam",
        ),
    ] = None
    optimizer: Annotated[str | None, option("NAME", "optax's name of an optimizer.", "(default: adam)")] = (
        None
    )
    momentum: Annotated[float | None, numbers(float), option("X", "Momentum of sgd.", "(default: 0.9)")] = (
        None
    )
    parametrizations: Annotated[
        tuple[str, ...] | None, option("NAME ...", "Any of sp, mup, table3, table9.", "(default: sp mup)")
    ] = None
    seeds: Annotated[
        int | None, numbers(int), option("N", "Number of seeds.", _default("seeds", "3 for your own"))
    ] = None
    seed: Annotated[int | None, numbers(int), option("N", "The first of them.", "(default: 0)")] = None
    steps: Annotated[
        int | None,
        numbers(int),
        option("N", "Steps of a run.", _default("steps", "one for each of your batches or 100")),
    ] = None
    batch: Annotated[
        int | None, numbers(int), option("N", "Examples a step.", _default("batch", "32 for your own"))
    ] = None
    quick: Annotated[bool, option("", "A smoke run: few widths, rates, steps; one seed.")] = False
    out: Annotated[
        pathlib.Path | None, option("DIR", "Folder for the results.", "(default: transfer-TASK)")
    ] = None


def configured(options: TransferCheckOptions) -> TransferConfig:
    """What to sweep: the task's defaults, and the options in place of some.

    Raises:
        ConfigError: options that make no sense.
    """
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    task = given.pop("task") or _TASK
    if options.out is None:
        given["out"] = pathlib.Path(f"transfer-{as_folder(task)}" + ("-quick" if options.quick else ""))
    if task in TASKS:
        given["text"], given["data"] = given["data"], None
    if options.batches is not None:
        given["batches"] = _batches(options.batches)
    if options.optimizer is None:
        del given["optimizer"]
    return TransferConfig.for_task(task, **given)


def _batches(name: str) -> Any:
    """The user's batches: a function of key and step, or what a function without arguments returns."""
    import inspect

    found: Callable[..., Any] = imported(name, "batches", "a function")
    if inspect.signature(found).parameters:
        return found
    try:
        return list(found())
    except MujaxError:
        raise
    except Exception as error:
        raise ConfigError(
            where="batches",
            expected=f"{name}() to return (inputs, targets) for each step",
            got=summary_of(error),
        ) from error


def run(options: TransferCheckOptions) -> int:
    """Sweeps, prints and draws; 1 if the check of the parametrization that is not the standard one fails."""
    from rich.console import Console

    # Imported before the sweep and not after it: a missing matplotlib must not show at the very end.
    plot = importlib.import_module("mujax.plot")
    config = configured(options)
    assert config.out is not None
    done = 0

    def count(now: Progress) -> None:
        nonlocal done
        done = now.done
        where = f"{now.parametrization}, width {now.width}"
        shown.show(where, now.work_done, f"{now.done} of {now.total} runs")
        check()

    try:
        with gentle_interrupts() as check, display(Console(stderr=True), "reading data") as shown:
            report = sweep_widths(config, progress=count)
    except KeyboardInterrupt:
        raise StoppedError(
            f"interrupted; {done} runs are stored in {config.out / RUNS}, the same command resumes there."
        ) from None
    plot.plot_transfer(report, config.out / PICTURE)
    console = Console()
    for name in config.parametrizations:
        _print_table(console, report, name)
    lines = [f"Losses: {LOSS_MEASURE}.", "", *_claims(report), "", *_verdicts(report)]
    if options.quick:
        lines.append("A smoke run is too small to conclude anything from.")
    files = ", ".join(str(config.out / name) for name in (REPORT, RUNS, PICTURE))
    for line in (*lines, "", f"Written: {files}"):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    checked = [report.checks[name].verdict for name in config.parametrizations if name != "sp"]
    return 1 if "fail" in checked and not options.quick else 0


def _number(value: float | None, digits: int = 3) -> str:
    return "diverged" if value is None else f"{value:.{digits}f}"


def _print_table(console: Console, report: Report, name: str) -> None:
    from rich.table import Table

    config = report.config
    rate = report.transferred_log2_lr[name]
    at = None if rate is None else config.log2_lrs.index(rate)
    transferred = "" if rate is None else f" 2^{rate:g}"
    table = Table(title=f"{parametrization_title(name)}", title_justify="left", title_style="bold")
    for heading in ("width", "best log2 lr", "loss at best", f"loss at the proxy's{transferred}", "regret"):
        table.add_column(heading, justify="right")
    for width in config.widths:
        losses = report.loss[name][width]
        lowest = min((loss for loss in losses if loss is not None), default=None)
        edge = " (edge)" if width in report.on_grid_edge[name] else ""
        table.add_row(
            f"{width} (proxy)" if width == config.base_width else str(width),
            _number(report.best_log2_lr[name][width], 2) + edge,
            _number(lowest),
            _number(None if at is None else losses[at]),
            _number(report.regret[name][width]),
        )
    console.print(table)


# ---- the three claims -----------------------------------------------------------------------------------


def _claims(report: Report) -> list[str]:
    """The claims of µTransfer, each with its numbers, those of the standard parametrization last."""
    names = sorted(report.config.parametrizations, key=lambda name: name == "sp")
    claims = [
        "The best learning rate stays: " + "; ".join(_drift(report, name) for name in names) + ".",
        "Wider is better at the proxy's learning rate: "
        + "; ".join(_wider(report, name) for name in names)
        + ".",
    ]
    compared = report.transferred_vs_tuned_sp
    if compared is not None:
        claims.append(_compared(report, compared))
    return [f"{number}. {claim}" for number, claim in enumerate(claims, start=1)]


def _drift(report: Report, name: str) -> str:
    narrowest, widest = report.config.widths[0], report.config.widths[-1]
    drift, slope = report.drift_log2[name], report.drift_per_doubling[name]
    title = parametrization_title(name)
    if drift is None or slope is None:
        return f"{title}: at some width every learning rate diverges"
    return (
        f"{title}: it moves by {drift:.2f} powers of two from width {narrowest} to {widest}, {slope:+.2f} "
        "per doubling"
    )


def _wider(report: Report, name: str) -> str:
    title, rate = parametrization_title(name), report.transferred_log2_lr[name]
    if rate is None:
        return f"{title}: every learning rate diverges at width {report.config.base_width}; try lower ones"
    return f"{title} with 2^{rate:g}: {'always' if report.wider_is_better[name] else 'not always'}"


def _compared(report: Report, found: TransferredVsTuned) -> str:
    rate = report.transferred_log2_lr[found.parametrization]
    ours = parametrization_title(found.parametrization)
    ours = ours if rate is None else f"{ours} with the proxy's 2^{rate:g}"
    tuned = "" if found.sp_log2_lr is None else f" at 2^{found.sp_log2_lr:g}"
    error = "" if found.standard_error is None else f" ± {found.standard_error:.3f}"
    difference = "" if found.difference is None else f": {found.difference:+.3f}{error}"
    return (
        f"At width {found.width} a loss of {_number(found.loss)} for {ours} against {_number(found.sp_loss)} "
        f"for the standard parametrization tuned there{tuned}{difference}."
    )


def _verdicts(report: Report) -> list[str]:
    lines = []
    for name, found in report.checks.items():
        reasons = " ".join(found.reasons)
        lines.append(f"{parametrization_title(name)}: {found.verdict.upper()}. {reasons}".rstrip())
    return lines
