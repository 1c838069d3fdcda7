"""Where a factor on a product inside of a function goes at the function's boundary, and where it can't."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mujax.core.program import Insertion, boundary, closed_around, equations, evaluate

A, B, C = (np.random.default_rng(seed).normal(size=(4, 4)).astype(np.float32) for seed in range(3))
S = np.float32(0.5)


def soft(x):
    return jax.nn.softmax(x, axis=-1)


def in_blocks(q, k, v):
    def block(carry, kv):
        top, total, mixed = carry
        logits = q @ kv[0].T
        now = jnp.maximum(top, logits.max(-1, keepdims=True))
        weights, shrink = jnp.exp(logits - now), jnp.exp(top - now)
        return (
            now,
            total * shrink + weights.sum(-1, keepdims=True),
            mixed * shrink + weights @ kv[1],
        ), None

    start = (jnp.full((4, 1), -jnp.inf), jnp.zeros((4, 1)), jnp.zeros((4, 4)))
    blocks = (k.reshape(2, 2, 4), v.reshape(2, 2, 4))
    (_, total, mixed), _ = lax.scan(block, start, blocks)
    return mixed / total


def accumulated(x, w, _):
    return lax.scan(lambda sum_, xw: (sum_ + jnp.outer(*xw), None), jnp.zeros((4, 4)), (x.T, w))[0]


def repeated(x, w, v):
    """The product is the carry of a loop, and is multiplied in each iteration."""
    return lax.fori_loop(0, 3, lambda _, h: h @ w, x)


def either(x, w, v):
    return lax.cond(x.sum() > 0, lambda: x @ w, lambda: jnp.zeros_like(x))


def either_biased(x, w, v):
    return lax.cond(x.sum() > 0, lambda: x @ w, lambda: v)


def until(x, w, v):
    return lax.while_loop(lambda h: h.sum() < -1e9, lambda h: h + v, x @ w)


# Of the first product (all of them for `in_blocks`): powers on operands, powers on outputs.
MOVED = {
    "product": (lambda x, w, v: x @ w, {}, {0: 1}),
    "layout": (lambda x, w, v: jnp.concatenate([(x @ w).T.reshape(2, 8)[:, 1:]] * 2), {}, {0: 1}),
    "sum of two": (lambda x, w, v: ((x @ w)[0] - (x @ w)[1], v), None, None),
    "next to another output": (lambda x, w, v: (jnp.tanh(v), x @ w), {}, {1: 1}),
    "two outputs": (lambda x, w, v: (h := x @ w, h * v), {}, {0: 1, 1: 1}),
    "squared": (lambda x, w, v: (x @ w) ** 2, {}, {0: 2}),
    "masked with zero": (lambda x, w, v: jnp.where(v > 0, x @ w, 0), {}, {0: 1}),
    "masked with a number": (lambda x, w, v: jnp.where(v > 0, x @ w, 1.0), {0: 1}, {}),
    "bias": (lambda x, w, v: x @ w + v, {0: 1}, {}),
    "nonlinear in the first": (lambda x, w, v: jnp.tanh(x) @ w + v, {1: 1}, {}),
    "nonlinear in both": (lambda x, w, v: jnp.tanh(x) @ jnp.tanh(w) + v, None, None),
    "divided by": (lambda x, w, v: v / (x @ w), None, None),
    "attention": (lambda q, k, v: soft(q @ k.T) @ v, {0: 1}, {}),
    "value is the query": (lambda q, k: soft(q @ k.T) @ q, {1: 1}, {}),
    "query is nonlinear elsewhere": (lambda q, k, v: soft(q @ k.T) @ v + jnp.tanh(q), {1: 1}, {}),
    "query is the key": (lambda q, k, v: soft(q @ q.T) @ v + k, {0: 0.5}, {}),
    "all nonlinear elsewhere": (lambda q, k, v: soft(q @ k.T) @ jnp.tanh(q * k) + v, None, None),
    "normed query": (lambda q, k, v: soft(q / jnp.linalg.norm(q) @ k.T) @ v, {1: 1}, {}),
    "scan over blocks": (in_blocks, {0: 1}, {}),
    "sum in a loop": (accumulated, {}, {0: 1}),
    "carry of a loop": (repeated, None, None),
    "branch": (either, {}, {0: 1}),
    "branch with a bias": (either_biased, {1: 1}, {}),
    "condition of a loop": (until, {0: 1}, {}),
    "to eight bits": (lambda x, w: (x @ w).astype(jnp.float8_e4m3fn).astype(x.dtype), {0: 1}, {}),
    "to whole numbers": (lambda x, w: (x @ w).astype(jnp.int32), {0: 1}, {}),
    "from eight bits": (
        lambda x, w: jnp.tanh(x.astype(jnp.float8_e4m3fn).astype(x.dtype) @ w),
        {1: 1},
        {},
    ),
    "in other functions": (
        lambda x, w, v: jax.jit(jax.checkpoint(lambda x: jax.jit(lambda x: x @ w)(x).sum(0)))(x),
        {},
        {0: 1},
    ),
}


def closed(function):
    """The function with a rule for derivatives of its own."""
    own = jax.custom_vjp(function)
    own.defvjp(lambda *args: (function(*args), args), lambda args, g: args)
    return own


def products(program, name):
    sites = [
        site
        for site, eqn in equations(program)
        if eqn.primitive.name in ("dot_general",) or (name == "sum in a loop" and eqn.primitive.name == "mul")
    ]
    return sites[:1]


@pytest.mark.parametrize("name", MOVED)
def test_a_factor_moves_to_where_it_is_the_same(name):
    function, operands, outputs = MOVED[name]
    args = [*map(jnp.asarray, (A, B, C))][: len(inspect.signature(function).parameters)]
    program = jax.make_jaxpr(closed(function))(*args)
    sites = products(program, name)
    around = closed_around(program, sites[0])
    assert around is not None
    found = boundary(program, around, [(site, None) for site in sites])
    if operands is None:
        assert found is None
        return
    assert found is not None
    assert (dict(found.operands), dict(found.outputs)) == (operands, outputs)
    # Outside of a function with its own rule the factor can be put where it belongs.
    plain = jax.make_jaxpr(function)(*args)
    factor = 0.7
    expected = evaluate(plain, args, {site: Insertion((factor,)) for site in products(plain, name)})
    insertion = Insertion(
        operands=tuple((number, factor**power) for number, power in found.operands),
        outputs=tuple((number, factor**power) for number, power in found.outputs),
    )
    for ours, theirs in zip(evaluate(program, args, {around: insertion}), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)


def test_a_scale_that_is_passed_in_comes_first():
    program = jax.make_jaxpr(closed(lambda q, k, v, s: soft(q @ k.T * s) @ v))(A, B, C, S)
    (site,) = products(program, "")
    found = boundary(program, site[:1], [(site, None)])
    assert found is not None
    assert found.operands == ((3, 1),)


def test_the_operand_of_an_equation_is_a_place_too():
    """What is added to a residual stream."""
    program = jax.make_jaxpr(closed(lambda x, w, v: jnp.tanh(x + v)))(A, B, C)
    (site,) = (site for site, eqn in equations(program) if eqn.primitive.name == "add")
    program_without = jax.make_jaxpr(closed(lambda x, v: jnp.tanh(x + v)))(A, C)
    found = boundary(program_without, site[:1], [(site, 1)])
    assert found is not None
    assert (found.operands, found.outputs) == (((1, 1),), ())
    # A gradient may be returned to what the function does not read.
    assert boundary(program, site[:1], [(site, 1)]) is None


def test_one_operand_that_is_passed_twice_is_multiplied_once():
    own = closed(lambda q, k, v: soft(q @ k.T) @ v)
    program = jax.make_jaxpr(lambda x: own(x, x, x))(A)
    (out,) = evaluate(program, [jnp.asarray(A)], {(0,): Insertion(operands=((0, 0.5),))})
    np.testing.assert_allclose(out, soft(0.5 * A @ A.T) @ A, rtol=1e-5)


def test_the_outermost_function_with_its_own_rule_is_the_boundary():
    inner = closed(lambda q, k, v: soft(q @ k.T) @ v)
    outer = closed(lambda q, k, v: inner(q, jnp.tanh(k), v))
    program = jax.make_jaxpr(lambda *args: jax.jit(outer)(*args))(A, B, C)
    (site,) = products(program, "")
    around = closed_around(program, site)
    assert around == (0, "call", 0)
    found = boundary(program, around, [(site, None)])
    assert found is not None
    assert found.operands == ((0, 1),)
    assert closed_around(jax.make_jaxpr(lambda x: x @ x)(A), (0,)) is None
