"""Built-in tasks: a model of any width, real data, and default settings."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mujax import data, models

_TEXT_LENGTH: Final = 64
_HEAD: Final = 16


@dataclasses.dataclass(frozen=True)
class Task:
    """A model and its data.

    Attributes:
        title: for a caption.
        build: a width -> the module and the abstract inputs to trace it with.
        load: the user's own file, or None -> training data and held-out data.
        draw: training data, key, batch size, number of steps -> an identifier of each step's batch, along a
            leading axis.
        fetch: training data, one of these identifiers -> inputs and integer targets.
        valid: held-out data -> batches of them, along a leading axis.
        takes_text: the data can be the user's own text.
        width_step: every width must be a multiple of it.
        widths: default widths of a sweep over widths; the first is the proxy.
        target: default width of the model that hyperparameters are tuned for.
        log2_lrs: default learning rates for each optimizer, as powers of two.
        seeds: default number of seeds.
        steps: default number of steps.
        batch: default examples a step.
        space: the tuned hyperparameters by default.
    """

    title: str
    build: Callable[[int], tuple[Any, tuple[jax.ShapeDtypeStruct, ...]]]
    load: Callable[[pathlib.Path | None], tuple[Any, Any]]
    draw: Callable[[Any, Array, int, int], Any]
    fetch: Callable[[Any, Any], data.Examples]
    valid: Callable[[Any], data.Examples]
    takes_text: bool
    width_step: int
    widths: tuple[int, ...]
    target: int
    log2_lrs: Mapping[str, tuple[float, ...]]
    seeds: int
    steps: int
    batch: int
    space: Mapping[str, Any]

    @property
    def proxy(self) -> int:
        """The width at which hyperparameters are tuned."""
        return self.widths[0]


def _build_mlp(width: int) -> tuple[Any, tuple[jax.ShapeDtypeStruct, ...]]:
    module = models.MLP(models.MLPConfig(width=width, depth=3))
    return module, (jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32),)


def _build_transformer(width: int) -> tuple[Any, tuple[jax.ShapeDtypeStruct, ...]]:
    config = models.TransformerConfig(d_model=width, n_layers=2, head_dim=_HEAD, max_len=_TEXT_LENGTH)
    return models.Transformer(config), (jax.ShapeDtypeStruct((1, _TEXT_LENGTH), jnp.int32),)


def _octaves(low: int, high: int, step: int = 1) -> tuple[float, ...]:
    return tuple(float(exponent) for exponent in range(low, high + 1, step))


def powers(low: float, high: float) -> dict[str, Any]:
    """A range of powers of two, in the form of a space."""
    return {"low": 2.0**low, "high": 2.0**high, "log": True}


_EVERYWHERE: Final[Mapping[str, Any]] = {
    "learning_rate": powers(-11, -5),
    "lr_mult_input": powers(-1, 1),
    "lr_mult_output": powers(-1, 1),
    "init_scale": powers(-1, 1),
    "output_mult": powers(-1, 1),
    "warmup": {"low": 0.0, "high": 0.2},
    "end": {"low": 0.0, "high": 0.2},
}
"""The hyperparameters that the paper tunes on the proxy, in ranges around the models' defaults.

A random search of some tens of trials in as many dimensions finds less in wider ranges: with factors of 4 to
8 in place of 2, the best of 32 trials was worse than the best learning rate alone.
"""


def _mnist(path: pathlib.Path | None) -> tuple[data.Examples, data.Examples]:
    del path
    found = data.mnist()
    return data.Examples(*map(jnp.asarray, found.train)), data.Examples(*map(jnp.asarray, found.valid))


def in_batches(examples: data.Examples, batch: int, limit: int) -> data.Examples:
    """The first examples in batches along a leading axis; the rest at the end is dropped."""
    count = max(1, min(limit, len(examples.targets) // batch))
    size = min(batch, len(examples.targets))
    return data.Examples(
        *(jnp.asarray(part[: count * size]).reshape(count, size, *part.shape[1:]) for part in examples)
    )


TASKS: Final[Mapping[str, Task]] = {
    "mnist-mlp": Task(
        title="MLP with 3 hidden layers on MNIST",
        build=_build_mlp,
        load=_mnist,
        draw=lambda train, key, batch, steps: data.batch_indices(
            key, len(train.targets), batch=batch, steps=steps
        ),
        fetch=lambda train, order: data.Examples(train.inputs[order], train.targets[order]),
        valid=lambda valid: valid,
        takes_text=False,
        width_step=1,
        widths=(64, 128, 256, 512, 1024),
        target=1024,
        log2_lrs={"adam": _octaves(-12, -5), "adamw": _octaves(-12, -5), "sgd": _octaves(-8, 1)},
        seeds=3,
        steps=80,
        batch=64,
        space=_EVERYWHERE,
    ),
    "text-transformer": Task(
        title="Transformer with 2 blocks on English text, byte by byte",
        build=_build_transformer,
        load=lambda path: tuple(map(jnp.asarray, (data.text(path).train, data.text(path).valid))),
        draw=lambda train, key, batch, steps: data.text_starts(
            len(train), key, batch=batch, length=_TEXT_LENGTH, steps=steps
        ),
        fetch=lambda train, starts: data.text_window(train, starts, length=_TEXT_LENGTH),
        valid=lambda valid: data.text_windows(valid, length=_TEXT_LENGTH),
        takes_text=True,
        width_step=_HEAD,
        # From 32 µP's optimum moved by 0.83 in one of five sweeps: so narrow a model's own optimum is noisy.
        widths=(48, 96, 192),
        target=256,
        # A factor of 4 apart: with seed 0 the fitted optima are within 0.05 of those a factor of 2 apart.
        log2_lrs={"adam": _octaves(-12, -4, 2), "adamw": _octaves(-12, -4, 2), "sgd": _octaves(-7, 3)},
        seeds=1,
        steps=80,
        batch=8,
        space={**_EVERYWHERE, "attention_mult": powers(-1, 1), "input_mult": powers(-1, 3)},
    ),
}
"""By the name used on the command line."""
