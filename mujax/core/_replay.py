"""A traced call as pure functions of its parameters, for any kind of model.

Checks and sweeps train it: an initialiser and a forward pass on plain pytrees, with taps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from mujax.core._corrections import Correction
from mujax.core.frontends import Call, Result
from mujax.core.program import (
    ClosedJaxpr,
    EqnPath,
    Insertions,
    JaxprEqn,
    Records,
    enclosing_primitives,
    equation_at,
    evaluate_and_record,
)
from mujax.core.trace import Analysis
from mujax.errors import ShapeMismatchError


@dataclasses.dataclass(frozen=True)
class Replay:
    """The call that `mup_init` traced, in µP.

    State other than the parameters (batch statistics, caches) keeps its initial value: updates are dropped.

    Attributes:
        program: the traced call.
        call: the meaning of its flat inputs.
        result: the result of the call's function.
        insertions: the factors of the forward pass.
        param_factors: factors on the parameters themselves, by position.
        variables: key -> flat variables.
        inputs: the example inputs.
        analysis: the analysis of the program.
        corrections: the corrections that are inserted where they belong, by place.
        multiplier_sites: the products and lookups that the multipliers multiply, by the multiplier's name.
    """

    program: ClosedJaxpr
    call: Call
    result: Result
    insertions: Insertions
    param_factors: Mapping[int, float]
    variables: Callable[[Key[Array, ""]], list[Any]]
    inputs: tuple[Any, ...]
    analysis: Analysis
    corrections: Mapping[EqnPath, Sequence[Correction]]
    multiplier_sites: Mapping[str, Sequence[EqnPath]]

    def init(self, key: Key[Array, ""]) -> tuple[PyTree, list[Any]]:
        """Initial parameters, as a tree of dicts by path, and the flat variables that contain them."""
        leaves = self.variables(key)
        tree: dict[str, Any] = {}
        for position, path in self.call.params.items():
            *parents, name = path.split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[name] = leaves[position]
        return tree, leaves

    def apply(
        self,
        params: PyTree,
        variables: Sequence[Any],
        inputs: Sequence[Any] | None = None,
        *,
        key: Key[Array, ""] | None = None,
        taps: Collection[EqnPath] = (),
    ) -> tuple[Any, Records]:
        """The model's output.

        Args:
            params: of the structure that `init` returns.
            variables: as `init` returns them; the parameters in them are not read.
            inputs: positional arguments of the traced shapes; by default those given to `mup_init`.
            key: for every random stream; by default `jax.random.key(0)`.
            taps: equations to record.

        Returns:
            The model's output, and the records.

        Raises:
            ShapeMismatchError: an input is of another shape than the traced one.
        """
        leaves = [*variables, *self.call.leaves[len(variables) :]]
        given = self._arrays(self.inputs if inputs is None else inputs)
        for position, leaf in zip(self.call.inputs[0], given, strict=True):
            leaves[position] = leaf
        for position in self.call.inputs[1]:
            leaves[position] = _concrete(leaves[position], key)
        for position, path in self.call.params.items():
            leaf = _at(params, path)
            factor = self.param_factors.get(position)
            leaves[position] = leaf if factor is None else leaf * jnp.asarray(factor, leaf.dtype)
        outs, records = evaluate_and_record(self.program, leaves, self.insertions, taps)
        return self.call.output(self.result.build(outs)), records

    def equation(self, site: EqnPath) -> JaxprEqn:
        """The equation at a place."""
        return equation_at(self.program, site)

    def loops(self, site: EqnPath) -> int:
        """How many scans are around a place."""
        return enclosing_primitives(self.program, site).count("scan")

    def output(self) -> Any:
        """The model's output, as shapes."""
        return self.call.output(self.result.build(self.result.shapes))

    def _arrays(self, inputs: Sequence[Any]) -> list[Any]:
        given = [leaf for leaf in jax.tree.leaves(tuple(inputs)) if hasattr(leaf, "shape")]
        wanted = [self.call.leaves[position] for position in self.call.inputs[0]]
        found = [tuple(leaf.shape) for leaf in given]
        if found != [tuple(leaf.shape) for leaf in wanted]:
            raise ShapeMismatchError(
                where="inputs",
                expected=f"arrays of shapes {[tuple(leaf.shape) for leaf in wanted]} as given to mup_init",
                got=found,
                remedy="give every batch the same shapes",
            )
        return [_concrete(leaf, None) for leaf in given]


def _at(tree: PyTree, path: str) -> Any:
    for name in path.split("/"):
        tree = tree[name]
    return tree


def _concrete(leaf: Any, key: Key[Array, ""] | None) -> Any:
    """An array for a shape: zeros, or the key."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key(0) if key is None else key
    return jnp.zeros(leaf.shape, leaf.dtype)
