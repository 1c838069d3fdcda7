"""The command on any terminal: without Unicode, narrow, behind a closed pipe; and ended by signals."""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from checks import check, tap
from rich.console import Console
from trials import make_sweep

from mujax import cli
from mujax.cli import _check, _display, _explain, _tune
from mujax.tune._results import SweepProgress

EXPLAIN = ["explain", "mlp", "--width", "64", "--base-width", "16"]
CHECK = ["coord-check", "mlp", "--alone"]
TUNE = ["tune"]


@pytest.fixture(autouse=True)
def stand_ins(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is trained, and all is written into a folder that is empty."""
    taps = [tap("block_0/attention/query/kernel"), tap("block_0/attention/out/kernel"), tap("hidden/kernel")]
    monkeypatch.setattr(_check, "coord_check", lambda *_, **__: check("mup", taps))
    monkeypatch.setattr(_tune, "tune", lambda *_, **__: make_sweep(weight_decay=0.125, output_mult=3.25))
    monkeypatch.chdir(tmp_path)


# ---- without Unicode ------------------------------------------------------------------------------------


@contextlib.contextmanager
def stdout(encoding: str) -> Iterator[Callable[[], str]]:
    """Replaces stdout; yields what is written to it so far."""
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding=encoding, write_through=True)
    with contextlib.redirect_stdout(stream):
        yield lambda: written.getvalue().decode(encoding)
    assert stream.errors == "strict"
    # With the stream itself its bytes would be gone.
    stream.detach()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (EXPLAIN, ["hidden_1/kernel", "parametrization mup"]),
        (CHECK, ["+0.00 +- 0.10", "uP"]),
        (TUNE, ["Study mine: the 10 best of 14 trials", "0.125"]),
        (["--help"], ["usage: mujax", "uP and hyperparameter transfer"]),
    ],
)
def test_a_stdout_without_unicode_gets_ascii(line: list[str], expected: list[str]) -> None:
    with stdout("ascii") as written:
        assert cli.main(line) == 0
        for text in expected:
            assert text in written()
        assert "?" not in written()


def test_without_the_replacement_it_would_fail() -> None:
    with stdout("ascii"), pytest.raises(UnicodeEncodeError):
        print("µP")
    with stdout("ascii") as written, _display.terminal():
        print("µP ± 1 …\N{SNOWMAN}")
        assert written() == "uP +- 1 ...?\n"


# ---- a closed pipe --------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", [EXPLAIN, CHECK, TUNE, ["--help"]])
def test_a_closed_pipe_ends_quietly(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", encoding="utf-8") as pipe, contextlib.redirect_stdout(pipe):
        assert cli.main(line) == _display.CLOSED_PIPE
    err = capsys.readouterr().err
    assert "mujax: " not in err
    assert "Traceback" not in err


# ---- a narrow one ---------------------------------------------------------------------------------------


HEADINGS = ("tap", "status", "exponent of width", "learning_\nrate", "allowed")
ROWS = [
    (("block_0/attention/query/kernel", "pass", "+0.00 ± 0.10", "2^-8", "-0.75 to +0.25"), "green"),
    (("out", "inherited", "-12.25 ± 1.50", "0.000123", "-0.50 to +0.25"), ""),
]


@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("columns", [36, 40, 60, 90, 200])
def test_a_table_that_is_too_wide_is_printed_in_parts_and_nothing_is_cut(columns: int, right: bool) -> None:
    rows = [((cells[0][:10], *cells[1:]), style) for cells, style in ROWS] if right else ROWS
    file = io.StringIO()
    _display.print_table(Console(file=file, width=columns), "Title", HEADINGS, rows, right=right)
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= columns
    for cells, _ in rows:
        for cell in cells[1:]:
            assert sum(cell in line for line in lines) == 1
        # The first column is in each part, a long name in several lines.
        parts = sum("tap" in line.split() for line in lines)
        assert file.getvalue().count(cells[0][-3:]) == parts
        assert parts == {36: 4, 40: 4, 60: 3, 90: 1, 200: 1}[columns] or right


@pytest.mark.parametrize("line", [CHECK, TUNE])
def test_a_narrow_terminal_gets_every_number(
    line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def numbers() -> set[str]:
        return set(re.findall(r"[-+]?\d+\.\d+", capsys.readouterr().out))

    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(line) == 0
    wide = numbers()
    monkeypatch.setenv("COLUMNS", "40")
    assert cli.main(line) == 0
    assert wide == numbers()
    assert len(wide) > 3


def test_a_file_gets_wide_tables_unless_columns_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert _display.output().width == 120
    monkeypatch.setenv("COLUMNS", "40")
    assert _display.output().width == 40


# ---- signals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_an_interrupt_wherever_it_strikes(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A shell starts what runs in the background with SIGINT ignored.
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, usual)
    monkeypatch.setattr(_explain, "run", lambda _: signal.raise_signal(number))
    try:
        assert cli.main(EXPLAIN) == 130
        assert capsys.readouterr().err == "mujax: interrupted.\n"
        assert signal.getsignal(number) is usual
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize(("strikes", "looks"), [(1, 1), (2, 0)])
def test_sigterm_waits_for_the_look_under_way_and_twice_does_not(
    strikes: int, looks: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def tune(*_: Any, progress: Any, **__: Any) -> None:
        for _ in range(strikes):
            signal.raise_signal(signal.SIGTERM)
        seen.append("a look")
        progress(SweepProgress(0, 6, 0.5, 2, None, "trials 0 to 5"))
        pytest.fail("the search went on")

    monkeypatch.setattr(_tune, "tune", tune)
    monkeypatch.setattr(_tune, "read_study", lambda _: make_sweep(1))
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(TUNE) == 130
    assert len(seen) == looks
    assert "mujax: interrupted; 1 of 64 trials are stored" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_of_the_main_thread_there_are_no_signals_to_handle() -> None:
    import threading

    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(cli.main(EXPLAIN)))
    with contextlib.redirect_stdout(io.StringIO()):
        thread.start()
        thread.join()
    assert codes == [0]
    assert sys.stdout is not None
