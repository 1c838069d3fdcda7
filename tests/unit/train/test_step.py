"""The jitted step and scan: donation, sharding, the same run in every form."""

import functools
import json
import operator
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx

from mujax.errors import MujaxError
from mujax.models import ResNet, ResNetConfig, Transformer, TransformerConfig
from mujax.train._step import TrainState, init_state, train_scan, train_step

KEY = jax.random.key(7)
STEPS = 4
X = np.random.default_rng(0).normal(size=(STEPS, 8, 6)).astype(np.float32)
Y = np.random.default_rng(1).integers(0, 3, size=(STEPS, 8)).astype(np.int32)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def linear_params():
    rng = np.random.default_rng(2)
    return {"w": jnp.asarray(rng.normal(size=(6, 3)), jnp.float32), "b": jnp.zeros(3)}


def linear_loss(params, model_state, batch, key):
    x, y = batch
    logits = x @ params["w"] + params["b"]
    return cross_entropy(logits, y), (model_state, {"accuracy": (logits.argmax(-1) == y).mean()})


def by_step(batches):
    return [jax.tree.map(operator.itemgetter(i), batches) for i in range(STEPS)]


def loop(step, state, batches):
    history = []
    for batch in by_step(batches):
        state, metrics = step(state, batch)
        history.append(metrics)
    return state, jax.tree.map(lambda *values: np.stack(values), *history)


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def by_hand(params, tx, batches):
    """The loop that everyone writes, without mujax."""
    opt_state, losses = tx.init(params), []
    for batch in by_step(batches):
        value, gradient = jax.value_and_grad(lambda p: linear_loss(p, {}, batch, None)[0])(params)  # noqa: B023
        updates, opt_state = tx.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        losses.append(value)
    return params, jnp.stack(losses)


# The same run in every form


def test_step_and_scan_are_the_loop_by_hand():
    tx = optax.adamw(0.1)
    params, losses = jax.jit(lambda params: by_hand(params, tx, (X, Y)))(linear_params())
    for run in (
        functools.partial(loop, train_step(linear_loss, tx)),
        train_scan(linear_loss, tx),
        train_scan(linear_loss, tx, unroll=STEPS),
    ):
        state, metrics = run(init_state(linear_params(), tx), (X, Y))
        assert_close(state.params, params)
        np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-5)
        assert metrics["accuracy"].shape == (STEPS,)
        assert int(state.step) == STEPS
    other, _ = train_scan(linear_loss, optax.adamw(0.2))(init_state(linear_params(), tx), (X, Y))
    assert not np.allclose(other.params["w"], params["w"], atol=1e-3)


def test_scan_is_the_loop_with_dropout_and_batch_statistics():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(16)(x))
            x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
            return nn.Dense(3)(x)

    model, tx = Model(), optax.sgd(0.1, momentum=0.9)
    variables = jax.jit(model.init, static_argnames="train")(KEY, X[0], train=False)

    def loss(params, model_state, batch, key):
        logits, model_state = model.apply(
            {"params": params, **model_state}, batch[0], True, rngs={"dropout": key}, mutable=["batch_stats"]
        )
        return cross_entropy(logits, batch[1]), (model_state, {})

    def start():
        return init_state(
            variables["params"], tx, model_state={"batch_stats": variables["batch_stats"]}, key=KEY
        )

    looped, looped_metrics = loop(train_step(loss, tx), start(), (X, Y))
    scanned, scanned_metrics = train_scan(loss, tx)(start(), (X, Y))
    assert_close(scanned, looped)
    assert_close(scanned_metrics, looped_metrics)
    # Carried, not recomputed: the mean after n steps is the running average of the batches' own means.
    first, _ = train_step(loss, tx)(start(), by_step((X, Y))[0])
    mean = scanned.model_state["batch_stats"]["BatchNorm_0"]["mean"]
    assert not np.allclose(mean, first.model_state["batch_stats"]["BatchNorm_0"]["mean"], atol=1e-4)
    dense = variables["params"]["Dense_0"]
    expected = 0.1 * (X[0] @ dense["kernel"] + dense["bias"]).mean(axis=0)
    np.testing.assert_allclose(
        first.model_state["batch_stats"]["BatchNorm_0"]["mean"], expected, rtol=1e-4, atol=1e-6
    )


def test_runs_of_several_calls_go_on_where_the_last_one_stopped():
    tx = optax.adam(0.1)
    scan = train_scan(linear_loss, tx)
    whole, _ = scan(init_state(linear_params(), tx), (X, Y))
    half, _ = scan(init_state(linear_params(), tx), (X[:2], Y[:2]))
    both, _ = scan(half, (X[2:], Y[2:]))
    assert_close(both, whole)


def key_loss(params, model_state, batch, key):
    return params["w"] * 0, (model_state, {"draw": jax.random.uniform(key)})


def test_each_step_has_a_key_of_its_own():
    tx = optax.sgd(0.1)

    def draws(key, run):
        state = init_state({"w": jnp.zeros(())}, tx, key=key)
        return np.asarray(run(state, X)[1]["draw"])

    scan = train_scan(key_loss, tx)
    scanned = draws(KEY, scan)
    assert len(set(scanned.tolist())) == STEPS
    np.testing.assert_array_equal(scanned, draws(KEY, functools.partial(loop, train_step(key_loss, tx))))
    np.testing.assert_array_equal(scanned, draws(KEY, scan))
    assert not set(scanned.tolist()) & set(draws(jax.random.key(8), scan).tolist())
    np.testing.assert_array_equal(draws(None, scan), draws(jax.random.key(0), scan))


def test_nnx_and_linen_train_alike():
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False, momentum=0.9, name="norm")(nn.Dense(8, name="up")(x))
            return nn.Dense(3, name="down")(nn.relu(x))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(6, 8, rngs=rngs)
            self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
            self.down = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            return self.down(nnx.relu(self.norm(self.up(x))))

    tx = optax.adam(0.05)
    linen = Linen()
    variables = jax.jit(linen.init)(KEY, X[0])

    def linen_loss(params, model_state, batch, key):
        logits, model_state = linen.apply(
            {"params": params, **model_state}, batch[0], mutable=["batch_stats"]
        )
        return cross_entropy(logits, batch[1]), (model_state, {})

    twin = Nnx(nnx.Rngs(0))
    graphdef, params, rest = nnx.split(twin, nnx.Param, ...)
    params = jax.tree.unflatten(
        jax.tree.structure(params),
        [variables["params"][path[0].key][path[1].key] for path, _ in jax.tree.leaves_with_path(params)],
    )

    def nnx_loss(params, model_state, batch, key):
        model = nnx.merge(graphdef, params, model_state)
        logits = model(batch[0])
        return cross_entropy(logits, batch[1]), (nnx.state(model, nnx.Not(nnx.Param)), {})

    state = init_state(variables["params"], tx, model_state={"batch_stats": variables["batch_stats"]})
    state, metrics = train_scan(linen_loss, tx)(state, (X, Y))
    twin_state, twin_metrics = train_scan(nnx_loss, tx)(init_state(params, tx, model_state=rest), (X, Y))
    np.testing.assert_allclose(twin_metrics["loss"], metrics["loss"], rtol=1e-5)
    for layer, name in (("up", "kernel"), ("norm", "scale"), ("down", "bias")):
        np.testing.assert_allclose(
            twin_state.params[layer][name][...], state.params[layer][name], rtol=1e-4, atol=1e-5
        )
    np.testing.assert_allclose(
        twin_state.model_state["norm"]["var"][...],
        state.model_state["batch_stats"]["norm"]["var"],
        rtol=1e-4,
    )
    assert metrics["loss"][-1] < metrics["loss"][0]


def test_partitioned_boxes_stay_boxes():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
            return nn.Dense(3, kernel_init=init)(x)

    model, tx = Model(), optax.adam(0.1)
    params = jax.jit(model.init)(KEY, X[0])["params"]

    def loss(params, model_state, batch, key):
        return cross_entropy(model.apply({"params": params}, batch[0]), batch[1]), (model_state, {})

    state, _ = train_scan(loss, tx)(init_state(params, tx), (X, Y))
    assert isinstance(state.params["Dense_0"]["kernel"], nn.Partitioned)
    assert state.params["Dense_0"]["kernel"].names == (None, "model")


def test_states_of_several_runs_train_under_vmap():
    tx = optax.adam(0.1)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), linear_params())
    states = jax.vmap(lambda params: init_state(params, tx))(stacked)
    scan = train_scan(linear_loss, tx)
    together, metrics = jax.jit(jax.vmap(scan, in_axes=(0, None)))(states, (X, Y))
    assert metrics["loss"].shape == (2, STEPS)
    for i in range(2):
        params = jax.tree.map(operator.itemgetter(i), stacked)
        alone, _ = scan(init_state(params, tx), (X, Y))
        assert_close(jax.tree.map(operator.itemgetter(i), together.params), alone.params)


def model_loss(model):
    def loss(params, model_state, batch, key):
        logits, model_state = model.apply(
            {"params": params, **model_state},
            batch[0],
            train=True,
            rngs={"dropout": key},
            mutable=list(model_state),
        )
        return cross_entropy(logits, batch[1]), (model_state, {})

    return loss


def test_transformer_learns():
    tokens = jnp.tile(jnp.arange(9), (20, 4, 1))
    config = TransformerConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=9, max_len=8, dropout=0.1)
    model, tx = Transformer(config), optax.adam(0.01)
    params = jax.jit(model.init)(KEY, tokens[0, :, :-1])["params"]
    scan = train_scan(model_loss(model), tx)
    _, metrics = scan(init_state(params, tx), (tokens[..., :-1], tokens[..., 1:]))
    assert metrics["loss"][-1] < 0.7 * metrics["loss"][0]


def test_resnet_learns():
    batch = jax.random.normal(KEY, (8, 6, 6, 3)), jnp.arange(8)
    model, tx = ResNet(ResNetConfig((1,), (8,))), optax.adam(0.02)
    variables = jax.jit(model.init)(KEY, batch[0])
    state = init_state(variables["params"], tx, model_state={"batch_stats": variables["batch_stats"]})
    step, losses = train_step(model_loss(model), tx), []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(metrics["loss"])
    assert losses[-1] < 0.7 * losses[0]


# Donation


@pytest.mark.parametrize("form", [train_step, train_scan])
def test_the_state_is_donated(form):
    tx = optax.adam(0.1)
    params = linear_params()
    batch = by_step((X, Y))[0] if form is train_step else (X, Y)
    run = form(linear_loss, tx)
    state = init_state(params, tx, key=KEY)

    compiled = run.lower(state, batch).compile()
    n_leaves = len(jax.tree.leaves(state))
    assert compiled.as_text().count("may-alias") + compiled.as_text().count("must-alias") >= n_leaves - 1
    adam_bytes = 3 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert compiled.memory_analysis().alias_size_in_bytes >= adam_bytes

    after, _ = run(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state, state.step)))
    # What the user handed to init_state is the user's still.
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, KEY)))
    run(after, batch)

    keeping = form(linear_loss, tx, donate=False)
    state = init_state(params, tx, key=KEY)
    assert keeping.lower(state, batch).compile().memory_analysis().alias_size_in_bytes == 0
    keeping(state, batch)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_an_optimizer_that_keeps_the_parameters_themselves():
    def keep(params):
        return {"anchor": params, "again": params}

    def pull(updates, state, params):
        return jax.tree.map(
            lambda u, p, a: -0.1 * u + 0.01 * (a - p), updates, params, state["anchor"]
        ), state

    tx = optax.GradientTransformation(keep, pull)
    shared = tx.init(linear_params())
    assert shared["anchor"]["w"] is shared["again"]["w"]
    state, metrics = train_scan(linear_loss, tx)(init_state(linear_params(), tx), (X, Y))
    assert_close(state.opt_state["anchor"], linear_params())
    assert np.isfinite(metrics["loss"]).all()


def test_a_second_call_does_not_compile_again():
    traces = []

    def loss(params, model_state, batch, key):
        traces.append(1)
        return linear_loss(params, model_state, batch, key)

    tx = optax.adam(0.1)
    step = train_step(loss, tx)
    state, _ = step(init_state(linear_params(), tx), by_step((X, Y))[0])
    once = len(traces)
    for batch in by_step((X, Y)):
        state, _ = step(state, batch)
    assert len(traces) == once


# Devices

SHARDED = """
    import json
    import jax, jax.numpy as jnp, numpy as np, optax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from mujax.train import init_state, train_scan, train_step

    assert jax.device_count() == 8
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    specs = {"up": P(None, "model"), "bias": P(), "down": P("model", None), "out": P()}
    rng = np.random.default_rng(0)
    shapes = {"up": (6, 16), "bias": (16,), "down": (16, 3), "out": (3,)}
    plain = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    x = rng.normal(size=(3, 8, 6)).astype(np.float32)
    y = rng.integers(0, 3, size=(3, 8)).astype(np.int32)
    tx = optax.adam(0.05)

    def loss(p, model_state, batch, key):
        h = jnp.tanh(batch[0] @ p["up"] + p["bias"])
        h = h * jax.random.bernoulli(key, 0.9, h.shape)
        labels = optax.softmax_cross_entropy_with_integer_labels(h @ p["down"] + p["out"], batch[1])
        return labels.mean(), ({"mean": 0.9 * model_state["mean"] + 0.1 * h.mean(0)}, {})

    def put(tree, specs):
        return jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, specs)

    def start(params):
        return init_state(params, tx, model_state={"mean": jnp.zeros(16)})

    def whereabouts(state):
        leaves = jax.tree_util.tree_leaves_with_path(state)
        where = lambda leaf: (str(leaf.sharding.spec), len(leaf.devices()))
        return {jax.tree_util.keystr(path): where(leaf) for path, leaf in leaves}

    def run(form, params, batches):
        state = start(params)
        before = whereabouts(state) if form.startswith("sharded") else None
        losses = []
        if form.endswith("scan"):
            scan = train_scan(loss, tx)
            state, metrics = scan(state, batches)
            losses, program = metrics["loss"], scan
        else:
            step = train_step(loss, tx)
            for i in range(3):
                state, metrics = step(state, jax.tree.map(lambda leaf: leaf[i], batches))
                losses.append(metrics["loss"])
        after = whereabouts(state) if form.startswith("sharded") else None
        return {
            "losses": np.asarray(jnp.stack(list(losses))).tolist(),
            "up": np.asarray(state.params["up"]).tolist(),
            "mean": np.asarray(state.model_state["mean"]).tolist(),
            "before": before,
            "after": after,
        }

    sharded = put(plain, specs)
    batches = put((x, y), (P(None, "data"), P(None, "data")))
    results = {
        "single step": run("single step", plain, (x, y)),
        "single scan": run("single scan", plain, (x, y)),
        "sharded step": run("sharded step", sharded, batches),
        "sharded scan": run("sharded scan", sharded, batches),
    }

    # What plain jit does with the same step, to know that the pinning is needed.
    def unpinned(params, batch):
        gradient = jax.grad(lambda p: loss(p, {"mean": jnp.zeros(16)}, batch, jax.random.key(0))[0])(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    first = jax.tree.map(lambda leaf: leaf[0], batches)
    results["unpinned bias"] = str(jax.jit(unpinned)(sharded, first)["bias"].sharding.spec)

    state = start(sharded)
    compiled = train_scan(loss, tx).lower(state, batches).compile()
    results["alias"] = compiled.memory_analysis().alias_size_in_bytes
    local = lambda leaf: leaf.addressable_shards[0].data.nbytes
    results["local"] = sum(map(local, jax.tree.leaves((state.params, state.opt_state))))
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), (state, batches)
    )
    lowered = train_scan(loss, tx).lower(*abstract).compile()
    results["abstract"] = lowered.memory_analysis().alias_size_in_bytes
    print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def sharded_run():
    env = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(SHARDED)],
        capture_output=True,
        text=True,
        check=False,
        env=env,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_sharded_training_is_training_on_one_device(sharded_run):
    reference = sharded_run["single step"]
    for form in ("single scan", "sharded step", "sharded scan"):
        for figure in ("losses", "up", "mean"):
            np.testing.assert_allclose(
                sharded_run[form][figure], reference[figure], rtol=2e-4, atol=1e-5, err_msg=form
            )


def test_sharded_parameters_stay_as_they_are(sharded_run):
    for form in ("sharded step", "sharded scan"):
        before, after = sharded_run[form]["before"], sharded_run[form]["after"]
        assert after == before
        assert {devices for _, devices in after.values()} == {8}
        for tree in (".params", ".opt_state[0].mu", ".opt_state[0].nu"):
            assert after[f"{tree}['up']"][0] == "P(None, 'model')"
            assert after[f"{tree}['down']"][0] == "P('model', None)"
            assert after[f"{tree}['bias']"][0] == "P()"
        assert after[".step"][0] == after[".key"][0] == "P()"
    # Plain jit moves the bias, so the test above can fail.
    assert "model" in sharded_run["unpinned bias"]


def test_sharded_state_is_donated(sharded_run):
    assert sharded_run["alias"] >= sharded_run["local"] > 0
    assert sharded_run["abstract"] == sharded_run["alias"]


# What does not fit, and what must not be mended


@pytest.mark.parametrize("form", [train_step, train_scan])
@pytest.mark.parametrize(
    ("returned", "text"),
    [
        (
            {},
            "model_state at stats/mean: expected float32[3] back from the loss, got nothing; "
            "return the collections that the loss was passed, updated or unchanged.",
        ),
        (
            {"stats": {"mean": jnp.zeros(4)}},
            "model_state at stats/mean: expected float32[3] back from the loss, got float32[4]; "
            "return the collections that the loss was passed, updated or unchanged.",
        ),
        (
            {"stats": {"mean": jnp.zeros(3)}, "more": jnp.zeros((), jnp.int32)},
            "model_state at more: expected nothing back from the loss, got int32[]; "
            "return the collections that the loss was passed, updated or unchanged.",
        ),
        (
            {"stats": {"mean": jnp.zeros(3)}, "more": {}},
            "model_state: expected the structure PyTreeDef({'stats': {'mean': *}}) back from the loss, "
            "got PyTreeDef({'more': {}, 'stats': {'mean': *}}); "
            "return the collections that the loss was passed, updated or unchanged.",
        ),
    ],
)
def test_a_model_state_that_does_not_come_back(form, returned, text):
    tx = optax.sgd(0.1)

    def loss(params, model_state, batch, key):
        value, (_, metrics) = linear_loss(params, model_state, batch, key)
        return value, (returned, metrics)

    state = init_state(linear_params(), tx, model_state={"stats": {"mean": jnp.zeros(3)}})
    with pytest.raises(MujaxError) as error:
        form(loss, tx)(state, by_step((X, Y))[0] if form is train_step else (X, Y))
    assert str(error.value) == text


def test_a_loss_that_is_not_finite_comes_back_as_it_is():
    tx = optax.sgd(0.1)
    x = X.copy()
    x[2] = np.inf
    state, metrics = train_scan(linear_loss, tx)(init_state(linear_params(), tx), (x, Y))
    assert np.isfinite(metrics["loss"]).tolist() == [True, True, False, False]
    assert np.isnan(state.params["w"]).any()
    guarded = optax.apply_if_finite(tx, 5)
    state, metrics = train_scan(linear_loss, guarded)(init_state(linear_params(), guarded), (x, Y))
    assert np.isfinite(metrics["loss"]).tolist() == [True, True, False, True]
    assert np.isfinite(state.params["w"]).all()


def test_the_optimizer_is_told_the_loss():
    seen = optax.GradientTransformationExtraArgs(
        lambda params: {"value": jnp.zeros(())},
        lambda updates, state, params=None, *, value, **_: (updates, {"value": value}),
    )
    tx = optax.chain(seen, optax.sgd(0.1))
    state, metrics = train_step(linear_loss, tx)(init_state(linear_params(), tx), by_step((X, Y))[0])
    assert state.opt_state[0]["value"] == metrics["loss"]


def test_the_state_is_a_tree_with_paths():
    state = init_state(linear_params(), optax.sgd(0.1, momentum=0.9))
    assert isinstance(state, TrainState)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state)]
    assert paths == [
        ".params['b']",
        ".params['w']",
        ".opt_state[0].trace['b']",
        ".opt_state[0].trace['w']",
        ".key",
        ".step",
    ]
