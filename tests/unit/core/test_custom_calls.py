"""Products inside of functions with their own derivative and inside of kernels: µP outside, by hand.

The twin of each model is plain JAX with the factor where µP has it, differentiated by JAX.
"""

import dataclasses
import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx
from flax.linen import fp8_ops
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import Mesh, PartitionSpec as P

import mujax

BASE, WIDTH = 8, 32
R = WIDTH / BASE
LENGTH = 6
X = np.random.default_rng(0).normal(size=(LENGTH, 7))


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mujax.MujaxWarning)
        yield


def own_rule(function: Callable, meaning: Callable | None = None) -> Callable:
    """The function with the derivative of another one, of the same value, as its own."""
    rule = meaning or function
    own = jax.custom_vjp(function)
    own.defvjp(lambda *args: (function(*args), args), lambda args, g: jax.vjp(rule, *args)[1](g))
    return own


def own_tangents(function: Callable) -> Callable:
    own = jax.custom_jvp(function)
    own.defjvp(lambda primals, tangents: jax.jvp(function, primals, tangents))
    return own


# ---- attention -----------------------------------------------------------------------------------------


def scaled(q, k, v, a):
    return nn.softmax(a * (q @ k.T) * q.shape[-1] ** -0.5) @ v


def plain(q, k, v):
    return nn.softmax(q @ k.T * q.shape[-1] ** -0.5) @ v


def _flash(q, k, v, scale):
    """Blocks of keys under a running maximum and sum, each written out."""
    top, total = jnp.full((LENGTH, 1), -jnp.inf, q.dtype), jnp.zeros((LENGTH, 1), q.dtype)
    mixed = jnp.zeros_like(q)
    for keys, values in zip(jnp.split(k, 3), jnp.split(v, 3), strict=True):
        logits = q @ keys.T * scale
        now = jnp.maximum(top, logits.max(-1, keepdims=True))
        weights, shrink = jnp.exp(logits - now), jnp.exp(top - now)
        total = total * shrink + weights.sum(-1, keepdims=True)
        mixed, top = mixed * shrink + weights @ values, now
    return mixed / total


def _flash_in_scan(q, k, v):
    def block(carry, block):
        top, total, mixed = carry
        keys, values = block
        logits = q @ keys.T / np.sqrt(q.shape[-1]).astype(q.dtype)
        logits = jnp.where(jnp.arange(2) >= 0, logits, -1e30)
        now = jnp.maximum(top, logits.max(-1, keepdims=True))
        weights, shrink = jnp.exp(logits - now), jnp.exp(top - now)
        now = (now, total * shrink + weights.sum(-1, keepdims=True), mixed * shrink + weights @ values)
        return now, None

    start = jnp.full((LENGTH, 1), -jnp.inf, q.dtype), jnp.zeros((LENGTH, 1), q.dtype), jnp.zeros_like(q)
    blocks = (k.reshape(3, 2, -1), v.reshape(3, 2, -1))
    (_, total, mixed), _ = lax.scan(block, start, blocks)
    return mixed / total


def _with_scale(q, k, v):
    def attend(q, k, v, scale):
        return nn.softmax(q @ k.T * scale) @ v

    return own_rule(attend)(q, k, v, jnp.asarray(q.shape[-1] ** -0.5, q.dtype))


def _two_outputs(q, k, v):
    """The logits leave the function too."""

    def both(q, k, v):
        logits = q @ k.T * q.shape[-1] ** -0.5
        return nn.softmax(logits) @ v, logits.max(-1, keepdims=True)

    out, top = own_rule(both)(q, k, v)
    return out * nn.sigmoid(top)


def _two_outputs_by_hand(q, k, v, a):
    logits = a * (q @ k.T) * q.shape[-1] ** -0.5
    return nn.softmax(logits) @ v * nn.sigmoid(logits.max(-1, keepdims=True))


def _query_elsewhere(q, k, v):
    return own_rule(lambda q, k, v: plain(q, k, v) + jnp.tanh(q))(q, k, v)


def _query_is_key(q, k, v):
    return own_rule(lambda x, v: nn.softmax(x @ x.T * x.shape[-1] ** -0.5) @ v)(q + k, v)


def _two_queries(q, k, v):
    def two(q, k, other, v):
        return plain(q, jnp.tanh(k), v) + plain(jnp.tanh(k), other, v)

    return own_rule(two)(q, k, jnp.sin(q), v)


def _two_queries_by_hand(q, k, v, a):
    return scaled(q, jnp.tanh(k), v, a) + scaled(jnp.tanh(k), jnp.sin(q), v, a)


def _nested(q, k, v):
    return own_rule(lambda q, k, v: own_rule(plain)(q, k, v) * 2)(q, k, v)


def _deep(q, k, v):
    """In `jit`, `remat`, a scan over layers and a shard of a mesh."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))

    @jax.checkpoint
    @jax.jit
    def layer(q, _):
        attend = jax.shard_map(own_rule(plain), mesh=mesh, in_specs=(P(), P(), P()), out_specs=P())
        return q + attend(q, k, v), None

    return lax.scan(layer, q, length=2)[0]


def _deep_by_hand(q, k, v, a):
    for _ in range(2):
        q = q + scaled(q, k, v, a)
    return q


def _vmapped_rule(q, k, v):
    attend = jax.custom_batching.custom_vmap(plain)
    attend.def_vmap(lambda size, batched, q, k, v: (jax.vmap(plain)(q, k, v), True))
    return attend(q, k, v)


# ---- kernels -------------------------------------------------------------------------------------------


def _kernel_over_blocks(q_ref, k_ref, v_ref, out_ref, *, scale):
    """Blocks of queries in the grid and of keys in a loop, as a flash attention has them."""
    queries = q_ref[...]

    def block(number, carry):
        top, total, mixed = carry
        keys, values = k_ref[pl.ds(number * 2, 2), :], v_ref[pl.ds(number * 2, 2), :]
        logits = queries @ keys.T * scale
        now = jnp.maximum(top, logits.max(-1, keepdims=True))
        weights, shrink = jnp.exp(logits - now), jnp.exp(top - now)
        return now, total * shrink + weights.sum(-1, keepdims=True), mixed * shrink + weights @ values

    start = (
        jnp.full((3, 1), -jnp.inf, queries.dtype),
        jnp.zeros((3, 1), queries.dtype),
        jnp.zeros_like(queries),
    )
    _, total, mixed = lax.fori_loop(0, 3, block, start)
    out_ref[...] = mixed / total


def _kernel_over_grid(q_ref, k_ref, v_ref, out_ref, top_ref, total_ref, *, scale):
    """Blocks of keys in the grid, and memory between its points."""

    @pl.when(pl.program_id(1) == 0)
    def _():
        top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
        total_ref[...] = jnp.zeros_like(total_ref)
        out_ref[...] = jnp.zeros_like(out_ref)

    logits = q_ref[...] @ k_ref[...].T * scale
    now = jnp.maximum(top_ref[...], logits.max(-1, keepdims=True))
    weights, shrink = jnp.exp(logits - now), jnp.exp(top_ref[...] - now)
    total_ref[...] = total_ref[...] * shrink + weights.sum(-1, keepdims=True)
    out_ref[...] = out_ref[...] * shrink + weights @ v_ref[...]
    top_ref[...] = now

    @pl.when(pl.program_id(1) == 2)
    def _():
        out_ref[...] = out_ref[...] / total_ref[...]


def _blocks(q, k, v):
    width = q.shape[-1]
    whole = pl.BlockSpec((LENGTH, width), lambda i: (0, 0))
    rows = pl.BlockSpec((3, width), lambda i: (i, 0))
    return pl.pallas_call(
        functools.partial(_kernel_over_blocks, scale=width**-0.5),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(2,),
        in_specs=[rows, whole, whole],
        out_specs=rows,
        interpret=True,
    )(q, k, v)


def _grid(q, k, v):
    width = q.shape[-1]
    rows = pl.BlockSpec((3, width), lambda i, j: (i, 0))
    one = pl.BlockSpec((3, 1), lambda i, j: (i, 0))
    keys = pl.BlockSpec((2, width), lambda i, j: (j, 0))
    number = jax.ShapeDtypeStruct((LENGTH, 1), q.dtype)
    out, _, _ = pl.pallas_call(
        functools.partial(_kernel_over_grid, scale=width**-0.5),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), number, number],
        grid=(2, 3),
        in_specs=[rows, keys, keys],
        out_specs=[rows, one, one],
        interpret=True,
    )(q, k, v)
    return out


@dataclasses.dataclass(frozen=True)
class Case:
    """A function of query, key and value.

    Attributes:
        core: the function.
        operands: the powers of the factor on its operands, where that is the boundary.
        by_hand: the same with a factor on the logits.
    """

    core: Callable
    operands: Mapping[int, float]
    by_hand: Callable = scaled


ATTENTION = {
    "the body": Case(own_rule(plain), {0: 1}),
    "blocks": Case(own_rule(lambda q, k, v: _flash(q, k, v, q.shape[-1] ** -0.5), plain), {0: 1}),
    "scan over blocks": Case(own_rule(_flash_in_scan, plain), {0: 1}),
    "a scale that is passed in": Case(_with_scale, {3: 1}),
    "logits returned": Case(_two_outputs, {0: 1}, _two_outputs_by_hand),
    "query elsewhere": Case(_query_elsewhere, {1: 1}, lambda q, k, v, a: scaled(q, k, v, a) + jnp.tanh(q)),
    "query is key": Case(_query_is_key, {0: 0.5}, lambda q, k, v, a: scaled(q + k, q + k, v, a)),
    "two queries": Case(_two_queries, {0: 1, 2: 1}, _two_queries_by_hand),
    "nested": Case(_nested, {0: 1}, lambda q, k, v, a: 2 * scaled(q, k, v, a)),
    "deep": Case(_deep, {0: 1}, _deep_by_hand),
    "custom_jvp": Case(own_tangents(plain), {0: 1}),
    "kernel": Case(own_rule(_blocks, plain), {0: 1}),
    "kernel over a grid": Case(own_rule(_grid, plain), {0: 1}),
}


def attending(core: Callable, width: int, readout: float = 1.0) -> mujax.Functional:
    def init(key, x):
        keys = jax.random.split(key, 4)
        kernels = {
            name: jax.random.normal(one, (7, width)) / 7**0.5 for name, one in zip("qkv", keys, strict=False)
        }
        return {**kernels, "out": jax.random.normal(keys[3], (width, 3)) / width**0.5}

    def apply(params, x):
        q, k, v = (x @ params[name] for name in "qkv")
        return core(q, k, v) @ params["out"] * readout

    return mujax.Functional(init, apply)


def value_and_gradient(apply, params, x):
    def combination(params):
        out = apply(params, x)
        return jnp.vdot(jnp.cos(jnp.arange(out.size, dtype=out.dtype)), out.ravel()), out

    (_, out), gradient = jax.value_and_grad(combination, has_aux=True)(params)
    return out, gradient


def assert_same(found, expected, tolerance=1e-12):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max(), jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", ATTENTION)
def test_value_and_gradient_are_those_of_mup_by_hand(name):
    case, a = ATTENTION[name], R**-0.5
    with jax.enable_x64(True):
        x = jnp.asarray(X)
        mup = mujax.mup_init(attending(case.core, WIDTH), attending(case.core, BASE), x)
        assert mup.findings == ()
        assert {(c.kind, round(c.factor, 6)) for c in mup.corrections} == {
            ("attention", a),
            ("readout", 1 / R),
        }
        (move,) = set(mup._plan.moves.values())
        assert (dict(move.boundary.operands), move.boundary.outputs) == (case.operands, ())
        (applied,) = {c.applied for c in mup.corrections if c.kind == "attention"}
        powers = [(n, "" if p == 1 else f" (to the power of {p:.4g})") for n, p in case.operands.items()]
        assert applied.startswith(" and ".join(f"operand {n}{power}" for n, power in powers) + " of ")
        assert f", applied to {applied}\n" in mup.explain()
        # The twin: the readout's factor is where the product is.
        assert {c.applied for c in mup.corrections if c.kind == "readout"} == {""}
        hand = attending(functools.partial(case.by_hand, a=a), WIDTH, 1 / R)
        tuned = attending(functools.partial(case.by_hand, a=3 * a), WIDTH, 1 / R)
        params = mup.init(jax.random.key(1), x)

        @jax.jit
        def both(params):
            pairs = [(mup.apply, hand.apply)]
            if set(case.operands.values()) == {1}:
                pairs.append((mup.with_multipliers(attention_mult=3.0).apply, tuned.apply))
            return [[value_and_gradient(one, params, x) for one in pair] for pair in pairs]

        for ours, theirs in both(params):
            assert_same(ours, theirs)


def test_a_batching_rule_of_its_own():
    """Which JAX does not differentiate."""
    x = jnp.asarray(X, jnp.float32)
    mup = mujax.mup_init(attending(_vmapped_rule, WIDTH), attending(_vmapped_rule, BASE), x)
    assert mup.findings == ()
    hand = attending(functools.partial(scaled, a=R**-0.5), WIDTH, 1 / R)
    params = mup.init(jax.random.key(1), x)
    assert_same(mup.apply(params, x), hand.apply(params, x), 1e-5)


def test_a_rule_without_the_factor_fails_the_comparison():
    """The factor inside and the rule as it was: what a replay would do that changed the function's body."""
    a = R**-0.5
    mutant = own_rule(lambda q, k, v: scaled(q, k, v, a), plain)
    with jax.enable_x64(True):
        x = jnp.asarray(X)
        hand = attending(functools.partial(scaled, a=a), WIDTH)
        params = hand.init(jax.random.key(1), x)
        found, expected = (
            value_and_gradient(model.apply, params, x) for model in (attending(mutant, WIDTH), hand)
        )
    assert_same(found[0], expected[0])
    with pytest.raises(AssertionError, match=r"\['q'\]|\['k'\]"):
        assert_same(found[1], expected[1], 0.1)


# ---- other kinds of models -----------------------------------------------------------------------------


class Linen(nn.Module):
    width: int
    a: float = 1.0
    readout: float = 1.0
    by_hand: bool = False

    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.Dense(self.width, use_bias=False, name=name)(x) for name in "qkv")
        attend = functools.partial(scaled, a=self.a) if self.by_hand else own_rule(plain)
        return nn.Dense(3, name="out", use_bias=False)(attend(q, k, v)) * self.readout


class Graph(nnx.Module):
    def __init__(self, width, rngs, a=1.0, readout=1.0, by_hand=False):
        self.q, self.k, self.v = (nnx.Linear(7, width, use_bias=False, rngs=rngs) for _ in range(3))
        self.out = nnx.Linear(width, 3, use_bias=False, rngs=rngs)
        self.attend = functools.partial(scaled, a=a) if by_hand else own_rule(plain)
        self.readout = readout

    def __call__(self, x):
        return self.out(self.attend(self.q(x), self.k(x), self.v(x))) * self.readout


def test_linen():
    x = jnp.asarray(X, jnp.float32)
    mup = mujax.mup_init(Linen(WIDTH), Linen(BASE), x)
    hand = Linen(WIDTH, R**-0.5, 1 / R, True)
    params = mup.init(jax.random.key(0))
    assert mup.findings == ()
    assert_same(*(value_and_gradient(f, params, x) for f in (mup.apply, hand.apply)), 1e-5)


def test_nnx():
    x = jnp.asarray(X, jnp.float32)
    mup = mujax.mup_init(lambda rngs: Graph(WIDTH, rngs), lambda rngs: Graph(BASE, rngs), x)
    assert mup.findings == ()
    module = mup.init(jax.random.key(0))
    hand = Graph(WIDTH, nnx.Rngs(0), R**-0.5, 1 / R, True)
    nnx.update(hand, nnx.state(module))

    def gradient(module, apply):
        return nnx.value_and_grad(lambda module: (apply(module) ** 2).sum())(module)

    ours, theirs = gradient(module, lambda m: mup.apply(m, x)), gradient(hand, lambda m: m(x))
    assert_same(jax.tree.leaves(ours), jax.tree.leaves(theirs), 1e-5)


# ---- readouts ------------------------------------------------------------------------------------------


def _unread(x, w):
    """The product of values that were cut off at some bits, with gradients to what they were cut off from."""

    @jax.custom_vjp
    def product(x, cut_x, w, cut_w):
        return cut_x @ cut_w

    product.defvjp(
        lambda x, cut_x, w, cut_w: (cut_x @ cut_w, (cut_x, cut_w)),
        lambda cut, g: (g @ cut[1].T, jnp.zeros_like(cut[0]), cut[0].T @ g, jnp.zeros_like(cut[1])),
    )
    return product(x, lax.stop_gradient(jnp.round(x * 8) / 8), w, lax.stop_gradient(w))


def _clipped(x, w):
    """A rule that is no derivative."""
    product = jax.custom_vjp(lambda x, w: x @ w)
    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, (kept[0].T @ g) * 0.5))
    return product(x, w)


READOUTS = {
    # The function, and where the factor goes: operands, outputs.
    "product": (own_rule(lambda x, w: x @ w), {}, {0: 1}),
    "product, by tangents": (own_tangents(lambda x, w: x @ w), {}, {0: 1}),
    "with a bias": (own_rule(lambda x, w: x @ w + 0.5), {0: 1}, {}),
    "a function and a bias": (own_rule(lambda x, w: nn.gelu(x) @ w + 0.5), {1: 1}, {}),
    "unread": (_unread, {}, {0: 1}),
    "clipped": (_clipped, {}, {0: 1}),
}


def reading_out(product: Callable, width: int) -> mujax.Functional:
    def init(key, x):
        first, last = jax.random.split(key)
        return {
            "first": jax.random.normal(first, (7, width)) / 7**0.5,
            "out": jax.random.normal(last, (width, 3)) / width**0.5,
        }

    return mujax.Functional(init, lambda params, x: product(nn.relu(x @ params["first"]), params["out"]))


@pytest.mark.parametrize("name", READOUTS)
def test_the_product_of_a_readout(name):
    product, operands, outputs = READOUTS[name]

    def by_hand(x, w):
        if name == "with a bias":
            return x @ w / R + 0.5
        if name == "a function and a bias":
            return nn.gelu(x) @ w / R + 0.5
        return product(x, w) / R

    with jax.enable_x64(True):
        x = jnp.asarray(X)
        mup = mujax.mup_init(reading_out(product, WIDTH), reading_out(product, BASE), x)
        assert mup.findings == ()
        assert [(c.kind, c.factor, c.path) for c in mup.corrections] == [("readout", 1 / R, "out")]
        (move,) = set(mup._plan.moves.values())
        assert (dict(move.boundary.operands), dict(move.boundary.outputs)) == (operands, outputs)
        params = mup.init(jax.random.key(0), x)
        hand = reading_out(by_hand, WIDTH)
        tuned = mup.with_multipliers(output_mult=2.0)
        assert_same(
            *(jax.jit(value_and_gradient, static_argnums=0)(f, params, x) for f in (mup.apply, hand.apply))
        )
        if outputs:
            np.testing.assert_allclose(tuned.apply(params, x), 2 * mup.apply(params, x), rtol=1e-12)


class Eight(nn.Module):
    """Products of eight bits, as Flax has them."""

    width: int
    product: Any
    readout: float = 1.0

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.Dense(self.width, dot_general_cls=self.product)(x))
        return nn.Dense(3, use_bias=False, dot_general_cls=self.product)(x) * self.readout


@pytest.mark.parametrize("name", ["Fp8DotGeneralOp", "Fp8DirectDotGeneralOp", "NANOOFp8DotGeneralOp"])
@pytest.mark.filterwarnings("ignore:The .* is deprecated")
def test_products_of_eight_bits(name):
    product, x = getattr(fp8_ops, name), jnp.asarray(X, jnp.float32)
    mup = mujax.mup_init(Eight(WIDTH, product), Eight(BASE, product), x)
    assert mup.findings == ()
    assert [(c.kind, c.factor, c.path) for c in mup.corrections] == [("readout", 1 / R, "Dense_2/kernel")]
    (move,) = set(mup._plan.moves.values())
    assert (move.boundary.operands, move.boundary.outputs) == ((), ((0, 1),))
    if name == "NANOOFp8DotGeneralOp":
        # A CPU has no such numbers.
        return
    variables = mup.init(jax.random.key(0))
    hand = Eight(WIDTH, product, 1 / R)
    (ours, change), (theirs, expected) = (
        value_and_gradient(f, variables, x) for f in (mup.apply, hand.apply)
    )
    assert_same(ours, theirs, 1e-6)
    # Gradients too are of eight bits: a factor that is no power of two loses some of them.
    assert_same(change["params"], expected["params"], 1e-6)


# ---- kernels of JAX's own --------------------------------------------------------------------------------


def _on_tpu(q, k, v):
    from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

    q, k, v = (x[None].swapaxes(1, 2) for x in (q, k, v))
    return flash_attention(q, k, v, causal=True, sm_scale=q.shape[-1] ** -0.5).swapaxes(1, 2)[0]


def _splash(q, k, v):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    mask = splash.MultiHeadMask([splash.CausalMask((256, 256))] * 2)
    attend = splash.make_splash_mha_single_device(mask)
    q, k, v = (x.swapaxes(0, 1) for x in (q, k, v))
    return attend(q * q.shape[-1] ** -0.5, k, v).swapaxes(0, 1)


def _on_gpu(q, k, v):
    attention = importlib.import_module("jax.experimental.pallas.ops.gpu.attention")
    q, k, v = (x[None] for x in (q, k, v))
    return attention.mha(q, k, v, None, sm_scale=q.shape[-1] ** -0.5, causal=True)[0]


def _cudnn(q, k, v):
    q, k, v = (x[None].astype(jnp.bfloat16) for x in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", is_causal=True)[0].astype(
        jnp.float32
    )


def heads(core: Callable, size: int) -> mujax.Functional:
    def init(key, x):
        keys = jax.random.split(key, 4)
        kernels = {name: jax.random.normal(keys[n], (7, 2, size)) for n, name in enumerate("qkv")}
        return {**kernels, "out": jax.random.normal(keys[3], (2, size, 3))}

    def apply(params, x):
        out = core(*(jnp.einsum("td,dhe->the", x, params[name]) for name in "qkv"))
        return jnp.einsum("the,heo->to", out, params["out"])

    return mujax.Functional(init, apply)


# Their query's number among the operands: splash attention has masks in front of it.
@pytest.mark.parametrize(("core", "query"), [(_on_tpu, 0), (_splash, None), (_on_gpu, 0), (_cudnn, 0)])
@pytest.mark.filterwarnings("ignore:.*attention is deprecated")
def test_attention_of_jax_gets_its_factor_on_the_query(core, query, monkeypatch):
    """Traced only: the kernels are those of other machines."""
    if core is _cudnn:
        # The only thing that it asks of the machine; what it binds is the same everywhere.
        fused = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
        monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
        monkeypatch.setattr(fused, "check_compute_capability", lambda _: True)
    small, big = (32, 128) if core is _cudnn else (128, 512)
    x = jax.ShapeDtypeStruct((256, 7), jnp.float32)
    mup = mujax.mup_init(heads(core, big), heads(core, small), x)
    assert mup.findings == ()
    assert [(c.kind, round(c.factor, 6)) for c in mup.corrections] == [("attention", 0.5), ("readout", 0.25)]
    assert all("test_custom_calls.py" in c.where for c in mup.corrections)
    (move,) = set(mup._plan.moves.values())
    ((number, power),) = move.boundary.operands
    assert (power, move.boundary.outputs) == (1, ())
    eqn = mup.replay.equation(move.boundary.site)
    floats = [n for n, atom in enumerate(eqn.invars) if jnp.issubdtype(atom.aval.dtype, jnp.floating)]
    assert number == (floats[0] if query is None else query)


# ---- where nothing can be shown --------------------------------------------------------------------------


def _nonlinear(q, k, v):
    return own_rule(lambda q, k, v: plain(jnp.tanh(q), jnp.tanh(k), v))(q, k, v)


def _nonlinear_tangents(q, k, v):
    return own_tangents(lambda q, k, v: plain(jnp.tanh(q), jnp.tanh(k), v))(q, k, v)


def _used_elsewhere(q, k, v):
    return own_rule(lambda q, k, v: plain(q, k, v) + jnp.tanh(q * k))(q, k, v)


def _gradient_to_what_is_unread(q, k, v):
    own = jax.custom_vjp(lambda q, cut, k, v: plain(cut, k, v))
    own.defvjp(
        lambda q, cut, k, v: (plain(cut, k, v), (cut, k, v)),
        lambda kept, g: (lambda q, k, v: (q, 0 * q, k, v))(*jax.vjp(plain, *kept)[1](g)),
    )
    return own(q, lax.stop_gradient(jnp.round(q * 8) / 8), k, v)


def _width_over_grid(q, k, v):
    """Each point of the grid sees a part of the width, and adds to the logits."""

    def kernel(q_ref, k_ref, out_ref):
        @pl.when(pl.program_id(0) == 0)
        def _():
            out_ref[...] = jnp.zeros_like(out_ref)

        out_ref[...] += q_ref[...] @ k_ref[...].T

    part = pl.BlockSpec((LENGTH, 4), lambda i: (0, i))
    logits = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((LENGTH, LENGTH), q.dtype),
        grid=(q.shape[-1] // 4,),
        in_specs=[part, part],
        out_specs=pl.BlockSpec((LENGTH, LENGTH), lambda i: (0, 0)),
        interpret=True,
    )(q, k)
    return nn.softmax(logits * q.shape[-1] ** -0.5) @ v


def _width_in_a_loop(q, k, v):
    """The block holds the whole width, of which a loop reads four at a time."""

    def kernel(q_ref, k_ref, out_ref):
        def part(number, total):
            at = pl.ds(number * 4, 4)
            return total + q_ref[:, at] @ k_ref[:, at].T

        out_ref[...] = lax.fori_loop(0, q_ref.shape[-1] // 4, part, jnp.zeros_like(out_ref))

    shape = jax.ShapeDtypeStruct((LENGTH, LENGTH), q.dtype)
    logits = pl.pallas_call(kernel, out_shape=shape, interpret=True)(q, k)
    return nn.softmax(logits * q.shape[-1] ** -0.5) @ v


def _unknown_inside(q, k, v):
    def kernel(q_ref, k_ref, out_ref):
        logits = q_ref[...] @ k_ref[...].T * q.shape[-1] ** -0.5
        out_ref[...] = jax.pure_callback(
            lambda x: x, jax.ShapeDtypeStruct(logits.shape, logits.dtype), logits
        )

    shape = jax.ShapeDtypeStruct((LENGTH, LENGTH), q.dtype)
    return nn.softmax(pl.pallas_call(kernel, out_shape=shape, interpret=True)(q, k)) @ v


def _in_place(q, k, v):
    def kernel(q_ref, k_ref, out_ref):
        out_ref[...] = nn.softmax(q_ref[...] @ k_ref[...].T * q.shape[-1] ** -0.5) @ k_ref[...]

    shape = jax.ShapeDtypeStruct(q.shape, q.dtype)
    call = pl.pallas_call(kernel, out_shape=shape, interpret=True, input_output_aliases={0: 0})
    return call(q, k) + v


def _branching(q, k, v):
    """The kernel's code takes another path at another width."""

    def kernel(q_ref, k_ref, out_ref):
        logits = q_ref[...] @ k_ref[...].T * q.shape[-1] ** -0.5
        out_ref[...] = logits if q.shape[-1] > BASE else jnp.sin(jnp.cos(logits))

    shape = jax.ShapeDtypeStruct((LENGTH, LENGTH), q.dtype)
    return nn.softmax(pl.pallas_call(kernel, out_shape=shape, interpret=True)(q, k)) @ v


REPORTED = {
    "nonlinear in all": (_nonlinear, "out of reach"),
    "nonlinear in all, by tangents": (_nonlinear_tangents, "own derivative"),
    "used elsewhere": (_used_elsewhere, "out of reach"),
    "a gradient to what is unread": (_gradient_to_what_is_unread, "out of reach"),
    "width over the grid": (_width_over_grid, "opaque"),
    "width in a loop": (_width_in_a_loop, "opaque"),
    "unknown inside of a kernel": (_unknown_inside, "opaque"),
    "a kernel in place": (_in_place, "opaque"),
    "a kernel that branches": (_branching, "opaque"),
}


@pytest.mark.parametrize("name", REPORTED)
def test_what_cannot_be_shown_is_reported(name):
    core, kind = REPORTED[name]
    x = jax.ShapeDtypeStruct(X.shape, jnp.float32)
    mup = mujax.mup_init(attending(core, WIDTH), attending(core, BASE), x)
    assert {finding.kind for finding in mup.findings} == {kind}
    assert all("test_custom_calls.py" in finding.where for finding in mup.findings)
    attention = [c for c in mup.corrections if c.kind == "attention"]
    # Without a rule of its own the function is still one to correct inside.
    assert len(attention) == (kind == "own derivative")
    assert mup._plan.moves == {}


def test_a_kernel_with_a_parameter_is_reported():
    """A product with a parameter in blocks: its fan-in would be that of a block."""

    def product(x, w):
        def kernel(x_ref, w_ref, out_ref):
            out_ref[...] = x_ref[...] @ w_ref[...]

        shape = jax.ShapeDtypeStruct((len(x), w.shape[1]), x.dtype)
        return pl.pallas_call(kernel, out_shape=shape, interpret=True)(x, w)

    x = jax.ShapeDtypeStruct(X.shape, jnp.float32)
    with pytest.raises(mujax.RoleError, match=r"got one in pallas_call at .*test_custom_calls\.py"):
        mujax.mup_init(reading_out(product, WIDTH), reading_out(product, BASE), x)
