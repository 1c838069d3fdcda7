"""The built-in models of `mujax coord-check`, each with default widths and a batch.

One real batch where its package is installed, else made-up values of the same shape.

Reference:
    microsoft/mup, `mup.coord_check.get_coord_data`: like there, all steps are taken on one batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from mujax import data, models
from mujax.errors import DataError

Batch = tuple[tuple[Any, ...], Any]
"""Inputs and targets."""

_SIDE: Final = 14
_TEXT_LENGTH: Final = 32
_CLASSES: Final = 10


@dataclasses.dataclass(frozen=True)
class Builtin:
    """A built-in model, small enough to be checked on a laptop in a minute or two.

    Attributes:
        title: for a caption.
        build: a width -> the module.
        widths: default widths.
        batch: a key -> inputs and integer targets.
        kwargs: keyword arguments of the module's call.
    """

    title: str
    build: Callable[[int], Any]
    widths: tuple[int, ...]
    batch: Callable[[Key[Array, ""]], Batch]
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _images(key: Key[Array, ""], batch: int, side: int) -> Batch:
    try:
        drawn = data.image_batches(data.mnist().train, key, batch=batch, steps=1)
    except DataError:
        normal, classes = jax.random.split(key)
        images = jax.random.normal(normal, (batch, side, side, 1))
        return (images,), jax.random.randint(classes, (batch,), 0, _CLASSES)
    images, labels = drawn.inputs[0], drawn.targets[0]
    blocks = jnp.asarray(images).reshape(batch, side, 28 // side, side, 28 // side, 1)
    return (blocks.mean(axis=(2, 4)),), jnp.asarray(labels)


def _tokens(key: Key[Array, ""], batch: int) -> Batch:
    try:
        drawn = data.text_batches(data.text().train, key, batch=batch, length=_TEXT_LENGTH, steps=1)
    except DataError:
        ahead = jax.random.randint(key, (batch, _TEXT_LENGTH + 1), 0, 256)
        return (ahead[:, :-1],), ahead[:, 1:]
    return (jnp.asarray(drawn.inputs[0]),), jnp.asarray(drawn.targets[0])


def _halves(key: Key[Array, ""], batch: int) -> Batch:
    """The second half of each text, to be written after the first."""
    (first,), ahead = _tokens(key, batch)
    half = _TEXT_LENGTH // 2
    return (first[:, :half], first[:, half:]), ahead[:, half:]


def _masked_tokens(key: Key[Array, ""], batch: int) -> Batch:
    """Texts with every seventh byte or so replaced by 1, which no text has."""
    (tokens,), _ = _tokens(key, batch)
    masked = jax.random.bernoulli(jax.random.fold_in(key, 1), 0.15, tokens.shape)
    return (jnp.where(masked, 1, tokens),), tokens


def _small_resnet(width: int) -> Any:
    # ResNet-18 has four times the taps and shows nothing more.
    return models.ResNet(
        models.ResNetConfig(stage_sizes=(1, 1, 1), stage_widths=tuple(width * 2**stage for stage in range(3)))
    )


def _model(name: str, width: int) -> Any:
    return models.BUILD[name](width)[0]


BUILTIN: Final[Mapping[str, Builtin]] = {
    "mlp": Builtin(
        title="MLP with 2 hidden layers",
        build=functools.partial(_model, "mlp"),
        widths=(64, 128, 256, 512),
        batch=functools.partial(_images, batch=64, side=28),
    ),
    "transformer": Builtin(
        title="Transformer with 2 blocks",
        build=functools.partial(_model, "transformer"),
        widths=(32, 64, 128, 256),
        batch=functools.partial(_tokens, batch=8),
    ),
    "relative-transformer": Builtin(
        title="Transformer with 2 blocks and relative positions",
        build=functools.partial(_model, "relative-transformer"),
        widths=(32, 64, 128, 256),
        batch=functools.partial(_tokens, batch=8),
    ),
    "encoder-decoder": Builtin(
        title="Encoder-decoder Transformer with 2 and 2 blocks",
        build=functools.partial(_model, "encoder-decoder"),
        widths=(32, 64, 128, 256),
        batch=functools.partial(_halves, batch=8),
    ),
    "bert": Builtin(
        title="BERT with 2 blocks",
        build=functools.partial(_model, "bert"),
        widths=(32, 64, 128, 256),
        batch=functools.partial(_masked_tokens, batch=8),
    ),
    "resnet": Builtin(
        title="ResNet with 3 blocks",
        build=_small_resnet,
        widths=(8, 16, 32, 64),
        batch=functools.partial(_images, batch=16, side=_SIDE),
        # Batch statistics of its own, or the norms would do nothing.
        kwargs={"train": True},
    ),
    "resnet9": Builtin(
        title="ResNet-9",
        build=functools.partial(_model, "resnet9"),
        widths=(8, 16, 32, 64),
        batch=functools.partial(_images, batch=16, side=_SIDE),
        kwargs={"train": True},
    ),
}
"""By the names of `mujax.models.BUILD`."""
