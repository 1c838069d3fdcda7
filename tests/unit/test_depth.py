"""Depth: residual branches read off the program, and the factors of arXiv 2505.01618, Table 1, as numbers."""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

import mujax
from mujax import rules
from mujax.depth import find_branches
from mujax.frontend import frontend
from mujax.infshape import Parametrization, ParamSpec
from mujax.models.resnet import ResNet, ResNetConfig
from mujax.models.transformer import Transformer, TransformerConfig

X = jax.ShapeDtypeStruct((3, 7), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((2, 5), jnp.int32)
IMAGES = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)


# ---- where branches are found ----------------------------------------------------------------------------


class Net(nn.Module):
    """A stem to width 8, a body that is a function, a readout."""

    body: Callable[..., Any]
    width: int = 8

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width, name="stem")(x)
        return nn.Dense(2, name="readout")(self.body(self.width, x))


def dense(w, name):
    return nn.Dense(w, use_bias=False, name=name)


def mlp(w, x, name="f", **kwargs):
    """Norm, up, tanh, down: four parameters."""
    y = nn.LayerNorm(use_bias=False, name=f"{name}_norm")(x)
    y = jnp.tanh(nn.Dense(w, name=f"{name}_up")(y))
    return nn.Dense(w, use_bias=False, name=f"{name}_down", **kwargs)(y)


MLP = {"f_norm/scale", "f_up/kernel", "f_up/bias", "f_down/kernel"}
G = {path.replace("f_", "g_") for path in MLP}


def pre_norm(w, x):
    return x + mlp(w, x)


def reversed_order(w, x):
    return mlp(w, x) + x


def subtraction(w, x):
    return x - mlp(w, x)


def post_norm(w, x):
    for name in ("f", "g"):
        y = jnp.tanh(dense(w, f"{name}_up")(x))
        x = nn.LayerNorm(name=f"{name}_norm")(x + dense(w, f"{name}_down")(y))
    return x


def dropout(w, x):
    return x + nn.Dropout(0.5, deterministic=False)(mlp(w, x))


class Param(nn.Module):
    """A single parameter."""

    fill: Callable[..., Any]
    dims: tuple[int, ...]

    @nn.compact
    def __call__(self):
        return self.param("p", self.fill, self.dims)


def gain_and_bias(w, x):
    """LayerScale, and a bias on what is added."""
    gain, bias = (Param(nn.initializers.ones, (w,), name=name)() for name in ("gain", "bias"))
    return x + (gain * mlp(w, x) + bias)


def peri_norm(w, x):
    return x + nn.LayerNorm(name="peri")(mlp(w, x))


def gate(w, x):
    return x + mlp(w, x) * nn.sigmoid(dense(w, "gate")(x))


def weighted_sum(w, x):
    return 0.7 * x + 0.3 * mlp(w, x)


def parallel(w, x):
    """GPT-J's block, with one norm for both branches."""
    y = nn.LayerNorm(use_bias=False, name="f_norm")(x)
    return x + dense(w, "a")(jnp.tanh(y)) + dense(w, "b")(jnp.sin(y))


def parallel_bracketed(w, x):
    y = nn.LayerNorm(use_bias=False, name="f_norm")(x)
    return x + (dense(w, "a")(jnp.tanh(y)) + dense(w, "b")(jnp.sin(y)))


def one_after_the_other(w, x):
    x = x + mlp(w, x)
    return mlp(w, x, "g") + x


def in_remat_and_jit(w, x):
    return nn.remat(nn.jit(_PreNorm))(w, name="block")(x)


class _PreNorm(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        return x + mlp(self.width, x)


def in_custom_jvp_and_cond(w, x):
    y = lax.cond(x.sum() > 0, lambda y: y, lambda y: 2 * y, mlp(w, x))
    return jax.nn.relu(x + y)


def stochastic_depth(w, x):
    return jnp.where(x.sum() > 0, x, x + mlp(w, x))


def attention(w, x):
    y = nn.LayerNorm(use_bias=False, name="norm")(x)[None]
    q, k, v = (dense(w, name)(y) for name in "qkv")
    return x + dense(w, "o")(jax.nn.softmax(q @ k.mT / math.sqrt(w)) @ v)[0]


def experts(w, x):
    """A lookup of kernels, with a gate: the kernel that is picked is inside."""
    kernels = Param(nn.initializers.lecun_normal(batch_axis=0), (4, w, w), name="experts")()
    gates = nn.softmax(dense(4, "router")(x))
    return x + jnp.einsum("bd,bde->be", x, kernels[jnp.argmax(gates, -1)]) * gates.max(-1, keepdims=True)


def conditioned(w, x):
    """AdaLN: each branch has a modulation of its own, made from one trunk that is nobody's."""
    trunk = nn.silu(dense(w, "trunk")(jnp.cos(x[:, :3])))
    for name in ("f", "g"):
        shift = dense(w, f"{name}_shift")(trunk)
        x = x + dense(w, f"{name}_down")(jnp.tanh(x * shift))
    return x


def cross_attention(w, x):
    """What the decoder looks at stands outside of its branches, although nothing else reads it."""
    seen = jnp.tanh(dense(w, "encoder")(jnp.cos(x[:, :3])))
    for name in ("f", "g"):
        k, v = (dense(w, f"{name}_{one}")(seen) for one in "kv")
        x = x + jax.nn.softmax(dense(w, f"{name}_q")(x) @ k.T) @ v
    return x


def low_rank_inside(w, x):
    """A sum inside of a branch is that branch's own."""
    y = jnp.tanh(x)
    return x + jnp.tanh(dense(w, "full")(y) + dense(w, "b")(dense(2, "a")(y)))


def stage(w, x):
    """A projection shortcut."""
    y = nn.relu(dense(w, "f_up")(x))
    return nn.relu(dense(w, "shortcut")(x) + dense(w, "f_down")(y))


FOUND: dict[Callable[..., Any], list[set[str]]] = {
    pre_norm: [MLP],
    reversed_order: [MLP],
    subtraction: [MLP],
    post_norm: [{"f_up/kernel", "f_down/kernel"}, {"g_up/kernel", "g_down/kernel"}],
    dropout: [MLP],
    gate: [MLP | {"gate/kernel"}],
    gain_and_bias: [MLP | {"gain/p", "bias/p"}],
    peri_norm: [MLP | {"peri/scale", "peri/bias"}],
    experts: [{"router/kernel", "experts/p"}],
    weighted_sum: [MLP],
    parallel: [{"f_norm/scale", "a/kernel"}, {"f_norm/scale", "b/kernel"}],
    parallel_bracketed: [{"f_norm/scale", "a/kernel", "b/kernel"}],
    one_after_the_other: [MLP, G],
    in_remat_and_jit: [{f"block/{path}" for path in MLP}],
    in_custom_jvp_and_cond: [MLP],
    stochastic_depth: [MLP],
    attention: [{"norm/scale", *(f"{name}/kernel" for name in "qkvo")}],
    conditioned: [{f"{name}_{one}/kernel" for one in ("shift", "down")} for name in "fg"],
    cross_attention: [{f"{name}_{one}/kernel" for one in "qkv"} for name in "fg"],
    low_rank_inside: [{"full/kernel", "a/kernel", "b/kernel"}],
    stage: [{"f_up/kernel", "f_down/kernel"}],
}


def branches(model: Any, *inputs: Any, residual=(), **kwargs: Any):
    end = frontend(model)
    call = end.example(end.trace_init(inputs, kwargs).variables, inputs, kwargs)
    return find_branches(jax.make_jaxpr(call.function)(*call.leaves), call.params, residual)


@pytest.mark.parametrize("body", FOUND, ids=lambda body: body.__name__)
def test_branches_and_what_is_inside(body):
    found = branches(Net(body), X).found
    assert [branch.params for branch in found] == FOUND[body]


def paths(*names: str) -> set[str]:
    return {f"{name}/kernel" for name in names}


@pytest.mark.parametrize("pre_activation", [False, True])
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_the_shortcut_of_a_resnet_is_the_stream(block, pre_activation):
    config = ResNetConfig((2, 2), (8, 16), block=block, pre_activation=pre_activation)
    found = branches(ResNet(config), IMAGES, train=True)
    convolutions = range(2 if block == "basic" else 3)
    blocks = [f"stage_{stage}_block_{number}" for stage in range(2) for number in range(2)]
    assert [{path for path in branch.params if "conv" in path} for branch in found.found] == [
        paths(*(f"{name}/conv_{number}" for number in convolutions)) for name in blocks
    ]
    assert not found.stream


@pytest.mark.parametrize("options", [{}, {"scan_layers": True, "remat": True}, {"dropout": 0.1, "use_bias": True}])
def test_the_branches_of_a_transformer(options):
    config = TransformerConfig(16, 3, max_len=8, vocab_size=11, **options)
    found = branches(Transformer(config), TOKENS, train=True)
    assert found.count == 6
    scanned = "scan_layers" in options
    assert [branch.repeats for branch in found.found] == ([3] * 2 if scanned else [1] * 6)
    assert all(path.startswith("block") for path in found.params)
    outside = {"final_norm/scale", "readout/kernel", "position_embedding/embedding", "token_embedding/embedding"}
    assert not found.params & outside
    inside = {path for path in found.params if path.startswith("block_1" if not scanned else "block")}
    kinds = ("attention/query", "attention/out", "attention_norm", "ff_norm", "ff/up", "ff/down")
    assert all(any(kind in path for path in inside) for kind in kinds)
    assert set(found.layers) == (found.params if scanned else set())
    assert {where for branch in found.found for where in [branch.where.rpartition(":")[0]]} == {
        "mujax/models/transformer.py"
    }


def _feed_forward_only(w, x):
    """No addition that could be a branch's."""
    return jnp.tanh(dense(w, "f")(nn.LayerNorm()(x))) * 2 + 1


def _rotary(w, x):
    """A product with a constant is no product of a branch."""
    turn = jnp.asarray(np.eye(w)[::-1].copy())
    return dense(w, "f")(x * jnp.cos(x) + (x @ turn) * jnp.sin(x))


def _two_embeddings(w, x):
    return nn.Embed(5, w)(x[:, 0].astype(int)) + nn.Embed(5, w)(x[:, 1].astype(int))


def _long_short_term_memory(w, x):
    return nn.RNN(nn.OptimizedLSTMCell(w))(x[None])[0]


@pytest.mark.parametrize("body", [_feed_forward_only, _rotary, _two_embeddings, _long_short_term_memory])
def test_other_additions_are_none(body):
    assert not branches(Net(body), X).found


def _highway(w, x):
    keep = nn.sigmoid(dense(w, "gate")(x))
    return x * keep + mlp(w, x) * (1 - keep)


def _nested(w, x):
    return x + dense(w, "outer")(one_after_the_other(w, x))


def _two_projections(w, x):
    return dense(w, "a")(jnp.tanh(x)) + dense(w, "b")(jnp.sin(x))


def _low_rank(w, x):
    """LoRA: more products on one side, but neither is a shortcut."""
    return dense(w, "full")(x) + dense(w, "b")(dense(2, "a")(x))


def _gains_only(w, x):
    return x + jnp.tanh(Param(nn.initializers.ones, (w,), name="gain")() * x)


def _shared(w, x):
    f = nn.Dense(w, name="f")
    return x + f(jnp.tanh(f(x))) if w == 1 else jnp.tanh(f(x + f(jnp.tanh(x))))


AMBIGUOUS: dict[Callable[..., Any], str] = {
    _highway: "found a stream that is multiplied with another activation",
    _two_projections: "found products with parameters or between activations on both sides of the sum",
    _low_rank: "found products with parameters or between activations on both sides of the sum",
    _gains_only: "found parameters but no product on one side of the sum",
    _nested: "expected residual branches one after the other, found one whose inside has another",
    _shared: "f/bias: expected it to be used inside of residual branches or outside of them, found both",
}


@pytest.mark.parametrize("body", AMBIGUOUS, ids=lambda body: body.__name__)
def test_what_is_ambiguous_is_an_error(body):
    with pytest.raises(mujax.DepthError, match=AMBIGUOUS[body]) as caught:
        branches(Net(body), X)
    assert "test_depth.py:" in str(caught.value)
    assert "residual=[...]" in str(caught.value)
    assert "mujax.residual_branch(...)" in str(caught.value)


def _highway_marked(w, x):
    keep = nn.sigmoid(dense(w, "gate")(x))
    return x * keep + mujax.residual_branch(mlp(w, x) * (1 - keep))


def _nested_marked(w, x):
    return x + mujax.residual_branch(dense(w, "outer")(one_after_the_other(w, x)))


def _marked_before_a_norm(w, x):
    return x + nn.LayerNorm(name="peri")(mujax.residual_branch(mlp(w, x)))


def _gains_marked(w, x):
    return x + mujax.residual_branch(jnp.tanh(Param(nn.initializers.ones, (w,), name="gain")() * x))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (_highway_marked, MLP),
        (_nested_marked, MLP | G | {"outer/kernel"}),
        (_marked_before_a_norm, MLP | {"peri/scale", "peri/bias"}),
        (_gains_marked, {"gain/p"}),
    ],
)
def test_marks_settle_it(body, expected):
    (branch,) = branches(Net(body), X).found
    assert branch.params == expected


class Block(nn.Module):
    """A block whose branch is a module."""

    width: int

    @nn.compact
    def __call__(self, x):
        return x * nn.sigmoid(dense(self.width, "keep")(x)) + Inside(self.width, name="inside")(x)


class Inside(nn.Module):
    """The branch: the sum in it is its own."""

    width: int

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(name="norm")(x)
        return dense(self.width, "down")(y + dense(self.width, "up")(y))


def _modules(w, x):
    for number in range(2):
        x = Block(w, name=f"block_{number}")(x)
    return x


@pytest.mark.parametrize("residual", [["inside"], ["block_*/inside"], ["block_0/inside", "block_1/inside"]])
def test_branches_named_by_scope(residual):
    found = branches(Net(_modules), X, residual=residual).found
    inside = ("inside/norm/scale", "inside/norm/bias", "inside/up/kernel", "inside/down/kernel")
    assert [branch.params for branch in found] == [{f"block_{n}/{path}" for path in inside} for n in range(2)]


def test_branches_named_by_parameter():
    found = branches(Net(_highway), X, residual=["f_up/kernel"]).found
    assert [branch.params for branch in found] == [MLP]


@pytest.mark.parametrize(
    ("body", "residual", "text"),
    [
        (pre_norm, ["nothing/*"], "residual: expected globs .* but 'nothing/\\*' matches nothing"),
        (pre_norm, ["stem"], "residual: expected 'stem' to name what is inside of residual branches"),
        (
            lambda w, x: mujax.residual_branch(mlp(w, x)),
            [],
            "test_depth.py:.*: expected what mujax.residual_branch marks to be added to a stream",
        ),
    ],
)
def test_names_and_marks_of_nothing_are_errors(body, residual, text):
    with pytest.raises(mujax.DepthError, match=text):
        branches(Net(body), X, residual=residual)


def test_parameters_on_the_stream_are_told():
    assert set(branches(Net(post_norm), X).stream) == {"f_norm/scale", "f_norm/bias"}
    assert not branches(Net(one_after_the_other), X).stream
