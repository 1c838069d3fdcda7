"""How hard XLA should try: compiling well is worth it for what is run long enough."""

from __future__ import annotations

from typing import Any, Final

import jax

# On a CPU, a program that runs fewer operations than this in all takes longer to optimise than to run:
# measured for MLPs and Transformers of 64 to 2048 units on two cores.
_LITTLE: Final = 4e10


def effort(lowered: jax.stages.Lowered, runs: float) -> dict[str, str | bool]:
    """Compiler options for a program that is run so many times."""
    if jax.default_backend() != "cpu":
        return {}
    costs: Any = lowered.cost_analysis() or {}
    little = costs.get("flops", 0.0) * runs < _LITTLE
    return {"xla_backend_optimization_level": "0"} if little else {}
