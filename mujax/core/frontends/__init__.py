"""Linen, NNX and pairs of functions as one call on flat arrays.

`_call.py` says what mujax needs of a model, `_linen.py`, `_nnx.py` and `_functional.py` give it, `_choose.py`
picks one of them. The user's module is never changed.
"""

from mujax.core.frontends._call import Call as Call, Frontend as Frontend, Initial as Initial
from mujax.core.frontends._choose import frontend as frontend, shrink as shrink
from mujax.core.frontends._functional import Functional as Functional
