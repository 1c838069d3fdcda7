"""The picture of a transfer report: what is drawn where, and that a PNG comes out."""

from __future__ import annotations

import math
import pathlib
import struct

import numpy as np
import pytest
from matplotlib.axes import Axes

from mujax.plot import plot_transfer, transfer_figure
from mujax.transfer import Report, Run, TransferConfig, summarise

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
    return summarise(config, runs)


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
    assert transfer_figure(summarise(config, runs)).axes[0].get_ylim()[1] < 3


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
