"""mup_init and MupModel: their errors, and that apply is the model's own apply."""

import contextlib
import functools
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx
from flax.core import freeze

import mujax

BASE, WIDTH = 8, 24
R = WIDTH / BASE
KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 7)), jnp.float32)
ABSTRACT = jax.ShapeDtypeStruct((2, 7), jnp.float32)


class MLP(nn.Module):
    """Three layers with biases, dropout, batch statistics, several methods, and something to sow."""

    width: int
    depth: int = 1
    bias: bool = True
    norm: bool = False

    def setup(self):
        self.first = nn.Dense(self.width, use_bias=self.bias)
        self.hidden = [nn.Dense(self.width) for _ in range(self.depth)]
        if self.norm:
            self.batch_norm = nn.BatchNorm(momentum=0.5)
        self.dropout = nn.Dropout(0.5)
        self.out = nn.Dense(3, bias_init=nn.initializers.normal(1.0))

    def encode(self, x, train=False):
        x = nn.relu(self.first(x))
        for layer in self.hidden:
            x = nn.relu(layer(x))
        if self.norm:
            x = self.batch_norm(x, use_running_average=not train)
        self.sow("intermediates", "features", x)
        return self.dropout(x, deterministic=not train)

    def __call__(self, x, train=False):
        return self.out(self.encode(x, train))

    def twice(self, x, *, scale, mask=None):
        y = self.out(self.encode(x))
        return {"out": scale * y if mask is None else jnp.where(mask, scale * y, 0.0), "none": None}


@pytest.fixture(scope="module")
def mlp() -> mujax.MupModel:
    return mujax.mup_init(MLP(WIDTH), MLP(BASE), ABSTRACT)


@pytest.fixture(scope="module")
def variables(mlp) -> Any:
    return jax.jit(mlp.init)(KEY)


def by_hand(variables, x, model=None, **kwargs):
    """The same in µP without mujax: the readout's product over r, before the bias."""
    params = variables["params"]
    out = {**params["out"], "kernel": params["out"]["kernel"] / R}
    return (model or MLP(WIDTH)).apply({**variables, "params": {**params, "out": out}}, x, **kwargs)


def close(ours, theirs) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-6)


# ---- base and target that do not fit ---------------------------------------------------------------


def refused(error: type[Exception], *parts: str):
    """Expects an error whose text has all these parts."""
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, parts)))


def test_another_depth():
    with refused(
        mujax.ShapeMismatchError, "hidden_1/", "expected the same parameters in base and target, got it in "
        "the target only", "not in depth",
    ):  # fmt: skip
        mujax.mup_init(MLP(WIDTH, depth=2), MLP(BASE, depth=1), X)


def test_a_parameter_that_the_target_lacks():
    with refused(
        mujax.ShapeMismatchError, "first/bias: expected the same parameters", "got it in the base only"
    ):
        mujax.mup_init(MLP(WIDTH, bias=False), MLP(BASE), X)


def test_another_rank():
    def model(*shape):
        return mujax.Functional(
            lambda key, x: {"k": jnp.ones((7, *shape))}, lambda p, x: x @ p["k"].reshape(7, -1)
        )

    with refused(
        mujax.ShapeMismatchError, "k: expected the same rank in base and target, got shape (7, 8) in",
        "(7, 4, 6) in the target",
    ):  # fmt: skip
        mujax.mup_init(model(4, 6), model(8), X)


def test_a_vocabulary_that_differs():
    class Net(nn.Module):
        width: int
        vocabulary: int

        @nn.compact
        def __call__(self, tokens):
            return nn.Dense(3)(nn.Embed(self.vocabulary, self.width)(tokens))

    tokens = jax.ShapeDtypeStruct((2, 5), jnp.int32)
    with refused(
        mujax.ShapeMismatchError, "Embed_0/embedding: expected 11 entries along axis 0 as in the base",
        "is looked up by index at", "test_mup_init.py:", "a vocabulary and not a width, got 13",
    ):  # fmt: skip
        mujax.mup_init(Net(WIDTH, 13), Net(BASE, 11), tokens)
    # The twin: the same vocabulary in both.
    assert mujax.mup_init(Net(WIDTH, 11), Net(BASE, 11), tokens).spec["Embed_0/embedding"].role == "input"


def test_one_script_at_every_width():
    """The proxy itself: nothing is infinite, everything is 1, and the model is the user's own."""
    mup = mujax.mup_init(MLP(BASE), MLP(BASE), X, roles={"out/kernel": "output"}, strict=True)
    assert mup.corrections == mup.findings == ()
    assert {param.role for param in mup.spec.values()} == {"finite"}
    assert set(mup.init_scales.values()) == {1.0}
    variables = mup.init(jax.random.key(0), X)
    jax.tree.map(np.testing.assert_array_equal, variables, MLP(BASE).init(jax.random.key(0), X))
    np.testing.assert_array_equal(mup.apply(variables, X), MLP(BASE).apply(variables, X))
    grads = jax.tree.map(jnp.ones_like, variables["params"])
    for ours, plain in (
        (mujax.mup_adamw(0.1, mup.spec, weight_decay=0.1), optax.adamw(0.1, weight_decay=0.1)),
        (mujax.mup_sgd(0.1, mup.spec), optax.sgd(0.1)),
    ):
        found, expected = (tx.update(grads, tx.init(grads), grads)[0] for tx in (ours, plain))
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert "Target and base have the same widths" in mup.explain()
    assert "same widths" not in mujax.mup_init(MLP(WIDTH), MLP(BASE), X).explain()


def test_what_needs_roles_needs_a_delta_at_the_base_width():
    """Each would do something else at the proxy than at the target, silently."""
    spec = mujax.mup_init(MLP(BASE), MLP(BASE), X).spec
    asks = {
        "zero_init": lambda: mujax.mup_init(MLP(BASE), MLP(BASE), X, zero_init=["readout"]),
        "decay_roles": lambda: mujax.mup_adamw(0.1, spec, decay_roles=("hidden",)),
        "lr_mults 'hidden'": lambda: mujax.mup_adam(0.1, spec, lr_mults={"hidden": 2.0}),
        "muon": lambda: mujax.mup_muon(0.1, spec),
    }
    for name, ask in asks.items():
        with refused(
            mujax.RoleError, f"{name}: expected a spec with roles, got one whose target has the widths of "
            "its base", "pass delta= to mup_init",
        ):  # fmt: skip
            ask()
    with_delta = mujax.mup_init(MLP(BASE), MLP(BASE), X, delta=MLP(WIDTH), zero_init=["readout"])
    assert with_delta.init_scales["out/kernel"] == 0.0
    mujax.mup_muon(0.1, with_delta.spec)
    # Globs name parameters, not roles.
    mujax.mup_adam(0.1, spec, lr_mults={"out/*": 2.0})


def test_wrong_roles_are_refused_at_the_base_width_too():
    with refused(mujax.RoleError, "out/kernel: expected a role out of input, hidden, output, finite"):
        mujax.mup_init(MLP(BASE), MLP(BASE), X, roles={"out/kernel": "readout"})
    with refused(
        mujax.RoleError, "roles: expected globs that match parameters, got 'nothing', which matches none"
    ):
        mujax.mup_init(MLP(BASE), MLP(BASE), X, roles={"nothing": "output"})


def test_a_delta_gives_roles_at_the_base_width():
    mup = mujax.mup_init(MLP(BASE), MLP(BASE), X, delta=MLP(WIDTH))
    assert [param.role for param in mup.spec.values()] == [
        param.role for param in mujax.mup_init(MLP(WIDTH), MLP(BASE), X).spec.values()
    ]
    assert [(c.kind, c.factor) for c in mup.corrections] == [("readout", 1.0)]


def test_a_delta_must_vary_every_width_that_the_target_does():
    class Net(nn.Module):
        width: int
        inner: int

        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.Dense(self.inner)(nn.Dense(self.width)(x)))

    with refused(
        mujax.ShapeMismatchError, "kernel: expected the delta to differ from the base wherever the target "
        "does, got target (", "vary every width in the delta",
    ):  # fmt: skip
        mujax.mup_init(Net(24, 48), Net(8, 16), X, delta=Net(12, 16))
    mujax.mup_init(Net(24, 48), Net(8, 16), X, delta=Net(12, 24))


def test_a_delta_of_another_structure():
    with refused(
        mujax.ShapeMismatchError, "expected the same parameters in base and delta", "in the delta only"
    ):
        mujax.mup_init(MLP(BASE), MLP(BASE), X, delta=MLP(WIDTH, depth=2))


def test_a_target_narrower_than_its_base():
    """Factors are ratios: they work both ways."""
    swapped = (
        r"^model: expected a target that is wider than its base, .*; if the two are swapped, pass the large"
    )
    with pytest.warns(mujax.MujaxWarning, match=swapped):
        mup = mujax.mup_init(MLP(BASE), MLP(WIDTH), X)
    assert [c.factor for c in mup.corrections] == [pytest.approx(R)]
    assert mup.init_scales["out/kernel"] == pytest.approx(R**-0.5)


@pytest.mark.parametrize(("target", "base"), [(WIDTH, BASE), (BASE, BASE)])
def test_no_warning_where_the_models_are_in_order(target, base):
    """Warnings are errors here."""
    mujax.mup_init(MLP(target), MLP(base), X)


def test_no_warning_where_one_width_grows_and_another_shrinks():
    def model(a: int, b: int) -> mujax.Functional:
        return mujax.Functional(
            lambda key, x: {"a": jax.random.normal(key, (7, a)), "b": jax.random.normal(key, (7, b))},
            lambda params, x: ((x @ params["a"]).mean(), (x @ params["b"]).mean()),
        )

    mujax.mup_init(model(24, 8), model(8, 24), X)
    for target, base in (((8, 8), (24, 24)), ((8, 8), (24, 8))):
        with pytest.warns(mujax.MujaxWarning, match="swapped"):
            mujax.mup_init(model(*target), model(*base), X)


# ---- what is no model ------------------------------------------------------------------------------


class Small(nnx.Module):
    def __init__(self, width, rngs):
        self.first = nnx.Linear(7, width, rngs=rngs)
        self.out = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.first(x))


def test_an_nnx_instance_instead_of_a_factory():
    instance = Small(WIDTH, nnx.Rngs(0))
    with refused(
        mujax.MujaxError, "model: expected an NNX factory (a function rngs -> module), got an instance of "
        "Small; pass lambda rngs: Small(..., rngs=rngs)",
    ):  # fmt: skip
        mujax.mup_init(instance, instance, X)


def test_a_factory_of_something_else():
    with refused(mujax.MujaxError, "expected an NNX factory that returns an nnx.Module, got int"):
        mujax.mup_init(lambda rngs: 3, lambda rngs: 3, X)


def test_something_that_is_no_model():
    with refused(
        mujax.MujaxError, "expected a Flax Linen module, an NNX factory rngs -> nnx.Module or ",
        "mujax.Functional", "got int",
    ):  # fmt: skip
        mujax.mup_init(3, 4, X)


def test_an_unknown_parametrization():
    with refused(mujax.ParametrizationError, "expected one of 'mup', 'table3', 'table9', 'sp', got 'muP'"):
        mujax.mup_init(MLP(WIDTH), MLP(BASE), X, parametrization="muP")


# ---- what can't be read ----------------------------------------------------------------------------


class Opaque(nn.Module):
    """A kernel that goes through its inverse, and one that does not."""

    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width, name="first")(x)
        kernel = self.param("mixed", nn.initializers.orthogonal(), (self.width, self.width))
        x = x @ jnp.linalg.inv(kernel)  # the line in question
        return nn.Dense(3, name="out")(x)


def _line_of(text: str) -> str:
    with open(__file__) as file:
        (number,) = (n for n, line in enumerate(file, 1) if line.strip().endswith(text))
    return f"test_mup_init.py:{number}"


@pytest.mark.filterwarnings("ignore::mujax.errors.MujaxWarning")
def test_a_parameter_that_can_not_be_followed_is_an_error_and_roles_mends_it():
    with refused(
        mujax.RoleError, "mixed: expected a use that shows which axes of shape (24, 24) are fan-in, got",
        _line_of("# the line in question"), 'give it a role with roles={"mixed": ...}',
    ):  # fmt: skip
        mujax.mup_init(Opaque(WIDTH), Opaque(BASE), X)
    mup = mujax.mup_init(Opaque(WIDTH), Opaque(BASE), X, roles={"mix*": "hidden"})
    spec = mup.spec["mixed"]
    assert (spec.role, spec.fan_in, spec.fan_out) == ("hidden", (0,), (1,))
    turned = mujax.ParamSpec((24, 24), (8, 8), fan_in=(1,), fan_out=(0,), infinite=(0, 1))
    mup = mujax.mup_init(Opaque(WIDTH), Opaque(BASE), X, roles={"mixed": turned})
    assert mup.spec["mixed"] == turned
    assert mup.apply(jax.jit(mup.init)(KEY), X).shape == (4, 3)


def test_a_branch_on_the_width_is_an_error_that_names_both_places():
    class Net(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x):
            x = nn.Dense(self.width)(x)
            activation = self.wide if self.width > 10 else self.narrow
            return nn.Dense(3)(activation(x))

        def wide(self, x):
            return jnp.tanh(x)  # wide

        def narrow(self, x):
            return jnp.sin(x)  # narrow

    with refused(
        mujax.TraceMismatchError, "base and target that differ in sizes only, got sin on (4, 8) at",
        _line_of("# narrow"), "and tanh on (4, 24) at", _line_of("# wide"), "use a larger base",
    ):  # fmt: skip
        mujax.mup_init(Net(WIDTH), Net(BASE), X)
    assert mujax.mup_init(Net(WIDTH), Net(12), X).spec["Dense_0/kernel"].role == "input"


@pytest.mark.parametrize("base", [1, 2])
def test_a_base_of_width_one(base):
    """Its broadcasts and squeezes fall away; what is left is aligned."""
    mup = mujax.mup_init(MLP(8, norm=True), MLP(base, norm=True), X)
    roles = [param.role for path, param in mup.spec.items() if path.endswith("kernel")]
    assert sorted(roles) == ["hidden", "input", "output"]
    assert [c.factor for c in mup.corrections if c.kind == "readout"] == [base / 8]


# ---- nothing is allocated --------------------------------------------------------------------------


def test_a_model_that_fits_no_machine_can_be_described():
    wide = 1 << 22
    mup = mujax.mup_init(MLP(wide), MLP(BASE), ABSTRACT)
    assert mup.spec["hidden_0/kernel"].shape == (wide, wide)
    assert mup.spec["hidden_0/kernel"].r_in == wide / BASE
    shapes = jax.eval_shape(mup.init, KEY)
    out = jax.eval_shape(mup.apply, shapes, ABSTRACT)
    assert out.shape == (2, 3)


# ---- parametrizations ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parametrization", "readout", "entry"),
    [("mup", 1 / R, None), ("table3", None, None), ("table9", R**-0.5, R**0.5), ("sp", None, None)],
)
def test_forward_factors_of_each_parametrization(parametrization, readout, entry):
    """On the product of an output weight, and on each input weight and bias itself."""
    mup = mujax.mup_init(MLP(WIDTH), MLP(BASE), X, parametrization=parametrization)
    assert [c.factor for c in mup.corrections if c.factor != 1.0] == [
        pytest.approx(factor) for factor in (readout,) if factor
    ]
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), jax.eval_shape(mup.init, KEY)
    )
    params = variables["params"]
    for name, leaves in params.items():
        for leaf in leaves:
            spec = mup.spec[f"{name}/{leaf}"]
            factor = {"input": entry, "output": readout}.get(spec.role) or 1.0
            params = {**params, name: {**params[name], leaf: params[name][leaf] * factor}}
    close(mup.apply(variables, X), MLP(WIDTH).apply({"params": params}, X))


def test_the_three_tables_start_as_the_same_function():
    """And so does what lies between two of them."""
    outs = {}
    for table in ("mup", "table3", "table9", "sp", mujax.interpolate("table3", "table9", 0.4)):
        mup = mujax.mup_init(MLP(WIDTH), MLP(BASE), X, parametrization=table)
        outs[str(table)] = jax.jit(lambda key, mup=mup: mup.apply(mup.init(key), X))(KEY)
    assert not np.allclose(outs.pop("sp"), outs["mup"], rtol=1e-2)
    for out in outs.values():
        close(out, outs["mup"])


# ---- the report ------------------------------------------------------------------------------------


def test_corrections_name_the_users_own_line(mlp):
    (correction,) = mlp.corrections
    assert (correction.kind, correction.path, correction.factor) == (
        "readout",
        "out/kernel",
        pytest.approx(1 / R),
    )
    file, line = correction.where.rsplit(":", 1)
    assert file.endswith("tests/unit/core/test_mup_init.py")
    with open(__file__) as source:
        assert source.readlines()[int(line) - 1].strip() == "return self.out(self.encode(x, train))"


def test_explain_shows_roles_factors_and_places(mlp):
    text = mlp.explain()
    first = text.splitlines()[0]
    assert first.startswith(f"{len(mlp.spec)} parameters, {mlp.spec.size():,} entries, parametrization mup.")
    rows = {cells[0]: cells[1:] for line in text.splitlines()[2:] if (cells := line.split())}
    assert rows["parameter"] == [
        "shape",
        "base",
        "shape",
        "role",
        "fan-in",
        "fan-out",
        "init",
        "Adam",
        "LR",
        "SGD",
        "LR",
    ]
    assert rows["first/kernel"] == ["7x24", "7x8", "input", "0", "1", "1", "1", "3"]
    assert rows["hidden_0/kernel"] == ["24x24", "8x8", "hidden", "0", "1", "1", "0.3333", "1"]
    assert rows["out/kernel"] == ["24x3", "8x3", "output", "0", "1", "1.732", "1", "3"]
    assert rows["out/bias"] == ["3", "3", "finite", "-", "0", "1", "1", "1"]
    assert f"x 0.3333  readout of out/kernel at {mlp.corrections[0].where}" in text


def test_explain_groups_layers_that_differ_in_their_number_only():
    text = mujax.mup_init(MLP(WIDTH, depth=5), MLP(BASE, depth=5), X).explain()
    assert "hidden_*/kernel (5 alike)" in text
    assert "hidden_3" not in text

    # Each name still stands for itself where the numbers distinguish layers.
    class Net(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.Dense(self.width)(nn.Dense(self.width)(x)))

    text = mujax.mup_init(Net(WIDTH), Net(BASE), X).explain()
    assert all(f"Dense_{n}/kernel " in text for n in range(3))


def test_explain_says_where_there_is_nothing_to_say():
    text = mujax.mup_init(MLP(WIDTH), MLP(BASE), X, parametrization="sp").explain()
    assert "Factors in the forward pass:\n  none" in text


# ---- init ------------------------------------------------------------------------------------------


def test_init_takes_what_the_models_own_takes(mlp):
    keys = {"params": KEY, "dropout": KEY}
    theirs = jax.eval_shape(lambda: MLP(WIDTH).init(keys, X, train=True))
    for call in (
        lambda: mlp.init(KEY),
        lambda: mlp.init(KEY, X),
        lambda: mlp.init(keys, X, train=True),
        lambda: jax.jit(mlp.init)(KEY),
    ):
        assert jax.eval_shape(call) == theirs
    ensemble = jax.eval_shape(jax.vmap(mlp.init), jax.random.split(KEY, 3))
    assert ensemble["params"]["out"]["kernel"].shape == (3, WIDTH, 3)


def test_init_with_abstract_arguments_by_keyword():
    class Net(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x, *, mask, train):
            x = nn.Dense(self.width)(x) * mask
            return nn.Dense(3)(nn.Dropout(0.1, deterministic=not train)(x))

    mask = jax.ShapeDtypeStruct((2, 1), jnp.float32)
    mup = mujax.mup_init(Net(WIDTH), Net(BASE), ABSTRACT, mask=mask, train=False)
    variables = mup.init(KEY)
    assert variables["params"]["Dense_0"]["kernel"].shape == (7, WIDTH)
    assert mup.apply(variables, X, mask=jnp.ones((4, 1)), train=False).shape == (4, 3)


# ---- apply is the model's own apply ----------------------------------------------------------------


def test_apply_is_the_model_with_its_factor(mlp, variables):
    close(mlp.apply(variables, X), by_hand(variables, X))
    # The twin: without the factor it is another function.
    assert not np.allclose(mlp.apply(variables, X), MLP(WIDTH).apply(variables, X), rtol=1e-2)


@pytest.mark.parametrize("batch", [(1,), (5,), (2, 3)])
def test_any_batch(mlp, variables, batch):
    x = jnp.ones((*batch, 7))
    close(mlp.apply(variables, x), by_hand(variables, x))


def _loss(apply):
    return lambda variables, x: (apply(variables, x) ** 2).sum()


TRANSFORMS = {
    "jit": lambda f, v, x: jax.jit(f)(v, x),
    "grad": lambda f, v, x: jax.grad(_loss(f))(v, x),
    "value_and_grad of jit": lambda f, v, x: jax.value_and_grad(jax.jit(_loss(f)))(v, x),
    "grad of the input": lambda f, v, x: jax.grad(_loss(f), argnums=1)(v, x),
    "vmap over inputs": lambda f, v, x: jax.vmap(f, in_axes=(None, 0))(v, x[:, None]),
    "vmap over variables": lambda f, v, x: jax.vmap(f, in_axes=(0, None))(
        jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), v), x
    ),
    "grad of vmap": lambda f, v, x: jax.grad(lambda v: jax.vmap(f, in_axes=(None, 0))(v, x).sum())(v),
    "checkpoint": lambda f, v, x: jax.grad(jax.checkpoint(_loss(f)))(v, x),
    "scan": lambda f, v, x: jax.lax.scan(lambda c, row: (c + 1, f(v, row)), 0, x[:, None])[1],
    "jvp": lambda f, v, x: jax.jvp(lambda x: f(v, x), (x,), (x,)),
    "linearize": lambda f, v, x: jax.linearize(lambda x: f(v, x), x)[1](x),
    "eager": lambda f, v, x: f(v, x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_apply_under_transformations(mlp, variables, name):
    transform = TRANSFORMS[name]
    close(transform(mlp.apply, variables, X), transform(by_hand, variables, X))


def test_apply_can_be_exported(mlp, variables):
    exported = jax.export.export(jax.jit(mlp.apply))(variables, X)
    close(exported.call(variables, X), by_hand(variables, X))


def test_apply_compiles_once_per_shape(mlp, variables):
    traces = []

    @jax.jit
    def step(variables, x):
        traces.append(x.shape)
        return mlp.apply(variables, x)

    for batch in (4, 4, 2, 4):
        step(variables, X[:batch])
    assert traces == [(4, 7), (2, 7)]


def test_donated_buffers(mlp, variables):
    @jax.jit(donate_argnums=0)
    def step(variables, x):
        gradient = jax.grad(_loss(mlp.apply))(variables, x)
        return jax.tree.map(lambda a, b: a - 0.1 * b, variables, gradient)

    mine = jax.tree.map(jnp.copy, variables)
    new = step(mine, X)
    assert jax.tree.leaves(mine)[0].is_deleted()
    gradient = jax.grad(_loss(by_hand))(variables, X)
    close(new, jax.tree.map(lambda a, b: a - 0.1 * b, variables, gradient))


def test_methods_by_name_and_by_function(mlp, variables):
    # What is called does not hold the readout: nothing is corrected.
    for method in ("encode", MLP.encode):
        close(mlp.apply(variables, X, method=method), MLP(WIDTH).apply(variables, X, method="encode"))
    mask = X[:, :3] > 0
    ours = mlp.apply(variables, X, scale=2.0, mask=mask, method="twice")
    close(ours, by_hand(variables, X, scale=2.0, mask=mask, method="twice"))
    assert ours["none"] is None
    close(
        mlp.apply(variables, X, scale=2.0, method=MLP.twice), by_hand(variables, X, scale=2.0, method="twice")
    )


def test_rngs(mlp, variables):
    kwargs = {"train": True, "rngs": {"dropout": jax.random.key(3)}}
    close(mlp.apply(variables, X, **kwargs), by_hand(variables, X, **kwargs))
    kwargs = {"train": True, "rngs": {"dropout": jax.random.key(4)}}
    other = mlp.apply(variables, X, **kwargs)
    assert not np.allclose(other, mlp.apply(variables, X, train=True, rngs={"dropout": jax.random.key(3)}))


def test_capture_intermediates(mlp, variables):
    ours = mlp.apply(variables, X, capture_intermediates=True)
    theirs = by_hand(variables, X, capture_intermediates=True)
    close(ours, theirs)
    assert "out" in ours[1]["intermediates"]
    only_dense = lambda module, _: isinstance(module, nn.Dense)  # noqa: E731
    close(
        mlp.apply(variables, X, capture_intermediates=only_dense, mutable=["intermediates"]),
        by_hand(variables, X, capture_intermediates=only_dense, mutable=["intermediates"]),
    )


def test_sown_values(mlp, variables):
    ours, state = mlp.apply(variables, X, mutable=["intermediates"])
    theirs, expected = by_hand(variables, X, mutable=["intermediates"])
    close((ours, state), (theirs, expected))
    assert set(state["intermediates"]) == {"features"}


def test_frozen_variables(mlp, variables):
    close(mlp.apply(freeze(variables), X), mlp.apply(variables, X))


def test_variables_from_elsewhere(mlp):
    """A checkpoint of the user's own: numpy arrays of the right shapes."""
    theirs = jax.tree.map(np.asarray, MLP(WIDTH).init(KEY, X))
    close(mlp.apply(theirs, np.asarray(X)), by_hand(theirs, np.asarray(X)))


def test_batch_statistics():
    model, base = MLP(WIDTH, norm=True), MLP(BASE, norm=True)
    mup = mujax.mup_init(model, base, ABSTRACT)
    variables = mup.init(KEY)
    kwargs = {"train": True, "rngs": {"dropout": KEY}, "mutable": ["batch_stats"]}
    ours, state = mup.apply(variables, X, **kwargs)
    close((ours, state), by_hand(variables, X, model, **kwargs))
    assert float(jnp.abs(state["batch_stats"]["batch_norm"]["mean"]).max()) > 0
    # Evaluation reads what training wrote.
    trained = {**variables, **state}
    close(mup.apply(trained, X), by_hand(trained, X, model))
    assert not np.allclose(mup.apply(trained, X), mup.apply(variables, X), rtol=1e-3)
    assert set(mup.spec) == {path for path in mup.spec if "mean" not in path}


class Decoder(nn.Module):
    """One attention layer with a cache; the head size grows."""

    width: int

    @nn.compact
    def __call__(self, x, *, decode=False):
        x = nn.Dense(self.width, name="first")(x)
        x = nn.MultiHeadDotProductAttention(2, decode=decode, name="attention")(x)
        return nn.Dense(3, name="out")(x)


def test_a_cache_of_keys_and_values():
    mup = mujax.mup_init(
        Decoder(WIDTH), Decoder(BASE), jax.ShapeDtypeStruct((2, 6, 7), jnp.float32), decode=True
    )
    variables = mup.init(KEY)
    assert variables["cache"]["attention"]["cached_key"].shape == (2, 6, 2, WIDTH // 2)
    step = jax.jit(lambda v, x: mup.apply(v, x, decode=True, mutable=["cache"]))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 7)), jnp.float32)
    cache, outs = variables["cache"], []
    for position in range(6):
        out, new = step({"params": variables["params"], "cache": cache}, x[:, position : position + 1])
        cache = new["cache"]
        outs.append(out)
    # Token by token through the cache is what the causal mask gives at once, with the same factors.
    params = {"params": variables["params"]}
    full = mup.apply(params, x)
    causal = _causal(params["params"], x)
    close(jnp.concatenate(outs, 1), causal)
    assert not np.allclose(full, causal, rtol=1e-3)


def _causal(params, x):
    """The decoder in µP by hand: logits over head size, not its root; the readout over r."""
    h = x @ params["first"]["kernel"] + params["first"]["bias"]
    attention = params["attention"]
    q, k, v = (
        jnp.einsum("bti,ihd->bthd", h, attention[name]["kernel"]) + attention[name]["bias"]
        for name in ("query", "key", "value")
    )
    logits = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(WIDTH / 2) / np.sqrt(R)
    weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((6, 6), bool)), logits, -jnp.inf))
    y = jnp.einsum("bhts,bshd->bthd", weights, v)
    y = jnp.einsum("bthd,hdo->bto", y, attention["out"]["kernel"]) + attention["out"]["bias"]
    return y @ params["out"]["kernel"] / R + params["out"]["bias"]


# ---- variables that do not fit ---------------------------------------------------------------------


def test_variables_of_other_widths(mlp):
    expected = "first/bias: expected shape (24,) as in mup_init, got (16,); build the"
    with refused(mujax.SpecMismatchError, expected):
        mlp.apply(MLP(16).init(KEY, X), X)


def test_variables_that_lack_a_parameter(mlp, variables):
    params = {name: leaves for name, leaves in variables["params"].items() if name != "out"}
    with refused(
        mujax.SpecMismatchError, "out/bias: expected a parameter of shape (3,) as in mup_init, got none"
    ):
        mlp.apply({"params": params}, X)


def test_parameters_without_their_collection(mlp, variables):
    with refused(mujax.SpecMismatchError, "expected a parameter of shape", "got none"):
        mlp.apply(variables["params"], X)


def test_a_parameter_too_many(mlp, variables):
    more = {**variables["params"], "extra": {"kernel": jnp.ones(3)}}
    with refused(mujax.SpecMismatchError, "extra/kernel: expected only"):
        mlp.apply({"params": more}, X)


def test_errors_of_the_model_itself_come_through(mlp, variables):
    with pytest.raises(Exception, match=r"(?i)shape|dot_general|Initializer"):
        mlp.apply(variables, jnp.ones((4, 9)))
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        mlp.apply(variables, X, nonsense=True)


# ---- a call is traced once ---------------------------------------------------------------------------


TRACED: list[tuple[int, ...]] = []
"""The shape of the input each time that the Python code of `_Counted` ran."""


class _Counted(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, gain=1.0, negate=False):
        TRACED.append(x.shape)
        h = nn.relu(nn.Dense(self.width, name="first")(x)) * gain
        return nn.Dense(3, name="out")(-h if negate else h)


@pytest.fixture
def counted():
    mup = mujax.mup_init(_Counted(WIDTH), _Counted(BASE), X)
    variables = mup.init(KEY, X)
    TRACED.clear()
    return mup, variables


def test_an_eager_call_is_traced_once(counted):
    mup, variables = counted
    first = mup.apply(variables, X)
    traced = len(TRACED)
    assert traced == 2
    np.testing.assert_array_equal(mup.apply(variables, X), first)
    mup.apply(jax.tree.map(lambda leaf: 2 * leaf, variables), 3 * X)
    mup.with_multipliers(output_mult=2.0).apply(variables, X)
    assert len(TRACED) == traced


def test_a_call_that_differs_is_traced_again(counted):
    mup, variables = counted
    plain = mup.apply(variables, X)
    for number, (args, kwargs) in enumerate(
        [((X[:2],), {}), ((X,), {"negate": True}), ((X.astype(jnp.float16),), {}), ((X,), {"gain": 2.0})]
    ):
        before = len(TRACED)
        out = mup.apply(variables, *args, **kwargs)
        assert len(TRACED) > before, number
        assert out.shape != plain.shape or not np.allclose(out, plain, rtol=1e-6, atol=0)
    with jax.default_matmul_precision("tensorfloat32"):
        before = len(TRACED)
        mup.apply(variables, X)
        assert len(TRACED) > before
    # 1, 1.0 and True are equal, and not the same argument.
    assert mup.apply(variables, X, 1).dtype == mup.apply(variables, X, True).dtype == jnp.float32
    before = len(TRACED)
    mup.apply(variables, X, 1)
    assert len(TRACED) == before


def test_multipliers_reach_a_call_that_was_known_without():
    """At the base's widths nothing is corrected."""
    mup = mujax.mup_init(_Counted(BASE), _Counted(BASE), X, delta=_Counted(WIDTH))
    variables = mup.init(KEY, X)
    plain = mup.apply(variables, X)
    kernel_part = plain - variables["params"]["out"]["bias"]
    doubled = mup.with_multipliers(output_mult=2.0).apply(variables, X)
    np.testing.assert_allclose(doubled - plain, kernel_part, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(mup.apply(variables, X), plain)


def test_a_known_call_under_transformations_gives_what_a_new_one_gives(counted):
    mup, variables = counted
    other = mujax.mup_init(_Counted(WIDTH), _Counted(BASE), X)
    mup.apply(variables, X)

    def loss(mup: mujax.MupModel, variables: Any) -> Any:
        return (mup.apply(variables, X) ** 2).sum()

    for run in (jax.grad, lambda f: jax.jit(jax.grad(f)), lambda f: lambda v: jax.jvp(f, (v,), (v,))):
        both = [run(functools.partial(loss, one))(variables) for one in (mup, other)]
        for ours, theirs in zip(*map(jax.tree.leaves, both), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    stacked = jnp.stack([X, 2 * X])
    np.testing.assert_allclose(
        jax.vmap(lambda x: mup.apply(variables, x))(stacked),
        [mup.apply(variables, X), mup.apply(variables, 2 * X)],
        rtol=1e-5,
    )
    with jax.disable_jit():
        np.testing.assert_allclose(mup.apply(variables, X), other.apply(variables, X), rtol=1e-5)


def test_a_known_call_has_its_side_effects_each_time():
    seen: list[float] = []

    class Net(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x):
            h = nn.relu(nn.Dense(self.width)(x))
            jax.debug.callback(lambda value: seen.append(float(value)), h.sum())
            return nn.Dense(3)(h)

    mup = mujax.mup_init(Net(WIDTH), Net(BASE), X)
    variables = mup.init(KEY, X)
    jax.effects_barrier()
    seen.clear()
    for _ in range(3):
        mup.apply(variables, X)
    jax.effects_barrier()
    assert len(seen) == 3


def test_an_eager_call_compiles_its_loops_once():
    class Block(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x, _):
            q, k = nn.Dense(self.width)(x), nn.Dense(self.width)(x)
            return nn.softmax(q @ k.T / self.width**0.5) @ x, None

    class Net(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x):
            blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            h, _ = blocks(self.width)(nn.Dense(self.width)(x), None)
            return nn.Dense(3)(h)

    mup = mujax.mup_init(Net(WIDTH), Net(BASE), X)
    assert "attention" in {correction.kind for correction in mup.corrections}
    variables = mup.init(KEY, X)
    first = mup.apply(variables, X)
    with jax.log_compiles(), _compiled() as names:
        again = mup.apply(variables, X)
        assert names == []
        # The negative twin: a loop that is built again is compiled again.
        mup.with_multipliers(attention_mult=1.0).apply(variables, X)
        assert names != []
    np.testing.assert_array_equal(first, again)


@contextlib.contextmanager
def _compiled() -> Iterator[list[str]]:
    """The names of what is compiled in the meantime."""
    names: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if (message := record.getMessage()).startswith("Compiling"):
                names.append(message)

    logger, handler = logging.getLogger("jax"), Handler()
    logger.addHandler(handler)
    try:
        yield names
    finally:
        logger.removeHandler(handler)


def test_the_sizes_of_named_axes_are_not_taken_from_another_call():
    """They are folded into a program when it is traced."""

    def build(width: int) -> mujax.Functional:
        def apply(params: Any, x: Any, named: bool = False) -> Any:
            return x @ params["a"] @ params["b"] / (jax.lax.psum(1, "copies") if named else 1)

        return mujax.Functional(lambda key, x: {"a": jnp.ones((7, width)), "b": jnp.ones((width, 3))}, apply)

    mup = mujax.mup_init(build(WIDTH), build(BASE), X)
    params = mup.init(KEY, X)
    plain = mup.apply(params, X)
    for copies in (1, 4, 2):
        over = jax.vmap(lambda x: mup.apply(params, x, named=True), axis_name="copies")
        np.testing.assert_allclose(over(jnp.stack([X] * copies))[0], plain / copies, rtol=1e-6)


def test_a_closed_over_tracer_is_not_kept():
    """A model may close over a value of the transformation that is under way."""

    box: list[Any] = [1.0]

    def build(width: int) -> mujax.Functional:
        return mujax.Functional(
            lambda key, x: {"a": jnp.ones((7, width)), "b": jnp.ones((width, 3))},
            lambda params, x: (x @ params["a"] * box[0]) @ params["b"],
        )

    mup = mujax.mup_init(build(WIDTH), build(BASE), X)
    params = mup.init(KEY, X)

    def loss(gain: Any) -> Any:
        box[0] = gain
        return mup.apply(params, X).sum()

    slope = jax.grad(loss)(2.0)
    np.testing.assert_allclose(jax.grad(loss)(3.0), slope, rtol=1e-5)
    box[0] = 5.0
    np.testing.assert_allclose(mup.apply(params, X).sum(), 5 * slope, rtol=1e-5)


# ---- multipliers where nothing can be inserted ---------------------------------------------------------


@jax.custom_vjp
def _own_attention(q, k):
    return jax.nn.softmax(jnp.tanh(q) @ jnp.tanh(k).T / q.shape[-1])


_own_attention.defvjp(
    lambda q, k: (_own_attention(q, k), (q, k)), lambda saved, g: (g @ saved[1], g.T @ saved[0])
)


def test_a_multiplier_inside_of_a_function_with_its_own_derivative():
    def build(width: int) -> mujax.Functional:
        def init(key: Any, x: Any) -> Any:
            first, second = jax.random.normal(key, (2, 7, width))
            return {"q": first, "k": second, "out": jnp.arange(12.0).reshape(4, 3)}

        return mujax.Functional(
            init, lambda params, x: _own_attention(x @ params["q"], x @ params["k"]) @ params["out"]
        )

    mup = mujax.mup_init(build(WIDTH), build(BASE), X)
    params = mup.init(KEY, X)
    plain = mup.apply(params, X)
    with refused(
        mujax.ConfigError, "test_mup_init.py:", "expected the product that attention_mult multiplies "
        "outside of custom_vjp_call", "leave out attention_mult",
    ):  # fmt: skip
        mup.with_multipliers(attention_mult=2.0).apply(params, X)
    # What can be reached is multiplied.
    doubled = mup.with_multipliers(input_mult=2.0).apply(params, X)
    assert not np.allclose(doubled, plain)


# ---- another number of classes -----------------------------------------------------------------------


class Classifier(nn.Module):
    width: int
    classes: int
    end: Callable

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.Dense(self.width)(x))
        return self.end(nn.Dense(self.classes, name="head")(x))


ENDS = {
    "logits": lambda z: z,
    "logits beside features": lambda z: (jnp.tanh(z), z.mean()),
    "probabilities": nn.softmax,
    "log-probabilities": nn.log_softmax,
    "sigmoids": nn.sigmoid,
    "a loss in the model": lambda z: -nn.log_softmax(z)[:, 0].mean(),
    "a sum of exponentials": lambda z: jax.nn.logsumexp(z, axis=-1),
}


@pytest.mark.filterwarnings("ignore::mujax.MujaxWarning")
@pytest.mark.parametrize("name", ENDS)
def test_another_number_of_classes_is_refused(name):
    def net(width, classes):
        return Classifier(width, classes, ENDS[name])

    x = jax.ShapeDtypeStruct((2, 5), jnp.float32)
    with pytest.raises(mujax.ShapeMismatchError, match=r"head/kernel: expected 10 entries along axis 1"):
        mujax.mup_init(net(64, 100), net(16, 10), x)
    assert mujax.mup_init(net(64, 10), net(16, 10), x).spec["head/kernel"].role == "output"
    overruled = mujax.mup_init(net(64, 100), net(16, 10), x, roles={"head/*": "hidden", "head/bias": "input"})
    assert overruled.spec["head/kernel"].role == "hidden"


def test_features_that_grow_are_no_classes():
    """The outputs of a backbone, and a layer that a softmax normalises, grow as the layers that are read."""

    def net(width):
        return Classifier(width, 2 * width, nn.softmax)

    x = jax.ShapeDtypeStruct((2, 5), jnp.float32)
    assert mujax.mup_init(net(64), net(16), x).spec["head/kernel"].role == "hidden"


# ---- parameters that the first call does not use -----------------------------------------------------


class Masked(nn.Module):
    """Replaces masked features by a learned token, and may add a head of its own."""

    width: int

    @nn.compact
    def __call__(self, x, mask=None, project=False):
        token = self.param("token", nn.initializers.normal(1.0), (self.width,))
        inner = self.param("inner", nn.initializers.lecun_normal(), (self.width, self.width))
        x = nn.relu(nn.Dense(self.width)(x))
        if mask is not None:
            x = jnp.where(mask[:, None], token, x)
        return nn.Dense(3)(nn.relu(x @ inner) if project else x)


def test_the_role_of_an_unused_parameter_is_read_off_another_call():
    mask, x = jnp.array([True, False, True, False]), jax.ShapeDtypeStruct((4, 5), jnp.float32)
    with pytest.warns(mujax.MujaxWarning, match=r"give a call that uses it, other_calls="):
        mup = mujax.mup_init(Masked(64), Masked(16), x)
    assert [finding.where for finding in mup.findings] == ["inner", "token"]
    assert mup.spec["inner"].role == "input"
    calls = ({"mask": mask}, {"project": True})
    mup = mujax.mup_init(Masked(64), Masked(16), x, other_calls=calls, strict=True)
    assert (mup.spec["token"].role, mup.spec["inner"].role, mup.spec["inner"].fan_in) == (
        "input",
        "hidden",
        (0,),
    )
    variables = mup.init(KEY, jnp.ones(x.shape))
    assert mup.apply(variables, jnp.ones(x.shape), mask, project=True).shape == (4, 3)


def test_a_parameter_that_no_call_uses_is_still_reported():
    x = jax.ShapeDtypeStruct((4, 5), jnp.float32)
    with pytest.warns(mujax.MujaxWarning, match="inner"):
        mup = mujax.mup_init(Masked(64), Masked(16), x, other_calls=({"mask": jnp.ones(4, bool)},))
    assert [finding.where for finding in mup.findings] == ["inner"]
