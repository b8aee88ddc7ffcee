"""`quarry logs`: attempts, ranks, the last lines, and following a stage that does not exist yet."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launchers import cli
from launchers.journal import Journal
from launchers.processes import started_at
from launchers.runs import RunFolder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(harness: Any) -> RunFolder:
    harness.run_dir.mkdir(parents=True)
    harness.recipe.write(harness.run_dir / "recipe.json")
    folder = RunFolder(harness.run_dir)
    (folder.stage("a") / "ranks").mkdir(parents=True)
    (folder.stage("a") / "log.txt").write_text(
        "==== attempt 1, t: x\none\n==== attempt 1 ended: why\n==== attempt 2, t: x\ntwo\nthree\nhalf"
    )
    for rank in (0, 1):
        (folder.stage("a") / "ranks" / f"rank-{rank}.txt").write_text(f"==== attempt 1, t: rank {rank}\nfrom {rank}\n")
        (folder.stage("a") / "ranks" / f"rank-{rank}.stacks.txt").write_text("rank 0, process 1 on h\n")
    return folder


def logs(run: RunFolder, *words: str) -> int:
    return cli.main(["logs", str(run.path), *words])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a"], ["==== attempt 1, t: x", "one", "==== attempt 1 ended: why", "==== attempt 2, t: x", "two", "three", "half"]),
        (["a", "--lines", "1"], ["three", "half"]),
        (["a", "--attempt", "1"], ["==== attempt 1, t: x", "one", "==== attempt 1 ended: why"]),
        (["a", "--attempt", "2", "--lines", "0"], ["==== attempt 2, t: x", "two", "three", "half"]),
        (["a", "--rank", "1"], ["==== attempt 1, t: rank 1", "from 1"]),
    ],
)
def test_what_is_shown(run: RunFolder, capfd: pytest.CaptureFixture[str], words: list[str], expected: list[str]) -> None:
    assert logs(run, *words) == 0
    assert capfd.readouterr().out.splitlines() == expected


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["z"], 2, "no stage 'z'; its stages: data, a, b, merged, c, hf"),
        (["a", "--attempt", "7"], 2, "no attempt 7; attempts: 1, 2"),
        (["a", "--rank", "5"], 2, "ranks: 0, 1"),
        (["b", "--rank", "0"], 2, "none of its ranks has begun"),
        (["a", "--lines", "-1"], 2, "--lines is -1"),
        (["b"], 1, "printed nothing yet"),
        (["b", "--follow"], 1, "nothing runs that would write"),
    ],
)
def test_what_is_not_there(
    run: RunFolder, capfd: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    assert logs(run, *words) == code
    assert message in capfd.readouterr().err


def test_unknown_run_names_those_that_there_are(run: RunFolder, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["logs", "x", "a", "--runs-root", str(run.path.parent)]) == 2
    assert run.name in capfd.readouterr().err


def test_follow_waits_for_the_file_and_ends_with_the_stage(run: RunFolder) -> None:
    journal = Journal(run.journal)
    journal.append("launch", pid=os.getpid(), process_started=started_at(os.getpid()), host=os.uname().nodename, stages=["b"])
    process = subprocess.Popen(
        [sys.executable, "-m", "launchers.cli", "logs", str(run.path), "b", "--follow"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    time.sleep(1.0)
    assert process.poll() is None
    run.stage("b").mkdir(parents=True)
    with open(run.stage("b") / "log.txt", "w", buffering=1) as log:
        log.write("==== attempt 1, t: x\nfirst\n")
        assert process.stdout.readline() == "==== attempt 1, t: x\n"
        assert process.stdout.readline() == "first\n"
        for attempt, decision in ((1, "again"), (2, "next")):
            journal.append("intent", stage="b", attempt=attempt, executor="local")
            journal.append("outcome", stage="b", attempt=attempt, exit_code=75, reason="", seconds=1.0)
            journal.append("decision", stage="b", attempt=attempt, decision=decision)
            log.write(f"line {attempt}\n")
            assert process.stdout.readline() == f"line {attempt}\n"
    assert process.wait(20) == 0
