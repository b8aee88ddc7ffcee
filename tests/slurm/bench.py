"""A folder with the data of the drills' recipe and an undisturbed local run of it, and a Slurm to launch the same recipe on."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launchers import cli
from tests.slurm.cluster import SlurmCluster

QUARRY = str(Path(sys.executable).with_name("quarry"))
HERE = Path(__file__).parent
STAGES = ("foundation", "capability", "export")  # recipes/curriculum/drill.yaml
SLURM = (
    "cluster=slurm",
    "cluster.gpu=cpu",
    "cluster.threads_per_rank=1",
    "cluster.options.account=ci",
    "cluster.options.partition=batch",
    "cluster.options.time='00:10:00'",
    "cluster.options.signal_seconds_before_limit=60",
)
ON_N1 = "cluster.options.partition=steady"
"""For runs beside a drill that takes n2 down."""
TIMES = ("seconds", "tokens_per_second", "time")
LIMIT_SECONDS = 600.0
"""For the worst of machines; on two idle cores the longest wait is two minutes."""
POLL_SECONDS = 0.1

Row = dict[str, Any]


def rows(run: Path, stage: str) -> list[Row]:
    """What was logged at each step, without what time it took."""
    lines = (run / "stages" / stage / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def heldout(run: Path, stage: str) -> Row:
    return json.loads((run / "stages" / stage / "handoff.json").read_text())["heldout"]


def journal(run: Path, event: str, stage: str | None = None) -> list[Row]:
    path = run / "journal.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in found if row["event"] == event and stage in (None, row.get("stage"))]


def decisions(run: Path, stage: str) -> list[str]:
    return [row["decision"] for row in journal(run, "decision", stage)]


def drill(seconds: float = 0.0, saves: str = "", waits: str = "") -> list[str]:
    """Overrides for hooks/sitecustomize.py."""
    given = {"DRILL_STEP_SECONDS": seconds or "", "DRILL_SAVES": saves, "DRILL_WAITS": waits}
    return [f"+cluster.options.environment.{name}='{value}'" for name, value in given.items() if value]


class Bench:
    def __init__(self, home: Path) -> None:
        """Starts the reference run; `ready` waits for it."""
        self.home = home
        self.reference = home / "runs" / "reference"
        self._output = (home / "reference.txt").open("wb")
        self._launch = subprocess.Popen(
            [QUARRY, *self.command("reference", "cluster=local")], cwd=home, stdout=self._output, stderr=subprocess.STDOUT
        )

    def ready(self, slurm: SlurmCluster) -> Bench:
        self.slurm = slurm
        hooks = os.pathsep.join([str(HERE / "hooks"), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.environment = {**os.environ, **slurm.env, "PYTHONPATH": hooks}
        assert self._launch.wait() == 0, (self.home / "reference.txt").read_text()
        return self

    def close(self) -> None:
        if self._launch.poll() is None:
            self._launch.terminate()
            self._launch.wait()
        self._output.close()

    def command(self, name: str, *more: str) -> list[str]:
        places = (f"cluster.runs_root={self.home / 'runs'}", f"data.root={self.home / 'data'}")
        return ["launch", "--config-dir", str(HERE / "recipes"), "curriculum=drill", *places, *more, "--run", name]

    def submit(self, name: str, *more: str) -> Path:
        """`quarry launch cluster=slurm` in this process, which spares every run but the first the import of nemo-run."""
        code, output = self.quarry(*self.command(name, *SLURM, *more))
        assert code == 0, output
        return self.home / "runs" / name

    def quarry(self, *arguments: str) -> tuple[int, str]:
        """Exit code and output of a command, with Slurm's configuration and the hooks in its environment."""
        output = io.StringIO()
        before = dict(os.environ)
        os.environ.update(self.environment)
        try:
            with contextlib.chdir(self.home), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                return cli.main(arguments), output.getvalue()
        finally:
            os.environ.clear()
            os.environ.update(before)

    def after_foundation(self, name: str, *changes: tuple[str, str]) -> Path:
        """A run whose first stage is finished: the reference's. To be submitted with --accept-changes.

        `changes`: (text, what stands there instead) in its recipe.json.
        """
        run = self.home / "runs" / name
        shutil.copytree(self.reference / "stages" / "foundation", run / "stages" / "foundation")
        written = [*journal(self.reference, "run"), *journal(self.reference, "outcome", "foundation")]
        # The row `run` tells that hand-offs of the reference's recipe count here.
        (run / "journal.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
        recipe = (self.reference / "recipe.json").read_text()
        for old, new in changes:
            assert old in recipe, old
            recipe = recipe.replace(old, new)
        (run / "recipe.json").write_text(recipe)
        return run

    def jobs(self, run: Path) -> dict[str, str]:
        """Stage -> the job that was last submitted for it."""
        return {row["stage"]: row["job"] for row in journal(run, "submitted") if row.get("executor") == "slurm"}

    def finish(self, run: Path, stages: tuple[str, ...] = STAGES) -> None:
        """Wait for the end of the run, which must be the reference's, bit for bit."""
        self.wait(lambda: not self.alive(run), run)
        assert (run / "stages" / stages[-1] / "handoff.json").exists(), self.explain(run)
        for stage in stages:
            if stage != "export":
                assert rows(run, stage) == rows(self.reference, stage), stage
            assert heldout(run, stage) == heldout(self.reference, stage), stage

    def alive(self, run: Path) -> list[str]:
        """`ID NAME` of the jobs of the run that wait or run."""
        listed = self.slurm.run("squeue", "-h", "-o", "%i %j").split("\n")
        return [line for line in listed if f"quarry.{run.name}." in line]

    def wait(self, condition: Callable[[], Any], run: Path) -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not condition():
            assert time.monotonic() < deadline, "too slow: " + self.explain(run)
            time.sleep(POLL_SECONDS)

    def wait_for_step(self, run: Path, stage: str, step: int) -> None:
        path = run / "stages" / stage / "metrics.jsonl"
        self.wait(lambda: path.exists() and len(path.read_bytes().splitlines()) >= step, run)

    def node_of(self, run: Path, stage: str) -> str:
        return self.slurm.run("squeue", "-h", "-o", "%N", "-j", self.jobs(run)[stage])

    def state(self, job: str) -> str:
        """What Slurm's accounting says of a job."""
        return self.slurm.run("sacct", "-n", "-X", "-P", "-o", "state", "-j", job)

    def assert_stopped(self, run: Path, stage: str, *reason: str) -> None:
        """The run has stopped at `stage`, what was to follow was cancelled without having run, and `quarry status` says why."""
        self.wait(lambda: not self.alive(run), run)
        explanation = self.explain(run)
        jobs = self.jobs(run)
        later = list(jobs)[list(jobs).index(stage) + 1 :]
        assert later[-1] == STAGES[-1]
        for name in later:
            assert not journal(run, "started", name), explanation
            assert self.state(jobs[name]).startswith("CANCELLED"), explanation
        code, shown = self.quarry("status", str(run))
        assert code == 1, shown
        assert "\nfailed: " in shown, shown
        flat = " ".join(shown.split())
        for words in reason:
            assert f"{stage}: " in flat, shown
            assert words in flat.split(f" {stage}: ")[1], f"{words!r} is not why {stage} stopped in:\n{shown}\n{explanation}"
        for name in later:
            assert f"{name}: not started: Slurm cancelled job {jobs[name]} when '{stage}' stopped" in flat, shown

    def explain(self, run: Path) -> str:
        parts = [(run / "journal.jsonl").read_text()[-3000:]]
        parts += [path.read_text(errors="replace")[-1500:] for path in sorted(run.glob("stages/*/log.txt"))]
        parts += [path.read_text(errors="replace")[-1500:] for path in sorted(run.glob(".nemo-run/experiments/*/*/*/*.out"))]
        return f"run {run.name}:\n" + "\n----\n".join([*parts, self.slurm.run("squeue")])
