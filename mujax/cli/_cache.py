"""JAX's persistent compilation cache, which the commands turn on, in the user's cache folder.

Reference:
    https://docs.jax.dev/en/latest/persistent_compilation_cache.html
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import platform
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import jax
from jax.experimental.compilation_cache import compilation_cache

# Bytes that are kept from one command to the next. JAX's own bound needs the package filelock.
_MOST: Final = 2**30

# Shorter than JAX's second: a check compiles many programs of half a second each.
_SECONDS: Final = 0.1

_OFF: Final = "JAX_ENABLE_COMPILATION_CACHE=0 turns it off"


@contextlib.contextmanager
def compiled_programs_kept(say: Callable[[str], None]) -> Iterator[None]:
    """Keeps compiled programs for later commands, unless the user has set JAX's cache on or off.

    Args:
        say: prints a sentence: where they are kept, or why they are not.
    """
    if setting("jax_compilation_cache_dir") or not setting("jax_enable_compilation_cache"):
        yield
        return
    try:
        folder = _user_folder() / _machine()
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
        _drop_oldest(folder.parent, _MOST)
    except (OSError, RuntimeError) as error:
        say(f"compiled programs are not kept for later runs: {error}.")
        yield
        return
    say(f"compiled programs are kept in {folder} (1 GB at most); {_OFF}.")
    settings: dict[str, Any] = {"jax_compilation_cache_dir": str(folder)}
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        settings["jax_persistent_cache_min_compile_time_secs"] = _SECONDS
    before = {name: setting(name) for name in settings}
    try:
        _set(settings)
        yield
    finally:
        _set(before)


def setting(name: str) -> Any:
    """The value of one of JAX's settings."""
    return getattr(jax.config, name)


def _set(settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    # JAX decides at the first program that it compiles whether there is a cache.
    compilation_cache.reset_cache()


def _user_folder() -> pathlib.Path:
    """The folder for mujax in the user's cache folder, as each system wants it.

    Raises:
        RuntimeError: there is no home.
    """
    if given := os.environ.get("XDG_CACHE_HOME"):
        return pathlib.Path(given) / "mujax" / "jax"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return pathlib.Path(local) / "mujax" / "cache" / "jax"
    if sys.platform == "darwin":
        return pathlib.Path.home() / "Library" / "Caches" / "mujax" / "jax"
    return pathlib.Path.home() / ".cache" / "mujax" / "jax"


def _machine() -> str:
    """A name for this kind of processor: XLA's programs for a CPU do not run on an older one.

    The machines of a cluster share their homes.
    """
    features = platform.processor()
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), features)
    return f"{platform.machine() or 'cpu'}-{zlib.crc32(features.encode()):08x}"


def _drop_oldest(folder: pathlib.Path, most: int) -> None:
    """Deletes the programs that were not used for the longest time, down to so many bytes."""
    used = []
    for path in folder.rglob("*-cache"):
        # Another command may delete it meanwhile.
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            used.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    total = sum(size for _, size, _ in used)
    for _, size, path in sorted(used):
        if total <= most:
            return
        path.unlink(missing_ok=True)
        total -= size
