"""`mujax coord-check`: checks by training that nothing depends on width."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import pathlib
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Final

import jax

from mujax import rules
from mujax.check import CheckProgress, CoordCheck, TapReport, coord_check
from mujax.cli._arguments import numbers, option, positional
from mujax.cli._builtin import BUILTIN, made_up
from mujax.cli._display import StoppedError, as_folder, display, gentle_interrupts, make_folder
from mujax.cli._explain import build_model, factory_of, inputs_of, traced
from mujax.errors import ConfigError, MujaxWarning
from mujax.optim import optimizer as optimizer_by_name
from mujax.tune import parametrization_title

if TYPE_CHECKING:
    from rich.console import Console

PICTURE: Final = "coord_check.png"
REPORT: Final = "coord_check.json"


def _default_widths() -> str:
    shown = (f"{' '.join(map(str, entry.widths))} for {name}" for name, entry in BUILTIN.items())
    return f"(default: {', '.join(shown)}; as for mlp else)"


@dataclasses.dataclass(frozen=True)
class CoordCheckOptions:
    """Check by training that nothing in a model depends on its width, and name what breaks the rules.

    Trains the model at several widths for a few steps, in the parametrization asked for and in another one
    for comparison. Writes coord_check.json and coord_check.png. Exit code 0 if the check passes, 1 if not.
    """

    model: Annotated[
        str,
        positional(),
        option("MODEL", f"{', '.join(BUILTIN)}, or package.module:factory of your own."),
    ]
    widths: Annotated[
        tuple[int, ...] | None,
        numbers(int, many=True),
        option("N ...", "Widths.", _default_widths()),
    ] = None
    base_width: Annotated[
        int | None, numbers(int), option("N", "Width of the base.", "(default: the smallest width)")
    ] = None
    optimizer: Annotated[str, option("NAME", "optax's name of an optimizer.")] = "adam"
    parametrization: Annotated[str, option("NAME", "One of mup, table3, table9, sp.")] = "mup"
    log2_lrs: Annotated[
        tuple[float, ...] | None,
        numbers(float, many=True),
        option("X ...", "Learning rates, as powers of two.", "(default: two large ones)"),
    ] = None
    steps: Annotated[int, numbers(int), option("N", "Steps of a run.")] = 6
    seeds: Annotated[int, numbers(int), option("N", "Number of seeds: the repeats.")] = 4
    inputs: Annotated[
        tuple[str, ...],
        option("SHAPE ...", "Inputs, such as 8x784 or 8x64:int32, where the factory gives none.", ""),
    ] = ()
    alone: Annotated[bool, option("", "Check no other parametrization for comparison.")] = False
    out: Annotated[
        pathlib.Path | None, option("DIR", "Folder for the results.", "(default: coord-check-MODEL)")
    ] = None


@dataclasses.dataclass(frozen=True)
class _Checked:
    """What is to be checked, on what."""

    title: str
    factory: Callable[[int], Any]
    widths: tuple[int, ...]
    arguments: dict[str, Any]


def _to_check(options: CoordCheckOptions) -> _Checked:
    """The model with concrete inputs; whatever is wrong with it is said here, before any training."""
    key = jax.random.key(0)
    known = BUILTIN.get(options.model)
    widths = tuple(sorted(set(options.widths or (known or BUILTIN["mlp"]).widths)))
    if len(widths) < 2 or widths[0] < 1:
        raise ConfigError(f"widths: expected at least two different positive numbers, got {widths}.")
    if options.base_width is not None and options.base_width < 1:
        raise ConfigError(f"base_width: expected at least 1, got {options.base_width}.")
    if known is not None and options.inputs:
        raise ConfigError(f"inputs: expected none for {options.model}, which brings its own.")
    if known is not None:
        batches = [known.batch(key)]
        known.build(widths[0])
        arguments = {"batches": batches, "kwargs": known.kwargs}
        return _Checked(known.title, known.build, widths, arguments)
    factory = factory_of(options.model)
    base, given = build_model(options.model, factory, widths[0])
    model, _ = build_model(options.model, factory, widths[1])
    inputs = inputs_of(options.model, options.inputs, given)
    with warnings.catch_warnings():
        # The check itself says it again.
        warnings.simplefilter("ignore", MujaxWarning)
        mup = traced(options.model, model, base, inputs, parametrization=options.parametrization)
    return _Checked(
        options.model,
        lambda width: build_model(options.model, factory, width)[0],
        widths,
        {"inputs": made_up(inputs, mup, key)},
    )


def run(options: CoordCheckOptions) -> int:
    """Checks, prints and draws; 0 if the check passes and 1 if not."""
    from rich.console import Console

    plot = importlib.import_module("mujax.plot")
    for name in ("steps", "seeds"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name}: expected at least 1, got {getattr(options, name)}.")
    optimizer_by_name(options.optimizer)
    rules.parametrization(options.parametrization)
    subject = _to_check(options)
    out = options.out or pathlib.Path(f"coord-check-{as_folder(options.model)}")
    make_folder(out)
    chosen = options.parametrization
    names = (chosen,) if options.alone else (chosen, "mup" if chosen == "sp" else "sp")
    try:
        with gentle_interrupts() as check, display(Console(stderr=True), "reading the model") as shown:
            reports = {}
            for number, name in enumerate(names):

                def count(now: CheckProgress, name: str = name, number: int = number) -> None:
                    if now.done < now.total:
                        shown.show(f"{name}, {now.doing}", (number + now.work_done) / len(names))
                    check()

                reports[name] = coord_check(
                    subject.factory,
                    subject.widths,
                    optimizer=options.optimizer,
                    learning_rates=options.log2_lrs and tuple(2.0**rate for rate in options.log2_lrs),
                    steps=options.steps,
                    seeds=options.seeds,
                    base_width=options.base_width,
                    progress=count,
                    parametrization=name,
                    **subject.arguments,
                )
    except KeyboardInterrupt:
        raise StoppedError("interrupted; nothing was written.") from None
    _write_report(out / REPORT, options, reports)
    # Standard parametrization above, as in the paper's figures.
    rows = [reports[name] for name in sorted(names, key=lambda name: name != "sp")]
    plot.plot_coord_check(rows, out / PICTURE, title=f"{subject.title}, {options.optimizer}")
    _print_check(Console(), reports)
    print(f"\nWritten: {out / REPORT}, {out / PICTURE}")
    return 0 if reports[chosen] else 1


def _write_report(path: pathlib.Path, options: CoordCheckOptions, reports: dict[str, CoordCheck]) -> None:
    report = {
        "model": options.model,
        "optimizer": options.optimizer,
        "parametrization": options.parametrization,
        "verdict": reports[options.parametrization].verdict,
        "checks": {name: _strict(json.loads(check.to_json())) for name, check in reports.items()},
    }
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _strict(value: Any) -> Any:
    """The same with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {name: _strict(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_strict(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_STATUS_STYLES: Final = {"pass": "green", "fail": "bold red", "undecided": "yellow"}


def _print_check(console: Console, reports: dict[str, CoordCheck]) -> None:
    from rich.table import Table

    # A table that is read later, from a file, should not be folded to what happens to be the default.
    console.width = console.width if console.is_terminal else max(console.width, 120)
    (chosen, check), *others = reports.items()
    table = Table(title=parametrization_title(chosen), title_justify="left", title_style="bold")
    table.add_column("tap", overflow="fold")
    for heading in ("status", "quantity", "exponent of width", "allowed"):
        table.add_column(heading, no_wrap=True)
    for tap in check.taps:
        inherited = tap.status == "fail" and not tap.blamed
        style = "dim" if inherited else "" if tap.status == "pass" else _STATUS_STYLES[tap.status]
        table.add_row(*_cells(tap, "inherited" if inherited else tap.status), style=style)
    console.print(table)
    console.print(check.headline(), style=_STATUS_STYLES[check.verdict], highlight=False, soft_wrap=True)
    for line in check.explained():
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for name, other in others:
        said = f"\n{parametrization_title(name)}, for comparison: {other.headline()}"
        console.print(said, style="dim", highlight=False, markup=False, soft_wrap=True)


def _cells(tap: TapReport, status: str) -> tuple[str, ...]:
    worst = tap.worst
    if worst is None:
        return tap.name, status, "", "", ""
    allowed = f"{worst.allowed[0]:+.2f} to {worst.allowed[1]:+.2f}"
    if worst.slope is None:
        return tap.name, status, worst.quantity, worst.note, allowed
    reach = worst.slope.high - worst.slope.value
    return tap.name, status, worst.quantity, f"{worst.slope.value:+.2f} ± {reach:.2f}", allowed
