"""The cost of mujax in a training step, against the same Flax module with plain optax.

    python benchmarks/overhead.py [--quick] [--cases mlp resnet] [--runs 15] [--out FILE]

Both sides run the same module on the same shapes through `mujax.train.train_step`, so they donate the same
buffers; one has `model.apply` and optax's optimizer, the other `mup.apply` and mujax's. Per case and width:

- FLOPs, bytes and products: FLOPs and bytes accessed by XLA's own cost analysis of the compiled step, and
  the number of its dots and convolutions. They are exact, and the same on a busy machine. Where `jax[tpu]`
  is installed they are also taken from the step compiled for one chip of a TPU v5e, which nobody needs.
- time: wall time of the step. The sides run in turn, and the figure is the median of the ratios of
  neighbouring runs, with the 95% interval of that median. Where the interval holds the goal, the machine
  was too busy for a verdict. cpu: the same in processor time of all threads, which other work disturbs less.
  In brackets the control, plain optax against itself measured in the same way: its difference from 1 is
  the machine's.
- trace: CPU time to trace the step; forward trace: to trace the loss alone, without gradient and update.
- eager: wall time of `mup.apply` outside of `jax.jit`, after the first call, against the module's own; eager
  NNX: the same for an NNX module of the same kind. Both are mostly JAX's dispatch of operations.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import importlib.util
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import common
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn, nnx

import mujax
from mujax import models, optim, train

# ---- cases -----------------------------------------------------------------------------------------

Optimizer = Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]
OPTIMIZERS: Final[Mapping[str, tuple[Optimizer, Callable[[mujax.MupSpec], Optimizer]]]] = {
    "adam": (optax.adam, lambda spec: functools.partial(optim.mup_adam, spec=spec)),
    "sgd": (
        functools.partial(optax.sgd, momentum=0.9),
        lambda spec: functools.partial(optim.mup_sgd, spec=spec, momentum=0.9),
    ),
}
"""Name -> plain optax's optimizer and mujax's, each still without its learning rate."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One model at several widths.

    Attributes:
        module: width -> the Flax module.
        base_width: of the base model.
        widths: of the targets.
        quick_width: the one to try with `--quick`.
        inputs: one batch.
        labels: of that batch, for cross-entropy.
        optimizer: name in `OPTIMIZERS`.
        kwargs: keyword arguments of the module's call.
        nnx_module: width -> an NNX factory of a model of the same kind, for eager calls.
    """

    module: Callable[[int], nn.Module]
    base_width: int
    widths: tuple[int, ...]
    quick_width: int
    inputs: jax.ShapeDtypeStruct
    labels: jax.ShapeDtypeStruct
    optimizer: str = "adam"
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    nnx_module: Callable[[int], Callable[[nnx.Rngs], nnx.Module]] | None = None


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


class _NNXMLP(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(784, width, rngs=rngs)
        self.hidden = nnx.Linear(width, width, rngs=rngs)
        self.readout = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.readout(nnx.relu(self.hidden(nnx.relu(self.first(x)))))


class _NNXBlock(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(width // 16, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norms[0](x))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class _NNXTransformer(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(256, width, rngs=rngs)
        self.blocks = nnx.List([_NNXBlock(width, rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.readout = nnx.Linear(width, 256, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.readout(self.norm(x))


def _transformer(nnx_module: Any = None, **options: Any) -> Case:
    def module(width: int) -> nn.Module:
        return models.Transformer(models.TransformerConfig(d_model=width, n_layers=2, **options))

    return Case(
        module,
        base_width=64,
        widths=(128, 256, 512),
        quick_width=128,
        inputs=_ints(8, 64),
        labels=_ints(8, 64),
        nnx_module=nnx_module,
    )


def _resnet(width: int) -> nn.Module:
    widths = tuple(width * 2**stage for stage in range(4))
    return models.ResNet(models.ResNetConfig(stage_widths=widths))


CASES: Final[Mapping[str, Case]] = {
    "mlp": Case(
        module=lambda width: models.MLP(models.MLPConfig(width=width)),
        base_width=64,
        widths=(256, 1024, 4096),
        quick_width=128,
        inputs=_floats(128, 784),
        labels=_ints(128),
        nnx_module=lambda width: functools.partial(_NNXMLP, width),
    ),
    "transformer": _transformer(lambda width: functools.partial(_NNXTransformer, width), head_dim=16),
    "tied-transformer": _transformer(head_dim=16, tie_embeddings=True),
    # Logits are much of what this one moves: a factor on them would show.
    "large-vocabulary": _transformer(head_dim=16, vocab_size=8192),
    # Heads that grow: every layer's attention logits get a factor.
    "growing-heads": _transformer(n_heads=4),
    "resnet": Case(
        module=_resnet,
        base_width=8,
        widths=(16, 32, 64),
        quick_width=16,
        inputs=_floats(8, 32, 32, 3),
        labels=_ints(8),
        optimizer="sgd",
        kwargs={"train": True},
    ),
}


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the compared sides: a loss and an optimizer."""

    loss: train.Loss
    tx: optax.GradientTransformation

    def step(self) -> train.JittedStep:
        """A training step that nothing has traced before."""
        return train.train_step(self.loss, self.tx)


def _loss(apply: Callable[..., Any], kwargs: Mapping[str, Any]) -> train.Loss:
    def loss(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        inputs, labels = batch
        logits, model_state = apply(
            {"params": params, **model_state}, inputs, mutable=list(model_state), **kwargs
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), (model_state, {})

    return loss


@dataclasses.dataclass(frozen=True)
class Setting:
    """A case at one width, ready to be measured."""

    case: Case
    model: nn.Module
    mup: mujax.MupModel

    @classmethod
    def of(cls, case: Case, width: int) -> Setting:
        """Builds the models; allocates nothing."""
        model = case.module(width)
        base = case.module(case.base_width)
        return cls(case, model, mujax.mup_init(model, base, case.inputs, **case.kwargs))

    @functools.cached_property
    def sides(self) -> dict[str, Side]:
        """Plain optax and mujax."""
        plain, ours = OPTIMIZERS[self.case.optimizer]
        # A schedule, as in real training: the compiler can't fold µP's factors into it beforehand.
        schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 100, 10_000)
        return {
            "optax": Side(_loss(self.model.apply, self.case.kwargs), plain(schedule)),
            "mujax": Side(_loss(self.mup.apply, self.case.kwargs), ours(self.mup.spec)(schedule)),
        }

    def state(self, side: Side) -> train.TrainState:
        """The initial state of a side; of both the same parameters."""
        variables = self.mup.init(jax.random.key(0), _random(self.case.inputs))
        params = variables.pop("params")
        return train.init_state(params, side.tx, model_state=variables)

    def abstract_state(self, side: Side) -> train.TrainState:
        """The same in shapes only."""
        return jax.eval_shape(lambda: self.state(side))

    def batch(self) -> tuple[jax.Array, jax.Array]:
        """Random inputs and labels."""
        return _random(self.case.inputs), _random(self.case.labels)


def _random(like: jax.ShapeDtypeStruct) -> jax.Array:
    key = jax.random.key(1)
    if jnp.issubdtype(like.dtype, jnp.integer):
        return jax.random.randint(key, like.shape, 0, 10, like.dtype)
    return jax.random.normal(key, like.shape, like.dtype)


# ---- the compiled program --------------------------------------------------------------------------

_PRODUCT: Final = re.compile(r"\s(?:dot|convolution)\(|custom_call_target=\"[^\"]*(?:gemm|matmul|conv)", re.I)


def _host() -> jax.sharding.Sharding | None:
    return None


def _tpu() -> jax.sharding.Sharding:
    from jax.experimental import topologies

    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    return jax.sharding.SingleDeviceSharding(chips[0])


def platforms() -> dict[str, Callable[[], jax.sharding.Sharding | None]]:
    """Name -> where to compile for: this machine, and what else there is a compiler for."""
    found: dict[str, Callable[[], jax.sharding.Sharding | None]] = {jax.default_backend(): _host}
    if importlib.util.find_spec("libtpu") is not None:
        found["v5e"] = _tpu
    return found


def program(setting: Setting, side: Side, sharding: jax.sharding.Sharding | None) -> dict[str, float]:
    """FLOPs, bytes accessed and number of products of the compiled step."""
    state, batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        (setting.abstract_state(side), (setting.case.inputs, setting.case.labels)),
    )
    compiled = side.step().lower(state, batch).compile()
    cost, text = compiled.cost_analysis(), compiled.as_text()
    if cost is None or text is None:
        raise RuntimeError(f"{jax.default_backend()}: this compiler reports neither costs nor its program.")
    return {
        "flops": cost["flops"],
        "bytes": cost["bytes accessed"],
        "products": len(_PRODUCT.findall(text)),
    }


# ---- time ------------------------------------------------------------------------------------------


CLOCKS: Final[Mapping[str, Callable[[], float]]] = {"wall": time.perf_counter, "cpu": time.process_time}


def in_turn(measure: Mapping[str, Callable[[], int]], runs: int) -> dict[str, dict[str, list[float]]]:
    """Seconds per unit of work, for each name `runs` of them, measured in turn.

    Args:
        measure: name -> does some work and returns how many units it was.
        runs: rounds; in each every name has its turn, first another one each time.

    Returns:
        Clock -> name -> seconds, in the order of the rounds.
    """
    samples: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in measure} for clock in CLOCKS}
    order = list(measure)
    for _ in range(runs):
        for name in order:
            gc.collect()
            gc.disable()
            start = {clock: read() for clock, read in CLOCKS.items()}
            units = measure[name]()
            for clock, read in CLOCKS.items():
                samples[clock][name].append((read() - start[clock]) / units)
            gc.enable()
        order = [*order[1:], order[0]]
    return samples


class Training:
    """A training run that continues from its last step."""

    def __init__(self, setting: Setting, side: Side, step: train.JittedStep) -> None:
        self._step, self._batch, self._state = step, setting.batch(), setting.state(side)

    def take(self, steps: int) -> int:
        """Takes some steps and returns how many."""
        for _ in range(steps):
            self._state, _ = self._step(self._state, self._batch)
        jax.block_until_ready(self._state)
        return steps


def stepping(setting: Setting, runs: int, seconds: float) -> dict[str, common.Paired]:
    """Ratio of the step's wall and CPU times, and the same for plain optax against itself."""
    plain, ours = setting.sides["optax"], setting.sides["mujax"]
    # The control is the same compiled program on buffers of its own.
    step = plain.step()
    trainings = {
        "optax": Training(setting, plain, step),
        "mujax": Training(setting, ours, ours.step()),
        "control": Training(setting, plain, step),
    }
    for training in trainings.values():
        training.take(1)
    start = time.perf_counter()
    trainings["optax"].take(1)
    steps = max(1, round(seconds / (time.perf_counter() - start)))
    turns = {name: functools.partial(training.take, steps) for name, training in trainings.items()}
    samples = in_turn(turns, runs)
    return {
        "time": common.paired(samples["wall"], "mujax", "optax"),
        "time_control": common.paired(samples["wall"], "control", "optax"),
        "cpu": common.paired(samples["cpu"], "mujax", "optax"),
        "cpu_control": common.paired(samples["cpu"], "control", "optax"),
    }


def tracing(setting: Setting, runs: int) -> dict[str, common.Paired]:
    """Ratio of the CPU times to trace the step, and to trace the forward pass alone."""
    batch = (setting.case.inputs, setting.case.labels)
    states = {name: setting.abstract_state(side) for name, side in setting.sides.items()}

    def step(name: str) -> int:
        jax.make_jaxpr(setting.sides[name].step())(states[name], batch)
        return 1

    def forward(name: str) -> int:
        loss, state = setting.sides[name].loss, states[name]
        jax.make_jaxpr(lambda *args: loss(*args))(state.params, state.model_state, batch, state.key)
        return 1

    out: dict[str, common.Paired] = {}
    for figure, trace in (("trace", step), ("trace_forward", forward)):
        both = {name: functools.partial(trace, name) for name in setting.sides}
        # The first time, both fill the caches of jax.numpy's own jitted functions.
        in_turn(both, 1)
        out[figure] = common.paired(in_turn(both, runs)["cpu"], "mujax", "optax")
    return out


def eager(setting: Setting, width: int, runs: int, seconds: float) -> dict[str, common.Paired]:
    """Ratio of the wall times of eager calls, of the Linen module and of its NNX counterpart."""
    case, inputs = setting.case, _random(setting.case.inputs)
    variables = setting.mup.init(jax.random.key(0), inputs)
    calls: dict[str, dict[str, Callable[[], Any]]] = {
        "eager": {
            "optax": lambda: setting.model.apply(variables, inputs, **_evaluation(case)),
            "mujax": lambda: setting.mup.apply(variables, inputs, **_evaluation(case)),
        }
    }
    if case.nnx_module is not None:
        mup = mujax.mup_init(case.nnx_module(width), case.nnx_module(case.base_width), inputs)
        module = mup.init(jax.random.key(0))
        calls["eager_nnx"] = {"optax": lambda: module(inputs), "mujax": lambda: mup.apply(module, inputs)}

    def repeat(call: Callable[[], Any], times: int) -> int:
        for _ in range(times):
            jax.block_until_ready(call())
        return times

    out: dict[str, common.Paired] = {}
    for figure, both in calls.items():
        for call in both.values():
            repeat(call, 2)
        start = time.perf_counter()
        repeat(both["optax"], 1)
        times = max(1, round(seconds / (time.perf_counter() - start)))
        samples = in_turn({side: functools.partial(repeat, both[side], times) for side in both}, runs)
        out[figure] = common.paired(samples["wall"], "mujax", "optax")
    return out


def _evaluation(case: Case) -> dict[str, Any]:
    return {**case.kwargs, "train": False} if "train" in case.kwargs else dict(case.kwargs)


# ---- the report ------------------------------------------------------------------------------------

GOALS: Final[Mapping[str, common.Goal]] = {
    "flops": common.Goal(1.001, "FLOPs at most 1.001 of plain optax's"),
    "bytes": common.Goal(1.01, "bytes at most 1.01 of plain optax's"),
    "products": common.Goal(1.0, "no more dots and convolutions than plain optax's"),
    "time": common.Goal(1.02, "wall time at most 1.02 of plain optax's"),
    "import": common.Goal(1.15, "importing mujax at most 1.15 times as long as JAX, Flax and optax"),
    "trace": common.Goal(3.0, "tracing the step at most 3 times as long as plain optax's"),
    "trace_forward": common.Goal(3.0, "tracing the forward pass at most 3 times as long as the module's own"),
    "eager": common.Goal(1.1, "an eager call at most 1.1 times as long as the module's own"),
    "eager_nnx": common.Goal(1.1, "an eager call at most 1.1 times as long as the NNX module's own"),
}


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        runs: paired runs of the step, and a quarter as many of the tracing.
        seconds: length of a run.
    """

    runs: int
    seconds: float


def importing(runs: int) -> tuple[common.Paired, common.Paired]:
    """Processor time of a fresh process that imports mujax too, over one that imports JAX, Flax and optax.

    Returns:
        For the import alone, and with the first use of `mup_init` and `mup_adam`.
    """
    plain = "import jax, flax, optax"
    sides = {
        "plain": plain,
        "mujax": f"{plain}, mujax",
        "use": f"{plain}, mujax; mujax.mup_init; mujax.mup_adam",
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    # The first time Python may compile.
    for number in range(runs + 1):
        for side, code in sides.items():
            code = f"{code}; import time; print(time.process_time())"
            done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE)
            if number:
                seconds[side].append(float(done.stdout))
    return common.paired(seconds, "mujax", "plain"), common.paired(seconds, "use", "plain")


def measure(name: str, width: int, effort: Effort) -> dict[str, Any]:
    """All figures of a case at one width."""
    setting = Setting.of(CASES[name], width)
    programs: dict[str, Any] = {}
    for platform, place in platforms().items():
        sharding = place()
        figures = {side: program(setting, what, sharding) for side, what in setting.sides.items()}
        ratio = {figure: figures["mujax"][figure] / value for figure, value in figures["optax"].items()}
        programs[platform] = {**figures, "ratio": ratio}
    timed = {
        **stepping(setting, effort.runs, effort.seconds),
        **tracing(setting, max(3, effort.runs // 4)),
        **eager(setting, width, effort.runs, effort.seconds),
    }
    missed = [
        line
        for platform, figures in programs.items()
        for figure, ratio in figures["ratio"].items()
        for line in GOALS[figure].missed_by(f"{name} at width {width} on {platform}", ratio)
    ]
    missed += [
        line
        for figure, value in timed.items()
        if figure in GOALS
        for line in GOALS[figure].missed_by(f"{name} at width {width}", value.median, value.low)
    ]
    return {
        "case": name,
        "width": width,
        "base_width": CASES[name].base_width,
        "optimizer": CASES[name].optimizer,
        "parameters": setting.mup.spec.size(),
        "programs": programs,
        "timed": {figure: dataclasses.asdict(value) for figure, value in timed.items()},
        "missed": missed,
    }


def show(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table of ratios, mujax's over plain optax's."""
    where = list(rows[0]["programs"])
    counted = [(platform, figure) for platform in where for figure in ("flops", "bytes", "products")]
    header = ["case", "width", "parameters", *(f"{figure} ({platform})" for platform, figure in counted)]
    header += ["time", "95% interval", "cpu", "trace", "forward trace", "eager", "eager NNX"]
    lines = []
    for row in rows:
        timed = row["timed"]
        lines.append(
            [
                row["case"],
                str(row["width"]),
                f"{row['parameters']:,}",
                *(f"{row['programs'][platform]['ratio'][figure]:.5f}" for platform, figure in counted),
                f"{timed['time']['median']:.3f} ({timed['time_control']['median']:.3f})",
                f"{timed['time']['low']:.3f}–{timed['time']['high']:.3f}",
                f"{timed['cpu']['median']:.3f} ({timed['cpu_control']['median']:.3f})",
                f"{timed['trace']['median']:.2f}",
                f"{timed['trace_forward']['median']:.2f}",
                *(f"{timed[it]['median']:.2f}" if it in timed else "-" for it in ("eager", "eager_nnx")),
            ]
        )
    return common.table(header, lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table and writes the report, which grows with every row."""
    parser = argparse.ArgumentParser(
        description="The cost of mujax in a training step: ratios to plain optax."
    )
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=list(CASES), help="which models (default: all)")
    add("--runs", type=int, default=31, help="paired runs of each step (default: %(default)s)")
    add("--quick", action="store_true", help="a smoke run: one small width of each, few short runs")
    add("--only-import", action="store_true", help="only the time of importing mujax")
    add("--out", type=pathlib.Path, default=common.OUT / "overhead.json", help="the report")
    args = parser.parse_args(argv)
    if args.runs < 1:
        parser.error(f"--runs: expected at least 1, got {args.runs}.")

    effort = Effort(runs=3, seconds=0.01) if args.quick else Effort(args.runs, seconds=0.1)
    report: dict[str, Any] = {
        "quick": args.quick,
        "environment": common.environment(),
        "goals": {figure: goal.limit for figure, goal in GOALS.items()},
        "rows": [],
    }
    imports, used = importing(1 if args.quick else 7)
    report["import"] = dataclasses.asdict(imports)
    report["import and first use"] = dataclasses.asdict(used)
    common.write(args.out, report)
    for name in () if args.only_import else dict.fromkeys(args.cases):
        for width in (CASES[name].quick_width,) if args.quick else CASES[name].widths:
            print(f"{name} at width {width} ...", file=sys.stderr, flush=True)
            report["rows"].append(measure(name, width, effort))
            common.write(args.out, report)
    if report["rows"]:
        print("Ratios, mujax over plain optax.\n")
        print(show(report["rows"]) + "\n")
    print(
        f"Importing mujax over importing JAX, Flax and optax: {imports.median:.2f} "
        f"({imports.low:.2f}–{imports.high:.2f}) of the processor time; with the first use of mup_init and "
        f"mup_adam {used.median:.2f} ({used.low:.2f}–{used.high:.2f})."
    )
    missed = [line for row in report["rows"] for line in row["missed"]]
    missed += GOALS["import"].missed_by("import", imports.median, imports.low)
    print("\n" + common.verdict(missed, quick=args.quick))
    print(f"\nWritten to {args.out}.")


if __name__ == "__main__":
    main()
