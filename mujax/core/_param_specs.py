"""Describes each parameter: axis roles from the traces, or as the user overrides them."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence

from mujax.core.frontends import Initial
from mujax.core.trace import Analysis, Use, axes_of_use, resolve
from mujax.errors import RoleError, ShapeMismatchError
from mujax.spec import ROLES, MupSpec, Parametrization, ParamSpec, Role


def check_same_parameters(name: str, target: Initial, base: Initial) -> None:
    """Requires the same parameters, of the same ranks, in the base and the model called `name`.

    Raises:
        ShapeMismatchError: they differ.
    """
    big, small = target.shapes(target.params), base.shapes(base.params)
    for path in (*small, *big):
        if path not in big or path not in small:
            where, other = ("base", name) if path in small else (name, "base")
            raise ShapeMismatchError(
                where=path,
                expected=f"the same parameters in base and {name}",
                got=f"it in the {where} only and not in the {other}",
                remedy="they may differ in widths, not in depth or in kinds of layers",
            )
        if len(big[path]) != len(small[path]):
            raise ShapeMismatchError(
                where=path,
                expected=f"the same rank in base and {name}",
                got=f"shape {small[path]} in the base and {big[path]} in the {name}",
                remedy="they may differ in widths only",
            )


def describe_parameters(
    target: Initial,
    base: Initial,
    reading: Initial,
    analysis: Analysis,
    overrides: Mapping[str, Role | ParamSpec],
    parametrization: Parametrization,
    layers: Mapping[str, frozenset[int]],
) -> MupSpec:
    """Combines the inferred roles with those that the user gives.

    Args:
        target: the target's initialiser.
        base: the base's initialiser.
        reading: the initialiser of the model that `analysis` compares with the base: target or delta.
        analysis: the uses of the parameters.
        overrides: `roles=` of `mup_init`.
        parametrization: the tables of the spec.
        layers: axes that a scan over layers strips, by path.

    Raises:
        ShapeMismatchError: the delta does not vary a width that the target varies.
        RoleError: a role cannot be read, or an override does not fit.
    """
    small, read_shapes = base.shapes(base.params), reading.shapes(reading.params)
    unused = set(overrides)
    # Where target and base have the same widths an override changes nothing: every factor is 1.
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
                where=path,
                expected="the delta to differ from the base wherever the target does",
                got=f"target {shape} and delta {found} against base {small[path]}",
                remedy="vary every width in the delta",
            )
        override = None
        for pattern, given in overrides.items():
            if fnmatch.fnmatchcase(path, pattern):
                override = given
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
            seen = with_role(path, override, found, wide, infinite, uses)
        params[path] = _stacked(seen, shape, small[path], deep)
    if unused:
        pattern = sorted(unused)[0]
        raise RoleError(
            where="roles",
            expected="globs that match parameters",
            got=f"{pattern!r}, which matches none of them",
            remedy=f"the first is {next(iter(params), None)!r}",
        )
    return MupSpec(params, parametrization)


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
            where=path,
            expected=f"roles= to give shape {shape} and base_shape {base}",
            got=f"{given.shape} and {given.base_shape}",
        )
    return given


def _check_role(path: str, role: str) -> None:
    if role not in ROLES:
        raise RoleError(
            where=path, expected=f"a role out of {', '.join(ROLES)} or a ParamSpec", got=repr(role)
        )


def with_role(
    path: str,
    role: Role,
    shape: tuple[int, ...],
    base: tuple[int, ...],
    infinite: tuple[int, ...],
    uses: Sequence[Use],
) -> ParamSpec:
    """The axes of a parameter whose role the user gives by name.

    Args:
        path: the parameter.
        role: the name.
        shape: the target's shape.
        base: the base's shape.
        infinite: the axes that grow with width.
        uses: its uses in the traced call; the first that shows this role gives the axes.

    Raises:
        RoleError: too few axes grow for it, or one too many.
    """
    for use in uses:
        if use.kind != "opaque" and (seen := axes_of_use(use, shape, base)).role == role:
            return seen
    axes = range(len(shape))
    if role == "finite" and infinite:
        raise RoleError(
            where=path,
            expected="no axis that grows with width for a finite weight",
            got=f"axes {infinite} of shape {shape} growing",
            remedy="give 'input' to keep the base's initial values and Adam learning rate",
        )
    if role == "hidden":
        if len(infinite) < 2:
            raise RoleError(
                where=path,
                expected="two axes that grow with width for a hidden weight",
                got=f"{len(infinite)} in shape {shape}",
                remedy="give a ParamSpec",
            )
        # Flax's layout, outputs last; used only where the user gives the role.
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
