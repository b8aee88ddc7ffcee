"""What each token of a byte-level vocabulary stands for, as a table that finds, one lookup a token, the documents to look at twice."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

SUSPECT, CONTROL, NUL = 1, 2, 4
"""Bits of a token: may begin a code point that the tokenizers read differently; is a control token; holds a NUL."""
CAUSES = {SUSPECT: "code point", CONTROL: "control token", NUL: "NUL character"}
LOOK = 255
"""In `sizes`: look at `kinds` and `lengths`."""
CHUNK_TOKENS = 1 << 16
"""Looked up at a time: numpy makes 64-bit indices of them, which then stay in the processor's cache."""
WINDOW = 4
"""Tokens that a code point (4 bytes at most) may reach over."""


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
    tails: np.ndarray
    """uint32: what a SUSPECT token ends with that may go on to a suspect, in the upper places of 24 bits."""
    tail_lengths: np.ndarray
    """uint8: bytes of it; 0 where the beginning of a suspect stands inside of the token."""
    two_bytes: np.ndarray
    """bool: whether it begins a code point of two bytes."""
    beginnings: np.ndarray
    """uint32, sorted, not [vocab]: the first three bytes of suspects (two of code points that have two)."""

    def __post_init__(self) -> None:
        self._starts = np.cumsum(self.lengths, dtype=np.int64) - self.lengths
        self._bytes = self.contents.tobytes()  # slices of it cost a tenth of an array's
        # Made here and not when first asked for: several threads would ask at once.
        content = np.append(self.contents, np.zeros(2, np.uint8)).astype(np.uint32)
        first = np.where(self.lengths >= 1, content[self._starts], 0)
        self.heads = (first << 8) | np.where(self.lengths >= 2, content[self._starts + 1], 0)
        """uint32: first byte << 8 | second byte of each token, 0 where there is none"""
        self._is_suspect = np.zeros(0x110000, dtype=bool)
        self._is_suspect[self.suspects] = True
        self._control_texts: dict[str, list[str]] = {}
        """First two characters -> control tokens: a hundred of them share theirs, and most texts have none."""
        for content in self.many_bytes(np.flatnonzero(self.kinds & CONTROL)):
            self._control_texts.setdefault(content.decode()[:2], []).append(content.decode())
        self._sizes = np.where((self.kinds != 0) | (self.lengths >= LOOK), LOOK, self.lengths).astype(np.uint8)

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
        tails, tail_lengths, two_bytes = np.zeros(size, np.uint32), np.zeros(size, np.uint8), np.zeros(size, bool)
        for number in np.flatnonzero(kinds & SUSPECT).tolist():
            content = vocab[number]
            tail = next((content[-n:] for n in (2, 1) if content[-n:] in short and not _begins(content, whole)), b"")
            tails[number], tail_lengths[number], two_bytes[number] = _packed(tail), len(tail), tail[:1] < b"\xe0"
        return cls(
            kinds,
            lengths,
            suspects,
            np.frombuffer(b"".join(vocab.get(number, b"") for number in range(size)), np.uint8),
            tails,
            tail_lengths,
            two_bytes,
            np.array(sorted(map(_packed, whole)), dtype=np.uint32),
        )

    def bytes(self, number: int) -> bytes:
        """What a token stands for."""
        start = self._starts.item(number)
        return self._bytes[start : start + self.lengths.item(number)]

    def many_bytes(self, numbers: np.ndarray) -> list[bytes]:
        """What each of many tokens stands for."""
        content = self._bytes
        starts, lengths = self._starts[numbers].tolist(), self.lengths[numbers].tolist()
        return [content[start : start + length] for start, length in zip(starts, lengths, strict=True)]

    def pairs(self, numbers: np.ndarray, place: int) -> np.ndarray:
        """uint16: the two bytes at `place` (from the end where it is negative) of tokens of two bytes or more; the last two of shorter ones."""
        lengths = self.lengths[numbers]
        first = self._starts[numbers] + np.minimum(place if place >= 0 else lengths + place, lengths - 2)
        return (self.contents[first].astype(np.uint16) << 8) | self.contents[first + 1]

    @property
    def single_bytes(self) -> np.ndarray:
        """Tokens that stand for one byte."""
        return np.flatnonzero(self.lengths == 1)

    def scan(self, ids: np.ndarray, counts: np.ndarray) -> tuple[int, dict[int, str]]:
        """(bytes that the tokens stand for, documents to look at twice -> cause) of ids uint32 [tokens], counts int64 [documents]."""
        total, looked = 0, []
        for start in range(0, len(ids), CHUNK_TOKENS):
            sizes = np.take(self._sizes, ids[start : start + CHUNK_TOKENS], mode="clip")
            total += int(sizes.sum(dtype=np.int64))
            if sizes.max() == LOOK:
                looked.append(np.flatnonzero(sizes == LOOK) + start)
        if not looked:
            return total, {}
        positions = np.concatenate(looked)
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
        """Of SUSPECT tokens at `positions`, whether the first three bytes of a suspect stand there."""
        last = len(ids) - 1
        here, after, later = (ids[np.minimum(positions + n, last)] for n in range(3))
        # The two bytes that follow, from one token or from two.
        heads = self.heads
        follows = np.where(self.lengths[after] >= 2, heads[after], (heads[after] & 0xFF00) | (heads[later] >> 8))
        found = self.tails[here]
        key = np.where(
            self.tail_lengths[here] == 2,
            found | (follows >> 8),
            found | np.where(self.two_bytes[here], follows & 0xFF00, follows),
        )
        where = np.minimum(np.searchsorted(self.beginnings, key), len(self.beginnings) - 1)
        return (self.tail_lengths[here] == 0) | (self.beginnings[where] == key)

    def _has_suspect(self, window: np.ndarray) -> bool:
        text = b"".join(map(self.bytes, window.tolist())).decode(errors="ignore")
        return any(self._is_suspect[ord(character)] for character in text)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where `text` has suspects and control tokens: (start, end) in order, in characters."""
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        found = [(place, place + 1) for place in np.flatnonzero(self._is_suspect[points]).tolist()]
        for beginning, contents in self._control_texts.items():
            if beginning not in text:
                continue
            for content in contents:
                place = text.find(content)
                while place >= 0:
                    found.append((place, place + len(content)))
                    place = text.find(content, place + 1)
        return sorted(found)

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


def _begins(content: bytes, whole: set[bytes]) -> bool:
    """Whether the beginning of a suspect stands in `content`."""
    return any(
        content[start : start + (2 if lead < 0xE0 else 3)] in whole for start, lead in enumerate(content) if lead >= 0xC2
    )


def _may_begin(content: bytes, whole: set[bytes], short: set[bytes]) -> bool:
    """Whether a suspect begins in `content`, or may begin at its end."""
    return _begins(content, whole) or content[-1:] in short or content[-2:] in short


def _packed(beginning: bytes) -> int:
    """Up to three bytes in the upper places of 24 bits."""
    return int.from_bytes(beginning.ljust(3, b"\0"), "big")
