"""What mujax does to an unmodified model is what µP by hand would do, to rounding."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import patterns
import pytest
from flax import linen as nn, nnx
from patterns import BASE, PATTERNS, PLAIN, WIDTH, Model, Pattern, R, S

import mujax


def wrap(pattern: Pattern, **kwargs) -> mujax.MupModel:
    return mujax.mup_init(pattern.build(WIDTH, PLAIN), pattern.build(BASE, PLAIN), *pattern.inputs, **kwargs)


def examples(pattern: Pattern, dtype=jnp.float32) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(rng.integers(0, 11, i.shape), i.dtype)
        if i.dtype == jnp.int32
        else jnp.asarray(rng.normal(size=i.shape), dtype)
        for i in pattern.inputs
    ]


def as_functions(pattern: Pattern, mup: mujax.MupModel):
    """The parameters, mujax's model and the hand-written one as functions of parameters and inputs."""
    hand = pattern.build(WIDTH, pattern.hand)
    if isinstance(hand, nn.Module):
        shapes = jax.eval_shape(mup.init, jax.random.key(0), *pattern.inputs)
        rng = np.random.default_rng(1)
        return (
            jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 3), shapes),
            mup.apply,
            hand.apply,
        )
    graph, params, rest = nnx.split(mup.init(jax.random.key(0)), nnx.Param, ...)
    graph_by_hand, params_by_hand, rest_by_hand = nnx.split(hand(nnx.Rngs(0)), nnx.Param, ...)
    assert jax.tree.structure(params) == jax.tree.structure(params_by_hand)

    def ours(params, *inputs):
        return mup.apply(nnx.merge(graph, params, rest), *inputs)

    def by_hand(params, *inputs):
        return nnx.merge(graph_by_hand, params, rest_by_hand)(*inputs)

    return params, ours, by_hand


def value_and_gradient(apply, params, inputs):
    """The output, and the gradient of a fixed combination of its entries."""

    def combination(params):
        out = apply(params, *inputs)
        return jnp.vdot(jnp.cos(jnp.arange(out.size, dtype=out.dtype)), out.ravel()), out

    (_, out), gradient = jax.value_and_grad(combination, has_aux=True)(params)
    return out, gradient


def assert_close(found, expected, tolerance):
    """Entries agree to a tolerance relative to the largest in their array."""
    for (path, a), (_, b) in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree_util.tree_leaves_with_path(expected), strict=True
    ):
        largest = np.abs(b).max()
        assert np.abs(a - b).max() <= tolerance * largest, (jax.tree_util.keystr(path), largest)


@pytest.mark.parametrize("name", PATTERNS)
def test_forward_and_gradient_are_those_of_mup_by_hand(name):
    pattern = PATTERNS[name]
    mup = wrap(pattern)
    assert mup.findings == ()
    assert sorted((c.kind, c.factor) for c in mup.corrections) == sorted(
        (kind, pytest.approx(factor, rel=1e-6)) for kind, factor in pattern.corrections
    )
    params, ours, by_hand = as_functions(pattern, mup)
    # In float32 the factors must not change a type; that they are right shows in float64, to its rounding.
    single = examples(pattern, jnp.float32)
    assert jax.eval_shape(ours, params, *single) == jax.eval_shape(by_hand, params, *single)
    with jax.enable_x64(True):
        typed = jax.tree.map(functools.partial(jnp.asarray, dtype=jnp.float64), params)
        inputs = examples(pattern, jnp.float64)
        both = [functools.partial(value_and_gradient, apply, inputs=inputs) for apply in (ours, by_hand)]
        found, expected = jax.jit(lambda p: [f(p) for f in both])(typed)
        assert_close(found, expected, 1e-12)


def line(text: str) -> str:
    """`file:line` of the only line of the patterns that has a text."""
    source = inspect.getsource(patterns).splitlines()
    (number,) = [number for number, written in enumerate(source, start=1) if text in written]
    return f"patterns.py:{number}"


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("multi_query", "attention", '"bqhd,bsd->bhqs"'),
        ("multiply_and_sum", "attention", "(q[:, :, None] * k[:, None]).sum(-1)"),
        ("in_vmap", "attention", '"qhd,khd->hqk"'),
        # Inside of a library's function: the line that calls it.
        ("library", "attention", "scale=None if a == 1.0 else a * d**-0.5, is_causal=True"),
        ("linen_attention", "attention", "layer(x, mask="),
        ("nnx_attention", "attention", "self.attention(x)"),
        ("attend", "tied_readout", "times(embed.attend(_trunk(w, embed(tokens)))"),
        ("table_as_kernel_of_dense", "tied_readout", '.apply({"params": {"kernel": kernel}}, x)'),
        ("original_transformer", "scale", "(tokens), hand.scale) * w**0.5"),
        ("weight_norm", "scale", "times(out(x), hand.readout)"),
    ],
)
def test_where_is_the_users_own_line(name, kind, text):
    """That of what the factor is put on, in the file that the user wrote."""
    where = {c.kind: c.where for c in wrap(PATTERNS[name]).corrections}
    assert where[kind].endswith(line(text))


# ---- constants that the model stores ---------------------------------------------------------------------


class Stored(nnx.Module):
    """Constants held as variables, as data and as static settings are the constants that they hold."""

    def __init__(self, w, rngs):
        self.embed = nnx.Embed(11, w, rngs=rngs)
        self.q, self.k = (nnx.Linear(w, w, use_bias=False, rngs=rngs) for _ in range(2))
        self.out = nnx.Linear(w, 3, rngs=rngs)
        self.embed_scale = nnx.Variable(jnp.sqrt(jnp.float32(w)))
        self.table = nnx.data(jnp.full((w,), w**-0.25))
        self.scale = w**-0.25

    def __call__(self, tokens):
        x = self.embed(tokens) * self.embed_scale[...]
        logits = self.q(x) * self.table @ (self.k(x) * self.scale).mT
        return self.out(jax.nn.softmax(logits) @ x)


def test_stored_constants_are_constants():
    tokens = jax.ShapeDtypeStruct((2, 6), jnp.int32)
    builds = (lambda rngs: Stored(WIDTH, rngs)), (lambda rngs: Stored(BASE, rngs))
    mup = mujax.mup_init(*builds, tokens, strict=True)
    found = [(c.kind, c.factor) for c in mup.corrections]
    assert found == [
        ("scale", pytest.approx(S**-1)),
        ("attention", pytest.approx(S**-1)),
        ("readout", pytest.approx(1 / R)),
    ]
    module, given = mup.init(jax.random.key(0)), jnp.arange(12).reshape(2, 6) % 11
    before = mup.apply(module, given)
    by_hand = Stored(WIDTH, nnx.Rngs(0))
    nnx.update(by_hand, nnx.state(module))
    by_hand.embed_scale.set_value(by_hand.embed_scale / S)
    by_hand.scale /= S
    by_hand.out.kernel.set_value(by_hand.out.kernel / R)
    np.testing.assert_allclose(before, by_hand(given), rtol=1e-5, atol=1e-6)


def test_a_bare_array_in_an_nnx_module_is_a_constant():
    class Bare(nnx.Module):
        def __init__(self, w, rngs):
            self.inner = nnx.Linear(7, w, rngs=rngs)
            self.inner.scale = jnp.sqrt(jnp.float32(w))

        def __call__(self, x):
            return self.inner(x) * self.inner.scale

    mup = mujax.mup_init(lambda r: Bare(WIDTH, r), lambda r: Bare(BASE, r), patterns.FLOATS[0])
    assert [(c.kind, c.factor) for c in mup.corrections] == [("scale", pytest.approx((BASE / WIDTH) ** 0.5))]


@pytest.mark.parametrize("width", [WIDTH, 1000])
def test_a_uniform_array_that_is_closed_over_is_a_constant(width):
    def build(w):
        scale = np.full(w, w**0.5, np.float32)
        return Model(w, lambda self, w, hand, x: jnp.tanh(nn.Dense(w)(x) * scale))

    mup = mujax.mup_init(build(width), build(BASE), patterns.FLOATS[0])
    assert [(c.kind, c.factor) for c in mup.corrections] == [("scale", pytest.approx((BASE / width) ** 0.5))]


# ---- loops of unknown length -----------------------------------------------------------------------------


def test_attention_in_a_while_loop():
    """It has no gradient by reverse mode, but it runs."""

    def body(self, w, hand, x):
        q, k, v = (nn.Dense(w, use_bias=False, name=name)(x) for name in ("q", "k", "v"))

        def step(state):
            count, v = state
            logits = patterns.times(q @ k.mT, hand.attention) / jnp.sqrt(w)
            return count + 1, jax.nn.softmax(logits) @ v

        _, v = jax.lax.while_loop(lambda state: state[0] < x.shape[1], step, (0, v))
        return patterns.times(nn.Dense(3, use_bias=False, name="out")(v), hand.readout)

    x = examples(PATTERNS["on_query"])[0]
    mup = mujax.mup_init(Model(WIDTH, body), Model(BASE, body), x, strict=True)
    assert [c.kind for c in mup.corrections] == ["attention", "readout"]
    by_hand = Model(WIDTH, body, patterns.Hand(attention=1 / S, readout=1 / R))
    with jax.enable_x64(True):
        variables, x = jax.tree.map(
            lambda leaf: jnp.asarray(leaf, jnp.float64), (mup.init(jax.random.key(0)), x)
        )
        np.testing.assert_allclose(mup.apply(variables, x), by_hand.apply(variables, x), rtol=1e-10)
