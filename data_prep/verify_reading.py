"""Reads every file of a verification once: its digest, and of token files all ids, document ends and document beginnings with it.

The digest is the limit (SHA-256 on one core); looking at the tokens of the same block adds a few percent. Files are read side by side in
threads, because hashlib and numpy leave the interpreter free; memory is a block per thread and 20 bytes per document.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.indexed import Index, parts

BLOCK_BYTES = 1 << 20
"""Read at a time: fits a core's second-level cache, so that hashing and looking at it read memory once."""
HEAD_TOKENS = 16
"""Enough to tell nearly all documents apart together with their lengths; equal ones are then compared whole."""
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be."""

    file: str
    what: str
    expected: str
    found: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}: expected {self.expected}, found {self.found}; {self.remedy}"


@dataclass
class Look:
    """What to look for in a .bin while it is read, and afterwards what was there."""

    dtype: np.dtype
    vocab_size: int | None
    """None: unknown."""
    eod_id: int | None
    """The id that every document ends with; None: not promised."""
    starts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Token offset of each document that an index names, ascending, int64 [N]."""
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """Its length in tokens, int32 [N]."""

    wants_heads: bool = False
    """Whether `heads` will be asked for."""

    max_token_id: int = -1
    over: int = 0
    """Ids at or above the vocabulary."""
    first_over: tuple[int, int] | None = None
    """(token offset, id)"""
    unended: int = 0
    first_unended: tuple[int, int] | None = None
    """(token offset of the document, its last id)"""
    heads: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    """Fingerprint of each document's length and first HEAD_TOKENS tokens, uint64 [N]."""

    def add(self, index: Index) -> None:
        """Look at the documents of `index` too (one sequence each, offsets at whole tokens)."""
        starts, lengths = self._starts(index), index.lengths
        if len(self.starts):
            if self._all_known(starts):
                return  # a view of what is looked at already
            starts, lengths = np.concatenate([self.starts, starts]), np.concatenate([self.lengths, lengths])
        if not all((starts[p][1:] > starts[p][:-1]).all() for p in parts(len(starts), overlap=1)):
            # Of several at one place the longest: an empty document lies where the next one begins.
            order = np.lexsort((-lengths.astype(np.int64), starts))
            starts, first = np.unique(starts[order], return_index=True)
            lengths = lengths[order][first]
        self.starts, self.lengths = starts, lengths

    def begin(self) -> None:
        self.heads = np.zeros(len(self.starts) if self.wants_heads else 0, np.uint64)
        self._straddling: list[int] = []
        self._longest = int(self.lengths.max(initial=0)) if self._overlap() else 0

    def _overlap(self) -> bool:
        """Whether a document reaches into the next one, as in a damaged index."""
        return any(
            (self.starts[p][:-1] + self.lengths[p][:-1] > self.starts[p][1:]).any() for p in parts(len(self.starts), overlap=1)
        )

    def block(self, tokens: np.ndarray, base: int) -> None:
        """`tokens` are those from token offset `base` on."""
        if not tokens.size:
            return
        # Negative ids of a damaged file become large ones.
        unsigned = tokens.view(f"u{tokens.dtype.itemsize}")
        highest = int(unsigned.max())
        self.max_token_id = max(self.max_token_id, highest)
        if self.vocab_size is not None and highest >= self.vocab_size:
            wrong = np.flatnonzero(unsigned >= self.vocab_size)
            self.over += len(wrong)
            if self.first_over is None:
                self.first_over = base + int(wrong[0]), int(tokens[wrong[0]])
        low, high = (int(n) for n in np.searchsorted(self.starts, (base, base + len(tokens))))
        if self.eod_id is not None:
            self._check_ends(tokens, base, low, high)
        if self.wants_heads:
            middle = max(low, int(np.searchsorted(self.starts, base + len(tokens) - HEAD_TOKENS + 1)))
            if middle > low:
                self.heads[low:middle] = fingerprints(unsigned, self.starts[low:middle] - base, self.lengths[low:middle])
            self._straddling += range(middle, high)

    def _check_ends(self, tokens: np.ndarray, base: int, low: int, high: int) -> None:
        """Last ids of the documents that end in this block; `low` to `high` begin in it."""
        # Of those that began before only the last can end here, unless documents overlap.
        low = int(np.searchsorted(self.starts, base - self._longest)) if self._longest else max(0, low - 1)
        lengths = self.lengths[low:high]
        ends = self.starts[low:high] + lengths - 1 - base
        # A document without tokens has no end to look at.
        here = np.flatnonzero((ends >= 0) & (ends < len(tokens)) & (lengths > 0))
        wrong = here[tokens[ends[here]] != self.eod_id]
        if len(wrong):
            self.unended += len(wrong)
            if self.first_unended is None:
                self.first_unended = int(self.starts[low + wrong[0]]), int(tokens[ends[wrong[0]]])

    def finish(self, path: Path) -> None:
        """Documents that begin less than HEAD_TOKENS before a block's end."""
        with open(path, "rb") as f:
            for number in self._straddling:
                f.seek(int(self.starts[number]) * self.dtype.itemsize)
                head = f.read(HEAD_TOKENS * self.dtype.itemsize)
                head = head[: len(head) - len(head) % self.dtype.itemsize]
                tokens = np.zeros(HEAD_TOKENS, f"u{self.dtype.itemsize}")
                tokens[: len(head) // self.dtype.itemsize] = np.frombuffer(head, tokens.dtype)
                one = slice(number, number + 1)
                self.heads[one] = fingerprints(tokens, np.zeros(1, np.int64), self.lengths[one])
        del self._straddling

    def knows(self, index: Index) -> bool:
        """Whether every document of `index` is one that was looked at."""
        if index.dtype != self.dtype or len(self.heads) != len(self.starts):
            return False
        return self._all_known(self._starts(index))

    def _starts(self, index: Index) -> np.ndarray:
        """Token offsets of its sequences; a shift, because dividing hundreds of millions of them takes seconds."""
        return index.offsets >> (self.dtype.itemsize.bit_length() - 1)

    def _all_known(self, starts: np.ndarray) -> bool:
        place = np.minimum(np.searchsorted(self.starts, starts), max(0, len(self.starts) - 1))
        return len(starts) == 0 or bool(len(self.starts) and (self.starts[place] == starts).all())

    def heads_of(self, index: Index) -> np.ndarray:
        """Fingerprints of the documents of an index whose documents were looked at, uint64 [N]."""
        return self.heads[np.searchsorted(self.starts, self._starts(index))]


def fingerprints(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Of documents in `tokens`, by their length and first HEAD_TOKENS tokens, uint64 [N]. Equal documents have equal ones.

    HEAD_TOKENS tokens must follow every start, whatever the length.
    """
    heads = np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(tokens, HEAD_TOKENS)[starts])
    short = np.flatnonzero(lengths < HEAD_TOKENS)
    if len(short):
        heads[short] = np.where(np.arange(HEAD_TOKENS) < lengths[short, None], heads[short], 0)
    value = lengths.astype(np.uint64)
    for word in heads.view(np.uint64).T:
        value = value * MULTIPLIER + word
        value ^= value >> np.uint64(29)
    return value


@dataclass
class Reading:
    """A file to be read, and what was found."""

    path: Path
    digests: dict[str, str] = field(default_factory=dict)
    """Algorithm (sha256, xxh3) -> digest; the keys say which are wanted, the values come with reading."""
    look: Look | None = None
    size: int = 0
    error: str | None = None
    """Why it could not be read to its end."""


def read_all(readings: Iterable[Reading], workers: int, advance: Callable[[int], None]) -> None:
    """Read all files, `workers` at a time, the largest first; `advance` is called with bytes, by one thread at a time."""
    lock = threading.Lock()

    def told(size: int) -> None:
        with lock:
            advance(size)

    ordered = sorted(readings, key=lambda reading: -reading.path.stat().st_size)
    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="verify") as pool:
        for done in [pool.submit(_read, reading, told) for reading in ordered]:
            done.result()


def _read(reading: Reading, told: Callable[[int], None]) -> None:
    hashers = {name: _hasher(name) for name in reading.digests}
    look, itemsize = reading.look, reading.look.dtype.itemsize if reading.look else 1
    if look:
        look.begin()
    buffer = bytearray(BLOCK_BYTES)
    view = memoryview(buffer)
    untold = 0
    try:
        with open(reading.path, "rb", buffering=0) as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while size := _fill(f, view):
                for hasher in hashers.values():
                    hasher.update(view[:size])
                if look:
                    whole = size - size % itemsize
                    look.block(np.frombuffer(view[:whole], look.dtype), reading.size // itemsize)
                reading.size += size
                untold += size
                if untold >= 1 << 24:
                    told(untold)
                    untold = 0
    except OSError as error:
        reading.error = f"{error.strerror or error} after {reading.size} bytes"
    told(untold)
    if look:
        look.finish(reading.path)
    reading.digests = {name: hasher.hexdigest() for name, hasher in hashers.items()}


def _hasher(name: str) -> Any:
    if name == "xxh3":
        from data_prep.blocks import xxh3

        return xxh3()
    return hashlib.new(name)


def _fill(file: object, view: memoryview) -> int:
    """Read until `view` is full or the file ends; a raw file may give less than asked for."""
    size = 0
    while size < len(view) and (n := file.readinto(view[size:])):  # type: ignore[attr-defined]
        size += n
    return size
