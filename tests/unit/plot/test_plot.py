"""The pictures of reports, checks, sweeps and trained targets: what is drawn where, as a PNG."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
import struct

import numpy as np
import pytest
from checks import FAILING, RATES, WIDTHS as CHECKED_WIDTHS, check, tap
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image
from trials import SPACE, make_sweep, make_transferred, report_of

from mujax.check import Run
from mujax.errors import ConfigError
from mujax.plot import (
    Panel,
    animate,
    coord_check_figure,
    curves_figure,
    growth_figure,
    panels_figure,
    plot_coord_check,
    plot_sweep,
    plot_transfer,
    plot_transfer_run,
    sweep_figure,
    transfer_figure,
    transfer_run_figure,
)
from mujax.tune._sweep import Sweep
from mujax.tune._width_sweep import Report, TransferConfig

WIDTHS = (32, 64, 128)
GRID = (-11.0, -10.0, -9.0, -8.0, -7.0, -6.0)


def make_report(parametrizations: tuple[str, ...] = ("sp", "mup"), lost: tuple[Run, ...] = ()) -> Report:
    """µP: optima at -8.25; standard: lower by one each time that the width doubles."""
    config = TransferConfig.for_task(widths=WIDTHS, log2_lrs=GRID, parametrizations=parametrizations)
    runs: dict[Run, float | None] = {}
    for name in config.parametrizations:
        for width in config.widths:
            centre = -8.25 - (math.log2(width / 32) if name == "sp" else 0)
            for rate in config.log2_lrs:
                for seed in config.all_seeds:
                    loss = 1 + 0.1 * (rate - centre) ** 2 - width / 1000 + 0.01 * seed
                    run = Run(name, width, rate, seed)
                    runs[run] = None if run in lost else loss
    return report_of(config, runs)


def lines(axes: Axes, marker: str) -> list[tuple[list[float], list[float]]]:
    found = [line for line in axes.get_lines() if line.get_marker() == marker]
    return [(list(np.atleast_1d(line.get_xdata())), list(np.atleast_1d(line.get_ydata()))) for line in found]


def test_the_file_is_a_png_of_a_size_to_show(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "transfer.png"
    plot_transfer(make_report(), path)
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert width > 1500
    assert height > 600


def test_one_panel_for_each_parametrization_one_curve_for_each_width() -> None:
    report = make_report()
    panels = transfer_figure(report).axes
    assert [panel.get_title(loc="left") for panel in panels] == ["Standard parametrization", "µP"]
    assert panels[0].get_ylim() == panels[1].get_ylim()
    for name, panel in zip(("sp", "mup"), panels, strict=True):
        curves = lines(panel, "o")
        assert len(curves) == len(WIDTHS)
        for width, (rates, losses) in zip(WIDTHS, curves, strict=True):
            assert rates == list(GRID)
            assert losses == pytest.approx(report.loss[name][width])
    assert len(transfer_figure(make_report(("table3",))).axes) == 1


def test_a_star_at_each_fitted_optimum_and_a_line_at_the_proxys_best() -> None:
    standard, mup = transfer_figure(make_report()).axes
    assert [x for (x,), _ in lines(standard, "*")] == pytest.approx([-8.25, -9.25, -10.25])
    assert [x for (x,), _ in lines(mup, "*")] == pytest.approx([-8.25] * 3)
    for panel in (standard, mup):
        (vertical,) = [line for line in panel.get_lines() if list(line.get_ydata()) == [0, 1]]
        assert list(vertical.get_xdata()) == [-8.0, -8.0]


def test_the_legend_names_the_widths_and_the_proxy_and_axes_are_labelled() -> None:
    standard, mup = transfer_figure(make_report()).axes
    legend = mup.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["32 (proxy)", "64", "128"]
    assert "loss" in standard.get_ylabel()
    assert all("log2 of the learning rate" in panel.get_xlabel() for panel in (standard, mup))


def test_a_diverged_run_breaks_the_curve_and_everything_else_is_drawn() -> None:
    report = make_report(lost=tuple(Run("sp", 128, rate, 0) for rate in (-7.0, -6.0)))
    standard, _ = transfer_figure(report).axes
    losses = lines(standard, "o")[-1][1]
    assert [math.isnan(loss) for loss in losses] == [False] * 4 + [True] * 2
    assert np.isfinite(standard.get_ylim()).all()


def test_a_target_that_all_but_diverged_does_not_flatten_the_valleys() -> None:
    config = make_report().config
    runs: dict[Run, float | None] = {
        Run(name, width, rate, seed): 1e4
        if (name, width, rate) == ("sp", 128, -8.0)
        else 1 + 0.1 * abs(rate + 8)
        for name in config.parametrizations
        for width in config.widths
        for rate in config.log2_lrs
        for seed in config.all_seeds
    }
    assert transfer_figure(report_of(config, runs)).axes[0].get_ylim()[1] < 3


def test_a_sweep_in_which_everything_diverged_still_gives_a_picture(tmp_path: pathlib.Path) -> None:
    config = make_report().config
    everything = tuple(
        Run(name, width, rate, seed)
        for name in config.parametrizations
        for width in config.widths
        for rate in config.log2_lrs
        for seed in config.all_seeds
    )
    plot_transfer(make_report(lost=everything), tmp_path / "transfer.png")
    assert (tmp_path / "transfer.png").stat().st_size > 10_000


# ---- the coordinate check -------------------------------------------------------------------------------


def drawn(axes: Axes) -> dict[str, tuple[list[float], str]]:
    """Each tap's line: its heights and colour."""
    return {
        str(line.get_label()): (list(np.asarray(line.get_ydata(), float)), to_hex(line.get_color()))
        for line in axes.get_lines()
        if line.get_marker() == "o"
    }


def texts(axes: Axes) -> list[Text]:
    return [text for text in axes.texts if text.get_text()]


def colours_of_legend(reports: list[object]) -> dict[str, str]:
    (legend,) = coord_check_figure(reports).legends  # type: ignore[arg-type]
    labels = [text.get_text() for text in legend.get_texts()]
    lines = legend.get_lines()
    return {label: to_hex(line.get_color()) for label, line in zip(labels, lines, strict=True)}


def test_a_row_for_each_parametrization_and_a_panel_for_each_of_five_steps() -> None:
    figure = coord_check_figure([check("sp", steps=20), check("mup", steps=20)], title="Net, adam")
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    steps = ["at initialisation", *(f"change by step {step}" for step in (1, 3, 7, 20))]
    assert titles == steps * 2
    assert [axes.get_title(loc="left") for axes in coord_check_figure([check(steps=1)]).axes] == steps[:2]
    assert {axes.get_ylim() for axes in figure.axes} == {figure.axes[0].get_ylim()}
    assert {(axes.get_xscale(), axes.get_yscale()) for axes in figure.axes} == {("log", "log")}
    assert list(figure.axes[-1].get_xticks()) == list(CHECKED_WIDTHS)
    low, high = figure.axes[0].get_ylim()
    assert sum(low <= tick <= high for tick in figure.axes[0].get_yticks()) >= 3
    shown = [text.get_text() for axes in figure.axes for text in texts(axes)]
    assert "Standard parametrization" in shown
    assert "fail: 2 of 4 activations depend on width, 1 of them by a fault elsewhere" in shown
    assert "pass: none of 4 activations depends on width" in shown
    assert "Net, adam, learning rate $2^{-9}$, 4 seeds" in [text.get_text() for text in figure.texts]


def test_a_line_for_each_tap_size_at_first_and_changes_after() -> None:
    report = check("mup")
    before, after, *_ = coord_check_figure([report]).axes
    numbers = {"first/kernel": 0, "hidden/kernel": 2, "output": 3}
    # Gains and biases that are not to blame: the sum with them is not judged.
    assert set(drawn(before)) == set(drawn(after)) == set(numbers)
    for name, number in numbers.items():
        sizes = report.sizes[RATES[0]]
        assert drawn(before)[name][0] == pytest.approx(sizes[:, 0, number, 0])
        assert drawn(after)[name][0] == pytest.approx(sizes[:, 1, number, 1])
    for axes in (before, after):
        (flat,) = [line for line in axes.get_lines() if line.get_marker() != "o"]
        assert len(set(np.asarray(flat.get_ydata()).tolist())) == 1
    other = coord_check_figure([report], learning_rate=RATES[1]).axes[0]
    assert drawn(other)["output"][0] == pytest.approx(3 * np.array(drawn(before)["output"][0]))


def test_what_fails_is_in_colour_and_named_what_inherits_is_pale_what_passes_is_grey() -> None:
    report = check("sp")
    *_, last = coord_check_figure([report]).axes
    legend = colours_of_legend([report])
    assert set(legend) == {"wrong learning rate", "fault inherited", "passes", "slope 0"}
    colours = {name: colour for name, (_, colour) in drawn(last).items()}
    assert colours == {
        "first/kernel": legend["passes"],
        "hidden/kernel": legend["wrong learning rate"],
        "output": legend["fault inherited"],
    }
    names = [text for text in texts(last) if text.get_text() == "hidden"]
    assert [to_hex(name.get_color()) for name in names] == [legend["wrong learning rate"]]
    # Its twin in which all is well names nothing.
    *_, last = coord_check_figure([check("mup")]).axes
    assert texts(last) == []
    assert set(colours_of_legend([check("mup")])) == {"passes", "slope 0"}


def test_undecided_taps_and_gains_at_fault_are_drawn_and_named() -> None:
    taps = (tap("a/kernel", status="undecided"), tap("b/scale", "vector", "fail", blamed=True, slope=None))
    *_, last = coord_check_figure([check("mup", taps)]).axes
    assert set(drawn(last)) == {"a/kernel", "b/scale"}
    assert {text.get_text() for text in texts(last)} == {"a", "b/scale"}


def test_names_do_not_overlap_and_the_rest_is_counted() -> None:
    taps = [tap(f"block_{n}/kernel", status="fail", blamed=True, slope=1.0) for n in range(30)]
    report = check("sp", taps)
    for sizes in report.sizes.values():
        sizes[..., 1] = 1.0
    figure = coord_check_figure([report])
    figure.canvas.draw()
    *_, last = figure.axes
    # Without the lines that lead from the names to the curves.
    boxes = sorted((Text.get_window_extent(text) for text in texts(last)), key=lambda box: -box.y0)
    assert len(boxes) == 21
    assert "and 10 more" in [text.get_text() for text in texts(last)]
    assert all(above.y0 >= below.y1 - 1 for above, below in itertools.pairwise(boxes))
    assert max(box.x1 for box in boxes) <= figure.bbox.x1


def test_long_names_stay_inside_of_the_picture() -> None:
    name = "encoder/stage_3_block_12/cross_attention/shortcut_projection/kernel"
    figure = coord_check_figure([check("sp", [tap(name, status="fail", blamed=True)])])
    figure.canvas.draw()
    *_, last = figure.axes
    (text,) = texts(last)
    assert text.get_text() == "…s_attention/shortcut_projection"
    assert text.get_window_extent().x1 <= figure.bbox.x1


def test_what_diverged_or_never_moved_leaves_gaps_and_a_picture(tmp_path: pathlib.Path) -> None:
    report = check("sp", FAILING, lost=np.s_[2, 3:])
    figure = coord_check_figure([report])
    heights = drawn(figure.axes[-1])["hidden/kernel"][0]
    assert [math.isnan(height) for height in heights] == [False, False, True]
    assert "hidden" in [text.get_text() for text in texts(figure.axes[-1])]
    for nothing in (math.nan, 0.0):
        empty = check("sp", FAILING)
        for sizes in empty.sizes.values():
            sizes[...] = nothing
        plot_coord_check([empty, check("mup")], tmp_path / "check.png")
        plot_coord_check([empty], tmp_path / "check.png")


def test_the_file_of_a_check_is_a_png_of_a_size_to_show(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "check.png"
    plot_coord_check([check("sp"), check("mup")], path, title="Net, adam")
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert width > 1500
    assert height > 900


def test_a_picture_of_nothing_or_of_a_rate_that_was_not_tried_is_refused() -> None:
    with pytest.raises(ConfigError, match="reports: expected at least one result of coord_check"):
        coord_check_figure([])
    with pytest.raises(ConfigError, match=r"learning_rate: expected one that all .*, got 0\.5\."):
        coord_check_figure([check()], learning_rate=0.5)


# ---- a sweep over hyperparameters -----------------------------------------------------------------------


def points(axes: Axes, marker: str) -> dict[float, float]:
    """Losses by the value of the hyperparameter."""
    return {
        float(np.atleast_1d(line.get_xdata())[0]): float(np.atleast_1d(line.get_ydata())[0])
        for line in axes.get_lines()
        if line.get_marker() == marker
    }


def panels_of(sweep: Sweep, **kwargs: object) -> dict[str, Axes]:
    figure = sweep_figure(sweep, **kwargs)  # type: ignore[arg-type]
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_visible()}


def legend_of(sweep: Sweep) -> list[str]:
    (legend,) = sweep_figure(sweep).legends
    return [text.get_text() for text in legend.get_texts()]


def test_a_panel_for_each_hyperparameter_with_every_trial_and_a_star_at_the_best() -> None:
    sweep = make_sweep()
    panels = panels_of(sweep, space=SPACE, title="Net")
    assert list(panels) == ["learning rate", "warmup", "schedule"]
    assert len({axes.get_ylim() for axes in panels.values()}) == 1
    stars, dots = points(panels["warmup"], "*"), points(panels["warmup"], "o")
    assert stars == {0.051: 0.5}
    assert {**stars, **dots} == {trial.hparams["warmup"]: trial.loss for trial in sweep.trials}
    assert points(panels["learning rate"], "*") == {2.0**-8: 0.5}
    blue = {
        float(np.atleast_1d(line.get_xdata())[0])
        for line in panels["warmup"].get_lines()
        if line.get_marker() == "o" and line.get_zorder() == 4
    }
    best = sorted(sweep.trials, key=lambda trial: trial.loss or 0.0)[1:10]
    assert blue == {trial.hparams["warmup"] for trial in best}
    assert legend_of(sweep) == ["best", "10 best", "others"]


def test_axes_are_logarithmic_as_the_space_is_or_else_by_what_the_values_span() -> None:
    known, unknown = panels_of(make_sweep(), space=SPACE), panels_of(make_sweep())
    assert known["learning rate"].get_xscale() == "log"
    assert known["warmup"].get_xscale() == "linear"
    # A factor of eight and of a hundred.
    assert unknown["learning rate"].get_xscale() == "linear"
    assert unknown["warmup"].get_xscale() == "log"


def test_names_are_side_by_side_in_the_order_of_the_space() -> None:
    axes = panels_of(make_sweep(), space={"schedule": ["linear", "constant", "cosine"]})["schedule"]
    axes.figure.canvas.draw()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["linear", "constant", "cosine"]
    places = {round(place) for place in points(axes, "o")}
    assert places == {0, 2}


def test_diverged_trials_are_ticks_above_and_pruned_ones_are_hollow() -> None:
    sweep = make_sweep(diverged={3, 4}, pruned={6})
    axes = panels_of(sweep)["warmup"]
    assert set(points(axes, "|")) == {0.031, 0.041}
    assert min(points(axes, "|").values()) > 1
    hollow = [line for line in axes.get_lines() if line.get_markerfacecolor() == "white"]
    assert [float(np.atleast_1d(line.get_xdata())[0]) for line in hollow] == [0.061]
    assert legend_of(sweep) == ["best", "10 best", "others", "pruned", "diverged"]
    assert points(panels_of(make_sweep())["warmup"], "|") == {}


def test_a_loss_far_above_the_others_is_at_the_edge_and_flattens_nothing() -> None:
    sweep = make_sweep()
    (*others, last) = sweep.trials
    sweep = dataclasses.replace(sweep, trials=(*others, dataclasses.replace(last, loss=1e4)))
    axes = panels_of(sweep)["warmup"]
    assert axes.get_ylim()[1] < 3
    assert list(points(axes, "^")) == [last.hparams["warmup"]]
    assert "far above" in legend_of(sweep)
    assert "far above" not in legend_of(make_sweep())


def test_sweeps_of_which_nothing_or_little_is_left_still_give_a_picture(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "tune.png"
    for sweep in (make_sweep(1), make_sweep(3, diverged={0, 1, 2}), make_sweep(3, pruned={0, 1, 2})):
        plot_sweep(sweep, path, space=SPACE)
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(ConfigError, match="sweep: expected at least one trial to draw, got none"):
        sweep_figure(make_sweep(0))


# ---- a trained target -----------------------------------------------------------------------------------


def test_the_front_of_the_proxy_and_the_same_at_the_target_as_many_times_dearer() -> None:
    transferred = make_transferred()
    front, saved = transferred.proxy_front, transferred.saved
    assert front is not None
    assert saved == pytest.approx(100)
    axes = transfer_run_figure(transferred).axes[0]
    (proxy,) = [line for line in axes.get_lines() if line.get_marker() == "o"]
    (target,) = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
    assert list(np.asarray(proxy.get_xdata())) == pytest.approx(front.flops)
    assert list(np.asarray(target.get_xdata())) == pytest.approx([100 * one for one in front.flops])
    assert list(np.asarray(target.get_ydata())) == list(np.asarray(proxy.get_ydata())) == list(front.loss)
    assert axes.get_xscale() == "log"
    low, high = axes.get_xlim()
    assert low < front.flops[0]
    assert 100 * front.flops[-1] < high
    shown = [text.get_text() for text in texts(axes)]
    for text in ("100× fewer operations", "1 trial", "14"):
        assert text in shown
    legend = axes.get_legend()
    assert legend is not None
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["proxy, width 64", "same search at the target"]


def test_a_curve_for_each_seed_and_the_proxys_best_for_comparison() -> None:
    figure = transfer_run_figure(make_transferred((0.4, 0.5)))
    axes = figure.axes[1]
    curves = [line for line in axes.get_lines() if line.get_linestyle() == "-"]
    assert [float(np.asarray(line.get_ydata())[-1]) for line in curves] == pytest.approx([0.4, 0.5], abs=0.05)
    assert [list(np.asarray(line.get_xdata()))[-1] for line in curves] == [80, 80]
    shown = [text.get_text() for text in texts(axes)]
    assert "loss 0.4500 ± 0.0500, 2 seeds" in shown
    assert "proxy's best, 0.500" in shown
    assert "tuned at width 64, trained at width 1024" in figure.get_suptitle()


def test_a_target_that_diverged_or_costs_nobody_knows_still_give_a_picture(tmp_path: pathlib.Path) -> None:
    one = transfer_run_figure(make_transferred((None, 0.5)))
    assert "1 of 2 seeds diverged" in [text.get_text() for text in texts(one.axes[1])]
    nothing = dataclasses.replace(make_transferred((None,)), proxy_front=None, tuning_flops=None)
    (run,) = nothing.runs
    nothing = dataclasses.replace(nothing, runs=(dataclasses.replace(run, curve=()),))
    left, right = transfer_run_figure(nothing).axes
    assert "the operations of the trials are not known" in [text.get_text() for text in texts(left)]
    assert "it diverged before there was a loss to draw" in [text.get_text() for text in texts(right)]
    # The front is known, and what the target costs is not.
    alone = transfer_run_figure(dataclasses.replace(make_transferred(), direct_flops=None)).axes[0]
    assert [line for line in alone.get_lines() if line.get_linestyle() == "--"] == []
    plot_transfer_run(nothing, tmp_path / "target.png")
    content = (tmp_path / "target.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert width > 1500
    assert height > 600


# ---- the paper's pictures -------------------------------------------------------------------------------


def panels(optimum: float = -3.0) -> list[Panel]:
    curves = {width: [1.5, 1.0 - width / 1000, None] for width in (64, 128)}
    return [Panel(name, "rate", (-4.0, -3.0, -2.0), curves, {64: optimum, 128: None}) for name in ("a", "b")]


def test_a_panel_has_a_curve_for_each_width_and_a_star_at_each_optimum() -> None:
    figure = panels_figure(panels(), title="t")
    for axes, name in zip(figure.axes, ("a", "b"), strict=True):
        assert axes.get_title("left") == name
        assert len(lines(axes, "o")) == 2
        assert lines(axes, "*") == [([-3.0], [pytest.approx(0.936)])]
        low, high = axes.get_ylim()
        assert low < 1 - 0.128
        assert high > 1 - 0.064
    assert [axes.get_legend() is not None for axes in figure.axes].count(True) == 1


def test_panels_of_other_legends_have_one_each_and_an_empty_place_is_hidden() -> None:
    one, other = panels()
    three = [one, dataclasses.replace(other, legend="depth", names=("x", "y", "z")), one]
    figure = panels_figure(three, columns=2, share_y=False)
    assert [axes.get_visible() for axes in figure.axes] == [True, True, True, False]
    assert [axes.get_legend().get_title().get_text() for axes in figure.axes[:3]] == [
        "width",
        "depth",
        "width",
    ]
    assert [text.get_text() for text in figure.axes[1].get_xticklabels()] == ["x", "y", "z"]


def test_panels_of_which_all_diverged_are_drawn() -> None:
    lost = Panel("lost", "rate", (-4.0, -3.0, -2.0), {64: [None] * 3}, {64: None})
    (axes,) = panels_figure([lost]).axes
    assert lines(axes, "*") == []


def test_an_animation_goes_there_and_back(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "panels.gif"
    frames = [panels_figure([one], limits_of=panels()) for one in panels(-3.5) + panels()[:1]]
    animate(frames, path, seconds=0.1)
    assert path.read_bytes()[:6] == b"GIF89a"
    with Image.open(path) as image:
        durations = []
        for place in range(image.n_frames):
            image.seek(place)
            durations.append(image.info["duration"])
    assert durations == [200, 100, 200, 100]


def test_curves_of_each_width_and_one_that_diverged() -> None:
    table = np.linspace(3, 1, 20).reshape(2, 10)
    one, other = curves_figure(
        {"sp": {64: table, 128: None}, "mup": {64: table, 128: table - 1}}, steps=100
    ).axes
    assert [text.get_text() for text in one.get_legend().get_texts()] == ["64", "128 (diverges)"]
    assert len(other.get_lines()) == 2
    assert one.get_lines()[0].get_xdata()[0] == 5.0
    low, high = other.get_ylim()
    assert low < (table - 1).mean(axis=0).min()
    assert high > table.mean(axis=0).max()


def test_growth_shows_a_decade_at_least() -> None:
    level = np.full((3, 2), 0.5)
    rows = {name: {"logits": level, "embeddings": 2 * level} for name in ("sp", "mup")}
    figure = growth_figure(rows, (16, 32, 64), slopes={"sp": {"logits": "flat"}})
    assert [axes.get_title("left") for axes in figure.axes][:2] == ["logits\nflat", "embeddings\n"]
    for axes in figure.axes:
        low, high = axes.get_ylim()
        assert high / low >= 10
        assert len(axes.get_lines()) == 2
