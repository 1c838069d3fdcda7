"""The front of a random search: the loss of its best trial against the cost of the search.

Reference:
    Yang et al., Tensor Programs V, arXiv 2203.03466, Figure 5 and Section 7.1: random search, resampled.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from mujax._arguments import COUNT, NONE, NOT_NEGATIVE, NUMBER, SEED, several, takes
from mujax.errors import ConfigError

RESAMPLES = 20

_LOSSES = several("a sequence of losses, None for one that diverged", NUMBER | NONE, "[0.5, None]", least=1)
_FLOPS = several("a sequence of operations, one for each loss", NOT_NEGATIVE, "[1e9, 2e9]", least=1)


@dataclasses.dataclass(frozen=True)
class Front:
    """The loss of a random search's best trial, against the cost of the search.

    Attributes:
        trials: sizes of the search.
        flops: operations of a search of each size, the mean over resamplings.
        loss: loss of its best trial, the median over resamplings.
        low: the tenth percentile of that loss.
        high: the ninetieth percentile.
    """

    trials: tuple[int, ...]
    flops: tuple[float, ...]
    loss: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    def to_json(self) -> str:
        """As strict JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"


def sizes(count: int) -> tuple[int, ...]:
    """The sizes of a search that a front shows: powers of two, and all trials.

    >>> sizes(24)
    (1, 2, 4, 8, 16, 24)
    """
    powers = [1 << power for power in range(count.bit_length()) if 1 << power <= count]
    return tuple(sorted({*powers, count}))


def resampled(count: int, size: int, resamples: int, seed: int = 0) -> list[np.ndarray]:
    """The trials of each resampled search of one size: subsets, drawn without replacement."""
    random = np.random.default_rng([seed, size])
    return [random.choice(count, size, replace=False) for _ in range(resamples)]


@takes(losses=_LOSSES, flops=_FLOPS, quality=_LOSSES | NONE, resamples=COUNT, seed=SEED)
def front(
    losses: Sequence[float | None],
    flops: Sequence[float],
    quality: Sequence[float | None] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Front:
    """The front of a random search, resampled from its own trials.

    Args:
        losses: loss of each trial, by which the best is chosen; None where it diverged.
        flops: operations of each trial.
        quality: the target's loss with each trial's hyperparameters; `losses` by default. None, where the
            target diverged, counts as the worst loss of all.
        resamples: searches of each size.
        seed: determines the subsets.

    Raises:
        ConfigError: no trial has a loss.
    """
    for name, given in (("flops", flops), ("quality", losses if quality is None else quality)):
        if len(given) != len(losses):
            raise ConfigError(
                where=name, expected=f"one for each of the {len(losses)} losses", got=len(given)
            )
    chosen_by = np.array([np.inf if loss is None else loss for loss in losses])
    worth = chosen_by if quality is None else np.array([np.inf if one is None else one for one in quality])
    if not np.isfinite(worth).any():
        raise ConfigError(where="front", expected="at least one trial that reached its end", got="none")
    worst = worth[np.isfinite(worth)].max()
    worth, cost = np.where(np.isfinite(worth), worth, worst), np.asarray(flops)
    found: list[Float[np.ndarray, " resamples"]] = []
    spent: list[float] = []
    steps = sizes(len(chosen_by))
    for size in steps:
        subsets = resampled(len(chosen_by), size, resamples, seed)
        found.append(np.array([worth[subset[np.argmin(chosen_by[subset])]] for subset in subsets]))
        spent.append(float(np.mean([cost[subset].sum() for subset in subsets])))
    return Front(
        trials=steps,
        flops=tuple(spent),
        loss=tuple(float(np.median(losses)) for losses in found),
        low=tuple(float(np.quantile(losses, 0.1)) for losses in found),
        high=tuple(float(np.quantile(losses, 0.9)) for losses in found),
    )
