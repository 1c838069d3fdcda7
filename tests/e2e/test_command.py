"""The installed command in processes of its own, on real data: killed and resumed, and fed nonsense."""

from __future__ import annotations

import csv
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

COMMAND = (sys.executable, "-m", "mujax.cli")
SWEEP = (*COMMAND, "transfer", "--quick", "--widths", "16", "32", "--steps", "30", "--out", "results")
RUNS = 2 * 2 * 4  # parametrizations, widths, learning rates


def run(*command: str, cwd: pathlib.Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


def finished(folder: pathlib.Path) -> list[str]:
    file = folder / "runs.csv"
    return file.read_text().splitlines()[1:] if file.exists() else []


def test_a_sweep_that_is_interrupted_goes_on_and_ends_with_a_report(tmp_path: pathlib.Path) -> None:
    results = tmp_path / "results"
    with subprocess.Popen(
        SWEEP, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as sweep:
        deadline = time.monotonic() + 240
        while len(finished(results)) < 3 and sweep.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        sweep.send_signal(signal.SIGINT)
        _, err = sweep.communicate(timeout=120)
    assert sweep.returncode == 130, err
    stored = finished(results)
    assert 3 <= len(stored) < RUNS
    assert err.splitlines()[-1] == (
        f"mujax: interrupted; {len(stored)} runs are stored in results/runs.csv, "
        "the same command goes on there."
    )
    assert "Traceback" not in err
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
    for said in ("Standard parametrization", "µP", "regret", "results/transfer.png"):
        assert said in done.stdout

    before = {path.name: path.read_bytes() for path in results.iterdir()}
    other = run(*SWEEP, "--batch", "32", cwd=tmp_path)
    assert other.returncode == 2
    assert other.stderr.startswith(
        "mujax: out: expected runs with batch 32 in results/runs.csv, found runs with"
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
    command = (str(script),) if os.access(script, os.X_OK) else COMMAND
    done = run(*command, "explain", "mine:net", "--width", "64", "--base-width", "16", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (readout,) = [line for line in done.stdout.splitlines() if line.startswith("layers_2/kernel")]
    assert readout.split()[1:4] == ["64x3", "16x3", "output"]


def test_a_coordinate_check_ends_with_1_where_a_rule_is_broken(tmp_path: pathlib.Path) -> None:
    small = ["--widths", "16,64", "--steps", "1", "--seeds", "2", "--alone", "--parametrization", "sp"]
    done = run(*COMMAND, "coord-check", "mlp", *small, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    report = json.loads((tmp_path / "coord-check-mlp" / "coord_check.json").read_text())
    (checked,) = report["checks"].values()
    assert report["verdict"] == checked["verdict"] == "fail"
    blamed = {(fault["name"], fault["rule"]) for fault in checked["faults"]}
    assert ("hidden_1/kernel", "learning rate") in blamed
    assert not any(name.startswith("hidden_0") for name, _ in blamed)
    picture = tmp_path / "coord-check-mlp" / "coord_check.png"
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    for said in ("FAIL: ", "Look at:", "hidden_1/kernel: its learning rate", "mlp.py:", str(picture.name)):
        assert said in done.stdout
    assert "% done, about " in done.stderr
    assert "Traceback" not in done.stderr


def test_nonsense_is_a_sentence_and_exit_code_2(tmp_path: pathlib.Path) -> None:
    done = run(*COMMAND, "transfer", "--steps", "many", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "mujax: Error parsing --steps: expected a whole number, got 'many'; see mujax --help.\n"
    )
    assert list(tmp_path.iterdir()) == []
