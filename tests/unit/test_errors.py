"""The text of an error: formatted once, from its parts."""

import pickle

import pytest

import mujax
from mujax import errors

FAMILY = [
    error
    for error in vars(errors).values()
    if isinstance(error, type) and issubclass(error, mujax.MujaxError)
]


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({"where": "seeds", "expected": "at least 1", "got": 0}, "seeds: expected at least 1, got 0."),
        ({"expected": "a width", "got": "none"}, "expected a width, got none."),
        ({"where": "lr", "expected": "a number"}, "lr: expected a number."),
        (
            {"where": "a/b", "expected": "x", "got": "y", "remedy": "do this. Or that."},
            "a/b: expected x, got y; do this. Or that.",
        ),
        (
            {"where": "name", "expected": "a", "got": "b", "remedy": "did you mean 'c'?"},
            "name: expected a, got b; did you mean 'c'?",
        ),
    ],
)
def test_parts_make_one_sentence(parts, text):
    error = mujax.ConfigError(**parts)
    assert str(error) == text
    assert error.remedy == parts.get("remedy")


def test_a_message_of_its_own_is_kept():
    assert str(mujax.MujaxError("no such thing")) == "no such thing"


@pytest.mark.parametrize("error", FAMILY, ids=lambda error: error.__name__)
def test_every_error_is_pickled_with_its_parts(error):
    """Workers of a sweep send them to the process that reports them."""
    sent = pickle.loads(pickle.dumps(error(where="x", expected="y", got="z", remedy="do")))
    assert type(sent) is error
    assert (str(sent), sent.where, sent.got) == ("x: expected y, got z; do.", "x", "z")
