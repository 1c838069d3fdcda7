"""The compilation cache of the commands: in the user's folder, bounded, and only where the user has none."""

from __future__ import annotations

import os
import pathlib

import jax
import jax.numpy as jnp
import pytest

from mujax.cli import _cache
from mujax.cli._cache import compiled_programs_kept, setting


@pytest.fixture
def unset(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    """As for a user who has set nothing, with a home of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    monkeypatch.setattr(_cache, "_SECONDS", 0.0)
    before = setting("jax_compilation_cache_dir")
    _cache._set({"jax_compilation_cache_dir": None})
    yield tmp_path / "cache" / "mujax" / "jax"
    _cache._set({"jax_compilation_cache_dir": before})


def kept(folder: pathlib.Path) -> list[pathlib.Path]:
    return list(folder.rglob("*-cache"))


def compile_one(number: float) -> None:
    jax.jit(lambda x: jnp.sin(x) * number + 1).lower(jnp.ones(3)).compile()


def test_programs_are_kept_and_it_is_said_how_to_turn_it_off(unset: pathlib.Path) -> None:
    said: list[str] = []
    # Compiled before: JAX has decided that there is no cache.
    compile_one(0.25)
    seconds = setting("jax_persistent_cache_min_compile_time_secs")
    with compiled_programs_kept(said.append):
        compile_one(0.5)
    assert len(kept(unset)) == 1
    (sentence,) = said
    assert str(unset) in sentence
    assert "JAX_ENABLE_COMPILATION_CACHE=0" in sentence
    # Afterwards all is as before.
    assert setting("jax_compilation_cache_dir") is None
    assert setting("jax_persistent_cache_min_compile_time_secs") == seconds
    compile_one(0.75)
    assert len(kept(unset)) == 1


def test_a_cache_of_the_users_own_stays(
    unset: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    _cache._set({"jax_compilation_cache_dir": str(tmp_path / "own")})
    with compiled_programs_kept(said.append):
        assert setting("jax_compilation_cache_dir") == str(tmp_path / "own")
    _cache._set({"jax_compilation_cache_dir": None})
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        with compiled_programs_kept(said.append):
            assert setting("jax_compilation_cache_dir") is None
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert said == []
    assert not unset.exists()


def test_a_folder_that_cannot_be_written_is_a_note(
    unset: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    said: list[str] = []
    with compiled_programs_kept(said.append):
        assert setting("jax_compilation_cache_dir") is None
    (sentence,) = said
    assert sentence.startswith("compiled programs are not kept for later runs: ")
    assert "\n" not in sentence
    assert not unset.exists()


@pytest.mark.parametrize(
    ("most", "left"), [(25, ["b-cache", "c-cache"]), (30, ["a-cache", "b-cache", "c-cache"])]
)
def test_the_oldest_programs_go_first(tmp_path: pathlib.Path, most: int, left: list[str]) -> None:
    for age, name in enumerate(["c-cache", "b-cache", "a-cache"]):
        (tmp_path / name).write_bytes(bytes(10))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    _cache._drop_oldest(tmp_path, most)
    assert sorted(path.name for path in tmp_path.iterdir()) == left


@pytest.mark.parametrize(
    ("system", "variables", "expected"),
    [
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/mujax/jax"),
        ("linux", {}, "/home/me/.cache/mujax/jax"),
        ("darwin", {}, "/home/me/Library/Caches/mujax/jax"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/mujax/cache/jax"),
    ],
)
def test_each_system_has_its_folder(
    system: str, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(_cache.sys, "platform", system)
    assert _cache._user_folder() == pathlib.Path(expected)
