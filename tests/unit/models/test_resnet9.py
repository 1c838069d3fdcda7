"""ResNet-9 against its published size and a computation by sums."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mujax.errors import ConfigError
from mujax.models import ResNet9, ResNet9Config

KEY = jax.random.key(0)
IMAGES = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)


def abstract(model, images=IMAGES):
    return jax.eval_shape(model.init, KEY, images)


def test_resnet9_has_the_published_size():
    params = abstract(ResNet9(ResNet9Config()))["params"]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == 6_573_120


def test_width_multiplier_widens_every_layer():
    narrow, wide = (
        jax.tree.map(jnp.shape, abstract(ResNet9(ResNet9Config(m)))["params"]) for m in (0.25, 0.75)
    )
    ratios = jax.tree.map(
        lambda a, b: tuple(y // x for x, y in zip(a, b, strict=True)),
        narrow,
        wide,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )
    found = set(jax.tree.leaves(ratios, is_leaf=lambda leaf: isinstance(leaf, tuple)))
    assert found == {(1, 1, 1, 3), (1, 1, 3, 3), (3,), (3, 1)}


def conv(x, kernel):
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    h, w = x.shape[1:3]
    return sum(padded[:, i : i + h, j : j + w] @ kernel[i, j] for i in range(3) for j in range(3))


def norm(x, params):
    return (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5) * params["scale"] + params["bias"]


def pool(x):
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))


def test_resnet9_computes_what_it_says():
    assert ResNet9Config().logit_scale == 0.125
    model = ResNet9(ResNet9Config(1 / 16, logit_scale=0.5))
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, 8, 8, 3)).astype(np.float32)
    variables = abstract(model, images)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), variables["params"])
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variables["batch_stats"])
    train = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))
    found, updates = train({"params": params, "batch_stats": zeros}, images)

    def layer(x, name):
        return np.maximum(norm(conv(x, params[f"{name}_conv"]["kernel"]), params[f"{name}_norm"]), 0)

    x = layer(images.astype(np.float64), "stem")
    x = pool(layer(x, "stage_0"))
    x = x + layer(layer(x, "stage_0_branch_0"), "stage_0_branch_1")
    x = pool(layer(x, "stage_1"))
    x = pool(layer(x, "stage_2"))
    assert x.shape[1:3] == (1, 1)
    x = x + layer(layer(x, "stage_2_branch_0"), "stage_2_branch_1")
    expected = 0.5 * x.max((1, 2)) @ params["readout"]["kernel"]
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)
    assert float(np.abs(expected).max()) > 1
    assert all(leaf.any() for leaf in jax.tree.leaves(updates["batch_stats"]))


def test_images_that_are_too_small():
    with pytest.raises(ConfigError) as error:
        abstract(ResNet9(ResNet9Config()), jnp.zeros((1, 7, 9, 3)))
    assert str(error.value) == "ResNet9: expected images of at least 8 by 8 pixels, got (7, 9)."


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"width_multiplier": 0.1},
            "ResNet9Config.width_multiplier: expected 0.1 × 64 channels to be a whole number, got 6.4; "
            "choose a multiplier that divides evenly.",
        ),
        ({"n_classes": 0}, "ResNet9Config.n_classes: expected at least 1, got 0."),
        ({"logit_scale": 0.0}, "ResNet9Config.logit_scale: expected a number above 0, got 0.0."),
    ],
)
def test_bad_sizes(options, text):
    with pytest.raises(ConfigError) as error:
        ResNet9Config(**options)
    assert str(error.value) == text
