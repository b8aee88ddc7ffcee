"""What a rank leaves for whoever asks why it stands still: its Python stacks on SIGUSR2, and its own copy of what it prints.

    stages/<stage>/ranks/rank-3.stacks.txt   "rank 3, process 4711 on node1", then the stacks of all threads, once per SIGUSR2
    stages/<stage>/ranks/rank-3.txt          what this rank wrote through Python's stdout and stderr, all attempts

The stacks come from faulthandler's handler in C, so also from a rank that is blocked inside a collective. All ranks share the stage's
log.txt; what C libraries (NCCL, gloo) write is only there.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

FOLDER = "ranks"

_open: list[TextIO] = []
"""faulthandler keeps the descriptor only: the files must not be collected."""


def on_request() -> None:
    """From now on SIGUSR2 writes this process's stacks to stderr, as a crash in C does."""
    faulthandler.enable(file=sys.__stderr__)
    faulthandler.register(signal.SIGUSR2, file=sys.__stderr__, all_threads=True, chain=False)


def separate_rank(stage_dir: Path, rank: int) -> None:
    """Open this rank's two files; to be called once in its process, first thing."""
    folder = stage_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    stacks = open(folder / f"rank-{rank}.stacks.txt", "w", encoding="utf-8")  # noqa: SIM115 open as long as the process lives
    stacks.write(f"rank {rank}, process {os.getpid()} on {socket.gethostname()}\n")
    stacks.flush()
    faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True, chain=False)
    output = open(folder / f"rank-{rank}.txt", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
    attempt = os.environ.get("QUARRY_ATTEMPT", "0")
    output.write(f"==== attempt {attempt}, {datetime.now(UTC).isoformat(timespec='seconds')}: rank {rank}\n")
    _open.extend((stacks, output))
    sys.stdout = _Copied(sys.stdout, output)  # type: ignore[assignment]
    sys.stderr = _Copied(sys.stderr, output)  # type: ignore[assignment]


class _Copied:
    """A text stream whose writes also go to a file."""

    def __init__(self, stream: TextIO, copy: TextIO) -> None:
        self._stream = stream
        self._copy = copy

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):  # a full disk: the log itself says so, and the copy must not end the training
            self._copy.write(text)
        return self._stream.write(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
