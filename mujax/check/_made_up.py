"""Inputs and targets that a check makes up where it is given shapes, or no targets."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from mujax.check._measure import Batch
from mujax.check._taps import floating
from mujax.core import MupModel
from mujax.errors import ConfigError
from mujax.train import default_loss


def made_up_inputs(inputs: Any, mup: MupModel, key: Key[Array, ""]) -> Any:
    """Concrete inputs in place of abstract ones.

    Args:
        inputs: arrays, which stay as they are, and `jax.ShapeDtypeStruct`s: floats become normal, integers
            uniform over the smallest table that the model looks up (0 and 1 if it looks up none), booleans
            true.
        mup: the model, for the tables that it looks up.
        key: of the random values.
    """
    leaves, structure = jax.tree.flatten(inputs)
    keys = jax.random.split(key, max(len(leaves), 1))
    tokens = _table_size(mup)
    filled = [_filled(leaf, tokens, one) for leaf, one in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, filled)


def _table_size(mup: MupModel) -> int:
    sizes = []
    for path, uses in mup.replay.analysis.uses.items():
        if any(use.kind == "lookup" for use in uses):
            param = mup.spec[path]
            finite = [size for size, base in zip(param.shape, param.base_shape, strict=True) if size == base]
            sizes.append(max(finite, default=2))
    return min(sizes, default=2)


def _filled(leaf: Any, tokens: int, key: Key[Array, ""]) -> Any:
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return key
    if jnp.issubdtype(leaf.dtype, jnp.bool_):
        return jnp.ones(leaf.shape, leaf.dtype)
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        return jax.random.randint(key, leaf.shape, 0, tokens, leaf.dtype)
    return jax.random.normal(key, leaf.shape, leaf.dtype)


def arrays(output: Any) -> list[Any]:
    """The arrays that a model returns, without what it returns beside them (a string, None)."""
    return [leaf for leaf in jax.tree.leaves(output) if hasattr(leaf, "dtype")]


def made_up(mup: MupModel, inputs: tuple[Any, ...], seed: int) -> list[Batch]:
    """Made-up targets for the model's one array: classes if it can be logits, else values."""
    found = arrays(mup.replay.output())
    if len(found) != 1:
        raise ConfigError(
            where="inputs",
            expected="a model that returns one array",
            got=[leaf.shape for leaf in found],
            remedy="pass batches= with targets and a loss=",
        )
    return [(inputs, _target(found[0], jax.random.key(seed)))]


def made_up_for_all(mup: MupModel, inputs: tuple[Any, ...], seed: int) -> list[Batch]:
    """Made-up targets for each array of floats that the model returns; `loss_of_all` takes them."""
    found = floating(mup.replay.output())
    keys = jax.random.split(jax.random.key(seed), max(len(found), 1))
    return [(inputs, [_target(leaf, key) for leaf, key in zip(found, keys, strict=False)])]


def _target(output: Any, key: Key[Array, ""]) -> Any:
    if len(output.shape) >= 2 and output.shape[-1] > 1:
        return jax.random.randint(key, output.shape[:-1], 0, output.shape[-1])
    return jax.random.normal(key, output.shape, output.dtype)


def loss_of_one(outputs: Any, targets: Any) -> Float[Array, ""]:
    """`mujax.train.default_loss` of the one array that a model returns, whatever else it returns."""
    return default_loss(arrays(outputs), targets)


def loss_of_all(outputs: Any, targets: Any) -> Float[Array, ""]:
    """The sum of `mujax.train.default_loss` over the arrays of floats that a model returns."""
    pairs = zip(floating(outputs), targets, strict=True)
    return sum((default_loss(output, target) for output, target in pairs), jnp.zeros(()))
