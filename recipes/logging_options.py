"""Who is told the metrics of a run besides metrics.jsonl and TensorBoard, which always have them."""

from __future__ import annotations

import importlib.util
import sys
from typing import Literal

from recipes.fields import Strict


class Logging(Strict):
    wandb: Literal["offline"] | None = None
    """offline: Weights & Biases' files in the stage's folder, for `wandb sync` from a machine that may; a job itself sends nothing."""
    wandb_project: str = "quarry"


def missing_package(logging: Logging) -> str | None:
    """What this Python lacks for `logging`, with the remedy; None if nothing."""
    if logging.wandb is None or importlib.util.find_spec("wandb") is not None:
        return None
    return (
        f"logging.wandb is {logging.wandb}, but {sys.executable} has no package wandb; install quarry's extra `wandb` there "
        "(uv pip install 'wandb==0.31.0'), or set logging.wandb=null"
    )
