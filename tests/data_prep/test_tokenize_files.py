"""Tokenizing files: Megatron's bytes for every valid document, nothing lost, the same bytes whatever happens on the way."""

import gzip
import json
import os
import shutil
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_prep import blocks, reading_process, tokenize_files
from data_prep.errors import DataError
from data_prep.indexed import Reader
from data_prep.progress import Silent
from data_prep.text_files import Text, parse_line
from data_prep.tokenizer_facts import facts
from tests.data_prep import helpers, kills, tokenizing
from tests.data_prep.test_text_files import BAD, GOOD, ODD_BUT_VALID
from training import cpu_backend

cpu_backend.install()  # before Megatron is imported: test files share a process

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Facts of a byte-level tokenizer with a chat of control tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizing.byte_level(folder)
    return facts(folder)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 KiB, lines above 4 KiB are long."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 14)
    monkeypatch.setattr(blocks, "LONG_LINE_BYTES", 1 << 12)


def run(paths, tokenizer, prefix, **changes):
    paths = paths if isinstance(paths, list) else [paths]
    return tokenize_files.tokenize_files(paths, tokenizer, prefix, **{"workers": 2, "control_tokens": "as_ids", **changes})


def folder_of(tokenizer):
    return tokenizer.path.parent


def quarantine(prefix):
    path = prefix.with_name(prefix.name + ".quarantine.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def without_digests_of_time(prefix):
    """All that a run leaves, the times of the input files left out."""
    found = helpers.tree(prefix.parent)
    record = json.loads((prefix.parent / f"{prefix.name}.json").read_text())
    for file in record["files"]:
        file.pop("mtime_ns")
    return {**found, f"{prefix.name}.json": record}


# --- Megatron's bytes ------------------------------------------------------------------------------------------------------------


def test_the_bytes_of_megatrons_tool(tmp_path, tokenizer):
    documents = [*tokenizing.texts(1, 150), *tokenizing.NASTY]
    path = tokenizing.jsonl(tmp_path / "a.jsonl", documents)
    record = run(path, tokenizer, tmp_path / "ours")
    assert tokenizing.pair(tmp_path / "ours") == tokenizing.megatrons(tmp_path / "theirs", documents, folder_of(tokenizer))
    assert record.encoder.startswith("gigatoken")
    assert record.documents == len(documents)
    assert record.text_bytes == sum(len(text.encode()) for text in documents)
    assert record.reference_documents["control token"] > 2
    assert record.reference_documents["code point"] > 2
    assert record.control_tokens_in_text == sum(text.count(c) for text in documents for c in tokenizing.CONTROL)
    run(path, tokenizer, tmp_path / "bare", append_eod=False)
    assert tokenizing.pair(tmp_path / "bare") == tokenizing.megatrons(
        tmp_path / "theirs", documents, folder_of(tokenizer), False
    )


def test_what_a_post_processor_adds_is_added(tmp_path):
    tokenizing.byte_level(tmp_path / "tokenizer", bos=True)
    documents = [*tokenizing.texts(2, 40, words=(0, 5)), *tokenizing.NASTY]
    path = tokenizing.jsonl(tmp_path / "a.jsonl", documents)
    run(path, facts(tmp_path / "tokenizer"), tmp_path / "ours")
    assert tokenizing.pair(tmp_path / "ours") == tokenizing.megatrons(tmp_path / "theirs", documents, tmp_path / "tokenizer")


@pytest.mark.parametrize("kind", ["NFC", "lowercase"])
def test_tokenizers_with_a_normalizer(tmp_path, kind):
    normalizer = tokenizers.normalizers.NFC() if kind == "NFC" else tokenizers.normalizers.Lowercase()
    tokenizing.byte_level(tmp_path / "tokenizer", normalizer=normalizer)
    documents = [*tokenizing.texts(3, 60), *tokenizing.NASTY]
    path = tokenizing.jsonl(tmp_path / "a.jsonl", documents)
    record = run(path, facts(tmp_path / "tokenizer"), tmp_path / "ours")
    assert tokenizing.pair(tmp_path / "ours") == tokenizing.megatrons(tmp_path / "theirs", documents, tmp_path / "tokenizer")
    if kind == "NFC":
        assert record.reference_documents["not normalized"] > 0
    else:
        assert record.encoder.startswith("tokenizers")
        assert record.why_not_gigatoken == "its normalizer is Lowercase"


@pytest.mark.parametrize(
    "added",
    [
        ["<|tool|>", "    ", "e\u0301"],
        [
            tokenizers.AddedToken("<left>", lstrip=True, special=True),
            tokenizers.AddedToken("<right>", rstrip=True, special=True),
        ],
        [tokenizers.AddedToken("whole", single_word=True, special=False)],
    ],
    ids=["ordinary", "strips", "single word"],
)
def test_added_tokens_of_every_kind(tmp_path, added):
    tokenizing.byte_level(tmp_path / "tokenizer", added=added)
    names = [str(getattr(token, "content", token)) for token in added]
    documents = [f"{a}{name}{b}{name}" for name in names for a in ("", "x", "x ", " \n ") for b in ("", "y", " y", "\t ")]
    path = tokenizing.jsonl(tmp_path / "a.jsonl", [*documents, *tokenizing.texts(4, 20)])
    run(path, facts(tmp_path / "tokenizer"), tmp_path / "ours")
    expected = tokenizing.megatrons(tmp_path / "theirs", [*documents, *tokenizing.texts(4, 20)], tmp_path / "tokenizer")
    assert tokenizing.pair(tmp_path / "ours") == expected


def test_a_sentencepiece_model(tmp_path, trained):
    documents = [*tokenizing.texts(5, 60), *tokenizing.NASTY, "<s> </s> <unk>"]
    path = tokenizing.jsonl(tmp_path / "a.jsonl", documents)
    record = run(path, facts(trained.path), tmp_path / "ours")
    reader = Reader(tmp_path / "ours")
    assert [reader[i].tolist() for i in range(len(reader))] == [[*trained.encode(text), trained.eod_id] for text in documents]
    assert record.encoder.startswith("sentencepiece")


characters = st.characters(codec="utf-8", exclude_characters="\0")
pieces = st.one_of(
    st.text(characters, min_size=1, max_size=30),
    st.sampled_from(
        [*tokenizing.CONTROL, *tokenizing.NASTY, " ", "\n", "'s", "123", "\u0301", "\ua7ce", "\U000323b0", "</", "|>"]
    ),
)


@settings(deadline=None, max_examples=25)
@given(
    documents=st.lists(st.lists(pieces, min_size=1, max_size=8).map("".join), min_size=1, max_size=30),
    policy=st.sampled_from(["as_ids", "as_text"]),
)
def test_any_text_is_encoded_as_the_reference_does(tmp_path_factory, tokenizer, documents, policy):
    folder = tmp_path_factory.mktemp("any")
    run(tokenizing.jsonl(folder / "a.jsonl", documents), tokenizer, folder / "out", control_tokens=policy)
    reference = tokenizers.Tokenizer.from_file(str(tokenizer.path))
    reference.encode_special_tokens = policy == "as_text"
    reader = Reader(folder / "out")
    assert [reader[i].tolist() for i in range(len(reader))] == [
        [*reference.encode(text).ids, tokenizer.eod_id] for text in documents
    ]
    if policy == "as_text":
        assert all(tokenizer.eod_id not in reader[i][:-1] for i in range(len(reader)))


# --- every format, every size ----------------------------------------------------------------------------------------------------


def test_every_format_gives_the_same_bytes(tmp_path, tokenizer, small_blocks):
    documents = [*tokenizing.texts(6, 120), "x" * 30_000, "long " * 4000, *tokenizing.NASTY]
    plain = tokenizing.jsonl(tmp_path / "a.jsonl", documents)
    raw = plain.read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(raw[: len(raw) // 2]) + gzip.compress(raw[len(raw) // 2 :]))
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(raw))
    (tmp_path / "crlf.jsonl").write_bytes(raw.replace(b"\n", b"\r\n"))
    (tmp_path / "gaps.jsonl").write_bytes(b"\n \n" + raw.replace(b"\n", b"\n\n").rstrip(b"\n"))
    pq.write_table(pa.table({"text": documents, "other": range(len(documents))}), tmp_path / "b.parquet", row_group_size=50)
    run(plain, tokenizer, tmp_path / "expected")
    for name in ("b.jsonl.gz", "b.jsonl.zst", "crlf.jsonl", "gaps.jsonl", "b.parquet"):
        record = run(tmp_path / name, tokenizer, tmp_path / "out" / name)
        assert tokenizing.pair(tmp_path / "out" / name) == tokenizing.pair(tmp_path / "expected"), name
        assert record.bad == {}
        assert record.text_bytes == sum(len(text.encode()) for text in documents)


def test_the_bytes_do_not_depend_on_workers_blocks_or_shards(tmp_path, tokenizer, monkeypatch):
    documents = [*tokenizing.texts(7, 200), "word " * 3000, *tokenizing.NASTY]
    lines = [json.dumps({"text": text}).encode() for text in documents]
    lines[40:40] = [b'{"text": 1}', b'{"text": "odd", "text": "last of two"}', b""]
    halves = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    halves[0].write_bytes(b"\n".join(lines[:100]))
    halves[1].write_bytes(b"\n".join(lines[100:]) + b"\n")
    seen = []
    for number, (workers, block, shard) in enumerate([(2, 1 << 23, 1 << 30), (1, 1 << 14, 40_000), (3, 9000, 7001)]):
        monkeypatch.setattr(blocks, "BLOCK_BYTES", block)
        monkeypatch.setattr(blocks, "LONG_LINE_BYTES", block // 4)
        monkeypatch.setattr(reading_process, "FROM_BYTES", 30_000 if number else 1 << 30)  # shards above it by a process
        prefix = tmp_path / str(number) / "out"
        record = run(halves, tokenizer, prefix, workers=workers, shard_bytes=shard)
        assert len(record.shards) == 1 if number == 0 else len(record.shards) > 1
        seen.append(
            (tokenizing.pair(prefix), quarantine(prefix), record.documents, record.text_bytes, record.reference_documents)
        )
    assert all(one == seen[0] for one in seen)
    assert seen[0][1] == [{"file": str(halves[0]), "line": 41, "reason": "'text' is a int, not a string"}]


def test_two_processes_give_the_same_bytes(tmp_path, tokenizer):
    path = tokenizing.jsonl(tmp_path / "a.jsonl", tokenizing.texts(8, 300))
    run(path, tokenizer, tmp_path / "one" / "out")
    record = run(path, tokenizer, tmp_path / "two" / "out", workers=9, shard_bytes=20_000)
    assert len(record.shards) > 4
    assert tokenizing.pair(tmp_path / "two" / "out") == tokenizing.pair(tmp_path / "one" / "out")
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == ["out.bin", "out.idx", "out.json"]


def test_a_text_key_of_ones_own(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "no", "body text": "yes"}\n')
    run(path, tokenizer, tmp_path / "out", text_key="body text")
    expected = tokenizers.Tokenizer.from_file(str(tokenizer.path)).encode("yes").ids
    assert Reader(tmp_path / "out")[0].tolist() == [*expected, tokenizer.eod_id]


# --- bad input -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", BAD, ids=lambda b: str(b)[:24])
def test_a_bad_line_is_quarantined_and_costs_only_itself(tmp_path, tokenizer, bad):
    path = tmp_path / "a.jsonl"
    raw = bad if isinstance(bad, bytes) else bad.encode()
    path.write_bytes(b"\n".join([GOOD.encode(), raw, b"", GOOD.encode()]))
    record = run(path, tokenizer, tmp_path / "out")
    (entry,) = quarantine(tmp_path / "out")
    assert (entry["file"], entry["line"]) == (str(path), 2)
    assert BAD[bad] in entry["reason"]
    assert (record.documents, record.quarantined_lines, sum(record.bad.values())) == (2, 1, 1)


def test_unusual_lines_are_read_as_json_reads_them(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([GOOD, *ODD_BUT_VALID, GOOD]))
    record = run(path, tokenizer, tmp_path / "out")
    texts = ["fine", *ODD_BUT_VALID.values(), "fine"]
    assert tokenizing.pair(tmp_path / "out") == tokenizing.megatrons(tmp_path / "theirs", texts, folder_of(tokenizer))
    assert record.text_bytes == sum(len(text.encode()) for text in texts)


junk = st.one_of(
    st.binary(max_size=12),
    st.sampled_from([b'"', b"{", b"}", b",", b"\\u0000", b"\\ud800", b"\xff", b"NaN", b"\xef\xbb\xbf", b"\r"]),
)


@settings(deadline=None, max_examples=30)
@given(
    edits=st.lists(st.tuples(st.integers(0, 11), st.floats(0, 1), st.integers(0, 3), junk), max_size=6),
    block=st.sampled_from([300, 1 << 20]),
)
@example(
    edits=[(0, 0.5, 0, b"\\u0000"), (1, 0.0, 0, b"\x00")], block=1 << 20
)  # the first shows in the tokens, the second in the line
def test_whatever_the_bytes_are_every_line_is_a_document_or_quarantined(tmp_path_factory, tokenizer, edits, block):
    lines = [
        json.dumps({"id": n, "text": f"document {n} \u00e9", "x": [1, {"y": None}]}, ensure_ascii=bool(n % 2)).encode()
        for n in range(12)
    ]
    for number, where, cut, put in edits:
        position = int(where * len(lines[number]))
        lines[number] = lines[number][:position] + put + lines[number][position + cut :]
    folder = tmp_path_factory.mktemp("junk")
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    good, bad = [], []
    for number, line in enumerate(b"\n".join(lines).split(b"\n"), 1):
        if line.strip():
            parsed = parse_line(line, "text")
            if isinstance(parsed, Text):
                good.append(parsed.text)
            else:
                bad.append((number, str(parsed)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_BYTES", block)
        run(folder / "a.jsonl", tokenizer, folder / "out", max_bad_percent=100.0)
    assert [(entry["line"], entry["reason"]) for entry in quarantine(folder / "out")] == bad
    reference = tokenizers.Tokenizer.from_file(str(tokenizer.path))
    reader = Reader(folder / "out")
    assert [reader[i].tolist() for i in range(len(reader))] == [
        [*reference.encode(text).ids, tokenizer.eod_id] for text in good
    ]


def test_empty_documents_are_left_out_and_counted_apart(tmp_path, tokenizer):
    path = tokenizing.jsonl(tmp_path / "a.jsonl", ["a", "", "b"])
    record = run(path, tokenizer, tmp_path / "out")
    assert (record.documents, record.empty_documents, record.quarantined_lines) == (2, 1, 0)
    assert quarantine(tmp_path / "out") == [{"file": str(path), "line": 2, "reason": "empty document"}]


def test_broken_files_do_not_stop_a_run(tmp_path, tokenizer):
    good = tokenizing.jsonl(tmp_path / "a.jsonl", tokenizing.texts(9, 30))
    gz = tmp_path / "b.jsonl.gz"
    gz.write_bytes(gzip.compress(tokenizing.jsonl(tmp_path / "raw", tokenizing.texts(10, 400)).read_bytes())[:-1000])
    parquet = tmp_path / "c.parquet"
    parquet.write_bytes(b"PAR1")
    last = tokenizing.jsonl(tmp_path / "d.jsonl", ["the last"])
    with pytest.raises(
        DataError, match=r"2 of 4 files cannot be read to their end.*out.quarantine.jsonl.*--max-damaged-files 2"
    ):
        run([good, gz, parquet, last], tokenizer, tmp_path / "out", max_damaged_files=1)
    assert not (tmp_path / "out.idx").exists()
    record = run([good, gz, parquet, last], tokenizer, tmp_path / "out", max_damaged_files=2)
    assert 100 < record.documents < 431
    assert [(e["file"], "lost" in e["reason"]) for e in quarantine(tmp_path / "out")] == [(str(gz), True), (str(parquet), True)]
    assert record.bad == {"damaged file": 2}
    reader = Reader(tmp_path / "out")
    expected = tokenizers.Tokenizer.from_file(str(tokenizer.path)).encode("the last").ids
    assert reader[len(reader) - 1].tolist() == [*expected, tokenizer.eod_id]


def test_too_many_bad_lines_are_refused_and_leave_no_output(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    good = [json.dumps({"text": f"document {n}"}) for n in range(50)]
    path.write_text("\n".join(good))
    run(path, tokenizer, tmp_path / "out")
    path.write_text("\n".join([*good, *['{"text": 1}'] * 11]))
    with pytest.raises(
        DataError, match=r"source 's': 11 of 61 lines are bad, more than 1 %; the first: .*a.jsonl, line 51: 'text' is a int"
    ):
        run(path, tokenizer, tmp_path / "out", what="source 's'")
    assert len(quarantine(tmp_path / "out")) == 11
    assert not {"out.bin", "out.idx", "out.json"} & {p.name for p in tmp_path.iterdir()}
    record = run(path, tokenizer, tmp_path / "out", max_bad_percent=20.0)
    assert (record.documents, record.quarantined_lines) == (50, 11)
    path.write_text('{"text": 1}\n')
    with pytest.raises(DataError, match="has no documents; the first bad line: .*a.jsonl, line 1"):
        run(path, tokenizer, tmp_path / "out")


def test_refusals_that_need_no_reading(tmp_path, tokenizer):
    path = tokenizing.jsonl(tmp_path / "a.jsonl", ["a"])
    os.link(path, tmp_path / "same.jsonl")
    for paths, message in (
        ([], "no input files"),
        ([tmp_path / "missing"], "missing: no such file"),
        ([path, tmp_path / "same.jsonl"], "are the same file"),
    ):
        with pytest.raises(DataError, match=message):
            tokenize_files.tokenize_files(paths, tokenizer, tmp_path / "out")
    with pytest.raises(DataError, match="100 MB per process is too small"):
        run(path, tokenizer, tmp_path / "out", memory_mb=100)


# --- again, killed, at the same time ---------------------------------------------------------------------------------------------


def test_a_second_run_does_nothing_and_changes_are_noticed(tmp_path, tokenizer):
    path = tokenizing.jsonl(tmp_path / "in" / "a.jsonl", tokenizing.texts(11, 50))
    prefix = tmp_path / "out" / "x"
    first = run(path, tokenizer, prefix)
    before = helpers.times(prefix.parent)
    assert run(path, tokenizer, prefix) == first
    assert helpers.times(prefix.parent) == before
    os.utime(path, ns=(1, 1))  # another time, the same bytes: only the record is written
    run(path, tokenizer, prefix)
    after = helpers.times(prefix.parent)
    assert [name for name in after if after[name] != before[name]] == [str(prefix.parent / "x.json")]
    expected = tokenizing.pair(prefix)
    for suffix in (".bin", ".idx"):
        broken = bytearray(prefix.with_name("x" + suffix).read_bytes())
        broken[len(broken) // 2] ^= 1
        prefix.with_name("x" + suffix).write_bytes(broken)
        run(path, tokenizer, prefix)
        assert tokenizing.pair(prefix) == expected
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"0 ', b'"1 ', 1))
    assert run(path, tokenizer, prefix).bin != first.bin
    assert run(path, tokenizer, prefix, append_eod=False).eod_id is None


TOKENIZE = """
from pathlib import Path
from data_prep import tokenize_files
from data_prep.tokenizer_facts import facts
paths = [Path(p) for p in sys.argv[4:]]
tokenize_files.tokenize_files(paths, facts(Path(sys.argv[2])), Path(sys.argv[3]), workers=1, control_tokens="as_ids", shard_bytes=12_000)
"""
CALLS = {"calls": ("replace", "fsync", "sendfile", "unlink", "ftruncate", "rmdir"), "after": False}


def test_killed_anywhere_the_next_run_gives_the_same_bytes(tmp_path, tokenizer):
    paths = [tokenizing.jsonl(tmp_path / "in" / f"{n}.jsonl", [*tokenizing.texts(n, 30), ""]) for n in range(2)]
    prefix = tmp_path / "out" / "x"

    arguments = (folder_of(tokenizer), prefix, *paths)
    steps = kills.steps_of(TOKENIZE, *arguments, **CALLS)
    expected = helpers.tree(prefix.parent)
    assert sorted(expected) == ["x.bin", "x.idx", "x.json", "x.quarantine.jsonl"]
    assert steps > 40
    again = set()
    for limit in (steps // 4, steps // 2 + 1, *range(steps - 26, steps, 4)):
        shutil.rmtree(prefix.parent)
        assert kills.killed(kills.run(TOKENIZE, limit, *arguments, **CALLS))
        counted = Counted()
        run(paths, tokenizer, prefix, workers=1, shard_bytes=12_000, progress=counted)
        again.add(counted.bytes)
        found = {name: digest for name, digest in helpers.tree(prefix.parent).items() if name != ".x.lock"}
        assert found == expected, f"killed at step {limit} of {steps}"
    assert len(again) > 2  # shards that were finished were not done again


class Counted(Silent):
    """Bytes that were tokenized by this run, not by the one before."""

    def __init__(self):
        self.bytes = 0

    def step(self, name, total_bytes):
        import contextlib

        @contextlib.contextmanager
        def counting():
            def done(size, documents=0, tokens=0):
                self.bytes += size if documents else 0

            yield done

        return counting()


def test_finished_shards_are_not_done_again_but_changed_ones_are(tmp_path, tokenizer, monkeypatch):
    path = tokenizing.jsonl(tmp_path / "a.jsonl", tokenizing.texts(12, 200))
    size = path.stat().st_size
    original, runs = tokenize_files.run_shard, []

    def failing(job, number, *rest):
        if number == 3 and not runs:
            raise KeyboardInterrupt
        return original(job, number, *rest)

    monkeypatch.setattr(tokenize_files, "run_shard", failing)
    with pytest.raises(KeyboardInterrupt):
        run(path, tokenizer, tmp_path / "out", shard_bytes=size // 6)
    assert not (tmp_path / "out.bin").exists()
    raw = bytearray(path.read_bytes())
    position = raw.index(b'"text": "', size // 6 + 2000) + 9  # in the second shard
    raw[position : position + 1] = b"7"
    path.write_bytes(raw)

    def counting(job, number, *rest):
        runs.append(number)
        return original(job, number, *rest)

    monkeypatch.setattr(tokenize_files, "run_shard", counting)
    run(path, tokenizer, tmp_path / "out", shard_bytes=size // 6)
    assert 0 not in runs
    assert {1, 3} <= set(runs)
    monkeypatch.undo()
    run(path, tokenizer, tmp_path / "fresh")
    assert tokenizing.pair(tmp_path / "out") == tokenizing.pair(tmp_path / "fresh")


def test_two_runs_of_one_prefix_wait_for_each_other(tmp_path, tokenizer):
    path = tokenizing.jsonl(tmp_path / "a.jsonl", tokenizing.texts(13, 100))
    messages, results = [], []

    class Told(Silent):
        def message(self, text):
            messages.append(text)

    def work():
        results.append(run(path, tokenizer, tmp_path / "out" / "x", shard_bytes=10_000, progress=Told()))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["x.bin", "x.idx", "x.json"]
    assert not messages or "waiting for process" in messages[0]


# --- gigatoken is not trusted ----------------------------------------------------------------------------------------------------


def test_a_difference_on_the_sample_refuses_gigatoken(tmp_path, tokenizer, monkeypatch):
    documents = tokenizing.texts(14, 60)
    path = tokenizing.jsonl(tmp_path / "a.jsonl", documents)
    monkeypatch.setattr(tokenize_files, "SAMPLE_FROM_BYTES", 0)
    wrong = []

    def differing(encoder, texts):
        wrong.append(len(texts))
        return ["a text"]

    monkeypatch.setattr("data_prep.sample_check.differences", differing)
    messages = []

    class Told(Silent):
        def message(self, text):
            messages.append(text)

    record = run(path, tokenizer, tmp_path / "ours", progress=Told())
    assert wrong[0] > 30
    assert record.encoder.startswith("tokenizers")
    assert "differently" in record.why_not_gigatoken
    assert any("without gigatoken" in message for message in messages)
    assert tokenizing.pair(tmp_path / "ours") == tokenizing.megatrons(tmp_path / "theirs", documents, folder_of(tokenizer))
