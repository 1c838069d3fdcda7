"""Batches as pure functions, made from a list or a function of the user's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from mujax.errors import ConfigError


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


def as_batches(batches: Any) -> Batches:
    """Turns the user's batches into `Batches`.

    Args:
        batches: `Batches`; an iterable of (inputs, targets), all of the same shapes, which every run sees in
            the same order; or a pure function (key, step) -> (inputs, targets).

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
            where="batches",
            expected="an iterable of (inputs, targets) or a function (key, step) -> (inputs, targets)",
            got=type(batches).__name__,
        )
    listed = check_batches(batches)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *listed)
    return Batches(
        stacked,
        lambda _, __, ___, steps: jnp.arange(steps),
        lambda data, step: jax.tree.map(lambda leaf: leaf[step], data),
        sized=False,
        limit=len(listed),
    )


def check_batches(batches: Any) -> list[tuple[Any, Any]]:
    """The batches as a list, each an (inputs, targets) pair of arrays of the same shapes.

    Raises:
        ConfigError: there are none, one is not a pair, or shapes differ.
    """
    listed = list(batches)
    if not listed:
        raise ConfigError(where="batches", expected="at least one (inputs, targets) pair", got="none")
    shapes: list[PyTree] = []
    for step, batch in enumerate(listed):
        if not isinstance(batch, tuple) or len(batch) != 2:
            raise ConfigError(
                where="batches",
                expected="an (inputs, targets) pair at every step",
                got=f"{type(batch).__name__} at step {step}",
                remedy="give a sequence of pairs, one for each step",
            )
        shapes.append(jax.tree.map(lambda leaf: (jnp.shape(leaf), str(jnp.result_type(leaf))), tuple(batch)))
        if shapes[step] != shapes[0]:
            raise ConfigError(
                where="batches",
                expected=f"the shapes and dtypes {shapes[0]} of the first step at every step",
                got=f"{shapes[step]} at step {step}",
                remedy="drop the rest at the end of the data",
            )
    return [tuple(batch) for batch in listed]
