"""Finds which parameters violate µP, by checking the rules for each parameter separately.

Its initial values, the constants on its product, its learning rate, ε and decay scale with width from the
narrowest model to the widest. This is read off the models and the optimizer, without the noise of training.

References:
    Yang et al., Tensor Programs V, arXiv 2203.03466, Tables 3, 8 and 9.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Final, Literal

import numpy as np

from mujax import rules
from mujax.check._measure import Measured, Subject, inserted_factor, insertion_factor, site_factor
from mujax.check._optimizer_response import Response
from mujax.check._taps import Tap, chain, mixing_sites
from mujax.core import MupModel
from mujax.core.program import EqnPath
from mujax.spec import ParamSpec

Rule = Literal[
    "initialisation",
    "forward factor",
    "learning rate",
    "epsilon",
    "weight decay",
    "attention",
    "constant",
    "role",
    "activation",
]

# Exponents of a rule are exact but for the noise of initial values.
_EXACT: Final = 0.2


@dataclasses.dataclass(frozen=True)
class Violation:
    """A rule that is broken by a parameter or at a place.

    Attributes:
        name: the parameter, or the tap.
        rule: the rule.
        found: the measured exponent of the width.
        expected: the exponent by the rule, in terms of Table 8.
        where: `file:line` of the product, or another place to look at.
        message: the fault and its remedy, in a sentence.
    """

    name: str
    rule: Rule
    found: float
    expected: float
    where: str
    message: str


_REMEDY: Final[Mapping[Rule, str]] = {
    "initialisation": "its initial values scale as width^{found:.2f} and should scale as "
    "width^{expected:.2f}; use mup.init, or give it the rule's standard deviation",
    "forward factor": "the constants on its product scale as width^{found:.2f} and should scale as "
    "width^{expected:.2f}; look for a factor that is missing, applied twice or applied elsewhere",
    "learning rate": "its learning rate scales as width^{found:.2f} and should scale as "
    "width^{expected:.2f}; check its role, its base shape and the optimizer's factor for it",
    "epsilon": "the optimizer's epsilon takes over: the update falls as width^{found:.2f} beside what it "
    "is without; let epsilon follow the gradient (scale_eps=True) or make it smaller",
    "weight decay": "its decay per step scales as width^{found:.2f} and should not depend on width; put "
    "weight decay after the µP factor",
    "constant": "a constant of the model scales as width^{found:.2f} and should not depend on width; leave "
    "the scale correction on, or write the constant as a number",
    "attention": "attention logits are off by width^{found:.2f} from what 1/d attention gives; leave the "
    "attention correction on, or divide by d in place of its root",
}


def fault(name: str, rule: Rule, found: float, expected: float, where: str) -> Violation:
    """A violation with its message."""
    # Without the sign of a zero.
    shown = {"found": round(found, 2) + 0.0, "expected": round(expected, 2) + 0.0}
    message = f"{name}: " + _REMEDY[rule].format(**shown)
    return Violation(name, rule, found, expected, where, message)


def alike(violations: Sequence[Violation]) -> list[list[Violation]]:
    """The violations of one rule by one exponent together."""
    groups: dict[tuple[str, float, float], list[Violation]] = collections.defaultdict(list)
    for one in violations:
        # That of a role is measured by training, the others are read off.
        digits = 0 if one.rule == "role" else 1
        groups[one.rule, round(one.found, digits), round(one.expected, digits)].append(one)
    return list(groups.values())


@dataclasses.dataclass(frozen=True)
class Exponents:
    """How one use of a parameter scales from the narrowest model to the widest, as powers of the width.

    Attributes:
        initial: of its initial values; None if they are zero.
        factor: of the constants on the product.
        lr: of its learning rate; None if it is not known.
        linear: whether the optimizer is linear in the gradient.
    """

    initial: float | None
    factor: float
    lr: float | None
    linear: bool


def broken_rules(
    tap: Tap,
    path: str,
    param: ParamSpec,
    log2_width_ratio: float,
    found: Exponents,
    others: Sequence[ParamSpec] = (),
) -> list[Violation]:
    """Compares one use of a parameter with Table 8, up to the freedom that the tables leave.

    A constant moved from the product to the initial values, with the learning rate adapted, is the same
    training run (Tables 3, 8 and 9 are one): what counts is initial * factor, and lr * factor, or lr *
    factor^2 where the optimizer is linear in the gradient.

    Args:
        tap: where it is used.
        path: the parameter.
        param: its shape and roles, the widest model against the narrowest.
        log2_width_ratio: log2 of the ratio of the two widths.
        found: the measured exponents.
        others: the other parameters that its kernel is computed from.
    """
    table = rules.parametrization("mup")
    family: rules.Family = "sgd" if found.linear else "adam"
    power = 2 if found.linear else 1

    def exponent(ratio: float) -> float:
        return math.log2(ratio) / log2_width_ratio

    initial = exponent(rules.init_scale(param, table, 1.0))
    # The constants on a product are those of its kernel, whichever of the kernel's parameters reads out.
    read_out = [one.r_in for one in (param, *others) if one.role == "output"]
    factor = -exponent(read_out[0] if read_out else param.r_out if tap.kind == "readout" else 1.0)
    lr = exponent(rules.lr_factor(param, table, family))
    off_initial = 0.0 if found.initial is None else found.initial - initial
    off_factor = found.factor - factor
    off_lr = 0.0 if found.lr is None else found.lr - lr

    def is_off(value: float) -> bool:
        return abs(value) > _EXACT

    init_breaks = found.initial is not None and is_off(off_initial + off_factor)
    lr_breaks = found.lr is not None and is_off(off_lr + power * off_factor)
    if not (init_breaks or lr_breaks):
        return []
    of_factor = fault(tap.name, "forward factor", found.factor, factor, tap.where)
    of_initial = fault(path, "initialisation", found.initial or 0.0, initial, tap.where)
    of_lr = fault(path, "learning rate", found.lr or 0.0, lr, tap.where)
    # A constant that neither of the two makes up for is a fault of its own; where one of them does, it is a
    # way of writing, and the other is at fault.
    neither = (init_breaks or found.initial is None) and (lr_breaks or found.lr is None)
    if is_off(off_factor) and neither and not (is_off(off_lr) and is_off(off_initial)):
        rest = ((of_initial, is_off(off_initial)), (of_lr, is_off(off_lr)))
        return [of_factor, *(one for one, broken in rest if broken)]
    return [one for one, broken in ((of_initial, init_breaks), (of_lr, lr_breaks)) if broken]


# ---- a checked model -------------------------------------------------------------------------------

# A gradient this much smaller than the others is rounding.
_NOISE: Final = 1e-3


def find_faults(
    clean: MupModel,
    models: Mapping[int, MupModel],
    checked: Mapping[int, Subject],
    measured: Mapping[int, Measured],
    responses: Sequence[Response],
) -> tuple[Violation, ...]:
    """The broken rules, from the narrowest and the widest model.

    Args:
        clean: the widest model against the narrowest, read off their programs alone.
        models: the checked models, by width.
        checked: the same with optimizer and taps.
        measured: the measurements, by width.
        responses: of the optimizer at the smallest and the largest width.
    """
    narrow, *_, wide = models
    log2_width_ratio = math.log2(wide / narrow)
    ends = (narrow, wide)

    def exponent(small: float, large: float) -> float:
        return math.log2(large / small) / log2_width_ratio

    found: dict[tuple[str, str], Violation] = {}

    def add(*faults: Violation) -> None:
        for one in faults:
            found.setdefault((one.name, one.rule), one)

    numbers = {path: number for number, path in enumerate(measured[wide].paths)}
    for tap in checked[wide].taps:
        for path in tap.params:
            number = numbers[path]
            initial = [measured[width].initial[:, number].mean() for width in ends]
            scales = [_param_factor(models[width], path) for width in ends]
            here = tap
            if tap.kind in ("product", "readout") and _is_gain(clean, tap, path):
                # The constants on the product are the kernel's.
                here, factors = dataclasses.replace(tap, kind="vector", params=(path,)), scales
            else:
                # A kernel that the model normalises gets back its size at the product, by a correction or
                # by a constant of the model.
                held = _scale(clean, tap.site) / _constants_take_out(checked[wide], tap)
                factors = [
                    site_factor(checked[width], tap) * factor / size
                    for width, factor, size in zip(ends, scales, (1.0, held), strict=True)
                ]
            lrs = [_known_lr(response, number) for response in responses]
            exponents = Exponents(
                initial=exponent(*initial) if min(initial) > 0 else None,
                factor=exponent(*factors),
                lr=exponent(*lrs) if min(lrs) > 0 else None,
                linear=bool(responses[1].linear[number]),
            )
            param = relative(clean, models, path)
            others = [relative(clean, models, other) for other in here.params if other != path]
            add(*broken_rules(here, path, param, log2_width_ratio, exponents, others))
            felt = [(one.epsilon[number], one.decay[number]) for one in responses]
            if min(measured[width].gradients[number] / _typical(measured[width]) for width in ends) < _NOISE:
                # A key's bias has no gradient but for rounding: epsilon may take over there.
                felt = [(1.0, decay) for _, decay in felt]
            add(*_of_optimizer(path, felt, log2_width_ratio))
    add(*_of_attention(clean, checked[narrow], checked[wide], log2_width_ratio))
    add(*_of_constants(clean, checked[narrow], checked[wide], log2_width_ratio))
    return tuple(found.values())


def _is_gain(clean: MupModel, tap: Tap, path: str) -> bool:
    """Whether a parameter only multiplies the kernel, entry by entry."""
    uses = clean.replay.analysis.uses[path]
    return all(use.kind == "elementwise" for use in uses if use.site == tap.site and use.kind != "opaque")


def _scale(clean: MupModel, site: EqnPath | None) -> float:
    """What brings a value that the model's constants or norms scale with width back to size, at a place."""
    corrections = () if site is None else clean.replay.corrections.get(site, ())
    return math.prod(one.factor for one in corrections if one.kind == "scale")


def _constants_take_out(subject: Subject, tap: Tap) -> float:
    """What the constants behind a tap take out of how it scales from the narrowest model by design."""
    if tap.site is None:
        return 1.0
    replay, products = subject.replay, mixing_sites(subject.taps)
    steps = list(chain(replay.program, replay.analysis, tap.site, products))
    if not steps or steps[-1].product:
        # As in `downstream`: what queries are divided by belongs to the logits.
        return 1.0
    scales = replay.analysis.scales
    return scales.get(tap.site, 1.0) / scales.get(steps[-1].site, 1.0)


def _typical(measured: Measured) -> float:
    return float(np.median(measured.gradients)) or 1.0


def _param_factor(mup: MupModel, path: str) -> float:
    positions = {name: position for position, name in mup.replay.call.params.items()}
    return mup.replay.param_factors.get(positions[path], 1.0)


def _known_lr(response: Response, number: int) -> float:
    """The learning rate of a parameter; 0 if it cannot be read off the optimizer's response."""
    known = response.linear[number] or response.entrywise[number]
    value = float(response.lr[number])
    return value if known and math.isfinite(value) else 0.0


def relative(clean: MupModel, models: Mapping[int, MupModel], path: str) -> ParamSpec:
    """The parameter of the widest model against that of the narrowest."""
    narrow, *_, wide = models
    param, small = clean.spec[path], models[narrow].spec[path]
    if param.base_shape == small.shape:
        return param
    return dataclasses.replace(param, shape=models[wide].spec[path].shape, base_shape=small.shape)


def _of_optimizer(path: str, ends: Sequence[tuple[float, float]], log2_width_ratio: float) -> list[Violation]:
    """Epsilon and weight decay."""
    out = []
    (eps_small, decay_small), (eps_large, decay_large) = ends
    where = "the optimizer"
    if eps_small > 0 and eps_large > 0:
        fall = math.log2(eps_large / eps_small) / log2_width_ratio
        if abs(fall) > _EXACT / 2:
            out.append(fault(path, "epsilon", fall, 0.0, where))
    if decay_small > 0 and decay_large > 0:
        grows = math.log2(decay_large / decay_small) / log2_width_ratio
        if abs(grows) > _EXACT / 2:
            out.append(fault(path, "weight decay", grows, 0.0, where))
    return out


def _of_attention(
    clean: MupModel, narrow: Subject, wide: Subject, log2_width_ratio: float
) -> list[Violation]:
    """Attention that the corrections bring to 1/d, but the checked models do not."""
    reference = wide._replace(replay=clean.replay)
    out = []
    for tap in wide.taps:
        if tap.kind == "logits":
            expected = math.log2(inserted_factor(reference, tap)) / log2_width_ratio
            found = math.log2(inserted_factor(wide, tap) / inserted_factor(narrow, tap)) / log2_width_ratio
            if abs(found - expected) > _EXACT:
                out.append(fault(tap.name, "attention", found - expected, 0.0, tap.where))
    return out


def _of_constants(
    clean: MupModel, narrow: Subject, wide: Subject, log2_width_ratio: float
) -> list[Violation]:
    """Constants that scale with width without a correction.

    Those behind a product with a parameter are part of that product's factor and checked there.
    """
    replay = clean.replay
    traced, products = (replay.program, replay.analysis), mixing_sites(wide.taps)
    counted = {
        place
        for tap in wide.taps
        if tap.site is not None and tap.params
        for place in (tap.site, *(step.site for step in chain(*traced, tap.site, products)))
    }
    out = []
    for site, corrections in replay.corrections.items():
        wanted = _scale(clean, site)
        applied = insertion_factor(wide, site) / insertion_factor(narrow, site)
        off = math.log2(applied / wanted) / log2_width_ratio
        if site not in counted and wanted != 1 and abs(off) > _EXACT:
            out.append(fault(corrections[0].where, "constant", off, 0.0, corrections[0].where))
    return out
