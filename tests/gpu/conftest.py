"""Tests that need an NVIDIA GPU with Transformer Engine: `pytest tests/gpu` on a GPU host. Elsewhere each is skipped with the reason."""

import importlib.util
from pathlib import Path

import pytest
import torch


def missing() -> str | None:
    if not torch.cuda.is_available() or getattr(torch.cuda, "is_cpu_backend", False):
        return "no CUDA device"
    if importlib.util.find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed: use the container, or `pip install .[gpu]`"
    return None


def pytest_collection_modifyitems(items):
    """The hook sees the items of the whole session, not only those of this folder."""
    here = Path(__file__).parent
    reason = missing()
    for item in (i for i in items if here in i.path.parents):
        item.add_marker(pytest.mark.gpu)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
