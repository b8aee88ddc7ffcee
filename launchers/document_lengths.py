"""Lengths of the documents of a stage where they stay apart, from its prepared data: what its plan counts with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.document_packing import DocumentLengths, Known, Packing
from recipes.schema import Phase, Recipe

if TYPE_CHECKING:
    import numpy as np

    from data_prep.columns import Column

SAMPLED_DOCUMENTS = 1 << 18
"""Of a view that has more, so many lengths are read, in blocks all over it: 0.1% off, and a plan takes no time."""
BLOCK_DOCUMENTS = 1 << 12
EXACT_TOKENS = 256
"""Longer documents stand together with those of nearly the same length."""
STEP = 1.01
NOT_PREPARED = "data not prepared"


def known_lengths(recipe: Recipe, stages: Sequence[str]) -> dict[str, Known]:
    """Of each of `stages` whose documents stay apart, fine-tuning included: what is known of them."""
    apart = [stage for stage in stages if stage in recipe.phase and recipe.phase[stage].documents_apart]
    tuned = [stage for stage in stages if stage in recipe.sft]
    return {s: phase_lengths(recipe, s) for s in apart} | {s: sft_packing(recipe, s) for s in tuned}


def phase_lengths(recipe: Recipe, stage: str, per_source: int | None = None) -> DocumentLengths | str:
    """Lengths of the documents in the views of `stage`, or why they are not known: nothing prepared, or for another recipe, or damaged.

    Looks at the manifest and at sizes, not at digests: a plan starts nothing. `per_source`: lengths read of a view that has more, at
    least two BLOCK_DOCUMENTS (None: SAMPLED_DOCUMENTS).
    """
    root = Path(recipe.data.root)
    if not (root / "views" / stage / "manifest.json").is_file():
        return NOT_PREPARED
    from data_prep.columns import open_lengths
    from data_prep.errors import DataError
    from data_prep.indexed import idx_path
    from data_prep.manifest import MixtureManifest, mixture_path

    try:
        manifest = MixtureManifest.read(mixture_path(root, stage))
        if other := _made_for_another(manifest.recipe, manifest.seq_length_tokens, recipe.phase[stage]):
            return f"data prepared with another {other}"
        histogram: dict[float, float] = {}
        counted = documents = 0
        for source in manifest.sources.values():
            lengths = open_lengths(idx_path(root / source.prefix))
            read, tokens, found = 0, 0.0, []
            for block in _blocks(lengths, per_source or SAMPLED_DOCUMENTS):
                read, tokens = read + len(block), tokens + float(block.sum())
                found += _grouped(block)
            for length, count in found:
                histogram[length] = histogram.get(length, 0.0) + source.weight * count / tokens
            counted, documents = counted + read, documents + len(lengths)
    except (DataError, OSError) as error:
        return str(error)
    return DocumentLengths(tuple(sorted(histogram.items())), counted, documents)


def sft_packing(recipe: Recipe, stage: str) -> Packing | str:
    """What the packed samples of fine-tuning stage `stage` span, or why that is not known; as phase_lengths."""
    root, sft = Path(recipe.data.root), recipe.sft[stage]
    if not (root / "sft" / stage / "manifest.json").is_file():
        return NOT_PREPARED
    import numpy as np

    from data_prep.errors import DataError
    from data_prep.sft_manifest import SampleStore, SftManifest, manifest_path, packs_prefix, read_array

    try:
        manifest = SftManifest.read(manifest_path(root, stage))
        if manifest.seq_length_tokens != sft.seq_length_tokens:
            return "data prepared with another seq_length_tokens"
        packed = read_array(packs_prefix(root, stage, manifest.training.name, ".samples.npy"))
        lengths = SampleStore(manifest, root).lengths[packed].astype(np.float64)
    except (DataError, OSError) as error:
        return str(error)
    if not len(packed):
        return "no samples to train on"
    squares = float((np.minimum(lengths, sft.seq_length_tokens) ** 2).sum())
    return Packing(squares / (manifest.training.sequences * sft.seq_length_tokens), 0.0)


def _made_for_another(made_with: dict, seq_length_tokens: int, phase: Phase) -> str | None:
    """The key of the recipe that the views were made with another value of; None: they are this phase's."""
    values = {
        "mixture": phase.mixture.model_dump(mode="json"),
        "min_document_tokens": phase.min_document_tokens,
        "require_long_in": phase.require_long_in,
    }
    if seq_length_tokens != phase.seq_length_tokens:
        return "seq_length_tokens"
    return next((key for key, value in values.items() if made_with.get(key) != value), None)


def _blocks(lengths: Column, most: int) -> Iterator[np.ndarray]:
    """All lengths, or blocks at equal distances with `most` of them."""
    if len(lengths) <= most:
        yield lengths[:]
        return
    blocks = most // BLOCK_DOCUMENTS
    for block in range(blocks):
        start = (len(lengths) - BLOCK_DOCUMENTS) * block // (blocks - 1)
        yield lengths[start : start + BLOCK_DOCUMENTS]


def _grouped(lengths: np.ndarray) -> list[tuple[float, int]]:
    """(mean length, documents) of documents of nearly the same length, without empty ones."""
    import numpy as np

    lengths = lengths[lengths > 0].astype(np.float64)
    groups = np.where(
        lengths <= EXACT_TOKENS, lengths, EXACT_TOKENS + np.ceil(np.log(np.maximum(lengths, 1) / EXACT_TOKENS) / np.log(STEP))
    )
    _, places, counts = np.unique(groups, return_inverse=True, return_counts=True)
    means = np.bincount(places, weights=lengths) / counts
    return list(zip(means.tolist(), counts.tolist(), strict=True))
