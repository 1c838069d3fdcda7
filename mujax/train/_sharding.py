"""Meshes, and where parameters, optimizer states and batches lie on them, for any number of processes.

The engine is JAX's own: a mesh over all devices of all processes, a `NamedSharding` for each array, and the
compiler, which inserts the communication. The split of an array never changes a result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Key, PyTree

from mujax._arguments import (
    ANY_MESH,
    AXES,
    KEY,
    MESH,
    NONE,
    NOT_BELOW_0,
    RULES,
    SHAPES,
    TRANSFORM,
    TREE,
    instance,
    several,
    takes,
)
from mujax.core import MupModel, Rules, largest_axis
from mujax.errors import ConfigError
from mujax.spec import leaf_path
from mujax.train._step import TrainState, unshared

_BATCH: Final = ("data", "fsdp")
_MODEL: Final = instance(MupModel, "a MupModel", "mup_init(...)")
_DEVICES: Final = several(
    "a sequence of devices", instance(jax.Device, "a device", ""), "jax.devices()", least=1
)


@takes(axes=AXES, devices=_DEVICES | NONE)
def make_mesh(axes: Mapping[str, int] | str, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices of all processes.

    Args:
        axes: size by name, in order, or the text `"data=2,fsdp=4"`; one size may be -1, for the rest of the
            devices. Neighbours along the last axis are nearest to each other. A model without annotations
            knows `data`, `fsdp` and `tensor`; see `MupModel.partition`.
        devices: None for all.

    Raises:
        ConfigError: sizes that do not multiply to the number of devices, or text of another form.

    >>> dict(make_mesh({"data": 1, "fsdp": -1}).shape) == {"data": 1, "fsdp": jax.device_count()}
    True
    """
    sizes = _parsed(axes) if isinstance(axes, str) else dict(axes)
    count = jax.device_count() if devices is None else len(devices)
    given = ", ".join(f"{name}={size}" for name, size in sizes.items()) or "none"
    known = math.prod(size for size in sizes.values() if size != -1)
    rest = [name for name, size in sizes.items() if size == -1]
    if len(rest) == 1 and known > 0 and count % known == 0:
        sizes[rest[0]] = count // known
    if not sizes or min(sizes.values()) < 1 or math.prod(sizes.values()) != count:
        raise ConfigError(
            where="mesh",
            expected=f"axes whose sizes multiply to {count}, the number of devices",
            got=given,
            remedy="give one axis the size -1 for the rest of the devices",
        )
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=devices)


def _parsed(text: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if not name.isidentifier() or name in sizes or not size.removeprefix("-").isdigit():
            raise ConfigError(
                where="mesh", expected="axes and their sizes, such as data=2,fsdp=4", got=repr(text)
            )
        sizes[name] = int(size)
    return sizes


@takes(mup=_MODEL, mesh=ANY_MESH, tree=SHAPES | NONE, rules=RULES | NONE)
def shardings(mup: MupModel, mesh: Mesh, tree: PyTree = None, *, rules: Rules | None = None) -> PyTree:
    """Where each array of a tree that holds the model's parameters belongs on a mesh.

    Each parameter is split as `mup.partition(mesh, rules)` has it. What has its path and shape, as the
    moments of an optimizer, follows it; what has its path and another shape (factored moments,
    preconditioners) is split over its largest axis that `fsdp` divides; all else is replicated.

    Args:
        mup: the model.
        mesh: the mesh.
        tree: arrays or shapes: variables, a train state of any kind, an optimizer's state. By default what
            `mup.init` returns; for NNX the module's `nnx.State`.
        rules: as for `MupModel.partition`.

    Returns:
        A tree of the same structure, with a `NamedSharding` for each array.

    Raises:
        ConfigError: as `MupModel.partition` does.
        ShapeMismatchError: as `MupModel.partition` does.

    Example:
        >>> import flax.linen as nn, mujax
        >>> def net(width):
        ...     return nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(10)])
        >>> mup = mujax.mup_init(net(64), net(16), jnp.zeros((8, 4)))
        >>> places = shardings(mup, make_mesh({"fsdp": -1}))
        >>> variables = jax.jit(mup.init, out_shardings=places)(jax.random.key(0))
    """
    specs = mup.partition(mesh, rules)
    places = {path: (mup.spec[path].shape, NamedSharding(mesh, spec)) for path, spec in specs.items()}
    return following(mup.shapes if tree is None else tree, places, mesh)


Places = Mapping[str, tuple[tuple[int, ...], NamedSharding]]
"""Shape and sharding of each parameter, by path."""


def following(tree: PyTree, places: Places, mesh: Mesh) -> PyTree:
    """The sharding of each array of a tree: that of the parameter whose path its own path ends with."""
    whole = NamedSharding(mesh, PartitionSpec())
    split_by = mesh.shape.get("fsdp", 1)

    def place(path: Any, leaf: Any) -> NamedSharding:
        names, shape = leaf_path(path).split("/"), tuple(jnp.shape(leaf))
        ends = ("/".join(names[start:]) for start in range(len(names) + 1))
        found = next((places[end] for end in ends if end in places), None)
        if found is None or not any(found[1].spec):
            return whole
        if found[0] == shape:
            return found[1]
        axis = largest_axis(shape, split_by) if split_by > 1 else None
        return whole if axis is None else NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))

    return jax.tree_util.tree_map_with_path(place, tree)


@takes(mesh=ANY_MESH, rules=RULES | NONE, leading=NOT_BELOW_0)
def batch_sharding(mesh: Mesh, *, rules: Rules | None = None, leading: int = 0) -> NamedSharding:
    """How batches are split: over the axes that the rules give the name `batch`, or over `data` and `fsdp`.

    Args:
        mesh: the mesh.
        rules: as for `MupModel.partition`.
        leading: axes of an array before the batch's, such as that of the steps for `train_scan`.

    Raises:
        ConfigError: the rules give an axis that the mesh lacks.
    """
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, _batch_axes(mesh, rules)))


def _batch_axes(mesh: Mesh, rules: Rules | None) -> tuple[str, ...]:
    pairs = () if rules is None or isinstance(rules, Mapping) else rules
    named = next((target for name, target in pairs if name == "batch"), _BATCH)
    axes = (named,) if isinstance(named, str) else tuple(named or ())
    for axis in axes if named is not _BATCH else ():
        if axis not in mesh.shape:
            raise ConfigError(
                where="rules",
                expected=f"axes of the mesh, {', '.join(map(repr, mesh.shape))}, for 'batch'",
                got=repr(axis),
            )
    return tuple(axis for axis in axes if axis in mesh.shape)


def check_batch(examples: int, mesh: Mesh, rules: Rules | None = None) -> None:
    """Refuses a number of examples that the mesh does not divide.

    Raises:
        ConfigError: it does not.
    """
    axes = _batch_axes(mesh, rules)
    parts = math.prod(mesh.shape[axis] for axis in axes)
    if examples % parts:
        raise ConfigError(
            where="batch",
            expected=f"a multiple of {parts} examples, which the mesh's {' and '.join(axes)} split",
            got=examples,
        )


@takes(batch=TREE, mesh=MESH, rules=RULES | NONE, leading=NOT_BELOW_0)
def put_batch(batch: PyTree, mesh: Mesh, *, rules: Rules | None = None, leading: int = 0) -> PyTree:
    """Puts a batch on a mesh: each process gives its own share of the examples.

    Args:
        batch: a tree of arrays, whose examples are this process's share of the global batch, as `batch_share`
            numbers them; all of it where there is one process.
        mesh: the mesh.
        rules: as for `batch_sharding`.
        leading: as for `batch_sharding`.

    Returns:
        Global arrays.

    Raises:
        ConfigError: a number of examples that the mesh does not divide.
    """
    sharding = batch_sharding(mesh, rules=rules, leading=leading)
    _, shares = batch_share(mesh, rules=rules)

    def put(leaf: Any) -> jax.Array:
        leaf = np.asarray(leaf)
        if leaf.ndim <= leading:
            raise ConfigError(
                where="batch",
                expected=f"arrays of at least {leading + 1} axes, up to that of the examples",
                got=f"one of shape {leaf.shape}",
            )
        whole = (*leaf.shape[:leading], leaf.shape[leading] * shares, *leaf.shape[leading + 1 :])
        check_batch(whole[leading], mesh, rules)
        return jax.make_array_from_process_local_data(sharding, leaf, whole)

    return jax.tree.map(put, batch)


@takes(mesh=MESH, rules=RULES | NONE)
def batch_share(mesh: Mesh, *, rules: Rules | None = None) -> tuple[int, int]:
    """Which share of each global batch this process reads, for `put_batch`.

    Processes between which only parameters are split (`tensor`) read the same share.

    Args:
        mesh: the mesh.
        rules: as for `MupModel.partition`.

    Returns:
        The number of the share, from 0, and the number of shares.

    >>> batch_share(make_mesh({"fsdp": -1}))
    (0, 1)
    """
    axes = _batch_axes(mesh, rules)
    parts = math.prod(mesh.shape[axis] for axis in axes)
    held = NamedSharding(mesh, PartitionSpec(axes)).devices_indices_map((parts,))
    first: dict[int, int] = {}
    for device, (index,) in held.items():
        start = index.indices(parts)[0]
        first[device.process_index] = min(start, first.get(device.process_index, start))
    starts = sorted(set(first.values()))
    return starts.index(first[jax.process_index()]), len(starts)


@takes(mup=_MODEL, tx=TRANSFORM, key=KEY | NONE, mesh=MESH | NONE, rules=RULES | NONE)
def create_state(
    mup: MupModel,
    tx: optax.GradientTransformation,
    *,
    key: Key[Any, ""] | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
) -> TrainState:
    """The state before the first step, of any kind of model, made where it belongs.

    On a mesh parameters and moments are initialised in one compiled program, each device its own part: no
    device ever holds an array that is split as a whole. The numbers are those of a single device.

    Args:
        mup: the model.
        tx: the optimizer.
        key: for the initial values and for the training; `jax.random.key(0)` by default.
        mesh: None for the default device.
        rules: as for `MupModel.partition`.

    Returns:
        The state, with `params` and `model_state` as `mup.split` gives them.

    Raises:
        ConfigError: as `MupModel.partition` does.
        ShapeMismatchError: as `MupModel.partition` does.
    """

    def create(key: Key[Any, ""]) -> TrainState:
        init_key, key = jax.random.split(key)
        params, model_state = mup.split(mup.init(init_key))
        step = jnp.zeros((), jnp.int32)
        return TrainState(params, tx.init(params), model_state, key, step)

    key = jax.random.key(0) if key is None else key
    if mesh is None:
        return unshared(jax.jit(create)(key))
    places = shardings(mup, mesh, jax.eval_shape(create, key), rules=rules)
    return unshared(jax.jit(create, out_shardings=places)(key))
