"""Optimizers by name, for configuration files and command lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import optax

from mujax.errors import ConfigError
from mujax.optim import _alias, _muon, _optimizers
from mujax.optim._registry import AROUND, OPTIMIZERS, UNSUPPORTED

_MODULES: Final = (_alias, _muon, _optimizers)


def optimizer(name: str) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """The alias `mup_<name>`: a function of the base learning rate and the spec.

    Args:
        name: optax's own name, `"adamw"` for `optax.adamw`.

    Raises:
        ConfigError: no optimizer of that name, or one that µP has no rule for; the text says why.

    >>> optimizer("adamw").__name__
    'mup_adamw'
    """
    if name in UNSUPPORTED:
        raise ConfigError(_optimizers.why_unsupported(name))
    if name in AROUND:
        raise ConfigError(
            f"{name}: expected an optimizer, got what goes around one. Put it around an optimizer in µP as "
            "you would around one of optax's."
        )
    for module in _MODULES:
        if name in OPTIMIZERS and hasattr(module, f"mup_{name}"):
            return getattr(module, f"mup_{name}")
    raise ConfigError(f"optimizer: expected one of {', '.join(map(repr, OPTIMIZERS))}, got {name!r}.")
