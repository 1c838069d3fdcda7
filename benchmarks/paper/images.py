"""F8: a residual network on images, with stochastic gradient descent, over its width multiplier."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
import warnings
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.paper import _images, _search
from benchmarks.paper._figure import TITLES, Figure, Inputs, Row
from benchmarks.paper._results import Cell, Results, train
from benchmarks.paper._sweeps import judged, kept, lost, panel
from mujax import data, models
from mujax.check import TransferCheck
from mujax.plot import panels_figure
from mujax.train import Batches, Training, training_run

PAD: Final = 2
"""Pixels around an image before it is cropped."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a run.

    Attributes:
        channels: of the first convolution of a ResNet-9 at a multiplier of 1; the others have twice to
            eight times that.
        multipliers: of all channels, ascending, of the grid over learning rates.
        proxy: the multiplier at which both parametrizations are searched; µP's base.
        target: the multiplier of the models that are compared.
        side: pixels of an image's side; a divisor of 28.
        rates: grid of learning rates, as log2.
        grid_steps: of the runs on the grid.
        grid_seeds: of each of its cells.
        trials: of each search.
        seeds: of the target's runs.
        valid: held-out images, or all where there are fewer.
        zeros: what starts at zero in µP, as the paper advises for long runs; a short one learns late by it.
    """

    channels: int
    multipliers: tuple[float, ...]
    proxy: float
    target: float
    side: int
    batch: int
    rates: tuple[float, ...]
    grid_steps: int
    grid_seeds: tuple[int, ...]
    steps: int
    trials: int
    seeds: tuple[int, ...]
    valid: int
    zeros: tuple[str, ...] = ()


class Images(Figure):
    """A grid of learning rates over widths, and the widest model with each proxy's best."""

    id = "F8"
    title = "ResNet with SGD"
    source = "their Figure 16 and Table 12"
    claim = (
        "In µP the best learning rate of a ResNet under SGD with momentum stays where it is as the network "
        "grows wider, and the widest network is at least as accurate with its proxy's hyperparameters as in "
        "the standard parametrization with those of its own."
    )
    scales = {  # noqa: RUF012
        "tiny": Config(
            channels=4,
            multipliers=(1, 2),
            proxy=1,
            target=2,
            side=14,
            batch=8,
            rates=(-5, -4, -3),
            grid_steps=2,
            grid_seeds=(0,),
            steps=3,
            trials=2,
            seeds=(0, 1),
            valid=16,
        ),
        "laptop": Config(
            channels=8,
            multipliers=(0.5, 1, 2, 4),
            proxy=1,
            target=8,
            side=14,
            batch=64,
            rates=(-6, -5, -4, -3, -2, -1, 0, 1),
            grid_steps=60,
            grid_seeds=(0, 1),
            steps=150,
            trials=16,
            seeds=(0, 1, 2),
            valid=2048,
        ),
        # The paper's: CIFAR-10, 200 epochs, multipliers 0.5 to 8 of a wide ResNet.
        "gpu": Config(
            channels=32,
            multipliers=(0.5, 1, 2, 4, 8),
            proxy=1,
            target=8,
            side=28,
            batch=128,
            rates=(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1),
            grid_steps=2_000,
            grid_seeds=(0, 1, 2),
            steps=9_000,
            trials=64,
            seeds=(0, 1, 2),
            valid=8192,
            zeros=("readout",),
        ),
    }

    remarks = {  # noqa: RUF012
        "laptop": "The three best trials of the search differ by less than 0.004 in loss, at learning rates "
        "from 0.08 to 1.9. The best has the lowest of these rates, which the standard parametrization bears "
        "at 8 times the width, too: nothing is left to gain. The grid shows that its optimum moves."
    }

    def data(self, config: Config, inputs: Inputs) -> tuple[Any, str]:
        found = _images.load(inputs.images)
        parts = [_shrunk(part, config.side) for part in (found.train, found.valid)]
        return parts, data.digest((*parts[0], *parts[1]))

    def run(self, config: Config, data: Any, results: Results) -> None:
        def make(name: str, multiplier: float, steps: int) -> Training:
            return _training(config, data, name, multiplier, steps)

        with warnings.catch_warnings():
            # The base is not the narrowest.
            warnings.filterwarnings("ignore", "model: expected a target that is wider")
            train(
                [
                    Cell(
                        setting=name,
                        width=round(multiplier * config.channels),
                        values=config.rates,
                        seeds=(seed,),
                        training=functools.partial(make, name, multiplier, config.grid_steps),
                        work=multiplier**1.5,
                        fixed={"momentum": 0.9},
                    )
                    for seed, multiplier in itertools.product(config.grid_seeds, config.multipliers)
                    for name in ("sp", "mup")
                ],
                results,
            )
        for name in ("sp", "mup"):
            _search.search(
                results,
                name,
                functools.partial(make, name, config.proxy, config.steps),
                {
                    "learning_rate": {
                        "low": 2.0 ** min(config.rates),
                        "high": 2.0 ** max(config.rates),
                        "log": True,
                    },
                    "output_mult": {"low": 2.0**-3, "high": 2.0**3, "log": True},
                    "momentum": {"low": 0.8, "high": 0.95},
                },
                trials=config.trials,
            )
            hparams = _search.best(results, name)
            if hparams is not None:
                _search.repeat(
                    results,
                    name,
                    functools.partial(make, name, config.target, config.steps),
                    hparams,
                    config.seeds,
                )

    def table(self, config: Config, results: Results) -> list[Row]:
        grids = self.grids(config, results)
        rows = [
            kept(f"{TITLES['mup']}: the best learning rate moves by at most 1", grids["mup"]),
            lost(f"{TITLES['sp']}: the best learning rate moves by more than 1", grids["sp"], 1.0),
        ]
        accuracies = {name: _search.values(results, name, config.seeds, "accuracy") for name in ("mup", "sp")}
        rows.append(
            _search.compared(
                f"accuracy at {config.target / config.proxy:g} times the width, each with its proxy's best: "
                f"{TITLES['mup']} at least that of the {TITLES['sp']}",
                accuracies["mup"],
                accuracies["sp"],
                higher=True,
            )
        )
        rows.append(
            _search.compared(
                f"held-out loss likewise: {TITLES['mup']} at most that of the {TITLES['sp']}",
                *(_search.values(results, name, config.seeds, "valid_loss") for name in ("mup", "sp")),
            )
        )
        return rows

    def grids(self, config: Config, results: Results) -> dict[str, TransferCheck]:
        """The library's check of the grid of each parametrization."""
        widths = [round(multiplier * config.channels) for multiplier in config.multipliers]
        proxy = round(config.proxy * config.channels)
        return {
            name: judged(results, name, widths, config.rates, config.grid_seeds, proxy)
            for name in ("sp", "mup")
        }

    def draw(self, config: Config, results: Results, path: pathlib.Path) -> None:
        panels = [
            panel(TITLES[name], "log2 of the learning rate", found, legend="channels")
            for name, found in self.grids(config, results).items()
        ]
        reached = ", ".join(
            f"{_search.worded(_search.values(results, name, config.seeds, 'accuracy'))} ({TITLES[name]})"
            for name in ("sp", "mup")
        )
        panels_figure(
            panels,
            title=f"ResNet-9 on images: SGD with momentum, {config.grid_steps} steps of batch "
            f"{config.batch};\naccuracy at {config.target / config.proxy:g} times the proxy's width, "
            f"{config.steps} steps:\n{reached}",
        ).savefig(path, dpi=110)


def _shrunk(examples: data.Examples, side: int) -> data.Examples:
    """Images of fewer pixels, each the mean of a square of the original's."""
    images = np.asarray(examples.inputs)
    size = images.shape[1] // side
    # One after the other, so that it does not depend on the processor.
    squares = (images[:, row::size, column::size] for row in range(size) for column in range(size))
    means = sum(squares, np.float32(0)) / np.float32(size * size)
    return data.Examples(means, np.asarray(examples.targets))


def _training(config: Config, parts: Any, name: str, multiplier: float, steps: int) -> Training:
    """A run of a ResNet-9; held-out data is normalised by the statistics of its own batches."""
    images, valid = parts
    return _search.scored(
        training_run(
            _resnet9,
            Batches(jax.tree.map(jnp.asarray, images), _draw, functools.partial(_fetch, config.side)),
            "sgd",
            steps=steps,
            # The factory counts channels, as widths are whole numbers.
            width=round(multiplier * config.channels),
            base_width=round(config.proxy * config.channels),
            batch=config.batch,
            valid=_search.held_out(valid, batch=config.batch, batches=config.valid // config.batch),
            parametrization=name,
            train=True,
            **({"zero_init": config.zeros} if name == "mup" else {}),
        ),
        _accuracy,
    )


def _resnet9(width: int) -> models.ResNet9:
    return models.ResNet9(models.ResNet9Config(width / 64))


def _draw(examples: data.Examples, key: Any, batch: int, steps: int) -> Any:
    order, change = jax.random.split(key)
    drawn = data.batch_indices(order, len(examples.targets), batch=batch, steps=steps)
    return drawn, jax.random.split(change, steps)


def _fetch(side: int, examples: data.Examples, drawn: Any) -> tuple[Any, Any]:
    """Images, each cropped at a random place and perhaps mirrored, and their classes."""
    places, key = drawn
    move, turn = jax.random.split(key)
    padded = jnp.pad(examples.inputs[places], ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)))
    corners = jax.random.randint(move, (len(places), 2), 0, 2 * PAD + 1)
    images = jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), (side, side, 1)))(
        padded, corners
    )
    mirrored = jax.random.bernoulli(turn, shape=(len(places), 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images), examples.targets[places]


def _accuracy(apply: Any, valid: Any) -> dict[str, Any]:
    """The share of held-out images that are classified correctly."""

    def hits(batch: Any) -> Any:
        images, classes = batch
        return (apply(images).argmax(-1) == classes).mean()

    return {"accuracy": jax.lax.map(hits, valid).mean()}


FIGURE: Final = Images()
