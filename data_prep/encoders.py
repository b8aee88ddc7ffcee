"""Blocks of documents to token ids, exactly as the reference tokenizer gives them: gigatoken where it is equal, the reference elsewhere.

Where gigatoken may differ shows in its own output: a byte-level vocabulary loses nothing, so the bytes of the tokens are the text. A
table over the vocabulary marks tokens that may begin a code point which the two read differently, control tokens, and NUL; one lookup
per token finds the documents that the reference has to encode (data_prep.token_table).
"""

from __future__ import annotations

import itertools
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from data_prep.blocks import Block
from data_prep.cuts import LONG_TEXT_CHARS, Cutter, SpaceCutter
from data_prep.gigatoken_engine import Engine
from data_prep.optional import need
from data_prep.small_reference import SmallReference
from data_prep.text_files import EMPTY, Reason, parse_line
from data_prep.token_table import TokenTable

PIECES_TOGETHER = 8
"""Of a long text: enough for the threads of a process, and no more of it in memory than needed."""
REFERENCE_CHARS = 4 << 20
"""Encoded by the reference in one call at most: its results take some 100 bytes a token."""
SMALL_CALLS = 64
"""Of the small reference (milliseconds each); then the whole one (a third of a second) is worth loading."""
MAX_STRETCH_CHARS = 8 << 20
"""A longer stretch without a place to cut (one word of 8 million letters) is quarantined: it would take hundreds of MB and minutes."""

Outcome = np.ndarray | Reason
"""Token ids of a document (uint32 [tokens]), or why it is none."""


@dataclass
class Encoded:
    """The documents of a block in order."""

    ids: np.ndarray
    """uint32 [tokens of all documents]"""
    counts: np.ndarray
    """int64 [documents]"""
    places: list[int]
    bad: list[tuple[int, Reason]]
    text_bytes: int
    """UTF-8 of all documents."""
    routed: Counter[str] = field(default_factory=Counter)
    """Documents that the reference encoded, by cause."""
    control_tokens: int = 0
    """Tokens that text spelled and that became control tokens."""


class Reference(Protocol):
    """The tokenizer that defines what is right."""

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text (integers [tokens]), nothing added before or after."""
        ...


class HuggingFaceReference:
    """The `tokenizers` library over a tokenizer.json; loaded when it is first asked."""

    def __init__(self, tokenizer_json: bytes, *, control_as_text: bool) -> None:
        self._json, self._control_as_text = tokenizer_json, control_as_text
        self._tokenizer: Any = None
        self._loading = threading.Lock()

    @property
    def tokenizer(self) -> Any:
        with self._loading:
            if self._tokenizer is None:
                import tokenizers

                loaded = tokenizers.Tokenizer.from_str(self._json.decode())
                loaded.no_truncation()
                loaded.no_padding()
                loaded.encode_special_tokens = self._control_as_text
                self._tokenizer = loaded
            return self._tokenizer

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        start = 0
        while start < len(texts):
            end, size = start, 0
            while end < len(texts) and (end == start or size + len(texts[end]) <= REFERENCE_CHARS):
                size += len(texts[end])
                end += 1
            encodings = self.tokenizer.encode_batch_fast(list(texts[start:end]), add_special_tokens=False)
            found += [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
            start = end
        return found


class SentencePieceReference:
    """The sentencepiece library over a .model; what text spells never becomes a control token there."""

    def __init__(self, path: str, threads: int) -> None:
        import sentencepiece

        self._processor, self._threads = sentencepiece.SentencePieceProcessor(model_file=path), threads

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(ids, dtype=np.uint32) for ids in self._processor.encode(list(texts), num_threads=self._threads)]


class Encoder(Protocol):
    """Encodes blocks; safe to use from several threads."""

    reads_lines: bool
    """Whether it takes JSON lines; otherwise blocks have to be read as text."""

    def encode(self, block: Block) -> Encoded: ...


class ReferenceEncoder:
    """Everything by the reference: for tokenizers that gigatoken cannot load or encodes differently."""

    reads_lines = False

    def __init__(self, reference: Reference, cutter: Cutter | SpaceCutter) -> None:
        self.reference, self.cutter = reference, cutter

    def encode(self, block: Block) -> Encoded:
        return _joined(block, self.outcomes([text for _, text, _ in block.extra], Counter()), Counter())

    def outcomes(self, texts: Sequence[str], routed: Counter[str]) -> list[Outcome]:
        return in_pieces(self.cutter, texts, self.reference.encode)


def in_pieces(
    cutter: Cutter | SpaceCutter, texts: Sequence[str], encode: Callable[[Sequence[str]], Sequence[np.ndarray]]
) -> list[Outcome]:
    """What `encode` gives for each text; long ones go through it cut, a few pieces at a time."""
    found: list[Outcome] = [EMPTY] * len(texts)
    short = [number for number, text in enumerate(texts) if len(text) <= LONG_TEXT_CHARS]
    for number, ids in zip(short, encode([texts[number] for number in short]), strict=True):
        found[number] = ids
    for number in sorted(set(range(len(texts))) - set(short)):
        found[number] = _long(cutter, texts[number], encode)
    return found


def _long(cutter: Cutter | SpaceCutter, text: str, encode: Callable[[Sequence[str]], Sequence[np.ndarray]]) -> Outcome:
    parts: list[np.ndarray] = []
    for pieces in itertools.batched(cutter.pieces(text), PIECES_TOGETHER):
        longest = max(map(len, pieces))
        if longest > MAX_STRETCH_CHARS:
            return Reason("stretch too long", f"{longest} characters without a place to cut, at most {MAX_STRETCH_CHARS}")
        parts += encode(pieces)
    return np.concatenate(parts)


class GigatokenEncoder:
    """gigatoken for all documents but those that it may encode differently from the reference."""

    def __init__(
        self,
        engine: Engine,
        table: TokenTable,
        reference: Reference,
        cutter: Cutter,
        text_key: str,
        normalizer: str | None = None,
        small: SmallReference | None = None,
    ) -> None:
        """`normalizer`: the Unicode form (NFC ...) that the tokenizer brings text to; text that has it already goes to gigatoken.

        `small` encodes short stretches until the whole reference is needed.
        """
        self.engine, self.table, self.reference, self.cutter = engine, table, reference, cutter
        self.text_key, self.normalizer, self._small = text_key, normalizer, small
        self._small_calls = 0
        self.reads_lines = normalizer is None

    def encode(self, block: Block) -> Encoded:
        routed: Counter[str] = Counter()
        extra = self.outcomes([text for _, text, _ in block.extra], routed)
        if not block.places:
            return _joined(block, extra, routed)
        assert block.buffer is not None
        block.buffer.seal(block.used)
        ids, counts = self.engine.encode_lines(block.buffer, self.text_key)
        if len(counts) != len(block.places):
            # A text that is no string, or JSON that gigatoken does not take: it dropped documents.
            return self._strictly(block, extra, routed)
        total, flagged = self.table.scan(ids, counts)
        empty = np.flatnonzero(counts == 0)
        if not (extra or len(flagged) or len(empty)):
            return Encoded(ids, counts, block.places, block.bad, total, routed)
        edits: list[_Edit] = [
            _Edit(before, 0, outcome, place) for (before, _, place), outcome in zip(block.extra, extra, strict=True)
        ]
        suspects = sorted({*flagged, *empty.tolist()})
        if suspects:
            starts = np.concatenate(([0], np.cumsum(counts)))
            texts, kept = [], []
            wanted = set(suspects)
            for number, line in enumerate(block.lines()):
                if number in wanted:
                    parsed = parse_line(line, self.text_key)
                    total -= self.table.bytes_of(ids[starts[number] : starts[number + 1]])
                    if isinstance(parsed, Reason):
                        edits.append(_Edit(number, 1, parsed, block.places[number]))
                    else:
                        texts.append(parsed.text)
                        kept.append(number)
                        total += _utf8_size(parsed.text)
                        routed[flagged.get(number, "no tokens")] += 1
            for number, outcome in zip(kept, self._exactly(texts), strict=True):
                edits.append(_Edit(number, 1, outcome, block.places[number]))
        return _spliced(
            block, ids, counts, edits, total + sum(_utf8_size(text) for _, text, _ in block.extra), routed, self.table
        )

    def outcomes(self, texts: Sequence[str], routed: Counter[str]) -> list[Outcome]:
        """What each text is encoded as."""
        if not texts:
            return []

        def encode(some: Sequence[str]) -> list[np.ndarray]:
            return self._encode_texts(some, routed)

        return in_pieces(self.cutter, texts, encode)

    def _encode_texts(self, texts: Sequence[str], routed: Counter[str]) -> list[np.ndarray]:
        found: dict[int, np.ndarray] = {}
        fast, slow = [], []
        for number, text in enumerate(texts):
            if self.normalizer and not text.isascii() and not unicodedata.is_normalized(self.normalizer, text):
                slow.append(number)
                routed["not normalized"] += 1
            else:
                fast.append(number)
        ids, counts = self.engine.encode_texts([texts[number] for number in fast])
        flagged = self.table.scan(ids, counts)[1]
        end = 0
        for position, number in enumerate(fast):
            begin, end = end, end + int(counts[position])
            if position in flagged:
                slow.append(number)
                routed[flagged[position]] += 1
            else:
                found[number] = ids[begin:end]
        found.update(zip(slow, self._exactly([texts[number] for number in slow]), strict=True))
        return [found[number] for number in range(len(texts))]

    def _exactly(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Documents that gigatoken may encode differently: the reference gets the stretches where it may, where cuts are exact."""
        if not texts:
            return []
        pieces: list[tuple[str, bool]] = []
        starts = []
        for text in texts:
            starts.append(len(pieces))
            spans = self.table.spans(text) if self.cutter.exact else []
            pieces += self.cutter.isolate(text, spans) if spans else [(text, True)]
        fast = [number for number, (_, slow) in enumerate(pieces) if not slow]
        slow = [number for number, (_, slow) in enumerate(pieces) if slow]
        ids, counts = self.engine.encode_texts([pieces[number][0] for number in fast])
        found = dict(zip(fast, np.split(ids, np.cumsum(counts)[:-1]) if fast else [], strict=True))
        found.update(zip(slow, self._by_reference([pieces[number][0] for number in slow]), strict=True))
        bounds = itertools.pairwise([*starts, len(pieces)])
        return [np.concatenate([found[number] for number in range(begin, end)]) for begin, end in bounds]

    def _by_reference(self, texts: Sequence[str]) -> list[np.ndarray]:
        if not texts:
            return []
        if self._small is not None and self._small_calls < SMALL_CALLS and self._small.takes(texts):
            self._small_calls += 1
            return self._small.encode(texts)
        return self.reference.encode(texts)

    def _strictly(self, block: Block, extra: list[Outcome], routed: Counter[str]) -> Encoded:
        """A block whose lines have to be parsed here."""
        given = iter(extra)
        places, texts, outcomes, bad = [], [], [], list(block.bad)
        pending: list[int] = []
        for place, document in block.texts():
            if isinstance(document, bytes):
                parsed = parse_line(document, self.text_key)
                if isinstance(parsed, Reason):
                    bad.append((place, parsed))
                    continue
                pending.append(len(outcomes))
                outcomes.append(EMPTY)
                texts.append(parsed.text)
            else:
                outcomes.append(next(given))
                texts.append(document)
            places.append(place)
        for number, outcome in zip(pending, self.outcomes([texts[n] for n in pending], routed), strict=True):
            outcomes[number] = outcome
        again = Block(extra=[(0, text, place) for text, place in zip(texts, places, strict=True)], bad=bad)
        return _joined(again, outcomes, routed, self.table)


@dataclass(frozen=True)
class _Edit:
    """Put `outcome` before document `index`, instead of the `dropped` (0 or 1) documents there."""

    index: int
    dropped: int
    outcome: Outcome
    place: int


def _utf8_size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _spliced(
    block: Block,
    ids: np.ndarray,
    counts: np.ndarray,
    edits: list[_Edit],
    text_bytes: int,
    routed: Counter[str],
    table: TokenTable,
) -> Encoded:
    """The documents of a block with `edits` made."""
    starts = np.concatenate(([0], np.cumsum(counts)))
    parts, lengths, places, bad, control = [], [], [], list(block.bad), 0
    position = 0
    for edit in sorted(edits, key=lambda e: (e.index, e.dropped)):
        parts.append(ids[starts[position] : starts[edit.index]])
        lengths.append(counts[position : edit.index])
        places += block.places[position : edit.index]
        position = edit.index + edit.dropped
        outcome = edit.outcome
        if isinstance(outcome, np.ndarray) and not len(outcome):
            outcome = Reason("no tokens", text="the text gives no tokens")
        if isinstance(outcome, Reason):
            bad.append((edit.place, outcome))
            if edit.dropped == 0:
                text_bytes -= sum(_utf8_size(text) for _, text, place in block.extra if place == edit.place)
            continue
        parts.append(outcome)
        lengths.append(np.array([len(outcome)]))
        places.append(edit.place)
        control += table.count_control(outcome)
    parts.append(ids[starts[position] :])
    lengths.append(counts[position:])
    places += block.places[position:]
    return Encoded(np.concatenate(parts), np.concatenate(lengths), places, bad, text_bytes, routed, control)


def _joined(block: Block, outcomes: list[Outcome], routed: Counter[str], table: TokenTable | None = None) -> Encoded:
    """A block that has only extra documents."""
    good: list[np.ndarray] = []
    places, bad, size, control = [], list(block.bad), 0, 0
    for (_, text, place), outcome in zip(block.extra, outcomes, strict=True):
        if isinstance(outcome, Reason):
            bad.append((place, outcome))
        elif not len(outcome):
            bad.append((place, Reason("no tokens", text="the text gives no tokens")))
        else:
            good.append(outcome)
            places.append(place)
            size += _utf8_size(text)
            control += table.count_control(outcome) if table else 0
    ids = good[0] if len(good) == 1 else np.concatenate(good or [np.zeros(0, np.uint32)])  # one is long: no copy of it
    return Encoded(ids, np.array([len(o) for o in good], np.int64), places, bad, size, routed, control)


def gigatoken_engine(tokenizer_json: bytes, memory_bytes: int) -> Engine | str:
    """gigatoken over this tokenizer.json, or why it cannot load it."""
    need("gigatoken.gigatoken_rs")
    try:
        return Engine(tokenizer_json, memory_bytes)
    except (ValueError, RuntimeError) as error:  # RuntimeError: a byte-level vocabulary that lacks bytes, as SmolLM2's
        return str(error).partition("\n")[0]
