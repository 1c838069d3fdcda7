"""The rules of maximal update parametrization, as data.

A rule is a row: the exponents of r_in and r_out (target size over base size of a parameter's fan-in and
fan-out) in each quantity that depends on width. Nothing here looks at arrays or models.

References:
    Yang et al., Tensor Programs V, arXiv 2203.03466: Tables 3, 8 and 9, Appendix B.
    Yang, Simon and Bernstein, A Spectral Condition for Feature Learning, arXiv 2310.17813: Condition 1.
    Yang, Yu, Zhu and Hayou, Tensor Programs VI, arXiv 2310.02244: Table 1 (depth, alpha = 1/2).
    Dey et al., Don't be lazy: CompleteP, arXiv 2505.01618: Table 1 (depth, alpha from 1/2 to 1).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Final, Literal, get_args

from mujax._arguments import SHARE, takes
from mujax.errors import ParametrizationError
from mujax.spec import ROLES, Parametrization, ParamSpec, Role

Family = Literal["sgd", "adam", "normalized", "normalized_gradient", "spectral"]
FAMILIES: Final[tuple[Family, ...]] = get_args(Family)


@dataclasses.dataclass(frozen=True)
class FamilyTraits:
    """What the optimizers of a family have in common.

    Attributes:
        updates: what their updates are.
        rates: their learning rates, in words.
        source: where the rates come from.
    """

    updates: str
    rates: str
    source: str


FAMILY_TRAITS: Final[Mapping[Family, FamilyTraits]] = {
    "sgd": FamilyTraits(
        updates="linear in the gradient",
        rates="SGD's learning rates",
        source="TP5 Tables 3, 8 and 9, SGD",
    ),
    "adam": FamilyTraits(
        updates="free of the gradient's scale, entry by entry",
        rates="Adam's learning rates",
        source="TP5 Tables 3, 8 and 9, Adam; Appendix B.3",
    ),
    "normalized": FamilyTraits(
        updates="proportional to the parameter's norm",
        rates="r_in^-1/2 for hidden weights",
        source="Adam's rate over the init std: arXiv 2310.17813, Condition 1; arXiv 2407.05872, Adafactor "
        "with parameter scaling under full alignment",
    ),
    "normalized_gradient": FamilyTraits(
        updates="divided by the norm of the parameter's gradient",
        rates="√(r_out/r_in) for hidden weights, √r_out for input and √r_in for output weights in Table 8",
        source="the gradient's Frobenius norm is its spectral norm up to the root of its low rank: arXiv "
        "2310.17813, Condition 1",
    ),
    "spectral": FamilyTraits(
        updates="matrices whose singular values are all equal",
        rates="√(r_out/r_in)",
        source="the update has a spectral norm of its own: arXiv 2310.17813, Condition 1",
    ),
}
"""What the updates of each family are, and its learning rates."""

Exponents = tuple[float, float]
"""Exponents of (r_in, r_out)."""


@dataclasses.dataclass(frozen=True)
class Row:
    """How one role scales in one parametrization, relative to the base model.

    Attributes:
        init: standard deviation of the initial values.
        forward: constant factor on the parameter's product (or on the parameter, for a vector).
        lr: learning rate, by optimizer family.
        source: where the row is written down.
    """

    init: Exponents
    forward: Exponents
    lr: Mapping[Family, Exponents]
    source: str


_ONE: Final[Exponents] = (0.0, 0.0)


def _rates(
    *, adam: Exponents, sgd: Exponents, normalized: Exponents, spectral: Exponents
) -> Mapping[Family, Exponents]:
    """The rates of a row; those of `"normalized_gradient"` are the spectral ones, see `FAMILY_TRAITS`."""
    return {
        "adam": adam,
        "sgd": sgd,
        "normalized": normalized,
        "normalized_gradient": spectral,
        "spectral": spectral,
    }


_HIDDEN: Final = Row(
    init=(-0.5, 0.0),
    forward=_ONE,
    lr=_rates(adam=(-1.0, 0.0), sgd=(-1.0, 1.0), normalized=(-0.5, 0.0), spectral=(-0.5, 0.5)),
    source="TP5 Tables 3, 8 and 9, hidden weights",
)
_INPUT: Final = Row(
    init=_ONE,
    forward=_ONE,
    lr=_rates(adam=_ONE, sgd=(0.0, 1.0), normalized=_ONE, spectral=(0.0, 0.5)),
    source="TP5 Tables 3 and 8, input weights and all biases",
)
_NO_FACTOR: Final[Mapping[Family, Exponents]] = dict.fromkeys(FAMILIES, _ONE)
_FINITE: Final = Row(init=_ONE, forward=_ONE, lr=_NO_FACTOR, source="no width, no factor")

TABLES: Final[Mapping[str, Mapping[Role, Row]]] = {
    "mup": {
        "input": _INPUT,
        "hidden": _HIDDEN,
        "output": Row(
            init=_ONE,
            forward=(-1.0, 0.0),
            lr=_rates(adam=_ONE, sgd=(1.0, 0.0), normalized=_ONE, spectral=(0.5, 0.0)),
            source="TP5 Table 8, output weights; microsoft/mup MuReadout",
        ),
        "finite": _FINITE,
    },
    "table3": {
        "input": _INPUT,
        "hidden": _HIDDEN,
        "output": Row(
            init=(-1.0, 0.0),
            forward=_ONE,
            lr=_rates(adam=(-1.0, 0.0), sgd=(-1.0, 0.0), normalized=_ONE, spectral=(-0.5, 0.0)),
            source="TP5 Table 3, output weights",
        ),
        "finite": _FINITE,
    },
    "table9": {
        "input": Row(
            init=(0.0, -0.5),
            forward=(0.0, 0.5),
            lr={**_NO_FACTOR, "adam": (0.0, -0.5)},
            source="TP5 Table 9, input weights and all biases",
        ),
        "hidden": _HIDDEN,
        "output": Row(
            init=(-0.5, 0.0),
            forward=(-0.5, 0.0),
            lr={**_NO_FACTOR, "adam": (-0.5, 0.0)},
            source="TP5 Table 9, output weights",
        ),
        "finite": _FINITE,
    },
    # The user's model as it is. Its initialisation is the user's own, at the target's width too, so
    # the `init` exponents of these rows are never used: see `init_weight`.
    "sp": {
        role: Row(init=_ONE, forward=_ONE, lr=_NO_FACTOR, source="standard parametrization") for role in ROLES
    },
}

# The gradient with respect to a pre-activation of width n is Theta(1/n) (TP5 Appendix B.3): a leaf's
# gradient is its forward factor times 1/r_out, and r_out is 1 where the fan-out is finite.
_GRADIENT: Final[Exponents] = (0.0, -1.0)

# Exponents of m_L (layers of the target over layers of the base) as linear functions of alpha, (slope,
# constant), for parameters inside of residual branches; nothing else has a depth factor, nor have initial
# values. arXiv 2505.01618, Table 1; at alpha = 1/2 it is Depth-µP, arXiv 2310.02244, Table 1.
DEPTH_FORWARD: Final = (-1.0, 0.0)
"""Each residual branch's output, and with it the gradient of what is inside: Adam's ε follows it."""

# A branch's update must move the stream by Theta(1/L): m_L^-alpha (the branch's factor) times the update's
# size. Adam's, and that of every family free of the gradient's scale, is the learning rate: alpha - 1. SGD's
# is the learning rate times a gradient that carries m_L^-alpha itself: 2 alpha - 1, which is 0 at 1/2 as in
# arXiv 2310.02244.
DEPTH_LR: Final[Mapping[Family, tuple[float, float]]] = {
    **dict.fromkeys(FAMILIES, (1.0, -1.0)),
    "sgd": (2.0, -1.0),
}

# lr times decay. Table 1 leaves λ alone where depth grows, so AdamW's decay shrinks with its learning rate;
# it keeps decay in proportion to the update, and that is the same power for SGD.
DEPTH_DECAY: Final = (1.0, -1.0)

# The readout use of a tied embedding is divided by the width that it contracts, as MuSharedReadout does.
TIED_READOUT: Final = -1.0


_SHARE: Final = dataclasses.replace(SHARE, error=ParametrizationError)


def parametrization(name: str | Parametrization) -> Parametrization:
    """Checks the name of a parametrization and wraps it.

    Raises:
        ParametrizationError: an unknown table, or weights that are not those of a mean.
    """
    given = Parametrization(((name, 1.0),)) if isinstance(name, str) else name
    tables = f"one of {', '.join(map(repr, TABLES))}"
    if not isinstance(given, Parametrization):
        raise ParametrizationError(
            where="parametrization",
            expected=f"{tables} or the result of mujax.interpolate",
            got=repr(name),
        )
    for table, _ in given.weights:
        if table not in TABLES:
            raise ParametrizationError(where="parametrization", expected=tables, got=repr(table))
    shares = [weight for _, weight in given.weights]
    if not (all(weight >= 0 for weight in shares) and math.isclose(sum(shares), 1.0)):
        raise ParametrizationError(
            where="parametrization", expected="weights of at least 0 that sum to 1", got=given.weights
        )
    return given


@takes(t=_SHARE)
def interpolate(a: str | Parametrization, b: str | Parametrization, t: float) -> Parametrization:
    """The parametrization a fraction `t` of the way from `a` to `b`, linear in the exponents.

    Between two ways of writing µP (`"mup"`, `"table3"`, `"table9"`) every point is the same training
    run; between `"sp"` and `"mup"` it is a dial from one to the other.

    Args:
        a: the parametrization at t = 0.
        b: the parametrization at t = 1.
        t: from 0 to 1.

    Raises:
        ParametrizationError: an unknown name, or `t` outside of [0, 1].

    >>> str(interpolate("sp", "mup", 0.25))
    '0.75 sp + 0.25 mup'
    """
    weights: dict[str, float] = {}
    for side, share in ((parametrization(a), 1 - t), (parametrization(b), t)):
        for table, weight in side.weights:
            weights[table] = weights.get(table, 0.0) + share * weight
    return Parametrization(tuple((table, weight) for table, weight in weights.items() if weight))


def family(name: str) -> Family:
    """Checks the name of an optimizer family.

    Raises:
        ParametrizationError: an unknown family.
    """
    for known in FAMILIES:
        if name == known:
            return known
    raise ParametrizationError(
        where="family", expected=f"one of {', '.join(map(repr, FAMILIES))}", got=repr(name)
    )


def _power(param: ParamSpec, exponents: Exponents) -> float:
    return param.r_in ** exponents[0] * param.r_out ** exponents[1]


def init_scale(param: ParamSpec, parametrization: Parametrization, init_ratio: float) -> float:
    """The factor on the user's initial values.

    Args:
        param: the parameter.
        parametrization: the parametrization.
        init_ratio: std of the user's own initialisation at the target over that at the base. The rule fixes
            that ratio; `"sp"` leaves it as it is.
    """
    scale = 1.0
    for table, weight in parametrization.weights:
        if table != "sp":
            scale *= (_power(param, TABLES[table][param.role].init) / init_ratio) ** weight
    return scale


def mean_scale(param: ParamSpec, parametrization: Parametrization, init_ratio: float) -> float:
    """The factor on the mean of the user's initial values, where a kernel has one.

    A sum over the fan-in adds up a mean coherently: what stays the same at every width is mean x fan-in x
    factor of the product.

    Args:
        param: the parameter.
        parametrization: the parametrization.
        init_ratio: mean of the user's own initialisation at the target over that at the base.

    Reference:
        Yang et al., Tensor Programs V, arXiv 2203.03466, Appendix J (the law of large numbers for sums of
        entries with a mean).
    """
    scale = 1.0
    for table, weight in parametrization.weights:
        if table != "sp":
            coherent = param.r_in * _power(param, TABLES[table][param.role].forward)
            scale *= (1 / coherent / init_ratio) ** weight
    return scale


def forward_factor(param: ParamSpec, parametrization: Parametrization) -> float:
    """The constant on the parameter's product (output) or on the parameter itself (input)."""
    factor = 1.0
    for table, weight in parametrization.weights:
        factor *= _power(param, TABLES[table][param.role].forward) ** weight
    return factor


def mup_share(parametrization: Parametrization) -> float:
    """The weight of µP in the parametrization: 0 for `"sp"`, 1 for the three tables."""
    return sum(weight for table, weight in parametrization.weights if table != "sp")


def tied_factor(growth: float, parametrization: Parametrization) -> float:
    """The constant on the readout use of a tied embedding.

    Args:
        growth: size of the contracted axes at the target over that at the base.
        parametrization: the parametrization; `"sp"` leaves the product as it is.
    """
    return growth ** (TIED_READOUT * mup_share(parametrization))


def prescribed_scale(param: ParamSpec, parametrization: Parametrization) -> float:
    """How the entries of the parameter that the forward pass uses scale: target over base.

    Includes a factor on the parameter itself (Table 9's input weights), but not one on its product.
    """
    share = mup_share(parametrization)
    scale = 1.0
    for table, weight in parametrization.weights:
        if table != "sp":
            row = TABLES[table][param.role]
            entries = _power(param, row.init) * (_power(param, row.forward) if on_parameter(param) else 1.0)
            scale *= entries ** (weight / share)
    return scale


def on_parameter(param: ParamSpec) -> bool:
    """Whether the forward factor goes on the parameter itself and not on its product."""
    return param.role in ("input", "finite")


def lr_factor(param: ParamSpec, parametrization: Parametrization, optimizer_family: Family) -> float:
    """The learning rate of the parameter over the base's, for one optimizer family."""
    factor = _depth_power(param, parametrization, DEPTH_LR[optimizer_family])
    for table, weight in parametrization.weights:
        factor *= _power(param, TABLES[table][param.role].lr[optimizer_family]) ** weight
    if optimizer_family == "normalized_gradient" and parametrization.depth_alpha is not None:
        # One norm for all layers of a scan: each layer's share of it falls with the root of their number.
        factor *= param.r_layers ** (mup_share(parametrization) / 2)
    return factor


def gradient_scale(param: ParamSpec, parametrization: Parametrization) -> float:
    """How the gradient's entries scale, relative to the base: what Adam's epsilon must follow.

    In `"sp"` this is 1: the user's optimizer stays as it is.
    """
    by_width = forward_factor(param, parametrization) * _power(param, _GRADIENT) ** mup_share(parametrization)
    return by_width * _depth_power(param, parametrization, DEPTH_FORWARD)


def _depth_power(param: ParamSpec, parametrization: Parametrization, exponent: tuple[float, float]) -> float:
    if parametrization.depth_alpha is None:
        return 1.0
    slope, constant = exponent
    return param.depth ** ((slope * parametrization.depth_alpha + constant) * mup_share(parametrization))


def residual_factor(depth: float, parametrization: Parametrization) -> float:
    """The constant on the output of each residual branch: m_L to the power of -alpha.

    Args:
        depth: number of layers of the target over that of the base.
        parametrization: the parametrization; `"sp"` leaves the branch as it is.
    """
    if parametrization.depth_alpha is None:
        return 1.0
    slope, constant = DEPTH_FORWARD
    return depth ** ((slope * parametrization.depth_alpha + constant) * mup_share(parametrization))


def decay_factor(param: ParamSpec, parametrization: Parametrization) -> float:
    """The depth factor of learning rate times weight decay: m_L to the power of alpha - 1 inside of branches.

    It is 1 for parameters outside of residual branches, at alpha = 1, and where depth is not parametrized.

    Reference:
        Dey et al., arXiv 2505.01618, Table 1: the hidden weights' λ has no power of m_L, and AdamW multiplies
        it by their learning rate, which has m_L^(alpha - 1).
    """
    return _depth_power(param, parametrization, DEPTH_DECAY)


def param_scale(param: ParamSpec, parametrization: Parametrization) -> float:
    """How the parameter's entries scale in their own table, relative to the base: the initial std's rule.

    In `"sp"` this is 1: the user's optimizer stays as it is.
    """
    scale = 1.0
    for table, weight in parametrization.weights:
        scale *= _power(param, TABLES[table][param.role].init) ** weight
    return scale


def norm_scale(param: ParamSpec, parametrization: Parametrization) -> float:
    """How the Frobenius norm of an array of this shape scales if its entries don't: the root of its size.

    In `"sp"` this is 1: the user's optimizer stays as it is.
    """
    return (param.r_in * param.r_out * param.r_layers) ** (mup_share(parametrization) / 2)


def unaligned(param: ParamSpec, parametrization: Parametrization) -> float:
    """The factor on the learning rate of a normalised update if updates don't align with the activations.

    A product of a random update with an activation grows as the root of the fan-in, an aligned one's as the
    fan-in: for hidden weights that is another r_in^1/2, which cancels the factor of `"normalized"`.

    Reference:
        Everett et al., Scaling Exponents Across Parameterizations and Optimizers, arXiv 2407.05872.
    """
    return param.r_in ** (mup_share(parametrization) / 2) if param.role == "hidden" else 1.0
