"""How JAX and XLA run under test; set in the environment, for xdist's workers and for subprocesses alike."""

import importlib.metadata
import os
import pathlib
import shutil
import sys

assert "jax" not in sys.modules, "JAX reads its environment when imported, which must be after this"

# A test runs its programs for milliseconds, so compiling them well is time lost.
_FLAGS = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # MLIR's code for fusions takes twice as long to compile as LLVM's. Later versions have no such flag, and
    # XLA aborts on one that it does not know.
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
_GIVEN = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([*(flag for flag in _FLAGS if flag.split("=")[0] not in _GIVEN), _GIVEN])

# Programs are compiled once for all workers, subprocesses and runs; `pytest --cache-clear` deletes them.
_CACHE = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "d" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# SQLite waits for the disk at every commit, and there are thousands: temporary folders are in memory.
if pathlib.Path("/dev/shm").is_dir() and shutil.disk_usage("/dev/shm").free > 2**30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")
