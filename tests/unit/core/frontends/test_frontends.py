"""Linen, NNX and pure functions: one behaviour; and what each can hold."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx

import mujax
from mujax.core.frontends import frontend

BASE, WIDTH = 8, 24
R = WIDTH / BASE
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(16, 7)), jnp.float32)
Y = jnp.asarray(RNG.integers(0, 3, 16))


def close(ours, theirs, rtol=1e-5) -> None:
    ours, theirs = jax.tree.leaves(ours), jax.tree.leaves(theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=1e-6)


# ---- the same network three times ------------------------------------------------------------------


class LinenNet(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.width, name="first")(x))
        x = nn.LayerNorm(name="norm", epsilon=1e-6)(x)
        x = nn.gelu(nn.Dense(2 * self.width, name="hidden")(x))
        return nn.Dense(3, name="out")(x)


class NNXNet(nnx.Module):
    def __init__(self, width, rngs):
        self.first = nnx.Linear(7, width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)
        self.hidden = nnx.Linear(width, 2 * width, rngs=rngs)
        self.out = nnx.Linear(2 * width, 3, rngs=rngs)

    def __call__(self, x):
        x = self.norm(nnx.relu(self.first(x)))
        return self.out(nnx.gelu(self.hidden(x)))


def functional(width: int) -> mujax.Functional:
    lecun = jax.nn.initializers.lecun_normal()

    def init(key, x):
        keys = jax.random.split(key, 3)
        sizes = {"first": (x.shape[-1], width), "hidden": (width, 2 * width), "out": (2 * width, 3)}
        params: Any = {
            name: {"kernel": lecun(k, shape), "bias": jnp.zeros(shape[1])}
            for k, (name, shape) in zip(keys, sizes.items(), strict=True)
        }
        return {**params, "norm": {"scale": jnp.ones(width), "bias": jnp.zeros(width)}}

    def apply(params, x):
        def dense(name, x):
            return x @ params[name]["kernel"] + params[name]["bias"]

        x = jax.nn.relu(dense("first", x))
        centred = x - x.mean(-1, keepdims=True)
        x = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        x = x * params["norm"]["scale"] + params["norm"]["bias"]
        return dense("out", jax.nn.gelu(dense("hidden", x)))

    return mujax.Functional(init, apply)


MODELS = {"linen": LinenNet, "nnx": lambda width: lambda rngs: NNXNet(width, rngs), "functional": functional}


@pytest.fixture(scope="module")
def twins() -> dict[str, mujax.MupModel]:
    return {name: mujax.mup_init(build(WIDTH), build(BASE), X) for name, build in MODELS.items()}


@pytest.fixture(scope="module")
def weights(twins) -> dict:
    """One set of numbers for all, nested by layer and name."""
    shapes = {path: spec.shape for path, spec in twins["linen"].spec.items()}
    out: dict[str, dict] = {}
    for path, shape in shapes.items():
        layer, name = path.split("/")
        out.setdefault(layer, {})[name] = jnp.asarray(0.5 * RNG.normal(size=shape), jnp.float32)
    return out


def module_with(weights: dict) -> NNXNet:
    module = NNXNet(WIDTH, nnx.Rngs(0))
    nnx.update(module, nnx.State(weights))
    return module


def test_twins_agree_in_spec(twins):
    linen, *others = (dict(mup.spec) for mup in twins.values())
    assert {path.split("/")[0] for path in linen} == {"first", "norm", "hidden", "out"}
    for other in others:
        assert other == linen
    assert len({tuple((c.kind, c.factor, c.path) for c in mup.corrections) for mup in twins.values()}) == 1
    scales = [mup.init_scales for mup in twins.values()]
    for other in scales[1:]:
        assert other == {path: pytest.approx(scale, rel=1e-6) for path, scale in scales[0].items()}


def loss_of(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()


def test_twins_agree_in_outputs_and_gradients(twins, weights):
    def linen(weights):
        return loss_of(twins["linen"].apply({"params": weights}, X))

    def pure(weights):
        return loss_of(twins["functional"].apply(weights, X))

    @nnx.jit
    def nnx_loss(module):
        return nnx.value_and_grad(lambda module: loss_of(twins["nnx"].apply(module, X)))(module)

    expected = jax.jit(jax.value_and_grad(linen))(weights)
    close(jax.jit(jax.value_and_grad(pure))(weights), expected)
    value, gradient = nnx_loss(module_with(weights))
    close((value, nnx.to_pure_dict(gradient)), expected)
    # The twin: without the factor of the readout, another value and another gradient.
    plain = jax.jit(jax.value_and_grad(lambda w: loss_of(LinenNet(WIDTH).apply({"params": w}, X))))(weights)
    assert abs(float(plain[0] - expected[0])) > 1e-2


@pytest.mark.parametrize("family", ["adamw", "sgd"])
def test_twins_agree_after_training(twins, weights, family):
    def optimizer(mup):
        if family == "sgd":
            return mujax.mup_sgd(0.1, mup.spec, momentum=0.9)
        return mujax.mup_adamw(0.01, mup.spec, weight_decay=0.1)

    def train(name, wrap):
        mup = twins[name]
        tx = optimizer(mup)

        @jax.jit
        def run(params):
            def step(state, _):
                params, inner = state
                gradient = jax.grad(lambda p: loss_of(mup.apply(wrap(p), X)))(params)
                updates, inner = tx.update(gradient, inner, params)
                return (optax.apply_updates(params, updates), inner), None

            return jax.lax.scan(step, (params, tx.init(params)), None, length=3)[0][0]

        return run(weights)

    def train_nnx():
        module, mup = module_with(weights), twins["nnx"]
        state = nnx.Optimizer(module, optimizer(mup), wrt=nnx.Param)

        @nnx.jit
        def step(module, state):
            gradient = nnx.grad(lambda module: loss_of(mup.apply(module, X)))(module)
            state.update(module, gradient)

        for _ in range(3):
            step(module, state)
        return nnx.to_pure_dict(nnx.state(module, nnx.Param))

    expected = train("linen", lambda params: {"params": params})
    close(train("functional", lambda params: params), expected, rtol=1e-4)
    close(train_nnx(), expected, rtol=1e-4)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), expected, weights)
    assert min(jax.tree.leaves(moved)) > 1e-4


# ---- NNX: what a call changes, and what it does not --------------------------------------------------


class Stateful(nnx.Module):
    """Batch statistics, dropout, a counter of its own, and settings."""

    def __init__(self, width, rngs):
        self.first = nnx.Linear(7, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(width, 3, bias_init=nnx.initializers.normal(1.0), rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))
        self.gain = 1.0

    def __call__(self, x):
        self.calls[...] += 1
        x = self.norm(nnx.relu(self.first(x)))
        return self.out(self.dropout(x)) * self.gain

    def encode(self, x, *, scale):
        return scale * self.first(x)


def stateful(width):
    return lambda rngs: Stateful(width, rngs)


@pytest.fixture(scope="module")
def mup_stateful() -> mujax.MupModel:
    return mujax.mup_init(stateful(WIDTH), stateful(BASE), X)


def copies(mup) -> tuple[Stateful, Stateful]:
    """Two modules of the same numbers: one for mujax, one to call with the readout corrected by hand."""
    ours = mup.init(jax.random.key(3))
    by_hand = nnx.clone(ours)
    by_hand.out.kernel[...] = by_hand.out.kernel[...] / R
    return ours, by_hand


def rest(module) -> dict:
    """All that is not a parameter, as numbers."""
    state = nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.Param)))
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, state)


def test_a_call_updates_the_module_as_calling_it_does(mup_stateful):
    ours, by_hand = copies(mup_stateful)
    before = rest(ours)
    for _ in range(2):
        close(mup_stateful.apply(ours, X), by_hand(X))
        close(rest(ours), rest(by_hand))
        assert jax.tree.structure(rest(ours)) == jax.tree.structure(rest(by_hand))
    assert (int(ours.calls[...]), int(ours.dropout.rngs.count[...])) == (2, 2)
    assert not np.allclose(ours.norm.mean[...], before["norm"]["mean"])
    # Parameters stay what they were.
    close(nnx.to_pure_dict(nnx.state(ours.first)), nnx.to_pure_dict(nnx.state(by_hand.first)))


def test_eval_and_train_modes(mup_stateful):
    ours, by_hand = copies(mup_stateful)
    mup_stateful.apply(ours, X), by_hand(X)
    for mode in ("eval", "train", "eval"):
        getattr(ours, mode)(), getattr(by_hand, mode)()
        first, second = mup_stateful.apply(ours, X), mup_stateful.apply(ours, X)
        close((first, second), (by_hand(X), by_hand(X)))
        assert np.allclose(first, second) == (mode == "eval")
        close(rest(ours), rest(by_hand))


def test_a_setting_changed_after_init_is_heard(mup_stateful):
    ours, by_hand = copies(mup_stateful)
    ours.gain = by_hand.gain = 4.0
    ours.dropout.rate = by_hand.dropout.rate = 0.25
    close(mup_stateful.apply(ours, X), by_hand(X))


def test_methods_of_a_module(mup_stateful):
    ours, by_hand = copies(mup_stateful)
    for method in ("encode", Stateful.encode):
        close(mup_stateful.apply(ours, X, scale=2.0, method=method), by_hand.encode(X, scale=2.0))


def test_state_changes_inside_of_nnx_jit_and_grad(mup_stateful):
    ours, by_hand = copies(mup_stateful)

    @nnx.jit
    def step(module):
        return nnx.value_and_grad(lambda module: (mup_stateful.apply(module, X) ** 2).mean())(module)

    @nnx.jit
    def expected(module):
        return nnx.value_and_grad(lambda module: (module(X) ** 2).mean())(module)

    (value, gradient), (other, by_chain) = step(ours), expected(by_hand)
    close(value, other)
    close(rest(ours), rest(by_hand))
    assert int(ours.calls[...]) == 1
    theirs = nnx.to_pure_dict(by_chain)
    theirs["out"]["kernel"] = theirs["out"]["kernel"] / R
    close(nnx.to_pure_dict(gradient), theirs)


def test_an_optimizer_of_nnx_trains_it(mup_stateful):
    module = mup_stateful.init(KEY)
    state = nnx.Optimizer(module, mujax.mup_adamw(0.05, mup_stateful.spec), wrt=nnx.Param)

    @nnx.jit
    def step(module, state):
        loss, gradient = nnx.value_and_grad(lambda module: loss_of(mup_stateful.apply(module, X)))(module)
        state.update(module, gradient)
        return loss

    losses = [float(step(module, state)) for _ in range(12)]
    assert losses[-1] < 0.7 * losses[0]
    assert int(module.calls[...]) == 12


def test_what_a_module_sows_can_be_captured():
    class Sows(nnx.Module):
        def __init__(self, width, rngs):
            self.first = nnx.Linear(7, width, rngs=rngs)
            self.out = nnx.Linear(width, 3, use_bias=False, rngs=rngs)

        def __call__(self, x):
            out = self.out(self.first(x))
            self.sow(nnx.Intermediate, "logits", out)
            return out

    build = lambda width: lambda rngs: Sows(width, rngs)  # noqa: E731
    mup = mujax.mup_init(build(WIDTH), build(BASE), X)
    module = mup.init(KEY)
    out, sown = nnx.capture(lambda module, x: mup.apply(module, x), nnx.Intermediate)(module, X)
    _, plain = nnx.capture(lambda module, x: module(x), nnx.Intermediate)(module, X)
    assert jax.tree.structure(sown) == jax.tree.structure(plain)
    # What is sown after the readout has its factor.
    close(sown["logits"], out)
    close(sown["logits"], jax.tree.map(lambda leaf: leaf / R, plain["logits"]))


def test_init_takes_a_key_or_rngs(mup_stateful):
    by_key, by_rngs = mup_stateful.init(jax.random.key(5)), mup_stateful.init(nnx.Rngs(jax.random.key(5)))
    close(nnx.to_pure_dict(nnx.state(by_key, nnx.Param)), nnx.to_pure_dict(nnx.state(by_rngs, nnx.Param)))
    streams = mup_stateful.init(nnx.Rngs(params=1, dropout=2))
    assert streams.dropout.rngs.tag == "dropout"
    # The key decides.
    other = mup_stateful.init(jax.random.key(6))
    assert not np.allclose(other.first.kernel[...], by_key.first.kernel[...])


def test_the_factory_and_its_modules_are_not_changed(mup_stateful):
    module = mup_stateful.init(KEY)
    again = mup_stateful.init(KEY)
    mup_stateful.apply(module, X)
    module.eval()
    assert int(again.calls[...]) == 0
    assert not again.norm.use_running_average
    assert int(mup_stateful.init(KEY).calls[...]) == 0


def test_a_module_of_another_width(mup_stateful):
    expected = "first/bias: expected shape (24,) as in mup_init, got (16,)"
    with pytest.raises(mujax.SpecMismatchError, match=re.escape(expected)):
        mup_stateful.apply(Stateful(16, nnx.Rngs(0)), X)


# ---- NNX: what a module can hold ---------------------------------------------------------------------


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.up = nnx.Linear(width, 2 * width, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(x)))


class Many(nnx.Module):
    """A list of more than ten layers, each of a size of its own; a dict; one layer used twice."""

    def __init__(self, width, rngs):
        self.first = nnx.Linear(7, width, use_bias=False, rngs=rngs)
        ones = {"a_initializer": nnx.initializers.ones, "b_initializer": nnx.initializers.ones}
        self.layers = nnx.List([nnx.LoRA(width, n + 1, width, rngs=rngs, **ones) for n in range(12)])
        self.parts = nnx.Dict(block=Block(width, rngs))
        self.again = self.parts.block
        self.out = nnx.Linear(width, 3, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.out(self.again(self.parts.block(x)))


def test_lists_dicts_and_shared_modules():
    build = lambda width: lambda rngs: Many(width, rngs)  # noqa: E731
    mup = mujax.mup_init(build(WIDTH), build(BASE), X)
    module = nnx.jit(mup.init)(KEY)
    for number, layer in enumerate(module.layers):
        for name, kernel in (("lora_a", layer.lora_a), ("lora_b", layer.lora_b)):
            assert mup.spec[f"layers/{number}/{name}"].shape == kernel.shape
        assert mup.spec[f"layers/{number}/lora_a"].role == "output"
        assert mup.spec[f"layers/{number}/lora_b"].role == "input"
    blocks = [path for path in mup.spec if path.endswith("up/kernel")]
    assert len(blocks) == 1
    assert mup.spec[blocks[0]].role == "hidden"
    by_hand = nnx.clone(module)
    for kernel in (by_hand.out.kernel, *(layer.lora_a for layer in by_hand.layers)):
        kernel[...] = kernel[...] / R
    close(nnx.jit(mup.apply)(module, X), nnx.jit(lambda module: module(X))(by_hand))


class Stacked(nnx.Module):
    """Three blocks made by vmap and run by scan, and an ensemble of readouts by vmap."""

    def __init__(self, width, rngs):
        self.first = nnx.Linear(7, width, use_bias=False, rngs=rngs)
        self.blocks = self._stack(lambda rngs: Block(width, rngs), 3, rngs)
        self.outs = self._stack(lambda rngs: nnx.Linear(width, 2, use_bias=False, rngs=rngs), 4, rngs)

    @staticmethod
    def _stack(build, number, rngs):
        return nnx.split_rngs(splits=number)(nnx.vmap(build, in_axes=(0,), out_axes=0))(rngs)

    def __call__(self, x):
        run = nnx.scan(nnx.remat(lambda x, block: block(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        x = run(self.first(x), self.blocks)
        return nnx.vmap(lambda out, x: out(x), in_axes=(0, None))(self.outs, x)


def test_layers_that_are_scanned_and_vmapped():
    build = lambda width: lambda rngs: Stacked(width, rngs)  # noqa: E731
    mup = mujax.mup_init(build(WIDTH), build(BASE), X)
    found = {path: (spec.role, spec.fan_in, spec.fan_out, spec.stack) for path, spec in mup.spec.items()}
    assert found["first/kernel"] == ("input", (0,), (1,), ())
    assert found["blocks/up/kernel"] == found["blocks/down/kernel"] == ("hidden", (1,), (2,), (0,))
    # All members read the same activation: the product alone does not distinguish members from outputs.
    assert found["outs/kernel"][:2] == ("output", (1,))
    module = mup.init(KEY)
    by_hand = nnx.clone(module)
    by_hand.outs.kernel[...] = by_hand.outs.kernel[...] / R
    close(mup.apply(module, X), by_hand(X))
    # What a scan stacks starts at the base's std per layer: LeCun's own already follows the fan-in.
    assert mup.init_scales["blocks/up/kernel"] == pytest.approx(1.0, rel=1e-6)


class Trees(nnx.Module):
    """A variable that holds a tree of arrays, and one of a class of the user's own."""

    class Weight(nnx.Param):
        pass

    def __init__(self, width, rngs):
        key = rngs.params()
        self.both = nnx.Param(
            {"a": jax.random.normal(key, (7, width)), "b": [jax.random.normal(key, (width, 3))]}
        )
        self.weight = self.Weight(jax.random.normal(key, (width, width)))
        self.table = nnx.Variable(jnp.ones((width,)))

    def __call__(self, x):
        both = self.both.get_value()
        return (x @ both["a"] * self.table[...]) @ self.weight[...] @ both["b"][0]


def test_variables_that_hold_trees():
    build = lambda width: lambda rngs: Trees(width, rngs)  # noqa: E731
    mup = mujax.mup_init(build(WIDTH), build(BASE), X)
    assert {path: (spec.role, spec.shape) for path, spec in mup.spec.items()} == {
        "both/value/a": ("input", (7, WIDTH)),
        "both/value/b/0": ("output", (WIDTH, 3)),
        "weight": ("hidden", (WIDTH, WIDTH)),
    }
    module = mup.init(KEY)
    theirs = Trees(WIDTH, nnx.Rngs(KEY))
    close(module.weight[...], theirs.weight[...] * R**-0.5)
    close(mup.apply(module, X), module(X) / R)
    # The optimizer knows them by the same paths.
    params = nnx.state(module, nnx.Param)
    tx = mujax.mup_adamw(0.1, mup.spec)
    tx.update(params, tx.init(params), params)


@pytest.mark.parametrize("fixed", ["heads", "size"])
def test_attention_of_nnx_with_a_tied_embedding(fixed):
    class Net(nnx.Module):
        def __init__(self, width, rngs):
            heads = 2 if fixed == "heads" else width // 4
            self.embed = nnx.Embed(11, width, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)

        def __call__(self, tokens):
            return self.embed.attend(self.attention(self.embed(tokens)))

    tokens = jnp.asarray(RNG.integers(0, 11, (2, 5)))
    build = lambda width: lambda rngs: Net(width, rngs)  # noqa: E731
    mup = mujax.mup_init(build(WIDTH), build(BASE), tokens)
    assert (mup.spec["embed/embedding"].role, mup.spec["embed/embedding"].tied) == ("input", True)
    found = {c.kind: c.factor for c in mup.corrections if c.factor != 1.0}
    expected = {"tied_readout": pytest.approx(1 / R)}
    if fixed == "heads":
        expected["attention"] = pytest.approx(R**-0.5)
    assert found == expected
    module = mup.init(KEY)
    assert mup.apply(module, tokens).shape == (2, 5, 11)


# ---- boxes -------------------------------------------------------------------------------------------


class Boxed(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        logical = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        x = nn.relu(nn.Dense(self.width, kernel_init=init, name="first")(x))
        x = nn.relu(nn.Dense(self.width, kernel_init=logical, name="hidden")(x))
        return nn.Dense(3, kernel_init=init, name="out")(x)


def test_partitioned_boxes_of_linen_stay_on():
    mup = mujax.mup_init(Boxed(WIDTH), Boxed(BASE), X)
    assert set(mup.spec) == {
        f"{layer}/{leaf}" for layer in ("first", "hidden", "out") for leaf in ("kernel", "bias")
    }
    variables, theirs = jax.jit(mup.init)(KEY), jax.jit(Boxed(WIDTH).init)(KEY, X)
    assert jax.tree.structure(variables) == jax.tree.structure(theirs)
    assert variables["params"]["first"]["kernel"].names == (None, "model")
    assert nn.get_partition_spec(variables) == nn.get_partition_spec(theirs)
    close(
        variables["params"]["out"]["kernel"].unbox(), theirs["params"]["out"]["kernel"].unbox() * np.sqrt(R)
    )
    # Boxed and unboxed variables are the same to apply and to the optimizer.
    plain = nn.unbox(variables)
    close(mup.apply(variables, X), mup.apply(plain, X))
    tx = mujax.mup_adamw(0.1, mup.spec)
    boxed = tx.update(variables["params"], tx.init(variables["params"]), variables["params"])[0]
    close(boxed, tx.update(plain["params"], tx.init(plain["params"]), plain["params"])[0])


def test_sharding_metadata_of_nnx_stays_on():
    class Net(nnx.Module):
        def __init__(self, width, rngs):
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
            self.first = nnx.Linear(7, width, kernel_init=init, rngs=rngs)
            self.out = nnx.Linear(width, 3, rngs=rngs)

        def __call__(self, x):
            return self.out(self.first(x))

    build = lambda width: lambda rngs: Net(width, rngs)  # noqa: E731
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        mup = mujax.mup_init(build(WIDTH), build(BASE), X)
        module, theirs = mup.init(KEY), Net(WIDTH, nnx.Rngs(KEY))
        assert module.first.kernel.get_metadata() == theirs.first.kernel.get_metadata()
        assert "model" in str(nnx.get_partition_spec(nnx.state(module))["first"]["kernel"])
        by_hand = nnx.clone(module)
        by_hand.out.kernel[...] = by_hand.out.kernel[...] / R
        close(mup.apply(module, X), by_hand(X))


# ---- pure functions ----------------------------------------------------------------------------------


def test_parameters_of_any_tree():
    """Tuples, lists and dataclasses; arguments that are trees, static or None."""

    def build(width):
        def init(key, batch, *, scale, mask=None):
            del batch, scale, mask
            return (jax.random.normal(key, (7, width)), [{"k": jax.random.normal(key, (width, 3))}, None])

        def apply(params, batch, *, scale, mask=None):
            first, (last, _) = params
            out = batch["x"] @ first @ last["k"] * scale
            return {"out": out if mask is None else out * mask, "aux": (None, batch["y"])}

        return mujax.Functional(init, apply)

    batch = {"x": X, "y": Y}
    mup = mujax.mup_init(build(WIDTH), build(BASE), batch, scale=2.0)
    assert {path: spec.role for path, spec in mup.spec.items()} == {"0": "input", "1/0/k": "output"}
    params = mup.init(KEY)
    assert isinstance(params, tuple)
    assert params[1][1] is None
    ours, theirs = mup.apply(params, batch, scale=2.0), build(WIDTH).apply(params, batch, scale=2.0)
    close(ours["out"], theirs["out"] / R)
    assert ours["aux"][0] is None
    mask = jnp.arange(3.0)
    close(mup.apply(params, batch, scale=3.0, mask=mask)["out"], theirs["out"] * mask * 1.5 / R)


def test_a_model_without_parameters_that_grow():
    """Only the readout's inputs grow, by a fixed feature map."""

    def build(width):
        features = jnp.asarray(np.random.default_rng(1).normal(size=(7, width)), jnp.float32)
        return mujax.Functional(
            lambda key, x: {"k": jax.random.normal(key, (width, 3))},
            lambda params, x: jnp.tanh(x @ features) @ params["k"],
        )

    mup = mujax.mup_init(build(WIDTH), build(BASE), X)
    assert mup.spec["k"].role == "output"
    params = mup.init(KEY)
    close(mup.apply(params, X), build(WIDTH).apply(params, X) / R)


# ---- the front end itself ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_traced_init_names_every_leaf(name):
    initial = frontend(MODELS[name](WIDTH)).trace_init([X], {})
    positions = sorted([*initial.params, *initial.state])
    assert positions == list(range(len(jax.tree.leaves(initial.variables))))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(initial.variables))
    assert initial.shapes(initial.params)["out/kernel"] == (2 * WIDTH, 3)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_runs_in_tracing(name):
    """Arguments that are too large to exist."""
    huge = jax.ShapeDtypeStruct((1 << 40, 7), jnp.float32)
    mup = mujax.mup_init(MODELS[name](1 << 20), MODELS[name](BASE), huge)
    assert mup.spec["hidden/kernel"].shape == (1 << 20, 1 << 21)


# ---- results that are not trees of arrays ----------------------------------------------------------


@dataclasses.dataclass
class Output:
    logits: Any
    name: str = "net"
    hidden: Any = None


@dataclasses.dataclass(frozen=True)
class FrozenOutput:
    logits: Any
    inner: Output


@dataclasses.dataclass(slots=True)
class SlottedOutput:
    logits: Any


class Bare:
    def __init__(self, logits: Any) -> None:
        self.logits = logits


RESULTS: dict[str, Callable[[Any, Any], Any]] = {
    "a string beside": lambda y, h: (y, "text"),
    "None beside": lambda y, h: {"y": y, "none": None, "deep": [None, (h, None)]},
    "Python numbers beside": lambda y, h: (y, 3, 0.5, True),
    "a dataclass": lambda y, h: Output(y, hidden=[h, None]),
    "a frozen dataclass in another": lambda y, h: FrozenOutput(y, Output(h)),
    "a dataclass with slots": lambda y, h: (SlottedOutput(y), h),
    "a plain object": lambda y, h: Bare({"y": y, "h": h}),
    "a function and a class": lambda y, h: (y, max, Output),
}


def contents(result: Any) -> list[Any]:
    """What is in a result, in order: arrays, objects by their type, and all else."""
    out: list[Any] = []
    for leaf in jax.tree.leaves(result, is_leaf=lambda leaf: leaf is None):
        if isinstance(leaf, Output | FrozenOutput | SlottedOutput):
            out += [type(leaf), *contents([getattr(leaf, f.name) for f in dataclasses.fields(leaf)])]
        elif isinstance(leaf, Bare):
            out += [Bare, *contents(leaf.logits)]
        else:
            out.append(leaf)
    return out


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_may_hold_anything(name):
    class Net(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x):
            h = nn.relu(nn.Dense(self.width)(x))
            return RESULTS[name](nn.Dense(3)(h), h.mean())

    mup, at_base = (mujax.mup_init(Net(width), Net(BASE), X) for width in (WIDTH, BASE))
    assert [c.kind for c in mup.corrections] == ["readout"]
    variables = mup.init(KEY, X)
    plain = contents(Net(WIDTH).apply(variables, X))
    bias = variables["params"]["Dense_1"]["bias"]
    for _ in range(2):
        ours = contents(mup.apply(variables, X))
        assert len(ours) == len(plain)
        for mine, theirs in zip(ours, plain, strict=True):
            if isinstance(theirs, jax.Array):
                factor = 1 / R if theirs.ndim == 2 else 1
                shift = bias if theirs.ndim == 2 else 0
                close(mine, (theirs - shift) * factor + shift)
            else:
                assert mine == theirs
                assert type(mine) is type(theirs)
    # At the base's widths the model runs as it is; and no array of a trace is left behind.
    small = at_base.init(KEY, X)
    close([leaf for leaf in contents(at_base.apply(small, X)) if isinstance(leaf, jax.Array)],
          [leaf for leaf in contents(Net(BASE).apply(small, X)) if isinstance(leaf, jax.Array)])  # fmt: skip
    gradient = jax.jit(jax.grad(lambda v: sum(leaf.sum() for leaf in contents(mup.apply(v, X))
                                              if isinstance(leaf, jax.Array))))(variables)  # fmt: skip
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))


def test_two_calls_return_two_objects():
    class Net(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x):
            return Output(nn.Dense(3)(nn.relu(nn.Dense(self.width)(x))))

    mup = mujax.mup_init(Net(WIDTH), Net(BASE), X)
    variables = mup.init(KEY, X)
    first, second = mup.apply(variables, X), mup.apply(variables, 2 * X)
    assert first is not second
    assert not np.allclose(first.logits, second.logits)


# ---- collections that the model does not use -------------------------------------------------------


class Sows(nn.Module):
    width: int
    looks: str | None = None

    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(self.width)(x))
        self.sow("intermediates", "h", h)
        if self.looks is not None:
            h = h + self.get_variable(self.looks, "shift", 0.0)
        return nn.Dense(3)(h)


def test_what_a_call_returned_goes_into_the_next():
    mup = mujax.mup_init(Sows(WIDTH), Sows(BASE), X)
    variables = mup.init(KEY, X)
    variables = {"params": variables["params"]}
    plain, state = mup.apply(variables, X, mutable=True)
    assert "intermediates" in state
    for mutable in (False, True, ["intermediates"]):
        out = mup.apply({**variables, **state}, X, mutable=mutable)
        theirs = Sows(WIDTH).apply({**variables, **state}, X, mutable=mutable)
        assert jax.tree.structure(out) == jax.tree.structure(theirs)
        close(out if mutable is False else out[0], plain)


@pytest.mark.parametrize("extra", [{"other": {"a": X}}, {"other": {"a": jnp.ones(WIDTH)}}, {"a": {}}, {
    "cache": {"k": jnp.ones((2, WIDTH)), "n": jnp.zeros((), int)}}])  # fmt: skip
def test_a_collection_that_the_model_does_not_use_is_ignored(extra):
    mup = mujax.mup_init(Sows(WIDTH), Sows(BASE), X)
    variables = {"params": mup.init(KEY, X)["params"]}
    close(mup.apply({**variables, **extra}, X), mup.apply(variables, X))


def test_a_new_variable_that_the_model_reads_is_refused():
    """The negative twin: what it would be at the base is not known."""
    mup = mujax.mup_init(Sows(WIDTH, "other"), Sows(BASE, "other"), X)
    variables = {"params": mup.init(KEY, X)["params"]}
    with pytest.raises(
        mujax.SpecMismatchError, match=r"other/shift: expected only variables that mup_init saw"
    ):
        mup.apply({**variables, "other": {"shift": jnp.ones(WIDTH)}}, X)


# ---- NNX: factories and bare arrays ----------------------------------------------------------------


class Keyword(nnx.Module):
    def __init__(self, width=WIDTH, *, scale=1.0, rngs):
        self.first = nnx.Linear(7, width, rngs=rngs)
        self.out = nnx.Linear(width, 3, rngs=rngs)
        self.scale = scale

    def __call__(self, x):
        return self.out(nnx.relu(self.first(x))) * self.scale


def _varargs(**kwargs):
    return Keyword(kwargs.pop("width", WIDTH), **kwargs)


FACTORIES: dict[str, Callable[[int], Any]] = {
    "partial": lambda width: functools.partial(Keyword, width),
    "partial by keyword": lambda width: functools.partial(Keyword, width=width, scale=1.0),
    "partial of a partial": lambda width: functools.partial(functools.partial(Keyword, scale=1.0), width),
    "rngs by keyword only": lambda width: lambda *, rngs: Keyword(width, rngs=rngs),
    "another name": lambda width: lambda r: Keyword(width, rngs=r),
    "a default after it": lambda width: lambda rngs, scale=1.0: Keyword(width, scale=scale, rngs=rngs),
    "positional only": lambda width: eval(
        "lambda rngs, /: make(rngs)", {"make": lambda r: Keyword(width, rngs=r)}
    ),
    "positional class": lambda width: functools.partial(NNXNet, width),
    "any arguments": lambda width: lambda *args: Keyword(width, rngs=args[0]),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_factories_of_every_kind(name):
    mup = mujax.mup_init(FACTORIES[name](WIDTH), FACTORIES[name](BASE), X)
    assert mup.spec["first/kernel"].role == "input"
    module = mup.init(KEY)
    assert mup.apply(module, X).shape == (16, 3)
    assert not np.allclose(module.first.kernel[...], mup.init(jax.random.key(1)).first.kernel[...])


@pytest.mark.parametrize(
    ("factory", "got"),
    [
        (lambda: Keyword(WIDTH, rngs=nnx.Rngs(0)), "got <lambda>() (too many positional arguments)"),
        (lambda rngs, width: Keyword(width, rngs=rngs), "missing a required argument: 'width'"),
        (functools.partial(NNXNet), "missing a required argument: 'width'"),
        (functools.partial(Keyword, 4, 5), "got Keyword"),
        (NNXNet, "missing a required argument: 'width'"),
        (functools.partial(Keyword, depth=2), "got an unexpected keyword argument 'depth'"),
        (functools.partial(Keyword, 4, rngs=nnx.Rngs(0)), "too many positional arguments"),
    ],
)  # fmt: skip
def test_a_factory_that_cannot_be_called_with_rngs_alone(factory, got):
    sentence = "^model: expected an NNX factory that takes nnx.Rngs and nothing else, got "
    with pytest.raises(mujax.MujaxError, match=sentence) as caught:
        mujax.mup_init(factory, factory, X)
    assert got in str(caught.value)
    assert str(caught.value).endswith("; pass lambda rngs: Net(..., rngs=rngs), with your own class for Net.")


def test_an_error_inside_of_a_factory_is_its_own():
    def broken(rngs):
        raise TypeError("my own fault")

    with pytest.raises(TypeError, match="my own fault"):
        mujax.mup_init(broken, broken, X)


@pytest.mark.parametrize(
    ("base", "got"),
    [
        (X, "got the shape (16, 7)"),
        (jax.ShapeDtypeStruct((2, 7), "float32"), "got the shape (2, 7)"),
        (np.ones(3), "got the shape (3,)"),
        (None, "got NoneType"),
        ({"params": {}}, "got dict"),
        ("net", "got str"),
    ],
)
def test_a_base_that_is_forgotten_is_called_a_base(base, got):
    with pytest.raises(mujax.MujaxError, match=r"^base: expected a Flax Linen module") as caught:
        mujax.mup_init(lambda rngs: Keyword(WIDTH, rngs=rngs), base)
    assert str(caught.value).endswith(got + "; call mup_init(model, base, *inputs).")
    with pytest.raises(mujax.MujaxError, match=r"^delta: expected"):
        mujax.mup_init(functional(WIDTH), functional(BASE), X, delta=3)


def test_a_linen_class_instead_of_an_instance():
    with pytest.raises(
        mujax.MujaxError, match=r"^base: expected an instance of .*; pass LinenNet\(\.\.\.\)\.$"
    ):
        mujax.mup_init(LinenNet(WIDTH), LinenNet, X)


class Inner(nnx.Module):
    def __init__(self, width):
        self.shift = jnp.linspace(0.0, 1.0, width)

    def __call__(self, h):
        return h + self.shift


TABLES: dict[str, Callable[[int], Any]] = {
    "grows with width": lambda width: jnp.sin(jnp.arange(float(width))),
    "of one size": lambda width: jnp.ones((16, 1)),
    "a scalar": lambda width: jnp.asarray(0.5),
    "whole numbers": lambda width: jnp.arange(width),
    "a mask": lambda width: jnp.arange(width) % 2 == 0,
    "in a module inside": Inner,
    "of NumPy": lambda width: np.ones(width, np.float32),
    "in a variable": lambda width: nnx.Variable(jnp.ones(width)),
}


@pytest.mark.parametrize("name", TABLES)
def test_bare_arrays_in_nnx_modules(name):
    class Net(nnx.Module):
        def __init__(self, width, rngs):
            self.table = TABLES[name](width)
            self.first = nnx.Linear(7, width, rngs=rngs)
            self.out = nnx.Linear(width, 3, rngs=rngs)

        def __call__(self, x):
            h = nnx.relu(self.first(x))
            if callable(self.table) and not isinstance(self.table, nnx.Variable):
                return self.out(self.table(h))
            return self.out(h + self.table)

    mup = mujax.mup_init(lambda rngs: Net(WIDTH, rngs), lambda rngs: Net(BASE, rngs), X)
    assert {path: spec.role for path, spec in mup.spec.items()} == {
        "first/bias": "input", "first/kernel": "input", "out/bias": "finite", "out/kernel": "output",
    }  # fmt: skip
    module = mup.init(KEY)
    plain = Net(WIDTH, nnx.Rngs(KEY))
    close(
        jax.tree.leaves(nnx.state(module, nnx.Not(nnx.Param))),
        jax.tree.leaves(nnx.state(plain, nnx.Not(nnx.Param))),
    )
    bias = module.out.bias[...]
    expected = (module(X) - bias) / R + bias
    close(mup.apply(module, X), expected)
    close(nnx.jit(lambda module: mup.apply(module, X))(module), expected)
    gradients = nnx.grad(lambda module: (mup.apply(module, X) ** 2).sum())(module)
    assert jax.tree.leaves(gradients["first"])
    # Made under a transformation, too, where Flax itself would leak the array.
    made = nnx.jit(lambda: mup.init(KEY))()
    close(mup.apply(made, X), expected)


def test_a_bare_array_that_scales_with_width_is_read_as_a_constant():
    def net(width, scale):
        class Net(nnx.Module):
            def __init__(self, rngs):
                self.scale = scale(width)
                self.first, self.out = nnx.Linear(7, width, rngs=rngs), nnx.Linear(width, 3, rngs=rngs)

            def __call__(self, x):
                return self.out(self.first(x) * self.scale)

        return lambda rngs: Net(rngs)

    def kinds(scale):
        return [c.kind for c in mujax.mup_init(net(WIDTH, scale), net(BASE, scale), X).corrections]

    assert kinds(lambda width: jnp.sqrt(jnp.asarray(float(width)))) == kinds(lambda width: width**0.5)
    assert "scale" in kinds(lambda width: jnp.sqrt(jnp.asarray(float(width))))
    assert kinds(lambda width: jnp.asarray(2.0)) == ["readout"]
