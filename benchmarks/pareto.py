"""µTransfer against tuning the target directly: the cost of each, and the loss of the target.

    python benchmarks/pareto.py [--quick] [--tasks mnist-mlp text-transformer] [--trials 32] [--steps 80]
        [--out FILE] [--storage FILE]

For each task the same random search, over learning rate, learning rates by role, σ, multipliers, warm-up and
the end of the schedule, is made three times, trial by trial with the same hyperparameters:

- `proxy`: in µP at the proxy's width, several seeds to a trial;
- `direct`: in standard parametrization at the target's width, one seed to a trial;
- `target`: in µP at the target's width, one seed to a trial: its loss with each of the proxy's trials.

Then the best of `proxy` and the best of `direct` are trained at the target's width with fresh seeds: their
held-out losses and standard errors are the paper's claim at this size.

From the three searches, both ways of tuning are resampled: the trials come in another order each time, the
best so far is the search's choice, and the target's loss with that choice is its quality. The
figure is the operations that direct tuning needs to get to a loss and stay there over those that µTransfer
needs, where the loss is the median loss of direct tuning with some number of trials. Its interval
goes over the resamplings; where µTransfer does not get there with all its trials, the ratio counts as 0.

The loss is the held-out loss at the end, operations are those of the compiled programs. The searches are
stored: an interrupted benchmark resumes.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import common
import numpy as np

import mujax
from mujax.tune import Sweep, SweepProgress, TuneConfig, front

FRESH: Final = 1000
"""The first seed of the final runs: no search has seen it."""

GOAL: Final = common.Goal(1 / 10, "a tenth of the operations at most")


@dataclasses.dataclass(frozen=True)
class Case:
    """A proxy and a target.

    Attributes:
        proxy: width at which µTransfer tunes.
        target: width that is to be trained.
        proxy_seeds: runs of each trial at the proxy.
        steps: of each run.
        trials: of each search.
    """

    proxy: int
    target: int
    proxy_seeds: int
    steps: int
    trials: int


CASES: Final[Mapping[str, Case]] = {
    "mnist-mlp": Case(proxy=128, target=1024, proxy_seeds=2, steps=300, trials=32),
    "text-transformer": Case(proxy=32, target=256, proxy_seeds=2, steps=80, trials=24),
}
QUICK: Final[Mapping[str, Case]] = {
    "mnist-mlp": Case(proxy=16, target=32, proxy_seeds=1, steps=10, trials=4),
    "text-transformer": Case(proxy=16, target=32, proxy_seeds=1, steps=5, trials=4),
}

SEARCHES: Final = ("proxy", "direct", "target")

# ---- the searches --------------------------------------------------------------------------------------


def config(task: str, case: Case, search: str, trials: int, storage: pathlib.Path) -> TuneConfig:
    """One of the three searches."""
    at_proxy = search == "proxy"
    width = case.proxy if at_proxy else case.target
    return TuneConfig(
        task=task,
        width=width,
        base_width=width if search == "direct" else case.proxy,
        parametrization="sp" if search == "direct" else "mup",
        objective="valid_loss",
        seeds=case.proxy_seeds if at_proxy else 1,
        steps=case.steps,
        trials=trials,
        study=f"{task} {search} {width} {case.steps}",
        storage=str(storage),
    )


class Clock:
    """A line about each batch of trials, with the time left of its search."""

    def __init__(self, title: str) -> None:
        self._title, self._started, self._from = title, time.monotonic(), None

    def __call__(self, now: SweepProgress) -> None:
        if self._from is None:
            self._from = now.work_done
        if now.share not in (0.0, 1.0):
            return
        spent, gained = time.monotonic() - self._started, now.work_done - self._from
        left = f"{spent * (1 - now.work_done) / gained:.0f} s left" if gained > 0 else "just started"
        best = "none yet" if now.best is None else f"{now.best:.3f}"
        print(f"{self._title}: {now.work_done:4.0%}, best {best}, {left}", file=sys.stderr, flush=True)


# ---- both ways of tuning, resampled --------------------------------------------------------------------


def compare(studies: Mapping[str, Sweep], resamples: int, seed: int = 0) -> list[dict[str, Any]]:
    """Operations of direct tuning over those of µTransfer, at the losses that numbers of trials get to."""
    by_hparams = {
        name: {tuple(sorted(trial.hparams.items())): trial for trial in study.trials}
        for name, study in studies.items()
    }
    same = [key for key in by_hparams["proxy"] if all(key in trials for trials in by_hparams.values())]
    losses = {
        name: np.array([np.inf if (loss := trials[key].loss) is None else loss for key in same])
        for name, trials in by_hparams.items()
    }
    flops = {name: np.array([trials[key].flops for key in same]) for name, trials in by_hparams.items()}
    random = np.random.default_rng(seed)
    runs = []
    for _ in range(resamples):
        permutation = random.permutation(len(same))
        direct = losses["direct"][permutation]
        ours = common.so_far(losses["proxy"][permutation], losses["target"][permutation])
        runs.append(
            {
                "direct": np.minimum.accumulate(direct),
                "direct_flops": np.cumsum(flops["direct"][permutation]),
                "ours": ours,
                "ours_flops": np.cumsum(flops["proxy"][permutation]),
            }
        )
    rows = []
    for count in [size for size in (4, 8, 16, 32, 64) if size <= len(same)]:
        level = float(np.median([run["direct"][count - 1] for run in runs]))
        ratios = []
        for run in runs:
            direct = common.spent_on(run["direct"], run["direct_flops"], level)
            ours = common.spent_on(run["ours"], run["ours_flops"], level)
            # Direct tuning that never gets there has at least spent everything.
            direct = float(run["direct_flops"][-1]) if direct is None else direct
            ratios.append(0.0 if ours is None else direct / ours)
        rows.append(
            {
                "trials": count,
                "loss": level,
                "ratio": float(np.median(ratios)),
                "low": float(np.quantile(ratios, 0.1)),
                "high": float(np.quantile(ratios, 0.9)),
                "reached": float(np.mean([ratio > 0 for ratio in ratios])),
            }
        )
    return rows


def final(task: str, studies: Mapping[str, TuneConfig], case: Case, seeds: int) -> dict[str, Any]:
    """The target with the best of the proxy and with the best of the direct search, on fresh seeds."""
    found = {}
    for name in ("proxy", "direct"):
        print(f"{task}: the target with the best of {name} ...", file=sys.stderr, flush=True)
        fresh = dataclasses.replace(studies[name], seed=FRESH)
        run = mujax.transfer(fresh, width=case.target, seeds=seeds)
        found[name] = {
            "loss": run.loss,
            "standard_error": run.standard_error,
            "train_loss": [each.metrics.get("loss") for each in run.runs],
            "losses": [each.loss for each in run.runs],
            "hparams": run.hparams,
            "trial": run.trial.number,
            "tuning_flops": run.tuning_flops,
            "run_flops": run.run_flops,
        }
    return found


def measure(task: str, case: Case, trials: int, seeds: int, resamples: int, storage: pathlib.Path) -> Any:
    """All figures of one task."""
    configs = {search: config(task, case, search, trials, storage) for search in SEARCHES}
    studies = {
        search: mujax.tune(each, progress=Clock(f"{task}, {search}")) for search, each in configs.items()
    }
    ends = final(task, configs, case, seeds)
    fronts = {}
    for name, quality in (("direct", None), ("proxy", "target")):
        trials_of = studies[name].trials
        worth = None if quality is None else [trial.loss for trial in studies[quality].trials]
        fronts[name] = dataclasses.asdict(
            front([trial.loss for trial in trials_of], [trial.flops or 0.0 for trial in trials_of], worth)
        )
    rows = compare(studies, resamples)
    return {
        "task": task,
        **dataclasses.asdict(case),
        "trials": trials,
        "final": ends,
        "fronts": fronts,
        "ratios": rows,
        "missed": missed(task, ends, rows),
    }


def missed(task: str, ends: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences about the goals that were not met."""
    out = []
    ours, direct = ends["proxy"], ends["direct"]
    if ours["loss"] is None:
        out.append(f"{task}: the target diverges with the proxy's best.")
    elif direct["loss"] is not None:
        noise = np.hypot(ours["standard_error"] or 0.0, direct["standard_error"] or 0.0)
        if ours["loss"] > direct["loss"]:
            within = " (within two standard errors)" if ours["loss"] <= direct["loss"] + 2 * noise else ""
            out.append(
                f"{task}: the target ends at {ours['loss']:.4f} with the proxy's best and at "
                f"{direct['loss']:.4f} tuned directly{within}."
            )
    for row in rows:
        inverse = 1 / row["ratio"] if row["ratio"] else float("inf")
        least = 1 / row["high"] if row["high"] else float("inf")
        out += GOAL.missed_by(f"{task}, {row['trials']} trials", inverse, least)
    return out


# ---- the report ----------------------------------------------------------------------------------------


def show(rows: Sequence[Mapping[str, Any]]) -> str:
    """Two tables: the ends, and the ratios."""
    ends = []
    for row in rows:
        for name, title in (("proxy", "µTransfer"), ("direct", "direct")):
            one = row["final"][name]
            error = "-" if one["standard_error"] is None else f"{one['standard_error']:.4f}"
            loss = "diverged" if one["loss"] is None else f"{one['loss']:.4f}"
            ends.append((row["task"], title, loss, error, f"{one['tuning_flops']:.2e}"))
    ratios = [
        (
            row["task"],
            str(one["trials"]),
            f"{one['loss']:.3f}",
            f"{one['ratio']:.1f}",
            f"{one['low']:.1f}–{one['high']:.1f}",
            f"{one['reached']:.0%}",
        )
        for row in rows
        for one in row["ratios"]
    ]
    return "\n\n".join(
        [
            "Held-out loss of the target, fresh seeds:",
            common.table(("task", "tuned", "loss", "standard error", "tuning FLOPs"), ends),
            "Times fewer operations for the loss that direct tuning gets to (median, 10–90 %):",
            common.table(("task", "trials", "loss", "times fewer", "interval", "reached"), ratios),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Searches, prints the tables and writes the report, which grows with every task."""
    parser = argparse.ArgumentParser(description="µTransfer against tuning the target directly.")
    add = parser.add_argument
    add("--tasks", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    add("--trials", type=int, help="of each search (default: 32 for the MLP, 24 for the Transformer)")
    add("--steps", type=int, help="of each run (default: 300 for the MLP, 80 for the Transformer)")
    add("--seeds", type=int, help="of the final runs (default: 5)")
    add("--resamples", type=int, default=20, help="orders of the trials (default: %(default)s)")
    add("--quick", action="store_true", help="a smoke run: small widths, few steps and trials")
    add("--storage", type=pathlib.Path, default=common.OUT / "pareto.db", help="where searches are kept")
    add("--out", type=pathlib.Path, default=common.OUT / "pareto.json", help="the report")
    args = parser.parse_args(argv)
    for name in ("trials", "steps", "seeds", "resamples"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name}: expected at least 1, got {value}.")
    seeds = args.seeds or (2 if args.quick else 5)
    args.storage.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "quick": args.quick,
        "environment": common.environment(),
        "goals": {"operations": GOAL.limit},
        "rows": [],
    }
    for task in dict.fromkeys(args.tasks):
        case = (QUICK if args.quick else CASES)[task]
        case = dataclasses.replace(case, steps=args.steps or case.steps)
        trials = args.trials or case.trials
        report["rows"].append(measure(task, case, trials, seeds, args.resamples, args.storage))
        common.write(args.out, report)
    print(show(report["rows"]))
    print("\n" + common.verdict([line for row in report["rows"] for line in row["missed"]], quick=args.quick))
    print(f"\nWritten to {args.out}.")


if __name__ == "__main__":
    main()
