"""F3: learning rate, output multiplier, initial σ and schedule of a Transformer over width."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final

import jax.numpy as jnp

import mujax
from benchmarks.paper import _text
from benchmarks.paper._figure import TITLES, Figure, Inputs, Row
from benchmarks.paper._results import Cell, Results, train
from benchmarks.paper._sweeps import judged, kept, lost, panel
from mujax.check import TransferCheck, mean
from mujax.plot import Panel, panels_figure
from mujax.train import Training

SCHEDULES: Final[Mapping[str, Callable[[Any], Any]]] = {
    "linear": lambda done: 1 - done,
    "steps 0.1": lambda done: jnp.where(done < 0.5, 1.0, jnp.where(done < 0.8, 0.1, 0.01)),
    "steps 0.3": lambda done: jnp.where(done < 0.4, 1.0, jnp.where(done < 0.7, 0.3, 0.09)),
    "cosine": lambda done: (1 + jnp.cos(jnp.pi * done)) / 2,
    "constant": lambda done: jnp.ones_like(done),
    "inverse root": lambda done: (1 + 16 * done) ** -0.5,
}
"""The six of the paper: share of the steps done -> share of the peak."""

CLOSE: Final = 0.01
"""Schedules whose losses differ by less than this share of what training gains have no order."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a run and grids, as log2.

    Attributes:
        base: µP's base width.
        sp_rates: learning rates in the standard parametrization, whose optimum moves further.
        rate: of the runs that sweep something else.
        multipliers: of the output.
        sigmas: multiples of the initial weights.
        schedules: of `SCHEDULES`.
        zeros: what starts at zero in µP.
    """

    widths: tuple[int, ...]
    base: int
    seeds: tuple[int, ...]
    steps: int
    batch: int
    length: int
    sp_rates: tuple[float, ...]
    rates: tuple[float, ...]
    multipliers: tuple[float, ...]
    sigmas: tuple[float, ...]
    rate: float = -7.0
    depth: int = 2
    heads: int = 4
    schedules: tuple[str, ...] = tuple(SCHEDULES)
    zeros: tuple[str, ...] = ()

    @property
    def sweeps(self) -> dict[str, tuple[float, ...]]:
        """The setting of each sweep and its grid."""
        return {
            "sp": self.sp_rates,
            "mup": self.rates,
            "mup output_mult": self.multipliers,
            "mup init_scale": self.sigmas,
        }

    def finished(self, results: Results) -> Config:
        """With the widths only that have all runs of a seed, if the base and another one are among them."""
        grids = [*self.sweeps.items(), *((f"mup {name}", (self.rate,)) for name in self.schedules)]
        widths = [
            width
            for width in self.widths
            if any(
                all(("run", name, width, value, seed) in results for name, grid in grids for value in grid)
                for seed in self.seeds
            )
        ]
        enough = self.base in widths and len(widths) > 1
        return dataclasses.replace(self, widths=tuple(widths)) if enough else self

    @property
    def sizes(self) -> dict[str, int]:
        """What all runs share."""
        return {name: getattr(self, name) for name in ("depth", "length", "batch", "steps")}


def octaves(low: int, high: int, step: int = 1) -> tuple[float, ...]:
    """Powers of two from one to the other.

    >>> octaves(-2, 0)
    (-2.0, -1.0, 0.0)
    """
    return tuple(float(power) for power in range(low, high + 1, step))


class Hyperparameters(Figure):
    """Four hyperparameters over width."""

    id = "F3"
    title = "learning rate, output multiplier, initial σ and schedule"
    source = "their Figures 1 and 4"
    claim = (
        "In µP the best learning rate, output multiplier, initial σ and schedule of a Transformer stay "
        "where they are as it grows wider; in the standard parametrization the best learning rate moves."
    )
    scales = {  # noqa: RUF012
        "tiny": Config(
            *((16, 32), 16, (0,), 10, 2, 16),
            *((-8.0, -7.0, -6.0), (-8.0, -7.0, -6.0), (-2.0, 0.0, 2.0), (-2.0, 0.0, 2.0)),
            schedules=("linear", "constant"),
            depth=1,
        ),
        "laptop": Config(
            *((32, 64, 128, 256, 512), 128, (0, 1), 120, 8, 32),
            *(octaves(-12, -5), octaves(-10, -4), octaves(-4, 4, 2), octaves(-4, 4, 2)),
        ),
        # The paper's model of 2 blocks, here to width 2048, at which a GPU takes ten minutes for all.
        "gpu": Config(
            *((128, 256, 512, 1024, 2048), 128, (0,), 800, 16, 256),
            *(octaves(-15, -6), octaves(-12, -5), octaves(-4, 4, 2), octaves(-4, 4, 2)),
            rate=-8.0,
        ),
    }

    remarks = {  # noqa: RUF012
        "gpu": "Widths 1024 and 2048 of the configuration are not run: the time on the GPU was used up."
    }

    def data(self, config: Config, inputs: Inputs) -> tuple[Any, str]:
        return _text.load(inputs.text)

    def run(self, config: Config, data: Any, results: Results) -> None:
        tokens, _ = data
        # All are arguments of the program, so that the sweeps in µP share one.
        at_rate = {"learning_rate": 2.0**config.rate, "output_mult": 1.0, "init_scale": 1.0}
        cells = []
        for seed, width in itertools.product(config.seeds, config.widths):

            def training(name: str = "mup", schedule: str = "constant", width: int = width) -> Training:
                return _text.training(
                    tokens,
                    width=width,
                    base_width=config.base,
                    heads=config.heads,
                    parametrization=name,
                    zeros=config.zeros,
                    optimizer=functools.partial(_adam, SCHEDULES[schedule], config.steps),
                    **config.sizes,
                )

            def cell(
                setting: str,
                values: tuple[float, ...],
                training: Callable[[], Training],
                swept: str = "learning_rate",
                at: tuple[int, int] = (width, seed),
            ) -> Cell:
                width, seed = at
                work = _text.operations(width=width, **config.sizes)
                return Cell(setting, width, values, (seed,), training, work, swept, at_rate)

            cells += [
                cell("sp", config.sp_rates, functools.partial(training, "sp")),
                cell("mup", config.rates, training),
                cell("mup output_mult", config.multipliers, training, "output_mult"),
                cell("mup init_scale", config.sigmas, training, "init_scale"),
                *(
                    cell(f"mup {name}", (config.rate,), functools.partial(training, "mup", name))
                    for name in config.schedules
                ),
            ]
        with warnings.catch_warnings():
            # The base is the paper's, in the middle of the widths.
            warnings.filterwarnings("ignore", "model: expected a target that is wider")
            train(cells, results)

    def checks(self, config: Config, results: Results) -> dict[str, TransferCheck]:
        """The library's check of each sweep."""
        return {
            name: judged(results, name, config.widths, grid, config.seeds, config.base)
            for name, grid in config.sweeps.items()
        }

    def schedules(self, config: Config, results: Results) -> dict[int, dict[str, float | None]]:
        """Width -> schedule -> loss at the end, the mean over seeds."""
        found: dict[int, dict[str, float | None]] = {width: {} for width in config.widths}
        for width, name in itertools.product(config.widths, config.schedules):
            ((runs,),) = results.sweep(f"mup {name}", (width,), (config.rate,), config.seeds).values()
            found[width][name] = mean([run.final for run in runs])
        return found

    def table(self, config: Config, results: Results) -> list[Row]:
        config = config.finished(results)
        checks = self.checks(config, results)
        schedules = self.schedules(config, results)
        ((runs,),) = results.sweep("mup constant", (config.base,), (config.rate,), config.seeds).values()
        lowest = min(loss for loss in schedules[config.base].values() if loss is not None)
        gain = max(run.untrained for run in runs if run.untrained is not None) - lowest
        swaps = inversions(schedules, config.base, CLOSE * gain)
        best = [
            min((loss, name) for name, loss in by.items() if loss is not None)[1] for by in schedules.values()
        ]
        return [
            lost(f"{TITLES['sp']}: the best learning rate moves by more than 2", checks["sp"], 2.0),
            kept(f"{TITLES['mup']}: the best learning rate moves by at most 1", checks["mup"]),
            kept(
                f"{TITLES['mup']}: the best output multiplier moves by at most 1", checks["mup output_mult"]
            ),
            kept(f"{TITLES['mup']}: the best initial σ moves by at most 1", checks["mup init_scale"]),
            Row(
                f"{TITLES['mup']}: schedules rank alike at all widths",
                f"{len(swaps)} pairs swap{': ' if swaps else ''}{', '.join(swaps)}; best "
                f"{', '.join(dict.fromkeys(best))}",
                f"pairs further apart than {CLOSE:.0%} of the gain",
                not swaps,
            ),
        ]

    def draw(self, config: Config, results: Results, path: pathlib.Path) -> None:
        config = config.finished(results)
        checks = self.checks(config, results)
        schedules = self.schedules(config, results)
        panels = [
            panel("standard parametrization", "log2 of the learning rate", checks["sp"]),
            panel("µP", "log2 of the learning rate", checks["mup"]),
            panel("µP", "log2 of the output multiplier", checks["mup output_mult"]),
            panel("µP", "log2 of the multiple of initial σ", checks["mup init_scale"]),
            Panel(
                "µP",
                "schedule",
                range(len(config.schedules)),
                {width: list(by.values()) for width, by in schedules.items()},
                summary="loss at the end",
                names=config.schedules,
            ),
        ]
        panels_figure(
            panels,
            columns=3,
            title=f"Transformer on text: Adam, {config.steps} steps of batch {config.batch}; "
            "training loss, mean over the run",
        ).savefig(path, dpi=110)


def _adam(shape: Callable[[Any], Any], steps: int, hparams: Mapping[str, Any], spec: Any) -> Any:
    return mujax.mup_adam(lambda step: hparams["learning_rate"] * shape(step / steps), spec)


def inversions(losses: Mapping[int, Mapping[str, float | None]], base: int, resolution: float) -> list[str]:
    """Pairs of names whose order at some width is not that at the base, where both are clear.

    >>> inversions({1: {"a": 1.0, "b": 2.0}, 2: {"a": 2.0, "b": 1.0}}, 1, 0.1)
    ['a and b at 2']
    """
    found = []
    for one, other in itertools.combinations(losses[base], 2):
        at_base = _order(losses[base][one], losses[base][other], resolution)
        found += [
            f"{one} and {other} at {width}"
            for width, by in losses.items()
            if at_base * _order(by[one], by[other], resolution) < 0
        ]
    return found


def _order(one: float | None, other: float | None, resolution: float) -> int:
    a, b = (float("inf") if loss is None else loss for loss in (one, other))
    return 0 if a == b or abs(a - b) < resolution else 1 if a > b else -1


FIGURE: Final = Hyperparameters()
