"""A regression task, and networks of any width that learn it."""

import flax.linen as nn
import jax
from flax import nnx


def teacher(steps=60, batch=64, features=16):
    """Values of a fixed random function of one hidden layer."""
    first, second, data = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(data, (steps, batch, features))
    w = jax.random.normal(first, (features, 32)) / features**0.5
    y = jax.nn.relu(x @ w) @ jax.random.normal(second, (32, 1)) / 32**0.5 * 2
    return list(zip(x, y - y.mean(), strict=True))


def linen(width):
    return nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(width), nn.relu, nn.Dense(1)])


def nnx_factory(width):
    return lambda rngs: nnx.Sequential(
        nnx.Linear(16, width, rngs=rngs), nnx.relu,
        nnx.Linear(width, width, rngs=rngs), nnx.relu,
        nnx.Linear(width, 1, rngs=rngs),
    )  # fmt: skip
