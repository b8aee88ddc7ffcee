"""What a job decides from the way its stage ended, and what it tells the batch script."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from launchers import slurm_job
from launchers.journal import Journal
from launchers.slurm_job import EXIT_AGAIN, MAX_FAULTS_WITHOUT_PROGRESS, after_a_loss, decide
from launchers.stage_job import StageJob

STAGE = "a"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The job sets these in its own environment, which here is that of the tests."""
    for name in ("NODE_RANK", "NNODES"):
        monkeypatch.setenv(name, "0")


def job_in(folder: Path, code: str = "") -> StageJob:
    job = StageJob(
        run=folder.name,
        stage=STAGE,
        run_dir=str(folder),
        stage_dir=str(folder / "stages" / STAGE),
        command=[sys.executable, "-c", code],
        environment={},
    )
    job.write()
    return job


def ended(code: int | None, reason: str = "") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"event": "intent", "stage": STAGE, "attempt": 1}]
    return [
        *rows,
        *(
            [{"event": "outcome", "stage": STAGE, "attempt": 1, "exit_code": code, "reason": reason}]
            if code is not None
            else []
        ),
    ]


def fault(step: int) -> dict[str, Any]:
    return {"event": "decision", "stage": STAGE, "attempt": 1, "decision": "again", "step": step, "fault": True}


@pytest.mark.parametrize(
    ("code", "reason", "before", "after", "action"),
    [
        (75, "saved, to be resumed after SIGTERM", 0, 10, "again"),
        (75, "saved, to be resumed after SIGTERM", 10, 10, "again"),  # told to stop before a step was done: counted as a fault
        (75, "saved, to be resumed", 10, 10, "stop"),
        (137, "killed", 0, 0, "again"),
        (-9, "killed", 0, 0, "again"),
        (None, "", 0, 0, "again"),
        (73, "another job", 0, 0, "again"),
        (1, "crashed", 0, 0, "stop"),
        (1, "failed with exit code 1 after SIGTERM", 0, 0, "again"),
        (16, "rerun", 0, 0, "stop"),
        (17, "rerun", 0, 0, "stop"),
        (74, "disk full", 0, 0, "stop"),
        (78, "refused", 0, 0, "stop"),
        (127, "no such command", 0, 0, "stop"),
        (0, "finished", 0, 10, "stop"),  # without a hand-off
    ],
)
def test_decisions(code: int | None, reason: str, before: int, after: int, action: str, tmp_path: Path) -> None:
    decision, _ = decide(job_in(tmp_path), ended(code, reason), 1, before, after)
    assert decision.action == action, decision


def test_a_hand_off_ends_the_stage(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    Path(job.stage_dir, "handoff.json").write_text("{}")
    assert decide(job, ended(0), 1, 0, 10)[0].action == "next"


def test_faults_without_progress_are_capped_and_progress_begins_anew(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    before = [fault(10)] * MAX_FAULTS_WITHOUT_PROGRESS
    decision, _ = decide(job, [*before, *ended(137, "killed")], 1, 10, 10)
    assert decision.action == "stop"
    assert "without progress" in decision.reason
    assert decide(job, [*before[1:], *ended(137, "killed")], 1, 10, 10)[0].action == "again"
    assert decide(job, [*before, *ended(137, "killed")], 1, 10, 20)[0].action == "again"
    other = {**fault(10), "fault": False}
    assert decide(job, [*before, other, *ended(137, "killed")], 1, 10, 10)[0].action == "again"


@pytest.mark.parametrize(
    ("code", "expected"),
    [("import os; open(os.environ['QUARRY_TEST_HANDOFF'], 'w').write('{}')", 0), ("raise SystemExit(78)", 78), ("raise SystemExit(1)", 1),
     ("import os; os.kill(os.getpid(), 9)", EXIT_AGAIN), ("raise SystemExit(75)", 1)],
)  # fmt: skip
def test_exit_codes_of_the_first_node(code: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_in(tmp_path, code)
    monkeypatch.setenv("QUARRY_TEST_HANDOFF", str(Path(job.stage_dir, "handoff.json")))
    monkeypatch.chdir(tmp_path)
    assert slurm_job.main(["--job", str(job.file), "--attempt", "1", "--chdir", str(tmp_path)]) == expected
    last = Journal.read(tmp_path / "journal.jsonl").rows[-1]
    assert last["event"] == "decision"


def test_a_requeued_job_counts_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_in(tmp_path, "raise SystemExit(78)")
    Journal(tmp_path / "journal.jsonl").append("intent", stage=STAGE, attempt=4)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.chdir(tmp_path)
    slurm_job.main(["--job", str(job.file), "--attempt", "3", "--chdir", str(tmp_path)])
    rows = Journal.read(tmp_path / "journal.jsonl").rows
    assert [(row["event"], row["attempt"]) for row in rows[1:4]] == [("decision", 4), ("intent", 5), ("submitted", 5)]
    assert rows[3]["job"] == "77"


def test_starts_that_left_no_decision_are_faults_and_capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm requeues the job of a lost node by itself, and the batch script one that its time limit killed."""
    job = job_in(tmp_path)
    monkeypatch.chdir(tmp_path)
    journal = Journal(tmp_path / "journal.jsonl")
    for attempt in range(1, MAX_FAULTS_WITHOUT_PROGRESS + 1):
        journal.append("intent", stage=STAGE, attempt=attempt)
        journal.append("started", stage=STAGE, attempt=attempt)
        lost = after_a_loss(job, Journal.read(journal.path).rows)
        assert lost is not None
        assert lost.action == "again"
        journal.append("decision", stage=STAGE, attempt=attempt, decision="again", step=0, fault=True)
        assert after_a_loss(job, Journal.read(journal.path).rows) is None
    journal.append("intent", stage=STAGE, attempt=4)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "4")
    assert slurm_job.main(["--job", str(job.file), "--attempt", "1", "--chdir", str(tmp_path)]) == 1
    last = Journal.read(journal.path).rows[-1]
    assert (last["event"], last["decision"], last["attempt"]) == ("decision", "stop", 4)
    assert "4 starts in a row ended so without progress" in last["reason"]
    assert not job.log.exists(), "nothing was started"


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (75, 0), (78, 1), (1, 1), (137, 1)])
def test_other_nodes_leave_the_decision_to_the_first(
    code: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_in(tmp_path, f"import os; print(os.environ['NODE_RANK'], os.environ['NNODES']); raise SystemExit({code})")
    monkeypatch.setenv("SLURM_NODEID", "3")
    monkeypatch.setenv("SLURM_NNODES", "4")
    monkeypatch.chdir(tmp_path)
    assert slurm_job.main(["--job", str(job.file), "--attempt", "1", "--chdir", str(tmp_path)]) == expected
    assert Path(job.stage_dir, "log-node-3.txt").read_text() == "3 4\n"
    assert not (tmp_path / "journal.jsonl").exists()
