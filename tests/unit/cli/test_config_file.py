"""Settings from files of three kinds, and the dataclasses filled with them, each with what is refused."""

import builtins
import dataclasses
import json
import math
import os
import pathlib
import re
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import pytest

from mujax.cli import _config_file as config
from mujax.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_text(textwrap.dedent(content), encoding="utf-8")
        return path

    return write


def refusal(call, prefix=""):
    with pytest.raises(ConfigError) as error:
        call()
    message = str(error.value)
    assert message.startswith(str(prefix))
    assert "\n" not in message
    return message[len(str(prefix)) :]


# YAML and JSON


def test_yaml(write):
    path = write(
        "tune.yaml",
        """
        task: mnist-mlp   # a comment
        widths: [64, 128]
        space:
          learning_rate: {low: 2**-14, high: 2^-2, values: [1e-3, 0.5]}
        pruner:
        """,
    )
    found = config.read(path)
    assert found == {
        "task": "mnist-mlp",
        "widths": [64, 128],
        "space": {"learning_rate": {"low": 2.0**-14, "high": 0.25, "values": [0.001, 0.5]}},
        "pruner": None,
    }
    assert found.file == path
    assert config.read(str(path)) == found
    assert config.read(write("tune.YML", "steps: 3")) == {"steps": 3}


def test_json(write):
    path = write("tune.json", '{"steps": 3, "rates": ["2**-8", 1e-3], "out": null}')
    assert config.read(path) == {"steps": 3, "rates": [2.0**-8, 0.001], "out": None}


@pytest.mark.parametrize("content", ["", "# steps: 3\n", "{}"])
def test_yaml_that_sets_nothing(write, content):
    assert config.read(write("tune.yaml", content)) == {}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2**-8", 2.0**-8),
        ("2^-8", 2.0**-8),
        ("2 ** -8", 2.0**-8),
        ("2**+3", 8.0),
        ("2**10", 1024.0),
        ("2**-0.5", 2**-0.5),
        ("1.5^2", 2.25),
        ("10**1e1", 1e10),
        ("1e-3", 0.001),
        ("-1E3", -1000.0),
        ("+1e3", 1000.0),
        ("1.5e3", 1500.0),
        (".5e1", 5.0),
        ("0.5", 0.5),
        ("-.5", -0.5),
        ("3.", 3.0),
    ],
)
def test_texts_that_are_numbers(write, text, number):
    for path in (
        write("plain.yaml", f"x: {text}"),
        write("quoted.yaml", f"x: '{text}'"),
        write("deep.yaml", f"x: {{a: [{{b: '{text}'}}]}}"),
        write("quoted.json", f'{{"x": "{text}"}}'),
    ):
        found = config.read(path)["x"]
        found = found["a"][0]["b"] if isinstance(found, dict) else found
        assert found == number
        assert isinstance(found, float)


@pytest.mark.parametrize(
    "text",
    [
        "2024",
        "-007",
        "",
        ".",
        "e3",
        "1e",
        "1e-3 ",
        "v1e-3",
        "1e-3x",
        "2**",
        "**8",
        "2**-8**2",
        "-2**-8",
        "2*8",
        "2**(8)",
        "2**-8\n",
        "(2)**8",
        "2**99999",
        "0**-1",
        "1e999",
        "inf",
        "nan",
        "0x10**2",
        "1_0e3",
        "²**2",
        "٣e٣",
        "__import__('os').abort()",
    ],
)
def test_texts_that_stay_texts(write, text):
    # A JSON text is a YAML text, too.
    for name in ("tune.yaml", "tune.json"):
        assert config.read(write(name, json.dumps({"x": text}))) == {"x": text}


def test_names_stay_texts(write):
    assert config.read(write("tune.yaml", "1e-3: {2**-8: x}")) == {"1e-3": {"2**-8": "x"}}


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        (
            "tune.yaml",
            "steps: 3\nwidths: [64\nbatch: 3\n",
            ": expected YAML, got at line 3: expected ',' or ']', but got ':'; correct it there.",
        ),
        (
            "tune.yaml",
            "steps: 3\n  batch: 3\n",
            ": expected YAML, got at line 2: mapping values are not allowed here; correct it there.",
        ),
        (
            "tune.yaml",
            "a: !!python/object/apply:os.abort []\n",
            ": expected YAML, got at line 1: could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/object/apply:os.abort'; correct it there.",
        ),
        (
            "tune.yaml",
            "a: 2024-02-31",
            ": expected YAML, got at line 1: ValueError: day is out of range for month; correct it there.",
        ),
        (
            "tune.yaml",
            "- 1\n- 2\n",
            ": expected names with their values, got list; write one `name: value` for each setting.",
        ),
        (
            "tune.yaml",
            "on: 3\n",
            ": expected the name of a setting, got True; quote it if it is a name.",
        ),
        (
            "tune.yaml",
            "a: &a [*a]\n",
            ": expected a mapping, got one nested without end; flatten it.",
        ),
        (
            "tune.json",
            '{"steps": 3,\n}',
            None,
        ),
        (
            "tune.json",
            "3",
            ": expected names with their values, got int; write one `name: value` for each setting.",
        ),
        (
            "tune.json",
            '{"steps": ' + "9" * 5000 + "}",
            None,
        ),
        (
            "tune.toml",
            "",
            ": expected one of the suffixes .yaml, .yml, .json, .py, got .toml; "
            "give the file that of its kind.",
        ),
        (
            "tune",
            "",
            ": expected one of the suffixes .yaml, .yml, .json, .py, got none; "
            "give the file that of its kind.",
        ),
    ],
)
def test_files_that_are_refused(write, name, content, text):
    path = write(name, content)
    found = refusal(lambda: config.read(path), path)
    if text is None:
        # The words are those of Python's version.
        assert found.startswith(": expected JSON, got at line ")
        assert found.endswith("; correct it there.")
    else:
        assert found == text


@pytest.mark.parametrize("content", ["a: !!int x", "a: !!bool x", "a: !!timestamp x", "a: !!int ''", "a: \0"])
def test_yaml_whose_values_are_not_what_their_tags_say(write, content):
    path = write("tune.yaml", content)
    assert refusal(lambda: config.read(path), path).startswith(": expected YAML, got at line 1: ")


def test_files_that_cannot_be_read(tmp_path):
    for name in ("none.yaml", "none.json", "none.py"):
        assert refusal(lambda name=name: config.read(tmp_path / name), tmp_path / name) == (
            ": expected a text file of settings, got one that can't be read (No such file or directory); "
            "give the path of one that can."
        )
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff")
    assert "can't be read ('utf-8' codec" in refusal(lambda: config.read(tmp_path / "bytes.yaml"))


def bomb(levels: int) -> str:
    """Ten aliases of ten aliases of ..."""
    lines = (f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, levels))
    return "\n".join(["a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]", *lines, ""])


@pytest.mark.parametrize(
    "content",
    [bomb(9), bomb(40), bomb(6) + "b: {<<: [{c: *a5}, {d: *a5}]}\n"],
)
def test_yaml_whose_aliases_are_without_end_is_refused_at_once(content: str, tmp_path: pathlib.Path):
    path = tmp_path / "tune.yaml"
    path.write_text(content)
    started = time.process_time()
    assert re.match(
        r": expected at most 100,000 values, aliases written out, got .*; write the settings without aliases",
        refusal(lambda: config.read(path), path),
    )
    assert time.process_time() - started < 1


def test_yaml_may_have_aliases(tmp_path: pathlib.Path):
    path = tmp_path / "tune.yaml"
    path.write_text("a: &a {low: 2**-2, high: 1}\nspace: {x: *a, y: {<<: *a, high: 2}}\n")
    low = {"low": 0.25, "high": 1}
    assert config.read(path) == {"a": low, "space": {"x": low, "y": {"low": 0.25, "high": 2}}}
    path.write_text(bomb(4))
    assert len(config.read(path)["a3"]) == 10


def test_yaml_without_its_package(write, monkeypatch):
    path = write("tune.yaml", "steps: 3")
    real = builtins.__import__

    def without(name, *rest):
        if name == "yaml":
            raise ModuleNotFoundError("No module named 'yaml'", name="yaml")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert refusal(lambda: config.read(path), path) == (
        ': expected the package pyyaml, which reads YAML, got none installed; pip install "mujax-mup[cli]".'
    )
    # Others do without.
    assert config.read(write("tune.json", '{"steps": 3}')) == {"steps": 3}


# Python


def test_python(write):
    path = write(
        "tune.py",
        """
        from __future__ import annotations
        import math
        import os.path as paths

        _hidden = 3
        SCALE = 2
        steps = 10 * SCALE
        rate = "2**-8"

        def loss(outputs, targets):
            return SCALE * math.fsum(outputs) + _hidden
        """,
    )
    found = config.read(path)
    assert sorted(found) == ["SCALE", "loss", "rate", "steps"]
    # Python has numbers of its own.
    assert found["rate"] == "2**-8"
    assert found["steps"] == 20
    # What a function refers to is there when it is called, later.
    assert found["loss"]([1, 2], None) == 9


def test_python_imports_what_is_beside_it(write, monkeypatch):
    write("beside_it_3141.py", "width = 64")
    monkeypatch.setitem(sys.modules, "beside_it_3141", None)
    monkeypatch.delitem(sys.modules, "beside_it_3141")
    before = list(sys.path)
    assert config.read(write("tune.py", "from beside_it_3141 import width")) == {"width": 64}
    assert sys.path == before
    sys.modules.pop("beside_it_3141", None)


def test_python_is_not_run_as_main(write):
    assert config.read(write("tune.py", "a = 1\nif __name__ == '__main__':\n    a = 2")) == {"a": 1}


def test_python_with_a_model(write):
    found = config.read(
        write(
            "tune.py",
            """
            from __future__ import annotations
            import dataclasses
            from flax import linen as nn

            class Model(nn.Module):
                width: int

                @nn.compact
                def __call__(self, x):
                    return nn.Dense(self.width)(x)

            @dataclasses.dataclass(frozen=True)
            class Options:
                depth: int = 2

            def task(width: int) -> Model:
                return Model(width * Options().depth)
            """,
        )
    )
    assert sorted(found) == ["Model", "Options", "task"]
    assert found["task"](4).width == 8


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("a = 1\nb = a / 0\n", "got at line 2 ZeroDivisionError: division by zero; correct it there."),
        (
            "def f():\n    raise ValueError('first\\nsecond')\n\n\nf()\n",
            "got at line 2 ValueError: first; correct it there.",
        ),
        ("a = 1\nimport json\njson.loads('[')\n", "got at line 3 JSONDecodeError: Expecting value: line 1"),
        ("a = 1\nimport no_such_module_3141\n", "got at line 2 ModuleNotFoundError: No module named"),
        ("a = 1\n\nb = (\n", "got at line 3 SyntaxError: '(' was never closed"),
        ("a = 1\nimport sys\nsys.exit(3)\n", "got at line 3 SystemExit: 3; correct it there."),
        ("a = 1\nraise RecursionError\n", "got at line 2 RecursionError; correct it there."),
    ],
)
def test_python_that_fails(write, content, text):
    path = write("tune.py", content)
    before = list(sys.path)
    assert refusal(lambda: config.read(path), path).startswith(f": expected a Python file that runs, {text}")
    assert sys.path == before


def test_python_can_be_interrupted(write):
    path = write("tune.py", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        config.read(path)


# Dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int
    rate: float = 0.1
    nesterov: bool = False
    name: str = "adam"
    out: pathlib.Path = pathlib.Path("out")
    widths: tuple[int, ...] = (64,)
    tags: tuple[str, ...] = ()
    files: tuple[pathlib.Path, ...] = ()
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    task: Any = None
    batch: int | None = None
    data: pathlib.Path | None = None
    hidden: tuple[int, ...] | None = None
    mode: Literal["loop", "map"] | None = None
    loss: Callable[..., Any] | None = None
    choice: int | str = 0
    kind: np.dtype | None = None
    derived: int = dataclasses.field(init=False, default=0)

    def __post_init__(self):
        if self.steps < 1:
            raise ConfigError(f"steps: expected at least 1, got {self.steps}.")


SOME = {"steps": 3}


def test_filled_from_a_file_and_overridden(write):
    path = write("tune.yaml", "steps: 100\nrate: 2**-8\nwidths: [32, 64]\ntags: [a, '7']\nbatch: 2**5\n")
    found = config.filled(Config, config.read(path), {"steps": 10, "name": None, "widths": (8,)})
    assert found == Config(steps=10, rate=2.0**-8, widths=(8,), tags=("a", "7"), batch=32)


def test_filled_from_nothing_but_options():
    assert config.filled(Config, {}, {"steps": 3}) == Config(steps=3)
    assert config.filled(Config, SOME) == Config(steps=3)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("steps", 3.0, 3),
        ("steps", np.int64(3), 3),
        ("rate", 1, 1.0),
        ("rate", np.float32(0.5), 0.5),
        ("nesterov", True, True),
        ("widths", [], ()),
        ("widths", [1, 2.0], (1, 2)),
        ("widths", range(2), (0, 1)),
        ("widths", (1,), (1,)),
        ("fixed", {"momentum": [1, 2]}, {"momentum": [1, 2]}),
        ("task", [1, 2], [1, 2]),
        ("task", None, None),
        ("batch", None, None),
        ("batch", 3, 3),
        ("hidden", None, None),
        ("hidden", [3], (3,)),
        ("mode", "map", "map"),
        ("mode", None, None),
        ("loss", math.fsum, math.fsum),
        ("choice", 3, 3),
        ("choice", "x", "x"),
        ("kind", np.dtype("int8"), np.dtype("int8")),
    ],
)
def test_values_are_brought_to_their_kinds(name, value, expected):
    found = getattr(config.filled(Config, SOME | {name: value}), name)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("steps", 2.5, "expected a whole number, got 2.5"),
        ("steps", True, "expected a whole number, got True"),
        ("steps", "3", "expected a whole number, got '3'"),
        ("steps", None, "expected a whole number, got None"),
        ("steps", math.inf, "expected a whole number, got inf"),
        ("steps", math.nan, "expected a whole number, got nan"),
        ("rate", "fast", "expected a number, got 'fast'"),
        ("rate", False, "expected a number, got False"),
        ("rate", 1j, "expected a number, got 1j"),
        ("rate", [0.1], "expected a number, got [0.1]"),
        ("nesterov", 1, "expected true or false, got 1"),
        ("nesterov", "yes", "expected true or false, got 'yes'"),
        ("name", 3, "expected a text, got 3"),
        ("out", 2024, "expected a path, got 2024"),
        ("widths", 64, "expected a list of whole numbers, got 64"),
        ("widths", "64", "expected a list of whole numbers, got '64'"),
        ("widths", [64, "x"], "expected a list of whole numbers, got [64, 'x']"),
        ("widths", [64, True], "expected a list of whole numbers, got [64, True]"),
        ("tags", "ab", "expected a list of texts, got 'ab'"),
        ("tags", ["a", 7], "expected a list of texts, got ['a', 7]"),
        ("files", [3], "expected a list of paths, got [3]"),
        ("fixed", [1], "expected a mapping, got [1]"),
        ("batch", "x", "expected a whole number or nothing, got 'x'"),
        ("hidden", 3, "expected a list of whole numbers or nothing, got 3"),
        ("mode", "vmap", "expected 'loop' or 'map' or nothing, got 'vmap'"),
        ("loss", "mse", "expected a function or nothing, got 'mse'"),
        ("choice", 1.5, "expected a whole number or a text, got 1.5"),
        ("kind", "int8", "expected dtype or nothing, got 'int8'"),
        ("rate", np.zeros((2, 2)), "expected a number, got array([[0., 0.], [0., 0.]])"),
    ],
)
def test_values_of_the_wrong_kind(write, name, value, text):
    file = write("tune.py", "")
    settings = config.Settings(SOME | {name: value}, file)
    assert refusal(lambda: config.filled(Config, settings)) == f"{name}: {text} in {file}."
    if value is not None:
        assert refusal(lambda: config.filled(Config, SOME, {name: value})) == f"{name}: {text}."


def test_a_number_beyond_floats():
    text = refusal(lambda: config.filled(Config, SOME | {"rate": 10**400}))
    assert text == f"rate: expected a number, got 1{'0' * 199}…."


def test_long_values_are_cut_short():
    text = refusal(lambda: config.filled(Config, SOME | {"rate": list(range(1000))}))
    assert text.endswith("….")
    assert len(text) < 300


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("stesp", "the nearest is steps."),
        ("Steps", "the nearest is steps."),
        ("width", "the nearest is widths."),
        ("derived", None),
        ("xyzzy", None),
    ],
)
def test_unknown_settings(write, name, remedy):
    path = write("tune.json", f'{{"steps": 3, "{name}": 1}}')
    fields = [field.name for field in dataclasses.fields(Config) if field.init]
    remedy = remedy or f"there are {', '.join(fields)}."
    text = f"{name}: expected the name of a setting, got an unknown one"
    assert refusal(lambda: config.filled(Config, config.read(path))) == f"{text} in {path}; {remedy}"
    assert refusal(lambda: config.filled(Config, {"steps": 3}, {name: 1})) == f"{text}; {remedy}"


def test_helpers_in_a_python_file(write):
    path = write(
        "tune.py",
        """
        from functools import partial
        from typing import TYPE_CHECKING, Any
        import numpy as np

        WIDEST = 64

        class Model: ...

        class Loss: ...

        def loss(outputs, targets): ...

        def build_model(width): return Model()

        steps = 3
        task = partial(build_model, WIDEST)
        """,
    )
    assert config.filled(Config, config.read(path)).steps == 3


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ("def losss(a, b): ...", "losss"),
        ("RATE = 0.3", "RATE"),
        ("depth = 3", "depth"),
        ("class Loss: ...", "Loss"),
    ],
)
def test_mistakes_in_a_python_file_are_no_helpers(write, content, name):
    path = write("tune.py", f"steps = 3\n{content}\n")
    assert refusal(lambda: config.filled(Config, config.read(path))).startswith(
        f"{name}: expected the name of a setting, got an unknown one in {path}; "
    )


def test_functions_of_a_python_file_are_settings(write):
    path = write("tune.py", "steps = 3\ndef loss(outputs, targets): return outputs - targets\n")
    loss = config.filled(Config, config.read(path)).loss
    assert loss is not None
    assert loss(3, 1) == 2


def test_missing_settings(write):
    path = write("tune.yaml", "rate: 1\n")
    assert refusal(lambda: config.filled(Config, config.read(path))) == (
        f"steps: expected a value, got none in {path}; give one."
    )
    assert refusal(lambda: config.filled(Config, {}, {"steps": None})) == (
        "steps: expected a value, got none; give one."
    )


def test_the_dataclass_has_the_last_word(write):
    path = write("tune.yaml", "steps: 0\n")
    assert refusal(lambda: config.filled(Config, config.read(path))) == "steps: expected at least 1, got 0."


def test_paths_are_relative_to_the_file(write, tmp_path, monkeypatch):
    path = write("tune.yaml", "steps: 3\nout: runs/a\ndata: /data/own.npz\nfiles: [a, ../b]\n")
    found = config.filled(Config, config.read(path), {"data": "own.npz"})
    assert found.out == tmp_path / "runs/a"
    # On the command line they are relative to where one is.
    assert found.data == pathlib.Path("own.npz")
    assert found.files == (tmp_path / "a", tmp_path / "../b")
    assert config.filled(Config, config.read(path)).data == pathlib.Path("/data/own.npz")
    # The file itself given by a relative path, and the folder left after.
    monkeypatch.chdir(tmp_path)
    relative = config.read("tune.yaml")
    assert config.filled(Config, relative).out == tmp_path / "runs/a"
    # A default is the program's, not the file's.
    assert config.filled(Config, config.read(write("bare.yaml", "steps: 3"))).out == pathlib.Path("out")


def test_paths_of_a_home(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", os.fspath(tmp_path / "home"))
    path = write("tune.yaml", "steps: 3\nout: ~/runs\ndata: ~nobody-3141/x\n")
    found = config.filled(Config, config.read(path))
    assert found.out == tmp_path / "home/runs"
    assert found.data == tmp_path / "~nobody-3141/x"
