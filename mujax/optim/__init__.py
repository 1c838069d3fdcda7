"""optax transforms in µP: per-parameter learning rates and ε, read off a `MupSpec`."""

from collections.abc import Callable
from typing import NoReturn

from mujax.optim._alias import mup_adam as mup_adam, mup_adamw as mup_adamw, mup_sgd as mup_sgd
from mujax.optim._clip import (
    mup_clip_by_global_norm as mup_clip_by_global_norm,
    mup_global_norm as mup_global_norm,
    mup_normalize as mup_normalize,
)
from mujax.optim._decay import mup_add_decayed_weights as mup_add_decayed_weights
from mujax.optim._lookup import optimizer as optimizer
from mujax.optim._muon import mup_muon as mup_muon, mup_scale_by_muon as mup_scale_by_muon
from mujax.optim._optimizers import (
    mup_acprop as mup_acprop,
    mup_adabelief as mup_adabelief,
    mup_adadelta as mup_adadelta,
    mup_adafactor as mup_adafactor,
    mup_adagrad as mup_adagrad,
    mup_adamax as mup_adamax,
    mup_adamaxw as mup_adamaxw,
    mup_adan as mup_adan,
    mup_ademamix as mup_ademamix,
    mup_adopt as mup_adopt,
    mup_amsgrad as mup_amsgrad,
    mup_fromage as mup_fromage,
    mup_lamb as mup_lamb,
    mup_lars as mup_lars,
    mup_lion as mup_lion,
    mup_madgrad as mup_madgrad,
    mup_nadam as mup_nadam,
    mup_nadamw as mup_nadamw,
    mup_noisy_sgd as mup_noisy_sgd,
    mup_novograd as mup_novograd,
    mup_optimistic_adam as mup_optimistic_adam,
    mup_optimistic_adam_v2 as mup_optimistic_adam_v2,
    mup_optimistic_gradient_descent as mup_optimistic_gradient_descent,
    mup_radam as mup_radam,
    mup_rmsprop as mup_rmsprop,
    mup_rprop as mup_rprop,
    mup_scale_by_acprop as mup_scale_by_acprop,
    mup_scale_by_adadelta as mup_scale_by_adadelta,
    mup_scale_by_adamax as mup_scale_by_adamax,
    mup_scale_by_adan as mup_scale_by_adan,
    mup_scale_by_ademamix as mup_scale_by_ademamix,
    mup_scale_by_adopt as mup_scale_by_adopt,
    mup_scale_by_amsgrad as mup_scale_by_amsgrad,
    mup_scale_by_belief as mup_scale_by_belief,
    mup_scale_by_factored_rms as mup_scale_by_factored_rms,
    mup_scale_by_lion as mup_scale_by_lion,
    mup_scale_by_madgrad as mup_scale_by_madgrad,
    mup_scale_by_novograd as mup_scale_by_novograd,
    mup_scale_by_optimistic_gradient as mup_scale_by_optimistic_gradient,
    mup_scale_by_radam as mup_scale_by_radam,
    mup_scale_by_rms as mup_scale_by_rms,
    mup_scale_by_rprop as mup_scale_by_rprop,
    mup_scale_by_rss as mup_scale_by_rss,
    mup_scale_by_sign as mup_scale_by_sign,
    mup_scale_by_simplified_ademamix as mup_scale_by_simplified_ademamix,
    mup_scale_by_sm3 as mup_scale_by_sm3,
    mup_scale_by_stddev as mup_scale_by_stddev,
    mup_scale_by_trust_ratio as mup_scale_by_trust_ratio,
    mup_scale_by_yogi as mup_scale_by_yogi,
    mup_schedule_free_adamw as mup_schedule_free_adamw,
    mup_schedule_free_sgd as mup_schedule_free_sgd,
    mup_sign_sgd as mup_sign_sgd,
    mup_signum as mup_signum,
    mup_simplified_ademamix as mup_simplified_ademamix,
    mup_sm3 as mup_sm3,
    mup_sophia as mup_sophia,
    mup_yogi as mup_yogi,
    refused,
)
from mujax.optim._registry import OPTIMIZERS as OPTIMIZERS
from mujax.optim._scale import mup_scale_by_adam as mup_scale_by_adam, mup_scale_by_sgd as mup_scale_by_sgd
from mujax.optim._wrap import mup_wrap as mup_wrap


def __getattr__(name: str) -> Callable[..., NoReturn]:
    # Optimizers without a µP: attributes whose call raises the reason; they are not part of the API.
    function = refused(name)
    if function is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return function
