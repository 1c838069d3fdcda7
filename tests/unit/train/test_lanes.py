"""Many runs at once: the same numbers in every mode, what is dropped costs nothing, memory and devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from trials import Decay

from mujax.errors import ConfigError
from mujax.train import _lanes as lanes
from mujax.train._lanes import MODES, CompiledRuns, FunctionJob, OutOfMemoryError, run_lanes, run_one

KEYS = jax.random.split(jax.random.key(0), 5)
RATES = {"rate": np.array([0.5, 0.25, 0.125, 1.0, 0.75])}


def expected(rate: float, key: Any, steps: int = 8) -> float:
    return float(np.abs(np.asarray(jax.random.normal(key, (3,))) * rate**steps).sum())


@pytest.mark.parametrize("in_loop", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_same_numbers(mode, in_loop):
    group = CompiledRuns(Decay(in_loop=in_loop), {}, mode=mode)
    found = run_lanes(group, RATES, KEYS, rungs=[3, 5])
    for rate, key, metrics in zip(RATES["rate"], KEYS, found, strict=True):
        assert metrics["loss"] == pytest.approx(expected(rate, key), rel=1e-6)
        assert metrics["at"] == 8
        assert metrics["vector"].shape == (3,)
    assert group.last_mode == mode


def test_a_wrong_rate_would_be_seen():
    (found, *_) = run_lanes(CompiledRuns(Decay(), {}, mode="map"), RATES, KEYS)
    assert found["loss"] != pytest.approx(expected(0.49, KEYS[0]), rel=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_dropped_at_a_rung_costs_nothing_from_there(mode):
    job = Decay()
    calls = []

    def watch(steps, metrics):
        calls.append((steps, sorted(metrics)))
        return [0, 3, 4] if steps == 2 else []

    found = run_lanes(CompiledRuns(job, {}, mode=mode), RATES, KEYS, rungs=[2, 4], watch=watch)
    jax.effects_barrier()
    assert calls == [(2, [0, 1, 2, 3, 4]), (4, [1, 2]), (8, [1, 2])]
    assert [metrics["at"] for metrics in found] == [2, 8, 8, 2, 2]
    assert ["vector" in metrics for metrics in found] == [False, True, True, False, False]
    # Dead lanes took two steps; a vmapped program of 5 places shrinks to one of 2.
    dead = [rate for rate in job.seen if rate in (0.5, 1.0, 0.75)]
    assert len(dead) == 3 * 2
    assert job.seen.count(0.25) == job.seen.count(0.125) == 8


LOSSES = {
    stop: [expected(rate, key, stop) for rate, key in zip(RATES["rate"], KEYS, strict=True)]
    for stop in (2, 4, 6, 8)
}


@pytest.mark.parametrize(
    ("lost", "seconds", "calls"),
    [(True, 60.0, 2), (True, 0.0, 4), (False, 60.0, 4)],
    ids=["short", "long", "looked at"],
)
@pytest.mark.parametrize("mode", MODES)
def test_short_runs_go_on_from_the_second_rung_until_they_are_lost(mode, lost, seconds, calls, monkeypatch):
    monkeypatch.setattr(lanes, "_CALL_SECONDS", seconds)
    # Lane 2 falls below this at the second rung, lane 1 at the third.
    bar = 0.003
    assert [[lane for lane in range(5) if LOSSES[stop][lane] < bar] for stop in (2, 4, 6)] == [
        [],
        [2],
        [1, 2],
    ]
    job, seen, advanced = Decay(), {}, []

    def watch(stop, metrics):
        for lane, found in metrics.items():
            assert float(found["loss"]) == pytest.approx(LOSSES[stop][lane], rel=1e-6)
        seen[stop] = set(metrics)
        return [lane for lane, found in metrics.items() if found["loss"] < bar] if stop < 8 else []

    group = CompiledRuns(job, {}, mode=mode, lost=(lambda metrics: metrics["loss"] < bar) if lost else None)
    kind = lanes._Looped if mode == "loop" else lanes._Stacked
    advance = kind.advance
    monkeypatch.setattr(
        kind, "advance", lambda self, counts: advanced.append(counts) or advance(self, counts)
    )
    found = run_lanes(group, RATES, KEYS, rungs=[2, 4, 6], watch=watch)
    jax.effects_barrier()
    assert len(advanced) == calls
    assert seen == {2: {0, 1, 2, 3, 4}, 4: {0, 1, 2, 3, 4}, 6: {0, 1, 3, 4}, 8: {0, 3, 4}}
    ends = {2: 4, 1: 6}
    assert [metrics["at"] for metrics in found] == [ends.get(lane, 8) for lane in range(5)]
    if mode != "vmap":
        # What is lost costs nothing from there.
        assert [job.seen.count(rate) for rate in RATES["rate"]] == [ends.get(lane, 8) for lane in range(5)]


@pytest.mark.parametrize("mode", MODES)
def test_a_lost_run_ends_though_nobody_drops_it(mode, monkeypatch):
    monkeypatch.setattr(lanes, "_CALL_SECONDS", 60.0)
    group = CompiledRuns(Decay(), {}, mode=mode, lost=lambda metrics: metrics["at"] >= 4)
    found = run_lanes(group, RATES, KEYS, rungs=[2, 4, 6])
    assert [metrics["at"] for metrics in found] == [4] * 5
    assert not any("vector" in metrics for metrics in found)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_runs_when_all_are_dropped(mode):
    job = Decay()
    found = run_lanes(CompiledRuns(job, {}, mode=mode), RATES, KEYS, rungs=[1], watch=lambda _, __: range(5))
    jax.effects_barrier()
    assert [metrics["at"] for metrics in found] == [1] * 5
    assert len(job.seen) == 5


def test_static_hyperparameters_are_python_values():
    seen = []

    def run(hparams, key):
        seen.append((type(hparams["depth"]), isinstance(hparams["rate"], jax.Array)))
        return {"loss": hparams["rate"] * hparams["depth"] + 0 * jax.random.uniform(key)}

    found = run_lanes(CompiledRuns(FunctionJob(run), {"depth": 3}, mode="vmap"), RATES, KEYS)
    assert [float(metrics["loss"]) for metrics in found] == [1.5, 0.75, 0.375, 3.0, 2.25]
    assert set(seen) == {(int, True)}


def test_a_run_that_returns_no_mapping_is_refused():
    with pytest.raises(
        ConfigError, match=r"run: expected it to return a mapping of metrics .*, got .*Tracer"
    ):
        run_lanes(
            CompiledRuns(FunctionJob(lambda hparams, key: hparams["rate"]), {}, mode="loop"), RATES, KEYS
        )


# ---- memory ----------------------------------------------------------------------------------------------


def limited(monkeypatch, most):
    """As if no more than so many lanes fitted: a stacked program has its lanes in its first argument."""
    tried = []

    def check(program, device, at_once):
        (shape, *_) = [leaf.shape for leaf in jax.tree.leaves(program.in_avals) if leaf.ndim] or [(1,)]
        tried.append(shape[0])
        if shape[0] > most:
            raise OutOfMemoryError("as if")

    monkeypatch.setattr(lanes, "_check_fits", check)
    return tried


@pytest.mark.parametrize("mode", ["map", "vmap"])
def test_a_batch_that_does_not_fit_is_halved(mode, monkeypatch):
    tried = limited(monkeypatch, 2)
    seen = []

    def watch(steps, metrics):
        seen.extend(sorted(metrics))
        return ()

    found = run_lanes(CompiledRuns(Decay(), {}, mode=mode), RATES, KEYS, watch=watch)
    assert [float(metrics["loss"]) for metrics in found] == pytest.approx(
        [expected(rate, key) for rate, key in zip(RATES["rate"], KEYS, strict=True)], rel=1e-6
    )
    assert max(tried) == 5
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_a_single_lane_that_does_not_fit_is_one_sentence(monkeypatch):
    limited(monkeypatch, 0)
    with pytest.raises(
        OutOfMemoryError, match=r"^a run with \{'length': 4\} does not fit into memory: as if; take a smaller"
    ):
        run_lanes(CompiledRuns(Decay(), {"length": 4}, mode="map"), RATES, KEYS)


def test_what_xla_says_of_memory_is_understood(monkeypatch):
    group, most = CompiledRuns(Decay(), {}, mode="vmap"), 4
    plain = lanes._Program.prepare

    def prepare(self, *args, **options):
        compiled = plain(self, *args, **options)

        def call(*args):
            if jax.tree.leaves(args)[0].shape[0] > most:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")
            return compiled(*args)

        return call

    monkeypatch.setattr(lanes._Program, "prepare", prepare)
    assert len(run_lanes(group, RATES, KEYS)) == 5
    most = 0
    with pytest.raises(OutOfMemoryError, match="RESOURCE_EXHAUSTED"):
        run_lanes(group, RATES, KEYS)


def test_other_errors_are_passed_on(monkeypatch):
    def prepare(self, *args, **_):
        def call(*args):
            raise jax.errors.JaxRuntimeError("INTERNAL: something else")

        return call

    monkeypatch.setattr(lanes._Program, "prepare", prepare)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        run_lanes(CompiledRuns(Decay(), {}, mode="vmap"), RATES, KEYS)


def test_the_programs_own_estimate_is_held_against_what_is_free(monkeypatch):
    def run(hparams, key):
        return {"loss": hparams["rate"], "large": jax.random.normal(key, (1000,))}

    assert lanes.free_memory(jax.devices()[0]) > 1e6
    for free, fits in ((100_000, True), (1000, False), (None, True)):
        monkeypatch.setattr(lanes, "free_memory", lambda device, free=free: free)
        group = CompiledRuns(FunctionJob(run), {}, mode="vmap")
        if fits:
            assert len(run_lanes(group, RATES, KEYS)) == 5
        else:
            with pytest.raises(OutOfMemoryError, match=r"GB are needed and 0\.0 GB are free"):
                run_lanes(group, RATES, KEYS)


# ---- which mode ------------------------------------------------------------------------------------------


def test_each_mode_is_measured_once_where_it_may_gain_more_than_it_costs():
    group = CompiledRuns(Decay(), {}, devices=jax.devices()[:1])
    assert group.modes == ("loop", "map", "vmap")
    assert group.choose(100) == "loop"
    run_lanes(group, RATES, KEYS)
    assert set(group.seconds_per_step) == {"loop"}
    # A few steps are not worth a compilation.
    assert group.choose(40) == "loop"
    worth = int(1e3 * group.compile_seconds / group.seconds_per_step["loop"])
    tried = []
    for _ in range(4):
        run_lanes(group, RATES, KEYS, left=worth * 100)
        tried.append(group.last_mode)
    fastest = min(group.seconds_per_step, key=group.seconds_per_step.get)
    assert tried == ["map", "vmap", fastest, fastest]


def test_an_accelerator_is_given_all_lanes_at_once():
    class Chip:
        platform = "tpu"

    assert CompiledRuns(Decay(), {}, devices=[Chip()]).modes == ("vmap",)
    assert CompiledRuns(Decay(), {}, mode="loop", devices=[Chip()]).modes == ("loop",)


def test_operations_are_those_of_a_step(monkeypatch):
    # A GPU's products are calls of a library, whose operations XLA does not count.
    monkeypatch.setattr(jax.stages.Compiled, "cost_analysis", lambda _: {"flops": 1.0})

    def flops(mode, length):
        group = CompiledRuns(Decay(length=length), {}, mode=mode)
        run_lanes(group, RATES, KEYS)
        return group.flops

    loop = flops("loop", 8)
    assert loop > 8
    assert flops("loop", 16) == 2 * loop
    for mode in ("map", "vmap"):
        assert flops(mode, 8) == pytest.approx(loop, rel=0.5)
    whole = CompiledRuns(FunctionJob(lambda hparams, key: {"loss": hparams["rate"]}), {}, mode="loop")
    run_lanes(whole, RATES, KEYS)
    assert whole.flops is None


def test_one_run_keeps_its_state_and_can_be_ended():
    group = CompiledRuns(Decay(), {}, mode="loop")
    state, metrics = run_one(group, {"rate": 0.5}, KEYS[0], rungs=[2])
    assert (int(state["at"]), float(metrics["loss"])) == (8, pytest.approx(expected(0.5, KEYS[0]), rel=1e-6))
    np.testing.assert_array_equal(metrics["vector"], state["x"])
    state, metrics = run_one(group, {"rate": 0.5}, KEYS[0], rungs=[2], watch=lambda steps, _: False)
    assert int(state["at"]) == 2
    assert "vector" not in metrics


# ---- devices ---------------------------------------------------------------------------------------------

_SPLIT = """
import sys, json
sys.path[:0] = ["tests/unit", "tests/unit/train"]
import jax, numpy as np
from test_lanes import *
found = {}
for mode in ("map", "vmap"):
    group = CompiledRuns(Decay(), {}, mode=mode)
    dropped = run_lanes(group, RATES, KEYS, rungs=[2], watch=lambda steps, _: [1] if steps == 2 else [])
    whole = run_lanes(group, RATES, KEYS)
    shards = {shard.device.id for shard in jax.tree.leaves(lanes._Stacked(group, mode, RATES, KEYS)._state)[0]
              .addressable_shards}
    found[mode] = [[float(m["loss"]) for m in whole], [int(m["at"]) for m in dropped], len(shards)]
print(json.dumps([len(jax.devices()), CompiledRuns(Decay(), {}).modes, found]))
"""


def test_lanes_are_split_over_all_devices(pytestconfig):
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", _SPLIT],
        env={**os.environ, **environment},
        cwd=pytestconfig.rootpath,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    devices, modes, found = json.loads(done.stdout)
    assert (devices, modes) == (8, ["map", "vmap"])
    for losses, ended, shards in found.values():
        assert losses == pytest.approx(
            [expected(rate, key) for rate, key in zip(RATES["rate"], KEYS, strict=True)], rel=1e-6
        )
        assert ended == [8, 2, 8, 8, 8]
        assert shards == 8
