"""Measures how an optimizer responds to a gradient: its learning rate, ε and decay for each parameter.

The optimizer runs alone on the initial parameters and random gradients, so the result is exact: no training,
no noise. Comparing two widths gives the exponents that a rule must have.
"""

from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from mujax.check._measure import Subject
from mujax.train import effort

# Zero shows the decay; the last two are so large that no epsilon matters.
_SCALES: Final = (0.0, 1.0, 2.0**24, 2.0**48)
_RTOL: Final = 0.02


class Response(NamedTuple):
    """How the first update of each parameter responds to its gradient; every field is by parameter.

    Attributes:
        lr: mean absolute entry of the update for a gradient so large that no epsilon matters; relative to
            the gradient's if the optimizer is linear in it.
        epsilon: the share of that update for a gradient of the measured size: 1 if epsilon has no effect.
        decay: mean absolute entry of the update at zero gradient over that of the parameter.
        linear: the optimizer is linear in the gradient, as SGD is.
        entrywise: it moves all entries alike, as Adam and sign descent do.
    """

    lr: np.ndarray
    epsilon: np.ndarray
    decay: np.ndarray
    linear: np.ndarray
    entrywise: np.ndarray


def respond(subject: Subject, rate: float, gradients: np.ndarray, initial: np.ndarray) -> Response:
    """Runs the optimizer for one step.

    Args:
        subject: the model and the optimizer.
        rate: the learning rate.
        gradients: the mean absolute entry of each parameter's gradient, in the order of the leaves; 1 is
            used in place of 0.
        initial: the mean absolute entry of each parameter.
    """
    shapes, _ = jax.eval_shape(subject.replay.init, jax.random.key(0))
    abstract, structure = jax.tree.flatten(shapes)

    def run(rate: Float[Array, ""], grown: Float[Array, " leaves"], sizes: Float[Array, " leaves"]) -> Any:
        draws = [_spread(leaf) for leaf in abstract]
        leaves = [draw * size.astype(draw.dtype) for draw, size in zip(draws, sizes, strict=True)]
        params = structure.unflatten(leaves)
        tx = optax.with_extra_args_support(subject.optimizer(rate))

        def updated(scale: Any) -> list[Any]:
            gradient = [
                draw[::-1] * (size * scale).astype(draw.dtype) if draw.ndim else draw * (size * scale)
                for draw, size in zip(draws, grown, strict=True)
            ]
            value = jnp.ones(())
            updates, _ = tx.update(structure.unflatten(gradient), tx.init(params), params, value=value)
            return jax.tree.leaves(updates)

        moves = jax.vmap(updated)(jnp.asarray(_SCALES))
        rows = []
        for leaf, move in zip(leaves, moves, strict=True):
            still, *others = move
            sizes_ = [jnp.abs(other - still) for other in others]
            spread = jnp.max(sizes_[1]) / jnp.mean(sizes_[1])
            means = [jnp.mean(size) for size in sizes_]
            rows.append(jnp.stack([jnp.mean(jnp.abs(still)), jnp.mean(jnp.abs(leaf)), *means, spread]))
        return jnp.stack(rows)

    sizes = np.where(gradients > 0, gradients, 1.0).astype(np.float32)
    arguments = (np.float32(rate), sizes, initial.astype(np.float32))
    lowered = jax.jit(run).lower(*arguments)
    table = np.asarray(lowered.compile(effort(lowered, 1))(*arguments), np.float64)
    still, param, small, large, huge, spread = table.T
    with np.errstate(divide="ignore", invalid="ignore"):
        growth = huge / large
        linear = np.abs(growth / 2.0**24 - 1) < _RTOL
        free = (np.abs(growth - 1) < _RTOL) & (large > 0)
        lr = np.where(linear, large / (sizes * _SCALES[2]), np.where(free, large, np.nan))
        epsilon = np.where(linear, 1.0, np.where(free, small / large, np.nan))
        decay = np.where(param > 0, still / param, np.nan)
    return Response(lr, epsilon, decay, linear, free & (spread < 1 + _RTOL))


def _spread(leaf: Any) -> Array:
    """Entries of both signs, of size 1 on average and away from zero, so that single precision keeps them."""
    index = jax.lax.iota(jnp.int32, leaf.size)
    size = 0.5 + (index % 11).astype(leaf.dtype) / 10
    return (jnp.where(index % 3 == 0, -size, size)).reshape(leaf.shape)
