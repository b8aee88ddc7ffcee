"""The needle test: exact lengths, chosen depths, candidates of one size; an oracle passes it and one who guesses gets chance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.evaluation import retrieval
from training.evaluation.errors import EvaluationError
from training.evaluation.needle import KEYS, NEEDLE, QUESTION, make_case, make_filler
from training.evaluation.request import NeedleOptions

TEXT = [f"paragraph {n} of a text\nwith a second line\n\n" + "and words " * (n % 5) for n in range(60)]


def encode(text: str) -> list[int]:
    """One token per byte: what a text says can be read back."""
    return list(text.encode())


def decode(ids: np.ndarray) -> str:
    return bytes(ids.tolist()).decode()


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(400, 3000),
    depth=st.floats(0, 100),
    keys=st.integers(1, 6),
    choices=st.integers(6, 12),
    seed=st.integers(0, 1000),
    sample=st.integers(0, 50),
)
def test_texts_have_their_length_and_hold_the_answer_once(
    length: int, depth: float, keys: int, choices: int, seed: int, sample: int
) -> None:
    options = NeedleOptions(keys=keys, choices=choices, seed=seed)
    filler = make_filler(TEXT, encode, length)
    case = make_case(options, filler, encode, length, depth, sample)
    assert len(case.prompt) + case.candidates.shape[1] == length
    assert case.candidates.shape[0] == choices
    assert len({tuple(c) for c in case.candidates}) == choices
    text = decode(case.prompt)
    answer = decode(case.candidates[case.answer]).strip()
    key = next(k for k in KEYS if text.endswith(QUESTION.format(key=k)))
    assert text.count(NEEDLE.format(key=key, value=answer)) == 1
    assert sum(text.count(decode(c).strip()) for c in case.candidates) == keys
    again = make_case(options, filler, encode, length, depth, sample)
    assert np.array_equal(case.prompt, again.prompt)
    assert np.array_equal(case.candidates, again.candidates)


@pytest.mark.parametrize("depth", [0.0, 25.0, 50.0, 75.0, 100.0])
def test_needles_lie_at_the_chosen_depth(depth: float) -> None:
    options = NeedleOptions()
    filler = make_filler(TEXT, encode, 4000)
    for sample in range(10):
        case = make_case(options, filler, encode, 4000, depth, sample)
        # A paragraph of TEXT has at most 60 of 4000 tokens.
        assert case.depth_percent == pytest.approx(depth, abs=2)
        text = decode(case.prompt)
        place = text.index(decode(case.candidates[case.answer]).strip())
        assert 100 * place / len(text) == pytest.approx(depth, abs=8)


def test_the_answer_is_at_every_position_among_the_candidates() -> None:
    filler = make_filler(TEXT, encode, 600)
    places = [make_case(NeedleOptions(), filler, encode, 600, 0, s).answer for s in range(200)]
    counts = np.bincount(places, minlength=8)
    assert counts.min() > 8


def test_text_begins_again_where_there_is_not_enough() -> None:
    filler = make_filler(["one\n\ntwo"], encode, 1000)
    assert len(filler.tokens) >= 1000
    assert filler.ends[-1] == len(filler.tokens)
    assert (np.diff(filler.ends) > 0).all()


def run(score: retrieval.Score, **options: object) -> dict:
    chosen = NeedleOptions(**{"lengths_tokens": [500], "depths_percent": [0, 50], "samples": 40, **options})
    return retrieval.run(chosen, 500, lambda: TEXT, encode, score)


def reads(prompt: np.ndarray, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An oracle that looks the answer up in the text."""
    text = decode(prompt)
    stem = text[text.rindex("\n") + 1 :]
    found = [f"{stem}{decode(c)}." in text for c in candidates]
    return np.where(found, -1.0, -9.0), candidates[found.index(True)]


def test_a_reader_finds_all_and_a_guesser_chance() -> None:
    best = run(reads)
    assert best["by_length"][0]["ranked_first"] == best["by_length"][0]["generated"] == 1
    assert best["by_length"][0]["ranked_first_stderr"] == 0
    assert best["by_length"][0]["margin_nats"] == 8
    rng = np.random.default_rng(0)
    guess = run(lambda p, c: (rng.normal(size=len(c)), c[0] * 0), samples=200)
    assert guess["by_length"][0]["count"] == 400
    assert guess["by_length"][0]["ranked_first"] == pytest.approx(guess["chance_ranked_first"], abs=0.06)
    assert guess["by_length"][0]["generated"] == 0


def test_one_who_only_knows_which_numbers_were_seen_does_not_pass() -> None:
    def seen(prompt: np.ndarray, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = np.array([decode(c).strip() in decode(prompt) for c in candidates])
        return found + 1e-3 * np.arange(len(candidates)), candidates[0]

    assert run(seen, samples=100)["by_length"][0]["ranked_first"] == pytest.approx(1 / 4, abs=0.08)


def test_equal_probabilities_are_no_retrieval_and_damaged_ones_are_refused() -> None:
    assert run(lambda p, c: (np.zeros(len(c)), c[0]))["by_length"][0]["ranked_first"] == 0
    with pytest.raises(EvaluationError, match="weights are damaged"):
        run(lambda p, c: (np.full(len(c), np.nan), c[0]))


def test_refusals_say_what_would_pass() -> None:
    filler = make_filler(TEXT, encode, 600)
    with pytest.raises(EvaluationError, match=r"100 tokens are too few: 4 facts, question and answer take \d+"):
        make_case(NeedleOptions(), filler, encode, 100, 0, 0)
    with pytest.raises(EvaluationError, match="beyond the model's 500 tokens"):
        retrieval.lengths_for(NeedleOptions(lengths_tokens=[100, 501]), 500)
    assert retrieval.lengths_for(NeedleOptions(), 500) == [250, 500]
    with pytest.raises(EvaluationError, match="no text to hide"):
        make_filler([], encode, 10)
    with pytest.raises(EvaluationError, match="splits .* otherwise"):
        make_case(NeedleOptions(), filler, lambda text: [len(text)], 600, 0, 0)
    with pytest.raises(EvaluationError, match="told apart"):
        make_case(NeedleOptions(), filler, lambda text: encode(text[:30]) + [1] * (len(text) > 30), 600, 0, 0)
    with pytest.raises(ValueError, match="keys is 9, more than the 8 choices"):
        NeedleOptions(keys=9)
    with pytest.raises(ValueError, match="names one value twice"):
        NeedleOptions(depths_percent=[5, 5])
