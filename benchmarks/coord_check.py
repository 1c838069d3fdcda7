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
- plain: one jitted step of Flax and optax a width, which trains the same models for as many seeds and steps
  and records nothing. What it takes over microsoft/mup bounds what a check in JAX can. Its seeds are all of
  the case's, and `2 seeds` those of a check that stops early.
- XLA: seconds in which XLA compiled, or programs were loaded from the cache, in all threads together.
- The figure is the median of the ratios of neighbouring runs, with the 95% interval of that median.
- memory: the peak of the whole process.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
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
PLAIN: Final = ("plain, cold", "plain, warm", "plain, warm, 2 seeds")
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
    import mujax

    imports, xla, start = time.perf_counter() - start, _seconds_of_xla(), time.perf_counter()
    batch = _batch(case)
    check = mujax.coord_check(
        functools.partial(_model, case),
        case.widths,
        optimizer="adam",
        batches=[batch],
        learning_rates=(case.learning_rate,),
        steps=case.steps,
        seeds=case.seeds,
    )
    return {
        "imports": imports,
        "check": time.perf_counter() - start,
        **_resources(xla),
        "verdict": check.verdict,
        "seeds": check.seeds,
        "taps": len(check.taps),
    }


def measure_plain(case: Case) -> dict[str, Any]:
    """The same of a loop that trains the same models in the standard parametrization and records nothing."""
    start = time.perf_counter()
    import jax
    import optax

    imports, xla, start = time.perf_counter() - start, _seconds_of_xla(), time.perf_counter()
    inputs, targets = _batch(case)
    optimizer = optax.adam(case.learning_rate)
    for width in case.widths:
        model = _model(case, width)

        @jax.jit
        def begin(key: Any, model: Any = model) -> Any:
            params = model.init(key, inputs)
            return params, optimizer.init(params)

        def loss_of(params: Any, model: Any = model) -> Any:
            logits = model.apply(params, inputs)
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        @functools.partial(jax.jit, donate_argnums=0)
        def step(state: Any, loss_of: Any = loss_of) -> Any:
            params, moments = state
            loss, grads = jax.value_and_grad(loss_of)(params)
            updates, moments = optimizer.update(grads, moments, params)
            return (optax.apply_updates(params, updates), moments), loss

        for seed in range(case.seeds):
            state = begin(jax.random.key(seed))
            for _ in range(case.steps):
                state, loss = step(state)
            float(loss)
    return {"imports": imports, "check": time.perf_counter() - start, **_resources(xla), "seeds": case.seeds}


def _model(case: Case, width: int) -> Any:
    from mujax import models

    if case.model == "mlp":
        return models.MLP(models.MLPConfig(width=width))
    return models.Transformer(
        models.TransformerConfig(d_model=width, n_layers=2, n_heads=case.heads, max_len=case.length)
    )


def _batch(case: Case) -> tuple[Any, Any]:
    import numpy as np

    # By NumPy: what JAX takes to compile a random number is no part of a check.
    draws = np.random.default_rng(0)
    if case.model == "mlp":
        inputs = draws.standard_normal((case.batch, 784), np.float32)
        return inputs, draws.integers(0, 10, case.batch, np.int32)
    inputs, targets = draws.integers(0, 256, (2, case.batch, case.length), np.int32)
    return inputs, targets


def _seconds_of_xla() -> list[float]:
    """A list that grows with each program that is compiled or loaded from now on."""
    import jax

    found: list[float] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return found


def _resources(xla: Sequence[float]) -> dict[str, Any]:
    return {
        "cpu": time.process_time(),
        "megabytes": common.resident()[1] / 1e6,
        "xla": sum(xla),
        "programs": len(xla),
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
        fewer = dataclasses.replace(case, seeds=2)
        sides: dict[str, tuple[Sequence[str], Case, Mapping[str, str]]] = {
            "cold": (ours, case, cold),
            "warm": (ours, case, warm),
            **{
                side: ([*ours[:2], "--plain", *ours[2:]], one, environment)
                for side, one, environment in zip(PLAIN, (case, case, fewer), (cold, warm, warm), strict=True)
            },
        }
        if case.seeds <= fewer.seeds:
            del sides[PLAIN[-1]]
        if torch_python is not None:
            sides[TORCH] = (theirs, case, {})
        # What fills the cache.
        for side in ("warm", "plain, warm"):
            in_own_process(*sides[side])
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        order = list(sides)
        for number in range(runs):
            print(f"{name}: round {number + 1} of {runs} ...", file=sys.stderr, flush=True)
            for side in order:
                found[side].append(in_own_process(*sides[side]))
            order = [*order[1:], order[0]]
    row: dict[str, Any] = {"case": name, **dataclasses.asdict(case), "runs": found, "ratio": {}, "missed": []}
    if torch_python is not None:
        for side in [*found][:-1]:
            row["ratio"][side] = {}
            for figure in FIGURES:
                samples = {which: [run[figure] for run in found[which]] for which in (side, TORCH)}
                ratio = common.paired(samples, side, TORCH)
                row["ratio"][side][figure] = dataclasses.asdict(ratio)
                goal = {"process": GOALS.get((name, side)), "megabytes": MEMORY}.get(figure)
                if goal is not None and side in SIDES:
                    row["missed"] += goal.missed_by(f"{name}, {side}, {figure}", ratio.median, ratio.low)
    return row


# ---- the report ------------------------------------------------------------------------------------


def _with_interval(ratio: Mapping[str, float] | None) -> str:
    return "-" if ratio is None else f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def show(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table."""
    units = {"megabytes": "MB"}
    named = [units.get(figure, f"{figure} s") for figure in FIGURES]
    header = ("case", "side", "seeds", *named, "XLA s", *(f"{name} ratio" for name in named))
    lines = []
    for row in rows:
        for side, runs in row["runs"].items():
            medians = {figure: statistics.median([run[figure] for run in runs]) for figure in FIGURES}
            ratios = row["ratio"].get(side, {})
            lines.append(
                [
                    row["case"],
                    side if side == TORCH or side in PLAIN else f"mujax, {side}",
                    f"{runs[0].get('seeds', row['seeds'])}",
                    *(
                        f"{value:.0f}" if figure == "megabytes" else f"{value:.2f}"
                        for figure, value in medians.items()
                    ),
                    f"{statistics.median([run['xla'] for run in runs]):.2f}" if "xla" in runs[0] else "-",
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
    add("--plain", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure is not None:
        print(json.dumps((measure_plain if args.plain else measure)(Case(**args.measure))))
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
