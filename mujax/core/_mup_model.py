"""`MupModel`: a model in µP, with its initialisation, forward pass and description."""

from __future__ import annotations

import collections
import dataclasses
import functools
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend import core as jex
from jax.sharding import PartitionSpec

from mujax import rules
from mujax._arguments import MESH_SIZES, NONE, RULES, SCALAR, takes
from mujax.core._corrections import Correction, Kind, Plan, plan_call
from mujax.core._explain import Split, explain
from mujax.core._meshes import check_same_places
from mujax.core._moves import Move, move_out
from mujax.core._other_calls import FirstCall
from mujax.core._partition import Rules, partition, sizes_of
from mujax.core._replay import Replay
from mujax.core.depth import Depth
from mujax.core.frontends import Annotation, Call, Frontend, Result, base_call, on_one_device
from mujax.core.program import (
    ClosedJaxpr,
    EqnPath,
    Insertion,
    blocked,
    equation_at,
    evaluate,
    source_line,
    under_named_axes,
)
from mujax.core.trace import Finding
from mujax.errors import ConfigError, MujaxWarning, SpecMismatchError
from mujax.spec import MupSpec, ParamSpec

_PASS_VARIABLES: Final = "pass the variables that mup.init returns"


@dataclasses.dataclass
class _KnownCall:
    """A call that was traced and read.

    Attributes:
        program: the target's program.
        build: makes the call's result from the program's outputs.
        plan: its corrections; None where it gets none.
        param_factors: factors on the parameters themselves, by position.
        corrected: the program with its corrections, once it is needed again.
    """

    program: ClosedJaxpr
    build: Callable[[Sequence[Any]], Any]
    plan: Plan | None
    param_factors: Mapping[int, float]
    corrected: ClosedJaxpr | None = None


class _KnownCalls:
    """A cache of the calls that were read, so that an eager call is traced once, as a jitted function is.

    The key is the types of the call's arrays, everything else that its function depends on, and the settings
    of JAX that programs are traced under.
    """

    _LIMIT: Final = 64
    _SETTINGS: Final = (
        "jax_enable_x64",
        "jax_default_matmul_precision",
        "jax_numpy_dtype_promotion",
        "jax_numpy_rank_promotion",
        "jax_default_prng_impl",
        "jax_threefry_partitionable",
        "jax_disable_jit",
        "jax_debug_nans",
    )

    def __init__(self) -> None:
        self._calls: collections.OrderedDict[Hashable, _KnownCall] = collections.OrderedDict()
        self._said: set[Finding] = set()

    def report(self, findings: Sequence[Finding]) -> None:
        """Warns of what a new call showed, each thing once."""
        for finding in findings:
            if finding not in self._said:
                self._said.add(finding)
                # The user's line: above are `_read`, its caller in `get`, `get` and `apply`.
                warnings.warn(MujaxWarning(f"{finding.where}: {finding.message}."), stacklevel=6)

    def get(self, call: Call, corrected: bool, read: Callable[[], _KnownCall]) -> tuple[_KnownCall, bool]:
        """A call, read where it is new, and whether it is kept for the next time.

        Args:
            call: the call.
            corrected: whether it is read for corrections.
            read: traces and reads it.
        """
        if under_named_axes():
            # A program may hold the sizes of axes that are no part of the call.
            return read(), False
        settings = tuple(getattr(jax.config, name, None) for name in self._SETTINGS)
        try:
            types = tuple(jax.typeof(leaf) for leaf in call.leaves)
        except TypeError:
            # Not an array; reading the call names it.
            return read(), False
        key = (corrected, call.static, types, settings, jax.sharding.get_abstract_mesh())
        try:
            known = self._calls.get(key)
        except TypeError:
            # A static argument that does not hash.
            return read(), False
        if known is not None:
            return known, True
        known = read()
        # What the model closes over may belong to a transformation that is under way.
        if any(isinstance(const, Tracer) for const in known.program.consts):
            return known, False
        self._calls[key] = known
        if len(self._calls) > self._LIMIT:
            self._calls.popitem(last=False)
        # A traced function runs once: its program is not worth tracing twice.
        return known, not any(isinstance(leaf, Tracer) for leaf in call.leaves)


def _unused(program: ClosedJaxpr) -> frozenset[int]:
    """The positions of inputs that no equation reads."""
    read = {id(atom) for eqn in program.jaxpr.eqns for atom in eqn.invars}
    return frozenset(position for position, var in enumerate(program.jaxpr.invars) if id(var) not in read)


def _concrete(tree: Any) -> Any:
    """Zeros in place of arguments given as shapes."""
    return jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf,
        tree,
    )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MupModel:
    """A model in µP, as `mup_init` returns it.

    Attributes:
        spec: the parameters by path; static and hashable.
        init_scales: the factors on the user's own initial values, by path; parameters that start at zero
            by themselves have no entry.
        init_shifts: what is added to them afterwards, by path, where initial values have a mean: it scales as
            1/fan-in, and the deviation as 1/sqrt(fan-in).
        corrections: the constants of the forward pass in the traced call, in program order.
        findings: what the traced call does that cannot be corrected or read.
        shapes: what `init` returns, as `jax.ShapeDtypeStruct`s; for NNX the module's `nnx.State`.
    """

    spec: MupSpec
    init_scales: Mapping[str, float]
    init_shifts: Mapping[str, float]
    corrections: tuple[Correction, ...]
    findings: tuple[Finding, ...]
    shapes: Any
    _annotations: Mapping[str, Annotation]
    _target: Frontend
    _base: Frontend
    _sizes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    _stored: Mapping[str, float]
    _example: tuple[ClosedJaxpr, Call, Result]
    _plan: Plan
    _disabled: frozenset[Kind]
    _inputs: tuple[Any, ...]
    _kwargs: dict[str, Any]
    _depth: Depth | None = None
    _multipliers: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    _known_calls: _KnownCalls = dataclasses.field(default_factory=lambda: _KnownCalls())

    def __repr__(self) -> str:
        return f"MupModel({len(self.spec)} parameters, parametrization={str(self.spec.parametrization)!r})"

    def init(self, key: Any, *inputs: Any, **kwargs: Any) -> Any:
        """The user's own initialisation, with each parameter scaled to the rule's standard deviation.

        Args:
            key: as for the model's own `init`: a key or a dict of keys (Linen), a key or `nnx.Rngs` (NNX).
            *inputs: example inputs; by default those given to `mup_init`, zeros where only shapes were given.
            **kwargs: passed to the model's `init`, on top of those given to `mup_init`.

        Returns:
            Variables of the same structure as the model's own `init` returns; for NNX the module.
        """
        inputs = inputs or _concrete(self._inputs)
        variables = self._target.init(key, inputs, {**_concrete(self._kwargs), **kwargs})

        def scale(path: str, leaf: Any) -> Any:
            factor = self.init_scales.get(path, 1.0)
            if factor == 0.0:
                return jnp.zeros_like(leaf)
            if factor != 1.0:
                leaf = leaf * jnp.asarray(factor, leaf.dtype)
            shift = self.init_shifts.get(path)
            return leaf if shift is None else leaf + jnp.asarray(shift, leaf.dtype)

        return self._target.scale_params(variables, scale)

    def apply(self, variables: Any, *inputs: Any, **kwargs: Any) -> Any:
        """The model's own `apply`, with the factors of the parametrization in place.

        Same signature and result as the model's. It is traced like a jitted function: Python code in the
        model sees shapes, not numbers.

        Args:
            variables: as `init` returns them. For NNX the module; its other state (batch statistics, rng
                counts) is updated as calling it would.
            *inputs: as for the model.
            **kwargs: as for the model.

        Returns:
            The result of the model's own call.

        Raises:
            SpecMismatchError: the variables do not have the shapes that `mup_init` saw.
        """
        call = self._target.call(variables, inputs, kwargs)
        if not (self._may_correct or self._may_scale):
            self._check(call)
            return self._target.finish(variables, call.function(*call.leaves))
        known, again = self._known_calls.get(
            call, self._may_correct, lambda: self._read(call, variables, inputs, kwargs)
        )
        if again and not self._multipliers:
            outs = self._corrected(known, call)(*call.leaves)
        else:
            outs = self._evaluate(known, call.leaves)
        return self._target.finish(variables, known.build(outs))

    def _evaluate(self, known: _KnownCall, leaves: Sequence[Any]) -> list[Any]:
        scaled = [
            leaf
            if (factor := known.param_factors.get(position)) is None
            else leaf * jnp.asarray(factor, leaf.dtype)
            for position, leaf in enumerate(leaves)
        ]
        insertions = {} if known.plan is None else self._insertions(known.program, known.plan)
        return evaluate(known.program, scaled, insertions)

    def _corrected(self, known: _KnownCall, call: Call) -> Callable[..., list[Any]]:
        """The call's program with its corrections, built once: each scan keeps its compiled body."""
        if known.corrected is None:
            known.corrected = jax.make_jaxpr(lambda *leaves: self._evaluate(known, leaves))(*call.leaves)
        return jex.jaxpr_as_fun(known.corrected)

    def _read(self, call: Call, variables: Any, inputs: Sequence[Any], kwargs: dict[str, Any]) -> _KnownCall:
        """Traces a call at both widths and reads its corrections."""
        self._check(call)
        program, result = call.trace()
        plan = None
        if self._may_correct:
            small = base_call(
                self._base, self._target, variables, inputs, kwargs, call, self._sizes, _unused(program)
            )
            base, _ = small.trace()
            read = program
            if small.one_device:
                read, _ = on_one_device(call).trace()
                check_same_places(program, read)
            plan = plan_call(self.spec, self._disabled, self._stored, base, read, call, self._depth)
            self._known_calls.report(self._first_call.differences(read, plan))
        return _KnownCall(program, result.build, plan, self._param_factors(call))

    @takes(output_mult=SCALAR | NONE, attention_mult=SCALAR | NONE, input_mult=SCALAR | NONE)
    def with_multipliers(
        self, *, output_mult: Any = None, attention_mult: Any = None, input_mult: Any = None
    ) -> MupModel:
        """The model with further constants in the forward pass: the paper's µTransferable multipliers.

        They are tuned at the base and transferred; each may be a traced value, so that a sweep can be
        vmapped over it. One that is left out keeps its value, 1 at first.

        Args:
            output_mult: multiplies each product with a kernel that is an output of the model.
            attention_mult: multiplies attention logits: each product of two activations that goes into an
                exponential.
            input_mult: multiplies each lookup of an embedding and each product with an input weight.

        Raises:
            ConfigError: when the model is applied, where a product to multiply is inside of a function with
                its own derivative (`jax.custom_vjp`), and no factor outside of it does the same.

        Reference:
            Tensor Programs V, Section 2 and Appendix D: alpha_output, alpha_attn, alpha_input.
        """
        given = {"output_mult": output_mult, "attention_mult": attention_mult, "input_mult": input_mult}
        chosen = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(self, _multipliers={**self._multipliers, **chosen})

    @functools.cached_property
    def _first_call(self) -> FirstCall:
        program, *_ = self._example
        return FirstCall(self.spec, program, self._plan)

    @functools.cached_property
    def replay(self) -> Replay:
        """The traced call as pure functions, for checks and sweeps of any kind of model."""
        program, call, result = self._example
        return Replay(
            program=program,
            call=call,
            result=result,
            insertions=self._insertions(program, self._plan),
            param_factors=self._param_factors(call),
            variables=lambda key: self._target.leaves(self.init(key)),
            inputs=self._inputs,
            analysis=self._plan.analysis,
            corrections=self._plan.in_place(),
            multiplier_sites=self._plan.multiplier_sites,
        )

    @takes(mesh=MESH_SIZES | NONE, rules=RULES | NONE)
    def explain(self, mesh: Any = None, rules: Rules | None = None) -> str:
        """The role table, the corrections and the findings, as text.

        Args:
            mesh: as for `partition`, to show how each parameter is split over it; None leaves that out.
            rules: as for `partition`.
        """
        split = None
        if mesh is not None:
            split = Split(sizes_of(mesh), self.partition(mesh, rules), bool(self._annotations))
        return explain(self.spec, self.init_scales, self.init_shifts, self.corrections, self.findings, split)

    @takes(mesh=MESH_SIZES, rules=RULES | NONE)
    def partition(self, mesh: Any, rules: Rules | None = None) -> dict[str, PartitionSpec]:
        """How each parameter is split over a mesh: as the model annotates it, or else by roles and axes.

        Annotations are Linen's boxes (`nn.with_partitioning`, `nn.with_logical_partitioning`), NNX's metadata
        (`nnx.with_partitioning`) and the types of an explicit mesh. In a model without any, `tensor` splits
        pairs of hidden kernels, the first over its fan-out and the second over its fan-in, `fsdp` splits each
        kernel over its largest axis that it divides, and vectors are replicated.

        Args:
            mesh: a mesh, or the sizes of its axes by name.
            rules: pairs of a logical axis name of the model and the mesh axis, or axes, that split it, in
                order of precedence; by default those of `nn.logical_axis_rules` as the model was traced. Or a
                mapping from globs of parameter paths to `PartitionSpec`s, in place of annotations.

        Returns:
            The split of each parameter, by path.

        Raises:
            ConfigError: a name that is no axis of the mesh, or an axis that splits no parameter.
            ShapeMismatchError: an annotated axis of a parameter that the mesh does not divide.

        >>> import mujax, flax.linen as nn
        >>> net = lambda width: nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(10)])
        >>> mup = mujax.mup_init(net(64), net(16), jax.ShapeDtypeStruct((8, 4), "float32"))
        >>> tuple(mup.partition({"fsdp": 8})["layers_0/kernel"])
        (None, 'fsdp')
        """
        return partition(self.spec, self._plan.analysis.flow, self._annotations, sizes_of(mesh), rules)

    def split(self, variables: Any) -> tuple[Any, Any]:
        """Splits what `init` returns into parameters and other state, as the fields of a `TrainState`.

        Args:
            variables: as `init` returns them; for NNX the module.
        """
        return self._target.split(variables)

    def apply_split(
        self, params: Any, state: Any, *inputs: Any, key: Any = None, **kwargs: Any
    ) -> tuple[Any, Any]:
        """`apply` on what `split` returns, as a pure function for any kind of model.

        Args:
            params: the parameters.
            state: the other state.
            *inputs: as for the model.
            key: for every random stream (Linen); an NNX module has its own, in its state.
            **kwargs: as for the model.

        Returns:
            The model's output, and the other state after the call.
        """
        return self._target.run(self.apply, params, state, inputs, key, kwargs)

    def _check(self, call: Call) -> None:
        found = {
            path: tuple(getattr(call.leaves[position], "shape", ())) for position, path in call.params.items()
        }
        for path, param in self.spec.items():
            if path not in found:
                raise SpecMismatchError(
                    where=path,
                    expected=f"a parameter of shape {param.shape} as in mup_init",
                    got="none",
                    remedy=_PASS_VARIABLES,
                )
            if found[path] != param.shape:
                raise SpecMismatchError(
                    where=path,
                    expected=f"shape {param.shape} as in mup_init",
                    got=found[path],
                    remedy="build the variables and the MupModel with the same widths",
                )
        for path in found:
            if path not in self.spec:
                raise SpecMismatchError(
                    where=path,
                    expected="only the parameters that mup_init saw",
                    got=f"another one of shape {found[path]}",
                    remedy=_PASS_VARIABLES,
                )

    def _param_factors(self, call: Call) -> dict[int, float]:
        """The factors on the parameters themselves, by position."""
        return {
            position: factor
            for position, path in call.params.items()
            if (factor := self._param_factor(self.spec[path])) != 1.0
        }

    def _param_factor(self, param: ParamSpec) -> float:
        return rules.forward_factor(param, self.spec.parametrization) if rules.on_parameter(param) else 1.0

    @functools.cached_property
    def _may_scale(self) -> bool:
        """Whether any parameter gets a factor of its own."""
        return any(self._param_factor(param) != 1.0 for param in self.spec.values())

    @functools.cached_property
    def _may_correct(self) -> bool:
        """Whether any product may get a factor; otherwise the call need not be traced."""
        grows = any(param.shape != param.base_shape or param.depth != 1 for param in self.spec.values())
        return bool(self._multipliers) or (grows and rules.mup_share(self.spec.parametrization) > 0)

    def _insertions(self, program: ClosedJaxpr, plan: Plan) -> dict[EqnPath, Insertion]:
        factors: dict[EqnPath, list[Any]] = {}
        operands: dict[EqnPath, list[tuple[int, Any]]] = {}
        outputs: dict[EqnPath, list[tuple[int, Any]]] = {}

        def apply_move(move: Move, factor: Any) -> None:
            site = move.boundary.site
            for number, exponent in move.boundary.operands:
                operands.setdefault(site, []).append((number, factor if exponent == 1 else factor**exponent))
            for number, exponent in move.boundary.outputs:
                outputs.setdefault(site, []).append((number, factor if exponent == 1 else factor**exponent))

        moved: dict[Move, float] = {}
        for site, corrections in plan.corrections.items():
            on_output = 1.0
            for correction in corrections:
                operand = plan.operands.get((site, correction.kind))
                move = plan.moves.get((site, correction.kind))
                if move is not None:
                    moved[move] = correction.factor
                elif operand is None:
                    on_output *= correction.factor
                elif correction.factor != 1.0:
                    operands.setdefault(site, []).append((operand, correction.factor))
            if on_output != 1.0:
                factors.setdefault(site, []).append(on_output)
        for move, factor in moved.items():
            apply_move(move, factor)
        for name, value in self._multipliers.items():
            sites = plan.multiplier_sites[name]
            moves = move_out(program, {(site, name): (None, None) for site in sites})
            for move in dict.fromkeys(moves.values()):
                apply_move(move, value)
            for site in sites:
                if (site, name) in moves:
                    continue
                if block := blocked(program, site):
                    raise ConfigError(
                        where=source_line(equation_at(program, site)),
                        expected=f"the product that {name} multiplies outside of {block}, which would lose "
                        "its own derivative if it were changed, or linear in what that reads or returns",
                        got="it inside",
                        remedy=f"leave out {name}, move the product out of it, or give your own function "
                        "the constant",
                    )
                factors.setdefault(site, []).append(value)
        return {
            site: Insertion(
                tuple(factors.get(site, ())),
                plan.analysis.activations.get(site),
                tuple(operands.get(site, ())),
                tuple(outputs.get(site, ())),
            )
            for site in dict.fromkeys((*factors, *operands, *outputs))
        }
