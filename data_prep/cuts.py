"""Where a long text may be cut so that its pieces, encoded apart, give the tokens of the whole.

A tokenizer's memory grows with one text (tens of bytes a byte), and one thread encodes it. A byte-level BPE tokenizer splits text by a
regular expression before anything else; where no match of that expression can cross a position, and none looks behind itself, the
position is a cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

LONG_TEXT_CHARS = 1 << 20
"""A longer text is cut into pieces of about this size."""
KNOWN_SPLITS = frozenset(
    {
        # GPT-2, as its first version and as ByteLevel with use_regex write it
        r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
        r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
        # cl100k, Llama 3, Granite 4
        r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
        # o200k
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"""
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"""
        r"""\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
        # Qwen 2
        r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
    }
)
"""Patterns read with this in mind: no alternative goes on from a letter or digit to what CUT asks for behind it, none looks behind."""
CUT = re.compile(r"[^\W_](?=[ \t\r\n.,;:!?()\[\]{}<>/+=*&#@\"%$|\\~`^。，、！？；：])")
"""A letter or ASCII digit, and behind it a character that is no letter, mark, number or apostrophe (contractions begin with one)."""


SPACE = "\u2581"
"""What SentencePiece writes for a space."""
SPACE_CUT = re.compile(r"(?<=[A-Za-z0-9]) (?=[A-Za-z0-9])")
NORMALIZATIONS = ("identity", "nfkc", "nfkc_cf", "nmt_nfkc", "nmt_nfkc_cf")
"""None of their rules reaches over a space between two ASCII letters or digits."""


@dataclass(frozen=True)
class SpaceCutter:
    """Cuts long texts for one SentencePiece model: at single spaces between letters, where no piece reaches over a space.

    Byte-pair encoding merges neighbours in the order of scores; what no piece joins cannot influence each other.
    """

    exact: bool
    keeps_space: bool = True
    """Whether the space begins the piece behind it; otherwise the model puts one before every text that it gets."""

    @classmethod
    def of(cls, content: bytes) -> SpaceCutter:
        """For a .model."""
        from sentencepiece import sentencepiece_model_pb2

        model = sentencepiece_model_pb2.ModelProto()
        model.ParseFromString(content)
        normalizer, kinds = model.normalizer_spec, sentencepiece_model_pb2.ModelProto.SentencePiece
        in_text = [piece.piece for piece in model.pieces if piece.type in (kinds.NORMAL, kinds.USER_DEFINED, kinds.UNUSED)]
        exact = (
            model.trainer_spec.model_type == sentencepiece_model_pb2.TrainerSpec.BPE
            and normalizer.name in NORMALIZATIONS
            and normalizer.escape_whitespaces
            and (normalizer.add_dummy_prefix or not normalizer.remove_extra_whitespaces)
            and not any(SPACE in piece.lstrip(SPACE) or " " in piece for piece in in_text)
        )
        return cls(exact, not normalizer.add_dummy_prefix)

    def pieces(self, text: str) -> Iterator[str]:
        """`text` in pieces of about LONG_TEXT_CHARS; a stretch without a place to cut stays whole."""
        start = 0
        while self.exact and len(text) - start > LONG_TEXT_CHARS:
            cut = SPACE_CUT.search(text, start + LONG_TEXT_CHARS)
            if cut is None:
                break
            yield text[start : cut.start()]
            start = cut.start() if self.keeps_space else cut.end()
        yield text[start:]


@dataclass(frozen=True)
class Cutter:
    """Cuts long texts for one tokenizer."""

    exact: bool
    """Whether there is a way to cut at all; without one every text stays whole."""
    unbroken: tuple[str, ...] = ()
    """Added tokens that a cut could go through: they are taken out of the text before it is split."""

    @classmethod
    def of(cls, config: dict[str, Any]) -> Cutter:
        """For a tokenizer.json."""
        added = config.get("added_tokens") or []
        exact = _splits_by_known_patterns(config) and not any(token.get("single_word") for token in added)
        return cls(exact, tuple(token["content"] for token in added if CUT.search(token["content"])))

    def pieces(self, text: str) -> Iterator[str]:
        """`text` in pieces of about LONG_TEXT_CHARS; a stretch without a place to cut stays whole."""
        start = 0
        while self.exact and len(text) - start > LONG_TEXT_CHARS:
            end = self._next(text, start + LONG_TEXT_CHARS)
            if end is None:
                break
            yield text[start:end]
            start = end
        yield text[start:]

    def isolate(self, text: str, spans: Iterable[tuple[int, int]]) -> list[tuple[str, bool]]:
        """`text` in pieces, each with whether it holds one of `spans` (start, end; in order); they reach from cut to cut."""
        pieces: list[tuple[str, bool]] = []
        done = 0
        begin = end = 0
        for first, last in spans:
            if last <= end:
                continue
            start = max(self._last(text, done, first), done)
            if end and start <= end:  # goes on from the piece before
                start = begin
            elif end:
                pieces.append((text[begin:end], True))
                done = end
            stop = self._next(text, max(last - 1, 0))
            if start > done:
                pieces.append((text[done:start], False))
                done = start
            begin, end = start, len(text) if stop is None else stop
        if end:
            pieces.append((text[begin:end], True))
        if end < len(text):
            pieces.append((text[end:], False))
        return pieces

    def _last(self, text: str, floor: int, limit: int) -> int:
        """The last cut in (floor, limit], or floor."""
        reach = 256
        while True:
            low = max(floor, limit - reach)
            # One character beyond the limit, because a cut is told by the character behind it.
            found = [cut for cut in CUT.finditer(text, low, limit + 1) if cut.end() <= limit]
            end = next((cut.end() for cut in reversed(found) if self._is_cut(text, cut)), None)
            if end is not None or low == floor:
                return floor if end is None else end
            reach *= 8

    def _next(self, text: str, start: int) -> int | None:
        return next((cut.end() for cut in CUT.finditer(text, start) if self._is_cut(text, cut)), None)

    @cached_property
    def _beginnings(self) -> frozenset[str]:
        """First characters of the unbroken tokens: a hundred of them begin with one or two."""
        return frozenset(token[0] for token in self.unbroken)

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self.unbroken), default=0)

    def _is_cut(self, text: str, cut: re.Match[str]) -> bool:
        end = cut.end()
        if not (cut[0].isalpha() or cut[0] in "0123456789"):
            return False
        before = text[max(0, end - self._longest + 1) : end]
        if not any(character in before for character in self._beginnings):
            return True  # a token that the cut goes through begins before it
        return not any(token in text[max(0, end - len(token) + 1) : end + len(token) - 1] for token in self.unbroken)


def _splits_by_known_patterns(config: dict[str, Any]) -> bool:
    if config.get("normalizer") is not None or config["model"].get("type") != "BPE":
        return False
    before = config.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", []) if before.get("type") == "Sequence" else [before]
    splits = False
    for step in steps:
        kind = step.get("type")
        if kind == "Split":
            if step["pattern"].get("Regex") not in KNOWN_SPLITS or step["behavior"] != "Isolated" or step["invert"]:
                return False
            splits = True
        elif kind == "ByteLevel":
            if step.get("add_prefix_space"):
                return False
            splits = splits or step.get("use_regex", True)
        elif kind != "Digits":
            return False
    return splits
