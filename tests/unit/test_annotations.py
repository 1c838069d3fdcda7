"""Annotations that tools resolve: help in editors, `python -m pdoc mujax`, beartype."""

import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Iterator

import chex
import pytest

import mujax

DOORS = ["mujax", *(f"mujax.{module.name}" for module in pkgutil.iter_modules(mujax.__path__))]


def _callables(module: types.ModuleType) -> Iterator[tuple[str, object]]:
    """What a module exports, with the methods of its classes; a NamedTuple is made by its `__new__`."""
    for name, value in vars(module).items():
        if name.startswith("_") or not getattr(value, "__module__", "").startswith("mujax"):
            continue
        if inspect.isclass(value):
            yield name, value
            yield from (
                (f"{name}.{method}", getattr(value, method))
                for method, member in vars(value).items()
                if inspect.isfunction(member) or method == "__new__"
            )
        elif inspect.isfunction(value):
            yield name, value


def _unresolved(module: types.ModuleType) -> list[str]:
    found = []
    for name, value in _callables(module):
        try:
            typing.get_type_hints(value)
        except NameError as error:
            found.append(f"{name}: {error}")
    return found


@pytest.mark.parametrize("door", [door for door in DOORS if not door.endswith(("cli", "plot"))])
def test_annotations_resolve(door):
    module = importlib.import_module(door)
    assert list(_callables(module))
    assert _unresolved(module) == []


def test_one_that_does_not_resolve_is_found():
    """chex's tree refers to itself by a name that only chex knows."""

    def function(tree: chex.ArrayTree) -> None: ...

    module = types.ModuleType("made_up")
    function.__module__ = "mujax.made_up"
    vars(module)["function"] = function
    assert _unresolved(module) == ["function: name 'ArrayTree' is not defined"]
