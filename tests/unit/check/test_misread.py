"""Which role is said to be misread: exponents as training would measure them, and no training."""

import math
import re
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mujax
from mujax.check._measure import STATS
from mujax.check._misread import Growth, _Reading, find_misread, overruled
from mujax.check._slopes import judge
from mujax.check._taps import find_taps

WIDTHS = (8, 16, 32)
X = jax.ShapeDtypeStruct((4, 6), jnp.float32)


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        for name in ("first", "hidden", "last"):
            x = nn.relu(nn.Dense(self.width, name=name)(x))
        return nn.Dense(3, name="out")(x)


def found(grown, linear=False, **options):
    """What is said of taps that grow by these exponents: name -> (initial gain, gain of its update)."""
    models = {
        width: mujax.mup_init(Net(width), Net(8), X, delta=Net(32) if width == 8 else None, **options)
        for width in WIDTHS
    }
    clean = models[32]
    taps = find_taps(clean)
    paths = tuple(clean.spec)
    table = np.ones((len(WIDTHS), 3, 3, len(taps), len(STATS)))
    noise = np.exp2(0.02 * np.random.default_rng(0).normal(size=table.shape))
    inherited = 0.0
    for number, tap in enumerate(taps):
        initial, update = grown.get(tap.name, (0.0, 0.0))
        powers = {"size": initial + inherited, "change": update + inherited, "inputs": inherited}
        if tap.kind not in ("product", "readout"):
            powers["inputs"] = math.nan
        powers |= {"by_weights": update + inherited, "by_inputs": inherited}
        # What one tap grows by, everything behind it does.
        inherited += initial
        for stat, name in enumerate(STATS):
            table[..., number, stat] = (np.array(WIDTHS)[:, None, None] ** powers[name]) * noise[
                ..., number, stat
            ]
    checks = [judge(tap, WIDTHS, table[:, :, :, number]) for number, tap in enumerate(taps)]
    failed = {
        number: tuple(check for check in of_tap if check.status == "fail")
        for number, of_tap in enumerate(checks)
        if any(check.status == "fail" for check in of_tap)
    }
    assert failed
    return find_misread(clean, models, taps, failed, table, np.full(len(paths), linear), paths)


@pytest.mark.parametrize("table", ["mup", "table3", "table9"])
def test_hidden_read_as_input(table):
    roles = {"hidden/kernel": "input"}
    (one,) = found({"hidden/kernel": (0.5, 1.0)}, roles=roles, parametrization=table)
    assert (one.name, one.rule) == ("hidden/kernel", "role")
    assert "hidden/kernel: it is read as input, where its product shows hidden; " in one.message
    assert one.message.endswith('give roles={"hidden/kernel": "hidden"}')
    assert re.search(r"as width\^0\.(49|50) at initialisation and as width\^1\.00 by its update", one.message)


def test_hidden_read_as_output():
    (one,) = found({"hidden/kernel": (-1.5, -1.0)}, roles={"hidden/kernel": "output"})
    assert one.message.endswith('give roles={"hidden/kernel": "hidden"}')
    assert "read as output" in one.message


def test_under_sgd_other_rates_fit():
    # Both axes count as fan-out, which SGD's rate follows.
    (one,) = found({"hidden/kernel": (0.5, 2.0)}, linear=True, roles={"hidden/kernel": "input"})
    assert one.message.endswith('give roles={"hidden/kernel": "hidden"}')


def test_a_role_that_no_one_gave():
    """The reading itself is wrong: a product that is said to be hidden behaves as a readout's does."""
    (one,) = found({"hidden/kernel": (0.0, 1.0)})
    assert one.rule == "activation"
    assert "hidden/kernel: it is read as hidden; its product scales" in one.message
    assert "no role would change that" in one.message


def test_two_that_are_misread_are_both_named_and_what_is_between_inherits():
    roles = {"hidden/kernel": "input", "last/kernel": "input"}
    names = [one.name for one in found(dict.fromkeys(roles, (0.5, 1.0)), roles=roles)]
    assert names == list(roles)


def test_what_grows_in_no_product_is_sought_between_the_taps():
    (one,) = found({"output": (0.5, 0.5)})
    assert (one.name, one.rule) == ("output", "activation")
    assert "it is the first tap that differs from the theory; look at the constants" in one.message


def test_no_bias_is_blamed_for_what_it_meets():
    """As a readout's its factor would make up for the growth; a kernel's does, read as an input's."""
    models = {
        width: mujax.mup_init(Net(width), Net(8), X, delta=Net(32), roles={"last/kernel": "input"})
        for width in WIDTHS
    }
    clean = models[32]
    taps = find_taps(clean)
    reading = _Reading(clean, models, dict.fromkeys(clean.spec, False))
    assert reading.blamed(taps[-1], ["last/bias"], Growth(0.5, 1.0)) is None
    one = reading.blamed(taps[-1], ["last/bias", "last/kernel"], Growth(0.5, 1.0))
    assert one is not None
    assert one.name == "last/kernel"


def test_in_the_standard_parametrization_roles_change_nothing():
    (one,) = found({"hidden/kernel": (0.5, 1.0)}, parametrization="sp")
    assert (one.name, one.rule) == ("hidden/kernel", "activation")


def test_roles_that_the_product_shows_are_not_overruled():
    def of(**options):
        mup = mujax.mup_init(Net(32), Net(8), X, **options)
        taps = find_taps(mup)
        return [tap.name for tap in taps if overruled(mup, tap)]

    assert of() == of(roles={"hidden/kernel": "hidden"}) == []
    assert of(roles={"hidden/kernel": "input"}) == ["hidden/kernel"]


def test_a_tied_embedding_is_not_overruled():
    class Tied(nn.Module):
        width: int

        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(9, self.width)
            return embed.attend(nn.relu(nn.Dense(self.width)(embed(tokens))))

    mup = mujax.mup_init(Tied(32), Tied(8), jax.ShapeDtypeStruct((4,), jnp.int32))
    taps = find_taps(mup)
    assert not any(overruled(mup, tap) for tap in taps)


def test_a_kernel_that_cannot_be_followed_is_found_between_the_taps():
    """Its product is one of two activations, which has no parameter of its own."""

    @jax.custom_vjp
    def unseen(kernel):
        return jax.pure_callback(
            lambda kernel: kernel, jax.ShapeDtypeStruct(kernel.shape, kernel.dtype), kernel
        )

    unseen.defvjp(lambda kernel: (unseen(kernel), None), lambda _, gradient: (gradient,))

    class Unseen(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.lecun_normal(), (self.width, self.width))
            return nn.Dense(3)(nn.relu(nn.relu(nn.Dense(self.width)(x)) @ unseen(kernel)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mujax.MujaxWarning)
        models = {
            width: mujax.mup_init(Unseen(width), Unseen(8), X, delta=Unseen(32), roles={"kernel": "input"})
            for width in WIDTHS
        }
    clean = models[32]
    taps = find_taps(clean)
    (number,) = [number for number, tap in enumerate(taps) if tap.kind == "mixing"]
    table = np.ones((len(WIDTHS), 2, 2, len(taps), len(STATS))) * np.exp2(
        0.01 * np.random.default_rng(0).normal(size=(len(WIDTHS), 2, 2, len(taps), len(STATS)))
    )
    table[..., number, STATS.index("size")] *= np.array(WIDTHS)[:, None, None] ** 0.5
    table[..., number, STATS.index("inputs")] = math.nan
    table[..., number, STATS.index("change")] *= np.array(WIDTHS)[:, None, None]
    failed = {number: tuple(judge(taps[number], WIDTHS, table[:, :, :, number]))}
    paths = tuple(clean.spec)
    (one,) = find_misread(clean, models, taps, failed, table, np.zeros(len(paths), bool), paths)
    assert (one.name, one.rule) == ("kernel", "role")
    assert one.message.endswith('give roles={"kernel": "hidden"}')
