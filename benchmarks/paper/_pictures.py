"""Pictures of compared methods and of fronts, as F5 to F8 need them."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def _canvas(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def methods(
    path: pathlib.Path,
    panels: Mapping[str, Mapping[str, Sequence[float] | None]],
    ylabels: Sequence[str],
    title: str,
) -> None:
    """Draws a dot for each seed and a line at the mean, method beside method, a panel for each target.

    Args:
        path: of the PNG.
        panels: target -> method -> a value for each seed; None where it diverged.
        ylabels: what the values of each panel are.
        title: model, data and optimizer.
    """
    figure = _canvas(1.5 + 4.2 * len(panels), 4.4)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, ylabel, (name, found) in zip(all_axes, ylabels, panels.items(), strict=True):
        axes.set_ylabel(ylabel)
        for place, values in enumerate(found.values()):
            colour = colormaps["tab10"](place)
            if values is None:
                axes.text(
                    place, 0.5, "diverges", transform=axes.get_xaxis_transform(), rotation=90, ha="center"
                )
                continue
            axes.plot([place] * len(values), values, "o", color=colour, alpha=0.7)
            axes.hlines(np.mean(values), place - 0.3, place + 0.3, color=colour, linewidth=2.5)
        axes.set_xticks(range(len(found)), list(found), rotation=20, ha="right")
        axes.set_xlim(-0.6, len(found) - 0.4)
        axes.set_title(name, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.savefig(path)


def lines(
    path: pathlib.Path,
    panels: Mapping[
        str, Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float], Sequence[float]]]
    ],
    xlabel: str,
    ylabels: Sequence[str],
    title: str,
) -> None:
    """Draws curves with a band around them, over a logarithmic axis.

    Args:
        path: of the PNG.
        panels: title -> curve -> places, heights, and the lower and upper edge of the band.
        xlabel: of all panels.
        ylabels: of each.
        title: of the picture.
    """
    figure = _canvas(1.0 + 4.8 * len(panels), 4.4)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, ylabel, (name, curves) in zip(all_axes, ylabels, panels.items(), strict=True):
        for place, (label, (at, height, low, high)) in enumerate(curves.items()):
            colour = colormaps["tab10"](place)
            axes.plot(at, height, "o-", color=colour, label=label)
            axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_xscale("log")
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.set_title(name, loc="left")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.savefig(path)
