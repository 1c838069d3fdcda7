"""The other side of a benchmark of sweeps: microsoft/mup, trial by trial. Run by PyTorch's interpreter.

    /path/to/python benchmarks/sweep_torch.py '{"model": "mlp", "width": 64, "base_width": 64,
        "log2_lrs": [-9, -8, -7, -6], "seeds": 1, "steps": 80, "batch": 64, "length": 64, "head_dim": 16,
        "rounds": 3, "compile": false}'

Imports nothing of JAX's. PyTorch gets all that helps it without changing what a trial computes:

- one module, compiled once for each number of threads; a trial copies its seed's initial values into it,
  which are made once a round;
- forward pass and loss are compiled as one graph, in the default mode: of the modes and options that were
  tried, none was faster on a CPU beyond the noise of the measurement;
- the loss is read once a trial, after the last step;
- threads and implementation of Adam are those that a short measurement finds fastest.

`OMP_NUM_THREADS` bounds the threads. A fresh `TORCHINDUCTOR_CACHE_DIR` makes compilation a cold one.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import mup
import torch
from coord_check_torch import Transformer, _in_mup
from torch import nn
from torch.nn import functional

Batch = tuple[torch.Tensor, torch.Tensor]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_CLASSES: Final = 10
_TOKENS: Final = 256
_PIXELS: Final = 784

ADAMS: Final[Mapping[str, Mapping[str, bool]]] = {
    "default": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
"""Implementations of Adam, as options of `mup.MuAdam`."""

_TRIES: Final = 3
_TRY_STEPS: Final = 20


class Mlp(nn.Module):
    """`mujax.models.MLP` as in the task "mnist-mlp": three hidden layers without biases."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden_0 = nn.Linear(_PIXELS, width, bias=False)
        self.hidden_1 = nn.Linear(width, width, bias=False)
        self.hidden_2 = nn.Linear(width, width, bias=False)
        self.readout = mup.MuReadout(width, _CLASSES, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of a batch of vectors."""
        x = functional.relu(self.hidden_0(x))
        x = functional.relu(self.hidden_1(x))
        return self.readout(functional.relu(self.hidden_2(x)))


@dataclasses.dataclass(frozen=True)
class Setting:
    """Settings that are chosen by measurement.

    Attributes:
        threads: of PyTorch, within an operation.
        adam: a key of `ADAMS`.
    """

    threads: int
    adam: str


@dataclasses.dataclass(frozen=True)
class Trials:
    """Trials of one width, all in the same module.

    Attributes:
        model: the module, with base shapes.
        loss: inputs, targets -> the loss of `model`, compiled or not.
    """

    model: nn.Module
    loss: Loss

    def train(
        self, start: Mapping[str, torch.Tensor], lr: float, batches: Sequence[Batch], adam: str
    ) -> torch.Tensor:
        """Trains from the parameters `start`, a step for each batch; the loss at the last.

        The optimizer is a new one: its state of the trial before must not be seen.
        """
        self.model.load_state_dict(start)
        optimizer = mup.MuAdam(self.model.parameters(), lr=lr, **ADAMS[adam])
        loss = torch.tensor(float("nan"))
        for inputs, targets in batches:
            loss = self.loss(inputs, targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        return loss.detach()


def _build(case: Mapping[str, Any], width: int) -> nn.Module:
    if case["model"] == "mlp":
        return Mlp(width)
    return Transformer(width, heads=width // case["head_dim"], length=case["length"])


def _start(case: Mapping[str, Any], seed: int) -> nn.Module:
    """A model of the case's width in µP, initialised from `seed`."""
    torch.manual_seed(seed)
    return _in_mup(functools.partial(_build, case), [case["base_width"]], case["width"])


def _batches(case: Mapping[str, Any]) -> list[Batch]:
    """A batch for each step, shared by all trials.

    Targets follow from the inputs, by a linear map or a permutation: a loss below that of a uniform guess,
    log 10 or log 256, shows that the model learns.
    """
    generator = torch.Generator().manual_seed(0)
    if case["model"] == "mlp":
        teacher = torch.randn(_PIXELS, _CLASSES, generator=generator)
        inputs = [torch.randn(case["batch"], _PIXELS, generator=generator) for _ in range(case["steps"])]
        return [(x, (x @ teacher).argmax(1)) for x in inputs]
    permutation = torch.randperm(_TOKENS, generator=generator)
    shape = (case["batch"], case["length"])
    tokens = [torch.randint(_TOKENS, shape, generator=generator) for _ in range(case["steps"])]
    return [(x, permutation[x].flatten()) for x in tokens]


def _trials(case: Mapping[str, Any]) -> Trials:
    model = _start(case, seed=0)

    def loss(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(model(inputs).flatten(0, -2), targets)

    if case["compile"]:
        return Trials(model, torch.compile(loss, fullgraph=True, dynamic=False))
    return Trials(model, loss)


def _measured(settings: Sequence[Setting], run: Callable[[Setting], object]) -> dict[Setting, float]:
    """The best seconds of `run` with each setting, the settings in turn."""
    best = dict.fromkeys(settings, float("inf"))
    for _, setting in itertools.product(range(_TRIES), settings):
        torch.set_num_threads(setting.threads)
        # Another number of threads is another compiled program and another team of threads.
        run(setting)
        start = time.perf_counter()
        run(setting)
        best[setting] = min(best[setting], time.perf_counter() - start)
    return best


def measure(case: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of all trials of a sweep, in each round.

    Args:
        case: `model` ("mlp" or "transformer"), `width`, `base_width`, `log2_lrs`, `seeds`, `steps`, `batch`,
            `length` and `head_dim` (of a transformer), `rounds`, and `compile`: use `torch.compile`.

    Returns:
        `seconds` of each round; `trials` of a round; `first_seconds`, of building the model and its first
        trial with PyTorch's own number of threads, compilation included; the `threads` and the `adam`
        that were chosen, and the seconds of those `tried`; the mean `final_loss` of the trials;
        `versions`.
    """
    batches = _batches(case)
    rates = [2.0**exponent for exponent in case["log2_lrs"]]
    middle = rates[len(rates) // 2]

    start = time.perf_counter()
    trials = _trials(case)
    initial = _start(case, seed=0).state_dict()
    trials.train(initial, middle, batches, "fused").item()
    first_seconds = time.perf_counter() - start

    tried = _measured(
        [
            Setting(threads, adam)
            for threads, adam in itertools.product(dict.fromkeys((torch.get_num_threads(), 1)), ADAMS)
        ],
        lambda setting: trials.train(initial, middle, batches[:_TRY_STEPS], setting.adam).item(),
    )
    chosen = min(tried, key=tried.__getitem__)
    torch.set_num_threads(chosen.threads)
    trials.train(initial, middle, batches, chosen.adam).item()

    seconds, losses = [], []
    for _ in range(case["rounds"]):
        start = time.perf_counter()
        for seed in range(case["seeds"]):
            initial = _start(case, seed).state_dict()
            losses += [trials.train(initial, rate, batches, chosen.adam).item() for rate in rates]
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": seconds,
        "trials": len(rates) * case["seeds"],
        "first_seconds": first_seconds,
        "threads": torch.get_num_threads(),
        "adam": chosen.adam,
        "tried": {f"{setting.threads} {setting.adam}": value for setting, value in tried.items()},
        "final_loss": statistics.fmean(losses),
        "versions": {"torch": torch.__version__, "mup": importlib.metadata.version("mup")},
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
