"""Places in a program, and the programs inside of equations."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal, TypeAlias

from mujax.core.program._jax import (
    Call,
    ClosedJaxpr,
    Cond,
    Jaxpr,
    JaxprEqn,
    Kernel,
    Scan,
    While,
    as_closed,
    control,
    primitive_name,
)

EqnPath: TypeAlias = tuple[int | str, ...]
"""Where an equation stands: its index, behind (index, step) for each equation around it, outermost first."""


@dataclasses.dataclass(frozen=True)
class Subprogram:
    """A program that an equation holds, and how it is wired to the equation.

    Attributes:
        step: its name in an `EqnPath`.
        kind: when it runs: `"call"` once, `"branch"` if it is chosen, `"condition"` before each iteration
            of a loop, `"body"` in each, `"kernel"` for each point of a grid.
        program: the program.
        operands: for each input of the program, the operand of the equation that it is or starts from; a
            kernel's inputs behind these are the memory of the results, and then its own.
        results: for each output of the program, the output of the equation that it is or ends as; none for
            a condition.
        carried: inputs that are the outputs of the iteration before: input -> output.
        sliced: inputs that are one entry of their operand along its leading axis.
        stacked: outputs that are one entry of the equation's output along its leading axis.
        length: number of iterations, where that is known.
    """

    step: str
    kind: Literal["call", "branch", "condition", "body", "kernel"]
    program: ClosedJaxpr
    operands: tuple[int, ...]
    results: tuple[int, ...]
    carried: tuple[tuple[int, int], ...] = ()
    sliced: frozenset[int] = frozenset()
    stacked: frozenset[int] = frozenset()
    length: int | None = None


def subprograms(eqn: JaxprEqn) -> tuple[Subprogram, ...]:
    """The programs that an equation runs, in order; none for an ordinary primitive.

    Raises:
        MujaxError: this JAX release represents the primitive in a way that is not known here.
    """
    outs = tuple(range(len(eqn.outvars)))
    ins = tuple(range(len(eqn.invars)))
    match control(eqn):
        case None:
            return ()
        case Kernel(program=program):
            return (Subprogram("kernel", "kernel", program, ins, outs),)
        case Call(program=program):
            return (Subprogram("call", "call", program, ins, outs),)
        case Cond(branches=branches):
            return tuple(
                Subprogram(f"branch:{number}", "branch", program, ins[1:], outs)
                for number, program in enumerate(branches)
            )
        case Scan(consts=consts, carry=carry) as scan:
            return (
                Subprogram(
                    "body",
                    "body",
                    scan.body,
                    ins,
                    outs,
                    carried=tuple((consts + number, number) for number in range(carry)),
                    sliced=frozenset(ins[consts + carry :]),
                    stacked=frozenset(outs[carry:]),
                    length=scan.length,
                ),
            )
        case While(cond_consts=in_cond, body_consts=in_body) as loop:
            carry = ins[in_cond + in_body :]
            return (
                Subprogram("condition", "condition", loop.cond, (*ins[:in_cond], *carry), ()),
                Subprogram(
                    "body",
                    "body",
                    loop.body,
                    ins[in_cond:],
                    outs,
                    carried=tuple((in_body + number, number) for number in outs),
                ),
            )


def equations(program: Jaxpr | ClosedJaxpr, site: EqnPath = ()) -> Iterator[tuple[EqnPath, JaxprEqn]]:
    """Every equation of a program and of the programs inside of it, with its place, in program order."""
    for index, eqn in enumerate(as_closed(program).jaxpr.eqns):
        yield (*site, index), eqn
        for inner in subprograms(eqn):
            yield from equations(inner.program, (*site, index, inner.step))


def _around(program: ClosedJaxpr, site: EqnPath) -> Iterator[tuple[JaxprEqn, ClosedJaxpr]]:
    """The equations around a place and the programs in them that it is in, outermost first."""
    for index, step in zip(site[::2], site[1::2], strict=False):
        eqn = program.jaxpr.eqns[int(index)]
        program = next(inner.program for inner in subprograms(eqn) if inner.step == step)
        yield eqn, program


def enclosing_equations(program: ClosedJaxpr, site: EqnPath) -> list[JaxprEqn]:
    """The equations around a place, outermost first."""
    return [eqn for eqn, _ in _around(program, site)]


def enclosing_primitives(program: ClosedJaxpr, site: EqnPath) -> list[str]:
    """The names of the primitives around a place, outermost first."""
    return [primitive_name(eqn) for eqn in enclosing_equations(program, site)]


def program_at(program: ClosedJaxpr, site: EqnPath) -> ClosedJaxpr:
    """The (sub-)program that an equation stands in."""
    for _, inner in _around(program, site):
        program = inner
    return program


def equation_at(program: ClosedJaxpr, site: EqnPath) -> JaxprEqn:
    """The equation at a place."""
    return program_at(program, site).jaxpr.eqns[int(site[-1])]
