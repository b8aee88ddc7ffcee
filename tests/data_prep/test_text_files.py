"""Reading documents: strict, every format the same, a bad line costs only itself, a broken file gives what came before the break."""

import gzip
import itertools
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.text_files import BadLine, Text, expand, lines, parse_line, read_documents

GOOD = '{"text": "fine", "id": 1}'
BAD = {
    '{"text": "cut': "not JSON",
    '{"text": "abc"': "not JSON",
    '{"text": "a"} trailing': "not JSON",
    '{"text": "a"},': "not JSON",
    '["text"]': "a JSON list, not an object",
    '{"body": "a"}': "no key 'text'; keys: body",
    '{"text": null}': "'text' is a NoneType, not a string",
    '{"text": 3}': "'text' is a int, not a string",
    '{"text": ["a"]}': "'text' is a list, not a string",
    '{"text": "a\\u0000b"}': "NUL",
    '{"text": "a\\ud800b"}': "lone surrogate at character 1",
    '{"text": "a\tb"}': "not JSON",
    '{"text": "a\\qb"}': "not JSON",
    b'{"text": "\xff"}': "invalid UTF-8 at byte 10",
    b'{"text": "a", "x": "\xff"}': "invalid UTF-8 at byte 20",
    b"\xef\xbb\xbf" + b'{"text": "byte order mark"}': "byte order mark",
    "[" * 100_000: "not JSON",
}
ODD_BUT_VALID = {
    '{"text": "first", "text": "last"}': "last",
    '{"te\\u0078t": "escaped key"}': "escaped key",
    '{"x": NaN, "text": "json reads NaN"}': "json reads NaN",
    '{"x": {"text": "inner"}, "text": "outer"}': "outer",
    ' {"text" : "spaces" } \r': "spaces",
    '{"text": "\\ud83d\\ude00\\/\\b"}': "\U0001f600/\b",
}


def write(path, *content):
    path.write_bytes(b"\n".join(c if isinstance(c, bytes) else c.encode() for c in content) + b"\n")
    return path


@pytest.mark.parametrize("bad", BAD, ids=lambda b: str(b)[:24])
def test_a_bad_line_is_named_and_costs_only_itself(tmp_path, bad):
    path = write(tmp_path / "a.jsonl", GOOD, bad, "", " \t", GOOD)
    found = list(read_documents(path, "text"))
    assert [type(d) for d in found] == [Text, BadLine, Text]
    assert (found[1].file, found[1].line, found[1].empty) == (str(path), 2, False)
    assert BAD[bad] in found[1].reason


@pytest.mark.parametrize("line", ODD_BUT_VALID)
def test_what_json_reads_is_read_as_json_reads_it(line):
    assert json.loads(line)["text"] == parse_line(line.encode(), "text").text == ODD_BUT_VALID[line]


def test_empty_documents_are_told_apart_and_the_whole_object_comes_along(tmp_path):
    found = list(read_documents(write(tmp_path / "a.jsonl", '{"text": ""}', GOOD), "text"))
    assert found[0] == BadLine(str(tmp_path / "a.jsonl"), 1, "empty document", empty=True)
    assert found[1].record == json.loads(GOOD)


def pack(path, content, suffix):
    packed = gzip.compress(content) if suffix == ".gz" else zstandard.ZstdCompressor().compress(content)
    path.write_bytes(packed)
    return path


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_packed_files_of_several_parts_are_read(tmp_path, suffix):
    one, two = (pack(tmp_path / f"part{suffix}", (GOOD + "\n").encode() * n, suffix).read_bytes() for n in (1000, 5))
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(one + two)
    assert len(list(read_documents(path, "text"))) == 1005


def test_zero_bytes_behind_a_gzip_stream_are_padding(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress((GOOD + "\n").encode()) + b"\0" * 512)
    assert list(read_documents(path, "text")) == [Text("fine")]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "garbage behind"])
def test_a_broken_stream_gives_what_came_before_the_break(tmp_path, suffix, damage):
    content = b"".join(json.dumps({"text": f"document {n} {n * 7919 % 100_003}"}).encode() + b"\n" for n in range(20_000))
    path = pack(tmp_path / f"a.jsonl{suffix}", content, suffix)
    raw = path.read_bytes()
    half = len(raw) // 2
    path.write_bytes(
        {"truncated": raw[:half], "altered": raw[:half] + bytes(64) + raw[half + 64 :], "garbage behind": raw + b"garbage"}[
            damage
        ]
    )
    *documents, last = read_documents(path, "text")
    assert isinstance(last, BadLine)
    assert "lost" in last.reason
    assert len(documents) == 20_000 if damage == "garbage behind" else 500 < len(documents) < 20_000
    good = [d for d in documents if isinstance(d, Text)]
    assert [d.text for d in good[:500]] == [f"document {n} {n * 7919 % 100_003}" for n in range(500)]


def test_parquet_rows_are_documents(tmp_path):
    texts = ["a", "", "é\U0001f600", None, "nul\0", *(f"row {n}" for n in range(700))]
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        path = tmp_path / f"{kind}.parquet"
        pq.write_table(pa.table({"text": pa.array(texts, kind), "id": range(len(texts))}), path, row_group_size=100)
        found = list(read_documents(path, "text", columns=["id", "not there"]))
        assert [d.text for d in found if isinstance(d, Text)] == ["a", "é\U0001f600", *texts[5:]]
        assert [(d.line, d.reason) for d in found if isinstance(d, BadLine)] == [
            (2, "empty document"),
            (4, "'text' is a NoneType, not a string"),
            (5, "the text holds a NUL character"),
        ]
        assert found[-1].record == {"id": len(texts) - 1, "text": "row 699"}


def test_bytes_in_parquet_have_to_be_text(tmp_path):
    for kind in (pa.binary(), pa.string()):
        column = pa.array([b"good", b"\xff", "é".encode()], pa.binary())
        if kind == pa.string():  # what a careless writer makes
            column = pa.Array.from_buffers(pa.string(), 3, column.buffers())
        pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
        found = list(read_documents(tmp_path / "a.parquet", "text"))
        assert [found[0], found[2]] == [Text("good"), Text("é")]
        assert (found[1].line, found[1].reason) == (2, "invalid UTF-8 at byte 0")


def test_unreadable_parquet_is_one_bad_line(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 not really")
    assert "cannot be read" in next(read_documents(path, "text")).reason
    pq.write_table(pa.table({"text": [1, 2]}), path)
    assert [d.reason for d in read_documents(path, "text")] == ["'text' is a int, not a string"] * 2
    assert [d.reason for d in read_documents(path, "body")] == ["no column 'body'; columns: text"]


@settings(deadline=None)
@given(content=st.binary(max_size=60).map(lambda b: b.replace(b"x", b"\n")), cuts=st.lists(st.integers(0, 60), max_size=5))
def test_lines_do_not_depend_on_how_the_bytes_come(content, cuts):
    bounds = sorted({0, len(content), *(c for c in cuts if c < len(content))})
    pieces = [content[a:b] for a, b in itertools.pairwise(bounds)]
    expected = content.split(b"\n")
    assert list(lines(pieces)) == (expected if expected[-1] else expected[:-1])


def test_a_line_over_the_limit_is_not_held():
    found = list(lines([b"short\n123456", b"789", b"0ab\nlast"], 10))
    assert found[::2] == [b"short", b"last"]
    assert str(found[1]) == "line too long: 12 bytes, at most 10 are read"


def test_reasons_can_be_written_and_are_short():
    keys = [b'"\\ud800' + b"x" * 10**6 + b'": 1', b'"other": 2']
    reason = str(parse_line(b"{" + b", ".join(keys) + b"}", "text"))
    assert reason.encode().startswith(b"no key 'text'; keys: other, \\ud800xxx")
    assert len(reason) < 200


def test_patterns_are_expanded_once_and_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        write(tmp_path / name, GOOD)
    assert [p.name for p in expand(["*.jsonl", "a*"], "--input")] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(DataError, match=r"--input: nothing matches '\*.gz'"):
        expand(["*.gz"], "--input")


def test_names_that_no_pattern_loses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a[1].jsonl", GOOD)
    write(tmp_path / "a1.jsonl", GOOD)
    (tmp_path / "folder.jsonl").mkdir()
    assert expand(["a[1].jsonl"], "--input") == [Path("a[1].jsonl")]
    assert len(expand(["*.jsonl"], "--input")) == 2
    with pytest.raises(DataError, match=r"--input: nothing matches 'folder.jsonl' .*it is a folder: name the files in it"):
        expand(["folder.jsonl"], "--input")


def _dangling(path):
    path.symlink_to("gone.jsonl")


def _circular(path):
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        (b"b.jsonl", _dangling, "b.jsonl is a link to gone.jsonl, where no file can be reached; mend"),
        (b"b.jsonl", _circular, "b.jsonl is a link to b.jsonl, where no file"),
        (b"b.jsonl", os.mkfifo, "b.jsonl is neither a file nor a folder"),
        (b"\xff.jsonl", Path.touch, r"\\xff.jsonl: the name is not UTF-8, .*; rename the file"),
    ],
)
def test_a_match_that_cannot_be_read_is_refused_not_left_out(tmp_path, monkeypatch, name, make, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", GOOD)
    make(Path(os.fsdecode(name)))
    with pytest.raises(DataError, match=message):
        expand(["*.jsonl"], "--input")
