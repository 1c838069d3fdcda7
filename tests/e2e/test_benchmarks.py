"""The benchmarks run and write their reports; timed figures are not judged here."""

import importlib.util
import json
import pathlib
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def scripts():
    """The benchmarks as modules of this process; what they time, they start in processes of its own."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        for path in BENCHMARKS.glob("*.py"):
            if path.stem == "common" or path.stem.startswith("_") or path.stem.endswith("_torch"):
                continue
            spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
            found[path.name] = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, spec.name, found[path.name])  # Dataclasses look their module up.
            spec.loader.exec_module(found[path.name])
        yield found


@pytest.fixture
def report(scripts, capsys):
    def run(script, out, *args, text=""):
        scripts[script].main([str(arg) for arg in ("--quick", "--out", out, *args)])
        printed = capsys.readouterr().out
        assert "goals are not judged" in printed
        assert text in printed
        return json.loads(out.read_text())

    return run


def test_overhead_compares_compiled_steps(report, tmp_path):
    (row,) = report("overhead.py", tmp_path / "deep" / "overhead.json", "--cases", "mlp")["rows"]
    assert (row["case"], row["width"], row["base_width"]) == ("mlp", 128, 64)
    assert row["parameters"] == 784 * 128 + 128 * 128 + 128 * 10
    for figures in row["programs"].values():
        # Three layers: a product each forward, two each backward but one for the first.
        assert figures["optax"]["products"] == figures["mujax"]["products"] == 8
        # The products alone, two operations to a parameter and example.
        assert figures["optax"]["flops"] > 2 * 128 * (2 * row["parameters"] + 128 * 128 + 128 * 10)
        assert figures["ratio"] == {
            name: figures["mujax"][name] / figures["optax"][name] for name in ("flops", "bytes", "products")
        }
        # The factors are there: equal counts would mean that a module was compared with itself.
        assert 1 < figures["ratio"]["flops"] < 1.01
    assert set(row["timed"]) == {
        *("time", "time_control", "cpu", "cpu_control"),
        *("trace", "trace_forward", "eager", "eager_nnx"),
    }
    for figure in row["timed"].values():
        assert 0 < figure["low"] <= figure["median"] <= figure["high"]


def test_spec_scale_measures_in_processes_of_their_own(report, tmp_path):
    found = report("spec_scale.py", tmp_path / "spec_scale.json")
    (size,) = found["sizes"]
    block = 12 * 2048**2 + 2 * 2048
    assert size["parameters"] == 2 * 50_304 * 2048 + 2048 * 2048 + block + 2048
    assert [row["layers"] for row in found["layers"]] == [1, 2, 3]
    assert [row["parameters"] - size["parameters"] for row in found["layers"]] == [0, block, 2 * block]
    # The baseline is after the import of JAX; the parameters, 1 GB in the smallest, are never allocated.
    assert all(row["import_megabytes"] > 50 and 0 < row["megabytes"] < 500 for row in found["layers"])
    assert all(row["traced_seconds"] > 0 for row in found["layers"])


def test_audit_measures_in_processes_of_its_own(report, tmp_path):
    rows = report("audit.py", tmp_path / "audit.json", "--cases", "mlp")["rows"]
    assert [(row["misread"], row["disagreements"]) for row in rows] == [(False, [0]), (True, [1])]
    assert all(row["seconds"] > 0 and row["cpu_seconds"] > 0 for row in rows)


def test_optimizers_sweeps_both_sides_on_one_grid(report, tmp_path):
    found = report(
        "optimizers.py", tmp_path / "optimizers.json", "--optimizers", "lamb", "--widths", "8", "24"
    )
    assert (found["widths"], found["seeds"], found["steps"]) == ([8, 24], 1, 3)
    (row,) = found["rows"]
    assert (row["optimizer"], row["family"]) == ("lamb", "normalized")
    for side in ("optax", "mujax"):
        curves = row[side]["loss"]
        assert list(curves) == ["8", "24"]
        assert all(len(curve) == len(row["log2_lrs"]) for curve in curves.values())
        best = row[side]["best_log2_lr"].values()
        assert row[side]["drift_log2"] == max(best) - min(best)
        assert row[side]["regret"] >= 0
    # At the base the two are the same optimizer and the same model, at the target they are not.
    assert row["optax"]["loss"]["8"] == row["mujax"]["loss"]["8"]
    assert row["optax"]["loss"]["24"] != row["mujax"]["loss"]["24"]


def test_coord_check_leaves_the_side_out_that_is_not_installed(report, tmp_path):
    text = "The side of microsoft/mup is left out: --torch-python gives its interpreter."
    (row,) = report("coord_check.py", tmp_path / "coord_check.json", "--cases", "mlp", text=text)["rows"]
    assert (row["case"], row["widths"], row["ratio"], row["missed"]) == ("mlp", [16, 32], {}, [])
    assert set(row["runs"]) == {"cold", "warm", "plain, cold", "plain, warm"}
    for side, (figures,) in row["runs"].items():
        assert figures["process"] > figures["check"] + figures["imports"] > figures["check"] > 0
        assert figures["cpu"] > 0
        assert figures["megabytes"] > 50
        assert figures["seeds"] == 2
        # Of each width: initial values, a step and what surrounds them.
        assert figures["programs"] >= 4
        assert figures.get("taps") == (4 if side in {"cold", "warm"} else None)
    # The second run found all programs of the first in the cache.
    assert row["runs"]["warm"][0]["cpu"] < row["runs"]["cold"][0]["cpu"]
    assert 0 < row["runs"]["plain, warm"][0]["xla"] < row["runs"]["plain, cold"][0]["xla"]


def test_sweep_runs_the_same_trials_on_every_side(report, scripts, monkeypatch, tmp_path):
    """The side that needs devices of its own is in a process of its own, as all are when they are timed."""
    module = scripts["sweep.py"]
    apart = module.in_own_process
    monkeypatch.setattr(
        module,
        "in_own_process",
        lambda side, case, torch: (
            apart(side, case, torch) if side == module.SPLIT else module.measure(side, case)
        ),
    )
    (row,) = report("sweep.py", tmp_path / "sweep.json", "--cases", "mlp-64")["rows"]
    assert (row["case"], row["width"], row["trials"]) == ("mlp-64", 16, 4)
    assert set(row["runs"]) == {"mujax sweep", "jitted loop", "map, 1 device", "map, 8 devices"}
    for (run,) in row["runs"].values():
        assert run["seconds"] > 0
        assert run["compile"] > 0
        # Near what guessing among ten digits costs: it is trained for three steps on random data.
        assert 1.5 < run["loss"] < 3
    one, split = (row["runs"][side][0] for side in ("map, 1 device", "map, 8 devices"))
    assert one["loss"] == pytest.approx(split["loss"], rel=1e-5)
    assert one["modes"] == split["modes"] == {"map": 2}
    assert set(row["ratio"]) == {"jitted loop", "map, 8 devices"}
    assert row["scaling"] == pytest.approx(one["seconds"] / split["seconds"])
    assert f"{row['scaling']:.0%}" in scripts["sweep.py"].show([row])


def test_pareto_compares_two_ways_of_tuning(report, tmp_path):
    storage, out = tmp_path / "pareto.db", tmp_path / "pareto.json"
    (row,) = report("pareto.py", out, "--tasks", "mnist-mlp", "--trials", "4", "--storage", storage)["rows"]
    assert (row["proxy"], row["target"], row["trials"]) == (16, 32, 4)
    assert storage.exists()
    ours, direct = row["final"]["proxy"], row["final"]["direct"]
    assert len(ours["losses"]) == len(direct["losses"]) == 2
    # Both train the target; the search for one was at half its width.
    assert ours["run_flops"] == pytest.approx(direct["run_flops"], rel=0.01)
    assert 1.5 < direct["tuning_flops"] / ours["tuning_flops"] < 4
    (ratio,) = row["ratios"]
    assert ratio["trials"] == 4
    assert ratio["low"] <= ratio["ratio"] <= ratio["high"]
    for curve in row["fronts"].values():
        assert curve["trials"] == [1, 2, 4]
        assert curve["flops"] == sorted(curve["flops"])


def test_transfer_default_judges_the_claims_and_resumes(report, tmp_path):
    out = tmp_path / "transfer_default.json"
    (row,) = report("transfer_default.py", out, "--tasks", "mnist-mlp")["rows"]
    swept = row["report"]
    assert (row["task"], row["seed"], swept["steps"]) == ("mnist-mlp", 0, 3)
    widest = str(swept["widths"][-1])
    at = swept["log2_lrs"].index(row["transferred_log2_lr"]["mup"])
    assert row["transferred"] == swept["loss"]["mup"][widest][at]
    assert row["sp_tuned"] == min(loss for loss in swept["loss"]["sp"][widest] if loss is not None)
    assert row["cpu_seconds"] > 0
    # Nothing is run again, and the times are those of the run.
    assert report("transfer_default.py", out, "--tasks", "mnist-mlp")["rows"] == [row]


def test_transfer_default_names_each_claim_that_fails(scripts):
    good = {
        "task": "t",
        "seed": 0,
        "drift_log2": {"mup": 0.75, "sp": 2.0},
        "wider_is_better": {"mup": True, "sp": False},
        "transferred": 1.0,
        "sp_tuned": 1.0,
    }
    missed = scripts["transfer_default.py"].missed
    assert missed(good) == []
    changes = (
        ({"drift_log2": {"mup": 0.8, "sp": 2.0}}, "drift in µP: 0.8, the goal is at most 0.75"),
        ({"drift_log2": {"mup": 0.0, "sp": 1.9}}, "parametrization: 1.9, the goal is at least 2"),
        ({"wider_is_better": {"mup": False, "sp": True}}, "wider is not always better in µP"),
        ({"transferred": 1.5}, "SP tuned at the widest: 0.5, the goal is at most 0"),
        ({"transferred": None}, "diverges at the widest"),
    )
    for change, text in changes:
        (line,) = missed(good | change)
        assert text in line


def test_soundness_measures_random_programs_and_resumes(report, tmp_path):
    out = tmp_path / "soundness.json"
    found = report("soundness.py", out, "--programs", "3", "--start", "20", text="programs  3")
    assert found["programs"] == sum(found["outcomes"].values()) == 3
    assert found["seconds_each"] > 0
    # Nothing is run again, and the times are those of the run.
    assert report("soundness.py", out, "--programs", "3", "--start", "20") == found | {
        "load_average": json.loads(out.read_text())["load_average"]
    }


def test_pod_compares_compiled_steps_and_resumes(report, scripts, monkeypatch, tmp_path):
    module, out = scripts["pod.py"], tmp_path / "pod.json"
    monkeypatch.setattr(module, "in_own_process", module.measure)
    (row,) = report("pod.py", out, "--cases", "scanned-32-cpu")["rows"]
    (run,) = row["runs"]
    assert (row["case"], row["topology"], row["n_layers"]) == ("scanned-32-cpu", None, 2)
    # The factors are there, and next to nothing.
    assert 1 < row["ratio"]["flops"] < 1.01
    assert row["ratio"] == {name: run["mujax"][name] / run["optax"][name] for name in ("flops", "bytes")}
    for side in ("optax", "mujax"):
        # Parameters and two moments of four bytes each.
        assert run[side]["memory"] > run[side]["arguments"] > 12 * row["parameters"]
        assert run[side]["both"]["cpu"] == run[side]["lower"]["cpu"] + run[side]["compile"]["cpu"]
    monkeypatch.delattr(module, "in_own_process")
    assert report("pod.py", out, "--cases", "scanned-32-cpu")["rows"] == [row]


def test_pod_names_what_is_missed(scripts):
    module = scripts["pod.py"]
    side = {"flops": 1.0, "bytes": 1.0, "memory": 15e9, "collectives": {"all-gather f32[8]": 2}}
    side |= {figure: {"wall": 1.0, "cpu": 1.0} for figure in module.TIMED}
    case = module.CASES["7e9"]
    found = module.summary("7e9", case, [{"parameters": 1, "optax": side, "mujax": side}])
    assert found["missed"] == []
    assert "15.00 (15.00)" in module.show([found])
    worse = {
        "flops": 1.01,
        "bytes": 1.01,
        "memory": 17e9,
        "compile": {"wall": 1.0, "cpu": 1.2},
        "collectives": {"all-gather f32[8]": 2, "all-reduce f32[8]": 1},
    }
    found = module.summary("7e9", case, [{"parameters": 1, "optax": side, "mujax": side | worse}])
    assert [line.split(": ")[1].split()[0] for line in found["missed"]] == [
        *("flops", "bytes", "compile", "memory", "collectives"),
    ]


def test_pod_says_which_extra_is_missing(scripts, capsys, monkeypatch):
    module = scripts["pod.py"]
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(module, "in_own_process", None)
    with pytest.raises(SystemExit) as stop:
        module.main(["--quick", "--cases", "scanned-32-cpu", "7e9"])
    assert stop.value.code == 2
    assert 'of the extra tpu, got none; install it with `pip install "mujax-mup[tpu]"`' in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("script", "option"),
    [
        ("audit.py", "--runs"),
        ("pod.py", "--rounds"),
        ("overhead.py", "--runs"),
        ("spec_scale.py", "--runs"),
        ("optimizers.py", "--steps"),
        ("coord_check.py", "--runs"),
        ("sweep.py", "--rounds"),
        ("pareto.py", "--trials"),
        ("transfer_default.py", "--seeds"),
        ("soundness.py", "--programs"),
        ("soundness.py", "--jobs"),
    ],
)
def test_bad_options_are_one_line(scripts, capsys, script, option):
    with pytest.raises(SystemExit) as stop:
        scripts[script].main([option, "0"])
    assert stop.value.code == 2
    assert "expected at least 1, got 0" in capsys.readouterr().err
