"""Compares indexed data sets: the same bytes, or how many documents differ."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np

from data_prep.files import file_sha256
from data_prep.indexed import Index, bin_path, idx_path

Documents = tuple[np.ndarray, np.ndarray]
"""Tokens of all documents one after the other [T], and where each begins and the last ends, in tokens [D+1]."""


def same_bytes(left: Path, right: Path) -> bool:
    """Whether two prefixes have equal .bin and equal .idx."""
    return all(file_sha256(path(left)) == file_sha256(path(right)) for path in (bin_path, idx_path))


def read(prefixes: list[Path]) -> Documents:
    """The documents of indexed data sets, one after the other. A document may have any number of sequences, also none."""
    tokens, lengths = [], []
    for prefix in prefixes:
        index = Index.read(idx_path(prefix))
        tokens.append(np.fromfile(bin_path(prefix), dtype=index.dtype).astype(np.int32))
        ends = np.concatenate([[0], np.cumsum(index.lengths, dtype=np.int64)])[np.asarray(index.bounds)]
        lengths.append(np.diff(ends))
    return np.concatenate(tokens), np.concatenate([[0], np.cumsum(np.concatenate(lengths))])


def differing_documents(left: Documents, right: Documents) -> int:
    """How many documents differ, document by document in order; one that only one side has differs."""
    (left_tokens, left_starts), (right_tokens, right_starts) = left, right
    if np.array_equal(left_starts, right_starts):
        wrong = np.flatnonzero(left_tokens != right_tokens)
        return len(np.unique(np.searchsorted(left_starts, wrong, side="right")))
    pairs = zip(pairwise(left_starts), pairwise(right_starts), strict=False)
    different = sum(not np.array_equal(left_tokens[a:b], right_tokens[c:d]) for (a, b), (c, d) in pairs)
    return different + abs(len(left_starts) - len(right_starts))
