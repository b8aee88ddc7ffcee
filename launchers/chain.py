"""Runs the stages of a curriculum one after another, so that a failed one stops the chain and a killed chain goes on where it was.

What is done is known from the hand-offs in the run's folder, what was tried from its journal. The launcher itself holds no state: the
same command, started again after anything, finishes the run.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from launchers import policy, processes, stage_job
from launchers.control import LogTail, Signals, Strays, tail
from launchers.docker_jobs import DockerJobs, RunningContainers, StrayContainers, SubmissionFailed
from launchers.errors import LaunchError
from launchers.journal import FORMAT as JOURNAL_FORMAT
from launchers.journal import Journal, attempts, last_outcome, stage_rows
from launchers.local import LocalJobs, Submitted, start_directly
from launchers.progress import RunProgress
from launchers.runs import RunFolder, accepted_digests, check_change, default_name
from launchers.stage_job import DATA, StageJob, check_name
from launchers.steps import checkpoint_step
from launchers.summary import print_summary
from launchers.view import View, terminal
from recipes.schema import Recipe

POLL_SECONDS = 0.05
ALIVE_INTERVAL_SECONDS = 1.0
LOG_TAIL_LINES = 25


@dataclass(kw_only=True)
class Launch:
    """One `quarry launch`, on a recipe that the linter has passed."""

    recipe: Recipe
    run_name: str | None = None
    """None: derived from curriculum and model, so that the same command finds its run again."""
    folder: Path | None = None
    """Folder of an existing run to go on with; None: runs_root/NAME."""
    first: str | None = None
    """Stage to begin with; everything before it must be finished."""
    last: str | None = None
    """Stage to stop after."""
    accept_changes: bool = False
    stage_command: tuple[str, ...] = stage_job.STAGE_COMMAND
    data_command: tuple[str, ...] = stage_job.DATA_COMMAND
    console: Console = field(default_factory=terminal)

    def __post_init__(self) -> None:
        check_cluster(self.recipe)
        name = check_name("run", self.run_name) if self.run_name else default_name(self.recipe)
        self.run = RunFolder(self.folder or Path(self.recipe.cluster.runs_root) / name)
        self.stages = select(self.recipe.stages, self.first, self.last)
        self.jobs = {
            s: stage_job.stage_job(self.recipe, self.run.path, s, stage_command=self.stage_command) for s in self.recipe.stages
        }

    def dryrun(self) -> int:
        """Print what would be started (Slurm, Docker: and write it to RUN/scripts); starts nothing."""
        done = self._finished(Journal.read(self.run.journal), self._change())
        self.console.print(f"run {self.run.name}: {self.run.path}")
        if self.recipe.cluster.kind == "slurm":
            from launchers import slurm

            return slurm.dryrun(self, done)
        if self.recipe.cluster.kind == "docker":
            from launchers import docker_jobs

            return docker_jobs.dryrun(self, done)
        data = stage_job.data_job(self.recipe, self.run.path, last=self.last, data_command=self.data_command)
        for job, state in ((data, "prepare"), *((self.jobs[s], "finished" if s in done else "start") for s in self.stages)):
            self.console.print(f"\n[{state}] {job.stage}")
            if state != "finished":
                words = [*(f"{k}={shlex.quote(v)}" for k, v in job.environment.items()), shlex.join(job.command)]
                self.console.print("  " + " \\\n    ".join(words), soft_wrap=True)
        return 0

    def start(self) -> int:
        """Run the chain; returns the exit code of `quarry launch`."""
        self.run.path.mkdir(parents=True, exist_ok=True)
        with self.run.lock():
            self.journal = Journal.read(self.run.journal)
            changes = self._change()
            done = self._finished(self.journal, changes)
            todo = [s for s in self.stages if s not in done]
            self._check_before(done)
            self.progress = RunProgress(self.run, self.recipe)
            if not todo:
                self.progress.refresh()
                self.console.print(f"run {self.run.name}: every stage asked for is finished, nothing to start")
                if not self.run.report.exists():
                    self._report()
                if self.progress.state == "finished":
                    print_summary(self.progress, self.console)
                return 0
            if self.recipe.cluster.kind == "slurm":
                from launchers import slurm

                self._record_recipe(changes)
                return slurm.submit(self, todo)
            jobs = self._jobs()
            self._record_recipe(changes)
            return self._run(jobs, todo)

    def _jobs(self) -> LocalJobs | DockerJobs:
        """What starts the jobs; with Docker, LaunchError before anything of the run is written when it could start none."""
        local = LocalJobs(self.run.path / ".nemo-run")
        if self.recipe.cluster.kind != "docker":
            return local
        try:
            return DockerJobs(self.recipe, self.run.path, local)
        except LaunchError:
            local.close()
            raise

    def _change(self) -> list[str] | None:
        """None for a new run, else the accepted changes against its recipe."""
        if not self.run.recipe.exists():
            return None
        old = Recipe.read(self.run.recipe)
        finished = {s for s in old.stages if (self.run.stage(s) / "handoff.json").exists()}
        begun = any((self.run.path / "stages").glob("*"))  # before the first stage there is nothing that a change could spoil
        return [str(d) for d in check_change(self.run, old, self.recipe, finished, accept=self.accept_changes or not begun)]

    def _finished(self, journal: Journal, changes: list[str] | None) -> set[str]:
        if changes is None:
            return set()
        return set(self.run.finished(self.recipe, accepted_digests(self.recipe, journal)))

    def _check_before(self, done: set[str]) -> None:
        before = self.recipe.stages[: self.recipe.stages.index(self.stages[0])]
        missing = [s for s in before if s not in done]
        if missing:
            raise LaunchError(
                f"--from {self.stages[0]}: stage '{missing[0]}' before it is not finished in run '{self.run.name}', so there is no model to "
                f"start from; leave out --from, or use --from {missing[0]}"
            )

    def _record_recipe(self, changes: list[str] | None) -> None:
        if changes is None or changes:
            for change in changes or []:
                self.console.print(f"recipe changed: {change}")
            self.recipe.write(self.run.recipe)
            self.journal.append("run", format=JOURNAL_FORMAT, recipe_digest=self.recipe.digest(), changes=changes or [])

    def _run(self, jobs: LocalJobs | DockerJobs, todo: list[str]) -> int:
        self.journal.append(
            "launch",
            pid=os.getpid(),
            process_started=processes.started_at(os.getpid()),
            host=socket.gethostname(),
            stages=todo,
            **(jobs.code.journal() if isinstance(jobs, DockerJobs) else {}),
        )
        self.progress.refresh()
        self.console.print(
            f"run {self.run.name}: {len(todo)} of {len(self.recipe.stages)} stages to go; folder {self.run.path}",
        )
        code, reason = 1, "the launcher failed"
        try:
            with Signals() as self.signals:
                code, reason = self._prepare_data(jobs)
                if code == 0:
                    with View(self.progress, self.console) as self.view:
                        code, reason = self._run_stages(jobs, todo)
        except LaunchError as error:
            reason = str(error)
            raise
        finally:
            jobs.close()
            self.journal.append("end", exit_code=code, reason=reason)
        self._report()
        self.progress.refresh()
        if code == 0 and self.progress.state == "finished":
            print_summary(self.progress, self.console)
        elif code == 0:
            left = [s.stage for s in self.progress.stages if s.state != "finished"]
            self.console.print(
                f"finished up to {todo[-1]}; not yet: {', '.join(left)}; report: {self.run.report}", soft_wrap=True
            )
        return code

    def _prepare_data(self, jobs: LocalJobs | DockerJobs) -> tuple[int, str]:
        job = stage_job.data_job(self.recipe, self.run.path, last=self.last, data_command=self.data_command)
        self._wait_for_strays(jobs, job)
        shown = LogTail(job.log)
        begun = time.monotonic()

        def show() -> None:
            for line in shown.poll():
                if not line.startswith("===="):  # the wrapper's marks in the log
                    self.console.print(f"[data] {line}", soft_wrap=True)

        in_docker = isinstance(jobs, DockerJobs)
        attempt = self._intent(jobs, job, "docker" if in_docker else "direct")
        with (
            self._starting(job, attempt),
            jobs.submit(job, attempt) if in_docker else start_directly(job, attempt) as submitted,
        ):
            self._submitted(job, attempt, submitted)
            code, reason = self._follow(job, attempt, submitted, show)
        show()
        if self.signals.received is not None:
            return 128 + self.signals.received, "stopped while the data was prepared"
        if code != 0:
            self.console.print(f"the data could not be prepared: {reason}; whole log: {job.log}", style="bold red")
            return (code if code and code > 0 else 1), f"data: {reason}"
        self.console.print(f"[data] ready after {time.monotonic() - begun:.1f} s")
        return 0, ""

    def _run_stages(self, jobs: LocalJobs | DockerJobs, todo: list[str]) -> tuple[int, str]:
        for stage in todo:
            job = self.jobs[stage]
            starts = 0
            while True:
                starts += 1
                decision = self._attempt(jobs, job, starts)
                if decision.action != "again":
                    break
                self.view.say(f"[{stage}] {decision.reason}")
            if decision.action == "stop":
                self._explain(job, decision)
                return decision.exit_code, f"{stage}: {decision.reason}"
        return 0, "finished"

    def _attempt(self, jobs: LocalJobs | DockerJobs, job: StageJob, starts: int) -> policy.Decision:
        """Start the stage once (or wait for a job of it that still runs) and decide what follows."""
        stage = job.stage
        step_before = checkpoint_step(job)
        attempt = self._wait_for_strays(jobs, job)
        attached = attempt is not None
        if attempt is not None:
            code, reason = self._outcome(stage, attempt)
        else:
            jobs.ready()
            if self.signals.received is not None:
                return policy.Decision(
                    "stop", "asked to stop before it was started", policy.SAME_COMMAND, 128 + self.signals.received
                )
            attempt = self._intent(jobs, job, "docker" if isinstance(jobs, DockerJobs) else "local")
            with self._starting(job, attempt), jobs.submit(job, attempt) as submitted:
                self._submitted(job, attempt, submitted)
                self._report()  # while the stage imports what it needs, so that the chain does not wait for it
                self.view.update(force=True)
                code, reason = self._follow(job, attempt, submitted, self.view.update)
        self.view.update(force=True)
        decision = policy.decide(
            code,
            reason=reason,
            handed_off=self.run.handoff(stage) is not None,
            step_before=step_before,
            step_after=checkpoint_step(job),
            starts=starts,
            stop_signal=self.signals.received,
            attached=attached,
        )
        self.journal.append("decision", stage=stage, attempt=attempt, decision=decision.action, reason=decision.reason)
        return decision

    @contextlib.contextmanager
    def _starting(self, job: StageJob, attempt: int) -> Iterator[None]:
        try:
            yield
        except (OSError, SubmissionFailed) as error:
            self.journal.append("submission_failed", stage=job.stage, attempt=attempt, reason=str(error))
            raise LaunchError(f"stage '{job.stage}' could not be submitted: {error}") from error

    def _intent(self, jobs: LocalJobs | DockerJobs, job: StageJob, executor: str) -> int:
        self.journal.poll()
        attempt = attempts(self.journal.rows, job.stage) + 1
        job = jobs.for_container(job) if isinstance(jobs, DockerJobs) else job
        job.write()
        self.journal.append("intent", stage=job.stage, attempt=attempt, executor=executor, command=job.command)
        return attempt

    def _submitted(self, job: StageJob, attempt: int, submitted: Submitted) -> None:
        more = {"executor": "docker", "image": submitted.image} if isinstance(submitted, RunningContainers) else {}
        self.journal.append("submitted", stage=job.stage, attempt=attempt, job=submitted.job, **more)

    def _wait_for_strays(self, jobs: LocalJobs | DockerJobs, job: StageJob) -> int | None:
        """Wait for what an earlier launcher left of this stage; returns its attempt, None if there was nothing."""
        submitted: Strays | StrayContainers | None
        if isinstance(jobs, DockerJobs):
            submitted = jobs.strays(job)
            found: dict[str, Any] = {"container": submitted.job} if submitted else {}
            what = f"container {submitted.job}" if submitted else ""
        else:
            pids = sorted(p.pid for p in processes.stage_processes(Path(job.stage_dir)))
            submitted = Strays(Path(job.stage_dir)) if pids else None
            found, what = {"pids": pids}, f"processes {', '.join(map(str, pids))}"
        if submitted is None:
            return None
        self.journal.poll()
        attempt = max(1, attempts(self.journal.rows, job.stage))
        self.journal.append("attached", stage=job.stage, attempt=attempt, **found)
        self.console.print(
            f"stage '{job.stage}' still runs ({what}), left by a launcher that was killed: waiting for it "
            f"instead of starting it twice. Ctrl-C makes it save and stop.",
            style="yellow",
        )
        self._follow(job, attempt, submitted, self.view.update if job.stage != DATA else lambda: None)
        return attempt

    def _follow(self, job: StageJob, attempt: int, submitted: Submitted, show: Callable[[], None]) -> tuple[int | None, str]:
        """Wait for the job's outcome, show progress, pass on signals."""
        next_alive = time.monotonic() + ALIVE_INTERVAL_SECONDS
        forwarded = 0
        stray = isinstance(submitted, (Strays, StrayContainers))
        while True:
            self.journal.poll()
            ended = last_outcome(self.journal.rows, job.stage)
            if ended is not None and ended["attempt"] == attempt and not stray:
                return ended.get("exit_code"), ended.get("reason", "")
            if self.signals.count > forwarded:
                forwarded = self.signals.count
                self._forward(job, attempt, submitted)
            if time.monotonic() >= next_alive:
                next_alive = time.monotonic() + ALIVE_INTERVAL_SECONDS
                if not submitted.alive():
                    # Nothing of a container outlives it.
                    contained = isinstance(submitted, RunningContainers)
                    return self._outcome(job.stage, attempt) if contained else self._settle(job, attempt)
            show()
            time.sleep(POLL_SECONDS)

    def _settle(self, job: StageJob, attempt: int) -> tuple[int | None, str]:
        """The job is gone: wait until nothing of it lives (ranks may still save), then read its outcome if it wrote one."""
        waited = Strays(Path(job.stage_dir))
        killed_at = 0
        while waited.alive():
            if self.signals.count > killed_at:
                killed_at = self.signals.count
                self._forward(job, attempt)
            time.sleep(POLL_SECONDS)
        return self._outcome(job.stage, attempt)

    def _outcome(self, stage: str, attempt: int) -> tuple[int | None, str]:
        self.journal.poll()
        row = last_outcome(self.journal.rows, stage)
        if row is None or row["attempt"] != attempt:
            return None, "its job ended without a trace"
        return row.get("exit_code"), row.get("reason", "")

    def _forward(self, job: StageJob, attempt: int, submitted: Submitted | None = None) -> None:
        """First request: SIGTERM to the wrapper (which makes the stage save). A second one: kill."""
        name = signal.Signals(self.signals.received or signal.SIGTERM).name
        self.journal.append("signal", signal=name, stage=job.stage)
        again = self.signals.count > 1
        if again:
            said = f"{name} again: killing stage '{job.stage}'; it will go on from its last checkpoint"
        else:
            said = f"{name}: stage '{job.stage}' saves and stops (once more kills it)"
        self.console.print(said, style="yellow")
        if isinstance(submitted, RunningContainers):
            submitted.stop(kill=again)
            return
        live = processes.stage_processes(Path(job.stage_dir))
        if again:
            processes.end_all(live, 0.0)
            return
        started = [r for r in stage_rows(self.journal.rows, job.stage) if r["event"] == "started" and r["attempt"] == attempt]
        wrapper = (
            started[-1]["pid"] if started and processes.is_alive(started[-1]["pid"], started[-1]["process_started"]) else None
        )
        for process in live:
            if wrapper in (None, process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGTERM)

    def _explain(self, job: StageJob, decision: policy.Decision) -> None:
        lines = tail(job.log, LOG_TAIL_LINES)
        if lines and decision.exit_code not in (128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGHUP):
            self.view.say(f"last lines of {job.log}:", "dim")
            for line in lines:
                self.view.say(f"  {line}")
        self.view.say(f"stage '{job.stage}' stopped the chain: {decision.reason}", "bold red" if lines else "yellow")
        later = self.recipe.stages[self.recipe.stages.index(job.stage) + 1 :]
        if later:
            self.view.say(f"not started: {', '.join(later)}")
        self.view.say(f"what to do: {decision.remedy}", "bold")

    def _report(self) -> None:
        from launchers.report import write_report

        self.progress.refresh()
        write_report(self.progress, self.run.report)


def check_cluster(recipe: Recipe) -> None:
    """LaunchError unless the recipe says all that its kind of cluster needs to start jobs (Slurm: asked when it submits)."""
    if recipe.cluster.kind == "docker":
        from launchers.docker_container import options_of

        options_of(recipe)


def select(stages: list[str], first: str | None, last: str | None) -> list[str]:
    """The stages from `first` to `last`, both included; LaunchError for a name that is none, or an empty choice."""
    for option, name in (("--from", first), ("--to", last)):
        if name is not None and name not in stages:
            raise LaunchError(f"{option} {name}: no such stage; stages: {', '.join(stages)}")
    begin = stages.index(first) if first else 0
    end = stages.index(last) + 1 if last else len(stages)
    if begin >= end:
        raise LaunchError(f"--from {first} lies behind --to {last}; stages in order: {', '.join(stages)}")
    return stages[begin:end]
