"""Fits slopes over width to the measurements of a coordinate check, and compares them with the theory.

The theory gives the scaling of each activation, of its change and of the effect of each update; a slope whose
whole interval lies outside of the allowed range fails.

References:
    Yang et al., Tensor Programs V, arXiv 2203.03466, Appendix D.1 and Tables 3, 8 and 9.
    Yang, Simon, Bernstein, A Spectral Condition for Feature Learning, arXiv 2310.17813.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Final, Literal

import numpy as np
from jaxtyping import Float

from mujax.check._measure import STATS
from mujax.check._optimum import Status, student
from mujax.check._taps import Tap

CONFIDENCE: Final = 0.99

Quantity = Literal[
    "initial size", "size", "change", "effect of its update", "initial gain", "gain of its update"
]


@dataclasses.dataclass(frozen=True)
class Slope:
    """A power of the width.

    Attributes:
        value: slope of log2 of the quantity over log2 of the width.
        low: end of its 99 % confidence interval.
        high: the other end.
    """

    value: float
    low: float
    high: float


def fitted_slope(widths: Sequence[int], values: Float[np.ndarray, "widths seeds"]) -> Slope:
    """The least-squares slope of log2(value) over log2(width), with its interval.

    The seeds are the repeats: their spread at each width, pooled over widths, is the noise. With a single
    seed the scatter around the line is the noise.

    Args:
        widths: at least two.
        values: positive.

    >>> slope = fitted_slope([64, 128, 256], np.array([[1.0, 1.1], [2.0, 2.2], [4.0, 4.4]]))
    >>> round(slope.value, 6)
    1.0
    """
    logs = np.log2(values)
    x = np.log2(np.asarray(widths, np.float64))
    x = x - x.mean()
    means = logs.mean(axis=1)
    spread = float(np.sum(x**2))
    value = float(np.sum(x * means)) / spread
    count, seeds = logs.shape
    if seeds > 1:
        freedom = count * (seeds - 1)
        variance = float(np.sum((logs - means[:, None]) ** 2)) / freedom / seeds
    else:
        freedom = count - 2
        rest = means - means.mean() - value * x
        variance = float(np.sum(rest**2)) / freedom if freedom else math.inf
    error = math.sqrt(variance / spread)
    reach = student(CONFIDENCE, freedom) * error if freedom and error else error
    return Slope(value, value - reach, value + reach)


# ---- taps ------------------------------------------------------------------------------------------

# Finite widths bend the lines: measured slopes of correct models lie within 0.15 of their limits, faults
# move them by 1/2 or more.
TOLERANCE: Final = 0.25
# How far the effect of an update may fall. At initialisation the gradient through attention and a readout is
# a sum of independent terms, so an optimizer that is linear in it starts with smaller steps.
FALLS: Final = -0.5 - TOLERANCE
_FALLS_BY_RULE: Final = -1.5
# An interval that ends this far outside still excludes the nearest fault, half a power of the width away.
_MARGIN: Final = 0.25


@dataclasses.dataclass(frozen=True)
class Check:
    """One quantity of one tap, compared with the theory.

    Attributes:
        quantity: the quantity.
        slope: the measured slope; None if there was nothing to measure.
        allowed: smallest and largest exponent that passes.
        status: `"fail"` if the slope's whole interval is outside; else `"pass"` if the slope is inside and
            its interval excludes the nearest fault, which is half a power of the width away, or if the rules
            of all parameters are known to hold.
        note: a remark.
    """

    quantity: Quantity
    slope: Slope | None
    allowed: tuple[float, float]
    status: Status
    note: str = ""


def _judged(
    quantity: Quantity,
    widths: Sequence[int],
    values: np.ndarray,
    allowed: tuple[float, float],
    verified: bool,
) -> Check | None:
    """The check of positive values; None if some are zero, as changes of constant activations are."""
    if not np.all(np.isfinite(values)):
        narrow = np.all(np.isfinite(values[0]))
        note = "diverges as the model grows wider" if narrow else "diverges: take a smaller learning rate"
        return Check(quantity, None, allowed, "fail" if narrow else "undecided", note)
    if np.any(values <= 0):
        return None
    slope = fitted_slope(widths, values)
    low, high = allowed
    if slope.high < low or slope.low > high:
        status: Status = "fail"
    elif verified or _excludes_faults(slope, allowed):
        status = "pass"
    else:
        status = "undecided"
    return Check(quantity, slope, allowed, status)


def settled(check: Check) -> bool:
    """Whether a slope is within, with an interval that excludes the nearest fault, whatever the rules say."""
    if check.slope is None or check.note:
        return False
    return _excludes_faults(check.slope, check.allowed)


def _excludes_faults(slope: Slope, allowed: tuple[float, float]) -> bool:
    low, high = allowed
    return low <= slope.value <= high and slope.low >= low - _MARGIN and slope.high <= high + _MARGIN


def judge(
    tap: Tap,
    widths: Sequence[int],
    stats: Float[np.ndarray, "widths seeds steps stats"],
    verified: bool = False,
) -> list[Check]:
    """Checks one tap at one learning rate.

    Allowed: at initialisation activations do not depend on width, except for the readout and attention
    logits, which are sums of independent terms and fall as the root of the width at most. After the first
    step nothing grows; changes do not vanish either, but an incoherent part (which falls as the root) may
    still be the larger one at a small width.

    Args:
        tap: the tap.
        widths: ascending.
        stats: measured by `mujax.check._measure.Program`, before each step and after the last.
        verified: initial values, constants and learning rates of all parameters were read exactly and follow
            the rules: then only an interval outside is evidence against the model, and no change vanishes
            because of a wrong learning rate.
    """
    size, change, by_weights = (stats[..., STATS.index(name)] for name in ("size", "change", "by_weights"))
    trained = slice(1, None)
    falls = min(tap.own_fall, tap.falls)
    designed = math.log2(tap.scale) / math.log2(widths[-1] / widths[0])
    low, high = min(designed, 0.0) - TOLERANCE, max(designed, 0.0) + TOLERANCE
    vanishes = _FALLS_BY_RULE if verified else FALLS
    compared: list[tuple[Quantity, np.ndarray, tuple[float, float]]] = []
    if tap.kind != "vector":
        compared = [
            ("initial size", size[:, :, 0], (falls + low, high)),
            ("size", _over_steps(size[:, :, trained]), (falls + low, high)),
            ("change", _over_steps(change[:, :, trained]), (vanishes + min(designed, 0.0), high)),
        ]
    if tap.operand >= 0 and tap.params:
        # How long a gain or bias keeps moving in one direction depends on much else, so of these only the
        # first update counts; a product sums over its fan-in, and needs all steps against the noise.
        first = _first_move(by_weights)
        values = by_weights[:, :, first] if tap.kind == "vector" else _over_steps(by_weights[:, :, trained])
        compared.append(("effect of its update", values, (vanishes, TOLERANCE)))
    checks = [_judged(quantity, widths, values, allowed, verified) for quantity, values, allowed in compared]
    series = {"size": size, "change": change}
    return [_transient(check, widths, series) for check in checks if check is not None]


def judge_gains(
    tap: Tap, widths: Sequence[int], stats: Float[np.ndarray, "widths seeds steps stats"], vanishes: bool
) -> list[Check]:
    """Checks a product with a parameter by itself: its result over the activation that it multiplies.

    Other than a size, a gain is not inherited from a fault further up. Gains that were not measured, or are
    zero, have no check.

    Args:
        tap: the tap.
        widths: ascending.
        stats: as for `judge`.
        vanishes: whether the effect of an update may vanish as it does while a linear optimizer starts.
    """
    size, by_weights, inputs = (stats[..., STATS.index(name)] for name in ("size", "by_weights", "inputs"))
    if not np.all(inputs > 0):
        return []
    falls = tap.own_fall
    lowest = _FALLS_BY_RULE if vanishes else FALLS
    compared: list[tuple[Quantity, np.ndarray, tuple[float, float]]] = [
        ("initial gain", (size / inputs)[:, :, 0], (falls - TOLERANCE, TOLERANCE)),
        ("gain of its update", _over_steps((by_weights / inputs)[:, :, 1:]), (lowest, TOLERANCE)),
    ]
    checks = [_judged(quantity, widths, values, allowed, True) for quantity, values, allowed in compared]
    return [check for check in checks if check is not None]


def _over_steps(values: np.ndarray) -> np.ndarray:
    """The geometric mean over the steps in which all models have moved; zero if there is none."""
    moved = np.all(values != 0, axis=(0, 1))
    if not moved.any():
        return np.zeros(values.shape[:-1])
    return np.exp2(np.log2(values[..., moved]).mean(axis=-1))


def _first_move(by_weights: np.ndarray) -> int:
    """The first step after which every model's update shows."""
    moved = np.flatnonzero(np.all(by_weights[:, :, 1:] != 0, axis=(0, 1)))
    return int(moved[0]) + 1 if len(moved) else 1


def _transient(check: Check, widths: Sequence[int], series: Mapping[str, np.ndarray]) -> Check:
    """Growth in the first steps that is gone at the end does not fail."""
    if check.status != "fail" or check.quantity not in series or check.slope is None:
        return check
    values = series[check.quantity]
    last = _judged(check.quantity, widths, values[:, :, -1], check.allowed, verified=False)
    if last is None or last.status != "pass" or values.shape[2] < 4:
        return check
    return dataclasses.replace(last, note="outside at first, within by the last step")
