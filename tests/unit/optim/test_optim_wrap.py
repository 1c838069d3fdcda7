"""What mup_wrap finds out about a transform: its family, what has none, what is in µP already."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mujax
from mujax import rules
from mujax.errors import ConfigError, MujaxError, ParametrizationError
from mujax.optim._probe import behaviour
from mujax.spec import MupSpec, ParamSpec

# r_in is 3 and r_out is 5 wherever there is one.
SPEC = MupSpec(
    {
        "first/kernel": ParamSpec((7, 20), (7, 4), fan_in=(0,), fan_out=(1,), infinite=(1,)),
        "first/bias": ParamSpec((20,), (4,), fan_out=(0,), infinite=(0,)),
        "heads/kernel": ParamSpec((12, 5, 4), (4, 1, 4), fan_in=(0,), fan_out=(1, 2), infinite=(0, 1)),
        "last/kernel": ParamSpec((12, 10), (4, 10), fan_in=(0,), fan_out=(1,), infinite=(0,)),
        "last/bias": ParamSpec((10,), (10,), fan_out=(0,)),
        "scale": ParamSpec((), ()),
    },
    rules.parametrization("mup"),
)


def by_leaf(function):
    return optax.stateless(lambda updates, _: jax.tree.map(function, updates))


def orthogonal(leaf, singular=(1.0, 1.0)):
    """Of matrices by their singular values; of the rest, as Muon has it, by Adam."""
    if leaf.ndim < 2:
        return jnp.sign(leaf)
    u, s, v = jnp.linalg.svd(leaf.reshape(-1, leaf.shape[-1]), full_matrices=False)
    return (u * jnp.linspace(*singular, s.size) @ v).reshape(leaf.shape)


def flattened(leaf):
    """Not quite, as Newton and Schulz leave them."""
    return orthogonal(leaf, (0.7, 1.2))


OF_FAMILY = {
    "sgd": {
        "sgd": optax.sgd(0.1, 0.9),
        "optimistic": optax.optimistic_gradient_descent(0.1),
    },
    "adam": {
        "adamax": optax.adamax(0.1),
        "adan": optax.adan(0.1),
        "ademamix": optax.contrib.ademamix(0.1),
        "adafactor without scaling": optax.adafactor(0.1, multiply_by_parameter_scale=False),
        "signum": optax.signum(0.1),
        "adopt": optax.contrib.adopt(0.1),
    },
    "normalized": {
        "lars": optax.lars(0.1),
        "lamb": optax.lamb(0.1),
        "trust ratio": optax.scale_by_trust_ratio(),
        "adafactor": optax.adafactor(0.1),
        "by root mean square": optax.chain(optax.scale_by_adam(), optax.scale_by_param_block_rms()),
    },
    "normalized_gradient": {
        "novograd": optax.novograd(0.1),
        "normalized gradient descent": by_leaf(lambda g: g / jnp.linalg.norm(g)),
        "with momentum": optax.chain(by_leaf(lambda g: g / jnp.linalg.norm(g)), optax.trace(0.9)),
    },
    "spectral": {
        "orthogonal": by_leaf(orthogonal),
        "with momentum": optax.chain(optax.trace(0.95), by_leaf(orthogonal)),
        "nearly": by_leaf(flattened),
    },
}
ALL = [
    pytest.param(family, tx, id=f"{family}: {name}")
    for family, several in OF_FAMILY.items()
    for name, tx in several.items()
]
FIRST = {family: next(iter(several.values())) for family, several in OF_FAMILY.items()}


@pytest.mark.parametrize(("family", "tx"), ALL)
def test_behaviour(family, tx):
    assert behaviour(tx, SPEC) == family
    mujax.mup_wrap(tx, SPEC, family)


@pytest.mark.parametrize("family", rules.FAMILIES)
def test_another_family_is_refused(family):
    for other in rules.FAMILIES:
        if other != family:
            message = rf"expected a transform of the family '{other}', .* pass family='{family}'"
            with pytest.raises(ParametrizationError, match=message):
                mujax.mup_wrap(FIRST[family], SPEC, other)


@pytest.mark.parametrize("family", rules.FAMILIES)
def test_a_missing_family_is_an_error_that_says_what_it_looks_like(family):
    message = (
        rf"family to be one of 'sgd', .*'spectral', got none; pass that of tx; it behaves like '{family}'"
    )
    with pytest.raises(ParametrizationError, match=message):
        mujax.mup_wrap(FIRST[family], SPEC)


def test_what_behaves_like_none_is_taken_at_its_word():
    tx = optax.chain(optax.clip(0.05), optax.sgd(0.1))
    assert behaviour(tx, SPEC) is None
    for family in rules.FAMILIES:
        mujax.mup_wrap(tx, SPEC, family)
    with pytest.raises(ParametrizationError, match=r"got none; pass that of tx\.$"):
        mujax.mup_wrap(tx, SPEC)


@pytest.mark.parametrize(
    "make", [mujax.mup_adam, mujax.mup_lamb, mujax.mup_muon, mujax.mup_schedule_free_sgd]
)
def test_in_mup_already(make):
    for family in (None, "adam"):
        with pytest.raises(
            MujaxError, match=r"applies µP factors already; use it as it is, without mup_wrap"
        ):
            mujax.mup_wrap(make(0.1, SPEC), SPEC, family)


@pytest.mark.parametrize(
    ("name", "tx"),
    [
        ("cocob", optax.contrib.cocob()),
        ("dadapt_adamw", optax.contrib.dadapt_adamw()),
        ("dog", optax.contrib.dog(1.0)),
        ("dowg", optax.contrib.dowg(1.0)),
        ("lbfgs", optax.lbfgs()),
        ("mechanize", optax.contrib.mechanize(optax.sgd(1.0))),
        ("momo", optax.contrib.momo()),
        ("momo_adam", optax.contrib.momo_adam()),
        ("prodigy", optax.contrib.prodigy()),
        ("galore", optax.contrib.galore(0.1, rank=1)),
    ],
)
def test_what_has_no_rule(name, tx):
    for family in (None, "adam"):
        with pytest.raises(
            ConfigError, match=rf"mup_wrap: expected an optimizer with a µP rule, got {name}: "
        ):
            mujax.mup_wrap(optax.chain(optax.clip_by_global_norm(1.0), tx), SPEC, family)


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(optax.add_decayed_weights(1e-2), optax.scale_by_adam()),
        optax.adadelta(1.0, weight_decay=1e-2),
        optax.chain(optax.add_decayed_weights(1e-4), optax.sign_sgd(0.1)),
    ],
)
def test_l2_is_told_from_weight_decay(tx):
    message = r"weight decay as an L2 gradient inside of an adaptive optimizer.*2203\.03466.*outside of it"
    with pytest.raises(MujaxError, match=message):
        mujax.mup_wrap(tx, SPEC, "adam")
    with pytest.raises(MujaxError, match=r"weight decay, which the µP factor would scale with width"):
        mujax.mup_wrap(optax.adamw(0.1), SPEC, "adam")


def random_tree(seed):
    rng = np.random.default_rng(seed)
    tree = {}
    for path, param in SPEC.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = jnp.asarray(rng.normal(size=param.shape), jnp.float32)
    return tree


def one_step(tx):
    params = random_tree(0)
    return tx.update(random_tree(1), tx.init(params), params)[0]


@pytest.mark.parametrize(
    ("wrapped", "alias"),
    [
        (
            lambda: mujax.mup_wrap(optax.scale_by_trust_ratio(), SPEC, "normalized"),
            lambda: mujax.mup_scale_by_trust_ratio(SPEC),
        ),
        (
            lambda: mujax.mup_wrap(optax.novograd(0.1), SPEC, "normalized_gradient"),
            lambda: mujax.mup_novograd(0.1, SPEC),
        ),
        (
            lambda: mujax.mup_wrap(optax.adan(0.1), SPEC, "adam", lr_mults={"hidden": 2.0}),
            lambda: mujax.mup_adan(0.1, SPEC, lr_mults={"hidden": 2.0}),
        ),
    ],
)
def test_a_wrapped_optimizer_is_its_alias(wrapped, alias):
    for mine, its in zip(
        jax.tree.leaves(one_step(wrapped())), jax.tree.leaves(one_step(alias())), strict=True
    ):
        np.testing.assert_allclose(mine, its, rtol=2e-4, atol=1e-7)


def test_factors_of_the_spectral_family():
    found, plain = (
        one_step(tx) for tx in (mujax.mup_wrap(by_leaf(orthogonal), SPEC, "spectral"), by_leaf(orthogonal))
    )
    expected = {"first": 5**0.5, "heads": (5 / 3) ** 0.5, "last": 3**0.5}
    for module, factor in expected.items():
        kernels = found[module]["kernel"], factor * plain[module]["kernel"]
        np.testing.assert_allclose(*kernels, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found["last"]["bias"], plain["last"]["bias"])


class TestArcTangent:
    def test_it_is_free_of_the_gradients_scale(self):
        tx = mujax.mup_scale_by_adam(SPEC, eps=None)
        params = random_tree(0)
        state = tx.init(params)
        assert jax.tree.structure(state) == jax.tree.structure(optax.scale_by_adam().init(params))
        small, _ = tx.update(jax.tree.map(lambda g: 1e-12 * g, random_tree(1)), state)
        large, _ = tx.update(random_tree(1), state)
        for a, b in zip(jax.tree.leaves(small), jax.tree.leaves(large), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)
        # The twin: an ε is not.
        plain = mujax.mup_scale_by_adam(SPEC)
        small, _ = plain.update(jax.tree.map(lambda g: 1e-12 * g, random_tree(1)), state)
        assert not np.allclose(small["scale"], plain.update(random_tree(1), state)[0]["scale"], rtol=0.1)

    @pytest.mark.parametrize("nesterov", [False, True])
    def test_by_hand(self, nesterov):
        tx = mujax.mup_scale_by_adam(SPEC, 0.8, 0.9, None, nesterov=nesterov)
        params = random_tree(0)
        state, m, v = tx.init(params), 0.0, 0.0
        for step in (1, 2, 3):
            gradients = random_tree(step)
            updates, state = tx.update(gradients, state)
            g = np.asarray(gradients["heads"]["kernel"], float)
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        ahead = 0.8 * m / (1 - 0.8**4) + 0.2 * g / (1 - 0.8**3) if nesterov else m / (1 - 0.8**3)
        expected = np.arctan2(ahead, np.sqrt(v / (1 - 0.9**3))) / 3
        np.testing.assert_allclose(updates["heads"]["kernel"], expected, rtol=1e-4, atol=1e-6)

    def test_no_gradient_is_no_update(self):
        zeros = jax.tree.map(jnp.zeros_like, random_tree(0))
        tx = mujax.mup_adamw(0.1, SPEC, eps=None, weight_decay=0.0)
        updates, _ = tx.update(zeros, tx.init(zeros), zeros)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
