"""Results of a figure, appended to a file as they come, and the training of what is missing."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TextIO

import numpy as np

from benchmarks import common
from mujax.check import Finished, Run, train_runs
from mujax.errors import ConfigError
from mujax.train import Training

_CURVE: Final = 100
"""Points of a stored curve: windows of the run, each its mean."""

_SECONDS: Final = 30.0
"""Between two lines of progress where there is no terminal."""


class Results:
    """Records of a figure in a JSON Lines file: the settings, and a line for each record.

    Args:
        path: of the file; made where it does not exist.
        settings: all that the records depend on besides their keys. A file with others is refused.

    Attributes:
        path: as given.
        settings: as given.
        records: key -> what was found.

    Raises:
        ConfigError: the file has other settings.
    """

    def __init__(self, path: pathlib.Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.records: dict[tuple[Any, ...], dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = self._read(path) if path.exists() else 0
        self._file: TextIO = path.open("a", encoding="utf-8")
        # An interrupted run may have left half a line: it is done again.
        self._file.truncate(whole)
        if not whole:
            self._write(self.settings)

    def _read(self, path: pathlib.Path) -> int:
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        lines = [json.loads(line) for line in content[:whole].decode().splitlines()]
        if lines and lines[0] != self.settings:
            raise ConfigError(
                where="out",
                expected=f"results in {path} of the same configuration and data",
                got="others",
                remedy="take another folder, or remove the file to start again",
            )
        for line in lines[1:]:
            self.records[tuple(line["key"])] = line
        return whole

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return key in self.records

    def __getitem__(self, key: tuple[Any, ...]) -> dict[str, Any]:
        """The record.

        Raises:
            ConfigError: it is not there yet.
        """
        if key not in self.records:
            raise self._unfinished(" ".join(map(str, key)))
        return self.records[key]

    def _unfinished(self, what: str) -> ConfigError:
        return ConfigError(
            where="so-far",
            expected=f"{what} to be finished",
            got="no such result",
            remedy="run the figure on",
        )

    def add(
        self, key: tuple[Any, ...], found: Mapping[str, Any], seconds: float, flops: float | None = None
    ) -> None:
        """Stores a record.

        Args:
            key: strings and numbers.
            found: strict JSON.
            seconds: wall time that it took.
            flops: operations of its programs, where they are counted.
        """
        spent = {"seconds": round(seconds, 3), "flops": flops, "device": common.device()}
        line = {"key": list(key), **found, **spent}
        self._write(line)
        self.records[key] = line

    @property
    def seconds(self) -> float:
        """Wall time of all records."""
        return sum(record["seconds"] for record in self.records.values())

    @property
    def flops(self) -> float:
        """Operations of all records whose operations are counted."""
        return sum(record["flops"] or 0.0 for record in self.records.values())

    @property
    def devices(self) -> list[str]:
        """Where the records were made, in words; empty for those of before it was stored."""
        return list(dict.fromkeys(one["device"] for one in self.records.values() if "device" in one))

    def run(self, setting: str, width: int, value: float, seed: int) -> Finished | None:
        """A training run of `train`; None if it is not there."""
        record = self.records.get(("run", setting, width, value, seed))
        if record is None:
            return None
        curve = record["curve"]
        return Finished(
            record["loss"],
            record["final"],
            record["untrained"],
            None if curve is None else np.array(curve),
            record["flops"],
        )

    def sweep(
        self, setting: str, widths: Sequence[int], values: Sequence[float], seeds: Sequence[int]
    ) -> dict[int, list[list[Finished]]]:
        """Width -> value -> finished runs, as `judge_runs` takes them; of the seeds that every cell has.

        Raises:
            ConfigError: there is no such seed.
        """
        have = [
            seed
            for seed in seeds
            if all(("run", setting, width, value, seed) in self for width in widths for value in values)
        ]
        if not have:
            raise self._unfinished(f"one seed of {setting} at all widths")
        return {
            width: [[self._sure(setting, width, value, seed) for seed in have] for value in values]
            for width in widths
        }

    def _sure(self, setting: str, width: int, value: float, seed: int) -> Finished:
        found = self.run(setting, width, value, seed)
        assert found is not None
        return found


# ---- training -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cell:
    """Runs that share a program.

    Attributes:
        setting: everything that a run depends on besides the attributes that follow, in words: its key.
        width: of the model; or depth, batch, ... of a sweep over that.
        values: log2 of the swept hyperparameter, one for each run.
        seeds: of each value.
        training: makes the run; called only if one is missing.
        work: operations of a run, roughly; for the time left.
        swept: the hyperparameter.
        fixed: further hyperparameters.
    """

    setting: str
    width: int
    values: tuple[float, ...]
    seeds: tuple[int, ...]
    training: Callable[[], Training]
    work: float
    swept: str = "learning_rate"
    fixed: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def runs(self) -> list[Run]:
        """All of them."""
        return [Run(self.setting, self.width, value, seed) for seed in self.seeds for value in self.values]


def train(cells: Sequence[Cell], results: Results) -> None:
    """Trains every run that is not stored yet, and stores each as soon as it is finished.

    Args:
        cells: in the order in which they are trained.
        results: where runs are found and added.
    """
    stored = _Stored(results)
    missing = [(cell, [run for run in cell.runs if run not in stored.runs]) for cell in cells]
    total = sum(len(cell.runs) for cell in cells)
    progress = Progress(total, total - sum(len(runs) for _, runs in missing))
    progress.work_left = sum(cell.work * len(runs) for cell, runs in missing)
    for cell, runs in missing:
        if runs:
            _train(cell, runs, stored, progress)
    progress.end()


def _train(cell: Cell, runs: Sequence[Run], stored: _Stored, progress: Progress) -> None:
    known = len(stored.runs)

    def step(_: Any) -> None:
        nonlocal known
        new, known = len(stored.runs) - known, len(stored.runs)
        progress.step(new, new * cell.work, f"{cell.setting}, {cell.width}")

    train_runs(
        runs,
        lambda _, __: cell.training(),
        steps=1,
        swept=cell.swept,
        fixed=cell.fixed,
        stored=stored,
        progress=step,
    )


class _Stored:
    """Training runs among the results, as `train_runs` takes them."""

    def __init__(self, results: Results) -> None:
        self._results = results
        self.runs: dict[Run, Finished] = {}
        for key in results.records:
            if key[0] == "run":
                found = results.run(*key[1:])
                assert found is not None
                self.runs[Run(*key[1:])] = found

    def append(self, run: Run, finished: Finished, seconds: float) -> None:
        curve = None if finished.curve is None else [float(f"{one:.5g}") for one in windows(finished.curve)]
        found = {
            "loss": finished.loss,
            "final": finished.final,
            "untrained": finished.untrained,
            "curve": curve,
        }
        self._results.add(("run", *run), found, seconds, finished.flops)
        self.runs[run] = finished


def windows(curve: np.ndarray, count: int = _CURVE) -> np.ndarray:
    """The curve as at most `count` means of neighbouring steps.

    >>> windows(np.arange(4.0), 2)
    array([0.5, 2.5])
    """
    return np.array([part.mean() for part in np.array_split(curve, min(count, len(curve)))])


class Progress:
    """A line of progress with the time left; on a terminal it stays in place.

    Args:
        total: pieces in all.
        done: those of an earlier call.

    Attributes:
        work_left: of the pieces that are left, in any unit.
    """

    def __init__(self, total: int, done: int = 0) -> None:
        self._total, self._done = total, done
        self._work_here, self._started, self._last = 0.0, time.perf_counter(), -math.inf
        self._in_place = sys.stderr.isatty()
        self.work_left = 0.0

    def step(self, pieces: int, work: float, doing: str) -> None:
        """Some pieces are finished; where there is no terminal, prints a line every half a minute at most."""
        self._done += pieces
        self._work_here += work
        self.work_left -= work
        now = time.perf_counter()
        if not self._in_place and now - self._last < _SECONDS and self._done < self._total:
            return
        self._last = now
        left = "timing"
        if self._work_here:
            seconds = (now - self._started) * self.work_left / self._work_here
            left = f"{seconds / 60:.1f} minutes left"
        line = f"{self._done} of {self._total} runs, {left} ({doing})"
        start, end = ("\r\033[K", "") if self._in_place else ("", "\n")
        print(f"{start}{line}", end=end, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leaves the line."""
        if self._in_place:
            print(file=sys.stderr)
