"""Checks of the sizes in a config, and the heads that follow from them."""

from __future__ import annotations

from typing import Protocol

from mujax.errors import ConfigError

_DEFAULT_HEADS = 4


class HasHeads(Protocol):
    """A config of a model with attention."""

    @property
    def d_model(self) -> int: ...
    @property
    def n_heads(self) -> int | None: ...
    @property
    def head_dim(self) -> int | None: ...


def require_positive(config: object, *names: str) -> None:
    """Checks that these fields are at least 1; `None` is left to the config.

    Raises:
        ConfigError: one is smaller.
    """
    for name in names:
        size = getattr(config, name)
        if size is not None and size < 1:
            raise ConfigError(where=f"{type(config).__name__}.{name}", expected="at least 1", got=size)


def require_rate(config: object, name: str) -> None:
    """Checks that this field is a rate of dropout.

    Raises:
        ConfigError: it is below 0 or at least 1.
    """
    if not 0 <= getattr(config, name) < 1:
        raise ConfigError(
            where=f"{type(config).__name__}.{name}",
            expected="a rate from 0 up to 1, 1 excluded",
            got=getattr(config, name),
        )


def require_length(model: str, max_len: int, *lengths: int) -> None:
    """Checks that a model has positions for sequences of these lengths.

    Raises:
        ConfigError: one is too long.
    """
    if max_len < max(lengths):
        raise ConfigError(
            where=model,
            expected=f"at most max_len={max_len} tokens",
            got=max(lengths),
            remedy=f"shorten the sequence or raise {model}Config.max_len",
        )


def split_heads(config: HasHeads) -> tuple[int, int]:
    """Number of heads and head size: one gives the other, neither 4 heads; both are taken as they are.

    Raises:
        ConfigError: the one that is given does not divide `d_model`.
    """
    if config.n_heads is not None and config.head_dim is not None:
        return config.n_heads, config.head_dim
    name = "n_heads" if config.head_dim is None else "head_dim"
    divisor = config.head_dim or config.n_heads or _DEFAULT_HEADS
    if config.d_model % divisor:
        raise ConfigError(
            where=f"{type(config).__name__}.{name}",
            expected=f"a divisor of d_model={config.d_model}",
            got=divisor,
            remedy="give both n_heads and head_dim if n_heads × head_dim is to differ from d_model",
        )
    rest = config.d_model // divisor
    return (rest, divisor) if name == "head_dim" else (divisor, rest)
