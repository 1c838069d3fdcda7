"""A call that is read otherwise than the one that `mup_init` traced is said, once; other modes are silent."""

import re
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mujax

X = jax.random.normal(jax.random.key(0), (6, 7))
KERNEL = nn.initializers.lecun_normal()


@jax.custom_vjp
def own_product(x, kernel):
    """A product that no factor outside reaches."""
    return jnp.tanh(jnp.tanh(x) @ jnp.tanh(kernel))


own_product.defvjp(lambda x, w: (own_product(x, w), (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))


def _kernel(module, x, train):
    """A product in training; in evaluation each entry is a gain."""
    kernel = module.param("kernel", KERNEL, (module.width, module.width))
    return x @ kernel if train else jnp.tanh(x[:, :, None] * kernel).mean(1)


def _readout(module, x, train):
    kernel = module.param("readout", KERNEL, (module.width, 3))
    return x @ kernel if train else own_product(x, kernel)


def _constant(module, x, train):
    return nn.relu(x) * (jnp.sqrt(module.width) if train else 2.0)


def _attention(module, x, train):
    q, k = (nn.Dense(module.width, name=name)(x) for name in "qk")
    if train:
        return nn.softmax(q @ k.T / jnp.sqrt(module.width)) @ x
    shape = jax.ShapeDtypeStruct((len(x), len(x)), x.dtype)
    return nn.softmax(jax.pure_callback(lambda q, k: np.asarray(q @ k.T), shape, q, k)) @ x


def _dropped_kernel(module, x, train):
    kernel = module.param("kernel", KERNEL, (module.width, module.width))
    if train:
        kept = jax.random.bernoulli(module.make_rng("dropout"), 0.9, kernel.shape)
        kernel = jnp.where(kept, kernel / 0.9, 0.0)
    return nn.relu(x @ kernel)


def _norm_and_dropout(module, x, train):
    x = nn.BatchNorm(use_running_average=not train)(nn.Dense(module.width)(x))
    return nn.Dropout(0.1, deterministic=not train)(nn.relu(x))


def _only_one_mode_reads_out(module, x, train):
    side = module.param("side", KERNEL, (module.width, 2))
    if train:
        module.sow("losses", "side", (x @ side).mean())
    return x


def _twice_in_one_mode(module, x, train):
    layer = nn.Dense(module.width)
    return layer(x) if train else layer(layer(x))


def _tied_in_one_mode(module, x, train):
    embed = nn.Embed(9, module.width)
    x = x + embed(jnp.arange(6))
    return x if train else embed.attend(x) @ jnp.ones((9, module.width)) / 9


class Net(nn.Module):
    """A body between an input layer and a readout."""

    width: int
    body: object

    @nn.compact
    def __call__(self, x, train):
        x = self.body(self, nn.relu(nn.Dense(self.width, name="first")(x)), train)
        return x if x.shape[-1] == 3 else nn.Dense(3, name="out")(x)


def said(body, first):
    """What is said at a call in the mode of `mup_init`'s, and then at three in the other one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mujax.MujaxWarning)
        mup = mujax.mup_init(Net(32, body), Net(8, body), X, train=first)
    variables = mup.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, X)

    def call(variables, train):
        rngs = {"dropout": jax.random.key(2)}
        return mup.apply(variables, X, train=train, rngs=rngs, mutable=["batch_stats", "losses"])

    texts = []
    for run in (
        lambda: call(variables, first),
        lambda: call(variables, not first),
        lambda: call(variables, not first),
        lambda: jax.eval_shape(lambda variables: call(variables, not first), variables),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", mujax.MujaxWarning)
            run()
        texts.append([str(one.message) for one in caught])
        assert all(one.filename == __file__ for one in caught)
    assert texts[0] == texts[2] == texts[3] == []
    return texts[1]


OTHERWISE = {
    "role": (
        _kernel,
        r"kernel is read as input in this call and as hidden at \S*test_other_calls.py:\d+ in the call that "
        r"mup_init traced; .*use it in the same way in both",
        r"kernel is read as hidden in this call and as input at \S*test_other_calls.py:\d+",
    ),
    "readout": (
        _readout,
        r"the product of readout gets the factor 1 in this call and 0.25 at \S*test_other_calls.py:\d+",
        r"the product of readout gets the factor 0.25 in this call and 1 at ",
    ),
    "constant": (
        _constant,
        r"the result of mul gets the factor 1 in this call and 0.5 at ",
        r"the result of mul gets the factor 0.5 in this call and 1 at ",
    ),
    "attention": (
        _attention,
        r"in a call that mup_init did not trace, pure_callback can't be looked into",
        # `mup_init` has said it of the first call.
        None,
    ),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", OTHERWISE)
def test_a_mode_that_is_read_otherwise_is_said_at_its_first_call(name, first):
    body, *texts = OTHERWISE[name]
    found, expected = said(body, first), texts[not first]
    if expected is None:
        assert found == []
    else:
        assert re.search(rf"^\S*test_other_calls.py:\d+: {expected}", found[0]), found


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "body",
    [_dropped_kernel, _norm_and_dropout, _only_one_mode_reads_out, _twice_in_one_mode, _tied_in_one_mode],
)
def test_modes_that_are_read_alike_are_silent(body, first):
    assert said(body, first) == []


class Module(nnx.Module):
    """The same in NNX: a kernel that is a gain in evaluation, and dropout."""

    def __init__(self, width, otherwise, *, rngs):
        self.first = nnx.Linear(7, width, rngs=rngs)
        self.hidden = nnx.Linear(width, width, rngs=rngs)
        self.out = nnx.Linear(width, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.otherwise = otherwise

    def __call__(self, x):
        x = self.dropout(nnx.relu(self.norm(self.first(x))))
        if self.otherwise and self.dropout.deterministic:
            return self.out(jnp.tanh(x[:, :, None] * self.hidden.kernel[...]).mean(1))
        return self.out(nnx.relu(self.hidden(x)))


@pytest.mark.parametrize("otherwise", [True, False])
def test_nnx_modules_in_both_modes(otherwise):
    def of(width):
        return lambda rngs: Module(width, otherwise, rngs=rngs)

    mup = mujax.mup_init(of(32), of(8), X)
    module = mup.init(jax.random.key(0))
    mup.apply(module, X)
    module.eval()
    if otherwise:
        with pytest.warns(
            mujax.MujaxWarning, match=r"hidden/kernel is read as input in this call and as hid"
        ):
            mup.apply(module, X)
    # Once, and without the fault not at all: warnings are errors here.
    mup.apply(module, X)
    module.train()
    mup.apply(module, X)


def test_a_parameter_that_the_first_call_did_not_use_is_read_at_the_second():
    class Half(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x, train):
            x = nn.relu(nn.Dense(self.width)(x))
            kernel = self.param("hidden", KERNEL, (self.width, self.width))
            return nn.Dense(3)(x @ kernel if train else x)

    with pytest.warns(mujax.MujaxWarning, match="the traced call does not use it"):
        mup = mujax.mup_init(Half(32), Half(8), X, train=False)
    variables = mup.init(jax.random.key(0), X)
    mup.apply(variables, X, train=False)
    with pytest.warns(mujax.MujaxWarning, match=r"hidden is read as hidden in .* input by default, as"):
        mup.apply(variables, X, train=True)
    given = mujax.mup_init(Half(32), Half(8), X, train=False, roles={"hidden": "hidden"})
    given.apply(variables, X, train=True)
