"""Runs an optax transform with each parameter in units of its own.

The rules of µP come down to three constants per parameter: factors on its gradient before a transform sees
it, on the parameter itself, and on its update afterwards. They are Python floats, so a transform keeps the
state and the dtypes that it has in optax, and where a constant is 1 nothing is multiplied.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Final

import jax
import optax
from jax.typing import ArrayLike

from mujax import rules
from mujax._arguments import SCALAR_NOT_NEGATIVE, shown
from mujax.errors import MujaxError, ParametrizationError, SpecMismatchError
from mujax.spec import ROLES, MupSpec, Parametrization, ParamSpec, leaf_path

Factors = Mapping[str, Any]
"""A factor for each path of a spec; empty for 1 everywhere."""

LrMults = Mapping[str, ArrayLike]
"""Multiples of the learning rate by role or by glob of parameter paths."""

Rule = Callable[[ParamSpec, Parametrization], float]
"""A number for a parameter in a parametrization, such as `mujax.rules.gradient_scale`."""

_NO_FACTORS: Final[Factors] = {}


def check_spec(spec: MupSpec) -> Parametrization:
    """The parametrization of a spec.

    Raises:
        MujaxError: `spec` is not a `MupSpec`.
        ParametrizationError: the spec names an unknown parametrization.
    """
    if not isinstance(spec, MupSpec):
        raise MujaxError(
            where="spec",
            expected="a MupSpec",
            got=type(spec).__name__,
            remedy="pass the spec of the result of mup_init",
        )
    return rules.parametrization(spec.parametrization)


def one(param: ParamSpec, parametrization: Parametrization) -> float:
    """The rule of parameters that do not depend on width."""
    del param, parametrization
    return 1.0


def factors(spec: MupSpec, rule: Rule) -> dict[str, float]:
    """The number that a rule gives for each parameter."""
    parametrization = check_spec(spec)
    return {path: rule(param, parametrization) for path, param in spec.items()}


def lr_rule(family: str) -> Rule:
    """The rule for the learning rates of an optimizer family.

    Raises:
        ParametrizationError: an unknown family.
    """
    known = rules.family(family)
    return lambda param, parametrization: rules.lr_factor(param, parametrization, known)


def ratio(over: Factors, under: Factors) -> dict[str, Any]:
    """One factor over the other, parameter by parameter."""
    return {path: factor / under[path] for path, factor in over.items()}


def product(*several: Factors) -> dict[str, Any]:
    """The product of factors, parameter by parameter; factors without a parameter count as 1 for it."""
    combined: dict[str, Any] = {}
    for each in several:
        for path, factor in each.items():
            combined[path] = factor if path not in combined else combined[path] * factor
    return combined


def multiply(tree: Any, factors: Any) -> Any:
    """Multiplies each leaf by its own factor; a leaf whose factor is 1 is passed on as it is.

    Args:
        tree: updates or parameters.
        factors: a tree of the same structure, of Python floats or traced scalars; they take the leaf's dtype.
    """
    return jax.tree.map(_times, tree, factors)


def _times(leaf: Any, factor: Any) -> Any:
    if isinstance(factor, int | float):
        return leaf if factor == 1 else leaf * float(factor)
    return (leaf * factor).astype(leaf.dtype)


@dataclasses.dataclass(frozen=True)
class _Units:
    """One parameter's factors on gradient, parameter and update, and its argument to `grouped`."""

    gradient: Any
    param: Any
    update: Any
    argument: Any


def rescaled(
    tx: optax.GradientTransformation,
    spec: MupSpec,
    *,
    gradient: Factors = _NO_FACTORS,
    params: Factors = _NO_FACTORS,
    update: Factors = _NO_FACTORS,
    arguments: Factors | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Runs a transform on rescaled gradients and parameters and rescales its updates.

    Args:
        tx: the transform; its state is passed on as it is.
        spec: the expected parameters.
        gradient: factors on the gradients.
        params: factors on the parameters that `tx` gets, in `init` too.
        update: factors on the updates of `tx`.
        arguments: for a `grouped` transform, the argument of each parameter's own.

    Returns:
        A transform that checks each tree it gets against the spec.
    """
    tx = optax.with_extra_args_support(tx)
    units = {
        path: _Units(
            gradient.get(path, 1.0), params.get(path, 1.0), update.get(path, 1.0), (arguments or {}).get(path)
        )
        for path in spec
    }
    sees_params = bool(params)

    def seen(params: Any) -> Any:
        if params is None or not sees_params:
            return params
        return jax.tree.map(lambda leaf, unit: _times(leaf, unit.param), params, spec.match(params, units))

    def init_fn(params: Any) -> optax.OptState:
        spec.match(params)
        return tx.init(seen(params))

    def update_fn(
        updates: Any, state: optax.OptState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, optax.OptState]:
        matched = spec.match(updates, units, what="updates")
        _check_same_part(updates, params)
        if arguments is not None:
            extra_args["arguments"] = jax.tree.map(lambda unit: unit.argument, matched)
        updates = jax.tree.map(lambda leaf, unit: _times(leaf, unit.gradient), updates, matched)
        updates, state = tx.update(updates, state, seen(params), **extra_args)
        return jax.tree.map(lambda leaf, unit: _times(leaf, unit.update), updates, matched), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_same_part(updates: Any, params: Any) -> None:
    """Requires updates for all of the parameters, where both are an `nnx.State`, which a filter may cut down.

    Raises:
        SpecMismatchError: parameters have no updates.
    """
    if not (hasattr(updates, "filter") and hasattr(params, "filter")):
        return
    given = {leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(updates)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if leaf_path(path) not in given:
            raise SpecMismatchError(
                where=leaf_path(path),
                expected=f"an update of shape {tuple(leaf.shape)}, as for the other parameters",
                got="none",
                remedy="give the gradient the filter of the optimizer: nnx.DiffState(0, wrt), wrt=wrt",
            )


def grouped(make: Callable[[Any], optax.GradientTransformation]) -> optax.GradientTransformationExtraArgs:
    """One of several transforms for each leaf, with the state that each of them would have alone.

    Its `update` takes the extra argument `arguments`, a tree like the updates. Leaves with the same argument
    are updated together.

    Args:
        make: the transform for an argument. All of them must have the same state, of copies of the parameters
            and of values that do not depend on them, such as the number of steps.
    """

    def update(
        updates: Any, state: optax.OptState, params: Any = None, *, arguments: Any = None, **extra_args: Any
    ) -> tuple[Any, optax.OptState]:
        del extra_args
        structure = jax.tree.structure(updates)

        def is_copy(node: Any) -> bool:
            return jax.tree.structure(node) == structure

        def part(node: Any, group: list[int]) -> Any:
            return [jax.tree.leaves(node)[number] for number in group] if is_copy(node) else node

        def join(node: Any, *parts: Any) -> Any:
            if not is_copy(node):
                return parts[0]
            leaves = dict(zip(order, itertools.chain(*parts), strict=True))
            return structure.unflatten(leaves[number] for number in range(len(leaves)))

        groups = _alike(structure.flatten_up_to(arguments))
        if len(groups) <= 1:
            return _step(make, groups[0][0] if groups else 1.0, updates, state, params)
        order = list(itertools.chain(*(group for _, group in groups)))
        results = [
            _step(
                make,
                argument,
                *(
                    jax.tree.map(lambda node, group=group: part(node, group), tree, is_leaf=is_copy)
                    for tree in (updates, state, params)
                ),
            )
            for argument, group in groups
        ]
        return jax.tree.map(join, (updates, state), *results, is_leaf=is_copy)

    return optax.GradientTransformationExtraArgs(make(1.0).init, update)


def _step(
    make: Callable[[Any], optax.GradientTransformation], argument: Any, updates: Any, state: Any, params: Any
) -> tuple[Any, optax.OptState]:
    new, state = make(argument).update(updates, state, params)
    if not isinstance(argument, int | float):
        # A traced argument has a dtype, which would be the update's.
        new = jax.tree.map(lambda leaf, old: leaf.astype(old.dtype), new, updates)
    return new, state


def _alike(arguments: list[Any]) -> list[tuple[Any, list[int]]]:
    """Positions grouped by equal argument; a traced argument equals itself only."""
    groups: dict[Any, tuple[Any, list[int]]] = {}
    for number, argument in enumerate(arguments):
        key = argument if isinstance(argument, int | float) else ("at", id(argument))
        groups.setdefault(key, (argument, []))[1].append(number)
    return list(groups.values())


def lr_multiples(spec: MupSpec, lr_mults: LrMults | None) -> Factors:
    """The multiple of the learning rate that the user gives each parameter.

    Args:
        spec: the parameters.
        lr_mults: by role, or by glob of paths; a parameter that several of them match gets their product.

    Returns:
        A factor for each parameter; none at all without `lr_mults`.

    Raises:
        ParametrizationError: an unknown role, a pattern that matches no parameter, or a multiple below 0.
        RoleError: a role, and the spec's target has its base's own widths.
    """
    if lr_mults is None:
        return _NO_FACTORS
    found: list[Factors] = []
    for name, multiple in lr_mults.items():
        if not SCALAR_NOT_NEGATIVE.accepts(multiple):
            raise ParametrizationError(
                where="lr_mults", expected="multiples of at least 0", got=f"{shown(multiple)} for {name!r}"
            )
        if name in ROLES:
            spec.require_roles(f"lr_mults {name!r}")
            paths = [path for path, param in spec.items() if param.role == name]
        else:
            paths = matching(spec, name)
            if not paths:
                raise ParametrizationError(
                    where="lr_mults",
                    expected=f"roles ({', '.join(map(repr, ROLES))}) or globs that match parameters",
                    got=f"{name!r}, which is neither; the first parameter is {next(iter(spec), None)!r}",
                )
        found.append(dict.fromkeys(paths, multiple))
    named = product(*found)
    return {path: named.get(path, 1.0) for path in spec} if named else _NO_FACTORS


def matching(spec: MupSpec, pattern: str) -> list[str]:
    """The paths that a glob matches."""
    return [path for path in spec if fnmatch.fnmatchcase(path, pattern)]


def with_lr_multiples(
    tx: optax.GradientTransformation, spec: MupSpec, lr_mults: LrMults | None
) -> optax.GradientTransformation:
    """`tx` with its updates multiplied by the user's multiples; `tx` itself without `lr_mults`."""
    multiples = lr_multiples(spec, lr_mults)
    return rescaled(tx, spec, update=multiples) if multiples else tx
