"""Terminal output while a command runs and when it ends: progress, numbers, errors, Ctrl-C."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import io
import math
import os
import pathlib
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from mujax.cli._cache import compiled_programs_kept
from mujax.errors import ConfigError, MujaxWarning

if TYPE_CHECKING:
    from rich.console import Console


class StoppedError(Exception):
    """Ctrl-C, with the sentence to print."""


class Reporter(Protocol):
    """Takes the present activity, the share of the work that is done, and details."""

    def __call__(self, doing: str, share: float, detail: str = "") -> None: ...


@dataclasses.dataclass(frozen=True)
class Display:
    """What is shown while a command runs.

    Attributes:
        show: shows the progress.
        say: prints a sentence for the user.
    """

    show: Reporter
    say: Callable[[str], None]


@contextlib.contextmanager
def display(console: Console, doing: str) -> Iterator[Display]:
    """A bar with the time left on a terminal, elsewhere a line for each activity.

    Meanwhile compiled programs are kept for later commands.

    Args:
        console: where to show it.
        doing: the first activity.
    """

    def say(sentence: str) -> None:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    shown = _bar(console, doing) if console.is_terminal else _lines(console)
    with _warnings_printed(say), compiled_programs_kept(say), shown as show:
        yield Display(show, say)


@contextlib.contextmanager
def _warnings_printed(say: Callable[[str], None]) -> Iterator[None]:
    """Prints warnings of mujax as a sentence, without the place in mujax's own code."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Any, category: type[Warning], *args: Any, **kwargs: Any) -> None:
            if issubclass(category, MujaxWarning):
                say(str(message))
            else:
                usual(message, category, *args, **kwargs)

        warnings.showwarning = show
        yield


@contextlib.contextmanager
def _bar(console: Console, doing: str) -> Iterator[Reporter]:
    from rich import progress as rich_progress

    columns = (
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(bar_width=None),
        rich_progress.TaskProgressColumn(),
        rich_progress.TextColumn("{task.fields[detail]}", markup=False),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TextColumn("left"),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=console, transient=True, speed_estimate_period=600) as bar:
        task = bar.add_task(doing, total=1.0, detail="")

        def show(doing: str, share: float, detail: str = "") -> None:
            bar.update(task, completed=share, description=doing, detail=detail)

        yield show


@contextlib.contextmanager
def _lines(console: Console) -> Iterator[Reporter]:
    started, last = time.monotonic(), ""
    first: float | None = None

    def show(doing: str, share: float, detail: str = "") -> None:
        nonlocal last, first
        # What an earlier call or another worker has done does not show how fast this one is.
        first = share if first is None else first
        if doing != last:
            last = doing
            more = f", {detail}" if detail else ""
            left = f", about {seconds_left(started, share, first)} left" if share > first else ""
            print(f"{doing}: {share:.0%} done{more}{left}", file=console.file, flush=True)

    yield show


def seconds_left(started: float, share: float, first: float = 0.0) -> str:
    """The time left in words.

    Args:
        started: the start, by the monotonic clock.
        share: of the work that is done.
        first: share that was done at the start.
    """
    seconds = (time.monotonic() - started) * (1 - share) / (share - first)
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


# ---- how the process ends --------------------------------------------------------------------------------

# A preempted job gets SIGTERM: it stores what there is, as after Ctrl-C.
_INTERRUPTS: Final = (signal.SIGINT, signal.SIGTERM)

# The exit code of a command whose reader has closed the pipe, as if SIGPIPE had ended it.
CLOSED_PIPE: Final = 141


@contextlib.contextmanager
def on_signals(handler: Callable[..., Any], *signals: signal.Signals) -> Iterator[None]:
    """Handles signals, which only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


@contextlib.contextmanager
def gentle_interrupts(*, sigterm: bool = True) -> Iterator[Callable[[], None]]:
    """Ctrl-C and SIGTERM wait for the run under way; a second one does not.

    Yields a function that raises the waiting one. An exception inside of a callback of JAX's garbage
    collection would be dropped by Python with a traceback on stderr, and the command would continue.
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

    # On several processes JAX's preemption service has SIGTERM: a handler of Python's would take it away.
    with on_signals(interrupt, *(_INTERRUPTS if sigterm else (signal.SIGINT,))):
        yield check


@contextlib.contextmanager
def terminal() -> Iterator[None]:
    """SIGTERM is KeyboardInterrupt, and characters that stdout or stderr cannot encode are replaced."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    codecs.register_error(_REPLACED, _replaced)
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors=_REPLACED)
    try:
        with on_signals(interrupt, signal.SIGTERM):
            yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            with contextlib.suppress(BrokenPipeError, ValueError):
                stream.reconfigure(errors=errors)


_REPLACED: Final = "mujax.replaced"
_ASCII: Final[Mapping[str, str]] = {
    **{"µ": "u", "μ": "u", "±": "+-", "×": "x", "−": "-", "–": "-", "…": "...", "σ": "sigma", "ε": "eps"},
    **{"│": "|", "─": "-", "━": "-", "≤": "<=", "≥": ">=", "²": "^2", "’": "'", "→": "->", "•": "*"},
}


def _replaced(error: UnicodeError) -> tuple[str | bytes, int]:
    """ASCII for the characters that a stream's encoding does not have: a handler for `codecs`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_ASCII.get(one, "?") for one in error.object[error.start : error.end]), error.end


def end_quietly() -> int:
    """Drops what is left to print, since the reader has closed the pipe; returns the exit code."""
    with contextlib.suppress(OSError, ValueError):
        # Python flushes stdout at its end, and would print a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return CLOSED_PIPE


def fail(sentence: str, code: int) -> int:
    """Prints an error on stderr; returns the exit code."""
    print(f"mujax: {sentence}", file=sys.stderr)
    return code


# ---- tables ----------------------------------------------------------------------------------------------


def output() -> Console:
    """The console of the results: 120 columns or more into a file, COLUMNS where that is set."""
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            # rich would end the process with 1, which is the code of a check that fails.
            raise BrokenPipeError

    console = Output()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = max(console.width, 120)
    return console


def print_table(
    console: Console,
    title: str,
    headings: Sequence[str],
    rows: Sequence[tuple[Sequence[str], str]],
    *,
    right: bool = False,
) -> None:
    """Prints a table; one that is too wide is printed in parts, each with the first column, never cut.

    Args:
        console: where.
        title: stands above the first part.
        headings: of the columns.
        rows: the cells of each row, and its style.
        right: cells are aligned to the right.
    """
    from rich import box
    from rich.table import Table

    def part(columns: Sequence[int], title: str | None) -> Table:
        # All of the default space of `mujax tune` in 80 columns.
        table = Table(
            title=title,
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        for column in columns:
            is_name = column == 0 and not right
            table.add_column(
                headings[column],
                justify="right" if right else "left",
                no_wrap=not is_name,
                overflow="fold",
                max_width=max(8, console.width // 2) if is_name else None,
            )
        for cells, style in rows:
            table.add_row(*(cells[column] for column in columns), style=style)
        return table

    unbounded = console.options.update(max_width=100_000)
    parts: list[list[int]] = []
    for column in range(1, len(headings)):
        longer = [*(parts[-1] if parts else [0]), column]
        if not parts or console.measure(part(longer, None), options=unbounded).maximum > console.width:
            parts.append([0, column])
        else:
            parts[-1] = longer
    for number, columns in enumerate(parts):
        console.print(part(columns, title if number == 0 else None))


# ---- folders and files ----------------------------------------------------------------------------------


def make_folder(folder: pathlib.Path) -> None:
    """Creates the folder of the results.

    Raises:
        ConfigError: it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            where="out", expected="a folder to write to", got=f"{folder} ({error})", remedy="take another"
        ) from error


def as_folder(name: str) -> str:
    """A name as part of a folder's name."""
    return re.sub(r"[^\w.-]+", ".", name)


def write_aside(path: pathlib.Path, content: str | Callable[[pathlib.Path], None]) -> None:
    """Writes a file under another name and moves it, so that it is never there in part.

    Args:
        path: its place in the end.
        content: the text, or a function that writes it to a path.
    """
    aside = path.with_name(f"{path.stem}.part{path.suffix}")
    if isinstance(content, str):
        aside.write_text(content, encoding="utf-8")
    else:
        content(aside)
    aside.replace(path)


# ---- numbers --------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 4) -> str:
    """A number, or a dash for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def shown(value: Any) -> str:
    """A hyperparameter's value in few characters: powers of two as such."""
    if not isinstance(value, float):
        return str(value)
    if value > 0 and math.log2(value) == round(math.log2(value)) and not 0.1 < value < 100:
        return f"2^{math.log2(value):.0f}"
    return f"{value:.3g}"


def operations(flops: float | None) -> str:
    """A number of floating-point operations."""
    return "unknown" if flops is None else re.sub(r"e\+0*", "e", f"{flops:.3g} FLOPs")
