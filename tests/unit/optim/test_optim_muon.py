"""Muon: which matrices, which factors; optax's at the base."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax.contrib import MuonDimensionNumbers
from zoo import BASE, CASES, WIDTH

import mujax
from mujax import rules
from mujax.errors import MujaxError, SpecMismatchError
from mujax.optim import mup_scale_by_adam
from mujax.spec import MupSpec, ParamSpec

# r_in = 3 and r_out = 5 wherever there is one; at the base 4 rows and 8 columns, or the other way round.
HIDDEN = {
    "dense": ParamSpec((12, 40), (4, 8), (0,), (1,), (), (0, 1)),
    "tall": ParamSpec((24, 20), (8, 4), (0,), (1,), (), (0, 1)),
    "out, in": ParamSpec((40, 12), (8, 4), (1,), (0,), (), (0, 1)),
    "to heads": ParamSpec((12, 10, 4), (4, 2, 4), (0,), (1, 2), (), (0, 1)),
    "from heads": ParamSpec((6, 2, 40), (2, 2, 8), (0, 1), (2,), (), (0, 2)),
    "conv": ParamSpec((3, 2, 6, 20), (3, 2, 2, 4), (0, 1, 2), (3,), (), (2, 3)),
    "experts": ParamSpec((3, 12, 40), (3, 4, 8), (1,), (2,), (0,), (1, 2)),
    "scanned heads": ParamSpec((2, 12, 10, 4), (2, 4, 2, 4), (1,), (2, 3), (0,), (1, 2)),
    "experts last": ParamSpec((12, 40, 3), (4, 8, 3), (0,), (1,), (2,), (0, 1)),
}
# Muon's own factor at the base: sqrt(max(1, columns / rows)).
OWN = dict.fromkeys(HIDDEN, 1.4142135624) | {"tall": 1.0, "conv": 1.0}
# Compiling takes far longer than running, and with the number of iterations. One of them is a function of the
# matrix like any other.
mup_muon = functools.partial(mujax.mup_muon, ns_steps=1)
mup_scale_by_muon = functools.partial(mujax.mup_scale_by_muon, ns_steps=1)
muon = functools.partial(optax.contrib.muon, ns_steps=1)
scale_by_muon = functools.partial(optax.contrib.scale_by_muon, ns_steps=1)
SPECTRAL = 1.2909944487  # sqrt(5 / 3)
ZOO = ("dense_general", "conv", "moe", "scan_last_axis", "transposed")
OTHERS = {
    "embed": ParamSpec((11, 20), (11, 4), (0,), (1,), (), (1,), tied=True),
    "first": ParamSpec((7, 20), (7, 4), (0,), (1,), (), (1,)),
    "gain": ParamSpec((20,), (4,), (), (0,), (), (0,)),
    "last": ParamSpec((12, 10), (4, 10), (0,), (1,), (), (0,)),
    "last bias": ParamSpec((10,), (10,), (), (0,)),
}


SOME = {path: (HIDDEN | OTHERS)[path] for path in ("tall", "scanned heads", "first", "gain", "last")}


def make_spec(parametrization="mup", *, base=False, params=SOME):
    return MupSpec(
        {
            path: dataclasses.replace(param, shape=param.base_shape) if base else param
            for path, param in params.items()
        },
        rules.parametrization(parametrization),
    )


def random_tree(spec, seed=1):
    rng = np.random.default_rng(seed)
    return {path: jnp.asarray(rng.normal(size=param.shape), jnp.float32) for path, param in spec.items()}


def one_update(tx, gradients, params=None):
    params = gradients if params is None else params
    # What XLA fuses it may round otherwise, so all are run alike; as constants they would be folded, slowly.
    return jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])(gradients, params)


def matrices(param, array):
    """The matrices of a parameter by hand: batch, rows, columns."""
    order = (*param.stack, *param.fan_in, *param.fan_out)
    sizes = [math.prod(param.shape[axis] for axis in axes) for axes in (param.stack, param.fan_in)]
    return np.transpose(array, order).reshape(*sizes, -1)


@functools.cache
def orthogonalised(rows, columns):
    return jax.jit(lambda m: scale_by_muon().update(m, scale_by_muon().init(m))[0])


def by_hand(param, gradient):
    found = matrices(param, gradient)
    return np.stack([orthogonalised(*m.shape)(jnp.asarray(m)) for m in found])


def by_roles(spec):
    """What a user of optax would have to write down."""
    return {
        path: MuonDimensionNumbers(param.fan_in, param.fan_out) if param.role == "hidden" else None
        for path, param in spec.items()
    }


class TestFactors:
    @pytest.mark.parametrize("path", HIDDEN)
    def test_each_matrix_gets_the_base_factor_times_the_spectral_rule(self, path):
        spec = make_spec(params=HIDDEN)
        gradients = random_tree(spec)
        updates = one_update(mup_scale_by_muon(spec), gradients)
        expected = OWN[path] * SPECTRAL * by_hand(spec[path], gradients[path])
        np.testing.assert_allclose(matrices(spec[path], updates[path]), expected, rtol=2e-3, atol=2e-4)

    def test_by_rank_the_matrices_are_others(self):
        """The twin: fan-in and fan-out taken from the wrong axes give another update."""
        spec = make_spec(params={"to heads": HIDDEN["to heads"]})
        wrong = dataclasses.replace(HIDDEN["to heads"], fan_in=(0, 1), fan_out=(2,))
        gradients = random_tree(spec)
        ours = one_update(mup_scale_by_muon(spec), gradients)["to heads"]
        others = one_update(mup_scale_by_muon(make_spec(params={"to heads": wrong})), gradients)["to heads"]
        assert not np.allclose(ours / np.linalg.norm(ours), others / np.linalg.norm(others), rtol=0.1)

    @pytest.mark.parametrize("parametrization", ["mup", "table9"])
    def test_everything_else_goes_through_adam_with_adams_rule(self, parametrization):
        spec = make_spec(parametrization, params=OTHERS | {"dense": HIDDEN["dense"]})
        gradients = random_tree(spec)
        options = {"eps": 0.5, "eps_root": 0.25, "nesterov": True}
        theirs = one_update(mup_scale_by_adam(spec, 0.8, 0.9, **options), gradients)
        tx = mup_scale_by_muon(spec, eps=0.5, adam_b1=0.8, adam_b2=0.9, adam_eps_root=0.25)
        ours = one_update(tx, gradients)
        for path, param in spec.items():
            assert np.array_equal(ours[path], theirs[path]) == (param.role != "hidden")

    @pytest.mark.parametrize("consistent_rms", [None, 0.2])
    @pytest.mark.parametrize("path", ["dense", "tall"])
    def test_muons_own_factor_is_the_bases(self, path, consistent_rms):
        spec = make_spec(params={path: HIDDEN[path]})
        gradients = random_tree(spec)
        rows, columns = matrices(spec[path], gradients[path]).shape[1:]
        base_rows, base_columns = rows // 3, columns // 5

        def own(rows, columns):
            if consistent_rms is None:
                return math.sqrt(max(1, columns / rows))
            return math.sqrt(max(rows, columns)) * consistent_rms

        (update,) = matrices(
            spec[path], one_update(mup_muon(-1.0, spec, consistent_rms=consistent_rms), gradients)[path]
        )
        (orthogonal,) = by_hand(spec[path], gradients[path])
        factor = np.linalg.norm(update) / np.linalg.norm(orthogonal)
        assert factor == pytest.approx(own(base_rows, base_columns) * math.sqrt(5 / 3), rel=1e-3)

    def test_standard_parametrization_is_optax_at_the_target(self):
        spec = make_spec("sp")
        gradients = random_tree(spec)
        theirs = muon(0.1, muon_weight_dimension_numbers=by_roles(spec))
        ours, others = (one_update(tx, gradients) for tx in (mup_muon(0.1, spec), theirs))
        assert jax.tree.all(jax.tree.map(np.array_equal, ours, others))

    def test_halfway_to_standard_parametrization(self):
        half = make_spec(rules.interpolate("sp", "mup", 0.5))
        gradients = random_tree(half)
        found = [
            one_update(mup_scale_by_muon(spec, eps=0.0), gradients)
            for spec in (make_spec("sp"), half, make_spec())
        ]
        for path in ("tall", "scanned heads"):
            sp, between, mup = (np.linalg.norm(updates[path]) for updates in found)
            assert between == pytest.approx(math.sqrt(sp * mup), rel=1e-4)

    def test_a_growing_number_of_matrices_leaves_each_its_own_norm(self):
        """Block-diagonal: sqrt(3 / 3) for the sides of a block; a growing number of blocks adds nothing."""
        param = ParamSpec((8, 12, 12), (2, 4, 4), (1,), (2,), (0,), (0, 1, 2))
        spec = make_spec(params={"blocks": param})
        gradients = random_tree(spec)
        update = one_update(mup_scale_by_muon(spec), gradients)["blocks"]
        np.testing.assert_allclose(update, by_hand(param, gradients["blocks"]), rtol=2e-3, atol=2e-4)

    @pytest.mark.parametrize("name", ZOO)
    def test_the_models_of_the_zoo(self, name):
        """Every hidden weight of a model is updated with the spectral norm that its two sides ask for."""
        case = CASES[name]
        model, base = case.build(WIDTH), case.build(BASE)
        spec = mujax.mup_init(model, base, *case.inputs).spec
        hidden = MupSpec({p: s for p, s in spec.items() if s.role == "hidden"}, spec.parametrization)
        assert hidden
        gradients = random_tree(hidden)
        updates = one_update(mujax.mup_scale_by_muon(hidden), gradients)
        for path, param in hidden.items():
            rows, columns = (
                math.prod(param.base_shape[axis] for axis in axes) for axes in (param.fan_in, param.fan_out)
            )
            stack = math.prod(param.shape[axis] / param.base_shape[axis] for axis in param.stack)
            expected = math.sqrt(max(1, columns / rows) * param.r_out / stack / param.r_in)
            for update in matrices(param, updates[path]):
                # Newton-Schulz leaves singular values between 0.5 and 1.5; the smallest take more steps.
                assert 0.6 < np.linalg.norm(update, 2) / expected < 1.4, path


class TestEpsilon:
    # Grown by 12 and by 3 only: the gradient's entries shrink by 3, its norm as a matrix grows by 2.
    PARAM = ParamSpec((48, 12), (4, 4), (0,), (1,), (), (0, 1))

    def test_the_norm_that_epsilon_meets(self):
        spec = make_spec(params={"w": self.PARAM})
        gradients = random_tree(spec)
        norm = 2.0
        # An epsilon as large as the gradient: halved or not, it shows.
        eps = float(jnp.linalg.norm(gradients["w"]))
        at_base = one_update(mup_scale_by_muon(spec, eps=eps, scale_eps=False), gradients)["w"]
        grown = one_update(mup_scale_by_muon(spec, eps=eps), {"w": norm * gradients["w"]})["w"]
        np.testing.assert_allclose(grown, at_base, rtol=1e-3, atol=1e-5)
        left = one_update(mup_scale_by_muon(spec, eps=eps, scale_eps=False), {"w": norm * gradients["w"]})[
            "w"
        ]
        assert not np.allclose(left, at_base, rtol=0.05)

    @pytest.mark.parametrize("scale_eps", [True, False])
    def test_the_dual_norm_of_adaptive_updates(self, scale_eps):
        spec = make_spec(params={"w": self.PARAM})
        gradients = random_tree(spec)
        options = {"eps": 0.0, "scale_eps": scale_eps, "nesterov": False}
        direction = one_update(mup_scale_by_muon(spec, **options), gradients)["w"]
        adaptive = one_update(mup_scale_by_muon(spec, adaptive=True, **options), {"w": 2 * gradients["w"]})[
            "w"
        ]
        (orthogonal,) = by_hand(self.PARAM, gradients["w"])
        nuclear = float(np.sum(orthogonal * matrices(self.PARAM, gradients["w"])))
        np.testing.assert_allclose(adaptive, nuclear * direction, rtol=1e-2, atol=1e-3)

    def test_sides_that_grow_alike_leave_the_gradient_as_it_is(self):
        spec = make_spec(params={"w": ParamSpec((28, 28), (4, 4), (0,), (1,), (), (0, 1))})
        gradients = random_tree(spec)
        programs = [
            str(jax.make_jaxpr(lambda g, tx=tx: tx.update(g, tx.init(g)))(gradients))
            for tx in (mup_scale_by_muon(spec), mup_scale_by_muon(spec, scale_eps=False))
        ]
        assert programs[0] == programs[1]


OPTIONS = {
    "default": {},
    "plain momentum": {"nesterov": False, "beta": 0.8, "adaptive": True, "learning_rate": 0.01},
    "low precision": {"ns_steps": 2, "preconditioning": "aol", "mu_dtype": jnp.bfloat16},
    "consistent": {"preconditioning": "spectral", "consistent_rms": 0.2},
    "decay": {
        "preconditioning": "schatten",
        "weight_decay": 0.1,
        "adam_weight_decay": 0.01,
        "adam_learning_rate": 0.3,
    },
    "preset": {"ns_coeffs": "dion", "ns_steps": 5, "learning_rate": optax.linear_schedule(0.1, 0.0, 3)},
    "own coefficients": {
        "ns_coeffs": ((3.0, -4.0, 2.0), (2.0, -1.5, 0.5)),
        "ns_steps": 2,
        "weight_decay": 0.1,
        "weight_decay_mask": lambda p: jax.tree.map(lambda x: x.ndim > 2, p),
    },
}


class TestAgainstOptax:
    @pytest.mark.parametrize("option", OPTIONS)
    def test_the_base_model_is_bit_identical(self, option):
        spec = make_spec(base=True)
        options = {"learning_rate": 0.1, **OPTIONS[option]}
        ours = mup_muon(spec=spec, **options)
        theirs = muon(muon_weight_dimension_numbers=by_roles(spec), **options)

        def trajectory(tx):
            def step(carry, gradients):
                params, state = carry
                updates, state = tx.update(gradients, state, params)
                return (optax.apply_updates(params, updates), state), None

            params = random_tree(spec, 0)
            gradients = jax.tree.map(
                lambda *each: jnp.stack(each), *(random_tree(spec, seed) for seed in (1, 2, 3))
            )
            return jax.jit(lambda *args: jax.lax.scan(step, *args)[0])((params, tx.init(params)), gradients)

        (params, state), (others, their_state) = trajectory(ours), trajectory(theirs)
        assert jax.tree.structure(state) == jax.tree.structure(their_state)
        assert jax.tree.all(jax.tree.map(np.array_equal, (params, state), (others, their_state)))

    def test_plain_optax_where_all_matrices_are_hidden(self):
        spec = make_spec(
            base=True, params={name: (HIDDEN | OTHERS)[name] for name in ("dense", "tall", "gain")}
        )
        gradients = random_tree(spec)
        ours, theirs = (one_update(tx, gradients) for tx in (mup_muon(0.1, spec), muon(0.1)))
        assert jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))

    def test_a_wider_model_is_not(self):
        spec = make_spec()
        gradients = random_tree(spec)
        theirs = muon(0.1, muon_weight_dimension_numbers=by_roles(spec))
        ours, others = (one_update(tx, gradients) for tx in (mup_muon(0.1, spec), theirs))
        assert not np.allclose(ours["tall"], others["tall"], rtol=0.05)

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, {"tall": 0.3, "first": 0.2, "last": 0.2}),
            ({"decay": "coupled"}, {"tall": 0.3 * SPECTRAL, "first": 0.2, "last": 0.2}),
            ({"decay": "decoupled"}, {"tall": 3.0, "first": 2.0, "last": 2.0}),
            ({"decay_roles": ("hidden", "output")}, {"tall": 0.3, "first": 0.0, "last": 0.2}),
            ({"lr_mults": {"hidden": 2.0, "la*": 3.0}}, {"tall": 0.6, "first": 0.2, "last": 0.6}),
        ],
        ids=["independent", "coupled", "decoupled", "roles", "multiples"],
    )
    def test_decay(self, options, expected):
        spec = make_spec(params={path: (HIDDEN | OTHERS)[path] for path in expected})
        params = random_tree(spec)
        zeros = jax.tree.map(jnp.zeros_like, params)
        tx = mup_muon(0.1, spec, weight_decay=0.3, adam_weight_decay=0.2, eps=1e-4, **options)
        updates = one_update(tx, zeros, params)
        for path, decay in expected.items():
            np.testing.assert_allclose(updates[path], -0.1 * decay * params[path], rtol=1e-5, err_msg=path)


class TestDimensionNumbers:
    QKV = ParamSpec((12, 3, 12), (4, 3, 4), (0,), (1, 2), (), (0, 2))

    def test_parts_of_a_fused_kernel(self):
        spec = make_spec(params={"qkv": self.QKV})
        gradients = random_tree(spec)
        told = {"qkv": MuonDimensionNumbers(0, 2)}
        update = one_update(mup_scale_by_muon(spec, weight_dimension_numbers=told), gradients)["qkv"]
        for part in range(3):
            expected = orthogonalised(12, 12)(gradients["qkv"][:, part])
            np.testing.assert_allclose(update[:, part], expected, rtol=2e-3, atol=2e-4)

    @pytest.mark.parametrize("as_function", [True, False])
    def test_a_parameter_left_to_adam(self, as_function):
        spec = make_spec(params={"dense": HIDDEN["dense"], "tall": HIDDEN["tall"]})
        gradients = random_tree(spec)
        told = {"dense": None, "tall": MuonDimensionNumbers()}
        given = (lambda params: {path: told[path] for path in params}) if as_function else told
        ours = one_update(mup_muon(0.1, spec, muon_weight_dimension_numbers=given), gradients)
        adam = one_update(mujax.mup_adam(0.1, spec, nesterov=True), gradients)
        plain = one_update(mup_muon(0.1, spec), gradients)
        np.testing.assert_allclose(ours["dense"], adam["dense"], rtol=1e-6)
        np.testing.assert_array_equal(ours["tall"], plain["tall"])

    @pytest.mark.parametrize(
        ("path", "numbers"),
        [
            ("tall", MuonDimensionNumbers(1, 0)),
            ("scanned heads", MuonDimensionNumbers(0, (1, 2))),
            ("gain", MuonDimensionNumbers(0, 0)),
        ],
    )
    def test_axes_that_contradict_the_roles(self, path, numbers):
        spec = make_spec()
        told = {name: numbers if name == path else None for name in spec}
        message = (
            rf"^{path}: expected reduction axes out of its fan-in .*got MuonDimensionNumbers.*leave them out"
        )
        with pytest.raises(MujaxError, match=message):
            mup_muon(0.1, spec, muon_weight_dimension_numbers=told).init(random_tree(spec))

    def test_another_tree(self):
        spec = make_spec()
        with pytest.raises(
            MujaxError, match=r"weight_dimension_numbers: expected a tree .* prefix of the parameters'"
        ):
            mup_muon(0.1, spec, muon_weight_dimension_numbers={"tall": None}).init(random_tree(spec))


class TestErrors:
    @pytest.mark.parametrize(
        "tx",
        [
            optax.contrib.muon(0.1),
            optax.contrib.muon(0.1, consistent_rms=0.2),
            optax.chain(optax.contrib.muon(0.1), optax.scale(2.0)),
            optax.contrib.scale_by_muon(weight_dimension_numbers=MuonDimensionNumbers()),
        ],
    )
    def test_a_factor_around_muons_own_is_refused(self, tx):
        spec = make_spec(params={"tall": HIDDEN["tall"]})
        message = "got Muon, whose shape factor at the target's sizes the µP rule would scale a second time"
        with pytest.raises(MujaxError, match=message):
            mujax.mup_wrap(tx, spec, family="spectral")

    def test_a_factor_around_ours_is_refused(self):
        with pytest.raises(MujaxError, match="got one that applies µP factors already"):
            mujax.mup_wrap(mup_muon(0.1, make_spec()), make_spec(), family="spectral")

    def test_unknown_preset(self):
        with pytest.raises(MujaxError, match=r"ns_coeffs: expected .* presets, got 'nothing'"):
            mup_muon(0.1, make_spec(), ns_coeffs="nothing")

    def test_another_spec(self):
        with pytest.raises(MujaxError, match="spec: expected a MupSpec, got a dict of 5"):
            mup_scale_by_muon(dict(make_spec()))

    def test_another_model(self):
        with pytest.raises(SpecMismatchError, match="tall: expected shape"):
            mup_muon(0.1, make_spec()).init(random_tree(make_spec(base=True)))


def test_nnx_optimizer():
    class Model(nnx.Module):
        def __init__(self, width, rngs):
            self.first = nnx.Linear(7, width, rngs=rngs)
            self.heads = nnx.LinearGeneral(width, (2, width // 2), rngs=rngs)
            self.last = nnx.LinearGeneral((2, width // 2), 3, axis=(-2, -1), rngs=rngs)

        def __call__(self, x):
            return self.last(jnp.tanh(self.heads(jnp.tanh(self.first(x)))))

    x = jnp.ones((4, 7))
    mup = mujax.mup_init(functools.partial(Model, 12), functools.partial(Model, 4), x)
    model = mup.init(jax.random.key(0))
    optimizer = nnx.Optimizer(model, mup_muon(0.1, mup.spec, weight_decay=0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(lambda m: jnp.square(mup.apply(m, x) - 1).mean())(model)
        optimizer.update(model, gradients)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(10)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("consistent_rms", [None, 0.2])
def test_the_change_of_a_layers_output_does_not_depend_on_width(consistent_rms):
    """The coordinate check of one step: a rank-1 gradient, as one example gives, meets its own input."""

    def change(make_tx):
        sizes = []
        for width in (32, 128, 512):
            spec = make_spec(params={"w": ParamSpec((width, 2 * width), (32, 64), (0,), (1,), (), (0, 1))})
            rng = np.random.default_rng(0)
            h, delta = rng.choice([-1, 1], size=width), rng.normal(size=2 * width) / width
            gradients = {"w": jnp.asarray(np.outer(h, delta), jnp.float32)}
            sizes.append(np.sqrt(np.mean((h @ one_update(make_tx(spec), gradients)["w"]) ** 2)))
        return [wide / narrow for narrow, wide in itertools.pairwise(sizes)]

    np.testing.assert_allclose(
        change(lambda spec: mup_scale_by_muon(spec, consistent_rms=consistent_rms)), 1, rtol=1e-3
    )
    plain = change(
        lambda _: muon(1.0, consistent_rms=consistent_rms),
    )
    if consistent_rms is not None:
        assert min(plain) > 1.7
