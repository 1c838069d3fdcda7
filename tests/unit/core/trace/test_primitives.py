"""Whatever jax.numpy, jax.lax, jax.nn, jax.random and Flax can emit, the interpreter does not break."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core.primitives as jex_primitives
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback

import mujax
from mujax.core.program import CONTROL
from mujax.core.trace import analyse
from mujax.core.trace.primitives import PRIMITIVES

BASE, WIDTH = 8, 24
KEY = jax.random.key(0)

Call = Callable[[jax.Array], Any]
"""A function of an array of shape (3, width)."""


def _named(
    module: Any, names: str, prefix: str = "", wrap: Callable[[Any], Call] = lambda f: f
) -> dict[str, Call]:
    return {prefix + name: wrap(getattr(module, name)) for name in names.split()}


def _pair(function: Any) -> Call:
    return lambda x: function(x, x[::-1])


def _positive(function: Any) -> Call:
    return lambda x: function(jnp.abs(x) + 1, jnp.abs(x) + 2)


def _square(x):
    """A matrix of (3, 3)."""
    return x[:, :3] @ x[:, :3].T + jnp.eye(3)


def _of_square(function: Any) -> Call:
    return lambda x: function(_square(x))


def _over(axis: int) -> Callable[[Any], Call]:
    return lambda function: functools.partial(function, axis=axis)


def _of_key(function: Any) -> Call:
    """Noise of the shape of the array."""
    return lambda x: x + function(KEY, x.shape)


@jax.custom_vjp
def _own_vjp(x):
    return jnp.sin(x)


_own_vjp.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))


@jax.custom_jvp
def _own_jvp(x):
    return jnp.sin(x)


_own_jvp.defjvps(lambda t, out, x: t * jnp.cos(x))


def _gradient(function: Call) -> Call:
    return jax.grad(lambda x: jnp.tanh(function(x)).sum())


def _max_pool(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2), (1, 2), "VALID")


CALLS: dict[str, Call] = {
    **_named(
        jnp,
        "abs arccos acosh angle asin asinh atan atanh cbrt ceil conj cos cosh deg2rad exp exp2 "
        "expm1 floor i0 imag isfinite isnan log log10 log1p log2 logical_not nan_to_num negative "
        "real reciprocal rint round sign signbit sin sinc sinh spacing sqrt square tan tanh trunc "
        "frexp modf ravel transpose flip rot90 squeeze tril triu copy zeros_like ones_like "
        "unstack",
    ),
    **_named(
        jnp,
        "add arctan2 copysign divide divmod equal float_power floor_divide fmax fmod greater "
        "heaviside hypot less logaddexp logaddexp2 logical_and maximum minimum mod multiply "
        "nextafter power remainder subtract",
        wrap=_pair,
    ),
    **{
        name + f" over axis {axis}": call
        for axis in (0, 1)
        for name, call in _named(
            jnp,
            "all any max mean median prod ptp std sum var argmax argmin nanmax nanmean nanstd "
            "nansum count_nonzero cumsum cumprod average sort argsort",
            wrap=_over(axis),
        ).items()
    },
    **_named(
        jax.nn,
        "relu relu6 sigmoid softplus sparse_plus silu log_sigmoid leaky_relu hard_sigmoid "
        "hard_silu hard_tanh elu celu selu gelu glu squareplus mish soft_sign log_softmax softmax "
        "logsumexp standardize",
        "nn.",
    ),
    **_named(
        lax, "digamma erf erf_inv erfc lgamma bessel_i0e bessel_i1e rsqrt logistic cummax cummin", "lax."
    ),
    **_named(lax, "igamma igammac random_gamma_grad polygamma zeta", "lax.", wrap=_positive),
    **_named(jnp.linalg, "cholesky det eigh inv norm pinv slogdet svd", "linalg.", wrap=_of_square),
    **_named(
        jax.random,
        "normal uniform gumbel exponential laplace cauchy rademacher bits",
        "random.",
        wrap=_of_key,
    ),
    # Layout.
    "append": lambda x: jnp.append(x, x, axis=1),
    "block": lambda x: jnp.block([[x, x], [x, x]]),
    "broadcast_to": lambda x: jnp.broadcast_to(x, (2, *x.shape)),
    "concatenate": lambda x: jnp.concatenate([x, x]),
    "diag": lambda x: jnp.diag(x[0]),
    "diagonal": lambda x: jnp.diagonal(x[:, :3]),
    "diff": lambda x: jnp.diff(x, axis=1),
    "expand_dims": lambda x: x[None, ..., None],
    "insert": lambda x: jnp.insert(x, 0, 1.0, axis=0),
    "meshgrid": lambda x: jnp.meshgrid(x[0], x[1]),
    "moveaxis": lambda x: jnp.moveaxis(x, 0, 1),
    "pad": lambda x: jnp.pad(x, 1),
    "pad reflect": lambda x: jnp.pad(x, 1, mode="reflect"),
    "repeat": lambda x: jnp.repeat(x, 2, axis=1),
    "roll": lambda x: jnp.roll(x, 1, axis=1),
    "split": lambda x: jnp.split(x, 2, axis=1),
    "stack": lambda x: jnp.stack([x, x], 1),
    "tile": lambda x: jnp.tile(x, (1, 2)),
    "strided": lambda x: x[:, ::2],
    "last": lambda x: x[..., -1],
    "collapse": lambda x: lax.collapse(x, 0, 2),
    "pad inside": lambda x: lax.pad(x, 0.0, ((0, 0, 1), (1, 1, 0))),
    "image.resize": lambda x: jax.image.resize(x, (6, x.shape[1]), "bilinear"),
    # Kinds of number.
    "to int": lambda x: x.astype(jnp.int32),
    "to bfloat16": lambda x: x.astype(jnp.bfloat16),
    "to bool": lambda x: x.astype(bool),
    "bits of ints": lambda x: ((x.astype(int) & 1) | 2 ^ 3) << 1 >> 1,
    "not of ints": lambda x: ~x.astype(int),
    "population count": lambda x: lax.population_count(x.astype(jnp.int32)) + lax.clz(x.astype(jnp.int32)),
    "bitcast": lambda x: x.view(jnp.int32),
    "complex": lambda x: jnp.abs(lax.complex(x, x) * 1j),
    "reduce_precision": lambda x: lax.reduce_precision(x, 5, 10),
    # Choice and order.
    "clip": lambda x: jnp.clip(x, -1, 1),
    "digitize": lambda x: jnp.digitize(x, jnp.array([0.0, 1.0])),
    "histogram": lambda x: jnp.histogram(x, bins=4)[0],
    "interp": lambda x: jnp.interp(x, jnp.arange(4.0), jnp.arange(4.0)),
    "isin": lambda x: jnp.isin(x, jnp.arange(3.0)),
    "lexsort": lambda x: jnp.lexsort((x[0], x[1])),
    "one_hot": lambda x: jax.nn.one_hot(x.argmax(1), 4),
    "piecewise": lambda x: jnp.piecewise(x, [x < 0], [lambda v: -v, lambda v: v]),
    "quantile": lambda x: jnp.quantile(x, 0.5, axis=0),
    "searchsorted": lambda x: jnp.searchsorted(jnp.arange(3.0), x),
    "select": lambda x: jnp.select([x > 0], [x], -x),
    "sort pairs": lambda x: lax.sort((x, x), num_keys=1),
    "top_k": lambda x: lax.top_k(x, 2),
    "approx_max_k": lambda x: lax.approx_max_k(x, 2),
    "where": lambda x: jnp.where(x > 0, x, 0.0),
    # Looking up and writing.
    "at": lambda x: x.at[0].set(1.0).at[:, 0].add(1.0).at[0].mul(x[1]).at[0].min(x[1]).at[1].max(0.0),
    "at, by arrays": lambda x: x.at[jnp.array([0, 1])].add(x[jnp.array([1, 2])]).at[0].apply(jnp.sin),
    "at, of gradients": lambda x: x.at[0].subtract(2.0).at[0].divide(2.0).at[1].power(2.0),
    "take rows": lambda x: jnp.take(x, jnp.array([0, 1]), axis=0),
    "take_along_axis": lambda x: jnp.take_along_axis(x, jnp.argsort(x, 0), axis=0),
    "put_along_axis": lambda x: jnp.put_along_axis(x, jnp.zeros((1, x.shape[1]), int), 1.0, 0, inplace=False),
    "rows by data": lambda x: x[x[:, :2].astype(int).clip(0, 2)],
    "dynamic_slice": lambda x: lax.dynamic_slice(x, (0, 1), (2, 2)),
    "dynamic_update_slice": lambda x: lax.dynamic_update_slice(x, x[:1], (1, 0)),
    "dynamic_index": lambda x: lax.dynamic_index_in_dim(x, x.argmax() % 3, 0),
    "segment_sum": lambda x: jax.ops.segment_sum(x, jnp.array([0, 0, 1]), 2),
    "segment_max": lambda x: jax.ops.segment_max(x, jnp.array([0, 0, 1]), 2),
    "map_coordinates": lambda x: jax.scipy.ndimage.map_coordinates(x[:, :3], [jnp.ones(2), jnp.ones(2)], 1),
    # Sums and products.
    "dot": lambda x: jnp.dot(x, x.T),
    "einsum": lambda x: jnp.einsum("ab,cb->ac", x, x),
    "trace": lambda x: jnp.einsum("ii->", x @ x.T),
    "kron": lambda x: jnp.kron(x, jnp.ones((2, 2))),
    "outer": lambda x: jnp.outer(x[0], x[1]),
    "cross": lambda x: jnp.cross(x[:, :3], x[:, :3]),
    "cov": jnp.cov,
    "vdot": lambda x: jnp.vdot(x, x),
    "polyval": lambda x: jnp.polyval(jnp.ones(3), x),
    "vander": lambda x: jnp.vander(x[0], 3),
    "logsumexp": lambda x: jax.scipy.special.logsumexp(x, axis=0, b=jnp.ones_like(x)),
    "convolve": lambda x: jnp.convolve(x[0], jnp.ones(3)),
    "conv": lambda x: lax.conv(x[:, None], jnp.ones((2, 1, 3)), (1,), "SAME"),
    "conv_transpose": lambda x: lax.conv_transpose(x[..., None], jnp.ones((3, 1, 2)), (2,), "SAME"),
    "conv patches": lambda x: lax.conv_general_dilated_patches(x[:, None], (3,), (1,), "SAME"),
    "ragged_dot": lambda x: lax.ragged_dot(x, jnp.ones((2, x.shape[1], 2)), jnp.array([1, 2], jnp.int32)),
    "attention": lambda x: jax.nn.dot_product_attention(*[x[None, :, None]] * 3, scale=1 / x.shape[1]),
    "reduce": lambda x: lax.reduce(x, 0.0, lax.add, (0,)),
    "reduce by a function": lambda x: lax.reduce(x, 0.0, lambda a, b: a + b * 2, (0,)),
    "reduce bits": lambda x: lax.reduce(x > 0, False, lax.bitwise_xor, (0,)),
    "max pool": _max_pool,
    "average pool": lambda x: lax.reduce_window(x, 0.0, lax.add, (2, 1), (1, 1), "SAME"),
    "pool by a product": lambda x: lax.reduce_window(x, 1.0, lax.mul, (2, 1), (1, 1), "SAME"),
    "cumlogsumexp": lambda x: lax.cumlogsumexp(x, axis=0),
    "associative_scan": lambda x: lax.associative_scan(jnp.multiply, x, axis=0),
    # Control flow and transforms.
    "scan": lambda x: lax.scan(lambda c, v: (jnp.tanh(c + v), c), x[0], x),
    "map": lambda x: lax.map(jnp.tanh, x),
    "while": lambda x: lax.while_loop(lambda v: v.sum() < 0, lambda v: jnp.tanh(v) + 1, x),
    "fori": lambda x: lax.fori_loop(0, 3, lambda i, v: jnp.tanh(v), x),
    "cond": lambda x: lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x),
    "switch": lambda x: lax.switch(x.argmax() % 2, [jnp.sin, jnp.cos], x),
    "jit": jax.jit(jnp.sin),
    "checkpoint": jax.checkpoint(jnp.sin),
    "vmap": jax.vmap(jnp.sin),
    "custom_vjp": _own_vjp,
    "custom_jvp": _own_jvp,
    "gradient": _gradient(jnp.sin),
    "gradient of custom_vjp": _gradient(_own_vjp),
    "gradient of max pool": _gradient(_max_pool),
    "gradient of sort": _gradient(lambda x: jnp.sort(x, axis=0)),
    "gradient of cumsum": _gradient(lambda x: jnp.cumsum(x, axis=0)),
    "gradient of rows": _gradient(lambda x: x[jnp.array([0, 1])]),
    "jvp": lambda x: jax.jvp(jnp.sin, (x,), (x,)),
    "hessian": lambda x: jax.hessian(lambda v: jnp.sin(v).sum())(x[0, :2]),
    "stop_gradient": lax.stop_gradient,
    "optimization_barrier": lax.optimization_barrier,
    "named_scope": lambda x: jax.named_scope("scope")(jnp.sin)(x),
    "checkpoint_name": lambda x: checkpoint_name(x, "name"),
    "debug.print": lambda x: (jax.debug.print("{}", x.sum()), x)[1],
    "sharding": lambda x: lax.with_sharding_constraint(
        x, jax.sharding.SingleDeviceSharding(jax.devices()[0])
    ),
    # Randomness that depends on data.
    "bernoulli": lambda x: jax.random.bernoulli(KEY, jax.nn.sigmoid(x)),
    "categorical": lambda x: jax.random.categorical(KEY, x),
    "permutation": lambda x: jax.random.permutation(KEY, x),
    "choice": lambda x: jax.random.choice(KEY, x, (2,), replace=False),
    "truncated_normal": lambda x: x + jax.random.truncated_normal(KEY, -2, 2, x.shape),
    "gamma": lambda x: jax.random.gamma(KEY, jnp.abs(x)),
    "poisson": lambda x: jax.random.poisson(KEY, jnp.abs(x)),
    "orthogonal": lambda x: jax.random.orthogonal(KEY, 3) @ x,
    "keys": lambda x: x + jax.random.normal(jax.random.fold_in(jax.random.split(KEY)[0], 1), x.shape),
    "old keys": lambda x: x + jax.random.normal(jax.random.PRNGKey(0), x.shape),
    "hardware keys": lambda x: x + jax.random.normal(jax.random.key(0, impl="rbg"), x.shape),
    "key data": lambda x: x + jax.random.normal(jax.random.wrap_key_data(jax.random.key_data(KEY)), x.shape),
    # Decompositions, transforms, callbacks.
    "norms": lambda x: [jnp.linalg.norm(x, ord=ord, axis=0) for ord in (None, 1, jnp.inf)],
    "qr": lambda x: jnp.linalg.qr(x.T),
    "eig": lambda x: jnp.abs(jnp.linalg.eig(_square(x))[0]),
    "solve": lambda x: jnp.linalg.solve(_square(x), x),
    "triangular": lambda x: jax.scipy.linalg.solve_triangular(_square(x), x),
    "lstsq": lambda x: jnp.linalg.lstsq(_square(x), x)[0],
    "expm": lambda x: jax.scipy.linalg.expm(_square(x)),
    "fft": lambda x: jnp.real(jnp.fft.fft(x, axis=0)),
    "irfft": lambda x: jnp.fft.irfft(jnp.fft.rfft(x, n=8, axis=0), axis=0),
    "fft over width": lambda x: jnp.real(jnp.fft.fft(x, axis=1)),
    "pure_callback": lambda x: jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x),
    "io_callback": lambda x: io_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x),
}

OPAQUE: dict[str, set[str]] = {
    "linalg.cholesky": {"cholesky"},
    "linalg.eigh": {"eigh"},
    "linalg.inv": {"lu", "custom_linear_solve"},
    "linalg.pinv": {"svd"},
    "linalg.slogdet": {"lu"},
    "linalg.svd": {"svd"},
    "eig": {"eig"},
    "solve": {"lu", "custom_linear_solve"},
    "triangular": {"triangular_solve"},
    "lstsq": {"svd"},
    "expm": {"lu", "custom_linear_solve"},
    "fft over width": {"fft"},
    "pure_callback": {"pure_callback"},
    "io_callback": {"io_callback"},
}
"""What is met and can't be looked into, by call; all else is."""


def opaque(call: Callable[..., Any], *shapes: Callable[[int], tuple[int, ...]]) -> set[str]:
    """The primitives that the interpreter can't look into, of a call whose second argument is a parameter."""
    base, target = (
        jax.make_jaxpr(call)(*(jax.ShapeDtypeStruct(shape(width), jnp.float32) for shape in shapes))
        for width in (BASE, WIDTH)
    )
    findings = analyse(base, target, {1: "kernel"}).findings
    return {finding.message.partition(" ")[0] for finding in findings if finding.kind == "opaque"}


@pytest.mark.parametrize("name", CALLS)
def test_no_call_on_data_breaks_anything(name):
    found = opaque(lambda x, k: CALLS[name](x @ k), lambda w: (3, 7), lambda w: (7, w))
    assert found == OPAQUE.get(name, set())


@pytest.mark.parametrize("name", CALLS)
def test_no_call_on_a_parameter_breaks_anything(name):
    def call(x, k):
        return [leaf.astype(jnp.float32) * x.sum() for leaf in jax.tree.leaves(CALLS[name](k))]

    found = opaque(call, lambda w: (3, 7), lambda w: (3, w))
    assert found == OPAQUE.get(name, set())


# Those that none of the above emits, or that are opaque by design.
WITHOUT_RULE = {
    *{name for names in OPAQUE.values() for name in names} - {"fft"},
    *(
        "after_all",
        "create_token",
        "custom_lin",
        "empty2",
        "hessenberg",
        "householder_product",
    ),
    *("ragged_all_to_all", "schur", "select_and_scatter", "tridiagonal", "tridiagonal_solve"),
}


def test_every_public_primitive_has_a_rule_or_is_known_to_have_none():
    """A new version of JAX that brings new primitives fails here, and not in a user's hands."""
    names = {getattr(jex_primitives, name).name for name in dir(jex_primitives) if name.endswith("_p")}
    assert names - PRIMITIVES.keys() - CONTROL <= WITHOUT_RULE


# ---- Flax's layers ---------------------------------------------------------------------------------------


class Between(nn.Module):
    """A layer between a first and a last product."""

    width: int
    layer: Callable

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="out")(self.layer(self.width)(nn.Dense(self.width, name="first")(x)))


LINEN: dict[str, Callable[[int], Call]] = {
    "Dense": lambda w: nn.Dense(w),
    "DenseGeneral": lambda w: nn.DenseGeneral((2, w), axis=(-2, -1)),
    "Einsum": lambda w: nn.Einsum((w, w), "...a,ab->...b"),
    "Conv": lambda w: nn.Conv(w, (3,)),
    "Conv, circular": lambda w: nn.Conv(w, (3,), padding="CIRCULAR"),
    "Conv, causal": lambda w: nn.Conv(w, (3,), padding="CAUSAL"),
    "ConvTranspose": lambda w: nn.ConvTranspose(w, (3,), strides=(2,)),
    "ConvLocal": lambda w: nn.ConvLocal(w, (3,)),
    "BatchNorm": lambda w: nn.BatchNorm(use_running_average=False),
    "LayerNorm": lambda w: nn.LayerNorm(),
    "GroupNorm": lambda w: nn.GroupNorm(2),
    "InstanceNorm": lambda w: nn.InstanceNorm(),
    "RMSNorm": lambda w: nn.RMSNorm(),
    "WeightNorm": lambda w: nn.WeightNorm(nn.Dense(w)),
    "Dropout": lambda w: nn.Dropout(0.5, deterministic=False),
    "PReLU": lambda w: nn.PReLU(),
    "max_pool": lambda w: functools.partial(nn.max_pool, window_shape=(2,)),
    "min_pool": lambda w: functools.partial(nn.pooling.min_pool, window_shape=(2,)),
    "avg_pool": lambda w: functools.partial(nn.avg_pool, window_shape=(2,), padding="SAME"),
    "SelfAttention": lambda w: nn.MultiHeadDotProductAttention(2, dropout_rate=0.1, deterministic=False),
    "LSTM": lambda w: nn.RNN(nn.LSTMCell(w)),
    "OptimizedLSTM": lambda w: nn.RNN(nn.OptimizedLSTMCell(w)),
    "GRU": lambda w: nn.RNN(nn.GRUCell(w)),
    "MGU": lambda w: nn.RNN(nn.MGUCell(w)),
    "SimpleCell": lambda w: nn.RNN(nn.SimpleCell(w)),
    "Bidirectional": lambda w: nn.Bidirectional(nn.RNN(nn.GRUCell(w)), nn.RNN(nn.GRUCell(w))),
    "ConvLSTM": lambda w: lambda x: nn.RNN(nn.ConvLSTMCell(w, (3,)))(x[:, :, None]),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.samples) if name == "WeightNorm" else name for name in LINEN],
)
def test_linens_layers_are_all_seen(name):
    x = jax.ShapeDtypeStruct((2, 4, 7), jnp.float32)
    mup = mujax.mup_init(Between(WIDTH, LINEN[name]), Between(BASE, LINEN[name]), x, strict=True)
    assert mup.corrections


class BetweenNNX(nnx.Module):
    def __init__(self, width, layer, rngs):
        self.first = nnx.Linear(7, width, rngs=rngs)
        self.layer = layer(width, rngs)
        self.out = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.layer(self.first(x)))


NNX: dict[str, Callable[[int, nnx.Rngs], Call]] = {
    "Linear": lambda w, rngs: nnx.Linear(w, w, rngs=rngs),
    "LinearGeneral": lambda w, rngs: nnx.LinearGeneral(w, (w,), rngs=rngs),
    "Einsum": lambda w, rngs: nnx.Einsum("abc,cd->abd", (w, w), rngs=rngs),
    "Conv": lambda w, rngs: nnx.Conv(w, w, (3,), rngs=rngs),
    "ConvTranspose": lambda w, rngs: nnx.ConvTranspose(w, w, (3,), rngs=rngs),
    "BatchNorm": lambda w, rngs: nnx.BatchNorm(w, rngs=rngs),
    "LayerNorm": lambda w, rngs: nnx.LayerNorm(w, rngs=rngs),
    "RMSNorm": lambda w, rngs: nnx.RMSNorm(w, rngs=rngs),
    "GroupNorm": lambda w, rngs: nnx.GroupNorm(w, num_groups=2, rngs=rngs),
    "InstanceNorm": lambda w, rngs: nnx.InstanceNorm(w, rngs=rngs),
    "Dropout": lambda w, rngs: nnx.Dropout(0.5, rngs=rngs),
    "PReLU": lambda w, rngs: nnx.PReLU(),
    "LoRALinear": lambda w, rngs: nnx.LoRALinear(w, w, lora_rank=2, rngs=rngs),
    "MultiHeadAttention": lambda w, rngs: nnx.MultiHeadAttention(2, w, decode=False, rngs=rngs),
    "GRU": lambda w, rngs: nnx.RNN(nnx.GRUCell(w, w, rngs=rngs)),
    "LSTM": lambda w, rngs: nnx.RNN(nnx.LSTMCell(w, w, rngs=rngs)),
}


@pytest.mark.parametrize("name", NNX)
def test_nnxs_layers_are_all_seen(name):
    x = jax.ShapeDtypeStruct((2, 4, 7), jnp.float32)

    def build(width):
        return lambda rngs: BetweenNNX(width, NNX[name], rngs)

    mup = mujax.mup_init(build(WIDTH), build(BASE), x, strict=True)
    assert mup.corrections
