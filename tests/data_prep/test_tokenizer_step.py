"""The tokenizer of a data root: trained as the recipe says, once, and again when kind, size or text change."""

import pytest

from data_prep.progress import Silent
from data_prep.sources import content_of
from data_prep.tokenizer_step import make_tokenizer
from tests.data_prep import helpers


@pytest.fixture
def made(tmp_path):
    """Function: make_tokenizer on four sources with these settings of data.tokenizer; returns tokenizer and record."""
    helpers.raw(tmp_path)

    def make(kind, vocab_size):
        spec = {"kind": kind, "path": None, "vocab_size": vocab_size, "train_max_bytes": 100_000}
        recipe = helpers.recipe(tmp_path, tokenizer=spec)
        root = tmp_path / "data"
        contents = {name: content_of(root, name, source) for name, source in recipe.data.sources.items()}
        return make_tokenizer(recipe, root, contents, Silent())

    make.folder = tmp_path / "data" / "tokenizer"
    return make


def test_a_byte_level_tokenizer_is_trained_and_kept(made):
    tokenizer, record = made("huggingface", 1100)
    assert (tokenizer.kind, tokenizer.vocab_size, record.vocab_size, record.path) == ("huggingface", 1100, 1100, "tokenizer")
    assert (made.folder / "chat_template.jinja").is_file()
    before = helpers.tree(made.folder), helpers.times(made.folder)
    assert made("huggingface", 1100)[1] == record
    assert (helpers.tree(made.folder), helpers.times(made.folder)) == before


def test_another_kind_or_size_is_another_tokenizer(made):
    first = made("huggingface", 400)[1]
    assert made("huggingface", 401)[1].vocab_size == 401
    second = made("sentencepiece", 400)[1]
    assert (second.kind, second.path) == ("sentencepiece", "tokenizer/tokenizer.model")
    assert made("huggingface", 400)[1] == first
