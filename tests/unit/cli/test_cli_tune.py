"""`mujax tune` and `mujax transfer --study` in this process. What is trained is stood in for."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from trials import make_sweep, make_transferred, make_trial

from mujax import cli
from mujax.cli import _arguments, _transfer, _tune
from mujax.errors import ConfigError, StudyError
from mujax.tune._sweep import Sweep, SweepProgress
from mujax.tune._transfer import TargetProgress, Transferred
from mujax.tune._tune import TuneConfig

Captured = pytest.CaptureFixture[str]
Tuned = list[TuneConfig]

ONE_DEVICE = {"mesh": None, "accumulate": 1, "checkpoints": None}
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """An empty working directory, and the import path as it was afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def stand_in(
    monkeypatch: pytest.MonkeyPatch, found: Sweep | Callable[[], Sweep], configs: Tuned | None = None
) -> None:
    """Lets `tune` find something without training anything."""

    def tune(config: TuneConfig, *, progress: Any, finished: Any, say: Any) -> Sweep:
        if configs is not None:
            configs.append(config)
        for done in range(3):
            progress(SweepProgress(2 * done, 6, 0.0, 2, None if not done else 0.5, f"trials {2 * done} on"))
        say("lost the database; trying again.")
        if finished is not None:
            finished(make_trial(0, 0.5))
        return found() if callable(found) else found

    monkeypatch.setattr(_tune, "tune", tune)


@pytest.fixture
def tuned(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Tuned:
    """The searches that were asked for."""
    configs: Tuned = []
    stand_in(monkeypatch, make_sweep(diverged={3}, pruned={6}), configs)
    return configs


# ---- hyperparameters on the command line ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.5", 0.5),
        ("1e-3", 1e-3),
        ("2**-8", 2.0**-8),
        ("2^-8", 2.0**-8),
        ("2**10", 1024),
        ("2^0.5", 2**0.5),
        ("16", 16),
        ("-3", -3),
        ("true", True),
        ("False", False),
        ("cosine", "cosine"),
        ("nan", "nan"),
        ("inf", "inf"),
        ("2**x", "2**x"),
        ("0**-1", "0**-1"),
        ("10.0**1000", "10.0**1000"),
        ("__import__('os')", "__import__('os')"),
    ],
)
def test_a_value_is_a_number_a_power_a_truth_or_a_text(text: str, expected: Any) -> None:
    assert _arguments.value(text) == expected
    assert type(_arguments.value(text)) is type(expected)


def test_a_space_is_ranges_and_lists_and_floats_where_the_hyperparameter_is_one() -> None:
    words = [
        "learning_rate=2**-9:1:log",
        "batch=16:64",
        "output_mult=1,2",
        "schedule=linear,cosine",
        "depth=2,4",
    ]
    assert _arguments.space("tune", words) == {
        "learning_rate": {"low": 2.0**-9, "high": 1.0, "log": True},
        "batch": {"low": 16, "high": 64},
        "output_mult": [1.0, 2.0],
        "schedule": ["linear", "cosine"],
        "depth": [2, 4],
    }
    kinds = [type(value) for value in _arguments.space("tune", words)["output_mult"]]
    assert kinds == [float, float]
    assert type(_arguments.space("tune", words)["batch"]["low"]) is int
    fixed = _arguments.fixed("set", ["momentum=0", "depth=3", "mine=2"])
    assert fixed == {"momentum": 0.0, "depth": 3, "mine": 2}
    assert [type(value) for value in fixed.values()] == [float, int, int]


# ---- mujax tune -----------------------------------------------------------------------------------------


def test_a_search_ends_with_the_best_trials_what_to_do_next_and_files(
    tuned: Tuned, capsys: Captured, folder: pathlib.Path
) -> None:
    assert cli.main(["tune"]) == 0
    out, err = capsys.readouterr()
    text = " ".join(out.split())
    assert "Study mine: the 10 best of 14 trials" in text
    rows = [line.split() for line in out.splitlines() if line.strip()[:1].isdigit() and "trials" not in line]
    assert [row[0] for row in rows] == ["5", "4", "7", "2", "8", "1", "9", "0", "10", "11"]
    assert rows[0][1:] == ["0.5000", "2^-8", "0.051", "cosine"]
    assert "14 trials, 1 diverged, 1 pruned; 1.3e10 FLOPs spent on them." in text
    assert "To train the target with the best: mujax transfer --study mine Written:" in text
    assert "Across width" not in text
    # No terminal: a quiet line for each batch, no control characters.
    head, *rest = err.splitlines()
    assert head == "trials 0 on: 0% done, 0 of 6 trials"
    assert rest[0].startswith("trials 2 on: 33% done, 2 of 6 trials, best 0.5000, about ")
    assert rest[-1] == "lost the database; trying again."
    assert json.loads((folder / "tune-mnist-mlp" / "tune.json").read_text())["best"]["number"] == 5
    assert (folder / "tune-mnist-mlp" / "tune.png").read_bytes().startswith(PNG)
    assert sorted(path.name for path in (folder / "tune-mnist-mlp").iterdir()) == ["tune.json", "tune.png"]


def test_options_left_out_are_those_of_the_configuration(tuned: Tuned) -> None:
    assert cli.main(["tune"]) == 0
    assert cli.main(["tune", "text-transformer", "--trials", "3"]) == 0
    assert tuned == [
        TuneConfig(study="mnist-mlp"),
        TuneConfig("text-transformer", study="text-transformer", trials=3),
    ]


def test_every_option_reaches_the_configuration(tuned: Tuned, folder: pathlib.Path) -> None:
    line = (
        "tune text-transformer --study s --storage sqlite:///there.db --trials 7 --sampler tpe --pruner asha "
        "--width 48 --data a.txt --length 32 --optimizer adamw --parametrization table3 --seeds 2 --seed 5 "
        "--steps 9 --batch 3 --objective valid_loss --tune learning_rate=2**-9:2^-4:log output_mult=1,4 "
        "--set b2=0.99 schedule=cosine --zero-init readout query --heartbeat 5 --mode map --lanes 4 "
        "--out here"
    )
    assert cli.main(line.split()) == 0
    assert tuned == [
        TuneConfig(
            task="text-transformer",
            study="s",
            storage="sqlite:///there.db",
            trials=7,
            sampler="tpe",
            pruner="asha",
            width=48,
            data=pathlib.Path("a.txt"),
            length=32,
            optimizer="adamw",
            parametrization="table3",
            seeds=2,
            seed=5,
            steps=9,
            batch=3,
            objective="valid_loss",
            space={
                "learning_rate": {"low": 2.0**-9, "high": 2.0**-4, "log": True},
                "output_mult": [1.0, 4.0],
            },
            fixed={"b2": 0.99, "schedule": "cosine"},
            zero_init=("readout", "query"),
            heartbeat=5.0,
            mode="map",
            lanes=4,
        )
    ]
    assert (folder / "here" / "tune.json").exists()


YAML = """
task: text-transformer
study: filed
trials: 9
zero_init: [readout]
space:
  learning_rate: {low: 2**-9, high: 2**-5, log: true}
fixed: {b2: 0.99, b1: 0.8, output_mult: 2}
"""


def test_a_file_of_settings_is_read_and_the_command_line_wins(tuned: Tuned, folder: pathlib.Path) -> None:
    (folder / "tune.yaml").write_text(YAML)
    assert cli.main(["tune", "--config", "tune.yaml"]) == 0
    line = "tune --config tune.yaml --trials 3 --set b1=0.7 --tune output_mult=1:4"
    assert cli.main(line.split()) == 0
    from_file, overridden = tuned
    assert from_file.task == "text-transformer"
    assert from_file.study == "filed"
    assert from_file.zero_init == ("readout",)
    assert from_file.space == {"learning_rate": {"low": 2.0**-9, "high": 2.0**-5, "log": True}}
    assert from_file.fixed == {"b2": 0.99, "b1": 0.8, "output_mult": 2}
    assert overridden.trials == 3
    assert overridden.space == {"output_mult": {"low": 1.0, "high": 4.0}}
    # What is searched now is not fixed by the file any more.
    assert overridden.fixed == {"b2": 0.99, "b1": 0.7}


def test_a_model_of_the_users_own_needs_the_targets_width_and_the_file_it_was_tuned_with(
    tuned: Tuned, folder: pathlib.Path, capsys: Captured
) -> None:
    (folder / "my settings.py").write_text(
        "def task(width):\n    raise NotImplementedError\n\n"
        "def batches(key, step):\n    raise NotImplementedError\n\nwidth, steps = 16, 3\n"
    )
    assert cli.main(["tune", "--config", "my settings.py", "--storage", "postgresql://ann:pw@db/x"]) == 0
    (config,) = tuned
    assert config.study == "task"
    assert callable(config.batches)
    out = capsys.readouterr().out
    assert (
        "mujax transfer --study mine --storage 'postgresql://ann:***@db/x' --config 'my settings.py' "
        "--width N"
    ) in out
    assert "pw" not in out


def test_what_does_not_transfer_is_said_at_once(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    stand_in(monkeypatch, make_sweep(weight_decay=0.1, dropout=0.2))
    assert cli.main(["tune"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "Across width weight_decay and dropout can't be expected to transfer: pass --set weight_decay="
        in text
    )


def test_a_search_in_which_nothing_came_to_its_end_ends_with_1(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    stand_in(monkeypatch, make_sweep(3, diverged={0, 1, 2}))
    assert cli.main(["tune", "--out", "here"]) == 1
    out, err = capsys.readouterr()
    assert "3 trials, 3 diverged, 0 pruned" in out
    assert "mujax transfer" not in out
    assert err.splitlines()[-1] == ("mujax: no trial reached its end; tune lower learning rates.")
    assert sorted(path.name for path in (folder / "here").iterdir()) == ["tune.json", "tune.png"]


def interrupt() -> Sweep:
    raise KeyboardInterrupt


def test_interrupted_writes_what_there_is_and_says_how_to_go_on(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    stand_in(monkeypatch, interrupt)
    monkeypatch.setattr(_tune, "read_study", lambda config: make_sweep(7))
    line = "tune --trials 20 --study mine --storage postgresql://ann:secret@db/x --out here"
    assert cli.main(line.split()) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        "mujax: interrupted; 7 of 20 trials are stored in study mine of postgresql://ann:***@db/x, the same "
        "command resumes there. Written: here/tune.json, here/tune.png."
    )
    assert len(json.loads((folder / "here" / "tune.json").read_text())["trials"]) == 7
    assert (folder / "here" / "tune.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    "error", [ConfigError("no such study"), StudyError("away"), KeyboardInterrupt(), None]
)
def test_interrupted_before_there_is_anything_writes_nothing(
    error: BaseException | None, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def read_study(_: TuneConfig) -> Sweep:
        if error is not None:
            raise error
        return make_sweep(0)

    stand_in(monkeypatch, interrupt)
    monkeypatch.setattr(_tune, "read_study", read_study)
    assert cli.main(["tune", "--out", "here"]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "mujax: interrupted; no trial is stored, the same command starts again."
    assert list((folder / "here").iterdir()) == []


@pytest.mark.parametrize(("strikes", "looks"), [(1, 1), (2, 0)])
def test_ctrl_c_waits_for_the_look_under_way_and_twice_does_not(
    strikes: int, looks: int, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    seen = []

    def tune(config: TuneConfig, *, progress: Any, **_: Any) -> Sweep:
        for _ in range(strikes):
            signal.raise_signal(signal.SIGINT)
        seen.append("a look")
        progress(SweepProgress(0, 6, 0.5, 2, None, "trials 0 to 5"))
        pytest.fail("the search went on")

    monkeypatch.setattr(_tune, "tune", tune)
    monkeypatch.setattr(_tune, "read_study", lambda config: make_sweep(1))
    before = signal.getsignal(signal.SIGINT)
    assert cli.main(["tune"]) == 130
    assert len(seen) == looks
    assert "mujax: interrupted; 1 of 64 trials are stored" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_event_files_are_written_where_they_are_asked_for_only(tuned: Tuned, folder: pathlib.Path) -> None:
    assert cli.main(["tune", "--tensorboard", "logs"]) == 0
    assert [path.name for path in (folder / "logs").iterdir()] == ["trial-0000"]
    (folder / "logs").rename(folder / "elsewhere")
    assert cli.main(["tune"]) == 0
    assert not (folder / "logs").exists()


# ---- mujax transfer --study -----------------------------------------------------------------------------


@dataclasses.dataclass
class Asked:
    """What was asked for, and what is found."""

    found: Transferred
    of_study: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    transfer: list[dict[str, Any]] = dataclasses.field(default_factory=list)


@pytest.fixture
def asked(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """A study whose target is trained in no time."""
    asked = Asked(make_transferred())

    def of_study(study: str, storage: str | None = None, **given: Any) -> TuneConfig:
        known = {name: value for name, value in given.items() if value is not None}
        asked.of_study.append({"study": study, "storage": storage, **known})
        return TuneConfig(study=study, storage=storage)

    def transfer(config: TuneConfig, *, progress: Any, **given: Any) -> Transferred:
        asked.transfer.append(given)
        for step in (0, 40, 80):
            progress(TargetProgress(0, step, 80, step / 80, None if not step else 0.5))
        return asked.found

    monkeypatch.setattr(TuneConfig, "of_study", of_study, raising=False)
    monkeypatch.setattr(_transfer, "transfer", transfer)
    return asked


def test_a_target_ends_with_its_hyperparameters_loss_costs_and_files(
    asked: Asked, capsys: Captured, folder: pathlib.Path
) -> None:
    hparams = {**asked.found.hparams, "weight_decay": 0.1, "dropout": 0.5, "b2": 0.99}
    trial = dataclasses.replace(
        asked.found.trial, hparams={**asked.found.trial.hparams, "weight_decay": 0.1, "dropout": 0.2}
    )
    asked.found = dataclasses.replace(
        asked.found,
        hparams=hparams,
        trial=trial,
        not_transferred={"weight_decay": "taken", "dropout": "set"},
    )
    line = "transfer --study mine --also weight_decay --set dropout=0.5 --seeds 2"
    assert cli.main(line.split()) == 0
    out, err = capsys.readouterr()
    text = " ".join(out.split())
    assert "Width 1024, with the best of study mine: trial 5" in text
    for row in (
        "learning_rate 2^-8 optimization proxy",
        "schedule cosine optimization proxy",
        "weight_decay 0.1 regularization proxy, taken all the same",
        "dropout 0.5 regularization set",
        "b2 0.99 optimization fixed in the study",
    ):
        assert row in text
    assert "Target, width 1024: loss 0.4500 ± 0.0500 (2 seeds). Proxy, width 64: 0.5000." in text
    assert (
        "The tuning cost 1.4e10 FLOPs, the same search at the target would have cost 1.4e12 FLOPs: 100 "
        "times as many. One run of the target costs 1e11 FLOPs."
    ) in text
    assert "transfer-mine/target.json, transfer-mine/target.png, transfer-mine/params.npz" in out
    head, *rest = err.splitlines()
    assert head == "seed 0, step 0 of 80: 0% done"
    assert rest[0].startswith("seed 0, step 40 of 80: 50% done, loss 0.5000, about ")
    results = folder / "transfer-mine"
    assert json.loads((results / "target.json").read_text())["saved"] == pytest.approx(100)
    assert (results / "target.png").read_bytes().startswith(PNG)
    with np.load(results / "params.npz") as params:
        assert {name: params[name].shape for name in params} == {"first/kernel": (2, 3), "bias": (3,)}
    assert sorted(path.name for path in results.iterdir()) == [
        "metrics.csv",
        "params.npz",
        "target.json",
        "target.png",
    ]


def test_every_option_reaches_the_training_of_the_target(asked: Asked, folder: pathlib.Path) -> None:
    (folder / "tune.yaml").write_text(
        "task: mine:net\nwidth: 16\ntrials: 3\ndata: there.npz\nstorage: a.db\n"
    )
    line = (
        "transfer --study s --storage b.db --width 512 --seeds 3 --seed 7 --steps 9 --batch 3 --also dropout "
        "--set weight_decay=2**-4 b2=0.9 --data here.npz --config tune.yaml --out there"
    )
    assert cli.main(line.split()) == 0
    # What the study was tuned with is in the study; the file holds the rest.
    assert asked.of_study == [
        {"study": "s", "storage": "b.db", "task": "mine:net", "data": pathlib.Path("here.npz"), "seed": 7}
    ]
    assert asked.transfer == [
        {
            "width": 512,
            "seeds": 3,
            "steps": 9,
            "batch": 3,
            "also": ("dropout",),
            "fixed": {"weight_decay": 2.0**-4, "b2": 0.9},
            **ONE_DEVICE,
        }
    ]
    assert (folder / "there" / "params.npz").exists()


def test_options_left_out_are_those_of_the_study(asked: Asked) -> None:
    assert cli.main(["transfer", "--study", "s"]) == 0
    assert asked.of_study == [{"study": "s", "storage": None}]
    nothing = {"width": None, "seeds": 1, "steps": None, "batch": None, "also": (), "fixed": {}, **ONE_DEVICE}
    assert asked.transfer == [nothing]


def test_a_file_may_name_the_study_and_where_its_data_is(asked: Asked, folder: pathlib.Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "tune.yaml").write_text("study: filed\nstorage: a.db\ndata: x.npz\n")
    assert cli.main(["transfer", "--config", "sub/tune.yaml"]) == 0
    (given,) = asked.of_study
    assert (given["study"], given["data"].resolve()) == ("filed", folder / "sub" / "x.npz")


def test_a_target_that_diverged_ends_with_1_and_a_sentence(
    asked: Asked, capsys: Captured, folder: pathlib.Path
) -> None:
    asked.found = make_transferred((None,))
    assert cli.main(["transfer", "--study", "mine"]) == 1
    out, err = capsys.readouterr()
    assert "Target, width 1024: loss diverged. Proxy, width 64: 0.5000." in " ".join(out.split())
    assert err.splitlines()[-1].startswith("mujax: the target of width 1024 diverged; run mujax coord-check")
    assert "NaN" not in (folder / "transfer-mine" / "target.json").read_text()
    asked.found = make_transferred((0.4, None, None))
    assert cli.main(["transfer", "--study", "mine"]) == 1
    assert "diverged with seed 1, 2; " in capsys.readouterr().err


def test_costs_that_nobody_knows_are_not_made_up(asked: Asked, capsys: Captured) -> None:
    asked.found = dataclasses.replace(asked.found, tuning_flops=None, direct_flops=None)
    assert cli.main(["transfer", "--study", "mine"]) == 0
    out = capsys.readouterr().out
    assert "The cost of the tuning is not known" in out
    assert "times as many" not in out


@pytest.mark.parametrize("strikes", [1, 2])
def test_an_interrupted_target_ends_with_130_and_no_results(
    strikes: int, asked: Asked, monkeypatch: pytest.MonkeyPatch, capsys: Captured, folder: pathlib.Path
) -> None:
    def transfer(*_: Any, progress: Any, **__: Any) -> Transferred:
        for _ in range(strikes):
            signal.raise_signal(signal.SIGINT)
        progress(TargetProgress(0, 8, 80, 0.1, 0.5))
        pytest.fail("the training went on")

    monkeypatch.setattr(_transfer, "transfer", transfer)
    assert cli.main(["transfer", "--study", "mine", "--out", "here"]) == 130
    written = [path.name for path in (folder / "here").iterdir()]
    said = capsys.readouterr().err.splitlines()[-1]
    # The second Ctrl-C does not wait for the run under way.
    if strikes == 1:
        assert (written, said) == (
            ["metrics.csv"],
            "mujax: interrupted; nothing but metrics.csv was written.",
        )
    else:
        assert (written, said) == ([], "mujax: interrupted; nothing was written.")


def test_parameters_of_types_that_numpy_has_not_are_stored_as_float32(tmp_path: pathlib.Path) -> None:
    params = {"file": {"w": jnp.full(2, 1.5, jnp.bfloat16)}, "n": np.int32(3), "allow_pickle": np.zeros(1)}
    _transfer.save(tmp_path / "p.npz", _transfer.flat(params))
    with np.load(tmp_path / "p.npz") as stored:
        assert sorted(stored) == ["allow_pickle", "file/w", "n"]
        assert stored["file/w"].dtype == np.float32
        assert stored["file/w"].tolist() == [1.5, 1.5]
        assert stored["n"] == 3


# ---- bad input ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("asked", "tuned")
@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("tune cifar", "task: expected one of mnist-mlp, text-transformer, package.module:factory"),
        ("tune mine:net", "width: expected the proxy's width for a model of your own, got none."),
        ("tune mine:net --width 8", "data: expected either a file of data or batches"),
        ("tune --trials 0", "trials: expected a whole number of at least 1, got 0; pass trials=4."),
        ("tune --trials many", "--trials: expected a whole number, got 'many'"),
        (
            "tune --objective accuracy",
            "objective: expected one of 'loss', 'mean_loss', 'valid_loss', got 'accuracy'; pass",
        ),
        ("tune --optimizer adamm", "optimizer: expected one of 'acprop', "),
        (
            "tune --zero-init head",
            "zero_init: expected a sequence of 'readout' and 'query' or None, got ('head',);",
        ),
        ("tune --data a.npz", "data: expected none for the task 'mnist-mlp'"),
        ("tune --mode fast", "mode: expected 'loop' or 'map' or 'vmap'"),
        ("tune --tune learning_rate", "tune: expected NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=VALUE,VALUE"),
        ("tune --tune learning_rate=a:b", "with numbers, got 'learning_rate=a:b'; write for instance"),
        ("tune --tune learning_rate=1:2:lin", "with numbers, got 'learning_rate=1:2:lin'"),
        ("tune --tune end=0.1:0.2 end=0,1", "tune: expected each hyperparameter once, got 'end' twice"),
        ("tune --tune end=0:1 --tune b1=0,1", "--tune: expected it once, got it twice; give all its values"),
        ("tune --tune end=0:1 --set end=0", "end: expected it in --tune or in --set, got it in both"),
        ("tune --set b1", "set: expected NAME=VALUE, such as momentum=0.9, got 'b1'"),
        ("tune --set b1=", "set: expected NAME=VALUE, such as momentum=0.9, got 'b1='"),
        ("tune --set b1=0 b1=1", "set: expected each hyperparameter once, got 'b1' twice"),
        ("tune --config none.yaml", "none.yaml: expected a text file of settings"),
        ("tune --config wrong.yaml", "trails: expected the name of a setting, got an unknown one"),
        ("tune --out wrong.yaml", "out: expected a folder to write to, got wrong.yaml ("),
        ("tune --tensorboard wrong.yaml", "tensorboard: expected a folder to write to"),
        (
            "transfer",
            "transfer: expected the study to take hyperparameters from, --study NAME, got none; ",
        ),
        ("transfer --quick --widths 8 16", "run mujax transfer-check."),
        ("transfer --study s --widths 8 16", "Unrecognized or misplaced options: --widths"),
        ("transfer --config empty.yaml", "study: expected the name of a study that mujax tune has made"),
        ("transfer --study s --set dropout", "set: expected NAME=VALUE, such as momentum=0.9"),
        ("transfer --study s --out wrong.yaml", "out: expected a folder to write to"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    line: str, text: str, folder: pathlib.Path, capsys: Captured
) -> None:
    (folder / "wrong.yaml").write_text("trails: 3\n")
    (folder / "empty.yaml").write_text("")
    assert cli.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (error,) = err.splitlines()
    assert error.startswith("mujax: ")
    assert text in error


@pytest.mark.usefixtures("asked", "tuned")
@pytest.mark.parametrize("line", ["tune", "transfer --study s"])
@pytest.mark.parametrize("package", ["rich", "matplotlib", "optuna"])
def test_a_missing_package_of_the_extra_is_named_before_anything_runs(
    package: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == package or f"{name}.".startswith(("mujax.plot.", "mujax.tune.study.")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(_tune, "tune", lambda *_, **__: pytest.fail("it was started"))
    monkeypatch.setattr(_transfer, "transfer", lambda *_, **__: pytest.fail("it was started"))
    assert cli.main(line.split()) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert f"the package {package}" in error
    assert error.endswith('pip install "mujax-mup[cli]".')


@pytest.mark.usefixtures("tuned")
def test_a_missing_writer_of_event_files_is_named_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setattr(_tune, "tune", lambda *_, **__: pytest.fail("it was started"))
    assert cli.main(["tune", "--tensorboard", "logs"]) == 2
    assert capsys.readouterr().err.endswith('pip install "mujax-mup[tensorboard]".\n')


@pytest.mark.parametrize("line", ["tune --help", "transfer --help"])
def test_help_is_no_error_and_shows_no_defaults_of_python(line: str, capsys: Captured) -> None:
    assert cli.main(line.split()) == 0
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "usage: mujax" in out
    assert "None" not in out
    assert "--study NAME" in out
