"""`mujax coord-check`: checks by training that nothing depends on width."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pathlib
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Final

import jax

from mujax import rules
from mujax._arguments import COUNT, NONE, check_arguments
from mujax.check import CheckProgress, CoordCheck, TapReport, coord_check, made_up_inputs
from mujax.cli._arguments import numbers, option, positional
from mujax.cli._builtin import BUILTIN
from mujax.cli._display import (
    StoppedError,
    as_folder,
    display,
    gentle_interrupts,
    make_folder,
    output,
    print_table,
    write_aside,
)
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
    """A model to be checked, with its widths and inputs."""

    title: str
    factory: Callable[[int], Any]
    widths: tuple[int, ...]
    arguments: dict[str, Any]


def _to_check(options: CoordCheckOptions) -> _Checked:
    """The model with concrete inputs; refuses one that cannot be checked, before any training."""
    key = jax.random.key(0)
    known = BUILTIN.get(options.model)
    widths = tuple(sorted(set(options.widths or (known or BUILTIN["mlp"]).widths)))
    if len(widths) < 2 or widths[0] < 1:
        raise ConfigError(where="widths", expected="at least two different positive numbers", got=widths)
    check_arguments({"base_width": COUNT | NONE}, {"base_width": options.base_width})
    if known is not None and options.inputs:
        raise ConfigError(
            where="inputs", expected=f"none for {options.model}, which has its own", got=options.inputs
        )
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
        # The check itself reports it again.
        warnings.simplefilter("ignore", MujaxWarning)
        mup = traced(options.model, model, base, inputs, parametrization=options.parametrization)
    return _Checked(
        options.model,
        lambda width: build_model(options.model, factory, width)[0],
        widths,
        {"inputs": made_up_inputs(inputs, mup, key)},
    )


def run(options: CoordCheckOptions) -> int:
    """Checks, prints and draws; 0 if the check passes and 1 if not."""
    from rich.console import Console

    plot = importlib.import_module("mujax.plot")
    check_arguments({"steps": COUNT, "seeds": COUNT}, {"steps": options.steps, "seeds": options.seeds})
    optimizer_by_name(options.optimizer)
    rules.parametrization(options.parametrization)
    subject = _to_check(options)
    out = options.out or pathlib.Path(f"coord-check-{as_folder(options.model)}")
    make_folder(out)
    asked = options.parametrization
    names = (asked,) if options.alone else (asked, "mup" if asked == "sp" else "sp")
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
    _print_check(output(), reports)
    print(f"\nWritten: {out / REPORT}, {out / PICTURE}")
    return 0 if reports[asked] else 1


def _write_report(path: pathlib.Path, options: CoordCheckOptions, reports: dict[str, CoordCheck]) -> None:
    report = {
        "model": options.model,
        "optimizer": options.optimizer,
        "parametrization": options.parametrization,
        "verdict": reports[options.parametrization].verdict,
        "checks": {name: json.loads(check.to_json()) for name, check in reports.items()},
    }
    write_aside(path, json.dumps(report, indent=1, allow_nan=False) + "\n")


_STATUS_STYLES: Final = {"pass": "green", "fail": "bold red", "undecided": "yellow"}


def _print_check(console: Console, reports: dict[str, CoordCheck]) -> None:
    (parametrization, check), *others = reports.items()
    rows = []
    for tap in check.taps:
        inherited = tap.status == "fail" and not tap.blamed
        style = "dim" if inherited else "" if tap.status == "pass" else _STATUS_STYLES[tap.status]
        rows.append((_cells(tap, "inherited" if inherited else tap.status), style))
    headings = ("tap", "status", "quantity", "exponent of width", "allowed")
    print_table(console, parametrization_title(parametrization), headings, rows)
    console.print(check.headline(), style=_STATUS_STYLES[check.verdict], highlight=False, soft_wrap=True)
    for line in check.explained():
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for name, other in others:
        comparison = f"\n{parametrization_title(name)}, for comparison: {other.headline()}"
        console.print(comparison, style="dim", highlight=False, markup=False, soft_wrap=True)


def _cells(tap: TapReport, status: str) -> tuple[str, ...]:
    worst = tap.worst
    if worst is None:
        return tap.name, status, "", "", ""
    allowed = f"{worst.allowed[0]:+.2f} to {worst.allowed[1]:+.2f}"
    if worst.slope is None:
        return tap.name, status, worst.quantity, worst.note, allowed
    reach = worst.slope.high - worst.slope.value
    return tap.name, status, worst.quantity, f"{worst.slope.value:+.2f} ± {reach:.2f}", allowed
