"""Token files that are memory-mapped: only what is drawn from them is read."""

from __future__ import annotations

import os
import pathlib
from typing import Final

import numpy as np

from mujax._arguments import COUNT, NONE, PATH, WHOLE_NUMBERS, takes
from mujax.data._files import NUMPY_RAISES
from mujax.data._splits import TextData, need_text, text_data
from mujax.errors import ConfigError, DataError

# The largest vocabulary that is taken from the dtype alone: an embedding of it is still small.
_MAX_VOCAB: Final = 2**16


@takes(path=PATH, vocab_size=COUNT | NONE, dtype=WHOLE_NUMBERS)
def token_file(
    path: str | os.PathLike[str], *, vocab_size: int | None = None, dtype: str = "uint16"
) -> TextData:
    """A text as tokens in a file that may be larger than memory; it is memory-mapped and never read whole.

    Draw batches with `text_stream`, which checks each token that it reads. `load` reads a file whole and
    takes the vocabulary from it.

    Args:
        path: an `.npy` file of whole numbers of shape (n,); any other file holds raw tokens one after the
            other, as `tokens.astype("uint16").tofile(path)` writes them.
        vocab_size: number of different tokens there can be; by default all that one or two bytes can hold.
        dtype: of raw tokens, little-endian.

    Returns:
        The first nine tenths to train on and the last tenth held out, as views of the file.

    Raises:
        DataError: the file is missing, damaged or too short, or holds something else.
        ConfigError: `dtype` is no type of whole numbers, or the vocabulary is not known.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.arange(30_000, dtype="uint16").tofile(f"{folder}/tokens.bin")
    ...     own = token_file(f"{folder}/tokens.bin", vocab_size=50_257)
    ...     own.train.shape, own.valid[:2].tolist(), own.vocab_size
    ((27000,), [27000, 27001], 50257)
    """
    path = pathlib.Path(path)
    tokens = _npy(path) if path.suffix == ".npy" else _raw(path, dtype)
    need_text(path, len(tokens), "tokens")
    if vocab_size is None:
        vocab_size = int(np.iinfo(tokens.dtype).max) + 1
        if vocab_size > _MAX_VOCAB:
            raise ConfigError(
                where="vocab_size",
                expected=f"the number of different tokens in {path}",
                got=f"none, and {tokens.dtype} does not tell it",
                remedy="pass vocab_size=",
            )
    return text_data(tokens, vocab_size)


def _npy(path: pathlib.Path) -> np.ndarray:
    kind = "the tokens of a text, whole numbers of shape (n,)"
    try:
        tokens = np.lib.format.open_memmap(path, mode="r")
    except NUMPY_RAISES as error:
        raise _unreadable(path, f"an .npy file of {kind}", error) from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise DataError(
            where=path,
            expected=kind,
            got=f"{tokens.dtype} of shape {tokens.shape}",
            remedy="save tokens by np.save as whole numbers, one after the other",
        )
    return tokens


def _raw(path: pathlib.Path, dtype: str) -> np.ndarray:
    kind = np.dtype(dtype).newbyteorder("<")
    try:
        size = path.stat().st_size
        if size % kind.itemsize:
            raise DataError(
                where=path,
                expected=f"raw tokens of {kind.itemsize} bytes each",
                got=f"{size:,} bytes, no multiple of it",
                remedy="fetch it again, or give its dtype=",
            )
        if not size:
            # Nothing can be mapped.
            return np.zeros(0, kind)
        return np.memmap(path, kind, mode="r")
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise _unreadable(path, "a file of raw tokens", error) from error


def _unreadable(path: pathlib.Path, expected: str, error: BaseException) -> DataError:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return DataError(
        where=path,
        expected=expected,
        got=f"an error ({text.partition(chr(10))[0].rstrip('.')})",
        remedy="give an existing file in this format",
    )
