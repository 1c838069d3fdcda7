"""Models at several widths, losses and optimizers, as the checks take them."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn, nnx

import mujax
from mujax.check import _models as subject
from mujax.errors import ConfigError
from mujax.train import default_loss

X = jax.ShapeDtypeStruct((4, 6), jnp.float32)


def linen(width):
    return nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(width), nn.relu, nn.Dense(3)])


def nnx_factory(width):
    return lambda rngs: nnx.Sequential(
        nnx.Linear(6, width, rngs=rngs), nnx.relu, nnx.Linear(width, 3, rngs=rngs)
    )


def functional(width):
    def init(key, x):
        one, two = jax.random.split(key)
        return {
            "first": jax.random.normal(one, (x.shape[-1], width)),
            "readout": jax.random.normal(two, (width, 3)) / jnp.sqrt(width),
        }

    def apply(params, x):
        return jnp.tanh(x @ params["first"]) @ params["readout"]

    return mujax.Functional(init, apply)


@pytest.mark.parametrize(
    ("factory", "roles"),
    [
        (linen, ["finite", "hidden", "input", "output"]),
        (nnx_factory, ["finite", "input", "output"]),
        (functional, ["input", "output"]),
    ],
)
def test_every_kind_of_model_at_every_width(factory, roles):
    found = subject.models_at(factory, (32, 8, 16, 8), inputs=X)
    assert list(found) == [8, 16, 32]
    for width, mup in found.items():
        assert [c.factor for c in mup.corrections] == [8 / width]
        # The base's own widths, and still every infinite axis is known.
        assert sorted({param.role for param in mup.spec.values()}) == roles


def test_base_width_need_not_be_among_the_widths():
    found = subject.models_at(functional, (16, 32), base_width=4, inputs=(X,))
    assert [found[width].corrections[0].factor for width in (16, 32)] == [1 / 4, 1 / 8]


def test_base_of_each_width():
    found = subject.models_at(
        functional, (8, 16, 32), base=lambda width: functional(max(width // 2, 8)), inputs=X
    )
    assert [found[width].spec["readout"].r_in for width in (8, 16, 32)] == [1, 2, 2]
    assert found[8].spec["readout"].role == "output"


def test_a_ready_model_is_taken_as_it_is():
    ready = {width: mujax.mup_init(linen(width), linen(4), X) for width in (8, 16)}
    assert subject.models_at(ready.__getitem__, (8, 16), inputs=X) == ready


def test_keywords_go_to_mup_init_and_to_the_model():
    class Net(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x, *, train):
            y = nn.Dense(self.width)(x)
            return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(y))

    found = subject.models_at(Net, (8, 16), inputs=X, kwargs={"train": True}, parametrization="sp")
    assert {str(mup.spec.parametrization) for mup in found.values()} == {"sp"}


@pytest.mark.parametrize("widths", [(), (8,), (8, 8), (0, 8)])
def test_too_few_widths(widths):
    with pytest.raises(ConfigError, match=re.escape(f"different positive numbers, got {widths}")):
        subject.models_at(linen, widths, inputs=X)


def test_base_and_base_width():
    with pytest.raises(ConfigError, match=r"expected none next to base=.*got 8"):
        subject.models_at(linen, (8, 16), base=linen, base_width=8, inputs=X)


def test_default_loss_follows_the_targets():
    logits = jnp.array([[0.0, 1.0], [2.0, 0.0]])
    wanted = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array([1, 1])).mean()
    assert default_loss(logits, jnp.array([1, 1])) == wanted
    assert default_loss(logits, jnp.zeros((2, 2))) == 5 / 4


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [
        (jnp.zeros((4, 1)), jnp.zeros(4)),  # Would broadcast to 4 × 4.
        (jnp.zeros((4, 3)), jnp.zeros((4, 3), jnp.int32)),
        ((jnp.zeros(4), jnp.zeros(4)), jnp.zeros(4)),
    ],
)
def test_default_loss_never_guesses(outputs, targets):
    with pytest.raises(ConfigError, match="pass loss=, a function of both"):
        default_loss(outputs, targets)


def test_optimizers_by_name_and_by_function():
    assert subject.optimizer_of("adam") is mujax.mup_adam
    assert subject.optimizer_of(mujax.mup_sgd) is mujax.mup_sgd
    with pytest.raises(ConfigError, match=r"expected one of .*'adam'.*got 'adamn'"):
        subject.optimizer_of("adamn")
