"""Where in the user's own code an equation of a program comes from."""

from __future__ import annotations

import functools
import os
import sysconfig

import jax
import optax
from jax.extend.core import Jaxpr, JaxprEqn

_HERE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@functools.cache
def _library_folders() -> tuple[str, ...]:
    packages = [os.path.dirname(module.__file__ or "") for module in (jax, optax)]
    site = os.path.dirname(packages[0])
    packages += [os.path.join(site, name) for name in ("chex", "flax", "jaxlib", "jaxtyping")]
    packages += [sysconfig.get_paths()["stdlib"]]
    return tuple(folder + os.sep for folder in packages)


@functools.cache
def _is_library(file: str) -> bool:
    if file.startswith("<"):
        return True
    if file.startswith(_HERE + os.sep):
        return not file.startswith(os.path.join(_HERE, "models") + os.sep)
    # The standard library's folder holds site-packages too, where third-party models live.
    *packages, stdlib = _library_folders()
    if file.startswith(tuple(packages)):
        return True
    return file.startswith(stdlib) and "site-packages" not in file


def source_line(eqn: JaxprEqn) -> str:
    """`file:line` of the innermost frame of the user's code, or the module scope if there is none."""
    traceback = eqn.source_info.traceback
    if traceback is not None:
        for frame in traceback.frames:
            if not _is_library(frame.file_name):
                return f"{_short(frame.file_name)}:{frame.line_num}"
    return scope(eqn) or "unknown place"


def is_library_function(program: Jaxpr) -> bool:
    """Whether a traced sub-program is a function of JAX, Flax or the like, and not the user's own."""
    file, _ = _function(program)
    return bool(file) and _is_library(file)


def is_of_user(eqn: JaxprEqn, function: Jaxpr) -> bool:
    """Whether an equation inside a library's function comes from code of the user's that this one called.

    `nn.remat`, `nnx.jit` and the like wrap a user's module in a function of their own.
    """
    file, name = _function(function)
    found = False
    traceback = eqn.source_info.traceback
    for frame in () if traceback is None else traceback.frames:
        if frame.file_name == file and frame.function_name.rpartition(".")[2] == name:
            return found
        found = found or not _is_library(frame.file_name)
    return False


def _function(program: Jaxpr) -> tuple[str, str]:
    """File and name of the function that a program was traced from."""
    info = getattr(program, "debug_info", None)
    name, _, place = str(getattr(info, "func_src_info", "") or "").rpartition(" at ")
    return place.rpartition(":")[0], name


def _short(file: str) -> str:
    """The path relative to the working directory, if it is below it."""
    return os.path.relpath(file) if file.startswith(os.getcwd() + os.sep) else file


def scope(eqn: JaxprEqn) -> str:
    """The module path that `jax.named_scope` recorded, e.g. `Transformer/Block_0/Dense_1`."""
    return str(eqn.source_info.name_stack)
