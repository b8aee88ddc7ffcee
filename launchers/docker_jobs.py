"""Starts the stages of a chain in Docker, one container each, and finds, stops and waits for those that run.

Containers belong to the daemon: they outlive a launcher that was killed, and the next one finds them by the folder of their stage, which
is their label. nemo-run makes and starts a container (`launchers/docker_container.py`); its scheduler for Docker is left out, because it pulls
the image again for every stage (so that two stages might run two images) and removes what runs when the launcher leaves.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers import stage_job
from launchers.code_snapshot import Code
from launchers.docker_container import RUN_LABEL, STAGE_LABEL, Caller, Containers, gpus_of
from launchers.errors import LaunchError
from launchers.local import LocalJobs
from launchers.stage_job import DATA, StageJob
from recipes.schema import Recipe

if TYPE_CHECKING:
    from launchers.chain import Launch

LIVE = ("running", "paused", "restarting", "removing")
"""States of a container that has, or may yet have, processes."""
NEVER_STARTED = ("created", "exited", "dead")
PATIENCE_SECONDS = 60.0
"""How long the daemon may not answer (a restart, a busy disk) before a launcher that waits for a container gives up."""
EXIT_POLL_SECONDS = 0.05


class SubmissionFailed(LaunchError):
    """Docker did not start a container."""


class RunningContainers:
    """Containers of a stage, nearly always one; has the shape of a submitted job."""

    def __init__(self, containers: list[Any], image: str = "") -> None:
        self._containers = containers
        self.image = image
        """Id of the image, for the journal."""
        self._silent_since: float | None = None
        self.job = ", ".join(container.name for container in containers)

    def alive(self) -> bool:
        """LaunchError when the daemon has not answered for PATIENCE_SECONDS."""
        try:
            alive = any(_is_live(container) for container in self._containers)
        except _errors() as error:
            now = time.monotonic()
            self._silent_since = self._silent_since or now
            if now - self._silent_since > PATIENCE_SECONDS:
                raise LaunchError(
                    f"the Docker daemon has not answered for {PATIENCE_SECONDS:.0f} s ({error}), so nobody knows how {self.job} does; when it "
                    "answers again, the same command goes on: it waits for the container if it still runs"
                ) from error
            return True
        self._silent_since = None
        return alive

    def stop(self, *, kill: bool) -> None:
        """SIGTERM to the wrapper, which makes the stage save; or the end of it at once. What has ended meanwhile is left alone."""
        for container in self._containers:
            try:
                container.kill(signal="SIGKILL" if kill else "SIGTERM")
            except _errors() as error:
                if not _is_gone(error):
                    raise LaunchError(f"container {container.name} could not be told to stop: {_said(error)}") from error


class StrayContainers(RunningContainers):
    """Left by an earlier launcher."""


class DockerJobs:
    """Submits jobs to the Docker daemon of this machine."""

    def __init__(self, recipe: Recipe, run_dir: Path, nemo: LocalJobs, caller: Caller | None = None) -> None:
        """Find the daemon and the image; LaunchError, with the remedy, if either is not there or a container could do no work."""
        self._nemo = nemo
        caller = caller or Caller.of_this_process()
        self.code = Code.of(recipe, run_dir)
        named = Containers(recipe, run_dir, caller, code=self.code)
        named.check_sources()
        self.client = connect()
        _check_daemon(self.client)
        self.image = _image_id(self.client, str(named.options.container_image))
        self._containers = Containers(recipe, run_dir, caller, self.image, self.code)
        self.code.write()

    def ready(self) -> Any:
        """The module nemo_run; waits for its import."""
        return self._nemo.ready()

    def close(self) -> None:
        self._nemo.close()
        self.client.close()

    def for_container(self, job: StageJob) -> StageJob:
        return self._containers.job(job)

    @contextlib.contextmanager
    def submit(self, job: StageJob, attempt: int) -> Iterator[RunningContainers]:
        """Start the container of `job`; leave the context only when it has ended. An error inside leaves it running, to be attached to."""
        nemo_run = self.ready()
        Path(self._containers.data).mkdir(parents=True, exist_ok=True)  # Docker would make it as root
        try:
            for old in find(self.client, f"{STAGE_LABEL}={job.stage_dir}", NEVER_STARTED):
                old.remove(force=True)
            container = self._containers.container(nemo_run, job, attempt).run(client=self.client, id=job.stage_dir)
        except _errors() as error:
            with contextlib.suppress(*_errors()):  # what could be created and not started would look like a job
                for old in find(self.client, f"{STAGE_LABEL}={job.stage_dir}", NEVER_STARTED):
                    old.remove(force=True)
            raise SubmissionFailed(f"Docker: {_said(error)}") from error
        submitted = RunningContainers([container], self.image)
        yield submitted
        while submitted.alive():
            time.sleep(EXIT_POLL_SECONDS)

    def strays(self, job: StageJob) -> StrayContainers | None:
        """Containers of this stage that run, whoever started them."""
        found = find(self.client, f"{STAGE_LABEL}={job.stage_dir}")
        return StrayContainers(found) if found else None


def connect() -> Any:
    """A client of this machine's daemon; LaunchError if it or the package for it is not there."""
    try:
        import docker
    except ImportError as error:
        raise LaunchError(
            f"the Python package docker cannot be imported ({error}); run `make setup` again: it comes with nemo-run's torchx"
        ) from error
    host = os.environ.get("DOCKER_HOST", "")
    if host and not host.startswith("unix://"):
        raise LaunchError(
            f"DOCKER_HOST = {host}: containers on another machine would not see this one's folders; `unset DOCKER_HOST`, or launch there"
        )
    try:
        client = docker.from_env()
        client.ping()
    except _errors() as error:
        raise LaunchError(
            f"the Docker daemon does not answer ({_said(error)}): start it (`systemctl start docker`) and be in the group docker "
            "(`id -nG` lists yours; log in again after `usermod -aG docker NAME`). `quarry doctor cluster=docker` looks again"
        ) from error
    return client


def find(client: Any, label: str, states: tuple[str, ...] = LIVE) -> list[Any]:
    """Containers with a label (`key=value`) in one of these states."""
    found = client.containers.list(all=True, filters={"label": [label]}, ignore_removed=True)
    return [container for container in found if container.status in states]


def containers_of_run(run_dir: Path) -> dict[str, RunningContainers]:
    """Stage -> its running containers, for whatever wants to stop them. LaunchError if the daemon does not answer."""
    client = connect()
    by_stage: dict[str, list[Any]] = {}
    try:
        for container in find(client, f"{RUN_LABEL}={run_dir.resolve()}"):
            by_stage.setdefault(Path(container.labels[STAGE_LABEL]).name, []).append(container)
    except _errors() as error:
        raise LaunchError(f"the Docker daemon could not list the containers of {run_dir}: {_said(error)}") from error
    return {stage: RunningContainers(containers) for stage, containers in by_stage.items()}


def dryrun(launch: Launch, done: set[str], caller: Caller | None = None) -> int:
    """Write what a launch would tell Docker for each job to RUN/scripts/STAGE.json, and print it. Asks no daemon."""
    nemo_run = LocalJobs(launch.run.path / ".nemo-run").ready()
    containers = Containers(launch.recipe, launch.run.path, caller or Caller.of_this_process())
    folder = launch.run.path / "scripts"
    folder.mkdir(parents=True, exist_ok=True)
    data = stage_job.data_job(launch.recipe, launch.run.path, last=launch.last, data_command=launch.data_command)
    for stage, job in {DATA: data, **launch.jobs}.items():
        if stage in done or (stage != DATA and stage not in launch.stages):
            continue
        recorder = _Recorder()
        containers.container(nemo_run, job, 1).run(client=recorder, id=job.stage_dir)
        path = folder / f"{stage}.json"
        path.write_text(json.dumps(recorder.call, indent=1) + "\n", encoding="utf-8")
        gpus = gpus_of(launch.recipe, stage)
        launch.console.print(f"\n==== {path}: {gpus or 'no'} GPU{'' if gpus == 1 else 's'}", markup=False, soft_wrap=True)
        launch.console.print(path.read_text(encoding="utf-8"), markup=False, soft_wrap=True)
    return 0


class _Recorder:
    """Takes the place of Docker's client in a dry run: keeps what nemo-run says to `containers.run`."""

    def __init__(self) -> None:
        self.call: dict[str, Any] = {}
        self.containers = self.networks = self

    def create(self, **network: Any) -> None:
        """A network; that it is made if need be is in the options."""

    def run(self, image: str, command: str, **more: Any) -> None:
        self.call = {"image": image, "command": command, **more}


def _check_daemon(client: Any) -> None:
    try:
        options = client.info().get("SecurityOptions") or []
    except _errors() as error:
        raise LaunchError(f"the Docker daemon does not say what it is: {_said(error)}") from error
    for name, what in (("rootless", "runs rootless"), ("userns", "maps users (userns-remap)")):
        if any(option.split(",")[0] == f"name={name}" for option in options):
            raise LaunchError(
                f"the Docker daemon {what}, so your user id is somebody else's in a container, who may not write to the run; use a daemon that "
                "does not, or start the image by hand (docs/docker.md) and launch in it with cluster=local"
            )


def _image_id(client: Any, name: str) -> str:
    from docker.errors import ImageNotFound

    try:
        return str(client.images.get(name).id)
    except ImageNotFound:
        raise LaunchError(
            f"cluster.options.container_image = {name}: no such image on this machine; `docker pull {name}`, or build it (docs/docker.md). "
            "A launch pulls nothing, so that all stages run the same"
        ) from None
    except _errors() as error:
        raise LaunchError(f"cluster.options.container_image = {name}: {_said(error)}") from error


def _is_live(container: Any) -> bool:
    try:
        container.reload()
    except _errors() as error:
        if _is_gone(error):
            return False
        raise
    return container.status in LIVE


def _is_gone(error: BaseException) -> bool:
    """Whether the daemon said that the container is not there (404), or does not run (409)."""
    return getattr(getattr(error, "response", None), "status_code", None) in (404, 409)


def _errors() -> tuple[type[Exception], ...]:
    """What Docker's client raises: its own errors, and those of the connection."""
    from docker.errors import DockerException
    from requests.exceptions import RequestException

    return DockerException, RequestException


def _said(error: BaseException) -> str:
    text = str(getattr(error, "explanation", None) or error)
    if "could not select device driver" in text:
        text += (
            " (install the NVIDIA Container Toolkit, `nvidia-ctk runtime configure --runtime=docker`, and restart the daemon)"
        )
    return text
