"""The picture of `coord_check`: the size of every activation against width."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from mujax._arguments import NONE, PATH, POSITIVE, TEXT, instance, several, takes
from mujax.check import STATS, CoordCheck, TapReport
from mujax.errors import ConfigError
from mujax.plot._style import INK, MUTED, RULE, canvas, power_of_two, style
from mujax.tune import parametrization_title

_PANELS: Final = 5
_NAMES: Final = 20
_IN_A_LINE: Final = 8
_PASS: Final = "#2b7a3d"
_PASSING: Final = "#8f8f8f"
_INHERITED: Final = "#dfae9c"
_UNDECIDED: Final = "#b8960c"
# Distinguishable with red-green colour blindness, too.
_BY_RULE: Final = {
    "learning rate": "#d0342c",
    "forward factor": "#7b3fa0",
    "initialisation": "#1f6fb4",
    "attention": "#c77700",
    "epsilon": "#0b8a6b",
    "weight decay": "#a0336f",
    "activation": "#222222",
}
# In inches.
_PANEL_SIZE: Final = (1.95, 2.3)
_GAP: Final = (0.14, 0.85)
_MARGIN_LEFT, _MARGIN_TOP, _MARGIN_BOTTOM = 0.7, 1.5, 0.55
_NAME_HEIGHT, _LETTER_WIDTH, _LONGEST_NAME = 0.13, 0.068, 32

_REPORTS: Final = several(
    "at least one result of coord_check", instance(CoordCheck, "", ""), "[mujax.coord_check(...)]", least=1
)


@takes(reports=_REPORTS, path=PATH, title=TEXT, learning_rate=POSITIVE | NONE)
def plot_coord_check(
    reports: Sequence[CoordCheck],
    path: str | os.PathLike[str],
    *,
    title: str = "",
    learning_rate: float | None = None,
) -> None:
    """Writes `coord_check_figure` to a PNG.

    Args:
        reports: as for `coord_check_figure`.
        path: file to write.
        title: as for `coord_check_figure`.
        learning_rate: as for `coord_check_figure`.

    Raises:
        ConfigError: as `coord_check_figure` does.
        OSError: the file can't be written.
    """
    coord_check_figure(reports, title=title, learning_rate=learning_rate).savefig(path, format="png")


@takes(reports=_REPORTS, title=TEXT, learning_rate=POSITIVE | NONE)
def coord_check_figure(
    reports: Sequence[CoordCheck], *, title: str = "", learning_rate: float | None = None
) -> Figure:
    """Draws the size of every activation against width, a row for each report and a panel for each step.

    Before training the mean absolute entry, after each step that of its change since then. A tap that fails
    is drawn in the colour of the rule that is broken there and named at the end of its line; one that
    inherits its fault from another is pale; those that pass are grey. Gains and biases are drawn where they
    are at fault: otherwise the value that they multiply or are added to is drawn. All panels have the same
    axes, so that slopes can be compared, and a dashed line that does not depend on width.

    Args:
        reports: results of `coord_check`, one for each parametrization.
        title: model and optimizer.
        learning_rate: one of the learning rates of the check; the first by default.

    Raises:
        ConfigError: no report, or a learning rate that was not tried.

    Reference:
        Yang et al., Tensor Programs V, arXiv 2203.03466, Appendix D.1 and Figure 5.
    """
    rate = _rate_to_draw(reports, learning_rate)
    steps = _steps_to_draw(min(report.steps for report in reports))
    rows, columns = len(reports), len(steps)
    margin_right = _room_for_names(reports)
    width = _MARGIN_LEFT + columns * _PANEL_SIZE[0] + (columns - 1) * _GAP[0] + margin_right
    height = _MARGIN_TOP + rows * _PANEL_SIZE[1] + (rows - 1) * _GAP[1] + _MARGIN_BOTTOM
    figure = canvas(width, height, constrained=False)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    figure.subplots_adjust(
        left=_MARGIN_LEFT / width,
        right=1 - margin_right / width,
        top=1 - _MARGIN_TOP / height,
        bottom=_MARGIN_BOTTOM / height,
        wspace=_GAP[0] / _PANEL_SIZE[0],
        hspace=_GAP[1] / _PANEL_SIZE[1],
    )
    limits = _sizes_in_sight(reports, rate, steps)
    for report, row in zip(reports, panels, strict=True):
        for axes, step in zip(row, steps, strict=True):
            _coord_panel(axes, report, rate, step)
        _scales(row[0], report.widths, limits)
        _name_failing(row[-1], report, rate, steps[-1], limits)
        _row_title(row[0], report)
        row[0].set_ylabel("mean absolute entry", fontsize=10.5, color=INK)
    for axes in panels[-1]:
        axes.set_xlabel("width", fontsize=10.5, color=INK)
    head = f"{title}, learning rate {power_of_two(rate)}" if title else f"learning rate {power_of_two(rate)}"
    seeds = f"{reports[0].seeds} seeds" if reports[0].seeds > 1 else "1 seed"
    left = _MARGIN_LEFT / width
    figure.text(left, 1 - 0.32 / height, f"{head}, {seeds}", fontsize=12, color=INK)
    handles = _coord_legend(reports)
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(left, 1 - 0.45 / height),
        ncols=len(handles) if len(handles) <= _IN_A_LINE else -(-len(handles) // 2),
        frameon=False,
        fontsize=10,
        labelcolor=INK,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.5,
        columnspacing=1.4,
    )
    return figure


def _rate_to_draw(reports: Sequence[CoordCheck], asked: float | None) -> float:
    tried = [rate for rate in reports[0].learning_rates if all(rate in each.sizes for each in reports)]
    rate = tried[0] if asked is None and tried else asked
    if rate not in tried:
        raise ConfigError(
            where="learning_rate",
            expected=f"one that all reports have tried, {', '.join(map(str, tried)) or 'none'}",
            got=repr(asked),
        )
    return rate


def _steps_to_draw(steps: int) -> list[int]:
    """Step 0, the first, the last, and some between, most of them early, where changes are largest."""
    return sorted({0, *(round(float(step)) for step in np.geomspace(1, steps, _PANELS - 1))})


def _entries(report: CoordCheck, rate: float, step: int) -> np.ndarray:
    """The values of a step, (widths, taps): NaN where a logarithmic scale cannot show them."""
    sizes = report.sizes[rate][:, step, :, STATS.index("size" if step == 0 else "change")]
    drawn = np.array([tap.kind != "vector" or _is_loud(tap) for tap in report.taps], bool)
    return np.where(np.isfinite(sizes) & (sizes > 0) & drawn, sizes, np.nan)


def _is_loud(tap: TapReport) -> bool:
    return tap.status == "undecided" or (tap.status == "fail" and tap.blamed)


def _sizes_in_sight(reports: Sequence[CoordCheck], rate: float, steps: Sequence[int]) -> tuple[float, float]:
    """One range for all panels, as log10."""
    drawn = np.concatenate(
        [np.log10(_entries(report, rate, step)).ravel() for report in reports for step in steps]
    )
    drawn = drawn[np.isfinite(drawn)]
    if not drawn.size:
        return -1.0, 1.0
    # Values that nearly vanish or diverge must not flatten all others.
    middle = float(np.median(drawn))
    low, high = max(float(drawn.min()), middle - 5), min(float(drawn.max()), middle + 5)
    room = max(0.06 * (high - low), 0.1)
    return low - room, high + room


def _scales(axes: Axes, widths: Sequence[int], limits: tuple[float, float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(10 ** limits[0], 10 ** limits[1])
    axes.xaxis.set_major_locator(FixedLocator(list(widths)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    decades = limits[1] - limits[0]
    # Powers of ten alone would leave a small range with one number or none.
    if decades > 2:
        axes.yaxis.set_major_locator(LogLocator(numticks=7))
    else:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 1.5 else (1.0, 3.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(NullLocator())


def _rule(report: CoordCheck, tap: TapReport) -> str | None:
    """The first rule that is broken at a tap."""
    names = {tap.name, *tap.params}
    return next((one.rule for one in report.faults if tap.blamed and one.name in names), None)


def _colour(report: CoordCheck, tap: TapReport) -> str:
    if tap.status == "undecided":
        return _UNDECIDED
    if tap.status != "fail":
        return _PASSING
    rule = _rule(report, tap)
    return _INHERITED if rule is None else _BY_RULE[rule]


def _coord_panel(axes: Axes, report: CoordCheck, rate: float, step: int) -> None:
    entries = _entries(report, rate, step)
    for tap, values in zip(report.taps, entries.T, strict=True):
        if np.isnan(values).all():
            continue
        loud = _is_loud(tap)
        axes.plot(
            report.widths,
            values,
            color=_colour(report, tap),
            linewidth=1.6 if loud else 1.1,
            alpha=0.9 if loud else 0.75,
            marker="o",
            markersize=2.6 if loud else 1.8,
            zorder=3 if loud else 2,
            label=tap.name,
        )
    finite = entries[np.isfinite(entries)]
    if finite.size:
        level = float(np.exp(np.median(np.log(finite))))
        axes.axhline(level, color=INK, linewidth=1.0, linestyle=(0, (5, 4)), zorder=1)
    what = "at initialisation" if step == 0 else f"change by step {step}"
    axes.set_title(what, fontsize=10.5, color=INK, loc="left", pad=5)
    style(axes)


def _short(name: str) -> str:
    """A tap's name, shortened, without the usual names of a Flax layer's only parameter."""
    for end in ("/kernel", "/embedding"):
        name = name.replace(end, "")
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"


def _room_for_names(reports: Sequence[CoordCheck]) -> float:
    names = [_short(tap.name) for report in reports for tap in report.taps if _is_loud(tap)]
    return 0.35 + _LETTER_WIDTH * max(map(len, names), default=0)


def _name_failing(
    axes: Axes, report: CoordCheck, rate: float, step: int, limits: tuple[float, float]
) -> None:
    """Names beside the last panel, moved apart, each with a line to where its own ends."""
    entries = _entries(report, rate, step)
    named = []
    for tap, values in zip(report.taps, entries.T, strict=True):
        known = np.flatnonzero(np.isfinite(values))
        if known.size and _is_loud(tap):
            end = (math.log10(values[known[-1]]) - limits[0]) / (limits[1] - limits[0])
            named.append((min(max(end, 0.0), 1.0), tap, report.widths[known[-1]]))
    named.sort(key=lambda entry: entry[0], reverse=True)
    left_out = len(named) - _NAMES
    named = named[:_NAMES]
    gap = _NAME_HEIGHT / _PANEL_SIZE[1]
    places = _apart([end for end, _, _ in named], gap)
    for (end, tap, width), place in zip(named, places, strict=True):
        colour = _colour(report, tap)
        start = (math.log2(width) - math.log2(report.widths[0])) / math.log2(
            report.widths[-1] / report.widths[0]
        )
        # matplotlib leaves 5 % of room at both ends of the axis.
        start = (start + 0.05) / 1.1 if start < 1 else 1 - 0.05 / 1.1
        axes.annotate(
            _short(tap.name),
            xy=(start, end),
            xycoords="axes fraction",
            xytext=(1.07, place),
            textcoords="axes fraction",
            fontsize=8.5,
            color=colour,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.5,
                "alpha": 0.7,
                "shrinkA": 1,
                "shrinkB": 2,
                "relpos": (0, 0.5),
            },
        )
    if left_out > 0:
        axes.text(
            1.07,
            (places[-1] if places else 0.5) - gap,
            f"and {left_out} more",
            transform=axes.transAxes,
            fontsize=8.5,
            color=MUTED,
            va="center",
        )


def _apart(places: Sequence[float], gap: float) -> list[float]:
    """The places nearest to those given, in descending order, which are at least `gap` apart.

    Without the order's gaps it is a monotone regression, by pooling adjacent violators.
    """
    pools: list[tuple[float, int]] = []
    for number, place in enumerate(places):
        mean, size = place + number * gap, 1
        while pools and pools[-1][0] < mean:
            above, many = pools.pop()
            mean, size = (above * many + mean * size) / (many + size), many + size
        pools.append((mean, size))
    flat = [mean for mean, size in pools for _ in range(size)]
    return [place - number * gap for number, place in enumerate(flat)]


def _row_title(axes: Axes, report: CoordCheck) -> None:
    name = axes.annotate(
        parametrization_title(report.parametrization),
        xy=(0, 1),
        xycoords="axes fraction",
        xytext=(0, 25),
        textcoords="offset points",
        fontsize=14,
        fontweight="bold",
        color=INK,
        annotation_clip=False,
    )
    axes.annotate(
        _outcome(report),
        xy=(1, 0),
        xycoords=name,
        xytext=(10, 1),
        textcoords="offset points",
        fontsize=11,
        va="bottom",
        color=_PASS if report.verdict == "pass" else RULE,
        annotation_clip=False,
    )


def _outcome(report: CoordCheck) -> str:
    count = len(report.taps)
    if report.verdict == "pass":
        return f"pass: none of {count} activations depends on width"
    failed = sum(tap.status == "fail" for tap in report.taps)
    inherited = sum(tap.status == "fail" and not tap.blamed for tap in report.taps)
    if report.verdict == "undecided":
        open_ = sum(tap.status == "undecided" for tap in report.taps)
        return f"undecided: {open_} of {count} activations cannot be distinguished from noise"
    by_others = f", {inherited} of them by a fault elsewhere" if inherited else ""
    return f"fail: {failed} of {count} activations depend on width{by_others}"


def _coord_legend(reports: Sequence[CoordCheck]) -> list[Line2D]:
    """A legend of the kinds of lines in the picture."""
    taps = [(report, tap) for report in reports for tap in report.taps]
    rules = {_rule(report, tap) for report, tap in taps if tap.status == "fail"}
    known = [(_BY_RULE[rule], f"wrong {rule}") for rule in _BY_RULE if rule in rules]
    if None in rules:
        known.append((_INHERITED, "fault inherited"))
    statuses = {tap.status for _, tap in taps}
    if "undecided" in statuses:
        known.append((_UNDECIDED, "undecided"))
    if "pass" in statuses:
        known.append((_PASSING, "passes"))
    lines = [Line2D([], [], color=colour, linewidth=2, label=label) for colour, label in known]
    flat = Line2D([], [], color=INK, linewidth=1, linestyle=(0, (5, 4)), label="slope 0")
    return [*lines, flat]
