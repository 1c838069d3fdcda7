"""The measurements of a coordinate check: sizes of activations, of their changes and of the changes' parts.

One compiled step per width trains the model and reads its taps; everything is reduced to a few numbers per
tap on the device.

References:
    Yang et al., Tensor Programs V, arXiv 2203.03466, Appendix D.1 (coordinate checking).
    Yang, Simon, Bernstein, A Spectral Condition for Feature Learning, arXiv 2310.17813.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, PyTree

from mujax.check._taps import Tap, downstream, floating, mixing_sites
from mujax.core import Replay
from mujax.core.program import EqnPath, Insertion
from mujax.spec import leaf_path
from mujax.train import effort

STATS: Final = ("size", "change", "by_weights", "by_inputs", "inputs")
"""Mean absolute entry of: the activation; its change since initialisation; the part of that change that the
update of the tap's own parameters accounts for, and the rest, which its inputs account for; the activation
that a product multiplies with its parameters (NaN elsewhere)."""


class Subject(NamedTuple):
    """A model at one width to check.

    Attributes:
        replay: the model.
        optimizer: learning rate -> optimizer.
        taps: where to read activations.
    """

    replay: Replay
    optimizer: Callable[[Any], optax.GradientTransformation]
    taps: Sequence[Tap]


Batch = tuple[tuple[Any, ...], Any]
"""Inputs and targets."""

Loss = Callable[[Any, Any], Float[Array, ""]]


class Measured(NamedTuple):
    """The measurements at one width.

    Attributes:
        taps: (learning rates, seeds, steps + 1, taps, STATS).
        losses: (learning rates, seeds, steps + 1), before each step.
        initial: (seeds, parameters), the mean absolute entry of each parameter's initial value.
        gradients: (parameters,), the largest mean absolute entry of each gradient.
        paths: the parameters, in this order.
    """

    taps: np.ndarray
    losses: np.ndarray
    initial: np.ndarray
    gradients: np.ndarray
    paths: tuple[str, ...]


class _State(NamedTuple):
    params: PyTree
    opt_state: PyTree
    variables: list[Any]
    """The flat variables, with None for parameters."""


class Program:
    """The compiled step of one width.

    Args:
        subject: the model to check.
        loss: (model output, targets) -> scalar.
        batches: one for each step, repeated if there are fewer; activations are measured on the first.
        seeds: the seeds of the runs.
        runs: how many there are going to be at the least, over rates and seeds; they decide how well the
            programs are compiled, as does the next.
        steps: optimizer steps of a run.
        lanes: how many seeds to run at once, a divisor of their number; by default as many as fit the
            device's memory, on a CPU one.

    Attributes:
        paths: the parameters in the order in which they are measured, once it is compiled.
        lanes: how many seeds are run at once.
    """

    def __init__(
        self,
        subject: Subject,
        loss: Loss,
        batches: Sequence[Batch],
        seeds: Sequence[int],
        runs: int = 1,
        steps: int = 1,
        lanes: int | None = None,
    ) -> None:
        self._subject = subject
        self._loss = loss
        self._batches = batches
        self._seeds = seeds
        self._factors = [_later_factor(subject, tap) for tap in subject.taps]
        self._sites = [tap.site for tap in subject.taps if tap.site is not None]
        self._runs, self._steps = runs, steps
        self.paths: tuple[str, ...] = ()
        self.lanes = lanes or self._fitting_lanes()
        self._first: PyTree = None
        self._compiled: tuple[Any, Any] | None = None

    def compile(self) -> None:
        """Compiles for all runs; safe in a thread."""
        key, rate, number = _key(), _shape((), jnp.float32), _shape((), jnp.int32)
        batch = jax.eval_shape(lambda: self._batches[0])
        start, step = self._first_state, self._one_step
        if self.lanes > 1:
            key = _shape((self.lanes,), key.dtype)
            start = jax.vmap(start, in_axes=(0, None))
            step = jax.vmap(step, in_axes=(0, 0, None, None, 0, None, None))
        lowered = jax.jit(start).lower(key, rate)
        state, _ = jax.tree.map(lambda leaf: _shape(leaf.shape, leaf.dtype), lowered.out_info)
        first = self._taps_of(state, self.lanes)
        lowered_step = jax.jit(step, donate_argnums=0).lower(state, first, batch, batch, key, rate, number)
        self.paths = paths_of(state.params)
        self._first = first
        runs = self._runs / self.lanes
        self._compiled = (
            lowered.compile(effort(lowered, runs, in_part=True)),
            lowered_step.compile(effort(lowered_step, runs * (self._steps + 1), in_part=True)),
        )

    def _taps_of(self, state: _State, lanes: int) -> PyTree:
        """The shapes of what the taps compare, from those of a state of so many lanes."""

        def taps(params: PyTree, variables: list[Any]) -> PyTree:
            _, seen = self._read(params, variables, self._batches[0], jax.random.key(0))
            return self._compared(seen)

        return jax.eval_shape(taps if lanes == 1 else jax.vmap(taps), state.params, state.variables)

    def _fitting_lanes(self) -> int:
        """The number of seeds to run at once."""
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        if limit is None:
            # On a CPU one after the other is as fast, and compiles faster.
            return 1
        state, _ = jax.eval_shape(self._first_state, _key(), 0.0)
        # Parameters, moments and first activations; a step needs as much again, and gradients.
        held = jax.tree.leaves((state, self._taps_of(state, 1)))
        each = 4 * sum(leaf.size * leaf.dtype.itemsize for leaf in held)
        fitting, seeds = max(1, int(0.8 * limit // each)), len(self._seeds)
        return max(lanes for lanes in range(1, seeds + 1) if seeds % lanes == 0 and lanes <= fitting)

    def run(self, rate: float, steps: int, seeds: Sequence[int] | None = None) -> Iterator[list[Any]]:
        """Trains one model for each seed and yields its measurements.

        Yields:
            For each seed: first the initial sizes of the parameters; then, before each step and after the
            last, the sizes of the taps, those of the gradients, and the loss.

        Args:
            rate: the learning rate.
            steps: number of optimizer steps.
            seeds: of the runs, as many as fill all lanes; all by default.
        """
        if self._compiled is None:
            self.compile()
        assert self._compiled is not None
        start, step = self._compiled
        lr = np.float32(rate)
        seeds = self._seeds if seeds is None else seeds
        for lowest in range(0, len(seeds), self.lanes):
            together = [jax.random.key(seed) for seed in seeds[lowest : lowest + self.lanes]]
            key = jnp.stack(together) if self.lanes > 1 else together[0]
            state, initial = start(key, lr)
            rows = [jax.device_get(initial)]
            # Nothing is compared before the first step.
            first = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), self._first)
            for number in range(steps + 1):
                batch = self._batches[number % len(self._batches)]
                state, now, measured = step(state, first, self._batches[0], batch, key, lr, np.int32(number))
                first = now if number == 0 else first
                # Steps in flight would each have memory of their own.
                rows.append(jax.device_get(measured))
                del now
            del state, first
            if self.lanes == 1:
                yield rows
            else:
                for lane in range(self.lanes):
                    yield jax.tree.map(lambda leaf, lane=lane: leaf[lane], rows)

    def _first_state(self, key: Key[Array, ""], rate: Float[Array, ""]) -> tuple[_State, Any]:
        replay = self._subject.replay
        params, variables = replay.init(key)
        others = [None if at in replay.call.params else leaf for at, leaf in enumerate(variables)]
        return _State(params, self._subject.optimizer(rate).init(params), others), _of_leaves(params)

    def _read(self, params: PyTree, variables: list[Any], batch: Batch, key: Key[Array, ""]) -> Any:
        inputs, targets = batch
        output, records = self._subject.replay.apply(params, variables, inputs, key=key, taps=self._sites)
        return self._loss(output, targets), (records, floating(output))

    def _one_step(
        self,
        state: _State,
        first: PyTree,
        probe: Batch,
        batch: Batch,
        key: Key[Array, ""],
        rate: Float[Array, ""],
        number: Any,
    ) -> tuple[_State, PyTree, Any]:
        """The next state, what later steps compare with if this is the first one, and what it measures."""
        params, opt_state, variables = state
        (loss, seen), gradient = jax.value_and_grad(self._read, has_aux=True)(params, variables, batch, key)
        if len(self._batches) > 1:
            _, seen = self._read(params, variables, probe, key)
        now = self._compared(seen)
        measured = (self._of_taps(first, now, seen, moved=number > 0), _of_leaves(gradient), loss)
        tx = optax.with_extra_args_support(self._subject.optimizer(rate))
        updates, opt_state = tx.update(gradient, opt_state, params, value=loss)
        params = optax.apply_updates(params, updates)
        return _State(params, opt_state, variables), now, measured

    def _compared(self, seen: Any) -> list[tuple[Any, Any]]:
        """What each tap compares with its first value: the activation, and the operand of parameters."""
        records, outputs = seen
        found = []
        for tap in self._subject.taps:
            if tap.site is None:
                found.append((outputs[tap.output or 0], None))
            elif tap.reads is not None:
                found.append((records[tap.site].operands[tap.reads], None))
            else:
                record = records[tap.site]
                found.append((record.out, record.operands[tap.operand] if tap.operand >= 0 else None))
        return found

    def _of_taps(
        self, first: Sequence[tuple[Any, Any]], now: Sequence[tuple[Any, Any]], seen: Any, moved: Any
    ) -> Float[Array, "taps stats"]:
        rows = []
        for tap, factor, (old, old_weight), (new, weight) in zip(
            self._subject.taps, self._factors, first, now, strict=True
        ):
            part = inputs = None
            if tap.site is not None and weight is not None:
                operands = list(seen[0][tap.site].operands)
                if tap.kind in ("product", "readout"):
                    inputs = operands[1 - tap.operand]
                operands[tap.operand] = weight - old_weight
                part = _by_weights(self._subject.replay, tap, tap.site, operands)
            rows.append(_sizes(old, new, factor, moved, part, inputs))
        return jnp.stack(rows) if rows else jnp.zeros((0, len(STATS)))


def _shape(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _key() -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: jax.random.key(0))


def _later_factor(subject: Subject, tap: Tap) -> float:
    """The product of the constants behind a tap, inserted and the user's own."""
    if tap.site is None:
        return 1.0
    replay, products = subject.replay, mixing_sites(subject.taps)
    inserted = {site: _constant(insertion) for site, insertion in replay.insertions.items()}
    return downstream(replay.program, replay.analysis, inserted, tap.site, products)


def _constant(insertion: Insertion | None) -> float:
    factors = insertion.factors if insertion else ()
    return float(np.prod([float(factor) for factor in factors]))


def site_factor(subject: Subject, tap: Tap) -> float:
    """The product of all constants on a tap and behind it, inserted and the user's own."""
    own = 1.0 if tap.site is None else insertion_factor(subject, tap.site)
    return own * _later_factor(subject, tap)


def insertion_factor(subject: Subject, site: EqnPath) -> float:
    """The constant inserted at a place."""
    return _constant(subject.replay.insertions.get(site))


def inserted_factor(subject: Subject, tap: Tap) -> float:
    """The inserted constants alone."""
    bare = subject._replace(replay=dataclasses.replace(subject.replay, insertions={}))
    return site_factor(subject, tap) / site_factor(bare, tap)


def _sizes(
    old: Any, new: Any, factor: float, moved: Any, part: Any = None, inputs: Any = None
) -> Float[Array, " stats"]:
    """The `STATS` of a tap; changes are zero unless `moved`, whatever it is compared with."""
    old, new = _single(old), _single(new)
    change = new - old
    split = (jnp.nan, jnp.nan) if part is None else (_mean(part), _mean(change - _single(part)))
    given = jnp.nan if inputs is None else _mean(inputs)
    return jnp.stack(
        [factor * _mean(new), *(factor * moved * size for size in (_mean(change), *split)), given]
    )


def _single(x: Any) -> Any:
    return x.astype(jnp.complex64 if jnp.issubdtype(x.dtype, jnp.complexfloating) else jnp.float32)


def _mean(x: Any) -> Any:
    return jnp.mean(jnp.abs(x), dtype=jnp.float32)


def _by_weights(replay: Replay, tap: Tap, site: EqnPath, operands: list[Any]) -> Any:
    """Runs the equation again with the change of its parameters in their place: (W - W_0) x.

    Args:
        replay: the model.
        tap: the tap.
        site: its equation.
        operands: of the equation, with that change among them.
    """
    eqn = replay.equation(site)
    if eqn.primitive.name in ("add", "sub"):
        operands[1 - tap.operand] = jnp.zeros_like(operands[1 - tap.operand])

    def run(*operands: Any) -> Any:
        with eqn.ctx.manager:
            return eqn.primitive.bind(*operands, **eqn.params)

    for _ in range(replay.loops(site)):
        run = jax.vmap(run)
    out = run(*operands)
    insertion = replay.insertions.get(site)
    return out if insertion is None else insertion.times_factors(out)


def _of_leaves(tree: PyTree) -> Float[Array, " leaves"]:
    return jnp.stack([_mean(leaf) for leaf in jax.tree.leaves(tree)])


def paths_of(params: PyTree) -> tuple[str, ...]:
    """The paths of the parameters in the order of the tree."""
    return tuple(leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params))
