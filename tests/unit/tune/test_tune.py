"""Tuning a proxy and training the target with what was found: tasks, a user's own model and data."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mujax
from mujax.errors import ConfigError, MujaxError
from mujax.train import transfers
from mujax.tune._sweep import Study
from mujax.tune._tasks import TASKS
from mujax.tune._transfer import TargetProgress
from mujax.tune._tune import TuneConfig, read_study
from mujax.tune.study import SharedStudy

SPACE = {"learning_rate": {"low": 2.0**-9, "high": 2.0**-5, "log": True}, "output_mult": [0.5, 1.0, 2.0]}


def net(width, *, depth=1):
    layers = [layer for _ in range(depth) for layer in (nn.Dense(width), nn.relu)]
    return nn.Sequential([nn.Dense(width), nn.relu, *layers, nn.Dense(3)])


@pytest.fixture
def file(tmp_path: pathlib.Path) -> pathlib.Path:
    """Three classes that planes separate."""
    random = np.random.default_rng(0)
    x = random.standard_normal((200, 6)).astype(np.float32)
    np.savez(tmp_path / "own.npz", x=x, y=np.argmax(x[:, :3], axis=1))
    return tmp_path / "own.npz"


@pytest.fixture
def config(file: pathlib.Path) -> TuneConfig:
    return TuneConfig(
        task=net, width=8, data=file, space=SPACE, steps=12, batch=16, trials=3, study="s", mode="map",
        storage=str(file.parent / "a.db"), fixed={"b2": 0.99},
    )  # fmt: skip


def store(config: TuneConfig, *losses: float | None) -> None:
    """A study as `mujax.tune` leaves it, without training anything."""
    place, count = config.stored(), len(losses)
    options = {"settings": place.settings, "attributes": place.attributes, "sampler": config.sampler}
    with SharedStudy.open("s", config.whole_space, storage=place.storage, **options) as study:
        for lease, loss in zip(study.lease(count, count), losses, strict=True):
            study.finish(lease, loss, {})


def test_the_target_is_trained_with_the_best_of_the_study(config: TuneConfig) -> None:
    config = dataclasses.replace(config, study=Study("s", config.storage), storage=None)
    study = mujax.tune(config)
    assert len(study.trials) == 3
    assert study.best is not None
    seen: list[TargetProgress] = []
    found = mujax.transfer(config, width=32, seeds=2, progress=seen.append)
    assert found.trial == study.best
    assert found.hparams == {"b2": 0.99, **study.best.hparams}
    assert (found.proxy, found.width, found.steps, len(found.runs)) == (8, 32, 12, 2)
    assert found.loss == pytest.approx(np.mean([run.loss for run in found.runs]))
    assert found.standard_error == pytest.approx(
        abs(np.subtract(*[run.loss for run in found.runs])) / 2, rel=1e-6
    )
    assert found.params["layers_2"]["kernel"].shape == (32, 32)
    assert seen[0].work_done == 0
    assert seen[-1].work_done == 1
    assert [now.work_done for now in seen] == sorted(now.work_done for now in seen)

    # Operations: of the compiled programs, three trials against one run.
    assert found.tuning_flops == study.flops
    assert found.saved == pytest.approx(found.run_flops / (study.flops / 3))
    assert found.direct_flops == pytest.approx(3 * found.run_flops)
    # Kernels of 6x8, 8x8 and 8x3 against 6x32, 32x32 and 32x3, and what does not grow.
    assert 3 < found.saved < (6 * 32 + 32 * 32 + 32 * 3) / (6 * 8 + 8 * 8 + 8 * 3)
    text = json.loads(found.to_json())
    assert (text["study"], text["hparams"]) == ("s", found.hparams)
    assert len(text["runs"][0]["curve"]) == 12

    # It is the run that one would make by hand.
    job = config.training(32)
    again = mujax.sweep(
        job, {"learning_rate": [found.hparams["learning_rate"]]}, trials=1, seeds=2, sampler="grid",
        mode="map",
        fixed={name: value for name, value in found.hparams.items() if name != "learning_rate"},
    )  # fmt: skip
    assert again.trials[0].loss == pytest.approx(found.loss, rel=1e-4)


def test_the_target_is_in_the_proxys_mup(config: TuneConfig) -> None:
    assert config.training(32).built({}).mup.spec["layers_2/kernel"].r_in == 4
    assert config.training(8).built({}).mup.spec["layers_2/kernel"].r_in == 1
    plain = dataclasses.replace(config, parametrization="sp").training(32).built({}).mup
    assert str(plain.spec.parametrization) == "sp"


def test_what_does_not_transfer_is_settled_or_refused(config: TuneConfig) -> None:
    space = {**SPACE, "weight_decay": [0.0, 0.1], "depth": [1, 2]}
    config = dataclasses.replace(config, space=space, optimizer="adamw", trials=2, fixed={})
    store(config, 0.5, 0.7)
    with pytest.raises(ConfigError, match="got weight_decay, depth tuned as well"):
        mujax.transfer(config, width=16)
    with pytest.raises(ConfigError, match="got depth tuned as well"):
        mujax.transfer(config, width=16, also=("weight_decay",))
    with pytest.raises(ConfigError, match="also: expected hyperparameters that the study tuned, got 'b1'"):
        mujax.transfer(config, width=16, also=("b1",))
    found = mujax.transfer(config, width=16, also=("weight_decay",), fixed={"depth": 3})
    assert found.not_transferred == {"weight_decay": "taken", "depth": "set"}
    assert found.hparams["depth"] == 3
    assert "layers_6" in found.params


def test_a_study_is_resumed_from_its_name(config: TuneConfig, monkeypatch, tmp_path) -> None:
    (tmp_path / "mine_tuned.py").write_text(
        "from flax import linen as nn\n"
        "def net(width):\n"
        "    return nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(3)]), None\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    config = dataclasses.replace(config, task="mine_tuned:net")
    tuned = mujax.tune(config)
    again = TuneConfig.of_study("s", config.storage)
    for name in ("task", "width", "data", "steps", "batch", "fixed", "optimizer"):
        assert getattr(again, name) == getattr(config, name), name
    assert read_study(again).trials == tuned.trials
    assert mujax.transfer(again, width=16).loss is not None
    with pytest.raises(ConfigError, match="expected 's' to have been tuned with batch 8, got 16"):
        mujax.transfer(dataclasses.replace(again, batch=8), width=16)
    with pytest.raises(ConfigError, match=r"study: expected one of 's' in .*a\.db, got 'other'"):
        TuneConfig.of_study("other", config.storage)


def test_a_study_with_settings_of_its_own(config: TuneConfig, file: pathlib.Path) -> None:
    named = config.stored()
    assert (named.name, named.storage, named.attributes) == ("s", config.storage, {"data": str(file)})
    assert named.settings == config.settings()
    place = Study("s", "b.db", settings={"note": "first"}, attributes={"by": "me"}, heartbeat_timeout=600)
    found = dataclasses.replace(config, study=place, storage=None).stored()
    assert found.settings == {**named.settings, "note": "first"}
    assert found.attributes == {**named.attributes, "by": "me"}
    assert (found.name, found.storage, found.heartbeat_timeout) == ("s", "b.db", 600)


def test_batches_and_a_loss_of_ones_own() -> None:
    x = jax.random.normal(jax.random.key(0), (6, 16, 4))

    def loss(outputs, targets):
        return jnp.abs(outputs - targets).mean()

    config = TuneConfig(
        task=lambda width: nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(1)]),
        batches=list(zip(x, x[..., :1], strict=True)), loss=loss, steps=6, width=8, trials=2, mode="map",
        valid=[(x[0], x[0, :, :1])], objective="valid_loss",
    )  # fmt: skip
    found = mujax.tune(config)
    assert all(trial.loss == trial.metrics["valid_loss"] for trial in found.trials)
    assert set(found.trials[0].hparams) == {"learning_rate", "init_scale", "output_mult"}


@pytest.mark.parametrize("name", TASKS)
def test_tasks_tune_what_they_say(name: str) -> None:
    config = TuneConfig(task=name)
    assert config.proxy < (config.target or 0)
    assert set(config.whole_space) >= {"learning_rate", "init_scale", "output_mult", "warmup", "end"}
    assert ("attention_mult" in config.whole_space) == (name == "text-transformer")
    assert config.all_fixed == {"schedule": "linear"}
    assert TuneConfig(task=name, fixed={"end": 1.0}).whole_space.keys() == config.whole_space.keys() - {"end"}
    assert all(transfers(one) for one in config.whole_space)


def test_a_text_of_ones_own_and_sequences_of_ones_own_length(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"to be or not to be, that is the question; " * 400)

    def words(width):
        return nn.Sequential([nn.Embed(256, width), nn.Dense(width), nn.relu, nn.Dense(256)])

    config = TuneConfig(task=words, data=tmp_path / "a.txt", length=12, width=8, steps=3, batch=4)
    assert config.training(16).built({}).mup.replay.inputs[0].shape == (4, 12)


# ---- what is wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"task": "mnist"}, "task: expected one of mnist-mlp, text-transformer, package.module:factory or"),
        ({"task": net}, "width: expected the proxy's width for a model of your own, got none"),
        ({"task": net, "width": 8}, "data: expected either a file of data or batches .*, got neither"),
        ({"task": "text-transformer", "width": 20}, "width: expected multiples of 16 for the task"),
        ({"data": pathlib.Path("a")}, "data: expected none for the task 'mnist-mlp'"),
        ({"loss": max}, "batches, loss: expected none for the task 'mnist-mlp'"),
        ({"trials": 0}, "trials: expected a whole number of at least 1, got 0"),
        ({"optimizer": "adamm"}, "optimizer: expected one of"),
        ({"parametrization": "mupp"}, "parametrization"),
        (
            {"zero_init": ("bias",)},
            "zero_init: expected a sequence of 'readout' and 'query' or None, got .'bias'",
        ),
        ({"task": net, "width": 8, "batches": []}, "steps: expected the number of steps beside batches"),
        ({"steps": 1.5}, "steps: expected a whole number of at least 1 or None, got 1.5"),
        (
            {"objective": "accuracy"},
            "objective: expected one of 'loss', 'mean_loss', 'valid_loss', got 'accuracy'",
        ),
        (
            {"task": net, "width": 8, "batches": [], "steps": 3, "objective": "valid_loss"},
            "objective: expected held-out batches for 'valid_loss', got none; pass valid",
        ),
        (
            {"study": Study("s"), "patience": 1},
            "patience: expected it as a field of the Study, got it beside",
        ),
    ],
)
def test_what_makes_no_sense_is_one_sentence(options, text) -> None:
    with pytest.raises(MujaxError, match=text):
        TuneConfig(**options)


def test_transferring_what_is_not_there(config: TuneConfig) -> None:
    with pytest.raises(ConfigError, match="study: expected the name of a study that mujax tune has made"):
        mujax.transfer(dataclasses.replace(config, study=None), width=16)
    with pytest.raises(ConfigError, match="width: expected the target's width, got None"):
        mujax.transfer(config)
    with pytest.raises(ConfigError, match="got no such file"):
        mujax.transfer(config, width=16)
    lost = dataclasses.replace(config, space={"learning_rate": [2.0**100]}, trials=1, sampler="grid")
    store(lost, None)
    with pytest.raises(ConfigError, match="expected a trial in 's' that reached its end, got 1 that did not"):
        mujax.transfer(lost, width=16)


def test_a_target_that_diverges_has_no_loss(config: TuneConfig) -> None:
    store(config, 0.5)
    found = mujax.transfer(config, width=16, fixed={"learning_rate": 2.0**100})
    assert found.loss is None
    assert found.runs[0].loss is None
    assert json.loads(found.to_json())["loss"] is None
