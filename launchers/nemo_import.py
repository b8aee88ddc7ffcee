"""nemo-run without what no launcher of ours uses: 1.9 s of CPU instead of 5.6.

nemo-run 0.11.1 imports torch to write `torch.dtype` into YAML, and leptonai (with FastAPI) for a cloud that no recipe knows.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import threading
from types import ModuleType
from typing import Any

_lock = threading.Lock()


def import_nemo_run() -> Any:
    """The module nemo_run; ImportError. Its LeptonExecutor is a shell unless leptonai was imported before.

    While it is imported, no other thread can import torch.
    """
    with _lock:
        if "nemo_run" in sys.modules:
            return sys.modules["nemo_run"]
        hides_torch = "torch" not in sys.modules
        stand_in = None if "leptonai" in sys.modules else _StandIn("leptonai")
        if hides_torch:
            sys.modules["torch"] = None  # type: ignore[assignment]  # nemo-run is prepared for a machine without it
        if stand_in is not None:
            sys.meta_path.insert(0, stand_in)
        try:
            import nemo_run
        finally:
            if hides_torch:
                del sys.modules["torch"]
            if stand_in is not None:
                sys.meta_path.remove(stand_in)
                for name in [name for name in sys.modules if name.partition(".")[0] == "leptonai"]:
                    del sys.modules[name]
        return nemo_run


class _StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes a package whose every submodule has every name: an empty class, which annotations may name."""

    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != self._package:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        def anything(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {"__module__": module.__name__})

        module.__getattr__ = anything  # type: ignore[method-assign]
