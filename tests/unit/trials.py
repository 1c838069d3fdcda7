"""Made up for the tests: a job, finished sweeps, trained targets, and the clock of a study."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mujax.check import Finished, Run
from mujax.tune._cost import front
from mujax.tune._results import Sweep, Trial
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


@dataclasses.dataclass
class Decay:
    """x <- rate x, `length` times from a random start; `seen` has the steps that are really computed."""

    length: int = 8
    in_loop: bool = True
    data: Any = dataclasses.field(default_factory=lambda: jnp.float32(1.0))
    static: frozenset[str] = frozenset()
    seen: list[float] = dataclasses.field(default_factory=list)
    sizes: list[str] = dataclasses.field(default_factory=list)

    def check(self, hparams: Mapping[str, Any]) -> None:
        pass

    def steps(self, static: Mapping[str, Any]) -> int:
        return static.get("length", self.length)

    def init(self, hparams: Mapping[str, Any], key: Any, data: Any) -> Any:
        return {"x": data * jax.random.normal(key, (3,)), "at": jnp.int32(0)}

    def advance(self, hparams: Mapping[str, Any], state: Any, steps: Any, data: Any) -> Any:
        def one(_: Any, state: Any) -> Any:
            jax.debug.callback(lambda rate: self.seen.append(float(rate)), hparams["rate"])
            return {"x": state["x"] * hparams["rate"], "at": state["at"] + 1}

        state = one(None, state) if steps is None else jax.lax.fori_loop(0, steps, one, state)
        return state, {"loss": jnp.abs(state["x"]).sum(), "at": state["at"]}

    def finish(self, hparams: Mapping[str, Any], state: Any, data: Any) -> Any:
        return {"vector": state["x"]}


def make_trial(number: int, loss: float | None, *, pruned: bool = False, **hparams: Any) -> Trial:
    """Learning rates 2^-9, 2^-8, 2^-7, 2^-6 in turn, and a curve of four steps where it reached its end."""
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
