"""The journal of a run: what was intended, started and decided, on disk before it happens, so that any crash can be told from it.

`runs/NAME/journal.jsonl`, one JSON object a line, append-only, fsynced. The launcher and the wrapper inside each job both write to it.
Every row has `time` (UTC, ISO 8601) and `event`:

    run                 {"format", "recipe_digest", "changes"}  recipe.json was written; its digest is accepted from here on
    launch              {"pid", "process_started", "host", "stages"}
    intent              {"stage", "attempt", "executor", "command"}            before a submission
    submitted           {"stage", "attempt", "job"}                            after it
    submission_failed   {"stage", "attempt", "reason"}
    attached            {"stage", "attempt", "pids"}                           a job of an earlier launcher was still running
    started             {"stage", "attempt", "pid", "process_started", "host", "stage_pid"}   by the wrapper
    outcome             {"stage", "attempt", "exit_code", "reason", "seconds", "first_step_seconds", "max_rss_bytes"}   by the wrapper
    decision            {"stage", "attempt", "decision": next | again | stop, "reason"}
    job_failed          {"stage", "job", "exit_code", "output"}                by the batch script of a Slurm job that is not requeued
    signal              {"signal", "stage"}
    cancel              {"reason", and "stage", "job", "pids", "pid", "kill" where known}
    end                 {"exit_code", "reason"}

The stage `data` is the preparation of the data.
"""

from __future__ import annotations

import fcntl
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launchers.jsonl import JsonLines, Row

FORMAT = "quarry.journal/1"


class Journal:
    """Appends to and follows one journal file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = JsonLines(path)

    def append(self, event: str, **fields: Any) -> Row:
        """Write one row and return it when it is on the disk."""
        row = {**self.now(), "event": event, **fields}
        data = json.dumps(row).encode() + b"\n"
        handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)  # launcher and wrapper write at the same time
            size = os.fstat(handle).st_size
            if size and os.pread(handle, 1, size - 1) != b"\n":
                data = b"\n" + data  # a writer was killed inside its line: keep that line apart
            written = os.write(handle, data)
            if written != len(data):
                raise OSError(f"{self.path}: {written} of {len(data)} bytes written; is the disk full?")
            os.fsync(handle)
        finally:
            os.close(handle)
        return row

    @staticmethod
    def now() -> Row:
        """The time as a row has it."""
        return {"time": datetime.now(UTC).isoformat(timespec="milliseconds")}

    def poll(self) -> list[Row]:
        """Rows written since the last call, by any process."""
        return self._lines.poll()

    @property
    def rows(self) -> list[Row]:
        """All whole rows read so far (`poll` reads on)."""
        return self._lines.rows

    @property
    def broken_lines(self) -> int:
        """Lines that were cut by a crash."""
        return self._lines.broken_lines

    @classmethod
    def read(cls, path: Path) -> Journal:
        """The journal at `path` with what it holds now; an absent file is an empty journal."""
        journal = cls(path)
        journal.poll()
        return journal


def seconds_between(earlier: Row, later: Row) -> float:
    """Seconds from one row to another."""
    return (datetime.fromisoformat(later["time"]) - datetime.fromisoformat(earlier["time"])).total_seconds()


def stage_rows(rows: list[Row], stage: str) -> list[Row]:
    return [row for row in rows if row.get("stage") == stage]


def attempts(rows: list[Row], stage: str) -> int:
    """How often the stage was begun (submissions that were written down, whether or not they came to anything)."""
    return max((row["attempt"] for row in stage_rows(rows, stage) if isinstance(row.get("attempt"), int)), default=0)


def last_outcome(rows: list[Row], stage: str) -> Row | None:
    """The outcome of the stage's latest attempt; None while that attempt runs, or if it ended without being able to write one."""
    latest = attempts(rows, stage)
    return next((r for r in reversed(stage_rows(rows, stage)) if r["event"] == "outcome" and r.get("attempt") == latest), None)
