"""`mujax transfer`: trains the target once with a study's best hyperparameters."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import importlib
import math
import pathlib
import socket
import time
import zipfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from mujax.cli import _arguments, _config_file as config_files
from mujax.cli._arguments import numbers, option
from mujax.cli._display import (
    Display,
    StoppedError,
    as_folder,
    display,
    fail,
    gentle_interrupts,
    make_folder,
    number,
    operations,
    shown,
    write_aside,
)
from mujax.cli._supervise import supervise, supervised
from mujax.errors import ConfigError, PreemptedError, ProcessError
from mujax.train import hyperparameter
from mujax.tune import (
    CheckpointRules,
    TargetProgress,
    Transferred,
    TuneConfig,
    event_writer,
    study_module,
    transfer,
)

if TYPE_CHECKING:
    from rich.console import Console

REPORT: Final = "target.json"
PICTURE: Final = "target.png"
PARAMS: Final = "params.npz"
METRICS: Final = "metrics.csv"

# Seconds without a sign of life after which a process counts as lost, and JAX ends the others.
_HEARTBEAT: Final = 10


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Train the target once with the best hyperparameters of a study that mujax tune has made.

    Writes target.json, target.png, params.npz and metrics.csv. Exit code 1 if the target diverges.
    On several hosts start the same command on each. SIGTERM saves and ends a run with --checkpoint.
    """

    study: Annotated[
        str | None, option("NAME", "Study whose best hyperparameters the target is trained with.", "")
    ] = None
    storage: Annotated[
        str | None, option("URL|FILE", "Database, or an SQLite file.", "(default: mujax.db)")
    ] = None
    width: Annotated[
        int | None,
        numbers(int),
        option("N", "Width of the target.", "(default: 1024 for mnist-mlp, 256 for text-transformer)"),
    ] = None
    also: Annotated[
        tuple[str, ...] | None,
        option("NAME ...", "Hyperparameters to take from the proxy although they do not transfer.", ""),
    ] = None
    set: Annotated[
        tuple[str, ...] | None, option("NAME=VALUE ...", "Hyperparameters of the target's own.", "")
    ] = None
    data: Annotated[
        pathlib.Path | None, option("FILE", "Where the data is now.", "(default: where it was for the study)")
    ] = None
    config: Annotated[
        pathlib.Path | None,
        option("FILE", "The file that the study was tuned with, for a model or data in Python.", ""),
    ] = None
    seeds: Annotated[int | None, numbers(int), option("N", "Number of seeds.", "(default: 1)")] = None
    seed: Annotated[int | None, numbers(int), option("N", "The first of them.", "(default: 0)")] = None
    steps: Annotated[int | None, numbers(int), option("N", "Steps of a run.", "(default: the study's)")] = (
        None
    )
    batch: Annotated[int | None, numbers(int), option("N", "Examples a step.", "(default: the study's)")] = (
        None
    )
    out: Annotated[
        pathlib.Path | None, option("DIR", "Folder for the results.", "(default: transfer-STUDY)")
    ] = None
    mesh: Annotated[
        str | None,
        option(
            "AXES",
            "Devices of all processes as a mesh, such as data=2,fsdp=2,tensor=2; -1 for the rest.",
            "(default: one device)",
        ),
    ] = None
    accumulate: Annotated[
        int | None,
        numbers(int),
        option("N", "Parts of a batch whose gradients are computed one after the other.", "(default: 1)"),
    ] = None
    checkpoint: Annotated[
        pathlib.Path | None,
        option("DIR", "Save the run there, and go on from its last checkpoint.", "(default: none)"),
    ] = None
    keep: Annotated[
        int | None, numbers(int), option("N", "Number of checkpoints to keep.", "(default: 2)")
    ] = None
    every_steps: Annotated[
        int | None,
        numbers(int),
        option("N", "Save after each multiple of so many steps.", "(default: never)"),
    ] = None
    every_minutes: Annotated[
        float | None, numbers(float), option("M", "Save when so many minutes have passed.", "(default: 10)")
    ] = None
    tensorboard: Annotated[
        pathlib.Path | None, option("DIR", "Write TensorBoard events there.", "(default: none)")
    ] = None
    coordinator: Annotated[
        str | None,
        option(
            "HOST:PORT",
            "Train on several processes, of which the first listens there; "
            "auto: as the cluster's environment (SLURM, Kubernetes, a TPU pod) has it.",
            "(default: one process)",
        ),
    ] = None
    processes: Annotated[int | None, numbers(int), option("N", "Number of processes.", "")] = None
    process: Annotated[int | None, numbers(int), option("I", "Number of this one, from 0.", "")] = None
    wait: Annotated[
        int | None, numbers(int), option("SECONDS", "How long to wait for the others.", "(default: 300)")
    ] = None


def refuse_without_study(words: Sequence[str]) -> None:
    """Refuses a command line of `mujax transfer` that names no study, whatever else it asks for.

    Raises:
        ConfigError: no study is named; the text gives the command of the demonstration of µTransfer.
    """
    names = {word.partition("=")[0] for word in words}
    if not names & {"--study", "--config", "--help", "-h"}:
        raise ConfigError(
            where="transfer",
            expected="the study to take hyperparameters from, --study NAME",
            got="none",
            remedy="to see µTransfer at work, or to check that a learning rate transfers, run mujax "
            "transfer-check",
        )


@dataclasses.dataclass(frozen=True)
class _NotStored:
    """The parts of a configuration that a study does not store, or only as a path."""

    task: Any = None
    batches: Any = None
    valid: Any = None
    loss: Any = None
    data: pathlib.Path | None = None
    study: str | None = None
    storage: str | None = None


def _config(options: Transfer) -> TuneConfig:
    names = {field.name for field in dataclasses.fields(_NotStored)}
    settings = config_files.Settings({}, pathlib.Path())
    if options.config is not None:
        settings = config_files.read(options.config)
    # For the rest the study stores what it was tuned with.
    kept = config_files.Settings({name: settings[name] for name in settings if name in names}, settings.file)
    given = {name: getattr(options, name, None) for name in names}
    filled = dataclasses.asdict(config_files.filled(_NotStored, kept, given))
    study, storage = filled.pop("study"), filled.pop("storage")
    if study is None:
        raise ConfigError(
            where="study",
            expected="the name of a study that mujax tune has made",
            got="none",
            remedy="pass --study",
        )
    return TuneConfig.of_study(study, storage, seed=options.seed, **filled)


def run(options: Transfer, words: Sequence[str]) -> int:
    """Trains, prints and draws; 1 if the target diverged.

    Args:
        options: of the command.
        words: the command as it was given; one of several processes runs it in a child.
    """
    from rich.console import Console

    # Imported before the training and not after it: a missing package must not show at the very end.
    plot = importlib.import_module("mujax.plot")
    study_module()
    fixed = _arguments.fixed("set", options.set or ())
    checkpoints = _rules(options)
    fellows = _fellows(options)
    if fellows is not None and not supervised():
        return supervise(words, options.checkpoint)
    if fellows is not None:
        join(fellows)
    first, several = jax.process_index() == 0, jax.process_count() > 1
    config = _config(options)
    out = options.out or pathlib.Path(f"transfer-{as_folder(str(config.study))}")
    if first:
        make_folder(out)

    try:
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(_Log(out if first else None, options.tensorboard if first else None))
            check = stack.enter_context(gentle_interrupts(sigterm=not several))
            screen = _SILENT
            if first:
                screen = stack.enter_context(display(Console(stderr=True), "reading data"))

            def count(now: TargetProgress) -> None:
                screen.show(f"seed {now.seed}, step {now.step} of {now.steps}", now.work_done, _details(now))
                log.write(now)
                check()

            found = transfer(
                config,
                width=options.width,
                seeds=1 if options.seeds is None else options.seeds,
                steps=options.steps,
                batch=options.batch,
                also=options.also or (),
                fixed=fixed,
                mesh=options.mesh,
                accumulate=1 if options.accumulate is None else options.accumulate,
                checkpoints=checkpoints,
                progress=count,
            )
    except KeyboardInterrupt:
        if checkpoints is not None:
            rest = "the same command goes on from the last checkpoint"
        else:
            rest = f"nothing but {METRICS} was written" if (out / METRICS).exists() else "nothing was written"
        raise StoppedError(f"interrupted; {rest}.") from None
    except PreemptedError as error:
        raise StoppedError(str(error)) from None
    lost = [str(run.seed) for run in found.runs if run.loss is None]
    if not first:
        return 1 if lost else 0
    written = [REPORT, PICTURE]
    write_aside(out / REPORT, found.to_json())
    write_aside(out / PICTURE, lambda path: plot.plot_transfer_run(found, path))
    if found.params is not None:
        write_aside(out / PARAMS, lambda path: save(path, flat(found.params)))
        written.append(PARAMS)
    if (out / METRICS).exists():
        written.append(METRICS)
    console = Console()
    console.width = console.width if console.is_terminal else max(console.width, 120)
    _print_hparams(console, found, fixed)
    for sentence in _outcome(found):
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)
    files = ", ".join(str(out / name) for name in written)
    console.print(f"\nWritten: {files}", highlight=False, markup=False, soft_wrap=True)
    if lost:
        which = "" if len(found.runs) == 1 else f" with seed {', '.join(lost)}"
        return fail(
            f"the target of width {found.width} diverged{which}; run mujax coord-check on the model, or tune "
            "with lower learning rates.",
            1,
        )
    return 0


def _rules(options: Transfer) -> CheckpointRules | None:
    """When and where to save; refuses what has no effect without a folder."""
    given = {"keep": options.keep, "every_steps": options.every_steps, "every_minutes": options.every_minutes}
    given = {name: value for name, value in given.items() if value is not None}
    if options.checkpoint is None:
        if given:
            raise ConfigError(
                where=f"--{next(iter(given)).replace('_', '-')}",
                expected="a folder for the checkpoints",
                got="none",
                remedy="pass --checkpoint DIR",
            )
        return None
    return CheckpointRules(options.checkpoint, **given)


@dataclasses.dataclass(frozen=True)
class Fellows:
    """The other processes of a run.

    Attributes:
        host: of the first process; None where the cluster's environment knows it.
        port: that it listens at.
        processes: their number.
        process: this one's.
        wait: seconds to wait for them.
    """

    host: str | None
    port: int
    processes: int
    process: int
    wait: int


def _fellows(options: Transfer) -> Fellows | None:
    """The other processes that the options name; None for none.

    Raises:
        ConfigError: options that do not fit together.
    """
    processes, process = options.processes, options.process
    if options.coordinator is None:
        if (processes, process) != (None, None):
            raise ConfigError(
                where="--processes",
                expected="the address of the first process",
                got="none",
                remedy="pass --coordinator HOST:PORT, or --coordinator auto on a cluster",
            )
        return None
    wait = 300 if options.wait is None else options.wait
    if options.coordinator == "auto":
        return Fellows(None, 0, 0, 0, wait)
    host, _, port = options.coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(where="--coordinator", expected="HOST:PORT or auto", got=repr(options.coordinator))
    if processes is None or process is None or not 0 <= process < processes:
        raise ConfigError(
            where="--process",
            expected="the number of processes, and this one's from 0 to one less",
            got=f"--processes {processes} --process {process}",
            remedy="pass both",
        )
    return Fellows(host, int(port), processes, process, wait)


def join(fellows: Fellows) -> None:
    """Joins the processes of the run.

    Raises:
        ProcessError: the others do not come.
    """
    given: dict[str, Any] = {}
    if fellows.host is not None:
        given = {
            "coordinator_address": f"{fellows.host}:{fellows.port}",
            "num_processes": fellows.processes,
            "process_id": fellows.process,
        }
        if fellows.process > 0:
            _listens(fellows.host, fellows.port, fellows.wait)
    try:
        jax.distributed.initialize(
            **given, initialization_timeout=fellows.wait, heartbeat_timeout_seconds=_HEARTBEAT
        )
    except (RuntimeError, ValueError) as error:
        raise ProcessError(
            where="--coordinator",
            expected=f"all processes at {given.get('coordinator_address', 'the address of the cluster')}",
            got=f"an error ({str(error).splitlines()[0]})",
            remedy="start the same command on each host, with its own --process",
        ) from error


def _listens(host: str, port: int, seconds: float) -> None:
    """Waits until the first process listens: JAX's own client would end this process with a stack trace."""
    end = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((host, port), timeout=5):
                return
        except OSError as error:
            if time.monotonic() > end:
                raise ProcessError(
                    where="--coordinator",
                    expected=f"process 0 to listen at {host}:{port} within {seconds:.0f} s",
                    got=f"no answer ({error})",
                    remedy="start the same command with --process 0 on that host, or check the address",
                ) from error
            time.sleep(0.2)


_SILENT: Final = Display(lambda doing, share, detail="": None, lambda sentence: None)
"""Of all processes the first one speaks."""


def _details(now: TargetProgress) -> str:
    parts = [] if now.loss is None else [f"loss {now.loss:.4f}"]
    if now.speed is not None:
        parts.append(f"{now.speed.examples_per_second:,.0f} examples/s")
        if now.speed.utilization is not None:
            parts.append(f"MFU {now.speed.utilization:.0%}")
    return ", ".join(parts)


class _Log:
    """The metrics of a run while it trains: rows of a CSV, and events for TensorBoard.

    A run that goes on from a checkpoint goes on with the file; of steps that it repeats the last row counts.
    """

    def __init__(self, folder: pathlib.Path | None, events: pathlib.Path | None) -> None:
        self._folder, self._events = folder, events
        self._writers: dict[int, Any] = {}

    def __enter__(self) -> _Log:
        if self._events is not None:
            self._summary = event_writer(self._events)
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self._writers.values():
            writer.close()

    def write(self, now: TargetProgress) -> None:
        """Adds what is known at a step."""
        if self._folder is None or now.loss is None:
            return
        speed = None if now.speed is None else now.speed.examples_per_second
        share = None if now.speed is None else now.speed.utilization
        row = {"loss": now.loss, "examples_per_second": speed, "utilization": share}
        path = self._folder / METRICS
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            if new:
                rows.writerow(["seed", "step", *row])
            rows.writerow([now.seed, now.step, *("" if value is None else value for value in row.values())])
        if self._events is None:
            return
        if now.seed not in self._writers:
            self._writers[now.seed] = self._summary(f"seed-{now.seed}")
        for name, value in row.items():
            if value is not None and math.isfinite(value):
                self._writers[now.seed].add_scalar(name, value, now.step)


def save(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Stores arrays by name, as `numpy.savez` does, which cannot store one named "file"."""
    with zipfile.ZipFile(path, "w") as file:
        for name, array in arrays.items():
            with file.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)


def flat(params: Any, path: str = "") -> dict[str, np.ndarray]:
    """A tree of dicts as arrays by path, in types that NumPy has: bfloat16 becomes float32.

    >>> flat({"a": {"b": np.zeros(2)}})
    {'a/b': array([0., 0.])}
    """
    if isinstance(params, Mapping):
        return {
            name: leaf
            for key, value in params.items()
            for name, leaf in flat(value, f"{path}/{key}" if path else str(key)).items()
        }
    array = np.asarray(params)
    # NumPy would store what it does not know as bytes without a type.
    is_known = array.dtype.kind in "biufc"
    return {path: array if is_known else np.asarray(jnp.asarray(array).astype(jnp.float32))}


def _print_hparams(console: Console, found: Transferred, fixed: Mapping[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    title = f"Width {found.width}, with the best of study {found.study}: trial {found.trial.number}"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("hyperparameter", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("kind")
    table.add_column("from")
    for name, value in found.hparams.items():
        origin = _origin(found, name, fixed)
        style = "yellow" if origin.startswith("proxy,") else ""
        table.add_row(name, shown(value), hyperparameter(name).kind, origin, style=style)
    console.print(table)


def _origin(found: Transferred, name: str, fixed: Mapping[str, Any]) -> str:
    if name in fixed:
        return "set"
    if found.not_transferred.get(name) == "taken":
        return "proxy, taken all the same"
    return "proxy" if name in found.trial.hparams else "fixed in the study"


def _outcome(found: Transferred) -> list[str]:
    seeds = f" ({len(found.runs)} seeds)" if len(found.runs) > 1 else ""
    error = "" if found.standard_error is None else f" ± {found.standard_error:.4f}"
    loss = "diverged" if found.loss is None else f"{number(found.loss)}{error}"
    lines = [
        f"Target, width {found.width}: {found.objective} {loss}{seeds}. "
        f"Proxy, width {found.proxy}: {number(found.trial.loss)}."
    ]
    if found.saved is None:
        lines.append("The cost of the tuning is not known: the operations of some trials are not.")
    else:
        times = f"{found.saved:,.0f}" if found.saved >= 10 else f"{found.saved:.2g}"
        lines.append(
            f"The tuning cost {operations(found.tuning_flops)}, the same search at the target would have "
            f"cost {operations(found.direct_flops)}: {times} times as many. "
            f"One run of the target costs {operations(found.run_flops)}."
        )
    return lines
