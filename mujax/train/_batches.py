"""Batches as pure functions, made from a list or a function of the user's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from mujax._arguments import COUNT, FLAG, NONE, TEXT, check_arguments, function, shown, takes
from mujax.errors import ConfigError

_DRAW: Final = function(
    "a function of data, key, batch size and steps", 4, "lambda data, key, batch, steps: ..."
)
_FETCH: Final = function("a function of data and what draw returned", 2, "lambda data, drawn: ...")


@dataclasses.dataclass(frozen=True)
class Batches:
    """A source of batches, as pure functions.

    Attributes:
        data: arrays that all runs share.
        draw: (data, key, batch size, steps) -> an identifier of each step's batch, along a leading axis.
        fetch: (data, one of these identifiers) -> (inputs, targets).
        sized: whether `draw` reads the batch size.
        limit: the number of batches; None for unlimited.
    """

    data: PyTree
    draw: Callable[[PyTree, Key[Array, ""], int, int], PyTree]
    fetch: Callable[[PyTree, PyTree], tuple[Any, Any]]
    sized: bool = True
    limit: int | None = None

    def __post_init__(self) -> None:
        check_arguments({"draw": _DRAW, "fetch": _FETCH, "sized": FLAG, "limit": COUNT | NONE}, vars(self))


@takes(name=TEXT)
def as_batches(batches: Any, name: str = "batches") -> Batches:
    """Turns the user's batches into `Batches`.

    Args:
        batches: `Batches`; an iterable of (inputs, targets), all of the same shapes, which every run sees in
            the same order; or a pure function (key, step) -> (inputs, targets).
        name: the argument that they were given as, for errors.

    Raises:
        ConfigError: anything else, or shapes that differ.
    """
    if isinstance(batches, Batches):
        return batches
    if callable(batches):

        def keys(_: PyTree, key: Key[Array, ""], batch: int, steps: int) -> PyTree:
            del batch
            return jnp.broadcast_to(key, (steps,)), jnp.arange(steps)

        draw: Callable[..., Any] = batches
        return Batches((), keys, lambda _, drawn: tuple(draw(*drawn)), sized=False)
    if not isinstance(batches, Iterable):
        raise ConfigError(
            where=name,
            expected="an iterable of (inputs, targets) or a function (key, step) -> (inputs, targets)",
            got=shown(batches),
            remedy=f"pass {name}=[(inputs, targets), ...], one pair for each step",
        )
    listed = check_batches(batches, name)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *listed)
    return Batches(
        stacked,
        lambda _, __, ___, steps: jnp.arange(steps),
        lambda data, step: jax.tree.map(lambda leaf: leaf[step], data),
        sized=False,
        limit=len(listed),
    )


def _is_arrays(leaf: Any) -> bool:
    return hasattr(leaf, "shape") or isinstance(leaf, int | float)


@takes(name=TEXT)
def check_batches(batches: Any, name: str = "batches") -> list[tuple[Any, Any]]:
    """The batches as a list, each an (inputs, targets) pair of arrays of the same shapes.

    Args:
        batches: the pairs.
        name: the argument that they were given as, for errors.

    Raises:
        ConfigError: there are none, one is not a pair, or shapes differ.
    """
    if not isinstance(batches, Iterable) or isinstance(batches, str | bytes | Mapping):
        raise ConfigError(
            where=name,
            expected="a sequence of (inputs, targets) pairs",
            got=shown(batches),
            remedy=f"pass {name}=[(inputs, targets), ...], one pair for each step",
        )
    listed = list(batches)
    if not listed:
        raise ConfigError(where=name, expected="at least one (inputs, targets) pair", got="none")
    shapes: list[PyTree] = []
    for step, batch in enumerate(listed):
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ConfigError(
                where=name,
                expected="an (inputs, targets) pair at every step",
                got=f"{type(batch).__name__} at step {step}",
                remedy="give a sequence of pairs, one for each step",
            )
        if not jax.tree.leaves(batch[0]) or not all(map(_is_arrays, jax.tree.leaves(tuple(batch)))):
            raise ConfigError(
                where=name,
                expected="arrays as inputs and targets of every step",
                got=f"{shown(tuple(batch))} at step {step}",
                remedy="give NumPy or JAX arrays",
            )
        shapes.append(jax.tree.map(lambda leaf: (jnp.shape(leaf), str(jnp.result_type(leaf))), tuple(batch)))
        if shapes[step] != shapes[0]:
            raise ConfigError(
                where=name,
                expected=f"the shapes and dtypes {shapes[0]} of the first step at every step",
                got=f"{shapes[step]} at step {step}",
                remedy="drop the rest at the end of the data",
            )
    return [tuple(batch) for batch in listed]
