"""Chooses the constants of the forward pass from the analysis of a traced call."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from mujax import rules
from mujax.core._moves import Moves, move_out
from mujax.core.depth import Branches, Depth, find_branches, power_of_fix
from mujax.core.frontends import Call
from mujax.core.program import (
    Boundary,
    ClosedJaxpr,
    EqnPath,
    blocked,
    equation_at,
    loses_derivative,
    source_line,
)
from mujax.core.trace import Analysis, Finding, Use, analyse, axes_of_use, informative_uses
from mujax.errors import DepthError, MujaxError, RoleError
from mujax.spec import MupSpec, Parametrization, ParamSpec

Kind = Literal["readout", "tied_readout", "attention", "scale", "residual"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclasses.dataclass(frozen=True)
class Correction:
    """A constant that the forward pass gets.

    Attributes:
        kind: `"readout"`: the product of an output weight; `"tied_readout"`: the readout use of a tied
            embedding; `"attention"`: a product of two activations brought from 1/sqrt(d) to 1/d;
            `"scale"`: any other constant of the model that scales with width, held at its base value, the
            size that a normalisation removes, restored, and noise on a kernel, scaled as the kernel;
            `"residual"`: the branch's operand of an addition `x + f(x)`, where depth is parametrized.
        factor: the constant by which the result (the operand, for `"residual"` and noise) is multiplied.
        where: `file:line` in the user's code.
        path: the parameter of the product; None for a value that is not a product with a parameter.
        applied: in words, what is multiplied instead: an operand or a result of the function with a
            derivative of its own, or of the kernel, that `where` is inside of. Empty for most.
    """

    kind: Kind
    factor: float
    where: str
    path: str | None = None
    applied: str = ""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The constants of one traced call, and their derivation.

    Attributes:
        corrections: the constants of the forward pass, by place.
        multiplier_sites: the products and lookups that the multipliers multiply: name -> places.
        findings: places that cannot be corrected.
        analysis: the uses and products of the call.
        operands: which operand of its equation a correction multiplies, where it is not the output.
        moves: the corrections inside of functions with their own derivative, and of kernels, that are applied
            at the boundary of these.
    """

    corrections: Mapping[EqnPath, Sequence[Correction]]
    multiplier_sites: Mapping[str, Sequence[EqnPath]]
    findings: tuple[Finding, ...]
    analysis: Analysis
    operands: Mapping[tuple[EqnPath, Kind], int] = dataclasses.field(default_factory=dict)
    moves: Moves = dataclasses.field(default_factory=dict)

    def in_place(self) -> dict[EqnPath, tuple[Correction, ...]]:
        """The corrections that are applied where they belong, by place."""
        stay = {
            site: tuple(one for one in corrections if (site, one.kind) not in self.moves)
            for site, corrections in self.corrections.items()
        }
        return {site: corrections for site, corrections in stay.items() if corrections}

    def in_order(self) -> tuple[Correction, ...]:
        """The corrections in the order of the program."""
        found = self.corrections
        return tuple(correction for site in sorted(found, key=_order) for correction in found[site])


def disabled_kinds(switches: Mapping[Kind, bool]) -> frozenset[Kind]:
    """The kinds that `corrections=` switches off.

    Raises:
        MujaxError: an unknown kind.
    """
    for kind in switches:
        if kind not in KINDS:
            raise MujaxError(
                where="corrections",
                expected=f"kinds out of {', '.join(map(repr, KINDS))}",
                got=repr(kind),
            )
    return frozenset(kind for kind, on in switches.items() if not on)


def plan_call(
    spec: MupSpec,
    disabled: frozenset[Kind],
    stored: Mapping[str, float],
    base: ClosedJaxpr,
    program: ClosedJaxpr,
    call: Call,
    depth: Depth | None = None,
) -> Plan:
    """Derives the constants of one call from its two programs.

    Args:
        spec: the parameters.
        disabled: kinds of corrections to leave out.
        stored: how the constants that the model holds as state scale with width, by path.
        base: the base's program.
        program: the target's program.
        call: the target's call.
        depth: numbers of layers of base and target, if depth is parametrized.

    Raises:
        RoleError: two parameters of one product require different factors.
        DepthError: a residual branch that the call of `mup_init` did not have.
    """
    parametrization = spec.parametrization
    share = rules.mup_share(parametrization)
    prescribed = (
        {path: rules.prescribed_scale(param, parametrization) for path, param in spec.items()}
        if share
        else {}
    )
    state = {position: stored.get(path, 1.0) for position, path in call.state.items()}
    analysis = analyse(base, program, call.params, state, prescribed)
    found: dict[EqnPath, list[Correction]] = {}
    findings = list(analysis.findings)
    operands: dict[tuple[EqnPath, Kind], int] = {}
    reached = None
    if share and depth is not None and depth.ratio != 1:
        reached = _known_branches(spec, find_branches(analysis.flow, depth.residual, part=True))
    if share:
        for site, correction in _of_products(spec, analysis).items():
            found.setdefault(site, []).append(correction)
        for fix in analysis.fixes:
            if reached and depth and "residual" in disabled and power_of_fix(fix, reached, depth, spec):
                # The model's own factor for depth replaces ours.
                continue
            kind: Kind = "attention" if fix.attention else "scale"
            found.setdefault(fix.site, []).append(Correction(kind, fix.factor**share, fix.where))
            if fix.operand is not None:
                operands[fix.site, kind] = fix.operand
    if reached and depth:
        factor = rules.residual_factor(depth.ratio, parametrization)
        for branch in reached.found:
            found.setdefault(branch.site, []).append(Correction("residual", factor, branch.where))
            operands[branch.site, "residual"] = branch.operand
    kept = {
        site: tuple(correction for correction in corrections if correction.kind not in disabled)
        for site, corrections in found.items()
    }
    moves = move_out(
        program,
        {
            (site, correction.kind): (operands.get((site, correction.kind)), correction.factor)
            for site, corrections in kept.items()
            for correction in corrections
        },
    )
    out: dict[EqnPath, tuple[Correction, ...]] = {}
    for site, corrections in kept.items():
        inside = [one for one in corrections if one.factor != 1.0 and (site, one.kind) not in moves]
        block = blocked(program, site) if inside else None
        if block is not None:
            findings.append(
                Finding(
                    "out of reach",
                    f"a factor of {inside[0].factor:.4g} ({inside[0].kind}) belongs inside {block}, which "
                    "has to stay as it is, and no factor on what it reads or returns can be shown to do the "
                    "same; move the product out of it or write the factor there",
                    inside[0].where,
                )
            )
        elif inside and loses_derivative(program, site):
            findings.append(
                Finding(
                    "own derivative",
                    f"a factor of {inside[0].factor:.4g} ({inside[0].kind}) is inside a jax.custom_jvp "
                    "function, so JAX now differentiates its body instead of using its own rule; if the rule "
                    "is not the body's derivative, move the product out of it",
                    inside[0].where,
                )
            )
        left = tuple(
            dataclasses.replace(one, applied=_in_words(program, moves[site, one.kind].boundary))
            if (site, one.kind) in moves
            else one
            for one in corrections
            if block is None or one not in inside
        )
        if left:
            out[site] = left
    return Plan(out, _multiplier_sites(spec, analysis), tuple(findings), analysis, operands, moves)


def _in_words(program: ClosedJaxpr, at: Boundary) -> str:
    """What a factor at a boundary multiplies."""
    parts = [("operand", *one) for one in at.operands] + [("result", *one) for one in at.outputs]
    eqn = equation_at(program, at.site)
    what = " and ".join(
        f"{part} {number}" + ("" if exponent == 1 else f" (to the power of {exponent:.4g})")
        for part, number, exponent in parts
    )
    return f"{what} of {eqn.primitive.name} at {source_line(eqn)}"


def _known_branches(spec: MupSpec, branches: Branches) -> Branches:
    """Refuses branches with parameters that were outside of all branches in the call of `mup_init`."""
    for branch in branches.found:
        for path in sorted(branch.params):
            if path in spec and spec[path].depth == 1:
                raise DepthError(
                    where=path,
                    expected="it outside of residual branches as in the call that mup_init traced",
                    got=f"it inside of the one that is added at {branch.where}",
                    remedy="pass mup_init the inputs and keyword arguments of a call that goes "
                    "through all branches",
                )
    return branches


def _of_products(spec: MupSpec, analysis: Analysis) -> dict[EqnPath, Correction]:
    """The factor of each product with an output weight or a tied embedding, by place."""
    at: dict[EqnPath, list[tuple[Use, Correction | None]]] = {}
    for path, uses in analysis.uses.items():
        for use in informative_uses(uses):
            if use.kind in ("contraction", "statistic") and any(role == "fan_in" for _, role, *_ in use.axes):
                at.setdefault(use.site, []).append(
                    (use, _correction(path, spec[path], use, spec.parametrization))
                )
    out: dict[EqnPath, Correction] = {}
    for site, found in at.items():
        factors = {1.0 if correction is None else correction.factor for _, correction in found}
        if len(factors) > 1:
            first, second = found[:2]
            raise RoleError(
                where=f"{first[0].path} and {second[0].path}",
                expected=f"one factor for their common product at {first[0].where}",
                got="roles that require different ones",
                remedy="use separate products, or give them the same role with roles=",
            )
        correction = found[0][1]
        if correction is not None and site not in analysis.unscaled:
            out[site] = correction
    return out


def _correction(path: str, param: ParamSpec, use: Use, parametrization: Parametrization) -> Correction | None:
    if not reads_out(param, use):
        return None
    if param.role == "input":
        # Tied: looked up in this call or in another one, and read out here.
        inside = {axis for axis, role, *_ in use.axes if role == "fan_in"}
        grows = math.prod(param.shape[axis] for axis in inside) / math.prod(
            param.base_shape[axis] for axis in inside
        )
        return Correction("tied_readout", rules.tied_factor(grows, parametrization), use.where, path)
    return Correction("readout", rules.forward_factor(param, parametrization), use.where, path)


def reads_out(param: ParamSpec, use: Use) -> bool:
    """Whether a product reads out: of an output weight, or of an input weight over its features."""
    if param.role == "input":
        return axes_of_use(use, param.shape, param.base_with_layers, param.infinite).role == "output"
    return param.role == "output"


def _multiplier_sites(spec: MupSpec, analysis: Analysis) -> dict[str, list[EqnPath]]:
    """The places that each multiplier multiplies."""
    inputs = [
        use.site
        for path, uses in analysis.uses.items()
        for use in uses
        if spec[path].role == "input"
        and (use.kind == "lookup" or (use.kind == "contraction" and not reads_out(spec[path], use)))
        and any(role == "fan_in" for _, role, *_ in use.axes)
    ]
    outputs = [
        use.site
        for path in _readouts(spec, analysis)
        for use in analysis.uses[path]
        if use.kind == "contraction" and reads_out(spec[path], use)
    ]
    return {
        "output_mult": list(dict.fromkeys(outputs)),
        "attention_mult": [product.site for product in analysis.products if product.logits],
        "input_mult": list(dict.fromkeys(inputs)),
    }


def _readouts(spec: MupSpec, analysis: Analysis) -> list[str]:
    """The output weights and tied embeddings whose product is an output of the model."""
    return [
        path
        for path in analysis.output_params
        if any(reads_out(spec[path], use) for use in analysis.uses[path] if use.kind == "contraction")
    ]


def zero_params(names: Sequence[str], spec: MupSpec, analysis: Analysis) -> list[str]:
    """The parameters that `zero_init=` starts at zero.

    Raises:
        MujaxError: an unknown name.
    """
    known = {
        "readout": [path for path in _readouts(spec, analysis) if spec[path].role == "output"],
        "query": [path for product in analysis.products if product.logits for path in product.left],
    }
    for name in names:
        if name not in known:
            raise MujaxError(
                where="zero_init", expected=f"names out of {', '.join(map(repr, known))}", got=repr(name)
            )
    return [path for name in names for path in known[name]]


def _order(site: EqnPath) -> tuple[tuple[int, str], ...]:
    return tuple((step, "") if isinstance(step, int) else (0, step) for step in site)
