"""Trials as runs of TensorBoard, read back by TensorBoard's own reader."""

from __future__ import annotations

import pathlib
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata, plugin_data_pb2
from trials import make_trial

from mujax.errors import ConfigError
from mujax.tune._tensorboard import tensorboard_writer


def read(run: pathlib.Path) -> EventAccumulator:
    events = EventAccumulator(str(run))
    events.Reload()
    return events


def scalars(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(tag)]


def hparams(events: EventAccumulator) -> dict[str, object]:
    content = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    found = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    kinds = {name: value.WhichOneof("kind") for name, value in found.items()}
    return {name: getattr(value, str(kinds[name])) for name, value in found.items()}


def test_a_trial_is_a_run_with_its_curve_rungs_and_hyperparameters(tmp_path: pathlib.Path) -> None:
    write = tensorboard_writer(tmp_path / "logs")
    write(make_trial(7, 0.5, depth=3, bias=False, other=None))
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["trial-0007"]
    events = read(tmp_path / "logs" / "trial-0007")
    assert scalars(events, "loss") == [(0, 2.0), (1, 1.5), (2, 1.0), (3, 0.5)]
    assert scalars(events, "rungs") == [(1, 1.0), (2, 0.75)]
    assert [value for _, value in scalars(events, "final/objective")] == [0.5]
    assert [value for _, value in scalars(events, "final/mean_loss")] == [1.0]
    assert hparams(events) == {
        "learning_rate": pytest.approx(2.0**-6),
        "warmup": pytest.approx(0.071),
        "schedule": "cosine",
        "depth": 3,
        "bias": False,
        "other": "None",
    }


def test_what_diverged_has_hyperparameters_and_no_loss_and_no_warning(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    write = tensorboard_writer(tmp_path)
    write(make_trial(0, None))
    write(make_trial(1, 0.5, pruned=True))
    diverged, pruned = read(tmp_path / "trial-0000"), read(tmp_path / "trial-0001")
    for events in (diverged, pruned):
        assert "loss" not in events.Tags()["scalars"]
        assert hparams(events)["schedule"] in ("linear", "cosine")
    ((_, value),) = scalars(diverged, "final/objective")
    assert value != value
    assert scalars(pruned, "rungs") == [(1, 1.0), (2, 0.75)]
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


def test_tensorflow_is_not_needed() -> None:
    assert "tensorflow" not in sys.modules


def test_a_missing_package_is_named_before_anything_is_made(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match=r"pip install \"mujax-mup\[tensorboard\]\"\.$"):
        tensorboard_writer(tmp_path / "logs")
    assert not (tmp_path / "logs").exists()


def test_a_folder_that_is_none_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="tensorboard: expected a folder to write to"):
        tensorboard_writer(tmp_path / "file")
