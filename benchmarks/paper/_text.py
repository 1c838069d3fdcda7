"""Language models on bytes: the data and the training that F3, F4, F6 and F9 share."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from mujax import data, models
from mujax.train import Batches, Training, training_run


def load(path: pathlib.Path | None) -> tuple[Any, str]:
    """Training and held-out bytes, and their fingerprint; the King James Bible where no file is given."""
    found = data.text(path)
    return (jnp.asarray(found.train), jnp.asarray(found.valid)), data.digest((found.train, found.valid))


def transformer(width: int, *, depth: int, heads: int, length: int) -> models.Transformer:
    """The paper's: pre-LN, a fixed number of heads, so that heads grow with the width."""
    return models.Transformer(
        models.TransformerConfig(d_model=width, n_layers=depth, n_heads=heads, max_len=length)
    )


def batches(tokens: Any, length: int) -> Batches:
    """Sequences from random places of a text."""
    return Batches(
        data=tokens,
        draw=lambda tokens, key, batch, steps: data.text_starts(
            len(tokens), key, batch=batch, length=length, steps=steps
        ),
        fetch=lambda tokens, starts: tuple(data.text_window(tokens, starts, length=length)),
    )


def training(
    tokens: Any,
    *,
    width: int,
    base_width: int,
    depth: int,
    heads: int,
    length: int,
    batch: int,
    steps: int,
    parametrization: str = "mup",
    zeros: tuple[str, ...] = (),
    optimizer: str | Callable[[Mapping[str, Any], Any], Any] = "adam",
) -> Training:
    """A run of a Transformer.

    In µP, `zeros` start at zero: `"readout"` and `"query"` are the paper's advice for long runs. In one of a
    few hundred steps the body then learns late, and width gains nothing.
    """
    return training_run(
        functools.partial(_at, depth=depth, heads=heads, length=length),
        batches(tokens, length),
        optimizer,
        steps=steps,
        width=width,
        base_width=base_width,
        batch=batch,
        parametrization=parametrization,
        **({"zero_init": zeros} if parametrization == "mup" else {}),
    )


def _at(width: int, **sizes: int) -> models.Transformer:
    return transformer(width, **sizes)


def operations(*, width: int, depth: int, length: int, batch: int, steps: int) -> float:
    """Of a run, roughly, for the time left: 6 for each parameter and token, and what a step costs anyway."""
    parameters = 12 * depth * width**2 + 512 * width
    return steps * (6 * parameters * batch * length + 3e8)
