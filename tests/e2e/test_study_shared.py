"""Shared studies among real processes, on SQLite and on a PostgreSQL server that is killed meanwhile.

The server is found in MUJAX_TEST_POSTGRESQL_BIN or in /usr/lib/postgresql. MUJAX_TEST_OUTAGE: for how many
seconds it is away, longer than a worker may be silent.
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

import mujax
from mujax.tune.study import Record, SharedStudy

TOTAL = 12
# Seconds after which something is wrong; far beyond what a loaded machine takes.
BOUND = 240

# One process imports studies, and nothing else of mujax, since that takes seconds; the workers are its forks.
WORKERS = """
import json, multiprocessing, os, pathlib, sys, time, types

for name in ("mujax", "mujax.tune"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [os.path.join(sys.argv[1], *name.split("."))]
from mujax.tune.study import SharedStudy

del sys.argv[1]
storage, folder, count, total, seconds = sys.argv[1], pathlib.Path(sys.argv[2]), *sys.argv[3:]
count, total, seconds = int(count), int(total), float(seconds)
space = {"lr": {"low": "2**-12", "high": 1.0, "log": True}}
start = multiprocessing.get_context("fork").Barrier(count)


def note(kind, number):
    with (folder / "log").open("a") as file:
        file.write(json.dumps([kind, number, os.getpid()]) + "\\n")


def say(text):
    print(text, flush=True)


def work():
    options = {"heartbeat": 0.5, "heartbeat_timeout": 4, "patience": 200, "say": say}
    with SharedStudy.open("shared", space, storage=storage, **options) as study:
        start.wait()
        while study.pending(total):
            leases = study.lease(total, at_most=2)
            for lease in leases:
                note("begin", lease.number)
            for lease in leases:
                time.sleep(seconds)
                study.report(lease, 1, lease.params["lr"])
                kept = study.finish(lease, lease.params["lr"], {"pid": os.getpid()})
                note("end" if kept else "taken", lease.number)
            if not leases:
                time.sleep(0.1)


children = []
for _ in range(count):
    child = os.fork()
    if not child:
        work()
        sys.exit()
    children.append(child)
# 0, or minus the signal that ended it.
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
(folder / "codes").write_text(json.dumps(codes))
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
    process: subprocess.Popen[bytes]

    def output(self) -> str:
        return (self.folder / "output.txt").read_text()

    def did(self, kind: str) -> list[tuple[int, int]]:
        """Trial and process of each event of a kind."""
        log = self.folder / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [(number, pid) for found, number, pid in map(json.loads, lines) if found == kind]

    def wait_for(self, kind: str, count: int) -> None:
        give_up = time.monotonic() + BOUND
        while len(self.did(kind)) < count:
            assert time.monotonic() < give_up, self.output()
            assert self.process.poll() is None, self.output()
            time.sleep(0.05)

    def join(self, killed: int = 0) -> None:
        """Waits for all to come to their end."""
        assert self.process.wait(timeout=BOUND) == 0, self.output()
        codes = json.loads((self.folder / "codes").read_text())
        assert sorted(codes) == [-signal.SIGKILL] * killed + [0] * (len(codes) - killed), self.output()

    def records(self) -> list[Record]:
        with SharedStudy.load("shared", self.storage) as study:
            return study.records()


@contextlib.contextmanager
def workers(storage: str, folder: pathlib.Path, count: int, seconds: float) -> Iterator[Workers]:
    script = folder / "workers.py"
    script.write_text(WORKERS)
    # SQLAlchemy drops a connection that breaks while it is set up without closing it; Python warns of forks.
    strict = ["-W", "error", "-W", "ignore::ResourceWarning", "-W", "ignore::DeprecationWarning:__main__"]
    root = pathlib.Path(mujax.__file__).parents[1]
    args = [str(script), str(root), storage, str(folder), str(count), str(TOTAL), str(seconds)]
    command = [sys.executable, *strict, *args]
    with (folder / "output.txt").open("wb") as out:
        # A group of its own, to be ended as one.
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield Workers(storage, folder, process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def expected() -> set[float]:
    """What one worker alone would try."""
    space = {"lr": {"low": "2**-12", "high": 1.0, "log": True}}
    with SharedStudy.open("alone", space, storage=InMemoryStorage()) as study:
        return {lease.params["lr"] for lease in study.lease(TOTAL, TOTAL)}


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
    with workers(str(tmp_path / "study.db"), tmp_path, 2, seconds=0.1) as group:
        group.join()
        records = group.records()
        check_all_present_once(records, expected)
        assert {record.state for record in records} == {"complete"}
        runs = group.did("begin")
        assert sorted(number for number, _ in runs) == list(range(TOTAL))
        assert len({pid for _, pid in runs}) == 2, "both took part"


def test_a_worker_killed_on_postgresql(database: str, tmp_path: pathlib.Path, expected: set[float]) -> None:
    with workers(database, tmp_path, 4, seconds=0.5) as group:
        group.wait_for("end", 1)
        # Of a worker that is in the midst of a trial.
        _, victim = group.did("begin")[-1]
        os.kill(victim, signal.SIGKILL)
        group.join(killed=1)
        records = group.records()
        check_all_present_once(records, expected)
        started, ended = group.did("begin"), group.did("end")
        lost = {number for number, pid in started if pid == victim} - {number for number, _ in ended}
        assert lost
        # Only what it was running was run again; a kill between storing and noting may hide one.
        failed = {record.number for record in records if record.state == "failed"}
        assert failed <= lost
        again = [record for record in records if record.state == "complete" and record.number >= TOTAL]
        assert len(again) == len(failed)
        ends = collections.Counter(number for number, _ in ended)
        assert set(ends.values()) == {1}
        assert group.did("taken") == []
        assert len({pid for _, pid in ended}) >= 3


def test_postgresql_away_for_a_while(
    server: Server, database: str, tmp_path: pathlib.Path, expected: set[float]
) -> None:
    with workers(database, tmp_path, 3, seconds=0.5) as group:
        group.wait_for("end", 1)
        server.stop()
        try:
            time.sleep(float(os.environ.get("MUJAX_TEST_OUTAGE", "5")))
        finally:
            server.start()
        group.join()
        check_all_present_once(group.records(), expected)
        # No worker was considered dead, although there was no sign of life for longer than the timeout.
        assert group.did("taken") == []
        assert sorted(number for number, _ in group.did("begin")) == sorted(
            number for number, _ in group.did("end")
        )
        assert len(group.did("end")) == TOTAL
        output = group.output()
        assert "study 'shared': the database can't be reached" in output
        assert "study 'shared': the database is back after" in output
        assert "Traceback" not in output
