"""Why a rank ended, left in a file, so that the most specific cause of all ranks becomes the exit code of the job.

    stages/<stage>/ranks/rank-3.end.json   {"rank": 3, "exit_code": 74, "reason": "disk full: ...", "time": 1764258026.1, "host": "node1"}

Only of an end that is not 0. torchrun says 1 whatever its ranks said, and when one rank fails the others fail after it: a broken connection
(1) must not hide that a disk is full (74) or that a result is not to be trained on (17). Imports no torch.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from training.exit_codes import DISK_FULL, REFUSED, SUSPICIOUS, UNEXPECTED, SuspiciousResult

FOLDER = "ranks"  # as training/stacks.py
MAX_REASON_CHARACTERS = 2000

MOST_SPECIFIC_FIRST = (
    (SUSPICIOUS, UNEXPECTED),  # first: going on from it would hide it
    (REFUSED,),
    (DISK_FULL,),
    # Ended from outside: the out-of-memory killer, a driver. An abort is not among them, because NCCL's watchdog aborts after others.
    (-signal.SIGKILL, -signal.SIGBUS, -signal.SIGSEGV),
)


class Ended(Exception):
    """Raised by a rank's main to end with this code for this reason."""

    def __init__(self, exit_code: int, reason: str) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


@dataclass(frozen=True, kw_only=True)
class RankEnd:
    rank: int
    exit_code: int
    """Negative: ended by that signal."""
    reason: str
    time: float
    """Seconds since the epoch, by its node's clock."""
    host: str

    def write(self, folder: Path) -> None:
        """Write the file atomically. OSError where that fails, as on a full disk."""
        folder.mkdir(parents=True, exist_ok=True)
        path = end_file(folder, self.rank)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with open(temporary, "w", encoding="utf-8") as f:
            json.dump(asdict(self), f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)

    def __str__(self) -> str:
        how = f"exit code {self.exit_code}" if self.exit_code >= 0 else f"signal {signal.Signals(-self.exit_code).name}"
        return f"rank {self.rank} ended with {how}" + (f" ({self.reason})" if self.reason else "")


def end_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.end.json"


def recorded(stage_dir: Path, main: Callable[[], int]) -> int:
    """Run a rank's main (its number is in RANK) and leave why it ended, unless that is 0; returns or raises as `main` does.

    Ended and SuspiciousResult become their exit codes here.
    """
    rank, folder = int(os.environ["RANK"]), stage_dir / FOLDER
    end_file(folder, rank).unlink(missing_ok=True)
    try:
        code, reason = main(), ""
    except Ended as end:
        code, reason = end.exit_code, str(end)
    except SuspiciousResult as error:
        traceback.print_exc()
        code, reason = SUSPICIOUS, f"{type(error).__name__}: {error}"
    except SystemExit as leave:
        if leave.code is not None:
            text = not isinstance(leave.code, int)
            _leave(folder, rank, 1 if text else int(leave.code), str(leave.code) if text else "")
        raise
    except BaseException as error:
        _leave(folder, rank, 1, f"{type(error).__name__}: {error}")
        raise
    _leave(folder, rank, code, reason)
    return code


def _leave(folder: Path, rank: int, exit_code: int, reason: str) -> None:
    if exit_code == 0:
        return
    end = RankEnd(
        rank=rank, exit_code=exit_code, reason=reason[:MAX_REASON_CHARACTERS], time=time.time(), host=socket.gethostname()
    )
    try:
        end.write(folder)
    except OSError as error:  # the exit code itself still tells it to whoever waits for this process
        print(f"{end}; that could not be written to {folder}: {error}", file=sys.stderr, flush=True)


def clear(stage_dir: Path) -> None:
    """Remove what the ranks of an earlier attempt left."""
    for path in (stage_dir / FOLDER).glob("rank-*.end.json"):
        path.unlink(missing_ok=True)


def read_all(stage_dir: Path) -> list[RankEnd]:
    """What the ranks of all nodes have left, in no order. ValueError for a file that is not of this format."""
    ends = []
    for path in (stage_dir / FOLDER).glob("rank-*.end.json"):
        try:
            ends.append(RankEnd(**json.loads(path.read_bytes())))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}; remove it") from None
    return ends


def specificity(exit_code: int) -> int:
    """Place of an exit code among causes, 0 first."""
    for place, codes in enumerate(MOST_SPECIFIC_FIRST):
        if exit_code in codes:
            return place
    # A rank that was asked to end, or aborted because another was gone, is the cause of nothing.
    return len(MOST_SPECIFIC_FIRST) + (exit_code < 0)


def cause(ends: Iterable[RankEnd]) -> RankEnd | None:
    """The most specific end; of equals the first in time. None if there is none."""
    return min(ends, key=lambda end: (specificity(end.exit_code), end.time), default=None)
