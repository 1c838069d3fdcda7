"""The audit: what a model does that cannot be corrected, and where measurements disagree with the reading."""

from __future__ import annotations

import collections
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import jax

from mujax import rules
from mujax._arguments import COUNT, FLAG, NONE, several, takes
from mujax.check._coord_check import (
    CheckProgress,
    by_name,
    measure as measured_sizes,
    report,
    respond_at_ends,
    subjects,
)
from mujax.check._faults import alike
from mujax.check._made_up import loss_of_all, made_up_for_all, made_up_inputs
from mujax.check._models import optimizer_of
from mujax.core import MupModel, mup_init
from mujax.core.frontends import frontend
from mujax.core.trace import Finding
from mujax.errors import AuditError, ConfigError, MujaxWarning

_SEEDS: Final = 4
# A kernel behind one that starts at zero does not move in the first step.
_STEPS: Final = 2
_RATE: Final = 2.0**-7
_OPTIONS: Final = frozenset(
    name
    for name, parameter in inspect.signature(mup_init).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
)

_WIDTHS: Final = several("a sequence of widths, whole numbers of at least 1", COUNT, "(64, 128)", least=1)


@takes(measure=FLAG, widths=_WIDTHS | NONE)
def audit(
    model: Any,
    base: Any,
    *inputs: Any,
    measure: bool = False,
    widths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Finding, ...]:
    """Returns, as data, what keeps a model from training in µP; use it in your own tests.

    That is what mujax cannot read or correct and, with `measure`, what it misread: base and target are
    initialised with a few seeds and trained for two steps of Adam in µP. The size of every product, its
    change and the effect of its parameters' update are fitted against width. What grows or vanishes although
    the reading says that it does not is a finding, with the role that was read and the remedy.

    Args:
        model: as for `mup_init`; with `widths` a function of the width that returns it.
        base: as for `mup_init`; with `widths` the base's width.
        *inputs: as for `mup_init`. Where shapes are given and the model is measured, values are made up.
        measure: whether to run the models. Those given are run as they are, `delta` too; a third width halves
            the noise, and small models do as well as large ones: give `widths` in place of a large target.
        widths: the widths to read (the largest) and to measure (all of them, and the base's).
        **kwargs: as for `mup_init`.

    Returns:
        The findings; empty where the model trains in µP as it stands. Those that were measured are of a kind
        that starts with `"measured"`.

    Raises:
        ConfigError: nothing grows from base to target, so there is nothing to measure.
        AuditError: `strict`, and there is a finding.
        MujaxError: as `mup_init` does.

    Example:
        >>> import flax.linen as nn, jax, mujax
        >>> def net(width):
        ...     return nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(width), nn.relu, nn.Dense(10)])
        >>> x = jax.ShapeDtypeStruct((8, 12), "float32")
        >>> mujax.audit(net(1024), net(64), x)
        ()
        >>> wrong = {"layers_2/kernel": "input"}
        >>> (found,) = mujax.audit(net, 32, x, widths=(64, 128), measure=True, roles=wrong)
        >>> found.kind, found.message.rpartition("; ")[2]
        ('measured role', 'give roles={"layers_2/kernel": "hidden"}')

    Reference:
        Yang et al., Tensor Programs V, arXiv 2203.03466, Appendix D.1.
    """
    chosen = None
    if widths is not None:
        chosen = _built(model, base, widths), base, max(widths)
        model, base = chosen[0][max(widths)], chosen[0][base]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MujaxWarning)
        mup = mup_init(model, base, *inputs, **kwargs)
    if not measure:
        return mup.findings
    at, narrow, wide = chosen or _by_width(model, base, kwargs.get("delta"), inputs, kwargs)
    found = disagreements(at, narrow, wide, inputs, **kwargs)
    if found and kwargs.get("strict"):
        raise AuditError(f"{found[0].where}: {found[0].message}.")
    return (*mup.findings, *found)


def disagreements(
    models: Mapping[int, Any],
    base: int,
    target: int,
    inputs: Sequence[Any],
    progress: Callable[[CheckProgress], None] | None = None,
    **kwargs: Any,
) -> tuple[Finding, ...]:
    """Where the sizes of activations, their changes and the effects of updates disagree with the reading.

    Args:
        models: the model at each width.
        base: the base's width.
        target: the width of the model that is asked about.
        inputs: as for `mup_init`.
        progress: called as models are compiled and run.
        **kwargs: as for `mup_init`.

    Raises:
        MujaxError: as `mup_init` does.
    """
    options = {name: value for name, value in kwargs.items() if name in _OPTIONS - {"delta", "strict"}}
    called = {name: value for name, value in kwargs.items() if name not in _OPTIONS}
    roles = options.pop("roles", None) or {}
    named = by_name(roles)
    narrow, *_, wide = sorted(models)

    def read(width: int, small: int, **chosen: Any) -> MupModel:
        # A `ParamSpec` has the shapes of one pair of models.
        given = roles if (width, small) == (target, base) else named
        delta = models[wide if width != wide else narrow] if width == small else None
        return mup_init(models[width], models[small], *inputs, delta=delta, roles=given, **chosen, **called)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MujaxWarning)
        clean = read(wide, narrow)
        key, _ = jax.random.split(jax.random.key(0))
        inputs, called = made_up_inputs((tuple(inputs), called), clean, key)
        at = {width: read(width, base, **options) for width in sorted(models)}
    checked = subjects(clean, at, optimizer_of("adam"))
    batches = made_up_for_all(clean, tuple(inputs), 0)
    sizes = measured_sizes(checked, loss_of_all, batches, (_RATE,), _STEPS, range(_SEEDS), progress)
    responses = respond_at_ends(checked, sizes, _RATE)
    check = report(clean, at, checked, sizes, responses, (_RATE,), _STEPS)
    standard = not rules.mup_share(at[target].spec.parametrization)
    remedy = '; parametrization="mup" does it' if standard else ""
    out = []
    for first, *others in alike(check.faults):
        likewise = f"; likewise {', '.join(one.name for one in others)}" if others else ""
        message = f"{first.message}{remedy}{likewise}"
        out.append(Finding(f"measured {first.rule}", message, first.where, 1 + len(others)))
    return tuple(out)


def _built(factory: Any, base: Any, widths: Sequence[int]) -> dict[int, Any]:
    """The models that a factory makes.

    Raises:
        ConfigError: no factory, a base that is not a width, or no width beside it.
    """
    if not callable(factory) or not COUNT.accepts(base):
        raise ConfigError(
            where="widths",
            expected="a function of the width for model and the base's width for base",
            got=f"{type(factory).__name__} and {type(base).__name__}",
        )
    wanted = sorted({base, *map(int, widths)})
    if len(wanted) < 2:
        raise ConfigError(
            where="widths", expected="positive numbers other than the base's", got=tuple(widths)
        )
    return {width: factory(width) for width in wanted}


def _by_width(
    model: Any, base: Any, delta: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[dict[int, Any], int, int]:
    """The given models by width, the base's width and the target's.

    The width is the size of the axis that stands for most of what grows.

    Raises:
        ConfigError: nothing grows.
    """
    called = {name: value for name, value in kwargs.items() if name not in _OPTIONS}
    given = [one for one in (base, model, delta) if one is not None]
    shapes = []
    for one in given:
        initial = frontend(one).trace_init(inputs, called)
        shapes.append(initial.shapes(initial.params))
    small, *others = shapes
    for large in others:
        pairs = {
            (path, axis): (size, grown)
            for path, shape in small.items()
            for axis, (size, grown) in enumerate(zip(shape, large[path], strict=True))
            if size != grown
        }
        if pairs:
            ((most, _),) = collections.Counter(pairs.values()).most_common(1)
            path, axis = next(place for place, pair in pairs.items() if pair == most)
            sizes = [shape[path][axis] for shape in shapes]
            # The target is measured in place of a delta of its width.
            at = dict(zip(sizes[::-1], given[::-1], strict=True))
            return at, sizes[0], sizes[1]
    raise ConfigError(
        where="measure",
        expected="a target or a delta that is wider than the base",
        got="models of the same widths",
        remedy="give two widths, or measure small models with widths=",
    )
