"""Which rollout engine a job gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.tokenizer import Tokenizer
from training.rl.job import Job
from training.rl.rollout import MegatronEngine, RolloutEngine


def build_engine(job: Job, model: list[Any], tokenizer: Tokenizer, stage_dir: Path) -> RolloutEngine:
    """The engine that `job.grpo.rollout` names, for this rank's `model`."""
    rollout = job.grpo.rollout
    return MegatronEngine(model, rollout, seed=job.seed, end_id=tokenizer.eod_id)
