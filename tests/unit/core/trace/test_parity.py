"""Parity: whether the mean of a function of symmetric parameters is zero, against samples."""

import itertools

import numpy as np
import pytest

from mujax.core.trace._parity import Parity

A, B, C = (Parity.of(name) for name in "abc")
CASES = {
    "a": (A, lambda a, b, c: a),
    "a + b": (A + B, lambda a, b, c: a + b),
    "a b": (A * B, lambda a, b, c: a * b),
    "a b + c": (A * B + C, lambda a, b, c: a * b + c),
    "a + a b": (A + A * B, lambda a, b, c: a + a * b),
    "a |b|": (A * B.even, lambda a, b, c: a * abs(b)),
    "a a": (A * A, lambda a, b, c: a * a),
    "|a|": (A.even, lambda a, b, c: abs(a)),
    "exp a": (A.any, lambda a, b, c: np.exp(a)),
    "b exp a": (B * A.any, lambda a, b, c: b * np.exp(a)),
    "a exp a": (A * A.any, lambda a, b, c: a * np.exp(a)),
    "a + 1": (A + Parity(), lambda a, b, c: a + 1),
    "|a b|": ((A * B).even, lambda a, b, c: abs(a * b)),
    "a b c + a": (A * B * C + A, lambda a, b, c: a * b * c + a),
    "(a + b) c": ((A + B) * C, lambda a, b, c: (a + b) * c),
    "(a + b)(a - b)": ((A + B) * (A + B), lambda a, b, c: (a + b) * (a - 0.5 * b)),
    "(a + b)^2 c": ((A + B).even * C, lambda a, b, c: (a + b) ** 2 * c),
}


@pytest.mark.parametrize("name", CASES)
def test_centred_as_the_mean_over_all_signs_says(name):
    parity, function = CASES[name]
    mean = np.mean([function(0.7 * a, 0.9 * b, 1.1 * c) for a, b, c in itertools.product((1, -1), repeat=3)])
    assert parity.is_centred == (abs(mean) < 1e-12)
