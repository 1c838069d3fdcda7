"""What transfers across width and what does not."""

import pytest

from mujax.errors import ConfigError
from mujax.train._hyperparameters import (
    HYPERPARAMETERS,
    hyperparameter,
    refuse_untransferable,
    transfers,
)


def test_tables_one_and_two_of_the_paper():
    yes = {"learning_rate", "momentum", "b1", "b2", "schedule", "warmup", "end", "init_scale", "output_mult",
           "attention_mult", "input_mult", "lr_mult_hidden"}  # fmt: skip
    no = {"weight_decay", "dropout", "batch", "steps", "depth"}
    assert {name for name in HYPERPARAMETERS if transfers(name)} >= yes
    assert {name for name in HYPERPARAMETERS if not transfers(name)} == no
    assert hyperparameter("my_own").kind == "unknown"
    assert not transfers("my_own")


def test_what_does_not_transfer_is_refused_unless_it_is_settled():
    refuse_untransferable(["learning_rate", "init_scale"], ())
    refuse_untransferable(["learning_rate", "weight_decay"], ["weight_decay"])
    with pytest.raises(ConfigError) as caught:
        refuse_untransferable(["learning_rate", "weight_decay", "batch", "mine"], ["batch"])
    assert str(caught.value) == (
        "transfer: expected hyperparameters that transfer across width, got weight_decay, mine tuned as "
        "well (weight_decay: regularisation depends on the sizes of model and data (Tensor Programs V, Table "
        "1); mine: nothing is known of it); give the target's own value, --set weight_decay=..., or take the "
        "proxy's all the same, --also weight_decay; in Python fixed={'weight_decay': ...} or "
        "also=('weight_decay',)."
    )
