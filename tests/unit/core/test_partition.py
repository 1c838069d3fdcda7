"""How parameters are split over a mesh: read off roles and axes, or off the model's annotations."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn, nnx
from jax.sharding import PartitionSpec as P

import mujax
from mujax.models import ResNet, ResNetConfig, Transformer, TransformerConfig

pytestmark = pytest.mark.abstract

X = jax.ShapeDtypeStruct((8, 6), "float32")
MESH = {"data": 2, "fsdp": 2, "tensor": 4}
LECUN = nn.initializers.lecun_normal()


def mlp(width, hidden=2, **kwargs):
    layers = [nn.Dense(width, **kwargs) for _ in range(1 + hidden)]
    return nn.Sequential([*layers, nn.Dense(10)])


def read(build, x=X, widths=(32, 8), **kwargs):
    return mujax.mup_init(*map(build, widths), x, **kwargs)


# By roles and axes


def transformer(width):
    config = TransformerConfig(d_model=width, n_layers=2, n_heads=4, vocab_size=64, max_len=16)
    return Transformer(config)


def test_a_transformers_heads_and_features_are_paired():
    specs = read(transformer, jax.ShapeDtypeStruct((2, 8), "int32")).partition(MESH)
    for block in ("block_0", "block_1"):
        for name in ("query", "key", "value"):
            assert specs[f"{block}/attention/{name}/kernel"] == P("fsdp", "tensor")
        assert specs[f"{block}/attention/out/kernel"] == P("tensor", None, "fsdp")
        assert specs[f"{block}/ff/up/kernel"] == P("fsdp", "tensor")
        assert specs[f"{block}/ff/down/kernel"] == P("tensor", "fsdp")
        assert specs[f"{block}/ff_norm/scale"] == P()
    assert specs["token_embedding/embedding"] == P("fsdp")
    assert specs["position_embedding/embedding"] == P(None, "fsdp")
    # The larger axis is the vocabulary's.
    assert specs["readout/kernel"] == P(None, "fsdp")


def test_a_convolution_is_split_over_its_channels():
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), "float32")
    specs = read(lambda width: ResNet(ResNetConfig((2,), (width,))), x, (32, 16)).partition(MESH)
    for block in ("stage_0_block_0", "stage_0_block_1"):
        assert specs[f"{block}/conv_0/kernel"] == P(None, None, "fsdp", "tensor")
        assert specs[f"{block}/conv_1/kernel"] == P(None, None, "tensor", "fsdp")


def test_gates_and_experts_are_not_taken_for_the_second_of_a_pair():
    """A product that reads the first kernel of a pair and something whole is not split over its fan-in."""

    def build(width):
        def init(key, x):
            del x
            shapes = {"in": (6, width), "gate": (width, width), "up": (width, width), "down": (width, width)}
            shapes |= {"route": (width, 1), "out": (width, 3)}
            keys = jax.random.split(key, len(shapes))
            return {
                name: jax.random.normal(one, shape) / shape[0] ** 0.5
                for one, (name, shape) in zip(keys, shapes.items(), strict=True)
            }

        def apply(p, x):
            h = jnp.tanh(x @ p["in"])
            weight = jax.nn.sigmoid(h @ p["route"])
            inside = jax.nn.silu(h @ p["gate"]) * (h @ p["up"]) * weight
            return (h + inside @ p["down"]) @ p["out"]

        return mujax.Functional(init, apply)

    specs = read(build).partition({"tensor": 4})
    assert specs["gate"] == specs["up"] == P(None, "tensor")
    assert specs["down"] == P("tensor")
    assert specs["in"] == specs["out"] == specs["route"] == P()


def test_layers_in_a_row_alternate_and_vectors_are_replicated():
    specs = read(lambda width: mlp(width, hidden=3)).partition(MESH)
    kernels = [specs[f"layers_{layer}/kernel"] for layer in range(5)]
    assert kernels == [
        P(None, "fsdp"),
        P("fsdp", "tensor"),
        P("tensor", "fsdp"),
        P("fsdp", "tensor"),
        P("fsdp"),
    ]
    assert {specs[f"layers_{layer}/bias"] for layer in range(5)} == {P()}


def test_scanned_layers_are_not_split_over_their_number():
    class Layer(nn.Module):
        width: int

        @nn.compact
        def __call__(self, h, _):
            return h + nn.Dense(self.width, name="up")(h), None

    class Net(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x):
            many = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=64)
            h, _ = many(self.width, name="layers")(nn.Dense(self.width, name="first")(x), None)
            return nn.Dense(3, name="last")(h)

    specs = read(Net).partition({"fsdp": 2})
    assert specs["layers/up/kernel"] == P(None, "fsdp")
    assert specs["layers/up/bias"] == P()


def test_without_a_tensor_axis_the_largest_axis_is_split_and_without_any_nothing():
    mup = read(mlp)
    assert mup.partition({"fsdp": 2})["layers_1/kernel"] == P("fsdp")
    assert mup.partition({"fsdp": 3, "data": 4})["layers_0/kernel"] == P("fsdp")
    assert set(mup.partition({"data": 8}).values()) == {P()}


def test_a_model_of_the_bases_own_width_is_split_too():
    mup = read(mlp, widths=(32, 32))
    assert mup.partition({"tensor": 2})["layers_1/kernel"] == P("tensor")


@pytest.mark.parametrize(
    ("mesh", "text"),
    [
        (
            {"data": 2, "model": 4},
            "mesh: expected axes out of 'data', 'fsdp', 'tensor', since the model annotates no parameter, "
            "got 'model'; rename the axis, annotate the parameters with axis names (nn.with_partitioning, "
            'nnx.with_partitioning), or give splits by path, rules={"*/kernel": PartitionSpec(...)}.',
        ),
        (
            {"fsdp": 7},
            "mesh axis 'fsdp': expected a size that divides an axis of a kernel, got 7; take another size, "
            "or widths that are multiples of it.",
        ),
        (
            {"tensor": 5},
            "mesh axis 'tensor': expected a size that divides a fan-out or fan-in of a hidden kernel, got 5; "
            "take another size, or widths that are multiples of it.",
        ),
    ],
)
def test_a_mesh_that_makes_no_sense(mesh, text):
    with pytest.raises(mujax.ConfigError) as error:
        read(mlp).partition(mesh)
    assert str(error.value) == text


# By annotations


def boxed(width):
    return mlp(width, kernel_init=nn.with_partitioning(LECUN, (None, ("data", "model"))))


def logical(width):
    return mlp(width, kernel_init=nn.with_logical_partitioning(LECUN, ("embed", "mlp")))


def test_boxes_are_obeyed_and_the_rest_is_replicated():
    specs = read(boxed).partition({"data": 2, "model": 4})
    assert specs["layers_0/kernel"] == specs["layers_2/kernel"] == P(None, ("data", "model"))
    assert specs["layers_3/kernel"] == specs["layers_0/bias"] == P()


def test_logical_names_go_by_rules_in_their_order():
    mup = read(logical)
    mesh = {"data": 2, "tensor": 4}
    rules = [("mlp", "tensor"), ("embed", "data")]
    assert mup.partition(mesh, rules)["layers_1/kernel"] == P("data", "tensor")
    # A mesh axis splits one axis of an array, that of the first rule.
    assert mup.partition(mesh, [("mlp", "data"), ("embed", "data")])["layers_1/kernel"] == P(None, "data")
    assert mup.partition(mesh, [("mlp", None), ("embed", "data")])["layers_1/kernel"] == P("data")
    with nn.logical_axis_rules(rules):
        inside = read(logical)
    assert inside.partition(mesh)["layers_1/kernel"] == P("data", "tensor")


def test_a_split_by_path_takes_the_place_of_annotations():
    for build in (mlp, boxed):
        specs = read(build).partition({"x": 4}, {"layers_1/*": P("x"), "*": P()})
        assert specs["layers_1/kernel"] == specs["layers_1/bias"] == P("x")
        assert specs["layers_2/kernel"] == P()


def test_metadata_of_nnx():
    def build(width):
        init = nnx.with_partitioning(LECUN, (None, "model"))

        class Net(nnx.Module):
            def __init__(self, rngs):
                self.up = nnx.Linear(6, width, kernel_init=init, rngs=rngs)
                self.down = nnx.Linear(width, 3, rngs=rngs)

            def __call__(self, x):
                return self.down(nnx.relu(self.up(x)))

        return lambda rngs: Net(rngs)

    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        specs = read(build).partition({"model": 4})
    assert specs == {"up/kernel": P(None, "model"), "up/bias": P(), "down/kernel": P(), "down/bias": P()}


@pytest.mark.parametrize(
    ("build", "mesh", "rules", "text"),
    [
        (
            boxed,
            {"data": 2},
            None,
            "layers_0/kernel: expected the model's axis names to be the mesh's, 'data', got 'model'; map "
            'logical names to axes of the mesh with rules=[("embed", "fsdp"), ...].',
        ),
        (
            logical,
            {"tensor": 2},
            [("mlp", "tensr"), ("embed", None)],
            "layers_0/kernel: expected the rules' axis names to be the mesh's, 'tensor', got 'tensr'; map "
            'logical names to axes of the mesh with rules=[("embed", "fsdp"), ...].',
        ),
        (
            logical,
            {"tensor": 2},
            [("mlp", "tensor")],
            "layers_0/kernel: expected the model's axis names to be the mesh's, 'tensor', got 'embed'; map "
            'logical names to axes of the mesh with rules=[("embed", "fsdp"), ...].',
        ),
        (
            boxed,
            {"data": 3, "model": 1},
            None,
            "layers_0/kernel: expected a multiple of 3 entries along axis 1, which data x model splits, "
            "got 32; take a width that the mesh divides, or another mesh.",
        ),
        (
            mlp,
            {"fsdp": 2},
            [("mlp", "fsdp")],
            "rules: expected a model that annotates its parameters with the names that the rules are about, "
            "got one without annotations; leave rules out: parameters are then split by roles and axes.",
        ),
        (mlp, {"fsdp": 2}, {"dense/*": P()}, "rules: expected globs that match parameters, got 'dense/*'."),
        (
            mlp,
            {"fsdp": 2},
            {"*/bias": P(None, "fsdp")},
            "layers_0/bias: expected axis names for the 1 axes of (32,), got (None, 'fsdp').",
        ),
    ],
)
def test_annotations_and_rules_that_fit_no_mesh(build, mesh, rules, text):
    with pytest.raises(mujax.MujaxError) as error:
        read(build).partition(mesh, rules)
    assert str(error.value) == text


# In words


def test_explain_shows_the_splits():
    mup = read(mlp)
    text = mup.explain(MESH)
    # The biases whole, the first and the last kernel in two parts, the hidden ones in eight.
    held = (3 * 32 + 10) + (6 * 32 + 32 * 10) // 2 + 2 * 32 * 32 // 8
    assert f"On 16 devices (data=2, fsdp=2, tensor=4) each holds {held} entries of the parameters" in text
    assert "split by roles and axes" in text
    rows = {row.split()[0]: row.split()[-1] for row in text.splitlines() if row.startswith("layers_")}
    assert rows["layers_1/kernel"] == "fsdp,tensor"
    assert rows["layers_2/kernel"] == "tensor,fsdp"
    assert rows["layers_0/bias"] == "replicated"
    assert "split over" not in mup.explain()
    text = read(boxed).explain({"data": 2, "model": 4})
    assert "as the model annotates its parameters" in text
    assert "-,data+model" in text
