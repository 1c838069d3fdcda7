"""The idea: two abstract traces of a model give its roles, its spec and its corrected forward pass."""

from mujax.core._corrections import Correction as Correction
from mujax.core._mup_init import mup_init as mup_init
from mujax.core._mup_model import MupModel as MupModel
from mujax.core._param_specs import with_role as with_role
from mujax.core._partition import Rules as Rules, largest_axis as largest_axis
from mujax.core._replay import Replay as Replay
