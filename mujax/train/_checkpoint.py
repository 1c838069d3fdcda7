"""Checkpoints of one training run, by Orbax: their contents, when they are written, and what is refused.

Orbax writes them, asynchronously and whole or not at all, keeps the last ones and reads them onto any mesh.
Added here are everything that the run depends on, as JSON, and a sum of each array: Orbax does not notice
that bytes of an array have changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import operator
import os
import pathlib
import signal
import threading
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, PyTree, UInt32

from mujax._arguments import CHECKPOINT_RULES, NAMED, NONE, PATH, instance, needed, takes
from mujax.data import Stream
from mujax.errors import CheckpointError, ConfigError, MujaxError
from mujax.spec import MupSpec, ParamSpec

_FORMAT: Final = 1

# The parts of a checkpoint, each a folder in it.
_STATE: Final = "state"
_ABOUT: Final = "mujax"
_DATA: Final = "data"

_ELSEWHERE: Final = "or keep this run's checkpoints in another folder"


@dataclasses.dataclass(frozen=True)
class Saved:
    """What a checkpoint says about its run.

    Attributes:
        step: number of steps taken.
        spec: of the model.
        hparams: the hyperparameters.
        position: in the data; None if it was saved without data.
    """

    step: int
    spec: MupSpec
    hparams: dict[str, Any]
    position: dict[str, Any] | None


class Checkpoints:
    """The checkpoints of one run, in a folder of its own.

    Use it in a `with` statement: at its end all writing is finished. Every process calls the same methods at
    the same steps. Within the statement SIGTERM is a preemption: the next `save` writes a checkpoint, waits
    until it is written and sets `preempted`. After `jax.distributed.initialize` JAX's preemption service
    receives the signal instead and finds a step that all processes reach.

    A checkpoint that was not finished, because the process was killed, is deleted at the next start, and the
    one before it counts.

    Args:
        directory: a local path, the same for all processes, or a URL that Orbax can write to.
        spec: of the model; stored, and compared when a checkpoint is restored.
        hparams: everything else that the run depends on, as JSON has it; stored and compared likewise.
        keep: number of checkpoints to keep, the last ones.
        every_steps: save after each multiple of this number of steps; None for no such rule.
        every_minutes: save when so many minutes have passed since the last checkpoint, and after the first
            step; None for no such rule.

    Attributes:
        preempted: whether a checkpoint was saved because of a preemption: end the loop.

    Raises:
        ConfigError: a number that makes no sense, hyperparameters that JSON does not have, or a folder that
            cannot be written to.

    >>> import flax.linen as nn, mujax, tempfile
    >>> mup = mujax.mup_init(nn.Dense(3), nn.Dense(2), jnp.ones((1, 4)))
    >>> state = mup.init(jax.random.key(0), jnp.ones((1, 4)))
    >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder, mup.spec) as checkpoints:
    ...     checkpoints.save(100, state, force=True), checkpoints.latest
    ...     jax.tree.map(jnp.shape, checkpoints.restore(jax.eval_shape(lambda: state)))
    (True, 100)
    {'params': {'bias': (3,), 'kernel': (4, 3)}}
    """

    @takes(
        directory=PATH,
        spec=instance(MupSpec, "a MupSpec", "mup.spec"),
        hparams=NAMED | NONE,
        **CHECKPOINT_RULES,
    )
    def __init__(
        self,
        directory: str | os.PathLike[str],
        spec: MupSpec,
        hparams: Mapping[str, Any] | None = None,
        *,
        keep: int = 2,
        every_steps: int | None = None,
        every_minutes: float | None = 10.0,
    ) -> None:
        self.preempted = False
        self._spec = spec
        self._hparams = _as_json("hparams", dict(hparams or {}))
        self._signalled = threading.Event()
        self._exits = contextlib.ExitStack()
        # Half a second that only a training with checkpoints needs.
        self._ocp = needed("orbax.checkpoint", "checkpoints", "orbax-checkpoint")
        self._manager = self._open(directory, keep, every_steps, every_minutes)

    def _open(
        self,
        directory: str | os.PathLike[str],
        keep: int,
        every_steps: int | None,
        every_minutes: float | None,
    ) -> Any:
        policies = self._ocp.checkpoint_managers
        due = [policies.PreemptionCheckpointingPolicy()]
        if every_steps is not None:
            due.append(policies.FixedIntervalPolicy(every_steps))
        if every_minutes is not None:
            due.append(policies.ContinuousCheckpointingPolicy(minimum_interval_secs=60 * every_minutes))
        options = self._ocp.CheckpointManagerOptions(
            save_decision_policy=policies.AnySavePolicy(due),
            preservation_policy=policies.LatestN(keep),
            cleanup_tmp_directories=True,
            # A folder that cannot be made in the background keeps Orbax's other threads waiting, and so the
            # end of the process, for 5 minutes.
            async_options=self._ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        path = os.fspath(directory)
        try:
            # A URL is not a path.
            return self._ocp.CheckpointManager(
                path if "://" in path else pathlib.Path(path).absolute(), options=options
            )
        except OSError as error:
            raise ConfigError(
                where=path,
                expected="a folder that checkpoints can be written to",
                got=f"an error ({error.strerror or error})",
            ) from error

    def __enter__(self) -> Checkpoints:
        if not jax.distributed.is_initialized() and threading.current_thread() is threading.main_thread():
            self._exits.enter_context(_sigterm(self._signalled))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._exits:
            self.close()

    @property
    def directory(self) -> str:
        """The folder."""
        return str(self._manager.directory)

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps of all checkpoints, ascending; one that is being written is counted."""
        return tuple(sorted(self._manager.all_steps()))

    @property
    def latest(self) -> int | None:
        """The step of the last checkpoint; None if there is none."""
        return max(self.steps, default=None)

    def save(self, step: int, state: PyTree, data: Any = None, *, force: bool = False) -> bool:
        """Saves a checkpoint if it is time to; call it after every step.

        The state may be donated to the next step at once: it is copied to the host before this returns, and
        written in the background.

        Args:
            step: number of steps taken.
            state: a tree of arrays, such as a `TrainState`.
            data: the batches' source, whose position is saved: a `mujax.data.Stream`, or an iterator of
                grain's. None where the batches are a function of the state alone (of its key and step).
            force: save whether or not it is time to, as after the last step.

        Returns:
            Whether a checkpoint of this step is saved.

        Raises:
            CheckpointError: there is a checkpoint of a later step, or this one or the one before it cannot be
                written.
        """
        latest = self.latest
        if latest is not None and latest > step:
            raise CheckpointError(
                where=self._name(latest),
                expected=f"no checkpoint of a later step than {step}, which this run has reached",
                got="one, of another run or not restored",
                remedy=f"remove it, {_ELSEWHERE}",
            )
        asked = self._signalled.is_set() or self._manager.reached_preemption(step)
        saved = latest == step
        if not saved and (asked or force or self._manager.should_save(step)):
            with self._writing():
                saved = bool(self._manager.save(step, args=self._parts(step, state, data), force=True))
        if asked:
            self.wait()
            self.preempted = True
        return saved

    def _parts(self, step: int, state: PyTree, data: Any) -> Any:
        save = self._ocp.args
        parts = {_STATE: save.StandardSave(state)}
        position: Any = None
        if isinstance(data, Stream):
            position = data.get_state()
        elif data is not None:
            position = {"processes": jax.process_count()}
            parts[_DATA] = _grain_checkpoint(data).CheckpointSave(data)
        about = {
            "mujax_checkpoint": _FORMAT,
            "step": step,
            "spec": json.loads(self._spec.to_json()),
            "hparams": self._hparams,
            "position": position,
            "arrays": _described(state, _sums(state)),
        }
        parts[_ABOUT] = save.JsonSave({**about, "digest": _digest(about)})
        return save.Composite(**parts)

    def saved(self, step: int | None = None) -> Saved:
        """What a checkpoint says about its run; no array is read.

        Args:
            step: of the checkpoint; the last one by default.

        Raises:
            CheckpointError: it does not exist, is incomplete or damaged.
        """
        return self._about(self._existing(step))[0]

    def restore(self, state: PyTree, data: Any = None, *, step: int | None = None) -> PyTree:
        """Restores a checkpoint.

        The arrays are those that were saved, to the last bit, on whatever mesh and by however many processes.

        Args:
            state: a tree of the saved structure that gives shapes, dtypes and shardings: arrays, or
                `jax.ShapeDtypeStruct`s, which take no memory. Without a sharding an array is restored to the
                first device.
            data: the batches' source; its position is set to the saved one.
            step: of the checkpoint; the last one by default.

        Returns:
            A tree like `state`.

        Raises:
            CheckpointError: it does not exist, is incomplete or damaged, or is of another model, width, spec,
                optimizer or of other hyperparameters.
            DataError: the position is one in other data.
        """
        step = self._existing(step)
        saved, arrays = self._about(step)
        where = self._name(step)
        _compare_specs(where, self._spec, saved.spec)
        _compare_hparams(where, self._hparams, saved.hparams)
        target = jax.tree.map(_abstract, state)
        _compare_arrays(where, _described(target), arrays)
        if (data is None) != (saved.position is None):
            raise CheckpointError(
                where=where,
                expected="a position in the data" if saved.position is None else "data to be given",
                got="none",
                remedy="pass data= to both save and restore, or to neither",
            )
        parts = {_STATE: self._ocp.args.StandardRestore(target)}
        if data is not None and not isinstance(data, Stream):
            _compare_processes(where, saved)
            parts[_DATA] = _grain_checkpoint(data).CheckpointRestore(data)
        with self._reading(step):
            restored = self._manager.restore(step, args=self._ocp.args.Composite(**parts))[_STATE]
        for path, found in _described(restored, _sums(restored)).items():
            if found["sum"] != arrays[path]["sum"]:
                raise self._damaged(step, f"other bytes in {path}")
        if isinstance(data, Stream):
            data.set_state(saved.position or {})
        return restored

    def wait(self) -> None:
        """Waits until all checkpoints are written.

        Raises:
            CheckpointError: one of them cannot be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until all checkpoints are written and ends the threads that wrote them.

        Raises:
            CheckpointError: one of them cannot be written.
        """
        with self._writing():
            self._manager.close()

    def _name(self, step: int) -> str:
        return f"{self.directory}/{step}"

    def _existing(self, step: int | None) -> int:
        steps = self.steps
        step = self.latest if step is None else step
        if step is None or step not in steps:
            raise CheckpointError(
                where=self.directory,
                expected="a checkpoint" if step is None else f"a checkpoint of step {step}",
                got=f"those of steps {', '.join(map(str, steps))}" if steps else "none",
            )
        return step

    def _about(self, step: int) -> tuple[Saved, dict[str, dict[str, Any]]]:
        with self._reading(step):
            part = self._ocp.args.Composite(**{_ABOUT: self._ocp.args.JsonRestore()})
            about = dict(self._manager.restore(step, args=part)[_ABOUT])
            if about.pop("digest") != _digest(about):
                raise self._damaged(step, f"other bytes in {_ABOUT}")
            if about["mujax_checkpoint"] != _FORMAT:
                raise CheckpointError(
                    where=self._name(step),
                    expected=f"format {_FORMAT}",
                    got=about["mujax_checkpoint"],
                    remedy="restore it with the version of mujax that wrote it",
                )
            spec = MupSpec.from_json(json.dumps(about["spec"]))
            return Saved(about["step"], spec, about["hparams"], about["position"]), about["arrays"]

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            yield
        except (MujaxError, jax.errors.JaxRuntimeError):
            # The latter is no fault of the file's: memory that is too small, a device that is lost.
            raise
        except Exception as error:
            # Of any type: tensorstore raises bare `Exception`s, too.
            raise self._damaged(step, _first_line(error)) from error

    def _damaged(self, step: int, found: str) -> CheckpointError:
        before = max((other for other in self.steps if other < step), default=None)
        return CheckpointError(
            where=self._name(step),
            expected="a complete checkpoint",
            got=f"a damaged one ({found})",
            remedy="there is none before it"
            if before is None
            else f"remove it to go on from step {before}, the checkpoint before it",
        )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except MujaxError:
            raise
        except Exception as error:
            raise CheckpointError(
                where=self.directory,
                expected="a checkpoint to be written",
                got=f"an error ({_first_line(error)})",
            ) from error


def _grain_checkpoint(data: Any) -> Any:
    try:
        import grain
    except ImportError:
        grain = None
    kinds = () if grain is None else (grain.DatasetIterator, grain.DataLoaderIterator)
    if grain is None or not isinstance(data, kinds):
        raise ConfigError(
            where="data",
            expected="a mujax.data.Stream or an iterator of grain's, whose position can be saved",
            got=type(data).__name__,
            remedy="leave it out where batches are a function of the state's key and step",
        )
    return grain.checkpoint


@contextlib.contextmanager
def _sigterm(received: threading.Event) -> Iterator[None]:
    """The first SIGTERM sets a flag; for a second one the former handler is back."""
    former = signal.getsignal(signal.SIGTERM)

    def restore() -> None:
        # None for a handler that was not set by Python: it can't be set again.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if former is None else former)

    def handle(*_: object) -> None:
        received.set()
        restore()

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        restore()


def _first_line(error: BaseException) -> str:
    # tensorstore goes on with the address of a function.
    text = str(error).strip().partition("\n")[0].partition(" See full ")[0].rstrip(".")
    text = text if len(text) < 200 else f"{text[:200]} …"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _as_json(where: str, value: Any) -> Any:
    try:
        return json.loads(json.dumps(value, default=operator.methodcaller("item"), allow_nan=False))
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            where=where, expected="values that JSON has: finite numbers, text, lists", got=str(error)
        ) from error


def _digest(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


# ---- arrays ----------------------------------------------------------------------------------------------


def _described(tree: PyTree, sums: list[int] | None = None) -> dict[str, dict[str, Any]]:
    """Shape, dtype and sum of each array, by path."""
    entries = jax.tree_util.tree_leaves_with_path(tree)
    out: dict[str, dict[str, Any]] = {}
    for place, (path, leaf) in enumerate(entries):
        facts = {"shape": list(jnp.shape(leaf)), "dtype": str(jnp.result_type(leaf))}
        out[_path(path)] = facts if sums is None else {**facts, "sum": sums[place]}
    return out


def _path(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        if jax.process_count() > 1:
            raise ConfigError(
                where="state",
                expected="a sharding of every array, since there are several processes",
                got=f"none of a {jnp.result_type(leaf)}{list(jnp.shape(leaf))}",
                remedy="pass jax.ShapeDtypeStructs with shardings, or the initial state",
            )
        sharding = SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf), sharding=sharding)


def _sums(tree: PyTree) -> list[int]:
    """A sum of the bits of each array: the same on any mesh, and another if a single element changes."""
    return [int(found) for found in jax.device_get(_bit_sums(jax.tree.leaves(tree)))]


@jax.jit
def _bit_sums(leaves: list[Array]) -> list[UInt32[Array, ""]]:
    return [_bit_sum(leaf) for leaf in leaves]


def _bit_sum(array: Array) -> UInt32[Array, ""]:
    array = jnp.asarray(array)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        return _bit_sum(jnp.real(array)) + 3 * _bit_sum(jnp.imag(array))
    if array.dtype == jnp.bool_:
        bits = array.astype(jnp.uint32)
    else:
        width = jnp.iinfo(array.dtype).bits if _is_integer(array) else jnp.finfo(array.dtype).bits
        # An array of 64 bits gets an axis of its two halves.
        unsigned = jnp.dtype(f"uint{min(width, 32)}")
        bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    # The element at place i counts 2i + 1 times: as that is odd, a change of one element changes the sum. No
    # reshape, which would gather an array that is sharded.
    weights, stride = jnp.uint32(1), 2
    for axis in reversed(range(bits.ndim)):
        places = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        weights = weights + places * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return jnp.sum(bits * weights, dtype=jnp.uint32)


def _is_integer(array: Array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.integer)


# ---- what differs ----------------------------------------------------------------------------------------


def _compare_specs(where: str, mine: MupSpec, theirs: MupSpec) -> None:
    for path in (*mine, *theirs):
        if path not in mine or path not in theirs:
            raise CheckpointError(
                where=f"{where}, {path}",
                expected=_shape_of(mine.get(path)),
                got=f"{_shape_of(theirs.get(path))} in a checkpoint of another model",
                remedy=f"restore it with the model that it was saved with, {_ELSEWHERE}",
            )
    for path, param in mine.items():
        other = theirs[path]
        if param.shape != other.shape:
            same = len(param.shape) == len(other.shape)
            raise CheckpointError(
                where=f"{where}, {path}",
                expected=_shape_of(param),
                got=f"{_shape_of(other)} in a checkpoint of another {'width' if same else 'model'}",
                remedy=f"build the model as it was when it was saved, {_ELSEWHERE}",
            )
    remedy = f"give mup_init the base and options that it was saved with, {_ELSEWHERE}"
    for path, param in mine.items():
        for field in dataclasses.fields(param):
            pair = getattr(param, field.name), getattr(theirs[path], field.name)
            if pair[0] != pair[1]:
                raise CheckpointError(
                    where=f"{where}, {path}",
                    expected=f"{field.name} {pair[0]}",
                    got=f"{pair[1]} in a checkpoint of another spec",
                    remedy=remedy,
                )
    if mine.parametrization != theirs.parametrization:
        raise CheckpointError(
            where=where,
            expected=f"the parametrization {mine.parametrization}",
            got=f"{theirs.parametrization} in a checkpoint of another spec",
            remedy=remedy,
        )


def _shape_of(param: ParamSpec | None) -> str:
    return "no such parameter" if param is None else f"shape {param.shape}"


def _compare_hparams(where: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    for name in (*mine, *theirs):
        if name not in mine or name not in theirs or mine[name] != theirs[name]:
            pair = [repr(of[name]) if name in of else "none" for of in (mine, theirs)]
            raise CheckpointError(
                where=f"{where}, {name}",
                expected=pair[0],
                got=f"{pair[1]} in a checkpoint of other hyperparameters",
                remedy=f"go on with those that it was saved with, {_ELSEWHERE}",
            )


def _compare_arrays(
    where: str, mine: Mapping[str, Mapping[str, Any]], theirs: Mapping[str, Mapping[str, Any]]
) -> None:
    def text(of: Mapping[str, Mapping[str, Any]], path: str) -> str:
        return f"{of[path]['dtype']}{of[path]['shape']}" if path in of else "no such array"

    for path in (*mine, *theirs):
        pair = text(mine, path), text(theirs, path)
        if pair[0] != pair[1]:
            raise CheckpointError(
                where=f"{where}, {path}",
                expected=pair[0],
                got=f"{pair[1]} in a checkpoint of another state",
                remedy=f"restore it with the optimizer and dtypes that it was saved with, {_ELSEWHERE}",
            )


def _compare_processes(where: str, saved: Saved) -> None:
    processes = (saved.position or {}).get("processes")
    if processes != jax.process_count():
        raise CheckpointError(
            where=f"{where}, {_DATA}",
            expected=f"the positions of {jax.process_count()} processes",
            got=f"those of {processes}",
            remedy="start as many, or read by mujax.data.grain_stream, which does not depend on them",
        )
