"""A readout whose product is divided by its own norm is reported: its first step grows with width."""

import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn

import mujax

BASE = 32
X = jax.ShapeDtypeStruct((4, 8), jnp.float32)


class Net(nn.Module):
    """Two layers, and what `end` makes of their features."""

    width: int
    end: Callable

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.Dense(self.width)(x))
        return self.end(self, x)


def small(x, features=6, **options):
    return nn.Dense(features, name="small", **options)(x)


def mean_square_norm(z):
    return z * jax.lax.rsqrt(jnp.mean(z**2, -1, keepdims=True) + 1e-6)


def two_norms(self, x):
    z, y = small(x), nn.Dense(6, name="other")(x)
    return nn.LayerNorm()(z) @ nn.LayerNorm()(y).T


def pre_norm_layers(self, h):
    """Three layers of one size in a scan, each with a norm in front and a bias that is no zero."""
    kernels = self.param("kernels", nn.initializers.lecun_normal(batch_axis=0), (3, 6, 6))
    biases = self.param("biases", nn.initializers.normal(0.3), (3, 6))

    def layer(h, p):
        return h + mean_square_norm(h) @ p[0] + p[1], None

    return jax.lax.scan(layer, h, (kernels, biases))[0]


NORMED = {
    "layer norm": lambda self, x: nn.LayerNorm()(small(x)),
    "after a gain": lambda self, x: nn.LayerNorm()(2.0 * small(x, use_bias=False)),
    "root mean square": lambda self, x: mean_square_norm(small(x)),
    "unit vectors": lambda self, x: (z := small(x)) / jnp.linalg.norm(z, axis=-1, keepdims=True),
    "no smaller than": lambda self, x: (
        (z := small(x)) / jnp.maximum(jnp.sqrt((z * z).sum(-1, keepdims=True)), 1e-6)
    ),
    "batch statistics": lambda self, x: ((z := small(x)) - z.mean(0)) / jnp.sqrt(z.var(0) + 1e-5),
    "groups": lambda self, x: nn.GroupNorm(2)(small(x)),
    "largest entry": lambda self, x: (z := small(x)) / (1e-6 + jnp.abs(z).max(-1, keepdims=True)),
    "heads": lambda self, x: nn.LayerNorm()(small(x, 8).reshape(-1, 2, 4)),
    "behind another layer": lambda self, x: nn.LayerNorm()(nn.Dense(6)(nn.relu(small(x)))),
    "behind a layer that grows": lambda self, x: nn.LayerNorm()(nn.Dense(self.width)(small(x))),
    "behind two layers": lambda self, x: nn.LayerNorm()(nn.Dense(5)(nn.gelu(nn.Dense(4)(small(x))))),
    "behind a convolution": lambda self, x: nn.GroupNorm(2)(nn.Conv(4, (3,))(small(x)[..., None])),
    "batch statistics behind a layer": lambda self, x: (
        ((z := nn.Dense(self.width)(small(x))) - z.mean(0)) / (z.std(0) + 1e-3)
    ),
    "behind a bounded function": lambda self, x: nn.LayerNorm()(nn.Dense(5)(jnp.tanh(small(x)))),
    "behind a function that is linear at zero": lambda self, x: nn.LayerNorm()(
        nn.Dense(self.width)(nn.celu(small(x)))
    ),
    "behind a hidden layer": lambda self, x: nn.LayerNorm()(
        nn.Dense(self.width)(nn.relu(nn.Dense(self.width)(small(x))))
    ),
    "in a checkpoint": lambda self, x: nn.remat(nn.LayerNorm)()(small(x)),
    "in the first step of a loop": lambda self, x: pre_norm_layers(self, small(x)),
}
NOT_NORMED = {
    "a readout": lambda self, x: small(x),
    "a norm in front": lambda self, x: small(nn.LayerNorm()(x)),
    "features that grow": lambda self, x: nn.LayerNorm()(nn.Dense(self.width, name="small")(x)),
    "added to a stream of fixed size": lambda self, x: nn.LayerNorm()(
        jnp.ones(6) + jnp.sin(x[:, :6]) + small(x)
    ),
    "a bounded function": lambda self, x: jnp.tanh(small(x)),
    "a layer behind it": lambda self, x: nn.Dense(5)(nn.relu(small(x))),
    "a norm behind the sum with features": lambda self, x: nn.LayerNorm()(x + nn.Dense(self.width)(small(x))),
    "a norm of the gate's features": lambda self, x: nn.LayerNorm()(
        x * nn.sigmoid(nn.Dense(self.width)(nn.relu(small(x))))
    ),
    "a function that is one at zero": lambda self, x: nn.LayerNorm()(nn.Dense(5)(1 + nn.elu(small(x)))),
    "a square": lambda self, x: small(x) ** 2,
    "divided by another's norm": lambda self, x: small(x) / (1 + jnp.linalg.norm(x[:, :3], axis=-1)[:, None]),
    "in the later steps of a loop": lambda self, x: pre_norm_layers(self, small(x) + jnp.sin(x[:, :6])),
    "divided by a stored size": lambda self, x: small(x) / self.variable("s", "s", jnp.ones, ()).value,
}


def findings(end: Callable) -> list[mujax.Finding]:
    found = mujax.audit(Net(64, end), Net(BASE, end), X)
    return [finding for finding in found if finding.kind == "normalised readout"]


@pytest.mark.parametrize("name", NORMED)
def test_a_readout_that_its_norm_divides_is_reported(name):
    (finding,) = findings(NORMED[name])
    assert finding.message.startswith("the product of small/kernel,")
    assert finding.where.startswith("tests/unit/core/trace/test_readouts.py:")


def test_each_readout_is_named():
    assert [finding.message.split(",")[0].split()[-1] for finding in findings(two_norms)] == [
        "small/kernel",
        "other/kernel",
    ]


@pytest.mark.parametrize("name", NOT_NORMED)
def test_others_are_not(name):
    assert findings(NOT_NORMED[name]) == []


def attend(weigh: Callable, self, x):
    """The features, weighed by a function of queries and keys."""
    q, k = (nn.Dense(self.width, use_bias=False, name=name)(x) for name in ("query", "key"))
    return weigh(q, k / self.width) @ x


def of_features(q, k):
    """Positive features, as in linear attention: their products do not cancel."""
    kv, ones = nn.relu(q) @ nn.relu(k).T, jnp.ones((k.shape[0], 1))
    return kv / (kv @ ones)


NORMED_LOGITS = {
    "relu": lambda q, k: nn.relu(q @ k.T),
    "as they are": lambda q, k: q @ k.T,
    "with unit queries": lambda q, k: q * jax.lax.rsqrt((q**2).mean(-1, keepdims=True)) @ k.T,
    "masked": lambda q, k: nn.relu(jnp.where(jnp.tri(len(q)) > 0, q @ k.T, -1e9)),
    "bounded": lambda q, k: jnp.tanh(q @ k.T),
}
OTHER_LOGITS = {
    "softmax": lambda q, k: nn.softmax(q @ k.T),
    "sigmoid": lambda q, k: nn.sigmoid(q @ k.T),
    "positive features": of_features,
    "features that a choice keeps positive": lambda q, k: jnp.where(q > 0, q, 0) @ jnp.where(k > 0, k, 0).T,
    "squares": lambda q, k: (q * q) @ (k * k).T,
    "their own products": lambda q, k: q @ q.T / q.shape[-1],
    "with the features themselves": lambda q, k: nn.relu(q @ k.T) + jnp.eye(len(q)),
}


def normed(weigh: Callable) -> Callable:
    return lambda self, x: nn.Dense(6, name="small")(mean_square_norm(attend(weigh, self, x)))


def six_of(weigh: Callable) -> Callable:
    return lambda self, x: mean_square_norm(attend(weigh, self, x))[:, :6]


@pytest.mark.parametrize("name", NORMED_LOGITS)
def test_logits_that_a_norm_divides_are_reported(name):
    (finding,) = findings(normed(NORMED_LOGITS[name]))
    assert finding.message.startswith("the product of query/kernel with that of key/kernel,")


@pytest.mark.parametrize("name", OTHER_LOGITS)
def test_other_logits_are_not(name):
    assert findings(normed(OTHER_LOGITS[name])) == []


def fused(split: Callable) -> Callable:
    """Logits of queries and keys that one kernel makes, without a softmax, in front of a norm."""

    def end(self, x):
        both = nn.Dense(2 * self.width, use_bias=False, name="both")(x)
        q, k = split(both, self.width)
        return nn.Dense(6, name="small")(mean_square_norm(nn.relu(q @ k.T / self.width) @ x))

    return end


FUSED = {
    "split": lambda both, n: jnp.split(both, 2, axis=-1),
    "sliced": lambda both, n: (both[:, :n], both[:, n:]),
    "by an axis of its own": lambda both, n: jnp.unstack(both.reshape(-1, 2, n), axis=1),
    "by an index": lambda both, n: ((z := both.reshape(-1, n, 2))[..., 0], z[..., 1]),
    "split, and of unit length": lambda both, n: (mean_square_norm(h) for h in jnp.split(both, 2, axis=-1)),
    "by a stride": lambda both, n: (both[:, ::2], both[:, 1::2]),
    "by two reshapes": lambda both, n: (both.reshape(-1, 2, n)[:, 0], both.reshape(-1, 2, n)[:, 1]),
    "in a jitted function": lambda both, n: jax.jit(lambda h: (h[:, :n], h[:, n:]))(both),
}
ONE_PART = {
    "the same slice": lambda both, n: (both[:, :n], both[:, :n]),
    "slices that overlap": lambda both, n: (both[:, :n], both[:, n // 2 : n // 2 + n]),
    "the same part of a split": lambda both, n: [jnp.split(both, 2, axis=-1)[1]] * 2,
    "the same part of two reshapes": lambda both, n: [both.reshape(-1, 2, n)[:, 1] for _ in range(2)],
    "strides that meet": lambda both, n: (both[:, ::2], both[:, :n]),
    "all of it": lambda both, n: (both, both),
}


@pytest.mark.parametrize("name", FUSED)
def test_logits_of_a_fused_projection_are_as_those_of_two(name):
    (finding,) = findings(fused(FUSED[name]))
    assert finding.message.startswith("the product of both/kernel with another part of it,")
    assert finding.message.endswith("take a softmax of the products, or leave the norm out")


@pytest.mark.parametrize("name", ONE_PART)
def test_logits_of_one_part_of_a_projection_are_not(name):
    assert findings(fused(ONE_PART[name])) == []


def test_heads_of_one_size_are_not():
    def end(self, x):
        q, k = (nn.Dense(self.width)(x).reshape(len(x), -1, 8) for _ in range(2))
        logits = jnp.einsum("qhd,khd->hqk", q, k) / 8**0.5
        return nn.Dense(6)(mean_square_norm(jnp.einsum("hqk,khd->qhd", nn.relu(logits), k).reshape(x.shape)))

    assert findings(end) == []


def growth_of_first_step(end: Callable) -> float:
    """Change of the output by one step of Adam, at a width of 1024 over that at 64."""
    x = jax.random.normal(jax.random.key(1), (16, 8))
    goal = jax.random.normal(jax.random.key(2), (16, 6))
    changes = []
    for width in (64, 1024):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mup = mujax.mup_init(Net(width, end), Net(BASE, end), X)
        tx = mujax.mup_adam(2**-9, mup.spec)

        @jax.jit
        def change(key, mup=mup, tx=tx):
            variables = mup.init(key, x)
            grads = jax.grad(lambda v: jnp.mean((mup.apply(v, x) - goal) ** 2))(variables)
            updates, _ = tx.update(grads["params"], tx.init(variables["params"]))
            stepped = {"params": optax.apply_updates(variables["params"], updates)}
            return jnp.abs(mup.apply(stepped, x) - mup.apply(variables, x)).mean()

        changes.append(float(jnp.mean(jnp.stack([change(jax.random.key(s)) for s in range(3)]))))
    return changes[1] / changes[0]


def test_what_is_reported_grows_with_width_and_a_readout_does_not():
    assert growth_of_first_step(NORMED["root mean square"]) > 1.8
    assert growth_of_first_step(NORMED["behind another layer"]) > 1.8
    positive = growth_of_first_step(six_of(OTHER_LOGITS["positive features"]))
    assert growth_of_first_step(six_of(NORMED_LOGITS["masked"])) > 1.3 * positive
    assert growth_of_first_step(NOT_NORMED["a readout"]) < 1.2
