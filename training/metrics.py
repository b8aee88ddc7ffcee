"""Per-step metrics and held-out losses of one stage, one JSON object a line, that a resume continues without gap or overlap.

TensorBoard gets the same numbers at the same time (training/event_files.py).
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.files import read_json_lines

if TYPE_CHECKING:
    from training.event_files import EventFile

NO_CURVES = ("step", "time")
"""Keys of a line that are no values of their own in TensorBoard."""


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
        if self._events is not None:
            self._events.add(values["step"], {key: value for key, value in values.items() if key not in NO_CURVES})

    def append_heldout(self, **values: Any) -> None:
        self._append(self.heldout, values)
        if self._events is not None:
            losses = {key: value for key, value in values.items() if isinstance(value, dict)}
            self._events.add(values["step"], {"heldout": losses.pop("losses", {}), **losses})

    def _append(self, path: Path, values: dict[str, Any]) -> None:
        # One write call per line: a reader never sees two halves from different steps.
        with open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps(values) + "\n")
