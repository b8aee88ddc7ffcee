"""How far the checkpoints of a stage go."""

from __future__ import annotations

from pathlib import Path

from launchers.stage_job import StageJob

TRACKER = Path("checkpoints") / "latest_checkpointed_iteration.txt"


def checkpoint_step(job: StageJob) -> int:
    """Step of the stage's last whole checkpoint, 0 without one (Megatron writes its tracker after the files)."""
    try:
        text = (Path(job.stage_dir) / TRACKER).read_text().strip()
    except FileNotFoundError:
        return 0
    return int(text) if text.isdigit() else 0
