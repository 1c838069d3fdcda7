"""Attention and feed-forward, shared by all Transformers here, in plain Flax Linen.

Shape suffixes: B batch, T query position, S key position, D model width, M width of what is attended to, N
query heads, K key and value heads, G query heads to one key and value head (N = K G), H head size, R
distance, F feed-forward width.

References:
    Vaswani et al., Attention Is All You Need, arXiv 1706.03762.
    Ainslie et al., GQA, arXiv 2305.13245.
    Shaw et al., Self-Attention with Relative Position Representations, arXiv 1803.02155.
    Huang et al., Music Transformer, arXiv 1809.04281: Shaw's logits without an array over query, key and
    head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

Initializer = Callable[..., Array]


def causal_mask(length: int) -> Bool[Array, "1 T T"]:
    """Which keys each query attends to: its own position and those before it."""
    return jnp.tril(jnp.ones((1, length, length), dtype=bool))


class Attention(nn.Module):
    """Attention, logits q·k / sqrt(head size), grouped when there are fewer keys than queries.

    With relative positions the logits are q·(k + e) / sqrt(head size), where `e` is a learned vector for the
    distance back from query to key, one table for all heads; the queries and keys must be the same positions.

    Attributes:
        heads: number of query heads, number of key and value heads, head size.
        use_bias: biases in the projections.
        kernel_init: initial values of the projections' kernels.
        max_distance: number of distances with a vector of their own; `None` for no relative positions.
        dtype: dtype of the computation; the softmax is always in float32.
        param_dtype: dtype of the parameters.
    """

    heads: tuple[int, int, int]
    use_bias: bool = False
    kernel_init: Initializer = nn.initializers.lecun_normal()
    max_distance: int | None = None
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x_BxTxD: Float[Array, "B T D"],
        mask_BxTxS: Bool[Array, "#B #T S"],
        memory_BxSxM: Float[Array, "B S M"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Runs the layer.

        Args:
            x_BxTxD: what asks.
            mask_BxTxS: which keys each query attends to, at least one.
            memory_BxSxM: what is attended to; `None` for `x_BxTxD` itself.
        """
        N, K, H = self.heads
        B, T, D = x_BxTxD.shape
        memory_BxSxM = x_BxTxD if memory_BxSxM is None else memory_BxSxM
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        options = {"use_bias": self.use_bias, "kernel_init": self.kernel_init, **dtypes}

        q_BxTxNxH = nn.DenseGeneral((N, H), name="query", **options)(x_BxTxD)
        k_BxSxKxH = nn.DenseGeneral((K, H), name="key", **options)(memory_BxSxM)
        v_BxSxKxH = nn.DenseGeneral((K, H), name="value", **options)(memory_BxSxM)

        q_BxTxKxGxH = q_BxTxNxH.reshape(B, T, K, N // K, H) / math.sqrt(H)
        logits_BxKxGxTxS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BxTxKxGxH, k_BxSxKxH)
        if self.max_distance is not None:
            distances = nn.Embed(self.max_distance, H, name="distance_embedding", **dtypes)
            # Farthest first, as `_by_key` wants it.
            e_RxH = distances(jnp.arange(T - 1, -1, -1))
            logits_BxKxGxTxS += _by_key(jnp.einsum("BTKGH,RH->BKGTR", q_BxTxKxGxH, e_RxH))
        mask_BxKxGxTxS = mask_BxTxS[:, None, None]
        weights_BxKxGxTxS = jax.nn.softmax(logits_BxKxGxTxS.astype(jnp.float32), where=mask_BxKxGxTxS)
        out_BxTxKxGxH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BxKxGxTxS.astype(self.dtype), v_BxSxKxH)

        out_BxTxNxH = out_BxTxKxGxH.reshape(B, T, N, H)
        return nn.DenseGeneral(D, axis=(-2, -1), name="out", **options)(out_BxTxNxH)


def _by_key(by_distance: Float[Array, "*B T T"]) -> Float[Array, "*B T T"]:
    """Moves logits by distance, farthest first, to their keys; entries after the query are of no use.

    Row t of the result is row t of the argument, moved left by T - 1 - t. One more column in front, and rows
    of the old length read from that, do it to all rows at once.
    """
    *batch, T, _ = by_distance.shape
    padded = jnp.pad(by_distance, [(0, 0)] * (len(batch) + 1) + [(1, 0)])
    return padded.reshape(*batch, T + 1, T)[..., 1:, :]


class FeedForward(nn.Module):
    """Two projections with an elementwise nonlinearity between.

    Attributes:
        width: units between the projections.
        activation: the nonlinearity.
        use_bias: biases in both projections.
        kernel_init: initial values of the kernels.
        dtype: dtype of the computation.
        param_dtype: dtype of the parameters.
    """

    width: int
    activation: Callable[[Array], Array] = nn.gelu
    use_bias: bool = False
    kernel_init: Initializer = nn.initializers.lecun_normal()
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x_BxTxD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        options: dict[str, Any] = {
            "use_bias": self.use_bias,
            "kernel_init": self.kernel_init,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        h_BxTxF = nn.Dense(self.width, name="up", **options)(x_BxTxD)
        return nn.Dense(x_BxTxD.shape[-1], name="down", **options)(self.activation(h_BxTxF))
