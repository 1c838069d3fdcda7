"""The constants of the forward pass: from what the trace shows to a factor at a place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from mujax import rules
from mujax.core.depth import Branches, Depth, find_branches, power_of_fix
from mujax.core.frontends import Call
from mujax.core.program import ClosedJaxpr, EqnPath, blocked, loses_derivative
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
            `"scale"`: any other constant of the model that scales with width, held at its base value, and
            the size that a normalisation takes away given back; `"residual"`: the branch's operand of an
            addition `x + f(x)`, where depth is parametrized.
        factor: what the result (the operand, for `"residual"`) is multiplied with.
        where: `file:line` in the user's code.
        path: the parameter of the product; None for a value that is no product with a parameter.
    """

    kind: Kind
    factor: float
    where: str
    path: str | None = None


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the analysis of one traced call comes to.

    Attributes:
        corrections: the constants of the forward pass, by place.
        multiplier_sites: the products and lookups that the multipliers multiply: name -> places.
        findings: what can't be put right.
        analysis: the uses and products that it was read from.
        branches: where residual branches are added, and which operand of the addition each is.
    """

    corrections: Mapping[EqnPath, Sequence[Correction]]
    multiplier_sites: Mapping[str, Sequence[EqnPath]]
    findings: tuple[Finding, ...]
    analysis: Analysis
    branches: Mapping[EqnPath, int] = dataclasses.field(default_factory=dict)

    def in_order(self) -> tuple[Correction, ...]:
        """The corrections in the order of the program."""
        found = self.corrections
        return tuple(correction for site in sorted(found, key=_order) for correction in found[site])


def switched_off(said: Mapping[Kind, bool]) -> frozenset[Kind]:
    for kind in said:
        if kind not in KINDS:
            raise MujaxError(
                f"corrections: expected kinds out of {', '.join(map(repr, KINDS))}, got {kind!r}."
            )
    return frozenset(kind for kind, on in said.items() if not on)


def read_call(
    spec: MupSpec,
    off: frozenset[Kind],
    stored: Mapping[str, float],
    base: ClosedJaxpr,
    program: ClosedJaxpr,
    call: Call,
    depth: Depth | None = None,
) -> Reading:
    """Reads the factors of one call off its two programs.

    Args:
        spec: the parameters.
        off: kinds of corrections that are not wanted.
        stored: how constants scale that the model holds as state, by path.
        base: the base's program.
        program: the target's program.
        call: the target's call.
        depth: how deep base and target are, if that is parametrized.
    """
    chosen = spec.parametrization
    share = rules.mup_share(chosen)
    prescribed = (
        {path: rules.prescribed_scale(param, chosen) for path, param in spec.items()} if share else {}
    )
    state = {position: stored.get(path, 1.0) for position, path in call.state.items()}
    analysis = analyse(base, program, call.params, state, prescribed)
    found: dict[EqnPath, list[Correction]] = {}
    findings = list(analysis.findings)
    reached = None
    if share and depth is not None and depth.ratio != 1:
        reached = _known_branches(spec, find_branches(analysis.flow, depth.residual, part=True))
    if share:
        for site, correction in _of_products(spec, analysis).items():
            found.setdefault(site, []).append(correction)
        for fix in analysis.fixes:
            if reached and depth and "residual" in off and power_of_fix(fix, reached, depth, spec):
                # The model's own factor for depth, which takes the place of ours.
                continue
            kind: Kind = "attention" if fix.attention else "scale"
            found.setdefault(fix.site, []).append(Correction(kind, fix.factor**share, fix.where))
    branches: dict[EqnPath, int] = {}
    if reached and depth:
        factor = rules.residual_factor(depth.ratio, chosen)
        for branch in reached.found:
            found.setdefault(branch.site, []).append(Correction("residual", factor, branch.where))
            branches[branch.site] = branch.operand
    out: dict[EqnPath, tuple[Correction, ...]] = {}
    for site, corrections in found.items():
        kept = tuple(correction for correction in corrections if correction.kind not in off)
        block = blocked(program, site) if kept else None
        if block is not None:
            findings.append(
                Finding(
                    "out of reach",
                    f"a factor of {kept[0].factor:.4g} ({kept[0].kind}) is wanted inside {block}, which "
                    "can't be changed inside without losing its own derivative; move the product out of it "
                    "or write the factor there",
                    kept[0].where,
                )
            )
            continue
        if kept and loses_derivative(program, site):
            findings.append(
                Finding(
                    "own derivative",
                    f"a factor of {kept[0].factor:.4g} ({kept[0].kind}) stands inside a jax.custom_jvp "
                    "function, "
                    "whose body is differentiated now in place of its own rule; if the rule is not the "
                    "body's "
                    "derivative, move the product out of it",
                    kept[0].where,
                )
            )
        if kept:
            out[site] = kept
    return Reading(out, _multiplier_sites(spec, analysis), tuple(findings), analysis, branches)


def _known_branches(spec: MupSpec, branches: Branches) -> Branches:
    """Refuses branches whose parameters have other learning rates: `mup_init` saw another call."""
    for branch in branches.found:
        for path in sorted(branch.params):
            if path in spec and spec[path].depth == 1:
                raise DepthError(
                    f"{path}: expected it outside of residual branches as in the call that mup_init traced, "
                    f"found it inside of the one that is added at {branch.where}; pass mup_init the inputs "
                    "and "
                    "keyword arguments of a call that goes through all branches."
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
                f"{first[0].path} and {second[0].path}: expected one factor for their common product at "
                f"{first[0].where}, but their roles ask for different ones; use separate products, or give "
                "them the "
                "same role with roles=."
            )
        correction = found[0][1]
        if correction is not None and site not in analysis.unscaled:
            out[site] = correction
    return out


def _correction(path: str, param: ParamSpec, use: Use, chosen: Parametrization) -> Correction | None:
    if not _reads_out(param, use):
        return None
    if param.role == "input":
        # Tied, be it in the traced call or in another one: looked up there, read out here.
        inside = {axis for axis, role, *_ in use.axes if role == "fan_in"}
        grows = math.prod(param.shape[axis] for axis in inside) / math.prod(
            param.base_shape[axis] for axis in inside
        )
        return Correction("tied_readout", rules.tied_factor(grows, chosen), use.where, path)
    return Correction("readout", rules.forward_factor(param, chosen), use.where, path)


def _reads_out(param: ParamSpec, use: Use) -> bool:
    """Whether a product is one of an output weight, or the readout use of an input weight."""
    if param.role == "input":
        return axes_of_use(use, param.shape, param.base_with_layers, param.infinite).role == "output"
    return param.role == "output"


def _multiplier_sites(spec: MupSpec, analysis: Analysis) -> dict[str, list[EqnPath]]:
    """The places that the multipliers turn."""
    inputs = [
        use.site
        for path, uses in analysis.uses.items()
        for use in uses
        if spec[path].role == "input"
        and (use.kind == "lookup" or (use.kind == "contraction" and not _reads_out(spec[path], use)))
        and any(role == "fan_in" for _, role, *_ in use.axes)
    ]
    outputs = [
        use.site
        for path in _readouts(spec, analysis)
        for use in analysis.uses[path]
        if use.kind == "contraction" and _reads_out(spec[path], use)
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
        if any(_reads_out(spec[path], use) for use in analysis.uses[path] if use.kind == "contraction")
    ]


def zeros(what: Sequence[str], spec: MupSpec, analysis: Analysis) -> list[str]:
    """The parameters that start at zero."""
    known = {
        "readout": [path for path in _readouts(spec, analysis) if spec[path].role == "output"],
        "query": [path for product in analysis.products if product.logits for path in product.left],
    }
    for name in what:
        if name not in known:
            raise MujaxError(f"zero_init: expected names out of {', '.join(map(repr, known))}, got {name!r}.")
    return [path for name in what for path in known[name]]


def _order(site: EqnPath) -> tuple[tuple[int, str], ...]:
    return tuple((step, "") if isinstance(step, int) else (0, step) for step in site)
