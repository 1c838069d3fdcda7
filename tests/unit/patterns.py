"""Ways in which a model's program holds a factor that depends on width, each with its µP twin by hand.

A pattern is written once, as a user would write it, with slots for the constants that someone who knows
µP would add: `Hand`. With all constants 1 the slots leave no trace in the program, and that is the model
that mujax sees. With the constants of the table it is the same model in µP, written by hand.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn, nnx

BASE, WIDTH = 8, 24
R = WIDTH / BASE
S = R**0.5

LENGTH, HEADS = 6, 2


@dataclasses.dataclass(frozen=True)
class Hand:
    """The constants that µP by hand adds to a model.

    Attributes:
        attention: on the attention logits.
        scale: on what a constant of the model blows up or shrinks with width.
        readout: on the product of the readout.
    """

    attention: float = 1.0
    scale: float = 1.0
    readout: float = 1.0


PLAIN = Hand()


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A model, the factors that µP by hand adds to it, and the expected findings.

    Attributes:
        build: width and constants -> a Linen module or an NNX factory.
        inputs: what it is called on.
        hand: the constants at width `WIDTH` over `BASE`.
        corrections: (kind, factor) of each, in any order.
    """

    build: Callable[[int, Hand], Any]
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    hand: Hand
    corrections: tuple[tuple[str, float], ...]


class Model(nn.Module):
    """A compact module whose body is a function."""

    width: int
    body: Callable[..., Any]
    hand: Hand = PLAIN

    @nn.compact
    def __call__(self, *inputs):
        return self.body(self, self.width, self.hand, *inputs)


def times(x, factor: float):
    """`x * factor`, and no trace of it for 1."""
    return x if factor == 1.0 else x * factor


PATTERNS: dict[str, Pattern] = {}

ATTENTION = ("attention", 1 / S)
READOUT = ("readout", 1 / R)
TIED = ("tied_readout", 1 / R)
FLOATS = (jax.ShapeDtypeStruct((2, LENGTH, 7), jnp.float32),)
TOKENS = (jax.ShapeDtypeStruct((2, LENGTH), jnp.int32),)

_lecun = nn.initializers.lecun_normal()
_normal = nn.initializers.normal(1.0)
_small = nn.initializers.normal(0.1)


def model(
    *corrections: tuple[str, float], inputs: tuple[jax.ShapeDtypeStruct, ...] = FLOATS, **hand: float
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enters a Linen body `(self, width, hand, *inputs)` in the table."""

    def enter(body: Callable[..., Any]) -> Callable[..., Any]:
        PATTERNS[body.__name__.lstrip("_")] = Pattern(
            lambda width, constants: Model(width, body, constants), inputs, Hand(**hand), corrections
        )
        return body

    return enter


# ---- attention: `core(q, k, v, attention)` on heads of a size that grows -----------------------------


def _attending(self, w, hand, x, *, core, heads, size):
    shape = (heads(w), size(w))
    q, k, v = (nn.DenseGeneral(shape, use_bias=False, name=name)(x) for name in ("q", "k", "v"))
    out = nn.DenseGeneral(3, axis=(-2, -1), use_bias=False, name="out")
    return times(out(core(q, k, v, hand.attention)), hand.readout)


def attention(
    *corrections: tuple[str, float],
    heads: Callable[[int], int] = lambda w: HEADS,
    size: Callable[[int], int] = lambda w: w // HEADS,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enters an attention core in the table, with what it gets besides the readout's factor."""
    out = 1 / (heads(WIDTH) * size(WIDTH) / (heads(BASE) * size(BASE)))
    hand = Hand(attention=corrections[0][1] if corrections else 1.0, readout=out)

    def enter(core: Callable[..., Any]) -> Callable[..., Any]:
        body = functools.partial(_attending, core=core, heads=heads, size=size)
        PATTERNS[core.__name__.lstrip("_")] = Pattern(
            lambda width, constants: Model(width, body, constants),
            FLOATS,
            hand,
            (*corrections, ("readout", out)),
        )
        return core

    return enter


def mix(logits, v):
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), v)


def scores(q, k):
    return jnp.einsum("bqhd,bkhd->bhqk", q, k)


CAUSAL = np.tril(np.ones((LENGTH, LENGTH), bool))


@attention(ATTENTION)
def _sqrt_of_constant(q, k, v, a):
    return mix(times(scores(q, k), a) / jnp.sqrt(q.shape[-1]), v)


@attention(ATTENTION)
def _python_float(q, k, v, a):
    return mix(times(scores(q, k), a) * q.shape[-1] ** -0.5, v)


@attention(ATTENTION)
def _numpy_scalar(q, k, v, a):
    return mix(times(scores(q, k), a) / np.sqrt(q.shape[-1]).astype(q.dtype), v)


@attention(ATTENTION)
def _rsqrt_of_array(q, k, v, a):
    return mix(times(scores(q, k), a) * jax.lax.rsqrt(jnp.full((1, 1, 1, 1), q.shape[-1], q.dtype)), v)


@attention(ATTENTION)
def _on_query(q, k, v, a):
    return mix(times(scores(q * q.shape[-1] ** -0.5, k), a), v)


@attention(ATTENTION)
def _on_key(q, k, v, a):
    return mix(times(scores(q, k / jnp.sqrt(k.shape[-1])), a), v)


@attention(ATTENTION)
def _on_both(q, k, v, a):
    scale = q.shape[-1] ** -0.25
    return mix(times(scores(q * scale, k * scale), a), v)


@attention(ATTENTION)
def _on_query_and_logits(q, k, v, a):
    return mix(times(scores(q * q.shape[-1] ** -0.2, k), a) * q.shape[-1] ** -0.3, v)


@attention(ATTENTION)
def _folded(q, k, v, a):
    """Temperature, a change of base and a length that grows, in one constant and beside it."""
    d = q.shape[-1]
    q = q * (0.7 * np.log2(np.e) * d**-1.5)
    return mix(times(scores(q, k), a) * d * np.log(2.0), v)


@attention(ATTENTION)
def _mask_after_scale(q, k, v, a):
    logits = times(scores(q, k), a) / jnp.sqrt(q.shape[-1])
    return mix(jnp.where(CAUSAL, logits, jnp.finfo(logits.dtype).min), v)


@attention(ATTENTION)
def _mask_before_scale(q, k, v, a):
    logits = jnp.where(CAUSAL, times(scores(q, k), a), -1e9)
    return mix(logits / q.shape[-1] ** 0.5, v)


@attention(ATTENTION)
def _additive_mask(q, k, v, a):
    return mix(times(scores(q, k), a) * q.shape[-1] ** -0.5 + jnp.where(CAUSAL, 0.0, -1e9), v)


@attention(ATTENTION)
def _soft_cap(q, k, v, a):
    logits = times(scores(q, k), a) / jnp.sqrt(q.shape[-1])
    logits = 5.0 * jnp.tanh(logits / 5.0)
    return mix(jnp.where(CAUSAL, logits, -jnp.inf), v)


def _rotate(x):
    length, half = x.shape[1], x.shape[-1] // 2
    angle = np.arange(length)[:, None] * 10000.0 ** -(np.arange(half) / half)
    cos, sin = (jnp.asarray(f(angle), x.dtype)[:, None] for f in (np.cos, np.sin))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


@attention(ATTENTION)
def _rope(q, k, v, a):
    return mix(times(scores(_rotate(q), _rotate(k)), a) / jnp.sqrt(q.shape[-1]), v)


@attention(ATTENTION)
def _rope_interleaved(q, k, v, a):
    def rotate(x):
        half = x.shape[-1] // 2
        frequency = 1.0 / 10000.0 ** (jnp.arange(half, dtype=x.dtype) / half)
        angle = jnp.outer(jnp.arange(x.shape[1], dtype=x.dtype), frequency)[:, None]
        even, odd = x[..., ::2], x[..., 1::2]
        turned = [even * jnp.cos(angle) - odd * jnp.sin(angle), odd * jnp.cos(angle) + even * jnp.sin(angle)]
        return jnp.stack(turned, axis=-1).reshape(x.shape)

    return mix(times(scores(rotate(q), rotate(k)), a) / jnp.sqrt(q.shape[-1]), v)


@attention(ATTENTION)
def _query_key_rms_norm(q, k, v, a):
    def norm(x):
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)

    return mix(times(scores(norm(q), norm(k)), a) * q.shape[-1] ** -0.5, v)


@attention()
def _query_key_l2_norm(q, k, v, a):
    """Cosines are of order one at any width."""

    def norm(x):
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    return mix(10.0 * times(scores(norm(q), norm(k)), a), v)


@attention()
def _query_key_l2_norm_rsqrt(q, k, v, a):
    def norm(x):
        return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)

    return mix(10.0 * times(scores(norm(q), norm(k)), a), v)


@attention()
def _already_one_over_d(q, k, v, a):
    return mix(times(scores(q, k), a) / q.shape[-1], v)


@attention()
def _already_one_over_d_on_both(q, k, v, a):
    root = jnp.sqrt(q.shape[-1])
    return mix(times(scores(q / root, k / root), a), v)


@attention(heads=lambda w: w // 4, size=lambda w: 4)
def _only_heads_grow(q, k, v, a):
    return mix(times(scores(q, k), a) / jnp.sqrt(q.shape[-1]), v)


@attention(ATTENTION, heads=lambda w: w // 4, size=lambda w: w // 2)
def _heads_and_size_grow(q, k, v, a):
    return mix(times(scores(q, k), a) / jnp.sqrt(q.shape[-1]), v)


@attention(ATTENTION)
def _repeated_key_values(q, k, v, a):
    """Grouped queries: the keys and values of one head serve both."""
    k, v = (jnp.repeat(x[:, :, :1], HEADS, axis=2) for x in (k, v))
    return mix(times(scores(q, k), a) / jnp.sqrt(q.shape[-1]), v)


@attention(ATTENTION)
def _broadcast_key_values(q, k, v, a):
    k, v = (jnp.broadcast_to(x[:, :, :1], x.shape) for x in (k, v))
    return mix(times(scores(q, k), a) / jnp.sqrt(q.shape[-1]), v)


@attention(ATTENTION, heads=lambda w: 4, size=lambda w: w // 2)
def _grouped_key_values(q, k, v, a):
    batch, length, heads, size = q.shape
    k, v = k[:, :, :2], v[:, :, :2]
    q = q.reshape(batch, length, 2, heads // 2, size)
    logits = times(jnp.einsum("bqkgd,bskd->bkgqs", q, k), a) / jnp.sqrt(size)
    y = jnp.einsum("bkgqs,bskd->bqkgd", jax.nn.softmax(logits), v)
    return y.reshape(batch, length, heads, size)


@attention(ATTENTION)
def _multi_query(q, k, v, a):
    logits = times(jnp.einsum("bqhd,bsd->bhqs", q, k[:, :, 0]), a) * q.shape[-1] ** -0.5
    return jnp.einsum("bhqs,bsd->bqhd", jax.nn.softmax(logits), v[:, :, 0])


@attention(ATTENTION)
def _matmul(q, k, v, a):
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    logits = times(q @ k.swapaxes(-1, -2), a) / jnp.sqrt(q.shape[-1])
    return (jax.nn.softmax(logits) @ v).transpose(0, 2, 1, 3)


@attention(ATTENTION)
def _dot_general(q, k, v, a):
    logits = jax.lax.dot_general(q, k, (((3,), (3,)), ((0, 2), (0, 2))))
    return mix(times(logits, a) / jnp.sqrt(q.shape[-1]), v)


@attention(ATTENTION)
def _multiply_and_sum(q, k, v, a):
    logits = times((q[:, :, None] * k[:, None]).sum(-1), a) / jnp.sqrt(q.shape[-1])
    return mix(logits.transpose(0, 3, 1, 2), v)


@attention(ATTENTION)
def _scaled_multiply_and_sum(q, k, v, a):
    logits = jnp.sum(q[:, :, None] * q.shape[-1] ** -0.5 * k[:, None], axis=-1)
    return mix(times(logits, a).transpose(0, 3, 1, 2), v)


@attention(ATTENTION)
def _vmapped_dot(q, k, v, a):
    """One query, one key, three times mapped."""

    def score(query, key):
        return times(jnp.dot(query, key), a) / jnp.sqrt(query.shape[-1])

    over_keys = jax.vmap(score, in_axes=(None, 0))
    over_queries = jax.vmap(over_keys, in_axes=(0, None))
    over_heads = jax.vmap(over_queries, in_axes=(1, 1))
    return mix(jax.vmap(over_heads)(q, k), v)


@attention(ATTENTION)
def _softmax_by_hand(q, k, v, a):
    logits = times(scores(q, k), a) / jnp.sqrt(q.shape[-1])
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    weights = jnp.where(CAUSAL, weights, 0.0)
    return jnp.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)


@attention(ATTENTION)
def _sigmoid_attention(q, k, v, a):
    logits = times(scores(q, k), a) / jnp.sqrt(q.shape[-1]) - np.log(LENGTH)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.sigmoid(logits), v)


@attention(ATTENTION)
def _library(q, k, v, a):
    # JAX's own, whose scale is an argument: µP by hand gives it.
    d = q.shape[-1]
    return jax.nn.dot_product_attention(q, k, v, scale=None if a == 1.0 else a * d**-0.5, is_causal=True)


@attention(ATTENTION)
def _library_grouped(q, k, v, a):
    d = q.shape[-1]
    mask = jnp.asarray(CAUSAL)[None, None]
    bias = jnp.ones((1, HEADS, LENGTH, LENGTH), q.dtype)
    scale = None if a == 1.0 else a * d**-0.5
    return jax.nn.dot_product_attention(q, k[:, :, :1], v[:, :, :1], bias, mask, scale=scale)


@attention(ATTENTION)
def _flax_function(q, k, v, a):
    return nn.dot_product_attention(times(q, a), k, v)


@attention(ATTENTION)
def _in_jit(q, k, v, a):
    @jax.jit
    def inner(q, k, v):
        return mix(times(scores(q, k), a) / jnp.sqrt(q.shape[-1]), v)

    return inner(q, k, v)


@attention(ATTENTION)
def _scale_outside_jit(q, k, v, a):
    return mix(jax.jit(lambda q, k: times(scores(q, k), a))(q, k) / jnp.sqrt(q.shape[-1]), v)


@attention(ATTENTION)
def _in_checkpoint(q, k, v, a):
    policy = jax.checkpoint_policies.dots_saveable
    inner = jax.checkpoint(
        lambda q, k, v: mix(times(scores(q, k), a) / jnp.sqrt(q.shape[-1]), v), policy=policy
    )
    return inner(q, k, v)


@attention(ATTENTION)
def _in_vmap(q, k, v, a):
    def one(q, k, v):
        weights = jax.nn.softmax(times(jnp.einsum("qhd,khd->hqk", q, k), a) / jnp.sqrt(q.shape[-1]))
        return jnp.einsum("hqk,khd->qhd", weights, v)

    return jax.vmap(one)(q, k, v)


@attention(ATTENTION)
def _in_cond(q, k, v, a):
    def full(q, k, v):
        return mix(times(scores(q, k), a) / jnp.sqrt(q.shape[-1]), v)

    return jax.lax.cond(q.sum() > -1e9, full, lambda q, k, v: v, q, k, v)


@attention(ATTENTION, ATTENTION)
def _in_switch(q, k, v, a):
    def full(q, k, v):
        return mix(times(scores(q, k), a) / jnp.sqrt(q.shape[-1]), v)

    def causal(q, k, v):
        return mix(jnp.where(CAUSAL, times(scores(q, k), a) / jnp.sqrt(q.shape[-1]), -1e9), v)

    return jax.lax.switch(jnp.int32(q.sum() > -1e9), [full, causal], q, k, v)


@attention(ATTENTION)
def _in_custom_jvp(q, k, v, a):
    @jax.custom_jvp
    def score(q, k):
        return times(scores(q, k), a) / jnp.sqrt(q.shape[-1])

    score.defjvps(
        lambda t, out, q, k: times(scores(t, k), a) / jnp.sqrt(q.shape[-1]),
        lambda t, out, q, k: times(scores(q, t), a) / jnp.sqrt(q.shape[-1]),
    )
    return mix(score(q, k), v)


@attention(ATTENTION)
def _in_map(q, k, v, a):
    """One head after the other."""

    def head(qkv):
        q, k, v = qkv
        weights = jax.nn.softmax(times(jnp.einsum("bqd,bkd->bqk", q, k), a) / jnp.sqrt(q.shape[-1]))
        return jnp.einsum("bqk,bkd->bqd", weights, v)

    return jnp.moveaxis(jax.lax.map(head, tuple(jnp.moveaxis(x, 2, 0) for x in (q, k, v))), 0, 2)


@attention(ATTENTION)
def _in_scan_over_blocks(q, k, v, a):
    """Flash attention in plain JAX: a running maximum, sum and result over blocks of keys."""
    d, block = q.shape[-1], 2
    blocks = [x.reshape(x.shape[0], LENGTH // block, block, *x.shape[2:]).swapaxes(0, 1) for x in (k, v)]

    def step(carry, kv):
        top, total, out = carry
        logits = times(scores(q, kv[0]), a) / jnp.sqrt(d)
        new = jnp.maximum(top, logits.max(-1))
        weights, keep = jnp.exp(logits - new[..., None]), jnp.exp(top - new)
        out = out * keep[..., None] + jnp.einsum("bhqk,bkhd->bhqd", weights, kv[1])
        return (new, total * keep + weights.sum(-1), out), None

    shape = (q.shape[0], HEADS, LENGTH)
    start = (jnp.full(shape, -1e9, q.dtype), jnp.zeros(shape, q.dtype), jnp.zeros((*shape, d), q.dtype))
    (_, total, out), _ = jax.lax.scan(step, start, tuple(blocks))
    return (out / total[..., None]).swapaxes(1, 2)


@attention(ATTENTION)
def _in_fori_loop(q, k, v, a):
    def body(_, y):
        return y + mix(times(scores(q, k), a) / jnp.sqrt(q.shape[-1]), v)

    # A loop with known ends is a scan, and can be differentiated.
    return jax.lax.fori_loop(0, 2, body, jnp.zeros_like(v))


@attention(ATTENTION)
def _linear_attention_in_scan(q, k, v, a):
    """A state of (size, size) per head that grows by k v^T; the query reads it out."""
    q = q * q.shape[-1] ** -0.5

    def step(state, qkv):
        q, k, v = qkv
        state = 0.9 * state + k[..., None] * v[..., None, :]
        return state, times(jnp.einsum("bhd,bhde->bhe", q, state), a)

    state = jnp.zeros((q.shape[0], HEADS, q.shape[-1], q.shape[-1]), q.dtype)
    return jax.lax.scan(step, state, tuple(x.swapaxes(0, 1) for x in (q, k, v)))[1].swapaxes(0, 1)


@attention()
def _delta_rule(q, k, v, a):
    """DeltaNet: with keys and queries of norm 1 each product is of order one as it stands."""

    def step(state, qkv):
        q, k, v = qkv
        state = state + k[..., None] * (v - jnp.einsum("bhd,bhde->bhe", k, state))[..., None, :]
        return state, jnp.einsum("bhd,bhde->bhe", q, state)

    q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    state = jnp.zeros((q.shape[0], HEADS, q.shape[-1], q.shape[-1]), q.dtype)
    return jax.lax.scan(step, state, tuple(x.swapaxes(0, 1) for x in (q, k, v)))[1].swapaxes(0, 1)


@model(ATTENTION, READOUT, attention=1 / S, readout=1 / R)
def _learned_queries_and_mask(self, w, hand, x):
    """Queries that are a function of parameters, weights that are multiplied with a parameter."""
    latents = self.param("latents", _normal, (4, w))
    q, k, v = (nn.Dense(w, use_bias=False, name=name)(y) for name, y in (("q", latents), ("k", x), ("v", x)))
    logits = times(jnp.einsum("qd,bkd->bqk", q, k), hand.attention) / jnp.sqrt(w)
    y = (jax.nn.softmax(logits) * self.param("mask", nn.initializers.ones, (4, LENGTH))) @ v
    return times(nn.Dense(3, use_bias=False, name="out")(y), hand.readout)


@model(ATTENTION, READOUT, attention=1 / S, readout=1 / R)
def _fused_projection(self, w, hand, x):
    """One head, query, key and value out of one product."""
    x = nn.Dense(w, name="first")(x)
    q, k, v = jnp.split(nn.Dense(3 * w, use_bias=False, name="qkv")(x), 3, axis=-1)
    weights = jax.nn.softmax(times(q @ k.swapaxes(-1, -2), hand.attention) / jnp.sqrt(w))
    return times(nn.Dense(3, use_bias=False, name="out")(x + weights @ v), hand.readout)


class _Block(nn.Module):
    width: int
    hand: Hand

    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm()(x)
        shape = (HEADS, self.width // HEADS)
        q, k, v = (nn.DenseGeneral(shape, use_bias=False, name=name)(y) for name in ("q", "k", "v"))
        y = mix(times(scores(q, k), self.hand.attention) / jnp.sqrt(q.shape[-1]), v)
        return x + nn.DenseGeneral(self.width, axis=(-2, -1), name="o")(y), None


@model(ATTENTION, READOUT, attention=1 / S, readout=1 / R)
def _layers_in_scan_of_remat(self, w, hand, x):
    x = nn.Dense(w, name="first")(x)
    blocks = nn.scan(nn.remat(_Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
    x, _ = blocks(w, hand, name="blocks")(x, None)
    return times(nn.Dense(3, use_bias=False, name="out")(x), hand.readout)


@model(ATTENTION, READOUT, attention=1 / S, readout=1 / R)
def _members_in_vmap(self, w, hand, x):
    x = nn.Dense(w, name="first")(x)
    blocks = nn.vmap(
        _Block, in_axes=(None, None), variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=2
    )
    x, _ = blocks(w, hand, name="blocks")(x, None)
    return times(nn.Dense(3, use_bias=False, name="out")(x.sum(0)), hand.readout)


@model(ATTENTION, READOUT, attention=1 / S, readout=1 / R)
def _linen_attention(self, w, hand, x):
    x = nn.Dense(w, name="first")(x)
    attend = nn.dot_product_attention
    if hand.attention != 1.0:

        @functools.wraps(nn.dot_product_attention)
        def attend(q, k, v, **kwargs):
            return nn.dot_product_attention(q * hand.attention, k, v, **kwargs)

    layer = nn.MultiHeadDotProductAttention(HEADS, use_bias=False, attention_fn=attend)
    x = x + layer(x, mask=nn.make_causal_mask(x[..., 0]))
    return times(nn.Dense(3, use_bias=False, name="out")(x), hand.readout)


@model(ATTENTION, READOUT, attention=1 / S, readout=1 / R)
def _linen_attention_normalized(self, w, hand, x):
    """Flax's QK-norm is a LayerNorm: its products are of the size that they have without it."""
    x = nn.Dense(w, name="first")(x)
    attend = nn.dot_product_attention
    if hand.attention != 1.0:

        @functools.wraps(nn.dot_product_attention)
        def attend(q, k, v, **kwargs):
            return nn.dot_product_attention(q * hand.attention, k, v, **kwargs)

    layer = nn.MultiHeadDotProductAttention(HEADS, normalize_qk=True, use_bias=False, attention_fn=attend)
    x = x + layer(x)
    return times(nn.Dense(3, use_bias=False, name="out")(x), hand.readout)


class _NNXTransformer(nnx.Module):
    def __init__(self, w, hand, rngs):
        attend = nnx.dot_product_attention
        if hand.attention != 1.0:

            @functools.wraps(nnx.dot_product_attention)
            def attend(q, k, v, **kwargs):
                return nnx.dot_product_attention(q * hand.attention, k, v, **kwargs)

        self.hand = hand
        self.first = nnx.Linear(7, w, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            HEADS, w, use_bias=False, decode=False, attention_fn=attend, rngs=rngs
        )
        self.out = nnx.Linear(w, 3, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = self.first(x)
        return times(self.out(x + self.attention(x)), self.hand.readout)


PATTERNS["nnx_attention"] = Pattern(
    lambda width, hand: lambda rngs: _NNXTransformer(width, hand, rngs),
    FLOATS,
    Hand(attention=1 / S, readout=1 / R),
    (ATTENTION, READOUT),
)


# ---- tied embeddings -------------------------------------------------------------------------------

_tied = functools.partial(model, TIED, inputs=TOKENS, readout=1 / R)


def _trunk(w, x):
    return x + nn.Dense(w, name="hidden")(nn.gelu(nn.LayerNorm(name="norm")(x)))


@_tied()
def _attend(self, w, hand, tokens):
    embed = nn.Embed(11, w, name="embed")
    return times(embed.attend(_trunk(w, embed(tokens))), hand.readout)


@_tied()
def _table_transposed(self, w, hand, tokens):
    table = self.param("table", _normal, (11, w))
    return times(_trunk(w, table[tokens]) @ table.T, hand.readout)


@_tied()
def _table_in_einsum(self, w, hand, tokens):
    table = self.param("table", _normal, (11, w))
    return times(jnp.einsum("bld,vd->blv", _trunk(w, jnp.take(table, tokens, axis=0)), table), hand.readout)


@_tied()
def _table_as_kernel_of_dense(self, w, hand, tokens):
    embed = nn.Embed(11, w, name="embed")
    x = _trunk(w, embed(tokens))
    kernel = embed.variables["params"]["embedding"].T
    return times(nn.Dense(11, use_bias=False).apply({"params": {"kernel": kernel}}, x), hand.readout)


@_tied()
def _one_hot_lookup(self, w, hand, tokens):
    table = self.param("table", _normal, (11, w))
    x = _trunk(w, jax.nn.one_hot(tokens, 11, dtype=table.dtype) @ table)
    return times(x @ table.T, hand.readout)


@_tied()
def _logits_in_chunks(self, w, hand, tokens):
    """The readout inside of a map over positions, rematerialised."""
    table = self.param("table", _normal, (11, w))
    x = _trunk(w, table[tokens])
    chunk = jax.checkpoint(lambda h: times(h @ table.T, hand.readout))
    return jnp.moveaxis(jax.lax.map(chunk, jnp.moveaxis(x, 1, 0)), 0, 1)


class _NNXTied(nnx.Module):
    def __init__(self, w, hand, rngs):
        self.hand = hand
        self.embed = nnx.Embed(11, w, rngs=rngs)
        self.norm = nnx.LayerNorm(w, rngs=rngs)

    def __call__(self, tokens):
        return times(self.embed.attend(self.norm(self.embed(tokens))), self.hand.readout)


PATTERNS["nnx_attend"] = Pattern(
    lambda width, hand: lambda rngs: _NNXTied(width, hand, rngs),
    TOKENS,
    Hand(readout=1 / R),
    (TIED,),
)


# ---- other constants that depend on width ------------------------------------------------------------


@model(("scale", 1 / S), TIED, inputs=TOKENS, scale=1 / S, readout=1 / R)
def _gemma(self, w, hand, tokens):
    """The embedding times the root of the width; the readout use has no such factor."""
    embed = nn.Embed(11, w, name="embed")
    x = times(embed(tokens), hand.scale) * jnp.sqrt(w).astype(jnp.float32)
    x = _trunk(w, x)
    return times(embed.attend(nn.RMSNorm(name="last")(x)), hand.readout)


@model(("scale", 1 / S), READOUT, inputs=TOKENS, scale=1 / S, readout=1 / R)
def _original_transformer(self, w, hand, tokens):
    """Vaswani et al.: the embedding times sqrt(d), plus sines."""
    x = times(nn.Embed(11, w, name="embed")(tokens), hand.scale) * w**0.5
    angle = np.arange(LENGTH)[:, None] / 10000.0 ** (np.arange(w // 2) * 2 / w)
    x = x + jnp.asarray(np.concatenate([np.sin(angle), np.cos(angle)], axis=-1), x.dtype)
    return times(nn.Dense(11, use_bias=False, name="out")(_trunk(w, x)), hand.readout)


@model(("scale", S), READOUT, scale=S, readout=1 / R)
def _logits_over_root_of_width(self, w, hand, x):
    x = _trunk(w, nn.Dense(w, name="first")(x))
    return times(times(nn.Dense(3, use_bias=False, name="out")(x), hand.readout), hand.scale) / jnp.sqrt(w)


@model(("scale", S), TIED, inputs=TOKENS, scale=S, readout=1 / R)
def _tied_logits_over_root_of_width(self, w, hand, tokens):
    """T5's tied readout: x d^-1/2."""
    embed = nn.Embed(11, w, name="embed")
    x = times(_trunk(w, embed(tokens)), hand.scale) * w**-0.5
    return times(embed.attend(x), hand.readout)


@model(("scale", R), READOUT, scale=R, readout=1 / R)
def _readout_over_width(self, w, hand, x):
    """Someone's own 1/width: it is held, and the rule's takes its place."""
    x = _trunk(w, nn.Dense(w, name="first")(x))
    return times(times(nn.Dense(3, use_bias=False, name="out")(x), hand.readout), hand.scale) * (BASE / w)


def _ntk(self, w, hand, x, product):
    for name, fan_in, fan_out, factor in (
        ("first", 7, w, 1.0),
        ("second", w, w, hand.scale),
        ("third", w, w, hand.scale),
        ("out", w, 3, hand.scale),
    ):
        kernel = self.param(name, _normal, (fan_in, fan_out))
        x = times(product(x, kernel, fan_in**-0.5), factor)
        if name != "out":
            x = nn.relu(x + self.param(f"{name}_bias", _small, (fan_out,)))
    return times(x, hand.readout)


_ntk_model = functools.partial(model, *[("scale", S)] * 3, READOUT, scale=S, readout=1 / R)


@_ntk_model()
def _ntk_on_product(self, w, hand, x):
    return _ntk(self, w, hand, x, lambda x, kernel, scale: (x @ kernel) * scale)


@_ntk_model()
def _ntk_on_input(self, w, hand, x):
    return _ntk(self, w, hand, x, lambda x, kernel, scale: (x * scale) @ kernel)


@_ntk_model()
def _ntk_on_weight(self, w, hand, x):
    return _ntk(self, w, hand, x, lambda x, kernel, scale: x @ (kernel * scale))


@model(READOUT, readout=1 / R)
def _means_and_norms(self, w, hand, x):
    """Coherent sums over their length: nothing is changed."""
    x = nn.Dense(w, name="first")(x)
    x = nn.LayerNorm(name="layer_norm")(x)
    x = nn.RMSNorm(name="rms_norm")(nn.Dense(w, name="second")(x))
    x = x - x.sum(-1, keepdims=True) / w
    x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    x = x * w**0.5 / (1e-6 + jnp.linalg.norm(x, axis=-1, keepdims=True))
    x = nn.GroupNorm(2, name="group_norm")(x) + x.mean(-1, keepdims=True) + jnp.var(x, axis=-1, keepdims=True)
    return times(nn.Dense(3, use_bias=False, name="out")(x), hand.readout)


@model(READOUT, readout=1 / R)
def _unbiased_variance(self, w, hand, x):
    """A sum over n - 1 is a mean as far as width goes."""
    x = nn.Dense(w, name="first")(x)
    x = (x - x.mean(-1, keepdims=True)) / (x.std(-1, ddof=1, keepdims=True) + 1e-6)
    return times(nn.Dense(3, use_bias=False, name="out")(nn.relu(x)), hand.readout)


@model(READOUT, readout=1 / R)
def _convolution_by_fourier_transform(self, w, hand, x):
    """S4D: one kernel per channel, summed over a state that does not grow."""
    x = nn.Dense(w, name="first")(x)
    decay, c = self.param("decay", _normal, (w, 4)), self.param("c", _normal, (w, 4))
    time = jnp.arange(LENGTH, dtype=x.dtype)[:, None, None]
    kernel = jnp.sum(c * jnp.exp(-jnp.exp(decay) * time), axis=-1)
    spectrum = jnp.fft.rfft(kernel, n=2 * LENGTH, axis=0) * jnp.fft.rfft(x, n=2 * LENGTH, axis=1)
    y = nn.gelu(jnp.fft.irfft(spectrum, n=2 * LENGTH, axis=1)[:, :LENGTH])
    return times(nn.Dense(3, use_bias=False, name="out")(y), hand.readout)


@model(READOUT, readout=1 / R)
def _ragged_experts(self, w, hand, x):
    """Tokens in groups, each with an expert's kernel."""
    stacked, groups = nn.initializers.lecun_normal(batch_axis=0), jnp.array([5, 7], jnp.int32)
    x = nn.Dense(w, name="first")(x).reshape(-1, w)
    x = nn.relu(jax.lax.ragged_dot(x, self.param("up", stacked, (2, w, w)), groups))
    return times(jax.lax.ragged_dot(x, self.param("down", stacked, (2, w, 3)), groups), hand.readout)


@model()
def _mean_pool_over_features(self, w, hand, x):
    return nn.relu(nn.Dense(w, name="first")(x)).mean(-1)


@model(("readout", 1 / R), ("scale", S), readout=1 / S)
def _weight_norm(self, w, hand, x):
    """Entries of a normalised column are of the size of 1/sqrt(fan-in), whatever the init: another
    1/sqrt(fan-in) brings the readout to µP's 1/fan-in."""
    x = nn.relu(nn.WeightNorm(nn.Dense(w, name="first"), name="norm_first")(x))
    x = nn.relu(nn.WeightNorm(nn.Dense(w, name="second"), name="norm_second")(x))
    out = nn.WeightNorm(nn.Dense(3, use_bias=False, name="out"), name="norm_out")
    return times(out(x), hand.readout)


@model(("scale", 1 / S), READOUT, scale=1 / S, readout=1 / R)
def _weight_standardisation(self, w, hand, x):
    """Without a 1/sqrt(fan-in) the standardised kernel is too large; with one it is right."""
    x = nn.Dense(w, name="first")(x)
    kernel = self.param("second", _lecun, (w, w))
    kernel = (kernel - kernel.mean(0)) / (kernel.std(0) + 1e-5)
    x = nn.relu(times(x @ kernel, hand.scale))
    kernel = self.param("third", _lecun, (w, w))
    kernel = (kernel - kernel.mean(0)) / jnp.sqrt(kernel.var(0) * w + 1e-5)
    return times(nn.Dense(3, use_bias=False, name="out")(nn.relu(x @ kernel)), hand.readout)


def _unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


@model(("scale", S), ("scale", S), TIED, inputs=TOKENS, scale=S, readout=1 / S)
def _unit_norm_embeddings(self, w, hand, tokens):
    """Rows of norm 1: looked up they need sqrt(r), in the readout 1/sqrt(r)."""
    table = self.param("table", _small, (11, w))
    x = times(_unit(table)[tokens], hand.scale)
    return times(_trunk(w, x) @ _unit(table).T, hand.readout)


@model(("scale", S), ("scale", S), READOUT)
def _cosine_logits(self, w, hand, x):
    """A cosine is of order one at any width: the three factors cancel."""
    x = _trunk(w, nn.Dense(w, name="first")(x))
    classes = self.param("out", _small, (3, w))
    return 10.0 * _unit(x) @ _unit(classes).T
