"""Evaluates a traced program with factors inserted where the parametrization wants them, and values read.

The program runs as it was traced: equations between two insertions are handed to JAX as one program, so
that name stacks, source lines, effects and every parameter of a primitive stay what they were. Only an
equation that has an insertion inside (a scan, a remat) is built again, through its public function.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from mujax.core.program._sites import SUBPROGRAMS, EqnPath
from mujax.core.program._source import scope, where
from mujax.errors import MujaxError

Hook = Callable[[Any], Any]
"""What is done to the (first) output of an equation."""

Hooks = Mapping[EqnPath, Hook]


class Record(NamedTuple):
    """What a tap sees of an equation: one entry more in front for each scan around it.

    Attributes:
        operands: what the equation read.
        out: its first output, after the hook.
    """

    operands: tuple[Any, ...]
    out: Any


Records = dict[EqnPath, Record]


@dataclasses.dataclass(frozen=True)
class _Work:
    """What there is to do at an equation."""

    hook: Hook | None = None
    tap: bool = False


_Works = Mapping[EqnPath, _Work]


@dataclasses.dataclass(frozen=True)
class Multiply:
    """A hook that multiplies with constants, which may be traced values.

    A product is linear in each operand. Where its activation is no larger than its output, that is
    multiplied instead: with a large vocabulary the logits are much larger, and what is done to an
    activation joins the norm or the nonlinearity that made it.

    Attributes:
        factors: the constants.
        activation: which operand of the equation is an activation, if it is a product.
        branch: an operand of an addition and what it is multiplied with there and nowhere else.
    """

    factors: tuple[Any, ...]
    activation: int | None = None
    branch: tuple[int, Any] | None = None

    def __call__(self, out: Any) -> Any:
        """The output times the factors, in its own dtype."""
        for factor in self.factors:
            out = out * jnp.asarray(factor, out.dtype)
        return out


_BILINEAR = frozenset({"dot_general", "conv_general_dilated"})


def evaluate(program: Any, args: Sequence[Any], hooks: Hooks) -> list[Any]:
    """Runs a traced program, changing the outputs of some equations.

    Args:
        program: a `ClosedJaxpr`.
        args: its flat inputs.
        hooks: functions to apply to outputs, by the place of the equation.

    Returns:
        The flat outputs.

    Raises:
        MujaxError: a hook is inside a primitive that can't be built again.
    """
    outs, _ = evaluate_and_record(program, args, hooks, ())
    return outs


def evaluate_and_record(
    program: Any, args: Sequence[Any], hooks: Hooks, taps: Collection[EqnPath]
) -> tuple[list[Any], Records]:
    """As `evaluate`, and returns what the equations at `taps` read and wrote.

    Args:
        program: a `ClosedJaxpr`.
        args: its flat inputs.
        hooks: functions to apply to outputs, by the place of the equation.
        taps: the places of the equations to record; each must be `tappable`.

    Raises:
        MujaxError: a hook is inside a primitive that can't be built again.
    """
    sites = dict.fromkeys((*hooks, *taps))
    taps = frozenset(taps)
    return _closed(program, args, {site: _Work(hooks.get(site), site in taps) for site in sites})


def _closed(program: Any, args: Sequence[Any], works: _Works) -> tuple[list[Any], Records]:
    if not works:
        return jex.jaxpr_as_fun(program)(*args), {}
    return _open(program.jaxpr, program.consts, args, works)


def _sub(program: Any, args: Sequence[Any], works: _Works) -> tuple[list[Any], Records]:
    if isinstance(program, jex.ClosedJaxpr):
        return _closed(program, args, works)
    return _open(program, (), args, works)


def _open(
    program: Any, consts: Sequence[Any], args: Sequence[Any], works: _Works
) -> tuple[list[Any], Records]:
    by_eqn: dict[int, dict[EqnPath, _Work]] = collections.defaultdict(dict)
    for path, work in works.items():
        by_eqn[int(path[0])][path[1:]] = work
    records: Records = {}
    env: dict[Any, Any] = dict(zip(program.constvars, consts, strict=True))
    env.update(zip(program.invars, args, strict=True))
    last = _last_uses(program)

    def read(atom: Any) -> Any:
        return _array(atom) if isinstance(atom, jex.Literal) else env[atom]

    position = 0
    for index in sorted(by_eqn):
        inside = {path: work for path, work in by_eqn[index].items() if path}
        eqn = program.eqns[index]
        hook, tap = (work := by_eqn[index].get((), _Work())).hook, work.tap
        # A tap wants the operands as they are.
        operand = None if tap else _cheaper_operand(eqn, hook)
        changed = _branch_operand(eqn, hook) if hook is None or operand is None else (operand, hook)
        if tap or inside:
            _segment(program, position, index, env, last)
            position = index
        operands = tuple(read(atom) for atom in eqn.invars) if tap or inside else ()
        if inside:
            outs, found = _rebuild(eqn, operands, inside)
            env.update(zip(eqn.outvars, outs, strict=True))
            records.update({(index, *path): record for path, record in found.items()})
        elif changed is not None:
            _segment(program, position, index, env, last)
            atom, change = changed
            plain = env[atom]
            env[atom] = change(plain)
            _segment(program, index, index + 1, env, last)
            env[atom] = plain
        else:
            _segment(program, position, index + 1, env, last)
        if hook is not None and operand is None:
            env[eqn.outvars[0]] = hook(env[eqn.outvars[0]])
        if tap:
            records[(index,)] = Record(operands, env[eqn.outvars[0]])
        position = index + 1
    _segment(program, position, len(program.eqns), env, last)
    return [read(atom) for atom in program.outvars], records


def _branch_operand(eqn: Any, hook: Hook | None) -> tuple[Any, Hook] | None:
    """The operand of an addition that a hook multiplies, and how."""
    if not isinstance(hook, Multiply) or hook.branch is None:
        return None
    number, factor = hook.branch
    return eqn.invars[number], Multiply((factor,))


def _cheaper_operand(eqn: Any, hook: Hook | None) -> Any | None:
    """The activation in a product, if multiplying it costs no more and does as well.

    In a narrower dtype than the output's it would cost precision.
    """
    if not isinstance(hook, Multiply) or hook.activation is None or eqn.primitive.name not in _BILINEAR:
        return None
    left, right = eqn.invars
    atom, out = eqn.invars[hook.activation].aval, eqn.outvars[0].aval
    try:
        fits = left is not right and atom.dtype == out.dtype and atom.size <= out.size
    except jex.InconclusiveDimensionOperation:
        # Symbolic sizes (`jax.export`) that can't be compared.
        return None
    return eqn.invars[hook.activation] if fits else None


def _array(literal: Any) -> Any:
    return jnp.asarray(literal.val, literal.aval.dtype)


def _last_uses(program: Any) -> dict[Any, int]:
    last: dict[Any, int] = {}
    for index, eqn in enumerate(program.eqns):
        last.update((atom, index) for atom in eqn.invars if not isinstance(atom, jex.Literal))
    end = len(program.eqns)
    last.update((atom, end) for atom in program.outvars if not isinstance(atom, jex.Literal))
    return last


def _segment(program: Any, start: int, stop: int, env: dict[Any, Any], last: Mapping[Any, int]) -> None:
    """Runs the equations from `start` to `stop` and drops what nothing needs afterwards."""
    if start >= stop:
        return
    eqns = program.eqns[start:stop]
    defined = dict.fromkeys(var for eqn in eqns for var in eqn.outvars)
    ins = dict.fromkeys(
        atom
        for eqn in eqns
        for atom in eqn.invars
        if not isinstance(atom, jex.Literal) and atom not in defined
    )
    # The output of the last equation is kept for its hook even if nothing reads it.
    outs = [var for var in defined if last.get(var, -1) >= stop or var in eqns[-1].outvars]
    outs = [var for var in outs if not isinstance(var, jex.DropVar)]
    piece = program.replace(
        constvars=[], invars=list(ins), outvars=outs, eqns=eqns, debug_info=_anonymous(program, ins, outs)
    )
    results = jex.jaxpr_as_fun(jex.ClosedJaxpr(piece, ()))(*(env[var] for var in ins))
    env.update(zip(outs, results, strict=True))
    for var in ins:
        if last.get(var, -1) < stop:
            env.pop(var, None)


def _anonymous(program: Any, ins: Any, outs: Any) -> Any:
    info = program.debug_info
    return info._replace(arg_names=("",) * len(ins), result_paths=("",) * len(outs)) if info else info


def _walk(program: Any, site: EqnPath) -> Iterator[tuple[Any, Any]]:
    """The equations around a place and the programs in them that it is in, outermost first."""
    jaxpr = getattr(program, "jaxpr", program)
    for index, step in zip(site[::2], site[1::2], strict=False):
        eqn = jaxpr.eqns[int(index)]
        name, _, number = str(step).partition(":")
        inner = eqn.params[name][int(number)] if number else eqn.params[name]
        jaxpr = getattr(inner, "jaxpr", inner)
        yield eqn, jaxpr


def enclosing(program: Any, site: EqnPath) -> list[str]:
    """The names of the primitives around an equation, outermost first."""
    return [eqn.primitive.name for eqn, _ in _walk(program, site)]


def around(program: Any, site: EqnPath) -> Any:
    """The (sub-)program that an equation stands in."""
    jaxpr = getattr(program, "jaxpr", program)
    for _, inner in _walk(program, site):
        jaxpr = inner
    return jaxpr


def at(program: Any, site: EqnPath) -> Any:
    """The equation at a place."""
    return around(program, site).eqns[int(site[-1])]


def blocked(program: Any, site: EqnPath) -> str | None:
    """The name of the primitive around an equation that keeps a hook out, if there is one."""
    return next((name for name in enclosing(program, site) if name not in _REBUILD), None)


def tappable(program: Any, site: EqnPath) -> bool:
    """Whether a tap can be put there: what it sees must get out of every primitive around it."""
    return all(name in _TRANSPARENT for name in enclosing(program, site))


def loses_derivative(program: Any, site: EqnPath) -> bool:
    """Whether a hook there makes JAX differentiate the body of a function that has its own rule."""
    return "custom_jvp_call" in enclosing(program, site)


# ---- equations that contain a hook or a tap --------------------------------------------------------

_Outs = tuple[Sequence[Any], Records]


def _inner(works: _Works, name: str) -> dict[EqnPath, _Work]:
    return {path[1:]: work for path, work in works.items() if path[0] == name}


def _named(records: Records, name: str) -> Records:
    return {(name, *path): record for path, record in records.items()}


def _rebuild(eqn: Any, args: Sequence[Any], works: _Works) -> _Outs:
    rule = _REBUILD.get(eqn.primitive.name)
    if rule is None:
        raise MujaxError(
            f"{where(eqn)}: expected the correction to stand outside of {eqn.primitive.name}, whose inside "
            "can't be "
            "changed without losing what it is for; move the product out of it, or write the factor by hand "
            "there "
            "and switch this correction off with roles=."
        )
    name = scope(eqn)
    with eqn.ctx.manager:
        if not name:
            return rule(eqn, args, works)
        with jax.named_scope(name):
            return rule(eqn, args, works)


def _program(eqn: Any) -> tuple[str, Any]:
    name = next(name for name in SUBPROGRAMS if name in eqn.params)
    return name, eqn.params[name]


def _inline(eqn: Any, args: Sequence[Any], works: _Works) -> _Outs:
    name, program = _program(eqn)
    outs, records = _sub(program, args, _inner(works, name))
    return outs, _named(records, name)


def _jit(eqn: Any, args: Sequence[Any], works: _Works) -> _Outs:
    def function(*args: Any) -> Any:
        outs, records = _inline(eqn, args, works)
        return (*outs, records) if records else tuple(outs)

    function.__name__ = function.__qualname__ = eqn.params["name"]
    tapped = any(work.tap for work in works.values())
    shardings = {}
    for name in ("in_shardings", "out_shardings"):
        given = tuple(s if isinstance(s, jax.sharding.Sharding) else None for s in eqn.params[name])
        if any(given):
            shardings[name] = (*given, None) if tapped and name == "out_shardings" else given
    outs = jax.jit(function, inline=eqn.params["inline"], **shardings)(*args)
    return (outs[:-1], outs[-1]) if tapped else (outs, {})


def _checkpoint(eqn: Any, args: Sequence[Any], works: _Works) -> _Outs:
    function = jax.checkpoint(
        lambda *args: _inline(eqn, args, works),
        prevent_cse=eqn.params["prevent_cse"],
        policy=eqn.params["policy"],
    )
    return function(*args)


def _scan(eqn: Any, args: Sequence[Any], works: _Works) -> _Outs:
    consts, carries = eqn.params["num_consts"], eqn.params["num_carry"]
    inside = _inner(works, "jaxpr")

    def body(carry: Any, slices: Any) -> Any:
        outs, records = _sub(eqn.params["jaxpr"], [*args[:consts], *carry, *slices], inside)
        return outs[:carries], (outs[carries:], records)

    carry, (stacked, records) = jax.lax.scan(
        body,
        list(args[consts : consts + carries]),
        list(args[consts + carries :]),
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    return [*carry, *stacked], _named(records, "jaxpr")


def _while(eqn: Any, args: Sequence[Any], works: _Works) -> _Outs:
    in_cond, in_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    first = in_cond + in_body

    def cond(carry: Any) -> Any:
        outs, _ = _sub(eqn.params["cond_jaxpr"], [*args[:in_cond], *carry], _inner(works, "cond_jaxpr"))
        return outs[0]

    def body(carry: Any) -> Any:
        outs, _ = _sub(eqn.params["body_jaxpr"], [*args[in_cond:first], *carry], _inner(works, "body_jaxpr"))
        return outs

    return jax.lax.while_loop(cond, body, list(args[first:])), {}


def _cond(eqn: Any, args: Sequence[Any], works: _Works) -> _Outs:
    def branch(number: int, program: Any) -> Callable[..., Any]:
        return lambda *operands: _sub(program, operands, _inner(works, f"branches:{number}"))[0]

    branches = [branch(number, program) for number, program in enumerate(eqn.params["branches"])]
    return jax.lax.switch(args[0], branches, *args[1:]), {}


def _shard_map(eqn: Any, args: Sequence[Any], works: _Works) -> _Outs:
    function = jax.shard_map(
        lambda *args: _inline(eqn, args, works)[0],
        mesh=eqn.params["mesh"],
        in_specs=tuple(eqn.params["in_specs"]),
        out_specs=list(eqn.params["out_specs"]),
        axis_names=eqn.params["newly_manual_axes"],
        check_vma=eqn.params["check_vma"],
    )
    return function(*args), {}


_REBUILD: dict[str, Callable[[Any, Sequence[Any], _Works], _Outs]] = {
    "jit": _jit,
    "remat2": _checkpoint,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
    # The function's own rule for derivatives is the one of the plain body: see `loses_derivative`.
    "custom_jvp_call": _inline,
    "closed_call": _inline,
    "core_call": _inline,
    "composite": _inline,
}

_TRANSPARENT = frozenset({"jit", "remat2", "scan", "closed_call", "core_call"})
