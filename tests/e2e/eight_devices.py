"""Trains models of every kind on eight devices and on one, and prints what `test_mesh.py` compares."""

import collections
import contextlib
import json
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn, nnx
from jax.sharding import PartitionSpec as P

import mujax
from mujax import train

X = np.random.default_rng(0).normal(size=(3, 16, 8)).astype(np.float32)
Y = np.sin(X[..., :4])
LECUN = nn.initializers.lecun_normal()


def linen(up=LECUN, down=LECUN):
    def build(width):
        one, two = (nn.Dense(width, kernel_init=init) for init in (up, down))
        return nn.Sequential([nn.Dense(width), nn.relu, one, nn.relu, two, nn.relu, nn.Dense(4)])

    return build


class Net(nnx.Module):
    def __init__(self, width, named, rngs):
        def dense(size_in, size_out, *names):
            init = nnx.with_partitioning(LECUN, names) if named else LECUN
            return nnx.Linear(size_in, size_out, kernel_init=init, rngs=rngs)

        self.first, self.norm = dense(8, width, None, "model"), nnx.BatchNorm(width, rngs=rngs)
        self.up, self.down = dense(width, width, "data", "model"), dense(width, width, "model", "data")
        self.last = dense(width, 4, "data", None)

    def __call__(self, x):
        x = self.norm(nnx.relu(self.first(x)))
        return self.last(nnx.relu(self.down(nnx.relu(self.up(x)))))


def net(named):
    return lambda width: lambda rngs: Net(width, named, rngs)


SPLITS = {"w": P(None, "model"), "u": P(None, "model"), "o": P("model", None)}


def initial(width, explicit=False):
    shapes = {"w": (8, width), "u": (width, width), "o": (width, 4)}

    def init(key, x):
        del x
        keys = dict(zip(shapes, jax.random.split(key, 3), strict=True))
        return {
            name: jax.random.normal(keys[name], shape, **({"out_sharding": SPLITS[name]} if explicit else {}))
            / shape[0] ** 0.5
            for name, shape in shapes.items()
        }

    return init


def plain(width):
    return mujax.Functional(initial(width), lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"]) @ p["u"]) @ p["o"])


def centred(width):
    def apply(p, x):
        out = plain(width).apply(p, x)
        return out - out.mean()

    return mujax.Functional(initial(width), apply)


def by_shards(width):
    """`centred` with communication by hand, and a mean over devices."""

    def local(p, x):
        h = jax.lax.all_gather(jnp.tanh(x @ p["w"]), "model", axis=1, tiled=True) @ p["u"]
        out = jax.lax.psum(jnp.tanh(h) @ p["o"], "model")
        return out - jax.lax.pmean(out.mean(), "data")

    def apply(p, x):
        over = jax.shard_map(local, in_specs=(SPLITS, P("data")), out_specs=P("data"), check_vma=False)
        return over(p, x)

    return mujax.Functional(initial(width), apply)


def explicit(width):
    """`plain` on a mesh whose axes are part of the types of arrays."""

    def apply(p, x):
        h = jax.sharding.reshard(jnp.tanh(x @ p["w"]), P("data", None))
        h = jnp.tanh(h @ p["u"])
        return jnp.einsum("bi,ij->bj", h, p["o"], out_sharding=P("data", None))

    return mujax.Functional(initial(width, explicit=True), apply)


def places(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): str(leaf.sharding.spec) for path, leaf in leaves}


def run(build, mesh=None, rules=None, within=False, form="scan", **options):
    """Three steps, and where the state lies before and after them."""
    with jax.set_mesh(mesh) if within else contextlib.nullcontext():
        mup = mujax.mup_init(build(32), build(6), jnp.asarray(X[0]))
        tx = mujax.mup_adamw(0.01, mup.spec)
        state = train.create_state(mup, tx, key=jax.random.key(1), mesh=mesh, rules=rules)
        before = mesh and places(state)
        batches = (X, Y) if mesh is None else train.put_batch((X, Y), mesh, rules=rules, leading=1)
        donated = state.params, state.opt_state
        if form == "scan":
            step = train.train_scan(train.model_loss(mup), tx, **options)
            state, metrics = step(state, batches)
            losses = metrics["loss"]
        else:
            step, losses = train.train_step(train.model_loss(mup), tx, **options), []
            for number in range(3):
                batch = jax.tree.map(lambda leaf: leaf[number], batches)  # noqa: B023
                state, metrics = step(state, batch)
                losses.append(metrics["loss"])
    return {
        "losses": [float(loss) for loss in losses],
        "roles": {path: param.role for path, param in mup.spec.items()},
        "corrections": [(c.kind, c.factor) for c in mup.corrections],
        "findings": len(mup.findings),
        "stays": before == (mesh and places(state)),
        "split": sum(spec != "P()" for spec in (before or {}).values()),
        "donated": all(leaf.is_deleted() for leaf in jax.tree.leaves(donated)),
    }


def pairs():
    """The same run on one device and on the mesh, by name."""
    three = train.make_mesh("data=2,fsdp=2,tensor=2")
    two = train.make_mesh({"data": 4, "model": -1})
    rules = [("batch", "data"), ("mlp", "model"), ("embed", "data")]
    box, logical = nn.with_partitioning, nn.with_logical_partitioning
    boxed = linen(box(LECUN, ("data", "model")), box(LECUN, ("model", "data")))
    named = linen(logical(LECUN, ("embed", "mlp")), logical(LECUN, ("mlp", "embed")))
    typed = jax.make_mesh((4, 2), ("data", "model"))
    one, one_nnx, one_plain = run(linen()), run(net(False)), run(plain)
    return {
        "linen": (one, run(linen(), three)),
        "linen, in steps": (one, run(linen(), three, form="step")),
        "linen, accumulated": (one, run(linen(), three, accumulate=2)),
        "linen, bf16": (
            run(linen(), compute_dtype=jnp.bfloat16),
            run(linen(), three, compute_dtype=jnp.bfloat16),
        ),
        "boxes": (one, run(boxed, two)),
        "logical names": (one, run(named, two, rules)),
        "nnx": (one_nnx, run(net(False), three)),
        "nnx metadata": (one_nnx, run(net(True), two, within=True)),
        "functional": (one_plain, run(plain, three)),
        "explicit mesh": (one_plain, run(explicit, typed, within=True)),
        "shard_map": (run(centred), run(by_shards, two, SPLITS, within=True)),
    }


COLLECTIVE = re.compile(
    r" = (\(?\w+\[.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def cost(loss, tx, state, batch):
    """Collectives with their shapes, operations and memory of a compiled step, of one device."""
    compiled = train.train_step(loss, tx).lower(state, batch).compile()
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
    kinds = collections.Counter(" ".join(match.groups()) for match in COLLECTIVE.finditer(compiled.as_text()))
    return {
        "collectives": kinds,
        "flops": costs["flops"],
        "bytes": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
    }


def costs():
    """A step in µP and the plain model's own, and the FSDP step against one that is not split."""
    out = {}
    wide = linen()
    x = jax.ShapeDtypeStruct((16, 8), "float32")
    mup = mujax.mup_init(wide(256), wide(64), x)
    ours = train.model_loss(mup)

    def theirs(params, model_state, batch, key):
        return jnp.square(wide(256).apply({"params": params}, batch[0]) - batch[1]).mean(), (model_state, {})

    for name, text in {"three": "data=2,fsdp=2,tensor=2", "fsdp": "fsdp=8", "data": "data=8"}.items():
        mesh = train.make_mesh(text)
        for side, loss, tx in (
            ("mujax", ours, mujax.mup_adamw(0.01, mup.spec, scale_eps=False)),
            ("optax", theirs, optax.adamw(0.01)),
        ):
            state = train.create_state(mup, tx, mesh=mesh)
            batch = train.put_batch((X[0], Y[0]), mesh)
            out[f"{name} {side}"] = cost(loss, tx, state, batch)
    places = train.shardings(mup, train.make_mesh("fsdp=8"))
    memory = jax.jit(mup.init, out_shardings=places).lower(jax.random.key(0)).compile().memory_analysis()
    whole = jax.jit(mup.init).lower(jax.random.key(0)).compile().memory_analysis()
    entries = mup.spec.size()
    return out | {
        "entries": entries,
        "init": memory.output_size_in_bytes + memory.temp_size_in_bytes,
        "init whole": whole.output_size_in_bytes + whole.temp_size_in_bytes,
    }


def jobs():
    """`training_run` on one device, on two meshes, and resumed from the middle on a third."""
    batches = list(zip(map(jnp.asarray, [*X, *X]), map(jnp.asarray, [*Y, *Y]), strict=True))
    job = train.training_run(linen(), batches, "adamw", steps=6, width=32, base_width=8, valid=batches[:2])
    values, key = {"learning_rate": 0.01, "weight_decay": 0.1}, jax.random.key(1)
    out, kept = {}, {}
    for name, one in {
        "one device": job,
        "split": job.on(train.make_mesh("data=2,fsdp=2,tensor=2")),
        "accumulated": job.on(train.make_mesh("fsdp=8"), accumulate=2),
        "resumed": job.on(train.make_mesh("data=2,tensor=4")),
    }.items():
        group = train.CompiledRuns(one, {}, mode="loop", devices=jax.devices()[:1])
        resume = None
        if name == "resumed":
            shapes = group.abstract_state(values, key)
            resume = (
                3,
                jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), kept["split"], shapes),
            )

        def keep(step, state, name=name):
            if step == 3:
                kept[name] = jax.device_get(state)

        _, metrics = train.run_one(group, values, key, rungs=[3], keep=keep, resume=resume)
        out[name] = [*metrics["curve"].tolist(), float(metrics["valid_loss"]), float(metrics["untrained"])]
    return out


def another_mesh():
    """What is found where the model's code names a mesh, and the base's another one."""

    def build(width, mesh, mean=False):
        def local(p, x):
            out = jax.lax.psum(jnp.tanh(jnp.tanh(x @ p["w"]) @ p["u"]) @ p["o"], "model")
            return out - jax.lax.pmean(out.mean(), "data") if mean else out

        def apply(p, x):
            specs = {"w": P(), "u": P(None, "model"), "o": P("model", None)}
            return jax.shard_map(local, mesh=mesh, in_specs=(specs, P("data")), out_specs=P("data"))(p, x)

        return mujax.Functional(initial(width), apply)

    def kinds(mean, base):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mup = mujax.mup_init(build(32, mesh, mean), build(8, base, mean), X[0])
        return [finding.kind for finding in mup.findings]

    mesh = train.make_mesh("data=2,model=4")
    one = train.make_mesh("data=1,model=1", jax.devices()[:1])
    found = {"sum": kinds(False, one), "mean": kinds(True, one), "mean, same": kinds(True, mesh)}
    try:
        mujax.mup_init(build(32, mesh), build(6, mesh), X[0])
    except mujax.TraceMismatchError as error:
        return found, str(error)
    return found, ""


print(json.dumps({"pairs": pairs(), "costs": costs(), "jobs": jobs(), "another mesh": another_mesh()}))
