"""F1: the coordinate check of a Transformer, the standard parametrization beside µP."""

from __future__ import annotations

import dataclasses
import pathlib
import time
from typing import Any, Final

import jax
import numpy as np

from benchmarks.paper import _text
from benchmarks.paper._figure import TITLES, Figure, Inputs, Row
from benchmarks.paper._results import Progress, Results
from mujax.check import STATS, CoordCheck, coord_check
from mujax.plot import growth_figure

SLIGHT: Final = 0.1
"""A slope within this counts as none, though its interval may not contain 0: finite widths bend the lines."""

CLEAR: Final = 0.3
"""An interval within this excludes the nearest fault, half a power of the width away."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a check.

    Attributes:
        widths: ascending; the first is the base.
        log2_lr: of Adam; the paper's is 0.001. At a large one the logits of narrow models change as much.
        head: size of a head at the base; their number is fixed.
    """

    widths: tuple[int, ...]
    seeds: int
    steps: int
    batch: int
    length: int
    log2_lr: float = -11
    depth: int = 2
    heads: int = 4

    @property
    def taps(self) -> dict[str, str]:
        """The three activations of the paper's figure, and their taps."""
        last = self.depth - 1
        return {
            "logits": "output",
            "attention logits": f"block_{last}/attention logits",
            "word embeddings": "token_embedding/embedding",
        }


class Coordinates(Figure):
    """Changes of activations against width in the first steps."""

    id = "F1"
    title = "coordinate check"
    source = "their Figure 5"
    claim = (
        "In the standard parametrization the logits and attention logits of a Transformer blow up with width "
        "within a few steps of Adam, and word embeddings do not; in µP all three change alike at all widths."
    )
    scales = {  # noqa: RUF012
        "tiny": Config((16, 32), seeds=2, steps=2, batch=2, length=16, depth=1, heads=2),
        "laptop": Config((64, 128, 256, 512, 1024), seeds=4, steps=4, batch=4, length=64),
        "gpu": Config((128, 256, 512, 1024, 2048, 4096), seeds=4, steps=4, batch=16, length=256),
    }

    def data(self, config: Config, inputs: Inputs) -> tuple[Any, str]:
        return _text.load(inputs.text)

    def run(self, config: Config, data: Any, results: Results) -> None:
        tokens, _ = data
        missing = [name for name in ("sp", "mup") if ("check", name) not in results]
        progress = Progress(2, 2 - len(missing))
        progress.work_left = float(len(missing))
        source = _text.batches(tokens, config.length)
        drawn = source.draw(tokens, jax.random.key(0), config.batch, config.steps)
        batches = [source.fetch(tokens, starts) for starts in drawn]
        for name in missing:
            started = time.perf_counter()
            found = coord_check(
                lambda width: _text.transformer(
                    width, depth=config.depth, heads=config.heads, length=config.length
                ),
                config.widths,
                batches=batches,
                learning_rates=(2.0**config.log2_lr,),
                steps=config.steps,
                seeds=config.seeds,
                parametrization=name,
                **({"zero_init": ("readout", "query")} if name == "mup" else {}),
            )
            results.add(("check", name), _taps(config, found), time.perf_counter() - started)
            progress.step(1, 1.0, name)
        progress.end()

    def table(self, config: Config, results: Results) -> list[Row]:
        rows = []
        for name in ("sp", "mup"):
            for activation in config.taps:
                grows = name == "sp" and activation != "word embeddings"
                value, low, high = results["check", name][activation]["slope"]
                does = "grow with width" if grows else "change alike at all widths"
                rows.append(
                    Row(
                        f"{TITLES[name]}: {activation} {does}",
                        f"width^{value:+.2f}",
                        f"{low:+.2f} to {high:+.2f} (99 %)",
                        holds(low, high, grows),
                    )
                )
        return rows

    def draw(self, config: Config, results: Results, path: pathlib.Path) -> None:
        rows = {TITLES[name]: results["check", name] for name in ("sp", "mup")}
        tokens = config.batch * config.length
        growth_figure(
            {
                title: {name: np.array(found[name]["change"])[:, 1:] for name in config.taps}
                for title, found in rows.items()
            },
            config.widths,
            slopes={
                title: {
                    name: f"$\\propto\\mathrm{{width}}^{{{found[name]['slope'][0]:+.2f}}}$"
                    for name in config.taps
                }
                for title, found in rows.items()
            },
            title=f"Transformer on text: Adam at $2^{{{config.log2_lr:g}}}$, {tokens} tokens a step, "
            f"{config.seeds} seeds",
        ).savefig(path)


def holds(low: float, high: float, grows: bool) -> bool | None:
    """Whether the interval of a slope shows growth, or none; None where it shows neither.

    >>> holds(0.3, 0.5, True), holds(0.3, 0.5, False), holds(-0.1, 0.3, False), holds(-1.0, 1.0, False)
    (True, False, True, None)
    """
    if grows:
        return True if low > SLIGHT else False if high < SLIGHT else None
    if max(-low, high) <= (CLEAR if low <= 0 <= high else SLIGHT):
        return True
    return False if low > SLIGHT or high < -SLIGHT else None


def _taps(config: Config, found: CoordCheck) -> dict[str, Any]:
    """What the figure shows of a check: the three activations."""
    rate = 2.0**config.log2_lr
    names = [tap.name for tap in found.taps]
    picked: dict[str, Any] = {"verdict": found.verdict}
    for activation, name in config.taps.items():
        tap = found.taps[names.index(name)]
        (slope,) = [check.slope for check in tap.checks[rate] if check.quantity == "change"]
        sizes = found.sizes[rate][:, :, names.index(name), STATS.index("change")]
        picked[activation] = {
            "slope": None if slope is None else [slope.value, slope.low, slope.high],
            "change": [[float(f"{one:.5g}") for one in row] for row in sizes],
        }
    return picked


FIGURE: Final = Coordinates()
