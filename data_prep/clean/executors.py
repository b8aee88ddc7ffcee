"""Who runs the tasks of a stage: datatrove's executors, in this process or in a pool of processes (as Slurm jobs: slurm.py).

All mark finished tasks in `<work>/<stage>/completions`, so that a stage that was cut off goes on with the tasks that are missing, also
when another executor takes over.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import multiprocess
from datatrove.executor import LocalPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger

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
    weights: tuple[int, ...] = ()
    """Cost of each task, relative to the others; the dearest are started first, so that none is left to run alone at the end."""


POOL_MIN_BYTES = 4 << 20
"""Below it, a stage runs in this process: starting workers takes about as long as filtering this much."""


class InProcess(PipelineExecutor):
    """Tasks one after the other in this process, without logs; LocalPipelineExecutor starts a process even for one worker."""

    def __init__(self, pipeline: list[PipelineStep], tasks: int, logging_dir: str):
        super().__init__(pipeline, logging_dir)
        self.tasks = tasks

    @property
    def world_size(self) -> int:
        return self.tasks

    def get_distributed_env(self, node_rank: int = -1) -> Any:
        # datatrove demands the method, for the environment of tasks that it starts; run() below starts none.
        raise AssertionError("tasks of this process have no environment of their own")

    def run(self) -> None:
        for rank in self.get_incomplete_ranks():
            for step in self.pipeline:
                step(None, rank, self.tasks)
            self.mark_rank_as_completed(rank)


class Pool(LocalPipelineExecutor):
    """datatrove's local executor, silent: its log would tear a progress bar, and an error reaches the caller anyway."""

    weights: tuple[int, ...] = ()

    def get_incomplete_ranks(self, ranks: Any = None, skip_completed: bool | None = None) -> list[int]:
        found = super().get_incomplete_ranks(ranks, skip_completed)
        return sorted(found, key=lambda rank: -self.weights[rank]) if self.weights else found

    def _launch_run_for_rank(self, rank: int, ranks_q: Any, completed: Any = None, completed_lock: Any = None) -> Any:
        with quiet():
            return super()._launch_run_for_rank(rank, ranks_q, completed, completed_lock)


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


def forget(stage: Stage, work: Path) -> None:
    """Let the whole stage run again."""
    shutil.rmtree(work / stage.name, ignore_errors=True)


def run_local(stage: Stage, work: Path, workers: int) -> bool:
    """Run what is missing of a stage; exceptions of a task arrive as they were raised. Returns whether anything was missing."""
    if is_complete(work, stage):
        return False
    folder = str(work / stage.name)
    with quiet():
        if workers == 1 or stage.tasks == 1 or stage.bytes < POOL_MIN_BYTES:
            InProcess([stage.step], stage.tasks, folder).run()
            return True
        # Not fork: the caller may have threads, which it does not survive. Only the package multiprocess is set, not Python's own.
        multiprocess.set_start_method("forkserver", force=True)
        multiprocess.set_forkserver_preload(PRELOADED)
        pool = Pool([stage.step], tasks=stage.tasks, workers=min(workers, stage.tasks), logging_dir=folder)
        pool.weights = stage.weights
        pool.run()
    return True


OPEN_FILES_RESERVE = 256
"""Beside one file per shard."""


def raise_open_files(wanted: int) -> int:
    """Raise this process's (and its children's) limit of open files towards `wanted`; returns what it is now."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        soft = allowed
    return wanted if soft == resource.RLIM_INFINITY else soft
