"""`quarry cancel`: launchers, stray stages, Slurm jobs, and nothing at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launchers import cli, slurm_client
from launchers.cancel_command import live_launcher
from launchers.journal import Journal
from launchers.processes import stage_processes, started_at
from launchers.runs import RunFolder

DRIVE = Path(__file__).with_name("drive.py")
HOST = os.uname().nodename


def start_hanging(harness: Any, **fault: Any) -> subprocess.Popen[bytes]:
    """A launcher whose stage `a` is slow; returns when its first step is logged."""
    harness.faults(a={"save_seconds": 0.3, **fault})
    env = {**os.environ, "FAKE_STEP_SECONDS": "0" if fault else "2"}
    process = subprocess.Popen([sys.executable, str(DRIVE), str(harness.root)], env=env, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (harness.run_dir / "stages" / "a" / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    return process


def cancel(harness: Any, *options: str) -> int:
    return cli.main(["cancel", str(harness.run_dir), *options])


def test_launcher_is_asked_and_the_stage_saves(harness: Any, capsys: pytest.CaptureFixture[str]) -> None:
    launcher = start_hanging(harness)
    assert cancel(harness) == 0
    assert launcher.wait(10) == 128 + signal.SIGTERM
    printed = capsys.readouterr().out
    assert f"asking the launcher (process {launcher.pid}) to stop; the running stage saves" in printed
    assert "stage 'a': saved, to be resumed after SIGTERM" in printed
    assert harness.journal(event="cancel")[0]["pid"] == launcher.pid
    assert harness.journal(event="outcome", stage="a")[0]["exit_code"] == 75
    assert cancel(harness) == 0
    assert "nothing is running" in capsys.readouterr().out


def test_kill_does_not_wait_for_a_stage_that_hangs(harness: Any) -> None:
    launcher = start_hanging(harness, hang=True, at_step=2)
    begun = time.monotonic()
    assert cancel(harness, "--kill") == 0
    assert time.monotonic() - begun < 20
    assert launcher.wait(10) != 0
    assert stage_processes(harness.run_dir / "stages" / "a") == []


@pytest.mark.parametrize("options", [(), ("--kill",)])
def test_stage_that_a_killed_launcher_left(harness: Any, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]) -> None:
    launcher = start_hanging(harness)
    launcher.kill()
    launcher.wait()
    assert stage_processes(harness.run_dir / "stages" / "a")
    assert cancel(harness, *options) == 0
    assert stage_processes(harness.run_dir / "stages" / "a") == []
    assert "run without a launcher" in capsys.readouterr().out
    assert harness.journal(event="cancel")[0]["stage"] == "a"


@pytest.fixture
def folder(harness: Any) -> RunFolder:
    harness.run_dir.mkdir(parents=True)
    harness.recipe.write(harness.run_dir / "recipe.json")
    return RunFolder(harness.run_dir)


def test_slurm_jobs_are_cancelled_the_last_first(
    harness: Any, folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = Journal(folder.journal)
    for stage, job in (("data", "10"), ("a", "11"), ("b", "12"), ("c", "13")):
        journal.append("submitted", stage=stage, attempt=1, job=job, executor="slurm")
    journal.append("submitted", stage="a", attempt=1, job="local_persistent://x", executor="local")
    calls = []

    def client(arguments: list[str]) -> str:
        calls.append(list(arguments))
        return "10|COMPLETED\n11|RUNNING\n12|PENDING\n13|PENDING\n99|RUNNING\n" if arguments[0] == "squeue" else ""

    monkeypatch.setattr(slurm_client, "client", client)
    assert cancel(harness) == 0
    assert calls[1:] == [["scancel", "13", "12", "11"]]
    assert [row["job"] for row in harness.journal(event="cancel")] == ["13", "12", "11"]
    assert "cancelling job 11 (a, running)" in capsys.readouterr().out


def test_launcher_on_another_machine_is_named(harness: Any, folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    Journal(folder.journal).append("launch", pid=7, process_started=1.0, host="elsewhere", stages=["a"])
    with folder.lock():
        assert cancel(harness) == 2
    assert "process 7 on elsewhere" in capsys.readouterr().err


def test_process_id_that_is_used_again_is_no_launcher() -> None:
    launch = {"event": "launch", "pid": os.getpid(), "process_started": started_at(os.getpid()), "host": HOST}
    assert live_launcher([launch]) == launch
    assert live_launcher([{**launch, "process_started": 1.0}]) is None
    assert live_launcher([{**launch, "host": "elsewhere"}]) is None
    assert live_launcher([launch, {"event": "end"}]) is None
    assert live_launcher([]) is None


def test_unknown_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cancel", "x", "--runs-root", str(tmp_path)]) == 2
    assert "no run 'x'" in capsys.readouterr().err
