"""F9: wider is better at every step, at one learning rate."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any, Final

import numpy as np

from benchmarks.paper import _text
from benchmarks.paper._figure import TITLES, Figure, Inputs, Row
from benchmarks.paper._results import Cell, Results, train
from mujax.check import WiderIsBetter, judge_widths
from mujax.plot import curves_figure


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a run.

    Attributes:
        widths: ascending; the first is the base, where both parametrizations are the same but for zeros.
        log2_lr: of all runs, near the best of the narrowest.
        warmup: share of the steps that are not judged.
        heads: their number; the head size grows with the width.
        zeros: what starts at zero in µP.
    """

    widths: tuple[int, ...]
    seeds: tuple[int, ...]
    steps: int
    batch: int
    length: int
    log2_lr: float
    depth: int = 2
    heads: int = 2
    warmup: float = 0.1
    zeros: tuple[str, ...] = ()


class Wider(Figure):
    """Training curves of several widths."""

    id = "F9"
    title = "wider is better throughout training"
    source = "their Figure 8"
    claim = (
        "In µP a wider Transformer has the lower training loss at every step, at the same learning rate; in "
        "the standard parametrization it has not."
    )
    scales = {  # noqa: RUF012
        "tiny": Config((16, 32), (0, 1), steps=20, batch=2, length=16, log2_lr=-7, depth=1),
        "laptop": Config(*((64, 128, 256, 512, 1024), (0, 1, 2)), steps=120, batch=8, length=32, log2_lr=-7),
        # The paper's: GPT-3-like models of width 256 to 32,768 on 8 billion tokens; here what one GPU holds.
        "gpu": Config(
            *((128, 256, 512, 1024, 2048, 4096), (0, 1, 2), 10_000, 32, 512),
            log2_lr=-8,
            depth=4,
            zeros=("readout", "query"),
        ),
    }
    remarks = {  # noqa: RUF012
        "laptop": "All models start with their own initial values, in both parametrizations. With readout "
        "and queries at zero, the paper's advice (`zeros` of the configuration), runs of 150 steps ended "
        "higher, and width 256 no lower than width 64: the body learns only once the readout has left zero."
    }

    def data(self, config: Config, inputs: Inputs) -> tuple[Any, str]:
        return _text.load(inputs.text)

    def run(self, config: Config, data: Any, results: Results) -> None:
        tokens, _ = data
        sizes = {name: getattr(config, name) for name in ("depth", "length", "batch", "steps")}
        train(
            [
                Cell(
                    setting=name,
                    width=width,
                    values=(config.log2_lr,),
                    seeds=config.seeds,
                    training=lambda name=name, width=width: _text.training(
                        tokens,
                        width=width,
                        base_width=config.widths[0],
                        heads=config.heads,
                        parametrization=name,
                        zeros=config.zeros,
                        **sizes,
                    ),
                    work=_text.operations(width=width, **sizes),
                )
                for width in config.widths
                for name in ("mup", "sp")
            ],
            results,
        )

    def found(self, config: Config, results: Results, setting: str) -> WiderIsBetter:
        """The verdict of the library on the steps after the warm-up."""
        curves = self.curves(config, results, setting)
        after = {
            width: None if table is None else table[:, math.ceil(config.warmup * table.shape[1]) :]
            for width, table in curves.items()
        }
        points, seeds = max(
            (table.shape[::-1] for table in after.values() if table is not None), default=(1, 1)
        )
        return judge_widths(after, 2.0**config.log2_lr, seeds, max(1, points // 10))

    def curves(self, config: Config, results: Results, setting: str) -> dict[int, np.ndarray | None]:
        """Width -> losses of each finished seed; None where one diverged."""
        runs = results.sweep(setting, config.widths, (config.log2_lr,), config.seeds)
        found: dict[int, np.ndarray | None] = {}
        for width, (of_rate,) in runs.items():
            known = [run.curve for run in of_rate if run.curve is not None]
            found[width] = np.stack(known) if len(known) == len(of_rate) else None
        return found

    def table(self, config: Config, results: Results) -> list[Row]:
        rows = []
        for name, better in (("mup", True), ("sp", False)):
            found = self.found(config, results, name)
            claim = "no wider model is worse" if better else "some wider model is worse"
            worst = max(found.rises, key=lambda rise: math.inf if rise.by is None else rise.by, default=None)
            if worst is None:
                measured, interval = (
                    _ends(found),
                    (" ".join(found.reasons) or f"no rise above {found.max_rise:.0%} of the gain (95 %)"),
                )
            elif worst.by is None or worst.at_least is None:
                measured, interval = f"width {worst.wide} diverges", "-"
            else:
                measured = f"width {worst.wide} worse than {worst.narrow} by {worst.by:.3f}; {_ends(found)}"
                interval = f"at least {worst.at_least:.3f} (95 %)"
            decided = found.verdict != "undecided"
            holds = (not found.rises) is better if decided else None
            rows.append(Row(f"{TITLES[name]}: {claim}, at any step after warm-up", measured, interval, holds))
        return rows

    def draw(self, config: Config, results: Results, path: pathlib.Path) -> None:
        panels = {TITLES[name]: self.curves(config, results, name) for name in ("sp", "mup")}
        seeds = f"{len(config.seeds)} seeds"
        curves_figure(
            panels,
            steps=config.steps,
            title=f"Transformer on text: Adam at $2^{{{config.log2_lr:g}}}$, batch {config.batch}, {seeds}",
        ).savefig(path)


def _ends(found: WiderIsBetter) -> str:
    ends = [None if curve is None else curve[-1] for curve in found.curves.values()]
    shown = ["diverges" if end is None else f"{end:.3f}" for end in ends]
    return f"last losses {', '.join(shown)}"


FIGURE: Final = Wider()
