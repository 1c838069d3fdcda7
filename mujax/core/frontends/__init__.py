"""Linen, NNX and pairs of functions as one call on flat arrays.

`_call.py` defines what mujax needs of a model, `_linen.py`, `_nnx.py` and `_functional.py` implement it,
`_choose.py` selects one of them, `_one_device.py` traces a model of any kind on one device (`_mesh.py`).
The user's module is never changed.
"""

from mujax.core.frontends._call import (
    Annotation as Annotation,
    Call as Call,
    Frontend as Frontend,
    Initial as Initial,
    Result as Result,
)
from mujax.core.frontends._choose import base_call as base_call, frontend as frontend
from mujax.core.frontends._functional import Functional as Functional
from mujax.core.frontends._mesh import is_split as is_split
from mujax.core.frontends._one_device import OneDevice as OneDevice, on_one_device as on_one_device
