"""The Slurm jobs that clean a data root: written down when they are submitted, asked for before anything below the root is touched.

Jobs hold no lock. Who would clean, prepare or submit beside them would remove the files that they are writing.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from data_prep.errors import DataError
from data_prep.files import write_json

NAME = "slurm_jobs.json"
"""In the work folder of a cleaning: ids of the jobs submitted for it, removed with the folder."""
PREFIX = "clean-"
"""Of the jobs' names; squeue is asked by name, because it fails for an id that it has forgotten."""
STATES = "PENDING,CONFIGURING,RUNNING,SUSPENDED,COMPLETING"
"""In which a job may still write. States like REQUEUE_HOLD are one of these with a flag."""
TIMEOUT_SECONDS = 30.0


def job_name(stage: str) -> str:
    return PREFIX + stage


def note_jobs(work: Path, jobs: list[tuple[str, str]], tasks: dict[str, int]) -> None:
    """Write down (stage, job id) and how many tasks each stage has; the file is whole at any time."""
    write_json(work / NAME, {"jobs": [{"stage": stage, "job": job, "tasks": tasks[stage]} for stage, job in jobs]})


def noted_jobs(root: Path) -> list[tuple[str, str]]:
    """(stage, job id) of all that was submitted for `root`, has tasks that are not done, and is not finished by a `clean`."""
    found = []
    for path in sorted((root / "clean" / ".work").glob(f"*/{NAME}")):
        for entry in json.loads(path.read_bytes())["jobs"]:
            done = sum(1 for _ in (path.parent / entry["stage"] / "completions").glob("*"))
            if done < entry["tasks"]:
                found.append((entry["stage"], entry["job"]))
    return found


def refuse_while_jobs_run(root: Path) -> None:
    """DataError while jobs submitted for `root` wait or run, or where nobody can tell. The caller holds the root's lock.

    Where all tasks are done nobody is asked: a container on the cluster, which prepares the rest, may have no squeue.
    """
    jobs = noted_jobs(root)
    if not jobs:
        return
    names = sorted({job_name(stage) for stage, _ in jobs})
    files = ", ".join(map(str, sorted((root / "clean" / ".work").glob(f"*/{NAME}"))))
    unknown = (
        f"jobs that clean {root} were submitted ({', '.join(job for _, job in jobs)}), and whether they still run is unknown: "
    )
    remedy = f"; if you know that they do not, remove {files}"
    asked = ["squeue", "--noheader", f"--states={STATES}", f"--name={','.join(names)}", "--format=%F"]
    try:
        done = subprocess.run(
            asked, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, stdin=subprocess.DEVNULL, check=False
        )
    except FileNotFoundError:
        raise DataError(f"{unknown}there is no command squeue here; use a login node{remedy}") from None
    except subprocess.TimeoutExpired:
        raise DataError(f"{unknown}squeue gave no answer within {TIMEOUT_SECONDS:g} s; try again{remedy}") from None
    if done.returncode:
        raise DataError(f"{unknown}squeue failed: {done.stderr.strip()}{remedy}")
    live = set(done.stdout.split())
    left = [job for _, job in jobs if job in live]
    if left:
        raise DataError(
            f"jobs that clean {root} wait or run: {', '.join(left)}; wait until `squeue -j {','.join(left)}` shows none, or cancel "
            f"them (scancel {' '.join(left)}), and run it again"
        )
