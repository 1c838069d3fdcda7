"""The mesh in context, replaced by a mesh of one device while a program is traced."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding


def is_split() -> bool:
    """Whether a mesh of several devices is in context, outside of `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and not mesh.manual_axes


@contextlib.contextmanager
def mesh_of_one() -> Iterator[None]:
    """A mesh with the names and types of the axes of the one in context, if there is one, all of size 1."""
    around = jax.sharding.get_abstract_mesh()
    if around.empty:
        yield
        return
    sizes, names, types = (1,) * len(around.axis_names), around.axis_names, around.axis_types
    with contextlib.ExitStack() as stack:
        try:
            one = jax.make_mesh(sizes, names, axis_types=types, devices=jax.local_devices()[:1])
            stack.enter_context(jax.set_mesh(one))
        except ValueError:
            # Inside of `jax.jit` no mesh of devices can be set, and one without devices is enough to trace.
            # Its size may differ from that of the mesh around it only if one of them is empty.
            stack.enter_context(jax.sharding.use_abstract_mesh(AbstractMesh((), ())))
            stack.enter_context(jax.sharding.use_abstract_mesh(AbstractMesh(sizes, names, axis_types=types)))
        yield


def moved(leaf: Any) -> Any:
    """The type of an array, on the mesh in context."""
    aval = jax.typeof(leaf) if not isinstance(leaf, jax.ShapeDtypeStruct) else leaf
    spec: Any = getattr(getattr(aval, "sharding", None), "spec", None) or ()
    mesh = jax.sharding.get_abstract_mesh()
    is_named = not mesh.empty and any(name is not None for name in spec)
    return jax.ShapeDtypeStruct(
        aval.shape,
        aval.dtype,
        weak_type=getattr(aval, "weak_type", False),
        sharding=NamedSharding(mesh, spec) if is_named else None,
    )
