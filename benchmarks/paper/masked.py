"""F7: BERT on masked words, from one proxy to two larger shapes."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any, Final

import jax
import jax.numpy as jnp
import optax

from benchmarks.paper import _search, _text
from benchmarks.paper._figure import TITLES, Figure, Inputs, Row
from benchmarks.paper._pictures import methods
from benchmarks.paper._results import Results
from mujax import data, models
from mujax.train import Batches, Training, training_run

MASK: Final = 1
"""The byte that stands for a masked one; no text has it."""

SHARE: Final = 0.15
"""Of words that are to be predicted."""

METHODS: Final = {
    "mup": "µTransfer",
    "naive": "naive transfer",
    "published": "published style",
}
"""Ways to the target's hyperparameters: the proxy's in µP, the proxy's as they are, and BERT's."""

PUBLISHED_RATE, PUBLISHED_WIDTH = 1e-4, 768
"""Of BERT-base: Devlin et al., arXiv 1810.04805, A.2. For other widths it is taken as 1/width."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """Width and depth of a model."""

    width: int
    depth: int


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a run.

    Attributes:
        proxy: the shape that is searched; its width is µP's base.
        targets: the shapes that are trained, by name.
        head: size of a head, the same for all.
        space: factors to either side of 1 in which multipliers are searched, as log2.
        rates: lowest and highest learning rate of the search, as log2.
        valid: held-out batches, or as many as there are.
        search_seeds: runs of each trial: with one, the best is found where it happened not to fail.
        zeros: what starts at zero in µP, as the paper advises for long runs; a short one learns late by it.
    """

    proxy: Shape
    targets: dict[str, Shape]
    head: int
    length: int
    batch: int
    steps: int
    trials: int
    seeds: tuple[int, ...]
    valid: int
    rates: tuple[float, float] = (-12.0, -6.0)
    space: float = 1.0
    search_seeds: int = 2
    zeros: tuple[str, ...] = ()


class Masked(Figure):
    """Held-out loss of two targets, tuned in three ways."""

    id = "F7"
    title = "BERT"
    source = "their Table 6"
    claim = (
        "BERT-base and BERT-large with the hyperparameters of one small proxy in µP end below the same "
        "models with the published hyperparameters, and below naive transfer of the proxy's hyperparameters."
    )
    scales = {  # noqa: RUF012
        "tiny": Config(
            proxy=Shape(16, 1),
            targets={"base": Shape(32, 1)},
            head=8,
            length=16,
            batch=2,
            steps=8,
            trials=2,
            seeds=(0, 1),
            valid=2,
        ),
        # A sixth of the depth and of the width of BERT-base and BERT-large, in whole heads. After 400 steps
        # the loss is still about the entropy of single letters, 3.0.
        "laptop": Config(
            proxy=Shape(64, 2),
            targets={"base": Shape(128, 2), "large": Shape(192, 4)},
            head=32,
            length=64,
            batch=16,
            steps=1000,
            trials=12,
            seeds=(0, 1, 2),
            valid=16,
            rates=(-12.0, -8.0),
        ),
        "gpu": Config(
            proxy=Shape(256, 4),
            targets={"base": Shape(768, 12), "large": Shape(1024, 24)},
            head=64,
            length=128,
            batch=256,
            steps=10_000,
            trials=64,
            seeds=(0, 1, 2),
            valid=16,
            zeros=("query",),
        ),
    }

    remarks = {  # noqa: RUF012
        "laptop": "With naive transfer one of the larger model's three seeds stays at a training loss of "
        "3.0, which all models reach in a tenth of the steps, and another falls back to it; Welch's interval "
        "of three such seeds is wide. At twice the proxy's width naive transfer does no harm yet. One run of "
        "the larger model costs as much as 14 of the proxy, and the search makes 24."
    }

    def data(self, config: Config, inputs: Inputs) -> tuple[Any, str]:
        return _text.load(inputs.text)

    def run(self, config: Config, data: Any, results: Results) -> None:
        def make(shape: Shape, parametrization: str) -> Training:
            return _training(config, data, shape, parametrization)

        low, high = config.rates
        mult = {"low": 2.0**-config.space, "high": 2.0**config.space, "log": True}
        schedule = {"schedule": "linear", "warmup": 0.1, "end": 0.0}
        _search.search(
            results,
            "proxy",
            functools.partial(make, config.proxy, "mup"),
            {
                "learning_rate": {"low": 2.0**low, "high": 2.0**high, "log": True},
                # Of embeddings, gains and biases alike: they have one role.
                "lr_mult_input": mult,
                "output_mult": mult,
                "attention_mult": mult,
                "init_scale": mult,
            },
            fixed=schedule,
            trials=config.trials,
            seeds=config.search_seeds,
        )
        found = _search.best(results, "proxy")
        for name, shape in config.targets.items():
            rate = PUBLISHED_RATE * PUBLISHED_WIDTH / shape.width
            tuned = None if found is None else {**schedule, **found}
            hparams = {
                "mup": tuned,
                "naive": tuned,
                "published": {**schedule, "learning_rate": rate},
            }
            for method, chosen in hparams.items():
                if chosen is not None:
                    _search.repeat(
                        results,
                        f"{method} {name}",
                        functools.partial(make, shape, "mup" if method == "mup" else "sp"),
                        chosen,
                        config.seeds,
                    )

    def table(self, config: Config, results: Results) -> list[Row]:
        rows = []
        for name in config.targets:
            found = self.found(config, results, name)
            rows += [
                _search.compared(
                    f"{name}: held-out loss of µTransfer below {METHODS[other]} in the {TITLES['sp']}",
                    found["mup"],
                    found[other],
                )
                for other in ("published", "naive")
            ]
        # The paper's "total tuning cost" is one pretraining of BERT-large.
        largest = [*config.targets][-1]
        rows.append(
            _search.cost(
                f"tuning costs at most one training of {largest}",
                *(results, "proxy", f"mup {largest}", config.seeds[0], 1.0),
            )
        )
        return rows

    def found(self, config: Config, results: Results, name: str) -> dict[str, list[float] | None]:
        """Method -> held-out loss of each seed."""
        return {
            method: _search.values(results, f"{method} {name}", config.seeds, "valid_loss")
            for method in METHODS
        }

    def draw(self, config: Config, results: Results, path: pathlib.Path) -> None:
        methods(
            path,
            {
                f"{name}: width {shape.width}, depth {shape.depth}": {
                    METHODS[method]: values for method, values in self.found(config, results, name).items()
                }
                for name, shape in config.targets.items()
            },
            ["held-out loss of masked bytes"] * len(config.targets),
            f"BERT on text: proxy of width {config.proxy.width}, {config.trials} trials; {config.steps} "
            f"steps of batch {config.batch}",
        )


def _training(config: Config, texts: Any, shape: Shape, parametrization: str) -> Training:
    train, held_out = texts
    windows = data.text_windows(held_out, length=config.length).inputs.reshape(-1, config.length)
    keys = jax.random.split(jax.random.key(0), config.valid)
    parts = _search.held_out([windows], batch=config.batch, batches=config.valid)
    valid = [hide(part, key) for (part,), key in zip(parts, keys, strict=False)]

    def draw(tokens: Any, key: Any, batch: int, steps: int) -> Any:
        place, mask = jax.random.split(key)
        starts = data.text_starts(len(tokens), place, batch=batch, length=config.length, steps=steps)
        return starts, jax.random.split(mask, steps)

    def fetch(tokens: Any, drawn: Any) -> tuple[Any, Any]:
        starts, key = drawn
        return hide(data.text_window(tokens, starts, length=config.length).inputs, key)

    return training_run(
        functools.partial(_bert, depth=shape.depth, head=config.head, length=config.length),
        Batches(train, draw, fetch),
        "adam",
        steps=config.steps,
        width=shape.width,
        base_width=config.proxy.width,
        batch=config.batch,
        loss=masked_loss,
        valid=valid,
        parametrization=parametrization,
        **({"zero_init": config.zeros} if parametrization == "mup" else {}),
    )


def _bert(width: int, *, depth: int, head: int, length: int) -> models.Bert:
    return models.Bert(
        models.BertConfig(
            d_model=width,
            n_layers=depth,
            head_dim=head,
            vocab_size=256,
            max_len=length,
            n_types=0,
            pad=None,
        )
    )


def hide(tokens: Any, key: Any) -> tuple[Any, Any]:
    """Masks whole words, as BERT's authors do: 80 % of them masked, 10 % replaced, 10 % left.

    Args:
        tokens: bytes, (batch, length).
        key: determines the words.

    Returns:
        The text with words masked, and the bytes to be predicted; -1 for all others.
    """
    lower = tokens | 32
    is_letter = (lower >= ord("a")) & (lower <= ord("z"))
    # All bytes of a word, and the bytes up to it, have one number.
    starts = is_letter & ~jnp.pad(is_letter[:, :-1], ((0, 0), (1, 0)))
    word = jnp.cumsum(starts, axis=1)
    chosen_key, way_key, byte_key = jax.random.split(key, 3)
    shape = (tokens.shape[0], tokens.shape[1] + 1)
    chosen, way = (
        jnp.take_along_axis(jax.random.uniform(one, shape), word, axis=1) for one in (chosen_key, way_key)
    )
    hidden = is_letter & (chosen < SHARE)
    other = jax.random.randint(byte_key, tokens.shape, ord("a"), ord("z") + 1, tokens.dtype)
    instead = jnp.where(way < 0.8, MASK, jnp.where(way < 0.9, other, tokens))
    return jnp.where(hidden, instead, tokens), jnp.where(hidden, tokens, -1)


def masked_loss(logits: Any, targets: Any) -> Any:
    """Mean cross-entropy over the bytes to be predicted."""
    asked = targets >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    return jnp.where(asked, losses, 0.0).sum() / jnp.maximum(asked.sum(), 1)


FIGURE: Final = Masked()
