"""What each primitive does to the facts: one rule per primitive, in one table.

Rules read shapes from the equations and axes from their parameters. A primitive without a rule makes its
outputs plain data and its parameter operands opaque; nothing is guessed.
"""

from mujax.core.trace.primitives._elementwise import ELEMENTWISE as ELEMENTWISE
from mujax.core.trace.primitives._table import PRIMITIVES as PRIMITIVES
