"""Command-line options: definition, parsing and errors.

tyro is imported where it is used, so that a missing one is reported in a sentence; annotations are strings
until tyro reads them.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mujax.errors import ConfigError
from mujax.train import as_its_kind
from mujax.tune import number


def option(metavar: str, text: str, default: str | None = None, *, name: str | None = None) -> Any:
    """An option with its help text, and its default in words if these are not its value."""
    from tyro.conf import arg

    return arg(metavar=metavar, help=text, help_behavior_hint=default, name=name)


def positional() -> Any:
    """Marks an argument that is given without the option's name."""
    from tyro.conf import Positional

    return Positional


def group() -> Any:
    """Marks a block of options: the help text shows its field's name above them, not before each."""
    from tyro.conf import OmitArgPrefixes

    return OmitArgPrefixes


def numbers(kind: type[int] | type[float], many: bool = False) -> Any:
    """Reads one number or several, with an error that gives the expected form."""
    from tyro.constructors import PrimitiveConstructorSpec

    expected = "a whole number" if kind is int else "a number"

    def read(arguments: list[str]) -> Any:
        # Between several both spaces and commas.
        words = " ".join(arguments).replace(",", " ").split() if many else arguments
        try:
            values = tuple(kind(word) for word in words)
        except ValueError:
            raise ValueError(f"expected {expected}, got {' '.join(arguments)!r}") from None
        return values if many else values[0]

    return PrimitiveConstructorSpec(
        nargs="*" if many else 1,
        metavar="N",
        instance_from_str=read,
        is_instance=lambda _: True,
        str_from_instance=lambda value: [str(value)],
    )


# ---- the command line as a whole ------------------------------------------------------------------------


def parse(commands: Mapping[str, type], argv: Sequence[str] | None) -> Any:
    """The options of the given command.

    Args:
        commands: the dataclass of each command's options, by its name.
        argv: the command line; by default that of the process.

    Raises:
        ConfigError: an unknown command or option, or a value that cannot be read.
        SystemExit: help was asked for, and printed.
    """
    import tyro

    _refuse_repeated(sys.argv[1:] if argv is None else argv)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.extras.subcommand_cli_from_dict(
                dict(commands),
                prog="mujax",
                description="µP and hyperparameter transfer for JAX.",
                args=argv,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if stop.code:
            raise ConfigError(_one_line(printed.getvalue())) from None
        raise


def _refuse_repeated(words: Sequence[str]) -> None:
    """Refuses an option that is given twice: only the last would be read."""
    seen: set[str] = set()
    for word in words:
        name = word.partition("=")[0].replace("_", "-")
        if name.startswith("--") and name in seen:
            raise ConfigError(
                where=name, expected="it once", got="it twice", remedy="give all its values behind one"
            )
        seen.add(name)


def _one_line(message: str) -> str:
    """The text of tyro's box under its title, up to the first rule, as one sentence."""
    paragraphs: list[list[str]] = [[]]
    for line in message.replace("│", " ").splitlines():
        if re.fullmatch(r"\s*(╭.*|-{5,}|─{5,})\s*", line):
            paragraphs.append([])
        # Help texts are indented by ten, their options by less.
        elif not line.startswith(" " * 10):
            paragraphs[-1] += line.split()
    # Without Unicode the title is a paragraph of its own, else it is part of the frame.
    words = next((words for words in paragraphs[1:] if words), ["wrong arguments"])
    return f"{' '.join(words).rstrip('.')}; see mujax --help."


# ---- hyperparameters ------------------------------------------------------------------------------------


def value(text: str) -> Any:
    """A number, a power such as 2**-8 or 2^-8, true or false, or else the text itself.

    >>> value("2^-2"), value("16"), value("true"), value("linear")
    (0.25, 16, True, 'linear')
    """
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    found = number(text)
    return text if found is None else found


def _pairs(option: str, texts: Sequence[str], shape: str) -> dict[str, str]:
    """The text of each hyperparameter from NAME=TEXT.

    Raises:
        ConfigError: something else, or a name twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, sign, value_ = text.partition("=")
        if not sign or not name.isidentifier() or not value_:
            raise ConfigError(where=option, expected=shape, got=repr(text), remedy="put no spaces around '='")
        if name in found:
            raise ConfigError(
                where=option,
                expected="each hyperparameter once",
                got=f"{name!r} twice",
                remedy="leave one out",
            )
        found[name] = value_
    return found


def fixed(option: str, texts: Sequence[str]) -> dict[str, Any]:
    """Hyperparameters from NAME=VALUE.

    Raises:
        ConfigError: something else, or a name twice.
    """
    pairs = _pairs(option, texts, "NAME=VALUE, such as momentum=0.9")
    return {name: as_its_kind(name, value(text)) for name, text in pairs.items()}


def space(option: str, texts: Sequence[str]) -> dict[str, Any]:
    """A search space from NAME=LOW:HIGH, NAME=LOW:HIGH:log and NAME=VALUE,VALUE,...

    Raises:
        ConfigError: something else, or a name twice.
    """
    shape = "NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=VALUE,VALUE"
    found: dict[str, Any] = {}
    for name, text in _pairs(option, texts, f"{shape}, such as learning_rate=2**-12:2**-4:log").items():
        if ":" not in text:
            found[name] = [as_its_kind(name, value(word)) for word in text.split(",")]
            continue
        low, high, *rest = text.split(":")
        ends = [as_its_kind(name, value(low)), as_its_kind(name, value(high))]
        if rest not in ([], ["log"]) or any(type(end) not in (int, float) for end in ends):
            raise ConfigError(
                where=option,
                expected=f"{shape} with numbers",
                got=repr(f"{name}={text}"),
                remedy=f"write for instance {name}=2**-12:2**-4:log",
            )
        if float in map(type, ends):
            ends = [float(end) for end in ends]
        found[name] = {"low": ends[0], "high": ends[1], **({"log": True} if rest else {})}
    return found
