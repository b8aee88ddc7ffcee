"""Why a stage ended, found in its log: the programs' own words, and the first or last of several."""

from __future__ import annotations

from pathlib import Path

import pytest

from launchers.last_words import MAX_CHARACTERS, TAIL_BYTES, last_words

REFUSAL = "refused: stage 'b' refuses to start:\n  - data differ; prepare them again\n  - tokenizer differs\n"
RERUN = (
    "ERROR:megatron.core.rerun_state_machine:Unexpected result {value} on rank {rank} at iteration #3 invocation #1 "
    "(message='found NaN in the local forward loss')\n"
)
TRACEBACK = 'Traceback (most recent call last):\n  File "x.py", line 1\ntraining.exit_codes.SuspiciousResult: training loss is inf at step 4\n'


@pytest.mark.parametrize(
    ("code", "log", "words"),
    [
        (78, REFUSAL, "stage 'b' refuses to start: data differ; prepare them again; tokenizer differs"),
        (78, "refused: no recipe.json\nrank 0 ended\n", "no recipe.json"),
        (74, "disk full: no space is left under /x\nrank 1 ended with exit code 74\n", "no space is left under /x"),
        (
            16,
            RERUN.format(value="nan", rank=2) + RERUN.format(value="inf", rank=0),
            "found NaN in the local forward loss: nan on rank 2 at step 3",
        ),
        (17, RERUN.format(value="inf", rank=0), "found NaN in the local forward loss: inf on rank 0 at step 3"),
        (
            17,
            TRACEBACK + "rank 0 ended with exit code 17\n",
            "training.exit_codes.SuspiciousResult: training loss is inf at step 4",
        ),
        (1, "x\nValueError: y\nrank 0 ended with exit code 1\n", "ValueError: y"),
        (1, "no traceback\n", ""),
        (78, "nothing of that kind\n", ""),
        (16, "", ""),
        (0, REFUSAL, ""),
        (75, REFUSAL, ""),
        (137, TRACEBACK, ""),
    ],
)
def test_words(code: int, log: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("refused: an attempt before\ndisk full: then\n")
    start = path.stat().st_size
    with path.open("a") as f:
        f.write("==== attempt 2\n" + log)
    assert last_words(path, start, code) == words


def test_only_the_end_of_a_long_log_is_read_and_only_one_line_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("refused: early\n" + "x" * TAIL_BYTES)
    assert last_words(path, 0, 78) == ""
    path.write_bytes(b"\xff\xfe\nrefused: " + b"y" * 2000 + b"\n")
    assert len(last_words(path, 0, 78)) == MAX_CHARACTERS
