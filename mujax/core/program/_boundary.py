"""Moves a factor from inside of an equation to its operands and outputs, where that is the same function.

A function with its own derivative (`jax.custom_vjp`) and a kernel keep their meaning only if nothing inside
of them changes. A factor on a value inside can often be had outside: attention logits are linear in the
query, and what a function returns may be linear in the product of a readout.

This is the inference of units of measure. Let `c` be the factor and let each value of the changed program be
a power of `c` times that of the unchanged program, run on operands which are themselves multiplied with
powers of `c`. Sums and choices need one power in all terms, a product adds powers, anything that is not
linear needs the power 0, and the carry of a loop and the memory of a kernel have one power each. All of these
are linear equations in the powers. A solution is a proof; where none exists, nothing is moved.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core as jex

from mujax.core.program._jax import (
    Atom,
    ClosedJaxpr,
    CustomJvp,
    CustomRule,
    JaxprEqn,
    control,
    dtype_of,
    is_float,
    memory_written,
    shape_of,
)
from mujax.core.program._primitives import IDENTITIES, LAYOUT, MEMORY_READS, MEMORY_WRITES, PRODUCTS
from mujax.core.program._sites import EqnPath, Subprogram, enclosing_equations, equation_at, subprograms

_FEW: Final = 16
"""Pairs of operands are tried of up to as many."""

_TOLERANCE: Final = 1e-6


@dataclasses.dataclass(frozen=True)
class Boundary:
    """Where a factor outside of an equation does the same as one inside.

    Attributes:
        site: the equation.
        operands: operands to multiply with a power of the factor: (number, exponent).
        outputs: outputs, likewise.
    """

    site: EqnPath
    operands: tuple[tuple[int, float], ...]
    outputs: tuple[tuple[int, float], ...]

    @property
    def exponents(self) -> tuple[float, ...]:
        """All exponents."""
        return tuple(exponent for _, exponent in (*self.operands, *self.outputs))


def closed_around(program: ClosedJaxpr, site: EqnPath) -> EqnPath | None:
    """The outermost equation around a place whose inside must stay as it is; None where there is none."""
    for depth, eqn in enumerate(enclosing_equations(program, site)):
        if isinstance(control(eqn), CustomRule | CustomJvp):
            return site[: 2 * depth + 1]
    return None


def boundary(
    program: ClosedJaxpr, site: EqnPath, places: Collection[tuple[EqnPath, int | None]]
) -> Boundary | None:
    """Moves one factor, that belongs to several places inside of an equation, to its boundary.

    Outputs are tried first: a function may return gradients to other operands than those that it reads.

    Args:
        program: the program.
        site: the equation.
        places: the places inside of it that are multiplied: the first output of an equation, or the operand
            of that number.

    Returns:
        A boundary that is exact; None where none was found.
    """
    eqn = equation_at(program, site)
    start = len(site)
    powers = _Powers({place[start:]: operand for place, operand in places})
    operands = [powers.unknown() for _ in eqn.invars]
    outs = powers.call(eqn, [_scaled(form, -1) for form in operands], ())
    if outs is None:
        return None
    for out, atom in zip(outs, eqn.outvars, strict=True):
        if not _may_be_scaled(atom):
            powers.equal(out)
    free = [number for number, atom in enumerate(eqn.invars) if _may_be_scaled(atom)]
    # A scale that is passed in costs nothing; otherwise the first operand, which is the query.
    free.sort(key=lambda number: (len(shape_of(eqn.invars[number])) > 0, number))
    most = 0 if not _all_read(eqn) else 1 if len(free) > _FEW else 2
    for count in range(min(most, len(free)) + 1):
        for chosen in itertools.combinations(free, count):
            solution = powers.solve(
                {key for number, form in enumerate(operands) if number not in chosen for key in form}
            )
            if solution is None:
                continue
            found = Boundary(
                site,
                _nonzero((number, _value(operands[number], solution)) for number in chosen),
                _nonzero((number, _value(out, solution)) for number, out in enumerate(outs)),
            )
            # A factor that is a multiplier may be zero.
            if all(exponent > 0 for exponent in found.exponents):
                return found
    return None


def _nonzero(exponents: Iterable[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    return tuple((number, round(value, 6)) for number, value in exponents if abs(value) > _TOLERANCE)


def _may_be_scaled(atom: Atom) -> bool:
    """Whether a factor on a value is not lost to its dtype."""
    return is_float(atom) and jnp.dtype(dtype_of(atom)).itemsize > 1


def _all_read(eqn: JaxprEqn) -> bool:
    """Whether all that a function could return a gradient to is what it computes from.

    A product of quantised operands returns its gradients to the operands as they were before.
    """
    for inner in subprograms(eqn):
        jaxpr = inner.program.jaxpr
        read = {id(atom) for one in jaxpr.eqns for atom in one.invars} | {id(atom) for atom in jaxpr.outvars}
        if any(
            is_float(var) and 0 not in shape_of(var) and id(var) not in read
            for var in jaxpr.invars[: len(inner.operands)]
        ):
            return False
    return True


# ---- powers as linear forms --------------------------------------------------------------------------

_Form: TypeAlias = Mapping[int, float]
"""A power: coefficients of unknowns, by number; that of `_ONE` is a constant."""

_ONE: Final = -1
_NONE: Final[_Form] = {}


def _combined(terms: Iterable[tuple[_Form, float]]) -> _Form:
    out: dict[int, float] = {}
    for form, factor in terms:
        for key, value in form.items():
            out[key] = out.get(key, 0.0) + factor * value
    return {key: value for key, value in out.items() if value}


def _scaled(form: _Form, factor: float) -> _Form:
    return _combined([(form, factor)])


def _value(form: _Form, solution: Mapping[int, float]) -> float:
    return sum(value * solution.get(key, 0.0) for key, value in form.items())


class _Powers:
    """Collects the linear equations of a program.

    Args:
        places: what is multiplied, by place: an operand of that number, or the first output.
    """

    def __init__(self, places: Mapping[EqnPath, int | None]) -> None:
        self._places = places
        self._count = 0
        self._vanish: dict[frozenset[tuple[int, float]], _Form] = {}

    def unknown(self) -> _Form:
        self._count += 1
        return {self._count: 1.0}

    def equal(self, *forms: _Form) -> None:
        """Requires one power of several values; of one value alone, the power 0."""
        first, *rest = forms if len(forms) > 1 else (_NONE, *forms)
        for form in rest:
            difference = _combined([(first, 1), (form, -1)])
            if difference:
                self._vanish[frozenset(difference.items())] = difference

    def solve(self, fixed: Collection[int]) -> dict[int, float] | None:
        """Values of the unknowns with those in `fixed` zero; None if there are none."""
        keys = sorted({key for form in self._vanish.values() for key in form} - {_ONE, *fixed})
        column = {key: number for number, key in enumerate(keys)}
        rows = np.zeros((len(self._vanish), len(keys)))
        right = np.zeros(len(self._vanish))
        for number, form in enumerate(self._vanish.values()):
            for key, value in form.items():
                if key == _ONE:
                    right[number] -= value
                elif key in column:
                    rows[number, column[key]] = value
        values = np.linalg.lstsq(rows, right, rcond=None)[0] if keys else np.zeros(0)
        if np.abs(rows @ values - right).max(initial=0.0) > _TOLERANCE:
            return None
        return {**dict(zip(keys, map(float, values), strict=True)), _ONE: 1.0}

    # ---- the walk ----------------------------------------------------------------------------------

    def _program(self, program: ClosedJaxpr, ins: Sequence[_Form], site: EqnPath) -> list[_Form]:
        jaxpr = program.jaxpr
        env: dict[Any, _Form] = {
            var: self._constant(const) for var, const in zip(jaxpr.constvars, program.consts, strict=True)
        }
        env.update(zip(jaxpr.invars, ins, strict=True))

        def read(atom: Atom) -> _Form:
            return self._constant(atom.val) if isinstance(atom, jex.Literal) else env[atom]

        for index, eqn in enumerate(jaxpr.eqns):
            place = (*site, index)
            operands = [read(atom) for atom in eqn.invars]
            marked = place in self._places
            number = self._places.get(place)
            if number is not None:
                operands[number] = _combined([(operands[number], 1), ({_ONE: 1.0}, 1)])
            outs = self.call(eqn, operands, place)
            outs = self._ordinary(eqn, operands) if outs is None else outs
            if marked and number is None:
                outs[0] = _combined([(outs[0], 1), ({_ONE: 1.0}, 1)])
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _constant(self, value: Any) -> _Form:
        """A zero has any power."""
        if not jnp.issubdtype(jnp.result_type(value), jnp.number):
            return _NONE
        known = not isinstance(value, Tracer) and np.size(value) <= 1 << 16
        return self.unknown() if known and not np.any(np.asarray(value)) else _NONE

    def call(self, eqn: JaxprEqn, ins: Sequence[_Form], site: EqnPath) -> list[_Form] | None:
        """An equation that holds programs; None for any other."""
        inner = subprograms(eqn)
        match [one.kind for one in inner]:
            case []:
                return None
            case ["call"]:
                return self._inside(inner[0], ins, site)
            case ["kernel"]:
                memory = [self.unknown() for _ in inner[0].program.jaxpr.invars[len(ins) :]]
                self._program(inner[0].program, [*ins, *memory], (*site, inner[0].step))
                return memory[: len(eqn.outvars)]
            case ["branch", *_]:
                self.equal(ins[0])
                branches = [self._inside(one, ins, site) for one in inner]
                for outs in zip(*branches, strict=True):
                    if len(outs) > 1:
                        self.equal(*outs)
                return branches[0]
            case _:
                return self._loop(inner, ins, site)

    def _inside(self, inner: Subprogram, ins: Sequence[_Form], site: EqnPath) -> list[_Form]:
        return self._program(inner.program, [ins[operand] for operand in inner.operands], (*site, inner.step))

    def _loop(self, inner: Sequence[Subprogram], ins: Sequence[_Form], site: EqnPath) -> list[_Form]:
        """The power of a carry is that of its start and of each iteration's end."""
        *conditions, body = inner
        for condition in conditions:
            self.equal(*self._inside(condition, ins, site))
        outs = self._inside(body, ins, site)
        for number, out in body.carried:
            self.equal(ins[body.operands[number]], outs[out])
        return outs

    def _ordinary(self, eqn: JaxprEqn, ins: Sequence[_Form]) -> list[_Form]:
        name = eqn.primitive.name
        if name == "convert_element_type" and not _may_be_scaled(eqn.outvars[0]):
            # To numbers of one byte, it cuts off what is too large.
            self.equal(ins[0])
            return [_NONE]
        if name in MEMORY_READS:
            for form, atom in zip(ins[1:], eqn.invars[1:], strict=True):
                # Instead of what is masked.
                self.equal(*([ins[0], form] if is_float(atom) else [form]))
            return [ins[0]]
        if name in MEMORY_WRITES and (written := memory_written(eqn)) is not None:
            self.equal(ins[0], ins[written])
            return [ins[0]] * len(eqn.outvars)
        if name in IDENTITIES | _EACH and len(ins) == len(eqn.outvars):
            return list(ins)
        if name in LAYOUT | _LINEAR:
            first, *rest = ins
            for form in rest:
                self.equal(form)
            return [first] * len(eqn.outvars)
        if name in _SUMS:
            terms = [
                form
                for number, form in enumerate(ins)
                if number in _SUMS[name] and is_float(eqn.invars[number])
            ]
            if len(terms) > 1:
                self.equal(*terms)
            for number, form in enumerate(ins):
                if number not in _SUMS[name]:
                    self.equal(form)
            return [terms[0] if terms else _NONE]
        if name in PRODUCTS | {"mul"}:
            return [_combined([(ins[0], 1), (ins[1], 1)])]
        if name == "div":
            return [_combined([(ins[0], 1), (ins[1], -1)])]
        if name in ("square", "integer_pow"):
            return [_scaled(ins[0], eqn.params.get("y", 2))]
        for form in ins:
            self.equal(form)
        return [_NONE] * len(eqn.outvars)


_EACH: Final = frozenset(
    [
        *["psum", "psum_invariant", "ppermute", "pbroadcast", "all_gather", "all_gather_invariant"],
        *["all_to_all", "reduce_scatter", "neg", "stop_gradient"],
    ]
)
"""Linear in each operand, with an output for each."""

_LINEAR: Final = frozenset(
    [
        *["reduce_sum", "cumsum", "reduce_window_sum", "tile", "real", "imag", "conj", "fft"],
        *["reduce_precision", "copy", "unstack"],
    ]
)
"""Linear in the first operand; the others are indices."""

_ALL: Final = range(1 << 16)

_SUMS: Final[Mapping[str, Collection[int]]] = {
    **dict.fromkeys(["add", "add_any", "sub", "concatenate", "stack", "pad", "complex"], _ALL),
    "select_n": range(1, 1 << 16),
    "dynamic_update_slice": (0, 1),
    **dict.fromkeys(["scatter", "scatter_add", "scatter-add", "scatter_sub", "scatter-sub"], (0, 2)),
}
"""Linear in these operands together."""
