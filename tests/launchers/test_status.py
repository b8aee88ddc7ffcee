"""`quarry status` on every kind of folder that a crash can leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launchers import cli
from launchers.journal import Journal
from launchers.processes import started_at
from launchers.progress import RunProgress
from launchers.runs import RunFolder

HOST = os.uname().nodename


@pytest.fixture
def run(harness: Any) -> RunFolder:
    harness.run_dir.mkdir(parents=True)
    harness.recipe.write(harness.run_dir / "recipe.json")
    return RunFolder(harness.run_dir)


def metrics(run: RunFolder, stage: str, steps: int, cut: str = "") -> None:
    folder = run.stage(stage)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "step": i,
            "stage_tokens": 32 * i,
            "total_tokens": 32 * i,
            "loss": 5.0 - i,
            "seconds": 0.5,
            "tokens_per_second": 64.0,
            "lr": 1e-3,
        }
        for i in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + cut)


def states(run: RunFolder) -> dict[str, tuple[str, str]]:
    progress = RunProgress(run)
    return {s.stage: (s.state, s.reason) for s in progress.refresh()}


def test_nothing_started(run: RunFolder) -> None:
    assert set(states(run).values()) == {("waiting", "")}


def test_running_stage_with_half_a_line(run: RunFolder) -> None:
    Journal(run.journal).append("intent", stage="a", attempt=1)
    Journal(run.journal).append(
        "started", stage="a", attempt=1, pid=os.getpid(), process_started=started_at(os.getpid()), host=HOST
    )
    metrics(run, "a", 2, cut='{"step": 3, "lo')
    progress = RunProgress(run)
    stage = progress.refresh()[0]
    assert (stage.state, stage.step, stage.stage_tokens, stage.loss) == ("running", 2, 64, 3.0)
    assert stage.tokens_per_second == pytest.approx(64.0)
    assert stage.eta_seconds == pytest.approx(1.0)  # 64 tokens left at 64 a second
    # Three more phases' worth of tokens wait, at the same speed.
    assert progress.eta_seconds == pytest.approx(1.0 + 2 * 128 / 64.0, abs=0.01)


def test_dead_process_is_interrupted(run: RunFolder) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    Journal(run.journal).append("intent", stage="a", attempt=1)
    Journal(run.journal).append("started", stage="a", attempt=1, pid=dead.pid, process_started=1.0, host=HOST)
    assert states(run)["a"] == ("interrupted", "its job ended without a trace (killed, or the machine went down)")


def test_process_id_that_is_used_again_is_not_the_stage(run: RunFolder) -> None:
    Journal(run.journal).append("intent", stage="a", attempt=1)
    Journal(run.journal).append("started", stage="a", attempt=1, pid=os.getpid(), process_started=1.0, host=HOST)
    assert states(run)["a"][0] == "interrupted"


@pytest.mark.parametrize(
    ("code", "reason", "state"),
    [
        (1, "failed with exit code 1", "failed"),
        (75, "saved", "interrupted"),
        (-15, "killed by SIGTERM after SIGTERM", "interrupted"),
    ],
)
def test_ended_badly(run: RunFolder, code: int, reason: str, state: str) -> None:
    journal = Journal(run.journal)
    journal.append("intent", stage="a", attempt=1)
    journal.append("outcome", stage="a", attempt=1, exit_code=code, reason=reason, seconds=2.0)
    assert states(run)["a"] == (state, reason)
    assert cli.main(["status", str(run.path)]) == 1


def test_finished_run_and_its_times(harness: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert harness.launch() == 0
    progress = RunProgress(RunFolder(harness.run_dir))
    progress.refresh()
    assert progress.state == "finished"
    for stage in progress.stages:
        assert stage.wall_seconds > 0
        assert stage.wall_seconds >= stage.startup_seconds + stage.training_seconds - 0.005 or stage.kind != "phase"
    assert cli.main(["status", str(harness.run_dir)]) == 0
    printed = capsys.readouterr().out
    assert "✓ finished" in printed
    assert "4/4" in printed


def test_list_of_runs(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    (run.path.parent / "broken").mkdir()
    (run.path.parent / "broken" / "recipe.json").write_text("{}")
    assert cli.main(["status", "--runs-root", str(run.path.parent)]) == 0
    printed = capsys.readouterr().out
    assert run.name in printed
    assert "unreadable" in printed
    assert cli.main(["status", "--runs-root", str(run.path / "nothing")]) == 0
    assert "no runs under" in capsys.readouterr().out


def test_unknown_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["status", "x", "--runs-root", str(tmp_path)]) == 2
    assert "no run 'x'" in capsys.readouterr().err


def test_cut_journal_is_said(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    Journal(run.journal).append("intent", stage="a", attempt=1)
    with open(run.journal, "ab") as f:
        f.write(b'{"event": "out')
    Journal(run.journal).append("outcome", stage="a", attempt=1, exit_code=1, reason="r", seconds=1.0)
    assert cli.main(["status", str(run.path)]) == 1
    assert "1 lines that a crash cut were left out" in capsys.readouterr().out


def test_watch_follows_a_run_to_its_end(harness: Any, capsys: pytest.CaptureFixture[str]) -> None:
    drive = Path(__file__).with_name("drive.py")
    env = {**os.environ, "FAKE_STEP_SECONDS": "0.5"}
    launcher = subprocess.Popen([sys.executable, str(drive), str(harness.root)], env=env, stdout=subprocess.DEVNULL)
    while not (harness.run_dir / "journal.jsonl").exists():
        assert launcher.poll() is None
    assert cli.main(["status", str(harness.run_dir), "--watch"]) == 0
    assert launcher.wait(30) == 0
    printed = capsys.readouterr().out
    assert any(f"[{stage}] " in printed for stage in "abc"), printed  # which one depends on how busy the machine is
    assert "✓ finished" in printed


def test_watch_of_a_run_that_nothing_brings_forward_ends_at_once(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", str(run.path), "--watch"]) == 0
    assert "waiting" in capsys.readouterr().out
    assert cli.main(["status", "--watch"]) == 2
    assert "name it" in capsys.readouterr().err


def slurm_rows(run: RunFolder, *stages: str) -> Journal:
    """Submitted by a process that lives on, as one that watches does."""
    journal = Journal(run.journal)
    journal.append("launch", pid=os.getpid(), process_started=started_at(os.getpid()), host=HOST, executor="slurm")
    for number, stage in enumerate(stages):
        journal.append("intent", stage=stage, attempt=1, executor="slurm")
        journal.append("submitted", stage=stage, attempt=1, job=str(number), executor="slurm")
    journal.append("end", exit_code=0, reason="submitted")
    return journal


def test_jobs_that_wait_in_slurm_are_not_running(run: RunFolder) -> None:
    slurm_rows(run, "data", "a", "b")
    assert states(run)["a"] == ("waiting", "Slurm job 1")


def test_a_job_that_failed_before_it_was_ours_and_what_was_cancelled_behind_it(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """No Python on the node: nothing but the batch script can say so, and nothing behind it will ever run."""
    slurm_rows(run, "data", "a", "b").append("job_failed", stage="a", job="1", exit_code=2, output="/runs/x")
    shown = states(run)
    state, reason = shown["a"]
    assert state == "failed"
    assert "Slurm job 1 ended with exit code 2" in reason
    assert "/runs/x" in reason
    assert shown["b"] == ("waiting", "not started: Slurm cancelled job 2 when 'a' stopped")
    assert cli.main(["status", str(run.path), "--watch"]) == 1, "and a watch ends"
    assert "exit code 2" in capsys.readouterr().out


def test_data_that_could_not_be_prepared_is_why_a_run_stands_still(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    journal = slurm_rows(run, "data", "a")
    journal.append("outcome", stage="data", attempt=1, exit_code=78, reason="refused: no source", seconds=1.0)
    journal.append("decision", stage="data", attempt=1, decision="stop", reason="refused")
    journal.append("job_failed", stage="data", job="0", exit_code=78, output="/runs/x")
    assert states(run)["a"] == ("waiting", "not started: Slurm cancelled job 1 when 'data' stopped")
    assert cli.main(["status", str(run.path)]) == 1
    assert "data: refused: no source" in capsys.readouterr().out
    journal.append("intent", stage="data", attempt=2, executor="slurm")
    assert RunProgress(run).refresh()
    assert cli.main(["status", str(run.path)]) == 0, "it is tried again"


def test_a_stage_stopped_for_lost_starts_says_so(run: RunFolder) -> None:
    journal = slurm_rows(run, "a")
    journal.append("decision", stage="a", attempt=1, decision="stop", reason="4 starts in a row", step=0, fault=True)
    journal.append("job_failed", stage="a", job="0", exit_code=1, output="/runs/x")
    assert states(run)["a"] == ("failed", "4 starts in a row")
