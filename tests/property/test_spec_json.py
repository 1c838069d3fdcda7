"""A spec's JSON: every corrupted text is refused in one sentence, and a failed write leaves the old file."""

import json
import os
import pathlib
import stat
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

import mujax
from mujax import MupSpec, Parametrization, ParamSpec, rules
from mujax.spec import TABLES

SPEC = MupSpec(
    {
        "blocks/kernel": ParamSpec(
            (4, 24, 48),
            (2, 8, 8),
            fan_in=(1,),
            fan_out=(2,),
            stack=(0,),
            infinite=(1, 2),
            layers=(0,),
            depth=2.0,
        ),
        "embed": ParamSpec((10, 24), (10, 8), fan_in=(0,), fan_out=(1,), infinite=(1,), tied=True),
        "empty": ParamSpec((0, 4), (0, 4), fan_in=(0,), fan_out=(1,)),
        "scale": ParamSpec((), ()),
    },
    Parametrization((("sp", 0.25), ("mup", 0.75)), depth_alpha=0.5),
)
TEXT = SPEC.to_json()


def refused(text: str) -> str:
    with pytest.raises(mujax.MujaxError) as caught:
        MupSpec.from_json(text)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert len(sentence) < 1000
    assert "expected" in sentence
    return sentence


def edited(path: tuple[Any, ...], value: Any) -> str:
    data = json.loads(TEXT)
    node = data
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = value
    return json.dumps(data)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where each value of the text is."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for name, child in children for place in places(child, (*path, name)))]


PLACES = [place for place in places(json.loads(TEXT)) if place]
# None of these stands for a value of any field.
WRONG = st.sampled_from(
    [-1, -(2**70), 10**400, 1.5e300, float("nan"), float("inf"), "x", {"a": 1}, [[]], [None]]
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(PLACES), WRONG)
def test_a_wrong_value_anywhere_is_refused(place, value):
    # A negative exponent of depth and an unlikely ratio of depths are numbers like others.
    if place[-1] in ("depth", "depth_alpha") and value in (-1, 1.5e300):
        return
    refused(edited(place, value))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, len(TEXT) - 2))
def test_a_text_that_ends_early_is_refused(length):
    refused(TEXT[:length])


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(TEXT) - 1), st.characters(codec="utf-8"))
def test_a_changed_character_is_refused_or_gives_a_spec_that_survives_the_round_trip(position, character):
    text = TEXT[:position] + character + TEXT[position + 1 :]
    try:
        spec = MupSpec.from_json(text)
    except mujax.MujaxError:
        return
    assert MupSpec.from_json(spec.to_json()) == spec


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_text_is_refused(text):
    refused(text)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            edited(("params", "embed", "shape"), [-10, 24]),
            "spec file, embed, shape: expected integers from 0",
        ),
        (
            edited(("params", "embed", "shape"), [True, 24]),
            "embed, shape: expected a list of integers, got [T",
        ),
        (
            edited(("params", "embed", "shape"), [10**400, 24]),
            "integers from 0 to 2^63 - 1, got a number too",
        ),
        (edited(("params", "embed", "base_shape"), [0, 8]), "embed: expected positive sizes, got [10, 0]"),
        (edited(("params", "embed", "tied"), "yes"), "embed, tied: expected true or false, got 'yes'"),
        (edited(("params", "embed", "tied"), 1), "embed, tied: expected true or false, got 1"),
        (edited(("params", "embed", "colour"), 1), "of which shape and base_shape must be there"),
        (
            edited(("params", "embed", "fan_in"), []),
            "spec file, embed: ParamSpec of shape (10, 24): expected each",
        ),
        (edited(("params", "blocks/kernel", "depth"), 0), "depth: expected a positive finite number, got 0"),
        (
            edited(("params", "blocks/kernel", "depth"), True),
            "depth: expected a positive finite number, got T",
        ),
        (
            edited(("parametrization",), [["zz", 1.0]]),
            "expected tables out of mup, table3, table9, sp, got 'zz'",
        ),
        (edited(("parametrization",), []), "expected a list of tables and their weights, got []"),
        (edited(("parametrization",), [["mup", 0.5]]), "expected weights that sum to 1"),
        (
            edited(("parametrization",), [["mup", 2], ["sp", -1]]),
            "expected finite weights of at least 0, got -1",
        ),
        (edited(("parametrization",), [["mup", 0.5]] * 2), "expected each table once"),
        (
            edited(("parametrization",), [["mup", float("nan")]]),
            "spec file: expected finite numbers, got NaN",
        ),
        (edited(("parametrization",), [["mup", True]]), "expected finite weights"),
        (edited(("depth_alpha",), "1"), "depth_alpha: expected a finite number, got '1'"),
        (edited(("mujax_spec",), True), "expected format 1, got True"),
        (edited(("colour",), 1), "spec file: expected the fields"),
        (TEXT.replace('"scale"', '"embed"'), "spec file: expected each name once, got 'embed' twice"),
        ("[" * 100_000 + "]" * 100_000, "got brackets nested too deeply"),
        ('{"mujax_spec": 1' + "0" * 5000 + "}", "expected the JSON written by MupSpec.save"),
    ],
)
def test_each_kind_has_its_sentence(text, sentence):
    assert sentence in refused(text)


def test_the_text_itself_is_read():
    assert MupSpec.from_json(TEXT) == SPEC
    # An old file, of a time before these fields.
    data = json.loads(TEXT)
    del data["depth_alpha"]
    for name in ("layers", "depth"):
        del data["params"]["blocks/kernel"][name]
    data["params"]["blocks/kernel"]["base_shape"][0] = 4
    old = MupSpec.from_json(json.dumps(data))
    assert (old["blocks/kernel"].depth, old.parametrization.depth_alpha) == (1.0, None)


def test_the_tables_of_a_file_are_those_of_the_rules():
    assert set(TABLES) == set(rules.TABLES)


# ---- writing ---------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "spec.json"
    SPEC.save(path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            full_disk = (
                r"spec\.json: expected a file that can be written, got an error: No space left on device"
            )
            with pytest.raises(mujax.MujaxError, match=full_disk):
                MupSpec({}, SPEC.parametrization).save(path)
        assert MupSpec.load(path) == SPEC
        assert os.listdir(tmp_path) == ["spec.json"]


@pytest.mark.parametrize("place", ["missing/spec.json", "folder", "file/spec.json"])
def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path, place):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(mujax.MujaxError, match="expected a file that can be written, got an error: "):
        SPEC.save(tmp_path / place)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_links_modes_and_pipes_stay_as_they_are(tmp_path):
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    SPEC.save(real)
    plain = tmp_path / "plain"
    plain.write_text("")
    assert stat.S_IMODE(real.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    real.chmod(0o640)
    link.symlink_to(real)
    MupSpec({}, SPEC.parametrization).save(link)
    assert link.is_symlink()
    assert len(MupSpec.load(real)) == 0
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    SPEC.save("/dev/null")
    assert not pathlib.Path("/dev/null").is_file()
