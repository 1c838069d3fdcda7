"""One training of the target: on a mesh, on several processes, with checkpoints that it goes on from."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Key, PyTree

from mujax._arguments import CHECKPOINT_RULES, PATH, check_arguments
from mujax.errors import CheckpointError, ConfigError, PreemptedError, ProcessError
from mujax.spec import MupSpec
from mujax.train import Checkpoints, CompiledRuns, run_one

# A preempted process has seconds to save: a run is looked at after so many steps.
_STEPS_BETWEEN_LOOKS: Final = 10

_PEAK_FLOPS: Final[Mapping[str, float]] = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}
"""Operations a second in bfloat16, dense, by the makers' data sheets, by the start of a device's kind."""


@dataclasses.dataclass(frozen=True)
class CheckpointRules:
    """Where the checkpoints of a run are, and when one is written.

    Attributes:
        folder: of all seeds; each has a folder in it.
        keep: number of checkpoints to keep.
        every_steps: save after each multiple of it; None for no such rule.
        every_minutes: save when so many minutes have passed; None for no such rule.
    """

    folder: str | os.PathLike[str]
    keep: int = 2
    every_steps: int | None = None
    every_minutes: float | None = 10.0

    def __post_init__(self) -> None:
        check_arguments({"folder": PATH, **CHECKPOINT_RULES}, vars(self))

    def of(self, seed: int, spec: MupSpec, about: Mapping[str, Any]) -> Checkpoints:
        """The checkpoints of the run with a seed."""
        return Checkpoints(
            f"{os.fspath(self.folder).rstrip('/')}/seed-{seed}",
            spec,
            {**about, "seed": seed},
            keep=self.keep,
            every_steps=self.every_steps,
            every_minutes=self.every_minutes,
        )


@dataclasses.dataclass(frozen=True)
class Speed:
    """How fast a run is.

    Attributes:
        examples_per_second: of all devices together.
        utilization: operations a second over the devices' peak (MFU); None where that is not known.
    """

    examples_per_second: float
    utilization: float | None


class Clock:
    """Measures the speed of a run, without the compilation and the first steps."""

    def __init__(self, group: CompiledRuns, batch: int) -> None:
        self._group, self._batch = group, batch
        self._start: tuple[int, float] | None = None

    def at(self, step: int) -> Speed | None:
        """The mean speed since the first look at a run that had taken a step."""
        now = time.monotonic()
        if self._start is None or self._start[0] >= step:
            self._start = (step, now) if step else None
            return None
        steps = (step - self._start[0]) / max(now - self._start[1], 1e-9)
        peak, mesh = peak_flops(self._group.devices[0].device_kind), self._group.mesh
        flops, devices = self._group.flops, 1 if mesh is None else mesh.size
        share = None if peak is None or flops is None else flops / self._group.steps * steps / peak / devices
        return Speed(steps * self._batch, share)


def peak_flops(kind: str) -> float | None:
    """The peak of a kind of device; None where it is not known.

    >>> peak_flops("TPU v5 lite"), peak_flops("cpu")
    (197000000000000.0, None)
    """
    known = [name for name in _PEAK_FLOPS if kind.startswith(name)]
    return _PEAK_FLOPS[max(known, key=len)] if known else None


def run_target(
    group: CompiledRuns,
    traced: Mapping[str, Any],
    key: Key[Array, ""],
    rungs: list[int],
    watch: Callable[[int, Mapping[str, Any]], bool],
    checkpoints: Checkpoints | None,
) -> tuple[PyTree, Mapping[str, Any]]:
    """One run, from its last checkpoint on where there is one.

    Args:
        group: the programs.
        traced: the hyperparameters that are not static.
        key: of the run.
        rungs: after how many steps to look at it.
        watch: called at each of them; False stops the run.
        checkpoints: entered; None for none.

    Raises:
        PreemptedError: SIGTERM; the checkpoint is written.
        CheckpointError: the last checkpoint is damaged or of another run.
    """
    if checkpoints is None:
        return run_one(group, traced, key, rungs=rungs, watch=watch)
    resume = None
    if checkpoints.latest is not None:
        resume = checkpoints.latest, checkpoints.restore(group.abstract_state(traced, key))

    def keep(step: int, state: PyTree) -> None:
        checkpoints.save(step, state, force=step == group.steps)
        if checkpoints.preempted and step < group.steps:
            raise PreemptedError(
                where=f"step {step} of {group.steps}",
                expected="the run to reach its end",
                got="SIGTERM",
                remedy=f"a checkpoint is in {checkpoints.directory}; the same command goes on from it",
            )

    found = run_one(group, traced, key, rungs=rungs, watch=watch, keep=keep, resume=resume)
    checkpoints.wait()
    return found


def looks(steps: int, rungs: int, rules: CheckpointRules | None) -> list[int]:
    """After how many steps a run is looked at.

    >>> looks(100, 4, None)
    [25, 50, 75]
    >>> looks(40, 2, CheckpointRules("runs", every_steps=15))
    [10, 15, 20, 30]
    """
    found = {round(steps * rung / rungs) for rung in range(1, rungs)}
    if rules is not None:
        found |= set(range(_STEPS_BETWEEN_LOOKS, steps, _STEPS_BETWEEN_LOOKS))
        found |= set(range(rules.every_steps, steps, rules.every_steps)) if rules.every_steps else set()
    return sorted(step for step in found if 0 < step < steps)


def require_same_on_all(description: str) -> None:
    """Refuses processes that would not train the same model in the same way.

    Args:
        description: of everything that has to be the same.

    Raises:
        ProcessError: it is not; on every process.
    """
    if jax.process_count() == 1:
        return
    # Functions are shown with their address.
    text = re.sub(r"0x[0-9a-f]+", "", description)
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    digests = np.asarray(multihost_utils.process_allgather(digest))
    others = [number for number, one in enumerate(digests) if (one != digests[0]).any()]
    if others:
        raise ProcessError(
            where="processes",
            expected="the same command, model, data and versions on all of them",
            got=f"others than process 0's on {', '.join(map(str, others))}",
            remedy="start the same command with the same code on each host",
        )


@contextlib.contextmanager
def other_processes(folder: str | os.PathLike[str] | None) -> Iterator[None]:
    """Says in a sentence that another process has ended, which JAX reports as a failed transfer.

    So does Orbax, whose processes wait for each other to write a checkpoint.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, CheckpointError) as raised:
        error = raised.__cause__ if isinstance(raised, CheckpointError) else raised
        is_of_jax = isinstance(error, jax.errors.JaxRuntimeError)
        if jax.process_count() == 1 or not is_of_jax or "RESOURCE_EXHAUSTED" in str(error):
            raise
        start = "start all of them again"
        raise ProcessError(
            where=f"process {jax.process_index()}",
            expected="all processes to train",
            got=f"a failed exchange with another one ({str(error).splitlines()[0][:120]})",
            remedy=start if folder is None else f"{start}; they go on from the last checkpoint in {folder}",
        ) from error


def refuse_bad_rules(rules: CheckpointRules | None, steps: int) -> None:
    """Refuses a rule that never saves anything.

    Raises:
        ConfigError: the run is shorter than the interval of its only rule.
    """
    if rules is None or rules.every_steps is None or rules.every_minutes is not None:
        return
    if rules.every_steps > steps:
        raise ConfigError(
            where="every_steps",
            expected=f"at most the {steps} steps of the run",
            got=rules.every_steps,
            remedy="save more often",
        )
