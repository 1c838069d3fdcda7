"""F6: a language model with relative attention, tuned on a tiny proxy, against published-style baselines."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from typing import Any, Final

import jax

from benchmarks.paper import _search, _text
from benchmarks.paper._figure import Figure, Inputs, Row
from benchmarks.paper._pictures import methods
from benchmarks.paper._results import Results
from mujax import data, models
from mujax.train import Training, training_run

METHODS: Final = {
    "mup": "relative, µTransfer",
    "absolute": "absolute, published style",
    "larger": "larger, published style",
}
"""Models that are compared at the end."""

BUDGET: Final = 0.07
"""Operations of the tuning, as a share of the target's."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a run.

    Attributes:
        proxy: width that is searched, µP's base.
        target: width of the model that is trained.
        larger: width of the larger baseline, whose weights are 1.5 to 2 times the target's.
        proxy_steps: of a run of the search.
        space: factors to either side of 1 in which multipliers are searched, as log2.
        rates: lowest and highest learning rate of the search, as log2.
        valid: held-out batches, or as many as there are.
        zeros: what starts at zero in µP, as the paper advises for long runs; a short one learns late by it.
    """

    proxy: int
    target: int
    larger: int
    depth: int
    heads: int
    length: int
    batch: int
    proxy_steps: int
    steps: int
    trials: int
    seeds: tuple[int, ...]
    valid: int
    rates: tuple[float, float] = (-9.0, -5.0)
    space: float = 1.0
    zeros: tuple[str, ...] = ()


class Language(Figure):
    """Held-out loss of a target tuned on its proxy, and of two baselines."""

    id = "F6"
    title = "GPT with relative attention"
    source = "their section 7.4 and Table 7"
    claim = (
        "A GPT with relative attention, tuned on a proxy at 7 % of the cost of its one training, ends below "
        "the same model with absolute attention and published hyperparameters, and below a published model "
        "of twice the size."
    )
    scales = {  # noqa: RUF012
        "tiny": Config(
            proxy=8,
            target=64,
            larger=80,
            depth=1,
            heads=2,
            length=16,
            batch=2,
            proxy_steps=4,
            steps=10,
            trials=2,
            seeds=(0, 1),
            valid=2,
        ),
        "laptop": Config(
            proxy=32,
            target=256,
            larger=336,
            depth=2,
            heads=4,
            length=64,
            batch=16,
            proxy_steps=300,
            steps=800,
            trials=6,
            seeds=(0, 1, 2),
            valid=16,
        ),
        # The paper's: width 4096 from 256, depth 32, 350 trials; here what a GPU trains in ten minutes.
        "gpu": Config(
            proxy=64,
            target=512,
            larger=672,
            depth=6,
            heads=8,
            length=256,
            batch=32,
            proxy_steps=800,
            steps=3_000,
            trials=8,
            seeds=(0, 1, 2),
            valid=32,
        ),
    }

    remarks = {  # noqa: RUF012
        "gpu": "The 3,000 steps read the text four and a half times. The training loss of the last hundredth "
        "of a run is 0.10 lower with µTransfer than with absolute attention, 0.08 lower than the larger "
        "model's (curves of the records); the held-out loss is not: all models overfit."
    }

    def data(self, config: Config, inputs: Inputs) -> tuple[Any, str]:
        return _text.load(inputs.text)

    def run(self, config: Config, data: Any, results: Results) -> None:
        def make(width: int, relative: bool, parametrization: str, steps: int) -> Training:
            return _training(config, data, width, relative, parametrization, steps)

        low, high = config.rates
        mult = {"low": 2.0**-config.space, "high": 2.0**config.space, "log": True}
        schedule = {"schedule": "cosine", "warmup": 0.05, "end": 0.1}
        _search.search(
            results,
            "proxy",
            functools.partial(make, config.proxy, True, "mup", config.proxy_steps),
            {
                "learning_rate": {"low": 2.0**low, "high": 2.0**high, "log": True},
                "init_scale": mult,
                "attention_mult": mult,
                "output_mult": mult,
                # Of tokens and distances alike: both are embeddings.
                "input_mult": mult,
            },
            fixed=schedule,
            trials=config.trials,
        )
        found = _search.best(results, "proxy")
        if found is not None:
            _search.repeat(
                results,
                "mup",
                functools.partial(make, config.target, True, "mup", config.steps),
                {**schedule, **found},
                config.seeds,
            )
        for name, width in (("absolute", config.target), ("larger", config.larger)):
            _search.repeat(
                results,
                name,
                functools.partial(make, width, False, "sp", config.steps),
                {**schedule, "learning_rate": published_rate(config.depth, width), "b2": 0.95},
                config.seeds,
            )

    def table(self, config: Config, results: Results) -> list[Row]:
        found = self.found(config, results)
        share = _weights(config, config.larger) / _weights(config, config.target)
        return [
            _search.compared(
                "held-out loss below that of absolute attention with published-style hyperparameters",
                *(found["mup"], found["absolute"]),
            ),
            _search.compared(
                f"held-out loss below that of {share:.2f} times the weights, published-style",
                *(found["mup"], found["larger"]),
            ),
            _search.cost(
                f"tuning costs at most {BUDGET:.0%} of the target's training",
                *(results, "proxy", "mup", config.seeds[0], BUDGET),
            ),
        ]

    def found(self, config: Config, results: Results) -> dict[str, list[float] | None]:
        """Model -> held-out loss of each seed."""
        return {name: _search.values(results, name, config.seeds, "valid_loss") for name in METHODS}

    def draw(self, config: Config, results: Results, path: pathlib.Path) -> None:
        methods(
            path,
            {
                f"width {config.target} (larger: {config.larger})": {
                    METHODS[name]: values for name, values in self.found(config, results).items()
                }
            },
            ["held-out loss"],
            f"GPT on text: proxy of width {config.proxy}, {config.trials} trials of {config.proxy_steps} "
            f"steps; {config.steps} steps",
        )


def published_rate(depth: int, width: int) -> float:
    """Kaplan et al., arXiv 2001.08361, equation D.1: the rate of a decoder with so many weights.

    >>> published_rate(12, 768) < published_rate(2, 256)
    True
    """
    return 0.003239 - 0.0001395 * math.log(12 * depth * width**2)


def _weights(config: Config, width: int) -> int:
    model = _model(width, depth=config.depth, heads=config.heads, length=config.length, relative=False)
    tokens = jax.ShapeDtypeStruct((1, config.length), "int32")
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _training(
    config: Config, texts: Any, width: int, relative: bool, parametrization: str, steps: int
) -> Training:
    train, held_out = texts
    windows = data.text_windows(held_out, length=config.length)
    return training_run(
        functools.partial(
            _model, depth=config.depth, heads=config.heads, length=config.length, relative=relative
        ),
        _text.batches(train, config.length),
        "adam",
        steps=steps,
        width=width,
        base_width=config.proxy,
        batch=config.batch,
        valid=_search.held_out(
            [part.reshape(-1, config.length) for part in windows], batch=config.batch, batches=config.valid
        ),
        parametrization=parametrization,
        **({"zero_init": config.zeros} if parametrization == "mup" else {}),
    )


def _model(width: int, *, depth: int, heads: int, length: int, relative: bool) -> models.Transformer:
    return models.Transformer(
        models.TransformerConfig(
            d_model=width, n_layers=depth, n_heads=heads, max_len=length, relative_positions=relative
        )
    )


FIGURE: Final = Language()
