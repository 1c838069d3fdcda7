"""The text of `mup.explain()` and `mujax explain`."""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping, Sequence

from mujax import rules
from mujax.core._corrections import Correction
from mujax.core.trace import Finding
from mujax.spec import MupSpec, ParamSpec


def explain(
    spec: MupSpec,
    init_scales: Mapping[str, float],
    init_shifts: Mapping[str, float],
    corrections: Sequence[Correction],
    findings: Sequence[Finding],
) -> str:
    """The role table of a model, the factors in its forward pass and the findings.

    Args:
        spec: the parameters.
        init_scales: the factors on the initial values, by path.
        init_shifts: constants added to them afterwards, by path.
        corrections: the factors in the forward pass.
        findings: what cannot be corrected.
    """
    parametrization = spec.parametrization
    rows: list[tuple[str, ...]] = [
        ("parameter", "shape", "base shape", "role", "fan-in", "fan-out", "init", "Adam LR", "SGD LR")
    ]
    for name, paths in _alike(spec, init_scales).items():
        param = spec[paths[0]]
        numbers = (
            init_scales.get(paths[0], 1.0),
            rules.lr_factor(param, parametrization, "adam"),
            rules.lr_factor(param, parametrization, "sgd"),
        )
        rows.append(
            (
                name if len(paths) == 1 else f"{name} ({len(paths)} alike)",
                "x".join(map(str, param.shape)) or "scalar",
                "x".join(map(str, param.base_shape)) or "scalar",
                param.role + (", tied" if param.tied else ""),
                ",".join(map(str, param.fan_in)) or "-",
                ",".join(map(str, param.fan_out)) or "-",
                *(f"{number:.4g}" for number in numbers),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        f"{len(spec)} parameters, {spec.size():,} entries, parametrization {parametrization}. Factors are "
        "relative to the base; init is the factor on the user's own initial values.",
        *_of_depth(spec),
        *([] if spec.grows else [_SAME_WIDTHS]),
        "",
    ]
    for number, row in enumerate(rows):
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    if init_shifts:
        lines += [
            "",
            "Initial values with a mean, which scales as 1/fan-in and not as the deviation; added to them:",
            *(f"  {shift:+.4g}  to {path}" for path, shift in init_shifts.items()),
        ]
    lines += ["", "Factors in the forward pass:"]
    lines += [
        f"  x {c.factor:.4g}  {c.kind}{f' of {c.path}' if c.path else ''} at {c.where}"
        + (f" ({n} times)" if n > 1 else "")
        for c, n in collections.Counter(corrections).items()
    ] or ["  none"]
    lines += ["", "Found, and not corrected:"]
    lines += [
        f"  {f.kind} at {f.where}: {f.message}" + (f" ({f.count} times)" if f.count > 1 else "")
        for f in findings
    ] or ["  nothing"]
    return "\n".join(lines)


_SAME_WIDTHS = (
    "Target and base have the same widths: nothing is infinite, and every factor of width is 1. Pass delta=, "
    "the same model at other widths, to see roles."
)


def _of_depth(spec: MupSpec) -> list[str]:
    """The ratio of depths, and how many parameters are inside of residual branches."""
    ratios = {param.depth for param in spec.values()} - {1.0}
    inside = sum(param.depth != 1 for param in spec.values())
    return [
        f"{ratio:.4g} times as deep as the base: {inside} parameters are inside of residual branches."
        for ratio in sorted(ratios)
    ]


def _alike(spec: MupSpec, scales: Mapping[str, float]) -> dict[str, list[str]]:
    """Groups, under one name, the parameters that differ in a layer's number only."""
    groups: dict[tuple[str, ParamSpec, float], list[str]] = {}
    for path, param in spec.items():
        key = (re.sub(r"\d+", "*", path), param, scales.get(path, 1.0))
        groups.setdefault(key, []).append(path)
    names = collections.Counter(pattern for pattern, *_ in groups)
    out: dict[str, list[str]] = {}
    for (pattern, *_), paths in groups.items():
        alone = len(paths) == 1 or names[pattern] > 1
        out[paths[0] if alone else pattern] = paths
    return out
