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


@pytest.mark.parametrize("name", CASES)
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


@pytest.mark.parametrize("name", CASES)
def test_the_corrected_model_runs(name):
    """Same variables and outputs in shape as the user's model; the readout's factor is in the numbers."""
    case = CASES[name]
    mup = wrap(case)
    model = case.build(WIDTH)
    inputs = [jnp.ones(i.shape, i.dtype) for i in case.inputs]
    variables = mup.init(jax.random.key(0), *inputs)
    theirs = model.init(jax.random.key(0), *inputs)
    assert jax.tree.structure(variables) == jax.tree.structure(theirs)
    kwargs = {"rngs": {"dropout": jax.random.key(1)}}
    if "batch_stats" in variables:
        kwargs["mutable"] = ["batch_stats"]
    ours = mup.apply(variables, *inputs, **kwargs)
    plain = model.apply(variables, *inputs, **kwargs)
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, plain)
    if len(case.corrections) == 1 and "out/bias" in case.params:
        # Biases start at zero, so the factor of the only readout is the factor on the output.
        ours, plain = (out[0] if "mutable" in kwargs else out for out in (ours, plain))
        np.testing.assert_allclose(
            np.asarray(ours, np.float32), np.asarray(plain, np.float32) * case.corrections[0][1], rtol=1e-2
        )


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
