"""The loss of a model, and summary statistics of a training run."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree

from mujax._arguments import LOSS, instance, shown, takes
from mujax.core import MupModel
from mujax.errors import ConfigError
from mujax.train._step import Loss

OutputLoss = Callable[[Any, Any], Float[Array, ""]]
"""(outputs of the model, targets) -> a scalar."""


def as_inputs(inputs: PyTree) -> tuple[Any, ...]:
    """The positional arguments of the model; an array is the only one."""
    return inputs if isinstance(inputs, tuple) else (inputs,)


def default_loss(outputs: Any, targets: Any) -> Float[Array, ""]:
    """Mean cross-entropy for integer targets, mean squared error for others.

    Args:
        outputs: of the model: logits with the classes last, or predictions.
        targets: class indices, or values.

    Raises:
        ConfigError: shapes that do not match, or a model that returns more than one array.

    >>> float(default_loss(jnp.zeros((2, 8)), jnp.array([3, 5]))) == float(jnp.log(8.0))
    True
    >>> float(default_loss(jnp.zeros(4), jnp.ones(4)))
    1.0
    """
    leaves = jax.tree.leaves((outputs, targets))
    if len(leaves) == 2 and all(hasattr(leaf, "dtype") for leaf in leaves):
        logits, wanted = leaves
        classes = jnp.issubdtype(wanted.dtype, jnp.integer)
        if (logits.shape[:-1] if classes else logits.shape) == wanted.shape:
            if classes:
                return optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()
            return jnp.square(logits - wanted).mean()
    shapes = [
        jax.tree.map(lambda leaf: tuple(leaf.shape) if hasattr(leaf, "dtype") else shown(leaf), tree)
        for tree in (outputs, targets)
    ]
    raise ConfigError(
        where="loss",
        expected="one output array, of the targets' shape or, for integer targets, with one more axis of "
        "classes",
        got=f"outputs {shapes[0]} and targets {shapes[1]}",
        remedy="pass loss=, a function of both",
    )


@takes(mup=instance(MupModel, "a MupModel", "mup_init(...)"), loss=LOSS)
def model_loss(mup: MupModel, loss: OutputLoss = default_loss, **kwargs: Any) -> Loss:
    """The loss of a model of any kind, for `train_step` and `train_scan`, on what `mup.split` returns.

    Args:
        mup: the model.
        loss: (outputs, targets) -> a scalar.
        **kwargs: passed to `mup.apply`, e.g. `train=True`.

    Returns:
        (params, model_state, (inputs, targets), key) -> (loss, (model_state, {})), which updates batch
        statistics and gives each step's key to all random streams (Linen).
    """

    def objective(params: PyTree, model_state: PyTree, batch: PyTree, key: Key[Array, ""], /) -> Any:
        inputs, targets = batch
        outputs, model_state = mup.apply_split(params, model_state, *as_inputs(inputs), key=key, **kwargs)
        return loss(jax.tree.map(_widened, outputs), targets), (model_state, {})

    return objective


def _widened(leaf: Any) -> Any:
    # A mean over examples in 16 bits would lose what 16 bits are good enough for inside of the model.
    is_short = jnp.issubdtype(leaf.dtype, jnp.floating) and jnp.finfo(leaf.dtype).bits < 32
    return leaf.astype(jnp.float32) if is_short else leaf


class Losses(NamedTuple):
    """Summary statistics of a training run.

    Attributes:
        mean: training loss, the mean over all steps. Every batch is scored before the model learns from it,
            so this is the online loss; it is much less noisy than the loss of the last few batches.
        final: the mean over the last tenth of the steps.
        untrained: the initial model's mean on the same batches as `final`.
    """

    mean: Any
    final: Any
    untrained: Any

    @property
    def kept(self) -> float | None:
        """The loss of the run, `mean`; None if it diverged.

        A run diverged if a loss was not finite, if it ended above the untrained model's loss, or if its mean
        loss was more than twice the untrained model's.
        """
        return self.mean if self.healthy else None

    @property
    def healthy(self) -> Any:
        """Whether it did not diverge; traced if the losses are."""
        learns = (self.final <= self.untrained) & (self.mean <= 2 * self.untrained)
        return learns & (abs(self.mean) < math.inf)


def tail(steps: int) -> int:
    """The number of steps of the last tenth of a run, at least one."""
    return max(1, steps // 10)
