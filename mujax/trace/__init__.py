"""Reads a model's parametrization off the programs of its base and target.

`analyse` walks two traced programs and returns how each parameter is used; `read_scales` and
`read_constants` tell how the outputs of an initialiser scale; `resolve` turns uses into axis roles.
Nothing is run.

`values.py` is the abstract domain, `interpret.py` the walk, `primitives.py` the table of what each
primitive does, `roles.py` the verdict, `source.py` the place in the user's code.
"""

from mujax.trace.analyse import Analysis as Analysis
from mujax.trace.analyse import analyse as analyse
from mujax.trace.analyse import read_constants as read_constants
from mujax.trace.analyse import read_scales as read_scales
from mujax.trace.interpret import EqnPath as EqnPath
from mujax.trace.interpret import Finding as Finding
from mujax.trace.interpret import Fix as Fix
from mujax.trace.interpret import Operand as Operand
from mujax.trace.interpret import Product as Product
from mujax.trace.interpret import Use as Use
from mujax.trace.roles import read as read
from mujax.trace.roles import resolve as resolve
from mujax.trace.roles import telling as telling
