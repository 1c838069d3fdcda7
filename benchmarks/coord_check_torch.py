"""The other side of `coord_check.py`: `mup.coord_check` on the same models. Run by PyTorch's interpreter.

Imports nothing of JAX's, so that the process takes as long as a user of microsoft/mup waits.
"""

from __future__ import annotations

import time

START = time.perf_counter()

import functools  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from typing import Any  # noqa: E402

import common  # noqa: E402
import mup  # noqa: E402
import torch  # noqa: E402
from mup.coord_check import get_coord_data  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402


class Mlp(nn.Module):
    """`mujax.models.MLP`: two hidden layers without biases."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden_0 = nn.Linear(784, width, bias=False)
        self.hidden_1 = nn.Linear(width, width, bias=False)
        self.readout = mup.MuReadout(width, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of a batch of vectors."""
        x = functional.relu(self.hidden_0(x))
        return self.readout(functional.relu(self.hidden_1(x)))


class Block(nn.Module):
    """`mujax.models.Transformer`, with logits divided by the head size."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, bias=False)
        for name in ("query", "key", "value", "out"):
            self.add_module(name, nn.Linear(width, width, bias=False))
        self.ff_norm = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The residual stream after this block."""
        batch, length, width = x.shape
        y = self.attention_norm(x)
        q, k, v = (
            projection(y).view(batch, length, self.heads, -1).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.heads / width)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.ff_norm(x)), approximate="tanh"))


class Transformer(nn.Module):
    """`mujax.models.Transformer`."""

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(2)))
        self.norm = nn.LayerNorm(width, bias=False)
        self.readout = mup.MuReadout(width, 256, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of the next token at each place."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        return self.readout(self.norm(self.blocks(x)))


def _in_mup(build: Callable[[int], nn.Module], widths: Sequence[int], width: int) -> nn.Module:
    model = build(width)
    mup.set_base_shapes(model, build(min(widths)), delta=build(2 * min(widths)))
    for module in model.modules():
        if isinstance(module, nn.Linear) and not isinstance(module, mup.MuReadout):
            mup.init.kaiming_normal_(module.weight, nonlinearity="linear")
    return model


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Seconds of one check, the first in this process, and its peak memory.

    Args:
        case: a `coord_check.Case` as a dict.
    """
    imports = time.perf_counter() - START
    start = time.perf_counter()
    batch, widths = case["batch"], case["widths"]
    if case["model"] == "mlp":
        build: Callable[[int], nn.Module] = Mlp
        inputs, targets = torch.randn(batch, 784), torch.randint(10, (batch,))
    else:
        length = case["length"]
        build = functools.partial(Transformer, heads=case["heads"], length=length)
        inputs, targets = torch.randint(256, (batch, length)), torch.randint(256, (batch * length,))
    models = {width: functools.partial(_in_mup, build, widths, width) for width in widths}
    records = get_coord_data(
        models,
        [(inputs, targets)],
        optimizer="adam",
        lr=case["learning_rate"],
        nsteps=case["steps"],
        nseeds=case["seeds"],
        flatten_output=case["model"] != "mlp",
        cuda=False,
        show_progress=False,
    )
    seconds = time.perf_counter() - start
    return {
        "imports": imports,
        "check": seconds,
        "cpu": time.process_time(),
        "megabytes": common.resident()[1] / 1e6,
        "records": len(records),
        "versions": {"torch": torch.__version__, "threads": torch.get_num_threads()},
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
