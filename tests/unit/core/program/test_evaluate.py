"""The evaluator: a factor put into a traced program does what a factor written in the code does.

Each case is a function written with a place `after` for what follows its product. Traced with the
identity there and hooked at the product, it must equal the function with the factor written in it.
"""

import collections
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import mujax
from mujax.core.program import (
    ClosedJaxpr,
    EqnPath,
    Insertion,
    blocked,
    equation_at,
    equations,
    evaluate,
)

FACTOR = 2.5
X = jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)
K = jnp.linspace(0.3, -0.7, 9).reshape(3, 3)

After = Callable[[Any], Any]


def identity(out):
    return out


def times(out):
    return out * jnp.asarray(FACTOR, out.dtype)


TIMES = Insertion((FACTOR,))


def sites(program: ClosedJaxpr, primitive: str = "dot_general") -> list[EqnPath]:
    """Where a program has a primitive, at any depth, as the evaluator addresses it."""
    return [site for site, eqn in equations(program) if eqn.primitive.name == primitive]


def hooked(function: Callable, *args: Any, primitive: str = "dot_general") -> Callable:
    """The function evaluated from its trace, with the factor after each of its products."""
    program, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    insertions = dict.fromkeys(sites(program, primitive), TIMES)
    assert insertions

    def run(*args):
        flat = evaluate(program, jax.tree.leaves(args), insertions)
        return jax.tree.unflatten(jax.tree.structure(shape), flat)

    return run


# ---- one function per way of holding a product -----------------------------------------------------


def _plain(after: After, x, k):
    return jnp.tanh(after(x @ k))


def _twice(after: After, x, k):
    return after(jnp.sin(after(x @ k)) @ k.T) + x


def _jit(after: After, x, k):
    return jax.jit(lambda x: after(x @ k) + 1)(x)


def _remat(after: After, x, k):
    return jax.checkpoint(lambda x, k: jnp.tanh(after(x @ k)))(x, k)


def _scan(after: After, x, k):
    return lax.scan(lambda h, b: (jnp.tanh(after(h @ k)) + b, h.sum()), x, jnp.arange(3.0))


def _scan_kernels(after: After, x, k):
    ks = jnp.stack([k, k.T, 2 * k])
    return lax.scan(lambda h, one: (jnp.tanh(after(h @ one)), h), x, ks, reverse=True, unroll=2)


def _scan_length(after: After, x, k):
    return lax.scan(lambda h, _: (jnp.tanh(after(h @ k)), None), x, length=4)[0]


def _fori(after: After, x, k):
    return lax.fori_loop(0, 3, lambda i, h: jnp.sin(after(h @ k)) + i, x)


def _while(after: After, x, k):
    def body(state):
        count, h = state
        return count + 1, jnp.tanh(after(h @ k))

    return lax.while_loop(lambda state: state[0] < 3, body, (0, x))


def _while_condition(after: After, x, k):
    return lax.while_loop(lambda h: after(h @ jnp.abs(k)).sum() < 40.0, lambda h: h + 1, x)


def _cond(after: After, x, k):
    return lax.cond(x.sum() > -1, lambda h: after(h @ k), lambda h: h, x)


def _switch(after: After, x, k):
    branches = [lambda h: h, lambda h: after(h @ k), lambda h: jnp.cos(after(h @ k))]
    return sum(lax.switch(i, branches, x) for i in jnp.arange(3))


def _vmap(after: After, x, k):
    return jax.vmap(lambda row: after(row @ k))(x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _custom(after, x, k):
    return jnp.sin(after(x @ k))


@_custom.defjvp
def _custom_rule(after, primals, tangents):
    return jax.jvp(lambda x, k: jnp.sin(after(x @ k)), primals, tangents)


def _custom_jvp(after: After, x, k):
    return _custom(after, x, k)


def _nested(after: After, x, k):
    @jax.checkpoint
    def block(h, one):
        inner = jax.jit(
            lambda h: lax.cond(h.sum() > 0, lambda h: after(h @ one), lambda h: -after(h @ one), h)
        )
        return jnp.tanh(inner(h))

    def outer(h, ks):
        return lax.scan(lambda h, one: (block(h, one), h.mean()), h, ks)

    return lax.scan(outer, x, jnp.stack([jnp.stack([k, k.T]), jnp.stack([2 * k, k])]))


def _gradient(after: After, x, k):
    """A product in the derivative too: the program to be hooked holds a transpose of itself."""
    return jax.grad(lambda x: (after(x @ k) ** 2).sum())(x)


CASES = {
    function.__name__.strip("_"): function
    for function in (
        _plain, _twice, _jit, _remat, _scan, _scan_kernels, _scan_length, _fori, _while, _while_condition,
        _cond, _switch, _vmap, _custom_jvp, _nested,
    )
}  # fmt: skip


def _same(one, other) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-6, atol=2e-6)


def _differ(one, other) -> bool:
    return any(
        not np.allclose(a, b, rtol=1e-3)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


@pytest.mark.parametrize("name", CASES)
def test_a_hook_is_a_factor_in_the_code(name):
    case = CASES[name]
    plain = functools.partial(case, identity)
    by_hand = jax.jit(functools.partial(case, times))(X, K)
    ours = jax.jit(hooked(plain, X, K))(X, K)
    _same(ours, by_hand)
    # The twin: without the hook it is another function.
    assert _differ(ours, jax.jit(plain)(X, K))


def _total(tree) -> Any:
    return sum(leaf.sum() for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating))


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("while", "while_condition", "fori")])
def test_and_so_are_its_derivatives(name):
    case = CASES[name]
    plain = functools.partial(case, identity)

    def gradient(function):
        return jax.jit(jax.grad(lambda x, k: _total(function(x, k)), argnums=(0, 1)))(X, K)

    ours, by_hand = gradient(hooked(plain, X, K)), gradient(functools.partial(case, times))
    _same(ours, by_hand)
    assert _differ(ours, gradient(plain))


@pytest.mark.parametrize("name", ["scan", "while", "cond", "nested"])
def test_a_hooked_program_can_be_vmapped(name):
    case = CASES[name]
    xs = jnp.stack([X, -X, 2 * X])
    ours = jax.jit(jax.vmap(hooked(functools.partial(case, identity), X, K), in_axes=(0, None)))(xs, K)
    _same(ours, jax.jit(jax.vmap(functools.partial(case, times), in_axes=(0, None)))(xs, K))


def test_a_hooked_program_runs_forward_mode_and_under_remat():
    ours, by_hand = hooked(functools.partial(_nested, identity), X, K), functools.partial(_nested, times)
    _same(
        jax.jit(lambda x: jax.jvp(lambda x: ours(x, K), (x,), (x,)))(X),
        jax.jit(lambda x: jax.jvp(lambda x: by_hand(x, K), (x,), (x,)))(X),
    )
    wrapped = jax.checkpoint(lambda x: _total(ours(x, K)))
    _same(jax.jit(jax.grad(wrapped))(X), jax.jit(jax.grad(lambda x: _total(by_hand(x, K))))(X))


def test_it_runs_outside_of_jit():
    _same(hooked(functools.partial(_twice, identity), X, K)(X, K), _twice(times, X, K))


def test_only_the_equations_that_are_named_are_changed():
    def function(a, b, x, k):
        return b(jnp.sin(a(x @ k)) @ k)

    program = jax.make_jaxpr(functools.partial(function, identity, identity))(X, K)
    first, second = sites(program)
    (only_first,) = evaluate(program, [X, K], {first: TIMES})
    (only_second,) = evaluate(program, [X, K], {second: TIMES})
    _same(only_first, function(times, identity, X, K))
    _same(only_second, function(identity, times, X, K))
    assert _differ(only_first, only_second)


def test_no_hooks_is_the_program_itself():
    program = jax.make_jaxpr(functools.partial(_nested, identity))(X, K)
    ours = jax.tree.leaves(jax.jit(lambda x, k: evaluate(program, [x, k], {}))(X, K))
    _same(ours, jax.tree.leaves(jax.jit(functools.partial(_nested, identity))(X, K)))


def test_hooks_may_hold_traced_values():
    """A multiplier that is swept: one compilation, a factor per entry of the batch."""
    program = jax.make_jaxpr(functools.partial(_scan, identity))(X, K)
    (site,) = sites(program)

    @jax.jit
    @jax.vmap
    def sweep(factor):
        return evaluate(program, [X, K], {site: Insertion((factor,))})[0]

    outs = sweep(jnp.array([1.0, FACTOR]))
    _same(outs[0], _scan(identity, X, K)[0])
    _same(outs[1], _scan(times, X, K)[0])


def test_outputs_that_are_inputs_literals_or_unused():
    def function(after, x, k):
        unused = after(x @ k)
        inner = jax.jit(lambda x: (after(x @ k), 3.0, x)[1:])
        del unused
        return x, 2, inner(x), after(x @ k)

    ours = hooked(functools.partial(function, identity), X, K)(X, K)
    _same(ours, jax.tree.map(jnp.asarray, function(times, X, K)))


def test_a_hook_may_change_what_other_primitives_give():
    def function(after, x, k):
        return after(jnp.tanh(x @ k)).sum()

    ours = hooked(functools.partial(function, identity), X, K, primitive="tanh")
    _same(ours(X, K), function(times, X, K))


def test_low_precision_stays_low():
    x, k = X.astype(jnp.bfloat16), K.astype(jnp.bfloat16)
    ours = hooked(functools.partial(_scan_kernels, identity), x, k)
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(ours, x, k))} == {jnp.dtype(jnp.bfloat16)}


# ---- what must not be lost -------------------------------------------------------------------------


def test_effects_happen_once_and_in_order(capfd):
    def function(x, k):
        jax.debug.print("one", ordered=True)
        y = x @ k
        jax.debug.print("two", ordered=True)

        def body(h, i):
            jax.debug.print("step {}", i, ordered=True)
            h = jnp.tanh(h @ k)
            jax.debug.print("after {}", i, ordered=True)
            return h, None

        y = lax.scan(body, y, jnp.arange(2))[0]
        y = jax.jit(lambda y: (y @ k, jax.debug.print("three", ordered=True))[0])(y)
        jax.debug.print("four", ordered=True)
        return y

    ours = hooked(function, X, K)
    capfd.readouterr()
    jax.block_until_ready(jax.jit(ours)(X, K))
    jax.effects_barrier()
    printed = capfd.readouterr().out.split("\n")[:-1]
    assert printed == ["one", "two", "step 0", "after 0", "step 1", "after 1", "three", "four"]


def test_unordered_effects_happen_once():
    seen = []

    def function(x, k):
        jax.debug.callback(lambda y: seen.append(float(y)), (x @ k).sum())
        return lax.scan(
            lambda h, i: (h @ k, jax.debug.callback(lambda i: seen.append(int(i)), i)), x, jnp.arange(3)
        )[0]

    jax.block_until_ready(jax.jit(hooked(function, X, K))(X, K))
    jax.effects_barrier()
    assert sorted(n for n in seen if isinstance(n, int)) == [0, 1, 2]
    # What is printed is the corrected value.
    assert [n for n in seen if isinstance(n, float)] == [pytest.approx(float(times(X @ K).sum()), rel=1e-5)]


def test_the_policy_of_a_remat_is_kept():
    policy = jax.checkpoint_policies.dots_saveable

    def function(x, k):
        return jax.checkpoint(lambda x: jnp.sin(x @ k), policy=policy, prevent_cse=False)(x)

    ours = jax.make_jaxpr(hooked(function, X, K))(X, K)
    (eqn,) = [eqn for eqn in ours.jaxpr.eqns if eqn.primitive.name == "remat2"]
    assert (eqn.params["policy"], eqn.params["prevent_cse"]) == (policy, False)


def test_the_options_of_a_scan_are_kept():
    program = jax.make_jaxpr(hooked(functools.partial(_scan_kernels, identity), X, K))(X, K)
    (eqn,) = [eqn for eqn in program.jaxpr.eqns if eqn.primitive.name == "scan"]
    assert (eqn.params["reverse"], eqn.params["unroll"], eqn.params["length"]) == (True, 2, 3)


def test_the_name_of_a_jit_is_kept():
    @jax.jit
    def my_layer(x):
        return x @ K

    program = jax.make_jaxpr(hooked(lambda x: my_layer(x), X))(X)
    assert [eqn.params["name"] for eqn in program.jaxpr.eqns if eqn.primitive.name == "jit"] == ["my_layer"]


def test_shardings_are_kept():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

    def function(x, k):
        y = lax.with_sharding_constraint(x @ k, sharding)
        return jax.jit(lambda y: y @ k, in_shardings=sharding, out_shardings=sharding)(y)

    plain, ours = (
        {eqn.primitive.name: eqn.params for eqn in jax.make_jaxpr(f)(X, K).jaxpr.eqns}
        for f in (function, hooked(function, X, K))
    )
    assert plain["sharding_constraint"]["sharding"] == ours["sharding_constraint"]["sharding"] == sharding
    for name in ("in_shardings", "out_shardings"):
        assert plain["jit"][name] == ours["jit"][name]
        assert sharding in ours["jit"][name]
    _same(jax.jit(hooked(function, X, K))(X, K), times(times(X @ K) @ K))


def test_precision_and_accumulation_are_kept():
    def function(x, k):
        return lax.scan(
            lambda h, _: (lax.dot(h, k, precision="highest", preferred_element_type=jnp.float32), None),
            x,
            length=2,
        )[0]

    def settings(program) -> list:
        found = [(program, site) for site in sites(program)]
        out = []
        for program, site in found:
            eqn = equation_at(program, site)
            out.append((eqn.params["precision"], eqn.params["preferred_element_type"]))
        return out

    before, after = jax.make_jaxpr(function)(X, K), jax.make_jaxpr(hooked(function, X, K))(X, K)
    assert settings(before) == settings(after) != []


# ---- a hook that can't be put where it is wanted ---------------------------------------------------


@jax.custom_vjp
def _own_derivative(x, k):
    return x @ k


_own_derivative.defvjp(
    lambda x, k: (x @ k, (x, k)), lambda saved, g: (jnp.clip(g @ saved[1].T, -1, 1), saved[0].T @ g)
)


def test_a_hook_inside_of_a_custom_vjp_is_an_error():
    program = jax.make_jaxpr(lambda x, k: _own_derivative(x, k))(X, K)
    (site,) = sites(program)
    assert blocked(program, site) == "custom_vjp_call"
    with pytest.raises(mujax.MujaxError) as caught:
        evaluate(program, [X, K], {site: TIMES})
    text = str(caught.value)
    assert re.match(
        r"tests/unit/core/program/test_evaluate\.py:\d+: expected the correction to stand outside of "
        r"custom_vjp_call",
        text,
    )
    assert "move the product out of it" in text
    # On its result, a hook is fine.
    (out,) = evaluate(program, [X, K], {site[:1]: TIMES})
    _same(out, times(X @ K))


def test_a_derivative_of_the_users_own_beside_a_hook_is_kept():
    def function(x, k):
        return _own_derivative(x, k) + jnp.sin(x @ k)

    program = jax.make_jaxpr(function)(X, K)
    site = next(site for site in sites(program) if len(site) == 1)

    def ours(x):
        return 9 * evaluate(program, [x, K], {site: TIMES})[0].sum()

    def by_hand(x):
        return 9 * (_own_derivative(x, K) + jnp.sin(times(x @ K))).sum()

    def wrong(x):
        return 9 * (x @ K + jnp.sin(times(x @ K))).sum()

    _same(jax.grad(ours)(X), jax.grad(by_hand)(X))
    assert _differ(jax.grad(ours)(X), jax.grad(wrong)(X))


# ---- the compiled program --------------------------------------------------------------------------


class _Block(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, _):
        y = nn.gelu(nn.Dense(2 * self.width, name="up")(nn.LayerNorm(name="norm")(x)))
        return x + nn.Dense(self.width, name="down")(y), None


class _Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, self.width, name="embed")
        x = embed(tokens)
        x = nn.MultiHeadDotProductAttention(2, name="attention")(x)
        blocks = nn.scan(nn.remat(_Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = blocks(self.width, name="blocks")(x, None)
        return embed.attend(x), nn.Dense(3, name="out")(x)


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """The gradient's program with and without mujax: (lowered text, compiled text, cost)."""
    tokens = jax.ShapeDtypeStruct((2, 5), jnp.int32)
    model, base = _Net(16), _Net(8)
    mup = mujax.mup_init(model, base, tokens)
    assert {c.kind for c in mup.corrections} >= {"readout", "tied_readout", "attention"}
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    out = {}
    for name, apply in (("plain", model.apply), ("mujax", mup.apply)):
        lowered = jax.jit(jax.grad(lambda v, t, apply=apply: _total(apply(v, t)) ** 2)).lower(
            variables, tokens
        )
        program = lowered.compile()
        out[name] = (program.as_text(), program.cost_analysis())
    return out


def _count(text: str) -> collections.Counter:
    """Operations of a compiled program that compute products or loop, at any depth."""
    found = re.findall(r" (dot|convolution|while|custom-call|gather|scatter)\(", text)
    return collections.Counter(found)


def test_the_compiled_program_has_no_further_products(compiled):
    plain, ours = (_count(compiled[name][0]) for name in ("plain", "mujax"))
    assert ours == plain
    assert ours["dot"] > 20
    assert ours["while"] > 0
    assert compiled["mujax"][1]["flops"] <= 1.01 * compiled["plain"][1]["flops"]


def _names(text: str, primitive: str) -> set[str]:
    """What a profiler shows for the operations that come from a primitive."""
    return {name for name in re.findall(r'op_name="([^"]*)"', text) if name.endswith(f"/{primitive}")}


@pytest.mark.parametrize("primitive", ["dot_general", "exp", "tanh", "gather", "reduce_sum"])
def test_a_profiler_shows_the_users_module_paths(compiled, primitive):
    plain, ours = (_names(compiled[name][0], primitive) for name in ("plain", "mujax"))
    assert ours == plain
    if primitive == "dot_general":
        for module in ("attention/query", "attention/out", "blocks/up", "blocks/down", "out", "embed.attend"):
            assert any(f"/{module}/" in name for name in ours), module
