"""The final answer inside a completion: the last \\boxed{...}, the last <answer> tag, or all of it."""

from __future__ import annotations

import re
from typing import Literal

Place = Literal["boxed", "tag", "boxed_or_tag", "any"]

# Each part is read once: a model that repeats '\\boxed{' ten thousand times must cost no more than one that does not.
# Escaped braces are text; a double backslash is a line break, except where somebody has escaped the \\boxed itself.
_PARTS = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\\\(?!boxed|fbox)|\\[{}]|(?P<open>\{)|(?P<close>\})")
_TAGS = re.compile(r"<(/?)answer>", re.IGNORECASE)


def boxed(text: str) -> list[str]:
    """Contents of every \\boxed{...} that is closed, in order; an outer box hides those inside it."""
    spans = []
    braces: list[int | None] = []  # of each open brace where its box's content begins, None for one that is no box's
    for part in _PARTS.finditer(text):
        if part["box"]:
            braces.append(part.end())
        elif part["open"]:
            braces.append(None)
        elif part["close"] and braces and (start := braces.pop()) is not None:
            spans.append((start, part.start()))
    outer: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if not outer or start > outer[-1][1]:
            outer.append((start, end))
    return [text[start:end].strip() for start, end in outer]


def tagged(text: str) -> list[str]:
    """Contents of every <answer>...</answer>, in order; a tag that is opened again before it is closed begins anew."""
    return [text[start:end].strip() for start, end in _tag_spans(text)]


def _tag_spans(text: str) -> list[tuple[int, int]]:
    spans = []
    start = None
    for tag in _TAGS.finditer(text):
        if not tag[1]:
            start = tag.end()
        elif start is not None:
            spans.append((start, tag.start()))
            start = None
    return spans


def final_answer(text: str, place: Place) -> str | None:
    """The answer that counts, or None where the completion has none at `place`.

    The last one wins: a model that corrects itself means its last word, and listing many guesses must not pay.
    `boxed_or_tag` takes whichever ends later in the text; a box inside the last tag is the answer. `any` falls back to the whole text.
    """
    if place == "tag":
        tags = tagged(text)
        return tags[-1] if tags else None
    if place == "boxed":
        boxes = boxed(text)
        return boxes[-1] if boxes else None
    spans = _tag_spans(text)
    boxes_behind = boxed(text[spans[-1][1] :] if spans else text)
    if boxes_behind:
        return boxes_behind[-1]
    if spans:
        inside = text[slice(*spans[-1])].strip()
        boxes = boxed(inside)
        return boxes[-1] if boxes else inside
    if place == "any" and text.strip():
        return text.strip()
    return None
