"""Multilayer perceptron: the 784-(w-w)-10 of the microsoft/mup demo, in plain Flax Linen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mujax.models._sizes import require_positive


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """Sizes and options of an `MLP`.

    Attributes:
        width: units of each hidden layer.
        depth: number of hidden layers.
        n_classes: units of the readout.
        activation: elementwise nonlinearity after each hidden layer.
        use_bias: add a bias in every layer, the readout included.
        zero_readout: start the readout at zero, as the demo does, instead of at 1/sqrt(width).
        dtype: dtype of the computation.
        param_dtype: dtype of the parameters.

    Raises:
        ConfigError: a size is not positive.
    """

    width: int = 256
    depth: int = 2
    n_classes: int = 10
    activation: Callable[[Array], Array] = nn.relu
    use_bias: bool = False
    zero_readout: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        require_positive(self, "width", "depth", "n_classes")


class MLP(nn.Module):
    """Hidden layers of one width and a linear readout; anything after the batch axis is flattened.

    Each kernel starts at variance 1/fan_in (LeCun, or Kaiming with linear gain: the demo's).

    >>> import jax
    >>> model = MLP(MLPConfig(width=32))
    >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    >>> jax.tree.map(jnp.shape, variables["params"])["readout"]
    {'kernel': (32, 10)}
    """

    config: MLPConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B ..."]) -> Float[Array, "B classes"]:
        cfg = self.config
        options: dict[str, Any] = {
            "use_bias": cfg.use_bias,
            "dtype": cfg.dtype,
            "param_dtype": cfg.param_dtype,
        }
        init = nn.initializers.lecun_normal()
        readout_init = nn.initializers.zeros_init() if cfg.zero_readout else init

        x_BxF = x.reshape(x.shape[0], -1)
        for i in range(cfg.depth):
            x_BxF = nn.Dense(cfg.width, kernel_init=init, name=f"hidden_{i}", **options)(x_BxF)
            x_BxF = cfg.activation(x_BxF)
        logits_BxC = nn.Dense(cfg.n_classes, kernel_init=readout_init, name="readout", **options)(x_BxF)
        return logits_BxC.astype(jnp.float32)
