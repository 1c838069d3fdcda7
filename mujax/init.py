"""`mup_init`: reads a model's parametrization off its traces and gives it back in µP."""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mujax import forward, rules
from mujax.errors import MujaxError, RoleError, ShapeMismatchError, SpecMismatchError
from mujax.frontend import Call, Frontend, Initial, frontend, shrink
from mujax.infshape import MupSpec, Parametrization, ParamSpec, Role
from mujax.trace import Analysis, EqnPath, Use, analyse, read, read_scales, resolve

Kind = Literal["readout", "tied_readout"]

# Initialisers that the trace can't explain are sampled; up to this many entries that takes seconds.
_SAMPLE_LIMIT = 1 << 26


@dataclasses.dataclass(frozen=True)
class Correction:
    """A constant that the forward pass gets.

    Attributes:
        kind: `"readout"`: the product of an output weight; `"tied_readout"`: the readout use of a tied
            embedding.
        factor: what the product is multiplied with.
        where: `file:line` in the user's code.
        path: the parameter of the product.
    """

    kind: Kind
    factor: float
    where: str
    path: str


@dataclasses.dataclass(frozen=True)
class Pending:
    """Something that scales with width and is not corrected.

    Attributes:
        what: what it is, in words.
        where: `file:line` in the user's code.
    """

    what: str
    where: str


def mup_init(
    model: Any,
    base: Any,
    *inputs: Any,
    delta: Any = None,
    parametrization: str | Parametrization = "mup",
    roles: Mapping[str, Role | ParamSpec] | None = None,
    **kwargs: Any,
) -> MupModel:
    """Reads the parametrization of a model off its traces, and returns it in µP.

    The model is traced twice, at the base's widths and at the target's; nothing is allocated or run. The
    axes whose sizes differ are infinite, and how the program uses each parameter tells which of its axes
    are fan-in and which fan-out. At the base's widths the result is exactly the user's own model.

    Args:
        model: the target: a Flax Linen module, an NNX factory `rngs -> nnx.Module`, or a `Functional`.
        base: the same model at the widths where hyperparameters are tuned.
        *inputs: example inputs, arrays or `jax.ShapeDtypeStruct`s.
        delta: the same model at third widths; needed where `model` has the base's own widths, to tell
            which axes are infinite.
        parametrization: `"mup"` (Table 8), `"table3"`, `"table9"`, `"sp"`, or what
            `mujax.interpolate` returns.
        roles: overrules what the traces say: glob of parameter paths -> role or `ParamSpec`.
        **kwargs: passed to the model with `inputs`.

    Raises:
        ShapeMismatchError: base and target differ in something other than widths, or not at all.
        TraceMismatchError: their programs differ in structure.
        RoleError: the role of a parameter can't be read.
        MujaxError: the model is of an unknown kind.

    Example:
        >>> import flax.linen as nn, jax, mujax
        >>> def net(width):
        ...     return nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(width), nn.relu, nn.Dense(10)])
        >>> x = jax.ShapeDtypeStruct((32, 784), "float32")
        >>> mup = mujax.mup_init(net(512), net(64), x)
        >>> [spec.role for path, spec in mup.spec.items() if path.endswith("kernel")]
        ['input', 'hidden', 'output']
        >>> mup.corrections[0].factor
        0.125

    Reference:
        Yang et al., Tensor Programs V, arXiv 2203.03466, Tables 3, 8 and 9.
    """
    chosen = rules.parametrization(parametrization)
    target_end, base_end = frontend(model), frontend(base)
    target = target_end.trace_init(inputs, kwargs)
    small = base_end.trace_init(inputs, kwargs)
    _same_structure("target", target, small)
    read_end, big = target_end, target
    if delta is not None:
        read_end = frontend(delta)
        big = read_end.trace_init(inputs, kwargs)
        _same_structure("delta", big, small)
    elif target.shapes(target.params) == small.shapes(small.params):
        raise ShapeMismatchError(
            "mup_init: the target has the same widths as the base, so nothing tells which axes are infinite; "
            "pass delta=, the same model at other widths."
        )
    analysis = _analyse(read_end, base_end, big, small, inputs, kwargs)
    spec = _spec(target, small, big, analysis, roles or {}, chosen)
    sizes = {
        path: (shape, other[path])
        for which, other in (
            (target.params, small.shapes(small.params)),
            (target.state, small.shapes(small.state)),
        )
        for path, shape in target.shapes(which).items()
    }
    own = _own_scales(target_end, base_end, target, small, inputs, kwargs)
    init_scales = {
        path: rules.init_scale(param, chosen, own[path]) for path, param in spec.items() if own[path] != 0
    }
    return MupModel(
        spec=spec,
        _target=target_end,
        _base=base_end,
        _sizes=sizes,
        init_scales=init_scales,
        _analysis=analysis,
        _inputs=tuple(inputs),
        _kwargs=dict(kwargs),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class MupModel:
    """A model in µP: what `mup_init` returns.

    Attributes:
        spec: what each parameter is; static and hashable.
        init_scales: what the user's own initial values are multiplied with, by path; parameters that
            start at zero have no entry.
    """

    spec: MupSpec
    init_scales: Mapping[str, float]
    _target: Frontend
    _base: Frontend
    _sizes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    _analysis: Analysis
    _inputs: tuple[Any, ...]
    _kwargs: dict[str, Any]

    def init(self, key: Any, *inputs: Any, **kwargs: Any) -> Any:
        """The user's own initialisation, each parameter brought to the rule's standard deviation.

        Args:
            key: what the model's own `init` takes: a key or a dict of keys (Linen), a key or
                `nnx.Rngs` (NNX).
            *inputs: example inputs; those given to `mup_init` where left out and not abstract.
            **kwargs: passed to the model's `init`; those given to `mup_init` where left out.

        Returns:
            Variables of the same structure as the model's own `init` returns; for NNX the module.
        """
        inputs = inputs or tuple(
            jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf,
                self._inputs,
            )
        )
        variables = self._target.init(key, inputs, {**self._kwargs, **kwargs})

        def scale(path: str, leaf: Any) -> Any:
            factor = self.init_scales.get(path, 1.0)
            return leaf if factor == 1.0 else leaf * jnp.asarray(factor, leaf.dtype)

        return self._target.scale_params(variables, scale)

    def apply(self, variables: Any, *inputs: Any, **kwargs: Any) -> Any:
        """The model's own `apply`, with the factors of the parametrization in place.

        Same signature and result as the model's. It is traced like a jitted function: Python code in the
        model sees shapes, not numbers. For NNX, `variables` is the module; its other state (batch
        statistics, rng counts) is updated as calling it would.

        Raises:
            SpecMismatchError: the variables do not have the shapes that `mup_init` saw.
        """
        call = self._target.call(variables, inputs, kwargs)
        self._check(call)
        hooks, entry, traced = self._corrections_of(call, variables, inputs, kwargs)
        if not hooks and not entry:
            return self._target.finish(variables, call.function(*call.leaves))
        program, shape = traced or _trace(call)
        leaves = [
            leaf if (factor := entry.get(position)) is None else leaf * jnp.asarray(factor, leaf.dtype)
            for position, leaf in enumerate(map(jnp.asarray, call.leaves))
        ]
        outs = forward.evaluate(
            program, leaves, {site: _multiplier(correction.factor) for site, correction in hooks.items()}
        )
        return self._target.finish(variables, jax.tree.unflatten(jax.tree.structure(shape), outs))

    @functools.cached_property
    def corrections(self) -> tuple[Correction, ...]:
        """What the forward pass gets in the traced call, in program order."""
        return tuple(_corrections(self.spec, self._analysis).values())

    @functools.cached_property
    def uncorrected(self) -> tuple[Pending, ...]:
        """What scales with width in the traced call and is left as it is."""
        return tuple(
            Pending(
                "a product of two activations that contracts an axis which grows with width "
                f"({product.contracted[0]} -> {product.contracted[1]}; attention logits?)",
                product.where,
            )
            for product in self._analysis.products
        )

    def explain(self) -> str:
        """The role table, the corrections and what was left alone, as text to read."""
        return _explain(self)

    def _check(self, call: Call) -> None:
        found = {path: tuple(call.leaves[position].shape) for position, path in call.params.items()}
        for path, param in self.spec.items():
            if path not in found:
                raise SpecMismatchError(
                    f"{path}: expected a parameter of shape {param.shape} as in mup_init, found none; pass the "
                    "variables that mup.init returns."
                )
            if found[path] != param.shape:
                raise SpecMismatchError(
                    f"{path}: expected shape {param.shape} as in mup_init, got {found[path]}; build the variables "
                    "and the MupModel with the same widths."
                )

    def _corrections_of(
        self, call: Call, variables: Any, inputs: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[dict[EqnPath, Correction], dict[int, float], tuple[Any, Any] | None]:
        entry = {
            position: factor
            for position, path in call.params.items()
            if (param := self.spec[path]).role in ("input", "finite")
            and (factor := rules.forward_factor(param, self.spec.parametrization)) != 1.0
        }
        if not _may_correct(self.spec):
            return {}, entry, None
        twin = shrink(self._base, self._target, variables, inputs, kwargs, call, self._sizes)
        base, _ = _trace(twin)
        traced = _trace(call)
        return _corrections(self.spec, analyse(base, traced[0], call.params)), entry, traced


# ---- tracing ---------------------------------------------------------------------------------------


def _trace(call: Call) -> tuple[Any, Any]:
    return jax.make_jaxpr(call.function, return_shape=True)(*call.leaves)


def _analyse(
    target_end: Frontend,
    base_end: Frontend,
    target: Initial,
    base: Initial,
    inputs: Sequence[Any],
    kwargs: dict[str, Any],
) -> Analysis:
    call = target_end.example(target.variables, inputs, kwargs)
    program, _ = _trace(call)
    small, _ = _trace(base_end.example(base.variables, inputs, kwargs))
    return analyse(small, program, call.params)


def _same_structure(name: str, target: Initial, base: Initial) -> None:
    big, small = target.shapes(target.params), base.shapes(base.params)
    for path in (*small, *big):
        if path not in big or path not in small:
            where, other = ("base", name) if path in small else (name, "base")
            raise ShapeMismatchError(
                f"{path}: expected the same parameters in base and {name}, found it in the {where} only and not in "
                f"the {other}; they may differ in widths, not in depth or in kinds of layers."
            )
        if len(big[path]) != len(small[path]):
            raise ShapeMismatchError(
                f"{path}: expected the same rank in base and {name}, found shape {small[path]} in the base and "
                f"{big[path]} in the {name}; they may differ in widths only."
            )


# ---- the spec --------------------------------------------------------------------------------------


def _spec(
    target: Initial,
    base: Initial,
    reading: Initial,
    analysis: Analysis,
    overrides: Mapping[str, Role | ParamSpec],
    chosen: Parametrization,
) -> MupSpec:
    """Puts together what the traces say and what the user says."""
    small, read_shapes = base.shapes(base.params), reading.shapes(reading.params)
    unused = set(overrides)
    params: dict[str, ParamSpec] = {}
    for path, shape in target.shapes(target.params).items():
        found = read_shapes[path]
        infinite = tuple(axis for axis, (n, m) in enumerate(zip(found, small[path], strict=True)) if n != m)
        growing = [axis for axis, (n, m) in enumerate(zip(shape, small[path], strict=True)) if n != m]
        if not set(growing) <= set(infinite):
            raise ShapeMismatchError(
                f"{path}: expected the delta to differ from the base wherever the target does, but target {shape} "
                f"and delta {found} against base {small[path]} do not; vary every width in the delta."
            )
        override = None
        for pattern, said in overrides.items():
            if fnmatch.fnmatchcase(path, pattern):
                override = said
                unused.discard(pattern)
        uses = analysis.uses.get(path, ())
        if isinstance(override, ParamSpec):
            params[path] = _said(path, override, shape, small[path])
            continue
        if override is None:
            seen = resolve(path, found, small[path], uses)
        else:
            seen = _with_role(path, override, found, small[path], infinite, uses)
        params[path] = dataclasses.replace(seen, shape=shape)
    if unused:
        pattern = sorted(unused)[0]
        raise RoleError(
            f"roles: expected globs that match parameters, but {pattern!r} matches none of them; the first is "
            f"{next(iter(params), None)!r}."
        )
    return MupSpec(params, chosen)


def _said(path: str, said: ParamSpec, shape: tuple[int, ...], base: tuple[int, ...]) -> ParamSpec:
    if (said.shape, said.base_shape) != (shape, base):
        raise RoleError(
            f"{path}: expected roles= to give shape {shape} and base_shape {base}, got {said.shape} and "
            f"{said.base_shape}."
        )
    return said


def _with_role(
    path: str,
    role: Role,
    shape: tuple[int, ...],
    base: tuple[int, ...],
    infinite: tuple[int, ...],
    uses: Sequence[Use],
) -> ParamSpec:
    """The axes of a parameter whose role the user gives by name."""
    if role not in rules.TABLES["mup"]:
        raise RoleError(
            f"{path}: expected a role out of {', '.join(rules.TABLES['mup'])} or a ParamSpec, got {role!r}."
        )
    for use in uses:
        if use.kind != "opaque" and (seen := read(use, shape, base)).role == role:
            return seen
    axes = range(len(shape))
    if role == "hidden":
        if len(infinite) < 2:
            raise RoleError(
                f"{path}: expected two axes that grow with width for a hidden weight, found {len(infinite)} in shape "
                f"{shape}; give a ParamSpec."
            )
        # Flax's own layout, and only because the user asked for it: outputs last.
        inside = tuple(axis for axis in axes if axis != infinite[-1])
    else:
        inside = {"input": tuple(a for a in axes if a not in infinite), "output": infinite, "finite": ()}[role]
    grows = () if role == "finite" else infinite
    return ParamSpec(
        shape if grows == infinite else base,
        base,
        fan_in=inside,
        fan_out=tuple(axis for axis in axes if axis not in inside),
        infinite=grows,
    )


# ---- initial values --------------------------------------------------------------------------------


def _own_scales(
    target_end: Frontend,
    base_end: Frontend,
    target: Initial,
    base: Initial,
    inputs: Sequence[Any],
    kwargs: dict[str, Any],
) -> dict[str, float]:
    """How the user's own initialisation of each parameter scales from base to target."""
    traced = read_scales(base.program, target.program)
    scales = {path: traced[position] for position, path in target.params.items()}
    unknown = [path for path, scale in scales.items() if scale is None]
    if unknown:
        shapes = target.shapes(target.params)
        large = next((path for path in unknown if math.prod(shapes[path]) > _SAMPLE_LIMIT), None)
        if large is not None:
            raise MujaxError(
                f"{large}: expected an initialiser whose scale shows in its program, or a parameter of at most "
                f"{_SAMPLE_LIMIT} entries to sample, got shape {shapes[large]}; use an initialiser of "
                "jax.nn.initializers."
            )
        key = jax.random.key(0)
        with jax.ensure_compile_time_eval():
            pairs = zip(
                unknown,
                base_end.sample_init(inputs, kwargs, key, unknown),
                target_end.sample_init(inputs, kwargs, key, unknown),
                strict=True,
            )
            scales |= {path: _root_mean_squares(small, big) for path, small, big in pairs}
    return {path: 1.0 if scale is None else scale for path, scale in scales.items()}


def _root_mean_squares(base: Any, target: Any) -> float:
    small, big = (float(jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))) for x in (base, target))
    return big / small if small else 0.0


# ---- corrections -----------------------------------------------------------------------------------


def _may_correct(spec: MupSpec) -> bool:
    """Whether the forward pass gets any factor on a product: else there is nothing to trace for."""
    return any(
        (param.tied and rules.tied_factor(param.r_out, spec.parametrization) != 1.0)
        or (param.role == "output" and rules.forward_factor(param, spec.parametrization) != 1.0)
        for param in spec.values()
    )


def _corrections(spec: MupSpec, analysis: Analysis) -> dict[EqnPath, Correction]:
    """The factor of each product with a parameter, by the place of the product."""
    at: dict[EqnPath, list[tuple[Use, Correction | None]]] = {}
    for path, uses in analysis.uses.items():
        for use in uses:
            if use.kind == "contraction" and any(role == "fan_in" for _, role, *_ in use.axes):
                at.setdefault(use.site, []).append((use, _correction(path, spec[path], use, spec.parametrization)))
    out: dict[EqnPath, Correction] = {}
    for site in sorted(at, key=_order):
        found = at[site]
        factors = {1.0 if correction is None else correction.factor for _, correction in found}
        if len(factors) > 1:
            first, second = found[:2]
            raise RoleError(
                f"{first[0].path} and {second[0].path}: expected one factor for their common product at "
                f"{first[0].where}, but their roles ask for different ones; use separate products, or give them the "
                "same role with roles=."
            )
        correction = found[0][1]
        if correction is not None:
            out[site] = correction
    return out


def _order(site: EqnPath) -> tuple[tuple[int, str], ...]:
    return tuple((step, "") if isinstance(step, int) else (0, step) for step in site)


def _correction(path: str, param: ParamSpec, use: Use, chosen: Parametrization) -> Correction | None:
    if param.tied:
        if read(use, param.shape, param.base_shape).role != "output":
            return None
        inside = {axis for axis, role, *_ in use.axes if role == "fan_in"}
        grows = math.prod(param.shape[axis] for axis in inside) / math.prod(param.base_shape[axis] for axis in inside)
        return Correction("tied_readout", rules.tied_factor(grows, chosen), use.where, path)
    if param.role != "output":
        return None
    return Correction("readout", rules.forward_factor(param, chosen), use.where, path)


def _multiplier(factor: float) -> forward.Hook:
    return lambda out: out * jnp.asarray(factor, out.dtype)


# ---- the report ------------------------------------------------------------------------------------


def _explain(mup: MupModel) -> str:
    spec = mup.spec
    chosen = spec.parametrization
    rows = [("parameter", "shape", "base shape", "role", "fan-in", "fan-out", "init", "Adam LR", "SGD LR")]
    for name, paths in _alike(spec, mup.init_scales).items():
        param = spec[paths[0]]
        numbers = (
            mup.init_scales.get(paths[0], 1.0),
            rules.lr_factor(param, chosen, "adam"),
            rules.lr_factor(param, chosen, "sgd"),
        )
        rows.append(
            (
                name if len(paths) == 1 else f"{name} ({len(paths)} alike)",
                "x".join(map(str, param.shape)) or "scalar",
                "x".join(map(str, param.base_shape)) or "scalar",
                param.role + (", tied" if param.tied else ""),
                ",".join(map(str, param.fan_in)) or "-",
                ",".join(map(str, param.fan_out)) or "-",
                *(f"{number:.4g}" for number in numbers),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        f"{len(spec)} parameters, {spec.size():,} entries, parametrization {chosen}. Factors are relative to the base; "
        "init is what the user's own initial values are multiplied with.",
        "",
    ]
    for number, row in enumerate(rows):
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    lines += ["", "Factors in the forward pass:"]
    lines += [f"  x {c.factor:.4g}  {c.kind} of {c.path} at {c.where}" for c in mup.corrections] or ["  none"]
    if mup.uncorrected:
        lines += ["", "Not corrected:"]
        counts = collections.Counter(mup.uncorrected)
        lines += [f"  {p.what} at {p.where}" + (f" ({n} times)" if n > 1 else "") for p, n in counts.items()]
    return "\n".join(lines)


def _alike(spec: MupSpec, scales: Mapping[str, float]) -> dict[str, list[str]]:
    """Parameters that differ in a layer's number only, under one name."""
    groups: dict[tuple[str, ParamSpec, float], list[str]] = {}
    for path, param in spec.items():
        key = (re.sub(r"\d+", "*", path), param, scales.get(path, 1.0))
        groups.setdefault(key, []).append(path)
    names = collections.Counter(pattern for pattern, *_ in groups)
    out: dict[str, list[str]] = {}
    for (pattern, *_), paths in groups.items():
        alone = len(paths) == 1 or names[pattern] > 1
        out[paths[0] if alone else pattern] = paths
    return out
