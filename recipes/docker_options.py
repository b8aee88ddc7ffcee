"""Options of a machine that runs stages in Docker (`cluster.options`), typed and checked: an image that stays the same, no way to root.

nemo-run puts the command into `bash -c "..."` unquoted and splits mounts and limits at colons, so no value may mean anything to either.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, PositiveInt

from recipes.ab_arms import layout
from recipes.fields import Strict
from recipes.slurm_options import Packager, Word

if TYPE_CHECKING:
    from recipes.job_options import Parallel
    from recipes.schema import Recipe

# Docker's own grammar of references (distribution/reference), with the tag or digest that it leaves optional made a must.
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REGISTRY = r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?(?::[0-9]+)?/)?"
_IMAGE = re.compile(
    rf"sha256:[0-9a-f]{{64}}|{_REGISTRY}{_COMPONENT}(?:/{_COMPONENT})*"
    r"(?P<pin>(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}))?(?:@sha256:[0-9a-f]{64})?)"
)
_PATH = re.compile(r"/[A-Za-z0-9_./@+=-]*")
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_NETWORK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_USER = re.compile(r"(\d{1,10}):(\d{1,10})")

ULIMITS = (
    *("core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice"),
    *("nofile", "nproc", "rss", "rtprio", "rttime", "sigpending", "stack"),
)
"""Names that the daemon knows (docker/go-units)."""
OWN_VARIABLES = (
    *("CUDA_DEVICE_MAX_CONNECTIONS", "HOME", "LOGNAME", "MASTER_ADDR", "MASTER_PORT", "MKL_NUM_THREADS", "NNODES", "NODE_RANK"),
    *("NVIDIA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTHONPATH", "PYTHONSAFEPATH", "PYTHONUNBUFFERED"),
    *("QUARRY_ATTEMPT", "QUARRY_STAGE_DIR"),
)
DAEMON_SOCKETS = ("/run", "/var/run", "/var/lib/docker", "/var/lib/containerd")
"""Folders that hold the sockets or the state of the daemon: whoever can write there is root on the machine."""
SYSTEM_FOLDERS = ("/", "/boot", "/dev", "/etc", "/proc", "/root", "/sys")
PREDEFINED_NETWORKS = ("bridge", "container", "default", "none")


def _image(value: str) -> str:
    found = _IMAGE.fullmatch(value)
    if not found:
        raise ValueError(
            f"{value!r} is no name of an image; write NAME:TAG, NAME@sha256:DIGEST or sha256:ID, for example quarry:gpu"
        )
    pinned = value.startswith("sha256:") or "@" in value or found["tag"] not in (None, "latest")
    if not pinned:
        raise ValueError(
            f"{value!r} says 'whatever is the latest': write a tag that you keep or a digest, for example quarry:gpu, so that every stage "
            "of a run has the same software"
        )
    return value


def _below(path: str, folders: tuple[str, ...]) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for folder in folders)


def _mount(value: str) -> str:
    parts = value.split(":")
    paths = all(_PATH.fullmatch(part) and ".." not in part.split("/") for part in parts[:2])
    if len(parts) not in (2, 3) or not paths or (len(parts) == 3 and parts[2] not in ("ro", "rw")):
        raise ValueError(
            f"{value!r} is no mount: write /on/the/machine:/in/the/container, read-only unless :rw stands behind it; absolute paths of "
            "letters, digits and _ . / @ + = - without '..'"
        )
    source, target = (re.sub("/+", "/", part).rstrip("/") or "/" for part in parts[:2])
    if source in SYSTEM_FOLDERS or _below(source, DAEMON_SOCKETS):
        raise ValueError(
            f"{value!r}: {source} in a container gives it this machine; mount the folder that the stages need, and only it"
        )
    if target in SYSTEM_FOLDERS or _below(target, ("/proc", "/sys", "/dev", "/nemo_run")):
        raise ValueError(f"{value!r}: {target} is the container's own; mount it elsewhere, for example {source}:/mnt/data")
    return f"{source}:{target}:{parts[2] if len(parts) == 3 else 'ro'}"


def _environment(value: dict[str, str]) -> dict[str, str]:
    for name, content in value.items():
        if not _VARIABLE.fullmatch(name):
            raise ValueError(f"{name!r} is no name of an environment variable here: capital letters, digits and _")
        if name in OWN_VARIABLES:
            raise ValueError(f"{name!r} is set by Quarry; leave it out")
        if not content.isprintable():
            raise ValueError(f"{name}={content!r} has characters that cannot be printed; leave them out")
    return value


def _ulimits(value: dict[str, int]) -> dict[str, int]:
    for name, limit in value.items():
        if name not in ULIMITS:
            raise ValueError(f"{name!r} is no limit of Docker; known: {', '.join(ULIMITS)}")
        if limit < -1:
            raise ValueError(f"{name} = {limit}: a limit is a number from 0, or -1 for none")
    return value


def _user(value: str) -> str:
    found = _USER.fullmatch(value)
    if not found:
        raise ValueError(f"{value!r} is no user: write UID:GID in numbers, for example '1000:1000' (`id -u`, `id -g`)")
    if int(found[1]) == 0:
        raise ValueError(
            f"{value!r} is root; stages run as the one who launches them, so leave it out or write your own `id -u`:`id -g`"
        )
    return value


def _network(value: str) -> str:
    if not _NETWORK.fullmatch(value):
        raise ValueError(f"{value!r} is no name of a network; letters, digits and _ . -, for example quarry")
    if value in PREDEFINED_NETWORKS:
        raise ValueError(
            f"{value!r} cannot be had through nemo-run, which creates the network it is told unless that is 'host'; take 'host' or a name "
            "of your own, for example quarry"
        )
    return value


class DockerOptions(Strict):
    """Everything that `cluster=docker` can be told in `cluster.options`."""

    container_image: Annotated[str, AfterValidator(_image)] | None = None
    """Required at launch. It must be on the machine already; a launch takes its id once, so all its stages run the same one."""
    gpus: PositiveInt | None = None
    """GPUs of a container that trains; null: as many as the stage's layout has ranks. Data, merges and exports get none."""
    shm_gib: PositiveInt = 16
    """Size limit of /dev/shm, where NCCL and the data loader's workers share memory (ipc private). Unused, it takes no memory."""
    ipc: Literal["private", "host"] = "private"
    network: Annotated[str, AfterValidator(_network)] = "quarry"
    """A bridge of this name is made if there is none; 'host': the machine's own network."""
    ulimits: Annotated[dict[str, int], AfterValidator(_ulimits)] = {"memlock": -1, "stack": 67108864, "nofile": 65536}
    """Soft and hard limit alike; memlock and stack in bytes, -1: none."""
    container_mounts: list[Annotated[str, AfterValidator(_mount)]] = []
    """Read-only unless :rw is behind them. The code, the run's folder, the data and the working folder are mounted without being named."""
    user: Annotated[str, AfterValidator(_user)] | None = None
    """UID:GID; null: those of the caller. Only another group can be chosen: what another user writes, the launcher could not go on with."""
    environment: Annotated[dict[str, str], AfterValidator(_environment)] = {}
    """Of every container (NCCL_DEBUG ...)."""
    python: Word = "python"
    """Python in the container."""
    packager: Packager = "none"


def docker_options(options: dict[str, Any]) -> DockerOptions:
    """Typed options; pydantic's ValidationError (a ValueError) for one that is wrong or unknown."""
    return DockerOptions.model_validate(options)


def layout_of(recipe: Recipe, stage: str) -> Parallel | None:
    """The layout of a stage that trains; None for one that runs without ranks (merge, export)."""
    if stage in recipe.ab:
        return layout(recipe, stage)
    found: Parallel | None = getattr(getattr(recipe, recipe.stage_kind(stage))[stage], "parallel", None)
    return found
