"""Token files: what is read of them, and what is refused."""

import jax
import numpy as np
import pytest

from mujax import data
from mujax.errors import ConfigError, DataError

KEY = jax.random.key(0)
TOKENS = np.random.default_rng(0).integers(0, 500, size=20_000).astype(np.uint16)


@pytest.mark.parametrize("name", ["tokens.npy", "tokens.bin"])
def test_batches_are_those_of_memory_and_the_file_is_mapped(name, tmp_path):
    np.save(tmp_path / name, TOKENS) if name.endswith("npy") else TOKENS.tofile(tmp_path / name)
    own = data.token_file(tmp_path / name)
    assert isinstance(own.train, np.memmap)
    assert isinstance(own.valid, np.memmap)
    assert own.vocab_size == 2**16
    train, valid = TOKENS[:18_000], TOKENS[18_000:]
    np.testing.assert_array_equal(own.valid, valid)
    expected = data.text_batches(train, KEY, batch=3, length=16, steps=2)
    stream = data.text_stream(own.train, KEY, batch=3, length=16)
    for step in range(2):
        found = next(stream)
        np.testing.assert_array_equal(found.inputs, expected.inputs[step])
        np.testing.assert_array_equal(found.targets, expected.targets[step])


def test_the_vocabulary_of_the_whole_file_is_that_of_load(tmp_path):
    np.save(tmp_path / "t.npy", TOKENS)
    own = data.token_file(tmp_path / "t.npy", vocab_size=int(TOKENS.max()) + 1)
    np.testing.assert_array_equal(own.train, data.load(tmp_path / "t.npy").train)
    assert own.vocab_size == data.load(tmp_path / "t.npy").vocab_size


def resident():
    """Bytes of this process in memory."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def test_a_text_larger_than_memory_is_never_read_whole(tmp_path):
    """2^38 tokens, half a terabyte, of which the file system stores none that was not written."""
    path, size = tmp_path / "huge.bin", 2**38
    with path.open("wb") as file:
        file.truncate(2 * size)
    before = resident()
    own = data.token_file(path)
    assert len(own.train) + len(own.valid) == size
    stream = data.text_stream(own.train, KEY, batch=4, length=8)
    assert not next(stream).inputs.any()
    assert resident() - before < 2**28


class _Places:
    """A text whose tokens are their places, in units of 2^32."""

    def __init__(self, size):
        self.size, self.shape, self.dtype = size, (size,), np.dtype(np.int64)

    def __len__(self):
        return self.size

    def __getitem__(self, places):
        assert places.dtype == np.int64
        assert 0 <= places.min() <= places.max() < self.size
        return places >> 32


def test_places_are_drawn_from_the_whole_of_a_long_text():
    """More of them than an int32 holds."""
    found = next(data.text_stream(_Places(2**38), KEY, batch=64, length=2, prefetch=0)).inputs
    counts = np.bincount(np.asarray(found[:, 0]) // 16, minlength=4)
    assert counts.sum() == 64
    assert counts.min() > 6


@pytest.mark.parametrize(
    ("write", "options", "error", "message"),
    [
        (None, {}, DataError, r"t\.bin: expected a file of raw tokens, got an error \(No such file"),
        (b"x" * 30_001, {}, DataError, "expected raw tokens of 2 bytes each, got 30,001 bytes"),
        (b"", {}, DataError, "expected a text of at least 10,000 tokens, got 0"),
        (b"x" * 100, {}, DataError, "expected a text of at least 10,000 tokens, got 50"),
        (b"x" * 40_000, {"dtype": "uint32"}, ConfigError, "vocab_size: expected the number .* uint32"),
        (b"x" * 40_000, {"dtype": "float16"}, ConfigError, "dtype: expected a type of whole numbers"),
        (b"x" * 40_000, {"dtype": "words"}, ConfigError, "dtype: expected a type of whole numbers"),
        (
            b"x" * 40_000,
            {"vocab_size": 0},
            ConfigError,
            "vocab_size: expected a whole number of at least 1 or None, got 0",
        ),
    ],
)
def test_a_wrong_raw_file_is_refused(write, options, error, message, tmp_path):
    if write is not None:
        (tmp_path / "t.bin").write_bytes(write)
    with pytest.raises(error, match=message):
        data.token_file(tmp_path / "t.bin", **options)


def test_a_wrong_npy_file_is_refused(tmp_path):
    path = tmp_path / "t.npy"
    with pytest.raises(DataError, match="No such file"):
        data.token_file(path)
    np.save(path, np.zeros((100, 200), np.uint16))
    with pytest.raises(DataError, match=r"whole numbers of shape \(n,\), got uint16 of shape \(100, 200\)"):
        data.token_file(path)
    np.save(path, np.zeros(20_000))
    with pytest.raises(DataError, match="got float64"):
        data.token_file(path)
    np.save(path, TOKENS)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"expected an \.npy file of the tokens"):
        data.token_file(path)


def test_a_negative_token_is_found_where_it_is_read(tmp_path):
    np.save(tmp_path / "t.npy", np.full(20_000, -1, np.int16))
    own = data.token_file(tmp_path / "t.npy", vocab_size=10)
    with pytest.raises(DataError, match="expected tokens from 0 to 9, got -1"):
        next(data.text_stream(own.train, KEY, batch=2, length=4, vocab_size=10))
