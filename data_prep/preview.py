"""`quarry prep --dry-run`: the plan as rows, without writing a file; sources that are not tokenized yet are estimated from their size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep import plan, views
from data_prep.errors import DataError
from data_prep.indexed import idx_path
from data_prep.prepare import check
from data_prep.records import TokenizedRecord
from data_prep.sources import source_paths
from recipes.schema import Recipe

BYTES_PER_TOKEN = 3.0
"""Of the smoke corpus with 2048 pieces (measured 2.8); vocabularies of 100K reach 4 and more, so estimates err on the low side there."""
ESTIMATED_DOCUMENT_TOKENS = 1024


@dataclass(frozen=True)
class Row:
    """One source in one phase."""

    phase: str
    category: str
    source: str
    share_planned_percent: float
    share_drawn_percent: float
    """By whole samples: what Megatron's blend comes to, within one sample."""
    tokens_available: int
    """In the whole source."""
    tokens_drawn: int
    """In the phase's view; a little more than the phase trains (Megatron's surplus, whole documents)."""
    epochs: float
    """Of the source, cumulative to the end of the phase."""


def preview(recipe: Recipe) -> tuple[list[Row], set[str]]:
    """Rows of the plan in the order of the stages, and the sources whose numbers are estimates. DataError as `prepare` would."""
    check(recipe)
    root = Path(recipe.data.root)
    estimated: set[str] = set()

    def lengths(source: str) -> np.ndarray:
        record = TokenizedRecord.read_if_valid(root / "tokenized" / f"{source}.json")
        if record is not None and idx_path(root / "tokenized" / source).is_file():
            return views.source_lengths(root, source)
        estimated.add(source)
        return _estimated_lengths(recipe, source)

    rows = []
    for phase, draws in plan.plan(recipe, lengths).items():
        samples = recipe.phase[phase].samples
        for draw in draws.values():
            rows.append(
                Row(
                    phase=phase,
                    category=draw.category,
                    source=draw.source,
                    share_planned_percent=draw.share_percent,
                    share_drawn_percent=100 * round(draw.weight * samples) / samples,
                    tokens_available=draw.source_tokens,
                    tokens_drawn=draw.tokens,
                    epochs=draw.epochs,
                )
            )
    return rows, estimated


def _estimated_lengths(recipe: Recipe, name: str) -> np.ndarray:
    """Documents of equal length that stand for the source's text."""
    source = recipe.data.sources[name]
    if source.kind == "indexed":
        from data_prep.indexed import Index

        return Index.read(idx_path(Path(source.paths[0]))).lengths
    if source.kind == "builtin":
        size = source.max_bytes
        if size is None:
            raise DataError(
                f"data.sources.{name} has no max_bytes and is not built yet, so its size is unknown; run `quarry prep` without --dry-run"
            )
    else:
        size = sum(path.stat().st_size for path in source_paths(name, source))
    documents = max(1, int(size / BYTES_PER_TOKEN) // ESTIMATED_DOCUMENT_TOKENS)
    return np.full(documents, ESTIMATED_DOCUMENT_TOKENS, dtype=np.int32)
