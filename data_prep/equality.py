"""Where gigatoken and the reference tokenizer differ, found by asking both: every code point, added tokens, awkward strings, a sample."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data_prep.encoders import GigatokenEncoder, Reference
from data_prep.gigatoken_engine import Engine

CONTEXTS = (
    "{c}",
    "a{c}b",
    "A{c}b",
    "a{c}B",
    "1{c}234",
    "12{c}3",
    " {c}x",
    "  {c} ",
    ".{c}.",
    "{c}\n",
    "'{c}s",
    "{c}'s",
    "{c}{c}{c}{c}",
)
"""Around a code point: enough to tell letter, case, number, mark, space and symbol apart in the split patterns that are in use."""
LETTER_CONTEXTS = ("a{c}b1{c}234 {c}",)
"""Enough for the 127,000 letters without case (Lo, most of them CJK): is it no letter, a number, a mark or a space, this shows it."""
TOGETHER = 128
"""Code points compared in one text; only where a text differs are they compared one by one."""
UNASSIGNED = ("Cn",)
PRIVATE_PLANES = 0xF0000
"""Planes 15 and 16 hold nothing but private use: text of no known meaning, and half of all code points to compare."""
SURROGATES = range(0xD800, 0xE000)
FRAGMENTS = (
    " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u200b", "\u2028", "\x85", "\x0b", "\x1c", "'s", "'S",
    "'ll", "'Re", "’s", "''", "a", "A", "the", "The", "THE", "xYz", "0", "12", "345", "6789012", "½", "²", "٣", "Ⅷ", "é", "e\u0301",
    "ß", "ſ", "İ", "ı", "ǅ", "ñ", "я", "Ж", "中文", "日本語", "ひらがな", "한국어", "ไทย", "हिन्दी", "العربية", "עברית", "\u0301", "\u20e3",
    "😀", "👩\u200d💻", "🇩🇪", "\ufe0f", ".", "...", "!?", "(", ")[", "{}", "//", "/*", "#", "@", "_", "__init__", "-", "—", "=", "==", "+=",
    "\\n", "\\", '"', "`", "~", "^", "$", "%", "&", "|", "<", ">", "<|", "|>", "<s>", "</s>", "ﬁ", "①", "ª", "\ufeff", "\u202e",
    "Å", "\u212b", "\u1e9b\u0323",
)  # fmt: skip
AWKWARD_TEXTS = 400
Differences = list[str]


def assigned_points() -> tuple[np.ndarray, np.ndarray]:
    """(code points to compare, those that always go to the reference: unassigned here or in private planes), both int32, sorted."""
    categories = np.array([unicodedata.category(chr(point)) in UNASSIGNED for point in range(PRIVATE_PLANES)])
    points = np.arange(PRIVATE_PLANES, dtype=np.int32)
    categories[SURROGATES.start : SURROGATES.stop] = False
    compared = ~categories
    compared[SURROGATES.start : SURROGATES.stop] = False
    rest = np.arange(PRIVATE_PLANES, 0x110000, dtype=np.int32)
    return points[compared], np.concatenate((points[categories], rest))


def differing_points(engine: Engine, reference: Reference, points: np.ndarray) -> np.ndarray:
    """Of `points` (int32), those that the two encode differently in some context."""
    found: list[int] = []
    groups = [points[start : start + TOGETHER].tolist() for start in range(0, len(points), TOGETHER)]
    for start in range(0, len(groups), 256):  # some MB of text at a time
        part = groups[start : start + 256]
        unequal = _unequal(engine, reference, ["\n".join(map(_in_context, group)) for group in part])
        suspects = [point for number in unequal for point in part[number]]
        found += [suspects[number] for number in _unequal(engine, reference, [_in_context(point) for point in suspects])]
        if unequal and not found:
            found += suspects  # they differ together and not alone: all of them are suspect
    return np.array(sorted(found), dtype=np.int32)


def _in_context(point: int) -> str:
    character = chr(point)
    contexts = LETTER_CONTEXTS if unicodedata.category(character) == "Lo" else CONTEXTS
    return "\n".join(context.replace("{c}", character) for context in contexts)


def _unequal(engine: Engine, reference: Reference, texts: Sequence[str]) -> list[int]:
    if not texts:
        return []
    ids, counts = engine.encode_texts(texts)
    ends = np.cumsum(counts)
    expected = reference.encode(texts)
    return [
        number
        for number, right in enumerate(expected)
        if not np.array_equal(ids[ends[number] - counts[number] : ends[number]], right)
    ]


def awkward_texts(added: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Strings that tokenizers are known to read differently: white space, contractions, marks, added tokens in every neighbourhood."""
    rng = random.Random(0)
    fragments = [*FRAGMENTS, *(token["content"] for token in added[:64])]
    for _ in range(AWKWARD_TEXTS):
        yield "".join(rng.choice(fragments) for _ in range(rng.randint(1, 60)))
    for token in added:
        content = token["content"]
        yield from (
            content,
            f"a{content}b",
            f" {content} ",
            f"\n{content}\n",
            f"{content}{content}",
            f"1{content}2",
            f".{content},",
            content[:-1],
            f"x{content.upper()}",
        )


def differences(encoder: GigatokenEncoder, texts: Sequence[str]) -> Differences:
    """Beginnings of the texts that `encoder` (with all that it sends to the reference) does not encode as the reference does."""
    from collections import Counter

    texts = [text for text in texts if text and "\0" not in text]
    outcomes = encoder.outcomes(texts, Counter())
    expected = encoder.reference.encode(texts)
    return [
        text[:60]
        for text, outcome, right in zip(texts, outcomes, expected, strict=True)
        if not (isinstance(outcome, np.ndarray) and np.array_equal(outcome, right))
    ]
