"""Layout: axes rearranged, cut, joined and repeated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from mujax.core.trace._align import resized
from mujax.core.trace._interpreter import Interpreter
from mujax.core.trace._parity import sum_of
from mujax.core.trace._uses import Pair
from mujax.core.trace._values import (
    UNKNOWN,
    Axis,
    Factor,
    Scale,
    Shape,
    Value,
    View,
    broadcast_axis,
    ratio,
    regroup,
    widest,
)
from mujax.core.trace.primitives._elementwise import common_scale
from mujax.core.trace.primitives._moves import move_views


def identity_rule(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> Sequence[Value]:
    """One output per operand, unchanged."""
    return [value.replace() for value in ins]


def transpose_rule(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    ((shape, base),) = pair.shapes()
    order = pair.params["permutation"]
    return [move_views(interp, pair, ins[0], shape, base, lambda axes: tuple(axes[axis] for axis in order))]


def reshape_rule(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    ((shape, base),) = pair.shapes()
    order = pair.params["dimensions"]

    def move(axes: tuple[Axis, ...]) -> tuple[Axis, ...] | None:
        return regroup(axes if order is None else [axes[axis] for axis in order], shape, base)

    return [move_views(interp, pair, ins[0], shape, base, move)]


def broadcast_in_dim_rule(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    ((shape, base),) = pair.shapes()
    source_of = {out: axis for axis, out in enumerate(pair.params["broadcast_dimensions"])}
    old = ins[0].shape

    def move(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
        return tuple(
            axes[source_of[axis]]
            if axis in source_of and old[source_of[axis]] == shape[axis]
            else broadcast_axis(shape[axis], base[axis])
            for axis in range(len(shape))
        )

    return [move_views(interp, pair, ins[0], shape, base, move)]


def squeeze_rule(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    ((shape, base),) = pair.shapes()
    gone = pair.params["dimensions"]
    return [
        move_views(
            interp, pair, ins[0], shape, base,
            lambda axes: tuple(axis for position, axis in enumerate(axes) if position not in gone),
        )
    ]  # fmt: skip


def _cut(axis: Axis, old: tuple[int, int], new: tuple[int, int]) -> tuple[Axis, frozenset[int]] | None:
    """The factors of an axis after a slice, and those of which one entry is left; None: unknown."""
    if old == new:
        return axis, frozenset()
    if new == (1, 1):
        return (), frozenset(factor.axis for factor in axis if factor.axis is not None)
    if len(axis) <= 1:
        return tuple(Factor(factor.axis, *new) for factor in axis), frozenset()
    size, base = 1, 1
    for position in range(len(axis) - 1, -1, -1):
        size, base = size * axis[position].size, base * axis[position].base
        if (size, base) == new:
            picked = frozenset(factor.axis for factor in axis[:position] if factor.axis is not None)
            return axis[position:], picked
    # A part of the major factor, and all of the others.
    size, base = math.prod(f.size for f in axis[1:]), math.prod(f.base for f in axis[1:])
    if size and base and new[0] % size == 0 and new[1] % base == 0:
        return (Factor(axis[0].axis, new[0] // size, new[1] // base), *axis[1:]), frozenset()
    return None


def _sliced(interp: Interpreter, pair: Pair, value: Value, shape: Shape, base: Shape) -> Value:
    """A slice of each axis; an axis of which one entry is left was picked from by index."""

    def cut(view: View) -> View | None:
        axes: list[Axis] = []
        picked = view.picked
        for axis, *sizes in zip(
            view.axes,
            zip(value.shape, value.base, strict=True),
            zip(shape, base, strict=True),
            strict=True,
        ):
            left = _cut(axis, *sizes)
            if left is None:
                return None
            axes.append(left[0])
            picked |= left[1]
        part = view.part or (value.shape, value.base) != (shape, base)
        return dataclasses.replace(view, axes=tuple(axes), picked=picked, part=part)

    views = []
    for view in value.views:
        part = cut(view)
        if part is None:
            interp.use(pair, view, "opaque")
        else:
            views.append(part)
    interp.decide(value)
    const = value.const
    return value.replace(shape=shape, base=base, const=const, views=tuple(views), pending=())


def slice_rule(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    """`slice`, `dynamic_slice`, `split`: parts of the first operand; the others are indices."""
    for index in ins[1:]:
        interp.becomes_data(pair, index)
    return [_sliced(interp, pair, ins[0], shape, base) for shape, base in pair.shapes()]


def pad_rule(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    interp.becomes_data(pair, ins[1])
    ((shape, base),) = pair.shapes()
    out = _sliced(interp, pair, ins[0], shape, base)
    scale = common_scale(interp, pair, ins, [value.scale for value in ins])
    filler = ins[1].const
    sign = out.sign if filler and not any(filler) else out.sign + ins[1].sign
    return [out.replace(scale=scale, const=None, parity=sign)]


def _joined(
    interp: Interpreter, pair: Pair, ins: Sequence[Value], part: Callable[[View, Value], View]
) -> list[Value]:
    """Values side by side; `part` is the view of one of them over the whole of the result."""
    ((shape, base),) = pair.shapes()
    kind = widest(value.kind for value in ins)
    scale = common_scale(
        interp, pair, ins, [interp.scale_against_prescribed(v) if kind == "data" else v.scale for v in ins]
    )
    if kind == "data":
        for value in ins:
            interp.becomes_data(pair, value)
        return [Value(shape, base, "data", scale=scale)]
    views = tuple(dict.fromkeys(part(view, value) for value in ins for view in value.views))
    return [Value(shape, base, kind, views=views, scale=scale, parity=sum_of(v.sign for v in ins))]


def concatenate_rule(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    ((shape, base),) = pair.shapes()
    at = pair.params["dimension"]
    size, small = shape[at], base[at]
    shown = {view.path: view.axes[at][0].axis for v in ins for view in v.views if view.axes[at]}

    def part(view: View, value: Value) -> View:
        old, old_base = value.shape[at], value.base[at]
        axis = view.axes[at]
        if not axis and shown.get(view.path) in view.picked:
            # One entry beside others of the same axis, as `jnp.roll` puts them together again.
            own = shown[view.path]
            axis = (Factor(own, size, small),)
            view = dataclasses.replace(view, picked=view.picked - {own})
            return dataclasses.replace(view, axes=(*view.axes[:at], axis, *view.axes[at + 1 :]))
        if old and old_base and size % old == 0 and small % old_base == 0:
            axis = (*broadcast_axis(size // old, small // old_base), *axis)
        else:
            # Uneven parts: the axis as a whole is the part's, as far as growing is concerned.
            axis = tuple(Factor(factor.axis, size, small) for factor in axis[:1])
        return dataclasses.replace(view, axes=(*view.axes[:at], axis, *view.axes[at + 1 :]))

    return _joined(interp, pair, ins, part)


def stack_rule(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    """Values side by side along a new axis."""
    ((shape, base),) = pair.shapes()
    at = pair.params["axis"]
    new = broadcast_axis(shape[at], base[at])
    return _joined(
        interp, pair, ins,
        lambda view, _: dataclasses.replace(view, axes=(*view.axes[:at], new, *view.axes[at:])),
    )  # fmt: skip


def unstack_rule(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    """The entries along an axis, one output each."""
    at = pair.params["axis"]
    value = ins[0]
    outs = []
    for shape, base in pair.shapes():
        one = (*shape[:at], 1, *shape[at:])
        part = _sliced(interp, pair, value, one, (*base[:at], 1, *base[at:]))
        outs.append(move_views(interp, pair, part, shape, base, lambda axes: (*axes[:at], *axes[at + 1 :])))
    return outs


def tile_rule(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    """Copies laid side by side: an axis that is repeated no longer shows one parameter axis."""
    ((shape, base),) = pair.shapes()
    reps, small = pair.params["reps"], pair.base.params["reps"]

    def move(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
        return tuple(
            axis if (n, m) == (1, 1) else (*broadcast_axis(n, m), *axis)
            for axis, n, m in zip(axes, reps, small, strict=True)
        )

    return [move_views(interp, pair, ins[0], shape, base, move)]


def iota_rule(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    ((shape, base),) = pair.shapes()
    axis = pair.params["dimension"]
    grows = ratio(base[axis], shape[axis])
    # Entries 0, 1, 2, ... scale about as their number does: near enough for everything but an initialiser.
    return [Value(shape, base, "const", scale=UNKNOWN if interp.exact and grows != 1 else Scale(grows))]


def collective_rule(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> Sequence[Value]:
    """Communication between devices: the same axes, of a shard or of the whole."""
    shapes = pair.shapes()
    if len(ins) != len(shapes) or any(v.ndim != len(s) for v, (s, _) in zip(ins, shapes, strict=True)):
        return interp.unknown(pair, ins)
    return [resized(value.replace(), *shape) for value, shape in zip(ins, shapes, strict=True)]
