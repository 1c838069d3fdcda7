"""Checks whether a model is in µP and whether its hyperparameters transfer across width."""

from mujax.check._audit import audit as audit, disagreements as disagreements
from mujax.check._coord_check import (
    CheckProgress as CheckProgress,
    CoordCheck as CoordCheck,
    TapReport as TapReport,
    coord_check as coord_check,
    measure as measure,
    passes_clearly as passes_clearly,
    prepare as prepare,
    report as report,
    respond_at_ends as respond_at_ends,
)
from mujax.check._made_up import made_up as made_up, made_up_inputs as made_up_inputs
from mujax.check._measure import STATS as STATS
from mujax.check._optimum import (
    Drift as Drift,
    Regret as Regret,
    best_index as best_index,
    fitted_optimum as fitted_optimum,
    mean as mean,
    never_worse as never_worse,
    standard_error as standard_error,
)
from mujax.check._transfer_check import (
    TransferCheck as TransferCheck,
    judge_runs as judge_runs,
    transfer_check as transfer_check,
)
from mujax.check._wider import (
    WiderIsBetter as WiderIsBetter,
    judge_widths as judge_widths,
    wider_is_better as wider_is_better,
)
from mujax.check._width_runs import (
    RUNS as RUNS,
    Finished as Finished,
    Progress as Progress,
    Run as Run,
    Runs as Runs,
    RunsFile as RunsFile,
    StoredRuns as StoredRuns,
    of_rate as of_rate,
    train_runs as train_runs,
)
