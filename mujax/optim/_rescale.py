"""An optax transform that sees each parameter in units of its own.

µP's rules come down to three constants per parameter: what its gradient is multiplied with before a
transform sees it, what the parameter itself is, and what its update is afterwards. They are Python floats,
so a transform keeps the state and the dtypes that it has in optax, and where a constant is 1 nothing is
multiplied.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any, Final

import jax
import optax
from jax.typing import ArrayLike

from mujax import rules
from mujax.errors import MujaxError, ParametrizationError
from mujax.optim._tree import leaf_paths, multiply
from mujax.spec import ROLES, MupSpec, Parametrization, ParamSpec

Factors = Mapping[str, Any]
"""A factor for each path of a spec."""

LrMults = Mapping[str, ArrayLike]
"""Multiples of the learning rate by role or by glob of parameter paths."""

_NO_FACTORS: Final[Factors] = {}


def check_spec(spec: MupSpec) -> Parametrization:
    """The parametrization of what ought to be a spec.

    Raises:
        MujaxError: it is something else.
        ParametrizationError: its parametrization is none.
    """
    if not isinstance(spec, MupSpec):
        raise MujaxError(
            f"spec: expected a MupSpec, got {type(spec).__name__}. Pass the spec of what mup_init returns."
        )
    return rules.parametrization(spec.parametrization)


def factors(spec: MupSpec, rule: Callable[[ParamSpec, Parametrization], float]) -> dict[str, float]:
    """A rule's number for each parameter."""
    chosen = check_spec(spec)
    return {path: rule(param, chosen) for path, param in spec.items()}


def lr_rule(family: str) -> Callable[[ParamSpec, Parametrization], float]:
    """The rule of a family's learning rates.

    Raises:
        ParametrizationError: no family of that name.
    """
    known = rules.family(family)
    return lambda param, chosen: rules.lr_factor(param, chosen, known)


def ratio(over: Factors, under: Factors) -> dict[str, Any]:
    """One factor over the other, parameter by parameter."""
    return {path: factor / under[path] for path, factor in over.items()}


def product(*several: Factors) -> dict[str, Any]:
    """The product of factors, parameter by parameter; of those that have the parameter."""
    combined: dict[str, Any] = {}
    for each in several:
        for path, factor in each.items():
            combined[path] = factor if path not in combined else combined[path] * factor
    return combined


def in_units(
    tx: optax.GradientTransformation,
    spec: MupSpec,
    *,
    gradient: Factors = _NO_FACTORS,
    params: Factors = _NO_FACTORS,
    update: Factors = _NO_FACTORS,
) -> optax.GradientTransformationExtraArgs:
    """Runs a transform on rescaled gradients and parameters and rescales its updates.

    Args:
        tx: the transform; its state is passed on as it is.
        spec: the parameters that are expected.
        gradient: what each gradient is multiplied with; nothing where a path is absent.
        params: what each parameter is multiplied with on its way to `tx`, in `init` too.
        update: what each update is multiplied with.

    Returns:
        A transform that checks each tree it gets against the spec.
    """
    tx, param_factors = optax.with_extra_args_support(tx), params

    def seen(params: optax.Params | None) -> Any:
        if params is None or not param_factors:
            return params
        return multiply(params, leaf_paths(spec, params, "parameters"), param_factors)

    def init_fn(params: optax.Params) -> optax.OptState:
        leaf_paths(spec, params, "parameters")
        return tx.init(seen(params))

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        paths = leaf_paths(spec, updates, "updates")
        updates, state = tx.update(multiply(updates, paths, gradient), state, seen(params), **extra_args)
        return multiply(updates, paths, update), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def lr_multiples(spec: MupSpec, lr_mults: LrMults | None) -> Factors:
    """The multiple of the learning rate that the user gives each parameter.

    Args:
        spec: the parameters.
        lr_mults: by role, or by glob of paths; a parameter that several of them name gets their product.

    Returns:
        A factor for each parameter that is named, and none for the others.

    Raises:
        ParametrizationError: neither a role nor a glob that matches a parameter; a multiple below 0.
        RoleError: a role, and the spec's target has its base's own widths.
    """
    if lr_mults is None:
        return _NO_FACTORS
    if not isinstance(lr_mults, Mapping):
        raise ParametrizationError(
            "lr_mults: expected a dict of multiples by role or by glob of parameter paths, such as "
            f'{{"hidden": 2.0}}, got {type(lr_mults).__name__}.'
        )
    found: list[Factors] = []
    for name, multiple in lr_mults.items():
        if isinstance(multiple, int | float) and not multiple >= 0:
            raise ParametrizationError(
                f"lr_mults: expected multiples of at least 0, got {multiple} for {name!r}."
            )
        if name in ROLES:
            spec.require_roles(f"lr_mults {name!r}")
            chosen = [path for path, param in spec.items() if param.role == name]
        else:
            chosen = [path for path in spec if fnmatch.fnmatchcase(path, name)]
            if not chosen:
                raise ParametrizationError(
                    f"lr_mults: expected roles ({', '.join(map(repr, ROLES))}) or globs that match "
                    f"parameters, but {name!r} is no role and matches none of them; the first is "
                    f"{next(iter(spec), None)!r}."
                )
        found.append(dict.fromkeys(chosen, multiple))
    return product(*found)


def with_lr_multiples(
    tx: optax.GradientTransformation, spec: MupSpec, lr_mults: LrMults | None
) -> optax.GradientTransformation:
    """`tx` with its updates multiplied as the user says; `tx` itself where nothing is said."""
    multiples = lr_multiples(spec, lr_mults)
    return in_units(tx, spec, update=multiples) if multiples else tx


def by_leaf(
    make: Callable[[Any], optax.GradientTransformation], spec: MupSpec, arguments: Factors
) -> optax.GradientTransformation:
    """One of several transforms for each leaf, for transforms whose state holds nothing per parameter.

    Args:
        make: the transform for an argument. All of them must have the same state.
        spec: the parameters.
        arguments: the argument for each parameter; leaves with the same one are updated together.
    """

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        leaves, structure = jax.tree.flatten(updates)
        values = None if params is None else structure.flatten_up_to(params)
        mine = [arguments[path] for path in leaf_paths(spec, updates, "updates")]
        done: list[Any] = [None] * len(leaves)
        new_state = state
        for group in _alike(mine):
            parameters = None if values is None else [values[number] for number in group]
            out, new_state = make(mine[group[0]]).update(
                [leaves[number] for number in group], state, parameters
            )
            # An argument that is being traced has a dtype, which would be the update's.
            keep = isinstance(mine[group[0]], int | float)
            for number, new in zip(group, jax.tree.leaves(out), strict=True):
                done[number] = new if keep else new.astype(leaves[number].dtype)
        return structure.unflatten(done), new_state

    return optax.GradientTransformation(make(1.0).init, update)


def _alike(arguments: list[Any]) -> list[list[int]]:
    """Positions grouped by equal argument; an argument that is being traced equals itself only."""
    groups: dict[Any, list[int]] = {}
    for number, argument in enumerate(arguments):
        key = argument if isinstance(argument, int | float) else ("at", id(argument))
        groups.setdefault(key, []).append(number)
    return list(groups.values())
