"""Batches as pure functions or as a stream, from a list, a function or a grain dataset of the user's."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Integer, Key, PyTree

from mujax._arguments import (
    COUNT,
    FLAG,
    KEY,
    NAMED,
    NAMED_SHARDING,
    NONE,
    NOT_BELOW_0,
    TEXT,
    check_arguments,
    function,
    shown,
    takes,
)
from mujax.data import TOKENS, Examples, Stream, digest, grain_stream, is_grain, text_starts
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
        by_example: whether an identifier has an entry for each example, of which any can be fetched alone:
            on a mesh each device then fetches its own.
        about: what tells the batches from others, as JSON, where `data` does not hold them.
    """

    data: PyTree
    draw: Callable[[PyTree, Key[Array, ""], int, int], PyTree]
    fetch: Callable[[PyTree, PyTree], tuple[Any, Any]]
    sized: bool = True
    limit: int | None = None
    by_example: bool = False
    about: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        kinds = {"draw": _DRAW, "fetch": _FETCH, "sized": FLAG, "limit": COUNT | NONE}
        check_arguments({**kinds, "by_example": FLAG, "about": NAMED | NONE}, vars(self))

    def digest(self) -> str:
        """A fingerprint of the data."""
        if self.about is None:
            return digest(self.data)
        return hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:16]

    def on(self, mesh: Mesh, split: PartitionSpec) -> Batches:
        """The same batches, of which each device of a mesh fetches its own part.

        Args:
            mesh: the mesh.
            split: of the examples.
        """

        def fetch(data: PyTree, drawn: PyTree) -> Any:
            own = jax.shard_map(
                lambda drawn: self.fetch(data, drawn),
                mesh=mesh,
                in_specs=split,
                out_specs=split,
                check_vma=False,
            )
            return own(drawn)

        return dataclasses.replace(self, fetch=fetch) if self.by_example else self


_SAMPLE: Final = 2**16
"""Tokens at each of some places that tell one text from another."""


@takes(tokens=TOKENS, length=COUNT)
def mapped_text(tokens: Integer[np.ndarray, " n"], *, length: int) -> Batches:
    """Batches of a text that stays in its file: larger than the devices' memory, or than the host's.

    They are those of a text in memory. A device that needs a sequence reads it through its host, so on a mesh
    of several processes each of them reads its own examples. That costs a call of the host in each step: give
    a text that fits as `text_batches`, or let `mujax tune --data` choose.

    Args:
        tokens: the text, as by `mujax.data.token_file`; every process maps the same file.
        length: tokens of a sequence.

    Returns:
        Inputs, and targets one token ahead of them, int32 of shape (batch, length).

    Raises:
        DataError: when it is drawn from, the text is not longer than a sequence.

    >>> text = np.arange(100, dtype=np.uint16)
    >>> run = mapped_text(text, length=8)
    >>> starts = run.draw((), jax.random.key(0), 2, 3)
    >>> inputs, targets = jax.jit(run.fetch)((), starts[0])
    >>> inputs.shape, bool((targets == inputs + 1).all())
    ((2, 8), True)
    """
    places = len(tokens) - length
    is_wide = places > np.iinfo(np.int32).max

    def draw(_: PyTree, key: Key[Array, ""], batch: int, steps: int) -> Array:
        if not is_wide:
            return text_starts(len(tokens), key, batch=batch, length=length, steps=steps)
        # More places than an int32 holds: the remainder of 64 random bits.
        bits = functools.partial(jax.random.bits, shape=(batch, 2), dtype=jnp.uint32)
        return jax.vmap(lambda step: bits(jax.random.fold_in(key, step)))(jnp.arange(steps))

    def read(starts: Any) -> np.ndarray:
        starts = np.asarray(starts)
        if is_wide:
            high, low = np.moveaxis(starts.astype(np.uint64), -1, 0)
            starts = ((high << np.uint64(32)) | low) % np.uint64(places)
        return tokens[np.add.outer(starts.astype(np.int64), np.arange(length + 1))].astype(np.int32)

    def fetch(_: PyTree, starts: Array) -> Examples:
        shape = (*starts.shape[: starts.ndim - is_wide], length + 1)
        out = jax.ShapeDtypeStruct(shape, jnp.int32)
        windows = jax.pure_callback(read, out, starts, vmap_method="broadcast_all")
        return Examples(windows[..., :-1], windows[..., 1:])

    samples = [tokens[place : place + _SAMPLE] for place in np.linspace(0, len(tokens), 17).astype(int)[:-1]]
    about = {"tokens": len(tokens), "dtype": str(tokens.dtype), "samples": digest(samples)}
    return Batches((), draw, fetch, by_example=True, about=about)


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
