"""How JAX and XLA run under test, in workers and in subprocesses; which tests are marked as abstract."""

import contextlib
import functools
import gc
import importlib.metadata
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator

import pytest

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

# Tracing makes many small objects, and each collection walks all that JAX keeps in its caches.
gc.set_threshold(100_000, 20, 50)

# SQLite waits for the disk at every commit, and there are thousands: temporary folders are in memory.
if pathlib.Path("/dev/shm").is_dir() and shutil.disk_usage("/dev/shm").free > 2**30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")

# Files whose tests trace at the most: `pytest -m abstract` is what one runs while working.
_ABSTRACT = {
    "test_config_file.py",
    "test_cost.py",
    "test_faults.py",
    "test_house.py",
    "test_hyperparameters.py",
    "test_optimum.py",
    "test_primitives.py",
    "test_rules.py",
    "test_slopes.py",
    "test_source.py",
    "test_spec.py",
    "test_specs.py",
    "test_trace.py",
}

# Files whose tests run mujax's own arithmetic, where a user may forbid implicit promotion. Models in other
# tests are written as users write them, with `x + bias`; and every optimizer of optax's that counts its steps
# (Adam and its kin) mixes integers and floats.
_STRICT_DTYPES = {
    "test_batches.py",
    "test_cost.py",
    "test_data.py",
    "test_faults.py",
    "test_hyperparameters.py",
    "test_lanes.py",
    "test_optimum.py",
    "test_rules.py",
    "test_slopes.py",
    "test_spec.py",
    "test_specs.py",
}
_STRICT_RANKS = {
    *_STRICT_DTYPES,
    "test_frozen_parts.py",
    "test_models.py",
    "test_optim_registry.py",
    "test_optim_trees.py",
    "test_run.py",
    "test_wider.py",
    "test_width_runs.py",
}


@pytest.fixture(autouse=True)
def promotion_is_strict(request: pytest.FixtureRequest) -> Iterator[None]:
    name = request.node.path.name
    if name not in _STRICT_RANKS:
        yield
        return
    import jax

    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.numpy_rank_promotion("raise"))
        if name in _STRICT_DTYPES:
            stack.enter_context(jax.numpy_dtype_promotion("strict"))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name in _ABSTRACT:
            item.add_marker(pytest.mark.abstract)


@functools.cache
def _compilations() -> list[str]:
    """Grows with every program that XLA compiles in this process."""
    import jax

    found: list[str] = []

    def listen(event: str, *_: object, **__: object) -> None:
        if event.endswith("backend_compile_duration"):
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return found


@functools.cache
def _make_a_key() -> None:
    """What a test may compute before it traces, so that whether it was computed before does not count."""
    import jax

    jax.random.key(0)


@pytest.fixture(autouse=True)
def no_model_is_compiled(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that is marked as abstract is so."""
    if request.node.get_closest_marker("abstract") is None:
        yield
        return
    _make_a_key()
    before = len(_compilations())
    yield
    # An array or a key that a model is traced with may be, and initial values whose mean does not show.
    allowed = 3 if request.node.get_closest_marker("samples") is None else 20
    assert len(_compilations()) <= before + allowed, "not abstract: XLA compiled more than a few constants"
