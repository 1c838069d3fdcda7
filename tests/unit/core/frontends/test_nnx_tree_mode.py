"""NNX's tree mode, `graph=False`: modules as plain pytrees."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mujax

if "graph" not in inspect.signature(nnx.jit).parameters:
    pytest.skip("this Flax has no tree mode", allow_module_level=True)

X = jnp.linspace(-1, 1, 8 * 7).reshape(8, 7)


class Net(nnx.Module):
    """Batch statistics, a scan over layers and a call of `nnx.jit`, in the mode that is asked for."""

    def __init__(self, width: int, graph: bool, rngs: nnx.Rngs) -> None:
        self.graph = graph
        self.first = nnx.Linear(7, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        make = nnx.vmap(lambda key: nnx.Linear(width, width, rngs=nnx.Rngs(key)), graph=graph)
        self.layers = make(jax.random.split(rngs.params(), 3))
        self.out = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        @functools.partial(nnx.scan, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0), graph=self.graph)
        def run(h: Any, layer: nnx.Linear) -> Any:
            return nnx.tanh(layer(h)), None

        h, _ = run(self.norm(self.first(x)), self.layers)
        return nnx.jit(lambda out, h: out(h), graph=self.graph)(self.out, h)


def mup_of(graph: bool) -> mujax.MupModel:
    return mujax.mup_init(lambda rngs: Net(32, graph, rngs), lambda rngs: Net(8, graph, rngs), X)


def losses(mup: mujax.MupModel, graph: bool, steps: int = 4) -> tuple[list[float], Any]:
    """Training, and the batch statistics afterwards."""
    module = mup.init(jax.random.key(0))
    optimizer = nnx.Optimizer(module, mujax.mup_adam(1e-2, mup.spec), wrt=nnx.Param)

    @functools.partial(nnx.jit, graph=graph)
    def step(module: nnx.Module, optimizer: nnx.Optimizer) -> Any:
        loss, grads = nnx.value_and_grad(lambda module: (mup.apply(module, X) ** 2).mean(), graph=graph)(
            module
        )
        optimizer.update(module, grads)
        return loss

    return [float(step(module, optimizer)) for _ in range(steps)], module.norm.mean[...]


def test_it_is_read_as_in_graph_mode():
    tree, graph = mup_of(False), mup_of(True)
    assert tree.spec == graph.spec
    assert tree.spec["layers/kernel"].role == "hidden"
    assert tree.spec["layers/kernel"].stack == (0,)
    assert [(c.kind, c.factor) for c in tree.corrections] == [("readout", 0.25)]
    assert tree.findings == graph.findings == ()


def test_it_trains_as_in_graph_mode():
    tree, mean = losses(mup_of(False), graph=False)
    expected, expected_mean = losses(mup_of(True), graph=True)
    np.testing.assert_allclose(tree, expected, rtol=1e-5)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-5)
    assert np.abs(mean).max() > 0
    plain = Net(32, False, nnx.Rngs(0))
    assert not np.allclose(tree[0], (plain(X) ** 2).mean())


@pytest.mark.skipif(not hasattr(nnx, "set_graph_mode"), reason="this Flax has no setting for the mode")
def test_the_mode_as_a_setting():
    with nnx.set_graph_mode(False):
        module = (mup := mup_of(False)).init(jax.random.key(0))
        inside = mup.apply(module, X)
    np.testing.assert_allclose(inside, mup_of(True).apply(mup_of(True).init(jax.random.key(0)), X), rtol=1e-5)
