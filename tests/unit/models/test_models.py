"""The built-in models against independent references: Flax's own layers, published sizes, closed forms."""

import ast
import dataclasses
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import mujax.models
from mujax.errors import ConfigError
from mujax.models import (
    BUILD,
    MLP,
    MLPConfig,
    ResNet,
    ResNet9,
    ResNet9Config,
    ResNetConfig,
    Transformer,
    TransformerConfig,
)
from mujax.models._layers import Attention, causal_mask
from mujax.spec import leaf_path

KEY = jax.random.key(0)


def shapes(params):
    return {leaf_path(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(params)}


def n_params(module, *inputs):
    params = jax.eval_shape(module.init, KEY, *inputs)["params"]
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def abstract(module, *inputs):
    return jax.eval_shape(module.init, KEY, *inputs)["params"]


def random_params(module, *inputs, seed=1):
    """Random values in every leaf, so that a bias or gain left out can't hide behind zeros and ones."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(scale=0.5, size=leaf.shape).astype(leaf.dtype), abstract(module, *inputs)
    )


def run(module, params, *inputs):
    return np.asarray(jax.jit(module.apply)({"params": params}, *inputs))


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


# MLP


def test_mlp_is_the_784_w_w_10_of_the_demo():
    params = abstract(MLP(MLPConfig(width=64)), jnp.zeros((1, 784)))
    assert shapes(params) == {
        "hidden_0/kernel": (784, 64),
        "hidden_1/kernel": (64, 64),
        "readout/kernel": (64, 10),
    }


def test_mlp_depth_and_bias():
    params = abstract(MLP(MLPConfig(width=8, depth=3, n_classes=4, use_bias=True)), jnp.zeros((1, 5)))
    assert shapes(params) == {
        "hidden_0/bias": (8,),
        "hidden_0/kernel": (5, 8),
        "hidden_1/bias": (8,),
        "hidden_1/kernel": (8, 8),
        "hidden_2/bias": (8,),
        "hidden_2/kernel": (8, 8),
        "readout/bias": (4,),
        "readout/kernel": (8, 4),
    }


def test_mlp_computes_what_it_says():
    x = normal(3, 2, 2, 1)
    model = MLP(MLPConfig(width=8, use_bias=True, activation=jnp.tanh))
    params = random_params(model, x)
    h = x.reshape(3, 4)
    for name in ("hidden_0", "hidden_1"):
        h = np.tanh(h @ params[name]["kernel"] + params[name]["bias"])
    expected = h @ params["readout"]["kernel"] + params["readout"]["bias"]
    np.testing.assert_allclose(run(model, params, x), expected, rtol=1e-5, atol=1e-6)


def test_mlp_kernels_start_at_variance_one_over_fan_in():
    params = jax.jit(MLP(MLPConfig(width=1024)).init)(KEY, jnp.zeros((1, 784)))["params"]
    for layer, fan_in in (("hidden_0", 784), ("hidden_1", 1024), ("readout", 1024)):
        assert np.std(params[layer]["kernel"]) * math.sqrt(fan_in) == pytest.approx(1, rel=0.03)


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (MLP(MLPConfig(width=8, zero_readout=True)), jnp.zeros((1, 4))),
        (
            Transformer(TransformerConfig(d_model=8, n_layers=1, zero_readout=True)),
            jnp.zeros((1, 4), jnp.int32),
        ),
        (ResNet(ResNetConfig((1,), (8,), zero_readout=True)), jnp.zeros((1, 4, 4, 3))),
        (ResNet9(ResNet9Config(1 / 16, zero_readout=True)), jnp.zeros((1, 8, 8, 3))),
    ],
)
def test_zero_readout_starts_only_the_readout_at_zero(module, inputs):
    params = jax.jit(module.init)(KEY, inputs)["params"]
    zero = {leaf_path(path) for path, leaf in jax.tree.leaves_with_path(params) if not leaf.any()}
    assert "readout/kernel" in zero
    assert not any(path.endswith("kernel") for path in zero - {"readout/kernel"})


# Transformer

TINY = TransformerConfig(d_model=16, n_layers=2, head_dim=4, max_len=12, vocab_size=11)
TOKENS = jnp.asarray(np.random.default_rng(3).integers(0, 11, (2, 8), dtype=np.int32))


def transformer(**changes):
    model = Transformer(dataclasses.replace(TINY, **changes))
    return model, random_params(model, TOKENS)


def test_transformer_parameters():
    model = Transformer(dataclasses.replace(TINY, n_layers=1, use_bias=True))
    assert shapes(abstract(model, TOKENS)) == {
        "block_0/attention/key/bias": (4, 4),
        "block_0/attention/key/kernel": (16, 4, 4),
        "block_0/attention/out/bias": (16,),
        "block_0/attention/out/kernel": (4, 4, 16),
        "block_0/attention/query/bias": (4, 4),
        "block_0/attention/query/kernel": (16, 4, 4),
        "block_0/attention/value/bias": (4, 4),
        "block_0/attention/value/kernel": (16, 4, 4),
        "block_0/attention_norm/bias": (16,),
        "block_0/attention_norm/scale": (16,),
        "block_0/ff/down/bias": (16,),
        "block_0/ff/down/kernel": (64, 16),
        "block_0/ff/up/bias": (64,),
        "block_0/ff/up/kernel": (16, 64),
        "block_0/ff_norm/bias": (16,),
        "block_0/ff_norm/scale": (16,),
        "final_norm/bias": (16,),
        "final_norm/scale": (16,),
        "position_embedding/embedding": (12, 16),
        "readout/kernel": (16, 11),
        "token_embedding/embedding": (11, 16),
    }


def test_transformer_has_the_size_of_gpt2():
    config = TransformerConfig(
        d_model=768,
        n_layers=12,
        head_dim=64,
        vocab_size=50257,
        max_len=1024,
        tie_embeddings=True,
        use_bias=True,
    )
    # The published 124M checkpoint.
    assert n_params(Transformer(config), jax.ShapeDtypeStruct((1, 8), jnp.int32)) == 124_439_808


@pytest.mark.parametrize("use_bias", [False, True])
def test_attention_agrees_with_flax(use_bias):
    attention = Attention(TINY.heads, use_bias=use_bias)
    x, own_and_before, everything = normal(2, 8, 16), causal_mask(8), np.ones((1, 1, 8), bool)
    reference = nn.MultiHeadDotProductAttention(num_heads=4, use_bias=use_bias)
    causal = nn.make_causal_mask(jnp.zeros((2, 8)))
    params = random_params(reference, x)
    expected = jax.jit(reference.apply)({"params": params}, x, mask=causal)
    out = run(attention, params, x, own_and_before)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    unmasked = run(reference, params, x)
    np.testing.assert_allclose(run(attention, params, x, everything), unmasked, rtol=1e-4, atol=1e-5)
    assert not np.allclose(out, unmasked, rtol=1e-2, atol=1e-2)


def test_attention_to_something_else_agrees_with_flax():
    x, memory, mask = (
        normal(2, 8, 16),
        normal(2, 5, 12),
        np.array([[[1, 1, 1, 1, 0]], [[1, 0, 1, 0, 0]]], bool),
    )
    reference = nn.MultiHeadDotProductAttention(num_heads=4, use_bias=False)
    params = random_params(reference, x, memory)
    expected = jax.jit(reference.apply)({"params": params}, x, memory, mask=mask[:, None])
    out = run(Attention(TINY.heads), params, x, mask, memory)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    other = run(Attention(TINY.heads), params, x, np.ones_like(mask), memory)
    assert not np.allclose(out, other, rtol=1e-2, atol=1e-2)


def test_grouped_attention_is_full_attention_with_shared_keys_and_values():
    x, mask, full = normal(2, 8, 16), causal_mask(8), Attention(TINY.heads)
    grouped = Attention(dataclasses.replace(TINY, n_kv_heads=2).heads)
    params = random_params(grouped, x, mask)
    assert params["key"]["kernel"].shape == params["value"]["kernel"].shape == (16, 2, 4)
    repeated = {
        **params,
        **{name: {"kernel": np.repeat(params[name]["kernel"], 2, axis=1)} for name in ("key", "value")},
    }
    tiled = {
        **params,
        **{name: {"kernel": np.tile(params[name]["kernel"], (1, 2, 1))} for name in ("key", "value")},
    }
    out = run(grouped, params, x, mask)
    np.testing.assert_allclose(out, run(full, repeated, x, mask), rtol=1e-4, atol=1e-5)
    assert not np.allclose(out, run(full, tiled, x, mask), rtol=1e-2, atol=1e-2)


def test_transformer_sees_the_past_only():
    model, params = transformer()
    changed = np.array(TOKENS)
    changed[:, 4] = (changed[:, 4] + 1) % 11
    before, after = (run(model, params, tokens) for tokens in (TOKENS, changed))
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert (np.abs(before - after)[:, 4:].max(axis=-1) > 1e-4).all()


def test_transformer_knows_positions():
    model, params = transformer()
    logits = run(model, params, np.zeros((1, 8), np.int32))
    assert not np.allclose(logits[:, 0], logits[:, 1], atol=1e-3)
    params = {**params, "position_embedding": jax.tree.map(jnp.zeros_like, params["position_embedding"])}
    logits = run(model, params, np.zeros((1, 8), np.int32))
    np.testing.assert_allclose(logits[:, 0], logits[:, 1], rtol=1e-4, atol=1e-5)


def test_tied_readout_is_the_embedding():
    untied, params = transformer()
    tied, tied_params = transformer(tie_embeddings=True)
    assert set(params) - set(tied_params) == {"readout"}
    shared = {name: params[name] for name in tied_params}
    readout = {"readout": {"kernel": params["token_embedding"]["embedding"].T}}
    np.testing.assert_allclose(
        run(tied, shared, TOKENS),
        run(untied, {**shared, **readout}, TOKENS),
        rtol=1e-4,
        atol=1e-5,
    )


def loss_and_grad(model, params):
    return jax.jit(
        jax.value_and_grad(lambda params: jnp.square(model.apply({"params": params}, TOKENS)).mean())
    )(params)


@pytest.mark.parametrize(
    "changes", [{"scan_layers": True}, {"remat": True}, {"scan_layers": True, "remat": True}]
)
def test_scan_and_remat_change_nothing_but_the_layout(changes):
    plain, params = transformer()
    other = Transformer(dataclasses.replace(TINY, **changes))
    blocks = {name for name in params if name.startswith("block_")}

    def restack(tree):
        if "scan_layers" not in changes:
            return tree
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(tree[name] for name in sorted(blocks)))
        return {**{name: tree[name] for name in set(tree) - blocks}, "blocks": stacked}

    assert shapes(abstract(other, TOKENS)) == shapes(restack(params))
    value, grads = loss_and_grad(plain, params)
    other_value, other_grads = loss_and_grad(other, restack(params))
    np.testing.assert_allclose(other_value, value, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), other_grads, restack(grads)
    )


def test_scan_and_remat_are_in_the_program():
    def primitives(**changes):
        model, params = transformer(**changes)
        program = jax.make_jaxpr(lambda params: model.apply({"params": params}, TOKENS))(params)
        return {equation.primitive.name for equation in program.eqns}

    assert not primitives() & {"scan", "remat2", "checkpoint", "remat"}
    assert "scan" in primitives(scan_layers=True)
    assert primitives(remat=True) & {"remat2", "checkpoint", "remat"}


def test_scanned_layers_start_different():
    model = Transformer(dataclasses.replace(TINY, scan_layers=True))
    kernel = jax.jit(model.init)(KEY, TOKENS)["params"]["blocks"]["ff"]["up"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1])


@pytest.mark.parametrize("scan_layers", [False, True])
def test_dropout_acts_in_training_only(scan_layers):
    model, params = transformer(dropout=0.3, scan_layers=scan_layers)
    plain, _ = transformer(scan_layers=scan_layers)
    apply = jax.jit(model.apply, static_argnames="train")

    def draw(seed, train=True):
        return apply({"params": params}, TOKENS, train=train, rngs={"dropout": jax.random.key(seed)})

    np.testing.assert_allclose(draw(0, train=False), run(plain, params, TOKENS), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(draw(0), draw(0))
    assert not np.allclose(draw(0), draw(1), atol=1e-3)
    assert not np.allclose(draw(0), draw(0, train=False), atol=1e-3)


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (MLP(MLPConfig(width=8, dtype=jnp.bfloat16)), jnp.zeros((1, 4))),
        (Transformer(dataclasses.replace(TINY, dtype=jnp.bfloat16)), TOKENS),
        (Transformer(dataclasses.replace(TINY, dtype=jnp.bfloat16, scan_layers=True)), TOKENS),
        (ResNet(ResNetConfig((1,), (8,), dtype=jnp.bfloat16)), jnp.zeros((1, 4, 4, 3))),
    ],
    ids=["mlp", "transformer", "scanned transformer", "resnet"],
)
def test_bfloat16_computation_keeps_float32_parameters_and_logits(module, inputs):
    variables = jax.eval_shape(module.init, KEY, inputs)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    program = jax.make_jaxpr(module.apply)(variables, inputs)
    assert [out.dtype for out in program.out_avals] == [jnp.float32]
    products = [
        line for line in str(program).splitlines() if " = dot_general[" in line or " = conv_gen" in line
    ]
    assert products
    assert all(":bf16[" in line for line in products)


@pytest.mark.parametrize(
    ("sizes", "heads"),
    [
        ({"d_model": 64}, (4, 4, 16)),
        ({"d_model": 64, "n_heads": 8}, (8, 8, 8)),
        ({"d_model": 64, "head_dim": 32}, (2, 2, 32)),
        ({"d_model": 64, "n_heads": 3, "head_dim": 32, "n_kv_heads": 1}, (3, 1, 32)),
    ],
)
def test_heads_follow_from_either_size(sizes, heads):
    assert TransformerConfig(**sizes).heads == heads


# ResNet

IMAGES = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        # torchvision's resnet18, resnet34, resnet50 and resnet101.
        (ResNetConfig(stem="imagenet", n_classes=1000), 11_689_512),
        (ResNetConfig((3, 4, 6, 3), stem="imagenet", n_classes=1000), 21_797_672),
        (ResNetConfig((3, 4, 6, 3), block="bottleneck", stem="imagenet", n_classes=1000), 25_557_032),
        (ResNetConfig((3, 4, 23, 3), block="bottleneck", stem="imagenet", n_classes=1000), 44_549_160),
        # kuangliu/pytorch-cifar's ResNet18; its PreActResNet18 lacks the 2 × 512 of the paper's last norm.
        (ResNetConfig(), 11_173_962),
        (ResNetConfig(pre_activation=True), 11_171_146 + 1024),
    ],
)
def test_resnet_has_the_published_size(config, count):
    assert n_params(ResNet(config), IMAGES) == count


@pytest.mark.parametrize("pre_activation", [False, True])
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize(("stem", "sides"), [("cifar", (32, 16)), ("imagenet", (8, 4))])
def test_resnet_halves_the_image_from_stage_to_stage(pre_activation, block, stem, sides):
    config = ResNetConfig((1, 2), (8, 16), pre_activation=pre_activation, block=block, stem=stem)
    expansion = 4 if block == "bottleneck" else 1

    def outputs(key):
        model = ResNet(config)
        images = jnp.zeros(IMAGES.shape)
        return model.init_with_output(key, images, capture_intermediates=True, mutable=True)

    logits, variables = jax.eval_shape(outputs, KEY)
    assert logits.shape == (1, 10)
    stages = [variables["intermediates"][f"stage_{i}_block_0"]["__call__"][0].shape for i in range(2)]
    assert stages == [(1, side, side, 8 * 2**i * expansion) for i, side in enumerate(sides)]


def test_width_multiplier_widens_every_stage():
    narrow, wide = (
        shapes(jax.eval_shape(ResNet(ResNetConfig(width_multiplier=m)).init, KEY, IMAGES)["params"])
        for m in (0.25, 1.25)
    )
    ratios = {tuple(w / n for w, n in zip(wide[path], narrow[path], strict=True)) for path in narrow}
    assert ratios == {(1, 1, 1, 5), (1, 1, 5, 5), (5,), (5, 1), (1,)}


def block_reference(x, params, pre_activation):
    """One basic block of stride 1, by SciPy-free sums, on batch statistics."""

    def conv(x, kernel):
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        h, w = x.shape[1:3]
        return sum(padded[:, i : i + h, j : j + w] @ kernel[i, j] for i in range(3) for j in range(3))

    def norm(x, gain):
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        return (x - mean) / np.sqrt(var + 1e-5) * gain["scale"] + gain["bias"]

    def relu(x):
        return np.maximum(x, 0)

    kernels = [params[f"conv_{i}"]["kernel"] for i in range(2)]
    gains = [params[f"norm_{i}"] for i in range(2)]
    if pre_activation:
        y = conv(relu(norm(x, gains[0])), kernels[0])
        return x + conv(relu(norm(y, gains[1])), kernels[1])
    y = relu(norm(conv(x, kernels[0]), gains[0]))
    return relu(x + norm(conv(y, kernels[1]), gains[1]))


@pytest.mark.parametrize("pre_activation", [False, True])
def test_residual_block_computes_what_it_says(pre_activation):
    model = ResNet(ResNetConfig((1,), (4,), pre_activation=pre_activation))
    x = normal(2, 6, 6, 3)
    params = random_params(model, x)
    train = functools.partial(model.apply, train=True, mutable=True, capture_intermediates=True)
    batch_stats = jax.eval_shape(model.init, KEY, x)["batch_stats"]
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), batch_stats)
    _, updates = jax.jit(train)({"params": params, "batch_stats": zeros}, x)
    seen = updates["intermediates"]
    x_in = seen["stem_conv" if pre_activation else "stem_norm"]["__call__"][0]
    x_in = np.asarray(x_in if pre_activation else nn.relu(x_in), np.float64)
    out = seen["stage_0_block_0"]["__call__"][0]
    expected, other = (
        block_reference(x_in, params["stage_0_block_0"], p) for p in (pre_activation, not pre_activation)
    )
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-4)
    assert not np.allclose(out, other, rtol=1e-2, atol=1e-2)


def test_batch_statistics_move_in_training_only():
    model = ResNet(ResNetConfig((1,), (8,)))
    x = 2 + normal(4, 8, 8, 3)
    variables = jax.jit(model.init)(KEY, x)
    apply = jax.jit(functools.partial(model.apply, mutable=["batch_stats"]), static_argnames="train")
    _, updates = apply(variables, x, train=True)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), variables["batch_stats"], updates["batch_stats"])
    assert all(jax.tree.leaves(moved))
    _, kept = apply(variables, x, train=False)
    jax.tree.map(np.testing.assert_array_equal, kept["batch_stats"], variables["batch_stats"])


# Configs and the registry


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: MLPConfig(width=0), "MLPConfig.width: expected at least 1, got 0."),
        (lambda: TransformerConfig(n_layers=0), "TransformerConfig.n_layers: expected at least 1, got 0."),
        (
            lambda: TransformerConfig(dropout=1.0),
            "TransformerConfig.dropout: expected a rate from 0 up to 1, 1 excluded, got 1.0.",
        ),
        (
            lambda: TransformerConfig(d_model=30),
            "TransformerConfig.n_heads: expected a divisor of d_model=30, got 4; "
            "give both n_heads and head_dim if n_heads × head_dim is to differ from d_model.",
        ),
        (
            lambda: TransformerConfig(d_model=32, head_dim=12),
            "TransformerConfig.head_dim: expected a divisor of d_model=32, got 12; "
            "give both n_heads and head_dim if n_heads × head_dim is to differ from d_model.",
        ),
        (
            lambda: TransformerConfig(d_model=32, n_heads=4, n_kv_heads=3),
            "TransformerConfig.n_kv_heads: expected a divisor of the 4 query heads, got 3.",
        ),
        (
            lambda: Transformer(TransformerConfig(d_model=8, max_len=4)).init(
                KEY, jnp.zeros((1, 5), jnp.int32)
            ),
            "Transformer: expected at most max_len=4 tokens, got 5; "
            "shorten the sequence or raise TransformerConfig.max_len.",
        ),
        (
            lambda: ResNetConfig(block="wide"),
            "ResNetConfig.block: expected 'basic' or 'bottleneck', got 'wide'.",
        ),
        (
            lambda: ResNetConfig(stem="mnist"),
            "ResNetConfig.stem: expected 'cifar' or 'imagenet', got 'mnist'.",
        ),
        (
            lambda: ResNetConfig(stage_sizes=(1, 1)),
            "ResNetConfig.stage_widths: expected one width for each entry of stage_sizes=(1, 1), "
            "got (64, 128, 256, 512).",
        ),
        (
            lambda: ResNetConfig(stage_sizes=(0,), stage_widths=(8,)),
            "ResNetConfig: expected stage_sizes and n_classes of at least 1, got (0,) and 10.",
        ),
        (
            lambda: ResNetConfig(width_multiplier=0.3),
            "ResNetConfig.width_multiplier: expected 0.3 × 64 channels to be a whole number, got 19.2; "
            "choose a multiplier that divides evenly.",
        ),
    ],
)
def test_bad_sizes(build, text):
    with pytest.raises(ConfigError) as error:
        build()
    assert str(error.value) == text


@pytest.mark.parametrize("name", sorted(BUILD))
def test_registry_widens_nothing_but_widths(name):
    def traced(width):
        module, inputs = BUILD[name](width)
        assert hash(module) == hash(BUILD[name](width)[0])
        return shapes(jax.eval_shape(module.init, KEY, *inputs)["params"]), inputs

    (base, base_inputs), (target, target_inputs) = traced(16), traced(48)
    assert base_inputs == target_inputs
    assert list(base) == list(target)
    ratios = {t / b for path in base for t, b in zip(target[path], base[path], strict=True)}
    assert ratios == {1, 3}


def test_models_know_nothing_of_mup():
    folder = pathlib.Path(mujax.models.__file__).parent
    imported = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module)
    own = {name for name in imported if name.startswith("mujax") and not name.startswith("mujax.models")}
    assert own == {"mujax.errors"}
