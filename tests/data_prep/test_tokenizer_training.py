"""Trained tokenizers: exactly the stated size, Granite's special tokens in their places, repeatable, lossless, equal in transformers."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.corpus import build
from data_prep.errors import DataError
from data_prep.files import file_sha256
from data_prep.special_tokens import END, FIM, GRANITE, PAD, ROLES, special_tokens
from data_prep.tokenizer import load_tokenizer, write_hf_tokenizer
from data_prep.tokenizer_training import sample, train

PARTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        [" ", "\n", "\r\n", "\t", "    ", "I'll", "DON'T", "1234567", "\0", "é", "e\u0301", "漢字", "\u2028", "Ġ", *GRANITE]
    ),
    st.tuples(st.sampled_from(" =-ab.0\n"), st.integers(1, 40)).map(lambda pair: pair[0] * pair[1]),
)
TEXTS = st.lists(PARTS, max_size=12).map("".join)


def test_granite_ids_come_out_as_published():
    names = special_tokens(100_352)
    ids = {name: 100_352 - len(names) + place for place, name in enumerate(names)}
    assert len(names) == len(set(names)) == 96
    assert ids[PAD] == 100_256
    assert ids[END] == 100_257
    assert [ids[name] for name in FIM] == [100_258, 100_259, 100_260, 100_261]
    assert [ids[name] for name in ROLES] == [100_264, 100_265]
    assert (ids["<tool_call>"], ids["</documents>"], ids["<|unused_69|>"]) == (100_270, 100_283, 100_351)


@pytest.mark.parametrize(
    ("size", "count"), [(400, 2), (1023, 2), (1024, 4), (2048, 4), (8191, 4), (8192, 28), (32_767, 28), (32_768, 96)]
)
def test_what_is_reserved_follows_the_size(size, count):
    assert len(special_tokens(size)) == count


def test_byte_level_vocabulary_is_exact_and_special_tokens_are_its_last(byte_level):
    assert byte_level.vocab_size == 9000
    assert byte_level.special_ids == {name: 9000 - 28 + place for place, name in enumerate(GRANITE)}
    assert byte_level.eod_id == byte_level.special_ids[END]


@settings(deadline=None, max_examples=300)
@given(text=TEXTS)
def test_byte_level_text_survives_and_holds_no_special_token(byte_level, text):
    ids = byte_level.encode(text)
    assert byte_level.decode(ids) == text
    assert not set(ids) & set(byte_level.special_ids.values())


@pytest.fixture(scope="module")
def exported(byte_level, trained, tmp_path_factory):
    """Kind -> (our tokenizer, what transformers loads of its export)."""
    transformers = pytest.importorskip("transformers")
    pairs = {}
    for ours in (byte_level, trained):
        folder = tmp_path_factory.mktemp("exported")
        write_hf_tokenizer(ours, folder)
        pairs[ours.kind] = (ours, transformers.AutoTokenizer.from_pretrained(folder))
    return pairs


@pytest.mark.parametrize("kind", ["huggingface", "sentencepiece"])
@settings(deadline=None, max_examples=200)
@given(text=TEXTS)
def test_transformers_gives_the_same_ids(exported, kind, text):
    ours, loaded = exported[kind]
    ids = ours.encode(text)
    assert loaded(text, split_special_tokens=True).input_ids == ids
    if not any(name in text for name in ours.special_ids):
        assert loaded(text).input_ids == ids
        assert loaded.decode(ids) == text or "▁" in text  # SentencePiece's sign for a space reads back as one


def test_transformers_knows_the_special_tokens(byte_level, exported):
    loaded = exported["huggingface"][1]
    assert len(loaded) == 9000
    assert (loaded.pad_token, loaded.eos_token, loaded.bos_token) == (PAD, END, END)
    for name, number in byte_level.special_ids.items():
        assert loaded(f"a{name}b").input_ids[1] == number
    assert loaded.decode(loaded(f"a{END}").input_ids, skip_special_tokens=True) == "a"


def test_byte_level_training_does_not_depend_on_the_process(tmp_path):
    program = (
        "import sys; from pathlib import Path; from data_prep.corpus import build; from data_prep.tokenizer_training import train\n"
        "train((d.text for d in build('stdlib_code', 300_000)), 'huggingface', 3000, Path(sys.argv[1]))"
    )
    for name, threads in (("a", "1"), ("b", "2")):
        environment = {"PYTHONHASHSEED": threads, "RAYON_NUM_THREADS": threads, "PYTHONPATH": ".", "PATH": "/usr/bin:/bin"}
        subprocess.run([sys.executable, "-c", program, str(tmp_path / name)], check=True, env=environment)
    assert [p.name for p in sorted((tmp_path / "a").iterdir())] == [
        "chat_template.jinja",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for file in (tmp_path / "a").iterdir():
        assert file_sha256(file) == file_sha256(tmp_path / "b" / file.name)


def test_sentencepiece_training_is_repeatable_and_keeps_line_breaks(tmp_path):
    texts = [d.text for d in build("stdlib_code", 60_000)]
    for name in "ab":
        train(texts, "sentencepiece", 400, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    small = load_tokenizer(tmp_path / "a")
    assert any("\n" in small.processor.id_to_piece(i) and len(small.processor.id_to_piece(i)) > 1 for i in range(400))
    assert len(small.encode("\t")) == 1
    assert ROLES[0] not in small.special_ids  # no room in a vocabulary this small


def test_a_large_sentencepiece_vocabulary_has_all_special_tokens(tmp_path):
    texts = [d.text for builder in ("package_code", "message_catalogues") for d in build(builder, 500_000)]
    train(texts, "sentencepiece", 8192, tmp_path / "tokenizer.model")
    made = load_tokenizer(tmp_path / "tokenizer.model")
    assert made.vocab_size == 8192
    assert set(made.special_ids) == {"<unk>", "<|start_of_text|>", "<pad>", *GRANITE} - {PAD, "<|unk|>"}
    text = f"x = 1  # {FIM[0]}"
    assert made.decode(made.encode(text)) == text
    assert made.special_ids[FIM[0]] not in made.encode(text)
    write_hf_tokenizer(made, tmp_path / "hf")
    assert load_tokenizer(tmp_path / "hf").encode(text) == made.encode(text)


def test_a_vocabulary_without_roles_has_no_chat_template(tmp_path):
    train([d.text for d in build("stdlib_code", 60_000)], "huggingface", 600, tmp_path)
    assert not (tmp_path / "chat_template.jinja").exists()
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == END


def test_too_small_a_vocabulary_and_no_text_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"vocab_size is 300: .* use at least 324"):
        train(["text"], "sentencepiece", 300, tmp_path / "a")
    with pytest.raises(DataError, match=r"vocab_size is 300: .* use at least 322"):
        train(["text"], "huggingface", 300, tmp_path / "a")
    for kind in ("sentencepiece", "huggingface"):
        with pytest.raises(DataError, match="no text to train"):
            train([], kind, 400, tmp_path / "a")
    with pytest.raises(DataError, match=r"cannot make 2000 pieces of 23 bytes .* raise data.tokenizer.train_max_bytes"):
        train(["too little text for it\n"], "sentencepiece", 2000, tmp_path / "a")
    with pytest.raises(DataError, match=r"cannot make 2000 entries of 23 bytes .* raise data.tokenizer.train_max_bytes"):
        train(["too little text for it\n"], "huggingface", 2000, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_the_sample_cuts_long_documents_and_stops():
    assert [len(t) for t in sample(["a" * 50_000, "b" * 10, "c" * 10], 16_015)] == [16_000, 10]
