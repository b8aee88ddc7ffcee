"""Words, sentences and n-grams without models."""

import numpy as np
import pytest
from datatrove.utils.text import simplify_text, split_into_sentences, split_into_words
from hypothesis import given
from hypothesis import strategies as st

from data_prep.clean import words
from data_prep.clean.words import ngram_hashes, plain_words, sentence_spans, splitter, word_hashes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't stop, e-mail me!", ["Don't", "stop", ",", "e-mail", "me", "!"]),
        ("a+b == c ...", ["a", "+", "b", "==", "c", "..."]),
        ("naïve Ärger 3.14", ["naïve", "Ärger", "3", ".", "14"]),
        ("日本語です。", ["日", "本", "語", "で", "す", "。"]),
        ("한국어 단어", ["한국어", "단어"]),
        ("สวัสดี", list("สวัสดี")),
        ("", []),
    ],
)
def test_words(text, expected):
    assert words.words(text) == expected
    assert split_into_words(text, splitter()) == expected


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One. Two! Three?", 3),
        ("Version 3.14 is out. It is good", 2),
        ('He said "yes." Then he left.', 2),
        ("一つ。二つ。", 2),
        ("no end", 1),
        ("", 1),
    ],
)
def test_sentences(text, count):
    assert len(sentence_spans(text)) == count
    assert len(split_into_sentences(text, splitter())) == count


@given(st.text(alphabet="ab .!?。\n\"'", max_size=40))
def test_sentences_cover_the_text(text):
    spans = sentence_spans(text)
    assert "".join(text[a:b] for a, b in spans) == text
    assert [a for a, _ in spans[1:]] == [b for _, b in spans[:-1]]


@given(st.text(st.characters(max_codepoint=127), max_size=60) | st.text(max_size=40))
def test_plain_words_are_datatroves_normalisation(text):
    from datatrove.utils.text import TextNormConfig

    simple = simplify_text(text, TextNormConfig(norm_numbers=False))
    assert b"".join(plain_words(text)) == "".join(simple.split()).encode()
    if text.isascii():
        assert plain_words(text) == simple.encode().split()


def test_plain_words_of_text_without_spaces_are_its_characters():
    assert plain_words("東京 Tower、é") == ["東".encode(), "京".encode(), b"tower", b"e"]


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 14))
def test_ngram_hashes_are_equal_where_the_ngrams_are(letters, n):
    hashes = ngram_hashes(word_hashes(" ".join(letters)).exact, n)
    grams = [tuple(letters[i : i + n]) for i in range(len(letters) - n + 1)]
    assert len(hashes) == len(grams)
    assert {(a == b) for a, x in zip(grams, hashes, strict=True) for b, y in zip(grams, hashes, strict=True) if (x == y)} <= {
        True
    }
    assert len(set(hashes.tolist())) == len(set(grams))


def test_hashes_do_not_depend_on_what_was_hashed_before(monkeypatch):
    text = " ".join(f"word{i}" for i in range(300))
    before = word_hashes(text)
    monkeypatch.setattr(words, "VOCABULARY_WORDS", 10)
    for other in ("one two three", text, "four", text):
        again = word_hashes(other)
    assert (again.exact == before.exact).all()
    assert len(set(before.exact.tolist())) == 300
    assert len(set(before.number_blind.tolist())) == 1
    assert again.exact.dtype == np.uint64


def test_known_hashes():
    # Signatures and decontamination are kept on disk: another hash would not fit what lies there.
    hashes = word_hashes("Known words, 42!")
    assert [hex(h) for h in hashes.exact.tolist()] == ["0x64655861a3d40ab2", "0xf658e1aee31d49", "0x7a686626f03cb457"]
    assert hashes.number_blind.tolist()[:2] == hashes.exact.tolist()[:2]
    assert hashes.number_blind[2] == word_hashes("0").exact[0]
