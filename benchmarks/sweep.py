"""Trials per second of a sweep over 16 learning rates and 4 seeds, against loops over one trial at a time.

    python benchmarks/sweep.py [--torch-python /path/to/python] [--cases mlp-64 mlp-256 transformer-64]
        [--rounds 3] [--seeds 4] [--quick] [--out FILE]

Every side trains the same models in µP with Adam on ready batches of random data, which all trials share:

- `mujax sweep`: `mujax.sweep` with a study in memory, run as it chooses to.
- `jitted loop`: the same trials in a Python loop over one jitted step of `mup.apply` and `mujax.mup_adam`.
- `map, 1 device` and `map, 8 devices`: `mujax.sweep` with one mapped program, on one device and split over
  eight devices forced on this machine's cores.
- `microsoft/mup` and `microsoft/mup, torch.compile`: PyTorch's loop; `--torch-python` is the interpreter of
  an environment with the extra `parity` and pandas. See `sweep_torch.py` for its settings.

Each side runs in a process of its own, in turn, `--rounds` times. Trials per second leave out compilation,
which is given beside them, and what comes before a first trial (imports, reading or building the model): it
is paid once for any number of trials. The ratios are medians over rounds of neighbouring runs. A perfect
split takes as long as one device, since the cores are the same: its scaling is the time of one device over
that of eight. It can be above 100 %, where one device leaves cores idle.
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
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import common


@dataclasses.dataclass(frozen=True)
class Case:
    """The models and runs.

    Attributes:
        model: `"mlp"`, 784-(w-w-w)-10, or `"transformer"`, of two blocks on bytes.
        width: of the model, and of µP's base.
        log2_lrs: learning rates.
        seeds: runs of each.
        steps: of a run.
        batch: examples a step.
        length: tokens of an example.
        head_dim: size of an attention head.
    """

    model: str
    width: int
    log2_lrs: tuple[float, ...]
    seeds: int
    steps: int
    batch: int
    length: int = 64
    head_dim: int = 16

    @property
    def trials(self) -> int:
        """Runs in all."""
        return len(self.log2_lrs) * self.seeds


_RATES: Final = tuple(-14 + 0.5 * place for place in range(16))
CASES: Final[Mapping[str, Case]] = {
    "mlp-64": Case("mlp", 64, _RATES, seeds=4, steps=80, batch=64),
    "mlp-256": Case("mlp", 256, _RATES, seeds=4, steps=80, batch=64),
    "transformer-64": Case("transformer", 64, _RATES, seeds=4, steps=80, batch=8),
}
QUICK: Final[Mapping[str, Case]] = {
    name: dataclasses.replace(case, width=16, log2_lrs=(-9, -8), seeds=2, steps=3)
    for name, case in CASES.items()
}

SWEEP, LOOP, ONE, SPLIT = "mujax sweep", "jitted loop", "map, 1 device", "map, 8 devices"
TORCH, COMPILED = "microsoft/mup", "microsoft/mup, torch.compile"

GOALS: Final = {
    LOOP: common.Goal(1.0, "not slower than the jitted loop"),
    TORCH: common.Goal(1 / 3, "3 times faster"),
    COMPILED: common.Goal(1 / 3, "3 times faster"),
}
SPLIT_GOAL: Final = common.Goal(1 / 0.9, "at least 90 % of perfect scaling, 1.11 times one device's time")

# ---- our sides, each in a process ----------------------------------------------------------------------


def _batches(case: Case) -> list[Any]:
    import jax

    keys = jax.random.split(jax.random.key(0), case.steps)
    if case.model == "mlp":
        draw = lambda key: (  # noqa: E731
            jax.random.normal(key, (case.batch, 784)),
            jax.random.randint(key, (case.batch,), 0, 10),
        )
    else:
        shape = (case.batch, case.length)
        draw = lambda key: tuple(jax.random.randint(one, shape, 0, 256) for one in jax.random.split(key))  # noqa: E731
    return [draw(key) for key in keys]


def _factory(case: Case) -> Any:
    from mujax import models

    if case.model == "mlp":
        return lambda width: models.MLP(models.MLPConfig(width=width, depth=3))
    return lambda width: models.Transformer(
        models.TransformerConfig(d_model=width, n_layers=2, head_dim=case.head_dim, max_len=case.length)
    )


def run_sweep(case: Case, mode: Any) -> dict[str, Any]:
    """One sweep; `mode` None leaves the choice to it."""
    import mujax

    run = mujax.training_run(_factory(case), _batches(case), steps=case.steps, width=case.width)
    space = {"learning_rate": [2.0**rate for rate in case.log2_lrs]}
    # Imports, the reading of the model and the sampler are paid once, as on the other sides.
    mujax.sweep(run, {"learning_rate": space["learning_rate"][:1]}, trials=1, sampler="grid", mode="loop")
    found = mujax.sweep(
        run, space, trials=len(case.log2_lrs), seeds=case.seeds, sampler="grid", mode=mode, rungs=10
    )
    finite = [trial.loss for trial in found.trials if trial.loss is not None]
    return {
        "seconds": found.seconds - found.compile_seconds,
        "compile": found.compile_seconds,
        "loss": statistics.fmean(finite),
        "modes": found.modes,
    }


def run_loop(case: Case) -> dict[str, Any]:
    """The loop that one would write: one jitted step, trial by trial."""
    import jax
    import jax.numpy as jnp

    import mujax
    from mujax.train import default_loss, init_state, train_step

    batches, factory = _batches(case), _factory(case)
    inputs = batches[0][0]
    mup = mujax.mup_init(factory(case.width), factory(case.width), inputs, delta=factory(2 * case.width))

    def objective(params: Any, state: Any, batch: Any, _: Any) -> Any:
        return default_loss(mup.apply({"params": params}, batch[0]), batch[1]), (state, {})

    @jax.jit
    def start(rate: Any, seed: Any) -> Any:
        return init_state(mup.init(jax.random.key(seed), inputs)["params"], mujax.mup_adam(rate, mup.spec))

    def step(rate: Any, state: Any, batch: Any) -> Any:
        return train_step(objective, mujax.mup_adam(rate, mup.spec), donate=False)(state, batch)

    step = jax.jit(step, donate_argnums=1)
    started = time.perf_counter()
    jax.block_until_ready(step(jnp.float32(0.0), start(jnp.float32(0.0), 0), batches[0]))
    compiling, started = time.perf_counter() - started, time.perf_counter()
    ends = []
    for exponent in case.log2_lrs:
        rate = jnp.float32(2.0**exponent)
        for seed in range(case.seeds):
            state = start(rate, seed)
            losses = []
            for batch in batches:
                state, metrics = step(rate, state, batch)
                losses.append(metrics["loss"])
            ends.append(float(losses[-1]))
    return {"seconds": time.perf_counter() - started, "compile": compiling, "loss": statistics.fmean(ends)}


def measure(side: str, case: Case) -> dict[str, Any]:
    """The measurements of one of our processes."""
    if side == LOOP:
        return run_loop(case)
    return run_sweep(case, "map" if side in (ONE, SPLIT) else None)


# ---- all sides -----------------------------------------------------------------------------------------


def in_own_process(side: str, case: Case, torch_python: str | None) -> dict[str, Any]:
    """Seconds of all trials, and of compiling, on one side."""
    environment = dict(os.environ)
    if side in (TORCH, COMPILED):
        assert torch_python is not None
        asked = {
            **dataclasses.asdict(case),
            "base_width": case.width,
            "rounds": 1,
            "compile": side == COMPILED,
        }
        command = [torch_python, str(pathlib.Path(__file__).with_name("sweep_torch.py")), json.dumps(asked)]
    else:
        command = [sys.executable, __file__, "--measure", side, json.dumps(dataclasses.asdict(case))]
        if side == SPLIT:
            flags = environment.get("XLA_FLAGS", "")
            environment["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    if side in (TORCH, COMPILED):
        seconds = statistics.median(found["seconds"])
        return {
            **found,
            "seconds": seconds,
            "compile": max(found["first_seconds"], 0.0),
            "loss": found["final_loss"],
        }
    return found


def compare(name: str, case: Case, rounds: int, torch_python: str | None) -> dict[str, Any]:
    """All figures of one case."""
    sides = [SWEEP, LOOP, ONE, SPLIT, *((TORCH, COMPILED) if torch_python else ())]
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for number in range(rounds):
        for side in sides:
            print(f"{name}: round {number + 1} of {rounds}, {side} ...", file=sys.stderr, flush=True)
            found[side].append(in_own_process(side, case, torch_python))
    seconds = {side: [run["seconds"] for run in runs] for side, runs in found.items()}
    ratios = {
        side: dataclasses.asdict(common.paired(seconds, SWEEP, side)) for side in GOALS if side in seconds
    }
    ratios[SPLIT] = dataclasses.asdict(common.paired(seconds, SPLIT, ONE))
    missed = [
        line
        for side, goal in (*GOALS.items(), (SPLIT, SPLIT_GOAL))
        if side in ratios
        for line in goal.missed_by(f"{name} against {side}", ratios[side]["median"], ratios[side]["low"])
    ]
    return {
        "case": name,
        **dataclasses.asdict(case),
        "trials": case.trials,
        "runs": found,
        "ratio": ratios,
        "scaling": 1 / ratios[SPLIT]["median"],
        "missed": missed,
    }


def show(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table."""
    header = (
        "case",
        "side",
        "trials/s",
        "compiling s",
        "mode",
        "time, sweep over side",
        "of perfect scaling",
    )
    lines = []
    for row in rows:
        for side, runs in row["runs"].items():
            per_second = row["trials"] / statistics.median([run["seconds"] for run in runs])
            ratio = row["ratio"].get(side)
            shown = (
                "-" if ratio is None else f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"
            )
            if side == SPLIT:
                shown = "-"
            lines.append(
                (
                    row["case"],
                    side,
                    f"{per_second:.2f}",
                    f"{statistics.median([run['compile'] for run in runs]):.1f}",
                    "+".join(runs[-1].get("modes", {})) or "-",
                    shown,
                    f"{row['scaling']:.0%}" if side == SPLIT else "-",
                )
            )
    return common.table(header, lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table and writes the report, which grows with every row."""
    parser = argparse.ArgumentParser(description="Trials per second of a sweep.")
    add = parser.add_argument
    add("--torch-python", help="the interpreter of an environment with torch, mup and pandas")
    add("--cases", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    add("--rounds", type=int, default=3, help="of each side (default: %(default)s)")
    add("--seeds", type=int, help="of each learning rate (default: 4)")
    add("--quick", action="store_true", help="a smoke run: small widths, one round")
    add("--out", type=pathlib.Path, default=common.OUT / "sweep.json", help="the report")
    add("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure is not None:
        side, case = args.measure
        print(json.dumps(measure(side, Case(**json.loads(case)))))
        return
    for option, value in (("rounds", args.rounds), ("seeds", args.seeds)):
        if value is not None and value < 1:
            parser.error(f"--{option}: expected at least 1, got {value}.")
    report: dict[str, Any] = {
        "quick": args.quick,
        "environment": common.environment(),
        "goals": {side: goal.limit for side, goal in (*GOALS.items(), (SPLIT, SPLIT_GOAL))},
        "rows": [],
    }
    for name in dict.fromkeys(args.cases):
        case, rounds = (QUICK[name], 1) if args.quick else (CASES[name], args.rounds)
        case = dataclasses.replace(case, seeds=args.seeds or case.seeds)
        report["rows"].append(compare(name, case, rounds, args.torch_python))
        common.write(args.out, report)
    print("Trials per second, without compiling; the ratio is of times, below 1 where the sweep is faster.\n")
    print(show(report["rows"]))
    if args.torch_python is None:
        print("\nThe side of microsoft/mup is left out: --torch-python gives its interpreter.")
    missed = [line for row in report["rows"] for line in row["missed"]]
    print("\n" + common.verdict(missed, quick=args.quick))
    print(f"\nWritten to {args.out}.")


if __name__ == "__main__":
    main()
