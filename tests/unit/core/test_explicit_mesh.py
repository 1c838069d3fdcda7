"""Meshes with explicit axes, which is what `jax.make_mesh` gives: types of arrays carry their sharding."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mujax

P = jax.sharding.PartitionSpec
X = jnp.linspace(-1, 1, 8 * 7).reshape(8, 7)
SPECS = {
    "in": P(None, None),
    "query": P(None, None, "model"),
    "down": P(None, "model", None),
    "out": P(None, None),
}


def net(width: int, explicit: bool) -> mujax.Functional:
    """Attention between the entries of a batch, in a scan over rematerialised layers."""

    def init(key: Any, x: Any) -> Any:
        first, second, third, last = jax.random.split(key, 4)
        return {
            "in": jax.random.normal(first, (7, width)),
            "query": jax.random.normal(second, (3, width, width)) / width**0.5,
            "down": jax.random.normal(third, (3, width, width)) / width**0.5,
            "out": jax.random.normal(last, (width, 3)) / width**0.5,
        }

    def whole(value: Any) -> Any:
        return jax.sharding.reshard(value, P()) if explicit else value

    def block(h: Any, kernels: Any) -> tuple[Any, None]:
        query, down = kernels
        u = h @ query
        weights = jax.nn.softmax(jnp.einsum("bi,ci->bc", u, whole(u)) / width**0.5)
        u = jnp.einsum("bc,ci->bi", weights, whole(u))
        options = {"out_sharding": P("data", None)} if explicit else {}
        return h + jnp.tanh(jnp.einsum("bi,ij->bj", u, down, **options)), None

    def apply(params: Any, x: Any) -> Any:
        h = jnp.tanh(x @ params["in"])
        h, _ = lax.scan(jax.checkpoint(block), h, (params["query"], params["down"]))
        return h @ params["out"]

    return mujax.Functional(init, apply)


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    mesh = jax.make_mesh((1, 1), ("data", "model"))
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}
    return mesh


def test_it_is_read_and_run_as_without_a_mesh(mesh):
    plain = mujax.mup_init(net(32, False), net(8, False), X)
    params = plain.init(jax.random.key(0), X)

    def total(mup: mujax.MupModel, params: Any, x: Any) -> Any:
        return (mup.apply(params, x) ** 2).sum()

    expected = jax.value_and_grad(lambda params: total(plain, params, X))(params)
    with jax.set_mesh(mesh):
        x, sharded = jax.device_put(X, P("data", None)), jax.device_put(params, SPECS)
        mup = mujax.mup_init(net(32, True), net(8, True), x)
        assert mup.spec == plain.spec
        assert [(c.kind, c.factor) for c in mup.corrections] == [("attention", 0.5), ("readout", 0.25)]
        assert mup.findings == ()
        found = jax.jit(jax.value_and_grad(lambda params: total(mup, params, x)))(sharded)
        eager = mup.apply(sharded, x)
        assert eager.sharding.spec == net(32, True).apply(sharded, x).sharding.spec
        assert jax.tree.map(lambda leaf: leaf.sharding.spec, found[1]) == SPECS
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), found, expected)


def test_the_twin_without_the_factors_is_another_function(mesh):
    params = net(32, False).init(jax.random.key(0), X)
    with jax.set_mesh(mesh):
        x, sharded = jax.device_put(X, P("data", None)), jax.device_put(params, SPECS)
        mup = mujax.mup_init(net(32, True), net(8, True), x)
        assert not np.allclose(mup.apply(sharded, x), net(32, True).apply(sharded, x), rtol=0.1)


def test_shard_map_over_an_explicit_mesh(mesh):
    def build(width: int) -> mujax.Functional:
        def apply(params: Any, x: Any) -> Any:
            return jax.shard_map(net(width, False).apply, in_specs=(P(), P("data")), out_specs=P("data"))(
                params, x
            )

        return mujax.Functional(net(width, False).init, apply)

    plain = mujax.mup_init(net(32, False), net(8, False), X)
    params = plain.init(jax.random.key(0), X)
    with jax.set_mesh(mesh):
        x, placed = jax.device_put(X, P("data", None)), jax.device_put(params, P())
        mup = mujax.mup_init(build(32), build(8), x)
        assert mup.spec == plain.spec
        assert [(c.kind, c.factor) for c in mup.corrections] == [("attention", 0.5), ("readout", 0.25)]
        found = jax.jit(mup.apply)(placed, x)
    np.testing.assert_allclose(found, plain.apply(params, X), rtol=1e-4, atol=1e-5)
