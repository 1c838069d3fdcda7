"""Depth: the residual branches of a program, and what multiplies them already.

`_nodes.py` numbers the values that the interpreter recorded, `_branches.py` finds the branches among them,
`_own_factors.py` refuses models that have factors for depth of their own, `_plan.py` serves
`mup_init`. The factors themselves are rules, in `mujax.rules`.

References:
    Yang, Yu, Zhu and Hayou, Tensor Programs VI, arXiv 2310.02244.
    Dey et al., Don't be lazy: CompleteP, arXiv 2505.01618.
"""

from mujax.core.depth._branches import (
    Branch as Branch,
    Branches as Branches,
    Depth as Depth,
    find_branches as find_branches,
    residual_branch as residual_branch,
)
from mujax.core.depth._nodes import scanned_layers as scanned_layers
from mujax.core.depth._own_factors import (
    power_of_fix as power_of_fix,
    refuse_own_factors as refuse_own_factors,
    refuse_scaled_init as refuse_scaled_init,
)
from mujax.core.depth._plan import (
    findings_of_depth as findings_of_depth,
    plan_branches as plan_branches,
    plan_depth as plan_depth,
    with_depth as with_depth,
    with_depth_of_branches as with_depth_of_branches,
)
