"""Ends a stage in the middle, from a thread of the process that has forked its ranks."""

import os
import signal
import threading
import time
from pathlib import Path

LIMIT_SECONDS = 240


def start(metrics, step, verb="kill"):
    """Once the file `metrics` has `step` lines: `kill` the last rank with SIGKILL, or ask this process to `stop`."""
    threading.Thread(target=_interrupt, args=(metrics, step, verb), daemon=True).start()


def _interrupt(metrics, step, verb):
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= step:
            if verb == "stop":
                os.kill(os.getpid(), signal.SIGTERM)  # passed on to the ranks by training.stage
            else:
                children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
                os.kill(int(children[-1]), signal.SIGKILL)
            return
        time.sleep(0.005)
