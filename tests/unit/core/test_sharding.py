"""`mup.apply` on several devices: shard_map, sharded parameters, constraints inside the model."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import mujax

_PROGRAM = '''
import functools
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import mujax

mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def init(key, x, width):
    first, second, last = jax.random.split(key, 3)
    return {
        "first": jax.random.normal(first, (7, width)),
        "second": jax.random.normal(second, (width, width)) / width**0.5,
        "out": jax.random.normal(last, (width, 3)) / width**0.5,
    }


def local(params, x):
    """Tensor parallelism by hand: the last contraction is a sum over devices."""
    x = jnp.tanh(x @ params["first"])
    x = jnp.tanh(x @ params["second"])
    return jax.lax.psum(x @ params["out"], "model")


def by_hand(params, x):
    specs = {"first": P(), "second": P(None, "model"), "out": P("model", None)}
    return jax.shard_map(local, mesh=mesh, in_specs=(specs, P("data")), out_specs=P("data"))(params, x)


def whole(params, x):
    return jnp.tanh(jnp.tanh(x @ params["first"]) @ params["second"]) @ params["out"]


x = jax.random.normal(jax.random.key(1), (8, 7))
model = {w: mujax.Functional(functools.partial(init, width=w), by_hand) for w in (8, 32)}
mup = mujax.mup_init(model[32], model[8], x)
assert not mup.findings, mup.findings
assert {path: spec.role for path, spec in mup.spec.items()} == {
    "first": "input", "second": "hidden", "out": "output"
}
params = mup.init(jax.random.key(0), x)
out = jax.jit(mup.apply)(params, x)
np.testing.assert_allclose(out, whole(params, x) / 4, rtol=1e-5)
gradient = jax.jit(jax.grad(lambda p: mup.apply(p, x).sum()))(params)
expected = jax.grad(lambda p: whole(p, x).sum() / 4)(params)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, expected)


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width)(x)
        x = jax.lax.with_sharding_constraint(nn.relu(x), NamedSharding(mesh, P("data", "model")))
        return nn.Dense(3)(x)


mup = mujax.mup_init(Net(32), Net(8), x)
variables = mup.init(jax.random.key(0), x)
place = {(7, 32): P(None, "model"), (32,): P("model"), (32, 3): P("model", None), (3,): P()}
variables = jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, place[a.shape])), variables)
batch = jax.device_put(x, NamedSharding(mesh, P("data")))
lowered = jax.jit(mup.apply).lower(variables, batch)
assert "sharding_constraint" in lowered.as_text() or "sdy.sharding" in lowered.as_text()
np.testing.assert_allclose(jax.jit(mup.apply)(variables, batch), Net(32).apply(variables, x) / 4, rtol=1e-4)
print("ok")
'''


def test_on_eight_devices():
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(pathlib.Path(mujax.__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "ok"


class _Bag(nn.Module):
    """Looks words up in its call, reads out with the same table in another method."""

    width: int

    def setup(self):
        self.embed = nn.Embed(11, self.width)

    def __call__(self, tokens):
        return self.embed(tokens).mean(-1)

    def read_out(self, x):
        return self.embed.attend(x)


def test_readout_of_a_tied_embedding_in_a_method_that_was_not_traced():
    tokens = jnp.zeros((2, 5), int)
    mup = mujax.mup_init(_Bag(32), _Bag(8), tokens)
    assert mup.corrections == ()
    variables = mup.init(jax.random.key(0), tokens)

    def score(model, variables):
        def through(module, tokens):
            return module.read_out(module.embed(tokens))

        return model.apply(variables, tokens, method=through)

    np.testing.assert_allclose(score(mup, variables), score(_Bag(32), variables) / 4, rtol=1e-6)
