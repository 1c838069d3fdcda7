"""How parameters are split over a mesh: by the model's own annotations, or else by roles and axes."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias

from jax.sharding import PartitionSpec

from mujax.core.depth import scanned_layers
from mujax.core.frontends import Annotation
from mujax.core.trace import Flow
from mujax.errors import ConfigError, ShapeMismatchError
from mujax.spec import MupSpec, ParamSpec

Rules: TypeAlias = Sequence[tuple[str, str | Sequence[str] | None]] | Mapping[str, PartitionSpec]
"""Pairs of a logical axis name and the mesh axis, or axes, that split it, in order of precedence; or a
mapping from globs of parameter paths to splits, in place of the model's annotations."""

DATA: Final = "data"
FSDP: Final = "fsdp"
TENSOR: Final = "tensor"
AXES: Final = (DATA, FSDP, TENSOR)
"""The mesh axes that have a meaning where a model has no annotations: the batch is split over the first two,
parameters over the last two."""


def sizes_of(mesh: Any) -> dict[str, int]:
    """Size by name of each axis of a mesh, an abstract mesh or a mapping."""
    return dict(getattr(mesh, "shape", mesh))


def partition(
    spec: MupSpec,
    flow: Flow,
    annotations: Mapping[str, Annotation],
    sizes: Mapping[str, int],
    rules: Rules | None = None,
) -> dict[str, PartitionSpec]:
    """How each parameter is split over a mesh.

    The annotations of a model are obeyed as they are: a parameter without one is replicated. A model that
    has none is split by roles and axes:

    - `tensor` splits pairs of hidden kernels: the first over its fan-out and the second, whose input the
      first one's output is, over its fan-in. Between them activations stay split, and one sum over devices
      follows the second.
    - `fsdp` splits each kernel over its largest axis that it divides, layers that a scan strips excepted.
    - Vectors (biases, gains) are replicated.

    Args:
        spec: the parameters.
        flow: which value of the program is computed from which.
        annotations: the axis names that the model itself gives, by path.
        sizes: of the mesh's axes, by name.
        rules: from the annotations' logical names to mesh axes, or a split by glob of paths.

    Raises:
        ConfigError: a name that is no axis of the mesh, an axis that splits no parameter, or a glob without
            match.
        ShapeMismatchError: an annotated axis is not divisible.
    """
    if isinstance(rules, Mapping):
        annotations, rules = _by_glob(rules, spec), None
    if annotations:
        table = None if rules is None else list(rules)
        return {
            path: _obey(path, param, annotations[path], table, sizes)
            if path in annotations
            else PartitionSpec()
            for path, param in spec.items()
        }
    for name in sizes:
        if name not in AXES:
            raise ConfigError(
                where="mesh",
                expected=f"axes out of {', '.join(map(repr, AXES))}, since the model annotates no parameter",
                got=repr(name),
                remedy="rename the axis, annotate the parameters with axis names (nn.with_partitioning, "
                'nnx.with_partitioning), or give splits by path, rules={"*/kernel": PartitionSpec(...)}',
            )
    if rules is not None:
        raise ConfigError(
            where="rules",
            expected="a model that annotates its parameters with the names that the rules are about",
            got="one without annotations",
            remedy="leave rules out: parameters are then split by roles and axes",
        )
    places = _derived(spec, flow, sizes)
    for name in (FSDP, TENSOR):
        size = sizes.get(name, 1)
        if size > 1 and not any(name in axes for place in places.values() for axes in place):
            raise ConfigError(
                where=f"mesh axis {name!r}",
                expected="a size that divides "
                + ("an axis of a kernel" if name == FSDP else "a fan-out or fan-in of a hidden kernel"),
                got=size,
                remedy="take another size, or widths that are multiples of it",
            )
    return {path: _spec(place) for path, place in places.items()}


def largest_axis(shape: Sequence[int], size: int, skip: Iterable[int] = ()) -> int | None:
    """The largest axis that `size` divides, the first of several; None where it divides none."""
    skipped = set(skip)
    fits = [axis for axis, length in enumerate(shape) if axis not in skipped and length % size == 0 != length]
    return max(fits, key=lambda axis: (shape[axis], -axis), default=None)


def _by_glob(rules: Mapping[str, PartitionSpec], spec: MupSpec) -> dict[str, Annotation]:
    found: dict[str, Annotation] = {}
    for pattern, split in rules.items():
        paths = [path for path in spec if fnmatch.fnmatchcase(path, pattern)]
        if not paths:
            raise ConfigError(where="rules", expected="globs that match parameters", got=repr(pattern))
        for path in paths:
            found.setdefault(path, Annotation(tuple(split)))
    return found


# ---- annotations -----------------------------------------------------------------------------------------


def _obey(
    path: str,
    param: ParamSpec,
    annotation: Annotation,
    rules: list[tuple[str, str | Sequence[str] | None]] | None,
    sizes: Mapping[str, int],
) -> PartitionSpec:
    names, own = annotation.names, annotation.rules
    table = list(own or ()) if rules is None else rules
    if len(names) > len(param.shape):
        raise ShapeMismatchError(
            where=path, expected=f"axis names for the {len(param.shape)} axes of {param.shape}", got=names
        )
    known = {name for name, _ in table}
    place: list[tuple[str, ...]] = [()] * len(names)
    used: set[str] = set()
    open_axes = [axis for axis, name in enumerate(names) if name is not None]
    # Rules come in order of precedence; a mesh axis splits one axis of an array.
    for name, target in (*table, *((name, name) for name in names if _is_axis(name, known, sizes))):
        axes = (target,) if isinstance(target, str) else tuple(target or ())
        for axis in open_axes:
            if names[axis] != name:
                continue
            _refuse_unknown(path, axes, sizes, "the rules'" if name in known else "the model's")
            if used.isdisjoint(axes):
                place[axis] = axes
                used.update(axes)
                open_axes.remove(axis)
                break
    for axis in open_axes:
        given = names[axis]
        parts = (given,) if isinstance(given, str) else tuple(given or ())
        if not set(parts) <= known:
            _refuse_unknown(path, [part for part in parts if part not in known], sizes, "the model's")
    for axis, axes in enumerate(place):
        parts = math.prod(sizes[name] for name in axes)
        if param.shape[axis] % parts:
            raise ShapeMismatchError(
                where=path,
                expected=f"a multiple of {parts} entries along axis {axis}, which {' x '.join(axes)} splits",
                got=param.shape[axis],
                remedy="take a width that the mesh divides, or another mesh",
            )
    return _spec(place)


def _is_axis(name: Any, known: set[str], sizes: Mapping[str, int]) -> bool:
    parts = (name,) if isinstance(name, str) else tuple(name or ())
    return bool(parts) and name not in known and all(part in sizes for part in parts)


def _refuse_unknown(path: str, names: Iterable[str], sizes: Mapping[str, int], whose: str) -> None:
    for name in names:
        if name not in sizes:
            raise ConfigError(
                where=path,
                expected=f"{whose} axis names to be the mesh's, {', '.join(map(repr, sizes))}",
                got=repr(name),
                remedy='map logical names to axes of the mesh with rules=[("embed", "fsdp"), ...]',
            )


def _spec(place: Sequence[tuple[str, ...]]) -> PartitionSpec:
    entries = [axes[0] if len(axes) == 1 else axes or None for axes in place]
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


# ---- roles and axes --------------------------------------------------------------------------------------


def _derived(spec: MupSpec, flow: Flow, sizes: Mapping[str, int]) -> dict[str, list[tuple[str, ...]]]:
    tensor = _over_tensor(spec, flow, sizes[TENSOR]) if sizes.get(TENSOR, 1) > 1 else {}
    scanned = scanned_layers(flow)
    layers = {path: {*param.layers, *scanned.get(path, ())} for path, param in spec.items()}
    widest = max(
        (
            size
            for path, param in spec.items()
            for axis, size in enumerate(param.shape)
            if axis not in layers[path]
        ),
        default=1,
    )
    out: dict[str, list[tuple[str, ...]]] = {}
    for path, param in spec.items():
        place: list[tuple[str, ...]] = [()] * len(param.shape)
        if path in tensor:
            place[tensor[path]] = (TENSOR,)
        if (size := sizes.get(FSDP, 1)) > 1 and not _is_vector(param, layers[path], widest):
            taken = [tensor[path]] if path in tensor else []
            axis = largest_axis(param.shape, size, (*layers[path], *taken))
            if axis is not None:
                place[axis] = (FSDP,)
            elif taken and param.shape[taken[0]] % (size * sizes[TENSOR]) == 0:
                place[taken[0]] = (FSDP, TENSOR)
        out[path] = place
    return out


def _is_vector(param: ParamSpec, layers: Iterable[int], widest: int) -> bool:
    """Biases and gains, of several axes too; a table of positions has more entries than any axis."""
    return not param.fan_in and math.prod(param.shape) <= widest * math.prod(param.shape[a] for a in layers)


@dataclasses.dataclass
class _Reads:
    """What a kernel's products read.

    Attributes:
        before: the kernels and tables whose output, through no other product with a parameter, it reads.
        raw: whether it reads something else that grows with width.
    """

    before: set[str] = dataclasses.field(default_factory=set)
    raw: bool = False


def _reads(spec: MupSpec, flow: Flow) -> dict[str, _Reads]:
    """For each kernel, in program order, what it reads."""
    behind: dict[Any, frozenset[str]] = {}
    reads: dict[str, _Reads] = {}
    wide = frozenset(path for path, param in spec.items() if param.role == "input" or _is_hidden(param, spec))
    for site, visit in flow.visits.items():
        found = frozenset[str]().union(
            *(behind.get(operand.origin, frozenset()) for operand in visit.operands if operand.kind == "data")
        )
        products = [use.path for use in visit.uses if use.kind in ("contraction", "lookup")]
        for path in products:
            read = reads.setdefault(path, _Reads())
            read.before |= found
            read.raw |= not found
        # What has no axis that grows, as the weights of experts, has nothing to be split.
        behind[site] = wide.intersection(products) if products else found
    return reads


def _is_hidden(param: ParamSpec, spec: MupSpec) -> bool:
    """Whether it is a hidden kernel; where nothing grows, whether it may be one."""
    return param.role == "hidden" or (not spec.grows and bool(param.fan_in and param.fan_out))


def _over_tensor(spec: MupSpec, flow: Flow, size: int) -> dict[str, int]:
    """The axis of each hidden kernel that is split over the tensor axis."""
    first: dict[str, int] = {}
    second: dict[str, int] = {}
    for path, read in _reads(spec, flow).items():
        param = spec[path]
        if not _is_hidden(param, spec):
            continue
        if not read.raw and read.before and read.before <= first.keys():
            # Heads to heads and features to features: the axis that the first kernels leave split.
            lengths = {spec[before].shape[axis] for before, axis in first.items() if before in read.before}
            order = sorted(param.fan_in, key=lambda axis: (param.shape[axis] not in lengths, axis))
            wanted = [axis for axis in order if param.shape[axis] in lengths or axis in param.infinite]
            kind = second
        else:
            wanted, kind = list(param.fan_out), first
        fits = [axis for axis in wanted if param.shape[axis] % size == 0]
        if fits:
            kind[path] = fits[0]
    return first | second
