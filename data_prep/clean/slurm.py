"""A cleaning as Slurm array jobs: datatrove's Slurm executor, one job per stage, each after the one before succeeded.

The jobs do all but the end: `clean` in a process then finds every stage complete, writes the records and removes the work folder.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from data_prep.clean.cleaner import Job
from data_prep.clean.offline import OFFLINE
from data_prep.clean.shards import SourceText
from data_prep.errors import DataError
from recipes.schema import Recipe


@dataclass(frozen=True)
class Slurm:
    """What each array job asks for; a task has one CPU."""

    partition: str | None
    time: str = "24:00:00"
    account: str | None = None
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
    from datatrove.executor import SlurmPipelineExecutor

    from data_prep.clean.executors import is_complete, quiet

    job.begin()
    submitted: list[tuple[str, str]] = []
    for stage in [job.filter_stage(), *job.duplicate_stages(), job.apply_stage()]:
        if is_complete(job.work, stage):
            continue
        executor = SlurmPipelineExecutor(
            pipeline=[stage.step],
            tasks=stage.tasks,
            time=slurm.time,
            partition=slurm.partition,
            workers=min(slurm.tasks_at_once, stage.tasks),
            mem_per_cpu_gb=slurm.memory_gb,
            job_name=f"clean-{stage.name}",
            qos=None,
            sbatch_args={"account": slurm.account} if slurm.account else {},
            env_command=_environment(),
            logging_dir=str(job.work / stage.name),
            depends_job_id=submitted[-1][1] if submitted else None,
        )
        with quiet():
            executor.run()
        submitted.append((stage.name, str(executor.job_id)))
    return submitted


def _environment() -> str:
    """Shell lines that give a job this interpreter's commands, this code and no network."""
    code = Path(__file__).resolve().parents[2]
    lines = [f"export {key}={value}" for key, value in OFFLINE.items()]
    return "\n".join([*lines, f"export PATH={Path(sys.executable).parent}:$PATH", f"export PYTHONPATH={code}:$PYTHONPATH"])
