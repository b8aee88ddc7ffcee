"""Who runs the tasks of a stage: datatrove's executors, in this process, in a pool of processes, or as Slurm jobs.

All mark finished tasks in `<work>/<stage>/completions`, so that a stage that was cut off goes on with the tasks that are missing, also
when another executor takes over.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import multiprocess
from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from data_prep.clean.offline import OFFLINE

PRELOADED = ["data_prep.clean.filtering", "data_prep.clean.applying"]
"""Imported once by the server that forks the workers, which then start in milliseconds."""


@dataclass(frozen=True)
class Stage:
    """Independent tasks of one kind."""

    name: str
    step: PipelineStep
    tasks: int
    bytes: int
    """Of input; decides whether processes are worth starting."""


@dataclass(frozen=True)
class Slurm:
    """What an array job of a stage asks for."""

    partition: str
    time: str = "24:00:00"
    account: str | None = None
    qos: str | None = None
    tasks_at_once: int = 256
    memory_gb: int = 8
    """Of a task: a shard's text, its words and hashes many times over; measured below 2 GB for 32 MiB shards of web text."""


POOL_MIN_BYTES = 4 << 20
"""Below it, a stage runs in this process: starting workers takes about as long as filtering this much."""


class InProcess(PipelineExecutor):
    """Tasks one after the other in this process; LocalPipelineExecutor starts a process even for one worker."""

    def __init__(self, pipeline: list[PipelineStep], tasks: int, logging_dir: str):
        super().__init__(pipeline, logging_dir)
        self.tasks = tasks

    @property
    def world_size(self) -> int:
        return self.tasks

    def get_distributed_env(self, node_rank: int = -1) -> dict[str, str]:
        keys = ("node_ips", "cpus_per_task", "mem_per_cpu", "gpus_on_node")
        return {**{f"datatrove_{key}": "-1" for key in keys}, "datatrove_executor": "LOCAL"}

    def run(self) -> None:
        pipeline = self.pipeline
        for rank in self.get_incomplete_ranks():
            self.pipeline = deepcopy(pipeline)
            self._run_for_rank(rank)
        self.pipeline = pipeline


class Pool(LocalPipelineExecutor):
    """datatrove's local executor, silent: its log would tear a progress bar, and an error reaches the caller anyway."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        with quiet():
            return super()._run_for_rank(rank, local_rank, node_rank)


@contextmanager
def quiet() -> Iterator[None]:
    """Without datatrove's messages."""
    logger.disable("datatrove")
    try:
        yield
    finally:
        logger.enable("datatrove")


def completion(work: Path, stage: str, rank: int) -> Path:
    return work / stage / "completions" / f"{rank:05d}"


def is_complete(work: Path, stage: Stage) -> bool:
    return all(completion(work, stage.name, rank).exists() for rank in range(stage.tasks))


def run_local(stage: Stage, work: Path, workers: int) -> None:
    """Run what is missing of a stage; exceptions of a task arrive as they were raised."""
    if is_complete(work, stage):
        return
    folder = str(work / stage.name)
    with quiet():
        if workers == 1 or stage.tasks == 1 or stage.bytes < POOL_MIN_BYTES:
            InProcess([stage.step], stage.tasks, folder).run()
            return
        # Not fork: the caller may have threads, which it does not survive. Only the package multiprocess is set, not Python's own.
        multiprocess.set_start_method("forkserver", force=True)
        multiprocess.set_forkserver_preload(PRELOADED)
        Pool([stage.step], tasks=stage.tasks, workers=min(workers, stage.tasks), logging_dir=folder).run()


def submit(stages: list[Stage], work: Path, slurm: Slurm, name: str) -> list[str]:
    """Submit all stages, each after the one before succeeded; returns the job ids in order.

    Each task is one CPU. Needs `sbatch`, and this installation and the data root on a file system that all nodes see.
    """
    jobs: list[str] = []
    for stage in stages:
        if is_complete(work, stage):
            continue
        executor = SlurmPipelineExecutor(
            pipeline=[stage.step],
            tasks=stage.tasks,
            time=slurm.time,
            partition=slurm.partition,
            workers=slurm.tasks_at_once,
            mem_per_cpu_gb=slurm.memory_gb,
            job_name=f"{name}-{stage.name}",
            qos=slurm.qos,
            sbatch_args={"account": slurm.account} if slurm.account else {},
            env_command="\n".join([*(f"export {key}={value}" for key, value in OFFLINE.items()), _environment()]),
            logging_dir=str(work / stage.name),
            depends_job_id=jobs[-1] if jobs else None,
        )
        with quiet():
            executor.run()
        jobs.append(str(executor.job_id))
    return jobs


def _environment() -> str:
    """Shell line that gives a job this interpreter's commands and this code."""
    code = Path(__file__).resolve().parents[2]
    return f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}"


def raise_open_files(wanted: int) -> int:
    """Raise this process's (and its children's) limit of open files towards `wanted`; returns what it is now."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        soft = allowed
    return wanted if soft == resource.RLIM_INFINITY else soft
