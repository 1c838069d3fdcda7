"""Imports the user's own code by name, `package.module:attribute`."""

from __future__ import annotations

import importlib
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from mujax.errors import ConfigError, MujaxError


def said(error: BaseException) -> str:
    """The kind of an error and the first line of its text."""
    first = str(error).strip().partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def imported(name: str, what: str, kind: str) -> Callable[..., Any]:
    """A function of the user's.

    Args:
        name: `package.module:attribute`, where the current folder is on the path.
        what: the option that gave it, for errors.
        kind: what it should be, for errors.

    Raises:
        ConfigError: there is no such module or attribute, importing it fails, or it can't be called.
    """
    module_name, _, attribute = name.partition(":")
    # The console script's folder is first on the path, not the user's; `python -m` has it already.
    if "" not in sys.path and str(pathlib.Path.cwd()) not in sys.path:
        sys.path.insert(0, str(pathlib.Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(
            f"{what}: expected a module {module_name!r} that can be imported from here, got {said(error)}."
        ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        instead = "no such name" if found is None else f"an object of type {type(found).__name__}"
        raise ConfigError(f"{what}: expected {attribute!r} in {module_name!r} to be {kind}, found {instead}.")
    return found


def build(
    name: str, factory: Callable[..., Any], width: int, what: str, **given: Any
) -> tuple[Any, tuple[Any, ...] | None]:
    """What a factory makes of a width: the model and its inputs, if it gives any.

    Raises:
        ConfigError: it raises, or returns more than that.
        MujaxError: its own.
    """
    try:
        made = factory(width, **given)
    except MujaxError:
        raise
    except Exception as error:
        raise ConfigError(f"{what}: expected {name} to build width {width}, got {said(error)}.") from error
    if not isinstance(made, tuple):
        return made, None
    if len(made) != 2:
        raise ConfigError(
            f"{what}: expected {name} to return the module or (module, inputs), got {len(made)} values."
        )
    model, inputs = made
    return model, tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
