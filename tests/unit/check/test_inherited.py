"""What falls or grows with width by a model's design: the coordinate check expects it, and nothing else."""

import functools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import mujax
from mujax.check._taps import find_taps
from mujax.errors import MujaxWarning

pytestmark = pytest.mark.abstract

X = jax.ShapeDtypeStruct((4, 8, 12), jnp.float32)


class Autoencoder(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        latents = nn.Dense(4, name="into")(nn.relu(nn.Dense(self.width, name="first")(x)))
        found = {
            "linear": latents,
            "odd": jnp.tanh(latents),
            "gelu": nn.gelu(latents),
            "square": latents**2,
            "picked": jnp.where(x[..., :4] > 0, latents, 0.0),
            # These are of order one at every width.
            "exp": jnp.exp(latents),
            "gate": nn.sigmoid(latents),
            "moved": latents + 1.0,
            "residual": latents + x[..., :4],
            "norm": latents / jnp.sqrt(jnp.mean(latents**2) + 1e-6),
            "of data": x[..., :4],
        }
        for name, value in found.items():
            found[name] = nn.Dense(self.width, name=name)(value)
        return found


def taps_of(build, *inputs, width=64, base=16):
    return {tap.name: tap for tap in find_taps(read(build, *inputs, width=width, base=base))}


def read(build, *inputs, width=64, base=16):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MujaxWarning)
        return mujax.mup_init(build(width), build(base), *inputs)


def test_what_comes_from_a_readout_may_fall_with_it():
    taps = taps_of(Autoencoder, X)
    falls = {name: taps[f"{name}/kernel"].falls for name in ("into", "linear", "odd", "gelu", "picked")}
    assert falls == dict.fromkeys(falls, -0.5)
    assert taps["square/kernel"].falls == -1
    for name in ("first", "exp", "gate", "moved", "residual", "norm", "of data"):
        assert taps[f"{name}/kernel"].falls == 0, name


class Differences(nn.Module):
    """Differences of values that tend to a constant, as attention weights and gates of latents do."""

    width: int

    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(self.width, name="first")(x))
        one, other = nn.Dense(4, name="one")(h), nn.Dense(4, name="other")(h)
        part, scale = x[..., :4], self.param("scale", nn.initializers.ones, ())
        q, k, v = (nn.Dense(self.width, name=name)(h) for name in "qkv")
        n = self.width // 2
        ours, theirs = (
            nn.softmax(q[..., here] @ k[..., here].swapaxes(1, 2) / n**0.5)
            for here in (slice(n), slice(n, None))
        )
        found = {
            "exponentials": jnp.exp(one) - jnp.exp(other),
            "gates": nn.sigmoid(one) * part - scale * (part * nn.sigmoid(other)),
            "shares": (nn.softmax(one) - nn.softmax(other)) / 0.3,
            "attention": ours @ v - 0.8 * theirs @ v,
            "weights": (ours - theirs) @ v,
            # These do not cancel.
            "a sum": nn.sigmoid(one) + nn.sigmoid(other),
            "other data": nn.sigmoid(one) * part - nn.sigmoid(other) * x[..., 4:8],
            "other values": ours @ v - theirs @ q,
            "one gate": nn.sigmoid(one) * part - part,
            "a share of data": nn.softmax(one) - nn.softmax(part),
            "a residual": nn.sigmoid(one) * part - nn.sigmoid(other) * part + part,
        }
        for name, value in found.items():
            found[name] = nn.Dense(self.width, name=name)(value)
        return found


FALL = ["exponentials", "gates", "shares", "attention", "weights"]


def test_a_difference_of_what_tends_to_one_value_may_fall():
    taps = taps_of(Differences, X)
    falls = {name.removesuffix("/kernel"): tap.falls for name, tap in taps.items() if tap.kind == "product"}
    assert {name: falls.pop(name) for name in FALL} == dict.fromkeys(FALL, -0.5)
    stay = set("qkv") | {"first", "other data", "other values", "one gate", "a share of data", "a residual"}
    assert falls == dict.fromkeys([*stay, "a sum"], 0.0)


class LinearAttention(nn.Module):
    width: int
    normalise: bool = True

    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.Dense(self.width, name=name)(nn.relu(nn.Dense(self.width)(x))) for name in "qkv")
        q, k = nn.elu(q) + 1, nn.elu(k) + 1
        with jax.named_scope("above"):
            above = jnp.einsum("btd,bde->bte", q, jnp.einsum("btd,bte->bde", k, v))
        with jax.named_scope("below"):
            below = jnp.einsum("btd,bd->bt", q, k.sum(1))
        return nn.Dense(3)(above / below[..., None] if self.normalise else above)


def test_a_sum_over_the_width_that_is_divided_out_may_grow():
    taps = taps_of(LinearAttention, X)
    assert taps["below mixing"].scale == pytest.approx(4)
    assert taps["above mixing #2"].scale == pytest.approx(4)
    assert taps["above mixing #1"].scale == taps["q/kernel"].scale == taps["output"].scale == 1


def test_a_sum_that_is_reported_may_not():
    mup = read(functools.partial(LinearAttention, normalise=False), X)
    assert {finding.kind for finding in mup.findings} == {"unscaled sum"}
    scales = {tap.name: tap.scale for tap in find_taps(mup)}
    assert scales["above mixing #2"] == scales["output"] == 1


class Embedding(nn.Module):
    width: int
    head: bool = False

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(self.width)(nn.relu(nn.Dense(self.width)(x)))
        unit = h / jnp.linalg.norm(h, axis=-1, keepdims=True)
        return nn.Dense(3, name="head")(unit) if self.head else unit


def test_a_vector_of_unit_norm_that_is_returned_has_small_entries():
    assert taps_of(Embedding, X)["output"].scale == pytest.approx(0.5)
    # A head reads it with its size brought back.
    taps = taps_of(functools.partial(Embedding, head=True), X)
    assert {tap.scale for tap in taps.values()} == {1}
