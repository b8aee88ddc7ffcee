"""What each token of a byte-level vocabulary stands for, as a table that finds, one lookup a token, the documents to look at twice."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

SUSPECT, CONTROL, NUL = 1, 2, 4
"""Bits of a token: may begin a code point that the tokenizers read differently; is a control token; holds a NUL."""
CAUSES = {SUSPECT: "code point", CONTROL: "control token", NUL: "NUL character"}
LOOK = 255
"""In `sizes`: look at `kinds` and `lengths`."""
WINDOW = 4
"""Tokens that a code point (4 bytes at most) may reach over."""
TOKEN_BITS = 21
"""Of a token id, so that three fit into an uint64; vocabularies are smaller than two million."""
MEMO = 1 << 18
"""Triples of tokens whose answer is kept: some 30 MB."""


@dataclass
class TokenTable:
    """Arrays over the vocabulary [vocab]; `suspects` are the code points (int32, sorted) that make a token SUSPECT."""

    kinds: np.ndarray
    """uint8: SUSPECT | CONTROL | NUL"""
    lengths: np.ndarray
    """int32: bytes that the token stands for"""
    suspects: np.ndarray
    contents: np.ndarray
    """uint8: the bytes of all tokens, one after the other."""

    def __post_init__(self) -> None:
        self._starts = np.cumsum(self.lengths, dtype=np.int64) - self.lengths
        self._sizes = np.where((self.kinds != 0) | (self.lengths >= LOOK), LOOK, self.lengths).astype(np.uint8)
        self._memo: dict[int, bool] = {}

    @classmethod
    def build(cls, vocab: dict[int, bytes], control_ids: Iterable[int], suspects: np.ndarray) -> TokenTable:
        size = max(vocab) + 1
        kinds, lengths = np.zeros(size, np.uint8), np.zeros(size, np.int32)
        whole, short = _beginnings(suspects)
        for number, content in vocab.items():
            lengths[number] = len(content)
            if b"\0" in content:
                kinds[number] |= NUL
            if not content.isascii() and _may_begin(content, whole, short):
                kinds[number] |= SUSPECT
        for number in control_ids:
            kinds[number] |= CONTROL
        contents = np.frombuffer(b"".join(vocab.get(number, b"") for number in range(size)), np.uint8)
        return cls(kinds, lengths, suspects, contents)

    def bytes(self, number: int) -> bytes:
        """What a token stands for."""
        start = int(self._starts[number])
        return self.contents[start : start + int(self.lengths[number])].tobytes()

    @property
    def single_bytes(self) -> np.ndarray:
        """Tokens that stand for one byte."""
        return np.flatnonzero(self.lengths == 1)

    def scan(self, ids: np.ndarray, counts: np.ndarray) -> tuple[int, dict[int, str]]:
        """(bytes that the tokens stand for, documents to look at twice -> cause) of ids uint32 [tokens], counts int64 [documents]."""
        sizes = np.take(self._sizes, ids, mode="clip")
        total = int(sizes.sum(dtype=np.int64))
        if not len(sizes) or sizes.max() != LOOK:
            return total, {}
        positions = np.flatnonzero(sizes == LOOK)
        found = ids[positions]
        total += int(self.lengths[found].sum(dtype=np.int64)) - LOOK * len(positions)
        kinds = self.kinds[found]
        causes = kinds & (CONTROL | NUL)
        suspicious = np.flatnonzero(kinds & SUSPECT)
        if len(suspicious):
            for number in suspicious[self._may_begin_suspect(ids, positions[suspicious])].tolist():
                position = int(positions[number])
                if self._has_suspect(ids[position : position + WINDOW]):
                    causes[number] |= SUSPECT
        hits = np.flatnonzero(causes)
        documents = np.searchsorted(np.cumsum(counts), positions[hits], side="right")
        flagged: dict[int, str] = {}
        for document, cause in zip(documents.tolist(), causes[hits].tolist(), strict=True):
            flagged.setdefault(document, CAUSES[cause & -cause])
        return total, flagged

    def _may_begin_suspect(self, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Of SUSPECT tokens at `positions`, whether the first three bytes of a suspect follow; each triple of tokens is looked at once."""
        last = len(ids) - 1
        triples = ids[positions].astype(np.uint64)
        for shift in (1, 2):
            triples |= ids[np.minimum(positions + shift, last)].astype(np.uint64) << np.uint64(shift * TOKEN_BITS)
        unique, inverse = np.unique(triples, return_inverse=True)
        answers = np.empty(len(unique), dtype=bool)
        mask = (1 << TOKEN_BITS) - 1
        for number, triple in enumerate(unique.tolist()):
            known = self._memo.get(triple)
            if known is None:
                first, *rest = (self.bytes((triple >> (shift * TOKEN_BITS)) & mask) for shift in range(3))
                known = _begins(first + b"".join(rest), len(first), self._whole)
                if len(self._memo) >= MEMO:
                    self._memo.clear()
                self._memo[triple] = known
            answers[number] = known
        return answers[inverse]

    def _has_suspect(self, window: np.ndarray) -> bool:
        text = b"".join(map(self.bytes, window.tolist())).decode(errors="ignore")
        return any(self._is_suspect[ord(character)] for character in text)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where `text` has suspects and control tokens: (start, end) in order, in characters."""
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        found = [(place, place + 1) for place in np.flatnonzero(self._is_suspect[points]).tolist()]
        for number in np.flatnonzero(self.kinds & CONTROL).tolist():
            content = self.bytes(number).decode()
            place = text.find(content)
            while place >= 0:
                found.append((place, place + len(content)))
                place = text.find(content, place + 1)
        return sorted(found)

    @cached_property
    def _is_suspect(self) -> np.ndarray:
        """bool [code points]"""
        answers = np.zeros(0x110000, dtype=bool)
        answers[self.suspects] = True
        return answers

    @cached_property
    def _whole(self) -> set[bytes]:
        return _beginnings(self.suspects)[0]

    def bytes_of(self, ids: np.ndarray) -> int:
        return int(self.lengths[ids].sum(dtype=np.int64))

    def count_control(self, ids: np.ndarray) -> int:
        """Control tokens among ids (also ids that the table does not reach: none of them is one)."""
        return int(np.count_nonzero(self.kinds[ids[ids < len(self.kinds)]] & CONTROL))


def _beginnings(suspects: np.ndarray) -> tuple[set[bytes], set[bytes]]:
    """(UTF-8 of suspects, of 4 bytes the first 3; what is shorter than that and may go on to one)."""
    whole, short = set(), set()
    points = suspects[(suspects < 0xD800) | (suspects > 0xDFFF)]
    # Code points above 0xFFFF share their first three bytes 64 at a time.
    for point in [*points[points < 0x10000].tolist(), *(np.unique(points[points >= 0x10000] >> 6) << 6).tolist()]:
        encoded = chr(point).encode()[:3]
        whole.add(encoded)
        short.update(encoded[:n] for n in range(1, len(encoded)))
    return whole, short


def _begins(content: bytes, end: int, whole: set[bytes]) -> bool:
    """Whether a suspect begins before `end`, by its first three bytes."""
    for start in range(end):
        lead = content[start]
        if lead >= 0xC2 and content[start : start + (2 if lead < 0xE0 else 3)] in whole:
            return True
    return False


def _may_begin(content: bytes, whole: set[bytes], short: set[bytes]) -> bool:
    for start, lead in enumerate(content):
        if lead >= 0xC2:
            reach = 2 if lead < 0xE0 else 3
            part = content[start : start + reach]
            if part in (whole if len(part) == reach else short):
                return True
    return False
