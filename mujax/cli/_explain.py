"""`mujax explain`: prints what mujax reads off a model; and models by their names on the command line."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from mujax import models
from mujax._arguments import COUNT, NONE, check_arguments
from mujax.check import CheckProgress, disagreements
from mujax.cli._arguments import numbers, option, positional
from mujax.cli._display import StoppedError, display, gentle_interrupts
from mujax.core import MupModel, mup_init
from mujax.errors import ConfigError, MujaxError
from mujax.tune import build, imported, summary_of


@dataclasses.dataclass(frozen=True)
class Explain:
    """Print what mujax reads off a model: the role of every parameter and what it does about it.

    With --measure it also trains the model for two steps at the base's width, twice and four times that, and
    prints where sizes of activations and of their changes disagree with the reading; exit code 1 if they do.
    """

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
    measure: Annotated[bool, option("", "Also measure what the reading claims, at three widths.")] = False


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
    with _sentences(name):
        return mup_init(model, base, *inputs, **options)


@contextlib.contextmanager
def _sentences(name: str) -> Iterator[None]:
    """Makes a sentence of what the user's own code raises."""
    try:
        yield
    except MujaxError:
        raise
    except Exception as error:
        raise ConfigError(
            where="MODEL", expected=f"{name} to run on its inputs", got=summary_of(error)
        ) from error


def run(options: Explain) -> int:
    """Prints the role table; 1 if measurements disagree with it, else 0."""
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
    return _measured(options, factory, inputs) if options.measure else 0


def _measured(options: Explain, factory: Callable[[int], Any], inputs: tuple[Any, ...]) -> int:
    """Measures the model at three widths from the base's on, which take less time than the target's."""
    from rich.console import Console

    base = options.base_width
    widths = (base, 2 * base, 4 * base)
    at = {width: build_model(options.model, factory, width)[0] for width in widths}
    try:
        with gentle_interrupts() as check, display(Console(stderr=True), "reading the model") as shown:

            def count(now: CheckProgress) -> None:
                shown.show(now.doing, now.work_done)
                check()

            with _sentences(options.model):
                found = disagreements(
                    at, base, widths[-1], inputs, count, parametrization=options.parametrization
                )
    except KeyboardInterrupt:
        raise StoppedError("interrupted.") from None
    print(f"\nMeasured at widths {', '.join(map(str, widths))}, where it disagrees with this reading:")
    for one in found:
        print(f"  {one.kind} at {one.where}: {one.message}")
    if not found:
        print("  nowhere")
    return 1 if found else 0
