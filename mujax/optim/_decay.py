"""Weight decay with an explicit rule for width and learning rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from mujax import rules
from mujax.errors import ConfigError
from mujax.optim._arguments import checked
from mujax.optim._rescale import Factors, Rule, factors, lr_rule, rescaled
from mujax.spec import ROLES, MupSpec, Role

Decay = Literal["independent", "coupled", "decoupled"]
DECAYS: Final[tuple[Decay, ...]] = get_args(Decay)

Mask = Any | Callable[[Any], Any] | None
"""The parameters that decay: a tree of booleans, or a function from parameters to one; None for all."""

# Longer than any warm-up; a schedule is looked at this far to find its peak.
PEAK_WITHIN: Final = 2**17


def decay_multiples(
    spec: MupSpec,
    decay: str,
    lr: Rule | None,
    decay_roles: Sequence[Role] | None,
) -> dict[str, float]:
    """The factor on each parameter's decay per step, over learning rate times weight decay.

    Args:
        spec: the parameters.
        decay: one of `DECAYS`.
        lr: the rule of the learning rate, which `"coupled"` follows.
        decay_roles: the roles that decay; None for all.

    Raises:
        ConfigError: `"coupled"` without a rule to follow.
        RoleError: `decay_roles`, and the spec's target has its base's own widths.
    """
    if decay == "coupled" and lr is None:
        raise ConfigError(
            where='decay="coupled"',
            expected="the family of the optimizer, whose learning rates the decay follows",
            got="none",
            remedy=f"pass family=, one of {', '.join(map(repr, rules.FAMILIES))}",
        )
    roles = ROLES if decay_roles is None else decay_roles
    if decay_roles is not None:
        spec.require_roles("decay_roles")
    rule = lr if decay == "coupled" and lr is not None else rules.decay_factor
    multiples = factors(spec, rule)
    return {path: multiple if spec[path].role in roles else 0.0 for path, multiple in multiples.items()}


def peak(learning_rate: optax.ScalarOrSchedule | None) -> Any:
    """The learning rate itself, or the highest that a schedule reaches within `PEAK_WITHIN` steps.

    Raises:
        ConfigError: no learning rate, or a schedule that can't be evaluated for many steps at once.
    """
    if learning_rate is None:
        raise ConfigError(
            where='decay="decoupled"',
            expected="the base learning rate, which the decay is freed from",
            got="None",
            remedy="pass learning_rate, or peak_learning_rate",
        )
    if not callable(learning_rate):
        return learning_rate
    try:
        values = jax.vmap(learning_rate)(jnp.arange(PEAK_WITHIN + 1))
    except Exception as error:
        raise ConfigError(
            where='decay="decoupled"',
            expected=f"a schedule that can be evaluated for all of its first {PEAK_WITHIN} steps at once",
            got=f"one that raises {type(error).__name__}",
            remedy="give its highest learning rate: peak_learning_rate=...",
        ) from error
    highest = jnp.max(values)
    return highest if isinstance(highest, Tracer) else float(highest)


def strength(
    weight_decay: optax.ScalarOrSchedule,
    decay: str,
    learning_rate: optax.ScalarOrSchedule | None,
    peak_learning_rate: Any = None,
) -> optax.ScalarOrSchedule:
    """The weight decay in front of a learning rate, for each mode.

    `"decoupled"` divides it by the base learning rate, so that the product with the schedule is λ times
    the schedule's shape: 1 where the learning rate is at its peak.
    """
    if decay != "decoupled":
        return weight_decay
    base = peak(learning_rate) if peak_learning_rate is None else peak_learning_rate
    inverse = _inverse(base)
    if callable(weight_decay):
        return lambda step: weight_decay(step) * inverse
    return weight_decay * inverse


def _inverse(base: Any) -> Any:
    """1 / base; 0 for a learning rate of 0, whose shape is 0 at every step."""
    if isinstance(base, jax.Array):
        return jnp.where(base == 0, 0.0, 1 / jnp.where(base == 0, 1.0, base))
    return 1 / base if base else 0.0


def is_zero(weight_decay: Any) -> bool:
    """Whether the weight decay is known to be 0."""
    if weight_decay is None:
        return True
    if callable(weight_decay) or isinstance(weight_decay, Tracer):
        return False
    return not np.any(weight_decay)


def decayed_weights(
    spec: MupSpec, weight_decay: optax.ScalarOrSchedule, mask: Mask, multiples: Factors
) -> optax.GradientTransformation:
    """`optax.add_decayed_weights` with a multiple for each parameter."""
    tx = optax.add_decayed_weights(weight_decay, mask)
    return (
        tx if all(multiple == 1 for multiple in multiples.values()) else rescaled(tx, spec, params=multiples)
    )


@checked
def mup_add_decayed_weights(
    spec: MupSpec,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    *,
    decay: Decay = "independent",
    decay_roles: Sequence[Role] | None = None,
    family: rules.Family | None = None,
    learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformation:
    r"""Adds decayed parameters to the updates, for a chain: after the µP factor, before the learning rate.

    With :math:`\eta_t` the learning rate at step :math:`t` that `optax.scale_by_learning_rate` applies
    afterwards, and :math:`f` a parameter's own factor (`mujax.rules.lr_factor`), a step shrinks it by

    .. math::
        \eta_t \lambda \theta \quad\text{(independent)}, \qquad
        f \eta_t \lambda \theta \quad\text{(coupled)}, \qquad
        \frac{\eta_t}{\max_t \eta_t} \lambda \theta \quad\text{(decoupled)}

    Args:
        spec: the parameters, as `mup_init` describes them.
        weight_decay: :math:`\lambda`, or a schedule of the step.
        mask: the parameters that decay: a tree of booleans, or a function from parameters to one.
        decay: `"independent"`: learning rate times λ does not depend on width, as in microsoft/mup.
            `"coupled"`: it has the width's factor of the learning rate, as a µP factor around
            `optax.adamw` has, which differs from table to table: with it, Tables 3, 8 and 9 are not the same
            training run. `"decoupled"`: λ is multiplied with the schedule's shape alone, which is 1
            where the schedule is at its peak, so that a warm-up from 0 warms the decay up as well.
        decay_roles: the roles that decay, such as `("hidden", "output")`; None for all.
        family: the optimizer's family, whose factor `"coupled"` follows.
        learning_rate: for `"decoupled"`, the rate that ends the chain: a number, or a schedule, whose peak is
            its highest value within its first 131,072 steps. Give the peak as a number if it is reached
            later.

    Returns:
        A transform whose state is that of `optax.add_decayed_weights`.

    Raises:
        ParametrizationError: an unknown mode, role or family.
        ConfigError: `"coupled"` without a family, `"decoupled"` without a learning rate.
        SpecMismatchError: on `update`, when the tree is not the one that `spec` describes.

    Example:
        >>> import jax.numpy as jnp
        >>> from mujax import MupSpec, ParamSpec, Parametrization
        >>> kernel = ParamSpec((6, 6), (2, 2), fan_in=(0,), fan_out=(1,), infinite=(0, 1))
        >>> spec = MupSpec({"kernel": kernel}, Parametrization((("mup", 1.0),)))
        >>> tx = mup_add_decayed_weights(spec, 0.3, decay="coupled", family="adam")
        >>> params = {"kernel": jnp.ones((6, 6))}
        >>> updates, _ = tx.update({"kernel": jnp.zeros((6, 6))}, tx.init(params), params)
        >>> round(float(updates["kernel"][0, 0]), 4)
        0.1

    References:
        Yang et al., Tensor Programs V, arXiv 2203.03466, Appendix B.3: decay transfers if it does not
        depend on width.
        Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101: `"decoupled"`.
    """
    multiples = decay_multiples(spec, decay, None if family is None else lr_rule(family), decay_roles)
    return decayed_weights(spec, strength(weight_decay, decay, learning_rate), mask, multiples)
