"""A study of hyperparameters that any number of workers share through one database.

`SharedStudy` wraps an Optuna study: workers on any number of machines, started alike, `lease` trials,
`report` on the way and `finish` them. No trial is lost and none is run twice. A worker that is killed loses
only the trials it was running, and these are run again.

The only package that imports Optuna.
"""

from mujax.tune.study._database import in_memory as in_memory
from mujax.tune.study._leases import Lease as Lease
from mujax.tune.study._space import distributions as distributions
from mujax.tune.study._study import SharedStudy as SharedStudy
from mujax.tune.study._trials import Record as Record
