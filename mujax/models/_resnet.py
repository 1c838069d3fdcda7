"""Residual networks with batch normalisation in plain Flax Linen.

Shape suffixes: B batch, H height, W width of the image, C channels.

References:
    He et al., Deep Residual Learning for Image Recognition, arXiv 1512.03385, Table 1 (post-activation;
    as in version 1.5 a bottleneck strides in its 3×3 convolution).
    He et al., Identity Mappings in Deep Residual Networks, arXiv 1603.05027, Figure 4e (pre-activation).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final, Protocol

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mujax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class _Conv:
    kernel: int
    strided: bool = False
    expansion: int = 1


@dataclasses.dataclass(frozen=True)
class _Stem:
    kernel: int
    stride: int
    pool: bool


# The convolutions of a residual branch, first to last.
_BRANCH: Final[Mapping[str, tuple[_Conv, ...]]] = {
    "basic": (_Conv(3, strided=True), _Conv(3)),
    "bottleneck": (_Conv(1), _Conv(3, strided=True), _Conv(1, expansion=4)),
}
_STEM: Final[Mapping[str, _Stem]] = {
    "cifar": _Stem(kernel=3, stride=1, pool=False),
    "imagenet": _Stem(kernel=7, stride=2, pool=True),
}


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """Sizes and options of a `ResNet`; the defaults are ResNet-18 for small images.

    | model | `block` | `stage_sizes` |
    |---|---|---|
    | ResNet-18 | `"basic"` | (2, 2, 2, 2) |
    | ResNet-34 | `"basic"` | (3, 4, 6, 3) |
    | ResNet-50 | `"bottleneck"` | (3, 4, 6, 3) |
    | ResNet-101 | `"bottleneck"` | (3, 4, 23, 3) |

    Attributes:
        stage_sizes: blocks of each stage; a stage after the first halves height and width.
        stage_widths: channels of each stage (a bottleneck puts out four times that); the stem has as
            many as the first stage.
        width_multiplier: multiplies all of `stage_widths`; the products must be whole, so that all
            widths grow by the same ratio.
        block: `"basic"`, two 3×3 convolutions, or `"bottleneck"`, 1×1, 3×3 and 1×1.
        pre_activation: normalise and rectify before each convolution instead of after it.
        stem: `"cifar"`, one 3×3 convolution, or `"imagenet"`, 7×7 with stride 2 and a max-pool.
        n_classes: units of the readout.
        zero_readout: start the readout's kernel at zero instead of at 1/sqrt(fan-in).
        momentum: of the running averages of batch normalisation.
        dtype: dtype of the computation; statistics and logits are always in float32.
        param_dtype: dtype of the parameters.

    Raises:
        ConfigError: sizes that are not positive, whole or of equal number, or an unknown name.
    """

    stage_sizes: tuple[int, ...] = (2, 2, 2, 2)
    stage_widths: tuple[int, ...] = (64, 128, 256, 512)
    width_multiplier: float = 1.0
    block: str = "basic"
    pre_activation: bool = False
    stem: str = "cifar"
    n_classes: int = 10
    zero_readout: bool = False
    momentum: float = 0.9
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        for name, known in (("block", _BRANCH), ("stem", _STEM)):
            if getattr(self, name) not in known:
                raise ConfigError(
                    where=f"ResNetConfig.{name}",
                    expected=f"{' or '.join(map(repr, known))}",
                    got=repr(getattr(self, name)),
                )
        if not self.stage_sizes or len(self.stage_sizes) != len(self.stage_widths):
            raise ConfigError(
                where="ResNetConfig.stage_widths",
                expected=f"one width for each entry of stage_sizes={self.stage_sizes}",
                got=self.stage_widths,
            )
        if min(*self.stage_sizes, self.n_classes) < 1:
            raise ConfigError(
                where="ResNetConfig",
                expected="stage_sizes and n_classes of at least 1",
                got=f"{self.stage_sizes} and {self.n_classes}",
            )
        _ = self.channels

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each stage: `stage_widths` × `width_multiplier`.

        >>> ResNetConfig(width_multiplier=0.5).channels
        (32, 64, 128, 256)
        """
        return scaled_widths("ResNetConfig", self.stage_widths, self.width_multiplier)


class LayerOptions(Protocol):
    """The part of a config that convolutions and norms take."""

    @property
    def momentum(self) -> float: ...
    @property
    def dtype(self) -> DTypeLike: ...
    @property
    def param_dtype(self) -> DTypeLike: ...


def scaled_widths(config: str, widths: tuple[int, ...], multiplier: float) -> tuple[int, ...]:
    """The widths times the multiplier.

    Raises:
        ConfigError: a product is not a whole number of channels.
    """
    for width in widths:
        channels = width * multiplier
        if channels < 1 or channels != round(channels):
            raise ConfigError(
                where=f"{config}.width_multiplier",
                expected=f"{multiplier:g} × {width} channels to be a whole number",
                got=f"{channels:g}",
                remedy="choose a multiplier that divides evenly",
            )
    return tuple(round(width * multiplier) for width in widths)


def conv(cfg: LayerOptions, channels: int, kernel: int, stride: int, name: str) -> nn.Conv:
    return nn.Conv(
        channels,
        (kernel, kernel),
        (stride, stride),
        use_bias=False,
        dtype=cfg.dtype,
        param_dtype=cfg.param_dtype,
        name=name,
    )


def norm(cfg: LayerOptions, train: bool, name: str) -> nn.BatchNorm:
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=cfg.momentum,
        dtype=cfg.dtype,
        param_dtype=cfg.param_dtype,
        name=name,
    )


class PostActivationBlock(nn.Module):
    """relu(shortcut + branch), the branch being convolution, norm, relu, ..., convolution, norm."""

    config: ResNetConfig
    channels: int
    stride: int

    @nn.compact
    def __call__(self, x_BxHxWxC: Float[Array, "B H W C"], train: bool) -> Float[Array, "B h w c"]:
        cfg, branch = self.config, _BRANCH[self.config.block]
        channels_out = self.channels * branch[-1].expansion

        y_BxHxWxC = x_BxHxWxC
        for i, layer in enumerate(branch):
            if i:
                y_BxHxWxC = nn.relu(y_BxHxWxC)
            channels, stride = self.channels * layer.expansion, self.stride if layer.strided else 1
            y_BxHxWxC = conv(cfg, channels, layer.kernel, stride, name=f"conv_{i}")(y_BxHxWxC)
            y_BxHxWxC = norm(cfg, train, f"norm_{i}")(y_BxHxWxC)

        if self.stride != 1 or x_BxHxWxC.shape[-1] != channels_out:
            x_BxHxWxC = conv(cfg, channels_out, 1, self.stride, name="shortcut_conv")(x_BxHxWxC)
            x_BxHxWxC = norm(cfg, train, "shortcut_norm")(x_BxHxWxC)
        return nn.relu(x_BxHxWxC + y_BxHxWxC)


class PreActivationBlock(nn.Module):
    """shortcut + branch, the branch being norm, relu, convolution, ..., norm, relu, convolution."""

    config: ResNetConfig
    channels: int
    stride: int

    @nn.compact
    def __call__(self, x_BxHxWxC: Float[Array, "B H W C"], train: bool) -> Float[Array, "B h w c"]:
        cfg, branch = self.config, _BRANCH[self.config.block]
        channels_out = self.channels * branch[-1].expansion

        y_BxHxWxC = nn.relu(norm(cfg, train, "norm_0")(x_BxHxWxC))
        # A projected shortcut starts from the normalised input, a plain one from the input itself.
        if self.stride != 1 or x_BxHxWxC.shape[-1] != channels_out:
            x_BxHxWxC = conv(cfg, channels_out, 1, self.stride, name="shortcut_conv")(y_BxHxWxC)

        for i, layer in enumerate(branch):
            if i:
                y_BxHxWxC = nn.relu(norm(cfg, train, f"norm_{i}")(y_BxHxWxC))
            channels, stride = self.channels * layer.expansion, self.stride if layer.strided else 1
            y_BxHxWxC = conv(cfg, channels, layer.kernel, stride, name=f"conv_{i}")(y_BxHxWxC)
        return x_BxHxWxC + y_BxHxWxC


class ResNet(nn.Module):
    """Stem, stages of residual blocks, global average pool, linear readout with a bias.

    Kernels start at variance 1/fan_in. Running averages live in the collection `"batch_stats"`, which
    must be mutable when `train` is true.

    >>> import jax
    >>> model = ResNet(ResNetConfig(stage_sizes=(1, 1), stage_widths=(8, 16)))
    >>> images_BxHxWxC = jnp.zeros((2, 8, 8, 3))
    >>> logits_BxL, variables = model.init_with_output(jax.random.key(0), images_BxHxWxC)
    >>> logits_BxL.shape, sorted(variables)
    ((2, 10), ['batch_stats', 'params'])
    """

    config: ResNetConfig

    @nn.compact
    def __call__(
        self, x_BxHxWxC: Float[Array, "B H W C"], *, train: bool = False
    ) -> Float[Array, "B classes"]:
        """Runs the model.

        Args:
            x_BxHxWxC: images.
            train: normalise by the batch's own statistics and update the running averages, instead of
                normalising by those averages.
        """
        cfg = self.config
        block = PreActivationBlock if cfg.pre_activation else PostActivationBlock

        stem = _STEM[cfg.stem]
        x_BxHxWxC = conv(cfg, cfg.channels[0], stem.kernel, stem.stride, name="stem_conv")(x_BxHxWxC)
        # The first pre-activation block has its own norm.
        if not cfg.pre_activation:
            x_BxHxWxC = nn.relu(norm(cfg, train, "stem_norm")(x_BxHxWxC))
        if stem.pool:
            x_BxHxWxC = nn.max_pool(x_BxHxWxC, (3, 3), (2, 2), padding="SAME")

        for i, (size, channels) in enumerate(zip(cfg.stage_sizes, cfg.channels, strict=True)):
            for j in range(size):
                stride = 2 if i and not j else 1
                x_BxHxWxC = block(cfg, channels, stride, name=f"stage_{i}_block_{j}")(x_BxHxWxC, train)
        if cfg.pre_activation:
            x_BxHxWxC = nn.relu(norm(cfg, train, "final_norm")(x_BxHxWxC))

        x_BxC = x_BxHxWxC.mean(axis=(1, 2))
        init = nn.initializers.zeros_init() if cfg.zero_readout else nn.initializers.lecun_normal()
        logits_BxL = nn.Dense(
            cfg.n_classes, kernel_init=init, dtype=cfg.dtype, param_dtype=cfg.param_dtype, name="readout"
        )(x_BxC)
        return logits_BxL.astype(jnp.float32)
