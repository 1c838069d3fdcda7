"""The figures of the µTransfer paper (Tensor Programs V, arXiv 2203.03466), each as a command.

`python -m benchmarks.paper F1` runs one; `_figure.py` is the base of all, `FIGURES` lists their modules.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Final

from benchmarks.paper._figure import Figure

FIGURES: Final[Mapping[str, str]] = {
    "F1": "coordinates",
    "F2": "interpolation",
    "F3": "hyperparameters",
    "F4": "beyond_width",
    "F5": "translation",
    "F6": "language",
    "F7": "masked",
    "F8": "images",
    "F9": "wider",
}
"""The module of each figure, which has it as `FIGURE`."""


def figure(name: str) -> Figure:
    """The figure of that name; its module is imported on use."""
    return importlib.import_module(f"benchmarks.paper.{FIGURES[name]}").FIGURE
