"""The mixture planner: which documents of which source each phase may see, and the refusals before a token is spent.

A phase's data set is read by Megatron's BlendedDataset, which asks source i for ceil(ceil(samples * weight_i) * 1.005) samples
(megatron/core/datasets/blended_megatron_dataset_builder.py, _get_size_per_split_per_dataset; surplus is GPTDatasetConfig's
mid_level_dataset_surplus) and begins a second epoch of a data set that is too short. A view therefore holds at least that many
samples of tokens and one more token (the last label).

Documents are dealt in the order of a hash of (seed, source, epoch, document), phase after phase: no document comes twice before its
source is used up; then the next epoch begins in a new order. The order of documents that stay does not change when a source grows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from data_prep.errors import DataError
from recipes.schema import Data, Phase, Recipe

SURPLUS = 0.005
"""Megatron's mid_level_dataset_surplus."""
SHARE_TOLERANCE_PERCENT = 1e-6


@dataclass(frozen=True)
class Draw:
    """What one phase takes from one source."""

    phase: str
    source: str
    category: str
    share_percent: float
    weight: float
    samples_asked: int
    """Samples that Megatron's blend asks the view for, surplus included."""
    tokens_needed: int
    """samples_asked * sequence length + 1."""
    tokens_planned: int
    """weight * the phase's tokens."""
    documents: np.ndarray
    """Documents of the source in the order of the view, int64 [N]; one repeats only when the source was used up in between."""
    tokens: int
    """In those documents; at least tokens_needed."""
    source_tokens: int
    epochs: float
    """Tokens dealt so far / source_tokens, over the curriculum to the end of this phase."""


def weights(data: Data, phase: str, spec: Phase) -> dict[str, float]:
    """Source -> fraction of the phase's samples, sorted by name; DataError for a category without source or shares that do not fill 100 %."""
    shares = {category: share for category, share in spec.mixture.shares_percent.items() if share > 0}
    total = sum(shares.values())
    if abs(total - 100) > SHARE_TOLERANCE_PERCENT:
        raise DataError(
            f"phase '{phase}': mixture '{spec.mixture.name}' sums to {total:g} %; make phase.{phase}.mixture sum to 100"
        )
    found: dict[str, float] = {}
    for category, share in shares.items():
        members = {name: source.weight for name, source in data.sources.items() if source.category == category}
        if not members:
            known = ", ".join(sorted({source.category for source in data.sources.values()}))
            raise DataError(
                f"phase '{phase}': mixture '{spec.mixture.name}' takes {share:g} % from category '{category}', which has no source "
                f"(categories: {known}); add a source under data.sources, or set phase.{phase}.mixture.shares_percent.{category}=0"
            )
        whole = math.fsum(members.values())
        found |= {name: share / total * weight / whole for name, weight in members.items()}
    return dict(sorted(found.items()))


def samples_asked(samples: int, weight: float, total_weight: float = 1.0) -> int:
    """Samples that Megatron's blend asks of a data set with this weight (formula above)."""
    # The same operations in the same order as Megatron's normalize() and the function above, so that the rounding is the same.
    return math.ceil(math.ceil(samples * (weight / total_weight)) * (1 + SURPLUS))


class Dealer:
    """Deals the documents of one source, epoch after epoch, each epoch in its own seeded order."""

    def __init__(self, source: str, lengths: np.ndarray, seed: int) -> None:
        self.source, self.seed = source, seed
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.source_tokens = int(self.lengths.sum())
        self.dealt_tokens = 0
        self._epoch = -1
        self._left = np.zeros(0, dtype=np.int64)

    @property
    def epochs(self) -> float:
        return self.dealt_tokens / self.source_tokens

    def deal(self, tokens_needed: int, min_document_tokens: int = 0) -> np.ndarray:
        """The next documents that hold at least `tokens_needed` tokens, int64 [N].

        Of what is left of the epoch, documents of at least `min_document_tokens` come first.
        """
        taken: list[np.ndarray] = []
        missing = tokens_needed
        while missing > 0:
            if not len(self._left):
                self._epoch += 1
                self._left = seeded_order(len(self.lengths), self.seed, self.source, self._epoch)
            is_short = self.lengths[self._left] < min_document_tokens
            ordered = np.concatenate([self._left[~is_short], self._left[is_short]])
            count = min(int(np.searchsorted(np.cumsum(self.lengths[ordered]), missing)) + 1, len(ordered))
            chosen = ordered[:count]
            self._left = self._without(chosen)
            taken.append(chosen)
            got = int(self.lengths[chosen].sum())
            self.dealt_tokens += got
            missing -= got
        return np.concatenate(taken) if taken else np.zeros(0, dtype=np.int64)

    def _without(self, chosen: np.ndarray) -> np.ndarray:
        """What is left of the epoch, in the epoch's order."""
        gone = np.zeros(len(self.lengths), dtype=bool)
        gone[chosen] = True
        return self._left[~gone[self._left]]


def seeded_order(count: int, seed: int, source: str, epoch: int) -> np.ndarray:
    """A permutation of 0..count-1, int64, by SplitMix64 of document number and key (Steele, Lea, Flood 2014, figure 17).

    Independent of numpy's generators, whose streams may change between versions; documents keep their relative order when count grows.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}/{source}/{epoch}".encode()).digest()[:8], "little")
    with np.errstate(over="ignore"):
        z = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return np.argsort(z, kind="stable").astype(np.int64)


def plan(recipe: Recipe, lengths_of: Callable[[str], np.ndarray]) -> dict[str, dict[str, Draw]]:
    """Phase -> source -> Draw for the whole curriculum; all refusals at once are made here, before anything is written.

    `lengths_of(source)` gives the document lengths in tokens, int [N], of a tokenized source.
    """
    dealers: dict[str, Dealer] = {}
    drawn: dict[str, dict[str, Draw]] = {}
    problems: list[str] = []
    for name in recipe.stages:
        if name not in recipe.phase:
            continue
        phase = recipe.phase[name]
        drawn[name] = {}
        shares = weights(recipe.data, name, phase)
        total = float(np.array(list(shares.values())).sum())
        for source, weight in shares.items():
            if source not in dealers:
                dealers[source] = Dealer(source, lengths_of(source), recipe.seed)
            draw = _draw(name, phase, source, recipe.data, weight, total, dealers[source])
            if isinstance(draw, str):
                problems.append(draw)
                continue
            drawn[name][source] = draw
    problems += _over_cap(drawn, recipe.data)
    if problems:
        raise DataError("; ".join(problems))
    return drawn


def _draw(name: str, phase: Phase, source: str, data: Data, weight: float, total: float, dealer: Dealer) -> Draw | str:
    planned = weight * phase.samples
    if planned < 1:
        return (
            f"phase '{name}': source '{source}' gets {planned:.2g} of {phase.samples} samples, so it may be left out silently; raise its share "
            f"to at least {100 / phase.samples:.3g} %, train more steps, or set its share to 0"
        )
    asked = samples_asked(phase.samples, weight, total)
    needed = asked * phase.seq_length_tokens + 1
    if dealer.source_tokens == 0:
        return f"phase '{name}': source '{source}' has no tokens, {needed} are needed; give it data, or set its share to 0"
    if (dealer.dealt_tokens + needed) / dealer.source_tokens > data.max_epochs * 100:
        # Dealing would take long and be refused anyway.
        return (
            f"phase '{name}': source '{source}' needs {needed:,} tokens and has {dealer.source_tokens:,}: far over data.max_epochs="
            f"{data.max_epochs:g}; add data to the source, or lower the share of '{data.sources[source].category}'"
        )
    documents = dealer.deal(needed, phase.min_document_tokens)
    return Draw(
        phase=name,
        source=source,
        category=data.sources[source].category,
        share_percent=100 * weight,
        weight=weight,
        samples_asked=asked,
        tokens_needed=needed,
        tokens_planned=round(weight * phase.tokens),
        documents=documents,
        tokens=int(dealer.lengths[documents].sum()),
        source_tokens=dealer.source_tokens,
        epochs=dealer.epochs,
    )


def _over_cap(drawn: dict[str, dict[str, Draw]], data: Data) -> list[str]:
    """One problem per source that the curriculum reads more often than data.max_epochs."""
    problems = []
    for source in sorted({name for draws in drawn.values() for name in draws}):
        draws = [phase[source] for phase in drawn.values() if source in phase]
        over = next((draw for draw in draws if draw.epochs > data.max_epochs), None)
        if over is not None:
            problems.append(
                f"phase '{over.phase}': source '{source}' needs {over.tokens_needed:,} tokens and has {over.source_tokens:,} in all; it is "
                f"read {over.epochs:.2f} times by then, {draws[-1].epochs:.2f} times by the end, and data.max_epochs is "
                f"{data.max_epochs:g}; add data to the source, lower the share of '{over.category}', or set "
                f"data.max_epochs={math.ceil(draws[-1].epochs * 100) / 100:g}"
            )
    return problems


def phase_inputs(recipe: Recipe, phase: str, source_digests: Mapping[str, str]) -> dict[str, object]:
    """Everything that the views of `phase` depend on: its sources, what it and the phases before take of them, and the seed.

    Neither later phases nor sources that `phase` does not draw count.
    """
    own = weights(recipe.data, phase, recipe.phase[phase])
    steps = []
    for name in recipe.stages[: recipe.stages.index(phase) + 1]:
        if name in recipe.phase:
            spec = recipe.phase[name]
            shares = weights(recipe.data, name, spec)
            taken = {source: weight for source, weight in shares.items() if source in own}
            steps.append(
                {
                    "samples": spec.samples,
                    "seq_length_tokens": spec.seq_length_tokens,
                    "min_document_tokens": spec.min_document_tokens,
                    "weights": taken,
                    "total_weight": math.fsum(shares.values()),
                }
            )
    spec = recipe.phase[phase]
    return {
        "phase": phase,
        "tokens": spec.tokens,
        "steps": spec.steps,
        "global_batch_samples": spec.global_batch_samples,
        "mixture": spec.mixture.model_dump(mode="json"),
        "max_epochs": recipe.data.max_epochs,
        "seed": recipe.seed,
        "surplus": SURPLUS,
        "sources": {source: [recipe.data.sources[source].category, source_digests[source]] for source in own},
        "dealt": [step for step in steps if step["weights"]],
    }
