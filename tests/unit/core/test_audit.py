"""The audit reports what cannot be corrected or read, with place and remedy, and never raises."""

import functools
import inspect
import re
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.experimental import pallas as pl
from jax.extend import core as jex

import mujax

BASE, WIDTH = 8, 24
X = jax.ShapeDtypeStruct((6, 7), jnp.float32)


class Model(nn.Module):
    width: int
    body: Callable

    @nn.compact
    def __call__(self, x):
        return self.body(self, self.width, x)


def audit(body: Callable, **kwargs) -> tuple[mujax.Finding, ...]:
    return mujax.audit(Model(WIDTH, body), Model(BASE, body), X, **kwargs)


def line(text: str) -> str:
    """`file:line` of the only line of this file, the tables aside, that ends with a comment."""
    source = inspect.getsource(sys.modules[__name__]).splitlines()
    (number,) = [number for number, written in enumerate(source, start=1) if written.endswith(f"# {text}")]
    return f"test_audit.py:{number}"


# ---- models with something that cannot be corrected --------------------------------------------------


def _qkv(w, x):
    return [nn.Dense(w, use_bias=False, name=name)(x) for name in ("q", "k", "v")]


def _readout(x):
    return nn.Dense(3, use_bias=False, name="out")(x)


def _clean(self, w, x):
    q, k, v = _qkv(w, x)
    return _readout(nn.softmax(q @ k.T / jnp.sqrt(w)) @ v)


def _kernel(self, w, x):
    """Each point of its grid adds what four of the features give."""

    def kernel(q, k, out):
        out[...] = q[...] @ k[...].T / jnp.sqrt(w) + jnp.where(pl.program_id(0) == 0, 0, out[...])

    q, k, v = _qkv(w, x)
    logits = jax.ShapeDtypeStruct((6, 6), x.dtype)
    part = pl.BlockSpec((6, 4), lambda i: (0, i))
    whole = pl.BlockSpec((6, 6), lambda i: (0, 0))
    attend = functools.partial(pl.pallas_call, interpret=True, grid=(w // 4,), in_specs=[part, part])
    return _readout(nn.softmax(attend(kernel, out_shape=logits, out_specs=whole)(q, k)) @ v)  # pallas


def _callback(self, w, x):
    q, k, v = _qkv(w, x)
    logits = jax.ShapeDtypeStruct((6, 6), x.dtype)
    logits = jax.pure_callback(lambda q, k: np.asarray(q @ k.T / w**0.5), logits, q, k)  # callback
    return _readout(nn.softmax(logits) @ v)


def _weights(q, k):
    """Logits that are linear in nothing that comes in, and weights that are not linear in them."""
    return nn.softmax(jnp.tanh(q) @ jnp.tanh(k).T / jnp.sqrt(q.shape[-1]))  # custom_vjp


_own_weights = jax.custom_vjp(_weights)
_own_weights.defvjp(lambda q, k: (_weights(q, k), (q, k)), lambda kept, g: jax.vjp(_weights, *kept)[1](g))


def _own_derivative(self, w, x):
    q, k, v = _qkv(w, x)
    return _readout(_own_weights(q, k) @ v)


def _unscaled(self, w, x):
    q, k, v = _qkv(w, x)
    return _readout(nn.softmax(q @ k.T) @ v)  # unscaled


def _squared_sum(self, w, x):
    x = nn.Dense(w, name="first")(x)
    return _readout(x * jnp.tanh(x.sum(-1, keepdims=True) ** 2 / w))  # squared


def _averaged(self, w, x):
    q, k, v = _qkv(w, x)
    x = nn.Dense(w, use_bias=False, name="last")(q @ k.T @ v)  # sums
    return x.mean(-1)  # averaged


def _divided_behind_a_layer(self, w, x):
    q, k, v = _qkv(w, x)
    return nn.Dense(w, use_bias=False, name="last")(q @ k.T @ v) / w**0.5  # behind


def _divided_in_front_of_it(self, w, x):
    q, k, v = _qkv(w, x)
    return nn.Dense(w, use_bias=False, name="last")(q @ k.T / w**0.5 @ v)


def _disputed(self, w, x):
    """One product, used at the size that it has and in a sum over it."""
    x = nn.Dense(w, name="first")(x) / jnp.sqrt(w)  # disputed
    return _readout(jnp.tanh(x) * jnp.tanh(x.sum(-1, keepdims=True)))


def _modulated(self, w, x):
    """StyleGAN's kernel, which is multiplied with a style, and divided by its norm."""
    x = nn.Dense(w, name="first")(x)
    style = 1 + nn.Dense(w, name="style")(x[:1])
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (w, w)) * style.T
    return _readout(nn.relu(x @ (kernel / jnp.linalg.norm(kernel, axis=0))))  # modulated


def _spectral_norm(self, w, x):
    x = nn.relu(nn.Dense(w, name="first")(x))
    return nn.SpectralNorm(nn.Dense(3, name="out"))(x, update_stats=False)  # spectral


FINDINGS = {
    "pallas_call": (
        _kernel,
        "opaque",
        "pallas",
        "pallas_call can't be looked into.*check that nothing in it",
    ),
    "pure_callback": (_callback, "opaque", "callback", "pure_callback can't be looked into"),
    "custom_vjp": (
        _own_derivative,
        "out of reach",
        "custom_vjp",
        r"a factor of 0.5774 \(attention\) belongs inside custom_vjp_call.*move the product out",
    ),
    "no scale": (
        _unscaled,
        "unscaled sum",
        "unscaled",
        r"dot_general grows 3 times .* is used at .*test_audit.py:\d+.*write a factor in the model",
    ),
    "a scale that is no pattern": (_squared_sum, "unknown scale", "squared", r"div grows 3 times"),
    "one result at two sizes": (
        _disputed,
        "disputed scale",
        "disputed",
        r"used at two sizes, which require the factors 1.732 and 0.5774; compute the two uses from separate",
    ),
    "a modulated kernel": (
        _modulated,
        "computed kernel",
        "modulated",
        r"kernel is combined with values computed from data",
    ),
    "SpectralNorm": (
        _spectral_norm,
        "computed kernel",
        "spectral",
        r"out/kernel is combined with values computed from .* check its size by hand at two widths",
    ),
}


@pytest.mark.parametrize("name", FINDINGS)
def test_what_can_not_be_put_right_is_found(name):
    body, kind, place, text = FINDINGS[name]
    (finding,) = audit(body)
    assert finding.kind == kind
    assert finding.where.endswith(line(place))
    assert re.search(text, finding.message)


def test_the_place_where_a_growth_starts_is_named():
    (finding,) = audit(_averaged)
    assert finding.where.endswith(line("averaged"))
    assert re.search(rf"\(the growth starts at \S+{line('sums')}\), and its", finding.message)
    (finding,) = audit(_unscaled)
    assert "starts" not in finding.message


def test_a_root_behind_a_layer_is_not_that_of_the_logits_in_front_of_it():
    (finding,) = audit(_divided_behind_a_layer)
    assert (finding.kind, finding.where.split("/")[-1]) == ("unknown scale", line("behind"))
    assert audit(_divided_in_front_of_it) == ()


@pytest.mark.parametrize("name", FINDINGS)
def test_a_model_with_findings_still_runs(name):
    body, *_ = FINDINGS[name]
    with pytest.warns(mujax.MujaxWarning, match=re.escape(audit(body)[0].where)):
        mup = mujax.mup_init(Model(WIDTH, body), Model(BASE, body), X)
    variables = mup.init(jax.random.key(0))
    out = mup.apply(variables, jnp.ones(X.shape))
    expected = Model(WIDTH, body).apply(variables, jnp.ones(X.shape))
    assert jax.tree.map(jnp.shape, out) == jax.tree.map(jnp.shape, expected)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))
    assert audit(body)[0].where in mup.explain()


def test_a_computed_kernel_is_a_kernel_and_gets_no_factor():
    with pytest.warns(mujax.MujaxWarning, match="computed from data"):
        mup = mujax.mup_init(Model(WIDTH, _modulated), Model(BASE, _modulated), X)
    assert (mup.spec["kernel"].role, mup.spec["kernel"].fan_in) == ("hidden", (0,))
    assert [c.kind for c in mup.corrections] == ["readout"]


def test_strict_raises_with_place_and_remedy():
    with pytest.raises(mujax.AuditError) as error:
        audit(_unscaled, strict=True)
    text = str(error.value)
    assert line("unscaled") in text
    assert "write a factor in the model" in text


def test_strict_says_how_many_more_there_are():
    def body(self, w, x):
        return _unscaled(self, w, x), jnp.tanh((x @ self.param("p", nn.initializers.ones, (7, w))).sum(-1))

    with pytest.raises(mujax.AuditError, match=r"There are 1 more"):
        audit(body, strict=True)


def test_a_model_without_findings_is_silent():
    """No finding, no warning (warnings are errors here), and `strict` lets it through."""
    assert audit(_clean) == ()
    mup = mujax.mup_init(Model(WIDTH, _clean), Model(BASE, _clean), X, strict=True)
    assert mup.findings == ()
    assert mup.explain().endswith("Found, and not corrected:\n  nothing")


def test_what_a_scale_by_hand_puts_right_is_no_finding():
    def body(self, w, x):
        q, k, v = _qkv(w, x)
        return _readout(nn.softmax(q @ k.T * (1 / w)) @ v)

    assert audit(body) == ()


# ---- primitives that are not known --------------------------------------------------------------------

_unheard_of = jex.Primitive("unheard_of")
_unheard_of.def_impl(lambda x: x * 2.0)
_unheard_of.def_abstract_eval(lambda x: x)


def test_an_unknown_primitive_takes_the_facts_away_and_is_reported():
    """Without it the scale would be read and corrected; with it nothing is claimed of its result."""

    def body(self, w, x):
        x = nn.Dense(w, name="first")(x) * jnp.sqrt(w)
        return _readout(nn.relu(_unheard_of.bind(x)) + 1.0)  # unheard of

    (finding,) = audit(body)
    assert (finding.kind, finding.where.endswith(line("unheard of"))) == ("opaque", True)
    assert finding.message.startswith("unheard_of can't be looked into")
    with pytest.warns(mujax.MujaxWarning, match="unheard_of"):
        mup = mujax.mup_init(Model(WIDTH, body), Model(BASE, body), X)
    assert [c.kind for c in mup.corrections] == ["readout"]
    variables = mup.init(jax.random.key(0))
    expected = Model(WIDTH, body).apply(variables, jnp.ones(X.shape)) / (WIDTH / BASE)
    np.testing.assert_allclose(mup.apply(variables, jnp.ones(X.shape)), expected, rtol=1e-5)


def test_a_parameter_in_an_unknown_primitive_has_no_role():
    def body(self, w, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (7, w))
        return _readout(x @ _unheard_of.bind(kernel))

    with pytest.raises(mujax.RoleError, match=r"kernel: .*got one in unheard_of at .*test_audit.py.*roles="):
        audit(body)
    mup = audit(body, roles={"kernel": "input"})
    assert [finding.kind for finding in mup] == ["opaque"]


def test_constants_in_an_unknown_primitive_are_no_finding():
    def body(self, w, x):
        return _readout(nn.Dense(w, name="first")(x) + _unheard_of.bind(jnp.ones(w)))

    assert audit(body) == ()


# ---- findings that repeat ----------------------------------------------------------------------------


def _layers(count: int) -> Callable:
    def body(self, w, x):
        h = nn.Dense(w, use_bias=False)(x)
        for _ in range(count):
            q, k = nn.Dense(w, use_bias=False)(h), nn.Dense(w, use_bias=False)(h)
            h = nn.softmax(q @ k.T) @ h  # repeated
        return _readout(h)

    return body


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_finding_that_repeats_is_one_with_a_count(count):
    body = _layers(count)
    (finding,) = audit(body)
    assert (finding.count, finding.where.endswith(line("repeated"))) == (count, True)
    with pytest.warns(mujax.MujaxWarning) as caught:
        mup = mujax.mup_init(Model(WIDTH, body), Model(BASE, body), X)
    (warning,) = caught
    times = f" ({count} times)"
    for text in (str(warning.message), mup.explain()):
        assert (times in text) == (count > 1)
        assert text.count(finding.message) == 1
    assert "more: see" not in str(warning.message)


def test_findings_at_two_lines_stay_two():
    """The negative twin."""

    def body(self, w, x):
        q, k, v = _qkv(w, x)
        h = nn.softmax(q @ k.T) @ v  # one line
        h = nn.softmax(h @ h.T) @ h  # another line
        return _readout(h)

    assert [finding.count for finding in audit(body)] == [1, 1]


# ---- a scale that stands in an initialiser -----------------------------------------------------------


def _attention(query_std: Callable, key_std: Callable, divide: bool) -> Callable:
    def body(self, w, x):
        x = nn.relu(nn.Dense(w, name="first")(x))
        q, k, v = (
            nn.Dense(w, use_bias=False, kernel_init=nn.initializers.normal(std(w)), name=name)(x)
            for name, std in (("q", query_std), ("k", key_std), ("v", lambda w: w**-0.5))
        )
        logits = q @ k.T
        return _readout(nn.softmax(logits / w if divide else logits) @ v)

    return body


def test_a_scale_in_the_initialiser_of_a_query_is_reported():
    def folded(w):
        return 1.0 / w

    def plain(w):
        return w**-0.5

    for stds, paths in (((folded, plain), ["q"]), ((plain, folded), ["k"]), ((plain, plain), [])):
        found = [f for f in audit(_attention(*stds, divide=False)) if f.kind == "scale in an initialiser"]
        assert [f.message.split("'")[0] for f in found] == [f"{path}/kernel" for path in paths]
        assert all("shrink 1.732 times more" in f.message for f in found)
    # Where the logits have their scale in the program, nothing is missing.
    assert audit(_attention(folded, plain, divide=True)) == ()
