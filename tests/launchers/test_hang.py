"""A stage without progress is ended with a diagnosis; a slow one is left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from launchers import processes
from launchers.errors import LaunchError
from launchers.hang import EXIT_HUNG, EXIT_HUNG_REPEATEDLY, HangWatch, Limits, count_hangs, innermost_frame, median_row_seconds
from launchers.journal import Journal
from launchers.policy import decide
from launchers.stage_job import StageJob
from launchers.steps import TRACKER

ROOT = Path(__file__).resolve().parents[2]


def make_job(tmp_path: Path, script: str = "", steps: int | None = 100, **environment: str) -> StageJob:
    """A job of stage `a`, which is a phase of so many steps (None: no phase). The script knows `log_step(n)` and `folder`."""
    stage_dir = tmp_path / "stages" / "a"
    head = f"""
        import json, os, pathlib, signal, sys, time
        from training import stacks
        folder = pathlib.Path({str(stage_dir)!r})
        def log_step(step):
            with open(folder / "metrics.jsonl", "a") as f:
                f.write(json.dumps({{"step": step, "seconds": 0.01}}) + "\\n")
        """
    job = StageJob(
        run="r",
        stage="a",
        run_dir=str(tmp_path),
        stage_dir=str(stage_dir),
        command=[sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(script)],
        environment={processes.STAGE_DIR_VARIABLE: str(stage_dir), "PYTHONPATH": str(ROOT), **environment},
    )
    job.write()
    (tmp_path / "recipe.json").write_text(json.dumps({"phase": {"a": {"steps": steps}} if steps else {}}))
    return job


def run(job: StageJob, attempt: int = 1) -> tuple[int, dict[str, Any], float]:
    """(exit code of the wrapper, its outcome, seconds)."""
    begun = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "launchers.wrapper", *job.wrapper_arguments(attempt)],
        env={**os.environ, **job.environment},
        cwd=ROOT,
    )
    code = process.wait(60)
    rows = [row for row in Journal.read(Path(job.run_dir) / "journal.jsonl").rows if row["event"] == "outcome"]
    return code, rows[-1], time.monotonic() - begun


RANKS = """
    def all_reduce():
        time.sleep(300)
    def read_a_broken_disk():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(300)
    stacks.on_request()
    for rank in range(3):
        if os.fork() == 0:
            stacks.separate_rank(folder, rank)
            for step in (1, 2, 3):
                if rank == 0:
                    log_step(step)
            read_a_broken_disk() if rank == 1 else all_reduce()
    os.wait()
    """


def test_hung_ranks_are_ended_with_their_stacks_and_the_slowest_is_named(tmp_path: Path) -> None:
    job = make_job(tmp_path, RANKS, QUARRY_HANG_SECONDS="1.5")
    code, outcome, seconds = run(job)
    assert code == outcome["exit_code"] == EXIT_HUNG
    assert seconds < 30
    assert outcome["reason"].startswith("hung: no progress for")
    assert "after step 3 (limit 2 s); rank 1: read_a_broken_disk" in outcome["reason"]
    assert "; ranks 0, 2: all_reduce" in outcome["reason"]
    log = job.log.read_text()
    assert "==== stacks of rank 1:" in log
    assert "in read_a_broken_disk" in log
    assert "==== rank 1: process" in log
    assert processes.stage_processes(Path(job.stage_dir)) == []
    decision = decide(code, reason=outcome["reason"], handed_off=False, step_before=0, step_after=0, starts=1, stop_signal=None)
    assert decision.action == "again"
    assert "rank 1" in decision.reason


def test_a_rank_that_does_not_answer_is_named_first(tmp_path: Path) -> None:
    script = RANKS.replace("signal.signal(signal.SIGTERM, signal.SIG_IGN)", "os.kill(os.getpid(), signal.SIGSTOP)")
    code, outcome, _ = run(make_job(tmp_path, script, QUARRY_HANG_SECONDS="1.5"))
    assert code == EXIT_HUNG
    assert "; rank 1: no Python stack (its process is 'stopped'); ranks 0, 2: all_reduce" in outcome["reason"]
    assert processes.stage_processes(tmp_path / "stages" / "a") == []


def test_third_hang_without_a_new_checkpoint_has_another_code(tmp_path: Path) -> None:
    job = make_job(tmp_path, "log_step(1)\ntime.sleep(300)", QUARRY_HANG_SECONDS="0.4")
    assert [run(job, attempt)[0] for attempt in (1, 2, 3, 4)] == [EXIT_HUNG, EXIT_HUNG, EXIT_HUNG_REPEATEDLY, EXIT_HUNG]


def test_a_checkpoint_in_between_starts_the_count_anew(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    rows = [{"event": "outcome", "stage": "a", "exit_code": EXIT_HUNG, "checkpoint_step": 0}] * 2
    assert count_hangs(rows, job) == 3
    (tmp_path / "stages" / "a" / "checkpoints").mkdir()
    (tmp_path / "stages" / "a" / TRACKER).write_text("5")
    assert count_hangs(rows, job) == 1


def test_slow_but_progressing_is_left_alone(tmp_path: Path) -> None:
    script = """
        for step in range(1, 6):
            time.sleep(0.5)
            log_step(step)
        (folder / "checkpoints").mkdir()
        with open(folder / "checkpoints" / "0.distcp", "w", buffering=1) as f:
            for _ in range(5):
                time.sleep(0.5)
                f.write("x" * 100 + "\\n")
        """
    code, outcome, seconds = run(make_job(tmp_path, script, QUARRY_HANG_SECONDS="2"))
    assert (code, outcome["reason"]) == (0, "finished")
    assert seconds > 4


def test_before_the_first_step_the_log_counts_and_later_it_does_not(tmp_path: Path) -> None:
    lines = "for _ in range(6):\n    time.sleep(0.5)\n    print('x', flush=True)\n"
    code, outcome, _ = run(make_job(tmp_path / "1", lines, QUARRY_HANG_SECONDS="1.8"))
    assert (code, outcome["reason"]) == (0, "finished")
    code, outcome, _ = run(make_job(tmp_path / "2", "log_step(1)\n" + lines * 9, QUARRY_HANG_SECONDS="1.8"))
    assert code == EXIT_HUNG
    code, outcome, _ = run(make_job(tmp_path / "3", "time.sleep(300)", QUARRY_HANG_SECONDS="0.5"))
    assert code == EXIT_HUNG
    assert "before its first step" in outcome["reason"]


def test_other_stages_are_judged_by_cpu_time_too(tmp_path: Path) -> None:
    busy = "end = time.monotonic() + 3\nwhile time.monotonic() < end: pass\n"
    assert run(make_job(tmp_path / "1", busy, steps=None, QUARRY_HANG_SECONDS="1.5"))[0] == 0
    assert run(make_job(tmp_path / "2", "time.sleep(300)", steps=None, QUARRY_HANG_SECONDS="1.5"))[0] == EXIT_HUNG


def test_a_process_without_a_handler_is_not_asked(tmp_path: Path) -> None:
    """SIGUSR2 would end it at once, with no time to save."""
    script = f"""
        signal.signal(signal.SIGTERM, lambda *_: (open({str(tmp_path / "saved")!r}, "w").close(), sys.exit(75)))
        time.sleep(300)
        """
    assert run(make_job(tmp_path, script, QUARRY_HANG_SECONDS="1"))[0] == EXIT_HUNG
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("text", ["", "0", "-3", "soon", "inf", "nan"])
def test_limit_that_makes_no_sense_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(LaunchError, match="QUARRY_HANG_SECONDS"):
        Limits.of({"QUARRY_HANG_SECONDS": text})
    if text == "soon":
        code, outcome, _ = run(make_job(tmp_path, QUARRY_HANG_SECONDS=text))
        assert code == 78
        assert "expected seconds" in outcome["reason"]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_limits_follow_the_stage(tmp_path: Path) -> None:
    job = make_job(tmp_path, steps=3)
    metrics = Path(job.stage_dir) / "metrics.jsonl"

    def hangs_after(rows: list[dict[str, Any]], *, stepping: bool, limits: Limits) -> float | None:
        metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
        clock = Clock()
        watch = HangWatch(job, limits, clock)
        for clock.now in range(0, 20_000, 10):
            if watch.check(stepping, list):
                return clock.now
        return None

    def row(step: int) -> dict[str, Any]:
        return {"step": step, "seconds": 60.0}

    assert hangs_after([], stepping=False, limits=Limits()) == pytest.approx(1800, abs=60)
    assert hangs_after([{"step": 1, "seconds": 1.0}], stepping=True, limits=Limits()) == pytest.approx(600, abs=60)
    assert hangs_after([row(1), row(2)], stepping=True, limits=Limits()) == pytest.approx(1200, abs=60)
    assert hangs_after([row(1), row(3)], stepping=True, limits=Limits()) == pytest.approx(
        1800, abs=60
    )  # held-out loss, digests
    assert hangs_after([], stepping=False, limits=Limits.of({"QUARRY_HANG_SECONDS": "off"})) is None


def test_median_counts_the_steps_between_two_rows() -> None:
    assert median_row_seconds([]) is None
    assert median_row_seconds([{"step": s, "seconds": 2.0} for s in (10, 20, 30)]) == 20.0


def test_innermost_frame_is_of_the_thread_that_took_the_signal() -> None:
    dump = (
        'Thread 0x1 (most recent call first):\n  File "a.py", line 1 in other\n\n'
        'Current thread 0x2 (most recent call first):\n  File "b.py", line 7 in wait\n  File "c.py", line 8 in main\n'
    )
    assert innermost_frame(dump) == "wait (b.py:7)"
    assert innermost_frame("") is None
