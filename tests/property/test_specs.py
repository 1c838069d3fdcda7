"""Properties of specs and rules that hold for any parameter: nothing is traced here."""

import dataclasses
import math

import pytest
from hypothesis import given, settings, strategies as st

import mujax
from mujax import rules
from mujax.spec import MupSpec, Parametrization, ParamSpec

MANY = settings(max_examples=60, deadline=None, derandomize=True)
WAYS = ("mup", "table3", "table9")


@st.composite
def params(draw):
    """Any shapes, any sharing out of the axes, any of them infinite."""
    rank = draw(st.integers(0, 5))
    base = tuple(draw(st.integers(1, 9)) for _ in range(rank))
    grows = [draw(st.booleans()) for _ in range(rank)]
    shape = tuple(draw(st.integers(1, 64)) if g else b for g, b in zip(grows, base, strict=True))
    kinds = [draw(st.sampled_from(["fan_in", "fan_out", "stack"])) for _ in range(rank)]
    axes = {
        kind: tuple(axis for axis, found in enumerate(kinds) if found == kind)
        for kind in ("fan_in", "fan_out", "stack")
    }
    infinite = tuple(axis for axis, g in enumerate(grows) if g)
    return ParamSpec(shape, base, **axes, infinite=infinite, tied=draw(st.booleans()))


@st.composite
def parametrizations(draw):
    a, b = draw(st.sampled_from(list(rules.TABLES))), draw(st.sampled_from(list(rules.TABLES)))
    return mujax.interpolate(a, b, draw(st.floats(0, 1)))


@st.composite
def specs(draw):
    names = draw(st.lists(st.text(min_size=1, max_size=12), max_size=5, unique=True))
    return MupSpec({name: draw(params()) for name in names}, draw(parametrizations()))


@MANY
@given(specs())
def test_json_round_trip(spec):
    """To the last bit of a weight, any name, in order; and a file that lost a brace is not a spec."""
    again = MupSpec.from_json(spec.to_json())
    assert again == spec
    assert hash(again) == hash(spec)
    assert list(again.items()) == list(spec.items())
    assert again.parametrization.weights == spec.parametrization.weights
    with pytest.raises(mujax.MujaxError, match="expected the JSON written by"):
        MupSpec.from_json(spec.to_json()[:-1])


@MANY
@given(specs(), st.randoms(use_true_random=False))
def test_equality_does_not_depend_on_order_and_does_on_content(spec, random):
    items = list(spec.items())
    random.shuffle(items)
    shuffled = MupSpec(dict(items), spec.parametrization)
    assert shuffled == spec
    assert hash(shuffled) == hash(spec)
    if items:
        path, param = items[0]
        other = MupSpec({**spec, path: dataclasses.replace(param, tied=not param.tied)}, spec.parametrization)
        assert other != spec


@MANY
@given(params())
def test_ratios_and_roles(param):
    sizes = math.prod(param.shape) / math.prod(param.base_shape)
    assert param.r_in * param.r_out == pytest.approx(sizes)
    turned = dataclasses.replace(param, fan_in=param.fan_out, fan_out=param.fan_in)
    if not param.stack:
        assert (turned.r_in, turned.r_out) == (param.r_out, param.r_in)
        swapped = {"input": "output", "output": "input", "hidden": "hidden", "finite": "finite"}
        assert turned.role == swapped[param.role]
    if param.role == "finite":
        assert (param.r_in, param.r_out) == (1.0, 1.0)


@MANY
@given(params(), parametrizations())
def test_at_the_bases_own_sizes_every_factor_is_one(param, chosen):
    at_base = dataclasses.replace(param, shape=param.base_shape)
    factors = [
        rules.init_scale(at_base, chosen, 1.0),
        rules.forward_factor(at_base, chosen),
        rules.gradient_scale(at_base, chosen),
        *(rules.lr_factor(at_base, chosen, family) for family in rules.FAMILIES),
    ]
    assert factors == [1.0] * len(factors)


@MANY
@given(params(), st.sampled_from(WAYS), st.sampled_from(WAYS), st.floats(0, 1))
def test_all_ways_of_writing_mup_are_one_run(param, one, other, t):
    """(factor·θ, init/θ, SGD LR/θ², Adam LR/θ, gradient·θ), for what lies between two of them too."""
    first, second = Parametrization(((one, 1.0),)), mujax.interpolate(one, other, t)
    theta = rules.forward_factor(param, second) / rules.forward_factor(param, first)
    for function, power in (
        (lambda c: rules.init_scale(param, c, 1.0), -1),
        (lambda c: rules.lr_factor(param, c, "adam"), -1),
        (lambda c: rules.lr_factor(param, c, "sgd"), -2),
        (lambda c: rules.gradient_scale(param, c), 1),
    ):
        assert function(second) == pytest.approx(function(first) * theta**power, rel=1e-9)


@MANY
@given(params(), st.sampled_from(WAYS))
def test_the_standard_parametrization_is_not_one_of_them(param, way):
    """The twin of the test above: for a wide hidden or output weight it is another run."""
    sp, mup = Parametrization((("sp", 1.0),)), Parametrization(((way, 1.0),))
    theta = rules.forward_factor(param, mup)
    same = all(
        math.isclose(rules.lr_factor(param, mup, family), theta**power)
        for family, power in (("adam", -1), ("sgd", -2))
    )
    rates = [rules.lr_factor(param, sp, family) for family in rules.FAMILIES]
    assert rates == [1.0] * len(rates)
    grows_in = param.role in ("hidden", "output") and param.r_in != 1.0
    grows_out = param.role == "input" and param.r_out != 1.0
    if grows_in or grows_out:
        assert not same
