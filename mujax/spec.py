"""What is infinite: the static description of a model's parameters that everything else reads.

A `ParamSpec` says of one parameter which axes grow with width and what each axis is to the product
that uses it. A `MupSpec` maps paths to `ParamSpec`s. Both are plain frozen data: they hold no arrays,
hash, compare and survive a JSON round trip, so they can be closed over by jitted functions.
"""

from __future__ import annotations

import dataclasses
import json
import math
import operator
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, Literal, get_args

import jax

from mujax.errors import MujaxError, ParametrizationError, RoleError, ShapeMismatchError

Role = Literal["input", "hidden", "output", "finite"]
ROLES: Final[tuple[Role, ...]] = get_args(Role)

_FORMAT: Final = 1


def leaf_path(key_path: tuple[Any, ...]) -> str:
    """The slash-separated path of a leaf from its `jax.tree_util` key path.

    A trailing attribute called `value` is dropped: it is the inside of a box (`nn.Partitioned`, an
    `nnx.Variable`) and the same parameter has no such entry once unboxed.

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

    def __str__(self) -> str:
        tables = " + ".join(
            name if len(self.weights) == 1 else f"{weight:g} {name}" for name, weight in self.weights
        )
        return tables if self.depth_alpha is None else f"{tables} with depth alpha {self.depth_alpha:g}"


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter: its sizes at target and base, and what each axis is.

    Every axis is in exactly one of `fan_in`, `fan_out` and `stack`.

    Attributes:
        shape: the target's shape.
        base_shape: the base's shape, of the same rank.
        fan_in: axes that the product contracts or that a lookup indexes (for a convolution the
            input features and the spatial axes).
        fan_out: axes that the product leaves.
        stack: axes over which independent copies are laid: batch axes of the product, the axis that
            a scan strips.
        infinite: axes that grow with width.
        tied: it is used both as an input (looked up) and as an output (contracted over its features).
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
        # One way of writing each spec, so that specs of the same parameter compare and hash alike.
        for name in ("shape", "base_shape"):
            object.__setattr__(self, name, _integers(name, getattr(self, name)))
        for name in ("fan_in", "fan_out", "stack", "infinite", "layers"):
            object.__setattr__(self, name, tuple(sorted(_integers(name, getattr(self, name)))))
        if len(self.shape) != len(self.base_shape):
            raise ShapeMismatchError(
                f"ParamSpec: base_shape {self.base_shape} and shape {self.shape} must have the same rank."
            )
        axes = sorted((*self.fan_in, *self.fan_out, *self.stack))
        if axes != list(range(len(self.shape))):
            raise MujaxError(
                f"ParamSpec of shape {self.shape}: each axis must be in exactly one of fan_in, fan_out and "
                f"stack; got fan_in={self.fan_in}, fan_out={self.fan_out}, stack={self.stack}."
            )
        if len(set(self.infinite)) != len(self.infinite) or not set(self.infinite) <= set(axes):
            raise MujaxError(
                f"ParamSpec of shape {self.shape}: expected infinite to list axes of the shape, once each, "
                f"got {self.infinite}."
            )
        if not set(self.layers) <= set(self.stack) - set(self.infinite):
            raise MujaxError(
                f"ParamSpec of shape {self.shape}: expected layers to list axes of stack that are not in "
                f"infinite, got layers={self.layers}, stack={self.stack}, infinite={self.infinite}."
            )
        if not (math.isfinite(self.depth) and self.depth > 0):
            raise MujaxError(
                f"ParamSpec of shape {self.shape}: expected depth to be a positive ratio, got {self.depth}."
            )
        finite = [
            axis
            for axis, (size, base) in enumerate(zip(self.shape, self.base_shape, strict=True))
            if size != base and axis not in self.infinite and axis not in self.layers
        ]
        if finite:
            raise ShapeMismatchError(
                f"ParamSpec of shape {self.shape} and base_shape {self.base_shape}: axes {tuple(finite)} "
                f"differ, so they must be listed in infinite={self.infinite}."
            )

    @property
    def base_with_layers(self) -> tuple[int, ...]:
        """The base's shape with the target's number of layers: what differs from `shape` is width."""
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

        With the layers of a base that is only said to have fewer (`depth`), not with those it was given with.
        """
        return self.depth if self.layers and self.depth != 1 else self._ratio(self.layers)

    @property
    def role(self) -> Role:
        """`"input"`, `"hidden"`, `"output"` or `"finite"`: which of fan-in and fan-out are infinite."""
        wide_in = any(axis in self.infinite for axis in self.fan_in)
        wide_out = any(axis in self.infinite for axis in (*self.fan_out, *self.stack))
        by_width: dict[tuple[bool, bool], Role] = {
            (False, True): "input",
            (True, True): "hidden",
            (True, False): "output",
            (False, False): "finite",
        }
        return by_width[wide_in, wide_out]


def _written(param: ParamSpec) -> dict[str, Any]:
    """The fields of a spec; those of depth only where there is something to say."""
    fields = dataclasses.asdict(param)
    left_out = {"layers": (), "depth": 1.0}
    return {name: value for name, value in fields.items() if left_out.get(name) != value}


def _integers(name: str, given: Iterable[Any]) -> tuple[int, ...]:
    try:
        return tuple(operator.index(number) for number in given)
    except TypeError as error:
        raise MujaxError(f"ParamSpec: expected {name} to be a tuple of integers, got {given!r}.") from error


class MupSpec(Mapping[str, ParamSpec]):
    """The parameters of a model by path, and the parametrization it is trained in.

    Static and hashable; holds no arrays. Iterates in the order of the parameter tree.

    Attributes:
        parametrization: the rule tables in force.
    """

    __slots__ = ("_hash", "_params", "parametrization")

    def __init__(self, params: Mapping[str, ParamSpec], parametrization: Parametrization) -> None:
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
        """Whether any axis grows with width; else every factor is 1 and every role `"finite"`."""
        return any(param.infinite for param in self.values())

    def require_roles(self, option: str) -> None:
        """Refuses a spec of a model that has its base's own widths: roles need to be known.

        Args:
            option: what asks for the roles.

        Raises:
            RoleError: nothing grows with width.
        """
        if self and not self.grows:
            raise RoleError(
                f"{option}: expected a spec with roles, found one whose target has the widths of its base, "
                "where no axis grows and every parameter counts as finite; pass delta= to mup_init, the "
                "same model at other widths."
            )

    def to_json(self) -> str:
        """The spec as JSON text; `from_json` reads it back."""
        alpha = self.parametrization.depth_alpha
        return json.dumps(
            {
                "mujax_spec": _FORMAT,
                "parametrization": [list(pair) for pair in self.parametrization.weights],
                **({} if alpha is None else {"depth_alpha": alpha}),
                "params": {path: _written(param) for path, param in self.items()},
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str) -> MupSpec:
        """Reads what `to_json` wrote.

        Raises:
            MujaxError: the text is not a spec.
        """
        try:
            data = json.loads(text)
            if data["mujax_spec"] != _FORMAT:
                raise ParametrizationError(
                    f"spec file: expected format {_FORMAT}, got {data['mujax_spec']!r}; "
                    "write it again with this version of mujax."
                )
            params = {path: ParamSpec(**fields) for path, fields in data["params"].items()}
            weights = tuple((str(name), float(weight)) for name, weight in data["parametrization"])
            alpha = data.get("depth_alpha")
            chosen = Parametrization(weights, None if alpha is None else float(alpha))
        except MujaxError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise MujaxError(
                f"spec file: expected the JSON written by MupSpec.save, got something else ({error})."
            ) from error
        return cls(params, chosen)

    def save(self, path: str | pathlib.Path) -> None:
        """Writes the spec to a JSON file."""
        pathlib.Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | pathlib.Path) -> MupSpec:
        """Reads a spec that `save` wrote.

        Raises:
            MujaxError: the file is missing or is not a spec.
        """
        try:
            text = pathlib.Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            found = error.strerror if isinstance(error, OSError) else error
            raise MujaxError(
                f"{path}: expected a spec file written by MupSpec.save, got this: {found}."
            ) from error
        return cls.from_json(text)

    def size(self) -> int:
        """Number of scalar parameters at the target."""
        return sum(math.prod(param.shape) for param in self.values())
