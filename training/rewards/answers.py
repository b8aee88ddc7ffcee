"""The final answer inside a completion: the last \\boxed{...}, the last <answer> tag, or all of it."""

from __future__ import annotations

import re
from typing import Literal

Place = Literal["boxed", "tag", "boxed_or_tag", "any"]

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)


def boxed(text: str) -> list[str]:
    """Contents of every \\boxed{...} that is closed, in order; an outer box hides those inside it."""
    found = []
    position = 0
    while match := _BOXED.search(text, position):
        end = _closing_brace(text, match.end())
        if end is None:
            # Cut off inside the braces. What follows may still hold a whole one: a stray '\boxed{' early on must not hide the answer.
            position = match.end()
            continue
        found.append(text[match.end() : end].strip())
        position = end + 1
    return found


def _closing_brace(text: str, start: int) -> int | None:
    depth = 1
    position = start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 2  # \{ and \} are text
            continue
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return position
        position += 1
    return None


def tagged(text: str) -> list[str]:
    """Contents of every <answer>...</answer>, in order."""
    return [m.strip() for m in _TAG.findall(text)]


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
    end_of_tag = max((m.end() for m in _TAG.finditer(text)), default=-1)
    boxes_behind = boxed(text[end_of_tag:]) if end_of_tag >= 0 else boxed(text)
    if boxes_behind:
        return boxes_behind[-1]
    if end_of_tag >= 0:
        inside = tagged(text)[-1]
        boxes = boxed(inside)
        return boxes[-1] if boxes else inside
    if place == "any" and text.strip():
        return text.strip()
    return None
