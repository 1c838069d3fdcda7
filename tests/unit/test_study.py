"""Shared studies: who runs what, what is stored, and what happens when a worker or the database fails."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math
import pathlib
import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import optuna
import pytest
import sqlalchemy
import sqlalchemy.exc
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from mujax.errors import ConfigError, StudyError
from mujax.tune.study import Claim, Record, SharedStudy, _database, distributions

SPACE = {"lr": {"low": "2**-10", "high": 1.0, "log": True}, "act": ["relu", "tanh"]}
GRID = {"lr": [0.1, 0.2, 0.3], "layers": {"low": 1, "high": 3, "step": 2}}


class Told(list):
    """What a study said."""

    def __call__(self, text: str) -> None:
        self.append(text)


@pytest.fixture
def memory() -> InMemoryStorage:
    return InMemoryStorage()


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses a hundred times shorter."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(seconds / 100))


def run_all(workers: list[SharedStudy], total: int, at_most: int = 1) -> list[Claim]:
    """Runs trials in turns, until none is left to claim."""
    done = []
    for worker in itertools.islice(itertools.cycle(workers), 10 * total):
        claims = worker.claim(total, at_most)
        for claim in claims:
            assert worker.finish(claim, float(claim.number), {})
        done += claims
        if not claims and not worker.pending(total):
            return done
    raise AssertionError(f"{workers[0].pending(total)} trials are left")


def drawn(claims: list[Claim]) -> list[tuple[Any, ...]]:
    return sorted(tuple(claim.params.values()) for claim in claims)


def age(*studies: SharedStudy) -> None:
    """As if there had been no sign of life from any worker for an hour, and all was well otherwise."""
    with contextlib.closing(sqlite3.connect(studies[0].storage, timeout=60)) as connection, connection:
        connection.execute("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-1 hour')")
    for study in studies:
        study._unsettled = study._swept = -math.inf


# ---- the space ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([1, 2.5, "a", None, True][1:], CategoricalDistribution([2.5, "a", None, True])),
        ((8,), CategoricalDistribution([8])),
        ({"low": 1, "high": 8}, IntDistribution(1, 8)),
        ({"low": 1, "high": 8, "log": True}, IntDistribution(1, 8, log=True)),
        ({"low": 1, "high": 9, "step": 4}, IntDistribution(1, 9, step=4)),
        ({"low": 0, "high": 1, "step": 0.25}, FloatDistribution(0, 1, step=0.25)),
        ({"low": 1, "high": 8.0}, FloatDistribution(1, 8)),
        ({"low": "2**-8", "high": "2^-2", "log": True}, FloatDistribution(2**-8, 2**-2, log=True)),
        ({"low": "1e-3", "high": " 2 ** 3 "}, FloatDistribution(1e-3, 8)),
        ({"low": "2**0", "high": "2**3"}, IntDistribution(1, 8)),
        (FloatDistribution(0, 3), FloatDistribution(0, 3)),
        # It ends before high, as in Python's range.
        ({"low": 0, "high": 10, "step": 4}, IntDistribution(0, 8, step=4)),
    ],
)
def test_a_hyperparameter_in_every_form(given: Any, expected: Any) -> None:
    assert distributions({"x": given}) == {"x": expected}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (3, r"x: expected a list of values or a range, got 3; write"),
        ("relu", r"x: expected a list of values or a range, got 'relu'"),
        ([], r"x: expected at least one value to choose from, got none\."),
        ([[1]], r"x: expected numbers, texts, true, false or null to choose from, got \[1\]; give"),
        ([math.nan], r"x: expected finite values to choose from, got nan"),
        ([1, True], r"x: expected different values to choose from, got \[1, True\]"),
        ({"low": 1}, r"x: expected low and high of a range, got no high\."),
        (
            {"low": 1, "high": 2, "base": 2},
            r"x: expected the keys low, high, log, step of a range, got 'base'",
        ),
        ({"low": 2, "high": 2}, r"x: expected low < high, got 2 and 2; write a list"),
        ({"low": 0.0, "high": 2, "log": True}, r"x: expected low > 0 on a log scale, got 0\.0; raise low\."),
        ({"low": 1, "high": 2, "log": "yes"}, r"x: expected true or false as log, got 'yes'"),
        ({"low": 1, "high": 2, "log": True, "step": 1}, r"x: expected a positive step and no log scale"),
        ({"low": 1, "high": 2, "step": 0}, r"x: expected a positive step"),
        ({"low": "two", "high": 2}, r"x: expected a finite number as low, got 'two'; write it as"),
        ({"low": "10**1000000", "high": 2.0}, r"x: expected a finite number as low, got '10"),
        ({"low": True, "high": 2}, r"x: expected a finite number as low, got True"),
        ({"low": 0, "high": math.inf}, r"x: expected a finite number as high, got inf"),
    ],
)
def test_a_hyperparameter_that_makes_no_sense(given: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        distributions({"x": given})


def test_a_space_without_hyperparameters() -> None:
    with pytest.raises(ConfigError, match="space: expected at least one hyperparameter, got none"):
        distributions({})


# ---- who runs what --------------------------------------------------------------------------------------


def test_workers_divide_the_total_and_stop_together(memory: InMemoryStorage) -> None:
    with (
        SharedStudy.open("s", SPACE, storage=memory) as one,
        SharedStudy.open("s", SPACE, storage=memory) as two,
    ):
        assert one.pending(5) == 5
        mine, others = one.claim(5, 2), two.claim(5, 9)
        assert [claim.number for claim in mine + others] == [0, 1, 2, 3, 4]
        assert one.claim(5, 1) == two.claim(5, 1) == []
        # Claimed is not finished: a worker that finds nothing to claim knows that others are at it.
        assert two.pending(5) == 5
        for claim in others:
            two.finish(claim, 1.0, {})
        assert two.pending(5) == 2
        for claim in mine:
            one.finish(claim, 1.0, {})
        assert one.pending(5) == two.pending(5) == 0
        assert one.claim(5, 1) == []
        # A larger total goes on where the study stands.
        assert [claim.number for claim in one.claim(6, 5)] == [5]


def test_random_trials_depend_on_the_seed_and_not_on_the_workers() -> None:
    def draw(workers: int, seed: int, at_most: int = 1) -> list[tuple[Any, ...]]:
        storage = InMemoryStorage()
        opened = [SharedStudy.open("s", SPACE, storage=storage, seed=seed) for _ in range(workers)]
        return drawn(run_all(opened, 8, at_most))

    alone = draw(1, 0)
    assert alone == draw(3, 0) == draw(2, 0, at_most=3)
    assert alone != draw(1, 1)
    assert len(set(alone)) == 8


def test_random_trials_are_the_same_set_when_some_are_put_back(memory: InMemoryStorage) -> None:
    expected = drawn(run_all([SharedStudy.open("s", SPACE, storage=InMemoryStorage())], 6))
    one, two = (SharedStudy.open("s", SPACE, storage=memory) for _ in range(2))
    kept, *others = one.claim(6, 3)
    one.release(others, "Ctrl-C")
    assert one.finish(kept, 1.0, {})
    rest = run_all([two, one], 6)
    assert [claim.number for claim in rest] == [3, 4, 5, 6, 7]
    assert drawn([kept, *rest]) == expected


def test_a_grid_is_run_in_row_major_order_each_cell_once(memory: InMemoryStorage) -> None:
    one, two = (SharedStudy.open("s", GRID, storage=memory, sampler="grid") for _ in range(2))
    assert one.pending(100) == 6
    claims = run_all([one, two], 100, at_most=2)
    cells = [(claim.params["lr"], claim.params["layers"]) for claim in claims]
    assert cells == [(0.1, 1), (0.1, 3), (0.2, 1), (0.2, 3), (0.3, 1), (0.3, 3)]
    assert one.pending(100) == 0


def test_a_grid_stops_at_a_smaller_total(memory: InMemoryStorage) -> None:
    study = SharedStudy.open("s", GRID, storage=memory, sampler="grid")
    assert [claim.params["lr"] for claim in run_all([study], 3)] == [0.1, 0.1, 0.2]


def test_a_grid_and_what_the_user_enqueued(memory: InMemoryStorage) -> None:
    study = SharedStudy.open("s", GRID, storage=memory, sampler="grid")
    plain = optuna.load_study(study_name="s", storage=memory)
    plain.enqueue_trial({"lr": 0.2, "layers": 1})
    # Off the grid: of the space, but no cell.
    space = {"lr": CategoricalDistribution([0.1, 0.2, 0.3]), "layers": IntDistribution(1, 3)}
    params = {"lr": 0.1, "layers": 2}
    plain.add_trial(optuna.create_trial(state=TrialState.WAITING, params=params, distributions=space))
    claims = run_all([study], 100)
    cells = [(claim.params["lr"], claim.params["layers"]) for claim in claims]
    assert cells[:2] == [(0.2, 1), (0.1, 2)]
    assert sorted(cells) == sorted([*itertools.product([0.1, 0.2, 0.3], [1, 3]), (0.1, 2)])


def test_a_grid_of_floats_ends_where_it_should(memory: InMemoryStorage) -> None:
    space = {"x": {"low": 0.0, "high": 0.3, "step": 0.1}}
    study = SharedStudy.open("s", space, storage=memory, sampler="grid")
    assert [claim.params["x"] for claim in run_all([study], 100)] == [0.0, 0.1, 0.2, 0.3]


def test_a_grid_over_a_continuum(memory: InMemoryStorage) -> None:
    with pytest.raises(
        ConfigError, match=r"lr: expected finitely many values for a grid, got Float.*; write"
    ):
        SharedStudy.open("s", SPACE, storage=memory, sampler="grid")


def test_enqueued_trials_are_run_first(memory: InMemoryStorage) -> None:
    told = Told()
    study = SharedStudy.open("s", SPACE, storage=memory, say=told)
    plain = optuna.load_study(study_name="s", storage=memory)
    plain.enqueue_trial({"lr": 0.5, "act": "tanh"})
    plain.enqueue_trial({"act": "sine"})
    plain.enqueue_trial({"lr": 0.25})
    claims = run_all([study], 4)
    assert claims[0].params == {"lr": 0.5, "act": "tanh"}
    assert claims[1].params["lr"] == 0.25
    assert len(claims) == 4
    assert told == ["study 's': trial 1 is dropped: its act = 'sine' is not in the space."]


def test_more_was_stored_than_the_total(memory: InMemoryStorage) -> None:
    study = SharedStudy.open("s", SPACE, storage=memory)
    run_all([study], 4)
    assert study.claim(2, 5) == []
    assert study.pending(2) == 0
    assert study.claim(5, 0) == []


@pytest.mark.parametrize("sampler", ["tpe", "nsgaii", "qmc", "TPE", optuna.samplers.TPESampler(seed=1)])
def test_samplers_of_optuna(sampler: Any, memory: InMemoryStorage) -> None:
    workers = [SharedStudy.open("s", SPACE, storage=memory, sampler=sampler) for _ in range(2)]
    claims = run_all(workers, 6)
    assert len(claims) == 6
    # Workers with the same seed go different ways.
    assert len(set(drawn(claims))) == 6


def test_an_unknown_sampler(memory: InMemoryStorage) -> None:
    text = r"sampler: expected one of 'cmaes', 'gp', 'grid', .*'qmc', 'random', 'tpe', got 'bruteforce'"
    with pytest.raises(ConfigError, match=text):
        SharedStudy.open("s", SPACE, storage=memory, sampler="bruteforce")


def test_a_sampler_whose_package_is_not_installed(
    memory: InMemoryStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"sampler: expected cmaes to be installed .*; pip install cmaes"):
        SharedStudy.open("s", SPACE, storage=memory, sampler="cmaes")


# ---- results --------------------------------------------------------------------------------------------


def test_what_is_stored_and_read_back(memory: InMemoryStorage) -> None:
    study = SharedStudy.open("s", SPACE, storage=memory)
    assert study.best() is None
    good, bad, running = study.claim(3, 3)
    assert study.report(good, 10, 2.0) is False
    assert study.finish(good, 1.5, {"losses": (1, 2), "worker": "a"})
    assert study.finish(bad, 2.5, {})
    first, second, third = study.records()
    assert first == Record(
        number=good.number,
        params=good.params,
        value=1.5,
        state="complete",
        diverged=False,
        attrs={"losses": [1, 2], "worker": "a"},
        intermediate={10: 2.0},
    )
    assert (second.value, third.value) == (2.5, None)
    assert (third.state, third.params) == ("running", running.params)
    best = study.best()
    assert best == first


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_a_trial_that_diverged(value: float | None, memory: InMemoryStorage) -> None:
    study = SharedStudy.open("s", SPACE, storage=memory)
    diverged, other = study.claim(2, 2)
    assert study.finish(diverged, value, {"why": "nan"})
    assert study.best() is None
    assert study.finish(other, 1e30, {})
    first, second = study.records()
    assert (first.state, first.value, first.diverged, first.attrs) == (
        "complete",
        math.inf,
        True,
        {"why": "nan"},
    )
    assert (second.value, second.diverged) == (1e30, False)
    assert study.best() == second
    assert study.pending(2) == 0


def test_the_pruner_says_stop(memory: InMemoryStorage) -> None:
    pruner = optuna.pruners.ThresholdPruner(upper=1.0)
    study = SharedStudy.open("s", SPACE, storage=memory, pruner=pruner)
    low, high, nan = study.claim(3, 3)
    assert study.report(low, 1, 0.5) is False
    assert study.report(high, 1, 1.5) is True
    # Once more: after a lost connection the trainer may not know that it was stored.
    assert study.report(high, 1, 1.5) is True
    assert study.report(nan, 1, math.nan) is True
    assert study.finish(high, None, {}, state="pruned")
    record = study.records()[1]
    assert (record.state, record.value, record.diverged) == ("pruned", 1.5, False)
    assert study.pending(3) == 2


@pytest.mark.parametrize(
    "pruner", ["none", None, "asha", "successive-halving", "hyperband", "median", "percentile"]
)
def test_pruners_by_name(pruner: str | None, memory: InMemoryStorage) -> None:
    study = SharedStudy.open("s", SPACE, storage=memory, pruner=pruner)
    (claim,) = study.claim(1, 1)
    assert study.report(claim, 1, 1.0) is False
    assert study.finish(claim, 1.0, {})


def test_an_unknown_pruner(memory: InMemoryStorage) -> None:
    with pytest.raises(ConfigError, match=r"pruner: expected one of 'none', 'asha', .*, got 'best'"):
        SharedStudy.open("s", SPACE, storage=memory, pruner="best")


ASHA = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)


def test_asha_stops_the_worse_of_two(memory: InMemoryStorage) -> None:
    study = SharedStudy.open("s", SPACE, storage=memory, pruner=ASHA)
    good, bad = study.claim(2, 2)
    assert [study.report(good, step, 0.1) for step in (1, 2, 3)] == [False, False, False]
    assert study.report(bad, 1, 9.0) is True


def test_a_trial_is_finished_once_and_by_who_claimed_it(memory: InMemoryStorage) -> None:
    one, two = (SharedStudy.open("s", SPACE, storage=memory) for _ in range(2))
    (claim,) = one.claim(1, 1)
    with pytest.raises(ConfigError, match=r"claim: expected a trial that this worker claimed .*, got 0"):
        two.finish(claim, 1.0, {})
    assert one.finish(claim, 1.0, {})
    with pytest.raises(ConfigError, match="claim: expected"):
        one.finish(claim, 1.0, {})


def test_attributes_that_json_can_not_hold(memory: InMemoryStorage) -> None:
    study = SharedStudy.open("s", SPACE, storage=memory)
    (claim,) = study.claim(1, 1)
    with pytest.raises(ConfigError, match="attrs: expected what JSON can hold, got set at 'tags'; make it"):
        study.finish(claim, 1.0, {"tags": {1}})
    assert study.finish(claim, 1.0, {})


def test_released_trials_are_run_again_with_the_same_hyperparameters(memory: InMemoryStorage) -> None:
    one, two = (SharedStudy.open("s", SPACE, storage=memory, pruner=ASHA) for _ in range(2))
    done, released = one.claim(2, 2)
    one.report(released, 1, 1.0)
    one.finish(done, 1.0, {})
    one.release([done, released], "Ctrl-C")
    states = [record.state for record in one.records()]
    assert states == ["complete", "failed", "waiting"]
    assert one.records()[1].attrs == {"released": "Ctrl-C"}
    assert one.pending(2) == 1
    (again,) = two.claim(2, 5)
    assert again == Claim(2, released.params)
    # What was reported before says nothing about the new run, nor does what the pruner made of it.
    trial = memory.get_trial(2)
    assert trial.intermediate_values == {}
    assert not [key for key in trial.system_attrs if key.startswith("completed_rung")]
    assert [key for key in memory.get_trial(1).system_attrs if key.startswith("completed_rung")]
    assert two.finish(again, 1.0, {})
    assert one.pending(2) == 0
    assert one.claim(2, 1) == []


# ---- what a study is begun with -------------------------------------------------------------------------


def test_settings_are_kept_and_compared(memory: InMemoryStorage) -> None:
    given = {"task": "mnist-mlp", "width": 64, "betas": (0.9, 0.99)}
    assert SharedStudy.open("s", SPACE, storage=memory, settings=given).settings["betas"] == [0.9, 0.99]
    assert SharedStudy.open("s", SPACE, storage=memory, settings=given).settings["width"] == 64
    assert SharedStudy.load("s", memory).settings["task"] == "mnist-mlp"
    text = r"width: expected 64, with which study 's' was begun, got 128; take another study name, or that"
    with pytest.raises(ConfigError, match=text):
        SharedStudy.open("s", SPACE, storage=memory, settings=given | {"width": 128})
    with pytest.raises(ConfigError, match=r"steps: expected nothing, .*, got 9;"):
        SharedStudy.open("s", SPACE, storage=memory, settings=given | {"steps": 9})
    with pytest.raises(ConfigError, match=r"task: expected \"mnist-mlp\", .*, got nothing;"):
        SharedStudy.open("s", SPACE, storage=memory)
    assert SharedStudy.open("t", SPACE, storage=memory, settings={"width": 128}).settings == {"width": 128}


def test_a_study_made_with_plain_optuna_is_adopted(memory: InMemoryStorage) -> None:
    plain = optuna.create_study(study_name="s", storage=memory)
    plain.tell(plain.ask({"x": FloatDistribution(0, 1)}), 1.0)
    study = SharedStudy.open("s", {"x": {"low": 0.0, "high": 1.0}}, storage=memory, settings={"width": 1})
    assert study.settings == plain.user_attrs["mujax"] == {"width": 1}
    assert study.pending(3) == 2
    assert len(run_all([study], 3)) == 2


@pytest.mark.parametrize("directions", [["maximize"], ["minimize", "minimize"]])
def test_a_study_that_does_not_minimize_one_value(directions: list[str], memory: InMemoryStorage) -> None:
    optuna.create_study(study_name="s", storage=memory, directions=directions)
    with pytest.raises(ConfigError, match="study: expected one that minimizes one value, got 's'"):
        SharedStudy.open("s", SPACE, storage=memory)


def test_another_space(memory: InMemoryStorage) -> None:
    run_all([SharedStudy.open("s", SPACE, storage=memory)], 1)
    for other in ({"lr": [0.1]}, {"lr": {"low": 0.1, "high": 1.0}}, {"act": ["relu"]}):
        with pytest.raises(ConfigError, match=r"expected .*, with which study 's' was begun, got .*; take"):
            SharedStudy.open("s", {**SPACE, **other}, storage=memory)
    wider = {"lr": {"low": "2**-12", "high": 1.0, "log": True}}
    assert SharedStudy.open("s", {**SPACE, **wider}, storage=memory).pending(2) == 1


@pytest.mark.parametrize("name", ["", "  ", "s (claiming)", "s" * 500])
def test_a_name_that_can_not_be(name: str, memory: InMemoryStorage) -> None:
    with pytest.raises(ConfigError, match="study: expected a name of 1 to 400 characters"):
        SharedStudy.open(name, SPACE, storage=memory)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"heartbeat": 0}, "grace: expected more than the heartbeat of 0 s"),
        ({"heartbeat": 10, "grace": 5}, "grace: expected more than the heartbeat of 10 s, got 5 s; take 3"),
        ({"patience": -1}, "patience: expected a number of seconds, got -1"),
        ({"heartbeat": math.nan}, "heartbeat: expected a number of seconds, got nan"),
        ({"settings": {"model": object()}}, "settings: expected what JSON can hold, got object at 'model'"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], text: str, memory: InMemoryStorage) -> None:
    with pytest.raises(ConfigError, match=text):
        SharedStudy.open("s", SPACE, storage=memory, **options)


def test_reading_a_study_that_is_not_there(tmp_path: pathlib.Path, memory: InMemoryStorage) -> None:
    with pytest.raises(ConfigError, match="study: expected one of none yet in InMemoryStorage, got 's'"):
        SharedStudy.load("s", memory)
    SharedStudy.open("a", SPACE, storage=memory)
    optuna.create_study(study_name="a (claiming)", storage=memory)
    SharedStudy.open("b", SPACE, storage=memory)
    with pytest.raises(ConfigError, match="study: expected one of 'a', 'b' in InMemoryStorage, got 's'"):
        SharedStudy.load("s", memory)
    with pytest.raises(ConfigError, match=r"study: expected 's' in .*none\.db, found no such file"):
        SharedStudy.load("s", tmp_path / "none.db")
    assert not (tmp_path / "none.db").exists()


def test_a_study_opened_to_read_claims_nothing(memory: InMemoryStorage) -> None:
    SharedStudy.open("s", SPACE, storage=memory)
    with pytest.raises(ConfigError, match="claim: expected a study opened with its space"):
        SharedStudy.load("s", memory).claim(1, 1)


def test_optuna_is_as_it_was(memory: InMemoryStorage) -> None:
    before = optuna.logging.get_verbosity()
    run_all([SharedStudy.open("s", SPACE, storage=memory)], 1)
    assert optuna.logging.get_verbosity() == before


# ---- one worker at a time -------------------------------------------------------------------------------


def test_the_lock_of_a_dead_worker_is_taken_away(memory: InMemoryStorage) -> None:
    study = SharedStudy.open("s", SPACE, storage=memory)
    study._claiming_grace = 0.3
    for owner in ("dead", None):
        lock = optuna.create_study(study_name="s (claiming)", storage=memory)
        if owner:
            lock.set_user_attr("owner", owner)
        assert len(study.claim(9, 1)) == 1
    assert optuna.get_all_study_names(memory) == ["s"]


def test_the_lock_is_not_taken_from_workers_that_take_turns(memory: InMemoryStorage) -> None:
    study = SharedStudy.open("s", SPACE, storage=memory)
    study._claiming_grace = 0.6
    lock = optuna.create_study(study_name="s (claiming)", storage=memory)
    freed = 0.0

    def turns() -> None:
        nonlocal freed
        for turn in range(30):
            # SQLite would give each lock the same id.
            lock.set_user_attr("owner", str(turn))
            time.sleep(0.05)
        freed = time.monotonic()
        optuna.delete_study(study_name="s (claiming)", storage=memory)

    thread = threading.Thread(target=turns)
    thread.start()
    assert len(study.claim(1, 1)) == 1
    assert freed
    assert time.monotonic() > freed
    thread.join()


@pytest.mark.parametrize("total", [4, 6])
def test_a_worker_that_lost_the_lock_takes_nothing_from_others(
    total: int, memory: InMemoryStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, quick = (SharedStudy.open("s", SPACE, storage=memory) for _ in range(2))
    take, others = slow._take, []

    def interrupted(head: Any, taken: Any) -> bool:
        more = take(head, taken)
        if not others:
            # Asleep for so long that another worker takes it for dead.
            optuna.delete_study(study_name="s (claiming)", storage=memory)
            others.extend(quick.claim(total, 3))
        return more

    monkeypatch.setattr(slow, "_take", interrupted)
    mine = slow.claim(total, 3)
    numbers = [claim.number for claim in mine + others]
    assert len(numbers) == len(set(numbers))
    assert len(set(drawn(mine + others))) == len(numbers) <= total
    for worker, claims in ((slow, mine), (quick, others)):
        for claim in claims:
            assert worker.finish(claim, 1.0, {})
    expected = drawn(run_all([SharedStudy.open("s", SPACE, storage=InMemoryStorage())], total))
    rest = run_all([quick], total)
    assert drawn(mine + others + rest) == expected
    assert optuna.get_all_study_names(memory) == ["s"]


def test_many_workers_at_once_exceed_nothing(memory: InMemoryStorage) -> None:
    workers = [SharedStudy.open("s", SPACE, storage=memory) for _ in range(4)]
    done: list[list[Claim]] = [[] for _ in workers]

    def work(at: int) -> None:
        while claims := workers[at].claim(12, 2):
            done[at] += claims

    threads = [threading.Thread(target=work, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    numbers = [claim.number for claims in done for claim in claims]
    assert sorted(numbers) == list(range(12))


# ---- signs of life --------------------------------------------------------------------------------------


def test_trials_of_a_dead_worker_are_run_again_once(tmp_path: pathlib.Path) -> None:
    told = Told()
    with (
        SharedStudy.open("s", SPACE, storage=tmp_path / "s.db", say=told) as dead,
        SharedStudy.open("s", SPACE, storage=tmp_path / "s.db") as other,
    ):
        lost, done = dead.claim(2, 2)
        dead.finish(done, 1.0, {})
        assert other.claim(2, 2) == []
        age(other)
        (again,) = other.claim(2, 2)
        assert again.number == 2
        assert again.params == lost.params
        other._swept = -math.inf
        assert other.claim(2, 2) == []
        # It was not dead, only slow: what it has is dropped, with a word.
        assert dead.report(lost, 1, 1.0) is True
        assert dead.finish(lost, 0.5, {}) is False
        assert len(told) == 1
        assert told[0].startswith("study 's': trial 0 was taken away, since there was no sign of life")
        assert other.finish(again, 2.0, {})
        assert other.pending(2) == 0
        assert [record.state for record in other.records()] == ["failed", "complete", "complete"]
        dead.release([lost], "Ctrl-C")
        assert len(other.records()) == 3


def test_a_long_trial_is_kept_alive(tmp_path: pathlib.Path) -> None:
    with (
        SharedStudy.open("s", SPACE, storage=tmp_path / "s.db", heartbeat=0.1, grace=60) as alive,
        SharedStudy.open("s", SPACE, storage=tmp_path / "s.db", heartbeat=0.1, grace=60) as other,
    ):
        (claim,) = alive.claim(1, 1)
        age(other)
        query = "SELECT COUNT(*) FROM trial_heartbeats WHERE heartbeat > datetime('now', '-30 minutes')"
        give_up = time.monotonic() + 30
        seen = 0
        while not seen and time.monotonic() < give_up:
            with contextlib.closing(sqlite3.connect(other.storage, timeout=60)) as connection:
                (seen,) = connection.execute(query).fetchone()
            time.sleep(0.05)
        assert seen
        assert other.claim(1, 1) == []
        assert other.records()[0].state == "running"
        # The twin: without its thread it is taken for dead.
        alive._stop.set()
        assert alive._thread is not None
        alive._thread.join(timeout=30)
        age(other)
        assert [again.params for again in other.claim(1, 1)] == [claim.params]


def test_a_worker_killed_while_it_claimed_leaves_nothing_stuck(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    with (
        SharedStudy.open("s", SPACE, storage=tmp_path / "s.db", sampler="tpe") as dead,
        SharedStudy.open("s", SPACE, storage=tmp_path / "s.db", sampler="tpe") as other,
    ):
        # After the trial began to run, before it has all hyperparameters.
        monkeypatch.setattr(optuna.samplers.TPESampler, "sample_independent", killed)
        monkeypatch.setattr(dead, "_delete_lock", lambda _: None)
        with pytest.raises(Killed):
            dead.claim(1, 1)
        monkeypatch.undo()
        other._claiming_grace = 0.2
        assert other.claim(1, 1) == []
        age(other)
        (claim,) = other.claim(1, 1)
        assert set(claim.params) == set(SPACE)
        assert other.finish(claim, 1.0, {})
        assert other.pending(1) == 0


def test_after_an_outage_the_others_get_the_time_to_be_seen(tmp_path: pathlib.Path) -> None:
    with SharedStudy.open("s", SPACE, storage=tmp_path / "s.db", heartbeat=5, grace=15) as study:
        assert not study._sweep_is_due()
        study._unsettled = time.monotonic() - 16
        assert study._sweep_is_due()
        study._unsettled = time.monotonic() - 14
        assert not study._sweep_is_due()


# ---- the database ---------------------------------------------------------------------------------------


def test_without_a_storage_it_is_a_file_in_the_working_directory(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with SharedStudy.open("s", SPACE) as study:
        assert study.storage == str(tmp_path / "mujax.db")
    assert (tmp_path / "mujax.db").is_file()
    with SharedStudy.load("s") as study:
        assert study.records() == []


@pytest.mark.parametrize("name", ["runs.db", "what?{is}%41 this#1.db"])
@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_a_file_by_its_path(name: str, kind: Callable[[Any], Any], tmp_path: pathlib.Path) -> None:
    (tmp_path / name).touch()
    with SharedStudy.open("s", SPACE, storage=kind(tmp_path / name)) as study:
        assert study.storage == str(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).stat().st_size > 0


@pytest.mark.parametrize(
    ("installed", "given", "expected"),
    [
        ({"psycopg"}, "postgresql://u:p@h/d", "postgresql+psycopg://u:p@h/d"),
        ({"psycopg"}, "postgres://u:p@h/d", "postgresql+psycopg://u:p@h/d"),
        ({"psycopg", "psycopg2"}, "postgres://u:p@h/d", "postgresql://u:p@h/d"),
        (set(), "postgresql://u:p@h/d", "postgresql://u:p@h/d"),
        ({"psycopg"}, "postgresql+psycopg2://u:p@h/d", "postgresql+psycopg2://u:p@h/d"),
        ({"psycopg"}, "mysql://u:p@h/d", "mysql://u:p@h/d"),
        ({"pymysql"}, "mysql://u:p@h/d", "mysql+pymysql://u:p@h/d"),
        ({"pymysql", "MySQLdb"}, "mysql://u:p@h/d", "mysql://u:p@h/d"),
    ],
)
def test_the_driver_that_is_installed(
    installed: set[str], given: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in installed)
    assert _database.url_of(given).render_as_string(hide_password=False) == expected


@pytest.mark.parametrize(
    ("storage", "text"),
    [
        (
            "postgresql+psycopg2://u:secret@h/d",
            r"storage: expected a driver for .* found none; pip install 'psyc",
        ),
        (
            "oracle://u:secret@h/d",
            r"storage: expected a driver for oracle to be installed, found none; use SQL",
        ),
        ("redis://h", r"storage: expected a driver for redis"),
        ("postgresql://u:secret@h:port/d", r"storage: expected a file or an address such as postgresql://"),
        ("sqlite://", r"storage: expected a database that other processes can open, got SQLite's in memory"),
        ("sqlite:///:memory:", r"storage: expected a database that other processes can open"),
    ],
)
def test_an_address_that_can_not_be_used(storage: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        SharedStudy.open("s", SPACE, storage=storage)
    assert "secret" not in str(caught.value)


def test_no_password_is_shown() -> None:
    told = Told()
    storage = "postgresql+psycopg://u:secret@127.0.0.1:9/d?sslpassword=hidden"
    began = time.monotonic()
    with pytest.raises(
        StudyError, match=r"storage: postgresql.*://u:\*\*\*@127.*can't be reached.*;"
    ) as caught:
        SharedStudy.open("s", SPACE, storage=storage, say=told)
    # At once, without patience.
    assert time.monotonic() - began < 30
    assert "secret" not in str(caught.value)
    assert "hidden" not in str(caught.value)
    assert told == []


def test_a_folder_that_is_not_there(tmp_path: pathlib.Path) -> None:
    with pytest.raises(StudyError, match=r"storage: .*s\.db can't be opened .*; see that its folder exists"):
        SharedStudy.open("s", SPACE, storage=tmp_path / "no" / "s.db")


def test_a_file_that_is_no_database_is_not_changed(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "s.db"
    path.write_bytes(b"a diary, not a database" * 100)
    before = path.read_bytes()
    for use in (lambda: SharedStudy.open("s", SPACE, storage=path), lambda: SharedStudy.load("s", path)):
        with pytest.raises(StudyError, match=r"storage: .*s\.db can't be read .*; name another file"):
            use()
    assert path.read_bytes() == before


def test_a_damaged_database_is_not_changed(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "s.db"
    with SharedStudy.open("s", SPACE, storage=path):
        pass
    content = path.read_bytes()
    path.write_bytes(content[:100] + b"\xff" * (len(content) - 100))
    before = path.read_bytes()
    with pytest.raises(StudyError, match=r"storage: .*s\.db can't be read .*malformed.*; restore the file"):
        SharedStudy.open("s", SPACE, storage=path)
    assert path.read_bytes() == before


def test_a_database_of_something_else_is_not_changed(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "s.db"
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
    before = path.read_bytes()
    with pytest.raises(StudyError, match=r"storage: expected a database of Optuna's, got .* tables recipes;"):
        SharedStudy.open("s", SPACE, storage=path)
    assert path.read_bytes() == before


@contextlib.contextmanager
def pragma(study: SharedStudy, text: str) -> Iterator[Callable[[], None]]:
    """Sets something on every connection from now on, until what it gives is called."""
    on = True

    def connected(connection: Any, _: Any) -> None:
        if on:
            connection.execute(text)

    def off() -> None:
        nonlocal on
        on = False

    sqlalchemy.event.listen(study._storage.engine, "connect", connected)  # pyright: ignore
    yield off
    off()


FULL = r"database is full \(database or disk is full\)"


def test_a_full_disk_that_is_freed(tmp_path: pathlib.Path, hurry: None) -> None:
    told = Told()
    with SharedStudy.open("s", SPACE, storage=tmp_path / "s.db", patience=600, say=told) as study:
        (claim,) = study.claim(1, 1)
        with pragma(study, "PRAGMA max_page_count = 1") as freed:
            study._say_to = lambda text: (told(text), freed())
            assert study.finish(claim, 1.0, {"curve": [0.5] * 100_000})
        assert len(told) == 2
        assert told[0] == (
            "study 's': the database is full (database or disk is full); results are kept and written when "
            "it is back, trying for 600 s."
        )
        assert told[1].startswith("study 's': the database is back after")
        assert study.records()[0].attrs == {"curve": [0.5] * 100_000}


@pytest.mark.parametrize(
    ("text", "means", "remedy"),
    [
        ("PRAGMA max_page_count = 1", "is full", "free space on its disk"),
        ("PRAGMA query_only = 1", "can't be written", "make the file and its folder writable"),
    ],
)
def test_patience_ends_and_the_study_stays(
    text: str, means: str, remedy: str, tmp_path: pathlib.Path, hurry: None
) -> None:
    told = Told()
    with SharedStudy.open("s", SPACE, storage=tmp_path / "s.db", patience=0.5, say=told) as study:
        first, second = study.claim(2, 2)
        assert study.finish(first, 1.0, {})
        with (
            pragma(study, text),
            pytest.raises(
                StudyError, match=rf"study 's': .*s\.db {means} for \d+ s \(.*\); {remedy}.*goes on"
            ),
        ):
            study.finish(second, 2.0, {"curve": [0.5] * 100_000})
        assert len(told) == 1
        # Still this worker's: it can be told when there is room.
        assert study.finish(second, 2.0, {})
        assert [record.value for record in study.records()] == [1.0, 2.0]


def test_without_patience_at_once(tmp_path: pathlib.Path) -> None:
    told = Told()
    with SharedStudy.open("s", SPACE, storage=tmp_path / "s.db", patience=0, say=told) as study:
        (claim,) = study.claim(1, 1)
        with pragma(study, "PRAGMA query_only = 1"), pytest.raises(StudyError, match="can't be written"):
            study.finish(claim, 1.0, {})
        assert told == []


def test_a_claim_that_failed_is_not_kept_alive(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SharedStudy.open("s", SPACE, storage=tmp_path / "s.db", patience=0) as study:
        take = study._take

        def fails(head: Any, taken: Any) -> None:
            take(head, taken)
            raise sqlalchemy.exc.OperationalError("", None, Exception("server closed the connection"))

        monkeypatch.setattr(study, "_take", fails)
        with pytest.raises(StudyError, match=r"can't be reached \(server closed the connection\)"):
            study.claim(1, 1)
        assert study._beating == ()
        monkeypatch.undo()
        study._claiming_grace = 0.2
        age(study)
        (claim,) = study.claim(1, 1)
        assert claim.number == 1


def unreliable(study: SharedStudy, rng: random.Random, rate: float) -> None:
    """Loses the connection at random, before or after a transaction is committed."""
    engine = study._storage.engine  # pyright: ignore[reportAttributeAccessIssue]
    commit = engine.dialect.do_commit

    def lost() -> sqlalchemy.exc.OperationalError:
        return sqlalchemy.exc.OperationalError("", None, Exception("server closed the connection"))

    def do_commit(connection: Any) -> None:
        if rng.random() < rate:
            raise lost()
        commit(connection)
        # The answer is lost: the worker can't know that it was done.
        if rng.random() < rate:
            raise lost()

    engine.dialect.do_commit = do_commit


@pytest.mark.parametrize(("sampler", "seed"), [("random", 0), ("random", 1), ("tpe", 2), ("tpe", 3)])
def test_nothing_is_lost_or_run_twice_over_a_connection_that_breaks(
    seed: int, sampler: str, tmp_path: pathlib.Path, hurry: None
) -> None:
    expected = drawn(run_all([SharedStudy.open("s", SPACE, storage=InMemoryStorage())], 6))
    told, rng = Told(), random.Random(seed)
    with (
        SharedStudy.open("s", SPACE, storage=tmp_path / "s.db", sampler=sampler, say=told) as one,
        SharedStudy.open("s", SPACE, storage=tmp_path / "s.db", sampler=sampler, say=told) as two,
    ):
        done = []
        give_up = time.monotonic() + 120
        for worker in (one, two):
            unreliable(worker, rng, 0.03)
            worker._claiming_grace = 1.0
        for worker, at_most in itertools.cycle([(one, 2), (two, 1)]):
            claims = worker.claim(6, at_most)
            for claim in claims:
                assert worker.report(claim, 1, 1.0) is False
                assert worker.finish(claim, float(claim.number), {"seed": seed})
            done += claims
            if not worker.pending(6):
                break
            # A trial that began to run as the connection broke is nobody's: it is found in time.
            if not claims:
                age(one, two)
            assert time.monotonic() < give_up, one.records()
        assert any("server closed the connection" in text for text in told)
        complete = [record for record in one.records() if record.state == "complete"]
        assert len(done) == len(complete) == 6
        assert {record.number for record in complete} == {claim.number for claim in done}
        if sampler == "random":
            assert drawn(done) == expected


def test_a_study_that_somebody_deleted(memory: InMemoryStorage) -> None:
    study = SharedStudy.open("s", SPACE, storage=memory)
    optuna.delete_study(study_name="s", storage=memory)
    with pytest.raises(
        StudyError, match="study 's': expected it in InMemoryStorage, found that somebody deleted"
    ):
        study.records()


def test_workers_that_start_together_create_one_database(tmp_path: pathlib.Path) -> None:
    failures: list[BaseException] = []

    def start(width: int) -> None:
        try:
            with SharedStudy.open("s", SPACE, storage=tmp_path / "s.db", settings={"width": width}):
                pass
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=start, args=(width,)) for width in (1, 1, 1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    # The one with other settings, or the three if it was first.
    assert len(failures) in (1, 3)
    assert all(isinstance(error, ConfigError) and "width: expected" in str(error) for error in failures)


def test_mujax_is_imported_without_optuna() -> None:
    code = "import sys, mujax; sys.exit('optuna' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
