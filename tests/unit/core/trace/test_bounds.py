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


def net(function: Callable) -> Callable[[int], mujax.Functional]:
    """The root of the width in front of a function, and a norm behind it that hides the scale."""

    def build(width: int) -> mujax.Functional:
        def init(key, x):
            first, last = jax.random.split(key)
            return {
                "first": jax.random.normal(first, (8, width)) / 8**0.5,
                "last": jax.random.normal(last, (width, 3)) / width**0.5,
            }

        def apply(params, x):
            return nn.standardize(function(x @ params["first"] * width**0.5)) @ params["last"]

        return mujax.Functional(init, apply)

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
