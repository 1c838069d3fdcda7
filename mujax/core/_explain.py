"""The text of `mup.explain()` and `mujax explain`."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from jax.sharding import PartitionSpec

from mujax import rules
from mujax.core._corrections import Correction
from mujax.core.trace import Finding
from mujax.spec import MupSpec, ParamSpec


@dataclasses.dataclass(frozen=True)
class Split:
    """How parameters are split over a mesh.

    Attributes:
        sizes: of the mesh's axes, by name.
        specs: by path.
        annotated: whether they are the model's own annotations.
    """

    sizes: Mapping[str, int]
    specs: Mapping[str, PartitionSpec]
    annotated: bool


def explain(
    spec: MupSpec,
    init_scales: Mapping[str, float],
    init_shifts: Mapping[str, float],
    corrections: Sequence[Correction],
    findings: Sequence[Finding],
    split: Split | None = None,
) -> str:
    """The role table of a model, the factors in its forward pass and the findings.

    Args:
        spec: the parameters.
        init_scales: the factors on the initial values, by path.
        init_shifts: constants added to them afterwards, by path.
        corrections: the factors in the forward pass.
        findings: what cannot be corrected.
        split: how the parameters are split over a mesh, to show that too.
    """
    parametrization = spec.parametrization
    rows: list[tuple[str, ...]] = [
        ("parameter", "shape", "base shape", "role", "fan-in", "fan-out", "init", "Adam LR", "SGD LR")
    ]
    if split is not None:
        rows[0] += ("split over",)
    for name, paths in _alike(spec, init_scales, split).items():
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
                *([] if split is None else [_text_of(split.specs[paths[0]], len(param.shape))]),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        f"{len(spec)} parameters, {spec.size():,} entries, parametrization {parametrization}. Factors are "
        "relative to the base; init is the factor on the user's own initial values.",
        *_of_depth(spec),
        *([] if spec.grows else [_SAME_WIDTHS]),
        *([] if split is None else [_of_mesh(spec, split)]),
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
        + (f", applied to {c.applied}" if c.applied else "")
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


def _text_of(spec: PartitionSpec, rank: int) -> str:
    """For each axis the mesh's axes that split it, or `-`."""
    axes = [*spec, *[None] * (rank - len(spec))]
    if not any(axes):
        return "replicated"
    return ",".join(
        "-" if name is None else name if isinstance(name, str) else "+".join(name) for name in axes
    )


def _of_mesh(spec: MupSpec, split: Split) -> str:
    """The mesh, the source of the splits, and the entries that one device holds."""
    held = 0
    for path, param in spec.items():
        names = [
            name for axis in split.specs[path] if axis for name in ([axis] if isinstance(axis, str) else axis)
        ]
        held += math.prod(param.shape) // math.prod(split.sizes[name] for name in names)
    mesh = ", ".join(f"{name}={size}" for name, size in split.sizes.items())
    devices = math.prod(split.sizes.values())
    source = "as the model annotates its parameters" if split.annotated else "by roles and axes"
    return f"On {devices} devices ({mesh}) each holds {held:,} entries of the parameters, split {source}."


def _of_depth(spec: MupSpec) -> list[str]:
    """The ratio of depths, and how many parameters are inside of residual branches."""
    ratios = {param.depth for param in spec.values()} - {1.0}
    inside = sum(param.depth != 1 for param in spec.values())
    return [
        f"{ratio:.4g} times as deep as the base: {inside} parameters are inside of residual branches."
        for ratio in sorted(ratios)
    ]


def _alike(spec: MupSpec, scales: Mapping[str, float], split: Split | None) -> dict[str, list[str]]:
    """Groups, under one name, the parameters that differ in a layer's number only."""
    groups: dict[tuple[str, ParamSpec, float, PartitionSpec | None], list[str]] = {}
    for path, param in spec.items():
        place = None if split is None else split.specs[path]
        key = (re.sub(r"\d+", "*", path), param, scales.get(path, 1.0), place)
        groups.setdefault(key, []).append(path)
    names = collections.Counter(pattern for pattern, *_ in groups)
    out: dict[str, list[str]] = {}
    for (pattern, *_), paths in groups.items():
        alone = len(paths) == 1 or names[pattern] > 1
        out[paths[0] if alone else pattern] = paths
    return out
