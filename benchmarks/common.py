"""What the benchmarks share: goals, a table to read, a JSON file to keep."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any, Final

OUT: Final = pathlib.Path(__file__).parent / "out"
"""Where the reports go unless told otherwise; not under version control."""


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
            name: what was measured.
            figure: what came out.
            surely: what it is at least, if noise may have raised it.
        """
        if figure <= self.limit:
            return []
        doubt = " (within the noise)" if surely is not None and surely <= self.limit else ""
        return [f"{name}: {figure:.5g}, the goal is {self.text}{doubt}."]


def environment() -> dict[str, Any]:
    """Versions and machine, and how busy it was: timed figures mean nothing without them."""
    return {
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
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
    """The goals that were missed, or that there are none; a smoke run is too small to tell."""
    if quick:
        return "A smoke run: goals are not judged."
    return "\n".join(["Missed:", *(f"  {line}" for line in missed)]) if missed else "All goals met."
