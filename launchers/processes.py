"""Which processes of a stage are alive on this machine: two trainers must never write into one stage's folder.

A process id alone proves nothing (ids are used again), so a process is known by its id and start time, or by the environment variable
that every process of a stage inherits, whatever session or parent it has got meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import psutil

STAGE_DIR_VARIABLE = "QUARRY_STAGE_DIR"
"""Absolute folder of the stage, in the environment of its wrapper, its command and all ranks."""

START_TIME_TOLERANCE_SECONDS = 2.0  # psutil derives the start from the boot time, which moves when the clock is set


def started_at(pid: int) -> float | None:
    """Start time of a live process in seconds since the epoch; None if there is none (a zombie counts as dead)."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None


def is_alive(pid: int, process_started: float) -> bool:
    """Whether the process that had this id at that time still runs."""
    now = started_at(pid)
    return now is not None and abs(now - process_started) < START_TIME_TOLERANCE_SECONDS


def stage_processes(stage_dir: Path) -> list[psutil.Process]:
    """Live processes of this user that belong to the stage, found by their environment."""
    wanted = str(stage_dir.resolve())
    found = []
    for process in psutil.process_iter():
        # Processes of others, kernel threads and those that end meanwhile have no readable environment: they are not ours.
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(STAGE_DIR_VARIABLE) == wanted:
                found.append(process)
    return found


def end_all(processes: list[psutil.Process], grace_seconds: float) -> None:
    """SIGTERM, then SIGKILL to those that are left after `grace_seconds`."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    deadline = time.monotonic() + grace_seconds
    _, left = psutil.wait_procs(processes, timeout=max(0.0, deadline - time.monotonic()))
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=5)
