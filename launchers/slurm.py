"""Submits the stages of a run to Slurm, all at once, each after the one before; run again, it submits only what is missing.

What lives is asked of Slurm by job name, so that a launcher that was killed between a submission and its line in the journal leaves no
job twice. A stage whose job is gone is submitted again, and everything behind it too (Slurm lets a job start after a dependency that
it has forgotten, so a new job never depends on an id that was not seen alive just now).
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from launchers import processes, slurm_client, stage_job
from launchers.code_snapshot import Code
from launchers.errors import LaunchError
from launchers.journal import attempts
from launchers.local import LocalJobs
from launchers.slurm_script import SlurmScripts, options_of
from launchers.stage_job import DATA, StageJob

if TYPE_CHECKING:
    from launchers.chain import Launch


def scripts(launch: Launch, code: Code) -> SlurmScripts:
    nemo = LocalJobs(launch.run.path / ".nemo-run")  # only its import of nemo-run in a folder of the run
    module = nemo.ready()
    module.config.set_nemorun_home(str((launch.run.path / ".nemo-run").resolve()))
    return SlurmScripts(module, launch.recipe, launch.run.path, code.path)


def jobs_of(launch: Launch) -> dict[str, StageJob]:
    """The job of the data and of every stage, in order."""
    data = stage_job.data_job(launch.recipe, launch.run.path, last=launch.last, data_command=launch.data_command)
    return {DATA: data, **launch.jobs}


def dryrun(launch: Launch, done: set[str]) -> int:
    """Write the scripts of all jobs that a launch would submit to RUN/scripts, and print them."""
    options_of(launch.recipe)
    folder = launch.run.path / "scripts"
    folder.mkdir(parents=True, exist_ok=True)
    made = scripts(launch, Code.of(launch.recipe, launch.run.path))
    for stage, job in jobs_of(launch).items():
        if stage in done or (stage != DATA and stage not in launch.stages):
            continue
        path = folder / f"{stage}.sh"
        path.write_text(made.script(job, 1))
        launch.console.print(f"\n==== {path}", markup=False, soft_wrap=True)
        launch.console.print(path.read_text(), markup=False, soft_wrap=True)
    return 0


def submit(launch: Launch, todo: list[str]) -> int:
    """Submit what is missing of `todo`; called with the run's lock held and its recipe written. Returns 0."""
    options_of(launch.recipe)
    all_jobs = jobs_of(launch)
    code = Code.of(launch.recipe, launch.run.path)
    code.write()
    made = scripts(launch, code)
    names = {stage: made.job_name(stage) for stage in all_jobs}
    alive = slurm_client.live_jobs(names.values())
    live = {stage: alive[name] for stage, name in names.items() if name in alive}
    order = [DATA, *todo] if todo and todo[0] not in live else todo
    _journal_launch(launch, todo, code)
    submitted: list[str] = []
    before: str | None = None
    again = False
    for stage in order:
        if stage in live and not again:
            before = live[stage]
            _adopt(launch, stage, before)
            launch.console.print(f"{stage:<20} job {before} waits or runs already")
            continue
        if stage in live:
            slurm_client.cancel([live[stage]])
            launch.journal.append(
                "cancel", stage=stage, job=live[stage], reason="a job before it is gone; it is submitted anew"
            )
        again = True
        try:
            before = _submit(launch, made, code.job(all_jobs[stage]), before)
        except LaunchError as error:
            _undo(launch, submitted)
            raise LaunchError(
                f"stage '{stage}' could not be submitted: {error}; "
                + (
                    f"cancelled what was submitted before it (jobs {', '.join(submitted)})"
                    if submitted
                    else "nothing was submitted"
                )
            ) from error
        submitted.append(before)
        launch.console.print(f"{stage:<20} job {before}")
    launch.journal.append("end", exit_code=0, reason=f"{len(submitted)} jobs submitted")
    where = launch.run.name
    launch.console.print(
        f"{len(submitted)} jobs submitted, each after the one before; `quarry status {where}` follows, `quarry cancel {where}` ends them"
        if submitted
        else f"nothing to submit: every job is there; `quarry status {where}` follows"
    )
    return 0


def _submit(launch: Launch, made: SlurmScripts, job: StageJob, before: str | None) -> str:
    launch.journal.poll()
    attempt = attempts(launch.journal.rows, job.stage) + 1
    _write_for_job(made, job)
    launch.journal.append("intent", stage=job.stage, attempt=attempt, executor="slurm", command=job.command, after=before)
    try:
        number = made.submit(job, attempt, before)
    except LaunchError as error:
        launch.journal.append("submission_failed", stage=job.stage, attempt=attempt, reason=str(error))
        raise
    launch.journal.append("submitted", stage=job.stage, attempt=attempt, job=number, executor="slurm")
    return number


def _write_for_job(made: SlurmScripts, job: StageJob) -> None:
    """job.json with the Python of the nodes."""
    import sys
    from dataclasses import replace

    command = [made.python if word == sys.executable else word for word in job.command]
    replace(job, command=command).write()


def _adopt(launch: Launch, stage: str, number: str) -> None:
    """Write down a job that a killed launcher had submitted but not written down."""
    launch.journal.poll()
    rows = [row for row in launch.journal.rows if row.get("stage") == stage]
    if not any(row["event"] == "submitted" and row.get("job") == number for row in rows):
        attempt = max(1, attempts(rows, stage))
        launch.journal.append("submitted", stage=stage, attempt=attempt, job=number, executor="slurm", adopted=True)


def _undo(launch: Launch, submitted: list[str]) -> None:
    if not submitted:
        return
    slurm_client.cancel(submitted)
    for number in reversed(submitted):
        launch.journal.append("cancel", job=number, reason="a later stage could not be submitted")


def _journal_launch(launch: Launch, todo: list[str], code: Code) -> None:
    launch.journal.append(
        "launch",
        pid=os.getpid(),
        process_started=processes.started_at(os.getpid()),
        host=socket.gethostname(),
        stages=todo,
        executor="slurm",
        folder=str(Path.cwd()),
        **code.journal(),
    )
