"""Batches read while a model trains, each process its own rows, from grain, a token file or arrays.

The order depends on nothing but the seed and the step: it is the same for any number of processes and on any
mesh, and a stream goes on from the step that it was saved at.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Integer, Key, PyTree

from mujax._arguments import COUNT, KEY, NONE, NOT_BELOW_0, SHARDING, needed, takes
from mujax.data._batches import EXAMPLES, TOKENS, epoch_order, need_examples, need_tokens, step_starts
from mujax.data._splits import Examples
from mujax.errors import ConfigError, DataError

_ENDLESS: Final = np.iinfo(np.int32).max

# The most threads that read batches ahead.
_THREADS: Final = 8


class Source(Protocol):
    """Batches by step, of which any rows can be read alone.

    Attributes:
        about: what tells one source from another, as JSON; compared when a position is restored.
        batch: examples a step.
        steps: number of batches.
    """

    @property
    def about(self) -> Mapping[str, Any]: ...

    @property
    def batch(self) -> int: ...

    @property
    def steps(self) -> int: ...

    def read(self, step: int, rows: np.ndarray, /) -> PyTree:
        """These rows of a step's batch, as NumPy arrays."""
        ...


class Stream(Iterator[Any]):
    """Batches in a fixed order, as arrays that are spread over the devices of all processes.

    Made by `text_stream`, `image_stream` and `grain_stream`, and by `mujax.train.stream` of any batches.
    `get_state` and `set_state` are those of grain's iterators: the position as JSON, here the same in every
    process. A subclass gives `_open`.

    Args:
        about: tells one source of batches from another, as JSON; compared when a position is restored.

    Attributes:
        step: number of batches taken so far.
    """

    def __init__(self, about: Mapping[str, Any]) -> None:
        self.step = 0
        self._about = dict(about)
        self._batches: Any = None

    def _open(self) -> Any:
        """An iterator of the batches from `self.step` on, which can be closed."""
        raise NotImplementedError

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> PyTree:
        if self._batches is None:
            self._batches = self._open()
        batch = next(self._batches)
        self.step += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position as JSON."""
        return {**self._about, "step": self.step}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from a position.

        Raises:
            DataError: the position is one in other data, or in batches of another size or order.
        """
        for name, value in self._about.items():
            if state.get(name) != value:
                raise DataError(
                    where=f"position in the data, {name}",
                    expected=f"{value!r}, as of this stream",
                    got=repr(state.get(name)),
                    remedy="give the data, batch size and seed that the position was saved with",
                )
        self.close()
        self.step = state["step"]

    def close(self) -> None:
        """Ends the threads that read ahead; the next batch starts them again."""
        if self._batches is not None:
            self._batches.close()
        self._batches = None


class _Read(Stream):
    """Of a source that can be entered at any step: each process reads its own rows, some batches ahead."""

    def __init__(self, source: Source, sharding: Sharding | None, prefetch: int) -> None:
        super().__init__(source.about)
        self._source, self._placement = source, _Placement(sharding, source.batch)
        # Now and not at the first batch: grain may be missing.
        self._grain, self._prefetch = _grain(), prefetch

    def _open(self) -> Any:
        rest = _Rest(self._source, self.step, self._placement.rows)
        options = self._grain.ReadOptions(min(self._prefetch, _THREADS), self._prefetch)
        rows = iter(self._grain.MapDataset.source(rest).to_iter_dataset(options))
        return _placed(rows, self._placement)


def _placed(rows: Any, placement: _Placement) -> Iterator[PyTree]:
    with contextlib.closing(rows):
        yield from map(placement, rows)


class _Rest:
    """This process's rows of all batches from a step on: a source of grain's."""

    def __init__(self, source: Source, start: int, rows: np.ndarray) -> None:
        self._source, self._start, self._rows = source, start, rows

    def __len__(self) -> int:
        return max(0, self._source.steps - self._start)

    def __getitem__(self, index: int) -> PyTree:
        return self._source.read(self._start + int(index), self._rows)


class _Placement:
    """Makes this process's rows a part of the batch of all processes.

    Attributes:
        rows: the rows of the batch that the devices of this process hold, ascending.
    """

    def __init__(self, sharding: Sharding | None, batch: int) -> None:
        self._sharding, self._batch = sharding, batch
        self.rows = np.arange(batch)
        if sharding is None:
            if jax.process_count() > 1:
                raise ConfigError(
                    where="sharding",
                    expected=f"how a batch is spread over the devices of all {jax.process_count()} processes",
                    got="none",
                    remedy="pass sharding=, such as NamedSharding(mesh, PartitionSpec('data'))",
                )
            return
        try:
            parts = _leading(sharding).addressable_devices_indices_map((batch,))
        except ValueError as error:
            raise ConfigError(
                where="batch",
                expected=f"a multiple of {_parts(sharding)}, the parts that the sharding cuts it into",
                got=batch,
                remedy="take such a number, or a mesh with fewer devices along the batch",
            ) from error
        held = [self.rows[index[0]] for index in parts.values() if index is not None]
        self.rows = np.unique(np.concatenate(held))

    def __call__(self, rows: PyTree) -> PyTree:
        """The batch, from `self.rows` of it as NumPy arrays."""
        if self._sharding is None:
            return jax.tree.map(jnp.asarray, rows)
        return jax.tree.map(self._global, rows)

    def _global(self, leaf: np.ndarray) -> Array:
        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(self._batch)
            # The rows of one device follow each other.
            first = int(np.searchsorted(self.rows, start))
            return leaf[(slice(first, first + stop - start), *index[1:])]

        assert self._sharding is not None
        return jax.make_array_from_callback((self._batch, *leaf.shape[1:]), self._sharding, part)


def _parts(sharding: Sharding) -> int:
    """The number of parts that the leading axis is cut into."""
    if not isinstance(sharding, NamedSharding) or not sharding.spec:
        return sharding.num_devices
    axes = sharding.spec[0] or ()
    return math.prod(sharding.mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def _leading(sharding: Sharding) -> Sharding:
    """The sharding of the leading axis alone."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))
    return sharding


def _grain() -> Any:
    return needed("grain", "data", "grain, which reads batches ahead")


def is_grain(dataset: Any) -> bool:
    """Whether it is a dataset of grain's, which is not imported to find out."""
    grain = sys.modules.get("grain")
    return grain is not None and isinstance(dataset, grain.MapDataset | grain.IterDataset)


# ---- drawing by a key ------------------------------------------------------------------------------------


class _Drawer:
    """Random numbers of a key, drawn by the CPU: the accelerator has a step to run."""

    def __init__(self, key: Key[Array, ""]) -> None:
        try:
            self._device = jax.local_devices(backend="cpu")[0]
        except RuntimeError:
            self._device = jax.local_devices()[0]
        self._data, self._impl = np.asarray(jax.random.key_data(key)), jax.random.key_impl(key)

    @property
    def about(self) -> list[int]:
        return self._data.ravel().tolist()

    def __call__(self, draw: Callable[..., Array], *args: Any) -> np.ndarray:
        with jax.default_device(self._device):
            key = jax.random.wrap_key_data(jnp.asarray(self._data), impl=self._impl)
            return np.asarray(draw(key, *args))


_step_starts: Final = jax.jit(step_starts, static_argnums=(2, 3))
_epoch_order: Final = jax.jit(epoch_order, static_argnums=2)


def _wide_starts(key: Key[Array, ""], step: int, batch: int) -> Array:
    return jax.random.bits(jax.random.fold_in(key, step), (2, batch), jnp.uint32)


class _Text:
    def __init__(
        self, tokens: np.ndarray, key: Key[Array, ""], batch: int, length: int, vocab_size: int | None
    ) -> None:
        need_tokens(len(tokens), length)
        self._tokens, self._draw = tokens, _Drawer(key)
        self.batch, self.steps = batch, _ENDLESS
        self._length, self._vocab_size = length, vocab_size
        self.about = {"tokens": len(tokens), "batch": batch, "length": length, "key": self._draw.about}

    def read(self, step: int, rows: np.ndarray) -> Examples:
        places = len(self._tokens) - self._length
        if places <= _ENDLESS:
            starts = self._draw(_step_starts, step, places, self.batch)
        else:
            # More places than an int32 holds. The remainder of 64 random bits favours none noticeably.
            high, low = self._draw(_wide_starts, step, self.batch).astype(np.uint64)
            starts = np.asarray(((high << np.uint64(32)) | low) % np.uint64(places))
        within = np.add.outer(starts[rows].astype(np.int64), np.arange(self._length + 1))
        windows = np.asarray(self._tokens[within])
        if self._vocab_size is not None:
            wrong = (windows < 0) | (windows >= self._vocab_size)
            if wrong.any():
                raise DataError(
                    where=f"text, place {within[wrong][0]}",
                    expected=f"tokens from 0 to {self._vocab_size - 1}",
                    got=windows[wrong][0],
                    remedy="give the vocab_size= of the tokenizer, or the dtype= of the file",
                )
        windows = windows.astype(np.int32)
        return Examples(windows[:, :-1], windows[:, 1:])


@takes(
    tokens=TOKENS,
    key=KEY,
    batch=COUNT,
    length=COUNT,
    vocab_size=COUNT | NONE,
    sharding=SHARDING | NONE,
    prefetch=NOT_BELOW_0,
)
def text_stream(
    tokens: Integer[np.ndarray, " n"],
    key: Key[Array, ""],
    *,
    batch: int,
    length: int,
    vocab_size: int | None = None,
    sharding: Sharding | None = None,
    prefetch: int = 2,
) -> Stream:
    """The batches of `text_batches`, each read when it is its turn: the text may be larger than memory.

    Args:
        tokens: the text, as by `token_file`.
        key: determines the places.
        batch: sequences a step, of all processes together.
        length: tokens a sequence.
        vocab_size: every token read must be below it; not checked by default.
        sharding: of a batch; needed with several processes.
        prefetch: number of batches to read ahead; 0 reads each when it is asked for.

    Returns:
        A stream without end of inputs, and targets one token ahead of them, int32 of shape (batch, length).

    Raises:
        DataError: the text is not longer than a sequence; when read, a token outside of the vocabulary.
        ConfigError: a size below 1, a batch that the sharding does not divide, or grain is not installed.

    >>> tokens = np.arange(100, dtype=np.uint8)
    >>> stream = text_stream(tokens, jax.random.key(0), batch=2, length=8)
    >>> inputs, targets = next(stream)
    >>> inputs.shape, bool((targets == inputs + 1).all()), stream.step
    ((2, 8), True, 1)
    >>> stream.close()
    """
    return _Read(_Text(tokens, key, batch, length, vocab_size), sharding, prefetch)


class _Images:
    def __init__(self, examples: Examples, key: Key[Array, ""], batch: int) -> None:
        n = len(examples.targets)
        need_examples(n, batch)
        # Of a memory-mapped array a view.
        self._inputs, self._targets = map(np.asarray, examples)
        self._draw, self.batch, self.steps = _Drawer(key), batch, _ENDLESS
        self._per_epoch = n // batch
        self._order = functools.lru_cache(2)(lambda epoch: self._draw(_epoch_order, epoch, n))
        self.about = {"examples": n, "batch": batch, "key": self._draw.about}

    def read(self, step: int, rows: np.ndarray) -> Examples:
        epoch, place = divmod(step, self._per_epoch)
        wanted = self._order(epoch)[place * self.batch : (place + 1) * self.batch][rows]
        return Examples(_canonical(self._inputs[wanted]), _canonical(self._targets[wanted]))


@takes(examples=EXAMPLES, key=KEY, batch=COUNT, sharding=SHARDING | NONE, prefetch=NOT_BELOW_0)
def image_stream(
    examples: Examples,
    key: Key[Array, ""],
    *,
    batch: int,
    sharding: Sharding | None = None,
    prefetch: int = 2,
) -> Stream:
    """The batches of `image_batches`, each read when it is its turn: arrays may be memory-mapped.

    Args:
        examples: a split.
        key: determines the order; see `batch_indices`.
        batch: examples a step, of all processes together.
        sharding: of a batch; needed with several processes.
        prefetch: number of batches to read ahead; 0 reads each when it is asked for.

    Returns:
        A stream without end of inputs and targets of shape (batch, ...).

    Raises:
        DataError: fewer examples than a batch takes.
        ConfigError: `batch` below 1 or not divided by the sharding, or grain is not installed.

    >>> split = Examples(np.zeros((6, 28, 28, 1), np.float32), np.arange(6, dtype=np.int32))
    >>> stream = image_stream(split, jax.random.key(0), batch=2, prefetch=0)
    >>> next(stream).inputs.shape
    (2, 28, 28, 1)
    """
    return _Read(_Images(examples, key, batch), sharding, prefetch)


# ---- grain -----------------------------------------------------------------------------------------------


class _Map:
    def __init__(self, dataset: Any, batch: int) -> None:
        self._dataset, self.batch = dataset, batch
        self.steps = min(len(dataset) // batch, _ENDLESS)
        if not self.steps:
            raise DataError(
                where="batch",
                expected=f"at most {len(dataset)}, the number of examples",
                got=batch,
                remedy="take a smaller one",
            )
        self.about = {"examples": len(dataset), "batch": batch}

    def read(self, step: int, rows: np.ndarray) -> PyTree:
        places = [step * self.batch + int(row) for row in rows]
        examples = [self._dataset[place] for place in places]
        for place, example in zip(places, examples, strict=True):
            if example is None:
                raise DataError(
                    where=f"grain dataset, example {place}",
                    expected="an example at every place of a MapDataset, so that its batches can be counted",
                    got="none, as after filter()",
                    remedy="give dataset.to_iter_dataset()",
                )
        return _stacked(examples)


def _stacked(examples: list[PyTree]) -> PyTree:
    try:
        return jax.tree.map(lambda *leaves: _canonical(np.stack(leaves)), *examples)
    except ValueError as error:
        raise DataError(
            where="grain dataset",
            expected="examples of one structure and shape",
            got=f"others ({str(error).partition(chr(10))[0].rstrip('.')})",
            remedy="pad or crop them by dataset.map()",
        ) from error


def _canonical(array: np.ndarray) -> np.ndarray:
    """In the dtype that JAX computes in."""
    return np.asarray(array, jax.dtypes.canonicalize_dtype(array.dtype))


class _Sequential(Stream):
    """Of a dataset that can only be read in its order: every process reads it all and keeps its own rows."""

    def __init__(self, dataset: Any, batch: int, sharding: Sharding | None) -> None:
        super().__init__({"batch": batch})
        self._dataset = dataset.batch(batch, drop_remainder=True, batch_fn=_stacked)
        self._placement = _Placement(sharding, batch)
        self._iterator: Any = None
        self._position: Any = None

    def _open(self) -> Any:
        self._iterator = iter(self._dataset)
        if self._position is not None:
            self._iterator.set_state(self._position)
        own = self._placement.rows
        rows = (jax.tree.map(lambda leaf: leaf[own], batch) for batch in self._iterator)
        return _placed(rows, self._placement)

    def get_state(self) -> dict[str, Any]:
        if self._batches is not None:
            state = json.dumps(self._iterator.get_state(), default=operator.methodcaller("item"))
            self._position = json.loads(state)
        return {**super().get_state(), "grain": self._position}

    def set_state(self, state: Mapping[str, Any]) -> None:
        super().set_state(state)
        self._position = state.get("grain")

    def close(self) -> None:
        if self._batches is not None:
            self.get_state()
            self._iterator.close()
        super().close()


@takes(batch=COUNT, sharding=SHARDING | NONE, prefetch=NOT_BELOW_0)
def grain_stream(dataset: Any, *, batch: int, sharding: Sharding | None = None, prefetch: int = 2) -> Stream:
    """Batches of a grain dataset of single examples, each (inputs, targets) or any other tree of arrays.

    Of a `grain.MapDataset` each process reads its own rows only. A `grain.IterDataset` can't be entered at
    any place: each process reads it all and keeps its own rows. To shard one by process yourself, iterate
    over it and give `Checkpoints` the iterator; its position then belongs to that number of processes.

    Args:
        dataset: shuffled and repeated, not batched and not sliced by process.
        batch: examples a step, of all processes together; those left over at the end are dropped.
        sharding: of a batch; needed with several processes.
        prefetch: number of batches of a `MapDataset` to read ahead; 0 reads each when it is asked for. An
            `IterDataset` has grain's own ways of it.

    Raises:
        ConfigError: something else than a dataset, or a batch that is below 1 or not divided by the sharding.
        DataError: fewer examples than a batch takes; when read, examples that differ in shape.

    >>> import grain
    >>> dataset = grain.MapDataset.range(100).shuffle(seed=0).map(lambda x: (x, x % 10)).repeat()
    >>> stream = grain_stream(dataset, batch=4)
    >>> inputs, targets = next(stream)
    >>> inputs.shape, bool((inputs % 10 == targets).all())
    ((4,), True)
    >>> stream.get_state()["step"]
    1
    >>> stream.close()
    """
    if not is_grain(dataset):
        raise ConfigError(
            where="dataset", expected="a grain.MapDataset or grain.IterDataset", got=type(dataset).__name__
        )
    grain = _grain()
    if isinstance(dataset, grain.MapDataset):
        return _Read(_Map(dataset, batch), sharding, prefetch)
    return _Sequential(dataset, batch, sharding)
