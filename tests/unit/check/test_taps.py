"""The constants behind a product that count as its own."""

import math

import jax
import pytest
from flax import linen as nn

import mujax
from mujax.check._taps import downstream, find_taps, mixing_sites

pytestmark = pytest.mark.abstract


class Net(nn.Module):
    """Queries that go into the product with keys, and elsewhere."""

    width: int
    elsewhere: str

    @nn.compact
    def __call__(self, x):
        q = nn.Dense(self.width, use_bias=False, name="query")(x) / math.sqrt(self.width)
        k = nn.Dense(self.width, use_bias=False, name="key")(x)
        logits = q @ k.mT
        if self.elsewhere == "another product":
            # With a change of layout on the way.
            logits += (nn.Dense(self.width, use_bias=False, name="other")(x) @ q.mT).mT
        out = jax.nn.softmax(logits) @ x
        if self.elsewhere == "the output":
            out += q.sum(-1, keepdims=True)
        return out


@pytest.mark.parametrize(
    ("elsewhere", "counted"),
    [("nowhere", 1.0), ("another product", 1.0), ("the output", 1 / math.sqrt(32))],
)
def test_what_queries_are_divided_by_belongs_to_the_logits(elsewhere, counted):
    x = jax.ShapeDtypeStruct((2, 5, 7), "float32")
    mup = mujax.mup_init(Net(32, elsewhere), Net(16, elsewhere), x)
    replay = mup.replay
    (use,) = replay.analysis.uses["query/kernel"]
    products = mixing_sites(find_taps(mup))
    found = downstream(replay.program, replay.analysis, {}, use.site, products)
    assert found == pytest.approx(counted)
