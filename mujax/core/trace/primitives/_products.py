"""Sums and products, and which operand of a product is the weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

from mujax.core.trace._interpreter import Interpreter
from mujax.core.trace._parity import Parity
from mujax.core.trace._uses import Pair
from mujax.core.trace._values import (
    UNKNOWN,
    Pending,
    Power,
    Scale,
    Shape,
    Value,
    View,
    broadcast_axis,
    constant,
    product,
    ratio,
)
from mujax.core.trace.primitives._moves import move_views
from mujax.core.trace.primitives._readouts import power_of_product, readout


def _reduced(interp: Interpreter, pair: Pair, value: Value, shape: Shape, base: Shape) -> Value:
    """The value without the axes that a reduction removes."""
    gone = pair.params["axes"]

    def statistic(view: View) -> View:
        lost = [f for axis in gone for f in view.axes[axis] if f.axis is not None and f.size > 1]
        grows = any(f.size != f.base for f in lost)
        return dataclasses.replace(
            view, reduced=view.reduced or grows, thinned=view.thinned or (bool(lost) and not grows)
        )

    value = dataclasses.replace(value, views=tuple(statistic(view) for view in value.views))
    return move_views(
        interp, pair, value, shape, base,
        lambda axes: tuple(axis for position, axis in enumerate(axes) if position not in gone),
    )  # fmt: skip


def reduce_rule(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    """`reduce_max` and the like: axes go away, entries keep their size."""
    interp.decide(ins[0])
    alone = dataclasses.replace(ins[0], pending=(), parity=ins[0].sign.any)
    return [_reduced(interp, pair, alone, shape, base) for shape, base in pair.shapes()]


def reduce_sum_rule(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    """A sum over axes; over the axes of a parameter that was multiplied in, it is a contraction."""
    value, gone = ins[0], pair.params["axes"]
    ((shape, base),) = pair.shapes()
    base_size, size = value.sizes(gone)
    if value.const is not None:
        if all(isinstance(value.shape[axis], int) for axis in gone):
            return [constant(value.const[0] * base_size, value.const[1] * size, shape, base)]
        value = dataclasses.replace(value, const=None)
    # A row that was looked up and is summed whole is an embedding that is pooled, and no kernel. Neither is
    # what was added to an activation.
    pooled = tuple(
        p for p in value.pending if p.entrywise or (p.view.picked and not _leaves_axes(p.view, gone))
    )
    interp.decide(dataclasses.replace(value, pending=pooled))
    value = dataclasses.replace(value, pending=tuple(p for p in value.pending if p not in pooled))
    mixed = tuple(_mixed(p, gone) for p in value.pending if _mixes(p.view, gone))
    value = dataclasses.replace(
        value, pending=tuple(p for p in value.pending if not _mixes(p.view, gone)) + mixed
    )
    kernels = (
        frozenset(p.view.path for p in value.pending) if interp.contract_later(pair, value, gone) else None
    )
    # A use that this sum contracts is settled by it; one that it leaves alone stays linear in the result.
    left = tuple(
        p for p in value.pending
        if not any(f.axis is not None for axis in gone for f in p.view.axes[axis])
    )  # fmt: skip
    out = _reduced(interp, pair, dataclasses.replace(value, pending=left), shape, base)
    if kernels is not None:
        out.linear_in = kernels
        if pair.site in interp.known_sums:
            # Over the parameter's own axes: of order one by its rule, as any product with it.
            scale = _into_layer(interp, pair, value, ratio(base_size, size))
            value = dataclasses.replace(value, scale=scale)
            base_size, size = value.sizes(axis for axis in gone if not _shows_parameter(value, axis))
    return [out.replace(scale=interp.scale_at(pair, value.scale.over(ratio(base_size, size)), value.scale))]


def _mixes(view: View, gone: Sequence[int]) -> bool:
    """Whether a sum over some axes leaves a hidden kernel: a mixture of experts' kernels."""
    summed = [f for axis in gone for f in view.axes[axis] if f.axis is not None]
    return bool(summed) and all(f.size == f.base for f in summed) and view.growing > 1


def _mixed(pending: Pending, gone: Sequence[int]) -> Pending:
    """The undecided use of the experts' kernels in their mixture; the experts are copies of one kernel."""
    view = pending.view
    experts = view.parameter_axes(gone)
    axes = tuple(() if position in gone else axis for position, axis in enumerate(view.axes))
    return dataclasses.replace(
        pending, view=dataclasses.replace(view, axes=axes, picked=view.picked | experts)
    )


def _shows_parameter(value: Value, axis: int) -> bool:
    return any(factor.axis is not None for p in value.pending for factor in p.view.axes[axis])


def _leaves_width(value: Value, gone: Sequence[int]) -> bool:
    """Whether a function of parameters keeps an axis that grows with width when `gone` is contracted."""
    return any(_leaves_growing_axis(view, gone) for view in value.views)


def _leaves_growing_axis(view: View, gone: Sequence[int]) -> bool:
    return any(
        factor.grows for position, axis in enumerate(view.axes) if position not in gone for factor in axis
    )


def _is_broadcast(value: Value) -> bool:
    """Whether a function of parameters was repeated along an axis that is not theirs."""
    return any(factor.axis is None for view in value.views for axis in view.axes for factor in axis)


def _leaves_axes(view: View, gone: Sequence[int]) -> bool:
    return any(
        factor.axis is not None and (factor.size, factor.base) != (1, 1)
        for position, axis in enumerate(view.axes)
        if position not in gone
        for factor in axis
    )


def _scale_of_product(
    interp: Interpreter, pair: Pair, left: Value, right: Value, contracted: tuple[int, int]
) -> Scale:
    """Scale of a contraction: coherent between activations, of order one with a parameter by its rule."""
    scales = [interp.scale_against_prescribed(left), interp.scale_against_prescribed(right)]
    grows = ratio(*contracted)
    kinds = {left.kind, right.kind}
    if not all(_is_kernel_of_mean_zero(value) for value in (left, right)) and grows != 1.0:
        # A coherent sum, or one that is reported.
        for value in (left, right):
            interp.require_order_one(pair.place, value)
        return UNKNOWN
    if kinds == {"param"}:
        # Of the prescribed scale if both are.
        return interp.scale_at(pair, product(scales))
    if "param" in kinds:
        if left.state or right.state:
            return UNKNOWN
        settled = [
            _into_layer(interp, pair, value, grows) if value.kind == "data" else scale
            for value, scale in zip((left, right), scales, strict=True)
        ]
        return interp.scale_at(pair, product(settled), *settled)
    if grows == 1.0:
        return interp.scale_at(pair, product(scales), *scales)
    if interp.exact:
        return UNKNOWN
    # A constant that is not one number (a mask, a rotation) is taken to keep scales.
    fixed = any(value.kind == "const" and value.const is None for value in (left, right))
    if fixed:
        return interp.scale_at(pair, product(scales), *scales)
    return interp.scale_at(pair, product(scales).over(grows))


def _into_layer(interp: Interpreter, pair: Pair, value: Value, grows: float | None) -> Scale:
    """The scale that activations bring into a layer whose fan-in grows so.

    They are corrected before the product where possible, so that each layer's own entries keep their scale.
    """
    scale = interp.require_order_one(pair.place, value, report=False)
    return dataclasses.replace(scale, behind=scale.behind or (grows != 1.0 and not scale.is_one))


def _is_kernel_of_mean_zero(value: Value) -> bool:
    # A gate that went through a function is no kernel.
    bent = any(view.bent and view.growing > 1 for view in value.views)
    return value.kind != "param" or (value.sign.is_centred and not bent)


@dataclasses.dataclass(frozen=True)
class _Side:
    """One operand of a product with its contracted and batch axes."""

    value: Value
    contract: Sequence[int]
    batch: Sequence[int]

    @property
    def gone(self) -> tuple[int, ...]:
        return (*self.contract, *self.batch)


def _multiply(
    interp: Interpreter, pair: Pair, left: _Side, right: _Side, place: Callable[[View, bool], View]
) -> list[Value]:
    """The product of two values over some axes, one of which may be a weight.

    Args:
        interp: the interpreter, for its record.
        pair: the equation.
        left: the first operand.
        right: the second operand.
        place: a view of an operand (and whether it is the first) as a view of the result.
    """
    ((shape, base),) = pair.shapes()
    contracted = left.value.sizes(left.contract)
    wide = contracted[0] != contracted[1]
    data = Value(
        shape, base, "data", scale=_scale_of_product(interp, pair, left.value, right.value, contracted)
    )

    def weight(side: _Side, other: _Side) -> Value:
        kind = "statistic" if other.value.state else "contraction"
        mixes = other.value.kind == "data" and not other.value.state
        pending: list[Pending] = []
        bent = _bent_kernels(side)
        gains = {view for view in side.value.views if _is_gain(view, side)}
        # A low-rank product that is added to a kernel gets its factor for itself.
        term = _leaves_width(side.value, side.gone) and any(
            _contracts_width(view, side.contract) and not (view.inner or view in gains)
            for view in side.value.views
        )
        for view in side.value.views:
            if view.path in bent or view in gains:
                interp.becomes_data(pair, dataclasses.replace(side.value, views=(view,)))
                continue
            mixture = mixes and _mixes(view, side.contract)
            use = interp.use(
                pair, view, kind,
                fan_in=side.contract, stack=side.batch, picked="stack", contracted=contracted,
                decided=not mixture, signs=_sign_along(side).without(view.path),
                site=view.made if term else None,
            )  # fmt: skip
            if mixture:
                # Whether these are the kernels of a layer shows when the mixture is contracted in its turn.
                experts = view.parameter_axes(side.contract)
                placed = place(view, side is left)
                pending.append(Pending(use, dataclasses.replace(placed, picked=view.picked | experts)))
            elif len(left.batch) == len(right.batch) and _may_have_copies(
                placed := place(view, side is left)
            ):
                pending.append(Pending(use, placed, entrywise=True, product=True))
        interp.decide(side.value)
        interp.copies(other.value, other.batch)
        if other.value.kind != "const" and kind == "contraction":
            _report_kernel(interp, pair, side)
        return dataclasses.replace(
            data,
            linear_in=_kernels(side.value, side.contract),
            pending=tuple(pending),
            power=None if other.value.state else _read_out(side.value, side.gone, side.contract, other.value),
        )

    def activation(side: _Side) -> None:
        interp.becomes_data(pair, side.value)

    kinds = (left.value.kind, right.value.kind)
    interp.record.activations[pair.site] = 1 if kinds[0] == "param" else 0
    if kinds == ("const", "const"):
        return [dataclasses.replace(data, kind="const")]
    if "param" not in kinds:
        kernels = {_settle(interp, pair, side) for side in (left, right)} - {None}
        if "computed" in kernels:
            return [dataclasses.replace(data, scale=UNKNOWN)]
        if kernels:
            # An expert's kernel that was looked up: of order one by its rule, as any kernel's product.
            scales = [
                interp.scale_against_prescribed(left.value),
                interp.scale_against_prescribed(right.value),
            ]
            return [dataclasses.replace(data, scale=interp.scale_at(pair, product(scales), *scales))]
        if "const" in kinds or not left.contract:
            return [data]
        interp.product(pair, contracted, left.value, right.value)
        power = power_of_product(interp, pair, left.value, right.value, wide=wide)
        return [dataclasses.replace(data, products=frozenset({pair.site}), power=power)]
    if kinds != ("param", "param"):
        side, other = (left, right) if kinds[0] == "param" else (right, left)
        activation(other)
        return [weight(side, other)]
    if not wide and left.value.raw != right.value.raw:
        side, other = (right, left) if left.value.raw else (left, right)
        if not any(view.growing for view in other.value.views):
            # An input with a gain or a bias of its own.
            activation(other)
            return [weight(side, other)]
    # Two functions of parameters. Over an infinite axis, the one that leaves finite axes only is a set of
    # learned vectors (latent queries, a class token) and plays the activation.
    if wide:
        broad = [_leaves_width(side.value, side.gone) for side in (left, right)]
        if broad != [True, True]:
            # Of two sets of vectors either may be called the input and the other the readout: Table 8
            # treats the two alike, and their product gets the readout's factor.
            matrix, vectors = (left, right) if broad[0] or _is_broadcast(right.value) else (right, left)
            activation(vectors)
            return [weight(matrix, vectors)]
    views = []
    for side, first in ((left, True), (right, False)):
        for view in side.value.views:
            inner = view.parameter_axes(side.contract)
            views.append(
                dataclasses.replace(place(view, first), inner=view.inner | inner, made=view.made or pair.site)
            )
    sign = left.value.sign * right.value.sign
    return [dataclasses.replace(data, kind="param", views=tuple(views), parity=sign)]


def _sign_along(side: _Side) -> Parity:
    """The parity of the terms of the sum.

    Signs that they all share, those of a scalar, of a gain per output or of the second factor of a low-rank
    kernel, leave a sum of theirs as large.
    """
    varying = {v.path for v in side.value.views if v.parameter_axes(side.contract)}
    sign = side.value.sign
    for shared in {v.path for v in side.value.views} - varying:
        sign = sign.without(shared)
    return sign


def _is_gain(view: View, side: _Side) -> bool:
    """Whether a vector scales the entries of a kernel along its fan-in, as `(g[:, None] * kernel)` does.

    What multiplies a kernel and has fewer axes that grow is a gain of it, whichever axes these are. The
    factors of a product of parameters are one kernel.
    """
    if view.inner:
        return False
    kernels = [[v] for v in side.value.views if not v.inner]
    inner = [v for v in side.value.views if v.inner]
    kernels += [[v for v in inner if v.made == made] for made in {v.made for v in inner}]
    return _sign_along(side).without(view.path).is_centred and any(
        sum(v.growing for v in factors) > view.growing
        and any(_contracts_width(v, side.contract) for v in factors)
        for factors in kernels
    )


def _may_have_copies(view: View) -> bool:
    """Whether the product of a kernel has an axis of the kernel that does not grow, beside another one."""
    own = [f for axis in view.axes for f in axis if f.axis is not None and f.size > 1]
    return len(own) > 1 and any(f.size == f.base for f in own)


def _bent_kernels(side: _Side) -> list[str]:
    """The parameters of which a growing axis is contracted after a function that bends."""
    return [
        view.path
        for view in side.value.views
        if view.bent and _contracts_width(view, side.contract) and not _is_gain(view, side)
    ]


def _report_kernel(interp: Interpreter, pair: Pair, side: _Side) -> None:
    """Reports a kernel of which a parametrization's initial values and learning rate are not right."""
    if not interp.scales_are_known:
        return
    if side.value.raw and side.value.scale.total is None:
        interp.find(
            "computed kernel",
            pair.site,
            pair.place,
            f"{side.value.views[0].path} is combined with values computed from data or state before it is a "
            "kernel here, so how the kernel scales is not known; check its size by hand at two widths",
        )
        return
    bent = _bent_kernels(side)
    if bent:
        interp.find(
            "kernel through a function",
            pair.site,
            pair.place,
            f"{bent[0]} goes through a function that is not linear near zero before it is a kernel here, so "
            "that no rule for its initial values and learning rate is known, and it keeps the base's; check "
            "the size of this product at two widths, and give the parameter a role with roles= and the "
            "product a factor in the model",
        )
        return
    own = [view.path for view in side.value.views if _contracts_width(view, side.contract)]
    if own and not _sign_along(side).is_centred:
        interp.find(
            "kernel with a mean",
            pair.site,
            pair.place,
            f"the kernel that is computed from {own[0]} has entries whose mean is not zero, so that this "
            "product grows in proportion to its fan-in; subtract the mean over the fan-in, or divide the "
            "product by its fan-in in the model",
        )
    elif (
        own
        and side.value.scale.total is None
        and not any(one.message.startswith(f"{own[0]} ") for one in interp.record.findings.values())
    ):
        interp.find(
            "computed kernel",
            pair.site,
            pair.place,
            f"{own[0]} is combined with values of which the scale is not known before it is a kernel here; "
            "check its size by hand at two widths",
        )


def _contracts_width(view: View, contract: Sequence[int]) -> bool:
    return not view.reduced and any(f.grows for axis in contract for f in view.axes[axis])


def _read_out(value: Value, gone: Sequence[int], contract: Sequence[int], other: Value) -> Power | None:
    """The product of a readout: it contracts an axis that grows and leaves none.

    Any other layer, on the `other` operand, is linear in such a product behind it.
    """
    sizes = value.sizes(contract)
    if sizes[0] == sizes[1]:
        return other.power
    # Of a kernel of low rank, one factor contracts the axis that grows and the other one leaves it.
    kernels = [view for view in value.views if _contracts_width(view, contract)]
    if not kernels or any(_leaves_growing_axis(view, gone) for view in kernels):
        return other.power
    return readout(kernels[0].path)


def _kernels(value: Value, contract: Sequence[int]) -> frozenset[str]:
    """The parameters in a function of parameters whose own axes are contracted."""
    return frozenset(
        view.path
        for view in value.views
        if any(factor.axis is not None for axis in contract for factor in view.axes[axis])
    )


def _settle(interp: Interpreter, pair: Pair, side: _Side) -> Literal["picked", "computed"] | None:
    """Settles the undecided uses in an operand: an expert's kernel was looked up, or an embedding was.

    Returns:
        Whether the operand is a kernel: one that was looked up, or one that was computed from data too.
    """
    kernel = None
    for pending in side.value.pending:
        alone = dataclasses.replace(side.value, pending=(pending,))
        if pending.product:
            continue
        if not pending.view.growing:
            interp.decide(alone)
        elif _is_kernel(pending, side) and interp.contract_later(pair, alone, side.contract):
            interp.is_kernel(pending.use)
            kernel = kernel or "picked"
            if (pending.entrywise or not pending.view.picked) and not interp.exact:
                kernel = "computed"
                interp.find(
                    "computed kernel",
                    pair.site,
                    pair.place,
                    f"{pending.view.path} is combined with values computed from data or state before it is "
                    "a kernel here, so how the kernel scales is not known; check its size by hand at two "
                    "widths",
                )
        else:
            interp.decide(alone)
    return kernel


def _is_kernel(pending: Pending, side: _Side) -> bool:
    if pending.view.inner:
        # A product of parameters: the view shows the axes of one of them.
        return _contracts_width(pending.view, side.contract)
    if pending.entrywise:
        # A bias has one axis that grows, and it is gone; positions keep one that does not.
        left = [axis for position, axis in enumerate(pending.view.axes) if position not in side.gone]
        return _contracts_width(pending.view, side.contract) and any(f.grows for axis in left for f in axis)
    return _leaves_axes(pending.view, side.gone)


def dot_general_rule(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    (contract_l, contract_r), (batch_l, batch_r) = pair.params["dimension_numbers"]
    return _general_product(
        interp, pair, _Side(ins[0], contract_l, batch_l), _Side(ins[1], contract_r, batch_r)
    )


def ragged_dot_general_rule(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    """Rows in groups, each with a kernel of its own: the groups are copies, as the batch of a product is."""
    dims = pair.params["ragged_dot_dimension_numbers"]
    (contract_l, contract_r), (batch_l, batch_r) = dims.dot_dimension_numbers
    if set(dims.lhs_ragged_dimensions) & {*contract_l, *batch_l}:
        # Groups along what is contracted: what the gradient of a kernel needs.
        return interp.unknown(pair, ins)
    interp.becomes_data(pair, ins[2])
    groups = (*batch_r, *dims.rhs_group_dimensions)
    return _general_product(
        interp, pair, _Side(ins[0], contract_l, batch_l), _Side(ins[1], contract_r, groups)
    )


def _general_product(interp: Interpreter, pair: Pair, left: _Side, right: _Side) -> list[Value]:
    """A product whose axes are the batch axes, then the left's others, then the right's."""
    free_l, free_r = (
        [axis for axis in range(side.value.ndim) if axis not in side.gone] for side in (left, right)
    )

    def place(view: View, first: bool) -> View:
        other = (right if first else left).value
        mine, theirs = (free_l, free_r) if first else (free_r, free_l)
        blank = [broadcast_axis(other.shape[axis], other.base[axis]) for axis in theirs]
        kept = [view.axes[axis] for axis in mine]
        lead = [view.axes[axis] for axis in (left if first else right).batch]
        return dataclasses.replace(view, axes=tuple(lead + (kept + blank if first else blank + kept)))

    return _multiply(interp, pair, left, right, place)


def convolution_rule(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    """A convolution: input features and spatial axes of the kernel are its fan-in.

    A batching rule lays the copies of a vmapped kernel along its output features; there they are one
    factor of the axis, as many as the convolution has groups.
    """
    dims = pair.params["dimension_numbers"]
    groups = max(pair.params["feature_group_count"], pair.params["batch_group_count"])
    lhs, rhs = ins
    out_axis, in_axis, *space = dims.rhs_spec
    ((shape, base),) = pair.shapes()
    contracted = rhs.sizes((in_axis, *space))
    interp.record.activations[pair.site] = 0
    data = Value(shape, base, "data", scale=_scale_of_product(interp, pair, lhs, rhs, contracted))
    if rhs.kind == "param":
        for view in rhs.views:
            axis = view.axes[out_axis]
            copies = (
                frozenset({axis[0].axis})
                if len(axis) > 1 and axis[0].axis is not None and axis[0].size == groups
                else frozenset[int]()
            )
            if copies:
                axes = tuple(axis[1:] if n == out_axis else a for n, a in enumerate(view.axes))
                view = dataclasses.replace(view, axes=axes, stack=view.stack | copies)
            interp.use(pair, view, "contraction", fan_in=(in_axis, *space), contracted=contracted)
        _report_kernel(interp, pair, _Side(rhs, (in_axis, *space), ()))
        interp.becomes_data(pair, lhs)
    else:
        for value in ins:
            interp.becomes_data(pair, value)
        if lhs.kind == rhs.kind == "data":
            interp.product(pair, contracted, lhs, rhs)
    contract = (in_axis, *space)
    return [
        dataclasses.replace(
            data,
            linear_in=_kernels(rhs, contract),
            power=_read_out(rhs, contract, contract, lhs) if rhs.kind == "param" else None,
        )
    ]
