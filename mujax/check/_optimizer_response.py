"""Measures how an optimizer responds to a gradient: its learning rate, ε and decay for each parameter.

The optimizer runs alone on the initial parameters and random gradients, so the result is exact: no training,
no noise. Comparing two widths gives the exponents that a rule must have.
"""

import functools
from collections.abc import Callable
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


class Probe:
    """An optimizer, to be run for one step on gradients of made-up directions.

    Args:
        subject: the model and the optimizer.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._compiled: Callable[..., Array] | None = None

    def compile(self) -> None:
        """Compiles it; safe in a thread."""
        shapes, _ = jax.eval_shape(self._subject.replay.init, jax.random.key(0))
        sizes = jax.ShapeDtypeStruct((len(jax.tree.leaves(shapes)),), jnp.float32)
        rate = jax.ShapeDtypeStruct((), jnp.float32)
        lowered = jax.jit(functools.partial(self._moved, shapes)).lower(rate, sizes, sizes)
        self._compiled = lowered.compile(effort(lowered, 1))

    def respond(self, rate: float, gradients: np.ndarray, initial: np.ndarray) -> Response:
        """Runs the optimizer for one step.

        Args:
            rate: the learning rate.
            gradients: the mean absolute entry of each parameter's gradient, in the order of the leaves; 1 is
                used in place of 0.
            initial: the mean absolute entry of each parameter.
        """
        if self._compiled is None:
            self.compile()
        assert self._compiled is not None
        sizes = np.where(gradients > 0, gradients, 1.0).astype(np.float32)
        table = self._compiled(np.float32(rate), sizes, initial.astype(np.float32))
        still, param, small, large, huge, spread = np.asarray(table, np.float64).T
        with np.errstate(divide="ignore", invalid="ignore"):
            growth = huge / large
            linear = np.abs(growth / 2.0**24 - 1) < _RTOL
            free = (np.abs(growth - 1) < _RTOL) & (large > 0)
            lr = np.where(linear, large / (sizes * _SCALES[2]), np.where(free, large, np.nan))
            epsilon = np.where(linear, 1.0, np.where(free, small / large, np.nan))
            decay = np.where(param > 0, still / param, np.nan)
        return Response(lr, epsilon, decay, linear, free & (spread < 1 + _RTOL))

    def _moved(
        self,
        shapes: Any,
        rate: Float[Array, ""],
        grown: Float[Array, " leaves"],
        sizes: Float[Array, " leaves"],
    ) -> Float[Array, "leaves 6"]:
        """Means of each parameter's move at zero gradient, of its entries, and of its moves at each scale."""
        abstract, structure = jax.tree.flatten(shapes)
        draws = [_spread(leaf) for leaf in abstract]
        leaves = [draw * size.astype(draw.dtype) for draw, size in zip(draws, sizes, strict=True)]
        params = structure.unflatten(leaves)
        tx = optax.with_extra_args_support(self._subject.optimizer(rate))
        opt_state = tx.init(params)

        def updated(scale: Any) -> list[Any]:
            gradient = [
                draw[::-1] * (size * scale).astype(draw.dtype) if draw.ndim else draw * (size * scale)
                for draw, size in zip(draws, grown, strict=True)
            ]
            value = jnp.ones(())
            updates, _ = tx.update(structure.unflatten(gradient), opt_state, params, value=value)
            return jax.tree.leaves(updates)

        def means(still: Any, scale: Any) -> tuple[Any, Any]:
            moves = updated(scale)
            # Zero comes first, and is what the others are compared with.
            still = [jnp.where(scale == 0, move, old) for move, old in zip(moves, still, strict=True)]
            others = [jnp.abs(move - old) for move, old in zip(moves, still, strict=True)]
            return still, jnp.stack([jnp.stack([jnp.mean(one), jnp.max(one)]) for one in others])

        blank = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in jax.eval_shape(updated, jnp.float32(0))]
        # One scale after the other: together they would take the memory of so many models.
        still, found = jax.lax.scan(means, blank, jnp.asarray(_SCALES))
        small, large, huge = (found[number, :, 0] for number in (1, 2, 3))
        spread = found[2, :, 1] / large
        return jnp.stack([_means(still), _means(leaves), small, large, huge, spread], axis=1)


def _means(leaves: list[Any]) -> Float[Array, " leaves"]:
    return jnp.stack([jnp.mean(jnp.abs(leaf)) for leaf in leaves])


def _spread(leaf: Any) -> Array:
    """Entries of both signs, of size 1 on average and away from zero, so that single precision keeps them."""
    index = jax.lax.iota(jnp.int32, leaf.size)
    size = 0.5 + (index % 11).astype(leaf.dtype) / 10
    return (jnp.where(index % 3 == 0, -size, size)).reshape(leaf.shape)
