"""How well tokenizers fit a text: tokens per word, bytes per token, how much falls back to bytes; per category and language.

A word is a run of characters between white space; in scripts that are written without spaces (Chinese, Japanese, Thai, Lao, Khmer,
Burmese) every character is one. Fertility is tokens per word (Rust et al. 2021, section 4): near 1 is good, a language with a much higher
value than the others pays for it in context and compute.
A byte token is an entry that holds no whole character: a `<0x..>` piece, or a byte-level entry that is no valid UTF-8 by itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_prep.optional import need
from data_prep.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Thai and Lao, Burmese, Khmer, kana, Han."""
WORD = re.compile(f"[{UNSPACED}]|[^\\s{UNSPACED}]+")
BATCH_CHARS = 1 << 22
"""Encoded at a time: enough for all threads, some tens of MB."""
IDENTIFIED_CHARS = 4000
"""Of a document, to tell its language; more does not change it."""
SURE = 0.5
"""Probability from which py3langid's answer is taken; other documents count as UNCLEAR."""
UNCLEAR = "unclear"


@dataclass(frozen=True)
class Labelled:
    """A document and where it is counted."""

    text: str
    category: str
    language: str


@dataclass
class Fit:
    """What one tokenizer makes of the text of one row."""

    tokens: int = 0
    byte_tokens: int = 0
    unknown_tokens: int = 0


@dataclass
class Row:
    """Text of one category and language. Sizes of text are the same for all tokenizers."""

    category: str
    language: str
    documents: int = 0
    text_bytes: int = 0
    characters: int = 0
    words: int = 0
    fits: dict[str, Fit] = field(default_factory=dict)
    """Name of a tokenizer -> what it makes of this text."""

    def add(self, other: Row) -> None:
        """Count another row's text here too."""
        for name in ("documents", "text_bytes", "characters", "words"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name, fit in other.fits.items():
            mine = self.fits.setdefault(name, Fit())
            mine.tokens += fit.tokens
            mine.byte_tokens += fit.byte_tokens
            mine.unknown_tokens += fit.unknown_tokens

    def figures(self, tokenizer: str) -> dict[str, float | int | None]:
        """The numbers of the report; None where there is nothing to divide by."""
        fit = self.fits[tokenizer]

        def ratio(a: int, b: int) -> float | None:
            return a / b if b else None

        return {
            "tokens": fit.tokens,
            "tokens_per_word": ratio(fit.tokens, self.words),
            "bytes_per_token": ratio(self.text_bytes, fit.tokens),
            "characters_per_token": ratio(self.characters, fit.tokens),
            "byte_token_percent": ratio(100 * fit.byte_tokens, fit.tokens),
            "unknown_percent": ratio(100 * fit.unknown_tokens, fit.tokens),
        }


@dataclass(frozen=True)
class Report:
    """Rows by category and language, largest text first within a category; categories in the order of their names."""

    rows: list[Row]
    vocabularies: dict[str, int]
    """Name of a tokenizer -> entries."""
    used: dict[str, int]
    """Name of a tokenizer -> different entries that the text used."""

    def totals(self) -> list[Row]:
        """One row per category over its languages, then one over everything."""
        sums: dict[str, Row] = {}
        for row in self.rows:
            sums.setdefault(row.category, Row(row.category, "all")).add(row)
        everything = Row("all", "all")
        for row in sums.values():
            everything.add(row)
        return [*sums.values(), everything]

    def as_json(self) -> dict[str, Any]:
        def line(row: Row) -> dict[str, Any]:
            sizes = {
                name: getattr(row, name) for name in ("category", "language", "documents", "text_bytes", "characters", "words")
            }
            return {**sizes, "tokenizers": {name: row.figures(name) for name in row.fits}}

        return {
            "format": "quarry.fertility/1",
            "tokenizers": {
                name: {"vocab_size": size, "entries_used": self.used[name]} for name, size in self.vocabularies.items()
            },
            "rows": [line(row) for row in self.rows],
            "totals": [line(row) for row in self.totals()],
        }


def measure(
    documents: Iterable[Labelled],
    tokenizers: dict[str, Tokenizer],
    threads: int,
    done: Callable[[int], None] = lambda size: None,
) -> Report:
    """Encode the documents with every tokenizer and count. `done` is told the bytes of text as they are finished."""
    rows: dict[tuple[str, str], Row] = {}
    kinds = {name: byte_entries(tokenizer) for name, tokenizer in tokenizers.items()}
    unknown = {name: unknown_id(tokenizer) for name, tokenizer in tokenizers.items()}
    seen = {name: np.zeros(tokenizer.vocab_size, dtype=bool) for name, tokenizer in tokenizers.items()}
    for batch in _batches(documents):
        found = [rows.setdefault((d.category, d.language), Row(d.category, d.language)) for d in batch]
        for row, document in zip(found, batch, strict=True):
            row.documents += 1
            row.text_bytes += len(document.text.encode())
            row.characters += len(document.text)
            row.words += len(WORD.findall(document.text))
        for name, tokenizer in tokenizers.items():
            encoded = tokenizer.encode_batch([d.text for d in batch], threads)
            for row, ids in zip(found, encoded, strict=True):
                fit = row.fits.setdefault(name, Fit())
                fit.tokens += len(ids)
                fit.byte_tokens += int(kinds[name][ids].sum())
                fit.unknown_tokens += 0 if unknown[name] is None else int((ids == unknown[name]).sum())
                seen[name][ids] = True
        done(sum(len(d.text.encode()) for d in batch))
    ordered = sorted(rows.values(), key=lambda row: (row.category, -row.text_bytes, row.language))
    return Report(ordered, {n: t.vocab_size for n, t in tokenizers.items()}, {n: int(used.sum()) for n, used in seen.items()})


def _batches(documents: Iterable[Labelled]) -> Iterator[list[Labelled]]:
    batch: list[Labelled] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def language_of(text: str) -> str:
    """Two-letter code of the language that py3langid finds, or UNCLEAR."""
    need("py3langid")
    from data_prep.clean.languages import identifier

    language, probability = identifier().classify(text[:IDENTIFIED_CHARS])
    return str(language) if probability >= SURE else UNCLEAR


def byte_entries(tokenizer: Tokenizer) -> np.ndarray:
    """bool [vocab_size]: entries that hold no whole character."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return np.array([tokenizer.processor.is_byte(number) for number in range(tokenizer.vocab_size)])
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    library = tokenizer.tokenizer
    pieces = [library.id_to_token(number) or "" for number in range(tokenizer.vocab_size)]
    if json.loads(library.to_str())["model"].get("byte_fallback"):
        return np.array([re.fullmatch(r"<0x[0-9A-F]{2}>", piece) is not None for piece in pieces])
    special = set(tokenizer.special_ids.values())
    letters = _byte_letters()
    return np.array([number not in special and not _is_text(piece, letters) for number, piece in enumerate(pieces)])


def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in the pieces of byte-level vocabularies: itself if printable in Latin-1, else from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(rest)}


def _is_text(piece: str, letters: dict[str, int]) -> bool:
    """Whether a piece is whole characters; one with letters outside of the byte alphabet is no byte-level piece and is."""
    if not all(letter in letters for letter in piece):
        return True
    try:
        bytes(letters[letter] for letter in piece).decode()
    except UnicodeDecodeError:
        return False
    return True


def unknown_id(tokenizer: Tokenizer) -> int | None:
    """Id that stands for what the vocabulary cannot write; None where everything can be written."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return int(tokenizer.processor.unk_id())
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    name = json.loads(tokenizer.tokenizer.to_str())["model"].get("unk_token")
    return None if name is None else tokenizer.tokenizer.token_to_id(name)


def shares(rows: Sequence[Row], least: float) -> list[Row]:
    """The rows of each category with less than `least` of its text folded into one of language 'other'; for tables."""
    size: dict[str, int] = {}
    for row in rows:
        size[row.category] = size.get(row.category, 0) + row.text_bytes
    out: list[Row] = []
    for category, total in size.items():
        mine = [row for row in rows if row.category == category]
        small = [row for row in mine if row.text_bytes < least * total]
        out += [row for row in mine if row.text_bytes >= least * total]
        if len(small) == 1:
            out += small
        elif small:
            other = Row(category, "other")
            for row in small:
                other.add(row)
            out.append(other)
    return out
