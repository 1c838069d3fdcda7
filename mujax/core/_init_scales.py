"""How the user's own initial values and stored constants scale with width."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from mujax import rules
from mujax.core.frontends import Frontend, Initial
from mujax.core.trace import InitialValues, Parity, read_constants, read_initial_values
from mujax.errors import MujaxError
from mujax.spec import MupSpec

# Initialisers that the trace cannot explain are sampled, which takes seconds up to this many entries.
_SAMPLE_LIMIT: Final = 1 << 26

# Mean and deviation scale differently where their logarithms differ by this much; less is chance.
_APART: Final = 0.2


def initial_values(
    target_end: Frontend,
    base_end: Frontend,
    target: Initial,
    base: Initial,
    inputs: Sequence[Any],
    kwargs: dict[str, Any],
) -> dict[str, InitialValues]:
    """How each parameter's own initial values scale from base to target, and their mean where it shows.

    Args:
        target_end: the target's front end.
        base_end: the base's front end.
        target: the target's traced initialiser.
        base: the base's traced initialiser.
        inputs: the example inputs.
        kwargs: the example keyword arguments.

    Returns:
        By path; the ratio is 0 for a parameter that starts at zero, and is never None. The mean is None where
        the ratio shows in the program and the mean does not: `init_shifts` samples those that need it.

    Raises:
        MujaxError: an initialiser can be neither read nor sampled.
    """
    traced = read_initial_values(base.program, target.program)
    values = {path: traced[position] for position, path in target.params.items()}
    unknown = [path for path, value in values.items() if value.ratio is None]
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
            read = read_initial_values(base.program, base.program)
            base_means = {path: read[position].mean for position, path in base.params.items()}
            for path, small, big in pairs:
                values[path] = _sampled(small, big, base_means[path], values[path].mean)
    return values


def _sampled(small: Any, big: Any, base_mean: float | None, mean: float | None) -> InitialValues:
    """The properties of samples of base and target, with their means where the programs show them."""
    base_mean = _mean(small) if base_mean is None else base_mean
    mean = _mean(big) if mean is None else mean
    ratio = _rms_ratio(small, big)
    deviations = [float(np.std(np.asarray(leaf, np.float64))) for leaf in (small, big)]
    if base_mean * mean > 0 and min(deviations) > 1e-6 * abs(base_mean):
        apart = math.log(deviations[1] / deviations[0]) - math.log(mean / base_mean)
        if abs(apart) > _APART:
            return InitialValues(deviations[1] / deviations[0], mean, mean / base_mean)
    return InitialValues(ratio, base_mean * ratio)


def init_shifts(
    spec: MupSpec,
    values: Mapping[str, InitialValues],
    signs: Mapping[str, Sequence[Parity]],
    end: Frontend,
    inputs: Sequence[Any],
    kwargs: dict[str, Any],
) -> dict[str, float]:
    """What is added to a parameter's scaled initial values so that their mean follows its own rule.

    Args:
        spec: the parameters.
        values: the initial values, as `initial_values` returns them.
        signs: of what multiplies each parameter's entries in each of its products.
        end: the base's front end.
        inputs: the example inputs.
        kwargs: the example keyword arguments.

    Returns:
        The shift by path, for the parameters of which the mean is not zero, adds up in a product, and scales
        unlike the deviation.
    """
    table = spec.parametrization
    factors = {
        path: rules.mean_scale(param, table, values[path].mean_ratio or ratio)
        - rules.init_scale(param, table, ratio)
        for path, param in spec.items()
        if (ratio := values[path].ratio)
    }
    factors = {
        path: factor
        for path, factor in factors.items()
        if abs(factor) > 1e-9 and values[path].mean != 0.0 and path in signs
    }
    others = {name for path in factors for sign in signs[path] for name in sign.names} & values.keys()
    means = {path: values[path].mean for path in sorted(factors.keys() | others)}
    unknown = [path for path, mean in means.items() if mean is None]
    if unknown:
        with jax.ensure_compile_time_eval():
            sampled = end.sample_init(inputs, kwargs, jax.random.key(0), unknown)
        means |= {
            path: _mean(leaf) * (values[path].ratio or 0.0)
            for path, leaf in zip(unknown, sampled, strict=True)
        }
    # Signs of a parameter that has a mean itself do not cancel a sum. Of two that multiply each other the one
    # with the smaller mean is shifted: the other is its gain, which starts at one.
    uneven = {path: mean for path, mean in means.items() if mean}
    shifts = {}
    for path, mean in sorted(uneven.items(), key=lambda pair: abs(pair[1])):
        if path in factors and any(not sign.without(*uneven).is_centred for sign in signs[path]):
            shifts[path] = mean * factors[path]
            del uneven[path]
    return shifts


def _mean(leaf: Any) -> float:
    """The mean of a sample; 0 unless it is six standard errors away from it."""
    entries = np.asarray(leaf)
    if not (jnp.issubdtype(entries.dtype, jnp.floating) and entries.size > 1):
        return 0.0
    entries = entries.astype(np.float64)
    mean = float(entries.mean())
    return mean if abs(mean) > 6 * entries.std() / math.sqrt(entries.size) else 0.0


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
