"""Runs of words that training data shares with benchmarks: the index of the benchmarks' n-grams, and the search in a document.

The same idea as datatrove's decontamination step, whose indexer loads its benchmarks from the network; this one reads files that the
user names, keeps which item a run belongs to, and matches texts shorter than the run as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
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
    """Runs of words of all items. A text of at least `ngram_words` words is in it with all runs of that length; a shorter one with its
    first `min_item_words` words, and the hash of the whole to compare when these are found."""

    ngram_words: int
    min_item_words: int
    names: list[tuple[str, str]]
    """(benchmark, item)"""
    runs: np.ndarray
    """uint64 hashes, ascending."""
    owners: np.ndarray
    """int64, for each run the place of its item in `names`."""
    starts: np.ndarray
    """uint64, ascending: hashes of the first words of short texts."""
    wholes: np.ndarray
    """Structured like WHOLE, for each of `starts`."""
    too_short: dict[str, int]
    """Benchmark -> texts too short to be matched."""

    def write(self, path: Path) -> None:
        described = json.dumps([self.ngram_words, self.min_item_words, self.names, self.too_short]).encode()
        with atomic_write(path) as f:
            np.savez(
                f,
                described=np.frombuffer(described, dtype=np.uint8),
                **{name: getattr(self, name) for name in ("runs", "owners", "starts", "wholes")},
            )

    @classmethod
    def read(cls, path: Path) -> Index:
        with np.load(path, allow_pickle=False) as stored:
            ngram_words, min_item_words, names, too_short = json.loads(stored["described"].tobytes())
            arrays = {name: stored[name] for name in ("runs", "owners", "starts", "wholes")}
        return cls(ngram_words, min_item_words, [(benchmark, item) for benchmark, item in names], too_short=too_short, **arrays)


WHOLE = np.dtype([("hash", np.uint64), ("words", np.int64), ("owner", np.int64)])


def build_index(config: Decontamination) -> Index:
    """Read all benchmarks; DataError for a missing or unreadable file."""
    names: list[tuple[str, str]] = []
    runs, owners = [np.empty(0, dtype=np.uint64)], [np.empty(0, dtype=np.int64)]
    starts, wholes, too_short = [], [], {}
    for name, benchmark in config.benchmarks.items():
        for item, texts in items(name, benchmark):
            owner = len(names)
            names.append((name, item))
            for text in texts:
                hashes = word_hashes(text).exact
                if len(hashes) < config.min_item_words:
                    too_short[name] = too_short.get(name, 0) + 1
                elif len(hashes) < config.ngram_words:
                    starts.append(ngram_hashes(hashes[: config.min_item_words], config.min_item_words)[0])
                    wholes.append((ngram_hashes(hashes, len(hashes))[0], len(hashes), owner))
                else:
                    runs.append(ngram_hashes(hashes, config.ngram_words))
                    owners.append(np.full(len(runs[-1]), owner, dtype=np.int64))
    distinct, first = np.unique(np.concatenate(runs), return_index=True)
    order = np.argsort(np.array(starts, dtype=np.uint64), kind="stable")
    return Index(
        config.ngram_words,
        config.min_item_words,
        names,
        distinct,
        np.concatenate(owners)[first],
        np.array(starts, dtype=np.uint64)[order],
        np.array(wholes, dtype=WHOLE)[order],
        too_short,
    )


class Decontaminator:
    """Finds runs of words of documents that an index holds, in many documents at once."""

    def __init__(self, index: Index):
        self.index = index
        self._runs, self._starts = _table(index.runs), _table(index.starts)

    def find(self, texts: list[str], hashes: list[np.ndarray]) -> list[Hit | None]:
        """For each text, whose words have these (exact) hashes, the first run that an item of a benchmark has, or None."""
        index = self.index
        joined = np.concatenate(hashes) if hashes else np.empty(0, dtype=np.uint64)
        ends = np.cumsum([len(h) for h in hashes])
        first: dict[int, tuple[int, int, int]] = {}  # document -> (place in `joined`, words, item)

        def note(at: int, words: int, owner: int) -> None:
            document = int(np.searchsorted(ends, at, side="right"))
            if at + words <= ends[document] and (document not in first or at < first[document][0]):
                first[document] = (at, words, owner)

        grams = ngram_hashes(joined, index.ngram_words)
        for at in np.flatnonzero(self._runs[grams & np.uint64(len(self._runs) - 1)]).tolist():
            place = int(np.searchsorted(index.runs, grams[at]))
            if place < len(index.runs) and index.runs[place] == grams[at]:
                note(at, index.ngram_words, int(index.owners[place]))
        if len(index.starts):
            grams = ngram_hashes(joined, index.min_item_words)
            for at in np.flatnonzero(self._starts[grams & np.uint64(len(self._starts) - 1)]).tolist():
                low, high = (int(np.searchsorted(index.starts, grams[at], side=side)) for side in ("left", "right"))
                for whole in index.wholes[low:high]:
                    words = int(whole["words"])
                    if at + words <= len(joined) and ngram_hashes(joined[at : at + words], words)[0] == whole["hash"]:
                        note(at, words, int(whole["owner"]))
        return [self._hit(text, number, first.get(number), ends) for number, text in enumerate(texts)]

    def _hit(self, text: str, document: int, found: tuple[int, int, int] | None, ends: np.ndarray) -> Hit | None:
        if found is None:
            return None
        at, words, owner = found
        at -= int(ends[document - 1]) if document else 0
        benchmark, item = self.index.names[owner]
        return Hit(benchmark, item, b" ".join(plain_words(text)[at : at + words]).decode())


def _table(hashes: np.ndarray) -> np.ndarray:
    """bool; False where no hash has these lowest bits."""
    bits = min(max(MIN_FILTER_BITS, (len(hashes) * FILTER_SLOTS_PER_HASH).bit_length()), MAX_FILTER_BITS)
    table = np.zeros(1 << bits, dtype=bool)
    table[hashes & np.uint64((1 << bits) - 1)] = True
    return table
