"""Muon in µP: hidden weights are orthogonalised, all other parameters go through its embedded Adam.

The orthogonalisation is optax's. Added are the axes that make up a matrix, read off the roles, and one
factor: Muon's own shape factor at the base's sizes, times the spectral rule.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from mujax import rules
from mujax.errors import MujaxError
from mujax.optim._alias import mup_adamw
from mujax.optim._arguments import checked
from mujax.optim._decay import Decay, Mask, decay_multiples, decayed_weights, strength
from mujax.optim._rescale import LrMults, check_spec, with_lr_multiples
from mujax.optim._scale import mup_scale_by_adam
from mujax.spec import MupSpec, Parametrization, ParamSpec, Role

Preconditioning = Literal["frobenius", "spectral", "aol", "schatten"]
Coefficients = (
    tuple[ArrayLike, ArrayLike, ArrayLike] | tuple[tuple[ArrayLike, ArrayLike, ArrayLike], ...] | str
)
DimensionNumbers = optax.contrib.MuonDimensionNumbers
DimensionNumbersOrFn = DimensionNumbers | Any | Callable[[Any], Any]

_NS_COEFFS: Final = (3.4445, -4.7750, 2.0315)


# ---- one matrix -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """A parameter as a batch of matrices.

    Attributes:
        param: the parameter.
        rows: the axes that make up the rows: fan-in.
        columns: the axes that make up the columns: fan-out.
    """

    param: ParamSpec
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def numbers(self) -> DimensionNumbers:
        """The same as optax writes it."""
        return DimensionNumbers(self.rows, self.columns)

    def _size(self, axes: Iterable[int], *, base: bool) -> int:
        sizes = self.param.base_shape if base else self.param.shape
        return math.prod(sizes[axis] for axis in axes)

    def _growth(self, axes: Sequence[int]) -> float:
        return self._size(axes, base=False) / max(1, self._size(axes, base=True))

    def sizes(self, *, base: bool) -> tuple[int, int]:
        """Numbers of rows and of columns."""
        return self._size(self.rows, base=base), self._size(self.columns, base=base)

    @property
    def batch_growth(self) -> float:
        """Number of matrices at the target over that at the base."""
        # Each layer has a product of its own.
        batch = set(range(len(self.param.shape))) - {*self.rows, *self.columns, *self.param.layers}
        return self._growth(sorted(batch))

    def lr_factor(self, parametrization: Parametrization) -> float:
        """The spectral rule: how the spectral norm of each matrix's update scales.

        The table's rule is for the whole product; each of a growing number of matrices in it has the norm
        that follows from its own two sides.
        """
        share = rules.mup_share(parametrization)
        return rules.lr_factor(self.param, parametrization, "spectral") * self.batch_growth ** (-share / 2)

    def gradient_norm(self, parametrization: Parametrization) -> float:
        """How the gradient's norm as a matrix scales; it is compared with epsilon."""
        sides = self._growth(self.rows) * self._growth(self.columns)
        return rules.gradient_scale(self.param, parametrization) * sides ** (
            rules.mup_share(parametrization) / 2
        )


def _shape_factor(matrix: _Matrix, parametrization: Parametrization, consistent_rms: ArrayLike | None) -> Any:
    """Muon's own factor, at the base's sizes as far as the parametrization is µP.

    At the target's sizes it would scale by width a second time, and by another rule than the spectral one.
    """

    def at(sizes: tuple[int, int]) -> Any:
        rows, columns = sizes
        # In jnp, so that it has the very bits that it has in optax.
        if consistent_rms is None:
            return jnp.sqrt(jnp.maximum(1, columns / rows))
        return jnp.sqrt(jnp.maximum(rows, columns)) * consistent_rms

    share = rules.mup_share(parametrization)
    if share == 1:
        return at(matrix.sizes(base=True))
    if share == 0:
        return at(matrix.sizes(base=False))
    return at(matrix.sizes(base=True)) ** share * at(matrix.sizes(base=False)) ** (1 - share)


# ---- which parameters are matrices ----------------------------------------------------------------------


def _by_role(param: ParamSpec) -> _Matrix | None:
    return _Matrix(param, param.fan_in, param.fan_out) if param.role == "hidden" else None


def _by_numbers(path: str, param: ParamSpec, numbers: DimensionNumbers) -> _Matrix:
    """The matrix of the given dimension numbers, if the roles allow it."""

    def axes(given: Sequence[int] | int) -> tuple[int, ...]:
        given = (given,) if isinstance(given, int) else tuple(given)
        return tuple(axis % len(param.shape) if param.shape else axis for axis in given)

    rows, columns = axes(numbers.reduction_axis), axes(numbers.output_axis)
    if not (rows and set(rows) <= set(param.fan_in) and set(columns) <= {*param.fan_out, *param.stack}):
        raise MujaxError(
            where=path,
            expected=f"reduction axes out of its fan-in {param.fan_in} and output axes out of its fan-out "
            f"{(*param.fan_out, *param.stack)}",
            got=numbers,
            remedy="correct them, or leave them out: the roles determine which axes make up a matrix",
        )
    return _Matrix(param, rows, columns)


def _is_numbers(node: Any) -> bool:
    return node is None or isinstance(node, DimensionNumbers)


class _Matrices:
    """The parameters that are matrices, by their roles or by given dimension numbers.

    Args:
        spec: the parameters.
        given: the user's dimension numbers; None for the roles.

    Attributes:
        parametrization: that of the spec.
    """

    def __init__(self, spec: MupSpec, given: DimensionNumbersOrFn | None) -> None:
        self.parametrization = check_spec(spec)
        if given is None:
            spec.require_roles("muon")
        self._spec, self._given = spec, given

    def of(self, tree: Any) -> Any:
        """The matrix of each leaf, None for a parameter that is no matrix."""
        spec = self._spec
        if self._given is None:
            return spec.match(tree, {path: _by_role(param) for path, param in spec.items()})
        paths = spec.match(tree, {path: path for path in spec})
        given = self._given(tree) if callable(self._given) and not _is_numbers(self._given) else self._given
        try:
            return jax.tree.map(
                lambda numbers, part: jax.tree.map(
                    lambda path: None if numbers is None else _by_numbers(path, spec[path], numbers), part
                ),
                given,
                paths,
                is_leaf=_is_numbers,
            )
        except MujaxError:
            raise
        except ValueError as error:
            raise MujaxError(
                where="weight_dimension_numbers",
                expected="a tree of MuonDimensionNumbers and None that is a prefix of the parameters'",
                got=f"another one ({error})",
                remedy="correct it, or leave it out: the roles determine which parameters are matrices",
            ) from error

    def labels(self, params: Any) -> Any:
        """`"muon"` or `"adam"` for each parameter, for `optax.partition`."""
        return jax.tree.map(lambda _, matrix: "adam" if matrix is None else "muon", params, self.of(params))

    def numbers(self, updates: Any) -> Any:
        """The dimension numbers of a tree that holds matrices only."""
        return jax.tree.map(lambda matrix: matrix.numbers, self.of(updates))


# ---- the transforms -------------------------------------------------------------------------------------


def _coefficients(given: Any, steps: ArrayLike) -> Any:
    """The coefficients themselves, also where the user gives the name of one of optax's presets."""
    if not isinstance(given, str):
        return given
    try:
        state = optax.contrib.muon(0.0, ns_coeffs=given, ns_steps=steps).init(jnp.zeros((1, 1)))
    except ValueError as error:
        raise MujaxError(
            where="ns_coeffs",
            expected="coefficients or the name of one of optax.contrib.muon's presets",
            got=f"{given!r} ({error})",
        ) from error
    return optax.tree.get(state, "ns_coeffs")


def _scaled_by(factors: Sequence[Callable[[_Matrix], Any]], updates: Any, matrices: Any) -> Any:
    """Multiplies each matrix by its factors, one after the other; a number that is exactly 1 is left out."""

    def scale(leaf: Any, matrix: _Matrix | None) -> Any:
        if matrix is None:
            return leaf
        for factor in factors:
            by = factor(matrix)
            leaf = leaf if isinstance(by, float) and by == 1 else by * leaf
        return leaf

    return jax.tree.map(scale, updates, matrices)


def _orthogonalised(
    matrices: _Matrices,
    ns_coeffs: Coefficients,
    ns_steps: ArrayLike,
    *args: Any,
    adaptive: bool,
    consistent_rms: ArrayLike | None,
    scale_eps: bool,
    **kwargs: Any,
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """The two transforms that the matrices go through: optax's scale_by_muon, and the factors.

    optax's gets gradients divided by the growth of their norm, so that an ε means the same to it.
    """
    parametrization = matrices.parametrization
    tx = optax.contrib.scale_by_muon(
        _coefficients(ns_coeffs, ns_steps),
        ns_steps,
        *args,
        adaptive=adaptive,
        weight_dimension_numbers=matrices.numbers,
        **kwargs,
    )

    def orthogonalise(updates: Any, state: optax.OptState, params: Any = None) -> tuple[Any, optax.OptState]:
        by = (lambda matrix: 1 / matrix.gradient_norm(parametrization),) if scale_eps else ()
        return tx.update(_scaled_by(by, updates, matrices.of(updates)), state, params)

    def dual(matrix: _Matrix) -> float:
        # An adaptive update is proportional to the nuclear norm of the gradient that optax gets to see,
        # summed over all matrices of the parameter.
        if not adaptive:
            return 1.0
        summed = matrix.batch_growth ** rules.mup_share(parametrization)
        return summed if scale_eps else summed * matrix.gradient_norm(parametrization)

    def scale(updates: Any, params: Any) -> Any:
        del params
        by = (
            lambda matrix: _shape_factor(matrix, parametrization, consistent_rms),
            lambda matrix: matrix.lr_factor(parametrization) / dual(matrix),
        )
        return _scaled_by(by, updates, matrices.of(updates))

    return optax.GradientTransformation(tx.init, orthogonalise), optax.stateless(scale)


def _spectral_rule(param: ParamSpec, parametrization: Parametrization) -> float:
    """The rule that a coupled decay of a hidden weight follows."""
    return _Matrix(param, param.fan_in, param.fan_out).lr_factor(parametrization)


@checked
def mup_scale_by_muon(
    spec: MupSpec,
    ns_coeffs: Coefficients = _NS_COEFFS,
    ns_steps: ArrayLike = 5,
    beta: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: Preconditioning = "frobenius",
    weight_dimension_numbers: DimensionNumbersOrFn | None = None,
    adam_b1: ArrayLike = 0.9,
    adam_b2: ArrayLike = 0.999,
    adam_eps_root: ArrayLike = 0.0,
    consistent_rms: ArrayLike | None = None,
    scale_eps: bool = True,
    lr_mults: LrMults | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates by Muon: hidden weights orthogonalised, all others by Adam, both in µP.

    A hidden weight is a matrix of its fan-in by its fan-out, whatever its rank: a convolution is one of
    (spatial sizes times features in, features out), an attention projection one of (features, heads times
    head size). Stack axes (experts, the layers of a scan) hold independent matrices. With :math:`M` the
    momentum, :math:`O` the Newton-Schulz iteration, :math:`c` Muon's own shape factor :math:`\sqrt{\max(1,
    n_{out}/n_{in})}` *at the base's sizes*:

    .. math::
        u = c_{base} \sqrt{r_{out} / r_{in}} \cdot O(M)

    So the update's spectral norm scales as the ratio of fan-out to fan-in does, for each matrix by itself,
    from what it is at the base. At the base this is optax's, bit for bit. Muon's shape factor at the target's
    sizes would scale by width a second time, and by another rule (:math:`\sqrt{r_{out}/r_{in}}` only above a
    ratio of 1; with `consistent_rms`, :math:`\sqrt{n}`, which grows): don't put one of your own behind this.

    Input, output and finite parameters and tied embeddings go through `mup_scale_by_adam`.

    Args:
        spec: the parameters, as `mup_init` describes them.
        ns_coeffs: coefficients of the Newton-Schulz iteration, or the name of one of optax's presets.
        ns_steps: number of its iterations.
        beta: decay rate of the momentum.
        eps: added to denominators, of the iteration's and of Adam's, in the base model's units.
        mu_dtype: dtype of the first moments; None keeps the parameter's.
        nesterov: Nesterov momentum, in Muon and in Adam.
        adaptive: multiply each parameter's update with the dual norm of its momentum, in the base's units.
        preconditioning: how the iteration's argument is normalised, as in optax.
        weight_dimension_numbers: a tree of `optax.contrib.MuonDimensionNumbers` and None, or a function from
            parameters to one, in place of the roles: to orthogonalise the parts of a fused kernel separately,
            or to leave a parameter to Adam. Reduction axes must be fan-in and output axes fan-out.
        adam_b1: decay rate of Adam's first moment.
        adam_b2: decay rate of Adam's second moment.
        adam_eps_root: added to Adam's denominator inside of the square root, in the base's units squared.
        consistent_rms: use :math:`c = \sqrt{\max(n_{in}, n_{out})}` times this, likewise at the base's sizes.
        scale_eps: False leaves ε the same for all parameters at all widths.
        lr_mults: multiples of the learning rate by role, or by glob of parameter paths; those that name the
            same parameter are multiplied. They may be traced values.

    Returns:
        A transform that keeps its state as `optax.contrib.muon` does.

    Raises:
        MujaxError: `weight_dimension_numbers` contradict the roles.
        SpecMismatchError: on `init` or `update`, when the tree is not the one that `spec` describes.

    Example:
        >>> from mujax import MupSpec, ParamSpec
        >>> kernel = ParamSpec((2, 8, 32), (2, 4, 4), (1,), (2,), stack=(0,), infinite=(1, 2))
        >>> spec = MupSpec({"kernel": kernel}, Parametrization((("mup", 1.0),)))
        >>> tx = mup_scale_by_muon(spec)
        >>> params = {"kernel": jnp.zeros((2, 8, 32))}
        >>> updates, _ = tx.update({"kernel": jnp.ones((2, 8, 32))}, tx.init(params))
        >>> updates["kernel"].shape
        (2, 8, 32)

    References:
        Yang, Simon and Bernstein, A Spectral Condition for Feature Learning, arXiv 2310.17813, Condition 1.
        Jordan, Muon: An optimizer for hidden layers in neural networks, 2024: the shape factor.
        Liu et al., Muon is Scalable for LLM Training, arXiv 2502.16982: `consistent_rms`.
        Bernstein and Newhouse, Old Optimizer, New Norm, arXiv 2409.20325: `adaptive`.
    """
    matrices = _Matrices(spec, weight_dimension_numbers)
    parts = _orthogonalised(
        matrices,
        ns_coeffs,
        ns_steps,
        beta,
        eps,
        mu_dtype,
        nesterov=nesterov,
        adaptive=adaptive,
        preconditioning=preconditioning,
        consistent_rms=consistent_rms,
        scale_eps=scale_eps,
    )
    adam = mup_scale_by_adam(
        spec, adam_b1, adam_b2, eps, adam_eps_root, mu_dtype, nesterov=nesterov, scale_eps=scale_eps
    )
    both = optax.partition({"muon": optax.chain(*parts), "adam": adam}, matrices.labels)
    return optax.with_extra_args_support(with_lr_multiples(both, spec, lr_mults))


@checked
def mup_muon(
    learning_rate: optax.ScalarOrSchedule,
    spec: MupSpec,
    ns_coeffs: Coefficients = _NS_COEFFS,
    ns_steps: ArrayLike = 5,
    beta: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Mask = None,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: Preconditioning = "frobenius",
    adam_b1: ArrayLike = 0.9,
    adam_b2: ArrayLike = 0.999,
    adam_eps_root: ArrayLike = 0.0,
    adam_weight_decay: optax.ScalarOrSchedule = 0.0,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    muon_weight_dimension_numbers: DimensionNumbersOrFn | None = None,
    consistent_rms: ArrayLike | None = None,
    scale_eps: bool = True,
    decay: Decay = "independent",
    decay_roles: Sequence[Role] | None = None,
    peak_learning_rate: ArrayLike | None = None,
    lr_mults: LrMults | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon in µP: `optax.contrib.muon` whose learning rates, tuned at one width, are right at every other.

    :math:`\theta \leftarrow \theta - \eta (u + \lambda \theta)`, with :math:`u` from `mup_scale_by_muon`: of
    hidden weights orthogonalised, with Muon's own shape factor as it is at the base and from there on by the
    spectral rule; of all others from Adam.

    optax sends every parameter of rank 2 to Muon, readout and embeddings too, and none of another rank. For
    the base model, this is `optax.contrib.muon` with `muon_weight_dimension_numbers` that agree with the
    roles, bit for bit.

    Args:
        learning_rate: the base model's learning rate, or a schedule of the step. Each parameter's µP
            factor multiplies its update, never the schedule.
        spec: the parameters, as `mup_init` describes them.
        ns_coeffs: coefficients of the Newton-Schulz iteration, or the name of one of optax's presets.
        ns_steps: number of its iterations.
        beta: decay rate of the momentum.
        eps: added to denominators, of the iteration's and of Adam's, in the base model's units.
        weight_decay: strength of the matrices' decay, multiplied with the learning rate and not with the µP
            factor.
        weight_decay_mask: the matrices that decay: a tree of booleans, or a function from parameters to one.
        mu_dtype: dtype of the first moments; None keeps the parameter's.
        nesterov: Nesterov momentum, in Muon and in Adam.
        adaptive: multiply each parameter's update with the dual norm of its momentum, in the base's units.
        preconditioning: how the iteration's argument is normalised, as in optax.
        adam_b1: decay rate of Adam's first moment.
        adam_b2: decay rate of Adam's second moment.
        adam_eps_root: added to Adam's denominator inside of the square root, in the base's units squared.
        adam_weight_decay: strength of the decay of the parameters that Adam updates.
        adam_learning_rate: Adam's learning rate; None for the same as Muon's.
        muon_weight_dimension_numbers: `weight_dimension_numbers` of `mup_scale_by_muon`.
        consistent_rms: Muon's other shape factor, likewise at the base's sizes.
        scale_eps: False leaves ε the same for all parameters at all widths.
        decay: `"independent"`, `"coupled"` or `"decoupled"`, as in `mup_adamw`.
        decay_roles: the roles that decay, such as `("hidden",)`; None for all.
        peak_learning_rate: the rate that a decoupled decay of both parts is relative to; None takes the
            peaks of their schedules.
        lr_mults: multiples of the learning rate by role, or by glob of parameter paths; those that name the
            same parameter are multiplied. They apply to the whole step, decay included, and may be traced.

    Returns:
        An optimizer whose state is that of `optax.contrib.muon`.

    Raises:
        MujaxError: `muon_weight_dimension_numbers` contradict the roles.
        SpecMismatchError: on `init` or `update`, when the tree is not the one that `spec` describes.

    References:
        Yang, Simon and Bernstein, A Spectral Condition for Feature Learning, arXiv 2310.17813, Condition 1.
        Jordan, Muon: An optimizer for hidden layers in neural networks, 2024.
    """
    matrices = _Matrices(spec, muon_weight_dimension_numbers)
    parts = _orthogonalised(
        matrices,
        ns_coeffs,
        ns_steps,
        beta,
        eps,
        mu_dtype,
        nesterov=nesterov,
        adaptive=adaptive,
        preconditioning=preconditioning,
        consistent_rms=consistent_rms,
        scale_eps=scale_eps,
    )
    multiples = decay_multiples(spec, decay, _spectral_rule, decay_roles)
    weight_decay = strength(weight_decay, decay, learning_rate, peak_learning_rate)
    muon = optax.chain(
        *parts,
        decayed_weights(spec, weight_decay, weight_decay_mask, multiples),
        with_lr_multiples(optax.scale_by_learning_rate(learning_rate), spec, lr_mults),
    )
    adam = mup_adamw(
        learning_rate if adam_learning_rate is None else adam_learning_rate,
        spec,
        adam_b1,
        adam_b2,
        eps,
        adam_eps_root,
        mu_dtype,
        adam_weight_decay,
        nesterov=nesterov,
        scale_eps=scale_eps,
        decay=decay,
        decay_roles=decay_roles,
        peak_learning_rate=peak_learning_rate,
        lr_mults=lr_mults,
    )
    return optax.partition({"muon": muon, "adam": adam}, matrices.labels)
