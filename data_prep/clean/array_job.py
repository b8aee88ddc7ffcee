"""datatrove's Slurm executor, submitted so that a real Slurm takes it, whatever the paths, and so that a failure ends the chain.

datatrove's own submission writes paths unquoted into `#SBATCH` lines and the shell, leaves what waits for a failed job waiting for
ever, shows a refusal of sbatch as a traceback, submits one more job per stage for statistics that nobody reads (all seen on Slurm
22.05), and of a stage in several arrays lets the next wait for the last only (read). The tasks are datatrove's.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from copy import deepcopy
from pathlib import Path
from typing import Any

import dill
from datatrove.executor import SlurmPipelineExecutor
from dill import CONTENTS_FMODE

from data_prep.errors import DataError

TIMEOUT_SECONDS = 60.0
"""For sbatch; a controller that is restarted answers within seconds."""


class ArrayJob(SlurmPipelineExecutor):
    """The tasks of a stage that are missing, as one job array, or as many as `max_array_size` makes necessary."""

    def __init__(self, *arguments: Any, after: tuple[str, ...] = (), **options: Any):
        """`after`: ids of jobs that must have succeeded."""
        super().__init__(*arguments, **options)
        self.after = after
        self.job_ids: list[str] = []

    def launch_job(self) -> None:
        """Submit; DataError with sbatch's reason if it refuses, ids of what it took before are in `job_ids`."""
        folder = Path(self.logging_dir.resolve_paths(""))
        ranks = self.get_incomplete_ranks()
        with self.logging_dir.open("executor.pik", "wb") as file:
            dill.dump(deepcopy(self), file, fmode=CONTENTS_FMODE)
        with self.logging_dir.open("ranks_to_run.json", "w") as file:
            json.dump(ranks, file)
        size = min(len(ranks), self.max_array_size)
        directives = self.get_sbatch_args(size)
        # On the command line, where nothing takes a space for the end of a path; % would begin one of Slurm's own patterns.
        log = str(Path(directives.pop("output")).parent).replace("%", "%%") + "/%A_%a.out"
        del directives["error"]  # the output's
        script = folder / "launch_script.slurm"
        pickled = shlex.quote(str(folder / "executor.pik"))
        script.write_text(self.get_launch_file_contents(directives, f"srun -l -n 1 launch_pickled_pipeline {pickled}"))
        for offset in range(-(-len(ranks) // size)):
            dependency = [f"afterok:{':'.join(self.after)}"] if self.after else []
            if self.job_ids:  # not all at once: more than the array's own limit of tasks at a time
                dependency.append(f"afterany:{self.job_ids[-1]}")
            arguments = [f"--export=ALL,RUN_OFFSET={offset}", f"--output={log}", "--kill-on-invalid-dep=yes"]
            if dependency:
                arguments.append(f"--dependency={','.join(dependency)}")
            self.job_ids.append(_sbatch([*arguments, str(script)], self.job_name))
        self.job_id = self.job_ids[-1]


def _sbatch(arguments: list[str], name: str) -> str:
    """The id of the job."""
    try:
        done = subprocess.run(
            ["sbatch", *arguments],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DataError(
            f"sbatch gave no answer within {TIMEOUT_SECONDS:g} s for the job {name}: is slurmctld up (`scontrol ping`)? "
            f"It may have taken the job: look with `squeue --me --name={name}` before you try again"
        ) from None
    if done.returncode:
        raise DataError(f"sbatch refused the job {name}: {' '.join(done.stderr.split())}")
    found = re.search(r"Submitted batch job (\d+)", done.stdout)  # behind it may stand: on cluster NAME
    if found is None:
        raise DataError(f"sbatch named no job for {name}: {done.stdout.strip()!r}")
    return found.group(1)
