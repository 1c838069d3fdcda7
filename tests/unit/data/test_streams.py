"""Streams: the batches of the paths in memory, in pieces, from any position; what is refused."""

import itertools
import re

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mujax import data
from mujax.data._streams import _Images, _Map, _Text
from mujax.errors import ConfigError, DataError

KEY = jax.random.key(3)
TOKENS = np.random.default_rng(0).integers(0, 50, size=300).astype(np.uint16)
EXAMPLES = data.Examples(
    np.random.default_rng(1).normal(size=(10, 2, 2, 1)).astype(np.float32), np.arange(10, dtype=np.int32)
)
SEVERAL = grain.MapDataset.range(12).seed(5).shuffle().map(lambda x: (np.full(2, x, np.float32), x)).repeat()


def text(**options):
    return data.text_stream(TOKENS, KEY, batch=4, length=8, **options)


def images(**options):
    return data.image_stream(EXAMPLES, KEY, batch=4, **options)


def mapped(**options):
    return data.grain_stream(SEVERAL, batch=4, **options)


def iterated(**options):
    read = SEVERAL.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    dataset = grain.experimental.WindowShuffleIterDataset(read, window_size=5, seed=1)
    return data.grain_stream(dataset, batch=4, **options)


KINDS = {"text": text, "images": images, "grain map": mapped, "grain iter": iterated}


def take(stream, count):
    return [jax.tree.map(np.asarray, batch) for batch in itertools.islice(stream, count)]


def assert_same(ones, others):
    assert jax.tree.structure(ones) == jax.tree.structure(others)
    jax.tree.map(np.testing.assert_array_equal, ones, others)


def stacked(batches):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


# The order


def test_a_text_stream_draws_the_batches_of_memory():
    whole = data.text_batches(TOKENS, KEY, batch=4, length=8, steps=5)
    assert_same(stacked(take(text(), 5)), jax.tree.map(np.asarray, whole))
    other = data.text_stream(TOKENS, jax.random.key(4), batch=4, length=8, prefetch=0)
    assert not np.array_equal(next(other).inputs, whole.inputs[0])


def test_an_image_stream_draws_the_batches_of_memory():
    whole = data.image_batches(EXAMPLES, KEY, batch=4, steps=5)
    assert_same(stacked(take(images(), 5)), jax.tree.map(np.asarray, whole))


def test_a_grain_stream_is_the_dataset_in_batches():
    expected = [np.stack([SEVERAL[place][1] for place in range(4 * step, 4 * step + 4)]) for step in range(5)]
    assert_same([targets for _, targets in take(mapped(), 5)], expected)


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_reading_ahead_changes_nothing(make):
    assert_same(take(make(prefetch=0), 6), take(make(prefetch=3), 6))


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_a_stream_goes_on_from_its_position(make):
    whole = take(make(), 7)
    stream = make()
    take(stream, 3)
    position = stream.get_state()
    assert position["step"] == stream.step == 3
    stream.close()
    assert stream.get_state() == position
    again = make()
    again.set_state(position)
    assert again.get_state() == position
    assert_same(take(again, 4), whole[3:])
    # A stream that is under way can also be set back, and one that was closed goes on.
    again.set_state(position)
    assert_same(take(again, 4), whole[3:])
    assert_same(take(stream, 4), whole[3:])


@pytest.mark.parametrize(
    "source",
    [_Text(TOKENS, KEY, 4, 8, None), _Images(EXAMPLES, KEY, 4), _Map(SEVERAL, 4)],
    ids=["text", "images", "grain map"],
)
def test_rows_read_alone_are_those_of_the_whole_batch(source):
    """So two processes that read two halves see the batch that one process sees."""
    whole = source.read(3, np.arange(4))
    for rows in ([2], [0, 3]):
        assert_same(source.read(3, np.array(rows)), jax.tree.map(lambda leaf, rows=rows: leaf[rows], whole))


def test_a_finite_dataset_ends_and_drops_the_rest():
    stream = data.grain_stream(grain.MapDataset.range(10), batch=4)
    assert [batch.tolist() for batch in stream] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert stream.step == 2
    assert next(stream, None) is None


def test_values_come_in_the_dtypes_that_jax_computes_in():
    inputs, targets = next(data.grain_stream(SEVERAL.map(lambda pair: (pair[0] * 1.5, pair[1])), batch=2))
    assert (inputs.dtype, targets.dtype) == (jnp.float32, jnp.int32)


# What is refused


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: data.grain_stream([1, 2], batch=1),
            ConfigError,
            "expected a grain.MapDataset or .* got list",
        ),
        (
            lambda: data.grain_stream(SEVERAL, batch=0),
            ConfigError,
            "batch: expected a whole number of at least 1, got 0",
        ),
        (lambda: mapped(prefetch=-1), ConfigError, "prefetch: expected a whole number of at least 0, got -1"),
        (
            lambda: data.grain_stream(grain.MapDataset.range(3), batch=4),
            DataError,
            "batch: expected at most 3, the number of examples, got 4",
        ),
        (
            lambda: data.image_stream(EXAMPLES, KEY, batch=11),
            DataError,
            "batch: expected at most 10, the number of examples, got 11",
        ),
        (
            lambda: next(data.grain_stream(grain.MapDataset.range(9).filter(lambda x: x % 2), batch=2)),
            DataError,
            r"example 0: expected an example at every place .* give dataset\.to_iter_dataset\(\)",
        ),
        (
            lambda: next(
                data.grain_stream(grain.MapDataset.range(9).map(lambda x: np.zeros(x + 1)), batch=2)
            ),
            DataError,
            "grain dataset: expected examples of one structure and shape, got others",
        ),
        (
            lambda: next(text(vocab_size=40)),
            DataError,
            r"text, place \d+: expected tokens from 0 to 39, got 4\d; give the vocab_size=",
        ),
    ],
)
def test_a_wrong_stream_is_refused_in_one_sentence(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_right_vocabulary_is_not_refused():
    assert next(text(vocab_size=50)).inputs.shape == (4, 8)


def test_the_filtered_dataset_can_be_iterated_over():
    dataset = grain.MapDataset.range(9).filter(lambda x: x % 2 == 1).to_iter_dataset()
    assert [batch.tolist() for batch in data.grain_stream(dataset, batch=2)] == [[1, 3], [5, 7]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: data.text_stream(TOKENS, KEY, batch=2, length=8), "position in the data, batch: expected 2"),
        (
            lambda: data.text_stream(TOKENS[:99], KEY, batch=4, length=8),
            "data, tokens: expected 99, .* got 300",
        ),
        (lambda: data.text_stream(TOKENS, jax.random.key(1), batch=4, length=8), r"key: expected \[0, 1\]"),
        (mapped, "data, examples: expected .* got None"),
    ],
)
def test_a_position_in_other_data_is_refused(make, message):
    position = text().get_state()
    with pytest.raises(DataError, match=message):
        make().set_state(position)


def test_without_grain_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "grain", None)
    with pytest.raises(ConfigError, match=re.escape('pip install "mujax-mup[train]"')):
        text()
    assert not data.is_grain(SEVERAL)
