"""`mup_init`: reads a model's parametrization off its traces and gives it back in µP."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mujax import forward, report, rules
from mujax.corrections import Correction, Kind, Reading, read_call, switched_off, zeros
from mujax.errors import (
    AuditError,
    MujaxError,
    MujaxWarning,
    RoleError,
    ShapeMismatchError,
    SpecMismatchError,
)
from mujax.frontend import Call, Frontend, Initial, frontend, shrink
from mujax.infshape import MupSpec, Parametrization, ParamSpec, Role
from mujax.replay import Replay
from mujax.trace import Analysis, EqnPath, Finding, Use, analyse, read, read_constants, read_scales, resolve

# Initialisers that the trace can't explain are sampled; up to this many entries that takes seconds.
_SAMPLE_LIMIT = 1 << 26


def mup_init(
    model: Any,
    base: Any,
    *inputs: Any,
    delta: Any = None,
    parametrization: str | Parametrization = "mup",
    roles: Mapping[str, Role | ParamSpec] | None = None,
    corrections: Mapping[Kind, bool] | None = None,
    zero_init: Sequence[Literal["readout", "query"]] = (),
    strict: bool = False,
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
        corrections: kinds of `Correction` to switch off, e.g. `{"attention": False}`.
        zero_init: what starts at zero instead of at the rule's standard deviation, as the paper's
            Appendix D.2 recommends: `"readout"`, the kernels whose product is an output of the model;
            `"query"`, those whose product is the first operand of attention logits.
        strict: raise on any finding of `mup.findings`, that is on anything which can't be put right, where
            otherwise a `MujaxWarning` says it.
        **kwargs: passed to the model with `inputs`.

    Raises:
        ShapeMismatchError: base and target differ in something other than widths, or not at all.
        TraceMismatchError: their programs differ in structure.
        RoleError: the role of a parameter can't be read.
        AuditError: `strict`, and there is a finding.
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
    off = switched_off(corrections or {})
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
    call = read_end.example(big.variables, inputs, kwargs)
    base_program, _ = _trace(base_end.example(small.variables, inputs, kwargs))
    program, shape = _trace(call)
    state = dict.fromkeys(call.state, 1.0)
    spec = _spec(target, small, big, analyse(base_program, program, call.params, state), roles or {}, chosen)
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
    if delta is not None:
        call = target_end.example(target.variables, inputs, kwargs)
        program, shape = _trace(call)
    mup = MupModel(
        spec=spec,
        init_scales=init_scales,
        _target=target_end,
        _base=base_end,
        _sizes=sizes,
        _stored=_stored_scales(target, small),
        _example=(base_program, program, call),
        _result=shape,
        _off=off,
        _inputs=tuple(inputs),
        _kwargs=dict(kwargs),
    )
    if zero_init:
        at_zero = dict.fromkeys(zeros(zero_init, spec, mup._reading.analysis), 0.0)
        mup = dataclasses.replace(mup, init_scales={**init_scales, **at_zero})
    if mup.findings:
        first, *rest = mup.findings
        more = f" There are {len(rest)} more: see mup.findings." if rest else ""
        said = f"{first.where}: {first.message}.{more}"
        if strict:
            raise AuditError(said)
        warnings.warn(MujaxWarning(said), stacklevel=2)
    return mup


def audit(model: Any, base: Any, *inputs: Any, **kwargs: Any) -> tuple[Finding, ...]:
    """What in a model scales with width and can't be put right, as data: for a test of the user's own.

    Args:
        model: as for `mup_init`.
        base: as for `mup_init`.
        *inputs: as for `mup_init`.
        **kwargs: as for `mup_init`.

    Returns:
        The findings; empty where the model trains in µP as it stands.

    Raises:
        MujaxError: as `mup_init` does.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MujaxWarning)
        return mup_init(model, base, *inputs, **kwargs).findings


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
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
    _stored: Mapping[str, float]
    _example: tuple[Any, Any, Call]
    _result: Any
    _off: frozenset[Kind]
    _inputs: tuple[Any, ...]
    _kwargs: dict[str, Any]
    _multipliers: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        return f"MupModel({len(self.spec)} parameters, parametrization={str(self.spec.parametrization)!r})"

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
        inputs = inputs or _concrete(self._inputs)
        variables = self._target.init(key, inputs, {**_concrete(self._kwargs), **kwargs})

        def scale(path: str, leaf: Any) -> Any:
            factor = self.init_scales.get(path, 1.0)
            if factor == 0.0:
                return jnp.zeros_like(leaf)
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
        entry = self._entry(call)
        if not self._may_correct:
            if not entry:
                return self._target.finish(variables, call.function(*call.leaves))
            hooks: dict[EqnPath, forward.Hook] = {}
            program, shape = _trace(call)
        else:
            twin = shrink(self._base, self._target, variables, inputs, kwargs, call, self._sizes)
            base, _ = _trace(twin)
            program, shape = _trace(call)
            hooks = self._hooks(read_call(self.spec, self._off, self._stored, base, program, call))
        leaves = [
            leaf if (factor := entry.get(position)) is None else leaf * jnp.asarray(factor, leaf.dtype)
            for position, leaf in enumerate(call.leaves)
        ]
        outs = forward.evaluate(program, leaves, hooks)
        return self._target.finish(variables, jax.tree.unflatten(jax.tree.structure(shape), outs))

    def with_multipliers(
        self, *, output_mult: Any = None, attention_mult: Any = None, input_mult: Any = None
    ) -> MupModel:
        """The model with further constants in the forward pass: the paper's µTransferable multipliers.

        They are tuned at the base and transferred; each may be a traced value, so that a sweep can be
        vmapped over it. Where one is left out it stays what it was, 1 at first.

        Args:
            output_mult: multiplies each product with a kernel that is an output of the model.
            attention_mult: multiplies attention logits: each product of two activations that goes into an
                exponential.
            input_mult: multiplies each lookup of an embedding and each product with an input weight.

        Reference:
            Tensor Programs V, Section 2 and Appendix D: alpha_output, alpha_attn, alpha_input.
        """
        given = {"output_mult": output_mult, "attention_mult": attention_mult, "input_mult": input_mult}
        chosen = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(self, _multipliers={**self._multipliers, **chosen})

    @functools.cached_property
    def _reading(self) -> Reading:
        return read_call(self.spec, self._off, self._stored, *self._example)

    @property
    def corrections(self) -> tuple[Correction, ...]:
        """What the forward pass gets in the traced call, in program order."""
        return self._reading.in_order()

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What the traced call does that can't be put right, or can't be seen."""
        return self._reading.findings

    @functools.cached_property
    def replay(self) -> Replay:
        """The traced call as pure functions: for checks and sweeps, whatever kind the model is of."""
        _, program, call = self._example
        return Replay(
            program=program,
            call=call,
            result=self._result,
            hooks=self._hooks(self._reading),
            entry=self._entry(call),
            variables=lambda key: self._target.leaves(self.init(key)),
            inputs=self._inputs,
            analysis=self._reading.analysis,
        )

    def explain(self) -> str:
        """The role table, the corrections and what was left alone, as text to read."""
        return report.explain(self.spec, self.init_scales, self.corrections, self.findings)

    def _check(self, call: Call) -> None:
        found = {path: tuple(call.leaves[position].shape) for position, path in call.params.items()}
        for path, param in self.spec.items():
            if path not in found:
                raise SpecMismatchError(
                    f"{path}: expected a parameter of shape {param.shape} as in mup_init, found none; pass "
                    "the "
                    "variables that mup.init returns."
                )
            if found[path] != param.shape:
                raise SpecMismatchError(
                    f"{path}: expected shape {param.shape} as in mup_init, got {found[path]}; build the "
                    "variables "
                    "and the MupModel with the same widths."
                )

        for path in found:
            if path not in self.spec:
                raise SpecMismatchError(
                    f"{path}: expected only the parameters that mup_init saw, got another one of shape "
                    f"{found[path]}; pass the variables that mup.init returns."
                )

    def _entry(self, call: Call) -> dict[int, float]:
        """The factors that go on parameters themselves, by position."""
        return {
            position: factor
            for position, path in call.params.items()
            if rules.on_parameter(param := self.spec[path])
            and (factor := rules.forward_factor(param, self.spec.parametrization)) != 1.0
        }

    @property
    def _may_correct(self) -> bool:
        """Whether the forward pass gets any factor on a product: else there is nothing to trace for."""
        grows = any(param.shape != param.base_shape for param in self.spec.values())
        return bool(self._multipliers) or (grows and rules.mup_share(self.spec.parametrization) > 0)

    def _hooks(self, reading: Reading) -> dict[EqnPath, forward.Hook]:
        factors: dict[EqnPath, list[Any]] = {}
        for site, corrections in reading.corrections.items():
            factor = math.prod(correction.factor for correction in corrections)
            if factor != 1.0:
                factors.setdefault(site, []).append(factor)
        for name, value in self._multipliers.items():
            for site in reading.knobs[name]:
                factors.setdefault(site, []).append(value)
        return {
            site: forward.Multiply(tuple(values), reading.analysis.activations.get(site))
            for site, values in factors.items()
        }


# ---- tracing ---------------------------------------------------------------------------------------


def _concrete(tree: Any) -> Any:
    """Zeros for the arguments of which only the shape was given."""
    return jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf,
        tree,
    )


def _trace(call: Call) -> tuple[Any, Any]:
    return jax.make_jaxpr(call.function, return_shape=True)(*call.leaves)


def _same_structure(name: str, target: Initial, base: Initial) -> None:
    big, small = target.shapes(target.params), base.shapes(base.params)
    for path in (*small, *big):
        if path not in big or path not in small:
            where, other = ("base", name) if path in small else (name, "base")
            raise ShapeMismatchError(
                f"{path}: expected the same parameters in base and {name}, found it in the {where} only and "
                "not in "
                f"the {other}; they may differ in widths, not in depth or in kinds of layers."
            )
        if len(big[path]) != len(small[path]):
            raise ShapeMismatchError(
                f"{path}: expected the same rank in base and {name}, found shape {small[path]} in the base "
                "and "
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
                f"{path}: expected the delta to differ from the base wherever the target does, but target "
                f"{shape} "
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
            f"roles: expected globs that match parameters, but {pattern!r} matches none of them; the first "
            "is "
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
    if role == "finite" and infinite:
        raise RoleError(
            f"{path}: expected no axis that grows with width for a finite weight, found axes {infinite} of "
            f"shape {shape} growing; say 'input' to keep the base's initial values and Adam learning rate."
        )
    if role == "hidden":
        if len(infinite) < 2:
            raise RoleError(
                f"{path}: expected two axes that grow with width for a hidden weight, found {len(infinite)} "
                f"in shape {shape}; give a ParamSpec."
            )
        # Flax's own layout, and only because the user asked for it: outputs last.
        inside = tuple(axis for axis in axes if axis != infinite[-1])
    else:
        inside = infinite if role == "output" else tuple(axis for axis in axes if axis not in infinite)
    return ParamSpec(
        shape,
        base,
        fan_in=inside,
        fan_out=tuple(axis for axis in axes if axis not in inside),
        infinite=infinite,
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
                f"{large}: expected an initialiser whose scale shows in its program, or a parameter of at "
                "most "
                f"{_SAMPLE_LIMIT} entries to sample, got shape {shapes[large]}; use an initialiser of "
                "jax.nn.initializers."
            )
        with jax.ensure_compile_time_eval():
            key = jax.random.key(0)
            pairs = zip(
                unknown,
                base_end.sample_init(inputs, kwargs, key, unknown),
                target_end.sample_init(inputs, kwargs, key, unknown),
                strict=True,
            )
            scales |= {path: _root_mean_squares(small, big) for path, small, big in pairs}
    return {path: 1.0 if scale is None else scale for path, scale in scales.items()}


def _stored_scales(target: Initial, base: Initial) -> dict[str, float]:
    """How the constants scale that the model holds as state: `self.scale = jnp.sqrt(width)` in NNX."""
    if not target.state:
        return {}
    traced = read_constants(base.program, target.program)
    scales = {path: traced[position] for position, path in target.state.items()}
    return {path: scale for path, scale in scales.items() if scale}


def _root_mean_squares(base: Any, target: Any) -> float:
    small, big = (
        float(jnp.sqrt(jnp.mean(jnp.square(jnp.abs(x).astype(jnp.float32))))) for x in (base, target)
    )
    return big / small if small else 0.0
