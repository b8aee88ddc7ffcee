"""The form of a completion, apart from what it says: tags in order, a regular expression, a length."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, field_validator

from training.rewards.base import Options, Reward, Sample, Score


class FormatOptions(Options):
    """Options of `format`; it reads no reference."""

    pattern: str | None = None
    """Regular expression that the whole completion must match (`.` also matches line ends)."""
    tags: tuple[str, ...] = ()
    """Tags such as [think, answer]: each opened and closed exactly once, one behind the other, nothing but blanks around them."""
    max_characters: Annotated[int, Field(gt=0)] | None = None
    """A longer completion scores 0."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from None
        return value

    @field_validator("tags")
    @classmethod
    def _plain(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if bad := [tag for tag in value if not re.fullmatch(r"[A-Za-z][\w-]*", tag)]:
            raise ValueError(f"not a tag name: {bad[0]!r}")
        return value


class Format(Reward):
    """1 if the completion has the form that was asked for, else 0."""

    options_type = FormatOptions
    options: FormatOptions

    def score(self, sample: Sample) -> Score:
        text = sample.completion
        options = self.options
        if options.max_characters is not None and len(text) > options.max_characters:
            return Score(value=0.0, reason=f"{len(text)} characters, the limit is {options.max_characters}")
        for tag in options.tags:
            if text.count(f"<{tag}>") != 1 or text.count(f"</{tag}>") != 1:
                return Score(value=0.0, reason=f"<{tag}> must be opened and closed exactly once")
        if options.tags:
            order = r"\s*".join(f"<{tag}>.*?</{tag}>" for tag in options.tags)
            if not re.fullmatch(rf"\s*{order}\s*", text, re.DOTALL):
                return Score(value=0.0, reason=f"tags not in the order {', '.join(options.tags)}, or text around them")
        if options.pattern is not None and not re.fullmatch(options.pattern, text, re.DOTALL):
            return Score(value=0.0, reason="does not match the pattern")
        return Score(value=1.0, reason="has the form")
