"""What differs between JAX releases in how a traced program is represented, and nothing else.

Every equation that holds programs is read here, into one of the classes below; no other module looks at the
parameters of such an equation. A difference names the release that made it. Tested on JAX 0.10.2 to 0.12.0.1.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from mujax.core.program._source import source_line
from mujax.errors import MujaxError

Jaxpr: TypeAlias = jex.Jaxpr
ClosedJaxpr: TypeAlias = jex.ClosedJaxpr
JaxprEqn: TypeAlias = jex.JaxprEqn
Var: TypeAlias = jex.Var
Atom: TypeAlias = jex.Var | jex.Literal


def shape_of(atom: Atom) -> tuple[int, ...]:
    """The shape of a value; empty if it is not an array."""
    return tuple(getattr(atom.aval, "shape", ()))


def dtype_of(atom: Atom) -> Any:
    """The dtype of a value; None if it is not an array."""
    return getattr(atom.aval, "dtype", None)


def is_float(atom: Atom) -> bool:
    """Whether a value is an array of floating-point or complex numbers."""
    dtype = dtype_of(atom)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def under_named_axes() -> bool:
    """Whether what is traced here may depend on named axes of a `vmap` or `shard_map` around it."""
    # The name warns that JAX may change it: without it, assume that there are such axes.
    nonempty = getattr(jex, "nonempty_axis_env_DO_NOT_USE", None)
    return nonempty is None or nonempty()


# ---- programs --------------------------------------------------------------------------------------


def as_closed(program: Jaxpr | ClosedJaxpr) -> ClosedJaxpr:
    """A program with its constants.

    Until 0.10 `remat2` and `shard_map` held an open `Jaxpr` and all others a `ClosedJaxpr`; 0.11.0 made the
    two one type.
    """
    return program if isinstance(program, jex.ClosedJaxpr) else jex.ClosedJaxpr(program, ())


def rebuilt(
    program: Jaxpr,
    *,
    constvars: Sequence[Var],
    consts: Sequence[Any],
    invars: Sequence[Var],
    outvars: Sequence[Atom],
    eqns: Sequence[JaxprEqn],
) -> ClosedJaxpr:
    """A program made of equations of another one."""
    info = program.debug_info
    if info is not None:
        info = info._replace(arg_names=("",) * len(invars), result_paths=("",) * len(outvars))
    changed = program.replace(
        constvars=list(constvars),
        invars=list(invars),
        outvars=list(outvars),
        eqns=list(eqns),
        debug_info=info,
    )
    return jex.ClosedJaxpr(changed, list(consts))


@functools.lru_cache(maxsize=1024)
def spare_vars(avals: tuple[Any, ...]) -> tuple[Var, ...]:
    """Variables that no program has, of some types."""
    return tuple(jax.make_jaxpr(lambda *xs: xs)(*map(_like, avals)).jaxpr.invars)


# ---- equations that hold programs ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Call:
    """Runs its program once, on the equation's operands. A change inside changes nothing else.

    Attributes:
        program: what it runs.
    """

    program: ClosedJaxpr


@dataclasses.dataclass(frozen=True)
class Jit(Call):
    """`jax.jit`, with the arguments to call it with."""

    name: str
    inline: Any
    in_shardings: tuple[Any, ...]
    out_shardings: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Checkpoint(Call):
    """`jax.checkpoint`, with the arguments to call it with."""

    policy: Any
    prevent_cse: Any


@dataclasses.dataclass(frozen=True)
class ShardMap(Call):
    """`jax.shard_map`, with the arguments to call it with; the program sees shards."""

    mesh: Any
    in_specs: tuple[Any, ...]
    out_specs: tuple[Any, ...]
    axis_names: Any
    check_vma: bool


@dataclasses.dataclass(frozen=True)
class CustomJvp(Call):
    """`jax.custom_jvp`: a change inside is differentiated as it stands, without the function's own rule."""


@dataclasses.dataclass(frozen=True)
class CustomRule(Call):
    """A function with a rule of its own (a derivative, a batching rule) that a change inside would lose."""


@dataclasses.dataclass(frozen=True)
class Kernel(CustomRule):
    """`pallas_call`: a program that reads and writes memory, run once for each point of a grid.

    The program's inputs are memory: blocks of the operands, then of the outputs, then some of its own.

    Attributes:
        grid: the sizes of the grid.
    """

    grid: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Scan:
    """`jax.lax.scan`: operands are constants, then the carry, then what is scanned over."""

    body: ClosedJaxpr
    consts: int
    carry: int
    length: int
    reverse: bool
    unroll: Any


@dataclasses.dataclass(frozen=True)
class While:
    """`jax.lax.while_loop`: operands are the condition's constants, the body's, then the carry."""

    cond: ClosedJaxpr
    body: ClosedJaxpr
    cond_consts: int
    body_consts: int


@dataclasses.dataclass(frozen=True)
class Cond:
    """`jax.lax.cond` and `switch`: operands are the index, then those of every branch."""

    branches: tuple[ClosedJaxpr, ...]


Control: TypeAlias = Call | Scan | While | Cond


def control(eqn: JaxprEqn) -> Control | None:
    """What an equation that holds programs does with them; None for any other equation.

    A primitive that holds programs and is not listed here is like any unknown one: it cannot be looked into.

    Raises:
        MujaxError: this JAX release represents the primitive in a way that is not known here.
    """
    reader = _READERS.get(eqn.primitive.name)
    return None if reader is None else reader(eqn)


def mesh_sizes(eqn: JaxprEqn) -> tuple[tuple[str, int], ...]:
    """Names and sizes of the mesh axes that a `jax.shard_map` runs over; nothing for any other equation."""
    held = control(eqn) if eqn.primitive.name == "shard_map" else None
    return tuple(held.mesh.shape.items()) if isinstance(held, ShardMap) else ()


def holds_programs(eqn: JaxprEqn) -> bool:
    """Whether an equation holds a program of any kind, known here or not."""
    return next(iter(jex.jaxprs_in_params(eqn.params)), None) is not None


def primitive_name(eqn: JaxprEqn) -> str:
    """The name of an equation's primitive, for the user to read.

    Since 0.11.2 some functions are one primitive `call_hi_primitive`, which holds the one that is meant.
    """
    held = eqn.params.get("_prim")
    return eqn.primitive.name if held is None else type(held).__name__


def memory_written(eqn: JaxprEqn) -> int | None:
    """Which operand an equation writes into the memory that is its first operand; None where unknown.

    The others are indices and masks.
    """
    if eqn.primitive.name == "addupdate":
        return 1
    out = eqn.outvars[0]
    like = [
        number
        for number, atom in enumerate(eqn.invars)
        if number and (shape_of(atom), dtype_of(atom)) == (shape_of(out), dtype_of(out))
    ]
    return like[0] if len(like) == 1 else None


def checkpoint_label(eqn: JaxprEqn) -> str | None:
    """The name that `jax.ad_checkpoint.checkpoint_name` gives a value; None for any other equation."""
    # With `jax_remat3`, off by default, it is a `call_hi_primitive`.
    if eqn.primitive.name == "name":
        return _parameter(eqn, "name")
    held: Any = eqn.params.get("_prim")
    return held.name if type(held).__name__ == "CheckpointName" else None


def _parameter(eqn: JaxprEqn, *names: str) -> Any:
    """A parameter of an equation, under the first of the names that it was given by some release."""
    for name in names:
        if name in eqn.params:
            return eqn.params[name]
    raise MujaxError(
        where=source_line(eqn),
        expected=f"the primitive {eqn.primitive.name!r} of JAX {jax.__version__} to have the parameter "
        f"{' or '.join(map(repr, names))}",
        got=", ".join(map(repr, sorted(eqn.params))),
        remedy="this JAX release is newer than this mujax: report it to mujax with this sentence, and use "
        "JAX 0.12.0.1 until then",
    )


def _call_named(kind: Callable[[ClosedJaxpr], Call], *names: str) -> Callable[[JaxprEqn], Call]:
    return lambda eqn: kind(as_closed(_parameter(eqn, *names)))


def _jit(eqn: JaxprEqn) -> Jit:
    return Jit(
        as_closed(_parameter(eqn, "jaxpr")),
        *(_parameter(eqn, name) for name in ("name", "inline", "in_shardings", "out_shardings")),
    )


def _checkpoint(eqn: JaxprEqn) -> Checkpoint:
    program = as_closed(_parameter(eqn, "jaxpr"))
    return Checkpoint(program, _parameter(eqn, "policy"), _parameter(eqn, "prevent_cse"))


def _shard_map(eqn: JaxprEqn) -> ShardMap:
    return ShardMap(
        as_closed(_parameter(eqn, "jaxpr")),
        _parameter(eqn, "mesh"),
        tuple(_parameter(eqn, "in_specs")),
        tuple(_parameter(eqn, "out_specs")),
        _parameter(eqn, "newly_manual_axes"),
        _parameter(eqn, "check_vma"),
    )


def _scan(eqn: JaxprEqn) -> Scan:
    # 0.11.0 replaced the numbers of constants and carries by a tree of the flat operands.
    operands = _parameter(eqn, "ft_in", "num_consts")
    if isinstance(operands, int):
        consts, carry = operands, _parameter(eqn, "num_carry")
    else:
        consts, carry, _ = map(len, operands.unpack())
    return Scan(
        as_closed(_parameter(eqn, "jaxpr")),
        consts,
        carry,
        _parameter(eqn, "length"),
        _parameter(eqn, "reverse"),
        _parameter(eqn, "unroll"),
    )


def _while(eqn: JaxprEqn) -> While:
    return While(
        as_closed(_parameter(eqn, "cond_jaxpr")),
        as_closed(_parameter(eqn, "body_jaxpr")),
        _parameter(eqn, "cond_nconsts"),
        _parameter(eqn, "body_nconsts"),
    )


def _cond(eqn: JaxprEqn) -> Cond:
    return Cond(tuple(map(as_closed, _parameter(eqn, "branches"))))


@functools.lru_cache(maxsize=1024)
def _hi_primitive(eqn: JaxprEqn) -> Call:
    """A primitive of JAX's newer kind: a class that defines itself in terms of other functions."""
    held = _parameter(eqn, "_prim")

    def expanded(*operands: Any) -> Any:
        return jax.tree.leaves(held.expand(*jax.tree.unflatten(held.in_tree, operands)))

    program = as_closed(jax.make_jaxpr(expanded)(*(_like(atom.aval) for atom in eqn.invars)))
    # With `jax_remat3` and `jax_custom_jvp3`, off by default, in place of `remat2` and `custom_jvp_call`.
    match type(held).__name__:
        case "RematTraced":
            return Checkpoint(program, held.policy, getattr(held, "prevent_cse", True))
        case "CustomJVPTraced":
            return CustomJvp(program)
        case _:
            return CustomRule(program)


@functools.lru_cache(maxsize=1024)
def _fused_attention(eqn: JaxprEqn) -> CustomRule | None:
    """cuDNN's kernel behind `jax.nn.dot_product_attention`: it computes what `implementation="xla"` does.

    Masks, lengths and dropout are left out: they change which logits count, and not what these are.
    """
    params = eqn.params
    scale, (with_bias, *_) = _parameter(eqn, "scale"), _parameter(eqn, "variadic_args")
    pages = any(shape_of(atom) != (0,) for atom in eqn.invars[-2:])
    # Of the axes batch, time, heads, features; since 0.12 the scores may go through a function of the user's.
    if len(eqn.outvars) > 1 or pages or params.get("layout") or params.get("score_mod") is not None:
        return None

    def attention(query: Any, key: Any, value: Any, bias: Any, *_: Any) -> tuple[Any]:
        bias = bias if with_bias else None
        return (
            jax.nn.dot_product_attention(query, key, value, bias, scale=float(scale), implementation="xla"),
        )

    return CustomRule(as_closed(jax.make_jaxpr(attention)(*(_like(atom.aval) for atom in eqn.invars))))


def _like(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
        aval.shape, aval.dtype, weak_type=aval.weak_type, sharding=getattr(aval, "sharding", None)
    )


def _kernel(eqn: JaxprEqn) -> Kernel | None:
    """A kernel whose memory is as `Kernel` has it; None for any other, which cannot be looked into."""
    params = eqn.params
    program, mapping = params.get("jaxpr"), params.get("grid_mapping")
    dynamic = getattr(mapping, "num_dynamic_grid_bounds", None)
    if not isinstance(program, jex.Jaxpr | jex.ClosedJaxpr) or dynamic != 0:
        return None
    closed = as_closed(program)
    enough = len(closed.jaxpr.invars) >= len(eqn.invars) + len(eqn.outvars)
    if closed.jaxpr.constvars or params.get("input_output_aliases") or not enough:
        return None
    return Kernel(closed, tuple(getattr(mapping, "grid", ())))


_READERS: Final[Mapping[str, Callable[[JaxprEqn], Control | None]]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "jit": _jit,
    "remat2": _checkpoint,
    "shard_map": _shard_map,
    "closed_call": _call_named(Call, "call_jaxpr"),
    "core_call": _call_named(Call, "call_jaxpr"),
    "call": _call_named(Call, "call_jaxpr"),
    # New in 0.12.
    "eval_jaxpr": _call_named(Call, "call_jaxpr"),
    # 0.11.2 renamed the parameter of `composite`.
    "composite": _call_named(Call, "call_jaxpr", "jaxpr"),
    "xla_metadata_call": _call_named(Call, "jaxpr"),
    "custom_jvp_call": _call_named(CustomJvp, "call_jaxpr"),
    "custom_vjp_call": _call_named(CustomRule, "call_jaxpr"),
    "custom_vmap_call": _call_named(CustomRule, "call"),
    "call_hi_primitive": _hi_primitive,
    "pallas_call": _kernel,
    "dot_product_attention_fwd_wrapper": _fused_attention,
}

CONTROL: Final = frozenset(_READERS)
"""The primitives whose programs are known."""
