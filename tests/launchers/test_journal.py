"""The journal survives the crash of any of its writers."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

from launchers.journal import Journal, attempts, last_outcome


def test_rows_come_back_in_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append("intent", stage="a", attempt=1)
    journal.append("outcome", stage="a", attempt=1, exit_code=0)
    assert [row["event"] for row in journal.poll()] == ["intent", "outcome"]
    journal.append("intent", stage="b", attempt=1)
    assert [row["stage"] for row in journal.poll()] == ["b"]
    assert len(Journal.read(journal.path).rows) == 3


def test_row_after_a_cut_line_is_kept_apart(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.append("intent", stage="a", attempt=1)
    with open(path, "ab") as f:
        f.write(b'{"time": "2026-01-01T00:00:00.000+00:00", "event": "outc')
    journal.append("intent", stage="a", attempt=2)
    read = Journal.read(path)
    assert [row.get("attempt") for row in read.rows] == [1, 2]
    assert read.broken_lines == 1


def test_attempts_and_outcomes(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append("intent", stage="a", attempt=1)
    journal.append("outcome", stage="a", attempt=1, exit_code=75)
    journal.append("intent", stage="a", attempt=2)
    journal.append("intent", stage="b", attempt=1)
    journal.poll()
    assert (attempts(journal.rows, "a"), attempts(journal.rows, "b"), attempts(journal.rows, "c")) == (2, 1, 0)
    assert last_outcome(journal.rows, "a") is None  # the second attempt has not ended
    journal.append("outcome", stage="a", attempt=2, exit_code=0)
    journal.poll()
    outcome = last_outcome(journal.rows, "a")
    assert outcome is not None
    assert outcome["exit_code"] == 0


def _write(path: Path, writer: int) -> None:
    for i in range(50):
        Journal(path).append("row", writer=writer, i=i, padding="x" * 500)


def test_many_writers_lose_and_mix_nothing(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(path, n)) for n in range(4)]
    for w in writers:
        w.start()
    for w in writers:
        w.join()
    read = Journal.read(path)
    assert read.broken_lines == 0
    for n in range(4):
        assert [row["i"] for row in read.rows if row["writer"] == n] == list(range(50))
