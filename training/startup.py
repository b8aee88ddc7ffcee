"""Where the time between the start of a job and its first step goes: marks that the job itself makes.

`mark(part)` says that `part` ends now; parts follow each other without a gap from the start of the process on. Forked ranks go on with
the marks of the process that forked them, ranks under torchrun with those in their environment. At the first step the rank that logs metrics
prints one line and appends it to `startup.jsonl` of the stage:

    start-up 3.94 s: interpreter 0.31, verification 0.05, imports 2.61, ranks 0.03, arguments 0.12, process groups 0.09, ...

Times are of the clock since boot, which all processes of a node share.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE_NAME = "startup.jsonl"
VARIABLE = "QUARRY_STARTUP"
"""JSON [[part, seconds since boot when it ended], ...], the first being the start of the process; from a stage to its ranks."""

_marks: list[tuple[str, float]] = []
_reported = False


def begin(environment: Mapping[str, str] = os.environ) -> None:
    """Start counting: with the marks in the environment if there are any, else from the start of this process."""
    global _reported
    _reported = False
    handed = environment.get(VARIABLE)
    _marks[:] = [(part, float(seconds)) for part, seconds in json.loads(handed)] if handed else [("start", _process_start())]


def mark(part: str) -> None:
    """The part that ends now. Without effect before `begin` and after the report."""
    if _marks and not _reported:
        _marks.append((part, _now()))


def environment() -> dict[str, str]:
    """For ranks that are processes of their own."""
    return {VARIABLE: json.dumps(_marks)} if _marks else {}


def seconds_of_parts() -> dict[str, float]:
    """Part -> seconds, in the order of the marks; what was marked twice is added up."""
    parts: dict[str, float] = {}
    for (_, before), (part, after) in itertools.pairwise(_marks):
        parts[part] = parts.get(part, 0.0) + after - before
    return parts


def report(stage_dir: Path, step: int) -> None:
    """Print the parts and append them to the stage's file: once, by one rank, when `step`, the first of this start, is done."""
    global _reported
    if not _marks or _reported:
        return
    parts = seconds_of_parts()
    _reported = True
    row: dict[str, Any] = {
        "time": time.time(),
        "step": step,
        "seconds": round(sum(parts.values()), 3),
        "parts": {part: round(seconds, 3) for part, seconds in parts.items()},
    }
    print(describe(row), flush=True)
    with open(stage_dir / FILE_NAME, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def describe(row: Mapping[str, Any]) -> str:
    """One line for a row of `startup.jsonl`."""
    return f"start-up {row['seconds']:.2f} s: " + ", ".join(f"{part} {seconds:.2f}" for part, seconds in row["parts"].items())


def _now() -> float:
    """Seconds since boot. Where the system has no such clock (macOS), of a clock that processes need not share."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _process_start() -> float:
    """When this process began: 22nd field of /proc/self/stat, in ticks since boot; now where there is no /proc."""
    try:
        # The second field is the program's name in parentheses, which may hold anything.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return _now()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")
