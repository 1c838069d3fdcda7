"""Shared by the benchmarks: goals, ratios of paired runs, memory, text tables and JSON reports."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import resource
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

OUT: Final = pathlib.Path(__file__).parent / "out"
"""The default folder of the reports; not under version control."""


@dataclasses.dataclass(frozen=True)
class Goal:
    """The most that a figure may be.

    Attributes:
        limit: the figure meets the goal up to and including this.
        text: the goal in words.
    """

    limit: float
    text: str

    def missed_by(self, name: str, figure: float, surely: float | None = None) -> list[str]:
        """One sentence if the goal is missed, else nothing.

        Args:
            name: of the figure.
            figure: its value.
            surely: a lower bound of it, if noise may have raised it.
        """
        if figure <= self.limit:
            return []
        doubt = " (within the noise)" if surely is not None and surely <= self.limit else ""
        return [f"{name}: {figure:.5g}, the goal is {self.text}{doubt}."]


def cores() -> int | None:
    """Cores of this process, which may be bound to some of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def device() -> str:
    """Where programs run, in words."""
    import jax  # the environment of microsoft/mup, which imports this module, has none

    first = jax.devices()[0]
    return f"{cores()} cores" if first.platform == "cpu" else f"one {first.device_kind}"


def environment() -> dict[str, Any]:
    """Versions and machine, and how busy it was: timed figures mean nothing without them."""
    return {
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": cores(),
        "device": device(),
        "load_average": os.getloadavg(),
    }


def write(path: pathlib.Path, report: Mapping[str, Any]) -> None:
    """Writes the report as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(path)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A text table, the first column left aligned and the others right aligned.

    >>> print(table(("case", "ratio"), [("mlp", "1.001")]))
    case  ratio
    ----  -----
    mlp   1.001
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if position else cell.ljust(width)
            for position, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def verdict(missed: Sequence[str], *, quick: bool) -> str:
    """The missed goals, or that all are met; a smoke run is too small to judge."""
    if quick:
        return "A smoke run: goals are not judged."
    return "\n".join(["Missed:", *(f"  {line}" for line in missed)]) if missed else "All goals met."


@dataclasses.dataclass(frozen=True)
class Paired:
    """Ratios of paired measurements.

    Attributes:
        median: of the ratios.
        low: lower end of the 95% interval of the median (of all there are, with fewer than 6).
        high: its upper end.
        seconds: median of each side's own measurements.
    """

    median: float
    low: float
    high: float
    seconds: Mapping[str, float]


def paired(samples: Mapping[str, Sequence[float]], ours: str, plain: str) -> Paired:
    """The ratio of `ours` to `plain`, measured in turn.

    The interval is that of order statistics: it assumes nothing about the distribution of the times.
    """
    ratios = sorted(a / b for a, b in zip(samples[ours], samples[plain], strict=True))
    n = len(ratios)
    outside = max(0, math.floor(n / 2 - 0.98 * math.sqrt(n)))
    seconds = {name: statistics.median(samples[name]) for name in (ours, plain)}
    return Paired(statistics.median(ratios), ratios[outside], ratios[n - 1 - outside], seconds)


def so_far(losses: np.ndarray, worth: np.ndarray) -> np.ndarray:
    """The target's loss with the best trial so far, after each trial, for trials in this order."""
    best = np.minimum.accumulate(losses)
    chosen = np.maximum.accumulate(np.where(losses <= best, np.arange(len(losses)), 0))
    return worth[chosen]


def spent_on(curve: np.ndarray, spent: np.ndarray, loss: float) -> float | None:
    """Operations spent when the curve has got to a loss for good, and None if it ends above it.

    A later trial that is better at the proxy may be worse at the target: a search that passed through a loss
    by chance has not got there.
    """
    above = np.flatnonzero(curve > loss)
    settled = int(above[-1]) + 1 if len(above) else 0
    return float(spent[settled]) if settled < len(curve) else None


def resident() -> tuple[int, int]:
    """Resident set of this process and its peak, in bytes."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        # Not getrusage: the peak it gives on Linux begins with that of the process that started this one.
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        now, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
        return now, peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak
