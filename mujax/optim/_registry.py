"""The registry: each of optax's optimizers with its family and constants, as data.

An entry gives the family of `mujax.rules` that an optimizer belongs to, which was read off optax's code, and
the small constants that must follow the gradient. `_optimizers` makes the optimizers from it.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import optax

from mujax.rules import Family

Units = Literal["entry", "sign", "linear", "noise", "norm", "displacement"]
"""The units that a transform needs its inputs in, for its updates to have one unit at every width.

`"entry"`: gradients whose entries have the base's size. `"norm"`: gradients whose norm has. `"sign"` and
`"linear"`: gradients as they are. `"noise"`: gradients for which an update of 1 is of the parameter's initial
size. `"displacement"`: as `"entry"`, and parameters measured in steps, for transforms that keep a copy of
them.
"""

Layout = Literal[
    "whole",
    "adam",
    "sgd",
    "lars",
    "lamb",
    "fromage",
    "trust_ratio",
    "adafactor",
    "schedule_free",
    "sophia",
    "muon",
]
"""How it is put together: `"whole"`, optax's own optimizer in its units; else by a function of its own."""

_E: Final[Mapping[str, str]] = {"eps": "gradient"}
_E_ROOT: Final[Mapping[str, str]] = {"eps": "gradient", "eps_root": "gradient²"}
_IN_ROOT: Final[Mapping[str, str]] = {"eps": "gradient²"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One optimizer.

    Attributes:
        family: the family whose learning rates it takes.
        source: where the optimizer is from.
        module: where optax has it.
        transform: optax's matching `scale_by_*`, in the same module.
        units: the units of its inputs.
        layout: how it is put together.
        epsilons: its small constants and other thresholds, each with the unit that it has and scales with.
        decay: keywords of its weight decay and of the mask.
        nested: whether the decay is inside of the normalisation, where it can't be free of the rate.
        l2: whether the decay is added to the gradient before an adaptive scaling, which µP rules out.
        same_run: why Tables 3, 8 and 9 are not the same training run with it; empty where they are.
        note: further remarks, for its docstring.
    """

    family: Family
    source: str
    module: Literal["optax", "optax.contrib"] = "optax"
    transform: str | None = None
    units: Units = "entry"
    layout: Layout = "whole"
    epsilons: Mapping[str, str] = dataclasses.field(default_factory=dict)
    decay: tuple[str, str | None] | None = None
    nested: bool = False
    l2: bool = False
    same_run: str = ""
    note: str = ""

    @property
    def namespace(self) -> types.ModuleType:
        """The module itself."""
        return optax if self.module == "optax" else optax.contrib

    def constructor(self, name: str) -> Callable[..., Any]:
        """Optax's function for the optimizer of this name."""
        return getattr(self.namespace, name)


_DECAY: Final = ("weight_decay", "mask")
_DECAY_2: Final = ("weight_decay", "weight_decay_mask")
_ADAM: Final = "Kingma and Ba, Adam, arXiv 1412.6980"
_ADAMW: Final = "Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101"
_NADAM: Final = "Dozat, Incorporating Nesterov Momentum into Adam, ICLR workshop 2016"
_ZERO_INIT: Final = (
    "Optax takes a trust ratio of 1 for a parameter of norm 0, whose first step is the bare update: it is "
    "scaled as Adam's or SGD's would be, so that biases and readouts that start at zero reach the same size "
    "at every width, and have the right ratio from then on. A *hidden* weight that starts at zero is of low "
    "rank, so its norm stays smaller than that of a random one: name it in zero_init."
)

OPTIMIZERS: Final[Mapping[str, Entry]] = {
    "acprop": Entry(
        family="adam",
        source="Zhuang et al., Momentum Centering and Asynchronous Update, arXiv 2110.05454",
        module="optax.contrib",
        transform="scale_by_acprop",
        epsilons=_E_ROOT,
        decay=_DECAY,
        note="Its first step is linear in the gradient; the rescaled gradient makes it alike at all widths.",
    ),
    "adabelief": Entry(
        family="adam",
        source="Zhuang et al., AdaBelief, arXiv 2010.07468",
        transform="scale_by_belief",
        epsilons=_E_ROOT,
    ),
    "adadelta": Entry(
        family="adam",
        source="Zeiler, Adadelta, arXiv 1212.5701",
        transform="scale_by_adadelta",
        epsilons={"eps": "gradient² below and update² above the fraction"},
        decay=_DECAY_2,
        l2=True,
        note="Its first updates are of the size √eps, in units of the updates, which have µP's factor.",
    ),
    "adafactor": Entry(
        family="normalized",
        source="Shazeer and Stern, Adafactor, arXiv 1804.04235",
        transform="scale_by_factored_rms",
        layout="adafactor",
        epsilons={"eps": "gradient²"},
        decay=("weight_decay_rate", "weight_decay_mask"),
        note=(
            "Of the family 'adam' if multiply_by_parameter_scale=False, as `scale_by_factored_rms` is. The "
            "lowest parameter scale, 1e-3, is in units of the parameter's initial values. Choose "
            "min_dim_size_to_factor so that base and target are factored alike. As in optax, the learning "
            "rate does not multiply the decay."
        ),
    ),
    "adagrad": Entry(
        family="adam",
        source="Duchi, Hazan and Singer, Adaptive Subgradient Methods, JMLR 2011",
        transform="scale_by_rss",
        epsilons={"initial_accumulator_value": "gradient²", "eps": "gradient²"},
    ),
    "adam": Entry(family="adam", source=_ADAM, transform="scale_by_adam", layout="adam", epsilons=_E_ROOT),
    "adamax": Entry(family="adam", source=_ADAM, transform="scale_by_adamax", epsilons=_E),
    "adamaxw": Entry(family="adam", source=_ADAMW, epsilons=_E, decay=_DECAY),
    "adamw": Entry(family="adam", source=_ADAMW, layout="adam", epsilons=_E_ROOT, decay=_DECAY),
    "adan": Entry(
        family="adam",
        source="Xie et al., Adan, arXiv 2208.06677",
        transform="scale_by_adan",
        epsilons=_E_ROOT,
        decay=_DECAY,
    ),
    "ademamix": Entry(
        family="adam",
        source="Pagliardini, Ablin and Grangier, AdEMAMix, arXiv 2409.03137",
        module="optax.contrib",
        transform="scale_by_ademamix",
        epsilons=_E_ROOT,
        decay=_DECAY,
    ),
    "adopt": Entry(
        family="adam",
        source="Taniguchi et al., ADOPT, arXiv 2411.02853",
        module="optax.contrib",
        transform="scale_by_adopt",
        epsilons=_E,
    ),
    "amsgrad": Entry(
        family="adam",
        source="Reddi, Kale and Kumar, On the Convergence of Adam and Beyond, arXiv 1904.09237",
        transform="scale_by_amsgrad",
        epsilons=_E_ROOT,
    ),
    "fromage": Entry(
        family="normalized",
        source="Bernstein et al., On the distance between two neural networks, arXiv 2002.03432",
        transform="scale_by_trust_ratio",
        units="norm",
        layout="fromage",
        epsilons={"min_norm": "gradient norm and parameter norm"},
        note=(
            "The prefactor 1/√(1+η²), which keeps a step from lengthening the parameter, is of the "
            "parameter's own learning rate. A hidden weight that starts at zero: name it in zero_init."
        ),
    ),
    "lamb": Entry(
        family="normalized",
        source="You et al., Large Batch Optimization for Deep Learning, arXiv 1904.00962",
        layout="lamb",
        epsilons=_E_ROOT,
        decay=_DECAY,
        nested=True,
        note=_ZERO_INIT,
    ),
    "lars": Entry(
        family="normalized",
        source="You, Gitman and Ginsburg, Large Batch Training of Convolutional Networks, arXiv 1708.03888",
        units="norm",
        layout="lars",
        epsilons={"eps": "gradient norm"},
        decay=_DECAY_2,
        nested=True,
        note=_ZERO_INIT,
    ),
    "lion": Entry(
        family="adam",
        source="Chen et al., Symbolic Discovery of Optimization Algorithms, arXiv 2302.06675",
        transform="scale_by_lion",
        decay=_DECAY,
        note="The gradient is rescaled for scale_by_lion's 'smooth' and 'refined', which need its scale.",
    ),
    "madgrad": Entry(
        family="adam",
        source="Defazio and Jelassi, Adaptivity without Compromise, arXiv 2101.11075",
        module="optax.contrib",
        transform="scale_by_madgrad",
        units="displacement",
        epsilons={"eps": "gradient^(2/3)"},
        decay=("weight_decay", None),
        l2=True,
        note="Its updates go as the cube root of the gradient, so the rescaled gradient is part of the rule.",
    ),
    "muon": Entry(
        family="spectral",
        source="Jordan et al., Muon, 2024; Bernstein and Newhouse, arXiv 2409.20325",
        module="optax.contrib",
        transform="scale_by_muon",
        units="norm",
        layout="muon",
        epsilons={"eps": "gradient norm"},
        decay=_DECAY_2,
        note="Hidden weights by Muon, everything else by the Adam inside of it, with Adam's rule.",
    ),
    "nadam": Entry(family="adam", source=_NADAM, layout="adam", epsilons=_E_ROOT),
    "nadamw": Entry(family="adam", source=_NADAM, layout="adam", epsilons=_E_ROOT, decay=_DECAY),
    "noisy_sgd": Entry(
        family="sgd",
        source="Neelakantan et al., Adding Gradient Noise Improves Learning, arXiv 1511.06807",
        units="noise",
        note=(
            "The noise is not a gradient: it has no low rank. Scaled as one, it would drown the hidden "
            "weights as width grows. Here its standard deviation moves each parameter by the same fraction "
            "of its initial values at every width (arXiv 2310.17813, Condition 1, for random matrices)."
        ),
    ),
    "novograd": Entry(
        family="normalized_gradient",
        source="Ginsburg et al., NovoGrad: Layer-wise Adaptive Moments, arXiv 1905.11286",
        transform="scale_by_novograd",
        units="norm",
        epsilons={"eps": "gradient norm", "eps_root": "gradient norm²"},
        decay=("weight_decay", None),
    ),
    "optimistic_adam": Entry(
        family="adam",
        source="Daskalakis et al., Training GANs with Optimism, arXiv 1711.00141",
        epsilons=_E_ROOT,
        note="Deprecated in optax, which warns: take optimistic_adam_v2.",
    ),
    "optimistic_adam_v2": Entry(
        family="adam",
        source="Daskalakis et al., Training GANs with Optimism, arXiv 1711.00141",
        epsilons=_E_ROOT,
    ),
    "optimistic_gradient_descent": Entry(
        family="sgd",
        source="Mokhtari, Ozdaglar and Pattathil, A Unified Analysis, arXiv 1901.08511",
        transform="scale_by_optimistic_gradient",
        units="linear",
    ),
    "radam": Entry(
        family="adam",
        source="Liu et al., On the Variance of the Adaptive Learning Rate and Beyond, arXiv 1908.03265",
        transform="scale_by_radam",
        epsilons=_E_ROOT,
        note=(
            "Its first steps are plain momentum, linear in the gradient; the rescaled gradient gives them "
            "SGD's rates. With scale_eps=False they have Adam's, as in microsoft/mup."
        ),
    ),
    "rmsprop": Entry(
        family="adam",
        source="Tieleman and Hinton, RMSProp, 2012; Graves, arXiv 1308.0850 (centered)",
        transform="scale_by_rms",
        epsilons={
            "eps": "gradient² (gradient if eps_in_sqrt=False)",
            "initial_scale": "gradient²",
        },
        note="`centered=True` is `scale_by_stddev`, of the same family.",
    ),
    "rprop": Entry(
        family="adam",
        source="Riedmiller and Braun, A Direct Adaptive Method, IEEE ICNN 1993",
        transform="scale_by_rprop",
        units="sign",
        note="Its step sizes, the lowest and the highest too, are multiplied with µP's factor.",
    ),
    "schedule_free_adamw": Entry(
        family="adam",
        source="Defazio et al., The Road Less Scheduled, arXiv 2405.15682",
        module="optax.contrib",
        layout="schedule_free",
        epsilons=_E,
        decay=("weight_decay", None),
        note="The averages are outside of the µP factors, so optax's schedule_free_eval_params works.",
    ),
    "schedule_free_sgd": Entry(
        family="sgd",
        source="Defazio et al., The Road Less Scheduled, arXiv 2405.15682",
        module="optax.contrib",
        units="linear",
        layout="schedule_free",
        decay=("weight_decay", None),
        note="The averages are outside of the µP factors, so optax's schedule_free_eval_params works.",
    ),
    "sgd": Entry(
        family="sgd",
        source="Yang et al., Tensor Programs V, arXiv 2203.03466, Tables 3, 8 and 9",
        units="linear",
        layout="sgd",
    ),
    "sign_sgd": Entry(
        family="adam",
        source="Bernstein et al., signSGD, arXiv 1802.04434",
        transform="scale_by_sign",
        units="sign",
    ),
    "signum": Entry(family="adam", source="Bernstein et al., signSGD, arXiv 1802.04434", units="sign"),
    "simplified_ademamix": Entry(
        family="adam",
        source="Morwani et al., Connections between Schedule-Free Optimizers and AdEMAMix, arXiv 2502.02431",
        module="optax.contrib",
        transform="scale_by_simplified_ademamix",
        epsilons=_E_ROOT,
        decay=_DECAY,
    ),
    "sm3": Entry(
        family="adam",
        source="Anil et al., Memory-Efficient Adaptive Optimization, arXiv 1901.11150",
        transform="scale_by_sm3",
        epsilons=_IN_ROOT,
    ),
    "sophia": Entry(
        family="adam",
        source="Liu et al., Sophia, arXiv 2305.14342",
        module="optax.contrib",
        layout="sophia",
        epsilons={"eps": "gradient over update"},
        decay=_DECAY_2,
        same_run=(
            "Hutchinson's estimate of the diagonal has noise from the other entries of a row, whose units "
            "change with the table; its expectation is the same, and with an exact diagonal so is the run"
        ),
        note=(
            "Its Newton step is clipped at the learning rate, entry by entry: Adam's rule. The diagonal of "
            "the Hessian is measured against the parameter's own learning rate, so that γ clips at the same "
            "multiple of a step in each table."
        ),
    ),
    "yogi": Entry(
        family="adam",
        source="Zaheer et al., Adaptive Methods for Nonconvex Optimization, NeurIPS 2018",
        transform="scale_by_yogi",
        epsilons={**_E_ROOT, "initial_accumulator_value": "gradient and gradient²"},
    ),
}
"""The optimizers that µP has a rule for, by optax's name."""

TRANSFORMS: Final[Mapping[str, Entry]] = {
    **{entry.transform: entry for entry in OPTIMIZERS.values() if entry.transform is not None},
    # The optimizers of these transforms do more, and so are of another family.
    "scale_by_factored_rms": Entry(
        family="adam", source=OPTIMIZERS["adafactor"].source, epsilons={"epsilon": "gradient²"}
    ),
    "scale_by_trust_ratio": Entry(
        family="normalized",
        source=OPTIMIZERS["lars"].source,
        units="norm",
        layout="trust_ratio",
        epsilons={"min_norm": "gradient norm and parameter norm", "eps": "gradient norm"},
        note="It is for gradients, as in LARS, and not for the updates of another transform. " + _ZERO_INIT,
    ),
    "scale_by_stddev": OPTIMIZERS["rmsprop"],
}
"""An entry for each of optax's transforms."""

_LR_FREE: Final = "it finds its learning rate itself, from norms over all parameters, "
_NO_RATE: Final = "so that there is no rate for µP to scale and nothing tuned that could be transferred"

UNSUPPORTED: Final[Mapping[str, str]] = {
    "cocob": "it bets on each entry and has no learning rate, " + _NO_RATE,
    "dadapt_adamw": _LR_FREE + _NO_RATE,
    "dog": _LR_FREE + _NO_RATE,
    "dowg": _LR_FREE + _NO_RATE,
    "dpsgd": (
        "privacy asks for noise as large as the clipping norm in every entry, so its norm grows with the "
        "number of parameters whatever the learning rates are"
    ),
    "galore": (
        "the rank of its projection is a width of its own, which decides how large an update is, and no rule "
        "for it is known"
    ),
    "lbfgs": (
        "it takes inner products over all parameters as its metric and searches along a line, " + _NO_RATE
    ),
    "mechanize": _LR_FREE + _NO_RATE,
    "momo": "its step follows from the loss and the norm of the gradient over all parameters, " + _NO_RATE,
    "momo_adam": "its step follows from the loss and the norm of the gradient over all parameters, "
    + _NO_RATE,
    "polyak_sgd": (
        "its step follows from the loss and the norm of the gradient over all parameters, " + _NO_RATE
    ),
    "prodigy": _LR_FREE + _NO_RATE,
}
"""The optimizers that µP has no rule for, and why."""

UNSUPPORTED_STATES: Final[Mapping[str, str]] = {
    "COCOBState": "cocob",
    "DAdaptAdamWState": "dadapt_adamw",
    "DoGState": "dog",
    "DoWGState": "dowg",
    "DifferentiallyPrivateAggregateState": "dpsgd",
    "GaLoreState": "galore",
    "ScaleByLBFGSState": "lbfgs",
    "MechanicState": "mechanize",
    "MomoState": "momo",
    "MomoAdamState": "momo_adam",
    "ProdigyState": "prodigy",
}
"""The states by which a bare optimizer of these is recognised."""

AROUND: Final[frozenset[str]] = frozenset(
    {"MultiSteps", "apply_if_finite", "inject_hyperparams", "lookahead", "masked", "sam", "schedule_free"}
)
"""Wrappers of optimizers; they go around an optimizer in µP as around one of optax's."""
