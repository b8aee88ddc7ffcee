"""Words, sentences and n-grams of any language without a model: what datatrove's own splitters would need spaCy or a download for.

For every language of datatrove's table its splitter is spaCy, stanza or a package of that language, none of which is here. The one rule
that replaces them: a word is a run of letters and digits (with inner apostrophes and hyphens) or of other signs; in scripts that are
written without spaces each character is a word. Counts of words in those scripts are counts of characters.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f"  # Burmese
    "\u1780-\u17ff"  # Khmer
    "\u3040-\u30ff"  # Hiragana, Katakana
    "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
)
_UNSPACED = re.compile(f"[{UNSPACED}]")
_WORD = re.compile(r"\w+(?:['’\-]\w+)*|[^\w\s]+")
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’»)\]]*(?=\s|$)|[。！？]+[」』”’）]*")
_DIGITS = re.compile(rb"[0-9]+")
VOCABULARY_WORDS = 200_000
"""Distinct words whose hashes are remembered, about 40 MB; then it starts anew (with the same hashes)."""
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
"""Odd, so that it loses no bits; 2^64 divided by the golden ratio, as in Fibonacci hashing."""


def words(text: str) -> list[str]:
    """Words and runs of punctuation, in order."""
    if not text.isascii() and _UNSPACED.search(text):
        text = _UNSPACED.sub(r" \g<0> ", text)
    return _WORD.findall(text)


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) of each sentence, together the whole text; one at least."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    if not ends or text[ends[-1] :].strip():
        ends.append(len(text))
    ends[-1] = len(text)
    return list(zip([0, *ends[:-1]], ends, strict=True))


@cache
def splitter() -> Any:
    """The word tokenizer that datatrove's filters take as their language."""
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Splitter(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return words(text)

        def sent_tokenize(self, text: str) -> list[str]:
            return [text[start:end].strip() for start, end in sentence_spans(text)]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return sentence_spans(text)

    return Splitter()


@cache
def _normalisation() -> tuple[Any, Any, bytes]:
    from datatrove.utils.text import PUNCTUATION_TRANS, TextNormConfig, simplify_text

    # Of ASCII text its normalisation is a table: lower case, and a space for each sign and control character.
    table = bytes(ord(chr(byte).lower().translate(PUNCTUATION_TRANS)) if byte < 128 else byte for byte in range(256))
    return simplify_text, TextNormConfig(norm_numbers=False), table


def plain_words(text: str) -> list[bytes]:
    """Words for comparing documents, in UTF-8: lower case, without punctuation and accents (datatrove's normalisation)."""
    simplify, config, table = _normalisation()
    if text.isascii():
        return text.encode().translate(table).split()
    simple = simplify(text, config)
    return (_UNSPACED.sub(r" \g<0> ", simple) if _UNSPACED.search(simple) else simple).encode().split()


class _Vocabulary(dict[bytes, int]):
    """Word -> its place in the two arrays of hashes, which grow with each new word; looking up known words is all C."""

    def __init__(self) -> None:
        super().__init__()
        self.hashes = np.empty((2, 4096), dtype=np.uint64)
        """Rows: exact, blind to numbers."""

    def __missing__(self, word: bytes) -> int:
        place = self[word] = len(self)
        if place == self.hashes.shape[1]:
            self.hashes = np.concatenate([self.hashes, np.empty_like(self.hashes)], axis=1)
        self.hashes[:, place] = _hash(word), _hash(_DIGITS.sub(b"0", word))
        return place


_vocabulary = _Vocabulary()


@dataclass(frozen=True)
class WordHashes:
    """64-bit hashes of a document's plain_words, uint64 [words]."""

    exact: np.ndarray
    number_blind: np.ndarray
    """Runs of digits count as the same."""


def word_hashes(text: str) -> WordHashes:
    global _vocabulary
    if len(_vocabulary) > VOCABULARY_WORDS:
        _vocabulary = _Vocabulary()
    places = np.array(list(map(_vocabulary.__getitem__, plain_words(text))), dtype=np.int64)
    exact, number_blind = _vocabulary.hashes
    return WordHashes(exact[places], number_blind[places])


def _hash(word: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(word, digest_size=8).digest(), "little")


@cache
def _power(exponent: int) -> np.uint64:
    """MULTIPLIER to this power, modulo 2^64."""
    return np.uint64(pow(int(MULTIPLIER), exponent, 1 << 64))


def ngram_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """uint64 hash of each run of `n` words, in order; empty for fewer words.

    A polynomial in MULTIPLIER over the words' hashes, then splitmix64's finaliser, so that runs that share words are unrelated.
    """
    count = len(hashes) - n + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    # Runs of 1, 2, 4 ... words are joined to one of n: log2(n) passes instead of n. With p the multiplier, the hash of a run of k words
    # followed by one of m words is hash * p^m + hash.
    out, length = None, 0
    power, run = 1, hashes
    while True:
        if n & power:
            out = run[:count].copy() if out is None else out * _power(power) + run[length : length + count]
            length += power
        if power * 2 > n:
            break
        run = run[: len(run) - power] * _power(power) + run[power:]
        power *= 2
    out ^= out >> np.uint64(30)
    out *= np.uint64(0xBF58476D1CE4E5B9)
    out ^= out >> np.uint64(27)
    out *= np.uint64(0x94D049BB133111EB)
    out ^= out >> np.uint64(31)
    return out
