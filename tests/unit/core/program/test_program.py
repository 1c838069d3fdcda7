"""The program that `mup.apply` runs keeps what the user's had: names, policies, effects, symbolic sizes."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name, print_saved_residuals
from patterns import BASE, PATTERNS, PLAIN, TOKENS, WIDTH, Hand, Model, R, S, mix, scores, times

import mujax

# ---- a batch of unknown size ---------------------------------------------------------------------------


def _pool(self, w, hand, tokens):
    """Sums over the batch and the width at once, and over the batch alone."""
    x = nn.Embed(11, w, name="embed")(tokens)
    x = x - x.mean((0, 1))
    x = x / jnp.sqrt(1e-5 + (x**2).mean())
    return nn.Dense(3, name="out")(x.mean((0, 1))) + jnp.ones(tokens.shape[0]).sum()


def _windows(self, w, hand, tokens):
    """Parts of the sequence become a part of the batch."""
    x = nn.Embed(11, w, name="embed")(tokens)
    batch, length, _ = x.shape
    x = x.reshape(batch * 2, length // 2, w)
    x = nn.MultiHeadDotProductAttention(2)(x)
    return nn.Dense(3, name="out")(x.reshape(batch, length, w))


SYMBOLIC: dict[str, tuple[Callable[[int], nn.Module], jax.ShapeDtypeStruct]] = {
    **{
        name: (lambda w, build=PATTERNS[name].build: build(w, PLAIN), PATTERNS[name].inputs[0])
        for name in ("linen_attention", "library_grouped", "in_cond", "layers_in_scan_of_remat", "gemma")
    },
    "pool": (lambda w: Model(w, _pool), TOKENS[0]),
    "windows": (lambda w: Model(w, _windows), TOKENS[0]),
}


@pytest.mark.parametrize("name", SYMBOLIC)
def test_a_batch_of_symbolic_size(name):
    """One exported program serves any batch."""
    build, example = SYMBOLIC[name]
    mup = mujax.mup_init(build(WIDTH), build(BASE), example)
    variables = jax.eval_shape(mup.init, jax.random.key(0))
    (batch,) = jax.export.symbolic_shape("batch")
    inputs = jax.ShapeDtypeStruct((batch, *example.shape[1:]), example.dtype)
    exported = jax.export.export(jax.jit(mup.apply))(variables, inputs)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) / 3, variables)
    inputs = jnp.ones((3, *example.shape[1:]), example.dtype)
    expected = mup.apply(variables, inputs)
    np.testing.assert_allclose(exported.call(variables, inputs), expected, rtol=1e-4, atol=1e-5)


# ---- rematerialisation, names and effects around a correction --------------------------------------------

X = jnp.linspace(-1.0, 1.0, 2 * 6 * 7).reshape(2, 6, 7)


def _attending(self, w, hand, x):
    """The logits, which are corrected, are saved by name; everything else is computed again."""

    def attend(q, k, v):
        with jax.named_scope("my_scores"):
            logits = checkpoint_name(times(scores(q, k), hand.attention) / jnp.sqrt(q.shape[-1]), "logits")
        return mix(logits, v)

    q, k, v = (nn.DenseGeneral((2, w // 2), use_bias=False, name=name)(x) for name in ("q", "k", "v"))
    policy = jax.checkpoint_policies.save_only_these_names("logits")
    y = jax.checkpoint(attend, policy=policy)(q, k, v)
    return times(nn.DenseGeneral(3, axis=(-2, -1), use_bias=False, name="out")(y), hand.readout)


@pytest.fixture(scope="module")
def attending():
    """mujax's model and the hand-written one, as functions of variables, and variables."""
    mup = mujax.mup_init(Model(WIDTH, _attending), Model(BASE, _attending), X)
    assert sorted(c.kind for c in mup.corrections) == ["attention", "readout"]
    by_hand = Model(WIDTH, _attending, Hand(attention=1 / S, readout=1 / R))
    return mup.apply, by_hand.apply, mup.init(jax.random.key(0))


def test_residuals_that_a_policy_saves_by_name(attending, capsys):
    ours, by_hand, variables = attending
    saved = []
    for apply in (ours, by_hand):
        print_saved_residuals(lambda v, apply=apply: apply(v, X).sum(), variables)
        lines = capsys.readouterr().out.splitlines()
        saved.append(sorted(line.partition(" ")[0] for line in lines))
        assert sum("logits" in line for line in lines) == 1
    assert saved[0] == saved[1]
    assert "f32[2,2,6,6]" in saved[0]


def test_a_users_named_scope(attending):
    ours, by_hand, variables = attending
    found = []
    for apply in (ours, by_hand):
        lowered = jax.jit(jax.grad(lambda v, apply=apply: apply(v, X).sum())).lower(variables)
        names = re.findall(r'"([^"]*my_scores[^"]*dot_general)"', lowered.as_text(debug_info=True))
        found.append({name.replace("jit(<lambda>)/", "") for name in names})
    assert found[0] == found[1] != set()


def test_effects_of_a_call_happen_once():
    """Neither the trace of the base nor that of the target has any."""
    seen: list[str] = []

    def body(self, w, hand, x):
        x = nn.Dense(w, name="first")(x)
        jax.debug.callback(lambda: seen.append("between"))
        q = jax.checkpoint(
            lambda x: (jax.debug.callback(lambda: seen.append("inside")), x @ x.mT / w**0.5)[1]
        )(x)
        return nn.Dense(3, name="out")(nn.softmax(q) @ x)

    mup = mujax.mup_init(Model(WIDTH, body), Model(BASE, body), X)
    assert [c.kind for c in mup.corrections] == ["attention", "readout"]
    variables = mup.init(jax.random.key(0))
    jax.effects_barrier()
    seen.clear()
    for run in (mup.apply, jax.jit(mup.apply)):
        jax.block_until_ready(run(variables, X))
        jax.effects_barrier()
        assert sorted(seen) == ["between", "inside"]
        seen.clear()


def test_a_call_traces_the_model_twice():
    """Once at each width: tracing costs about twice the plain trace."""
    widths: list[int] = []

    def body(self, w, hand, x):
        widths.append(w)
        return nn.Dense(3, name="out")(nn.Dense(w, name="first")(x))

    mup = mujax.mup_init(Model(WIDTH, body), Model(BASE, body), X)
    variables = mup.init(jax.random.key(0))
    widths.clear()
    jax.jit(mup.apply).lower(variables, X)
    assert sorted(widths) == [BASE, WIDTH]
