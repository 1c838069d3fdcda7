"""The entry point: runs a command and turns errors into a sentence and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final

from mujax.cli import _check, _explain, _transfer, _transfer_check, _tune
from mujax.cli._arguments import parse
from mujax.cli._display import StoppedError, end_quietly, fail, terminal
from mujax.errors import MujaxError

# Packages of the extra `cli` that only the command needs.
_EXTRA: Final = ("tyro", "rich", "matplotlib")

_COMMANDS: Final[dict[str, type]] = {
    "tune": _tune.Tune,
    "transfer": _transfer.Transfer,
    "transfer-check": _transfer_check.TransferCheckOptions,
    "explain": _explain.Explain,
    "coord-check": _check.CoordCheckOptions,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: arguments after the command's name; by default those of the process.

    Returns:
        The exit code.
    """
    with terminal():
        try:
            code = _main(argv)
            # Here, and not when Python ends, which would print a traceback if the pipe is closed.
            sys.stdout.flush()
        except BrokenPipeError:
            return end_quietly()
        return code


def _main(argv: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words[:1] == ["transfer"]:
            _transfer.refuse_without_study(words)
        options = parse(_COMMANDS, argv)
        if isinstance(options, _tune.Tune):
            return _tune.run(options)
        if isinstance(options, _transfer.Transfer):
            return _transfer.run(options, words)
        if isinstance(options, _transfer_check.TransferCheckOptions):
            return _transfer_check.run(options)
        if isinstance(options, _check.CoordCheckOptions):
            return _check.run(options)
        return _explain.run(options)
    except SystemExit as stop:
        return int(stop.code or 0)
    except StoppedError as stopped:
        return fail(str(stopped), 130)
    except KeyboardInterrupt:
        return fail("interrupted.", 130)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA:
            raise
        return fail(f'the command needs the package {package}; pip install "mujax-mup[cli]".', 2)
    except BrokenPipeError:
        raise
    except (MujaxError, OSError) as error:
        return fail(str(error), 2)
