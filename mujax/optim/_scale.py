"""Adam's and SGD's transforms: optax's between µP factors on the gradients and on the updates.

They keep no state of their own. `mup_scale_by_adam(spec)` has the state of `optax.scale_by_adam()`, so a
checkpoint of one can be read as the other.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from mujax import rules
from mujax.optim._arguments import checked
from mujax.optim._rescale import LrMults, factors, grouped, lr_rule, one, rescaled, with_lr_multiples
from mujax.spec import MupSpec


@checked
def mup_scale_by_adam(
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
    r"""Rescales updates by Adam, with each parameter's ε and learning rate scaled by the rules of µP.

    For a parameter whose gradient scales as :math:`s` (`mujax.rules.gradient_scale`: its forward factor
    times :math:`1/r_{out}`) and whose learning rate scales as :math:`f` (`mujax.rules.lr_factor`), with
    :math:`\hat m` and :math:`\hat v` the bias-corrected moments of the gradient :math:`g`:

    .. math::
        u = f \cdot \frac{\hat m}{\sqrt{\hat v + s^2 \epsilon_{root}} + s \epsilon}

    This is :math:`f` times `optax.scale_by_adam` with ε of its own for each group of parameters whose
    gradients scale alike. The moments in the state are those of the gradient, as optax's are. Without an ε
    (`eps=None`) it is :math:`u = f \operatorname{atan2}(\hat m, \sqrt{\hat v})`, which is free of the
    gradient's scale.

    Args:
        spec: the parameters, as `mup_init` describes them.
        b1: decay rate of the first moment.
        b2: decay rate of the second moment.
        eps: added to the denominator outside of the square root, in the base model's units; None for the
            arc tangent of the fraction instead, which needs none.
        eps_root: added to the denominator inside of the square root, in the base model's units squared.
        mu_dtype: dtype of the first moment; None keeps the parameter's.
        nesterov: Nesterov momentum, which makes it NAdam.
        scale_eps: False leaves ε the same for all parameters at all widths, as microsoft/mup does.
        lr_mults: multiples of the learning rate by role, or by glob of parameter paths; those that name the
            same parameter are multiplied. They may be traced values.

    Returns:
        A transform whose state is that of `optax.scale_by_adam`.

    Raises:
        ParametrizationError: an unknown role, or a pattern that matches no parameter.
        SpecMismatchError: on `init` or `update`, when the tree is not the one that `spec` describes.

    Example:
        >>> import jax.numpy as jnp
        >>> from mujax import MupSpec, ParamSpec, Parametrization
        >>> kernel = ParamSpec((6, 4), (2, 4), fan_in=(0,), fan_out=(1,), infinite=(0,))
        >>> spec = MupSpec({"kernel": kernel}, Parametrization((("table3", 1.0),)))
        >>> tx = mup_scale_by_adam(spec)
        >>> params = {"kernel": jnp.zeros((6, 4))}
        >>> updates, _ = tx.update({"kernel": jnp.ones((6, 4))}, tx.init(params))
        >>> round(float(updates["kernel"][0, 0]), 4)
        0.3333

    References:
        Yang et al., Tensor Programs V, arXiv 2203.03466, Tables 3, 8 and 9; Appendix B.3 for ε.
        Everett et al., Scaling Exponents Across Parameterizations and Optimizers, arXiv 2407.05872, for the
        arc tangent.
    """
    scales = factors(spec, rules.gradient_scale if scale_eps else one)

    def adam(scale: float) -> optax.GradientTransformation:
        if eps is None:
            return _arc_tangent(b1, b2, eps_root * scale**2, mu_dtype, nesterov=nesterov)
        if scale == 1:
            return optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)
        return optax.scale_by_adam(b1, b2, eps * scale, eps_root * scale**2, mu_dtype, nesterov=nesterov)

    tx = rescaled(grouped(adam), spec, update=factors(spec, lr_rule("adam")), arguments=scales)
    return optax.with_extra_args_support(with_lr_multiples(tx, spec, lr_mults))


def _arc_tangent(
    b1: ArrayLike, b2: ArrayLike, eps_root: ArrayLike, mu_dtype: DTypeLike | None, *, nesterov: bool
) -> optax.GradientTransformation:
    """Adam with atan2 in place of the fraction; optax keeps the moments."""
    moments = optax.scale_by_adam(b1, b2, 1.0, 0.0, mu_dtype, nesterov=nesterov)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        new_state: Any = moments.update(updates, state, params)[1]
        count = new_state.count
        mu = optax.tree.bias_correction(new_state.mu, b1, optax.safe_increment(count) if nesterov else count)
        nu = optax.tree.bias_correction(new_state.nu, b2, count)
        if nesterov:
            own = optax.tree.bias_correction(updates, b1, count)
            mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, mu, own)
        turned = jax.tree.map(
            lambda m, v, g: jnp.arctan2(m, jnp.sqrt(v + eps_root)).astype(g.dtype), mu, nu, updates
        )
        return turned, new_state

    return optax.GradientTransformation(moments.init, update)


@checked
def mup_scale_by_sgd(
    spec: MupSpec,
    momentum: ArrayLike | None = None,
    nesterov: bool = False,
    accumulator_dtype: DTypeLike | None = None,
    *,
    lr_mults: LrMults | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates by each parameter's SGD learning rate, after momentum if there is any.

    With :math:`f` the learning rate's factor (`mujax.rules.lr_factor`) and :math:`\mu` the momentum:

    .. math::
        t \leftarrow g + \mu t, \qquad u = f \cdot t \quad\text{or, Nesterov,}\quad u = f \cdot (g + \mu t)

    It is linear in the gradient, so µP factors commute with momentum. For weight decay that runs through
    the momentum, as in PyTorch's SGD and in microsoft/mup's MuSGD, put the parts in this order:
    `optax.chain(mup_scale_by_sgd(spec), optax.add_decayed_weights(λ), optax.trace(μ),
    optax.scale_by_learning_rate(η))`.

    Args:
        spec: the parameters, as `mup_init` describes them.
        momentum: decay rate of the accumulated gradients; None for none.
        nesterov: Nesterov momentum.
        accumulator_dtype: dtype of the accumulated gradients; None keeps the parameter's.
        lr_mults: multiples of the learning rate by role, or by glob of parameter paths; those that name the
            same parameter are multiplied. They may be traced values.

    Returns:
        A transform whose state is that of `optax.trace`, or empty without momentum.

    Raises:
        SpecMismatchError: on `init` or `update`, when the tree is not the one that `spec` describes.

    Reference:
        Yang et al., Tensor Programs V, arXiv 2203.03466, Tables 3, 8 and 9.
    """
    momenta = optax.identity() if momentum is None else optax.trace(momentum, nesterov, accumulator_dtype)
    tx = rescaled(momenta, spec, update=factors(spec, lr_rule("sgd")))
    return optax.with_extra_args_support(with_lr_multiples(tx, spec, lr_mults))
