"""Checks the claims of µTransfer on the default sweep over widths, for several seeds.

    python benchmarks/transfer_default.py [--quick] [--tasks NAME ...] [--seeds 5] [--out FILE]

The sweep of a task's defaults is run with the seeds 0, 10, 20, ...; `--seeds` is how many of them. Goals are
the claims of the theory:

- In µP the best learning rate stays: its drift over the widths is at most 0.75 powers of two. In the
  standard parametrization it moves by at least 2.
- In µP wider is better at the transferred rate.
- At the widest model, µP with the rate that is best at the proxy ends no worse than the standard
  parametrization with the best rate on the grid. Losses are training losses, the mean over the run.

Beside them CPU and wall time of the sweep, with compiling. Several tasks take turns, so that their times are
paired. All runs are kept in a folder beside the report: the same command resumes. A sweep that was
interrupted has no times.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import common

import mujax
from mujax.check import Progress
from mujax.tune import TASKS, Report, sweep_widths

DRIFT: Final = common.Goal(0.75, "at most 0.75")
GAP: Final = common.Goal(0.0, "at most 0")
SP_DRIFT: Final = 2.0
SEED_STEP: Final = 10
"""Distance between the first seeds of two sweeps, larger than any default number of seeds."""


def config_of(task: str, seed: int, quick: bool, runs: pathlib.Path) -> mujax.TransferConfig:
    """The defaults of a task from one seed on."""
    out, steps = runs / f"{task}-{seed}", 3 if quick else None
    return mujax.TransferConfig.for_task(task, quick=quick, seed=seed, out=out, steps=steps)


def summary(report: Report) -> dict[str, Any]:
    """The claims in numbers; None where a run that counts diverged."""
    widest, rate = report.config.widths[-1], report.transferred_log2_lr["mup"]
    transferred = None if rate is None else report.loss["mup"][widest][report.config.log2_lrs.index(rate)]
    tuned = min((loss for loss in report.loss["sp"][widest] if loss is not None), default=None)
    return {
        "drift_log2": report.drift_log2,
        "wider_is_better": report.wider_is_better,
        "transferred_log2_lr": report.transferred_log2_lr,
        "transferred": transferred,
        "sp_tuned": tuned,
        "report": json.loads(report.to_json()),
    }


def measure(config: mujax.TransferConfig, before: Mapping[str, Any] | None) -> dict[str, Any]:
    """One sweep: its claims and its times.

    Args:
        config: of the sweep.
        before: this sweep's row in an earlier report.
    """
    starts: list[int] = []

    def show(now: Progress) -> None:
        starts.append(now.done)
        print(
            f"{config.task}, seed {config.seed}: {now.work_done:4.0%} done",
            file=sys.stderr,
            flush=True,
        )

    wall, cpu = time.perf_counter(), time.process_time()
    found = summary(sweep_widths(config, progress=show))
    times = {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}
    if not starts or starts[0]:
        # Finished or started earlier.
        same = before is not None and before["report"] == found["report"]
        times = {name: before[name] if before is not None and same else None for name in times}
    row = {"task": config.task, "seed": config.seed, **found, **times}
    return {**row, "missed": missed(row)}


def missed(row: Mapping[str, Any]) -> list[str]:
    """A sentence for each claim that the sweep does not show."""
    name = f"{row['task']}, seed {row['seed']}"
    mup, sp = row["drift_log2"]["mup"], row["drift_log2"]["sp"]
    if None in (mup, sp, row["transferred"], row["sp_tuned"]):
        return [f"{name}: a width has no best learning rate, or the transferred one diverges at the widest."]
    lines = DRIFT.missed_by(f"{name}: drift in µP", mup)
    if sp < SP_DRIFT:
        lines.append(
            f"{name}: drift in the standard parametrization: {sp:.5g}, the goal is at least {SP_DRIFT:g}."
        )
    if not row["wider_is_better"]["mup"]:
        lines.append(f"{name}: wider is not always better in µP.")
    gap = row["transferred"] - row["sp_tuned"]
    return lines + GAP.missed_by(f"{name}: loss of µP minus that of SP tuned at the widest", gap)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def show(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table."""
    header = (
        "task",
        "seed",
        "drift µP",
        "SP",
        "wider is better",
        "µP transferred",
        "SP tuned",
        "CPU s",
        "wall s",
    )
    lines = [
        (
            row["task"],
            str(row["seed"]),
            _number(row["drift_log2"]["mup"], 2),
            _number(row["drift_log2"]["sp"], 2),
            "yes" if row["wider_is_better"]["mup"] else "no",
            _number(row["transferred"], 3),
            _number(row["sp_tuned"], 3),
            _number(row["cpu_seconds"], 0),
            _number(row["wall_seconds"], 0),
        )
        for row in rows
    ]
    return common.table(header, lines)


def _earlier(path: pathlib.Path) -> dict[tuple[str, int], Mapping[str, Any]]:
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return {(row["task"], row["seed"]): row for row in rows}


def main(argv: Sequence[str] | None = None) -> None:
    """Sweeps, prints the table and writes the report, which grows with every sweep."""
    parser = argparse.ArgumentParser(
        description="What the default sweep over widths shows, for several seeds."
    )
    add = parser.add_argument
    standard = mujax.TransferConfig.for_task().task
    add("--tasks", nargs="+", choices=TASKS, default=[standard], help=f"default: {standard}")
    add("--seeds", type=int, help="how many sweeps of each task (default: 5)")
    add("--quick", action="store_true", help="a smoke run: two widths, few rates and steps, one seed")
    add("--out", type=pathlib.Path, default=common.OUT / "transfer_default.json", help="the report")
    args = parser.parse_args(argv)
    seeds = (1 if args.quick else 5) if args.seeds is None else args.seeds
    if seeds < 1:
        parser.error(f"--seeds: expected at least 1, got {seeds}.")

    before, runs = _earlier(args.out), args.out.with_suffix(".runs")
    report: dict[str, Any] = {
        "quick": args.quick,
        "environment": common.environment(),
        "goals": {"drift_log2": DRIFT.limit, "sp_drift_log2": SP_DRIFT, "gap": GAP.limit},
        "rows": [],
    }
    # Task by task for each seed: where there are two, their times are paired.
    for seed in range(0, SEED_STEP * seeds, SEED_STEP):
        for task in dict.fromkeys(args.tasks):
            row = measure(config_of(task, seed, args.quick, runs), before.get((task, seed)))
            report["rows"].append(row)
            common.write(args.out, report)
    print(show(report["rows"]))
    print("\n" + common.verdict([line for row in report["rows"] for line in row["missed"]], quick=args.quick))
    print(f"\nWritten to {args.out}.")


if __name__ == "__main__":
    main()
