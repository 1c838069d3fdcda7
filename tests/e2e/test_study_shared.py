"""Shared studies among real processes, on SQLite and on a PostgreSQL server that is killed meanwhile.

The server is found in MUJAX_TEST_POSTGRESQL_BIN or in /usr/lib/postgresql. MUJAX_TEST_OUTAGE: for how many
seconds it is away.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import pytest
from optuna.storages import InMemoryStorage

from mujax.tune.study import Record, SharedStudy

TOTAL = 16
# Seconds after which something is wrong; far beyond what a loaded machine takes.
BOUND = 240

WORKER = """
import json, os, pathlib, sys, time
from mujax.tune.study import SharedStudy

storage, log, total, seconds = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
space = {"lr": {"low": "2**-12", "high": 1.0, "log": True}}


def note(kind, number):
    with log.open("a") as file:
        file.write(json.dumps([kind, number, os.getpid()]) + "\\n")


def say(text):
    print(text, flush=True)


signs = {"heartbeat": 0.5, "grace": 4}
with SharedStudy.open("shared", space, storage=storage, **signs, patience=200, say=say) as study:
    note("ready", -1)
    while study.pending(total):
        claims = study.claim(total, at_most=2)
        for claim in claims:
            note("begin", claim.number)
        for claim in claims:
            time.sleep(seconds)
            study.report(claim, 1, claim.params["lr"])
            kept = study.finish(claim, claim.params["lr"], {"pid": os.getpid()})
            note("end" if kept else "taken", claim.number)
        if not claims:
            time.sleep(0.3)
"""


# ---- the server -----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Server:
    """A PostgreSQL server of our own."""

    bin: pathlib.Path
    folder: pathlib.Path
    port: int

    def run(self, tool: str, *args: str) -> None:
        # PostgreSQL refuses to run as root.
        user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        command = [*user, str(self.bin / tool), *args]
        # To a file: the server inherits the stream, and reading a pipe would wait for its end.
        with (self.folder / "tools.log").open("ab") as out:
            done = subprocess.run(command, stdout=out, stderr=out, timeout=120, cwd=self.folder, check=False)
        assert done.returncode == 0, (self.folder / "tools.log").read_text()

    @property
    def data(self) -> str:
        return str(self.folder / "data")

    def start(self) -> None:
        # Without fsync: it is killed, but the machine is not.
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
        log = str(self.folder / "server.log")
        self.run("pg_ctl", "start", "-w", "-t", "60", "-D", self.data, "-l", log, "-o", options)

    def stop(self) -> None:
        """As if the power went."""
        self.run("pg_ctl", "stop", "-w", "-t", "60", "-m", "immediate", "-D", self.data)


def server_programs() -> pathlib.Path | None:
    if given := os.environ.get("MUJAX_TEST_POSTGRESQL_BIN"):
        return pathlib.Path(given)
    found = [path.parent for path in pathlib.Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    return max(found, key=lambda path: float(path.parent.name), default=None)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    programs = server_programs()
    if programs is None:
        reason = "no PostgreSQL server is installed: apt-get install postgresql"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    # Not pytest's folder: it can be entered by root alone.
    folder = pathlib.Path(tempfile.mkdtemp(prefix="mujax-postgresql-"))
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    made = Server(programs, folder, port)
    try:
        made.run(
            "initdb", "-D", made.data, "-U", "tuner", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync"
        )
        made.start()
        yield made
    finally:
        with contextlib.suppress(AssertionError):
            made.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def database(server: Server, request: pytest.FixtureRequest) -> str:
    """The address of an empty database."""
    name = "".join(letter for letter in request.node.name if letter.isalpha())[:60]
    server.run("createdb", "-h", "127.0.0.1", "-p", str(server.port), "-U", "tuner", name)
    return f"postgresql://tuner:any@127.0.0.1:{server.port}/{name}"


# ---- the workers ----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Workers:
    """Worker processes and what they did."""

    storage: str
    folder: pathlib.Path
    processes: list[subprocess.Popen[bytes]] = dataclasses.field(default_factory=list)

    def start(self, count: int, seconds: float) -> None:
        script = self.folder / "worker.py"
        script.write_text(WORKER)
        args = [self.storage, str(self.folder / "log"), str(TOTAL), str(seconds)]
        for at in range(count):
            with (self.folder / f"worker-{at}.txt").open("wb") as out:
                # SQLAlchemy drops a connection that breaks while it is set up without closing it.
                strict = ["-W", "error", "-W", "ignore::ResourceWarning"]
                command = [sys.executable, *strict, str(script), *args]
                self.processes.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT))

    def said(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("worker-*.txt")))

    def did(self, kind: str) -> list[tuple[int, int]]:
        """Trial and process of each event of a kind."""
        log = self.folder / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [(number, pid) for found, number, pid in map(json.loads, lines) if found == kind]

    def wait_for(self, kind: str, count: int) -> None:
        give_up = time.monotonic() + BOUND
        while len(self.did(kind)) < count:
            assert time.monotonic() < give_up, self.said()
            assert any(process.poll() is None for process in self.processes), self.said()
            time.sleep(0.05)

    def join(self, but: tuple[int, ...] = ()) -> None:
        give_up = time.monotonic() + BOUND
        for process in self.processes:
            process.wait(timeout=max(1.0, give_up - time.monotonic()))
            if process.pid not in but:
                assert process.returncode == 0, self.said()

    def records(self) -> list[Record]:
        with SharedStudy.load("shared", self.storage) as study:
            return study.records()


@contextlib.contextmanager
def workers(storage: str, folder: pathlib.Path, count: int, seconds: float) -> Iterator[Workers]:
    made = Workers(storage, folder)
    try:
        made.start(count, seconds)
        yield made
    finally:
        for process in made.processes:
            if process.poll() is None:
                process.kill()
            process.wait(timeout=30)


@pytest.fixture(scope="module")
def expected() -> set[float]:
    """What one worker alone would try."""
    space = {"lr": {"low": "2**-12", "high": 1.0, "log": True}}
    with SharedStudy.open("alone", space, storage=InMemoryStorage()) as study:
        return {claim.params["lr"] for claim in study.claim(TOTAL, TOTAL)}


def check_all_present_once(records: list[Record], expected: set[float]) -> None:
    complete = [record for record in records if record.state == "complete"]
    assert len(complete) == TOTAL
    assert {record.params["lr"] for record in complete} == expected
    assert {record.state for record in records} <= {"complete", "failed"}
    # The value is the trial's own.
    assert all(record.value == record.params["lr"] for record in complete)
    assert all(record.intermediate == {1: record.value} for record in complete)


# ---- the tests ------------------------------------------------------------------------------------------


def test_two_workers_on_sqlite(tmp_path: pathlib.Path, expected: set[float]) -> None:
    with workers(str(tmp_path / "study.db"), tmp_path, 2, seconds=0.2) as group:
        group.join()
        check_all_present_once(group.records(), expected)
        assert {record.state for record in group.records()} == {"complete"}
        runs = group.did("begin")
        assert sorted(number for number, _ in runs) == list(range(TOTAL))
        assert len({pid for _, pid in runs}) == 2, "both took part"


def test_a_worker_killed_on_postgresql(database: str, tmp_path: pathlib.Path, expected: set[float]) -> None:
    with workers(database, tmp_path, 3, seconds=0.5) as group:
        group.wait_for("ready", 3)
        group.wait_for("end", TOTAL // 3)
        # Of a worker that is in the midst of a trial.
        _, victim = group.did("begin")[-1]
        os.kill(victim, signal.SIGKILL)
        group.join(but=(victim,))
        records = group.records()
        check_all_present_once(records, expected)
        begun, ended = group.did("begin"), group.did("end")
        lost = {number for number, pid in begun if pid == victim} - {number for number, _ in ended}
        assert lost
        # Only what it was running was run again; a kill between storing and noting may hide one.
        failed = {record.number for record in records if record.state == "failed"}
        assert failed <= lost
        again = [record for record in records if record.state == "complete" and record.number >= TOTAL]
        assert len(again) == len(failed)
        ends = collections.Counter(number for number, _ in ended)
        assert set(ends.values()) == {1}
        assert group.did("taken") == []
        assert len({pid for _, pid in ended} - {victim}) == 2


def test_postgresql_away_for_a_while(
    server: Server, database: str, tmp_path: pathlib.Path, expected: set[float]
) -> None:
    with workers(database, tmp_path, 3, seconds=0.5) as group:
        group.wait_for("ready", 3)
        group.wait_for("end", TOTAL // 4)
        server.stop()
        try:
            time.sleep(float(os.environ.get("MUJAX_TEST_OUTAGE", "5")))
        finally:
            server.start()
        group.join()
        check_all_present_once(group.records(), expected)
        # Nobody was taken for dead, although there was no sign of life for longer than the grace.
        assert group.did("taken") == []
        assert sorted(number for number, _ in group.did("begin")) == sorted(
            number for number, _ in group.did("end")
        )
        assert len(group.did("end")) == TOTAL
        said = group.said()
        assert "study 'shared': the database can't be reached" in said
        assert "study 'shared': the database is back after" in said
        assert "Traceback" not in said
