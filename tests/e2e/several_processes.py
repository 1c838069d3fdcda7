"""Trains in one of several processes that talk over the loopback device, and prints its losses.

The arguments are the number of processes, this one's, the coordinator's port, the mesh, and whether to train
in every way there is.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import mujax
from mujax import train

X = np.random.default_rng(0).normal(size=(3, 16, 8)).astype(np.float32)
Y = np.sin(X[..., :4])


def net(width):
    return nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(width), nn.relu, nn.Dense(4)])


def losses(mesh, in_every_way):
    """The losses of three steps: of a state made on the mesh, of one made of parameters, of a `Training`."""
    number, shares = train.batch_share(mesh)
    share = slice(number * 16 // shares, (number + 1) * 16 // shares)
    mup = mujax.mup_init(net(32), net(8), X[0])
    tx = mujax.mup_adamw(0.01, mup.spec)
    scan = train.train_scan(train.model_loss(mup), tx)
    batches = train.put_batch((X[:, share], Y[:, share]), mesh, leading=1)
    _, metrics = scan(train.create_state(mup, tx, key=jax.random.key(1), mesh=mesh), batches)
    out = [metrics["loss"]]
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


if __name__ == "__main__":
    processes, process, port, axes, every_way = sys.argv[1:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process))
    print(json.dumps(losses(train.make_mesh(axes), every_way == "all")))
