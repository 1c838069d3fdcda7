"""Pre-LN decoder Transformer in plain Flax Linen, standard parametrization throughout.

Shape suffixes: B batch, T query position, S key position, D model width, N query heads, K key and value
heads, G query heads to one key and value head (N = K G), H head size, F feed-forward width, V vocabulary.

References:
    Vaswani et al., Attention Is All You Need, arXiv 1706.03762.
    Ainslie et al., GQA, arXiv 2305.13245.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mujax.errors import ConfigError

_DEFAULT_HEADS = 4


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

    def __post_init__(self) -> None:
        optional = ("n_heads", "head_dim", "n_kv_heads")
        for name in ("d_model", "n_layers", "ff_ratio", "vocab_size", "max_len", *optional):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ConfigError(
                    where=f"TransformerConfig.{name}",
                    expected="at least 1",
                    got=size,
                )
        if not 0 <= self.dropout < 1:
            raise ConfigError(
                where="TransformerConfig.dropout",
                expected="a rate from 0 up to 1, 1 excluded",
                got=self.dropout,
            )
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
        if self.n_heads is not None and self.head_dim is not None:
            n_heads, head_dim = self.n_heads, self.head_dim
        else:
            name = "n_heads" if self.head_dim is None else "head_dim"
            divisor = self.head_dim or self.n_heads or _DEFAULT_HEADS
            if self.d_model % divisor:
                raise ConfigError(
                    where=f"TransformerConfig.{name}",
                    expected=f"a divisor of d_model={self.d_model}",
                    got=divisor,
                    remedy="give both n_heads and head_dim if n_heads × head_dim is to differ from d_model",
                )
            rest = self.d_model // divisor
            n_heads, head_dim = (rest, divisor) if name == "head_dim" else (divisor, rest)
        return n_heads, self.n_kv_heads or n_heads, head_dim

    @property
    def layer_options(self) -> dict[str, Any]:
        """Keyword arguments that all projections and norms of a block share."""
        return {"use_bias": self.use_bias, "dtype": self.dtype, "param_dtype": self.param_dtype}


class Attention(nn.Module):
    """Causal attention, logits q·k / sqrt(head size), grouped when there are fewer keys than queries."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BxTxD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        cfg = self.config
        N, K, H = cfg.heads
        B, T, D = x_BxTxD.shape
        options = cfg.layer_options

        q_BxTxNxH = nn.DenseGeneral((N, H), name="query", **options)(x_BxTxD)
        k_BxSxKxH = nn.DenseGeneral((K, H), name="key", **options)(x_BxTxD)
        v_BxSxKxH = nn.DenseGeneral((K, H), name="value", **options)(x_BxTxD)

        q_BxTxKxGxH = q_BxTxNxH.reshape(B, T, K, N // K, H) / math.sqrt(H)
        logits_BxKxGxTxS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BxTxKxGxH, k_BxSxKxH)
        causal_TxS = jnp.tril(jnp.ones((T, T), dtype=bool))
        weights_BxKxGxTxS = jax.nn.softmax(logits_BxKxGxTxS.astype(jnp.float32), where=causal_TxS)
        out_BxTxKxGxH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BxKxGxTxS.astype(cfg.dtype), v_BxSxKxH)

        out_BxTxNxH = out_BxTxKxGxH.reshape(B, T, N, H)
        return nn.DenseGeneral(D, axis=(-2, -1), name="out", **options)(out_BxTxNxH)


class FeedForward(nn.Module):
    """Two projections with a GELU between."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BxTxD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        cfg = self.config
        options = cfg.layer_options
        h_BxTxF = nn.Dense(cfg.ff_ratio * cfg.d_model, name="up", **options)(x_BxTxD)
        return nn.Dense(cfg.d_model, name="down", **options)(nn.gelu(h_BxTxF))


class Block(nn.Module):
    """Attention and feed-forward, each on the normalised residual stream and added back to it."""

    config: TransformerConfig
    train: bool

    @nn.compact
    def __call__(self, x_BxTxD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        cfg = self.config
        options = cfg.layer_options
        dropout = nn.Dropout(cfg.dropout, deterministic=not self.train)

        y_BxTxD = nn.LayerNorm(name="attention_norm", **options)(x_BxTxD)
        x_BxTxD += dropout(Attention(cfg, name="attention")(y_BxTxD))
        y_BxTxD = nn.LayerNorm(name="ff_norm", **options)(x_BxTxD)
        return x_BxTxD + dropout(FeedForward(cfg, name="ff")(y_BxTxD))


class Transformer(nn.Module):
    """Decoder-only language model: next-token logits for every position.

    Projections start at variance 1/fan_in, embeddings at 1/d_model (Flax's defaults).

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
        if cfg.max_len < T:
            raise ConfigError(
                where="Transformer",
                expected=f"at most max_len={cfg.max_len} tokens",
                got=T,
                remedy="shorten the sequence or raise TransformerConfig.max_len",
            )
        dtypes: dict[str, Any] = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}

        token_embedding = nn.Embed(cfg.vocab_size, cfg.d_model, name="token_embedding", **dtypes)
        position_embedding = nn.Embed(cfg.max_len, cfg.d_model, name="position_embedding", **dtypes)
        x_BxTxD = token_embedding(tokens_BxT) + position_embedding(jnp.arange(T)[None])
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
