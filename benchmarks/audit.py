"""How long `mujax.audit(measure=True)` takes, and whether it is right.

    python benchmarks/audit.py [--quick] [--runs 3] [--out FILE]

A 2-layer Transformer and an MLP at widths 64, 128 and 256, read right and with a hidden kernel that is read
as input. Each run has a process of its own, without JAX's compilation cache, as a first run has; of several
the median counts:

- seconds: wall time of the audit, without the imports;
- CPU: processor time of the same, the least of all runs;
- disagreements: how many findings were measured: 0 where the model is read right, else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, Final

import common

BASE: Final = 64
WIDTHS: Final = (128, 256)
CASES: Final = {"mlp": "hidden_1/kernel", "transformer": "block_0/ff/up/kernel"}
"""Built-in models, and the kernel that is misread."""
GOAL: Final = common.Goal(30.0, "at most 30 s for a Transformer of 2 layers on 2 cores")


def measure(case: str, misread: bool, quick: bool) -> dict[str, Any]:
    """One audit in this process."""
    import mujax
    from mujax import models

    _, inputs = models.BUILD[case](BASE)
    widths, base = ((64, 128), 16) if quick else (WIDTHS, BASE)
    roles = {CASES[case]: "input"} if misread else None
    wall, cpu = time.perf_counter(), time.process_time()
    found = mujax.audit(
        lambda width: models.BUILD[case](width)[0], base, *inputs, widths=widths, measure=True, roles=roles
    )
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"seconds": wall, "cpu_seconds": cpu, "disagreements": len(found)}


def in_own_process(case: str, misread: bool, quick: bool) -> dict[str, Any]:
    """`measure` in a fresh process that compiles everything."""
    command = [sys.executable, __file__, "--measure", json.dumps([case, misread, quick])]
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    return json.loads(done.stdout)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table and writes the report."""
    parser = argparse.ArgumentParser(description="Time of a measured audit.")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="models")
    parser.add_argument("--runs", type=int, default=3, help="processes of each (default: %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run: two small widths, one process each"
    )
    parser.add_argument("--out", type=pathlib.Path, default=common.OUT / "audit.json", help="the report")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure is not None:
        print(json.dumps(measure(*args.measure)))
        return
    if args.runs < 1:
        parser.error(f"--runs: expected at least 1, got {args.runs}.")

    rows = []
    for case in args.cases:
        for misread in (False, True):
            print(f"{case}, {'misread' if misread else 'right'} ...", file=sys.stderr, flush=True)
            runs = [in_own_process(case, misread, args.quick) for _ in range(1 if args.quick else args.runs)]
            rows.append(
                {
                    "case": case,
                    "misread": misread,
                    "seconds": statistics.median(run["seconds"] for run in runs),
                    "cpu_seconds": min(run["cpu_seconds"] for run in runs),
                    "disagreements": sorted({run["disagreements"] for run in runs}),
                }
            )
    missed = [line for row in rows for line in GOAL.missed_by(row["case"], row["seconds"])]
    missed += [
        f"{row['case']}: {row['disagreements']} disagreements, the goal is {[int(row['misread'])]}."
        for row in rows
        if row["disagreements"] != [int(row["misread"])]
    ]
    report = {"quick": args.quick, "environment": common.environment(), "rows": rows, "missed": missed}
    common.write(args.out, report)
    print("mujax.audit(measure=True), in a process of its own, nothing compiled before.\n")
    header = ("case", "reading", "seconds", "CPU s", "disagreements")
    print(
        common.table(
            header,
            [
                (
                    row["case"],
                    "misread" if row["misread"] else "right",
                    f"{row['seconds']:.1f}",
                    f"{row['cpu_seconds']:.1f}",
                    ", ".join(map(str, row["disagreements"])),
                )
                for row in rows
            ],
        )
    )
    print("\n" + common.verdict(missed, quick=args.quick))
    print(f"\nWritten to {args.out}.")


if __name__ == "__main__":
    main()
