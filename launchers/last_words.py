"""Finds in a stage's log why it ended, for the one line that `quarry status` has for it."""

from __future__ import annotations

import os
import re
from pathlib import Path

TAIL_BYTES = 256 << 10
"""Ranks of a large job all print their tracebacks; what is looked for stands before the last of them at most."""
MAX_CHARACTERS = 500

REFUSAL = re.compile(
    r"^refused: (.+(?:\n +- .+)*)", re.MULTILINE
)  # with its list of problems, as training/handoff.py prints it
DISK = re.compile(r"^disk full: (.+)", re.MULTILINE)
# What Megatron's rerun state machine logs, and the loss that training/hooks.py refuses.
RERUN = re.compile(
    r"Unexpected result (?P<value>\S+) on rank (?P<rank>\d+) at iteration #(?P<step>\d+) .*?message='(?P<what>[^']+)'"
)
SUSPICIOUS = re.compile(r"^(?:\w+\.)*SuspiciousResult: .+", re.MULTILINE)
EXCEPTION = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Result): .+", re.MULTILINE)


def last_words(log: Path, start: int, exit_code: int) -> str:
    """What the output from byte `start` of `log` on says about `exit_code`, on one line; empty if nothing."""
    if exit_code not in (1, 16, 17, 74, 78):
        return ""
    with open(log, "rb") as f:
        f.seek(max(start, os.fstat(f.fileno()).st_size - TAIL_BYTES))
        text = f.read().decode(errors="replace")
    if exit_code == 78:
        found = _last(REFUSAL, text).replace(":\n  - ", ": ", 1).replace("\n  - ", "; ")
    elif exit_code == 74:
        found = _last(DISK, text)
    elif exit_code == 1:
        found = _last(EXCEPTION, text)
    else:
        first = RERUN.search(text)  # the others follow from it
        found = (
            f"{first['what']}: {first['value']} on rank {first['rank']} at step {first['step']}"
            if first
            else _last(SUSPICIOUS, text)
        )
    line = " ".join(found.split())
    return line if len(line) <= MAX_CHARACTERS else line[: MAX_CHARACTERS - 3] + "..."


def _last(pattern: re.Pattern[str], text: str) -> str:
    found = [match[match.re.groups] for match in pattern.finditer(text)]
    return found[-1] if found else ""
