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

# How much of a value an error shows, and how near a name must be to a field's to be taken for a slip.
_SHOWN: Final = 200
_SLIP: Final = 0.8


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
    """The settings of a file by name, as they stand there: a dict that knows its file.

    - `.yaml`, `.yml`, `.json`: a mapping. A text such as `2**-8`, `2^-8`, `1e-3` or `0.5`, at any depth, is
      the float that it says; nothing is evaluated. A text of digits alone stays a text: as a number it would
      have no quotes.
    - `.py`: the file is run, its folder on the path, and each of its public names that is not a module is a
      setting, so that functions can be settings, too.

    Args:
        path: the file.

    Raises:
        ConfigError: the file can't be read, holds something else, or raises an error when it is run.

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
            f"{path}: expected one of the suffixes {', '.join(_READERS)}, found {path.suffix or 'none'}; "
            "give the file that of its kind."
        )
    try:
        values = reader(path, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        found = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"{path}: expected a text file of settings, found that it can't be read ({found}); "
            "give the path of one that can."
        ) from error
    except RecursionError as error:
        raise ConfigError(f"{path}: expected a mapping, found one nested without end; flatten it.") from error
    return Settings(values, path)


def _yaml(path: pathlib.Path, text: str) -> dict[str, Any]:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{path}: expected the package pyyaml, which reads YAML, but it is not installed; "
            'install it with `pip install "mujax-mup[cli]"`.'
        ) from error
    try:
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise _unreadable(path, "YAML", line, error.problem or "something else") from error
    # A control character; and a value that is not what its explicit tag says raises what it likes.
    except (yaml.YAMLError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise _unreadable(path, "YAML", 1, summary_of(error)) from error
    # All commented out is as good as nothing set.
    return _mapping(path, {} if values is None else values)


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
    return ConfigError(f"{path}: expected {kind}, found at line {line}: {found}; mend it there.")


def _mapping(path: pathlib.Path, values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: expected names with their values, found {type(values).__name__}; "
            "write one `name: value` for each setting."
        )
    for name in values:
        if not isinstance(name, str):
            raise ConfigError(
                f"{path}: expected the name of a setting, found {name!r}; quote it if it is a name."
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
    # Its own folder first, as where Python runs a script, so that it can import what is beside it.
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
            f"{path}: expected a Python file that runs, got at line {at} {summary_of(error)}; mend it there."
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

    Values are brought to the kinds of the fields: a list becomes a tuple, a whole number a float, and a float
    without a fraction (`2**10`, `1e3`) a whole number. A path in a file is relative to the file's folder, one
    on the command line to the current folder. In a Python file, functions, classes and upper-case names that
    are no fields are helpers of the file, unless they look like a slip for a field that it does not set.

    Args:
        cls: the dataclass.
        settings: what `read` gave.
        given: options by name; those that are None were not given.

    Raises:
        ConfigError: a setting that there is not, a value of the wrong kind, or a field without a value.

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
            raise ConfigError(f"{field.name}: expected a value, found none{_in(file)}; give one.")
    return cls(**values)


def _in(file: pathlib.Path | None) -> str:
    return "" if file is None else f" in {file}"


def _unknown(name: str, fields: Iterable[str], file: pathlib.Path | None) -> ConfigError:
    near = difflib.get_close_matches(name.lower(), fields, n=1)
    remedy = f"the nearest is {near[0]}" if near else f"there are {', '.join(fields)}"
    return ConfigError(f"{name}: expected the name of a setting, found an unknown one{_in(file)}; {remedy}.")


def _is_helper(name: str, settings: Mapping[str, Any], kinds: Mapping[str, Any]) -> bool:
    value = settings[name]
    if not (callable(value) or name.isupper()):
        return False
    # A function `losss` where there is no `loss` is a slip; a class `Model` is no slip for a text `mode`.
    near = difflib.get_close_matches(name.lower(), kinds, n=len(kinds), cutoff=_SLIP)
    return not any(field not in settings and _fits(value, kinds[field]) for field in near)


# ---- the kinds of fields --------------------------------------------------------------------------------


class _WrongKindError(Exception):
    """The value is not of the kind that is tried; another may fit."""


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
        raise ConfigError(f"{name}: expected {_called(kind)}, got {found}{_in(file)}.") from None


def _brought(value: Any, kind: Any, folder: pathlib.Path | None) -> Any:
    """The value as one of that kind, where `folder` is what a path is relative to."""
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
        # Of a user that there is not, it is a name like any other.
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


# What a kind is called, alone and in a list.
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
