"""Batches as pure functions or as a stream, from a list, a function or a grain dataset of the user's."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Key, PyTree

from mujax._arguments import (
    COUNT,
    FLAG,
    KEY,
    NAMED_SHARDING,
    NONE,
    NOT_BELOW_0,
    TEXT,
    check_arguments,
    function,
    shown,
    takes,
)
from mujax.data import Stream, grain_stream, is_grain
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


@takes(name=TEXT, batch=COUNT, steps=COUNT | NONE)
def as_batches(batches: Any, name: str = "batches", *, batch: int = 1, steps: int | None = None) -> Batches:
    """Turns the user's batches into `Batches`.

    Args:
        batches: `Batches`; an iterable of (inputs, targets), all of the same shapes, which every run sees in
            the same order; a pure function (key, step) -> (inputs, targets); or a grain dataset of single
            examples (inputs, targets), of which the batches of a run are read into memory.
        name: the argument that they were given as, for errors.
        batch: examples a step, of a grain dataset.
        steps: number of batches to read of a grain dataset; by default all.

    Raises:
        ConfigError: anything else, or shapes that differ.
        DataError: a grain dataset of fewer examples than a batch takes.
    """
    if isinstance(batches, Batches):
        return batches
    if is_grain(batches):
        with contextlib.closing(grain_stream(batches, batch=batch, prefetch=0)) as read:
            return as_batches([tuple(pair) for pair in itertools.islice(read, steps)], name)
    if callable(batches):

        def keys(_: PyTree, key: Key[Array, ""], batch: int, steps: int) -> PyTree:
            del batch
            return jnp.broadcast_to(key, (steps,)), jnp.arange(steps)

        draw: Callable[..., Any] = batches
        return Batches((), keys, lambda _, drawn: tuple(draw(*drawn)), sized=False)
    if not isinstance(batches, Iterable):
        raise ConfigError(
            where=name,
            expected="an iterable of (inputs, targets), a function (key, step) -> (inputs, targets) or a "
            "grain dataset",
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


@takes(key=KEY, batch=COUNT, steps=COUNT, sharding=NAMED_SHARDING | NONE, prefetch=NOT_BELOW_0)
def stream(
    batches: Any,
    key: Key[Array, ""],
    *,
    batch: int,
    steps: int,
    sharding: NamedSharding | None = None,
    prefetch: int = 2,
) -> Stream:
    """The batches of a run one after the other, for a loop in Python, from step 0 or a restored position.

    They are those that `training_run` trains on. Only the position and not the batches depend on how often
    the run is interrupted, on the mesh and on the number of processes.

    Args:
        batches: a `mujax.data.Stream`, which is returned; a grain dataset of single examples; or what else
            `as_batches` takes, which every process has in memory.
        key: determines the order, where that is not fixed.
        batch: examples a step, of all processes together, for batches of any size.
        steps: of the whole run.
        sharding: of a batch; needed with several processes.
        prefetch: number of batches of a grain dataset to read ahead.

    Raises:
        ConfigError: anything else, shapes that differ, or a batch that the sharding does not divide.

    >>> pairs = [(jnp.full(2, step), jnp.zeros(2)) for step in range(3)]
    >>> first = stream(pairs, jax.random.key(0), batch=2, steps=3)
    >>> _ = next(first)
    >>> again = stream(pairs, jax.random.key(0), batch=2, steps=3)
    >>> again.set_state(first.get_state())
    >>> [inputs.tolist() for inputs, _ in again]
    [[1, 1], [2, 2]]
    """
    if isinstance(batches, Stream):
        return batches
    if is_grain(batches):
        return grain_stream(batches, batch=batch, sharding=sharding, prefetch=prefetch)
    return _Drawn(as_batches(batches), key, batch, steps, sharding)


class _Drawn(Stream):
    """Of `Batches`, whose data every process has."""

    def __init__(
        self, batches: Batches, key: Key[Array, ""], batch: int, steps: int, sharding: NamedSharding | None
    ) -> None:
        data = np.asarray(jax.random.key_data(key))
        super().__init__({"key": data.ravel().tolist(), **({"batch": batch} if batches.sized else {})})
        if batches.limit is not None and steps > batches.limit:
            raise ConfigError(
                where="steps", expected=f"at most {batches.limit}, the number of batches", got=steps
            )
        if sharding is None and jax.process_count() > 1:
            raise ConfigError(
                where="sharding",
                expected=f"how a batch is spread over the devices of all {jax.process_count()} processes",
                got="none",
                remedy="pass sharding=, such as NamedSharding(mesh, PartitionSpec('data'))",
            )
        self._steps = steps
        whole = None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec())
        self._data = batches.data if whole is None else _everywhere(batches.data, whole)

        def draw(data: PyTree, key_data: np.ndarray) -> PyTree:
            given = jax.random.wrap_key_data(jnp.asarray(key_data), impl=jax.random.key_impl(key))
            return batches.draw(data, given, batch, steps)

        def fetch(data: PyTree, drawn: PyTree, step: Any) -> PyTree:
            return batches.fetch(data, jax.tree.map(lambda leaf: leaf[step], drawn))

        self._drawn = jax.jit(draw, out_shardings=whole)(self._data, data)
        self._fetch = jax.jit(fetch, out_shardings=sharding)

    def _open(self) -> Any:
        return (
            self._fetch(self._data, self._drawn, np.int32(step)) for step in range(self.step, self._steps)
        )


def _everywhere(data: PyTree, whole: NamedSharding) -> PyTree:
    """Data that each process has, on all devices of all processes."""

    def place(leaf: Any) -> Array:
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, whole, lambda index: array[index])

    return jax.tree.map(place, data)
