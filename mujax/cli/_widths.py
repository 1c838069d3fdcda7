"""`mujax transfer` without a study: shows µTransfer on a grid of learning rates at several widths."""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final

from mujax.cli._arguments import numbers, option
from mujax.cli._display import StoppedError, display, gentle_interrupts
from mujax.tune import (
    LOSS_MEASURE,
    OPTIMIZERS,
    REPORT,
    RUNS,
    TASKS,
    Progress,
    Report,
    TransferConfig,
    parametrization_title,
    sweep_widths,
)

if TYPE_CHECKING:
    from rich.console import Console

PICTURE: Final = "transfer.png"


def default(field: str) -> str:
    """The default of an option that depends on the task, for the help text."""
    values = {name: getattr(TransferConfig.for_task(name), field) for name in TASKS}
    shown = {
        name: " ".join(f"{entry:g}" for entry in value) if isinstance(value, tuple) else value
        for name, value in values.items()
    }
    return "(default: " + ", ".join(f"{value} for {name}" for name, value in shown.items()) + ")"


@dataclasses.dataclass(frozen=True)
class Widths:
    """To show µTransfer on a grid of learning rates at several widths."""

    task: Annotated[
        str | None, option("NAME", f"What to train: {' or '.join(TASKS)}.", "(default: text-transformer)")
    ] = None
    text: Annotated[
        pathlib.Path | None, option("FILE", "Text for text-transformer.", "(default: the KJV)")
    ] = None
    widths: Annotated[
        tuple[int, ...] | None, numbers(int, many=True), option("N ...", "Widths.", default("widths"))
    ] = None
    base_width: Annotated[
        int | None,
        numbers(int),
        option("N", "Width of the proxy, where the rate is tuned.", "(default: the smallest width)"),
    ] = None
    log2_lrs: Annotated[
        tuple[float, ...] | None,
        numbers(float, many=True),
        option("X ...", "Learning rates, as powers of two.", default("log2_lrs") + " with adam"),
    ] = None
    optimizer: Annotated[
        str | None, option("NAME", f"One of {', '.join(OPTIMIZERS)}.", "(default: adam)")
    ] = None
    momentum: Annotated[float | None, numbers(float), option("X", "Momentum of sgd.", "(default: 0.9)")] = (
        None
    )
    parametrizations: Annotated[
        tuple[str, ...] | None, option("NAME ...", "Any of sp, mup, table3, table9.", "(default: sp mup)")
    ] = None
    quick: Annotated[bool, option("", "A smoke run: few widths, rates, steps; one seed.")] = False


def run(given: Mapping[str, Any]) -> None:
    """Sweeps, prints and draws.

    Args:
        given: fields of `TransferConfig` and `quick`, those that were said.
    """
    from rich.console import Console

    # Imported before the sweep and not after it: a missing matplotlib must not show at the very end.
    plot = importlib.import_module("mujax.plot")
    config = TransferConfig.for_task(**given)
    if config.out is None:
        folder = f"transfer-{config.task}" + ("-quick" if given.get("quick") else "")
        config = dataclasses.replace(config, out=pathlib.Path(folder))
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
            f"interrupted; {done} runs are stored in {config.out / RUNS}, the same command goes on there."
        ) from None
    plot.plot_transfer(report, config.out / PICTURE)
    console = Console()
    for name in config.parametrizations:
        _print_table(console, report, name)
    console.print(f"Losses: {LOSS_MEASURE}.\n", highlight=False, markup=False)
    for name in config.parametrizations:
        console.print(_verdict(report, name), highlight=False, markup=False)
    if given.get("quick"):
        console.print("A smoke run is too small to conclude anything from.")
    files = ", ".join(str(config.out / name) for name in (REPORT, RUNS, PICTURE))
    console.print(f"\nWritten: {files}", highlight=False, markup=False, soft_wrap=True)


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


def _verdict(report: Report, name: str) -> str:
    """What the table says, in a sentence or two."""
    config = report.config
    title, narrowest, widest = parametrization_title(name), config.widths[0], config.widths[-1]
    drift, rate = report.drift_log2[name], report.transferred_log2_lr[name]
    if rate is None:
        return f"{title}: every learning rate diverges at width {config.base_width}; try lower ones."
    moves = (
        "at some width every learning rate diverges"
        if drift is None
        else f"the best learning rate moves by {drift:.2f} powers of two from width {narrowest} to {widest}"
    )
    regret = report.regret[name][widest]
    outcome = "diverges" if regret is None else f"costs {regret:.3f}"
    better = "always" if report.wider_is_better[name] else "not always"
    verdict = (
        f"{title}: {moves}; the proxy's 2^{rate:g} {outcome} at width {widest}, "
        f"and with it wider is {better} better."
    )
    edge = ", ".join(map(str, report.on_grid_edge[name]))
    if edge:
        verdict += f" At width {edge} the best rate is the last on the grid: extend --log2-lrs."
    return verdict
