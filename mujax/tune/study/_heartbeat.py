"""Heartbeats: signs of life that keep the leases of this worker from becoming stale."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from optuna.storages import BaseStorage, RDBStorage

from mujax.tune.study._database import LONGEST_PAUSE


class Heartbeat:
    """Gives a sign of life for each leased trial, from a separate thread.

    Attributes:
        interval: seconds between two signs of life.
        timeout: seconds without one after which a lease is stale.
        beating: ids in the storage of the trials that are kept alive.
    """

    def __init__(
        self,
        storage: BaseStorage,
        name: str,
        *,
        interval: float,
        timeout: float,
        on_failure: Callable[[], None],
    ) -> None:
        """For a study.

        Args:
            storage: where signs of life are stored. Only a database keeps them: an in-memory storage, which
                ends with its worker, gets none.
            name: of the study.
            interval: seconds between two signs of life.
            timeout: seconds without one after which a lease is stale.
            on_failure: called when a sign of life could not be stored.
        """
        self.interval = interval
        self.timeout = timeout
        # Read by the thread: replaced, never changed.
        self.beating: tuple[int, ...] = ()
        self._storage = storage
        self._name = name
        self._record: Callable[[int], None] | None = getattr(storage, "record_heartbeat", None)
        self._on_failure = on_failure
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def sign(self, trial_id: int) -> None:
        """Gives a sign of life for one trial."""
        if self._record is not None:
            self._record(trial_id)

    def keep_alive(self, trial_ids: Iterable[int]) -> None:
        """Replaces the trials that are kept alive."""
        self.beating = tuple(trial_ids)

    def start(self) -> None:
        """Starts the thread, unless it runs."""
        if self._thread is None and self._record is not None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._run, name=f"heartbeat of {self._name}", daemon=True)
            self._thread.start()

    def beat(self) -> float:
        """Gives a sign of life for each trial that is kept alive.

        Returns:
            Seconds until the next ones are due: fewer if these could not be stored.
        """
        for trial_id in self.beating:
            try:
                self.sign(trial_id)
            except Exception:
                # Whatever the error, the thread must not end: the trials would be taken away. The worker
                # reports it to the user when it needs the database.
                self._on_failure()
                return min(self.interval, LONGEST_PAUSE)
        return self.interval

    def stop(self) -> None:
        """Ends the signs of life."""
        self._stop.set()
        self.beating = ()
        if self._thread is not None:
            self._thread.join(timeout=LONGEST_PAUSE)
            self._thread = None

    def _run(self) -> None:
        pause = self.interval
        while not self._stop.wait(pause):
            pause = self.beat()
        if isinstance(self._storage, RDBStorage):
            self._storage.remove_session()
