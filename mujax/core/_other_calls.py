"""Compares a later call with the one that `mup_init` read: where the two would get different corrections.

Training and evaluation are calls of one model. Initial values, learning rates and the factors of the forward
pass follow the call that `mup_init` traced; a call that shows something else of a parameter, or gets another
factor at the same place, is another function of the width.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from mujax import rules
from mujax.core._corrections import Plan, reads_out
from mujax.core.program import ClosedJaxpr, equation_at, equations, shape_of, source_line
from mujax.core.trace import Finding, Use, axes_of_use, informative_uses
from mujax.spec import MupSpec, ParamSpec, Role

_DIGITS = 6


class _Seen(NamedTuple):
    """A parameter as one call shows it.

    Attributes:
        role: its role there; None where the call does not use it and it has that of the spec.
        needs: what the rules give it there: factors on initial values, entries and rates.
        where: the place of the use.
    """

    role: Role
    needs: tuple[float, ...]
    where: str | None


class _Factors(NamedTuple):
    """The factors that a call gets at one place, or on the readouts of one parameter."""

    factors: frozenset[float]
    where: str


@dataclasses.dataclass(frozen=True)
class FirstCall:
    """The call that `mup_init` traced.

    Attributes:
        spec: the parameters.
        program: the target's program.
        plan: its corrections.
    """

    spec: MupSpec
    program: ClosedJaxpr
    plan: Plan

    def differences(self, program: ClosedJaxpr, plan: Plan) -> list[Finding]:
        """What another call shows or gets otherwise, and what it alone does that cannot be corrected.

        Args:
            program: the other call's program.
            plan: its corrections.
        """
        if any(not isinstance(size, int) for var in program.jaxpr.invars for size in shape_of(var)):
            # Means over a batch of unknown size have no known scale; their factors cancel.
            return []
        return [
            *self._of_roles(plan),
            *self._of_readouts(plan),
            *self._of_constants(program, plan),
            *(_elsewhere(finding) for finding in plan.findings if finding not in self._findings),
        ]

    @functools.cached_property
    def _findings(self) -> frozenset[Finding]:
        return frozenset(self.plan.findings)

    # ---- roles -------------------------------------------------------------------------------------

    def _of_roles(self, plan: Plan) -> Iterable[Finding]:
        for path, uses in plan.analysis.uses.items():
            param = self.spec[path]
            if not param.infinite:
                continue
            first = self._seen(path, self.plan.analysis.uses.get(path, ()))
            expected = first or [_Seen(param.role, _needs(param, self.spec), None)]
            for now in self._seen(path, uses):
                if all(not _alike(now.needs, known.needs) for known in expected):
                    known = expected[0]
                    before = (
                        f"{known.role} at {known.where} in the call that mup_init traced"
                        if known.where
                        else f"{known.role} by default, as the call that mup_init traced does not use it"
                    )
                    yield Finding(
                        "calls differ",
                        f"{path} is read as {now.role} in this call and as {before}; initial values and "
                        "learning rate follow the latter, so this call is not in µP; use it in the same "
                        "way in both, or pass mup_init this call's inputs and keyword arguments",
                        now.where or "unknown place",
                    )
                    break

    def _seen(self, path: str, uses: Sequence[Use]) -> list[_Seen]:
        param, out = self.spec[path], []
        for use in informative_uses(uses):
            # A parameter that is itself an output shows nothing.
            if not use.site or not use.axes:
                continue
            shown = axes_of_use(use, param.shape, param.base_with_layers, param.infinite)
            if reads_out(param, use):
                # A tied embedding: its readouts are compared by their factors.
                shown = param
            out.append(_Seen(shown.role, _needs(shown, self.spec), use.where))
        return out

    # ---- factors -----------------------------------------------------------------------------------

    def _of_readouts(self, plan: Plan) -> Iterable[Finding]:
        first = self._readouts
        for path, now in _readouts(self.spec, plan).items():
            if path in first and not now.factors & first[path].factors:
                yield _other_factors(f"the product of {path}", now, first[path])

    @functools.cached_property
    def _readouts(self) -> Mapping[str, _Factors]:
        return _readouts(self.spec, self.plan)

    def _of_constants(self, program: ClosedJaxpr, plan: Plan) -> Iterable[Finding]:
        before, now = self._constants, _constants(program, plan)
        for key in dict.fromkeys((*before, *now)):
            where, primitive = key
            mine, theirs = now.get(key), before.get(key)
            if mine is None and _has(program, where, primitive):
                mine = frozenset({1.0})
            if theirs is None and _has(self.program, where, primitive):
                theirs = frozenset({1.0})
            if mine and theirs and not mine & theirs:
                yield _other_factors(
                    f"the result of {primitive}", _Factors(mine, where), _Factors(theirs, where)
                )

    @functools.cached_property
    def _constants(self) -> Mapping[tuple[str, str], frozenset[float]]:
        return _constants(self.program, self.plan)


def _elsewhere(finding: Finding) -> Finding:
    message = f"in a call that mup_init did not trace, {finding.message}"
    return dataclasses.replace(finding, message=message)


def _needs(param: ParamSpec, spec: MupSpec) -> tuple[float, ...]:
    table = spec.parametrization
    return (
        rules.init_scale(param, table, 1.0),
        rules.prescribed_scale(param, table),
        rules.lr_factor(param, table, "adam"),
    )


def _alike(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(math.isclose(a, b, rel_tol=10**-_DIGITS) for a, b in zip(one, other, strict=True))


def _readouts(spec: MupSpec, plan: Plan) -> dict[str, _Factors]:
    """The factors on the products of readouts, by parameter; 1 where a product gets none."""
    out: dict[str, _Factors] = {}
    for path, uses in plan.analysis.uses.items():
        products = [use for use in uses if use.kind == "contraction" and reads_out(spec[path], use)]
        if products:
            factors = frozenset(
                round(
                    math.prod(one.factor for one in plan.corrections.get(use.site, ()) if one.path == path),
                    _DIGITS,
                )
                for use in products
            )
            out[path] = _Factors(factors, products[0].where)
    return out


def _constants(program: ClosedJaxpr, plan: Plan) -> dict[tuple[str, str], frozenset[float]]:
    """The factors that are not on a parameter's product, by line and primitive."""
    out: dict[tuple[str, str], frozenset[float]] = {}
    for site, corrections in plan.corrections.items():
        for one in corrections:
            if one.path is None:
                key = (one.where, equation_at(program, site).primitive.name)
                out[key] = out.get(key, frozenset()) | {round(one.factor, _DIGITS)}
    return out


def _has(program: ClosedJaxpr, where: str, primitive: str) -> bool:
    return any(eqn.primitive.name == primitive and source_line(eqn) == where for _, eqn in equations(program))


def _other_factors(what: str, now: _Factors, before: _Factors) -> Finding:
    def text(factors: frozenset[float]) -> str:
        return " and ".join(f"{factor:.4g}" for factor in sorted(factors))

    return Finding(
        "calls differ",
        f"{what} gets the factor {text(now.factors)} in this call and {text(before.factors)} at "
        f"{before.where} in the call that mup_init traced, so the two differ with width; compute it in the "
        "same way in both, or make a MupModel for each of them",
        now.where,
    )
