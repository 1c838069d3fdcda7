"""Trains in one of several processes that talk over the loopback device, and prints its losses.

The arguments are the number of processes, this one's, the coordinator's port, the mesh, whether to train in
every way there is, and a folder for a checkpoint of the run's middle.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

import mujax
from mujax import train

X = np.random.default_rng(0).normal(size=(3, 16, 8)).astype(np.float32)
Y = np.sin(X[..., :4])


def net(width):
    return nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(width), nn.relu, nn.Dense(4)])


def losses(mesh, in_every_way, folder=None):
    """The losses of three steps: of a state made on the mesh, of one made of parameters, of a `Training`.

    The state of the first is saved, and by `resumed` gone on with.
    """
    number, shares = train.batch_share(mesh)
    share = slice(number * 16 // shares, (number + 1) * 16 // shares)
    mup = mujax.mup_init(net(32), net(8), X[0])
    tx = mujax.mup_adamw(0.01, mup.spec)
    scan = train.train_scan(train.model_loss(mup), tx)
    batches = train.put_batch((X[:, share], Y[:, share]), mesh, leading=1)
    state, metrics = scan(train.create_state(mup, tx, key=jax.random.key(1), mesh=mesh), batches)
    out = [metrics["loss"]]
    if folder is not None:
        with train.Checkpoints(folder, mup.spec) as checkpoints:
            checkpoints.save(3, state, force=True)
    if in_every_way:
        variables = jax.jit(mup.init, out_shardings=train.shardings(mup, mesh))(jax.random.key(1))
        _, metrics = scan(train.init_state(variables["params"], tx), batches)
        out.append(metrics["loss"])
        job = train.training_run(
            net, list(zip(jnp.asarray(X), jnp.asarray(Y), strict=True)), steps=3, width=32, base_width=8
        )
        group = train.CompiledRuns(job.on(mesh), {}, mode="loop")
        _, metrics = train.run_one(group, {"learning_rate": 0.01}, jax.random.key(1))
        out.append(metrics["curve"])
    return [np.asarray(each).tolist() for each in out]


def resumed(mesh, folder=None):
    """The losses of three more steps, from a checkpoint on or in one go."""
    mup = mujax.mup_init(net(32), net(8), X[0])
    tx = mujax.mup_adamw(0.01, mup.spec)
    scan = train.train_scan(train.model_loss(mup), tx)
    batches = train.put_batch((X, Y), mesh, leading=1)
    state = train.create_state(mup, tx, key=jax.random.key(1), mesh=mesh)
    if folder is None:
        state, _ = scan(state, batches)
    else:
        with train.Checkpoints(folder, mup.spec) as checkpoints:
            state = checkpoints.restore(state)
    return np.asarray(scan(state, batches)[1]["loss"]).tolist()


class Counted(np.ndarray):
    """Tokens that count how many sequences are read of them."""

    rows = 0

    def __getitem__(self, index):
        if isinstance(index, np.ndarray):
            type(self).rows += len(index)
        return super().__getitem__(index)


def text(mesh):
    """Three numbers of a batch whose sequences each device reads itself, and how many were read here."""
    batches = train.mapped_text(np.arange(5000, dtype=np.uint16).view(Counted), length=4)
    starts = batches.draw((), jax.random.key(0), 16, 1)[0]
    split = train.batch_sharding(mesh).spec

    def three(starts):
        inputs, targets = batches.on(mesh, split).fetch((), starts)
        weights = jnp.arange(1, 17)[:, None]
        return jnp.stack([(inputs * weights).sum(), (targets * weights).sum(), (targets == inputs + 1).sum()])

    found = jax.jit(three, out_shardings=NamedSharding(mesh, PartitionSpec()))(np.asarray(starts))
    return np.asarray(found).tolist(), Counted.rows


if __name__ == "__main__":
    processes, process, port, axes, every_way, folder = sys.argv[1:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process))
    mesh = train.make_mesh(axes)
    print(json.dumps([losses(mesh, every_way == "all", folder), text(mesh)]))
