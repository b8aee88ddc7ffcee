"""The wrapper inside a job: outcome written, signals forwarded, nothing left behind, no second job of a stage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from launchers import processes
from launchers.errors import LaunchError
from launchers.journal import Journal
from launchers.stage_job import StageJob
from launchers.wrapper import EXIT_BUSY, FirstStep, describe_exit


def make_job(tmp_path: Path, script: str) -> StageJob:
    stage_dir = tmp_path / "stages" / "a"
    environment = {processes.STAGE_DIR_VARIABLE: str(stage_dir), "GREETING": "good day"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    job = StageJob(
        run="r", stage="a", run_dir=str(tmp_path), stage_dir=str(stage_dir), command=command, environment=environment
    )
    job.write()
    return job


def start(job: StageJob, attempt: int = 1) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "launchers.wrapper", *job.wrapper_arguments(attempt)], env={**os.environ, **job.environment}
    )


def outcomes(job: StageJob) -> list[dict[str, Any]]:
    return [row for row in Journal.read(Path(job.run_dir) / "journal.jsonl").rows if row["event"] == "outcome"]


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 20
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.01)
    return path.read_text()


def test_outcome_log_and_environment(tmp_path: Path) -> None:
    job = make_job(tmp_path, "import os, sys; print(os.environ['GREETING']); print('err', file=sys.stderr); sys.exit(7)")
    assert start(job).wait() == 7
    row = outcomes(job)[0]
    assert (row["stage"], row["attempt"], row["exit_code"], row["reason"]) == ("a", 1, 7, "failed with exit code 7")
    assert row["max_rss_bytes"] > 2**20
    assert start(job, 2).wait() == 7
    log = job.log.read_text()
    assert log.count("good day") == 2
    assert log.count("err") >= 2
    assert "==== attempt 2" in log


def test_signal_reaches_the_command_as_sigterm(tmp_path: Path) -> None:
    job = make_job(
        tmp_path,
        f"""
        import signal, sys, time
        signal.signal(signal.SIGTERM, lambda n, f: sys.exit(75))
        open("{tmp_path / "ready"}", "w").write("x")
        time.sleep(60)
        """,
    )
    process = start(job)
    wait_for(tmp_path / "ready")
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 75
    assert outcomes(job)[0]["reason"] == "saved, to be resumed after SIGINT"


def test_ranks_that_outlive_their_parent_are_ended(tmp_path: Path) -> None:
    # The rank has a session of its own and ignores SIGTERM, as a torchrun worker in a collective would.
    job = make_job(
        tmp_path,
        f"""
        import os, signal, subprocess, sys, time
        rank = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ok', flush=True); time.sleep(300)"
        child = subprocess.Popen([sys.executable, "-c", rank], stdout=subprocess.PIPE, start_new_session=True)
        child.stdout.readline()
        open("{tmp_path / "rank"}", "w").write(str(child.pid))
        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    process = start(job)
    rank = int(wait_for(tmp_path / "rank"))
    assert process.wait(30) == 128 + signal.SIGKILL
    assert outcomes(job)[0]["exit_code"] == -signal.SIGKILL
    assert processes.started_at(rank) is None
    assert processes.stage_processes(Path(job.stage_dir)) == []


def test_second_job_of_a_running_stage_ends_at_once(tmp_path: Path) -> None:
    job = make_job(tmp_path, f"import time; open({str(tmp_path / 'ready')!r}, 'w').write('x'); time.sleep(60)")
    first = start(job)
    wait_for(tmp_path / "ready")
    try:
        assert len(processes.stage_processes(Path(job.stage_dir))) == 2  # the wrapper and its command
        assert start(job, 2).wait() == EXIT_BUSY
    finally:
        first.terminate()
        first.wait()
    assert outcomes(job)[0]["exit_code"] == EXIT_BUSY
    assert "another job of this stage" in outcomes(job)[0]["reason"]


def test_command_that_does_not_exist(tmp_path: Path) -> None:
    job = make_job(tmp_path, "")
    job = StageJob(**{**json.loads(job.file.read_text()), "command": ["/nowhere/python"]})
    job.write()
    assert start(job).wait() == 127
    assert "/nowhere/python cannot be started" in outcomes(job)[0]["reason"]


def test_job_file_of_another_version_is_refused(tmp_path: Path) -> None:
    job = make_job(tmp_path, "")
    job.file.write_text(json.dumps({"format": "quarry.job/9"}))
    with pytest.raises(LaunchError, match=r"quarry\.job/9"):
        StageJob.read(job.file)
    with pytest.raises(LaunchError, match="no readable job file"):
        StageJob.read(tmp_path / "absent.json")


def test_first_step_is_seen_but_a_rewrite_is_not(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    watch = FirstStep(path)
    assert not watch.seen()
    path.write_text("1\n")
    assert watch.seen()
    watch = FirstStep(path)
    new = tmp_path / "new"
    new.write_text("1\n2\n3\n")
    os.replace(new, path)
    assert not watch.seen()
    with open(path, "a") as f:
        f.write("4\n")
    assert watch.seen()


@pytest.mark.parametrize(
    ("code", "received", "words"),
    [
        (0, None, "finished"),
        (78, None, "refused"),
        (-9, None, "killed by SIGKILL"),
        (75, "SIGTERM", "after SIGTERM"),
        (3, None, "exit code 3"),
    ],
)
def test_words_for_exit_codes(code: int, received: str | None, words: str) -> None:
    assert words in describe_exit(code, received)
