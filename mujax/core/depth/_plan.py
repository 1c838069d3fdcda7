"""The plan for depth: how deep base and target are, and which parameters are inside of residual branches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from mujax.core.depth._branches import Branches, Depth, find_branches
from mujax.core.trace import Finding, Flow
from mujax.errors import ConfigError, DepthError
from mujax.spec import MupSpec, Parametrization


def with_depth(
    parametrization: Parametrization, depth: Any, alpha: float, residual: Sequence[str]
) -> Parametrization:
    """The parametrization with the exponent of depth, if that is asked for.

    Raises:
        ConfigError: options that make no sense, alone or together.
    """
    if depth is None:
        if residual or alpha != 1.0:
            raise ConfigError(
                where="mup_init",
                expected="depth_alpha and residual together with depth=",
                got="them without it",
                remedy="pass depth=(layers of the base, layers of the target)",
            )
        return parametrization
    if isinstance(residual, str):
        raise ConfigError(
            where="residual",
            expected="a sequence of globs",
            got=f"the text {residual!r}",
            remedy="put it in a list",
        )
    if not 0.5 <= alpha <= 1:
        raise ConfigError(where="depth_alpha", expected="an exponent from 0.5 to 1", got=repr(alpha))
    return dataclasses.replace(parametrization, depth_alpha=float(alpha))


def plan_depth(given: Any, residual: Sequence[str], spec: MupSpec) -> Depth:
    """How deep base and target are: as given, as the scans show, or both if they agree.

    Raises:
        ConfigError: `given` is neither `"scan"` nor two numbers of layers.
        DepthError: the scans show other numbers, or none.
    """
    scanned = {
        (param.base_shape[axis], param.shape[axis]): path
        for path, param in spec.items()
        for axis in param.layers
    }
    if given == "scan":
        if len(scanned) != 1:
            raise DepthError(
                where='depth="scan"',
                expected="one pair of numbers of layers in base and target",
                got=sorted(scanned) or "no scan over layers whose length differs",
                remedy="pass depth=(layers of the base, layers of the target)",
            )
        given = next(iter(scanned))
    if not (
        isinstance(given, Sequence)
        and len(given) == 2
        and all(isinstance(layers, int) and layers > 0 for layers in given)
    ):
        raise ConfigError(
            where="depth",
            expected='two positive numbers of layers (base, target), "scan" or None',
            got=repr(given),
        )
    depth = Depth(given[0], given[1], tuple(residual))
    for (base, target), path in scanned.items():
        if base * depth.target != target * depth.base:
            raise DepthError(
                where=path,
                expected=f"its layers to grow as in depth={tuple(given)}",
                got=f"{base} in the base and {target} in the target",
                remedy="give both the same numbers",
            )
    return depth


def plan_branches(depth: Depth, flow: Flow) -> Branches:
    """The residual branches that base and target have in common.

    Raises:
        DepthError: they cannot be determined, or there is none.
    """
    branches = find_branches(flow, depth.residual)
    if not branches.found:
        raise DepthError(
            where="depth",
            expected="residual branches",
            got="no addition x + f(x) in the traced call",
            remedy="mark what is added with mujax.residual_branch(...), or leave out depth=",
        )
    return branches


def with_depth_of_branches(spec: MupSpec, branches: Branches, depth: Depth) -> MupSpec:
    """The spec with the depth and the layers of the parameters inside of residual branches."""
    if depth.ratio == 1:
        return spec
    params = dict(spec)
    for path in branches.params:
        # The layers of a scan are layers where base and target have the same number of them, too.
        layers = tuple(axis for axis in params[path].stack if axis in branches.layers.get(path, ()))
        params[path] = dataclasses.replace(params[path], depth=depth.ratio, layers=layers)
    return MupSpec(params, spec.parametrization)


def findings_of_depth(branches: Branches) -> tuple[Finding, ...]:
    """Findings on what the sources have no rule for."""
    findings = []
    if branches.stream:
        path, where = next(iter(branches.stream.items()))
        findings.append(
            Finding(
                "stream parameter",
                f"{_and_others(path, len(branches.stream))} acts on the residual stream in each layer (a "
                "norm after the addition), where the sources know no rule for depth; it keeps the base's "
                "learning rate. Normalise inside of the branch instead",
                where,
            )
        )
    if branches.shared:
        path, count = next(iter(branches.shared.items()))
        where = next(branch.where for branch in branches.found if path in branch.params)
        findings.append(
            Finding(
                "shared layer",
                f"{_and_others(path, len(branches.shared))} is used in {count} residual branches, where the "
                "sources know rules for layers with parameters of their own; it gets the factors of one of "
                "these. Give each layer its own parameters",
                where,
            )
        )
    return tuple(findings)


def _and_others(path: str, count: int) -> str:
    return path if count == 1 else f"{path} (and {count - 1} others)"
