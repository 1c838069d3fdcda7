"""How often the coordinate check is wrong: verdicts on correct and on standard models, over many seeds.

For each configuration it trains once with many seeds and passes a verdict on each group of four, so that
the verdicts are independent. Each is passed as `mujax.coord_check` does: a group whose first two or three
seeds pass clearly is judged by them; the column `seeds` is their mean number. A verdict is wrong where a
correct model does not pass, or where the standard parametrization does not fail.

    python benchmarks/false_alarms.py [--verdicts 20] [--cases NAME ...] [--quick] [--out FILE]

Goal: no more than 1 in 50 verdicts wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import common
import jax
from flax import linen as nn, nnx

import mujax
from mujax import models
from mujax.check import made_up, measure, passes_clearly, prepare, report, respond_at_ends
from mujax.train import default_loss

GOAL: Final = common.Goal(1 / 50, "1 in 50")
GROUP: Final = 4
STEPS: Final = 6


class NNXMLP(nnx.Module):
    """Two hidden layers."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(12, width, rngs=rngs)
        self.hidden = nnx.Linear(width, width, rngs=rngs)
        self.readout = nnx.Linear(width, 8, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        """Logits."""
        return self.readout(nnx.relu(self.hidden(nnx.relu(self.first(x)))))


def _linen(width: int) -> nn.Module:
    return nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(width), nn.relu, nn.Dense(8)])


def _nnx(width: int) -> Callable[[nnx.Rngs], nnx.Module]:
    return lambda rngs: NNXMLP(width, rngs)


def _transformer(width: int, **options: Any) -> nn.Module:
    config = models.TransformerConfig(d_model=width, n_layers=2, vocab_size=32, max_len=8, **options)
    return models.Transformer(config)


def _both(width: int) -> nn.Module:
    return _transformer(width, head_dim={32: 8, 64: 8, 128: 16}[width])


def _resnet(width: int) -> nn.Module:
    return models.ResNet(models.ResNetConfig(stage_sizes=(1, 1), stage_widths=(width, 2 * width)))


def _momentum(rate: Any, spec: mujax.MupSpec) -> Any:
    return mujax.mup_sgd(rate, spec, momentum=0.9)


_X: Final = jax.random.normal(jax.random.key(0), (8, 12))
_TOKENS: Final = jax.random.randint(jax.random.key(0), (2, 8), 0, 32)
_IMAGES: Final = jax.random.normal(jax.random.key(0), (8, 8, 8, 3))
_WIDTHS: Final = (32, 64, 128)
_of = functools.partial

CASES: Final[dict[str, tuple[Any, tuple[int, ...], Any, Any, tuple[float, ...]]]] = {
    "mlp, sgd": (_linen, _WIDTHS, _X, "sgd", (2.0**-5, 2.0**-3)),
    "mlp, adam": (_linen, _WIDTHS, _X, "adam", (2.0**-9, 2.0**-7)),
    "nnx mlp, adamw": (_nnx, _WIDTHS, _X, "adamw", (2.0**-9, 2.0**-7)),
    "heads grow, adam": (_of(_transformer, head_dim=8), _WIDTHS, _TOKENS, "adam", (2.0**-9, 2.0**-7)),
    "head size grows, adamw": (_of(_transformer, n_heads=4), _WIDTHS, _TOKENS, "adamw", (2.0**-9, 2.0**-7)),
    "both grow, adam": (_both, _WIDTHS, _TOKENS, "adam", (2.0**-9, 2.0**-7)),
    "tied, adam": (_of(_transformer, tie_embeddings=True), _WIDTHS, _TOKENS, "adam", (2.0**-9, 2.0**-7)),
    "resnet, momentum": (_resnet, (8, 16, 32), _IMAGES, _momentum, (2.0**-8, 2.0**-6)),
}


@dataclasses.dataclass(frozen=True)
class Counted:
    """The verdicts on one configuration in one parametrization."""

    case: str
    parametrization: str
    verdicts: tuple[str, ...]
    seeds: float
    seconds: float

    @property
    def wrong(self) -> int:
        """The number of wrong verdicts."""
        right = "fail" if self.parametrization == "sp" else "pass"
        return sum(verdict != right for verdict in self.verdicts)


def count(case: str, parametrization: str, verdicts: int) -> Counted:
    """Passes so many verdicts on a configuration."""
    begin = time.perf_counter()
    factory, widths, inputs, optimizer, rates = CASES[case]
    clean, mups, checked = prepare(
        factory,
        widths,
        (inputs,),
        optimizer,
        kwargs={"train": True} if factory is _resnet else None,
        parametrization=parametrization,
    )
    batches = made_up(clean, (inputs,), 0)
    seeds = range(GROUP * verdicts)
    measured = measure(checked, default_loss, batches, rates, STEPS, seeds)
    responses = respond_at_ends(checked, measured, rates[0])

    def verdict(number: int, size: int) -> mujax.CoordCheck:
        part = slice(GROUP * number, GROUP * number + size)
        group = {
            width: one._replace(taps=one.taps[:, part], losses=one.losses[:, part], initial=one.initial[part])
            for width, one in measured.items()
        }
        return report(clean, mups, checked, group, responses, rates, STEPS)

    def first_clear(number: int) -> mujax.CoordCheck:
        tried = (verdict(number, size) for size in range(2, GROUP))
        return next(filter(passes_clearly, tried), None) or verdict(number, GROUP)

    found = [first_clear(number) for number in range(verdicts)]
    return Counted(
        case,
        parametrization,
        tuple(check.verdict for check in found),
        statistics.fmean(check.seeds for check in found),
        time.perf_counter() - begin,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Counts, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--verdicts", type=int, default=20, help="verdicts on each configuration")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="a smoke run: two verdicts")
    parser.add_argument("--out", type=pathlib.Path, default=common.OUT / "false_alarms.json")
    options = parser.parse_args(argv)
    verdicts = 2 if options.quick else options.verdicts
    jobs = [(case, name) for case in options.cases for name in ("mup", "sp")]
    done: list[Counted] = []
    begin = time.perf_counter()
    for case, name in jobs:
        done.append(count(case, name, verdicts))
        left = (time.perf_counter() - begin) / len(done) * (len(jobs) - len(done))
        print(f"{case} ({name}): {done[-1].wrong} wrong; {left:.0f} s left", file=sys.stderr, flush=True)
    rows = [
        (
            one.case,
            one.parametrization,
            *(str(one.verdicts.count(verdict)) for verdict in ("pass", "fail", "undecided")),
            str(one.wrong),
            f"{one.seeds:.1f}",
            f"{one.seconds:.0f} s",
        )
        for one in done
    ]
    print(
        common.table(("case", "parametrization", "pass", "fail", "undecided", "wrong", "seeds", "time"), rows)
    )
    share = {
        name: sum(one.wrong for one in done if one.parametrization == name)
        / sum(len(one.verdicts) for one in done if one.parametrization == name)
        for name in ("mup", "sp")
    }
    missed = [line for name, figure in share.items() for line in GOAL.missed_by(f"wrong, {name}", figure)]
    print(f"\nWrong: {share['mup']:.3f} of the correct ones, {share['sp']:.3f} of the standard ones.")
    print(common.verdict(missed, quick=options.quick))
    content = {
        "goal": GOAL.text,
        "share_wrong": share,
        "cases": [dataclasses.asdict(one) for one in done],
        "missed": missed,
        **common.environment(),
    }
    common.write(options.out, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
