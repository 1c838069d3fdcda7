"""Where a curve of losses over learning rates is lowest."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mujax.check._optimum import Optimum, fitted_optimum, mean
from mujax.train._losses import Losses, tail

GRID = tuple(float(rate) for rate in range(-12, -3))


def bowl(centre: float, grid: tuple[float, ...] = GRID, steepness: float = 0.1) -> list[float | None]:
    return [1 + steepness * (rate - centre) ** 2 for rate in grid]


@pytest.mark.parametrize("centre", [-10.6, -9.5, -8.0, -7.3, -5.1])
@pytest.mark.parametrize("spacing", [1.0, 0.5, 2.0])
def test_the_optimum_of_a_parabola_is_exact(centre: float, spacing: float) -> None:
    grid = tuple(float(rate) for rate in np.arange(-14, -1.9, spacing))
    found = fitted_optimum(grid, bowl(centre, grid))
    assert found == Optimum(pytest.approx(centre, abs=1e-9), False)


def test_the_optimum_follows_the_curve_and_is_not_the_best_grid_point() -> None:
    at = [fitted_optimum(GRID, bowl(centre)).log2_lr for centre in (-8.4, -8.2, -7.9)]
    assert at == pytest.approx([-8.4, -8.2, -7.9])


def test_noise_is_averaged_over_more_than_the_three_best_points() -> None:
    rng = np.random.default_rng(0)

    def spread(reach: int) -> float:
        errors = []
        for _ in range(200):
            curve = np.array(bowl(-8.0)) + 0.02 * rng.standard_normal(len(GRID))
            best = int(curve.argmin())
            near = slice(best - reach, best + reach + 1)
            grid, part = GRID[near], [float(loss) for loss in curve[near]]
            errors.append(fitted_optimum(grid, part).log2_lr + 8.0)
        return float(np.std(errors))

    assert spread(2) < 0.75 * spread(1)


def test_far_walls_do_not_move_the_optimum() -> None:
    curve = bowl(-8.25)
    walled = [1e6 if abs(rate + 8.25) > 3 else loss for rate, loss in zip(GRID, curve, strict=True)]
    assert fitted_optimum(GRID, walled).log2_lr == pytest.approx(-8.25)


def test_the_optimum_stays_between_the_neighbours_of_the_best_point() -> None:
    # Steep on one side only: the least-squares parabola is lowest far out on the flat side.
    curve = [1.00, 1.001, 1.002, 1.003, 0.999, 5.0, 30.0, 90.0, 200.0]
    found = fitted_optimum(GRID, curve)
    assert found.log2_lr is not None
    assert -9.0 <= found.log2_lr <= -7.0


@pytest.mark.parametrize(("centre", "edge"), [(-14.0, -12.0), (-2.0, -4.0)])
def test_an_optimum_beyond_the_grid_is_its_edge_and_flagged(centre: float, edge: float) -> None:
    assert fitted_optimum(GRID, bowl(centre)) == Optimum(edge, True)


def test_next_to_divergence_the_best_point_is_the_limit_and_no_edge() -> None:
    curve = [None if rate > -8 else loss for rate, loss in zip(GRID, bowl(-6.0), strict=True)]
    assert fitted_optimum(GRID, curve) == Optimum(-8.0, False)


def test_diverged_points_are_left_out_of_the_fit() -> None:
    curve = [None if rate > -7 else loss for rate, loss in zip(GRID, bowl(-8.3), strict=True)]
    assert fitted_optimum(GRID, curve).log2_lr == pytest.approx(-8.3)


def test_a_curve_without_a_lowest_point_in_its_fit_gives_the_best_grid_point() -> None:
    curve: list[float | None] = [None, None, 3.0, 2.0, None, None, None, None, None]
    assert fitted_optimum(GRID, curve) == Optimum(-9.0, False)


def test_no_optimum_where_everything_diverged() -> None:
    assert fitted_optimum(GRID, [None] * len(GRID)) == Optimum(None, False)


def test_a_mean_over_seeds_is_none_where_one_diverged() -> None:
    assert mean([1.0, 2.0]) == 1.5
    assert mean([1.0, None]) is None


def test_the_last_tenth_has_one_step_at_least() -> None:
    assert [tail(steps) for steps in (1, 9, 10, 25, 100)] == [1, 1, 1, 2, 10]


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        (Losses(mean=0.7, final=0.5, untrained=0.9), 0.7),
        (Losses(mean=1.7, final=0.5, untrained=0.9), 1.7),
        (Losses(mean=1.9, final=0.5, untrained=0.9), None),
        (Losses(mean=0.7, final=0.95, untrained=0.9), None),
        (Losses(mean=math.inf, final=0.5, untrained=0.9), None),
        (Losses(mean=math.nan, final=math.nan, untrained=0.9), None),
    ],
)
def test_diverged_means_not_finite_or_worse_than_untrained_in_the_end_or_on_average(
    losses: Losses, kept: float | None
) -> None:
    assert losses.kept == kept
