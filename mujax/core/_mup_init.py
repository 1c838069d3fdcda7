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

from mujax import rules
from mujax.core import _explain as report
from mujax.core._corrections import Correction, Kind, Reading, read_call, switched_off, zeros
from mujax.core._replay import Replay
from mujax.core.depth import (
    Branches,
    Depth,
    find_branches,
    refuse_own_factors,
    refuse_scaled_init,
    scanned_layers,
)
from mujax.core.frontends import Call, Frontend, Initial, frontend, shrink
from mujax.core.program import ClosedJaxpr, EqnPath, Insertion, evaluate
from mujax.core.trace import Analysis, Finding, Use, analyse, read, read_constants, read_scales, resolve
from mujax.errors import (
    AuditError,
    ConfigError,
    DepthError,
    MujaxError,
    MujaxWarning,
    RoleError,
    ShapeMismatchError,
    SpecMismatchError,
)
from mujax.spec import MupSpec, Parametrization, ParamSpec, Role

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
    depth: tuple[int, int] | Literal["scan"] | None = None,
    depth_alpha: float = 1.0,
    residual: Sequence[str] = (),
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
        depth: layers of the base and of the target, to parametrize depth, too; None leaves it alone. A base
            whose layers are unrolled must have the target's number of them, since the two programs are read
            side by side: the two numbers alone count. Where a scan runs the layers the base may have fewer,
            and `"scan"` reads the numbers off. With `depth` base and target may be of the same width; without
            a `delta` nothing is infinite then.
        depth_alpha: each residual branch is multiplied with (target / base)^-depth_alpha: 1 is CompleteP, 1/2
            is Depth-µP.
        residual: the residual branches, as globs of module scopes or of parameters, where they can't be told
            from the program; see also `mujax.residual_branch`.
        strict: raise on any finding of `mup.findings`, that is on anything which can't be put right, where
            otherwise a `MujaxWarning` says it.
        **kwargs: passed to the model with `inputs`.

    Raises:
        ShapeMismatchError: base and target differ in something other than widths, or not at all.
        TraceMismatchError: their programs differ in structure.
        RoleError: the role of a parameter can't be read.
        DepthError: the residual branches can't be told, or they have factors for depth already.
        ConfigError: options that make no sense together.
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
        Yang et al., Tensor Programs V, arXiv 2203.03466, Tables 3, 8 and 9. For depth: Dey et al., arXiv
        2505.01618, Table 1; Yang et al., Tensor Programs VI, arXiv 2310.02244.
    """
    chosen = _with_depth(rules.parametrization(parametrization), depth, depth_alpha, residual)
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
    elif depth is None and target.shapes(target.params) == small.shapes(small.params):
        raise ShapeMismatchError(_SAME_WIDTHS)
    call = read_end.example(big.variables, inputs, kwargs)
    base_call = base_end.example(small.variables, inputs, kwargs)
    base_program, _ = _trace(base_call)
    program, shape = _trace(call)
    state = dict.fromkeys(call.state, 1.0)
    layers = scanned_layers(program, call.params)
    analysis = analyse(base_program, program, call.params, state)
    spec = _spec(target, small, big, analysis, roles or {}, chosen, layers)
    if (
        delta is None
        and depth is None
        and all(param.base_with_layers == param.shape for param in spec.values())
    ):
        raise ShapeMismatchError(_SAME_WIDTHS)
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
    plan = branches = None
    if depth is not None:
        plan = _depth(depth, residual, spec)
        branches = _branches(plan, base_program, base_call, program, call)
        spec = _inside(spec, branches[1], plan)
        refuse_scaled_init(spec, branches[1], plan, own, target.program, target.params)
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
        _depth=plan,
    )
    if plan is not None and branches is not None:
        if "residual" not in off:
            refuse_own_factors(*branches, plan, mup._reading.analysis.fixes, spec)
        mup = dataclasses.replace(mup, _said=_without_rule(branches[1]))
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
    _depth: Depth | None = None
    _said: tuple[Finding, ...] = ()

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
            insertions: dict[EqnPath, Insertion] = {}
            program, shape = _trace(call)
        else:
            twin = shrink(self._base, self._target, variables, inputs, kwargs, call, self._sizes)
            base, _ = _trace(twin)
            program, shape = _trace(call)
            insertions = self._insertions(
                read_call(self.spec, self._off, self._stored, base, program, call, self._depth)
            )
        leaves = [
            leaf if (factor := entry.get(position)) is None else leaf * jnp.asarray(factor, leaf.dtype)
            for position, leaf in enumerate(call.leaves)
        ]
        outs = evaluate(program, leaves, insertions)
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
        return read_call(self.spec, self._off, self._stored, *self._example, self._depth)

    @property
    def corrections(self) -> tuple[Correction, ...]:
        """What the forward pass gets in the traced call, in program order."""
        return self._reading.in_order()

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What the traced call does that can't be put right, or can't be seen."""
        return (*self._said, *self._reading.findings)

    @functools.cached_property
    def replay(self) -> Replay:
        """The traced call as pure functions: for checks and sweeps, whatever kind the model is of."""
        _, program, call = self._example
        return Replay(
            program=program,
            call=call,
            result=self._result,
            insertions=self._insertions(self._reading),
            entry=self._entry(call),
            variables=lambda key: self._target.leaves(self.init(key)),
            inputs=self._inputs,
            analysis=self._reading.analysis,
            corrections=self._reading.corrections,
            knobs=self._reading.knobs,
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
        grows = any(param.shape != param.base_shape or param.depth != 1 for param in self.spec.values())
        return bool(self._multipliers) or (grows and rules.mup_share(self.spec.parametrization) > 0)

    def _insertions(self, reading: Reading) -> dict[EqnPath, Insertion]:
        factors: dict[EqnPath, list[Any]] = {}
        branches: dict[EqnPath, tuple[int, float]] = {}
        for site, corrections in reading.corrections.items():
            kinds = [(correction.factor, correction.kind == "residual") for correction in corrections]
            factor = math.prod(factor for factor, residual in kinds if not residual)
            if factor != 1.0:
                factors.setdefault(site, []).append(factor)
            of_branch = math.prod(factor for factor, residual in kinds if residual)
            if of_branch != 1.0:
                branches[site] = (reading.branches[site], of_branch)
        for name, value in self._multipliers.items():
            for site in reading.knobs[name]:
                factors.setdefault(site, []).append(value)
        return {
            site: Insertion(
                tuple(factors.get(site, ())), reading.analysis.activations.get(site), branches.get(site)
            )
            for site in dict.fromkeys((*factors, *branches))
        }


# ---- depth -----------------------------------------------------------------------------------------

_SAME_WIDTHS = (
    "mup_init: the target has the same widths as the base, so nothing tells which axes are infinite; "
    "pass delta=, the same model at other widths."
)


def _with_depth(
    chosen: Parametrization, depth: Any, alpha: float, residual: Sequence[str]
) -> Parametrization:
    """The parametrization with the exponent of depth, if that is asked for.

    Raises:
        ConfigError: options that make no sense, alone or together.
    """
    if depth is None:
        if residual or alpha != 1.0:
            raise ConfigError(
                "mup_init: expected depth_alpha and residual together with depth=, found them without it; "
                "pass "
                "depth=(layers of the base, layers of the target)."
            )
        return chosen
    if isinstance(residual, str):
        raise ConfigError(
            f"residual: expected a sequence of globs, got the text {residual!r}; put it in a list."
        )
    if not 0.5 <= alpha <= 1:
        raise ConfigError(f"depth_alpha: expected an exponent from 0.5 to 1, got {alpha!r}.")
    return dataclasses.replace(chosen, depth_alpha=float(alpha))


def _depth(said: Any, residual: Sequence[str], spec: MupSpec) -> Depth:
    """How deep base and target are: as said, as the scans say, or both if they agree.

    Raises:
        ConfigError: `said` is neither `"scan"` nor two numbers of layers.
        DepthError: the scans say otherwise, or nothing.
    """
    scanned = {
        (param.base_shape[axis], param.shape[axis]): path
        for path, param in spec.items()
        for axis in param.layers
    }
    if said == "scan":
        if len(scanned) != 1:
            raise DepthError(
                f'depth="scan": expected one pair of numbers of layers in base and target, found '
                f"{sorted(scanned) or 'no scan over layers whose length differs'}; pass depth=(layers of "
                "the base, "
                "layers of the target)."
            )
        said = next(iter(scanned))
    if not (
        isinstance(said, Sequence)
        and len(said) == 2
        and all(isinstance(layers, int) and layers > 0 for layers in said)
    ):
        raise ConfigError(
            f'depth: expected two positive numbers of layers (base, target), "scan" or None, got {said!r}.'
        )
    depth = Depth(said[0], said[1], tuple(residual))
    for (base, target), path in scanned.items():
        if base * depth.target != target * depth.base:
            raise DepthError(
                f"{path}: expected its layers to grow as depth={tuple(said)} says, found {base} in the base "
                "and "
                f"{target} in the target; give both the same numbers."
            )
    return depth


def _branches(depth: Depth, base: Any, base_call: Call, target: Any, call: Call) -> tuple[Branches, Branches]:
    """The residual branches of base and target.

    Raises:
        DepthError: they can't be told, there is none, or they are not the same in both.
    """
    small = find_branches(base, base_call.params, depth.residual)
    big = find_branches(target, call.params, depth.residual)
    if not big.found:
        raise DepthError(
            "depth: expected residual branches, found no addition x + f(x) in the traced call; mark what is "
            "added "
            "with mujax.residual_branch(...), or leave out depth=."
        )
    if [branch.params for branch in small.found] != [branch.params for branch in big.found]:
        raise DepthError(
            f"depth: expected the same residual branches in base and target, found {len(small.found)} and "
            f"{len(big.found)}; build both with the same code."
        )
    return small, big


def _inside(spec: MupSpec, branches: Branches, depth: Depth) -> MupSpec:
    """The spec with what is inside of residual branches as deep as it is."""
    if depth.ratio == 1:
        return spec
    params = dict(spec)
    for path in branches.params:
        # The layers of a scan are layers where base and target have the same number of them, too.
        layers = tuple(axis for axis in params[path].stack if axis in branches.layers.get(path, ()))
        params[path] = dataclasses.replace(params[path], depth=depth.ratio, layers=layers)
    return MupSpec(params, spec.parametrization)


def _without_rule(branches: Branches) -> tuple[Finding, ...]:
    """What the sources have no rule for."""
    findings = []
    if branches.stream:
        path, where = next(iter(branches.stream.items()))
        findings.append(
            Finding(
                "stream parameter",
                f"{_and_others(path, len(branches.stream))} acts on the residual stream in each layer (a "
                "norm after the addition), where the sources know no rule for depth; it keeps the base's "
                "learning rate. Normalise inside of the branch instead",
                where,
            )
        )
    if branches.shared:
        path, count = next(iter(branches.shared.items()))
        where = next(branch.where for branch in branches.found if path in branch.params)
        findings.append(
            Finding(
                "shared layer",
                f"{_and_others(path, len(branches.shared))} is used in {count} residual branches, where the "
                "sources know rules for layers with parameters of their own; it gets the factors of one of "
                "these. Give each layer its own parameters",
                where,
            )
        )
    return tuple(findings)


def _and_others(path: str, count: int) -> str:
    return path if count == 1 else f"{path} (and {count - 1} others)"


# ---- tracing ---------------------------------------------------------------------------------------


def _concrete(tree: Any) -> Any:
    """Zeros for the arguments of which only the shape was given."""
    return jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf,
        tree,
    )


def _trace(call: Call) -> tuple[ClosedJaxpr, Any]:
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
    layers: Mapping[str, frozenset[int]],
) -> MupSpec:
    """Puts together what the traces say and what the user says."""
    small, read_shapes = base.shapes(base.params), reading.shapes(reading.params)
    unused = set(overrides)
    params: dict[str, ParamSpec] = {}
    for path, shape in target.shapes(target.params).items():
        found, deep = read_shapes[path], layers.get(path, frozenset[int]())
        # With the target's number of layers, so that what differs is width.
        wide = tuple(
            n if axis in deep else m for axis, (n, m) in enumerate(zip(found, small[path], strict=True))
        )
        infinite = tuple(axis for axis, (n, m) in enumerate(zip(found, wide, strict=True)) if n != m)
        growing = [
            axis
            for axis, (n, m) in enumerate(zip(shape, small[path], strict=True))
            if n != m and axis not in deep
        ]
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
            seen = resolve(path, found, wide, uses)
        else:
            seen = _with_role(path, override, found, wide, infinite, uses)
        params[path] = _stacked(seen, shape, small[path], deep)
    if unused:
        pattern = sorted(unused)[0]
        raise RoleError(
            f"roles: expected globs that match parameters, but {pattern!r} matches none of them; the first "
            "is "
            f"{next(iter(params), None)!r}."
        )
    return MupSpec(params, chosen)


def _stacked(
    seen: ParamSpec, shape: tuple[int, ...], base: tuple[int, ...], layers: frozenset[int]
) -> ParamSpec:
    """The spec at the target's sizes; layers are copies, and count as layers where their number differs."""
    differs = tuple(axis for axis in sorted(layers) if shape[axis] != base[axis])
    return dataclasses.replace(
        seen,
        shape=shape,
        base_shape=base,
        fan_in=tuple(axis for axis in seen.fan_in if axis not in differs),
        fan_out=tuple(axis for axis in seen.fan_out if axis not in differs),
        stack=tuple(sorted({*seen.stack, *differs})),
        layers=differs,
    )


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
