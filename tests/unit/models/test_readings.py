"""What `mup_init` reads from the built-in models: every parameter's role and ratios, every correction.

A row is a pattern of paths with the role, the axes of fan-in and fan-out, and their ratios from the base, of
width 32, to the target, of width 64. Each path fits one row, and each row a path.
"""

import collections
import re

import jax
import jax.numpy as jnp
import pytest

import mujax
from mujax import models

pytestmark = pytest.mark.abstract

WIDTHS = (32, 64)


def ints(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def images(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


ATTENTION = {
    r".*attention/(query|key|value)/kernel": ("hidden", (0,), (1, 2), 2, 2),
    r".*attention/out/kernel": ("hidden", (0, 1), (2,), 2, 2),
}
ATTENTION_BIASES = {
    r".*attention/(query|key|value)/bias": ("input", (), (0, 1), 1, 2),
    r".*attention/out/bias": ("input", (), (0,), 1, 2),
}
FEED_FORWARD = {r".*ff/(up|down)/kernel": ("hidden", (0,), (1,), 2, 2)}
FEED_FORWARD_BIASES = {r".*ff/(up|down)/bias": ("input", (), (0,), 1, 2)}
GAINS = {r".*norm/scale": ("input", (), (0,), 1, 2)}
SHIFTS = {r".*norm/bias": ("input", (), (0,), 1, 2)}
LOOKED_UP = ("input", (0,), (1,), 1, 2)
TIED = (*LOOKED_UP, "tied")
READOUT = {"readout/kernel": ("output", (0,), (1,), 2, 1)}
HALF, ROOT = 0.5, 0.5**0.5


def relative(**sizes):
    def build(width):
        return models.Transformer(
            models.TransformerConfig(d_model=width, n_layers=2, max_len=12, relative_positions=True, **sizes)
        )

    return build, (ints(2, 8),), {}


def encoder_decoder(**options):
    def build(width):
        return models.EncoderDecoder(
            models.EncoderDecoderConfig(d_model=width, n_layers=2, vocab_size=50, **options)
        )

    return build, (ints(2, 8), ints(2, 6)), {}


def bert(**sizes):
    def build(width):
        return models.Bert(models.BertConfig(d_model=width, n_layers=2, vocab_size=50, **sizes))

    return build, (ints(2, 8),), {}


CONVOLUTION = ("hidden", (0, 1, 2), (3,), 2, 2)
FIRST_CONVOLUTION = ("input", (0, 1, 2), (3,), 1, 2)
BERT = {
    **ATTENTION,
    **ATTENTION_BIASES,
    **FEED_FORWARD,
    **FEED_FORWARD_BIASES,
    **GAINS,
    **SHIFTS,
    "(position|type)_embedding/embedding": LOOKED_UP,
    "token_embedding/embedding": TIED,
    "head/kernel": ("hidden", (0,), (1,), 2, 2),
    "head/bias": ("input", (), (0,), 1, 2),
    "head_bias": ("finite", (), (0,), 1, 1),
}
CASES = {
    "relative positions, heads of a growing size": (
        relative(use_bias=True),
        {
            **ATTENTION,
            **ATTENTION_BIASES,
            **FEED_FORWARD,
            **FEED_FORWARD_BIASES,
            **GAINS,
            **SHIFTS,
            **READOUT,
            "token_embedding/embedding": LOOKED_UP,
            # As long as a head: a vector that is looked up, whose product with the query is a logit.
            ".*/distance_embedding/embedding": LOOKED_UP,
        },
        {("attention", ROOT): 4, ("readout", HALF): 1},
    ),
    "relative positions, a growing number of heads": (
        relative(head_dim=8),
        {
            **ATTENTION,
            **FEED_FORWARD,
            **GAINS,
            **READOUT,
            "token_embedding/embedding": LOOKED_UP,
            ".*/distance_embedding/embedding": ("finite", (0,), (1,), 1, 1),
        },
        {("readout", HALF): 1},
    ),
    "encoder-decoder, one table": (
        encoder_decoder(),
        {
            **ATTENTION,
            **ATTENTION_BIASES,
            **FEED_FORWARD,
            **FEED_FORWARD_BIASES,
            **GAINS,
            **SHIFTS,
            "embedding/embedding": TIED,
        },
        # sqrt(d_model) times an embedding of deviation 1/sqrt(d_model): both are held at the base's value.
        {("scale", ROOT): 2, ("attention", ROOT): 6, ("tied_readout", HALF): 1},
    ),
    "encoder-decoder, tables apart, heads of one size": (
        encoder_decoder(share_embeddings=False, head_dim=8, use_bias=False),
        {
            **ATTENTION,
            **FEED_FORWARD,
            **GAINS,
            **READOUT,
            "(source|target)_embedding/embedding": LOOKED_UP,
        },
        {("scale", ROOT): 2, ("readout", HALF): 1},
    ),
    "bert": (bert(head_dim=8), BERT, {("tied_readout", HALF): 1}),
    "bert, heads of a growing size": (
        bert(n_heads=4, head_dim=None),
        BERT,
        {("attention", ROOT): 2, ("tied_readout", HALF): 1},
    ),
    "resnet, norm and activation first": (
        (
            lambda width: models.ResNet(models.ResNetConfig((1, 1), (width, 2 * width), pre_activation=True)),
            (images(2, 8, 8, 3),),
            {"train": True},
        ),
        {
            "stem_conv/kernel": FIRST_CONVOLUTION,
            r"stage_.*conv(_\d)?/kernel": CONVOLUTION,
            r".*norm(_\d)?/(scale|bias)": ("input", (), (0,), 1, 2),
            **READOUT,
            "readout/bias": ("finite", (), (0,), 1, 1),
        },
        {("readout", HALF): 1},
    ),
    "resnet9": (
        (
            lambda width: models.ResNet9(models.ResNet9Config(width / 64)),
            (images(2, 16, 16, 3),),
            {"train": True},
        ),
        {
            "stem_conv/kernel": FIRST_CONVOLUTION,
            r"stage_.*conv/kernel": CONVOLUTION,
            **GAINS,
            **SHIFTS,
            **READOUT,
        },
        {("readout", HALF): 1},
    ),
}


def differences(mup, rows, corrections):
    """Paths that fit no row, or whose row says something else; rows without a path; other corrections."""
    found, used = set(), set()
    for path, param in mup.spec.items():
        fitting = [pattern for pattern in rows if re.fullmatch(pattern, path)]
        used.update(fitting)
        role, fan_in, fan_out, r_in, r_out, *tied = rows[fitting[0]] if len(fitting) == 1 else (None,) * 5
        read = (param.role, param.fan_in, param.fan_out, param.r_in, param.r_out, param.tied)
        if read != (role, fan_in, fan_out, r_in, r_out, bool(tied)):
            found.add(path)
    count = collections.Counter((one.kind, round(one.factor, 6)) for one in mup.corrections)
    expected = {(kind, round(factor, 6)): times for (kind, factor), times in corrections.items()}
    return found | (set(rows) - used) | {key for key, _ in count.items() ^ expected.items()}


@pytest.mark.parametrize("case", CASES)
def test_roles_and_corrections(case):
    (build, inputs, kwargs), rows, corrections = CASES[case]
    base, target = map(build, WIDTHS)
    mup = mujax.mup_init(target, base, *inputs, strict=True, **kwargs)
    assert mup.findings == ()
    assert differences(mup, rows, corrections) == set()


def test_a_wrong_row_and_a_wrong_correction_are_found():
    (build, inputs, _), rows, corrections = CASES["relative positions, heads of a growing size"]
    table = ".*/distance_embedding/embedding"
    # As for a table that is looked up with heads of one size.
    wrong = {**rows, table: ("finite", (0,), (1,), 1, 1)}
    mup = mujax.mup_init(build(64), build(32), *inputs)
    paths = {f"block_{i}/attention/distance_embedding/embedding" for i in range(2)}
    assert differences(mup, wrong, corrections) == paths
    assert differences(mup, {**rows, "nothing": LOOKED_UP}, corrections) == {"nothing"}
    assert differences(mup, rows, {**corrections, ("attention", ROOT): 2}) == {("attention", round(ROOT, 6))}
