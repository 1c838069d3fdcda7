"""The model at several widths, the loss and the optimizer that a check runs.

The coordinate check, wider is better and the transfer check share these arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import optax
from jaxtyping import PyTree

from mujax._arguments import COUNT, FACTORY, LOSS, NAMED, NONE, OPTIMIZER, SEED, WIDTHS, Kind
from mujax.core import MupModel, mup_init
from mujax.core.frontends import frontend
from mujax.errors import ConfigError
from mujax.optim import optimizer as optimizer_by_name
from mujax.spec import MupSpec
from mujax.train import as_inputs

TRAINED: Final[Mapping[str, Kind]] = {
    "factory": FACTORY,
    "widths": WIDTHS,
    "optimizer": OPTIMIZER,
    "seeds": COUNT,
    "seed": SEED,
    "loss": LOSS | NONE,
    "base": FACTORY | NONE,
    "base_width": COUNT | NONE,
    "kwargs": NAMED | NONE,
}
"""The arguments of a check that trains models at several widths."""

Optimizer = Callable[[Any, MupSpec], optax.GradientTransformation]
"""(learning rate, which may be traced, and spec) -> the optimizer."""


def models_at(
    factory: Callable[[int], Any],
    widths: Sequence[int],
    base: Callable[[int], Any] | None = None,
    base_width: int | None = None,
    inputs: PyTree = (),
    kwargs: Mapping[str, Any] | None = None,
    **mup_kwargs: Any,
) -> dict[int, MupModel]:
    """The model in µP at each width.

    Args:
        factory: width -> a Linen module, an NNX factory, a `Functional`, or a ready `MupModel`, which is
            used unchanged.
        widths: at least two; in any order.
        base: target's width -> its base model. By default every base is `factory(base_width)`.
        base_width: the smallest of `widths` by default.
        inputs: the model's example input, or a tuple of them.
        kwargs: keyword arguments of the model's call.
        **mup_kwargs: passed to `mup_init`: `parametrization`, `roles`, `corrections`, `zero_init`, ...

    Returns:
        Width -> model, ascending.

    Raises:
        ConfigError: fewer than two widths, a width that is not positive, or both `base` and `base_width`.
        MujaxError: as `mup_init` does.
    """
    ascending = sorted({int(width) for width in widths})
    if len(ascending) < 2 or ascending[0] < 1:
        raise ConfigError(
            where="widths", expected="at least two different positive numbers", got=tuple(widths)
        )
    if base is not None and base_width is not None:
        raise ConfigError(
            where="base_width", expected="none next to base=, which gives the base models", got=base_width
        )
    narrow = ascending[0] if base_width is None else base_width
    of_base = base or (lambda _: factory(narrow))
    arguments, options = as_inputs(inputs), dict(kwargs or {})

    def at(width: int) -> MupModel:
        model = factory(width)
        if isinstance(model, MupModel):
            return model
        small = of_base(width)
        same = width == narrow if base is None else _same_widths(model, small, arguments, options)
        # A model of the base's own widths does not show which axes are infinite.
        delta = factory(ascending[-1] if width != ascending[-1] else ascending[0]) if same else None
        return mup_init(model, small, *arguments, delta=delta, **options, **mup_kwargs)

    return {width: at(width) for width in ascending}


def _same_widths(model: Any, base: Any, inputs: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    traces = [frontend(each).trace_init(inputs, kwargs) for each in (model, base)]
    one, other = (trace.shapes(trace.params) for trace in traces)
    return one == other


def optimizer_of(optimizer: str | Optimizer) -> Optimizer:
    """The optimizer as a function of learning rate and spec.

    Args:
        optimizer: a name that `mujax.optim.optimizer` knows, or the function itself.

    Raises:
        ConfigError: an unknown optimizer.
    """
    return optimizer_by_name(optimizer) if isinstance(optimizer, str) else optimizer
