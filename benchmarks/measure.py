"""Runs a command and measures it as a whole: wall seconds, CPU seconds and peak memory of the process and all that it starts (Linux)."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 0.025
"""Between looks at the process tree: a look costs about 0.3 ms, 1% of a core; the kernel's own high-water marks fill the gaps."""


@dataclass(frozen=True)
class Measurement:
    """One run of a command, start-up and exit included."""

    wall_seconds: float
    cpu_seconds: float
    """User and system, of the process and of all its descendants."""
    peak_rss_bytes: int
    """Resident memory of the process tree at its largest; pages that processes share count once per process."""


class CommandFailed(Exception):
    """A measured command ended with an error; the message has the end of its output."""


def tree(pid: int) -> list[int]:
    """The process and all its living descendants."""
    found, todo = [], [pid]
    while todo:
        found.append(todo.pop())
        try:
            for task in os.listdir(f"/proc/{found[-1]}/task"):
                todo += [int(child) for child in Path(f"/proc/{found[-1]}/task/{task}/children").read_text().split()]
        except OSError:  # it ended meanwhile
            continue
    return found


def cpu_ticks(pid: int) -> int:
    """User and system time of one process in clock ticks; 0 for one that has ended."""
    try:
        # The name of the program, in parentheses, may hold anything: count behind it.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])


def memory(pid: int) -> tuple[int, int]:
    """(resident bytes now, largest ever) of one process; zeros for one that has ended."""
    now = largest = 0
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as f:
            for line in f:
                if line.startswith("VmHWM:"):
                    largest = int(line.split()[1]) * 1024
                elif line.startswith("VmRSS:"):
                    now = int(line.split()[1]) * 1024
                    break
    except OSError:
        pass
    return now, largest


def measure(command: list[str], environment: dict[str, str], log: Path) -> Measurement:
    """Run `command` to its end, its output going to `log`; CommandFailed for an exit code other than 0."""
    with open(log, "wb") as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        peak, ended = 0, threading.Event()
        ticks: dict[int, int] = {}

        def watch() -> None:
            nonlocal peak
            while not ended.is_set():
                alive = tree(process.pid)
                seen = [memory(pid) for pid in alive]
                ticks.update({pid: max(ticks.get(pid, 0), cpu_ticks(pid)) for pid in alive})
                peak = max(peak, sum(now for now, _ in seen), *(largest for _, largest in seen))
                ended.wait(POLL_SECONDS)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        # wait4 and not Popen.wait: it tells the CPU time of this child's tree alone. The watcher never reaps.
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        ended.set()
        watcher.join()
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        tail = log.read_bytes()[-3000:].decode(errors="replace")
        raise CommandFailed(f"exit code {process.returncode} of {' '.join(command)}; the end of {log}:\n{tail}")
    # Not usage.ru_maxrss: a child's begins with the memory that its parent, this process, had when it was forked.
    # The kernel counts only children that their parent waited for, the polls miss what was used since the last one: take the larger.
    polled = sum(ticks.values()) / os.sysconf("SC_CLK_TCK")
    return Measurement(wall, max(usage.ru_utime + usage.ru_stime, polled), peak)
