"""Checkpoints: resumed runs against uninterrupted ones, what is refused, kills and preemptions."""

import contextlib
import dataclasses
import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pod
import pytest

import mujax
from mujax.errors import CheckpointError, ConfigError, DataError
from mujax.train import Checkpoints
from mujax.train._checkpoint import _compare_processes, _sums

SPEC = pod.built()[0].spec
STATE = {"w": jnp.arange(64.0).reshape(8, 8), "step": jnp.int32(4)}


def saved(folder, *steps, **options):
    """A folder with checkpoints of some steps, in which each the weights are the step's."""
    with Checkpoints(folder, SPEC, {"rate": 0.1}, every_minutes=None, keep=9, **options) as checkpoints:
        for step in steps:
            assert checkpoints.save(step, {**STATE, "w": STATE["w"] + step}, force=True)
    return folder


def opened(folder, spec=SPEC, hparams=None, **options):
    return Checkpoints(folder, spec, {"rate": 0.1} if hparams is None else hparams, **options)


def assert_equal(state, other):
    assert jax.tree.structure(state) == jax.tree.structure(other)
    for one, two in zip(pod.arrays(state), pod.arrays(other), strict=True):
        np.testing.assert_array_equal(one, two)


# Resuming


@pytest.fixture(scope="module")
def whole():
    run = pod.Run()
    return run, run.train(run.start(), 6)


def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(whole, tmp_path):
    first = pod.Run()
    with first.checkpoints(tmp_path, every_steps=2) as checkpoints:
        # The state is donated to the next step while it is written.
        first.train(first.start(), 5, checkpoints)
    second = pod.Run()
    with second.checkpoints(tmp_path, every_steps=2) as checkpoints:
        assert checkpoints.steps == (2, 4)
        state = checkpoints.restore(second.abstract(), second.stream)
        assert int(state.step) == second.stream.step == 4
        state = second.train(state, 6, checkpoints)
    run, reference = whole
    assert_equal(state, reference)
    assert second.losses == run.losses[4:]
    # Without the position the batches are others, and so is the run.
    third = pod.Run()
    with third.checkpoints(tmp_path) as checkpoints:
        state = checkpoints.restore(third.abstract(), third.stream, step=4)
    third.stream.set_state({**third.stream.get_state(), "step": 0})
    third.train(state, 2)
    assert third.losses != run.losses[4:]


def test_an_older_checkpoint_can_be_restored(tmp_path):
    with opened(saved(tmp_path, 10, 20)) as checkpoints:
        assert float(checkpoints.restore(STATE, step=10)["w"][0, 0]) == 10
        assert float(checkpoints.restore(STATE)["w"][0, 0]) == 20


def test_a_checkpoint_says_what_it_is_of(tmp_path):
    run = pod.Run()
    next(run.stream)
    with run.checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, STATE, run.stream, force=True)
        found = checkpoints.saved()
    assert found == mujax.train.Saved(1, SPEC, {"batch": 8}, run.stream.get_state())


def test_all_kinds_of_arrays_come_back(tmp_path):
    x = jnp.linspace(-2, 2, 24).reshape(2, 3, 4)
    state = {
        "bf16": x.astype(jnp.bfloat16),
        "fp8": x.astype(jnp.float8_e4m3fn),
        "int8": jnp.int8(-3),
        "bool": x > 0,
        "complex": x + 1j * x,
        "key": jax.random.key(3),
        "nothing": (),
        "numpy": np.arange(3, dtype=np.int32),
    }
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, state, force=True)
        assert_equal(checkpoints.restore(jax.eval_shape(lambda: state)), state)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.at[7, 3].add(1e-5),
        lambda w: w.at[0, 0].set(-0.0),
        lambda w: w.at[0].set(w[1]).at[1].set(w[0]),
        lambda w: w.T,
    ],
)
def test_a_sum_tells_arrays_apart(change):
    assert _sums([STATE["w"]]) != _sums([change(STATE["w"])])
    assert _sums([STATE["w"]]) == _sums([STATE["w"] + 0])


# Data of grain's


EXAMPLES = grain.MapDataset.range(12).seed(5).shuffle().repeat()


def test_an_iterator_of_grains_is_restored(tmp_path):
    def iterator():
        return iter(EXAMPLES.batch(4).to_iter_dataset(grain.ReadOptions(1, 2)))

    read = iterator()
    next(read)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, STATE, read, force=True)
        expected = next(read)
        again = iterator()
        checkpoints.restore(STATE, again)
        np.testing.assert_array_equal(next(again), expected)
        with pytest.raises(ConfigError, match=r"data: expected a mujax.data.Stream .* got list"):
            checkpoints.restore(STATE, [])
    assert not np.array_equal(next(iterator()), expected)


def test_the_positions_of_other_processes_are_refused():
    saved = mujax.train.Saved(1, SPEC, {}, {"processes": 4})
    message = (
        "x, data: expected the positions of 1 processes, got those of 4; start as many, or .*grain_stream"
    )
    with pytest.raises(CheckpointError, match=message):
        _compare_processes("x", saved)
    _compare_processes("x", dataclasses.replace(saved, position={"processes": 1}))


# When


def test_the_last_ones_are_kept_at_multiples_and_at_the_end(tmp_path):
    with Checkpoints(tmp_path, SPEC, keep=2, every_steps=2, every_minutes=None) as checkpoints:
        written = [checkpoints.save(step, STATE) for step in range(1, 8)]
        assert written == [False, True, False, True, False, True, False]
        assert checkpoints.save(7, STATE, force=True)
        # It is there already.
        assert checkpoints.save(7, STATE, force=True)
        checkpoints.wait()
        assert checkpoints.steps == (6, 7)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["6", "7"]
        assert not checkpoints.preempted


def test_checkpoints_are_minutes_apart(tmp_path):
    with Checkpoints(tmp_path / "rare", SPEC, every_minutes=60) as checkpoints:
        assert [checkpoints.save(step, STATE) for step in range(1, 4)] == [True, False, False]
    written = []
    with Checkpoints(tmp_path / "often", SPEC, every_minutes=1e-9) as checkpoints:
        for step in range(1, 4):
            written.append(checkpoints.save(step, STATE))
            checkpoints.wait()
    assert written == [True] * 3


# Damage


def outcome(checkpoints, expected):
    """What a restore of step 20 says; None if it gives what was saved."""
    try:
        found = checkpoints.restore(jax.eval_shape(lambda: expected))
    except CheckpointError as error:
        return str(error)
    assert_equal(found, expected)
    return None


@pytest.fixture
def abandoned(monkeypatch):
    """Where Orbax fails to read it leaves coroutines behind that fail when they are collected."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    yield
    gc.collect()


@pytest.mark.usefixtures("abandoned")
def test_every_damage_is_found_and_the_checkpoint_before_it_offered(tmp_path):
    saved(tmp_path, 10, 20)
    refused = set()
    with opened(tmp_path) as checkpoints:
        expected = checkpoints.restore(STATE)
        files = [path for path in sorted((tmp_path / "20").rglob("*")) if path.is_file()]
        assert len(files) > 8
        for file in files:
            whole = file.read_bytes()
            middle = len(whole) // 2
            changed = whole[:middle] + bytes([whole[middle] ^ 16]) + whole[middle + 1 :]
            for damage in (None, b"", whole[:middle], changed):
                if damage is None:
                    file.unlink()
                else:
                    file.write_bytes(damage)
                sentence = outcome(checkpoints, expected)
                if sentence is not None:
                    refused.add(file.parent.name)
                    assert re.fullmatch(
                        rf"{tmp_path}/20: expected a complete checkpoint, got a damaged one \(.*\); "
                        r"remove it to go on from step 10, the checkpoint before it\.",
                        sentence,
                    )
                file.write_bytes(whole)
        assert {"state", "d", "mujax"} <= refused
        assert outcome(checkpoints, expected) is None
    shutil.rmtree(tmp_path / "20")
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest == 10
        assert float(checkpoints.restore(STATE)["w"][0, 0]) == 10


@pytest.mark.usefixtures("abandoned")
def test_changed_bytes_of_an_array_are_found(tmp_path):
    """Orbax alone restores them."""
    state = {"w": jax.random.normal(jax.random.key(0), (32, 32))}
    with opened(tmp_path) as checkpoints:
        checkpoints.save(20, state, force=True)
        checkpoints.wait()
        files = (tmp_path / "20" / "state" / "ocdbt.process_0" / "d").iterdir()
        largest = max(files, key=lambda path: path.stat().st_size)
        whole = bytearray(largest.read_bytes())
        found = set()
        for place in range(0, len(whole), 256):
            whole[place] ^= 1
            largest.write_bytes(whole)
            whole[place] ^= 1
            found.add(outcome(checkpoints, state))
        assert any("(other bytes in w); there is none before it." in text for text in found if text)


@pytest.mark.usefixtures("abandoned")
def test_a_checkpoint_with_a_part_missing_is_refused(tmp_path):
    saved(tmp_path, 10, 20, 30)
    shutil.rmtree(tmp_path / "30" / "state")
    shutil.rmtree(tmp_path / "20" / "mujax")
    with opened(tmp_path) as checkpoints:
        with pytest.raises(
            CheckpointError, match=r"/30: expected a complete .* remove it to go on from step 20"
        ):
            checkpoints.restore(STATE)
        with pytest.raises(
            CheckpointError, match=r"/20: expected a complete .* remove it to go on from step 10"
        ):
            checkpoints.restore(STATE, step=20)


# What belongs to another run


def spec_of(**options):
    return pod.built(**options)[0].spec


class _Other:
    """Of another model: a layer less, and of other names."""

    spec = mujax.mup_init(pod.nn.Dense(16), pod.nn.Dense(8), pod.X[:1]).spec


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            lambda: spec_of(width=32),
            r"10, layers_0/bias: expected shape \(32,\), got shape \(16,\) in a checkpoint of another width; "
            "build the model as it was when it was saved, or keep",
        ),
        (
            lambda: _Other.spec,
            r"10, bias: expected shape \(16,\), got no such parameter in a checkpoint of another model; ",
        ),
        (
            lambda: spec_of(base=4),
            r"10, layers_0/bias: expected base_shape \(4,\), got \(8,\) in a checkpoint of another spec; ",
        ),
        (
            lambda: spec_of(parametrization="table3"),
            "10: expected the parametrization table3, got mup in a checkpoint of another spec; give mup_init",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(spec, message, tmp_path):
    saved(tmp_path, 10)
    with opened(tmp_path, spec()) as checkpoints, pytest.raises(CheckpointError, match=message):
        checkpoints.restore(STATE)


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        (
            {"rate": 0.2},
            "10, rate: expected 0.2, got 0.1 in a checkpoint of other hyperparameters; go on with",
        ),
        ({}, "10, rate: expected none, got 0.1 in a checkpoint of other"),
        ({"rate": 0.1, "b1": 0.9}, "10, b1: expected 0.9, got none in a checkpoint of other"),
    ],
)
def test_a_checkpoint_of_other_hyperparameters_is_refused(hparams, message, tmp_path):
    saved(tmp_path, 10)
    with opened(tmp_path, hparams=hparams) as checkpoints, pytest.raises(CheckpointError, match=message):
        checkpoints.restore(STATE)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {**STATE, "mu": jnp.zeros(3)},
            r"10, mu: expected float32\[3\], got no such array in a checkpoint of",
        ),
        (
            {"w": STATE["w"]},
            r"10, step: expected no such array, got int32\[\] in a checkpoint of another state",
        ),
        (
            {**STATE, "w": STATE["w"].astype(jnp.bfloat16)},
            r"w: expected bfloat16\[8, 8\], got float32\[8, 8\]",
        ),
    ],
)
def test_a_checkpoint_of_another_state_is_refused(state, message, tmp_path):
    saved(tmp_path, 10)
    with opened(tmp_path) as checkpoints, pytest.raises(CheckpointError, match=message):
        checkpoints.restore(state)


def test_a_position_in_other_data_is_refused(tmp_path):
    run = pod.Run()
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, STATE, run.stream, force=True)
        other = mujax.data.grain_stream(EXAMPLES, batch=8)
        with pytest.raises(DataError, match="position in the data, examples: expected"):
            checkpoints.restore(STATE, other)
        with pytest.raises(CheckpointError, match="1: expected data to be given, got none; pass data="):
            checkpoints.restore(STATE)
    with (
        opened(saved(tmp_path / "without", 1)) as checkpoints,
        pytest.raises(CheckpointError, match="1: expected a position in the data, got none"),
    ):
        checkpoints.restore(STATE, run.stream)


def test_a_folder_of_a_run_that_is_further_is_refused(tmp_path):
    saved(tmp_path, 10, 20)
    with opened(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match=r"20: expected no checkpoint of a later step than 11"):
            checkpoints.save(11, STATE)
        assert checkpoints.save(21, STATE, force=True)


def test_a_checkpoint_that_is_not_there(tmp_path):
    with opened(tmp_path / "new") as checkpoints:
        assert checkpoints.latest is None
        assert checkpoints.steps == ()
        with pytest.raises(CheckpointError, match="new: expected a checkpoint, got none"):
            checkpoints.restore(STATE)
    with (
        opened(saved(tmp_path, 10, 20)) as checkpoints,
        pytest.raises(CheckpointError, match=r"expected a checkpoint of step 15, got those of steps 10, 20"),
    ):
        checkpoints.saved(15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, "keep: expected a whole number of at least 1, got 0"),
        ({"every_steps": 0}, "every_steps: expected a whole number of at least 1 or None, got 0"),
        ({"every_minutes": -1}, "every_minutes: expected a number of minutes, more than 0 or None, got -1"),
        ({"hparams": {"rate": float("nan")}}, "hparams: expected values that JSON has"),
        ({"hparams": {"rate": object()}}, "hparams: expected values that JSON has"),
    ],
)
def test_wrong_options_are_refused(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path, **options)


def test_numbers_of_numpy_and_jax_are_hyperparameters(tmp_path):
    with opened(tmp_path, hparams={"a": np.float32(0.5), "b": jnp.int32(3), "c": (1, 2)}) as checkpoints:
        checkpoints.save(1, STATE, force=True)
        assert checkpoints.saved().hparams == {"a": 0.5, "b": 3, "c": [1, 2]}
        checkpoints.restore(STATE)


@pytest.mark.parametrize(
    ("module", "needs", "message"),
    [
        (
            "orbax.checkpoint",
            opened,
            "checkpoints: expected the package orbax-checkpoint, got none; install it",
        ),
        (
            "grain",
            lambda _: pod.Run().stream,
            "data: expected the package grain, which reads batches ahead, got none; ",
        ),
    ],
)
def test_a_missing_package_is_named(module, needs, message, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module, None)
        with pytest.raises(ConfigError, match=rf'{message}.*"mujax-mup\[train\]"'):
            needs(tmp_path)
    # With it nothing is refused.
    with contextlib.closing(needs(tmp_path)):
        pass


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="in it: expected a folder that checkpoints can be written to"):
        opened(tmp_path / "file" / "in it")


def test_a_checkpoint_that_cannot_be_written_is_an_error(tmp_path):
    with opened(tmp_path / "run") as checkpoints:
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").write_text("")
        with pytest.raises(CheckpointError, match="run: expected a checkpoint to be written, got an error"):
            checkpoints.save(1, STATE, force=True) and checkpoints.wait()


# Preemption and kills


def test_sigterm_saves_and_ends_the_loop(whole, tmp_path):
    former = signal.getsignal(signal.SIGTERM)
    first = pod.Run()
    with first.checkpoints(tmp_path) as checkpoints:
        state = first.train(first.start(), 2, checkpoints)
        assert not checkpoints.preempted
        assert checkpoints.steps == ()
        os.kill(os.getpid(), signal.SIGTERM)
        # A second one would be handled as before.
        assert signal.getsignal(signal.SIGTERM) is former
        first.train(state, 6, checkpoints)
        assert checkpoints.preempted
        assert first.stream.step == 3
        assert (tmp_path / "3").is_dir()
    assert signal.getsignal(signal.SIGTERM) is former
    second = pod.Run()
    with second.checkpoints(tmp_path) as checkpoints:
        state = second.train(checkpoints.restore(second.abstract(), second.stream), 6, checkpoints)
    assert_equal(state, whole[1])


def child(*arguments, devices=1):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, pod.__file__, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XLA_FLAGS": flags},
    )


@pytest.fixture(scope="module")
def eight_devices(tmp_path_factory):
    """What a process with 8 devices found, and the folder that it was killed in at its end."""
    folder = tmp_path_factory.mktemp("runs")
    with child("eight", folder, devices=8) as process:
        output, errors = process.communicate(timeout=240)
    assert process.returncode == -signal.SIGKILL, errors
    return json.loads(output), folder / "killed"


def test_a_run_goes_on_on_another_mesh(eight_devices):
    found, _ = eight_devices
    assert found["4x2"] == {"restored": 0, "trained": 0, "losses": 0, "devices": [8]}
    for name, devices in (("2x4", 8), ("1x1", 1)):
        assert found[name]["restored"] == 0
        assert found[name]["devices"] == [devices]
        assert found[name]["trained"] < 1e-6
        assert found[name]["losses"] < 1e-6


def test_a_stream_is_the_same_on_any_mesh(eight_devices):
    found, _ = eight_devices
    # A function of the user's is compiled for the mesh, and may round otherwise.
    assert found["streams"].pop("function") < 1e-6
    assert found["streams"] == {"text": 0, "two axes": 0, "list": 0, "grain": 0}
    assert found["batch"].startswith(
        "batch: expected a multiple of 4, the parts that the sharding cuts it into"
    )


def test_killed_while_it_writes_the_one_before_counts(eight_devices):
    _, folder = eight_devices
    unfinished = [path for path in folder.iterdir() if path.name not in "12"]
    assert len(unfinished) == 1
    assert unfinished[0].name.startswith("3.")
    run, reference = pod.Run(), pod.Run()
    with run.checkpoints(folder) as checkpoints:
        assert checkpoints.steps == (1, 2)
        state = checkpoints.restore(run.abstract(), run.stream)
        checkpoints.save(3, run.train(state, 3), run.stream, force=True)
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]
    reference.train(reference.start(), 3)
    np.testing.assert_allclose(run.losses, reference.losses[2:], rtol=0, atol=1e-6)


def test_killed_in_the_middle_of_the_arrays_the_one_before_counts(tmp_path):
    with child("halfway", tmp_path) as process:
        _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors
    # Some of the 48 MB are there, and not all.
    assert 0 < pod.written(tmp_path, 2) < 12 * 2**22
    with Checkpoints(tmp_path, SPEC, every_minutes=None) as checkpoints:
        assert checkpoints.steps == (1,)
        assert_equal(checkpoints.restore(jax.eval_shape(lambda: pod.large(1))), pod.large(1))
        checkpoints.save(2, pod.large(2), force=True)
    # One that was not killed counts.
    with Checkpoints(tmp_path, SPEC, every_minutes=None) as checkpoints:
        assert checkpoints.steps == (1, 2)
        assert_equal(checkpoints.restore(jax.eval_shape(lambda: pod.large(2))), pod.large(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_two_processes_are_preempted_together_and_one_goes_on(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [child("process", tmp_path, port, number, devices=2) for number in range(2)]
    try:
        for process in processes:
            assert "started\n" in iter(process.stdout.readline, "")
        processes[1].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert [process.returncode for process in processes] == [0, 0], outputs
    # gloo writes to stdout, too.
    found, other = (json.loads(output[output.index("{") :]) for output, _ in outputs)
    assert found == other
    assert found["preempted"]
    assert found["total"] == pod.total(pod.pairs(None))
    steps = len(found["losses"])
    run, reference = pod.Run(), pod.Run()
    with run.checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == steps < 1000
        state = checkpoints.restore(run.abstract(), run.stream)
    expected = reference.train(reference.start(), steps)
    np.testing.assert_allclose(found["losses"], reference.losses, rtol=0, atol=1e-6)
    assert pod.gap(pod.arrays(state), pod.arrays(expected)) < 1e-5
    run.train(state, steps + 3)
    reference.train(expected, steps + 3)
    np.testing.assert_allclose(run.losses, reference.losses[-3:], rtol=0, atol=1e-6)
