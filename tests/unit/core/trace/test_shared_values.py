"""A value that scales with width and is used more than once: each use must come out of order one."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mujax

BASE, WIDTH = 8, 24
R = WIDTH / BASE
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 4)), "float32")

Params = dict[str, jax.Array]
Program = Callable[[jax.Array, jax.Array, int], tuple[jax.Array, ...]]


def unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def model(program: Program, width: int) -> mujax.Functional:
    def init(key: jax.Array, x: jax.Array) -> Params:
        return {
            name: jax.random.normal(k, (4, width))
            for name, k in zip("ab", jax.random.split(key), strict=True)
        }

    def apply(params: Params, x: jax.Array) -> tuple[jax.Array, ...]:
        return program(x @ params["a"], x @ params["b"], width)

    return mujax.Functional(init, apply)


def scaled_and_back(a: jax.Array, b: jax.Array, width: int) -> tuple[jax.Array, ...]:
    h = a * width**0.5
    return jnp.tanh(h), h / width**0.5


def scaled_twice(a: jax.Array, b: jax.Array, width: int) -> tuple[jax.Array, ...]:
    h = a * width**0.5
    return jnp.tanh(h), jnp.sin(h * width**0.5), (h * b) / width


def scaled_in_a_loop(a: jax.Array, b: jax.Array, width: int) -> tuple[jax.Array, ...]:
    def body(carry: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        h = carry * width**0.5
        return jnp.tanh(h), h / width**0.5

    return jax.lax.scan(body, a, None, length=2)


def cosine(a: jax.Array, b: jax.Array, width: int) -> tuple[jax.Array, ...]:
    """As in CLIP: the embeddings are outputs, too, and who compares them outside wants their norm."""
    a, b = unit(a), unit(b)
    return a, b, jnp.einsum("bqd,bkd->bqk", a, b)


def averaged(a: jax.Array, b: jax.Array, width: int) -> tuple[jax.Array, ...]:
    """Products with weights that add up to one: each shrinks, and their sum does not."""
    h = a * jax.nn.softmax(b)
    return jnp.tanh(h.sum(-1, keepdims=True) / width**0.5), a + h


def averaged_last(a: jax.Array, b: jax.Array, width: int) -> tuple[jax.Array, ...]:
    h = a * jax.nn.softmax(b)
    return a + h, jnp.tanh(h.sum(-1, keepdims=True) / width**0.5)


# What the program is at the target, with the base's constants where it has constants of width.
PROGRAMS: dict[str, tuple[Program, Program]] = {
    "scaled and back": (scaled_and_back, lambda a, b, width: scaled_and_back(a, b, BASE)),
    "scaled twice": (scaled_twice, lambda a, b, width: scaled_twice(a, b, BASE)),
    "scaled in a loop": (scaled_in_a_loop, lambda a, b, width: scaled_in_a_loop(a, b, BASE)),
    "cosine": (cosine, cosine),
    "averaged": (
        averaged,
        lambda a, b, width: (averaged(a, b, BASE)[0], a + R * a * jax.nn.softmax(b)),
    ),
    "running mean": (
        lambda a, b, width: (jnp.tanh(a + jnp.cumsum(b, -1) / width),),
        lambda a, b, width: (jnp.tanh(a + jnp.cumsum(b, -1) / width),),
    ),
    "running sum over a root": (
        lambda a, b, width: (jnp.tanh(jnp.cumsum(a, -1) / width**0.5), b),
        lambda a, b, width: (jnp.tanh(jnp.cumsum(a, -1) * BASE**0.5 / width), b),
    ),
    "running sum along the batch": (
        lambda a, b, width: (jnp.tanh(jnp.cumsum(a, 0)), b),
        lambda a, b, width: (jnp.tanh(jnp.cumsum(a, 0)), b),
    ),
    "averaged last": (
        averaged_last,
        lambda a, b, width: (a + R * a * jax.nn.softmax(b), averaged(a, b, BASE)[0]),
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_use_is_of_order_one(name: str) -> None:
    program, expected = PROGRAMS[name]
    mup = mujax.mup_init(model(program, WIDTH), model(program, BASE), X)
    with jax.enable_x64(True):
        params, x = jax.tree.map(
            lambda leaf: jnp.asarray(leaf, jnp.float64), (mup.init(jax.random.key(0)), X)
        )
        ours = jax.jit(mup.apply)(params, x)
        theirs = jax.jit(model(expected, WIDTH).apply)(params, x)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), ours, theirs)
    assert mup.findings == ()


@pytest.mark.parametrize("name", ["scaled and back", "scaled twice", "scaled in a loop", "averaged"])
def test_the_twin_as_it_stands_is_another(name: str) -> None:
    program, expected = PROGRAMS[name]
    params = model(program, WIDTH).init(jax.random.key(0), X)
    plain, theirs = (model(f, WIDTH).apply(params, X) for f in (program, expected))
    assert max(float(jnp.abs(x - y).max()) for x, y in zip(plain, theirs, strict=True)) > 0.1


def test_a_running_sum_over_the_width_is_reported_as_the_sum_is() -> None:
    for last in (lambda h: jnp.cumsum(h, -1), lambda h: h.sum(-1)):

        def program(a: jax.Array, b: jax.Array, width: int, last: Callable = last) -> tuple[jax.Array, ...]:
            return jnp.tanh(last(a)), b

        found = mujax.audit(model(program, WIDTH), model(program, BASE), X)
        assert [finding.kind for finding in found] == ["unscaled sum"]


def test_what_two_uses_can_not_share_is_said() -> None:
    """A unit vector that goes into a nonlinearity gets its size back, and its cosine then is none."""

    def program(a: jax.Array, b: jax.Array, width: int) -> tuple[jax.Array, ...]:
        a = unit(a)
        return jnp.tanh(a), jnp.einsum("bqd,bkd->bqk", a, unit(b))

    with pytest.warns(mujax.MujaxWarning):
        mup = mujax.mup_init(model(program, WIDTH), model(program, BASE), X)
    assert [(c.kind, c.factor) for c in mup.corrections] == [("scale", pytest.approx(R**0.5))]
    assert [finding.kind for finding in mup.findings] == ["unscaled sum"]


READOUTS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "a product": lambda h, w: h @ w,
    "an einsum": lambda h, w: jnp.einsum("bqd,d->bq", h, w),
    "a sum of entries": lambda h, w: (h * w).sum(-1),
    "a sum of entries, laid out": lambda h, w: (w * h).reshape(10, -1).sum(1),
    "a mean of entries": lambda h, w: (h * w).mean(-1) * h.shape[-1],
}


@pytest.mark.parametrize("name", READOUTS)
def test_a_vector_of_unit_norm_gets_its_scale_back_in_front_of_any_readout(name: str) -> None:
    def build(width: int) -> mujax.Functional:
        def init(key: jax.Array, x: jax.Array) -> Params:
            first, last = jax.random.split(key)
            return {"a": jax.random.normal(first, (4, width)), "w": jax.random.normal(last, (width,))}

        return mujax.Functional(init, lambda p, x: READOUTS[name](unit(x @ p["a"]), p["w"]))

    mup = mujax.mup_init(build(WIDTH), build(BASE), X)
    factors = {one.kind: one.factor for one in mup.corrections}
    assert factors == {"scale": pytest.approx(R**0.5), "readout": pytest.approx(1 / R)}
