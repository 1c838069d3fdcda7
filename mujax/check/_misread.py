"""Finds parameters whose role was misread, by how their products grow with width.

Where every rule holds and an activation still depends on width, the rules were applied to the wrong role. The
role that would bring the measured exponents to the theory's is the remedy.

References:
    Yang et al., Tensor Programs V, arXiv 2203.03466, Table 8 and Appendix D.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np

from mujax import rules
from mujax.check._faults import Violation, relative
from mujax.check._slopes import FALLS, TOLERANCE, Check, judge_gains
from mujax.check._taps import Tap, makers_of_outputs
from mujax.core import MupModel, with_role
from mujax.core.program import EqnPath, equation_at
from mujax.core.trace import axes_of_use
from mujax.errors import RoleError
from mujax.spec import ROLES, ParamSpec, Role


class Growth(NamedTuple):
    """How a product scales, as powers of the width; None where it was not measured.

    Attributes:
        initial: its size at initialisation.
        update: the effect of its parameters' update.
    """

    initial: float | None
    update: float | None

    def text(self) -> str:
        """The exponents in words."""
        parts = (("at initialisation", self.initial), ("by its update", self.update))
        known = (f"as width^{round(value, 2) + 0.0:.2f} {when}" for when, value in parts if value is not None)
        return " and ".join(known) or "beyond all bounds"

    @property
    def worst(self) -> float:
        """The exponent that is furthest from 0."""
        return max((value for value in self if value is not None), key=abs, default=math.nan)


def find_misread(
    clean: MupModel,
    models: Mapping[int, MupModel],
    taps: Sequence[Tap],
    failed: Mapping[int, Sequence[Check]],
    table: np.ndarray,
    linear: np.ndarray,
    paths: Sequence[str],
) -> tuple[Violation, ...]:
    """The parameters whose roles don't fit the measurements, where no rule is broken.

    Args:
        clean: the widest model against the narrowest.
        models: the checked models, by width.
        taps: the taps.
        failed: the failing checks of each tap that fails, by its number.
        table: measurements of one learning rate, (widths, seeds, steps + 1, taps, quantities).
        linear: for each parameter, whether the optimizer is linear in its gradient.
        paths: the parameters, in this order.
    """
    reading = _Reading(clean, models, dict(zip(paths, linear, strict=True)))
    found: dict[str, Violation] = {}
    for number in failed:
        tap = taps[number]
        checks = judge_gains(tap, tuple(models), table[:, :, :, number], bool(linear.any()))
        if any(check.status == "fail" for check in checks):
            growth = _growth(checks, "initial gain", "gain of its update")
            one = reading.blamed(tap, tap.params, growth) or reading.unfit(tap, growth)
            found.setdefault(one.name, one)
    if not found:
        # Nothing grows by itself: what is read between the first failing tap and the ones before it counts.
        first, checks = next(iter(failed.items()))
        growth = _growth(checks, "initial size", "change")
        suspects = list(reading.between(taps, taps[first]))
        if one := reading.blamed(taps[first], suspects, growth):
            found[one.name] = one
        else:
            found[taps[first].name] = reading.unexplained(taps[first], suspects, checks)
    return tuple(found.values())


def overruled(clean: MupModel, tap: Tap) -> bool:
    """Whether a parameter of a tap has another role than its use there shows, as `roles=` can give it."""
    reading = _Reading(clean, {}, {})
    return any(reading.shown(tap, path) not in (None, clean.spec[path].role) for path in tap.params)


def _growth(checks: Sequence[Check], initial: str, update: str) -> Growth:
    slopes = {check.quantity: check.slope.value for check in checks if check.slope is not None}
    return Growth(slopes.get(initial), slopes.get(update))


_FITS: Final[Mapping[bool, float]] = {False: -TOLERANCE, True: -0.5 - TOLERANCE}


class _Reading:
    """The roles that were read, and what others would change."""

    def __init__(self, clean: MupModel, models: Mapping[int, MupModel], linear: Mapping[str, bool]) -> None:
        self._clean = clean
        self._models = models
        self._linear = linear
        self._uses = clean.replay.analysis.uses

    def shown(self, tap: Tap, path: str) -> Role | None:
        """The role that the use at a tap shows; None where it shows none or only a tied readout."""
        param = self._clean.spec[path]
        for use in self._uses.get(path, ()):
            if use.site == tap.site and use.kind != "opaque":
                role = axes_of_use(use, param.shape, param.base_with_layers, param.infinite).role
                return None if param.role == "input" and role == "output" else role
        return None

    def blamed(self, tap: Tap, paths: Sequence[str], growth: Growth) -> Violation | None:
        """The first parameter whose growth another role explains."""
        if not any(rules.mup_share(mup.spec.parametrization) for mup in self._models.values()):
            # Roles change nothing in the standard parametrization.
            return None
        for path in sorted(paths, key=lambda path: not self._is_doubtful(tap, path)):
            role = self._fitting(tap, path, growth)
            if role is not None:
                read = self._clean.spec[path].role
                shows = self.shown(tap, path)
                origin = "" if shows in (None, read) else f", where its product shows {shows}"
                message = (
                    f"{path}: it is read as {read}{origin}; its product scales {growth.text()} and should "
                    f'not depend on width; give roles={{"{path}": "{role}"}}'
                )
                return Violation(path, "role", growth.worst, 0.0, tap.where, message)
        return None

    def unfit(self, tap: Tap, growth: Growth) -> Violation:
        """A product that grows by itself, whatever the role."""
        one = f"it is read as {self._clean.spec[tap.params[0]].role}"
        roles = one if tap.params == (tap.name,) else self._with_roles(tap.params)
        message = (
            f"{tap.name}: {roles}; its product scales {growth.text()} and should not depend on width, and no "
            "role would change that; look at the constants on it and at what is done to its parameters"
        )
        return Violation(tap.name, "activation", growth.worst, 0.0, tap.where, message)

    def unexplained(self, tap: Tap, suspects: Sequence[str], checks: Sequence[Check]) -> Violation:
        """The first tap that differs, where neither a rule nor a role explains it."""
        check = max(checks, key=lambda check: math.inf if check.slope is None else abs(check.slope.value))
        found = math.nan if check.slope is None else check.slope.value
        expected = min(check.allowed, key=lambda end: abs(end - found))
        growing = [path for path in suspects if self._clean.spec[path].infinite]
        also = f", and at the roles between them: {self._with_roles(growing)}" if growing else ""
        message = (
            f"{tap.name}: its {check.quantity} scales as width^{found:.2f}, and it is the first tap that "
            f"differs from the theory; look at the constants between it and the taps before it{also}"
        )
        return Violation(tap.name, "activation", found, expected, tap.where, message)

    def between(self, taps: Sequence[Tap], tap: Tap) -> Iterator[str]:
        """The parameters that reach a tap other than through the taps before it."""
        replay, flow = self._clean.replay, self._clean.replay.analysis.flow
        ends = {one.site for one in taps if one.site is not None and one.kind != "vector"} - {tap.site}
        waiting: list[EqnPath | None] = [tap.site or makers_of_outputs(self._clean)[tap.output or 0]]
        seen: set[EqnPath | None] = {None, *ends}
        while waiting:
            site = waiting.pop(0)
            if site in seen or site is None:
                continue
            seen.add(site)
            if site[0] == "input":
                path = replay.call.params.get(int(site[1]))
                if path is not None:
                    yield path
            elif site in flow.visits:
                waiting += [operand.origin for operand in flow.visits[site].operands]

    def _is_doubtful(self, tap: Tap, path: str) -> bool:
        """Whether a role does not stand on a product that was seen."""
        param = self._clean.spec[path]
        uses = [use for use in self._uses.get(path, ()) if use.kind in ("contraction", "lookup")]
        return not uses or self.shown(tap, path) not in (None, param.role)

    def _fitting(self, tap: Tap, path: str, growth: Growth) -> Role | None:
        """The role that would bring both exponents into what is allowed; first the one that its use shows."""
        param = relative(self._clean, self._models, path)
        if self._is_vector(path, param):
            # What grows is what it meets.
            return None
        narrow, *_, wide = self._models
        log2_width_ratio = math.log2(wide / narrow)
        own = self._exponents(path, param, log2_width_ratio)
        if self._linear[path] and growth.initial is not None:
            # A gradient depends on what comes later too: a norm makes up for a product that is too small.
            growth = Growth(growth.initial, None)
        fits: dict[Role, float] = {}
        for role in ROLES:
            try:
                other = with_role(
                    path, role, param.shape, param.base_shape, param.infinite, self._uses.get(path, ())
                )
            except RoleError:
                continue
            if role == param.role:
                continue
            new = self._exponents(path, other, log2_width_ratio)
            after = [
                value + there - here
                for value, there, here in zip(growth, new, own, strict=True)
                if value is not None
            ]
            low = (_FITS[role == "output"], FALLS)
            kept = [bound for bound, value in zip(low, growth, strict=True) if value is not None]
            if after and all(bound <= value <= TOLERANCE for bound, value in zip(kept, after, strict=True)):
                fits[role] = sum(map(abs, after)) - (role == self.shown(tap, path))
        return min(fits, key=fits.__getitem__, default=None)

    def _is_vector(self, path: str, param: ParamSpec) -> bool:
        """Whether it is a bias, or a gain of one axis: one of more axes may be a kernel that is summed."""
        uses = [use for use in self._uses.get(path, ()) if use.kind != "opaque"]
        eqns = [equation_at(self._clean.replay.program, use.site) for use in uses]
        if any(use.kind == "contraction" for use in uses):
            return False
        return len(param.shape) < 2 or (
            len(eqns) > 0 and all(eqn.primitive.name in ("add", "sub") for eqn in eqns)
        )

    def _exponents(self, path: str, param: ParamSpec, log2_width_ratio: float) -> tuple[float, float]:
        """What a role does to the size of a product and to the effect of an update."""
        table = rules.parametrization("mup")
        linear = self._linear[path]
        forward = math.log2(rules.forward_factor(param, table))
        initial = math.log2(rules.init_scale(param, table, 1.0))
        rate = math.log2(rules.lr_factor(param, table, "sgd" if linear else "adam"))
        size, update = initial + forward, rate + (2 if linear else 1) * forward
        return size / log2_width_ratio, update / log2_width_ratio

    def _with_roles(self, paths: Sequence[str]) -> str:
        return ", ".join(f"{path} is read as {self._clean.spec[path].role}" for path in paths)
