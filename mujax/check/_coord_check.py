"""The coordinate check: trains a model at several widths for a few steps to see whether it is in µP.

Records every tap over widths, steps and seeds, fits how each quantity scales with width, compares with the
theory, and names the parameter or place that breaks a rule.

References:
    Yang et al., Tensor Programs V, arXiv 2203.03466, Appendix D.1.
    microsoft/mup, mup.coord_check: the same idea as a picture.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

from mujax._arguments import (
    ARRAYS,
    CALLBACK,
    COUNT,
    FACTORY,
    LOSS,
    NAMED,
    NONE,
    OPTIMIZER,
    POSITIVE,
    SEED,
    WIDTHS,
    several,
    takes,
)
from mujax.check._faults import Violation, alike, find_faults
from mujax.check._made_up import loss_of_one, made_up
from mujax.check._measure import STATS, Batch, Measured, Program, Subject
from mujax.check._misread import find_misread, overruled
from mujax.check._models import Optimizer, models_at, optimizer_of
from mujax.check._optimizer_response import Probe, Response
from mujax.check._optimum import Status
from mujax.check._slopes import Check, judge, settled
from mujax.check._taps import find_taps
from mujax.core import MupModel, mup_init
from mujax.errors import ConfigError, MujaxWarning
from mujax.optim import OPTIMIZERS
from mujax.spec import ParamSpec, Role
from mujax.train import OutputLoss, as_inputs, check_batches

# Large, as the guide of microsoft/mup recommends, and a second one further up: a small rate can hide a fault
# behind the initial values.
_RATES: Final[Mapping[bool, tuple[float, float]]] = {True: (2.0**-5, 2.0**-3), False: (2.0**-9, 2.0**-7)}

_LEARNING_RATES: Final = several(
    "at least one positive finite learning rate", POSITIVE, "(2**-9, 2**-7)", least=1
)


@dataclasses.dataclass(frozen=True)
class TapReport:
    """The result at one tap.

    Attributes:
        name: module path, parameter or place.
        kind: see `mujax.check._taps.Tap`.
        where: `file:line` in the user's code.
        params: the parameters that it multiplies, adds or looks up.
        status: the worst of its checks, over learning rates.
        blamed: a rule is broken here; a tap that fails without it inherits its fault.
        checks: learning rate -> its checks.
    """

    name: str
    kind: str
    where: str
    params: tuple[str, ...]
    status: Status
    blamed: bool
    checks: Mapping[float, tuple[Check, ...]]

    @property
    def worst(self) -> Check | None:
        """The check that decided the status: of the worst ones, the one furthest outside."""
        all_checks = [check for checks in self.checks.values() for check in checks]
        decisive = [check for check in all_checks if check.status == self.status]
        return max(decisive, key=_excess, default=None)


def _excess(check: Check) -> float:
    if check.slope is None:
        return math.inf
    low, high = check.allowed
    return max(low - check.slope.value, check.slope.value - high)


@dataclasses.dataclass(frozen=True)
class CoordCheck:
    """The result of a coordinate check.

    Attributes:
        verdict: `"pass"`, `"fail"`, or `"undecided"` if the noise is too large.
        faults: the broken rules, each with the parameter or place.
        taps: the result at each tap, in program order.
        widths: ascending.
        learning_rates: the rates that were tried.
        steps: optimizer steps of each run.
        seeds: number of seeds that were run.
        parametrization: of the models that were checked.
        sizes: learning rate -> mean absolute entries (widths, steps + 1, taps, quantities), geometric mean
            over seeds; the quantities are `mujax.check.STATS`.
        losses: learning rate -> (widths, steps + 1), mean over seeds.
    """

    verdict: Status
    faults: tuple[Violation, ...]
    taps: tuple[TapReport, ...]
    widths: tuple[int, ...]
    learning_rates: tuple[float, ...]
    steps: int
    seeds: int
    parametrization: str
    sizes: Mapping[float, np.ndarray]
    losses: Mapping[float, np.ndarray]

    def __bool__(self) -> bool:
        return self.verdict == "pass"

    def __str__(self) -> str:
        return "\n".join([self.headline(), "", *self.table(), *self.explained()])

    def headline(self) -> str:
        """The verdict in a sentence."""
        failed = [tap for tap in self.taps if tap.status == "fail"]
        where = f"widths {', '.join(map(str, self.widths))}, {self.steps} steps, {self.seeds} seeds"
        if self.verdict == "pass":
            return f"PASS: nothing depends on width in {len(self.taps)} taps ({where})."
        if self.verdict == "undecided":
            open_ = sum(tap.status == "undecided" for tap in self.taps)
            return (
                f"UNDECIDED: {open_} of {len(self.taps)} taps cannot be distinguished from noise ({where}); "
                "use more seeds or a wider range of widths."
            )
        if not failed:
            return f"FAIL: rules are broken, although these steps do not show it ({where})."
        return f"FAIL: {len(failed)} of {len(self.taps)} taps depend on width ({where})."

    def table(self) -> list[str]:
        """The taps as lines of text: name, status, and the exponent that decided it."""
        rows = [("tap", "kind", "status", "quantity", "exponent", "allowed")]
        for tap in self.taps:
            check = tap.worst
            status = "fail (inherited)" if tap.status == "fail" and not tap.blamed else tap.status
            if check is None:
                rows.append((tap.name, tap.kind, status, "", "", ""))
            else:
                allowed = f"{check.allowed[0]:.2f} to {check.allowed[1]:.2f}"
                rows.append((tap.name, tap.kind, status, check.quantity, _shown(check), allowed))
        sizes = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        padded = ([cell.ljust(size) for cell, size in zip(row, sizes, strict=True)] for row in rows)
        return ["  ".join(row).rstrip() for row in padded]

    def explained(self) -> list[str]:
        """The broken rules as lines of text, similar ones together."""
        lines = ["", "Look at:"] if self.faults else []
        for first, *others in alike(self.faults):
            lines.append(f"  {first.message} [{first.where}]")
            if others:
                lines.append(f"    likewise: {', '.join(one.name for one in others)}")
        return lines

    def to_json(self) -> str:
        """Everything, as JSON."""
        taps = [
            {
                "name": tap.name,
                "kind": tap.kind,
                "where": tap.where,
                "params": tap.params,
                "status": tap.status,
                "blamed": tap.blamed,
                "checks": {
                    f"{rate:g}": list(map(dataclasses.asdict, checks)) for rate, checks in tap.checks.items()
                },
                "sizes": {f"{rate:g}": sizes[:, :, number] for rate, sizes in self.sizes.items()},
            }
            for number, tap in enumerate(self.taps)
        ]
        content = {
            "verdict": self.verdict,
            "widths": self.widths,
            "learning_rates": self.learning_rates,
            "steps": self.steps,
            "seeds": self.seeds,
            "parametrization": self.parametrization,
            "faults": list(map(dataclasses.asdict, self.faults)),
            "quantities": STATS,
            "taps": taps,
            "losses": {f"{rate:g}": losses for rate, losses in self.losses.items()},
        }
        return json.dumps(_plain(content), indent=1, allow_nan=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_json` to a file.

        Raises:
            OSError: the file can't be written.
        """
        with open(path, "w", encoding="utf-8") as file:
            file.write(self.to_json())


def _shown(check: Check) -> str:
    if check.slope is None:
        return check.note
    slope = check.slope
    text = f"{slope.value:+.2f} ({slope.low:+.2f} to {slope.high:+.2f})"
    return f"{text}, {check.note}" if check.note else text


def _plain(value: Any) -> Any:
    """The value as JSON can hold it: None for numbers that are not finite."""
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclasses.dataclass(frozen=True)
class CheckProgress:
    """How far a check is.

    Attributes:
        done: runs finished.
        total: runs in all.
        work_done: share of the work finished, from 0 to 1.
        doing: the work in progress.
    """

    done: int
    total: int
    work_done: float
    doing: str


@takes(
    factory=FACTORY,
    widths=WIDTHS,
    inputs=ARRAYS | NONE,
    optimizer=OPTIMIZER,
    loss=LOSS | NONE,
    learning_rates=_LEARNING_RATES | NONE,
    steps=COUNT,
    seeds=COUNT,
    seed=SEED,
    base=FACTORY | NONE,
    base_width=COUNT | NONE,
    kwargs=NAMED | NONE,
    progress=CALLBACK | NONE,
)
def coord_check(
    factory: Callable[[int], Any],
    widths: Sequence[int],
    inputs: Any = None,
    optimizer: str | Optimizer = "adam",
    *,
    batches: Sequence[tuple[Any, Any]] | None = None,
    loss: OutputLoss | None = None,
    learning_rates: Sequence[float] | None = None,
    steps: int = 6,
    seeds: int = 4,
    seed: int = 0,
    base: Callable[[int], Any] | None = None,
    base_width: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
    progress: Callable[[CheckProgress], None] | None = None,
    **mup_kwargs: Any,
) -> CoordCheck:
    """Checks by training whether a model, its initialisation and its optimizer are in µP.

    Trains the model at each width for a few steps and measures every product, convolution, lookup, bias,
    gain, norm and output, each call of a reused module separately. Three slopes over width decide on a tap:
    of its size, of its change since initialisation, and of the effect of its own parameters' first update.
    In addition, initial values, constants and the optimizer's response are compared with the rules for each
    parameter; this names the culprit.

    Args:
        factory: width -> a Linen module, an NNX factory `rngs -> nnx.Module`, a `Functional`, or a
            `MupModel`, which is checked unchanged.
        widths: at least two; three or more, a factor of 8 apart, are advised.
        inputs: the model's input, or a tuple of its positional inputs: concrete arrays. Targets are made
            up; pass `batches` for real ones.
        optimizer: a name such as `"adamw"`, or (learning rate, spec) -> optax transform.
        batches: (inputs, targets) of each step, in place of `inputs`; taken again from the first when
            there are fewer than steps. Activations are always read on the first.
        loss: (model output, targets) -> scalar; cross-entropy for integer targets, squared error for others.
        learning_rates: two large ones by default.
        steps: optimizer steps.
        seeds: number of seeds, the repeats that the intervals are based on. A model that passes stops after
            fewer, two at the least, if every interval is well within what is allowed; one that does not
            pass is trained with all of them.
        seed: the first of them.
        base: target width -> base model; `factory(base_width)` by default.
        base_width: the smallest of `widths` by default.
        kwargs: keyword arguments of the model.
        progress: called as runs finish.
        **mup_kwargs: passed to `mup_init`: `parametrization`, `roles`, `corrections`, ...

    Returns:
        The verdict, the broken rules and the measurements.

    Raises:
        ConfigError: arguments that make no sense.
        MujaxError: as `mup_init` does.

    Example:
        >>> import flax.linen as nn, jax.numpy as jnp, mujax
        >>> def net(width):
        ...     return nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(width), nn.relu, nn.Dense(4)])
        >>> x = jnp.sin(jnp.arange(64.0)).reshape(8, 8)
        >>> mujax.coord_check(net, (32, 64, 128), x, steps=2, seeds=3).verdict
        'pass'

    Reference:
        Yang et al., Tensor Programs V, arXiv 2203.03466, Appendix D.1.
    """
    if (inputs is None) == (batches is None):
        raise ConfigError(where="inputs", expected="either inputs or batches", got="both or neither")
    if batches is None and loss is not None:
        raise ConfigError(
            where="loss", expected="batches with targets beside a loss of your own", got="inputs only"
        )
    listed = None if batches is None else check_batches(batches)
    examples = as_inputs(inputs) if listed is None else as_inputs(listed[0][0])
    clean, models, checked = prepare(
        factory, widths, examples, optimizer, base, base_width, kwargs, **mup_kwargs
    )
    given = [(as_inputs(x), y) for x, y in listed or ()] or made_up(clean, examples, seed)
    rates = _default_rates(optimizer) if learning_rates is None else tuple(map(float, learning_rates))
    numbers = range(seed, seed + seeds)
    probes = probes_at_ends(checked)
    found: list[CoordCheck] = []

    def enough(measured: Mapping[int, Measured]) -> bool:
        found[:] = [verdict(measured)]
        return passes_clearly(found[0])

    def verdict(measured: Mapping[int, Measured]) -> CoordCheck:
        responses = respond_at_ends(checked, measured, rates[0], probes)
        return report(clean, models, checked, measured, responses, rates, steps)

    measured = measure(
        checked,
        loss or loss_of_one,
        given,
        rates,
        steps,
        numbers,
        progress,
        enough=enough,
        beside=[probe.compile for probe in probes],
    )
    if found and found[0].seeds == len(measured[min(measured)].initial):
        return found[0]
    return verdict(measured)


def passes_clearly(check: CoordCheck) -> bool:
    """Whether it passes with every interval well within what is allowed, so that more seeds say nothing new.

    Only a pass ends a check early, so no correct model fails because of it.
    """
    checks = (one for tap in check.taps for found in tap.checks.values() for one in found)
    return check.verdict == "pass" and all(map(settled, checks))


def prepare(
    factory: Callable[[int], Any],
    widths: Sequence[int],
    inputs: tuple[Any, ...],
    optimizer: str | Optimizer,
    base: Callable[[int], Any] | None = None,
    base_width: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
    **mup_kwargs: Any,
) -> tuple[MupModel, dict[int, MupModel], dict[int, Subject]]:
    """The models of a check: see `coord_check` for the arguments.

    Returns:
        The widest model against the narrowest; the models to check, by width; the same with optimizer and
        taps.
    """
    of_rate = optimizer_of(optimizer)
    models = models_at(factory, widths, base, base_width, inputs, kwargs, **mup_kwargs)
    clean = _clean(factory, models, inputs, kwargs, mup_kwargs.get("roles"))
    return clean, models, subjects(clean, models, of_rate)


def subjects(clean: MupModel, models: Mapping[int, MupModel], optimizer: Optimizer) -> dict[int, Subject]:
    """The models of a check with their optimizer and taps, by width.

    Args:
        clean: the widest model against the narrowest, whose taps they have.
        models: the models, by width.
        optimizer: (learning rate, spec) -> optax transform.
    """
    taps = find_taps(clean)
    return {width: Subject(mup.replay, _bound(optimizer, mup), taps) for width, mup in models.items()}


def _bound(optimizer: Optimizer, mup: MupModel) -> Callable[[Any], Any]:
    return lambda rate: optimizer(rate, mup.spec)


def _clean(
    factory: Callable[[int], Any],
    models: Mapping[int, MupModel],
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    roles: Mapping[str, Role | ParamSpec] | None,
) -> MupModel:
    """The widest model against the narrowest, in µP, with the roles that the user gives by name."""
    narrow, *_, wide = models
    model = factory(wide)
    if isinstance(model, MupModel):
        return models[wide]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MujaxWarning)
        return mup_init(model, factory(narrow), *inputs, roles=by_name(roles or {}), **(kwargs or {}))


def by_name(roles: Mapping[str, Role | ParamSpec]) -> dict[str, Role | ParamSpec]:
    """The roles that are given by name: a `ParamSpec` has the shapes of one pair of widths."""
    return {pattern: role for pattern, role in roles.items() if isinstance(role, str)}


def _default_rates(optimizer: Any) -> tuple[float, ...]:
    """Two large ones for the optimizer's family."""
    linear = isinstance(optimizer, str) and OPTIMIZERS[optimizer].family == "sgd"
    return _RATES[linear]


def measure(
    checked: Mapping[int, Subject],
    loss: OutputLoss,
    batches: Sequence[Batch],
    rates: Sequence[float],
    steps: int,
    seeds: Sequence[int],
    progress: Callable[[CheckProgress], None] | None = None,
    lanes: int | None = None,
    enough: Callable[[dict[int, Measured]], bool] | None = None,
    beside: Sequence[Callable[[], None]] = (),
) -> dict[int, Measured]:
    """Trains every model with every learning rate and seed.

    Args:
        checked: models, optimizers and taps, by width.
        loss: (model output, targets) -> scalar.
        batches: inputs and targets.
        rates: the learning rates.
        steps: optimizer steps of each run.
        seeds: the seeds.
        progress: called as runs finish.
        lanes: how many seeds to run at once; see `Program`.
        enough: called from the second seed on with the measurements so far; True ends the runs.
        beside: further programs to be compiled meanwhile.
    """
    update = progress or (lambda _: None)
    runs = len(rates) * len(seeds)
    total = len(checked) * runs
    # Compiling is most of the work of a small check; a wide model takes longer to run.
    weights = {width: 1.0 + 0.1 * (width / min(checked)) ** 2 * runs / 40 for width in checked}
    whole = 2 * len(checked) + sum(weights.values())
    done, work = 0, 0.0
    update(CheckProgress(0, total, 0.0, f"compiling for {len(checked)} widths"))
    # Compiled as well as the runs deserve that every model is trained for.
    least = len(rates) * (len(seeds) if enough is None else min(2, len(seeds)))
    programs = {
        width: Program(subject, loss, batches, seeds, least, steps, lanes)
        for width, subject in checked.items()
    }
    found: dict[int, list[list[list[Any]]]] = {width: [[] for _ in rates] for width in programs}
    out: dict[int, Measured] = {}
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    try:
        # What takes longest comes first, and runs while the others are compiled.
        waiting = {pool.submit(programs[width].compile): width for width in reversed(programs)}
        others = [pool.submit(compile_it) for compile_it in beside]

        def compiled() -> Iterator[int]:
            nonlocal work
            for future in concurrent.futures.as_completed(waiting):
                future.result()
                work += 2
                yield waiting[future]

        at_once = max(program.lanes for program in programs.values())
        first, *rest = _rounds(seeds, len(seeds) if enough is None or at_once > 1 else 1)
        for ready, some in [(compiled(), first), *((programs, some) for some in rest)]:
            for width in ready:
                for rate, rows in zip(rates, found[width], strict=True):
                    update(CheckProgress(done, total, work / whole, f"width {width}"))
                    for run in programs[width].run(rate, steps, some):
                        rows.append(run)
                        update(CheckProgress(done, total, work / whole, f"width {width}"))
                        done, work = done + 1, work + weights[width] / runs
            out = {width: _gathered(rows, programs[width].paths) for width, rows in found.items()}
            for other in others:
                other.result()
            if enough is not None and done < total and enough(out):
                break
    finally:
        # After Ctrl-C nothing more is compiled.
        pool.shutdown(cancel_futures=True)
    update(CheckProgress(total, total, 1.0, "done"))
    return out


def _rounds(seeds: Sequence[int], size: int) -> list[Sequence[int]]:
    """The seeds in groups of a size, of which the first has at least two."""
    first = max(2, size)
    return [seeds[:first], *(seeds[start : start + size] for start in range(first, len(seeds), size))]


def _gathered(found: list[list[list[Any]]], paths: tuple[str, ...]) -> Measured:
    """The measurements of the runs of each learning rate and seed."""
    rows = [[run[1:] for run in runs] for runs in found]
    taps, gradients, losses = (
        np.array([[[step[part] for step in run] for run in runs] for runs in rows], np.float64)
        for part in range(3)
    )
    return Measured(
        taps=taps,
        losses=losses,
        initial=np.array([run[0] for run in found[0]], np.float64),
        # Of the first step, which the first update responds to; a zero there comes from a zero elsewhere.
        gradients=np.where(
            gradients[:, :, 0].max((0, 1)) > 0, gradients[:, :, 0].max((0, 1)), gradients.max((0, 1, 2))
        ),
        paths=paths,
    )


def probes_at_ends(checked: Mapping[int, Subject]) -> tuple[Probe, Probe]:
    """The optimizer at the smallest and at the largest width."""
    narrow, *_, wide = checked
    return Probe(checked[narrow]), Probe(checked[wide])


def respond_at_ends(
    checked: Mapping[int, Subject],
    measured: Mapping[int, Measured],
    rate: float,
    probes: tuple[Probe, Probe] | None = None,
) -> list[Response]:
    """The response of the optimizer at the smallest and at the largest width."""
    narrow, *_, wide = checked
    both = zip(probes or probes_at_ends(checked), (measured[narrow], measured[wide]), strict=True)
    return [probe.respond(rate, found.gradients, found.initial.mean(0)) for probe, found in both]


def report(
    clean: MupModel,
    models: Mapping[int, MupModel],
    checked: Mapping[int, Subject],
    measured: Mapping[int, Measured],
    responses: Sequence[Response],
    rates: tuple[float, ...],
    steps: int,
) -> CoordCheck:
    """The verdict on the measurements.

    Args:
        clean: the widest model against the narrowest.
        models: the checked models, by width.
        checked: the same with optimizer and taps.
        measured: the measurements, by width.
        responses: of the optimizer at the smallest and the largest width.
        rates: the learning rates.
        steps: number of steps.
    """
    faults = find_faults(clean, models, checked, measured, responses)
    widths = tuple(models)
    taps = checked[widths[-1]].taps
    verified = not faults and all(np.all(one.linear | one.entrywise) for one in responses)
    table = np.stack([measured[width].taps for width in widths])
    blamed = {one.name for one in faults}
    reports = []
    for number, tap in enumerate(taps):
        # The rules hold for the roles that the user gives, right or wrong: the measurements decide.
        certain = verified and not overruled(clean, tap)
        checks = {
            rate: tuple(judge(tap, widths, table[:, which, :, :, number], certain))
            for which, rate in enumerate(rates)
        }
        statuses: list[Status] = [check.status for found in checks.values() for check in found]
        at_fault = tap.name in blamed or not blamed.isdisjoint(tap.params)
        reports.append(
            TapReport(tap.name, tap.kind, tap.where, tap.params, _worst(statuses), at_fault, checks)
        )
    if not faults and any(tap.status == "fail" for tap in reports):
        # No known rule is broken: a role was misread, or a constant is not seen.
        which = next(n for n, rate in enumerate(rates) if any(_failing(tap, rate) for tap in reports))
        failed = {n: found for n, tap in enumerate(reports) if (found := _failing(tap, rates[which]))}
        first = reports[next(iter(failed))]
        wide = measured[widths[-1]]
        faults = find_misread(clean, models, taps, failed, table[:, which], responses[-1].linear, wide.paths)
        blamed = {one.name for one in faults}
        if blamed.isdisjoint(name for tap in reports for name in (tap.name, *tap.params)):
            blamed.add(first.name)
        reports = [
            dataclasses.replace(tap, blamed=tap.name in blamed or not blamed.isdisjoint(tap.params))
            for tap in reports
        ]
    verdict = "fail" if faults else _worst([tap.status for tap in reports])
    with np.errstate(divide="ignore", invalid="ignore"):
        sizes = np.exp2(np.log2(table).mean(axis=2))
    losses = np.stack([measured[width].losses for width in widths]).mean(axis=2)
    return CoordCheck(
        verdict=verdict,
        faults=faults,
        taps=tuple(reports),
        widths=widths,
        learning_rates=rates,
        steps=steps,
        seeds=table.shape[2],
        parametrization=str(next(iter(models.values())).spec.parametrization),
        sizes={rate: sizes[:, which] for which, rate in enumerate(rates)},
        losses={rate: losses[:, which] for which, rate in enumerate(rates)},
    )


def _worst(statuses: Sequence[Status]) -> Status:
    if "fail" in statuses:
        return "fail"
    return "undecided" if "undecided" in statuses else "pass"


def _failing(tap: TapReport, rate: float) -> tuple[Check, ...]:
    return tuple(check for check in tap.checks[rate] if check.status == "fail")
