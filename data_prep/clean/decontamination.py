"""Runs of words that training data shares with benchmarks: the index of the benchmarks' n-grams, and the search in a document.

The same idea as datatrove's decontamination step, whose indexer loads its benchmarks from the network; this one reads files that the
user names, keeps which item a run belongs to, and matches texts shorter than the run as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.clean.words import ngram_hashes, plain_words, word_hashes
from data_prep.errors import DataError
from data_prep.files import atomic_write
from data_prep.text_files import expand
from recipes.cleaning import Benchmark, Decontamination
from recipes.compose import TREE

PACKAGED = "recipes:"
FILTER_SLOTS_PER_HASH = 16
"""Of the table that is asked first: 1 of 16 n-grams that are not in the index gets past it."""
MIN_FILTER_BITS, MAX_FILTER_BITS = 12, 26
"""At most 64 MiB, for four million n-grams; beyond that the table is only fuller."""


@dataclass(frozen=True)
class Hit:
    """A run of words of a benchmark's item in a document."""

    benchmark: str
    item: str
    words: str


def benchmark_files(name: str, benchmark: Benchmark) -> list[Path]:
    """The files of a benchmark; DataError with a remedy where a path matches nothing."""
    key = f"data.cleaning.decontamination.benchmarks.{name}"
    if not benchmark.paths or not benchmark.keys:
        raise DataError(f"{key}: paths and keys must name something; leave the benchmark out with {key}=null")
    patterns = [str(TREE / path.removeprefix(PACKAGED)) if path.startswith(PACKAGED) else path for path in benchmark.paths]
    try:
        return expand(patterns, f"{key}.paths")
    except DataError as error:
        raise DataError(f"{error}; or leave the benchmark out: {key}=null") from None


def items(name: str, benchmark: Benchmark) -> Iterator[tuple[str, list[str]]]:
    """(item, its texts) of a benchmark, in the order of its files; DataError for a line that holds none of the keys."""
    key = f"data.cleaning.decontamination.benchmarks.{name}"
    for path in benchmark_files(name, benchmark):
        number = 0
        # Any of the keys makes a line an item: tasks of one benchmark may differ in theirs.
        with open(path, "rb") as f:
            for number, raw in enumerate(f, 1):
                if not raw.strip():
                    continue
                try:
                    record = json.loads(raw)
                except ValueError as error:
                    raise DataError(
                        f"{path}, line {number}: not JSON ({error}); a benchmark is one JSON object a line"
                    ) from None
                texts = _texts(record, benchmark.keys)
                if not texts:
                    known = ", ".join(sorted(record)) if isinstance(record, dict) else f"a JSON {type(record).__name__}"
                    raise DataError(
                        f"{path}, line {number}: no text under {', '.join(benchmark.keys)} (found: {known}); correct {key}.keys"
                    )
                named = record.get(benchmark.id_key) if benchmark.id_key else None
                yield str(named) if named is not None else f"{path.name}:{number}", texts
        if not number:
            raise DataError(f"{path}: no item; fill it, or remove it from {key}.paths")


def _texts(record: Any, keys: list[str]) -> list[str]:
    values = [record.get(key) for key in keys] if isinstance(record, dict) else []
    parts = [part for value in values for part in (value if isinstance(value, list) else [value])]
    return [part for part in parts if isinstance(part, str) and part.strip()]


@dataclass
class Index:
    """n-gram hashes of all items, one sorted array per length."""

    names: list[tuple[str, str]] = field(default_factory=list)
    """(benchmark, item)"""
    hashes: dict[int, np.ndarray] = field(default_factory=dict)
    """Length in words -> uint64, sorted, each once."""
    owners: dict[int, np.ndarray] = field(default_factory=dict)
    """Length -> int64, index into `names` of the first item with that hash."""
    too_short: dict[str, int] = field(default_factory=dict)
    """Benchmark -> texts too short to be matched."""

    def write(self, path: Path) -> None:
        arrays = {"names": np.frombuffer(json.dumps([self.names, self.too_short]).encode(), dtype=np.uint8)}
        for n in self.hashes:
            arrays |= {f"hashes_{n}": self.hashes[n], f"owners_{n}": self.owners[n]}
        with atomic_write(path) as f:
            np.savez(f, **arrays)

    @classmethod
    def read(cls, path: Path) -> Index:
        with np.load(path, allow_pickle=False) as stored:
            names, too_short = json.loads(stored["names"].tobytes())
            lengths = [int(key.removeprefix("hashes_")) for key in stored.files if key.startswith("hashes_")]
            return cls(
                [(benchmark, item) for benchmark, item in names],
                {n: stored[f"hashes_{n}"] for n in lengths},
                {n: stored[f"owners_{n}"] for n in lengths},
                too_short,
            )


def build_index(config: Decontamination) -> Index:
    """Read all benchmarks; DataError for a missing or unreadable file."""
    index = Index()
    found: dict[int, list[tuple[np.ndarray, int]]] = {}
    for name, benchmark in config.benchmarks.items():
        for item, texts in items(name, benchmark):
            index.names.append((name, item))
            for text in texts:
                hashes = word_hashes(text).exact
                n = min(config.ngram_words, len(hashes))
                if n < config.min_item_words:
                    index.too_short[name] = index.too_short.get(name, 0) + 1
                    continue
                found.setdefault(n, []).append((ngram_hashes(hashes, n), len(index.names) - 1))
    for n, parts in sorted(found.items()):
        hashes = np.concatenate([part for part, _ in parts])
        owners = np.concatenate([np.full(len(part), owner, dtype=np.int64) for part, owner in parts])
        index.hashes[n], first = np.unique(hashes, return_index=True)
        index.owners[n] = owners[first]
    return index


class Decontaminator:
    """Finds the first run of words of a document that an index holds."""

    def __init__(self, index: Index):
        self.index = index
        self._tables = {n: _table(hashes) for n, hashes in index.hashes.items()}

    def find(self, text: str) -> Hit | None:
        """The hit that begins first, of the longest runs first."""
        if not self._tables:
            return None
        hashes = word_hashes(text).exact
        for n in sorted(self._tables, reverse=True):
            grams = ngram_hashes(hashes, n)
            table = self._tables[n]
            for at in np.flatnonzero(table[grams & np.uint64(len(table) - 1)]):
                known = self.index.hashes[n]
                place = int(np.searchsorted(known, grams[at]))
                if place < len(known) and known[place] == grams[at]:
                    benchmark, item = self.index.names[int(self.index.owners[n][place])]
                    return Hit(benchmark, item, " ".join(plain_words(text)[at : at + n]))
        return None


def _table(hashes: np.ndarray) -> np.ndarray:
    """bool; False where no hash has these lowest bits."""
    bits = min(max(MIN_FILTER_BITS, (len(hashes) * FILTER_SLOTS_PER_HASH).bit_length()), MAX_FILTER_BITS)
    table = np.zeros(1 << bits, dtype=bool)
    table[hashes & np.uint64((1 << bits) - 1)] = True
    return table
