"""Maximal update parametrization (µP) and hyperparameter transfer for JAX, read off the computation.

`mup_init` wraps a Flax model, `mup_scale_by_adam` and its kin go into an optax chain, and
`mujax transfer` on the command line shows it at work.

Reference:
    Yang et al., Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer,
    arXiv 2203.03466.
"""

from mujax.corrections import Correction as Correction
from mujax.depth import residual_branch as residual_branch
from mujax.errors import AuditError as AuditError
from mujax.errors import ConfigError as ConfigError
from mujax.errors import DataError as DataError
from mujax.errors import DepthError as DepthError
from mujax.errors import MujaxError as MujaxError
from mujax.errors import MujaxWarning as MujaxWarning
from mujax.errors import ParametrizationError as ParametrizationError
from mujax.errors import RoleError as RoleError
from mujax.errors import ShapeMismatchError as ShapeMismatchError
from mujax.errors import SpecMismatchError as SpecMismatchError
from mujax.errors import TraceMismatchError as TraceMismatchError
from mujax.frontend import Functional as Functional
from mujax.infshape import MupSpec as MupSpec
from mujax.infshape import Parametrization as Parametrization
from mujax.infshape import ParamSpec as ParamSpec
from mujax.init import MupModel as MupModel
from mujax.init import audit as audit
from mujax.init import mup_init as mup_init
from mujax.optim import mup_adam as mup_adam
from mujax.optim import mup_adamw as mup_adamw
from mujax.optim import mup_scale_by_adam as mup_scale_by_adam
from mujax.optim import mup_scale_by_sgd as mup_scale_by_sgd
from mujax.optim import mup_sgd as mup_sgd
from mujax.optim import mup_wrap as mup_wrap
from mujax.rules import interpolate as interpolate
from mujax.trace import Finding as Finding
from mujax.transfer import TransferConfig as TransferConfig
from mujax.transfer import transfer as transfer
