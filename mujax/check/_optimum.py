"""Statistics over runs: means, intervals, and the learning rate at which a loss curve is lowest."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

import numpy as np
from scipy import special

# How far from the best grid point the parabola looks, in powers of two: wide enough to average over noise,
# near enough that the loss is still a parabola in the logarithm of the learning rate.
_FIT_REACH: Final = 2.0


Status = Literal["pass", "fail", "undecided"]
"""What a check says; undecided where the noise, or the grid, does not allow to tell."""


class Optimum(NamedTuple):
    """Where a loss curve is lowest.

    Attributes:
        log2_lr: the fitted optimum; None where every run diverged.
        on_edge: the best grid point is an end of the grid, so the optimum may lie beyond it.
    """

    log2_lr: float | None
    on_edge: bool


def mean(losses: Sequence[float | None]) -> float | None:
    """The mean over seeds; None where one of them diverged."""
    finite = [loss for loss in losses if loss is not None]
    return statistics.fmean(finite) if len(finite) == len(losses) else None


def student(confidence: float, freedom: float) -> float:
    """Half the width of a two-sided interval, in standard errors: a quantile of Student's t.

    >>> round(student(0.95, 4), 3)
    2.776
    """
    return float(special.stdtrit(freedom, (1 + confidence) / 2))


def best_index(losses: Sequence[float | None]) -> int | None:
    """Where the lowest loss is; None where every run diverged."""
    finite = [(loss, index) for index, loss in enumerate(losses) if loss is not None]
    return min(finite)[1] if finite else None


def fitted_optimum(log2_lrs: Sequence[float], losses: Sequence[float | None]) -> Optimum:
    """The minimum of a parabola through the loss around its best grid point.

    The least-squares parabola of the loss in log2 of the learning rate, over the grid points up to two powers
    of two away from the best one (its neighbours at least), leaving out those that diverged. Its minimum is
    clamped to between the best point's neighbours. On an end of the grid it is that end.

    Args:
        log2_lrs: the grid, ascending.
        losses: the loss at each; None where it diverged.

    >>> fitted_optimum([-4.0, -3.0, -2.0, -1.0], [2.25, 0.25, 0.25, 2.25])
    Optimum(log2_lr=-2.5, on_edge=False)
    >>> fitted_optimum([-4.0, -3.0, -2.0], [1.0, 2.0, None])
    Optimum(log2_lr=-4.0, on_edge=True)
    """
    pairs = list(zip(log2_lrs, losses, strict=True))
    best = best_index(losses)
    if best is None:
        return Optimum(None, False)
    centre = pairs[best][0]
    if best in (0, len(pairs) - 1):
        return Optimum(centre, True)
    # Towards a rate that diverges there is nothing to interpolate to: the best point is the limit.
    left, right = (rate if loss is not None else centre for rate, loss in (pairs[best - 1], pairs[best + 1]))
    near = [
        (rate - centre, loss)
        for index, (rate, loss) in enumerate(pairs)
        if loss is not None and (abs(rate - centre) <= _FIT_REACH or abs(index - best) == 1)
    ]
    vertex = _vertex(near)
    return Optimum(centre if vertex is None else min(max(centre + vertex, left), right), False)


def _vertex(points: Sequence[tuple[float, float]]) -> float | None:
    """Where the least-squares parabola through the points is lowest; None if it has no lowest point."""
    if len(points) < 3:
        return None
    x, y = np.array(points, np.float64).T
    _, slope, curvature = np.polynomial.polynomial.polyfit(x, y, 2)
    return float(-slope / (2 * curvature)) if curvature > 0 else None
