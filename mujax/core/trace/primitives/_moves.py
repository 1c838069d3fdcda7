"""Views of parameters, moved along with the values that show them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from mujax.core.trace._interpreter import Interpreter
from mujax.core.trace._uses import Pair
from mujax.core.trace._values import (
    Axis,
    Pending,
    Shape,
    Value,
    View,
    broadcast_axis,
)

Move = Callable[[tuple[Axis, ...]], tuple[Axis, ...] | None]


def broadcast_view(view: View, value: Value, shape: Shape, base: Shape) -> View:
    """A view after numpy broadcasting of its value to a shape."""
    if not value.shape:
        return dataclasses.replace(
            view, axes=tuple(broadcast_axis(s, b) for s, b in zip(shape, base, strict=True))
        )
    axes = tuple(
        axis if old == size else broadcast_axis(size, small)
        for axis, old, size, small in zip(view.axes, value.shape, shape, base, strict=True)
    )
    return dataclasses.replace(view, axes=axes)


def broadcast_pending(value: Value, shape: Shape, base: Shape) -> tuple[Pending, ...]:
    return tuple(
        dataclasses.replace(p, view=broadcast_view(p.view, value, shape, base)) for p in value.pending
    )


def move_views(interp: Interpreter, pair: Pair, value: Value, shape: Shape, base: Shape, move: Move) -> Value:
    """The value with its axes rearranged; what can't be followed becomes opaque."""

    def apply(view: View) -> View | None:
        axes = move(view.axes)
        return None if axes is None else dataclasses.replace(view, axes=axes)

    views = []
    for view in value.views:
        moved = apply(view)
        if moved is None:
            interp.use(pair, view, "opaque")
        else:
            views.append(moved)
    pending = []
    for p in value.pending:
        moved = apply(p.view)
        if moved is None:
            interp.decide(Value((), (), "data", pending=(p,)))
        else:
            pending.append(dataclasses.replace(p, view=moved))
    return value.replace(shape=shape, base=base, views=tuple(views), pending=tuple(pending))
