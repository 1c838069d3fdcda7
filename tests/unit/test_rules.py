"""The rules as data: each exponent as a number, and the three tables as one training run."""

import dataclasses
import itertools
import math
import re

import pytest

import mujax
from mujax import rules
from mujax.spec import ROLES, Parametrization, ParamSpec

R_IN, R_OUT = 3.0, 5.0

PARAMS = {
    "input": ParamSpec((7, 40), (7, 8), fan_in=(0,), fan_out=(1,), infinite=(1,)),
    "hidden": ParamSpec((24, 40), (8, 8), fan_in=(0,), fan_out=(1,), infinite=(0, 1)),
    "output": ParamSpec((24, 10), (8, 10), fan_in=(0,), fan_out=(1,), infinite=(0,)),
    "finite": ParamSpec((7, 10), (7, 10), fan_in=(0,), fan_out=(1,)),
}
"""One parameter of each role: fan-in grows by 3 where it is infinite, fan-out by 5."""

MUP_TABLES = ("mup", "table3", "table9")


def named(*weights: tuple[str, float]) -> Parametrization:
    return Parametrization(weights)


def only(table: str) -> Parametrization:
    return named((table, 1.0))


# ---- exact exponents -------------------------------------------------------------------------------

# (init, forward factor, Adam LR, SGD LR), each as exponents of (r_in, r_out). Written out by hand from
# Tables 3, 8 and 9 of arXiv 2203.03466, with fan_in and fan_out relative to the base model's.
ZERO = (0, 0)
# (normalized, normalized gradient, spectral), from the spectral condition of arXiv 2310.17813.
BY_NORM = {
    "mup": {
        "input": (ZERO, (0, 0.5), (0, 0.5)),
        "hidden": ((-0.5, 0), (-0.5, 0.5), (-0.5, 0.5)),
        "output": (ZERO, (0.5, 0), (0.5, 0)),
        "finite": (ZERO, ZERO, ZERO),
    },
    "table3": {
        "input": (ZERO, (0, 0.5), (0, 0.5)),
        "hidden": ((-0.5, 0), (-0.5, 0.5), (-0.5, 0.5)),
        "output": (ZERO, (-0.5, 0), (-0.5, 0)),
        "finite": (ZERO, ZERO, ZERO),
    },
    "table9": {
        "input": (ZERO, ZERO, ZERO),
        "hidden": ((-0.5, 0), (-0.5, 0.5), (-0.5, 0.5)),
        "output": (ZERO, ZERO, ZERO),
        "finite": (ZERO, ZERO, ZERO),
    },
    "sp": dict.fromkeys(("input", "hidden", "output", "finite"), (ZERO, ZERO, ZERO)),
}
# What a factor θ in front of a parameter multiplies the learning rate with: θ to this power. The update of a
# normalized optimizer goes with the parameter, which is smaller by θ itself.
THETA = {"sgd": -2, "adam": -1, "normalized": 0, "normalized_gradient": -1, "spectral": -1}
HIDDEN = ((-0.5, 0), ZERO, (-1, 0), (-1, 1))
EXPONENTS = {
    "mup": {
        "input": (ZERO, ZERO, ZERO, (0, 1)),
        "hidden": HIDDEN,
        "output": (ZERO, (-1, 0), ZERO, (1, 0)),
        "finite": (ZERO, ZERO, ZERO, ZERO),
    },
    "table3": {
        "input": (ZERO, ZERO, ZERO, (0, 1)),
        "hidden": HIDDEN,
        "output": ((-1, 0), ZERO, (-1, 0), (-1, 0)),
        "finite": (ZERO, ZERO, ZERO, ZERO),
    },
    "table9": {
        "input": ((0, -0.5), (0, 0.5), (0, -0.5), ZERO),
        "hidden": HIDDEN,
        "output": ((-0.5, 0), (-0.5, 0), (-0.5, 0), ZERO),
        "finite": (ZERO, ZERO, ZERO, ZERO),
    },
    "sp": dict.fromkeys(ROLES, (ZERO, ZERO, ZERO, ZERO)),
}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("table", EXPONENTS)
def test_exponents(table, role):
    row = rules.TABLES[table][role]
    assert (row.init, row.forward, row.lr["adam"], row.lr["sgd"]) == EXPONENTS[table][role]
    by_norm = (row.lr["normalized"], row.lr["normalized_gradient"], row.lr["spectral"])
    assert by_norm == BY_NORM[table][role]
    assert row.source


def test_every_table_has_a_row_per_role_and_every_row_a_rate_per_family():
    assert set(rules.TABLES) == set(EXPONENTS)
    for table in rules.TABLES.values():
        assert set(table) == set(ROLES)
        assert all(set(row.lr) == set(rules.FAMILIES) for row in table.values())


@pytest.mark.parametrize(
    ("table", "role", "expected"),
    [
        # (init_scale where the user's init does not depend on width, forward, Adam LR, SGD LR)
        ("mup", "input", (1, 1, 1, 5)),
        ("mup", "hidden", (3**-0.5, 1, 1 / 3, 5 / 3)),
        ("mup", "output", (1, 1 / 3, 1, 3)),
        ("mup", "finite", (1, 1, 1, 1)),
        ("table3", "output", (1 / 3, 1, 1 / 3, 1 / 3)),
        ("table9", "input", (5**-0.5, 5**0.5, 5**-0.5, 1)),
        ("table9", "output", (3**-0.5, 3**-0.5, 3**-0.5, 1)),
        ("sp", "input", (1, 1, 1, 1)),
        ("sp", "hidden", (1, 1, 1, 1)),
        ("sp", "output", (1, 1, 1, 1)),
    ],
)
def test_multipliers_as_numbers(table, role, expected):
    """r_in and r_out are 3 and 5, so a rule that takes one for the other gives another number."""
    param, chosen = PARAMS[role], only(table)
    found = (
        rules.init_scale(param, chosen, 1.0),
        rules.forward_factor(param, chosen),
        rules.lr_factor(param, chosen, "adam"),
        rules.lr_factor(param, chosen, "sgd"),
    )
    assert found == pytest.approx(expected, rel=1e-15)


def test_the_init_scale_takes_out_what_the_users_own_initialiser_does():
    """The rule fixes the ratio of the stds; `sp` leaves the user's."""
    hidden, output = PARAMS["hidden"], PARAMS["output"]
    assert rules.init_scale(hidden, only("mup"), 3**-0.5) == pytest.approx(1.0, rel=1e-15)
    assert rules.init_scale(output, only("mup"), 3**-0.5) == pytest.approx(3**0.5, rel=1e-15)
    assert rules.init_scale(output, only("sp"), 3**-0.5) == 1.0
    halfway = rules.interpolate("sp", "mup", 0.5)
    assert rules.init_scale(output, halfway, 3**-0.5) == pytest.approx(3**0.25, rel=1e-15)


@pytest.mark.parametrize("table", rules.TABLES)
def test_at_the_bases_widths_every_factor_is_one(table):
    for param in PARAMS.values():
        at_base = dataclasses.replace(param, shape=param.base_shape)
        assert at_base.role == param.role
        factors = (
            rules.init_scale(at_base, only(table), 1.0),
            rules.forward_factor(at_base, only(table)),
            rules.gradient_scale(at_base, only(table)),
            *(rules.lr_factor(at_base, only(table), family) for family in rules.FAMILIES),
        )
        assert set(factors) == {1.0}


# ---- one training run, three ways of writing it ----------------------------------------------------


def _same_run(one: rules.Row, other: rules.Row) -> bool:
    """Whether two rows are (factor·θ, init/θ, SGD LR/θ², Adam LR/θ, ...) of each other, for some θ.

    In exponents, per ratio: with t the exponent of θ, factor += t, init -= t, SGD -= 2t, Adam -= t, ...
    """
    for axis in range(2):
        t = other.forward[axis] - one.forward[axis]
        moved = (one.init[axis] - t, *(one.lr[family][axis] + THETA[family] * t for family in THETA))
        if moved != (other.init[axis], *(other.lr[family][axis] for family in THETA)):
            return False
    return True


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(MUP_TABLES, 2)))
def test_tables_3_8_and_9_are_the_same_training_run(one, other, role):
    assert _same_run(rules.TABLES[one][role], rules.TABLES[other][role])


@pytest.mark.parametrize("role", ["input", "output"])
def test_a_changed_exponent_is_another_training_run(role):
    """The twin of the test above: any single exponent changed by a half is found."""
    right, other = rules.TABLES["mup"][role], rules.TABLES["table9"][role]
    for axis in range(2):
        step = tuple(0.5 * (position == axis) for position in range(2))

        def bump(exponents, step=step):
            return tuple(a + b for a, b in zip(exponents, step, strict=True))

        wrong = [
            dataclasses.replace(right, init=bump(right.init)),
            dataclasses.replace(right, forward=bump(right.forward)),
            *(
                dataclasses.replace(right, lr={**right.lr, family: bump(right.lr[family])})
                for family in rules.FAMILIES
            ),
        ]
        assert not any(_same_run(row, other) for row in wrong)


@pytest.mark.parametrize("role", ["hidden", "output"])
def test_the_standard_parametrization_is_another_training_run(role):
    assert not _same_run(rules.TABLES["sp"][role], rules.TABLES["mup"][role])


@pytest.mark.parametrize("role", ROLES)
def test_the_factors_themselves_differ_by_one_theta(role):
    """The same through the functions that the library calls, and with the scale of the gradient."""
    param = PARAMS[role]
    for one, other in itertools.combinations(map(only, MUP_TABLES), 2):
        theta = rules.forward_factor(param, other) / rules.forward_factor(param, one)
        for function, power in (
            (lambda c: rules.init_scale(param, c, 0.7), -1),
            (lambda c: rules.param_scale(param, c), -1),
            *((lambda c, f=f: rules.lr_factor(param, c, f), power) for f, power in THETA.items()),
            # The gradient with respect to a parameter is proportional to the factor in front of it.
            (lambda c: rules.gradient_scale(param, c), 1),
        ):
            assert function(other) == pytest.approx(function(one) * theta**power, rel=1e-12)


# ---- the scale of gradients ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "role", "expected"),
    [
        ("mup", "input", 1 / 5),
        ("mup", "hidden", 1 / 5),
        ("mup", "output", 1 / 3),
        ("mup", "finite", 1.0),
        ("table3", "output", 1.0),
        ("table9", "input", 5**-0.5),
        ("table9", "output", 3**-0.5),
        *(("sp", role, 1.0) for role in ROLES),
    ],
)
def test_gradient_scale_as_numbers(table, role, expected):
    assert rules.gradient_scale(PARAMS[role], only(table)) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("table", MUP_TABLES)
def test_sgd_and_adam_move_a_parameter_alike(table, role):
    """SGD's update is LR × gradient, Adam's LR × 1: the rates are consistent with the gradient's scale."""
    param, chosen = PARAMS[role], only(table)
    sgd = rules.lr_factor(param, chosen, "sgd") * rules.gradient_scale(param, chosen)
    assert sgd == pytest.approx(rules.lr_factor(param, chosen, "adam"), rel=1e-12)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("chosen", [*rules.TABLES, mujax.interpolate("sp", "table9", 0.3)])
def test_all_families_move_a_parameter_alike(chosen, role):
    """Adam's update has entries of 1; each other family's differs by a norm that is known."""
    param, chosen = PARAMS[role], rules.parametrization(chosen)
    adam = rules.lr_factor(param, chosen, "adam")
    # Multiplied with the parameter's norm; divided by the root of the size; of rank one, the same.
    normalized = rules.lr_factor(param, chosen, "normalized") * rules.param_scale(param, chosen)
    assert normalized == pytest.approx(adam, rel=1e-12)
    for family in ("normalized_gradient", "spectral"):
        factor = rules.lr_factor(param, chosen, family) / rules.norm_scale(param, chosen)
        assert factor == pytest.approx(adam, rel=1e-12)


@pytest.mark.parametrize("table", MUP_TABLES)
@pytest.mark.parametrize("role", ROLES)
def test_the_spectral_condition(table, role):
    """arXiv 2310.17813, Condition 1: both the parameter's spectral norm and its update's go as √(out/in)."""
    param, chosen = PARAMS[role], only(table)
    condition = math.sqrt(param.r_out / param.r_in)
    seen = rules.forward_factor(param, chosen)
    frobenius = rules.norm_scale(param, chosen)
    # Gradients and their signs are of low rank, so that their spectral norm goes as the Frobenius norm.
    updates = {
        "sgd": rules.gradient_scale(param, chosen) * frobenius,
        "adam": frobenius,
        "normalized": rules.param_scale(param, chosen) * frobenius,
        "normalized_gradient": 1.0,
        "spectral": 1.0,
    }
    for family, norm in updates.items():
        assert seen * rules.lr_factor(param, chosen, family) * norm == pytest.approx(condition, rel=1e-12)


def test_updates_that_do_not_align_leave_normalised_ones_without_a_rule():
    for role, expected in (("input", 1), ("hidden", 3**0.5), ("output", 1), ("finite", 1)):
        param = PARAMS[role]
        assert rules.unaligned(param, only("table9")) == pytest.approx(expected)
        assert rules.unaligned(param, only("sp")) == 1
        both = rules.lr_factor(param, only("mup"), "normalized") * rules.unaligned(param, only("mup"))
        assert both == pytest.approx(1)


@pytest.mark.parametrize("family", ["adam", "normalized", "normalized_gradient"])
def test_one_familys_row_is_not_anothers(family):
    """The twin: with the learning rates of another family, the condition does not hold."""
    param, chosen = PARAMS["hidden"], only("mup")
    norm = rules.param_scale(param, chosen) * rules.norm_scale(param, chosen)
    condition = math.sqrt(param.r_out / param.r_in)
    holds = rules.lr_factor(param, chosen, family) * norm == pytest.approx(condition, rel=1e-3)
    assert holds == (family == "normalized")


# ---- tied embeddings -------------------------------------------------------------------------------


@pytest.mark.parametrize("table", MUP_TABLES)
def test_the_readout_use_of_a_tied_embedding_is_divided_by_the_width(table):
    assert rules.tied_factor(3.0, only(table)) == pytest.approx(1 / 3)


def test_a_tied_readout_in_the_standard_parametrization_stays():
    assert rules.tied_factor(3.0, only("sp")) == 1.0
    assert rules.tied_factor(4.0, rules.interpolate("sp", "mup", 0.5)) == pytest.approx(0.5)


# ---- interpolation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("a", "b"), list(itertools.combinations(rules.TABLES, 2)))
def test_interpolation_is_linear_in_the_exponents(a, b, role):
    param, t = PARAMS[role], 0.3
    chosen = mujax.interpolate(a, b, t)
    for function in (
        rules.forward_factor,
        rules.gradient_scale,
        *(lambda p, c, f=f: rules.lr_factor(p, c, f) for f in rules.FAMILIES),
    ):
        expected = function(param, only(a)) ** (1 - t) * function(param, only(b)) ** t
        assert function(param, chosen) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("a", "b"), list(itertools.combinations(rules.TABLES, 2)))
def test_interpolation_ends_at_the_two(a, b):
    assert (mujax.interpolate(a, b, 0.0), mujax.interpolate(a, b, 1.0)) == (only(a), only(b))


def test_interpolation_of_interpolations():
    inner = mujax.interpolate("sp", "mup", 0.5)
    outer = mujax.interpolate(inner, "table3", 0.5)
    assert dict(outer.weights) == {"sp": 0.25, "mup": 0.25, "table3": 0.5}
    assert dict(mujax.interpolate(inner, "mup", 0.5).weights) == {"sp": 0.25, "mup": 0.75}
    assert str(mujax.interpolate("mup", "mup", 0.25)) == "mup"


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_between_two_ways_of_writing_it_the_run_is_the_same(t):
    param, chosen = PARAMS["output"], mujax.interpolate("table3", "table9", t)
    theta = rules.forward_factor(param, chosen) / rules.forward_factor(param, only("mup"))
    for family, power in (("sgd", -2), ("adam", -1)):
        expected = rules.lr_factor(param, only("mup"), family) * theta**power
        assert rules.lr_factor(param, chosen, family) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("t", [-0.1, 1.5, math.nan])
def test_interpolation_outside_of_its_range_is_an_error(t):
    with pytest.raises(
        mujax.ParametrizationError, match=re.escape(f"t: expected a number from 0 to 1, got {t}")
    ):
        mujax.interpolate("sp", "mup", t)


# ---- names -----------------------------------------------------------------------------------------


def test_unknown_names_are_errors_that_list_the_known_ones():
    expected = "parametrization: expected one of 'mup', 'table3', 'table9', 'sp', got 'Mup'."
    with pytest.raises(mujax.ParametrizationError, match=re.escape(expected)):
        rules.parametrization("Mup")
    with pytest.raises(mujax.ParametrizationError, match=r"expected one of .* got 'ntk'"):
        rules.parametrization(named(("mup", 0.5), ("ntk", 0.5)))
    with pytest.raises(mujax.ParametrizationError, match=r"expected one of .* got 'ntk'"):
        mujax.interpolate("mup", "ntk", 0.5)
    expected = (
        "family: expected one of 'sgd', 'adam', 'normalized', 'normalized_gradient', 'spectral', got 'muon'."
    )
    with pytest.raises(mujax.ParametrizationError, match=re.escape(expected)):
        rules.family("muon")


@pytest.mark.parametrize(
    "weights", [(), (("mup", 0.5),), (("mup", 1.5), ("sp", -0.5)), (("mup", math.nan),), (("mup", math.inf),)]
)
def test_weights_that_are_not_those_of_a_mean_are_errors(weights):
    with pytest.raises(mujax.ParametrizationError, match="weights of at least 0 that sum to 1"):
        rules.parametrization(named(*weights))


@pytest.mark.parametrize("wrong", [None, 3, ["mup"]])
def test_a_parametrization_of_another_type_is_an_error(wrong):
    with pytest.raises(mujax.ParametrizationError, match=r"parametrization: expected .* got"):
        rules.parametrization(wrong)


def test_known_names_pass():
    assert rules.parametrization("mup") == only("mup")
    assert rules.parametrization(only("sp")) == only("sp")
    assert [rules.family(name) for name in rules.FAMILIES] == list(rules.FAMILIES)
