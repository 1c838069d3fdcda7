"""Which rule gets the blame: exponents of a hidden weight, and of an output weight in each table."""

import pytest

from mujax.check._faults import Exponents, broken_rules
from mujax.check._taps import Tap
from mujax.spec import ParamSpec

HIDDEN = ParamSpec((256, 256), (64, 64), fan_in=(0,), fan_out=(1,), infinite=(0, 1))
FINITE = ParamSpec((8,), (8,), fan_in=(), fan_out=(0,), infinite=())
OUTPUT = ParamSpec((256, 8), (64, 8), fan_in=(0,), fan_out=(1,), infinite=(0,))


def blamed(param, kind, initial, factor, lr, linear=False, others=()):
    tap = Tap("net/kernel", kind, (0,), "net.py:1", ("net/kernel",), 1)
    found = broken_rules(tap, "net/kernel", param, 2.0, Exponents(initial, factor, lr, linear), others)
    return [one.rule for one in found]


def test_hidden_weight():
    assert blamed(HIDDEN, "product", -0.5, 0.0, -1.0) == []
    assert blamed(HIDDEN, "product", 0.0, 0.0, -1.0) == ["initialisation"]
    assert blamed(HIDDEN, "product", -0.5, 0.0, 0.0) == ["learning rate"]
    assert blamed(HIDDEN, "product", -0.5, -1.0, -1.0) == ["forward factor"]
    assert blamed(HIDDEN, "product", -0.5, 0.0, 0.0, linear=True) == []


@pytest.mark.parametrize(
    ("initial", "factor", "adam", "sgd"), [(0, -1, 0, 1), (-1, 0, -1, -1), (-0.5, -0.5, -0.5, 0)]
)
def test_the_three_tables_are_one(initial, factor, adam, sgd):
    assert blamed(OUTPUT, "readout", initial, factor, adam) == []
    assert blamed(OUTPUT, "readout", initial, factor, sgd, linear=True) == []
    assert blamed(OUTPUT, "readout", initial, factor, adam + 1) == ["learning rate"]
    assert blamed(OUTPUT, "readout", initial + 0.5, factor, adam) == ["initialisation"]


def test_standard_readout_lacks_its_factor_and_its_initial_values():
    assert blamed(OUTPUT, "readout", -0.5, 0.0, 0.0) == ["forward factor", "initialisation"]


def test_what_a_kernel_is_made_from_has_the_factor_of_the_kernel():
    assert blamed(FINITE, "product", 0.0, -1.0, 0.0, others=[OUTPUT]) == []
    assert blamed(FINITE, "product", 0.0, 0.0, 0.0, others=[OUTPUT]) == ["forward factor"]
    assert blamed(FINITE, "product", 0.0, -1.0, 0.0, others=[HIDDEN]) == ["forward factor"]


def test_zero_initial_values_are_right():
    assert blamed(OUTPUT, "readout", None, -1.0, 0.0) == []
    assert blamed(OUTPUT, "readout", None, 0.0, 0.0) == ["forward factor"]


def test_unknown_learning_rate_is_not_blamed():
    assert blamed(HIDDEN, "product", -0.5, 0.0, None) == []
