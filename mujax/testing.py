"""For a user's own tests: one call that fails where a model is not in µP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mujax.check import CoordCheck, coord_check


def assert_mup(
    factory: Callable[[int], Any], widths: Sequence[int], inputs: Any = None, *args: Any, **kwargs: Any
) -> CoordCheck:
    """Fails where `mujax.coord_check` does not pass.

    Args:
        factory: as for `mujax.coord_check`.
        widths: as for `mujax.coord_check`.
        inputs: as for `mujax.coord_check`.
        *args: as for `mujax.coord_check`.
        **kwargs: as for `mujax.coord_check`.

    Returns:
        The check that passed.

    Raises:
        AssertionError: the verdict is `"fail"` or `"undecided"`; its text is the whole report.
        MujaxError: as `mujax.coord_check` does.

    Example:
        >>> import flax.linen as nn, jax.numpy as jnp
        >>> def test_my_model():
        ...     net = lambda width: nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(4)])
        ...     assert_mup(net, (32, 128), jnp.sin(jnp.arange(64.0)).reshape(8, 8), steps=2)
        >>> test_my_model()
    """
    # For pytest: the report is what matters, not this frame.
    __tracebackhide__ = True
    check = coord_check(factory, widths, inputs, *args, **kwargs)
    if check.verdict != "pass":
        raise AssertionError(f"coordinate check: {check}")
    return check
