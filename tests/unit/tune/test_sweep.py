"""Sweeps: what is run, in how many programs, what is stored, and what happens when something goes wrong."""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optuna
import pytest
from trials import Decay

import mujax
from mujax.errors import ConfigError, MujaxError
from mujax.tune._results import Sweep, Trial
from mujax.tune._sweep import Study, sweep

RANGE = {"x": {"low": 0.0, "high": 4.0}}


def bowl(hparams, key):
    """Lowest at x = 1, with the seed's own noise."""
    return {"loss": (hparams["x"] - 1) ** 2 + 0.01 * jax.random.normal(key), "other": -hparams["x"]}


def test_a_grid_is_run_cell_by_cell_and_its_best_found():
    found = sweep(bowl, {"x": [0.0, 1.0, 2.0], "y": [1.0, 2.0]}, trials=10, sampler="grid")
    assert [trial.hparams for trial in found.trials] == [
        {"x": x, "y": y} for x in (0.0, 1.0, 2.0) for y in (1.0, 2.0)
    ]
    assert found.best is not None
    assert found.best.hparams["x"] == 1.0
    assert "Best: trial" in str(found)
    assert sum(found.modes.values()) == 6


def test_the_objective_is_the_mean_over_seeds():
    found = sweep(bowl, {"x": [3.0]}, trials=1, seeds=3, seed=5, sampler="grid")
    noise = [0.01 * float(jax.random.normal(jax.random.key(seed))) for seed in (5, 6, 7)]
    assert found.trials[0].loss == pytest.approx(4 + np.mean(noise), rel=1e-6)
    assert found.trials[0].loss != pytest.approx(4 + noise[0], rel=1e-6)
    other = sweep(bowl, {"x": [1.0, 3.0]}, trials=2, objective="other", sampler="grid")
    assert other.best is not None
    assert other.best.hparams == {"x": 3.0}


def test_the_random_search_is_the_same_in_batches_of_any_size():
    one, other = (sweep(bowl, RANGE, trials=6, lanes=lanes) for lanes in (2, 16))
    assert [trial.hparams for trial in one.trials] == [trial.hparams for trial in other.trials]
    assert len({trial.hparams["x"] for trial in one.trials}) == 6
    again = sweep(bowl, RANGE, trials=6, seed=1)
    assert not {trial.hparams["x"] for trial in again.trials} & {trial.hparams["x"] for trial in one.trials}


@pytest.mark.parametrize("mode", ["loop", "map", "vmap"])
def test_modes_give_the_same_trials(mode):
    plain = sweep(bowl, RANGE, trials=5, seeds=2, mode="loop")
    found = sweep(bowl, RANGE, trials=5, seeds=2, mode=mode)
    assert found.modes == {mode: 5}
    assert [trial.loss for trial in found.trials] == pytest.approx(
        [trial.loss for trial in plain.trials], rel=1e-5
    )


def test_what_is_not_a_float_is_compiled_once_for_each_combination():
    traced = []

    def run(hparams, key):
        traced.append((hparams["layers"], hparams["act"]))
        assert isinstance(hparams["x"], jax.Array)
        return {"loss": hparams["x"] * hparams["layers"] + len(hparams["act"]) + 0 * jax.random.uniform(key)}

    space = {"x": [1.0, 2.0, 3.0], "layers": [1, 2], "act": ["relu", "gelu"]}
    found = sweep(run, space, trials=12, sampler="grid", mode="map", fixed={"z": 1.0})
    assert len(found.trials) == 12
    assert set(traced) == {(layers, act) for layers in (1, 2) for act in ("relu", "gelu")}
    for trial in found.trials:
        assert trial.loss == trial.hparams["x"] * trial.hparams["layers"] + 4


# ---- divergence and pruning ------------------------------------------------------------------------------


@contextlib.contextmanager
def stored_study(file: pathlib.Path) -> Iterator[optuna.Study]:
    """The study in a database, which is closed afterwards: Python 3.13 warns of one that is not."""
    storage = optuna.storages.RDBStorage(f"sqlite:///{file}")
    try:
        yield optuna.load_study(study_name="s", storage=storage)
    finally:
        storage.remove_session()
        storage.engine.dispose()


def test_a_trial_that_diverges_is_recorded_as_such_and_is_never_the_best(tmp_path: pathlib.Path):
    def run(hparams, key):
        return {"loss": jnp.where(hparams["x"] > 1, jnp.nan, hparams["x"]) + 0 * jax.random.uniform(key)}

    found = sweep(run, {"x": [0.5, 2.0]}, trials=2, sampler="grid", study="s", storage=tmp_path / "a.db")
    assert [(trial.loss, trial.diverged) for trial in found.trials] == [(0.5, False), (None, True)]
    assert found.best is not None
    assert found.best.number == 0
    with stored_study(tmp_path / "a.db") as stored:
        assert [trial.value for trial in stored.trials] == [0.5, math.inf]
        assert [trial.user_attrs.get("diverged", False) for trial in stored.trials] == [False, True]
    text = json.loads(found.to_json())
    assert [trial["loss"] for trial in text["trials"]] == [0.5, None]
    all_lost = sweep(run, {"x": [2.0]}, trials=1, sampler="grid")
    assert all_lost.best is None
    assert "try lower learning rates" in str(all_lost)


class Bad(Decay):
    """Not finite from the third step on where the rate is above 1."""

    def advance(self, hparams, state, steps, data):
        state, metrics = super().advance(hparams, state, steps, data)
        lost = (hparams["rate"] > 1) & (state["at"] >= 3)
        return state, {**metrics, "loss": jnp.where(lost, jnp.nan, metrics["loss"])}


def test_a_diverged_trial_stops_costing():
    job = Bad(length=10)
    found = sweep(job, {"rate": [0.5, 2.0]}, trials=2, seeds=2, sampler="grid", mode="map", rungs=10)
    jax.effects_barrier()
    assert [trial.diverged for trial in found.trials] == [False, True]
    assert (job.seen.count(0.5), job.seen.count(2.0)) == (20, 6)
    fine, lost = found.trials
    assert fine.flops is not None
    assert lost.flops == pytest.approx(0.3 * fine.flops)
    assert sorted(fine.rungs) == list(range(1, 10))


def test_a_pruner_stops_what_is_behind_at_a_rung():
    job = Decay(length=8)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=1, n_warmup_steps=0)
    space = {"rate": [0.1, 0.2, 1.0]}
    found = sweep(job, space, trials=3, sampler="grid", mode="map", lanes=1, rungs=4, pruner=pruner)
    jax.effects_barrier()
    assert [trial.pruned for trial in found.trials] == [False, True, True]
    assert found.best is not None
    assert found.best.hparams == {"rate": 0.1}
    assert [round(job.seen.count(rate)) for rate in (np.float32(0.1), np.float32(0.2))] == [8, 2]
    whole = sweep(Decay(length=8), space, trials=3, sampler="grid", mode="map", rungs=4)
    assert not any(trial.pruned for trial in whole.trials)


# ---- the study -------------------------------------------------------------------------------------------


def test_a_study_is_resumed_and_holds_what_a_trial_needs_to_be_repeated(tmp_path: pathlib.Path):
    ran = []

    def run(hparams, key):
        jax.debug.callback(lambda x: ran.append(round(float(x), 5)), hparams["x"])
        return bowl(hparams, key)

    options = {"study": Study("s", tmp_path / "a.db", settings={"width": 8}), "mode": "loop"}
    first = sweep(run, RANGE, trials=3, **options)
    second = sweep(run, RANGE, trials=5, **options)
    third = sweep(run, RANGE, trials=5, **options)
    jax.effects_barrier()
    assert len(first.trials) == 3
    assert second.trials[:3] == first.trials
    assert third.trials == second.trials
    assert len(ran) == len(set(ran)) == 5
    assert third.modes == {}
    with stored_study(tmp_path / "a.db") as stored:
        assert stored.user_attrs["mujax"]["width"] == 8
        attrs = stored.trials[0].user_attrs
    assert attrs["hparams"] == first.trials[0].hparams
    assert (attrs["seed"], attrs["seeds"], attrs["mode"], attrs["steps"]) == (0, 1, "loop", 1)
    assert attrs["metrics"]["other"] == pytest.approx(-first.trials[0].hparams["x"])
    with pytest.raises(ConfigError, match="width: expected 8, with which study 's' was started, got 9"):
        sweep(run, RANGE, trials=5, study=Study("s", tmp_path / "a.db", settings={"width": 9}))
    with pytest.raises(
        ConfigError, match=r"space: expected x=0:4, with which study 's' was started, got x=0:5;"
    ):
        sweep(run, {"x": {"low": 0.0, "high": 5.0}}, trials=6, **options)


def test_a_study_can_be_given_by_its_name_and_by_the_arguments_of_0_3(tmp_path: pathlib.Path):
    place = Study(
        "s", tmp_path / "a.db", settings={"width": 8}, attributes={"by": "me"}, heartbeat=5, patience=1
    )
    found = sweep(bowl, RANGE, trials=2, study=place)
    with pytest.warns(
        DeprecationWarning, match=r"sweep\(settings=\.\.\., notes=.* pass study=mujax\.Study\(.*attr"
    ):
        again = sweep(
            bowl, RANGE, trials=2, study="s", storage=tmp_path / "a.db", settings={"width": 8}, notes={},
            heartbeat=5, patience=1,
        )  # fmt: skip
    assert again.trials == found.trials
    assert again.settings == found.settings
    with stored_study(tmp_path / "a.db") as stored:
        assert stored.user_attrs["mujax:notes"] == {"by": "me"}
    with pytest.raises(ConfigError, match="width: expected 8, with which study 's' was started, got nothing"):
        sweep(bowl, RANGE, trials=2, study="s", storage=tmp_path / "a.db")


@pytest.mark.parametrize(
    ("beside", "field"),
    [({"storage": "a.db"}, "storage"), ({"notes": {}}, "attributes"), ({"patience": 3}, "patience")],
)
def test_what_belongs_in_a_study_is_refused_beside_it(beside, field):
    (name,) = beside
    text = rf"{name}: expected it as a field of the Study, got it beside one; pass .*Study\(\.\.\., {field}="
    with pytest.raises(ConfigError, match=text):
        sweep(bowl, RANGE, trials=1, study=Study("s"), **beside)
    with pytest.raises(TypeError, match="unexpected keyword argument 'devices'"):
        sweep(bowl, RANGE, trials=1, devices=None)


@pytest.mark.parametrize("objective", ["accuracy", "valid_loss"])
def test_an_objective_that_a_run_does_not_return_stops_it_before_anything_is_run_or_stored(
    objective, tmp_path: pathlib.Path
):
    job = Decay(length=4)
    options = {"sampler": "grid", "study": "s", "storage": tmp_path / "a.db"}
    text = rf"run: expected the metric '{objective}' to minimise, got \['at', 'loss', 'vector'\]; return it"
    with pytest.raises(ConfigError, match=text):
        sweep(job, {"rate": [0.5, 0.25]}, trials=2, objective=objective, **options)
    jax.effects_barrier()
    assert job.seen == []
    assert not (tmp_path / "a.db").exists()
    # So the study can be started with another one.
    assert sweep(job, {"rate": [0.5, 0.25]}, trials=2, **options).best is not None


def test_an_objective_may_be_known_at_the_end_only():
    class Scored(Decay):
        def finish(self, hparams, state, data):
            return {"score": -hparams["rate"]}

    found = sweep(Scored(length=4), {"rate": [0.5, 0.25]}, trials=2, objective="score", sampler="grid")
    assert [trial.loss for trial in found.trials] == [-0.5, -0.25]
    # The loss takes its place before.
    assert found.trials[0].rungs[1] == found.trials[0].metrics["loss"] * 2**3


def test_a_run_that_raises_is_one_sentence_and_its_trials_are_put_back(tmp_path: pathlib.Path):
    def run(hparams, key):
        if hparams["layers"] == 3:
            raise ValueError("no three layers\nand more")
        return {"loss": hparams["layers"] * jax.random.uniform(key)}

    options = {"study": "s", "storage": tmp_path / "a.db", "sampler": "grid"}
    space = {"layers": [1, 2, 3, 4]}
    with pytest.raises(MujaxError) as caught:
        sweep(run, space, trials=4, lanes=2, **options)
    assert str(caught.value) == (
        "run: expected it to run with {'layers': 3}, got ValueError: no three layers; its 2 trials are put "
        "back, and trials finished before are stored."
    )
    mended = sweep(lambda hparams, key: {"loss": hparams["layers"] * 1.0}, space, trials=4, **options)
    assert sorted(trial.hparams["layers"] for trial in mended.trials) == [1, 2, 3, 4]
    # What had finished was not run again.
    assert mended.trials[0].loss != 1.0
    assert {trial.loss for trial in mended.trials if trial.hparams["layers"] > 2} == {3.0, 4.0}


def test_an_interrupt_puts_back_what_is_under_way(tmp_path: pathlib.Path):
    options = {"study": "s", "storage": tmp_path / "a.db", "lanes": 2}

    def stop(now):
        if now.done >= 2 and now.running:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(bowl, RANGE, trials=6, progress=stop, **options)
    found = sweep(bowl, RANGE, trials=6, **options)
    whole = sweep(bowl, RANGE, trials=6)
    assert sorted(trial.hparams["x"] for trial in found.trials) == sorted(
        trial.hparams["x"] for trial in whole.trials
    )


def test_progress_and_finished_trials_are_reported():
    seen, ends = [], []
    sweep(Decay(length=4), {"rate": [0.5, 0.25, 0.125]}, trials=3, sampler="grid", lanes=2, rungs=2,
          progress=seen.append, finished=ends.append)  # fmt: skip
    assert [now.work_done for now in seen] == sorted(now.work_done for now in seen)
    assert seen[-1].work_done == 1.0
    assert {now.total for now in seen} == {3}
    assert seen[0].best is None
    assert seen[-1].best == pytest.approx(min(trial.loss for trial in ends))
    assert [trial.number for trial in ends] == [0, 1, 2]
    assert isinstance(ends[0], Trial)


# ---- what is wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"trials": 0}, "trials: expected a whole number of at least 1, got 0"),
        ({"seeds": 0}, "seeds: expected a whole number of at least 1, got 0"),
        ({"mode": "pmap"}, "mode: expected one of 'loop', 'map', 'vmap' or None, got 'pmap'"),
        ({"fixed": {"x": 1.0}}, "x: expected it in the space or fixed, got it in both"),
        ({"sampler": "best"}, "sampler: expected one of"),
        ({"trials": 1.5}, "trials: expected a whole number of at least 1, got 1.5"),
        ({"seeds": True}, "seeds: expected a whole number of at least 1, got True"),
        ({"space": ["x"]}, r"space: expected a mapping of hyperparameters, got \['x'\]"),
        ({"study": ""}, "study: expected a name of 1 to 400 characters"),
        ({"study": Study(" ")}, "study: expected a name of 1 to 400 characters that does not"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(options, text):
    with pytest.raises(ConfigError, match=text):
        sweep(**{"run": bowl, "space": RANGE, "trials": 2, **options})


def test_a_study_that_makes_no_sense_is_one_sentence():
    with pytest.raises(ConfigError, match=r"^heartbeat: expected a number of seconds, .*, got 'long'"):
        Study("s", heartbeat="long")
    with pytest.raises(ConfigError, match=r"^name: expected a name of 1 to 400 characters or None, got ''"):
        Study("")


def test_an_objective_that_is_an_array_is_refused():
    with pytest.raises(ConfigError, match=r"run: expected a scalar 'loss', got an array of shape \(3,\)"):
        sweep(lambda hparams, key: {"loss": hparams["x"] * jnp.ones(3)}, RANGE, trials=1)


def test_it_is_what_the_package_exports():
    assert mujax.sweep is sweep
    assert mujax.Sweep is Sweep
    assert mujax.Study is Study
