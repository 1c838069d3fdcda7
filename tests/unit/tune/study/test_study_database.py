"""The database of a study: by its address, and what is refused without being changed."""

from __future__ import annotations

import contextlib
import importlib.util
import pathlib
import sqlite3
import time
from collections.abc import Callable
from typing import Any

import pytest

from mujax.errors import ConfigError, StudyError
from mujax.tune.study import SharedStudy, _database

SPACE = {"lr": {"low": "2**-10", "high": 1.0, "log": True}}


def test_without_a_storage_it_is_a_file_in_the_working_directory(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with SharedStudy.open("s", SPACE) as study:
        assert study.storage == str(tmp_path / "mujax.db")
    assert (tmp_path / "mujax.db").is_file()
    with SharedStudy.load("s") as study:
        assert study.records() == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [("runs.db", str), ("what?{is}%41 this#1.db", str), ("what?{is}%41 this#1.db", pathlib.Path)],
)
def test_a_file_by_its_path(name: str, kind: Callable[[Any], Any], tmp_path: pathlib.Path) -> None:
    (tmp_path / name).touch()
    with SharedStudy.open("s", SPACE, storage=kind(tmp_path / name)) as study:
        assert study.storage == str(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).stat().st_size > 0


@pytest.mark.parametrize(
    ("installed", "given", "expected"),
    [
        ({"psycopg"}, "postgresql://u:p@h/d", "postgresql+psycopg://u:p@h/d"),
        ({"psycopg"}, "postgres://u:p@h/d", "postgresql+psycopg://u:p@h/d"),
        ({"psycopg", "psycopg2"}, "postgres://u:p@h/d", "postgresql://u:p@h/d"),
        (set(), "postgresql://u:p@h/d", "postgresql://u:p@h/d"),
        ({"psycopg"}, "postgresql+psycopg2://u:p@h/d", "postgresql+psycopg2://u:p@h/d"),
        ({"psycopg"}, "mysql://u:p@h/d", "mysql://u:p@h/d"),
        ({"pymysql"}, "mysql://u:p@h/d", "mysql+pymysql://u:p@h/d"),
        ({"pymysql", "MySQLdb"}, "mysql://u:p@h/d", "mysql://u:p@h/d"),
    ],
)
def test_the_driver_that_is_installed(
    installed: set[str], given: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in installed)
    assert _database.url_of(given).render_as_string(hide_password=False) == expected


@pytest.mark.parametrize(
    ("storage", "text"),
    [
        (
            "postgresql+psycopg2://u:secret@h/d",
            r"storage: expected a driver for .* got none; pip install 'psyc",
        ),
        (
            "oracle://u:secret@h/d",
            r"storage: expected a driver for oracle to be installed, got none; use SQL",
        ),
        ("redis://h", r"storage: expected a driver for redis"),
        ("postgresql://u:secret@h:port/d", r"storage: expected a file or an address such as postgresql://"),
        ("sqlite://", r"storage: expected a database that other processes can open, got SQLite's in memory"),
        ("sqlite:///:memory:", r"storage: expected a database that other processes can open"),
    ],
)
def test_an_address_that_can_not_be_used(storage: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        SharedStudy.open("s", SPACE, storage=storage)
    assert "secret" not in str(caught.value)


def test_no_password_is_shown() -> None:
    reported: list[str] = []
    storage = "postgresql+psycopg://u:secret@127.0.0.1:9/d?sslpassword=hidden"
    began = time.monotonic()
    with pytest.raises(
        StudyError, match=r"storage: postgresql.*://u:\*\*\*@127.*can't be reached.*;"
    ) as caught:
        SharedStudy.open("s", SPACE, storage=storage, say=reported.append)
    # At once, without patience.
    assert time.monotonic() - began < 30
    assert "secret" not in str(caught.value)
    assert "hidden" not in str(caught.value)
    assert reported == []


def test_a_folder_that_is_not_there(tmp_path: pathlib.Path) -> None:
    with pytest.raises(StudyError, match=r"storage: .*s\.db can't be opened .*; see that its folder exists"):
        SharedStudy.open("s", SPACE, storage=tmp_path / "no" / "s.db")


def test_a_file_that_is_no_database_is_not_changed(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "s.db"
    path.write_bytes(b"a diary, not a database" * 100)
    before = path.read_bytes()
    for use in (lambda: SharedStudy.open("s", SPACE, storage=path), lambda: SharedStudy.load("s", path)):
        with pytest.raises(StudyError, match=r"storage: .*s\.db can't be read .*; name another file"):
            use()
    assert path.read_bytes() == before


def test_a_damaged_database_is_not_changed(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "s.db"
    with SharedStudy.open("s", SPACE, storage=path):
        pass
    content = path.read_bytes()
    path.write_bytes(content[:100] + b"\xff" * (len(content) - 100))
    before = path.read_bytes()
    with pytest.raises(StudyError, match=r"storage: .*s\.db can't be read .*malformed.*; restore the file"):
        SharedStudy.open("s", SPACE, storage=path)
    assert path.read_bytes() == before


def test_a_database_of_something_else_is_not_changed(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "s.db"
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
    before = path.read_bytes()
    with pytest.raises(StudyError, match=r"storage: expected a database of Optuna's, got .* tables recipes;"):
        SharedStudy.open("s", SPACE, storage=path)
    assert path.read_bytes() == before
