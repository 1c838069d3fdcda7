"""Many runs of one program: looped, mapped or vmapped, in stages, over all local devices.

A lane is one run: its traced hyperparameters and its key. Lanes that share shapes share one program and go
from rung to rung together. A lane that is dropped at a rung, because it diverged or was stopped, costs
nothing from then on.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
import operator
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Literal, Protocol, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int, Key, PyTree

from mujax.errors import ConfigError, MujaxError
from mujax.train._compile import effort
from mujax.train._step import whole

Mode = Literal["loop", "map", "vmap"]
MODES: Final[tuple[Mode, ...]] = get_args(Mode)

Metrics = dict[str, Any]
"""The measurements of a run at a rung, by name."""

_AXIS: Final = "lanes"

# The share of the free memory that a program may use.
_SHARE: Final = 0.7

# Several rungs are passed in one call where that takes at most so many seconds: what a call costs besides its
# steps counts where they are few, and progress is shown after each call.
_CALL_SECONDS: Final = 1.0

# Another mode is tried if the remaining steps take this many times as long as compiling it.
_WORTH: Final = 10.0


class Job(Protocol):
    """A run as pure functions of its hyperparameters.

    Attributes:
        data: arrays that all lanes share.
        in_loop: whether the steps may be compiled as a loop; else each is a separate call.
        static: names of the hyperparameters that are Python values even where they are floats.
    """

    @property
    def data(self) -> PyTree: ...

    @property
    def in_loop(self) -> bool: ...

    @property
    def static(self) -> frozenset[str]: ...

    def check(self, hparams: Mapping[str, Any], /) -> None:
        """Raises an error for an unknown or a missing hyperparameter."""
        ...

    def steps(self, static: Mapping[str, Any], /) -> int:
        """The number of steps of a run."""
        ...

    def init(self, hparams: Mapping[str, Any], key: Key[Array, ""], data: PyTree, /) -> PyTree:
        """The state before the first step."""
        ...

    def advance(
        self, hparams: Mapping[str, Any], state: PyTree, steps: Int[Array, ""] | None, data: PyTree, /
    ) -> tuple[PyTree, Mapping[str, Any]]:
        """The state after some steps and its metrics; `steps` is None for one step outside of a loop."""
        ...

    def finish(self, hparams: Mapping[str, Any], state: PyTree, data: PyTree, /) -> Mapping[str, Any]:
        """The metrics that are measured at the end of the run only."""
        ...


@dataclasses.dataclass(frozen=True)
class FunctionJob:
    """A job of a single step: a function (hyperparameters, key) -> metrics."""

    run: Callable[[dict[str, Any], Key[Array, ""]], Mapping[str, Any]]
    data: PyTree = ()
    in_loop: bool = True
    static: frozenset[str] = frozenset()

    def check(self, hparams: Mapping[str, Any], /) -> None:
        """Accepts all: the function is the user's own."""
        del hparams

    def steps(self, static: Mapping[str, Any], /) -> int:
        """One."""
        del static
        return 1

    def init(self, hparams: Mapping[str, Any], key: Key[Array, ""], data: PyTree, /) -> PyTree:
        """The key."""
        del hparams, data
        return key

    def advance(
        self, hparams: Mapping[str, Any], state: PyTree, steps: Int[Array, ""] | None, data: PyTree, /
    ) -> tuple[PyTree, Mapping[str, Any]]:
        """Runs it."""
        del steps, data
        metrics = self.run(dict(hparams), state)
        if not isinstance(metrics, Mapping):
            raise ConfigError(
                where="run",
                expected="it to return a mapping of metrics such as {'loss': ...}",
                got=type(metrics).__name__,
            )
        return state, metrics

    def finish(self, hparams: Mapping[str, Any], state: PyTree, data: PyTree, /) -> Mapping[str, Any]:
        """Nothing more."""
        del hparams, state, data
        return {}


class OutOfMemoryError(MujaxError):
    """A program does not fit into memory; fewer lanes at once may."""


# ---- programs --------------------------------------------------------------------------------------------


class _Program:
    """A function that is compiled ahead of time for each set of argument shapes.

    Attributes:
        seconds: time of compilation.
        flops: operations of one lane on all its devices, as XLA counts them; the body of a loop counts once.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        donate: tuple[int, ...],
        fits: Callable[[Any], None],
        out_shardings: Callable[..., Any] | None = None,
    ) -> None:
        self._function = function
        self._donate = donate
        self._out_shardings = out_shardings
        self._fits = fits
        self._compiled: dict[Any, Any] = {}
        self.seconds = 0.0
        self.flops = 0.0

    def prepare(self, *args: Any, lanes: int = 1, runs: float = math.inf, beside_others: bool = False) -> Any:
        """The compiled program for these arguments.

        Args:
            *args: arguments of the shapes of the later calls.
            lanes: number of lanes that share one body of the program.
            runs: how often a lane runs the body in total.
            beside_others: whether as many lanes as there are cores call it at the same time.
        """
        leaves, structure = jax.tree.flatten(args)
        shapes = structure, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
        if shapes not in self._compiled:
            start = time.perf_counter()
            options = {} if self._out_shardings is None else {"out_shardings": self._out_shardings(*args)}
            jitted = jax.jit(self._function, donate_argnums=self._donate, **options)
            lowered = jitted.lower(*args)
            program = lowered.compile(effort(lowered, runs / lanes, beside_others=beside_others))
            self._fits(program)
            self._compiled[shapes] = program
            self.seconds += time.perf_counter() - start
            # Before XLA optimises: a GPU's products become calls of a library, which it does not count.
            self.flops = float((lowered.cost_analysis() or {}).get("flops", 0.0)) / lanes
        return self._compiled[shapes]

    def __call__(self, *args: Any, lanes: int = 1, runs: float = math.inf) -> Any:
        return self.run(self.prepare(*args, lanes=lanes, runs=runs), *args)

    def run(self, prepared: Any, *args: Any) -> Any:
        """Runs what `prepare` returned for arguments of the same shapes, which are not compared again."""
        try:
            return jax.block_until_ready(prepared(*args))
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise OutOfMemoryError(str(error).partition("\n")[0]) from error
            raise


def free_memory(device: Any) -> int | None:
    """Free bytes of a device, for a CPU those of the machine; None if they are not known."""
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit")
        return None if limit is None else limit - stats.get("bytes_in_use", 0)
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


@functools.cache
def threads() -> int:
    """Lanes to run at the same time on a CPU: small products use one core only."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


class CompiledRuns:
    """The compiled programs of all runs that share shapes, and how fast they are.

    Args:
        job: the run.
        static: the hyperparameters that the shapes depend on.
        mode: how to run lanes; None measures which is fastest.
        devices: None for all local devices.
        lost: (metrics at a rung) -> whether the run ends there, as a pure function. Where it is given, runs
            that take under a second go on from the second rung before they are looked at; else each rung is
            looked at.

    Attributes:
        mesh: the mesh that the single lane of a job is split over, as `Training.on` returns it; None where
            each lane is on one device.
    """

    def __init__(
        self,
        job: Job,
        static: Mapping[str, Any],
        *,
        mode: Mode | None = None,
        devices: Sequence[Any] | None = None,
        lost: Callable[[Metrics], Bool[Array, ""]] | None = None,
    ) -> None:
        self.job, self.static, self.lost = job, dict(static), lost
        self.mesh: Mesh | None = getattr(job, "mesh", None)
        self._mode: Mode | None = mode if self.mesh is None else "loop"
        mine = None if self.mesh is None else list(self.mesh.local_devices)
        self.devices = mine or list(devices or jax.local_devices())
        self.steps = job.steps(self.static)
        self.seconds_per_step: dict[Mode, float] = {}
        """Seconds per step of one lane, by mode."""
        self.last_mode: Mode = self.modes[0]
        """The mode of the last lanes."""
        self.lanes_left = 1.0
        """Number of lanes that are still to be run; the effort of compilation depends on it."""
        self._programs: dict[tuple[Mode, str], _Program] = {}
        self._data: Any = None

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The modes worth trying, the one that compiles fastest first.

        An accelerator is fastest with all lanes in one program. On a CPU with a single device threads use the
        cores best for small models; XLA's batched products are slow there.
        """
        if self._mode is not None:
            return (self._mode,)
        if self.devices[0].platform != "cpu":
            return ("vmap",)
        return ("loop", "map", "vmap") if len(self.devices) == 1 else ("map", "vmap")

    def choose(self, lane_steps: int) -> Mode:
        """The mode of the next lanes.

        Each mode is measured once, on lanes that have to be run anyway, if it may gain more than compiling it
        costs.

        Args:
            lane_steps: steps that are left of all lanes together.
        """
        known = self.seconds_per_step
        untried: list[Mode] = [mode for mode in self.modes if mode not in known]
        if not known:
            return untried[0]
        best: Mode = min(known, key=known.__getitem__)
        left = known[best] * lane_steps
        if untried and left > _WORTH * self.compile_seconds / len(known):
            return untried[0]
        return best

    @property
    def compile_seconds(self) -> float:
        """Total seconds of compilation."""
        return sum(program.seconds for program in self._programs.values())

    @property
    def flops(self) -> float | None:
        """Operations of one run, as XLA counts those of a step before it optimises; None if they are unknown.

        A `FunctionJob` may have loops inside, whose bodies XLA counts once.
        """
        if isinstance(self.job, FunctionJob):
            return None
        for (_, name), program in self._programs.items():
            if name == "advance" and program.flops:
                return program.flops * self.steps
        return None

    def runs(self, name: str) -> float:
        """How often the body of a program is still to be run."""
        return self.lanes_left * (self.steps if name == "advance" else 1)

    @property
    def data(self) -> PyTree:
        """The shared arrays, on the devices."""
        if self._data is None:
            self._data = self.put(self.job.data)
        return self._data

    def put(self, tree: PyTree) -> PyTree:
        """Puts what all lanes share on the devices, whole on each."""
        if self.mesh is not None:
            return whole(tree, self.mesh)
        return jax.device_put(tree, self.sharding() if len(self.devices) > 1 else self.devices[0])

    def sharding(self, *axes: str) -> NamedSharding:
        """Lanes split over the devices, or replicated."""
        return NamedSharding(jax.sharding.Mesh(np.array(self.devices), (_AXIS,)), PartitionSpec(*axes))

    def program(self, mode: Mode, name: str) -> _Program:
        """`init`, `advance` or `finish` of the job, for as many lanes as the mode takes at once."""
        if (mode, name) not in self._programs:
            made = getattr(self, f"_{name}")(mode)
            # A CPU's devices share one memory.
            on_cpu = self.devices[0].platform == "cpu"
            at_once = (threads() if mode == "loop" else len(self.devices)) if on_cpu else 1
            fits = functools.partial(_check_fits, device=self.devices[0], at_once=at_once)
            places = None if self.mesh is None else functools.partial(self._places, name, made)
            self._programs[mode, name] = _Program(made, (1,) if name == "advance" else (), fits, places)
        return self._programs[mode, name]

    def _places(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """Where the results of a program on a mesh are: states where they belong, metrics on all devices."""
        job: Any = self.job
        everywhere = NamedSharding(job.mesh, PartitionSpec())
        if name == "finish":
            return everywhere
        out = jax.eval_shape(function, *args)
        state = job.shardings(self.static, out if name == "init" else out[0])
        return state if name == "init" else (state, everywhere, everywhere)

    def abstract_state(self, traced: Mapping[str, Any], key: Key[Array, ""]) -> PyTree:
        """The state of a lane as shapes, with its shardings on a mesh: what a checkpoint is restored to."""
        hparams = {name: jnp.asarray(value, jnp.result_type(float)) for name, value in traced.items()}
        job: Any = self.job
        function = self._init("loop")
        args = hparams, key, jnp.bool_(True), jax.eval_shape(lambda: self.job.data)
        shapes = jax.eval_shape(function, *args)
        if self.mesh is None:
            return shapes
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            shapes,
            job.shardings(self.static, shapes),
        )

    def _init(self, mode: Mode) -> Callable[..., Any]:
        def one(traced: Mapping[str, Any], key: Any, alive: Any, data: PyTree) -> Any:
            del alive
            return self.job.init({**self.static, **traced}, key, data)

        return self._many(mode, one)

    def _advance(self, mode: Mode) -> Callable[..., Any]:
        """From rung to rung: `counts` has the steps up to each, then zeros.

        Returns the state, the metrics with a leading axis of rungs, and how many of these were reached.
        """

        def one(traced: Mapping[str, Any], state: Any, alive: Any, counts: Any, data: PyTree) -> Any:
            def to_rung(state: Any, count: Any) -> Any:
                state, metrics = self.job.advance({**self.static, **traced}, state, count, data)
                return state, dict(metrics)

            def go(state: Any) -> Any:
                if len(counts) > 1 and self.lost is not None:
                    return _rung_by_rung(to_rung, self.lost, state, counts)
                # One step at a time is not a loop, even over many lanes.
                state, metrics = to_rung(state, counts[0] if self.job.in_loop else None)
                return state, jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], metrics), jnp.int32(1)

            return self._if_alive(mode, alive, go, state)

        return self._many(mode, one)

    def _finish(self, mode: Mode) -> Callable[..., Any]:
        def one(traced: Mapping[str, Any], state: Any, alive: Any, data: PyTree) -> Any:
            def go(state: Any) -> Any:
                return dict(self.job.finish({**self.static, **traced}, state, data))

            return self._if_alive(mode, alive, go, state, whole=False)

        return self._many(mode, one)

    def _if_alive(
        self, mode: Mode, alive: Any, go: Callable[[Any], Any], state: Any, whole: bool = True
    ) -> Any:
        if mode != "map":
            return go(state)

        def skip(state: Any) -> Any:
            shapes = jax.eval_shape(go, state)
            nothing = jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[1:] if whole else shapes
            )
            return (state, *nothing) if whole else nothing

        return jax.lax.cond(alive, go, skip, state)

    def _many(self, mode: Mode, one: Callable[..., Any]) -> Callable[..., Any]:
        """The function of one lane for many: three arguments have an axis of lanes, the others none."""
        if mode == "loop":
            return one

        def many(*args: Any) -> Any:
            lanes, shared = args[:3], args[3:]
            if mode == "map":
                return jax.lax.map(lambda lane: one(*lane, *shared), lanes)
            return jax.vmap(lambda *lane: one(*lane, *shared))(*lanes)

        if len(self.devices) == 1:
            return many

        def split(*args: Any) -> Any:
            each, same = PartitionSpec(_AXIS), PartitionSpec()
            specs = tuple(each if place < 3 else same for place in range(len(args)))
            mesh = jax.sharding.Mesh(np.array(self.devices), (_AXIS,))
            return jax.shard_map(many, mesh=mesh, in_specs=specs, out_specs=each, check_vma=False)(*args)

        return split


def _rung_by_rung(
    to_rung: Callable[[Any, Any], tuple[Any, Any]],
    lost: Callable[[Metrics], Bool[Array, ""]],
    state: PyTree,
    counts: Int[Array, " rungs"],
) -> tuple[PyTree, PyTree, Int[Array, ""]]:
    """Up to the last rung whose count is not zero, or to the one at which the run is lost."""
    shapes = jax.eval_shape(to_rung, state, counts[0])[1]
    blank = jax.tree.map(lambda leaf: jnp.zeros((len(counts), *leaf.shape), leaf.dtype), shapes)

    def goes_on(carry: Any) -> Any:
        place, is_lost, *_ = carry
        return (place < (counts > 0).sum()) & ~is_lost

    def body(carry: Any) -> Any:
        place, _, state, found = carry
        state, metrics = to_rung(state, counts[place])
        found = jax.tree.map(lambda rungs, leaf: rungs.at[place].set(leaf), found, metrics)
        return place + 1, lost(metrics), state, found

    carry = jnp.int32(0), jnp.bool_(False), state, blank
    reached, _, state, found = jax.lax.while_loop(goes_on, body, carry)
    return state, found, reached


def _check_fits(program: Any, device: Any, at_once: int) -> None:
    free, found = free_memory(device), program.memory_analysis()
    if free is None or found is None:
        return
    needed = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    needed = at_once * (needed + found.temp_size_in_bytes)
    if needed > _SHARE * free:
        raise OutOfMemoryError(f"{needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free")


# ---- running lanes ---------------------------------------------------------------------------------------


class Lanes(Protocol):
    """Runs between their first step and their last, by number."""

    @property
    def mode(self) -> Mode:
        """The mode."""
        ...

    def advance(self, counts: Sequence[int]) -> list[dict[int, Metrics]]:
        """Advances all remaining runs from rung to rung.

        Args:
            counts: the steps up to each rung, then zeros for none: one program serves any number of rungs.

        Returns:
            The metrics at each rung, of the runs that reached it.
        """
        ...

    def finish(self) -> dict[int, Metrics]:
        """The final metrics."""
        ...

    def drop(self, numbers: Iterable[int]) -> None:
        """Stops some runs."""
        ...


def _by_rung(metrics: PyTree, reached: Any) -> list[Metrics]:
    return [jax.tree.map(operator.itemgetter(rung), metrics) for rung in range(int(reached))]


def _rungs(lanes: Mapping[int, Sequence[Metrics]]) -> list[dict[int, Metrics]]:
    most = max(map(len, lanes.values()), default=0)
    return [{lane: found[rung] for lane, found in lanes.items() if rung < len(found)} for rung in range(most)]


class _Looped:
    """One program for one lane, on as many threads as there are cores."""

    def __init__(
        self,
        group: CompiledRuns,
        mode: Mode,
        traced: Mapping[str, np.ndarray],
        keys: Any,
        started: Mapping[int, PyTree] | None = None,
    ) -> None:
        self._group = group
        self.mode: Mode = mode
        # On other platforms than the CPU a thread would only wait for its turn.
        self._threads = threads() if group.devices[0].platform == "cpu" else 1
        self._hparams = [
            self._put(
                {name: jnp.asarray(values[lane], jnp.result_type(float)) for name, values in traced.items()}
            )
            for lane in range(len(keys))
        ]
        self._states: dict[int, PyTree] = dict(started or {}) or self._each(
            "init", {lane: (self._put(key),) for lane, key in enumerate(keys)}
        )

    def advance(self, counts: Sequence[int]) -> list[dict[int, Metrics]]:
        """Advances all remaining runs from rung to rung."""
        found: dict[int, Any] = {}
        for _ in range(1 if self._group.job.in_loop else sum(counts)):
            done = self._each("advance", {lane: (state,) for lane, state in self._states.items()}, counts)
            self._states = {lane: state for lane, (state, *_) in done.items()}
            found = {lane: rest for lane, (_, *rest) in done.items()}
        return _rungs({lane: _by_rung(*jax.tree.map(np.asarray, rest)) for lane, rest in found.items()})

    def finish(self) -> dict[int, Metrics]:
        """The final metrics."""
        done = self._each("finish", {lane: (state,) for lane, state in self._states.items()})
        return {lane: jax.tree.map(np.asarray, metrics) for lane, metrics in done.items()}

    def state(self, number: int) -> PyTree:
        """The state of a run."""
        return self._states[number]

    def drop(self, numbers: Iterable[int]) -> None:
        """Stops some runs."""
        for lane in numbers:
            del self._states[lane]

    def _put(self, tree: PyTree) -> PyTree:
        # On a mesh of several processes each argument has to be an array of all of them.
        return tree if self._group.mesh is None else self._group.put(tree)

    def _each(self, name: str, lanes: Mapping[int, tuple[Any]], *shared: Sequence[int]) -> dict[int, Any]:
        program = self._group.program("loop", name)
        rest = (*self._put([jnp.array(counts, jnp.int32) for counts in shared]), self._group.data)
        alive = self._put(jnp.bool_(True))

        numbers = list(lanes)
        if not numbers:
            return {}
        # Compiled here, so that threads do not each compile their own.
        first = numbers[0]
        prepared = program.prepare(
            *(self._hparams[first], *lanes[first], alive, *rest),
            runs=self._group.runs(name),
            beside_others=len(numbers) >= self._threads > 1,
        )

        def call(lane: int) -> Any:
            return program.run(prepared, self._hparams[lane], *lanes[lane], alive, *rest)

        with concurrent.futures.ThreadPoolExecutor(self._threads) as pool:
            return dict(zip(numbers, pool.map(call, numbers), strict=True))


class _Stacked:
    """One program for all lanes, which lie along a leading axis, split over the devices."""

    def __init__(self, group: CompiledRuns, mode: Mode, traced: Mapping[str, np.ndarray], keys: Any) -> None:
        self._group = group
        self.mode: Mode = mode
        count = len(keys)
        # The padding is copies of the first lane, at most a quarter; after a drop up to half is dead anyway.
        self._lanes: list[int | None] = [*range(count), *[None] * (self._padded(count, 4) - count)]
        order = np.array([lane or 0 for lane in self._lanes])
        self._hparams = {
            name: self._put(jnp.asarray(values, jnp.result_type(float))[order])
            for name, values in traced.items()
        }
        self._state = self._call("init", self._put(keys[order]))

    def advance(self, counts: Sequence[int]) -> list[dict[int, Metrics]]:
        """Advances all remaining runs from rung to rung."""
        found: Any = ()
        for _ in range(1 if self._group.job.in_loop else sum(counts)):
            self._state, *found = self._call("advance", self._state, jnp.array(counts, jnp.int32))
        return _rungs({lane: _by_rung(*rest) for lane, rest in self._by_lane(found).items()})

    def finish(self) -> dict[int, Metrics]:
        """The final metrics."""
        return self._by_lane(self._call("finish", self._state))

    def drop(self, numbers: Iterable[int]) -> None:
        """Stops some runs."""
        gone = set(numbers)
        self._lanes = [None if lane in gone else lane for lane in self._lanes]
        kept = [place for place, lane in enumerate(self._lanes) if lane is not None]
        size = self._padded(len(kept))
        # A vmapped program works for its dead lanes, too; a mapped one skips them.
        if self.mode == "vmap" and kept and size <= len(self._lanes) // 2:
            order = np.array([*kept, *[kept[0]] * (size - len(kept))])
            self._lanes = [*(self._lanes[place] for place in kept), *[None] * (size - len(kept))]
            self._hparams, self._state = jax.tree.map(
                lambda leaf: self._put(leaf[order]), (self._hparams, self._state)
            )

    def _padded(self, count: int, sizes: int = 1) -> int:
        """Rounds up the lanes of each device to one of some sizes an octave: there are few programs then."""
        devices = len(self._group.devices)
        each = -(-count // devices)
        octave = 1 << (each - 1).bit_length() >> 1
        unit = max(1, octave // sizes)
        return devices * unit * -(-each // unit)

    def _put(self, leaf: Any) -> Any:
        devices = self._group.devices
        return jax.device_put(leaf, devices[0] if len(devices) == 1 else self._group.sharding(_AXIS))

    def _call(self, name: str, lanes: Any, *shared: Any) -> Any:
        alive = self._put(jnp.array([lane is not None for lane in self._lanes]))
        if len(self._group.devices) > 1:
            shared = jax.device_put(shared, self._group.sharding())
        program = self._group.program(self.mode, name)
        in_one_body = len(self._lanes) // len(self._group.devices) if self.mode == "vmap" else 1
        runs = self._group.runs(name)
        return program(self._hparams, lanes, alive, *shared, self._group.data, lanes=in_one_body, runs=runs)

    def _by_lane(self, tree: Any) -> dict[int, Any]:
        found = jax.tree.map(np.asarray, tree)
        return {
            lane: jax.tree.map(lambda leaf, place=place: leaf[place], found)
            for place, lane in enumerate(self._lanes)
            if lane is not None
        }


Watch = Callable[[int, Mapping[int, Metrics]], Iterable[int]]
"""(steps taken, metrics by lane) -> the lanes to drop."""


def run_lanes(
    group: CompiledRuns,
    traced: Mapping[str, np.ndarray],
    keys: Key[Array, " n"],
    *,
    rungs: Sequence[int] = (),
    watch: Watch = lambda _, __: (),
    left: int | None = None,
) -> list[Metrics]:
    """Runs lanes from their first step to their last, in halves if memory is too small for all at once.

    Args:
        group: the programs.
        traced: the hyperparameters that are not static, each (n,).
        keys: of each lane.
        rungs: after how many steps to look at them; the last step is always one.
        watch: called at each rung; a lane that had to be started again is shown to it again.
        left: steps of all lanes that are still to be run, these included; a faster mode pays off by them.

    Returns:
        The metrics of each lane: of its last rung and, unless it was dropped, of the end.

    Raises:
        OutOfMemoryError: a single lane (for each device) does not fit.
    """
    count = len(keys)
    stops = sorted({*(stop for stop in rungs if 0 < stop < group.steps), group.steps})
    left = count * group.steps if left is None else left
    group.lanes_left = left / group.steps
    mode = group.last_mode = group.choose(left)
    try:
        return _through(group, mode, traced, keys, stops, watch)
    except OutOfMemoryError as error:
        if count <= len(group.devices):
            raise OutOfMemoryError(
                f"a run with {group.static or 'these shapes'} does not fit into memory: {error}; take a "
                "smaller model or batch."
            ) from error
    half = -(-count // 2)
    parts = slice(None, half), slice(half, None)
    return [
        metrics
        for first, part in zip((0, half), parts, strict=True)
        for metrics in run_lanes(
            group,
            {name: values[part] for name, values in traced.items()},
            keys[part],
            rungs=rungs,
            watch=_shifted(watch, first),
            left=left,
        )
    ]


def _shifted(watch: Watch, first: int) -> Watch:
    def shifted(steps: int, metrics: Mapping[int, Metrics]) -> Iterable[int]:
        return [
            lane - first for lane in watch(steps, {first + lane: found for lane, found in metrics.items()})
        ]

    return shifted


def _through(
    group: CompiledRuns,
    mode: Mode,
    traced: Mapping[str, np.ndarray],
    keys: Any,
    stops: Sequence[int],
    watch: Watch,
) -> list[Metrics]:
    lanes: Lanes = (_Looped if mode == "loop" else _Stacked)(group, mode, traced, keys)
    found: dict[int, Metrics] = {lane: {} for lane in range(len(keys))}
    live, taken, spent, work = set(found), 0, 0.0, 0
    # One program takes any number of rungs up to this, so that it is compiled once.
    most = len(stops) if group.lost is not None and group.job.in_loop else 1
    left, ahead = list(stops), 1
    while left and live:
        reached, left = left[:ahead], left[ahead:]
        counts = np.diff([taken, *reached]).tolist()
        start, compiled = time.perf_counter(), group.compile_seconds
        metrics = lanes.advance([*counts, *[0] * (most - len(counts))])
        spent += time.perf_counter() - start - (group.compile_seconds - compiled)
        work += sum(count * len(there) for count, there in zip(counts, metrics, strict=False))
        taken = reached[-1]
        nobody: Sequence[dict[int, Metrics]] = [{}] * (len(reached) - len(metrics))
        for stop, there in zip(reached, [*metrics, *nobody], strict=True):
            here = {lane: there[lane] for lane in live if lane in there}
            found |= here
            # What is not here was lost at the rung before.
            gone = live - here.keys()
            if here:
                gone |= set(watch(stop, here)) & live
            lanes.drop(gone)
            live -= gone
        # A lane that diverges mostly does so before the first rung, which is passed alone.
        step = len(live) * spent / max(work, 1)
        ahead = max(1, sum(step * (stop - taken) <= _CALL_SECONDS for stop in left[:most]))
    if live:
        for lane, metrics in lanes.finish().items():
            found[lane] = {**found[lane], **metrics}
    group.seconds_per_step.setdefault(mode, spent / max(work, 1))
    return [found[lane] for lane in range(len(keys))]


def run_one(
    group: CompiledRuns,
    traced: Mapping[str, Any],
    key: Key[Array, ""],
    *,
    rungs: Sequence[int] = (),
    watch: Callable[[int, Metrics], bool] = lambda _, __: True,
    keep: Callable[[int, PyTree], None] = lambda _, __: None,
    resume: tuple[int, PyTree] | None = None,
) -> tuple[PyTree, Metrics]:
    """Runs a single lane and keeps its state.

    On a mesh of several processes each of them calls this with the same arguments.

    Args:
        group: the programs, whose mode is `"loop"`.
        traced: the hyperparameters that are not static.
        key: of the run.
        rungs: after how many steps to look at it; the last step is always one.
        watch: called at each rung with the steps taken; False stops the run.
        keep: called at each rung with the steps taken and the state, to save it. The next steps reuse its
            memory: what is to be kept has to be copied before it returns.
        resume: the steps that were taken and the state after them, to go on from there; it is used up.

    Returns:
        The last state, and the metrics of the last rung and, unless the run was stopped, of the end.

    Raises:
        OutOfMemoryError: it does not fit.
    """
    taken, started = (0, None) if resume is None else (resume[0], {0: resume[1]})
    values = {name: np.array([value]) for name, value in traced.items()}
    lanes = _Looped(group, "loop", values, key[None], started)
    metrics: Metrics = {}
    for stop in sorted({*(stop for stop in rungs if taken < stop < group.steps), group.steps}):
        metrics, taken = lanes.advance([stop - taken])[0][0], stop
        keep(stop, lanes.state(0))
        if not watch(stop, metrics):
            return lanes.state(0), metrics
    return lanes.state(0), {**metrics, **lanes.finish()[0]}
