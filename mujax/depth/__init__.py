"""Depth: the residual branches of a program, and what multiplies them already.

`graph.py` opens a program up, `branches.py` finds the branches in it, `own.py` refuses models that have
factors for depth of their own. The factors themselves are rules, in `mujax.rules`.

References:
    Yang, Yu, Zhu and Hayou, Tensor Programs VI, arXiv 2310.02244.
    Dey et al., Don't be lazy: CompleteP, arXiv 2505.01618.
"""

from mujax.depth.branches import Branch as Branch
from mujax.depth.branches import Branches as Branches
from mujax.depth.branches import Depth as Depth
from mujax.depth.branches import find_branches as find_branches
from mujax.depth.branches import residual_branch as residual_branch
from mujax.depth.branches import scanned_layers as scanned_layers
from mujax.depth.own import power_of_fix as power_of_fix
from mujax.depth.own import refuse_own_factors as refuse_own_factors
from mujax.depth.own import refuse_scaled_init as refuse_scaled_init
