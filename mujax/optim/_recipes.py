"""Puts optax's optimizers together in µP, from their entries in the registry.

Most are optax's own, run in other units (`_rescale.rescaled`). Where weight decay or a parameter's norm is in
the middle of a chain, the chain is written out, with the states of optax's chain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

import optax
from jax.core import Tracer

from mujax import rules
from mujax.errors import ConfigError, ParametrizationError
from mujax.optim._decay import Decay, decay_multiples, decayed_weights, is_zero, strength
from mujax.optim._registry import Entry, Units
from mujax.optim._rescale import (
    Factors,
    LrMults,
    factors,
    grouped,
    lr_multiples,
    lr_rule,
    matching,
    product,
    ratio,
    rescaled,
    with_lr_multiples,
)
from mujax.spec import MupSpec, Role

Alignment = Literal["full", "none"]

L2_REASON: Final = (
    "an L2 gradient inside of an adaptive optimizer: the gradient of the loss shrinks with width and λθ does "
    "not, so that it takes over as width grows (TP5, arXiv 2203.03466, Appendix B.3)"
)


@dataclasses.dataclass(frozen=True)
class Options:
    """The keywords that µP adds to optax's."""

    scale_eps: bool = True
    decay: Decay = "independent"
    decay_roles: Sequence[Role] | None = None
    peak_learning_rate: Any = None
    lr_mults: LrMults | None = None
    alignment: Alignment = "full"
    zero_init: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class _Scales:
    """How the inputs of an optimizer scale, over the base's: the rules' numbers by path."""

    adam: Factors
    sgd: Factors
    gradient: Factors
    param: Factors
    norm: Factors
    normalized: Factors

    @classmethod
    def of(cls, spec: MupSpec, options: Options) -> _Scales:
        adam, normalized = factors(spec, lr_rule("adam")), factors(spec, lr_rule("normalized"))
        param = factors(spec, rules.param_scale)
        for path in _zero_init(spec, options.zero_init):
            # Its entries are sums of updates and scale as they do: with Adam's rate.
            param[path], normalized[path] = adam[path], 1.0
        if options.alignment == "none":
            normalized = product(normalized, factors(spec, rules.unaligned))
        return cls(
            adam=adam,
            sgd=factors(spec, lr_rule("sgd")),
            gradient=factors(spec, rules.gradient_scale),
            param=param,
            norm=factors(spec, rules.norm_scale),
            normalized=normalized,
        )


def _zero_init(spec: MupSpec, patterns: Sequence[str]) -> list[str]:
    """The paths that the globs of `zero_init` match.

    Raises:
        ConfigError: a pattern that matches no parameter.
    """
    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        paths = matching(spec, pattern)
        if not paths:
            raise ConfigError(
                where="zero_init",
                expected="globs that match parameters",
                got=f"{pattern!r}, which matches none; the first parameter is {next(iter(spec), None)!r}",
            )
        found += paths
    return found


def _inverse(*several: Factors) -> dict[str, Any]:
    return {path: 1 / factor for path, factor in product(*several).items()}


@dataclasses.dataclass(frozen=True)
class Build:
    """An optimizer, or one of optax's transforms, with its arguments.

    Attributes:
        name: of the optimizer.
        entry: its entry in the registry.
        spec: the parameters.
        rate: the learning rate, in a tuple; empty for a transform, which has none.
        theirs: optax's own keyword arguments.
        options: ours.
        make: optax's own function.
    """

    name: str
    entry: Entry
    spec: MupSpec
    rate: tuple[Any, ...]
    theirs: Mapping[str, Any]
    options: Options
    make: Callable[..., optax.GradientTransformation]

    @property
    def family(self) -> rules.Family:
        """The family whose learning rates it takes, with these arguments."""
        scaled = self.theirs.get("multiply_by_parameter_scale", True)
        return "adam" if self.entry.layout == "adafactor" and not scaled else self.entry.family

    def multiples(self) -> dict[str, float]:
        """The multiple of each parameter's decay."""
        options = self.options
        return decay_multiples(self.spec, options.decay, lr_rule(self.family), options.decay_roles)

    def strength(self) -> Any:
        """The weight decay that goes in front of the learning rate."""
        assert self.entry.decay is not None
        given = self.theirs[self.entry.decay[0]]
        if is_zero(given):
            return given
        options = self.options
        if options.decay == "decoupled" and not self.rate:
            raise ConfigError(
                where=f"mup_{self.name}",
                expected='decay="independent" or "coupled"',
                got='"decoupled", which needs the learning rate to free the decay from',
                remedy="use the optimizer and not the transform, or mujax.mup_add_decayed_weights",
            )
        rate = self.rate[0] if self.rate else None
        return strength(given, options.decay, rate, options.peak_learning_rate)

    def decayed(self) -> optax.GradientTransformation:
        """The stage of the chain that decays."""
        assert self.entry.decay is not None
        _, mask = self.entry.decay
        return decayed_weights(self.spec, self.strength(), mask and self.theirs[mask], self.multiples())


def _whole(build: Build) -> optax.GradientTransformation:
    """Optax's optimizer or transform as it is, in its units."""
    entry, spec, theirs = build.entry, build.spec, dict(build.theirs)
    gradient, params, update = _UNITS[entry.units](_Scales.of(spec, build.options), spec, entry.family)
    if not build.options.scale_eps and entry.units in ("entry", "norm"):
        gradient = {}
    mults = lr_multiples(spec, build.options.lr_mults)
    if entry.units == "displacement":
        update = product(update, mults)
        if any(isinstance(factor, int | float) and factor == 0 for factor in update.values()):
            raise ParametrizationError(
                where="lr_mults",
                expected=f"multiples above 0 for {build.name}, which measures parameters in steps",
                got=0,
                remedy="use optax.partition with optax.set_to_zero() for parameters that must not move",
            )
        mults, params = {}, _inverse(update)
    keyword = entry.decay and entry.decay[0]
    if keyword in theirs and not is_zero(theirs[keyword]):
        if entry.l2 and not isinstance(theirs[keyword], Tracer):
            raise ConfigError(
                where=f"mup_{build.name}",
                expected=f"{keyword} to be 0",
                got=L2_REASON,
                remedy=f"decay the weights after it: optax.chain(mujax.mup_{entry.transform}(spec), "
                "mujax.mup_add_decayed_weights(spec, λ), optax.scale_by_learning_rate(η))",
            )
        theirs[keyword] = build.strength()
        if entry.units != "displacement":
            # The update's factor and the learning rate multiply the decay too.
            params = ratio(build.multiples(), update)
    tx = rescaled(build.make(*build.rate, **theirs), spec, gradient=gradient, params=params, update=update)
    return rescaled(tx, spec, update=mults) if mults else tx


_SeenAs = tuple[Factors, Factors, Factors]
_UNITS: Final[Mapping[Units, Callable[[_Scales, MupSpec, rules.Family], _SeenAs]]] = {
    "entry": lambda s, spec, family: (_inverse(s.gradient), {}, factors(spec, lr_rule(family))),
    "sign": lambda s, spec, family: ({}, {}, factors(spec, lr_rule(family))),
    "linear": lambda s, spec, family: ({}, {}, factors(spec, lr_rule(family))),
    "noise": lambda s, spec, family: (ratio(s.sgd, s.param), {}, s.param),
    "norm": lambda s, spec, family: (_inverse(s.gradient, s.norm), {}, factors(spec, lr_rule(family))),
    "displacement": lambda s, spec, family: (_inverse(s.gradient), _inverse(s.adam), s.adam),
}
"""The factors on gradients, parameters and updates, for each kind of units."""


def _scaled_last(build: Build) -> optax.GradientTransformation:
    """The stage of the learning rate, with the user's own multiples."""
    tx = optax.scale_by_learning_rate(build.rate[0])
    return with_lr_multiples(tx, build.spec, build.options.lr_mults)


def _refuse_decoupled(build: Build) -> None:
    if build.options.decay == "decoupled" and not is_zero(build.strength()):
        raise ConfigError(
            where=f"mup_{build.name}",
            expected='decay="independent" or "coupled"',
            got='"decoupled": its decay is inside of the trust ratio, which sets the length of the whole '
            "step by the learning rate",
            remedy="decay outside of it with mujax.mup_add_decayed_weights",
        )


def _lars(build: Build) -> optax.GradientTransformation:
    """In units of norms: of the gradient, and of the parameter's initial values."""
    _refuse_decoupled(build)
    spec, theirs, scales = build.spec, build.theirs, _Scales.of(build.spec, build.options)
    own = product(scales.param, scales.norm)
    gradient = _inverse(scales.gradient, scales.norm)
    if not build.options.scale_eps:
        own, gradient = dict.fromkeys(own, 1.0), {}
    inside = ratio(build.multiples(), product(own, scales.normalized))
    trust = optax.masked(
        optax.scale_by_trust_ratio(trust_coefficient=theirs["trust_coefficient"], eps=theirs["eps"]),
        theirs["trust_ratio_mask"],
    )
    return optax.chain(
        rescaled(
            optax.add_decayed_weights(build.strength(), theirs["weight_decay_mask"]),
            spec,
            gradient=gradient,
            params=inside,
        ),
        rescaled(trust, spec, params=_inverse(own), update=product(own, scales.normalized)),
        optax.scale_by_learning_rate(build.rate[0]),
        with_lr_multiples(optax.trace(theirs["momentum"], theirs["nesterov"]), spec, build.options.lr_mults),
    )


def _lamb(build: Build) -> optax.GradientTransformation:
    """Adam's direction in the base's units, the trust ratio in units of the parameter's initial values."""
    _refuse_decoupled(build)
    spec, scales = build.spec, _Scales.of(build.spec, build.options)
    keywords = {name: build.theirs[name] for name in ("b1", "b2", "eps", "eps_root")}
    gradient = _inverse(scales.gradient) if build.options.scale_eps else {}
    inside = ratio(build.multiples(), product(scales.param, scales.normalized))
    return optax.chain(
        rescaled(optax.scale_by_adam(**keywords), spec, gradient=gradient),
        rescaled(optax.add_decayed_weights(build.strength(), build.theirs["mask"]), spec, params=inside),
        rescaled(
            optax.scale_by_trust_ratio(),
            spec,
            params=_inverse(scales.param),
            update=product(scales.param, scales.normalized),
        ),
        _scaled_last(build),
    )


def _fromage(build: Build) -> optax.GradientTransformation:
    """One `optax.fromage` for each learning rate, since the prefactor depends on it."""
    spec, scales, rate = build.spec, _Scales.of(build.spec, build.options), build.rate[0]
    own = product(scales.param, scales.norm)
    gradient = _inverse(scales.gradient, scales.norm)
    if not build.options.scale_eps:
        own, gradient = {}, {}
    rates = product(scales.normalized, lr_multiples(spec, build.options.lr_mults))

    def fromage(factor: Any) -> optax.GradientTransformation:
        if isinstance(factor, int | float) and factor == 1:
            return optax.fromage(rate, **build.theirs)
        own_rate = (lambda step: rate(step) * factor) if callable(rate) else rate * factor
        return optax.fromage(own_rate, **build.theirs)

    return rescaled(
        grouped(fromage), spec, gradient=gradient, params=_inverse(own), update=own, arguments=rates
    )


def _trust_ratio(build: Build) -> optax.GradientTransformation:
    """The transform by itself, for gradients."""
    spec, scales = build.spec, _Scales.of(build.spec, build.options)
    own = product(scales.param, scales.norm)
    gradient = _inverse(scales.gradient, scales.norm)
    if not build.options.scale_eps:
        own, gradient = dict.fromkeys(own, 1.0), {}
    tx = rescaled(
        build.make(**build.theirs),
        spec,
        gradient=gradient,
        params=_inverse(own),
        update=product(own, scales.normalized),
    )
    return with_lr_multiples(tx, spec, build.options.lr_mults)


def _adafactor(build: Build) -> optax.GradientTransformation:
    """Optax's chain; the factor comes last but for momentum and decay."""
    spec, theirs, scales = build.spec, build.theirs, _Scales.of(build.spec, build.options)
    own, gradient = scales.param, _inverse(scales.gradient)
    update = product(own, scales.normalized)
    if not build.options.scale_eps:
        own, gradient = {}, {}
        update = factors(spec, lr_rule(build.family))
    stages: list[optax.GradientTransformation] = [
        rescaled(
            optax.scale_by_factored_rms(
                theirs["factored"],
                theirs["decay_rate"],
                theirs["decay_offset"],
                theirs["min_dim_size_to_factor"],
                theirs["eps"],
            ),
            spec,
            gradient=gradient,
        )
    ]
    if theirs["clipping_threshold"] is not None:
        stages.append(optax.clip_by_block_rms(theirs["clipping_threshold"]))
    if build.rate[0] is not None:
        stages.append(optax.scale_by_learning_rate(build.rate[0], flip_sign=False))
    if theirs["multiply_by_parameter_scale"]:
        stages.append(rescaled(optax.scale_by_param_block_rms(), spec, params=_inverse(own)))
    stages[-1] = rescaled(stages[-1], spec, update=update)
    if theirs["momentum"] is not None:
        stages.append(optax.ema(theirs["momentum"], debias=False, accumulator_dtype=theirs["dtype_momentum"]))
    if theirs["weight_decay_rate"] is not None:
        stages.append(_adafactor_decay(build))
    stages.append(with_lr_multiples(optax.scale(-1), spec, build.options.lr_mults))
    return optax.chain(*stages)


def _adafactor_decay(build: Build) -> optax.GradientTransformation:
    """Free of the learning rate, which comes before it; `"decoupled"` adds the schedule's shape."""
    given: Any = build.theirs["weight_decay_rate"]
    rate: Any = build.rate[0]
    if build.options.decay == "decoupled" and callable(rate):
        inverse: Any = strength(1.0, "decoupled", build.rate[0], build.options.peak_learning_rate)

        own: Callable[[Any], Any] = given if callable(given) else lambda _: given

        def shaped(step: Any) -> Any:
            return own(step) * rate(step) * inverse

        return decayed_weights(build.spec, shaped, build.theirs["weight_decay_mask"], build.multiples())
    return decayed_weights(build.spec, given, build.theirs["weight_decay_mask"], build.multiples())


def _schedule_free(build: Build) -> optax.GradientTransformation:
    """Optax's averages around the plain optimizer in µP."""
    spec, theirs, rate = build.spec, dict(build.theirs), build.rate[0]
    update = factors(spec, lr_rule(build.family))
    warmup = theirs.pop("warmup_steps")
    base = build.strength()
    if warmup is not None:
        rate = optax.warmup_constant_schedule(init_value=0, peak_value=rate, warmup_steps=warmup)
    if build.family == "adam":
        scales = _Scales.of(spec, build.options)
        rms = optax.scale_by_rms(
            decay=theirs["b2"], eps=theirs["eps"], eps_in_sqrt=False, bias_correction=True
        )
        gradient = _inverse(scales.gradient) if build.options.scale_eps else {}
        inner = optax.chain(
            rescaled(rms, spec, gradient=gradient, update=update),
            decayed_weights(spec, base, None, build.multiples()),
            optax.scale_by_learning_rate(rate),
        )
    elif theirs["weight_decay"] is None:
        inner = rescaled(optax.sgd(rate), spec, update=update)
    else:
        decayed = optax.add_decayed_weights(base)
        inner = optax.chain(
            rescaled(decayed, spec, gradient=update, params=build.multiples()), optax.sgd(rate)
        )
    return optax.contrib.schedule_free(
        with_lr_multiples(inner, spec, build.options.lr_mults),
        learning_rate=rate,
        b1=theirs["b1"],
        weight_lr_power=theirs["weight_lr_power"],
        state_dtype=theirs["state_dtype"],
    )


def _sophia(build: Build) -> optax.GradientTransformation:
    """Gradients in the base's units, the Hessian in those of a gradient over a step."""
    spec, scales, theirs = build.spec, _Scales.of(build.spec, build.options), dict(build.theirs)
    gradient = scales.gradient if build.options.scale_eps else dict.fromkeys(scales.gradient, 1.0)
    theirs["hessian_diagonal_fn"] = rescaled(
        theirs["hessian_diagonal_fn"], spec, gradient=gradient, update=ratio(scales.adam, gradient)
    )
    # Optax has the transform in the optimizer only: the rest of its chain is made to do nothing.
    whole: Any = build.make(-1.0, **{**theirs, "weight_decay": 0.0, "weight_decay_mask": None})

    def init(params: optax.Params) -> optax.OptState:
        return whole.init(params)[0]

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        nothing = optax.EmptyState()
        updates, (state, *_) = whole.update(updates, (state, nothing, nothing), params, **extra_args)
        return updates, state

    first = optax.GradientTransformationExtraArgs(init, update)
    return optax.chain(
        rescaled(first, spec, gradient=_inverse(gradient), update=scales.adam),
        build.decayed(),
        _scaled_last(build),
    )


LAYOUTS: Final[Mapping[str, Callable[[Build], optax.GradientTransformation]]] = {
    "whole": _whole,
    "lars": _lars,
    "lamb": _lamb,
    "fromage": _fromage,
    "adafactor": _adafactor,
    "schedule_free": _schedule_free,
    "sophia": _sophia,
    "trust_ratio": _trust_ratio,
}
"""The functions that put an optimizer together."""
