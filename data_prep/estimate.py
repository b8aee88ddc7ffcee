"""How many tokens a source will have, and in documents of which length, before anything is tokenized: from a sample of its text."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data_prep import corpus
from data_prep.columns import Column, open_lengths
from data_prep.errors import DataError
from data_prep.indexed import idx_path
from data_prep.sources import corpus_path, source_paths
from data_prep.text_files import DamagedFile, Text, chunks, is_parquet, parquet_rows, parse_line
from data_prep.tokenizer import Tokenizer, load_tokenizer
from recipes.schema import Recipe, Source

BYTES_PER_TOKEN = 3.0
"""Without a tokenizer to ask. Of the smoke corpus with 2048 pieces (measured 2.8); vocabularies of 100K reach 4 and more, so estimates
err on the low side there."""
SAMPLED_FILES = 4
"""Evenly spaced over a source's files, first and last included."""
SAMPLED_BYTES = 1 << 18
"""Text of one file that is looked at; a first document that is longer is read whole."""
UNPACKED_BYTES = 2 << 20
"""Unpacked to learn what a byte of a packed file comes to; unpackers hold back a block of 128 KiB, a sixteenth of this."""
BUILT_BYTES = 1 << 16
"""Text of a builder that has not run yet; building takes longer than reading."""
TOKENIZED_BYTES = 1 << 16
"""Text of one source that is tokenized to learn its bytes per token: 400 sources take some seconds."""
MAX_DOCUMENTS = 100_000
"""An estimate has at most so many documents, each of which stands for several."""


@dataclass(frozen=True)
class Estimate:
    """Lengths of documents as the sample has them, as long as the estimated source; sliced like an array (data_prep/deal.py)."""

    sample: np.ndarray
    """int32 [n] tokens"""
    documents: int
    stands_for: int
    """Documents of the source that one of these stands for."""

    def __len__(self) -> int:
        return self.documents

    def __getitem__(self, part: slice) -> np.ndarray:
        return self.sample[np.arange(*part.indices(self.documents)) % len(self.sample)]


@dataclass(frozen=True)
class Sampled:
    """Some documents of a source and how much text there is in all."""

    texts: list[str]
    text_bytes: int
    """UTF-8, of the whole source."""


class Estimator:
    """Estimates the sources of one recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.root = recipe, Path(recipe.data.root)

    def lengths(self, name: str) -> Column | Estimate:
        """Document lengths that stand for a source that is not tokenized; DataError where nothing can be known of it."""
        source = self.recipe.data.sources[name]
        if source.kind == "indexed":
            source_paths(name, source)  # refuses what is missing
            return open_lengths(idx_path(Path(source.paths[0])))
        found = self._sample(name, source)
        sizes = np.array([len(text.encode()) for text in found.texts], dtype=np.float64)
        if not len(sizes) or not sizes.sum():
            raise DataError(
                f"data.sources.{name}: no document in the sample that was looked at; check data.sources.{name}.text_key "
                f"('{source.text_key}') and the files"
            )
        tokens = np.maximum(1, np.round(sizes / self._bytes_per_token(found.texts)) + 1)  # 1: end of document
        documents = max(1, round(found.text_bytes / sizes.mean() * (1 - self.recipe.data.heldout_percent / 100)))
        stands_for = -(-documents // MAX_DOCUMENTS)
        return Estimate(tokens.astype(np.int32), -(-documents // stands_for), stands_for)

    def _sample(self, name: str, source: Source) -> Sampled:
        made = self._made(name, source)
        if made:
            # As `quarry prep` writes it: text under "text", repositories already whole.
            return sample_files(made, source.model_copy(update={"text_key": "text", "concatenate": None}))
        if source.kind == "files":
            return sample_files(source_paths(name, source), source)
        built = (document.text for document in corpus.build(source.builder or "", source.max_bytes))
        texts = list(_head(built, BUILT_BYTES))
        size = sum(len(text.encode()) for text in texts)
        if size >= BUILT_BYTES and source.max_bytes is None:
            raise DataError(
                f"data.sources.{name} has no max_bytes and is not built yet, so its size is unknown; run `quarry prep` without --dry-run"
            )
        return Sampled(texts, size if size < BUILT_BYTES else source.max_bytes or size)

    def _made(self, name: str, source: Source) -> list[Path]:
        """What the last preparation made of a source's text, the furthest step that the recipe has; empty: nothing yet."""
        whole = self.root / "concatenated" / f"{name}.jsonl"
        cleaned = sorted((self.root / "clean" / name).glob("*.jsonl"))
        if source.concatenate:
            return [whole] if whole.is_file() else []
        if self.recipe.data.cleaning is not None and cleaned:
            return cleaned
        built = corpus_path(self.root, name)
        return [built] if source.kind == "builtin" and built.is_file() else []

    def _bytes_per_token(self, texts: Sequence[str]) -> float:
        if self._tokenizer is None:
            return BYTES_PER_TOKEN
        some = list(_head((text[:TOKENIZED_BYTES] for text in texts), TOKENIZED_BYTES))
        tokens = sum(map(len, self._tokenizer.encode_batch(some, 1)))
        return sum(len(text.encode()) for text in some) / max(1, tokens)

    @cached_property
    def _tokenizer(self) -> Tokenizer | None:
        """The one that this root has, or that the recipe names; None where there is none yet."""
        spec = self.recipe.data.tokenizer
        made = self.root / "tokenizer" / ("tokenizer.model" if spec.kind == "sentencepiece" else "tokenizer.json")
        given = Path(spec.path) if spec.path is not None else None
        for path in (made, given):
            if path is not None and path.exists():
                return load_tokenizer(path.parent if path.name == "tokenizer.json" else path, spec.kind)
        return None


def sample_files(paths: Sequence[Path], source: Source) -> Sampled:
    """The beginning of some of the files, and the text of all by their sizes."""
    count = min(SAMPLED_FILES, len(paths))
    picked = [paths[i * (len(paths) - 1) // max(1, count - 1)] for i in range(count)]
    texts: list[str] = []
    text_bytes = file_bytes = 0.0
    for path in picked:
        found, per_byte = _sample_parquet(path, source) if is_parquet(path) else _sample_lines(path, source)
        texts += _repositories(found, source) if source.concatenate else [text.text for text in found]
        file_bytes += path.stat().st_size
        text_bytes += per_byte * path.stat().st_size
    whole = sum(path.stat().st_size for path in paths)
    return Sampled(texts, int(text_bytes / file_bytes * whole) if file_bytes else 0)


def _sample_lines(path: Path, source: Source) -> tuple[list[Text], float]:
    """Documents at the beginning of a file of JSON lines, and bytes of text per byte of the file."""
    raw: list[int] = []
    read_bytes, head = 0, bytearray()
    try:
        for piece in chunks(path, lambda data: raw.append(len(data))):
            # All that one read of the file unpacks to, or the ratio would be wrong.
            if sum(raw) > read_bytes > 0 and len(head) >= UNPACKED_BYTES and b"\n" in head:
                break
            read_bytes = sum(raw)
            head += piece
    except DamagedFile:
        pass  # what came before it is the sample; `quarry prep` says what is lost
    unpacked_per_byte = len(head) / max(1, read_bytes)
    whole_lines = head[: head.rfind(b"\n") + 1] if b"\n" in head[:-1] else head
    lines = bytes(whole_lines).split(b"\n")
    looked_at, texts = 0, []
    for line in lines:
        looked_at += len(line) + 1
        parsed = parse_line(line, source.text_key) if line.strip() else None
        if isinstance(parsed, Text):
            texts.append(parsed)
        if looked_at >= SAMPLED_BYTES:
            break
    text_bytes = sum(len(text.text.encode()) for text in texts)
    return texts, text_bytes / max(1, looked_at) * unpacked_per_byte


def _sample_parquet(path: Path, source: Source) -> tuple[list[Text], float]:
    """The first rows of a Parquet file, and bytes of text per byte of the file."""
    from pyarrow import parquet

    columns = (source.repository_key, source.path_key) if source.concatenate else ()
    try:
        rows, _ = next(iter(parquet_rows(path, source.text_key, columns)), ([], 0))
        total = parquet.read_metadata(path).num_rows
    except DamagedFile:
        return [], 0.0  # `quarry prep` says what is wrong with it
    texts = [row for row in rows if isinstance(row, Text)]
    text_bytes = sum(len(text.text.encode()) for text in texts)
    return texts, text_bytes / max(1, len(rows)) * total / max(1, path.stat().st_size)


def _repositories(texts: Iterable[Text], source: Source) -> list[str]:
    """Neighbouring files of one repository as one document: at most the length that it will have."""
    by_name: Callable[[Text], object] = lambda text: (text.record or {}).get(source.repository_key)  # noqa: E731
    return ["\n".join(text.text for text in group) for _, group in itertools.groupby(texts, by_name)]


def _head(texts: Iterable[str], max_bytes: int) -> Iterable[str]:
    """The first texts, until they have `max_bytes`."""
    size = 0
    for text in texts:
        yield text
        size += len(text.encode())
        if size >= max_bytes:
            return
