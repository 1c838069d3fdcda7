"""The training runs on which mujax and microsoft/mup are compared: sizes, optimizers, weights, batches.

Both sides read this module and nothing else of each other. It needs NumPy only, and every number in it
follows from PCG64's raw 64-bit stream (which NumPy keeps stable, unlike the distributions of its
`Generator`) by exactly rounded operations, so the golden losses hold on any machine.

Parameters are named by their Flax path and stored in Flax's layout, fan-in axes first.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
from jaxtyping import Float64, Int64

STEPS: Final = 20


@dataclasses.dataclass(frozen=True)
class Mlp:
    """A classifier of vectors: ReLU layers of the given widths, biases everywhere.

    Attributes:
        widths: of the hidden layers.
    """

    widths: tuple[int, ...]
    features: int = 10
    classes: int = 5
    batch: int = 16


@dataclasses.dataclass(frozen=True)
class Transformer:
    """A pre-LN decoder with learned positions and an untied readout, biases everywhere.

    Its attention logits are divided by the head size, not by its square root.

    Attributes:
        model: width of the residual stream.
        heads: number of attention heads.
        head: size of a head.
        mlp: width of the hidden layer in each block.
    """

    model: int
    heads: int
    head: int
    mlp: int
    layers: int = 2
    vocabulary: int = 11
    length: int = 8
    batch: int = 6


Architecture = Mlp | Transformer

BASES: Final[Mapping[str, Architecture]] = {
    "mlp": Mlp(widths=(12, 16, 8)),
    "transformer": Transformer(model=8, heads=2, head=4, mlp=16),
}

# Each width differs from the base's, since both libraries take an axis that does not for a finite one.
# Heads are free to stay: in the Transformer the kernel's axis of microsoft/mup is heads times head.
TARGETS: Final[Mapping[str, Mapping[str, Architecture]]] = {
    "mlp": {
        "x2": Mlp(widths=(24, 32, 16)),
        "x3": Mlp(widths=(36, 48, 24)),
        "x4": Mlp(widths=(48, 64, 32)),
        "mixed": Mlp(widths=(18, 64, 24)),
    },
    "transformer": {
        "x2": Transformer(model=16, heads=2, head=8, mlp=32),
        "x3": Transformer(model=24, heads=6, head=4, mlp=48),
        "x4": Transformer(model=32, heads=4, head=8, mlp=64),
        "mixed": Transformer(model=16, heads=4, head=6, mlp=64),
    },
}

# By optax's names, as tuned on the base. Adam's epsilon is large enough to matter, so that where it enters
# is part of what is compared.
OPTIMIZERS: Final[dict[str, Mapping[str, Any]]] = {
    "sgd": {"learning_rate": 0.05, "momentum": 0.9},
    "adam": {"learning_rate": 0.01, "b1": 0.9, "b2": 0.98, "eps": 1e-3},
    "adamw": {"learning_rate": 0.01, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.3},
}

# What microsoft/mup takes as `MuAdam(impl=...)` and `MuSGD(impl=...)`. Where the two libraries put an epsilon
# in different places (Adagrad, RAdam) it is next to none. ASGD's own iterates are SGD's where nothing decays.
IMPLEMENTATIONS: Final[dict[str, Mapping[str, Any]]] = {
    "rmsprop": {"learning_rate": 0.003, "decay": 0.95, "eps": 1e-3, "momentum": 0.5},
    "adagrad": {"learning_rate": 0.03, "initial_accumulator_value": 1e-3, "eps": 0.0},
    "nadam": {"learning_rate": 0.01, "b1": 0.9, "b2": 0.98, "eps": 1e-3},
    "radam": {"learning_rate": 0.04, "b1": 0.9, "b2": 0.98, "eps": 1e-30},
    "asgd": {"learning_rate": 0.1},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One run: an architecture, how it grows from its base, and the optimizer."""

    architecture: str
    growth: str
    optimizer: str

    def __str__(self) -> str:
        return f"{self.architecture}-{self.growth}-{self.optimizer}"

    @property
    def options(self) -> Mapping[str, Any]:
        """The optimizer's arguments."""
        return (OPTIMIZERS | IMPLEMENTATIONS)[self.optimizer]

    @property
    def base(self) -> Architecture:
        """The sizes of the base model."""
        return BASES[self.architecture]

    @property
    def target(self) -> Architecture:
        """The sizes of the model that is trained."""
        return TARGETS[self.architecture][self.growth]


CASES: Final = tuple(
    Case(architecture, growth, optimizer)
    for architecture in BASES
    for growth in TARGETS[architecture]
    for optimizer in (*OPTIMIZERS, *(IMPLEMENTATIONS if growth == "mixed" else ()))
)


@dataclasses.dataclass(frozen=True)
class _Fill:
    """How a parameter is filled: uniform with this mean and standard deviation."""

    shape: tuple[int, ...]
    std: float
    mean: float = 0.0


def _dense(
    path: str, fan_in: tuple[int, ...], fan_out: tuple[int, ...], gain: float = 1.0
) -> Iterator[tuple[str, _Fill]]:
    yield f"{path}/kernel", _Fill((*fan_in, *fan_out), gain / math.sqrt(math.prod(fan_in)))
    yield f"{path}/bias", _Fill(fan_out, 0.1)


def _readout(path: str, fan_in: int, fan_out: int) -> Iterator[tuple[str, _Fill]]:
    # Table 8: independent of width.
    yield f"{path}/kernel", _Fill((fan_in, fan_out), 0.5)
    yield f"{path}/bias", _Fill((fan_out,), 0.1)


def _layer_norm(path: str, features: int) -> Iterator[tuple[str, _Fill]]:
    yield f"{path}/scale", _Fill((features,), 0.1, mean=1.0)
    yield f"{path}/bias", _Fill((features,), 0.1)


def _mlp_fills(size: Mlp) -> Iterator[tuple[str, _Fill]]:
    features = size.features
    for index, width in enumerate(size.widths):
        yield from _dense(f"hidden_{index}", (features,), (width,), gain=math.sqrt(2))
        features = width
    yield from _readout("readout", features, size.classes)


def _transformer_fills(size: Transformer) -> Iterator[tuple[str, _Fill]]:
    model, heads = (size.model,), (size.heads, size.head)
    yield "tokens/embedding", _Fill((size.vocabulary, size.model), 1.0)
    yield "positions", _Fill((size.length, size.model), 0.3)
    for index in range(size.layers):
        block = f"block_{index}"
        yield from _layer_norm(f"{block}/norm_attention", size.model)
        for projection in ("query", "key", "value"):
            yield from _dense(f"{block}/{projection}", model, heads)
        yield from _dense(f"{block}/out", heads, model)
        yield from _layer_norm(f"{block}/norm_mlp", size.model)
        yield from _dense(f"{block}/up", model, (size.mlp,))
        yield from _dense(f"{block}/down", (size.mlp,), model)
    yield from _layer_norm("norm", size.model)
    yield from _readout("readout", size.model, size.vocabulary)


def _uniform(seed: str, *shape: int) -> Float64[np.ndarray, "*axes"]:
    """Numbers in [0, 1), a function of the seed's text alone."""
    bits = np.random.PCG64(zlib.crc32(seed.encode())).random_raw(math.prod(shape))
    return ((np.asarray(bits, np.uint64) >> np.uint64(11)) * 2.0**-53).reshape(shape)


def weights(size: Architecture) -> dict[str, Float64[np.ndarray, "*axes"]]:
    """The initial weights by Flax path, in Flax's layout."""
    fills = _mlp_fills(size) if isinstance(size, Mlp) else _transformer_fills(size)
    return {
        path: fill.mean + fill.std * math.sqrt(12) * (_uniform(f"{size}{path}", *fill.shape) - 0.5)
        for path, fill in fills
    }


def batches(size: Architecture) -> tuple[np.ndarray, Int64[np.ndarray, "*axes"]]:
    """The inputs and labels of all steps, stacked along the first axis.

    The same for every width. A fixed random teacher sets the labels of the MLP's; in the Transformer's
    sequences a token mostly follows from the one before.
    """
    if isinstance(size, Mlp):
        x = 2 * _uniform("mlp x", STEPS, size.batch, size.features) - 1
        teacher = _uniform("mlp teacher", size.features, size.classes) - 0.5
        # A product by hand: the order of a BLAS product's additions is not the same everywhere.
        scores = (x[..., :, None] * teacher).sum(axis=-2)
        return x, scores.argmax(axis=-1).astype(np.int64)
    free = (_uniform("tokens", STEPS, size.batch, size.length + 1) * size.vocabulary).astype(np.int64)
    surprise = _uniform("surprise", STEPS, size.batch, size.length + 1) < 0.2
    tokens = free.copy()
    for place in range(1, size.length + 1):
        follows = (2 * tokens[..., place - 1] + 1) % size.vocabulary
        tokens[..., place] = np.where(surprise[..., place], free[..., place], follows)
    return tokens[..., :-1], tokens[..., 1:]


def tree(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dictionary of a mapping from slash-separated paths."""
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return nested
