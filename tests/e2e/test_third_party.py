"""µP on models that nobody prepared: Hugging Face's Flax GPT-2, BERT, Llama and ViT, exactly as published.

Needs the extra `thirdparty`. Every role and every correction is asserted, and one µP step is compared with
the same architectures written by hand in `by_hand.py`. Nothing is downloaded: the modules are built from
configurations.
"""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import functools
import linecache
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import mujax
from mujax import rules
from mujax.spec import leaf_path

# Flax left transformers with version 5: the module itself is what has to be there.
modeling_gpt2 = pytest.importorskip("transformers.models.gpt2.modeling_flax_gpt2", exc_type=ImportError)
modeling_bert = pytest.importorskip("transformers.models.bert.modeling_flax_bert", exc_type=ImportError)
modeling_llama = pytest.importorskip("transformers.models.llama.modeling_flax_llama", exc_type=ImportError)
modeling_vit = pytest.importorskip("transformers.models.vit.modeling_flax_vit", exc_type=ImportError)

BATCH, LENGTH, VOCAB, LABELS = 2, 6, 11, 5
KEY = jax.random.key(0)

# What a correction or a rule that is left out must change, at the least.
CLEARLY = 1e-2


# ---- what is expected, as numbers ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """What a parameter is expected to be.

    Attributes:
        role: its role.
        fan_in: its axes of fan-in.
        fan_out: its axes of fan-out.
        r_in: fan-in of the target over that of the base.
        r_out: fan-out of the target over that of the base.
        init: what the module's own initial values are multiplied with.
        tied: whether it is a tied embedding.
    """

    role: str
    fan_in: tuple[int, ...]
    fan_out: tuple[int, ...]
    r_in: float = 1.0
    r_out: float = 1.0
    init: float = 1.0
    tied: bool = False

    @property
    def adam(self) -> float:
        """Learning rate of Adam over the base's."""
        return 1 / self.r_in if self.role == "hidden" else 1.0

    @property
    def sgd(self) -> float:
        """Learning rate of SGD over the base's."""
        return {"input": self.r_out, "hidden": self.r_out / self.r_in, "output": self.r_in, "finite": 1.0}[
            self.role
        ]

    @property
    def eps(self) -> float:
        """Epsilon of Adam over the base's: how the gradient scales."""
        return {"input": 1 / self.r_out, "hidden": 1 / self.r_out, "output": 1 / self.r_in, "finite": 1.0}[
            self.role
        ]


def vector(r: float, axes: tuple[int, ...] = (0,)) -> Row:
    """A bias, a gain, a position table that is added as it is."""
    return Row("input", (), axes, r_out=r)


def embedding(r: float, tied: bool = False) -> Row:
    return Row("input", (0,), (1,), r_out=r, tied=tied)


def hidden(r_in: float, r_out: float) -> Row:
    """A kernel whose own initial values have one standard deviation at every width."""
    return Row("hidden", (0,), (1,), r_in, r_out, r_in**-0.5)


def scaled_hidden(r_in: float, r_out: float) -> Row:
    """A kernel whose own initial values have a standard deviation of 1/sqrt(fan-in)."""
    return Row("hidden", (0,), (1,), r_in, r_out)


def transposed(row: Row) -> Row:
    return dataclasses.replace(row, fan_in=row.fan_out, fan_out=row.fan_in)


def readout(r: float, init: float = 1.0) -> Row:
    return Row("output", (0,), (1,), r_in=r, init=init)


FINITE = Row("finite", (), (0,))


@dataclasses.dataclass(frozen=True)
class Kind:
    """One architecture.

    Attributes:
        module: Hugging Face's Flax module.
        config: its configuration.
        common: what all its configurations have in common.
        inputs: makes a batch.
        by_hand: the same architecture in µP.
        lines: what stands in the line that a correction names, by its kind.
    """

    module: Callable[..., nn.Module]
    config: Callable[..., Any]
    common: Mapping[str, Any]
    inputs: Callable[[], tuple[Any, ...]]
    by_hand: Callable[..., jax.Array]
    lines: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Case:
    """A module at two widths.

    Attributes:
        kind: the architecture.
        base: what the base's configuration has in it that the others of its kind have not.
        target: the same of the target.
        mup: what the hand-written model takes.
        rows: what each parameter is expected to be, by glob of paths.
        corrections: (kind, factor, parameter or None) -> how often.
        module: further fields of the module.
    """

    kind: Kind
    base: Mapping[str, Any]
    target: Mapping[str, Any]
    mup: by_hand.Mup
    rows: Mapping[str, Row]
    corrections: Mapping[tuple[str, float, str | None], int]
    module: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def build(self, sizes: Mapping[str, Any], dtype: str = "float32") -> nn.Module:
        config = self.kind.config(**self.kind.common, **sizes)
        return self.kind.module(config, dtype=getattr(jnp, dtype), **self.module)

    def wrap(self, dtype: str = "float32", **kwargs: Any) -> mujax.MupModel:
        inputs = self.kind.inputs()
        return mujax.mup_init(self.build(self.target, dtype), self.build(self.base, dtype), *inputs, **kwargs)

    def row(self, path: str) -> Row:
        (found,) = (row for glob, row in self.rows.items() if fnmatch.fnmatchcase(path, glob))
        return found


def text(types: bool = False) -> tuple[Any, ...]:
    """Token ids, a mask with some padding, positions."""
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(0, VOCAB, (BATCH, LENGTH)), "int32")
    mask = jnp.ones((BATCH, LENGTH), "int32").at[1, -2:].set(0)
    positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype="int32"), (BATCH, LENGTH))
    if not types:
        return ids, mask, positions
    return ids, mask, jnp.asarray(rng.integers(0, 2, (BATCH, LENGTH)), "int32"), positions, None


def images() -> tuple[Any, ...]:
    return (jnp.asarray(np.random.default_rng(0).normal(size=(BATCH, 8, 8, 3)), "float32"),)


LAYERS = {"num_hidden_layers": 2}
# The table of rotations has a row for each position, and as many columns: no head may be larger than half.
POSITIONS = {"max_position_embeddings": 32}

GPT2 = Kind(
    modeling_gpt2.FlaxGPT2LMHeadModule,
    modeling_gpt2.GPT2Config,
    {"vocab_size": VOCAB, "n_positions": 8, "n_layer": 2},
    text,
    by_hand.gpt2,
    {
        "attention": "attn_weights = dot_product_attention_weights(",
        "readout": "lm_logits = self.lm_head(hidden_states)",
        "tied_readout": 'self.lm_head.apply({"params": {"kernel": shared_kernel}}',
    },
)
BERT = Kind(
    modeling_bert.FlaxBertForMaskedLMModule,
    modeling_bert.BertConfig,
    {"vocab_size": VOCAB, **POSITIONS, **LAYERS},
    functools.partial(text, types=True),
    by_hand.bert,
    {
        "attention": "attn_weights = dot_product_attention_weights(",
        "tied_readout": 'self.decoder.apply({"params": {"kernel": shared_embedding.T}}',
    },
)
LLAMA = Kind(
    modeling_llama.FlaxLlamaForCausalLMModule,
    modeling_llama.LlamaConfig,
    {"vocab_size": VOCAB, "attention_dropout": 0.1, **POSITIONS, **LAYERS},
    text,
    by_hand.llama,
    {"attention": "attn_weights = dot_product_attention_weights(", "readout": "self."},
)
VIT = Kind(
    modeling_vit.FlaxViTForImageClassificationModule,
    modeling_vit.ViTConfig,
    {
        **{"image_size": 8, "patch_size": 4, "num_channels": 3, "num_labels": LABELS},
        **{"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
        **LAYERS,
    },
    images,
    by_hand.vit,
    {
        "attention": "attn_weights = dot_product_attention_weights(",
        "readout": "logits = self.classifier(hidden_states[:, 0, :])",
    },
)


def gpt2_rows(r: float, r_mlp: float, tied: bool) -> dict[str, Row]:
    block = "transformer/h/*/"
    return {
        "transformer/wte/embedding": embedding(r, tied),
        "transformer/wpe/embedding": embedding(r),
        block + "attn/c_attn/kernel": transposed(hidden(r, r)),
        block + "attn/c_proj/kernel": transposed(hidden(r, r)),
        block + "mlp/c_fc/kernel": transposed(hidden(r, r_mlp)),
        block + "mlp/c_proj/kernel": transposed(hidden(r_mlp, r)),
        block + "attn/c_*/bias": vector(r),
        block + "mlp/c_fc/bias": vector(r_mlp),
        block + "mlp/c_proj/bias": vector(r),
        block + "ln_?/*": vector(r),
        "transformer/ln_f/*": vector(r),
        **({} if tied else {"lm_head/kernel": readout(r)}),
    }


def bert_rows(r: float, r_mlp: float) -> dict[str, Row]:
    block, head = "bert/encoder/layer/*/", "cls/predictions/"
    return {
        "bert/embeddings/word_embeddings/embedding": embedding(r, tied=True),
        "bert/embeddings/position_embeddings/embedding": embedding(r),
        "bert/embeddings/token_type_embeddings/embedding": embedding(r),
        "bert/embeddings/LayerNorm/*": vector(r),
        block + "attention/self/*/kernel": hidden(r, r),
        block + "attention/self/*/bias": vector(r),
        block + "attention/output/dense/kernel": hidden(r, r),
        block + "attention/output/dense/bias": vector(r),
        block + "intermediate/dense/kernel": hidden(r, r_mlp),
        block + "intermediate/dense/bias": vector(r_mlp),
        # The glob's star crosses slashes: a digit stands for the layer.
        "bert/encoder/layer/?/output/dense/kernel": hidden(r_mlp, r),
        "bert/encoder/layer/?/output/dense/bias": vector(r),
        block + "LayerNorm/*": vector(r),
        # Of all kernels only this one keeps Flax's default initialiser.
        head + "transform/dense/kernel": scaled_hidden(r, r),
        head + "transform/dense/bias": vector(r),
        head + "transform/LayerNorm/*": vector(r),
        head + "bias": FINITE,
    }


def llama_rows(
    r: float, r_mlp: float, r_kv: float, finite_kv: bool = False, biases: bool = False
) -> dict[str, Row]:
    block = "model/layers/*/"
    into_kv = readout(r) if finite_kv else hidden(r, r_kv)
    rows = {
        "model/embed_tokens/embedding": embedding(r),
        block + "self_attn/[qo]_proj/kernel": hidden(r, r),
        block + "self_attn/[kv]_proj/kernel": into_kv,
        block + "mlp/gate_proj/kernel": hidden(r, r_mlp),
        block + "mlp/up_proj/kernel": hidden(r, r_mlp),
        block + "mlp/down_proj/kernel": hidden(r_mlp, r),
        block + "*_layernorm/weight": vector(r),
        "model/norm/weight": vector(r),
        "lm_head/kernel": readout(r),
    }
    if biases:
        rows[block + "self_attn/[qo]_proj/bias"] = vector(r)
        rows[block + "self_attn/[kv]_proj/bias"] = FINITE if finite_kv else vector(r_kv)
    return rows


def vit_rows(r: float, r_mlp: float) -> dict[str, Row]:
    block = "vit/encoder/layer/?/"
    return {
        "vit/embeddings/cls_token": vector(r, (0, 1, 2)),
        "vit/embeddings/position_embeddings": vector(r, (0, 1, 2)),
        "vit/embeddings/patch_embeddings/projection/kernel": Row("input", (0, 1, 2), (3,), r_out=r),
        "vit/embeddings/patch_embeddings/projection/bias": vector(r),
        block + "attention/attention/*/kernel": scaled_hidden(r, r),
        block + "attention/attention/*/bias": vector(r),
        block + "attention/output/dense/kernel": scaled_hidden(r, r),
        block + "attention/output/dense/bias": vector(r),
        block + "intermediate/dense/kernel": scaled_hidden(r, r_mlp),
        block + "intermediate/dense/bias": vector(r_mlp),
        block + "output/dense/kernel": scaled_hidden(r_mlp, r),
        block + "output/dense/bias": vector(r),
        block + "layernorm_*": vector(r),
        "vit/layernorm/*": vector(r),
        # Its own standard deviation falls as 1/sqrt(fan-in); Table 8's does not.
        "classifier/kernel": readout(r, init=r**0.5),
        "classifier/bias": FINITE,
    }


def gpt2_sizes(width: int, heads: int, inner: int, tied: bool) -> dict[str, Any]:
    return {"n_embd": width, "n_head": heads, "n_inner": inner, "tie_word_embeddings": tied}


def sizes(width: int, heads: int, inner: int, **more: Any) -> dict[str, Any]:
    return {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": inner, **more}


WTE, WORDS = "transformer/wte/embedding", "bert/embeddings/word_embeddings/embedding"

CASES = {
    # Widths grow by 3, never by a power of two; the MLP's inner width by another ratio where it can.
    "gpt2-tied-heads": Case(
        GPT2,
        base=gpt2_sizes(8, 2, 20, True),
        target=gpt2_sizes(24, 6, 30, True),
        mup=by_hand.Mup(heads=6, head_size=4, base_head_size=4, r=3, eps=1e-5),
        rows=gpt2_rows(3, 1.5, True),
        corrections={("tied_readout", 1 / 3, WTE): 1},
    ),
    "gpt2-tied-both": Case(
        GPT2,
        base=gpt2_sizes(8, 2, 32, True),
        target=gpt2_sizes(24, 4, 96, True),
        mup=by_hand.Mup(heads=4, head_size=6, base_head_size=4, r=3, eps=1e-5),
        rows=gpt2_rows(3, 3, True),
        corrections={("tied_readout", 1 / 3, WTE): 1, ("attention", 1.5**-0.5, None): 2},
    ),
    "gpt2-untied-size": Case(
        GPT2,
        base=gpt2_sizes(8, 2, 20, False),
        target=gpt2_sizes(24, 2, 30, False),
        mup=by_hand.Mup(heads=2, head_size=12, base_head_size=4, r=3, eps=1e-5),
        rows=gpt2_rows(3, 1.5, False),
        corrections={("readout", 1 / 3, "lm_head/kernel"): 1, ("attention", 3**-0.5, None): 2},
    ),
    "bert-heads": Case(
        BERT,
        base=sizes(8, 2, 20),
        target=sizes(24, 6, 30),
        mup=by_hand.Mup(heads=6, head_size=4, base_head_size=4, r=3, eps=1e-12),
        rows=bert_rows(3, 1.5),
        corrections={("tied_readout", 1 / 3, WORDS): 1},
    ),
    "bert-both": Case(
        BERT,
        base=sizes(8, 2, 20),
        target=sizes(24, 4, 30),
        mup=by_hand.Mup(heads=4, head_size=6, base_head_size=4, r=3, eps=1e-12),
        rows=bert_rows(3, 1.5),
        corrections={("tied_readout", 1 / 3, WORDS): 1, ("attention", 1.5**-0.5, None): 2},
        module={"gradient_checkpointing": True},
    ),
    "llama-heads": Case(
        LLAMA,
        base=sizes(8, 2, 10, num_key_value_heads=1),
        target=sizes(24, 6, 20, num_key_value_heads=3),
        mup=by_hand.Mup(heads=6, head_size=4, base_head_size=4, r=3, eps=1e-6, key_value_heads=3),
        rows=llama_rows(3, 2, 3),
        corrections={("readout", 1 / 3, "lm_head/kernel"): 1},
    ),
    "llama-fixed-key-value-heads": Case(
        LLAMA,
        base=sizes(8, 2, 10, num_key_value_heads=2, attention_bias=True),
        target=sizes(24, 6, 20, num_key_value_heads=2, attention_bias=True),
        mup=by_hand.Mup(
            heads=6, head_size=4, base_head_size=4, r=3, eps=1e-6, key_value_heads=2, r_key_value=3
        ),
        rows=llama_rows(3, 2, 1, finite_kv=True, biases=True),
        corrections={
            ("readout", 1 / 3, path): 1
            for path in (
                *(f"model/layers/{n}/self_attn/{x}_proj/kernel" for n in (0, 1) for x in "kv"),
                "lm_head/kernel",
            )
        },
    ),
    "llama-size": Case(
        LLAMA,
        base=sizes(8, 4, 10, num_key_value_heads=1),
        target=sizes(24, 4, 20, num_key_value_heads=1),
        mup=by_hand.Mup(heads=4, head_size=6, base_head_size=2, r=3, eps=1e-6, key_value_heads=1),
        rows=llama_rows(3, 2, 3),
        corrections={("readout", 1 / 3, "lm_head/kernel"): 1, ("attention", 3**-0.5, None): 2},
    ),
    "llama-both": Case(
        LLAMA,
        base=sizes(8, 4, 10, num_key_value_heads=2),
        target=sizes(24, 6, 20, num_key_value_heads=2),
        mup=by_hand.Mup(heads=6, head_size=4, base_head_size=2, r=3, eps=1e-6, key_value_heads=2),
        rows=llama_rows(3, 2, 2),
        corrections={("readout", 1 / 3, "lm_head/kernel"): 1, ("attention", 2**-0.5, None): 2},
    ),
    "vit-heads": Case(
        VIT,
        base=sizes(8, 2, 20),
        target=sizes(24, 6, 30),
        mup=by_hand.Mup(heads=6, head_size=4, base_head_size=4, r=3, eps=1e-12),
        rows=vit_rows(3, 1.5),
        corrections={("readout", 1 / 3, "classifier/kernel"): 1},
    ),
    "vit-size": Case(
        VIT,
        base=sizes(8, 2, 20),
        target=sizes(24, 2, 30),
        mup=by_hand.Mup(heads=2, head_size=12, base_head_size=4, r=3, eps=1e-12),
        rows=vit_rows(3, 1.5),
        corrections={("readout", 1 / 3, "classifier/kernel"): 1, ("attention", 3**-0.5, None): 2},
    ),
}


@functools.cache
def wrapped(name: str, dtype: str = "float32") -> mujax.MupModel:
    return CASES[name].wrap(dtype)


cases = pytest.mark.parametrize("name", CASES)
# One of each architecture, the one in which most happens.
RICH = ("gpt2-untied-size", "bert-both", "llama-both", "vit-size")
rich = pytest.mark.parametrize("name", RICH)


# ---- roles and corrections -------------------------------------------------------------------------


@cases
def test_roles(name: str) -> None:
    case, mup = CASES[name], wrapped(name)
    for path, param in mup.spec.items():
        row = case.row(path)
        assert (path, param.role, param.tied) == (path, row.role, row.tied)
        assert (path, param.fan_in, param.fan_out, param.stack) == (path, row.fan_in, row.fan_out, ())
        assert (path, param.r_in, param.r_out) == (path, row.r_in, row.r_out)
        chosen = mup.spec.parametrization
        factors = (
            mup.init_scales.get(path, 1.0),
            *(rules.lr_factor(param, chosen, family) for family in ("adam", "sgd")),
            rules.gradient_scale(param, chosen),
        )
        assert (path, *factors) == (path, *(pytest.approx(x) for x in (row.init, row.adam, row.sgd, row.eps)))
    for glob in case.rows:
        assert fnmatch.filter(mup.spec, glob), f"{glob} matches no parameter"


@cases
def test_corrections(name: str) -> None:
    case, mup = CASES[name], wrapped(name)
    found = collections.Counter((c.kind, round(c.factor, 6), c.path) for c in mup.corrections)
    assert found == {(kind, round(x, 6), path): n for (kind, x, path), n in case.corrections.items()}
    for correction in mup.corrections:
        file, _, line = correction.where.rpartition(":")
        assert case.kind.lines[correction.kind] in linecache.getline(file, int(line))
    assert mup.findings == ()


def test_the_audit_is_clean() -> None:
    case = CASES["llama-both"]
    assert mujax.audit(case.build(case.target), case.build(case.base), *case.kind.inputs()) == ()


@rich
def test_half_precision_changes_nothing(name: str) -> None:
    """In bfloat16 the modules cast here and there, and Llama takes its softmax in float32."""
    full, half = wrapped(name), wrapped(name, "bfloat16")
    assert half.spec == full.spec
    assert half.corrections == full.corrections
    assert half.findings == ()


@pytest.mark.parametrize("name", ["bert-both", "vit-size"])
def test_init(name: str) -> None:
    """The module's own initial values, each times the number in the table."""
    case = CASES[name]
    mup, module, inputs = wrapped(name), case.build(case.target), case.kind.inputs()
    ours, theirs = jax.jit(lambda key: (mup.init(key, *inputs), module.init(key, *inputs)))(KEY)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    expected = by_rows(case, lambda row, leaf: leaf * row.init, theirs["params"])
    assert distance(ours["params"], expected) < 1e-6
    assert distance(theirs["params"], expected) > CLEARLY


# ---- one step --------------------------------------------------------------------------------------


def distance(actual: Any, expected: Any) -> float:
    """The largest difference in any leaf, relative to the largest entry of the leaf.

    A leaf that is zero but for rounding (the gradient of a key's bias: softmax does not see what all keys
    have in common) is measured against the largest entry of the tree.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = list(zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True))
    largest = [float(np.abs(leaf).max()) for _, leaf in pairs]
    differences = [float(np.abs(np.asarray(one) - np.asarray(other)).max()) for one, other in pairs]
    return max(
        difference / (size if size > 1e-6 * max(largest) else max(largest))
        for difference, size in zip(differences, largest, strict=True)
    )


def drawn(case: Case, dtype: str = "float32") -> Any:
    """Parameters such that each of them, biases too, matters to the loss."""
    module = case.build(case.target)
    shapes = jax.eval_shape(module.init, KEY, *case.kind.inputs())["params"]
    rng = np.random.default_rng(1)

    def leaf(path: Any, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        gain = leaf_path(path).endswith(("scale", "norm/weight"))
        return (float(gain) + 0.2 * rng.normal(size=shape.shape)).astype(dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def cross_entropy(logits: jax.Array) -> jax.Array:
    labels = np.random.default_rng(2).integers(0, logits.shape[-1], logits.shape[:-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def run(function: Callable[[Any], jax.Array], params: Any) -> tuple[jax.Array, jax.Array, Any]:
    """Logits, loss and gradient of a model as a function of its parameters."""

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        logits = function(params)
        return cross_entropy(logits), logits

    (value, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return logits, value, gradient


def updates(tx: optax.GradientTransformation, gradient: Any, params: Any) -> Any:
    return jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])(gradient, params)


def by_rows(case: Case, update: Callable[[Row, np.ndarray], np.ndarray], gradient: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: update(case.row(leaf_path(path)), np.asarray(leaf)), gradient
    )


# An epsilon of a gradient's size, so that it shows how it scales.
LR, EPS = 0.01, 0.1


def adam_by_hand(row: Row, gradient: np.ndarray) -> np.ndarray:
    return by_hand.adam(gradient, LR * row.adam, EPS * row.eps)


def sgd_by_hand(row: Row, gradient: np.ndarray) -> np.ndarray:
    return by_hand.sgd(gradient, LR * row.sgd)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("gpt2-tied-both", 1e-12),
        ("gpt2-untied-size", 1e-12),
        ("bert-both", 1e-12),
        ("vit-size", 1e-12),
        # Whatever its dtype, Llama's norms and rotations and its softmax are computed in float32.
        ("llama-fixed-key-value-heads", 1e-6),
        ("llama-both", 1e-6),
    ],
)
def test_one_step(name: str, tolerance: float) -> None:
    """Logits, loss, gradient and the first step of Adam and SGD, in float64."""
    case = CASES[name]
    with jax.enable_x64(True):
        mup, params, inputs = case.wrap("float64"), drawn(case, "float64"), case.kind.inputs()
        logits, loss, gradient = run(lambda p: mup.apply({"params": p}, *inputs).logits, params)
        ours = (logits, loss, gradient)
        theirs = run(lambda p: case.kind.by_hand(p, case.mup, *inputs), params)
        assert logits.dtype == jnp.float64
        assert distance(ours, theirs) < tolerance
        *_, expected = theirs
        for tx, update in (
            (mujax.mup_adam(LR, mup.spec, eps=EPS), adam_by_hand),
            (mujax.mup_sgd(LR, mup.spec), sgd_by_hand),
        ):
            step = updates(tx, gradient, params)
            assert distance(step, by_rows(case, update, expected)) < tolerance


@pytest.mark.parametrize("name", ["gpt2-tied-both", *RICH])
def test_every_correction_is_needed(name: str) -> None:
    """In float32; and the twin: with any one kind of correction switched off it is another model."""
    case = CASES[name]
    params, inputs = drawn(case), case.kind.inputs()

    def logits(**off: bool) -> jax.Array:
        mup = case.wrap(corrections=off)
        return jax.jit(lambda p: mup.apply({"params": p}, *inputs).logits)(params)

    expected = jax.jit(lambda p: case.kind.by_hand(p, case.mup, *inputs))(params)
    assert distance(logits(), expected) < 1e-6
    for kind, *_ in case.corrections:
        assert distance(logits(**{kind: False}), expected) > CLEARLY


def test_every_rule_of_the_optimizers_is_needed() -> None:
    """The twin: plain optax, or an epsilon that stays, is another step."""
    case, spec = CASES["gpt2-untied-size"], wrapped("gpt2-untied-size").spec
    with jax.enable_x64(True):
        gradient = drawn(case, "float64")
        adam, sgd = (by_rows(case, update, gradient) for update in (adam_by_hand, sgd_by_hand))
        assert distance(updates(mujax.mup_adam(LR, spec, eps=EPS), gradient, gradient), adam) < 1e-12
        assert distance(updates(mujax.mup_sgd(LR, spec), gradient, gradient), sgd) < 1e-12
        for tx, expected in (
            (optax.adam(LR, eps=EPS), adam),
            (mujax.mup_adam(LR, spec, eps=EPS, scale_eps=False), adam),
            (optax.sgd(LR), sgd),
        ):
            assert distance(updates(tx, gradient, gradient), expected) > CLEARLY


# ---- what else a call of these modules can be ------------------------------------------------------


def folded(case: Case, params: Any) -> Any:
    """Parameters with which the module itself computes µP, up to the factor of its readout.

    The query carries the factor of the logits.
    """
    factor = case.mup.attention_scale * case.mup.head_size**0.5
    width = case.mup.heads * case.mup.head_size

    def fold(path: Any, leaf: jax.Array) -> jax.Array:
        name = leaf_path(path)
        if "/c_attn/" in name:
            return leaf.at[:width].multiply(factor)
        return leaf * factor if "/query/" in name or "/q_proj/" in name else leaf

    return jax.tree_util.tree_map_with_path(fold, params)


@rich
def test_dropout_and_all_outputs(name: str) -> None:
    """Random streams go through, and what is returned beside the logits is that of µP."""
    case = CASES[name]
    mup, module, params, inputs = wrapped(name), case.build(case.target), drawn(case), case.kind.inputs()
    bias = {"bert-both": ("cls", "predictions", "bias"), "vit-size": ("classifier", "bias")}.get(name, ())
    added = functools.reduce(lambda tree, key: tree[key], bias, params) if bias else 0.0

    def call(apply: Callable[..., Any], params: Any, seed: int) -> Any:
        more = {"deterministic": False, "output_hidden_states": True, "output_attentions": True}
        return apply({"params": params}, *inputs, **more, rngs={"dropout": jax.random.key(seed)})

    run_mup = jax.jit(functools.partial(call, mup.apply))
    ours = run_mup(params, 1)
    theirs = jax.jit(lambda p: call(module.apply, folded(case, p), 1))(params)
    assert type(ours) is type(theirs)
    assert distance(ours.logits, (theirs.logits - added) / case.mup.r + added) < 1e-6
    for part in ("hidden_states", "attentions"):
        assert distance(ours[part], theirs[part]) < 1e-6
    assert len(ours.attentions) == 2
    assert distance(run_mup(params, 2).logits, ours.logits) > CLEARLY


@pytest.mark.parametrize("name", ["gpt2-untied-size", "llama-size"])
def test_decoding_with_a_cache(name: str) -> None:
    """A prompt, then token by token: the logits of one call over the whole text."""
    case = CASES[name]
    params, (ids, _, positions) = drawn(case), case.kind.inputs()
    mask = jnp.ones_like(ids)
    mup = mujax.mup_init(
        case.build(case.target), case.build(case.base), ids, mask, positions, init_cache=True
    )
    assert mup.spec == wrapped(name).spec
    assert mup.findings == ()

    @jax.jit
    def decode(cache: Any, ids: jax.Array, positions: jax.Array) -> tuple[jax.Array, Any]:
        variables = {"params": params, "cache": cache}
        # What follows the text so far is masked by the module, which knows how full its cache is.
        out, state = mup.apply(variables, ids, mask, positions, mutable=["cache"])
        return out.logits, state["cache"]

    cache = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(mup.init, KEY)["cache"]
    )
    found = []
    for start, stop in ((0, 3), *((n, n + 1) for n in range(3, LENGTH))):
        logits, cache = decode(cache, ids[:, start:stop], positions[:, start:stop])
        found.append(logits)
    expected = jax.jit(lambda p: case.kind.by_hand(p, case.mup, ids, mask, positions))(params)
    assert distance(jnp.concatenate(found, axis=1), expected) < 1e-6


# ---- further architectures, for what the four above do not have ------------------------------------

TOKENS = text()
GEMMA = dict(vocab_size=VOCAB, **LAYERS, **POSITIONS, hidden_activation="gelu_pytorch_tanh")
NEO = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 8,
    "num_layers": 2,
    "attention_types": [[["global"], 2]],
}


def listed(mup: mujax.MupModel) -> dict[tuple[str, float], int]:
    return dict(collections.Counter((c.kind, round(c.factor, 6)) for c in mup.corrections))


def test_gemma_multiplies_its_embedding_with_the_root_of_the_width() -> None:
    modeling = pytest.importorskip("transformers.models.gemma.modeling_flax_gemma")

    def build(**more: Any) -> nn.Module:
        return modeling.FlaxGemmaForCausalLMModule(modeling.GemmaConfig(**GEMMA, **more))

    target, base = sizes(24, 4, 48, head_dim=8), sizes(8, 2, 16, head_dim=4)
    mup = mujax.mup_init(
        build(**target, num_key_value_heads=1), build(**base, num_key_value_heads=1), *TOKENS
    )
    assert listed(mup) == {
        ("scale", round(3**-0.5, 6)): 1,
        ("attention", round(2**-0.5, 6)): 2,
        ("tied_readout", round(1 / 3, 6)): 1,
    }
    assert mup.findings == ()


def test_clips_cosines_are_left_alone() -> None:
    """Its embeddings have unit norm, go into a product and are outputs, too; a fixed size is reported."""
    modeling = pytest.importorskip("transformers.models.clip.modeling_flax_clip")

    def build(projection_dim: int, **more: Any) -> nn.Module:
        vision = {"image_size": 8, "patch_size": 4, **LAYERS, **more}
        words = {"vocab_size": VOCAB, "max_position_embeddings": 8, **LAYERS, **more}
        return modeling.FlaxCLIPModule(
            modeling.CLIPConfig(text_config=words, vision_config=vision, projection_dim=projection_dim)
        )

    ids, mask, positions = TOKENS
    for projection, readouts in (((6, 18), {}), ((6, 6), {("readout", round(1 / 3, 6)): 2})):
        base, target = build(projection[0], **sizes(8, 2, 16)), build(projection[1], **sizes(24, 6, 48))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", mujax.MujaxWarning)
            mup = mujax.mup_init(target, base, ids, *images(), mask, positions)
        assert listed(mup) == readouts
        assert [finding.kind for finding in mup.findings] == ["normalised readout"] * (2 if readouts else 0)


def test_gpt_neos_unscaled_attention_is_reported() -> None:
    """It takes the factor of its attention away by hand: no known pattern, so nothing is guessed."""
    modeling = pytest.importorskip("transformers.models.gpt_neo.modeling_flax_gpt_neo")

    def build(width: int, heads: int) -> nn.Module:
        config = modeling.GPTNeoConfig(**NEO, hidden_size=width, num_heads=heads)
        return modeling.FlaxGPTNeoForCausalLMModule(config)

    with pytest.warns(mujax.MujaxWarning):
        mup = mujax.mup_init(build(24, 4), build(8, 2), *TOKENS)
    assert listed(mup) == {("tied_readout", round(1 / 3, 6)): 1}
    assert [finding.kind for finding in mup.findings] == ["unscaled sum"]
    # Once for each of the two layers.
    assert mup.findings[0].count == 2
    file, _, line = mup.findings[0].where.rpartition(":")
    assert "attn_weights = dot_product_attention_weights(" in linecache.getline(file, int(line))
    with pytest.raises(mujax.AuditError, match="its factor fits no known pattern"):
        mujax.mup_init(build(24, 4), build(8, 2), *TOKENS, strict=True)
    # With a fixed head size there is nothing to scale.
    assert mujax.audit(build(24, 6), build(8, 2), *TOKENS) == ()
