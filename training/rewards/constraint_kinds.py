"""Instructions that a program can check, each with typed arguments. After IFEval (Zhou et al. 2023, arXiv 2311.07911), written anew.

Counts are given as `at_least` and/or `at_most`. Words are runs of letters, digits and apostrophes; keywords match whole words,
whatever their case.
"""

from __future__ import annotations

import functools
import operator
import re
from abc import abstractmethod
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from training.rewards.base import need

NonEmpty = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=0)]
_WORD = re.compile(r"\w+(?:['’]\w+)*")
# Possessive, and never begun inside of a run: a thousand points cost a thousand steps and not a million.
_SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’)\]]*+(?=\s|$)|[。！？]++[”’」』）]*+")
# A point behind these ends no sentence, nor does one behind a single capital ("J. S. Bach").
_ABBREVIATIONS = frozenset(
    ["mr", "mrs", "ms", "dr", "prof", "st", "vs", "etc", "e.g", "i.e", "inc", "ltd", "jr", "sr", "no", "fig", "al"]
)


class Constraint(BaseModel):
    """One instruction. `met` sees the completion as it is; the reward tries loosened variants of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: str

    @abstractmethod
    def met(self, text: str) -> bool:
        """Whether `text` follows the instruction."""


class _Bounded(Constraint):
    at_least: Count | None = None
    at_most: Count | None = None

    @model_validator(mode="after")
    def _some_bound(self) -> Any:
        if self.at_least is None and self.at_most is None:
            raise ValueError("give at_least, at_most or both")
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(f"at_least {self.at_least} is above at_most {self.at_most}")
        return self

    @abstractmethod
    def count(self, text: str) -> int:
        """What is counted."""

    def met(self, text: str) -> bool:
        number = self.count(text)
        return (self.at_least is None or number >= self.at_least) and (self.at_most is None or number <= self.at_most)


def words(text: str) -> list[str]:
    return _WORD.findall(text)


def occurrences(keyword: str, text: str) -> int:
    """How often a keyword or phrase stands in the text as whole words, whatever its case."""
    return len(re.findall(rf"(?<!\w){re.escape(keyword)}(?!\w)", text, re.IGNORECASE))


def sentences(text: str) -> int:
    """Number of sentences: ends marked by . ! ? and their full-width forms, abbreviations and initials aside; an unmarked rest is one."""
    count = 0
    start = 0
    for match in _SENTENCE_END.finditer(text):
        before = text[max(start, match.start() - 40) : match.start()].split()  # the last word is enough
        last = before[-1].lower().lstrip("(\"'“‘") if before else ""
        initial = len(last) == 1 and before[-1][-1].isupper() and match.group() == "." and last != "i"
        if match.group() == "." and (last in _ABBREVIATIONS or initial):
            continue
        if _WORD.search(text[start : match.end()]):
            count += 1
        start = match.end()
    return count + bool(_WORD.search(text[start:]))


def is_lowered(text: str) -> bool:
    return text == text.lower() and any(c.isalpha() for c in text)


def is_raised(text: str) -> bool:
    return text == text.upper() and any(c.isalpha() for c in text)


class Keywords(Constraint):
    """All of these words or phrases appear."""

    kind: Literal["keywords"]
    words: Annotated[tuple[NonEmpty, ...], Field(min_length=1)]

    def met(self, text: str) -> bool:
        return all(occurrences(word, text) for word in self.words)


class ForbiddenWords(Constraint):
    """None of these words or phrases appears."""

    kind: Literal["forbidden_words"]
    words: Annotated[tuple[NonEmpty, ...], Field(min_length=1)]

    def met(self, text: str) -> bool:
        return not any(occurrences(word, text) for word in self.words)


class KeywordCount(_Bounded):
    """A word or phrase appears so often."""

    kind: Literal["keyword_count"]
    word: NonEmpty

    def count(self, text: str) -> int:
        return occurrences(self.word, text)


class LetterCount(_Bounded):
    """A letter appears so often, whatever its case."""

    kind: Literal["letter_count"]
    letter: Annotated[str, Field(min_length=1, max_length=1)]

    def count(self, text: str) -> int:
        return text.lower().count(self.letter.lower())


class Words(_Bounded):
    """Number of words."""

    kind: Literal["words"]

    def count(self, text: str) -> int:
        return len(words(text))


class Characters(_Bounded):
    """Number of characters, blanks at both ends aside."""

    kind: Literal["characters"]

    def count(self, text: str) -> int:
        return len(text.strip())


class Sentences(_Bounded):
    """Number of sentences."""

    kind: Literal["sentences"]

    def count(self, text: str) -> int:
        return sentences(text)


class Paragraphs(_Bounded):
    """Number of paragraphs: by blank lines, or by a line of *** between them."""

    kind: Literal["paragraphs"]
    separator: Literal["blank_line", "stars"] = "blank_line"

    def count(self, text: str) -> int:
        return len(split_paragraphs(text, self.separator))


class ParagraphStart(Constraint):
    """There are `paragraphs` paragraphs (by blank lines), and number `number` (from 1) begins with this word."""

    kind: Literal["paragraph_start"]
    paragraphs: Annotated[int, Field(ge=1)]
    number: Annotated[int, Field(ge=1)]
    word: NonEmpty

    @model_validator(mode="after")
    def _inside(self) -> ParagraphStart:
        if self.number > self.paragraphs:
            raise ValueError(f"number {self.number} is above paragraphs {self.paragraphs}")
        return self

    def met(self, text: str) -> bool:
        found = split_paragraphs(text, "blank_line")
        if len(found) != self.paragraphs:
            return False
        first = words(found[self.number - 1])
        return bool(first) and first[0].lower() == self.word.lower()


def split_paragraphs(text: str, separator: Literal["blank_line", "stars"]) -> list[str]:
    pattern = r"\n\s*\n" if separator == "blank_line" else r"(?<!\*)\*\*\*(?!\*)"
    return [part for part in re.split(pattern, text.strip()) if part.strip()]


class Placeholders(_Bounded):
    """Number of [placeholders] in square brackets."""

    kind: Literal["placeholders"]

    def count(self, text: str) -> int:
        return len(re.findall(r"\[[^\[\]\n]+\]", text))


class Postscript(Constraint):
    """A line near the end begins with this marker, such as P.S."""

    kind: Literal["postscript"]
    marker: NonEmpty = "P.S."

    def met(self, text: str) -> bool:
        # Blanks inside the marker are free: "P. P. S" is P.P.S.
        pattern = r"\s?".join(re.escape(c) for c in self.marker if not c.isspace())
        return re.search(rf"^[^\S\n]*{pattern}\s*\S", text, re.MULTILINE | re.IGNORECASE) is not None


class Bullets(_Bounded):
    """Number of Markdown bullet points: lines that begin with * or -."""

    kind: Literal["bullets"]

    def count(self, text: str) -> int:
        return len(re.findall(r"^[^\S\n]*(?:\*(?!\*)|-(?!-))[^\S\n]*\S", text, re.MULTILINE))


class NumberedItems(_Bounded):
    """Number of lines that begin with a number and a point or bracket; the numbers must count up from 1."""

    kind: Literal["numbered_items"]

    def count(self, text: str) -> int:
        numbers = [int(n) for n in re.findall(r"^[^\S\n]*(\d{1,6})[.)][^\S\n]+\S", text, re.MULTILINE)]
        return len(numbers) if numbers == list(range(1, len(numbers) + 1)) else 0


class Highlights(_Bounded):
    """Number of *highlighted* or **highlighted** passages."""

    kind: Literal["highlights"]

    def count(self, text: str) -> int:
        doubles = re.findall(r"\*\*([^\n*]*)\*\*", text)
        singles = re.findall(r"\*([^\n*]*)\*", re.sub(r"\*\*[^\n*]*\*\*", " ", text))
        return sum(bool(passage.strip()) for passage in doubles + singles)


class Sections(_Bounded):
    """Number of sections that begin with this word and a number, such as Section 1."""

    kind: Literal["sections"]
    marker: NonEmpty = "Section"

    def count(self, text: str) -> int:
        return len(re.findall(rf"(?<!\w){re.escape(self.marker)}\s?\d+", text))


class Title(Constraint):
    """A title in double angular brackets: <<title>>."""

    kind: Literal["title"]

    def met(self, text: str) -> bool:
        for line in text.splitlines():
            begin, end = line.find("<<"), line.rfind(">>")
            if 0 <= begin < end and line[begin + 2 : end].strip(" <>"):
                return True
        return False


class JsonFormat(Constraint):
    """All of it is JSON; a Markdown fence around it is allowed."""

    kind: Literal["json"]

    def met(self, text: str) -> bool:
        from training.rewards.structured_output import strict_json, unfence

        inside = unfence(text)
        try:
            strict_json(text if inside is None else inside)
        except (ValueError, RecursionError):
            return False
        return True


class OneOf(Constraint):
    """It is one of these answers, blanks and a closing point aside."""

    kind: Literal["one_of"]
    answers: Annotated[tuple[NonEmpty, ...], Field(min_length=2)]

    def met(self, text: str) -> bool:
        return text.strip().rstrip(".").strip() in {answer.strip().rstrip(".").strip() for answer in self.answers}


class TwoResponses(Constraint):
    """Two different responses, separated by six asterisks."""

    kind: Literal["two_responses"]

    def met(self, text: str) -> bool:
        parts = [part.strip() for part in text.strip().split("******")]
        if parts and not parts[0]:
            parts = parts[1:]
        if parts and not parts[-1]:
            parts = parts[:-1]
        return len(parts) == 2 and all(parts) and parts[0] != parts[1]


class RepeatPrompt(Constraint):
    """It begins with the request, word for word, and goes on behind it.."""

    kind: Literal["repeat_prompt"]
    text: NonEmpty

    def met(self, text: str) -> bool:
        asked = self.text.strip().lower()
        said = text.strip().lower()
        return said.startswith(asked) and len(said) > len(asked)


class StartsWith(Constraint):
    """It begins with exactly this text, whatever the case."""

    kind: Literal["starts_with"]
    text: NonEmpty

    def met(self, text: str) -> bool:
        return text.strip().lower().startswith(self.text.strip().lower())


class EndsWith(Constraint):
    """It ends with exactly this text, whatever the case; nothing follows."""

    kind: Literal["ends_with"]
    text: NonEmpty

    def met(self, text: str) -> bool:
        return text.strip().strip('"').lower().endswith(self.text.strip().lower())


class Quoted(Constraint):
    """All of it stands in double quotation marks."""

    kind: Literal["quoted"]

    def met(self, text: str) -> bool:
        text = text.strip()
        return len(text) > 1 and text.startswith('"') and text.endswith('"')


class UpperCase(Constraint):
    """Capital letters only."""

    kind: Literal["upper_case"]

    def met(self, text: str) -> bool:
        return is_raised(text)


class LowerCase(Constraint):
    """No capital letter."""

    kind: Literal["lower_case"]

    def met(self, text: str) -> bool:
        return is_lowered(text)


class CapitalWords(_Bounded):
    """Number of words in capital letters."""

    kind: Literal["capital_words"]

    def count(self, text: str) -> int:
        return sum(word.isupper() for word in words(text))


class NoComma(Constraint):
    """No comma, of any script."""

    kind: Literal["no_comma"]

    def met(self, text: str) -> bool:
        return not any(comma in text for comma in ",，、،")


class NoDigits(Constraint):
    """No digit, of any script."""

    kind: Literal["no_digits"]

    def met(self, text: str) -> bool:
        return not any(c.isdigit() for c in text)


class LineLength(Constraint):
    """No line has more characters."""

    kind: Literal["line_length"]
    at_most: Annotated[int, Field(ge=1)]

    def met(self, text: str) -> bool:
        return all(len(line) <= self.at_most for line in text.splitlines())


class Language(Constraint):
    """All of it is in this language (ISO 639-1), by py3langid; of `among` only, where given."""

    kind: Literal["language"]
    code: Annotated[str, Field(pattern=r"^[a-z]{2}$")]
    among: tuple[Annotated[str, Field(pattern=r"^[a-z]{2}$")], ...] = ()

    @model_validator(mode="after")
    def _in_choice(self) -> Language:
        if self.among and self.code not in self.among:
            raise ValueError(f"code '{self.code}' is not among {', '.join(self.among)}")
        return self

    def met(self, text: str) -> bool:
        if not any(c.isalpha() for c in text):
            return False
        ranking = need("py3langid", "instructions").rank(text)
        return next((code for code, _ in ranking if not self.among or code in self.among), None) == self.code


# fmt: off
KINDS: tuple[type[Constraint], ...] = (
    Keywords, ForbiddenWords, KeywordCount, LetterCount, Words, Characters, Sentences, Paragraphs, ParagraphStart, Placeholders,
    Postscript, Bullets, NumberedItems, Highlights, Sections, Title, JsonFormat, OneOf, TwoResponses, RepeatPrompt, StartsWith,
    EndsWith, Quoted, UpperCase, LowerCase, CapitalWords, NoComma, NoDigits, LineLength, Language,
)
# fmt: on
CONSTRAINTS: TypeAdapter[list[Constraint]] = TypeAdapter(
    Annotated[list[Annotated[functools.reduce(operator.or_, KINDS), Field(discriminator="kind")]], Field(min_length=1)]
)
