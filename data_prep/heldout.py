"""Held-out sets: one .bin/.idx per category, filled from the documents that tokenization kept out of training."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_prep.errors import DataError
from data_prep.files import digest_of, record_file
from data_prep.indexed import Reader, Writer, bin_path, idx_path
from data_prep.manifest import HeldoutManifest, HeldoutSet, TokenizerRecord, heldout_path
from data_prep.records import TokenizedRecord
from recipes.schema import Data

VERSION = 1
CUTS = (8, 4, 2, 1)
"""A document gives at most an eighth of the cap, so that one long one does not stand for its category; more where there are too few."""


def heldout_inputs(data: Data, records: Mapping[str, TokenizedRecord], tokenizer: TokenizerRecord) -> str:
    """Digest of everything that the held-out sets are made from."""
    return digest_of(
        {
            "version": VERSION,
            "max_tokens": data.heldout_max_tokens,
            "needed": tokens_needed(data),
            "seq_length_tokens": data.heldout_seq_length_tokens,
            "tokenizer": tokenizer.model_dump(mode="json"),
            "sources": {
                name: [data.sources[name].category, r.heldout_bin.sha256, r.heldout_idx.sha256] for name, r in records.items()
            },
        }
    )


def tokens_needed(data: Data) -> int:
    """Tokens that an evaluation reads of one category: whole sequences and the last label."""
    return data.heldout_batch_samples * data.heldout_seq_length_tokens + 1


def build_heldout(
    data_root: Path, data: Data, records: Mapping[str, TokenizedRecord], tokenizer: TokenizerRecord
) -> HeldoutManifest:
    """Write heldout/<category>.bin/.idx for every category and last the manifest.

    Documents come in the order of a hash of their tokens, each at most once, up to data.heldout_max_tokens in all. DataError when a
    category has fewer tokens than an evaluation reads.
    """
    path = heldout_path(data_root)
    path.unlink(missing_ok=True)
    categories: dict[str, HeldoutSet] = {}
    for category in sorted({source.category for source in data.sources.values()}):
        members = sorted(name for name, source in data.sources.items() if source.category == category)
        documents, held_out = _documents(data_root, members, max(data.heldout_max_tokens, tokens_needed(data)))
        chosen = _choose(documents, data)
        total = sum(map(len, chosen))
        if total < tokens_needed(data):
            raise DataError(
                f"category '{category}': {total} held-out tokens in {held_out} documents of {', '.join(members)}, an evaluation reads "
                f"{tokens_needed(data)} (data.heldout_batch_samples * data.heldout_seq_length_tokens + 1); raise data.heldout_percent "
                f"(now {data.heldout_percent:g}) or data.heldout_max_tokens (now {data.heldout_max_tokens}), or give the category more data"
            )
        prefix = data_root / "heldout" / category
        with Writer(prefix, tokenizer.vocab_size) as writer:
            for tokens in chosen:
                writer.add(tokens)
        categories[category] = HeldoutSet(
            prefix=f"heldout/{category}",
            documents=len(chosen),
            tokens=total,
            max_token_id=writer.max_token_id,
            dtype=writer.dtype.name,
            bin=record_file(bin_path(prefix)),
            idx=record_file(idx_path(prefix)),
        )
    manifest = HeldoutManifest.make(
        seq_length_tokens=data.heldout_seq_length_tokens,
        inputs=heldout_inputs(data, records, tokenizer),
        tokenizer=tokenizer,
        categories=categories,
    )
    manifest.write(path)
    return manifest


def _documents(data_root: Path, sources: list[str], enough_tokens: int) -> tuple[list[np.ndarray], int]:
    """Held-out documents of the sources, each text once, in the order of their hash, and how many there are.

    Only as many are kept as fill `enough_tokens` when each gives at most its share (CUTS): a billion may be held out.
    """
    share = max(1, enough_tokens // CUTS[0])
    kept: dict[bytes, np.ndarray] = {}
    largest: list[tuple[int, bytes]] = []  # a heap: the negative hash, so that the largest comes first
    seen = tokens_kept = 0
    for name in sources:
        reader = Reader(data_root / "tokenized" / f"{name}.heldout")
        seen += len(reader)
        for number in range(len(reader)):
            tokens = reader[number]
            key = hashlib.sha256(tokens.tobytes()).digest()
            if key in kept:
                continue
            kept[key] = tokens
            heapq.heappush(largest, (-int.from_bytes(key, "big"), key))
            tokens_kept += min(len(tokens), share)
            while tokens_kept - (last := min(len(kept[largest[0][1]]), share)) >= enough_tokens:
                del kept[heapq.heappop(largest)[1]]
                tokens_kept -= last
    return [kept[key] for key in sorted(kept)], seen


def _choose(documents: list[np.ndarray], data: Data) -> list[np.ndarray]:
    """Documents, cut, up to the cap; the cut is the smallest that fills an evaluation."""
    for cut in CUTS:
        limit = max(1, data.heldout_max_tokens // cut)
        chosen, room = [], data.heldout_max_tokens
        for tokens in documents:
            piece = tokens[: min(limit, room)]
            if len(piece) == 0:
                break
            chosen.append(piece)
            room -= len(piece)
        if data.heldout_max_tokens - room >= tokens_needed(data):
            break
    return chosen
