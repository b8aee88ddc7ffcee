"""Texts of an exact number of tokens with one fact hidden at a chosen depth among others of its kind (a needle in a haystack).

    ... the language reference ...
    The access code of Lisbon is 48213.
    ... more of it ...
    The access code of Lisbon is            -> " 48213", or one of the distractors?

Half of the distractors, as far as `keys` goes, are codes that the same text gives to other names: a model that only remembers which numbers
it has seen does no better among those. All candidates have the same number of tokens, so that the sums of their log-probabilities compare.
The text around is the language reference that comes with Python, then its modules' documentation (data_prep.corpus.prose); the
smoke curriculum trains on parts of the same. The facts are random. Everything follows from the seed.

After Kamradt's needle in a haystack (2023) and the multi-key variant of RULER (Hsieh et al. 2024, arXiv 2404.06654, section 3), but it is
neither: no number of it compares with theirs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from training.evaluation.errors import EvaluationError
from training.evaluation.request import NeedleOptions

NEEDLE = "\nThe access code of {key} is {value}.\n"
QUESTION = "\nThe access code of {key} is"
KEYS = (
    "Lisbon", "Oslo", "Quito", "Nairobi", "Hanoi", "Zagreb", "Lima", "Cairo", "Dublin", "Tunis", "Athens", "Manila", "Berlin", "Havana",
    "Kyoto", "Prague", "Bogota", "Dakar", "Vienna", "Seoul", "Tallinn", "Ankara", "Riga", "Accra", "Warsaw", "Santiago", "Helsinki",
    "Rabat", "Bergen", "Geneva", "Toledo", "Naples",
)  # fmt: skip
DRAWS = 4000
"""Values that are tried for as many as are needed with one number of tokens; of five digits most tokenizers make few lengths."""

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Filler:
    """Tokens of text, int64 [n], and the positions after which a paragraph has ended, int64 [m], increasing, 0 and n included."""

    tokens: np.ndarray
    ends: np.ndarray

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.tokens.astype("<i8").tobytes()).hexdigest()


@dataclass(frozen=True)
class Case:
    prompt: np.ndarray
    """int64 [length - answer tokens]."""
    candidates: np.ndarray
    """int64 [choices, answer tokens]."""
    answer: int
    """Row of `candidates` that is right."""
    depth_percent: float
    """Tokens before the needle, of all tokens of filler."""


def make_filler(documents: Iterable[str], encode: Encode, tokens: int) -> Filler:
    """At least `tokens` tokens of `documents`, which begin again where they end too early (more context than text)."""
    have = 0
    kept: list[np.ndarray] = []
    for text in documents:
        for paragraph in text.split("\n\n"):
            ids = np.asarray(encode(paragraph + "\n\n"), dtype=np.int64)
            kept.append(ids)
            have += len(ids)
        if have >= tokens:
            break
    if have == 0:
        raise EvaluationError(
            "needle: there is no text to hide anything in; reinstall Python with its documentation (pydoc_data)"
        )
    pieces = kept * -(-tokens // have)
    return Filler(np.concatenate(pieces), np.cumsum([0, *(len(p) for p in pieces)]))


def make_case(
    options: NeedleOptions, filler: Filler, encode: Encode, length_tokens: int, depth_percent: float, sample: int
) -> Case:
    """Sample number `sample` with the needle at `depth_percent` of the text: prompt and answer have exactly `length_tokens` tokens.

    Raises EvaluationError where the needles alone do not fit, or the tokenizer has not enough codes of one length.
    """
    # Of the cell's own numbers, not of its place in a list: a cell is the same whatever else is measured.
    rng = np.random.default_rng([options.seed, length_tokens, round(1000 * depth_percent), sample])
    names = [KEYS[i] for i in rng.permutation(len(KEYS))[: options.keys]]
    question = encode(QUESTION.format(key=names[0]))
    values, candidates = _values(rng, encode, QUESTION.format(key=names[0]), question, options.choices)
    seen = min(options.keys, options.choices)
    needles = [np.asarray(encode(NEEDLE.format(key=k, value=v)), np.int64) for k, v in zip(names, values[:seen], strict=False)]
    around = length_tokens - len(question) - candidates.shape[1] - sum(map(len, needles))
    if around < 0:
        raise EvaluationError(
            f"needle: {length_tokens} tokens are too few: {len(needles)} facts, question and answer take {length_tokens - around}; "
            "choose a greater length or fewer --needle-keys"
        )
    start = int(rng.integers(0, len(filler.tokens) - around + 1))
    text = filler.tokens[start : start + around]
    ends = filler.ends[(filler.ends >= start) & (filler.ends <= start + around)] - start
    ends = np.unique(np.concatenate([[0], ends, [around]]))
    wanted = [around * depth_percent / 100, *rng.uniform(0, around, len(needles) - 1)]
    places = [int(ends[np.argmin(np.abs(ends - w))]) for w in wanted]
    pieces, position = [], 0
    # At one place the asked needle comes first; which one it is says nothing, since names are drawn.
    for number in sorted(range(len(needles)), key=lambda n: (places[n], n)):
        pieces += [text[position : places[number]], needles[number]]
        position = places[number]
    prompt = np.concatenate([*pieces, text[position:], np.asarray(question, np.int64)])
    order = rng.permutation(options.choices)
    assert len(prompt) + candidates.shape[1] == length_tokens
    return Case(prompt, candidates[order], int(np.flatnonzero(order == 0)[0]), 100 * places[0] / around if around else 0.0)


def _values(
    rng: np.random.Generator, encode: Encode, stem: str, stem_ids: list[int], count: int
) -> tuple[list[int], np.ndarray]:
    """`count` codes whose tokens behind `stem` are equally many, and those tokens, int64 [count, n]."""
    by_length: dict[int, dict[tuple[int, ...], int]] = {}
    for value in rng.choice(90_000, size=DRAWS, replace=False) + 10_000:
        ids = encode(f"{stem} {value}")
        if ids[: len(stem_ids)] != stem_ids or len(ids) == len(stem_ids):
            raise EvaluationError(
                f"needle: the tokenizer splits {stem!r} otherwise when ' {value}' follows, so that answers cannot be compared; use a tokenizer "
                "that splits at blanks"
            )
        same = by_length.setdefault(len(ids) - len(stem_ids), {})
        same.setdefault(tuple(ids[len(stem_ids) :]), int(value))
        if len(same) == count:
            return list(same.values()), np.asarray(list(same), dtype=np.int64)
    raise EvaluationError(
        f"needle: of {DRAWS} codes of five digits no {count} have the same number of tokens (or are told apart); choose fewer --needle-choices"
    )
