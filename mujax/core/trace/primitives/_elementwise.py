"""Elementwise primitives: what they do to scales, and what they are linear in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from mujax.core.program import LAYOUT, LINEAR_AT_ZERO, EqnPath, shape_of
from mujax.core.trace._interpreter import Interpreter
from mujax.core.trace._parity import Parity, product_of, sum_of
from mujax.core.trace._uses import Pair
from mujax.core.trace._values import (
    ONE,
    UNKNOWN,
    Pending,
    Scale,
    Shape,
    Value,
    View,
    common,
    product,
    same,
    widest,
)
from mujax.core.trace.primitives._fold import fold_constants
from mujax.core.trace.primitives._moves import broadcast_pending, broadcast_view
from mujax.core.trace.primitives._readouts import EPSILON, power_of_readout

ScaleRule = Callable[[Interpreter, Pair, Sequence[Value], Sequence[Scale]], Scale]
"""Scale of a result from the operands and the scales that they bring."""


def common_scale(interp: Interpreter, pair: Pair, ins: Sequence[Value], scales: Sequence[Scale]) -> Scale:
    """A sum or a choice: terms of one scale, or each is corrected first.

    A constant term (a mask, an epsilon) does not count, except in an initialiser; neither does stored state
    beside a parameter (the frozen kernel that a low-rank pair is added to).
    """
    weights = any(value.kind == "param" for value in ins)
    moving = [
        scale
        for value, scale in zip(ins, scales, strict=True)
        if interp.exact or not (value.kind == "const" or (weights and value.state))
    ]
    alike = common(moving or scales)
    if alike is not None:
        if weights and not alike.is_one and _is_shifted(interp, pair, ins):
            _report_unlike_terms(interp, pair, ins, scales)
            return UNKNOWN
        if not interp.exact and _has_epsilon(ins, alike):
            alike = dataclasses.replace(alike, epsilon=True)
        return interp.scale_at(pair, alike)
    if interp.exact or any(scale.total is None for scale in moving):
        return UNKNOWN
    if all(value.kind != "data" or value.raw for value in ins):
        kernel = _scale_noise(interp, pair, ins, scales)
        if kernel is not None:
            return kernel
        _report_unlike_terms(interp, pair, ins, scales)
        return next((s for v, s in zip(ins, scales, strict=True) if v.kind == "param"), UNKNOWN)
    if _report_expanded_square(interp, pair, ins, scales):
        return UNKNOWN
    for value in ins:
        interp.require_order_one(pair.place, value)
    return ONE


def _has_epsilon(ins: Sequence[Value], scale: Scale) -> bool:
    """Whether an operand is a small number, as the epsilon of a norm, that falls less than the others do."""
    falls = scale.total
    if not falls:
        return False
    numbers = [value.const for value in ins if value.const is not None and all(value.const)]
    return any(
        max(abs(base), abs(target)) <= EPSILON and target / base > 1.01 * falls for base, target in numbers
    )


def _is_shifted(interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> bool:
    """Whether a number that is no epsilon is added to a parameter: `1 + w`."""
    shift = max((abs(value.const[1]) for value in ins if value.const), default=0.0)
    return not interp.exact and pair.name in ("add", "sub") and 1e-3 < shift < math.inf


def _scale_noise(
    interp: Interpreter, pair: Pair, ins: Sequence[Value], scales: Sequence[Scale]
) -> Scale | None:
    """Scales noise of mean zero as the kernel that it is added to; None where the terms are no such thing.

    Both are then sums over the fan-in of independent entries, which keep their proportions.
    """
    ((shape, _),) = pair.shapes()
    kernels = [(v, s) for v, s in zip(ins, scales, strict=True) if v.kind == "param"]
    kernel = common(scale for _, scale in kernels)
    # A product of parameters is known relative to its prescribed scale only.
    alone = any(view.growing > 1 and not view.inner for value, _ in kernels for view in value.views)
    if kernel is None or not interp.scales_are_known or not alone:
        return None
    # The condition of a choice is none of the terms.
    first = len(pair.target.invars) - len(ins)
    noise = [(first + number, value) for number, value in enumerate(ins) if value.kind == "data"]
    if not all(_is_noise(value) and value.shape == shape for _, value in noise):
        return None
    for number, _ in noise:
        interp.scale_noise(pair, number, kernel.total or 1.0)
    return kernel


def _is_noise(value: Value) -> bool:
    """Whether the entries are drawn independently, with mean zero and one deviation at every width."""
    spread = value.spread
    return spread is not None and spread.is_centred and not spread.shared and value.scale.is_one


def _report_unlike_terms(
    interp: Interpreter, pair: Pair, ins: Sequence[Value], scales: Sequence[Scale]
) -> None:
    """Reports a parameter that is added to something which does not scale as it does."""
    views = [view for value in ins for view in value.views]
    # Beside a constant or data not a vector of order one: a bias or a gain may meet what it likes.
    own = common(s for v, s in zip(ins, scales, strict=True) if v.kind == "param")
    alone = own is not None and own.is_one
    shown = [view for view in views if view.growing > alone and not view.bent]
    # A product of parameters is known relative to its prescribed scale only.
    if not interp.scales_are_known or not shown or any(view.inner for view in views):
        return
    terms = ", ".join(
        f"{scale.total:.4g}" for value, scale in zip(ins, scales, strict=True) if scale.total is not None
    )
    interp.find(
        "unlike terms",
        pair.site,
        pair.place,
        f"{shown[0].path} is combined with something that scales differently with width: from base to target "
        f"the terms of {pair.name} change by factors of {terms}; scale the other terms in the model as the "
        "parameter scales (as 1/sqrt(fan-in) for a hidden kernel), so that their sum keeps its proportions",
    )


def _report_expanded_square(
    interp: Interpreter, pair: Pair, ins: Sequence[Value], scales: Sequence[Scale]
) -> bool:
    """Reports a readout's product that is one term of `|z|^2 - 2 z.c + |c|^2`.

    A factor on it would break the identity. Returns whether it is one.
    """
    grown = [
        (value, scale.total)
        for value, scale in zip(ins, scales, strict=True)
        if scale.total and abs(value.scale.degree - 1) < 1e-6 and value.scale.summed != 1
    ]
    sums = [total for _, total in grown]
    # What a kernel is multiplied with may be a sum that grows: that is no term beside its product.
    heads = {
        path for value in ins if any(other is not value for other, _ in grown) for path in value.linear_in
    }
    products = [
        use
        for use in interp.record.uses
        if use.path in heads
        and use.kind == "contraction"
        and any(same(total, use.contracted[1] / use.contracted[0]) for total in sums)
        # What is left grows for a hidden kernel, whose product gets no factor.
        and not any(role != "fan_in" and size != base for _, role, size, base in use.axes)
    ]
    if not products or not interp.scales_are_known:
        return False
    interp.record.unscaled |= {use.site for use in products}
    interp.find(
        "expanded square",
        pair.site,
        pair.place,
        f"the product of {products[0].path} at {products[0].where} is added to sums of squares that grow "
        f"{max(sums):.4g} times from base to target, as in |z|^2 - 2 z.c + |c|^2, and gets no factor, which "
        "would change what the terms add up to; divide the whole sum by its width in the model",
    )
    return True


def order_one(interp: Interpreter, pair: Pair, ins: Sequence[Value], scales: Sequence[Scale]) -> Scale:
    """A nonlinear function: its arguments must be of one scale at every width."""
    if interp.exact:
        return ONE if all(scale.is_one for scale in scales) else UNKNOWN
    for value in ins:
        interp.require_order_one(pair.place, value)
    return ONE


def _tangent(interp: Interpreter, pair: Pair, ins: Sequence[Value], scales: Sequence[Scale]) -> Scale:
    """A function close to its argument near zero: of a kernel whose entries shrink, it is the kernel."""
    scale = scales[0]
    if interp.exact or ins[0].kind != "param" or scale.is_one:
        return order_one(interp, pair, ins, scales)
    if scale.total is not None and scale.total < 1:
        return scale
    if interp.scales_are_known and scale.total is not None and ins[0].views:
        interp.find(
            "kernel through a function",
            pair.site,
            pair.place,
            f"{ins[0].views[0].path} goes into {pair.name} after constants that make its entries grow "
            f"{scale.total:.4g} times from base to target, so that the function is another one in a wider "
            "model; take the base's width in these constants",
        )
    return UNKNOWN


def _step(interp: Interpreter, pair: Pair, ins: Sequence[Value], scales: Sequence[Scale]) -> Scale:
    """A function of steps of fixed height, as rounding is."""
    scale = scales[0]
    if interp.exact or ins[0].kind != "param" or scale.is_one:
        return order_one(interp, pair, ins, scales)
    if interp.scales_are_known and scale.total is not None and ins[0].views:
        interp.find(
            "fixed steps",
            pair.site,
            pair.place,
            f"{ins[0].views[0].path} goes into {pair.name}, whose steps have the same height at every width, "
            f"while its entries change by a factor of {scale.total:.4g} from base to target; divide it by "
            "its largest entry or by its standard deviation first, and multiply with that afterwards",
        )
    return UNKNOWN


def _exponential(interp: Interpreter, pair: Pair, ins: Sequence[Value], scales: Sequence[Scale]) -> Scale:
    interp.logits(ins[0])
    return order_one(interp, pair, ins, scales)


def _always_one(interp: Interpreter, pair: Pair, ins: Sequence[Value], scales: Sequence[Scale]) -> Scale:
    return ONE


def _comparison(interp: Interpreter, pair: Pair, ins: Sequence[Value], scales: Sequence[Scale]) -> Scale:
    """Zeros and ones. Their shares are the same at every width if the scale of the entries is."""
    return order_one(interp, pair, ins, scales) if interp.exact or _has_bound(ins) else ONE


def _bounded(interp: Interpreter, pair: Pair, ins: Sequence[Value], scales: Sequence[Scale]) -> Scale:
    """What is cut off at a number is of that number's order."""
    if not interp.exact and _has_bound(ins) and not any(value.kind == "param" for value in ins):
        return order_one(interp, pair, ins, scales)
    return common_scale(interp, pair, ins, scales)


def _has_bound(ins: Sequence[Value]) -> bool:
    """Whether an operand is one number at every width, neither an epsilon nor larger than any entry."""
    numbers = [value.const for value in ins if value.const]
    return any(base == target and 1e-3 < abs(target) < 1e3 for base, target in numbers)


def _chosen(interp: Interpreter, pair: Pair, ins: Sequence[Value], scales: Sequence[Scale]) -> Scale:
    if interp.exact and not scales[0].is_one:
        return UNKNOWN
    return common_scale(interp, pair, ins[1:], scales[1:])


def _power_of(exponent: float) -> ScaleRule:
    def scale(interp: Interpreter, pair: Pair, ins: Sequence[Value], scales: Sequence[Scale]) -> Scale:
        return interp.scale_at(pair, scales[0].power(exponent))

    return scale


def _integer_pow(interp: Interpreter, pair: Pair, ins: Sequence[Value], scales: Sequence[Scale]) -> Scale:
    return interp.scale_at(pair, scales[0].power(float(pair.params["y"])))


def _pow(interp: Interpreter, pair: Pair, ins: Sequence[Value], scales: Sequence[Scale]) -> Scale:
    exponent = ins[1].const
    if exponent is not None and exponent[0] == exponent[1]:
        return interp.scale_at(pair, scales[0].power(exponent[1]))
    return order_one(interp, pair, ins, scales)


def _one_minus_square(
    interp: Interpreter, pair: Pair, ins: Sequence[Value], scales: Sequence[Scale]
) -> Scale:
    """`1 - x * x`, one primitive since JAX 0.11: as the difference of a constant and a square."""
    if interp.exact:
        return ONE if scales[0].is_one else UNKNOWN
    return interp.scale_at(pair, scales[0].power(2))


def _quotient(interp: Interpreter, pair: Pair, ins: Sequence[Value], scales: Sequence[Scale]) -> Scale:
    return _product(interp, pair, ins, (scales[0], scales[1].power(-1)))


def _product(interp: Interpreter, pair: Pair, ins: Sequence[Value], scales: Sequence[Scale]) -> Scale:
    out = product(scales)
    if out.is_one:
        for value, scale, other in zip(ins, scales, scales[::-1], strict=True):
            if other.epsilon and not scale.epsilon:
                # A norm takes out that this value falls with width, but only while it is above the epsilon.
                interp.require_order_one(pair.place, value, report=False)
    return interp.scale_at(pair, out, *scales)


SignRule = Callable[[Pair, Sequence[Value]], Parity]
"""Parity of a result, where all operands that are not constant are functions of parameters."""


def _any_sign(pair: Pair, ins: Sequence[Value]) -> Parity:
    return product_of(value.sign.any for value in ins)


def _odd(pair: Pair, ins: Sequence[Value]) -> Parity:
    return ins[0].sign


def _even(pair: Pair, ins: Sequence[Value]) -> Parity:
    return ins[0].sign.even


def _sign_of_sum(pair: Pair, ins: Sequence[Value]) -> Parity:
    # Zeros are of any sign.
    return sum_of(value.sign for value in ins if not (value.const and not any(value.const)))


def _sign_of_product(pair: Pair, ins: Sequence[Value]) -> Parity:
    return product_of(value.sign for value in ins)


def _sign_of_choice(pair: Pair, ins: Sequence[Value]) -> Parity:
    return _any_sign(pair, ins[:1]) * _sign_of_sum(pair, ins[1:])


def _sign_of_power(pair: Pair, ins: Sequence[Value]) -> Parity:
    return ins[0].sign if pair.params["y"] % 2 else ins[0].sign.even


def _sign_of_clamp(pair: Pair, ins: Sequence[Value]) -> Parity:
    low, value, high = ins
    if low.const and high.const and low.const[1] == -high.const[1]:
        return value.sign
    return _any_sign(pair, ins)


@dataclasses.dataclass(frozen=True)
class Elementwise:
    """An elementwise primitive.

    Attributes:
        scale: the scale of the result.
        linear: operands that the result is linear in, with the others fixed.
        terms: operands that the result is a sum of, or a choice from.
        logits: whether logits remain logits: linear steps, choices, a soft cap.
        sign: the parity of the result.
        bends: whether it is a function that does not become linear as its argument shrinks.
    """

    scale: ScaleRule = order_one
    linear: tuple[int, ...] = ()
    terms: tuple[int, ...] = ()
    logits: bool = True
    sign: SignRule = _any_sign
    bends: bool = False

    def __call__(self, interp: Interpreter, pair: Pair, ins: Sequence[Value]) -> list[Value]:
        """Applies the rule."""
        ((shape, base),) = pair.shapes()
        folded = fold_constants(pair, ins, shape, base)
        if folded is not None:
            return [folded]
        kind = widest(value.kind for value in ins)
        weights = kind != "data" or _are_weights(ins, shape, base)
        scales = [value.scale if weights else interp.scale_against_prescribed(value) for value in ins]
        scale = self.scale(interp, pair, ins, scales)
        if weights:
            return [self._of_weights(pair, ins, shape, base, scale)]
        pending: list[Pending] = []
        for position, value in enumerate(ins):
            linear = position in self.linear
            stays = linear or position in self.terms
            for p in broadcast_pending(value, shape, base):
                if stays or p.product or _may_be_kernel(p.view):
                    pending.append(dataclasses.replace(p, entrywise=p.entrywise or not stays))
                else:
                    interp.decide(dataclasses.replace(value, pending=(p,)))
            for view in value.views:
                open_ = linear or _may_be_kernel(view)
                use = interp.use(pair, view, "lookup" if view.picked else "elementwise", decided=not open_)
                if open_:
                    placed = broadcast_view(view, value, shape, base)
                    shared = placed.parameter_axes(_axes_of_data(interp, ins, shape))
                    pending.append(Pending(use, placed, not linear, shared=shared))
        out = Value(shape, base, kind, scale=scale, pending=tuple(pending))
        out.power = power_of_readout(interp, pair, ins)
        if self.logits:
            out.products = frozenset[EqnPath]().union(*(value.products for value in ins))
            out.linear_in = frozenset[str]().union(*(value.linear_in for value in ins))
        return [out]

    def _is_linear_in(self, position: int, ins: Sequence[Value]) -> bool:
        """Whether the result is linear in an operand, and no other one is a function of its parameters."""
        paths = {view.path for view in ins[position].views}
        others = {view.path for n, value in enumerate(ins) if n != position for view in value.views}
        return position in self.terms or (position in self.linear and not paths & others)

    def _of_weights(self, pair: Pair, ins: Sequence[Value], shape: Shape, base: Shape, scale: Scale) -> Value:
        """A function of parameters, of constants, and perhaps of data that is no activation."""
        views = [
            dataclasses.replace(
                broadcast_view(view, value, shape, base),
                bent=view.bent or (self.bends and not view.reduced),
                made=view.made if self._is_linear_in(position, ins) else None,
            )
            for position, value in enumerate(ins)
            for view in value.views
        ]
        kind = "param" if views else "const"
        out = Value(shape, base, kind, views=tuple(dict.fromkeys(views)), scale=scale)
        if kind == "param":
            out.parity, out.clipped = _clipped(pair, ins, scale) or (self.sign(pair, ins), None)
        return out


def _axes_of_data(interp: Interpreter, ins: Sequence[Value], shape: Shape) -> frozenset[int]:
    """The axes of a result along which the activations in it are not repeated."""
    own: set[int] = set()
    seen: set[EqnPath | None] = set()
    left = [(value.origin, value.shape) for value in ins if value.kind == "data"]
    while left:
        site, given = left.pop()
        if given != shape:
            # An axis of size 1 is repeated.
            own |= {axis for axis, size in enumerate(given) if size == shape[axis]}
            continue
        if site in seen:
            continue
        seen.add(site)
        visit = None if site is None else interp.record.flow.visits.get(site)
        eqn = None if visit is None else visit.eqn
        if visit is None or eqn is None or eqn.primitive.name not in {"broadcast_in_dim", *ELEMENTWISE}:
            return frozenset() if _is_tiled(interp, site) else frozenset(range(len(shape)))
        sizes = [shape_of(atom) for atom in eqn.invars]
        if eqn.primitive.name == "broadcast_in_dim":
            axes = eqn.params["broadcast_dimensions"]
            own |= {axis for axis, size in zip(axes, sizes[0], strict=True) if size == shape[axis]}
        else:
            left += [
                (operand.origin, size)
                for operand, size in zip(visit.operands, sizes, strict=True)
                if operand.kind == "data"
            ]
    return frozenset(own)


def _is_tiled(interp: Interpreter, site: EqnPath | None) -> bool:
    """Whether an activation may be laid out from one that was repeated, along axes that no longer show.

    It is not where layout and entrywise functions lead back to a layer's product or to an input.
    """
    left, seen = [site], set[EqnPath | None]()
    while left:
        site = left.pop()
        if site in seen:
            continue
        seen.add(site)
        visit = None if site is None else interp.record.flow.visits.get(site)
        if visit is None:
            return True
        if visit.eqn is None:
            continue
        name = visit.eqn.primitive.name
        data = [operand.origin for operand in visit.operands if operand.kind == "data"]
        if any(use.kind == "contraction" for use in visit.uses):
            # The axes of a batch are the activation's.
            batch = name == "dot_general" and any(visit.eqn.params["dimension_numbers"][1])
            left += data if batch else []
            continue
        if name == "broadcast_in_dim":
            given, made = (math.prod(shape_of(atom)) for atom in (visit.eqn.invars[0], visit.eqn.outvars[0]))
            if given != made:
                return True
        if name not in LAYOUT and name not in ELEMENTWISE:
            return True
        left += data
    return False


def _are_weights(ins: Sequence[Value], shape: Shape, base: Shape) -> bool:
    """Whether a parameter meets data that is no activation and has no axes besides the parameter's.

    A kernel that is masked, quantised with a stored scale or has noise added to it is a kernel still. Data
    with axes of its own (a batch) makes an activation of a parameter.
    """
    if not any(value.kind == "param" for value in ins):
        return False
    if not all(value.kind != "data" or value.raw or value.state for value in ins):
        return False
    views = [broadcast_view(view, value, shape, base) for value in ins for view in value.views]
    return all(
        size == 1 or any(factor.axis is not None for view in views for factor in view.axes[axis])
        for axis, size in enumerate(shape)
    )


def _may_be_kernel(view: View) -> bool:
    """Whether the parameter is shaped as a hidden kernel: two axes of the value grow with it."""
    return view.growing > 1


def _clipped(
    pair: Pair, ins: Sequence[Value], scale: Scale
) -> tuple[Parity, tuple[float, Parity] | None] | None:
    """The parity of a value that is cut off below and then above, as `jnp.clip` does; None: anything else.

    Bounds that differ in sign only keep it. A bound away from zero no longer matters where entries shrink.
    """
    if pair.name not in ("max", "min"):
        return None
    for value, bound in (ins, ins[::-1]):
        if value.kind != "param" or bound.const is None:
            continue
        limit = bound.const[1]
        if pair.name == "max" and limit < 0:
            shrinks = scale.total is not None and scale.total < 1
            return (value.sign if shrinks else value.sign.any), (limit, value.sign)
        if pair.name == "min" and limit > 0 and value.clipped is not None:
            low, before = value.clipped
            # The bounds of an integer type: -128 and 127.
            return (before if abs(limit + low) <= 0.02 * limit else value.sign.any), None
    return None


_IDENTITY: Final = Elementwise(common_scale, linear=(0,), sign=_odd)
_TANGENT: Final = Elementwise(_tangent, logits=False, sign=_odd)


ELEMENTWISE: Final[Mapping[str, Elementwise]] = {
    **dict.fromkeys(
        ["convert_element_type", "neg", "real", "imag", "reduce_precision", "conj"],
        _IDENTITY,
    ),
    "stop_gradient": Elementwise(common_scale, sign=_odd),
    "bitcast_convert_type": Elementwise(common_scale, logits=False, bends=True),
    "mul": Elementwise(_product, linear=(0, 1), sign=_sign_of_product),
    "div": Elementwise(_quotient, linear=(0,), sign=_sign_of_product),
    **dict.fromkeys(["add", "add_any", "sub"], Elementwise(common_scale, terms=(0, 1), sign=_sign_of_sum)),
    "complex": Elementwise(common_scale, linear=(0, 1), sign=_sign_of_sum),
    "clamp": Elementwise(_bounded, sign=_sign_of_clamp),
    **dict.fromkeys(["max", "min", "rem"], Elementwise(_bounded, logits=False)),
    "nextafter": Elementwise(common_scale, logits=False, sign=_odd),
    "select_n": Elementwise(_chosen, terms=tuple(range(1, 256)), sign=_sign_of_choice),
    "abs": Elementwise(common_scale, logits=False, sign=_even),
    "square": Elementwise(_power_of(2), logits=False, sign=_even),
    "sqrt": Elementwise(_power_of(0.5), logits=False),
    "one_minus_square": Elementwise(_one_minus_square, logits=False, sign=_even),
    "reciprocal": Elementwise(_power_of(-1), logits=False, sign=_odd),
    "cbrt": Elementwise(_power_of(1 / 3), logits=False, sign=_odd),
    "rsqrt": Elementwise(_power_of(-0.5), logits=False),
    "integer_pow": Elementwise(_integer_pow, logits=False, sign=_sign_of_power),
    "pow": Elementwise(_pow, logits=False),
    **dict.fromkeys(
        ["eq", "ne", "lt", "le", "gt", "ge", "eq_to", "le_to", "lt_to"],
        Elementwise(_comparison, logits=False),
    ),
    "sign": Elementwise(_always_one, logits=False, sign=_odd),
    **dict.fromkeys(["is_finite", "atan2"], Elementwise(_always_one, logits=False)),
    **dict.fromkeys(["exp", "exp2"], Elementwise(_exponential, logits=False, bends=True)),
    **dict.fromkeys(LINEAR_AT_ZERO, _TANGENT),
    # Also a soft cap of logits.
    "tanh": Elementwise(_tangent, sign=_odd),
    "round": Elementwise(_step, logits=False, sign=_odd),
    **dict.fromkeys(["ceil", "floor"], Elementwise(_step, logits=False)),
    **dict.fromkeys(["cos", "cosh"], Elementwise(logits=False, sign=_even, bends=True)),
    # Linear in its coefficients, which stand behind the variable.
    "polynomial": Elementwise(linear=tuple(range(1, 256)), logits=False, bends=True),
    **dict.fromkeys(
        [
            *["acos", "acosh", "and", "bessel_i0e", "bessel_i1e", "clz", "digamma", "erfc", "igamma"],
            *["igamma_grad_a", "igammac", "lgamma", "log", "log2", "logistic", "mulhi", "not", "or"],
            *["polygamma", "population_count", "random_gamma_grad", "regularized_incomplete_beta"],
            *["shift_left", "shift_right_arithmetic", "shift_right_logical", "xor", "zeta"],
        ],
        Elementwise(logits=False, bends=True),
    ),
}
