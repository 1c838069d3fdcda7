"""Statistics over runs, each defined once: mean, optimum, drift, regret, and the test of wider is better.

The glossary in `mujax/check/README.md` has them in words.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Final, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

CONFIDENCE: Final = 0.95
"""Of all intervals and tests of the checks of training."""

# How far from the best grid point the parabola looks, in powers of two: wide enough to average over noise,
# near enough that the loss is still a parabola in the logarithm of the learning rate.
_FIT_REACH: Final = 2.0


Status = Literal["pass", "fail", "undecided"]
"""The verdict of a check; undecided where the noise, or the grid, does not allow one."""


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


def standard_error(losses: Sequence[float | None]) -> float | None:
    """Of the mean over seeds; None where one of them diverged or with a single seed."""
    finite = [loss for loss in losses if loss is not None]
    if len(finite) < max(2, len(losses)):
        return None
    return statistics.stdev(finite) / math.sqrt(len(finite))


def student(confidence: float, freedom: float) -> float:
    """Half the width of a two-sided interval, in standard errors: a quantile of Student's t.

    >>> round(student(0.95, 4), 3)
    2.776
    """
    # SciPy takes as long to import as a tenth of mujax with all that it needs.
    from scipy import special

    return float(special.stdtrit(freedom, (1 + confidence) / 2))


def best_index(losses: Sequence[float | None]) -> int | None:
    """The index of the lowest loss; None where every run diverged."""
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


# ---- drift and regret -----------------------------------------------------------------------------------


class Drift(NamedTuple):
    """How far the optimum moves with width, in powers of two.

    Attributes:
        per_doubling: least-squares slope of the optimum over log2 of the width.
        range: the largest optimum minus the smallest, over all widths.
    """

    per_doubling: float
    range: float


def drift(optima: Mapping[int, float | None]) -> Drift | None:
    """The drift of the optimum, from width -> optimum; None where a width has none.

    >>> drift({64: -8.0, 128: -8.5, 256: -9.0})
    Drift(per_doubling=-0.5, range=1.0)
    """
    known = [optimum for optimum in optima.values() if optimum is not None]
    if len(known) < len(optima):
        return None
    x = np.log2(np.array(list(optima), np.float64))
    x -= x.mean()
    return Drift(float(x @ np.asarray(known) / (x @ x)), max(known) - min(known))


class Regret(NamedTuple):
    """What a width loses by the transferred learning rate in place of its own optimum.

    Attributes:
        loss: the loss at the transferred learning rate minus the lowest, by the interpolated curve.
        share: the same over what training gains, the untrained loss minus the lowest; None where the
            untrained loss is not known.
    """

    loss: float
    share: float | None


def regret(
    log2_lrs: Sequence[float],
    losses: Sequence[float | None],
    optimum: float | None,
    transferred: float | None,
    untrained: float | None,
) -> Regret | None:
    """The regret of a width.

    Args:
        log2_lrs: the grid, ascending; at least three.
        losses: of the width at each learning rate; None where it diverged.
        optimum: of the width, see `fitted_optimum`.
        transferred: the proxy's optimum.
        untrained: the width's loss before training, if it is known.

    Returns:
        None where the width or the proxy has no optimum, or the width diverges at the transferred rate.

    >>> regret([-4.0, -3.0, -2.0], [1.0, 0.0, 1.0], -3.0, -3.5, 2.0)
    Regret(loss=0.25, share=0.125)
    """
    if optimum is None or transferred is None:
        return None
    at, lowest = (loss_at(tuple(log2_lrs), tuple(losses), where) for where in (transferred, optimum))
    if not math.isfinite(at):
        return None
    lost = max(at - lowest, 0.0)
    return Regret(lost, None if untrained is None else lost / max(untrained - lowest, 1e-30))


@functools.lru_cache(maxsize=4096)
def loss_at(log2_lrs: tuple[float, ...], losses: tuple[float | None, ...], rate: float) -> float:
    """The loss between grid points, by the parabola through the three nearest; infinite where it diverged.

    A line would lie above a curve that bends upwards, by as much as a tight tolerance.
    """
    curve = np.array([math.inf if loss is None else loss for loss in losses])
    nearest = int(np.argmin(np.abs(np.asarray(log2_lrs) - rate)))
    centre = min(max(nearest, 1), len(curve) - 2)
    near = slice(centre - 1, centre + 2)
    x, y = np.asarray(log2_lrs)[near] - rate, curve[near]
    if np.all(np.isfinite(y)):
        (a, b, c), (u, v, w) = x, y
        return float(
            u * b * c / ((a - b) * (a - c))
            + v * a * c / ((b - a) * (b - c))
            + w * a * b / ((c - a) * (c - b))
        )
    left = int(np.clip(np.searchsorted(log2_lrs, rate, side="right") - 1, 0, len(curve) - 2))
    share = (rate - log2_lrs[left]) / (log2_lrs[left + 1] - log2_lrs[left])
    ends = ((1 - share, curve[left]), (share, curve[left + 1]))
    return float(sum(weight * loss for weight, loss in ends if weight))


# ---- wider is better ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Difference:
    """How much worse a wide model is than a narrow one, by window, with its one-sided limits."""

    by: Float[np.ndarray, " windows"]
    at_least: Float[np.ndarray, " windows"]
    at_most: Float[np.ndarray, " windows"]


def difference(
    narrow: Float[np.ndarray, "seeds windows"],
    wide: Float[np.ndarray, "seeds windows"],
    comparisons: int,
) -> Difference:
    """Welch's test of the means over seeds; with a single seed the difference itself is the least it can be.

    Of logarithms, where losses are positive: runs differ from each other by a factor, more so in the first
    steps of a large learning rate. With the degrees of freedom of Welch's test: a narrow model's runs differ
    by more than a wide one's.

    Args:
        narrow: losses of the narrow model.
        wide: losses of the wide one.
        comparisons: how many are made; all of them hold together with 95 % (Bonferroni).
    """
    seeds = narrow.shape[0]
    is_positive = min(narrow.min(), wide.min()) > 0
    one, other = (np.log(table) if is_positive else table for table in (narrow, wide))
    start, end = one.mean(axis=0), other.mean(axis=0)
    back = np.exp if is_positive else np.asarray
    if seeds < 2:
        by = back(end) - back(start)
        return Difference(by, by, np.full_like(by, math.inf))
    parts = [table.var(axis=0, ddof=1) / seeds for table in (one, other)]
    variance = parts[0] + parts[1]
    spread = (parts[0] ** 2 + parts[1] ** 2) / (seeds - 1)
    freedom = np.divide(variance**2, spread, out=np.full_like(variance, seeds - 1.0), where=spread > 0)
    # A one-sided limit is an end of the two-sided interval with twice the risk.
    confidence = 1 - 2 * (1 - CONFIDENCE) / comparisons
    reach = np.array([student(confidence, each) for each in freedom]) * np.sqrt(variance)
    return Difference(*(back(end + shift) - back(start) for shift in (0.0, -reach, reach)))


def never_worse(losses: Sequence[Sequence[float | None]]) -> bool:
    """Whether no model is worse than the next narrower one, beyond the noise of the seeds.

    Args:
        losses: of each width, ascending -> of each seed at one learning rate; None where it diverged.

    >>> never_worse([[1.0, 1.1], [0.8, 0.9]]), never_worse([[1.0], [1.1]]), never_worse([[1.0], [None]])
    (True, False, False)
    """
    tables = [np.array(row, np.float64)[:, None] for row in losses]
    if any(np.isnan(table).any() for table in tables):
        return False
    pairs = list(itertools.pairwise(tables))
    return not any((difference(*pair, comparisons=len(pairs)).at_least > 0).any() for pair in pairs)
