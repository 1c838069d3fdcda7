"""Pre-LN encoder-decoder Transformer in plain Flax Linen, for translation.

Shape suffixes: B batch, S source position, T target position, D model width, V vocabulary.

References:
    Vaswani et al., Attention Is All You Need, arXiv 1706.03762: sinusoidal positions, embeddings times
    sqrt(d_model), one table for both languages and the readout (section 3.4).
    Xiong et al., On Layer Normalization in the Transformer Architecture, arXiv 2002.04745: norms before each
    sublayer and after each stack.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from mujax.errors import ConfigError
from mujax.models._layers import Attention, FeedForward, causal_mask
from mujax.models._sizes import require_length, require_positive, require_rate, split_heads


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig:
    """Sizes and options of an `EncoderDecoder`.

    `n_heads` and `head_dim` are as in `TransformerConfig`: give one, none for 4 heads, or both.

    Attributes:
        d_model: width of both residual streams.
        n_layers: blocks of the encoder, and of the decoder.
        n_heads: heads.
        head_dim: size of a head.
        ff_ratio: feed-forward width over `d_model`.
        vocab_size: number of tokens, the same for both languages.
        max_len: longest source or target.
        pad: the token that fills short sequences up; nothing attends to it in the source.
        share_embeddings: one table for source, target and readout; otherwise a table for each language and a
            kernel for the readout.
        use_bias: biases in projections and layer norms.
        dropout: rate after the embeddings and after each sublayer.
        dtype: dtype of the computation; softmax and logits are always in float32.
        param_dtype: dtype of the parameters.

    Raises:
        ConfigError: sizes that are not positive or do not divide, or a padding token outside the vocabulary.
    """

    d_model: int = 512
    n_layers: int = 6
    n_heads: int | None = None
    head_dim: int | None = None
    ff_ratio: int = 4
    vocab_size: int = 8192
    max_len: int = 256
    pad: int = 0
    share_embeddings: bool = True
    use_bias: bool = True
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        require_positive(self, "d_model", "n_layers", "ff_ratio", "vocab_size", "max_len")
        require_positive(self, "n_heads", "head_dim")
        require_rate(self, "dropout")
        if self.d_model % 2:
            raise ConfigError(
                where="EncoderDecoderConfig.d_model",
                expected="an even number, for a sine and a cosine of each frequency",
                got=self.d_model,
            )
        if not 0 <= self.pad < self.vocab_size:
            raise ConfigError(
                where="EncoderDecoderConfig.pad",
                expected=f"one of the {self.vocab_size} tokens",
                got=self.pad,
            )
        _ = self.heads

    @property
    def heads(self) -> tuple[int, int, int]:
        """Number of query heads, number of key and value heads, head size."""
        n_heads, head_dim = split_heads(self)
        return n_heads, n_heads, head_dim

    @property
    def layer_options(self) -> dict[str, Any]:
        """Keyword arguments that all projections and norms share."""
        return {"use_bias": self.use_bias, "dtype": self.dtype, "param_dtype": self.param_dtype}


def sinusoids(length: int, d_model: int) -> Float[Array, "T D"]:
    """Sines, then cosines, of the position at frequencies from 1 down to nearly 1/10000."""
    frequencies_E = 10_000.0 ** -(jnp.arange(0, d_model, 2) / d_model)
    angles_TxE = jnp.arange(length)[:, None] * frequencies_E[None]
    return jnp.concatenate([jnp.sin(angles_TxE), jnp.cos(angles_TxE)], axis=-1)


class EncoderBlock(nn.Module):
    """Attention and feed-forward, each on the normalised residual stream and added back to it."""

    config: EncoderDecoderConfig
    train: bool

    @nn.compact
    def __call__(self, x_BxSxD: Float[Array, "B S D"], mask: Bool[Array, "#B #S S"]) -> Float[Array, "B S D"]:
        cfg = self.config
        options = cfg.layer_options
        dropout = nn.Dropout(cfg.dropout, deterministic=not self.train)

        y_BxSxD = nn.LayerNorm(name="attention_norm", **options)(x_BxSxD)
        x_BxSxD += dropout(Attention(cfg.heads, name="attention", **options)(y_BxSxD, mask))
        y_BxSxD = nn.LayerNorm(name="ff_norm", **options)(x_BxSxD)
        ff = FeedForward(cfg.ff_ratio * cfg.d_model, nn.relu, name="ff", **options)
        return x_BxSxD + dropout(ff(y_BxSxD))


class DecoderBlock(nn.Module):
    """Causal attention, attention to the encoder's output and feed-forward, each as in `EncoderBlock`."""

    config: EncoderDecoderConfig
    train: bool

    @nn.compact
    def __call__(
        self,
        x_BxTxD: Float[Array, "B T D"],
        memory_BxSxD: Float[Array, "B S D"],
        memory_mask: Bool[Array, "#B #T S"],
    ) -> Float[Array, "B T D"]:
        cfg = self.config
        options = cfg.layer_options
        dropout = nn.Dropout(cfg.dropout, deterministic=not self.train)

        y_BxTxD = nn.LayerNorm(name="attention_norm", **options)(x_BxTxD)
        attention = Attention(cfg.heads, name="attention", **options)
        x_BxTxD += dropout(attention(y_BxTxD, causal_mask(x_BxTxD.shape[1])))
        y_BxTxD = nn.LayerNorm(name="cross_attention_norm", **options)(x_BxTxD)
        cross_attention = Attention(cfg.heads, name="cross_attention", **options)
        x_BxTxD += dropout(cross_attention(y_BxTxD, memory_mask, memory_BxSxD))
        y_BxTxD = nn.LayerNorm(name="ff_norm", **options)(x_BxTxD)
        ff = FeedForward(cfg.ff_ratio * cfg.d_model, nn.relu, name="ff", **options)
        return x_BxTxD + dropout(ff(y_BxTxD))


class EncoderDecoder(nn.Module):
    """Translation model: logits of the next target token after every prefix of the target, given the source.

    Projections start at variance 1/fan_in, embeddings at 1/d_model (Flax's defaults).

    >>> import jax
    >>> model = EncoderDecoder(EncoderDecoderConfig(d_model=16, n_layers=1, vocab_size=11))
    >>> source_BxS, target_BxT = jnp.ones((2, 5), jnp.int32), jnp.ones((2, 3), jnp.int32)
    >>> logits_BxTxV, variables = model.init_with_output(jax.random.key(0), source_BxS, target_BxT)
    >>> logits_BxTxV.shape
    (2, 3, 11)
    >>> sorted(variables["params"])
    ['decoder_0', 'decoder_norm', 'embedding', 'encoder_0', 'encoder_norm']
    """

    config: EncoderDecoderConfig

    @nn.compact
    def __call__(
        self, source_BxS: Int[Array, "B S"], target_BxT: Int[Array, "B T"], *, train: bool = False
    ) -> Float[Array, "B T V"]:
        """Runs the model.

        Args:
            source_BxS: tokens to translate, at least one of each row not the padding.
            target_BxT: the translation so far, from a token that begins it.
            train: apply dropout; needs `rngs={"dropout": key}` if the rate is not zero.

        Raises:
            ConfigError: a sequence is longer than `max_len`.
        """
        cfg = self.config
        require_length("EncoderDecoder", cfg.max_len, source_BxS.shape[1], target_BxT.shape[1])
        dtypes: dict[str, Any] = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
        dropout = nn.Dropout(cfg.dropout, deterministic=not train)

        def embedding(name: str) -> nn.Embed:
            return nn.Embed(cfg.vocab_size, cfg.d_model, name=name, **dtypes)

        def embedded(table: nn.Embed, tokens_BxT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
            positions_TxD = sinusoids(tokens_BxT.shape[1], cfg.d_model).astype(cfg.dtype)
            return dropout(table(tokens_BxT) * math.sqrt(cfg.d_model) + positions_TxD[None])

        if cfg.share_embeddings:
            source_embedding = target_embedding = embedding("embedding")
        else:
            source_embedding = embedding("source_embedding")
            target_embedding = embedding("target_embedding")

        # One row for all queries: which tokens of the source are there.
        source_mask_Bx1xS = (source_BxS != cfg.pad)[:, None]
        x_BxSxD = embedded(source_embedding, source_BxS)
        for i in range(cfg.n_layers):
            x_BxSxD = EncoderBlock(cfg, train, name=f"encoder_{i}")(x_BxSxD, source_mask_Bx1xS)
        memory_BxSxD = nn.LayerNorm(name="encoder_norm", **cfg.layer_options)(x_BxSxD)

        x_BxTxD = embedded(target_embedding, target_BxT)
        for i in range(cfg.n_layers):
            block = DecoderBlock(cfg, train, name=f"decoder_{i}")
            x_BxTxD = block(x_BxTxD, memory_BxSxD, source_mask_Bx1xS)
        x_BxTxD = nn.LayerNorm(name="decoder_norm", **cfg.layer_options)(x_BxTxD)

        if cfg.share_embeddings:
            logits_BxTxV = target_embedding.attend(x_BxTxD)
        else:
            logits_BxTxV = nn.Dense(cfg.vocab_size, use_bias=False, name="readout", **dtypes)(x_BxTxD)
        return logits_BxTxV.astype(jnp.float32)
