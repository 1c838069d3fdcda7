"""Evaluates a traced program with factors inserted where the parametrization needs them, and records values.

The program runs as it was traced: equations between two insertions are handed to JAX as one program, so
that name stacks, source lines, effects and every parameter of a primitive are unchanged. Only an
equation that has an insertion inside (a scan, a remat) is built again, through its public function.
"""

import collections
import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jaxtyping import Array

from mujax.core.program._jax import (
    Atom,
    Call,
    Checkpoint,
    ClosedJaxpr,
    Cond,
    CustomJvp,
    CustomRule,
    Jaxpr,
    JaxprEqn,
    Jit,
    Scan,
    ShardMap,
    Var,
    While,
    control,
    dtype_of,
    primitive_name,
    rebuilt,
    shape_of,
    spare_vars,
)
from mujax.core.program._primitives import PRODUCTS
from mujax.core.program._sites import EqnPath, Subprogram, enclosing_equations, subprograms
from mujax.core.program._source import scope, source_line
from mujax.errors import MujaxError


@dataclasses.dataclass(frozen=True)
class Insertion:
    """Constants, possibly traced values, that multiply the first output of an equation, or what it reads.

    A product is linear in each operand. Where its activation is no larger than its output, that is
    multiplied instead: with a large vocabulary the logits are much larger, and a factor on an
    activation is fused with the norm or the nonlinearity that made it.

    Attributes:
        factors: the constants.
        activation: which operand of the equation is an activation, if it is a product.
        operands: operands by number, and the factors that multiply them there and nowhere else.
        outputs: other outputs by number, and their factors.
    """

    factors: tuple[Any, ...] = ()
    activation: int | None = None
    operands: tuple[tuple[int, Any], ...] = ()
    outputs: tuple[tuple[int, Any], ...] = ()

    def times_factors(self, out: Array) -> Array:
        """The output times the constants, in its own dtype."""
        return _times(out, self.factors)


Insertions = Mapping[EqnPath, Insertion]


class Record(NamedTuple):
    """The values that a tap records at an equation, with a leading axis for each scan around it.

    Attributes:
        operands: what the equation read.
        out: its first output, after the insertion.
    """

    operands: tuple[Any, ...]
    out: Any


Records = dict[EqnPath, Record]


@dataclasses.dataclass(frozen=True)
class _Work:
    """The insertions and the tap at an equation."""

    insertion: Insertion | None = None
    tap: bool = False


_Works = Mapping[EqnPath, _Work]


def evaluate(program: ClosedJaxpr, args: Sequence[Any], insertions: Insertions) -> list[Array]:
    """Runs a traced program and multiplies some of its values.

    Args:
        program: the program.
        args: its flat inputs.
        insertions: the factors, by the place of the equation.

    Returns:
        The flat outputs.

    Raises:
        MujaxError: an insertion is inside a primitive that can't be built again.
    """
    outs, _ = evaluate_and_record(program, args, insertions, ())
    return outs


def evaluate_and_record(
    program: ClosedJaxpr, args: Sequence[Any], insertions: Insertions, taps: Collection[EqnPath]
) -> tuple[list[Array], Records]:
    """As `evaluate`, and returns what the equations at `taps` read and wrote.

    Args:
        program: the program.
        args: its flat inputs.
        insertions: the factors, by the place of the equation.
        taps: the places of the equations to record; each must be `tappable`.

    Raises:
        MujaxError: an insertion is inside a primitive that can't be built again.
    """
    sites = dict.fromkeys((*insertions, *taps))
    taps = frozenset(taps)
    return _run(program, args, {site: _Work(insertions.get(site), site in taps) for site in sites})


def blocked(program: ClosedJaxpr, site: EqnPath) -> str | None:
    """The name of the primitive around an equation that keeps an insertion out, if there is one."""
    around = enclosing_equations(program, site)
    return next((primitive_name(eqn) for eqn in around if isinstance(control(eqn), CustomRule)), None)


def tappable(program: ClosedJaxpr, site: EqnPath) -> bool:
    """Whether a tap can be placed there: its values must leave every primitive around it."""
    return all(type(control(eqn)) in _TRANSPARENT for eqn in enclosing_equations(program, site))


def loses_derivative(program: ClosedJaxpr, site: EqnPath) -> bool:
    """Whether an insertion there makes JAX differentiate the body of a function that has its own rule."""
    return any(isinstance(control(eqn), CustomJvp) for eqn in enclosing_equations(program, site))


# ---- the equations of one program ------------------------------------------------------------------


def _run(program: ClosedJaxpr, args: Sequence[Any], works: _Works) -> tuple[list[Any], Records]:
    if not works:
        return jex.jaxpr_as_fun(program)(*args), {}
    jaxpr = program.jaxpr
    by_eqn: dict[int, dict[EqnPath, _Work]] = collections.defaultdict(dict)
    for path, work in works.items():
        by_eqn[int(path[0])][path[1:]] = work
    records: Records = {}
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, program.consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    last = _last_uses(jaxpr)

    def read(atom: Atom) -> Any:
        return jnp.asarray(atom.val, dtype_of(atom)) if isinstance(atom, jex.Literal) else env[atom]

    position = 0
    for index in sorted(by_eqn):
        inside = {path: work for path, work in by_eqn[index].items() if path}
        eqn = jaxpr.eqns[index]
        insertion, tap = (work := by_eqn[index].get((), _Work())).insertion, work.tap
        # A tap records the unchanged operands.
        operand = None if tap or insertion is None else _cheaper_operand(eqn, insertion)
        changed = _changed_operands(insertion, operand)
        if tap or inside:
            _segment(jaxpr, position, index, env, last)
            position = index
        operands = tuple(read(atom) for atom in eqn.invars) if tap or inside else ()
        if inside:
            given = list(operands)
            for number, factors in changed:
                given[number] = _times(given[number], factors)
            outs, found = _rebuild(eqn, given, inside)
            env.update(zip(eqn.outvars, outs, strict=True))
            records.update({(index, *path): record for path, record in found.items()})
        elif changed:
            _segment(jaxpr, position, index, env, last)
            atoms, spare = (
                list(eqn.invars),
                spare_vars(tuple(eqn.invars[number].aval for number, _ in changed)),
            )
            for (number, factors), var in zip(changed, spare, strict=True):
                env[var] = _times(read(atoms[number]), factors)
                atoms[number] = var
            _segment(jaxpr, index, index + 1, env, last, [eqn.replace(invars=atoms)])
        else:
            _segment(jaxpr, position, index + 1, env, last)
        if insertion is not None:
            multiplied = insertion.outputs + tuple((0, one) for one in insertion.factors if operand is None)
            for number, factor in multiplied:
                env[eqn.outvars[number]] = _times(env[eqn.outvars[number]], (factor,))
        if tap:
            records[(index,)] = Record(operands, env[eqn.outvars[0]])
        position = index + 1
    _segment(jaxpr, position, len(jaxpr.eqns), env, last)
    return [read(atom) for atom in jaxpr.outvars], records


def _times(out: Any, factors: Sequence[Any]) -> Any:
    """The value times constants, in its own dtype."""
    for factor in factors:
        out = out * jnp.asarray(factor, out.dtype)
    return out


def _changed_operands(insertion: Insertion | None, operand: int | None) -> list[tuple[int, list[Any]]]:
    """The operands that are multiplied, and their factors; those on the output may go to `operand`."""
    factors: dict[int, list[Any]] = {}
    for number, factor in insertion.operands if insertion else ():
        factors.setdefault(number, []).append(factor)
    if insertion and operand is not None:
        factors.setdefault(operand, []).extend(insertion.factors)
    return [(number, found) for number, found in factors.items() if found]


def _cheaper_operand(eqn: JaxprEqn, insertion: Insertion) -> int | None:
    """The activation in a product, if multiplying it costs no more and does as well.

    In a narrower dtype than the output's it would cost precision.
    """
    number = insertion.activation
    if number is None or eqn.primitive.name not in PRODUCTS:
        return None
    left, right, *_ = eqn.invars
    atom, out = eqn.invars[number], eqn.outvars[0]
    try:
        smaller = math.prod(shape_of(atom)) <= math.prod(shape_of(out))
    except jex.InconclusiveDimensionOperation:
        # Symbolic sizes (`jax.export`) that can't be compared.
        return None
    return number if smaller and left is not right and dtype_of(atom) == dtype_of(out) else None


def _last_uses(jaxpr: Jaxpr) -> dict[Any, int]:
    last: dict[Any, int] = {}
    for index, eqn in enumerate(jaxpr.eqns):
        last.update((atom, index) for atom in eqn.invars if not isinstance(atom, jex.Literal))
    end = len(jaxpr.eqns)
    last.update((atom, end) for atom in jaxpr.outvars if not isinstance(atom, jex.Literal))
    return last


def _segment(
    jaxpr: Jaxpr,
    start: int,
    stop: int,
    env: dict[Any, Any],
    last: Mapping[Any, int],
    instead: Sequence[JaxprEqn] = (),
) -> None:
    """Runs the equations from `start` to `stop`, or others, and drops what nothing needs afterwards."""
    if start >= stop:
        return
    eqns = instead or jaxpr.eqns[start:stop]
    defined: dict[Var, None] = dict.fromkeys(var for eqn in eqns for var in eqn.outvars)
    ins = dict.fromkeys(
        atom
        for eqn in eqns
        for atom in eqn.invars
        if not isinstance(atom, jex.Literal) and atom not in defined
    )
    # The output of the last equation is kept for its insertion even if nothing reads it.
    outs = [var for var in defined if last.get(var, -1) >= stop or var in eqns[-1].outvars]
    outs = [var for var in outs if not isinstance(var, jex.DropVar)]
    piece = rebuilt(jaxpr, constvars=(), consts=(), invars=list(ins), outvars=outs, eqns=eqns)
    results = jex.jaxpr_as_fun(piece)(*(env[var] for var in ins))
    env.update(zip(outs, results, strict=True))
    read = (atom for eqn in jaxpr.eqns[start:stop] for atom in eqn.invars) if instead else ()
    for var in (*ins, *read):
        if not isinstance(var, jex.Literal) and last.get(var, -1) < stop:
            env.pop(var, None)


# ---- equations that contain an insertion or a tap --------------------------------------------------

_Outs = tuple[Sequence[Any], Records]


def _rebuild(eqn: JaxprEqn, args: Sequence[Any], works: _Works) -> _Outs:
    name = scope(eqn)
    with eqn.ctx.manager:
        if not name:
            return _built_again(eqn, args, works)
        with jax.named_scope(name):
            return _built_again(eqn, args, works)


def _built_again(eqn: JaxprEqn, args: Sequence[Any], works: _Works) -> _Outs:
    held, inner = control(eqn), subprograms(eqn)
    match held:
        case Jit():
            return _jit(held, inner[0], args, works)
        case Checkpoint():
            return jax.checkpoint(
                lambda *args: _inside(inner[0], args, works), prevent_cse=held.prevent_cse, policy=held.policy
            )(*args)
        case ShardMap():
            return _shard_map(held, inner[0], args, works), {}
        case Scan():
            return _scan(held, inner[0], args, works)
        case While():
            return _while(held, inner, args, works), {}
        case Cond():
            branches = [lambda *args, one=one: _inside(one, args, works)[0] for one in inner]
            return jax.lax.switch(args[0], branches, *args[1:]), {}
        case Call() if not isinstance(held, CustomRule):
            # The plain body of a `CustomJvp` is differentiated: see `loses_derivative`.
            return _inside(inner[0], args, works)
    raise MujaxError(
        where=source_line(eqn),
        expected=f"the correction to stand outside of {primitive_name(eqn)}, whose body cannot be changed "
        "without losing its purpose",
        remedy="move the product out of it, or write the factor by hand there and switch this correction off "
        "with roles=",
    )


def _inside(inner: Subprogram, args: Sequence[Any], works: _Works) -> _Outs:
    """Runs a program inside an equation."""
    own = {path[1:]: work for path, work in works.items() if path[0] == inner.step}
    outs, records = _run(inner.program, args, own)
    return outs, {(inner.step, *path): record for path, record in records.items()}


def _jit(held: Jit, inner: Subprogram, args: Sequence[Any], works: _Works) -> _Outs:
    def function(*args: Any) -> Any:
        outs, records = _inside(inner, args, works)
        return (*outs, records) if records else tuple(outs)

    function.__name__ = function.__qualname__ = held.name
    tapped = any(work.tap for work in works.values())
    shardings: dict[str, Any] = {}
    for name, given in (("in_shardings", held.in_shardings), ("out_shardings", held.out_shardings)):
        known = tuple(s if isinstance(s, jax.sharding.Sharding) else None for s in given)
        if any(known):
            shardings[name] = (*known, None) if tapped and name == "out_shardings" else known
    outs = jax.jit(function, inline=held.inline, **shardings)(*args)
    return (outs[:-1], outs[-1]) if tapped else (outs, {})


def _scan(held: Scan, inner: Subprogram, args: Sequence[Any], works: _Works) -> _Outs:
    first = held.consts + held.carry

    def body(carry: Any, slices: Any) -> Any:
        outs, records = _inside(inner, [*args[: held.consts], *carry, *slices], works)
        return outs[: held.carry], (outs[held.carry :], records)

    carry, (stacked, records) = jax.lax.scan(
        body,
        list(args[held.consts : first]),
        list(args[first:]),
        length=held.length,
        reverse=held.reverse,
        unroll=held.unroll,
    )
    return [*carry, *stacked], records


def _while(held: While, inner: Sequence[Subprogram], args: Sequence[Any], works: _Works) -> Sequence[Any]:
    condition, body = inner
    first = held.cond_consts + held.body_consts
    return jax.lax.while_loop(
        lambda carry: _inside(condition, [*args[: held.cond_consts], *carry], works)[0][0],
        lambda carry: _inside(body, [*args[held.cond_consts : first], *carry], works)[0],
        list(args[first:]),
    )


def _shard_map(held: ShardMap, inner: Subprogram, args: Sequence[Any], works: _Works) -> Sequence[Any]:
    return jax.shard_map(
        lambda *args: _inside(inner, args, works)[0],
        mesh=held.mesh,
        in_specs=held.in_specs,
        out_specs=list(held.out_specs),
        axis_names=held.axis_names,
        check_vma=held.check_vma,
    )(*args)


_TRANSPARENT: Final[frozenset[type]] = frozenset({Call, Jit, Checkpoint, Scan})
