"""How long `mup_init` takes, and how much memory, on models too large to hold.

    python benchmarks/spec_scale.py [--quick] [--runs 3] [--out FILE]

Decoder Transformers of 1, 7 and 70 billion parameters, their layers unrolled, so that every layer is traced
and read; the largest as one scan over rematerialised layers, too; then with fewer layers, to see that the
cost is linear in them. Everything is abstract: no parameter is ever allocated. Each measurement has a process
of its own; of several the median counts:

- seconds: wall time of `mup_init`, the start of JAX's backend included;
- CPU: processor time of the same, the least of all runs: other work on the machine disturbs it less;
- JAX alone: wall time of tracing the models as Flax has them: initialisation and one call, at both widths.
  Whatever reads a model off its traces takes that long at the least;
- memory: peak resident set of the process minus the resident set after the imports;
- linearity: CPU seconds that each layer costs from the second largest number of layers to the largest, over
  the same from the smallest to the second largest. At 10, 20, 40 and 80 layers it is 1 for a cost linear in
  layers and 2.4 for a quadratic one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import common


@dataclasses.dataclass(frozen=True)
class Size:
    """A decoder Transformer with heads of size 128, and the base it is compared with.

    Attributes:
        n_layers: blocks.
        d_model: width of the target.
        base_d_model: width of the base.
        ff_ratio: feed-forward width over `d_model`.
        vocab_size: tokens; embedding and readout are separate.
        queries_per_key: query heads to one key and value head.
        scanned: one scan over rematerialised blocks; else the blocks are laid out one by one.
    """

    n_layers: int
    d_model: int
    base_d_model: int
    ff_ratio: int
    vocab_size: int
    queries_per_key: int = 1
    scanned: bool = False

    def model(self, d_model: int) -> Any:
        """The Flax module at a width."""
        from mujax import models

        head_dim = 128
        return models.Transformer(
            models.TransformerConfig(
                d_model=d_model,
                n_layers=self.n_layers,
                head_dim=head_dim,
                n_kv_heads=d_model // head_dim // self.queries_per_key,
                ff_ratio=self.ff_ratio,
                vocab_size=self.vocab_size,
                max_len=2048,
                scan_layers=self.scanned,
                remat=self.scanned,
            )
        )


_LARGEST: Final = Size(
    n_layers=80, d_model=8192, base_d_model=2048, ff_ratio=5, vocab_size=256_000, queries_per_key=8
)
SCANNED: Final = "70e9 scanned"
SIZES: Final[Mapping[str, Size]] = {
    "1e9": Size(n_layers=16, d_model=2048, base_d_model=512, ff_ratio=4, vocab_size=50_304),
    "7e9": Size(n_layers=32, d_model=4096, base_d_model=512, ff_ratio=4, vocab_size=64_000),
    SCANNED: dataclasses.replace(_LARGEST, scanned=True),
    "70e9": _LARGEST,
}
LAYERS: Final = (10, 20, 40, 80)
"""Of the largest size, to measure linearity with."""

GOALS: Final[Mapping[str, common.Goal]] = {
    "seconds": common.Goal(10.0, "10 s of wall time"),
    "megabytes": common.Goal(150.0, "150 MB above what the imports take"),
    "linearity": common.Goal(1.5, "1.5 times as much for one of the last layers as for one of the first"),
}
SCANNED_GOALS: Final[Mapping[str, common.Goal]] = {
    "seconds": common.Goal(5.0, "5 s of wall time"),
    "megabytes": GOALS["megabytes"],
}

# ---- in a process of its own -----------------------------------------------------------------------


def traced(size: Size) -> dict[str, float]:
    """Seconds of the traces that `mup_init` needs, the first in this process."""
    import jax
    import jax.numpy as jnp

    models = [size.model(size.d_model), size.model(size.base_d_model)]
    tokens = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    start = time.perf_counter()
    for model in models:
        variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
        jax.make_jaxpr(model.apply)(variables, tokens)
    return {"traced_seconds": time.perf_counter() - start}


def measure(size: Size) -> dict[str, float]:
    """Figures of one `mup_init`, the first in this process."""
    import jax
    import jax.numpy as jnp

    import mujax

    target, base = size.model(size.d_model), size.model(size.base_d_model)
    tokens = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    before, _ = common.resident()
    wall, cpu = time.perf_counter(), time.process_time()
    mup = mujax.mup_init(target, base, tokens)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    _, peak = common.resident()
    return {
        "parameters": mup.spec.size(),
        "leaves": len(mup.spec),
        "seconds": wall,
        "cpu_seconds": cpu,
        "megabytes": (peak - before) / 1e6,
        "import_megabytes": before / 1e6,
    }


def in_own_process(size: Size) -> dict[str, float]:
    """`measure` and `traced`, each in a fresh process."""
    figures: dict[str, float] = {}
    for what in ("--measure", "--trace"):
        command = [sys.executable, __file__, what, json.dumps(dataclasses.asdict(size))]
        figures |= json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return figures


def summary(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Medians, and the least processor time: other work on the machine only ever adds to that."""
    summarise = {"cpu_seconds": min}
    return {name: summarise.get(name, statistics.median)([run[name] for run in runs]) for name in runs[0]}


# ---- the report ------------------------------------------------------------------------------------


def linearity(rows: Sequence[Mapping[str, Any]]) -> float:
    """Cost of one of the last layers over the cost of one of the first."""
    few, *_, many, most = sorted(rows, key=lambda row: row["layers"])

    def each(less: Mapping[str, Any], more: Mapping[str, Any]) -> float:
        return (more["cpu_seconds"] - less["cpu_seconds"]) / (more["layers"] - less["layers"])

    return each(many, most) / each(few, many)


def show(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table."""
    header = ("size", "layers", "d_model", "parameters", "leaves", "seconds", "JAX alone", "CPU s", "MB")
    return common.table(
        header,
        [
            (
                row["size"],
                str(row["layers"]),
                str(row["d_model"]),
                f"{row['parameters']:,.0f}",
                f"{row['leaves']:.0f}",
                f"{row['seconds']:.2f}",
                f"{row['traced_seconds']:.2f}",
                f"{row['cpu_seconds']:.2f}",
                f"{row['megabytes']:.0f}",
            )
            for row in rows
        ],
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the tables and writes the report, which grows with every row."""
    parser = argparse.ArgumentParser(description="Time and memory of mup_init on 1 to 70 billion parameters.")
    parser.add_argument("--runs", type=int, default=3, help="processes of each size (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a smoke run: few layers, one process for each")
    parser.add_argument("--out", type=pathlib.Path, default=common.OUT / "spec_scale.json", help="the report")
    for what in ("--measure", "--trace"):
        parser.add_argument(what, type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for asked, run in ((args.measure, measure), (args.trace, traced)):
        if asked is not None:
            print(json.dumps(run(Size(**asked))))
            return
    if args.runs < 1:
        parser.error(f"--runs: expected at least 1, got {args.runs}.")

    sizes = {"1e9": dataclasses.replace(SIZES["1e9"], n_layers=1)} if args.quick else SIZES
    largest, whole = list(sizes.items())[-1]
    depths = (1, 2, 3) if args.quick else LAYERS
    cut = [(largest, dataclasses.replace(whole, n_layers=n_layers)) for n_layers in depths]
    runs: dict[tuple[str, Size], list[dict[str, float]]] = {key: [] for key in (*sizes.items(), *cut)}
    report: dict[str, Any] = {
        "quick": args.quick,
        "environment": common.environment(),
        "goals": {figure: goal.limit for figure, goal in GOALS.items()},
        "goals of scanned": {figure: goal.limit for figure, goal in SCANNED_GOALS.items()},
    }

    def rows(keys: Iterable[tuple[str, Size]]) -> list[dict[str, Any]]:
        return [
            {"size": name, "layers": size.n_layers, "d_model": size.d_model, **summary(runs[name, size])}
            for name, size in keys
            if runs[name, size]
        ]

    # One of each, and again: a busy minute then falls on all of them.
    for _ in range(1 if args.quick else args.runs):
        for name, size in runs:
            print(f"{name} with {size.n_layers} layers ...", file=sys.stderr, flush=True)
            runs[name, size].append(in_own_process(size))
            report |= {"sizes": rows(sizes.items()), "layers": rows(cut)}
            common.write(args.out, report)
    report["linearity"] = linearity(report["layers"])
    judged = [(GOALS, {**report["sizes"][-1], "linearity": report["linearity"]})]
    judged += [(SCANNED_GOALS, row) for row in report["sizes"] if row["size"] == SCANNED]
    report["missed"] = [
        line
        for goals, row in judged
        for figure, goal in goals.items()
        for line in goal.missed_by(f"{row['size']}: {figure}", row[figure])
    ]
    common.write(args.out, report)
    print("mup_init, abstract.\n")
    print(show(report["sizes"]))
    print("\nThe largest size, by layers:\n")
    print(show(report["layers"]))
    print(f"\nLinearity: {report['linearity']:.2f}.")
    print("\n" + common.verdict(report["missed"], quick=args.quick))
    print(f"\nWritten to {args.out}.")


if __name__ == "__main__":
    main()
