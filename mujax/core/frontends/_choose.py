"""Chooses the front end of a model, and makes the base's counterpart of a target's call."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from flax import linen as nn

from mujax.core.frontends._call import Call, Frontend, Shape, Static, is_array, with_shape
from mujax.core.frontends._functional import Functional, FunctionalFrontend
from mujax.core.frontends._linen import LinenFrontend
from mujax.core.frontends._one_device import OneDevice, on_one_device
from mujax.errors import MujaxError, SpecMismatchError


def frontend(model: Any, name: str = "model") -> Frontend:
    """The front end of a model.

    Args:
        model: a Linen module, an NNX factory `rngs -> nnx.Module`, or a `Functional`.
        name: the argument that the model was given as, for errors.

    Raises:
        MujaxError: it is none of the three.
    """
    if isinstance(model, nn.Module):
        return LinenFrontend(model)
    if isinstance(model, Functional):
        return FunctionalFrontend(model)
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise MujaxError(
            where=name,
            expected="an instance of a Flax Linen module",
            got=f"the class {model.__name__}",
            remedy=f"pass {model.__name__}(...)",
        )
    # `flax.nnx` takes half as long to import as all of mujax: only where a model needs it.
    from flax import nnx

    from mujax.core.frontends._nnx import NNXFrontend, factory_of

    if isinstance(model, nnx.Module):
        kind = type(model).__name__
        raise MujaxError(
            where=name,
            expected="an NNX factory (a function rngs -> module)",
            got=f"an instance of {kind}",
            remedy=f"pass lambda rngs: {kind}(..., rngs=rngs)",
        )
    if isinstance(getattr(model, "module", None), nn.Module):
        raise MujaxError(
            where=name,
            expected="a Flax Linen module",
            got=f"{type(model).__name__}, which holds one",
            remedy="pass its .module",
        )
    if callable(model):
        return NNXFrontend(factory_of(model, name))
    raise MujaxError(
        where=name,
        expected="a Flax Linen module, an NNX factory rngs -> nnx.Module or mujax.Functional(init, apply)",
        got=f"the shape {tuple(model.shape)}" if is_array(model) else type(model).__name__,
        remedy="call mup_init(model, base, *inputs)",
    )


def base_call(
    base: Frontend,
    target: Frontend,
    variables: Any,
    inputs: Sequence[Any],
    kwargs: Static,
    call: Call,
    sizes: Mapping[str, tuple[Shape, Shape]],
    unused: Collection[int] = (),
) -> Call:
    """The base's counterpart of a call of the target.

    Args:
        base: the base's front end.
        target: the target's.
        variables: the target's variables (or module) in the call.
        inputs: positional arguments, the same for both.
        kwargs: keyword arguments, the same for both.
        call: the target's call.
        sizes: (target, base) shape of each parameter and of each piece of state, by path.
        unused: positions in `call` that the target does not read; those that `mup_init` did not see, such as
            a collection that another call returned, keep their shapes.

    Raises:
        SpecMismatchError: a shape in the call does not follow from those that `mup_init` saw.
    """
    if isinstance(base, OneDevice):
        return on_one_device(base_call(base.end, target, variables, inputs, kwargs, call, sizes, unused))
    own = base.follow(target, variables)
    same = base.call(own, inputs, kwargs)
    small = {
        path: same.leaves[position].shape
        for which in (same.params, same.state)
        for position, path in which.items()
        if own is not variables
    }
    leaves = list(same.leaves)
    for which in (same.params, same.state):
        for position, path in which.items():
            leaf = call.leaves[position]
            if path in small:
                shape = small[path]
            elif path not in sizes and position in unused:
                shape = tuple(leaf.shape)
            else:
                shape = _base_shape(path, tuple(leaf.shape), sizes)
            leaves[position] = with_shape(shape, leaf)
    return dataclasses.replace(same, leaves=leaves)


def _base_shape(path: str, shape: Shape, sizes: Mapping[str, tuple[Shape, Shape]]) -> Shape:
    if path not in sizes:
        raise SpecMismatchError(
            where=path,
            expected="only variables that mup_init saw",
            got=f"another one of shape {shape}",
            remedy="pass mup_init the inputs and keyword arguments with which the model creates it",
        )
    target, base = sizes[path]
    if shape == target:
        return base
    if len(shape) != len(target):
        raise SpecMismatchError(where=path, expected=f"shape {target} as in mup_init", got=shape)
    out = []
    for size, big, small in zip(shape, target, base, strict=True):
        if big != small and size * small % big:
            raise SpecMismatchError(
                where=path,
                expected=f"a multiple of {big // small} along the axis that grows with width (shape {target} "
                "in mup_init)",
                got=f"shape {shape}",
            )
        out.append(size if big == small else size * small // big)
    return tuple(out)
