"""The loader's benchmark reads whole samples of its lengths; too few tokens for them are refused."""

import os
import subprocess
import sys

import pytest

from benchmarks.loader import main


def test_every_length_is_read_in_both_ways(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.loader", "--lengths", "256", "1024", "--tokens", "2e5"]
    done = subprocess.run(
        [*command, "--seconds", "0.2", "--folder", str(tmp_path), "--markdown", str(tmp_path / "table.md")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = (tmp_path / "table.md").read_text().splitlines()[2:]
    assert [row.split("|")[1:3] for row in rows] == [
        [f" {length} ", f" {how} "] for length in ("256", "1,024") for how in ("one stream", "apart")
    ]
    assert "times what a node of eight H100 trains on" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]


def test_too_few_tokens_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--lengths", "524288", "--tokens", "1e6"])
    assert "at least 40 samples of the longest length" in capsys.readouterr().err
