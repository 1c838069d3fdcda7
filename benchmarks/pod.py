"""A training step for a TPU pod, compiled without one: memory, cost and compile time against plain optax.

    python benchmarks/pod.py [--quick] [--cases 7e9 70e9] [--rounds 3] [--out FILE]

The compiler of the extra `tpu` (`pip install "mujax-mup[tpu]"`) compiles for chips that are not there, and
everything is abstract: no parameter is ever allocated. Both sides train the same decoder with AdamW through
`mujax.train.train_step`, split by mujax's own default (`mup.partition`); one has `model.apply` and optax's
optimizer, the other `mup.apply` and mujax's. Per case:

- memory: bytes that the step takes on one chip (arguments, temporaries, program), against what the chip has.
- FLOPs, bytes: of one chip by XLA's own cost analysis, mujax's over plain optax's.
- collectives: how many of each kind, with their shapes; both sides have the same.
- lowering: tracing the step and writing it down for XLA, which includes, once for each kind of call, that
  mujax reads the call at both widths; again: the same a second time, as for another optimizer or number of
  steps. compiling: XLA's work; both: lowering and compiling. Ratios of processor time of all threads, which
  other work on the machine disturbs less than wall time; the latter stands in the report.

Each round is a process of its own, in which the sides compile one after the other, in the other order
each time. The ratio is the median over rounds. An interrupted run goes on with the rounds that are missing.
The cases `unrolled-*` and `scanned-*` have many narrow layers, for the compile time alone.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import gc
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import common


@dataclasses.dataclass(frozen=True)
class Case:
    """A decoder, and what its training step is compiled for.

    Attributes:
        topology: of a TPU, such as `v5e:8x8`; None for this machine's first CPU.
        mesh: axes of the mesh; None for one device.
        n_layers: blocks.
        d_model: width of the target.
        base_d_model: width of the base.
        batch: sequences a step, over all chips.
        length: tokens of a sequence.
        vocab_size: tokens; embedding and readout are separate.
        ff_ratio: feed-forward width over `d_model`.
        queries_per_key: query heads to one key and value head.
        head_dim: size of a head.
        scanned: one `lax.scan` over rematerialised blocks; else the blocks are laid out one by one.
    """

    topology: str | None
    mesh: str | None
    n_layers: int
    d_model: int
    base_d_model: int
    batch: int
    length: int = 2048
    vocab_size: int = 64_000
    ff_ratio: int = 4
    queries_per_key: int = 1
    head_dim: int = 128
    scanned: bool = True

    @property
    def is_narrow(self) -> bool:
        """Whether only the compile time means anything: the update is much of so narrow a model's step."""
        return self.d_model < 1024

    def model(self, d_model: int) -> Any:
        """The Flax module at a width."""
        import jax.numpy as jnp

        from mujax import models

        return models.Transformer(
            models.TransformerConfig(
                d_model=d_model,
                n_layers=self.n_layers,
                head_dim=self.head_dim,
                n_kv_heads=d_model // self.head_dim // self.queries_per_key,
                ff_ratio=self.ff_ratio,
                vocab_size=self.vocab_size,
                max_len=self.length,
                scan_layers=self.scanned,
                remat=self.scanned,
                dtype=jnp.bfloat16,
            )
        )


def _narrow(topology: str | None, n_layers: int, scanned: bool) -> Case:
    small = {"length": 128, "vocab_size": 512, "head_dim": 32}
    return Case(topology, topology and "fsdp=4", n_layers, 128, 64, batch=8, scanned=scanned, **small)


CASES: Final[Mapping[str, Case]] = {
    "scanned-32-cpu": _narrow(None, 32, scanned=True),
    "unrolled-80-cpu": _narrow(None, 80, scanned=False),
    "scanned-32-v5e": _narrow("v5e:2x2", 32, scanned=True),
    "unrolled-80-v5e": _narrow("v5e:2x2", 80, scanned=False),
    "7e9": Case("v5e:8x8", "fsdp=64", 32, 4096, 512, batch=64),
    "70e9": Case(
        "v5p:8x8x4",
        "fsdp=64,tensor=4",
        80,
        8192,
        2048,
        batch=64,
        vocab_size=256_000,
        ff_ratio=5,
        queries_per_key=8,
    ),
}
QUICK: Final[Mapping[str, Case]] = {
    name: dataclasses.replace(
        _narrow(None if case.topology is None else "v5e:2x2", 2, case.scanned),
        mesh=None if case.topology is None else "fsdp=2,tensor=2",
    )
    for name, case in CASES.items()
}

HBM: Final[Mapping[str, float]] = {"v5e": 16e9, "v5p": 95e9, "v6e": 32e9}
"""Bytes of a chip's memory, by Google's data sheets."""

SIDES: Final = ("optax", "mujax")
TIMED: Final = ("lower", "again", "compile", "both")

GOALS: Final[Mapping[str, common.Goal]] = {
    "memory": common.Goal(1.0, "at most the memory of a chip"),
    "flops": common.Goal(1.001, "FLOPs at most 1.001 of plain optax's"),
    "bytes": common.Goal(1.001, "the bytes of plain optax"),
    **dict.fromkeys(TIMED, common.Goal(1.1, "at most 1.1 times as long as plain optax's")),
}
# ---- in a process of its own -----------------------------------------------------------------------

_COLLECTIVE: Final = re.compile(
    r" = (\(?\w+\[.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def _places(case: Case) -> Any:
    """The mesh, or the one device."""
    import jax
    from jax.experimental import topologies

    from mujax import train

    if case.topology is None:
        return jax.devices("cpu")[0]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=case.topology).devices
    return devices[0] if case.mesh is None else train.make_mesh(case.mesh, devices)


@dataclasses.dataclass(frozen=True)
class Sides:
    """Both sides of a case: how each makes a step that nothing has traced before, and its arguments."""

    steps: Mapping[str, Callable[[], Any]]
    states: Mapping[str, Any]
    batch: Any
    parameters: int


def pinned(apply: Callable[..., Any], mesh: Any) -> Callable[..., Any]:
    """The model with its residual stream split over examples, as one writes it into a model for a pod.

    Without it XLA splits the stream as the kernels are split over `fsdp`, and each chip then holds a part of
    every example: more memory and communication, with plain optax as well.
    """
    import jax
    from flax import linen as nn

    from mujax import train

    if mesh is None:
        return apply

    def pin(next_function: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = next_function(*args, **kwargs)
        of_stream = type(context.module).__name__.endswith(("Block", "LayerNorm", "Embed"))
        if not of_stream or context.method_name != "__call__" or out.shape[0] == 1:
            return out
        return jax.lax.with_sharding_constraint(out, train.batch_sharding(mesh))

    def call(*args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(pin):
            return apply(*args, **kwargs)

    return call


def sides(case: Case) -> Sides:
    """Builds both sides in shapes only."""
    import jax
    import jax.numpy as jnp
    import optax
    from jax.sharding import SingleDeviceSharding

    import mujax
    from mujax import train

    tokens = jax.ShapeDtypeStruct((case.batch, case.length), jnp.int32)
    model = case.model(case.d_model)
    mup = mujax.mup_init(model, case.model(case.base_d_model), tokens)
    place = _places(case)
    mesh = place if isinstance(place, jax.sharding.Mesh) else None

    def loss(apply: Callable[..., Any]) -> train.Loss:
        def of(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
            del key
            logits = apply({"params": params}, batch[0])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean(), (model_state, {})

        return of

    # A schedule, as in real training: the compiler can't fold µP's factors into it beforehand.
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 100, 10_000)
    losses = {"optax": loss(pinned(model.apply, mesh)), "mujax": loss(pinned(mup.apply, mesh))}
    optimizers = {"optax": optax.adamw(schedule), "mujax": mujax.mup_adamw(schedule, mup.spec)}

    def state(tx: optax.GradientTransformation) -> Any:
        params = jax.eval_shape(mup.init, jax.random.key(0))["params"]
        shapes = jax.eval_shape(lambda params: train.init_state(params, tx), params)
        places = (
            jax.tree.map(lambda _: SingleDeviceSharding(place), shapes)
            if mesh is None
            else train.shardings(mup, mesh, shapes)
        )
        return jax.tree.map(_placed, shapes, places)

    whole = SingleDeviceSharding(place) if mesh is None else train.batch_sharding(mesh)
    return Sides(
        {side: lambda side=side: train.train_step(losses[side], optimizers[side]) for side in SIDES},
        {side: state(optimizers[side]) for side in SIDES},
        (_placed(tokens, whole), _placed(tokens, whole)),
        mup.spec.size(),
    )


def _placed(leaf: Any, sharding: Any) -> Any:
    import jax

    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


CLOCKS: Final[Mapping[str, Callable[[], float]]] = {"wall": time.perf_counter, "cpu": time.process_time}


def _timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    gc.collect()
    start = {clock: read() for clock, read in CLOCKS.items()}
    done = work()
    return done, {clock: read() - start[clock] for clock, read in CLOCKS.items()}


def measure(case: Case, number: int) -> dict[str, Any]:
    """One round: figures of both sides, in an order that the round's number gives."""
    import jax
    import jax.numpy as jnp

    built = sides(case)
    # What only the first program of a process costs: of JAX's own functions, and of the compiler. What mujax
    # reads at the first call stays part of its side.
    jax.jit(jnp.tanh).lower(built.batch[0]).compile()
    jax.eval_shape(built.steps["optax"](), built.states["optax"], built.batch)
    found: dict[str, Any] = {"parameters": built.parameters}
    for side in SIDES if number % 2 == 0 else SIDES[::-1]:
        step = built.steps[side]()
        lowered, lowering = _timed(lambda: step.lower(built.states[side], built.batch))  # noqa: B023
        compiled, compiling = _timed(lowered.compile)
        again = built.steps[side]()
        _, lowering_again = _timed(lambda: again.lower(built.states[side], built.batch))  # noqa: B023
        memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
        kinds = collections.Counter(
            " ".join(match.groups()[::-1]) for match in _COLLECTIVE.finditer(compiled.as_text())
        )
        found[side] = {
            "lower": lowering,
            "again": lowering_again,
            "compile": compiling,
            "both": {clock: lowering[clock] + compiling[clock] for clock in CLOCKS},
            "flops": costs["flops"],
            "bytes": costs["bytes accessed"],
            "memory": memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
            + memory.generated_code_size_in_bytes,
            "arguments": memory.argument_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
            "collectives": dict(sorted(kinds.items())),
        }
    return found


def in_own_process(case: Case, number: int) -> dict[str, Any]:
    """`measure` in a fresh process, without a cache of programs."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    # Nothing runs on a TPU: libtpu need not look for the machine that it is on, or for a chip of its own.
    environment |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    asked = json.dumps({**dataclasses.asdict(case), "number": number})
    command = [sys.executable, __file__, "--measure", asked]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


# ---- the report ------------------------------------------------------------------------------------


def by_kind(collectives: Mapping[str, int]) -> dict[str, int]:
    """The numbers of collectives by kind, whatever their shapes."""
    kinds: collections.Counter[str] = collections.Counter()
    for described, count in collectives.items():
        kinds[described.split()[0]] += count
    return dict(sorted(kinds.items()))


def summary(name: str, case: Case, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of a case, from its rounds so far."""
    last = runs[-1]
    ratio: dict[str, Any] = {
        figure: last["mujax"][figure] / last["optax"][figure] for figure in ("flops", "bytes")
    }
    timed = {
        figure: {
            clock: dataclasses.asdict(
                common.paired(
                    {side: [run[side][figure][clock] for run in runs] for side in SIDES}, *SIDES[::-1]
                )
            )
            for clock in CLOCKS
        }
        for figure in TIMED
    }
    judged = {
        **{figure: (value, None) for figure, value in ratio.items() if not case.is_narrow},
        **{figure: (clocks["cpu"]["median"], clocks["cpu"]["low"]) for figure, clocks in timed.items()},
    }
    if case.topology is not None:
        hbm = HBM[case.topology.partition(":")[0]]
        judged["memory"] = (last["mujax"]["memory"] / hbm, None)
    missed = [
        line
        for figure, (value, surely) in judged.items()
        for line in GOALS[figure].missed_by(f"{name}: {figure}", value, surely)
    ]
    kinds = {side: by_kind(last[side]["collectives"]) for side in SIDES}
    if kinds["mujax"] != kinds["optax"]:
        missed.append(
            f"{name}: collectives {kinds['mujax']}, the goal is those of plain optax, {kinds['optax']}."
        )
    return {
        "case": name,
        **dataclasses.asdict(case),
        "parameters": last["parameters"],
        "ratio": ratio,
        "timed": timed,
        "collectives": kinds,
        "same_shapes": last["mujax"]["collectives"] == last["optax"]["collectives"],
        "missed": missed,
        "runs": list(runs),
    }


def show(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table."""
    header = (
        "case",
        "target",
        "parameters",
        "GB a chip (plain)",
        "of",
        "FLOPs",
        "bytes",
        "collectives (plain)",
        "lowering",
        "again",
        "compiling",
        "both",
        "s (plain)",
    )
    lines = []
    for row in rows:
        last, timed = row["runs"][-1], row["timed"]
        kind = (row["topology"] or "").partition(":")[0]
        counts = [str(sum(row["collectives"][side].values())) for side in SIDES[::-1]]
        both = timed["both"]["cpu"]
        lines.append(
            (
                row["case"],
                row["topology"] or "CPU",
                f"{row['parameters']:,}",
                f"{last['mujax']['memory'] / 1e9:.2f} ({last['optax']['memory'] / 1e9:.2f})",
                f"{HBM[kind] / 1e9:.0f}" if kind else "-",
                f"{row['ratio']['flops']:.5f}",
                f"{row['ratio']['bytes']:.5f}",
                f"{counts[0]} ({counts[1]})",
                *(_interval(timed[it]["cpu"]) for it in TIMED),
                f"{both['seconds']['mujax']:.0f} ({both['seconds']['optax']:.0f})",
            )
        )
    return common.table(header, lines)


def _interval(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def _earlier(path: pathlib.Path, quick: bool) -> dict[str, list[dict[str, Any]]]:
    """The rounds that an earlier run of the same versions has written, by case."""
    if not path.exists():
        return {}
    report = json.loads(path.read_text())
    same = report["quick"] == quick and report["environment"]["versions"] == common.environment()["versions"]
    cases = QUICK if quick else CASES
    return {
        row["case"]: row["runs"]
        for row in report["rows"]
        if same and row["case"] in cases and dataclasses.asdict(cases[row["case"]]).items() <= row.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table and writes the report, which grows with every round."""
    parser = argparse.ArgumentParser(description="A training step compiled for a TPU pod, without one.")
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    add("--rounds", type=int, default=3, help="of each case (default: %(default)s)")
    add("--quick", action="store_true", help="a smoke run: two narrow layers, a TPU of four chips, one round")
    add("--out", type=pathlib.Path, default=common.OUT / "pod.json", help="the report")
    add("--measure", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure is not None:
        number = args.measure.pop("number")
        print(json.dumps(measure(Case(**args.measure), number)))
        return
    if args.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {args.rounds}.")
    cases = QUICK if args.quick else CASES
    asked = list(dict.fromkeys(args.cases))
    if importlib.util.find_spec("libtpu") is None and any(cases[name].topology for name in asked):
        parser.error(
            "libtpu: expected the TPU compiler of the extra tpu, got none; install it with "
            '`pip install "mujax-mup[tpu]"`, or give --cases those that end in -cpu.'
        )
    runs = _earlier(args.out, args.quick)
    report: dict[str, Any] = {
        "quick": args.quick,
        "environment": common.environment(),
        "goals": {figure: goal.limit for figure, goal in GOALS.items()},
        "rows": [],
    }

    def rows() -> list[dict[str, Any]]:
        return [summary(name, cases[name], runs[name]) for name in cases if runs.get(name)]

    # One round of each, and again: a busy minute then falls on all of them.
    for number in range(1 if args.quick else args.rounds):
        for name in asked:
            done = runs.setdefault(name, [])
            if number < len(done):
                continue
            print(f"{name}: round {number + 1} ...", file=sys.stderr, flush=True)
            done.append(in_own_process(cases[name], number))
            common.write(args.out, report | {"rows": rows()})
    found = [row for row in rows() if row["case"] in asked]
    print("Ratios, mujax over plain optax, with the range over rounds.\n")
    print(show(found))
    missed = [line for row in found for line in row["missed"]]
    print("\n" + common.verdict(missed, quick=args.quick))
    print(f"\nWritten to {args.out}.")


if __name__ == "__main__":
    main()
