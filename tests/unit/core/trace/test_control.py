"""The user's settings take precedence: kinds switched off, roles, zero initial values, multipliers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx
from patterns import BASE, PATTERNS, PLAIN, WIDTH, Hand, Model, Pattern, R, S, mix, scores, times

import mujax
from mujax import rules

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 7)), jnp.float32)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 6)), jnp.int32)


def wrap(build, *inputs, width=WIDTH, **kwargs) -> mujax.MupModel:
    return mujax.mup_init(build(width), build(BASE), *inputs, **kwargs)


def variables_of(mup: mujax.MupModel, *inputs) -> dict:
    shapes = jax.eval_shape(mup.init, jax.random.key(0), *inputs)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 3, leaf.dtype), shapes)


def by_hand(pattern: Pattern, hand: Hand):
    return pattern.build(WIDTH, hand).apply


def same(found, expected):
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)


# ---- corrections= ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "off", "hand"),
    [
        ("python_float", ("attention",), Hand(readout=1 / R)),
        ("python_float", ("readout",), Hand(attention=1 / S)),
        ("python_float", ("attention", "readout"), PLAIN),
        ("gemma", ("scale",), Hand(readout=1 / R)),
        ("gemma", ("tied_readout",), Hand(scale=1 / S)),
        ("gemma", ("attention", "readout"), Hand(scale=1 / S, readout=1 / R)),
    ],
)
def test_a_kind_that_is_off_is_off_and_the_others_stay(name, off, hand):
    pattern = PATTERNS[name]
    inputs = [TOKENS if i.dtype == jnp.int32 else X for i in pattern.inputs]
    mup = wrap(lambda w: pattern.build(w, PLAIN), *inputs, corrections=dict.fromkeys(off, False))
    assert sorted(c.kind for c in mup.corrections) == sorted(
        k for k, _ in pattern.corrections if k not in off
    )
    variables = variables_of(mup, *inputs)
    same(mup.apply(variables, *inputs), by_hand(pattern, hand)(variables, *inputs))


def test_what_is_said_to_be_on_is_on():
    mup = wrap(lambda w: PATTERNS["gemma"].build(w, PLAIN), TOKENS, corrections={"scale": True})
    assert sorted(c.kind for c in mup.corrections) == ["scale", "tied_readout"]


def test_an_unknown_kind_is_an_error():
    with pytest.raises(
        mujax.MujaxError, match=r"corrections: expected kinds out of 'readout', .*, got 'softmax'"
    ):
        wrap(lambda w: PATTERNS["gemma"].build(w, PLAIN), TOKENS, corrections={"softmax": False})


def test_standard_parametrization_gets_no_corrections():
    pattern = PATTERNS["gemma"]
    mup = wrap(lambda w: pattern.build(w, PLAIN), TOKENS, parametrization="sp")
    assert mup.corrections == ()
    variables = variables_of(mup, TOKENS)
    same(mup.apply(variables, TOKENS), by_hand(pattern, PLAIN)(variables, TOKENS))


def test_half_way_to_mup_each_factor_is_its_root():
    pattern = PATTERNS["gemma"]
    mup = wrap(lambda w: pattern.build(w, PLAIN), TOKENS, parametrization=mujax.interpolate("sp", "mup", 0.5))
    assert {c.kind: c.factor for c in mup.corrections} == pytest.approx(
        {"scale": S**-0.5, "tied_readout": R**-0.5}
    )


# ---- roles= ------------------------------------------------------------------------------------------


def _mlp(self, w, hand, x):
    x = nn.relu(nn.Dense(w, name="first")(x))
    x = nn.relu(nn.Dense(w, name="second")(x))
    return nn.Dense(3, name="out")(x)


def mlp(width: int) -> nn.Module:
    return Model(width, _mlp)


def test_a_role_by_name_overrules_the_trace():
    mup = wrap(mlp, X, roles={"second/kernel": "output"})
    param, chosen = mup.spec["second/kernel"], mup.spec.parametrization
    assert (param.role, param.fan_in, param.fan_out) == ("output", (0, 1), ())
    assert rules.lr_factor(param, chosen, "sgd") == R * R
    assert ("second/kernel", 1 / (R * R)) in {(c.path, c.factor) for c in mup.corrections}


def test_globs_match_many_and_the_last_one_wins():
    mup = wrap(mlp, X, roles={"*/kernel": "output", "second/*": "input"})
    roles = {path: param.role for path, param in mup.spec.items()}
    assert roles == {
        "first/kernel": "output",
        "first/bias": "input",
        "second/kernel": "input",
        "second/bias": "input",
        "out/kernel": "output",
        "out/bias": "finite",
    }


def test_a_param_spec_is_taken_as_it_is():
    given = mujax.ParamSpec((WIDTH, WIDTH), (BASE, BASE), fan_in=(1,), fan_out=(0,), infinite=(0, 1))
    mup = wrap(mlp, X, roles={"second/kernel": given})
    assert mup.spec["second/kernel"] == given


@pytest.mark.parametrize(
    ("roles", "text"),
    [
        ({"third/*": "hidden"}, r"'third/\*', which matches none of them; the first is 'first/bias'"),
        ({"out/kernel": "readout"}, r"out/kernel: expected a role out of .*, got 'readout'"),
        ({"first/kernel": "hidden"}, r"first/kernel: expected two axes .* got 1 in shape \(7, 24\)"),
        (
            {"second/bias": "finite"},
            r"second/bias: expected no axis that grows .*, got axes \(0,\) of shape \(24,\)",
        ),
        (
            {"first/kernel": mujax.ParamSpec((7, 32), (7, 8), fan_in=(0,), fan_out=(1,), infinite=(1,))},
            r"first/kernel: expected roles= to give shape \(7, 24\) .*, got \(7, 32\)",
        ),
    ],
)
def test_a_role_that_makes_no_sense_is_an_error(roles, text):
    with pytest.raises(mujax.RoleError, match=text):
        wrap(mlp, X, roles=roles)


# ---- zero_init= ----------------------------------------------------------------------------------------


def _linen(self, w, hand, x):
    x = nn.Dense(w, name="first")(x)
    x = nn.MultiHeadDotProductAttention(2, name="attention")(x)
    return nn.Dense(3, name="out")(x)


def _hand_written(self, w, hand, x):
    q, k, v = (nn.DenseGeneral((2, w // 2), use_bias=False, name=name)(x) for name in ("q", "k", "v"))
    y = mix(scores(q, k) / jnp.sqrt(q.shape[-1]), v)
    return nn.DenseGeneral(3, axis=(-2, -1), name="out")(y)


def _on_scaled_query(self, w, hand, x):
    q, k, v = (nn.DenseGeneral((2, w // 2), use_bias=False, name=name)(x) for name in ("q", "k", "v"))
    y = mix(scores(q * q.shape[-1] ** -0.5, k), v)
    return nn.DenseGeneral(3, axis=(-2, -1), name="out")(y)


def _of_the_library(self, w, hand, x):
    q, k, v = (nn.DenseGeneral((2, w // 2), use_bias=False, name=name)(x) for name in ("q", "k", "v"))
    y = jax.nn.dot_product_attention(q, k, v)
    return nn.DenseGeneral(3, axis=(-2, -1), name="out")(y)


class _NNX(nnx.Module):
    def __init__(self, w, rngs):
        self.first = nnx.Linear(7, w, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, w, decode=False, rngs=rngs)
        self.out = nnx.Linear(w, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.attention(self.first(x)))


def _zeros(mup: mujax.MupModel) -> set[str]:
    """The kernels that start at zero, by their initial values."""
    found = mup.init(jax.random.key(0), X)
    tree = nnx.to_pure_dict(nnx.state(found, nnx.Param)) if isinstance(found, nnx.Module) else found["params"]
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        "/".join(key.key for key in path) for path, leaf in leaves if not np.any(leaf) and leaf.ndim > 1
    } - {
        # Flax's own biases of heads have two axes, and are zero anyway.
        f"attention/{name}/bias"
        for name in ("query", "key", "value")
    }


@pytest.mark.parametrize(
    ("build", "query", "readout"),
    [
        (lambda w: Model(w, _linen), "attention/query/kernel", "out/kernel"),
        (lambda w: Model(w, _hand_written), "q/kernel", "out/kernel"),
        (lambda w: Model(w, _on_scaled_query), "q/kernel", "out/kernel"),
        (lambda w: Model(w, _of_the_library), "q/kernel", "out/kernel"),
        (lambda w: lambda rngs: _NNX(w, rngs), "attention/query/kernel", "out/kernel"),
    ],
    ids=["linen", "hand-written", "scaled query", "library", "nnx"],
)
def test_zero_readout_and_query(build, query, readout):
    assert _zeros(wrap(build, X)) == set()
    assert _zeros(wrap(build, X, zero_init=("query",))) == {query}
    mup = wrap(build, X, zero_init=("readout", "query"))
    assert _zeros(mup) == {query, readout}
    out = mup.apply(mup.init(jax.random.key(0), X), X)
    np.testing.assert_array_equal(out, jnp.zeros_like(out))


def test_a_tied_embedding_does_not_start_at_zero():
    mup = wrap(lambda w: PATTERNS["attend"].build(w, PLAIN), TOKENS, zero_init=("readout",))
    assert 0.0 not in mup.init_scales.values()


def test_an_unknown_name_in_zero_init_is_an_error():
    with pytest.raises(
        mujax.MujaxError, match=r"zero_init: expected names out of 'readout', 'query', got 'key'"
    ):
        wrap(mlp, X, zero_init=("key",))


# ---- multipliers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "multipliers", "hand"),
    [
        ("python_float", {"attention_mult": 3.0}, Hand(attention=3 / S, readout=1 / R)),
        ("python_float", {"output_mult": 3.0}, Hand(attention=1 / S, readout=3 / R)),
        ("query_key_l2_norm", {"attention_mult": 3.0}, Hand(attention=3.0, readout=1 / R)),
        ("soft_cap", {"attention_mult": 3.0}, Hand(attention=3 / S, readout=1 / R)),
        ("layers_in_scan_of_remat", {"attention_mult": 3.0}, Hand(attention=3 / S, readout=1 / R)),
        ("gemma", {"input_mult": 3.0}, Hand(scale=3 / S, readout=1 / R)),
        ("gemma", {"output_mult": 3.0}, Hand(scale=1 / S, readout=3 / R)),
        ("logits_in_chunks", {"output_mult": 3.0}, Hand(readout=3 / R)),
        ("gemma", {"output_mult": 2.0, "input_mult": 3.0, "attention_mult": 5.0}, Hand(0, 3 / S, 2 / R)),
    ],
)
def test_multipliers_act_where_they_should(name, multipliers, hand):
    pattern = PATTERNS[name]
    inputs = [TOKENS if i.dtype == jnp.int32 else X for i in pattern.inputs]
    mup = wrap(lambda w: pattern.build(w, PLAIN), *inputs)
    variables = variables_of(mup, *inputs)
    found = mup.with_multipliers(**multipliers).apply(variables, *inputs)
    same(found, by_hand(pattern, hand)(variables, *inputs))
    ones = mup.with_multipliers(**dict.fromkeys(multipliers, 1.0)).apply(variables, *inputs)
    np.testing.assert_array_equal(ones, mup.apply(variables, *inputs))


def _with_input_factor(self, w, factor, x):
    """An MLP whose factors stand before its biases."""
    x = times(nn.Dense(w, use_bias=False, name="first")(x), factor.scale)
    x = nn.relu(x + self.param("bias", nn.initializers.normal(1.0), (w,)))
    x = nn.relu(nn.Dense(w, name="second")(x))
    x = times(nn.Dense(3, use_bias=False, name="out")(x), factor.readout)
    return x + self.param("out_bias", nn.initializers.normal(1.0), (3,))


def test_multipliers_stand_before_the_biases_and_add_up_over_calls():
    mup = wrap(lambda w: Model(w, _with_input_factor), X)
    variables = variables_of(mup, X)
    tuned = (
        mup.with_multipliers(input_mult=7.0)
        .with_multipliers(output_mult=2.0)
        .with_multipliers(input_mult=3.0)
    )
    expected = Model(WIDTH, _with_input_factor, Hand(scale=3.0, readout=2 / R)).apply(variables, X)
    same(tuned.apply(variables, X), expected)


def test_multipliers_may_be_traced():
    """A sweep: one program, vmapped over the multipliers, jitted and differentiated."""
    pattern = PATTERNS["python_float"]
    mup = wrap(lambda w: pattern.build(w, PLAIN), X)
    variables = variables_of(mup, X)
    values = jnp.asarray([0.5, 1.0, 4.0])

    @jax.jit
    def run(output, attention):
        return mup.with_multipliers(output_mult=output, attention_mult=attention).apply(variables, X)

    found = jax.vmap(run)(values, values[::-1])
    for row, output, attention in zip(found, values, values[::-1], strict=True):
        same(row, by_hand(pattern, Hand(float(attention) / S, 1.0, float(output) / R))(variables, X))
    slope = jax.grad(lambda m: run(m, 1.0).sum())(2.0)
    same(slope, mup.apply(variables, X).sum())


def test_multipliers_act_at_the_base_width_too():
    """The base is where they are tuned; its own widths show with a delta."""
    pattern = PATTERNS["python_float"]
    build = pattern.build
    mup = mujax.mup_init(build(BASE, PLAIN), build(BASE, PLAIN), X, delta=build(16, PLAIN))
    variables = variables_of(mup, X)
    same(mup.apply(variables, X), build(BASE, PLAIN).apply(variables, X))
    tuned = mup.with_multipliers(output_mult=2.0, attention_mult=3.0)
    same(tuned.apply(variables, X), build(BASE, Hand(attention=3.0, readout=2.0)).apply(variables, X))


def test_multipliers_on_nnx():
    mup = wrap(lambda w: PATTERNS["nnx_attention"].build(w, PLAIN), X)
    module = mup.init(jax.random.key(0))
    tuned = mup.with_multipliers(output_mult=2.0)
    same(tuned.apply(module, X), 2.0 * mup.apply(module, X))
