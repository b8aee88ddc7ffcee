"""Readers of files that are being written."""

from __future__ import annotations

import json
import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from launchers.jsonl import JsonLines, read_rows


def test_half_a_line_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    assert lines.poll() == []
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert lines.poll() == [{"step": 1}]
    assert lines.poll() == []
    with open(path, "a") as f:
        f.write('ss": 3}\n')
    assert lines.poll() == [{"step": 2, "loss": 3}]
    assert lines.broken_lines == 0


def test_broken_lines_are_counted_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": \n\n[1]\n\xff\xfe\n{"c": 2}\n')
    lines = JsonLines(path)
    assert lines.poll() == [{"a": 1}, {"c": 2}]
    assert lines.broken_lines == 3


def test_rewritten_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    lines = JsonLines(path)
    lines.poll()
    # A resume drops steps 2 and 3, then writes other values; the new file is even as long as the old one was.
    new = tmp_path / "new"
    new.write_text('{"step": 1}\n{"step": 7}\n{"step": 8}\n')
    os.replace(new, path)
    assert lines.poll() == [{"step": 1}, {"step": 7}, {"step": 8}]
    assert [row["step"] for row in lines.rows] == [1, 7, 8]
    path.unlink()
    lines.poll()
    assert lines.rows == []


@given(
    rows=st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=8)), max_size=6),
    cuts=st.lists(st.integers(0, 300)),
)
def test_any_way_of_writing_gives_the_same_rows(tmp_path_factory, rows: list[dict], cuts: list[int]) -> None:
    path = tmp_path_factory.mktemp("rows") / "x.jsonl"
    data = "".join(json.dumps(r) + "\n" for r in rows).encode()
    lines = JsonLines(path)
    found: list[dict] = []
    begin = 0
    for cut in [*sorted(c for c in cuts if c < len(data)), len(data)]:
        with open(path, "ab") as f:
            f.write(data[begin:cut])
        begin = cut
        found += lines.poll()
    assert found == rows == read_rows(path)
