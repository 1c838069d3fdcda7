"""Meshes, and where the arrays of a training are on them; parts of a batch, and other precisions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx
from jax.sharding import AbstractMesh, AxisType, PartitionSpec as P

import mujax
from mujax import train

X = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
Y = np.sin(X[:, :3])


def net(width):
    return nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(width), nn.relu, nn.Dense(3)])


def mesh_of(**sizes):
    """A mesh without devices."""
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


@pytest.fixture(scope="module")
def mup():
    return mujax.mup_init(net(32), net(8), X)


# Meshes


@pytest.mark.parametrize("axes", [{"data": 1, "fsdp": -1}, "data=1, fsdp=-1", "data=1,fsdp=1"])
def test_a_mesh_in_numbers_and_in_words(axes):
    assert dict(train.make_mesh(axes, jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1}


PRODUCT = (
    "mesh: expected axes whose sizes multiply to 1, the number of devices, got {}; give one axis the size -1 "
    "for the rest of the devices."
)
FORM = "mesh: expected axes and their sizes, such as data=2,fsdp=4, got {}."


@pytest.mark.parametrize(
    ("axes", "text"),
    [
        ({"data": 2, "fsdp": 4}, PRODUCT.format("data=2, fsdp=4")),
        ({"data": 2, "fsdp": -1}, PRODUCT.format("data=2, fsdp=-1")),
        ({"data": -1, "fsdp": -1}, PRODUCT.format("data=-1, fsdp=-1")),
        ({"data": 0, "fsdp": 1}, PRODUCT.format("data=0, fsdp=1")),
        ({}, PRODUCT.format("none")),
        ("data", FORM.format("'data'")),
        ("data=1,data=1", FORM.format("'data=1,data=1'")),
        ("data=one", FORM.format("'data=one'")),
        ("", FORM.format("''")),
    ],
)
def test_a_mesh_that_is_none(axes, text):
    with pytest.raises(mujax.ConfigError) as error:
        train.make_mesh(axes, jax.devices()[:1])
    assert str(error.value) == text


# Where arrays are


def specs_of(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {mujax.spec.leaf_path(path): place.spec for path, place in leaves}


def test_an_optimizers_state_follows_its_parameters(mup):
    mesh = mesh_of(fsdp=2, tensor=4)
    tx = optax.chain(
        optax.masked(optax.trace(0.9), {"params": {"layers_0": True, "layers_2": True, "layers_4": False}}),
        optax.scale_by_adam(),
    )
    variables = jax.eval_shape(mup.init, jax.random.key(0))
    specs = specs_of(train.shardings(mup, mesh, jax.eval_shape(tx.init, variables)))
    for tree in ("0/inner_state/trace", "1/mu", "1/nu"):
        assert specs[f"{tree}/params/layers_0/kernel"] == P(None, "fsdp")
        assert specs[f"{tree}/params/layers_2/kernel"] == P("fsdp", "tensor")
        assert specs[f"{tree}/params/layers_2/bias"] == P()
    assert specs["1/count"] == P()
    assert "0/inner_state/trace/params/layers_4/kernel" not in specs


def test_factored_moments_are_split_as_far_as_they_can_be(mup):
    tx = optax.scale_by_factored_rms(min_dim_size_to_factor=8)
    state = jax.eval_shape(tx.init, jax.eval_shape(mup.init, jax.random.key(0)))
    specs = specs_of(train.shardings(mup, mesh_of(fsdp=2, tensor=4), state))
    assert specs["v_row/params/layers_2/kernel"] == specs["v_col/params/layers_2/kernel"] == P("fsdp")
    # Of one entry, where the moment is factored.
    assert specs["v/params/layers_2/kernel"] == specs["v_row/params/layers_2/bias"] == P()


def test_variables_of_every_kind_have_shardings():
    class Net(nnx.Module):
        def __init__(self, width, rngs):
            self.up, self.norm = nnx.Linear(6, width, rngs=rngs), nnx.BatchNorm(width, rngs=rngs)
            self.down = nnx.Linear(width, 3, rngs=rngs)

        def __call__(self, x):
            return self.down(self.norm(self.up(x)))

    mup = mujax.mup_init(lambda rngs: Net(32, rngs), lambda rngs: Net(8, rngs), X)
    specs = specs_of(train.shardings(mup, mesh_of(fsdp=4)))
    assert specs["up/kernel"] == P(None, "fsdp")
    assert specs["norm/mean"] == P()


def test_batches_are_split_over_data_and_fsdp_or_as_the_rules_have_it():
    mesh = mesh_of(replica=2, data=2, fsdp=2, tensor=2)
    assert train.batch_sharding(mesh).spec == P(("data", "fsdp"))
    assert train.batch_sharding(mesh, leading=1).spec == P(None, ("data", "fsdp"))
    rules = [("batch", ("replica", "data")), ("mlp", "tensor")]
    assert train.batch_sharding(mesh, rules=rules).spec == P(("replica", "data"))
    assert train.batch_sharding(mesh, rules={"*": P("tensor")}).spec == P(("data", "fsdp"))
    with pytest.raises(
        mujax.ConfigError, match="expected axes of the mesh, 'tensor', for 'batch', got 'data'"
    ):
        train.batch_sharding(mesh_of(tensor=2), rules=[("batch", "data")])


def test_a_batch_that_the_mesh_does_not_divide_is_one_sentence():
    batches = [(X, Y)] * 2
    run = train.training_run(net, batches, steps=2, width=32, base_width=8)
    assert run.on(mesh_of(data=2, fsdp=4)).steps({}) == 2
    text = r"^batch: expected a multiple of 3 examples, which the mesh's data split, got 8\.$"
    with pytest.raises(mujax.ConfigError, match=text):
        run.on(mesh_of(data=3)).steps({})
    # The parts of a batch are what is split.
    with pytest.raises(mujax.ConfigError, match=r"a multiple of 8 examples.* got 4\.$"):
        run.on(mesh_of(data=2, fsdp=4), accumulate=2).steps({})


# One device


def test_state_without_a_mesh_is_that_of_init_state(mup):
    tx = mujax.mup_adam(0.01, mup.spec)
    made = train.create_state(mup, tx, key=jax.random.key(3))
    init_key, key = jax.random.split(jax.random.key(3))
    by_hand = train.init_state(jax.jit(mup.init)(init_key)["params"], tx, key=key)
    assert jax.tree.structure(made) == jax.tree.structure(by_hand)
    for one, other in zip(jax.tree.leaves(made.params), jax.tree.leaves(by_hand.params), strict=True):
        np.testing.assert_array_equal(one, other)
    other = train.create_state(mup, tx, key=jax.random.key(4))
    assert not np.allclose(made.params["layers_0"]["kernel"], other.params["layers_0"]["kernel"])


# Parts of a batch, and precision


def losses(mup, tx, loss=None, steps=3, **options):
    step = train.train_step(loss or train.model_loss(mup), tx, **options)
    state, found = train.create_state(mup, tx), []
    for _ in range(steps):
        state, metrics = step(state, (jnp.asarray(X), jnp.asarray(Y)))
        found.append(float(metrics["loss"]))
    return state, found


def test_accumulated_gradients_are_those_of_the_whole_batch(mup):
    tx = optax.sgd(0.1)
    (state, whole), (parts, each) = losses(mup, tx), losses(mup, tx, accumulate=4)
    np.testing.assert_allclose(each, whole, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(state.params), jax.tree.leaves(parts.params), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)

    def total(params, model_state, batch, key):
        value, rest = train.model_loss(mup)(params, model_state, batch, key)
        return value * batch[0].shape[0], rest

    # The twin: a sum over examples is not a mean, and its parts are smaller.
    _, sums = losses(mup, tx, total, steps=1)
    _, halves = losses(mup, tx, total, steps=1, accumulate=2)
    assert halves[0] == pytest.approx(sums[0] / 2)


def test_parts_have_keys_and_metrics_of_their_own():
    def loss(params, model_state, batch, key):
        draw = jax.random.uniform(key)
        return (params["w"] * batch).mean(), ({"seen": model_state["seen"] + 1}, {"draw": draw})

    tx = optax.sgd(0.1)
    found = {}
    for parts in (1, 2):
        state = train.init_state({"w": jnp.ones(())}, tx, model_state={"seen": jnp.zeros(())})
        state, metrics = train.train_step(loss, tx, accumulate=parts)(state, jnp.ones(4))
        assert state.model_state["seen"] == parts
        found[parts] = float(metrics["draw"])
    assert found[1] != found[2]


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (0, "accumulate: expected a whole number of at least 1, got 0; pass accumulate=4."),
        (3, "accumulate: expected a number that divides the batch, got 3 for 8 examples."),
    ],
)
def test_parts_that_make_no_sense(mup, parts, text):
    with pytest.raises(mujax.ConfigError) as error:
        losses(mup, optax.sgd(0.1), accumulate=parts)
    assert str(error.value) == text


def test_the_loss_is_computed_in_another_precision_and_parameters_keep_theirs(mup):
    seen = []

    def loss(params, model_state, batch, key):
        seen.append({leaf.dtype for leaf in jax.tree.leaves((params, batch))})
        value, rest = train.model_loss(mup)(params, model_state, batch, key)
        assert value.dtype == jnp.float32
        return value, rest

    tx = optax.adam(0.01)
    _, exact = losses(mup, tx)
    state, rough = losses(mup, tx, loss, compute_dtype=jnp.bfloat16)
    assert seen == [{jnp.dtype(jnp.bfloat16)}]
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.opt_state[0].nu))} == {
        np.dtype("float32")
    }
    np.testing.assert_allclose(rough, exact, rtol=0.02)
    assert rough != exact
