"""No download, whatever a library would like: the environment that cleaning runs in, here and in its jobs."""

from __future__ import annotations

import os

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def go_offline() -> None:
    """Before datatrove is imported, which reads these when it is."""
    os.environ.update(OFFLINE)
