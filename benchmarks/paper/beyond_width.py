"""F4: the best learning rate over depth, batch, sequence length and steps, in µP."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any, Final

from benchmarks.paper import _text
from benchmarks.paper._figure import Figure, Inputs, Row
from benchmarks.paper._results import Cell, Results, train
from benchmarks.paper._sweeps import judged, kept, moved, panel, trend
from benchmarks.paper.hyperparameters import octaves
from mujax.check import TransferCheck
from mujax.plot import panels_figure

_NAMES: Final = {"depth": "depth", "batch": "batch size", "length": "sequence length", "steps": "steps"}


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes where one of them is swept; a tuple of sizes for each.

    Attributes:
        width: of all models.
        base: size of each axis while another one is swept.
        depth: blocks.
        batch: sequences a step.
        length: tokens of a sequence.
        steps: of a run.
        rates: log2 of the learning rates.
    """

    width: int
    base: tuple[tuple[str, int], ...]
    depth: tuple[int, ...]
    batch: tuple[int, ...]
    length: tuple[int, ...]
    steps: tuple[int, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    heads: int = 2


class BeyondWidth(Figure):
    """The learning rate over four sizes other than the width."""

    id = "F4"
    title = "beyond width"
    source = "their Figure 4, bottom, and Figure 19"
    claim = (
        "The best learning rate of a pre-LN Transformer also stays over depth (from 4 blocks on), batch "
        "size, sequence length and training time, in reasonable ranges."
    )
    scales = {  # noqa: RUF012
        "tiny": Config(
            *(16, (("depth", 1), ("batch", 2), ("length", 8), ("steps", 6)), (1, 2)),
            *((2, 4), (8, 16), (6, 12)),
            *((-8.0, -7.0, -6.0), (0,)),
        ),
        "laptop": Config(
            *(64, (("depth", 4), ("batch", 8), ("length", 32), ("steps", 200)), (2, 4, 8, 16, 32)),
            *((8, 16, 32, 64, 128, 256), (32, 64, 128, 256, 512), (500, 1000, 2000, 4000, 8000)),
            *(octaves(-10, -5), (0,)),
        ),
        "gpu": Config(
            *(256, (("depth", 4), ("batch", 32), ("length", 128), ("steps", 5000)), (2, 4, 8, 16, 32)),
            *((8, 16, 32, 64, 128, 256), (32, 64, 128, 256, 512), (500, 1000, 2000, 4000, 8000, 16_000)),
            *(octaves(-13, -5), (0, 1, 2)),
        ),
    }

    def data(self, config: Config, inputs: Inputs) -> tuple[Any, str]:
        return _text.load(inputs.text)

    def run(self, config: Config, data: Any, results: Results) -> None:
        tokens, _ = data
        cells = []
        for seed in config.seeds:
            for axis in _NAMES:
                for size in getattr(config, axis):
                    sizes = {**dict(config.base), axis: size}
                    cells.append(
                        Cell(
                            setting=axis,
                            width=size,
                            values=config.rates,
                            seeds=(seed,),
                            training=functools.partial(
                                _text.training,
                                tokens,
                                width=config.width,
                                base_width=config.width,
                                heads=config.heads,
                                **sizes,
                            ),
                            work=_text.operations(width=config.width, **sizes),
                        )
                    )
        train(cells, results)

    def checks(self, config: Config, results: Results) -> dict[str, TransferCheck]:
        """The library's check over each axis; over depth from 4 blocks on, where the claim is made."""
        found = {}
        for axis in _NAMES:
            sizes = getattr(config, axis)
            proxy = dict(config.base)[axis] if dict(config.base)[axis] in sizes else sizes[0]
            found[axis] = judged(results, axis, sizes, config.rates, config.seeds, proxy)
        return found

    def table(self, config: Config, results: Results) -> list[Row]:
        deep = tuple(depth for depth in config.depth if depth >= 4) or config.depth
        over = judged(
            results, "depth", deep if len(deep) > 1 else config.depth, config.rates, config.seeds, deep[0]
        )
        checks = self.checks(config, results)
        stays = "the best learning rate moves by at most 1"
        return [
            kept(f"depth {over.widths[0]} to {over.widths[-1]}: {stays}", over),
            kept(f"sequence {config.length[0]} to {config.length[-1]}: {stays}", checks["length"]),
            kept(f"steps {config.steps[0]} to {config.steps[-1]}: {stays}", checks["steps"]),
            Row(
                f"batch {config.batch[0]} to {config.batch[-1]}: no claim",
                moved(checks["batch"]),
                trend(checks["batch"]),
                None,
            ),
        ]

    def draw(self, config: Config, results: Results, path: pathlib.Path) -> None:
        panels = [
            panel(f"over {_NAMES[axis]}", "log2 of the learning rate", found, legend=_NAMES[axis])
            for axis, found in self.checks(config, results).items()
        ]
        panels_figure(
            panels,
            share_y=False,
            title=f"Transformer of width {config.width} on text in µP: Adam, training loss, mean over the "
            f"run; else {', '.join(f'{_NAMES[name]} {size}' for name, size in config.base)}",
        ).savefig(path)


FIGURE: Final = BeyondWidth()
