"""The transforms: an optax transform between µP factors on the gradients and on the updates.

They keep no state of their own. `mup_scale_by_adam(spec)` has the state of `optax.scale_by_adam()`, so a
checkpoint of one can be read as the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import jax
import optax
from jax.typing import ArrayLike, DTypeLike

from mujax import rules
from mujax.errors import MujaxError, ParametrizationError
from mujax.infshape import MupSpec
from mujax.optim._match import leaf_paths, multiply
from mujax.optim._probe import check

# Families whose updates don't depend on the gradient's scale but for an epsilon, so that rescaling the
# gradient moves the epsilon and nothing else.
_WITH_EPSILON: Final[frozenset[rules.Family]] = frozenset({"adam"})


def _between_factors(
    tx: optax.GradientTransformation, spec: MupSpec, family: rules.Family, *, scale_eps: bool
) -> optax.GradientTransformationExtraArgs:
    """`tx` on gradients divided by their scale, its updates multiplied with the learning rate's factors."""
    _check_spec(spec)
    chosen = rules.parametrization(spec.parametrization)
    rescaled = scale_eps and family in _WITH_EPSILON
    to_base = {
        path: 1 / rules.gradient_scale(param, chosen) if rescaled else 1.0 for path, param in spec.items()
    }
    lr_factors = {path: rules.lr_factor(param, chosen, family) for path, param in spec.items()}
    tx = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> optax.OptState:
        leaf_paths(spec, params, "parameters")
        return tx.init(params)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        paths = leaf_paths(spec, updates, "updates")
        updates, state = tx.update(multiply(updates, paths, to_base), state, params, **extra_args)
        return multiply(updates, paths, lr_factors), state

    return optax.GradientTransformationExtraArgs(init, update)


def mup_scale_by_adam(
    spec: MupSpec,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
    scale_eps: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates by Adam, with each parameter's ε and learning rate scaled as µP asks for.

    For a parameter whose gradient scales as :math:`s` (`mujax.rules.gradient_scale`: its forward factor
    times :math:`1/r_{out}`) and whose learning rate scales as :math:`f` (`mujax.rules.lr_factor`), with
    :math:`\hat m` and :math:`\hat v` the bias-corrected moments of the gradient :math:`g`:

    .. math::
        u = f \cdot \frac{\hat m}{\sqrt{\hat v + s^2 \epsilon_{root}} + s \epsilon}

    This is :math:`f` times `optax.scale_by_adam` with ε of its own for each group of parameters whose
    gradients scale alike. The moments in the state are those of the gradient, as optax's are.

    Args:
        spec: what `mup_init` found out about the parameters.
        b1: decay rate of the first moment.
        b2: decay rate of the second moment.
        eps: added to the denominator outside of the square root, in the base model's units.
        eps_root: added to the denominator inside of the square root, in the base model's units squared.
        mu_dtype: dtype of the first moment; None keeps the parameter's.
        nesterov: Nesterov momentum, which makes it NAdam.
        scale_eps: False leaves ε the same for all parameters at all widths, as microsoft/mup does.

    Returns:
        A transform whose state is that of `optax.scale_by_adam`.

    Raises:
        SpecMismatchError: on `init` or `update`, when the tree is not the one that `spec` describes.

    Example:
        >>> import jax.numpy as jnp
        >>> from mujax.infshape import MupSpec, ParamSpec, Parametrization
        >>> kernel = ParamSpec((6, 4), (2, 4), fan_in=(0,), fan_out=(1,), infinite=(0,))
        >>> spec = MupSpec({"kernel": kernel}, Parametrization((("table3", 1.0),)))
        >>> tx = mup_scale_by_adam(spec)
        >>> params = {"kernel": jnp.zeros((6, 4))}
        >>> updates, _ = tx.update({"kernel": jnp.ones((6, 4))}, tx.init(params))
        >>> round(float(updates["kernel"][0, 0]), 4)
        0.3333

    Reference:
        Yang et al., Tensor Programs V, arXiv 2203.03466, Tables 3, 8 and 9; Appendix B.3 for ε.
    """
    _check_spec(spec)
    chosen = rules.parametrization(spec.parametrization)
    scales = {path: rules.gradient_scale(param, chosen) if scale_eps else 1.0 for path, param in spec.items()}

    def adam(scale: float) -> optax.GradientTransformation:
        if scale == 1:
            return optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)
        return optax.scale_by_adam(b1, b2, eps * scale, eps_root * scale**2, mu_dtype, nesterov=nesterov)

    return _between_factors(_by_group(adam, spec, scales), spec, "adam", scale_eps=False)


def _by_group(
    make: Callable[[float], optax.GradientTransformation], spec: MupSpec, scales: Mapping[str, float]
) -> optax.GradientTransformation:
    """One of several transforms for each leaf, by its scale, on a single `optax.ScaleByAdamState`."""

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        if not isinstance(state, optax.ScaleByAdamState):
            raise MujaxError(
                f"state: expected the ScaleByAdamState that init returned, got {type(state).__name__}."
            )
        leaves, structure = jax.tree.flatten(updates)
        moments = [structure.flatten_up_to(tree) for tree in (state.mu, state.nu)]
        mine = [scales[path] for path in leaf_paths(spec, updates, "updates")]
        done: list[Any] = [None] * len(leaves)
        count = state.count
        for scale in dict.fromkeys(mine) or (1.0,):
            group = [number for number, other in enumerate(mine) if other == scale]
            mu, nu = ([tree[number] for number in group] for tree in moments)
            part = optax.ScaleByAdamState(state.count, mu, nu)
            result: Any = make(scale).update([leaves[number] for number in group], part)
            out, (count, mu, nu) = result
            for number, *new in zip(group, out, mu, nu, strict=True):
                done[number] = new
        columns = zip(*done, strict=True) if done else ([], [], [])
        out, mu, nu = (structure.unflatten(column) for column in columns)
        return out, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(make(1.0).init, update)


def _check_spec(spec: MupSpec) -> None:
    if not isinstance(spec, MupSpec):
        raise MujaxError(
            f"spec: expected a MupSpec, got {type(spec).__name__}. Pass the spec of what mup_init returns."
        )


def mup_scale_by_sgd(
    spec: MupSpec,
    momentum: ArrayLike | None = None,
    nesterov: bool = False,
    accumulator_dtype: DTypeLike | None = None,
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
        spec: what `mup_init` found out about the parameters.
        momentum: decay rate of the accumulated gradients; None for none.
        nesterov: Nesterov momentum.
        accumulator_dtype: dtype of the accumulated gradients; None keeps the parameter's.

    Returns:
        A transform whose state is that of `optax.trace`, or empty without momentum.

    Raises:
        SpecMismatchError: on `init` or `update`, when the tree is not the one that `spec` describes.

    Reference:
        Yang et al., Tensor Programs V, arXiv 2203.03466, Tables 3, 8 and 9.
    """
    return _between_factors(
        optax.identity() if momentum is None else optax.trace(momentum, nesterov, accumulator_dtype),
        spec,
        "sgd",
        scale_eps=False,
    )


def mup_wrap(
    tx: optax.GradientTransformation,
    spec: MupSpec,
    family: rules.Family | None = None,
    *,
    scale_eps: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Puts any optax transform between the µP factors of its family.

    `tx` is what turns gradients into updates: `optax.scale_by_lion()`, `optax.adagrad(lr)`, your own. What
    belongs outside of it: clipping, before; weight decay, after; whatever keeps its own copy of the
    parameters (`optax.lookahead`, `optax.contrib.schedule_free`), around. Optimizers that normalise whole
    tensors (LARS, LAMB, Muon) are of neither family.

    `tx` is run for a few steps on single numbers, and what would scale wrongly with width is refused: weight
    decay, clipping by the global norm, a transform of another family, µP factors inside of µP factors. A
    transform that can't be run so, for instance as it needs extra arguments, is taken at its word.

    Args:
        tx: the transform; extra arguments of its `update` are passed on.
        spec: what `mup_init` found out about the parameters.
        family: `"adam"` for updates that don't depend on the gradient's scale, entry by entry (Adam, NAdam,
            RAdam, AdaBelief, Adagrad, RMSProp, AMSGrad, Yogi, Lion, sign), `"sgd"` for updates linear in it.
        scale_eps: divide gradients by the scale that µP gives them, so that an ε means the same at each
            width. It makes no difference to the family `"sgd"`, nor where there is no ε.

    Returns:
        A transform whose state is that of `tx`.

    Raises:
        ParametrizationError: no family of that name, or `tx` is not of that family.
        MujaxError: `tx` decays the weights, clips by the global norm, or has µP factors already.
        SpecMismatchError: on `init` or `update`, when the tree is not the one that `spec` describes.

    Example:
        >>> import optax
        >>> from mujax.infshape import MupSpec, ParamSpec, Parametrization
        >>> kernel = ParamSpec((6, 6), (2, 2), fan_in=(0,), fan_out=(1,), infinite=(0, 1))
        >>> spec = MupSpec({"kernel": kernel}, Parametrization((("mup", 1.0),)))
        >>> tx = optax.chain(
        ...     mup_wrap(optax.scale_by_lion(), spec, family="adam"),
        ...     optax.add_decayed_weights(0.1),
        ...     optax.scale_by_learning_rate(1e-3),
        ... )

    Reference:
        Yang et al., Tensor Programs V, arXiv 2203.03466, Appendix B.3: which optimizers scale alike.
    """
    if family is None:
        known = ", ".join(map(repr, rules.FAMILIES))
        raise ParametrizationError(
            f"mup_wrap: expected family to be one of {known}, got none. Say which tx is."
        )
    chosen = rules.family(family)
    wrapped = _between_factors(tx, spec, chosen, scale_eps=scale_eps)
    check(tx, spec, chosen, rescaled=scale_eps and chosen in _WITH_EPSILON)
    return wrapped
