"""The transfer check: does the best learning rate stay where it is as a model grows wider?

The final test of a parametrization: it trains. A coordinate check measures the sizes of the first steps,
where a weight decay that shrinks with width, or an ε that takes over, need not show.

References:
    Yang et al., Tensor Programs V, arXiv 2203.03466, Figures 1 and 3.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from jaxtyping import Float

from mujax._arguments import (
    LOG2_LRS,
    NOT_NEGATIVE,
    takes,
)
from mujax.check._models import TRAINED, Optimizer, models_at, optimizer_of
from mujax.check._optimum import (
    CONFIDENCE,
    Optimum,
    Regret,
    Status,
    best_index,
    drift,
    fitted_optimum,
    regret,
    student,
)
from mujax.check._width_runs import Finished, train_models
from mujax.train import OutputLoss, check_batches, default_loss

MAX_DRIFT: Final = 0.2
"""How far the best learning rate may move each time that the width doubles, in powers of two.

Finite widths move the optimum of a correct model by up to 0.1; in standard parametrization Adam's moves by
1, and the faults that this check is for move it by 0.3 to 1. Over a transfer to 32 times the width, 0.2 adds
up to a factor of 2 in the learning rate: the error that a grid of powers of two makes anyway.
"""

MAX_REGRET: Final = 0.05
"""The most that a wider model may lose by the transferred learning rate, as a share of what training gains.

About what an error of a factor 2 in the learning rate costs, the spacing of an ordinary grid.
"""

_RESAMPLES: Final = 1000


@dataclasses.dataclass(frozen=True)
class TransferCheck:
    """The result of a transfer check.

    Attributes:
        verdict: `"pass"`, `"fail"` or `"undecided"`.
        reasons: of the verdict; if it is undecided, what to do.
        widths: ascending.
        log2_lrs: the grid.
        seeds: how many runs there are of each width and learning rate.
        loss: width -> training loss at each learning rate, mean over steps and seeds; None where a seed
            diverged.
        best_log2_lr: width -> the fitted optimum, see `mujax.check.fitted_optimum`; None where all diverged.
        on_grid_edge: widths whose best learning rate is an end of the grid.
        drift_per_doubling: slope of the optimum over log2 of the width; None where a width has none.
        interval: its 95 % interval, from the bootstrap over seeds; None with a single seed.
        drift_log2: the largest optimum minus the smallest.
        transferred_log2_lr: the proxy's optimum.
        regret: width -> what is lost there, as a share of what training gains: the loss at the
            transferred learning rate minus the lowest, over the untrained loss minus the lowest. None
            where it diverges.
        regret_interval: width -> its interval; None with a single seed and where it diverges. They hold
            together for all widths with 95 %.
        regret_loss: width -> the same loss, in its own units.
        max_drift: what `drift_per_doubling` may be, up or down.
        max_regret: what each `regret` may be.
    """

    verdict: Status
    reasons: tuple[str, ...]
    widths: tuple[int, ...]
    log2_lrs: tuple[float, ...]
    seeds: int
    loss: dict[int, tuple[float | None, ...]]
    best_log2_lr: dict[int, float | None]
    on_grid_edge: tuple[int, ...]
    drift_per_doubling: float | None
    interval: tuple[float, float] | None
    drift_log2: float | None
    transferred_log2_lr: float | None
    regret: dict[int, float | None]
    regret_interval: dict[int, tuple[float, float] | None]
    regret_loss: dict[int, float | None]
    max_drift: float
    max_regret: float

    def __bool__(self) -> bool:
        return self.verdict == "pass"

    def to_json(self) -> str:
        """The result as strict JSON text: null, never NaN."""
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"

    def __str__(self) -> str:
        lines = [f"Transfer check: {self.verdict}", ""]
        lines.append(f"{'width':>8}  {'best log2 lr':>12}  {'lowest loss':>11}  {'regret':>7}")
        for width in self.widths:
            optimum, edge = self.best_log2_lr[width], width in self.on_grid_edge
            best = best_index(self.loss[width])
            lowest = None if best is None else self.loss[width][best]
            regret = "diverges" if self.regret[width] is None else f"{self.regret[width]:.2%}"
            where = "-" if optimum is None else f"{optimum:.2f}{' (edge)' if edge else ''}"
            lines.append(
                f"{width:>8}  {where:>12}  {'-' if lowest is None else f'{lowest:.4g}':>11}  {regret:>7}"
            )
        drift = "-" if self.drift_per_doubling is None else f"{self.drift_per_doubling:+.2f}"
        between = "" if self.interval is None else f", {_text(self.interval)} with 95 %"
        lines += ["", f"drift per doubling of width: {drift}{between} (allowed: ±{self.max_drift:g})"]
        return "\n".join([*lines, *self.reasons])


@takes(
    **TRAINED,
    log2_lrs=LOG2_LRS,
    max_drift=NOT_NEGATIVE,
    max_regret=NOT_NEGATIVE,
)
def transfer_check(
    factory: Callable[[int], Any],
    widths: Sequence[int],
    batches: Sequence[Any],
    optimizer: str | Optimizer = "adam",
    *,
    log2_lrs: Sequence[float],
    seeds: int = 5,
    seed: int = 0,
    loss: OutputLoss | None = None,
    base: Callable[[int], Any] | None = None,
    base_width: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
    max_drift: float = MAX_DRIFT,
    max_regret: float = MAX_REGRET,
    **mup_kwargs: Any,
) -> TransferCheck:
    """Trains a model at several widths over a grid of learning rates and checks that the best one transfers.

    Every run sees the same batches; seeds differ in initial parameters and the model's own randomness. The
    loss of a run is the mean over its steps. It fails if the drift of the optimum, or the regret of a wider
    model, lies outside of its tolerance with its whole interval. It passes if the drift lies within with its
    whole interval and every regret is within.

    Args:
        factory: width -> a Linen module, an NNX factory `rngs -> nnx.Module`, a `Functional`, or a ready
            `MupModel`.
        widths: at least two; the smallest is the proxy.
        batches: an `(inputs, targets)` pair for each step, all of the same shapes; `inputs` is an array or
            a tuple of arrays. A hundred steps or so.
        optimizer: a name, or `(learning rate, spec) -> optax transform` whose learning rate may be traced.
        log2_lrs: learning rates to try, as powers of two; at least three. They should reach one beyond the
            best of every width on either side.
        seeds: runs of each width and learning rate.
        seed: the first seed.
        loss: `(outputs, targets) -> scalar`. By default mean cross-entropy for integer targets and mean
            squared error for others.
        base: target's width -> its base model.
        base_width: of the base model; the smallest of `widths` by default.
        kwargs: keyword arguments of the model's call.
        max_drift: the most that the optimum may move per doubling; see `MAX_DRIFT`.
        max_regret: the most that a transferred learning rate may cost; see `MAX_REGRET`.
        **mup_kwargs: passed to `mup_init`: `parametrization`, `roles`, `corrections`, `zero_init`.

    Raises:
        ConfigError: widths, batches, learning rates or seeds that make no sense.
        MujaxError: as `mup_init` does.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> def net(width):
        ...     return nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(width), nn.relu, nn.Dense(1)])
        >>> x = jax.random.normal(jax.random.key(0), (30, 64, 8))
        >>> batches = [(inputs, jnp.sin(inputs[:, :1])) for inputs in x]
        >>> found = transfer_check(net, (16, 32), batches, log2_lrs=range(-8, -2), seeds=2)
        >>> sorted(found.best_log2_lr)
        [16, 32]

    Reference:
        Yang et al., Tensor Programs V, arXiv 2203.03466, Algorithm 1 and Figure 1.
    """
    rates = tuple(sorted({float(rate) for rate in log2_lrs}))
    listed = check_batches(batches)
    make = optimizer_of(optimizer)
    models = models_at(factory, widths, base, base_width, listed[0][0], kwargs, **mup_kwargs)
    runs = train_models(models, listed, make, loss or default_loss, rates, range(seed, seed + seeds))
    return judge_runs(rates, runs, max_drift=max_drift, max_regret=max_regret)


def judge_runs(
    log2_lrs: Sequence[float], runs: Mapping[int, Sequence[Sequence[Finished]]], **options: Any
) -> TransferCheck:
    """`judge_transfer` on runs by width, learning rate and seed."""
    losses = {
        width: np.array([[math.nan if run.loss is None else run.loss for run in row] for row in by_rate])
        for width, by_rate in runs.items()
    }
    untrained = {width: _untrained(by_rate) for width, by_rate in runs.items()}
    return judge_transfer(log2_lrs, losses, untrained, **options)


def _untrained(runs: Sequence[Sequence[Finished]]) -> float | None:
    """The loss before training, the mean over all runs that did not diverge; None if it is not known."""
    known = [run.untrained for row in runs for run in row if run.loss is not None]
    starts = [start for start in known if start is not None]
    return float(np.mean(starts)) if starts else None


# ---- the verdict ----------------------------------------------------------------------------------------


def judge_transfer(
    log2_lrs: Sequence[float],
    losses: Mapping[int, Float[np.ndarray, "rates seeds"]],
    untrained: Mapping[int, float | None],
    *,
    proxy: int | None = None,
    max_drift: float = MAX_DRIFT,
    max_regret: float = MAX_REGRET,
) -> TransferCheck:
    """The verdict on finished runs.

    The noise is that of the seeds. Bootstrap: the seeds are drawn with replacement, at each width
    independently; the spread of a number over the draws is its standard error. The interval is Student's t,
    as there are few seeds.

    Args:
        log2_lrs: the grid, ascending.
        losses: width, ascending -> loss of each run; NaN where it diverged.
        untrained: width -> loss before training; None if it is not known.
        proxy: width whose optimum is transferred; the smallest by default.
        max_drift: see `transfer_check`.
        max_regret: see `transfer_check`.
    """
    widths = tuple(losses)
    proxy = widths[0] if proxy is None else proxy
    seeds = losses[proxy].shape[1]
    tables = {width: _Table(log2_lrs, table) for width, table in losses.items()}
    found = {width: table.at(tuple(range(seeds))) for width, table in tables.items()}
    optima = {width: optimum.log2_lr for width, (_, optimum) in found.items()}
    resampled = _resampled(tables, seeds)

    moved = drift(optima)
    freedom = len(widths) * (seeds - 1)
    slopes = [
        None if one is None else one.per_doubling
        for one in (drift({width: best.log2_lr for width, (_, best) in draw.items()}) for draw in resampled)
    ]
    interval = None if moved is None else _interval(moved.per_doubling, slopes, seeds, freedom, CONFIDENCE)

    def regret_in(draw: Mapping[int, Fitted], width: int) -> Regret | None:
        curve, optimum = draw[width]
        return regret(log2_lrs, curve, optimum.log2_lr, draw[proxy][1].log2_lr, untrained[width])

    lost = {width: regret_in(found, width) for width in widths}
    together = 1 - (1 - CONFIDENCE) / max(1, len(widths) - 1)
    regret_interval: dict[int, tuple[float, float] | None] = {}
    for width, one in lost.items():
        between = None
        if width != proxy and one is not None and one.share is not None:
            shares = [_share(regret_in(draw, width)) for draw in resampled]
            between = _interval(one.share, shares, seeds, 2 * (seeds - 1), together)
        regret_interval[width] = None if between is None else (max(between[0], 0.0), between[1])

    verdict, reasons = _verdict(
        log2_lrs, proxy, found, interval, lost, regret_interval, seeds, max_drift, max_regret
    )
    return TransferCheck(
        verdict=verdict,
        reasons=reasons,
        widths=widths,
        log2_lrs=tuple(log2_lrs),
        seeds=seeds,
        loss={width: curve for width, (curve, _) in found.items()},
        best_log2_lr=optima,
        on_grid_edge=tuple(width for width, (_, optimum) in found.items() if optimum.on_edge),
        drift_per_doubling=None if moved is None else moved.per_doubling,
        interval=interval,
        drift_log2=None if moved is None else moved.range,
        transferred_log2_lr=optima[proxy],
        regret={width: _share(one) for width, one in lost.items()},
        regret_interval=regret_interval,
        regret_loss={width: None if one is None else one.loss for width, one in lost.items()},
        max_drift=max_drift,
        max_regret=max_regret,
    )


Fitted = tuple[tuple[float | None, ...], Optimum]
"""The loss at each learning rate, and where it is lowest."""


def _share(regret: Regret | None) -> float | None:
    return None if regret is None else regret.share


@dataclasses.dataclass(frozen=True)
class _Table:
    """The runs of one width; the optimum for each choice of seeds is computed once."""

    log2_lrs: Sequence[float]
    losses: Float[np.ndarray, "rates seeds"]
    known: dict[tuple[int, ...], Fitted] = dataclasses.field(default_factory=dict)

    def at(self, seeds: tuple[int, ...]) -> Fitted:
        """The mean over these seeds, of which some may come more than once."""
        if seeds not in self.known:
            means = self.losses[:, list(seeds)].mean(axis=1)
            curve = tuple(None if math.isnan(mean) else float(mean) for mean in means)
            self.known[seeds] = curve, fitted_optimum(self.log2_lrs, curve)
        return self.known[seeds]


def _resampled(tables: Mapping[int, _Table], seeds: int) -> list[dict[int, Fitted]]:
    if seeds < 2:
        return []
    rng = np.random.default_rng(0)
    draws = np.sort(rng.integers(seeds, size=(_RESAMPLES, len(tables), seeds)))
    return [
        {
            width: table.at(tuple(map(int, chosen)))
            for (width, table), chosen in zip(tables.items(), draw, strict=True)
        }
        for draw in draws
    ]


def _interval(
    value: float, draws: Sequence[float | None], seeds: int, freedom: int, confidence: float
) -> tuple[float, float] | None:
    """Student's t interval with the bootstrap's standard error; None with a single seed.

    The bootstrap's variance of a mean of n seeds is (n - 1)/n of what it should be: n is small here.
    """
    known = [draw for draw in draws if draw is not None]
    if len(known) < 2:
        return None
    error = float(np.std(known)) * math.sqrt(seeds / (seeds - 1))
    reach = student(confidence, freedom) * error
    return value - reach, value + reach


def _verdict(
    log2_lrs: Sequence[float],
    proxy: int,
    found: Mapping[int, Fitted],
    interval: tuple[float, float] | None,
    lost: Mapping[int, Regret | None],
    regret_interval: Mapping[int, tuple[float, float] | None],
    seeds: int,
    max_drift: float,
    max_regret: float,
) -> tuple[Status, tuple[str, ...]]:
    others = [width for width in found if width != proxy]
    optimum = found[proxy][1]
    open_ends = [
        _beyond(log2_lrs, width, best.log2_lr)
        for width, (_, best) in found.items()
        if best.on_edge and best.log2_lr is not None
    ]
    if optimum.log2_lr is None:
        return "undecided", (f"Every run of width {proxy} diverged: lower log2_lrs.",)
    if optimum.on_edge:
        return "undecided", tuple(open_ends)
    failed = []
    for width in others:
        between = regret_interval[width]
        if lost[width] is None:
            failed.append(f"Width {width} diverges at the transferred learning rate 2^{optimum.log2_lr:.2f}.")
        elif between is not None and between[0] > max_regret:
            failed.append(
                f"Width {width} loses {_share(lost[width]):.1%} of what training gains by the transferred "
                f"learning rate 2^{optimum.log2_lr:.2f}, {between[0]:.1%} at least; allowed are "
                f"{max_regret:.1%}."
            )
    # An optimum on the grid's edge lies there or beyond: how far the drift goes is not known then.
    if interval is not None and not open_ends and (interval[0] > max_drift or interval[1] < -max_drift):
        failed.append(
            f"The best learning rate moves by {_text(interval)} powers of two per doubling of width; "
            f"allowed are ±{max_drift:g}."
        )
    if failed:
        return "fail", (*failed, *open_ends)
    if open_ends:
        return "undecided", tuple(open_ends)
    if seeds < 2 or interval is None:
        return "undecided", ("One seed does not distinguish noise from drift: take 5 seeds or so.",)
    unclear = []
    if interval[0] < -max_drift or interval[1] > max_drift:
        unclear.append(
            f"The drift lies anywhere between {_text(interval)}, wider than the allowed ±{max_drift:g}: "
            "take more seeds or steps."
        )
    for width in others:
        between, share = regret_interval[width], _share(lost[width])
        if share is None:
            unclear.append(f"The untrained loss of width {width} is not stored: start in a new folder.")
        elif between is not None and share > max_regret:
            unclear.append(
                f"The regret of width {width} lies anywhere between {between[0]:.1%} and {between[1]:.1%}, "
                f"and {max_regret:.1%} are allowed: take more seeds or steps."
            )
    return ("undecided", tuple(unclear)) if unclear else ("pass", ())


def _beyond(log2_lrs: Sequence[float], width: int, best: float) -> str:
    which, where = ("lowest", "lower") if best == log2_lrs[0] else ("highest", "higher")
    return f"Width {width} is best at 2^{best:g}, the {which} learning rate of the grid: add {where} ones."


def _text(interval: tuple[float, float]) -> str:
    return f"{interval[0]:+.2f} to {interval[1]:+.2f}"
