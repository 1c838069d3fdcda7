"""All other optimizers and transforms of optax in µP, generated from the registry."""

from __future__ import annotations

import inspect
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NoReturn

import optax

from mujax import rules
from mujax._arguments import check_arguments
from mujax.errors import ConfigError
from mujax.optim._alias import mup_adam, mup_adamw
from mujax.optim._arguments import kinds_of
from mujax.optim._decay import Mask
from mujax.optim._recipes import LAYOUTS, Build, Options
from mujax.optim._registry import OPTIMIZERS, TRANSFORMS, UNSUPPORTED, Entry
from mujax.spec import MupSpec

Alias = Callable[..., optax.GradientTransformationExtraArgs]

_OWN: Final[Mapping[str, str]] = {
    "scale_eps": "False leaves ε the same for all parameters at all widths, as microsoft/mup does.",
    "decay": (
        '`"independent"`: learning rate times decay does not depend on width. `"coupled"`: it has the '
        "parameter's µP factor. `\"decoupled\"`: the decay is multiplied with the schedule's shape alone, "
        "which is 1 at its peak. See `mup_add_decayed_weights`."
    ),
    "decay_roles": 'the roles that decay, such as `("hidden", "output")`; None for all.',
    "peak_learning_rate": "the rate that a decoupled decay is relative to; None takes the schedule's peak.",
    "lr_mults": (
        "multiples of the learning rate by role, or by glob of parameter paths; those that name the same "
        "parameter are multiplied. They apply to the whole step, decay included, and may be traced values."
    ),
    "alignment": (
        '`"full"`: updates align with the activations, so hidden weights take r_in^-1/2 (arXiv 2310.17813; '
        'arXiv 2407.05872, full alignment). `"none"`: they don\'t align, and the ratio needs no factor '
        "(arXiv 2407.05872, no alignment)."
    ),
    "zero_init": "globs of hidden parameters that start at zero.",
}


def _own_keywords(entry: Entry, theirs: inspect.Signature, *, alias: bool) -> list[str]:
    """The names of the keywords that µP adds."""
    names = []
    if entry.epsilons and entry.units != "displacement":
        names.append("scale_eps")
    if entry.decay is not None and entry.decay[0] in theirs.parameters and not entry.l2:
        names += ["decay", "decay_roles"]
        if alias and not entry.nested:
            names.append("peak_learning_rate")
    names.append("lr_mults")
    if entry.layout == "lamb":
        names.append("alignment")
    if entry.family == "normalized":
        names.append("zero_init")
    return names


def _signature(
    entry: Entry, constructor: Callable[..., Any], *, alias: bool
) -> tuple[inspect.Signature, list[str]]:
    """Optax's signature with the spec in it, after the learning rate, and our keywords at its end."""
    theirs = inspect.signature(constructor)
    parameters = list(theirs.parameters.values())
    spec = inspect.Parameter("spec", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=MupSpec)
    head = [spec]
    if alias:
        rate = parameters.pop(0)
        head.insert(0, rate.replace(default=inspect.Parameter.empty))
    # optax's annotation of a mask has chex's recursive ArrayTree in it, which resolves in chex only.
    parameters = [
        parameter.replace(annotation=Mask) if parameter.name.endswith("mask") else parameter
        for parameter in parameters
    ]
    own, defaults = _own_keywords(entry, theirs, alias=alias), Options()
    types = typing.get_type_hints(Options)
    ours = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=getattr(defaults, name), annotation=types[name]
        )
        for name in own
    ]
    signature = inspect.Signature(
        [*head, *parameters, *ours], return_annotation=optax.GradientTransformationExtraArgs
    )
    return signature, own


def _fill(text: str, indent: str) -> str:
    return textwrap.fill(text, 105, initial_indent=indent, subsequent_indent=indent + "    ")


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 105, break_on_hyphens=False)


def _document(
    entry: Entry, full: str, signature: inspect.Signature, own: Sequence[str], *, alias: bool
) -> str:
    """The docstring: family and rule, constants that are scaled, keywords, sources."""
    first = (
        f"`{full}` in µP: its learning rate, tuned at one width, is right at every other."
        if alias
        else f"`{full}` in µP: its updates have the factors of the tables."
    )
    traits = rules.FAMILY_TRAITS[entry.family]
    body = [
        first,
        _paragraph(
            f"Of the family {entry.family!r}, whose updates are {traits.updates}: {traits.rates} "
            f"(`mujax.rules.TABLES`; {traits.source})."
        ),
    ]
    if entry.note:
        body.append(_paragraph(entry.note))
    if entry.epsilons:
        units = "; ".join(f"{keyword}: {unit}" for keyword, unit in entry.epsilons.items())
        body.append(
            _paragraph(
                f"Constants that scale with the quantity that they are compared with, in units of: {units}."
            )
        )
    arguments = []
    if alias:
        arguments.append("learning_rate: the base model's; the µP factors multiply the updates.")
    arguments.append("spec: the parameters, as `mup_init` describes them.")
    ours = {"spec", *own, *(("learning_rate",) if alias else ())}
    theirs = [known for known in signature.parameters if known not in ours]
    if theirs:
        arguments.append(f"{', '.join(theirs)}: as in `{full}`, with its defaults.")
    arguments += [f"{known}: {_OWN[known]}" for known in own]
    body.append("Args:\n" + "\n".join(_fill(argument, "    ") for argument in arguments))
    body.append(f"Returns:\n    A transform whose state is that of `{full}`.")
    errors = [
        "SpecMismatchError: on `init` or `update`, when the tree is not the one that `spec` describes.",
        "ParametrizationError: an unknown role, or a pattern that matches no parameter.",
    ]
    if entry.l2:
        errors.append("ConfigError: weight decay, which would be L2 inside of an adaptive optimizer.")
    body.append("Raises:\n" + "\n".join(_fill(error, "    ") for error in errors))
    references = [entry.source, "Yang et al., Tensor Programs V, arXiv 2203.03466."]
    if entry.family in ("normalized", "normalized_gradient", "spectral") or entry.units == "noise":
        references.append("Yang, Simon and Bernstein, A Spectral Condition, arXiv 2310.17813.")
    body.append(
        "References:\n" + "\n".join(_fill(reference, "    ") for reference in dict.fromkeys(references))
    )
    return "\n\n".join(body) + "\n"


def _made(
    name: str,
    full: str,
    entry: Entry,
    signature: inspect.Signature,
    own: Sequence[str],
    build: Callable[[MupSpec, tuple[Any, ...], dict[str, Any], Options], optax.GradientTransformation],
    *,
    alias: bool,
) -> Alias:
    """A function of that signature."""
    kinds = kinds_of(f"mup_{name}", signature)

    def function(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{function.__name__}() {error}") from None
        check_arguments(kinds, bound.arguments)
        bound.apply_defaults()
        given = dict(bound.arguments)
        spec = given.pop("spec")
        rate = (given.pop("learning_rate"),) if alias else ()
        options = Options(**{known: given.pop(known) for known in own})
        return optax.with_extra_args_support(build(spec, rate, given, options))

    function.__name__ = function.__qualname__ = f"mup_{name}"
    function.__module__ = "mujax.optim"
    function.__doc__ = _document(entry, full, signature, own, alias=alias)
    function.__annotations__ = {
        **{known: parameter.annotation for known, parameter in signature.parameters.items()},
        "return": signature.return_annotation,
    }
    function.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    return function


def _alias(name: str) -> Alias:
    """`mup_<name>`, as the registry has it."""
    entry = OPTIMIZERS[name]
    make = entry.constructor(name)

    def build(
        spec: MupSpec, rate: tuple[Any, ...], theirs: dict[str, Any], options: Options
    ) -> optax.GradientTransformation:
        return LAYOUTS[entry.layout](Build(name, entry, spec, rate, theirs, options, make))

    signature, own = _signature(entry, make, alias=True)
    return _made(name, f"{entry.module}.{name}", entry, signature, own, build, alias=True)


def _transform(name: str) -> Alias:
    """`mup_scale_by_<name>`, as the registry has it."""
    entry = TRANSFORMS[name]
    make = entry.constructor(name)
    layout = LAYOUTS[entry.layout if entry.layout == "trust_ratio" else "whole"]

    def build(
        spec: MupSpec, rate: tuple[Any, ...], theirs: dict[str, Any], options: Options
    ) -> optax.GradientTransformation:
        return layout(Build(name, entry, spec, rate, theirs, options, make))

    signature, own = _signature(entry, make, alias=False)
    return _made(name, f"{entry.module}.{name}", entry, signature, own, build, alias=False)


def _nesterov(name: str, mup: Alias) -> Alias:
    """`mup_adam` or `mup_adamw` under the name of its Nesterov variant."""
    entry = OPTIMIZERS[name]
    signature = inspect.signature(mup, eval_str=True)
    nesterov = signature.parameters["nesterov"].replace(default=True)
    signature = signature.replace(
        parameters=[nesterov if known == "nesterov" else kept for known, kept in signature.parameters.items()]
    )
    own = [known for known in signature.parameters if known in _OWN]

    def build(
        spec: MupSpec, rate: tuple[Any, ...], theirs: dict[str, Any], options: Options
    ) -> optax.GradientTransformation:
        return mup(*rate, spec, **theirs, **{known: getattr(options, known) for known in own})

    return _made(name, f"optax.{name}", entry, signature, own, build, alias=True)


def unsupported(name: str) -> ConfigError:
    """The error for an optimizer that µP has no rule for."""
    return ConfigError(
        where=name,
        expected="an optimizer with a learning rate that µP has a rule for",
        got=f"one that has none: {UNSUPPORTED[name]}",
        remedy="take one of mujax.optim.OPTIMIZERS, such as adamw",
    )


def refused(attribute: str) -> Callable[..., NoReturn] | None:
    """The function under the name of an optimizer that µP has no rule for; it raises the reason.

    Args:
        attribute: a name that a module does not have, such as `"mup_lbfgs"`.

    Returns:
        None if it is not the name of such an optimizer.
    """
    name = attribute.removeprefix("mup_")
    if name == attribute or name not in UNSUPPORTED:
        return None

    def function(*args: Any, **kwargs: Any) -> NoReturn:
        del args, kwargs
        raise unsupported(name)

    function.__name__ = function.__qualname__ = f"mup_{name}"
    function.__module__ = "mujax.optim"
    function.__doc__ = f"Not available, and raises an error with the reason: {UNSUPPORTED[name]}.\n"
    return function


mup_acprop = _alias("acprop")
mup_adabelief = _alias("adabelief")
mup_adadelta = _alias("adadelta")
mup_adafactor = _alias("adafactor")
mup_adagrad = _alias("adagrad")
mup_adamax = _alias("adamax")
mup_adamaxw = _alias("adamaxw")
mup_adan = _alias("adan")
mup_ademamix = _alias("ademamix")
mup_adopt = _alias("adopt")
mup_amsgrad = _alias("amsgrad")
mup_fromage = _alias("fromage")
mup_lamb = _alias("lamb")
mup_lars = _alias("lars")
mup_lion = _alias("lion")
mup_madgrad = _alias("madgrad")
mup_nadam = _nesterov("nadam", mup_adam)
mup_nadamw = _nesterov("nadamw", mup_adamw)
mup_noisy_sgd = _alias("noisy_sgd")
mup_novograd = _alias("novograd")
mup_optimistic_adam = _alias("optimistic_adam")
mup_optimistic_adam_v2 = _alias("optimistic_adam_v2")
mup_optimistic_gradient_descent = _alias("optimistic_gradient_descent")
mup_radam = _alias("radam")
mup_rmsprop = _alias("rmsprop")
mup_rprop = _alias("rprop")
mup_schedule_free_adamw = _alias("schedule_free_adamw")
mup_schedule_free_sgd = _alias("schedule_free_sgd")
mup_sign_sgd = _alias("sign_sgd")
mup_signum = _alias("signum")
mup_simplified_ademamix = _alias("simplified_ademamix")
mup_sm3 = _alias("sm3")
mup_sophia = _alias("sophia")
mup_yogi = _alias("yogi")

mup_scale_by_acprop = _transform("scale_by_acprop")
mup_scale_by_adadelta = _transform("scale_by_adadelta")
mup_scale_by_adamax = _transform("scale_by_adamax")
mup_scale_by_adan = _transform("scale_by_adan")
mup_scale_by_ademamix = _transform("scale_by_ademamix")
mup_scale_by_adopt = _transform("scale_by_adopt")
mup_scale_by_amsgrad = _transform("scale_by_amsgrad")
mup_scale_by_belief = _transform("scale_by_belief")
mup_scale_by_factored_rms = _transform("scale_by_factored_rms")
mup_scale_by_lion = _transform("scale_by_lion")
mup_scale_by_madgrad = _transform("scale_by_madgrad")
mup_scale_by_novograd = _transform("scale_by_novograd")
mup_scale_by_optimistic_gradient = _transform("scale_by_optimistic_gradient")
mup_scale_by_radam = _transform("scale_by_radam")
mup_scale_by_rms = _transform("scale_by_rms")
mup_scale_by_rprop = _transform("scale_by_rprop")
mup_scale_by_rss = _transform("scale_by_rss")
mup_scale_by_sign = _transform("scale_by_sign")
mup_scale_by_simplified_ademamix = _transform("scale_by_simplified_ademamix")
mup_scale_by_sm3 = _transform("scale_by_sm3")
mup_scale_by_stddev = _transform("scale_by_stddev")
mup_scale_by_trust_ratio = _transform("scale_by_trust_ratio")
mup_scale_by_yogi = _transform("scale_by_yogi")
