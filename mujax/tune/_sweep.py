"""`sweep`: a search for hyperparameters that runs many trials at a time, stored in a study to be shared.

Trials and seeds that share shapes are lanes of one program (`mujax.train`). Trials and results are in an
Optuna study (`mujax.tune.study`), from which any number of workers, on any number of machines, take trials.

Reference:
    Yang et al., Tensor Programs V, arXiv 2203.03466, Section 7 and Appendix F: random search on the proxy.
"""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from mujax._arguments import (
    CALLBACK,
    COUNT,
    NAME,
    NAMED,
    NONE,
    PATH,
    PATIENCE,
    SECONDS,
    SEED,
    TEXT,
    Kind,
    check_arguments,
    function,
    instance,
    one_of,
    takes,
)
from mujax.errors import ConfigError, MujaxError
from mujax.train import MODES, FunctionJob, Job, Mode
from mujax.tune._results import Sweep, SweepProgress, Trial, read_trials
from mujax.tune._user_code import summary_of
from mujax.tune._worker import Reporter, Worker, check_objective

Run = Callable[[dict[str, Any], Key[Array, ""]], Mapping[str, Any]]
"""(hyperparameters, key) -> metrics, scalars by name: a pure function that can be traced."""

RUNGS: Final = 10
"""Evaluations of a run, the last one included: divergence is noticed there, and a pruner may stop the run."""


STORAGE: Final = PATH | Kind(
    "a storage of Optuna's", lambda value: callable(value.create_new_study), '"sqlite:///mujax.db"'
)
"""The address of a database, or the path of an SQLite file."""


@dataclasses.dataclass(frozen=True)
class Study:
    """Where a search stores its trials, and how its workers share them.

    Attributes:
        name: of the study in its database; None keeps the trials in memory, unless a storage is given.
        storage: a database URL, or the path of an SQLite file; `mujax.db` by default.
        settings: everything the runs depend on besides the hyperparameters, as JSON: a study resumes only if
            they are unchanged.
        attributes: further values to store with a new study, as JSON.
        heartbeat: seconds between two signs of life of a worker.
        heartbeat_timeout: seconds without one after which another worker runs the trials of this one; None is
            3 heartbeats.
        patience: seconds to wait for a database that cannot be reached.

    Example:
        >>> study = Study("mlp", "sqlite:///mujax.db", settings={"width": 128}, heartbeat=10)
    """

    name: str | None = None
    storage: str | pathlib.Path | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    heartbeat: float = 60.0
    heartbeat_timeout: float | None = None
    patience: float = 300.0

    def __post_init__(self) -> None:
        check_arguments(
            {
                "name": NAME | NONE,
                "storage": STORAGE | NONE,
                "settings": NAMED,
                "attributes": NAMED,
                "heartbeat": SECONDS,
                "heartbeat_timeout": SECONDS | NONE,
                "patience": PATIENCE,
            },
            vars(self),
        )


_OF_STUDY: Final[Mapping[str, str]] = {
    "settings": "settings",
    "notes": "attributes",
    "heartbeat": "heartbeat",
    "patience": "patience",
}
"""Arguments of `sweep` in 0.3.0 that are fields of `Study` now."""


def _as_study(study: str | Study | None, storage: Any, old: Mapping[str, Any]) -> Study:
    """The study that the arguments of `sweep` describe.

    Raises:
        ConfigError: arguments beside a `Study` that belong in it.
    """
    if unknown := sorted(set(old) - set(_OF_STUDY)):
        raise TypeError(f"sweep() got an unexpected keyword argument {unknown[0]!r}")
    beside = [*old, *(["storage"] if storage is not None else [])]
    if isinstance(study, Study):
        if beside:
            raise ConfigError(
                where=beside[0],
                expected="it as a field of the Study",
                got="it beside one",
                remedy=f"pass study=mujax.Study(..., {_OF_STUDY.get(beside[0], beside[0])}=...)",
            )
        return study
    if old:
        fields = ", ".join(f"{_OF_STUDY[name]}=..." for name in old)
        warnings.warn(
            f"sweep({', '.join(f'{name}=...' for name in old)}) is deprecated; pass "
            f"study=mujax.Study(name, storage, {fields}).",
            DeprecationWarning,
            # Past the check of the arguments.
            stacklevel=4,
        )
    return Study(
        study, storage, **{_OF_STUDY[name]: value for name, value in old.items() if value is not None}
    )


@takes(
    run=Kind(
        "a function of hyperparameters and key, or what mujax.training_run returns",
        lambda value: hasattr(type(value), "advance") or function("", 2, "").accepts(value),
        "mujax.training_run(...)",
    ),
    trials=COUNT,
    seeds=COUNT,
    seed=SEED,
    fixed=NAMED | NONE,
    objective=TEXT,
    study=NAME | instance(Study, "a mujax.Study", "") | NONE,
    storage=STORAGE | NONE,
    rungs=COUNT,
    mode=one_of(MODES) | NONE,
    lanes=COUNT | NONE,
    progress=CALLBACK | NONE,
    finished=CALLBACK | NONE,
    say=CALLBACK | NONE,
)
def sweep(
    run: Run | Job,
    space: Mapping[str, Any],
    *,
    trials: int,
    seeds: int = 1,
    seed: int = 0,
    fixed: Mapping[str, Any] | None = None,
    objective: str = "loss",
    study: str | Study | None = None,
    storage: str | pathlib.Path | None = None,
    sampler: Any = "random",
    pruner: Any = None,
    rungs: int = RUNGS,
    mode: Mode | None = None,
    lanes: int | None = None,
    progress: Callable[[SweepProgress], None] | None = None,
    finished: Callable[[Trial], None] | None = None,
    say: Callable[[str], None] | None = None,
    **old: Any,
) -> Sweep:
    """Searches for hyperparameters, many trials at a time, and stores all of them in a study.

    Hyperparameters that are floats are traced: trials that differ in nothing else share one program, as do
    their seeds. The others (whole numbers, names, and what the job itself needs as Python values) determine
    the shapes: each combination of them is compiled once.

    On an accelerator the trials of a batch are vmapped. On a CPU they are looped over by as many threads as
    there are cores, mapped, or vmapped: each way is measured once where that is worth compiling it, and the
    fastest kept. Several local devices share the lanes. A batch that does not fit into memory is halved.

    Args:
        run: `(hparams, key) -> metrics`, pure and traceable, with scalar metrics by name; or a job such as
            `mujax.training_run` returns, which can be stopped at a rung.
        space: hyperparameter -> `[value, ...]`, `{"low": ..., "high": ..., "log": True}`, or a distribution
            of `optuna.distributions`.
        trials: the study's total, over all its workers; a study that has that many is finished.
        seeds: runs of each trial; the objective is their mean.
        seed: the first of them, and the seed of the sampler.
        fixed: hyperparameters that are not tuned.
        objective: the metric to minimise.
        study: the name to store the trials under, or a `mujax.Study`, which also configures how workers
            share it; None keeps them in memory.
        storage: a database URL, or the path of an SQLite file; `mujax.db` by default.
        sampler: `"random"`, `"grid"`, `"tpe"`, any other of Optuna's by name, or a sampler object.
        pruner: `"asha"`, `"hyperband"`, `"median"`, any other of Optuna's, or None.
        rungs: evaluations of a run, the last one included.
        mode: `"loop"`, `"map"` or `"vmap"`; None measures which is fastest.
        lanes: runs at a time, each seed counted; by default 16 on a CPU and 128 elsewhere.
        progress: called at each rung.
        finished: called with each trial that this worker has stored.
        say: called with messages for the user, such as that the connection was lost.
        **old: arguments of 0.3.0 that are fields of `mujax.Study` now; deprecated.

    Returns:
        All finished trials of the study.

    Raises:
        ConfigError: invalid arguments, an objective that `run` does not return, or a study with
            other settings or another space.
        StudyError: the database cannot be used.
        MujaxError: `run` raised; its trials are put back.

    Example:
        >>> def run(hparams, key):
        ...     return {"loss": (hparams["x"] - 1) ** 2}
        >>> sweep(run, {"x": [0.0, 1.0, 2.0]}, trials=3, sampler="grid").best.hparams
        {'x': 1.0}

    Reference:
        Yang et al., Tensor Programs V, arXiv 2203.03466, Algorithm 1.
    """
    started = time.perf_counter()
    studies = study_module()
    place = _as_study(study, storage, old)
    job: Any = run if hasattr(type(run), "advance") else FunctionJob(run)  # pyright: ignore[reportArgumentType]
    constant = dict(fixed or {})
    parsed = studies.distributions(space)
    if both := sorted(set(constant) & set(parsed)):
        raise ConfigError(where=both[0], expected="it in the space or fixed", got="it in both")
    first = {**constant, **{name: _first(values) for name, values in parsed.items()}}
    job.check(first)
    floats = {name for name, values in parsed.items() if _is_traced(values) and name not in job.static}
    floats |= {
        name for name, value in constant.items() if isinstance(value, float) and name not in job.static
    }
    check_objective(objective, _metric_shapes(job, first, floats))
    worker = Worker(
        job,
        constant,
        floats,
        objective,
        seeds=seeds,
        seed=seed,
        rungs=rungs,
        pruned=pruner is not None,
        mode=mode,
        lanes=lanes,
    )
    settings = {
        "seeds": seeds,
        "seed": seed,
        "objective": objective,
        "fixed": constant,
        # Workers that sample in different ways would not share one search.
        "sampler": sampler if isinstance(sampler, str) else type(sampler).__name__,
        **place.settings,
    }
    in_memory = place.name is None and place.storage is None
    with studies.SharedStudy.open(
        "sweep" if place.name is None else place.name,
        parsed,
        storage=studies.in_memory() if in_memory else place.storage,
        sampler=sampler,
        pruner=pruner,
        seed=seed,
        settings=settings,
        attributes=place.attributes,
        heartbeat=place.heartbeat,
        heartbeat_timeout=place.heartbeat_timeout,
        patience=place.patience,
        say=say,
    ) as shared:
        reporter = Reporter(shared, trials, progress)
        worker.work(shared, trials, reporter, finished)
        reporter.count()
        reporter.update(0.0, 0, "done")
        return Sweep(
            study=place.name,
            trials=read_trials(shared),
            objective=objective,
            seeds=seeds,
            settings=dict(shared.settings),
            seconds=time.perf_counter() - started,
            compile_seconds=worker.compile_seconds,
            modes=worker.modes,
        )


def _metric_shapes(job: Job, hparams: Mapping[str, Any], floats: set[str]) -> dict[str, tuple[int, ...]]:
    """The shape of each metric that a run returns, from an abstract trace: nothing is compiled.

    Args:
        job: the run.
        hparams: a value of each hyperparameter.
        floats: names of those that are traced.

    Raises:
        MujaxError: the run raises.
    """
    static = {name: value for name, value in hparams.items() if name not in floats}
    traced = {name: jax.ShapeDtypeStruct((), jnp.result_type(float)) for name in floats & set(hparams)}

    def run(traced: Mapping[str, Any], key: Any, steps: Any, data: Any) -> dict[str, Any]:
        together = {**static, **traced}
        state = job.init(together, key, data)
        state, metrics = job.advance(together, state, steps, data)
        return {**metrics, **job.finish(together, state, data)}

    key = jax.eval_shape(lambda: jax.random.key(0))
    steps = jax.ShapeDtypeStruct((), jnp.int32) if job.in_loop else None
    try:
        return {name: leaf.shape for name, leaf in jax.eval_shape(run, traced, key, steps, job.data).items()}
    except MujaxError:
        raise
    except Exception as error:
        raise MujaxError(where="run", expected=f"it to run with {hparams}", got=summary_of(error)) from error


def _first(distribution: Any) -> Any:
    """One of its values."""
    choices = getattr(distribution, "choices", None)
    return distribution.low if choices is None else choices[0]


def _is_traced(distribution: Any) -> bool:
    """Whether all values are numbers, and at least one is a float."""
    values = getattr(distribution, "choices", None) or (distribution.low, distribution.high)
    kinds = {type(value) for value in values}
    return float in kinds and kinds <= {int, float}


def study_module() -> Any:
    """`mujax.tune.study`, which needs Optuna: imported on use, so that the rest does not need it.

    Raises:
        ConfigError: Optuna is not installed.
    """
    try:
        return importlib.import_module("mujax.tune.study")
    except ModuleNotFoundError as error:
        raise ConfigError(
            where="sweep",
            expected=f"the package {error.name} to store trials with",
            got="none installed",
            remedy='pip install "mujax-mup[cli]"',
        ) from error
