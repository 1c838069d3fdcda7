"""Loss against a hyperparameter in several panels, still and animated."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from mujax.plot._style import INK, MUTED, canvas, style, width_colours


@dataclasses.dataclass(frozen=True)
class Panel:
    """One sweep over a hyperparameter at several widths, or depths, batches, ...

    Attributes:
        title: of the panel.
        xlabel: the hyperparameter.
        values: of the hyperparameter, ascending.
        curves: width -> loss at each value; None where it diverged.
        optima: width -> the fitted optimum, marked by a star; may be empty.
        summary: a line under the title.
        names: of the values, where they are not numbers.
        legend: title of the legend.
    """

    title: str
    xlabel: str
    values: Sequence[float]
    curves: Mapping[int, Sequence[float | None]]
    optima: Mapping[int, float | None] = dataclasses.field(default_factory=dict)
    summary: str = ""
    names: Sequence[str] = ()
    legend: str = "width"


def panels_figure(
    panels: Sequence[Panel],
    *,
    columns: int = 4,
    title: str = "",
    ylabel: str = "training loss",
    share_y: bool = True,
    limits_of: Sequence[Panel] | None = None,
) -> Figure:
    """Draws loss against a hyperparameter, a panel for each sweep and a curve for each width.

    A curve ends where a run diverged, and leaves the picture where it rises far above all minima.

    Args:
        panels: in the order of reading.
        columns: panels of a row.
        title: model, data and optimizer.
        ylabel: the measure.
        share_y: whether all panels share the vertical axis.
        limits_of: the panels whose minima the shared axis shows; those drawn by default.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = canvas(1.6 + 3.5 * columns, 0.5 + 3.5 * rows)
    grid = figure.subplots(rows, columns, sharey=share_y, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    together = [curve for panel in limits_of or panels for curve in panel.curves.values()]
    for axes, panel in zip(grid.flat, panels, strict=False):
        _panel(axes, panel)
        limits = _limits(together if share_y else list(panel.curves.values()))
        if limits is not None:
            axes.set_ylim(*limits)
    legends = {(panel.legend, *panel.curves) for panel in panels}
    for axes, panel in list(zip(grid.flat, panels, strict=False))[:: 1 if len(legends) > 1 else -1]:
        axes.legend(title=panel.legend, frameon=False, fontsize=8.5, title_fontsize=8.5, loc="best")
        if len(legends) == 1:
            break
    for row in grid:
        row[0].set_ylabel(ylabel, fontsize=10.5, color=INK)
    figure.suptitle(title, fontsize=11, color=MUTED, x=0.01, ha="left")
    return figure


def _panel(axes: Axes, panel: Panel) -> None:
    values = np.asarray(panel.values, float)
    order = sorted(panel.curves)
    for width, colour in zip(order, width_colours(len(order)), strict=True):
        losses = np.array([np.nan if loss is None else loss for loss in panel.curves[width]])
        axes.plot(values, losses, color=colour, linewidth=1.7, marker="o", markersize=3, label=str(width))
        optimum = panel.optima.get(width)
        finite = np.isfinite(losses)
        if optimum is not None and finite.any():
            height = np.interp(optimum, values[finite], losses[finite])
            axes.plot(
                optimum, height, marker="*", markersize=12, color=colour, markeredgecolor="white", zorder=5
            )
    axes.set_title(panel.title, fontsize=12, fontweight="bold", color=INK, loc="left", pad=20)
    axes.text(0, 1.025, panel.summary, transform=axes.transAxes, fontsize=9.5, color=MUTED)
    axes.set_xlabel(panel.xlabel, fontsize=10.5, color=INK)
    if panel.names:
        axes.set_xticks(values, panel.names, rotation=30, ha="right", fontsize=8.5)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlim(values[0] - 0.3, values[-1] + 0.3)
    style(axes)


def _limits(curves: Sequence[Sequence[float | None]]) -> tuple[float, float] | None:
    """Limits that show all minima and what is near them."""
    known = [[loss for loss in curve if loss is not None] for curve in curves]
    lowest = [min(curve) for curve in known if curve]
    if not lowest:
        return None
    highest = max(max(curve) for curve in known if curve)
    spread = max(max(lowest) - min(lowest), 0.05 * abs(min(lowest)))
    top = min(highest, max(lowest) + 2.5 * spread)
    room = 0.06 * (top - min(lowest)) or 0.1
    return min(lowest) - room, top + room


def animate(frames: Sequence[Figure], path: str | os.PathLike[str], *, seconds: float = 1.0) -> None:
    """Writes figures of one size as an animated GIF that goes there and back.

    Args:
        frames: the figures.
        path: file to write.
        seconds: of each frame; the last one of either direction stays twice as long.
    """
    drawn = []
    for frame in frames:
        agg = FigureCanvasAgg(frame)
        agg.draw()
        drawn.append(Image.fromarray(np.asarray(agg.buffer_rgba())).convert("RGB").quantize(64))
    there = list(range(len(drawn)))
    order = [*there, *there[-2:0:-1]]
    ends = {0, len(drawn) - 1}
    drawn[0].save(
        path,
        save_all=True,
        append_images=[drawn[place] for place in order[1:]],
        duration=[round(1000 * seconds * (2 if place in ends else 1)) for place in order],
        loop=0,
        optimize=True,
    )
