"""Samplers and pruners by name, and the hyperparameters that a sampler gives each trial."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final

import optuna
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, RandomSampler

from mujax.errors import ConfigError
from mujax.tune.study._queue import Grid
from mujax.tune.study._space import axis_of

_NEEDS: Final = {"cmaes": ("cmaes",), "gp": ("torch", "scipy"), "qmc": ("scipy",)}
# The brute-force sampler ends the study from within, which only Optuna's own loop can; "grid" does its work.
_NO_SAMPLERS: Final = ("grid", "bruteforce")


def samplers() -> dict[str, Any]:
    """Optuna's samplers that need nothing but a seed, by their short names."""
    found: dict[str, Any] = {}
    for title in optuna.samplers.__all__:
        cls, short = getattr(optuna.samplers, title), title.removesuffix("Sampler").lower()
        if not inspect.isclass(cls) or inspect.isabstract(cls) or short in _NO_SAMPLERS:
            continue
        parameters = inspect.signature(cls).parameters.values()
        if "seed" in {at.name for at in parameters} and all(at.default is not at.empty for at in parameters):
            found[short] = cls
    return found


_PRUNERS: Final[Mapping[str, Callable[[], BasePruner]]] = {
    "none": optuna.pruners.NopPruner,
    "asha": optuna.pruners.SuccessiveHalvingPruner,
    "successive_halving": optuna.pruners.SuccessiveHalvingPruner,
    "hyperband": optuna.pruners.HyperbandPruner,
    "median": optuna.pruners.MedianPruner,
    "percentile": lambda: optuna.pruners.PercentilePruner(25.0),
}


def check_sampler(sampler: str | BaseSampler) -> str | BaseSampler:
    if isinstance(sampler, BaseSampler):
        return sampler
    short = str(sampler).lower().replace("_", "").replace("-", "")
    known = sorted({"grid", *samplers()})
    if short not in known:
        raise ConfigError(
            where="sampler", expected=f"one of {', '.join(map(repr, known))}", got=repr(sampler)
        )
    missing = [package for package in _NEEDS.get(short, ()) if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(
            where="sampler",
            expected=f"{' and '.join(missing)} to be installed for {sampler!r}",
            got="none",
            remedy=f"pip install {' '.join(missing)}, or take another sampler",
        )
    return short


def make_pruner(pruner: str | BasePruner | None) -> BasePruner:
    if isinstance(pruner, BasePruner):
        return pruner
    name = "none" if pruner is None else str(pruner).lower().replace("-", "_")
    if name not in _PRUNERS:
        raise ConfigError(
            where="pruner", expected=f"one of {', '.join(map(repr, _PRUNERS))}", got=repr(pruner)
        )
    return _PRUNERS[name]()


def seed_of(seed: int, index: int) -> int:
    """32 bits for NumPy's generator: a function of both numbers, never the same for two indices."""
    start = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big")
    # An odd factor permutes the 32-bit numbers.
    return (start + index * 0x9E3779B1) % 2**32


class Sampling:
    """The hyperparameters that a study's sampler gives each trial, whichever worker runs it.

    Attributes:
        space: the distribution of each hyperparameter.
        grid: its cells, for the sampler `"grid"`; else None.
    """

    def __init__(self, space: Mapping[str, BaseDistribution], sampler: str | BaseSampler, seed: int) -> None:
        """For a sampler that `check_sampler` returned.

        Raises:
            ConfigError: a grid over infinitely many values.
        """
        self.space = space
        self.grid = (
            Grid({name: axis_of(name, at) for name, at in space.items()}) if sampler == "grid" else None
        )
        self._sampler = sampler
        self._seed = seed
        self._made: BaseSampler | None = None if isinstance(sampler, str) else sampler

    @property
    def initial(self) -> BaseSampler:
        """The sampler that Optuna's study is opened with."""
        return self._made or RandomSampler(seed=self._seed)

    def drawn(self, slot: int) -> dict[str, Any]:
        """The hyperparameters of a new trial; none if the sampler needs to see the study first."""
        if self.grid is not None:
            return self.grid.params(slot)
        if self._sampler == "random":
            alone = optuna.create_study(sampler=RandomSampler(seed=seed_of(self._seed, slot)))
            return alone.ask(dict(self.space)).params
        return {}

    def of(self, number: int) -> BaseSampler:
        """The sampler of the hyperparameters that a stored trial leaves open."""
        if self._made is not None:
            return self._made
        seed = seed_of(self._seed, number)
        if self._sampler in ("random", "grid"):
            # For trials that the user enqueued.
            return RandomSampler(seed=seed)
        cls = samplers()[str(self._sampler)]
        if self._sampler == "qmc":
            # One sequence for all workers, except where the sampler does not follow it.
            made = cls(seed=seed_of(self._seed, 0), independent_sampler=RandomSampler(seed=seed))
        else:
            made = cls(seed=seed)
        self._made = made
        return made
