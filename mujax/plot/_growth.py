"""How far activations move with width in the first steps: the paper's own picture of a coordinate check."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from mujax.plot._style import INK, MUTED, canvas, style


def growth_figure(
    panels: Mapping[str, Mapping[str, Float[np.ndarray, "widths steps"]]],
    widths: Sequence[int],
    *,
    slopes: Mapping[str, Mapping[str, str]] | None = None,
    title: str = "",
) -> Figure:
    """Draws the change of activations since initialisation against width, a curve for each step.

    A row for each parametrization and a column for each activation; the panels of a column share both axes.

    Args:
        panels: name of the row -> name of the column -> mean absolute change after each step.
        widths: ascending.
        slopes: row -> column -> the fitted power of the width, written into the panel.
        title: model, data and optimizer.

    Reference:
        Yang et al., Tensor Programs V, arXiv 2203.03466, Figure 5.
    """
    columns = list(next(iter(panels.values())))
    figure = canvas(0.8 + 3.1 * len(columns), 0.9 + 2.5 * len(panels))
    all_axes = figure.subplots(len(panels), len(columns), sharex=True, sharey="col", squeeze=False)
    for row, (name, by_column) in zip(all_axes, panels.items(), strict=True):
        for axes, column in zip(row, columns, strict=True):
            table = by_column[column]
            colours = colormaps["plasma"](np.linspace(0.0, 0.8, table.shape[1]))
            for step, colour in enumerate(colours):
                axes.plot(
                    widths, table[:, step], color=colour, marker="o", markersize=3, label=f"step {step + 1}"
                )
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=9))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_locator(FixedLocator(list(widths)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_locator(NullLocator())
            style(axes)
            axes.tick_params(axis="x", labelsize=8)
            text = (slopes or {}).get(name, {}).get(column, "")
            axes.set_title(f"{column}\n{text}", fontsize=10, color=INK, loc="left")
        row[0].set_ylabel(f"{name}\n\nmean absolute change", fontsize=10, color=INK)
    for axes in all_axes[0]:
        # At least a decade: little noise shall not look like growth.
        low, high = axes.get_ylim()
        room = max(1.0, math.sqrt(10 * low / high))
        axes.set_ylim(low / room, high * room)
    for axes in all_axes[-1]:
        axes.set_xlabel("width", fontsize=10, color=INK)
    all_axes[0][-1].legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(title, fontsize=11, color=MUTED, x=0.01, ha="left")
    return figure
