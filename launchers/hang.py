"""Tells a stage that has stopped making progress from a slow one, and writes down where each of its ranks stands.

A rank that waits in a collective for another one uses its CPU or GPU fully and writes nothing, so busyness proves nothing. What counts:

- a phase: rows of metrics.jsonl and heldout.jsonl, files of its checkpoints; until its first step also lines in its log (imports,
  the verified hand-off, the loaded checkpoint say so there). Later the log does not count: NCCL's watchdog prints while all stand still;
- data, merges and exports, which have no collectives: lines in the log, or CPU time of any of their processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import psutil

from launchers.errors import LaunchError
from launchers.journal import stage_rows
from launchers.jsonl import JsonLines, Row
from launchers.stage_job import StageJob
from launchers.steps import checkpoint_step, sft_steps

EXIT_HUNG = 79
"""The stage made no progress and was ended; starting it again from its last checkpoint may help (a lost packet, a slow file system)."""
EXIT_HUNG_REPEATEDLY = 80
"""The same for the MAX_HANGS-th time in a row without a new checkpoint: another start would hang too."""
MAX_HANGS = 3

VARIABLE = "QUARRY_HANG_SECONDS"
"""Operators set one limit for everything in seconds, or `off`."""

STARTUP_SECONDS = 1800.0
"""Without any sign of life before the first step, or after the last one. The longest silent parts are reading a checkpoint for its
digests (1 TB at 1 GB/s: 17 minutes) and the first held-out evaluation."""
STEP_FLOOR_SECONDS = 600.0
"""Between two rows: longer than a file system's fail-over or a held-out evaluation, and PyTorch's own limit of NCCL is 600 s too."""
STEP_FACTOR = 20.0
"""For stages whose rows are far apart: one may take this many times the median."""
MEDIAN_ROWS = 20
MAX_INTERVAL_SECONDS = 30.0
"""Between two looks: each walks over the checkpoint files, on a parallel file system not for nothing."""
MIN_CPU_SECONDS = 0.2
GRACE_SECONDS = 60.0
"""Between SIGTERM and SIGKILL, for ranks that after all can still save."""
DUMP_SECONDS = 0.1
"""Between two requests for stacks: faulthandler takes milliseconds, and dumps into one file must not mix."""
RANKS_IN_LOG = 16
"""Stacks of so many ranks are copied into the log; those of the others stay in their files."""


@dataclass(frozen=True)
class Limits:
    """Seconds without progress; None: never."""

    startup_seconds: float | None = STARTUP_SECONDS
    step_floor_seconds: float | None = STEP_FLOOR_SECONDS
    step_factor: float = STEP_FACTOR

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Limits:
        """The constants, or what QUARRY_HANG_SECONDS says; LaunchError if that is neither a positive number nor `off`."""
        text = environment.get(VARIABLE)
        if text is None:
            return cls()
        if text == "off":
            return cls(None, None)
        try:
            seconds = float(text)
        except ValueError:
            seconds = 0.0
        if not 0 < seconds < float("inf"):
            raise LaunchError(
                f"{VARIABLE} is '{text}': expected seconds without progress after which a stage is ended, above 0 (for example 900), or 'off'"
            )
        return cls(seconds, seconds, 0.0)

    def step_seconds(self, median_seconds: float | None) -> float | None:
        if self.step_floor_seconds is None:
            return None
        return max(self.step_floor_seconds, self.step_factor * (median_seconds or 0.0))


@dataclass(frozen=True)
class Hang:
    """Why a stage counts as hung."""

    seconds: float
    limit_seconds: float
    where: str
    """`before its first step`, `after step 12`."""

    def __str__(self) -> str:
        return f"no progress for {self.seconds:.0f} s {self.where} (limit {self.limit_seconds:.0f} s)"


class HangWatch:
    """Looks at one attempt of a stage from time to time."""

    def __init__(self, job: StageJob, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.stage_dir = Path(job.stage_dir)
        self.log = job.log
        self.limits = limits
        self._clock = clock
        self._steps = _steps_of_phase(job)
        self._metrics = JsonLines(self.stage_dir / "metrics.jsonl")
        self._last: object = None
        self._cpu_seconds = 0.0
        self._since = self._next = clock()

    def check(self, stepping: bool, processes: Callable[[], list[psutil.Process]]) -> Hang | None:
        """A Hang once the limit is passed. `stepping`: the attempt has logged a step. Cheap between two looks."""
        now = self._clock()
        if now < self._next:
            return None
        self._metrics.poll()
        limit, where = self._limit(stepping)
        if limit is None:
            self._next = float("inf")
            return None
        self._next = now + min(MAX_INTERVAL_SECONDS, limit / 20)
        if self._moved(stepping, processes):
            self._since = now
            return None
        if now - self._since < limit:
            return None
        return Hang(now - self._since, limit, where)

    def _limit(self, stepping: bool) -> tuple[float | None, str]:
        if self._steps is None:
            return self.limits.startup_seconds, "(log and CPU time)"
        if not stepping:
            return self.limits.startup_seconds, "before its first step"
        rows = self._metrics.rows
        step = rows[-1].get("step", 0) if rows else 0
        if step >= self._steps:
            return self.limits.startup_seconds, f"after its last step {step}"
        return self.limits.step_seconds(median_row_seconds(rows)), f"after step {step}"

    def _moved(self, stepping: bool, processes: Callable[[], list[psutil.Process]]) -> bool:
        if self._steps is None:
            now: object = _size(self.log)
            cpu = sum(_cpu_seconds(p) for p in processes())
            busy = abs(cpu - self._cpu_seconds) >= MIN_CPU_SECONDS  # also less: a process has ended
            if busy:
                self._cpu_seconds = cpu
        else:
            files = [_size(self.stage_dir / name) for name in ("metrics.jsonl", "heldout.jsonl")]
            now = (files, _folder(self.stage_dir / "checkpoints"), stepping, None if stepping else _size(self.log))
            busy = False
        moved, self._last = now != self._last, now
        return moved or busy


def median_row_seconds(rows: list[Row]) -> float | None:
    """Median time between the last rows of metrics.jsonl: a row has the mean time of a step since the row before it."""
    spent, before = [], None
    for row in rows[-MEDIAN_ROWS - 1 :]:
        step, seconds = row.get("step"), row.get("seconds")
        if isinstance(step, int) and isinstance(seconds, int | float):
            spent.append(seconds * max(1, step - before if before is not None else 1))
            before = step
    return statistics.median(spent) if spent else None


def count_hangs(rows: list[Row], job: StageJob) -> int:
    """Which hang in a row without a new checkpoint one that ends now is, from 1. A stop for too many starts the count anew."""
    step, count = checkpoint_step(job), 1
    for row in reversed(stage_rows(rows, job.stage)):
        if row["event"] != "outcome":
            continue
        if row.get("exit_code") != EXIT_HUNG or row.get("checkpoint_step") != step:
            break
        count += 1
    return count


def diagnose(job: StageJob, processes: list[psutil.Process], log: BinaryIO) -> str:
    """Write the state of every process and the stacks of every rank to the log; returns where the ranks stand, in one phrase."""
    ranks = _rank_processes(Path(job.stage_dir))
    begun = {rank: _size(path)[1] for rank, (_, path) in ranks.items()}
    by_pid = {pid: rank for rank, (pid, _) in ranks.items()}
    for process in processes:
        with contextlib.suppress(psutil.Error, OSError):
            name = f"rank {by_pid[process.pid]}" if process.pid in by_pid else "process"
            log.write(f"==== {name}: {_state(process)}\n".encode())
    for process in processes:
        if _catches_sigusr2(process.pid):
            with contextlib.suppress(psutil.Error, OSError):
                process.send_signal(signal.SIGUSR2)
                time.sleep(DUMP_SECONDS)
    alive = {process.pid: process for process in processes}
    frames: dict[str, list[int]] = {}
    for rank, (pid, path) in sorted(ranks.items()):
        if pid not in alive:
            continue
        with open(path, "rb") as f:
            f.seek(begun[rank])
            text = f.read().decode(errors="replace")
        if rank < RANKS_IN_LOG:
            log.write(f"==== stacks of rank {rank}:\n{text}".encode())
        else:
            log.write(f"==== stacks of rank {rank}: {path}\n".encode())
        frame = innermost_frame(text)
        if frame is None:
            with contextlib.suppress(psutil.Error):  # a stopped process, or one in a system call that cannot be interrupted
                log.write(b"no stack came\n")
                frame = f"no Python stack (its process is '{alive[pid].status()}')"
        frames.setdefault(frame or "no Python stack (its process has ended)", []).append(rank)
    # The fewest first, and those that do not even answer: where one rank stands elsewhere than all others, the others wait for it.
    groups = sorted(frames.items(), key=lambda item: (not item[0].startswith("no Python stack"), len(item[1])))
    shown = [f"{_ranks(numbers)}: {frame}" for frame, numbers in groups[:3]]
    return "; ".join(shown) + (f"; {len(groups) - 3} more places" if len(groups) > 3 else "")


def innermost_frame(stacks: str) -> str | None:
    """`function (file.py:12)` of the thread that took the signal, the main thread of a blocked rank; None if there is no stack."""
    current = stacks.partition("Current thread")[2] or stacks
    found = re.search(r'File "([^"]*)", line (\d+) in (.+)', current)
    return f"{found[3]} ({found[1]}:{found[2]})" if found else None


def _ranks(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    return f"ranks {', '.join(map(str, numbers[:8]))}" + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")


def _rank_processes(stage_dir: Path) -> dict[int, tuple[int, Path]]:
    """rank -> (process id, file of its stacks) of the ranks on this host, as training/stacks.py writes them down."""
    found = {}
    for path in (stage_dir / "ranks").glob("rank-*.stacks.txt"):
        with open(path, encoding="utf-8", errors="replace") as f:
            head = re.fullmatch(r"rank (\d+), process (\d+) on (.+)\n", f.readline())
        if head and head[3] == socket.gethostname():
            found[int(head[1])] = int(head[2]), path
    return found


def _state(process: psutil.Process) -> str:
    with process.oneshot():
        cpu = process.cpu_times()
        text = f"process {process.pid}, {process.status()}, {process.num_threads()} threads, CPU {cpu.user + cpu.system:.1f} s"
        command = " ".join(process.cmdline())[:120]
    try:
        waits_in = Path(f"/proc/{process.pid}/wchan").read_text().strip()
    except OSError:
        waits_in = ""
    return text + (f", waits in {waits_in}" if waits_in not in ("", "0") else "") + f": {command}"


def _catches_sigusr2(pid: int) -> bool:
    """Whether the process has a handler: without one the signal would end it before it has said where it stands."""
    if sys.platform != "linux":
        return False
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGUSR2 - 1) & 1)


def _steps_of_phase(job: StageJob) -> int | None:
    """Steps of the stage, None if it is no phase and no fine-tuning. Not through the recipe's schema: its import takes longer than a job's
    start may."""
    try:
        recipe = json.loads((Path(job.run_dir) / "recipe.json").read_bytes())
        if sft := recipe.get("sft", {}).get(job.stage):
            root, batch = Path(recipe["data"]["root"]), sft["global_batch_sequences"]
            return sft_steps(root, job.stage, epochs=sft["epochs"], batch_sequences=batch)
        if gate := recipe.get("ab", {}).get(job.stage):
            return int(gate["steps"])  # of the arm that runs, whose metrics.jsonl the gate shows as its own
        return int(recipe["phase"][job.stage]["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return times.user + times.system


def _size(path: Path) -> tuple[int, int]:
    """(inode, bytes); (0, 0) if there is none."""
    try:
        stat = os.stat(path)
    except OSError:
        return 0, 0
    return stat.st_ino, stat.st_size


def _folder(folder: Path) -> tuple[int, int, int]:
    """(files, bytes, newest change in ns) below a folder."""
    count = size = newest = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                stat = os.stat(os.path.join(root, name))
                count, size, newest = count + 1, size + stat.st_size, max(newest, stat.st_mtime_ns)
    return count, size, newest
