"""JAX's traced programs, and nothing of µP: the one place that knows how JAX represents them.

`_jax.py` has what differs between JAX releases, `_primitives.py` the classes of primitives, `_sites.py`
places and the programs inside of equations, `_source.py` lines of the user's code, `_evaluate.py` runs a
program with factors inserted, `_boundary.py` moves factors out of what must not be changed inside.
"""

from mujax.core.program._boundary import (
    Boundary as Boundary,
    boundary as boundary,
    closed_around as closed_around,
)
from mujax.core.program._evaluate import (
    Insertion as Insertion,
    Insertions as Insertions,
    Record as Record,
    Records as Records,
    blocked as blocked,
    evaluate as evaluate,
    evaluate_and_record as evaluate_and_record,
    loses_derivative as loses_derivative,
    tappable as tappable,
)
from mujax.core.program._jax import (
    CONTROL as CONTROL,
    Atom as Atom,
    Call as Call,
    ClosedJaxpr as ClosedJaxpr,
    Cond as Cond,
    Jaxpr as Jaxpr,
    JaxprEqn as JaxprEqn,
    Kernel as Kernel,
    Scan as Scan,
    Var as Var,
    While as While,
    as_closed as as_closed,
    checkpoint_label as checkpoint_label,
    control as control,
    dtype_of as dtype_of,
    holds_programs as holds_programs,
    is_float as is_float,
    memory_written as memory_written,
    mesh_sizes as mesh_sizes,
    primitive_name as primitive_name,
    rebuilt as rebuilt,
    shape_of as shape_of,
    under_named_axes as under_named_axes,
)
from mujax.core.program._primitives import (
    IDENTITIES as IDENTITIES,
    LAYOUT as LAYOUT,
    LINEAR_AT_ZERO as LINEAR_AT_ZERO,
    MEMORY_READS as MEMORY_READS,
    MEMORY_WRITES as MEMORY_WRITES,
    PARTS as PARTS,
    PRODUCTS as PRODUCTS,
    RESHAPES as RESHAPES,
)
from mujax.core.program._sites import (
    EqnPath as EqnPath,
    Subprogram as Subprogram,
    enclosing_equations as enclosing_equations,
    enclosing_primitives as enclosing_primitives,
    equation_at as equation_at,
    equations as equations,
    program_at as program_at,
    subprograms as subprograms,
)
from mujax.core.program._source import (
    is_library_function as is_library_function,
    is_of_user as is_of_user,
    scope as scope,
    source_line as source_line,
)
