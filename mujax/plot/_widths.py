"""The picture of `sweep_widths`: loss against learning rate at every width."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mujax._arguments import PATH, instance, takes
from mujax.plot._style import INK, MUTED, OPTIMIZERS, RULE, canvas, style, width_colours
from mujax.tune import LOSS_MEASURE, Report, parametrization_title

_REPORT: Final = instance(Report, "the result of sweep_widths", "mujax.transfer()")


def _array(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values])


def _limits(report: Report) -> tuple[float, float] | None:
    """Limits that show the minima and all losses at the transferred learning rate."""
    curves = [_array(curve) for by_width in report.loss.values() for curve in by_width.values()]
    lowest = [np.nanmin(curve) for curve in curves if np.isfinite(curve).any()]
    if not lowest:
        return None
    at_transferred = [
        curve[report.config.log2_lrs.index(rate)]
        for name, rate in report.transferred_log2_lr.items()
        if rate is not None
        for curve in map(_array, report.loss[name].values())
    ]
    bottom = min(lowest)
    spread = max(max(lowest) - bottom, 0.02 * abs(bottom))
    # A target that nearly diverged at the transferred learning rate must not flatten everything else.
    worst = np.nanmin([np.nanmax([*at_transferred, bottom]), bottom + 6 * spread])
    top = max(float(worst), max(lowest) + spread)
    return bottom - 0.08 * (top - bottom), top + 0.08 * (top - bottom)


def _panel(axes: Axes, report: Report, name: str) -> None:
    config = report.config
    rates = np.array(config.log2_lrs)
    for width, colour in zip(config.widths, width_colours(len(config.widths)), strict=True):
        losses = _array(report.loss[name][width])
        errors = np.nan_to_num(_array(report.standard_error[name][width]))
        is_proxy = width == config.base_width
        label = f"{width} (proxy)" if is_proxy else str(width)
        axes.plot(rates, losses, color=colour, linewidth=2, marker="o", markersize=3.5, label=label)
        axes.fill_between(rates, losses - errors, losses + errors, color=colour, alpha=0.15, linewidth=0)
        optimum = report.best_log2_lr[name][width]
        if optimum is not None:
            finite = np.isfinite(losses)
            height = np.interp(optimum, rates[finite], losses[finite])
            axes.plot(
                optimum, height, marker="*", markersize=15, color=colour, markeredgecolor="white", zorder=5
            )
    rate = report.transferred_log2_lr[name]
    if rate is not None:
        axes.axvline(rate, color=RULE, linewidth=1.4, linestyle=(0, (4, 3)), zorder=1)
    axes.set_title(parametrization_title(name), fontsize=14, fontweight="bold", color=INK, loc="left", pad=26)
    axes.text(0, 1.035, _summary(report, name), transform=axes.transAxes, fontsize=10.5, color=MUTED)
    axes.set_xlabel("log2 of the learning rate", fontsize=11.5, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    style(axes)


def _summary(report: Report, name: str) -> str:
    widest = report.config.widths[-1]
    drift, regret = report.drift_log2[name], report.regret[name][widest]
    moves = "diverges at some width" if drift is None else f"optimum moves by {drift:.1f} powers of two"
    costs = "diverges" if regret is None else f"costs {regret:.3f}"
    return f"{moves}; transfer {costs} at width {widest}"


@takes(report=_REPORT, path=PATH)
def plot_transfer(report: Report, path: str | os.PathLike[str]) -> None:
    """Writes `transfer_figure` to a PNG.

    Args:
        report: a result of `sweep_widths`.
        path: file to write.

    Raises:
        OSError: the file can't be written.
    """
    transfer_figure(report).savefig(path, format="png")


@takes(report=_REPORT)
def transfer_figure(report: Report) -> Figure:
    """Draws loss against log2 learning rate, a panel for each parametrization.

    One curve per width with the standard error shaded, a star at each fitted optimum, a dashed line at the
    proxy's best learning rate. Panels share the vertical axis, which shows all minima: a curve that
    rises far above them leaves the picture, and a curve ends where a run diverged.

    Args:
        report: a result of `sweep_widths`.

    Reference:
        Yang et al., Tensor Programs V, arXiv 2203.03466, Figure 1.
    """
    config = report.config
    count = len(config.parametrizations)
    figure = canvas(1.2 + 5.6 * count, 5.4)
    panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, config.parametrizations, strict=True):
        _panel(axes, report, name)
    limits = _limits(report)
    if limits is not None:
        panels[0].set_ylim(*limits)
    panels[0].set_ylabel(LOSS_MEASURE, fontsize=11.5, color=INK)
    rates = [rate for rate in report.transferred_log2_lr.values() if rate is not None]
    if rates:
        # One label is enough: the proxy is the same model in every panel.
        panels[0].annotate(
            "proxy's best",
            (rates[0], 0.015),
            xycoords=("data", "axes fraction"),
            xytext=(5, 0),
            textcoords="offset points",
            color=RULE,
            fontsize=10.5,
            va="bottom",
        )
    panels[-1].legend(
        title="width",
        frameon=False,
        fontsize=10.5,
        title_fontsize=10.5,
        loc="center left",
        bbox_to_anchor=(1, 0.5),
    )
    optimizer = OPTIMIZERS.get(config.optimizer, config.optimizer)
    seeds = f"{config.seeds} seeds" if config.seeds > 1 else "1 seed"
    figure.suptitle(
        f"{config.title}: {optimizer}, {config.steps} steps of batch {config.batch}, {seeds}",
        fontsize=11.5,
        color=MUTED,
        x=0.01,
        ha="left",
    )
    return figure
