"""Factors for depth that a model has already, in its branches or in its initial values."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Final

from mujax.core.depth._branches import Branch, Branches, Depth
from mujax.core.depth._nodes import Nodes
from mujax.core.program import ClosedJaxpr
from mujax.core.trace import Fix, flow_of
from mujax.errors import DepthError
from mujax.spec import ParamSpec

_POWERS: Final = (0.5, 1.0)
_OWN_REMEDY: Final = (
    'take it out of the model, or keep it instead of mujax\'s with corrections={"residual": False}'
)


def refuse_own_factors(
    branches: Branches, depth: Depth, fixes: Sequence[Fix], spec: Mapping[str, ParamSpec]
) -> None:
    """Refuses a model whose branches are multiplied with a power of the depth already.

    It shows as a constant that differs between base and target, and, where both have the same number of
    layers, as a constant of every branch that is 1/L, 1/sqrt(L) or the like.

    Args:
        branches: the residual branches.
        depth: how deep the two are.
        fixes: constants that scale from base to target.
        spec: the parameters; a constant that scales as their widths do has nothing to do with depth.

    Raises:
        DepthError: there is such a factor.
    """
    if depth.ratio == 1:
        return
    widths = _widths(spec)
    for branch in branches.found:
        for before, after in branch.constants:
            ratio = after / before if before else 0.0
            power = _power(ratio, depth.ratio, branch.tolerance)
            of_depth = _power(before, depth.base, branch.tolerance) is not None
            if power is not None and (of_depth or not _of_width(ratio, widths, branch.tolerance)):
                raise _own_factor(
                    branch,
                    f"{before:.4g} in the base and {after:.4g} in the target, which falls with the power "
                    f"{power:g} of the depth",
                )
    first, *others = branches.found
    for _, constant in first.constants:
        named = _power_of_depth(constant, depth, branches.count, first.tolerance)
        everywhere = all(
            any(math.isclose(constant, one, rel_tol=first.tolerance) for _, one in other.constants)
            for other in others
        )
        if named is not None and everywhere:
            raise _own_factor(first, f"{constant:.4g}, which is {named}")
    for fix in fixes:
        power = power_of_fix(fix, branches, depth, spec)
        if power is not None:
            raise DepthError(
                where=fix.where,
                expected="nothing inside of residual branches to scale with depth",
                got=f"a constant that falls with its power {power:g} from base to target",
                remedy=_OWN_REMEDY,
            )


def _own_factor(branch: Branch, factor: str) -> DepthError:
    return DepthError(
        where=branch.where,
        expected="a residual branch without a factor for depth",
        got=f"one multiplied with {factor}",
        remedy=_OWN_REMEDY,
    )


def power_of_fix(fix: Fix, branches: Branches, depth: Depth, spec: Mapping[str, ParamSpec]) -> float | None:
    """The power of the depth that a constant inside of a branch falls with; None where it is one of width."""
    power = _power(1 / fix.factor, depth.ratio, 1e-5)
    if power is None or fix.attention or fix.site not in branches.sites:
        return None
    return None if _of_width(1 / fix.factor, _widths(spec), 1e-5) else power


def _widths(spec: Mapping[str, ParamSpec]) -> set[float]:
    return {ratio for param in spec.values() for ratio in (param.r_in, param.r_out)} - {1.0}


def _of_width(ratio: float, widths: Collection[float], tolerance: float) -> bool:
    """Whether something scales as 1/sqrt(width) or 1/width does."""
    return any(_power(ratio, width, tolerance) is not None for width in widths)


def _power(ratio: float, depth: float, tolerance: float) -> float | None:
    """The power of the depth that a ratio falls with."""
    return next((p for p in _POWERS if math.isclose(ratio, depth**-p, rel_tol=tolerance)), None)


def _power_of_depth(number: float, depth: Depth, branches: int, tolerance: float) -> str | None:
    """How a number is made from the depth of the target, if it is."""
    counts = {
        "L": depth.target,
        "residual branches": branches,
        "2 L": 2 * depth.target,
        "L / base L": depth.ratio,
    }
    for name, count in counts.items():
        for power, text in zip(_POWERS, ("1/sqrt", "1/"), strict=True):
            if count > 1 and math.isclose(number, count**-power, rel_tol=tolerance):
                return f"{text}({name}) for {depth.target} layers"
    return None


def refuse_scaled_init(
    spec: Mapping[str, ParamSpec],
    branches: Branches,
    depth: Depth,
    init_ratios: Mapping[str, float],
    program: ClosedJaxpr,
    outputs: Mapping[int, str],
) -> None:
    """Refuses a model whose initial values inside of branches depend on depth.

    Args:
        spec: the parameters.
        branches: the target's branches.
        depth: how deep base and target are.
        init_ratios: std of the model's own initial values at the target over that at the base, by path.
        program: the target's traced initialiser.
        outputs: which of its outputs are parameters: position -> path.

    Raises:
        DepthError: they do.
    """
    if depth.ratio == 1:
        return
    for path in sorted(branches.params):
        param = spec[path]
        laws = _width_laws(param)
        ratio = init_ratios.get(path, 0.0)
        if not param.layers or not ratio or any(math.isclose(ratio, law, rel_tol=1e-4) for law in laws):
            continue
        power = next((p for law in laws if (p := _power(ratio / law, depth.ratio, 1e-4)) is not None), None)
        if power is not None:
            raise DepthError(
                where=path,
                expected="initial values whose scale does not depend on depth",
                got=f"a standard deviation that falls with its power {power:g} from base to target",
                remedy="use an initialiser that does not depend on the number of layers (with batch_axis= "
                "where it makes all layers at once), or leave out depth=",
            )
    scales = _init_constants(program, outputs)
    for branch in branches.found:
        _refuse_odd_ones(branch, spec, scales, depth, branches.count)


def _refuse_odd_ones(
    branch: Branch, spec: Mapping[str, ParamSpec], scales: Mapping[str, float], depth: Depth, count: int
) -> None:
    """Refuses a kernel whose constant is a power of the depth times that of its neighbours."""
    kernels = {path: spec[path] for path in sorted(branch.params) if spec[path].fan_in and scales.get(path)}
    plain = {path: scales[path] for path in kernels}
    by_fan_in = {
        path: plain[path] * math.sqrt(math.prod(param.shape[axis] for axis in param.fan_in))
        for path, param in kernels.items()
    }
    for measure in (plain, by_fan_in):
        if len(measure) < 2 or max(measure.values()) <= min(measure.values()) * (1 + 1e-4):
            return
    for measure in (plain, by_fan_in):
        for path, scale in measure.items():
            for other, reference in measure.items():
                named = _power_of_depth(scale / reference, depth, count, 1e-4)
                if named is not None:
                    raise DepthError(
                        where=path,
                        expected="initial values whose scale does not depend on depth",
                        got=f"those of {other} times {scale / reference:.4g}, which is {named}",
                        remedy="use the same initialiser for both, or leave out depth=",
                    )


def _width_laws(param: ParamSpec) -> list[float]:
    """How initialisers make the standard deviation depend on width: target over base."""
    fans = [
        [math.prod(shape[axis] for axis in axes) for axes in (param.fan_in, param.fan_out)]
        for shape in (param.shape, param.base_shape)
    ]
    mean = math.sqrt(sum(fans[1]) / sum(fans[0])) if sum(fans[0]) else 1.0
    return [1.0, param.r_in**-0.5, param.r_out**-0.5, mean, 1 / param.r_in, 1 / param.r_out]


def _init_constants(program: ClosedJaxpr, outputs: Mapping[int, str]) -> dict[str, float]:
    """What random numbers of a fixed scale are multiplied with, by path."""
    flow = flow_of(program)
    nodes = Nodes(flow)
    found = {}
    for position, path in outputs.items():
        constants = [constant for _, constant in nodes.constants(nodes.at(flow.outputs[position]))]
        if constants:
            found[path] = abs(math.prod(constants))
    return found
