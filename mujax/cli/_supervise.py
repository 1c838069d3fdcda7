"""Runs one process of several in a child, and says in a sentence that another one has ended.

JAX ends a process whose fellow is lost from a thread of its own, with a stack trace that no code in it can
catch, and its clean end waits for the lost one. So the command starts itself again and only watches:
it forwards signals, and translates such an end.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from mujax.cli._display import on_signals
from mujax.errors import ProcessError

_SECONDS_TO_END: Final = 5.0
"""How long a child that has failed may take to end: it may wait for processes that are gone."""

# How JAX's distributed service names itself, in all its messages of another process's end.
_LOST: Final = re.compile(r"distributed service|coordination service|coordination agent|heartbeat", re.I)

_START: Final = (
    "import json, sys; path, *rest = json.loads(sys.argv[1]); sys.path[:] = path; "
    "from mujax.cli import main; from mujax.cli._supervise import child; child(main, *rest)"
)

_is_child = False


def supervised() -> bool:
    """Whether this process is the child of one that watches it."""
    return _is_child


def child(
    main: Callable[[Sequence[str]], int], life: int, said: int, errors: int, words: Sequence[str]
) -> None:
    """The child: runs the command and says its exit code before Python and JAX end.

    Args:
        main: runs the command.
        life: a pipe that is closed when the parent ends.
        said: the pipe to write the exit code to.
        errors: where stderr goes. What is written to the process's own stderr, JAX's C++ does, is read by the
            parent.
        words: the command.
    """
    global _is_child
    _is_child = True
    for each in (life, said, errors):
        os.set_inheritable(each, False)
    threading.Thread(target=_end_with, args=(life,), daemon=True).start()
    # What libraries say when they fail, Orbax's threads do, goes with what JAX says. Absl would add a handler
    # for stderr as it is by then.
    logging.basicConfig(stream=sys.__stderr__, format="%(message)s")
    threading.excepthook = _on_stderr
    sys.stderr = os.fdopen(errors, "w", buffering=1, errors="backslashreplace")
    try:
        code = main(words)
    except BaseException as error:
        traceback.print_exception(error)
        code = 1
    os.write(said, bytes([code]))
    sys.exit(code)


def _on_stderr(failed: threading.ExceptHookArgs) -> None:
    if failed.exc_value is not None:
        traceback.print_exception(failed.exc_value, file=sys.__stderr__)


def _end_with(life: int) -> None:
    os.read(life, 1)
    os.kill(os.getpid(), signal.SIGKILL)


def supervise(words: Sequence[str], folder: str | os.PathLike[str] | None) -> int:
    """Runs the command in a child.

    Args:
        words: the command.
        folder: of its checkpoints.

    Returns:
        The exit code: the child's own, or 2 where JAX ended it because another process has ended.

    Raises:
        ProcessError: another process has ended.
    """
    alive, life = os.pipe()
    heard, said = os.pipe()
    errors = os.dup(2)
    given = json.dumps([sys.path, alive, said, errors, list(words)])
    with tempfile.TemporaryFile() as noise:
        running = subprocess.Popen(
            [sys.executable, "-c", _START, given],
            stderr=noise,
            pass_fds=(alive, said, errors),
            # Ctrl-C reaches it once: from here.
            process_group=0,
        )
        for each in (alive, said, errors):
            os.close(each)
        try:
            with _forwarded(running):
                code, end = _end_of(running, heard)
        finally:
            os.close(life)
            os.close(heard)
        noise.seek(0)
        text = noise.read().decode(errors="replace")
    if code is not None:
        # After a sentence nothing else is said, which would be that the others are gone.
        sys.stderr.write(text if code == end != 2 else "")
        return code
    if _LOST.search(text):
        start = "start all of them again"
        raise ProcessError(
            where="processes",
            expected="all of them to train to the end",
            got="another one that has ended, or that cannot be reached",
            remedy=start if folder is None else f"{start}; they go on from the last checkpoint in {folder}",
        )
    sys.stderr.write(text)
    return end if end >= 0 else 128 - end


def _end_of(running: subprocess.Popen[bytes], heard: int) -> tuple[int | None, int]:
    """The exit code that a child said, None if it did not come to that, and the one it ended with."""
    said = os.read(heard, 1)
    code = said[0] if said else None
    try:
        return code, running.wait(_SECONDS_TO_END if code else None)
    except subprocess.TimeoutExpired:
        running.kill()
        return code, running.wait()


@contextlib.contextmanager
def _forwarded(running: subprocess.Popen[bytes]) -> Iterator[None]:
    """Signals to this process go to the child."""

    def forward(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            running.send_signal(number)

    with on_signals(forward, signal.SIGINT, signal.SIGTERM):
        yield
