"""Held-out documents: chosen by their tokens alone, by link and not by copy, the same on one core and on several."""

import hashlib
import os
import shutil

import numpy as np
import pytest

from data_prep import split
from data_prep.errors import DataError
from data_prep.indexed import Reader, Writer
from data_prep.split import content_keys, is_current, split_heldout
from tests.data_prep import helpers

SETTINGS = {"heldout_percent": 10.0, "min_heldout_tokens": 0, "inputs": "0" * 64, "files": []}


def indexed(prefix, documents, vocab):
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with Writer(prefix, vocab) as writer:
        for tokens in documents:
            writer.add(np.array(tokens))
    return prefix


def documents_of(prefix):
    reader = Reader(prefix)
    return [reader[i].tolist() for i in range(len(reader))]


def some(count, eod):
    return [[*range(10, 10 + n % 37), 10 + n // 37, eod] for n in range(1, count)]


def key(tokens):
    return int.from_bytes(hashlib.sha256(np.array(tokens, np.uint16).tobytes()).digest()[:8], "big")


@pytest.fixture
def root(tmp_path):
    (tmp_path / "data" / "tokenized").mkdir(parents=True)
    return tmp_path / "data"


def test_the_two_parts_are_views_of_the_source(tmp_path, root, trained):
    documents = some(300, trained.eod_id)
    indexed(tmp_path / "given", documents, trained.vocab_size)
    record = split_heldout("s", tmp_path / "given", trained, root / "tokenized", **SETTINGS)
    kept, held = documents_of(root / "tokenized" / "s"), documents_of(root / "tokenized" / "s.heldout")
    assert held == [d for d in documents if key(d) < 2**64 // 10]
    assert kept == [d for d in documents if key(d) >= 2**64 // 10]
    assert 10 < len(held) < 60
    assert (record.documents, record.heldout_documents) == (len(kept), len(held))
    assert (record.tokens, record.heldout_tokens) == (sum(map(len, kept)), sum(map(len, held)))
    assert record.max_token_id == max(max(d) for d in documents)
    assert os.readlink(root / "tokenized" / "s.bin") == str(tmp_path / "given.bin")  # outside of the root: absolute
    assert is_current(record, root / "tokenized", "0" * 64, {})
    assert not is_current(record, root / "tokenized", "1" * 64, {})


def test_a_root_with_its_tokens_can_be_moved(root, trained):
    indexed(root / "tokens" / "s", some(50, trained.eod_id), trained.vocab_size)
    split_heldout("s", root / "tokens" / "s", trained, root / "tokenized", **SETTINGS)
    before = documents_of(root / "tokenized" / "s")
    assert os.readlink(root / "tokenized" / "s.heldout.bin") == "../tokens/s.bin"
    moved = root.with_name("moved")
    shutil.move(root, moved)
    assert documents_of(moved / "tokenized" / "s") == before


def test_a_small_source_holds_out_the_minimum(tmp_path, root, trained):
    documents = [[*range(10, 200), n, trained.eod_id] for n in range(40)]
    indexed(tmp_path / "given", documents, trained.vocab_size)
    record = split_heldout(
        "s", tmp_path / "given", trained, root / "tokenized", **SETTINGS | {"heldout_percent": 0.001, "min_heldout_tokens": 300}
    )
    assert sorted(documents_of(root / "tokenized" / "s.heldout"), key=key) == sorted(documents, key=key)[:2]
    assert record.heldout_tokens == 2 * 192
    # not at the price of a large part of the source
    huge = split_heldout(
        "s",
        tmp_path / "given",
        trained,
        root / "tokenized",
        **SETTINGS | {"heldout_percent": 0.001, "min_heldout_tokens": 10**6},
    )
    assert huge.heldout_tokens == 0


def test_parts_and_processes_change_nothing(tmp_path, root, trained, monkeypatch):
    indexed(tmp_path / "given", some(500, trained.eod_id), trained.vocab_size)
    split_heldout("s", tmp_path / "given", trained, root / "tokenized", **SETTINGS)
    expected = helpers.tree(root)
    monkeypatch.setattr(split, "PART_DOCUMENTS", 70)
    monkeypatch.setattr(split, "PART_BYTES", 1000)
    monkeypatch.setattr(split, "PROCESSES_FROM_BYTES", 1000)
    read = []
    split_heldout("s", tmp_path / "given", trained, root / "tokenized", **SETTINGS, workers=2, on_bytes=read.append)
    assert helpers.tree(root) == expected
    assert len(read) > 10
    assert sum(read) == (tmp_path / "given.bin").stat().st_size


def test_a_view_out_of_order_has_the_keys_of_its_documents(tmp_path, trained):
    from data_prep.indexed import Index, idx_path

    documents = some(40, trained.eod_id)
    indexed(tmp_path / "given", documents, trained.vocab_size)
    order = np.random.default_rng(0).permutation(len(documents))
    view = Index.read(idx_path(tmp_path / "given")).select(order)
    view.write(idx_path(tmp_path / "view"))
    (tmp_path / "view.bin").symlink_to("given.bin")
    keys, highest = content_keys(tmp_path / "view", view, trained, "s", 1)
    assert keys.tolist() == [key(documents[n]) for n in order]
    assert highest == max(max(d) for d in documents)


@pytest.mark.parametrize(
    ("documents", "vocab", "message"),
    [
        ([[5, 2], [5, 6]], None, "document 1 does not end with id 2"),
        ([[5, 2], []], None, "document 1 does not end"),
        ([], None, "no documents"),
        ([[5000, 2]], 65_499, "token id 5000, the vocabulary has 1200"),
        ([[5, 2]], 100_000, "dtype int32"),
    ],
)
def test_what_does_not_fit_the_tokenizer_is_refused(tmp_path, root, trained, documents, vocab, message):
    indexed(tmp_path / "bad", documents, vocab or trained.vocab_size)
    with pytest.raises(DataError, match=message):
        split_heldout("t", tmp_path / "bad", trained, root / "tokenized", **SETTINGS)
    assert not (root / "tokenized" / "t.json").exists()


def test_tokens_of_another_tokenizer_are_refused_though_their_ids_fit(tmp_path, root, trained):
    indexed(tmp_path / "given", [[5, 2], [6, 7, 2]], trained.vocab_size)
    record = tmp_path / "given.json"
    for content in ('{"tokenizer_sha256": "0000"}', f'{{"tokenizer_sha256": "{trained.digest}"}}', "somebody else's"):
        record.write_text(content)
        if "0000" in content:
            with pytest.raises(
                DataError, match=r"given.json: made with another tokenizer \(SHA-256 0000; .* tokenize data.sources.t with"
            ):
                split_heldout("t", tmp_path / "given", trained, root / "tokenized", **SETTINGS)
        else:
            assert split_heldout("t", tmp_path / "given", trained, root / "tokenized", **SETTINGS).documents
