"""Options of a Slurm cluster (`cluster.options`), typed and checked: nemo-run quotes nothing, so no value may mean anything to a shell."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, NonNegativeInt, PositiveInt

from recipes.fields import Strict

# What sbatch, srun, bash and pyxis all take as plain text: no white space, quotes, $, `, ;, &, |, <, >, (, ), *, ?, \, comma.
_PLAIN = re.compile(r"[A-Za-z0-9_./@+=-][A-Za-z0-9_./@+=:-]*")
_IMAGE = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./@:#+-]*")  # enroot writes nvcr.io#nvidia/pytorch:TAG
_PATH = re.compile(r"/[A-Za-z0-9_./@+=-]*")
_TIME = re.compile(r"(\d+-)?\d{1,3}:\d{2}:\d{2}")
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_SRUN = re.compile(r"--[a-z][a-z0-9-]*(=[A-Za-z0-9_./@+=:,-]+)?")
_VALUE = re.compile(r"[A-Za-z0-9_./@+=:,-]*")

OWN_SRUN_ARGUMENTS = (
    "chdir",
    "container-image",
    "container-mounts",
    "container-workdir",
    "dependency",
    "error",
    "export",
    "input",
    "job-name",
)
OWN_SRUN_ARGUMENTS += ("kill-on-bad-exit", "nodes", "ntasks", "ntasks-per-node", "output", "time")
"""Set by Quarry or nemo-run; a second value would win silently."""
OWN_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "NNODES", "NODE_RANK", "OMP_NUM_THREADS", "PYTHONPATH", "TORCHX_MAX_RETRIES")


def _matches(pattern: re.Pattern[str], allowed: str, example: str) -> AfterValidator:
    def check(value: str) -> str:
        if not pattern.fullmatch(value):
            raise ValueError(f"{value!r} would not reach Slurm as it is: only {allowed} can be used; for example {example}")
        return value

    return AfterValidator(check)


Packager = Literal["none", "git_archive"]
"""none: jobs run the code where it lies when they start; git_archive: a snapshot of HEAD in the run's folder, made at launch."""
Word = Annotated[str, _matches(_PLAIN, "letters, digits and _ . / @ + = : -", "research_llm")]
Image = Annotated[
    str, _matches(_IMAGE, "letters, digits and _ . / @ : # + -", "/images/quarry.sqsh or nvcr.io#nvidia/pytorch:26.03-py3")
]


def _time(value: str) -> str:
    if not _TIME.fullmatch(value):
        raise ValueError(f"{value!r} is no time limit; write HH:MM:SS or D-HH:MM:SS, for example '24:00:00' (with quotes)")
    if limit_seconds(value) <= 0:
        raise ValueError(f"{value!r} is no time at all; the smallest limit that Slurm keeps is 00:01:00")
    return value


def limit_seconds(time: str) -> int:
    """Seconds of HH:MM:SS or D-HH:MM:SS."""
    days, _, clock = time.rpartition("-")
    hours, minutes, seconds = (int(part) for part in clock.split(":"))
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds


def _mount(value: str) -> str:
    parts = value.split(":")
    paths = all(_PATH.fullmatch(part) for part in parts[:2])
    if len(parts) not in (2, 3) or not paths or (len(parts) == 3 and parts[2] not in ("ro", "rw")):
        raise ValueError(
            f"{value!r} is no mount: write /on/the/node:/in/the/container or with :ro behind it; absolute paths of letters, digits and "
            "_ . / @ + = - (pyxis takes a comma as the next mount)"
        )
    return value


def _srun_argument(value: str) -> str:
    if not _SRUN.fullmatch(value):
        raise ValueError(
            f"{value!r} is no srun argument that can be passed on: write --name or --name=value without spaces or quotes"
        )
    name = value[2:].partition("=")[0]
    if name in OWN_SRUN_ARGUMENTS:
        raise ValueError(f"{value!r}: --{name} is set by Quarry; leave it out")
    return value


def _environment(value: dict[str, str]) -> dict[str, str]:
    for name, content in value.items():
        if not _VARIABLE.fullmatch(name):
            raise ValueError(
                f"{name!r} is no name of an environment variable here: capital letters, digits and _ (nemo-run writes capitals)"
            )
        if name in OWN_VARIABLES:
            raise ValueError(f"{name!r} is set by Quarry; leave it out")
        if not _VALUE.fullmatch(content):
            raise ValueError(
                f"{name}={content!r} would be run as shell: only letters, digits and _ . / @ + = : , - can be used"
            )
    return value


class SlurmOptions(Strict):
    """Everything that `cluster=slurm` can be told in `cluster.options`."""

    account: Word | None = None
    """Required at launch."""
    partition: Word | None = None
    """Required at launch."""
    qos: Word | None = None
    reservation: Word | None = None
    constraint: Word | None = None
    """Feature that the nodes must have."""
    time: Annotated[str, AfterValidator(_time)] = "24:00:00"
    """Limit of one job; a stage that needs longer saves before it and is requeued."""
    signal_seconds_before_limit: PositiveInt = 600
    """SIGTERM this long before the limit, so that the stage saves; Slurm may send it up to 60 s earlier."""
    max_requeues: NonNegativeInt = 200
    """Of one job. What really bounds a stage that makes no progress is in launchers/slurm_job.py."""
    request_gpus: bool = True
    """Whether to ask for cluster.gpus_per_node GPUs (--gpus-per-node); ignored with cluster.gpu=cpu."""
    exclusive: bool = False
    mem: Word | None = None
    """Memory of a node, as sbatch takes it; "0": all."""
    cpus_per_task: PositiveInt | None = None
    """One task a node runs all its ranks."""
    container_image: Image | None = None
    """For pyxis; null: the environment of the nodes."""
    container_mounts: list[Annotated[str, AfterValidator(_mount)]] = []
    """The repository, the run and the data are mounted at their own paths without being named."""
    python: Word | None = None
    """Python in the job; null: `python` in a container, else the one that launches."""
    environment: Annotated[dict[str, str], AfterValidator(_environment)] = {}
    """Of every job (NCCL_DEBUG ...)."""
    srun_args: list[Annotated[str, AfterValidator(_srun_argument)]] = []
    packager: Packager = "none"


def slurm_options(options: dict[str, Any]) -> SlurmOptions:
    """Typed options; pydantic's ValidationError (a ValueError) for one that is wrong or unknown."""
    return SlurmOptions.model_validate(options)
