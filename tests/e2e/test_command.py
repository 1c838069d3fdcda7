"""The command on real data: interrupted and resumed, and given wrong arguments.

In a process of its own where that matters, elsewhere in this one, which has imported JAX.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from mujax import cli

PROCESS = (sys.executable, "-m", "mujax.cli")
SWEEP = (
    "transfer-check",
    "mnist-mlp",
    "--quick",
    "--widths",
    "16",
    "32",
    "--steps",
    "30",
    "--out",
    "results",
)
RUNS = 2 * 2 * 4  # parametrizations, widths, learning rates

Done = subprocess.CompletedProcess[str]


def run_process(*command: str, cwd: pathlib.Path, **env: str) -> Done:
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=300, check=False
    )


def run(*arguments: str, cwd: pathlib.Path) -> Done:
    """The command in this process."""
    modules = set(sys.modules)
    with (
        contextlib.chdir(cwd),
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        patch.setattr(sys, "path", list(sys.path))
        code = cli.main(list(arguments))
    # The user's module, which another test has under the same name.
    for name in set(sys.modules) - modules:
        if pathlib.Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(cwd):
            del sys.modules[name]
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def interrupted_when(ready: Callable[[], bool]) -> Iterator[None]:
    """Sends Ctrl-C to this process as soon as something is the case."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            if ready():
                os.kill(os.getpid(), signal.SIGINT)
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def finished(folder: pathlib.Path) -> list[str]:
    file = folder / "runs.csv"
    return file.read_text().splitlines()[1:] if file.exists() else []


def test_a_sweep_that_is_interrupted_goes_on_and_ends_with_a_report(tmp_path: pathlib.Path) -> None:
    results = tmp_path / "results"
    with interrupted_when(lambda: len(finished(results)) >= 3):
        sweep = run(*SWEEP, cwd=tmp_path)
    assert sweep.returncode == 130, sweep.stderr
    stored = finished(results)
    assert 3 <= len(stored) < RUNS
    assert sweep.stderr.splitlines()[-1] == (
        f"mujax: interrupted; {len(stored)} runs are stored in results/runs.csv, "
        "the same command resumes there."
    )
    assert "Traceback" not in sweep.stderr
    assert not (results / "report.json").exists()

    done = run(*SWEEP, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert finished(results)[: len(stored)] == stored
    with (results / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert (
        len(rows) == len({(r["parametrization"], r["width"], r["log2_lr"], r["seed"]) for r in rows}) == RUNS
    )

    report = json.loads((results / "report.json").read_text())
    assert report["task"] == "mnist-mlp"
    assert report["widths"] == [16, 32]
    assert report["base_width"] == 16
    assert report["seeds"] == [0]
    for row in rows:
        curve = report["loss"][row["parametrization"]][row["width"]]
        loss = curve[report["log2_lrs"].index(float(row["log2_lr"]))]
        assert loss == (float(row["loss"]) if row["loss"] else None)
    # It learns something: guessing among ten digits costs 2.30.
    assert min(loss for loss in report["loss"]["mup"]["32"] if loss is not None) < 1.8
    assert (results / "transfer.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    for text in ("Standard parametrization", "µP", "regret", "results/transfer.png"):
        assert text in done.stdout

    before = {path.name: path.read_bytes() for path in results.iterdir()}
    other = run(*SWEEP, "--batch", "32", cwd=tmp_path)
    assert other.returncode == 2
    assert other.stderr.startswith(
        "mujax: out: expected runs with batch 32 in results/runs.csv, got runs with"
    )
    assert other.stderr.count("\n") == 1
    assert {path.name: path.read_bytes() for path in results.iterdir()} == before


def test_explain_reads_a_model_from_the_current_directory(tmp_path: pathlib.Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import jax\n"
        "from flax import linen as nn\n"
        "def net(width):\n"
        "    model = nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(3)])\n"
        "    return model, (jax.ShapeDtypeStruct((2, 4), 'float32'),)\n"
    )
    script = pathlib.Path(sys.executable).with_name("mujax")
    command = (str(script),) if os.access(script, os.X_OK) else PROCESS
    words = ("explain", "mine:net", "--width", "64", "--base-width", "16")
    done = run_process(*command, *words, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    (readout,) = [line for line in done.stdout.splitlines() if line.startswith("layers_2/kernel")]
    assert readout.split()[1:4] == ["64x3", "16x3", "output"]


def test_a_coordinate_check_ends_with_1_where_a_rule_is_broken(tmp_path: pathlib.Path) -> None:
    small = ["--widths", "16,64", "--steps", "1", "--seeds", "2", "--alone", "--parametrization", "sp"]
    done = run("coord-check", "mlp", *small, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    report = json.loads((tmp_path / "coord-check-mlp" / "coord_check.json").read_text())
    (checked,) = report["checks"].values()
    assert report["verdict"] == checked["verdict"] == "fail"
    blamed = {(fault["name"], fault["rule"]) for fault in checked["faults"]}
    assert ("hidden_1/kernel", "learning rate") in blamed
    assert not any(name.startswith("hidden_0") for name, _ in blamed)
    picture = tmp_path / "coord-check-mlp" / "coord_check.png"
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    for text in ("FAIL: ", "Look at:", "hidden_1/kernel: its learning rate", "mlp.py:", str(picture.name)):
        assert text in done.stdout
    assert "% done, about " in done.stderr
    assert "Traceback" not in done.stderr


def test_nonsense_is_a_sentence_and_exit_code_2(tmp_path: pathlib.Path) -> None:
    done = run_process(*PROCESS, "transfer-check", "--steps", "many", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "mujax: Error parsing --steps: expected a whole number, got 'many'; see mujax --help.\n"
    )
    assert list(tmp_path.iterdir()) == []


# ---- tune, then transfer --------------------------------------------------------------------------------

TUNE = ("tune", "mnist-mlp", "--width", "16", "--steps", "10", "--study", "s")
OF_STUDY = ("transfer", "--study", "s", "--width", "32")


def tuned(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The trials in tune.json, in the order of their hyperparameters."""
    trials = json.loads((folder / "tune-s" / "tune.json").read_text())["trials"]
    return sorted(trials, key=lambda trial: trial["hparams"]["learning_rate"])


def test_a_search_is_followed_by_the_training_of_the_target(tmp_path: pathlib.Path) -> None:
    search = run(*TUNE, "--trials", "6", cwd=tmp_path)
    assert search.returncode == 0, search.stderr
    trials = tuned(tmp_path)
    assert len(trials) == 6
    best = min((one for one in trials if one["loss"] is not None), key=lambda one: one["loss"])
    for text in ("6 trials, ", "mujax transfer --study s", "tune-s/tune.json, tune-s/tune.png"):
        assert text in search.stdout
    assert (tmp_path / "tune-s" / "tune.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

    done = run(*OF_STUDY, "--seeds", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "transfer-s" / "target.json").read_text())
    assert (report["width"], report["proxy"], report["trial"]) == (32, 16, best["number"])
    assert report["hparams"].items() >= best["hparams"].items()
    assert len(report["runs"]) == 2
    assert report["loss"] < 3
    assert report["saved"] > 1
    assert (tmp_path / "transfer-s" / "target.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with np.load(tmp_path / "transfer-s" / "params.npz") as params:
        assert params["hidden_1/kernel"].shape == (32, 32)
        assert all(np.isfinite(params[name]).all() for name in params)
    for text in ("Target, width 32: loss ", "Proxy, width 16: ", "times as many", "transfer-s/params.npz"):
        assert text in done.stdout

    # Nothing is run again, and other settings are refused.
    again = run(*TUNE, "--trials", "6", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert tuned(tmp_path) == trials
    other = run(*TUNE, "--trials", "6", "--batch", "32", cwd=tmp_path)
    assert other.returncode == 2
    assert other.stderr.startswith("mujax: batch: expected 64, with which study 's' was started, got 32")
    assert other.stderr.count("\n") == 1
    missing = run("transfer", "--study", "t", cwd=tmp_path)
    assert missing.returncode == 2
    assert "mujax: study: expected one of 's' in " in missing.stderr


def test_an_interrupted_search_goes_on_and_has_every_trial_once(tmp_path: pathlib.Path) -> None:
    command = (*TUNE, "--trials", "12", "--lanes", "2", "--mode", "loop")
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    stopped.mkdir()
    whole.mkdir()
    log = stopped / "log"
    with (
        log.open("w") as file,
        subprocess.Popen((*PROCESS, *command), cwd=stopped, stderr=file, stdout=subprocess.DEVNULL) as search,
    ):
        deadline = time.monotonic() + 240
        while "2 of 12 trials" not in log.read_text() and search.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        # As for a job that is preempted; Ctrl-C is the same, and tried above.
        search.send_signal(signal.SIGTERM)
        assert search.wait(timeout=120) == 130, log.read_text()
    stored = tuned(stopped)
    assert 2 <= len(stored) < 12
    assert log.read_text().splitlines()[-1] == (
        f"mujax: interrupted; {len(stored)} of 12 trials are stored in study s of mujax.db, the same command "
        "resumes there. Written: tune-s/tune.json, tune-s/tune.png."
    )
    assert "Traceback" not in log.read_text()

    for folder in (stopped, whole):
        done = run(*command, cwd=folder)
        assert done.returncode == 0, done.stderr
    trials, expected = tuned(stopped), tuned(whole)
    assert len(trials) == 12
    # What a trial tries and finds depends on its place and the seed only: so none is missing or there twice.
    assert [one["hparams"] for one in trials] == [one["hparams"] for one in expected]
    assert [one["loss"] for one in trials] == [one["loss"] for one in expected]
    assert all(one in trials for one in stored)


def test_what_does_not_transfer_is_refused_until_it_is_settled(tmp_path: pathlib.Path) -> None:
    search = run(
        *(*TUNE, "--trials", "3", "--optimizer", "adamw", "--tune", "learning_rate=2^-9:2^-6:log"),
        "weight_decay=0.01:0.1:log",
        cwd=tmp_path,
    )
    assert search.returncode == 0, search.stderr
    assert "Across width weight_decay can't be expected to transfer" in search.stdout
    refused = run(*OF_STUDY, cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.startswith(
        "mujax: transfer: expected hyperparameters that transfer across width, got weight_decay tuned"
    )
    assert not (tmp_path / "transfer-s" / "target.json").exists()
    done = run(*OF_STUDY, "--set", "weight_decay=0.05", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "transfer-s" / "target.json").read_text())
    assert report["hparams"]["weight_decay"] == 0.05
    assert report["not_transferred"] == {"weight_decay": "set"}


MINE = """
from flax import linen as nn


class Net(nn.Module):
    width: int
    depth: int

    @nn.compact
    def __call__(self, x):
        for _ in range(self.depth):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(3)(x)


def net(width, depth=1):
    return Net(width, depth)
"""

YAML = """
task: mine:net
width: 16
data: data.npz
steps: 40
batch: 8
trials: 6
objective: valid_loss
space:
  learning_rate: {low: 2**-6, high: 2^-4, log: true}
  output_mult: [0.5, 1, 2]
fixed:
  depth: 2
"""


def test_a_model_and_data_of_the_users_own_are_checked_and_the_check_resumes(tmp_path: pathlib.Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    random = np.random.default_rng(0)
    x = random.normal(size=(200, 5)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, y=x[:, :3].argmax(axis=1))
    line = "transfer-check mine:net --data data.npz --widths 8,16 --log2-lrs -9,-6,-3 --seeds 1 --steps 20"
    results = tmp_path / "transfer-mine.net"
    with interrupted_when(lambda: len(finished(results)) >= 2):
        stopped = run(*line.split(), cwd=tmp_path)
    assert stopped.returncode == 130, stopped.stderr
    stored = finished(results)
    assert 2 <= len(stored) < 12
    done = run(*line.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(finished(results)) == 12
    assert finished(results)[: len(stored)] == stored
    report = json.loads((results / "report.json").read_text())
    assert (report["task"], set(report["verdict"].values())) == ("mine:net", {"undecided"})
    # Guessing among three costs 1.10.
    assert min(report["loss"]["mup"]["16"]) < 1.1
    assert "3. At width 16 a loss of " in done.stdout


def test_a_model_and_data_of_the_users_own_are_tuned_and_transferred(tmp_path: pathlib.Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "tune.yaml").write_text(YAML)
    random = np.random.default_rng(0)
    x = random.normal(size=(200, 5)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, y=x[:, :3].argmax(axis=1))
    search = run("tune", "--config", "tune.yaml", "--study", "s", cwd=tmp_path)
    assert search.returncode == 0, search.stderr
    assert "mujax transfer --study s --config tune.yaml --width N" in search.stdout
    assert {one["hparams"]["output_mult"] for one in tuned(tmp_path)} <= {0.5, 1, 2}
    without = run("transfer", "--study", "s", cwd=tmp_path)
    assert without.returncode == 2
    assert without.stderr.startswith("mujax: width: expected the target's width, got None")
    # The study knows the model and where the data is.
    done = run("transfer", "--study", "s", "--width", "64", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "transfer-s" / "target.json").read_text())
    assert (report["task"], report["objective"], report["hparams"]["depth"]) == ("mine:net", "valid_loss", 2)
    # Guessing among three costs 1.10.
    assert report["loss"] < 0.8
    with np.load(tmp_path / "transfer-s" / "params.npz") as params:
        assert params["Dense_1/kernel"].shape == (64, 64)

    # With other data under the same name it would be another experiment.
    np.savez(tmp_path / "data.npz", x=-x, y=x[:, :3].argmax(axis=1))
    other = run("transfer", "--study", "s", "--width", "64", cwd=tmp_path)
    assert other.returncode == 2
    assert "with data " in other.stderr
