"""Trajectories of mujax against microsoft/mup: the same weights, batches and hyperparameters, in float64.

The golden losses were written by `make_golden.py`. The live comparison runs where the extra `parity` is
installed; that `golden.json` is what microsoft/mup gives is then tested too.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
import ours
import pytest
from jaxtyping import Float64
from problems import CASES, IMPLEMENTATIONS, OPTIMIZERS, STEPS, Case

import mujax
from mujax import rules
from mujax.spec import Role, leaf_path

GOLDEN_FILE = pathlib.Path(__file__).parent / "golden.json"
GOLDEN: dict[str, list[float]] = json.loads(GOLDEN_FILE.read_text())["losses"]
RTOL = 1e-9

# What a broken rule must change a loss by, at the least: a million times what a true one may.
CLEARLY = 1e-3

MLP_SGD, MLP_ADAM, MLP_ADAMW = (Case("mlp", "mixed", name) for name in OPTIMIZERS)
MLP_RMSPROP, MLP_ADAGRAD, _, MLP_RADAM, MLP_ASGD = (Case("mlp", "mixed", name) for name in IMPLEMENTATIONS)
TRANSFORMER_SGD, TRANSFORMER_ADAM, _ = (Case("transformer", "mixed", name) for name in OPTIMIZERS)


@pytest.fixture(autouse=True)
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@functools.cache
def trained(case: Case) -> Float64[np.ndarray, " steps"]:
    """The case's losses; the golden and the live comparison share one run."""
    return np.asarray(ours.losses(case))


def distance(actual: Float64[jax.Array, " steps"], case: Case) -> float:
    """The largest relative difference from the golden losses, over the steps."""
    return float(np.max(np.abs(np.asarray(actual) / np.array(GOLDEN[str(case)]) - 1)))


def changed(
    spec: mujax.MupSpec, role: Role, change: Callable[[mujax.ParamSpec], mujax.ParamSpec]
) -> mujax.MupSpec:
    """The spec with every parameter of one role changed."""
    params = {path: change(param) if param.role == role else param for path, param in spec.items()}
    assert params != dict(spec)
    return mujax.MupSpec(params, spec.parametrization)


def without_growth(param: mujax.ParamSpec) -> mujax.ParamSpec:
    return dataclasses.replace(param, base_shape=param.shape)


def swapped(param: mujax.ParamSpec) -> mujax.ParamSpec:
    return dataclasses.replace(param, fan_in=param.fan_out, fan_out=param.fan_in)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_golden(case: Case) -> None:
    """A run that is training, not noise: its loss falls by a fifth, so every step's update counts."""
    assert len(trained(case)) == STEPS
    assert np.mean(trained(case)[-4:]) < 0.8 * trained(case)[0]
    np.testing.assert_allclose(trained(case), GOLDEN[str(case)], rtol=RTOL, atol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_live(case: Case) -> None:
    pytest.importorskip("torch", reason="the extra `parity` is not installed")
    pytest.importorskip("mup", reason="the extra `parity` is not installed")
    import reference

    theirs = reference.losses(case)
    np.testing.assert_allclose(theirs, GOLDEN[str(case)], rtol=1e-12, atol=0)
    np.testing.assert_allclose(trained(case), theirs, rtol=RTOL, atol=0)


@pytest.mark.parametrize("case", [MLP_SGD, MLP_ADAM, MLP_ADAMW, TRANSFORMER_SGD], ids=str)
def test_standard_parametrization_differs(case: Case) -> None:
    model = ours.transform(case, parametrization="sp")
    assert distance(ours.losses(case, model=model), case) > CLEARLY


@pytest.mark.parametrize("case", [MLP_SGD, MLP_ADAM], ids=str)
def test_readout_without_its_factor_differs(case: Case) -> None:
    tx = ours.optimizer(case, ours.transform(case).spec)
    model = ours.transform(case, parametrization="sp")
    assert distance(ours.losses(case, model=model, tx=tx), case) > CLEARLY


@pytest.mark.parametrize(
    ("case", "role"),
    [
        (MLP_SGD, "input"),
        (MLP_SGD, "hidden"),
        (MLP_SGD, "output"),
        (MLP_ADAM, "hidden"),
        (MLP_ADAMW, "hidden"),
        (MLP_ADAGRAD, "hidden"),
        (MLP_RADAM, "hidden"),
        (MLP_ASGD, "input"),
    ],
    ids=str,
)
def test_learning_rate_without_a_roles_factor_differs(case: Case, role: Role) -> None:
    model = ours.transform(case)
    tx = ours.optimizer(case, changed(model.spec, role, without_growth))
    assert distance(ours.losses(case, model=model, tx=tx), case) > CLEARLY


@pytest.mark.parametrize("case", [MLP_SGD, MLP_ADAM, TRANSFORMER_ADAM], ids=str)
def test_fan_in_taken_for_fan_out_differs(case: Case) -> None:
    """What a port that keeps PyTorch's (out, in) convention does to Flax's (in, out) kernels."""
    model = ours.transform(case)
    tx = ours.optimizer(case, changed(model.spec, "hidden", swapped))
    assert distance(ours.losses(case, model=model, tx=tx), case) > CLEARLY


@pytest.mark.parametrize("case", [MLP_ADAM, MLP_RMSPROP], ids=str)
def test_scaled_epsilon_differs(case: Case) -> None:
    model = ours.transform(case)
    tx = ours.optimizer(case, model.spec, scale_eps=True)
    assert distance(ours.losses(case, model=model, tx=tx), case) > CLEARLY


def test_an_epsilon_on_the_other_side_of_the_root_differs() -> None:
    """optax's default for RMSProp is not PyTorch's."""
    model = ours.transform(MLP_RMSPROP)
    tx = ours.optimizer(MLP_RMSPROP, model.spec, eps_in_sqrt=True)
    assert distance(ours.losses(MLP_RMSPROP, model=model, tx=tx), MLP_RMSPROP) > CLEARLY


def test_decay_multiplied_with_the_factor_differs() -> None:
    """The JAX ports' mistake: the µP factor after `optax.adamw` scales the decay too."""
    model = ours.transform(MLP_ADAMW)
    spec = model.spec

    def scale(updates: Any, params: Any) -> Any:
        del params
        return jax.tree_util.tree_map_with_path(
            lambda path, update: (
                update * rules.lr_factor(spec[leaf_path(path)], spec.parametrization, "adam")
            ),
            updates,
        )

    tx = optax.chain(optax.adamw(**OPTIMIZERS["adamw"]), optax.stateless(scale))
    assert distance(ours.losses(MLP_ADAMW, model=model, tx=tx), MLP_ADAMW) > CLEARLY
