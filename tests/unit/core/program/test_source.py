"""Places that corrections name: the line of the user's code, inside whatever a library wraps around it."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn, nnx

import mujax

X = jax.ShapeDtypeStruct((2, 5, 4), "float32")


def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    logits = jnp.einsum("bqd,bkd->bqk", query, key)
    return nn.softmax(logits / query.shape[-1] ** 0.5) @ value


class Attention(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return attention(*(nn.Dense(self.width)(x) for _ in range(3)))


class AttentionNNX(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.query, self.key, self.value = (nnx.Linear(width, width, rngs=rngs) for _ in range(3))

    def __call__(self, x: jax.Array) -> jax.Array:
        return attention(self.query(x), self.key(x), self.value(x))


class Net(nn.Module):
    width: int
    lift: Callable[[type[nn.Module]], Callable[[int], nn.Module]]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.lift(Attention)(self.width)(nn.Dense(self.width)(x))
        return nn.Dense(3)(x)


class NetNNX(nnx.Module):
    def __init__(self, width: int, lift: Callable[..., Callable[..., jax.Array]], rngs: nnx.Rngs) -> None:
        self.first, self.attention = nnx.Linear(4, width, rngs=rngs), AttentionNNX(width, rngs)
        self.last = nnx.Linear(width, 3, rngs=rngs)
        self.lift = lift

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(self.lift(AttentionNNX.__call__)(self.attention, self.first(x)))


def line_of(function: Callable[..., object], text: str) -> str:
    lines, start = inspect.getsourcelines(function)
    (offset,) = (number for number, line in enumerate(lines) if text in line)
    return f"test_source.py:{start + offset}"


LINEN = {
    "plain": lambda module: module,
    "remat": nn.remat,
    "jit": nn.jit,
    "jit of remat": lambda module: nn.jit(nn.remat(module)),
}
NNX = {"plain": lambda call: call, "remat": nnx.remat, "jit": nnx.jit}

MODELS = {
    **{f"linen {name}": (lambda width, lift=lift: Net(width, lift)) for name, lift in LINEN.items()},
    **{
        f"nnx {name}": (lambda width, lift=lift: lambda rngs: NetNNX(width, lift, rngs))
        for name, lift in NNX.items()
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_the_line_of_the_product_and_not_of_what_wraps_it(name: str) -> None:
    build = MODELS[name]
    logits, readout = mujax.mup_init(build(24), build(8), X).corrections
    assert (logits.kind, readout.kind) == ("attention", "readout")
    assert logits.where.endswith(line_of(attention, "nn.softmax"))
    outer = NetNNX if name.startswith("nnx") else Net
    assert readout.where.endswith(line_of(outer.__call__, "return"))


def test_a_librarys_own_code_is_the_line_that_calls_it() -> None:
    """The inside of a jitted function of JAX is traced once, and does not know who called it."""

    def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        first = jnp.linalg.norm(x @ params["a"], ord=1, axis=-1)
        return first + jnp.linalg.norm(x @ params["b"], ord=1, axis=-1)

    def build(width: int) -> mujax.Functional:
        def init(key: jax.Array, x: jax.Array) -> dict[str, jax.Array]:
            return {name: jax.random.normal(key, (4, width)) for name in "ab"}

        return mujax.Functional(init, apply)

    with pytest.warns(mujax.MujaxWarning):
        mup = mujax.mup_init(build(24), build(8), X)
    places = {finding.where.rpartition("/")[2] for finding in mup.findings}
    assert places == {line_of(apply, "first = "), line_of(apply, "return first")}
