"""Optimizers by name, for configuration files and command lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import optax

from mujax.errors import ConfigError
from mujax.optim import _alias

_ALIASES: Final[dict[str, Callable[..., optax.GradientTransformationExtraArgs]]] = {
    "adam": _alias.mup_adam,
    "adamw": _alias.mup_adamw,
    "sgd": _alias.mup_sgd,
}


def optimizer(name: str) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """The alias `mup_<name>`: a function of the base learning rate and the spec.

    Args:
        name: optax's own name, `"adamw"` for `optax.adamw`.

    Raises:
        ConfigError: no optimizer of that name.

    >>> optimizer("adamw").__name__
    'mup_adamw'
    """
    if name not in _ALIASES:
        raise ConfigError(f"optimizer: expected one of {', '.join(map(repr, _ALIASES))}, got {name!r}.")
    return _ALIASES[name]
