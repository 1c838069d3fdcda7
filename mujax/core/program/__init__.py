"""JAX's traced programs, and nothing of µP: the one place that knows how JAX represents them."""

from mujax.core.program._sites import SUBPROGRAMS as SUBPROGRAMS, EqnPath as EqnPath
from mujax.core.program._source import scope as scope, where as where
