"""The comparison's other side: the same models in PyTorch, trained with microsoft/mup in double.

Imported only where `torch` and `mup` are installed (extra `parity`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import mup
import numpy as np
import torch
from problems import Architecture, Case, Mlp, Transformer, batches, weights
from torch import nn
from torch.nn import functional


class TorchMlp(nn.Module):
    """`problems.Mlp` as microsoft/mup wants it: a plain module with a `MuReadout`."""

    def __init__(self, size: Mlp) -> None:
        super().__init__()
        features = size.features
        self.depth = len(size.widths)
        for index, width in enumerate(size.widths):
            self.add_module(f"hidden_{index}", nn.Linear(features, width))
            features = width
        self.readout = mup.MuReadout(features, size.classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of a batch of vectors."""
        for index in range(self.depth):
            x = functional.relu(self.get_submodule(f"hidden_{index}")(x))
        return self.readout(x)


class TorchBlock(nn.Module):
    """Attention with logits divided by the head size, then an MLP, each after its layer norm."""

    def __init__(self, size: Transformer) -> None:
        super().__init__()
        inner = size.heads * size.head
        self.heads, self.head = size.heads, size.head
        self.norm_attention = nn.LayerNorm(size.model, eps=1e-5)
        self.query = nn.Linear(size.model, inner)
        self.key = nn.Linear(size.model, inner)
        self.value = nn.Linear(size.model, inner)
        self.out = nn.Linear(inner, size.model)
        self.norm_mlp = nn.LayerNorm(size.model, eps=1e-5)
        self.up = nn.Linear(size.model, size.mlp)
        self.down = nn.Linear(size.mlp, size.model)

    def forward(self, x_BxLxD: torch.Tensor) -> torch.Tensor:
        """The residual stream after this block."""
        batch, length, _ = x_BxLxD.shape
        y_BxLxD = self.norm_attention(x_BxLxD)
        q_BxHxLxK, k_BxHxLxK, v_BxHxLxK = (
            projection(y_BxLxD).view(batch, length, self.heads, self.head).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        logits_BxHxLxL = q_BxHxLxK @ k_BxHxLxK.transpose(-1, -2) / self.head
        past_LxL = torch.ones(length, length, dtype=torch.bool).tril()
        attention_BxHxLxL = logits_BxHxLxL.masked_fill(~past_LxL, -torch.inf).softmax(-1)
        mixed_BxLxHK = (attention_BxHxLxL @ v_BxHxLxK).transpose(1, 2).reshape(batch, length, -1)
        x_BxLxD = x_BxLxD + self.out(mixed_BxLxHK)
        hidden_BxLxF = functional.gelu(self.up(self.norm_mlp(x_BxLxD)), approximate="tanh")
        return x_BxLxD + self.down(hidden_BxLxF)


class TorchTransformer(nn.Module):
    """`problems.Transformer` as microsoft/mup wants it: 1/d attention by hand and a `MuReadout`."""

    def __init__(self, size: Transformer) -> None:
        super().__init__()
        self.layers = size.layers
        self.tokens = nn.Embedding(size.vocabulary, size.model)
        self.positions = nn.Parameter(torch.zeros(size.length, size.model))
        for index in range(size.layers):
            self.add_module(f"block_{index}", TorchBlock(size))
        self.norm = nn.LayerNorm(size.model, eps=1e-5)
        self.readout = mup.MuReadout(size.model, size.vocabulary)

    def forward(self, tokens_BxL: torch.Tensor) -> torch.Tensor:
        """Logits of the next token at each place."""
        x_BxLxD = self.tokens(tokens_BxL) + self.positions
        for index in range(self.layers):
            x_BxLxD = self.get_submodule(f"block_{index}")(x_BxLxD)
        return self.readout(self.norm(x_BxLxD))


def _build(size: Architecture) -> nn.Module:
    model = TorchMlp(size) if isinstance(size, Mlp) else TorchTransformer(size)
    return model.double()


_NAMES: Final = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def state_dict(size: Architecture, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """`problems.weights` under PyTorch's names and in its layout: (out, in), heads flattened.

    Args:
        size: the model's sizes.
        shapes: the shape of each of the PyTorch model's parameters.
    """
    state: dict[str, torch.Tensor] = {}
    for path, value in weights(size).items():
        *parents, last = path.split("/")
        name = ".".join((*parents, _NAMES.get(last, last)))
        if last == "kernel":
            value = value.reshape(tuple(shapes[name])[::-1]).T
        state[name] = torch.from_numpy(np.ascontiguousarray(value.reshape(tuple(shapes[name]))))
    return state


# optax's names of arguments that PyTorch calls otherwise.
_ARGUMENTS: Final = {"learning_rate": "lr", "decay": "alpha"}

_MAKERS: Final[Mapping[str, Callable[..., torch.optim.Optimizer]]] = {
    "sgd": mup.MuSGD,
    "adam": mup.MuAdam,
    "adamw": mup.MuAdamW,
    "rmsprop": functools.partial(mup.MuAdam, impl=torch.optim.RMSprop),
    "adagrad": functools.partial(mup.MuAdam, impl=torch.optim.Adagrad),
    # So large that PyTorch's schedule of the momentum is at its end from the first step on; optax has none.
    "nadam": functools.partial(mup.MuAdam, impl=torch.optim.NAdam, momentum_decay=1e6),
    "radam": functools.partial(mup.MuAdam, impl=torch.optim.RAdam),
    "asgd": functools.partial(mup.MuSGD, impl=torch.optim.ASGD, lambd=0.0),
}


def _optimizer(case: Case, parameters: Any) -> torch.optim.Optimizer:
    given = {_ARGUMENTS.get(name, name): value for name, value in case.options.items()}
    if "b1" in given:
        given["betas"] = (given.pop("b1"), given.pop("b2"))
    return _MAKERS[case.optimizer](parameters, **given)


@contextlib.contextmanager
def _one_thread_in_double() -> Iterator[None]:
    # Split between threads, products this small spend nearly all their time waiting for each other. Some of
    # PyTorch's optimizers (NAdam, ASGD) keep scalars of their own, in the default dtype.
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)


@_one_thread_in_double()
def losses(case: Case) -> list[float]:
    """Trains with microsoft/mup and returns the loss at every step, before its update."""
    model = _build(case.target)
    mup.set_base_shapes(model, _build(case.base))
    model.load_state_dict(
        state_dict(case.target, {name: parameter.shape for name, parameter in model.named_parameters()})
    )
    optimizer = _optimizer(case, model.parameters())
    history: list[float] = []
    for x, labels in zip(*map(torch.from_numpy, batches(case.target)), strict=True):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x).flatten(0, -2), labels.flatten())
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history
