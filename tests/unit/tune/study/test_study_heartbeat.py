"""Signs of life: given for each lease, whatever the database does. One test waits for the thread."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from optuna.storages import InMemoryStorage

from mujax.tune.study._database import LONGEST_PAUSE
from mujax.tune.study._heartbeat import Heartbeat


class Recorder(InMemoryStorage):
    """A storage that notes signs of life, and can be away."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[int] = []
        self.away: set[int] = set()
        self.beaten = threading.Event()

    def record_heartbeat(self, trial_id: int) -> None:
        if trial_id in self.away:
            raise ConnectionError("away")
        self.recorded.append(trial_id)
        if len(self.recorded) >= 6:
            self.beaten.set()


@pytest.fixture
def storage() -> Recorder:
    return Recorder()


def heartbeat(storage: Any, interval: float = 60.0) -> tuple[Heartbeat, list[str]]:
    failures: list[str] = []
    on_failure = lambda: failures.append("lost")  # noqa: E731
    return Heartbeat(storage, "s", interval=interval, timeout=180.0, on_failure=on_failure), failures


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "heartbeat of s"]


def test_a_sign_of_life_for_each_trial_that_is_kept_alive(storage: Recorder) -> None:
    heart, failures = heartbeat(storage)
    assert heart.beat() == 60.0
    assert storage.recorded == []
    heart.beating = (3, 5)
    assert heart.beat() == 60.0
    assert storage.recorded == [3, 5]
    heart.beating = (5,)
    heart.beat()
    heart.sign(9)
    assert storage.recorded == [3, 5, 5, 9]
    assert failures == []


@pytest.mark.parametrize(("interval", "pause"), [(60.0, LONGEST_PAUSE), (1.0, 1.0)])
def test_a_sign_of_life_that_can_not_be_stored_is_given_again_soon(
    interval: float, pause: float, storage: Recorder
) -> None:
    heart, failures = heartbeat(storage, interval)
    heart.beating = (3, 5)
    storage.away = {3, 5}
    assert heart.beat() == pause
    # The others would fail as well.
    assert failures == ["lost"]
    storage.away = {5}
    assert heart.beat() == pause
    storage.away = set()
    assert heart.beat() == interval
    assert storage.recorded == [3, 3, 5]
    assert failures == ["lost", "lost"]


def test_a_sign_of_life_of_its_own_raises(storage: Recorder) -> None:
    heart, failures = heartbeat(storage)
    storage.away = {3}
    with pytest.raises(ConnectionError):
        heart.sign(3)
    assert failures == []


def test_the_thread_beats_until_it_is_stopped(storage: Recorder) -> None:
    heart, failures = heartbeat(storage, 0.001)
    storage.away = {7}
    heart.keep_alive([3, 7])
    assert threads() == []
    heart.start()
    heart.start()
    heart.keep_alive([3, 4])
    assert threads() == ["heartbeat of s"]
    assert storage.beaten.wait(30)
    heart.stop()
    assert threads() == []
    assert heart.beating == ()
    assert {3} <= set(storage.recorded) <= {3, 4}
    assert set(failures) <= {"lost"}
    # Once more, for a study that is used again.
    heart.start()
    assert threads() == ["heartbeat of s"]
    heart.stop()
    # What is dropped after the end starts nothing.
    heart.keep_alive([3])
    heart.stop()
    assert threads() == []


def test_a_storage_that_ends_with_its_worker_gets_no_signs_of_life() -> None:
    heart, failures = heartbeat(InMemoryStorage())
    heart.keep_alive([3])
    heart.start()
    assert threads() == []
    heart.sign(3)
    assert heart.beat() == 60.0
    assert failures == []
    heart.stop()
