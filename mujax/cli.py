"""The command `mujax`: reads arguments, shows progress, prints tables. All the work is done elsewhere.

Exit codes: 0 for success, 1 for a check that did not pass, 2 for bad input (one sentence on stderr), 130
after Ctrl-C.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import math
import pathlib
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import jax
import jax.numpy as jnp

from mujax import models, rules
from mujax.builtin import BUILTIN, made_up
from mujax.coord_check import CheckProgress, CoordCheck, TapReport, coord_check
from mujax.errors import ConfigError, MujaxError, MujaxWarning
from mujax.init import MupModel, mup_init
from mujax.optim import optimizer as optimizer_by_name
from mujax.transfer import (
    LOSS_MEASURE,
    OPTIMIZERS,
    REPORT,
    RUNS,
    TASKS,
    Progress,
    Report,
    TransferConfig,
    parametrization_title,
    transfer,
)

if TYPE_CHECKING:
    from rich.console import Console

PICTURE: Final = "transfer.png"
CHECK_PICTURE: Final = "coord_check.png"
CHECK_REPORT: Final = "coord_check.json"

# What the extra `cli` brings and only the command needs. tyro and rich are imported where they are used, so
# that a missing one is reported in a sentence; annotations are strings until tyro reads them.
_EXTRA: Final = ("tyro", "rich", "matplotlib")

# ---- arguments ------------------------------------------------------------------------------------------


def _default(field: str) -> str:
    """The default of an option that depends on the task, for the help text."""
    values = {name: getattr(TransferConfig.for_task(name), field) for name in TASKS}
    shown = {
        name: " ".join(f"{entry:g}" for entry in value) if isinstance(value, tuple) else value
        for name, value in values.items()
    }
    return "(default: " + ", ".join(f"{value} for {name}" for name, value in shown.items()) + ")"


def _default_widths() -> str:
    shown = (f"{' '.join(map(str, entry.widths))} for {name}" for name, entry in BUILTIN.items())
    return f"(default: {', '.join(shown)}; as for mlp else)"


def _option(metavar: str, text: str, default: str | None = None) -> Any:
    from tyro.conf import arg

    return arg(metavar=metavar, help=text, help_behavior_hint=default)


def _numbers(kind: type[int] | type[float], many: bool = False) -> Any:
    """How tyro reads one number or several: with an error that says what was expected."""
    from tyro.constructors import PrimitiveConstructorSpec

    expected = "a whole number" if kind is int else "a number"

    def read(arguments: list[str]) -> Any:
        # Between several both spaces and commas.
        words = " ".join(arguments).replace(",", " ").split() if many else arguments
        try:
            values = tuple(kind(word) for word in words)
        except ValueError:
            raise ValueError(f"expected {expected}, got {' '.join(arguments)!r}") from None
        return values if many else values[0]

    return PrimitiveConstructorSpec(
        nargs="*" if many else 1,
        metavar="N",
        instance_from_str=read,
        is_instance=lambda _: True,
        str_from_instance=lambda value: [str(value)],
    )


def _positional() -> Any:
    from tyro.conf import Positional

    return Positional


@dataclasses.dataclass(frozen=True)
class _Transfer:
    """Tune the learning rate on a small model and train larger ones with it, on real data.

    Sweeps the learning rate at every width, in µP and in standard parametrization, and shows which of the two
    lets the small model's best one be used at every width. Writes runs.csv, report.json and transfer.png.
    Interrupt it at any time: the same command goes on where it stopped.
    """

    task: Annotated[str, _option("NAME", f"What to train: {' or '.join(TASKS)}.")] = "mnist-mlp"
    text: Annotated[
        pathlib.Path | None, _option("FILE", "Text for text-transformer.", "(default: the KJV)")
    ] = None
    widths: Annotated[
        tuple[int, ...] | None, _numbers(int, many=True), _option("N ...", "Widths.", _default("widths"))
    ] = None
    base_width: Annotated[
        int | None,
        _numbers(int),
        _option("N", "Width of the proxy, where the rate is tuned.", "(default: the smallest width)"),
    ] = None
    log2_lrs: Annotated[
        tuple[float, ...] | None,
        _numbers(float, many=True),
        _option("X ...", "Learning rates, as powers of two.", _default("log2_lrs") + " with adam"),
    ] = None
    seeds: Annotated[int | None, _numbers(int), _option("N", "Number of seeds.", _default("seeds"))] = None
    seed: Annotated[int, _numbers(int), _option("N", "The first of them.")] = 0
    steps: Annotated[int | None, _numbers(int), _option("N", "Steps of a run.", _default("steps"))] = None
    batch: Annotated[int | None, _numbers(int), _option("N", "Examples a step.", _default("batch"))] = None
    optimizer: Annotated[str, _option("NAME", f"One of {', '.join(OPTIMIZERS)}.")] = "adam"
    momentum: Annotated[float, _numbers(float), _option("X", "Momentum of sgd.")] = 0.9
    parametrizations: Annotated[
        tuple[str, ...], _option("NAME ...", "Any of sp, mup, table3, table9.", "(default: sp mup)")
    ] = ("sp", "mup")
    out: Annotated[
        pathlib.Path | None, _option("DIR", "Folder for the results.", "(default: transfer-TASK)")
    ] = None
    quick: Annotated[bool, _option("", "A smoke run: few widths, rates, steps; one seed.")] = False


@dataclasses.dataclass(frozen=True)
class _Explain:
    """Print what mujax reads off a model: the role of every parameter and what it does about it."""

    model: Annotated[
        str,
        _positional(),
        _option("MODEL", f"{', '.join(models.BUILD)}, or package.module:factory of your own."),
    ]
    width: Annotated[int, _numbers(int), _option("N", "Width of the target.")]
    base_width: Annotated[int, _numbers(int), _option("N", "Width of the base.")]
    parametrization: Annotated[str, _option("NAME", "One of mup, table3, table9, sp.")] = "mup"
    inputs: Annotated[
        tuple[str, ...],
        _option("SHAPE ...", "Inputs, such as 8x784 or 8x64:int32, where the factory gives none.", ""),
    ] = ()


@dataclasses.dataclass(frozen=True)
class _CoordCheck:
    """Check by training that nothing in a model depends on its width, and name what breaks the rules.

    Trains the model at several widths for a few steps, in the parametrization asked for and in another one
    for comparison. Writes coord_check.json and coord_check.png. Exit code 0 if the check passes, 1 if not.
    """

    model: Annotated[
        str,
        _positional(),
        _option("MODEL", f"{', '.join(BUILTIN)}, or package.module:factory of your own."),
    ]
    widths: Annotated[
        tuple[int, ...] | None,
        _numbers(int, many=True),
        _option("N ...", "Widths.", _default_widths()),
    ] = None
    base_width: Annotated[
        int | None, _numbers(int), _option("N", "Width of the base.", "(default: the smallest width)")
    ] = None
    optimizer: Annotated[str, _option("NAME", "optax's name of an optimizer.")] = "adam"
    parametrization: Annotated[str, _option("NAME", "One of mup, table3, table9, sp.")] = "mup"
    log2_lrs: Annotated[
        tuple[float, ...] | None,
        _numbers(float, many=True),
        _option("X ...", "Learning rates, as powers of two.", "(default: two large ones)"),
    ] = None
    steps: Annotated[int, _numbers(int), _option("N", "Steps of a run.")] = 6
    seeds: Annotated[int, _numbers(int), _option("N", "Number of seeds: the repeats.")] = 4
    inputs: Annotated[
        tuple[str, ...],
        _option("SHAPE ...", "Inputs, such as 8x784 or 8x64:int32, where the factory gives none.", ""),
    ] = ()
    alone: Annotated[bool, _option("", "Check no other parametrization for comparison.")] = False
    out: Annotated[
        pathlib.Path | None, _option("DIR", "Folder for the results.", "(default: coord-check-MODEL)")
    ] = None


def _parse(argv: Sequence[str] | None) -> _Transfer | _Explain | _CoordCheck:
    import tyro

    commands = {"transfer": _Transfer, "explain": _Explain, "coord-check": _CoordCheck}
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.extras.subcommand_cli_from_dict(
                commands,
                prog="mujax",
                description="µP and hyperparameter transfer for JAX.",
                args=argv,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if stop.code:
            raise ConfigError(_one_line(printed.getvalue())) from None
        raise


def _one_line(message: str) -> str:
    """What tyro's box says under its title, up to the first rule, as one sentence."""
    paragraphs: list[list[str]] = [[]]
    for line in message.replace("│", " ").splitlines():
        if re.fullmatch(r"\s*(╭.*|-{5,}|─{5,})\s*", line):
            paragraphs.append([])
        # Help texts are indented by ten, the options that they are about by less.
        elif not line.startswith(" " * 10):
            paragraphs[-1] += line.split()
    # Without Unicode the title is a paragraph of its own, else it is part of the frame.
    said = next((words for words in paragraphs[1:] if words), ["wrong arguments"])
    return f"{' '.join(said).rstrip('.')}; see mujax --help."


# ---- mujax transfer -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _progress_display(console: Console) -> Iterator[Callable[[Progress], None]]:
    """A bar with the time left on a terminal, a line for each width elsewhere."""
    from rich import progress as rich_progress

    if not console.is_terminal:
        seen: set[tuple[str, int]] = set()

        def print_line(now: Progress) -> None:
            if (now.parametrization, now.width) not in seen:
                seen.add((now.parametrization, now.width))
                where = f"{now.parametrization}, width {now.width}"
                print(f"{where}: {now.done} of {now.total} runs done", file=console.file, flush=True)

        yield print_line
        return
    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(bar_width=None),
        rich_progress.TextColumn("{task.fields[runs]}"),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TextColumn("left"),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=console, transient=True, speed_estimate_period=60) as bar:
        task = bar.add_task("reading data", total=1.0, runs="")

        def advance(now: Progress) -> None:
            bar.update(
                task,
                completed=now.work_done,
                description=f"{now.parametrization}, width {now.width}",
                runs=f"{now.done}/{now.total} runs",
            )

        yield advance


@contextlib.contextmanager
def _gentle_interrupts() -> Iterator[Callable[[], None]]:
    """Ctrl-C waits for the run under way; a second one does not. Yields the check for a waiting one.

    An exception that strikes inside of a callback of JAX's garbage collection is dropped by Python with a
    traceback on stderr, and the sweep would go on.
    """
    waiting = False

    def interrupt(*_: object) -> None:
        nonlocal waiting
        if waiting:
            raise KeyboardInterrupt
        waiting = True

    def check() -> None:
        if waiting:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


def _config(options: _Transfer) -> TransferConfig:
    folder = f"transfer-{options.task}" + ("-quick" if options.quick else "")
    given: dict[str, Any] = {
        field.name: getattr(options, field.name) for field in dataclasses.fields(options)
    }
    given["out"] = options.out or pathlib.Path(folder)
    return TransferConfig.for_task(**given)


def _run_transfer(options: _Transfer) -> None:
    from rich.console import Console

    # Imported before the sweep and not after it: a missing matplotlib must not show at the very end.
    plot = importlib.import_module("mujax.plot")
    config = _config(options)
    assert config.out is not None
    done = 0

    def count(now: Progress) -> None:
        nonlocal done
        done = now.done
        show(now)
        check()

    try:
        with _gentle_interrupts() as check, _progress_display(Console(stderr=True)) as show:
            report = transfer(config, progress=count)
    except KeyboardInterrupt:
        raise _StoppedError(
            f"interrupted; {done} runs are stored in {config.out / RUNS}, the same command goes on there."
        ) from None
    plot.plot_transfer(report, config.out / PICTURE)
    console = Console()
    for name in config.parametrizations:
        _print_table(console, report, name)
    console.print(f"Losses: {LOSS_MEASURE}.\n", highlight=False, markup=False)
    for name in config.parametrizations:
        console.print(_verdict(report, name), highlight=False, markup=False)
    if options.quick:
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


# ---- mujax explain --------------------------------------------------------------------------------------


def _factory(name: str) -> Callable[[int], Any]:
    if name in models.BUILD:
        return models.BUILD[name]
    module_name, _, attribute = name.partition(":")
    if not attribute:
        raise ConfigError(
            f"MODEL: expected one of {', '.join(models.BUILD)} or package.module:factory, got {name!r}."
        )
    # The console script's folder is first on the path, not the user's; `python -m` has it already.
    if "" not in sys.path and str(pathlib.Path.cwd()) not in sys.path:
        sys.path.insert(0, str(pathlib.Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(
            f"MODEL: expected a module {module_name!r} that can be imported from here, got {_said(error)}."
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        found = "no such name" if factory is None else f"an object of type {type(factory).__name__}"
        raise ConfigError(
            f"MODEL: expected {attribute!r} in {module_name!r} to be a function of the width, found {found}."
        )
    return factory


def _said(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _build(name: str, factory: Callable[[int], Any], width: int) -> tuple[Any, tuple[Any, ...] | None]:
    """The model and its inputs, if the factory gives any."""
    try:
        made = factory(width)
    except MujaxError:
        raise
    except Exception as error:
        raise ConfigError(f"MODEL: expected {name} to build width {width}, got {_said(error)}.") from error
    if not isinstance(made, tuple):
        return made, None
    if len(made) != 2:
        raise ConfigError(
            f"MODEL: expected {name} to return the module or (module, inputs), got {len(made)} values."
        )
    model, inputs = made
    return model, tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)


def _input(text: str) -> jax.ShapeDtypeStruct:
    shape, _, dtype = text.partition(":")
    try:
        sizes = tuple(int(size) for size in shape.split("x"))
        if any(size < 1 for size in sizes):
            raise ValueError
        return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype or "float32"))
    except (TypeError, ValueError):
        raise ConfigError(f"inputs: expected a shape such as 8x784 or 8x64:int32, got {text!r}.") from None


def _inputs(name: str, said: Sequence[str], given: tuple[Any, ...] | None) -> tuple[Any, ...]:
    if said:
        return tuple(map(_input, said))
    if given is None:
        raise ConfigError(
            f"MODEL: expected inputs to trace {name} with, got the module only; "
            "return (module, inputs) or say --inputs, for instance --inputs 8x784."
        )
    return given


def _traced(name: str, model: Any, base: Any, inputs: tuple[Any, ...], **options: Any) -> MupModel:
    try:
        return mup_init(model, base, *inputs, **options)
    except MujaxError:
        raise
    except Exception as error:
        raise ConfigError(f"MODEL: expected {name} to run on its inputs, got {_said(error)}.") from error


def _run_explain(options: _Explain) -> None:
    for name in ("width", "base_width"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name}: expected at least 1, got {getattr(options, name)}.")
    factory = _factory(options.model)
    model, inputs = _build(options.model, factory, options.width)
    base, _ = _build(options.model, factory, options.base_width)
    inputs = _inputs(options.model, options.inputs, inputs)
    # At the base's own width nothing differs: a third width tells what is infinite.
    delta = (
        _build(options.model, factory, 2 * options.base_width)[0]
        if options.width == options.base_width
        else None
    )
    mup = _traced(options.model, model, base, inputs, delta=delta, parametrization=options.parametrization)
    print(mup.explain())


# ---- mujax coord-check ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _check_display(console: Console) -> Iterator[Callable[[str, float], None]]:
    """What is under way and the share of the work that is done: a bar on a terminal, else a line for each."""
    from rich import progress as rich_progress

    if not console.is_terminal:
        begun, last = time.monotonic(), ""

        def print_line(doing: str, share: float) -> None:
            nonlocal last
            if doing != last:
                last = doing
                left = f", about {_seconds_left(begun, share)} left" if share else ""
                print(f"{doing}: {share:.0%} done{left}", file=console.file, flush=True)

        yield print_line
        return
    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(bar_width=None),
        rich_progress.TaskProgressColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TextColumn("left"),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=console, transient=True, speed_estimate_period=600) as bar:
        task = bar.add_task("reading the model", total=1.0)
        yield lambda doing, share: bar.update(task, completed=share, description=doing)


def _seconds_left(begun: float, share: float) -> str:
    seconds = (time.monotonic() - begun) * (1 - share) / share
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


@dataclasses.dataclass(frozen=True)
class _Checked:
    """What is to be checked, on what."""

    title: str
    factory: Callable[[int], Any]
    widths: tuple[int, ...]
    arguments: dict[str, Any]


def _to_check(options: _CoordCheck) -> _Checked:
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
    factory = _factory(options.model)
    base, given = _build(options.model, factory, widths[0])
    model, _ = _build(options.model, factory, widths[1])
    inputs = _inputs(options.model, options.inputs, given)
    with warnings.catch_warnings():
        # The check itself says it again.
        warnings.simplefilter("ignore", MujaxWarning)
        mup = _traced(options.model, model, base, inputs, parametrization=options.parametrization)
    return _Checked(
        options.model,
        lambda width: _build(options.model, factory, width)[0],
        widths,
        {"inputs": made_up(inputs, mup, key)},
    )


def _run_coord_check(options: _CoordCheck) -> int:
    from rich.console import Console

    plot = importlib.import_module("mujax.plot")
    for name in ("steps", "seeds"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name}: expected at least 1, got {getattr(options, name)}.")
    optimizer_by_name(options.optimizer)
    rules.parametrization(options.parametrization)
    subject = _to_check(options)
    out = options.out or pathlib.Path(f"coord-check-{options.model.replace(':', '.')}")
    _make_folder(out)
    chosen = options.parametrization
    names = (chosen,) if options.alone else (chosen, "mup" if chosen == "sp" else "sp")
    try:
        with _gentle_interrupts() as check, _check_display(Console(stderr=True)) as show:
            reports = {}
            for number, name in enumerate(names):

                def count(now: CheckProgress, name: str = name, number: int = number) -> None:
                    if now.done < now.total:
                        show(f"{name}, {now.doing}", (number + now.work_done) / len(names))
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
        raise _StoppedError("interrupted; nothing was written.") from None
    _write_report(out / CHECK_REPORT, options, reports)
    # Standard parametrization above, as in the paper's figures.
    rows = [reports[name] for name in sorted(names, key=lambda name: name != "sp")]
    plot.plot_coord_check(rows, out / CHECK_PICTURE, title=f"{subject.title}, {options.optimizer}")
    _print_check(Console(), reports)
    print(f"\nWritten: {out / CHECK_REPORT}, {out / CHECK_PICTURE}")
    return 0 if reports[chosen] else 1


def _make_folder(folder: pathlib.Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"out: expected a folder to write to, found that {folder} is not ({error}); take another."
        ) from error


def _write_report(path: pathlib.Path, options: _CoordCheck, reports: dict[str, CoordCheck]) -> None:
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


# ---- main -----------------------------------------------------------------------------------------------


class _StoppedError(Exception):
    """Ctrl-C, with what to say about it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: arguments after the command's name; by default those of the process.

    Returns:
        The exit code.
    """
    try:
        options = _parse(argv)
        if isinstance(options, _Transfer):
            _run_transfer(options)
        elif isinstance(options, _CoordCheck):
            return _run_coord_check(options)
        else:
            _run_explain(options)
    except SystemExit as stop:
        return int(stop.code or 0)
    except _StoppedError as stopped:
        return _fail(str(stopped), 130)
    except KeyboardInterrupt:
        return _fail("interrupted.", 130)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA:
            raise
        return _fail(f'the command needs the package {package}; pip install "mujax-mup[cli]".', 2)
    except (MujaxError, OSError) as error:
        return _fail(str(error), 2)
    return 0


def _fail(sentence: str, code: int) -> int:
    print(f"mujax: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
