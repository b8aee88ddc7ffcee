"""Per-step metrics and held-out losses of one stage, one JSON object a line, that a resume continues without gap or overlap.

TensorBoard gets the same numbers at the same time (training/event_files.py).
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.files import read_json_lines

if TYPE_CHECKING:
    from training.event_files import EventFile

NO_CURVES = ("step", "time")
"""Keys of a line that are no curves of their own."""


class MetricsLog:
    """Appends to `metrics.jsonl` and `heldout.jsonl`; written by one rank only.

    `start(step)` drops what was logged after the checkpoint that the job resumes from: those steps are about to be trained again. From then
    on there are event files too.
    """

    def __init__(self, stage_dir: Path) -> None:
        self.metrics = stage_dir / "metrics.jsonl"
        self.heldout = stage_dir / "heldout.jsonl"
        self._last_time: float | None = None
        self._events: EventFile | None = None

    def start(self, step: int) -> None:
        for path in (self.metrics, self.heldout):
            if not path.exists():
                continue
            kept = [o for o in read_json_lines(path) if o["step"] <= step and not (step == 0 and path is self.heldout)]
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            with open(temporary, "w", encoding="utf-8") as f:
                f.writelines(json.dumps(o) + "\n" for o in kept)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        from training.event_files import FOLDER, EventFile  # protobuf: only the rank that writes imports it

        self._events = EventFile(self.metrics.parent / FOLDER, first_step=step + 1 if step else 0)

    def start_clock(self) -> None:
        self._last_time = time.monotonic()

    def lap(self) -> float:
        """Seconds since the last call (or `start_clock`)."""
        now = time.monotonic()
        seconds = now - self._last_time if self._last_time is not None else 0.0
        self._last_time = now
        return seconds

    def append_step(self, **values: Any) -> None:
        self._append(self.metrics, values)

    def append_heldout(self, **values: Any) -> None:
        self._append(self.heldout, values)

    def _append(self, path: Path, values: dict[str, Any]) -> None:
        # One write call per line: a reader never sees two halves from different steps.
        with open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps(values) + "\n")
        if self._events is not None:
            found = curves(values)
            if path is self.heldout:
                found.pop("total_tokens", None)  # the same step's metrics have it already
            self._events.add(values["step"], found)


def curves(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line of either log by the names of their curves: {"step": 8, "losses": {"web": 2.0}} -> {"heldout/web": 2.0}.

    What is not a number or NaN is left out.
    """
    found: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, dict):
            name = "heldout" if key == "losses" else key
            found |= {f"{name}/{inner}": number for inner, number in curves(value).items()}
        elif key not in NO_CURVES and isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value):
            found[key] = float(value)
    return found
