"""Which trees the transforms take, inside of what, and what they say about all others."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from flax.training.train_state import TrainState
from jax.sharding import AbstractMesh, PartitionSpec

from mujax import rules
from mujax.errors import SpecMismatchError
from mujax.optim import mup_adam, mup_adamw, mup_scale_by_adam, mup_scale_by_sgd, mup_sgd, mup_wrap
from mujax.spec import MupSpec, ParamSpec, leaf_path

LR = 0.5
# r = 3: SGD factors of table 8 for a 7-12-12-5 MLP over a 7-4-4-5 one.
SGD = {
    "first/kernel": 3.0,
    "first/bias": 3.0,
    "second/kernel": 1.0,
    "second/bias": 3.0,
    "third/kernel": 3.0,
    "third/bias": 1.0,
}
ADAM = {**dict.fromkeys(SGD, 1.0), "second/kernel": 1 / 3}


def make_spec(width=12, base=4):
    kernel = functools.partial(ParamSpec, fan_in=(0,), fan_out=(1,))
    bias = functools.partial(ParamSpec, fan_out=(0,))
    return MupSpec(
        {
            "first/bias": bias((width,), (base,), infinite=(0,)),
            "first/kernel": kernel((7, width), (7, base), infinite=(1,)),
            "second/bias": bias((width,), (base,), infinite=(0,)),
            "second/kernel": kernel((width, width), (base, base), infinite=(0, 1)),
            "third/bias": bias((5,), (5,)),
            "third/kernel": kernel((width, 5), (base, 5), infinite=(0,)),
        },
        rules.parametrization("mup"),
    )


SPEC = make_spec()


class LinenMLP(nn.Module):
    boxed: bool = False

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        if self.boxed:
            init = nn.with_partitioning(init, (None, "model"))
        for name, features in (("first", 12), ("second", 12), ("third", 5)):
            x = nn.tanh(nn.Dense(features, name=name, kernel_init=init)(x))
        return x


class NnxMLP(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(7, 12, rngs=rngs)
        self.second = nnx.Linear(12, 12, rngs=rngs)
        self.third = nnx.Linear(12, 5, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        return self.dropout(jnp.tanh(self.third(jnp.tanh(self.second(jnp.tanh(self.first(x)))))))


class Layer(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


X = jnp.linspace(-1.0, 1.0, 21).reshape(3, 7)


def linen_params(boxed=False):
    return LinenMLP(boxed).init(jax.random.key(0), X)["params"]


def flat(tree):
    """The leaves by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {leaf_path(path).removeprefix("params/"): np.asarray(leaf) for path, leaf in leaves}


def assert_scaled(updates, gradients, factors, scale=-LR, only=tuple(SGD)):
    updates, gradients = flat(updates), flat(gradients)
    for path in only:
        np.testing.assert_allclose(
            updates[path], scale * factors[path] * gradients[path], rtol=1e-5, err_msg=path
        )


def gradients_like(tree):
    keys = iter(jax.random.split(jax.random.key(1), 100))
    return jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape), tree)


TREES = {
    "dict": linen_params(),
    "frozen": FrozenDict(linen_params()),
    "partitioned": linen_params(boxed=True),
    "collection": {"params": linen_params()},
    "frozen collection": FrozenDict({"params": linen_params()}),
    "nnx state": nnx.state(NnxMLP(nnx.Rngs(0)), nnx.Param),
    "pure nnx state": nnx.as_pure(nnx.state(NnxMLP(nnx.Rngs(0)), nnx.Param)),
    "namedtuples": {name: Layer(**layer) for name, layer in linen_params().items()},
}


class TestTrees:
    @pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
    def test_any_container(self, tree):
        tx = mup_sgd(LR, SPEC)
        gradients = gradients_like(tree)
        updates, _ = tx.update(gradients, tx.init(tree), tree)
        assert jax.tree.structure(updates) == jax.tree.structure(tree)
        assert_scaled(updates, gradients, SGD)

    def test_a_single_array(self):
        spec = MupSpec(
            {"": ParamSpec((12, 5), (4, 5), (0,), (1,), infinite=(0,))}, rules.parametrization("mup")
        )
        for tree in (jnp.ones((12, 5)), {"params": jnp.ones((12, 5))}):
            updates, _ = mup_sgd(LR, spec).update(tree, mup_sgd(LR, spec).init(tree))
            np.testing.assert_allclose(jax.tree.leaves(updates)[0], -1.5)

    def test_lists(self):
        kernel = ParamSpec((12, 12), (4, 4), (0,), (1,), infinite=(0, 1))
        spec = MupSpec({"layers/0": kernel, "layers/1": kernel}, rules.parametrization("mup"))
        tree = {"layers": [jnp.ones((12, 12)), 2 * jnp.ones((12, 12))]}
        tx = mup_wrap(optax.sign_sgd(-1.0), spec, "adam")
        updates, _ = tx.update(tree, tx.init(tree))
        np.testing.assert_allclose(updates["layers"][1], 1 / 3, rtol=1e-6)

    @pytest.mark.parametrize("prefix", ["params/", "params/params/"])
    def test_a_module_that_is_called_params(self, prefix):
        kernel = ParamSpec((12, 12), (4, 4), (0,), (1,), infinite=(0, 1))
        spec = MupSpec({f"{prefix}kernel": kernel}, rules.parametrization("mup"))
        tx = mup_sgd(LR, spec)
        leaf = jnp.ones((12, 12))
        for tree in (
            {"kernel": leaf},
            {"params": {"kernel": leaf}},
            {"params": {"params": {"kernel": leaf}}},
        ):
            updates, _ = tx.update(tree, tx.init(tree))
            # A square kernel three times as wide, in Table 8 with SGD: the factor is 1.
            np.testing.assert_allclose(jax.tree.leaves(updates), [-LR * leaf], rtol=1e-6)
            assert jax.tree.structure(updates) == jax.tree.structure(tree)

    def test_only_a_common_collection_is_looked_through(self):
        both = {"params": linen_params(), "batch_stats": {"norm": {"mean": jnp.zeros(12)}}}
        with pytest.raises(
            SpecMismatchError, match=r"first/bias: .* 'batch_stats/norm/mean', which the spec"
        ):
            mup_sgd(LR, SPEC).init(both)


class TestMismatch:
    @pytest.fixture(
        params=[
            mup_scale_by_adam(SPEC),
            mup_sgd(LR, SPEC),
            mup_adamw(LR, SPEC),
            mup_wrap(optax.adam(LR), SPEC, "adam"),
        ],
        ids=["adam", "sgd", "adamw", "wrap"],
    )
    def tx(self, request):
        return request.param

    def both(self, tx, tree, message):
        """`tree` is refused as parameters and as gradients, at tracing time already."""
        state = tx.init(TREES["dict"])
        with pytest.raises(SpecMismatchError, match=message.format(what="parameters")):
            tx.init(tree)
        with pytest.raises(SpecMismatchError, match=message.format(what="updates")):
            jax.eval_shape(tx.update, tree, state, TREES["dict"])

    def test_missing(self, tx):
        tree = {**TREES["dict"], "second": {"bias": jnp.zeros(12)}}
        self.both(
            tx,
            tree,
            r"^second/kernel: expected shape \(12, 12\), got no such path in the tree of {what}; "
            r"pass the parameters that mup_init described; to freeze a part of them, use optax\.partition",
        )

    def test_missing_module_names_the_first_parameter(self, tx):
        self.both(
            tx, {"third": TREES["dict"]["third"]}, r"^first/bias: expected shape \(12,\), got no such path"
        )

    def test_renamed(self, tx):
        tree = {
            "first": TREES["dict"]["first"],
            "2nd": TREES["dict"]["second"],
            "third": TREES["dict"]["third"],
        }
        self.both(tx, tree, r"^second/bias: .* of {what} but '2nd/bias', which the spec lacks; pass")

    def test_empty(self, tx):
        self.both(tx, {}, r"^first/bias: ")

    def test_extra(self, tx):
        tree = {**TREES["dict"], "fourth": {"kernel": jnp.zeros((5, 2))}}
        self.both(
            tx,
            tree,
            r"^fourth/kernel: expected nothing here, got shape \(5, 2\) in the tree of {what}; pass only "
            "the parameters, no other collections, of the model that mup_init was given",
        )

    def test_shape(self, tx):
        tree = {**TREES["dict"], "second": {"bias": jnp.zeros(12), "kernel": jnp.zeros((12, 24))}}
        self.both(
            tx,
            tree,
            r"^second/kernel: expected shape \(12, 12\), got \(12, 24\) in the tree of {what}; "
            "call mup_init on this very model",
        )

    def test_stacked_models(self, tx):
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), TREES["dict"])
        self.both(tx, stacked, r"^first/bias: expected shape \(12,\), got \(2, 12\) .* jax\.vmap")

    def test_the_first_of_several_in_the_order_of_the_spec(self, tx):
        tree = {**TREES["dict"], "third": {"bias": jnp.zeros(6)}, "second": {"bias": jnp.zeros(3)}}
        self.both(tx, tree, r"^second/bias: expected shape \(12,\), got \(3,\)")

    def test_message_names_the_path_inside_of_the_collection(self, tx):
        tree = {"params": {**TREES["dict"], "fourth": {"kernel": jnp.zeros((5, 2))}}}
        with pytest.raises(SpecMismatchError, match=r"^params/fourth/kernel: expected nothing here"):
            tx.init(tree)

    def test_the_wrong_model_altogether(self, tx):
        with pytest.raises(SpecMismatchError, match=r"^first/bias: expected shape \(12,\), got \(4,\)"):
            tx.init(jax.tree.map(lambda leaf: leaf[..., :4], TREES["dict"]))


class TestMasked:
    PARAMS = linen_params()
    GRADIENTS = gradients_like(PARAMS)

    def masks(self):
        everything = jax.tree.map(lambda _: True, self.PARAMS)
        yield {**everything, "second": False}, lambda path: not path.startswith("second")
        yield {**everything, "second": {"bias": False, "kernel": True}}, lambda path: path != "second/bias"
        yield False, lambda _: False
        yield True, lambda _: True
        yield (lambda p: jax.tree.map(lambda leaf: leaf.ndim > 1, p)), lambda path: path.endswith("kernel")

    @pytest.mark.parametrize("case", range(5))
    def test_masked(self, case):
        mask, chosen = list(self.masks())[case]
        tx = optax.masked(mup_sgd(LR, SPEC), mask)
        updates, _ = jax.jit(tx.update)(self.GRADIENTS, tx.init(self.PARAMS), self.PARAMS)
        assert_scaled(updates, self.GRADIENTS, SGD, only=[path for path in SGD if chosen(path)])
        untouched = [path for path in SGD if not chosen(path)]
        assert_scaled(updates, self.GRADIENTS, dict.fromkeys(SGD, 1.0), scale=1, only=untouched)

    @pytest.mark.parametrize("tree", ["partitioned", "collection", "nnx state", "pure nnx state"])
    def test_masked_in_other_containers(self, tree):
        params = TREES[tree]
        mask = jax.tree.map(lambda leaf: leaf.ndim > 1, params)
        tx = optax.masked(mup_sgd(LR, SPEC), mask)
        updates, _ = tx.update(params, tx.init(params), params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        kernels = [path for path in SGD if path.endswith("kernel")]
        assert_scaled(updates, params, SGD, only=kernels)
        assert_scaled(updates, params, dict.fromkeys(SGD, 1.0), scale=1, only=set(SGD) - set(kernels))

    def test_a_masked_collection(self):
        params = {"params": self.PARAMS, "cache": {"k": jnp.zeros(3)}}
        tx = optax.masked(mup_sgd(LR, SPEC), {"params": True, "cache": False})
        with pytest.raises(SpecMismatchError, match="first/bias"):
            tx.init(params)

    def test_partition(self):
        labels = {"first": "sgd", "second": "adam", "third": "frozen"}
        tx = optax.partition(
            {
                "sgd": mup_sgd(LR, SPEC),
                "adam": mup_wrap(optax.sign_sgd(LR), SPEC, "adam"),
                "frozen": optax.set_to_zero(),
            },
            labels,
        )
        updates, _ = jax.jit(tx.update)(self.GRADIENTS, tx.init(self.PARAMS), self.PARAMS)
        assert_scaled(updates, self.GRADIENTS, SGD, only=["first/kernel", "first/bias"])
        signs = jax.tree.map(jnp.sign, self.GRADIENTS)
        assert_scaled(updates, signs, ADAM, only=["second/kernel", "second/bias"])
        assert not np.any(updates["third"]["kernel"])

    def test_gradients_that_a_filter_left_out(self):
        tx = mup_adam(LR, SPEC)
        params = {**self.PARAMS, "second": {"bias": None, "kernel": None}}
        updates, _ = tx.update(params, tx.init(params))
        assert updates["second"] == {"bias": None, "kernel": None}

    def test_only_a_hole_in_its_own_place_excuses(self):
        """The twin: what is absent with no hole there, or with a hole elsewhere, is still an error."""
        hole = optax.MaskedNode()
        for tree, path in (
            ({"first": hole, "second": self.PARAMS["second"]}, "third/bias"),
            ({**self.PARAMS, "sec": hole, "second": {}}, "second/bias"),
            ({**self.PARAMS, "third": {"bias": hole}}, "third/kernel"),
            ({"first": {}, "second": hole, "third": hole}, "first/bias"),
        ):
            with pytest.raises(SpecMismatchError, match=f"^{path}: "):
                mup_sgd(LR, SPEC).init(tree)

    def test_a_hole_does_not_excuse_a_wrong_shape(self):
        tree = {"first": optax.MaskedNode(), "second": self.PARAMS["third"], "third": optax.MaskedNode()}
        with pytest.raises(SpecMismatchError, match=r"^second/bias: expected shape \(12,\), got \(5,\)"):
            mup_sgd(LR, SPEC).init(tree)

    def test_a_hole_where_the_spec_has_nothing(self):
        tx, tree = mup_sgd(LR, SPEC), {**self.PARAMS, "frozen": optax.MaskedNode()}
        updates, _ = tx.update(tree, tx.init(tree))
        without, _ = tx.update(self.PARAMS, tx.init(self.PARAMS))
        assert updates["frozen"] == optax.MaskedNode()
        del updates["frozen"]
        jax.tree.map(np.testing.assert_array_equal, updates, without)


class TestInsideOptax:
    PARAMS = linen_params()
    GRADIENTS = gradients_like(PARAMS)

    def test_chain(self):
        norm = float(optax.tree.norm(self.GRADIENTS))
        tx = optax.chain(
            optax.clip_by_global_norm(norm / 4),
            mup_scale_by_sgd(SPEC, 0.9),
            optax.add_decayed_weights(0.1),
            optax.scale_by_learning_rate(optax.constant_schedule(LR)),
        )
        updates, _ = jax.jit(tx.update)(self.GRADIENTS, tx.init(self.PARAMS), self.PARAMS)
        decay = jax.tree.map(lambda p: LR * 0.1 * p, self.PARAMS)
        without_decay = jax.tree.map(jnp.add, updates, decay)
        assert_scaled(jax.tree.map(lambda u: 4 * u, without_decay), self.GRADIENTS, SGD)

    @pytest.mark.parametrize("learning_rate", [LR, jnp.float32(LR), lambda step: LR * 0.5**step])
    def test_inject_hyperparams(self, learning_rate):
        tx = optax.inject_hyperparams(mup_sgd)(learning_rate=learning_rate, spec=SPEC)
        state = tx.init(self.PARAMS)
        updates, state = jax.jit(tx.update)(self.GRADIENTS, state, self.PARAMS)
        assert_scaled(updates, self.GRADIENTS, SGD)
        assert set(state.hyperparams) == {"learning_rate"}

    def test_inject_hyperparams_into_adam_and_change_them(self):
        tx = optax.inject_hyperparams(mup_adam)(learning_rate=LR, spec=SPEC, eps=0.0)
        theirs = optax.inject_hyperparams(optax.adam)(learning_rate=LR, eps=0.0)
        state, their_state = tx.init(self.PARAMS), theirs.init(self.PARAMS)
        assert state.hyperparams.keys() == their_state.hyperparams.keys()
        for learning_rate in (LR, 3 * LR):
            state.hyperparams["learning_rate"] = jnp.float32(learning_rate)
            updates, state = jax.jit(tx.update)(self.GRADIENTS, state, self.PARAMS)
            signs = jax.tree.map(jnp.sign, self.GRADIENTS)
            assert_scaled(updates, signs, ADAM, scale=-learning_rate)

    def test_inject_hyperparams_into_the_rest(self):
        for factory, kwargs in (
            (mup_adamw, {"weight_decay": optax.linear_schedule(0.1, 0.0, 10)}),
            (mup_sgd, {"momentum": 0.9}),
        ):
            tx = optax.inject_hyperparams(factory)(learning_rate=LR, spec=SPEC, **kwargs)
            state = tx.init(self.PARAMS)
            _, new_state = jax.jit(tx.update)(self.GRADIENTS, state, self.PARAMS)
            assert jax.tree.structure(new_state) == jax.tree.structure(state)
            assert {*kwargs, "learning_rate"} <= set(state.hyperparams)

    def test_inject_hyperparams_around_the_known_mistake(self):
        def factory(learning_rate):
            return mup_wrap(optax.adamw(learning_rate), SPEC, "adam")

        with pytest.raises(ValueError, match="weight decay"):
            optax.inject_hyperparams(factory)(learning_rate=LR).init(self.PARAMS)

    def test_multi_steps(self):
        tx = optax.MultiSteps(mup_sgd(LR, SPEC, momentum=0.9), every_k_schedule=2)
        state = tx.init(self.PARAMS)
        first, state = jax.jit(tx.update)(self.GRADIENTS, state, self.PARAMS)
        assert not np.any(first["second"]["kernel"])
        second, state = jax.jit(tx.update)(self.GRADIENTS, state, self.PARAMS)
        assert_scaled(second, self.GRADIENTS, SGD)

    def test_apply_if_finite(self):
        tx = optax.apply_if_finite(mup_sgd(LR, SPEC), 3)
        state = tx.init(self.PARAMS)
        updates, state = jax.jit(tx.update)(self.GRADIENTS, state, self.PARAMS)
        assert_scaled(updates, self.GRADIENTS, SGD)
        broken = jax.tree.map(lambda g: g * jnp.nan, self.GRADIENTS)
        updates, state = jax.jit(tx.update)(broken, state, self.PARAMS)
        assert not np.any(updates["second"]["kernel"])
        assert int(state.total_notfinite) == 1

    def test_lookahead(self):
        tx = optax.lookahead(mup_sgd(LR, SPEC), sync_period=5, slow_step_size=0.5)
        params = optax.LookaheadParams.init_synced(self.PARAMS)
        updates, _ = jax.jit(tx.update)(self.GRADIENTS, tx.init(params), params)
        assert_scaled(updates.fast, self.GRADIENTS, SGD)

    def test_map_params_over_the_state(self):
        """As libraries do that place optimizer states on devices."""
        for tx in (
            mup_adamw(LR, SPEC),
            optax.masked(mup_sgd(LR, SPEC, 0.9), {"first": True, "second": False, "third": True}),
        ):
            state = tx.init(self.PARAMS)
            doubled = optax.tree.map_params(tx, lambda leaf: leaf + 1, state)
            assert np.all(jax.tree.leaves(doubled)[-1] == 1)


class TestInsideJax:
    PARAMS = linen_params()
    GRADIENTS = gradients_like(PARAMS)

    def test_vmap(self):
        tx = mup_sgd(LR, SPEC, 0.9)
        stack = functools.partial(jax.tree.map, lambda leaf: jnp.stack([leaf, 2 * leaf, 3 * leaf]))
        params, gradients = stack(self.PARAMS), stack(self.GRADIENTS)
        updates, _ = jax.jit(jax.vmap(tx.update))(gradients, jax.vmap(tx.init)(params), params)
        for i in range(3):
            assert_scaled(
                jax.tree.map(lambda u, i=i: u[i], updates), self.GRADIENTS, SGD, scale=-LR * (i + 1)
            )

    def test_vmap_over_the_learning_rate(self):
        def update(learning_rate):
            tx = mup_sgd(learning_rate, SPEC)
            return tx.update(self.GRADIENTS, tx.init(self.PARAMS))[0]

        updates = jax.vmap(update)(jnp.array([1.0, 2.0]))
        assert_scaled(jax.tree.map(lambda u: u[1], updates), self.GRADIENTS, SGD, scale=-2.0)

    def test_scan(self):
        tx = mup_adam(LR, SPEC)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(self.GRADIENTS, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = (self.PARAMS, tx.init(self.PARAMS))
        (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=4))(carry)
        moved = jax.tree.map(jnp.subtract, params, self.PARAMS)
        assert_scaled(moved, jax.tree.map(jnp.sign, self.GRADIENTS), ADAM, scale=-4 * LR)

    def test_differentiable(self):
        tx = mup_sgd(1.0, SPEC)
        jacobian = jax.grad(lambda g: sum(u.sum() for u in jax.tree.leaves(tx.update(g, tx.init(g))[0])))
        ones = jax.tree.map(jnp.ones_like, self.GRADIENTS)
        assert_scaled(jacobian(self.GRADIENTS), ones, SGD, scale=-1.0)

    def test_shard_map_over_local_shards(self):
        mesh = AbstractMesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        tx = mup_adam(LR, SPEC)

        def sharded(specs):
            return jax.shard_map(
                lambda params: tx.update(params, tx.init(params), params)[0],
                mesh=mesh,
                in_specs=(specs,),
                out_specs=specs,
                check_vma=False,
            )

        along = {
            "first": {"bias": ("data",), "kernel": (None, "data")},
            "second": {"bias": (), "kernel": ("data",)},
        }
        specs = jax.tree.map(
            lambda axes: PartitionSpec(*axes),
            {**along, "third": {"bias": (), "kernel": ("data",)}},
            is_leaf=lambda x: isinstance(x, tuple),
        )
        shapes = jax.eval_shape(lambda: self.PARAMS)
        assert jax.eval_shape(sharded(specs), shapes) == shapes

    @pytest.mark.parametrize("size", [5, 6, 48])
    def test_shard_map_does_not_excuse_what_is_no_shard(self, size):
        """The twin: 5 does not divide 12, 6 is half of it on 3 devices, 48 is more than it."""
        mesh = AbstractMesh((3,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        tx = mup_sgd(LR, SPEC)
        params = {**self.PARAMS, "second": {**self.PARAMS["second"], "bias": jnp.zeros(size)}}
        init = jax.shard_map(
            lambda params: (tx.init(params), 0)[1],
            mesh=mesh,
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(),
        )
        with pytest.raises(
            SpecMismatchError, match=rf"^second/bias: expected shape \(12,\), got \({size},\)"
        ):
            jax.eval_shape(init, params)


class TestInsideFlax:
    def loss(self, logits):
        return jnp.mean(logits**2)

    @pytest.mark.parametrize("boxed", [False, True])
    def test_train_state(self, boxed):
        model = LinenMLP(boxed)
        params = linen_params(boxed)
        state = TrainState.create(apply_fn=model.apply, params=params, tx=mup_sgd(LR, SPEC, 0.9))

        @jax.jit
        def step(state):
            gradients = jax.grad(lambda p: self.loss(state.apply_fn({"params": p}, X)))(state.params)
            return state.apply_gradients(grads=gradients), gradients

        new_state, gradients = step(state)
        moved = jax.tree.map(jnp.subtract, new_state.params, params)
        for path, factor in SGD.items():
            np.testing.assert_allclose(
                flat(moved)[path], -LR * factor * flat(gradients)[path], rtol=1e-3, atol=1e-6, err_msg=path
            )

    def test_train_state_over_variables(self):
        variables = {"params": linen_params()}
        state = TrainState.create(apply_fn=LinenMLP().apply, params=variables, tx=mup_sgd(LR, SPEC))
        gradients = jax.grad(lambda v: self.loss(state.apply_fn(v, X)))(variables)
        state = state.apply_gradients(grads=gradients)
        assert int(state.step) == 1
        for path, value in flat(variables).items():
            expected = value - LR * SGD[path] * flat(gradients)[path]
            np.testing.assert_allclose(flat(state.params)[path], expected, rtol=1e-5, atol=1e-6, err_msg=path)

    def test_nnx_optimizer(self):
        model = NnxMLP(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, mup_sgd(LR, SPEC, 0.9), wrt=nnx.Param)
        before = flat(nnx.state(model, nnx.Param))

        @nnx.jit
        def step(model, optimizer):
            loss, gradients = nnx.value_and_grad(lambda m: self.loss(m(X)))(model)
            optimizer.update(model, gradients)
            return loss, gradients

        _, gradients = step(model, optimizer)
        after = flat(nnx.state(model, nnx.Param))
        for path, factor in SGD.items():
            expected = before[path] - LR * factor * flat(gradients)[path]
            np.testing.assert_allclose(after[path], expected, rtol=1e-5, atol=1e-7, err_msg=path)
        _, others = step(model, optimizer)
        for path, leaf in flat(nnx.state(model, nnx.Param)).items():
            momentum = 0.9 * flat(gradients)[path] + flat(others)[path]
            expected = after[path] - LR * SGD[path] * momentum
            np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-7, err_msg=path)

    def test_nnx_optimizer_trains_like_the_linen_twin(self):
        params = linen_params()
        model = NnxMLP(nnx.Rngs(0))
        model.dropout.rate = 0.0
        nnx.update(model, jax.tree.map(jnp.array, params))
        optimizer = nnx.Optimizer(model, mup_adamw(0.01, SPEC), wrt=nnx.Param)
        state = TrainState.create(apply_fn=LinenMLP().apply, params=params, tx=mup_adamw(0.01, SPEC))
        for _ in range(3):
            gradients = nnx.grad(lambda m: self.loss(m(X)))(model)
            optimizer.update(model, gradients)
            gradients = jax.grad(lambda p: self.loss(LinenMLP().apply({"params": p}, X)))(state.params)
            state = state.apply_gradients(grads=gradients)
        theirs = flat(state.params)
        for path, value in flat(nnx.state(model, nnx.Param)).items():
            np.testing.assert_allclose(value, theirs[path], rtol=1e-4, atol=1e-6, err_msg=path)

    def test_nnx_optimizer_of_another_model(self):
        model = NnxMLP(nnx.Rngs(0))
        with pytest.raises(SpecMismatchError, match=r"^first/bias: expected shape \(16,\), got \(12,\)"):
            nnx.Optimizer(model, mup_adam(LR, make_spec(16)), wrt=nnx.Param)

    def test_wrt_a_part_with_the_whole_spec_or_one_of_that_part(self):
        class Frozen(nnx.Param):
            pass

        model = NnxMLP(nnx.Rngs(0))
        model.first.kernel = Frozen(model.first.kernel[...])
        trained = nnx.All(nnx.Param, nnx.Not(Frozen))
        part = MupSpec({k: v for k, v in SPEC.items() if k != "first/kernel"}, SPEC.parametrization)
        for spec in (SPEC, part):
            optimizer = nnx.Optimizer(model, mup_sgd(LR, spec), wrt=trained)
            before = flat(nnx.state(model, nnx.Param))
            gradients = jax.tree.map(jnp.ones_like, nnx.state(model, trained))
            optimizer.update(model, gradients)
            for path, leaf in flat(nnx.state(model, nnx.Param)).items():
                moved = 0.0 if path == "first/kernel" else -LR * SGD[path]
                np.testing.assert_allclose(leaf - before[path], moved, rtol=1e-5, atol=1e-6, err_msg=path)
