"""Made up for the tests: finished sweeps, trained targets, and the clock of a study."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import numpy as np

from mujax.check import Finished, Run
from mujax.tune._cost import front
from mujax.tune._sweep import Sweep, Trial
from mujax.tune._transfer import TargetRun, Transferred
from mujax.tune._width_sweep import Report, TransferConfig, summarise

SPACE = {
    "learning_rate": {"low": 2.0**-9, "high": 2.0**-6, "log": True},
    "warmup": {"low": 0.0, "high": 0.3},
    "schedule": ["linear", "cosine"],
}


class FakeClock:
    """A clock that stands still but for those who sleep, and who do not wait."""

    def __init__(self) -> None:
        self.time = 1000.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


def make_trial(number: int, loss: float | None, *, pruned: bool = False, **hparams: Any) -> Trial:
    """Learning rates 2^-9, 2^-8, 2^-7, 2^-6 in turn, and a curve of four steps where it came to its end."""
    default = {
        "learning_rate": 2.0 ** (number % 4 - 9),
        "warmup": round(0.001 + 0.01 * number, 3),
        "schedule": ("linear", "cosine")[number % 2],
    }
    whole = loss is not None and not pruned
    return Trial(
        number=number,
        hparams={**default, **hparams},
        loss=loss,
        pruned=pruned,
        metrics={} if loss is None else {"loss": loss, "mean_loss": 2 * loss},
        flops=1e9 if whole else 5e8,
        rungs={} if loss is None else {1: 2 * loss, 2: 1.5 * loss},
        curve=np.linspace(2.0, loss, 4) if whole and loss is not None else None,
    )


def make_sweep(
    count: int = 14, *, diverged: Container[int] = (), pruned: Container[int] = (), **hparams: Any
) -> Sweep:
    """The best is trial 5; the further from it the worse."""
    trials = [
        make_trial(
            number,
            None if number in diverged else 0.5 + 0.1 * abs(number - 5),
            pruned=number in pruned,
            **hparams,
        )
        for number in range(count)
    ]
    return Sweep("mine", tuple(trials), "loss", 1)


def make_transferred(
    losses: tuple[float | None, ...] = (0.4, 0.5), *, sweep: Sweep | None = None, **fields: Any
) -> Transferred:
    """A target of width 1024 whose tuning at width 64 has cost a hundredth."""
    sweep = make_sweep() if sweep is None else sweep
    best = sweep.best
    assert best is not None
    flops = [trial.flops or 0.0 for trial in sweep.trials]
    runs = [
        TargetRun(
            seed,
            loss,
            {} if loss is None else {"loss": loss},
            tuple(np.linspace(2.3, np.nan if loss is None else loss, 80)),
        )
        for seed, loss in enumerate(losses)
    ]
    default: dict[str, Any] = {
        "task": "mnist-mlp",
        "study": "mine",
        "width": 1024,
        "proxy": 64,
        "trial": best,
        "hparams": dict(best.hparams),
        "not_transferred": {},
        "objective": "loss",
        "runs": tuple(runs),
        "steps": 80,
        "tuning_flops": sweep.flops,
        "run_flops": 1e11,
        "direct_flops": 100 * (sweep.flops or 0.0),
        "proxy_front": front([None if one.pruned else one.loss for one in sweep.trials], flops),
        "params": {"first": {"kernel": np.ones((2, 3), np.float32)}, "bias": np.zeros(3, np.float32)},
    }
    return Transferred(**{**default, **fields})


def report_of(config: TransferConfig, losses: Mapping[Run, float | None], untrained: float = 5.0) -> Report:
    """The report of a sweep over widths whose runs have these losses."""
    return summarise(config, {run: Finished(loss, loss, untrained) for run, loss in losses.items()})
