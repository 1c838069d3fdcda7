"""ParamSpec and MupSpec: what they check, what follows from them, and their JSON."""

import dataclasses
import json
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx

import mujax
from mujax.spec import MupSpec, Parametrization, ParamSpec, leaf_path

MUP = Parametrization((("mup", 1.0),))

KERNEL = ParamSpec((24, 48), (8, 8), fan_in=(0,), fan_out=(1,), infinite=(0, 1))
READOUT = ParamSpec((24, 10), (8, 10), fan_in=(0,), fan_out=(1,), infinite=(0,))
BIAS = ParamSpec((24,), (8,), fan_out=(0,), infinite=(0,))
SCALAR = ParamSpec((), ())


# ---- ParamSpec: validation -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        (
            {"shape": (4, 4), "base_shape": (4,)},
            mujax.ShapeMismatchError,
            "expected shape and base_shape of the same rank, got shape=(4, 4), base_shape=(4,)",
        ),
        (
            {"shape": (4, 4), "base_shape": (4, 4), "fan_in": (0,)},
            mujax.MujaxError,
            "ParamSpec of shape (4, 4): expected each axis in exactly one of fan_in, fan_out and stack, got "
            "fan_in=(0,), fan_out=(), stack=()",
        ),
        (
            {"shape": (4,), "base_shape": (4,), "fan_in": (0,), "fan_out": (0,)},
            mujax.MujaxError,
            "fan_in=(0,), fan_out=(0,), stack=()",
        ),
        (
            {"shape": (4,), "base_shape": (4,), "stack": (1,)},
            mujax.MujaxError,
            "expected each axis in exactly one of",
        ),
        # Negative axes are not an alias: two specs of the same parameter must compare equal.
        ({"shape": (4,), "base_shape": (4,), "fan_in": (-1,)}, mujax.MujaxError, "fan_in=(-1,)"),
        (
            {"shape": (8, 4), "base_shape": (4, 4), "fan_in": (0,), "fan_out": (1,), "infinite": (1,)},
            mujax.ShapeMismatchError,
            "shape (8, 4) and base_shape (4, 4): expected axes (0,), whose sizes differ, to be listed in "
            "infinite",
        ),
        (
            {"shape": (8,), "base_shape": (4,), "fan_out": (0,), "infinite": (0, 3)},
            mujax.MujaxError,
            "ParamSpec of shape (8,): expected infinite to list axes of the shape, once each, got (0, 3)",
        ),
        (
            {"shape": (8,), "base_shape": (4,), "fan_out": (0,), "infinite": (0, 0)},
            mujax.MujaxError,
            "got (0, 0)",
        ),
    ],
)
def test_a_wrong_param_spec_says_what_is_wrong(fields, error, text):
    with pytest.raises(error, match=re.escape(text)):
        ParamSpec(**fields)


def test_an_infinite_axis_may_have_the_same_size_in_both():
    """With a delta, the base's own widths are infinite too."""
    spec = ParamSpec((8,), (8,), fan_out=(0,), infinite=(0,))
    assert (spec.role, spec.r_out) == ("input", 1.0)


def test_a_param_spec_is_written_in_one_way():
    """Lists, numpy's integers and the order of axes make no difference."""
    odd = ParamSpec(
        list(np.int64([2, 3, 4])), np.array([2, 3, 2]), fan_in=[1, 0], fan_out=[2], infinite=range(2, 3)
    )
    plain = ParamSpec((2, 3, 4), (2, 3, 2), fan_in=(0, 1), fan_out=(2,), infinite=(2,))
    assert odd == plain
    assert hash(odd) == hash(plain)
    assert MupSpec.from_json(MupSpec({"w": odd}, MUP).to_json())["w"] == plain


# ---- ParamSpec: what follows -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fan_in", "fan_out", "stack", "infinite", "role"),
    [
        ((0,), (1,), (), (), "finite"),
        ((0,), (1,), (), (1,), "input"),
        ((0,), (1,), (), (0,), "output"),
        ((0,), (1,), (), (0, 1), "hidden"),
        ((), (0, 1), (), (0,), "input"),
        ((0, 1), (), (), (1,), "output"),
        # The transpose of each of the rows above.
        ((1,), (0,), (), (0,), "input"),
        ((1,), (0,), (), (1,), "output"),
        # A growing batch axis of a product widens the pre-activation.
        ((1,), (), (0,), (0,), "input"),
        ((1,), (), (0,), (0, 1), "output"),
        # A stack that does not grow is nobody's width.
        ((1,), (), (0,), (1,), "output"),
    ],
)
def test_the_role_follows_from_the_infinite_axes(fan_in, fan_out, stack, infinite, role):
    spec = ParamSpec((4, 4), (4, 4), fan_in, fan_out, stack, infinite)
    assert spec.role == role


def test_ratios_are_products_over_real_axes():
    """Heads and head size grow at different rates; spatial axes and stacks that stay count for nothing."""
    spec = ParamSpec(
        (3, 3, 5, 16, 12, 40), (3, 3, 5, 8, 4, 8), fan_in=(0, 1, 3, 4), fan_out=(5,), stack=(2,),
        infinite=(3, 4, 5),
    )  # fmt: skip
    assert (spec.r_in, spec.r_out) == (6.0, 5.0)
    assert (KERNEL.r_in, KERNEL.r_out) == (3.0, 6.0)
    assert (READOUT.r_in, READOUT.r_out) == (3.0, 1.0)
    assert (BIAS.r_in, BIAS.r_out) == (1.0, 3.0)
    assert (SCALAR.r_in, SCALAR.r_out) == (1.0, 1.0)


def test_a_growing_stack_counts_as_fan_out_and_a_fixed_one_does_not():
    grows = ParamSpec((6, 4, 4), (2, 4, 4), fan_in=(1,), fan_out=(2,), stack=(0,), infinite=(0,))
    stays = ParamSpec((6, 4, 8), (6, 4, 4), fan_in=(1,), fan_out=(2,), stack=(0,), infinite=(2,))
    assert (grows.r_out, stays.r_out) == (3.0, 2.0)


def test_ratios_of_widths_that_shrink_or_do_not_divide():
    spec = ParamSpec((10, 5), (4, 8), fan_in=(0,), fan_out=(1,), infinite=(0, 1))
    assert (spec.r_in, spec.r_out) == (2.5, 0.625)


def test_ratios_of_large_parameters_are_exact():
    """Products of Python ints: no overflow, no rounding before the one division."""
    spec = ParamSpec((2**40, 3**20), (2**10, 3**20), fan_in=(0, 1), infinite=(0,))
    assert spec.r_in == 2.0**30


def test_an_empty_parameter_has_no_ratio():
    assert ParamSpec((0, 4), (0, 4), fan_in=(0,), fan_out=(1,)).r_in == 1.0


# ---- MupSpec ---------------------------------------------------------------------------------------


@pytest.fixture
def spec() -> MupSpec:
    return MupSpec({"b/kernel": KERNEL, "a/kernel": READOUT, "a/bias": BIAS, "s": SCALAR}, MUP)


def test_a_spec_is_a_mapping_in_the_order_of_the_parameters(spec):
    assert list(spec) == ["b/kernel", "a/kernel", "a/bias", "s"]
    assert (len(spec), spec["a/bias"], "a" in spec) == (4, BIAS, False)
    assert spec.size() == 24 * 48 + 24 * 10 + 24 + 1
    assert repr(spec) == "MupSpec(4 parameters, parametrization='mup')"
    with pytest.raises(KeyError):
        spec["nothing"]


def test_equality_and_hash(spec):
    again = MupSpec(dict(spec), MUP)
    assert again == spec
    assert hash(again) == hash(spec)
    assert {spec: 1}[again] == 1
    # Twins that differ in one thing each.
    wider = dataclasses.replace(KERNEL, shape=(32, 48))
    tied = dataclasses.replace(READOUT, tied=True)
    assert MupSpec({**spec, "b/kernel": wider}, MUP) != spec
    assert MupSpec({**spec, "a/kernel": tied}, MUP) != spec
    assert MupSpec({path: spec[path] for path in list(spec)[:-1]}, MUP) != spec
    assert MupSpec(dict(spec), Parametrization((("table3", 1.0),))) != spec
    assert spec != dict(spec)


def test_a_spec_in_another_order_is_equal_and_has_the_same_hash(spec):
    """Equality is that of mappings, and equal things must have equal hashes."""
    turned = MupSpec(dict(list(spec.items())[::-1]), MUP)
    assert turned == spec
    assert hash(turned) == hash(spec)


def test_a_spec_is_static_under_jit(spec):
    """It can be a static argument, and a second equal one does not compile again."""
    traces = []

    def function(x, spec):
        traces.append(spec)
        return x * spec["b/kernel"].r_in

    jitted = jax.jit(function, static_argnums=1)
    assert jitted(jnp.ones(()), spec) == 3.0
    assert jitted(jnp.ones(()), MupSpec(dict(spec), MUP)) == 3.0
    assert len(traces) == 1
    other = MupSpec({"b/kernel": dataclasses.replace(KERNEL, shape=(16, 48))}, MUP)
    assert jitted(jnp.ones(()), other) == 2.0
    assert len(traces) == 2


def test_a_spec_does_not_change_with_the_mapping_it_was_made_of():
    params = {"w": KERNEL}
    spec = MupSpec(params, MUP)
    params["v"] = BIAS
    assert list(spec) == ["w"]


def test_a_spec_can_be_pickled(spec):
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_parametrizations_print_as_their_tables():
    assert str(MUP) == "mup"
    assert str(Parametrization((("sp", 0.25), ("mup", 0.75)))) == "0.25 sp + 0.75 mup"


# ---- JSON ------------------------------------------------------------------------------------------


def test_json_round_trip(spec, tmp_path):
    mixed = MupSpec(
        {**spec, "t": dataclasses.replace(KERNEL, tied=True)}, Parametrization((("sp", 0.1), ("mup", 0.9)))
    )
    for one in (spec, mixed, MupSpec({}, MUP)):
        again = MupSpec.from_json(one.to_json())
        assert again == one
        assert hash(again) == hash(one)
        assert list(again) == list(one)
        assert repr(again) == repr(one)
        one.save(tmp_path / "spec.json")
        assert MupSpec.load(tmp_path / "spec.json") == one
        assert MupSpec.load(str(tmp_path / "spec.json")) == one


def test_what_a_file_holds_is_plain_json(spec):
    data = json.loads(spec.to_json())
    assert set(data) == {"mujax_spec", "parametrization", "params"}
    assert data["params"]["b/kernel"] == {
        "shape": [24, 48], "base_shape": [8, 8], "fan_in": [0], "fan_out": [1], "stack": [],
        "infinite": [0, 1], "tied": False,
    }  # fmt: skip


def _edited(spec: MupSpec, **changes) -> str:
    return json.dumps({**json.loads(spec.to_json()), **changes})


def test_a_file_that_is_not_a_spec_is_an_error(spec, tmp_path):
    fields = {"shape": [4], "base_shape": [4], "fan_in": [0], "fan_out": [], "stack": [], "infinite": []}

    def with_param(**changes) -> str:
        return _edited(spec, params={"w": {**fields, **changes}})

    not_json = "expected the JSON written by MupSpec.save"
    bad = {
        "": not_json,
        "[1, 2]": not_json,
        "{}": not_json,
        "null": not_json,
        spec.to_json()[:-20]: not_json,
        _edited(spec, params=[1]): "params: expected a table of parameters by path, got [1]",
        _edited(spec, params={"w": {"shape": [4]}}): "of which shape and base_shape must be there",
        _edited(spec, parametrization=None): "expected a list of tables and their weights, got None",
        _edited(spec, parametrization=[["mup", "much"]]): "expected finite weights of at least 0",
        _edited(spec, mujax_spec=99): "expected format 1, got 99; write it again",
        with_param(colour=1): "spec file, w: expected the fields",
        with_param(shape=4): "w, shape: expected a list of integers, got 4",
        with_param(shape=["4"]): "w, shape: expected a list of integers, got ['4']",
        with_param(stack=[0.0]): "w, stack: expected a list of integers",
        # A file that is well-formed but whose content contradicts itself.
        with_param(fan_in=[]): "expected each axis in exactly one of",
    }
    for text, message in bad.items():
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(mujax.MujaxError, match=re.escape(message)):
            MupSpec.load(tmp_path / "bad.json")


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(
        mujax.MujaxError, match=r"nowhere\.json: expected a spec file written by MupSpec\.save"
    ):
        MupSpec.load(tmp_path / "nowhere.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00\x93")
    with pytest.raises(mujax.MujaxError, match=r"expected .*MupSpec\.save"):
        MupSpec.load(tmp_path / "bytes.json")


# ---- paths -----------------------------------------------------------------------------------------


def test_paths_of_leaves_do_not_show_boxes():
    box = nn.Partitioned(jnp.ones(2), names=("embed",))
    tree = {"a": {"kernel": box, "value": jnp.ones(3)}, "blocks": [jnp.ones(1), (jnp.ones(1),)]}
    paths = [leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    assert paths == ["a/kernel", "a/value", "blocks/0", "blocks/1/0"]


@pytest.mark.samples
def test_paths_of_an_nnx_state_are_those_of_its_attributes():
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    paths = [leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert paths == ["bias", "kernel"]
