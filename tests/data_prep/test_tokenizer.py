"""SentencePiece tokenizers: text survives, control tokens cannot be smuggled in, transformers gives the same ids."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.special_tokens import END, ROLES
from data_prep.tokenizer import load_tokenizer, write_hf_tokenizer

SPECIAL = ["<unk>", "<|start_of_text|>", "<|end_of_text|>", "<pad>", *ROLES]
# Runs and near repetitions are where the order of merges could differ; the rest is any Unicode.
PARTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from([" ", "  ", "\n", "\t", "    ", "=", "==", "ab", "aba", "0", "\0", "é", "漢", "<0x41>", "▁", *SPECIAL]),
    st.tuples(st.sampled_from(" =-ab.0\n"), st.integers(1, 40)).map(lambda pair: pair[0] * pair[1]),
)
TEXTS = st.lists(PARTS, max_size=12).map("".join)


@settings(deadline=None, max_examples=300)
@given(text=TEXTS.filter(lambda t: "▁" not in t))
def test_text_survives(trained, text):
    assert trained.decode(trained.encode(text)) == text


@pytest.mark.parametrize("special", SPECIAL)
def test_a_control_token_in_text_stays_text(trained, special):
    assert trained.special_ids[special] not in trained.encode(f"a {special} b")


def test_special_ids(trained):
    assert trained.special_ids == {name: number for number, name in enumerate(SPECIAL)}
    assert trained.eod_id == trained.special_ids[END] == 2
    assert trained.vocab_size == 1200


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    write_hf_tokenizer(trained, folder)
    return folder


@settings(deadline=None, max_examples=300)
@given(text=TEXTS)
def test_the_exported_tokenizer_gives_the_same_ids(trained, exported, text):
    again = load_tokenizer(exported)
    assert again.encode(text) == trained.encode(text)
    assert again.eod_id == trained.eod_id
    assert again.vocab_size == trained.vocab_size
    if "▁" not in text:
        assert again.decode(again.encode(text)) == text


def test_transformers_loads_the_export(trained, exported):
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(exported)
    plain = "  def f():\n\treturn 'é漢字'  # ▁ <0x41>\n"
    assert loaded(plain).input_ids == trained.encode(plain)
    assert loaded.decode(trained.encode("  def f():\n\t0")) == "  def f():\n\t0"
    spelled = f"a{END}b{ROLES[0]}user"
    assert loaded(spelled, split_special_tokens=True).input_ids == trained.encode(spelled)
    # What chat templates need, and what ours never does:
    assert trained.eod_id in loaded(spelled).input_ids
    assert (loaded.eos_token_id, loaded.pad_token_id, len(loaded)) == (2, 3, 1200)


def test_a_hugging_face_folder_is_read_and_copied(trained, exported, tmp_path):
    loaded = load_tokenizer(exported, "huggingface")
    write_hf_tokenizer(loaded, tmp_path / "copy")
    for file in loaded.files():
        assert (tmp_path / "copy" / file.name).read_bytes() == file.read_bytes()
    assert load_tokenizer(tmp_path / "copy").digest == loaded.digest
    batch = ["a b", "", f"c{END}"]
    assert [ids.tolist() for ids in loaded.encode_batch(batch, 1)] == [ids.tolist() for ids in trained.encode_batch(batch, 2)]


def test_wrong_tokenizer_paths_are_refused(exported, tmp_path):
    with pytest.raises(DataError, match="no such SentencePiece model"):
        load_tokenizer(tmp_path / "gone.model")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path / "bad.model")
    with pytest.raises(DataError, match="no such file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="not a tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="looks like a huggingface tokenizer"):
        load_tokenizer(exported, "sentencepiece")


def test_a_tokenizer_without_an_end_token_is_refused(exported, tmp_path):
    content = json.loads((exported / "tokenizer.json").read_text())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != END]
    content["model"]["vocab"]["<x>"] = content["model"]["vocab"].pop(END)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="no token that ends documents"):
        load_tokenizer(tmp_path)
