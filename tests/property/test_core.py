"""Properties that hold for any network of a family, any widths and any key."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx
from hypothesis import given, settings, strategies as st

import mujax
from mujax import rules

FEW = settings(max_examples=3, deadline=None, derandomize=True)
STEPS = 6


_lecun = nn.initializers.lecun_normal()


@contextlib.contextmanager
def doubles():
    """Double precision inside, as it was outside."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


class Net(nn.Module):
    """A network with an embedding, hidden layers of drawn widths, and optional parts."""

    widths: tuple[int, ...]
    bias: bool
    norm: bool
    tied: bool
    transposed: bool = False

    @nn.compact
    def __call__(self, tokens):
        first, *rest = self.widths
        embed = nn.Embed(7, first, name="embed", param_dtype=jnp.float64)
        x = embed(tokens)
        for number, width in enumerate([*rest, first]):
            shape = (x.shape[-1], width)
            if self.transposed:
                kernel = self.param(
                    f"kernel_{number}", lambda k, s: _lecun(k, s[::-1], jnp.float64).T, shape[::-1]
                )
                x = x @ kernel.T
            else:
                x = x @ self.param(f"kernel_{number}", lambda k, s: _lecun(k, s, jnp.float64), shape)
            if self.bias:
                x = x + self.param(f"bias_{number}", nn.initializers.normal(0.3), (width,), jnp.float64)
            if self.norm:
                x = nn.LayerNorm(name=f"norm_{number}", param_dtype=jnp.float64)(x)
            x = jnp.tanh(x)
        if self.tied:
            return embed.attend(x)
        return nn.Dense(7, name="out", param_dtype=jnp.float64)(x)


@st.composite
def networks(draw):
    depth = draw(st.integers(2, 3))
    base = tuple(draw(st.integers(2, 5)) for _ in range(depth))
    grow = tuple(draw(st.sampled_from([2, 3, 5])) for _ in range(depth))
    parts = {"bias": draw(st.booleans()), "norm": draw(st.booleans()), "tied": draw(st.booleans())}
    return base, grow, parts


def build(base, grow, parts, **more):
    wide = tuple(b * g for b, g in zip(base, grow, strict=True))
    return Net(wide, **parts, **more), Net(base, **parts, **more)


TOKENS = np.array([[0, 3, 5], [6, 1, 2]])
LABELS = np.array([[1, 0, 2], [5, 4, 3]])


class Trained:
    """A model whose initial values and gradients are compiled once for all optimizers."""

    def __init__(self, mup):
        def loss(variables):
            logits = mup.apply(variables, TOKENS)
            return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()

        self.spec = mup.spec
        self.variables = jax.jit(mup.init)(jax.random.key(3), TOKENS)
        self.value_and_grad = jax.jit(jax.value_and_grad(loss))

    def losses(self, tx):
        """The loss before each of some steps from the same key."""

        @jax.jit
        def update(variables, state, gradients):
            updates, state = tx.update(gradients, state, variables)
            return optax.apply_updates(variables, updates), state

        variables, state, found = self.variables, tx.init(self.variables), []
        for _ in range(STEPS):
            value, gradients = self.value_and_grad(variables)
            variables, state = update(variables, state, gradients)
            found.append(float(value))
        return np.array(found)


def adamw(spec):
    return mujax.mup_adamw(0.02, spec, eps=1e-3, weight_decay=0.2)


def sgd(spec):
    return mujax.mup_sgd(0.3, spec, momentum=0.9)


@FEW
@given(networks())
def test_tables_3_8_and_9_are_one_run(network):
    """With both kinds of learning rates; tests/unit/optim/test_optim_runs.py has all optimizers."""
    with doubles():
        target, base = build(*network)
        models = {
            table: Trained(mujax.mup_init(target, base, TOKENS, parametrization=table))
            for table in ("mup", "table3", "table9")
        }
        for optimizer in (adamw, sgd):
            curves = {table: model.losses(optimizer(model.spec)) for table, model in models.items()}
            for table in ("table3", "table9"):
                message = f"{optimizer.__name__}, {table}"
                np.testing.assert_allclose(curves[table], curves["mup"], rtol=1e-9, err_msg=message)
            assert abs(curves["mup"][-1] / curves["mup"][0] - 1) > 1e-3


def test_a_wrong_exponent_shows(monkeypatch):
    """The twin of the test above: with Table 9's input learning rate at Table 8's, the runs part."""
    with doubles():
        target, base = build((3, 4), (3, 2), {"bias": True, "norm": False, "tied": False})
        mup = Trained(mujax.mup_init(target, base, TOKENS))
        right = mup.losses(adamw(mup.spec))
        row = rules.TABLES["table9"]["input"]
        broken = {
            **rules.TABLES["table9"],
            "input": rules.Row(row.init, row.forward, {"adam": (0.0, 0.0)}, ""),
        }
        monkeypatch.setattr(rules, "TABLES", {**rules.TABLES, "table9": broken})
        other = Trained(mujax.mup_init(target, base, TOKENS, parametrization="table9"))
        wrong = other.losses(adamw(other.spec))
        np.testing.assert_allclose(wrong[0], right[0], rtol=1e-9)
        assert np.abs(wrong / right - 1).max() > 1e-4


@FEW
@given(networks())
def test_base_equals_target_is_the_identity(network):
    base_widths, grow, parts = network
    with doubles():
        wide, base = build(base_widths, grow, parts)
        mup = mujax.mup_init(base, base, TOKENS, delta=wide)
        ours, theirs = (m.init(jax.random.key(1), TOKENS) for m in (mup, base))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
        np.testing.assert_array_equal(mup.apply(ours, TOKENS), base.apply(theirs, TOKENS))
        assert all(factor == 1.0 for factor in mup.init_scales.values())
        assert all(correction.factor == 1.0 for correction in mup.corrections)
        for param in mup.spec.values():
            assert (param.r_in, param.r_out) == (1.0, 1.0)
        model = Trained(mup)
        plain, ours = (model.losses(tx) for tx in (optax.adam(0.02), mujax.mup_adam(0.02, mup.spec)))
        np.testing.assert_array_equal(ours, plain)


@FEW
@given(networks())
def test_transposing_a_kernel_transposes_its_roles_and_nothing_else(network):
    with doubles():
        plain, turned = (mujax.mup_init(*build(*network, transposed=t), TOKENS) for t in (False, True))
        assert set(plain.spec) == set(turned.spec)
        for path, param in plain.spec.items():
            other = turned.spec[path]
            if path.startswith("kernel"):
                assert (param.fan_in, other.fan_in) == ((0,), (1,))
                assert other.shape == param.shape[::-1]
            else:
                assert other == param
            assert (other.role, other.r_in, other.r_out) == (param.role, param.r_in, param.r_out)
            assert turned.init_scales.get(path) == pytest.approx(plain.init_scales.get(path))
        assert [c.factor for c in turned.corrections] == [c.factor for c in plain.corrections]


class _Linen(nn.Module):
    width: int
    bias: bool

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.width, use_bias=self.bias, name="first")(x))
        x = nn.LayerNorm(name="norm")(nn.Dense(2 * self.width, use_bias=self.bias, name="second")(x))
        return nn.Dense(3, name="out")(x)


class _NNX(nnx.Module):
    def __init__(self, width, bias, *, rngs):
        self.first = nnx.Linear(5, width, use_bias=bias, rngs=rngs)
        self.second = nnx.Linear(width, 2 * width, use_bias=bias, rngs=rngs)
        self.norm = nnx.LayerNorm(2 * width, rngs=rngs)
        self.out = nnx.Linear(2 * width, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.norm(self.second(nnx.relu(self.first(x)))))


@FEW
@given(st.integers(2, 6), st.sampled_from([2, 3, 5]), st.booleans())
def test_linen_and_nnx_twins_agree(base, grow, bias):
    x = jax.random.normal(jax.random.key(0), (4, 5))
    linen = mujax.mup_init(_Linen(base * grow, bias), _Linen(base, bias), x)
    factory = {w: lambda rngs, w=w: _NNX(w, bias, rngs=rngs) for w in (base * grow, base)}
    other = mujax.mup_init(factory[base * grow], factory[base], x)
    assert dict(linen.spec) == dict(other.spec)
    assert dict(linen.init_scales) == pytest.approx(dict(other.init_scales))
    assert [(c.kind, c.factor, c.path) for c in linen.corrections] == [
        (c.kind, c.factor, c.path) for c in other.corrections
    ]
    module = other.init(jax.random.key(2))
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    np.testing.assert_allclose(
        other.apply(module, x), linen.apply({"params": params}, x), rtol=1e-6, atol=1e-6
    )
    plain = _Linen(base * grow, bias).apply({"params": params}, x)
    assert np.abs(np.asarray(plain) - np.asarray(linen.apply({"params": params}, x))).max() > 1e-3
