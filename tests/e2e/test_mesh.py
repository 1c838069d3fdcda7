"""Training on eight devices and in several processes, against one device; the base of a sharded model."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import several_processes

import mujax
from mujax import train

HERE = pathlib.Path(__file__).parent
ENV = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(pathlib.Path(mujax.__file__).parents[1])}


@pytest.fixture(scope="module")
def eight():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    command = [sys.executable, str(HERE / "eight_devices.py")]
    done = subprocess.run(
        command, env=ENV | {"XLA_FLAGS": flags}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


ROWS = (
    "linen",
    "linen, in steps",
    "linen, accumulated",
    "linen, bf16",
    "boxes",
    "logical names",
    "nnx",
    "nnx metadata",
    "functional",
    "explicit mesh",
    "shard_map",
)


@pytest.mark.parametrize("row", ROWS)
def test_the_mesh_changes_no_loss(eight, row):
    one, split = eight["pairs"][row]
    # Sums in another order round otherwise, in 16 bits by up to 4e-3.
    tolerance = 5e-4 if row.endswith("bf16") else 1e-6
    np.testing.assert_allclose(split["losses"], one["losses"], rtol=tolerance)
    assert split["losses"][-1] < split["losses"][0]


@pytest.mark.parametrize("row", ROWS)
def test_the_state_stays_where_it_is_and_is_donated(eight, row):
    one, split = eight["pairs"][row]
    assert split["stays"]
    assert split["split"] >= 6 > one["split"]
    assert [split["donated"], one["donated"]] == [True, True]


@pytest.mark.parametrize("row", ROWS)
def test_a_base_that_the_mesh_does_not_divide_is_read_as_without_a_mesh(eight, row):
    """Its width is 6, the axes' sizes are 4 and 2; with `shard_map` a mean over devices is taken as well."""
    one, split = eight["pairs"][row]
    assert split["roles"] == one["roles"]
    assert split["corrections"] == one["corrections"] == [["readout", 6 / 32]]
    assert split["findings"] == one["findings"] == 0


def test_rows_that_differ_are_told_apart(eight):
    """The twin of the rows above: other kinds of models, and another precision."""
    pairs = eight["pairs"]
    for other in ("nnx", "functional", "linen, bf16"):
        assert not np.allclose(pairs["linen"][0]["losses"], pairs[other][1]["losses"], rtol=1e-4)


def test_a_mesh_that_the_models_code_names(eight):
    kinds, sentence = eight["another mesh"]
    # A mean over devices divides by their number, which differs; a sum does not.
    assert kinds == {"sum": [], "mean": ["another mesh"], "mean, same": []}
    assert "the model's code names the mesh itself" in sentence
    assert sentence.endswith(
        "leave out mesh= in the model and call mujax under jax.set_mesh(mesh), where the base is traced on "
        "one device, or take a wider base."
    )


@pytest.mark.parametrize("mesh", ["three", "fsdp", "data"])
def test_the_step_costs_what_the_plain_models_costs(eight, mesh):
    ours, theirs = (eight["costs"][f"{mesh} {side}"] for side in ("mujax", "optax"))
    assert ours["collectives"] == theirs["collectives"] != {}
    assert ours["bytes"] == theirs["bytes"]
    assert ours["temporary"] == theirs["temporary"]
    # At most one multiplication for each entry that a device holds, of the update and not of the model.
    held = ours["bytes"] / 3 / 4
    assert 0 <= ours["flops"] - theirs["flops"] <= held


def test_a_mesh_of_another_kind_communicates_otherwise(eight):
    kinds = [eight["costs"][f"{mesh} mujax"]["collectives"] for mesh in ("three", "fsdp", "data")]
    assert all(kinds.count(kind) == 1 for kind in kinds)


def test_each_device_holds_its_share(eight):
    costs = eight["costs"]
    share = 3 * 4 * costs["entries"] / 8
    assert share < costs["fsdp mujax"]["bytes"] < 1.05 * share
    assert costs["data mujax"]["bytes"] > 7.5 * share
    # Neither is any kernel whole while it is initialised.
    assert costs["init"] < 256 * 256 * 4 < costs["init whole"]


@pytest.mark.parametrize("name", ["split", "accumulated", "resumed"])
def test_a_training_run_on_a_mesh(eight, name):
    jobs = eight["jobs"]
    np.testing.assert_allclose(jobs[name], jobs["one device"], rtol=1e-6)


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize(("count", "mesh", "ways"), [(2, "fsdp=2", "all"), (4, "fsdp=2,tensor=2", "one")])
def test_several_processes_train_as_one_and_one_goes_on(count, mesh, ways, tmp_path):
    port, folder = str(_port()), str(tmp_path / "run")
    running = [
        subprocess.Popen(
            [
                sys.executable,
                str(HERE / "several_processes.py"),
                str(count),
                str(number),
                port,
                mesh,
                ways,
                folder,
            ],
            env=ENV,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    try:
        done = [process.communicate(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * count, done[0][1][-3000:]
    found, texts = zip(*(json.loads(out.splitlines()[-1]) for out, _ in done), strict=True)
    one = train.make_mesh("fsdp=1", jax.devices()[:1])
    expected = several_processes.losses(one, ways == "all")
    for each in found:
        np.testing.assert_allclose(each, expected, rtol=1e-6)
        # A process that trained on its own share alone would not agree.
        assert each == found[0]
    uninterrupted = several_processes.resumed(one)
    np.testing.assert_allclose(several_processes.resumed(one, folder), uninterrupted, rtol=1e-6)
    assert not np.allclose(uninterrupted, expected[0], rtol=1e-2)
    # Of a text in a file each process has read its own half, and not the whole.
    several_processes.Counted.rows = 0
    numbers, rows = several_processes.text(one)
    assert list(texts) == [[numbers, rows // 2]] * count
    assert (numbers[2], rows) == (16 * 4, 16)
