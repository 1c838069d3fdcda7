"""The transfer check: verdicts on curves with known optima, and what only it can catch, in real runs."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from teacher import linen, nnx_factory, teacher

import mujax
from mujax import rules
from mujax.check._transfer_check import judge_transfer
from mujax.errors import ConfigError
from mujax.spec import leaf_path

GRID = tuple(float(rate) for rate in range(-10, -2))
WIDTHS = (32, 64, 128, 256)
SEEDS = 5


def synthetic(drift=0.0, noise=0.05, centre=-6.5, seeds=SEEDS, seed=0):
    """Parabolas whose lowest point moves by `drift` per doubling, and by the noise from seed to seed."""
    rng = np.random.default_rng(seed)
    rates = np.array(GRID)[:, None]
    return {
        width: 0.3
        - 0.02 * octave
        + 0.03 * (rates - centre - drift * octave - noise * rng.standard_normal(seeds)) ** 2
        for octave, width in enumerate(WIDTHS)
    }


def judged(losses, **options):
    return judge_transfer(GRID, losses, dict.fromkeys(losses, 1.0), **options)


def test_an_optimum_that_stays_passes():
    found = judged(synthetic())
    assert (found.verdict, found.reasons) == ("pass", ())
    assert found
    assert found.interval[0] < 0 < found.interval[1]
    assert found.interval[0] < found.drift_per_doubling < found.interval[1]
    assert list(found.best_log2_lr.values()) == pytest.approx([-6.5] * 4, abs=0.1)
    assert max(found.regret.values()) < 0.001


@pytest.mark.parametrize("drift", [-0.5, 0.4])
def test_an_optimum_that_moves_fails(drift):
    found = judged(synthetic(drift, centre=-6.5 - 1.5 * drift))
    assert found.verdict == "fail"
    assert found.drift_per_doubling == pytest.approx(drift, abs=0.05)
    assert re.search(r"The best learning rate moves by .* powers of two per doubling of width", str(found))


def test_regret_is_what_the_proxys_optimum_costs():
    found = judged(synthetic(-1.0, noise=0.0, centre=-4.5))
    # The parabola rises by 0.03 t² a distance t away, and training gains 0.7 and a little more with width.
    expected = [0.03 * t**2 / (0.7 + 0.02 * t) for t in range(4)]
    assert list(found.regret.values()) == pytest.approx(expected)
    assert "Width 256 loses 35.5% of what training gains" in str(found)
    assert judged(synthetic(-1.0, noise=0.0, centre=-4.5), max_regret=1.0, max_drift=1.1).verdict == "pass"


def test_more_noise_than_the_tolerance_is_undecided():
    found = judged(synthetic(0.15, noise=0.5))
    assert found.verdict == "undecided"
    assert "take more seeds or steps" in found.reasons[0]


def test_the_interval_covers_the_drift():
    # 95 % nominally; with a binomial's spread over 50 draws.
    covered = 0
    for seed in range(50):
        low, high = judged(synthetic(0.3, noise=0.2, centre=-7.0, seeds=3, seed=seed)).interval
        covered += low < 0.3 < high
    assert covered >= 43


@pytest.mark.parametrize(
    ("centre", "which"), [(-11.0, "2^-10, the lowest learning rate of the grid: add lower")]
)
def test_an_optimum_on_the_edge_is_undecided_and_says_what_to_do(centre, which):
    found = judged(synthetic(centre=centre))
    assert found.verdict == "undecided"
    assert found.on_grid_edge == WIDTHS
    assert f"Width 32 is best at {which} ones." in found.reasons


def test_beyond_the_edge_of_a_wider_model_the_regret_still_tells():
    found = judged(synthetic(-2.0, centre=-5.0))
    assert found.on_grid_edge == (256,)
    assert found.verdict == "fail"
    assert any("add lower ones" in reason for reason in found.reasons)
    assert not any("moves by" in reason for reason in found.reasons)


def test_a_single_seed_is_undecided():
    found = judged(synthetic(seeds=1))
    assert (found.verdict, found.interval) == ("undecided", None)
    assert "One seed does not distinguish noise from drift" in found.reasons[0]


def test_divergence_at_the_transferred_rate_fails_and_at_the_proxy_is_undecided():
    losses = synthetic(noise=0.0)
    walled = losses[256].copy()
    walled[GRID.index(-7.0) :, 1] = math.nan
    found = judged({**losses, 256: walled})
    assert found.verdict == "fail"
    assert found.regret[256] is None
    assert "Width 256 diverges at the transferred learning rate 2^-6.50." in found.reasons
    found = judged({**losses, 32: np.full_like(walled, math.nan)})
    assert found.verdict == "undecided"
    assert "Every run of width 32 diverged: lower log2_lrs." in found.reasons
    assert found.drift_per_doubling is None


def test_json_is_strict():
    losses = synthetic()
    losses[256][-1] = math.nan
    found = json.loads(judged(losses).to_json())
    assert (found["verdict"], found["loss"]["256"][-1]) == ("pass", None)
    assert len(found["interval"]) == 2
    assert set(found["best_log2_lr"]) == {"32", "64", "128", "256"}


# ---- real runs ------------------------------------------------------------------------------------------


def functional(width):
    sizes = {"in": (16, width), "hidden": (width, width), "out": (width, 1)}

    def init(key, x):
        keys = jax.random.split(key, len(sizes))
        return {
            name: {"kernel": jax.random.normal(k, size) / size[0] ** 0.5, "bias": jnp.zeros(size[1])}
            for k, (name, size) in zip(keys, sizes.items(), strict=True)
        }

    def apply(params, x):
        for name in ("in", "hidden"):
            x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
        return x @ params["out"]["kernel"] + params["out"]["bias"]

    return mujax.Functional(init, apply)


def is_hidden(spec):
    return lambda tree: jax.tree_util.tree_map_with_path(
        lambda path, _: spec[leaf_path(path)].role == "hidden", tree
    )


DECAY = 80.0


def decayed(lr, spec):
    return mujax.mup_adamw(lr, spec, weight_decay=DECAY, mask=is_hidden(spec))


def decayed_inside_of_the_factor(lr, spec):
    """The known mistake: µP's factor after the whole of `optax.adamw` shrinks the decay with width."""

    def scale(updates, _):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf * rules.lr_factor(spec[leaf_path(path)], spec.parametrization, "adam"),
            updates,
        )

    return optax.chain(optax.adamw(lr, weight_decay=DECAY, mask=is_hidden(spec)), optax.stateless(scale))


EPS = 0.1


def with_epsilon(lr, spec):
    return mujax.mup_adam(lr, spec, eps=EPS)


def with_epsilon_as_it_is(lr, spec):
    return mujax.mup_adam(lr, spec, eps=EPS, scale_eps=False)


HALVES = tuple(np.arange(-7.5, -3.9, 0.5))


@pytest.mark.parametrize(
    ("factory", "optimizer", "grid", "seeds"),
    [
        (linen, decayed, HALVES, 5),
        (nnx_factory, "adam", range(-8, -2), 10),
        (functional, with_epsilon, range(-6, 0), 5),
    ],
    ids=["linen-decay", "nnx", "functional-epsilon"],
)
def test_passes_in_mup(factory, optimizer, grid, seeds):
    found = mujax.transfer_check(factory, (16, 128), teacher(), optimizer, log2_lrs=grid, seeds=seeds)
    assert found.verdict == "pass", found


@pytest.mark.parametrize(
    ("factory", "optimizer", "grid", "options"),
    [
        (linen, decayed_inside_of_the_factor, HALVES, {}),
        (functional, with_epsilon_as_it_is, range(-6, 0), {}),
        (nnx_factory, "adam", range(-10, -2), {"parametrization": "sp"}),
    ],
    ids=["decay", "epsilon", "sp"],
)
def test_fails_where_the_optimum_moves(factory, optimizer, grid, options):
    found = mujax.transfer_check(factory, (16, 128), teacher(), optimizer, log2_lrs=grid, seeds=5, **options)
    assert found.verdict == "fail", found
    assert abs(found.drift_per_doubling) > 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"log2_lrs": (-3, -4, -4)},
            "log2_lrs: expected at least three different powers of two from -126 to 126, got (-3, -4, -4)",
        ),
        ({"seeds": 0}, "seeds: expected a whole number of at least 1, got 0"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        mujax.transfer_check(linen, (8, 16), teacher(2), **{"log2_lrs": GRID, **options})
