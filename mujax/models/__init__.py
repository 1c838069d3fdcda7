"""Reference models in plain Flax Linen: nothing in them knows about µP.

`BUILD` maps a name to a factory: a width gives the module and the abstract inputs to trace it with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import jax
import jax.numpy as jnp
from flax import linen as nn

from mujax.models._bert import Bert as Bert, BertConfig as BertConfig
from mujax.models._encoder_decoder import (
    EncoderDecoder as EncoderDecoder,
    EncoderDecoderConfig as EncoderDecoderConfig,
)
from mujax.models._mlp import MLP as MLP, MLPConfig as MLPConfig
from mujax.models._resnet import ResNet as ResNet, ResNetConfig as ResNetConfig
from mujax.models._resnet9 import ResNet9 as ResNet9, ResNet9Config as ResNet9Config
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


def _relative_transformer(width: int) -> tuple[nn.Module, tuple[jax.ShapeDtypeStruct, ...]]:
    config = TransformerConfig(d_model=width, n_layers=2, relative_positions=True)
    return Transformer(config), (jax.ShapeDtypeStruct((2, 64), jnp.int32),)


def _encoder_decoder(width: int) -> tuple[nn.Module, tuple[jax.ShapeDtypeStruct, ...]]:
    config = EncoderDecoderConfig(d_model=width, n_layers=2, vocab_size=256)
    tokens = jax.ShapeDtypeStruct((2, 32), jnp.int32)
    return EncoderDecoder(config), (tokens, tokens)


def _bert(width: int) -> tuple[nn.Module, tuple[jax.ShapeDtypeStruct, ...]]:
    config = BertConfig(d_model=width, n_layers=2, n_heads=4, head_dim=None, vocab_size=256)
    return Bert(config), (jax.ShapeDtypeStruct((2, 64), jnp.int32),)


def _resnet9(width: int) -> tuple[nn.Module, tuple[jax.ShapeDtypeStruct, ...]]:
    return ResNet9(ResNet9Config(width / 64)), (jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32),)


BUILD: Final[Mapping[str, Factory]] = {
    "mlp": _mlp,
    "transformer": _transformer,
    "relative-transformer": _relative_transformer,
    "encoder-decoder": _encoder_decoder,
    "bert": _bert,
    "resnet": _resnet,
    "resnet9": _resnet9,
}
"""Built-in models by name.

2 hidden layers; 2 blocks of 4 heads: with absolute and with relative positions, to translate bytes, to fill
in masked bytes; ResNet-18 and ResNet-9 with `width` channels at first.
"""
