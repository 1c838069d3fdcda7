"""Training curves of several widths, a panel for each parametrization."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from mujax.plot._style import INK, MUTED, canvas, style, width_colours


def curves_figure(
    panels: Mapping[str, Mapping[int, Float[np.ndarray, "seeds points"] | None]],
    *,
    steps: int,
    title: str = "",
) -> Figure:
    """Draws loss against step, a panel for each parametrization and a curve for each width.

    Panels share the vertical axis, which shows the curves of the last panel whole: one that rises far above
    them leaves the picture. The standard error over seeds is shaded.

    Args:
        panels: name of the panel -> width -> losses of each seed at equally spaced steps; None where it
            diverged.
        steps: of a run.
        title: model, data and optimizer.
    """
    figure = canvas(1.2 + 5.2 * len(panels), 4.6)
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    widths = sorted({width for curves in panels.values() for width in curves})
    colours = dict(zip(widths, width_colours(len(widths)), strict=True))
    for axes, (name, curves) in zip(all_axes, panels.items(), strict=True):
        for width in widths:
            table = curves.get(width)
            if table is None:
                axes.plot([], [], color=colours[width], linewidth=2, label=f"{width} (diverges)")
                continue
            at = (np.arange(table.shape[1]) + 0.5) * steps / table.shape[1]
            mean = table.mean(axis=0)
            axes.plot(at, mean, color=colours[width], linewidth=1.6, label=str(width))
            if len(table) > 1:
                error = table.std(axis=0, ddof=1) / np.sqrt(len(table))
                axes.fill_between(
                    at, mean - error, mean + error, color=colours[width], alpha=0.15, linewidth=0
                )
        axes.set_title(name, fontsize=13, fontweight="bold", color=INK, loc="left")
        axes.set_xlabel("step", fontsize=11, color=INK)
        axes.legend(title="width", frameon=False, fontsize=9.5, title_fontsize=9.5, loc="upper right")
        style(axes)
    all_axes[0].set_ylabel("training loss", fontsize=11, color=INK)
    shown = [
        [table.mean(axis=0) for table in curves.values() if table is not None] for curves in panels.values()
    ]
    if shown[-1]:
        low = min(float(curve.min()) for curves in shown for curve in curves)
        high = max(float(curve.max()) for curve in shown[-1])
        all_axes[0].set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))
    figure.suptitle(title, fontsize=11, color=MUTED, x=0.01, ha="left")
    return figure
