"""Wider is better: verdicts on curves with known answers, and small real runs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from teacher import linen, nnx_factory, teacher

import mujax
from mujax.check._wider import judge_widths
from mujax.errors import ConfigError

STEPS, SEEDS, WINDOW = 100, 5, 10
WIDTHS = (32, 64, 128)


def synthetic(rise=lambda width, step: 0.0, noise=0.02, seed=0, seeds=SEEDS, offset=0.0):
    """Curves from 1 down to 0.2, a tenth lower each time that the width doubles, times `rise`."""
    rng = np.random.default_rng(seed)
    steps = np.arange(STEPS)
    return {
        width: offset
        + (0.2 + 0.8 * np.exp(-steps / 20))
        * 0.9**octave
        * (1 + rise(width, steps))
        # A seed's own level, the same for the whole run, and a little of each step's.
        * (1 + noise * rng.standard_normal((seeds, 1)) + 0.2 * noise * rng.standard_normal((seeds, STEPS)))
        for octave, width in enumerate(WIDTHS)
    }


def judged(losses, **options):
    seeds = next(table.shape[0] for table in losses.values() if table is not None)
    return judge_widths(losses, 2.0**-6, seeds, WINDOW, **options)


def test_curves_that_do_not_cross_pass():
    found = judged(synthetic())
    assert (found.verdict, found.rises, found.reasons) == ("pass", (), ())
    assert found
    assert str(found).startswith("Wider is better: pass\n\n   width")


def late(width, steps):
    return np.where((width == 128) & (steps >= 60), 0.6, 0.0)


def test_the_steps_at_which_a_wider_model_is_worse_are_named():
    found = judged(synthetic(late))
    (rise,) = found.rises
    assert (found.verdict, rise.narrow, rise.wide, rise.steps) == ("fail", 64, 128, (60, 99))
    assert 0 < rise.at_least < rise.by == pytest.approx(0.44 * found.curves[64][-1], rel=0.2)
    assert "Steps 60 to 99: width 128 is worse than width 64 by 0." in str(found)


def test_losses_may_be_negative():
    assert judged(synthetic(offset=-1.0)).verdict == "pass"
    found = judged(synthetic(late, offset=-1.0))
    assert [rise.steps for rise in found.rises] == [(60, 99)]


def test_false_alarms_over_many_windows_and_pairs_are_rare():
    # Equal widths: no rise is allowed for, and each of 20 looks has a chance to be wrong.
    equal = [
        judged(
            {
                width: table / 0.9**octave
                for octave, (width, table) in enumerate(synthetic(seed=seed).items())
            },
            max_rise=0.0,
        )
        for seed in range(200)
    ]
    assert sum(found.verdict == "fail" for found in equal) <= 16


def test_more_noise_than_the_difference_is_undecided():
    found = judged(synthetic(noise=0.5, seed=1))
    assert found.verdict == "undecided"
    assert "take more seeds" in found.reasons[0]


def test_a_single_seed_is_undecided():
    found = judged(synthetic(seeds=1))
    assert found.verdict == "undecided"
    assert "One seed does not distinguish noise" in found.reasons[0]


def test_a_wider_model_that_diverges_fails_and_a_narrower_one_asks_for_a_lower_rate():
    losses = synthetic()
    found = judged({**losses, 128: None})
    assert found.verdict == "fail"
    assert str(found.rises[0]) == "Width 128 diverges and width 64 does not."
    assert found.curves[128] is None
    found = judged({**losses, 32: None})
    assert found.verdict == "undecided"
    assert "Width 32 diverges at learning rate 0.0156: take a lower one." in found.reasons
    assert judge_widths(dict.fromkeys(WIDTHS), 1.0, 3, 10).verdict == "undecided"


def test_json_is_strict():
    found = json.loads(judged({**synthetic(), 128: None}).to_json())
    assert found["verdict"] == "fail"
    assert found["curves"]["128"] is None
    assert found["rises"][0]["by"] is None


# ---- real runs ------------------------------------------------------------------------------------------


def test_passes_in_mup():
    found = mujax.wider_is_better(nnx_factory, (16, 128), teacher(steps=50), "adam", learning_rate=2**-5)
    assert found.verdict == "pass", found


def test_fails_in_standard_parametrization():
    found = mujax.wider_is_better(
        linen, (16, 128), teacher(steps=50), "adam", learning_rate=2**-5, parametrization="sp"
    )
    assert found.verdict == "fail", found
    assert found.rises[0].steps[0] < 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window: expected a whole number of at least 1 or None, got 0"),
        ({"window": 3}, "window: expected from 1 to the number of steps, 2, got 3"),
        ({"seeds": 0}, "seeds: expected a whole number of at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate: expected a positive finite number, got 0.0"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ConfigError, match=message):
        mujax.wider_is_better(linen, (8, 16), teacher(2), **{"learning_rate": 0.1, **options})


def test_a_window_is_a_tenth_of_the_run():
    def linear(width):
        def init(key, x):
            return {"in": jax.random.normal(key, (3, width)), "out": jnp.full((width, 1), 1 / width)}

        return mujax.Functional(init, lambda params, x: x @ params["in"] @ params["out"])

    data = [(jnp.ones((2, 3)), jnp.ones((2, 1)))] * 25
    found = mujax.wider_is_better(linear, (4, 8), data, "sgd", learning_rate=2**-9, seeds=2)
    assert found.window == 2
    assert len(found.curves[4]) == 12
