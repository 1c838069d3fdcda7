"""Searches hyperparameters on a small model and trains the large one with them."""

from mujax.tune._cost import Front as Front, front as front
from mujax.tune._numbers import number as number
from mujax.tune._results import Sweep as Sweep, SweepProgress as SweepProgress, Trial as Trial
from mujax.tune._sweep import Study as Study, study_module as study_module, sweep as sweep
from mujax.tune._tasks import TASKS as TASKS
from mujax.tune._tensorboard import tensorboard_writer as tensorboard_writer
from mujax.tune._transfer import (
    TargetProgress as TargetProgress,
    TargetRun as TargetRun,
    Transferred as Transferred,
    transfer as transfer,
)
from mujax.tune._tune import TuneConfig as TuneConfig, read_study as read_study, tune as tune
from mujax.tune._user_code import build as build, imported as imported, summary_of as summary_of
from mujax.tune._width_sweep import (
    LOSS_MEASURE as LOSS_MEASURE,
    REPORT as REPORT,
    Report as Report,
    TransferConfig as TransferConfig,
    TransferredVsTuned as TransferredVsTuned,
    parametrization_title as parametrization_title,
    sweep_widths as sweep_widths,
)
