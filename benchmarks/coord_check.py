"""The cost of a coordinate check, against `mup.coord_check` of microsoft/mup on the same models.

    python benchmarks/coord_check.py [--torch-python /path/to/python] [--cases mlp transformer] [--runs 5]

Each check runs in a process of its own, the sides in turn; `--torch-python` is the interpreter of an
environment with the extra `parity` and pandas. Both train the same widths, seeds and steps with Adam on one
batch; mujax stops after fewer seeds, two at the least, where every interval is well within what is allowed
(`seeds` in the report). mup.coord_check records the size of every module's output at every step; mujax
records every product, lookup, gain, norm and output with its change and what that comes from, also after the
last step, and fits, judges and looks for the broken rule.

- cold: nothing compiled before. warm: JAX's persistent compilation cache has been filled by a run before.
- process: the whole time of the process; check: the same without starting Python and importing; cpu:
  processor time of the process, all threads together, which other work on the machine disturbs less.
- The figure is the median of the ratios of neighbouring runs, with the 95% interval of that median.
- memory: the peak of the whole process.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import common


@dataclasses.dataclass(frozen=True)
class Case:
    """A coordinate check.

    Attributes:
        model: `"mlp"`, 784-(w-w)-10, or `"transformer"`, of two layers.
        widths: ascending; the first is the base.
        seeds: runs of each width.
        steps: optimizer steps.
        batch: examples.
        length: tokens of an example.
        heads: attention heads.
        learning_rate: of Adam.
    """

    model: str
    widths: tuple[int, ...]
    seeds: int
    steps: int
    batch: int
    length: int = 64
    heads: int = 4
    learning_rate: float = 2.0**-7


CASES: Final[Mapping[str, Case]] = {
    "mlp": Case("mlp", widths=(128, 256, 512, 1024, 2048), seeds=5, steps=3, batch=64),
    "transformer": Case("transformer", widths=(64, 128, 256, 512), seeds=5, steps=10, batch=8),
}
QUICK: Final[Mapping[str, Case]] = {
    "mlp": Case("mlp", widths=(16, 32), seeds=2, steps=1, batch=4),
    "transformer": Case("transformer", widths=(16, 32), seeds=1, steps=1, batch=2, length=8),
}

TORCH: Final = "microsoft/mup"
SIDES: Final = ("cold", "warm")
FIGURES: Final = ("process", "check", "cpu", "megabytes")

GOALS: Final[Mapping[tuple[str, str], common.Goal]] = {
    (case, side): common.Goal(limit, text)
    for case in CASES
    for side, limit, text in (("cold", 1.0, "not slower"), ("warm", 0.5, "twice as fast"))
}
MEMORY: Final = common.Goal(1.2, "at most 20 % more")

# ---- one check -------------------------------------------------------------------------------------


def measure(case: Case) -> dict[str, Any]:
    """Seconds of one check, the first in this process, and its peak memory."""
    start = time.perf_counter()
    import numpy as np

    import mujax
    from mujax import models

    imports, start = time.perf_counter() - start, time.perf_counter()

    def mlp(width: int) -> Any:
        return models.MLP(models.MLPConfig(width=width))

    def transformer(width: int) -> Any:
        return models.Transformer(
            models.TransformerConfig(d_model=width, n_layers=2, n_heads=case.heads, max_len=case.length)
        )

    # By NumPy: what JAX takes to compile a random number is no part of a check.
    draws = np.random.default_rng(0)
    if case.model == "mlp":
        factory = mlp
        inputs = draws.standard_normal((case.batch, 784), np.float32)
        targets = draws.integers(0, 10, case.batch, np.int32)
    else:
        factory = transformer
        inputs, targets = draws.integers(0, 256, (2, case.batch, case.length), np.int32)
    check = mujax.coord_check(
        factory,
        case.widths,
        optimizer="adam",
        batches=[(inputs, targets)],
        learning_rates=(case.learning_rate,),
        steps=case.steps,
        seeds=case.seeds,
    )
    seconds = time.perf_counter() - start
    return {
        "imports": imports,
        "check": seconds,
        "cpu": time.process_time(),
        "megabytes": common.resident()[1] / 1e6,
        "verdict": check.verdict,
        "seeds": check.seeds,
        "taps": len(check.taps),
    }


def in_own_process(
    command: Sequence[str], case: Case, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The measurements of a fresh process, and its whole time."""
    start = time.perf_counter()
    done = subprocess.run(
        [*command, json.dumps(dataclasses.asdict(case))],
        check=True,
        stdout=subprocess.PIPE,
        env={**os.environ, **(environment or {})},
    )
    process = time.perf_counter() - start
    return {**json.loads(done.stdout), "process": process}


def compare(name: str, case: Case, runs: int, torch_python: str | None) -> dict[str, Any]:
    """All figures of one case."""
    ours = [sys.executable, __file__, "--measure"]
    theirs = [torch_python or "", str(pathlib.Path(__file__).with_name("coord_check_torch.py"))]
    with tempfile.TemporaryDirectory() as cache:
        warm = {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        cold = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
        sides: dict[str, tuple[Sequence[str], Mapping[str, str]]] = {
            "cold": (ours, cold),
            "warm": (ours, warm),
        }
        if torch_python is not None:
            sides[TORCH] = (theirs, {})
        in_own_process(ours, case, warm)
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        order = list(sides)
        for number in range(runs):
            print(f"{name}: round {number + 1} of {runs} ...", file=sys.stderr, flush=True)
            for side in order:
                command, environment = sides[side]
                found[side].append(in_own_process(command, case, environment))
            order = [*order[1:], order[0]]
    row: dict[str, Any] = {"case": name, **dataclasses.asdict(case), "runs": found, "ratio": {}, "missed": []}
    if torch_python is not None:
        for side in SIDES:
            row["ratio"][side] = {}
            for figure in FIGURES:
                samples = {which: [run[figure] for run in found[which]] for which in (side, TORCH)}
                ratio = common.paired(samples, side, TORCH)
                row["ratio"][side][figure] = dataclasses.asdict(ratio)
                goal = {"process": GOALS[name, side], "megabytes": MEMORY}.get(figure)
                if goal is not None:
                    row["missed"] += goal.missed_by(f"{name}, {side}, {figure}", ratio.median, ratio.low)
    return row


# ---- the report ------------------------------------------------------------------------------------


def _with_interval(ratio: Mapping[str, float] | None) -> str:
    return "-" if ratio is None else f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def show(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table."""
    units = {"megabytes": "MB"}
    named = [units.get(figure, f"{figure} s") for figure in FIGURES]
    header = ("case", "side", *named, *(f"{name} ratio" for name in named))
    lines = []
    for row in rows:
        for side, runs in row["runs"].items():
            medians = {figure: statistics.median([run[figure] for run in runs]) for figure in FIGURES}
            ratios = row["ratio"].get(side, {})
            lines.append(
                [
                    row["case"],
                    side if side == TORCH else f"mujax, {side}",
                    *(
                        f"{value:.0f}" if figure == "megabytes" else f"{value:.2f}"
                        for figure, value in medians.items()
                    ),
                    *(_with_interval(ratios.get(figure)) for figure in FIGURES),
                ]
            )
    return common.table(header, lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table and writes the report, which grows with every row."""
    parser = argparse.ArgumentParser(description="The cost of a coordinate check, against mup.coord_check.")
    add = parser.add_argument
    add("--torch-python", help="the interpreter of an environment with torch, mup and pandas")
    add("--cases", nargs="+", choices=CASES, default=list(CASES), help="which models (default: all)")
    add("--runs", type=int, default=5, help="rounds of each case (default: %(default)s)")
    add("--quick", action="store_true", help="a smoke run: small widths, one round")
    add("--out", type=pathlib.Path, default=common.OUT / "coord_check.json", help="the report")
    add("--measure", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure is not None:
        print(json.dumps(measure(Case(**args.measure))))
        return
    if args.runs < 1:
        parser.error(f"--runs: expected at least 1, got {args.runs}.")

    report: dict[str, Any] = {
        "quick": args.quick,
        "environment": common.environment(),
        "goals": {" ".join(key): goal.limit for key, goal in GOALS.items()},
        "rows": [],
    }
    for name in dict.fromkeys(args.cases):
        case, runs = (QUICK[name], 1) if args.quick else (CASES[name], args.runs)
        report["rows"].append(compare(name, case, runs, args.torch_python))
        common.write(args.out, report)
    print("Seconds and peak memory of a coordinate check; ratios to microsoft/mup.\n")
    print(show(report["rows"]))
    if args.torch_python is None:
        print("\nThe side of microsoft/mup is left out: --torch-python gives its interpreter.")
        print("A smoke run: goals are not judged." if args.quick else "Goals are not judged without it.")
    else:
        missed = [line for row in report["rows"] for line in row["missed"]]
        print("\n" + common.verdict(missed, quick=args.quick))
    print(f"\nWritten to {args.out}.")


if __name__ == "__main__":
    main()
