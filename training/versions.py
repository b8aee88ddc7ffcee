"""Versions of what decides the numbers of a run, recorded in every hand-off."""

from __future__ import annotations

import importlib.metadata
import sys


def versions() -> dict[str, str]:
    """Package -> version; "absent" for those that only a GPU host has."""
    out = {name: importlib.metadata.version(name) for name in ("quarry", "torch", "megatron-core", "numpy")}
    for name in ("transformer-engine", "apex"):
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            out[name] = "absent"
    out["python"] = sys.version.split()[0]
    return out
