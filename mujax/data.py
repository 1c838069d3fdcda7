"""Real data from installed packages or the user's own files, and pure ways to draw batches from it.

Everything is in memory as NumPy arrays and split into training and validation once and for all. A batch
is a pure function of a key, so that it can be drawn inside `jit`, `vmap` and `scan`.
"""

from __future__ import annotations

import dataclasses
import gzip
import importlib.metadata
import io
import json
import pathlib
import zlib
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, Num, UInt8

from mujax.errors import DataError

MIN_TEXT_BYTES: Final = 10_000
"""The shortest text that `text` takes."""

_REMEDY: Final = 'install it with `pip install "mujax-mup[cli]"`'
_MNIST_SHAPE: Final = (5000, 785)


class Examples(NamedTuple):
    """Inputs with their targets, by example along the leading axes. A batch, or a whole split."""

    inputs: Num[Array | np.ndarray, "*examples _"] | Num[Array | np.ndarray, "..."]
    targets: Int[Array | np.ndarray, "..."]
