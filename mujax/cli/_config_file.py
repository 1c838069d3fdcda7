"""Settings for a command from a file: YAML, JSON or Python, checked against the fields of a dataclass."""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import difflib
import json
import numbers
import os
import pathlib
import runpy
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, TypeVar

from mujax.errors import ConfigError
from mujax.tune import number, summary_of

T = TypeVar("T")

# How much of a value an error shows, and how near a name must be to a field's to count as misspelled.
_SHOWN: Final = 200
_SLIP: Final = 0.8

# Values of a YAML file, aliases written out: a few lines of aliases of aliases are billions.
_MOST_VALUES: Final = 100_000


class Settings(dict[str, Any]):
    """The settings of a file by name.

    Attributes:
        file: where they were read.
    """

    def __init__(self, values: Mapping[str, Any], file: pathlib.Path) -> None:
        super().__init__(values)
        self.file = file


# ---- reading a file -------------------------------------------------------------------------------------


def read(path: str | os.PathLike[str]) -> Settings:
    """Reads the settings of a file by name: a dict that knows its file.

    - `.yaml`, `.yml`, `.json`: a mapping. A text such as `2**-8`, `2^-8`, `1e-3` or `0.5`, at any depth,
      becomes a float; nothing is evaluated. A text of digits alone stays a text: as a number it would have no
      quotes.
    - `.py`: the file is run, its folder on the path, and each of its public names that is not a module is a
      setting, so that functions can be settings, too.

    Args:
        path: the file.

    Raises:
        ConfigError: the file cannot be read, holds something else, or raises an error when it is run.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder) / "tune.json"
    ...     _ = file.write_text('{"steps": 100, "learning_rate": ["2**-10", "2**-4"]}')
    ...     read(file)
    {'steps': 100, 'learning_rate': [0.0009765625, 0.0625]}
    """
    path = pathlib.Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(
            where=path,
            expected=f"one of the suffixes {', '.join(_READERS)}",
            got=path.suffix or "none",
            remedy="give the file that of its kind",
        )
    try:
        values = reader(path, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            where=path,
            expected="a text file of settings",
            got=f"one that can't be read ({reason})",
            remedy="give the path of one that can",
        ) from error
    except RecursionError as error:
        raise ConfigError(
            where=path, expected="a mapping", got="one nested without end", remedy="flatten it"
        ) from error
    return Settings(values, path)


def _yaml(path: pathlib.Path, text: str) -> dict[str, Any]:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ConfigError(
            where=path,
            expected="the package pyyaml, which reads YAML",
            got="none installed",
            remedy='pip install "mujax-mup[cli]"',
        ) from error

    class Loader(yaml.SafeLoader):
        def get_single_node(self) -> Any:
            node = super().get_single_node()
            if node is not None and (count := _written_out(node)) > _MOST_VALUES:
                raise ConfigError(
                    where=path,
                    expected=f"at most {_MOST_VALUES:,} values, aliases written out",
                    got=f"{count:,}" if count < 10**15 else "more than 10^15",
                    remedy="write the settings without aliases of aliases",
                )
            return node

    try:
        # A SafeLoader.
        values = yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise _unreadable(path, "YAML", line, error.problem or "something else") from error
    except ConfigError:
        raise
    # A control character; and a value that its explicit tag does not fit raises any of these.
    except (yaml.YAMLError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise _unreadable(path, "YAML", 1, summary_of(error)) from error
    # A file in which all is commented out sets nothing.
    return _mapping(path, {} if values is None else values)


def _written_out(root: Any) -> int:
    """How many values a YAML document has once each alias is replaced by what it stands for."""
    counts: dict[int, int | None] = {}

    def count(node: Any) -> int:
        if id(node) not in counts:
            counts[id(node)] = None
            inside = node.value if isinstance(node.value, list) else []
            flat = [part for entry in inside for part in (entry if isinstance(entry, tuple) else (entry,))]
            counts[id(node)] = 1 + sum(map(count, flat))
        known = counts[id(node)]
        if known is None:
            raise RecursionError("an alias inside of its own anchor")
        return known

    return count(root)


def _json(path: pathlib.Path, text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise _unreadable(path, "JSON", error.lineno, error.msg) from error
    except ValueError as error:
        # A number of thousands of digits.
        raise _unreadable(path, "JSON", 1, summary_of(error)) from error
    return _mapping(path, values)


def _unreadable(path: pathlib.Path, kind: str, line: int, found: str) -> ConfigError:
    return ConfigError(where=path, expected=kind, got=f"at line {line}: {found}", remedy="correct it there")


def _mapping(path: pathlib.Path, values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ConfigError(
            where=path,
            expected="names with their values",
            got=type(values).__name__,
            remedy="write one `name: value` for each setting",
        )
    for name in values:
        if not isinstance(name, str):
            raise ConfigError(
                where=path,
                expected="the name of a setting",
                got=repr(name),
                remedy="quote it if it is a name",
            )
    return _with_numbers(values)


def _with_numbers(value: Any) -> Any:
    """The value with number texts replaced: YAML 1.1 takes 1e-3, which has no point, for a text."""
    if isinstance(value, dict):
        return {key: _with_numbers(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_with_numbers(entry) for entry in value]
    # A text of digits alone, or with spaces at its ends, was quoted for a reason: a folder named "2024" is no
    # number.
    if not isinstance(value, str) or value != value.strip() or value.lstrip("+-").isdigit():
        return value
    found = number(value)
    return value if found is None else float(found)


def _python(path: pathlib.Path, _: str) -> dict[str, Any]:
    file = str(path.absolute())
    # Its own folder first, as when Python runs a script, so that it can import the modules beside it.
    folder = str(path.absolute().parent)
    sys.path.insert(0, folder)
    try:
        names = runpy.run_path(file, run_name=path.stem)
    except (Exception, SystemExit) as error:
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file
        ]
        line = error.lineno if isinstance(error, SyntaxError) and error.filename == file else None
        at = line or (lines[-1] if lines else None) or 1
        raise ConfigError(
            where=path,
            expected="a Python file that runs",
            got=f"at line {at} {summary_of(error)}",
            remedy="correct it there",
        ) from error
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
    return {name: value for name, value in names.items() if _is_setting(name, value)}


def _is_setting(name: str, value: Any) -> bool:
    # `from __future__ import annotations` leaves a name behind, too.
    hidden = isinstance(value, types.ModuleType) or type(value).__module__ == "__future__"
    return not (name.startswith("_") or hidden)


_READERS: Final[Mapping[str, Callable[[pathlib.Path, str], dict[str, Any]]]] = {
    ".yaml": _yaml,
    ".yml": _yaml,
    ".json": _json,
    ".py": _python,
}

# ---- filling a dataclass --------------------------------------------------------------------------------


def filled(cls: type[T], settings: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> T:
    """A dataclass from the settings of a file, overridden by options of the command line.

    Values are converted to the types of the fields: a list becomes a tuple, a whole number a float, and a
    float without a fraction (`2**10`, `1e3`) a whole number. A path in a file is relative to the file's
    folder, one on the command line to the current folder. In a Python file, functions, classes and upper-case
    names that are not fields are helpers of the file, unless they look like a misspelled field that it does
    not set.

    Args:
        cls: the dataclass.
        settings: the result of `read`.
        given: options by name; those that are None were not given.

    Raises:
        ConfigError: an unknown setting, a value of the wrong type, or a field without a value.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Config:
    ...     steps: int
    ...     widths: tuple[int, ...] = (64,)
    >>> filled(Config, {"steps": 1e3, "widths": [32, 64]}, {"steps": 10})
    Config(steps=10, widths=(32, 64))
    """
    fields = [field for field in dataclasses.fields(typing.cast(Any, cls)) if field.init]
    hints = typing.get_type_hints(cls)
    kinds = {field.name: hints[field.name] for field in fields}
    file = settings.file if isinstance(settings, Settings) else None
    values: dict[str, Any] = {}
    for name, value in settings.items():
        if name in kinds:
            values[name] = _as_kind(name, value, kinds[name], file)
        elif file is None or file.suffix.lower() != ".py" or not _is_helper(name, settings, kinds):
            raise _unknown(name, kinds, file)
    for name, value in (given or {}).items():
        if name not in kinds:
            raise _unknown(name, kinds, None)
        if value is not None:
            values[name] = _as_kind(name, value, kinds[name], None)
    for field in fields:
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            raise ConfigError(where=field.name, expected="a value", got=f"none{_in(file)}", remedy="give one")
    return cls(**values)


def _in(file: pathlib.Path | None) -> str:
    return "" if file is None else f" in {file}"


def _unknown(name: str, fields: Iterable[str], file: pathlib.Path | None) -> ConfigError:
    near = difflib.get_close_matches(name.lower(), fields, n=1)
    remedy = f"the nearest is {near[0]}" if near else f"there are {', '.join(fields)}"
    return ConfigError(
        where=name, expected="the name of a setting", got=f"an unknown one{_in(file)}", remedy=remedy
    )


def _is_helper(name: str, settings: Mapping[str, Any], kinds: Mapping[str, Any]) -> bool:
    value = settings[name]
    if not (callable(value) or name.isupper()):
        return False
    # A function `losss` without a `loss` is misspelled; a class `Model` is not a misspelled text `mode`.
    near = difflib.get_close_matches(name.lower(), kinds, n=len(kinds), cutoff=_SLIP)
    return not any(field not in settings and _fits(value, kinds[field]) for field in near)


# ---- the types of fields --------------------------------------------------------------------------------


class _WrongKindError(Exception):
    """The value is not of the type that is tried; another may fit."""


def _fits(value: Any, kind: Any) -> bool:
    try:
        _brought(value, kind, None)
    except _WrongKindError:
        return False
    return True


def _as_kind(name: str, value: Any, kind: Any, file: pathlib.Path | None) -> Any:
    try:
        return _brought(value, kind, None if file is None else file.absolute().parent)
    except _WrongKindError:
        found = " ".join(repr(value).split())
        found = found if len(found) <= _SHOWN else found[:_SHOWN] + "…"
        raise ConfigError(where=name, expected=_called(kind), got=f"{found}{_in(file)}") from None


def _brought(value: Any, kind: Any, folder: pathlib.Path | None) -> Any:
    """The value as one of that type; a path is relative to `folder`."""
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for member in arguments:
            with contextlib.suppress(_WrongKindError):
                return _brought(value, member, folder)
        raise _WrongKindError
    if origin is typing.Literal:
        return _needed(value, value in arguments)
    if origin is tuple:
        _needed(value, isinstance(value, list | tuple | range))
        return tuple(_brought(entry, arguments[0], folder) for entry in value)
    if origin is pathlib.Path:
        path = pathlib.Path(_needed(value, isinstance(value, str | pathlib.Path)))
        # With the home of an unknown user, it is a name like any other.
        with contextlib.suppress(RuntimeError):
            path = path.expanduser()
        return path if folder is None else folder / path
    if origin in (int, float):
        # NumPy's numbers are numbers, too.
        _needed(value, isinstance(value, numbers.Real) and not isinstance(value, bool))
        try:
            return origin(_needed(value, origin is float or value == value // 1))
        except OverflowError:
            raise _WrongKindError from None
    return _needed(
        value, callable(value) if origin is collections.abc.Callable else isinstance(value, origin)
    )


def _needed(value: Any, fits: bool) -> Any:
    if not fits:
        raise _WrongKindError
    return value


# The names of types, of one value and of several.
_CALLED: Final[Mapping[Any, tuple[str, str]]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    str: ("a text", "texts"),
    pathlib.Path: ("a path", "paths"),
    tuple: ("a list", "lists"),
    collections.abc.Mapping: ("a mapping", "mappings"),
    collections.abc.Callable: ("a function", "functions"),
    type(None): ("nothing", "nothing"),
}


def _called(kind: Any, many: bool = False) -> str:
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_called(member, many) for member in arguments)
    if origin is typing.Literal:
        return " or ".join(map(repr, arguments))
    if origin is tuple:
        return f"{_CALLED[tuple][many]} of {_called(arguments[0], many=True)}"
    return _CALLED.get(origin, (origin.__name__,) * 2)[many]
