"""BERT with its head for masked tokens, in plain Flax Linen.

Shape suffixes: B batch, T position, D model width, V vocabulary.

Reference:
    Devlin et al., BERT, arXiv 1810.04805: norms after each sublayer, GELU, initial values of σ = 0.02
    truncated at 2σ. The head for pairs of sentences and the pooler in front of it are left out.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from mujax.errors import ConfigError
from mujax.models._layers import Attention, FeedForward
from mujax.models._sizes import require_length, require_positive, require_rate, split_heads


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes and options of a `Bert`; the defaults are the base size.

    | model | `d_model` | `n_layers` |
    |---|---|---|
    | base | 768 | 12 |
    | large | 1024 | 24 |

    Attributes:
        d_model: width of the residual stream.
        n_layers: number of blocks.
        n_heads: heads, if `head_dim` is `None`.
        head_dim: size of a head.
        ff_ratio: feed-forward width over `d_model`.
        vocab_size: number of tokens.
        max_len: longest sequence.
        n_types: kinds of tokens, as of the first and the second sentence; 0 for no embedding of kinds.
        pad: the token that fills short sequences up; nothing attends to it. `None` if there is none.
        init_std: standard deviation of the initial kernels and embeddings before they are truncated.
        dropout: rate after the embeddings and after each sublayer.
        dtype: dtype of the computation; softmax and logits are always in float32.
        param_dtype: dtype of the parameters.

    Raises:
        ConfigError: sizes that are not positive or do not divide, or a padding token outside the vocabulary.
    """

    d_model: int = 768
    n_layers: int = 12
    n_heads: int | None = None
    head_dim: int | None = 64
    ff_ratio: int = 4
    vocab_size: int = 30522
    max_len: int = 512
    n_types: int = 2
    pad: int | None = 0
    init_std: float = 0.02
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        require_positive(self, "d_model", "n_layers", "ff_ratio", "vocab_size", "max_len")
        require_positive(self, "n_heads", "head_dim")
        require_rate(self, "dropout")
        for name, expected in (("n_types", "0 or more"), ("init_std", "a number above 0")):
            number = getattr(self, name)
            if number < 0 or (name == "init_std" and not number):
                raise ConfigError(where=f"BertConfig.{name}", expected=expected, got=number)
        if self.pad is not None and not 0 <= self.pad < self.vocab_size:
            raise ConfigError(
                where="BertConfig.pad",
                expected=f"None or one of the {self.vocab_size} tokens",
                got=self.pad,
            )
        _ = self.heads

    @property
    def heads(self) -> tuple[int, int, int]:
        """Number of query heads, number of key and value heads, head size.

        >>> BertConfig(d_model=1024).heads
        (16, 16, 64)
        """
        n_heads, head_dim = split_heads(self)
        return n_heads, n_heads, head_dim

    @property
    def dtypes(self) -> dict[str, Any]:
        """Keyword arguments that all layers share."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    @property
    def kernel_init(self) -> nn.initializers.Initializer:
        """Initial values of kernels and embeddings."""
        return nn.initializers.truncated_normal(self.init_std)


class BertBlock(nn.Module):
    """Attention and feed-forward, each added to the residual stream, which is then normalised."""

    config: BertConfig
    train: bool

    @nn.compact
    def __call__(self, x_BxTxD: Float[Array, "B T D"], mask: Bool[Array, "#B #T T"]) -> Float[Array, "B T D"]:
        cfg = self.config
        options: dict[str, Any] = {"use_bias": True, "kernel_init": cfg.kernel_init, **cfg.dtypes}
        dropout = nn.Dropout(cfg.dropout, deterministic=not self.train)

        y_BxTxD = Attention(cfg.heads, name="attention", **options)(x_BxTxD, mask)
        x_BxTxD = nn.LayerNorm(name="attention_norm", **cfg.dtypes)(x_BxTxD + dropout(y_BxTxD))
        y_BxTxD = FeedForward(cfg.ff_ratio * cfg.d_model, name="ff", **options)(x_BxTxD)
        return nn.LayerNorm(name="ff_norm", **cfg.dtypes)(x_BxTxD + dropout(y_BxTxD))


class Bert(nn.Module):
    """Masked language model: logits of the token at every position, from the tokens around it.

    The head is a projection, GELU and layer norm, then a product with the token embedding and a bias.

    >>> import jax
    >>> model = Bert(BertConfig(d_model=16, n_layers=1, head_dim=8, vocab_size=11))
    >>> logits_BxTxV, variables = model.init_with_output(jax.random.key(0), jnp.ones((2, 5), jnp.int32))
    >>> logits_BxTxV.shape
    (2, 5, 11)
    >>> sorted(variables["params"])[:4]
    ['block_0', 'embedding_norm', 'head', 'head_bias']
    """

    config: BertConfig

    @nn.compact
    def __call__(
        self,
        tokens_BxT: Int[Array, "B T"],
        types_BxT: Int[Array, "B T"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "B T V"]:
        """Runs the model.

        Args:
            tokens_BxT: token indices, some of them replaced; at least one of each row not the padding.
            types_BxT: the kind of each token; `None` for kind 0 everywhere.
            train: apply dropout; needs `rngs={"dropout": key}` if the rate is not zero.

        Raises:
            ConfigError: the sequence is longer than `max_len`, or the model has no kinds and gets some.
        """
        cfg = self.config
        T = tokens_BxT.shape[1]
        require_length("Bert", cfg.max_len, T)
        if types_BxT is not None and not cfg.n_types:
            raise ConfigError(
                where="Bert",
                expected="no kinds of tokens, n_types being 0",
                got="types_BxT",
                remedy="leave them out or raise BertConfig.n_types",
            )

        def embedding(size: int, name: str) -> nn.Embed:
            return nn.Embed(size, cfg.d_model, embedding_init=cfg.kernel_init, name=name, **cfg.dtypes)

        token_embedding = embedding(cfg.vocab_size, "token_embedding")
        x_BxTxD = token_embedding(tokens_BxT)
        x_BxTxD += embedding(cfg.max_len, "position_embedding")(jnp.arange(T)[None])
        if cfg.n_types:
            types_BxT = jnp.zeros_like(tokens_BxT) if types_BxT is None else types_BxT
            x_BxTxD += embedding(cfg.n_types, "type_embedding")(types_BxT)
        x_BxTxD = nn.LayerNorm(name="embedding_norm", **cfg.dtypes)(x_BxTxD)
        x_BxTxD = nn.Dropout(cfg.dropout, deterministic=not train)(x_BxTxD)

        # One row for all queries: which tokens are there.
        mask_Bx1xT = jnp.ones_like(tokens_BxT, bool) if cfg.pad is None else tokens_BxT != cfg.pad
        mask_Bx1xT = mask_Bx1xT[:, None]
        for i in range(cfg.n_layers):
            x_BxTxD = BertBlock(cfg, train, name=f"block_{i}")(x_BxTxD, mask_Bx1xT)

        head = nn.Dense(cfg.d_model, kernel_init=cfg.kernel_init, name="head", **cfg.dtypes)
        x_BxTxD = nn.LayerNorm(name="head_norm", **cfg.dtypes)(nn.gelu(head(x_BxTxD)))
        bias_V = self.param("head_bias", nn.initializers.zeros_init(), (cfg.vocab_size,), cfg.param_dtype)
        logits_BxTxV = token_embedding.attend(x_BxTxD).astype(jnp.float32)
        return logits_BxTxV + bias_V.astype(jnp.float32)[None, None]
