"""A lock in the study's own storage: one worker at a time hands out trials."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Final

from optuna.exceptions import DuplicatedStudyError, StorageInternalError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection

from mujax.tune.study._clock import Clock
from mujax.tune.study._database import database_error, may_pass

# Older workers of a study use these names.
SUFFIX: Final = " (claiming)"
_OWNER: Final = "owner"

# Seconds without a sign of life after which the worker that holds the lock is considered dead.
TIMEOUT: Final = 30.0


class Lock:
    """A study of Optuna's as a lock: of all workers that try to create it, one succeeds.

    That is public API and the same on every storage. It is safe without being a perfect lock: a worker that
    was considered dead finds, before it runs anything, that the lock no longer carries its token, and settles
    its leases again. Two workers whose check succeeds held the lock one after the other: the second counted
    the trials of the first.
    """

    def __init__(self, storage: BaseStorage, study: str, clock: Clock, timeout: float = TIMEOUT) -> None:
        self._storage = storage
        self._name = study + SUFFIX
        self._clock = clock
        self._timeout = timeout
        # The lock as last seen, and since when.
        self._seen: tuple[tuple[int, str] | None, float] = (None, 0.0)

    def run_alone(self, token: str, operation: Callable[[], object]) -> bool:
        """Runs an operation while no other worker holds the lock.

        Args:
            token: different for each use of the lock. With the token of an attempt that lost its connection,
                the lock of that attempt is kept.
            operation: called with the lock held.

        Returns:
            False if another worker considered this one dead meanwhile, and took the lock.
        """
        mine = (self._acquire(token), token)
        try:
            operation()
        except BaseException as error:
            inner = database_error(error)
            if inner is None or not may_pass(inner):
                with contextlib.suppress(Exception):
                    if self._holder() == mine:
                        self._delete(mine[0])
            raise
        kept = self._holder() == mine
        if kept:
            self._delete(mine[0])
        return kept

    def _holder(self) -> tuple[int, str] | None:
        """The id and the token of the lock; None if it is free."""
        try:
            lock_id = self._storage.get_study_id_from_name(self._name)
            return lock_id, self._storage.get_study_user_attrs(lock_id).get(_OWNER, "")
        except KeyError:
            return None

    def _acquire(self, token: str) -> int:
        while True:
            holder = self._holder()
            if holder is None:
                try:
                    made = self._storage.create_new_study([StudyDirection.MINIMIZE], self._name)
                    self._storage.set_study_user_attr(made, _OWNER, token)
                    self._seen = None, 0.0
                    return made
                except (DuplicatedStudyError, KeyError):
                    # Another was first, or considered this one dead at once.
                    pass
            elif holder[1] == token:
                # This worker's, from before it lost the connection.
                return holder[0]
            elif holder != self._seen[0]:
                # SQLite gives the same id again and again: the token distinguishes two holders.
                self._seen = holder, self._clock.now()
            elif self._clock.now() - self._seen[1] > self._timeout:
                self._delete(holder[0])
            self._clock.sleep(random.uniform(0.02, 0.2))

    def _delete(self, lock_id: int) -> None:
        try:
            self._storage.delete_study(lock_id)
        except KeyError:
            pass
        except StorageInternalError as error:
            # Two workers that delete the same one.
            if may_pass(database_error(error) or error):
                raise
