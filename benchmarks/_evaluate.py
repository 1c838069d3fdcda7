"""Evaluates jaxprs with NumPy: a small program is run in less time than XLA takes to compile it.

Random bits come from NumPy's generators, seeded by the keys, which are integers here. Operations that are
not in the table are run by JAX, one by one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special as special

from mujax.core.program import Call, Cond, Scan, While, checkpoint_label, control


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
    return _wrap({}, np.asarray(jax.random.key_data(a)))


def _bits(p: dict[str, Any], keys: Any) -> np.ndarray:
    keys = _key_of(keys)
    dtype = np.dtype(f"uint{p['bit_width']}")
    out = [
        np.random.default_rng(k).integers(0, np.iinfo(dtype).max, p["shape"], dtype, endpoint=True)
        for k in keys.flat
    ]
    return np.stack(out).reshape(keys.shape + tuple(p["shape"]))


def _fold(p: dict[str, Any], keys: Any, data: Any) -> np.ndarray:
    keys, data = np.broadcast_arrays(_key_of(keys), np.asarray(data))
    return _keys([_hash(k, int(d)) for k, d in zip(keys.flat, data.flat, strict=True)], keys.shape)


def _split(p: dict[str, Any], keys: Any) -> np.ndarray:
    keys, shape = _key_of(keys), tuple(p["shape"])
    return _keys(
        [_hash(k, "split", i) for k in keys.flat for i in range(math.prod(shape))], keys.shape + shape
    )


def _wrap(p: dict[str, Any], a: np.ndarray) -> np.ndarray:
    return _keys([_hash(row.tolist()) for row in a.reshape(-1, a.shape[-1])], a.shape[:-1])


def _unwrap(p: dict[str, Any], keys: Any) -> np.ndarray:
    keys = _key_of(keys)
    rows = [[k >> 32, k & 0xFFFFFFFF] for k in keys.flat]
    return np.array(rows, np.uint32).reshape(*keys.shape, 2)


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
    shape = [
        lo + hi + n + max(n - 1, 0) * inside for n, (lo, hi, inside) in zip(a.shape, config, strict=True)
    ]
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


def _round(p: dict[str, Any], a: np.ndarray) -> np.ndarray:
    return np.round(a) if int(p["rounding_method"]) else np.sign(a) * np.floor(np.abs(a) + 0.5)


def _real(dtype: Any, a: np.ndarray) -> np.ndarray:
    """The real part, where complex numbers become real ones."""
    return a.real if np.iscomplexobj(a) and not jnp.issubdtype(dtype, jnp.complexfloating) else a


TABLE: Final[dict[str, Callable[..., Any]]] = {
    **{
        name: _plain(function)
        for name, function in {
            "add": np.add, "add_any": np.add, "sub": np.subtract, "mul": np.multiply, "div": _divide,
            "neg": np.negative,
            "max": np.maximum, "min": np.minimum, "exp": np.exp, "exp2": np.exp2, "log": np.log,
            "log1p": np.log1p,
            "expm1": np.expm1, "tanh": np.tanh, "logistic": special.expit, "erf": special.erf,
            "erf_inv": special.erfinv,
            "erfc": special.erfc, "sin": np.sin, "cos": np.cos, "tan": np.tan, "sinh": np.sinh,
            "cosh": np.cosh,
            "atan": np.arctan, "asinh": np.arcsinh, "atan2": np.arctan2, "sqrt": np.sqrt, "cbrt": np.cbrt,
            "rsqrt": lambda a: 1 / np.sqrt(a), "abs": np.abs, "sign": np.sign, "floor": np.floor,
            "ceil": np.ceil,
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
    "round": _round,
    "integer_pow": _integer_pow,
    "convert_element_type": lambda p, a: _real(p["new_dtype"], a).astype(p["new_dtype"]),
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
    "random_wrap": _wrap,
    "random_unwrap": _unwrap,
}  # fmt: skip


def _array(value: Any) -> Any:
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return _key_of(value)
    return value if isinstance(value, np.ndarray) else np.asarray(value)


def _fallback(eqn: Any, values: Sequence[Any]) -> list[Any]:
    outs = eqn.primitive.bind(*map(jnp.asarray, values), **eqn.params)
    return list(map(_array, outs if eqn.primitive.multiple_results else [outs]))


Choices: TypeAlias = dict[tuple[Any, ...], np.ndarray]
"""The results of `argmax` and `argmin`, by place."""


class Evaluator:
    """Evaluates one program, many times; what does not depend on its inputs, once.

    Args:
        program: a closed jaxpr.
    """

    def __init__(self, program: Any) -> None:
        self._program = program
        self._known: dict[tuple[Any, ...], list[Any]] = {}
        self._wanted: frozenset[str] = frozenset()
        self._choices: Choices | None = None
        self._remembers = False
        self._before: dict[tuple[Any, ...], tuple[list[Any], list[Any]]] = {}

    def start(self) -> None:
        """Remembers what the next run computes; later ones redo what depends on other inputs."""
        self._remembers, self._before = True, {}

    def __call__(self, args: Sequence[Any]) -> list[Any]:
        """The outputs."""
        return self._top(args, {}, frozenset())

    def taps(
        self, args: Sequence[Any], names: Collection[str], choices: Choices | None = None
    ) -> list[np.ndarray]:
        """The values of `checkpoint_name`s, with an axis in front for the times that each is reached.

        What comes after the last of them is not run.

        Args:
            args: the program's inputs.
            names: the names.
            choices: what is chosen at places that are in it already; the other places are added.

        Raises:
            KeyError: one is never reached.
        """
        found: dict[str, list[Any]] = {}
        self._choices = choices
        self._top(args, found, frozenset(names))
        self._choices = None
        return [np.stack(found[name]) for name in names]

    def _top(self, args: Sequence[Any], taps: dict[str, list[Any]], wanted: frozenset[str]) -> list[Any]:
        closed, self._wanted = self._program, wanted
        with np.errstate(all="ignore"):
            outs, _ = self._run(
                closed.jaxpr, closed.consts, list(map(_array, args)), [False] * len(args), taps, ()
            )
        self._remembers = False
        return outs

    def _run(
        self,
        jaxpr: Any,
        consts: Sequence[Any],
        args: Sequence[Any],
        flags: Sequence[bool],
        taps: dict[str, list[Any]],
        path: tuple[Any, ...],
    ) -> tuple[list[Any], list[bool]]:
        """The outputs, and which of them depend on no input of the program; `flags` says so of `args`."""
        env = dict(zip(jaxpr.constvars, map(_array, consts), strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        still = {*jaxpr.constvars, *(var for var, flag in zip(jaxpr.invars, flags, strict=True) if flag)}

        def read(atom: Any) -> tuple[Any, bool]:
            return (_array(atom.val), True) if hasattr(atom, "val") else (env[atom], atom in still)

        for number, eqn in enumerate(jaxpr.eqns):
            pairs = [read(atom) for atom in eqn.invars]
            values, fixed = [a for a, _ in pairs], [b for _, b in pairs]
            outs, kept = self._eqn(eqn, values, fixed, taps, (*path, number))
            if not path and self._wanted and self._wanted <= taps.keys():
                return [], []
            env.update(zip(eqn.outvars, outs, strict=True))
            still.update(var for var, flag in zip(eqn.outvars, kept, strict=True) if flag)
        out = [read(atom) for atom in jaxpr.outvars]
        return [a for a, _ in out], [b for _, b in out]

    def _eqn(
        self,
        eqn: Any,
        values: list[Any],
        fixed: list[bool],
        taps: dict[str, list[Any]],
        here: tuple[Any, ...],
    ) -> tuple[list[Any], list[bool]]:
        def inner(
            program: Any, args: Sequence[Any], flags: Sequence[bool], *where: Any
        ) -> tuple[list[Any], list[bool]]:
            return self._run(program.jaxpr, program.consts, args, flags, taps, (*here, *where))

        label = checkpoint_label(eqn)
        if label is not None:
            taps.setdefault(label, []).append(values[0])
            return values, fixed
        match control(eqn):
            case Call(program=program):
                return inner(program, values, fixed)
            case Scan(consts=a, carry=count) as scan:
                b = a + count
                carry, order = values[a:b], range(scan.length)
                flags = [*fixed[:a], *[False] * count, *fixed[b:]]
                stacked: dict[int, list[Any]] = {}
                for i in reversed(order) if scan.reverse else order:
                    rows = [whole[i] for whole in values[b:]]
                    outs, _ = inner(scan.body, [*values[:a], *carry, *rows], flags, i)
                    carry, stacked[i] = outs[:count], outs[count:]
                columns = zip(*(stacked[i] for i in order), strict=True)
                outs = [*carry, *(np.stack(column) for column in columns)]
                return outs, [False] * len(outs)
            case While(cond_consts=a, body_consts=b) as loop:
                tests, consts, carry = values[:a], values[a : a + b], values[a + b :]
                while inner(loop.cond, [*tests, *carry], [False] * (a + len(carry)), "c")[0][0]:
                    carry, _ = inner(loop.body, [*consts, *carry], [False] * (b + len(carry)), "b")
                return carry, [False] * len(carry)
            case Cond(branches=branches):
                chosen = min(max(int(values[0]), 0), len(branches) - 1)
                outs, kept = inner(branches[chosen], values[1:], fixed[1:], chosen)
                return outs, [fixed[0] and one for one in kept]
        if not all(fixed):
            before = self._before.get(here)
            if before and all(a is b or one for a, b, one in zip(values, before[0], fixed, strict=True)):
                return before[1], [False] * len(eqn.outvars)
            if self._choices is not None and eqn.primitive.name in ("argmax", "argmin"):
                if here not in self._choices:
                    self._choices[here] = self._simple(eqn, values)[0]
                return [self._choices[here]], [False]
            outs = self._simple(eqn, values)
            if self._remembers:
                self._before[here] = values, outs
            return outs, [False] * len(eqn.outvars)
        if here not in self._known:
            self._known[here] = self._simple(eqn, values)
        return self._known[here], [True] * len(eqn.outvars)

    def _simple(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        """An equation without programs in it."""
        rule = TABLE.get(eqn.primitive.name)
        if rule is None:
            return _fallback(eqn, values)
        outs = rule(eqn.params, *values)
        outs = outs if isinstance(outs, list) else [outs]
        return [
            out if out.dtype in (object, var.aval.dtype) else out.astype(var.aval.dtype)
            for out, var in zip(map(np.asarray, outs), eqn.outvars, strict=True)
        ]
