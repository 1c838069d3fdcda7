"""What each parameter is: the axis roles that the traces give, and what the user overrules."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence

from mujax.core.frontends import Initial
from mujax.core.trace import Analysis, Use, axes_of_use, resolve
from mujax.errors import RoleError, ShapeMismatchError
from mujax.spec import ROLES, MupSpec, Parametrization, ParamSpec, Role


def check_same_parameters(name: str, target: Initial, base: Initial) -> None:
    big, small = target.shapes(target.params), base.shapes(base.params)
    for path in (*small, *big):
        if path not in big or path not in small:
            where, other = ("base", name) if path in small else (name, "base")
            raise ShapeMismatchError(
                f"{path}: expected the same parameters in base and {name}, found it in the {where} only and "
                "not in "
                f"the {other}; they may differ in widths, not in depth or in kinds of layers."
            )
        if len(big[path]) != len(small[path]):
            raise ShapeMismatchError(
                f"{path}: expected the same rank in base and {name}, found shape {small[path]} in the base "
                "and "
                f"{big[path]} in the {name}; they may differ in widths only."
            )


def describe_parameters(
    target: Initial,
    base: Initial,
    reading: Initial,
    analysis: Analysis,
    overrides: Mapping[str, Role | ParamSpec],
    chosen: Parametrization,
    layers: Mapping[str, frozenset[int]],
) -> MupSpec:
    """Puts together what the traces say and what the user says."""
    small, read_shapes = base.shapes(base.params), reading.shapes(reading.params)
    unused = set(overrides)
    # Where target and base have the same widths there is nothing to overrule: every factor is 1.
    same_widths = read_shapes == small
    params: dict[str, ParamSpec] = {}
    for path, shape in target.shapes(target.params).items():
        found, deep = read_shapes[path], layers.get(path, frozenset[int]())
        # With the target's number of layers, so that what differs is width.
        wide = tuple(
            n if axis in deep else m for axis, (n, m) in enumerate(zip(found, small[path], strict=True))
        )
        infinite = tuple(axis for axis, (n, m) in enumerate(zip(found, wide, strict=True)) if n != m)
        growing = [
            axis
            for axis, (n, m) in enumerate(zip(shape, small[path], strict=True))
            if n != m and axis not in deep
        ]
        if not set(growing) <= set(infinite):
            raise ShapeMismatchError(
                f"{path}: expected the delta to differ from the base wherever the target does, but target "
                f"{shape} "
                f"and delta {found} against base {small[path]} do not; vary every width in the delta."
            )
        override = None
        for pattern, said in overrides.items():
            if fnmatch.fnmatchcase(path, pattern):
                override = said
                unused.discard(pattern)
        uses = analysis.uses.get(path, ())
        if isinstance(override, ParamSpec):
            params[path] = _given(path, override, shape, small[path])
            continue
        if isinstance(override, str):
            _check_role(path, override)
        if override is None or same_widths:
            seen = resolve(path, found, wide, uses)
        else:
            seen = _with_role(path, override, found, wide, infinite, uses)
        params[path] = _stacked(seen, shape, small[path], deep)
    if unused:
        pattern = sorted(unused)[0]
        raise RoleError(
            f"roles: expected globs that match parameters, but {pattern!r} matches none of them; the first "
            "is "
            f"{next(iter(params), None)!r}."
        )
    return MupSpec(params, chosen)


def _stacked(
    seen: ParamSpec, shape: tuple[int, ...], base: tuple[int, ...], layers: frozenset[int]
) -> ParamSpec:
    """The spec at the target's sizes; layers are copies, and count as layers where their number differs."""
    differs = tuple(axis for axis in sorted(layers) if shape[axis] != base[axis])
    return dataclasses.replace(
        seen,
        shape=shape,
        base_shape=base,
        fan_in=tuple(axis for axis in seen.fan_in if axis not in differs),
        fan_out=tuple(axis for axis in seen.fan_out if axis not in differs),
        stack=tuple(sorted({*seen.stack, *differs})),
        layers=differs,
    )


def _given(path: str, given: ParamSpec, shape: tuple[int, ...], base: tuple[int, ...]) -> ParamSpec:
    if (given.shape, given.base_shape) != (shape, base):
        raise RoleError(
            f"{path}: expected roles= to give shape {shape} and base_shape {base}, got {given.shape} and "
            f"{given.base_shape}."
        )
    return given


def _check_role(path: str, role: str) -> None:
    if role not in ROLES:
        raise RoleError(f"{path}: expected a role out of {', '.join(ROLES)} or a ParamSpec, got {role!r}.")


def _with_role(
    path: str,
    role: Role,
    shape: tuple[int, ...],
    base: tuple[int, ...],
    infinite: tuple[int, ...],
    uses: Sequence[Use],
) -> ParamSpec:
    """The axes of a parameter whose role the user gives by name."""
    for use in uses:
        if use.kind != "opaque" and (seen := axes_of_use(use, shape, base)).role == role:
            return seen
    axes = range(len(shape))
    if role == "finite" and infinite:
        raise RoleError(
            f"{path}: expected no axis that grows with width for a finite weight, found axes {infinite} of "
            f"shape {shape} growing; say 'input' to keep the base's initial values and Adam learning rate."
        )
    if role == "hidden":
        if len(infinite) < 2:
            raise RoleError(
                f"{path}: expected two axes that grow with width for a hidden weight, found {len(infinite)} "
                f"in shape {shape}; give a ParamSpec."
            )
        # Flax's own layout, and only because the user asked for it: outputs last.
        inside = tuple(axis for axis in axes if axis != infinite[-1])
    else:
        inside = infinite if role == "output" else tuple(axis for axis in axes if axis not in infinite)
    return ParamSpec(
        shape,
        base,
        fan_in=inside,
        fan_out=tuple(axis for axis in axes if axis not in inside),
        infinite=infinite,
    )
