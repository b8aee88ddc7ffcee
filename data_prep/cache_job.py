"""Starts the CPU job that builds Megatron's index caches; Megatron itself is only ever imported in that job."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from data_prep import index_caches
from data_prep.errors import DataError
from data_prep.manifest import MixtureManifest, mixture_path
from data_prep.progress import Progress
from recipes.schema import Recipe

COMMAND = (sys.executable, "-m", "training.index_cache")
CODE = Path(__file__).resolve().parent.parent


def build_caches(recipe: Recipe, *, progress: Progress, command: tuple[str, ...] = COMMAND) -> None:
    """Build the index caches of all phases of a prepared recipe; starts nothing where all are there and intact.

    DataError when the job fails; what it printed is already on the terminal.
    """
    root = Path(recipe.data.root)
    phases = [name for name in recipe.stages if name in recipe.phase]
    todo = index_caches.to_build(root, {phase: MixtureManifest.read(mixture_path(root, phase)) for phase in phases})
    if not todo:
        return
    with tempfile.TemporaryDirectory(prefix="quarry-") as folder:
        path = Path(folder) / "recipe.json"
        recipe.write(path)
        words = [*command, "--recipe", str(path), *(word for phase in todo for word in ("--phase", phase))]
        # The code that prepared the views builds their caches, wherever the command was started from.
        code = subprocess.run([words[0], "-P", *words[1:]], env=_environment(), check=False).returncode
    if code != 0:
        raise DataError(
            f"the job that builds the index caches of {', '.join(todo)} ended with exit code {code}; its message is above. "
            f"The views are whole; mend the cause and run the same command again"
        )


def _environment() -> dict[str, str]:
    inherited = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{CODE}{os.pathsep}{inherited}" if inherited else str(CODE)}
