"""Batches, drawn by a key."""

from __future__ import annotations

from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Integer, Key

from mujax._arguments import COUNT, KEY, NONE, Kind, instance, takes
from mujax.data._splits import Examples
from mujax.errors import DataError

EXAMPLES: Final = instance(Examples, "Examples", "data.train")
TOKENS: Final = Kind(
    "an array of tokens, whole numbers along one axis",
    lambda value: len(value.shape) == 1 and jnp.issubdtype(value.dtype, jnp.integer),
    "data.train",
)
_STARTS: Final = Kind(
    "an array of whole numbers", lambda value: jnp.issubdtype(value.dtype, jnp.integer), "text_starts(...)"
)


@takes(key=KEY, n=COUNT, batch=COUNT, steps=COUNT)
def batch_indices(key: Key[Array, ""], n: int, *, batch: int, steps: int) -> Int[Array, "steps batch"]:
    """The examples of each batch: a new permutation in each epoch.

    No example is repeated within an epoch; the n mod batch left over are skipped. A longer run starts
    with the batches of a shorter one.

    Args:
        key: determines the order.
        n: number of examples.
        batch: examples a step.
        steps: number of batches.

    Raises:
        DataError: fewer examples than a batch takes.
        ConfigError: `batch` or `steps` below 1.

    >>> batch_indices(jax.random.key(0), 10, batch=4, steps=3).shape
    (3, 4)
    """
    need_examples(n, batch)
    per_epoch = n // batch
    epochs = jnp.arange(-(-steps // per_epoch))
    order = jax.vmap(lambda epoch: epoch_order(key, epoch, n))(epochs)
    return order[:, : per_epoch * batch].reshape(-1, batch)[:steps]


def need_examples(n: int, batch: int) -> None:
    if n < batch:
        raise DataError(
            where="batch",
            expected=f"at most {n}, the number of examples",
            got=batch,
            remedy="take a smaller one",
        )


def epoch_order(key: Key[Array, ""], epoch: Int[Array, ""] | int, n: int) -> Int[Array, " n"]:
    return jax.random.permutation(jax.random.fold_in(key, epoch), n)


@takes(examples=EXAMPLES, key=KEY, batch=COUNT, steps=COUNT)
def image_batches(examples: Examples, key: Key[Array, ""], *, batch: int, steps: int) -> Examples:
    """Batches of labelled examples, with a leading step axis.

    Args:
        examples: a split.
        key: determines the order; see `batch_indices`.
        batch: examples a step.
        steps: number of batches.

    Returns:
        Inputs and targets of shape (steps, batch, ...).

    Raises:
        DataError: fewer examples than a batch takes.
        ConfigError: `batch` or `steps` below 1.

    >>> split = Examples(np.zeros((6, 28, 28, 1)), np.arange(6))
    >>> image_batches(split, jax.random.key(0), batch=2, steps=5).inputs.shape
    (5, 2, 28, 28, 1)
    """
    order = batch_indices(key, len(examples.targets), batch=batch, steps=steps)
    return Examples(jnp.asarray(examples.inputs)[order], jnp.asarray(examples.targets)[order])


def need_tokens(n: int, length: int) -> None:
    if n <= length:
        raise DataError(
            where="text",
            expected=f"more than length={length} tokens, so that each has a next one",
            got=n,
            remedy="take shorter sequences or a longer text",
        )


@takes(n=COUNT, key=KEY, batch=COUNT, length=COUNT, steps=COUNT)
def text_starts(
    n: int, key: Key[Array, ""], *, batch: int, length: int, steps: int
) -> Int[Array, "steps batch"]:
    """The start of each sequence of each step in a text: random places with `length` more tokens behind each.

    Much smaller than the batches: a long scan takes the starts and reads the tokens with `text_window`.
    A longer run starts with the places of a shorter one.

    Args:
        n: number of tokens of the text.
        key: determines the places.
        batch: sequences a step.
        length: tokens a sequence.
        steps: number of batches.

    Raises:
        DataError: the text is not longer than a sequence.
        ConfigError: `batch`, `length` or `steps` below 1.

    >>> starts = text_starts(100, jax.random.key(0), batch=2, length=8, steps=5)
    >>> starts.shape, bool((starts + 8 < 100).all())
    ((5, 2), True)
    """
    need_tokens(n, length)
    return jax.vmap(lambda step: step_starts(key, step, n - length, batch))(jnp.arange(steps))


def step_starts(
    key: Key[Array, ""], step: Int[Array, ""] | int, places: int, batch: int
) -> Int[Array, " batch"]:
    return jax.random.randint(jax.random.fold_in(key, step), (batch,), 0, places)


@takes(tokens=TOKENS, starts=_STARTS, length=COUNT)
def text_window(
    tokens: Integer[np.ndarray | Array, " n"], starts: Int[np.ndarray | Array, "*shape"], *, length: int
) -> Examples:
    """The sequences of a text that start at given places.

    Args:
        tokens: the text.
        starts: their starts, with at least `length` more tokens behind each: the result of `text_starts`
            for this text and length, or one step of it.
        length: tokens a sequence.

    Returns:
        Inputs, and targets one token ahead of them, int32 of shape (*shape, length).

    Raises:
        DataError: the text is not longer than a sequence.
        ConfigError: `length` below 1.

    >>> inputs, targets = text_window(np.frombuffer(b"abcdefg", np.uint8), np.array([0, 3]), length=3)
    >>> inputs.tolist(), targets.tolist()
    ([[97, 98, 99], [100, 101, 102]], [[98, 99, 100], [101, 102, 103]])
    """
    need_tokens(len(tokens), length)
    places = jnp.add.outer(jnp.asarray(starts), jnp.arange(length + 1))
    windows = jnp.asarray(tokens)[places].astype(jnp.int32)
    return Examples(windows[..., :-1], windows[..., 1:])


@takes(tokens=TOKENS, key=KEY, batch=COUNT, length=COUNT, steps=COUNT)
def text_batches(
    tokens: Integer[np.ndarray | Array, " n"], key: Key[Array, ""], *, batch: int, length: int, steps: int
) -> Examples:
    """Batches of sequences from random places of a text, with a leading step axis.

    A longer run starts with the batches of a shorter one.

    Args:
        tokens: the text.
        key: determines the places.
        batch: sequences a step.
        length: tokens a sequence.
        steps: number of batches.

    Returns:
        Inputs, and targets one token ahead of them, int32 of shape (steps, batch, length).

    Raises:
        DataError: the text is not longer than a sequence.
        ConfigError: `batch`, `length` or `steps` below 1.

    >>> inputs, targets = text_batches(
    ...     np.frombuffer(b"ab" * 50, np.uint8), jax.random.key(0), batch=2, length=8, steps=5
    ... )
    >>> inputs.shape, bool((inputs[..., 1:] == targets[..., :-1]).all())
    ((5, 2, 8), True)
    """
    starts = text_starts(len(tokens), key, batch=batch, length=length, steps=steps)
    return text_window(tokens, starts, length=length)


@takes(tokens=TOKENS, length=COUNT, limit=COUNT | NONE)
def text_windows(
    tokens: Integer[np.ndarray | Array, " n"], *, length: int, limit: int | None = None
) -> Examples:
    """The text cut into sequences end to end: each token is predicted once, to validate on.

    Args:
        tokens: the text.
        length: tokens a sequence; the rest at the end is dropped.
        limit: take no more than this number of sequences, from the beginning.

    Returns:
        Inputs, and targets one token ahead of them, int32 of shape (sequences, length).

    Raises:
        DataError: the text is not longer than a sequence.
        ConfigError: `length` or `limit` below 1.

    >>> text_windows(np.frombuffer(b"abcdefg", np.uint8), length=3).targets.tolist()
    [[98, 99, 100], [101, 102, 103]]
    """
    need_tokens(len(tokens), length)
    count = min((len(tokens) - 1) // length, limit or len(tokens))
    ahead = jnp.asarray(tokens[: count * length + 1]).astype(jnp.int32)
    return Examples(ahead[:-1].reshape(count, length), ahead[1:].reshape(count, length))
