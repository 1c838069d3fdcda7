"""Reads a model's parametrization off the programs of its base and target.

`analyse` walks two traced programs and returns how each parameter is used; `read_initial_values` and
`read_constants` return how the outputs of an initialiser scale; `resolve` turns uses into axis roles.
Nothing is run.

`_values.py` is the abstract domain, `_align.py` pairs the equations of the two programs, `_interpreter.py` is
the walk, `_uses.py` its record, `primitives/` the table of what each primitive does, and `_roles.py` turns
uses into roles.
"""

from mujax.core.trace._analyse import (
    Analysis as Analysis,
    InitialValues as InitialValues,
    analyse as analyse,
    flow_of as flow_of,
    read_constants as read_constants,
    read_initial_values as read_initial_values,
)
from mujax.core.trace._parity import Parity as Parity
from mujax.core.trace._roles import (
    axes_of_use as axes_of_use,
    informative_uses as informative_uses,
    resolve as resolve,
)
from mujax.core.trace._uses import (
    Finding as Finding,
    Fix as Fix,
    Flow as Flow,
    Loop as Loop,
    Operand as Operand,
    Product as Product,
    Use as Use,
    Visit as Visit,
    merged as merged,
)
