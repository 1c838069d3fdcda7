"""Places in a program."""

from __future__ import annotations

EqnPath = tuple[int | str, ...]
"""Where an equation stands: its index, then for each enclosing equation (index, sub-program)."""

SUBPROGRAMS = ("jaxpr", "call_jaxpr", "fun_jaxpr")
"""Names under which call-like primitives hold the program that they run once."""
