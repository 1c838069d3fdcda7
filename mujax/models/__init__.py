"""Reference models in plain Flax Linen: nothing in them knows about µP.

`BUILD` maps a name to a factory: a width gives the module and the abstract inputs to trace it with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import jax
import jax.numpy as jnp
from flax import linen as nn

from mujax.models._mlp import MLP as MLP, MLPConfig as MLPConfig
from mujax.models._resnet import ResNet as ResNet, ResNetConfig as ResNetConfig
from mujax.models._transformer import Transformer as Transformer, TransformerConfig as TransformerConfig

Factory = Callable[[int], tuple[nn.Module, tuple[jax.ShapeDtypeStruct, ...]]]


def _mlp(width: int) -> tuple[nn.Module, tuple[jax.ShapeDtypeStruct, ...]]:
    return MLP(MLPConfig(width=width)), (jax.ShapeDtypeStruct((2, 784), jnp.float32),)


def _transformer(width: int) -> tuple[nn.Module, tuple[jax.ShapeDtypeStruct, ...]]:
    config = TransformerConfig(d_model=width, n_layers=2)
    return Transformer(config), (jax.ShapeDtypeStruct((2, 64), jnp.int32),)


def _resnet(width: int) -> tuple[nn.Module, tuple[jax.ShapeDtypeStruct, ...]]:
    config = ResNetConfig(stage_widths=tuple(width * 2**stage for stage in range(4)))
    return ResNet(config), (jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32),)


BUILD: Final[Mapping[str, Factory]] = {"mlp": _mlp, "transformer": _transformer, "resnet": _resnet}
"""Built-in models by name: 2 hidden layers, 2 blocks of 4 heads, ResNet-18 with `width` channels at first."""
