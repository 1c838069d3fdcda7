"""Roles, multipliers and corrections of the model zoo, as numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from zoo import BASE, CASES, WIDTH, Case

import mujax
from mujax import rules


def wrap(case: Case, **kwargs) -> mujax.MupModel:
    return mujax.mup_init(case.build(WIDTH), case.build(BASE), *case.inputs, **kwargs)


@pytest.mark.abstract
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.samples) if name == "weight_norm" else name for name in CASES],
)
def test_roles_and_multipliers(name):
    case = CASES[name]
    mup = wrap(case)
    assert set(mup.spec) == set(case.params)
    for path, (role, fan_in, stack, init, adam, sgd) in case.params.items():
        param = mup.spec[path]
        assert (path, param.role, param.fan_in, param.stack) == (path, role, fan_in, stack)
        rest = tuple(a for a in range(len(param.shape)) if a not in (*fan_in, *stack))
        assert (path, param.fan_out) == (path, rest)
        assert (path, mup.init_scales.get(path, 1.0)) == (path, pytest.approx(init, rel=1e-6))
        chosen = mup.spec.parametrization
        found = (rules.lr_factor(param, chosen, "adam"), rules.lr_factor(param, chosen, "sgd"))
        assert (path, *found) == (path, pytest.approx(adam, rel=1e-12), pytest.approx(sgd, rel=1e-12))
    assert sorted((c.kind, c.factor, c.path) for c in mup.corrections) == sorted(
        (kind, pytest.approx(factor, rel=1e-12), path) for kind, factor, path in case.corrections
    )


def applied(case: Case):
    """The corrected model and the user's, as functions of a key and of variables."""
    mup, model = wrap(case), case.build(WIDTH)
    inputs = [jnp.ones(i.shape, i.dtype) for i in case.inputs]
    kwargs = {"rngs": {"dropout": jax.random.key(1)}}
    if "batch_stats" in jax.eval_shape(model.init, jax.random.key(0), *inputs):
        kwargs["mutable"] = ["batch_stats"]
    return [
        (lambda key, m=m: m.init(key, *inputs), lambda variables, m=m: m.apply(variables, *inputs, **kwargs))
        for m in (mup, model)
    ]


@pytest.mark.abstract
@pytest.mark.samples
@pytest.mark.parametrize("name", CASES)
def test_the_corrected_model_runs(name):
    """Same variables and outputs in shape and type as the user's model."""
    (init, apply), (their_init, their_apply) = applied(CASES[name])
    variables = jax.eval_shape(init, jax.random.key(0))
    assert variables == jax.eval_shape(their_init, jax.random.key(0))
    assert jax.eval_shape(apply, variables) == jax.eval_shape(their_apply, variables)


# Biases start at zero, so the factor of the only readout is the factor on the output.
ONE_READOUT = [
    name for name, case in CASES.items() if len(case.corrections) == 1 and "out/bias" in case.params
]


@pytest.mark.parametrize("name", ONE_READOUT)
def test_the_readouts_factor_is_in_the_numbers(name):
    case = CASES[name]
    (init, apply), (_, their_apply) = applied(case)

    @jax.jit
    def both(key):
        variables = init(key)
        return [jax.tree.leaves(run(variables))[0] for run in (apply, their_apply)]

    ours, plain = both(jax.random.key(0))
    ((_, factor, _),) = case.corrections
    rtol = 1e-2 if ours.dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(np.float32(ours), np.float32(plain) * factor, rtol=rtol)


@pytest.mark.abstract
def test_transposing_a_kernel_transposes_its_roles_and_nothing_else():
    class Net(nn.Module):
        width: int
        transpose: bool

        @nn.compact
        def __call__(self, x):
            x = nn.Dense(self.width, name="first")(x)
            shape = (self.width, 2 * self.width)
            stored = shape[::-1] if self.transpose else shape
            kernel = self.param("kernel", nn.initializers.normal(1.0), stored)
            return nn.Dense(3, name="out")(nn.relu(x @ (kernel.T if self.transpose else kernel)))

    x = jax.ShapeDtypeStruct((2, 7), jnp.float32)
    plain, turned = (mujax.mup_init(Net(24, t), Net(8, t), x) for t in (False, True))
    assert (plain.spec["kernel"].fan_in, turned.spec["kernel"].fan_in) == ((0,), (1,))
    assert turned.spec["kernel"].shape == plain.spec["kernel"].shape[::-1]
    for path in plain.spec:
        if path != "kernel":
            assert plain.spec[path] == turned.spec[path]
        assert plain.init_scales.get(path) == turned.init_scales.get(path)
    assert [c.factor for c in plain.corrections] == [c.factor for c in turned.corrections]


# ---- axes that a product is a batch over ---------------------------------------------------------------


def _scores(form: str):
    """Graph attention's logits: one vector per head, over nodes of so many heads."""
    return {
        "einsum": lambda x, att: jnp.einsum("nhc,hc->nh", x, att),
        "multiplied and summed": lambda x, att: (x * att).sum(-1),
        "after a nonlinearity": lambda x, att: (jax.nn.relu(x) * att).sum(-1),
        "the vector first": lambda x, att: (att[None] * x).sum(2),
        "pairs of nodes": lambda x, att: (jax.nn.relu(x[:, None] + x[None]) * att).sum(-1).sum(1),
    }[form]


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize(
    "form", ["einsum", "multiplied and summed", "after a nonlinearity", "the vector first", "pairs of nodes"]
)
def test_a_vector_for_each_head_reads_out(form, heads):
    """The heads are copies, however the sum is written and however many there are."""

    def model(heads, size):
        def init(key, x):
            wide = heads * size
            return {
                "in": jax.random.normal(key, (6, wide)),
                "att": jax.random.normal(key, (heads, size)),
                "out": jax.random.normal(key, (wide, 3)) / wide**0.5,
            }

        def apply(params, x):
            x = (x @ params["in"]).reshape(-1, heads, size)
            weights = jax.nn.softmax(_scores(form)(x, params["att"]), 0)
            return (x * weights[..., None]).reshape(-1, heads * size) @ params["out"]

        return mujax.Functional(init, apply)

    mup = mujax.mup_init(model(heads, 24), model(2, 8), jax.ShapeDtypeStruct((5, 6), jnp.float32))
    att = mup.spec["att"]
    assert (att.role, att.fan_in, att.fan_out, att.stack) == ("output", (1,), (), (0,))
    assert [c.factor for c in mup.corrections if c.path == "att"] == pytest.approx([1 / 3])


def test_the_axis_that_an_activation_is_repeated_along_is_fan_out():
    """The twin: a kernel that is multiplied and summed."""

    def model(width):
        def init(key, x):
            return {
                "in": jax.random.normal(key, (6, width)),
                "k": jax.random.normal(key, (width, width)) / width**0.5,
                "out": jax.random.normal(key, (width, 3)) / width**0.5,
            }

        def apply(params, x):
            x = jax.nn.relu(x @ params["in"])
            return jax.nn.relu((x[:, :, None] * params["k"]).sum(1)) @ params["out"]

        return mujax.Functional(init, apply)

    mup = mujax.mup_init(model(64), model(16), jax.ShapeDtypeStruct((5, 6), jnp.float32))
    assert (mup.spec["k"].role, mup.spec["k"].fan_in, mup.spec["k"].fan_out) == ("hidden", (0,), (1,))


@pytest.mark.parametrize("nonlinear", [lambda x: x, lambda x: jax.nn.silu(x.T).T])
def test_an_activation_that_is_repeated_along_a_merged_axis_is_fan_out_there(nonlinear):
    """A KAN layer: inputs repeated for each output by a product with ones, and summed for each output."""

    def model(width):
        def init(key, x):
            return {
                "in": jax.random.normal(key, (6, width)),
                "k": jax.random.normal(key, (width, width)) / width**0.5,
                "out": jax.random.normal(key, (width, 3)) / width**0.5,
            }

        def apply(params, x):
            x = jnp.tanh(x @ params["in"])
            rows, size = x.shape
            tiled = jnp.einsum("ij,k->ikj", x, jnp.ones(size)).reshape(rows, size * size)
            y = params["k"].reshape(1, size * size) * nonlinear(tiled)
            return jnp.tanh(y.reshape(rows, size, size).sum(2)) @ params["out"]

        return mujax.Functional(init, apply)

    mup = mujax.mup_init(model(64), model(16), jax.ShapeDtypeStruct((5, 6), jnp.float32))
    assert (mup.spec["k"].role, mup.spec["k"].fan_in, mup.spec["k"].fan_out) == ("hidden", (1,), (0,))
