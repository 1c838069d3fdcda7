"""Shared studies: who runs what, what is stored, and what happens when a worker or the database fails.

By a clock that nobody waits for. The parts have tests of their own: test_study_queue, _leases, _lock,
_heartbeat, _connection, _database and _space.
"""

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
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.trial import TrialState
from trials import FakeClock

from mujax.errors import ConfigError, StudyError
from mujax.tune.study import Lease, Record, SharedStudy, _connection
from mujax.tune.study._clock import Clock
from mujax.tune.study._trials import run_again

SPACE = {"lr": {"low": "2**-10", "high": 1.0, "log": True}, "act": ["relu", "tanh"]}
GRID = {"lr": [0.1, 0.2, 0.3], "layers": {"low": 1, "high": 3, "step": 2}}


class Reported(list):
    """What a study reported."""

    def __call__(self, text: str) -> None:
        self.append(text)


@pytest.fixture
def memory() -> InMemoryStorage:
    return InMemoryStorage()


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """The clock of all studies."""
    made = FakeClock()
    monkeypatch.setattr(_connection, "Clock", lambda: made)
    return made


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """For workers in threads: a clock that is a hundred times faster, and no worker silences the others."""
    quick = Clock(lambda: 100 * time.monotonic(), lambda seconds: time.sleep(seconds / 100))
    monkeypatch.setattr(_connection, "Clock", lambda: quick)
    monkeypatch.setattr(_connection, "quiet", contextlib.nullcontext)


def run_all(workers: list[SharedStudy], total: int, at_most: int = 1) -> list[Lease]:
    """Runs trials in turns, until none is left to lease."""
    done = []
    for worker in itertools.islice(itertools.cycle(workers), 10 * total):
        leases = worker.lease(total, at_most)
        for lease in leases:
            assert worker.finish(lease, float(lease.number), {})
        done += leases
        if not leases and not worker.pending(total):
            return done
    raise AssertionError(f"{workers[0].pending(total)} trials are left")


def drawn(leases: list[Lease]) -> list[tuple[Any, ...]]:
    return sorted(tuple(lease.params.values()) for lease in leases)


def age(study: SharedStudy, clock: FakeClock) -> None:
    """As if there had been no sign of life from any worker for an hour, and all was well otherwise."""
    clock.time += 3600.0
    with contextlib.closing(sqlite3.connect(study.storage, timeout=60)) as connection, connection:
        connection.execute("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-1 hour')")


# ---- who runs what --------------------------------------------------------------------------------------


def test_workers_divide_the_total_and_stop_together(memory: InMemoryStorage) -> None:
    with (
        SharedStudy.open("s", SPACE, storage=memory) as one,
        SharedStudy.open("s", SPACE, storage=memory) as two,
    ):
        assert one.pending(5) == 5
        mine, others = one.lease(5, 2), two.lease(5, 9)
        assert [lease.number for lease in mine + others] == [0, 1, 2, 3, 4]
        assert one.lease(5, 1) == two.lease(5, 1) == []
        # Leased is not finished: a worker that finds nothing to lease knows that others are at it.
        assert two.pending(5) == 5
        for lease in others:
            two.finish(lease, 1.0, {})
        assert two.pending(5) == 2
        for lease in mine:
            one.finish(lease, 1.0, {})
        assert one.pending(5) == two.pending(5) == 0
        assert one.lease(5, 1) == []
        # A larger total resumes the study.
        assert [lease.number for lease in one.lease(6, 5)] == [5]


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
    kept, *others = one.lease(6, 3)
    one.release(others, "Ctrl-C")
    assert one.finish(kept, 1.0, {})
    rest = run_all([two, one], 6)
    assert [lease.number for lease in rest] == [3, 4, 5, 6, 7]
    assert drawn([kept, *rest]) == expected


def test_a_grid_is_run_in_row_major_order_each_cell_once(memory: InMemoryStorage) -> None:
    one, two = (SharedStudy.open("s", GRID, storage=memory, sampler="grid") for _ in range(2))
    assert one.pending(100) == 6
    leases = run_all([one, two], 100, at_most=2)
    cells = [(lease.params["lr"], lease.params["layers"]) for lease in leases]
    assert cells == [(0.1, 1), (0.1, 3), (0.2, 1), (0.2, 3), (0.3, 1), (0.3, 3)]
    assert one.pending(100) == 0


def test_a_grid_stops_at_a_smaller_total(memory: InMemoryStorage) -> None:
    study = SharedStudy.open("s", GRID, storage=memory, sampler="grid")
    assert [lease.params["lr"] for lease in run_all([study], 3)] == [0.1, 0.1, 0.2]


def test_a_grid_and_what_the_user_enqueued(memory: InMemoryStorage) -> None:
    study = SharedStudy.open("s", GRID, storage=memory, sampler="grid")
    plain = optuna.load_study(study_name="s", storage=memory)
    plain.enqueue_trial({"lr": 0.2, "layers": 1})
    # Off the grid: of the space, but no cell.
    space = {"lr": CategoricalDistribution([0.1, 0.2, 0.3]), "layers": IntDistribution(1, 3)}
    params = {"lr": 0.1, "layers": 2}
    plain.add_trial(optuna.create_trial(state=TrialState.WAITING, params=params, distributions=space))
    leases = run_all([study], 100)
    cells = [(lease.params["lr"], lease.params["layers"]) for lease in leases]
    assert cells[:2] == [(0.2, 1), (0.1, 2)]
    assert sorted(cells) == sorted([*itertools.product([0.1, 0.2, 0.3], [1, 3]), (0.1, 2)])


def test_a_grid_of_floats_ends_where_it_should(memory: InMemoryStorage) -> None:
    space = {"x": {"low": 0.0, "high": 0.3, "step": 0.1}}
    study = SharedStudy.open("s", space, storage=memory, sampler="grid")
    assert [lease.params["x"] for lease in run_all([study], 100)] == [0.0, 0.1, 0.2, 0.3]


def test_a_grid_over_a_continuum(memory: InMemoryStorage) -> None:
    with pytest.raises(
        ConfigError, match=r"lr: expected finitely many values for a grid, got Float.*; write"
    ):
        SharedStudy.open("s", SPACE, storage=memory, sampler="grid")


def test_enqueued_trials_are_run_first(memory: InMemoryStorage) -> None:
    reported = Reported()
    study = SharedStudy.open("s", SPACE, storage=memory, say=reported)
    plain = optuna.load_study(study_name="s", storage=memory)
    plain.enqueue_trial({"lr": 0.5, "act": "tanh"})
    plain.enqueue_trial({"act": "sine"})
    plain.enqueue_trial({"lr": 0.25})
    leases = run_all([study], 4)
    assert leases[0].params == {"lr": 0.5, "act": "tanh"}
    assert leases[1].params["lr"] == 0.25
    assert len(leases) == 4
    assert reported == ["study 's': trial 1 is dropped: its act = 'sine' is not in the space."]


def test_more_was_stored_than_the_total(memory: InMemoryStorage) -> None:
    study = SharedStudy.open("s", SPACE, storage=memory)
    run_all([study], 4)
    assert study.lease(2, 5) == []
    assert study.pending(2) == 0
    assert study.lease(5, 0) == []


@pytest.mark.parametrize("sampler", ["tpe", "nsgaii", "qmc", "TPE", optuna.samplers.TPESampler(seed=1)])
def test_samplers_of_optuna(sampler: Any, memory: InMemoryStorage) -> None:
    workers = [SharedStudy.open("s", SPACE, storage=memory, sampler=sampler) for _ in range(2)]
    leases = run_all(workers, 6)
    assert len(leases) == 6
    # Workers with the same seed go different ways.
    assert len(set(drawn(leases))) == 6


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
    good, bad, running = study.lease(3, 3)
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


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_a_trial_that_diverged(value: float | None, memory: InMemoryStorage) -> None:
    study = SharedStudy.open("s", SPACE, storage=memory)
    diverged, other = study.lease(2, 2)
    assert study.finish(diverged, value, {"why": "nan"})
    assert study.finish(other, 1e30, {})
    first, second = study.records()
    assert (first.state, first.value, first.diverged, first.attrs) == (
        "complete",
        math.inf,
        True,
        {"why": "nan"},
    )
    assert (second.value, second.diverged) == (1e30, False)
    assert study.pending(2) == 0


def test_the_pruner_says_stop(memory: InMemoryStorage) -> None:
    pruner = optuna.pruners.ThresholdPruner(upper=1.0)
    study = SharedStudy.open("s", SPACE, storage=memory, pruner=pruner)
    low, high, nan = study.lease(3, 3)
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
    (lease,) = study.lease(1, 1)
    assert study.report(lease, 1, 1.0) is False
    assert study.finish(lease, 1.0, {})


def test_an_unknown_pruner(memory: InMemoryStorage) -> None:
    with pytest.raises(ConfigError, match=r"pruner: expected one of 'none', 'asha', .*, got 'best'"):
        SharedStudy.open("s", SPACE, storage=memory, pruner="best")


ASHA = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)


def test_asha_stops_the_worse_of_two(memory: InMemoryStorage) -> None:
    study = SharedStudy.open("s", SPACE, storage=memory, pruner=ASHA)
    good, bad = study.lease(2, 2)
    assert [study.report(good, step, 0.1) for step in (1, 2, 3)] == [False, False, False]
    assert study.report(bad, 1, 9.0) is True


def test_a_trial_is_finished_once_and_by_who_leased_it(memory: InMemoryStorage) -> None:
    one, two = (SharedStudy.open("s", SPACE, storage=memory) for _ in range(2))
    (lease,) = one.lease(1, 1)
    with pytest.raises(ConfigError, match=r"lease: expected a trial that this worker leased .*, got 0"):
        two.finish(lease, 1.0, {})
    assert one.finish(lease, 1.0, {})
    with pytest.raises(ConfigError, match="lease: expected"):
        one.finish(lease, 1.0, {})


def test_attributes_that_json_can_not_hold(memory: InMemoryStorage) -> None:
    study = SharedStudy.open("s", SPACE, storage=memory)
    (lease,) = study.lease(1, 1)
    with pytest.raises(ConfigError, match="attrs: expected what JSON can hold, got set at 'tags'; make it"):
        study.finish(lease, 1.0, {"tags": {1}})
    assert study.finish(lease, 1.0, {})


def test_released_trials_are_run_again_with_the_same_hyperparameters(memory: InMemoryStorage) -> None:
    one, two = (SharedStudy.open("s", SPACE, storage=memory, pruner=ASHA) for _ in range(2))
    done, released = one.lease(2, 2)
    one.report(released, 1, 1.0)
    one.finish(done, 1.0, {})
    one.release([done, released], "Ctrl-C")
    states = [record.state for record in one.records()]
    assert states == ["complete", "failed", "waiting"]
    assert one.records()[1].attrs == {"released": "Ctrl-C"}
    assert one.pending(2) == 1
    (again,) = two.lease(2, 5)
    assert again == Lease(2, released.params)
    # Neither earlier reports nor the pruner's state carry over to the new run.
    trial = memory.get_trial(2)
    assert trial.intermediate_values == {}
    assert not [key for key in trial.system_attrs if key.startswith("completed_rung")]
    assert [key for key in memory.get_trial(1).system_attrs if key.startswith("completed_rung")]
    assert two.finish(again, 1.0, {})
    assert one.pending(2) == 0
    assert one.lease(2, 1) == []


# ---- what a study is started with -------------------------------------------------------------------------


def test_settings_are_kept_and_compared(memory: InMemoryStorage) -> None:
    given = {"task": "mnist-mlp", "width": 64, "betas": (0.9, 0.99)}
    assert SharedStudy.open("s", SPACE, storage=memory, settings=given).settings["betas"] == [0.9, 0.99]
    assert SharedStudy.open("s", SPACE, storage=memory, settings=given).settings["width"] == 64
    assert SharedStudy.load("s", memory).settings["task"] == "mnist-mlp"
    text = r"width: expected 64, with which study 's' was started, got 128; take another study name, or that"
    with pytest.raises(ConfigError, match=text):
        SharedStudy.open("s", SPACE, storage=memory, settings=given | {"width": 128})
    with pytest.raises(ConfigError, match=r"steps: expected nothing, .*, got 9;"):
        SharedStudy.open("s", SPACE, storage=memory, settings=given | {"steps": 9})
    with pytest.raises(ConfigError, match=r"task: expected \"mnist-mlp\", .*, got nothing;"):
        SharedStudy.open("s", SPACE, storage=memory)
    assert SharedStudy.open("t", SPACE, storage=memory, settings={"width": 128}).settings == {"width": 128}


def test_attributes_are_those_of_the_worker_that_started_the_study(memory: InMemoryStorage) -> None:
    first = SharedStudy.open("s", SPACE, storage=memory, attributes={"data": "/mnt", "shape": (1, 2)})
    later = SharedStudy.open("s", SPACE, storage=memory, attributes={"data": "/home"})
    expected = {"data": "/mnt", "shape": [1, 2]}
    assert first.attributes == later.attributes == SharedStudy.load("s", memory).attributes == expected
    assert SharedStudy.open("t", SPACE, storage=memory).attributes == {}


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
    wider = {"lr": {"low": "2**-12", "high": 1.0, "log": True}}
    fewer = {"lr": SPACE["lr"]}
    for other in (
        *({**SPACE, **part} for part in ({"lr": [0.1]}, {"lr": {"low": 0.1, "high": 1.0}}, wider)),
        *({**SPACE, **part} for part in ({"act": ["relu"]}, {"depth": {"low": 1, "high": 3}})),
        fewer,
    ):
        text = r"space: expected lr=0.000976562:1:log, act=relu\|tanh, with which study 's' was started, got "
        with pytest.raises(ConfigError, match=text):
            SharedStudy.open("s", other, storage=memory)
    with pytest.raises(
        ConfigError, match=r"got lr=0.000976562:1:log; take another study name, or that space"
    ):
        SharedStudy.open("s", fewer, storage=memory)
    # The order is no difference, nor is another way of writing it.
    same = {"act": ("relu", "tanh"), "lr": optuna.distributions.FloatDistribution(2.0**-10, 1.0, log=True)}
    assert SharedStudy.open("s", same, storage=memory).pending(2) == 1


def test_another_space_than_that_of_the_trials_of_a_study_of_0_3(memory: InMemoryStorage) -> None:
    """Its space is not stored, but each of its trials has it."""
    plain = optuna.create_study(study_name="s", storage=memory)
    plain.set_user_attr("mujax", {})
    plain.add_trial(
        optuna.create_trial(value=1.0, params={"x": 2.0}, distributions={"x": FloatDistribution(1.0, 4.0)})
    )
    assert SharedStudy.open("s", {"x": {"low": 1.0, "high": 4.0}}, storage=memory).pending(2) == 1
    text = "space: expected x=1:4, with which study 's' was started, got x=1:5; take another study name"
    with pytest.raises(ConfigError, match=text):
        SharedStudy.open("s", {"x": {"low": 1.0, "high": 5.0}}, storage=memory)


@pytest.mark.parametrize("name", ["", "  ", "s (claiming)", "s" * 500])
def test_a_name_that_can_not_be(name: str, memory: InMemoryStorage) -> None:
    with pytest.raises(ConfigError, match="study: expected a name of 1 to 400 characters"):
        SharedStudy.open(name, SPACE, storage=memory)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"heartbeat": 0}, "heartbeat_timeout: expected more than the heartbeat of 0 s"),
        (
            {"heartbeat": 10, "heartbeat_timeout": 5},
            "heartbeat_timeout: expected more than the heartbeat of 10 s, got 5 s; take 3",
        ),
        ({"patience": -1}, "patience: expected a number of seconds, got -1"),
        ({"heartbeat": math.nan}, "heartbeat: expected a number of seconds, got nan"),
        ({"settings": {"model": object()}}, "settings: expected what JSON can hold, got object at 'model'"),
        ({"attributes": {"data": {1}}}, "attributes: expected what JSON can hold, got set at 'data'"),
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
    with pytest.raises(ConfigError, match=r"study: expected 's' in .*none\.db, got no such file"):
        SharedStudy.load("s", tmp_path / "none.db")
    assert not (tmp_path / "none.db").exists()


def test_a_study_opened_to_read_leases_nothing(memory: InMemoryStorage) -> None:
    SharedStudy.open("s", SPACE, storage=memory)
    with pytest.raises(ConfigError, match="lease: expected a study opened with its space"):
        SharedStudy.load("s", memory).lease(1, 1)


def test_optuna_is_as_it_was(memory: InMemoryStorage) -> None:
    before = optuna.logging.get_verbosity()
    run_all([SharedStudy.open("s", SPACE, storage=memory)], 1)
    assert optuna.logging.get_verbosity() == before


# ---- one worker at a time -------------------------------------------------------------------------------


def test_the_lock_of_a_dead_worker_is_taken_away(memory: InMemoryStorage, clock: FakeClock) -> None:
    study = SharedStudy.open("s", SPACE, storage=memory)
    optuna.create_study(study_name="s (claiming)", storage=memory).set_user_attr("owner", "dead")
    before = clock.time
    assert len(study.lease(9, 1)) == 1
    assert clock.time > before + 30.0
    assert optuna.get_all_study_names(memory) == ["s"]


@pytest.mark.parametrize("total", [4, 6])
def test_a_worker_that_lost_the_lock_takes_nothing_from_others(
    total: int, memory: InMemoryStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, quick = (SharedStudy.open("s", SPACE, storage=memory) for _ in range(2))
    start, others = slow._trials.start, []

    def interrupted(number: int) -> Any:
        trial = start(number)
        if not others:
            # Asleep for so long that another worker considers it dead.
            others.extend(quick.lease(total, 3))
        return trial

    monkeypatch.setattr(slow._trials, "start", interrupted)
    mine = slow.lease(total, 3)
    numbers = [lease.number for lease in mine + others]
    assert len(numbers) == len(set(numbers))
    assert len(set(drawn(mine + others))) == len(numbers) <= total
    for worker, leases in ((slow, mine), (quick, others)):
        for lease in leases:
            assert worker.finish(lease, 1.0, {})
    expected = drawn(run_all([SharedStudy.open("s", SPACE, storage=InMemoryStorage())], total))
    rest = run_all([quick], total)
    assert drawn(mine + others + rest) == expected
    assert optuna.get_all_study_names(memory) == ["s"]


# Filters of warnings belong to the process: a worker in a thread sees those of another.
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_many_workers_at_once_exceed_nothing(memory: InMemoryStorage, threads: None) -> None:
    workers = [SharedStudy.open("s", SPACE, storage=memory) for _ in range(4)]
    done: list[list[Lease]] = [[] for _ in workers]

    def work(at: int) -> None:
        while leases := workers[at].lease(12, 2):
            done[at] += leases

    started = [threading.Thread(target=work, args=(at,)) for at in range(4)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join(timeout=60)
    numbers = [lease.number for leases in done for lease in leases]
    assert sorted(numbers) == list(range(12))


# ---- signs of life --------------------------------------------------------------------------------------


class Database(InMemoryStorage, BaseHeartbeat):
    """A storage that keeps signs of life as a database does, by the clock, and whose connection may break."""

    def __init__(self, clock: FakeClock, breaks: Callable[[], bool] = lambda: False) -> None:
        super().__init__()
        self.clock, self.signs, self.breaks, self.depth = clock, {}, breaks, 0

    def record_heartbeat(self, trial_id: int) -> None:
        self.signs[trial_id] = self.clock.time

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        running = self.get_all_trials(study_id, deepcopy=False, states=[TrialState.RUNNING])
        ids = [self.get_trial_id_from_study_id_trial_number(study_id, trial.number) for trial in running]
        return [known for known in ids if self.clock.time - self.signs.get(known, math.inf) > 180.0]

    def get_heartbeat_interval(self) -> int:
        return 60

    def get_heartbeat_stale_trial_callback(self) -> Any:
        return run_again

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not name.startswith(("create_", "set_", "delete_", "record_", "get_all_trials")):
            return found

        def over_the_connection(*args: Any, **kwargs: Any) -> Any:
            outermost = not self.depth
            if outermost and self.breaks():
                raise lost()
            self.depth += 1
            try:
                result = found(*args, **kwargs)
            finally:
                self.depth -= 1
            # The answer is lost: the worker can't know that it was done.
            if outermost and self.breaks():
                raise lost()
            return result

        return over_the_connection


def lost() -> sqlalchemy.exc.OperationalError:
    return sqlalchemy.exc.OperationalError("", None, Exception("server closed the connection"))


def test_trials_of_a_dead_worker_are_run_again_once(tmp_path: pathlib.Path, clock: FakeClock) -> None:
    reported = Reported()
    with (
        SharedStudy.open("s", SPACE, storage=tmp_path / "s.db", say=reported) as dead,
        SharedStudy.open("s", SPACE, storage=tmp_path / "s.db") as other,
    ):
        gone, done = dead.lease(2, 2)
        dead.finish(done, 1.0, {})
        assert other.lease(2, 2) == []
        age(other, clock)
        # The twin: alive, since its thread has just given a sign of life.
        dead._opened.heartbeat.beat()
        assert other.lease(2, 2) == []
        assert other.records()[0].state == "running"
        age(other, clock)
        (again,) = other.lease(2, 2)
        assert again.number == 2
        assert again.params == gone.params
        clock.time += 100.0
        assert other.lease(2, 2) == []
        # It was not dead, only slow: what it has is dropped, with a word.
        assert dead.report(gone, 1, 1.0) is True
        assert dead.finish(gone, 0.5, {}) is False
        assert len(reported) == 1
        assert reported[0].startswith("study 's': trial 0 was taken away, since there was no sign of life")
        assert other.finish(again, 2.0, {})
        assert other.pending(2) == 0
        assert [record.state for record in other.records()] == ["failed", "complete", "complete"]
        dead.release([gone], "Ctrl-C")
        assert len(other.records()) == 3


def test_a_worker_killed_while_it_leased_leaves_nothing_stuck(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    database = Database(clock)
    with (
        SharedStudy.open("s", SPACE, storage=database, sampler="tpe") as dead,
        SharedStudy.open("s", SPACE, storage=database, sampler="tpe") as other,
    ):
        # After the trial began to run, before it has all hyperparameters.
        monkeypatch.setattr(optuna.samplers.TPESampler, "sample_independent", killed)
        monkeypatch.setattr(dead._opened.lock, "_delete", lambda _: None)
        with pytest.raises(Killed):
            dead.lease(1, 1)
        monkeypatch.undo()
        assert other.lease(1, 1) == []
        clock.time += 3600.0
        (lease,) = other.lease(1, 1)
        assert set(lease.params) == set(SPACE)
        assert other.finish(lease, 1.0, {})
        assert other.pending(1) == 0


def test_leases_are_kept_alive_until_the_study_is_closed(clock: FakeClock) -> None:
    def beating() -> int:
        return sum(thread.name == "heartbeat of s" for thread in threading.enumerate())

    study = SharedStudy.open("s", SPACE, storage=Database(clock))
    assert beating() == 0
    leases = study.lease(3, 3)
    assert beating() == 1
    assert len(study._opened.heartbeat.beating) == 3
    assert study.finish(leases[0], 1.0, {})
    assert len(study._opened.heartbeat.beating) == 2
    study.close()
    assert beating() == 0
    assert study._opened.heartbeat.beating == ()
    study.release(leases[1:2], "closed")
    assert beating() == 0


# ---- the database ---------------------------------------------------------------------------------------


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

    sqlalchemy.event.listen(study._connection.storage.engine, "connect", connected)
    yield off
    off()


def test_a_full_disk_that_is_freed(tmp_path: pathlib.Path) -> None:
    reported, freed = Reported(), []
    say = lambda text: (reported(text), freed[0]())  # noqa: E731
    with SharedStudy.open("s", SPACE, storage=tmp_path / "s.db", patience=600, say=say) as study:
        (lease,) = study.lease(1, 1)
        with pragma(study, "PRAGMA max_page_count = 1") as off:
            freed.append(off)
            assert study.finish(lease, 1.0, {"curve": [0.5] * 100_000})
        assert len(reported) == 2
        assert reported[0] == (
            "study 's': the database is full (database or disk is full); results are kept and written when "
            "it is back, trying for 600 s."
        )
        assert reported[1].startswith("study 's': the database is back after")
        assert study.records()[0].attrs == {"curve": [0.5] * 100_000}


def test_patience_ends_and_the_study_stays(tmp_path: pathlib.Path) -> None:
    reported = Reported()
    with SharedStudy.open("s", SPACE, storage=tmp_path / "s.db", patience=3, say=reported) as study:
        first, second = study.lease(2, 2)
        assert study.finish(first, 1.0, {})
        text = r"study 's': .*s\.db can't be written for \d+ s \(.*\); make the file .* the study resumes"
        with pragma(study, "PRAGMA query_only = 1"), pytest.raises(StudyError, match=text):
            study.finish(second, 2.0, {"curve": [0.5] * 100_000})
        assert len(reported) == 1
        # Still this worker's: it can be stored when there is room.
        assert study.finish(second, 2.0, {})
        assert [record.value for record in study.records()] == [1.0, 2.0]


def test_there_is_no_patience_until_the_study_is_open(clock: FakeClock) -> None:
    reported = Reported()
    with pytest.raises(StudyError, match=r"Database can't be reached \(server closed the connection\);"):
        SharedStudy.open("s", SPACE, storage=Database(clock, lambda: True), patience=300, say=reported)
    assert (reported, clock.time) == ([], 1000.0)


def check_nothing_is_lost(workers: list[SharedStudy], clock: FakeClock, grow_old: Callable[[], None]) -> None:
    """Six trials, each of them run once; who finds none left waits for those of the dead."""
    done = []
    for worker, at_most in itertools.islice(itertools.cycle(zip(workers, (2, 1), strict=True)), 100):
        leases = worker.lease(6, at_most)
        for lease in leases:
            assert worker.report(lease, 1, 1.0) is False
            assert worker.finish(lease, float(lease.number), {"lr": lease.params["lr"]})
        done += leases
        if not worker.pending(6):
            break
        # A trial that began to run as the connection broke is nobody's: it is found in time.
        if not leases:
            grow_old()
    complete = [record for record in workers[0].records() if record.state == "complete"]
    assert len(done) == len(complete) == 6
    assert {record.number for record in complete} == {lease.number for lease in done}
    assert all(record.intermediate == {1: 1.0} for record in complete)
    assert all(record.attrs == {"lr": record.params["lr"]} for record in complete)
    if workers[0]._trials.sampling.drawn(0):
        assert drawn(done) == drawn(run_all([SharedStudy.open("s", SPACE, storage=InMemoryStorage())], 6))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_nothing_is_lost_or_run_twice_over_a_connection_that_breaks(
    seed: int, sampler: str, clock: FakeClock
) -> None:
    reported, rng, rate = Reported(), random.Random(seed), 0.0
    database = Database(clock, lambda: rng.random() < rate)

    def grow_old() -> None:
        clock.time += 3600.0

    workers = [
        SharedStudy.open("s", SPACE, storage=database, sampler=sampler, patience=1e9, say=reported)
        for _ in range(2)
    ]
    rate = 0.05
    check_nothing_is_lost(workers, clock, grow_old)
    assert any("server closed the connection" in text for text in reported)
    for worker in workers:
        worker.close()


def test_nothing_is_lost_or_run_twice_over_a_database_that_breaks(
    tmp_path: pathlib.Path, clock: FakeClock
) -> None:
    reported, rng = Reported(), random.Random(0)

    def unreliable(study: SharedStudy) -> None:
        dialect = study._connection.storage.engine.dialect
        commit = dialect.do_commit

        def do_commit(connection: Any) -> None:
            if rng.random() < 0.05:
                raise lost()
            commit(connection)
            if rng.random() < 0.05:
                raise lost()

        dialect.do_commit = do_commit

    with (
        SharedStudy.open("s", SPACE, storage=tmp_path / "s.db", patience=1e9, say=reported) as one,
        SharedStudy.open("s", SPACE, storage=tmp_path / "s.db", patience=1e9, say=reported) as two,
    ):
        for worker in (one, two):
            unreliable(worker)
        check_nothing_is_lost([one, two], clock, lambda: age(one, clock))
    assert any("server closed the connection" in text for text in reported)


def test_a_study_that_somebody_deleted(memory: InMemoryStorage) -> None:
    study = SharedStudy.open("s", SPACE, storage=memory)
    optuna.delete_study(study_name="s", storage=memory)
    with pytest.raises(
        StudyError, match="study 's': expected it in InMemoryStorage, got none: it was deleted"
    ):
        study.records()


def test_workers_that_start_together_create_one_database(tmp_path: pathlib.Path, threads: None) -> None:
    failures: list[BaseException] = []

    def start(width: int) -> None:
        try:
            with SharedStudy.open("s", SPACE, storage=tmp_path / "s.db", settings={"width": width}):
                pass
        except BaseException as error:
            failures.append(error)

    started = [threading.Thread(target=start, args=(width,)) for width in (1, 1, 1, 2)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join(timeout=120)
    # The one with other settings, or the three if it was first.
    assert len(failures) in (1, 3)
    assert all(isinstance(error, ConfigError) and "width: expected" in str(error) for error in failures)


def test_mujax_is_imported_without_optuna() -> None:
    code = "import sys, mujax; sys.exit('optuna' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
