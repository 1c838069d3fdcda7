"""F5: translation, tuned at the target and on a proxy of a quarter of its width."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.common import so_far, spent_on
from benchmarks.paper import _pairs, _search
from benchmarks.paper._figure import TITLES, Figure, Inputs, Row
from benchmarks.paper._pictures import lines
from benchmarks.paper._results import Results
from mujax import data, models
from mujax.train import Batches, Training, training_run
from mujax.tune import front

SEARCHES: Final = {"direct": "tuned directly", "proxy": "µTransfer"}
"""Both ways; the third search, "target", is what each trial of the proxy is worth at the target."""

WORTH: Final = {"bleu": "BLEU", "loss": "held-out loss"}

ABOUT: Final = 5.0
"""The least factor that counts as about ten."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a run.

    Attributes:
        width: of the target; the proxy has a quarter of it.
        depth: blocks of the encoder, and of the decoder.
        length: subwords of a sentence, at most.
        valid: held-out batches, or as many as there are.
        trials: of each search.
        seeds: of the final runs.
        resamples: orders of the trials.
        rates: lowest and highest learning rate, as log2.
        space: factors to either side of 1 in which both multipliers are searched, as log2.
        zeros: what starts at zero in µP, as the paper advises for long runs; a short one learns late by it.
    """

    width: int
    depth: int
    heads: int
    vocab_size: int
    length: int
    batch: int
    steps: int
    valid: int
    trials: int
    seeds: tuple[int, ...]
    resamples: int = 25
    rates: tuple[float, float] = (-12.0, -5.0)
    space: float = 3.0
    zeros: tuple[str, ...] = ()

    @property
    def proxy(self) -> int:
        """Width of the proxy."""
        return self.width // 4


class Translation(Figure):
    """Fronts of a search at the target and of one on the proxy."""

    id = "F5"
    title = "translation, tuned on a proxy and directly"
    source = "their Figure 6 and Table 4"
    claim = (
        "With a proxy of a quarter of the width, µTransfer gets to the BLEU that direct tuning gets to with "
        "about a tenth of the operations."
    )
    scales = {  # noqa: RUF012
        "tiny": Config(
            width=32,
            depth=1,
            heads=2,
            vocab_size=1000,
            length=32,
            batch=4,
            steps=6,
            valid=1,
            trials=3,
            seeds=(0, 1),
        ),
        "laptop": Config(
            width=128,
            depth=2,
            heads=4,
            vocab_size=2000,
            length=40,
            batch=32,
            steps=300,
            valid=6,
            trials=16,
            seeds=(0, 1, 2),
        ),
        # IWSLT14's model: width 512, 6 + 6 blocks, 4 heads.
        "gpu": Config(
            width=512,
            depth=6,
            heads=4,
            vocab_size=8000,
            length=80,
            batch=128,
            steps=20_000,
            valid=6,
            trials=64,
            seeds=(0, 1, 2),
            zeros=("query",),
        ),
    }

    remarks = {  # noqa: RUF012
        "laptop": "300 steps are too few for a translation: the held-out loss tells more than BLEU here."
    }

    def data(self, config: Config, inputs: Inputs) -> tuple[Any, str]:
        _pairs.needed("sacrebleu")
        return _pairs.load(inputs.pairs, vocab_size=config.vocab_size, length=config.length)

    def run(self, config: Config, data: Any, results: Results) -> None:
        mult = {"low": 2.0**-config.space, "high": 2.0**config.space, "log": True}
        low, high = config.rates
        space = {
            "learning_rate": {"low": 2.0**low, "high": 2.0**high, "log": True},
            "output_mult": mult,
            "attention_mult": mult,
        }
        made = {
            "proxy": functools.partial(_training, config, data, config.proxy, "mup"),
            "target": functools.partial(_training, config, data, config.width, "mup"),
            "direct": functools.partial(_training, config, data, config.width, "sp"),
        }
        # One sampler with one seed: all three draw the same hyperparameters.
        for name, training in made.items():
            _search.search(results, name, training, space, trials=config.trials, fixed=SCHEDULE)
        for name, tuned, training in (
            ("µTransfer", "proxy", "target"),
            ("direct", "direct", "direct"),
            ("naive", "proxy", "direct"),
        ):
            found = _search.best(results, tuned)
            if found is not None:
                _search.repeat(results, name, made[training], {**SCHEDULE, **found}, config.seeds)

    def table(self, config: Config, results: Results) -> list[Row]:
        rows = [self._saving(config, results, measure) for measure in WORTH]
        found = {
            name: _search.values(results, name, config.seeds, "bleu")
            for name in ("µTransfer", "direct", "naive")
        }
        rows += [
            _search.compared(
                f"BLEU after all {config.trials} trials at least that of direct tuning",
                *(found["µTransfer"], found["direct"]),
                higher=True,
            ),
            _search.compared(
                f"BLEU above that of the proxy's hyperparameters in the {TITLES['sp']}",
                *(found["µTransfer"], found["naive"]),
                higher=True,
            ),
        ]
        return rows

    def _saving(self, config: Config, results: Results, measure: str) -> Row:
        claim = f"{WORTH[measure]} of direct tuning with about a tenth of the operations"
        ratios = savings(results, measure, config.resamples)
        if not ratios:
            return Row(claim, "no trial got to its end", "-", None)
        low, high = np.quantile(ratios, (0.1, 0.9))
        return Row(
            claim,
            f"{np.median(ratios):.1f} times fewer",
            f"{low:.1f} to {high:.1f} (10 to 90 % of {config.resamples} orders)",
            True if low >= ABOUT else False if high < ABOUT else None,
        )

    def draw(self, config: Config, results: Results, path: pathlib.Path) -> None:
        once = max(trial["flops"] or 1.0 for trial in results["search", "direct"]["trials"])
        panels: dict[str, dict[str, Any]] = {}
        for measure, title in WORTH.items():
            panels[title] = {}
            for name, label in SEARCHES.items():
                losses, worths, flops = _trials(results, name, measure)
                if all(worth is None for worth in worths):
                    continue
                found = front(losses, flops, worths, resamples=config.resamples)
                sign = -1.0 if measure == "bleu" else 1.0
                panels[title][label] = (
                    [spent / once for spent in found.flops],
                    [sign * one for one in found.loss],
                    [sign * one for one in found.low],
                    [sign * one for one in found.high],
                )
        lines(
            path,
            panels,
            "operations of the tuning, in trainings of the target",
            list(WORTH.values()),
            f"German to English, width {config.width}: {config.trials} trials, {config.steps} steps of batch "
            f"{config.batch}; median and 10 to 90 % of {config.resamples} searches",
        )


SCHEDULE: Final = {"schedule": "inverse_sqrt", "warmup": 0.1}


def _trials(
    results: Results, name: str, measure: str
) -> tuple[list[float | None], list[float | None], list[float]]:
    """Loss of each trial, its worth at the target (lower is better) and its operations."""
    key = "hparams"
    at_target = {
        tuple(sorted(trial[key].items())): trial
        for trial in results["search", "target" if name == "proxy" else name]["trials"]
    }
    losses, worths, flops = [], [], []
    for trial in results["search", name]["trials"]:
        same = at_target.get(tuple(sorted(trial[key].items())))
        if same is None:
            continue
        bleu = same["metrics"].get("bleu")
        losses.append(trial["loss"])
        worths.append(same["loss"] if measure == "loss" or same["loss"] is None or bleu is None else -bleu)
        flops.append(trial["flops"] or 0.0)
    return losses, worths, flops


def savings(results: Results, measure: str, resamples: int) -> list[float]:
    """Operations of direct tuning over those of µTransfer, for what half of the direct trials get to.

    Args:
        results: with the three searches.
        measure: of `WORTH`.
        resamples: orders of the trials.

    Returns:
        The ratio in each order; 0 where µTransfer does not get there.
    """
    curves = {}
    for name in SEARCHES:
        losses, worths, flops = _trials(results, name, measure)
        curves[name] = _array(losses), _array(worths), np.array(flops)
    count = min(len(losses) for losses, _, _ in curves.values())
    if not count or not all(np.isfinite(worths).any() for _, worths, _ in curves.values()):
        return []
    random = np.random.default_rng(0)
    orders = [random.permutation(count) for _ in range(resamples)]
    paths = {
        name: [(so_far(losses[order], worths[order]), np.cumsum(flops[order])) for order in orders]
        for name, (losses, worths, flops) in curves.items()
    }
    level = float(np.median([worth[(count - 1) // 2] for worth, _ in paths["direct"]]))
    ratios = []
    for (direct, direct_spent), (ours, our_spent) in zip(paths["direct"], paths["proxy"], strict=True):
        theirs, own = spent_on(direct, direct_spent, level), spent_on(ours, our_spent, level)
        # Direct tuning that never gets there has at least spent everything.
        theirs = float(direct_spent[-1]) if theirs is None else theirs
        ratios.append(0.0 if not own else theirs / own)
    return ratios


def _array(found: Sequence[float | None]) -> np.ndarray:
    return np.array([np.inf if one is None else one for one in found])


def _training(config: Config, corpus: _pairs.Corpus, width: int, parametrization: str) -> Training:
    pairs = corpus.held_source, corpus.held_target
    valid = [_example(*part) for part in _search.held_out(pairs, batch=config.batch, batches=config.valid)]
    training = training_run(
        functools.partial(
            _model, depth=config.depth, heads=config.heads, vocab_size=config.vocab_size, length=config.length
        ),
        Batches(
            (jnp.asarray(corpus.source), jnp.asarray(corpus.target)),
            lambda pairs, key, batch, steps: data.batch_indices(key, len(pairs[0]), batch=batch, steps=steps),
            lambda pairs, rows: _example(pairs[0][rows], pairs[1][rows]),
        ),
        "adam",
        steps=config.steps,
        width=width,
        base_width=config.proxy,
        batch=config.batch,
        loss=translation_loss,
        valid=valid,
        parametrization=parametrization,
        **({"zero_init": config.zeros} if parametrization == "mup" else {}),
    )
    return _search.scored(training, functools.partial(_bleu, corpus))


def _example(source: Any, target: Any) -> tuple[Any, Any]:
    return (source, target[:, :-1]), target[:, 1:]


def _model(width: int, *, depth: int, heads: int, vocab_size: int, length: int) -> models.EncoderDecoder:
    return models.EncoderDecoder(
        models.EncoderDecoderConfig(
            d_model=width,
            n_layers=depth,
            n_heads=heads,
            vocab_size=vocab_size,
            max_len=length,
            pad=_pairs.PAD,
        )
    )


def translation_loss(logits: Any, targets: Any) -> Any:
    """Mean cross-entropy over the subwords of the translations and their ends."""
    there = targets != _pairs.PAD
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.where(there, losses, 0.0).sum() / jnp.maximum(there.sum(), 1)


def greedy(apply: Any, source: Any) -> Any:
    """The translations of the most likely next subword, again and again.

    Args:
        apply: (source, target so far) -> logits.
        source: (batch, length).

    Returns:
        Subwords after the start, (batch, length).
    """
    batch, length = source.shape
    start = jnp.full((batch, length + 1), _pairs.PAD, jnp.int32).at[:, 0].set(_pairs.START)

    def step(place: Any, target: Any) -> Any:
        logits = apply(source, target[:, :-1])
        following = jax.lax.dynamic_index_in_dim(logits, place, 1, keepdims=False).argmax(-1)
        return jax.lax.dynamic_update_index_in_dim(target, following.astype(jnp.int32), place + 1, 1)

    return jax.lax.fori_loop(0, length, step, start)[:, 1:]


def _bleu(corpus: _pairs.Corpus, apply: Any, valid: Any) -> dict[str, Any]:
    """BLEU of greedy translations of the held-out sentences, by sacrebleu."""
    (source, _), references = valid
    translations = jax.lax.map(functools.partial(greedy, apply), source)

    def measure(translations: Any, references: Any) -> Any:
        texts = [
            [corpus.text(row) for row in np.asarray(part).reshape(-1, part.shape[-1])]
            for part in (translations, references)
        ]
        return np.float32(_pairs.needed("sacrebleu").corpus_bleu(texts[0], [texts[1]]).score)

    shape = jax.ShapeDtypeStruct((), jnp.float32)
    return {"bleu": jax.pure_callback(measure, shape, translations, references, vmap_method="sequential")}


FIGURE: Final = Translation()
