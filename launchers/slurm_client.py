"""The few questions that Quarry asks Slurm itself: which of a run's jobs live, and an order to cancel some. Never waits for ever."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Sequence

from launchers.errors import LaunchError

TIMEOUT_SECONDS = 30.0
"""A controller that is restarted answers within seconds; clients without one would wait much longer."""
LIVE_STATES = {
    *(
        "PENDING",
        "RUNNING",
        "SUSPENDED",
        "COMPLETING",
        "CONFIGURING",
        "REQUEUED",
        "RESIZING",
        "SIGNALING",
        "STAGE_OUT",
        "STOPPED",
    ),
    *("REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"),
}


def client(arguments: Sequence[str]) -> str:
    """Output of a Slurm command; LaunchError when it fails or does not answer."""
    try:
        done = subprocess.run(
            arguments, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, stdin=subprocess.DEVNULL, check=False
        )
    except FileNotFoundError:
        raise LaunchError(
            f"{arguments[0]} is not installed here: launch from a login node of the cluster, or use cluster=local"
        ) from None
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"{arguments[0]} gave no answer within {TIMEOUT_SECONDS:g} s: is slurmctld up (`scontrol ping`)? Nothing was changed; try again"
        ) from None
    if done.returncode != 0:
        raise LaunchError(
            f"{' '.join(arguments)} failed with exit code {done.returncode}: {done.stderr.strip() or done.stdout.strip()}"
        )
    return done.stdout


def live_jobs(names: Iterable[str]) -> dict[str, str]:
    """Name -> id of the user's jobs that wait or run, for those of `names` that have one (the newest if there are more)."""
    wanted = set(names)
    found: dict[str, str] = {}
    for line in client(["squeue", "--me", "--noheader", "--states=all", "--format=%i|%T|%j"]).splitlines():
        job, state, name = line.strip().split("|", 2)
        if name in wanted and state in LIVE_STATES and int(job) > int(found.get(name, "0")):
            found[name] = job
    return found


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs, the last first, so that none starts because another went away."""
    if jobs:
        client(["scancel", *reversed(jobs)])
