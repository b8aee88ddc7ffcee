"""Reading in a process of its own: the blocks of a reader in this process, and an end of both whatever happens to either."""

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import blocks, reading_process
from data_prep.blocks import BlockReader, Buffer, Piece, Stopped
from data_prep.errors import DataError
from data_prep.reading_process import Early, ReadingProcess, open_reader
from tests.data_prep import tokenizing
from tests.data_prep.test_text_files import BAD, GOOD, ODD_BUT_VALID


@pytest.fixture
def pieces(tmp_path, monkeypatch):
    """Good, bad, odd, long and damaged input, in blocks of 16 KiB."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 14)
    monkeypatch.setattr(blocks, "LONG_LINE_BYTES", 1 << 12)
    bad = [raw if isinstance(raw, bytes) else raw.encode() for raw in BAD]
    lines = [json.dumps({"text": text}).encode() for text in [*tokenizing.texts(3, 150), "long " * 20_000, "\U0001f601 " * 900]]
    lines += [*bad, b"", *(odd.encode() for odd in ODD_BUT_VALID), GOOD.encode()]
    content = b"\n".join(lines)
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content)[:-9])  # breaks off
    pq.write_table(pa.table({"text": ["one", None, "two\0", "", *tokenizing.texts(4, 60)]}), tmp_path / "c.parquet")
    size = len(content)
    spans = [("a.jsonl", 0, size // 3), ("a.jsonl", size // 3, size), ("b.jsonl.gz", 0, None), ("c.parquet", 0, None)]
    return [
        Piece(str(tmp_path / name), number, start, (tmp_path / name).stat().st_size if end is None else end)
        for number, (name, start, end) in enumerate(spans)
    ]


def seen(reader):
    """Everything that a reader gives."""
    found = []
    for block in reader.blocks():
        content = bytes(block.buffer.view[: block.used])
        bad = [(place, str(reason), reason.kind) for place, reason in block.bad]
        found.append((content, list(block.places), list(block.extra), bad, block.extra_bytes, block.read_bytes))
        reader.release(block)
    digests, lines = reader.digests, reader.lines
    reader.close()
    return found, digests, lines


@pytest.mark.parametrize("once", [0, 4])
@pytest.mark.parametrize("as_text", [False, True])
def test_the_blocks_are_those_of_a_reader_in_this_process(pieces, as_text, once):
    here = BlockReader(pieces, "text", [Buffer(blocks.BLOCK_BYTES) for _ in range(3)], as_text=as_text)
    expected = seen(here)
    assert len(expected[0]) > 10
    assert {kind for block in expected[0] for *_, kind in block[3]} > {"damaged file", "empty document"}
    assert seen(ReadingProcess(pieces, "text", 3, as_text=as_text, once=once)) == expected


def test_little_input_is_read_here_and_much_apart(pieces, monkeypatch):
    reader = open_reader(pieces, "text", 3, as_text=False)
    assert isinstance(reader, BlockReader)
    reader.close()
    monkeypatch.setattr(reading_process, "FROM_BYTES", 1)
    reader = open_reader(pieces, "text", 3, as_text=False)
    assert isinstance(reader, ReadingProcess)
    reader.close()


def test_memory_that_is_used_once_goes_when_it_was_used(pieces):
    reader = ReadingProcess(pieces, "text", 2, as_text=False, once=3)
    taken = []
    for block in reader.blocks():
        taken.append(block.buffer)
        assert os.fstat(block.buffer.fd).st_blocks > 0
        reader.release(block)
        if len(taken) <= 3:
            assert os.fstat(taken[-1].fd).st_blocks == 0
    assert {id(buffer) for buffer in taken[3:]} == {id(buffer) for buffer in reader._buffers[:2]}
    reader.close()


def test_reading_that_began_early_is_taken_for_just_that(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    tokenizing.jsonl(path, tokenizing.texts(3, 50))
    shard = [Piece(str(path), 0, 0, path.stat().st_size)]
    with Early.start([path], "text") as early:
        assert early.take(shard, "text", as_text=False) is None, "a small file is not worth a process"
    monkeypatch.setattr(reading_process, "FROM_BYTES", 1)
    with Early.start([tmp_path / "none.jsonl"], "text") as early:
        assert early.take(shard, "text", as_text=False) is None
    with Early.start([path], "text") as early:
        process = early._reader._process
        grown = [Piece(str(path), 0, 0, path.stat().st_size + 1)]
        assert early.take(grown, "text", as_text=False) is None
        assert early.take(shard, "body", as_text=False) is None
        assert early.take(shard, "text", as_text=True) is None
        assert process.poll() in (None, 0)
    assert process.poll() is not None, "nobody took it"
    with Early.start([path], "text") as early:
        reader = early.take(shard, "text", as_text=False)
        assert early.take(shard, "text", as_text=False) is None
    here = BlockReader(shard, "text", [Buffer(blocks.BLOCK_BYTES) for _ in range(3)])
    assert seen(reader) == seen(here)


def test_a_process_that_dies_is_an_error_that_says_so(pieces):
    reader = ReadingProcess(pieces, "text", 3, as_text=False)
    found = reader.blocks()
    next(found)
    os.kill(reader._process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"ended \(signal 9\) before all was read; run the command again"):
        list(found)
    reader.close()


def test_a_process_that_cannot_begin_is_an_error_that_says_so(pieces, monkeypatch):
    monkeypatch.setattr(reading_process, "PROGRAM", "import os; os._exit(3)")
    reader = ReadingProcess(pieces, "text", 3, as_text=False)
    with pytest.raises(RuntimeError, match=r"ended \(exit code 3\)"):
        list(reader.blocks())
    reader.close()


def test_what_fails_in_the_process_is_raised_here(pieces, monkeypatch):
    start = "from data_prep import blocks; from data_prep.errors import DataError; "
    for error, expected, message in (
        ("DataError('refused there')", DataError, "refused there"),
        ("OSError('broken there')", RuntimeError, "broken there"),
    ):
        broken = start + f"blocks.BlockReader.blocks = lambda self: (_ for _ in ()).throw({error}); "
        program = reading_process.PROGRAM.replace("from data_prep.reading", broken + "from data_prep.reading")
        with monkeypatch.context() as patch:
            patch.setattr(reading_process, "PROGRAM", program)
            reader = ReadingProcess(pieces, "text", 3, as_text=False)
            with pytest.raises(expected, match=message):
                list(reader.blocks())
            reader.close()


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_a_thread_that_waits_is_stopped(pieces, kind):
    if kind == "thread":
        reader = BlockReader(pieces, "text", [Buffer(blocks.BLOCK_BYTES) for _ in range(2)])
    else:
        reader = ReadingProcess(pieces, "text", 2, as_text=False)
    ended = []

    def read():
        try:
            for _ in reader.blocks():
                pass  # keeps the buffers: it waits for the third for ever
        except Stopped:
            ended.append(True)

    thread = threading.Thread(target=read)
    thread.start()
    time.sleep(0.2)
    assert thread.is_alive()
    reader.stop()
    thread.join(20)
    assert ended == [True]
    reader.close()


def test_the_process_does_not_outlive_a_killed_parent(pieces):
    program = (
        "import os, sys, time; sys.path[:] = eval(sys.argv[1]); from data_prep.blocks import Piece; "
        "from data_prep.reading_process import ReadingProcess; "
        "reader = ReadingProcess([Piece(*p) for p in eval(sys.argv[2])], 'text', 2, as_text=False); next(reader.blocks()); "
        "print(reader._process.pid, flush=True); time.sleep(60)"
    )
    plain = [(piece.path, piece.file, piece.start, piece.end) for piece in pieces]
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    parent = subprocess.Popen(
        [sys.executable, "-c", program, repr([root, *sys.path]), repr(plain)], stdout=subprocess.PIPE, text=True
    )
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(200):
        try:
            with open(f"/proc/{child}/stat") as f:
                if f.read().rpartition(")")[2].split()[0] == "Z":
                    break
        except FileNotFoundError:
            break
        time.sleep(0.05)
    else:
        pytest.fail(f"process {child} is still there")
