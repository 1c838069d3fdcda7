"""The rule of each primitive, and those of primitives that only look up, write or summarise."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Final

from mujax.core.program import IDENTITIES, MEMORY_READS, MEMORY_WRITES, source_line
from mujax.core.trace._interpreter import Interpreter, Rule
from mujax.core.trace._uses import Pair
from mujax.core.trace._values import (
    UNKNOWN,
    Axis,
    Pending,
    Scale,
    Value,
    broadcast_axis,
    ratio,
    widest,
)
from mujax.core.trace.primitives._elementwise import ELEMENTWISE, ScaleRule, common_scale, order_one
from mujax.core.trace.primitives._kernels import kernel_rule, read_memory, write_memory
from mujax.core.trace.primitives._layout import (
    broadcast_in_dim_rule,
    collective_rule,
    concatenate_rule,
    identity_rule,
    iota_rule,
    pad_rule,
    reshape_rule,
    slice_rule,
    squeeze_rule,
    stack_rule,
    tile_rule,
    transpose_rule,
    unstack_rule,
)
from mujax.core.trace.primitives._moves import move_views
from mujax.core.trace.primitives._products import (
    convolution_rule,
    dot_general_rule,
    ragged_dot_general_rule,
    reduce_rule,
    reduce_sum_rule,
)
from mujax.errors import ShapeMismatchError


def _gather(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    """Rows looked up by index. The result is data: which row is chosen depends on it."""
    operand, indices = ins
    interp.becomes_data(pair, indices)
    interp.decide(operand)
    dims = pair.params["dimension_numbers"]
    sizes, small = pair.params["slice_sizes"], pair.base.params["slice_sizes"]
    ((shape, base),) = pair.shapes()
    kind = widest(value.kind for value in ins)
    brought = operand.scale if kind == "const" else interp.scale_against_prescribed(operand)
    data = Value(shape, base, kind, scale=interp.scale_at(pair, brought, brought), products=operand.products)
    if operand.kind != "param":
        return [data]
    batching = (*dims.operand_batching_dims,)
    window = [
        axis for axis in range(operand.ndim) if axis not in dims.collapsed_slice_dims and axis not in batching
    ]
    place = dict(zip(window, dims.offset_dims, strict=True))
    pending = []
    for view in operand.views:
        axes: list[Axis] = [broadcast_axis(s, b) for s, b in zip(shape, base, strict=True)]
        picked, stack = view.picked, view.stack
        for axis, factors in enumerate(view.axes):
            mine = frozenset(factor.axis for factor in factors if factor.axis is not None)
            full = (sizes[axis], small[axis]) == (operand.shape[axis], operand.base[axis])
            if axis in batching:
                stack |= mine
            elif full and axis in place:
                axes[place[axis]] = factors
            else:
                if any(f.size != f.base for f in factors if f.axis is not None):
                    raise ShapeMismatchError(
                        where=view.path,
                        expected=f"{operand.base[axis]} entries along axis {axis} as in the base, since it "
                        f"is looked up by index at {source_line(pair.place)}: a vocabulary and not a width",
                        got=operand.shape[axis],
                        remedy="give base and target the same size there",
                    )
                picked |= mine
        looked_up = dataclasses.replace(view, axes=tuple(axes), picked=picked, stack=stack)
        use = interp.use(pair, looked_up, "lookup", decided=False)
        pending.append(Pending(use, looked_up))
    return [dataclasses.replace(data, kind="data", pending=tuple(pending))]


def _data(scale: ScaleRule, interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    """A primitive that rearranges or summarises data: a parameter in it is opaque."""
    for value in ins:
        interp.opaque(pair, value)
    kind = "const" if all(value.kind == "const" for value in ins) else "data"
    found = scale(
        interp,
        pair,
        ins,
        [value.scale if kind == "const" else interp.scale_against_prescribed(value) for value in ins],
    )
    return [Value(shape, base, kind, scale=found) for shape, base in pair.shapes()]


def _cumulative(interp: Interpreter, pair: Pair, ins: Sequence[Value], scales: Sequence[Scale]) -> Scale:
    """A running sum: along an axis that grows most of its entries scale as the whole sum does."""
    axis = pair.params.get("axis")
    if axis is not None and ins[0].shape[axis] == ins[0].base[axis]:
        return interp.scale_at(pair, scales[0], scales[0])
    if pair.name != "cumsum" or axis is None or interp.exact:
        return UNKNOWN
    return interp.scale_at(pair, scales[0].over(ratio(ins[0].base[axis], ins[0].shape[axis])), scales[0])


def _fft(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    """A sum over the transformed axes with weights of order one: like any, it must not be over width."""
    ((shape, base),) = pair.shapes()
    value, first = ins[0], len(shape) - len(pair.params["fft_lengths"])
    if value.shape[first:] != value.base[first:]:
        return interp.unknown(pair, ins)

    def move(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
        return (*axes[:first], *map(broadcast_axis, shape[first:], base[first:]))

    return [move_views(interp, pair, value, shape, base, move)]


def _write(values: Callable[[Sequence[Value]], Sequence[Value]]) -> Rule:
    """Values written into an array by index: a cache, a one-hot."""

    def rule(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
        for value in ins:
            interp.becomes_data(pair, value)
        ((shape, base),) = pair.shapes()
        kind = "const" if all(value.kind == "const" for value in ins) else "data"
        written = values(ins)
        return [
            Value(
                shape,
                base,
                kind,
                scale=common_scale(
                    interp, pair, written, [interp.scale_against_prescribed(v) for v in written]
                ),
            )
        ]

    return rule


def _qr(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    """The columns of Q have unit norm: its entries are of the scale of 1/sqrt(rows)."""
    interp.opaque(pair, ins[0])
    rows = Scale(ratio(ins[0].base[-2], ins[0].shape[-2])).power(-0.5)
    scales = [interp.scale_at(pair, rows), UNKNOWN, UNKNOWN, UNKNOWN]
    return [
        Value(shape, base, "data", scale=scale)
        for (shape, base), scale in zip(pair.shapes(), scales[: len(pair.shapes())], strict=True)
    ]


def _random(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    """Random bits, keys: of the same distribution at every width."""
    for value in ins:
        interp.becomes_data(pair, value)
    return [Value(shape, base, "data") for shape, base in pair.shapes()]


PRIMITIVES: Final[dict[str, Rule]] = {
    **ELEMENTWISE,
    **dict.fromkeys(IDENTITIES, identity_rule),
    **dict.fromkeys(
        [
            *["psum", "psum_invariant", "pmax", "pmin", "ppermute", "pbroadcast", "all_to_all", "all_gather"],
            *["all_gather_invariant", "all_gather_reduced", "reduce_scatter", "pbroadcast_dynamic"],
            *["unreduced_psum", "unreduced_pmax", "unreduced_pmin", "unreduced_reduce_scatter"],
        ],
        collective_rule,
    ),
    **dict.fromkeys(["axis_index", "program_id", "num_programs"], _random),
    "pallas_call": kernel_rule,
    **dict.fromkeys(MEMORY_READS, read_memory),
    **dict.fromkeys(MEMORY_WRITES, write_memory),
    "transpose": transpose_rule,
    "reshape": reshape_rule,
    "broadcast_in_dim": broadcast_in_dim_rule,
    "squeeze": squeeze_rule,
    "expand_dims": broadcast_in_dim_rule,
    "rev": identity_rule,
    "slice": slice_rule,
    "dynamic_slice": slice_rule,
    "split": slice_rule,
    "pad": pad_rule,
    "concatenate": concatenate_rule,
    "stack": stack_rule,
    "unstack": unstack_rule,
    "tile": tile_rule,
    "iota": iota_rule,
    "reduce_sum": reduce_sum_rule,
    **dict.fromkeys(["reduce_max", "reduce_min"], reduce_rule),
    "dot_general": dot_general_rule,
    "ragged_dot_general": ragged_dot_general_rule,
    "conv_general_dilated": convolution_rule,
    "gather": _gather,
    **dict.fromkeys(
        [
            *["scatter", "scatter_add", "scatter_sub", "scatter_mul", "scatter_min", "scatter_max"],
            *["scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max"],
        ],
        _write(lambda ins: (ins[0], ins[-1])),
    ),
    "dynamic_update_slice": _write(lambda ins: ins[:2]),
    **dict.fromkeys(
        [
            *["sort", "cummax", "cummin", "reduce_window_max", "reduce_window_min", "top_k", "approx_top_k"],
            *["select_and_gather_add", "select_and_scatter_add"],
        ],
        functools.partial(_data, common_scale),
    ),
    **dict.fromkeys(
        [
            *["argmax", "argmin", "reduce_and", "reduce_or", "reduce_xor", "reduce_prod", "cumprod"],
            # With any function of the user's, and of any parameters.
            *["reduce", "reduce_window", "random_gamma"],
        ],
        functools.partial(_data, order_one),
    ),
    **dict.fromkeys(["cumsum", "reduce_window_sum", "cumlogsumexp"], functools.partial(_data, _cumulative)),
    "fft": _fft,
    "qr": _qr,
    **dict.fromkeys(
        [
            *["random_bits", "random_seed", "random_wrap", "random_unwrap", "random_fold_in", "random_split"],
            *["random_clone", "threefry2x32", "rng_bit_generator", "rng_uniform"],
        ],
        _random,
    ),
}
"""The rule of each primitive that is known."""
