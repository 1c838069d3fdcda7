"""Checks of arguments at the public functions: kinds of values, and `takes`, which checks a call by them.

A wrong argument is one `ConfigError` that names it, before anything is traced or run. Values that may be
traced are checked by type, shape and dtype alone.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import math
import numbers
import operator
import os
import pathlib
import reprlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Final, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding

from mujax.errors import ConfigError, MujaxError

_Function = TypeVar("_Function", bound=Callable[..., Any])
_LONGEST: Final = 60


def needed(module: str, where: str, expected: str) -> Any:
    """A module of a package of the extra `train`, which only some trainings need.

    Args:
        module: its name.
        where: what needs it.
        expected: the package in words.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            where=where,
            expected=f"the package {expected}",
            got="none",
            remedy='install it with `pip install "mujax-mup[train]"`',
        ) from error


@dataclasses.dataclass(frozen=True)
class Kind:
    """What an argument may be. `a | b` is either of two kinds.

    Attributes:
        expected: in words.
        holds: whether a value is of the kind; may raise for values of other types.
        example: a value as a user writes it.
        error: the error for other values.
    """

    expected: str
    holds: Callable[[Any], bool]
    example: str
    error: type[MujaxError] = ConfigError

    def __or__(self, other: Kind) -> Kind:
        return Kind(
            f"{self.expected} or {other.expected}",
            lambda value: self.accepts(value) or other.accepts(value),
            self.example,
            self.error,
        )

    def accepts(self, value: Any) -> bool:
        """Whether a value is of the kind."""
        try:
            return bool(self.holds(value))
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError):
            # A value of another type, in a comparison or as an iterable.
            return False


def check_arguments(kinds: Mapping[str, Kind], values: Mapping[str, Any]) -> None:
    """Refuses the first value that is not of the kind of its name; names without a kind may be anything.

    Raises:
        MujaxError: a value is refused; see `Kind.error`.
    """
    for name, kind in kinds.items():
        if name in values and not kind.accepts(values[name]):
            raise kind.error(
                where=name,
                expected=kind.expected,
                got=shown(values[name]),
                remedy=f"pass {name}={kind.example}",
            )


def takes(**kinds: Kind) -> Callable[[_Function], _Function]:
    """Checks the arguments of a function by kinds, by name, before it is called.

    >>> @takes(steps=COUNT)
    ... def train(steps):
    ...     return steps
    >>> train(-1)
    Traceback (most recent call last):
        ...
    mujax.errors.ConfigError: steps: expected a whole number of at least 1, got -1; pass steps=4.
    """

    def decorate(function: _Function) -> _Function:
        signature = inspect.signature(function)
        assert kinds.keys() <= signature.parameters.keys()

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            try:
                given = signature.bind(*args, **kwargs).arguments
            except TypeError:
                # Python's own error names the function and the argument that is missing or unknown.
                return function(*args, **kwargs)
            check_arguments(kinds, given)
            return function(*args, **kwargs)

        return checked  # pyright: ignore[reportReturnType]

    return decorate


def shown(value: Any) -> str:
    """A value in a few words, in one line."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, np.generic):
        return f"an array of shape {tuple(value.shape)} and dtype {value.dtype}"
    if inspect.isroutine(value):
        return f"the function {value.__name__}"
    plain = (str, bytes, numbers.Number, list, tuple, dict, set, frozenset, range, pathlib.PurePath)
    if value is not None and (not isinstance(value, plain) or hasattr(value, "_fields")):
        return f"an instance of {type(value).__name__}"
    text = " ".join(reprlib.repr(value).split())
    if len(text) > _LONGEST and isinstance(value, Collection) and not isinstance(value, str | bytes):
        return f"a {type(value).__name__} of {len(value)}"
    return text


# ---- numbers --------------------------------------------------------------------------------------------


def _is_whole(value: Any) -> bool:
    return not isinstance(value, bool | np.bool_) and operator.index(value) is not None


def _is_number(value: Any) -> bool:
    """Whether it is a finite real number that is known now."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_scalar(value: Any) -> bool:
    """Whether it is one real number, perhaps traced; NaN is none, and infinity is one."""
    if isinstance(value, numbers.Real):
        return not isinstance(value, bool) and not math.isnan(value)
    return math.prod(value.shape) == 1 and (
        jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)
    )


def _is_known(value: Any) -> bool:
    return isinstance(value, numbers.Real)


def at_least(least: int) -> Kind:
    """A whole number that is not smaller."""
    return Kind(
        f"a whole number of at least {least}",
        lambda value: _is_whole(value) and operator.index(value) >= least,
        str(max(least, 4)),
    )


COUNT: Final = at_least(1)
SEED: Final = Kind(
    "a whole number from 0 up to 2^31",
    lambda value: _is_whole(value) and 0 <= operator.index(value) < 2**31,
    "0",
)
NUMBER: Final = Kind("a finite number", _is_number, "1.0")
POSITIVE: Final = Kind("a positive finite number", lambda value: _is_number(value) and value > 0, "0.01")
NOT_NEGATIVE: Final = Kind(
    "a finite number of at least 0", lambda value: _is_number(value) and value >= 0, "0.1"
)
NOT_BELOW_0: Final = at_least(0)
SECONDS: Final = dataclasses.replace(POSITIVE, expected="a number of seconds, more than 0", example="60.0")
MINUTES: Final = dataclasses.replace(POSITIVE, expected="a number of minutes, more than 0", example="10.0")
PATIENCE: Final = dataclasses.replace(NOT_NEGATIVE, expected="a number of seconds", example="300.0")
SHARE: Final = Kind("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1, "0.5")
SCALAR: Final = Kind("a number, or an array of one", _is_scalar, "1.0")
SCALAR_NOT_NEGATIVE: Final = Kind(
    "a number of at least 0, or an array of one",
    lambda value: _is_scalar(value) and (not _is_known(value) or value >= 0),
    "0.1",
)
SCALAR_SHARE: Final = Kind(
    "a number from 0 to 1, or an array of one",
    lambda value: _is_scalar(value) and (not _is_known(value) or 0 <= value <= 1),
    "0.9",
)
FLAG: Final = Kind("True or False", lambda value: isinstance(value, bool | np.bool_), "True")


# ---- texts, and one of several --------------------------------------------------------------------------

NONE: Final = Kind("None", lambda value: value is None, "None")
TEXT: Final = Kind("a text", lambda value: isinstance(value, str), '"loss"')
NAME: Final = Kind(
    "a name of 1 to 400 characters", lambda value: isinstance(value, str) and 0 < len(value) <= 400, '"mlp"'
)
PATH: Final = Kind(
    "a path", lambda value: isinstance(value, str | os.PathLike) and str(value) != "", '"folder/file"'
)
CHECKPOINT_RULES: Final[Mapping[str, Kind]] = {
    "keep": COUNT,
    "every_steps": COUNT | NONE,
    "every_minutes": MINUTES | NONE,
}


def one_of(names: Iterable[str], error: type[MujaxError] = ConfigError) -> Kind:
    """One of a few texts."""
    known = tuple(names)
    return Kind(
        f"one of {', '.join(map(repr, known))}",
        lambda value: isinstance(value, str) and value in known,
        repr(known[0]),
        error,
    )


def instance(kind: type | tuple[type, ...], what: str, example: str) -> Kind:
    """An object of a class."""
    return Kind(what, lambda value: isinstance(value, kind), example)


# ---- several --------------------------------------------------------------------------------------------


def _items(value: Any) -> list[Any]:
    """The items of what can be read again and again, and is no text or mapping."""
    if isinstance(value, str | bytes | Mapping | Iterator):
        raise TypeError
    return list(value)


def several(
    what: str, each: Kind, example: str, *, least: int = 0, different: int = 0, error: Any = ConfigError
) -> Kind:
    """A sequence of values of one kind.

    Args:
        what: the sequence in words.
        each: the kind of its values.
        example: of it.
        least: how many there must be.
        different: how many different ones.
        error: for anything else.
    """

    def holds(value: Any) -> bool:
        items = _items(value)
        return (
            len(items) >= least
            and all(each.accepts(item) for item in items)
            and (not different or len(set(map(float, items))) >= different)
        )

    return Kind(what, holds, example, error)


TEXTS: Final = several("a sequence of texts", TEXT, '("name",)')
GLOBS: Final = several("a sequence of globs", TEXT, '("*/attention",)')
WIDTHS: Final = several(
    "at least two different widths, whole numbers of at least 1", COUNT, "(64, 128, 256)", different=2
)
LOG2_LRS: Final = several(
    "at least three different powers of two from -126 to 126",
    Kind("a number from -126 to 126", lambda value: _is_number(value) and abs(value) <= 126, ""),
    "range(-10, -3)",
    different=3,
)
NAMED: Final = Kind(
    "a mapping with texts as keys",
    lambda value: isinstance(value, Mapping) and all(isinstance(key, str) for key in value),
    '{"name": value}',
)


# ---- functions and arrays -------------------------------------------------------------------------------


def _may_be_called(value: Any, arguments: int) -> bool:
    if not callable(value):
        return False
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        # Written in C: its signature is not known.
        return True
    signature.bind(*(None,) * arguments)
    return True


def function(what: str, arguments: int, example: str) -> Kind:
    """A function of a number of positional arguments."""
    return Kind(what, lambda value: _may_be_called(value, arguments), example)


def _is_model(value: Any) -> bool:
    """Whether it is a module already: it can be called, though not with a width."""
    return not isinstance(value, type) and hasattr(value, "init") and hasattr(value, "apply")


FACTORY: Final = Kind(
    "a function of the width that returns a model",
    lambda value: _may_be_called(value, 1) and not _is_model(value),
    "lambda width: Net(width)",
)
LOSS: Final = function("a function of outputs and targets", 2, "lambda outputs, targets: ...")
OPTIMIZER: Final = Kind(
    "the name of an optimizer or a function of learning rate and spec",
    lambda value: isinstance(value, str) or _may_be_called(value, 2),
    '"adamw"',
)
CALLBACK: Final = function("a function of one argument", 1, "print")


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray | np.generic)


def _is_tree_of_arrays(value: Any) -> bool:
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(_is_array(leaf) or _is_scalar(leaf) for leaf in leaves)


ARRAYS: Final = Kind(
    "an array or a tuple of the model's inputs",
    lambda value: (
        any(_is_array(leaf) for leaf in jax.tree.leaves(value))
        and not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(value))
    ),
    "jnp.ones((8, 784))",
)
TREE: Final = Kind("a tree of arrays", _is_tree_of_arrays, "params")
KEY: Final = Kind(
    "a key",
    lambda value: (
        isinstance(value, jax.Array | np.ndarray)
        and (jnp.issubdtype(value.dtype, jax.dtypes.prng_key) or value.dtype == np.uint32)
    ),
    "jax.random.key(0)",
)
TRANSFORM: Final = Kind(
    "an optax transform",
    lambda value: callable(value.init) and callable(value.update),
    "optax.scale_by_lion()",
)


def _is_described(leaf: Any) -> bool:
    return _is_scalar(leaf) or all(hasattr(leaf, name) for name in ("shape", "dtype"))


SHAPES: Final = Kind(
    "a tree of arrays or of their shapes",
    lambda value: all(map(_is_described, jax.tree.leaves(value))),
    "jax.eval_shape(create)",
)
FLOATING: Final = Kind(
    "a type of floating numbers", lambda value: jnp.issubdtype(jnp.dtype(value), jnp.floating), "jnp.bfloat16"
)
WHOLE_NUMBERS: Final = Kind(
    "a type of whole numbers",
    lambda value: value is not None and np.dtype(value).kind in "iu",
    '"uint16"',
)


# ---- meshes ---------------------------------------------------------------------------------------------


def _are_sizes(value: Any) -> bool:
    """Whether it gives sizes by name; -1 may stand for the rest."""
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and _is_whole(size) for name, size in value.items()
    )


def _are_rules(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(
            isinstance(glob, str) and isinstance(split, PartitionSpec | tuple)
            for glob, split in value.items()
        )
    pairs = [(name, axes) for name, axes in _items(value)]
    return all(
        isinstance(name, str) and (axes is None or TEXT.accepts(axes) or TEXTS.accepts(axes))
        for name, axes in pairs
    )


ANY_MESH: Final = instance((Mesh, AbstractMesh), "a mesh", 'make_mesh({"data": -1})')
MESH: Final = instance(Mesh, "a mesh", 'make_mesh({"data": -1})')
MESH_SIZES: Final = Kind(
    "a mesh or the sizes of its axes by name",
    lambda value: _are_sizes(getattr(value, "shape", value)),
    'make_mesh({"data": -1})',
)
AXES: Final = Kind(
    "sizes of axes by name, or as a text",
    lambda value: TEXT.accepts(value) or _are_sizes(value),
    '{"data": -1}',
)
RULES: Final = Kind(
    "pairs of an axis of the model and one of the mesh, or a mapping from globs to PartitionSpecs",
    _are_rules,
    '[("mlp", "tensor")]',
)
SHARDING: Final = instance(Sharding, "a sharding", 'NamedSharding(mesh, PartitionSpec("data"))')
NAMED_SHARDING: Final = instance(
    NamedSharding, "a NamedSharding", 'NamedSharding(mesh, PartitionSpec("data"))'
)
