"""One small Linen model for each way in which a parameter can meet the data.

`CASES` holds, per model, what mujax must read off it between width 8 and width 24: for each parameter
(role, fan-in axes, stack axes, factor on the initial values, Adam learning rate, SGD learning rate), and
the factors in the forward pass. The numbers follow from Table 8 of Tensor Programs V by hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

BASE, WIDTH = 8, 24
R = WIDTH / BASE
S = R**0.5

Row = tuple[str, tuple[int, ...], tuple[int, ...], float, float, float]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its inputs and what must be read off it."""

    body: Callable[..., Any]
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    params: dict[str, Row]
    corrections: tuple[tuple[str, float, str], ...]

    def build(self, width: int) -> nn.Module:
        """The model at one width."""
        return Model(width, self.body)


class Model(nn.Module):
    """A compact module whose body is a function."""

    width: int
    body: Callable[..., Any]

    @nn.compact
    def __call__(self, *inputs):
        return self.body(self, self.width, *inputs)


def _float(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _int(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def first(fan_in: tuple[int, ...] = (0,), stack: tuple[int, ...] = (), r: float = R) -> Row:
    """An input weight."""
    return ("input", fan_in, stack, 1.0, 1.0, r)


def vector(stack: tuple[int, ...] = (), r: float = R) -> Row:
    """A bias or a gain over an axis that grows."""
    return ("input", (), stack, 1.0, 1.0, r)


def hidden(
    fan_in: tuple[int, ...] = (0,), stack: tuple[int, ...] = (), init: float = 1.0, r: float = R
) -> Row:
    """A hidden weight whose own initialiser already follows its fan-in."""
    return ("hidden", fan_in, stack, init, 1 / r, 1.0)


def output(fan_in: tuple[int, ...] = (0,), stack: tuple[int, ...] = (), init: float = S, r: float = R) -> Row:
    """An output weight whose own initialiser is 1/sqrt(fan-in)."""
    return ("output", fan_in, stack, init, 1.0, r)


def finite(fan_in: tuple[int, ...] = (), stack: tuple[int, ...] = ()) -> Row:
    """A parameter that does not grow."""
    return ("finite", fan_in, stack, 1.0, 1.0, 1.0)


def readout(path: str, r: float = R) -> tuple[str, float, str]:
    """The factor of an untied readout."""
    return ("readout", 1 / r, path)


_lecun = nn.initializers.lecun_normal()
_normal = nn.initializers.normal(1.0)


def _mlp(self, w, x):
    x = nn.relu(nn.Dense(w, name="first")(x))
    x = nn.relu(nn.Dense(w, name="second")(x))
    return nn.Dense(10, name="out")(x)


def _dense_general(self, w, x):
    """Heads and head size both grow: the hidden kernel has four infinite axes."""
    heads, size = w // 4, w // 2
    x = nn.DenseGeneral((heads, size), name="first")(x)
    x = nn.DenseGeneral((heads, size), axis=(-2, -1), name="second")(x)
    return nn.DenseGeneral(5, axis=(-2, -1), name="out")(x)


def _conv(self, w, x):
    x = nn.Conv(w, (3, 3), name="first")(x)
    x = nn.Conv(w, (3, 3), name="second")(x)
    x = nn.Conv(w, (3, 3), feature_group_count=2, name="grouped")(x)
    x = nn.Conv(w, (3, 3), feature_group_count=w, name="depthwise")(x)
    x = nn.GroupNorm(2, name="group_norm")(x)
    x = nn.BatchNorm(use_running_average=False, name="batch_norm")(x)
    return nn.Dense(10, name="out")(nn.relu(x).mean((1, 2)))


def _norms(self, w, x):
    x = nn.Dense(w, use_bias=False, name="first")(x)
    x = nn.LayerNorm(name="layer_norm")(x)
    x = nn.RMSNorm(name="rms_norm")(x)
    return nn.Dense(3, use_bias=False, name="out")(x)


def _embed(self, w, tokens):
    position = self.param("position", _normal, (16, w))
    x = nn.Embed(11, w, name="embed")(tokens) + position[: tokens.shape[1]]
    return nn.Dense(11, name="out")(x)


def _attend(self, w, tokens):
    embed = nn.Embed(11, w, name="embed")
    x = nn.gelu(nn.Dense(w, name="hidden")(embed(tokens)))
    return embed.attend(x)


def _einsum(self, w, x):
    first = self.param("first", _normal, (w // 4, 4, 7))
    second = self.param("second", _normal, (w // 4, 4, w // 4, 4))
    last = self.param("out", _normal, (3, w // 4, 4))
    x = jnp.einsum("bi,hdi->bhd", x, first)
    x = jnp.einsum("bhd,hdke->bke", x, second)
    return jnp.einsum("bhd,ohd->bo", x, last)


def _fused_qkv(self, w, x):
    """Head size 4 stays: no width in the logits."""
    x = nn.Dense(w, name="first")(x)
    batch, length, _ = x.shape
    qkv = nn.Dense(3 * w, use_bias=False, name="qkv")(x).reshape(batch, length, 3, w // 4, 4)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    logits = jnp.einsum("bthd,bshd->bhts", q, k) / 2.0
    y = jnp.einsum("bhts,bshd->bthd", nn.softmax(logits), v).reshape(batch, length, w)
    return nn.Dense(3, name="out")(y)


def _split_kernel(self, w, x):
    """A kernel that is cut into three before the products."""
    x = nn.Dense(w, name="first")(x)
    parts = jnp.split(self.param("qkv", _lecun, (w, 3 * w)), 3, axis=1)
    return nn.Dense(3, name="out")(sum(x @ part for part in parts))


def _gqa(self, w, x):
    """Two key and value heads stay while the query heads grow: their kernels have a finite fan-out."""
    x = nn.Dense(w, name="first")(x)
    q = nn.DenseGeneral((w // 4, 4), use_bias=False, name="q")(x)
    k = nn.DenseGeneral((2, 4), use_bias=False, name="k")(x)
    v = nn.DenseGeneral((2, 4), use_bias=False, name="v")(x)
    y = jax.nn.dot_product_attention(q, k, v)
    return nn.Dense(3, name="out")(nn.DenseGeneral(w, axis=(-2, -1), use_bias=False, name="o")(y))


def _moe(self, w, x):
    """Dense, dispatched and looked-up experts; the router is an output weight."""
    experts, stacked = 4, nn.initializers.lecun_normal(batch_axis=0)
    x = nn.Dense(w, use_bias=False, name="first")(x)
    gates = nn.softmax(nn.Dense(experts, use_bias=False, name="router")(x))
    up = self.param("up", stacked, (experts, w, 2 * w))
    down = self.param("down", stacked, (experts, 2 * w, w))
    picked = self.param("picked", stacked, (experts, w, w))
    best = jnp.argmax(gates, -1)
    tokens = jnp.einsum("btd,bte->ebtd", x, jax.nn.one_hot(best, experts))
    y = jnp.einsum("ebtf,efd->ebtd", nn.gelu(jnp.einsum("ebtd,edf->ebtf", tokens, up)), down)
    y = jnp.einsum("bte,ebtd->btd", gates, y)
    y = y + jnp.einsum("btd,btdf->btf", x, picked[best])
    return nn.Dense(3, use_bias=False, name="out")(y)


class _Block(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, _):
        y = nn.Dense(2 * self.width, name="up")(nn.LayerNorm(name="norm")(x))
        return x + nn.Dense(self.width, name="down")(nn.gelu(y)), None


def _scan_remat(self, w, x):
    x = nn.Dense(w, use_bias=False, name="first")(x)
    blocks = nn.scan(nn.remat(_Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    x, _ = blocks(w, name="blocks")(x, None)
    return nn.Dense(3, use_bias=False, name="out")(x)


def _scan_last_axis(self, w, x):
    """The layer axis is the last one of each stacked parameter."""
    x = nn.Dense(w, use_bias=False, name="first")(x)
    blocks = nn.scan(_Block, variable_axes={"params": -1}, split_rngs={"params": True}, length=3)
    x, _ = blocks(w, name="blocks")(x, None)
    return nn.Dense(3, use_bias=False, name="out")(x)


def _layers_by_index(self, w, x):
    """A stack of kernels that Python code walks over."""
    x = nn.Dense(w, use_bias=False, name="first")(x)
    stack = self.param("stack", nn.initializers.lecun_normal(batch_axis=0), (3, w, w))
    bias = self.param("bias", nn.initializers.zeros, (3, w))
    for layer in range(3):
        x = nn.relu(x @ stack[layer] + bias[layer])
    return nn.Dense(3, use_bias=False, name="out")(x)


class _Member(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (3,), use_bias=False, name="first")(x)
        x = nn.Conv(self.width, (3,), use_bias=False, name="second")(x)
        return nn.Dense(2, use_bias=False, name="out")(nn.relu(x).mean(-2))


def _vmap_ensemble(self, w, x):
    members = nn.vmap(
        _Member,
        in_axes=None,
        out_axes=0,
        axis_size=3,
        variable_axes={"params": 0},
        split_rngs={"params": True},
    )
    return members(w, name="members")(x)


def _weight_norm(self, w, x):
    x = nn.relu(nn.WeightNorm(nn.Dense(w, name="first"), name="norm_first")(x))
    x = nn.relu(nn.WeightNorm(nn.Dense(w, name="second"), name="norm_second")(x))
    return nn.Dense(3, name="out")(x)


def _transposed(self, w, x):
    """Kernels stored (out, in), as PyTorch and FlaxGPT2 do."""
    init = nn.initializers.lecun_normal(in_axis=-1, out_axis=-2)
    x = nn.relu(x @ self.param("first", init, (w, 7)).T)
    x = nn.relu(jax.lax.dot_general(x, self.param("second", init, (2 * w, w)), (((1,), (1,)), ((), ()))))
    return x @ self.param("out", init, (3, 2 * w)).T


def _mixed_precision(self, w, x):
    """bfloat16 compute on float32 parameters, boxes with logical axes, dropout."""
    boxed = nn.with_partitioning(_lecun, ("embed", "mlp"))
    x = nn.Dense(w, dtype=jnp.bfloat16, kernel_init=boxed, name="first")(x)
    x = nn.Dropout(0.5, deterministic=False)(nn.relu(x))
    x = nn.Dense(w, dtype=jnp.bfloat16, kernel_init=boxed, name="second")(x)
    return nn.Dense(3, dtype=jnp.bfloat16, kernel_init=boxed, name="out")(x)


def _swiglu(self, w, x):
    """A feed-forward width that grows at another rate than the model's."""
    inner = (w - 8) * 4 + 8
    x = nn.Dense(w, use_bias=False, name="first")(x)
    gate = nn.silu(nn.Dense(inner, use_bias=False, name="gate")(x))
    x = nn.Dense(w, use_bias=False, name="down")(gate * nn.Dense(inner, use_bias=False, name="up")(x))
    return nn.Dense(3, use_bias=False, name="out")(x)


def _recurrent(self, w, x):
    """An LSTM joins its kernels before the product and starts from a zero state."""
    return nn.Dense(3, name="out")(nn.RNN(nn.OptimizedLSTMCell(w, name="cell"), name="rnn")(x))


def _latents(self, w, x):
    """Learned query vectors, and a readout written as multiply and sum."""
    x = nn.Dense(w, use_bias=False, name="first")(x)
    latents = jnp.broadcast_to(self.param("latents", _normal, (4, w)), (x.shape[0], 4, w))
    q = nn.Dense(4, use_bias=False, name="q")(latents)
    k = nn.Dense(4, use_bias=False, name="k")(x)
    y = nn.softmax(jnp.einsum("bqd,bkd->bqk", q, k)) @ x
    return (y * self.param("pool", nn.initializers.ones, (w,))).sum(-1)


def _low_rank(self, w, x):
    """A kernel made of two: one pair through a fixed rank, one through a rank that grows."""
    x = nn.Dense(w, use_bias=False, name="first")(x)
    x = x @ (self.param("a", _lecun, (w, w // 2)) @ self.param("b", _lecun, (w // 2, w)))
    return nn.Dense(3, use_bias=False, name="out")(x)


_OUT = {"out/kernel": output(), "out/bias": finite()}
_OUT_KERNEL = {"out/kernel": output()}
_FIRST = {"first/kernel": first(), "first/bias": vector()}
_FIRST_KERNEL = {"first/kernel": first()}
_READOUT = (readout("out/kernel"),)

CASES: dict[str, Case] = {
    "mlp": Case(
        _mlp, (_float(2, 7),), _FIRST | {"second/kernel": hidden(), "second/bias": vector()} | _OUT, _READOUT
    ),
    "dense_general": Case(
        _dense_general,
        (_float(2, 7),),
        {
            "first/kernel": first(r=R * R),
            "first/bias": vector(r=R * R),
            "second/kernel": hidden((0, 1), r=R * R),
            "second/bias": vector(r=R * R),
            "out/kernel": output((0, 1), init=R, r=R * R),
            "out/bias": finite(),
        },
        (readout("out/kernel", R * R),),
    ),
    "conv": Case(
        _conv,
        (_float(2, 6, 6, 3),),
        {
            "first/kernel": first((0, 1, 2)),
            "first/bias": vector(),
            "second/kernel": hidden((0, 1, 2)),
            "second/bias": vector(),
            "grouped/kernel": hidden((0, 1, 2)),
            "grouped/bias": vector(),
            "depthwise/kernel": first((0, 1, 2)),
            "depthwise/bias": vector(),
            "group_norm/scale": vector(),
            "group_norm/bias": vector(),
            "batch_norm/scale": vector(),
            "batch_norm/bias": vector(),
        }
        | _OUT,
        _READOUT,
    ),
    "norms": Case(
        _norms,
        (_float(2, 7),),
        _FIRST_KERNEL
        | {"layer_norm/scale": vector(), "layer_norm/bias": vector(), "rms_norm/scale": vector()}
        | _OUT_KERNEL,
        _READOUT,
    ),
    "embed": Case(
        _embed,
        (_int(2, 5),),
        # Embed's own initialiser divides by sqrt(features): the factor brings back the base's.
        {"embed/embedding": ("input", (0,), (), S, 1.0, R), "position": vector()} | _OUT,
        _READOUT,
    ),
    "attend": Case(
        _attend,
        (_int(2, 5),),
        {
            "embed/embedding": ("input", (0,), (), S, 1.0, R),
            "hidden/kernel": hidden(),
            "hidden/bias": vector(),
        },
        (("tied_readout", 1 / R, "embed/embedding"),),
    ),
    "einsum": Case(
        _einsum,
        (_float(2, 7),),
        {
            "first": first((2,)),
            "second": hidden((0, 1), init=1 / S),
            "out": output((1, 2), init=1.0),
        },
        (readout("out"),),
    ),
    "fused_qkv": Case(_fused_qkv, (_float(2, 5, 7),), _FIRST | {"qkv/kernel": hidden()} | _OUT, _READOUT),
    "split_kernel": Case(_split_kernel, (_float(2, 7),), _FIRST | {"qkv": hidden()} | _OUT, _READOUT),
    "gqa": Case(
        _gqa,
        (_float(2, 5, 7),),
        _FIRST
        | {"q/kernel": hidden(), "k/kernel": output(), "v/kernel": output(), "o/kernel": hidden((0, 1))}
        | _OUT,
        (readout("k/kernel"), readout("v/kernel"), readout("out/kernel")),
    ),
    "moe": Case(
        _moe,
        (_float(2, 5, 7),),
        _FIRST_KERNEL
        | {
            "router/kernel": output(),
            "up": hidden((1,), (0,)),
            "down": hidden((1,), (0,)),
            "picked": hidden((1,), (0,)),
        }
        | _OUT_KERNEL,
        (readout("router/kernel"), readout("out/kernel")),
    ),
    "scan_remat": Case(
        _scan_remat,
        (_float(2, 7),),
        _FIRST_KERNEL
        | {
            "blocks/norm/scale": vector((0,)),
            "blocks/norm/bias": vector((0,)),
            "blocks/up/kernel": hidden((1,), (0,)),
            "blocks/up/bias": vector((0,)),
            "blocks/down/kernel": hidden((1,), (0,)),
            "blocks/down/bias": vector((0,)),
        }
        | _OUT_KERNEL,
        _READOUT,
    ),
    "scan_last_axis": Case(
        _scan_last_axis,
        (_float(2, 7),),
        _FIRST_KERNEL
        | {
            "blocks/norm/scale": vector((1,)),
            "blocks/norm/bias": vector((1,)),
            "blocks/up/kernel": hidden((0,), (2,)),
            "blocks/up/bias": vector((1,)),
            "blocks/down/kernel": hidden((0,), (2,)),
            "blocks/down/bias": vector((1,)),
        }
        | _OUT_KERNEL,
        _READOUT,
    ),
    "layers_by_index": Case(
        _layers_by_index,
        (_float(2, 7),),
        _FIRST_KERNEL | {"stack": hidden((1,), (0,)), "bias": first((0,))} | _OUT_KERNEL,
        _READOUT,
    ),
    "vmap_ensemble": Case(
        _vmap_ensemble,
        (_float(2, 6, 7),),
        {
            # All members read the same input: the first product does not distinguish members from features.
            "members/first/kernel": first((1, 2)),
            "members/second/kernel": hidden((1, 2), (0,)),
            "members/out/kernel": output((1,), (0,)),
        },
        (readout("members/out/kernel"),),
    ),
    "weight_norm": Case(
        _weight_norm,
        (_float(2, 7),),
        _FIRST
        | {
            "second/kernel": hidden(),
            "second/bias": vector(),
            "norm_first/first/kernel/scale": vector(),
            "norm_second/second/kernel/scale": vector(),
        }
        | _OUT,
        _READOUT,
    ),
    "transposed": Case(
        _transposed,
        (_float(2, 7),),
        {"first": first((1,)), "second": hidden((1,)), "out": output((1,))},
        (readout("out"),),
    ),
    "mixed_precision": Case(
        _mixed_precision,
        (_float(2, 7),),
        _FIRST | {"second/kernel": hidden(), "second/bias": vector()} | _OUT,
        _READOUT,
    ),
    "swiglu": Case(
        _swiglu,
        (_float(2, 7),),
        _FIRST_KERNEL
        | {
            # 8 -> 24 in the stream, 8 -> 72 inside: r_in and r_out differ.
            "gate/kernel": ("hidden", (0,), (), 1.0, 1 / 3, 3.0),
            "up/kernel": ("hidden", (0,), (), 1.0, 1 / 3, 3.0),
            "down/kernel": ("hidden", (0,), (), 1.0, 1 / 9, 1 / 3),
        }
        | _OUT_KERNEL,
        _READOUT,
    ),
    "recurrent": Case(
        _recurrent,
        (_float(2, 5, 7),),
        {f"cell/h{gate}/kernel": hidden() for gate in "ifgo"}
        | {f"cell/h{gate}/bias": vector() for gate in "ifgo"}
        | {f"cell/i{gate}/kernel": first() for gate in "ifgo"}
        | _OUT,
        _READOUT,
    ),
    "latents": Case(
        _latents,
        (_float(2, 5, 7),),
        _FIRST_KERNEL
        | {
            "latents": vector(),
            "q/kernel": output(),
            "k/kernel": output(),
            "pool": output(init=1.0),
        },
        (readout("q/kernel"), readout("k/kernel"), readout("pool")),
    ),
    "low_rank": Case(
        _low_rank,
        (_float(2, 7),),
        _FIRST_KERNEL | {"a": hidden(), "b": hidden()} | _OUT_KERNEL,
        _READOUT,
    ),
}
