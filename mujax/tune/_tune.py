"""Tuning on a proxy: `TuneConfig` names the model, the data and the searched hyperparameters.

`tune` reads it at the proxy's width, `mujax.transfer` at the target's.
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
from mujax._arguments import (
    CALLBACK,
    COUNT,
    FACTORY,
    LOSS,
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
    instance,
    one_of,
    several,
    shown,
    takes,
)
from mujax.errors import ConfigError
from mujax.optim import optimizer as optimizer_by_name
from mujax.train import (
    MODES,
    Batches,
    Mode,
    Training,
    as_batches,
    as_its_kind,
    default_loss,
    mapped_text,
    training_run,
)
from mujax.tune._results import Sweep, SweepProgress, Trial, read_trials
from mujax.tune._sweep import RUNGS, STORAGE, Study, study_module, sweep
from mujax.tune._tasks import TASKS, Task, in_batches, powers
from mujax.tune._user_code import build, imported

_VALID_SHARE: Final = 8
_OBJECTIVES: Final = ("loss", "mean_loss", "valid_loss")

OWN_SPACE: Final[Mapping[str, Any]] = {
    "learning_rate": powers(-14, -2),
    "init_scale": powers(-1.5, 1.5),
    "output_mult": powers(-3, 3),
}
"""The default space of a user's own model."""


_KINDS: Final[Mapping[str, Kind]] = {
    **dict.fromkeys(("seeds", "trials", "rungs", "length"), COUNT),
    **dict.fromkeys(("steps", "batch", "width", "base_width", "lanes"), COUNT | NONE),
    "data": PATH | NONE,
    "loss": TEXT | LOSS | NONE,
    "zero_init": several("a sequence of 'readout' and 'query'", one_of(("readout", "query")), '("readout",)')
    | NONE,
    "space": NAMED | NONE,
    "fixed": NAMED,
    "objective": one_of(_OBJECTIVES),
    "seed": SEED,
    "study": NAME | instance(Study, "a mujax.Study", "") | NONE,
    "storage": STORAGE | NONE,
    "mode": one_of(MODES) | NONE,
    "heartbeat": SECONDS,
    "patience": PATIENCE,
}


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """A search for hyperparameters on a proxy.

    A YAML, JSON or Python file given to `mujax tune` may hold the same fields.

    Attributes:
        task: `mnist-mlp` or `text-transformer`; or your own model: a factory `width -> module`, or its place,
            `"package.module:factory"`. Keyword arguments of the factory besides the width (`depth`,
            `dropout`) can be tuned or fixed, too.
        width: of the proxy; the task's own by default.
        data: file or folder of data: text, `.npz`, `.npy` or IDX (see `mujax.data.load`), or `.bin`, a text
            as raw uint16 tokens. A text as tokens of more than 256 MiB stays in its file.
        batches: for your own model in place of `data`: see `mujax.training_run`.
        valid: held-out batches beside `batches`.
        length: tokens of a sequence, for data that is a text.
        loss: `(outputs, targets) -> scalar`, or its place; cross-entropy or squared error by default.
        optimizer: optax's name.
        parametrization: a rule table; `"sp"` leaves the model as it is.
        base_width: µP's base; the proxy's width by default.
        zero_init: parameters that start at zero: `"readout"`, `"query"`.
        space: the tuned hyperparameters: see `mujax.sweep`; each task has a default.
        fixed: hyperparameters that are not tuned.
        objective: the metric to minimise: `loss` (over the last tenth of the steps), `mean_loss` (over all of
            them) or `valid_loss`, which needs held-out data.
        seeds: runs of each trial.
        seed: the first of them.
        steps: of a run.
        batch: examples a step.
        trials: the study's total.
        sampler: `"random"`, `"grid"`, or one of Optuna's by name.
        pruner: `"asha"` or another of Optuna's by name; None to stop no trial.
        rungs: evaluations of a run, the last one included.
        study: the name of the study; or a `mujax.Study`, in place of `storage`, `heartbeat` and `patience`.
        storage: a database URL or the path of an SQLite file; `mujax.db` by default.
        mode: `"loop"`, `"map"`, `"vmap"`; None measures which is fastest.
        lanes: runs at a time.
        heartbeat: seconds between two signs of life of a worker.
        patience: seconds to wait for a database that cannot be reached.

    Raises:
        ConfigError: an invalid value, alone or with the others.

    >>> TuneConfig("mnist-mlp", trials=32, objective="valid_loss").proxy
    64
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
    study: str | Study | None = None
    storage: str | None = None
    mode: Mode | None = None
    lanes: int | None = None
    heartbeat: float = 60.0
    patience: float = 300.0

    def __post_init__(self) -> None:
        check_arguments(_KINDS, vars(self))
        if self.data is not None:
            object.__setattr__(self, "data", pathlib.Path(self.data))
        named = isinstance(self.task, str) and (self.task in TASKS or ":" in self.task)
        if not named and not FACTORY.accepts(self.task):
            raise ConfigError(
                where="task",
                expected=f"one of {', '.join(TASKS)}, package.module:factory or a function of the width",
                got=shown(self.task),
                remedy='pass task="mnist-mlp" or task=lambda width: Net(width)',
            )
        optimizer_by_name(self.optimizer)
        rules.parametrization(self.parametrization)
        known = TASKS.get(self.task) if isinstance(self.task, str) else None
        if known is None:
            self._check_own()
        else:
            self._check_known(known)
        if self.objective == "valid_loss" and self.batches is not None and self.valid is None:
            raise ConfigError(
                where="objective",
                expected="held-out batches for 'valid_loss'",
                got="none",
                remedy="pass valid, or minimise loss or mean_loss",
            )
        if isinstance(self.study, Study):
            default = Study()
            for name in ("storage", "heartbeat", "patience"):
                if getattr(self, name) != getattr(default, name):
                    raise ConfigError(
                        where=name,
                        expected="it as a field of the Study",
                        got="it beside one",
                        remedy=f"pass study=mujax.Study(..., {name}=...)",
                    )

    def _check_own(self) -> None:
        """Checks the fields of a model of the user's own."""
        if self.width is None:
            raise ConfigError(where="width", expected="the proxy's width for a model of your own", got="none")
        if (self.data is None) == (self.batches is None):
            raise ConfigError(
                where="data",
                expected="either a file of data or batches for a model of your own",
                got="neither" if self.data is None else "both",
                remedy="pass --data FILE, or define batches in a Python --config FILE",
            )
        if self.batches is not None and self.steps is None:
            raise ConfigError(where="steps", expected="the number of steps beside batches", got="none")

    def _check_known(self, task: Task) -> None:
        """Checks the fields of a built-in task."""
        if self.batches is not None or self.loss is not None:
            raise ConfigError(
                where="batches, loss",
                expected=f"none for the task {self.task!r}, which has its own",
                got="one",
                remedy="pass your own factory as the task",
            )
        if self.data is not None and not task.takes_text:
            raise ConfigError(
                where="data",
                expected=f"none for the task {self.task!r}, which has its own",
                got=self.data,
                remedy="take text-transformer or your own factory as the task",
            )
        widths = [width for width in (self.width, self.base_width) if width is not None]
        if any(width % task.width_step for width in widths):
            raise ConfigError(
                where="width",
                expected=f"multiples of {task.width_step} for the task {self.task!r}",
                got=widths,
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
        """The tuned hyperparameters: `space`, or the default without the fixed ones."""
        if self.space is not None:
            return {name: _of_kind(name, values) for name, values in self.space.items()}
        own = OWN_SPACE if self.name not in TASKS else TASKS[self.name].space
        return {name: values for name, values in own.items() if name not in self.fixed}

    @property
    def all_fixed(self) -> dict[str, Any]:
        """The hyperparameters that are not tuned; the schedule is linear if its end or warm-up is given."""
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

    def stored(self) -> Study:
        """The study, with the settings that the runs depend on and the place of the data on this machine."""
        study = self.study
        if not isinstance(study, Study):
            study = Study(study, self.storage, heartbeat=self.heartbeat, patience=self.patience)
        data = None if self.data is None else str(self.data.absolute())
        return dataclasses.replace(
            study,
            settings={**self.settings(), **study.settings},
            attributes={"data": data, **study.attributes},
        )

    @property
    def study_name(self) -> str | None:
        """The name of the study; None if it is not stored."""
        return self.study.name if isinstance(self.study, Study) else self.study

    @property
    def study_storage(self) -> str | pathlib.Path | None:
        """Where the study is stored; None for the default."""
        return self.study.storage if isinstance(self.study, Study) else self.storage

    @classmethod
    def of_study(
        cls, study: str | Study, storage: str | pathlib.Path | None = None, **given: Any
    ) -> TuneConfig:
        """The configuration that a study was tuned with.

        Args:
            study: the study, or its name.
            storage: where it is stored.
            **given: fields that replace the stored ones, unless they are None: batches, a loss and a factory
                that is not a `"package.module:factory"` are not stored.

        Raises:
            ConfigError: the study does not exist, or `mujax tune` has not made it.
            StudyError: the database cannot be used.
        """
        place = study if isinstance(study, Study) else Study(study, storage)
        with study_module().SharedStudy.load(place.name, place.storage) as shared:
            settings, attributes = shared.settings, shared.attributes
        if "task" not in settings:
            raise ConfigError(
                where="study",
                expected="one that mujax tune has made",
                got=f"{place.name!r}, which has no settings of its",
            )
        names = {field.name for field in dataclasses.fields(cls)} - {"data"}
        known = {name: value for name, value in settings.items() if name in names}
        known["zero_init"] = tuple(known.get("zero_init", ()))
        if attributes.get("data") is not None:
            known["data"] = pathlib.Path(attributes["data"])
        known |= {name: value for name, value in given.items() if value is not None}
        return cls(**{**known, "study": study, "storage": storage})

    def training(self, width: int, *, steps: int | None = None, batch: int | None = None) -> Training:
        """The job at a width, with the proxy as its base.

        Args:
            width: of the model.
            steps: of a run; the configuration's by default.
            batch: examples a step; the configuration's by default.

        Raises:
            DataError: the data cannot be read.
            MujaxError: the factory raises, or `mup_init` refuses the model.
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


_CONFIG: Final = instance(TuneConfig, "a TuneConfig", 'TuneConfig("mnist-mlp")')


def _of_kind(name: str, values: Any) -> Any:
    """Choices as floats where they were written as whole numbers and the hyperparameter is a float."""
    return [as_its_kind(name, value) for value in values] if isinstance(values, list | tuple) else values


@dataclasses.dataclass(frozen=True)
class _Source:
    """A model of any width and its data.

    Attributes:
        factory: width, and keyword arguments if it takes any -> module.
        batches: training data.
        valid: (batch size, steps) -> held-out batches, or None.
        digest: of the data.
    """

    factory: Callable[..., Any]
    batches: Batches
    valid: Callable[[int, int], Any]
    digest: str


def _held_out(examples: data.Examples, batch: int, steps: int) -> list[tuple[Any, Any]]:
    """As many held-out batches as cost a small part of the training."""
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
        return _Source(module, batches, lambda _, __: config.valid, batches.digest())
    found = _loaded(config.data)
    if isinstance(found, data.TextData) and found.train.nbytes > _HELD_BYTES:
        batches = mapped_text(found.train, length=config.length)
        # As much of the held-out part as a run looks at.
        limit = config._batch * config._steps
        valid = data.text_windows(found.valid, length=config.length, limit=limit)
    elif isinstance(found, data.TextData):
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
    return _Source(module, batches, lambda batch, steps: _held_out(valid, batch, steps), batches.digest())


_HELD_BYTES: Final = 2**28
"""The largest text that is held in the devices' memory; a longer one stays in its file."""


def _loaded(path: pathlib.Path) -> data.Data:
    """The data of a file, mapped where it is a text as tokens that is too large to be held."""
    if path.suffix == ".bin" and path.exists():
        return data.token_file(path)
    if path.suffix == ".npy" and path.exists() and path.stat().st_size > _HELD_BYTES:
        return data.token_file(path)
    return data.load(path)


@takes(config=_CONFIG, progress=CALLBACK | NONE, finished=CALLBACK | NONE, say=CALLBACK | NONE)
def tune(
    config: TuneConfig,
    *,
    progress: Callable[[SweepProgress], None] | None = None,
    finished: Callable[[Trial], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Sweep:
    """Searches for hyperparameters on the proxy.

    Args:
        config: the search, and the study to store it in.
        progress: called at each rung.
        finished: called with each trial that this worker has stored.
        say: called with messages for the user, such as that the connection was lost.

    Returns:
        All finished trials of the study.

    Raises:
        ConfigError: a study with other settings or another space, or hyperparameters that the model does not
            have.
        DataError: the data cannot be read.
        StudyError: the database cannot be used.
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
        study=config.stored(),
        sampler=config.sampler,
        pruner=config.pruner,
        rungs=config.rungs,
        mode=config.mode,
        lanes=config.lanes,
        progress=progress,
        finished=finished,
        say=say,
    )


@takes(config=_CONFIG)
def read_study(config: TuneConfig) -> Sweep:
    """The trials of a study; runs nothing.

    Raises:
        ConfigError: the study does not exist, or has other settings than the configuration.
        StudyError: the database cannot be used.
    """
    name = config.study_name
    if name is None:
        raise ConfigError(where="study", expected="the name of a study that mujax tune has made", got="none")
    with study_module().SharedStudy.load(name, config.study_storage) as shared:
        stored = dict(shared.settings)
        for key, value in config.settings().items():
            # An old study can be read by a newer mujax, and with another number of rungs.
            if key not in ("mujax", "rungs") and key in stored and stored[key] != value:
                raise ConfigError(
                    where="study",
                    expected=f"{name!r} to have been tuned with {key} {value!r}",
                    got=repr(stored[key]),
                    remedy="give the same settings as to mujax tune",
                )
        return Sweep(
            study=name,
            trials=read_trials(shared),
            objective=stored.get("objective", config.objective),
            seeds=stored.get("seeds", config.seeds),
            settings=stored,
        )
