"""What goes to which tokenizer: cuts that change nothing, differences that are found, choices that are kept."""

import json
import random
import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import cuts, encoder_choice, encoders, equality
from data_prep.cuts import Cutter, SpaceCutter
from data_prep.encoder_choice import choose, make_encoder
from data_prep.encoders import HuggingFaceReference, ReferenceEncoder, SentencePieceReference
from data_prep.errors import DataError
from data_prep.gigatoken_engine import Engine
from data_prep.small_reference import merge_array
from data_prep.text_files import Reason
from data_prep.token_table import CONTROL, NUL, SUSPECT, TokenTable
from data_prep.tokenizer_facts import facts
from tests.data_prep import tokenizing


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizing.byte_level(folder, 1200)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizing.byte_level(folder, 1200, pattern=None)
    return folder


def content(folder):
    return (folder / "tokenizer.json").read_bytes()


def encoder(folder, policy="as_ids"):
    return make_encoder(choose("huggingface", folder / "tokenizer.json", policy), "text", 2, 1 << 40)


# --- cuts ------------------------------------------------------------------------------------------------------------------------

stretches = st.lists(
    st.one_of(
        st.text(st.characters(codec="utf-8"), max_size=12),
        st.sampled_from(
            [
                "word",
                " word",
                "'s",
                "'",
                "n't",
                "12",
                "\n",
                "\n\n",
                "  ",
                "。",
                "中文",
                "é",
                "e\u0301",
                "A",
                "ABc",
                ".",
                "<|",
                tokenizing.EOD,
            ]
        ),
    ),
    max_size=60,
).map("".join)


@settings(deadline=None, max_examples=60)
@given(text=stretches, size=st.integers(1, 40), data=st.data())
def test_pieces_encoded_apart_are_the_whole(folder, gpt2, text, size, data):
    for one in (folder, gpt2):
        cutter = Cutter.of(json.loads(content(one)))
        assert cutter.exact
        reference = HuggingFaceReference(content(one), control_as_text=False)
        whole = reference.encode([text])[0].tolist()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuts, "LONG_TEXT_CHARS", size)
            pieces = list(cutter.pieces(text))
        assert "".join(pieces) == text
        assert [t for ids in reference.encode(pieces) for t in ids.tolist()] == whole
        ends = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
        spans = [(a, b) for a, b in zip(ends[::2], ends[1::2], strict=False) if a < b]
        isolated = cutter.isolate(text, spans)
        assert "".join(piece for piece, _ in isolated) == text
        assert [t for ids in reference.encode([piece for piece, _ in isolated]) for t in ids.tolist()] == whole
        position = 0
        for piece, marked in isolated:
            assert marked or not any(a < position + len(piece) and b > position for a, b in spans)
            position += len(piece)


def test_cuts_are_only_made_where_they_were_proven(folder):
    config = json.loads(content(folder))
    split = config["pre_tokenizer"]["pretokenizers"][0]
    for change in (
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split | {"pattern": {"Regex": "."}}]}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split | {"behavior": "MergedWithNext"}]}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "Metaspace"}},
        {"pre_tokenizer": None},
        {"model": {"type": "Unigram"}},
        {"added_tokens": [{"content": "x", "single_word": True}]},
    ):
        assert not Cutter.of(config | change).exact, change
        assert len(list(Cutter.of(config | change).pieces("a b " * 10**6))) == 1
    o200k = next(pattern for pattern in cuts.KNOWN_SPLITS if r"\p{Lu}" in pattern)
    tokenizers.pre_tokenizers.Split(tokenizers.Regex(o200k), "isolated")  # is a pattern


def test_a_long_document_is_cut_and_a_stretch_that_cannot_be_is_refused(folder, monkeypatch):
    monkeypatch.setattr(cuts, "LONG_TEXT_CHARS", 1000)
    monkeypatch.setattr(encoders, "LONG_TEXT_CHARS", 1000)
    monkeypatch.setattr(encoders, "MAX_STRETCH_CHARS", 5000)
    found = encoder(folder)
    rng = random.Random(1)
    long = "".join(rng.choice(["word ", "x", "12", "é", ". ", "\n", tokenizing.EOD, "\U000323b0"]) for _ in range(9000))
    texts = ["short", long, "y" * 6000, f"{tokenizing.EOD}{'z' * 6000}"]
    outcomes = found.outcomes(texts, Counter())
    expected = HuggingFaceReference(content(folder), control_as_text=False).encode(texts)
    assert [a.tolist() for a in outcomes[:2]] == [a.tolist() for a in expected[:2]]
    assert [isinstance(o, Reason) and o.kind for o in outcomes[2:]] == ["stretch too long"] * 2


# --- where the two differ --------------------------------------------------------------------------------------------------------


def test_every_code_point_is_encoded_as_the_reference_does(folder):
    """All 1,112,064, most of them many to a text; assigned ones also one by one between letters and digits."""
    found, reference = encoder(folder), HuggingFaceReference(content(folder), control_as_text=False)
    points = [p for p in range(1, 0x110000) if not 0xD800 <= p < 0xE000 and not (0x40000 <= p < 0xE0000 and p % 997)]
    texts = ["".join(f"{chr(p)}a1{chr(p)}" for p in points[n : n + 64]) for n in range(0, len(points), 64)]
    outcomes = found.outcomes(texts, routed := Counter())
    for outcome, expected in zip(outcomes, reference.encode(texts), strict=True):
        assert np.array_equal(outcome, expected)
    assert 100 < routed["code point"] < len(texts) - 1000


def test_differences_are_found_alone_and_in_company(folder):
    engine = Engine(content(folder), 1 << 40)

    class Differing(HuggingFaceReference):
        def encode(self, texts):
            return [
                ids if "\u03b1" not in text and "\u4e2d" not in text else ids[:-1]
                for ids, text in zip(super().encode(texts), texts, strict=True)
            ]

    reference = Differing(content(folder), control_as_text=False)
    points = np.array([0x61, 0x3B1, 0x3B2, *range(0x4E00, 0x4F00)], np.int32)
    assert equality.differing_points(engine, reference, points).tolist() == [0x3B1, 0x4E2D]
    assert (
        equality.differing_points(engine, HuggingFaceReference(content(folder), control_as_text=False), points).tolist() == []
    )


def test_a_tokenizer_that_gigatoken_encodes_differently_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for what, value, why in (
        ("differences", lambda *a: ["some text"], "1 test strings differently, the first: 'some text'"),
        ("differing_points", lambda e, r, points: points[: len(points) // 2], "code points differently"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(equality, what, value)
            choice = choose("huggingface", folder / "tokenizer.json", "as_ids")
        assert not choice.gigatoken
        assert why in choice.why_not
        assert isinstance(make_encoder(choice, "text", 1, 1 << 40), encoders.ReferenceEncoder)
        for file in (tmp_path / "quarry" / "tokenizers").iterdir():
            file.unlink()


def test_a_vocabulary_that_lacks_a_byte_goes_through_the_reference(folder):
    raw = json.loads(content(folder))
    byte_4 = chr(0x104)  # as GPT-2 writes it
    merges = [pair for pair in raw["model"]["merges"] if not any(byte_4 in part for part in pair)]
    raw["model"] |= {"vocab": {t: i for t, i in raw["model"]["vocab"].items() if byte_4 not in t}, "merges": merges}
    why = encoders.gigatoken_engine(json.dumps(raw).encode(), 1 << 40)
    assert isinstance(why, str)
    assert "no single-byte vocab entry for byte 0x04" in why
    assert "\n" not in why


def test_a_choice_is_found_out_once(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = choose("huggingface", folder / "tokenizer.json", "as_ids")
    assert first.gigatoken
    assert first.seconds > 0
    monkeypatch.setattr(equality, "differing_points", None)  # would not be callable
    again = choose("huggingface", folder / "tokenizer.json", "as_ids")
    assert (again.seconds, again.table, again.exact_cuts) == (0, first.table, True)
    assert choose("huggingface", folder / "tokenizer.json", "as_text").gigatoken  # another choice, the same code points
    for file in (tmp_path / "quarry" / "tokenizers").glob("*.json"):
        file.write_text("{")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert choose("huggingface", folder / "tokenizer.json", "as_ids").gigatoken


def test_a_post_processor_that_depends_on_the_text_is_refused(folder, monkeypatch):
    class Encoding:
        def __init__(self, ids):
            self.ids = ids

    class Tokenizer:
        def encode(self, text, add_special_tokens):
            return Encoding([len(text), 7, *([len(text)] if add_special_tokens else [])])

    reference = HuggingFaceReference(b"", control_as_text=False)
    monkeypatch.setattr(reference, "_tokenizer", Tokenizer())
    with pytest.raises(DataError, match="adds other tokens to each text"):
        encoder_choice._affixes(reference)
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text, add_special_tokens: Encoding([8 if add_special_tokens else 7]))
    with pytest.raises(DataError, match="changes the tokens of 'a'"):
        encoder_choice._affixes(reference)


# --- the table -------------------------------------------------------------------------------------------------------------------


def test_the_table_finds_documents_by_their_tokens():
    vocab = {n: bytes([n]) for n in range(256)} | {
        256: b"\xf0\x9f",
        257: b"\x98\x80x",
        258: b"<end>",
        259: b"ab" * 150,
        260: b"\xcd\xb8",
    }
    table = TokenTable.build(vocab, [258], np.array([0x378, 0x1F601], np.int32))
    assert table.kinds[0] == NUL
    assert table.kinds[258] == CONTROL
    assert [n for n in range(261) if table.kinds[n] & SUSPECT] == [0xCD, 0xF0, 256, 260]
    documents = [
        [97, 98],
        [256, 257],  # U+1F600 x: begins like U+1F601
        [256, 0x98, 0x81],
        [0xF0, 0x9F, 0x98, 0x81],
        [0xCD, 0xB8],
        [0xCD, 0xB9],
        [97, 260],
        [258, 97],
        [97, 0],
        [259],
    ]
    ids, counts = np.array([t for d in documents for t in d], np.uint32), np.array([len(d) for d in documents])
    total, flagged = table.scan(ids, counts)
    assert total == sum(len(vocab[t]) for d in documents for t in d)
    assert flagged == {
        2: "code point",
        3: "code point",
        4: "code point",
        6: "code point",
        7: "control token",
        8: "NUL character",
    }
    assert table.spans("a<end>\u0378<end>") == [(1, 6), (6, 7), (7, 12)]
    assert table.count_control(ids) == 1
    assert table.scan(ids[:0], counts[:0]) == (0, {})


# --- the small reference ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(texts=st.lists(stretches, min_size=1, max_size=4), policy=st.sampled_from(["as_ids", "as_text"]))
def test_the_small_reference_is_the_reference(folder, gpt2, texts, policy):
    for one in (folder, gpt2):
        small = encoder(one, policy)._small
        whole = HuggingFaceReference(content(one), control_as_text=policy == "as_text")
        assert [ids.tolist() for ids in small.encode(texts)] == [ids.tolist() for ids in whole.encode(texts)]


def test_the_whole_reference_is_loaded_for_long_or_many_stretches(folder, monkeypatch):
    found = encoder(folder)
    found.outcomes([tokenizing.EOD], Counter())
    assert found.reference._tokenizer is None
    monkeypatch.setattr(encoders, "SMALL_CALLS", 1)
    found.outcomes([tokenizing.EOD], Counter())
    assert found.reference._tokenizer is not None
    assert not found._small.takes(["a" * 3000])


@pytest.mark.parametrize(
    "change",
    [{"dropout": 0.1}, {"ignore_merges": True}, {"end_of_word_suffix": "</w>"}, {"merges": ["a nothing"]}, {"type": "Unigram"}],
)
def test_there_is_no_small_reference_of_other_kinds(folder, change):
    config = json.loads(content(folder))
    assert len(merge_array(config)) > 500
    assert merge_array(config | {"model": config["model"] | change}) is None
    assert merge_array(config | {"normalizer": {"type": "NFC"}}) is None


# --- memory ----------------------------------------------------------------------------------------------------------------------

GROW = """
import random, resource, sys
from pathlib import Path
from data_prep import gigatoken_engine
rng, letters = random.Random(1), "abcdefghijklmnopqrstuvwxyz"
gigatoken_engine.MIN_GROWTH_BYTES = int(sys.argv[2]) << 20
engine = gigatoken_engine.Engine(Path(sys.argv[1]).read_bytes(), 0)
before, tokens = gigatoken_engine.rss_bytes(), 0
for _ in range(24):  # of half a million letters
    words = "".join(rng.choices(letters, k=500_000))
    ids, counts = engine.encode_texts([" ".join(words[n : n + 8] for n in range(0, len(words), 8))])
    tokens += int(ids.sum())
print(engine.renewals, (gigatoken_engine.rss_bytes() - before) >> 20, tokens)
"""


def test_memory_stays_bounded_on_random_words_and_nothing_else_changes(folder):
    """12 MB of words that never come again; the cache of words would take 140 MB."""

    def grow(limit_mb):
        done = subprocess.run(
            [sys.executable, "-c", GROW, str(folder / "tokenizer.json"), str(limit_mb)],
            capture_output=True,
            text=True,
            check=True,
        )
        return map(int, done.stdout.split())

    renewals, growth, tokens = grow(30)
    free_renewals, free_growth, free_tokens = grow(100_000)
    assert tokens == free_tokens
    assert free_renewals == 0
    assert renewals >= 2
    assert growth < 70 < free_growth


def test_no_reference_outlives_a_call(folder, monkeypatch):
    """A moment is enough for another thread to load the next tokenizer beside the old one: twice the memory."""
    engine = Engine(content(folder), 1 << 40)
    left = []

    class Watched(threading.Condition):
        def notify_all(self):
            left.append(sys.getrefcount(engine._tokenizer))
            super().notify_all()

    alone = sys.getrefcount(engine._tokenizer)
    monkeypatch.setattr(engine, "_change", Watched())
    engine.encode_texts(["some words"])
    assert left == [alone]


def test_calls_under_way_end_before_the_tokenizer_is_loaded_anew(folder, monkeypatch):
    monkeypatch.setattr("data_prep.gigatoken_engine.MIN_GROWTH_BYTES", -(1 << 40))  # always
    engine = Engine(content(folder), 0)
    expected = Engine(content(folder), 1 << 40).encode_texts(["some words"])[0].tolist()
    results = []
    threads = [
        threading.Thread(
            target=lambda: results.extend(engine.encode_texts(["some words"])[0].tolist() == expected for _ in range(5))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 20
    assert engine.renewals == 20
    assert "awkward" not in sys.modules or hasattr(sys.modules["awkward"], "__version__")


# --- facts -----------------------------------------------------------------------------------------------------------------------


def test_plain_folders_need_no_transformers_and_others_ask_it(folder, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls, original = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: calls.append(a) or original(*a, **k))
    plain = facts(folder)
    assert (plain.path, plain.vocab_size, calls) == (folder / "tokenizer.json", 1200, [])
    assert facts(folder / "tokenizer.json") == plain
    shutil.copytree(folder, tmp_path / "other")
    config = tmp_path / "other" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"bos_token": "<|new|>"}))
    other = facts(tmp_path / "other")
    assert len(calls) == 1
    assert other.vocab_size == 1201  # transformers adds the token that tokenizer.json lacks
    assert other.eod_id == plain.eod_id
    assert other.path.is_relative_to(tmp_path / "cache")
    assert facts(tmp_path / "other") == other
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["missing", "missing.model", "folder"])
def test_what_is_no_tokenizer_is_refused(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="no such"):
        facts(tmp_path / name)


def test_a_tokenizer_that_nothing_can_load_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="transformers cannot load the tokenizer"):
        facts(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="tokenizer.json: not JSON"):
        facts(tmp_path)
    with pytest.raises(DataError, match="not a tokenizer of the `tokenizers` library"):
        choose("huggingface", _written(tmp_path / "x.json", '{"model": {}}'), "as_ids")


def _written(path, text):
    path.write_text(text)
    return path


def test_without_the_extra_packages_the_remedy_is_said(monkeypatch):
    from data_prep.optional import need

    assert need("json") is json
    with pytest.raises(DataError, match=r"the package 'no_such_package' is not installed.*pip install 'quarry\[data\]'"):
        need("no_such_package.part")
    assert encoder_choice.versions()["gigatoken"] != "none"


# --- cuts of SentencePiece -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentencepiece_models(tmp_path_factory):
    """(add_dummy_prefix, remove_extra_whitespaces, normalization) -> path of a small BPE model."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    found = {}
    for prefix, remove, rule in (
        (False, False, "identity"),
        (True, False, "identity"),
        (True, True, "nmt_nfkc"),
        (False, True, "nfkc"),
    ):
        name = folder / f"{prefix}{remove}{rule}"
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(tokenizing.texts(2, 150)), model_prefix=str(name), model_type="bpe", vocab_size=1000,
            character_coverage=0.98, byte_fallback=True, normalization_rule_name=rule, add_dummy_prefix=prefix, remove_extra_whitespaces=remove,
            user_defined_symbols=["1 a", "<x>"] if rule == "nfkc" else ["<x>"], hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
        found[prefix, remove, rule] = name.with_suffix(name.suffix + ".model")
    return found


@settings(deadline=None, max_examples=60)
@given(text=stretches, size=st.integers(1, 20))
def test_sentencepiece_of_pieces_is_that_of_the_whole(sentencepiece_models, text, size):
    for (prefix, remove, _), path in sentencepiece_models.items():
        cutter = SpaceCutter.of(path.read_bytes())
        assert cutter.exact == (prefix or not remove)
        reference = SentencePieceReference(str(path), 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuts, "LONG_TEXT_CHARS", size)
            pieces = list(cutter.pieces(text))
        assert ("" if cutter.keeps_space else " ").join(pieces) == text
        assert [t for ids in reference.encode(pieces) for t in ids.tolist()] == reference.encode([text])[0].tolist()


def test_sentencepiece_is_cut_only_where_no_piece_reaches_over_a_space(sentencepiece_models):
    from sentencepiece import sentencepiece_model_pb2

    path = sentencepiece_models[True, False, "identity"]
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    assert SpaceCutter.of(model.SerializeToString()).exact

    def changed(change):
        other = sentencepiece_model_pb2.ModelProto()
        other.CopyFrom(model)
        change(other)
        return SpaceCutter.of(other.SerializeToString())

    for change in (
        lambda m: setattr(m.trainer_spec, "model_type", sentencepiece_model_pb2.TrainerSpec.UNIGRAM),
        lambda m: setattr(m.pieces[300], "piece", "a\u2581b"),
        lambda m: setattr(m.pieces[300], "piece", "a\u2581"),
        lambda m: setattr(m.pieces[300], "piece", "a b"),
        lambda m: setattr(m.normalizer_spec, "name", "user_defined"),
        lambda m: setattr(m.normalizer_spec, "escape_whitespaces", False),
    ):
        cutter = changed(change)
        assert not cutter.exact
        assert len(list(cutter.pieces("a b " * 10**6))) == 1


def test_what_cannot_be_cut_is_bounded(sentencepiece_models, monkeypatch):
    """A text of any length would take any memory."""
    encoder = ReferenceEncoder(
        SentencePieceReference(str(sentencepiece_models[False, True, "nfkc"]), 1),
        SpaceCutter.of(sentencepiece_models[False, True, "nfkc"].read_bytes()),
    )
    monkeypatch.setattr(cuts, "LONG_TEXT_CHARS", 10)
    monkeypatch.setattr(encoders, "LONG_TEXT_CHARS", 10)
    monkeypatch.setattr(encoders, "MAX_STRETCH_CHARS", 20)
    short, long, too_long = encoder.outcomes(["a b", "a b c d e f g", "a b c d e f g h i j k"], Counter())
    assert [short.tolist(), long.tolist()] == [ids.tolist() for ids in encoder.reference.encode(["a b", "a b c d e f g"])]
    assert too_long.kind == "stretch too long"
