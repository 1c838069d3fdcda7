"""From the uses of a parameter to the role of each of its axes."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

from mujax.core.trace._uses import AxisRole, Use
from mujax.errors import RoleError
from mujax.spec import ParamSpec, Role

Roles = tuple[AxisRole, ...]

_REMEDY = 'give it a role with roles={{"{path}": ...}}: a role\'s name or a mujax.ParamSpec'


@dataclasses.dataclass(frozen=True)
class _Reading:
    """The parameter as one use of it shows it."""

    use: Use
    spec: ParamSpec


def resolve(path: str, shape: Sequence[int], base: Sequence[int], uses: Sequence[Use]) -> ParamSpec:
    """Reads the role of each axis of a parameter off its uses.

    Args:
        path: the parameter.
        shape: the target's shape (or the delta's, where that determines the infinite axes).
        base: the base's shape.
        uses: all uses of the parameter in the traced call.

    Raises:
        RoleError: it has an infinite axis and its uses do not show its role, or contradict each other.
    """
    infinite = tuple(axis for axis, (n, m) in enumerate(zip(shape, base, strict=True)) if n != m)
    readings = []
    for use in informative_uses(uses):
        _refuse_axes_cut_in_two(path, shape, use)
        readings.append(_Reading(use, axes_of_use(use, shape, base)))
    if not readings:
        if infinite and not uses:
            # Reported by `mup_init`; as a vector it keeps the base's initial values and Adam's learning rate.
            return ParamSpec(tuple(shape), tuple(base), fan_out=tuple(range(len(shape))), infinite=infinite)
        if infinite:
            raise _unseen(path, shape, uses[0])
        return ParamSpec(tuple(shape), tuple(base), fan_out=tuple(range(len(shape))))
    return _agree(path, readings)


def _refuse_axes_cut_in_two(path: str, shape: Sequence[int], use: Use) -> None:
    """Refuses a parameter stored flat: one axis that is fan-in and fan-out at once."""
    for number in range(len(shape)):
        growing = {role for axis, role, size, base in use.axes if axis == number and size != base}
        if "fan_in" in growing and len(growing) > 1:
            raise RoleError(
                where=path,
                expected="each axis to be fan-in or fan-out",
                got=f"parts of axis {number} of shape {tuple(shape)} that are used as both at {use.where} "
                "and grow with width",
                remedy="store the parameter with an axis for each",
            )


def informative_uses(uses: Sequence[Use]) -> list[Use]:
    """The uses that show a role: products with stored state only where there is nothing better.

    A power iteration multiplies the kernel from both sides to find its norm; the kernel's role is what it
    does to the data.
    """
    seen = [use for use in uses if use.kind != "opaque"]
    return [use for use in seen if use.kind != "statistic"] or seen


def axes_of_use(
    use: Use, shape: Sequence[int], base: Sequence[int], infinite: tuple[int, ...] | None = None
) -> ParamSpec:
    """The parameter as a single use shows it; its growing axes are infinite unless `infinite` is given."""
    if infinite is None:
        infinite = tuple(axis for axis, (n, m) in enumerate(zip(shape, base, strict=True)) if n != m)
    roles = _axis_roles(use, len(shape))

    def axes(role: AxisRole) -> tuple[int, ...]:
        return tuple(axis for axis, found in enumerate(roles) if found == role)

    return ParamSpec(
        tuple(shape), tuple(base), axes("fan_in"), axes("fan_out"), axes("stack"), infinite=infinite
    )


def _axis_roles(use: Use, ndim: int) -> Roles:
    found: list[list[tuple[bool, AxisRole]]] = [[] for _ in range(ndim)]
    for axis, role, size, base in use.axes:
        found[axis].append((size != base, role))
    roles: list[AxisRole | None] = []
    for parts in found:
        # Of an axis in several parts (experts times features), the part that grows decides.
        wide: list[AxisRole] = [role for grows, role in parts if grows]
        known: list[AxisRole] = wide or [role for _, role in parts]
        roles.append(known[0] if known else None)
    # An axis contracted with another parameter (the rank of a low-rank pair) is opposite to the rest.
    inner: AxisRole = "fan_out" if "fan_in" in roles else "fan_in"
    missing: AxisRole = "fan_out"
    return tuple(inner if role == "inner" else role or missing for role in roles)


def _agree(path: str, readings: Sequence[_Reading]) -> ParamSpec:
    by_role: dict[Role, list[_Reading]] = collections.defaultdict(list)
    for reading in readings:
        by_role[reading.spec.role].append(reading)
    for same_role in by_role.values():
        # A contraction shows its axes; an elementwise use does not.
        same_role.sort(key=lambda reading: reading.use.kind == "elementwise")
    roles = set(by_role)
    if roles == {"input", "output"}:
        return dataclasses.replace(by_role["input"][0].spec, tied=True)
    if len(roles) > 1:
        first, second = (group[0] for group in list(by_role.values())[:2])
        raise _disagreement(path, "one role", first, second)
    ((_, group),) = by_role.items()
    chosen = group[0]
    for other in group[1:]:
        if (other.spec.r_in, other.spec.r_out) != (chosen.spec.r_in, chosen.spec.r_out) and (
            other.use.kind != "elementwise"
        ):
            raise _disagreement(path, "one fan-in that grows at one rate", chosen, other)
    return chosen.spec


def _disagreement(path: str, expected: str, *readings: _Reading) -> RoleError:
    found = (
        f"{spec.role} (fan-in {spec.fan_in}, fan-out {spec.fan_out}) at {use.where}"
        for use, spec in ((reading.use, reading.spec) for reading in readings)
    )
    return RoleError(
        where=path,
        expected=expected,
        got=f"a use as {' and one as '.join(found)}",
        remedy=_REMEDY.format(path=path),
    )


def _unseen(path: str, shape: Sequence[int], use: Use) -> RoleError:
    return RoleError(
        where=path,
        expected=f"a use that shows which axes of shape {tuple(shape)} are fan-in",
        got=f"one in {use.eqn.primitive.name} at {use.where}, which can't be followed",
        remedy=_REMEDY.format(path=path),
    )
