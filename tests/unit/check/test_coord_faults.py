"""Planted faults: the coordinate check fails on each, and blames what was tampered with."""

import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import mujax
from mujax.spec import ParamSpec

WIDTHS = (32, 128)
BASE = WIDTHS[0]
X = jax.random.normal(jax.random.key(0), (8, 12))
TOKENS = jax.random.randint(jax.random.key(0), (2, 8), 0, 32)


class Net(nn.Module):
    """An MLP in which a hand-written factor can stand in the wrong place."""

    width: int
    ff: int = 0
    before_bias: float = 1.0
    after_bias: float = 1.0
    up_init: Callable[..., Any] = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(self.width, name="first")(x))
        x = nn.LayerNorm(name="norm")(x)
        x = jnp.tanh(nn.Dense(self.ff or 2 * self.width, name="up", kernel_init=self.up_init)(x))
        x = jnp.tanh(nn.Dense(self.width, name="down")(x))
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (self.width, 8))
        bias = self.param("bias", nn.initializers.zeros, (8,))
        return ((x @ kernel) * self.before_bias + bias) * self.after_bias


class Stream(nn.Module):
    """A residual block on an embedding, with the constants that people put into it."""

    width: int
    stream: float = 1.0
    lookup: float = 1.0
    tied: bool = False

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(32, self.width, name="embed")
        x = embed(tokens) * self.lookup
        y = nn.LayerNorm(name="norm")(x)
        y = nn.MultiHeadDotProductAttention(4, name="attention")(y)
        x = x * self.stream + nn.Dense(self.width, name="mix")(y)
        x = nn.LayerNorm(name="last_norm")(x)
        return embed.attend(x) if self.tied else nn.Dense(32, name="readout")(x)


class Cosine(nn.Module):
    """Logits that are cosines with a gain, times the root of the width."""

    width: int

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(self.width, name="first")(x))
        x = jnp.tanh(nn.Dense(self.width, name="up")(x))
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (self.width, 8))
        gain = self.param("gain", nn.initializers.ones, (8,))
        x, kernel = (y / jnp.linalg.norm(y, axis=axis, keepdims=True) for y, axis in ((x, -1), (kernel, 0)))
        return x @ kernel * gain * self.width**0.5


def tampered(optimizer: str, factors: Mapping[str, Callable[[ParamSpec], float]], **settings: Any):
    """The right optimizer, with the updates of some parameters scaled in a wrong way."""

    def make(rate, spec):
        def scale(path, update):
            for pattern, factor in factors.items():
                name = "/".join(key.key for key in path)
                if fnmatch.fnmatch(name, pattern):
                    return update * factor(spec[name])
            return update

        def update(updates, state, params=None):
            return jax.tree_util.tree_map_with_path(scale, updates), state

        right = getattr(mujax, f"mup_{optimizer}")(rate, spec, **settings)
        return optax.chain(right, optax.GradientTransformation(lambda _: optax.EmptyState(), update))

    return make


def started(model: Callable[..., Any], inputs: Any, scales: Mapping[str, float | None]):
    """The right model, but some parameters keep the values of the user's own initialiser."""

    def factory(width):
        delta = model(width=2 * width)
        mup = mujax.mup_init(model(width=width), model(width=BASE), inputs, delta=delta)
        changed = {path: value for path, value in scales.items() if value is not None}
        kept = {path: value for path, value in mup.init_scales.items() if path not in scales}
        return dataclasses.replace(mup, init_scales={**kept, **changed})

    return factory


class Planted(NamedTuple):
    """A fault: the model and how it is checked, and what must be blamed for it."""

    name: str
    rule: str
    model: Callable[[int], Any]
    inputs: Any = X
    optimizer: Any = "adam"
    settings: Mapping[str, Any] = {}


def _swapped(width: int) -> ParamSpec:
    return ParamSpec((12, width), (12, BASE), fan_in=(1,), fan_out=(0,), infinite=(1,))


def _misread(width: int) -> Any:
    model = lambda width: Net(width)  # noqa: E731
    roles = {"first/kernel": _swapped(width)} if width != BASE else None
    delta = Net(2 * width) if width == BASE else None
    return mujax.mup_init(model(width), model(BASE), X, roles=roles, delta=delta)


def _decay_before(rate, spec):
    """Weight decay inside of what the µP factor multiplies."""
    factors = {path: 1 / param.r_in if param.role == "hidden" else 1.0 for path, param in spec.items()}

    def update(updates, state, params=None):
        scale = lambda path, leaf: leaf * factors["/".join(key.key for key in path)]  # noqa: E731
        return jax.tree_util.tree_map_with_path(scale, updates), state

    tx = optax.GradientTransformation(lambda _: optax.EmptyState(), update)
    return optax.chain(optax.adamw(rate, weight_decay=0.1), tx)


OFF = {"corrections": {"scale": False, "readout": False}}
PLANTED = {
    "1/sqrt(d) attention left in": Planted(
        "attention logits", "attention", Stream, TOKENS, settings={"corrections": {"attention": False}}
    ),
    "readout factor dropped": Planted(
        "kernel", "forward factor", Net, settings={"corrections": {"readout": False}}
    ),
    "readout factor dropped, of a kernel that is normalised": Planted(
        "kernel", "forward factor", Cosine, settings={"corrections": {"readout": False}}
    ),
    "readout factor after the bias": Planted(
        "bias", "forward factor", lambda w: Net(w, after_bias=BASE / w), settings=OFF
    ),
    "readout factor twice": Planted(
        "kernel",
        "forward factor",
        lambda w: Net(w, before_bias=BASE / w),
        settings={"corrections": {"scale": False}},
    ),
    "readout init not widened": Planted("kernel", "initialisation", started(Net, X, {"kernel": None})),
    "embedding init 1/sqrt(width)": Planted(
        "embed/embedding", "initialisation", started(Stream, TOKENS, {"embed/embedding": None}), TOKENS
    ),
    "hidden init not divided": Planted(
        "up/kernel",
        "initialisation",
        started(functools.partial(Net, up_init=nn.initializers.normal(0.1)), X, {"up/kernel": None}),
    ),
    "hidden learning rate not divided": Planted(
        "up/kernel", "learning rate", Net, optimizer=tampered("adam", {"up/kernel": lambda p: p.r_in})
    ),
    "divided by fan-out": Planted(
        "up/kernel",
        "learning rate",
        lambda w: Net(w, ff=w * w // 16),
        optimizer=tampered("adam", {"up/kernel": lambda p: p.r_in / p.r_out}),
    ),
    "d_ffn forgotten in the base": Planted(
        "up/kernel", "initialisation", Net, settings={"base": lambda w: Net(BASE, ff=2 * w)}
    ),
    "bias learning rate wrong under SGD": Planted(
        "up/bias", "learning rate", Net, optimizer=tampered("sgd", {"up/bias": lambda p: 1 / p.r_out})
    ),
    "norm gain treated as hidden": Planted(
        "norm/scale", "learning rate", Net, optimizer=tampered("adam", {"norm/scale": lambda p: 1 / p.r_out})
    ),
    "epsilon too large": Planted(
        "*",
        "epsilon",
        Net,
        optimizer=lambda rate, spec: mujax.mup_adam(rate, spec, eps=3e-3, scale_eps=False),
    ),
    "decay scaled by the µP factor": Planted("*/kernel", "weight decay", Net, optimizer=_decay_before),
    "transposed kernel misread": Planted("first/kernel", "role", _misread, optimizer="sgd"),
    "tied embedding divided on both uses": Planted(
        "embed/embedding #1",
        "forward factor",
        lambda w: Stream(w, tied=True, lookup=BASE / w),
        TOKENS,
        settings={"corrections": {"scale": False}},
    ),
    "residual stream rescaled": Planted(
        "*test_coord_faults.py:*",
        "constant",
        lambda w: Stream(w, stream=(BASE / w) ** 0.5),
        TOKENS,
        settings={"corrections": {"scale": False}},
    ),
}


def checked(planted: Planted) -> mujax.CoordCheck:
    return mujax.coord_check(
        planted.model,
        WIDTHS,
        planted.inputs,
        planted.optimizer,
        steps=3,
        seeds=3,
        learning_rates=(2.0**-4,) if planted.optimizer == "sgd" else (2.0**-7,),
        **planted.settings,
    )


# What else is rightly blamed: a forgotten base is wrong for the next layer's fan-in as well.
ALSO = {"d_ffn forgotten in the base": ("down/kernel", "learning rate")}
# Faults that the measured sizes show; the others only the rules show (and mujax.transfer_check).
SEEN = {
    "readout factor dropped",
    "readout factor after the bias",
    "readout factor twice",
    "embedding init 1/sqrt(width)",
    "hidden init not divided",
    "hidden learning rate not divided",
    "divided by fan-out",
    "d_ffn forgotten in the base",
    "norm gain treated as hidden",
    "transposed kernel misread",
    "tied embedding divided on both uses",
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_fault_is_caught_and_blamed(fault):
    planted = PLANTED[fault]
    check = checked(planted)
    assert check.verdict == "fail"
    blamed = {(one.name, one.rule) for one in check.faults}
    right = {(name, rule) for name, rule in blamed if rule == planted.rule and _is(planted.name, name)}
    assert right, str(check)
    # What is blamed is what was tampered with, not everything that the fault spreads to.
    assert blamed - right <= {ALSO.get(fault)}, str(check)
    assert fault not in SEEN or any(tap.status == "fail" for tap in check.taps), str(check)


def _is(pattern, name):
    return fnmatch.fnmatch(name, pattern)


@pytest.mark.parametrize("model", [Net, Stream, Cosine])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_without_a_fault_it_passes(model, optimizer):
    check = checked(Planted("", "", model, TOKENS if model is Stream else X, optimizer))
    assert check.verdict == "pass", str(check)
