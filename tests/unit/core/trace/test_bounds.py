"""Entries that are cut off at a number, or compared with one, must be of order one at every width."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, nn

import mujax

BASE, WIDTH = 32, 2048
X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), "float32")

BOUNDED = {
    "clip": lambda h: jnp.clip(h, -1, 1),
    "clamp": lambda h: lax.clamp(-1.0, h, 1.0),
    "one bound": lambda h: jnp.minimum(h, 0.3),
    "relu6": nn.relu6,
    "hard tanh": nn.hard_tanh,
    "hard sigmoid": nn.hard_sigmoid,
    "a choice": lambda h: jnp.where(h > 0.5, h, 0),
    "a step": lambda h: jnp.where(h > 0.5, 1.0, 0.3),
    "a remainder": lambda h: h % 1.0,
}
NOT_BOUNDED = {
    "relu": nn.relu,
    "leaky relu": nn.leaky_relu,
    "a choice by the sign": lambda h: jnp.where(h > 0, h, 0.1 * h),
    "an epsilon": lambda h: jnp.maximum(jnp.abs(h), 1e-6),
    "a mask's number": lambda h: jnp.maximum(h, -1e9),
    "bounds that scale as it does": lambda h: jnp.clip(h, -(h.shape[-1] ** 0.5), h.shape[-1] ** 0.5),
    "its own mean": lambda h: jnp.where(h > h.mean(-1, keepdims=True), h, 0),
}


def two_layers(width: int) -> Callable:
    def init(key, x):
        first, last = jax.random.split(key)
        return {
            "first": jax.random.normal(first, (8, width)) / 8**0.5,
            "last": jax.random.normal(last, (width, 3)) / width**0.5,
        }

    return init


def net(function: Callable) -> Callable[[int], mujax.Functional]:
    """The root of the width in front of a function, and a norm behind it that hides the scale."""

    def build(width: int) -> mujax.Functional:
        def apply(params, x):
            return nn.standardize(function(x @ params["first"] * width**0.5)) @ params["last"]

        return mujax.Functional(two_layers(width), apply)

    return build


def scales(function: Callable) -> list[float]:
    mup = mujax.mup_init(net(function)(WIDTH), net(function)(BASE), X)
    return [one.factor for one in mup.corrections if one.kind == "scale"]


@pytest.mark.parametrize("name", BOUNDED)
def test_what_is_cut_off_is_brought_to_order_one(name):
    assert scales(BOUNDED[name]) == [pytest.approx((BASE / WIDTH) ** 0.5)]


@pytest.mark.parametrize("name", NOT_BOUNDED)
def test_what_a_norm_takes_out_stays(name):
    assert scales(NOT_BOUNDED[name]) == []


CONSTANTS = {
    "a remainder": lambda n: jnp.arange(n) % 2.0,
    "a clip": lambda n: jnp.clip(jnp.arange(n) - n / 2, -1.0, 1.0),
    "a comparison": lambda n: jnp.arange(n) > 2,
    "a share": lambda n: jnp.arange(n) / n,
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_kernel_times_numbers_of_order_one_keeps_its_scale(name):
    """So that what scales in front of it is seen behind it."""

    def build(width):
        plain = net(nn.relu)(width)

        def apply(params, x):
            return jnp.abs(x @ (params["first"] * CONSTANTS[name](width)) / width) @ params["last"]

        return mujax.Functional(plain.init, apply)

    mup = mujax.mup_init(build(WIDTH), build(BASE), X)
    factors = {one.kind: one.factor for one in mup.corrections}
    assert factors == {"scale": pytest.approx(WIDTH / BASE), "readout": pytest.approx(BASE / WIDTH)}


def test_a_sum_that_nothing_divides_is_reported():
    def running(h):
        return jnp.clip(jnp.cumsum(nn.relu(h) / h.shape[-1] ** 0.5, -1), -1, 1)

    (finding,) = mujax.audit(net(running)(WIDTH), net(running)(BASE), X)
    assert finding.kind == "unscaled sum"


def root_mean_square(h, epsilon=1e-2, floor=0.0):
    return h / jnp.maximum(jnp.sqrt(jnp.mean(h**2, -1, keepdims=True) + epsilon), floor)


def unit(h):
    return h / jnp.linalg.norm(h, axis=-1, keepdims=True)


SMALL = {
    "a root": lambda h, n: root_mean_square(h / n**0.5),
    "the width": lambda h, n: root_mean_square(h / n),
    "two roots": lambda h, n: root_mean_square(h * n**-0.25 * n**-0.25),
    "a unit vector": lambda h, n: root_mean_square(unit(h)),
    "standardised": lambda h, n: nn.standardize(h / n**0.5, epsilon=1e-2),
    "over the batch": lambda h, n: (z := h / n**0.5) / (z.std(0) + 1e-2),
    "a floor": lambda h, n: root_mean_square(h / n, 0.0, 1e-2),
    "a reciprocal root": lambda h, n: (z := h / n**0.5) * lax.rsqrt(jnp.mean(z**2, -1, keepdims=True) + 1e-2),
    "in a loop": lambda h, n: lax.scan(lambda c, _: (root_mean_square(c / n**0.5), None), h, None, length=2)[
        0
    ],
    "used elsewhere": lambda h, n: root_mean_square(z := h / n**0.5) + z * n**0.5,
}
LARGE = {
    "of order one": lambda h, n: root_mean_square(h),
    "what grows": lambda h, n: root_mean_square(h * n**0.5),
    "no epsilon": lambda h, n: root_mean_square(h / n**0.5, 0.0),
    "a norm without one": lambda h, n: unit(h / n**0.5) * n**0.5,
    "an epsilon that scales as it does": lambda h, n: root_mean_square(h / n**0.5, 1e-2 / n),
}


def behind(function: Callable) -> Callable[[int], mujax.Functional]:
    """A function of features and their number, and a readout."""

    def build(width: int) -> mujax.Functional:
        def apply(params, x):
            features = function(x @ params["first"], width)
            return features @ params["last"], features

        return mujax.Functional(two_layers(width), apply)

    return build


def shrinkage(function: Callable, **options) -> float:
    """How much smaller the features are in a wider model."""
    sizes = []
    for width in (BASE, WIDTH):
        delta = behind(function)(2 * width) if width == BASE else None
        mup = mujax.mup_init(behind(function)(width), behind(function)(BASE), X, delta=delta, **options)
        _, features = mup.apply(mup.init(jax.random.key(0), X), X)
        sizes.append(float(jnp.abs(features).mean()))
    return sizes[0] / sizes[1]


@pytest.mark.parametrize("name", SMALL)
def test_what_falls_below_the_epsilon_of_a_norm_is_brought_to_order_one(name):
    assert shrinkage(SMALL[name]) == pytest.approx(1, abs=0.15)
    assert shrinkage(SMALL[name], corrections={"scale": False}) > 1.2 or name == "used elsewhere"


@pytest.mark.parametrize("name", LARGE)
def test_what_stays_above_the_epsilon_is_left_alone(name):
    mup = mujax.mup_init(behind(LARGE[name])(WIDTH), behind(LARGE[name])(BASE), X)
    assert [one for one in mup.corrections if one.kind == "scale"] == []
