"""Reads a kernel (`pallas_call`): the products of activations in a program that works on memory.

Each block of memory is one `Value`: all that is ever written into it, joined. The walk is repeated until that
no longer changes. What can't be shown leaves the kernel opaque, as if it had not been looked into.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from mujax.core.program import EqnPath, Kernel, Subprogram, control, memory_written, subprograms
from mujax.core.trace._interpreter import Interpreter
from mujax.core.trace._uses import Pair, paired_shapes
from mujax.core.trace._values import UNKNOWN, ZERO, Memory, Shape, Value, common, ratio, same
from mujax.errors import TraceMismatchError

_WALKS: Final = 6


def read_memory(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    """Part of a block. Where that is part of an axis that grows, its sums are parts of sums."""
    if ins[0].memory is None:
        # An array that the model changes in place.
        return interp.unknown(pair, ins)
    return [_part(ins[0], shape, base) for shape, base in pair.shapes()]


def write_memory(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
    """A value is written into a block, beside what else is: both of one scale, or each of order one."""
    block, number = ins[0], memory_written(pair.target)
    if block.memory is None or number is None:
        return interp.unknown(pair, ins)
    value, held = ins[number], block.memory.content
    if value.kind == "param":
        interp.opaque(pair, value)
    whole = _growth(value.shape, value.base)
    if not same(whole, _growth(block.shape, block.base)):
        value = value.replace(scale=UNKNOWN)
    if held is not None and common([held.scale, value.scale]) is None:
        value = value.replace(scale=interp.require_order_one(pair.place, value))
        held = held.replace(scale=interp.require_order_one(pair.place, held))
    if held is not None:
        value = interp.join([held, value]).replace(
            products=held.products | value.products, linear_in=held.linear_in | value.linear_in
        )
    block.memory.content = value
    return [_part(block, shape, base) for shape, base in pair.shapes()]


def _part(block: Value, shape: Shape, base: Shape) -> Value:
    held = block.memory.content if block.memory else None
    if held is None:
        return Value(shape, base, "data", scale=ZERO)
    alike = same(_growth(shape, base), _growth(block.shape, block.base))
    return Value(
        shape,
        base,
        held.kind,
        held.const,
        scale=held.scale if alike else UNKNOWN,
        products=held.products,
        linear_in=held.linear_in,
    )


def _growth(shape: Shape, base: Shape) -> float:
    sizes = [(small, big) for small, big in zip(base, shape, strict=True) if isinstance(big, int)]
    return ratio(math.prod(small for small, _ in sizes), math.prod(big for _, big in sizes)) or 0.0


def kernel_rule(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> Sequence[Value]:
    """Walks the program of a kernel; without facts where something in it does not show."""
    outs = None
    if not (interp.exact or any(value.kind == "param" for value in ins)) and _same_grid(pair):
        before = interp.record.copy()
        try:
            (base,), (target,) = subprograms(pair.base), subprograms(pair.target)
            outs = _walk(interp, pair, base, target, ins)
        except TraceMismatchError:
            outs = None
        _forget_inside(interp, pair.site)
        if outs is None:
            interp.record = before
    return interp.unknown(pair, ins) if outs is None else outs


def _same_grid(pair: Pair) -> bool:
    grids = [held.grid for eqn in (pair.base, pair.target) if isinstance(held := control(eqn), Kernel)]
    return len(grids) == 2 and grids[0] == grids[1]


def _walk(
    interp: Interpreter, pair: Pair, base: Subprogram, target: Subprogram, ins: Sequence[Value]
) -> list[Value] | None:
    blocks: list[Value] = []
    variables = zip(base.program.jaxpr.invars, target.program.jaxpr.invars, strict=True)
    for number, (small, big) in enumerate(variables):
        shape, fitted = paired_shapes(small, big)
        given = ins[number] if number < len(ins) else None
        if given is not None and not same(_growth(given.shape, given.base), _growth(shape, fitted)):
            # Only part of an axis that grows is in the block.
            return None
        block = Value(shape, fitted, "data", memory=Memory(given), raw=given is not None and given.raw)
        block.origin = None if given is None else given.origin
        blocks.append(block)
    clean = interp.record
    known = set(clean.findings)
    for _ in range(_WALKS):
        held = [_facts(block) for block in blocks]
        interp.record = clean.copy()
        interp.inside(pair, base, target, blocks)
        if [_facts(block) for block in blocks] == held:
            break
    else:
        return None
    if set(interp.record.findings) - known:
        return None
    outs: list[Value] = []
    for block, (shape, fitted) in zip(blocks[len(ins) :], pair.shapes(), strict=False):
        held = block.memory.content if block.memory else None
        if held is None or held.scale.total is None:
            return None
        if not same(_growth(shape, fitted), _growth(block.shape, block.base)):
            return None
        outs.append(
            Value(shape, fitted, "data", scale=held.scale, products=held.products, linear_in=held.linear_in)
        )
    return outs


def _facts(block: Value) -> object:
    held = block.memory.content if block.memory else None
    return None if held is None else (held.kind, held.const, held.scale, held.products, held.linear_in)


def _forget_inside(interp: Interpreter, site: EqnPath) -> None:
    """Leaves a kernel one step of the flow: its memory is no value that another is computed from once."""
    flow = interp.record.flow
    for places in (flow.visits, flow.control, flow.loops):
        for place in [place for place in places if len(place) > len(site) and place[: len(site)] == site]:
            del places[place]
