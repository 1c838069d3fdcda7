"""How far the best learning rate moves with width, for one optimizer or more of each family.

    python benchmarks/optimizers.py [--quick] [--optimizers sgd muon] [--widths 32 512] [--seeds 3]
        [--steps 80] [--batch 64] [--out FILE]

The MLP with 3 hidden layers is trained on MNIST over a grid of learning rates a factor of 2 apart, at every
width, with each optimizer twice: as mujax's `mup_<name>` in µP, whose base is the narrowest width, and as
optax's own on the module as it is. All runs of a seed see the same batches. The loss is the training loss,
the mean over the run; the best learning rate is the minimum of the parabola through it, as in
`mujax transfer`, and the drift is the highest over all widths minus the lowest, in powers of two. A best
learning rate at an end of the grid is marked with a star: the optimum may be beyond, the drift larger.

Beside it the regret: the most that any width loses by being trained with the learning rate that is best at
the narrowest.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import common
import jax
import jax.numpy as jnp
import optax

import mujax
from mujax import train
from mujax.check import best_index, fitted_optimum, mean
from mujax.optim import OPTIMIZERS as REGISTRY
from mujax.train import Losses, tail
from mujax.tune import TASKS

TASK: Final = TASKS["mnist-mlp"]
GOAL: Final = common.Goal(0.7, "a drift of at most 0.7")

# ---- the sides ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An optimizer in both forms, each still without its learning rate.

    Attributes:
        plain: optax's.
        ours: mujax's, for a spec.
        log2_lrs: the grid of learning rates, as powers of two: its lowest and its highest.
    """

    plain: Callable[..., optax.GradientTransformation]
    ours: Callable[..., optax.GradientTransformation]
    log2_lrs: tuple[int, int]

    @property
    def grid(self) -> tuple[float, ...]:
        """All learning rates, as powers of two."""
        low, high = self.log2_lrs
        return tuple(float(exponent) for exponent in range(low, high + 1))


def _candidate(
    plain: Callable[..., Any], ours: Callable[..., Any], log2_lrs: tuple[int, int], **options: Any
) -> Candidate:
    return Candidate(functools.partial(plain, **options), functools.partial(ours, **options), log2_lrs)


CANDIDATES: Final[Mapping[str, Candidate]] = {
    "sgd": _candidate(optax.sgd, mujax.mup_sgd, (-8, 0), momentum=0.9),
    "adamw": _candidate(optax.adamw, mujax.mup_adamw, (-12, -4)),
    "lion": _candidate(optax.lion, mujax.mup_lion, (-13, -5)),
    "lamb": _candidate(optax.lamb, mujax.mup_lamb, (-8, -2)),
    "novograd": _candidate(optax.novograd, mujax.mup_novograd, (-7, 0)),
    "muon": _candidate(optax.contrib.muon, mujax.mup_muon, (-9, -2)),
}
"""At least one optimizer of each family, by optax's name."""

SIDES: Final = ("optax", "mujax")


@dataclasses.dataclass(frozen=True)
class Effort:
    """The models and runs.

    Attributes:
        widths: ascending; the first is µP's base.
        seeds: how many.
        steps: of each run.
        batch: examples a step.
    """

    widths: tuple[int, ...]
    seeds: int
    steps: int
    batch: int


def program(candidate: Candidate, side: str, width: int, effort: Effort) -> Callable[..., Losses]:
    """One compiled program for all learning rates and seeds: training data, rate, seed -> losses."""
    (model, inputs), (base, _), (delta, _) = (
        TASK.build(size) for size in (width, effort.widths[0], 2 * effort.widths[0])
    )
    parametrization = "mup" if side == "mujax" else "sp"
    mup = mujax.mup_init(model, base, *inputs, delta=delta, parametrization=parametrization)

    def cross_entropy(params: Any, examples: Any) -> Any:
        logits = mup.apply({"params": params}, examples.inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, examples.targets).mean()

    @jax.jit
    def run(examples: Any, rate: Any, seed: Any) -> Losses:
        init_key, draw_key = jax.random.split(jax.random.key(seed))
        params = mup.init(init_key)["params"]
        drawn = TASK.draw(examples, draw_key, effort.batch, effort.steps)

        def loss(params: Any, state: Any, batch: Any, _: Any) -> Any:
            return cross_entropy(params, TASK.fetch(examples, batch)), (state, {})

        tx = candidate.ours(rate, spec=mup.spec) if side == "mujax" else candidate.plain(rate)
        _, metrics = train.train_scan(loss, tx, donate=False)(train.init_state(params, tx), drawn)
        last = drawn[-tail(effort.steps) :]
        untrained = jax.lax.map(lambda batch: cross_entropy(params, TASK.fetch(examples, batch)), last)
        losses = metrics["loss"]
        return Losses(losses.mean(), losses[-tail(effort.steps) :].mean(), untrained.mean())

    return run


# ---- the sweep ----------------------------------------------------------------------------------------


class Clock:
    """Prints the progress of the sweep and the time left."""

    # What compiling costs in steps of the narrowest model.
    _COMPILE: Final = 400.0

    def __init__(self, effort: Effort, jobs: Sequence[tuple[str, str, int]]) -> None:
        self._effort, self._start = effort, time.monotonic()
        self._done, self._all = 0.0, sum(self._work(*job) for job in jobs)

    def _work(self, name: str, side: str, width: int) -> float:
        del side
        effort = self._effort
        # What every step costs, what grows with the kernels, and Muon's cubes.
        ratio = width / 32
        step = 1 + ratio**2 / 12 + (ratio**3 / 12 if name == "muon" else 0.0)
        return self._COMPILE + step * effort.steps * effort.seeds * len(CANDIDATES[name].grid)

    def begin(self, name: str, side: str, width: int) -> None:
        """Before a job."""
        spent = time.monotonic() - self._start
        left = f"{spent * (self._all / self._done - 1) / 60:.1f} min left" if self._done else "just started"
        print(
            f"{name} of {side} at width {width}: {self._done / self._all:4.0%} done, {left}",
            file=sys.stderr,
            flush=True,
        )

    def end(self, name: str, side: str, width: int) -> None:
        """After it."""
        self._done += self._work(name, side, width)


def sweep(candidate: Candidate, side: str, width: int, effort: Effort, examples: Any) -> list[float | None]:
    """The loss at each learning rate, the mean over seeds; None where a seed diverged."""
    run = program(candidate, side, width, effort)
    return [
        mean(
            [
                Losses(*map(float, run(examples, jnp.float32(2.0**rate), jnp.int32(seed)))).kept
                for seed in range(effort.seeds)
            ]
        )
        for rate in candidate.grid
    ]


def summary(grid: Sequence[float], curves: Mapping[int, Sequence[float | None]]) -> dict[str, Any]:
    """The summary of the curves of one optimizer on one side."""
    optima = {width: fitted_optimum(grid, curve) for width, curve in curves.items()}
    best = [optimum.log2_lr for optimum in optima.values()]
    known = [rate for rate in best if rate is not None]
    narrowest = next(iter(curves.values()))
    tuned = best_index(narrowest)
    regrets = [None if tuned is None else _regret(curve, tuned) for curve in curves.values()]
    measured = [regret for regret in regrets if regret is not None]
    return {
        "loss": {width: list(curve) for width, curve in curves.items()},
        "best_log2_lr": {width: optimum.log2_lr for width, optimum in optima.items()},
        "on_grid_edge": [width for width, optimum in optima.items() if optimum.on_edge],
        "drift_log2": max(known) - min(known) if len(known) == len(best) else None,
        "regret": max(measured) if len(measured) == len(regrets) else None,
    }


def _regret(curve: Sequence[float | None], tuned: int) -> float | None:
    """Loss at the tuned learning rate minus the best; None where it diverges."""
    best, there = best_index(curve), curve[tuned]
    if best is None or there is None:
        return None
    return there - min(loss for loss in curve if loss is not None)


# ---- the report ---------------------------------------------------------------------------------------


def _number(value: float | None, digits: int) -> str:
    return "diverged" if value is None else f"{value:.{digits}f}"


def show(rows: Sequence[Mapping[str, Any]], widths: Sequence[int]) -> str:
    """The rows as a table: a line for each optimizer and side."""
    header = ["optimizer", "family", "", *map(str, widths), "drift", "regret"]
    lines = []
    for row, side in itertools.product(rows, SIDES):
        found = row[side]
        best = [
            _number(rate, 1) + ("*" if width in found["on_grid_edge"] else "")
            for width, rate in found["best_log2_lr"].items()
        ]
        lines.append(
            [
                row["optimizer"],
                row["family"],
                {"optax": "plain", "mujax": "µP"}[side],
                *best,
                _number(found["drift_log2"], 2),
                _number(found["regret"], 3),
            ]
        )
    return common.table(header, lines)


def missed(row: Mapping[str, Any]) -> list[str]:
    """The goal, for µP only."""
    drift = row["mujax"]["drift_log2"]
    name = f"{row['optimizer']} in µP"
    if drift is None:
        return [f"{name}: every learning rate diverged at one width, the goal is {GOAL.text}."]
    return GOAL.missed_by(name, drift)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, prints the table and writes the report, which grows with every optimizer."""
    parser = argparse.ArgumentParser(description="Drift of the best learning rate with width, by optimizer.")
    add = parser.add_argument
    add("--optimizers", nargs="+", choices=CANDIDATES, default=list(CANDIDATES), help="default: all")
    add("--widths", nargs="+", type=int, help="the narrowest is the base (default: 32 64 128 256 512)")
    add("--seeds", type=int, help="default: 3")
    add("--steps", type=int, help="of each run (default: 80)")
    add("--batch", type=int, help="examples a step (default: 64)")
    add("--quick", action="store_true", help="a smoke run: two small widths, few steps, one seed")
    add("--out", type=pathlib.Path, default=common.OUT / "optimizers.json", help="the report")
    args = parser.parse_args(argv)
    default = Effort((16, 32), 1, 3, 16) if args.quick else Effort((32, 64, 128, 256, 512), 3, 80, 64)
    given = {name: getattr(args, name) for name in ("seeds", "steps", "batch")}
    for name, value in given.items():
        if value is not None and value < 1:
            parser.error(f"--{name}: expected at least 1, got {value}.")
    widths = tuple(sorted(set(args.widths or default.widths)))
    if len(widths) < 2 or widths[0] < 1:
        parser.error(f"--widths: expected at least two widths of at least 1, got {args.widths}.")
    chosen = {name: value for name, value in given.items() if value is not None}
    effort = dataclasses.replace(default, widths=widths, **chosen)

    examples, _ = TASK.load(None)
    names = list(dict.fromkeys(args.optimizers))
    clock = Clock(effort, [*itertools.product(names, SIDES, effort.widths)])
    report: dict[str, Any] = {
        "quick": args.quick,
        "environment": common.environment(),
        "task": TASK.title,
        **dataclasses.asdict(effort),
        "goals": {"drift_log2": GOAL.limit},
        "rows": [],
    }
    for name in names:
        candidate, row = CANDIDATES[name], {"optimizer": name, "family": REGISTRY[name].family}
        for side in SIDES:
            curves: dict[int, list[float | None]] = {}
            for width in effort.widths:
                clock.begin(name, side, width)
                curves[width] = sweep(candidate, side, width, effort, examples)
                clock.end(name, side, width)
            row[side] = summary(candidate.grid, curves)
        report["rows"].append({**row, "log2_lrs": candidate.grid, "missed": missed(row)})
        common.write(args.out, report)
    print(f"Best log2 learning rate by width; {effort.steps} steps of batch {effort.batch}.\n")
    print(show(report["rows"], effort.widths))
    print("\n" + common.verdict([line for row in report["rows"] for line in row["missed"]], quick=args.quick))
    print(f"\nWritten to {args.out}.")


if __name__ == "__main__":
    main()
