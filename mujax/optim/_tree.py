"""Maps a `MupSpec` onto the parameter and update trees that optax hands to a transform.

Everything here happens while tracing: it reads key paths and shapes, never values.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import jax
import numpy as np
import optax

from mujax.errors import SpecMismatchError
from mujax.spec import MupSpec, leaf_path

_COLLECTION: Final = "params"


def _is_hole(node: Any) -> bool:
    """Whether something was taken out of the tree: by `optax.masked`, or by a filter that leaves None."""
    return node is None or isinstance(node, optax.MaskedNode)


def _is_placeholder(tree: Any) -> bool:
    """Whether one opaque node stands for the whole tree.

    `optax.tree.map_params` calls `init` with such a node to find out where a state keeps copies of the
    parameters. An empty container is not one: there, parameters are missing.
    """
    structure = jax.tree.structure(tree)
    return structure.num_nodes == 1 and structure.num_leaves == 0 and not isinstance(tree, Mapping | Sequence)


def _unwrapped(paths: Iterable[str]) -> list[str]:
    """The paths without the collection's name that all of them begin with, as in `{"params": {...}}`."""
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


def leaf_paths(spec: MupSpec, tree: Any, what: str) -> list[str]:
    """The spec's path of every leaf of a tree, in the order of `jax.tree.leaves`.

    Boxes (`nn.Partitioned`, `nnx.Variable`) and a `{"params": ...}` around the tree are looked through.
    A parameter may be absent only where an `optax.MaskedNode` or None stands in place of it or of a
    subtree that holds it.

    Args:
        spec: the parameters that are expected.
        tree: parameters, gradients or updates.
        what: what the tree is, for the error's text.

    Returns:
        One key of `spec` for each leaf.

    Raises:
        SpecMismatchError: the tree lacks a parameter, has another shape for it, or has one too many.
    """
    if _is_placeholder(tree):
        return []
    entries = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_hole)
    known = dict(zip(_unwrapped(spec), spec, strict=True))
    found: dict[str, Any] = {}
    holes: set[str] = set()
    names: dict[str, str] = {}
    for path, (key_path, leaf) in zip(
        _unwrapped(leaf_path(key_path) for key_path, _ in entries), entries, strict=True
    ):
        names[path] = leaf_path(key_path)
        if _is_hole(leaf):
            holes.add(path)
        else:
            found[path] = leaf

    def masked(path: str) -> bool:
        parents_and_self = itertools.accumulate(path.split("/"), lambda parent, name: f"{parent}/{name}")
        return "" in holes or any(node in holes for node in parents_and_self)

    extra = next((path for path in found if path not in known), None)
    for path, spec_path in known.items():
        expected = spec[spec_path].shape
        if path not in found:
            if masked(path):
                continue
            instead = "" if extra is None else f" but {names[extra]!r}, which the spec lacks"
            raise SpecMismatchError(
                f"{spec_path}: expected shape {expected}, found no such path in the tree of {what}{instead}. "
                "Pass the parameters that mup_init described; to train a part of them, use optax.masked or a "
                "MupSpec of that part."
            )
        shape = _shape(found[path])
        if shape != expected and not _is_local_shard(shape, expected):
            raise SpecMismatchError(
                f"{spec_path}: expected shape {expected}, found {shape} in the tree of {what}. "
                "Call mup_init on this very model; map over leading axes of stacked models with jax.vmap."
            )
    if extra is not None:
        raise SpecMismatchError(
            f"{names[extra]}: expected nothing here, found shape {_shape(found[extra])} in the tree of "
            f"{what}. Pass only the parameters, no other collections, of the model that mup_init was given."
        )
    return [known[path] for path in found]


def multiply(tree: Any, paths: Sequence[str], factors: Mapping[str, Any]) -> Any:
    """Multiplies each leaf with its own factor; a leaf whose factor is 1 is passed on as it is.

    Factors are Python floats or scalars that are being traced; they take the leaf's dtype.

    Args:
        tree: updates or parameters.
        paths: `leaf_paths` of the tree.
        factors: the factor of each path; 1 where a path is absent.
    """
    if not factors:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(
        _times(leaf, factors.get(path, 1.0)) for leaf, path in zip(leaves, paths, strict=True)
    )


def _times(leaf: Any, factor: Any) -> Any:
    if isinstance(factor, int | float):
        return leaf if factor == 1 else leaf * float(factor)
    return (leaf * factor).astype(leaf.dtype)
