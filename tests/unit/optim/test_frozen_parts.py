"""The remedy of the error about a frozen part, tried: the frozen part stays, the other trains in µP."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx

import mujax

BASE, WIDTH = 8, 32
X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)), jnp.float32)
LR = 0.01


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.width, name="body")(x))
        return nn.Dense(2, name="head")(nn.relu(nn.Dense(self.width, name="middle")(x)))


class NNXNet(nnx.Module):
    def __init__(self, width, *, rngs):
        self.body = nnx.Linear(5, width, rngs=rngs)
        self.middle = nnx.Linear(width, width, rngs=rngs)
        self.head = nnx.Linear(width, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.middle(nnx.relu(self.body(x)))))


def labels(frozen):
    return lambda tree: jax.tree_util.tree_map_with_path(
        lambda path, _: "frozen" if frozen in jax.tree_util.keystr(path) else "trained", tree
    )


def remedy(tx, frozen):
    return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels(frozen))


OPTIMIZERS = {
    "adam": lambda spec: mujax.mup_adam(LR, spec),
    "adamw": lambda spec: mujax.mup_adamw(LR, spec, weight_decay=0.1),
    "sgd": lambda spec: mujax.mup_sgd(LR, spec, momentum=0.9),
    "lion": lambda spec: mujax.mup_lion(LR, spec),
    "wrapped": lambda spec: mujax.mup_wrap(optax.adam(LR), spec, family="adam"),
    "chain": lambda spec: optax.chain(
        optax.clip_by_global_norm(1.0), mujax.mup_scale_by_adam(spec), optax.scale_by_learning_rate(LR)
    ),
}


@pytest.mark.parametrize("frozen", ["body", "middle", "head"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_frozen_part_stays_and_the_rest_trains_as_without_it(name, frozen):
    mup = mujax.mup_init(Net(WIDTH), Net(BASE), X)
    params = mup.init(jax.random.key(0), X)["params"]
    gradients = jax.grad(lambda p: ((mup.apply({"params": p}, X) - 1) ** 2).mean())(params)
    if name == "chain":
        # The norm is that of the trained part in one and of the whole in the other: keep both below 1.
        gradients = jax.tree.map(lambda leaf: 1e-3 * leaf, gradients)
    updates = []
    for tx in (OPTIMIZERS[name](mup.spec), remedy(OPTIMIZERS[name](mup.spec), frozen)):
        update, _ = tx.update(gradients, tx.init(params), params)
        updates.append(update)
    whole, part = updates
    for layer in params:
        for leaf, expected in zip(jax.tree.leaves(part[layer]), jax.tree.leaves(whole[layer]), strict=True):
            np.testing.assert_array_equal(leaf, 0 if layer == frozen else expected)
            assert np.any(expected)


def test_masked_is_not_the_remedy():
    """The negative twin: it hands the gradients of the frozen part on."""
    mup = mujax.mup_init(Net(WIDTH), Net(BASE), X)
    params = mup.init(jax.random.key(0), X)["params"]
    trained = lambda tree: jax.tree.map(lambda label: label == "trained", labels("body")(tree))  # noqa: E731
    tx = optax.masked(mujax.mup_adam(LR, mup.spec), trained)
    update, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    np.testing.assert_array_equal(update["body"]["kernel"], 1)


def test_a_part_of_the_parameters_alone_is_advised_the_remedy():
    mup = mujax.mup_init(Net(WIDTH), Net(BASE), X)
    params = mup.init(jax.random.key(0), X)["params"]
    del params["body"]
    with pytest.raises(
        mujax.SpecMismatchError, match=r"optax\.partition with optax\.set_to_zero\(\)"
    ) as caught:
        mujax.mup_adam(LR, mup.spec).init(params)
    assert "masked" not in str(caught.value)


@pytest.mark.parametrize("frozen", ["body", "head"])
def test_nnx_with_the_remedy(frozen):
    mup = mujax.mup_init(lambda rngs: NNXNet(WIDTH, rngs=rngs), lambda rngs: NNXNet(BASE, rngs=rngs), X)
    module = mup.init(jax.random.key(0))
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(module)))
    optimizer = nnx.Optimizer(module, remedy(mujax.mup_adam(LR, mup.spec), frozen), wrt=nnx.Param)
    gradients = nnx.grad(lambda module: ((mup.apply(module, X) - 1) ** 2).mean())(module)
    optimizer.update(module, gradients)
    after = nnx.to_pure_dict(nnx.state(module))
    for layer, leaves in before.items():
        moved = np.abs(after[layer]["kernel"] - leaves["kernel"]).max()
        lr = LR * mup.spec[f"{layer}/kernel"].r_in ** -1 if layer == "middle" else LR
        assert moved == pytest.approx(0 if layer == frozen else lr, rel=1e-2)


FILTERS = {
    "path": nnx.PathContains("head"),
    "two paths": nnx.Any(nnx.PathContains("head"), nnx.PathContains("middle")),
    "not a path": nnx.Not(nnx.PathContains("body")),
    "kernels": nnx.PathContains("kernel"),
    "one leaf": lambda path, _: path == ("middle", "bias"),
}


@pytest.mark.parametrize("name", FILTERS)
def test_nnx_filters_work_with_the_whole_spec(name):
    mup = mujax.mup_init(lambda rngs: NNXNet(WIDTH, rngs=rngs), lambda rngs: NNXNet(BASE, rngs=rngs), X)
    module = mup.init(jax.random.key(0))
    wrt = nnx.All(nnx.Param, FILTERS[name])
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(module)))
    optimizer = nnx.Optimizer(module, mujax.mup_adam(LR, mup.spec), wrt=wrt)

    @nnx.jit
    def step(module, optimizer):
        loss = lambda module: ((mup.apply(module, X) - 1) ** 2).mean()  # noqa: E731
        optimizer.update(module, nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(module))

    trained = {"/".join(map(str, path)) for path in dict(nnx.to_flat_state(nnx.state(module, wrt)))}
    assert 0 < len(trained) < 6
    step(module, optimizer)
    after = nnx.to_pure_dict(nnx.state(module))
    for layer, leaves in before.items():
        for leaf, old in leaves.items():
            path = f"{layer}/{leaf}"
            lr = LR * mup.spec[path].r_in ** -1 if path == "middle/kernel" else LR
            moved = np.abs(after[layer][leaf] - old).max()
            assert moved == pytest.approx(lr if path in trained else 0, rel=1e-2, abs=1e-7)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nnx_gradients_that_lack_a_layer_are_refused(name):
    """The negative twin of a filter: the optimizer's parameters have a layer that the gradients lack."""
    mup = mujax.mup_init(lambda rngs: NNXNet(WIDTH, rngs=rngs), lambda rngs: NNXNet(BASE, rngs=rngs), X)
    params = nnx.state(nnx.eval_shape(lambda: mup.init(jax.random.key(0))), nnx.Param)
    tx = OPTIMIZERS[name](mup.spec)
    part = nnx.filter_state(params, nnx.Not(nnx.PathContains("middle")))
    init = jax.eval_shape(tx.init, params)
    with pytest.raises(
        mujax.SpecMismatchError, match=r"^middle/bias: expected an update of shape \(32,\), .* nnx\.DiffState"
    ):
        jax.eval_shape(tx.update, part, init, params)
    jax.eval_shape(tx.update, part, jax.eval_shape(tx.init, part), part)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_a_tree_that_lacks_a_whole_layer_by_mistake(kind):
    """The forward pass names it. A state may be what a filter left: at init only a dict is refused."""
    if kind == "linen":
        mup = mujax.mup_init(Net(WIDTH), Net(BASE), X)
        params = jax.eval_shape(mup.init, jax.random.key(0))["params"]
        lacking = {layer: leaves for layer, leaves in params.items() if layer != "middle"}
        variables = {"params": lacking}
    else:
        mup = mujax.mup_init(lambda rngs: NNXNet(WIDTH, rngs=rngs), lambda rngs: NNXNet(BASE, rngs=rngs), X)
        variables = nnx.eval_shape(lambda: mup.init(jax.random.key(0)))
        del variables.middle
        lacking = nnx.state(variables, nnx.Param)
    with pytest.raises(mujax.SpecMismatchError, match=r"^middle/bias: expected a parameter of shape \(32,\)"):
        mup.apply(variables, X)
    tx = mujax.mup_adam(LR, mup.spec)
    if kind == "nnx":
        assert jax.eval_shape(tx.init, lacking)
        return
    with pytest.raises(
        mujax.SpecMismatchError, match=r"^middle/bias: expected shape \(32,\), got no such path"
    ):
        jax.eval_shape(tx.init, lacking)
    with pytest.raises(mujax.SpecMismatchError, match=r"^middle/bias: .* in the tree of gradients"):
        mujax.mup_global_norm(mup.spec, jax.tree.map(lambda leaf: np.zeros(leaf.shape), lacking))


def test_an_nnx_state_of_another_module_is_refused():
    """The negative twin: only what a filter leaves out may be absent."""
    mup = mujax.mup_init(lambda rngs: NNXNet(WIDTH, rngs=rngs), lambda rngs: NNXNet(BASE, rngs=rngs), X)
    tx = mujax.mup_adam(LR, mup.spec)
    for other in (nnx.Linear(5, WIDTH, rngs=nnx.Rngs(0)), NNXNet(2 * WIDTH, rngs=nnx.Rngs(0))):
        with pytest.raises(mujax.SpecMismatchError):
            tx.init(nnx.state(other, nnx.Param))
