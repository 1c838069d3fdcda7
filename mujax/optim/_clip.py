"""Norms over all parameters, in units that depend neither on the table of µP nor on the width.

A sum over parameters of different roles compares their units. The gradient with respect to a parameter that
is multiplied by a constant in the forward pass contains that constant, so the plain norm differs between the
equivalent Tables 3, 8 and 9, and in Table 3 it grows with width.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Final

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from mujax import rules
from mujax.optim._arguments import checked
from mujax.optim._rescale import check_spec, factors, lr_rule, multiply
from mujax.spec import MupSpec

_TABLE_8: Final = "mup"


def _to_table_8(spec: MupSpec) -> dict[str, float]:
    """The factor that turns each gradient into the one with respect to Table 8's parameter.

    A parameter w that the forward pass multiplies with f and Table 8's w₈, multiplied with f₈, are the same
    weight where f·w = f₈·w₈. For the share of `"sp"` in the parametrization there is no other table.
    """
    table_8 = rules.interpolate("sp", _TABLE_8, min(1.0, rules.mup_share(check_spec(spec))))
    return factors(
        spec,
        lambda param, parametrization: (
            rules.forward_factor(param, table_8) / rules.forward_factor(param, parametrization)
        ),
    )


def _norm(tree: Any, by: Any) -> Float[Array, ""]:
    """The norm of the tree with its leaves multiplied by those of `by`; makes no multiplied tree."""
    if all(factor == 1 for factor in jax.tree.leaves(by)):
        return optax.tree.norm(tree)
    squares = jax.tree.map(lambda leaf, by: by**2 * optax.tree.norm(leaf, squared=True), tree, by)
    return jnp.sqrt(functools.reduce(jnp.add, jax.tree.leaves(squares)))


@checked
def mup_global_norm(spec: MupSpec, gradients: Any) -> Float[Array, ""]:
    r"""The norm of all gradients together, in Table 8's units: the one to log and to compare between widths.

    With :math:`g_l` the gradient of parameter l, :math:`f_l` the constant that its product has in the forward
    pass, and :math:`f_l^{(8)}` the one that it has in Table 8 (`parametrization="mup"`):

    .. math::
        \lVert g \rVert = \sqrt{\textstyle\sum_l (f_l^{(8)} / f_l)^2 \lVert g_l \rVert^2}

    In Table 8, and for the base model in any table, this is `optax.tree.norm`, bit for bit.

    Args:
        spec: the parameters, as `mup_init` describes them.
        gradients: gradients of these parameters.

    Raises:
        SpecMismatchError: the tree is not the one that `spec` describes.

    Example:
        >>> from mujax import MupSpec, ParamSpec, Parametrization
        >>> readout = ParamSpec((12, 3), (4, 3), fan_in=(0,), fan_out=(1,), infinite=(0,))
        >>> spec = MupSpec({"readout": readout}, Parametrization((("table3", 1.0),)))
        >>> round(float(mup_global_norm(spec, {"readout": jnp.ones((12, 3))})), 4)  # 6, were it Table 8's
        2.0

    Reference:
        Yang et al., Tensor Programs V, arXiv 2203.03466, Tables 3, 8 and 9 and Appendix B.3.
    """
    return _norm(gradients, spec.match(gradients, _to_table_8(spec), what="gradients"))


@checked
def mup_clip_by_global_norm(spec: MupSpec, max_norm: ArrayLike) -> optax.GradientTransformation:
    r"""Clips gradients by their global norm, measured alike in every parametrization and at every width.

    .. math::
        g_l \leftarrow g_l \cdot \min(1, c / \lVert g \rVert)

    with the norm of `mup_global_norm`. In Table 8 (`parametrization="mup"`) this is
    `optax.clip_by_global_norm`, bit for bit; elsewhere it clips the steps that it would clip there, so that
    Tables 3, 8 and 9 stay the same training run. It belongs in front of the optimizer.

    Args:
        spec: the parameters, as `mup_init` describes them.
        max_norm: the largest norm that passes unclipped, tuned on the base model.

    Returns:
        A transform whose state is that of `optax.clip_by_global_norm`: empty.

    Raises:
        SpecMismatchError: on `update`, when the tree is not the one that `spec` describes.

    Example:
        >>> import mujax
        >>> from mujax import MupSpec, ParamSpec, Parametrization
        >>> readout = ParamSpec((12, 3), (4, 3), fan_in=(0,), fan_out=(1,), infinite=(0,))
        >>> spec = MupSpec({"readout": readout}, Parametrization((("table3", 1.0),)))
        >>> tx = optax.chain(mup_clip_by_global_norm(spec, 1.0), mujax.mup_adam(1e-3, spec))

    References:
        Yang et al., Tensor Programs V, arXiv 2203.03466, Tables 3, 8 and 9.
        Pascanu et al., On the difficulty of training recurrent neural networks, arXiv 1211.5063.
    """
    to_table_8 = _to_table_8(spec)

    def update(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        del params
        norm = _norm(updates, spec.match(updates, to_table_8, what="updates"))
        small = jnp.squeeze(norm < max_norm)
        # A select and not a factor of at most 1: gradients that are not clipped keep their bits.
        return jax.tree.map(
            lambda u: jax.lax.select(small, u, ((u / norm.astype(u.dtype)) * max_norm).astype(u.dtype)),
            updates,
        )

    return optax.stateless(update)


@checked
def mup_normalize(spec: MupSpec) -> optax.GradientTransformation:
    r"""Divides gradients by their global norm, for steps and perturbations of a length that suits all widths.

    With :math:`f_l` the factor of parameter l's learning rate in SGD (`mujax.rules.lr_factor`):

    .. math::
        u_l = f_l \, g_l / \sqrt{\textstyle\sum_k f_k \lVert g_k \rVert^2}

    This is the steepest direction in the metric that µP's SGD descends in: each layer's share of it is
    independent of width, and it is the same in Tables 3, 8 and 9. For the base model it is
    `optax.contrib.normalize`, bit for bit. Its use is sharpness-aware minimisation, where the plain one
    comes to perturb only some of the layers as width grows (in Table 3 the readout, in Table 8 the hidden
    weights):

        optax.contrib.sam(mup_sgd(lr, spec), optax.chain(mup_normalize(spec), optax.sgd(rho)))

    Args:
        spec: the parameters, as `mup_init` describes them.

    Returns:
        A transform whose state is that of `optax.contrib.normalize`: empty.

    Raises:
        SpecMismatchError: on `update`, when the tree is not the one that `spec` describes.

    Example:
        >>> from mujax import MupSpec, ParamSpec, Parametrization
        >>> readout = ParamSpec((12, 3), (3, 3), fan_in=(0,), fan_out=(1,), infinite=(0,))
        >>> spec = MupSpec({"readout": readout}, Parametrization((("mup", 1.0),)))
        >>> tx = mup_normalize(spec)
        >>> gradients = {"readout": jnp.ones((12, 3))}
        >>> updates, _ = tx.update(gradients, tx.init(gradients))
        >>> float(updates["readout"][0, 0])  # 4 / sqrt(4 · 36)
        0.3333333432674408

    References:
        Haas et al., µP²: Effective Sharpness Aware Minimization Requires Layerwise Perturbation Scaling,
        arXiv 2411.00075.
        Foret et al., Sharpness-Aware Minimization, arXiv 2010.01412.
    """
    sgd = factors(spec, lr_rule("sgd"))

    def update(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        del params
        rates = spec.match(updates, sgd, what="updates")
        norm = _norm(updates, jax.tree.map(math.sqrt, rates))
        return multiply(jax.tree.map(lambda u: u / norm, updates), rates)

    return optax.stateless(update)
