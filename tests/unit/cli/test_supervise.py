"""The parent of one process of several: what it forwards, and what it makes of the child's end."""

import os
import signal
import threading
import time

import pytest

from mujax.cli import _supervise
from mujax.cli._supervise import supervise
from mujax.errors import ProcessError

# As JAX's C++ writes it.
FATAL = "Terminating process because the JAX distributed service detected fatal errors. Task 1 died."


@pytest.fixture
def becomes(monkeypatch):
    """Puts a small program in the place of the command."""

    def put(program):
        start = "import json, os, signal, sys, time; _, life, said, errors, words = json.loads(sys.argv[1])\n"
        monkeypatch.setattr(_supervise, "_START", start + program)

    return put


def test_what_the_child_says_counts_and_its_warnings_are_passed_on(becomes, capfd):
    becomes(
        "os.write(2, b'a warning'); os.write(errors, b'progress'); os.write(said, bytes([len(words)])); "
        "sys.exit(len(words))"
    )
    assert supervise([], None) == 0
    assert capfd.readouterr().err == "progressa warning"
    assert supervise(["a"], None) == 1
    assert capfd.readouterr().err == "progressa warning"
    # A sentence stands alone.
    assert supervise(["a", "b"], None) == 2
    assert capfd.readouterr().err == "progress"


LOGGING = """
sys.path[:] = _
import logging
from mujax.cli import _supervise

def main(words):
    print("mujax: a sentence", file=sys.stderr)
    logging.error("a thread has failed")
    return len(words)

_supervise.child(main, life, said, errors, words)
"""


def test_what_libraries_log_goes_with_what_jax_says(becomes, capfd):
    becomes(LOGGING)
    # Nothing but the sentence.
    assert supervise(["a", "b"], None) == 2
    assert capfd.readouterr().err == "mujax: a sentence\n"
    assert supervise(["a"], None) == 1
    assert capfd.readouterr().err == "mujax: a sentence\na thread has failed\n"


def test_jaxs_fatal_end_is_a_sentence(becomes, capfd):
    becomes(f"os.write(2, b'{FATAL}'); os.abort()")
    with pytest.raises(ProcessError, match=r"another one that has ended.*start all of them again\.$"):
        supervise([], None)
    with pytest.raises(ProcessError, match=r"they go on from the last checkpoint in runs/a\.$"):
        supervise([], "runs/a")
    assert capfd.readouterr().err == ""


def test_another_fatal_end_is_not(becomes, capfd):
    becomes("os.write(2, b'bad address'); os.abort()")
    assert supervise([], None) == 128 + signal.SIGABRT
    assert capfd.readouterr().err == "bad address"


def test_a_child_that_waits_for_the_others_at_its_end_is_ended(becomes, capfd, monkeypatch, tmp_path):
    monkeypatch.setattr(_supervise, "_SECONDS_TO_END", 0.1)
    becomes(f"os.write(said, bytes([2])); os.write(2, b'{FATAL}'); time.sleep(60)")
    start = time.monotonic()
    assert supervise([], None) == 2
    assert time.monotonic() - start < 30
    assert capfd.readouterr().err == ""
    # One that has succeeded may wait for the others.
    becomes("os.write(said, bytes([0])); time.sleep(0.5); open('ended', 'w').close()")
    monkeypatch.chdir(tmp_path)
    assert supervise([], None) == 0
    assert (tmp_path / "ended").exists()


def test_signals_reach_the_child(becomes, tmp_path):
    becomes(
        "signal.signal(signal.SIGTERM, lambda *_: (os.write(said, bytes([7])), os._exit(7)))\n"
        "open(words[0], 'w').close(); time.sleep(60)"
    )
    ready = tmp_path / "ready"

    def send():
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    sender = threading.Thread(target=send)
    sender.start()
    assert supervise([str(ready)], None) == 7
    sender.join()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_child_ends_with_its_parent(monkeypatch):
    killed = []
    monkeypatch.setattr(os, "kill", lambda *given: killed.append(given))
    read, write = os.pipe()
    waiting = threading.Thread(target=_supervise._end_with, args=(read,))
    waiting.start()
    waiting.join(0.1)
    assert killed == []
    os.close(write)
    waiting.join()
    os.close(read)
    assert killed == [(os.getpid(), signal.SIGKILL)]
