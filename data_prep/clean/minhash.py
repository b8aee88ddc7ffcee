"""MinHash signatures in datatrove's format from n-grams that are hashed in one go, and the clusters of documents that meet.

Signatures, bands and the search for equal bands are datatrove's. Ours are the hashing of n-grams (its own needs a package that is not
here, and one call per n-gram), the same arithmetic in blocks that stay in the processor's cache, and which document of a cluster
stays: datatrove keeps the root of a union by size, which no rule describes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets, MinhashDedupSignature
from datatrove.utils.hashing import HashConfig

from data_prep.clean.executors import OPEN_FILES_RESERVE, raise_open_files
from data_prep.clean.words import WordHashes, ngram_hashes, splitter, word_hashes
from data_prep.files import atomic_write
from recipes.cleaning import NearDuplicates

PRIME = np.uint64((1 << 61) - 1)
BLOCK_NGRAMS = 1024
"""Times 112 hashes of 8 bytes: 0.9 MB, a processor's second-level cache (measured: twice as fast as whole documents)."""


def datatrove_config(config: NearDuplicates) -> MinhashConfig:
    return MinhashConfig(
        n_grams=config.ngram_words,
        num_buckets=config.buckets,
        hashes_per_bucket=config.hashes_per_bucket,
        seed=config.seed,
        hash_config=HashConfig(precision=64, hash_fc="sha1"),  # only its precision is used: n-grams are hashed here
    )


class Signatures(MinhashDedupSignature):
    """datatrove's first MinHash step over documents as they come; `hashes_of` may know the hashes of a document's words already."""

    def __init__(self, config: NearDuplicates, folder: Path, hashes_of: Callable[[str], WordHashes] = word_hashes):
        super().__init__(str(folder), datatrove_config(config), language=splitter())
        self._number_blind = config.normalise_numbers
        self._hashes_of = hashes_of

    def get_shingles(self, text: str) -> np.ndarray:
        """uint64 [n-grams]"""
        hashes = self._hashes_of(text)
        return ngram_hashes(hashes.number_blind if self._number_blind else hashes.exact, self.config.n_grams)

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        """Smallest (a x + b) mod (2^61 - 1) over the n-grams x for each hash (a, b), by bucket; equal to datatrove's own."""
        a, b = (parameter.reshape(-1, 1) for parameter in self.parameters)
        smallest = np.full(self.num_hashes, PRIME, dtype=np.uint64)
        for start in range(0, len(shingles), BLOCK_NGRAMS):
            values = shingles[start : start + BLOCK_NGRAMS] * a
            values += b
            # Modulo a Mersenne prime without a division: high bits + low bits, once more below the prime.
            high = values >> np.uint64(61)
            values &= PRIME
            values += high
            np.subtract(values, PRIME, out=values, where=values >= PRIME)
            np.minimum(smallest, values.min(axis=1), out=smallest)
        return [part.tolist() for part in np.split(smallest, self.config.num_buckets)]


def row_bytes(config: NearDuplicates) -> int:
    """One document in one bucket: its hashes and its number."""
    return struct.calcsize(f"<{config.hashes_per_bucket}QI")


def pack_signatures(config: NearDuplicates, folder: Path, path: Path) -> int:
    """The buckets that Signatures left below `folder`, one after the other in one file; returns the number of documents signed."""
    rows = 0
    with atomic_write(path) as out:
        for bucket in range(config.buckets):
            content = (folder / f"bucket_{bucket:03d}" / "00000.minhash.sig").read_bytes()
            rows = len(content) // row_bytes(config)
            out.write(content)
    return rows


class Buckets(PipelineStep):
    """datatrove's second MinHash step on packed signatures, one rank per bucket; `signed`: (rank, packed signatures) of each shard."""

    type = "CLEAN"
    name = "documents that meet in a bucket"

    def __init__(self, config: NearDuplicates, signed: tuple[tuple[int, Path], ...], work: Path):
        super().__init__()
        self.config, self.signed, self.work = config, signed, work

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        # Also here: the limit of the process that submits a Slurm job need not reach it.
        raise_open_files(len(self.signed) + OPEN_FILES_RESERVE)
        folder = self.work / "signatures" / f"bucket_{rank:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        for shard, path in self.signed:
            size = path.stat().st_size // self.config.buckets
            with open(path, "rb") as f:
                f.seek(rank * size)
                (folder / f"{shard:05d}.minhash.sig").write_bytes(f.read(size))
        (self.work / "meetings").mkdir(exist_ok=True)
        step = MinhashDedupBuckets(
            str(self.work / "signatures"),
            str(self.work / "meetings"),
            config=datatrove_config(self.config),
            lines_to_buffer=4096,
        )
        step.run(rank=rank, world_size=world_size)
        for path in folder.iterdir():
            path.unlink()


def meetings(work: Path, bases: np.ndarray) -> np.ndarray:
    """int64 [pairs, 2]: documents that met in some bucket, by their number over all shards; `bases` is each shard's first number."""
    parts = [np.fromfile(path, dtype="<u4").reshape(-1, 4) for path in sorted((work / "meetings").glob("*.dups"))]
    if not parts:
        return np.empty((0, 2), dtype=np.int64)
    rows = np.concatenate(parts).astype(np.int64)
    return np.stack([bases[rows[:, 0]] + rows[:, 1], bases[rows[:, 2]] + rows[:, 3]], axis=1)


def clusters(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Connected components: (documents, int64 ascending; the smallest document of each one's component).

    Labels sink along the pairs and are then followed to their own label until nothing changes; the number of rounds grows with the
    logarithm of the longest chain.
    """
    nodes, ends = np.unique(pairs, return_inverse=True)
    ends = ends.reshape(-1, 2)
    labels = np.arange(len(nodes))
    while len(ends):
        before = labels.copy()
        low = np.minimum(labels[ends[:, 0]], labels[ends[:, 1]])
        for side in (0, 1):
            # Also the label's own label, so that whole trees join, not only their leaves.
            np.minimum.at(labels, labels[ends[:, side]], low)
            np.minimum.at(labels, ends[:, side], low)
        while not np.array_equal(labels, labels[labels]):
            labels = labels[labels]
        if np.array_equal(labels, before):
            break
    return nodes, nodes[labels]
