"""What the chain needs around a running job: requests to stop, the end of a log, processes that an earlier launcher left."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from launchers.processes import stage_processes

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TAIL_BYTES = 64 * 1024


class Signals:
    """Takes note of requests to stop instead of dying of them, so that the running stage can save."""

    def __init__(self) -> None:
        self.received: int | None = None
        """Number of the first signal."""
        self.count = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        self.count += 1


class Strays:
    """Processes of a stage that no launcher of today started; has the shape of a submitted job."""

    job = "left by an earlier launcher"

    def __init__(self, stage_dir: Path) -> None:
        self._stage_dir = stage_dir

    def alive(self) -> bool:
        return bool(stage_processes(self._stage_dir))


class LogTail:
    """Whole lines that are appended to a log from now on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset_bytes = path.stat().st_size if path.exists() else 0

    def poll(self) -> list[str]:
        if not self.path.exists() or self.path.stat().st_size == self._offset_bytes:
            return []
        with open(self.path, "rb") as f:
            f.seek(self._offset_bytes)
            data = f.read()
        end = data.rfind(b"\n") + 1
        self._offset_bytes += end
        return data[:end].decode(errors="replace").splitlines()


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a log; [] if there is none."""
    if not path.exists():
        return []
    with open(path, "rb") as f:
        f.seek(max(0, os.fstat(f.fileno()).st_size - TAIL_BYTES))
        return f.read().decode(errors="replace").splitlines()[-lines:]
