"""A jitted training step, and a jitted scan over many steps.

Both work on plain pytrees, so the variables of a Linen module, the state of an NNX module and the
parameters of a pure function train alike. Both donate the state: its buffers are updated in place. Both
run wherever the state is: parameters sharded over a mesh stay sharded as they are.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Float, Key, PyTree

from mujax._arguments import COUNT, FLAG, FLOATING, KEY, NONE, TRANSFORM, TREE, function, takes
from mujax.errors import ConfigError, MujaxError
from mujax.spec import leaf_path

_LOSS: Final = function(
    "a function of params, model state, batch and key", 4, "lambda params, model_state, batch, key: ..."
)


@runtime_checkable
class Loss(Protocol):
    """The function to minimise: (params, model_state, batch, key) -> (loss, (model_state, metrics)).

    `model_state` must be returned with the same structure, shapes and dtypes, updated or unchanged.
    `metrics` is a mapping of anything else to report, under any name but `"loss"`. `key` differs at every
    step.
    """

    def __call__(
        self, params: PyTree, model_state: PyTree, batch: PyTree, key: Key[Array, ""], /
    ) -> tuple[Float[Array, ""], tuple[PyTree, Mapping[str, Any]]]: ...


# The fields are trees of anything and not only of arrays: JAX puts shardings and axes in their place.
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "opt_state", "model_state", "key", "step"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step reads and writes.

    Attributes:
        params: the parameters to differentiate with respect to.
        opt_state: state of the optimizer.
        model_state: the model's other collections (batch statistics, an NNX module's rng counts); may be
            empty.
        key: the key that each step's key is derived from; does not change.
        step: number of steps taken.
    """

    params: PyTree
    opt_state: PyTree
    model_state: PyTree
    key: PyTree
    step: PyTree


@takes(params=TREE, tx=TRANSFORM, key=KEY | NONE)
def init_state(
    params: PyTree,
    tx: optax.GradientTransformation,
    *,
    model_state: PyTree = None,
    key: Key[Array, ""] | None = None,
) -> TrainState:
    """The state before the first step.

    All arrays are copied, so that `params` and `model_state` outlive the donation of the state; drop
    them to free their memory. Arrays that are not yet placed on particular devices (the step count, the key,
    a count of the optimizer) are replicated over the parameters' mesh, if they have one. The mesh may be of
    several processes, each of which calls this with the same global arrays.

    Args:
        params: parameters, on the devices and with the shardings to train in.
        tx: the optimizer.
        model_state: the model's other collections; none by default.
        key: for dropout and the like; `jax.random.key(0)` by default.

    >>> state = init_state({"w": jnp.ones(3)}, optax.sgd(0.1))
    >>> int(state.step), state.model_state
    (0, {})
    """
    params = jax.tree.map(_copied, params)
    state = TrainState(
        params=params,
        opt_state=tx.init(params),
        model_state=jax.tree.map(_copied, {} if model_state is None else model_state),
        key=_copied(jax.random.key(0) if key is None else key),
        step=jnp.zeros((), jnp.int32),
    )
    return _place(unshared(state), _replicated(params))


def _copied(leaf: Any) -> Any:
    if isinstance(leaf, Tracer) or getattr(leaf, "is_fully_addressable", True):
        return jax.device_put(leaf, may_alias=False)
    # `device_put` cannot copy what other processes hold a part of; a program can.
    return jax.jit(jnp.copy, out_shardings=leaf.sharding)(leaf)


def unshared(state: TrainState) -> TrainState:
    """The state with a buffer of its own for each array.

    Some optimizers keep the parameters themselves in their first state; no buffer can be donated twice.
    """
    seen: set[int] = set()

    def own(leaf: Any) -> Any:
        if id(leaf) in seen:
            return _copied(leaf)
        seen.add(id(leaf))
        return leaf

    return jax.tree.map(own, state)


def _sharding(leaf: Any) -> Sharding | None:
    """The committed sharding of a leaf; `None` for a tracer and for an array that JAX may move."""
    if isinstance(leaf, Tracer) or not getattr(leaf, "committed", True):
        return None
    return getattr(leaf, "sharding", None)


def _replicated(params: PyTree) -> NamedSharding | None:
    for sharding in map(_sharding, jax.tree.leaves(params)):
        if isinstance(sharding, NamedSharding) and len(sharding.device_set) > 1:
            return NamedSharding(sharding.mesh, PartitionSpec())
    return None


def _place(state: TrainState, sharding: NamedSharding | None) -> TrainState:
    if sharding is None:
        return state
    leaves, structure = jax.tree.flatten(state)
    is_open = [not _sharding(leaf) for leaf in leaves]
    put = iter(whole([leaf for leaf, is_one in zip(leaves, is_open, strict=True) if is_one], sharding.mesh))
    placed = [next(put) if is_one else leaf for leaf, is_one in zip(leaves, is_open, strict=True)]
    return jax.tree.unflatten(structure, placed)


def whole(tree: PyTree, mesh: Any) -> PyTree:
    """Puts arrays on a mesh, whole on each device; every process gives the same ones."""
    sharding = NamedSharding(mesh, PartitionSpec())
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    # `device_put` does not reach the devices of other processes; a program runs on all of them.
    return jax.jit(lambda tree: tree, out_shardings=sharding)(tree)


Step = Callable[[TrainState, PyTree], tuple[TrainState, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class JittedStep:
    """A jitted (state, batch) -> (state, metrics) whose state keeps its shardings.

    By default the compiler may place an updated parameter elsewhere (a replicated bias next to a sharded
    kernel comes back sharded): its buffer could not be reused and the next call would compile again. So the
    state is returned with the shardings that it came with, with one compiled function for each set of
    them.
    """

    _compiled: Callable[[Any, tuple[Sharding | None, ...]], Any]

    def __call__(self, state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, Any]]:
        """Runs it.

        Args:
            state: donated; use the returned one from here on.
            batch: as the loss takes it, with a leading step axis for `train_scan`.
        """
        return self._jit(state)(state, batch)

    def lower(self, state: TrainState, batch: PyTree) -> jax.stages.Lowered:
        """Lowers it as `jax.jit(...).lower` does, for arrays or `jax.ShapeDtypeStruct`s with shardings."""
        return self._jit(state).lower(state, batch)

    def _jit(self, state: TrainState) -> Any:
        leaves, treedef = jax.tree.flatten(state)
        return self._compiled(treedef, tuple(map(_sharding, leaves)))


def _jitted(step: Step, donate: bool) -> JittedStep:
    @functools.cache
    def compiled(treedef: Any, shardings: tuple[Sharding | None, ...]) -> Any:
        return jax.jit(
            step,
            donate_argnums=0 if donate else (),
            out_shardings=(jax.tree.unflatten(treedef, shardings), None),
        )

    return JittedStep(compiled)


def _check_unchanged(before: PyTree, after: PyTree) -> None:
    def described(tree: PyTree) -> dict[str, str]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {leaf_path(path): f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}" for path, leaf in leaves}

    old, new = described(before), described(after)
    remedy = "return the collections that the loss was passed, updated or unchanged"
    for path in (*old, *new):
        if old.get(path) != new.get(path):
            raise MujaxError(
                where=f"model_state at {path}",
                expected=f"{old.get(path, 'nothing')} back from the loss",
                got=new.get(path, "nothing"),
                remedy=remedy,
            )
    structures = jax.tree.structure(before), jax.tree.structure(after)
    if structures[0] != structures[1]:
        raise MujaxError(
            where="model_state",
            expected=f"the structure {structures[0]} back from the loss",
            got=structures[1],
            remedy=remedy,
        )


_Graded = tuple[Any, PyTree, Mapping[str, Any], PyTree]
"""Loss, model state, metrics and gradient."""


def _graded(loss: Loss, compute_dtype: Any) -> Callable[[PyTree, PyTree, PyTree, Key[Array, ""]], _Graded]:
    """The loss and its gradient, computed in another precision than that of the parameters."""

    def cast(tree: PyTree) -> PyTree:
        return jax.tree.map(
            lambda leaf: (
                leaf.astype(compute_dtype) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf
            ),
            tree,
        )

    def own_loss(params: PyTree, model_state: PyTree, batch: PyTree, key: Key[Array, ""]) -> Any:
        # An NNX variable can be written only in the trace that it was made in, so each is made again here.
        model_state = jax.tree.map(lambda leaf: leaf, model_state)
        if compute_dtype is not None:
            params, batch = cast(params), cast(batch)
        return loss(params, model_state, batch, key)

    def graded(params: PyTree, model_state: PyTree, batch: PyTree, key: Key[Array, ""]) -> _Graded:
        (value, (after, metrics)), gradient = jax.value_and_grad(own_loss, has_aux=True)(
            params, model_state, batch, key
        )
        _check_unchanged(model_state, after)
        return value, after, metrics, gradient

    return graded


def in_parts(batch: PyTree, parts: int) -> PyTree:
    """Splits the leading axis of each array, the examples', in two: that of the parts, and that of each one.

    Raises:
        ConfigError: the parts do not divide the batch.
    """

    def split(leaf: Any) -> Any:
        if leaf.shape[0] % parts:
            raise ConfigError(
                where="accumulate",
                expected="a number that divides the batch",
                got=f"{parts} for {leaf.shape[0]} examples",
            )
        # Each part is every n-th example: where the batch is split over devices, none has to move.
        return leaf.reshape(leaf.shape[0] // parts, parts, *leaf.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def _accumulated(graded: Callable[..., _Graded], parts: int) -> Callable[..., _Graded]:
    """The means over parts of the batch, one part after the other."""

    def run(params: PyTree, model_state: PyTree, batch: PyTree, key: Key[Array, ""]) -> _Graded:
        def one(carry: tuple[PyTree, PyTree], part: Any) -> Any:
            model_state, total = carry
            examples, number = part
            value, model_state, metrics, gradient = graded(
                params, model_state, examples, jax.random.fold_in(key, number)
            )
            return (model_state, jax.tree.map(jnp.add, total, gradient)), (value, dict(metrics))

        start = model_state, jax.tree.map(jnp.zeros_like, params)
        (model_state, total), (values, metrics) = jax.lax.scan(
            one, start, (in_parts(batch, parts), jnp.arange(parts))
        )
        metrics = jax.tree.map(lambda leaf: leaf.mean(0), metrics)
        return values.mean(), model_state, metrics, jax.tree.map(lambda leaf: leaf / parts, total)

    return run


def _pure_step(loss: Loss, tx: optax.GradientTransformation, accumulate: int, compute_dtype: Any) -> Step:
    update = optax.with_extra_args_support(tx).update
    graded = _graded(loss, compute_dtype)
    if accumulate > 1:
        graded = _accumulated(graded, accumulate)

    def step(state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, Any]]:
        key = jax.random.fold_in(state.key, state.step)
        value, model_state, metrics, gradient = graded(state.params, state.model_state, batch, key)
        updates, opt_state = update(gradient, state.opt_state, state.params, value=value)
        after = dataclasses.replace(
            state,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            model_state=model_state,
            step=state.step + 1,
        )
        return after, {**metrics, "loss": value}

    return step


@takes(loss=_LOSS, tx=TRANSFORM, donate=FLAG, accumulate=COUNT, compute_dtype=FLOATING | NONE)
def train_step(
    loss: Loss,
    tx: optax.GradientTransformation,
    *,
    donate: bool = True,
    accumulate: int = 1,
    compute_dtype: Any = None,
) -> JittedStep:
    """One optimizer step, jitted.

    The loss and its gradient are taken before the update. A loss that is not finite is returned as it is,
    with the parameters that follow from it: wrap `tx` in `optax.apply_if_finite` to skip such steps. The loss
    is passed to `tx` as `value=`, for transforms that use it.

    Args:
        loss: the function to minimise; see `Loss`.
        tx: the optimizer passed to `init_state`.
        donate: update the state in place; the state that was passed in is deleted.
        accumulate: parts of the batch, along the leading axis of each of its arrays, whose gradients are
            computed one after the other and averaged: less memory for activations, the same step if the loss
            is a mean over examples. Metrics are averaged too, and the model state goes from part to part.
        compute_dtype: precision of the loss and its gradient, e.g. `jnp.bfloat16`: floating parameters and
            batches are cast to it; parameters, gradients and optimizer keep their own.

    Returns:
        (state, batch) -> (state, metrics), where metrics are the loss's own and `"loss"`.

    Raises:
        ConfigError: `accumulate` is below 1 or, at the first call, does not divide the batch.
        MujaxError: at the first call, if `loss` returns a model state of another structure, shape or dtype.

    >>> def loss(params, model_state, batch, key):
    ...     return jnp.square(params["w"] - batch).mean(), (model_state, {})
    >>> tx = optax.sgd(0.5)
    >>> step = train_step(loss, tx)
    >>> state, metrics = step(init_state({"w": jnp.zeros(())}, tx), jnp.ones(4))
    >>> float(metrics["loss"]), float(state.params["w"])
    (1.0, 1.0)
    """
    return _jitted(_pure_step(loss, tx, accumulate, compute_dtype), donate)


@takes(
    loss=_LOSS,
    tx=TRANSFORM,
    donate=FLAG,
    unroll=COUNT,
    accumulate=COUNT,
    compute_dtype=FLOATING | NONE,
)
def train_scan(
    loss: Loss,
    tx: optax.GradientTransformation,
    *,
    donate: bool = True,
    unroll: int = 1,
    accumulate: int = 1,
    compute_dtype: Any = None,
) -> JittedStep:
    """Many optimizer steps as one jitted `lax.scan`; otherwise as `train_step`.

    On CPU, XLA runs convolutions inside a loop tens of times slower than outside of one (jax-ml/jax#12868):
    there, train a convolutional network with `train_step`, or set `unroll` to the number of steps.

    Args:
        loss: the function to minimise; see `Loss`.
        tx: the optimizer passed to `init_state`.
        donate: update the state in place; the state that was passed in is deleted.
        accumulate: parts of the batch, along the leading axis of each of its arrays, whose gradients are
            computed one after the other and averaged: less memory for activations, the same step if the loss
            is a mean over examples. Metrics are averaged too, and the model state goes from part to part.
        compute_dtype: precision of the loss and its gradient, e.g. `jnp.bfloat16`: floating parameters and
            batches are cast to it; parameters, gradients and optimizer keep their own.
        unroll: steps to lay out in one iteration of the compiled loop.

    Returns:
        (state, batches) -> (state, metrics), where batches and metrics have a leading step axis.

    Raises:
        ConfigError: `accumulate` is below 1 or, at the first call, does not divide the batch.
        MujaxError: at the first call, if `loss` returns a model state of another structure, shape or dtype.

    >>> def loss(params, model_state, batch, key):
    ...     return jnp.square(params["w"] - batch).mean(), (model_state, {})
    >>> tx = optax.sgd(0.25)
    >>> state, metrics = train_scan(loss, tx)(init_state({"w": jnp.zeros(())}, tx), jnp.ones((3, 4)))
    >>> metrics["loss"].tolist(), int(state.step)
    ([1.0, 0.25, 0.0625], 3)
    """
    step = _pure_step(loss, tx, accumulate, compute_dtype)

    def scan(state: TrainState, batches: PyTree) -> tuple[TrainState, dict[str, Any]]:
        return jax.lax.scan(step, state, batches, unroll=unroll)

    return _jitted(scan, donate)
