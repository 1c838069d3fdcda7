"""Slopes, their intervals, what passes and what fails."""

import numpy as np
import pytest

from mujax.check._slopes import fitted_slope, judge
from mujax.check._taps import Tap

WIDTHS = (64, 128, 256, 512)


def noisy(slope, noise, seeds=4, steps=4, seed=0):
    """Sizes that scale as a power of the width: (widths, seeds, steps)."""
    draw = np.random.default_rng(seed).normal(size=(len(WIDTHS), seeds, steps))
    return np.asarray(WIDTHS, float)[:, None, None] ** slope * np.exp2(noise * draw)


def stats(size=0.0, change=0.0, by_weights=0.0, noise=0.02, seed=0):
    """What is measured at a tap whose quantities scale with these exponents: nothing has moved at first."""
    table = np.stack(
        [
            noisy(slope, noise, seed=seed + n)
            for n, slope in enumerate((size, change, by_weights, by_weights))
        ],
        axis=-1,
    )
    table[:, :, 0, 1:] = 0.0
    return table


def tap(kind="product", **scales):
    return Tap("net/kernel", kind, (0,), "net.py:1", ("net/kernel",), 1, **scales)


def statuses(checks):
    return {check.quantity: check.status for check in checks}


@pytest.mark.parametrize("slope", [-1.0, 0.0, 0.37])
def test_slope_of_a_power(slope):
    found = fitted_slope(WIDTHS, noisy(slope, 0.0)[..., 0])
    assert found.value == pytest.approx(slope)
    assert found.low == pytest.approx(slope)


def test_interval_covers_as_often_as_it_says():
    inside = 0
    for seed in range(400):
        found = fitted_slope(WIDTHS, noisy(0.3, 0.2, seed=seed)[..., 0])
        inside += found.low <= 0.3 <= found.high
    # 99 % of 400, give or take three standard deviations.
    assert 390 <= inside <= 400


def test_interval_is_wider_with_noise_and_fewer_seeds():
    def width(noise, seeds):
        found = fitted_slope(WIDTHS, noisy(0.0, noise, seeds)[..., 0])
        return found.high - found.low

    assert width(0.2, 8) > 2 * width(0.02, 8)
    assert width(0.1, 2) > width(0.1, 16)


def test_one_seed_takes_the_scatter_around_the_line():
    straight = fitted_slope(WIDTHS, noisy(1.0, 0.0, seeds=1)[..., 0])
    scattered = fitted_slope(WIDTHS, noisy(1.0, 0.3, seeds=1)[..., 0])
    assert straight.high - straight.low < 1e-6
    assert scattered.high - scattered.low > 0.2


def initially(slope, **scales):
    return statuses(judge(tap(**scales), WIDTHS, stats(size=slope)))["initial size"]


def test_what_a_tap_inherits_passes_and_no_more():
    """An activation behind a bottleneck falls with it; a sum that is divided out later grows by design."""
    assert (
        initially(-0.5, falls=-0.5) == initially(1.0, scale=8.0) == initially(-0.5, scale=8**-0.5) == "pass"
    )
    assert initially(-0.5) == initially(1.0) == initially(0.5, falls=-0.5) == "fail"
    assert initially(-1.0, falls=-0.5) == initially(1.5, scale=8.0) == initially(-0.5, scale=8.0) == "fail"


def test_what_depends_on_nothing_passes():
    assert set(statuses(judge(tap(), WIDTHS, stats())).values()) == {"pass"}


@pytest.mark.parametrize(
    ("quantity", "exponents"),
    [
        ("initial size", {"size": 0.5}),
        ("initial size", {"size": -0.5}),
        ("size", {"size": 0.5}),
        ("change", {"change": 0.5}),
        ("change", {"change": -1.0}),
        ("effect of its update", {"by_weights": 0.5}),
        ("effect of its update", {"by_weights": -1.0}),
    ],
)
def test_a_power_of_the_width_fails(quantity, exponents):
    assert statuses(judge(tap(), WIDTHS, stats(**exponents)))[quantity] == "fail"


@pytest.mark.parametrize("kind", ["readout", "logits", "output"])
def test_sums_of_independent_terms_may_fall_at_first(kind):
    assert statuses(judge(tap(kind), WIDTHS, stats(size=-0.5)))["initial size"] == "pass"
    assert statuses(judge(tap(kind), WIDTHS, stats(size=-1.0)))["initial size"] == "fail"
    assert statuses(judge(tap(kind), WIDTHS, stats(size=0.5)))["initial size"] == "fail"


def test_noise_leaves_it_open():
    found = statuses(judge(tap(), WIDTHS, stats(change=0.2, noise=1.5)))
    assert found["change"] == "undecided"


def test_known_rules_decide_where_the_noise_does_not():
    for seed in range(50):
        table = stats(change=0.1, noise=0.8, seed=seed)
        check = next(check for check in judge(tap(), WIDTHS, table) if check.quantity == "change")
        if check.status == "undecided" and check.slope.value < 0.25:
            break
    else:
        pytest.fail("no seed of fifty is undecided")
    assert statuses(judge(tap(), WIDTHS, table, verified=True))["change"] == "pass"
    # What is measured outside is not excused by them.
    grows = stats(change=0.5)
    assert statuses(judge(tap(), WIDTHS, grows, verified=True))["change"] == "fail"


def test_growth_of_the_first_steps_is_told_from_growth_that_lasts():
    table = stats(change=1.0)
    table[:, :, -1, 1] = noisy(0.0, 0.02)[:, :, -1]
    check = next(check for check in judge(tap(), WIDTHS, table) if check.quantity == "change")
    assert check.status == "pass"
    assert check.note == "outside at first, within by the last step"


def test_divergence_of_the_wide_fails_and_of_all_is_open():
    table = stats()
    table[-1, :, 2:] = np.nan
    checks = judge(tap(), WIDTHS, table)
    assert statuses(checks)["size"] == "fail"
    assert next(check for check in checks if check.quantity == "size").note.startswith("diverges as")
    table[:, :, 2:] = np.inf
    assert statuses(judge(tap(), WIDTHS, table))["size"] == "undecided"


def test_what_does_not_move_is_not_judged():
    table = stats()
    table[..., 1:] = 0.0
    assert set(statuses(judge(tap(), WIDTHS, table))) == {"initial size", "size"}


def test_only_the_update_counts_for_a_vector():
    assert set(statuses(judge(tap("vector"), WIDTHS, stats(size=1.0)))) == {"effect of its update"}
