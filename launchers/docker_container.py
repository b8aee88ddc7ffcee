"""The container of one stage, through nemo-run's DockerExecutor: what it may see, as whom it runs, and the wrapper as its first process.

nemo-run's own `bash -c "COMMAND 2>&1 | tee ..."` would be process 1 of the container, and a shell there drops SIGTERM. The command
therefore begins with `exec`: the wrapper takes the shell's place and hears what `docker stop`, `quarry cancel` and a shutdown send, and what
nemo-run appends is reached only if it cannot be started. Code, run, data and working folder lie at their own paths, so the recipe
means the same inside. Paths and arguments are checked to mean nothing to a shell, because nemo-run quotes nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launchers.code_snapshot import Code
from launchers.errors import LaunchError
from launchers.local import WRAPPER_MODULE
from launchers.stage_job import DATA, StageJob
from recipes.docker_options import SYSTEM_FOLDERS, DockerOptions, docker_options, layout_of
from recipes.schema import Recipe

STAGE_LABEL = "nemo-run/id"
"""Label of a container: the absolute folder of its stage. nemo-run's own label, which takes any text."""
RUN_LABEL = "nemo-run/experiment-id"
"""The absolute folder of its run."""
HOSTNAME_CHARACTERS = 32
"""Of the end of its name a container gets its host name from nemo-run; one must not begin with '-' or '.'."""
EXIT_NOT_STARTED = 126
"""Of a container whose wrapper could not be started, as shells have it."""

_PLAIN_PATH = re.compile(r"/[A-Za-z0-9_./@+=-]*")
_PLAIN_WORD = re.compile(r"[A-Za-z0-9_./@+=:-]+")


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who launches: containers run as this user, so that what they write belongs to it and what it may not read stays unread."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    """Supplementary groups."""
    home: str

    @classmethod
    def of_this_process(cls) -> Caller:
        return cls(uid=os.getuid(), gid=os.getgid(), groups=tuple(os.getgroups()), home=os.path.expanduser("~"))


def options_of(recipe: Recipe) -> DockerOptions:
    """The cluster's options, complete for a launch; LaunchError for what only a launch needs."""
    options = docker_options(recipe.cluster.options)
    if options.container_image is None:
        raise LaunchError(
            "cluster.options.container_image is not set, and no container can be started without it; build one with "
            f"`docker build --target {'cpu' if recipe.cluster.gpu == 'cpu' else 'gpu'} -t quarry:TAG .` (docs/docker.md) and add "
            "cluster.options.container_image=quarry:TAG"
        )
    return options


def plain_path(what: str, path: str) -> str:
    """`path` if neither a shell nor Docker's mounts read it as something else; LaunchError otherwise."""
    if not _PLAIN_PATH.fullmatch(path):
        raise LaunchError(
            f"{what} {path!r} has characters that a shell or a mount of Docker would read as something else; use an absolute path of "
            "letters, digits and _ . / @ + = -"
        )
    return path


def gpus_of(recipe: Recipe, stage: str) -> int:
    """GPUs of the stage's container; none for data, merges and exports, and none on CPU."""
    if recipe.cluster.gpu == "cpu" or stage == DATA:
        return 0
    layout = layout_of(recipe, stage)
    if layout is None:
        return 0
    return docker_options(recipe.cluster.options).gpus or layout.gpus


class Containers:
    """Makes the container of each job of a run. `image` is what Docker is told: the id that the launch has found, or a name."""

    def __init__(
        self, recipe: Recipe, run_dir: Path, caller: Caller, image: str | None = None, code: Code | None = None
    ) -> None:
        self.recipe = recipe
        self.options = options_of(recipe)
        self.image = image or self.options.container_image
        self.caller = caller
        self.run_dir = plain_path("the folder of the run", str(run_dir.resolve()))
        code = code or Code.of(recipe, run_dir)
        self.code = plain_path("the folder of the code", str(code.path))
        self.data = plain_path("data.root", os.path.abspath(recipe.data.root))
        self.workdir = plain_path("the working folder", os.getcwd())
        if self.workdir in (*SYSTEM_FOLDERS, caller.home):
            raise LaunchError(
                f"launched from {self.workdir}, which every container would see (relative paths of the recipe begin there): launch from the "
                "folder of the repository, or from a folder of your own for runs"
            )
        self.user = self._user()
        self._check_targets()
        self._check_inputs()

    def _user(self) -> str:
        if self.caller.uid == 0:
            raise LaunchError(
                "quarry is run as root, and a stage would be root too: launch as an ordinary user in the group docker "
                "(`usermod -aG docker NAME`), whose the runs and the data then are"
            )
        user = self.options.user or f"{self.caller.uid}:{self.caller.gid}"
        uid, gid = (int(part) for part in user.split(":"))
        if uid != self.caller.uid:
            raise LaunchError(
                f"cluster.options.user = {user}: the run would belong to user {uid}, and this launcher is {self.caller.uid} and could not go "
                f"on with it; launch as that user, or leave it out (only the group can be another: {self.caller.uid}:GID)"
            )
        if gid not in (self.caller.gid, *self.caller.groups):
            raise LaunchError(f"cluster.options.user = {user}: you are not in group {gid} (`id -G` lists yours)")
        return user

    def mounts(self, stage: str) -> list[str]:
        """`SOURCE:TARGET:MODE` of the stage's container; only the data's own job may write to the data."""
        own = {
            self.code: "ro",
            self.workdir: "ro",
            self.data: "rw" if stage == DATA else "ro",
            self.run_dir: "rw",
        }
        return [*(f"{path}:{path}:{mode}" for path, mode in own.items()), *self.options.container_mounts]

    def _check_targets(self) -> None:
        """LaunchError for a mount of the recipe that hides one of ours, or lies inside the code."""
        own = (self.code, self.run_dir, self.data, self.workdir)
        for mount in self.options.container_mounts:
            target = mount.split(":")[1]
            hidden = next((path for path in own if path == target or path.startswith(f"{target}/")), None)
            if hidden is not None:
                raise LaunchError(
                    f"cluster.options.container_mounts: {mount} would hide {hidden}, which is mounted anyway; leave it out, or mount it "
                    "elsewhere in the container"
                )

    def _check_inputs(self) -> None:
        """LaunchError for a file of the recipe that no container would see."""
        seen = [mount.split(":")[1] for mount in self.mounts(DATA)]
        for key, pattern in _inputs(self.recipe):
            path = os.path.abspath(re.split(r"[*?\[{]", pattern, maxsplit=1)[0])
            if not any(path == folder or path.startswith(f"{folder}/") for folder in seen):
                folder = os.path.dirname(path)
                raise LaunchError(
                    f"{key} = {pattern}: no container would see it; add cluster.options.container_mounts='[\"{folder}:{folder}\"]'"
                )

    def check_sources(self) -> None:
        """LaunchError for a mount whose folder is not there: Docker would make an empty one, as root."""
        for mount in self.options.container_mounts:
            source = mount.split(":")[0]
            if not os.path.exists(source):
                raise LaunchError(f"cluster.options.container_mounts: {mount}: there is no {source} on this machine")

    def job(self, job: StageJob) -> StageJob:
        """The job as the container has to read it: with its own Python and the mounted code."""
        command = [self.options.python if word == sys.executable else word for word in job.command]
        return replace(job, command=command, environment={**job.environment, "PYTHONPATH": self.code})

    def command(self, job: StageJob, attempt: int) -> list[str]:
        """Words of nemo-run's `bash -c`."""
        arguments = [self.options.python, "-m", WRAPPER_MODULE, *job.wrapper_arguments(attempt)]
        for word in arguments:
            if not _PLAIN_WORD.fullmatch(word):
                raise LaunchError(f"stage '{job.stage}': {word!r} in its command would mean something to a shell")
        log = plain_path("the log of the stage", str(job.log))  # also for what Python says when the wrapper cannot be imported
        return ["cd", self.workdir, "&&", "exec", *arguments, ">>", log, "2>&1", "||", "exit", str(EXIT_NOT_STARTED)]

    def name(self, job: StageJob, attempt: int) -> str:
        """Of the container: unique on the machine, readable in `docker ps`."""
        digest = hashlib.sha256(job.stage_dir.encode()).hexdigest()
        for length in range(8, len(digest)):
            name = f"quarry-{job.run}-{job.stage}-{attempt}-{digest[:length]}"
            if name[-HOSTNAME_CHARACTERS:][0].isalnum():
                return name
        raise AssertionError("a digest longer than a host name begins with a hexadecimal digit")

    def container(self, nemo_run: Any, job: StageJob, attempt: int) -> Any:
        """nemo-run's DockerContainer; its `run(client, id)` starts it."""
        from nemo_run.core.execution.docker import DockerContainer

        options = self.options
        executor = nemo_run.DockerExecutor(
            container_image=self.image,
            num_gpus=gpus_of(self.recipe, job.stage) or None,
            shm_size=f"{options.shm_gib}g" if options.ipc == "private" else None,
            ipc_mode=options.ipc,
            ulimits=[f"{name}:{limit}:{limit}" for name, limit in options.ulimits.items()],
            network=options.network,
            volumes=self.mounts(job.stage),
            env_vars={
                **options.environment,
                # The image's own entry for this uid may be missing: torch asks for a user name, and several caches go to the home.
                "HOME": "/tmp",
                "LOGNAME": "quarry",
                "PYTHONPATH": self.code,
                "PYTHONSAFEPATH": "1",
            },
            # The image's `quarry doctor` every 10 minutes says nothing about a stage; the wrapper's hang watch does.
            healthcheck={"test": ["NONE"]},
            additional_kwargs={
                "user": self.user,
                "group_add": [str(group) for group in self.caller.groups if group != 0],
                "cap_drop": ["ALL"],
                "security_opt": ["no-new-privileges:true"],
            },
            packager=nemo_run.Packager(),
            retries=0,
        )
        executor.assign(exp_id=self.run_dir, exp_dir=self.run_dir, task_id=job.stage, task_dir=job.stage_dir)
        return DockerContainer(
            name=self.name(job, attempt), command=self.command(job, attempt), executor=executor, extra_env={}
        )


def _inputs(recipe: Recipe) -> list[tuple[str, str]]:
    """(key, path or glob pattern) of the files that the recipe reads and does not make."""
    found = [(f"data.sources.{name}.paths", path) for name, source in recipe.data.sources.items() for path in source.paths]
    if recipe.data.tokenizer.path is not None:
        found.append(("data.tokenizer.path", recipe.data.tokenizer.path))
    for stage, sft in recipe.sft.items():
        if stage in recipe.stages:
            found += [
                (f"sft.{stage}.sources.{name}.paths", path) for name, source in sft.sources.items() for path in source.paths
            ]
            if sft.initial is not None:
                found.append((f"sft.{stage}.initial", sft.initial))
            if sft.chat_template is not None:
                found.append((f"sft.{stage}.chat_template", sft.chat_template))
    for stage, grpo in recipe.grpo.items():
        if stage in recipe.stages:
            found += [(f"grpo.{stage}.prompts", path) for path in grpo.prompts]
            if grpo.initial is not None:
                found.append((f"grpo.{stage}.initial", grpo.initial))
    return found
