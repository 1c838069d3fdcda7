"""One training run: step, batches, hyperparameters, losses, and many runs of one compiled program."""

from mujax.train._batches import (
    Batches as Batches,
    as_batches as as_batches,
    check_batches as check_batches,
    mapped_text as mapped_text,
    stream as stream,
)
from mujax.train._checkpoint import Checkpoints as Checkpoints, Saved as Saved
from mujax.train._compile import effort as effort, steps_in_python as steps_in_python
from mujax.train._hyperparameters import (
    HYPERPARAMETERS as HYPERPARAMETERS,
    as_its_kind as as_its_kind,
    hyperparameter as hyperparameter,
    refuse_untransferable as refuse_untransferable,
    transfers as transfers,
)
from mujax.train._lanes import (
    MODES as MODES,
    CompiledRuns as CompiledRuns,
    FunctionJob as FunctionJob,
    Job as Job,
    Metrics as Metrics,
    Mode as Mode,
    run_lanes as run_lanes,
    run_one as run_one,
    threads as threads,
)
from mujax.train._losses import (
    Losses as Losses,
    OutputLoss as OutputLoss,
    as_inputs as as_inputs,
    default_loss as default_loss,
    model_loss as model_loss,
    tail as tail,
)
from mujax.train._run import Training as Training, training_run as training_run
from mujax.train._sharding import (
    batch_sharding as batch_sharding,
    batch_share as batch_share,
    create_state as create_state,
    make_mesh as make_mesh,
    put_batch as put_batch,
    shardings as shardings,
)
from mujax.train._step import (
    JittedStep as JittedStep,
    Loss as Loss,
    Step as Step,
    TrainState as TrainState,
    init_state as init_state,
    train_scan as train_scan,
    train_step as train_step,
)
