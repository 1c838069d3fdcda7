"""The search space of a study, as a person writes it."""

from __future__ import annotations

import math
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from mujax.errors import ConfigError
from mujax.tune.study import distributions


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([1, 2.5, "a", None, True][1:], CategoricalDistribution([2.5, "a", None, True])),
        ((8,), CategoricalDistribution([8])),
        ({"low": 1, "high": 8}, IntDistribution(1, 8)),
        ({"low": 1, "high": 8, "log": True}, IntDistribution(1, 8, log=True)),
        ({"low": 1, "high": 9, "step": 4}, IntDistribution(1, 9, step=4)),
        ({"low": 0, "high": 1, "step": 0.25}, FloatDistribution(0, 1, step=0.25)),
        ({"low": 1, "high": 8.0}, FloatDistribution(1, 8)),
        ({"low": "2**-8", "high": "2^-2", "log": True}, FloatDistribution(2**-8, 2**-2, log=True)),
        ({"low": "1e-3", "high": " 2 ** 3 "}, FloatDistribution(1e-3, 8)),
        ({"low": "2**0", "high": "2**3"}, IntDistribution(1, 8)),
        (FloatDistribution(0, 3), FloatDistribution(0, 3)),
        # It ends before high, as in Python's range.
        ({"low": 0, "high": 10, "step": 4}, IntDistribution(0, 8, step=4)),
    ],
)
def test_a_hyperparameter_in_every_form(given: Any, expected: Any) -> None:
    assert distributions({"x": given}) == {"x": expected}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (3, r"x: expected a list of values or a range, got 3; write"),
        ("relu", r"x: expected a list of values or a range, got 'relu'"),
        ([], r"x: expected at least one value to choose from, got none\."),
        ([[1]], r"x: expected numbers, texts, true, false or null to choose from, got \[1\]; give"),
        ([math.nan], r"x: expected finite values to choose from, got nan"),
        ([1, True], r"x: expected different values to choose from, got \[1, True\]"),
        ({"low": 1}, r"x: expected low and high of a range, got no high\."),
        (
            {"low": 1, "high": 2, "base": 2},
            r"x: expected the keys low, high, log, step of a range, got 'base'",
        ),
        ({"low": 2, "high": 2}, r"x: expected low < high, got 2 and 2; write a list"),
        ({"low": 0.0, "high": 2, "log": True}, r"x: expected low > 0 on a log scale, got 0\.0; raise low\."),
        ({"low": 1, "high": 2, "log": "yes"}, r"x: expected true or false as log, got 'yes'"),
        ({"low": 1, "high": 2, "log": True, "step": 1}, r"x: expected a positive step and no log scale"),
        ({"low": 1, "high": 2, "step": 0}, r"x: expected a positive step"),
        ({"low": "two", "high": 2}, r"x: expected a finite number as low, got 'two'; write it as"),
        ({"low": "10**1000000", "high": 2.0}, r"x: expected a finite number as low, got '10"),
        ({"low": True, "high": 2}, r"x: expected a finite number as low, got True"),
        ({"low": 0, "high": math.inf}, r"x: expected a finite number as high, got inf"),
    ],
)
def test_a_hyperparameter_that_makes_no_sense(given: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        distributions({"x": given})


def test_a_space_without_hyperparameters() -> None:
    with pytest.raises(ConfigError, match="space: expected at least one hyperparameter, got none"):
        distributions({})
