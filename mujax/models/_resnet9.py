"""ResNet-9, the network of DAWNBench's fast CIFAR-10 trainings, in plain Flax Linen.

Shape suffixes: B batch, H height, W width of the image, C channels, L classes.

Reference:
    Page, How to Train Your ResNet, 2018, after Coleman's DAWNBench entry with Davidnet's sizes.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mujax.errors import ConfigError
from mujax.models._resnet import conv, norm, scaled_widths
from mujax.models._sizes import require_positive

# Channels of the first convolution and of the three stages; the second stage has no residual branch.
_WIDTHS: Final = (64, 128, 256, 512)
_RESIDUAL: Final = (True, False, True)


@dataclasses.dataclass(frozen=True)
class ResNet9Config:
    """Sizes and options of a `ResNet9`.

    Attributes:
        width_multiplier: multiplies the 64, 128, 256 and 512 channels; the products must be whole.
        n_classes: units of the readout.
        logit_scale: multiplies the logits.
        zero_readout: start the readout's kernel at zero instead of at 1/sqrt(fan-in).
        momentum: of the running averages of batch normalisation.
        dtype: dtype of the computation; statistics and logits are always in float32.
        param_dtype: dtype of the parameters.

    Raises:
        ConfigError: sizes that are not positive or whole.
    """

    width_multiplier: float = 1.0
    n_classes: int = 10
    logit_scale: float = 0.125
    zero_readout: bool = False
    momentum: float = 0.9
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        require_positive(self, "n_classes")
        if not self.logit_scale > 0:
            raise ConfigError(
                where="ResNet9Config.logit_scale", expected="a number above 0", got=self.logit_scale
            )
        _ = self.channels

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the first convolution and of the three stages.

        >>> ResNet9Config(width_multiplier=0.5).channels
        (32, 64, 128, 256)
        """
        return scaled_widths("ResNet9Config", _WIDTHS, self.width_multiplier)


class ResNet9(nn.Module):
    """A convolution, three stages that each halve the image, a global max-pool and a readout without a bias.

    A stage is a convolution and a max-pool; the first and the third add a branch of two convolutions.
    Kernels start at variance 1/fan_in. Running averages live in the collection `"batch_stats"`, which must be
    mutable when `train` is true.

    >>> import jax
    >>> model = ResNet9(ResNet9Config(width_multiplier=0.125))
    >>> logits_BxL, variables = model.init_with_output(jax.random.key(0), jnp.zeros((2, 16, 16, 3)))
    >>> logits_BxL.shape, sorted(variables)
    ((2, 10), ['batch_stats', 'params'])
    """

    config: ResNet9Config

    @nn.compact
    def __call__(
        self, x_BxHxWxC: Float[Array, "B H W C"], *, train: bool = False
    ) -> Float[Array, "B classes"]:
        """Runs the model.

        Args:
            x_BxHxWxC: images, at least 8 by 8.
            train: normalise by the batch's own statistics and update the running averages, instead of
                normalising by those averages.

        Raises:
            ConfigError: the images are too small to be halved three times.
        """
        cfg = self.config
        sides = x_BxHxWxC.shape[1:3]
        if min(sides) < 2 ** len(_RESIDUAL):
            raise ConfigError(where="ResNet9", expected="images of at least 8 by 8 pixels", got=sides)

        def layer(x_BxHxWxC: Float[Array, "B H W C"], channels: int, name: str) -> Float[Array, "B H W c"]:
            x_BxHxWxC = conv(cfg, channels, 3, 1, name=f"{name}_conv")(x_BxHxWxC)
            return nn.relu(norm(cfg, train, f"{name}_norm")(x_BxHxWxC))

        first, *stages = cfg.channels
        x_BxHxWxC = layer(x_BxHxWxC, first, "stem")
        for i, (channels, residual) in enumerate(zip(stages, _RESIDUAL, strict=True)):
            x_BxHxWxC = nn.max_pool(layer(x_BxHxWxC, channels, f"stage_{i}"), (2, 2), (2, 2))
            if residual:
                y_BxHxWxC = layer(x_BxHxWxC, channels, f"stage_{i}_branch_0")
                x_BxHxWxC += layer(y_BxHxWxC, channels, f"stage_{i}_branch_1")

        x_BxC = x_BxHxWxC.max(axis=(1, 2))
        init = nn.initializers.zeros_init() if cfg.zero_readout else nn.initializers.lecun_normal()
        readout = nn.Dense(
            cfg.n_classes,
            use_bias=False,
            kernel_init=init,
            dtype=cfg.dtype,
            param_dtype=cfg.param_dtype,
            name="readout",
        )
        return readout(x_BxC).astype(jnp.float32) * cfg.logit_scale
