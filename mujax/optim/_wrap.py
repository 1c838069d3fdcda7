"""`mup_wrap`: any optax transform, the user's own too, between the µP factors of its family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import optax

from mujax import rules
from mujax.errors import ParametrizationError
from mujax.optim._arguments import checked
from mujax.optim._probe import behaviour, check, check_plain
from mujax.optim._rescale import LrMults, Rule, factors, lr_rule, one, rescaled, with_lr_multiples
from mujax.spec import MupSpec, Parametrization, ParamSpec


def _gradient_norm(param: ParamSpec, parametrization: Parametrization) -> float:
    return rules.gradient_scale(param, parametrization) * rules.norm_scale(param, parametrization)


_GRADIENT: Final[Mapping[rules.Family, Rule]] = {
    "sgd": one,
    "adam": rules.gradient_scale,
    "normalized": rules.gradient_scale,
    "normalized_gradient": _gradient_norm,
    "spectral": _gradient_norm,
}
"""The scale that gradients are divided by, for an ε to mean the same at each width."""

_PARAM: Final[Mapping[rules.Family, Rule]] = {
    **dict.fromkeys(rules.FAMILIES, one),
    "normalized": rules.param_scale,
}
"""The same for parameters: a transform that reads their norm has an ε for it, and its own step at norm 0."""


@checked
def mup_wrap(
    tx: optax.GradientTransformation,
    spec: MupSpec,
    family: rules.Family | None = None,
    *,
    scale_eps: bool = True,
    lr_mults: LrMults | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Puts any optax transform between the µP factors of its family.

    `tx` turns gradients into updates: `optax.scale_by_lion()`, `optax.adagrad(lr)`, your own. Clipping goes
    before it, weight decay after it, and transforms that keep their own copy of the parameters
    (`optax.lookahead`, `optax.contrib.schedule_free`) around it. For optax's own optimizers there is
    `mujax.mup_<name>`, which knows the family.

    `tx` is run for a few steps on small matrices, and transforms that would scale wrongly with width are
    refused: weight decay, an L2 gradient, clipping by the global norm, a transform of another family, an
    optimizer that finds its own learning rate, µP factors inside of µP factors. A transform that can't be run
    so, for instance because it needs extra arguments, is not checked.

    Args:
        tx: the transform; extra arguments of its `update` are passed on.
        spec: the parameters, as `mup_init` describes them.
        family: the kind of its updates. `"sgd"`: linear in the gradient. `"adam"`: free of the gradient's
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
        ParametrizationError: an unknown family, a `tx` of another family, or a pattern that matches no
            parameter.
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
    check_plain(tx, spec)
    if family is None:
        seen = behaviour(tx, spec)
        raise ParametrizationError(
            where="mup_wrap",
            expected=f"family to be one of {', '.join(map(repr, rules.FAMILIES))}",
            got="none",
            remedy="pass that of tx" + (f"; it behaves like {seen!r}" if seen else ""),
        )
    family = rules.family(family)
    lr = factors(spec, lr_rule(family))
    gradient = factors(spec, _GRADIENT[family] if scale_eps else one)
    own = factors(spec, _PARAM[family] if scale_eps else one)
    wrapped = rescaled(
        tx,
        spec,
        gradient={path: 1 / scale for path, scale in gradient.items()},
        params={path: 1 / scale for path, scale in own.items()} if set(own.values()) != {1.0} else {},
        update={path: factor * own[path] for path, factor in lr.items()},
    )
    check(tx, spec, family, rescaled=set(gradient.values()) != {1.0})
    return optax.with_extra_args_support(with_lr_multiples(wrapped, spec, lr_mults))
