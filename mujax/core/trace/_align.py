"""Matches the equations of two programs that differ in sizes only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core as jex

from mujax.core.program import (
    IDENTITIES,
    RESHAPES,
    Atom,
    ClosedJaxpr,
    JaxprEqn,
    shape_of,
    source_line,
    subprograms,
)
from mujax.core.trace._values import (
    ONE,
    UNKNOWN,
    Axis,
    Factor,
    Scale,
    Shape,
    Value,
    View,
    broadcast_axis,
    constant,
    fit,
    ratio,
)
from mujax.errors import TraceMismatchError

# Closed-over arrays of up to this many entries are checked for being constant.
_SMALL = 1 << 16


def last_equation(program: ClosedJaxpr) -> JaxprEqn | None:
    """The last equation of a program; None if it has none."""
    return program.jaxpr.eqns[-1] if program.jaxpr.eqns else None


def closed_over(base: Any, target: Any, exact: bool) -> Value:
    """An array that the program closes over: folded if all its entries are equal."""
    shape = tuple(np.shape(target))
    base_shape = fit(tuple(np.shape(base)), shape)
    numbers = _number(base), _number(target)
    if numbers[0] is None or numbers[1] is None:
        # Values computed by NumPy for an initialiser: they may have any scale.
        unknown = exact and not _identical(base, target)
        return Value(shape, base_shape, "const", scale=UNKNOWN if unknown else ONE)
    return constant(numbers[0], numbers[1], shape, base_shape)


def _identical(base: Any, target: Any) -> bool:
    if isinstance(base, Tracer) or isinstance(target, Tracer):
        return base is target
    if np.shape(base) != np.shape(target) or jnp.issubdtype(base.dtype, jax.dtypes.prng_key):
        return np.shape(base) == np.shape(target)
    return np.array_equal(np.asarray(base), np.asarray(target))


def _number(array: Any) -> float | None:
    """The common value of all entries of an array, if it is small and known."""
    if isinstance(array, Tracer) or not 0 < np.size(array) <= _SMALL:
        return None
    if not (jnp.issubdtype(array.dtype, jnp.number) or jnp.issubdtype(array.dtype, jnp.bool_)):
        return None
    entries = np.asarray(array)
    first = entries.flat[0]
    return float(first) if (entries == first).all() and np.isrealobj(entries) else None


def literal_value(base: jex.Literal, target: jex.Literal) -> Value:
    if np.iscomplexobj(base.val) or np.iscomplexobj(target.val):
        return Value((), (), "const", scale=Scale(ratio(abs(base.val), abs(target.val))))
    try:
        return constant(float(base.val), float(target.val))
    except (TypeError, ValueError):
        return Value((), (), "const")


def read_one(atom: Atom, env: dict[Any, Value]) -> Value:
    return literal_value(atom, atom) if isinstance(atom, jex.Literal) else env[atom]


def read_pair(b: Atom, t: Atom, small: dict[Any, Value], big: dict[Any, Value]) -> Value:
    if isinstance(b, jex.Literal) and isinstance(t, jex.Literal):
        return literal_value(b, t)
    one, other = read_one(b, small), read_one(t, big)
    if one is other:
        return other
    if one.const is not None and other.const is not None:
        return constant(one.const[0], other.const[1], other.shape, other.base)
    return other


def match_operands(
    b: JaxprEqn, t: JaxprEqn, small: dict[Any, Value], big: dict[Any, Value]
) -> list[Value] | None:
    """The operands of two equations if these correspond, else None."""
    if b.primitive.name != t.primitive.name or len(b.invars) != len(t.invars):
        return None
    if len(b.outvars) != len(t.outvars):
        return None
    ins: list[Value] = []
    for x, y in zip(b.invars, t.invars, strict=True):
        one, other = read_one(x, small), read_one(y, big)
        known = one.const is not None and other.const is not None
        if not (known or one.root == other.root or (one.kind == other.kind == "const")):
            return None
        ins.append(read_pair(x, y, small, big))
    if _wiring(b) != _wiring(t):
        return None
    if _same_rank(b, t) and any(b.params.get(k) != t.params.get(k) for k in _STRUCTURE):
        return None
    return ins


_STRUCTURE = ("dimension_numbers", "permutation", "axes", "dimension")
"""Parameters of equations that hold axes, not sizes."""


def _wiring(eqn: JaxprEqn) -> list[tuple[Any, ...]]:
    """How the inputs and outputs of an equation map to those of its programs."""
    return [(one.kind, one.operands, one.results, one.carried, one.sliced) for one in subprograms(eqn)]


def _same_rank(b: JaxprEqn, t: JaxprEqn) -> bool:
    return all(len(shape_of(x)) == len(shape_of(y)) for x, y in zip(b.invars, t.invars, strict=True))


def is_trivial(eqn: JaxprEqn) -> bool:
    """Whether an equation only adds or removes axes of size 1."""
    if eqn.primitive.name not in RESHAPES | IDENTITIES or len(eqn.invars) != 1:
        return False
    before, after = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    if eqn.primitive.name == "transpose":
        moved = [axis for axis in eqn.params["permutation"] if before[axis] != 1]
        return moved == sorted(moved)
    return [size for size in before if size != 1] == [size for size in after if size != 1]


def _laid_out(value: Value, shape: Shape, base: Shape, move: Callable[[View], View]) -> Value:
    """The value with its views moved to other axes, under the same identity."""
    return dataclasses.replace(
        value,
        shape=shape,
        base=base,
        views=tuple(move(view) for view in value.views),
        pending=tuple(dataclasses.replace(p, view=move(p.view)) for p in value.pending),
    )


def reshaped_value(value: Value, shape: Shape) -> Value:
    """The value after a trivial reshape that the base's program does not have."""
    base = fit(value.base, shape)
    rest = [axis for axis, size in enumerate(value.shape) if size != 1]
    order = iter(rest)
    keep = [next(order, None) if size != 1 else None for size in shape]

    def move(view: View) -> View:
        axes = tuple(() if axis is None else view.axes[axis] for axis in keep)
        return dataclasses.replace(view, axes=axes)

    return _laid_out(value, shape, base, move)


def resized(value: Value, shape: Shape, base: Shape) -> Value:
    """The value as a program sees that holds a shard of it: same axes, other sizes."""
    if (value.shape, value.base) == (shape, base) or len(value.shape) != len(shape):
        return value

    def shrink(axis: Axis, size: int, small: int) -> Axis:
        return (Factor(axis[0].axis, size, small),) if len(axis) == 1 else ()

    def move(view: View) -> View:
        axes = tuple(
            axis if (size, small) == old else shrink(axis, size, small)
            for axis, size, small, old in zip(
                view.axes, shape, base, zip(value.shape, value.base, strict=True), strict=True
            )
        )
        return dataclasses.replace(view, axes=axes)

    return _laid_out(value, shape, base, move)


def strip_leading(value: Value) -> Value:
    """One slice of a value that a scan runs over: its leading axis is a stack of copies."""

    def strip(view: View) -> View:
        stack = {factor.axis for factor in view.axes[0] if factor.axis is not None}
        return dataclasses.replace(view, axes=view.axes[1:], stack=view.stack | stack, part=True)

    return _laid_out(value, value.shape[1:], value.base[1:], strip).replace()


def add_leading(value: Value, shape: Shape, base: Shape) -> Value:
    """The stacked output of a scan: a leading axis of copies is added."""
    lead = broadcast_axis(shape[0], base[0])

    def stack(view: View) -> View:
        return dataclasses.replace(view, axes=(lead, *view.axes))

    return _laid_out(value, shape, base, stack).replace()


def mismatch_error(b: JaxprEqn | None, t: JaxprEqn | None) -> TraceMismatchError:
    def name(eqn: JaxprEqn | None) -> str:
        if eqn is None:
            return "the end of the program"
        shapes = ", ".join(str(shape_of(v)) for v in eqn.invars)
        return f"{eqn.primitive.name} on {shapes} at {source_line(eqn)}"

    return TraceMismatchError(
        expected="programs of base and target that differ in sizes only",
        got=f"{name(b)} in the base and {name(t)} in the target",
        remedy="use a larger base (no axis of size 1, no other branch on a size), so that the model's code "
        "takes the same path at both widths",
    )
