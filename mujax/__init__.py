"""Maximal update parametrization (µP) and hyperparameter transfer for JAX, read off the computation.

`mup_init` wraps a Flax model, `mup_scale_by_adam` and its kin go into an optax chain, and
`mujax transfer-check` on the command line shows it at work.

Reference:
    Yang et al., Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer,
    arXiv 2203.03466.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any, Final

from mujax.errors import (
    AuditError as AuditError,
    CheckpointError as CheckpointError,
    ConfigError as ConfigError,
    DataError as DataError,
    DepthError as DepthError,
    MujaxError as MujaxError,
    MujaxWarning as MujaxWarning,
    ParametrizationError as ParametrizationError,
    PreemptedError as PreemptedError,
    ProcessError as ProcessError,
    RoleError as RoleError,
    ShapeMismatchError as ShapeMismatchError,
    SpecMismatchError as SpecMismatchError,
    StudyError as StudyError,
    TraceMismatchError as TraceMismatchError,
)

if TYPE_CHECKING:
    from mujax import optim as optim
    from mujax.check import (
        CoordCheck as CoordCheck,
        TransferCheck as TransferCheck,
        WiderIsBetter as WiderIsBetter,
        audit as audit,
        coord_check as coord_check,
        transfer_check as transfer_check,
        wider_is_better as wider_is_better,
    )
    from mujax.core import Correction as Correction, MupModel as MupModel, mup_init as mup_init
    from mujax.core.depth import residual_branch as residual_branch
    from mujax.core.frontends import Functional as Functional
    from mujax.core.trace import Finding as Finding
    from mujax.optim import (
        mup_acprop as mup_acprop,
        mup_adabelief as mup_adabelief,
        mup_adadelta as mup_adadelta,
        mup_adafactor as mup_adafactor,
        mup_adagrad as mup_adagrad,
        mup_adam as mup_adam,
        mup_adamax as mup_adamax,
        mup_adamaxw as mup_adamaxw,
        mup_adamw as mup_adamw,
        mup_adan as mup_adan,
        mup_add_decayed_weights as mup_add_decayed_weights,
        mup_ademamix as mup_ademamix,
        mup_adopt as mup_adopt,
        mup_amsgrad as mup_amsgrad,
        mup_clip_by_global_norm as mup_clip_by_global_norm,
        mup_fromage as mup_fromage,
        mup_global_norm as mup_global_norm,
        mup_lamb as mup_lamb,
        mup_lars as mup_lars,
        mup_lion as mup_lion,
        mup_madgrad as mup_madgrad,
        mup_muon as mup_muon,
        mup_nadam as mup_nadam,
        mup_nadamw as mup_nadamw,
        mup_noisy_sgd as mup_noisy_sgd,
        mup_normalize as mup_normalize,
        mup_novograd as mup_novograd,
        mup_optimistic_adam as mup_optimistic_adam,
        mup_optimistic_adam_v2 as mup_optimistic_adam_v2,
        mup_optimistic_gradient_descent as mup_optimistic_gradient_descent,
        mup_radam as mup_radam,
        mup_rmsprop as mup_rmsprop,
        mup_rprop as mup_rprop,
        mup_scale_by_acprop as mup_scale_by_acprop,
        mup_scale_by_adadelta as mup_scale_by_adadelta,
        mup_scale_by_adam as mup_scale_by_adam,
        mup_scale_by_adamax as mup_scale_by_adamax,
        mup_scale_by_adan as mup_scale_by_adan,
        mup_scale_by_ademamix as mup_scale_by_ademamix,
        mup_scale_by_adopt as mup_scale_by_adopt,
        mup_scale_by_amsgrad as mup_scale_by_amsgrad,
        mup_scale_by_belief as mup_scale_by_belief,
        mup_scale_by_factored_rms as mup_scale_by_factored_rms,
        mup_scale_by_lion as mup_scale_by_lion,
        mup_scale_by_madgrad as mup_scale_by_madgrad,
        mup_scale_by_muon as mup_scale_by_muon,
        mup_scale_by_novograd as mup_scale_by_novograd,
        mup_scale_by_optimistic_gradient as mup_scale_by_optimistic_gradient,
        mup_scale_by_radam as mup_scale_by_radam,
        mup_scale_by_rms as mup_scale_by_rms,
        mup_scale_by_rprop as mup_scale_by_rprop,
        mup_scale_by_rss as mup_scale_by_rss,
        mup_scale_by_sgd as mup_scale_by_sgd,
        mup_scale_by_sign as mup_scale_by_sign,
        mup_scale_by_simplified_ademamix as mup_scale_by_simplified_ademamix,
        mup_scale_by_sm3 as mup_scale_by_sm3,
        mup_scale_by_stddev as mup_scale_by_stddev,
        mup_scale_by_trust_ratio as mup_scale_by_trust_ratio,
        mup_scale_by_yogi as mup_scale_by_yogi,
        mup_schedule_free_adamw as mup_schedule_free_adamw,
        mup_schedule_free_sgd as mup_schedule_free_sgd,
        mup_sgd as mup_sgd,
        mup_sign_sgd as mup_sign_sgd,
        mup_signum as mup_signum,
        mup_simplified_ademamix as mup_simplified_ademamix,
        mup_sm3 as mup_sm3,
        mup_sophia as mup_sophia,
        mup_wrap as mup_wrap,
        mup_yogi as mup_yogi,
    )
    from mujax.rules import interpolate as interpolate
    from mujax.spec import MupSpec as MupSpec, Parametrization as Parametrization, ParamSpec as ParamSpec
    from mujax.train import Batches as Batches, training_run as training_run
    from mujax.tune import (
        Study as Study,
        Sweep as Sweep,
        TransferConfig as TransferConfig,
        Transferred as Transferred,
        TuneConfig as TuneConfig,
        sweep as sweep,
        transfer as transfer,
        tune as tune,
    )

# Each name is imported on its first use, as SPEC 1 of scientific Python proposes; `mup_*` from `mujax.optim`.
# No program needs all, and what trains and checks takes as long to import as the rest.
_NAMES: Final = {
    "mujax.check": "CoordCheck TransferCheck WiderIsBetter audit coord_check transfer_check wider_is_better",
    "mujax.core": "Correction MupModel mup_init",
    "mujax.core.depth": "residual_branch",
    "mujax.core.frontends": "Functional",
    "mujax.core.trace": "Finding",
    "mujax.rules": "interpolate",
    "mujax.spec": "MupSpec ParamSpec Parametrization",
    "mujax.train": "Batches training_run",
    "mujax.tune": "Study Sweep TransferConfig Transferred TuneConfig sweep transfer tune",
}
_HOME: Final = {name: module for module, names in _NAMES.items() for name in names.split()}
_MODULES: Final = ("check", "core", "data", "models", "optim", "rules", "spec", "train")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"mujax.{name}")
    if name in _HOME:
        found = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = found
        return found
    # Also `mup_lbfgs` and others without a µP: functions that raise an error with the reason.
    if name.startswith("mup_") and hasattr(optim := importlib.import_module("mujax.optim"), name):
        return getattr(optim, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    optimizers = [name for name in dir(importlib.import_module("mujax.optim")) if name.startswith("mup_")]
    return sorted({*globals(), *_HOME, *_MODULES, *optimizers})


class _Package(types.ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Importing the package `mujax.tune` would hide the function, which `mujax.tune` is for the user.
        super().__setattr__(
            name, value.tune if name == "tune" and isinstance(value, types.ModuleType) else value
        )


sys.modules[__name__].__class__ = _Package
