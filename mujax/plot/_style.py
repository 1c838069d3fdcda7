"""Colours, axes and a canvas for all pictures, without pyplot: no global state, no display."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK: Final = "#222222"
MUTED: Final = "#6b6b6b"
RULE: Final = "#d0342c"
OPTIMIZERS: Final = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD"}
"""Names for captions."""


def canvas(width: float, height: float, *, constrained: bool = True) -> Figure:
    """An empty white figure, in inches."""
    layout = "constrained" if constrained else None
    figure = Figure(figsize=(width, height), dpi=150, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def style(axes: Axes) -> None:
    """Thin, grey axes with horizontal rules."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelcolor=INK)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def width_colours(count: int) -> list[Any]:
    """Light to dark as models grow wider."""
    return [colormaps["viridis_r"](position) for position in np.linspace(0.12, 0.95, count)]


def power_of_two(value: float) -> str:
    """A number as a power of two where it is one, for a label."""
    exponent = math.log2(value)
    return f"$2^{{{exponent:g}}}$" if exponent == round(exponent) else f"{value:g}"
