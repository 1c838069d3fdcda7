"""The leases of workers: each slot is run once, whoever dies, sleeps or loses the connection meanwhile.

The trials are in a list, and the clock moves when a worker sleeps. A worker's operations are cut into steps
on the list and on the lock: before and after each of them another worker can act, the connection can break,
and the worker can die.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
import threading
import unittest.mock
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import sqlalchemy.exc
from optuna.distributions import CategoricalDistribution
from optuna.storages import InMemoryStorage
from trials import FakeClock

from mujax.errors import ConfigError, StudyError
from mujax.tune.study import _connection
from mujax.tune.study._connection import Connection
from mujax.tune.study._leases import Lease, Leases
from mujax.tune.study._lock import Lock
from mujax.tune.study._queue import Entry, Queue, State

TIMEOUT = 180.0


class Killed(BaseException):
    """What ends a worker at once."""


def lost() -> sqlalchemy.exc.OperationalError:
    return sqlalchemy.exc.OperationalError("", None, Exception("server closed the connection"))


class Table:
    """The trials of a study, as `Trials` gives access to them."""

    def __init__(self) -> None:
        self.sampling = SimpleNamespace(space={}, grid=None)
        self.clock = FakeClock()
        self.locks = InMemoryStorage()
        self.stored: list[Entry] = []
        self.signs: dict[int, float] = {}
        self.reasons: dict[int, str] = {}
        self.workers: list[Worker] = []

    def entries(self) -> list[Entry]:
        return list(self.stored)

    def entry(self, number: int) -> Entry:
        return self.stored[number]

    def id_of(self, number: int) -> int:
        return number

    def set_state(self, number: int, state: State) -> None:
        self.stored[number] = dataclasses.replace(self.stored[number], state=state)

    def add(self, slot: int | None, **fields: Any) -> int:
        self.stored.append(Entry(len(self.stored), fields.pop("state", "waiting"), slot=slot, **fields))
        return len(self.stored) - 1

    def fail(self, number: int) -> None:
        if self.stored[number].state in ("waiting", "running"):
            self.set_state(number, "failed")

    def release(self, number: int, why: str) -> None:
        self.reasons[number] = why
        self.fail(number)

    def run_again(self, number: int) -> None:
        old = self.stored[number]
        self.add(old.slot, first=number if old.first is None else old.first, enqueued=old.enqueued)

    def start(self, number: int) -> Any:
        """As Optuna's `ask`: starts the first of the queue, or a new trial where there is none."""
        waiting = [entry.number for entry in self.stored if entry.state == "waiting"]
        given = waiting[0] if waiting else self.add(None)
        self.set_state(given, "running")
        if given == number:
            return SimpleNamespace(number=number, params={})
        self.fail(given)
        if waiting:
            self.run_again(given)
        return None

    def fail_stale(self) -> None:
        for worker in self.workers:
            if worker.state == "alive":
                self.signs |= dict.fromkeys(worker.beating, self.clock.time)
        for entry in self.entries():
            signed = self.signs.get(entry.number)
            if entry.state == "running" and signed is not None and self.clock.time - signed > TIMEOUT:
                self.fail(entry.number)
                self.run_again(entry.number)


class Steps:
    """Calls a worker's `step` before and after each operation on something."""

    def __init__(self, on: Any, step: Callable[[], None]) -> None:
        self._on, self._step = on, step

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._on, name)
        if not callable(found):
            return found

        def call(*args: Any) -> Any:
            self._step()
            result = found(*args)
            self._step()
            return result

        return call


class Worker:
    """A worker with leases of its own, and its heartbeat."""

    interval, timeout = 60.0, TIMEOUT

    def __init__(self, table: Table, step: Callable[[Worker], None] = lambda _: None) -> None:
        self.table = table
        # "asleep" for so long that it looks dead.
        self.state = "alive"
        self.beating: tuple[int, ...] = ()
        self.reported: list[str] = []
        self.open: dict[int, Lease] = {}

        def look() -> None:
            if self.state == "dead":
                raise Killed
            step(self)

        connection = Connection("s", InMemoryStorage(), "here", say=self.reported.append, clock=table.clock)
        connection.patience = 1e9
        self.connection = connection
        lock = Lock(Steps(table.locks, look), "s", table.clock)
        self.leases = Leases(connection, Steps(table, look), lock, self)
        table.workers.append(self)

    def sign(self, number: int) -> None:
        self.table.signs[number] = self.table.clock.time

    def keep_alive(self, numbers: Any) -> None:
        self.beating = tuple(numbers)

    def start(self) -> None:
        """There is no thread: `Table.fail_stale` looks at the state."""

    def lease(self, total: int, at_most: int) -> list[Lease]:
        leases = self.leases.take(total, at_most)
        self.open |= {lease.number: lease for lease in leases}
        return leases

    def finish(self) -> list[Entry]:
        """Finishes all it has, and returns what counts."""
        done = []
        for number in list(self.open):
            lease = self.open.pop(number)
            self.leases.held(lease)
            if self.table.stored[number].state == "running":
                self.table.set_state(number, "complete")
                done.append(self.table.stored[number])
            else:
                self.leases.say_taken_away(number)
            self.leases.drop(number)
        return done

    def release(self) -> None:
        leases, self.open = list(self.open.values()), {}
        self.leases.put_back(leases, "Ctrl-C")


@pytest.fixture
def table() -> Table:
    return Table()


def slots(table: Table, leases: list[Lease]) -> list[int | None]:
    return [table.stored[lease.number].slot for lease in leases]


# ---- leases ---------------------------------------------------------------------------------------------


def test_workers_divide_the_slots(table: Table) -> None:
    one, two = Worker(table), Worker(table)
    assert slots(table, one.lease(5, 2)) == [0, 1]
    assert slots(table, two.lease(5, 9)) == [2, 3, 4]
    assert one.lease(5, 1) == two.lease(5, 1) == []
    assert one.lease(6, 0) == []
    assert slots(table, one.lease(7, 9)) == [5, 6]
    assert one.beating == (0, 1, 5, 6)


def test_leases_that_are_put_back_are_run_by_another(table: Table) -> None:
    one, two = Worker(table), Worker(table)
    kept, *_ = one.lease(3, 3)
    del one.open[kept.number]
    one.release()
    assert [entry.state for entry in table.stored] == ["running", "failed", "failed", "waiting", "waiting"]
    assert table.reasons == {1: "Ctrl-C", 2: "Ctrl-C"}
    assert one.beating == (kept.number,)
    assert slots(table, two.lease(3, 9)) == [1, 2]
    # Nothing is left to put back.
    one.release()
    assert len(table.stored) == 5


def test_a_trial_that_another_runs_already_is_not_put_back(table: Table) -> None:
    slow, other = Worker(table), Worker(table)
    slow.lease(1, 1)
    slow.state = "asleep"
    table.clock.time += 2 * TIMEOUT
    assert slots(table, other.lease(1, 1)) == [0]
    slow.release()
    assert [entry.state for entry in table.stored] == ["failed", "running"]


def test_trials_of_a_dead_worker_are_run_again_once(table: Table) -> None:
    slow, other = Worker(table), Worker(table)
    slow.lease(2, 1)
    slow.state = "asleep"
    table.clock.time += TIMEOUT / 2
    assert slots(table, other.lease(2, 9)) == [1]
    table.clock.time += TIMEOUT
    assert slots(table, other.lease(2, 9)) == [0]
    table.clock.time += TIMEOUT
    assert other.lease(2, 9) == []
    # It was not dead, only slow: what it has is dropped, and it is reported once.
    assert slow.finish() == []
    assert slow.reported == [
        "study 's': trial 0 was taken away, since there was no sign of life from this worker for 180 s; "
        "it is run again, and this result is dropped."
    ]
    assert len(other.finish()) == 2


def test_twin_trials_of_a_worker_that_is_alive_are_left_alone(table: Table) -> None:
    alive, other = Worker(table), Worker(table)
    alive.lease(1, 1)
    table.clock.time += 10 * TIMEOUT
    assert other.lease(1, 1) == []
    assert len(alive.finish()) == 1
    assert alive.reported == []


def test_after_an_outage_the_others_get_the_time_to_be_seen(table: Table) -> None:
    dead, other = Worker(table), Worker(table)
    dead.lease(1, 1)
    dead.state = "asleep"
    table.clock.time += 2 * TIMEOUT
    other.connection.mark_lost()
    table.clock.time += 29.0
    assert other.lease(1, 1) == []
    table.clock.time += 1.5
    assert slots(table, other.lease(1, 1)) == [0]


def test_an_enqueued_value_that_is_not_in_the_space(table: Table) -> None:
    table.sampling.space["act"] = CategoricalDistribution(["relu"])
    table.start = lambda number: (
        table.set_state(number, "running"),
        SimpleNamespace(number=number, params={"act": "relu"}),
    )[1]
    table.add(None, enqueued={"act": "sine"})
    table.add(None, enqueued={"act": "relu", "beside": object()})
    worker = Worker(table)
    assert worker.lease(2, 2) == [Lease(1, {"act": "relu"})]
    assert worker.reported == ["study 's': trial 0 is dropped: its act = 'sine' is not in the space."]


def test_a_lease_that_is_not_held(table: Table) -> None:
    one, two = Worker(table), Worker(table)
    (lease,) = one.lease(1, 1)
    text = "lease: expected a trial that this worker leased and has not finished, got 0"
    with pytest.raises(ConfigError, match=text):
        two.leases.held(lease)
    one.finish()
    with pytest.raises(ConfigError, match=text):
        one.leases.held(lease)


def test_a_lease_that_failed_is_not_kept_alive(table: Table) -> None:
    worker = Worker(table)
    worker.connection.patience = 0.0
    sign, fails = worker.sign, [True]

    def start(number: int) -> Any:
        trial = Table.start(table, number)
        if fails.pop():
            fails.append(False)
            return trial
        raise lost()

    fails[:] = [False, True]
    table.start = start
    with pytest.raises(StudyError, match=r"here can't be reached \(server closed the connection\)"):
        worker.lease(2, 2)
    assert worker.sign == sign
    assert worker.beating == ()
    # Found to be stale, and run again.
    del table.start
    table.clock.time += 2 * TIMEOUT
    assert sorted(slots(table, worker.lease(2, 2))) == [0, 1]


# ---- interrupted ----------------------------------------------------------------------------------------


def before_next(table: Table, operation: str, action: Callable[[], object]) -> None:
    """Does something before the next operation on the table, of a worker that has the lock in its hands."""
    original = getattr(table, operation)

    def interrupted(*args: Any) -> Any:
        setattr(table, operation, original)
        action()
        return original(*args)

    setattr(table, operation, interrupted)


@pytest.mark.parametrize("total", [4, 6])
@pytest.mark.parametrize("operation", ["add", "start"])
def test_a_worker_that_lost_the_lock_takes_nothing_from_others(
    operation: str, total: int, table: Table
) -> None:
    slow, quick = Worker(table), Worker(table)
    # Asleep for so long that another worker considers it dead.
    before_next(table, operation, lambda: quick.lease(total, 3))
    slow.lease(total, 3)
    both = slots(table, [*slow.open.values(), *quick.open.values()])
    assert quick.open
    assert len(both) == len(set(both)) <= total
    slow.finish()
    quick.finish()
    rest = slots(table, quick.lease(total, 9))
    assert sorted(both + rest) == list(range(total))


def test_twin_a_worker_that_does_not_look_again_takes_what_others_run(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Queue, "surplus", lambda *_: [])
    slow, quick = Worker(table), Worker(table)
    before_next(table, "add", lambda: quick.lease(4, 4))
    slow.lease(4, 3)
    assert set(slots(table, list(slow.open.values()))) & set(slots(table, list(quick.open.values())))


class Turns:
    """Workers in threads of which one runs at a time: what happens at each of their steps is given."""

    def __init__(self, table: Table, events: list[int], total: int, count: int) -> None:
        self.table, self.events, self.total = table, iter(events), total
        self.finished: list[Entry] = []
        self.workers = [Worker(table, self.step) for _ in range(count)]
        self.turns = [threading.Semaphore(0) for _ in self.workers]
        self.over = threading.Semaphore(0)
        self.left = list(range(count))
        self.errors: list[BaseException] = []

    def run(self, programs: list[list[tuple[str, int]]]) -> None:
        threads = [
            threading.Thread(target=self.work, args=(at, program), daemon=True)
            for at, program in enumerate(programs)
        ]
        for thread in threads:
            thread.start()
        self.turns[0].release()
        assert self.over.acquire(timeout=60)
        for thread in threads:
            thread.join(timeout=60)
        for error in self.errors:
            raise error

    def work(self, at: int, program: list[tuple[str, int]]) -> None:
        self.turns[at].acquire()
        try:
            for action, at_most in program:
                self.act(self.workers[at], action, at_most)
                self.check()
        except Killed:
            self.workers[at].open = {}
        except BaseException as error:
            self.errors.append(error)
        self.left.remove(at)
        (self.turns[self.left[0]] if self.left else self.over).release()

    def step(self, worker: Worker) -> None:
        """Nothing, a fault, or the turn of another worker."""
        event = next(self.events, 0)
        if event == 1:
            raise lost()
        if event == 2:
            worker.state = "dead"
            raise Killed
        if event == 3:
            self.table.clock.time += TIMEOUT
        at, following = self.workers.index(worker), event - 4
        if following != at and following in self.left:
            self.turns[following].release()
            self.turns[at].acquire()

    def act(self, worker: Worker, action: str, at_most: int) -> None:
        if action == "lease":
            worker.lease(self.total, at_most)
        elif action == "finish":
            self.finished += worker.finish()
            worker.state = "alive"
        elif action == "release":
            worker.release()
        elif action == "sleep":
            worker.state = "asleep"
        else:
            worker.state = "dead"
            raise Killed

    def check(self) -> None:
        """No two workers were given one trial, but for those that are considered dead."""
        given = [
            self.table.stored[number].identity
            for worker in self.workers
            for number in worker.open
            if self.table.stored[number].state == "running" and worker.state == "alive"
        ]
        done = [entry.identity for entry in self.finished]
        assert len(set(given + done)) == len(given + done), "a slot was handed out twice"

    def drain(self) -> None:
        """All goes well from now on."""
        self.events = iter(())
        for worker in self.workers:
            if worker.state != "dead":
                self.finished += worker.finish()
                worker.state = "alive"
        last = Worker(self.table)
        for _ in itertools.takewhile(lambda _: last.leases.queue(self.total).pending, range(50)):
            self.table.clock.time += 2 * TIMEOUT
            last.lease(self.total, 3)
            self.finished += last.finish()


def run_through(programs: list[list[tuple[str, int]]], events: list[int], total: int) -> None:
    """Lets workers act as given, then another finish the rest; each slot must have been run once."""
    turns = Turns(table := Table(), events, total, len(programs))
    # What it silences is global.
    with unittest.mock.patch.object(_connection, "quiet", contextlib.nullcontext):
        turns.run(programs)
        turns.drain()
    assert sorted(entry.slot for entry in turns.finished) == list(range(total))
    # One row in the table each, and nobody left waiting.
    complete = [entry.slot for entry in table.stored if entry.state == "complete"]
    assert sorted(complete) == list(range(total))


ACTIONS = ["lease"] * 6 + ["finish"] * 3 + ["release", "sleep", "die"]
# A step of a worker: nothing, a lost connection, a death, a pause, or the turn of worker 0, 1 or 2.
EVENTS, WEIGHTS = range(7), [30, 2, 0.5, 1, 5, 5, 5]


@hypothesis.given(st.integers(0, 2**32), st.integers(1, 8))
@hypothesis.settings(deadline=None)
def test_every_slot_is_run_exactly_once(seed: int, total: int) -> None:
    rng = random.Random(seed)
    programs = [[(rng.choice(ACTIONS), rng.randint(1, 4)) for _ in range(8)] for _ in range(3)]
    run_through(programs, rng.choices(EVENTS, WEIGHTS, k=1000), total)


@pytest.mark.parametrize("fault", ["surplus", "start"])
def test_twin_a_faulty_worker_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def starts_any(table: Table, _: int) -> Any:
        waiting = [entry.number for entry in table.stored if entry.state == "waiting"]
        given = waiting[0] if waiting else table.add(None)
        table.set_state(given, "running")
        return SimpleNamespace(number=given, params={})

    if fault == "surplus":
        monkeypatch.setattr(Queue, "surplus", lambda *_: [])
    else:
        monkeypatch.setattr(Table, "start", starts_any)
    with pytest.raises((AssertionError, TypeError)):
        _ = [test_every_slot_is_run_exactly_once.hypothesis.inner_test(seed, 5) for seed in range(300)]
