"""The sweep over widths: what a run is, on every kind of model, what diverges, and what is stored."""

from __future__ import annotations

import csv
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx

import mujax
from mujax.check._models import optimizer_of
from mujax.check._width_runs import Finished, Run, RunsFile, train_models, train_runs
from mujax.errors import ConfigError
from mujax.train._losses import default_loss


def rows(folder: pathlib.Path) -> list[dict[str, str]]:
    with (folder / "runs.csv").open(newline="") as file:
        return list(csv.DictReader(file))


STEPS, BATCH, FEATURES = 12, 8, 4


def batches(steps=STEPS):
    x = jax.random.normal(jax.random.key(3), (steps, BATCH, FEATURES))
    return [(each, 2 + jnp.sin(each[:, :1])) for each in x]


def linen(width):
    return nn.Sequential([nn.Dense(width, use_bias=False), nn.relu, nn.Dense(1, use_bias=False)])


def nnx_factory(width):
    return lambda rngs: nnx.Sequential(
        nnx.Linear(FEATURES, width, use_bias=False, rngs=rngs),
        nnx.relu,
        nnx.Linear(width, 1, use_bias=False, rngs=rngs),
    )


def functional(width):
    def init(key, x):
        one, two = jax.random.split(key)
        return {
            "first": jax.random.normal(one, (FEATURES, width)) / 2,
            "readout": jax.random.normal(two, (width, 1)) / jnp.sqrt(width),
        }

    return mujax.Functional(init, lambda params, x: nn.relu(x @ params["first"]) @ params["readout"])


def image_model(width):
    return nn.Sequential(
        [lambda x: x[..., None], nn.Conv(width, (3,)), nn.relu, lambda x: x.mean(1), nn.Dense(1)]
    )


def in_mup(factory, width=16):
    return mujax.mup_init(factory(width), factory(8), batches(1)[0][0])


@pytest.mark.parametrize("factory", [nnx_factory, functional, image_model])
def test_a_curve_is_what_a_loop_by_hand_gives(factory):
    mup, data = in_mup(factory), batches()
    ((found,),) = train_models({16: mup}, data, mujax.mup_adam, default_loss, [-6.0], [1])[16]

    # By hand, through the replayed call: the same initial values, another loop.
    init_key, _ = jax.random.split(jax.random.key(1))
    params, variables = mup.replay.init(init_key)
    tx = mujax.mup_adam(2.0**-6, mup.spec)
    state = tx.init(params)

    def loss(params, batch):
        return default_loss(mup.replay.apply(params, variables, (batch[0],))[0], batch[1])

    untrained = loss(params, data[-1])
    expected = []
    step = jax.jit(jax.value_and_grad(loss))
    for batch in data:
        value, gradient = step(params, batch)
        expected.append(value)
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(found.curve, expected, rtol=2e-5)
    np.testing.assert_allclose(found.untrained, untrained, rtol=2e-5)


def test_a_diverged_run_is_none_and_the_rest_stands():
    """It is given up early: 12 steps have looks after 1, 3 and 6."""
    found = train_models({16: in_mup(linen)}, batches(), optimizer_of("sgd"), default_loss, [-6.0, 50.0], [0])
    ((good,), (lost,)) = found[16]
    assert (lost.loss, lost.final, lost.curve) == (None, None, None)
    assert good.loss == pytest.approx(good.curve.mean())
    assert good.final == good.curve[-1]


def test_seeds_draw_initial_values_and_learning_rates_are_powers_of_two():
    rates, seeds = [-7.0, -5.0], [0, 1, 2]
    found = train_models({16: in_mup(linen)}, batches(), optimizer_of("sgd"), default_loss, rates, seeds)[16]
    starts = np.array([[run.untrained for run in row] for row in found])
    assert (starts[0] == starts[1]).all(), "the learning rate changes nothing before training"
    assert len(set(starts[0])) == 3
    assert all(fast.loss < slow.loss for slow, fast in zip(*found, strict=True))


def test_another_hyperparameter_is_swept_and_the_others_are_fixed():
    """A multiplier of 1 at the rate of another sweep is the same run; one of 2 is another."""
    job = mujax.training_run(in_mup(linen), batches(), steps=STEPS)
    rate, one, two = Run("", 16, -6.0, 0), Run("", 16, 0.0, 0), Run("", 16, 1.0, 0)
    by_rate = train_runs([rate], lambda _, __: job, steps=STEPS)
    fixed = {"learning_rate": 2.0**-6, "output_mult": 7.0}  # The swept one is not fixed.
    by_mult = train_runs([one, two], lambda _, __: job, steps=STEPS, swept="output_mult", fixed=fixed)
    np.testing.assert_allclose(by_mult[one].curve, by_rate[rate].curve, rtol=1e-5)
    assert by_mult[two].untrained != pytest.approx(by_mult[one].untrained, rel=1e-2)
    # Four products of a step, two operations to a parameter and example, and what the optimizer costs.
    assert by_rate[rate].flops > STEPS * 2 * BATCH * (2 * FEATURES * 16 + 2 * 16)


# ---- what is stored -------------------------------------------------------------------------------------

SETTINGS = {
    "task": "toy",
    "data": "0" * 16,
    "base_width": "8",
    "steps": "20",
    "batch": "32",
    "optimizer": "adam",
    "momentum": "",
    "mujax": "1",
}
LINE = "toy," + "0" * 16 + ",8,20,32,adam,,1,mup,16,-3.0,1,0.5,0.4,0.01,2.0\n"


def open_with(folder: pathlib.Path, content: str) -> dict[Run, Finished]:
    (folder / "runs.csv").write_text(content)
    with RunsFile(folder, SETTINGS) as file:
        return dict(file.runs)


@pytest.fixture
def header(tmp_path: pathlib.Path) -> str:
    with RunsFile(tmp_path, SETTINGS):
        return (tmp_path / "runs.csv").read_text()


def test_stored_runs_are_read_back(tmp_path: pathlib.Path, header: str) -> None:
    with RunsFile(tmp_path, SETTINGS) as file:
        file.append(Run("mup", 16, -3.5, 7), Finished(0.1 + 0.2, 0.25, 1.0), 0.5)
        file.append(Run("sp", 16, 3.0, 7), Finished(None, None, None), 0.5)
    with RunsFile(tmp_path, SETTINGS) as file:
        assert file.runs == {
            Run("mup", 16, -3.5, 7): Finished(0.1 + 0.2, 0.25, 1.0),
            Run("sp", 16, 3.0, 7): Finished(None, None, None),
        }
    assert [row["final_loss"] for row in rows(tmp_path)] == ["0.25", ""]
    assert (tmp_path / "runs.csv").read_text().startswith(header)


def test_a_torn_header_is_written_again(tmp_path: pathlib.Path, header: str) -> None:
    assert open_with(tmp_path, header[:9]) == {}
    assert (tmp_path / "runs.csv").read_text() == header


@pytest.mark.parametrize("bad", ["something else\n", "\n", "loss,width\n1,2\n"])
def test_a_file_of_another_kind_is_left_alone(tmp_path: pathlib.Path, bad: str) -> None:
    with pytest.raises(ConfigError, match="to be the runs of a sweep, got something else"):
        open_with(tmp_path, bad)
    assert (tmp_path / "runs.csv").read_text() == bad


@pytest.mark.parametrize(
    "bad",
    [
        LINE.replace("16,", "wide,"),
        LINE.replace("0.5", "nan"),
        LINE.replace(",0.01,2.0", ""),
        LINE.replace("\n", ",1\n"),
        "\n",
    ],
)
def test_a_broken_line_is_named(tmp_path: pathlib.Path, header: str, bad: str) -> None:
    assert open_with(tmp_path, header + LINE) == {Run("mup", 16, -3.0, 1): Finished(0.5, 0.4, 2.0)}
    with pytest.raises(ConfigError, match=r"expected line 3 of .*runs\.csv to be a run, got"):
        open_with(tmp_path, header + LINE + bad)
    assert (tmp_path / "runs.csv").read_text() == header + LINE + bad


def test_a_folder_that_can_not_be_one_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"out: expected a folder to write to, got .*file, which is not"):
        RunsFile(tmp_path / "file", SETTINGS)


@pytest.mark.parametrize(
    "bad",
    [
        b"\xff\xfe\n",
        b"\xff\xfe",
        b"\x89PNG\r\n\x1a\n\x00\x00",
        "width,loss\n".encode("utf-16"),
        b"notes of mine, without a new line",
        b"\xef\xbb\xbftask,data",
        b"\x00" * 64,
        b"\n\n",
        b'"' + b"x" * 200_000 + b'"\n',
        b"PK\x03\x04\x14",
    ],
)
def test_a_file_that_is_none_of_ours_is_refused_and_stays(tmp_path: pathlib.Path, bad: bytes) -> None:
    (tmp_path / "runs.csv").write_bytes(bad)
    with pytest.raises(
        ConfigError, match=r"^out: expected .*runs\.csv to be the runs of a sweep, got someth"
    ):
        RunsFile(tmp_path, SETTINGS)
    assert (tmp_path / "runs.csv").read_bytes() == bad


@pytest.mark.parametrize("tail", [b"\xff\xfe\x00", b"toy,\x89PNG"])
def test_undecodable_bytes_behind_the_runs_are_refused_and_stay(
    tmp_path: pathlib.Path, header: str, tail: bytes
) -> None:
    content = (header + LINE).encode() + tail
    (tmp_path / "runs.csv").write_bytes(content)
    with pytest.raises(ConfigError, match=r"to be the runs of a sweep, got something else \('utf-8' codec"):
        RunsFile(tmp_path, SETTINGS)
    assert (tmp_path / "runs.csv").read_bytes() == content


@pytest.mark.parametrize("tail", [b"toy,0", "µ".encode()[:1]])
def test_half_a_line_is_taken_off_and_run_again(tmp_path: pathlib.Path, header: str, tail: bytes) -> None:
    """The twin: what an interrupted run left, even half a character of a task's name."""
    (tmp_path / "runs.csv").write_bytes((header + LINE).encode() + tail)
    with RunsFile(tmp_path, SETTINGS) as file:
        assert list(file.runs) == [Run("mup", 16, -3.0, 1)]
    assert (tmp_path / "runs.csv").read_text() == header + LINE


def test_a_file_of_0_3_goes_on_without_untrained_losses(tmp_path: pathlib.Path, header: str) -> None:
    old = header.replace(",untrained", "") + LINE.replace(",2.0", "")
    assert open_with(tmp_path, old) == {Run("mup", 16, -3.0, 1): Finished(0.5, 0.4, None)}
    with RunsFile(tmp_path, SETTINGS) as file:
        file.append(Run("mup", 16, -2.0, 1), Finished(0.25, 0.125, 2.0), 0.5)
    assert (tmp_path / "runs.csv").read_text() == old + LINE.replace(
        "-3.0,1,0.5,0.4,0.01,2.0", "-2.0,1,0.25,0.125,0.500"
    )
