"""The target's run is saved, ended by SIGTERM and gone on with; on a mesh and on several processes."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import types

import flax.linen as nn
import jax
import numpy as np
import pytest

import mujax
from mujax.train import make_mesh
from mujax.tune import CheckpointRules, TargetProgress, TuneConfig
from mujax.tune.study import SharedStudy

STEPS = 30
_TUNE = importlib.import_module("mujax.tune._tune")
_TARGET = importlib.import_module("mujax.tune._target")


def net(width):
    return nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(width), nn.relu, nn.Dense(3)])


@pytest.fixture
def config(tmp_path: pathlib.Path) -> TuneConfig:
    """A study of one trial, as `mujax.tune` leaves it."""
    random = np.random.default_rng(0)
    x = random.standard_normal((200, 6)).astype(np.float32)
    np.savez(tmp_path / "own.npz", x=x, y=np.argmax(x[:, :3], axis=1))
    config = TuneConfig(
        task="test_target:net", width=8, data=tmp_path / "own.npz", steps=STEPS,
        space={"learning_rate": [0.01]},
        batch=16, trials=1, study="s", mode="map", storage=str(tmp_path / "a.db"),
    )  # fmt: skip
    return _tuned(config)


def _tuned(config: TuneConfig) -> TuneConfig:
    place = config.stored()
    options = {"settings": place.settings, "attributes": place.attributes, "sampler": config.sampler}
    with SharedStudy.open(config.study, config.whole_space, storage=place.storage, **options) as study:
        (lease,) = study.lease(1, 1)
        study.finish(lease, 0.5, {})
    return config


def reader(width):
    return nn.Sequential([nn.Embed(64, width), nn.Dense(width), nn.relu, nn.Dense(64)])


@pytest.fixture
def text(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> TuneConfig:
    """A study on a file of tokens that counts as too large for the devices."""
    monkeypatch.setattr(_TUNE, "_HELD_BYTES", 0)
    tokens = np.random.default_rng(0).integers(0, 64, 20_000).cumsum() % 64
    tokens.astype("uint16").tofile(tmp_path / "tokens.bin")
    return _tuned(TuneConfig(
        task="test_target:reader", width=8, data=tmp_path / "tokens.bin", length=16, steps=STEPS,
        space={"learning_rate": [0.01]}, objective="valid_loss",
        batch=8, trials=1, study="s", mode="map", storage=str(tmp_path / "a.db"),
    ))  # fmt: skip


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent))


def terminate_at(step: int):
    def watch(now: TargetProgress) -> None:
        if now.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return watch


def test_a_run_that_sigterm_ends_goes_on_to_the_last_bit(config: TuneConfig, tmp_path: pathlib.Path) -> None:
    whole = mujax.transfer(config, width=16)
    rules = CheckpointRules(tmp_path / "run", every_steps=7, every_minutes=None)
    with pytest.raises(mujax.PreemptedError, match=r"step 15 of 30.*SIGTERM; a checkpoint is in .*seed-0"):
        mujax.transfer(config, width=16, checkpoints=rules, progress=terminate_at(14))
    assert sorted(path.name for path in (tmp_path / "run" / "seed-0").iterdir()) == ["14", "15"]
    seen: list[int] = []
    found = mujax.transfer(
        config, width=16, checkpoints=rules, progress=lambda now: seen.append(now.step) if now.step else None
    )
    assert min(seen) > 15
    assert found.runs == whole.runs
    jax.tree.map(np.testing.assert_array_equal, found.params, whole.params)
    # All of it once more: nothing is left to train.
    assert mujax.transfer(config, width=16, checkpoints=rules).runs == whole.runs


def test_a_text_that_stays_in_its_file_trains_alike(
    text: TuneConfig, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = text.training(16)
    assert jax.tree.leaves(job.batches.data) == []
    found = mujax.transfer(text, width=16)
    one = make_mesh({"data": 1}, jax.devices()[:1])
    split = mujax.transfer(text, width=16, mesh=one)
    np.testing.assert_allclose(split.runs[0].curve, found.runs[0].curve, rtol=1e-6)
    # Held on the device it is the same text.
    monkeypatch.setattr(_TUNE, "_HELD_BYTES", 2**20)
    held = dataclasses.replace(text)
    assert [leaf.dtype for leaf in jax.tree.leaves(held.training(16).batches.data)] == ["uint16"]
    plain = mujax.transfer(_tuned(dataclasses.replace(held, study="held")), width=16)
    np.testing.assert_allclose(found.runs[0].curve, plain.runs[0].curve, rtol=1e-6)
    assert found.runs[0].metrics["valid_loss"] == pytest.approx(plain.runs[0].metrics["valid_loss"])
    # Another text, of the same length, is not.
    other = np.fromfile(tmp_path / "tokens.bin", "uint16")
    other[12_345] ^= 1
    other.tofile(tmp_path / "other.bin")
    monkeypatch.setattr(_TUNE, "_HELD_BYTES", 0)
    with pytest.raises(mujax.ConfigError, match="data"):
        mujax.transfer(dataclasses.replace(text, data=tmp_path / "other.bin"), width=16)


def test_a_checkpoint_of_another_run_is_refused(config: TuneConfig, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "run"
    mujax.transfer(config, width=16, checkpoints=folder)
    with pytest.raises(mujax.CheckpointError, match="expected"):
        mujax.transfer(config, width=32, checkpoints=folder)
    with pytest.raises(mujax.CheckpointError, match="learning_rate"):
        mujax.transfer(config, width=16, checkpoints=folder, fixed={"learning_rate": 0.02})
    with pytest.raises(mujax.CheckpointError, match="steps"):
        mujax.transfer(config, width=16, checkpoints=folder, steps=STEPS + 1)
    with pytest.raises(mujax.ConfigError, match="every_steps: expected at most the 30 steps"):
        mujax.transfer(config, width=16, checkpoints=CheckpointRules(folder, 2, 31, None))


def test_a_mesh_of_one_device_is_no_other_run(config: TuneConfig) -> None:
    one = make_mesh({"data": 1}, jax.devices()[:1])
    found, plain = mujax.transfer(config, width=16, mesh=one), mujax.transfer(config, width=16)
    np.testing.assert_allclose(found.runs[0].curve, plain.runs[0].curve, rtol=1e-6)
    assert found.run_flops == pytest.approx(plain.run_flops, rel=0.01)
    split = mujax.transfer(config, width=16, mesh=one, accumulate=2)
    np.testing.assert_allclose(split.runs[0].curve, plain.runs[0].curve, rtol=1e-5)
    with pytest.raises(mujax.ConfigError, match="mesh: expected a mesh"):
        mujax.transfer(config, width=16, accumulate=2)


def _command(config: TuneConfig, *more: str) -> list[str]:
    study = ["--study", "s", "--storage", str(config.storage), "--width", "16"]
    return [sys.executable, "-m", "mujax.cli", "transfer", *study, *more]


def _environment() -> dict[str, str]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    path = os.pathsep.join([str(pathlib.Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return {
        **os.environ,
        "XLA_FLAGS": flags,
        "PYTHONPATH": path,
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _two(commands: list[list[str]], folder: pathlib.Path) -> list[subprocess.Popen[str]]:
    """Two processes of two devices each."""
    address = f"127.0.0.1:{_free_port()}"
    return [
        subprocess.Popen(
            [*command, "--coordinator", address, "--processes", "2", "--process", str(number)],
            cwd=folder, env=_environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number, command in enumerate(commands)
    ]  # fmt: skip


def _on_two(commands: list[list[str]], folder: pathlib.Path) -> list[tuple[int, str]]:
    """Exit code and stderr of each of two processes."""
    running = _two(commands, folder)
    return [
        (one.returncode, errors)
        for one, (_, errors) in [(one, one.communicate(timeout=300)) for one in running]
    ]


def test_two_processes_train_as_one_and_one_goes_on(config: TuneConfig, tmp_path: pathlib.Path) -> None:
    whole = mujax.transfer(config, width=16)
    mesh = ["--mesh", "data=2,fsdp=2", "--checkpoint", "run", "--every-steps", "10", "--out", "out"]
    ended = _on_two([_command(config, *mesh)] * 2, tmp_path)
    assert [code for code, _ in ended] == [0, 0], ended
    # The first one speaks.
    assert "seed 0" in ended[0][1]
    assert "seed 0" not in ended[1][1]
    report = json.loads((tmp_path / "out" / "target.json").read_text())
    np.testing.assert_allclose(report["runs"][0]["curve"], whole.runs[0].curve, rtol=1e-5)
    rows = (tmp_path / "out" / "metrics.csv").read_text().splitlines()
    assert rows[0] == "seed,step,loss,examples_per_second,utilization"
    assert rows[-1].startswith("0,30,")
    # From the last checkpoint of both, on this one device.
    rules = CheckpointRules(tmp_path / "run", every_steps=10)
    found = mujax.transfer(config, width=16, checkpoints=rules)
    np.testing.assert_allclose(found.runs[0].curve, whole.runs[0].curve, rtol=1e-5)


@pytest.mark.parametrize("killed", [0, 1])
def test_killed_in_the_middle_the_other_says_so_and_all_go_on(
    config: TuneConfig, tmp_path: pathlib.Path, killed: int
) -> None:
    """The first process has JAX's coordination service: its end is another one for the others."""
    mesh = ["--mesh", "data=2,fsdp=2", "--checkpoint", "run", "--every-steps", "10", "--steps", "80"]
    command = _command(config, *mesh, "--out", "out")

    def saved() -> list[int]:
        return sorted(int(path.name) for path in tmp_path.glob("run/seed-0/*") if path.name.isdigit())

    running = _two([command] * 2, tmp_path)
    while not saved() and running[0].poll() is None:
        time.sleep(0.01)
    running[killed].kill()
    start = time.monotonic()
    _, errors = running[1 - killed].communicate(timeout=120)
    assert time.monotonic() - start < 60
    assert running[1 - killed].returncode == 2, errors
    *_, sentence = errors.splitlines()
    assert sentence.startswith("mujax: process")
    assert "Traceback" not in errors
    assert "stack trace" not in errors
    assert sentence.endswith("start all of them again; they go on from the last checkpoint in run.")
    running[killed].communicate()
    last = saved()[-1]
    assert last < 80
    # Nothing is lost but the steps since.
    seen: list[int] = []
    rules = CheckpointRules(tmp_path / "run", every_steps=10)
    found = mujax.transfer(
        config, width=16, steps=80, checkpoints=rules, progress=lambda now: seen.append(now.step)
    )
    assert last < sorted(seen)[1] <= last + 10
    whole = mujax.transfer(config, width=16, steps=80)
    np.testing.assert_allclose(found.runs[0].curve, whole.runs[0].curve, rtol=1e-4)


def test_processes_with_other_arguments_are_refused_on_all(
    config: TuneConfig, tmp_path: pathlib.Path
) -> None:
    commands = [_command(config, "--mesh", "data=-1", "--steps", str(steps)) for steps in (10, 11)]
    ended = _on_two(commands, tmp_path)
    assert [code for code, _ in ended] == [2, 2]
    assert "got others than process 0's on 1" in ended[0][1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--processes", "2"], "--processes: expected the address of the first process"),
        (["--coordinator", "host"], "--coordinator: expected HOST:PORT or auto"),
        (["--coordinator", "h:1", "--processes", "2"], "--process: expected the number of processes"),
        (["--keep", "3"], "--keep: expected a folder for the checkpoints"),
        (["--mesh", "data=3"], "mesh: expected axes whose sizes multiply to"),
        (["--mesh", "data"], "mesh: expected axes and their sizes"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    config: TuneConfig,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    from mujax.cli import main

    out = ["--out", str(tmp_path / "out")]
    assert main([*_command(config)[3:], *out, *more]) == 2
    assert message in capsys.readouterr().err


def test_a_coordinator_that_does_not_answer(config: TuneConfig, capfd: pytest.CaptureFixture[str]) -> None:
    from mujax.cli import main

    address = f"127.0.0.1:{_free_port()}"
    given = ["--coordinator", address, "--processes", "2", "--process", "1", "--wait", "1"]
    assert main([*_command(config)[3:], *given]) == 2
    # A process of its own has joined the others.
    assert "expected process 0 to listen at 127.0.0.1" in capfd.readouterr().err


@pytest.mark.parametrize("devices", [1, 4])
def test_utilization_is_of_all_devices(devices, monkeypatch):
    # The operations of a run are those of its whole mesh.
    group = types.SimpleNamespace(
        devices=[types.SimpleNamespace(device_kind="TPU v5 lite")],
        mesh=None if devices == 1 else types.SimpleNamespace(size=devices),
        steps=10,
        flops=10 * 1.97e13,
    )
    seconds = iter((0.0, 1.0, 2.0))
    monkeypatch.setattr(_TARGET.time, "monotonic", lambda: next(seconds))
    clock = _TARGET.Clock(group, batch=8)
    assert clock.at(0) is None
    assert clock.at(1) is None
    speed = clock.at(6)
    assert speed.examples_per_second == 40
    # 5 steps of a tenth of a device's peak in a second.
    assert speed.utilization == pytest.approx(0.5 / devices)
