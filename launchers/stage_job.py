"""What one job of the chain runs: its command, environment and files, the same for every executor.

The launcher writes it as `job.json` into the stage's folder; the wrapper (`launchers/wrapper.py`) reads it inside the job. The only
thing that an executor (local, Docker, Slurm) gets to start is `wrapper_arguments`, so that no recipe value passes through a shell.
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launchers.errors import LaunchError
from launchers.processes import STAGE_DIR_VARIABLE

if TYPE_CHECKING:  # the wrapper imports this module inside every job: pydantic would cost it 0.2 s
    from recipes.schema import Recipe

FORMAT = "quarry.job/1"
JOB_FILE = "job.json"
LOG_FILE = "log.txt"

DATA = "data"
"""Name of the preparation of the data in journal and folder; no stage may have it."""

STAGE_COMMAND = (sys.executable, "-m", "training.stage")
"""THE seam: `--run-dir D --stage S` is appended. Tests pass a command of their own to `chain.launch(stage_command=...)`."""
DATA_COMMAND = (sys.executable, "-m", "data_prep")
"""`--recipe recipe.json` is appended; the same seam for the preparation of the data."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""Names of runs and stages: they become folders, job names and shell words of cluster scripts."""


@dataclass(frozen=True, kw_only=True)
class StageJob:
    """One job: what the wrapper needs to run a stage."""

    run: str
    stage: str
    run_dir: str
    """Absolute."""
    stage_dir: str
    """Absolute; job.json, log.txt and the stage's own files."""
    command: list[str]
    environment: dict[str, str]
    """Added to the environment that the job finds on its machine."""
    format: str = FORMAT

    @property
    def file(self) -> Path:
        return Path(self.stage_dir) / JOB_FILE

    @property
    def log(self) -> Path:
        return Path(self.stage_dir) / LOG_FILE

    def write(self) -> None:
        """Write job.json atomically (temporary name, fsync, rename)."""
        Path(self.stage_dir).mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_name(f".{self.file.name}.{os.getpid()}.tmp")
        with open(temporary, "w", encoding="utf-8") as f:
            json.dump(asdict(self), f, indent=1)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, self.file)

    @classmethod
    def read(cls, path: Path) -> StageJob:
        """Raises LaunchError if the file is absent or of another version."""
        try:
            value = json.loads(path.read_bytes())
        except (FileNotFoundError, ValueError) as error:
            raise LaunchError(
                f"{path} is no readable job file ({error}); `quarry launch` writes it: run the launch again"
            ) from None
        if value.get("format") != FORMAT:
            raise LaunchError(f"{path}: format is {value.get('format')!r}, this version reads {FORMAT!r}; run the launch again")
        return cls(**value)

    def wrapper_arguments(self, attempt: int) -> list[str]:
        """Arguments of `python -m launchers.wrapper`: all that an executor has to start."""
        return ["--job", str(self.file), "--attempt", str(attempt)]


def check_name(kind: str, name: str) -> str:
    """`name` if it may become a folder, a job name and a shell word; LaunchError otherwise."""
    if not NAME.fullmatch(name):
        raise LaunchError(
            f"the {kind} name '{name}' cannot be used: names are letters, digits, '.', '_' and '-', begin with a letter or digit and have at "
            f"most 100 characters; for example '{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('-.')[:100] or 'run-1'}'"
        )
    return name


def stage_job(recipe: Recipe, run_dir: Path, stage: str, *, stage_command: tuple[str, ...] = STAGE_COMMAND) -> StageJob:
    """The job of one stage. `run_dir` is the run's folder; every path in the result is absolute."""
    recipe.stage_kind(stage)  # refuses an unknown stage
    if check_name("stage", stage) == DATA:
        raise LaunchError(
            f"a stage cannot be called '{DATA}': that is the preparation of the data; rename it in stages and phase"
        )
    run_dir = run_dir.resolve()
    stage_dir = run_dir / "stages" / stage
    return StageJob(
        run=run_dir.name,
        stage=stage,
        run_dir=str(run_dir),
        stage_dir=str(stage_dir),
        command=[*stage_command, "--run-dir", str(run_dir), "--stage", stage],
        environment=_environment(recipe, stage_dir),
    )


def data_job(
    recipe: Recipe, run_dir: Path, *, last: str | None = None, data_command: tuple[str, ...] = DATA_COMMAND
) -> StageJob:
    """The job that prepares the data of all stages; of post-training stages behind `last` it prepares nothing."""
    run_dir = run_dir.resolve()
    stage_dir = run_dir / DATA
    return StageJob(
        run=run_dir.name,
        stage=DATA,
        run_dir=str(run_dir),
        stage_dir=str(stage_dir),
        command=[*data_command, "--recipe", str(run_dir / "recipe.json"), *(["--last", last] if last is not None else [])],
        environment=_environment(recipe, stage_dir),
    )


def _environment(recipe: Recipe, stage_dir: Path) -> dict[str, str]:
    threads = str(recipe.cluster.threads_per_rank)
    code = str(Path(__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    environment = {
        STAGE_DIR_VARIABLE: str(stage_dir),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "PYTHONUNBUFFERED": "1",  # a killed job's log ends where the job ended
        # The job runs the code that launched it, and no module in its working folder can take a name away.
        "PYTHONPATH": f"{code}{os.pathsep}{inherited}" if inherited else code,
        "PYTHONSAFEPATH": "1",
    }
    if recipe.cluster.gpu != "cpu":
        environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Megatron: tensor parallel communication is launched in order
    return environment
