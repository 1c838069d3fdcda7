"""Optimizers by name, for configuration files and command lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import optax

from mujax._arguments import TEXT, check_arguments
from mujax.errors import ConfigError
from mujax.optim import _alias, _muon, _optimizers
from mujax.optim._registry import AROUND, OPTIMIZERS, UNSUPPORTED

_MODULES: Final = (_alias, _muon, _optimizers)


def optimizer(name: str) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """The alias `mup_<name>`: a function of the base learning rate and the spec.

    Args:
        name: optax's own name, `"adamw"` for `optax.adamw`.

    Raises:
        ConfigError: an unknown optimizer, or one that µP has no rule for; the text gives the reason.

    >>> optimizer("adamw").__name__
    'mup_adamw'
    """
    check_arguments({"optimizer": TEXT}, {"optimizer": name})
    if name in UNSUPPORTED:
        raise _optimizers.unsupported(name)
    if name in AROUND:
        raise ConfigError(
            where=name,
            expected="an optimizer",
            got="a wrapper of optimizers",
            remedy="put it around an optimizer in µP as you would around one of optax's",
        )
    for module in _MODULES:
        if name in OPTIMIZERS and hasattr(module, f"mup_{name}"):
            return getattr(module, f"mup_{name}")
    raise ConfigError(
        where="optimizer", expected=f"one of {', '.join(map(repr, OPTIMIZERS))}", got=repr(name)
    )
