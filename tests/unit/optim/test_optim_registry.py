"""One suite for every optimizer of the registry: factors, ε, decay, learning rates by role, three tables."""

import dataclasses
import functools
import inspect
import re
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mujax
from mujax import rules
from mujax.errors import ConfigError, MujaxError, ParametrizationError, SpecMismatchError
from mujax.optim import OPTIMIZERS, optimizer
from mujax.optim._registry import AROUND, TRANSFORMS, UNSUPPORTED, UNSUPPORTED_STATES
from mujax.spec import MupSpec, ParamSpec

# r_in is 3 and r_out is 5 wherever there is one. Two shapes in all: XLA compiles each operation of each
# optimizer once for a shape, which takes far longer than running it.
PARAMS = {
    "w1": ParamSpec((15, 15), (15, 3), fan_in=(0,), fan_out=(1,), infinite=(1,)),
    "b1": ParamSpec((15,), (3,), fan_out=(0,), infinite=(0,)),
    "w2": ParamSpec((15, 15), (5, 3), fan_in=(0,), fan_out=(1,), infinite=(0, 1)),
    "w3": ParamSpec((15, 15), (5, 15), fan_in=(0,), fan_out=(1,), infinite=(0,)),
    "b3": ParamSpec((15,), (15,), fan_out=(0,)),
}
TABLES = ("mup", "table3", "table9")
FACTORS = {  # Of learning rates, in the order of PARAMS.
    "adam": {
        "mup": (1, 1, 0.3333333333, 1, 1),
        "table3": (1, 1, 0.3333333333, 0.3333333333, 1),
        "table9": (0.4472135955, 0.4472135955, 0.3333333333, 0.5773502692, 1),
    },
    "sgd": {
        "mup": (5, 5, 1.6666666667, 3, 1),
        "table3": (5, 5, 1.6666666667, 0.3333333333, 1),
        "table9": (1, 1, 1.6666666667, 1, 1),
    },
    "normalized": {
        "mup": (1, 1, 0.5773502692, 1, 1),
        "table3": (1, 1, 0.5773502692, 1, 1),
        "table9": (1, 1, 0.5773502692, 1, 1),
    },
    "normalized_gradient": {
        "mup": (2.2360679775, 2.2360679775, 1.2909944487, 1.7320508076, 1),
        "table3": (2.2360679775, 2.2360679775, 1.2909944487, 0.5773502692, 1),
        "table9": (1, 1, 1.2909944487, 1, 1),
    },
}
# Updates that go as the cube root of the gradient: Adam's factor over the cube root of the gradient's scale.
CUBE_ROOT = {
    "mup": (1.7099759467, 1.7099759467, 0.5699919822, 1.4422495703, 1),
    "table3": (1.7099759467, 1.7099759467, 0.5699919822, 0.3333333333, 1),
    "table9": (0.5848035476, 0.5848035476, 0.5699919822, 0.6933612744, 1),
}
# How parameters and gradients of the target compare to the base's: powers of r_in = 3 and r_out = 5.
PARAM_SCALE = {
    "mup": (1, 1, 3**-0.5, 1, 1),
    "table3": (1, 1, 3**-0.5, 1 / 3, 1),
    "table9": (5**-0.5, 5**-0.5, 3**-0.5, 3**-0.5, 1),
}
GRADIENT_SCALE = {
    "mup": (1 / 5, 1 / 5, 1 / 5, 1 / 3, 1),
    "table3": (1 / 5, 1 / 5, 1 / 5, 1, 1),
    "table9": (5**-0.5, 5**-0.5, 1 / 5, 3**-0.5, 1),
}
# √(r_in r_out): how a norm grows where entries don't.
NORM = (2.2360679775, 2.2360679775, 3.8729833462, 1.7320508076, 1)

# Muon has a file of its own; what it does depends on the roles and not on optax's alone.
NAMES = [name for name in OPTIMIZERS if name != "muon"]
LR = 0.25
# Arguments that optax demands, and such that all parts of an optimizer are in play.
NEEDED = {
    "noisy_sgd": {"key": 0},
    "adafactor": {"min_dim_size_to_factor": 4},
    # Optax's own estimate of the Hessian takes seconds to compile; two tests are enough for it.
    "sophia": {"hessian_diagonal_fn": optax.stateless(lambda g, _: jax.tree.map(jnp.square, g))},
}
HUTCHINSON = {"hessian_diagonal_fn": optax.contrib.hutchinson_estimator_diag_hessian()}
# Optimizers with a `lax.cond`, which is compiled anew in each call unless the whole update is.
COMPILED = {"sophia", "novograd"}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`optimistic_adam` is deprecated")
        yield


def make_spec(table="mup", *, base=False):
    params = {
        path: dataclasses.replace(param, base_shape=param.shape) if base else param
        for path, param in PARAMS.items()
    }
    return MupSpec(params, rules.parametrization(table))


def random_tree(spec, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {path: jnp.asarray(rng.normal(size=param.shape) * scale) for path, param in spec.items()}


def scaled(tree, numbers):
    return {path: tree[path] * number for path, number in zip(PARAMS, numbers, strict=True)}


def objective(params):
    return sum(jnp.sum(jnp.cos(leaf)) for leaf in params.values())


def ours(name, spec, rate=LR, **kwargs):
    return optimizer(name)(rate, spec, **{**NEEDED.get(name, {}), **kwargs})


def theirs(name, rate=LR, **kwargs):
    return OPTIMIZERS[name].constructor(name)(rate, **{**NEEDED.get(name, {}), **kwargs})


def updates_of(name, tx, params, gradients, *, moving=False):
    """The updates of consecutive steps, and the last state."""
    extra = {"obj_fn": objective} if name == "sophia" else {}
    update = functools.partial(tx.update, **extra)
    if name in COMPILED:
        update = jax.jit(update)
    state, history = tx.init(params), []
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        history.append(updates)
        if moving:
            params = optax.apply_updates(params, updates)
    return history, state


def ratios(updates, others):
    """For each parameter the one number by which all of its entries differ."""
    found = []
    for path in PARAMS:
        quotient = np.asarray(updates[path]) / np.asarray(others[path])
        np.testing.assert_allclose(quotient, quotient.flat[0], rtol=1e-3, err_msg=path)
        found.append(np.median(quotient))
    return found


def assert_same_tree(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for leaf, its in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf, its = jax.random.key_data(leaf), jax.random.key_data(its)
        assert leaf.dtype == its.dtype
        np.testing.assert_array_equal(leaf, its)


# ---- the registry is whole --------------------------------------------------------------------------

# What optax has besides optimizers and `scale_by_*`: parts of chains, and what goes around an optimizer.
PARTS = {
    *("adaptive_grad_clip", "add_decayed_weights", "add_noise", "apply_every", "centralize", "clip"),
    *("clip_by_block_rms", "clip_by_global_norm", "ema", "freeze", "identity", "keep_params_nonnegative"),
    *("normalize_by_update_norm", "scale", "set_to_zero", "snapshot", "stateless", "trace", "zero_nans"),
    *("stateless_with_tree_map", "normalize", "differentially_private_aggregate", "reduce_on_plateau"),
    *("apply_if_finite", "chain", "conditionally_mask", "conditionally_transform", "flatten", "masked"),
    *("inject_hyperparams", "inject_stateful_hyperparams", "lookahead", "measure_with_ema", "partition"),
    *("multi_transform", "named_chain", "selective_transform", "with_extra_args_support", "sam"),
    *("schedule_free", "split_real_and_imaginary", "hutchinson_estimator_diag_hessian"),
}
# Transforms of optimizers that µP has no rule for, parts of rules that are elsewhere, and what has no family.
OTHER_TRANSFORMS = {
    *("scale_by_adam", "scale_by_backtracking_linesearch", "scale_by_cocob", "scale_by_galore"),
    *("scale_by_distance_over_gradients", "scale_by_lbfgs", "scale_by_learning_rate", "scale_by_muon"),
    *("scale_by_param_block_norm", "scale_by_param_block_rms", "scale_by_polyak", "scale_by_schedule"),
    "scale_by_zoom_linesearch",
}


def optimizers_in(module):
    """The functions of a module that look like an optimizer or a transform."""
    found = set()
    for name, function in vars(module).items():
        if name.startswith("_") or inspect.isclass(function) or not callable(function):
            continue
        try:
            signature = inspect.signature(function)
        except ValueError:  # A type, such as `optax.Schedule`.
            continue
        makes_one = "GradientTransformation" in str(signature.return_annotation)
        if makes_one or any("learning_rate" in parameter for parameter in signature.parameters):
            found.add(name)
    return found - {"warmup_constant_schedule"}


def unlisted(module):
    known = {*OPTIMIZERS, *UNSUPPORTED, *TRANSFORMS, *OTHER_TRANSFORMS, *PARTS}
    return optimizers_in(module) - known


class TestRegistry:
    def test_every_optimizer_of_optax_is_listed(self):
        assert not unlisted(optax)
        assert not unlisted(optax.contrib)

    def test_a_new_one_would_be_found(self):
        """The twin: optax gains an optimizer, under a name that nobody here knows."""

        def bogus(learning_rate):
            return optax.sgd(learning_rate)

        def scale_by_bogus() -> optax.GradientTransformation:
            return optax.identity()

        module = types.ModuleType("optax")
        vars(module).update(vars(optax) | {"bogus": bogus, "scale_by_bogus": scale_by_bogus})
        assert unlisted(module) == {"bogus", "scale_by_bogus"}

    def test_nothing_is_listed_that_is_not_there(self):
        public = {*vars(optax), *vars(optax.contrib)}
        assert {*OPTIMIZERS, *UNSUPPORTED, *TRANSFORMS, *UNSUPPORTED_STATES, *AROUND, *PARTS} <= public

    def test_each_entry_is_filled_in(self):
        for name, entry in OPTIMIZERS.items():
            assert entry.family in rules.FAMILIES
            assert entry.source
            parameters = inspect.signature(entry.constructor(name)).parameters
            if entry.decay is not None:
                assert {keyword for keyword in entry.decay if keyword} <= set(parameters)
            # Each ε that optax has is one that we know of.
            small = {keyword for keyword in parameters if re.search(r"(?<![a-z])eps|accumulator_v", keyword)}
            assert {
                keyword for keyword in small if not keyword.startswith("adam_") and keyword != "eps_in_sqrt"
            } <= (set(entry.epsilons))

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_by_name_and_at_the_top(self, name):
        alias = optimizer(name)
        assert alias is getattr(mujax, f"mup_{name}") is getattr(mujax.optim, f"mup_{name}")
        assert alias.__name__ == f"mup_{name}"
        assert OPTIMIZERS[name].family in alias.__doc__
        assert "Reference" in alias.__doc__
        assert "Args:" in alias.__doc__

    @pytest.mark.parametrize("name", NAMES)
    def test_signature_is_optaxs(self, name):
        signature = inspect.signature(optimizer(name))
        assert list(signature.parameters)[:2] == ["learning_rate", "spec"]
        assert signature.parameters["learning_rate"].default is inspect.Parameter.empty
        for keyword, theirs in list(inspect.signature(OPTIMIZERS[name].constructor(name)).parameters.items())[
            1:
        ]:
            mine = signature.parameters[keyword]
            assert (mine.kind, mine.default) == (theirs.kind, theirs.default), keyword
        order = [
            keyword
            for keyword in signature.parameters
            if keyword in inspect.signature(OPTIMIZERS[name].constructor(name)).parameters
        ]
        assert order == list(inspect.signature(OPTIMIZERS[name].constructor(name)).parameters)

    @pytest.mark.parametrize("name", TRANSFORMS)
    def test_transforms_are_at_the_top_with_optaxs_signature(self, name):
        mine = dict(inspect.signature(getattr(mujax, f"mup_{name}")).parameters)
        assert next(iter(mine)) == "spec"
        module = optax if hasattr(optax, name) else optax.contrib
        for keyword, their in inspect.signature(getattr(module, name)).parameters.items():
            # Adam's ε may be None, for the arc tangent.
            assert (mine[keyword].kind, mine[keyword].default) == (their.kind, their.default), keyword

    def test_a_wrong_argument_is_an_error_that_names_the_function(self):
        with pytest.raises(TypeError, match=r"mup_yogi\(\) got an unexpected keyword argument 'beta'"):
            mujax.mup_yogi(0.1, make_spec(), beta=0.9)
        with pytest.raises(TypeError, match=r"mup_lars\(\) missing a required argument: 'spec'"):
            mujax.mup_lars(0.1)
        with pytest.raises(MujaxError, match=r"spec: expected a MupSpec, got 0\.1"):
            mujax.mup_lion(make_spec(), 0.1)

    def test_unknown_names(self):
        with pytest.raises(ConfigError, match=r"optimizer: expected one of 'acprop', .*, got 'Adam'"):
            optimizer("Adam")
        with pytest.raises(
            ConfigError, match=r"lookahead: expected an optimizer, got a wrapper of optimizers"
        ):
            optimizer("lookahead")

    @pytest.mark.parametrize("name", UNSUPPORTED)
    def test_what_has_no_rule_says_why(self, name):
        with pytest.raises(ConfigError, match=f"^{name}: expected an optimizer .* none: .*mujax.optim.OPTIM"):
            optimizer(name)
        with pytest.raises(ConfigError, match=f"^{name}: "):
            getattr(mujax, f"mup_{name}")(1.0, make_spec())


# ---- factors as numbers -----------------------------------------------------------------------------

LINEAR_AT_FIRST = {"radam", "acprop"}  # Plain momentum, or the plain gradient, for the first step or more.
NOTHING_AT_FIRST = {"adopt", "rprop"}


def no_decay(name):
    """The keyword that turns the weight decay off, where there is one."""
    entry = OPTIMIZERS[name]
    return {entry.decay[0]: 0.0} if entry.decay and name != "schedule_free_sgd" else {}


def tables_for(name):
    """Compiling takes far longer than running: Table 9 has the exponents that the others lack."""
    return ("mup", "table9") if name in COMPILED else TABLES


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("noisy_sgd", "fromage")])
def test_factors(name):
    """Updates are optax's times the number of the table, on gradients that drown every ε; states alike."""
    params = random_tree(make_spec(), 0)
    gradients = [random_tree(make_spec(), 1, 1e6)] * (2 if name in NOTHING_AT_FIRST else 1)
    optaxs, their_state = updates_of(name, theirs(name, **no_decay(name)), params, gradients)
    family = "sgd" if name in LINEAR_AT_FIRST else OPTIMIZERS[name].family
    for table in tables_for(name):
        mine, state = updates_of(name, ours(name, make_spec(table), **no_decay(name)), params, gradients)
        assert jax.tree.structure(state) == jax.tree.structure(their_state)
        expected = CUBE_ROOT[table] if name == "madgrad" else FACTORS[family][table]
        np.testing.assert_allclose(ratios(mine[-1], optaxs[-1]), expected, rtol=1e-3, err_msg=table)


@pytest.mark.parametrize("table", TABLES)
def test_fromage_is_optaxs_at_each_parameters_own_rate(table):
    spec = make_spec(table)
    params, gradients = random_tree(spec, 0), [random_tree(spec, 1)] * 2
    (*_, mine), _ = updates_of("fromage", ours("fromage", spec), params, gradients)
    for factor in set(FACTORS["normalized"][table]):
        (*_, optaxs), _ = updates_of("fromage", theirs("fromage", LR * factor), params, gradients)
        for path, its_factor in zip(PARAMS, FACTORS["normalized"][table], strict=True):
            if its_factor == factor:
                np.testing.assert_allclose(mine[path], optaxs[path], rtol=1e-9, err_msg=path)


def test_adafactor_without_parameter_scaling_is_of_adams_family():
    spec = make_spec("table3")
    params, gradients = random_tree(spec, 0), [random_tree(spec, 1)]
    kwargs = {"multiply_by_parameter_scale": False, "factored": False}
    (mine,), _ = updates_of("adafactor", ours("adafactor", spec, **kwargs), params, gradients)
    (optaxs,), _ = updates_of("adafactor", theirs("adafactor", **kwargs), params, gradients)
    np.testing.assert_allclose(ratios(mine, optaxs), FACTORS["adam"]["table3"], rtol=1e-6)


@pytest.mark.parametrize("table", TABLES)
def test_noise_moves_each_parameter_by_the_same_fraction_of_itself(table):
    spec = make_spec(table)
    params, zeros = random_tree(spec, 0), random_tree(spec, 1, 0.0)
    (mine,), _ = updates_of("noisy_sgd", ours("noisy_sgd", spec), params, [zeros])
    (optaxs,), _ = updates_of("noisy_sgd", theirs("noisy_sgd"), params, [zeros])
    np.testing.assert_allclose(ratios(mine, optaxs), PARAM_SCALE[table], rtol=1e-9)
    (mine,), _ = updates_of("noisy_sgd", ours("noisy_sgd", spec, eta=0.0), params, [params])
    np.testing.assert_allclose(ratios(mine, params), -LR * np.array(FACTORS["sgd"][table]), rtol=1e-6)


CENTERED = {"centered": True, "momentum": 0.9, "nesterov": True, "eps_in_sqrt": False}
ALIKE = {  # Arguments with which an ε weighs as much as the gradient does.
    **{name: dict.fromkeys(OPTIMIZERS[name].epsilons, 0.25) for name in NAMES},
    "adafactor": {"eps": 1e-2},
    "adafactor, plain": {"eps": 1e-2, "multiply_by_parameter_scale": False, "factored": False},
    "lamb, coupled": {"eps": 0.25, "weight_decay": 0.5, "decay": "coupled"},
    "lars, coupled": {"eps": 0.25, "weight_decay": 0.5, "decay": "coupled", "momentum": 0.5},
    "rmsprop, centered": CENTERED | {"eps": 0.25, "initial_scale": 0.25},
    "sm3": {},
    "sophia": HUTCHINSON | {"eps": 0.25},
    "yogi": {"eps": 0.25},
    "schedule_free_sgd, decay": {"weight_decay": 0.0, "warmup_steps": 2},
}


def at_base_and_target(case):
    """Parameters and gradients, and the arguments of a case."""
    name, spec = case.split(",")[0], make_spec()
    params, gradients = random_tree(spec, 0), [random_tree(spec, seed, 0.5) for seed in (1, 2)]
    return name, params, gradients, no_decay(name) | ALIKE[case]


def alike(case, table, **kwargs):
    """Updates of parameters and gradients that scale as predicted."""
    name, params, gradients, given = at_base_and_target(case)
    tx = ours(name, make_spec(table), **given, **kwargs)
    gradients = [scaled(g, GRADIENT_SCALE[table]) for g in gradients]
    return updates_of(name, tx, scaled(params, PARAM_SCALE[table]), gradients)[0][-1]


@functools.cache
def unscaled(case):
    """Optax's updates of parameters and gradients that do not scale.

    With ε compared to a norm, optax gets gradients and parameters of the norm that the base's would have.
    """
    name, params, gradients, given = at_base_and_target(case)
    norm = np.array(NORM if OPTIMIZERS[name].units == "norm" else [1.0] * len(PARAMS))
    known = inspect.signature(OPTIMIZERS[name].constructor(name)).parameters
    tx = theirs(name, **{keyword: value for keyword, value in given.items() if keyword in known})
    gradients = [scaled(g, 1 / norm) for g in gradients]
    return scaled(updates_of(name, tx, scaled(params, 1 / norm), gradients)[0][-1], norm)


UNLIKE = {"noisy_sgd", "fromage"}


@pytest.mark.parametrize("case", [case for case in ALIKE if case not in UNLIKE])
def test_what_scales_as_predicted_is_updated_alike_at_all_widths(case):
    """ε, thresholds and accumulators included: then they mean the same at each width."""
    for table in tables_for(case.split(",")[0]):
        mine, optaxs = alike(case, table), unscaled(case)
        for path, factor in zip(PARAMS, FACTORS["adam"][table], strict=True):
            np.testing.assert_allclose(mine[path], factor * optaxs[path], rtol=1e-7, atol=1e-12, err_msg=path)


# SM3's ε is not an argument, and far below everything.
SCALED = [
    case
    for case in ALIKE
    if case not in (*UNLIKE, "sm3")
    and "scale_eps" in inspect.signature(optimizer(case.split(",")[0])).parameters
]


def test_who_has_no_epsilon_to_scale():
    """MADGRAD has one, in a sum of which it is no unit."""
    without = {name for name in NAMES if "scale_eps" not in inspect.signature(optimizer(name)).parameters}
    assert without == {
        *("lion", "madgrad", "optimistic_gradient_descent", "rprop", "schedule_free_sgd", "sgd", "sign_sgd"),
        *("signum", "noisy_sgd"),
    }
    assert {name for name in without if OPTIMIZERS[name].epsilons} == {"madgrad"}


@pytest.mark.parametrize("case", SCALED)
def test_without_scaling_epsilon_it_is_not(case):
    """The twin, for all that have an ε or a threshold: scale_eps=False, microsoft/mup's behaviour."""
    mine, optaxs = alike(case, "mup", scale_eps=False), unscaled(case)
    # Of b3 alone neither the gradient nor the rate depends on width.
    np.testing.assert_allclose(mine["b3"], optaxs["b3"], rtol=1e-7, atol=1e-12)
    assert not np.allclose(mine["b1"], optaxs["b1"], rtol=0.02)


# ---- the base model ---------------------------------------------------------------------------------

BASE = {
    **{name: {} for name in NAMES if name != "sophia"},
    "adafactor, momentum": {"momentum": 0.5, "weight_decay_rate": 1e-2, "factored": False},
    "adafactor, bare": {"clipping_threshold": None, "multiply_by_parameter_scale": False},
    "adamw, mask": {"mask": dict.fromkeys(PARAMS, True) | {"b1": False}, "nesterov": True},
    "fromage, schedule": {"min_norm": 0.1},
    "lamb, decay": {"weight_decay": 0.1},
    "lars, decay": {
        "weight_decay": 0.1,
        "nesterov": True,
        "trust_ratio_mask": lambda p: {**dict.fromkeys(p, True), "b1": False},
    },
    "novograd, decay": {"weight_decay": 0.1},
    "rmsprop, centered": CENTERED,
    "schedule_free_sgd, decay": {"weight_decay": 0.1, "warmup_steps": 2},
    "schedule_free_adamw, decay": {"weight_decay": 0.1, "warmup_steps": 2},
    "sophia, schedule": HUTCHINSON | {"update_interval": 1},
}
SCHEDULE = optax.linear_schedule(0.5, 0.1, 3)


@pytest.mark.parametrize("case", BASE)
def test_the_base_model_is_optaxs_bit_for_bit(case):
    name, rate = case.split(",")[0], SCHEDULE if "schedule" in case.split(",")[-1] else LR
    spec = make_spec(base=True)
    params, gradients = random_tree(spec, 0), [random_tree(spec, seed, 0.1) for seed in (1, 2)]
    mine = updates_of(name, ours(name, spec, rate, **BASE[case]), params, gradients, moving=True)
    optaxs = updates_of(name, theirs(name, rate, **BASE[case]), params, gradients, moving=True)
    assert_same_tree(mine, optaxs)


# ---- weight decay -----------------------------------------------------------------------------------

NESTED = [name for name in NAMES if OPTIMIZERS[name].nested]
L2 = [name for name in NAMES if OPTIMIZERS[name].l2]
DECAYING = [name for name in NAMES if OPTIMIZERS[name].decay and name not in ("adafactor", *NESTED, *L2)]


def decay_of(name, table="mup", steps=1, rate=LR, **kwargs):
    """The updates where nothing but the decay moves the parameters, over the parameters."""
    spec = make_spec(table)
    params, zeros = random_tree(spec, 0), random_tree(spec, 1, 0.0)
    kwargs = {OPTIMIZERS[name].decay[0]: 0.1} | kwargs
    history, _ = updates_of(name, ours(name, spec, rate, **kwargs), params, [zeros] * steps)
    # Signed zeros of a parameter that does not decay are zeros.
    return [np.array([np.median(updates[path] / params[path]) for path in PARAMS]) for updates in history]


class TestDecay:
    @pytest.mark.parametrize("name", DECAYING)
    def test_modes(self, name):
        family = FACTORS[OPTIMIZERS[name].family]
        np.testing.assert_allclose(decay_of(name)[0], [-LR * 0.1] * 5, rtol=1e-9)
        coupled = decay_of(name, "table9", decay="coupled")[0]
        np.testing.assert_allclose(coupled, -LR * 0.1 * np.array(family["table9"]), rtol=1e-9)
        np.testing.assert_allclose(decay_of(name, decay="decoupled")[0], [-0.1] * 5, rtol=1e-9)

    @pytest.mark.parametrize("name", [*DECAYING, "adafactor"])
    def test_roles(self, name):
        decays = decay_of(name, decay_roles=("hidden", "output"))[0] != 0
        assert decays.tolist() == [False, False, True, True, False]

    def test_adafactors_decay_is_free_of_the_learning_rate_as_optaxs_is(self):
        np.testing.assert_allclose(decay_of("adafactor")[0], [-0.1] * 5, rtol=1e-9)
        coupled = decay_of("adafactor", decay="coupled")[0]
        np.testing.assert_allclose(coupled, -0.1 * np.array(FACTORS["normalized"]["mup"]), rtol=1e-9)
        warm = optax.linear_schedule(0.0, 0.5, 2)
        shaped = decay_of("adafactor", steps=3, rate=warm, decay="decoupled")
        np.testing.assert_allclose([step[0] for step in shaped], [0, -0.05, -0.1], atol=1e-12)

    @pytest.mark.parametrize("name", ["adamw", "lion"])
    def test_decoupled_follows_the_schedules_shape(self, name):
        """Which is 1 at the peak, so that a warm-up from 0 warms the decay up too."""
        warm = optax.warmup_cosine_decay_schedule(0.0, 0.5, 2, 6)
        found = np.array(decay_of(name, steps=6, rate=warm, decay="decoupled"))
        shape = np.array([float(warm(step)) / 0.5 for step in range(6)])
        np.testing.assert_allclose(found, -0.1 * shape[:, None] * np.ones(5), atol=1e-9)
        twice = decay_of(name, steps=2, rate=lambda step: 2 * warm(step), decay="decoupled")
        np.testing.assert_allclose(twice, found[:2], atol=1e-12)
        half = decay_of(name, steps=2, rate=warm, decay="decoupled", peak_learning_rate=1.0)
        np.testing.assert_allclose(half, found[:2] / 2, atol=1e-12)
        # The twin: the default follows the learning rate.
        twice = decay_of(name, steps=2, rate=lambda step: 2 * warm(step))
        assert not np.allclose(twice[1], decay_of(name, steps=2, rate=warm)[1])

    def test_decoupled_with_a_decay_that_is_a_schedule(self):
        found = decay_of("adamw", steps=2, decay="decoupled", weight_decay=lambda step: 0.1 * (1 + step))
        np.testing.assert_allclose(found, [[-0.1] * 5, [-0.2] * 5], rtol=1e-6)

    def test_a_learning_rate_of_zero_decays_nothing(self):
        assert not np.any(decay_of("adamw", rate=0.0, decay="decoupled"))
        spec, rate = make_spec(), jnp.zeros(())
        params = random_tree(spec, 0)
        tx = jax.jit(
            lambda rate: mujax.mup_adamw(rate, spec, decay="decoupled").update(
                params, mujax.mup_adamw(rate, spec).init(params), params
            )[0]
        )
        assert not any(np.any(leaf) for leaf in tx(rate).values())

    def test_a_schedule_that_can_not_be_looked_at(self):
        def schedule(step):
            return 0.1 if step < 10 else 0.01

        with pytest.raises(ConfigError, match=r"schedule that can be evaluated .* peak_learning_rate="):
            mujax.mup_adamw(schedule, make_spec(), decay="decoupled")
        mujax.mup_adamw(schedule, make_spec(), decay="decoupled", peak_learning_rate=0.1)

    @pytest.mark.parametrize("name", NESTED)
    def test_inside_of_the_trust_ratio(self, name):
        """Independent: the decay's share of the step makes up for the factor of hidden weights."""
        spec = make_spec()
        params = scaled(random_tree(spec, 0), PARAM_SCALE["mup"])
        gradients = [scaled(random_tree(spec, 1), GRADIENT_SCALE["mup"])]
        (mine,), _ = updates_of(name, ours(name, spec, weight_decay=0.1), params, gradients)
        own = scaled(params, 1 / np.array(PARAM_SCALE["mup"]))
        gradients = [scaled(gradients[0], 1 / np.array(GRADIENT_SCALE["mup"]))]
        for path, factor in zip(PARAMS, FACTORS["normalized"]["mup"], strict=True):
            (optaxs,), _ = updates_of(name, theirs(name, weight_decay=0.1 / factor), own, gradients)
            adam = FACTORS["adam"]["mup"][list(PARAMS).index(path)]
            np.testing.assert_allclose(mine[path], adam * optaxs[path], rtol=1e-9, err_msg=path)
        with pytest.raises(ConfigError, match=f'mup_{name}: expected decay="independent" or "coupled"'):
            ours(name, spec, weight_decay=0.1, decay="decoupled")
        with pytest.raises(TypeError, match="peak_learning_rate"):
            ours(name, spec, peak_learning_rate=1.0)

    @pytest.mark.parametrize("name", L2)
    def test_l2_inside_of_an_adaptive_optimizer_is_refused(self, name):
        message = (
            rf"mup_{name}: expected weight_decay to be 0, got an L2 gradient .*2203\.03466.*mup_add_decayed"
        )
        for decay in (0.1, lambda step: 0.1):
            with pytest.raises(ConfigError, match=message):
                ours(name, make_spec(), weight_decay=decay)
        ours(name, make_spec(), weight_decay=0.0)
        # An array of 0 is what inject_hyperparams makes of the default.
        params = random_tree(make_spec(), 0)
        tx = optax.inject_hyperparams(optimizer(name))(learning_rate=LR, spec=make_spec())
        jax.eval_shape(tx.update, params, tx.init(params), params)

    def test_in_a_chain_of_ones_own(self):
        spec = make_spec("table3")
        params, gradients = random_tree(spec, 0), [random_tree(spec, 1)] * 2
        for decay, extra in (
            ("independent", {}),
            ("coupled", {"family": "adam"}),
            ("decoupled", {"learning_rate": SCHEDULE}),
        ):
            roles = ("input", "hidden")
            chain = optax.chain(
                mujax.mup_scale_by_adam(spec),
                mujax.mup_add_decayed_weights(spec, 0.1, decay=decay, decay_roles=roles, **extra),
                optax.scale_by_learning_rate(SCHEDULE),
            )
            alias = mujax.mup_adamw(SCHEDULE, spec, weight_decay=0.1, decay=decay, decay_roles=roles)
            assert_same_tree(*(updates_of("adamw", tx, params, gradients) for tx in (chain, alias)))

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"decay": "none"}, r"decay: expected one of 'independent', 'coupled', 'decoupled', got 'none'"),
            ({"decay_roles": ("hiden",)}, r"decay_roles: expected a tuple out of 'input', .* got .'hiden'"),
            ({"decay_roles": "hidden"}, r"decay_roles: expected a tuple out of .* got 'hidden'"),
        ],
    )
    def test_what_is_no_mode_and_no_role(self, kwargs, message):
        for name in ("adamw", "lion", "lars", "adafactor", "schedule_free_adamw"):
            weight_decay = {OPTIMIZERS[name].decay[0]: 0.1}
            with pytest.raises(ParametrizationError, match=message):
                ours(name, make_spec(), **weight_decay, **kwargs)
        with pytest.raises(ParametrizationError, match=message):
            mujax.mup_add_decayed_weights(make_spec(), 0.1, **kwargs)

    def test_a_transform_has_no_learning_rate_to_be_free_from(self):
        message = r'mup_scale_by_novograd: expected decay="independent" or "coupled", got "decoupled"'
        with pytest.raises(ConfigError, match=message):
            mujax.mup_scale_by_novograd(make_spec(), weight_decay=0.1, decay="decoupled")
        mujax.mup_scale_by_novograd(make_spec(), weight_decay=0.1, decay="coupled")

    def test_what_a_chain_must_say(self):
        with pytest.raises(ConfigError, match=r'decay="coupled": expected the family .* got none'):
            mujax.mup_add_decayed_weights(make_spec(), 0.1, decay="coupled")
        with pytest.raises(ConfigError, match=r'decay="decoupled": expected the base learning rate, .* None'):
            mujax.mup_add_decayed_weights(make_spec(), 0.1, decay="decoupled")


# ---- learning rates by role -------------------------------------------------------------------------

MULTS = {"hidden": 4.0, "w?": 0.5, "finite": 3.0}
MULTIPLES = {"w1": 0.5, "b1": 1.0, "w2": 2.0, "w3": 0.5, "b3": 3.0}


class TestLearningRatesByRole:
    @pytest.mark.parametrize("name", [name for name in NAMES if name != "fromage"])
    def test_multiply_the_step(self, name):
        spec = make_spec("table3")
        params = random_tree(spec, 0)
        gradients = [random_tree(spec, 1)] * (2 if name in NOTHING_AT_FIRST else 1)
        plain, state = updates_of(name, ours(name, spec), params, gradients)
        mine, own_state = updates_of(name, ours(name, spec, lr_mults=MULTS), params, gradients)
        assert jax.tree.structure(state) == jax.tree.structure(own_state)
        for path, multiple in MULTIPLES.items():
            np.testing.assert_allclose(mine[-1][path], multiple * plain[-1][path], rtol=1e-7, atol=1e-14)

    def test_of_fromage(self):
        spec = make_spec("table3")
        params, gradients = random_tree(spec, 0), [random_tree(spec, 1)]
        (mine,), _ = updates_of("fromage", ours("fromage", spec, lr_mults=MULTS), params, gradients)
        for path, multiple in MULTIPLES.items():
            (plain,), _ = updates_of("fromage", ours("fromage", spec, LR * multiple), params, gradients)
            np.testing.assert_allclose(mine[path], plain[path], rtol=1e-9, err_msg=path)

    @pytest.mark.parametrize("name", ["adamw", "lamb", "fromage", "adafactor"])
    def test_may_be_traced(self, name):
        spec = make_spec()
        params, gradients = random_tree(spec, 0), random_tree(spec, 1)

        def update(hidden):
            tx = ours(name, spec, lr_mults={"hidden": hidden, "w3": 1.0})
            return tx.update(gradients, tx.init(params), params)[0]

        found = jax.jit(jax.vmap(update))(jnp.array([0.5, 2.0]))
        for number, hidden in enumerate((0.5, 2.0)):
            expected = update(hidden)
            for path in PARAMS:
                np.testing.assert_allclose(found[path][number], expected[path], rtol=1e-9, err_msg=path)

    @pytest.mark.parametrize("name", ["adamw", "lamb", "fromage", "adafactor"])
    def test_that_are_traced_keep_the_dtype(self, name):
        spec = make_spec()
        params = random_tree(spec, 0)
        half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        shapes = jax.eval_shape(
            lambda h: ours(name, spec, lr_mults={"hidden": h}).update(
                half, ours(name, spec).init(half), half
            )[0],
            jnp.float32(2.0),
        )
        assert {leaf.dtype for leaf in shapes.values()} == {jnp.dtype(jnp.bfloat16)}

    @pytest.mark.parametrize("name", [name for name in TRANSFORMS if name != "scale_by_muon"])
    def test_of_transforms(self, name):
        """With the factor of the table and the multiple, on top of what optax's does."""
        spec = make_spec("table3")
        params, gradients = random_tree(spec, 0), [random_tree(spec, 1, 1e6)] * 2
        entry = TRANSFORMS[name]
        rate = {"learning_rate": LR} if name in ("scale_by_rprop", "scale_by_madgrad") else {}
        mine = getattr(mujax, f"mup_{name}")(spec, **rate, lr_mults=MULTS)
        plain = entry.constructor(name)(**rate)
        (first, second), state = updates_of("novograd", mine, params, gradients)
        (their_first, their_second), their_state = updates_of("novograd", plain, params, gradients)
        assert jax.tree.structure(state) == jax.tree.structure(their_state)
        linear = "radam" in name or "acprop" in name
        expected = FACTORS["sgd" if linear else entry.family]["table3"]
        if "madgrad" in name:
            expected = CUBE_ROOT["table3"]
        expected = np.array(expected) * np.array(list(MULTIPLES.values()))
        late = "adopt" in name or "rprop" in name
        found = ratios(second, their_second) if late else ratios(first, their_first)
        np.testing.assert_allclose(found, expected, rtol=2e-3)

    @pytest.mark.parametrize(
        ("mults", "message"),
        [
            (
                {"hiden": 2.0},
                r"lr_mults: expected roles \('input', .*, got 'hiden', which is neither; the first .* 'w1'",
            ),
            ({"w9*": 2.0}, r"lr_mults: expected roles .*, got 'w9\*', which is neither"),
            ({"hidden": -1.0}, r"lr_mults: expected multiples of at least 0, got -1.0 for 'hidden'"),
            ([("hidden", 2.0)], r"lr_mults: expected a dict of multiples .*, got \["),
        ],
    )
    def test_what_is_no_role_and_matches_nothing(self, mults, message):
        for make in (
            *(functools.partial(ours, name) for name in ("adam", "sgd", "lars", "adafactor", "fromage")),
            mujax.mup_scale_by_adam,
            mujax.mup_scale_by_lion,
            lambda spec, **kwargs: mujax.mup_wrap(optax.sgd(0.1), spec, "sgd", **kwargs),
        ):
            with pytest.raises(ParametrizationError, match=message):
                make(make_spec(), lr_mults=mults)

    def test_of_nothing_moves_nothing(self):
        spec = make_spec()
        params, gradients = random_tree(spec, 0), [random_tree(spec, 1)]
        (found,), _ = updates_of("adamw", ours("adamw", spec, lr_mults={"input": 0.0}), params, gradients)
        assert not np.any(found["w1"])
        assert np.any(found["w2"])
        with pytest.raises(ParametrizationError, match=r"multiples above 0 for madgrad"):
            ours("madgrad", spec, lr_mults={"input": 0.0})


# ---- what else µP adds ------------------------------------------------------------------------------


class TestSwitches:
    def test_alignment(self):
        spec = make_spec()
        params, gradients = random_tree(spec, 0), [random_tree(spec, 1)]
        (full,), _ = updates_of("lamb", ours("lamb", spec), params, gradients)
        (none,), _ = updates_of("lamb", ours("lamb", spec, alignment="none"), params, gradients)
        np.testing.assert_allclose(ratios(none, full), [1, 1, 3**0.5, 1, 1], rtol=1e-9)
        with pytest.raises(
            ParametrizationError, match="alignment: expected one of 'full', 'none', got 'half'"
        ):
            ours("lamb", spec, alignment="half")

    @pytest.mark.parametrize("name", ["lars", "lamb", "fromage", "adafactor"])
    def test_zero_init(self, name):
        """A hidden weight of updates only has their size, and the trust ratio finds it by itself."""
        spec = make_spec()
        params = random_tree(spec, 0) | {"w2": random_tree(spec, 0)["w2"] * 1e-3}
        gradients = [random_tree(spec, 1)]
        (plain,), _ = updates_of(name, ours(name, spec), params, gradients)
        (named,), _ = updates_of(name, ours(name, spec, zero_init=("w2",)), params, gradients)
        if name == "fromage":
            (plain,), _ = updates_of(name, theirs(name), params, gradients)
            np.testing.assert_allclose(named["w2"], plain["w2"], rtol=1e-9)
        else:
            np.testing.assert_allclose(ratios(named, plain), [1, 1, 3**0.5, 1, 1], rtol=1e-9)
        with pytest.raises(
            ConfigError, match=r"zero_init: expected globs that match .*, got 'w9', which matches none"
        ):
            ours(name, spec, zero_init=("w9",))

    def test_another_models_tree(self):
        spec = make_spec()
        for name in ("lars", "lamb", "adafactor", "fromage", "sophia", "schedule_free_adamw", "novograd"):
            with pytest.raises(SpecMismatchError, match=r"^w1: expected shape \(15, 15\), got \(6, 4\)"):
                ours(name, spec).init(random_tree(spec, 0) | {"w1": jnp.ones((6, 4))})

    @pytest.mark.parametrize(
        "name", ["fromage", "lamb", "lars", "novograd", "schedule_free_adamw", "adamaxw"]
    )
    def test_inside_of_inject_hyperparams(self, name):
        spec = make_spec()
        params = random_tree(spec, 0)
        mine = optax.inject_hyperparams(optimizer(name))(learning_rate=LR, spec=spec)
        plain = optax.inject_hyperparams(OPTIMIZERS[name].constructor(name))(learning_rate=LR)
        state = mine.init(params)
        assert set(state.hyperparams) == set(plain.init(params).hyperparams)
        _, new_state = jax.eval_shape(mine.update, params, state, params)
        assert jax.tree.structure(new_state) == jax.tree.structure(state)

    @pytest.mark.parametrize("name", ["fromage", "lamb", "lars", "novograd", "sophia", "adafactor", "acprop"])
    def test_dtypes_are_optaxs(self, name):
        spec = make_spec()
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_tree(spec, 0))

        def types(tx):
            shapes = jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), params)
            return jax.tree.map(lambda leaf: leaf.dtype, shapes)

        assert types(ours(name, spec)) == types(theirs(name))
