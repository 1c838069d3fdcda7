"""Data sets: examples or text, each with a held-out part."""

import dataclasses
import hashlib
import math
import pathlib
from typing import Final, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Integer, Num, PyTree

from mujax._arguments import TREE, takes
from mujax.errors import DataError

MIN_TEXT_BYTES: Final = 10_000
"""The shortest text that `text` takes; `load` takes no fewer tokens either."""


def need_text(path: pathlib.Path, length: int, unit: str) -> None:
    """Refuses a text that is too short to be split.

    Args:
        path: of its file.
        length: its size.
        unit: that it is counted in.

    Raises:
        DataError: it is.
    """
    if length < MIN_TEXT_BYTES:
        raise DataError(
            where=path,
            expected=f"a text of at least {MIN_TEXT_BYTES:,} {unit}",
            got=f"{length:,}",
            remedy="give a longer one",
        )


MIN_EXAMPLES: Final = 10
"""The fewest labelled examples that `load` takes from a file that holds none out itself."""


HELD_OUT: Final = 0.1


class Examples(NamedTuple):
    """Inputs and their targets, example by example along the leading axes: a split, or batches of one."""

    inputs: Num[Array | np.ndarray, "*shape"]
    targets: Num[Array | np.ndarray, "*shape"]


@dataclasses.dataclass(frozen=True)
class ExampleData:
    """Labelled examples.

    Attributes:
        train: inputs and targets to train on, float32 or int32. Images have the shape (examples, height,
            width, channels) and are standardised.
        valid: the same, held out.
        n_classes: number of labels; None for a regression, whose targets are floats.
    """

    train: Examples
    valid: Examples
    n_classes: int | None


@dataclasses.dataclass(frozen=True)
class TextData:
    """A text as tokens: its bytes, or the output of the user's own tokenizer.

    Attributes:
        train: the tokens to train on.
        valid: the tokens held out, the last tenth of the text.
        vocab_size: number of different tokens there can be.
    """

    train: Integer[np.ndarray, " train"]
    valid: Integer[np.ndarray, " valid"]
    vocab_size: int = 256


Data = ExampleData | TextData


def shuffled_split(examples: Examples, n_valid: int) -> tuple[Examples, Examples]:
    # RandomState, whose stream never changes; that of a Generator may change with NumPy's version.
    order = np.random.RandomState(0).permutation(len(examples.targets))
    train, valid = order[:-n_valid], order[-n_valid:]
    return (
        Examples(examples.inputs[train], examples.targets[train]),
        Examples(examples.inputs[valid], examples.targets[valid]),
    )


def standardised(train: Examples, valid: Examples) -> tuple[Examples, Examples]:
    """uint8 pixels by mean and standard deviation of the training part, with a channel axis, float32.

    The same on every machine, to the last bit.
    """
    counts = np.bincount(train.inputs.ravel(), minlength=256).tolist()
    # In whole numbers, as sums of floats depend on the processor, and the fingerprint on their last bits.
    count, total, squares = (sum(n * value**power for value, n in enumerate(counts)) for power in range(3))
    mean, std = total / count, math.sqrt(squares * count - total**2) / count
    values = ((np.arange(256) - mean) / (std or 1.0)).astype(np.float32)

    def scaled(part: Examples) -> Examples:
        shape = part.inputs.shape
        return Examples(values[part.inputs].reshape(*shape[:3], *(shape[3:] or (1,))), part.targets)

    return scaled(train), scaled(valid)


def text_data(tokens: Integer[np.ndarray, " n"], vocab_size: int) -> TextData:
    n_train = len(tokens) - round(len(tokens) * HELD_OUT)
    return TextData(train=tokens[:n_train], valid=tokens[n_train:], vocab_size=vocab_size)


@takes(arrays=TREE)
def digest(arrays: PyTree) -> str:
    """A fingerprint of the data: the first 16 hexadecimal digits of the SHA-256 of all its arrays."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(arrays):
        found.update(np.ascontiguousarray(leaf).data)
    return found.hexdigest()[:16]
