"""Tuning on a proxy: what is trained, on which data, and which hyperparameters are searched for.

`TuneConfig` says all of it, for `tune` at the proxy's width and for `mujax.transfer` at the target's.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Final

import jax.numpy as jnp

from mujax import data, rules
from mujax.errors import ConfigError
from mujax.optim import optimizer as optimizer_by_name
from mujax.train import Batches, Mode, Training, as_batches, as_its_kind, default_loss, training_run
from mujax.tune._sweep import RUNGS, Sweep, SweepProgress, Trial, read_trials, study_module, sweep
from mujax.tune._tasks import TASKS, in_batches, powers
from mujax.tune._user_code import build, imported

_VALID_SHARE: Final = 8

OWN_SPACE: Final[Mapping[str, Any]] = {
    "learning_rate": powers(-14, -2),
    "init_scale": powers(-1.5, 1.5),
    "output_mult": powers(-3, 3),
}
"""What is tuned by default in a user's own model."""


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """A search for hyperparameters on a proxy.

    A YAML, JSON or Python file given to `mujax tune` may hold the same.

    Attributes:
        task: a name out of `mnist-mlp` and `text-transformer`; or a model of your own: a factory
            `width -> module`, or where to find one, `"package.module:factory"`. What the factory takes by
            keyword besides the width (`depth`, `dropout`) can be tuned or fixed, too.
        width: of the proxy; the task's own by default.
        data: file or folder of data: text, `.npz`, `.npy` or IDX (see `mujax.data.load`).
        batches: for your own model in place of `data`: see `mujax.training_run`.
        valid: held-out batches beside `batches`.
        length: tokens of a sequence, for data that is a text.
        loss: `(outputs, targets) -> scalar`, or where to find it; cross-entropy or squared error by default.
        optimizer: optax's name.
        parametrization: a rule table; `"sp"` for the model as it is.
        base_width: µP's base; the proxy's width by default.
        zero_init: what starts at zero: `"readout"`, `"query"`.
        space: what is tuned: see `mujax.sweep`; a default for each task.
        fixed: hyperparameters that are not tuned.
        objective: the metric to minimise: `loss` (over the last tenth of the steps), `mean_loss` (over all of
            them) or `valid_loss`.
        seeds: runs of each trial.
        seed: the first of them.
        steps: of a run.
        batch: examples a step.
        trials: how many the study is to hold.
        sampler: `"random"`, `"grid"`, or one of Optuna's by name.
        pruner: `"asha"` or another of Optuna's by name; None for none.
        rungs: looks at a run before its end.
        study: the name of the study.
        storage: a database URL or the path of an SQLite file; `mujax.db` by default.
        mode: `"loop"`, `"map"`, `"vmap"`; None finds out which is fastest.
        lanes: runs at a time.
        heartbeat: seconds between a worker's signs of life.
        patience: seconds for which to wait for a database that can't be reached.

    Raises:
        ConfigError: a value that makes no sense, alone or with the others.
    """

    task: Any = "mnist-mlp"
    width: int | None = None
    data: pathlib.Path | None = None
    batches: Any = None
    valid: Any = None
    length: int = 64
    loss: Any = None
    optimizer: str = "adam"
    parametrization: str = "mup"
    base_width: int | None = None
    zero_init: tuple[str, ...] | None = None
    space: Mapping[str, Any] | None = None
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    objective: str = "loss"
    seeds: int = 1
    seed: int = 0
    steps: int | None = None
    batch: int | None = None
    trials: int = 64
    sampler: str = "random"
    pruner: str | None = None
    rungs: int = RUNGS
    study: str | None = None
    storage: str | None = None
    mode: Mode | None = None
    lanes: int | None = None
    heartbeat: float = 60.0
    patience: float = 300.0

    def __post_init__(self) -> None:
        for name in ("seeds", "trials", "rungs", "steps", "batch", "width", "base_width", "lanes", "length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: expected at least 1, got {value}.")
        if not callable(self.task) and self.task not in TASKS and ":" not in str(self.task):
            raise ConfigError(
                f"task: expected one of {', '.join(TASKS)}, package.module:factory or a function of the "
                f"width, got {self.task!r}."
            )
        known = TASKS.get(self.task) if isinstance(self.task, str) else None
        optimizer_by_name(self.optimizer)
        rules.parametrization(self.parametrization)
        if known is None and self.width is None:
            raise ConfigError("width: expected the proxy's width for a model of your own, got none.")
        if known is None and (self.data is None) == (self.batches is None):
            what = "neither" if self.data is None else "both"
            raise ConfigError(
                f"data: expected either a file of data or batches for a model of your own, got {what}; "
                "pass --data FILE, or define batches in a Python --config FILE."
            )
        if known is not None and (self.batches is not None or self.loss is not None):
            raise ConfigError(
                f"batches, loss: expected none for the task {self.task!r}, which brings its own; give your "
                "own factory as the task."
            )
        if known is not None and self.data is not None and not known.takes_text:
            raise ConfigError(
                f"data: expected none for the task {self.task!r}, which brings its own, got {self.data}; "
                "take text-transformer or your own factory as the task."
            )
        if self.batches is not None and self.steps is None:
            raise ConfigError("steps: expected the number of steps beside batches, got none.")
        unknown = {"readout", "query"}.symmetric_difference({*(self.zero_init or ()), "readout", "query"})
        if unknown:
            raise ConfigError(f"zero_init: expected 'readout' or 'query', got {unknown.pop()!r}.")
        widths = [width for width in (self.width, self.base_width) if width is not None]
        if known is not None and any(width % known.width_step for width in widths):
            raise ConfigError(
                f"width: expected multiples of {known.width_step} for the task {self.task!r}, got {widths}."
            )

    @property
    def name(self) -> str:
        """The task in words: its name, or that of the factory."""
        if isinstance(self.task, str):
            return self.task
        return f"{getattr(self.task, '__module__', '?')}:{getattr(self.task, '__qualname__', 'factory')}"

    @property
    def title(self) -> str:
        """The task for a caption."""
        known = TASKS.get(self.name)
        return self.name if known is None else known.title

    @property
    def proxy(self) -> int:
        """The proxy's width."""
        if self.width is not None:
            return self.width
        return TASKS[self.name].proxy

    @property
    def target(self) -> int | None:
        """The task's own target width; None for a model of the user's."""
        return TASKS[self.name].target if self.name in TASKS else None

    @property
    def whole_space(self) -> Mapping[str, Any]:
        """What is tuned."""
        if self.space is not None:
            return {name: _of_kind(name, values) for name, values in self.space.items()}
        own = OWN_SPACE if self.name not in TASKS else TASKS[self.name].space
        return {name: values for name, values in own.items() if name not in self.fixed}

    @property
    def all_fixed(self) -> dict[str, Any]:
        """What is not tuned; the schedule falls in a line where its end or warm-up is tuned."""
        shaped = {"warmup", "end"} & {*self.whole_space, *self.fixed}
        default = {"schedule": "linear"} if shaped and "schedule" not in self.whole_space else {}
        return {**default, **{name: as_its_kind(name, value) for name, value in self.fixed.items()}}

    def settings(self) -> dict[str, Any]:
        """Everything the runs depend on; stored with the study and compared on resume."""
        return {
            "task": self.name,
            "data": self._source.digest,
            "width": self.proxy,
            "base_width": self.base_width or self.proxy,
            "length": self.length,
            "optimizer": self.optimizer,
            "parametrization": self.parametrization,
            "zero_init": list(self.zero_init or ()),
            "steps": self._steps,
            "batch": self._batch,
            "rungs": self.rungs,
            "mujax": importlib.metadata.version("mujax-mup"),
        }

    def notes(self) -> dict[str, Any]:
        """What a study needs beside its name to be resumed on this machine."""
        return {"data": None if self.data is None else str(self.data.absolute())}

    @classmethod
    def of_study(cls, study: str, storage: str | None = None, **given: Any) -> TuneConfig:
        """The configuration that a study was tuned with.

        Args:
            study: its name.
            storage: where it is.
            **given: fields in place of what the study remembers, where they are not None: batches, a loss and
                a factory that is no `"package.module:factory"` are not stored.

        Raises:
            ConfigError: no such study, or one that `mujax tune` has not made.
            StudyError: a database that can't be used.
        """
        with study_module().SharedStudy.load(study, storage) as shared:
            stored, notes = shared.settings, shared.attributes
        if "task" not in stored:
            raise ConfigError(
                f"study: expected one that mujax tune has made, got {study!r}, which has no settings of its."
            )
        names = {field.name for field in dataclasses.fields(cls)} - {"data"}
        known = {name: value for name, value in stored.items() if name in names}
        known["zero_init"] = tuple(known.get("zero_init", ()))
        if notes.get("data") is not None:
            known["data"] = pathlib.Path(notes["data"])
        known |= {name: value for name, value in given.items() if value is not None}
        return cls(**{**known, "study": study, "storage": storage})

    def training(self, width: int, *, steps: int | None = None, batch: int | None = None) -> Training:
        """The job at some width, with the proxy as its base.

        Raises:
            DataError: data that can't be read.
            MujaxError: a factory that raises, or a model that `mup_init` refuses.
        """
        source = self._source
        loss = default_loss if self.loss is None else self.loss
        if isinstance(loss, str):
            loss = imported(loss, "loss", "a function of outputs and targets")
        return training_run(
            source.factory,
            source.batches,
            self.optimizer,
            steps=steps or self._steps,
            width=width,
            base_width=self.base_width or self.proxy,
            batch=batch or self._batch,
            loss=loss,
            valid=source.valid(batch or self._batch, steps or self._steps),
            parametrization=self.parametrization,
            zero_init=self.zero_init or (),
        )

    @property
    def _steps(self) -> int:
        return self.steps or (TASKS[self.name].steps if self.name in TASKS else 100)

    @property
    def _batch(self) -> int:
        return self.batch or (TASKS[self.name].batch if self.name in TASKS else 32)

    @functools.cached_property
    def _source(self) -> _Source:
        if self.name in TASKS:
            return _known_source(self.name, self.data)
        return _own_source(self)


def _of_kind(name: str, values: Any) -> Any:
    """Choices that were written as whole numbers, where the hyperparameter is not one."""
    return [as_its_kind(name, value) for value in values] if isinstance(values, list | tuple) else values


@dataclasses.dataclass(frozen=True)
class _Source:
    """A model of any width and what it is trained on.

    Attributes:
        factory: width, and perhaps keyword arguments -> module.
        batches: to train on.
        valid: (batch size, steps) -> held-out batches, or None.
        digest: of the data.
    """

    factory: Callable[..., Any]
    batches: Batches
    valid: Callable[[int, int], Any]
    digest: str


def _held_out(examples: data.Examples, batch: int, steps: int) -> list[tuple[Any, Any]]:
    """As many batches as cost a small part of the training."""
    found = in_batches(examples, batch, max(1, steps // _VALID_SHARE))
    return list(zip(found.inputs, found.targets, strict=True))


def _known_source(name: str, file: pathlib.Path | None) -> _Source:
    task = TASKS[name]
    train, held_out = task.load(file)
    return _Source(
        factory=lambda width: task.build(width)[0],
        batches=Batches(train, task.draw, task.fetch),
        valid=lambda batch, steps: _held_out(task.valid(held_out), batch, steps),
        digest=data.digest(train),
    )


def _own_source(config: TuneConfig) -> _Source:
    name = config.name
    factory = config.task
    if isinstance(factory, str):
        factory = imported(factory, "task", "a function of the width")

    @functools.wraps(factory)
    def module(width: int, **given: Any) -> Any:
        return build(name, factory, width, "task", **given)[0]

    if config.data is None:
        batches = as_batches(config.batches)
        return _Source(module, batches, lambda _, __: config.valid, data.digest(batches.data))
    found = data.load(config.data)
    if isinstance(found, data.TextData):
        length = config.length
        train, held_out = jnp.asarray(found.train), found.valid
        batches = Batches(
            train,
            lambda tokens, key, batch, steps: data.text_starts(
                len(tokens), key, batch=batch, length=length, steps=steps
            ),
            lambda tokens, starts: data.text_window(tokens, starts, length=length),
        )
        valid = data.text_windows(held_out, length=length)
    else:
        train, valid = data.Examples(*map(jnp.asarray, found.train)), found.valid
        batches = Batches(
            train,
            lambda examples, key, batch, steps: data.batch_indices(
                key, len(examples.targets), batch=batch, steps=steps
            ),
            lambda examples, order: data.Examples(examples.inputs[order], examples.targets[order]),
        )
    return _Source(
        module, batches, lambda batch, steps: _held_out(valid, batch, steps), data.digest(batches.data)
    )


def tune(
    config: TuneConfig,
    *,
    progress: Callable[[SweepProgress], None] | None = None,
    finished: Callable[[Trial], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Sweep:
    """Searches for hyperparameters on the proxy.

    Args:
        config: what to search, and the study to store it in.
        progress: called at each rung.
        finished: called with each trial that this worker has finished.
        say: called with what a person should know.

    Raises:
        ConfigError: a study with other settings, or hyperparameters that the model does not have.
        DataError: data that can't be read.
        StudyError: a database that can't be used.
        MujaxError: as `mup_init` does.
    """
    return sweep(
        config.training(config.proxy),
        config.whole_space,
        trials=config.trials,
        seeds=config.seeds,
        seed=config.seed,
        fixed=config.all_fixed,
        objective=config.objective,
        study=config.study,
        storage=config.storage,
        sampler=config.sampler,
        pruner=config.pruner,
        rungs=config.rungs,
        mode=config.mode,
        lanes=config.lanes,
        settings=config.settings(),
        notes=config.notes(),
        heartbeat=config.heartbeat,
        patience=config.patience,
        progress=progress,
        finished=finished,
        say=say,
    )


def read_study(config: TuneConfig) -> Sweep:
    """What a study holds, without running anything.

    Raises:
        ConfigError: no such study, or one with other settings than the configuration's.
        StudyError: a database that can't be used.
    """
    if config.study is None:
        raise ConfigError("study: expected the name of a study that mujax tune has made, got none.")
    with study_module().SharedStudy.load(config.study, config.storage) as shared:
        stored = dict(shared.settings)
        for name, value in config.settings().items():
            # A newer mujax, or other looks at a run, read an old study all the same.
            if name not in ("mujax", "rungs") and name in stored and stored[name] != value:
                raise ConfigError(
                    f"study: expected {config.study!r} to have been tuned with {name} {value!r}, found "
                    f"{stored[name]!r}; give the same settings as to mujax tune."
                )
        return Sweep(
            study=config.study,
            trials=read_trials(shared),
            objective=stored.get("objective", config.objective),
            seeds=stored.get("seeds", config.seeds),
            settings=stored,
        )
