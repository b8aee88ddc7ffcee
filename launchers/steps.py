"""How far the checkpoints of a stage go, and how many steps a stage has that no recipe counts."""

from __future__ import annotations

import json
import math
from pathlib import Path

from launchers.stage_job import StageJob

TRACKER = Path("checkpoints") / "latest_checkpointed_iteration.txt"


def checkpoint_step(job: StageJob) -> int:
    """Step of the stage's last whole checkpoint, 0 without one (Megatron writes its tracker after the files). Of a gate: the steps of its
    arms together, those of an arm that is finished included."""
    stage_dir = Path(job.stage_dir)
    return _tracked(stage_dir) + sum(_tracked(arm) or _taken(arm) for arm in stage_dir.glob("arms/*/stages/*"))


def _tracked(folder: Path) -> int:
    try:
        text = (folder / TRACKER).read_text().strip()
    except OSError:
        return 0
    return int(text) if text.isdigit() else 0


def _taken(arm: Path) -> int:
    """Steps of a finished arm, whose checkpoints are gone (training/ab_arm.py)."""
    try:
        return int(json.loads((arm / "result.json").read_bytes())["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def sft_steps(data_root: Path, stage: str, *, epochs: int, batch_sequences: int) -> int | None:
    """Optimizer steps of a fine-tuning stage (Sft.steps), by the manifest of its packed data; None before that is written.

    The JSON alone is read: the manifest's types would cost the wrapper of a job 0.2 s.
    """
    try:
        sequences = json.loads((data_root / "sft" / stage / "manifest.json").read_bytes())["training"]["sequences"]
        return math.ceil(epochs * sequences / batch_sequences)
    except (OSError, ValueError, KeyError, TypeError):
        return None
