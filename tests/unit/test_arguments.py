"""Wrong arguments of every public function: one error that names the argument, before anything is run.

A row of `ROWS` has a valid call of a function and wrong values for each of its parameters. A public function
without a row, and a parameter without wrong values, fail the tests.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import re
import tempfile
import types
from collections.abc import Callable, Mapping
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx
from jax.sharding import NamedSharding, PartitionSpec

import mujax
from mujax import data, optim, plot, testing
from mujax._arguments import COUNT, NONE, SCALAR, WIDTHS, Kind, check_arguments, shown, takes

train, tune = (importlib.import_module(f"mujax.{name}") for name in ("train", "tune"))


class Reached(BaseException):
    """Raised by the user's function: all arguments were accepted."""


def stop(*_: Any, **__: Any) -> Any:
    raise Reached


def reader(result: type) -> Any:
    """A result that is reached as soon as it is read."""

    def read(self: Any, name: str) -> Any:
        raise Reached

    return object.__new__(type("Reader", (result,), {"__getattribute__": read}))


# ---- wrong values, by kind ------------------------------------------------------------------------------

NAN, THING = math.nan, object()
WHOLE = (-1, 1.5, "3", True, [2], NAN, THING, np.ones(2))
COUNTS = (0, None, *WHOLE)
COUNTS_OR_NONE = (0, *WHOLE)
SEEDS = (None, 2**31, *WHOLE)
NUMBERS = (None, "1.0", [1.0], NAN, True, THING)
POSITIVES = (0.0, -1.0, math.inf, *NUMBERS)
NOT_NEGATIVES = (-1.0, math.inf, *NUMBERS)
FLAGS = (None, 1, "yes", THING)
TEXTS = (None, 3, ["a"], THING)
PATHS = (None, 3, "", [], THING)
NAMED = ("text", 3, [1], {3: 4}, THING)
FUNCTIONS = (3, "text", [], THING, lambda: None)
OPTIMIZERS = (None, 3, "adamm", [], optax.adam(1.0), THING)
FACTORIES = (None, *FUNCTIONS, nn.Dense(3))
WIDTHS_ = (None, 8, "8", (), (8,), (8, 8), (8, 16.5), (8, "16"), (0, 8), (8, True), {8: 16}, iter((8, 16)))
SOME_WIDTHS = (None, 8, "8", (), (8, 16.5), (0, 8), (8, True))
RATES = (None, 8, "8", (), (-8, -7), (-8, -7, NAN), (-8, -7, "6"), (-8, -7, 127), (-8, -8, -7))
LISTS = ("text", 3, [3], THING)
TREES = (None, "text", {}, {"a": "b"}, THING)
KEYS = (None, "text", 1.5, jnp.ones(2), THING)
MESHES = (None, "data=-1", 3, [], {"data": 1}, THING)
MESH_SIZES = (None, "data=-1", 3, [], {"fsdp": 1.5}, {3: 1}, np.ones(2), THING)
RULES = ("mlp", 3, ("mlp", "tensor"), [("mlp",)], [(3, "fsdp")], [("mlp", 3)], {"*": 3}, {3: None}, THING)
SHARDINGS = (PartitionSpec("data"), "data", 3, [], THING)
PREFETCH = (None, *WHOLE)
TRANSFORMS = (None, "adam", 3, optax.adam, THING)
BATCHES = (None, [], "text", 3, {}, [1], [(1,)], [("a", "b")], [(None, None)], [THING])
RESULTS = (None, "text", 3, THING)

X = np.ones((4, 3), np.float32)
PAIRS = [(X, X[:, :1])] * 3
KEY = jax.random.key(0)


def net(width: int) -> nn.Module:
    return nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(width), nn.relu, nn.Dense(1)])


MUP = mujax.mup_init(net(16), net(8), X)
NNX_MUP = mujax.mup_init(
    lambda rngs: nnx.Linear(3, 16, rngs=rngs), lambda rngs: nnx.Linear(3, 8, rngs=rngs), X
)
SPEC = MUP.spec
PARAMS = jax.eval_shape(lambda: MUP.init(KEY, X))["params"]
MESH = train.make_mesh({"data": 1}, jax.devices()[:1])
BY_DATA = NamedSharding(MESH, PartitionSpec("data"))
ZEROS = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), PARAMS)


@dataclasses.dataclass(frozen=True)
class Row:
    """A function with a valid call.

    Attributes:
        call: takes the arguments by name.
        valid: a valid call.
        wrong: parameter -> values that are refused.
        also: parameter -> further values that are accepted.
        free: parameters that may be anything: they are passed on to what the user has written.
        ends: how the valid call ends: the exception, or None if it returns.
        called: parameter -> what its error may call it, where not by its name.
    """

    call: Callable[..., Any]
    valid: Mapping[str, Any]
    wrong: Mapping[str, tuple[Any, ...]]
    also: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    free: frozenset[str] = frozenset()
    ends: type[BaseException] | None = None
    called: Mapping[str, str] = dataclasses.field(default_factory=dict)


SHARED = {
    "factory": FACTORIES,
    "widths": WIDTHS_,
    "optimizer": OPTIMIZERS,
    "loss": FUNCTIONS,
    "seeds": COUNTS,
    "seed": SEEDS,
    "base": (*FUNCTIONS, nn.Dense(3)),
    "base_width": COUNTS_OR_NONE,
    "kwargs": NAMED,
}
ALSO = {
    "widths": ([8, 16], range(8, 33, 8), np.array([8, 16]), (16, 8)),
    "optimizer": ("adamw", lambda rate, spec: None, mujax.mup_adam),
    "loss": (None, lambda outputs, targets: 0.0),
    "seeds": (1, np.int64(3)),
    "base_width": (None, 4),
    "kwargs": (None, {}, {"train": True}),
}
CHECKS = {**SHARED, "batches": BATCHES}
COORD = {
    **SHARED,
    "inputs": ("text", 3, THING, (), jax.ShapeDtypeStruct((2,), "float32")),
    "learning_rates": ((), (-1,), (0.0,), (NAN,), ("a",), 0.1, "text", (math.inf,)),
    "steps": COUNTS,
    "progress": FUNCTIONS,
}
TRAINED = {"factory": stop, "widths": (8, 16), "batches": PAIRS}
MUP_INIT = {
    "parametrization": (None, "ntk", 3, [], THING),
    "roles": ("text", 3, {"*": 3}, {"*": "hiden"}, {"nothing": "hidden"}, THING),
    "corrections": ("text", 3, {"attention": "no"}, {"atention": False}, THING),
    "zero_init": (None, "readout", 3, ("redout",), (3,), THING),
    "depth": ("deep", 3, (1,), (0, 2), (1.5, 2), THING),
    "depth_alpha": (*NUMBERS, 0.1, 2.0),
    "residual": (None, "block", 3, (3,), THING),
    "other_calls": (None, "train", 3, (3,), {"train": True}, THING),
    "strict": FLAGS,
    "delta": ("text", 3, X, THING),
    "model": (None, "text", 3, X, [], nn.Dense, THING),
    "base": (None, "text", 3, X, [], nn.Dense, THING),
}


def mup_init(model: Any, base: Any, **kwargs: Any) -> Any:
    if "depth_alpha" in kwargs or "residual" in kwargs:
        kwargs.setdefault("depth", (2, 2))
    return mujax.mup_init(model, base, X, **kwargs)


def audit(model: Any, base: Any, **kwargs: Any) -> Any:
    return mujax.audit(model, base, X, **kwargs)


def checkpoints(**given: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        train.Checkpoints(**{"directory": folder, "spec": SPEC, **given}).close()


def tune_config(**given: Any) -> Any:
    return mujax.TuneConfig(**{"task": stop, "width": 8, "batches": PAIRS, "steps": 3, **given})


def transfer_config(**given: Any) -> Any:
    default = {"task": stop, "widths": (8, 16), "batches": PAIRS, "steps": 3, "log2_lrs": (-8, -7, -6)}
    return mujax.TransferConfig.for_task(**{**default, **given})


def transfer_fields(**given: Any) -> Any:
    default = {
        "task": stop,
        "widths": (8, 16),
        "base_width": 8,
        "log2_lrs": (-8, -7, -6),
        "seeds": 1,
        "steps": 3,
        "batch": 4,
        "batches": PAIRS,
    }
    return mujax.TransferConfig(**{**default, **given})


TUNED = {
    "task": ("mnist", 3, None, nn.Dense(3), THING),
    "width": COUNTS_OR_NONE,
    "data": (3, "", THING),
    "batches": (None,),
    "length": COUNTS,
    "loss": FUNCTIONS[:1] + FUNCTIONS[2:],
    "optimizer": (None, 3, "adamm", [], THING),
    "parametrization": (None, "ntk", 3, [], THING),
    "base_width": COUNTS_OR_NONE,
    "zero_init": ("readout", 3, ("redout",), THING),
    "space": NAMED,
    "fixed": (None, *NAMED),
    "objective": ("lost", None, 3, THING),
    "seeds": COUNTS,
    "seed": SEEDS,
    "steps": COUNTS,
    "batch": COUNTS_OR_NONE,
    "trials": COUNTS,
    "rungs": COUNTS,
    "study": ("", 3, [], THING),
    "mode": ("fast", 3, THING),
    "lanes": COUNTS_OR_NONE,
    "heartbeat": POSITIVES,
    "patience": NOT_NEGATIVES,
}
# Of streams: the valid call does not read any batch.
STREAMED = {"key": KEYS, "batch": COUNTS, "sharding": SHARDINGS, "prefetch": PREFETCH}
STREAMED_ALSO = {"sharding": (None, BY_DATA), "prefetch": (0, 2)}
CHECKPOINTS = {
    "keep": COUNTS,
    "every_steps": COUNTS_OR_NONE,
    "every_minutes": (*POSITIVES[:3], *POSITIVES[4:]),
}
LOAD = {"path": (*PATHS, "no/such/file")}
STEP = {
    "loss": (None, *FUNCTIONS),
    "tx": TRANSFORMS,
    "donate": FLAGS,
    "accumulate": COUNTS,
    "compute_dtype": ("text", "int32", 3, int, [], THING),
}
STEP_ALSO = {"compute_dtype": (None, "bfloat16", jnp.bfloat16, np.dtype("float32"), np.float16)}
ROWS: dict[str, Row] = {
    "coord_check": Row(
        mujax.coord_check,
        {"factory": stop, "widths": (8, 16), "inputs": X},
        COORD,
        {
            **ALSO,
            "loss": (None,),
            "learning_rates": (None, [0.1], (np.float32(0.1), 1)),
            "inputs": ((X, X), jnp.ones(3)),
        },
        frozenset({"mup_kwargs", "batches"}),
        Reached,
    ),
    "coord_check on batches": Row(
        mujax.coord_check,
        TRAINED,
        {"batches": BATCHES[1:]},
        {"batches": (PAIRS[:1], tuple(PAIRS), [[X, X]])},
        ends=Reached,
    ),
    "transfer_check": Row(
        mujax.transfer_check,
        {**TRAINED, "log2_lrs": (-8, -7, -6)},
        {**CHECKS, "log2_lrs": RATES, "max_drift": NOT_NEGATIVES, "max_regret": NOT_NEGATIVES},
        {**ALSO, "log2_lrs": (range(-8, -2), [-8.5, -7.5, -6.0]), "max_drift": (0, 1.5)},
        frozenset({"mup_kwargs"}),
        Reached,
    ),
    "wider_is_better": Row(
        mujax.wider_is_better,
        {**TRAINED, "learning_rate": 0.1},
        {**CHECKS, "learning_rate": POSITIVES, "window": (4, *COUNTS_OR_NONE), "max_rise": NOT_NEGATIVES},
        {**ALSO, "learning_rate": (np.float32(0.1), 1)},
        frozenset({"mup_kwargs"}),
        Reached,
    ),
    "assert_mup": Row(
        testing.assert_mup,
        {"factory": stop, "widths": (8, 16), "inputs": X},
        {"factory": FACTORIES, "widths": WIDTHS_, "inputs": COORD["inputs"]},
        free=frozenset({"args", "kwargs"}),
        ends=Reached,
    ),
    "mup_init": Row(
        mup_init,
        {"model": net(16), "base": net(8)},
        MUP_INIT,
        {
            "roles": (None, {}, {"layers_2/kernel": "hidden"}),
            "strict": (False, np.True_),
            "zero_init": (["readout"],),
            "other_calls": ([], [{}]),
        },
        frozenset({"inputs", "kwargs"}),
        called={"roles": "role"},
    ),
    "audit": Row(
        audit,
        {"model": net(16), "base": net(8)},
        {
            **{name: MUP_INIT[name] for name in ("model", "base")},
            "measure": FLAGS,
            "widths": (*SOME_WIDTHS[1:], (16, 32)),
        },
        free=frozenset({"inputs", "kwargs"}),
    ),
    "residual_branch": Row(mujax.residual_branch, {"y": jnp.ones(2)}, {"y": TREES}),
    "Functional": Row(
        mujax.Functional,
        {"init": stop, "apply": stop},
        {"init": (None, 3, "text", THING), "apply": (None, 3, "text", THING)},
    ),
    "interpolate": Row(
        mujax.interpolate,
        {"a": "sp", "b": "mup", "t": 0.5},
        {"a": MUP_INIT["parametrization"], "b": MUP_INIT["parametrization"], "t": (-0.1, 1.1, *NUMBERS)},
        {"t": (0, 1, np.float32(0.5)), "a": (SPEC.parametrization,)},
    ),
    "Parametrization": Row(
        mujax.Parametrization,
        {"weights": (("mup", 1.0),)},
        {
            "weights": (None, "mup", 3, ("mup",), ((1.0, "mup"),), (("mup", "a"),), THING),
            "depth_alpha": (NAN, "a", [], THING),
        },
    ),
    "ParamSpec": Row(
        mujax.ParamSpec,
        {"shape": (4, 2), "base_shape": (2, 2), "fan_in": (0,), "fan_out": (1,), "infinite": (0,)},
        {
            "shape": (None, 3, "ab", (1.5, 2), (-4, 2), (4,), THING),
            "base_shape": (None, 3, "ab", (1.5, 2), (-2, 2), (2,), THING),
            **dict.fromkeys(("fan_in", "fan_out", "stack", "infinite"), (None, 3, "a", (7,), (0.5,), THING)),
            "layers": (None, 3, "a", (7,), (0.5,), THING),
            "tied": FLAGS,
            "depth": POSITIVES,
        },
    ),
    "MupSpec": Row(
        mujax.MupSpec,
        {"params": dict(SPEC), "parametrization": SPEC.parametrization},
        {
            "params": (None, 3, [1], {"a": 3}, {3: SPEC["layers_0/kernel"]}, THING),
            "parametrization": (None, "mup", 3, THING),
        },
    ),
    "MupSpec.match": Row(
        SPEC.match,
        {"tree": ZEROS},
        {
            "tree": ("text", 3, {}, {"a": X}, [X], THING),
            "values": ("text", 3, {"a": 1}, {3: 4}, THING),
            "what": TEXTS,
        },
    ),
    "MupSpec.require_roles": Row(SPEC.require_roles, {"option": "x"}, {}, free=frozenset({"option"})),
    "MupSpec.save": Row(
        SPEC.save,
        {"path": "/dev/null"},
        {"path": (*PATHS, "/no/such/folder/file")},
        called={"path": "a file"},
    ),
    "MupSpec.load": Row(
        mujax.MupSpec.load, {"path": "/dev/null"}, LOAD, ends=mujax.MujaxError, called={"path": "spec file"}
    ),
    "MupSpec.from_json": Row(
        mujax.MupSpec.from_json,
        {"text": SPEC.to_json()},
        {"text": (None, 3, "", "{}", b"\xff", [], THING)},
        called={"text": "spec file"},
    ),
    "MupModel.init": Row(
        lambda key: jax.eval_shape(lambda: MUP.init(key)),
        {"key": KEY},
        {"key": KEYS},
        {"key": ({"params": KEY}, jax.random.PRNGKey(0))},
        frozenset({"inputs", "kwargs"}),
    ),
    "MupModel.init of NNX": Row(
        lambda key: nnx.eval_shape(lambda: NNX_MUP.init(key)), {"key": KEY}, {"key": KEYS}, {"key": (0,)}
    ),
    "MupModel.apply": Row(
        lambda variables: jax.eval_shape(lambda: MUP.apply(variables, X)),
        {"variables": {"params": ZEROS}},
        {
            "variables": (
                None,
                "text",
                {},
                {"params": {}},
                {"params": {**ZEROS, "layers_0": {"kernel": "a"}}},
                X,
                THING,
            )
        },
        free=frozenset({"inputs", "kwargs"}),
        called={"variables": "layers_0/kernel"},
    ),
    "MupModel.apply of NNX": Row(
        lambda variables: NNX_MUP.apply(variables, X),
        {"variables": nnx.eval_shape(lambda: NNX_MUP.init(KEY))},
        {"variables": (None, "text", {}, X, nnx.Linear, THING)},
        ends=TypeError,
    ),
    "MupModel.with_multipliers": Row(
        MUP.with_multipliers,
        {"output_mult": 2.0},
        dict.fromkeys(("output_mult", "attention_mult", "input_mult"), ("2", [2.0], NAN, True, X, THING)),
        {"output_mult": (None, 3, jnp.ones(()), np.float32(2))},
    ),
    "MupModel.explain": Row(
        MUP.explain,
        {},
        {"mesh": MESH_SIZES[1:], "rules": RULES},
        {"mesh": (None, MESH, {"fsdp": 2}), "rules": (None, {"*/kernel": PartitionSpec()})},
    ),
    "MupModel.partition": Row(
        MUP.partition,
        {"mesh": {"fsdp": 2}},
        {"mesh": MESH_SIZES, "rules": (*RULES, [("mlp", "fsdp")], {"nothing": PartitionSpec()})},
        {"mesh": (MESH, MESH.abstract_mesh), "rules": (None, {"layers_2/kernel": PartitionSpec("fsdp")})},
    ),
    "MupModel.split": Row(
        MUP.split, {"variables": {"params": ZEROS}}, {"variables": (None, "text", 3, X, THING)}
    ),
    "MupModel.split of NNX": Row(
        NNX_MUP.split,
        {"variables": nnx.eval_shape(lambda: NNX_MUP.init(KEY))},
        {"variables": (None, "text", {}, X, nnx.Linear, THING)},
    ),
    "MupModel.apply_split": Row(
        lambda key=None, **given: jax.eval_shape(lambda: MUP.apply_split(**given, key=key, inputs=X)),
        {"params": ZEROS, "state": {}},
        {
            "params": (None, "text", {}, {**ZEROS, "layers_0": {"kernel": "a"}}, X, THING),
            "state": (None, "text", 3, [], X, THING),
            "key": KEYS[1:],
        },
        {"key": (None, KEY, {"dropout": KEY})},
        frozenset({"inputs", "kwargs"}),
        called={"params": "layers_0/"},
    ),
    "MupModel.apply_split of NNX": Row(
        lambda params, state: NNX_MUP.apply_split(params, state, X),
        dict(zip(("params", "state"), nnx.eval_shape(lambda: NNX_MUP.split(NNX_MUP.init(KEY))), strict=True)),
        dict.fromkeys(("params", "state"), (None, "text", {}, X, THING)),
        ends=TypeError,
    ),
    "Batches": Row(
        mujax.Batches,
        {"data": (), "draw": stop, "fetch": stop},
        {
            "draw": (None, *FUNCTIONS),
            "fetch": (None, *FUNCTIONS),
            "sized": FLAGS,
            "limit": COUNTS_OR_NONE,
            "by_example": FLAGS,
            "about": (3, "text", [1], THING),
        },
        free=frozenset({"data"}),
    ),
    "as_batches": Row(
        train.as_batches,
        {"batches": PAIRS},
        {"batches": BATCHES, "name": TEXTS, "batch": COUNTS, "steps": COUNTS_OR_NONE},
        {"batches": (lambda key, step: stop,), "steps": (None, 2)},
    ),
    "stream": Row(
        train.stream,
        {"batches": PAIRS, "key": KEY, "batch": 4, "steps": 3},
        {**STREAMED, "batches": BATCHES, "steps": (4, *COUNTS)},
        STREAMED_ALSO,
    ),
    "check_batches": Row(train.check_batches, {"batches": PAIRS}, {"batches": BATCHES, "name": TEXTS}),
    "training_run": Row(
        mujax.training_run,
        {"model": stop, "batches": PAIRS, "steps": 3, "width": 8},
        {
            "model": FACTORIES,
            "batches": BATCHES,
            "optimizer": (None, 3, [], optax.adam(1.0), THING),
            "steps": COUNTS,
            "width": COUNTS,
            "base_width": COUNTS_OR_NONE,
            "batch": COUNTS,
            "loss": (None, *FUNCTIONS),
            "valid": BATCHES[1:],
        },
        {"optimizer": ("sgd", lambda hparams, spec: None)},
        frozenset({"mup_kwargs"}),
    ),
    "hyperparameter": Row(train.hyperparameter, {"name": "b1"}, {"name": TEXTS}),
    "transfers": Row(train.transfers, {"name": "b1"}, {"name": TEXTS}),
    "default_loss": Row(
        train.default_loss,
        {"outputs": X, "targets": X},
        {
            "outputs": (None, "text", 3, (X, X), X[:, :1], THING),
            "targets": (None, "text", 3, (X, X), X[0], THING),
        },
    ),
    "init_state": Row(
        train.init_state,
        {"params": ZEROS, "tx": optax.sgd(0.1)},
        {"params": TREES, "tx": TRANSFORMS, "key": KEYS[1:]},
        {"key": (None, KEY)},
        frozenset({"model_state"}),
    ),
    "create_state": Row(
        train.create_state,
        {"mup": MUP, "tx": optax.sgd(0.1)},
        {
            "mup": (*RESULTS, net(8), SPEC),
            "tx": TRANSFORMS,
            "key": KEYS[1:],
            "mesh": MESHES[1:],
            "rules": RULES,
        },
        {"key": (None, KEY), "mesh": (None, MESH)},
    ),
    "train_step": Row(train.train_step, {"loss": stop, "tx": optax.sgd(0.1)}, STEP, STEP_ALSO),
    "train_scan": Row(
        train.train_scan, {"loss": stop, "tx": optax.sgd(0.1)}, {**STEP, "unroll": COUNTS}, STEP_ALSO
    ),
    "model_loss": Row(
        train.model_loss,
        {"mup": MUP},
        {"mup": (*RESULTS, net(8), SPEC), "loss": (None, *FUNCTIONS)},
        {"mup": (NNX_MUP,), "loss": (lambda outputs, targets: 0.0,)},
        frozenset({"kwargs"}),
    ),
    "make_mesh": Row(
        train.make_mesh,
        {"axes": {"data": -1}},
        {
            "axes": (None, "", "data", "data=a", "data=0", {}, {"data": 0}, {"data": 1.5}, {3: 1}, 3, THING),
            "devices": ("cpu", 3, [], [3], iter(jax.devices()), THING),
        },
        {"axes": ("data=-1", {"data": jax.device_count()}), "devices": (None, jax.devices()[:1])},
        called={"axes": "mesh"},
    ),
    "shardings": Row(
        train.shardings,
        {"mup": MUP, "mesh": MESH},
        {
            "mup": (*RESULTS, net(8), SPEC),
            "mesh": MESHES,
            "tree": ("text", {"a": "b"}, THING),
            "rules": RULES,
        },
        {
            "mesh": (MESH.abstract_mesh,),
            "tree": (None, PARAMS, ZEROS, {"step": 3}),
            "rules": (None, {"*": PartitionSpec()}),
        },
    ),
    "batch_sharding": Row(
        train.batch_sharding,
        {"mesh": MESH},
        {"mesh": MESHES, "rules": (*RULES, [("batch", "nothing")]), "leading": PREFETCH},
        {
            "mesh": (MESH.abstract_mesh,),
            "rules": (None, [("batch", "data")], [("batch", None)], [["batch", ["data"]]]),
            "leading": (0, 1),
        },
    ),
    "batch_share": Row(
        train.batch_share, {"mesh": MESH}, {"mesh": MESHES, "rules": (*RULES, [("batch", "nothing")])}
    ),
    "put_batch": Row(
        train.put_batch,
        {"batch": (X, X), "mesh": MESH},
        {
            "batch": (*TREES, 3, [1.0, 2.0]),
            "mesh": MESHES,
            "rules": (*RULES, [("batch", "nothing")]),
            "leading": PREFETCH,
        },
        {"batch": (X, {"a": jnp.ones(2)}), "leading": (1,)},
    ),
    "Checkpoints": Row(
        checkpoints,
        {},
        {"directory": PATHS, "spec": (*RESULTS, {}), "hparams": (*NAMED, {"a": THING}), **CHECKPOINTS},
        {"hparams": (None, {"a": 1}), "every_steps": (None, 3), "every_minutes": (None, 1)},
    ),
    "Study": Row(
        mujax.Study,
        {},
        {
            "name": ("", 3, [], THING),
            "storage": (3, "", [], THING),
            "settings": (None, *NAMED),
            "attributes": (None, *NAMED),
            "heartbeat": POSITIVES,
            "heartbeat_timeout": POSITIVES[:3] + POSITIVES[4:],
            "patience": NOT_NEGATIVES,
        },
        {"storage": ("a.db", None), "name": ("a", None)},
    ),
    "TuneConfig": Row(
        tune_config,
        {},
        TUNED,
        {"loss": (None, lambda a, b: 0, "a:b"), "fixed": ({"b1": 0.5},)},
        frozenset({"valid", "sampler", "pruner", "storage"}),
    ),
    "TransferConfig": Row(
        transfer_fields,
        {},
        {
            "task": ("mnist", 3, None, THING),
            "widths": SOME_WIDTHS,
            "base_width": COUNTS,
            "log2_lrs": RATES,
            "seeds": COUNTS,
            "steps": COUNTS,
            "batch": COUNTS,
            "seed": SEEDS,
            "optimizer": (None, 3, "adamm", [], THING),
            "momentum": (1.0, -0.1, None, "a", NAN, THING),
            "parametrizations": ((), "mup", ("ntk",), (3,), None, 3, THING),
            "text": ("file", 3, "", THING),
            "data": (3, "", THING),
            "batches": (None,),
            "loss": FUNCTIONS[:1] + FUNCTIONS[2:],
            "length": COUNTS,
            "out": (3, "", THING),
        },
        {"out": (None, "folder"), "widths": ([8, 16], np.array([16]))},
    ),
    "tune": Row(
        tune.tune,
        {"config": tune_config()},
        {"config": RESULTS, "progress": FUNCTIONS, "finished": FUNCTIONS, "say": FUNCTIONS},
        ends=Reached,
    ),
    "read_study": Row(
        tune.read_study, {"config": tune_config()}, {"config": RESULTS}, ends=mujax.ConfigError
    ),
    "sweep_widths": Row(
        tune.sweep_widths,
        {"config": transfer_config()},
        {"config": RESULTS[1:], "progress": FUNCTIONS},
        ends=Reached,
    ),
    "transfer": Row(
        mujax.transfer,
        {"config": transfer_config()},
        {
            "config": RESULTS[1:],
            "width": COUNTS_OR_NONE,
            "seeds": COUNTS,
            "steps": COUNTS_OR_NONE,
            "batch": COUNTS_OR_NONE,
            "also": (None, *LISTS),
            "fixed": NAMED,
            "mesh": (3, [], {"data": 1.5}, {3: 1}, THING),
            "accumulate": COUNTS,
            "checkpoints": (3, "", [], THING),
            "progress": FUNCTIONS,
        },
        {
            "mesh": (None, MESH, "data=-1", {"data": -1}),
            "checkpoints": (None, "a", tune.CheckpointRules("a")),
        },
        ends=Reached,
    ),
    "CheckpointRules": Row(
        tune.CheckpointRules,
        {"folder": "a"},
        {"folder": PATHS, **CHECKPOINTS},
        {"every_steps": (None, 3), "every_minutes": (None, 1)},
    ),
    "event_writer": Row(tune.event_writer, {"folder": tempfile.gettempdir()}, {"folder": PATHS}),
    "tensorboard_writer": Row(tune.tensorboard_writer, {"folder": tempfile.gettempdir()}, {"folder": PATHS}),
    "sweep": Row(
        mujax.sweep,
        {"run": stop, "space": {"x": [0.0, 1.0]}, "trials": 2},
        {
            "run": (None, *FUNCTIONS),
            "space": (None, {}, "text", 3, {"x": []}, {"x": 3}, {"x": THING}, THING),
            "trials": COUNTS,
            "seeds": COUNTS,
            "seed": SEEDS,
            "fixed": ({"x": 1.0}, *NAMED),
            "objective": TEXTS,
            "study": ("", 3, [], THING),
            "rungs": COUNTS,
            "mode": ("fast", 3, THING),
            "lanes": COUNTS_OR_NONE,
            "progress": FUNCTIONS,
            "finished": FUNCTIONS,
            "say": FUNCTIONS,
        },
        {"seeds": (3, np.int32(1)), "fixed": ({"y": 1.0},)},
        frozenset({"old", "storage", "sampler", "pruner"}),
        Reached,
        {"space": "x: "},
    ),
    "front": Row(
        tune.front,
        {"losses": [0.5, None], "flops": [1.0, 2.0]},
        {
            "losses": (None, [], "ab", 3, [NAN], ["a"], [0.5], [None, None]),
            "flops": (None, [], "ab", 3, [NAN], [-1.0, 2.0], [1.0]),
            "quality": ([], "ab", 3, [0.5]),
            "resamples": COUNTS,
            "seed": SEEDS,
        },
        called={"losses": "front"},
    ),
    "optimizer": Row(
        optim.optimizer,
        {"name": "adamw"},
        {"name": ("adamm", None, 3, [], THING)},
        called={"name": "optimizer"},
    ),
    "load": Row(data.load, {"path": "/dev/null"}, LOAD, ends=mujax.DataError),
    "fashion_mnist": Row(
        data.fashion_mnist, {"folder": "/dev/null"}, {"folder": LOAD["path"][1:]}, ends=mujax.DataError
    ),
    "text": Row(data.text, {"path": "/dev/null"}, {"path": LOAD["path"][1:]}, ends=mujax.DataError),
    "digest": Row(data.digest, {"arrays": ZEROS}, {"arrays": TREES}),
    "token_file": Row(
        data.token_file,
        {"path": "/dev/null"},
        {
            "path": (*PATHS, "no/such/file"),
            "vocab_size": COUNTS_OR_NONE,
            "dtype": (None, "float32", "text", 3, [], THING),
        },
        ends=mujax.DataError,
        called={"path": "no/such/file"},
    ),
    "is_grain": Row(data.is_grain, {"dataset": 3}, {}, free=frozenset({"dataset"})),
    "grain_stream": Row(
        data.grain_stream,
        {"dataset": grain.MapDataset.range(4), "batch": 2},
        {
            **{name: values for name, values in STREAMED.items() if name != "key"},
            "dataset": (None, "text", 3, [1, 2], X, THING),
        },
        STREAMED_ALSO,
    ),
    "image_stream": Row(
        data.image_stream,
        {"examples": data.Examples(X, X), "key": KEY, "batch": 2},
        {**STREAMED, "examples": (None, (X, X), X, THING), "batch": (5, *COUNTS)},
        STREAMED_ALSO,
    ),
    "text_stream": Row(
        data.text_stream,
        {"tokens": np.arange(9), "key": KEY, "batch": 2, "length": 3},
        {
            **STREAMED,
            "tokens": (None, "text", X, [1], THING),
            "length": COUNTS,
            "vocab_size": COUNTS_OR_NONE,
        },
        STREAMED_ALSO,
    ),
    "mapped_text": Row(
        train.mapped_text,
        {"tokens": np.arange(9), "length": 3},
        {"tokens": (None, "text", X, [1], THING), "length": COUNTS},
    ),
    "batch_indices": Row(
        data.batch_indices,
        {"key": KEY, "n": 4, "batch": 2, "steps": 1},
        {"key": KEYS, "n": COUNTS, "batch": (5, *COUNTS), "steps": COUNTS},
    ),
    "image_batches": Row(
        data.image_batches,
        {"examples": data.Examples(X, X), "key": KEY, "batch": 2, "steps": 1},
        {"examples": (None, (X, X), X, THING), "key": KEYS, "batch": (5, *COUNTS), "steps": COUNTS},
    ),
    "text_starts": Row(
        data.text_starts,
        {"n": 9, "key": KEY, "batch": 2, "length": 3, "steps": 1},
        {"n": COUNTS, "key": KEYS, "batch": COUNTS, "length": COUNTS, "steps": COUNTS},
    ),
    "text_window": Row(
        data.text_window,
        {"tokens": np.arange(9), "starts": np.arange(2), "length": 3},
        {"tokens": (None, "text", X, [1], THING), "starts": (None, 3, X, "a", THING), "length": COUNTS},
    ),
    "text_batches": Row(
        data.text_batches,
        {"tokens": np.arange(9), "key": KEY, "batch": 2, "length": 3, "steps": 1},
        {
            "tokens": (None, "text", X, [1], THING),
            "key": KEYS,
            "batch": COUNTS,
            "length": COUNTS,
            "steps": COUNTS,
        },
    ),
    "text_windows": Row(
        data.text_windows,
        {"tokens": np.arange(9), "length": 3},
        {"tokens": (None, "text", X, [1], THING), "length": COUNTS, "limit": COUNTS_OR_NONE},
    ),
    "plot_coord_check": Row(
        plot.plot_coord_check,
        {"reports": [reader(mujax.CoordCheck)], "path": "a.png"},
        {
            "reports": (None, [], [3], THING),
            "path": PATHS,
            "title": TEXTS,
            "learning_rate": ("a", -1.0, [], THING),
        },
        ends=Reached,
    ),
    "coord_check_figure": Row(
        plot.coord_check_figure,
        {"reports": [reader(mujax.CoordCheck)]},
        {"reports": (None, [], [3], THING), "title": TEXTS, "learning_rate": ("a", -1.0, [], THING)},
        ends=Reached,
    ),
    "plot_sweep": Row(
        plot.plot_sweep,
        {"sweep": reader(mujax.Sweep), "path": "a.png"},
        {"sweep": RESULTS, "path": PATHS, "title": TEXTS, "space": NAMED},
        ends=Reached,
    ),
    "sweep_figure": Row(
        plot.sweep_figure,
        {"sweep": reader(mujax.Sweep)},
        {"sweep": RESULTS, "title": TEXTS, "space": NAMED},
        ends=Reached,
    ),
    "plot_transfer": Row(
        plot.plot_transfer,
        {"report": reader(tune.Report), "path": "a.png"},
        {"report": RESULTS, "path": PATHS},
        ends=Reached,
    ),
    "transfer_figure": Row(
        plot.transfer_figure, {"report": reader(tune.Report)}, {"report": RESULTS}, ends=Reached
    ),
    "plot_transfer_run": Row(
        plot.plot_transfer_run,
        {"transferred": reader(mujax.Transferred), "path": "a.png"},
        {"transferred": RESULTS, "path": PATHS},
        ends=Reached,
    ),
    "transfer_run_figure": Row(
        plot.transfer_run_figure,
        {"transferred": reader(mujax.Transferred)},
        {"transferred": RESULTS},
        ends=Reached,
    ),
}


# ---- optimizers: by their signatures --------------------------------------------------------------------

NO_OPTIMIZERS_ARGUMENT = (THING, "no such thing", [THING], b"bytes")
VALID_OF = {
    "tx": optax.scale_by_lion(),
    "max_norm": 1.0,
    "gradients": ZEROS,
    "learning_rate": 0.1,
    "spec": SPEC,
}


def of_signature(name: str) -> Row:
    """Wrong values by default: what no argument may be, and what is no number, flag, or count of this one."""
    make = getattr(mujax, name)
    parameters = inspect.signature(make).parameters
    wrong: dict[str, tuple[Any, ...]] = {}
    for each in parameters.values():
        values = NO_OPTIMIZERS_ARGUMENT
        if isinstance(each.default, bool) and "mask" not in each.name:
            values += FLAGS
        elif isinstance(each.default, float) or each.name == "learning_rate":
            values += (NAN, True, [1.0], np.ones(3), {})
        if each.name.startswith(("eps", "min_", "weight_decay", "b1", "b2")) and "mask" not in each.name:
            values += (-1.0,)
        if each.name in ("b1", "b2"):
            values += (1.5,)
        if each.name == "spec":
            values = (None, "text", {}, 0.1, THING)
        if each.name == "lr_mults":
            values += ({"hidden": -1.0}, {"hidden": "a"}, {"hiden": 1.0}, {3: 1.0}, {"hidden": NAN})
        if each.name == "decay_roles":
            values += (3, (3,), ("hiden",))
        wrong[each.name] = values
    valid = {key: value for key, value in VALID_OF.items() if key in parameters}
    if name == "mup_wrap":
        valid["family"] = "adam"
    elif name == "mup_add_decayed_weights":
        # Read for one mode of decay each.
        wrong["family"] = wrong["family"][1:2]
    schedules = () if re.search("rprop|sm3|optimistic_adam$", name) else (optax.constant_schedule(0.1),)
    also = (
        {"learning_rate": (jnp.float32(0.1), np.float32(0.1), 1, *schedules)}
        if "learning_rate" in valid
        else {}
    )
    return Row(make, valid, wrong, also)


OPTIMS = [name for name in dir(mujax) if name.startswith("mup_") and name != "mup_init"]
ROWS |= {name: of_signature(name) for name in OPTIMS}


# ---- the tests ------------------------------------------------------------------------------------------


def outcome(row: Row, **given: Any) -> BaseException | None:
    try:
        row.call(**{**row.valid, **given})
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return error
    return None


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.filterwarnings("ignore:.*optimistic_adam", "ignore:Specifying a key")
def test_wrong_arguments_are_one_error_that_names_them(name):
    row = ROWS[name]
    silent = []
    for parameter, values in row.wrong.items():
        for value in values:
            error = outcome(row, **{parameter: value})
            text = str(error)
            named = parameter in text or row.called.get(parameter, parameter) in text
            if not isinstance(error, mujax.MujaxError) or not named or "\n" in text:
                silent.append(f"{parameter}={shown(value)}: {type(error).__name__}: {text[:200]}")
    assert silent == []


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.filterwarnings("ignore:.*optimistic_adam", "ignore:Specifying a key")
def test_valid_arguments_are_accepted(name):
    row = ROWS[name]
    for given in ({}, *({parameter: value} for parameter, values in row.also.items() for value in values)):
        error = outcome(row, **given)
        ends = type(None) if row.ends is None else row.ends
        assert isinstance(error, ends), (given, error)


# What mujax returns, and errors: users do not make them.
MADE_BY_MUJAX = {
    "CoordCheck",
    "TransferCheck",
    "WiderIsBetter",
    "Correction",
    "Finding",
    "MupModel",
    "Sweep",
    "Transferred",
    "CheckProgress",
    "TapReport",
    "Drift",
    "Regret",
    "Finished",
    "Progress",
    "Run",
    "RunsFile",
    "StoredRuns",
    "Panel",
    "CompiledRuns",
    "FunctionJob",
    "Job",
    "Losses",
    "Training",
    "JittedStep",
    "Loss",
    "TrainState",
    "ExampleData",
    "Examples",
    "TextData",
    "Front",
    "SweepProgress",
    "Trial",
    "TargetProgress",
    "TargetRun",
    "Report",
    "TransferredVsTuned",
    "Saved",
    "Speed",
    "Stream",
}

# What packages lend each other; their arguments are checked by the functions above.
BETWEEN_PACKAGES = {
    "made_up",
    "measure",
    "prepare",
    "report",
    "passes_clearly",
    "respond_at_ends",
    "best_index",
    "fitted_optimum",
    "mean",
    "never_worse",
    "standard_error",
    "judge_runs",
    "judge_widths",
    "of_rate",
    "train_runs",
    "effort",
    "steps_in_python",
    "as_its_kind",
    "refuse_untransferable",
    "run_lanes",
    "run_one",
    "threads",
    "as_inputs",
    "tail",
    "number",
    "study_module",
    "build",
    "disagreements",
    "made_up_inputs",
    "imported",
    "summary_of",
    "parametrization_title",
    "animate",
    "curves_figure",
    "growth_figure",
    "panels_figure",
    "mnist",
    "refused",
}

DOORS = [
    importlib.import_module(f"mujax{name}")
    for name in ("", ".check", ".train", ".tune", ".data", ".optim", ".plot", ".testing")
]


def public(module: types.ModuleType) -> dict[str, Any]:
    found = {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and callable(value)
        and getattr(value, "__module__", "").startswith("mujax")
        if not (isinstance(value, type) and issubclass(value, Exception))
    }
    methods = {
        f"{owner}.{name}": value
        for owner in found.keys() & {"MupSpec", "MupModel"}
        for name, value in vars(found[owner]).items()
        if not name.startswith("_") and isinstance(value, types.FunctionType | classmethod)
        if len(inspect.signature(getattr(found[owner], name)).parameters)
        > isinstance(value, types.FunctionType)
    }
    return {**{name: value for name, value in found.items() if name not in MADE_BY_MUJAX}, **methods}


def missing(module: types.ModuleType) -> list[str]:
    """Public functions without a row, and parameters without wrong values."""
    absent = []
    for name, value in public(module).items():
        if name in BETWEEN_PACKAGES:
            continue
        if name not in ROWS:
            absent.append(name)
            continue
        known = {*ROWS[name].wrong, *ROWS[name].free, "self", "cls"}
        signature = inspect.signature(value.__func__ if isinstance(value, classmethod) else value)
        absent += [f"{name}({parameter})" for parameter in signature.parameters if parameter not in known]
    return absent


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_every_public_function_has_a_row(door):
    assert public(door)
    assert missing(door) == []


def test_a_new_function_without_a_row_is_found():
    def fresh(width: int) -> None: ...

    def interpolate(a: str, b: str, t: float, how: str) -> None: ...

    module = types.ModuleType("made_up")
    for function in (fresh, interpolate):
        function.__module__ = "mujax.made_up"
        vars(module)[function.__name__] = function
    assert missing(module) == ["fresh", "interpolate(how)"]


# ---- the mechanism --------------------------------------------------------------------------------------


def test_the_sentence_has_name_expectation_value_and_remedy():
    with pytest.raises(mujax.ConfigError) as caught:
        check_arguments({"seeds": COUNT | NONE}, {"seeds": 1.5})
    assert str(caught.value) == (
        "seeds: expected a whole number of at least 1 or None, got 1.5; pass seeds=4."
    )


def test_a_missing_argument_is_pythons_own_error():
    with pytest.raises(TypeError, match=r"wider_is_better\(\) missing .* 'learning_rate'"):
        mujax.wider_is_better(stop, (8, 16), PAIRS)


def test_traced_values_pass_and_are_not_read():
    @takes(rate=SCALAR)
    def double(rate):
        return 2 * rate

    assert jax.eval_shape(double, 1.0).shape == ()
    assert jax.eval_shape(jax.vmap(double), jnp.ones(3)).shape == (3,)
    with pytest.raises(mujax.ConfigError, match=r"rate: .* got an array of shape \(3,\) and dtype float32"):
        jax.eval_shape(double, jnp.ones(3))

    def step(rate, mult):
        tx = mujax.mup_adamw(rate, SPEC, eps=rate, weight_decay=rate, lr_mults={"hidden": mult})
        return tx.update(ZEROS, tx.init(ZEROS), ZEROS)[0]

    assert jax.tree.structure(jax.eval_shape(step, 0.1, 2.0)) == jax.tree.structure(ZEROS)


def test_a_bug_in_a_kind_is_not_taken_for_a_wrong_value():
    kind = Kind("anything", lambda value: undefined, "1")  # noqa: F821  # pyright: ignore[reportUndefinedVariable]
    with pytest.raises(NameError):
        kind.accepts(1)


def test_a_sequence_that_can_be_read_only_once_is_refused_and_not_read():
    once = iter((8, 16))
    assert not WIDTHS.accepts(once)
    assert list(once) == [8, 16]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "None"),
        (nn.Dense, "the class Dense"),
        (nn.Dense(3), "an instance of Dense"),
        (net, "the function net"),
        (X, "an array of shape (4, 3) and dtype float32"),
        ([1, 2], "[1, 2]"),
        (PAIRS, "a list of 3"),
        (optax.adam(1.0), "an instance of GradientTransformationExtraArgs"),
    ],
)
def test_how_values_are_shown(value, text):
    assert shown(value) == text
