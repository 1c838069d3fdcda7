"""The lock of a study: one worker at a time, and dead ones do not keep it. Nobody waits for the clock."""

from __future__ import annotations

from collections.abc import Callable

import optuna
import pytest
import sqlalchemy.exc
from optuna.exceptions import StorageInternalError
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from trials import FakeClock

from mujax.tune.study._lock import TIMEOUT, Lock

NAME = "s (claiming)"


@pytest.fixture
def memory() -> InMemoryStorage:
    return InMemoryStorage()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def held(storage: InMemoryStorage) -> str | None:
    """Whose token the lock carries."""
    try:
        return storage.get_study_user_attrs(storage.get_study_id_from_name(NAME)).get("owner", "")
    except KeyError:
        return None


def take(storage: InMemoryStorage, owner: str | None) -> None:
    """As another worker would."""
    lock_id = storage.create_new_study([StudyDirection.MINIMIZE], NAME)
    if owner is not None:
        storage.set_study_user_attr(lock_id, "owner", owner)


def free(storage: InMemoryStorage) -> None:
    storage.delete_study(storage.get_study_id_from_name(NAME))


def fails(error: BaseException) -> Callable[[], None]:
    def operation() -> None:
        raise error

    return operation


def lost() -> sqlalchemy.exc.OperationalError:
    return sqlalchemy.exc.OperationalError("", None, Exception("server closed the connection"))


def test_the_lock_is_held_during_the_operation_only(memory: InMemoryStorage, clock: FakeClock) -> None:
    seen: list[str | None] = []
    assert Lock(memory, "s", clock).run_alone("mine", lambda: seen.append(held(memory)))
    assert seen == ["mine"]
    assert held(memory) is None
    # Nobody was in the way.
    assert clock.time == 1000.0


def test_a_worker_waits_for_the_lock(memory: InMemoryStorage, clock: FakeClock) -> None:
    take(memory, "other")
    sleep, seen = clock.sleep, []

    def until_free(seconds: float) -> None:
        sleep(seconds)
        if clock.time > 1010.0 and held(memory):
            free(memory)

    clock.sleep = until_free
    assert Lock(memory, "s", clock).run_alone("mine", lambda: seen.append(clock.time))
    assert 1010.0 < seen[0] < 1011.0


@pytest.mark.parametrize("owner", ["dead", None])
def test_the_lock_of_a_dead_worker_is_taken_away(
    owner: str | None, memory: InMemoryStorage, clock: FakeClock
) -> None:
    take(memory, owner)
    assert Lock(memory, "s", clock).run_alone("mine", lambda: None)
    assert TIMEOUT < clock.time - 1000.0 < TIMEOUT + 1.0
    assert held(memory) is None


def test_the_lock_is_not_taken_from_workers_that_take_turns(
    memory: InMemoryStorage, clock: FakeClock
) -> None:
    take(memory, "0")
    sleep, freed = clock.sleep, []

    def turns(seconds: float) -> None:
        sleep(seconds)
        turn = int((clock.time - 1000.0) / (0.9 * TIMEOUT))
        if turn < 5 and held(memory):
            # SQLite gives each lock the same id.
            memory.set_study_user_attr(memory.get_study_id_from_name(NAME), "owner", str(turn))
        elif held(memory):
            free(memory)
            freed.append(clock.time)

    clock.sleep = turns
    assert Lock(memory, "s", clock).run_alone("mine", lambda: None)
    # It was never considered dead, although the lock was held for several times as long.
    assert len(freed) == 1
    assert freed[0] >= 1000.0 + 4.5 * TIMEOUT


def test_a_worker_that_lost_the_lock_learns_it(memory: InMemoryStorage, clock: FakeClock) -> None:
    def taken_away() -> None:
        free(memory)
        take(memory, "other")

    assert not Lock(memory, "s", clock).run_alone("mine", taken_away)
    # The other's lock is left alone.
    assert held(memory) == "other"
    free(memory)
    assert not Lock(memory, "s", clock).run_alone("mine", lambda: free(memory))


def test_an_operation_that_fails_frees_the_lock(memory: InMemoryStorage, clock: FakeClock) -> None:
    with pytest.raises(ZeroDivisionError):
        Lock(memory, "s", clock).run_alone("mine", fails(ZeroDivisionError()))
    assert held(memory) is None

    def taken_away() -> None:
        free(memory)
        take(memory, "other")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Lock(memory, "s", clock).run_alone("mine", taken_away)
    assert held(memory) == "other"


def test_after_a_lost_connection_the_same_token_finds_its_lock(
    memory: InMemoryStorage, clock: FakeClock
) -> None:
    lock = Lock(memory, "s", clock)
    with pytest.raises(sqlalchemy.exc.OperationalError):
        lock.run_alone("mine", fails(lost()))
    # Kept, as the attempt will be repeated.
    assert held(memory) == "mine"
    assert lock.run_alone("mine", lambda: None)
    assert clock.time == 1000.0
    assert held(memory) is None
    # The twin: with another token it waits.
    with pytest.raises(sqlalchemy.exc.OperationalError):
        lock.run_alone("mine", fails(lost()))
    assert lock.run_alone("another", lambda: None)
    assert clock.time > 1000.0 + TIMEOUT


def test_two_workers_that_create_the_lock_at_once(
    memory: InMemoryStorage, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, sleep = memory.create_new_study, clock.sleep
    order: list[str] = []

    def second(directions: list[StudyDirection], name: str) -> int:
        if not order:
            order.append("other")
            memory.set_study_user_attr(create(directions, name), "owner", "other")
        return create(directions, name)

    def finished(seconds: float) -> None:
        sleep(seconds)
        if held(memory) == "other":
            free(memory)

    clock.sleep = finished
    monkeypatch.setattr(memory, "create_new_study", second)
    assert Lock(memory, "s", clock).run_alone("mine", lambda: order.append(str(held(memory))))
    assert order == ["other", "mine"]


def test_two_workers_that_delete_one_lock(
    memory: InMemoryStorage, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    delete = memory.delete_study

    def second(lock_id: int) -> None:
        delete(lock_id)
        delete(lock_id)

    monkeypatch.setattr(memory, "delete_study", second)
    take(memory, "dead")
    assert Lock(memory, "s", clock).run_alone("mine", lambda: None)
    assert optuna.get_all_study_names(memory) == []


@pytest.mark.parametrize("passes", [True, False])
def test_a_database_that_refuses_to_delete_the_lock(
    passes: bool, memory: InMemoryStorage, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    delete = memory.delete_study

    def refuses(lock_id: int) -> None:
        delete(lock_id)
        conflict = sqlalchemy.exc.IntegrityError("", None, Exception("two workers delete one row"))
        raise StorageInternalError from (lost() if passes else conflict)

    monkeypatch.setattr(memory, "delete_study", refuses)
    lock = Lock(memory, "s", clock)
    if passes:
        # The connection repeats it.
        with pytest.raises(StorageInternalError):
            lock.run_alone("mine", lambda: None)
    else:
        assert lock.run_alone("mine", lambda: None)
