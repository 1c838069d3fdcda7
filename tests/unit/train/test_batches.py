"""Batches: what a list of them has to be."""

import re

import jax.numpy as jnp
import pytest

from mujax.errors import ConfigError
from mujax.train._batches import check_batches


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "expected at least one (inputs, targets) pair, got none"),
        ([jnp.zeros((2, 3))], "pair at every step, got ArrayImpl at step 0"),
        (
            [(jnp.zeros(2), jnp.zeros(2)), (jnp.zeros(3), jnp.zeros(3))],
            "(((3,), 'float32'), ((3,), 'float32')) at step 1",
        ),
    ],
)
def test_batches_must_be_pairs_of_the_same_shapes(given, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_batches(given)
