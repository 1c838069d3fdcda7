"""The picture of `sweep`: the loss of every trial against each hyperparameter."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from mujax._arguments import NAMED, NONE, PATH, TEXT, instance, takes
from mujax.errors import ConfigError
from mujax.plot._style import INK, MUTED, RULE, canvas, power_of_two, style
from mujax.tune import Sweep, Trial

_COLUMNS: Final = 4
_BEST: Final = 10
_LOG_FROM: Final = 20.0
_DOT: Final = "#9aa7b4"
_GOOD: Final = "#1f6fb4"
# In inches.
_PANEL: Final = (2.55, 2.25)
_HEAD: Final = 1.0

_SWEEP: Final = instance(Sweep, "the result of sweep or tune", "mujax.tune(config)")


@takes(sweep=_SWEEP, path=PATH, title=TEXT, space=NAMED | NONE)
def plot_sweep(
    sweep: Sweep,
    path: str | os.PathLike[str],
    title: str = "",
    *,
    space: Mapping[str, Any] | None = None,
) -> None:
    """Writes `sweep_figure` to a PNG.

    Args:
        sweep: as for `sweep_figure`.
        path: file to write.
        title: as for `sweep_figure`.
        space: as for `sweep_figure`.

    Raises:
        ConfigError: as `sweep_figure` does.
        OSError: the file can't be written.
    """
    sweep_figure(sweep, title, space=space).savefig(path, format="png")


@takes(sweep=_SWEEP, title=TEXT, space=NAMED | NONE)
def sweep_figure(sweep: Sweep, title: str = "", *, space: Mapping[str, Any] | None = None) -> Figure:
    """Draws the loss against each hyperparameter that was tuned, a panel for each.

    The ten best trials are in colour, so that it can be seen where in each range they lie, and the best is a
    star. Pruned trials are hollow, with their last loss; losses far above the others are
    triangles at the upper edge; and those that diverged are ticks above the panels. An axis is logarithmic
    where the space is; if the space is unknown, where its values span a factor of twenty.

    Args:
        sweep: a result of `sweep` or `tune`.
        title: model and data that were tuned.
        space: the searched space, which gives the logarithmic axes.

    Raises:
        ConfigError: there are no trials to draw.
    """
    names = list(dict.fromkeys(name for trial in sweep.trials for name in trial.hparams))
    if not names:
        raise ConfigError(where="sweep", expected="at least one trial to draw", got="none")
    columns = min(_COLUMNS, len(names))
    rows = -(-len(names) // columns)
    height = _HEAD + rows * (_PANEL[1] + 0.55)
    figure = canvas(max(0.9 + columns * _PANEL[0], 6.4), height)
    layout = figure.get_layout_engine()
    if layout is not None:
        layout.set(rect=(0, 0, 1, 1 - _HEAD / height), h_pad=0.06, w_pad=0.06)  # type: ignore[call-arg]
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    top = _top(sweep)
    for axes, name in zip(panels.flat, names, strict=False):
        _panel(axes, sweep, name, (space or {}).get(name), top)
    for axes in list(panels.flat)[len(names) :]:
        axes.set_visible(False)
    _loss_axis(panels[0][0], sweep, top)
    for row in panels:
        row[0].set_ylabel(sweep.objective.replace("_", " "), fontsize=10.5, color=INK)
    left = 0.12 / figure.get_figwidth()
    figure.text(left, 1 - 0.34 / height, title or f"{sweep.study or 'sweep'}", fontsize=13, color=INK)
    figure.text(left, 1 - 0.60 / height, _summary(sweep), fontsize=10.5, color=MUTED)
    figure.legend(
        handles=_legend(sweep),
        loc="upper left",
        bbox_to_anchor=(left, 1 - 0.73 / height),
        ncols=6,
        frameon=False,
        fontsize=10,
        labelcolor=INK,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.0,
        handletextpad=0.4,
        columnspacing=1.4,
    )
    return figure


def _summary(sweep: Sweep) -> str:
    seeds = f" of {sweep.seeds} seeds" if sweep.seeds > 1 else ""
    best = sweep.best
    found = "none reached its end" if best is None else f"best: trial {best.number}, {best.loss:.4f}"
    trials = "1 trial" if len(sweep.trials) == 1 else f"{len(sweep.trials)} trials"
    return f"{trials}{seeds}; {found}"


def _whole(sweep: Sweep) -> list[Trial]:
    """Trials that reached their end, the best first."""
    whole = [trial for trial in sweep.trials if trial.loss is not None and not trial.pruned]
    return sorted(whole, key=lambda trial: trial.loss or 0.0)


def _is_log(values: Sequence[float], searched: Any = None) -> bool:
    """Whether an axis is logarithmic: as in the space, else by the range of the values."""
    if not values or min(values) <= 0:
        return False
    if isinstance(searched, Mapping):
        return bool(searched.get("log", False))
    is_log = getattr(searched, "log", None)
    return max(values) / min(values) > _LOG_FROM if is_log is None else bool(is_log)


def _panel(axes: Axes, sweep: Sweep, name: str, searched: Any, top: float) -> None:
    trials = [trial for trial in sweep.trials if name in trial.hparams]
    values = [trial.hparams[name] for trial in trials]
    if all(isinstance(value, numbers.Real) and not isinstance(value, bool) for value in values):
        places = [float(value) for value in values]
        if _is_log(places, searched):
            _powers(axes, places)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(4))
    else:
        places = _categories(axes, trials, values, searched)
    good = {trial.number for trial in _whole(sweep)[:_BEST]}
    best = sweep.best
    for place, trial in zip(places, trials, strict=True):
        if trial.loss is None:
            axes.plot(
                place,
                1.035,
                marker="|",
                markersize=8,
                markeredgewidth=1.4,
                color=RULE,
                transform=axes.get_xaxis_transform(),
                clip_on=False,
            )
        elif trial.loss > top:
            axes.plot(
                place,
                0.975,
                marker="^",
                markersize=5,
                color=_DOT,
                transform=axes.get_xaxis_transform(),
                clip_on=False,
            )
        elif best is not None and trial.number == best.number:
            axes.plot(
                place, trial.loss, marker="*", markersize=15, color=RULE, markeredgecolor="white", zorder=5
            )
        elif trial.pruned:
            axes.plot(place, trial.loss, marker="o", markersize=4, color=_DOT, markerfacecolor="white")
        else:
            is_good = trial.number in good
            axes.plot(
                place,
                trial.loss,
                marker="o",
                markersize=5.5 if is_good else 4.5,
                color=_GOOD if is_good else _DOT,
                markeredgecolor="white",
                markeredgewidth=0.5,
                zorder=4 if is_good else 3,
            )
    axes.set_title(name.replace("_", " "), fontsize=11, color=INK, loc="left", pad=15)
    style(axes)


def _powers(axes: Axes, places: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    octaves = math.log2(max(places) / min(places))
    if octaves < 1:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes.xaxis.set_major_locator(LogLocator(base=2, subs=(1.0, 1.25, 1.5, 1.75)))
    else:
        axes.xaxis.set_major_locator(LogLocator(base=2, numticks=6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: power_of_two(value)))
    axes.xaxis.set_minor_locator(NullLocator())


def _categories(axes: Axes, trials: Sequence[Trial], values: Sequence[Any], searched: Any) -> list[float]:
    """Places side by side, with the trials of each spread out a little."""
    listed = searched if isinstance(searched, list | tuple) else getattr(searched, "choices", ())
    known = list(dict.fromkeys([*listed, *sorted(set(values), key=str)]))
    axes.xaxis.set_major_locator(FixedLocator(list(range(len(known)))))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda place, _: str(known[round(place)]) if 0 <= round(place) < len(known) else "")
    )
    axes.set_xlim(-0.6, len(known) - 0.4)
    # The golden ratio spreads any number of them evenly.
    spread = [0.5 * (trial.number * 0.618 % 1 - 0.5) for trial in trials]
    return [known.index(value) + by for value, by in zip(values, spread, strict=True)]


def _top(sweep: Sweep) -> float:
    """The highest loss in the picture: a trial that nearly diverged must not flatten all others."""
    losses = np.array([trial.loss for trial in sweep.trials if trial.loss is not None])
    if not losses.size:
        return math.inf
    in_log = _in_log(losses)
    scaled = np.log(losses) if in_log else losses
    low, usual = float(scaled.min()), float(np.quantile(scaled, 0.75))
    top = usual + 1.5 * (usual - low)
    return math.exp(top) if in_log else top


def _in_log(losses: np.ndarray) -> bool:
    return losses.min() > 0 and float(np.quantile(losses, 0.75)) / losses.min() > _LOG_FROM


def _loss_axis(axes: Axes, sweep: Sweep, top: float) -> None:
    losses = np.array([trial.loss for trial in sweep.trials if trial.loss is not None])
    if not losses.size:
        axes.set_yticks([])
        return
    if not _in_log(losses):
        low, high = float(losses.min()), min(top, float(losses.max()))
        room = 0.07 * (high - low) or 0.1 * abs(low) or 1.0
        axes.set_ylim(low - room, high + room)
        return
    axes.set_yscale("log")
    low, high = float(losses.min()), min(top, float(losses.max()))
    axes.set_ylim(low / (high / low) ** 0.07, high * (high / low) ** 0.07)
    decades = math.log10(high / low)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if decades < 3 else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(NullLocator())


def _legend(sweep: Sweep) -> list[Line2D]:
    """A legend of the kinds of trials in the picture."""

    def dot(label: str, marker: str, colour: str, **kwargs: Any) -> Line2D:
        return Line2D([], [], linestyle="none", marker=marker, color=colour, label=label, **kwargs)

    whole = _whole(sweep)
    found = []
    if whole:
        found.append(dot("best", "*", RULE, markersize=12, markeredgecolor="white"))
    if len(whole) > 1:
        count = min(_BEST, len(whole))
        found.append(dot(f"{count} best", "o", _GOOD, markersize=6))
    if len(whole) > _BEST:
        found.append(dot("others", "o", _DOT, markersize=5))
    if any(trial.pruned for trial in sweep.trials):
        found.append(dot("pruned", "o", _DOT, markersize=5, markerfacecolor="white"))
    if any(trial.loss is not None and trial.loss > _top(sweep) for trial in sweep.trials):
        found.append(dot("far above", "^", _DOT, markersize=5))
    if any(trial.diverged for trial in sweep.trials):
        found.append(dot("diverged", "|", RULE, markersize=9, markeredgewidth=1.4))
    return found
