"""What the transforms compute: factors, ε, states, programs; and what mup_wrap refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mujax import rules
from mujax.errors import MujaxError, ParametrizationError
from mujax.optim import mup_adam, mup_adamw, mup_scale_by_adam, mup_scale_by_sgd, mup_sgd, mup_wrap
from mujax.spec import MupSpec, Parametrization, ParamSpec

# r_in = 3 and r_out = 5 wherever there is one.
PARAMS = {
    "first/kernel": ParamSpec((7, 20), (7, 4), fan_in=(0,), fan_out=(1,), infinite=(1,)),
    "first/bias": ParamSpec((20,), (4,), fan_out=(0,), infinite=(0,)),
    "embed/embedding": ParamSpec((11, 20), (11, 4), fan_in=(0,), fan_out=(1,), infinite=(1,), tied=True),
    "blocks/kernel": ParamSpec((2, 12, 20), (2, 4, 4), (1,), (2,), (0,), infinite=(1, 2)),
    "last/kernel": ParamSpec((12, 10), (4, 10), fan_in=(0,), fan_out=(1,), infinite=(0,)),
    "last/bias": ParamSpec((10,), (10,), fan_out=(0,)),
}
HALF_SP = rules.interpolate("sp", "mup", 0.5)
HALF_9 = rules.interpolate("mup", "table9", 0.5)
PARAMETRIZATIONS = {
    **{name: rules.parametrization(name) for name in rules.TABLES},
    "half sp": HALF_SP,
    "half 9": HALF_9,
}

# In the order of PARAMS.
ADAM = {
    "mup": (1, 1, 1, 0.3333333333, 1, 1),
    "table3": (1, 1, 1, 0.3333333333, 0.3333333333, 1),
    "table9": (0.4472135955, 0.4472135955, 0.4472135955, 0.3333333333, 0.5773502692, 1),
    "sp": (1, 1, 1, 1, 1, 1),
    "half sp": (1, 1, 1, 0.5773502692, 1, 1),
    "half 9": (0.6687403050, 0.6687403050, 0.6687403050, 0.3333333333, 0.7598356857, 1),
}
SGD = {
    "mup": (5, 5, 5, 1.6666666667, 3, 1),
    "table3": (5, 5, 5, 1.6666666667, 0.3333333333, 1),
    "table9": (1, 1, 1, 1.6666666667, 1, 1),
    "sp": (1, 1, 1, 1, 1, 1),
    "half sp": (2.2360679775, 2.2360679775, 2.2360679775, 1.2909944487, 1.7320508076, 1),
    "half 9": (2.2360679775, 2.2360679775, 2.2360679775, 1.6666666667, 1.7320508076, 1),
}
GRADIENT = {
    "mup": (0.2, 0.2, 0.2, 0.2, 0.3333333333, 1),
    "table3": (0.2, 0.2, 0.2, 0.2, 1, 1),
    "table9": (0.4472135955, 0.4472135955, 0.4472135955, 0.2, 0.5773502692, 1),
    "sp": (1, 1, 1, 1, 1, 1),
    "half sp": (0.4472135955, 0.4472135955, 0.4472135955, 0.4472135955, 0.5773502692, 1),
    "half 9": (0.2990697562, 0.2990697562, 0.2990697562, 0.2, 0.4386913377, 1),
}


def make_spec(parametrization="mup", *, base=False):
    """The spec of PARAMS; with `base`, of their base model by itself."""
    chosen = PARAMETRIZATIONS.get(parametrization, parametrization)
    params = {
        path: ParamSpec(
            param.base_shape if base else param.shape,
            param.base_shape,
            param.fan_in,
            param.fan_out,
            param.stack,
            param.infinite,
            param.tied,
        )
        for path, param in PARAMS.items()
    }
    return MupSpec(params, chosen)


def random_tree(spec, seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    tree: dict[str, dict[str, jax.Array]] = {}
    for path, param in spec.items():
        module, name = path.split("/")
        tree.setdefault(module, {})[name] = jnp.asarray(rng.normal(size=param.shape), dtype)
    return tree


def at(tree, path):
    return functools.reduce(lambda node, name: node[name], path.split("/"), tree)


def steps(tx, spec, count=3, dtype=jnp.float32):
    """The updates and the last state of some steps on random gradients, moving the parameters."""
    params = random_tree(spec, 0, dtype)
    state = tx.init(params)
    history = []
    for seed in range(1, count + 1):
        updates, state = tx.update(random_tree(spec, seed, dtype), state, params)
        params = optax.apply_updates(params, updates)
        history.append(updates)
    return history, state


def ratios(spec, ours, theirs):
    """For each parameter the one number by which all of its entries differ."""
    found = []
    for path in spec:
        ratio = np.asarray(at(ours, path)) / np.asarray(at(theirs, path))
        np.testing.assert_allclose(ratio, ratio.flat[0], rtol=1e-5)
        found.append(ratio.flat[0])
    return found


class TestFactors:
    @pytest.mark.parametrize("name", PARAMETRIZATIONS)
    def test_adam_multiplies_updates_by_the_number_of_the_table(self, name):
        spec = make_spec(name)
        (ours, *_), state = steps(mup_scale_by_adam(spec, eps=0.0), spec, 1)
        (theirs, *_), their_state = steps(optax.scale_by_adam(eps=0.0), spec, 1)
        np.testing.assert_allclose(ratios(spec, ours, theirs), ADAM[name], rtol=1e-5)
        # The moments are those of the gradient, as optax's are: only epsilon is the parameter's own.
        jax.tree.map(np.testing.assert_array_equal, state.mu, their_state.mu)
        jax.tree.map(np.testing.assert_array_equal, state.nu, their_state.nu)

    @pytest.mark.parametrize("name", PARAMETRIZATIONS)
    @pytest.mark.parametrize("momentum", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
    def test_sgd_multiplies_updates_by_the_number_of_the_table(self, name, momentum):
        spec = make_spec(name)
        ours, _ = steps(mup_scale_by_sgd(spec, **momentum), spec)
        theirs, _ = steps(optax.sgd(-1.0, **momentum), spec)
        for our, their in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(ratios(spec, our, their), SGD[name], rtol=1e-5)

    @pytest.mark.parametrize("nesterov", [False, True])
    def test_keyword_arguments_mean_what_they_mean_in_optax(self, nesterov):
        spec = make_spec()
        kwargs = {"b1": 0.8, "b2": 0.9, "eps": 0.0, "mu_dtype": jnp.bfloat16, "nesterov": nesterov}
        (*_, ours), state = steps(mup_scale_by_adam(spec, scale_eps=False, **kwargs), spec)
        (*_, theirs), their_state = steps(optax.scale_by_adam(**kwargs), spec)
        np.testing.assert_allclose(ratios(spec, ours, theirs), ADAM["mup"], rtol=1e-5)
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(state.mu))
        assert jax.tree.all(jax.tree.map(np.array_equal, state.mu, their_state.mu))

    def test_a_schedule_is_one_global_function_of_the_step(self):
        spec = make_spec()
        schedule = optax.linear_schedule(1.0, 0.0, 4)
        ours, _ = steps(mup_sgd(schedule, spec), spec)
        theirs, _ = steps(optax.sgd(schedule), spec)
        for our, their in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(ratios(spec, our, their), SGD["mup"], rtol=1e-5)

    def test_accumulator_dtype(self):
        spec = make_spec()
        _, state = steps(mup_scale_by_sgd(spec, 0.9, accumulator_dtype=jnp.bfloat16), spec, 1)
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(state.trace))


PAIRS = {
    "adam": (lambda spec: mup_adam(0.1, spec), optax.adam(0.1)),
    "nadam": (lambda spec: mup_adam(0.1, spec, nesterov=True), optax.nadam(0.1)),
    "adamw": (lambda spec: mup_adamw(0.1, spec), optax.adamw(0.1)),
    "sgd": (lambda spec: mup_sgd(0.1, spec), optax.sgd(0.1)),
    "momentum": (lambda spec: mup_sgd(0.1, spec, 0.9, True), optax.sgd(0.1, 0.9, True)),
    "lion": (lambda spec: mup_wrap(optax.scale_by_lion(), spec, "adam"), optax.scale_by_lion()),
}


class TestAgainstOptax:
    @pytest.mark.parametrize("optimizer", PAIRS)
    @pytest.mark.parametrize("name", PARAMETRIZATIONS)
    def test_the_base_model_is_trained_by_the_very_same_program(self, optimizer, name):
        spec = make_spec(name, base=True)
        make, theirs = PAIRS[optimizer]
        params, gradients = random_tree(spec, 0), random_tree(spec, 1)
        programs = [
            str(jax.make_jaxpr(tx.update)(gradients, tx.init(params), params)) for tx in (make(spec), theirs)
        ]
        assert programs[0] == programs[1]

    @pytest.mark.parametrize("optimizer", PAIRS)
    def test_the_base_model_is_bit_identical(self, optimizer):
        spec = make_spec(base=True)
        make, theirs = PAIRS[optimizer]
        ours = steps(make(spec), spec)
        assert jax.tree.all(jax.tree.map(np.array_equal, ours, steps(theirs, spec)))

    @pytest.mark.parametrize("optimizer", PAIRS)
    def test_a_wider_model_is_not(self, optimizer):
        spec = make_spec()
        make, theirs = PAIRS[optimizer]
        (ours, *_), _ = steps(make(spec), spec, 1)
        (others, *_), _ = steps(theirs, spec, 1)
        assert not np.array_equal(at(ours, "blocks/kernel"), at(others, "blocks/kernel"))

    @pytest.mark.parametrize("optimizer", PAIRS)
    def test_state_is_that_of_optax_and_factors_are_no_arrays(self, optimizer):
        spec = make_spec()
        make, theirs = PAIRS[optimizer]
        tx, params = make(spec), random_tree(spec, 0)
        state, their_state = tx.init(params), theirs.init(params)
        assert jax.tree.structure(state) == jax.tree.structure(their_state)
        assert jax.tree.all(jax.tree.map(np.array_equal, state, their_state))
        assert jax.make_jaxpr(tx.update)(params, state, params).consts == []

    @pytest.mark.parametrize("optimizer", PAIRS)
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
    def test_updates_keep_the_dtype(self, optimizer, dtype):
        spec = make_spec()
        make, _ = PAIRS[optimizer]
        params = random_tree(spec, 0, dtype)
        state = make(spec).init(params)
        updates, new_state = jax.eval_shape(make(spec).update, params, state, params)
        assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
        assert jax.tree.map(lambda leaf: leaf.dtype, new_state) == jax.tree.map(
            lambda leaf: leaf.dtype, state
        )


def adam_by_hand(gradients, b1, b2, eps, eps_root):
    mu = nu = 0.0
    for step, g in enumerate(gradients, 1):
        mu, nu = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * g**2
        m, v = mu / (1 - b1**step), nu / (1 - b2**step)
    return m / (np.sqrt(v + eps_root) + eps)


class TestEpsilon:
    B1, B2, EPS, EPS_ROOT = 0.9, 0.99, 0.5, 0.25

    def updates(self, spec, **kwargs):
        tx = mup_scale_by_adam(spec, self.B1, self.B2, self.EPS, self.EPS_ROOT, **kwargs)
        (*_, last), _ = steps(tx, spec)
        return last

    def by_hand(self, spec, path, s, f):
        gradients = [np.asarray(at(random_tree(spec, seed), path), float) for seed in (1, 2, 3)]
        return f * adam_by_hand(gradients, self.B1, self.B2, s * self.EPS, s**2 * self.EPS_ROOT)

    @pytest.mark.parametrize("name", PARAMETRIZATIONS)
    def test_epsilon_follows_the_gradient(self, name):
        spec = make_spec(name)
        updates = self.updates(spec)
        for path, s, f in zip(spec, GRADIENT[name], ADAM[name], strict=True):
            expected = self.by_hand(spec, path, s, f)
            np.testing.assert_allclose(at(updates, path), expected, rtol=1e-5, atol=1e-7, err_msg=path)

    def test_scale_eps_false_leaves_it_alone(self):
        """The twin of the one above, and what microsoft/mup does."""
        spec = make_spec("mup")
        plain, scaled = self.updates(spec, scale_eps=False), self.updates(spec)
        for path, s, f in zip(spec, GRADIENT["mup"], ADAM["mup"], strict=True):
            np.testing.assert_allclose(at(plain, path), self.by_hand(spec, path, 1, f), rtol=1e-5, atol=1e-7)
            differs = not np.allclose(at(plain, path), at(scaled, path), rtol=0.05)
            assert differs == (s != 1), path

    def test_a_gradient_that_scales_as_predicted_is_updated_alike_at_all_widths(self):
        spec = make_spec("mup")
        params = random_tree(spec, 0)
        base_gradients = random_tree(spec, 1)
        gradients = {}
        for path, s in zip(spec, GRADIENT["mup"], strict=True):
            module, name = path.split("/")
            gradients.setdefault(module, {})[name] = s * at(base_gradients, path)
        tx, theirs = mup_scale_by_adam(spec, eps=0.5), optax.scale_by_adam(eps=0.5)
        updates, _ = tx.update(gradients, tx.init(params))
        expected, _ = theirs.update(base_gradients, theirs.init(params))
        np.testing.assert_allclose(ratios(spec, updates, expected), ADAM["mup"], rtol=1e-5)
        unscaled = mup_scale_by_adam(spec, eps=0.5, scale_eps=False)
        updates, _ = unscaled.update(gradients, unscaled.init(params))
        assert not np.allclose(at(updates, "first/bias"), at(expected, "first/bias"), rtol=0.1)


class TestDecay:
    @pytest.mark.parametrize("name", PARAMETRIZATIONS)
    def test_adamw_decays_all_parameters_alike(self, name):
        spec = make_spec(name)
        params = random_tree(spec, 0)
        tx = mup_adamw(0.1, spec, weight_decay=0.01)
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        for path in spec:
            np.testing.assert_allclose(at(updates, path), -0.001 * at(params, path), rtol=1e-5)

    def test_wrapping_the_decay_would_scale_it(self):
        """The twin: this is the mistake which mup_wrap refuses, made by hand."""
        spec = make_spec("mup")
        params = random_tree(spec, 0)
        tx = mup_scale_by_sgd(spec)
        decay, _ = optax.adamw(0.1, weight_decay=0.01).update(
            jax.tree.map(jnp.zeros_like, params), optax.adamw(0.1).init(params), params
        )
        updates, _ = tx.update(decay, tx.init(params))
        assert not np.allclose(at(updates, "last/kernel"), -0.001 * at(params, "last/kernel"), rtol=0.1)

    @pytest.mark.parametrize("mask", [{"first": True, "embed": False, "blocks": False, "last": False}, None])
    def test_mask(self, mask):
        spec = make_spec()
        params = random_tree(spec, 0)
        tx = mup_adamw(
            0.1, spec, weight_decay=0.01, mask=mask or (lambda p: {name: name == "first" for name in p})
        )
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        assert np.any(at(updates, "first/kernel"))
        assert not np.any(at(updates, "last/kernel"))


ADAM_FAMILY = {
    "adam": optax.adam(0.1),
    "nadam": optax.nadam(0.1),
    "radam": optax.radam(0.1),
    "adabelief": optax.adabelief(0.1),
    "adagrad": optax.adagrad(0.1),
    "rmsprop": optax.rmsprop(0.1, momentum=0.9),
    "amsgrad": optax.amsgrad(0.1),
    "yogi": optax.yogi(0.1),
    "lion": optax.scale_by_lion(),
    "sign": optax.sign_sgd(0.1),
    "adamw without decay": optax.adamw(0.1, weight_decay=0.0),
    "finite": optax.apply_if_finite(optax.adam(0.1), 2),
    "accumulated": optax.MultiSteps(optax.adam(0.1), 3).gradient_transformation(),
    "warm-up": optax.adam(optax.linear_schedule(0.0, 0.1, 100)),
    "masked": optax.masked(optax.adam(0.1), {"first": True, "embed": True, "blocks": True, "last": False}),
    "needs an extra argument": optax.polyak_sgd(),
}
SGD_FAMILY = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, 0.9),
    "nesterov": optax.sgd(0.1, 0.9, nesterov=True),
    "ema": optax.ema(0.9),
    "noisy": optax.noisy_sgd(0.1, key=0),
    "clipped": optax.chain(optax.clip(1.0), optax.sgd(0.1)),
    "norm-clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    "optimistic": optax.optimistic_gradient_descent(0.1),
}
DECAYING = {
    "adamw": optax.adamw(0.1),
    "lion": optax.lion(0.1),
    "warm-up": optax.adamw(optax.linear_schedule(0.0, 1e-3, 1000)),
    "accumulated": optax.MultiSteps(optax.adamw(0.1), 3).gradient_transformation(),
    "injected": optax.inject_hyperparams(optax.adamw)(0.1),
    "in the gradient": optax.chain(optax.add_decayed_weights(1e-4), optax.scale_by_adam()),
    "masked": optax.adamw(0.1, mask={"first": False, "embed": False, "blocks": False, "last": True}),
    "by rank": optax.adamw(0.1, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
}


# The roles of PARAMS, r_in = 3 and r_out = 5, in one shape: operations are compiled once for a shape.
SQUARES = {
    "first/kernel": ParamSpec((15, 15), (15, 3), fan_in=(0,), fan_out=(1,), infinite=(1,)),
    "embed/embedding": ParamSpec((15, 15), (15, 3), fan_in=(0,), fan_out=(1,), infinite=(1,), tied=True),
    "blocks/kernel": ParamSpec((15, 15), (5, 3), fan_in=(0,), fan_out=(1,), infinite=(0, 1)),
    "last/kernel": ParamSpec((15, 15), (5, 15), fan_in=(0,), fan_out=(1,), infinite=(0,)),
}
# Those with a `lax.cond`, which is compiled anew in each call unless the whole update is.
COMPILED = ("finite", "accumulated")


def assert_wraps(name, tx, family, gradient, factors):
    """Gradients that scale as predicted are updated as optax updates those that don't, times the factor."""
    spec = MupSpec(SQUARES, rules.parametrization("mup"))
    gradient, factors = (dict(zip(PARAMS, numbers, strict=True)) for numbers in (gradient, factors))

    def last(tx, scale):
        tx = optax.with_extra_args_support(tx)
        update = jax.jit(tx.update) if name in COMPILED else tx.update
        params = random_tree(spec, 0)
        state = tx.init(params)
        for seed in (1, 2, 3):
            gradients = random_tree(spec, seed)
            for path, number in scale.items():
                module, leaf = path.split("/")
                gradients[module][leaf] *= number
            updates, state = update(gradients, state, params, value=1.0)
        return updates

    ours = last(mup_wrap(tx, spec, family), {path: gradient[path] for path in spec})
    theirs = last(tx, {})
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for path in spec:
        expected = factors[path] * at(theirs, path)
        assert np.any(expected)
        np.testing.assert_allclose(at(ours, path), expected, rtol=1e-4, atol=1e-7, err_msg=path)


class TestWrap:
    @pytest.mark.parametrize("name", ADAM_FAMILY)
    def test_takes_the_adam_family(self, name):
        assert_wraps(name, ADAM_FAMILY[name], "adam", GRADIENT["mup"], ADAM["mup"])

    @pytest.mark.parametrize("name", SGD_FAMILY)
    def test_takes_the_sgd_family(self, name):
        """Which has no ε, so that gradients are passed on as they are."""
        assert_wraps(name, SGD_FAMILY[name], "sgd", [1.0] * len(PARAMS), SGD["mup"])

    def test_applies_the_factors_of_the_family(self):
        spec = make_spec()
        for family, theirs, expected in (("adam", optax.sign_sgd(-1.0), ADAM), ("sgd", optax.ema(0.9), SGD)):
            (*_, ours), _ = steps(mup_wrap(theirs, spec, family), spec)
            (*_, others), _ = steps(theirs, spec)
            np.testing.assert_allclose(ratios(spec, ours, others), expected["mup"], rtol=1e-5)

    @pytest.mark.parametrize("scale_eps", [True, False])
    def test_wrapped_adam_is_mup_adam(self, scale_eps):
        spec = make_spec("table3")
        wrapped = mup_wrap(optax.adam(0.1, eps=0.5), spec, "adam", scale_eps=scale_eps)
        ours, _ = steps(wrapped, spec)
        alias, _ = steps(mup_adam(0.1, spec, eps=0.5, scale_eps=scale_eps), spec)
        # The one rescales the gradient, the other epsilon.
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), ours, alias)

    def test_extra_arguments_are_passed_on(self):
        spec = make_spec()
        params = random_tree(spec, 0)

        def update(updates, state, params=None, *, value, **extra_args):
            return jax.tree.map(lambda u: u * value, updates), state

        tx = mup_wrap(optax.GradientTransformationExtraArgs(optax.init_empty_state, update), spec, "sgd")
        updates, _ = optax.chain(tx).update(params, (tx.init(params),), params, value=2.0, other="unused")
        np.testing.assert_allclose(ratios(spec, updates, params), 2 * np.array(SGD["mup"]), rtol=1e-5)

    @pytest.mark.parametrize("family", ["muon", "Adam", ""])
    def test_unknown_family(self, family):
        with pytest.raises(ParametrizationError, match=r"one of 'sgd', 'adam', .*, got '" + family):
            mup_wrap(optax.adam(0.1), make_spec(), family)

    def test_missing_family(self):
        with pytest.raises(
            ParametrizationError, match=r"mup_wrap: expected family to be one of 'sgd', 'adam'"
        ):
            mup_wrap(optax.adam(0.1), make_spec())

    @pytest.mark.parametrize("tx", DECAYING.values(), ids=DECAYING)
    def test_refuses_weight_decay(self, tx):
        message = r"mup_wrap, \w+/\w+: .* weight decay.*optax\.add_decayed_weights"
        with pytest.raises(MujaxError, match=message):
            mup_wrap(tx, make_spec(), "adam")

    def test_refuses_weight_decay_when_built_while_tracing(self):
        params = random_tree(make_spec(), 0)

        @jax.jit
        def train(params):
            return mup_wrap(optax.adamw(0.1), make_spec(), "adam").init(params)

        with pytest.raises(MujaxError, match="weight decay"):
            train(params)

    def test_a_transform_that_holds_traced_values_is_taken_at_its_word(self):
        spec = make_spec()
        params = random_tree(spec, 0)

        @jax.jit
        def first_update(learning_rate):
            tx = mup_wrap(optax.sgd(learning_rate), spec, "sgd")
            return tx.update(params, tx.init(params), params)[0]

        updates = first_update(jnp.float32(0.5))
        np.testing.assert_allclose(ratios(spec, updates, params), -0.5 * np.array(SGD["mup"]), rtol=1e-5)

    @pytest.mark.parametrize("name", ["adam", "nadam", "amsgrad", "lion", "sign"])
    def test_refuses_the_adam_family_as_sgd(self, name):
        with pytest.raises(ParametrizationError, match=r"family 'sgd', .* pass family='adam'"):
            mup_wrap(ADAM_FAMILY[name], make_spec(), "sgd")

    @pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov", "ema", "optimistic"])
    def test_refuses_the_sgd_family_as_adam(self, name):
        with pytest.raises(ParametrizationError, match=r"family 'adam', .* pass family='sgd'"):
            mup_wrap(SGD_FAMILY[name], make_spec(), "adam")

    @pytest.mark.parametrize("inner", [optax.adam(0.1), optax.scale_by_lion()], ids=["adam", "lion"])
    def test_refuses_clipping_of_rescaled_gradients(self, inner):
        tx = optax.chain(optax.clip_by_global_norm(1.0), inner)
        with pytest.raises(MujaxError, match=r"clipping by the global norm.* put it before"):
            mup_wrap(tx, make_spec(), "adam")
        # Gradients that are passed on as they are may be clipped, and the update has the factor.
        spec = make_spec()
        (updates, *_), _ = steps(mup_wrap(tx, spec, "adam", scale_eps=False), spec, 1)
        (plain, *_), _ = steps(tx, spec, 1)
        np.testing.assert_allclose(ratios(spec, updates, plain), ADAM["mup"], rtol=1e-5)

    @pytest.mark.parametrize("optimizer", [mup_adam, mup_sgd, mup_adamw])
    def test_refuses_factors_inside_of_factors(self, optimizer):
        spec = make_spec()
        with pytest.raises(MujaxError, match=r"applies µP factors already; use it as it is"):
            mup_wrap(optimizer(0.1, spec), spec, "adam")


@pytest.mark.parametrize("make", [mup_scale_by_adam, mup_scale_by_sgd, lambda spec: mup_adamw(0.1, spec)])
def test_a_tree_is_matched_once_per_update(monkeypatch, make):
    spec, matched = make_spec(), []
    params, gradients, tx = random_tree(spec, 0), random_tree(spec, 1), make(spec)
    state, match = tx.init(params), MupSpec.match

    def counted(self, tree, *args, **kwargs):
        matched.append(tree)
        return match(self, tree, *args, **kwargs)

    monkeypatch.setattr(MupSpec, "match", counted)
    jax.eval_shape(tx.update, gradients, state, params)
    assert len(matched) == 1


class TestSpecArgument:
    def test_not_a_spec(self):
        with pytest.raises(
            MujaxError, match=r"spec: expected a MupSpec, got 0.1; pass spec=mup.spec, of the result"
        ):
            mup_adam(make_spec(), 0.1)

    def test_unknown_parametrization(self):
        spec = make_spec(Parametrization((("table5", 1.0),)))
        with pytest.raises(ParametrizationError, match=r"one of 'mup', .* got 'table5'"):
            mup_scale_by_sgd(spec)
