"""The picture of `transfer`: the cost of the tuning at the proxy and at the target, and the target's loss."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Final

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullLocator

from mujax._arguments import PATH, instance, takes
from mujax.plot._style import INK, MUTED, RULE, canvas, style
from mujax.tune import TASKS, Front, TargetRun, Transferred

_PROXY: Final = "#1f6fb4"
_TARGET: Final = "#7b3fa0"
_WINDOW: Final = 40

_TRANSFERRED: Final = instance(Transferred, "the result of transfer", "mujax.transfer(config)")


@takes(transferred=_TRANSFERRED, path=PATH)
def plot_transfer_run(transferred: Transferred, path: str | os.PathLike[str]) -> None:
    """Writes `transfer_run_figure` to a PNG.

    Args:
        transferred: a result of `transfer`.
        path: file to write.

    Raises:
        OSError: the file can't be written.
    """
    transfer_run_figure(transferred).savefig(path, format="png")


@takes(transferred=_TRANSFERRED)
def transfer_run_figure(transferred: Transferred) -> Figure:
    """Draws the cost of tuning on the proxy and at the target, and the training of the target.

    On the left the loss of the best trial of a search against the cost of the search, for searches of the
    numbers of trials that label the points: the median over resamplings, and the band from the tenth to the
    ninetieth percentile. The dashed line is the same search at the target. On the right the target's loss, a
    thin line for each seed, with the proxy's best for comparison.

    Args:
        transferred: a result of `transfer`.

    Reference:
        Yang et al., Tensor Programs V, arXiv 2203.03466, Figure 5.
    """
    figure = canvas(12.2, 5.0)
    left, right = figure.subplots(1, 2)
    _front_panel(left, transferred)
    _curve_panel(right, transferred)
    known = TASKS.get(transferred.task)
    title = transferred.task if known is None else known.title
    figure.suptitle(
        f"{title}: tuned at width {transferred.proxy}, trained at width {transferred.width}",
        fontsize=11.5,
        color=MUTED,
        x=0.01,
        ha="left",
    )
    layout = figure.get_layout_engine()
    if layout is not None:
        layout.set(rect=(0, 0, 0.995, 0.985))  # type: ignore[call-arg]
    return figure


def _heading(axes: Axes, text: str, beneath: str) -> None:
    axes.set_title(text, fontsize=13, fontweight="bold", color=INK, loc="left", pad=24)
    axes.text(0, 1.03, beneath, transform=axes.transAxes, fontsize=10.5, color=MUTED)


def _front_panel(axes: Axes, transferred: Transferred) -> None:
    front, saved = transferred.proxy_front, transferred.saved
    _heading(axes, "What the tuning costs", "best of a random search, median and 10–90 % of resamplings")
    style(axes)
    if front is None:
        _nothing(axes, "the operations of the trials are not known")
        return
    flops = np.array(front.flops)
    axes.fill_between(flops, front.low, front.high, color=_PROXY, alpha=0.16, linewidth=0)
    label = f"proxy, width {transferred.proxy}"
    axes.plot(flops, front.loss, color=_PROXY, linewidth=2, marker="o", markersize=4.5, zorder=4, label=label)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(numticks=8))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("operations of the tuning (FLOPs)", fontsize=11, color=INK)
    axes.set_ylabel(_measure(transferred), fontsize=11, color=INK)
    axes.ticklabel_format(axis="y", useOffset=False)
    _name_sizes(axes, front)
    # The loss of a search of one or two trials may be so high that it flattens all others.
    bottom, top = min(front.low), max(front.loss)
    spread = max(top - bottom, 0.02 * abs(top), 1e-9)
    # The first point has its number on its left.
    axes.set_xlim(0.4 * flops[0], 1.6 * flops[-1] * max(saved or 1.0, 1.0))
    axes.set_ylim(bottom - 0.28 * spread, top + 0.5 * spread)
    if saved is not None:
        there = flops * saved
        label = "same search at the target"
        axes.plot(there, front.loss, color=MUTED, linewidth=1.6, linestyle=(0, (4, 3)), zorder=3, label=label)
        _factor(axes, flops[-1], there[-1], front.loss[-1], saved)
    # A front falls, so the corner above its end is free.
    axes.legend(loc="upper right", frameon=False, fontsize=10.5, labelcolor=INK, borderaxespad=0)


def _name_sizes(axes: Axes, front: Front) -> None:
    """Labels each point with its number of trials, below it."""
    for number, (trials, x, y) in enumerate(zip(front.trials, front.flops, front.loss, strict=True)):
        axes.annotate(
            f"{trials} trial" if trials == 1 else f"{trials} trials" if number == 0 else str(trials),
            (x, y),
            xytext=(-3, -5),
            textcoords="offset points",
            fontsize=8.5,
            color=_PROXY,
            va="top",
            ha="right",
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )


def _factor(axes: Axes, start: float, end: float, height: float, saved: float) -> None:
    """Labels how many times fewer operations there are, between the ends of the two fronts."""
    axes.annotate(
        "",
        xy=(start, height),
        xytext=(end, height),
        arrowprops={"arrowstyle": "<->", "color": RULE, "linewidth": 1.2, "shrinkA": 4, "shrinkB": 5},
    )
    axes.annotate(
        f"{_times(saved)} fewer operations",
        (math.sqrt(start * end), height),
        xytext=(0, -17),
        textcoords="offset points",
        fontsize=11,
        fontweight="bold",
        color=RULE,
        va="top",
        ha="center",
    )


def _times(saved: float) -> str:
    return f"{saved:,.0f}×" if saved >= 10 else f"{saved:.2g}×"


def _measure(transferred: Transferred) -> str:
    return {
        "loss": "loss, mean of the last tenth of the steps",
        "mean_loss": "loss, mean over the run",
        "valid_loss": "loss on held-out data",
    }.get(transferred.objective, transferred.objective.replace("_", " "))


def _smoothed(curve: Sequence[float]) -> tuple[Float[np.ndarray, " steps"], Float[np.ndarray, " steps"]]:
    """Steps and the mean over a window that ends there."""
    losses = np.asarray(curve, float)
    window = max(1, len(losses) // _WINDOW)
    means = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    return np.arange(window, len(losses) + 1), means


def _curve_panel(axes: Axes, transferred: Transferred) -> None:
    _heading(axes, f"The target, width {transferred.width}", _outcome(transferred))
    style(axes)
    runs = [run for run in transferred.runs if np.isfinite(run.curve).any()]
    if not runs:
        _nothing(axes, "it diverged before there was a loss to draw")
        return
    for run in runs:
        steps, losses = _smoothed(run.curve)
        axes.plot(steps, losses, color=_TARGET, linewidth=1.1 if len(runs) > 1 else 1.6, alpha=0.75)
    _limits(axes, runs, transferred)
    axes.set_xlabel("step", fontsize=11, color=INK)
    axes.set_ylabel("training loss", fontsize=11, color=INK)
    if transferred.trial.loss is not None:
        _proxys_best(axes, runs, transferred.trial.loss)


def _proxys_best(axes: Axes, runs: Sequence[TargetRun], level: float) -> None:
    """A line, labelled where the curves are furthest away."""
    axes.axhline(level, color=_PROXY, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    low, high = axes.get_ylim()
    _, last = axes.get_xlim()
    curves = [_smoothed(run.curve) for run in runs]
    steps, losses = (np.concatenate(parts) for parts in zip(*curves, strict=True))

    def room(side: str, above: int) -> float:
        beside = steps < 0.35 * last if side == "left" else steps > 0.65 * last
        near = losses[beside & np.isfinite(losses)]
        return float(np.abs(near - level - above * 0.05 * (high - low)).min(initial=math.inf))

    side, above = max(
        [("right", 1), ("left", 1), ("right", -1), ("left", -1)], key=lambda place: room(*place)
    )
    axes.annotate(
        f"proxy's best, {level:.3f}",
        (0 if side == "left" else 1, level),
        xycoords=("axes fraction", "data"),
        xytext=(5 if side == "left" else -3, 4 * above),
        textcoords="offset points",
        fontsize=10,
        color=_PROXY,
        ha=side,
        va="bottom" if above > 0 else "top",
    )


def _limits(axes: Axes, runs: Sequence[TargetRun], transferred: Transferred) -> None:
    """From the lowest loss to the loss at the start: a spike or a run that diverged leaves the picture."""
    drawn = [_smoothed(run.curve)[1] for run in runs]
    finite = np.concatenate([losses[np.isfinite(losses)] for losses in drawn])
    lowest = [float(finite.min(initial=math.inf)), transferred.trial.loss]
    bottom = min(value for value in lowest if value is not None)
    top = max(float(np.median([losses[0] for losses in drawn])), bottom + 1e-6)
    if not math.isfinite(bottom) or not math.isfinite(top):
        return
    top = min(top * 1.15 if top > 0 else top, float(finite.max()))
    room = 0.06 * (top - bottom)
    axes.set_ylim(bottom - room, max(top, bottom) + 2 * room)
    axes.set_xlim(0, max(transferred.steps, 1))


def _outcome(transferred: Transferred) -> str:
    loss, error = transferred.loss, transferred.standard_error
    seeds = f", {len(transferred.runs)} seeds" if len(transferred.runs) > 1 else ""
    if loss is None:
        lost = sum(run.loss is None for run in transferred.runs)
        return (
            "diverged" if len(transferred.runs) == 1 else f"{lost} of {len(transferred.runs)} seeds diverged"
        )
    within = "" if error is None else f" ± {error:.4f}"
    return f"{transferred.objective.replace('_', ' ')} {loss:.4f}{within}{seeds}"


def _nothing(axes: Axes, why: str) -> None:
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", color=MUTED, fontsize=10.5)
    axes.set_xticks([])
    axes.set_yticks([])
