"""`mup_init`: reads a model's parametrization off its traces and returns the model in µP."""

from __future__ import annotations

import dataclasses
import fnmatch
import warnings
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Final, Literal

from mujax import rules
from mujax._arguments import (
    FLAG,
    GLOBS,
    NONE,
    NUMBER,
    TEXTS,
    Kind as ArgumentKind,
    check_arguments,
    several,
)
from mujax.core._corrections import Kind, Plan, disabled_kinds, plan_call, zero_params
from mujax.core._init_scales import init_shifts, initial_values, stored_scales
from mujax.core._meshes import check_same_places, other_mesh, refuse_own_mesh
from mujax.core._mup_model import MupModel
from mujax.core._param_specs import check_same_parameters, describe_parameters
from mujax.core.depth import (
    findings_of_depth,
    plan_branches,
    plan_depth,
    refuse_own_factors,
    refuse_scaled_init,
    scanned_layers,
    with_depth,
    with_depth_of_branches,
)
from mujax.core.frontends import Call, Frontend, Initial, OneDevice, Result, frontend, is_split
from mujax.core.program import ClosedJaxpr
from mujax.core.trace import Analysis, Finding, Use, analyse, merged
from mujax.errors import AuditError, MujaxError, MujaxWarning, RoleError, ShapeMismatchError
from mujax.spec import MupSpec, Parametrization, ParamSpec, Role


@dataclasses.dataclass(frozen=True)
class _Traced:
    """One of the models, traced.

    Attributes:
        end: its front end.
        initial: its initialiser.
        call: the example call.
        program: the call's program.
        result: the call's result.
    """

    end: Frontend
    initial: Initial
    call: Call
    program: ClosedJaxpr
    result: Result


def _traced(end: Frontend, inputs: Sequence[Any], kwargs: dict[str, Any]) -> _Traced:
    initial = end.trace_init(inputs, kwargs)
    call = end.example(initial.variables, inputs, kwargs)
    return _Traced(end, initial, call, *call.trace())


_OPTIONS: Final = {
    "roles": ArgumentKind(
        "a dict of roles or ParamSpecs by glob of parameter paths",
        lambda value: all(isinstance(role, str | ParamSpec) for role in value.values()),
        '{"*/kernel": "hidden"}',
        RoleError,
    )
    | NONE,
    "corrections": ArgumentKind(
        "a dict of True or False by kind",
        lambda value: all(map(FLAG.accepts, value.values())),
        '{"attention": False}',
    )
    | NONE,
    "zero_init": TEXTS,
    "other_calls": several(
        "a sequence of dicts of keyword arguments",
        ArgumentKind(
            "a dict of keyword arguments", lambda value: isinstance(value, Mapping), '{"train": True}'
        ),
        '({"train": True},)',
    ),
    "depth_alpha": NUMBER,
    "residual": GLOBS,
    "strict": FLAG,
}


def _traced_base(
    end: Frontend, target: _Traced, inputs: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[_Traced, _Traced]:
    """The base, and the target as it is read beside it.

    Where the mesh does not divide the base's widths, both are traced on one device: numbers in the programs
    that depend on the size of the mesh, as in a mean over devices, are then the same in both.

    Raises:
        TraceMismatchError: the model's code names the mesh itself, or does not run on one device.
    """
    try:
        return _traced(end, inputs, kwargs), target
    except MujaxError:
        raise
    except (ValueError, TypeError) as error:
        if not is_split():
            refuse_own_mesh(target.program, error)
            raise
        try:
            small, read = (_traced(OneDevice(one), inputs, kwargs) for one in (end, target.end))
        except MujaxError:
            raise
        except (ValueError, TypeError, AssertionError):
            refuse_own_mesh(target.program, error)
            raise error from None
    check_same_places(target.program, read.program)
    return small, read


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
    other_calls: Sequence[Mapping[str, Any]] = (),
    strict: bool = False,
    **kwargs: Any,
) -> MupModel:
    """Reads the parametrization of a model off its traces, and returns it in µP.

    The model is traced twice, at the base's widths and at the target's; nothing is allocated or run. The
    axes whose sizes differ are infinite; how the program uses each parameter shows which of its axes are
    fan-in and which fan-out. At the base's widths the result is exactly the user's own model.

    Args:
        model: the target: a Flax Linen module, an NNX factory `rngs -> nnx.Module`, or a `Functional`.
        base: the same model at the widths where hyperparameters are tuned.
        *inputs: example inputs, arrays or `jax.ShapeDtypeStruct`s.
        delta: the same model at third widths, to show which axes are infinite where `model` has the base's
            own widths. Without it nothing is infinite there: every factor is 1, and only what requires
            roles (`zero_init`, `decay_roles`, multiples of the learning rate by role, Muon) needs it.
        parametrization: `"mup"` (Table 8), `"table3"`, `"table9"`, `"sp"`, or what
            `mujax.interpolate` returns.
        roles: overrides the roles that were read: glob of parameter paths -> role or `ParamSpec`.
        corrections: kinds of `Correction` to switch off, e.g. `{"attention": False}`.
        zero_init: groups of parameters that start at zero, as the paper's Appendix D.2 recommends:
            `"readout"`, the kernels whose product is an output of the model; `"query"`, those whose product
            is the first operand of attention logits.
        depth: numbers of layers of base and target, to parametrize depth too; None leaves it alone. A base
            whose layers are unrolled is built with the target's number of layers, since the two programs are
            read side by side; only the two numbers given here count. Where a scan runs the layers the base
            may have fewer, and `"scan"` reads the numbers off. With `depth`, base and target may have the
            same width; without a `delta` nothing is infinite then.
        depth_alpha: each residual branch is multiplied by (target / base)^-depth_alpha: 1 is CompleteP, 1/2
            is Depth-µP.
        residual: the residual branches, as globs of module scopes or of parameters, where they cannot be
            determined from the program; see also `mujax.residual_branch`.
        other_calls: further ways in which the model is called, each as the keyword arguments that differ:
            the role of a parameter that the call with `inputs` and `kwargs` does not use, such as a mask
            token, is read off the first of them that uses it.
        strict: raise on any finding, instead of a `MujaxWarning`.
        **kwargs: passed to the model with `inputs`.

    Returns:
        The model in µP: its `init` and `apply` have the signatures of the model's own.

    Raises:
        ShapeMismatchError: base and target differ in something other than widths.
        TraceMismatchError: their programs differ in structure, or the base's widths do not fit a mesh that
            the model's code names.
        RoleError: the role of a parameter cannot be read.
        DepthError: the residual branches cannot be determined, or they have factors for depth already.
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
    check_arguments(
        _OPTIONS,
        {
            "roles": roles,
            "corrections": corrections,
            "zero_init": zero_init,
            "depth_alpha": depth_alpha,
            "residual": residual,
            "other_calls": other_calls,
            "strict": strict,
        },
    )
    table = with_depth(rules.parametrization(parametrization), depth, depth_alpha, residual)
    disabled = disabled_kinds(corrections or {})
    ends = frontend(model, "model"), frontend(base, "base")
    target = _traced(ends[0], inputs, kwargs)
    small, read = _traced_base(ends[1], target, inputs, kwargs)
    check_same_parameters("target", target.initial, small.initial)
    # Where there is a delta, infinite axes and roles are read off it.
    wide = read
    if delta is not None:
        end = frontend(delta, "delta")
        wide = _traced(end if read is target else OneDevice(end), inputs, kwargs)
        check_same_parameters("delta", wide.initial, small.initial)
    analysis = analyse(small.program, wide.program, wide.call.params, dict.fromkeys(wide.call.state, 1.0))
    for more in other_calls:
        uses = _uses_in(small, wide, inputs, {**kwargs, **more})
        analysis = dataclasses.replace(analysis, uses={**uses, **analysis.uses})
    spec = describe_parameters(
        target.initial,
        small.initial,
        wide.initial,
        analysis,
        roles or {},
        table,
        scanned_layers(analysis.flow),
    )
    _refuse_growing_classes(roles or {}, spec, analysis)
    values = initial_values(read.end, small.end, read.initial, small.initial, inputs, kwargs)
    ratios = {path: value.ratio or 0.0 for path, value in values.items()}
    stored = stored_scales(read.initial, small.initial)
    programs = (small.program, read.program, read.call)
    layout, findings = None, ()
    if depth is not None:
        layout = plan_depth(depth, residual, spec)
        if wide is not read:
            analysis = analyse(small.program, read.program, read.call.params)
        branches = plan_branches(layout, analysis.flow)
        spec = with_depth_of_branches(spec, branches, layout)
        refuse_scaled_init(spec, branches, layout, ratios, read.initial.program, read.initial.params)
        findings = findings_of_depth(branches)
        plan = plan_call(spec, disabled, stored, *programs, layout)
        if "residual" not in disabled:
            refuse_own_factors(branches, layout, plan.analysis.fixes, spec)
    else:
        _refuse_layers_alone(spec)
        plan = plan_call(spec, disabled, stored, *programs)
    _refuse_readouts_without_product(roles or {}, spec, plan)
    findings = (*findings, *other_mesh(small.program, read.program, plan))
    if zero_init:
        spec.require_roles("zero_init")
    init_scales = {
        path: rules.init_scale(param, table, ratios[path])
        for path, param in spec.items()
        if ratios[path] != 0
    } | dict.fromkeys(zero_params(zero_init, spec, plan.analysis), 0.0)
    signs = {path: [use.signs for use in uses] for path, uses in analysis.uses.items()}
    shifts = init_shifts(spec, values, signs, small.end, inputs, kwargs)
    mup = MupModel(
        spec=spec,
        init_scales=init_scales,
        init_shifts={path: shift for path, shift in shifts.items() if init_scales.get(path) != 0},
        corrections=plan.in_order(),
        findings=merged(
            (
                *_unused(roles or {}, spec, analysis),
                *findings,
                *plan.findings,
                *_scales_in_initialisers(spec, init_scales, plan),
            )
        ),
        shapes=target.initial.variables,
        _annotations=target.end.annotations(target.initial),
        _target=target.end,
        _base=small.end,
        _sizes=_sizes(target.initial, small.initial),
        _stored=stored,
        _example=(target.program, target.call, target.result),
        _plan=plan,
        _disabled=disabled,
        _inputs=tuple(inputs),
        _kwargs=dict(kwargs),
        _depth=layout,
    )
    if _only_shrinks(spec):
        message = (
            "model: expected a target that is wider than its base, got one that is narrower in every axis "
            "that differs; if the two are swapped, pass the large model first."
        )
        warnings.warn(MujaxWarning(message), stacklevel=2)
    if mup.findings:
        first, *others = mup.findings
        times = "" if first.count == 1 else f" ({first.count} times)"
        more = f" There are {len(others)} more: see mup.findings." if others else ""
        message = f"{first.where}: {first.message}{times}.{more}"
        if strict:
            raise AuditError(message)
        warnings.warn(MujaxWarning(message), stacklevel=2)
    return mup


def _only_shrinks(spec: MupSpec) -> bool:
    """Whether the widths of target and base differ, and each of them is smaller in the target."""
    pairs = [
        pair
        for param in spec.values()
        for pair in zip(param.shape, param.base_with_layers, strict=True)
        if pair[0] != pair[1]
    ]
    return bool(pairs) and all(size < base for size, base in pairs)


def _unused(roles: Mapping[str, Role | ParamSpec], spec: MupSpec, analysis: Analysis) -> list[Finding]:
    """Reports parameters that grow with width and that the traced call does not use."""
    return [
        Finding(
            "unused parameter",
            "the traced call does not use it, so its role is not known and it keeps the base's initial "
            "values and learning rate; give a call that uses it, other_calls=({...},), or its role, "
            f'roles={{"{path}": ...}}',
            path,
        )
        for path, param in spec.items()
        if param.infinite and not analysis.uses.get(path) and not _is_given(path, roles)
    ]


def _uses_in(
    base: _Traced, wide: _Traced, inputs: Sequence[Any], kwargs: dict[str, Any]
) -> Mapping[str, Sequence[Use]]:
    """The uses of the parameters in another call of the same models."""
    calls = [one.end.example(one.initial.variables, inputs, kwargs) for one in (base, wide)]
    (small, _), (big, _) = (call.trace() for call in calls)
    return analyse(small, big, calls[1].params, dict.fromkeys(calls[1].state, 1.0)).uses


def _is_given(path: str, roles: Mapping[str, Role | ParamSpec]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in roles)


def _refuse_readouts_without_product(
    roles: Mapping[str, Role | ParamSpec], spec: MupSpec, plan: Plan
) -> None:
    """Refuses the role of a readout for a parameter without a product that can get its factor."""
    for path, param in spec.items():
        if param.role != "output" or not _is_given(path, roles):
            continue
        uses = plan.analysis.uses.get(path, ())
        products = [use for use in uses if use.kind == "contraction"]
        seen = any(role == "fan_in" for use in products for _, role, *_ in use.axes)
        if not seen and rules.forward_factor(param, spec.parametrization) != 1:
            raise RoleError(
                where=path,
                expected="a product that contracts it over its fan-in, which gets the factor of a readout",
                got=f"only {uses[0].kind} use at {uses[0].where}" if uses else "none in the traced call",
                remedy='write the factor base_fan_in/fan_in in the model and give "hidden" or "input", or '
                "write the product with jnp.dot or jnp.einsum on the parameter itself",
            )


def _refuse_growing_classes(roles: Mapping[str, Role | ParamSpec], spec: MupSpec, analysis: Analysis) -> None:
    """Refuses an output of the model, or logits in it, that grow as no axis does which a layer reads.

    Features of a backbone grow with its layers; the number of classes is no width.
    """
    widths = {
        Fraction(param.shape[axis], param.base_shape[axis])
        for param in spec.values()
        for axis in (*param.fan_in, *param.stack)
    } | {Fraction(*use.contracted[::-1]) for uses in analysis.uses.values() for use in uses}
    for path in analysis.last_params:
        param = spec[path]
        if param.role != "hidden" or _is_given(path, roles) or _feeds_a_layer(path, analysis):
            continue
        for axis in set(param.fan_out) & set(param.infinite):
            size, base = param.shape[axis], param.base_shape[axis]
            if size != base and Fraction(size, base) not in widths:
                raise ShapeMismatchError(
                    where=path,
                    expected=f"{base} entries along axis {axis} as in the base: it reaches an output of the "
                    "model or a softmax and grows as no axis does that a layer reads, so it is no width",
                    got=f"{size} entries",
                    remedy="give base and target the same size there, or say that it is a width with "
                    f'roles={{"{path}": "hidden"}}',
                )


def _scales_in_initialisers(spec: MupSpec, init_scales: Mapping[str, float], plan: Plan) -> list[Finding]:
    """Reports attention logits without a factor, where 1/sqrt(d) is in the initialiser of query or key."""
    unscaled = {finding.where for finding in plan.findings if finding.kind == "unscaled sum"}
    paths: dict[str, list[str]] = {}
    for product in plan.analysis.products:
        if product.where in unscaled:
            own = sorted(product.left | product.right)
            small = [p for p in own if spec[p].role == "hidden" and init_scales.get(p, 1.0) > 1.001]
            paths.setdefault(product.where, []).extend(small)
    return [
        Finding(
            "scale in an initialiser",
            f"{first}'s own initial values shrink {init_scales[first]:.4g} times more from base to target "
            "than 1/sqrt(fan-in) does, as where the 1/sqrt(d) of attention logits is folded into an "
            "initialiser; mup.init brings them to 1/sqrt(fan-in), so these logits grow by that factor with "
            "width; divide the query by d (the size of a head) in the model, and leave d out of the "
            "initialiser",
            where,
            1 + len(others),
        )
        for where, (first, *others) in ((where, found) for where, found in paths.items() if found)
    ]


def _feeds_a_layer(path: str, analysis: Analysis) -> bool:
    """Whether a later product of growing fan-in is computed from a parameter's product: it is no head."""
    reached = {use.site for use in analysis.uses[path]}
    for site, visit in analysis.flow.visits.items():
        if site in reached or not any(operand.origin in reached for operand in visit.operands):
            continue
        if any(
            use.kind == "contraction" and role == "fan_in" and size != base
            for use in visit.uses
            for _, role, size, base in use.axes
        ):
            return True
        reached.add(site)
    return False


def _refuse_layers_alone(spec: MupSpec) -> None:
    """Refuses base and target that differ in their number of layers and in nothing else."""
    for path, param in spec.items():
        if param.layers and not spec.grows:
            base, target = (shape[param.layers[0]] for shape in (param.base_shape, param.shape))
            raise ShapeMismatchError(
                where=path,
                expected="base and target to differ in width or not at all",
                got=f"{base} layers in the base and {target} in the target, of the same widths",
                remedy='pass depth="scan" to parametrize depth, or give both the same number of layers',
            )


def _sizes(target: Initial, base: Initial) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """(target, base) shape of each parameter and of each piece of state, by path."""
    return {
        path: (shape, small[path])
        for big, small in (
            (target.shapes(target.params), base.shapes(base.params)),
            (target.shapes(target.state), base.shapes(base.state)),
        )
        for path, shape in big.items()
    }
