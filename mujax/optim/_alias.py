"""Whole optimizers: each a chain of a µP transform with optax's own."""

from __future__ import annotations

from collections.abc import Sequence

import optax
from jax.typing import ArrayLike, DTypeLike

from mujax.optim._arguments import checked
from mujax.optim._decay import Decay, Mask, decay_multiples, decayed_weights, strength
from mujax.optim._rescale import LrMults, lr_rule, with_lr_multiples
from mujax.optim._scale import mup_scale_by_adam, mup_scale_by_sgd
from mujax.spec import MupSpec, Role


@checked
def mup_adam(
    learning_rate: optax.ScalarOrSchedule,
    spec: MupSpec,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike | None = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
    scale_eps: bool = True,
    lr_mults: LrMults | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam in µP: `optax.adam` whose learning rate, tuned at one width, is right at every other.

    :math:`\theta \leftarrow \theta - \eta u`, with :math:`u` from `mup_scale_by_adam`.

    Args:
        learning_rate: the base model's learning rate, or a schedule of the step. Each parameter's µP
            factor multiplies its update, never the schedule.
        spec: the parameters, as `mup_init` describes them.
        b1: decay rate of the first moment.
        b2: decay rate of the second moment.
        eps: added to the denominator outside of the square root; None for the arc tangent of the fraction.
        eps_root: added to the denominator inside of the square root.
        mu_dtype: dtype of the first moment; None keeps the parameter's.
        nesterov: Nesterov momentum, which makes it NAdam.
        scale_eps: False leaves ε the same for all parameters at all widths, as microsoft/mup does.
        lr_mults: multiples of the learning rate by role, or by glob of parameter paths; those that name the
            same parameter are multiplied. They may be traced values.

    Returns:
        An optimizer whose state is that of `optax.adam`.

    Raises:
        SpecMismatchError: on `init` or `update`, when the tree is not the one that `spec` describes.

    Reference:
        Yang et al., Tensor Programs V, arXiv 2203.03466, Tables 3, 8 and 9.
    """
    return optax.chain(
        mup_scale_by_adam(spec, b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov, scale_eps=scale_eps),
        with_lr_multiples(optax.scale_by_learning_rate(learning_rate), spec, lr_mults),
    )


@checked
def mup_adamw(
    learning_rate: optax.ScalarOrSchedule,
    spec: MupSpec,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike | None = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Mask = None,
    *,
    nesterov: bool = False,
    scale_eps: bool = True,
    decay: Decay = "independent",
    decay_roles: Sequence[Role] | None = None,
    peak_learning_rate: ArrayLike | None = None,
    lr_mults: LrMults | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW in µP: the decay comes after the µP factor, so that it is the same at every width.

    :math:`\theta \leftarrow \theta - \eta (u + \lambda \theta)`, with :math:`u` from `mup_scale_by_adam`. The
    fraction :math:`\eta\lambda` by which a parameter shrinks in a step has no µP factor: so it transfers, and
    microsoft/mup does the same. `optax.adamw` inside of a µP factor would scale it.

    Args:
        learning_rate: the base model's learning rate, or a schedule of the step. Each parameter's µP
            factor multiplies its update, never the schedule.
        spec: the parameters, as `mup_init` describes them.
        b1: decay rate of the first moment.
        b2: decay rate of the second moment.
        eps: added to the denominator outside of the square root; None for the arc tangent of the fraction.
        eps_root: added to the denominator inside of the square root.
        mu_dtype: dtype of the first moment; None keeps the parameter's.
        weight_decay: strength of the decay, or a schedule of the step; multiplied with the learning rate
            as in `optax.adamw`.
        mask: the parameters that decay: a tree of booleans, or a function from parameters to one.
        nesterov: Nesterov momentum, which makes it NAdamW.
        scale_eps: False leaves ε the same for all parameters at all widths, as microsoft/mup does.
        decay: `"independent"`: learning rate times decay does not depend on width. `"coupled"`: it has the
            parameter's µP factor. `"decoupled"`: the decay is multiplied with the schedule's shape alone,
            which is 1 at its peak. See `mup_add_decayed_weights`.
        decay_roles: the roles that decay, such as `("hidden", "output")`; None for all.
        peak_learning_rate: the rate that a decoupled decay is relative to; None takes the schedule's peak.
        lr_mults: multiples of the learning rate by role, or by glob of parameter paths; those that name the
            same parameter are multiplied. They apply to the whole step, decay included, and may be traced.

    Returns:
        An optimizer whose state is that of `optax.adamw`.

    Raises:
        ParametrizationError: an unknown mode or role, or a pattern that matches no parameter.
        SpecMismatchError: on `init` or `update`, when the tree is not the one that `spec` describes.

    References:
        Yang et al., Tensor Programs V, arXiv 2203.03466, Tables 3, 8 and 9.
        Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101.
    """
    multiples = decay_multiples(spec, decay, lr_rule("adam"), decay_roles)
    weight_decay = strength(weight_decay, decay, learning_rate, peak_learning_rate)
    return optax.chain(
        mup_scale_by_adam(spec, b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov, scale_eps=scale_eps),
        decayed_weights(spec, weight_decay, mask, multiples),
        with_lr_multiples(optax.scale_by_learning_rate(learning_rate), spec, lr_mults),
    )


@checked
def mup_sgd(
    learning_rate: optax.ScalarOrSchedule,
    spec: MupSpec,
    momentum: ArrayLike | None = None,
    nesterov: bool = False,
    accumulator_dtype: DTypeLike | None = None,
    *,
    lr_mults: LrMults | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD in µP: `optax.sgd` whose learning rate, tuned at one width, is right at every other.

    :math:`\theta \leftarrow \theta - \eta u`, with :math:`u` from `mup_scale_by_sgd`.

    Args:
        learning_rate: the base model's learning rate, or a schedule of the step. Each parameter's µP
            factor multiplies its update, never the schedule.
        spec: the parameters, as `mup_init` describes them.
        momentum: decay rate of the accumulated gradients; None for none.
        nesterov: Nesterov momentum.
        accumulator_dtype: dtype of the accumulated gradients; None keeps the parameter's.
        lr_mults: multiples of the learning rate by role, or by glob of parameter paths; those that name the
            same parameter are multiplied. They may be traced values.

    Returns:
        An optimizer whose state is that of `optax.sgd`.

    Raises:
        SpecMismatchError: on `init` or `update`, when the tree is not the one that `spec` describes.

    Reference:
        Yang et al., Tensor Programs V, arXiv 2203.03466, Tables 3, 8 and 9.
    """
    return optax.chain(
        mup_scale_by_sgd(spec, momentum, nesterov, accumulator_dtype),
        with_lr_multiples(optax.scale_by_learning_rate(learning_rate), spec, lr_mults),
    )
