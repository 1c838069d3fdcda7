"""Depth: residual branches read off the program, and the factors of arXiv 2505.01618, Table 1, as numbers."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx
from jax import lax

import mujax
from mujax import rules
from mujax.core.depth import find_branches
from mujax.core.frontends import frontend
from mujax.core.trace import analyse
from mujax.models._resnet import ResNet, ResNetConfig
from mujax.models._transformer import Transformer, TransformerConfig
from mujax.spec import Parametrization, ParamSpec

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


def gated_by_a_number(w, x):
    """Flamingo's gate."""
    return x + jnp.tanh(Param(nn.initializers.zeros, (), name="gate")()) * mlp(w, x)


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


def embedded(w, x):
    """A lookup that only the branch and the stream read, in another dtype: no use inside of the branch."""
    x = nn.Embed(5, w, dtype=jnp.float16, name="embed")(x[:, 0].astype(int)).astype(jnp.float32)
    return x + mlp(w, x)


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
    gated_by_a_number: [MLP | {"gate/p"}],
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
    embedded: [MLP],
    stage: [{"f_up/kernel", "f_down/kernel"}],
}


def branches(model: Any, *inputs: Any, residual=(), **kwargs: Any):
    end = frontend(model)
    call = end.example(end.trace_init(inputs, kwargs).variables, inputs, kwargs)
    program = jax.make_jaxpr(call.function)(*call.leaves)
    return find_branches(analyse(program, program, call.params).flow, residual)


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


@pytest.mark.parametrize(
    "options", [{}, {"scan_layers": True, "remat": True}, {"dropout": 0.1, "use_bias": True}]
)
def test_the_branches_of_a_transformer(options):
    config = TransformerConfig(16, 3, max_len=8, vocab_size=11, **options)
    found = branches(Transformer(config), TOKENS, train=True)
    assert found.count == 6
    scanned = "scan_layers" in options
    assert [branch.repeats for branch in found.found] == ([3] * 2 if scanned else [1] * 6)
    assert all(path.startswith("block") for path in found.params)
    embeddings = {"position_embedding/embedding", "token_embedding/embedding"}
    assert not found.params & {"final_norm/scale", "readout/kernel", *embeddings}
    inside = {path for path in found.params if path.startswith("block_1" if not scanned else "block")}
    kinds = ("attention/query", "attention/out", "attention_norm", "ff_norm", "ff/up", "ff/down")
    assert all(any(kind in path for path in inside) for kind in kinds)
    assert set(found.layers) == (found.params if scanned else set())
    # Relative to the working directory or, installed, in full.
    files = {branch.where.rpartition(":")[0] for branch in found.found}
    assert all(file.endswith("mujax/models/_transformer.py") for file in files)


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


def _part_of_the_stream(w, x):
    return x.at[:, :4].add(dense(4, "f")(jnp.tanh(x)))


AMBIGUOUS: dict[Callable[..., Any], str] = {
    _part_of_the_stream: "got an addition to a part of an array",
    _highway: "got a stream that is multiplied with another activation",
    _two_projections: "got products with parameters or between activations on both sides of the sum",
    _low_rank: "got products with parameters or between activations on both sides of the sum",
    _gains_only: "got parameters but no product on one side of the sum",
    _nested: "expected residual branches one after the other, got one that contains another",
    _shared: "f/bias: expected it to be used inside of residual branches or outside of them, got both",
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
        (pre_norm, ["nothing/*"], "residual: expected globs .* got 'nothing/\\*', which matches nothing"),
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


# ---- Table 1 as numbers ----------------------------------------------------------------------------------

BASE, WIDTH, R = 8, 24, 3.0
SHALLOW, DEEP, M = 2, 8, 4.0


class LinenBlock(nn.Module):
    """A pre-norm block whose kernels start at 1/sqrt(fan-in)."""

    width: int

    @nn.compact
    def __call__(self, x, _=None):
        return x + mlp(self.width, x), None


class Linen(nn.Module):
    """Stem, blocks, norm, readout; the blocks in a scan over remat, or one after the other."""

    width: int
    layers: int
    scan: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width, name="stem")(x)
        if self.scan:
            blocks = nn.scan(
                nn.remat(LinenBlock),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.layers,
            )
            x, _ = blocks(self.width, name="block")(x)
        else:
            for number in range(self.layers):
                x, _ = LinenBlock(self.width, name=f"block_{number}")(x)
        x = nn.LayerNorm(use_bias=False, name="norm")(x)
        return nn.Dense(2, name="readout")(x)


class NNXBlock(nnx.Module):
    def __init__(self, width, rngs):
        self.f_norm = nnx.LayerNorm(width, use_bias=False, rngs=rngs)
        self.f_up = nnx.Linear(width, width, rngs=rngs)
        self.f_down = nnx.Linear(width, width, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.f_down(jnp.tanh(self.f_up(self.f_norm(x))))


class NNX(nnx.Module):
    """The same in NNX."""

    def __init__(self, width, layers, scan, rngs):
        self.stem = nnx.Linear(7, width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, use_bias=False, rngs=rngs)
        self.readout = nnx.Linear(width, 2, rngs=rngs)
        self.scan = scan
        if scan:
            make = nnx.split_rngs(splits=layers)(nnx.vmap(lambda rngs: NNXBlock(width, rngs)))
            self.block = make(rngs)
        else:
            self.blocks = nnx.List([NNXBlock(width, rngs) for _ in range(layers)])

    def __call__(self, x):
        x = self.stem(x)
        if self.scan:
            x = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.block)
        else:
            for block in self.blocks:
                x = block(x)
        return self.readout(self.norm(x))


def layer_norm(x, scale):
    x = x - x.mean(-1, keepdims=True)
    return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale


def functional(width: int, layers: int, by_hand: float = 1.0) -> mujax.Functional:
    """The same as pure functions over stacked parameters; `by_hand` multiplies each branch."""

    def init(key, x):
        keys = iter(jax.random.split(key, 4))

        def normal(*shape):
            return jax.random.normal(next(keys), shape) / math.sqrt(shape[-2])

        return {
            "stem": {"kernel": normal(7, width), "bias": jnp.zeros(width)},
            "block": {
                "f_norm": {"scale": jnp.ones((layers, width))},
                "f_up": {"kernel": normal(layers, width, width), "bias": jnp.zeros((layers, width))},
                "f_down": {"kernel": normal(layers, width, width)},
            },
            "norm": {"scale": jnp.ones(width)},
            "readout": {"kernel": normal(width, 2), "bias": jnp.zeros(2)},
        }

    def apply(params, x):
        def block(x, p):
            y = layer_norm(x, p["f_norm"]["scale"])
            y = jnp.tanh(y @ p["f_up"]["kernel"] + p["f_up"]["bias"]) @ p["f_down"]["kernel"]
            return x + (y if by_hand == 1.0 else by_hand * y), None

        x = x @ params["stem"]["kernel"] + params["stem"]["bias"]
        x, _ = lax.scan(block, x, params["block"])
        x = layer_norm(x, params["norm"]["scale"])
        return x @ params["readout"]["kernel"] + params["readout"]["bias"]

    return mujax.Functional(init, apply)


# Builder of width and layers, and whether the base has fewer layers.
BUILDERS: dict[str, tuple[Callable[[int, int], Any], bool]] = {
    "linen": (lambda width, layers: Linen(width, layers, scan=False), False),
    "linen_scan": (lambda width, layers: Linen(width, layers, scan=True), True),
    "nnx": (lambda width, layers: lambda rngs: NNX(width, layers, False, rngs), False),
    "nnx_scan": (lambda width, layers: lambda rngs: NNX(width, layers, True, rngs), True),
    "functional": (functional, True),
}


def wrap(name: str, alpha: float = 1.0, **kwargs: Any) -> mujax.MupModel:
    build, fewer = BUILDERS[name]
    kwargs = {"depth": "scan" if fewer else (SHALLOW, DEEP), "depth_alpha": alpha, "strict": True} | kwargs
    return mujax.mup_init(build(WIDTH, DEEP), build(BASE, SHALLOW if fewer else DEEP), X, **kwargs)


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.75])
@pytest.mark.parametrize("name", BUILDERS)
def test_factors_of_table_1(name, alpha):
    mup = wrap(name, alpha)
    hidden, branch, decay = 1 / R, M**-alpha, M ** (alpha - 1)
    adam, sgd = M ** (alpha - 1), M ** (2 * alpha - 1)
    # Per parameter: Adam's and SGD's learning rate, Adam's epsilon, learning rate times decay.
    expected = {
        "stem/kernel": (1, R, 1 / R, 1),
        "stem/bias": (1, R, 1 / R, 1),
        "f_norm/scale": (adam, R * sgd, branch / R, decay),
        "f_up/kernel": (hidden * adam, sgd, branch / R, decay),
        "f_up/bias": (adam, R * sgd, branch / R, decay),
        "f_down/kernel": (hidden * adam, sgd, branch / R, decay),
        "norm/scale": (1, R, 1 / R, 1),
        "readout/kernel": (1, R, 1 / R, 1),
        "readout/bias": (1, 1, 1, 1),
    }
    seen = set()
    for path, param in mup.spec.items():
        (kind,) = {max((k for k in expected if path.endswith(k)), key=len)}
        chosen = mup.spec.parametrization
        found = (
            rules.lr_factor(param, chosen, "adam"),
            rules.lr_factor(param, chosen, "sgd"),
            rules.gradient_scale(param, chosen),
            rules.decay_factor(param, chosen),
        )
        assert found == pytest.approx(expected[kind]), path
        own = mup.init_scales.get(path, 1.0)
        assert own == pytest.approx(R**0.5 if kind == "readout/kernel" else 1), path
        seen.add(kind)
    assert seen == set(expected)
    residual = [c.factor for c in mup.corrections if c.kind == "residual"]
    assert residual == pytest.approx([branch] * (1 if BUILDERS[name][1] else DEEP))
    assert [c.factor for c in mup.corrections if c.kind != "residual"] == pytest.approx([1 / R])


@pytest.mark.parametrize("family", rules.FAMILIES)
def test_every_family_moves_the_stream_alike(family):
    """m_L^-alpha times the size of an update is 1/m_L; SGD's update has the gradient's m_L^-alpha in it."""
    param = ParamSpec((4, 4), (4, 4), (0,), (1,), depth=M)
    for alpha in (0.5, 0.75, 1.0):
        chosen = Parametrization((("mup", 1.0),), alpha)
        gradient = rules.gradient_scale(param, chosen) if family == "sgd" else 1.0
        step = rules.lr_factor(param, chosen, family) * gradient
        assert rules.residual_factor(M, chosen) * step == pytest.approx(1 / M)


def test_optimizers_that_divide_by_a_norm_see_layers_one_by_one_or_all_at_once():
    """A layer's share of the norm of all falls with the root of their number; Muon's is each layer's own."""
    wide = {"infinite": (0, 1), "depth": M}
    one = mujax.ParamSpec((4, 4), (4, 4), (0,), (1,), **wide)
    wide = {"infinite": (1, 2), "layers": (0,), "depth": M}
    all_at_once = mujax.ParamSpec((8, 4, 4), (2, 4, 4), (1,), (2,), stack=(0,), **wide)
    assert one.role == all_at_once.role == "hidden"
    chosen = Parametrization((("mup", 1.0),), 1.0)
    for family, share in (
        ("normalized_gradient", M**0.5),
        ("normalized", 1.0),
        ("spectral", 1.0),
        ("adam", 1.0),
    ):
        found = rules.lr_factor(all_at_once, chosen, family)
        assert found == pytest.approx(share * rules.lr_factor(one, chosen, family))
    assert rules.norm_scale(all_at_once, chosen) == pytest.approx(M**0.5)
    spec = mujax.MupSpec({"one": one, "all": all_at_once}, chosen)
    tx = mujax.mup_scale_by_muon(spec)
    gradients = {"one": jnp.eye(4), "all": jnp.broadcast_to(jnp.eye(4), (8, 4, 4))}
    updates, _ = tx.update(gradients, tx.init(gradients), gradients)
    np.testing.assert_allclose(updates["all"], jnp.broadcast_to(updates["one"], (8, 4, 4)), rtol=1e-5)


def test_depth_is_a_share_of_the_parametrization():
    param = ParamSpec((4, 4), (4, 4), (0,), (1,), depth=M)
    half = Parametrization((("sp", 0.5), ("mup", 0.5)), 1.0)
    assert rules.residual_factor(M, half) == pytest.approx(M**-0.5)
    assert rules.gradient_scale(param, half) == pytest.approx(M**-0.5)
    assert wrap("functional", parametrization="sp").corrections == ()


@pytest.mark.parametrize("name", BUILDERS)
def test_layers_are_no_width(name):
    """With and without depth=; the axis of a scan is neither fan-in nor fan-out."""
    build, fewer = BUILDERS[name]
    mup = wrap(name)
    plain = mujax.mup_init(build(WIDTH, DEEP), build(BASE, SHALLOW if fewer else DEEP), X, strict=True)
    for path, param in plain.spec.items():
        stacked = fewer and "block" in path
        assert param.layers == ((0,) if stacked else ())
        assert 0 not in param.infinite or not stacked
        assert {param.r_in, param.r_out} <= {1.0, R}
        inside = "block" in path
        assert mup.spec[path].depth == (M if inside else 1.0)
        assert param.depth == 1.0
        assert dataclasses.replace(mup.spec[path], depth=1.0) == param


@pytest.mark.parametrize("layers", [DEEP, SHALLOW])
def test_a_scan_of_as_many_layers_in_the_base_is_the_same_model(layers):
    """Whether the base has fewer layers or is only declared to have: the factors are the same."""
    build, _ = BUILDERS["functional"]
    models = build(WIDTH, DEEP), build(BASE, layers)
    spec = mujax.mup_init(*models, X, depth=(SHALLOW, DEEP), strict=True).spec
    read_off = wrap("functional").spec
    for path, param in spec.items():
        assert param.r_layers == (M if "block" in path else 1)
        for family in rules.FAMILIES:
            chosen = spec.parametrization
            found, expected = (rules.lr_factor(one[path], chosen, family) for one in (spec, read_off))
            assert found == pytest.approx(expected)


@pytest.mark.parametrize("name", ["linen", "functional"])
def test_a_spec_with_depth_survives_json(name, tmp_path):
    spec = wrap(name, 0.5).spec
    spec.save(tmp_path / "spec.json")
    back = mujax.MupSpec.load(tmp_path / "spec.json")
    assert (back, hash(back)) == (spec, hash(spec))
    assert back.parametrization.depth_alpha == 0.5
    other = wrap(name, 1.0).spec
    assert other != spec
    assert str(other.parametrization) == "mup with depth alpha 1"


# ---- what it computes ------------------------------------------------------------------------------------


def examples(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=X.shape), dtype), jnp.asarray(rng.normal(size=(3, 2)), dtype)


def equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("name", ["linen", "linen_scan", "functional"])
def test_at_the_base_depth_nothing_changes(name):
    """To the last bit: with depth=(n, n) as without it, and at the base's width as the user's own model."""
    build, _ = BUILDERS[name]
    x, _ = examples()
    deep, plain = (
        mujax.mup_init(build(WIDTH, 2), build(BASE, 2), X, strict=True, **kwargs)
        for kwargs in ({"depth": (3, 3)}, {})
    )
    assert deep.corrections == plain.corrections
    assert dict(deep.spec) == dict(plain.spec)
    own = build(BASE, 2)
    same = mujax.mup_init(own, own, X, depth=(2, 2), delta=build(WIDTH, 2), strict=True)
    key = jax.random.key(0)
    variables, expected = jax.jit(lambda: (same.init(key, x), own.init(key, x)))()
    equal(variables, expected)
    equal(*jax.jit(lambda v: (same.apply(v, x), own.apply(v, x)))(variables))
    params = variables if name == "functional" else variables["params"]
    gradients = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params)
    ours, optaxs = mujax.mup_adamw(1e-2, same.spec, weight_decay=0.1), optax.adamw(1e-2, weight_decay=0.1)
    equal(*jax.jit(lambda: [tx.update(gradients, tx.init(params), params)[0] for tx in (ours, optaxs)])())


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_training_is_that_of_a_model_scaled_by_hand(alpha):
    """AdamW, five steps in float64, an epsilon and a decay that matter: the parameters agree to 1e-12."""
    rate, eps, decay = 3e-2, 1e-3, 0.3
    with jax.enable_x64(True):
        x, y = examples(jnp.float64)
        models = functional(BASE, DEEP), functional(BASE, SHALLOW)
        mup = mujax.mup_init(*models, x, depth="scan", depth_alpha=alpha)
        hand = functional(BASE, DEEP, M**-alpha)
        start = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), hand.init(jax.random.key(0), x))

        def group(inside: bool) -> optax.GradientTransformation:
            lr = rate * M ** (alpha - 1) if inside else rate
            return optax.adamw(lr, eps=eps * M**-alpha if inside else eps, weight_decay=decay)

        labels = {part: part == "block" for part in start}
        by_hand = optax.multi_transform({True: group(True), False: group(False)}, labels)
        ours = mujax.mup_adamw(rate, mup.spec, eps=eps, weight_decay=decay)

        def train(apply, tx):
            def step(state, _):
                params, rest = state
                grads = jax.grad(lambda params: jnp.square(apply(params, x) - y).mean())(params)
                updates, rest = tx.update(grads, rest, params)
                return (optax.apply_updates(params, updates), rest), None

            return jax.jit(lambda: lax.scan(step, (start, tx.init(start)), length=5)[0][0])()

        found, expected = train(mup.apply, ours), train(hand.apply, by_hand)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), found, expected)
        if alpha < 1:
            return
        # The negative twin: without depth the same model goes elsewhere.
        plain = train(functional(BASE, DEEP).apply, optax.adamw(rate, eps=eps, weight_decay=decay))
        gap = jax.tree.map(lambda a, b: np.abs(a - b).max(), plain, expected)
        assert min(jax.tree.leaves(gap["block"])) > 1e-3


SCALED: dict[str, Callable[..., Any]] = {
    "the branch's output has other uses": lambda w, x, s: (x + s(y := mlp(w, x))) * jnp.cos(y),
    "the stream has other uses": lambda w, x, s: (s(mlp(w, x)) + x) * jnp.cos(x),
    "a difference": lambda w, x, s: x - s(mlp(w, x)),
    "a difference, the stream taken away": lambda w, x, s: s(mlp(w, x)) - x,
    "two branches from one split": lambda w, x, s: x + s(mlp(w, x)) + s(mlp(w, x, "g")),
    "their sum": lambda w, x, s: x + s(mlp(w, x) + mlp(w, x, "g")),
    "in a condition": lambda w, x, s: lax.cond(
        x.sum() > 9, lambda x, y: x, lambda x, y: x + s(y), x, mlp(w, x)
    ),
    "inside of a jitted function": lambda w, x, s: jax.jit(lambda x, y: jnp.tanh(x + s(y)))(x, mlp(w, x)),
    "a sum that is a product's origin, too": lambda w, x, s: dense(w, "after")(x + s(mlp(w, x))),
}


@pytest.mark.parametrize("name", SCALED)
def test_only_what_goes_into_the_addition_is_multiplied(name):
    body, (x, _) = SCALED[name], examples()
    own = Net(lambda w, x: body(w, x, lambda y: y))
    mup = mujax.mup_init(own, own, X, depth=(1, 4), depth_alpha=0.5, strict=True)
    variables = own.init(jax.random.key(1), x)
    by_hand = Net(lambda w, x: body(w, x, lambda y: y / 2))
    with jax.default_matmul_precision("highest"):
        found, expected = mup.apply(variables, x), by_hand.apply(variables, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(expected - own.apply(variables, x)).max() > 1e-2


@pytest.mark.parametrize("name", ["linen_scan", "nnx_scan"])
def test_flax_under_a_scan_is_the_function_scaled_by_hand(name):
    """Outputs and gradients: the parameters of the three have the same paths."""
    build, _ = BUILDERS[name]
    x, _ = examples()
    mup = mujax.mup_init(
        build(BASE, DEEP), build(BASE, SHALLOW), X, depth="scan", depth_alpha=0.5, strict=True
    )
    variables = mup.init(jax.random.key(0), x)
    if name == "linen_scan":
        params = variables["params"]

        def ours(params):
            return mup.apply({"params": params}, x)
    else:
        graph, state = nnx.split(variables)
        params = nnx.to_pure_dict(state)

        def ours(params):
            of_params = jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(params))
            return mup.apply(nnx.merge(graph, of_params), x)

    hand = functools.partial(functional(BASE, DEEP, M**-0.5).apply, x=x)

    def loss(apply, params):
        out = apply(params)
        return jnp.square(out - 1).sum(), out

    with jax.default_matmul_precision("highest"):
        run = jax.jit(
            lambda p: [jax.value_and_grad(loss, 1, has_aux=True)(apply, p) for apply in (ours, hand)]
        )
        found, expected = run(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, expected)


def test_dropout_and_batch_statistics_go_on():
    """The factor comes after the dropout; other state is updated as without depth."""
    net, (x, _) = Net(dropout), examples()
    mup = mujax.mup_init(net, net, X, depth=(1, 4), depth_alpha=0.5)
    variables = net.init({"params": jax.random.key(1), "dropout": jax.random.key(2)}, x)
    by_hand = Net(lambda w, x: x + nn.Dropout(0.5, deterministic=False)(mlp(w, x)) / 2)
    rngs = {"dropout": jax.random.key(3)}
    expected = by_hand.apply(variables, x, rngs=rngs)
    np.testing.assert_allclose(mup.apply(variables, x, rngs=rngs), expected, rtol=1e-5, atol=1e-6)
    resnet = ResNet(ResNetConfig((1, 1), (8, 16)))
    wide = ResNet(ResNetConfig((1, 1), (16, 32)))
    images = jnp.cos(jnp.arange(2 * 8 * 8 * 3.0)).reshape(2, 8, 8, 3)
    mup = mujax.mup_init(wide, resnet, IMAGES, train=True, depth=(1, 4), strict=True)
    variables = jax.eval_shape(mup.init, jax.random.key(0), images)
    run = functools.partial(mup.apply, train=True, mutable=["batch_stats"])
    _, updated = jax.eval_shape(run, variables, images)
    assert jax.tree.structure(updated["batch_stats"]) == jax.tree.structure(variables["batch_stats"])
    assert [c.kind for c in mup.corrections] == ["residual", "residual", "readout"]


class Twice(nn.Module):
    """Methods that go through a branch, through none, and through another one."""

    def setup(self):
        self.stem = nn.Dense(8)
        self.block = LinenBlock(8)
        self.last = nn.Dense(8)

    def __call__(self, x):
        return self.last(self.block(self.stem(x))[0])

    def encode(self, x):
        return self.stem(x)

    def other(self, x):
        y = self.stem(x)
        return y + self.last(jnp.tanh(y))


def test_a_call_that_goes_through_no_branch():
    net, (x, _) = Twice(), examples()
    mup = mujax.mup_init(net, net, X, depth=(1, 4), strict=True)
    variables = net.init(jax.random.key(0), x)
    np.testing.assert_array_equal(
        mup.apply(variables, x, method="encode"), net.apply(variables, x, method="encode")
    )
    mup = mujax.mup_init(net, net, X, method="__call__", depth=(1, 4), residual=["f_down"], strict=True)
    np.testing.assert_array_equal(
        mup.apply(variables, x, method="encode"), net.apply(variables, x, method="encode")
    )


def test_a_call_with_other_branches_is_an_error():
    net, (x, _) = Twice(), examples()
    mup = mujax.mup_init(net, net, X, depth=(1, 4), strict=True)
    with pytest.raises(
        mujax.DepthError, match=r"last/\w+: expected it outside of residual branches as in the"
    ):
        mup.apply(net.init(jax.random.key(0), x), x, method="other")


# ---- a model with factors of its own ---------------------------------------------------------------------


def lecun(layers: int) -> Any:
    return nn.initializers.lecun_normal()


def scaled(factor: Callable[[int], float], init: Callable[[int], Any] = lecun):
    """Unrolled or scanned blocks x + factor(L) f(x)."""

    class OwnBlock(nn.Module):
        layers: int

        @nn.compact
        def __call__(self, x, _=None):
            y = nn.LayerNorm(name="norm")(x)
            y = jnp.tanh(nn.Dense(8, name="up")(y))
            y = nn.Dense(8, name="down", kernel_init=init(self.layers))(y)
            return x + factor(self.layers) * y, None

    class Own(nn.Module):
        layers: int
        scan: bool

        @nn.compact
        def __call__(self, x):
            x = nn.Dense(8, name="stem")(x)
            if not self.scan:
                for number in range(self.layers):
                    x, _ = OwnBlock(self.layers, name=f"block_{number}")(x)
                return x
            blocks = nn.scan(
                OwnBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers
            )
            return blocks(self.layers, name="block")(x)[0]

    return Own


OWN: dict[str, tuple[Callable[[int], float], str, str]] = {
    "sqrt": (lambda n: 1 / math.sqrt(n), "the power 0.5", r"1/sqrt\(L\) for 12 layers"),
    "linear": (lambda n: 1 / n, "the power 1", r"1/\(L\) for 12 layers"),
    "gpt2": (lambda n: 1 / math.sqrt(2 * n), "the power 0.5", r"1/sqrt\(2 L\) for 12 layers"),
    "relative": (lambda n: math.sqrt(3 / n), "the power 0.5", r"1/sqrt\(L / base L\) for 12 layers"),
}


@pytest.mark.parametrize("name", OWN)
def test_a_factor_that_differs_between_base_and_target_is_refused(name):
    factor, differs, _ = OWN[name]
    own = scaled(factor)
    text = (
        r"test_depth.py:\d+: expected a residual branch without a factor for depth, got one multiplied "
        rf"with .* in the base and .* in the target, which falls with {differs} of the depth; take it"
    )
    with pytest.raises(mujax.DepthError, match=text):
        mujax.mup_init(own(12, True), own(3, True), X, depth="scan")


@pytest.mark.parametrize("name", OWN)
def test_a_factor_that_is_a_power_of_the_depth_is_refused(name):
    factor, _, equal = OWN[name]
    own = scaled(factor)
    text = rf"test_depth.py:\d+: expected a residual branch without a factor for depth, .* which is {equal}"
    for scan in (False, True):
        with pytest.raises(mujax.DepthError, match=text):
            mujax.mup_init(own(12, scan), own(12, scan), X, depth=(3, 12))


def test_factors_that_are_no_matter_of_depth_are_left_alone():
    own = scaled(lambda n: 0.3)
    assert mujax.mup_init(own(12, True), own(3, True), X, depth="scan", strict=True).corrections
    # At the base's depth nothing is wrong with a factor of one's own.
    own = scaled(lambda n: 1 / n)
    assert not mujax.mup_init(own(4, False), own(4, False), X, depth=(4, 4), strict=True).corrections
    # A constant of some branches only: half a step of a feed-forward, as in the Conformer.
    net = Net(lambda w, x: (y := x + 0.5 * mlp(w, x)) + mlp(w, y, "g"))
    assert mujax.mup_init(net, net, X, depth=(1, 4), strict=True).corrections
    # Of a weighted sum both terms have it.
    net = Net(lambda w, x: 0.5 * x + 0.5 * mlp(w, x))
    assert mujax.mup_init(net, net, X, depth=(1, 4), strict=True).corrections


def test_a_factor_of_ones_own_can_take_the_place_of_mujaxs():
    """The learning rates then are those of Table 1, and the forward pass is the model's own."""
    own = scaled(OWN["relative"][0])
    mup = mujax.mup_init(own(12, True), own(3, True), X, depth="scan", corrections={"residual": False})
    assert mup.corrections == ()
    assert mup.spec["block/up/kernel"].depth == M


def test_what_scales_as_width_does_is_no_matter_of_depth():
    """Width and depth grow alike, and a constant of the branch falls with one of them: with the width."""
    wide, narrow = (Net(lambda w, x: x + mlp(w, x) * w**-0.5, width=width) for width in (32, 8))
    mup = mujax.mup_init(wide, narrow, X, depth=(2, 8), strict=True)
    assert sorted(c.kind for c in mup.corrections) == ["readout", "residual", "scale"]


def test_a_constant_inside_of_a_branch_that_scales_with_depth_is_refused():
    def build(width: int, layers: int) -> mujax.Functional:
        one = functional(width, layers)

        def apply(params, x):
            def block(x, p):
                y = layer_norm(x, p["f_norm"]["scale"]) / layers
                y = jnp.tanh(y @ p["f_up"]["kernel"] + p["f_up"]["bias"])
                return x + y @ p["f_down"]["kernel"], None

            x, _ = lax.scan(block, x @ params["stem"]["kernel"] + params["stem"]["bias"], params["block"])
            x = layer_norm(x, params["norm"]["scale"])
            return x @ params["readout"]["kernel"] + params["readout"]["bias"]

        return mujax.Functional(one.init, apply)

    text = "expected nothing inside of residual branches to scale with depth, got .* power 1 from base"
    with pytest.raises(mujax.DepthError, match=text):
        mujax.mup_init(build(8, 8), build(8, 2), X, depth="scan")


@pytest.mark.parametrize(
    ("scan", "base", "text"),
    [
        (True, 3, "block/down/kernel: .* a standard deviation that falls with its power 0.5 from base"),
        (False, 12, r"block_0/down/kernel: .* of block_0/up/kernel times 0.2041, which is 1/sqrt\(2 L\)"),
        (True, 12, r"block/down/kernel: .* of block/up/kernel times 0.2041, which is 1/sqrt\(2 L\)"),
    ],
)
def test_initial_values_scaled_by_depth_are_refused(scan, base, text):
    """GPT-2's: the last kernel of each branch over sqrt(2 L)."""

    def init(layers: int) -> Any:
        return nn.initializers.variance_scaling(0.5 / layers, "fan_in", "truncated_normal")

    own = scaled(lambda n: 1.0, init)
    with pytest.raises(mujax.DepthError, match=text):
        mujax.mup_init(own(12, scan), own(base, scan), X, depth=(3, 12))


# ---- options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"depth": (2,)}, mujax.ConfigError, "depth: expected two positive numbers of layers"),
        ({"depth": (0, 4)}, mujax.ConfigError, "depth: expected two positive numbers of layers"),
        ({"depth": (2, 4.0)}, mujax.ConfigError, "depth: expected two positive numbers of layers"),
        ({"depth": "deep"}, mujax.ConfigError, "depth: expected two positive numbers of layers"),
        ({"depth": (2, 4), "depth_alpha": 2.0}, mujax.ConfigError, "depth_alpha: expected .* 0.5 to 1"),
        ({"depth_alpha": 0.5}, mujax.ConfigError, "expected depth_alpha and residual together with depth="),
        ({"residual": ["f"]}, mujax.ConfigError, "expected depth_alpha and residual together with depth="),
        ({"depth": (2, 4), "residual": "f"}, mujax.ConfigError, "residual: expected a sequence of globs"),
        ({"depth": "scan"}, mujax.DepthError, "got no scan over layers whose length differs; pass depth="),
    ],
)
def test_options_that_make_no_sense(options, error, text):
    net = Net(pre_norm)
    with pytest.raises(error, match=text):
        mujax.mup_init(net, net, X, **options)


def test_depth_that_contradicts_the_scan_is_an_error():
    text = r"block/.*: expected its layers to grow as in depth=\(2, 16\), got"
    with pytest.raises(mujax.DepthError, match=text):
        wrap("functional", depth=(2, 16))
    assert [c.factor for c in wrap("functional", depth=(1, 4)).corrections if c.kind == "residual"] == [1 / M]


def test_no_branches_is_an_error():
    net = Net(_feed_forward_only)
    with pytest.raises(mujax.DepthError, match="expected residual branches, got no addition"):
        mujax.mup_init(net, net, X, depth=(2, 4))


def test_base_and_target_that_differ_in_layers_alone_need_depth():
    with pytest.raises(mujax.ShapeMismatchError, match=r"^block/\w+/\w+: expected .* got 2 layers in the"):
        mujax.mup_init(functional(8, 8), functional(8, 2), X)


def test_the_factor_can_be_switched_off():
    mup = wrap("functional", corrections={"residual": False})
    assert "residual" not in {c.kind for c in mup.corrections}
    assert mup.spec["block/f_up/kernel"].depth == M


def test_what_is_on_the_stream_is_a_finding():
    net = Net(post_norm)
    with pytest.warns(mujax.MujaxWarning, match="acts on the residual stream in each layer"):
        mup = mujax.mup_init(net, net, X, depth=(1, 2))
    assert [finding.kind for finding in mup.findings] == ["stream parameter"]


@pytest.mark.parametrize("scan", [False, True])
def test_layers_that_share_their_parameters_are_a_finding(scan):
    """Their gradient is a sum over layers, which no rule of the sources is for."""

    def build(width: int) -> mujax.Functional:
        def init(key, x):
            return {"f": jax.random.normal(key, (7, 7)), "readout": jnp.ones((7, width))}

        def apply(params, x):
            def block(x, _):
                return x + jnp.tanh(x @ params["f"]), None

            if scan:
                x, _ = lax.scan(block, x, length=4)
            else:
                for _ in range(4):
                    x, _ = block(x, None)
            return x @ params["readout"]

        return mujax.Functional(init, apply)

    with pytest.warns(mujax.MujaxWarning, match="f is used in 4 residual branches"):
        mup = mujax.mup_init(build(8), build(4), X, depth=(2, 4))
    assert [finding.kind for finding in mup.findings] == ["shared layer"]


@pytest.mark.parametrize("loop", ["fori_loop", "slice"])
def test_layers_that_pick_their_own_part_share_nothing(loop):
    def apply(params, x):
        def layer(number, x):
            return x + jnp.tanh(x @ params["f"][number])

        if loop == "fori_loop":
            return lax.fori_loop(0, 4, layer, x)
        for number in range(4):
            x = layer(number, x)
        return x

    net = mujax.Functional(lambda key, x: {"f": jax.random.normal(key, (4, 7, 7))}, apply)
    found = branches(net, X)
    assert (found.count, found.params, found.shared) == (4, {"f"}, {})


def test_one_norm_for_the_two_branches_of_a_layer_is_not_shared_by_layers():
    assert not branches(Net(parallel), X).shared
    assert not branches(Transformer(TransformerConfig(16, 4, max_len=8, vocab_size=11)), TOKENS).shared


def test_explain_names_depth():
    text = wrap("functional", 0.5).explain()
    assert "parametrization mup with depth alpha 0.5" in text
    assert "x 0.5  residual at " in text
    assert "4 times as deep as the base: 4 parameters are inside of residual branches." in text
    assert "as deep as the base" not in wrap("functional", depth=None, depth_alpha=1.0).explain()


# ---- the coordinate check --------------------------------------------------------------------------------

DEPTHS = (2, 4, 8, 16, 32, 64)


def change_of_the_stream(parametrized: bool, alpha: float, layers: int) -> float:
    """How far four steps of Adam move the final stream, root mean square."""
    width, rate = 32, 3e-3
    model, base = functional(width, layers), functional(width, DEPTHS[0])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 7)), jnp.float32)
    y = jnp.asarray(np.random.default_rng(1).normal(size=(16, 2)), jnp.float32)
    if parametrized:
        mup = mujax.mup_init(model, base, X, depth=(DEPTHS[0], layers), depth_alpha=alpha)
        apply, tx = mup.apply, mujax.mup_adam(rate, mup.spec)
    else:
        apply, tx = model.apply, optax.adam(rate)

    def loss(params):
        return jnp.square(apply(params, x) - y).mean()

    def step(state, _):
        params, rest = state
        updates, rest = tx.update(jax.grad(loss)(params), rest, params)
        return (optax.apply_updates(params, updates), rest), None

    def stream(params, factor):
        h = x @ params["stem"]["kernel"] + params["stem"]["bias"]

        def block(h, p):
            z = layer_norm(h, p["f_norm"]["scale"])
            z = jnp.tanh(z @ p["f_up"]["kernel"] + p["f_up"]["bias"]) @ p["f_down"]["kernel"]
            return h + factor * z, None

        return lax.scan(block, h, params["block"])[0]

    @jax.jit
    def run():
        start = model.init(jax.random.key(0), x)
        (end, _), _ = lax.scan(step, (start, tx.init(start)), length=4)
        factor = (layers / DEPTHS[0]) ** -alpha if parametrized else 1.0
        return jnp.sqrt(jnp.square(stream(end, factor) - stream(start, factor)).mean())

    return float(run())


def slope(parametrized: bool, alpha: float = 1.0) -> float:
    """Of log change over log depth."""
    sizes = [change_of_the_stream(parametrized, alpha, layers) for layers in DEPTHS]
    return float(np.polyfit(np.log(DEPTHS), np.log(sizes), 1)[0])


def test_the_change_of_the_stream_is_flat_in_depth():
    assert abs(slope(True)) < 0.1, slope(True)


def test_without_depth_it_grows():
    assert slope(False) > 0.4
