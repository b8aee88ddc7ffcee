"""Deals the documents of one source to the phases: in a seeded order, none again before all were dealt, in constant memory.

The order of an epoch is that of a 64-bit hash of seed, source, epoch and document number; phases take from it one after the other. What
a phase gets is thus an interval of hashes, and a plan over ten billion documents is a few numbers (`Piece`). A document's place does
not depend on how many others there are, so the order of documents that stay does not change when a source grows.

To find where an interval ends, one pass sums tokens by the hash's leading bits, and a second one collects the documents of the few
buckets in which some interval ends. Both go through the lengths in blocks, which may lie in a file (data_prep/columns.py).

Documents of different length are kept apart where a phase asks for long ones (`Need`): each class of lengths has its own place in the
order. A phase that takes any length takes all classes together, least-read first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

BLOCK_DOCUMENTS = 1 << 16
"""Hashed at a time: half a megabyte of hashes, which stays in a core's cache."""
DOCUMENTS_PER_BUCKET, MAX_BUCKET_BITS = 2048, 16
"""A bucket is what one end of an interval has collected and sorted. 65,536 buckets of 32,768 documents hold the most documents that
a data set of Megatron can have (2**31), in 1 MB per class."""
END = 1 << 64
"""One past the last hash."""


@dataclass(frozen=True)
class Need:
    """What one phase wants of a source."""

    tokens: int
    """At least; whole documents are dealt."""
    min_document_tokens: int = 0
    """Of what is left of the epoch, documents of at least this length come first ..."""
    only_long: bool = False
    """... or nothing else comes, and long documents begin another epoch when they are used up."""


@dataclass(frozen=True)
class Piece:
    """Documents of one epoch whose hash lies in [first_hash, last_hash] and whose length in [min_tokens, max_tokens)."""

    epoch: int
    first_hash: int
    last_hash: int
    min_tokens: int
    max_tokens: int | None
    """None: no limit."""
    documents: int
    tokens: int

    def mask(self, hashes: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Which documents of a block belong to it, bool [n]; hashes uint64 [n] of this epoch, lengths [n] in tokens."""
        chosen = np.ones(len(hashes), dtype=bool)
        if self.first_hash > 0:
            chosen &= hashes >= np.uint64(self.first_hash)
        if self.last_hash < END - 1:
            chosen &= hashes <= np.uint64(self.last_hash)
        if self.min_tokens > 0:
            chosen &= lengths >= self.min_tokens
        if self.max_tokens is not None:
            chosen &= lengths < self.max_tokens
        return chosen


@dataclass(frozen=True)
class Deal:
    """What one phase gets of a source."""

    pieces: tuple[Piece, ...]
    """In the order in which they were dealt."""
    documents: int
    tokens: int
    long_tokens: int
    """Of these, in documents of at least the need's min_document_tokens."""
    epochs: float
    """Tokens dealt so far / tokens of the source."""
    long_epochs: float
    """Of its documents of at least min_document_tokens: tokens dealt so far / tokens."""


class Hasher:
    """Hashes of the documents of one epoch: SplitMix64 of document number and key (Steele, Lea, Flood 2014, figure 17).

    Independent of numpy's generators, whose streams may change between versions. A bijection, so that no two documents tie.
    """

    GAMMA, FIRST, SECOND = 0x9E3779B97F4A7C15, np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)

    def __init__(self, seed: int, source: str, epoch: int) -> None:
        self.key = int.from_bytes(hashlib.sha256(f"{seed}/{source}/{epoch}".encode()).digest()[:8], "little")
        self._multiples = np.zeros(0, dtype=np.uint64)

    def block(self, start: int, count: int) -> np.ndarray:
        """Hashes of documents start .. start+count-1, uint64 [count]."""
        if len(self._multiples) < count:
            self._multiples = np.arange(count, dtype=np.uint64) * np.uint64(self.GAMMA)
        z = self._multiples[:count] + np.uint64((start * self.GAMMA + self.key) % END)
        shifted = z >> np.uint64(30)
        z ^= shifted
        z *= self.FIRST
        np.right_shift(z, np.uint64(27), out=shifted)
        z ^= shifted
        z *= self.SECOND
        np.right_shift(z, np.uint64(31), out=shifted)
        z ^= shifted
        return z


def blocks(count: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the blocks of `count` documents."""
    for start in range(0, count, BLOCK_DOCUMENTS):
        yield start, min(count, start + BLOCK_DOCUMENTS)


@dataclass
class _Left:
    """What is left of one epoch."""

    tokens: np.ndarray
    """int64 [classes, buckets]"""
    documents: np.ndarray
    """int64 [classes, buckets]"""
    first_hash: list[int]
    """Per class: everything below is dealt."""

    def copy(self) -> _Left:
        return _Left(self.tokens.copy(), self.documents.copy(), list(self.first_hash))


class Dealer:
    """Deals one source; `lengths` is anything with a length whose slices are integer arrays (an array, a column of a file)."""

    def __init__(self, source: str, lengths: np.ndarray, seed: int, needs: Sequence[Need] = ()) -> None:
        """`needs`: what will be asked for, in order; every min_document_tokens must be among them."""
        self.source, self.lengths, self.seed, self.needs = source, lengths, seed, tuple(needs)
        self.edges = np.array(sorted({0, *(need.min_document_tokens for need in needs)}), dtype=np.int64)
        """Class c holds documents of edges[c] to edges[c + 1] - 1 tokens."""
        bits = max(1, (len(lengths) // DOCUMENTS_PER_BUCKET).bit_length())
        self._bits = min(MAX_BUCKET_BITS, bits)
        self._shift = np.uint64(64 - self._bits)
        self._hashers: dict[int, Hasher] = {}
        self._fresh: dict[int, _Left] = {}
        self._collected: dict[tuple[int, int], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self.class_tokens = self._whole(0).tokens.sum(axis=1)
        """int64 [classes]"""
        self.class_documents = self._whole(0).documents.sum(axis=1)
        """int64 [classes]"""
        self.source_tokens = int(self.class_tokens.sum())
        self.documents = len(lengths)
        self._restart()
        self._predicted = False

    def long_source_tokens(self, min_document_tokens: int) -> int:
        """Tokens of the source in documents of at least this length."""
        return int(self.class_tokens[self.edges >= min_document_tokens].sum())

    def deal(self, need: Need) -> Deal:
        """The next documents that hold at least need.tokens, to the document that reaches it."""
        if not self._predicted:
            self._predict()
        before = self._dealt_tokens.copy()
        pieces = self._deal(need, self._exact_end)
        is_long = self.edges >= need.min_document_tokens
        whole = self.long_source_tokens(need.min_document_tokens)
        return Deal(
            pieces=tuple(pieces),
            documents=sum(piece.documents for piece in pieces),
            tokens=sum(piece.tokens for piece in pieces),
            long_tokens=int((self._dealt_tokens - before)[is_long].sum()),
            epochs=int(self._dealt_tokens.sum()) / self.source_tokens,
            long_epochs=int(self._dealt_tokens[is_long].sum()) / whole if whole else 0.0,
        )

    def deal_all(self) -> list[Deal]:
        """One deal per need that was announced."""
        return [self.deal(need) for need in self.needs]

    # --- dealing -----------------------------------------------------------------------------------------------------------------

    def _restart(self) -> None:
        self._left: dict[int, _Left] = {}
        self._epoch = [0] * len(self.edges)
        self._dealt_tokens = np.zeros(len(self.edges), dtype=np.int64)

    def _deal(self, need: Need, end_of: Callable[[int, int, list[int], int], int]) -> list[Piece]:
        assert need.tokens <= 0 or need.min_document_tokens in self.edges, "a need that was not announced"
        pieces: list[Piece] = []
        missing = need.tokens
        while missing > 0:
            epoch, group = self._next_group(need)
            left = self._left_of(epoch)
            per_bucket = left.tokens[group].sum(axis=0)
            if int(per_bucket.sum()) <= missing:
                end = END
            else:
                reached = np.cumsum(per_bucket)
                bucket = int(np.searchsorted(reached, missing))
                end = end_of(epoch, bucket, group, missing - int(reached[bucket] - per_bucket[bucket]))
            taken = [piece for c in group if (piece := self._take(epoch, c, end)) is not None]
            missing -= sum(piece.tokens for piece in taken)
            pieces += self._joined(taken)
        return pieces

    def _next_group(self, need: Need) -> tuple[int, list[int]]:
        """The epoch to take from, and the classes of length that come next."""
        eligible = [
            c
            for c, edge in enumerate(self.edges)
            if self.class_documents[c] and (not need.only_long or edge >= need.min_document_tokens)
        ]
        assert eligible, f"source '{self.source}' has no documents for {need}"
        for c in eligible:
            if not self._left_of(self._epoch[c]).documents[c].any():
                self._epoch[c] += 1
        epoch = min(self._epoch[c] for c in eligible)
        group = [c for c in eligible if self._epoch[c] == epoch]
        long = [c for c in group if self.edges[c] >= need.min_document_tokens]
        return epoch, long or group

    def _take(self, epoch: int, c: int, end: int) -> Piece | None:
        """Deal what is left of class `c` below the hash `end`, be it no document; None where it is past `end`."""
        left = self._left_of(epoch)
        first = left.first_hash[c]
        if end <= first:
            return None
        bucket = end >> int(self._shift)  # one past the last for END
        documents, tokens = int(left.documents[c, :bucket].sum()), int(left.tokens[c, :bucket].sum())
        left.documents[c, :bucket] = left.tokens[c, :bucket] = 0
        if end & ((1 << int(self._shift)) - 1):  # ends inside a bucket, whose documents are collected
            hashes, lengths, classes = self._collect(epoch, bucket)
            chosen = (classes == c) & (hashes >= np.uint64(first)) & (hashes < np.uint64(end))
            inside, inside_tokens = int(chosen.sum()), int(lengths[chosen].sum(dtype=np.int64))
            left.documents[c, bucket] -= inside
            left.tokens[c, bucket] -= inside_tokens
            documents, tokens = documents + inside, tokens + inside_tokens
        left.first_hash[c] = end
        self._dealt_tokens[c] += tokens
        limit = int(self.edges[c + 1]) if c + 1 < len(self.edges) else None
        return Piece(epoch, first, end - 1, int(self.edges[c]), limit, documents, tokens)

    def _joined(self, pieces: list[Piece]) -> list[Piece]:
        """Neighbouring classes with the same interval as one piece, without pieces that have no document.

        What is one piece must not depend on how finely lengths are divided, or a later phase's min_document_tokens would change the
        order inside of an earlier view. So pieces are joined before the empty ones go, and across classes that have nothing to give.
        """
        joined: list[Piece] = []
        for piece in pieces:
            last = joined[-1] if joined else None
            if (
                last
                and (last.first_hash, last.last_hash) == (piece.first_hash, piece.last_hash)
                and self._adjacent(last, piece)
            ):
                joined[-1] = replace(
                    last,
                    max_tokens=piece.max_tokens,
                    documents=last.documents + piece.documents,
                    tokens=last.tokens + piece.tokens,
                )
            else:
                joined.append(piece)
        return [piece for piece in joined if piece.documents]

    def _adjacent(self, one: Piece, other: Piece) -> bool:
        """Whether the classes between hold no document of the interval of the two: what they had of the epoch lies before it."""
        left = self._left_of(one.epoch)
        between = np.flatnonzero((self.edges >= one.max_tokens) & (self.edges < other.min_tokens))
        return all(left.first_hash[c] <= one.first_hash and not left.documents[c].any() for c in between)

    def _exact_end(self, epoch: int, bucket: int, group: list[int], missing: int) -> int:
        """One past the hash of the document of `bucket` that reaches `missing` tokens."""
        hashes, lengths, classes = self._collect(epoch, bucket)
        # A used-up class (END) is in no group, so its place in the table does not matter.
        first = np.array([value % END for value in self._left_of(epoch).first_hash], dtype=np.uint64)
        chosen = np.isin(classes, group) & (hashes >= first[classes])
        reached = np.cumsum(lengths[chosen], dtype=np.int64)
        return int(hashes[chosen][np.searchsorted(reached, missing)]) + 1

    # --- passes over the source --------------------------------------------------------------------------------------------------

    def _predict(self) -> None:
        """Deal in whole buckets first, to learn in which of them intervals end, and collect those in one pass."""
        self._predicted = True
        ends: set[tuple[int, int]] = set()
        surplus = 0

        def whole_bucket(epoch: int, bucket: int, group: list[int], missing: int) -> int:
            ends.add((epoch, bucket))
            return (bucket + 1) << int(self._shift)

        for need in self.needs:
            wanted = Need(need.tokens - surplus, need.min_document_tokens, need.only_long)
            surplus = sum(piece.tokens for piece in self._deal(wanted, whole_bucket)) - wanted.tokens
        buckets = 1 << self._bits
        # Bucketwise dealing may be off by a bucket. What is missing after all is collected when it is needed.
        self._collect_all({(e, b + near) for e, b in ends for near in (-1, 0, 1) if 0 <= b + near < buckets})
        self._restart()

    def _left_of(self, epoch: int) -> _Left:
        if epoch not in self._left:
            self._left[epoch] = self._whole(epoch).copy()
        return self._left[epoch]

    def _blocks(self, epochs: list[int]) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
        """(lengths, hashes per epoch) block by block."""
        for epoch in epochs:
            self._hashers.setdefault(epoch, Hasher(self.seed, self.source, epoch))
        for start, stop in blocks(len(self.lengths)):
            yield np.asarray(self.lengths[start:stop]), [self._hashers[epoch].block(start, stop - start) for epoch in epochs]

    def _classes(self, lengths: np.ndarray) -> np.ndarray:
        """Class of each document, int64 [n]; comparing with the few edges is faster than a search."""
        classes = np.zeros(len(lengths), dtype=np.int64)
        for edge in self.edges[1:]:
            classes += lengths >= edge
        return classes

    def _whole(self, epoch: int) -> _Left:
        """Tokens and documents of an untouched epoch by class and bucket; one pass."""
        if epoch not in self._fresh:
            shape = (len(self.edges), 1 << self._bits)
            tokens, documents = np.zeros(shape[0] * shape[1]), np.zeros(shape[0] * shape[1], dtype=np.int64)
            for lengths, (hashes,) in self._blocks([epoch]):
                place = (hashes >> self._shift).view(np.int64)
                if len(self.edges) > 1:
                    place += self._classes(lengths) << self._bits
                # Sums in float64 are exact below 2**53 tokens.
                tokens += np.bincount(place, lengths, len(tokens))
                documents += np.bincount(place, minlength=len(documents))
            self._fresh[epoch] = _Left(tokens.astype(np.int64).reshape(shape), documents.reshape(shape), [0] * len(self.edges))
        return self._fresh[epoch]

    def _collect(self, epoch: int, bucket: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Hashes, lengths and classes of the documents of a bucket, in the order of the hashes."""
        if (epoch, bucket) not in self._collected:
            self._collect_all({(epoch, bucket)})
        return self._collected[epoch, bucket]

    def _collect_all(self, wanted: set[tuple[int, int]]) -> None:
        epochs = sorted({epoch for epoch, _ in wanted})
        if not epochs:
            return
        is_wanted = np.zeros((len(epochs), 1 << self._bits), dtype=bool)
        for epoch, bucket in wanted:
            is_wanted[epochs.index(epoch), bucket] = True
        found: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in epochs]
        for lengths, hashed in self._blocks(epochs):
            for number, hashes in enumerate(hashed):
                chosen = np.flatnonzero(is_wanted[number].take((hashes >> self._shift).view(np.int64)))
                found[number].append((hashes[chosen], lengths[chosen]))
        for number, epoch in enumerate(epochs):
            hashes, lengths = (np.concatenate(column) for column in zip(*found[number], strict=True))
            order = np.argsort(hashes, kind="stable")
            hashes, lengths = hashes[order], lengths[order]
            classes = self._classes(lengths)
            bucket_of = hashes >> self._shift
            for bucket in np.flatnonzero(is_wanted[number]).tolist():
                low, high = np.searchsorted(bucket_of, [bucket, bucket + 1])
                self._collected[epoch, bucket] = hashes[low:high], lengths[low:high], classes[low:high]


def documents_of(deal: Deal, source: str, lengths: np.ndarray, seed: int) -> np.ndarray:
    """Numbers of the documents of a deal as its view has them, int64 [N]: piece after piece, each in the source's order."""
    found = []
    for piece in deal.pieces:
        hasher = Hasher(seed, source, piece.epoch)
        for start, stop in blocks(len(lengths)):
            mask = piece.mask(hasher.block(start, stop - start), np.asarray(lengths[start:stop]))
            found.append(start + np.flatnonzero(mask))
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)
