"""mujax's side: the models of `problems.py` as plain Flax, trained with `mujax` and nothing else of µP."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float64, Int64
from problems import Architecture, Case, Mlp, Transformer, batches, tree, weights

import mujax

DOUBLE: Final = jnp.float64


class FlaxMlp(nn.Module):
    """`problems.Mlp`."""

    size: Mlp

    @nn.compact
    def __call__(self, x: Float64[Array, "batch features"]) -> Float64[Array, "batch classes"]:
        for index, width in enumerate(self.size.widths):
            x = nn.relu(nn.Dense(width, param_dtype=DOUBLE, name=f"hidden_{index}")(x))
        return nn.Dense(self.size.classes, param_dtype=DOUBLE, name="readout")(x)


class FlaxBlock(nn.Module):
    """Attention with logits divided by the head size, then an MLP, each after its layer norm."""

    size: Transformer

    @nn.compact
    def __call__(self, x_BxLxD: Float64[Array, "batch length model"]) -> Float64[Array, "batch length model"]:
        size = self.size
        y_BxLxD = nn.LayerNorm(epsilon=1e-5, param_dtype=DOUBLE, name="norm_attention")(x_BxLxD)
        q_BxLxHxK, k_BxLxHxK, v_BxLxHxK = (
            nn.DenseGeneral((size.heads, size.head), param_dtype=DOUBLE, name=name)(y_BxLxD)
            for name in ("query", "key", "value")
        )
        logits_BxHxLxL = jnp.einsum("blhk,bmhk->bhlm", q_BxLxHxK, k_BxLxHxK) / size.head
        past_LxL = jnp.tril(jnp.ones((size.length, size.length), bool))
        attention_BxHxLxL = nn.softmax(jnp.where(past_LxL, logits_BxHxLxL, -jnp.inf))
        mixed_BxLxHxK = jnp.einsum("bhlm,bmhk->blhk", attention_BxHxLxL, v_BxLxHxK)
        out = nn.DenseGeneral(size.model, axis=(-2, -1), param_dtype=DOUBLE, name="out")
        x_BxLxD = x_BxLxD + out(mixed_BxLxHxK)
        y_BxLxD = nn.LayerNorm(epsilon=1e-5, param_dtype=DOUBLE, name="norm_mlp")(x_BxLxD)
        hidden_BxLxF = nn.gelu(nn.Dense(size.mlp, param_dtype=DOUBLE, name="up")(y_BxLxD), approximate=True)
        return x_BxLxD + nn.Dense(size.model, param_dtype=DOUBLE, name="down")(hidden_BxLxF)


class FlaxTransformer(nn.Module):
    """`problems.Transformer`."""

    size: Transformer

    @nn.compact
    def __call__(self, tokens_BxL: Int64[Array, "batch length"]) -> Float64[Array, "batch length vocabulary"]:
        size = self.size
        tokens = nn.Embed(size.vocabulary, size.model, param_dtype=DOUBLE, name="tokens")
        positions_LxD = self.param(
            "positions", nn.initializers.normal(0.3), (size.length, size.model), DOUBLE
        )
        x_BxLxD = tokens(tokens_BxL) + positions_LxD
        for index in range(size.layers):
            x_BxLxD = FlaxBlock(size, name=f"block_{index}")(x_BxLxD)
        x_BxLxD = nn.LayerNorm(epsilon=1e-5, param_dtype=DOUBLE, name="norm")(x_BxLxD)
        return nn.Dense(size.vocabulary, param_dtype=DOUBLE, name="readout")(x_BxLxD)


def build(size: Architecture) -> nn.Module:
    """The Flax module of these sizes."""
    return FlaxMlp(size) if isinstance(size, Mlp) else FlaxTransformer(size)


@functools.cache
def _transform(target: Architecture, base: Architecture, parametrization: str) -> mujax.MupModel:
    x, _ = batches(target)
    inputs = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    return mujax.mup_init(build(target), build(base), inputs, parametrization=parametrization)


def transform(case: Case, parametrization: str = "mup") -> mujax.MupModel:
    """The case's model under mujax; cases that differ in their optimizer have one."""
    return _transform(case.target, case.base, parametrization)


_Gradient = Callable[[Any, Array, Array], tuple[Array, Any]]
_gradients: dict[int, tuple[mujax.MupModel, _Gradient]] = {}


def _gradient(model: mujax.MupModel) -> _Gradient:
    """Loss and gradient, compiled once for all optimizers of a model."""

    def loss_fn(params: Any, x: Array, labels: Array) -> Array:
        logits = model.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    _, found = _gradients.setdefault(id(model), (model, jax.jit(jax.value_and_grad(loss_fn))))
    return found


_MAKERS: Final[Mapping[str, Callable[..., optax.GradientTransformation]]] = {
    "sgd": mujax.mup_sgd,
    "adam": mujax.mup_adam,
    "adamw": mujax.mup_adamw,
    # PyTorch's is outside of the square root.
    "rmsprop": functools.partial(mujax.mup_rmsprop, eps_in_sqrt=False),
    "adagrad": mujax.mup_adagrad,
    "nadam": mujax.mup_nadam,
    "radam": mujax.mup_radam,
    "asgd": mujax.mup_sgd,
}


def optimizer(case: Case, spec: mujax.MupSpec, **changes: Any) -> optax.GradientTransformation:
    """The case's optimizer, with microsoft/mup's unscaled epsilon.

    Args:
        case: the run.
        spec: what to scale by.
        **changes: arguments to set differently.
    """
    given = {**case.options, **changes}
    if "scale_eps" in inspect.signature(_MAKERS[case.optimizer]).parameters:
        given.setdefault("scale_eps", False)
    return _MAKERS[case.optimizer](spec=spec, **given)


def losses(
    case: Case,
    model: mujax.MupModel | None = None,
    tx: optax.GradientTransformation | None = None,
) -> Float64[Array, " steps"]:
    """Trains with mujax and returns the loss at every step, before its update.

    Must be called with 64-bit types enabled.

    Args:
        case: the run.
        model: to train instead of the case's own.
        tx: to train with instead of the case's own.
    """
    mup = transform(case) if model is None else model
    trainer = optimizer(case, mup.spec) if tx is None else tx

    gradient = _gradient(mup)

    @jax.jit
    def update(gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = trainer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = tree(weights(case.target))
    state, found = jax.jit(trainer.init)(params), []
    for x, labels in zip(*batches(case.target), strict=True):
        loss, gradients = gradient(params, x, labels)
        params, state = update(gradients, state, params)
        found.append(loss)
    return jnp.stack(found)
