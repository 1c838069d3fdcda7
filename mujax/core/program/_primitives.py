"""Classes of primitives that do nothing to the numbers, or only multiply them."""

from __future__ import annotations

from typing import Final

RESHAPES: Final = frozenset({"reshape", "squeeze", "expand_dims", "broadcast_in_dim", "transpose"})
"""The whole array, with its axes arranged in another way or repeated."""

PARTS: Final = frozenset({"slice", "dynamic_slice", "gather", "split", "unstack"})
"""Part of the array."""

IDENTITIES: Final = frozenset(
    [
        *["copy", "copy_p", "name", "optimization_barrier", "device_put", "xla_metadata_value"],
        *["sharding_constraint", "layout_constraint", "with_memory_space_constraint", "relayout"],
        *["reshard", "mesh_cast", "pvary", "preduced", "reduced_vary_cast", "vary_unreduced_cast"],
        # As 0.10 called the last two.
        *["reduced_vary_cast_p", "vary_unreduced_cast_p"],
    ]
)
"""The same array, elsewhere or marked: one output for each operand."""

LAYOUT: Final = RESHAPES | PARTS | IDENTITIES | {"rev", "convert_element_type"}
"""The same numbers: of all or part of an array, in another order, dtype or place."""

PRODUCTS: Final = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general"})
"""Bilinear in the first two operands, summed over some of their axes."""

LINEAR_AT_ZERO: Final = frozenset(
    ["asin", "asinh", "atan", "atanh", "erf", "erf_inv", "expm1", "log1p", "sin", "sinh", "tan", "tanh"]
)
"""Functions close to their argument near zero."""

MEMORY_READS: Final = frozenset({"get", "masked_load"})
"""Part of the memory that the first operand is."""

MEMORY_WRITES: Final = frozenset({"swap", "masked_swap", "addupdate"})
"""Write into the memory that the first operand is, or add to it; return what was there."""
