"""What goes wrong where a base is traced on another mesh than its target."""

from __future__ import annotations

from typing import Final

from mujax.core._corrections import Plan
from mujax.core.program import ClosedJaxpr, equations, mesh_sizes, source_line
from mujax.core.trace import Finding
from mujax.errors import TraceMismatchError

# Primitives of code that splits arrays over a mesh.
_SPLITS: Final = frozenset({"shard_map", "sharding_constraint", "reshard", "mesh_cast"})


def refuse_own_mesh(program: ClosedJaxpr, error: Exception) -> None:
    """Raises an error with the remedy where a base fails and its target's code names a mesh itself.

    Args:
        program: the target's.
        error: what tracing the base raised.

    Raises:
        TraceMismatchError: the target's program splits arrays over a mesh.
    """
    eqn = next((eqn for _, eqn in equations(program) if eqn.primitive.name in _SPLITS), None)
    if eqn is not None:
        raise TraceMismatchError(
            where=f"base at {source_line(eqn)}",
            expected="widths that the mesh divides, since the model's code names the mesh itself",
            got=f"an error while it was traced: {str(error).strip().partition(chr(10))[0].rstrip('.: ')}",
            remedy="leave out mesh= in the model and call mujax under jax.set_mesh(mesh), where the base is "
            "traced on one device, or take a wider base",
        ) from error


def other_mesh(base: ClosedJaxpr, target: ClosedJaxpr, plan: Plan) -> list[Finding]:
    """Reports factors that may come from a base that runs over another number of devices than the target.

    A mean over devices divides by their number, a constant of the program as any other. A sum does not, and
    with nothing but sums no constant of the model is held at its base value.
    """
    small, big = ([mesh_sizes(eqn) for _, eqn in equations(each)] for each in (base, target))
    meshes = next(
        (pair for pair in zip(filter(None, small), filter(None, big), strict=False) if pair[0] != pair[1]),
        None,
    )
    if meshes is None:
        return []
    here, there = map(dict, meshes)
    return [
        Finding(
            "another mesh",
            f"the base runs over {here} and the target over {there}, so the factor {correction.factor:.4g} "
            "may come from a mean over devices and not from the width; leave out mesh= in the model and call "
            "mup_init under jax.set_mesh(mesh)",
            correction.where,
        )
        for correction in plan.in_order()
        if correction.kind == "scale"
    ]


def check_same_places(program: ClosedJaxpr, alone: ClosedJaxpr) -> None:
    """Checks that a program is on one device what it is on the mesh, so that places mean the same in both.

    Raises:
        TraceMismatchError: the model's code takes another path on one device.
    """
    one, other = (
        [(site, eqn.primitive.name, eqn) for site, eqn in equations(each)] for each in (program, alone)
    )
    for here, there in zip(one, other, strict=False):
        if here[:2] != there[:2]:
            break
    else:
        if len(one) == len(other):
            return
        here = max(one, other, key=len)[min(len(one), len(other))]
    raise TraceMismatchError(
        where=source_line(here[2]),
        expected="the same operations on one device, where the base is traced, as on the mesh",
        got="others",
        remedy="take a base whose widths the mesh divides",
    )
