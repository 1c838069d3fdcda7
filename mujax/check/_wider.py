"""Wider is better: in µP a wider model trains faster at every step, at the same learning rate.

The cheapest check of a whole training run: one learning rate, a few widths, and the curves may not cross.

Reference:
    Yang et al., Tensor Programs V, arXiv 2203.03466, Section 8 and Appendix J.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from jaxtyping import Float

from mujax._arguments import (
    COUNT,
    NONE,
    NOT_NEGATIVE,
    POSITIVE,
    takes,
)
from mujax.check._models import TRAINED, Optimizer, models_at, optimizer_of
from mujax.check._optimum import Status, difference
from mujax.check._width_runs import train_models
from mujax.errors import ConfigError
from mujax.train import OutputLoss, check_batches, default_loss

MAX_RISE: Final = 0.02
"""The most that a wider model may be worse, as a share of what training gains the narrower one.

Correct models of finite widths come this close to each other where more width no longer helps.
"""

# Windows of a pair of curves: few enough that the correction for them costs little, and enough to
# distinguish the start of a run from its end. More smoothing would not help: all widths see the same batches,
# so the noise of the batches is not in the differences, and that of the initial values lasts over the run.
_LOOKS: Final = 10

# To pass, the mean loss over the run must be known not to rise by more than this share of what training
# gains.
_RESOLUTION: Final = 0.1


@dataclasses.dataclass(frozen=True)
class Rise:
    """A stretch of training in which a wider model is worse.

    Attributes:
        narrow: width of the better model.
        wide: width of the worse one.
        steps: first and last step.
        by: the difference of their losses, mean over seeds and steps; None where the wider one diverged.
        at_least: the difference beyond noise; None where the wider one diverged.
    """

    narrow: int
    wide: int
    steps: tuple[int, int]
    by: float | None
    at_least: float | None

    def __str__(self) -> str:
        first, last = self.steps
        if self.by is None or self.at_least is None:
            return f"Width {self.wide} diverges and width {self.narrow} does not."
        return (
            f"Steps {first} to {last}: width {self.wide} is worse than width {self.narrow} by {self.by:.3g}, "
            f"{self.at_least:.3g} at least."
        )


@dataclasses.dataclass(frozen=True)
class WiderIsBetter:
    """The result of a comparison of training curves.

    Attributes:
        verdict: `"pass"`, `"fail"` or `"undecided"`.
        reasons: of the verdict; if it is undecided, what to do.
        widths: ascending.
        learning_rate: of all runs.
        seeds: runs of each width.
        window: steps that are averaged.
        curves: width -> loss of each window, mean over its steps and over seeds; None where a seed diverged.
        rises: where a wider model is worse beyond noise.
        max_rise: the share of the gain up to which that does not count.
    """

    verdict: Status
    reasons: tuple[str, ...]
    widths: tuple[int, ...]
    learning_rate: float
    seeds: int
    window: int
    curves: dict[int, tuple[float, ...] | None]
    rises: tuple[Rise, ...]
    max_rise: float

    def __bool__(self) -> bool:
        return self.verdict == "pass"

    def to_json(self) -> str:
        """The result as strict JSON text: null, never NaN."""
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"

    def __str__(self) -> str:
        lines = [
            f"Wider is better: {self.verdict}",
            "",
            f"{'width':>8}  {'first':>9}  {'middle':>9}  {'last':>9}",
        ]
        for width, curve in self.curves.items():
            shown = (
                ["diverges"] * 3 if curve is None else [f"{curve[at]:.4g}" for at in (0, len(curve) // 2, -1)]
            )
            lines.append(f"{width:>8}  " + "  ".join(f"{cell:>9}" for cell in shown))
        lines.append("")
        return "\n".join([*lines, *map(str, self.rises), *self.reasons]).rstrip()


@takes(
    **TRAINED,
    learning_rate=POSITIVE,
    window=COUNT | NONE,
    max_rise=NOT_NEGATIVE,
)
def wider_is_better(
    factory: Callable[[int], Any],
    widths: Sequence[int],
    batches: Sequence[Any],
    optimizer: str | Optimizer = "adam",
    *,
    learning_rate: float,
    seeds: int = 5,
    seed: int = 0,
    loss: OutputLoss | None = None,
    base: Callable[[int], Any] | None = None,
    base_width: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
    window: int | None = None,
    max_rise: float = MAX_RISE,
    **mup_kwargs: Any,
) -> WiderIsBetter:
    """Trains a model at several widths with one learning rate and checks that wider is better throughout.

    Neighbouring widths are compared window by window. A window counts as worse if the whole confidence
    interval of the difference lies above `max_rise`; the seeds are the repeats, and all windows of all
    pairs hold together with 95 % (Bonferroni).

    Args:
        factory: width -> a Linen module, an NNX factory `rngs -> nnx.Module`, a `Functional`, or a ready
            `MupModel`.
        widths: at least two.
        batches: an `(inputs, targets)` pair for each step, all of the same shapes; `inputs` is an array or
            a tuple of arrays.
        optimizer: a name, or `(learning rate, spec) -> optax transform` whose learning rate may be traced.
        learning_rate: near the best of the narrowest model; one that is too large shows nothing.
        seeds: runs of each width.
        seed: the first seed.
        loss: `(outputs, targets) -> scalar`. By default mean cross-entropy for integer targets and mean
            squared error for others.
        base: target's width -> its base model.
        base_width: of the base model; the smallest of `widths` by default.
        kwargs: keyword arguments of the model's call.
        window: steps to average; a tenth of the run by default.
        max_rise: see `MAX_RISE`.
        **mup_kwargs: passed to `mup_init`: `parametrization`, `roles`, `corrections`, `zero_init`.

    Raises:
        ConfigError: widths, batches, a window or seeds that make no sense.
        MujaxError: as `mup_init` does.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> def net(width):
        ...     return nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(width), nn.relu, nn.Dense(1)])
        >>> x = jax.random.normal(jax.random.key(0), (30, 64, 8))
        >>> batches = [(inputs, jnp.sin(inputs[:, :1])) for inputs in x]
        >>> found = wider_is_better(net, (16, 64), batches, learning_rate=2**-6)
        >>> found.window
        3

    Reference:
        Yang et al., Tensor Programs V, arXiv 2203.03466, Section 8.
    """
    listed = check_batches(batches)
    make = optimizer_of(optimizer)
    size = max(1, len(listed) // _LOOKS) if window is None else window
    if not 1 <= size <= len(listed):
        raise ConfigError(where="window", expected=f"from 1 to the number of steps, {len(listed)}", got=size)
    models = models_at(factory, widths, base, base_width, listed[0][0], kwargs, **mup_kwargs)
    runs = train_models(
        models,
        listed,
        make,
        loss or default_loss,
        [math.log2(learning_rate)],
        range(seed, seed + seeds),
    )
    losses: dict[int, np.ndarray | None] = {}
    for width, (of_rate,) in runs.items():
        known = [run.curve for run in of_rate if run.curve is not None]
        losses[width] = np.stack(known) if len(known) == seeds else None
    return judge_widths(losses, learning_rate, seeds, size, max_rise=max_rise)


def judge_widths(
    losses: Mapping[int, Float[np.ndarray, "seeds steps"] | None],
    learning_rate: float,
    seeds: int,
    window: int,
    *,
    max_rise: float = MAX_RISE,
) -> WiderIsBetter:
    """The verdict on finished runs.

    Args:
        losses: width, ascending -> losses of every seed and step; None where a seed diverged.
        learning_rate: of all runs.
        seeds: runs of each width.
        window: steps to average; the remainder at the end belongs to the last window.
        max_rise: see `MAX_RISE`.
    """
    some = next((table for table in losses.values() if table is not None), None)
    starts = [] if some is None else list(range(0, some.shape[1] - window + 1, window))
    smooth = {width: None if table is None else _windows(table, starts) for width, table in losses.items()}
    pairs = list(itertools.pairwise(smooth))
    rises: list[Rise] = []
    coarse: list[str] = []
    for narrow, wide in pairs:
        one, other = smooth[narrow], smooth[wide]
        if one is None:
            continue
        last_step = losses[narrow].shape[1] - 1  # pyright: ignore[reportOptionalMemberAccess]
        if other is None:
            rises.append(Rise(narrow, wide, (0, last_step), None, None))
            continue
        gain = float(np.ptp(one.mean(axis=0)))
        if seeds < 2:
            continue
        found = difference(one, other, comparisons=len(starts) * len(pairs))
        worse = found.at_least > max_rise * gain
        ends = [*(start - 1 for start in starts[1:]), last_step]
        rises += [
            Rise(
                narrow,
                wide,
                (starts[first], ends[last]),
                float(found.by[first : last + 1].mean()),
                float(found.at_least[first : last + 1].mean()),
            )
            for first, last in _stretches(worse)
        ]
        whole = [table.mean(axis=1, keepdims=True) for table in (one, other)]
        may_be = float(difference(*whole, comparisons=len(pairs)).at_most[0])
        if not worse.any() and may_be > _RESOLUTION * gain:
            coarse.append(
                f"The mean loss of width {wide} may be above that of width {narrow} by {may_be:.3g}, where "
                f"training gains {gain:.3g}: take more seeds."
            )
    reasons: list[str] = []
    if any(one is None for one in list(smooth.values())[:-1]):
        first = next(width for width, one in smooth.items() if one is None)
        reasons.append(f"Width {first} diverges at learning rate {learning_rate:.3g}: take a lower one.")
    if seeds < 2:
        reasons.append("One seed does not distinguish noise from a difference: take 5 seeds or so.")
    reasons += coarse
    verdict: Status = "fail" if rises else "undecided" if reasons else "pass"
    return WiderIsBetter(
        verdict=verdict,
        reasons=tuple(reasons),
        widths=tuple(losses),
        learning_rate=learning_rate,
        seeds=seeds,
        window=window,
        curves={
            width: None if table is None else tuple(map(float, table.mean(axis=0)))
            for width, table in smooth.items()
        },
        rises=tuple(rises),
        max_rise=max_rise,
    )


def _windows(
    table: Float[np.ndarray, "seeds steps"], starts: Sequence[int]
) -> Float[np.ndarray, "seeds windows"]:
    sizes = np.diff([*starts, table.shape[1]])
    return np.add.reduceat(table, starts, axis=1) / sizes


def _stretches(flags: Sequence[bool] | np.ndarray) -> list[tuple[int, int]]:
    """First and last index of each run of true ones."""
    found: list[tuple[int, int]] = []
    for is_true, group in itertools.groupby(enumerate(flags), key=lambda item: bool(item[1])):
        if is_true:
            indices = [index for index, _ in group]
            found.append((indices[0], indices[-1]))
    return found
