"""Pre-LN decoder Transformer in plain Flax Linen, standard parametrization throughout.

Shape suffixes: B batch, T position, D model width, V vocabulary.

Reference:
    Radford et al., Language Models are Unsupervised Multitask Learners, 2019 (GPT-2).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mujax.errors import ConfigError
from mujax.models._layers import Attention, FeedForward, causal_mask
from mujax.models._sizes import require_length, require_positive, require_rate, split_heads


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and options of a `Transformer`.

    Give `n_heads` or `head_dim`: the other follows from d_model = n_heads × head_dim. The one that
    is fixed determines how attention grows with `d_model`. With neither there are 4 heads; with both, both
    are fixed, whatever `d_model` is.

    Attributes:
        d_model: width of the residual stream.
        n_layers: number of blocks.
        n_heads: query heads.
        head_dim: size of a head.
        n_kv_heads: key and value heads, a divisor of the query heads; `None` for one to each.
        ff_ratio: feed-forward width over `d_model`.
        vocab_size: number of tokens; 256 for bytes.
        max_len: longest sequence.
        tie_embeddings: read out with the token embedding instead of a separate kernel.
        zero_readout: start an untied readout at zero instead of at 1/sqrt(d_model).
        use_bias: biases in projections and layer norms.
        dropout: rate after the embedding and after each attention and feed-forward branch.
        remat: recompute each block in the backward pass instead of storing its activations.
        scan_layers: run the blocks as one `lax.scan`, their parameters stacked along a leading axis.
        dtype: dtype of the computation; softmax and logits are always in float32.
        param_dtype: dtype of the parameters.
        relative_positions: in each block, add a learned vector for the distance between query and key to the
            key, instead of one for its position to each token.

    Raises:
        ConfigError: sizes that are not positive or do not divide.
    """

    d_model: int = 256
    n_layers: int = 4
    n_heads: int | None = None
    head_dim: int | None = None
    n_kv_heads: int | None = None
    ff_ratio: int = 4
    vocab_size: int = 256
    max_len: int = 256
    tie_embeddings: bool = False
    zero_readout: bool = False
    use_bias: bool = False
    dropout: float = 0.0
    remat: bool = False
    scan_layers: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    _: dataclasses.KW_ONLY
    relative_positions: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "d_model", "n_layers", "ff_ratio", "vocab_size", "max_len")
        require_positive(self, "n_heads", "head_dim", "n_kv_heads")
        require_rate(self, "dropout")
        n_heads, n_kv_heads, _ = self.heads
        if n_heads % n_kv_heads:
            raise ConfigError(
                where="TransformerConfig.n_kv_heads",
                expected=f"a divisor of the {n_heads} query heads",
                got=n_kv_heads,
            )

    @property
    def heads(self) -> tuple[int, int, int]:
        """Number of query heads, number of key and value heads, head size.

        >>> TransformerConfig(d_model=64, head_dim=16, n_kv_heads=2).heads
        (4, 2, 16)
        """
        n_heads, head_dim = split_heads(self)
        return n_heads, self.n_kv_heads or n_heads, head_dim

    @property
    def layer_options(self) -> dict[str, Any]:
        """Keyword arguments that all projections and norms of a block share."""
        return {"use_bias": self.use_bias, "dtype": self.dtype, "param_dtype": self.param_dtype}


class Block(nn.Module):
    """Attention and feed-forward, each on the normalised residual stream and added back to it."""

    config: TransformerConfig
    train: bool

    @nn.compact
    def __call__(self, x_BxTxD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        cfg = self.config
        options = cfg.layer_options
        dropout = nn.Dropout(cfg.dropout, deterministic=not self.train)

        max_distance = cfg.max_len if cfg.relative_positions else None
        attention = Attention(cfg.heads, max_distance=max_distance, name="attention", **options)
        y_BxTxD = nn.LayerNorm(name="attention_norm", **options)(x_BxTxD)
        x_BxTxD += dropout(attention(y_BxTxD, causal_mask(x_BxTxD.shape[1])))
        y_BxTxD = nn.LayerNorm(name="ff_norm", **options)(x_BxTxD)
        return x_BxTxD + dropout(FeedForward(cfg.ff_ratio * cfg.d_model, name="ff", **options)(y_BxTxD))


class Transformer(nn.Module):
    """Decoder-only language model: next-token logits for every position.

    Projections start at variance 1/fan_in, embeddings at 1/d_model (Flax's defaults).

    >>> import jax
    >>> model = Transformer(TransformerConfig(d_model=64, n_layers=2, head_dim=16))
    >>> tokens_BxT = jnp.zeros((2, 8), jnp.int32)
    >>> logits_BxTxV, variables = model.init_with_output(jax.random.key(0), tokens_BxT)
    >>> logits_BxTxV.shape
    (2, 8, 256)
    >>> sorted(variables["params"])
    ['block_0', 'block_1', 'final_norm', 'position_embedding', 'readout', 'token_embedding']
    """

    config: TransformerConfig

    @nn.compact
    def __call__(self, tokens_BxT: Int[Array, "B T"], *, train: bool = False) -> Float[Array, "B T V"]:
        """Runs the model.

        Args:
            tokens_BxT: token indices.
            train: apply dropout; needs `rngs={"dropout": key}` if the rate is not zero.

        Raises:
            ConfigError: the sequence is longer than `max_len`.
        """
        cfg = self.config
        T = tokens_BxT.shape[1]
        require_length("Transformer", cfg.max_len, T)
        dtypes: dict[str, Any] = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}

        token_embedding = nn.Embed(cfg.vocab_size, cfg.d_model, name="token_embedding", **dtypes)
        x_BxTxD = token_embedding(tokens_BxT)
        if not cfg.relative_positions:
            position_embedding = nn.Embed(cfg.max_len, cfg.d_model, name="position_embedding", **dtypes)
            x_BxTxD += position_embedding(jnp.arange(T)[None])
        x_BxTxD = nn.Dropout(cfg.dropout, deterministic=not train)(x_BxTxD)

        # Inside a scan the loop itself keeps XLA from merging the recomputation with the forward pass.
        block_class = nn.remat(Block, prevent_cse=not cfg.scan_layers) if cfg.remat else Block
        if cfg.scan_layers:
            run_blocks = nn.scan(
                lambda block, x_BxTxD, _: (block(x_BxTxD), None),
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                length=cfg.n_layers,
            )
            x_BxTxD, _ = run_blocks(block_class(cfg, train, name="blocks"), x_BxTxD, None)
        else:
            for i in range(cfg.n_layers):
                x_BxTxD = block_class(cfg, train, name=f"block_{i}")(x_BxTxD)

        x_BxTxD = nn.LayerNorm(use_bias=cfg.use_bias, name="final_norm", **dtypes)(x_BxTxD)
        if cfg.tie_embeddings:
            logits_BxTxV = token_embedding.attend(x_BxTxD)
        else:
            init = nn.initializers.zeros_init() if cfg.zero_readout else nn.initializers.lecun_normal()
            readout = nn.Dense(cfg.vocab_size, use_bias=False, kernel_init=init, name="readout", **dtypes)
            logits_BxTxV = readout(x_BxTxD)
        return logits_BxTxV.astype(jnp.float32)
