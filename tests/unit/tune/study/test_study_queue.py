"""The queue of a study: which trials are next, free or one too many. No database, no sleep, no worker."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import hypothesis
import hypothesis.strategies as st
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from mujax.tune.study._queue import Entry, Grid, Queue, State, is_sweep_due
from mujax.tune.study._samplers import Sampling
from mujax.tune.study._trials import entry_of, retry_of, slot_of

GRID = Grid({"lr": [0.1, 0.2, 0.3], "layers": range(1, 4, 2)})


def entries(*states: State, first_slot: int = 0) -> list[Entry]:
    """Trials that fill consecutive slots."""
    return [Entry(number, state, slot=first_slot + number) for number, state in enumerate(states)]


# ---- counts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("states", "total", "free", "pending"),
    [
        ((), 3, 3, 3),
        (("running", "complete"), 3, 1, 2),
        # Stored, and not taken yet: neither more nor less is free.
        (("running", "complete", "waiting"), 3, 1, 2),
        # A failed trial does not count: its slot is free again.
        (("failed", "complete", "pruned"), 3, 1, 1),
        (("complete", "complete", "pruned"), 3, 0, 0),
        # Started with a larger total.
        (("complete", "complete", "running"), 1, -2, 0),
        (("waiting", "waiting"), 1, 1, 1),
    ],
)
def test_what_is_free_and_what_is_pending(
    states: tuple[State, ...], total: int, free: int, pending: int
) -> None:
    queue = Queue(entries(*states), total)
    assert (queue.limit, queue.free, queue.pending) == (total, free, pending)


def test_waiting_trials_by_number() -> None:
    queue = Queue(entries("waiting", "running", "failed", "waiting"), 4)
    assert [entry.number for entry in queue.waiting] == [0, 3]
    assert [entry.number for entry in queue.live] == [0, 1, 3]


def test_the_next_slots_are_the_first_that_no_live_trial_fills() -> None:
    stored = [
        Entry(0, "complete", slot=0),
        Entry(1, "failed", slot=1),
        Entry(2, "running", slot=3),
        # The user's own trial fills no slot.
        Entry(3, "waiting"),
    ]
    assert Queue(stored, 9).next_slots(3) == [1, 2, 4]
    assert Queue(stored, 9).next_slots(0) == Queue(stored, 9).next_slots(-2) == []
    assert Queue([], 9).next_slots(2) == [0, 1]


# ---- a grid ---------------------------------------------------------------------------------------------


def test_the_cells_of_a_grid_are_in_row_major_order() -> None:
    cells = [tuple(GRID.params(cell).values()) for cell in range(len(GRID))]
    assert cells == [(0.1, 1), (0.1, 3), (0.2, 1), (0.2, 3), (0.3, 1), (0.3, 3)]
    assert list(GRID.params(0)) == ["lr", "layers"]


def test_a_cell_is_found_by_its_hyperparameters() -> None:
    assert [GRID.cell_of(GRID.params(cell)) for cell in range(6)] == list(range(6))
    assert GRID.cell_of({"layers": 3, "lr": 0.2}) == 3
    for beside in ({"lr": 0.1, "layers": 2}, {"lr": 0.1}, {}, {"lr": 0.15, "layers": 1}):
        assert GRID.cell_of(beside) is None


def test_a_value_that_is_none_is_not_one_that_is_missing() -> None:
    grid = Grid({"clip": [None, 1.0]})
    assert grid.cell_of({"clip": None}) == 0
    assert grid.cell_of({}) is None


def test_a_grid_has_no_more_trials_than_cells() -> None:
    assert Queue([], 100, GRID).limit == Queue([], 100, GRID).pending == 6
    assert Queue([], 4, GRID).limit == 4


def test_a_trial_off_the_grid_takes_the_place_of_no_cell() -> None:
    on, off = Entry(0, "complete", GRID.params(2)), Entry(1, "complete", {"lr": 0.1, "layers": 2})
    queue = Queue([on, off], 100, GRID)
    assert (queue.limit, queue.free, queue.pending) == (7, 5, 5)
    # The user enqueued cell 2: it is not run again.
    assert queue.next_slots(queue.free) == [0, 1, 3, 4, 5]
    # One that failed takes no place at all.
    assert Queue([dataclasses.replace(off, state="failed")], 100, GRID).limit == 6
    assert Queue([on, off], 5, GRID).limit == 5


# ---- trials that are one too many -----------------------------------------------------------------------


def test_nothing_is_surplus_among_different_trials() -> None:
    assert Queue(entries("complete", "running", "waiting"), 3).surplus([1]) == []


def test_a_trial_stored_twice_is_surplus_while_it_waits() -> None:
    twice = [Entry(0, "waiting", slot=0), Entry(1, "waiting", slot=0)]
    assert Queue(twice, 5).surplus([]) == [1]
    # The one that runs is kept, whichever number it has.
    twice = [Entry(0, "waiting", slot=0), Entry(1, "running", slot=0)]
    assert Queue(twice, 5).surplus([]) == [0]


def test_of_two_that_run_the_one_of_this_worker_is_surplus() -> None:
    twice = [Entry(0, "running", slot=0), Entry(1, "running", slot=0)]
    assert Queue(twice, 5).surplus([0]) == [0]
    assert Queue(twice, 5).surplus([1]) == [1]
    assert Queue(twice, 5).surplus([0, 1]) == [1]
    # Never a trial that another worker runs.
    assert Queue(twice, 5).surplus([]) == []


def test_the_last_taken_are_surplus_beyond_the_limit() -> None:
    queue = Queue(entries("running", "complete", "running", "running"), 2)
    assert queue.surplus([]) == []
    assert queue.surplus([2, 3]) == [2, 3]
    assert queue.surplus([0, 2, 3]) == [2, 3]
    assert Queue(queue.entries, 3).surplus([2, 3]) == [3]


def test_what_is_surplus_twice_is_counted_once() -> None:
    stored = [*entries("running", "running", "running"), Entry(3, "running", slot=2)]
    # Trial 3 repeats trial 2, and only one of the rest is too many.
    assert Queue(stored, 2).surplus([0, 1, 3]) == [3, 1]


def test_a_retry_takes_the_place_of_the_failed_trial() -> None:
    enqueued = [Entry(0, "failed"), Entry(1, "waiting", first=0), Entry(2, "waiting", first=0)]
    assert Queue(enqueued, 5).surplus([]) == [2]
    # Trial 1 in its own right, and a retry of trial 0.
    assert Entry(1, "waiting").identity != Entry(2, "waiting", first=0).identity
    # A slot is not the number of a trial.
    assert Entry(0, "waiting", slot=1).identity != Entry(1, "waiting").identity


def test_the_queue_without_some_trials() -> None:
    queue = Queue(entries("running", "waiting", "waiting"), 5, GRID)
    rest = queue.without([1])
    assert [entry.number for entry in rest.entries] == [0, 2]
    assert (rest.total, rest.grid) == (5, GRID)


# ---- stale leases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lost_at", "swept_at", "due"),
    [
        (0.0, -math.inf, True),
        # The others may not have reached the database yet.
        (86.0, -math.inf, False),
        (85.0, -math.inf, True),
        # This worker has just looked.
        (0.0, 96.0, False),
        (0.0, 95.0, True),
        (-math.inf, -math.inf, True),
    ],
)
def test_when_to_look_for_stale_leases(lost_at: float, swept_at: float, due: bool) -> None:
    assert is_sweep_due(100.0, lost_at=lost_at, swept_at=swept_at, settling=15.0, heartbeat=10.0) is due


# ---- trials and their retries ---------------------------------------------------------------------------

SPACE = {"lr": FloatDistribution(0.1, 1.0), "act": CategoricalDistribution(["relu", "tanh"])}


def stored(trial: FrozenTrial, number: int, state: TrialState = TrialState.FAIL) -> FrozenTrial:
    """The trial as a database returns it."""
    trial.number, trial.state = number, state
    return trial


def test_a_new_trial_has_the_hyperparameters_of_its_slot() -> None:
    sampling = Sampling(SPACE, "random", seed=3)
    trial = slot_of(sampling, 5)
    assert trial.params == sampling.drawn(5) == Sampling(SPACE, "random", seed=3).drawn(5)
    assert trial.params != slot_of(sampling, 4).params
    assert trial.params != slot_of(Sampling(SPACE, "random", seed=4), 5).params
    assert entry_of(stored(trial, 9, TrialState.WAITING)) == Entry(9, "waiting", trial.params, slot=5)


def test_a_sampler_that_looks_at_the_study_draws_nothing_in_advance() -> None:
    trial = slot_of(Sampling(SPACE, "tpe", seed=0), 5)
    assert trial.params == {}
    assert entry_of(stored(trial, 0)).slot == 5


def test_a_slot_of_a_grid_is_a_cell() -> None:
    space = {"lr": CategoricalDistribution([0.1, 0.2]), "layers": IntDistribution(1, 3)}
    sampling = Sampling(space, "grid", seed=0)
    assert [slot_of(sampling, cell).params for cell in (0, 5)] == [
        {"lr": 0.1, "layers": 1},
        {"lr": 0.2, "layers": 3},
    ]
    assert Sampling(space, "random", seed=0).grid is None


def test_a_retry_runs_the_same_hyperparameters_in_the_same_slot() -> None:
    trial = stored(slot_of(Sampling(SPACE, "random", seed=0), 5), 7)
    trial.set_user_attr("released", "Ctrl-C")
    trial.set_user_attr("diverged", True)
    trial.set_user_attr("mine", 1)
    trial.system_attrs["completed_rung_0"] = 1.0
    trial.intermediate_values = {1: 0.5}
    again = retry_of(trial)
    assert again.state == TrialState.WAITING
    assert again.params == trial.params
    # What was reported before is not part of the new run, nor what the pruner made of it.
    assert again.intermediate_values == {}
    assert again.user_attrs == {"mine": 1}
    assert again.system_attrs == {"mujax:slot": 5, "failed_trial": 7, "retry_history": [7]}
    twice = retry_of(stored(again, 8))
    assert twice.system_attrs == {"mujax:slot": 5, "failed_trial": 7, "retry_history": [7, 8]}
    assert {entry_of(each).identity for each in (trial, again, twice)} == {("slot", 5)}


def test_a_retry_of_a_trial_that_the_user_enqueued() -> None:
    trial = optuna.create_trial(state=TrialState.WAITING, system_attrs={"fixed_params": {"lr": 0.5}})
    again = retry_of(stored(trial, 4))
    assert entry_of(stored(again, 6)) == Entry(6, "failed", {"lr": 0.5}, {"lr": 0.5}, first=4)
    assert entry_of(again).identity == entry_of(trial).identity == ("trial", 4)


def test_a_retry_of_a_value_outside_its_distribution() -> None:
    # Optuna warns when such a trial is enqueued, and runs it.
    trial = optuna.create_trial(state=TrialState.WAITING, system_attrs={"fixed_params": {"lr": 9.0}})
    trial.params, trial.distributions = {"lr": 9.0}, {"lr": SPACE["lr"]}
    again = retry_of(stored(trial, 4))
    assert again.params == {}
    assert entry_of(again).enqueued == {"lr": 9.0}


# ---- every slot once ------------------------------------------------------------------------------------


class Table:
    """Trials as a database keeps them, and workers that lease them one after the other."""

    def __init__(self, total: int, grid: Grid | None = None) -> None:
        self.total, self.grid = total, grid
        self.stored: list[Entry] = []
        self.running: dict[int, list[int]] = {}
        self.handed_out: list[tuple[str, int]] = []

    @property
    def queue(self) -> Queue:
        return Queue(self.stored, self.total, self.grid)

    def set_state(self, number: int, state: State) -> None:
        self.stored[number] = dataclasses.replace(self.stored[number], state=state)

    def add(self, slot: int) -> None:
        params: Any = {} if self.grid is None else self.grid.params(slot)
        self.stored.append(Entry(len(self.stored), "waiting", params, slot=slot))

    def lease(self, worker: int, at_most: int) -> None:
        for number in self.queue.surplus([]):
            self.set_state(number, "failed")
        want = max(0, min(at_most, self.queue.free))
        for slot in self.queue.next_slots(want - len(self.queue.waiting)):
            self.add(slot)
        for entry in self.queue.waiting[:want]:
            self.set_state(entry.number, "running")
            self.running.setdefault(worker, []).append(entry.number)

    def finish(self, worker: int) -> None:
        for number in self.running.pop(worker, []):
            self.set_state(number, "complete")
            self.handed_out.append(self.stored[number].identity)

    def die(self, worker: int) -> None:
        """Its trials are found to be stale, or put back, and are run again under a new number."""
        for number in self.running.pop(worker, []):
            self.set_state(number, "failed")
            old = self.stored[number]
            first = number if old.first is None else old.first
            self.stored.append(
                dataclasses.replace(old, number=len(self.stored), state="waiting", first=first)
            )

    def store_twice(self, _worker: int) -> None:
        """The connection was lost before the database answered: the last trial is stored again."""
        if self.stored and self.stored[-1].state == "waiting":
            self.stored.append(dataclasses.replace(self.stored[-1], number=len(self.stored)))

    def enqueue(self, _worker: int) -> None:
        """The user adds a trial."""
        self.stored.append(Entry(len(self.stored), "waiting", {"lr": 9.0, "layers": len(self.stored)}))

    def run(self, actions: list[tuple[str, int, int]]) -> None:
        for name, worker, at_most in actions:
            if name == "lease":
                self.lease(worker, at_most)
            else:
                getattr(self, name)(worker)
            live = [entry.identity for entry in self.queue.live if entry.state != "waiting"]
            assert len(live) == len(set(live)), "two workers run one trial"
            assert len(live) <= max(self.total, self.queue.limit)

    def drain(self) -> None:
        """Workers that never die finish the rest."""
        for worker in list(self.running):
            self.finish(worker)
        for _ in range(3 * self.total + len(self.stored)):
            self.lease(0, 2)
            self.finish(0)
        assert self.queue.pending == 0


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["lease", "lease", "finish", "die", "store_twice", "enqueue"]),
        st.integers(0, 3),
        st.integers(1, 4),
    ),
    max_size=40,
)


def check_each_once(table: Table, limit: int) -> None:
    """So many trials in all, each once; each slot unless a trial of the user's took its place."""
    assert len(table.handed_out) == limit
    assert len(set(table.handed_out)) == limit
    slots = {number for kind, number in table.handed_out if kind == "slot"}
    assert slots <= set(range(limit))
    if len(slots) == limit:
        assert slots == set(range(limit))


@hypothesis.given(ACTIONS, st.integers(0, 12), st.booleans())
@hypothesis.settings(deadline=None)
def test_every_slot_is_handed_out_exactly_once(
    actions: list[tuple[str, int, int]], total: int, enqueues: bool
) -> None:
    table = Table(total)
    table.run([action for action in actions if enqueues or action[0] != "enqueue"])
    table.drain()
    check_each_once(table, total)
    assert enqueues or {kind for kind, _ in table.handed_out} <= {"slot"}


@hypothesis.given(ACTIONS, st.integers(0, 12), st.booleans())
@hypothesis.settings(deadline=None)
def test_every_cell_is_handed_out_exactly_once(
    actions: list[tuple[str, int, int]], total: int, enqueues: bool
) -> None:
    table = Table(total, GRID)
    table.run([action for action in actions if enqueues or action[0] != "enqueue"])
    table.drain()
    # What the user enqueued off the grid does not count among the cells.
    check_each_once(table, min(total, 6 + sum(entry.slot is None for entry in table.queue.live)))
    assert enqueues or {kind for kind, _ in table.handed_out} <= {"slot"}


def test_twin_a_queue_that_knows_no_surplus_hands_a_slot_out_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    table, actions = Table(4), [("lease", 0, 1), ("die", 0, 0), ("store_twice", 0, 0), ("lease", 1, 3)]
    table.run(actions)
    monkeypatch.setattr(Queue, "surplus", lambda *_: [])
    with pytest.raises(AssertionError, match="two workers run one trial"):
        Table(4).run(actions)


def test_twin_a_retry_that_forgets_its_slot_hands_a_slot_out_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets(table: Table, worker: int) -> None:
        die(table, worker)
        table.stored[-1] = dataclasses.replace(table.stored[-1], slot=None)

    def handed_out() -> list[tuple[str, int]]:
        table = Table(2)
        table.run([("lease", 0, 1), ("die", 0, 0), ("lease", 1, 2)])
        table.drain()
        return sorted(table.handed_out)

    assert handed_out() == [("slot", 0), ("slot", 1)]
    die = Table.die
    monkeypatch.setattr(Table, "die", forgets)
    assert handed_out() == [("slot", 0), ("trial", 0)]


def test_the_interleaving_of_workers_does_not_change_the_slots() -> None:
    for workers in itertools.permutations(range(3)):
        table = Table(6)
        table.run([("lease", worker, 2) for worker in workers])
        assert [entry.slot for entry in table.stored] == list(range(6))
