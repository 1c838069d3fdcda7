"""F2: from the framework's default to µP in five steps, an MLP of growing width."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
from typing import Any, Final

import jax.numpy as jnp

import mujax
from benchmarks.paper import _images
from benchmarks.paper._figure import Figure, Inputs, Row
from benchmarks.paper._results import Cell, Results, train
from benchmarks.paper._sweeps import judged, kept, lost, panel
from mujax import data, models
from mujax.check import TransferCheck, best_index, mean, never_worse
from mujax.data import batch_indices
from mujax.plot import animate, panels_figure
from mujax.train import Batches, Training, training_run


@dataclasses.dataclass(frozen=True)
class Multiples:
    """Longer runs in µP that show where its multipliers are best.

    At a share of µP and `r` times the base's width, an MLP whose readout starts at zero trains as in µP with
    the first layer's learning rate over `m` and the output times the root of `m`, for `m = r^(1 - share)`.

    Attributes:
        widths: ascending.
        values: of `m`, ascending.
        log2_rate: the learning rate of all runs.
        steps: of each run.
    """

    widths: tuple[int, ...]
    values: tuple[float, ...]
    log2_rate: float
    steps: int


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a run.

    Attributes:
        widths: ascending; the first is the proxy.
        base: µP's base width, where all parametrizations are the same.
        shares: of µP, from 0, the framework's default, to 1.
        log2_rates: learning rates of SGD.
        output_mult: multiple of the logits, at every width.
        lr_mult_input: multiple of the first layer's learning rate, at every width. As in the demo of
            microsoft/mup the readout starts at zero, and these two are tuned on small models: with ones the
            first layer, which reads 784 pixels, limits the learning rate at all widths.
        multiples: further runs in µP, with other multipliers.
    """

    widths: tuple[int, ...]
    base: int
    shares: tuple[float, ...]
    seeds: tuple[int, ...]
    steps: int
    batch: int
    log2_rates: tuple[float, ...]
    output_mult: float = 4.0
    lr_mult_input: float = 2.0**-4
    multiples: Multiples | None = None


_SHARES: Final = (0.0, 0.25, 0.5, 0.75, 1.0)


class Interpolation(Figure):
    """Loss against the learning rate at several widths, from the default to µP."""

    id = "F2"
    title = "from the framework's default to µP"
    source = "their Figure 3, and the animation of the announcement"
    claim = (
        "From the framework's default to µP, in initialisation and learning rates, the curves of an MLP at "
        "all widths line up: only µP keeps the optimum, it is best of all at the largest, wider is better."
    )
    scales = {  # noqa: RUF012
        "tiny": Config(
            *((16, 32), 16, (0.0, 1.0), (0,), 8, 16, (-5.0, -4.0, -3.0)),
            multiples=Multiples((16, 32), (1.0, 2.0), -4.0, 8),
        ),
        "laptop": Config(
            *((256, 512, 1024, 2048, 4096, 8192), 128, _SHARES, (0,), 100, 64),
            tuple(float(power) for power in range(-10, 0)),
            # The best rate and the steps of `gpu`.
            multiples=Multiples((256, 512, 1024), (1.0, 2.0, 4.0, 8.0), -3.0, 4_690),
        ),
        # The paper's widths and batch, and a quarter of its 20 epochs (of CIFAR-10; here of Fashion-MNIST).
        "gpu": Config(
            *((256, 512, 1024, 2048, 4096, 8192), 128, _SHARES, (0,), 4_690, 64),
            tuple(float(power) for power in range(-10, 0)),
        ),
    }

    remarks = {  # noqa: RUF012
        "laptop": "In 100 steps µP is best of all at the largest width. The last row has as many steps as "
        "those on a GPU: there the best m rises with the width, and a proxy of width 256 does not show it.",
        "gpu": "A quarter of the paper's epochs, one seed. Why the widest models end lower half way to µP: "
        "a parametrization on the way is µP with the first layer's rate over m and the output times the root "
        "of m, where m = (width / 128)^(1 - share), 8 half way at width 8192. The last row at laptop scale, "
        "above, shows that wider models are better with such an m in µP, too: what is lost here is lost by "
        "tuning the multipliers on short runs of narrow models.",
    }

    def data(self, config: Config, inputs: Inputs) -> tuple[Any, str]:
        found = _images.load(inputs.images).train
        return data.Examples(*map(jnp.asarray, found)), data.digest(found)

    def run(self, config: Config, data: Any, results: Results) -> None:
        def cell(setting: str, share: float, width: int, steps: int, m: float = 1.0) -> Cell:
            return Cell(
                setting=setting,
                width=width,
                values=config.log2_rates,
                seeds=config.seeds,
                training=functools.partial(_training, config, data, width, share, steps),
                work=steps * (6 * config.batch * (width**2 + 794 * width) + 3e8),
                fixed={
                    "output_mult": config.output_mult * m**0.5,
                    "lr_mult_input": config.lr_mult_input / m,
                },
            )

        cells = [
            cell(_setting(share), share, width, config.steps)
            for width, share in itertools.product(config.widths, config.shares)
        ]
        if config.multiples is not None:
            cells += [
                dataclasses.replace(
                    cell(_over(m), 1.0, width, config.multiples.steps, m),
                    values=(config.multiples.log2_rate,),
                )
                for width, m in itertools.product(config.multiples.widths, config.multiples.values)
            ]
        train(cells, results)

    def checks(self, config: Config, results: Results) -> dict[float, TransferCheck]:
        """The library's check at each share of µP."""
        return {
            share: judged(
                results,
                _setting(share),
                config.widths,
                config.log2_rates,
                config.seeds,
                proxy=config.widths[0],
            )
            for share in config.shares
        }

    def table(self, config: Config, results: Results) -> list[Row]:
        checks = self.checks(config, results)
        widest = config.widths[-1]
        rows = [
            lost("framework's default: the best learning rate moves by more than 2", checks[0.0], 2.0),
            *(
                lost(f"{share:.0%} µP: the best learning rate moves by more than 1", checks[share], 1.0)
                for share in config.shares[1:-1]
            ),
            kept("µP: the best learning rate moves by at most 1", checks[1.0]),
        ]
        best = {
            share: min((loss for loss in found.loss[widest] if loss is not None), default=None)
            for share, found in checks.items()
        }
        reached = {share: loss for share, loss in best.items() if loss is not None}
        shown = ", ".join(f"{loss:.3f} ({share:.0%})" for share, loss in reached.items())
        rows.append(
            Row(
                f"µP is best of all at width {widest}",
                f"lowest losses {shown}",
                "-",
                bool(reached) and min(reached, key=lambda share: reached[share]) == 1.0,
            )
        )
        rate = config.log2_rates[best_index(checks[1.0].loss[config.widths[0]]) or 0]
        runs = results.sweep(_setting(1.0), config.widths, (rate,), config.seeds)
        losses = [[run.loss for run in by_rate[0]] for by_rate in runs.values()]
        text = ", ".join("diverges" if loss is None else f"{loss:.3f}" for loss in map(mean, losses))
        rows.append(
            Row(
                "µP: at the proxy's best rate wider is better",
                f"losses {text} at 2^{rate:g}",
                "Welch, 95 %" if len(config.seeds) > 1 else "- (one seed)",
                never_worse(losses),
            )
        )
        if config.multiples is not None:
            rows.append(self._best_multiple(config, config.multiples, results))
        return rows

    def _best_multiple(self, config: Config, multiples: Multiples, results: Results) -> Row:
        rate = (multiples.log2_rate,)
        losses = {
            width: [
                mean([run.loss for run in results.sweep(_over(m), (width,), rate, config.seeds)[width][0]])
                for m in multiples.values
            ]
            for width in multiples.widths
        }
        best = {width: best_index(one) for width, one in losses.items()}
        shown = "; ".join(
            ", ".join("diverges" if loss is None else f"{loss:.3f}" for loss in one) + f" at width {width}"
            for width, one in losses.items()
        )
        tried = ", ".join(f"{m:.2g}" for m in multiples.values)
        return Row(
            f"µP, {multiples.steps:,} steps, the first layer's rate over m and the output times its root: "
            "the best m is the same at all widths",
            f"m of {tried}: losses {shown}",
            "-" if len(config.seeds) > 1 else "- (one seed)",
            None if None in best.values() else len({*best.values()}) == 1,
        )

    def draw(self, config: Config, results: Results, path: pathlib.Path) -> None:
        checks = self.checks(config, results)
        panels = [
            panel(_TITLES.get(share, f"{share:.0%} of the way"), "log2 of the learning rate", found)
            for share, found in checks.items()
        ]
        title = (
            f"MLP with 2 hidden layers on images: SGD, {config.steps} steps of batch {config.batch}; "
            "training loss, mean over the run"
        )
        panels_figure(panels, columns=3, title=title).savefig(path, dpi=110)
        animate(
            [panels_figure([one], title="MLP on images", limits_of=panels) for one in panels],
            path.with_suffix(".gif"),
        )


_TITLES: Final = {0.0: "framework's default", 1.0: "µP"}


def _setting(share: float) -> str:
    return f"{share:g} mup"


def _over(m: float) -> str:
    return f"mup, first rate over {m:g}"


def _training(config: Config, images: Any, width: int, share: float, steps: int) -> Training:
    return training_run(
        lambda width: models.MLP(models.MLPConfig(width=width, zero_readout=True)),
        Batches(
            data=images,
            draw=lambda images, key, batch, steps: batch_indices(
                key, len(images.targets), batch=batch, steps=steps
            ),
            fetch=lambda images, order: (images.inputs[order], images.targets[order]),
        ),
        "sgd",
        steps=steps,
        width=width,
        base_width=config.base,
        batch=config.batch,
        parametrization=mujax.interpolate("sp", "mup", share),
    )


FIGURE: Final = Interpolation()
