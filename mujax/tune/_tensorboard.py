"""Trials as runs of TensorBoard: a folder of event files for each, written without TensorFlow."""

from __future__ import annotations

import logging
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

from mujax._arguments import PATH, takes
from mujax.errors import ConfigError
from mujax.tune._results import Trial


@takes(folder=PATH)
def event_writer(folder: str | os.PathLike[str]) -> Callable[..., Any]:
    """Makes tensorboardX's `SummaryWriter` of a run, by its name, in a folder.

    Args:
        folder: for `tensorboard --logdir`; created if it does not exist.

    Raises:
        ConfigError: the package tensorboardX is missing, or the folder cannot be created.
    """
    try:
        import tensorboardX
    except ModuleNotFoundError as error:
        raise ConfigError(
            where="tensorboard",
            expected="the package tensorboardX",
            got=f"no {error.name} installed",
            remedy='pip install "mujax-mup[tensorboard]"',
        ) from error
    path = pathlib.Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            where="tensorboard",
            expected="a folder to write to",
            got=f"{path} ({error})",
            remedy="take another",
        ) from error
    # A loss that is not a number means divergence, which is not worth a line on stderr.
    logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)

    return lambda run, **options: tensorboardX.SummaryWriter(str(path / run), **options)


@takes(folder=PATH)
def tensorboard_writer(folder: str | os.PathLike[str]) -> Callable[[Trial], None]:
    """Writes each trial into a separate folder: for `finished` of `mujax.sweep` and `mujax.tune`.

    A trial's run `trial-0007` has the scalars `loss`, of every step, `rungs`, the objective at each rung
    before the last, and `final/...`, all final metrics, with its hyperparameters for the tab HParams. Its
    files are complete when the function returns: no writer needs to be closed.

    Args:
        folder: for `tensorboard --logdir`; created if it does not exist.

    Raises:
        ConfigError: the package tensorboardX is missing, or the folder cannot be created.

    Example:
        >>> tune(config, finished=writer("logs"))  # doctest: +SKIP
    """
    events_of = event_writer(folder)

    def write(trial: Trial) -> None:
        # The hyperparameters are in a second file, which may be created in the same second.
        with events_of(f"trial-{trial.number:04d}", filename_suffix=".curve") as events:
            # In this folder: a folder within it would be a separate run.
            events.add_hparams(_hparams(trial), _metrics(trial), name=".")
            for step, loss in enumerate(() if trial.curve is None else trial.curve):
                events.add_scalar("loss", float(loss), step)
            for step, value in sorted(trial.rungs.items()):
                events.add_scalar("rungs", value, step)

    return write


def _hparams(trial: Trial) -> dict[str, bool | int | float | str]:
    kinds = (bool, int, float, str)
    return {name: value if isinstance(value, kinds) else str(value) for name, value in trial.hparams.items()}


def _metrics(trial: Trial) -> dict[str, float]:
    """All metrics, the objective first and for every trial: TensorBoard reads the columns from one trial."""
    loss = math.nan if trial.loss is None else trial.loss
    return {"final/objective": loss, **{f"final/{name}": value for name, value in _finite(trial).items()}}


def _finite(trial: Trial) -> dict[str, Any]:
    return {name: value for name, value in trial.metrics.items() if math.isfinite(value)}
