"""A cleaning as Slurm array jobs: datatrove's Slurm executor, one job per stage, each after the one before succeeded.

The jobs do all but the end: `clean` in a process then finds every stage complete, writes the records and removes the work folder.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from data_prep.clean.cleaner import Job
from data_prep.clean.offline import OFFLINE
from data_prep.clean.shards import SourceText
from data_prep.clean.submitted import job_name, note_jobs
from data_prep.errors import DataError
from recipes.schema import Recipe


@dataclass(frozen=True)
class Slurm:
    """What each array job asks for; a task has one CPU."""

    partition: str | None
    time: str = "24:00:00"
    account: str | None = None
    qos: str | None = None
    reservation: str | None = None
    constraint: str | None = None
    tasks_at_once: int = 256
    memory_gb: int = 8
    """Of a task: the words and hashes of a shard's longest documents; a shard of 32 MiB of short ones needs 1 GB."""


def submit(recipe: Recipe, root: Path, inputs: dict[str, SourceText], slurm: Slurm) -> list[tuple[str, str]]:
    """Submit the stages that are not complete; returns (stage, job id) of each, none where there is nothing to do.

    Code, environment and data root must lie where all nodes see them. DataError without `sbatch` or a partition.
    """
    job = Job.of(recipe, root.resolve(), inputs)
    if job.current() is not None:
        return []
    if shutil.which("sbatch") is None:
        raise DataError("there is no command sbatch here; submit from a login node, or clean without --slurm")
    if not slurm.partition:
        raise DataError(
            "cluster.options.partition is null; name the partition that the jobs run in: cluster.options.partition=NAME"
        )
    from data_prep.clean.array_job import ArrayJob
    from data_prep.clean.executors import forget, is_complete, quiet

    job.begin()
    asked = {"account": slurm.account, "reservation": slurm.reservation, "constraint": slurm.constraint}
    submitted: list[tuple[str, str]] = []
    before: tuple[str, ...] = ()
    tasks: dict[str, int] = {}
    for stage in [job.filter_stage(), *job.duplicate_stages(), job.apply_stage()]:
        if before:  # what comes after it is not complete, whatever was done before
            forget(stage, job.work)
        if is_complete(job.work, stage):
            continue
        tasks[stage.name] = stage.tasks
        executor = ArrayJob(
            pipeline=[stage.step],
            tasks=stage.tasks,
            time=slurm.time,
            partition=slurm.partition,
            workers=min(slurm.tasks_at_once, stage.tasks),
            mem_per_cpu_gb=slurm.memory_gb,
            job_name=job_name(stage.name),
            qos=slurm.qos,
            sbatch_args={key: value for key, value in asked.items() if value},
            env_command=_environment(),
            logging_dir=str(job.work / stage.name),
            after=before,
        )
        try:
            with quiet():
                executor.launch_job()
        except DataError as error:
            used = {"partition": slurm.partition, "time": slurm.time, "qos": slurm.qos, **asked}
            options = " ".join(f"cluster.options.{key}={value}" for key, value in used.items() if value)
            taken = [*(job_id for _, job_id in submitted), *executor.job_ids]
            lines = [f"{error}; asked for with {options} --memory-gb {slurm.memory_gb}, which are yours to change"]
            if taken:
                lines.append(
                    f"jobs {', '.join(taken)} were submitted before and go on; run it again when they are done, or cancel them: "
                    f"scancel {' '.join(taken)}"
                )
            raise DataError("\n".join(lines)) from None
        finally:
            submitted += [(stage.name, job_id) for job_id in executor.job_ids]
            note_jobs(job.work, submitted, tasks)
        before = tuple(executor.job_ids)
    return submitted


def _environment() -> str:
    """Shell lines that give a job this interpreter's commands, this code and no network."""
    code = Path(__file__).resolve().parents[2]
    commands = shlex.quote(str(Path(sys.executable).parent))
    lines = [f"export {key}={value}" for key, value in OFFLINE.items()]
    # An empty entry at the end would be the folder that the job starts in.
    path = f'export PYTHONPATH={shlex.quote(str(code))}"${{PYTHONPATH:+:$PYTHONPATH}}"'
    return "\n".join([*lines, f'export PATH={commands}:"$PATH"', path])
