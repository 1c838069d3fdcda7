"""Parses numbers in settings and on command lines, powers included."""

from __future__ import annotations

import math
import re
from typing import Any, Final

_NUMBER: Final = r"(?:\d+(?:\.\d*)?|\.\d+)(?:e[-+]?\d+)?"
_TEXT: Final = re.compile(
    rf"\s*(?:(?P<plain>[-+]?{_NUMBER})|(?P<base>{_NUMBER})\s*(?:\*\*|\^)\s*(?P<exponent>[-+]?{_NUMBER}))\s*",
    re.IGNORECASE | re.ASCII,
)


def number(text: str) -> int | float | None:
    """Parses a finite number, also written as a power; None for any other text.

    Nothing is evaluated. Whole numbers are ints, and so are their powers where these are whole. The base of a
    power has no sign: it would be unclear whether it belongs to the base or to the power.

    >>> number("16"), number("2**-8"), number("2^10"), number("1e-3"), number("2 apples")
    (16, 0.00390625, 1024, 0.001, None)
    """
    found = _TEXT.fullmatch(text)
    if found is None:
        return None
    try:
        if found["plain"] is not None:
            value: Any = _plain(found["plain"])
        else:
            value = _plain(found["base"]) ** _plain(found["exponent"])
        return value if isinstance(value, int | float) and math.isfinite(value) else None
    except (ValueError, ArithmeticError):
        return None


def _plain(text: str) -> int | float:
    return float(text) if re.search(r"[.e]", text, re.IGNORECASE) else int(text)
