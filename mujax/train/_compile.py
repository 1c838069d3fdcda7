"""Compiler options, and whether a step or a whole run is compiled."""

from __future__ import annotations

from typing import Any, Final

import jax

from mujax.core.program import ClosedJaxpr, equations

# On a CPU, a program that runs fewer operations than this in total takes longer to optimise than to run:
# measured for MLPs and Transformers of 64 to 2048 units on two cores.
_LITTLE: Final = 4e10


def effort(lowered: jax.stages.Lowered, runs: float) -> dict[str, str | bool]:
    """Compiler options for a program that runs `runs` times."""
    if jax.default_backend() != "cpu":
        return {}
    costs: Any = lowered.cost_analysis() or {}
    little = costs.get("flops", 0.0) * runs < _LITTLE
    return {"xla_backend_optimization_level": "0"} if little else {}


def steps_in_python(program: ClosedJaxpr) -> bool:
    """Whether to compile a step and not the whole run: XLA on CPU is slow at convolutions inside of a loop.

    Reference: jax-ml/jax#12868.
    """
    return jax.default_backend() == "cpu" and any(
        eqn.primitive.name == "conv_general_dilated" for _, eqn in equations(program)
    )
