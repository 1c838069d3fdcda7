"""The connection to a study's database: operations are repeated while the database is away."""

from __future__ import annotations

import contextlib
import math
import pathlib
import random
from collections.abc import Callable, Iterator
from typing import Self, TypeVar

import optuna
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial

from mujax.errors import ConfigError, StudyError
from mujax.tune.study._clock import Clock
from mujax.tune.study._database import (
    LONGEST_PAUSE,
    begin_immediate,
    check_file,
    connect,
    database_error,
    fault_of,
    first_line,
    may_pass,
    quiet,
    shown_as,
    url_of,
)

T = TypeVar("T")


class Connection:
    """The database of one study, which may be away for a while.

    Attributes:
        name: of the study.
        storage: where it is stored.
        shown: the address, to print: without its password.
        study_id: of the study in its storage, once it is known.
        patience: seconds to wait for a database that is away; none until the study is open.
        lost_at: when the database was last found to be away, by the clock.
    """

    def __init__(
        self,
        name: str,
        storage: BaseStorage,
        shown: str,
        *,
        owned: bool = False,
        say: Callable[[str], None] | None = None,
        clock: Clock | None = None,
    ) -> None:
        """For a storage that is open.

        Args:
            name: of the study.
            storage: where it is stored.
            shown: its address, to print.
            owned: `close` closes the storage.
            say: takes a message for the user.
            clock: the clock of the waits.
        """
        self.name = name
        self.storage = storage
        self.shown = shown
        self.study_id: int | None = None
        self.patience = 0.0
        self.clock = clock or Clock()
        # A worker just started cannot know since when the database can be reached.
        self.lost_at = self.clock.now()
        self._owned = owned
        self._say = say

    @classmethod
    def to_work(
        cls,
        name: str,
        storage: str | pathlib.Path | BaseStorage | None,
        *,
        say: Callable[[str], None] | None,
        heartbeat: float,
        heartbeat_timeout: float,
        on_stale: Callable[[optuna.Study, FrozenTrial], None],
    ) -> Self:
        """Opens a database to work on a study, and creates its tables.

        Args:
            name: of the study.
            storage: a file, an address, or an open storage; None is the default file.
            say: takes a message for the user.
            heartbeat: seconds between two signs of life of a worker.
            heartbeat_timeout: seconds without one after which its trials are stale.
            on_stale: called with each stale trial once it has failed.
        """
        if isinstance(storage, BaseStorage):
            return cls(name, storage, type(storage).__name__, say=say)
        url = url_of(storage)
        shown = shown_as(url)
        opened = connect(
            url,
            shown,
            heartbeat_interval=math.ceil(heartbeat),
            grace_period=math.ceil(heartbeat_timeout),
            heartbeat_stale_trial_callback=on_stale,
        )
        if url.get_backend_name() == "sqlite":
            begin_immediate(opened.engine)
        return cls(name, opened, shown, owned=True, say=say)

    @classmethod
    def to_read(cls, name: str, storage: str | pathlib.Path | BaseStorage | None) -> Self:
        """Opens a database to read a study; creates no file."""
        if isinstance(storage, BaseStorage):
            return cls(name, storage, type(storage).__name__)
        url = url_of(storage)
        shown = shown_as(url)
        if url.get_backend_name() == "sqlite" and not check_file(url, shown):
            raise ConfigError(where="study", expected=f"{name!r} in {shown}", got="no such file")
        return cls(name, connect(url, shown), shown, owned=True)

    def close(self) -> None:
        """Closes the storage, unless the user opened it."""
        if self._owned and isinstance(self.storage, RDBStorage):
            self.storage.remove_session()
            self.storage.engine.dispose()

    @contextlib.contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """Closes the storage if its use raises."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def say(self, text: str) -> None:
        """Reports something to the user."""
        if self._say is not None:
            self._say(f"study {self.name!r}: {text}")

    def mark_lost(self) -> None:
        """Notes that the database is away now."""
        self.lost_at = self.clock.now()

    def persist(self, operation: Callable[[], T]) -> T:
        """Runs an operation on the database, repeated while that can help.

        Args:
            operation: may have run although its answer was lost, so it must read before it writes.

        Raises:
            StudyError: the database was away for too long, or cannot be used; or the study was deleted.
        """
        lost_since: float | None = None
        pause = 0.1
        while True:
            try:
                with quiet():
                    result = operation()
                break
            except Exception as error:
                now = self.clock.now()
                inner = database_error(error)
                if inner is None:
                    if isinstance(error, KeyError) and self._is_deleted():
                        raise StudyError(
                            where=f"study {self.name!r}",
                            expected=f"it in {self.shown}",
                            got="none: it was deleted",
                            remedy="run the same command again to start a new one",
                        ) from error
                    raise
                fault, line = fault_of(inner), first_line(inner)
                self.lost_at = now
                lost_for = 0.0 if lost_since is None else now - lost_since
                if not may_pass(inner) or lost_for >= self.patience:
                    waited = "" if lost_since is None else f" for {lost_for:.0f} s"
                    raise StudyError(
                        f"study {self.name!r}: {self.shown} {fault.means}{waited} ({line}); {fault.remedy}, "
                        "then run the same command again: stored results are kept, and the study resumes "
                        "from there."
                    ) from error
                if lost_since is None:
                    lost_since = now
                    self.say(
                        f"the database {fault.means} ({line}); results are kept and written when it is back, "
                        f"trying for {self.patience:g} s."
                    )
            # Random, since the other workers lost the connection at the same moment.
            self.clock.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE)
        if lost_since is not None:
            self.say(f"the database is back after {self.clock.now() - lost_since:.0f} s.")
        return result

    def _is_deleted(self) -> bool:
        try:
            return self.storage.get_study_id_from_name(self.name) != self.study_id
        except KeyError:
            return True
        except Exception:
            return False
