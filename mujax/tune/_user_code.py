"""Imports the user's own code by name, `package.module:attribute`."""

from __future__ import annotations

import importlib
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from mujax.errors import ConfigError, MujaxError


def summary_of(error: BaseException) -> str:
    """The kind of an error and the first line of its text."""
    first = str(error).strip().partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def imported(name: str, where: str, kind: str) -> Callable[..., Any]:
    """Imports a function of the user's.

    Args:
        name: `package.module:attribute`; the current folder is on the path.
        where: the option that gave it, for errors.
        kind: the expected kind of object, for errors.

    Raises:
        ConfigError: the module or attribute does not exist, its import fails, or it is not callable.
    """
    module_name, _, attribute = name.partition(":")
    # The console script's folder is first on the path, not the user's; `python -m` has it already.
    if "" not in sys.path and str(pathlib.Path.cwd()) not in sys.path:
        sys.path.insert(0, str(pathlib.Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(
            where=where,
            expected=f"a module {module_name!r} that can be imported from here",
            got=summary_of(error),
        ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise ConfigError(
            where=where,
            expected=f"{attribute!r} in {module_name!r} to be {kind}",
            got="no such name" if found is None else f"an object of type {type(found).__name__}",
        )
    return found


def build(
    name: str, factory: Callable[..., Any], width: int, where: str, **hparams: Any
) -> tuple[Any, tuple[Any, ...] | None]:
    """Builds the model of a width with a factory of the user's.

    Args:
        name: of the factory, for errors.
        factory: width -> the module, or the module and its inputs.
        width: of the model.
        where: the option that gave the factory, for errors.
        **hparams: passed to the factory.

    Returns:
        The model, and its inputs if the factory returns any.

    Raises:
        ConfigError: the factory raises, or returns something else.
        MujaxError: raised by the factory.
    """
    try:
        made = factory(width, **hparams)
    except MujaxError:
        raise
    except Exception as error:
        raise ConfigError(
            where=where, expected=f"{name} to build width {width}", got=summary_of(error)
        ) from error
    if not isinstance(made, tuple):
        return made, None
    if len(made) != 2:
        raise ConfigError(
            where=where,
            expected=f"{name} to return the module or (module, inputs)",
            got=f"{len(made)} values",
        )
    model, inputs = made
    return model, tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
