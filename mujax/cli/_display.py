"""Terminal output while a command runs and when it ends: progress, numbers, errors, Ctrl-C."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from mujax.errors import ConfigError, MujaxWarning

if TYPE_CHECKING:
    from rich.console import Console


class StoppedError(Exception):
    """Ctrl-C, with what to say about it."""


class Show(Protocol):
    """Takes what is under way, the share of the work that is done, and more to say about it."""

    def __call__(self, doing: str, share: float, detail: str = "") -> None: ...


@dataclasses.dataclass(frozen=True)
class Display:
    """What is shown while something runs.

    Attributes:
        show: shows how far it is.
        say: prints a sentence that a person should know.
    """

    show: Show
    say: Callable[[str], None]


@contextlib.contextmanager
def display(console: Console, doing: str) -> Iterator[Display]:
    """A bar with the time left on a terminal, elsewhere a line for each thing done.

    Args:
        console: where to show it.
        doing: what is done before there is anything to show.
    """

    def say(sentence: str) -> None:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    shown = _bar(console, doing) if console.is_terminal else _lines(console)
    with _warnings_said(say), shown as show:
        yield Display(show, say)


@contextlib.contextmanager
def _warnings_said(say: Callable[[str], None]) -> Iterator[None]:
    """What mujax warns of as a sentence, without the place in mujax's own code."""
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
def _bar(console: Console, doing: str) -> Iterator[Show]:
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
def _lines(console: Console) -> Iterator[Show]:
    begun, last = time.monotonic(), ""
    first: float | None = None

    def show(doing: str, share: float, detail: str = "") -> None:
        nonlocal last, first
        # What was done before, by an earlier call or by others, tells nothing of how fast this one is.
        first = share if first is None else first
        if doing != last:
            last = doing
            more = f", {detail}" if detail else ""
            left = f", about {seconds_left(begun, share, first)} left" if share > first else ""
            print(f"{doing}: {share:.0%} done{more}{left}", file=console.file, flush=True)

    yield show


def seconds_left(begun: float, share: float, first: float = 0.0) -> str:
    """The time left in words.

    Args:
        begun: when, by the monotonic clock.
        share: of the work that is done.
        first: of the work that was done then.
    """
    seconds = (time.monotonic() - begun) * (1 - share) / (share - first)
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


@contextlib.contextmanager
def gentle_interrupts() -> Iterator[Callable[[], None]]:
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


def fail(sentence: str, code: int) -> int:
    """Says why on stderr and gives the exit code back."""
    print(f"mujax: {sentence}", file=sys.stderr)
    return code


# ---- folders and files ----------------------------------------------------------------------------------


def make_folder(folder: pathlib.Path) -> None:
    """Makes the folder of the results before there are any.

    Raises:
        ConfigError: it can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"out: expected a folder to write to, found that {folder} is not ({error}); take another."
        ) from error


def as_folder(name: str) -> str:
    """A name as part of a folder's."""
    return re.sub(r"[^\w.-]+", ".", name)


def write_aside(path: pathlib.Path, content: str | Callable[[pathlib.Path], None]) -> None:
    """Writes a file aside and moves it, so that there is never half of it.

    Args:
        path: where it ends.
        content: the text, or what writes it.
    """
    aside = path.with_name(f"{path.stem}.part{path.suffix}")
    if isinstance(content, str):
        aside.write_text(content, encoding="utf-8")
    else:
        content(aside)
    aside.replace(path)


# ---- numbers --------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 4) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def shown(value: Any) -> str:
    """A hyperparameter's value, short."""
    if not isinstance(value, float):
        return str(value)
    if value > 0 and math.log2(value) == round(math.log2(value)) and not 0.1 < value < 100:
        return f"2^{math.log2(value):.0f}"
    return f"{value:.3g}"


def operations(flops: float | None) -> str:
    """A number of floating-point operations."""
    return "unknown" if flops is None else re.sub(r"e\+0*", "e", f"{flops:.3g} FLOPs")
