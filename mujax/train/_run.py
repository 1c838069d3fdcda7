"""A training run as a job: model in µP, batches, optimizer and loss as functions of hyperparameters."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from mujax._arguments import COUNT, FACTORY, LOSS, NONE, OPTIMIZER, instance, takes
from mujax.core import MupModel, Rules, mup_init
from mujax.errors import ConfigError
from mujax.optim import optimizer as optimizer_by_name
from mujax.spec import MupSpec
from mujax.train._batches import Batches, as_batches
from mujax.train._compile import steps_in_python
from mujax.train._hyperparameters import HYPERPARAMETERS
from mujax.train._losses import Losses, OutputLoss, as_inputs, default_loss, tail
from mujax.train._sharding import batch_sharding, check_batch, shardings
from mujax.train._step import TrainState, in_parts, init_state, train_step

# ---- learning rate and optimizer -------------------------------------------------------------------------

Schedule = Literal["constant", "linear", "cosine", "inverse_sqrt"]
SCHEDULES: Final[tuple[Schedule, ...]] = get_args(Schedule)


def schedule(hparams: Mapping[str, Any], steps: int) -> Callable[[Any], Float[Array, ""]]:
    """The learning rate at each step, from `learning_rate`, `schedule`, `warmup` and `end`.

    After a linear warm-up over the share `warmup` of the steps, it falls from the peak to the share `end` of
    it, linearly or as half a cosine, or with the inverse root of the steps, which does not read `end`. All
    values but the name of the schedule may be traced.

    Raises:
        ConfigError: an unknown schedule.

    >>> rate = schedule({"learning_rate": 1.0, "schedule": "linear", "warmup": 0.5}, 8)
    >>> [float(rate(step)) for step in range(8)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    given = {name: hparams.get(name, HYPERPARAMETERS[name].default) for name in ("schedule", "warmup", "end")}
    kind, warmup, end = given["schedule"], given["warmup"], given["end"]
    if kind not in SCHEDULES:
        raise ConfigError(
            where="schedule", expected=f"one of {', '.join(map(repr, SCHEDULES))}", got=repr(kind)
        )

    def rate(step: Any) -> Float[Array, ""]:
        risen = warmup * steps
        rise = jnp.minimum(1.0, (step + 1) / jnp.maximum(risen, 1.0))
        done = jnp.clip((step - risen) / jnp.maximum(steps - risen, 1.0), 0.0, 1.0)
        fall = {
            "constant": lambda: 1.0,
            "linear": lambda: 1 - (1 - end) * done,
            "cosine": lambda: end + (1 - end) * (1 + jnp.cos(math.pi * done)) / 2,
            "inverse_sqrt": lambda: jnp.sqrt(jnp.maximum(risen, 1.0) / jnp.maximum(step + 1, risen)),
        }[kind]()
        return hparams["learning_rate"] * rise * fall

    return rate


Optimizer = Callable[[Mapping[str, Any], MupSpec], optax.GradientTransformation]
"""(hyperparameters, some of them traced, and spec) -> the optimizer."""

_OWN: Final = ("momentum", "b1", "b2", "eps", "weight_decay")


def optimizer_from(name: str, steps: int) -> Optimizer:
    """An optimizer by name, as a function of the hyperparameters that mujax knows.

    Args:
        name: optax's name.
        steps: of the whole run; the schedule depends on it.

    Raises:
        ConfigError: an unknown optimizer; when called, a hyperparameter that it does not take.
    """
    make = optimizer_by_name(name)

    def build(hparams: Mapping[str, Any], spec: MupSpec) -> optax.GradientTransformation:
        given = _own_arguments(name, hparams)
        roles = ("input", "hidden", "output")
        mults = {role: hparams[f"lr_mult_{role}"] for role in roles if f"lr_mult_{role}" in hparams}
        return make(schedule(hparams, steps), spec, **given, lr_mults=mults or None)

    return build


def _own_arguments(name: str, hparams: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters that are arguments of the optimizer.

    Raises:
        ConfigError: it does not take one of them.
    """
    takes = inspect.signature(optimizer_by_name(name)).parameters
    for keyword in _OWN:
        if keyword in hparams and keyword not in takes:
            raise ConfigError(
                where=keyword,
                expected=f"a hyperparameter of {name}, which takes "
                f"{', '.join(key for key in _OWN if key in takes) or 'none of these'}",
                remedy="leave it out or take another optimizer",
            )
    return {keyword: hparams[keyword] for keyword in _OWN if keyword in hparams}


# ---- the job ---------------------------------------------------------------------------------------------

ModelOf = Callable[[Mapping[str, Any], tuple[Any, ...]], MupModel]
"""(static hyperparameters, abstract inputs) -> the model."""


@dataclasses.dataclass(frozen=True)
class _Built:
    """The model and sizes that depend on the static hyperparameters alone."""

    mup: MupModel
    batch: int
    steps: int


@dataclasses.dataclass
class Training:
    """A job that trains a model; made by `training_run`.

    Attributes:
        model: (static hyperparameters, abstract inputs) -> the model in µP.
        batches: the training data.
        optimizer: a name, or (hyperparameters, spec) -> optax transform.
        loss: (outputs, targets) -> scalar.
        default_steps: steps of a run without the hyperparameter `steps`.
        default_batch: examples a step without the hyperparameter `batch`.
        valid: held-out (inputs, targets), with leading axes (batches, batch), if any.
        static: names of hyperparameters that are Python values.
        mesh: the mesh that one run is split over; None for a single device. See `on`.
        rules: as for `MupModel.partition`.
        accumulate: parts of each batch whose gradients are computed one after the other.
    """

    model: ModelOf
    batches: Batches
    optimizer: str | Optimizer
    loss: OutputLoss
    default_steps: int
    default_batch: int
    valid: PyTree = None
    static: frozenset[str] = frozenset()
    mesh: Mesh | None = None
    rules: Rules | None = None
    accumulate: int = 1
    _built: dict[Any, _Built] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def data(self) -> PyTree:
        """Training and held-out data."""
        return self.batches.data, self.valid

    @property
    def in_loop(self) -> bool:
        """Whether the steps may be compiled as a loop."""
        first = next(iter(self._built.values()), None) or self.built({})
        return not steps_in_python(first.mup.replay.program)

    def on(self, mesh: Mesh, *, rules: Rules | None = None, accumulate: int = 1) -> Training:
        """The same run, split over a mesh of any number of processes; for `CompiledRuns` and `run_one`.

        Parameters and optimizer state are made where they belong and stay there; see `shardings`. The losses
        are those of a single device but for rounding.

        Args:
            mesh: as `make_mesh` returns it.
            rules: as for `MupModel.partition`.
            accumulate: as for `train_step`.

        Raises:
            ConfigError: the mesh does not divide the batch, or as `MupModel.partition` does.
            ShapeMismatchError: as `MupModel.partition` does.
        """
        held = rules if rules is None or isinstance(rules, Mapping) else tuple(rules)
        return dataclasses.replace(self, mesh=mesh, rules=held, accumulate=accumulate, _built={})

    def shardings(self, static: Mapping[str, Any], state: PyTree) -> PyTree:
        """Where each array of a state belongs on the mesh.

        Args:
            static: the static hyperparameters.
            state: as `init` returns it, or its shapes.
        """
        assert self.mesh is not None
        return shardings(self.built(static).mup, self.mesh, state, rules=self.rules)

    def check(self, hparams: Mapping[str, Any], /) -> None:
        """Raises an error for hyperparameters without effect, or if there is no learning rate.

        Args:
            hparams: some values.

        Raises:
            ConfigError: either of these.
        """
        static = {name: value for name, value in hparams.items() if name in self.static}
        built = self.built(static)
        for name, places in built.mup.replay.multiplier_sites.items():
            if name in hparams and not places:
                raise ConfigError(
                    where=name,
                    expected="a model with something for it to multiply",
                    got="none",
                    remedy="leave it out",
                )
        if not isinstance(self.optimizer, str):
            # The user's function may read any.
            return
        if "learning_rate" not in hparams:
            raise ConfigError(
                where="learning_rate",
                expected="it among the hyperparameters",
                got="none",
                remedy="tune or fix it",
            )
        names = {*HYPERPARAMETERS, *self.static} - {"dropout", "depth"} | self.static
        for name in hparams:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                meant = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(names))}"
                raise ConfigError(
                    where=name, expected="a hyperparameter of the training or the model", remedy=meant
                )
        _own_arguments(self.optimizer, hparams)

    def steps(self, static: Mapping[str, Any], /) -> int:
        """The number of optimizer steps of a run."""
        return self.built(static).steps

    def built(self, static: Mapping[str, Any]) -> _Built:
        """The model and sizes for some static hyperparameters; built once."""
        static = {name: value for name, value in static.items() if not isinstance(value, jax.Array)}
        key = tuple(sorted(static.items(), key=lambda item: item[0]))
        if key not in self._built:
            batch, steps = static.get("batch", self.default_batch), static.get("steps", self.default_steps)
            for name, value in (("batch", batch), ("steps", steps)):
                if not isinstance(value, int) or value < 1:
                    raise ConfigError(where=name, expected="a whole number of at least 1", got=repr(value))
            limit = self.batches.limit
            if limit is not None and steps > limit:
                raise ConfigError(
                    where="steps", expected=f"at most {limit}, the number of batches", got=steps
                )
            if "batch" in static and not self.batches.sized:
                raise ConfigError(
                    where="batch",
                    expected="batches that can be of any size to tune it",
                    got="ready ones",
                )
            inputs, _ = jax.eval_shape(
                functools.partial(self._first, batch=batch, steps=steps), self.batches.data
            )
            if self.accumulate > 1:
                # The model only ever sees parts.
                inputs = jax.eval_shape(lambda: in_parts(_zeros(inputs), self.accumulate))
                inputs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), inputs)
            if self.mesh is not None:
                check_batch(jax.tree.leaves(inputs)[0].shape[0], self.mesh, self.rules)
            self._built[key] = _Built(self.model(static, as_inputs(inputs)), batch, steps)
        return self._built[key]

    def _first(self, data: PyTree, *, batch: int, steps: int) -> tuple[Any, Any]:
        drawn = self.batches.draw(data, jax.random.key(0), batch, steps)
        return self.batches.fetch(data, jax.tree.map(lambda leaf: leaf[0], drawn))

    def init(self, hparams: Mapping[str, Any], key: Key[Array, ""], data: PyTree, /) -> PyTree:
        """The state before the first step: training state, losses so far, and the batches of all steps."""
        built = self.built(hparams)
        init_key, draw_key, key = jax.random.split(key, 3)
        params, variables = built.mup.replay.init(init_key)
        params = _scaled(params, built.mup.spec, hparams.get("init_scale", 1.0))
        held = built.mup.replay.call.params
        # The parameters among the variables are not read: dropped, they are not carried along.
        state = [None if place in held else leaf for place, leaf in enumerate(variables)]
        drawn = self.batches.draw(data[0], draw_key, built.batch, built.steps)
        objective = self._objective(hparams, built)
        last = jax.tree.map(lambda leaf: leaf[-tail(built.steps) :], drawn)
        return {
            "train": init_state(params, self._tx(hparams, built), model_state=state, key=key),
            "losses": jnp.zeros(built.steps),
            "untrained": jax.lax.map(
                lambda drawn: self._mean_score(
                    lambda batch: objective(params, state, batch, key)[0], self._batch(data, drawn)
                ),
                last,
            ).mean(),
            "drawn": drawn,
        }

    def advance(
        self, hparams: Mapping[str, Any], state: PyTree, steps: Int[Array, ""] | None, data: PyTree, /
    ) -> tuple[PyTree, Mapping[str, Any]]:
        """Trains; the metrics are `loss`, over the last tenth of a run, and `mean_loss`, over all steps."""
        built = self.built(hparams)
        objective = self._objective(hparams, built)
        step = train_step(objective, self._tx(hparams, built), donate=False, accumulate=self.accumulate)

        def one(_: Any, state: PyTree) -> PyTree:
            train: TrainState = state["train"]
            drawn = jax.tree.map(lambda leaf: leaf[train.step], state["drawn"])
            after, metrics = step(train, self._batch(data, drawn))
            return {**state, "train": after, "losses": state["losses"].at[train.step].set(metrics["loss"])}

        state = one(None, state) if steps is None else jax.lax.fori_loop(0, steps, one, state)
        taken, losses = state["train"].step, state["losses"]
        recent = taken - tail(built.steps)
        return state, {"loss": _mean(losses, recent, taken), "mean_loss": _mean(losses, 0, taken)}

    def finish(self, hparams: Mapping[str, Any], state: PyTree, data: PyTree, /) -> Mapping[str, Any]:
        """The `curve` of losses, `untrained`, whether it `diverged`, and `valid_loss` with held-out data."""
        built, losses = self.built(hparams), state["losses"]
        summary = Losses(losses.mean(), losses[-tail(built.steps) :].mean(), state["untrained"])
        metrics: dict[str, Any] = {
            "curve": losses,
            "untrained": summary.untrained,
            "diverged": ~summary.healthy,
        }
        if self.valid is not None:
            replay = self._with_multipliers(hparams, built)
            train: TrainState = state["train"]

            def score(batch: Any) -> Float[Array, ""]:
                inputs, targets = batch
                outputs, _ = replay.apply(train.params, train.model_state, as_inputs(inputs), key=train.key)
                return self.loss(outputs, targets)

            metrics["valid_loss"] = jax.lax.map(lambda batch: self._mean_score(score, batch), data[1]).mean()
        return metrics

    def _tx(self, hparams: Mapping[str, Any], built: _Built) -> optax.GradientTransformation:
        make = (
            optimizer_from(self.optimizer, built.steps) if isinstance(self.optimizer, str) else self.optimizer
        )
        return make(hparams, built.mup.spec)

    def _with_multipliers(self, hparams: Mapping[str, Any], built: _Built) -> Any:
        names = ("output_mult", "attention_mult", "input_mult")
        given = {name: hparams[name] for name in names if name in hparams}
        return (built.mup.with_multipliers(**given) if given else built.mup).replay

    def _batch(self, data: PyTree, drawn: Any) -> tuple[Any, Any]:
        """The inputs and targets of one step, split over the mesh."""
        if self.mesh is None:
            return self.batches.fetch(data[0], drawn)
        place = batch_sharding(self.mesh, rules=self.rules)
        batch = self.batches.on(self.mesh, place.spec).fetch(data[0], drawn)
        return jax.lax.with_sharding_constraint(batch, place)

    def _mean_score(self, score: Callable[[Any], Float[Array, ""]], batch: Any) -> Float[Array, ""]:
        """The mean of a score over the parts of a batch that the model sees."""
        if self.accumulate == 1:
            return score(batch)
        return jax.lax.map(score, in_parts(batch, self.accumulate)).mean()

    def _objective(self, hparams: Mapping[str, Any], built: _Built) -> Any:
        replay = self._with_multipliers(hparams, built)

        def objective(params: PyTree, model_state: Any, batch: Any, key: Any) -> Any:
            inputs, targets = batch
            outputs, _ = replay.apply(params, model_state, as_inputs(inputs), key=key)
            return self.loss(outputs, targets), (model_state, {})

        return objective


def _zeros(shapes: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def _mean(losses: Float[Array, " steps"], start: Any, end: Any) -> Float[Array, ""]:
    places = jnp.arange(len(losses))
    inside: Bool[Array, " steps"] = (places >= start) & (places < end)
    return jnp.where(inside, losses, 0.0).sum() / jnp.maximum(inside.sum(), 1).astype(losses.dtype)


def _scaled(params: PyTree, spec: MupSpec, multiple: Any) -> PyTree:
    """Multiplies the initial values of weights by σ, but not those of biases and gains."""
    if isinstance(multiple, int | float) and multiple == 1.0:
        return params

    def scale(path: Any, leaf: Any) -> Any:
        weight = spec["/".join(entry.key for entry in path)].fan_in
        return leaf * jnp.asarray(multiple, leaf.dtype) if weight else leaf

    return jax.tree_util.tree_map_with_path(scale, params)


def model_of(
    factory: Callable[..., Any],
    *,
    width: int,
    base_width: int,
    parametrization: Any = "mup",
    **mup_kwargs: Any,
) -> ModelOf:
    """A factory of modules as a function of the static hyperparameters.

    Args:
        factory: width -> a Linen module, an NNX factory or a `Functional`; hyperparameters that it has
            keyword arguments for are passed to it.
        width: of the model.
        base_width: width at which hyperparameters are tuned.
        parametrization: as for `mup_init`, as is all that follows.
    """
    takes = _keywords(factory)

    def make(static: Mapping[str, Any], inputs: tuple[Any, ...]) -> MupModel:
        given = {name: value for name, value in static.items() if name in takes}
        # A model of the base's own widths does not show which axes are infinite.
        delta = factory(2 * base_width, **given) if width == base_width else None
        return mup_init(
            factory(width, **given),
            factory(base_width, **given),
            *inputs,
            delta=delta,
            parametrization=parametrization,
            **mup_kwargs,
        )

    return make


def _keywords(factory: Callable[..., Any]) -> frozenset[str]:
    """The keyword arguments of a factory besides the width."""
    parameters = list(inspect.signature(factory).parameters.values())[1:]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return frozenset(parameter.name for parameter in parameters if parameter.kind in named)


@takes(
    model=FACTORY | instance(MupModel, "a MupModel", ""),
    optimizer=OPTIMIZER,
    steps=COUNT,
    width=COUNT | NONE,
    base_width=COUNT | NONE,
    batch=COUNT,
    loss=LOSS,
)
def training_run(
    model: Callable[..., Any] | MupModel,
    batches: Any,
    optimizer: str | Optimizer = "adam",
    *,
    steps: int,
    width: int | None = None,
    base_width: int | None = None,
    batch: int = 1,
    loss: OutputLoss = default_loss,
    valid: Iterable[tuple[Any, Any]] | None = None,
    **mup_kwargs: Any,
) -> Training:
    """A training run of a model in µP, as a pure function of its hyperparameters, for `mujax.sweep`.

    It needs the hyperparameter `learning_rate`, and knows `lr_mult_input`, `lr_mult_hidden`,
    `lr_mult_output`, `schedule`, `warmup`, `end`, `momentum`, `b1`, `b2`, `eps`, `weight_decay`,
    `init_scale`, `output_mult`, `attention_mult`, `input_mult`, `batch`, `steps`, and the keyword arguments
    of `model`.

    Args:
        model: width -> a Linen module, an NNX factory `rngs -> nnx.Module`, or a `Functional`, perhaps with
            further keyword arguments (`depth`, `dropout`) that can be tuned; or a ready `MupModel`.
        batches: an iterable of `(inputs, targets)`, of which every run sees the first `steps`; a pure
            function `(key, step) -> (inputs, targets)`; or `mujax.Batches`.
        optimizer: a name, or `(hparams, spec) -> optax transform` with values that may be traced.
        steps: of a run.
        width: of the model; the proxy's, where it is tuned.
        base_width: µP's base; `width` itself by default.
        batch: examples a step, for batches of any size.
        loss: `(outputs, targets) -> scalar`. By default mean cross-entropy for integer targets and mean
            squared error for others.
        valid: held-out batches of the same shapes, for the metric `valid_loss`.
        **mup_kwargs: passed to `mup_init`: `parametrization`, `roles`, `zero_init`, ...

    Returns:
        A job; its metrics are `loss`, the mean over the last tenth of the steps, `mean_loss`, over all steps,
        `untrained`, the initial model's loss on the batches of the last tenth, and `valid_loss`.

    Raises:
        ConfigError: arguments that cannot be combined.

    Example:
        >>> import flax.linen as nn
        >>> def net(width):
        ...     return nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(1)])
        >>> x = jax.random.normal(jax.random.key(0), (8, 32, 4))
        >>> run = training_run(net, [(x, jnp.sin(x[:, :1])) for x in x], steps=8, width=16)
        >>> run.steps({})
        8
    """
    if isinstance(model, MupModel):
        if width is not None or base_width is not None or mup_kwargs:
            raise ConfigError(
                where="training_run",
                expected="a ready MupModel alone",
                got="arguments of mup_init beside it",
                remedy="pass the factory of the modules instead",
            )
        ready = model
        make: ModelOf = lambda _, __: ready  # noqa: E731
        static: frozenset[str] = frozenset()
    else:
        if width is None:
            raise ConfigError(where="width", expected="the width of the model", got="none")
        make = model_of(
            model, width=width, base_width=width if base_width is None else base_width, **mup_kwargs
        )
        static = _keywords(model)
    if isinstance(optimizer, str):
        optimizer_by_name(optimizer)
    held_out = None if valid is None else as_batches(valid, "valid")
    return Training(
        model=make,
        batches=as_batches(batches, batch=batch, steps=steps),
        optimizer=optimizer,
        loss=loss,
        default_steps=steps,
        default_batch=batch,
        valid=None if held_out is None else held_out.data,
        static=static | {"batch", "steps", "schedule"},
    )
