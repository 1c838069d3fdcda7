"""Training curves of a model for many learning rates and seeds: what the checks of training compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, PyTree

from mujax.check._models import Optimizer
from mujax.core import MupModel
from mujax.train import (
    Losses,
    OutputLoss,
    as_inputs,
    init_state,
    steps_in_python,
    tail,
    train_scan,
    train_step,
)


class Run(NamedTuple):
    """One training run of a model."""

    log2_lr: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Curve:
    """What a run left.

    Attributes:
        losses: of each batch, before the model learned from it.
        untrained: the initial model's mean loss on the last tenth of the batches.
    """

    losses: Float[np.ndarray, " steps"]
    untrained: float

    @property
    def summary(self) -> Losses:
        """The run as few numbers."""
        end = self.losses[-tail(len(self.losses)) :]
        return Losses(float(np.mean(self.losses)), float(np.mean(end)), self.untrained)


def train_curves(
    mup: MupModel,
    batches: Sequence[Any],
    optimizer: Optimizer,
    loss: OutputLoss,
    runs: Sequence[Run],
) -> dict[Run, Curve | None]:
    """Trains a model once for each learning rate and seed.

    One compiled program does all runs, one after the other: learning rate and seed are its arguments. The
    seed draws the initial parameters and the model's own randomness; every run sees the same batches.
    State other than the parameters (batch statistics) stays as initialised.

    Args:
        mup: the model.
        batches: of every step, as `check_batches` returns them.
        optimizer: (learning rate, spec) -> optimizer.
        loss: (outputs, targets) -> scalar.
        runs: what to train.

    Returns:
        The curve of each run; None where it diverged, by the measure of `Losses.kept`.
    """
    train = _program(mup, optimizer, loss, len(batches))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    curves: dict[Run, Curve | None] = {}
    for run in runs:
        losses, untrained = train(jnp.float32(2.0**run.log2_lr), jnp.int32(run.seed), stacked)
        curve = Curve(np.asarray(losses, np.float64), float(untrained))
        curves[run] = None if curve.summary.kept is None else curve
    return curves


Program = Callable[[Float32[Array, ""], Int[Array, ""], PyTree], tuple[Float[Array, " steps"], Any]]


def _program(mup: MupModel, optimizer: Optimizer, loss: OutputLoss, steps: int) -> Program:
    """Learning rate, seed and batches -> losses of all steps, and the initial model's on the last ones."""
    replay = mup.replay

    def objective(params: PyTree, state: Any, batch: Any, key: Any) -> Any:
        inputs, targets = batch
        outputs, _ = replay.apply(params, state, as_inputs(inputs), key=key)
        return loss(outputs, targets), (state, {})

    def start(seed: Int[Array, ""]) -> tuple[PyTree, Any, Any]:
        init_key, key = jax.random.split(jax.random.key(seed))
        params, variables = replay.init(init_key)
        # The parameters among the variables are not read: dropped, they are not carried along.
        return params, [None if at in replay.call.params else leaf for at, leaf in enumerate(variables)], key

    if not steps_in_python(replay.program):

        @jax.jit
        def run(lr: Float32[Array, ""], seed: Int[Array, ""], batches: PyTree) -> Any:
            params, variables, key = start(seed)
            tx = optimizer(lr, mup.spec)
            state = init_state(params, tx, model_state=variables, key=key)
            last = jax.tree.map(lambda leaf: leaf[-tail(steps) :], batches)
            _, metrics = train_scan(objective, tx, donate=False)(state, batches)
            untrained = jax.lax.map(lambda batch: objective(params, variables, batch, key)[0], last)
            return metrics["loss"], untrained.mean()

        return run

    @jax.jit
    def first(lr: Float32[Array, ""], seed: Int[Array, ""]) -> Any:
        params, variables, key = start(seed)
        return init_state(params, optimizer(lr, mup.spec), model_state=variables, key=key)

    @jax.jit
    def step(lr: Float32[Array, ""], state: Any, batch: Any) -> Any:
        state, metrics = train_step(objective, optimizer(lr, mup.spec), donate=False)(state, batch)
        return state, metrics["loss"]

    score = jax.jit(lambda state, batch: objective(state.params, state.model_state, batch, state.key)[0])

    def loop(lr: Float32[Array, ""], seed: Int[Array, ""], batches: PyTree) -> Any:
        each = [jax.tree.map(lambda leaf, at=at: leaf[at], batches) for at in range(steps)]
        state = first(lr, seed)
        untrained = [score(state, batch) for batch in each[-tail(steps) :]]
        losses = []
        for batch in each:
            state, value = step(lr, state, batch)
            losses.append(value)
        return jnp.stack(losses), jnp.stack(untrained).mean()

    return loop
