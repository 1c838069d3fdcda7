"""Equations that hold programs: what JAX calls their parameters, and how the programs are wired to them."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl, xla_metadata
from jax.extend import core as jex

import mujax
from mujax.core.program import (
    CONTROL,
    ClosedJaxpr,
    EqnPath,
    Insertion,
    JaxprEqn,
    as_closed,
    blocked,
    checkpoint_label,
    enclosing_primitives,
    equation_at,
    equations,
    evaluate,
    loses_derivative,
    primitive_name,
    program_at,
    subprograms,
)
from mujax.models import Transformer, TransformerConfig

X = jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)
K = jnp.linspace(0.3, -0.7, 9).reshape(3, 3)
KERNELS = jnp.stack([K, -K, 2 * K, K.T])
VERSION = tuple(map(int, jax.__version__.split(".")[:3]))
P = jax.sharding.PartitionSpec


@jax.custom_jvp
def _own_jvp(x):
    return jnp.sin(x @ K)


_own_jvp.defjvps(lambda t, out, x: t @ K * jnp.cos(x @ K))


@jax.custom_vjp
def _own_vjp(x):
    return jnp.sin(x @ K)


_own_vjp.defvjp(lambda x: (_own_vjp(x), x), lambda x, g: ((g * jnp.cos(x @ K)) @ K.T,))


@jax.custom_batching.custom_vmap
def _own_vmap(x):
    return jnp.sin(x @ K)


_own_vmap.def_vmap(lambda size, batched, x: (jnp.sin(x @ K), batched[0]))


def _scan(x):
    """A constant, a carry of two, two slices, two outputs, backwards."""

    def body(carry, slices):
        h, count = carry
        kernel, shift = slices
        h = jnp.tanh(h @ kernel + x)
        return (h, count + 1), (h.sum(), h + shift)

    return lax.scan(body, (2 * x, 0), (KERNELS, jnp.arange(4.0)), reverse=True)


def _while(x):
    """Constants of the condition and of the body."""
    limit = x.sum() + 40
    return lax.while_loop(
        lambda state: state[1].sum() < limit, lambda state: (state[0] + 1, state[1] + abs(x @ K) + 1), (0, x)
    )


def _shard_map(x):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(
        lambda x: jnp.tanh(x @ K), mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=False
    )(x)


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "scan": _scan,
    "while": _while,
    "cond": lambda x: lax.switch(
        (x.sum() > -1).astype(int), [lambda x, y: x @ y, lambda x, y: x @ y.T, lambda x, y: x], x, K
    ),
    "jit": jax.jit(lambda x: jnp.tanh(x @ K)),
    "remat2": jax.checkpoint(lambda x: jnp.tanh(x @ K)),
    "shard_map": _shard_map,
    "composite": lambda x: lax.composite(lambda x: x @ K, "tests.product")(x),
    "custom_jvp_call": lambda x: _own_jvp(x),
    "custom_vjp_call": lambda x: _own_vjp(x),
    "custom_vmap_call": lambda x: _own_vmap(x),
}
if hasattr(xla_metadata, "xla_metadata_call"):
    FUNCTIONS["xla_metadata_call"] = lambda x: xla_metadata.xla_metadata_call(jnp.tanh, a="b")(x @ K)

READ = {
    "scan": {"jaxpr", "length", "reverse", "unroll"}
    | ({"ft_in"} if VERSION >= (0, 11, 0) else {"num_consts", "num_carry"}),
    "while": {"cond_jaxpr", "body_jaxpr", "cond_nconsts", "body_nconsts"},
    "cond": {"branches"},
    "jit": {"jaxpr", "name", "inline", "in_shardings", "out_shardings"},
    "remat2": {"jaxpr", "policy", "prevent_cse"},
    "shard_map": {"jaxpr", "mesh", "in_specs", "out_specs", "newly_manual_axes", "check_vma"},
    "composite": {"call_jaxpr" if VERSION >= (0, 11, 2) else "jaxpr"},
    "custom_jvp_call": {"call_jaxpr"},
    "custom_vjp_call": {"call_jaxpr"},
    "custom_vmap_call": {"call"},
    "xla_metadata_call": {"jaxpr"},
}
"""The parameters that the library reads, of each primitive that holds programs, as this JAX calls them."""


def _only(name: str) -> tuple[ClosedJaxpr, EqnPath, JaxprEqn]:
    """The traced function, and its one equation of that primitive."""
    program = jax.make_jaxpr(FUNCTIONS[name])(X)
    ((site, eqn),) = [(site, eqn) for site, eqn in equations(program) if eqn.primitive.name == name]
    return program, site, eqn


# ---- the names of parameters -----------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_canary(name):
    """A release of JAX that renames what is read fails here, and not in a user's hands."""
    _, _, eqn = _only(name)
    for parameter in sorted(READ[name] - eqn.params.keys()):
        pytest.fail(
            f"the primitive {name!r} of JAX {jax.__version__} has no parameter {parameter!r} any more"
        )
    assert subprograms(eqn)


def test_every_known_primitive_has_its_canary():
    """Those that no public function of this JAX emits, or only with a setting that is off, are left.

    Kernels are run in `tests/unit/core/test_custom_calls.py`.
    """
    unused = {"call", "core_call", "closed_call", "eval_jaxpr", "call_hi_primitive", "xla_metadata_call"}
    kernels = {"pallas_call", "dot_product_attention_fwd_wrapper"}
    assert CONTROL - FUNCTIONS.keys() <= unused | kernels


def test_a_kernel_that_is_represented_otherwise_cannot_be_looked_into():
    def kernel(x_ref, out_ref):
        out_ref[...] = jnp.tanh(x_ref[...])

    program = jax.make_jaxpr(pl.pallas_call(kernel, out_shape=X, interpret=True))(X)
    (eqn,) = (eqn for _, eqn in equations(program) if eqn.primitive.name == "pallas_call")
    (inner,) = subprograms(eqn)
    assert (inner.kind, inner.operands, inner.results) == ("kernel", (0,), (0,))
    for name in ("jaxpr", "grid_mapping"):
        params = {f"new_{key}" if key == name else key: value for key, value in eqn.params.items()}
        assert subprograms(eqn.replace(params=params)) == ()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_unknown_parameter_is_one_sentence(name):
    _, _, eqn = _only(name)
    for parameter in READ[name]:
        params = {f"new_{key}" if key == parameter else key: value for key, value in eqn.params.items()}
        with pytest.raises(mujax.MujaxError) as caught:
            subprograms(eqn.replace(params=params))
        text = str(caught.value)
        assert f"expected the primitive {name!r} of JAX {jax.__version__} to have the parameter" in text
        assert repr(parameter) in text
        assert f"'new_{parameter}'" in text
        assert "report it to mujax with this sentence" in text


def test_mup_init_says_that_a_primitive_has_changed(monkeypatch):
    """The same sentence reaches the user of `mup_init`, with the line of the user's code."""
    make_jaxpr = jax.make_jaxpr

    def changed(program: Any) -> Any:
        jaxpr = program.jaxpr
        eqns = [
            eqn.replace(params={"tree": None} | {k: v for k, v in eqn.params.items() if k == "jaxpr"})
            if eqn.primitive.name == "scan"
            else eqn
            for eqn in jaxpr.eqns
        ]
        return jex.ClosedJaxpr(jaxpr.replace(eqns=eqns), program.consts)

    def patched(function: Any, **options: Any) -> Any:
        def make(*args: Any) -> Any:
            out = make_jaxpr(function, **options)(*args)
            return (changed(out[0]), *out[1:]) if isinstance(out, tuple) else changed(out)

        return make

    def model(width: int) -> mujax.Functional:
        def init(key, x):
            return {"w": jax.random.normal(key, (4, width, width)), "out": jnp.ones((width, 3))}

        def apply(params, x):
            x = jnp.ones((2, width)) * x.sum()
            return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0] @ params["out"]

        return mujax.Functional(init, apply)

    monkeypatch.setattr(jax, "make_jaxpr", patched)
    with pytest.raises(mujax.MujaxError, match=r"test_sites\.py:\d+: expected the primitive 'scan'"):
        mujax.mup_init(model(16), model(8), X)


def test_an_ordinary_primitive_that_is_not_known_stays_a_finding():
    def net(width: int) -> mujax.Functional:
        def apply(params, x):
            h = x @ params["first"]
            return jax.pure_callback(np.tanh, h, h) @ params["out"]

        return mujax.Functional(
            lambda key, x: {"first": jnp.ones((3, width)), "out": jnp.ones((width, 3))}, apply
        )

    with pytest.warns(mujax.MujaxWarning, match="pure_callback can't be looked into"):
        mujax.mup_init(net(16), net(8), X)


# ---- the wiring ------------------------------------------------------------------------------------


def _run(program: ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    """Runs a program equation by equation; those that hold programs by `subprograms`."""
    jaxpr = program.jaxpr
    env = dict(zip(jaxpr.constvars, program.consts, strict=True)) | dict(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        ins = [read(atom) for atom in eqn.invars]
        inner = subprograms(eqn)
        match [one.kind for one in inner]:
            case []:
                outs = eqn.primitive.bind(*ins, **eqn.params)
                outs = outs if eqn.primitive.multiple_results else [outs]
            case ["call"]:
                results = _run(inner[0].program, [ins[at] for at in inner[0].operands])
                outs = [results[number] for number in inner[0].results]
            case ["branch", *_]:
                chosen = inner[int(ins[0])]
                outs = _run(chosen.program, [ins[at] for at in chosen.operands])
            case _:
                outs = _loop(eqn, inner, ins)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _loop(eqn: JaxprEqn, inner: Sequence[Any], ins: list[Any]) -> list[Any]:
    *conditions, body = inner
    state = list(ins)
    stacks: dict[int, list[Any]] = {number: [] for number in body.stacked}
    step = 0
    while (
        step < body.length
        if body.length is not None
        else _run(conditions[0].program, [state[at] for at in conditions[0].operands])[0]
    ):
        at = body.length - 1 - step if eqn.params.get("reverse") else step
        given = [state[op][at] if n in body.sliced else state[op] for n, op in enumerate(body.operands)]
        outs = _run(body.program, given)
        for number, output in body.carried:
            state[body.operands[number]] = outs[output]
        for number in stacks:
            stacks[number].append(outs[number])
        step += 1
    final = dict.fromkeys(body.results)
    for number, output in body.carried:
        final[body.results[output]] = state[body.operands[number]]
    for number, entries in stacks.items():
        final[body.results[number]] = jnp.stack(entries[::-1] if eqn.params.get("reverse") else entries)
    return list(final.values())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_wiring_is_what_the_equation_does(name):
    program = jax.make_jaxpr(FUNCTIONS[name])(X)
    ours, expected = _run(program, [X]), jax.tree.leaves(FUNCTIONS[name](X))
    assert len(ours) == len(expected)
    for one, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_places(name):
    program, site, eqn = _only(name)
    assert equation_at(program, site) is eqn
    for one in subprograms(eqn):
        for inside, inner in equations(one.program, (*site, one.step)):
            assert equation_at(program, inside) is inner
            assert enclosing_primitives(program, inside)[len(site) // 2] == name
        assert program_at(program, (*site, one.step, 0)).jaxpr is one.program.jaxpr


def test_a_program_with_its_constants_is_itself():
    program = jax.make_jaxpr(lambda x: x + np.arange(3.0))(X)
    assert as_closed(program) is program
    assert len(as_closed(program).consts) == 1


# ---- primitives of JAX's newer kind ----------------------------------------------------------------

SETTINGS = ("jax_remat3", "jax_custom_vjp3", "jax_custom_jvp3")


@contextlib.contextmanager
def _newer() -> Iterator[None]:
    """With each setting of this JAX that makes one of its functions a `call_hi_primitive`."""
    known = [name for name in SETTINGS if hasattr(jax.config, name)]
    if not known:
        pytest.skip(f"JAX {jax.__version__} has none of {SETTINGS}")
    before = {name: getattr(jax.config, name) for name in known}
    try:
        for name in known:
            jax.config.update(name, True)
        jax.clear_caches()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        jax.clear_caches()


def test_newer_primitives_run_as_before():
    with _newer():
        for name in ("remat2", "custom_jvp_call", "custom_vjp_call", "jit"):
            program = jax.make_jaxpr(FUNCTIONS[name])(X)
            np.testing.assert_allclose(_run(program, [X])[0], FUNCTIONS[name](X), rtol=1e-5, atol=1e-6)


def test_a_factor_inside_of_a_newer_checkpoint():
    def function(after: Callable[[Any], Any], x: Any) -> Any:
        return jax.checkpoint(
            lambda x: checkpoint_name(jnp.tanh(after(x @ K)), "h") @ K,
            policy=jax.checkpoint_policies.save_only_these_names("h"),
        )(x)

    with _newer():
        program = jax.make_jaxpr(lambda x: function(lambda x: x, x))(X)
        labels = {checkpoint_label(eqn) for _, eqn in equations(program)}
        assert "h" in labels
        site = next(site for site, eqn in equations(program) if eqn.primitive.name == "dot_general")
        ours = jax.grad(lambda x: (evaluate(program, [x], {site: Insertion((2.5,))})[0] ** 2).sum())(X)
        by_hand = jax.grad(lambda x: (function(lambda x: 2.5 * x, x) ** 2).sum())(X)
    np.testing.assert_allclose(ours, by_hand, rtol=1e-5)


def test_a_newer_function_with_its_own_derivative():
    with _newer():
        program = jax.make_jaxpr(FUNCTIONS["custom_vjp_call"])(X)
        ((site, _),) = [(s, e) for s, e in equations(program) if e.primitive.name == "dot_general"]
        if enclosing_primitives(program, site) != ["custom_vjp_call"]:
            assert blocked(program, site) == enclosing_primitives(program, site)[0] == "CustomVJPTraced"
        assert blocked(program, site) is not None
        program = jax.make_jaxpr(FUNCTIONS["custom_jvp_call"])(X)
        ((site, _),) = [(s, e) for s, e in equations(program) if e.primitive.name == "dot_general"]
        assert blocked(program, site) is None
        assert loses_derivative(program, site)


def test_a_transformer_of_newer_primitives_is_read_alike():
    def build(width: int) -> Any:
        config = TransformerConfig(
            d_model=width, n_layers=2, n_heads=2, vocab_size=11, max_len=5, scan_layers=True, remat=True
        )
        return Transformer(config)

    def factors(mup: mujax.MupModel) -> list[tuple[str, float]]:
        return [(correction.kind, correction.factor) for correction in mup.corrections]

    tokens = jax.ShapeDtypeStruct((2, 5), jnp.int32)
    before = mujax.mup_init(build(32), build(16), tokens)
    with _newer():
        after = mujax.mup_init(build(32), build(16), tokens)
        assert after.spec == before.spec
        assert factors(after) == factors(before)
        assert after.findings == before.findings == ()


def test_the_name_of_a_newer_primitive_is_the_functions():
    with _newer():
        eqn = jax.make_jaxpr(jax.checkpoint(jnp.sin))(X).eqns[0]
        assert eqn.primitive.name == "call_hi_primitive"
        assert primitive_name(eqn) == "RematTraced"
    assert primitive_name(jax.make_jaxpr(jax.checkpoint(jnp.sin))(X).eqns[0]) == "remat2"
