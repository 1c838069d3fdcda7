"""The user's own files: text, `.npz`, `.npy` and IDX."""

from __future__ import annotations

import contextlib
import gzip
import io
import math
import os
import pathlib
import re
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np

from mujax._arguments import PATH, takes
from mujax.data._splits import (
    HELD_OUT,
    MIN_EXAMPLES,
    Data,
    ExampleData,
    Examples,
    TextData,
    need_text,
    shuffled_split,
    standardised,
    text_data,
)
from mujax.errors import DataError

_INT32: Final = np.iinfo(np.int32)


def read_bytes(path: pathlib.Path, kind: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            where=path,
            expected=f"{kind} to read",
            got=f"an error ({error.strerror})",
            remedy="give the path of an existing file",
        ) from error


def _read(path: pathlib.Path) -> bytes:
    raw = read_bytes(path, "a text file")
    need_text(path, len(raw), "bytes")
    return raw


_PAIRS: Final = (("inputs", "targets"), ("x", "y"), ("images", "labels"))


_TRAIN: Final = ("", "_train")


_VALID: Final = ("_valid", "_val", "_test")


_IDX: Final = re.compile(r"[-.]idx[0-9]-ubyte(\.gz)?$")


_IDX_FOLDER: Final = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


_GZIP: Final = b"\x1f\x8b"
_NPY: Final = b"\x93NUMPY"
_ZIP: Final = b"PK"


# Binary formats that would be read as a text, since any bytes can be.
_NO_TEXT: Final = {_GZIP: "a gzip file", b"PK\x03\x04": "a zip file", b"\x93NUMPY": "a NumPy array"}


class _Part(NamedTuple):
    """Examples as stored in a file, and their names there."""

    inputs: np.ndarray
    targets: np.ndarray
    inputs_name: str
    targets_name: str


@takes(path=PATH)
def load(path: str | os.PathLike[str]) -> Data:
    """The user's own data: labelled examples, or a text as tokens. The path determines the format.

    - `.npz`: arrays `inputs` and `targets`, `x` and `y`, or `images` and `labels`, or these with `_train`
      behind both; those with `_valid`, `_val` or `_test` behind both are held out.
    - `train-images-idx3-ubyte`, `.gz` or not: the format of MNIST; labels are in the file beside it that has
      `labels-idx1` in its name.
    - a folder: the four files of MNIST, of which `train` is trained on and `t10k` held out.
    - `.npy`: the tokens of a text, whole numbers from 0 up.
    - any other file: a text, byte by byte, as by `text`.

    A file without held-out data is split, and the last tenth held out: examples after a shuffle by a fixed
    seed, a text in its order. uint8 inputs of three or more axes are images: they are standardised by mean
    and standard deviation of the training part, and gray ones get a channel axis. Other inputs are taken as
    they are. Whole-number targets are labels, floats are targets of a regression. Pickled objects are never
    read.

    Args:
        path: the file or folder.

    Returns:
        Floats as float32, whole numbers as int32; a text in the smallest dtype that holds its tokens.

    Raises:
        DataError: the file does not exist, is damaged or too short, or has another format than its name.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/own.npz", x=np.zeros((30, 5)), y=np.arange(30) % 3)
    ...     own = load(f"{folder}/own.npz")
    >>> own.train.inputs.shape, own.valid.inputs.shape, own.n_classes
    ((27, 5), (3, 5), 3)
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise DataError(
            where=path,
            expected="a file or folder of data",
            got="none",
            remedy="give an existing path",
        )
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
                where=path,
                expected="a text",
                got=found,
                remedy="unpack it, or give it the name of its kind (.npz, .npy, -images-idx3-ubyte.gz)",
            )
    return text_data(np.frombuffer(raw, np.uint8), vocab_size=256)


def _example_data(path: pathlib.Path, train: _Part, valid: _Part | None) -> ExampleData:
    if valid is None:
        whole = _checked(path, train, at_least=MIN_EXAMPLES)
        parts = shuffled_split(whole, round(len(whole.targets) * HELD_OUT))
    else:
        parts = _checked(path, train), _checked(path, valid)
        for name, here, there in zip(valid[2:], *parts, strict=True):
            if (here.dtype, here.shape[1:]) != (there.dtype, there.shape[1:]):
                raise DataError(
                    where=path,
                    expected=f"{name} to be like those to train on, {here.dtype} of shape {here.shape[1:]} "
                    "an example",
                    got=f"{there.dtype} of shape {there.shape[1:]}",
                    remedy="make them alike",
                )
    labels = [part.targets for part in parts]
    n_classes = int(max(map(np.max, labels))) + 1 if labels[0].dtype == np.int32 else None
    images = parts[0].inputs
    if images.dtype == np.uint8:
        if images.min() == images.max():
            raise DataError(
                where=path,
                expected=f"images in {train.inputs_name}",
                got=f"every pixel to be {images.max()}",
                remedy="give others",
            )
        parts = standardised(*parts)
    return ExampleData(*parts, n_classes=n_classes)


def _checked(path: pathlib.Path, part: _Part, at_least: int = 1) -> Examples:
    inputs, targets, inputs_name, targets_name = part
    for name, array in ((inputs_name, inputs), (targets_name, targets)):
        if not array.ndim or not array.size:
            raise DataError(
                where=path,
                expected=f"examples along the first axis of {name}",
                got=f"the shape {array.shape}",
                remedy="give an array of one axis or more, none of them empty",
            )
    if len(inputs) != len(targets):
        raise DataError(
            where=path,
            expected=f"as many examples in {targets_name} as in {inputs_name}",
            got=f"{len(targets):,} and {len(inputs):,}",
            remedy="give each input its target",
        )
    if len(inputs) < at_least:
        raise DataError(
            where=path,
            expected=f"at least {at_least} examples in {inputs_name}, so that some can be held out",
            got=len(inputs),
            remedy="give more",
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
        # A number too large for float32 becomes infinite, and is reported below.
        with np.errstate(over="ignore"):
            floats = array.astype(np.float32)
        _all_good(path, f"finite numbers in {name}", floats, np.isfinite(floats))
        return floats
    if array.dtype.kind not in "biu":
        raise DataError(
            where=path,
            expected=f"numbers in {name}",
            got=array.dtype,
            remedy="save real numbers",
        )
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
        where=path,
        expected=kind,
        got=f"{value} in {place} {places[0]}{others}",
        remedy="correct it, or leave it out",
    )


# How pickles begin, of protocol 2 and later.
_PICKLES: Final = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))

# Errors of `numpy.load` on a file that is incomplete or not NumPy's. An unknown compression is a
# RuntimeError, a header that is no Python literal a TokenError.
NUMPY_RAISES: Final = (
    *(OSError, ValueError, EOFError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)


@contextlib.contextmanager
def _by_numpy(path: pathlib.Path, kind: str, raw: bytes) -> Iterator[None]:
    try:
        yield
    except NUMPY_RAISES as error:
        message = str(error).partition("\n")[0].rstrip(".")
        # NumPy takes any bytes without a known magic number for a pickle, and advises loading it.
        found = "Python objects, which may run code" if "pickle" in message else f"something else ({message})"
        if "pickle" in message and not raw.startswith((_NPY, _ZIP, *_PICKLES)):
            found = "bytes of no format of NumPy's"
        raise DataError(
            where=path,
            expected=kind,
            got=found,
            remedy="save it by NumPy as plain numbers",
        ) from error


def _npz(path: pathlib.Path) -> ExampleData:
    kind = "a whole .npz file of arrays"
    raw = read_bytes(path, kind)
    with _by_numpy(path, kind, raw):
        archive = np.load(io.BytesIO(raw), allow_pickle=False)
    if isinstance(archive, np.ndarray):
        raise DataError(
            where=path,
            expected=kind,
            got="a single array",
            remedy="save inputs and targets by np.savez",
        )

    def part(pair: tuple[str, str]) -> _Part:
        with _by_numpy(path, kind, raw):
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
                where=path,
                expected="one pair of arrays to train on, "
                f"{', '.join(f'{inputs} and {targets}' for inputs, targets in _PAIRS)} (or with "
                "_train behind both)",
                got=", ".join(archive.files) or "none",
                remedy="rename them",
            )
        return _example_data(path, part(train[0]), part(valid[0]) if valid else None)


def _npy(path: pathlib.Path) -> TextData:
    kind = "the tokens of a text, whole numbers of shape (n,)"
    # Not by the path: on a damaged file NumPy leaves it open.
    raw = read_bytes(path, kind)
    with _by_numpy(path, kind, raw):
        tokens = np.load(io.BytesIO(raw), allow_pickle=False)
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        found = (
            f"{tokens.dtype} of shape {tokens.shape}" if isinstance(tokens, np.ndarray) else "an .npz file"
        )
        raise DataError(
            where=path,
            expected=kind,
            got=found,
            remedy="save labelled examples as an .npz file of inputs and targets",
        )
    need_text(path, len(tokens), "tokens")
    fit = (tokens >= 0) & (tokens < _INT32.max)
    _all_good(path, "tokens from 0 up that fit int32", tokens, fit, place="place")
    largest = int(tokens.max())
    return text_data(tokens.astype(np.min_scalar_type(largest)), vocab_size=largest + 1)


def _idx_folder(folder: pathlib.Path) -> ExampleData:
    found = {name: _idx_file(folder, f"{name}-ubyte") for name in _IDX_FOLDER}
    missing = [f"{name}-ubyte" for name, file in found.items() if file is None]
    if missing:
        raise DataError(
            where=folder,
            expected=f"a folder with {', '.join(f'{name}-ubyte' for name in found)} (.gz or not)",
            got=f"no {', '.join(missing)}",
            remedy="put them there, or give the path of a single file",
        )
    images, labels, held_out_images, held_out_labels = (file for file in found.values() if file is not None)
    return _example_data(folder, _idx_part(images, labels), _idx_part(held_out_images, held_out_labels))


def _idx_file(folder: pathlib.Path, name: str) -> pathlib.Path | None:
    # Both spellings are in use, and some browsers unpack a download.
    spellings = (name, name.replace("-idx", ".idx"))
    files = (folder / (spelling + gz) for spelling in spellings for gz in ("", ".gz"))
    return next((file for file in files if file.is_file()), None)


def _labels_of(images: pathlib.Path) -> pathlib.Path:
    if not ("images" in images.name and "idx3" in images.name):
        raise DataError(
            where=images,
            expected="the images of a pair of IDX files, a name like train-images-idx3-ubyte",
            got="another name",
            remedy="give the path of the images",
        )
    name = images.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    labels = _idx_file(images.parent, name)
    if labels is None:
        raise DataError(
            where=images,
            expected=f"its labels beside it in {name} (.gz or not)",
            got="no such file",
            remedy="put it there",
        )
    return labels


def _idx_part(images: pathlib.Path, labels: pathlib.Path) -> _Part:
    return _Part(_idx_array(images, axes=3), _idx_array(labels, axes=1), images.name, labels.name)


def _idx_array(path: pathlib.Path, axes: int) -> np.ndarray:
    raw = read_bytes(path, "an IDX file")
    if raw.startswith(_GZIP):
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                where=path,
                expected="a whole gzip file",
                got=f"another one ({error})",
                remedy="fetch it again",
            ) from error
    # Two zero bytes, the code of uint8, the number of axes; the sizes follow.
    magic = bytes([0, 0, 8, axes])
    if raw[:4] != magic:
        raise DataError(
            where=path,
            expected=f"an IDX file of bytes with {axes} axes, magic number 0x{magic.hex()}",
            got=f"0x{raw[:4].hex()}",
            remedy="give a file of this format",
        )
    shape = tuple(int.from_bytes(raw[4 * axis : 4 * axis + 4], "big") for axis in range(1, axes + 1))
    start = 4 * (axes + 1)
    if len(raw) != start + math.prod(shape):
        raise DataError(
            where=path,
            expected=f"{start + math.prod(shape):,} bytes, as for the shape {shape} at its head",
            got=f"{len(raw):,}",
            remedy="fetch it again",
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)
