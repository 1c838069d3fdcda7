"""`mujax.audit(measure=True)`: right models have no finding, a wrong reading is named with its remedy."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mujax
from mujax import models
from mujax.errors import AuditError, ConfigError

X = jax.ShapeDtypeStruct((8, 12), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((2, 8), jnp.int32)
IMAGES = jax.ShapeDtypeStruct((8, 8, 8, 3), jnp.float32)


class MLP(nn.Module):
    """Two hidden layers; returns what is no array beside its output."""

    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.width, name="first")(x))
        x = nn.relu(nn.Dense(self.width, name="hidden")(x))
        return nn.Dense(8, name="out")(x), "a name", None


class NNX(nnx.Module):
    """The same with dropout."""

    def __init__(self, width, *, rngs):
        self.first = nnx.Linear(12, width, rngs=rngs)
        self.hidden = nnx.Linear(width, width, rngs=rngs)
        self.out = nnx.Linear(width, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.relu(self.hidden(nnx.relu(self.first(x))))))


@jax.custom_vjp
def unseen_product(x, kernel):
    """A product that mujax cannot look into."""
    shape = jax.ShapeDtypeStruct((len(x), kernel.shape[1]), x.dtype)
    return jax.pure_callback(lambda x, kernel: np.asarray(x) @ np.asarray(kernel), shape, x, kernel)


unseen_product.defvjp(
    lambda x, kernel: (unseen_product(x, kernel), (x, kernel)),
    lambda kept, gradient: (gradient @ kept[1].T, kept[0].T @ gradient),
)


def pure(width):
    def init(key, x):
        shapes = {"first": (x.shape[-1], width), "hidden": (width, width), "out": (width, 5)}
        keys = jax.random.split(key, 3)
        return {
            name: jax.random.normal(key, shape) / shape[0] ** 0.5
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    def apply(params, x):
        x = unseen_product(jax.nn.relu(x @ params["first"]), params["hidden"])
        return jax.nn.relu(x) @ params["out"]

    return mujax.Functional(init, apply)


def nnx_mlp(width):
    return functools.partial(NNX, width)


def transformer(width, **options):
    config = models.TransformerConfig(d_model=width, n_layers=1, vocab_size=32, max_len=8, **options)
    return models.Transformer(config)


def tied(width):
    return transformer(width, tie_embeddings=True)


def resnet(width):
    return models.ResNet(models.ResNetConfig(stage_sizes=(1, 1), stage_widths=(width, 2 * width)))


class Designed(nn.Module):
    """Falls or grows by design: learned queries, a linear attention, a bottleneck, normalised kernels."""

    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width, name="first")(x)
        queries = self.param("queries", nn.initializers.normal(1.0), (3, self.width))
        attend = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")
        pooled = attend(jnp.broadcast_to(queries, (len(x), 3, self.width)), x)
        q, k = (nn.elu(nn.DenseGeneral((2, self.width // 2), name=name)(pooled)) + 1 for name in ("q", "k"))
        above = jnp.einsum("bthd,bhde->bthe", q, jnp.einsum("bthd,bthe->bhde", k, k))
        mixed = (above / jnp.einsum("bthd,bhd->bth", q, k.sum(1))[..., None]).reshape(pooled.shape)
        latents = nn.Dense(4, name="latents")(mixed)
        decoded = nn.relu(nn.WeightNorm(nn.Dense(self.width, name="decoder"))(latents))
        return nn.WeightNorm(nn.Dense(6, name="out"))(nn.relu(nn.Dense(self.width, name="last")(decoded)))


def unit(x, axis=-1):
    return x / jnp.linalg.norm(x, axis=axis, keepdims=True)


class Written(nn.Module):
    """A kernel made from an embedding, differential attention, and cosines times a gain and a root."""

    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.width, name="first")(x))
        embedding = self.param("embedding", nn.initializers.normal(1.0), (8,))
        maker = self.param("maker", nn.initializers.normal(8**-0.5), (8, self.width, 16))
        x = nn.relu(x @ jnp.einsum("e,eio->io", embedding, maker) / self.width**0.5)
        q, k, v = (nn.Dense(self.width, name=name)(x) for name in "qkv")
        n = self.width // 2
        ours, theirs = (
            nn.softmax(q[..., here] @ k[..., here].swapaxes(-1, -2) / n**0.5)
            for here in (slice(n), slice(n, None))
        )
        x = nn.RMSNorm(name="norm")(ours @ v - 0.8 * theirs @ v)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (self.width, 6))
        gain = self.param("gain", nn.initializers.ones, (6,))
        return unit(x) @ unit(kernel, axis=0) * gain * self.width**0.5


def measured(build, inputs=X, base=32, width=128, **kwargs):
    """The findings that were measured, of the two models as they are."""
    found = mujax.audit(build(width), build(base), inputs, measure=True, **kwargs)
    return [one for one in found if one.kind.startswith("measured")]


RIGHT = {
    "MLP": (MLP, X, {}),
    "NNX": (nnx_mlp, X, {}),
    "Transformer, tied": (tied, TOKENS, {}),
    "ResNet": (resnet, IMAGES, {"base": 8, "width": 32, "train": True}),
    "readout that starts at zero, Table 3": (
        MLP,
        X,
        {"zero_init": ("readout",), "parametrization": "table3"},
    ),
    "what falls or grows by design": (
        Designed,
        jax.ShapeDtypeStruct((8, 6, 12), jnp.float32),
        {"base": 16, "width": 64},
    ),
    "what is written in other ways": (
        Written,
        jax.ShapeDtypeStruct((8, 6, 12), jnp.float32),
        {"base": 16, "width": 64},
    ),
    "a product that can't be seen, with its role": (pure, X, {"roles": {"hidden": "hidden"}}),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_reading_has_no_disagreement(name):
    build, inputs, kwargs = RIGHT[name]
    assert measured(build, inputs, **kwargs) == []


WRONG = {
    "MLP": (MLP, X, "hidden/kernel", "test_audit_measured.py"),
    "Transformer": (transformer, TOKENS, "block_0/ff/up/kernel", "mujax/models/_layers.py"),
    "a product that can't be seen": (pure, X, "hidden", "test_audit_measured.py"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_misread_kernel_is_named_with_its_role_and_the_right_one(name):
    build, inputs, path, file = WRONG[name]
    (found,) = measured(build, inputs, roles={path: "input"})
    assert found.kind == "measured role"
    assert found.message.startswith(f"{path}: it is read as input")
    assert "by its update" in found.message
    assert found.message.endswith(f'give roles={{"{path}": "hidden"}}')
    assert f"{file}:" in found.where


def test_the_standard_parametrization_disagrees():
    found = measured(MLP, parametrization="sp")
    assert {one.kind for one in found} >= {"measured learning rate", "measured forward factor"}
    assert any(one.message.startswith("hidden/kernel: its learning rate") for one in found)
    assert all('parametrization="mup" does it' in one.message for one in found)


def test_a_factory_and_widths_and_other_findings_beside():
    found = mujax.audit(pure, 32, X, widths=(64, 128), measure=True, roles={"hidden": "input"})
    assert [one.kind for one in found] == ["opaque", "measured role"]
    with pytest.raises(AuditError, match=r"hidden/kernel: it is read as input"):
        mujax.audit(MLP, 32, X, widths=(128,), measure=True, strict=True, roles={"hidden/kernel": "input"})


def test_widths_without_measuring_are_read():
    assert mujax.audit(MLP, 32, X, widths=(64, 128)) == ()


def test_a_delta_is_measured_where_the_target_has_the_base_s_widths():
    given = {"delta": MLP(128), "measure": True, "roles": {"hidden/kernel": "input"}}
    (found,) = mujax.audit(MLP(32), MLP(32), X, **given)
    assert found.message.endswith('give roles={"hidden/kernel": "hidden"}')


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((MLP(32), MLP(32), {}), r"^measure: expected a target or a delta that is wider than the base, got "),
        (
            (MLP(32), MLP(16), {"widths": (16, 32)}),
            r"^widths: expected a function of the width for model and",
        ),
        ((MLP, 16, {"widths": (16,)}), r"^widths: expected positive numbers other than the base's, got "),
    ],
)
def test_what_cannot_be_measured(given, message):
    model, base, kwargs = given
    with pytest.raises(ConfigError, match=message):
        mujax.audit(model, base, X, measure=True, **kwargs)
