"""Tests that need an NVIDIA GPU with Transformer Engine: `pytest tests/gpu` on a GPU host. Elsewhere each is skipped with the reason."""

import importlib.util

import pytest
import torch


def missing() -> str | None:
    if not torch.cuda.is_available() or getattr(torch.cuda, "is_cpu_backend", False):
        return "no CUDA device"
    if importlib.util.find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed: use the container, or `pip install .[gpu]`"
    return None


def pytest_collection_modifyitems(items):
    reason = missing()
    for item in items:
        item.add_marker(pytest.mark.gpu)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
