"""Any optax transform, the user's own too, between the µP factors of its family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import optax

from mujax import rules
from mujax.errors import ParametrizationError
from mujax.optim._probe import behaviour, check, check_plain
from mujax.optim._rescale import LrMults, check_spec, factors, in_units, lr_rule, with_lr_multiples
from mujax.spec import MupSpec, Parametrization, ParamSpec

_Rule = Callable[[ParamSpec, Parametrization], float]


def _one(param: ParamSpec, chosen: Parametrization) -> float:
    del param, chosen
    return 1.0


def _gradient_norm(param: ParamSpec, chosen: Parametrization) -> float:
    return rules.gradient_scale(param, chosen) * rules.norm_scale(param, chosen)


_GRADIENT: Final[Mapping[rules.Family, _Rule]] = {
    "sgd": _one,
    "adam": rules.gradient_scale,
    "normalized": rules.gradient_scale,
    "normalized_gradient": _gradient_norm,
    "spectral": _gradient_norm,
}
"""What gradients are divided by, for an ε to mean the same at each width."""

_PARAM: Final[Mapping[rules.Family, _Rule]] = {
    **dict.fromkeys(rules.FAMILIES, _one),
    "normalized": rules.param_scale,
}
"""The same for parameters: what reads their norm has an ε for it, and a step of its own at a norm of 0."""


def mup_wrap(
    tx: optax.GradientTransformation,
    spec: MupSpec,
    family: rules.Family | None = None,
    *,
    scale_eps: bool = True,
    lr_mults: LrMults | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Puts any optax transform between the µP factors of its family.

    `tx` is what turns gradients into updates: `optax.scale_by_lion()`, `optax.adagrad(lr)`, your own. What
    belongs outside of it: clipping, before; weight decay, after; whatever keeps its own copy of the
    parameters (`optax.lookahead`, `optax.contrib.schedule_free`), around. For optax's own optimizers there is
    `mujax.mup_<name>`, which knows the family.

    `tx` is run for a few steps on small matrices, and what would scale wrongly with width is refused: weight
    decay, an L2 gradient, clipping by the global norm, a transform of another family, an optimizer that finds
    its own learning rate, µP factors inside of µP factors. A transform that can't be run so, for instance as
    it needs extra arguments, is taken at its word.

    Args:
        tx: the transform; extra arguments of its `update` are passed on.
        spec: what `mup_init` found out about the parameters.
        family: what its updates are like. `"sgd"`: linear in the gradient. `"adam"`: free of the gradient's
            scale, entry by entry (Adam, NAdam, RAdam, AdaBelief, Adagrad, RMSProp, AMSGrad, Yogi, Lion, sign;
            Shampoo or SOAP grafted to Adam, arXiv 2512.05620). `"normalized"`: proportional to the
            parameter's norm (LARS, LAMB, Adafactor). `"normalized_gradient"`: divided by the norm of the
            parameter's gradient (NovoGrad). `"spectral"`: singular values all equal (Muon, ungrafted Shampoo:
            arXiv 2409.20325).
        scale_eps: divide gradients by the scale that µP gives them, and for `"normalized"` parameters by
            theirs, so that an ε means the same at each width. It makes no difference to the family `"sgd"`,
            nor where there is no ε.
        lr_mults: multiples of the learning rate by role, or by glob of parameter paths; those that name the
            same parameter are multiplied. They may be traced values.

    Returns:
        A transform whose state is that of `tx`.

    Raises:
        ParametrizationError: no family of that name, `tx` is not of that family, a glob that matches nothing.
        MujaxError: `tx` decays the weights, clips by the global norm, has µP factors already, or has no
            learning rate that µP could scale.
        SpecMismatchError: on `init` or `update`, when the tree is not the one that `spec` describes.

    Example:
        >>> import optax
        >>> from mujax import MupSpec, ParamSpec, Parametrization
        >>> kernel = ParamSpec((6, 6), (2, 2), fan_in=(0,), fan_out=(1,), infinite=(0, 1))
        >>> spec = MupSpec({"kernel": kernel}, Parametrization((("mup", 1.0),)))
        >>> tx = optax.chain(
        ...     mup_wrap(optax.scale_by_lion(), spec, family="adam"),
        ...     optax.add_decayed_weights(0.1),
        ...     optax.scale_by_learning_rate(1e-3),
        ... )

    References:
        Yang et al., Tensor Programs V, arXiv 2203.03466, Appendix B.3: which optimizers scale alike.
        Yang, Simon and Bernstein, A Spectral Condition, arXiv 2310.17813: families that take norms.
        Qiu et al., Hyperparameter Transfer Enables Consistent Gains of Matrix-Preconditioned Optimizers,
        arXiv 2512.05620: Shampoo, whose family depends on grafting.
    """
    check_spec(spec)
    check_plain(tx, spec)
    if family is None:
        known = ", ".join(map(repr, rules.FAMILIES))
        seen = behaviour(tx, spec)
        raise ParametrizationError(
            f"mup_wrap: expected family to be one of {known}, got none. Say which tx is"
            + (f"; it behaves like {seen!r}." if seen else ".")
        )
    chosen = rules.family(family)
    lr = factors(spec, lr_rule(chosen))
    gradient = factors(spec, _GRADIENT[chosen] if scale_eps else _one)
    own = factors(spec, _PARAM[chosen] if scale_eps else _one)
    wrapped = in_units(
        tx,
        spec,
        gradient={path: 1 / scale for path, scale in gradient.items()},
        params={path: 1 / scale for path, scale in own.items()} if set(own.values()) != {1.0} else {},
        update={path: factor * own[path] for path, factor in lr.items()},
    )
    check(tx, spec, chosen, rescaled=set(gradient.values()) != {1.0})
    return optax.with_extra_args_support(with_lr_multiples(wrapped, spec, lr_mults))
