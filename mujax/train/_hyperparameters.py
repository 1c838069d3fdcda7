"""The hyperparameters that mujax knows by name, and whether each transfers across width."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

from mujax._arguments import TEXT, takes
from mujax.errors import ConfigError

Kind = Literal["optimization", "initialization", "multiplier", "regularization", "scale", "unknown"]


@dataclasses.dataclass(frozen=True)
class Hyperparameter:
    """A hyperparameter: its kind, its effect and its default.

    Attributes:
        kind: the row of the paper's tables that it belongs to.
        text: its effect, in words.
        default: its value if none is given; None for the default of the task or the optimizer.
    """

    kind: Kind
    text: str
    default: Any = None


def _rate(role: str) -> Hyperparameter:
    return Hyperparameter("optimization", f"multiple of the learning rate of {role} weights", 1.0)


HYPERPARAMETERS: Final[Mapping[str, Hyperparameter]] = {
    "learning_rate": Hyperparameter("optimization", "peak of the base learning rate"),
    "lr_mult_input": _rate("input"),
    "lr_mult_hidden": _rate("hidden"),
    "lr_mult_output": _rate("output"),
    "momentum": Hyperparameter("optimization", "decay rate of SGD's accumulated gradients"),
    "b1": Hyperparameter("optimization", "decay rate of Adam's first moment"),
    "b2": Hyperparameter("optimization", "decay rate of Adam's second moment"),
    "eps": Hyperparameter("optimization", "Adam's ε"),
    "schedule": Hyperparameter("optimization", "shape of the learning rate after the warm-up", "constant"),
    "warmup": Hyperparameter("optimization", "share of the steps over which the learning rate rises", 0.0),
    "end": Hyperparameter("optimization", "last learning rate as a share of the peak", 0.0),
    "init_scale": Hyperparameter("initialization", "multiple σ of the initial weights, not of biases", 1.0),
    "output_mult": Hyperparameter("multiplier", "multiple of the output", 1.0),
    "attention_mult": Hyperparameter("multiplier", "multiple of the attention logits", 1.0),
    "input_mult": Hyperparameter("multiplier", "multiple of the embeddings", 1.0),
    "weight_decay": Hyperparameter("regularization", "strength of the weight decay"),
    "dropout": Hyperparameter("regularization", "rate of dropout"),
    "batch": Hyperparameter("scale", "examples a step"),
    "steps": Hyperparameter("scale", "steps of a run"),
    "depth": Hyperparameter("scale", "number of layers"),
}
"""By name. Keyword arguments of a model's factory can be tuned, too; they are not listed here."""

_UNKNOWN: Final = Hyperparameter("unknown", "of your own")

WHY_NOT: Final[Mapping[Kind, str]] = {
    "regularization": "regularisation depends on the sizes of model and data (Tensor Programs V, Table 1)",
    "scale": "it is a scale to transfer across and not a hyperparameter (Tensor Programs V, Table 1)",
    "unknown": "nothing is known of it",
}
"""Reasons why a kind does not transfer; the other kinds do.

Reference:
    Yang et al., Tensor Programs V, arXiv 2203.03466, Tables 1 and 2.
"""


@takes(name=TEXT)
def hyperparameter(name: str) -> Hyperparameter:
    """The hyperparameter of that name; of kind `"unknown"` if it is not listed."""
    return HYPERPARAMETERS.get(name, _UNKNOWN)


def as_its_kind(name: str, value: Any) -> Any:
    """Turns a whole number into a float if the hyperparameter is one: floats are traced, others compiled in.

    >>> as_its_kind("output_mult", 2), as_its_kind("depth", 2)
    (2.0, 2)
    """
    is_float = name in HYPERPARAMETERS and HYPERPARAMETERS[name].kind != "scale"
    return float(value) if is_float and type(value) is int else value


@takes(name=TEXT)
def transfers(name: str) -> bool:
    """Whether the best value of a small model is the best of a wide one in µP.

    >>> transfers("learning_rate"), transfers("weight_decay")
    (True, False)
    """
    return hyperparameter(name).kind not in WHY_NOT


def refuse_untransferable(tuned: Iterable[str], settled: Iterable[str]) -> None:
    """Raises an error for tuned hyperparameters that do not transfer and have no other value.

    Args:
        tuned: those of a study.
        settled: those that the user gave a value or chose to transfer all the same.

    Raises:
        ConfigError: there are any.
    """
    left = [name for name in tuned if not transfers(name) and name not in set(settled)]
    if left:
        reasons = "; ".join(f"{name}: {WHY_NOT[hyperparameter(name).kind]}" for name in left)
        name = left[0]
        raise ConfigError(
            where="transfer",
            expected="hyperparameters that transfer across width",
            got=f"{', '.join(left)} tuned as well ({reasons})",
            remedy=f"give the target's own value, --set {name}=..., or take the proxy's all the same, "
            f"--also {name}; in Python fixed={{{name!r}: ...}} or also=({name!r},)",
        )
