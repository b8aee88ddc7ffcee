"""The chain in Docker: nemo-run and Docker's own client are the real ones, the daemon is a stand-in (docker_daemon.py)."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from docker_daemon import IMAGE_ID, Daemon, serve

from launchers import docker_jobs, stage_job
from launchers.cancel_command import cancel
from launchers.docker_container import Caller
from launchers.docker_jobs import DockerJobs
from launchers.errors import LaunchError
from launchers.local import LocalJobs
from launchers.runs import RunFolder
from recipes.schema import Recipe

STAGES = ["a", "b", "merged", "c", "hf"]
CALLER = Caller(uid=1000, gid=1001, groups=(0, 27, 1001), home="/home/somebody")
CODE = str(Path(__file__).resolve().parents[2])


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    with tempfile.TemporaryDirectory(prefix="q") as folder:  # the path of a socket is short
        it = Daemon(Path(folder) / "s", {"quarry:test"})
        server = serve(it)
        monkeypatch.setenv("DOCKER_HOST", f"unix://{it.socket}")
        monkeypatch.setattr(Caller, "of_this_process", classmethod(lambda cls: CALLER))
        try:
            yield it
        finally:
            for container in it.containers:
                it.end(container)
            server.shutdown()
            server.server_close()


@pytest.fixture
def docker(harness: Any, daemon: Daemon, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The harness of test_chain.py, on cluster=docker."""
    monkeypatch.chdir(tmp_path)
    harness.recipe = on_docker(harness)
    return harness


def on_docker(harness: Any, gpu: str = "cpu", **options: Any) -> Recipe:
    options = {"container_image": "quarry:test", "python": sys.executable, **options}
    cluster = {**harness.dict()["cluster"], "kind": "docker", "name": "docker", "gpu": gpu, "options": options}
    return Recipe.model_validate(harness.dict(cluster=cluster))


def eventually(condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)


def said(value: Any) -> Any:
    """A request without what it leaves to the daemon."""
    if not isinstance(value, dict):
        return value
    shown = {key: said(inner) for key, inner in value.items()}
    return {key: inner for key, inner in shown.items() if inner not in (None, False, [], {})}


def left_running(docker: Any, monkeypatch: pytest.MonkeyPatch, stage: str = "a") -> None:
    """The stage in a container whose launcher is gone, after its first step."""
    monkeypatch.setenv("FAKE_DIGEST", docker.recipe.digest())
    docker.run_dir.mkdir(parents=True, exist_ok=True)
    docker.recipe.write(docker.run_dir / "recipe.json")
    journal = RunFolder(docker.run_dir).journal
    jobs = DockerJobs(docker.recipe, docker.run_dir, LocalJobs(docker.run_dir / ".nemo-run"))
    job = stage_job.stage_job(docker.recipe, docker.run_dir, stage, stage_command=docker.fake_stage)
    jobs.for_container(job).write()
    from launchers.journal import Journal

    Journal(journal).append("intent", stage=stage, attempt=1, executor="docker", command=job.command)
    with contextlib.suppress(KeyboardInterrupt), jobs.submit(job, 1):
        eventually((Path(job.stage_dir) / "metrics.jsonl").exists, "the first step")
        raise KeyboardInterrupt


def test_every_stage_runs_in_a_container_of_its_own(docker: Any, daemon: Daemon, tmp_path: Path) -> None:
    assert docker.launch() == 0
    assert [row["stage"] for row in docker.journal(event="outcome", exit_code=0)] == ["data", *STAGES]
    assert [row["executor"] for row in docker.journal(event="intent")] == ["docker"] * 6
    assert {row["image"] for row in docker.journal(event="submitted")} == {IMAGE_ID}
    names = [row["job"] for row in docker.journal(event="submitted")]
    assert names == [container.name for container in daemon.containers]
    assert daemon.there() == []
    assert [network["Name"] for network in daemon.networks] == ["quarry"]
    assert not any("/images/create" in request for request in daemon.requests)  # pulls nothing

    run, folder = str(docker.run_dir), str(docker.run_dir / "stages" / "a")
    binds = [f"{CODE}:{CODE}:ro", f"{tmp_path}:{tmp_path}:ro", f"{docker.root}/data:{docker.root}/data:ro", f"{run}:{run}:rw"]
    body = daemon.created("a")
    host = body.pop("HostConfig")
    command = body.pop("Cmd")
    assert command[:2] == ["bash", "-c"]
    assert command[2].startswith(
        f"cd {tmp_path} && exec {sys.executable} -m launchers.wrapper --job {folder}/job.json --attempt 1 "
        f">> {folder}/log.txt 2>&1 || exit 126 2>&1 | tee"
    )
    assert body.pop("Hostname") == names[1][-32:]
    assert said(body) == {
        "Image": IMAGE_ID,
        "User": "1000:1001",
        "WorkingDir": "/nemo_run/code",
        "Env": body["Env"],
        "Healthcheck": {"Test": ["NONE"]},
        "Labels": {"nemo-run/experiment-id": run, "nemo-run/name": names[1], "nemo-run/id": folder},
    }
    assert set(body["Env"]) == {f"PYTHONPATH={CODE}", "PYTHONSAFEPATH=1", "HOME=/tmp", "LOGNAME=quarry"}
    limits = [{"Name": "memlock", "Soft": -1, "Hard": -1}, {"Name": "stack", "Soft": 67108864, "Hard": 67108864}]
    assert said(host) == {
        "AutoRemove": True,
        "Binds": binds,
        "CapDrop": ["ALL"],
        "GroupAdd": ["27", "1001"],
        "IpcMode": "private",
        "NetworkMode": "quarry",
        "SecurityOpt": ["no-new-privileges:true"],
        "ShmSize": 16 * 2**30,
        "Ulimits": [*limits, {"Name": "nofile", "Soft": 65536, "Hard": 65536}],
    }
    assert f"{docker.root}/data:{docker.root}/data:rw" in daemon.created("data")["HostConfig"]["Binds"]

    calls = len(daemon.requests)
    assert docker.launch() == 0
    assert "nothing to start" in docker.output
    assert len(daemon.requests) == calls


def test_sigterm_makes_the_stage_save_and_the_next_launch_goes_on(docker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.3")
    metrics = docker.run_dir / "stages" / "a" / "metrics.jsonl"

    def stop() -> None:
        eventually(metrics.exists, "the first step")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    assert docker.launch(last="a") == 128 + signal.SIGTERM
    assert docker.journal(event="outcome", stage="a")[0]["exit_code"] == 75
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.002")
    assert docker.launch(last="a") == 0
    assert docker.steps("a") == [1, 2, 3, 4]
    assert docker.starts("a") == 2


def test_a_container_of_a_killed_launcher_is_waited_for(docker: Any, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.4")
    left_running(docker, monkeypatch)
    assert [container.status for container in daemon.there()] == ["running"]
    assert docker.launch(last="a") == 0
    assert docker.starts("a") == 1
    assert docker.journal(event="attached", stage="a")[0]["container"] == daemon.containers[0].name


def test_cancel_makes_a_left_container_save(docker: Any, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.4")
    left_running(docker, monkeypatch)
    said: list[str] = []
    assert cancel(RunFolder(docker.run_dir), kill=False, say=said.append) == 0
    assert daemon.containers[0].name in said[0]
    assert docker.journal(event="outcome", stage="a")[0]["exit_code"] == 75
    assert daemon.there() == []
    assert docker.journal(event="cancel")[0]["stage"] == "a"
    said.clear()
    cancel(RunFolder(docker.run_dir), kill=False, say=said.append)
    assert said == [f"run {docker.run_dir.name}: nothing is running"]


def test_what_docker_does_not_start_is_said_and_leaves_nothing(docker: Any, daemon: Daemon) -> None:
    daemon.start_error = 'could not select device driver "" with capabilities: [[compute utility]]'
    with pytest.raises(LaunchError, match="could not be submitted: Docker: could not select.*nvidia-ctk"):
        docker.launch()
    assert daemon.there() == []
    assert docker.journal(event="submission_failed")[0]["stage"] == "data"
    daemon.start_error = None
    assert docker.launch(last="a") == 0


def test_a_wrapper_that_cannot_begin_is_told_from_the_log(docker: Any, daemon: Daemon) -> None:
    docker.recipe = on_docker(docker, python="/no/such/python")
    assert docker.launch() == 1
    assert "ended without a trace" in docker.output
    assert "/no/such/python" in (docker.run_dir / "data" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("break_it", "match"),
    [
        (lambda d, m: d.images.clear(), "container_image = quarry:test: no such image on this machine; `docker pull"),
        (lambda d, m: d.info.update(SecurityOptions=["name=rootless"]), "runs rootless"),
        (lambda d, m: d.info.update(SecurityOptions=["name=userns"]), "maps users"),
        (lambda d, m: m.setenv("DOCKER_HOST", "unix:///no/such/socket"), "does not answer.*systemctl start docker"),
        (lambda d, m: m.setenv("DOCKER_HOST", "tcp://10.0.0.1:2375"), "DOCKER_HOST = tcp.*unset"),
        (lambda d, m: m.setitem(sys.modules, "docker", None), "Python package docker.*make setup"),
    ],
    ids=["image", "rootless", "userns", "daemon", "remote", "package"],
)
def test_refused_before_anything_is_started(
    docker: Any, daemon: Daemon, monkeypatch: pytest.MonkeyPatch, break_it: Any, match: str
) -> None:
    break_it(daemon, monkeypatch)
    with pytest.raises(LaunchError, match=match):
        docker.launch()
    assert daemon.containers == []
    assert not (docker.run_dir / "journal.jsonl").exists()


def test_a_daemon_that_falls_silent_is_given_a_while(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent:
        name, status = "quarry-x", "running"

        def reload(self) -> None:
            from requests.exceptions import ConnectionError

            raise ConnectionError("gone")

    containers = docker_jobs.RunningContainers([Silent()])
    assert containers.alive()
    monkeypatch.setattr(docker_jobs, "PATIENCE_SECONDS", -1.0)
    with pytest.raises(LaunchError, match="has not answered"):
        containers.alive()
