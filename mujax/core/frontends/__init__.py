"""Linen, NNX and pairs of functions as one call on flat arrays."""

from mujax.core.frontends._frontend import (
    Call as Call,
    Frontend as Frontend,
    Functional as Functional,
    Initial as Initial,
    frontend as frontend,
    shrink as shrink,
)
