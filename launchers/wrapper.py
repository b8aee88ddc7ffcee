"""What runs inside each job: starts the stage's command, forwards signals so that it saves, and writes down how it ended.

    python -m launchers.wrapper --job STAGE_DIR/job.json --attempt N

It outlives the launcher: a launcher that was killed finds the outcome in the journal later. It holds the stage's lock while it runs,
so that a second job of the same stage ends at once instead of training twice. The stage's output goes to log.txt. A stage that makes no
progress any more (launchers/hang.py) is ended, after the stacks of its ranks were written to the log.

Exit code: that of the stage's command (128 + n if signal n ended it), EXIT_BUSY, EXIT_HUNG or EXIT_HUNG_REPEATEDLY.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import BinaryIO

import psutil

from launchers import hang
from launchers.errors import LaunchError
from launchers.hang import EXIT_HUNG, EXIT_HUNG_REPEATEDLY, MAX_HANGS
from launchers.journal import Journal
from launchers.last_words import last_words
from launchers.processes import end_all
from launchers.stage_job import StageJob
from launchers.steps import checkpoint_step

EXIT_BUSY = 73
"""Another job of this stage holds its lock."""

ATTEMPT_VARIABLE = "QUARRY_ATTEMPT"
"""Number of the attempt, for the marks in what each rank prints."""

POLL_SECONDS = 0.05
LEFTOVER_GRACE_SECONDS = 5.0
"""How long processes that the command left behind may take to end on SIGTERM."""

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launchers.wrapper", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--job", type=Path, required=True, help="job.json of the stage, written by quarry launch")
    parser.add_argument("--attempt", type=int, required=True, help="number of this start of the stage, from 1")
    args = parser.parse_args(argv)
    job = StageJob.read(args.job)
    journal = Journal(Path(job.run_dir) / "journal.jsonl")
    with stage_lock(Path(job.stage_dir)) as mine:
        if not mine:
            reason = "another job of this stage is running on this file system"
            journal.append("outcome", stage=job.stage, attempt=args.attempt, exit_code=EXIT_BUSY, reason=reason, seconds=0.0)
            return EXIT_BUSY
        return run(job, args.attempt, journal)


@contextlib.contextmanager
def stage_lock(stage_dir: Path) -> Iterator[bool]:
    """Hold the lock of the stage; yields False if another job has it. The kernel drops it when this process ends, however it ends."""
    with open(stage_dir / ".lock", "a") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def run(job: StageJob, attempt: int, journal: Journal) -> int:
    """Run the job's command to its end; returns the exit code for this job."""
    begun = time.monotonic()
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # ranks whose parent dies become ours, so that none is left behind
    with open(job.log, "ab", buffering=0) as log:
        log.write(
            f"==== attempt {attempt}, {datetime.now(UTC).isoformat(timespec='seconds')}: {' '.join(job.command)}\n".encode()
        )
        begin = os.fstat(log.fileno()).st_size
        watch = FirstStep(Path(job.stage_dir) / "metrics.jsonl")
        forwarder = Forwarder()
        environment = {**os.environ, **job.environment, ATTEMPT_VARIABLE: str(attempt)}
        try:
            hang_watch = hang.HangWatch(job, hang.Limits.of(environment))
        except LaunchError as error:
            log.write(f"refused: {error}\n".encode())
            journal.append("outcome", stage=job.stage, attempt=attempt, exit_code=78, reason=f"refused: {error}", seconds=0.0)
            return 78
        try:
            process = subprocess.Popen(
                job.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=_die_with_parent,  # no threads here, so it is safe
            )
        except OSError as error:
            reason = f"{job.command[0]} cannot be started: {error}"
            log.write(f"{reason}\n".encode())
            journal.append("outcome", stage=job.stage, attempt=attempt, exit_code=127, reason=reason, seconds=0.0)
            return 127
        forwarder.attach(process.pid)
        journal.append(
            "started",
            stage=job.stage,
            attempt=attempt,
            pid=os.getpid(),
            process_started=psutil.Process().create_time(),
            host=socket.gethostname(),
            stage_pid=process.pid,
        )
        first_step_seconds = None
        hung: str | None = None
        while True:
            try:
                exit_code = process.wait(timeout=POLL_SECONDS)
                break
            except subprocess.TimeoutExpired:
                pass
            if first_step_seconds is None and watch.seen():
                first_step_seconds = time.monotonic() - begun
            found = hang_watch.check(first_step_seconds is not None, _descendants)
            if found is not None:
                hung = end_hung(job, process, found, log)
                exit_code = process.wait()
                break
        left = _descendants()
        if left:
            log.write(f"==== {len(left)} processes outlived the command; ending them\n".encode())
            end_all(left, LEFTOVER_GRACE_SECONDS)
        reason = describe_exit(exit_code, forwarder.received)
        if words := last_words(job.log, begin, exit_code):
            reason += f": {words}"
        hang_fields: dict[str, int] = {}
        if hung is not None and exit_code != 0:
            journal.poll()
            hangs = hang.count_hangs(journal.rows, job)
            exit_code = EXIT_HUNG if hangs < MAX_HANGS else EXIT_HUNG_REPEATEDLY
            hang_fields = {"hangs": hangs, "checkpoint_step": checkpoint_step(job)}
            reason = f"hung: {hung}; ended" + (f" after {forwarder.received}" if forwarder.received else "")
        log.write(f"==== attempt {attempt} ended: {reason}\n".encode())
    journal.append(
        "outcome",
        stage=job.stage,
        attempt=attempt,
        exit_code=exit_code,
        reason=reason,
        seconds=round(time.monotonic() - begun, 3),
        first_step_seconds=None if first_step_seconds is None else round(first_step_seconds, 3),
        max_rss_bytes=resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        **hang_fields,
    )
    return exit_code if exit_code >= 0 else 128 - exit_code


def end_hung(job: StageJob, process: subprocess.Popen[bytes], found: hang.Hang, log: BinaryIO) -> str:
    """Diagnose a hung stage and end all its processes; returns what was found, in one phrase. `process` is left to be waited for."""
    log.write(f"==== hung: {found}; {hang.VARIABLE} sets another limit\n".encode())
    where = hang.diagnose(job, _descendants(), log)
    grace = min(hang.GRACE_SECONDS, found.limit_seconds)
    log.write(f"==== ending its processes, with {grace:.0f} s for those that can still save\n".encode())
    for one in _descendants():
        with contextlib.suppress(psutil.NoSuchProcess):
            one.terminate()
    try:
        process.wait(timeout=grace)
    except subprocess.TimeoutExpired:
        for one in _descendants():
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    return f"{found}" + (f"; {where}" if where else "")


def _descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


class Forwarder:
    """Passes every request to stop on to the stage's process group as SIGTERM, at which training saves and leaves."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._group: int | None = None
        for number in FORWARDED:
            signal.signal(number, self._forward)

    def attach(self, group: int) -> None:
        """Forward to this process group from now on, also what came before it existed."""
        self._group = group
        if self.received:
            self._send()

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self._send()

    def _send(self) -> None:
        if self._group is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._group, signal.SIGTERM)


class FirstStep:
    """Sees when a stage logs its first step of this attempt: the end of its start-up."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last = self._stat()

    def _stat(self) -> tuple[int, int] | None:
        try:
            stat = os.stat(self.path)
        except FileNotFoundError:
            return None
        return stat.st_ino, stat.st_size

    def seen(self) -> bool:
        last, self._last = self._last, self._stat()
        if self._last is None:
            return False
        if last is None:
            return self._last[1] > 0
        # Another inode is the rewrite at a resume, which drops steps and adds none.
        return self._last[0] == last[0] and self._last[1] > last[1]


def describe_exit(exit_code: int, received: str | None) -> str:
    """One phrase for an exit code of the stage command (negative: ended by that signal)."""
    meaning = {
        0: "finished",
        16: "stopped by Megatron's rerun check (16): an unexpected result, not yet known whether it repeats; suspect the hardware",
        17: "stopped by a suspicious result (17): it is not finite, or failed a validation; suspect data, code or hardware",
        74: "no space left on a disk",
        75: "saved, to be resumed",
        78: "refused its configuration or hand-off",
    }
    if exit_code < 0:
        text = f"killed by {signal.Signals(-exit_code).name}"
    else:
        text = meaning.get(exit_code, f"failed with exit code {exit_code}")
        if exit_code > 128 and exit_code - 128 in {s.value for s in signal.Signals}:  # as shells and training.stage say it
            text += f" (one of its processes was killed by {signal.Signals(exit_code - 128).name})"
    return f"{text} after {received}" if received else text


def _prctl(option: int, value: int) -> None:
    if sys.platform != "linux":
        return  # elsewhere processes of a stage are found by their environment only
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")


def _die_with_parent() -> None:
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # a killed wrapper leaves no trainer without supervision: it saves and ends


if __name__ == "__main__":
    sys.exit(main())
