"""`mujax explain`: prints what mujax reads off a model; and models by their names on the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from mujax import models
from mujax._arguments import COUNT, NONE, check_arguments
from mujax.cli._arguments import numbers, option, positional
from mujax.core import MupModel, mup_init
from mujax.errors import ConfigError, MujaxError
from mujax.tune import build, imported, summary_of


@dataclasses.dataclass(frozen=True)
class Explain:
    """Print what mujax reads off a model: the role of every parameter and what it does about it."""

    model: Annotated[
        str,
        positional(),
        option("MODEL", f"{', '.join(models.BUILD)}, or package.module:factory of your own."),
    ]
    width: Annotated[int, numbers(int), option("N", "Width of the target.")]
    base_width: Annotated[int, numbers(int), option("N", "Width of the base.")]
    parametrization: Annotated[str, option("NAME", "One of mup, table3, table9, sp.")] = "mup"
    inputs: Annotated[
        tuple[str, ...],
        option("SHAPE ...", "Inputs, such as 8x784 or 8x64:int32, where the factory gives none.", ""),
    ] = ()


def factory_of(name: str) -> Callable[[int], Any]:
    """The function that builds a model by its name: a built-in one, or `package.module:factory`.

    Raises:
        ConfigError: the model does not exist.
    """
    if name in models.BUILD:
        return models.BUILD[name]
    if ":" not in name:
        raise ConfigError(
            where="MODEL",
            expected=f"one of {', '.join(models.BUILD)} or package.module:factory",
            got=repr(name),
        )
    return imported(name, "MODEL", "a function of the width")


def build_model(name: str, factory: Callable[[int], Any], width: int) -> tuple[Any, tuple[Any, ...] | None]:
    """The model and its inputs, if the factory gives any."""
    return build(name, factory, width, "MODEL")


def _input(text: str) -> jax.ShapeDtypeStruct:
    shape, _, dtype = text.partition(":")
    try:
        sizes = tuple(int(size) for size in shape.split("x"))
        if any(size < 1 for size in sizes):
            raise ValueError
        return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype or "float32"))
    except (TypeError, ValueError):
        raise ConfigError(
            where="inputs", expected="a shape such as 8x784 or 8x64:int32", got=repr(text)
        ) from None


def inputs_of(name: str, shapes: Sequence[str], given: tuple[Any, ...] | None) -> tuple[Any, ...]:
    """Abstract inputs from the command line, or else those of the factory.

    Raises:
        ConfigError: there are neither, or a shape cannot be read.
    """
    if shapes:
        return tuple(map(_input, shapes))
    if given is None:
        raise ConfigError(
            where="MODEL",
            expected=f"inputs to trace {name} with",
            got="the module only",
            remedy="return (module, inputs) or pass --inputs, for instance --inputs 8x784",
        )
    return given


def traced(name: str, model: Any, base: Any, inputs: tuple[Any, ...], **options: Any) -> MupModel:
    """`mup_init`, with a sentence for what the user's own code raises.

    Raises:
        ConfigError: the model does not run on its inputs.
        MujaxError: as `mup_init` does.
    """
    try:
        return mup_init(model, base, *inputs, **options)
    except MujaxError:
        raise
    except Exception as error:
        raise ConfigError(
            where="MODEL", expected=f"{name} to run on its inputs", got=summary_of(error)
        ) from error


def run(options: Explain) -> None:
    """Prints the role table."""
    widths = {"width": options.width, "base_width": options.base_width}
    check_arguments(dict.fromkeys(widths, COUNT | NONE), widths)
    factory = factory_of(options.model)
    model, inputs = build_model(options.model, factory, options.width)
    base, _ = build_model(options.model, factory, options.base_width)
    inputs = inputs_of(options.model, options.inputs, inputs)
    # At the base's own width nothing differs: a third width shows which axes are infinite.
    delta = (
        build_model(options.model, factory, 2 * options.base_width)[0]
        if options.width == options.base_width
        else None
    )
    mup = traced(options.model, model, base, inputs, delta=delta, parametrization=options.parametrization)
    print(mup.explain())
