"""The database of a study: address, connection and the meaning of errors."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import pathlib
import random
import sqlite3
import time
import warnings
from collections.abc import Iterator
from typing import Any, Final

import optuna
import sqlalchemy
import sqlalchemy.event
import sqlalchemy.exc
import sqlalchemy.pool
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage

from mujax.errors import ConfigError, StudyError

DEFAULT_FILE: Final = "mujax.db"

# Seconds: the longest pause between two attempts to reach a database, and how long one attempt may take.
LONGEST_PAUSE: Final = 5.0
CONNECT_TIMEOUT: Final = 10


def in_memory() -> BaseStorage:
    """A storage that ends with the process."""
    return optuna.storages.InMemoryStorage()


@dataclasses.dataclass(frozen=True)
class _Fault:
    """The meaning of an error of a database, recognised by a part of its text."""

    text: str
    means: str
    remedy: str


_FAULTS: Final = (
    _Fault("database or disk is full", "is full", "free space on its disk"),
    _Fault("no space left on device", "is full", "free space on the server's disk"),
    _Fault("readonly database", "can't be written", "make the file and its folder writable for this user"),
    _Fault("database is locked", "is locked", "end the program that keeps it locked"),
    _Fault("unable to open database file", "can't be opened", "see that its folder exists and is writable"),
    _Fault("file is not a database", "can't be read", "name another file: this one is no SQLite database"),
    _Fault("malformed", "can't be read", "restore the file from a copy or name another one: it is damaged"),
    _Fault("password", "can't be reached", "check user and password in the address"),
    _Fault("does not exist", "can't be reached", "check the name in the address, or create it first"),
    _Fault("connection refused", "can't be reached", "start the server, or check host and port"),
    _Fault("", "can't be reached", "see that the server runs and this machine can reach it"),
)

# Of libpq: a cut cable is noticed in a minute, not in hours. Ignored on Unix sockets.
_LIBPQ: Final = {
    "connect_timeout": CONNECT_TIMEOUT,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}
_DRIVERS: Final = {"postgresql": "psycopg[binary]", "mysql": "pymysql", "mariadb": "pymysql"}

# SQLAlchemy's own driver of a kind of address, by the module, and the one that our extras install.
_OTHER_DRIVERS: Final = {"postgresql": ("psycopg2", "psycopg"), "mysql": ("MySQLdb", "pymysql")}


def database_error(error: BaseException) -> BaseException | None:
    """The error of the database; None if something else went wrong."""
    cause = error.__cause__
    inner = cause if isinstance(error, StorageInternalError) and cause is not None else error
    return inner if isinstance(inner, (sqlalchemy.exc.SQLAlchemyError, StorageInternalError)) else None


def may_pass(error: BaseException) -> bool:
    """The same operation can succeed later: connection lost, disk full, locked, deadlock."""
    if isinstance(error, sqlalchemy.exc.DBAPIError) and error.connection_invalidated:
        return True
    # PendingRollback: the rest of a transaction whose connection was lost.
    passing = (
        sqlalchemy.exc.OperationalError,
        sqlalchemy.exc.InterfaceError,
        sqlalchemy.exc.PendingRollbackError,
        StorageInternalError,
    )
    return isinstance(error, passing)


def first_line(error: BaseException) -> str:
    origin = error.orig if isinstance(error, sqlalchemy.exc.DBAPIError) and error.orig else error
    return next(iter(str(origin).strip().splitlines()), type(origin).__name__).strip()


def fault_of(error: BaseException) -> _Fault:
    text = str(error).lower()
    return next(fault for fault in _FAULTS if fault.text in text)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses Optuna's log and its warnings about experimental features."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed to be used")
            # Two workers that delete one lock.
            warnings.filterwarnings("ignore", message="DELETE statement on table")
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def url_of(storage: str | pathlib.Path | None) -> sqlalchemy.URL:
    """The address of a database."""
    if storage is None:
        storage = pathlib.Path(DEFAULT_FILE)
    if isinstance(storage, pathlib.Path) or "://" not in storage:
        return sqlalchemy.URL.create("sqlite", database=str(pathlib.Path(storage).absolute()))
    try:
        url = sqlalchemy.make_url(storage)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        # Without the text: it may hold a password.
        raise ConfigError(
            where="storage",
            expected="a file or an address such as postgresql://user:password@host:5432/database",
            got="an address that can't be read",
            remedy="write special characters in the password as %40",
        ) from None
    kind = "postgresql" if url.drivername == "postgres" else url.drivername
    if kind in _OTHER_DRIVERS:
        usual, other = _OTHER_DRIVERS[kind]
        changes = not importlib.util.find_spec(usual) and importlib.util.find_spec(other)
        url = url.set(drivername=f"{kind}+{other}" if changes else kind)
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise ConfigError(
            where="storage",
            expected="a database that other processes can open",
            got="SQLite's in memory",
            remedy="name a file",
        )
    return url


def shown_as(url: sqlalchemy.URL) -> str:
    """An address to print: without passwords, a file by its path."""
    if url.get_backend_name() == "sqlite":
        return str(url.database)
    hidden = {key: "***" if "password" in key.lower() else value for key, value in url.query.items()}
    return url.set(query=hidden).render_as_string(hide_password=True)


def check_file(url: sqlalchemy.URL, shown: str) -> bool:
    """Whether the file of a SQLite database exists.

    Opened read-only: Optuna adds its tables to any database that it opens.

    Raises:
        StudyError: it is not a database, is damaged, or holds other tables than Optuna's.
    """
    path = pathlib.Path(str(url.database))
    if not path.is_file() or path.stat().st_size == 0:
        return path.is_file()
    address = f"{path.absolute().as_uri()}?mode=ro"
    try:
        with contextlib.closing(sqlite3.connect(address, uri=True)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    except sqlite3.OperationalError:
        # Locked, or with the leftovers of a killed writer, which only a writer can clear away.
        return True
    except sqlite3.DatabaseError as error:
        fault = fault_of(error)
        raise StudyError(f"storage: {shown} {fault.means} ({error}); {fault.remedy}.") from error
    if tables and not tables & {"studies", "version_info"}:
        raise StudyError(
            where="storage",
            expected="a database of Optuna's",
            got=f"{shown} with the tables {', '.join(sorted(tables)[:5])}",
            remedy="name another file",
        )
    return True


def begin_immediate(engine: sqlalchemy.Engine) -> None:
    """Makes every SQLite transaction take the write lock at its start.

    Optuna reads a trial's state and then changes it. PostgreSQL locks the row in between; SQLite would let
    two workers both read "running" and both write.
    """

    @sqlalchemy.event.listens_for(engine, "connect")
    def _(connection: Any, _record: Any) -> None:
        connection.isolation_level = None

    @sqlalchemy.event.listens_for(engine, "begin")
    def _(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _engine_options(url: sqlalchemy.URL) -> dict[str, Any]:
    if url.get_backend_name() == "sqlite":
        # A connection for each transaction: none is shared by threads, none keeps the file open.
        return {"poolclass": sqlalchemy.pool.NullPool, "connect_args": {"timeout": 60}}
    options: dict[str, Any] = {"pool_pre_ping": True}
    if url.drivername in ("postgresql", "postgresql+psycopg", "postgresql+psycopg2"):
        options["connect_args"] = {key: value for key, value in _LIBPQ.items() if key not in url.query}
    return options


def connect(url: sqlalchemy.URL, shown: str, **heartbeat: Any) -> RDBStorage:
    """Opens a database, with Optuna's tables in it.

    Raises:
        ConfigError: no driver for it is installed.
        StudyError: it cannot be opened.
    """
    if url.get_backend_name() == "sqlite":
        check_file(url, shown)
    # Optuna fills in braces.
    address = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
    for attempt in itertools.count():
        try:
            with quiet():
                return RDBStorage(address, _engine_options(url), **heartbeat)
        except (ImportError, sqlalchemy.exc.NoSuchModuleError) as error:
            backend = url.get_backend_name()
            driver = _DRIVERS.get(backend)
            raise ConfigError(
                where="storage",
                expected=f"a driver for {url.drivername} to be installed",
                got="none",
                remedy="use SQLite or PostgreSQL" if driver is None else f"pip install '{driver}'",
            ) from error
        except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError, RuntimeError) as error:
            inner = database_error(error) or error
            text = str(inner).lower()
            # Workers that start together create the same tables.
            race = any(part in text for part in ("already exists", "duplicate key", "unique constraint"))
            if race and attempt < 20:
                time.sleep(random.uniform(0.05, 0.5))
                continue
            fault = fault_of(inner)
            means, remedy = fault.means, fault.remedy
            if isinstance(inner, RuntimeError):
                means, remedy = (
                    "can't be used",
                    "install the version of Optuna that made it, or another file",
                )
            raise StudyError(f"storage: {shown} {means} ({first_line(inner)}); {remedy}.") from error
    raise AssertionError
