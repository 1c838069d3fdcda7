"""Relative positions, the encoder-decoder and BERT against naive computations, published sizes and masks."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mujax.errors import ConfigError
from mujax.models import (
    Bert,
    BertConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    Transformer,
    TransformerConfig,
)
from mujax.models._encoder_decoder import sinusoids
from mujax.models._layers import Attention, causal_mask
from mujax.spec import leaf_path

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def shapes(module, *inputs):
    params = jax.eval_shape(module.init, KEY, *inputs)["params"]
    return {leaf_path(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(params)}


def random_params(module, *inputs, seed=1):
    rng = np.random.default_rng(seed)
    params = jax.eval_shape(module.init, KEY, *inputs)["params"]
    return jax.tree.map(lambda leaf: rng.normal(scale=0.5, size=leaf.shape).astype(leaf.dtype), params)


@functools.cache
def compiled(module):
    return jax.jit(module.apply)


def run(module, params, *inputs):
    return np.asarray(compiled(module)({"params": params}, *inputs))


def tokens(*shape, low=1, high=11):
    return np.random.default_rng(3).integers(low, high, shape, dtype=np.int32)


# Relative positions


@pytest.mark.parametrize("length", [1, 2, 7])
def test_relative_attention_is_the_naive_sum_over_all_pairs(length):
    N, K, H = heads = (4, 2, 3)
    attention = Attention(heads, max_distance=9)
    x = RNG.normal(size=(2, length, 12)).astype(np.float32)
    params = random_params(attention, x, causal_mask(length))
    q, k, v = (np.einsum("btd,dnh->btnh", x, params[name]["kernel"]) for name in ("query", "key", "value"))
    table = params["distance_embedding"]["embedding"]
    assert table.shape == (9, H)

    expected, without = np.zeros((2, 2, length, 12))
    for b, t, n in np.ndindex(2, length, N):
        for out, e in ((expected, table), (without, np.zeros_like(table))):
            keys = [k[b, s, n // (N // K)] + e[t - s] for s in range(t + 1)]
            weights = np.exp([q[b, t, n] @ key / math.sqrt(H) for key in keys])
            mixed = sum(w * v[b, s, n // (N // K)] for s, w in enumerate(weights / weights.sum()))
            out[b, t] += mixed @ params["out"]["kernel"][n]
    found = run(attention, params, x, causal_mask(length))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert length == 1 or not np.allclose(found, without, rtol=1e-2, atol=1e-2)


RELATIVE = TransformerConfig(
    d_model=16, n_layers=2, head_dim=4, max_len=12, vocab_size=11, relative_positions=True
)


def test_relative_positions_take_the_place_of_absolute_ones():
    absolute = shapes(Transformer(dataclasses.replace(RELATIVE, relative_positions=False)), tokens(2, 8))
    relative = shapes(Transformer(RELATIVE), tokens(2, 8))
    assert set(absolute) - set(relative) == {"position_embedding/embedding"}
    assert {path: relative[path] for path in set(relative) - set(absolute)} == {
        f"block_{i}/attention/distance_embedding/embedding": (12, 4) for i in range(2)
    }


def test_with_relative_positions_the_past_is_seen_in_its_order():
    model = Transformer(dataclasses.replace(RELATIVE, n_layers=1))
    text = tokens(1, 8)
    params = random_params(model, text)
    changed, swapped = text.copy(), text.copy()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    swapped[:, :2] = text[:, 1::-1]
    assert (text[:, 0] != text[:, 1]).all()
    plain, after, turned = (run(model, params, t) for t in (text, changed, swapped))
    np.testing.assert_array_equal(plain[:, :5], after[:, :5])
    assert (np.abs(plain - after)[:, 5:].max(axis=-1) > 1e-4).all()
    assert (np.abs(plain - turned)[:, 2:].max(axis=-1) > 1e-4).all()
    # The twin: without the distances one block sees the past, but not its order.
    blind = jax.tree.map_with_path(
        lambda path, leaf: np.zeros_like(leaf) if "distance" in leaf_path(path) else leaf, params
    )
    plain, turned = (run(model, blind, t) for t in (text, swapped))
    np.testing.assert_allclose(plain[:, 2:], turned[:, 2:], rtol=1e-4, atol=1e-4)


# Encoder-decoder

TRANSLATOR = EncoderDecoderConfig(d_model=16, n_layers=1, head_dim=4, vocab_size=11, max_len=12)


@pytest.fixture(scope="module")
def translator():
    model = EncoderDecoder(TRANSLATOR)
    return model, random_params(model, tokens(2, 6), tokens(2, 5))


@pytest.mark.parametrize("share_embeddings", [False, True])
def test_encoder_decoder_parameters(share_embeddings):
    config = dataclasses.replace(TRANSLATOR, n_layers=1, share_embeddings=share_embeddings, use_bias=False)
    found = shapes(EncoderDecoder(config), tokens(2, 6), tokens(2, 5))
    attention = {
        f"{block}/{name}/{layer}/kernel": (4, 4, 16) if layer == "out" else (16, 4, 4)
        for block, name in (
            ("encoder_0", "attention"),
            ("decoder_0", "attention"),
            ("decoder_0", "cross_attention"),
        )
        for layer in ("query", "key", "value", "out")
    }
    ff = {
        f"{block}/ff/{layer}/kernel": shape
        for block in ("encoder_0", "decoder_0")
        for layer, shape in (("up", (16, 64)), ("down", (64, 16)))
    }
    norms = (
        "encoder_0/attention_norm",
        "encoder_0/ff_norm",
        "decoder_0/attention_norm",
        "decoder_0/cross_attention_norm",
        "decoder_0/ff_norm",
        "encoder_norm",
        "decoder_norm",
    )
    shared = {"embedding/embedding": (11, 16)}
    apart = {
        "source_embedding/embedding": (11, 16),
        "target_embedding/embedding": (11, 16),
        "readout/kernel": (16, 11),
    }
    expected = attention | ff | {f"{norm}/scale": (16,) for norm in norms}
    assert found == expected | (shared if share_embeddings else apart)


def test_encoder_decoder_has_the_size_of_the_base_transformer():
    """Vaswani et al., Table 3: 65 million; norms after each stack as well, 37,000 tokens."""
    found = shapes(
        EncoderDecoder(EncoderDecoderConfig(n_heads=8, vocab_size=37_000)), tokens(1, 4), tokens(1, 4)
    )
    # By hand: 4 d² + 4 d an attention, 8 d² + 5 d a feed-forward, 2 d a norm.
    d = 512
    attention, ff, norm = 4 * d**2 + 4 * d, 8 * d**2 + 5 * d, 2 * d
    expected = 37_000 * d + 6 * (3 * attention + 2 * ff + 5 * norm) + 2 * norm
    assert sum(math.prod(shape) for shape in found.values()) == expected
    assert 60e6 < expected < 66e6


def test_padding_of_the_source_changes_nothing(translator):
    model, params = translator
    source, target = tokens(2, 6), tokens(2, 5)
    padded = np.concatenate([source, np.zeros((2, 4), np.int32)], axis=1)
    expected = run(model, params, source, target)
    np.testing.assert_allclose(run(model, params, padded, target), expected, rtol=1e-4, atol=1e-5)
    # The twin: another token in the same places does.
    filled = np.concatenate([source, np.full((2, 4), 5, np.int32)], axis=1)
    assert not np.allclose(run(model, params, filled, target), expected, atol=1e-2)


def test_the_decoder_sees_the_past_and_all_of_the_source(translator):
    model, params = translator
    source, target = tokens(2, 6), tokens(2, 5)
    expected = run(model, params, source, target)
    changed = target.copy()
    changed[:, 3] = changed[:, 3] % 10 + 1
    after = run(model, params, source, changed)
    np.testing.assert_array_equal(expected[:, :3], after[:, :3])
    assert (np.abs(expected - after)[:, 3:].max(axis=-1) > 1e-4).all()
    for position in range(6):
        changed = source.copy()
        changed[:, position] = changed[:, position] % 10 + 1
        assert (np.abs(expected - run(model, params, changed, target)).max(axis=-1) > 1e-4).all()


def test_sinusoids():
    found = sinusoids(9, 6)
    for t in range(9):
        for i in range(3):
            angle = t / 10_000 ** (2 * i / 6)
            np.testing.assert_allclose(found[t, i], math.sin(angle), atol=1e-5)
            np.testing.assert_allclose(found[t, 3 + i], math.cos(angle), atol=1e-5)


def test_shared_embeddings_are_one_table_in_three_places(translator):
    model, params = translator
    apart = EncoderDecoder(dataclasses.replace(TRANSLATOR, share_embeddings=False))
    table = params["embedding"]["embedding"]
    rest = {name: leaf for name, leaf in params.items() if name != "embedding"}
    tables = {f"{side}_embedding": {"embedding": table} for side in ("source", "target")}
    inputs = tokens(2, 6), tokens(2, 5)
    expected = run(apart, {**rest, **tables, "readout": {"kernel": table.T}}, *inputs)
    np.testing.assert_allclose(run(model, params, *inputs), expected, rtol=1e-4, atol=1e-4)


# BERT


@pytest.mark.parametrize(
    ("config", "count"),
    [
        # BertForMaskedLM of transformers, bert-base-uncased and bert-large-uncased.
        (BertConfig(), 109_514_298),
        (BertConfig(d_model=1024, n_layers=24), 335_174_458),
    ],
)
def test_bert_has_the_published_size(config, count):
    assert sum(math.prod(shape) for shape in shapes(Bert(config), tokens(1, 4)).values()) == count


SMALL = BertConfig(d_model=16, n_layers=1, head_dim=4, vocab_size=11, max_len=9)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def norm(x, params):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return scaled * params["scale"] + params["bias"]


def dense(x, params):
    return x @ params["kernel"] + params["bias"]


def test_bert_computes_what_it_says():
    model = Bert(SMALL)
    text, types = tokens(2, 7), tokens(2, 7, low=0, high=2)
    text[1, 4:] = 0
    params = random_params(model, text, types)
    block = params["block_0"]
    x = (
        params["token_embedding"]["embedding"][text]
        + params["position_embedding"]["embedding"][:7]
        + params["type_embedding"]["embedding"][types]
    )
    x = norm(x, params["embedding_norm"])
    reference = nn.MultiHeadDotProductAttention(num_heads=4)
    seen = (text != 0)[:, None, None]
    y = jax.jit(reference.apply)({"params": block["attention"]}, x, mask=seen)
    x = norm(x + np.asarray(y), block["attention_norm"])
    x = norm(x + dense(gelu(dense(x, block["ff"]["up"])), block["ff"]["down"]), block["ff_norm"])
    x = norm(gelu(dense(x, params["head"])), params["head_norm"])
    expected = x @ params["token_embedding"]["embedding"].T + params["head_bias"]
    np.testing.assert_allclose(run(model, params, text, types), expected, rtol=1e-3, atol=1e-3)
    first = run(model, params, text)
    np.testing.assert_allclose(first, run(model, params, text, np.zeros_like(types)), rtol=1e-5, atol=1e-5)
    assert not np.allclose(first, expected, atol=1e-2)


def test_bert_sees_both_sides_and_no_padding():
    model = Bert(SMALL)
    text = tokens(2, 7)
    params = random_params(model, text)
    expected = run(model, params, text)
    padded = np.concatenate([text, np.zeros((2, 2), np.int32)], axis=1)
    np.testing.assert_allclose(run(model, params, padded)[:, :7], expected, rtol=1e-3, atol=1e-4)
    unmasked = Bert(dataclasses.replace(SMALL, pad=None))
    assert not np.allclose(run(unmasked, params, padded)[:, :7], expected, atol=1e-2)
    for position in (0, 6):
        changed = text.copy()
        changed[:, position] = changed[:, position] % 10 + 1
        assert (np.abs(run(model, params, changed) - expected).max(axis=-1) > 1e-4).all()


def test_bert_starts_at_two_hundredths():
    model = Bert(dataclasses.replace(SMALL, d_model=128, vocab_size=500))
    params = jax.jit(model.init)(KEY, tokens(1, 4))["params"]
    for leaf in (
        params["block_0"]["ff"]["up"]["kernel"],
        params["block_0"]["attention"]["query"]["kernel"],
        params["head"]["kernel"],
        params["token_embedding"]["embedding"],
    ):
        # A normal distribution cut off at 2σ has 0.88 of its deviation.
        assert np.std(leaf) == pytest.approx(0.02 * 0.8796, rel=0.02)
        assert np.abs(leaf).max() <= 0.04


def test_without_kinds_there_is_no_embedding_of_them():
    with_kinds, without = (shapes(Bert(dataclasses.replace(SMALL, n_types=n)), tokens(1, 4)) for n in (2, 0))
    assert set(with_kinds) - set(without) == {"type_embedding/embedding"}
    assert set(without) < set(with_kinds)


# All of them


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (EncoderDecoder(dataclasses.replace(TRANSLATOR, dropout=0.3)), (tokens(2, 6), tokens(2, 5))),
        (Bert(dataclasses.replace(SMALL, dropout=0.3)), (tokens(2, 7),)),
    ],
    ids=["encoder-decoder", "bert"],
)
def test_dropout_acts_in_training_only(module, inputs):
    params = random_params(module, *inputs)
    apply = jax.jit(module.apply, static_argnames="train")

    def draw(seed, train=True):
        return apply({"params": params}, *inputs, train=train, rngs={"dropout": jax.random.key(seed)})

    plain = type(module)(dataclasses.replace(module.config, dropout=0.0))
    np.testing.assert_allclose(draw(0, train=False), run(plain, params, *inputs), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(draw(0), draw(0))
    assert not np.allclose(draw(0), draw(1), atol=1e-3)
    assert not np.allclose(draw(0), draw(0, train=False), atol=1e-3)


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (Transformer(dataclasses.replace(RELATIVE, dtype=jnp.bfloat16)), (tokens(2, 7),)),
        (EncoderDecoder(dataclasses.replace(TRANSLATOR, dtype=jnp.bfloat16)), (tokens(2, 6), tokens(2, 5))),
        (Bert(dataclasses.replace(SMALL, dtype=jnp.bfloat16)), (tokens(2, 7),)),
    ],
    ids=["relative", "encoder-decoder", "bert"],
)
def test_bfloat16_computation_keeps_float32_parameters_and_logits(module, inputs):
    variables = jax.eval_shape(module.init, KEY, *inputs)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    program = jax.make_jaxpr(module.apply)(variables, *inputs)
    assert [out.dtype for out in program.out_avals] == [jnp.float32]
    products = [line for line in str(program).splitlines() if " = dot_general[" in line]
    assert products
    assert all(":bf16[" in line for line in products)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (
            lambda: EncoderDecoderConfig(n_layers=0),
            "EncoderDecoderConfig.n_layers: expected at least 1, got 0.",
        ),
        (
            lambda: EncoderDecoderConfig(d_model=9, n_heads=3),
            "EncoderDecoderConfig.d_model: expected an even number, "
            "for a sine and a cosine of each frequency, got 9.",
        ),
        (
            lambda: EncoderDecoderConfig(vocab_size=4, pad=4),
            "EncoderDecoderConfig.pad: expected one of the 4 tokens, got 4.",
        ),
        (
            lambda: EncoderDecoder(dataclasses.replace(TRANSLATOR, max_len=5)).init(
                KEY, tokens(1, 6), tokens(1, 5)
            ),
            "EncoderDecoder: expected at most max_len=5 tokens, got 6; "
            "shorten the sequence or raise EncoderDecoderConfig.max_len.",
        ),
        (
            lambda: BertConfig(d_model=100),
            "BertConfig.head_dim: expected a divisor of d_model=100, got 64; "
            "give both n_heads and head_dim if n_heads × head_dim is to differ from d_model.",
        ),
        (lambda: BertConfig(n_types=-1), "BertConfig.n_types: expected 0 or more, got -1."),
        (lambda: BertConfig(init_std=0.0), "BertConfig.init_std: expected a number above 0, got 0.0."),
        (
            lambda: BertConfig(vocab_size=4, pad=-1),
            "BertConfig.pad: expected None or one of the 4 tokens, got -1.",
        ),
        (
            lambda: Bert(dataclasses.replace(SMALL, n_types=0)).init(KEY, tokens(1, 5), tokens(1, 5)),
            "Bert: expected no kinds of tokens, n_types being 0, got types_BxT; "
            "leave them out or raise BertConfig.n_types.",
        ),
    ],
)
def test_bad_sizes(build, text):
    with pytest.raises(ConfigError) as error:
        build()
    assert str(error.value) == text
