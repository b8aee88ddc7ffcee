"""From a mixture in percent to samples per source, by the arithmetic of Megatron's blend.

A phase's data set is Megatron's BlendedDataset over one view per source. Two of its formulas decide what a view must hold and what a
source really gets (megatron-core 0.19.2; nothing of it is imported here):

- it asks source i for ceil(ceil(samples * weight_i) * 1.005) samples (blended_megatron_dataset_builder.py,
  _get_size_per_split_per_dataset; the surplus is GPTDatasetConfig's mid_level_dataset_surplus);
- it gives sample n to the source with the largest weight_i * max(n, 1) - samples given so far (helpers.cpp, build_blending_indices).

The errors of the second sum to nothing, so the largest is never negative and no source gets more than one sample above its share;
ceil(x * 1.005) is at least x + 1, so what the first asks for always suffices. Downwards there is no such proof; in a million random
mixtures of 2 to 60 sources none fell short of its share by 1.7 samples, and none that was due a whole sample got nothing (measured).
"""

from __future__ import annotations

import math

import numpy as np

from data_prep.errors import DataError
from recipes.schema import Data, Phase

SURPLUS = 0.005
"""Megatron's mid_level_dataset_surplus."""
SHARE_TOLERANCE_PERCENT = 1e-6
SIMULATED_SAMPLES = 200_000
"""The blend goes sample by sample: up to here it is repeated exactly, in about half a second."""
MAX_BLENDED_SOURCES = 32_766
"""BlendedDataset numbers its members in 16 bits."""


def weights(data: Data, phase: str, spec: Phase) -> dict[str, float]:
    """Source -> fraction of the phase's samples, sorted by name.

    DataError, with all problems of the phase, for a category without source or shares that do not fill 100 %.
    """
    shares = {category: share for category, share in spec.mixture.shares_percent.items() if share > 0}
    total = sum(shares.values())
    problems = []
    if abs(total - 100) > SHARE_TOLERANCE_PERCENT:
        problems.append(
            f"phase '{phase}': mixture '{spec.mixture.name}' sums to {total:g} %; make phase.{phase}.mixture sum to 100"
        )
    found: dict[str, float] = {}
    for category, share in shares.items():
        members = {name: source.weight for name, source in data.sources.items() if source.category == category}
        if not members:
            known = ", ".join(sorted({source.category for source in data.sources.values()}))
            problems.append(
                f"phase '{phase}': mixture '{spec.mixture.name}' takes {share:g} % from category '{category}', which has no source "
                f"(categories: {known}); add a source under data.sources, or set phase.{phase}.mixture.shares_percent.{category}=0"
            )
            continue
        whole = math.fsum(members.values())
        found |= {name: share / total * weight / whole for name, weight in members.items()}
    if len(found) > MAX_BLENDED_SOURCES:
        problems.append(
            f"phase '{phase}' draws from {len(found)} sources, Megatron blends at most {MAX_BLENDED_SOURCES}; join small sources"
        )
    if problems:
        raise DataError("\n".join(problems))
    return dict(sorted(found.items()))


def normalized(shares: dict[str, float]) -> dict[str, float]:
    """The weights as Megatron's blend uses them: divided by their sum, with numpy's rounding."""
    total = np.sum(np.array(list(shares.values()), dtype=np.float64))
    return {name: float(weight / total) for name, weight in shares.items()}


def samples_asked(samples: int, weight: float, total_weight: float = 1.0) -> int:
    """Samples that Megatron's blend asks of a data set with this weight (formula above)."""
    # The same operations in the same order as Megatron's normalize() and the function above, so that the rounding is the same.
    return math.ceil(math.ceil(samples * (weight / total_weight)) * (1 + SURPLUS))


def samples_given(shares: dict[str, float], samples: int) -> dict[str, int] | None:
    """Samples that Megatron's blend gives each source (formula above), exactly; None beyond SIMULATED_SAMPLES."""
    if samples > SIMULATED_SAMPLES:
        return None
    weight = np.array(list(normalized(shares).values()), dtype=np.float64)
    given, error = np.zeros(len(weight)), np.empty(len(weight))
    for n in range(samples):
        np.multiply(weight, max(n, 1), out=error)
        np.subtract(error, given, out=error)
        given[error.argmax()] += 1  # the first of equals, as in Megatron
    return dict(zip(shares, given.astype(int).tolist(), strict=True))
