"""Sweeps over one hyperparameter at several widths: judged by `mujax.check`, as rows and panels."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.paper._figure import Row
from benchmarks.paper._results import Results
from mujax.check import TransferCheck, judge_runs
from mujax.plot import Panel

KEPT = 1.0
"""The optimum is kept if it moves by at most this many powers of two."""


def judged(
    results: Results,
    setting: str,
    widths: Sequence[int],
    values: Sequence[float],
    seeds: Sequence[int],
    proxy: int,
) -> TransferCheck:
    """The library's check of one sweep."""
    return judge_runs(values, results.sweep(setting, widths, values, seeds), proxy=proxy)


def moved(found: TransferCheck) -> str:
    """How far the optimum moves; at least so far, where one is at an end of the grid."""
    if found.drift_log2 is None:
        return "some width always diverges"
    least = "at least " if found.on_grid_edge else ""
    return f"{least}{found.drift_log2:.2f} powers of two"


def trend(found: TransferCheck) -> str:
    """The interval of the optimum's trend from the smallest to the largest."""
    if found.interval is None:
        return "- (one seed)" if found.seeds < 2 else "-"
    doublings = math.log2(found.widths[-1] / found.widths[0])
    low, high = (end * doublings for end in found.interval)
    return f"trend over all {low:+.1f} to {high:+.1f} (95 %)"


def kept(claim: str, found: TransferCheck, limit: float = KEPT) -> Row:
    """The claim that the optimum moves by at most `limit`."""
    holds = None if found.drift_log2 is None else found.drift_log2 <= limit
    # An optimum on the edge may be further away.
    return Row(claim, moved(found), trend(found), None if holds and found.on_grid_edge else holds)


def lost(claim: str, found: TransferCheck, least: float) -> Row:
    """The claim that the optimum moves by more than `least`."""
    holds = True if found.drift_log2 is None else found.drift_log2 > least
    return Row(claim, moved(found), trend(found), None if not holds and found.on_grid_edge else holds)


def panel(title: str, xlabel: str, found: TransferCheck, legend: str = "width") -> Panel:
    """The sweep as a panel of a picture."""
    return Panel(
        title=title,
        xlabel=xlabel,
        values=found.log2_lrs,
        curves=found.loss,
        optima=found.best_log2_lr,
        summary=f"optimum moves by {moved(found)}" if found.drift_log2 is not None else moved(found),
        legend=legend,
    )
