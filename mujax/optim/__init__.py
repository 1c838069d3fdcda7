"""optax transforms in µP: per-parameter learning rates and ε, read off a `MupSpec`."""

from mujax.optim._alias import mup_adam as mup_adam
from mujax.optim._alias import mup_adamw as mup_adamw
from mujax.optim._alias import mup_sgd as mup_sgd
from mujax.optim._lookup import optimizer as optimizer
from mujax.optim._scale import mup_scale_by_adam as mup_scale_by_adam
from mujax.optim._scale import mup_scale_by_sgd as mup_scale_by_sgd
from mujax.optim._scale import mup_wrap as mup_wrap
