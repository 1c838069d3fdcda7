"""Depth: the residual branches of a program, and what multiplies them already.

`graph.py` opens a program up, `branches.py` finds the branches in it, `own.py` refuses models that have
factors for depth of their own. The factors themselves are rules, in `mujax.rules`.

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
    scanned_layers as scanned_layers,
)
from mujax.core.depth._own_factors import (
    power_of_fix as power_of_fix,
    refuse_own_factors as refuse_own_factors,
    refuse_scaled_init as refuse_scaled_init,
)
