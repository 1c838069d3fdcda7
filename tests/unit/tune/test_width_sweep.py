"""The sweep's report on curves with known answers, its storage, and small real runs."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trials import report_of

from mujax.check import Finished, Progress, Run
from mujax.data import Examples, batch_indices
from mujax.errors import ConfigError, DataError
from mujax.models import MLP, MLPConfig
from mujax.tune._tasks import TASKS, Task
from mujax.tune._width_sweep import TransferConfig, sweep_widths

GRID = tuple(float(rate) for rate in range(-12, -3))

# ---- the report -----------------------------------------------------------------------------------------

WIDTHS = (32, 64, 128, 256)


def synthetic(
    centre: Callable[[str, int], float], noise: Callable[[int], float] = lambda seed: 0.0, seeds: int = 2
) -> tuple[TransferConfig, dict[Run, float | None]]:
    """Parabolas around `centre`, lower by 0.1 each time that the width doubles."""
    config = TransferConfig.for_task("mnist-mlp", widths=WIDTHS, log2_lrs=GRID, seeds=seeds)
    runs: dict[Run, float | None] = {
        Run(name, width, rate, seed): (
            1 + 0.1 * (rate - centre(name, width)) ** 2 - 0.1 * math.log2(width / 32) + noise(seed)
        )
        for name in config.parametrizations
        for width in config.widths
        for rate in config.log2_lrs
        for seed in config.all_seeds
    }
    return config, runs


def mup_stays_and_sp_drifts(name: str, width: int) -> float:
    return -8.0 if name == "mup" else -8.0 - math.log2(width / 32)


def test_report_of_curves_with_known_optima() -> None:
    report = report_of(*synthetic(mup_stays_and_sp_drifts))
    assert report.best_log2_lr["mup"] == pytest.approx(dict.fromkeys(WIDTHS, -8.0))
    assert report.best_log2_lr["sp"] == pytest.approx({32: -8, 64: -9, 128: -10, 256: -11})
    assert report.drift_log2 == pytest.approx({"mup": 0.0, "sp": 3.0})
    assert report.drift_per_doubling == pytest.approx({"mup": 0.0, "sp": -1.0})
    assert report.transferred_log2_lr == {"mup": -8.0, "sp": -8.0}
    assert report.regret["mup"] == pytest.approx(dict.fromkeys(WIDTHS, 0.0))
    assert report.regret["sp"] == pytest.approx({32: 0.0, 64: 0.1, 128: 0.4, 256: 0.9})
    # Training gains 4 and 0.1 more each time that the width doubles.
    assert report.regret_share["sp"] == pytest.approx(
        {32: 0.0, 64: 0.1 / 4.1, 128: 0.4 / 4.2, 256: 0.9 / 4.3}
    )
    assert {name: check.verdict for name, check in report.checks.items()} == {"mup": "pass", "sp": "fail"}
    compared = report.transferred_vs_tuned_sp
    assert (compared.width, compared.parametrization, compared.sp_log2_lr) == (256, "mup", -11.0)
    assert (compared.loss, compared.difference) == pytest.approx((0.7, 0.0))
    assert compared.standard_error == pytest.approx(0.0)
    assert report.wider_is_better == {"mup": True, "sp": False}
    assert report.on_grid_edge == {"mup": (), "sp": ()}


def test_drift_is_over_all_widths_and_not_between_the_ends() -> None:
    there_and_back = {32: -8.0, 64: -6.5, 128: -9.0, 256: -8.0}
    report = report_of(*synthetic(lambda _, width: there_and_back[width]))
    assert report.drift_log2["mup"] == pytest.approx(2.5)


def test_the_transferred_rate_is_the_best_of_the_base_width_and_of_no_other() -> None:
    config, runs = synthetic(lambda _, width: -8.0 - math.log2(width / 32))
    report = report_of(dataclasses.replace(config, base_width=128), runs)
    assert report.transferred_log2_lr["mup"] == -10.0
    assert report.regret["mup"] == pytest.approx({32: 0.4, 64: 0.1, 128: 0.0, 256: 0.1})


def test_loss_is_the_mean_over_seeds_with_its_standard_error() -> None:
    noise = {0: 0.3, 1: -0.1, 2: 0.1}
    config, runs = synthetic(mup_stays_and_sp_drifts, noise.__getitem__, seeds=3)
    report = report_of(config, runs)
    at = config.log2_lrs.index(-8.0)
    assert report.loss["mup"][32][at] == pytest.approx(1.1)
    assert report.standard_error["mup"][32][at] == pytest.approx(0.2 / math.sqrt(3))


def test_one_diverged_seed_makes_a_null_and_the_rest_stands() -> None:
    config, runs = synthetic(mup_stays_and_sp_drifts)
    runs[Run("sp", 256, -8.0, 1)] = None
    report = report_of(config, runs)
    at = config.log2_lrs.index(-8.0)
    assert report.loss["sp"][256][at] is None
    assert report.standard_error["sp"][256][at] is None
    assert report.regret["sp"][256] is None
    assert report.best_log2_lr["sp"][256] == pytest.approx(-11.0)
    assert report.regret["sp"][128] == pytest.approx(0.4)
    assert report.wider_is_better["sp"] is False


def test_a_width_where_everything_diverged_has_no_optimum_and_no_drift() -> None:
    config, runs = synthetic(mup_stays_and_sp_drifts)
    runs |= {run: None for run in runs if run.parametrization == "sp" and run.width == 32}
    report = report_of(config, runs)
    assert report.best_log2_lr["sp"][32] is None
    assert report.drift_log2["sp"] is None
    assert report.transferred_log2_lr["sp"] is None
    assert report.regret["sp"] == dict.fromkeys(WIDTHS)
    assert report.wider_is_better == {"sp": False, "mup": True}
    assert report.drift_log2["mup"] == pytest.approx(0.0)


@pytest.mark.parametrize(("rise", "better"), [(0.0, True), (0.12, True), (0.25, False)])
def test_wider_is_better_up_to_the_noise_of_the_seeds(rise: float, better: bool) -> None:
    # Four seeds with a standard error of 0.04: by Welch's test for three pairs, 0.16 is within the noise.
    noise = dict(enumerate((0.08, -0.08, 0.06, -0.06)))
    config, runs = synthetic(lambda *_: -8.0, noise.__getitem__, seeds=4)
    for run, loss in runs.items():
        assert loss is not None
        # Undo the improvement from 64 to 128 and add the rise.
        runs[run] = loss + 0.1 + rise if run.width == 128 else loss
    assert report_of(config, runs).wider_is_better["mup"] is better


@pytest.mark.parametrize(("rise", "better"), [(-1e-6, True), (1e-6, False)])
def test_with_one_seed_any_rise_counts(rise: float, better: bool) -> None:
    config, runs = synthetic(lambda *_: -8.0, seeds=1)
    for run, loss in runs.items():
        assert loss is not None
        runs[run] = loss + 0.1 + rise if run.width == 128 else loss
    assert report_of(config, runs).wider_is_better["mup"] is better


def strict_json(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_report_json_has_the_keys_that_are_promised() -> None:
    config, runs = synthetic(mup_stays_and_sp_drifts)
    runs[Run("sp", 256, -4.0, 0)] = None
    read = strict_json(report_of(config, runs).to_json())
    assert read["task"] == "mnist-mlp"
    assert read["widths"] == list(WIDTHS)
    assert read["base_width"] == 32
    assert read["log2_lrs"] == list(GRID)
    assert read["seeds"] == [0, 1]
    assert read["loss"]["sp"]["256"][-1] is None
    assert read["loss"]["mup"]["256"][-1] == pytest.approx(1 + 1.6 - 0.3)
    assert read["best_log2_lr"]["sp"]["256"] == pytest.approx(-11.0)
    assert read["drift_log2"] == pytest.approx({"sp": 3.0, "mup": 0.0})
    assert read["regret"]["sp"]["256"] == pytest.approx(0.9)
    assert read["wider_is_better"] == {"sp": False, "mup": True}


def toy_examples(_: pathlib.Path | None = None) -> Examples:
    """Two classes that a plane separates."""
    inputs = np.random.RandomState(0).standard_normal((256, 8)).astype(np.float32)
    return Examples(jnp.asarray(inputs), jnp.asarray((inputs[:, 0] > 0).astype(np.int32)))


def toy_model(width: int) -> tuple[Any, tuple[jax.ShapeDtypeStruct, ...]]:
    return MLP(MLPConfig(width=width, n_classes=2)), (jax.ShapeDtypeStruct((1, 8), jnp.float32),)


# ---- configuration --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": "cifar"}, "task: expected one of mnist-mlp, text-transformer, package.module:factory"),
        ({"task": toy_model}, "data: expected either a file of data or batches"),
        ({"optimizer": "adamm"}, "optimizer: expected one of 'acprop', "),
        (
            {"parametrizations": ("sp", "ntk")},
            "parametrizations: expected at least one of 'mup', 'table3', 'table9', 'sp', got (",
        ),
        (
            {"parametrizations": ()},
            "parametrizations: expected at least one of 'mup', 'table3', 'table9', 'sp', got ();",
        ),
        ({"widths": ()}, "widths: expected at least one width, whole numbers of at least 1, got ();"),
        (
            {"task": "mnist-mlp", "widths": (0, 32)},
            "widths: expected at least one width, whole numbers of at least 1, got (0,",
        ),
        (
            {"widths": (32, 64), "base_width": -16},
            "base_width: expected a whole number of at least 1",
        ),
        ({"widths": (32,)}, "widths: expected at least one besides the base width 32, got (32,)."),
        ({"task": "text-transformer", "widths": (32, 40)}, "multiples of 16"),
        ({"log2_lrs": (-8, -7)}, "log2_lrs: expected at least three different powers of two"),
        ({"log2_lrs": (-8, -7, math.nan)}, "log2_lrs: expected"),
        ({"log2_lrs": (-8, -7, 1000)}, "from -126 to 126, got (-8, -7, 1000);"),
        ({"seeds": 0}, "seeds: expected a whole number of at least 1, got 0; pass seeds=4."),
        ({"steps": 0}, "steps: expected a whole number of at least 1, got 0; pass steps=4."),
        ({"batch": -4}, "batch: expected a whole number of at least 1, got -4; pass batch=4."),
        ({"seed": -1}, "seed: expected a whole number from 0 up to 2^31, got -1; pass seed=0."),
        (
            {"momentum": 1.0},
            "momentum: expected a number from 0 up to 1, 1 excluded, got 1.0; pass momentum=0.9.",
        ),
        (
            {"task": "mnist-mlp", "text": pathlib.Path("a.txt")},
            "text: the task 'mnist-mlp' does not read a text",
        ),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        TransferConfig.for_task(**given)


def test_defaults_of_a_task_depend_on_the_optimizer_and_give_way_to_what_is_given() -> None:
    adam, sgd = TransferConfig.for_task(), TransferConfig.for_task(optimizer="sgd", steps=7, batch=None)
    assert adam.task == "text-transformer"
    assert adam.widths[-1] == 4 * adam.base_width
    assert max(adam.log2_lrs) < max(sgd.log2_lrs)
    assert (sgd.steps, sgd.batch) == (7, adam.batch)


def test_widths_and_rates_are_sorted_and_hold_the_base() -> None:
    config = TransferConfig.for_task(widths=(256, 128, 256), base_width=64, log2_lrs=(-3, -8, -5, -8))
    assert config.widths == (64, 128, 256)
    assert config.log2_lrs == (-8.0, -5.0, -3.0)
    assert TransferConfig.for_task(widths=(256, 128)).base_width == 128


@pytest.mark.parametrize("task", TASKS)
def test_quick_is_a_small_part_of_the_default(task: str) -> None:
    quick, full = TransferConfig.for_task(task, quick=True), TransferConfig.for_task(task)
    assert set(quick.widths) < set(full.widths)
    assert set(quick.log2_lrs) < set(full.log2_lrs)
    assert quick.seeds == 1
    assert quick.steps < full.steps
    assert TransferConfig.for_task(task, quick=True, steps=33).steps == 33


# ---- small runs -----------------------------------------------------------------------------------------


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The task "toy", which trains in no time; a 0 for each time that a program of its was traced."""
    traced: list[int] = []

    def draw(train: Examples, key: jax.Array, batch: int, steps: int) -> jax.Array:
        traced.append(0)
        return batch_indices(key, len(train.targets), batch=batch, steps=steps)

    task = Task(
        title="toy",
        build=toy_model,
        load=lambda path: (toy_examples(path), toy_examples(path)),
        draw=draw,
        fetch=lambda train, order: Examples(train.inputs[order], train.targets[order]),
        valid=lambda valid: valid,
        takes_text=False,
        width_step=1,
        widths=(8, 16),
        target=16,
        log2_lrs=dict.fromkeys(("adam", "adamw", "sgd"), (-9.0, -6.0, -3.0)),
        seeds=2,
        steps=20,
        batch=32,
        space={"learning_rate": [0.01]},
    )
    monkeypatch.setitem(TASKS, "toy", task)  # pyright: ignore[reportArgumentType]
    return traced


def rows(folder: pathlib.Path) -> list[dict[str, str]]:
    with (folder / "runs.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_real_runs_in_both_parametrizations(draws: list[int], tmp_path: pathlib.Path) -> None:
    report = sweep_widths(TransferConfig.for_task("toy", log2_lrs=(-20, -9, -6, -3, 100), out=tmp_path))
    # For the shapes of a batch, and in the program that starts a run.
    assert len(draws) == 4 * 2, "one program serves all learning rates and seeds"
    # At the base width µP is the user's own model; elsewhere it is not.
    assert report.loss["mup"][8] == report.loss["sp"][8]
    for mup, sp in zip(report.loss["mup"][16][1:-1], report.loss["sp"][16][1:-1], strict=True):
        assert mup != pytest.approx(sp, rel=1e-3)
    for name in ("sp", "mup"):
        losses = report.loss[name][16]
        assert losses[-1] is None, "2^100 diverges, which is a null and no crash"
        assert None not in losses[:-1], "2^-20 hardly moves, which is no divergence"
        assert losses[3] < losses[1] < losses[0]
    assert [row["loss"] == "" for row in rows(tmp_path)] == [False, False, False, False, True] * 8
    assert strict_json((tmp_path / "report.json").read_text())["loss"]["mup"]["16"][-1] is None


@pytest.mark.usefixtures("draws")
def test_seeds_differ_and_a_seed_is_the_same_run_every_time(tmp_path: pathlib.Path) -> None:
    def losses(seed: int) -> list[str]:
        out = tmp_path / str(seed)
        sweep_widths(
            TransferConfig.for_task("toy", steps=2, seeds=1, seed=seed, parametrizations=("mup",), out=out)
        )
        return [row[name] for row in rows(out) for name in ("loss", "untrained")]

    first = losses(3)
    (tmp_path / "3" / "runs.csv").unlink()
    assert losses(3) == first
    assert not set(losses(4)) & set(first)


@pytest.mark.usefixtures("draws")
def test_optimizer_and_momentum_are_heeded() -> None:
    kinds = (
        {"optimizer": "lion"},
        {"optimizer": "sgd", "momentum": 0.0},
        {"optimizer": "sgd", "momentum": 0.9},
    )
    small = {"seeds": 1, "parametrizations": ("mup",), "log2_lrs": (-5, -4, -3)}
    found = [sweep_widths(TransferConfig.for_task("toy", **small, **kind)).loss["mup"][8] for kind in kinds]
    assert len(set(found)) == len(kinds)


def test_a_model_and_batches_of_the_users_own(tmp_path: pathlib.Path) -> None:
    examples = toy_examples()
    batches = [(examples.inputs[:32], examples.targets[:32])] * 12
    config = TransferConfig.for_task(
        toy_model, batches=batches, widths=(8, 16), log2_lrs=(-9, -6, -3), seeds=1, out=tmp_path
    )
    assert (config.steps, config.name) == (12, f"{__name__}:toy_model")
    report = sweep_widths(config)
    curve = report.loss["mup"][16]
    assert curve[2] < curve[0] < 1
    assert report.transferred_vs_tuned_sp.difference is not None
    before = (tmp_path / "runs.csv").read_text()
    assert sweep_widths(config) == report
    assert (tmp_path / "runs.csv").read_text() == before
    other = dataclasses.replace(config, batches=[(2 * inputs, targets) for inputs, targets in batches])
    with pytest.raises(ConfigError, match="out: expected runs with data "):
        sweep_widths(other)


# ---- what is stored -------------------------------------------------------------------------------------


@pytest.fixture
def done(draws: list[int], monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The task "toy" without the training: a formula gives the losses. The runs that were asked for."""
    asked: list[Run] = []

    def trained(
        job: Any, runs: Sequence[Run], *hyperparameters: Any
    ) -> Iterator[tuple[dict[Run, Finished], float]]:
        for run in runs:
            asked.append(run)
            loss = (run.log2_lr + 6) ** 2 + 1 / run.width + 0.01 * run.seed
            yield {run: Finished(loss, 0.0, 100.0)}, 0.1

    monkeypatch.setattr("mujax.check._width_runs._trained", trained)
    return asked


def stop_after(count: int) -> Callable[[Progress], None]:
    def progress(now: Progress) -> None:
        if now.done == count:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("torn", ["", "toy,1f", "toy,,8,20,32,adam,,0.1.0,mup,16,-3.0,1,0.51"])
def test_an_interrupted_sweep_goes_on_where_it_stopped(
    done: list[Run], tmp_path: pathlib.Path, torn: str
) -> None:
    config = TransferConfig.for_task("toy", out=tmp_path / "new" / "folder")
    with pytest.raises(KeyboardInterrupt):
        sweep_widths(config, progress=stop_after(9))
    runs_file = tmp_path / "new" / "folder" / "runs.csv"
    before = runs_file.read_text()
    assert before.count("\n") == 1 + 9
    runs_file.write_text(before + torn)

    fresh: list[Progress] = []
    report = sweep_widths(config, progress=fresh.append)
    after = runs_file.read_text()
    assert after.startswith(before)
    assert after.count("\n") == 1 + 24
    assert (fresh[0].done, fresh[-1].done) == (9, 24)
    assert len(done) == len(set(done)) == 24
    assert fresh[-1].work_done == pytest.approx(1.0)
    assert report.loss == sweep_widths(dataclasses.replace(config, out=None)).loss


def test_a_finished_sweep_is_not_run_again(done: list[Run], tmp_path: pathlib.Path) -> None:
    config = TransferConfig.for_task("toy", out=tmp_path)
    first = sweep_widths(config)
    content = (tmp_path / "runs.csv").read_bytes()
    assert sweep_widths(config) == first
    assert len(done) == 24
    assert (tmp_path / "runs.csv").read_bytes() == content


def test_a_sweep_may_grow(done: list[Run], tmp_path: pathlib.Path) -> None:
    sweep_widths(TransferConfig.for_task("toy", seeds=1, out=tmp_path))
    report = sweep_widths(TransferConfig.for_task("toy", seeds=1, widths=(8, 16, 24), out=tmp_path))
    assert [run.width for run in done[12:]] == [24] * 6
    assert len(rows(tmp_path)) == 18
    assert sorted(report.regret["mup"]) == [8, 16, 24]


@pytest.mark.usefixtures("done")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 21}, "expected runs with steps 21 in {file}, got runs with steps 20"),
        ({"batch": 16}, "expected runs with batch 16 in {file}, got runs with batch 32"),
        ({"optimizer": "sgd"}, "expected runs with optimizer sgd in {file}, got runs with optimizer adam"),
        ({"base_width": 16, "widths": (8, 16)}, "expected runs with base_width 16"),
    ],
)
def test_runs_with_other_settings_are_left_alone(
    tmp_path: pathlib.Path, changed: dict[str, Any], message: str
) -> None:
    sweep_widths(TransferConfig.for_task("toy", seeds=1, out=tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    message = message.format(file=tmp_path / "runs.csv")
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        sweep_widths(TransferConfig.for_task("toy", **({"seeds": 1, "out": tmp_path} | changed)))
    assert "take another folder" in str(raised.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.usefixtures("done")
def test_runs_on_other_data_are_left_alone(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TransferConfig.for_task("toy", seeds=1, out=tmp_path)
    sweep_widths(config)
    longer = dataclasses.replace(
        TASKS["toy"],
        load=lambda _: (jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), toy_examples()),) * 2,
    )
    monkeypatch.setitem(TASKS, "toy", longer)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="expected runs with data "):
        sweep_widths(config)


# ---- the real tasks -------------------------------------------------------------------------------------


def test_text_transformer_learns_from_the_users_text(tmp_path: pathlib.Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 300)
    report = sweep_widths(
        TransferConfig.for_task(
            "text-transformer",
            text=text,
            widths=(16, 32),
            log2_lrs=(-12, -9, -6),
            seeds=1,
            steps=12,
            batch=4,
            parametrizations=("mup",),
        )
    )
    slow, _, fast = report.loss["mup"][32]
    # Guessing among 256 bytes costs log 256.
    assert fast < slow < math.log(256) + 0.5
    assert report.transferred_vs_tuned_sp is None


def test_a_missing_text_is_an_error_before_anything_is_written(tmp_path: pathlib.Path) -> None:
    config = TransferConfig.for_task("text-transformer", text=tmp_path / "none.txt", out=tmp_path / "out")
    with pytest.raises(DataError, match=r"none\.txt"):
        sweep_widths(config)
    assert not (tmp_path / "out").exists()
