"""Tokenizing a source: strict reading, quarantine, held-out documents, the same bytes whenever it is done."""

import gzip
import json

import numpy as np
import pytest

from data_prep.errors import DataError
from data_prep.indexed import Reader, Writer
from data_prep.tokenize import BadLine, Text, adopt_indexed, content_key, read_lines, tokenize_texts
from tests.data_prep import helpers

GOOD = '{"text": "fine", "id": 1}'
BAD = {
    '{"text": "cut': "not JSON",
    '{"text": "a"} trailing': "not JSON",
    '["text"]': "a JSON list, not an object",
    '{"body": "a"}': "no key 'text'; keys: body",
    '{"text": null}': "'text' is a NoneType, not a string",
    '{"text": 3}': "'text' is a int, not a string",
    '{"text": "a\\u0000b"}': "NUL",
    '{"text": "a\\ud800b"}': "lone surrogate at character 1",
    b'{"text": "\xff"}': "invalid UTF-8 at byte 10",
    b"\xef\xbb\xbf" + b'{"text": "byte order mark"}': "not JSON",
    "[" * 100_000: "not JSON",
}


def lines(path, *content):
    path.write_bytes(b"\n".join(c if isinstance(c, bytes) else c.encode() for c in content) + b"\n")
    return path


@pytest.mark.parametrize("bad", BAD, ids=lambda b: str(b)[:24])
def test_a_bad_line_is_named_and_costs_only_itself(tmp_path, bad):
    path = lines(tmp_path / "a.jsonl", GOOD, bad, "", GOOD)
    found = list(read_lines(path, "text"))
    assert [type(d) for d in found] == [Text, BadLine, Text]
    assert (found[1].file, found[1].line) == (str(path), 2)
    assert BAD[bad] in found[1].reason


def test_empty_documents_are_counted_apart(tmp_path):
    found = list(read_lines(lines(tmp_path / "a.jsonl", '{"text": ""}', GOOD), "text"))
    assert isinstance(found[0], BadLine)
    assert found[0].empty


def test_gzip_is_read_and_a_truncated_one_is_refused(tmp_path):
    packed = gzip.compress((GOOD + "\n").encode() * 1000)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(packed)
    assert len(list(read_lines(path, "text"))) == 1000
    path.write_bytes(packed[:-10])
    with pytest.raises(DataError, match="damaged or truncated"):
        list(read_lines(path, "text"))


def run(folder, path, tokenizer, percent=10.0, minimum=0, **changes):
    folder.mkdir(exist_ok=True)
    values = {
        "heldout_percent": percent,
        "min_heldout_tokens": minimum,
        "inputs": "0" * 64,
        "files": [],
        "threads": 2,
    } | changes
    return tokenize_texts("s", lambda: read_lines(path, "text"), tokenizer, folder, **values)


def texts_of(prefix, tokenizer):
    reader = Reader(prefix)
    documents = [reader[i].tolist() for i in range(len(reader))]
    assert all(d[-1] == tokenizer.eod_id for d in documents)
    return [tokenizer.decode(d[:-1]) for d in documents]


def test_every_document_is_kept_or_held_out_in_order(tmp_path, trained):
    helpers.write_source(tmp_path / "a.jsonl", 1, documents=300)
    record = run(tmp_path / "out", tmp_path / "a.jsonl", trained)
    source = [d.text for d in read_lines(tmp_path / "a.jsonl", "text")]
    held = [text for text in source if content_key(text) < 2**64 // 10]
    assert 10 < len(held) < 60
    assert texts_of(tmp_path / "out" / "s.heldout", trained) == held
    assert texts_of(tmp_path / "out" / "s", trained) == [text for text in source if text not in set(held)]
    assert (record.documents, record.heldout_documents) == (300 - len(held), len(held))
    assert record.tokens == Reader(tmp_path / "out" / "s").index.tokens
    assert record.max_token_id < trained.vocab_size


def test_a_small_source_holds_out_the_minimum_from_what_was_encoded(tmp_path, trained):
    helpers.write_source(tmp_path / "a.jsonl", 1, documents=40)
    record = run(tmp_path / "out", tmp_path / "a.jsonl", trained, percent=0.001, minimum=300)
    source = sorted((d.text for d in read_lines(tmp_path / "a.jsonl", "text")), key=content_key)
    held = texts_of(tmp_path / "out" / "s.heldout", trained)
    assert sorted(held, key=content_key) == source[: len(held)]
    assert record.heldout_tokens >= 300
    assert sorted([*held, *texts_of(tmp_path / "out" / "s", trained)], key=content_key) == source
    # not at the price of a large part of the source
    huge = run(tmp_path / "out2", tmp_path / "a.jsonl", trained, percent=0.001, minimum=10**6)
    assert huge.heldout_tokens == 0


def test_the_same_bytes_again(tmp_path, trained):
    helpers.write_source(tmp_path / "a.jsonl", 1)
    for name, threads in (("x", 1), ("y", 2)):
        run(tmp_path / name, tmp_path / "a.jsonl", trained, threads=threads)
    assert helpers.tree(tmp_path / "x") == helpers.tree(tmp_path / "y")


def test_quarantine_file_and_limit(tmp_path, trained):
    good = [json.dumps({"text": f"document {i}"}) for i in range(50)]
    path = lines(tmp_path / "a.jsonl", *good[:25], '{"text": 1}', '{"text": ""}', *good[25:])
    record = run(tmp_path / "out", path, trained)
    assert (record.quarantined_lines, record.empty_documents, record.documents + record.heldout_documents) == (1, 1, 50)
    quarantined = [json.loads(line) for line in (tmp_path / "out" / "s.quarantine.jsonl").read_text().splitlines()]
    assert quarantined == [
        {"file": str(path), "line": 26, "reason": "'text' is a int, not a string"},
        {"file": str(path), "line": 27, "reason": "empty document"},
    ]
    lines(path, *good, *['{"text": 1}'] * 11)
    with pytest.raises(DataError, match=r"source 's': 11 of 61 lines are bad, more than 1 %; the first: .*a.jsonl, line 51"):
        run(tmp_path / "out", path, trained)
    assert not (tmp_path / "out" / "s.json").exists()
    lines(path, '{"text": 1}')
    with pytest.raises(DataError, match="has no documents; the first bad line"):
        run(tmp_path / "out", path, trained)


def indexed(prefix, documents, vocab):
    with Writer(prefix, vocab) as writer:
        for tokens in documents:
            writer.add(np.array(tokens))


def test_an_indexed_source_is_linked_not_copied(tmp_path, trained):
    documents = [[*range(10, 10 + n), trained.eod_id] for n in range(1, 60)]
    indexed(tmp_path / "given", documents, trained.vocab_size)
    (tmp_path / "out").mkdir()
    settings = {"heldout_percent": 10.0, "min_heldout_tokens": 0, "inputs": "0" * 64, "files": []}
    record = adopt_indexed("s", tmp_path / "given", trained, tmp_path / "out", **settings)
    assert (tmp_path / "out" / "s.bin").is_symlink()
    kept, held = (
        [r[i].tolist() for i in range(len(r))] for r in map(Reader, (tmp_path / "out" / "s", tmp_path / "out" / "s.heldout"))
    )
    assert sorted(kept + held) == sorted(documents)
    assert (record.documents, record.heldout_documents) == (len(kept), len(held))
    assert held
    for broken, message in (([[5, 6]], "document 0 does not end with id 2"), ([[]], "does not end"), ([], "no documents")):
        indexed(tmp_path / "bad", broken, trained.vocab_size)
        with pytest.raises(DataError, match=message):
            adopt_indexed("t", tmp_path / "bad", trained, tmp_path / "out", **settings)
    indexed(tmp_path / "bad", [[5000, 2]], 65_499)
    with pytest.raises(DataError, match="token id 5000, the vocabulary has 1200"):
        adopt_indexed("t", tmp_path / "bad", trained, tmp_path / "out", **settings)
    indexed(tmp_path / "bad", [[5, 2]], 100_000)
    with pytest.raises(DataError, match="dtype int32"):
        adopt_indexed("t", tmp_path / "bad", trained, tmp_path / "out", **settings)
