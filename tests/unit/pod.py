"""A small run with checkpoints on any mesh, and as a script the processes of a pod that are killed."""

import functools
import itertools
import json
import os
import pathlib
import signal
import sys
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mujax
from mujax import data
from mujax.train import Checkpoints, TrainState, init_state, stream, train_step

X = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
Y = np.random.default_rng(1).integers(0, 4, size=40).astype(np.int32)
BATCH = 8


def net(width):
    return nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(width), nn.relu, nn.Dense(4)])


@functools.cache
def built(width=16, base=8, **mup_kwargs):
    """The model, the optimizer and the step, compiled once for all runs on one device."""
    mup = mujax.mup_init(net(width), net(base), X[:1], **mup_kwargs)
    tx = mujax.mup_adam(0.05, mup.spec)

    def loss(params, model_state, batch, key):
        inputs, targets = batch
        # Noise that depends on the key and the step, so that both must be restored.
        logits = mup.apply({"params": params}, inputs + 0.01 * jax.random.normal(key, inputs.shape))
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)
        return losses.mean(), (model_state, {})

    return mup, tx, train_step(loss, tx)


class Run:
    """A model, its state and its batches on a mesh; on one device without one."""

    def __init__(self, mesh=None):
        self.mup, self.tx, self.step = built()
        self.mesh = mesh
        self.stream = data.image_stream(
            data.Examples(X, Y), jax.random.key(1), batch=BATCH, sharding=self.on("data"), prefetch=0
        )
        self.losses = []

    def on(self, *spec):
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec(*spec))

    def create(self):
        params = self.mup.init(jax.random.key(0), X[:1])["params"]
        return TrainState(params, self.tx.init(params), {}, jax.random.key(2), jnp.zeros((), jnp.int32))

    def abstract(self):
        """The state's shapes, and its shardings: the outputs of each kernel are spread over "model"."""

        def place(leaf):
            columns = (
                leaf.ndim == 2 and self.mesh is not None and leaf.shape[1] % self.mesh.shape["model"] == 0
            )
            sharding = self.on(None, "model") if columns else self.on()
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree.map(place, jax.eval_shape(self.create))

    def start(self):
        if self.mesh is None:
            state = self.create()
            return init_state(state.params, self.tx, key=state.key)
        return jax.jit(self.create, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, self.abstract()))()

    def checkpoints(self, folder, **options):
        return Checkpoints(folder, self.mup.spec, {"batch": BATCH}, every_minutes=None, **options)

    def train(self, state, steps, checkpoints=None, pause=0.0):
        """From the stream's position to a number of steps, or to a preemption."""
        while self.stream.step < steps:
            state, metrics = self.step(state, next(self.stream))
            self.losses.append(float(metrics["loss"]))
            if checkpoints is not None:
                checkpoints.save(self.stream.step, state, self.stream)
                if checkpoints.preempted:
                    break
            time.sleep(pause)
        return state


def mesh_of(rows, columns, devices=None):
    kinds = (AxisType.Auto,) * 2
    return jax.make_mesh((rows, columns), ("data", "model"), axis_types=kinds, devices=devices)


def arrays(state):
    """The leaves as NumPy arrays."""
    return [
        np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)
        for leaf in jax.tree.leaves(state)
    ]


def gap(one, other):
    return max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))


def on_meshes(folder):
    """On 8 devices: 6 steps in one go against 3, a checkpoint and 3 more, on each mesh."""
    meshes = {"4x2": mesh_of(4, 2), "2x4": mesh_of(2, 4), "1x1": mesh_of(1, 1, jax.devices()[:1])}
    whole = Run(meshes["4x2"])
    reference = arrays(whole.train(whole.start(), 6))
    first = Run(meshes["4x2"])
    with first.checkpoints(folder) as checkpoints:
        state = first.train(first.start(), 3)
        checkpoints.save(3, state, first.stream, force=True)
        halfway = arrays(state)
    found = {}
    for name, mesh in meshes.items():
        run = Run(mesh)
        with run.checkpoints(folder) as checkpoints:
            state = checkpoints.restore(run.abstract(), run.stream)
        placed = {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state)}
        restored = gap(arrays(state), halfway)
        trained = gap(arrays(run.train(state, 6)), reference)
        found[name] = {
            "restored": restored,
            "trained": trained,
            "losses": gap([np.array(run.losses)], [np.array(whole.losses[3:])]),
            "devices": sorted(placed),
        }
    return found


def pairs(sharding):
    """A list of batches as a stream."""
    listed = [(X[start : start + 8], Y[start : start + 8]) for start in range(0, 40, 8)]
    return stream(listed, jax.random.key(0), batch=8, steps=5, sharding=sharding)


def total(batches):
    """One number of all batches, to compare between processes."""
    return sum(float(jnp.sum(inputs**2) + jnp.sum(targets)) for inputs, targets in batches)


def streams(mesh):
    """How far each kind of batches is from the same on one device."""

    def function(key, step):
        inputs = jax.random.normal(jax.random.fold_in(key, step), (8, 6))
        return inputs, jnp.zeros(8, jnp.int32)

    dataset = grain.MapDataset.range(40).map(lambda place: (X[place], Y[place])).seed(0).shuffle()
    tokens, key = np.arange(500, dtype=np.uint16), jax.random.key(0)
    kinds = {
        "text": lambda on: data.text_stream(tokens, key, batch=8, length=4, sharding=on("data")),
        "two axes": lambda on: data.text_stream(tokens, key, batch=8, length=4, sharding=on("data", "model")),
        "function": lambda on: stream(function, key, batch=8, steps=3, sharding=on("data")),
        "list": lambda on: pairs(on("data")),
        "grain": lambda on: stream(dataset, key, batch=8, steps=3, sharding=on(("data", "model"))),
    }
    found = {}
    for name, make in kinds.items():
        one, other = (
            list(itertools.islice(make(on), 3))
            for on in (lambda *_: None, lambda *spec: NamedSharding(mesh, PartitionSpec(*spec)))
        )
        assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(other)} == {8}
        found[name] = gap(arrays(one), arrays(other))
    return found


def killed(folder):
    """Two checkpoints, and a third at whose end the process is killed: everything of it is written."""
    run = Run()
    with run.checkpoints(folder, every_steps=1) as checkpoints:
        state = run.train(run.start(), 2, checkpoints)
        checkpoints.wait()
        state, _ = run.step(state, next(run.stream))

        def kill(*_, **__):
            os.kill(os.getpid(), signal.SIGKILL)

        os.rename = os.replace = kill
        checkpoints.save(3, state, run.stream)
        checkpoints.wait()


def large(seed):
    """A state of 48 MB that does not compress: to write it takes a while."""
    random = np.random.default_rng(seed)
    return {f"w{place}": random.normal(size=2**20).astype(np.float32) for place in range(12)}


def written(folder, step):
    """The bytes of arrays of an unfinished checkpoint."""
    files = folder.glob(f"{step}.*/state/**/d/*")
    return sum(file.stat().st_size for file in files)


def halfway(folder):
    """A checkpoint, and another one in the middle of whose arrays the process is killed."""
    folder = pathlib.Path(folder)
    with Checkpoints(folder, built()[0].spec, every_minutes=None) as checkpoints:
        checkpoints.save(1, large(1), force=True)
        checkpoints.wait()
        checkpoints.save(2, large(2), force=True)
        while not written(folder, 2):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)


def process(folder, port, number):
    """One of two processes that train until one of them is preempted."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, int(number), initialization_timeout=60)
    run = Run(mesh_of(2, 2))
    sum_of_list = total(pairs(run.on("data")))
    with run.checkpoints(folder, every_steps=5) as checkpoints:
        state = run.start()
        print("started", flush=True)
        run.train(state, 1000, checkpoints, pause=0.1)
        print(
            json.dumps({"preempted": checkpoints.preempted, "losses": run.losses, "total": sum_of_list}),
            flush=True,
        )
    jax.distributed.shutdown()


def eight(folder):
    """All that 8 devices are needed for, and a kill at the end."""
    mesh = mesh_of(4, 2)
    found = {**on_meshes(f"{folder}/meshes"), "streams": streams(mesh)}
    try:
        data.text_stream(
            np.arange(40),
            jax.random.key(0),
            batch=6,
            length=4,
            sharding=NamedSharding(mesh, PartitionSpec("data")),
        )
    except mujax.ConfigError as error:
        found["batch"] = str(error)
    print(json.dumps(found), flush=True)
    killed(f"{folder}/killed")


if __name__ == "__main__":
    {"eight": eight, "halfway": halfway, "process": process}[sys.argv[1]](*sys.argv[2:])
