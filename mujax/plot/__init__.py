"""Pictures. The only package that imports matplotlib, without pyplot: no global state, no display."""

from mujax.plot._coord_check import (
    coord_check_figure as coord_check_figure,
    plot_coord_check as plot_coord_check,
)
from mujax.plot._curves import curves_figure as curves_figure
from mujax.plot._growth import growth_figure as growth_figure
from mujax.plot._panels import Panel as Panel, animate as animate, panels_figure as panels_figure
from mujax.plot._sweep import plot_sweep as plot_sweep, sweep_figure as sweep_figure
from mujax.plot._target import (
    plot_transfer_run as plot_transfer_run,
    transfer_run_figure as transfer_run_figure,
)
from mujax.plot._widths import plot_transfer as plot_transfer, transfer_figure as transfer_figure
