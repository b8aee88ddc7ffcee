"""What a machine has for training, found without importing any of it: packages, GPUs, Slurm, Docker, disk, limits, clock.

Every probe is a function of a `Machine`, which holds the only ways out (commands, package versions, folders), so that tests present
another machine by a few scripts on another PATH. A probe never waits longer than `Machine.timeout_seconds` for a command.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from packaging.requirements import Requirement

State = Literal["ok", "missing", "warning"]

TIMEOUT_SECONDS = 10.0
"""For one command. nvidia-smi takes 1 to 3 s on a node with 8 GPUs and no persistence daemon; what takes 10 s is ill."""
ABANDON_SECONDS = 0.5
"""For a killed command to end. One that hangs inside a driver cannot be killed; it is left behind."""
PACKAGES = ("torch", "megatron-core", "nemo-run", "leptonai")
"""The pinned packages that get a line each; the other requirements share one."""
NCCL_PACKAGES = ("nvidia-nccl-cu13", "nvidia-nccl-cu12")
LEAST_DRIVER = 580
"""First driver branch with CUDA 13, which the pinned torch is built for (CUDA 13.0 release notes, table of drivers)."""
LEAST_SHM_GIB = 1.0
"""NCCL and data loader workers share memory there; Docker's default of 64 MiB is too little for either."""
LEAST_FILES = 4096
"""Open files: each data source maps two files in each worker and rank, beside sockets of NCCL and gloo."""
LEAST_DISK_GB = 5.0
"""Below this much free space a run is not worth starting; the smoke curriculum itself writes less than 1 GB."""
MAX_CLOCK_SKEW_SECONDS = 2.0
"""Between this machine and the file system of the runs: whether a job lives is judged by the age of a file."""
SETUP = "run `make setup` (or build the image: docs/docker.md)"


@dataclass(frozen=True)
class Line:
    """One thing that was looked for."""

    name: str
    state: State
    found: str
    remedy: str = ""
    """What to do about it; empty when there is nothing to do."""


@dataclass(frozen=True)
class Answer:
    """What a command said."""

    trouble: Literal["", "absent", "hangs", "failed"]
    output: str = ""
    """Standard output, or what the command complained about if it failed."""
    exit_code: int | None = None


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_mib: float
    driver: str
    capability: tuple[int, int]
    """CUDA compute capability, (major, minor)."""


def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Machine:
    """The ways in which a probe may look at a machine."""

    path: str = field(default_factory=lambda: os.environ.get("PATH", os.defpath))
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    version_of: Callable[[str], str | None] = _version_of
    """Version of an installed distribution, None if it is not installed."""
    requirements: Callable[[], list[str]] = lambda: metadata.requires("quarry") or []
    """Requirements of Quarry as its pyproject.toml states them, markers included."""
    python: str = field(default_factory=platform.python_version)
    uid: int = field(default_factory=os.getuid)
    shm: Path = Path("/dev/shm")
    timeout_seconds: float = TIMEOUT_SECONDS

    def ask(self, *command: str) -> Answer:
        """Run a command of the machine, without a shell, no longer than `timeout_seconds`; never raises for what it does."""
        program = shutil.which(command[0], path=self.path)
        if program is None:
            return Answer("absent")
        # Files instead of pipes: a grandchild that outlives the command would keep a pipe open, and reading it would wait for that.
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            try:
                process = subprocess.Popen(
                    [program, *command[1:]],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    env={**self.environment, "PATH": self.path, "LC_ALL": "C"},
                    start_new_session=True,
                )
            except OSError as error:
                return Answer("failed", str(error))
            try:
                code = process.wait(self.timeout_seconds)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(ABANDON_SECONDS)
                return Answer("hangs", f"no answer within {self.timeout_seconds:g} s")
            said, complaint = (_read(stream) for stream in (out, err))
        if code != 0:
            last = next((line for line in reversed((complaint or said).splitlines()) if line.strip()), "no message")
            return Answer("failed", f"exit code {code}: {last.strip()}", code)
        return Answer("", said.strip(), code)


def _read(stream: IO[bytes]) -> str:
    stream.seek(0)
    return stream.read().decode(errors="replace")


@dataclass(frozen=True)
class Findings:
    lines: list[Line]
    gpus: list[Gpu]
    memory_gb: float
    cores: int

    def line(self, name: str) -> Line:
        return next(line for line in self.lines if line.name == name)


def examine(machine: Machine, runs_root: Path | None = None, data_root: Path | None = None) -> Findings:
    """Look for everything, at the same time, so that what hangs costs its time limit once. Order of the lines is fixed."""
    memory_gb, cores = _memory_gb(), len(os.sched_getaffinity(0))
    folders = [(name, root) for name, root in (("disk runs", runs_root), ("disk data", data_root)) if root is not None]
    with ThreadPoolExecutor() as pool:
        gpu = pool.submit(probe_gpus, machine)
        jobs = [pool.submit(probe, machine) for probe in (probe_slurm, probe_docker)]
        clock = pool.submit(probe_clock, machine, runs_root)
        lines = [probe_python(machine), *probe_packages(machine), *probe_gpu_packages(machine)]
        gpu_lines, gpus = gpu.result()
        lines += gpu_lines
        for job in jobs:
            lines += job.result()
        lines += [probe_disk(name, root) for name, root in folders]
        lines += [probe_shm(machine), *_memory_and_cores(memory_gb, cores), probe_files(), clock.result()]
    return Findings(lines, gpus, memory_gb, cores)


def probe_python(machine: Machine) -> Line:
    wanted = "3.12"
    if machine.python.startswith(f"{wanted}."):
        return Line("python", "ok", machine.python)
    return Line(
        "python", "missing", f"{machine.python}; Quarry is locked for {wanted}", f"install Python {wanted}, then {SETUP}"
    )


def probe_packages(machine: Machine) -> list[Line]:
    """The base requirements against what is installed. Reads only metadata: importing torch takes seconds."""
    from packaging.requirements import Requirement

    wanted = [r for r in map(Requirement, machine.requirements()) if r.marker is None]
    lines = [_package(machine, r) for r in wanted if r.name in PACKAGES]
    lines.sort(key=lambda line: PACKAGES.index(line.name))
    lines += [
        Line(name, "missing", "no requirement of the installed quarry", SETUP)
        for name in PACKAGES
        if name not in {r.name for r in wanted}
    ]
    rest = [_package(machine, r) for r in wanted if r.name not in PACKAGES]
    wrong = [line for line in rest if line.state != "ok"]
    if wrong:
        lines.append(Line("other packages", "missing", ", ".join(f"{line.name}: {line.found}" for line in wrong), SETUP))
    else:
        lines.append(Line("other packages", "ok", f"{len(rest)} as pyproject.toml asks"))
    return lines


def _package(machine: Machine, wanted: Requirement) -> Line:
    from packaging.version import InvalidVersion, Version

    name, specifier = wanted.name, wanted.specifier
    found = machine.version_of(name)
    if found is None:
        return Line(name, "missing", f"not installed; needs {specifier}", SETUP)
    with contextlib.suppress(InvalidVersion):
        if specifier.contains(found, prereleases=True):
            return Line(name, "ok", found)
        # NVIDIA's images name their build of 2.11 "2.11.0a0+<commit>.nv26.03", which sorts before 2.11.0.
        pins = [Version(s.version).release for s in specifier if s.operator == "=="]
        if name == "torch" and ".nv" in found and pins == [Version(found).release]:
            return Line(name, "ok", f"{found} (NVIDIA's build of that release)")
    return Line(name, "missing", f"{found}; needs {specifier}", SETUP)


def probe_gpu_packages(machine: Machine) -> list[Line]:
    from packaging.requirements import Requirement

    engine = machine.version_of("transformer-engine")
    pinned = next((r for r in map(Requirement, machine.requirements()) if r.name == "transformer-engine"), None)
    image = "use the gpu image (docs/docker.md), or `pip install --no-build-isolation '.[gpu]'` beside a CUDA toolkit"
    if engine is None:
        first = Line("transformer-engine", "missing", "not installed; ranks on GPUs need it", image)
    elif pinned is not None and not pinned.specifier.contains(engine, prereleases=True):
        found = f"{engine}; pyproject.toml pins {pinned.specifier}"
        first = Line(
            "transformer-engine", "warning", found, "an image's own version is fine once `pytest tests/gpu` passes in it"
        )
    else:
        first = Line("transformer-engine", "ok", engine)
    apex = machine.version_of("apex")
    second = (
        Line("apex", "ok", apex)
        if apex
        else Line("apex", "warning", "not installed; Megatron then uses slower kernels for some steps", "the gpu image has it")
    )
    nccl = next(((name, v) for name in NCCL_PACKAGES if (v := machine.version_of(name))), None)
    if nccl:
        third = Line("nccl", "ok", f"{nccl[1]} ({nccl[0]})")
    elif version := machine.environment.get("NCCL_VERSION"):
        third = Line("nccl", "ok", f"{version} (the image's, from NCCL_VERSION)")
    else:
        third = Line(
            "nccl",
            "warning",
            "no nvidia-nccl package; a CPU build of torch has none",
            "ranks on GPUs need a CUDA build of torch",
        )
    return [first, second, third]


def probe_gpus(machine: Machine) -> tuple[list[Line], list[Gpu]]:
    query = "--query-gpu=name,memory.total,driver_version,compute_cap"
    answer = machine.ask("nvidia-smi", query, "--format=csv,noheader,nounits")
    remedy = "on a GPU node: install the driver; in a container: start it with --gpus all (docs/docker.md)"
    if answer.trouble == "absent":
        found = "no nvidia-smi"
        return [Line("driver", "missing", found, remedy), Line("gpus", "missing", "none", remedy)], []
    if answer.trouble == "hangs":
        remedy = "look for Xid errors in `dmesg` on this node; drain it, and reset the GPU or reboot"
        found = f"nvidia-smi hangs ({answer.output})"
        return [Line("driver", "missing", found, remedy), Line("gpus", "missing", "unknown: nvidia-smi hangs", remedy)], []
    gpus = [] if answer.trouble else [gpu for line in answer.output.splitlines() if (gpu := _parse_gpu(line))]
    if not gpus:
        found = answer.output if answer.trouble else f"nvidia-smi names no GPU ({answer.output.strip() or 'no output'!s})"
        return [Line("driver", "missing", found, remedy), Line("gpus", "missing", "none", remedy)], []
    visible = machine.environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = gpus[: len([d for d in visible.split(",") if d.strip() and d.strip() != "-1"])]
    driver = _parse_driver(answer.output)
    major = driver.partition(".")[0]
    old = major.isdigit() and int(major) < LEAST_DRIVER
    driver_line = (
        Line(
            "driver",
            "warning",
            f"{driver}; CUDA 13 needs {LEAST_DRIVER}",
            "update it, or use the gpu image with its forward-compatibility libraries",
        )
        if old
        else Line("driver", "ok", driver)
    )
    if not gpus:
        return [
            driver_line,
            Line("gpus", "missing", f"CUDA_VISIBLE_DEVICES={visible!r} hides all", "unset CUDA_VISIBLE_DEVICES"),
        ], []
    kinds = {(g.name, g.memory_mib, g.capability): 0 for g in gpus}
    for g in gpus:
        kinds[g.name, g.memory_mib, g.capability] += 1
    found = ", ".join(f"{n} x {k[0]} ({k[1] / 1024:.0f} GiB, compute capability {k[2][0]}.{k[2][1]})" for k, n in kinds.items())
    if len(kinds) > 1:
        return [
            driver_line,
            Line("gpus", "warning", found, "ranks run at the pace of the slowest; choose with CUDA_VISIBLE_DEVICES"),
        ], gpus
    return [driver_line, Line("gpus", "ok", found)], gpus


def _parse_gpu(line: str) -> Gpu | None:
    """`NVIDIA H100 80GB HBM3, 81559, 580.95.05, 9.0`; None for what is no such line."""
    parts = [p.strip() for p in line.split(",")]
    try:
        name, memory, driver, capability = parts
        major, minor = capability.split(".")
        memory_mib = float(memory) if memory.replace(".", "").isdigit() else 0.0  # "[N/A]" on machines with one memory for all
        return Gpu(name, memory_mib, driver, (int(major), int(minor)))
    except ValueError:
        return None


def _parse_driver(output: str) -> str:
    return next(gpu.driver for line in output.splitlines() if (gpu := _parse_gpu(line)))


def probe_slurm(machine: Machine) -> list[Line]:
    """The client, accounting, pyxis and munge. What needs a working client is not asked when there is none."""
    login = "run on a login node of the cluster, or install the Slurm client with the cluster's slurm.conf"
    client = machine.ask("sbatch", "--version")
    if client.trouble:
        found = (
            "no sbatch" if client.trouble == "absent" else f"sbatch {'hangs: ' * (client.trouble == 'hangs')}{client.output}"
        )
        first = Line("slurm client", "missing", found, login)
        no_client = "not asked: no working Slurm client"
        rest = [
            Line("slurm accounting", "missing", no_client, login),
            Line("pyxis", "missing", no_client, "only for cluster.options.container_image; " + login),
        ]
    else:
        first = Line("slurm client", "ok", client.output)
        with ThreadPoolExecutor() as pool:
            accounting = pool.submit(machine.ask, "sacct", "-n", "-X", "-S", "now")
            help_text = machine.ask("srun", "--help")
        rest = [_accounting(accounting.result()), _pyxis(help_text)]
    answer = machine.ask("munge", "-n")
    remedy = "install munge with the cluster's key and start munged"
    if not answer.trouble:
        munge = Line("munge", "ok", "munged answers")
    else:
        found = "no munge" if answer.trouble == "absent" else f"munge {'hangs: ' * (answer.trouble == 'hangs')}{answer.output}"
        # With auth/slurm there is none, and a client that has no munge of its own may still reach the controller.
        munge = Line(
            "munge",
            "missing" if first.state == "missing" else "warning",
            found,
            f"{remedy}; not needed with AuthType=auth/slurm",
        )
    return [first, *rest, munge]


def _accounting(answer: Answer) -> Line:
    if not answer.trouble:
        return Line("slurm accounting", "ok", "sacct answers")
    found = "no sacct" if answer.trouble == "absent" else f"sacct {'hangs: ' * (answer.trouble == 'hangs')}{answer.output}"
    return Line(
        "slurm accounting",
        "warning",
        found,
        "ask for slurmdbd: without it, how a job ended is forgotten within minutes (MinJobAge)",
    )


def _pyxis(answer: Answer) -> Line:
    if not answer.trouble and "--container-image" in answer.output:
        return Line("pyxis", "ok", "srun has --container-image")
    found = answer.output if answer.trouble in ("hangs", "failed") else "srun has no --container-image"
    return Line(
        "pyxis", "missing", found, "ask for pyxis and enroot on the nodes, or leave cluster.options.container_image=null"
    )


def probe_docker(machine: Machine) -> list[Line]:
    answer = machine.ask("docker", "version", "--format", "{{.Server.Version}}")
    if answer.trouble == "absent":
        return [Line("docker", "missing", "no docker", "install Docker Engine and the NVIDIA Container Toolkit")]
    if answer.trouble:
        found = f"{'docker hangs: ' * (answer.trouble == 'hangs')}{answer.output}"
        return [Line("docker", "missing", found, "start the daemon (`systemctl start docker`), and be in the group docker")]
    if machine.uid == 0:  # `quarry launch cluster=docker` refuses it
        found, remedy = (
            f"{answer.output}, but this is root",
            "launch as an ordinary user in the group docker: no stage runs as root",
        )
        return [Line("docker", "missing", found, remedy)]
    runtimes = machine.ask("docker", "info", "--format", "{{json .Runtimes}}")
    try:
        known = "nvidia" in json.loads(runtimes.output)
    except ValueError:
        known = False
    if not known and shutil.which("nvidia-ctk", path=machine.path) is None:
        return [
            Line(
                "docker",
                "warning",
                f"{answer.output}, without NVIDIA's runtime",
                "install the NVIDIA Container Toolkit, else --gpus fails",
            )
        ]
    return [Line("docker", "ok", f"{answer.output}, with NVIDIA's runtime or toolkit")]


def nearest_existing(folder: Path) -> Path:
    """The folder, or the closest of its parents that exists."""
    return next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())


def probe_disk(name: str, root: Path) -> Line:
    there = nearest_existing(root)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        key = "cluster.runs_root" if name == "disk runs" else "data.root"
        return Line(name, "missing", f"{there} is not writable", f"change its owner, or set {key} to a folder of yours")
    free_gb = shutil.disk_usage(there).free / 1e9
    found = f"{free_gb:,.0f} GB free at {root}"
    if free_gb < LEAST_DISK_GB:
        return Line(name, "warning", found, "free some, or put it elsewhere")
    return Line(name, "ok", found)


def probe_shm(machine: Machine) -> Line:
    try:
        size = shutil.disk_usage(machine.shm).total / 2**30
    except OSError:
        return Line("shared memory", "warning", f"no {machine.shm}", "mount a tmpfs there; in a container: --ipc=host")
    if size < LEAST_SHM_GIB:
        found = f"{size * 1024:.0f} MiB at {machine.shm}"
        return Line("shared memory", "warning", found, "in a container: --ipc=host, or --shm-size=16g; else: remount it larger")
    return Line("shared memory", "ok", f"{size:.0f} GiB at {machine.shm}")


def _memory_and_cores(memory_gb: float, cores: int) -> list[Line]:
    return [Line("memory", "ok", f"{memory_gb:.0f} GB"), Line("cores", "ok", str(cores))]


def _memory_gb() -> float:
    """Physical memory, or the limit of this control group (version 2) if that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total / 1e9


def probe_files() -> Line:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < LEAST_FILES:
        return Line(
            "open files",
            "warning",
            f"limit {soft}",
            "`ulimit -n 65536` before the launch; in a container: --ulimit nofile=65536",
        )
    return Line("open files", "ok", "no limit" if soft == resource.RLIM_INFINITY else f"limit {soft}")


def probe_clock(machine: Machine, runs_root: Path | None) -> Line:
    """Whether something keeps the clock, and whether the file system of the runs agrees with it."""
    kept = _synchronised(machine)
    remedy = "start chronyd or systemd-timesyncd on this machine, and on the file server"
    there = nearest_existing(runs_root) if runs_root else Path(tempfile.gettempdir())
    skew = 0.0
    with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir=there, prefix=".quarry-doctor-") as file:
        # The time between the two readings is ours, not a skew.
        before = time.time()
        file.write(b"x")
        file.flush()
        os.fsync(file.fileno())
        after = time.time()
        written = os.stat(file.name).st_mtime
        skew = min(0.0, written - before) or max(0.0, written - after)
    if abs(skew) > MAX_CLOCK_SKEW_SECONDS:
        return Line("clock", "warning", f"files at {there} are {skew:+.1f} s off this machine's clock", remedy)
    if kept is False:
        return Line("clock", "warning", "not synchronised", remedy)
    return Line(
        "clock", "ok", "synchronised" if kept else "agrees with the file system; nothing here says whether it is synchronised"
    )


def _synchronised(machine: Machine) -> bool | None:
    """None: nobody can say (a container has neither)."""
    answer = machine.ask("timedatectl", "show", "--property=NTPSynchronized", "--value")
    if not answer.trouble and answer.output in ("yes", "no"):
        return answer.output == "yes"
    answer = machine.ask("chronyc", "-n", "tracking")
    if not answer.trouble:
        status: Iterable[str] = (
            line.partition(":")[2].strip() for line in answer.output.splitlines() if line.startswith("Leap status")
        )
        return next(iter(status), "") not in ("Not synchronised", "")
    return None
