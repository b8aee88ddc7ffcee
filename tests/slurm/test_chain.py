"""A chain of stages on a real Slurm through `quarry launch cluster=slurm`: what clusters do to it, and that its numbers do not change.

One local run of the same recipe is the reference: every drill must end with its losses, bit for bit.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.multirank]

QUARRY = str(Path(sys.executable).with_name("quarry"))
STAGES = ("foundation", "capability", "export")
RECIPE = (
    "curriculum=smoke",
    f"stages=[{','.join(STAGES)}]",
    "phase.foundation.tokens=40960",
    "phase.capability.tokens=81920",
    "phase.foundation.save_interval_steps=10",
    "phase.capability.save_interval_steps=10",
)
SLURM = (
    "cluster=slurm",
    "cluster.gpu=cpu",
    "cluster.threads_per_rank=1",
    "cluster.options.account=ci",
    "cluster.options.partition=batch",
    "cluster.options.time='00:10:00'",
    "cluster.options.signal_seconds_before_limit=60",
)
TIMES = ("seconds", "tokens_per_second", "time")
LIMIT_SECONDS = 240.0


def rows(run: Path, stage: str) -> list[dict[str, Any]]:
    """What was logged at each step, without what time it took."""
    lines = (run / "stages" / stage / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def journal(run: Path, event: str, stage: str | None = None) -> list[dict[str, Any]]:
    path = run / "journal.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in found if row["event"] == event and stage in (None, row.get("stage"))]


class Bench:
    """A folder with the data of the recipe and the local reference run, and a Slurm to launch on."""

    def __init__(self, home: Path, slurm: Any) -> None:
        self.home, self.slurm = home, slurm
        self.environment = {**os.environ, **slurm.env}
        self.reference = self.launch_locally("reference")

    def command(self, name: str, *more: str) -> list[str]:
        places = (f"cluster.runs_root={self.home / 'runs'}", f"data.root={self.home / 'data'}")
        return [QUARRY, "launch", *RECIPE, *more, *places, "--run", name]

    def launch_locally(self, name: str) -> Path:
        done = subprocess.run(self.command(name, "cluster=local"), cwd=self.home, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return self.home / "runs" / name

    def submit(self, name: str, *more: str) -> Path:
        done = subprocess.run(
            self.command(name, *SLURM, *more),
            cwd=self.home,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return self.home / "runs" / name

    def jobs(self, run: Path) -> dict[str, str]:
        """Stage -> the job that was last submitted for it."""
        return {row["stage"]: row["job"] for row in journal(run, "submitted")}

    def finish(self, run: Path) -> None:
        self.wait(lambda: not self.alive(run), run)
        assert (run / "stages" / STAGES[-1] / "handoff.json").exists(), self.explain(run)
        for stage in STAGES[:-1]:
            assert rows(run, stage) == rows(self.reference, stage), stage

    def alive(self, run: Path) -> list[str]:
        listed = self.slurm.run("squeue", "-h", "-o", "%i %j").split("\n")
        return [line for line in listed if f"quarry.{run.name}." in line]

    def wait(self, condition: Callable[[], Any], run: Path) -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not condition():
            assert time.monotonic() < deadline, "too slow: " + self.explain(run)
            time.sleep(0.2)

    def wait_for_step(self, run: Path, stage: str, step: int) -> None:
        path = run / "stages" / stage / "metrics.jsonl"
        self.wait(lambda: path.exists() and len(path.read_bytes().splitlines()) >= step, run)

    def explain(self, run: Path) -> str:
        parts = [(run / "journal.jsonl").read_text()[-3000:]]
        parts += [path.read_text(errors="replace")[-1500:] for path in sorted(run.glob("stages/*/log.txt"))]
        parts += [path.read_text(errors="replace")[-1500:] for path in sorted(run.glob(".nemo-run/experiments/*/*/*/*.out"))]
        return "\n----\n".join([*parts, self.slurm.run("squeue")])


@pytest.fixture(scope="module")
def bench(slurm: Any, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("chain"), slurm)


def test_submitted_at_once_it_runs_to_the_end_and_equals_the_local_chain(bench: Bench) -> None:
    run = bench.submit("whole")
    jobs = bench.jobs(run)
    assert list(jobs) == ["data", *STAGES]
    for stage, before in zip(STAGES, ("data", *STAGES), strict=False):
        shown = bench.slurm.run("scontrol", "show", "job", jobs[stage])
        assert f"Dependency=afterok:{jobs[before]}" in shown, shown
    bench.finish(run)
    for name in (*STAGES[:-1], "export"):
        ours = json.loads((run / "stages" / name / "handoff.json").read_text())
        theirs = json.loads((bench.reference / "stages" / name / "handoff.json").read_text())
        assert ours["heldout"] == theirs["heldout"], name
    again = subprocess.run(
        bench.command("whole", *SLURM), cwd=bench.home, env=bench.environment, capture_output=True, text=True, check=True
    )
    assert "nothing to start" in again.stdout + again.stderr
    assert bench.jobs(run) == jobs, "a finished run submits nothing"


def test_what_clusters_do_leaves_the_numbers_alone(bench: Bench) -> None:
    """One chain through a restarted controller, a requeue by an operator, a rank killed with -9 and a node that goes down."""
    run = bench.submit("drilled")
    bench.wait_for_step(run, "foundation", 2)
    bench.slurm.restart_controller()
    bench.wait_for_step(run, "foundation", 6)
    assert len(journal(run, "started", "foundation")) == 1, "a running job must not notice the controller"
    bench.slurm.run("scontrol", "requeue", bench.jobs(run)["foundation"])
    bench.wait_for_step(run, "capability", 12)
    ranks = [p for p in psutil.process_iter() if {"training.stage", str(run), "capability"} <= set(_cmdline(p))]
    max(ranks, key=lambda p: p.pid).send_signal(signal.SIGKILL)
    bench.wait(lambda: len(journal(run, "started", "capability")) == 2, run)
    bench.wait_for_step(run, "capability", 24)
    node = bench.slurm.run("squeue", "-h", "-o", "%N", "-j", bench.jobs(run)["capability"]).strip()
    bench.slurm.run("scontrol", "update", f"nodename={node}", "state=down", "reason=drill")
    bench.finish(run)
    assert [row["decision"] for row in journal(run, "decision", "foundation")] == ["again", "next"]
    assert journal(run, "decision", "capability")[0]["decision"] == "again"
    assert len(journal(run, "started", "foundation")) == 2
    assert len(journal(run, "started", "capability")) == 3, "a lost node's job is started again"


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_the_launcher_is_killed_between_two_submissions(bench: Bench) -> None:
    name = "launcher"
    run = bench.home / "runs" / name
    launcher = subprocess.Popen(
        bench.command(name, *SLURM), cwd=bench.home, env=bench.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while len(journal(run, "submitted")) < 2:
        assert launcher.poll() is None
        time.sleep(0.002)
    launcher.kill()
    launcher.wait()
    assert len(journal(run, "submitted")) < 1 + len(STAGES), "killed too late"
    bench.submit(name)
    names = [line.split()[1] for line in bench.alive(run)]
    assert len(names) == len(set(names)), f"a stage was submitted twice: {names}"
    bench.finish(run)


def test_a_damaged_checkpoint_stops_the_chain_and_nothing_runs_behind_it(bench: Bench) -> None:
    run = bench.submit("damaged", "--to", "foundation")
    bench.wait(lambda: not bench.alive(run), run)
    checkpoint = max((run / "stages" / "foundation" / "checkpoints").rglob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    checkpoint.write_bytes(content)
    bench.submit("damaged")
    assert_stopped(bench, run, "capability", 78)
    assert checkpoint.name in (run / "stages" / "capability" / "log.txt").read_text()


def assert_stopped(bench: Bench, run: Path, stage: str, code: int) -> None:
    """The stage refused, its job was not started again, and what was to follow was cancelled without having run."""
    bench.wait(lambda: not bench.alive(run), run)
    last = journal(run, "decision", stage)[-1]
    assert last["decision"] == "stop", bench.explain(run)
    assert journal(run, "outcome", stage)[-1]["exit_code"] == code
    later = STAGES[STAGES.index(stage) + 1 :]
    for name in later:
        assert not journal(run, "started", name)
        state = bench.slurm.run("sacct", "-n", "-X", "-P", "-o", "state", "-j", bench.jobs(run)[name])
        assert state.startswith("CANCELLED"), state
    shown = subprocess.run([QUARRY, "status", str(run)], capture_output=True, text=True, check=False, cwd=bench.home).stdout
    assert "refused" in shown, shown
