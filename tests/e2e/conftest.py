"""The figures of the paper, for the tests of them."""

import importlib
import pathlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest


class Paper:
    """`benchmarks.paper`, and its modules as attributes."""

    def main(self, argv: list[str]) -> int:
        return importlib.import_module("benchmarks.paper.__main__").main(argv)

    def figure(self, name: str) -> Any:
        return importlib.import_module("benchmarks.paper").figure(name)

    def __getattr__(self, name: str) -> ModuleType:
        return importlib.import_module(f"benchmarks.paper.{name}")


@pytest.fixture(scope="module")
def paper() -> Iterator[Paper]:
    """The package, which is not installed: it is found from the repository's root."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(pathlib.Path(__file__).parents[2])
        yield Paper()
