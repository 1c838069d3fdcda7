"""The front of a resampled random search."""

import json

import numpy as np
import pytest

from mujax.errors import ConfigError
from mujax.tune._cost import front, resampled, sizes


def test_sizes_end_with_all_trials():
    assert sizes(1) == (1,)
    assert sizes(16) == (1, 2, 4, 8, 16)
    assert sizes(17) == (1, 2, 4, 8, 16, 17)


def test_subsets_are_drawn_without_replacement_and_the_same_every_time():
    subsets = resampled(10, 4, 20)
    assert len(subsets) == 20
    assert all(len(set(subset)) == 4 and max(subset) < 10 for subset in subsets)
    assert len({tuple(subset) for subset in subsets}) > 15
    np.testing.assert_array_equal(subsets, resampled(10, 4, 20))
    assert (np.array(subsets) != np.array(resampled(10, 4, 20, seed=1))).any()


def test_more_trials_cost_more_and_end_lower():
    losses = list(np.random.default_rng(0).uniform(1, 2, 32))
    found = front(losses, [3.0] * 32)
    assert found.trials == (1, 2, 4, 8, 16, 32)
    assert found.flops == tuple(3.0 * size for size in found.trials)
    assert list(found.loss) == sorted(found.loss, reverse=True)
    assert found.loss[-1] == found.low[-1] == found.high[-1] == min(losses)
    assert all(low <= loss <= high for low, loss, high in zip(found.low, found.loss, found.high, strict=True))
    # Half of all best of four lie below this quantile.
    assert found.loss[2] == pytest.approx(np.quantile(losses, 1 - 0.5 ** (1 / 4)), abs=0.1)
    assert json.loads(found.to_json())["trials"] == [1, 2, 4, 8, 16, 32]


def test_the_choice_is_by_one_loss_and_its_worth_another():
    losses, worth = [1.0, 2.0, 3.0, 4.0], [8.0, 7.0, 6.0, 5.0]
    found = front(losses, [1.0] * 4, worth)
    assert found.loss[-1] == 8.0
    assert front(losses, [1.0] * 4).loss[-1] == 1.0


def test_what_diverged_is_never_chosen_and_counts_as_the_worst_where_it_must_be():
    found = front([None, 1.0, 2.0, None], [1.0] * 4)
    assert found.loss[-1] == 1.0
    assert found.high[0] == 2.0
    # Chosen by the proxy, diverged at the target.
    assert front([1.0, 2.0], [1.0, 1.0], [None, 3.0]).loss[-1] == 3.0
    with pytest.raises(ConfigError, match="expected at least one trial that reached its end, got none"):
        front([None, None], [1.0, 1.0])
