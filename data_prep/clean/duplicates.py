"""Which documents go as duplicates of which: exact ones by hash, near ones by the clusters of MinHash, the best source's copy stays.

Documents are numbered over all shards in the order of priority (sources, files, lines), so "stays" is always the smallest number.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.pipeline.base import PipelineStep

from data_prep.clean import minhash
from data_prep.clean.filtering import EXACT_HASH_BYTES, filtered_path
from data_prep.clean.records import ShardRecord
from data_prep.clean.shards import Shard
from data_prep.files import atomic_write

EXACT, NEAR = 0, 1
"""Second column of removals; index into STEPS."""
STEPS = ("exact_duplicates", "near_duplicates")
INPUT_BYTES_PER_PART = 8 << 30
"""Text whose hashes one exact task holds: four million documents of 2 KB; 5 GB of memory should all have only 100 bytes."""


@dataclass(frozen=True)
class Numbering:
    """Documents of all shards, best first."""

    shards: tuple[Shard, ...]
    bases: np.ndarray
    """int64 [shards + 1]: number of each shard's first document, and of documents in all."""

    @classmethod
    def read(cls, root: Path, shards: tuple[Shard, ...]) -> Numbering:
        """From the records of the shards after their filters."""
        records = [ShardRecord.model_validate_json(filtered_path(root, shard, "json").read_bytes()) for shard in shards]
        return cls.of(shards, [record.documents for record in records])

    @classmethod
    def of(cls, shards: tuple[Shard, ...], documents: list[int]) -> Numbering:
        return cls(shards, np.concatenate([[0], np.cumsum(documents)]).astype(np.int64))

    def place(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(rank of the shard, document in it) of each number."""
        ranks = np.searchsorted(self.bases, numbers, side="right") - 1
        return ranks, numbers - self.bases[ranks]


class ExactParts(PipelineStep):
    """One rank finds the equal hashes of its part of all hashes: pairs (goes, stays) to exact/<rank>.npy."""

    type = "CLEAN"
    name = "equal documents"

    def __init__(self, root: Path, shards: tuple[Shard, ...], work: Path):
        super().__init__()
        self.root, self.shards, self.work = root, shards, work

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        hashes, numbers = [], []
        numbering = Numbering.read(self.root, self.shards)
        for shard, base in zip(self.shards, numbering.bases[:-1], strict=True):
            both = np.fromfile(filtered_path(self.root, shard, "exact"), dtype="<u8").reshape(-1, EXACT_HASH_BYTES // 8)
            mine = np.flatnonzero(both[:, 0] % world_size == rank)
            hashes.append(both[mine])
            numbers.append(mine + base)
        pairs = equal_pairs(np.concatenate(hashes), np.concatenate(numbers))
        with atomic_write(self.work / "exact" / f"{rank:05d}.npy") as f:
            np.save(f, pairs)


def equal_pairs(hashes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """int64 [duplicates, 2] (goes, stays) from hashes [documents, 2] and their documents' ascending numbers."""
    order = np.lexsort((numbers, hashes[:, 1], hashes[:, 0]))
    hashes, numbers = hashes[order], numbers[order]
    fresh = np.ones(len(numbers), dtype=bool)
    fresh[1:] = (hashes[1:] != hashes[:-1]).any(axis=1)
    if not len(numbers):
        return np.empty((0, 2), dtype=np.int64)
    first = numbers[np.maximum.accumulate(np.where(fresh, np.arange(len(numbers)), 0))]
    return np.stack([numbers[~fresh], first[~fresh]], axis=1)


def exact_parts(input_bytes: int) -> int:
    """Ranks of ExactParts; from the input alone, because a chain of jobs is submitted before documents are counted."""
    return input_bytes // INPUT_BYTES_PER_PART + 1


class Removals(PipelineStep):
    """One task: both kinds of duplicates to one file per shard, removals/<rank>.npy: int64 [removed, 4] of (document in the shard,
    EXACT or NEAR, rank of the shard of the copy that stays, its line there after all removals), ascending."""

    type = "CLEAN"
    name = "which copy stays"

    def __init__(self, root: Path, shards: tuple[Shard, ...], work: Path):
        super().__init__()
        self.root, self.shards, self.work = root, shards, work

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        numbering = Numbering.read(self.root, self.shards)
        exact = [np.load(path) for path in sorted((self.work / "exact").glob("*.npy"))]
        rows = choose(
            np.concatenate([np.empty((0, 2), dtype=np.int64), *exact]),
            minhash.meetings(self.work, numbering.bases),
        )
        places = final_places(numbering, rows)
        starts = np.searchsorted(rows[:, 0], numbering.bases)
        for shard in range(len(self.shards)):
            mine = slice(starts[shard], starts[shard + 1])
            document = rows[mine, 0] - numbering.bases[shard]
            with atomic_write(self.work / "removals" / f"{shard:05d}.npy") as f:
                np.save(f, np.column_stack([document, rows[mine, 1], places[mine]]))


def choose(exact: np.ndarray, near: np.ndarray) -> np.ndarray:
    """int64 [removed, 3] (goes, EXACT or NEAR, stays), ascending, from pairs (goes, stays) and pairs that met.

    Of a cluster the smallest document stays that is no exact duplicate of another; exact duplicates also join clusters.
    """
    gone = np.sort(exact[:, 0])
    members, roots = minhash.clusters(near) if len(near) else (np.empty(0, dtype=np.int64),) * 2
    left = ~np.isin(members, gone, assume_unique=True)
    members, roots = members[left], roots[left]
    order = np.lexsort((members, roots))
    members, roots = members[order], roots[order]
    first = np.ones(len(members), dtype=bool)
    first[1:] = roots[1:] != roots[:-1]
    kept = members[first][np.cumsum(first) - 1] if len(members) else members
    rows = np.concatenate(
        [
            np.column_stack([exact[:, 0], np.full(len(exact), EXACT), exact[:, 1]]),
            np.column_stack([members[~first], np.full((~first).sum(), NEAR), kept[~first]]),
        ]
    ).astype(np.int64)
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    # What equals a document that itself went as similar to a third points to the third, so that the copy named is one that stays.
    at = np.searchsorted(rows[:, 0], rows[:, 2])
    chained = (
        (at < len(rows)) & (rows[np.minimum(at, len(rows) - 1), 0] == rows[:, 2]) if len(rows) else np.zeros(0, dtype=bool)
    )
    rows[chained, 2] = rows[at[chained], 2]
    return rows


def final_places(numbering: Numbering, rows: np.ndarray) -> np.ndarray:
    """int64 [removed, 2]: rank and line (from 1, among what stays of its shard) of the copy that stays."""
    ranks, _ = numbering.place(rows[:, 2])
    removed_before = np.searchsorted(rows[:, 0], rows[:, 2]) - np.searchsorted(rows[:, 0], numbering.bases[ranks])
    return np.stack([ranks, rows[:, 2] - numbering.bases[ranks] - removed_before + 1], axis=1)
