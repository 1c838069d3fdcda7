"""The residual branches of models that nobody prepared: Hugging Face's Flax GPT-2, BERT, Llama and ViT.

Needs the extra `thirdparty`, as `test_third_party.py` does, whose models these are.
"""

import warnings

import pytest

import mujax

third_party = pytest.importorskip("test_third_party", exc_type=ImportError)

# Of each model what is outside of its branches; a norm after the addition is on the stream.
OUTSIDE = {
    "gpt2-untied-size": ("ln_f/", "wpe/", "wte/", "lm_head/"),
    "bert-both": ("embeddings/", "LayerNorm/", "cls/"),
    "llama-both": ("model/norm/", "embed_tokens/", "lm_head/"),
    "vit-size": ("embeddings/", "classifier/", "vit/layernorm/"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_branches_of_models_as_published(name):
    case = third_party.CASES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mujax.MujaxWarning)
        mup = mujax.mup_init(
            case.build(case.target), case.build(case.base), *case.kind.inputs(), depth=(1, 2)
        )
    factors = [
        (c.where.rpartition("/")[2].partition(":")[0], c.factor)
        for c in mup.corrections
        if c.kind == "residual"
    ]
    file = f"modeling_flax_{name.partition('-')[0]}.py"
    assert factors == [(file, 0.5)] * 4
    for path, param in mup.spec.items():
        outside = any(part in path for part in OUTSIDE[name])
        assert param.depth == (1.0 if outside else 2.0), path
    expected = {"stream parameter"} if name.startswith("bert") else set()
    assert {finding.kind for finding in mup.findings} == expected
