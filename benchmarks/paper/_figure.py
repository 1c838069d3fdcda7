"""The base of all figures: configurations by scale, a run that can be resumed, a table and a picture."""

from __future__ import annotations

import abc
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final, Literal, NamedTuple, get_args

from benchmarks import common
from benchmarks.paper._results import Results
from mujax.errors import ConfigError

Scale = Literal["tiny", "laptop", "gpu"]
SCALES: Final[tuple[Scale, ...]] = get_args(Scale)

TITLES: Final = {"sp": "standard parametrization", "mup": "µP"}
"""Of parametrizations, in tables and pictures."""


class Row(NamedTuple):
    """One claim of the paper, and the measurement.

    Attributes:
        claim: what the paper claims, in words.
        measured: what was measured.
        interval: of the measurement, with its confidence; "-" where there is none.
        holds: whether the claim holds; None where the measurement does not decide it.
    """

    claim: str
    measured: str
    interval: str
    holds: bool | None


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The user's own data.

    Attributes:
        text: a text file in place of the packaged one.
        pairs: tab-separated pairs of sentences in place of the packaged ones.
        images: a folder of four IDX files in place of Debian's.
    """

    text: pathlib.Path | None = None
    pairs: pathlib.Path | None = None
    images: pathlib.Path | None = None

    def options(self) -> str:
        """As on the command line."""
        given = ((name, value) for name, value in vars(self).items() if value is not None)
        return "".join(f" --{name} {value.name}" for name, value in given)


class Figure(abc.ABC):
    """One figure of the paper.

    Attributes:
        id: on the command line.
        title: of its section.
        source: of the paper's own figure.
        claim: of the paper, in a sentence.
        scales: the configuration of each scale, a frozen dataclass.
        remarks: by scale, what the table alone does not say.
    """

    id: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    claim: ClassVar[str]
    scales: ClassVar[Mapping[Scale, Any]]
    remarks: ClassVar[Mapping[Scale, str]] = {}

    @abc.abstractmethod
    def data(self, config: Any, inputs: Inputs) -> tuple[Any, str]:
        """The data, and its fingerprint.

        Raises:
            DataError: it is missing; the sentence says which package to install.
        """

    @abc.abstractmethod
    def run(self, config: Any, data: Any, results: Results) -> None:
        """Computes what `results` does not have yet, and adds it piece by piece."""

    @abc.abstractmethod
    def table(self, config: Any, results: Results) -> list[Row]:
        """The claims, judged by finished results."""

    @abc.abstractmethod
    def draw(self, config: Any, results: Results, path: pathlib.Path) -> None:
        """Writes the picture, a PNG; what is beside it (an animation) has the same stem."""

    def command(self, scale: Scale, inputs: Inputs = Inputs()) -> str:
        """The command that makes it."""
        return f"python -m benchmarks.paper {self.id} --scale {scale}{inputs.options()}"


def make(
    figure: Figure, scale: Scale, inputs: Inputs, out: pathlib.Path, *, so_far: bool = False
) -> dict[str, Any]:
    """Runs a figure, draws it and writes its report; resumes what was interrupted.

    Args:
        figure: the figure.
        scale: of the run.
        inputs: the user's own data.
        out: the folder for `ID-scale.jsonl`, `.json` and `.png`; the first has all records.
        so_far: run nothing, and report on the seeds (in F3 also the widths) that are finished.

    Returns:
        The report, as written.
    """
    config = figure.scales[scale]
    data, fingerprint = figure.data(config, inputs)
    stem = out / f"{figure.id}-{scale}"
    settings = {"config": dataclasses.asdict(config), "data": fingerprint}
    if so_far and not stem.with_suffix(".jsonl").exists():
        raise ConfigError(
            where="so-far", expected=f"results in {stem}.jsonl", got="none", remedy="leave it out to run them"
        )
    with Results(stem.with_suffix(".jsonl"), settings) as results:
        if not so_far:
            figure.run(config, data, results)
        report = {**report_of(figure, scale, inputs, results), "finished": not so_far}
        figure.draw(config, results, stem.with_suffix(".png"))
    common.write(stem.with_suffix(".json"), report)
    return report


def report_of(figure: Figure, scale: Scale, inputs: Inputs, results: Results) -> dict[str, Any]:
    """The report on what there is."""
    config = figure.scales[scale]
    return {
        "figure": figure.id,
        "scale": scale,
        "command": figure.command(scale, inputs),
        "minutes": round(results.seconds / 60, 2),
        "flops": results.flops,
        "rows": [row._asdict() for row in figure.table(config, results)],
        **results.settings,
        **common.environment(),
        "device": " and ".join(results.devices) or common.device(),
        "records": len(results.records),
    }


def shown(rows: Sequence[Row]) -> str:
    """The table as text."""
    return common.table(
        ("claim", "measured", "interval", "holds"),
        [(row.claim, row.measured, row.interval, verdict(row.holds)) for row in rows],
    )


def verdict(holds: bool | None) -> str:
    """In a word."""
    return {True: "yes", False: "no", None: "undecided"}[holds]
