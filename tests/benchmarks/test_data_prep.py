"""The benchmark's own parts: what it measures, counts, compares and demands."""

import json
import os
import sys

import numpy as np
import pytest

from benchmarks import data_prep as benchmark
from benchmarks.comparison import differing_documents, read, same_bytes
from benchmarks.measure import CommandFailed, Measurement, measure
from data_prep.indexed import Writer

MEGABYTE = 1_000_000


def write(prefix, documents):
    with Writer(prefix, vocab_size=1000) as writer:
        for document in documents:
            writer.add(np.array(document))
    return prefix


def test_differing_documents_are_counted(tmp_path):
    documents = [[1, 2, 3], [4], [5, 6], [7]]
    whole = write(tmp_path / "whole", documents)
    parts = [write(tmp_path / "first", documents[:1]), write(tmp_path / "rest", documents[1:])]
    assert differing_documents(read([whole]), read(parts)) == 0
    for other, expected in (
        ([[1, 2, 3], [4], [5, 9], [7]], 1),  # an id
        ([[1, 2, 9], [4], [9, 9], [7]], 2),
        ([[1, 2, 3], [4], [5, 6, 6], [7]], 1),  # a length: what follows is the same
        ([[1, 2, 3], [4], [5, 6]], 1),  # one is missing
        ([[4], [5, 6], [7]], 4),  # in order: nothing stands where it stood
    ):
        made = write(tmp_path / "other", other)
        assert differing_documents(read([whole]), read([made])) == expected
        assert not same_bytes(whole, made)
    assert same_bytes(whole, write(tmp_path / "again", documents))


def test_memory_and_time_of_children_are_measured(tmp_path):
    child = "import time; kept = bytearray(60_000_000); time.sleep(0.5)"
    busy = "import time\nwhile time.process_time() < 0.4: pass"
    program = (
        "import subprocess, sys\n"
        f"running = [subprocess.Popen([sys.executable, '-c', {child!r}]) for _ in range(2)]\n"
        f"subprocess.run([sys.executable, '-c', {busy!r}])\n"
        "[process.wait() for process in running]"
    )
    found = measure([sys.executable, "-c", program], dict(os.environ), tmp_path / "log")
    assert found.peak_rss_bytes > 120 * MEGABYTE
    assert found.cpu_seconds >= 0.4
    assert found.wall_seconds >= 0.5


def test_own_memory_is_not_counted(tmp_path):
    kept = bytearray(300 * MEGABYTE)
    found = measure([sys.executable, "-c", "pass"], dict(os.environ), tmp_path / "log")
    assert found.peak_rss_bytes < 100 * MEGABYTE < len(kept)


def test_a_failed_command_says_why(tmp_path):
    with pytest.raises(CommandFailed, match=r"exit code 3 of (.|\n)*no such thing"):
        measure([sys.executable, "-c", "print('no such thing'); raise SystemExit(3)"], dict(os.environ), tmp_path / "log")


def test_the_corpus_is_cut_and_parted_without_loss(tmp_path):
    lines = [json.dumps({"text": "é" * n, "id": n}, ensure_ascii=n % 2 == 0) + "\n" for n in range(1, 12)]
    source = tmp_path / "all.jsonl"
    source.write_text("".join(lines))
    corpus = benchmark.prepare_corpus(source, tmp_path / "work", 3, 90e-6)
    assert (corpus.documents, corpus.text_bytes) == (8 + 1, 2 * sum(range(10)))
    assert corpus.path.read_text() == "".join(lines[:9])
    parts = sorted(corpus.parts.iterdir())
    assert [part.read_text().count("\n") for part in parts] == [3, 3, 3]
    assert "".join(part.read_text() for part in parts) == corpus.path.read_text()
    assert benchmark.prepare_corpus(source, tmp_path / "work", 2, None).documents == 11


def peer(name, seconds, memory=100 * MEGABYTE):
    return benchmark.Peer(name, [], {}, [], runs=[Measurement(s, 1.0, memory) for s in seconds])


def test_bars_are_judged_by_medians():
    quarry = peer(benchmark.QUARRY, [1.0, 9.0, 1.1])
    quarry.differing = 0
    chosen = [
        quarry,
        peer(benchmark.MEGATRON, [60.0]),
        peer(benchmark.FAST, [4.0, 4.0, 4.0]),
        peer(benchmark.LIMIT, [0.5, 1.0, 3.0]),
    ]
    held = [bar.held for bar in benchmark.bars(chosen, True)]
    assert held == [True, False, True, True, True, True]  # 54.5 times, 3.6 times, 91%
    quarry.runs[0] = Measurement(1.0, 1.0, 801 * MEGABYTE)
    quarry.differing = 1
    assert [bar.held for bar in benchmark.bars(chosen, False)][3:] == [False, False, False]
    assert [bar.held for bar in benchmark.bars([quarry], None)][:3] == [None, None, None]
    assert benchmark.bars(chosen[1:], None) == []


def test_everyone_runs_as_often_as_asked_and_the_first_one_changes():
    chosen = [peer(name, []) for name in (benchmark.QUARRY, benchmark.MEGATRON, benchmark.LIMIT)]
    order = [p.name for p in benchmark.rounds(chosen, 3, 1)]
    assert order == [
        *(benchmark.QUARRY, benchmark.MEGATRON, benchmark.LIMIT),
        *(benchmark.LIMIT, benchmark.QUARRY),
        *(benchmark.LIMIT, benchmark.QUARRY),
    ]


def test_a_peer_that_fails_is_left_out_and_quarry_may_not(tmp_path):
    def program(name, code):
        return benchmark.Peer(name, [sys.executable, "-c", code], dict(os.environ), [])

    chosen = [program(benchmark.QUARRY, "pass"), program(benchmark.FAST, "raise SystemExit('broken')")]
    (line,) = benchmark.measure_all(chosen, tmp_path, 2, 2)
    assert line.startswith("preprocess_data_fast.py: left out, it failed: exit code 1")
    assert [(p.name, len(p.runs)) for p in chosen] == [(benchmark.QUARRY, 2)]
    with pytest.raises(CommandFailed, match="exit code 5"):
        benchmark.measure_all([program(benchmark.QUARRY, "raise SystemExit(5)")], tmp_path, 1, 1)


def test_missing_peers_are_named(tmp_path):
    corpus = benchmark.Corpus(tmp_path / "corpus.jsonl", 1, 1, tmp_path)
    listed = list(benchmark.peers(corpus, tmp_path, None, tmp_path, 2, "<|end_of_text|>"))
    assert [line for line in listed if isinstance(line, str)] == [
        "preprocess_data.py: left out, --megatron-lm was not given",
        "preprocess_data_fast.py: left out, --megatron-lm was not given",
    ]
    gone = [line for line in benchmark.peers(corpus, tmp_path, tmp_path, tmp_path, 2, "x") if isinstance(line, str)]
    assert gone[0] == f"preprocess_data.py: left out, {tmp_path}/tools/preprocess_data.py does not exist"


def test_the_table_has_ratios_of_this_run(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("x")
    chosen = [peer(benchmark.QUARRY, [2.0]), peer(benchmark.FAST, [9.0, 8.0, 10.0])]
    text = benchmark.table(chosen, benchmark.Corpus(path, 4000, 10 * MEGABYTE, tmp_path))
    assert text.splitlines()[2:] == [
        "| preprocess_data_fast.py | 9.00 | 8.00-10.00 | 3 | - | 1.0 | 1.1 | 444 | 100 | - | 4.50x |",
        "| quarry tokenize | 2.00 | 2.00-2.00 | 1 | - | 1.0 | 5.0 | 2,000 | 100 | - | - |",
    ]
