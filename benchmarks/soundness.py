"""Whether the reading of a model is right: random programs, read by `mujax` and measured over widths.

Each program is initialised by `mup.init` at several widths and run; the sizes of its activations, and the
changes that one step of `mup_adam` on each parameter makes, are fitted against the width. The reading claims
that they do not depend on it (outputs and attention logits may be smaller at the start in wider models). A
program is

    right      all sizes and changes are as claimed, and there is no finding
    found      there is a finding, and nothing before its place scales
    refused    `mup_init` raises a `MujaxError`
    failure    something scales with the width, and no finding names its place; or an error of another kind

A finding is needless where nothing scales with the width in spite of it. Each program is measured at two
widths first, with a tolerance that noise alone exceeds at times; what does not pass is measured at four, at
four larger ones with more seeds, at two that are larger still, and there with 24 seeds before it counts as a
failure. NumPy computes the numbers (`_evaluate`), since a compiler takes longer than these programs.

    python benchmarks/soundness.py [--programs 10000] [--start 0] [--seed 0] [--jobs 2] [--quick] [--out FILE]

Each program's result is a line of FILE with the ending `.jsonl`; the run is resumed from there. `--show N`
prints program N and its measurements. Goals: no failures, and findings in less than 20 % of the programs that
do not scale.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    # Before NumPy and JAX are imported: one thread a process.
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # What is compiled, to sample initial values, runs once.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import argparse
import collections
import concurrent.futures
import dataclasses
import gc
import json
import math
import multiprocessing
import pathlib
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final
from unittest import mock

import _programs
import common
import jax
import jax.numpy as jnp
import numpy as np
from _evaluate import Choices, Evaluator, key
from _programs import BASE, Program, Writer as Writer, generate as generate

import mujax


@dataclasses.dataclass(frozen=True)
class Round:
    """One way to measure a program.

    Attributes:
        widths: the widths.
        seeds: how many.
        tolerance: how far a slope may be from what is claimed; misreadings are off by at least 1/2 in a wide
            model.
        errors: how many standard errors are allowed besides.
    """

    widths: tuple[int, ...]
    seeds: int
    tolerance: float = 0.25
    errors: float = 2.0


SIFT: Final = Round((32, 256), 2, tolerance=0.15, errors=0.0)
"""Two widths only, and a tolerance that is exceeded by noise alone: what passes needs no second look."""
LAST: Final = Round((1024, 2048), 8, tolerance=0.15)
"""What falls at the start, a readout or a router's logits, has to be small before its effect is gone: a
readout that is larger than its targets, or a sharp choice of experts, still shows at 512."""
SURE: Final = dataclasses.replace(LAST, seeds=24)
"""More seeds: of some thousand programs with heavy tails, a few look wrong by chance."""
HALF: Final = 0.5
ROUNDS: Final = (
    SIFT,
    Round((32, 64, 128, 256), 3),
    Round((64, 128, 256, 512), 8),
    LAST,
    SURE,
)
RATE: Final = 2.0**-9
EPSILON: Final = 1e-12
SCALE: Final = 2.0**40
"""A factor on the loss, so that the smallest gradient counts: float32 has no squares below 1e-38."""
CLEAR: Final = 0.4
OWN_POWER: Final = re.compile(r"[*/] n\b|sqrt\(n\b|\.(?:sum|mean)\(-1\)|linalg\.norm\(h")
"""A line that changes a scale by a power of the width: a constant, a sum over the width or a norm of it."""
ROUTER: Final = re.compile(r"nn\.softmax\(s\d+, -1\)")
"""The line of a router's weights."""
STARTS: Final = re.compile(r"the growth starts at (\S+:\d+)")
"""The place that a finding names beside its own."""
CONCENTRATED: Final = 0.1
FAILURES: Final = common.Goal(0, "0")
NEEDLESS: Final = common.Goal(0.2, "20 %")


@dataclasses.dataclass(frozen=True)
class Wrong:
    """A value that does not scale as claimed.

    Attributes:
        tap: its name.
        line: its line in the program.
        what: `"size"`, or the parameter that changes it.
        slope: of its log2 over the log2 of the width.
        error: the slope's standard error.
        allowed: the least and the largest slope that is right.
    """

    tap: str
    line: int
    what: str
    slope: float
    error: float
    allowed: tuple[float, float]

    @property
    def apart(self) -> float:
        """How far it is from what is allowed."""
        return max(self.allowed[0] - self.slope, self.slope - self.allowed[1])

    def __str__(self) -> str:
        what = "size" if self.what == "size" else f"change by {self.what}"
        low, high = self.allowed
        slope = f"n^{self.slope:.2f} ± {self.error:.2f}, allowed {low:g} to {high:g}"
        return f"{self.tap} (line {self.line}) {what}: {slope}"


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a program.

    Attributes:
        number: the program's.
        outcome: `"right"`, `"found"`, `"refused"` or `"failure"`.
        kind: of a failure, roughly, to count them by; else of the first finding or error.
        wrong: the values that do not scale as claimed, in words.
        findings: kind, place and text of each.
        needless: whether there is a finding though nothing scales.
        error: the error's text.
        seconds: taken.
    """

    number: int
    outcome: str
    kind: str = ""
    wrong: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()
    needless: bool = False
    error: str = ""
    seconds: float = 0.0


def _loss(outputs: Any) -> jax.Array:
    """Distance from fixed targets of order one, per entry."""
    total = jnp.float32(0)
    for number, out in enumerate(jax.tree.leaves(outputs)):
        rng = np.random.default_rng(number)
        target = jnp.asarray(rng.normal(size=out.shape), jnp.float32)
        total += jnp.mean((out - target) ** 2)
    return total


def read(program: Program, width: int, base: int = BASE) -> mujax.MupModel:
    """The program in µP."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with mock.patch("mujax.core.frontends._functional.sample", sampled):
            return mujax.mup_init(program.model(width), program.model(base), *_programs.inputs())


def sampled(
    function: Callable[..., Any], key: Any, inputs: Sequence[Any], kwargs: Any, pick: Callable[[Any], Any]
) -> list[Any]:
    """Initial values, as mujax samples them, without a compiler: by `_evaluate`, like all numbers here."""
    del kwargs
    program = jax.make_jaxpr(lambda key, *inputs: pick(function(key, *inputs)))(key, *inputs)
    return Evaluator(program)([key, *inputs])


def measure(
    mup: mujax.MupModel, program: Program, seeds: int, zero: Sequence[str] = ()
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sizes and changes of the tapped values.

    Args:
        mup: the model in µP.
        program: the program that it is.
        seeds: the number of initial values.
        zero: the parameters that start at zero instead.

    Returns:
        Root mean squares, by seed and tap; changes of the same by seed, parameter (the last is all together)
        and tap; the largest share in a softmax of the value, by seed and tap.
    """
    replay = mup.replay
    names = list(program.params)
    tx = mujax.mup_adam(RATE, mup.spec, eps=EPSILON)
    program_of_init, shapes = jax.make_jaxpr(lambda key: replay.init(key)[0], return_shape=True)(
        jax.random.key(0)
    )
    begin = Evaluator(program_of_init)
    # As JAX orders the leaves of a dict.
    order = sorted(shapes)

    def loss(p: Any) -> jax.Array:
        return SCALE * _loss(replay.apply(p, jax.tree.leaves(p))[0])

    def step(p: Any) -> Any:
        # Adam does not see a factor on a gradient; float32 has no squares above 1e38.
        grads = jax.tree.map(lambda g: g / jnp.maximum(jnp.abs(g).max(), 1e-30), jax.grad(loss)(p))
        return tx.update(grads, tx.init(p), p)[0]

    moves = Evaluator(jax.make_jaxpr(step)(shapes))
    labels = ["tap " + tap.name for tap in program.taps]

    def rms(a: Any) -> float:
        return float(np.sqrt(np.mean(np.square(np.abs(a), dtype=np.float64))))

    def largest_share(a: Any) -> float:
        with np.errstate(over="ignore", invalid="ignore"):
            shares = np.exp(np.real(a) - np.real(a).max(-1, keepdims=True)) if np.ndim(a) else np.ones(1)
            return float(np.mean(1 / shares.sum(-1)))

    sizes, changes, peaks = [], [], []
    for seed in range(seeds):
        params = begin([key(100 + seed)])
        params = [0 * a if name in zero else a for name, a in zip(order, params, strict=True)]
        # What an argmax chooses stays chosen: a step of finite size flips a few choices, by chance.
        choices: Choices = {}
        moves.start()
        before = moves.taps(params, labels, choices)
        updates = moves(params)
        rows = []
        for name in [*names, None]:
            moved = [
                a + u if name in (None, n) else a for n, a, u in zip(order, params, updates, strict=True)
            ]
            rows.append([rms(a - b) for a, b in zip(moves.taps(moved, labels, choices), before, strict=True)])
        sizes.append([rms(a) for a in before])
        peaks.append([largest_share(a) for a in before])
        changes.append(rows)
    return np.array(sizes), np.array(changes), np.array(peaks)


def _slope(widths: Sequence[int], values: np.ndarray) -> tuple[float, float]:
    """Slope of log2 of the root mean square over seeds, and its standard error (0 for one seed).

    Args:
        widths: the widths.
        values: by width and seed.
    """

    def fit(v: np.ndarray) -> float:
        return float(np.polyfit(np.log2(widths), np.log2(np.sqrt(np.mean(v**2, axis=1))), 1)[0])

    count = values.shape[1]
    parts = [fit(np.delete(values, seed, axis=1)) for seed in range(count)] if count > 1 else [0.0]
    return fit(values), math.sqrt((count - 1) * np.var(parts))


def judge(
    program: Program,
    how: Round,
    sizes: Sequence[np.ndarray],
    changes: Sequence[np.ndarray],
    shares: Sequence[np.ndarray],
) -> list[Wrong]:
    """The values that scale other than claimed."""
    out: list[Wrong] = []
    names = list(program.params)
    size, change = np.stack(sizes), np.stack(changes)

    # The mean of a uniform kernel is brought to 1 / fan-in, and with it goes what all entries of an
    # activation have in common, while its deviations stay: until these are the larger part, sizes and changes
    # fall, and changes behind a norm, which takes the common part out, grow. The same holds for a sum over
    # the width that is brought to the size that it can reach.
    sums = any(re.search(r"tanh\(\w+\.sum\(-1", line) for line in program.body)
    means = any("nn.initializers.uniform" in init for init in program.params.values())
    slack = -0.5 if sums or means else 0.0
    norms = [line for line, name in program.steps if name == "norm"] if means else []

    def check(tap: Any, what: str, values: np.ndarray, scale: np.ndarray, low: float) -> None:
        if not np.isfinite(values[0]).all():
            # As the narrowest model is by itself: a root of zero, say.
            return
        if not np.isfinite(values).all():
            out.append(Wrong(tap.name, tap.line, what, math.inf, 0.0, (low, 0.0)))
            return
        # Zero, or rounding: nothing to measure.
        if (values <= 1e-30).any() or (values < 3e-6 * scale).any():
            return
        slope, error = _slope(how.widths, values)
        high = 0.5 if what != "size" and min(norms, default=tap.line + 1) <= tap.line else 0.0
        wrong = Wrong(tap.name, tap.line, what, slope, error, (low, high))
        if wrong.apart - how.errors * error > how.tolerance:
            out.append(wrong)

    for number, tap in enumerate(program.taps):
        check(tap, "size", size[:, :, number], 0 * size[:, :, number], tap.lo + slack)
        for name in tap.params:
            values = change[:, :, names.index(name), number]
            low = tap.change_lo + slack + program.slower.get(name, 0.0)
            check(tap, name, values, size[:, :, number], low)
        # Whatever else changes it must not change it more in a wider model.
        for position, what in enumerate([*names, "all"]):
            if what not in tap.params:
                check(tap, what, change[:, :, position, number], size[:, :, number], -math.inf)
    return [one for one in out if one.line < _concentrated(program, np.stack(shares))]


def lasting(wrong: Sequence[Wrong], before: Sequence[Wrong], how: Round) -> list[Wrong]:
    """Those of the wrong values whose slope is not well on its way to what is allowed.

    A power of the width has one slope at all widths. What is left of an effect that falls, such as that of
    a router's logits on the choice of experts, has half the slope or less at four times the width. Values
    behind one whose size still settles are not judged.

    Args:
        wrong: the wrong values.
        before: those of the round before, at smaller widths.
        how: how they were measured.
    """
    was = {(one.tap, one.what): one.apart for one in before}

    def lasts(one: Wrong) -> bool:
        return one.apart - how.errors * one.error > HALF * was.get((one.tap, one.what), 0.0)

    settling = min((one.line for one in wrong if one.what == "size" and not lasts(one)), default=math.inf)
    return [one for one in wrong if lasts(one) and one.line <= settling]


def _without_routers(
    program: Program, mups: Mapping[int, mujax.MupModel], how: Round, wrong: Sequence[Wrong]
) -> list[Wrong]:
    """Those of the wrong values that are wrong too where the routers have no preference.

    A router's logits fall as 1/sqrt(n), so that the weights of its experts become equal; until they are,
    what is computed with them falls as well, and powers of it by more. In the limit they are zero.
    """
    routers = [line for line, text in enumerate(program.body, start=2) if ROUTER.search(text)]
    zero = [name for name in program.params if name.startswith("r")]
    if not routers or all(one.line < routers[0] for one in wrong):
        return list(wrong)
    measured = [measure(mups[width], program, how.seeds, zero) for width in how.widths]
    limit = {(one.tap, one.what) for one in judge(program, how, *zip(*measured, strict=True))}
    return [one for one in wrong if one.line < routers[0] or (one.tap, one.what) in limit]


def _concentrated(program: Program, shares: np.ndarray) -> float:
    """The first line with a softmax over the width that a few of its entries dominate at these widths.

    Its sum is what it is in wide models only where these have many more than exp(deviation^2) entries, and
    grows for ever where the entries are products of several normal ones.
    """
    names = [tap.name for tap in program.taps]
    for line, text in enumerate(program.body, start=2):
        found = re.search(r"nn\.(?:softmax|logsumexp)\((h\d+), -1", text)
        if found and found[1] in names and np.mean(shares[-1, :, names.index(found[1])]) > CONCENTRATED:
            return line
    return math.inf


def _line(text: str, program: Program) -> int:
    """The line of the program that a place in words names; 0 if none."""
    found = re.match(re.escape(program.file) + r":(\d+)", text)
    return int(found[1]) if found else 0


def _place(text: str, program: Program) -> int:
    """The first line of the step that a finding's place is in; a large number where it names none."""
    line = _line(text, program)
    if line:
        return program.step_of(line)[0]
    if text in program.params:
        lines = [n for n, line in enumerate(program.body, start=2) if f'p["{text}"]' in line]
        return program.step_of(min(lines))[0] if lines else 10**6
    return 10**6


def silent(
    program: Program, wrong: Sequence[Wrong], findings: Sequence[Any], corrections: Sequence[Any]
) -> list[Wrong]:
    """Those of the wrong values that nothing explains.

    A finding explains those at its place and after it, and changes before it that are too small, since
    gradients come back through it. A norm, or a `scale` correction, takes a wrong scale out: it explains
    those right before it, if nothing after it is wrong. So does a finding, where the scale is a constant of
    the model's own.
    """
    places = [_place(finding.where, program) for finding in findings]
    places += [_place(where, program) for one in findings for where in STARTS.findall(one.message)]
    first = min(places, default=10**6)
    if any(one.line >= first for one in wrong):
        wrong = [one for one in wrong if one.what == "size" or one.slope > one.allowed[1]]
    bad = {one.line for one in wrong if one.line < first}
    if not bad:
        return []
    repairs = [_line(one.where, program) for one in corrections if one.kind == "scale"]
    repairs += [line for line, name in program.steps if name == "norm"]
    # A power of n in the model is taken out where it matters, by another or by a factor, or reported there.
    constants = [line for line, text in enumerate(program.body, start=2) if OWN_POWER.search(text)]
    unexplained: set[int] = set()
    for group in _neighbours(bad, program):
        undone = [*repairs, *places, *constants] if min(group) in constants else repairs
        # Were a value in between right, something else would have hidden the scale: it may saturate.
        if not any(repair > max(group) and _next_right(group, program) >= repair for repair in undone):
            unexplained |= group
    return [one for one in wrong if one.line in unexplained]


def _neighbours(bad: set[int], program: Program) -> list[set[int]]:
    """Lines with wrong values, by those between which no value is right; logits have norms of their own."""
    groups: list[set[int]] = [set()]
    for tap in program.taps:
        if tap.line in bad:
            groups[-1].add(tap.line)
        elif not tap.name.startswith("s") and groups[-1]:
            groups.append(set())
    return [group for group in groups if group]


def _next_right(group: set[int], program: Program) -> float:
    """The line of the first right value after wrong ones."""
    after = (tap.line for tap in program.taps if tap.line > max(group) and not tap.name.startswith("s"))
    return min(after, default=math.inf)


def run(program: Program, number: int = 0, rounds: Sequence[Round] = ROUNDS) -> Result:
    """Reads and measures one program: as the first of `rounds` says, as the next ones if it looks wrong."""
    begin = time.perf_counter()

    def result(outcome: str, **fields: Any) -> Result:
        return Result(number, outcome, seconds=round(time.perf_counter() - begin, 2), **fields)

    try:
        wrong: list[Wrong] = []
        before: list[Wrong] = []
        findings: tuple[Any, ...] = ()
        corrections: Sequence[Any] = ()
        mups: dict[int, mujax.MupModel] = {}
        for how in rounds:
            before = wrong if how is not SURE else before
            # The widest first: most programs that are refused are refused there.
            for width in sorted(set(how.widths) - mups.keys(), reverse=True):
                mups[width] = read(program, width)
            findings, corrections = mups[how.widths[-1]].findings, mups[how.widths[-1]].corrections
            measured = [measure(mups[width], program, how.seeds) for width in how.widths]
            wrong = judge(program, how, *zip(*measured, strict=True))
            if how in (LAST, SURE):
                wrong = lasting(wrong, before, how)
                if silent(program, wrong, findings, corrections):
                    wrong = _without_routers(program, mups, how, wrong)
            # A finding is needless or not by the later rounds, unless it is clear.
            unclear = findings and wrong and max(one.apart for one in wrong) < CLEAR
            if not silent(program, wrong, findings, corrections) and not (unclear and how is SIFT):
                break
    except mujax.MujaxError as error:
        return result("refused", kind=type(error).__name__, error=str(error))
    except Exception as error:
        text = "".join(traceback.format_exception(error)[-3:])
        return result("failure", kind=f"{type(error).__name__}", error=text[-1500:])
    said = tuple(f"{finding.kind} at {finding.where}: {finding.message}" for finding in findings)
    bad = silent(program, wrong, findings, corrections)
    if bad:
        first = min(bad, key=lambda one: (one.line, one.what != "size"))
        what = "size" if first.what == "size" else "change"
        power = round(2 * first.slope) / 2 if math.isfinite(first.slope) else first.slope
        kind = f"{program.step_of(first.line)[1]}: {what} n^{power:g}"
        return result("failure", kind=kind, wrong=tuple(map(str, bad)), findings=said)
    if findings:
        return result(
            "found", kind=findings[0].kind, wrong=tuple(map(str, wrong)), findings=said, needless=not wrong
        )
    return result("right")


def _run_numbered(seed: int, number: int) -> Result:
    # Traces are many small objects: collected now and then, and not whenever there are some more.
    gc.disable()
    if number % 50 == 0:
        jax.clear_caches()
    if number % 10 == 0:
        gc.collect()
    try:
        return run(generate(seed, number), number)
    except Exception as error:
        return Result(number, "failure", kind="generator", error=repr(error))


def minimised(program: Program, number: int = 0) -> Program:
    """The program without the steps that its failure does not need."""
    kind = run(program, number).kind
    again = True
    while again:
        again = False
        for part in reversed(program.parts):
            less = program.without(part)
            result = run(less, number)
            if result.outcome == "failure" and (result.kind == kind or not result.error):
                program, again = less, True
                break
    return program


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the programs, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--programs", type=int, default=10_000)
    parser.add_argument("--start", type=int, default=0, help="number of the first program")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--show", type=int, help="print this program and its measurements, and no more")
    parser.add_argument(
        "--minimise", action="store_true", help="with --show: leave out what a failure does not need"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run: at most three programs")
    parser.add_argument("--out", type=pathlib.Path, default=common.OUT / "soundness.json")
    options = parser.parse_args(argv)
    if options.show is not None:
        program = generate(options.seed, options.show)
        if options.minimise:
            program = minimised(program, options.show)
        print("\n".join(f"{n:3} {line}" for n, line in enumerate(program.source().split("\n"), start=1)))
        print(json.dumps(dataclasses.asdict(run(program, options.show)), indent=1))
        return 0
    for name in ("programs", "jobs"):
        value = getattr(options, name)
        if value < 1:
            parser.error(f"--{name}: expected at least 1, got {value}.")
    count = min(options.programs, 3) if options.quick else options.programs
    lines = options.out.with_suffix(".jsonl")
    lines.parent.mkdir(parents=True, exist_ok=True)
    wanted = range(options.start, options.start + count)
    done: dict[int, dict[str, Any]] = {}
    if lines.exists():
        # A run that was killed may have left half a line.
        whole = [text for text in lines.read_text().splitlines(keepends=True) if text.endswith("\n")]
        lines.write_text("".join(whole))
        for one in map(json.loads, whole):
            if one["seed"] == options.seed and one["number"] in wanted:
                done[one["number"]] = one
    left = [number for number in wanted if number not in done]
    begin = time.perf_counter()
    with lines.open("a") as file:

        def keep(result: Result) -> None:
            one = {"seed": options.seed, **dataclasses.asdict(result)}
            done[result.number] = one
            file.write(json.dumps(one) + "\n")
            file.flush()
            fresh = len(left) - sum(number not in done for number in left)
            rest = (time.perf_counter() - begin) / fresh * (len(left) - fresh)
            if fresh % 25 == 0 or result.outcome == "failure":
                failures = sum(one["outcome"] == "failure" for one in done.values())
                print(
                    f"{len(done)} of {count}: {failures} failures; {rest:.0f} s left"
                    + (f"; program {result.number}: {result.kind}" if result.outcome == "failure" else ""),
                    file=sys.stderr,
                    flush=True,
                )

        if options.jobs == 1 or options.quick:
            for number in left:
                keep(_run_numbered(options.seed, number))
        elif left:
            context = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
                futures = [pool.submit(_run_numbered, options.seed, number) for number in left]
                for future in concurrent.futures.as_completed(futures):
                    keep(future.result())
    report = summary([done[number] for number in sorted(done)], quick=options.quick)
    common.write(options.out, {**report, "seed": options.seed, **common.environment()})
    return 0


def summary(results: Sequence[dict[str, Any]], *, quick: bool) -> dict[str, Any]:
    """Prints the tables and returns them."""
    counts = collections.Counter(one["outcome"] for one in results)
    # Whether a refused program scales is not known; it is counted among those that do not.
    level = [one for one in results if one["outcome"] == "right" or one["needless"]]
    needless = sum(one["needless"] for one in results) / max(1, len(level))
    rows = [(name, str(counts[name])) for name in ("right", "found", "refused", "failure")]
    print(common.table(("programs", str(len(results))), rows))
    kinds: dict[str, dict[str, int]] = {}
    for outcome in ("failure", "found", "refused"):
        found = collections.Counter(one["kind"] for one in results if one["outcome"] == outcome)
        kinds[outcome] = dict(found.most_common())
        if found:
            example = {one["kind"]: one["number"] for one in reversed(results) if one["outcome"] == outcome}
            print()
            print(
                common.table(
                    (outcome, "count", "first"),
                    [(kind, str(n), str(example[kind])) for kind, n in found.most_common()],
                )
            )
    seconds = sum(one["seconds"] for one in results) / max(1, len(results))
    print(
        f"\nFindings in {needless:.1%} of {len(level)} programs that do not scale. {seconds:.2f} s a program."
    )
    missed = [
        *FAILURES.missed_by("silent failures", counts["failure"]),
        *NEEDLESS.missed_by("needless findings", needless),
    ]
    print(common.verdict(missed, quick=quick))
    return {
        "programs": len(results), "outcomes": counts, "kinds": kinds, "needless": needless, "missed": missed,
        "seconds_each": seconds, "failures": [one for one in results if one["outcome"] == "failure"],
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
