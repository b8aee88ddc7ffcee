"""`quarry cancel`: ask whatever runs a run to stop and watch it save: its launcher here, stray stages, its containers or Slurm jobs."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import signal
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from launchers.errors import LaunchError
from launchers.run_arguments import add_run, add_runs_root

if TYPE_CHECKING:
    from launchers.journal import Journal
    from launchers.jsonl import Row
    from launchers.runs import RunFolder

POLL_SECONDS = 0.1
SAY_SECONDS = 10.0
"""Between two lines while a stage saves."""

EPILOG = """examples:
  quarry cancel smoke-tiny           the running stage saves and stops; the same launch goes on from there
  quarry cancel smoke-tiny --kill    at once, without saving: it goes on from its last checkpoint

Ctrl-C ends the waiting only. exit codes: 0 cancelled, or nothing was running; 2 no such run, or it runs on another machine.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "cancel",
        help="stop a run; the running stage saves",
        description="Stop a run, wherever it was launched from.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run(parser)
    parser.add_argument("--kill", action="store_true", help="do not let the stage save")
    add_runs_root(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    from launchers.runs import find_run

    return cancel(find_run(args.name, args.runs_root), kill=args.kill)


def cancel(run: RunFolder, *, kill: bool, say: Callable[[str], None] = lambda text: print(text, flush=True)) -> int:
    """Stop the run's launcher, its Slurm jobs and its stray stages, whichever there are; returns the exit code."""
    from launchers.journal import Journal

    journal = Journal.read(run.journal)
    launcher = live_launcher(journal.rows)
    if launcher is not None:
        _stop_launcher(run, launcher, journal, kill, say)
        found = True
    else:
        if is_locked(run):
            last = next((row for row in reversed(journal.rows) if row["event"] == "launch"), {})
            raise LaunchError(
                f"run '{run.name}' is held by a launcher that does not run on this machine (the last one: process {last.get('pid')} on "
                f"{last.get('host')}): run `quarry cancel {run.name}` there"
            )
        found = _cancel_slurm(journal, say)
    # Also behind a launcher: one that was killed in between leaves its stage.
    found = _stop_containers(run, journal, kill, say) or found
    found = _stop_strays(run, journal, kill, say) or found
    if not found:
        say(f"run {run.name}: nothing is running")
    return 0


def live_launcher(rows: list[Row]) -> Row | None:
    """The journal's last `launch` row if that process runs on this machine."""
    from launchers.processes import is_alive

    launch = next((row for row in reversed(rows) if row["event"] == "launch"), None)
    here = launch is not None and launch.get("host") == socket.gethostname()
    # The process may go on after its launch, for example in a test or a notebook: an `end` row says that the launch is over.
    over = launch is not None and any(row["event"] == "end" for row in rows[rows.index(launch) :])
    return launch if launch and here and not over and is_alive(launch["pid"], launch["process_started"]) else None


def is_locked(run: RunFolder) -> bool:
    """Whether a launcher holds the run, on whatever machine (as far as the file system's locks reach)."""
    try:
        with open(run.path / "lock") as f:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _stop_launcher(run: RunFolder, launch: Row, journal: Journal, kill: bool, say: Callable[[str], None]) -> None:
    from launchers.processes import is_alive

    pid = launch["pid"]
    say(f"asking the launcher (process {pid}) to stop{' and to kill the stage' if kill else '; the running stage saves'}")
    journal.append("cancel", reason="quarry cancel", pid=pid, kill=kill)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    # Its first SIGTERM makes the stage save, a second one kills it. It must have seen the first: equal signals do not queue.
    ask_again = kill
    rows = len(journal.rows)

    def over() -> bool:
        nonlocal ask_again, rows
        journal.poll()
        for row in journal.rows[rows:]:
            if row["event"] == "outcome":
                say(f"stage '{row['stage']}': {row.get('reason')}")
            if row["event"] == "signal" and ask_again:
                ask_again = False
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
        rows = len(journal.rows)
        ended = live_launcher(journal.rows) is None and not is_locked(run)  # its process may have more to do than this launch
        return ended or not is_alive(pid, launch["process_started"])

    _wait(over, say, "waiting for it to save; `quarry cancel --kill` does not wait")
    say("stopped; the same `quarry launch` continues it")


def _stop_strays(run: RunFolder, journal: Journal, kill: bool, say: Callable[[str], None]) -> bool:
    from launchers.journal import stage_rows
    from launchers.processes import end_all, is_alive, stage_processes
    from launchers.stage_job import DATA

    found = False
    for folder in (run.path / DATA, *sorted((run.path / "stages").glob("*"))):
        live = stage_processes(folder)
        if not live:
            continue
        found = True
        pids = sorted(p.pid for p in live)
        say(
            f"{folder.name}: processes {', '.join(map(str, pids))} run without a launcher; {'killing' if kill else 'ending'} them"
        )
        journal.append("cancel", reason="quarry cancel", stage=folder.name, pids=pids, kill=kill)
        if kill:
            end_all(live, 0.0)
            continue
        journal.poll()
        started = [row for row in stage_rows(journal.rows, folder.name) if row["event"] == "started"]
        wrapper = started[-1]["pid"] if started and is_alive(started[-1]["pid"], started[-1]["process_started"]) else None
        for process in live:
            if wrapper in (None, process.pid):  # the wrapper passes it on; told twice, a stage would not save better
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGTERM)
        _wait(lambda folder=folder: not stage_processes(folder), say, f"{folder.name}: waiting for them to save")
    return found


def _stop_containers(run: RunFolder, journal: Journal, kill: bool, say: Callable[[str], None]) -> bool:
    """Stop what runs in Docker without a launcher; their processes are the daemon's to tell, not this machine's list of processes."""
    if not any(row.get("executor") == "docker" for row in journal.rows):
        return False
    from launchers.docker_jobs import containers_of_run

    live = containers_of_run(run.path)
    for stage, containers in live.items():
        say(f"{stage}: container {containers.job} runs without a launcher; {'killing' if kill else 'ending'} it")
        journal.append("cancel", reason="quarry cancel", stage=stage, job=containers.job, kill=kill)
        containers.stop(kill=kill)
        _wait(lambda containers=containers: not containers.alive(), say, f"{stage}: waiting for it to save")
    return bool(live)


def _cancel_slurm(journal: Journal, say: Callable[[str], None]) -> bool:
    """Cancel the run's Slurm jobs that still live, the last stage first, so that none starts because another went away."""
    submitted = {
        row["job"]: row["stage"]
        for row in journal.rows
        if row["event"] == "submitted" and row.get("executor") == "slurm" and str(row.get("job", "")).isdigit()
    }
    if not submitted:
        return False
    from launchers import slurm_client

    states = dict(
        line.strip().split("|", 1)
        for line in slurm_client.client(["squeue", "--me", "--noheader", "--states=all", "--format=%i|%T"]).splitlines()
        if "|" in line
    )
    live = [job for job in submitted if states.get(job) in slurm_client.LIVE_STATES]
    if not live:
        return False
    for job in reversed(live):
        say(f"cancelling job {job} ({submitted[job]}, {states[job].lower()})")
        journal.append("cancel", stage=submitted[job], job=job, reason="quarry cancel")
    slurm_client.cancel(live)
    return True


def _wait(over: Callable[[], bool], say: Callable[[str], None], what: str) -> None:
    next_line = time.monotonic() + SAY_SECONDS
    while not over():
        if time.monotonic() >= next_line:
            say(what)
            next_line = time.monotonic() + SAY_SECONDS
        time.sleep(POLL_SECONDS)
