"""Reads a model's parametrization off the programs of its base and target.

`analyse` walks two traced programs and returns how each parameter is used; `read_scales` and
`read_constants` tell how the outputs of an initialiser scale; `resolve` turns uses into axis roles.
Nothing is run.

`_values.py` is the abstract domain, `_align.py` pairs the equations of the two programs, `_interpreter.py` is
the walk, `_uses.py` what it notes, `primitives/` the table of what each primitive does, `_roles.py` the
verdict.
"""

from mujax.core.trace._analyse import (
    Analysis as Analysis,
    analyse as analyse,
    read_constants as read_constants,
    read_scales as read_scales,
)
from mujax.core.trace._roles import read as read, resolve as resolve, telling as telling
from mujax.core.trace._uses import (
    Finding as Finding,
    Fix as Fix,
    Operand as Operand,
    Product as Product,
    Use as Use,
    merged as merged,
)
