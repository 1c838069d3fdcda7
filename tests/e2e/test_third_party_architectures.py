"""µP on further kinds of models that nobody prepared, each exactly as published.

Needs the extra `thirdparty`: Hugging Face's Flax ALBERT (one layer that is used three times), mBART, Whisper,
Wav2Vec2, RegNet and T5; a mixture of experts (nano-moe-jax, Linen), graph networks (jraphx, NNX), state-space
models (Mamba 2 and 3, NNX) and a Fourier neural operator (neojax, Equinox, through `mujax.Functional`).
Every parameter's role, axes, ratios and initial values are asserted, every factor and every finding, and the
sizes of all activations at initialisation are measured at two widths. Nothing is downloaded.
"""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import functools
import importlib
import linecache
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mujax
from mujax import rules
from mujax.check._taps import Tap, downstream, find_taps, mixing_sites

third_party = pytest.importorskip("test_third_party", exc_type=ImportError)
Row, vector, embedding, hidden, scaled_hidden, readout, FINITE = (
    getattr(third_party, name)
    for name in ("Row", "vector", "embedding", "hidden", "scaled_hidden", "readout", "FINITE")
)

VOCAB, BATCH, LENGTH, LABELS = 11, 2, 6, 5
RNG = np.random.default_rng(0)
IDS = jnp.asarray(RNG.integers(3, VOCAB, (BATCH, LENGTH)), "int32")
MASK = jnp.ones((BATCH, LENGTH), "int32").at[1, -2:].set(0)
POSITIONS = jnp.broadcast_to(jnp.arange(LENGTH, dtype="int32"), (BATCH, LENGTH))


def real(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), "float32")


# ---- what is expected ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Widths:
    """Base widths times ratios of their own, so that no axis can be taken for another.

    Attributes:
        features: of the stream, 16 in the base.
        inner: of what a layer widens to, or narrows to, 32 in the base.
        heads: heads, 2 in the base.
    """

    features: int = 1
    inner: int = 1
    heads: int = 1

    @property
    def width(self) -> int:
        return 16 * self.features

    @property
    def wide(self) -> int:
        return 32 * self.inner

    @property
    def head_count(self) -> int:
        return 2 * self.heads


BASE, TARGET = Widths(), Widths(3, 2, 2)
# With 2 heads of 8 in the base and 4 of 12 in the target.
HEAD_SIZE = 1.5
# For the sizes of activations: heads of 4 times the size.
WIDER = Widths(4, 4)


@dataclasses.dataclass(frozen=True)
class Model:
    """A published model.

    Attributes:
        build: makes the model at the given widths.
        inputs: a batch.
        rows: what each parameter is expected to be between `BASE` and `TARGET`, by glob of paths.
        factors: (kind, factor, what stands in the line that it names) -> how often.
        findings: (kind, what stands in the line) -> in how many places.
        kwargs: of the call.
    """

    build: Callable[[Widths], Any]
    inputs: tuple[Any, ...]
    rows: Mapping[str, Any]
    factors: Mapping[tuple[str, float, str], int]
    findings: Mapping[tuple[str, str], int] = dataclasses.field(default_factory=dict)
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def wrap(self, target: Widths, **kwargs: Any) -> mujax.MupModel:
        return mujax.mup_init(self.build(target), self.build(BASE), *self.inputs, **self.kwargs, **kwargs)

    def row(self, path: str) -> Any:
        found = [row for glob, row in self.rows.items() if fnmatch.fnmatchcase(path, glob)]
        assert len(found) == 1, f"{path} is in {len(found)} rows"
        return found[0]


def flax_module(name: str, cls: str) -> Any:
    return getattr(importlib.import_module(f"transformers.models.{name}.modeling_flax_{name}"), cls)


def config(name: str, cls: str, **kwargs: Any) -> Any:
    return getattr(importlib.import_module(f"transformers.models.{name}.configuration_{name}"), cls)(**kwargs)


def conv(r_in: float, r_out: float, init: float) -> Any:
    """A kernel of height, width, fan-in and fan-out."""
    return Row("hidden", (0, 1, 2), (3,), r_in, r_out, init)


@dataclasses.dataclass(frozen=True)
class Stacked(third_party.Row):
    """A kernel for each entry along some axes.

    Attributes:
        stack: these axes.
    """

    stack: tuple[int, ...] = ()


def flipped(row: Any, *more: int) -> Any:
    """A kernel that is stored with its fan-out first."""
    return dataclasses.replace(row, fan_in=(1, *more), fan_out=(0,))


# ---- the models ------------------------------------------------------------------------------------


def albert(at: Widths) -> Any:
    return flax_module("albert", "FlaxAlbertForMaskedLMModule")(
        config(
            *("albert", "AlbertConfig"),
            vocab_size=VOCAB,
            max_position_embeddings=8,
            embedding_size=at.wide // 2,
            hidden_size=at.width,
            intermediate_size=at.wide,
            num_attention_heads=at.head_count,
            num_hidden_layers=3,
            num_hidden_groups=1,
        )
    )


LAYER = "albert/encoder/albert_layer_groups/0/albert_layers/0/"
ALBERT = Model(
    albert,
    (IDS, MASK, jnp.zeros_like(IDS), POSITIONS),
    {
        "albert/embeddings/word_embeddings/embedding": embedding(2, tied=True),
        "albert/embeddings/[pt]*_embeddings/embedding": embedding(2),
        "albert/embeddings/LayerNorm/*": vector(2),
        "albert/encoder/embedding_hidden_mapping_in/kernel": hidden(2, 3),
        "albert/encoder/embedding_hidden_mapping_in/bias": vector(3),
        LAYER + "attention/*/kernel": hidden(3, 3),
        LAYER + "attention/*/bias": vector(3),
        LAYER + "attention/LayerNorm/scale": vector(3),
        LAYER + "full_layer_layer_norm/*": vector(3),
        LAYER + "ffn/kernel": hidden(3, 2),
        LAYER + "ffn/bias": vector(2),
        LAYER + "ffn_output/kernel": hidden(2, 3),
        LAYER + "ffn_output/bias": vector(3),
        "predictions/dense/kernel": scaled_hidden(3, 2),
        "predictions/dense/bias": vector(2),
        "predictions/LayerNorm/*": vector(2),
        "predictions/bias": FINITE,
    },
    {
        ("attention", HEAD_SIZE**-0.5, "dot_product_attention_weights("): 3,
        ("tied_readout", 1 / 2, 'self.decoder.apply({"params": {"kernel": shared_embedding.T}}'): 1,
    },
)


def sequences(at: Widths) -> dict[str, Any]:
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", 1), ("ffn_dim", at.wide), ("attention_heads", at.head_count))
    }
    ends = {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2}
    return {"vocab_size": VOCAB, "d_model": at.width, **sides, **ends}


ENCODER_DECODER = {
    "*_proj/kernel": hidden(3, 3),
    "*_proj/bias": vector(3),
    "*/fc1/kernel": hidden(3, 2),
    "*/fc1/bias": vector(2),
    "*/fc2/kernel": hidden(2, 3),
    "*/fc2/bias": vector(3),
    "*norm*/*": vector(3),
}
# Self-attention of both sides, and the decoder's to the encoder.
THREE_ATTENTIONS = {("attention", HEAD_SIZE**-0.5, "dot_product_attention_weights("): 3}


def mbart(at: Widths) -> Any:
    return flax_module("mbart", "FlaxMBartForConditionalGenerationModule")(
        config("mbart", "MBartConfig", max_position_embeddings=8, scale_embedding=True, **sequences(at))
    )


MBART = Model(
    mbart,
    (IDS, MASK, IDS, MASK, POSITIONS, POSITIONS),
    {
        **ENCODER_DECODER,
        "model/shared/embedding": embedding(3, tied=True),
        "model/*/embed_positions/embedding": embedding(3),
        "final_logits_bias": Row("finite", (), (0, 1)),
    },
    {
        **THREE_ATTENTIONS,
        # The root of the width that embeddings are multiplied with.
        ("scale", 3**-0.5, "self.embed_scale"): 2,
        ("tied_readout", 1 / 3, "self.lm_head.apply("): 1,
    },
)


def whisper(at: Widths) -> Any:
    return flax_module("whisper", "FlaxWhisperForConditionalGenerationModule")(
        config(
            *("whisper", "WhisperConfig"),
            num_mel_bins=7,
            max_source_positions=6,
            max_target_positions=8,
            **sequences(at),
        )
    )


WHISPER = Model(
    whisper,
    (real(BATCH, 7, 12), IDS, MASK, POSITIONS),
    {
        **ENCODER_DECODER,
        "model/encoder/conv1/kernel": Row("input", (0, 1), (2,), r_out=3),
        "model/encoder/conv2/kernel": Row("hidden", (0, 1), (2,), 3, 3, 3**-0.5),
        "model/encoder/conv?/bias": vector(3),
        # Sines; and what keeps Flax's default, a deviation of 1/sqrt(features).
        "model/encoder/embed_positions/embedding": embedding(3),
        "model/decoder/embed_positions/embedding": dataclasses.replace(embedding(3), init=3**0.5),
        "model/decoder/embed_tokens/embedding": dataclasses.replace(embedding(3, tied=True), init=3**0.5),
    },
    {
        **THREE_ATTENTIONS,
        ("tied_readout", 1 / 3, "self.lm_head.apply("): 1,
    },
)


def wav2vec2(at: Widths) -> Any:
    return flax_module("wav2vec2", "FlaxWav2Vec2ForCTCModule")(
        config(
            *("wav2vec2", "Wav2Vec2Config"),
            vocab_size=VOCAB,
            hidden_size=at.width,
            intermediate_size=at.wide,
            num_attention_heads=at.head_count,
            num_hidden_layers=2,
            conv_dim=(at.wide // 4, at.wide // 4),
            conv_stride=(2, 2),
            conv_kernel=(3, 3),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            feat_extract_norm="layer",
            do_stable_layer_norm=True,
        )
    )


ENCODER = "wav2vec2/encoder/"
WAV2VEC2 = Model(
    wav2vec2,
    (real(BATCH, 40), None, jnp.zeros((BATCH, 9), bool).at[:, 2:4].set(True)),
    {
        "wav2vec2/feature_extractor/conv_layers/0/conv/kernel": Row("input", (0, 1), (2,), r_out=2),
        "wav2vec2/feature_extractor/conv_layers/1/conv/kernel": Row("hidden", (0, 1), (2,), 2, 2),
        "wav2vec2/feature_extractor/conv_layers/?/layer_norm/*": vector(2),
        "wav2vec2/feature_projection/layer_norm/*": vector(2),
        "wav2vec2/feature_projection/projection/kernel": hidden(2, 3),
        "wav2vec2/feature_projection/projection/bias": vector(3),
        "wav2vec2/masked_spec_embed": vector(3),
        # Weight norm over both channels. Stored with the fan-out first, which He's normal takes for fan-in.
        ENCODER + "pos_conv_embed/conv/weight_v": Row("hidden", (1, 2), (0,), 3, 3, 3**0.5),
        ENCODER + "pos_conv_embed/conv/weight_g": Row("finite", (2,), (0, 1)),
        ENCODER + "pos_conv_embed/conv/bias": vector(3),
        ENCODER + "layers/?/attention/*_proj/kernel": hidden(3, 3),
        ENCODER + "layers/?/attention/*_proj/bias": vector(3),
        ENCODER + "layers/?/feed_forward/intermediate_dense/kernel": hidden(3, 2),
        ENCODER + "layers/?/feed_forward/intermediate_dense/bias": vector(2),
        ENCODER + "layers/?/feed_forward/output_dense/kernel": hidden(2, 3),
        ENCODER + "layers/?/feed_forward/output_dense/bias": vector(3),
        ENCODER + "*layer_norm/*": vector(3),
        "lm_head/kernel": readout(3),
        "lm_head/bias": FINITE,
    },
    {
        # g v / |v|: the entries of a kernel of unit norm fall as the fan-in, and should fall as its root.
        ("scale", 3**0.5, "self.conv.apply("): 1,
        ("attention", HEAD_SIZE**-0.5, "dot_product_attention_weights("): 2,
        ("readout", 1 / 3, "self.lm_head("): 1,
    },
)


def regnet(at: Widths) -> Any:
    return flax_module("regnet", "FlaxRegNetForImageClassificationModule")(
        config(
            *("regnet", "RegNetConfig"),
            embedding_size=at.width,
            hidden_sizes=[at.width, at.wide],
            depths=[1, 2],
            groups_width=8,
            layer_type="y",
            num_labels=LABELS,
        )
    )


def regnet_layer(layer: str, r_in: float, r_out: float, shortcut: bool) -> dict[str, Any]:
    """A layer's kernels; theirs have a deviation of 1/sqrt(fan-out)."""

    def own(into: float, out: float) -> Any:
        return conv(into, out, (out / into) ** 0.5)

    squeeze = layer + "layer/2/attention/"
    rows = {
        layer + "layer/0/convolution/kernel": own(r_in, r_out),
        # Groups of 8 at every width: the fan-in is fixed.
        layer + "layer/1/convolution/kernel": Row("input", (0, 1, 2), (3,), r_out=r_out, init=r_out**0.5),
        squeeze + "0/kernel": own(r_out, r_in),
        squeeze + "0/bias": vector(r_in),
        squeeze + "2/kernel": own(r_in, r_out),
        squeeze + "2/bias": vector(r_out),
        layer + "layer/3/convolution/kernel": own(r_out, r_out),
        layer + "layer/?/normalization/*": vector(r_out),
    }
    if shortcut:
        rows[layer + "shortcut/convolution/kernel"] = own(r_in, r_out)
        rows[layer + "shortcut/normalization/*"] = vector(r_out)
    return rows


REGNET = Model(
    regnet,
    (real(BATCH, 8, 8, 3),),
    {
        "regnet/embedder/embedder/convolution/kernel": Row("input", (0, 1, 2), (3,), r_out=3, init=3**0.5),
        "regnet/embedder/embedder/normalization/*": vector(3),
        **regnet_layer("regnet/encoder/stages/0/layers/0/", 3, 3, True),
        **regnet_layer("regnet/encoder/stages/1/layers/0/", 3, 2, True),
        **regnet_layer("regnet/encoder/stages/1/layers/1/", 2, 2, False),
        "classifier/1/kernel": readout(2, init=2**0.5),
        "classifier/1/bias": FINITE,
    },
    {("readout", 1 / 2, "self.classifier("): 1},
)


def t5(at: Widths, head_size: int | None = None, gated: bool = False) -> Any:
    return flax_module("t5", "FlaxT5ForConditionalGenerationModule")(
        config(
            *("t5", "T5Config"),
            vocab_size=VOCAB,
            d_model=at.width,
            d_kv=head_size or at.width // at.head_count,
            num_heads=at.width // head_size if head_size else at.head_count,
            d_ff=at.wide,
            num_layers=2,
            num_decoder_layers=2,
            relative_attention_num_buckets=8,
            feed_forward_proj="gated-gelu" if gated else "relu",
            tie_word_embeddings=not gated,
        )
    )


def t5_rows(r_heads: float, r_size: float, tied: bool) -> dict[str, Any]:
    bias = "*/relative_attention_bias/embedding"
    return {
        # Its own initial values have 1/sqrt(head size) in them, in place of a factor on the logits.
        "*Attention/q/kernel": Row("hidden", (0,), (1,), 3, 3, r_size**0.5),
        "*Attention/[kvo]/kernel": scaled_hidden(3, 3),
        bias: dataclasses.replace(embedding(r_heads), init=3**0.5),
        "*/DenseReluDense/wi*/kernel": scaled_hidden(3, 2),
        "*/DenseReluDense/wo/kernel": scaled_hidden(2, 3),
        "*layer_norm/weight": vector(3),
        "shared/embedding": embedding(3, tied=tied),
        **({} if tied else {"lm_head/kernel": readout(3)}),
    }


TEXTS = (IDS, MASK, IDS, MASK)
# Two layers of the encoder, and two of the decoder with two attentions each.
# Its 1/sqrt(d) is in the initialiser of the query.
UNSCALED = {
    ("unscaled sum", "dot_product_attention_weights("): 6,
    ("scale in an initialiser", "dot_product_attention_weights("): 6,
}
T5 = Model(
    t5,
    TEXTS,
    t5_rows(2, HEAD_SIZE, True),
    {
        # The tied readout's own 1/sqrt(d) stays what it is in the base; 1/d is the rule's.
        ("scale", 3**0.5, "self.model_dim**-0.5"): 1,
        ("tied_readout", 1 / 3, "self.lm_head.apply("): 1,
    },
    UNSCALED,
)
T5_GATED = Model(
    functools.partial(t5, gated=True),
    TEXTS,
    t5_rows(2, HEAD_SIZE, False),
    {("readout", 1 / 3, "self.lm_head("): 1},
    UNSCALED,
)
# Heads of one size: there is nothing to scale, and nothing to report.
T5_HEADS = dataclasses.replace(
    T5, build=functools.partial(t5, head_size=4), rows=t5_rows(3, 1, True), findings={}
)


def experts(at: Widths) -> Any:
    """Top 2 of 4 experts, a linear router, an auxiliary loss beside the logits."""
    settings = importlib.import_module("nano_moe.config").NanoMoEConfig(
        vocab_size=VOCAB,
        n_layers=2,
        n_heads=at.head_count,
        d_model=at.width,
        d_ff=at.wide,
        n_experts=4,
        top_k=2,
        block_size=8,
    )
    return importlib.import_module("nano_moe.model").NanoMoE(settings)


EXPERTS = Model(
    experts,
    (IDS,),
    {
        "Embed_0/embedding": embedding(3),
        "pos_emb": vector(3, (0, 1, 2)),
        "block_?/MultiHeadAttention_0/Dense_?/kernel": scaled_hidden(3, 3),
        "block_?/MultiHeadAttention_0/Dense_?/bias": vector(3),
        # Glorot's deviation for 16 (48) inputs and 4 outputs.
        "block_?/MoELayer_0/Router_0/Dense_0/kernel": readout(3, init=(52 / 20) ** 0.5),
        "block_?/MoELayer_0/expert_?/Dense_0/kernel": scaled_hidden(3, 2),
        "block_?/MoELayer_0/expert_?/Dense_0/bias": vector(2),
        "block_?/MoELayer_0/expert_?/Dense_1/kernel": scaled_hidden(2, 3),
        "block_?/MoELayer_0/expert_?/Dense_1/bias": vector(3),
        "*LayerNorm_?/*": vector(3),
        "Dense_0/kernel": readout(3),
        "Dense_0/bias": FINITE,
    },
    {
        ("attention", HEAD_SIZE**-0.5, "jnp.matmul(q, k"): 2,
        ("readout", 1 / 3, "logits = nn.Dense("): 3,
    },
)

EDGES = jnp.asarray(np.random.default_rng(2).integers(0, 7, (2, 20)), "int32")
GRAPH = (real(7, 5), EDGES)


def graph_model(name: str, **more: Any) -> Callable[[Widths], Any]:
    def build(at: Widths) -> Any:
        model = getattr(importlib.import_module("jraphx.nn.models"), name)
        heads = {"heads": 2} if name == "GAT" else {}
        return lambda rngs: model(5, at.width, 3, LABELS, rngs=rngs, **heads, **more)

    return build


# A vector for each of two heads, which grow from 8 to 24; Glorot's deviation.
SCORES = Row("output", (1,), (0,), r_in=3, init=((2 + 24) / (2 + 8)) ** 0.5)
GRAPH_ATTENTION = Model(
    graph_model("GAT", norm="layer_norm", jk="cat"),
    GRAPH,
    {
        "convs/0/lin/kernel": Row("input", (0,), (1,), r_out=3),
        "convs/[12]/lin/kernel": scaled_hidden(3, 3),
        "convs/?/att_*": SCORES,
        "convs/?/bias": vector(3),
        "norms/?/*": vector(3),
        "lin/kernel": readout(3, init=3**0.5),
        "lin/bias": FINITE,
    },
    {
        ("readout", 1 / 3, "self.att_src"): 3,
        ("readout", 1 / 3, "self.att_dst"): 3,
        ("readout", 1 / 3, "x = self.lin(x)"): 1,
    },
)
GRAPH_SAGE = Model(
    graph_model("GraphSAGE"),
    GRAPH,
    {
        "convs/0/lin*/kernel": Row("input", (0,), (1,), r_out=3),
        "convs/1/lin*/kernel": scaled_hidden(3, 3),
        "convs/[01]/lin_r/bias": vector(3),
        "convs/2/lin*/kernel": readout(3, init=3**0.5),
        "convs/2/lin_r/bias": FINITE,
    },
    # Of the neighbours' mean and of the node itself.
    {("readout", 1 / 3, "self.lin"): 2},
)


def mamba2(at: Widths) -> Any:
    module = importlib.import_module("mamba2_jax")
    settings = module.Mamba2Config(
        vocab_size=VOCAB, hidden_size=at.width, state_size=8, head_dim=8, chunk_size=4, num_hidden_layers=2
    )
    return lambda rngs: module.Mamba2ForCausalLM(settings, rngs=rngs)


def mamba3(at: Widths) -> Any:
    module = importlib.import_module("mamba3_jax")
    settings = module.Mamba3Config(
        vocab_size=VOCAB, hidden_size=at.width, state_size=8, head_dim=8, chunk_size=4, num_hidden_layers=2
    )
    return lambda rngs: module.Mamba3ForCausalLM(settings, rngs=rngs)


LAYERS = "backbone/layers/?/"
STATE_SPACE = {
    "backbone/embedder/embedding": dataclasses.replace(embedding(3, tied=True), init=3**0.5),
    LAYERS + "norm/weight": vector(3),
    "backbone/final_norm/weight": vector(3),
    LAYERS + "mixer/dt_bias": vector(3),
    LAYERS + "mixer/D": vector(3),
    LAYERS + "mixer/out_proj/kernel": scaled_hidden(3, 3),
}
TIED = {("tied_readout", 1 / 3, "self.backbone.embedder.embedding"): 1}
# Beside the width, a projection has the fixed size of a state, and as many steps as there are heads.
MAMBA2 = Model(
    mamba2,
    (IDS,),
    {
        **STATE_SPACE,
        LAYERS + "mixer/in_proj/kernel": scaled_hidden(3, (4 * 48 + 2 * 8 + 12) / (4 * 16 + 2 * 8 + 4)),
        LAYERS + "mixer/conv1d/conv/kernel": Row("input", (0,), (1, 2), r_out=(96 + 16) / (32 + 16)),
        LAYERS + "mixer/conv1d/conv/bias": vector((96 + 16) / (32 + 16)),
        LAYERS + "mixer/A_log": vector(3),
        LAYERS + "mixer/norm/weight": vector(3),
    },
    TIED,
)
MAMBA3 = Model(
    mamba3,
    (IDS,),
    {
        **STATE_SPACE,
        LAYERS + "mixer/in_proj/kernel": scaled_hidden(
            3, (4 * 48 + 16 + 3 * 12 + 2) / (4 * 16 + 16 + 3 * 4 + 2)
        ),
        LAYERS + "mixer/[BC]_bias": vector(3, (0, 1, 2)),
        LAYERS + "mixer/[BC]_norm/weight": FINITE,
    },
    TIED,
)


def fourier(at: Widths) -> mujax.Functional:
    """An Equinox module as a pair of functions of its arrays."""
    eqx = importlib.import_module("equinox")

    def make(key: Any) -> Any:
        return importlib.import_module("neojax.models").FNO(
            key, in_channels=2, out_channels=1, hidden_channels=at.width, n_layers=2, modes=(3, 3)
        )

    _, static = eqx.partition(eqx.filter_eval_shape(make, jax.random.key(0)), eqx.is_inexact_array)
    return mujax.Functional(
        lambda key, *_: eqx.filter(make(key), eqx.is_inexact_array),
        lambda params, x: jax.vmap(eqx.combine(params, static))(x),
    )


BLOCKS = "fno_blocks/"
FOURIER = Model(
    fourier,
    (real(BATCH, 2, 8, 8),),
    {
        "lifting/weights/0": flipped(Row("input", (0,), (1,), r_out=3)),
        "lifting/weights/1": flipped(scaled_hidden(3, 3)),
        "lifting/biases/?": vector(3),
        # Complex, one for each mode; a deviation of 1/sqrt(fan-in times fan-out).
        BLOCKS + "fno_layers/?/spectral_conv/weights/weights/?": Stacked(
            "hidden", (1,), (0,), 3, 3, 3**0.5, stack=(2, 3)
        ),
        BLOCKS + "fno_layers/?/local_operator/conv/weight": flipped(scaled_hidden(3, 3), 2),
        BLOCKS + "fno_layers/?/normalization/*": vector(3),
        BLOCKS + "channel_mlps/?/weights/?": flipped(scaled_hidden(3, 3)),
        BLOCKS + "channel_mlps/?/biases/?": vector(3),
        BLOCKS + "channel_mlp_residuals/?/weight": vector(3, (0, 1, 2)),
        "projection/weights/0": flipped(scaled_hidden(3, 3)),
        "projection/biases/0": vector(3),
        "projection/weights/1": flipped(readout(3, init=3**0.5)),
        "projection/biases/1": FINITE,
    },
    {("readout", 1 / 3, "jnp.einsum("): 1},
)

MODELS = {
    "albert": ALBERT,
    "mbart": MBART,
    "whisper": WHISPER,
    "wav2vec2": WAV2VEC2,
    "regnet": REGNET,
    "t5": T5,
    "t5-gated": T5_GATED,
    "t5-heads": T5_HEADS,
    "experts": EXPERTS,
    "graph-attention": GRAPH_ATTENTION,
    "graph-sage": GRAPH_SAGE,
    "mamba2": MAMBA2,
    "mamba3": MAMBA3,
    "fourier": FOURIER,
}
every = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def _names_of_older_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """T5 names the bounds of `jnp.clip` as JAX did before 0.5."""
    clip = jnp.clip

    def renamed(array: Any, *args: Any, **kwargs: Any) -> jax.Array:
        return clip(
            array, *args, **{{"a_min": "min", "a_max": "max"}.get(k, k): v for k, v in kwargs.items()}
        )

    monkeypatch.setattr(jnp, "clip", renamed)


@functools.cache
def wrapped(name: str) -> mujax.MupModel:
    return MODELS[name].wrap(TARGET)


quiet = pytest.mark.filterwarnings("ignore::mujax.MujaxWarning")


def text(where: str) -> str:
    """The line that is named, and what follows of its statement."""
    file, _, line = where.rpartition(":")
    if not file:  # An output of the model.
        return where
    return "".join(linecache.getline(file, int(line) + n) for n in range(3))


# ---- roles, factors, findings ----------------------------------------------------------------------


@every
@quiet
def test_roles(name: str) -> None:
    model, mup = MODELS[name], wrapped(name)
    for path, param in mup.spec.items():
        row = model.row(path)
        assert (path, param.role, param.tied) == (path, row.role, row.tied)
        assert (path, param.fan_in, param.fan_out, param.stack) == (
            path,
            row.fan_in,
            row.fan_out,
            getattr(row, "stack", ()),
        )
        assert (path, param.r_in, param.r_out) == (path, pytest.approx(row.r_in), pytest.approx(row.r_out))
        chosen = mup.spec.parametrization
        numbers = (
            mup.init_scales.get(path, 1.0),
            *(rules.lr_factor(param, chosen, family) for family in ("adam", "sgd")),
        )
        assert (path, *numbers) == (path, *(pytest.approx(x) for x in (row.init, row.adam, row.sgd)))
    for glob in model.rows:
        assert fnmatch.filter(mup.spec, glob), f"{glob} matches no parameter"


@every
@quiet
def test_factors_and_findings(name: str) -> None:
    """Each is where it belongs, and there are no others."""
    model, mup = MODELS[name], wrapped(name)
    factors: collections.Counter[Any] = collections.Counter()
    for found in mup.corrections:
        factors.update(
            expected
            for expected in model.factors
            if found.kind == expected[0]
            and math.isclose(found.factor, expected[1], rel_tol=1e-5)
            and expected[2] in text(found.where)
        )
    assert factors == model.factors
    assert len(mup.corrections) == sum(model.factors.values())
    findings: collections.Counter[Any] = collections.Counter()
    for finding in mup.findings:
        for expected in model.findings:
            if finding.kind == expected[0] and expected[1] in text(finding.where):
                findings[expected] += finding.count
    assert findings == model.findings
    assert len(mup.findings) == len(model.findings)


@quiet
@pytest.mark.parametrize("name", ["albert", "mbart", "whisper", "wav2vec2", "regnet", "t5", "experts"])
def test_training_gets_the_factors_of_evaluation(name: str) -> None:
    """With dropout, batch statistics of the batch, masks."""
    training = MODELS[name].wrap(TARGET, deterministic=False)
    assert training.spec == wrapped(name).spec
    assert training.init_scales == wrapped(name).init_scales
    assert training.corrections == wrapped(name).corrections
    assert training.findings == wrapped(name).findings


# ---- sizes at initialisation -----------------------------------------------------------------------


def sizes(mup: mujax.MupModel, taps: tuple[Tap, ...], seeds: int = 16) -> np.ndarray:
    """Mean absolute entry of each tap, with the constants behind it, over some seeds."""
    replay = mup.replay
    inserted = {site: math.prod(map(float, one.factors)) for site, one in replay.insertions.items()}

    def run(key: jax.Array) -> jax.Array:
        params, variables = replay.init(key)
        out, records = replay.apply(params, variables, key=key, taps=[tap.site for tap in taps if tap.site])
        outputs = [x for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.floating)]
        found = []
        for tap in taps:
            if tap.site is None:
                found.append(outputs[tap.output or 0])
                continue
            record = records[tap.site]
            later = downstream(replay.program, replay.analysis, inserted, tap.site, mixing_sites(taps))
            found.append(later * (record.out if tap.reads is None else record.operands[tap.reads]))
        return jnp.stack([jnp.mean(jnp.abs(x)) for x in found])

    keys = jax.random.split(jax.random.key(0), seeds)
    return np.mean(jax.jit(jax.vmap(run))(keys), axis=0)


def slopes(name: str, **kwargs: Any) -> dict[Tap, float]:
    """How each activation grows with width, from the base to `WIDER`."""
    small, large = (MODELS[name].wrap(at, **kwargs) for at in (BASE, WIDER))
    taps = find_taps(large)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.log(sizes(large, taps) / sizes(small, taps)) / math.log(WIDER.features)
    return {tap: slope for tap, slope in zip(taps, found, strict=True) if np.isfinite(slope)}


# What seeds and the few entries of a small batch make of an exponent.
NOISE = 0.3


# One of each kind, for the time that compiling takes.
MEASURED = ("albert", "wav2vec2", "regnet", "t5-gated", "experts", "graph-sage", "mamba2", "fourier")


@quiet
@pytest.mark.parametrize("name", MEASURED)
def test_sizes(name: str) -> None:
    """Nothing grows but what is reported; what reads out, and what is added to it, may fall."""
    reported = [line for _, line in MODELS[name].findings]
    for tap, slope in slopes(name).items():
        if any(line in text(tap.where) for line in reported):
            assert slope > 0.5 - NOISE, tap
            continue
        least = 0 if tap.kind in ("product", "lookup", "norm") else -0.5
        assert least - NOISE < slope < NOISE, (tap, slope)


def test_sizes_without_mup_grow() -> None:
    """The twin: ALBERT's kernels have the same initial values at every width."""
    found = slopes("albert", parametrization="sp")
    assert sum(slope > NOISE for tap, slope in found.items() if tap.kind == "product") > 10
