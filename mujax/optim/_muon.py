"""Muon: hidden weights as the matrices that they are, orthogonalised; everything else by its embedded Adam.

The orthogonalisation is optax's. What is added is which axes make up the matrix, read off the roles, and one
factor: Muon's own shape factor as it is at the base, times the spectral rule of how it goes on from there.
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
from mujax.optim._decay import Decay, decay_multiples, decayed_weights, strength
from mujax.optim._rescale import LrMults, check_spec, with_lr_multiples
from mujax.optim._scale import mup_scale_by_adam
from mujax.optim._tree import leaf_paths
from mujax.spec import MupSpec, Parametrization, ParamSpec, Role

Preconditioning = Literal["frobenius", "spectral", "aol", "schatten"]
Coefficients = (
    tuple[ArrayLike, ArrayLike, ArrayLike] | tuple[tuple[ArrayLike, ArrayLike, ArrayLike], ...] | str
)
DimensionNumbers = optax.contrib.MuonDimensionNumbers
DimensionNumbersOrFn = DimensionNumbers | Any | Callable[[optax.Params], Any]

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
        # Layers are no part of one product.
        batch = set(range(len(self.param.shape))) - {*self.rows, *self.columns, *self.param.layers}
        return self._growth(sorted(batch))

    def lr_factor(self, chosen: Parametrization) -> float:
        """The spectral rule: how the spectral norm of each matrix's update scales.

        The rule of the table is for the whole product; of a growing number of matrices in it, each has the
        norm that its own two sides ask for.
        """
        share = rules.mup_share(chosen)
        return rules.lr_factor(self.param, chosen, "spectral") * self.batch_growth ** (-share / 2)

    def gradient_norm(self, chosen: Parametrization) -> float:
        """How the gradient's norm as a matrix scales: what is compared with epsilon."""
        sides = self._growth(self.rows) * self._growth(self.columns)
        return rules.gradient_scale(self.param, chosen) * sides ** (rules.mup_share(chosen) / 2)


def _shape_factor(matrix: _Matrix, chosen: Parametrization, consistent_rms: ArrayLike | None) -> Any:
    """Muon's own factor, at the base's sizes as far as the parametrization is µP.

    At the target's sizes it would scale a second time, and otherwise, what the spectral rule scales already.
    """

    def at(sizes: tuple[int, int]) -> Any:
        rows, columns = sizes
        # In jnp, so that it has the very bits that it has in optax.
        if consistent_rms is None:
            return jnp.sqrt(jnp.maximum(1, columns / rows))
        return jnp.sqrt(jnp.maximum(rows, columns)) * consistent_rms

    share = rules.mup_share(chosen)
    if share == 1:
        return at(matrix.sizes(base=True))
    if share == 0:
        return at(matrix.sizes(base=False))
    return at(matrix.sizes(base=True)) ** share * at(matrix.sizes(base=False)) ** (1 - share)


# ---- which parameters are matrices ----------------------------------------------------------------------


def _by_role(path: str, param: ParamSpec) -> _Matrix | None:
    del path
    if param.role != "hidden":
        return None
    return _Matrix(param, param.fan_in, param.fan_out)


def _as_told(path: str, param: ParamSpec, numbers: DimensionNumbers) -> _Matrix:
    """The matrix that the user describes, if it is one that the roles allow."""

    def axes(given: Sequence[int] | int) -> tuple[int, ...]:
        given = (given,) if isinstance(given, int) else tuple(given)
        return tuple(axis % len(param.shape) if param.shape else axis for axis in given)

    rows, columns = axes(numbers.reduction_axis), axes(numbers.output_axis)
    if not (rows and set(rows) <= set(param.fan_in) and set(columns) <= {*param.fan_out, *param.stack}):
        raise MujaxError(
            f"{path}: expected reduction axes out of its fan-in {param.fan_in} and output axes out of its "
            f"fan-out {(*param.fan_out, *param.stack)}, got {numbers}. Correct them, or leave them out: the "
            "roles say which axes make up a matrix."
        )
    return _Matrix(param, rows, columns)


def _is_numbers(node: Any) -> bool:
    return node is None or isinstance(node, DimensionNumbers)


class _Matrices:
    """The parameters that are matrices, by what the roles or the user say.

    Args:
        spec: the parameters.
        told: what the user says; None for the roles.

    Attributes:
        chosen: the parametrization.
    """

    def __init__(self, spec: MupSpec, told: DimensionNumbersOrFn | None) -> None:
        self.chosen = check_spec(spec)
        if told is None:
            spec.require_roles("muon")
        self._spec, self._told = spec, told

    def of(self, tree: Any) -> list[_Matrix | None]:
        """The matrix of each leaf, None where it is none."""
        spec = self._spec
        paths = leaf_paths(spec, tree, "parameters")
        if self._told is None:
            return [_by_role(path, spec[path]) for path in paths]
        told = self._told(tree) if callable(self._told) and not _is_numbers(self._told) else self._told
        leaves: list[DimensionNumbers | None] = []
        try:
            jax.tree.map(
                lambda numbers, part: leaves.extend([numbers] * len(jax.tree.leaves(part))),
                told,
                tree,
                is_leaf=_is_numbers,
            )
        except ValueError as error:
            raise MujaxError(
                "weight_dimension_numbers: expected a tree of MuonDimensionNumbers and None that is a prefix "
                f"of the parameters' ({error}). Correct it, or leave it out: the roles say which parameters "
                "are matrices."
            ) from error
        return [
            None if numbers is None else _as_told(path, spec[path], numbers)
            for path, numbers in zip(paths, leaves, strict=True)
        ]

    def labels(self, params: Any) -> Any:
        """`"muon"` or `"adam"` for each parameter, for `optax.partition`."""
        names = ["adam" if matrix is None else "muon" for matrix in self.of(params)]
        return jax.tree.structure(params).unflatten(names)

    def numbers(self, updates: Any) -> Any:
        """The dimension numbers of a tree that holds matrices only."""
        found = [matrix.numbers for matrix in self.of(updates) if matrix is not None]
        return jax.tree.structure(updates).unflatten(found)


# ---- the transforms -------------------------------------------------------------------------------------


def _coefficients(given: Any, steps: ArrayLike) -> Any:
    """The coefficients themselves, also where the user gives the name of one of optax's presets."""
    if not isinstance(given, str):
        return given
    try:
        state = optax.contrib.muon(0.0, ns_coeffs=given, ns_steps=steps).init(jnp.zeros((1, 1)))
    except ValueError as error:
        raise MujaxError(
            "ns_coeffs: expected coefficients or the name of one of optax.contrib.muon's presets, got "
            f"{given!r} ({error})."
        ) from error
    return optax.tree.get(state, "ns_coeffs")


def _each(updates: Any, found: Sequence[_Matrix | None], factor: Callable[[_Matrix], Any]) -> Any:
    """Multiplies each matrix with a factor; one that is exactly the number 1 is left out."""
    leaves, structure = jax.tree.flatten(updates)
    factors = [1.0 if matrix is None else factor(matrix) for matrix in found]
    return structure.unflatten(
        leaf if isinstance(by, float) and by == 1 else by * leaf
        for leaf, by in zip(leaves, factors, strict=True)
    )


def _with_base_norm(tx: optax.GradientTransformation, matrices: _Matrices) -> optax.GradientTransformation:
    """`tx` on gradients divided by what their norm has grown by, so that an epsilon means the same to it."""

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        found = matrices.of(updates)
        scaled = _each(updates, found, lambda matrix: 1 / matrix.gradient_norm(matrices.chosen))
        return tx.update(scaled, state, params)

    return optax.GradientTransformation(tx.init, update)


def _scale_by_sides(
    matrices: _Matrices, consistent_rms: ArrayLike | None, dual: Callable[[_Matrix], float]
) -> optax.GradientTransformation:
    """Muon's shape factor, the spectral rule, and what an adaptive update's dual norm has grown by."""
    chosen = matrices.chosen

    def update(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        del params
        found = matrices.of(updates)
        updates = _each(updates, found, lambda matrix: _shape_factor(matrix, chosen, consistent_rms))
        return _each(updates, found, lambda matrix: matrix.lr_factor(chosen) / dual(matrix))

    return optax.stateless(update)


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
    """The two transforms that the matrices go through: optax's scale_by_muon, and the factors."""
    tx = optax.contrib.scale_by_muon(
        _coefficients(ns_coeffs, ns_steps),
        ns_steps,
        *args,
        adaptive=adaptive,
        weight_dimension_numbers=matrices.numbers,
        **kwargs,
    )

    def dual(matrix: _Matrix) -> float:
        # An adaptive update is proportional to the nuclear norm of the gradient that optax gets to see,
        # summed over all matrices of the parameter.
        if not adaptive:
            return 1.0
        summed = matrix.batch_growth ** rules.mup_share(matrices.chosen)
        return summed if scale_eps else summed * matrix.gradient_norm(matrices.chosen)

    return (
        _with_base_norm(tx, matrices) if scale_eps else tx,
        _scale_by_sides(matrices, consistent_rms, dual),
    )


def _spectral_rule(param: ParamSpec, chosen: Parametrization) -> float:
    """What a coupled decay of a hidden weight follows."""
    return _Matrix(param, param.fan_in, param.fan_out).lr_factor(chosen)


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
    r"""Rescales updates by Muon: hidden weights orthogonalised, all others by Adam, both as µP asks for.

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
        spec: what `mup_init` found out about the parameters.
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


def mup_muon(
    learning_rate: optax.ScalarOrSchedule,
    spec: MupSpec,
    ns_coeffs: Coefficients = _NS_COEFFS,
    ns_steps: ArrayLike = 5,
    beta: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
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
    the base model, this is `optax.contrib.muon` with `muon_weight_dimension_numbers` that say what the roles
    say, bit for bit.

    Args:
        learning_rate: the base model's learning rate, or a schedule of the step. Each parameter's µP
            factor multiplies its update, never the schedule.
        spec: what `mup_init` found out about the parameters.
        ns_coeffs: coefficients of the Newton-Schulz iteration, or the name of one of optax's presets.
        ns_steps: number of its iterations.
        beta: decay rate of the momentum.
        eps: added to denominators, of the iteration's and of Adam's, in the base model's units.
        weight_decay: strength of the matrices' decay, multiplied with the learning rate and not with the µP
            factor.
        weight_decay_mask: which of them decay: a tree of booleans, or a function from parameters to one.
        mu_dtype: dtype of the first moments; None keeps the parameter's.
        nesterov: Nesterov momentum, in Muon and in Adam.
        adaptive: multiply each parameter's update with the dual norm of its momentum, in the base's units.
        preconditioning: how the iteration's argument is normalised, as in optax.
        adam_b1: decay rate of Adam's first moment.
        adam_b2: decay rate of Adam's second moment.
        adam_eps_root: added to Adam's denominator inside of the square root, in the base's units squared.
        adam_weight_decay: strength of the decay of what Adam updates.
        adam_learning_rate: Adam's learning rate; None for the same as Muon's.
        muon_weight_dimension_numbers: `weight_dimension_numbers` of `mup_scale_by_muon`.
        consistent_rms: Muon's other shape factor, likewise at the base's sizes.
        scale_eps: False leaves ε the same for all parameters at all widths.
        decay: `"independent"`, `"coupled"` or `"decoupled"`, as in `mup_adamw`.
        decay_roles: the roles that decay, such as `("hidden",)`; None for all.
        peak_learning_rate: what a decoupled decay is relative to, of both parts; None looks for the peaks of
            their schedules.
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
