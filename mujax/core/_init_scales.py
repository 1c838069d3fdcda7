"""How the user's own initial values and stored constants scale with width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp

from mujax.core.frontends import Frontend, Initial
from mujax.core.trace import read_constants, read_scales
from mujax.errors import MujaxError

# Initialisers that the trace cannot explain are sampled, which takes seconds up to this many entries.
_SAMPLE_LIMIT: Final = 1 << 26


def init_ratios(
    target_end: Frontend,
    base_end: Frontend,
    target: Initial,
    base: Initial,
    inputs: Sequence[Any],
    kwargs: dict[str, Any],
) -> dict[str, float]:
    """The scale of each parameter's own initial values at the target over that at the base.

    Args:
        target_end: the target's front end.
        base_end: the base's front end.
        target: the target's traced initialiser.
        base: the base's traced initialiser.
        inputs: the example inputs.
        kwargs: the example keyword arguments.

    Returns:
        Ratio by path; 0 for a parameter that starts at zero.

    Raises:
        MujaxError: an initialiser can be neither read nor sampled.
    """
    traced = read_scales(base.program, target.program)
    scales = {path: traced[position] for position, path in target.params.items()}
    unknown = [path for path, scale in scales.items() if scale is None]
    if unknown:
        shapes = target.shapes(target.params)
        large = next((path for path in unknown if math.prod(shapes[path]) > _SAMPLE_LIMIT), None)
        if large is not None:
            raise MujaxError(
                where=large,
                expected="an initialiser whose scale shows in its program, or a parameter of at most "
                f"{_SAMPLE_LIMIT} entries to sample",
                got=f"shape {shapes[large]}",
                remedy="use an initialiser of jax.nn.initializers",
            )
        with jax.ensure_compile_time_eval():
            key = jax.random.key(0)
            pairs = zip(
                unknown,
                base_end.sample_init(inputs, kwargs, key, unknown),
                target_end.sample_init(inputs, kwargs, key, unknown),
                strict=True,
            )
            scales |= {path: _rms_ratio(small, big) for path, small, big in pairs}
    return {path: 1.0 if scale is None else scale for path, scale in scales.items()}


def stored_scales(target: Initial, base: Initial) -> dict[str, float]:
    """Ratio, by path, of the constants that a model holds as state: `self.scale = jnp.sqrt(width)` in NNX."""
    if not target.state:
        return {}
    traced = read_constants(base.program, target.program)
    scales = {path: traced[position] for position, path in target.state.items()}
    return {path: scale for path, scale in scales.items() if scale}


def _rms_ratio(base: Any, target: Any) -> float:
    small, big = (
        float(jnp.sqrt(jnp.mean(jnp.square(jnp.abs(x).astype(jnp.float32))))) for x in (base, target)
    )
    return big / small if small else 0.0
