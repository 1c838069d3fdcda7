"""`mujax transfer`: trains the target once with a study's best hyperparameters."""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import jax.numpy as jnp
import numpy as np

from mujax.cli import _arguments, _config_file as config_files
from mujax.cli._arguments import numbers, option
from mujax.cli._display import (
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
from mujax.errors import ConfigError
from mujax.train import hyperparameter
from mujax.tune import TargetProgress, Transferred, TuneConfig, study_module, transfer

if TYPE_CHECKING:
    from rich.console import Console

REPORT: Final = "target.json"
PICTURE: Final = "target.png"
PARAMS: Final = "params.npz"


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Train the target once with the best hyperparameters of a study that mujax tune has made.

    Writes target.json, target.png and params.npz. Exit code 1 if the target diverges.
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


def run(options: Transfer) -> int:
    """Trains, prints and draws; 1 if the target diverged."""
    from rich.console import Console

    # Imported before the training and not after it: a missing package must not show at the very end.
    plot = importlib.import_module("mujax.plot")
    study_module()
    fixed = _arguments.fixed("set", options.set or ())
    config = _config(options)
    out = options.out or pathlib.Path(f"transfer-{as_folder(str(config.study))}")
    make_folder(out)

    def count(now: TargetProgress) -> None:
        loss = "" if now.loss is None else f", loss {now.loss:.4f}"
        screen.show(
            f"seed {now.seed}, step {now.step} of {now.steps}", now.work_done, loss.removeprefix(", ")
        )
        check()

    try:
        with gentle_interrupts() as check, display(Console(stderr=True), "reading data") as screen:
            found = transfer(
                config,
                width=options.width,
                seeds=1 if options.seeds is None else options.seeds,
                steps=options.steps,
                batch=options.batch,
                also=options.also or (),
                fixed=fixed,
                progress=count,
            )
    except KeyboardInterrupt:
        raise StoppedError("interrupted; nothing was written.") from None
    write_aside(out / REPORT, found.to_json())
    write_aside(out / PICTURE, lambda path: plot.plot_transfer_run(found, path))
    write_aside(out / PARAMS, lambda path: save(path, flat(found.params)))
    console = Console()
    console.width = console.width if console.is_terminal else max(console.width, 120)
    _print_hparams(console, found, fixed)
    for sentence in _outcome(found):
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)
    files = ", ".join(str(out / name) for name in (REPORT, PICTURE, PARAMS))
    console.print(f"\nWritten: {files}", highlight=False, markup=False, soft_wrap=True)
    lost = [str(run.seed) for run in found.runs if run.loss is None]
    if lost:
        which = "" if len(found.runs) == 1 else f" with seed {', '.join(lost)}"
        return fail(
            f"the target of width {found.width} diverged{which}; run mujax coord-check on the model, or tune "
            "with lower learning rates.",
            1,
        )
    return 0


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
