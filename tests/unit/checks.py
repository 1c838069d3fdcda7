"""Coordinate checks made by hand, for what prints and draws them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mujax.check._coord_check import CoordCheck, TapReport
from mujax.check._faults import fault
from mujax.check._slopes import Check, Slope

WIDTHS = (32, 64, 128)
RATES = (2.0**-9, 2.0**-7)


def tap(
    name: str, kind: str = "product", status: Any = "pass", *, blamed: bool = False, slope: float | None = 0.0
) -> TapReport:
    """A tap whose change is of that slope."""
    found = None if slope is None else Slope(slope, slope - 0.1, slope + 0.1)
    note = "diverges as the model grows wider" if slope is None else ""
    checks = (Check("change", found, (-0.75, 0.25), status, note),)
    return TapReport(name, kind, "net.py:12", (name,), status, blamed, dict.fromkeys(RATES, checks))


PASSING = (tap("first/kernel"), tap("first/bias", "vector"), tap("hidden/kernel"), tap("output", "output"))
FAILING = (
    tap("first/kernel"),
    tap("first/bias", "vector"),
    tap("hidden/kernel", status="fail", blamed=True, slope=1.0),
    tap("output", "output", "fail", slope=0.5),
)


def check(
    parametrization: str = "mup", taps: Sequence[TapReport] | None = None, *, steps: int = 6, lost: Any = None
) -> CoordCheck:
    """A result: µP passes, standard parametrization fails, by the taps above.

    Args:
        parametrization: of the models.
        taps: what was found.
        steps: of each run.
        lost: index into (widths, steps + 1, taps): where everything is NaN.
    """
    taps = taps if taps is not None else (FAILING if parametrization == "sp" else PASSING)
    slopes = [(one.worst.slope.value if one.worst and one.worst.slope else 0.0) for one in taps]
    growth = (np.array(WIDTHS)[:, None] / WIDTHS[0]) ** np.array([slopes])
    sizes = np.empty((len(WIDTHS), steps + 1, len(taps), 4))
    for step in range(steps + 1):
        level = 0.1 * (1 + step) * (1 + np.arange(len(taps)))
        sizes[:, step, :, 0] = level
        sizes[:, step, :, 1] = 0 if step == 0 else growth * level
    sizes[..., 2:] = np.nan
    if lost is not None:
        sizes[lost] = np.nan
    statuses = [one.status for one in taps]
    return CoordCheck(
        verdict="fail" if "fail" in statuses else "undecided" if "undecided" in statuses else "pass",
        faults=tuple(
            fault(one.name, "learning rate", 0.0, -1.0, one.where)
            for one in taps
            if one.blamed and one.status == "fail"
        ),
        taps=tuple(taps),
        widths=WIDTHS,
        learning_rates=RATES,
        steps=steps,
        seeds=4,
        parametrization=parametrization,
        sizes={RATES[0]: sizes, RATES[1]: 3 * sizes},
        losses=dict.fromkeys(RATES, np.ones((len(WIDTHS), steps + 1))),
    )
