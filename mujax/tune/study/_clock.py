"""The clock of waits and timeouts; tests replace it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Clock:
    """A monotonic clock.

    Attributes:
        now: returns the time in seconds, from an arbitrary start.
        sleep: waits for a number of seconds.
    """

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
