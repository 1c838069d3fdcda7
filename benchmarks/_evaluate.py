"""Evaluates jaxprs with NumPy: for one run of a small program, XLA takes longer to compile than NumPy to run it.

Random bits come from NumPy's generators, seeded by the keys, which are integers here. What is not in the table is
handed to JAX, operation by operation.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special as special

CALLS: Final = {
    "jit": "jaxpr", "pjit": "jaxpr", "checkpoint": "jaxpr", "remat": "jaxpr", "remat2": "jaxpr",
    "closed_call": "call_jaxpr", "core_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}  # fmt: skip


def _hash(*parts: Any) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def _keys(values: Sequence[int], shape: tuple[int, ...]) -> np.ndarray:
    return np.array(list(values), dtype=object).reshape(shape)


def key(seed: int) -> np.ndarray:
    """A key, as this module represents it."""
    return _keys([seed], ())


def _key_of(a: Any) -> np.ndarray:
    """A key of JAX's as one of ours."""
    if isinstance(a, np.ndarray) and a.dtype == object:
        return a
    data = np.asarray(jax.random.key_data(a))
    return _keys([_hash(row.tolist()) for row in data.reshape(-1, data.shape[-1])], data.shape[:-1])


def _bits(p: dict[str, Any], keys: Any) -> np.ndarray:
    keys = _key_of(keys)
    dtype = np.dtype(f"uint{p['bit_width']}")
    out = [
        np.random.default_rng(k).integers(0, np.iinfo(dtype).max, p["shape"], dtype, endpoint=True) for k in keys.flat
    ]
    return np.stack(out).reshape(keys.shape + tuple(p["shape"]))


def _fold(p: dict[str, Any], keys: Any, data: Any) -> np.ndarray:
    keys, data = np.broadcast_arrays(_key_of(keys), np.asarray(data))
    return _keys([_hash(k, int(d)) for k, d in zip(keys.flat, data.flat, strict=True)], keys.shape)


def _split(p: dict[str, Any], keys: Any) -> np.ndarray:
    keys, shape = _key_of(keys), tuple(p["shape"])
    return _keys([_hash(k, "split", i) for k in keys.flat for i in range(math.prod(shape))], keys.shape + shape)


def _dot(p: dict[str, Any], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    (ca, cb), (ba, bb) = p["dimension_numbers"]
    fa = [i for i in range(a.ndim) if i not in (*ca, *ba)]
    fb = [i for i in range(b.ndim) if i not in (*cb, *bb)]
    batch = [a.shape[i] for i in ba]
    rows, cols = [a.shape[i] for i in fa], [b.shape[i] for i in fb]
    inner = math.prod(a.shape[i] for i in ca)
    a = a.transpose(*ba, *fa, *ca).reshape(*batch, math.prod(rows), inner)
    b = b.transpose(*bb, *cb, *fb).reshape(*batch, inner, math.prod(cols))
    out = np.matmul(a, b).reshape(*batch, *rows, *cols)
    wanted = p.get("preferred_element_type")
    return out if wanted is None else out.astype(wanted)


def _broadcast(p: dict[str, Any], a: np.ndarray, *_: Any) -> np.ndarray:
    shape = [1] * len(p["shape"])
    for axis, place in enumerate(p["broadcast_dimensions"]):
        shape[place] = a.shape[axis]
    return np.broadcast_to(a.reshape(shape), p["shape"])


def _slice(p: dict[str, Any], a: np.ndarray) -> np.ndarray:
    steps = p["strides"] or (1,) * a.ndim
    return a[tuple(slice(*one) for one in zip(p["start_indices"], p["limit_indices"], steps, strict=True))]


def _starts(a: np.ndarray, sizes: Sequence[int], at: Sequence[Any]) -> tuple[slice, ...]:
    starts = [min(max(int(i), 0), n - s) for i, n, s in zip(at, a.shape, sizes, strict=True)]
    return tuple(slice(i, i + s) for i, s in zip(starts, sizes, strict=True))


def _update(p: dict[str, Any], a: np.ndarray, b: np.ndarray, *at: Any) -> np.ndarray:
    out = np.array(a)
    out[_starts(a, b.shape, at)] = b
    return out


def _pad(p: dict[str, Any], a: np.ndarray, fill: np.ndarray) -> np.ndarray:
    config = p["padding_config"]
    shape = [lo + hi + n + max(n - 1, 0) * inside for n, (lo, hi, inside) in zip(a.shape, config, strict=True)]
    out = np.full([max(n, 0) for n in shape], fill, a.dtype)
    into, of = [], []
    for n, size, (lo, _, inside) in zip(a.shape, out.shape, config, strict=True):
        kept = [i for i in range(n) if 0 <= lo + i * (inside + 1) < size]
        if not kept:
            return out
        of.append(slice(kept[0], kept[-1] + 1))
        into.append(slice(lo + kept[0] * (inside + 1), lo + kept[-1] * (inside + 1) + 1, inside + 1))
    out[tuple(into)] = a[tuple(of)]
    return out


def _select(p: dict[str, Any], which: np.ndarray, *cases: np.ndarray) -> np.ndarray:
    if which.dtype == bool:
        return np.where(which, cases[1], cases[0])
    return np.choose(which, cases)


def _split_axis(p: dict[str, Any], a: np.ndarray) -> list[np.ndarray]:
    return np.split(a, np.cumsum(p["sizes"])[:-1], axis=p["axis"])


def _sort(p: dict[str, Any], *ins: np.ndarray) -> list[np.ndarray]:
    axis = p["dimension"]
    order = np.argsort(ins[0], axis=axis, kind="stable")
    return [np.take_along_axis(a, order, axis) for a in ins]


def _cumulative(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(p: dict[str, Any], a: np.ndarray) -> np.ndarray:
        if p["reverse"]:
            return np.flip(function(np.flip(a, p["axis"]), axis=p["axis"]), p["axis"])
        return function(a, axis=p["axis"])

    return run


def _reduce(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda p, a: function(a, axis=tuple(p["axes"]))


def _integer_pow(p: dict[str, Any], a: np.ndarray) -> np.ndarray:
    return a ** p["y"] if p["y"] >= 0 else 1 / a ** -p["y"]


def _iota(p: dict[str, Any]) -> np.ndarray:
    shape = p["shape"]
    line = np.arange(shape[p["dimension"]], dtype=p["dtype"])
    return np.broadcast_to(line.reshape([-1 if i == p["dimension"] else 1 for i in range(len(shape))]), shape)


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda p, *ins: function(*ins)


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.trunc(a / b).astype(a.dtype) if np.issubdtype(a.dtype, np.integer) else a / b


TABLE: Final[dict[str, Callable[..., Any]]] = {
    **{
        name: _plain(function)
        for name, function in {
            "add": np.add, "add_any": np.add, "sub": np.subtract, "mul": np.multiply, "div": _divide, "neg": np.negative,
            "max": np.maximum, "min": np.minimum, "exp": np.exp, "exp2": np.exp2, "log": np.log, "log1p": np.log1p,
            "expm1": np.expm1, "tanh": np.tanh, "logistic": special.expit, "erf": special.erf, "erf_inv": special.erfinv,
            "erfc": special.erfc, "sin": np.sin, "cos": np.cos, "tan": np.tan, "sinh": np.sinh, "cosh": np.cosh,
            "atan": np.arctan, "asinh": np.arcsinh, "atan2": np.arctan2, "sqrt": np.sqrt, "cbrt": np.cbrt,
            "rsqrt": lambda a: 1 / np.sqrt(a), "abs": np.abs, "sign": np.sign, "floor": np.floor, "ceil": np.ceil,
            "square": np.square, "pow": np.power, "rem": np.fmod, "nextafter": np.nextafter,
            "is_finite": np.isfinite, "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
            "gt": np.greater, "ge": np.greater_equal,
            "not": lambda a: np.logical_not(a) if a.dtype == bool else np.invert(a),
            "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
            "shift_right_logical": np.right_shift, "shift_left": np.left_shift,
            "clamp": lambda lo, a, hi: np.minimum(np.maximum(a, lo), hi),
            "complex": lambda a, b: (a + 1j * b).astype(np.complex64), "real": np.real, "imag": np.imag,
            "stop_gradient": lambda a: a, "copy": lambda a: a, "copy_p": lambda a: a,
            "optimization_barrier": lambda *a: list(a),
        }.items()
    },
    "conj": lambda p, a: np.conj(a).astype(np.complex64),
    "round": lambda p, a: np.round(a) if int(p["rounding_method"]) else np.sign(a) * np.floor(np.abs(a) + 0.5),
    "integer_pow": _integer_pow,
    "convert_element_type": lambda p, a: a.astype(p["new_dtype"]),
    "reduce_precision": lambda p, a: a,
    "bitcast_convert_type": lambda p, a: np.ascontiguousarray(a).view(p["new_dtype"]),
    "reshape": lambda p, a, *_: a.reshape(p["new_sizes"]),
    "transpose": lambda p, a: a.transpose(p["permutation"]),
    "broadcast_in_dim": _broadcast,
    "squeeze": lambda p, a: np.squeeze(a, tuple(p["dimensions"])),
    "expand_dims": lambda p, a: np.expand_dims(a, tuple(p["dimensions"])),
    "rev": lambda p, a: np.flip(a, tuple(p["dimensions"])),
    "slice": _slice,
    "dynamic_slice": lambda p, a, *at: a[_starts(a, p["slice_sizes"], at)],
    "dynamic_update_slice": _update,
    "concatenate": lambda p, *ins: np.concatenate(ins, p["dimension"]),
    "split": _split_axis,
    "pad": _pad,
    "select_n": _select,
    "iota": _iota,
    "sort": _sort,
    "cumsum": _cumulative(np.cumsum),
    "reduce_sum": _reduce(np.sum),
    "reduce_max": _reduce(np.max),
    "reduce_min": _reduce(np.min),
    "reduce_prod": _reduce(np.prod),
    "reduce_and": _reduce(np.all),
    "reduce_or": _reduce(np.any),
    "argmax": lambda p, a: np.argmax(a, p["axes"][0]).astype(p["index_dtype"]),
    "argmin": lambda p, a: np.argmin(a, p["axes"][0]).astype(p["index_dtype"]),
    "dot_general": _dot,
    "random_bits": _bits,
    "random_fold_in": _fold,
    "random_split": _split,
    "random_clone": lambda p, k: _key_of(k),
}  # fmt: skip


def _array(value: Any) -> Any:
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return _key_of(value)
    return value if isinstance(value, np.ndarray) else np.asarray(value)


def _fallback(eqn: Any, values: Sequence[Any]) -> list[Any]:
    outs = eqn.primitive.bind(*map(jnp.asarray, values), **eqn.params)
    return list(map(_array, outs if eqn.primitive.multiple_results else [outs]))


class Evaluator:
    """Evaluates one program, many times; what its changing inputs do not affect, once.

    Args:
        program: a closed jaxpr.
        fixed: values of the inputs that stay the same, by position.
    """

    def __init__(self, program: Any, fixed: dict[int, Any] | None = None) -> None:
        self._program = program
        self._known: dict[tuple[Any, ...], list[Any]] = {}
        self._fixed = fixed or {}

    def __call__(self, args: Sequence[Any], taps: dict[str, Any] | None = None) -> list[Any]:
        """The outputs; fills `taps` with the values of `checkpoint_name`s."""
        with np.errstate(all="ignore"):
            flags = [number in self._fixed for number in range(len(args))]
            outs, _ = self._run(
                self._program.jaxpr, self._program.consts, list(map(_array, args)), flags, {} if taps is None else taps, ()
            )
        return outs

    def _run(
        self, jaxpr: Any, consts: Any, args: Sequence[Any], flags: Sequence[bool], taps: dict[str, Any], path: tuple
    ) -> tuple[list[Any], list[bool]]:
        env: dict[Any, Any] = {}
        still: set[Any] = set(jaxpr.constvars)
        env.update(zip(jaxpr.constvars, map(_array, consts), strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        still.update(var for var, flag in zip(jaxpr.invars, flags, strict=True) if flag)

        def read(atom: Any) -> tuple[Any, bool]:
            return (_array(atom.val), True) if hasattr(atom, "val") else (env[atom], atom in still)

        for number, eqn in enumerate(jaxpr.eqns):
            pairs = [read(atom) for atom in eqn.invars]
            values, fixed = [a for a, _ in pairs], [b for _, b in pairs]
            here = (*path, number)
            if all(fixed) and here in self._known:
                outs, kept = self._known[here], [True] * len(eqn.outvars)
            else:
                outs, kept = self._eqn(eqn, values, fixed, taps, here)
                if all(fixed):
                    self._known[here] = outs
            env.update(zip(eqn.outvars, outs, strict=True))
            still.update(var for var, flag in zip(eqn.outvars, kept, strict=True) if flag)
        out = [read(atom) for atom in jaxpr.outvars]
        return [a for a, _ in out], [b for _, b in out]

    def _eqn(
        self, eqn: Any, values: list[Any], fixed: list[bool], taps: dict[str, Any], here: tuple
    ) -> tuple[list[Any], list[bool]]:
        name, p = eqn.primitive.name, eqn.params

        def inner(program: Any, args: Sequence[Any], flags: Sequence[bool], *where: Any) -> tuple[list[Any], list[bool]]:
            return self._run(
                getattr(program, "jaxpr", program), getattr(program, "consts", ()), args, flags, taps, (*here, *where)
            )

        if name == "name":
            taps[str(p["name"])[4:]] = values[0]
            return values, fixed
        if name in CALLS and CALLS[name] in p:
            return inner(p[CALLS[name]], values, fixed)
        if name == "scan" and "num_carry" in p:
            a, b = p["num_consts"], p["num_consts"] + p["num_carry"]
            carry, order = values[a:b], range(p["length"])
            stacked: dict[int, Any] = {}
            for i in reversed(order) if p["reverse"] else order:
                flags = [*fixed[:a], *[False] * (b - a), *fixed[b:]]
                outs, _ = inner(p["jaxpr"], [*values[:a], *carry, *(row[i] for row in values[b:])], flags, i)
                carry, stacked[i] = outs[: b - a], outs[b - a :]
            outs = [*carry, *(np.stack(column) for column in zip(*(stacked[i] for i in order), strict=True))]
            return outs, [all(fixed)] * len(outs)
        if name == "cond":
            branch = p["branches"][min(max(int(values[0]), 0), len(p["branches"]) - 1)]
            return inner(branch, values[1:], fixed[1:])
        if name == "while" and "cond_nconsts" in p:
            a, b = p["cond_nconsts"], p["body_nconsts"]
            tests, consts, carry = values[:a], values[a : a + b], values[a + b :]
            while inner(p["cond_jaxpr"], [*tests, *carry], [False] * (a + len(carry)), "c")[0][0]:
                carry, _ = inner(p["body_jaxpr"], [*consts, *carry], [False] * (b + len(carry)), "b")
            return carry, [all(fixed)] * len(carry)
        rule = TABLE.get(name)
        if rule is None:
            outs = _fallback(eqn, values)
        else:
            outs = rule(p, *values)
            outs = outs if isinstance(outs, list) else [outs]
            outs = [
                out if out.dtype in (object, var.aval.dtype) else out.astype(var.aval.dtype)
                for out, var in zip(map(np.asarray, outs), eqn.outvars, strict=True)
            ]
        return outs, [all(fixed)] * len(outs)
