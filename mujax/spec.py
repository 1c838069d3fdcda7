"""Static description of a model's parameters: which axes are infinite, and how each axis is used.

A `ParamSpec` describes one parameter: which axes grow with width and what each axis is to the product
that uses it. A `MupSpec` maps paths to `ParamSpec`s. Both are plain frozen data: they hold no arrays,
hash, compare and survive a JSON round trip, so they can be closed over by jitted functions.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import numbers
import operator
import os
import pathlib
import reprlib
import stat
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal, get_args

import jax
import numpy as np
import optax

from mujax._arguments import (
    FLAG,
    NAMED,
    NONE,
    NUMBER,
    PATH,
    POSITIVE,
    TEXT,
    Kind,
    check_arguments,
    instance,
    takes,
)
from mujax.errors import (
    MujaxError,
    ParametrizationError,
    RoleError,
    ShapeMismatchError,
    SpecMismatchError,
)

Role = Literal["input", "hidden", "output", "finite"]
ROLES: Final[tuple[Role, ...]] = get_args(Role)

TABLES: Final = ("mup", "table3", "table9", "sp")
"""The names of the rule tables; their rows are in `mujax.rules`."""

_FORMAT: Final = 1
_MAX_SIZE: Final = 2**63 - 1
_COLLECTION: Final = "params"


_WEIGHTS: Final = Kind(
    "pairs of a rule table and its weight",
    lambda value: all(isinstance(name, str) and isinstance(share, numbers.Real) for name, share in value),
    '(("mup", 1.0),)',
    ParametrizationError,
)


def leaf_path(key_path: tuple[Any, ...]) -> str:
    """The slash-separated path of a leaf from its `jax.tree_util` key path.

    A trailing attribute called `value` is dropped: it is the inside of a box (`nn.Partitioned`,
    `nnx.Variable`), and an unboxed parameter has no such entry.

    >>> tree = {"Dense_0": {"kernel": 0}, "blocks": [1]}
    >>> [leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    ['Dense_0/kernel', 'blocks/0']
    """
    if key_path and isinstance(key_path[-1], jax.tree_util.GetAttrKey) and key_path[-1].name == "value":
        key_path = key_path[:-1]
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


@dataclasses.dataclass(frozen=True)
class Parametrization:
    """A weighted geometric mean of rule tables, e.g. `(("mup", 1.0),)`.

    Attributes:
        weights: pairs of a table's name (`mujax.rules.TABLES`) and its weight; the weights sum to 1.
        depth_alpha: the exponent with which residual branches shrink with depth; None where depth is not
            parametrized.
    """

    weights: tuple[tuple[str, float], ...]
    depth_alpha: float | None = None

    def __post_init__(self) -> None:
        check_arguments({"weights": _WEIGHTS, "depth_alpha": NUMBER | NONE}, vars(self))
        object.__setattr__(self, "weights", tuple((name, weight) for name, weight in self.weights))

    def __str__(self) -> str:
        tables = " + ".join(
            name if len(self.weights) == 1 else f"{weight:g} {name}" for name, weight in self.weights
        )
        return tables if self.depth_alpha is None else f"{tables} with depth alpha {self.depth_alpha:g}"


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter: its sizes at target and base, and the use of each axis.

    Every axis is in exactly one of `fan_in`, `fan_out` and `stack`.

    Attributes:
        shape: the target's shape.
        base_shape: the base's shape, of the same rank.
        fan_in: axes that the product contracts or that a lookup indexes (for a convolution the
            input features and the spatial axes).
        fan_out: axes that the product leaves.
        stack: axes of independent copies: batch axes of the product, the axis that a scan strips.
        infinite: axes that grow with width.
        tied: whether it is used both as an input (looked up) and as an output (contracted over its features).
        layers: those of the stack axes that a scan over layers strips; they grow with depth and not with
            width.
        depth: number of layers of the target over that of the base, for a parameter inside of residual
            branches; 1 for all others and where depth is not parametrized.
    """

    shape: tuple[int, ...]
    base_shape: tuple[int, ...]
    fan_in: tuple[int, ...] = ()
    fan_out: tuple[int, ...] = ()
    stack: tuple[int, ...] = ()
    infinite: tuple[int, ...] = ()
    tied: bool = False
    layers: tuple[int, ...] = ()
    depth: float = 1.0

    def __post_init__(self) -> None:
        check_arguments({"tied": FLAG, "depth": POSITIVE}, vars(self))
        # One way of writing each spec, so that specs of the same parameter compare and hash alike.
        for name in ("shape", "base_shape"):
            object.__setattr__(self, name, _integers(name, getattr(self, name)))
        for name in ("fan_in", "fan_out", "stack", "infinite", "layers"):
            object.__setattr__(self, name, tuple(sorted(_integers(name, getattr(self, name)))))
        if len(self.shape) != len(self.base_shape):
            raise ShapeMismatchError(
                where="ParamSpec",
                expected="shape and base_shape of the same rank",
                got=f"shape={self.shape}, base_shape={self.base_shape}",
            )
        where = f"ParamSpec of shape {self.shape}"
        axes = sorted((*self.fan_in, *self.fan_out, *self.stack))
        if axes != list(range(len(self.shape))):
            raise MujaxError(
                where=where,
                expected="each axis in exactly one of fan_in, fan_out and stack",
                got=f"fan_in={self.fan_in}, fan_out={self.fan_out}, stack={self.stack}",
            )
        if len(set(self.infinite)) != len(self.infinite) or not set(self.infinite) <= set(axes):
            raise MujaxError(
                where=where,
                expected="infinite to list axes of the shape, once each",
                got=self.infinite,
            )
        if not set(self.layers) <= set(self.stack) - set(self.infinite):
            raise MujaxError(
                where=where,
                expected="layers to list axes of stack that are not in infinite",
                got=f"layers={self.layers}, stack={self.stack}, infinite={self.infinite}",
            )
        if any(size < 0 for size in (*self.shape, *self.base_shape)):
            raise ShapeMismatchError(
                where="ParamSpec",
                expected="sizes of at least 0",
                got=f"shape={self.shape}, base_shape={self.base_shape}",
            )
        unlisted = tuple(
            axis
            for axis, (size, base) in enumerate(zip(self.shape, self.base_shape, strict=True))
            if size != base and axis not in self.infinite and axis not in self.layers
        )
        if unlisted:
            raise ShapeMismatchError(
                where=f"{where} and base_shape {self.base_shape}",
                expected=f"axes {unlisted}, whose sizes differ, to be listed in infinite",
                got=f"infinite={self.infinite}",
            )

    @property
    def base_with_layers(self) -> tuple[int, ...]:
        """The base's shape with the target's number of layers: it differs from `shape` by width alone."""
        return tuple(
            size if axis in self.layers else base
            for axis, (size, base) in enumerate(zip(self.shape, self.base_shape, strict=True))
        )

    def _ratio(self, axes: Iterable[int]) -> float:
        target, base = 1, 1
        for axis in axes:
            target *= self.shape[axis]
            base *= self.base_shape[axis]
        return target / base if base else 1.0

    @property
    def r_in(self) -> float:
        """Fan-in of the target over fan-in of the base."""
        return self._ratio(self.fan_in)

    @property
    def r_out(self) -> float:
        """Fan-out of the target over fan-out of the base.

        A batch axis of a product that grows with width (the blocks of a block-diagonal kernel) makes
        the pre-activation wider just as a fan-out axis does, so it counts here. The axis of a scan over
        layers grows with depth and does not count.
        """
        return self._ratio((*self.fan_out, *(axis for axis in self.stack if axis not in self.layers)))

    @property
    def r_layers(self) -> float:
        """Layers in this array at the target over those at the base.

        Where `depth` states the base's number of layers, that number counts and not the one of the base that
        was traced.
        """
        return self.depth if self.layers and self.depth != 1 else self._ratio(self.layers)

    @property
    def role(self) -> Role:
        """`"input"`, `"hidden"`, `"output"` or `"finite"`: which of fan-in and fan-out are infinite.

        A growing number of copies, each with a fan-in that does not grow, is a vector; of copies that each
        read a growing axis out, every one is a readout.
        """
        wide_in = any(axis in self.infinite for axis in self.fan_in)
        copies = () if wide_in else self.stack
        wide_out = any(axis in self.infinite for axis in (*self.fan_out, *copies))
        by_width: dict[tuple[bool, bool], Role] = {
            (False, True): "input",
            (True, True): "hidden",
            (True, False): "output",
            (False, False): "finite",
        }
        return by_width[wide_in, wide_out]


def _to_dict(param: ParamSpec) -> dict[str, Any]:
    """The fields of a spec, without those of depth where they have their defaults."""
    fields = dataclasses.asdict(param)
    left_out = {"layers": (), "depth": 1.0}
    return {name: value for name, value in fields.items() if left_out.get(name) != value}


def _integers(name: str, given: Iterable[Any]) -> tuple[int, ...]:
    try:
        return tuple(operator.index(number) for number in given)
    except TypeError as error:
        raise MujaxError(
            where="ParamSpec", expected=f"{name} to be a tuple of integers", got=repr(given)
        ) from error


_PARAMS: Final = Kind(
    "a mapping from paths to ParamSpecs",
    lambda value: NAMED.accepts(value) and all(isinstance(param, ParamSpec) for param in value.values()),
    "dict(mup.spec)",
)
_PARAMETRIZATION: Final = instance(Parametrization, "a Parametrization", "mup.spec.parametrization")


class MupSpec(Mapping[str, ParamSpec]):
    """The parameters of a model by path, and the parametrization it is trained in.

    Static and hashable; holds no arrays. Iterates in the order of the parameter tree.

    Attributes:
        parametrization: the rule tables in force.
    """

    __slots__ = ("_hash", "_params", "parametrization")

    def __init__(self, params: Mapping[str, ParamSpec], parametrization: Parametrization) -> None:
        check_arguments(
            {"params": _PARAMS, "parametrization": _PARAMETRIZATION},
            {"params": params, "parametrization": parametrization},
        )
        self._params = dict(params)
        self.parametrization = parametrization
        self._hash = hash((frozenset(self._params.items()), parametrization))

    def __getitem__(self, path: str) -> ParamSpec:
        return self._params[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MupSpec):
            return NotImplemented
        return self._params == other._params and self.parametrization == other.parametrization

    def __repr__(self) -> str:
        return f"MupSpec({len(self)} parameters, parametrization={str(self.parametrization)!r})"

    @property
    def grows(self) -> bool:
        """Whether any axis grows with width; if none does, every factor is 1 and every role `"finite"`."""
        return any(param.infinite for param in self.values())

    def require_roles(self, option: str) -> None:
        """Raises an error for a spec whose target has its base's own widths: the roles are not known.

        Args:
            option: the option that needs the roles, for the error's text.

        Raises:
            RoleError: no axis grows with width.
        """
        if self and not self.grows:
            raise RoleError(
                where=option,
                expected="a spec with roles",
                got="one whose target has the widths of its base, where no axis grows and every parameter "
                "counts as finite",
                remedy="pass delta= to mup_init, the same model at other widths",
            )

    @takes(values=NAMED | NONE, what=TEXT)
    def match(self, tree: Any, values: Mapping[str, Any] | None = None, *, what: str = "parameters") -> Any:
        """The `ParamSpec` of every leaf of a tree, in a tree of the same structure, for `jax.tree.map`.

        Boxes (`nn.Partitioned`, `nnx.Variable`) and a `{"params": ...}` around the tree are looked through.
        A parameter may be absent only where an `optax.MaskedNode` or None stands in place of it or of a
        subtree that holds it, and from an `nnx.State`, which filters (`wrt=`) cut down. Reads key paths and
        shapes, never values: a compiled program has nothing of it.

        Args:
            tree: parameters, gradients or updates.
            values: values by path, to return in place of the `ParamSpec`s.
            what: what the tree is, for the error's text.

        Raises:
            SpecMismatchError: the tree lacks a parameter, has another shape for it, or has one too many.

        >>> import jax.numpy as jnp
        >>> kernel = ParamSpec((6, 6), (2, 2), fan_in=(0,), fan_out=(1,), infinite=(0, 1))
        >>> spec = MupSpec({"Dense_0/kernel": kernel}, Parametrization((("mup", 1.0),)))
        >>> params = {"Dense_0": {"kernel": jnp.ones((6, 6))}}
        >>> jax.tree.map(lambda leaf, param: param.role, params, spec.match(params))
        {'Dense_0': {'kernel': 'hidden'}}
        """
        if _is_placeholder(tree):
            return tree
        entries = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_hole)
        names = [leaf_path(key_path) for key_path, _ in entries]
        paths = _unwrapped(names)
        known = dict(zip(_unwrapped(self), self, strict=True))
        holes = {path for path, (_, leaf) in zip(paths, entries, strict=True) if _is_hole(leaf)}
        found = {
            path: (name, leaf)
            for path, name, (_, leaf) in zip(paths, names, entries, strict=True)
            if not _is_hole(leaf)
        }
        extra = next((path for path in found if path not in known), None)
        for path, spec_path in known.items():
            expected = self[spec_path].shape
            if path not in found:
                if found and extra is None and hasattr(tree, "filter"):
                    # An `nnx.State`, of which a filter (`wrt=`) leaves out parameters without a trace.
                    continue
                if not _is_in(path, holes):
                    instead = "" if extra is None else f" but {found[extra][0]!r}, which the spec lacks"
                    raise SpecMismatchError(
                        where=spec_path,
                        expected=f"shape {expected}",
                        got=f"no such path in the tree of {what}{instead}",
                        remedy="pass the parameters that mup_init described; to freeze a part of them, use "
                        "optax.partition with optax.set_to_zero() for that part",
                    )
                continue
            shape = _shape(found[path][1])
            if shape != expected and not _is_local_shard(shape, expected):
                raise SpecMismatchError(
                    where=spec_path,
                    expected=f"shape {expected}",
                    got=f"{shape} in the tree of {what}",
                    remedy="call mup_init on this very model; map over leading axes of stacked models with "
                    "jax.vmap",
                )
        if extra is not None:
            name, leaf = found[extra]
            raise SpecMismatchError(
                where=name,
                expected="nothing here",
                got=f"shape {_shape(leaf)} in the tree of {what}",
                remedy="pass only the parameters, no other collections, of the model that mup_init was given",
            )
        values = self if values is None else values
        missing = next((known[path] for path in found if known[path] not in values), None)
        if missing is not None:
            raise MujaxError(
                where="values", expected="a value for every parameter", got=f"none for {missing!r}"
            )
        return jax.tree.structure(tree).unflatten(values[known[path]] for path in found)

    def to_json(self) -> str:
        """The spec as JSON text; `from_json` reads it back."""
        alpha = self.parametrization.depth_alpha
        return json.dumps(
            {
                "mujax_spec": _FORMAT,
                "parametrization": [list(pair) for pair in self.parametrization.weights],
                **({} if alpha is None else {"depth_alpha": alpha}),
                "params": {path: _to_dict(param) for path, param in self.items()},
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str) -> MupSpec:
        """Reads the text that `to_json` returned; every field is checked.

        Raises:
            MujaxError: the text is not a spec; names the field.
        """
        return _read_spec(text)

    @takes(path=PATH)
    def save(self, path: str | pathlib.Path) -> None:
        """Writes the spec to a JSON file, whole or not at all: an old file stays where writing fails.

        Raises:
            MujaxError: the file cannot be written.
        """
        target = pathlib.Path(path)
        text = self.to_json() + "\n"
        try:
            target = target.resolve()
            if target.exists() and not target.is_file():
                # A pipe or a device, which nothing can be moved onto.
                target.write_text(text, encoding="utf-8")
            else:
                _write_aside(target, text)
        except OSError as error:
            raise MujaxError(
                where=path, expected="a file that can be written", got=f"an error: {error.strerror or error}"
            ) from error

    @classmethod
    @takes(path=PATH)
    def load(cls, path: str | pathlib.Path) -> MupSpec:
        """Reads a spec that `save` wrote.

        Raises:
            MujaxError: the file is missing or is not a spec.
        """
        try:
            text = pathlib.Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise MujaxError(
                where=path, expected="a spec file written by MupSpec.save", got=f"an error: {reason}"
            ) from error
        return cls.from_json(text)

    def size(self) -> int:
        """Number of scalar parameters at the target."""
        return sum(math.prod(param.shape) for param in self.values())


def _write_aside(target: pathlib.Path, text: str) -> None:
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        with aside.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            aside.chmod(stat.S_IMODE(target.stat().st_mode))
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


# ---- reading JSON ----------------------------------------------------------------------------------


def _read_spec(text: str) -> MupSpec:
    written = "the JSON written by MupSpec.save"
    try:
        data = json.loads(text, object_pairs_hook=_without_doubles, parse_constant=_no_number)
    except MujaxError:
        raise
    except RecursionError as error:
        raise MujaxError(where="spec file", expected=written, got="brackets nested too deeply") from error
    except (TypeError, ValueError) as error:
        raise MujaxError(where="spec file", expected=written, got=f"something else ({error})") from error
    if not isinstance(data, dict) or not {"mujax_spec", "parametrization", "params"} <= data.keys():
        raise MujaxError(where="spec file", expected=written, got=f"something else ({_short(data)})")
    if type(data["mujax_spec"]) is not int or data["mujax_spec"] != _FORMAT:
        raise ParametrizationError(
            where="spec file",
            expected=f"format {_FORMAT}",
            got=_short(data["mujax_spec"]),
            remedy="write it again with this version of mujax",
        )
    known = {"mujax_spec", "parametrization", "depth_alpha", "params"}
    _require(data.keys() <= known, "spec file", f"the fields {', '.join(sorted(known))} only", list(data))
    where = "spec file, parametrization"
    pairs = data["parametrization"]
    _require(isinstance(pairs, list) and bool(pairs), where, "a list of tables and their weights", pairs)
    for pair in pairs:
        _require(isinstance(pair, list) and len(pair) == 2, where, "pairs of a table and its weight", pair)
        name, weight = pair
        _require(name in TABLES, where, f"tables out of {', '.join(TABLES)}", name)
        _require(_is_number(weight) and weight >= 0, where, "finite weights of at least 0", weight)
    _require(len({name for name, _ in pairs}) == len(pairs), where, "each table once", pairs)
    _require(math.isclose(sum(weight for _, weight in pairs), 1.0), where, "weights that sum to 1", pairs)
    alpha = data.get("depth_alpha")
    _require(alpha is None or _is_number(alpha), "spec file, depth_alpha", "a finite number", alpha)
    params = data["params"]
    _require(isinstance(params, dict), "spec file, params", "a table of parameters by path", params)
    return MupSpec(
        {path: _read_param(path, fields) for path, fields in params.items()},
        Parametrization(
            tuple((name, float(weight)) for name, weight in pairs), None if alpha is None else float(alpha)
        ),
    )


def _read_param(path: str, fields: Any) -> ParamSpec:
    where = f"spec file, {path}"
    known = {field.name for field in dataclasses.fields(ParamSpec)}
    _require(isinstance(fields, dict), where, "a table of fields", fields)
    _require(
        {"shape", "base_shape"} <= fields.keys() <= known,
        where,
        f"the fields {', '.join(sorted(known))}, of which shape and base_shape must be there",
        list(fields),
    )
    for name, value in fields.items():
        at = f"{where}, {name}"
        if name == "tied":
            _require(isinstance(value, bool), at, "true or false", value)
        elif name == "depth":
            _require(_is_number(value) and value > 0, at, "a positive finite number", value)
        else:
            _require(isinstance(value, list), at, "a list of integers", value)
            for number in value:
                _require(type(number) is int, at, "a list of integers", value)
                _require(0 <= number <= _MAX_SIZE, at, "integers from 0 to 2^63 - 1", number)
    if len(fields["shape"]) == len(fields["base_shape"]):
        for pair in zip(fields["shape"], fields["base_shape"], strict=True):
            # An axis that is empty in both models has no ratio, and needs none.
            _require(all(pair) or not any(pair), where, "positive sizes", list(pair))
    try:
        return ParamSpec(**fields)
    except MujaxError as error:
        raise type(error)(f"{where}: {error}") from error


def _require(holds: bool, where: str, expected: str, got: Any) -> None:
    if not holds:
        raise MujaxError(where=where, expected=expected, got=_short(got))


def _short(value: Any) -> str:
    """A value read from JSON, in one line."""
    if isinstance(value, int) and abs(value) > _MAX_SIZE:
        # Python refuses to write out very large numbers.
        return "a number too large"
    return reprlib.repr(value)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= _MAX_SIZE


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise MujaxError(where="spec file", expected="each name once", got=f"{double!r} twice")
    return out


def _no_number(name: str) -> Any:
    raise MujaxError(where="spec file", expected="finite numbers", got=name)


def _is_hole(node: Any) -> bool:
    """Whether something was taken out of the tree: by `optax.masked`, or by a filter that leaves None."""
    return node is None or isinstance(node, optax.MaskedNode)


def _is_in(path: str, holes: set[str]) -> bool:
    parents_and_self = itertools.accumulate(path.split("/"), lambda parent, name: f"{parent}/{name}")
    return "" in holes or any(node in holes for node in parents_and_self)


def _is_placeholder(tree: Any) -> bool:
    """Whether one opaque node stands for the whole tree.

    `optax.tree.map_params` calls `init` with such a node to find out where a state keeps copies of the
    parameters. An empty container is no such node: there, parameters are missing.
    """
    structure = jax.tree.structure(tree)
    return structure.num_nodes == 1 and structure.num_leaves == 0 and not isinstance(tree, Mapping | Sequence)


def _unwrapped(paths: Iterable[str]) -> list[str]:
    """The paths without the collection's name that all of them start with, as in `{"params": {...}}`."""
    parts = [path.split("/") if path else [] for path in paths]
    while parts and all(names[:1] == [_COLLECTION] for names in parts):
        parts = [names[1:] for names in parts]
    return ["/".join(names) for names in parts]


def _shape(leaf: Any) -> tuple[int, ...]:
    return tuple(leaf.shape) if hasattr(leaf, "shape") else np.shape(leaf)


def _is_local_shard(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether `found` can be one device's part of `expected`, inside of `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.manual_axes or len(found) != len(expected):
        return False
    if not all(size and whole % size == 0 for size, whole in zip(found, expected, strict=True)):
        return False
    parts = math.prod(whole // size for size, whole in zip(found, expected, strict=True))
    return math.prod(mesh.shape[axis] for axis in mesh.manual_axes) % parts == 0
