"""Each correction is needed: without it a coordinate check fails that the corrected model passes.

The check is that of Tensor Programs V, Appendix D.1: over a few Adam steps at a large learning rate, the
change of an activation (or of the logits) must neither blow up nor vanish as width grows 64-fold.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import mujax

BASE = 8
# A width in the middle would have no weight in the fit.
WIDTHS = (16, 1024)
SEEDS, STEPS, BATCH, LENGTH = 4, 4, 4, 4
# Where the exact exponent is 0 the fit is within this; a missing factor moves it by 1/2 or 1.
TOLERANCE = 0.2


class Model(nn.Module):
    """A body that returns its logits and a coordinate: what is watched."""

    width: int
    body: Callable

    @nn.compact
    def __call__(self, x):
        return self.body(self, self.width, x)


@dataclasses.dataclass(frozen=True)
class Twin:
    """A model and the corrections without which it fails.

    Attributes:
        body: `(self, width, input) -> (logits, coordinate)`.
        off: the kinds to switch off.
        slope: how the change of the coordinate then scales with width.
        tokens: whether its inputs are tokens.
    """

    body: Callable
    off: tuple[str, ...]
    slope: float
    tokens: bool = False


_normal = nn.initializers.normal(1.0)


def _attention(self, w, x):
    q, k, v = (nn.Dense(w, use_bias=False, name=name)(x) for name in ("q", "k", "v"))
    logits = q @ k.swapaxes(-1, -2) / jnp.sqrt(w)
    return nn.Dense(3, use_bias=False, name="out")(nn.softmax(logits) @ v), logits


def _weigh(q, k, v):
    logits = q @ k.swapaxes(-1, -2) / jnp.sqrt(q.shape[-1])
    return nn.softmax(logits) @ v, logits


_own_weigh = jax.custom_vjp(_weigh)
_own_weigh.defvjp(lambda *args: (_weigh(*args), args), lambda args, g: jax.vjp(_weigh, *args)[1](g))


def _own_rule(self, w, x):
    """Attention with a derivative of its own: the factor is on the query, outside of it."""
    q, k, v = (nn.Dense(w, use_bias=False, name=name)(x) for name in ("q", "k", "v"))
    out, logits = _own_weigh(q, k, v)
    return nn.Dense(3, use_bias=False, name="out")(out), logits


def _tied(self, w, tokens):
    embed = nn.Embed(11, w, embedding_init=_normal)
    logits = embed.attend(nn.RMSNorm()(embed(tokens)))
    return logits, logits


def _gemma(self, w, tokens):
    embed = nn.Embed(11, w)
    x = embed(tokens) * jnp.sqrt(w).astype(jnp.float32)
    return embed.attend(nn.RMSNorm()(x)), x


def _ntk(self, w, x):
    x = nn.relu(x @ self.param("first", _normal, (7, w)) / 7**0.5)
    x = x @ self.param("second", _normal, (w, w)) / w**0.5
    return nn.Dense(3, use_bias=False, name="out")(nn.relu(x)), x


def _weight_norm(self, w, x):
    x = nn.relu(nn.Dense(w, use_bias=False, name="first")(x))
    logits = nn.WeightNorm(nn.Dense(3, use_bias=False, name="out"), name="norm")(x)
    return logits, logits


def _weight_standardisation(self, w, x):
    x = nn.relu(nn.Dense(w, use_bias=False, name="first")(x))
    kernel = self.param("second", nn.initializers.lecun_normal(), (w, w))
    x = x @ ((kernel - kernel.mean(0)) / (kernel.std(0) + 1e-5))
    return nn.Dense(3, use_bias=False, name="out")(nn.relu(x) / BASE**0.5), x


def _unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _cosine(self, w, x):
    x = nn.relu(nn.Dense(w, use_bias=False, name="first")(x))
    logits = 10.0 * _unit(x) @ _unit(self.param("out", nn.initializers.lecun_normal(1, 0), (3, w))).T
    return logits, logits


TWINS = {
    "attention": Twin(_attention, ("attention",), 0.5),
    "attention with its own derivative": Twin(_own_rule, ("attention",), 0.5),
    "tied": Twin(_tied, ("tied_readout",), 1.0, tokens=True),
    "gemma": Twin(_gemma, ("scale",), 0.5, tokens=True),
    "ntk": Twin(_ntk, ("scale",), -0.5),
    "weight norm": Twin(_weight_norm, ("scale",), -0.5),
    "weight standardisation": Twin(_weight_standardisation, ("scale",), 0.5),
    "cosine": Twin(_cosine, ("scale",), -1.0),
}


def slope_of_change(twin: Twin, off: tuple[str, ...]) -> float:
    """The exponent of width in the mean change of the coordinate over training."""
    rng = np.random.default_rng(0)
    shape = (BATCH, LENGTH) if twin.tokens else (BATCH, LENGTH, 7)
    x = jnp.asarray(rng.integers(0, 11, shape) if twin.tokens else rng.normal(size=shape))
    y = jnp.asarray(rng.integers(0, 3, (BATCH, LENGTH)))
    changes = []
    for width in WIDTHS:
        mup = mujax.mup_init(
            Model(width, twin.body), Model(BASE, twin.body), x, corrections=dict.fromkeys(off, False)
        )
        optimizer = mujax.mup_adam(2.0**-5, mup.spec)

        def change(key, mup=mup, optimizer=optimizer):
            def loss(variables):
                logits, coordinate = mup.apply(variables, x)
                picked = jnp.take_along_axis(nn.log_softmax(logits), y[..., None], axis=-1)
                return -picked.mean(), coordinate

            def step(carry, _):
                params, state = carry
                (_, coordinate), grads = jax.value_and_grad(loss, has_aux=True)({"params": params})
                updates, state = optimizer.update(grads["params"], state, params)
                return (jax.tree.map(jnp.add, params, updates), state), coordinate

            params = mup.init(key)["params"]
            _, coordinates = jax.lax.scan(step, (params, optimizer.init(params)), length=STEPS + 1)
            return jnp.abs(coordinates[-1] - coordinates[0]).mean()

        changes.append(jax.jit(jax.vmap(change))(jax.random.split(jax.random.key(0), SEEDS)).mean())
    return float(np.polyfit(np.log2(WIDTHS), np.log2(changes), 1)[0])


@pytest.mark.parametrize("name", TWINS)
def test_the_check_passes_with_the_correction_and_fails_without(name):
    twin = TWINS[name]
    assert slope_of_change(twin, ()) == pytest.approx(0.0, abs=TOLERANCE)
    assert slope_of_change(twin, twin.off) == pytest.approx(twin.slope, abs=TOLERANCE)
