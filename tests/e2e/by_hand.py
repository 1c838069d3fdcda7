"""GPT-2, BERT, Llama and ViT in µP, written by hand on plain arrays.

They read the parameters of Hugging Face's Flax modules and compute what these compute, with µP written where
the paper has it: attention logits divided by the head size (times the root of the base's, so that base and
target agree at the base), and the product with each weight of infinite fan-in and finite fan-out divided by
how much that fan-in grew.

Shapes: B batch, T positions, D model width, H heads, K key-value heads, G heads per key-value head, N head
size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Mup:
    """What the hand-written models take from the pair of base and target.

    Attributes:
        heads: number of heads of the target.
        head_size: head size of the target.
        base_head_size: head size of the base.
        r: width of the target over width of the base.
        eps: epsilon of the norms.
        key_value_heads: number of key-value heads of the target.
        r_key_value: how much of `r` a product takes that goes into the key-value heads: `r` where these
            are finite, else 1.
    """

    heads: int
    head_size: int
    base_head_size: int
    r: float
    eps: float
    key_value_heads: int = 0
    r_key_value: float = 1.0

    @property
    def attention_scale(self) -> float:
        """What multiplies the product of query and key."""
        return math.sqrt(self.base_head_size) / self.head_size


def layer_norm(x: Float[Array, "... D"], p: Params, eps: float) -> Float[Array, "... D"]:
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + eps) * p["scale"] + p["bias"]


def rms_norm(x: Float[Array, "... D"], p: Params, eps: float) -> Float[Array, "... D"]:
    return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + eps) * p["weight"]


def dense(x: Float[Array, "... n"], p: Params, divided_by: float = 1.0) -> Float[Array, "... m"]:
    y = x @ p["kernel"] / divided_by
    return y + p["bias"] if "bias" in p else y


def conv1d(x: Float[Array, "... n"], p: Params) -> Float[Array, "... m"]:
    """GPT-2's projection, whose kernel is stored (out, in)."""
    return jnp.einsum("...n,mn->...m", x, p["kernel"]) + p["bias"]


def split_heads(x: Float[Array, "B T n"], heads: int) -> Float[Array, "B T H N"]:
    return x.reshape(*x.shape[:2], heads, -1)


def attention(
    query: Float[Array, "B T H N"],
    key: Float[Array, "B T K N"],
    value: Float[Array, "B T K N"],
    visible: Bool[Array, "B ..."],
    scale: float,
) -> Float[Array, "B T D"]:
    """Each key-value head serves a group of consecutive query heads."""
    batch, length, heads, size = query.shape
    grouped = query.reshape(batch, length, key.shape[2], heads // key.shape[2], size)
    logits = jnp.einsum("btkgn,bskn->bkgts", grouped, key) * scale
    logits = jnp.where(visible[:, None, None], logits, -jnp.inf)
    out = jnp.einsum("bkgts,bskn->btkgn", jax.nn.softmax(logits), value)
    return out.reshape(batch, length, heads * size)


def layers(p: Params) -> list[Params]:
    return [p[str(number)] for number in range(len(p))]


def causal(mask: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    length = mask.shape[-1]
    return jnp.tril(jnp.ones((length, length), bool)) & (mask[:, None] > 0)


def gpt2(
    params: Params, mup: Mup, ids: Int[Array, "B T"], mask: Int[Array, "B T"], positions: Int[Array, "B T"]
) -> Float[Array, "B T V"]:
    """Pre-LN decoder; the readout is the embedding where there is no `lm_head`."""
    p = params["transformer"]
    x = p["wte"]["embedding"][ids] + p["wpe"]["embedding"][positions]
    for layer in layers(p["h"]):
        qkv = conv1d(layer_norm(x, layer["ln_1"], mup.eps), layer["attn"]["c_attn"])
        query, key, value = (split_heads(part, mup.heads) for part in jnp.split(qkv, 3, axis=-1))
        x += conv1d(attention(query, key, value, causal(mask), mup.attention_scale), layer["attn"]["c_proj"])
        inner = conv1d(layer_norm(x, layer["ln_2"], mup.eps), layer["mlp"]["c_fc"])
        x += conv1d(jax.nn.gelu(inner, approximate=True), layer["mlp"]["c_proj"])
    readout = params["lm_head"]["kernel"] if "lm_head" in params else p["wte"]["embedding"].T
    return layer_norm(x, p["ln_f"], mup.eps) @ readout / mup.r


def bert(
    params: Params,
    mup: Mup,
    ids: Int[Array, "B T"],
    mask: Int[Array, "B T"],
    types: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    _: None,
) -> Float[Array, "B T V"]:
    """Post-LN encoder with the masked language model's head, tied to the word embedding."""
    p = params["bert"]["embeddings"]
    x = (
        p["word_embeddings"]["embedding"][ids]
        + p["position_embeddings"]["embedding"][positions]
        + p["token_type_embeddings"]["embedding"][types]
    )
    x = layer_norm(x, p["LayerNorm"], mup.eps)
    for layer in layers(params["bert"]["encoder"]["layer"]):
        own = layer["attention"]["self"]
        query, key, value = (
            split_heads(dense(x, own[name]), mup.heads) for name in ("query", "key", "value")
        )
        mixed = attention(query, key, value, mask[:, None] > 0, mup.attention_scale)
        out = layer["attention"]["output"]
        x = layer_norm(x + dense(mixed, out["dense"]), out["LayerNorm"], mup.eps)
        inner = jax.nn.gelu(dense(x, layer["intermediate"]["dense"]), approximate=False)
        out = layer["output"]
        x = layer_norm(x + dense(inner, out["dense"]), out["LayerNorm"], mup.eps)
    head = params["cls"]["predictions"]
    x = jax.nn.gelu(dense(x, head["transform"]["dense"]), approximate=False)
    x = layer_norm(x, head["transform"]["LayerNorm"], mup.eps)
    return x @ p["word_embeddings"]["embedding"].T / mup.r + head["bias"]


def rotate(
    x: Float[Array, "B T H N"], positions: Int[Array, "B T"], theta: float = 10_000.0
) -> Float[Array, "B T H N"]:
    """RoPE on the two halves of each head."""
    half = x.shape[-1] // 2
    frequency = theta ** (-np.arange(half) / half)
    angle = positions[..., None, None] * frequency.astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def llama(
    params: Params, mup: Mup, ids: Int[Array, "B T"], mask: Int[Array, "B T"], positions: Int[Array, "B T"]
) -> Float[Array, "B T V"]:
    """Pre-RMSNorm decoder with RoPE, grouped queries and SwiGLU."""
    p = params["model"]
    x = p["embed_tokens"]["embedding"][ids]
    for layer in layers(p["layers"]):
        own = layer["self_attn"]
        h = rms_norm(x, layer["input_layernorm"], mup.eps)
        query = split_heads(dense(h, own["q_proj"]), mup.heads)
        key = split_heads(dense(h, own["k_proj"], mup.r_key_value), mup.key_value_heads)
        value = split_heads(dense(h, own["v_proj"], mup.r_key_value), mup.key_value_heads)
        mixed = attention(
            rotate(query, positions), rotate(key, positions), value, causal(mask), mup.attention_scale
        )
        x += dense(mixed, own["o_proj"])
        h = rms_norm(x, layer["post_attention_layernorm"], mup.eps)
        gated = jax.nn.silu(dense(h, layer["mlp"]["gate_proj"])) * dense(h, layer["mlp"]["up_proj"])
        x += dense(gated, layer["mlp"]["down_proj"])
    return dense(rms_norm(x, p["norm"], mup.eps), params["lm_head"], mup.r)


def vit(params: Params, mup: Mup, pixels: Float[Array, "B h w c"]) -> Float[Array, "B V"]:
    """Pre-LN encoder over image patches; the classifier reads the class token."""
    p = params["vit"]["embeddings"]
    projection = p["patch_embeddings"]["projection"]
    batch, height, width, channels = pixels.shape
    size = projection["kernel"].shape[0]
    patches = pixels.reshape(batch, height // size, size, width // size, size, channels)
    x = jnp.einsum("bhiwjc,ijcd->bhwd", patches, projection["kernel"]) + projection["bias"]
    x = x.reshape(batch, -1, x.shape[-1])
    x = jnp.concatenate([jnp.broadcast_to(p["cls_token"], (batch, 1, x.shape[-1])), x], axis=1)
    x += p["position_embeddings"]
    visible = jnp.ones((batch, 1, x.shape[1]), bool)
    for layer in layers(params["vit"]["encoder"]["layer"]):
        own = layer["attention"]["attention"]
        h = layer_norm(x, layer["layernorm_before"], mup.eps)
        query, key, value = (
            split_heads(dense(h, own[name]), mup.heads) for name in ("query", "key", "value")
        )
        mixed = attention(query, key, value, visible, mup.attention_scale)
        x += dense(mixed, layer["attention"]["output"]["dense"])
        h = layer_norm(x, layer["layernorm_after"], mup.eps)
        inner = jax.nn.gelu(dense(h, layer["intermediate"]["dense"]), approximate=False)
        x += dense(inner, layer["output"]["dense"])
    return dense(layer_norm(x, params["vit"]["layernorm"], mup.eps)[:, 0], params["classifier"], mup.r)


def adam(gradient: np.ndarray, lr: float, eps: float) -> np.ndarray:
    """The first update of Adam: both moments, corrected for their bias, are those of this gradient."""
    return -lr * gradient / (np.abs(gradient) + eps)


def sgd(gradient: np.ndarray, lr: float) -> np.ndarray:
    """The first update of SGD."""
    return -lr * gradient
