"""Compiler options, and whether a step or a whole run is compiled."""

from __future__ import annotations

import functools
from typing import Any, Final

import jax

from mujax.core.program import ClosedJaxpr, equations

# The bytes that a program moves in all its runs, as XLA counts them before it fuses, over the lines of its
# text: from here on it pays to optimise its code in part, in full, and in full where in part was an option.
# Measured for steps and initialisers of MLPs of 64 to 2048 units and Transformers of 64 to 512 on two cores:
# unoptimised code takes 60 to 100 ps longer for each byte, that of random numbers up to 340; optimising it
# takes 0.3 to 1.7 ms for each line, in part 0.5 to 1.2.
_IN_PART: Final = 8e6
_OPTIMISED: Final = 1.5e7
_IN_FULL: Final = 2e8


def effort(
    lowered: jax.stages.Lowered, runs: float, *, in_part: bool = False, beside_others: bool = False
) -> dict[str, str | bool]:
    """Compiler options for a program that runs `runs` times.

    On a CPU, compiling a small program well takes longer than running it.

    Args:
        lowered: the program.
        runs: how often it is going to run.
        in_part: whether it may be optimised in part, which is fast to compile; the body of a loop becomes
            up to twice as slow.
        beside_others: whether each core runs such a program at the same time. The threads of one product
            would wait for those of another: an MLP of 64 units trains in 0.8 of the time without them.
    """
    if jax.default_backend() != "cpu":
        return {}
    options = _known("xla_cpu_multi_thread_eigen") if beside_others else {}
    costs: Any = lowered.cost_analysis() or {}
    moved = costs.get("bytes accessed", 0.0) * runs / max(1, lowered.as_text().count("\n"))
    if moved >= (_IN_FULL if in_part else _OPTIMISED):
        return options
    # MLIR's code for fusions takes up to three times as long to compile as LLVM's.
    options = {**options, **_known("xla_cpu_use_fusion_emitters")}
    return {"xla_backend_optimization_level": "1" if moved >= _IN_PART else "0", **options}


@functools.cache
def _known(name: str) -> dict[str, str | bool]:
    """An option of XLA, switched off; nothing for a version of XLA that would not know it."""
    option: dict[str, str | bool] = {name: False}
    try:
        jax.jit(lambda: 0).lower().compile(option)
    except jax.errors.JaxRuntimeError:
        return {}
    return option


def steps_in_python(program: ClosedJaxpr) -> bool:
    """Whether to compile a step and not the whole run: XLA on CPU is slow at convolutions inside of a loop.

    Reference: jax-ml/jax#12868.
    """
    return jax.default_backend() == "cpu" and any(
        eqn.primitive.name == "conv_general_dilated" for _, eqn in equations(program)
    )
