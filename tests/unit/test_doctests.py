"""The examples in docstrings run and print the given results."""

import doctest
import importlib
import pkgutil

import pytest

import mujax

MODULES = sorted(
    module.name for module in pkgutil.walk_packages(mujax.__path__, "mujax.") if "__main__" not in module.name
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    texts: list[str] = []
    for test in doctest.DocTestFinder().find(module, name):
        runner.run(test, out=texts.append)
    assert runner.failures == 0, "".join(texts)


def test_there_are_examples():
    """An example that nobody finds can't fail: optimizers are made by functions and not by `def`."""
    found = [
        test.name
        for name in MODULES
        for test in doctest.DocTestFinder().find(importlib.import_module(name), name)
        if test.examples
    ]
    assert {"mujax.core._mup_init.mup_init", "mujax.optim._scale.mup_scale_by_adam"} <= set(found)
    assert len(found) > 40
