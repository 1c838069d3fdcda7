"""Operations while a database is away: repeated, reported, given up. By a clock that nobody waits for."""

from __future__ import annotations

from collections.abc import Callable

import optuna
import pytest
import sqlalchemy.exc
from optuna.storages import InMemoryStorage
from trials import FakeClock

from mujax.errors import StudyError
from mujax.tune.study._connection import Connection
from mujax.tune.study._database import LONGEST_PAUSE


class Reported(list):
    """What was reported."""

    def __call__(self, text: str) -> None:
        self.append(text)


@pytest.fixture
def reported() -> Reported:
    return Reported()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def connection(reported: Reported, clock: FakeClock) -> Connection:
    made = Connection("s", InMemoryStorage(), "the database's address", say=reported, clock=clock)
    made.patience = 300.0
    return made


def lost(text: str = "connection refused") -> sqlalchemy.exc.OperationalError:
    return sqlalchemy.exc.OperationalError("", None, Exception(text))


def away(clock: FakeClock, until: float, error: Callable[[], Exception] = lost) -> Callable[[], str]:
    def operation() -> str:
        if clock.time < until:
            raise error()
        return "done"

    return operation


def test_what_succeeds_is_done_once(connection: Connection, reported: Reported, clock: FakeClock) -> None:
    calls: list[int] = []
    assert connection.persist(lambda: calls.append(1) or "done") == "done"
    assert (calls, reported, clock.time) == ([1], [], 1000.0)


def test_what_fails_is_repeated_until_the_database_is_back(
    connection: Connection, reported: Reported, clock: FakeClock
) -> None:
    clock.time = 0.0
    assert connection.persist(away(clock, 100.0)) == "done"
    assert reported[0] == (
        "study 's': the database can't be reached (connection refused); results are kept and written when "
        "it is back, trying for 300 s."
    )
    assert reported[1] == f"study 's': the database is back after {clock.time:.0f} s."
    assert len(reported) == 2
    # Looked at every few seconds, to the end.
    assert 100.0 <= clock.time <= 100.0 + LONGEST_PAUSE
    assert 100.0 - LONGEST_PAUSE <= connection.lost_at < 100.0


def test_pauses_grow_and_differ_among_workers(connection: Connection, clock: FakeClock) -> None:
    pauses: list[float] = []
    sleep = clock.sleep
    clock.sleep = lambda seconds: (pauses.append(seconds), sleep(seconds))
    connection.persist(away(clock, 1100.0))
    for pause, longest in zip(pauses, [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, *[LONGEST_PAUSE] * 99], strict=False):
        assert longest / 2 <= pause <= longest
    assert len(set(pauses)) == len(pauses)


@pytest.mark.parametrize(
    ("text", "means", "remedy"),
    [
        ("database or disk is full", "is full", "free space on its disk"),
        ("No space left on device", "is full", "free space on the server's disk"),
        ("attempt to write a readonly database", "can't be written", "make the file and its folder writable"),
        ("database is locked", "is locked", "end the program that keeps it locked"),
        ("connection refused", "can't be reached", "start the server, or check host and port"),
        ("server closed the connection", "can't be reached", "see that the server runs"),
    ],
)
def test_patience_ends(
    text: str, means: str, remedy: str, connection: Connection, reported: Reported, clock: FakeClock
) -> None:
    expected = (
        rf"^study 's': the database's address {means} for 30\d s \({text}\); {remedy}.*, then run the same "
        r"command again: stored results are kept, and the study resumes from there\.$"
    )
    with pytest.raises(StudyError, match=expected):
        connection.persist(away(clock, 2000.0, lambda: lost(text)))
    assert 1300.0 <= clock.time <= 1300.0 + LONGEST_PAUSE
    assert len(reported) == 1
    # What was given up can be done later, and the next outage gets all the patience.
    clock.time = 1990.0
    assert connection.persist(away(clock, 2000.0)) == "done"
    assert len(reported) == 3


def test_without_patience_at_once(connection: Connection, reported: Reported, clock: FakeClock) -> None:
    connection.patience = 0.0
    with pytest.raises(StudyError, match=r"the database's address can't be reached \(connection refused\);"):
        connection.persist(away(clock, 2000.0))
    assert (reported, clock.time) == ([], 1000.0)


def test_an_error_that_does_not_pass_is_not_repeated(
    connection: Connection, reported: Reported, clock: FakeClock
) -> None:
    error = sqlalchemy.exc.DatabaseError("", None, Exception("database disk image is malformed"))
    with pytest.raises(StudyError, match=r"address can't be read \(.*malformed\); restore the file"):
        connection.persist(away(clock, 2000.0, lambda: error))
    assert (reported, clock.time) == ([], 1000.0)


def test_an_error_of_something_else_is_not_touched(
    connection: Connection, reported: Reported, clock: FakeClock
) -> None:
    for error in (ValueError("mine"), ZeroDivisionError()):
        with pytest.raises(type(error)) as caught:
            connection.persist(away(clock, 2000.0, lambda error=error: error))
        assert caught.value is error
    assert (reported, clock.time) == ([], 1000.0)
    assert connection.lost_at == 1000.0


def test_a_study_that_somebody_deleted(connection: Connection) -> None:
    optuna.create_study(study_name="s", storage=connection.storage)
    connection.study_id = connection.storage.get_study_id_from_name("s")

    def missing() -> None:
        raise KeyError("something else")

    # It is there: the error is about something else.
    with pytest.raises(KeyError, match="something else"):
        connection.persist(missing)
    optuna.delete_study(study_name="s", storage=connection.storage)
    text = (
        r"^study 's': expected it in the database's address, got none: it was deleted; run the same "
        r"command again to start a new one\.$"
    )
    with pytest.raises(StudyError, match=text):
        connection.persist(missing)
    # Another of the same name is not the same.
    optuna.create_study(study_name="s", storage=connection.storage)
    with pytest.raises(StudyError, match=text):
        connection.persist(missing)


def test_what_is_reported_names_the_study(connection: Connection, reported: Reported) -> None:
    connection.say("something")
    assert reported == ["study 's': something"]
    # Nobody listens.
    Connection("s", InMemoryStorage(), "here").say("something")


def test_a_worker_just_started_can_not_know_since_when_the_database_is_there(
    connection: Connection, clock: FakeClock
) -> None:
    assert connection.lost_at == 1000.0
    clock.time = 1100.0
    connection.mark_lost()
    assert connection.lost_at == 1100.0
