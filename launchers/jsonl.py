"""JSON and JSON-lines files that another process is still writing: read what is whole, wait for the rest, survive a resume's rewrite."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def parse_line(line: bytes) -> Row | None:
    """The object of one line; None if the line is not a whole JSON object (a writer was killed inside it)."""
    try:
        value = json.loads(line)
    except ValueError:  # JSONDecodeError and UnicodeDecodeError
        return None
    return value if isinstance(value, dict) else None


class JsonLines:
    """Incremental reader of one file; `poll` costs one stat when nothing was written.

    A line counts only when its newline is there. A file that shrank or was replaced (training drops the steps after the checkpoint
    it resumes from) is read again from its start: `rows` is always what the file holds now.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        self.broken_lines = 0
        """Lines that are no JSON object."""
        self._offset_bytes = 0
        self._inode: int | None = None

    def poll(self) -> list[Row]:
        """Read on; returns the rows that are new since the last call (all of them after a rewrite)."""
        try:
            stat = os.stat(self.path)
        except FileNotFoundError:
            self._restart(None)
            return []
        if stat.st_ino != self._inode or stat.st_size < self._offset_bytes:
            self._restart(stat.st_ino)
        if stat.st_size == self._offset_bytes:
            return []
        with open(self.path, "rb") as f:
            f.seek(self._offset_bytes)
            data = f.read()
        end = data.rfind(b"\n") + 1
        new = []
        for line in data[:end].splitlines():
            if not line.strip():
                continue
            row = parse_line(line)
            if row is None:
                self.broken_lines += 1
            else:
                new.append(row)
        self._offset_bytes += end
        self.rows += new
        return new

    def _restart(self, inode: int | None) -> None:
        self.rows, self.broken_lines, self._offset_bytes, self._inode = [], 0, 0, inode


def read_rows(path: Path) -> list[Row]:
    """Whole rows of a file as it is now; [] if it does not exist."""
    lines = JsonLines(path)
    lines.poll()
    return lines.rows


def read_json(path: Path) -> Row | None:
    """The object in a file that is renamed into place; None if it is not there, or holds something else than an object of JSON."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def finite(value: Any) -> float | None:
    """The value if it is a finite number (a diverged run logs NaN)."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None
