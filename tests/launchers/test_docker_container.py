"""What a container of a stage is given: golden dry run of a GPU machine, and refusals of what no stage could work with."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from launchers.chain import Launch
from launchers.docker_container import Caller, Containers, _inputs, gpus_of, options_of
from launchers.errors import LaunchError
from launchers.stage_job import DATA, NAME, StageJob, stage_job
from recipes.schema import Recipe

GOLDEN = Path(__file__).parent / "golden"
CODE = str(Path(__file__).resolve().parents[2])
CALLER = Caller(uid=1000, gid=1001, groups=(0, 27, 1001), home="/home/somebody")
OPTIONS = {
    "container_image": "quarry:gpu",
    "container_mounts": ["/corpus:/corpus"],
    "environment": {"NCCL_DEBUG": "WARN", "NOTE": "a 'b' \"c\" $(id) {d}"},
}


def on_docker(harness: Any, gpu: str = "h100", options: dict[str, Any] = OPTIONS, **changes: Any) -> Recipe:
    cluster = {**harness.dict()["cluster"], "kind": "docker", "name": "docker", "gpu": gpu, "options": options}
    return Recipe.model_validate(harness.dict(cluster=cluster, **changes))


@pytest.fixture
def here(harness: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    return harness


def containers(here: Any, caller: Caller = CALLER, run_dir: Path | None = None, **recipe: Any) -> Containers:
    return Containers(on_docker(here, **recipe), run_dir or here.run_dir, caller)


def test_golden_dry_run_of_a_machine_with_gpus(here: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Caller, "of_this_process", classmethod(lambda cls: CALLER))
    monkeypatch.setenv("DOCKER_HOST", "unix:///no/such/socket")  # a dry run asks no daemon
    stream = io.StringIO()
    console = Console(file=stream, width=200, highlight=False, markup=False)
    launch = Launch(recipe=on_docker(here), console=console, first="a", last="merged")
    assert launch.dryrun() == 0
    scripts = here.run_dir / "scripts"
    assert sorted(path.name for path in scripts.iterdir()) == ["a.json", "b.json", "data.json", "merged.json"]
    requests = {path.stem: json.loads(path.read_text()) for path in scripts.iterdir()}
    assert {stage: "device_requests" in request for stage, request in requests.items()} == {
        "a": True,
        "b": True,
        "data": False,
        "merged": False,
    }
    assert not (here.run_dir / "journal.jsonl").exists()
    text = (scripts / "a.json").read_text()
    assert text in stream.getvalue()
    digests = re.search(r"smoke-tiny-model-a-1-([0-9a-f]+)", text)
    assert digests
    for path, name in (
        (digests[1], "DIGEST"),
        (str(here.run_dir), "/shared/runs/run"),
        (str(here.root / "data"), "/shared/data"),
        (f"{tmp_path}:{tmp_path}", "/shared/work:/shared/work"),
        (f"cd {tmp_path} ", "cd /shared/work "),
        (CODE, "/shared/quarry"),
    ):
        text = text.replace(path, name)
    golden = GOLDEN / "docker_a.json"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()


def test_the_recipe_in_the_container_means_what_it_means_here(here: Any) -> None:
    """job.json has the container's Python and the mounted code, and nothing of this machine's Python path."""
    job = stage_job(here.recipe, here.run_dir, "a")
    inside = containers(here).job(job)
    assert inside.command == ["python", *job.command[1:]]
    assert inside.environment == {**job.environment, "PYTHONPATH": CODE}


def test_gpus_follow_layout_option_and_kind_of_stage(here: Any) -> None:
    phase = here.dict()["phase"]
    phase = {**phase, "b": {**phase["b"], "parallel": {"name": "two", "gpus": 2}}}
    recipe = on_docker(here, phase=phase)
    assert [gpus_of(recipe, s) for s in (DATA, "a", "b", "merged", "hf")] == [0, 1, 2, 0, 0]
    fixed = on_docker(here, phase=phase, options={**OPTIONS, "gpus": 4})
    assert [gpus_of(fixed, s) for s in (DATA, "a", "b", "merged", "hf")] == [0, 4, 4, 0, 0]
    assert gpus_of(on_docker(here, gpu="cpu", phase=phase), "b") == 0


def test_only_the_data_job_writes_to_the_data_and_nobody_to_the_code(here: Any) -> None:
    modes = {stage: {m.split(":")[1]: m.split(":")[2] for m in containers(here).mounts(stage)} for stage in (DATA, "a")}
    data, run = str(here.root / "data"), str(here.run_dir)
    assert modes[DATA] == {CODE: "ro", os.getcwd(): "ro", run: "rw", data: "rw", "/corpus": "ro"}
    assert modes["a"] == {**modes[DATA], data: "ro"}


@pytest.mark.parametrize(
    ("caller", "options", "match"),
    [
        (Caller(uid=0, gid=0, home="/root"), {}, "run as root.*usermod -aG docker"),
        (CALLER, {"user": "1002:1001"}, "would belong to user 1002.*1000:GID"),
        (CALLER, {"user": "1000:50"}, "not in group 50"),
    ],
)
def test_users_that_could_not_go_on_are_refused(here: Any, caller: Caller, options: dict[str, Any], match: str) -> None:
    with pytest.raises(LaunchError, match=match):
        containers(here, caller, options={**OPTIONS, **options})


def test_another_group_of_the_caller_may_be_chosen(here: Any) -> None:
    assert containers(here).user == "1000:1001"
    assert containers(here, options={**OPTIONS, "user": "1000:27"}).user == "1000:27"


def test_a_home_or_a_system_folder_is_no_place_to_launch_from(
    here: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LaunchError, match="every container would see"):
        containers(here, Caller(uid=1000, gid=1000, home=str(tmp_path)))
    monkeypatch.chdir("/etc")
    with pytest.raises(LaunchError, match="launched from /etc"):
        containers(here)


@pytest.mark.parametrize("name", ["a b", "a;b", "a:b", "a,b", "a'b", "$(id)", "a\\b", "a*"])
def test_a_folder_that_a_shell_or_a_mount_would_read_is_refused(name: str, here: Any) -> None:
    with pytest.raises(LaunchError, match="the folder of the run"):
        containers(here, run_dir=here.root / name)


def test_mounts_that_hide_ours_or_are_not_there_are_refused(here: Any, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="would hide"):
        containers(here, options={**OPTIONS, "container_mounts": [f"/corpus:{here.root}"]})
    absent = containers(here, options={**OPTIONS, "container_mounts": [f"{tmp_path}/absent:/mnt/x"]})
    with pytest.raises(LaunchError, match="there is no"):
        absent.check_sources()


@pytest.mark.parametrize(
    ("paths", "seen"),
    [
        (["/corpus/web/*.jsonl"], True),
        (["/corpus/we[b]/x.jsonl"], True),
        (["raw/*.parquet"], True),  # below the working folder
        (["/elsewhere/web/*.jsonl"], False),
        (["/corpus2/web.jsonl"], False),
        (["../outside/*.jsonl"], False),
    ],
)
def test_sources_that_no_container_would_see_are_refused_by_key(here: Any, paths: list[str], seen: bool) -> None:
    data = here.dict()["data"]
    data = {**data, "sources": {**data["sources"], "mine": {"category": "web", "kind": "files", "paths": paths}}}
    if seen:
        containers(here, data=data)
        return
    with pytest.raises(LaunchError, match=r"data\.sources\.mine\.paths = .*container_mounts="):
        containers(here, data=data)


def test_prompts_are_inputs_of_the_stages_that_run(here: Any) -> None:
    grpo = {name: SimpleNamespace(prompts=[f"{name}.jsonl"], initial=None) for name in ("math", "left_out")}
    recipe = on_docker(here)
    stub = SimpleNamespace(data=recipe.data, sft={}, grpo=grpo, stages=[*recipe.stages, "math"])
    assert _inputs(stub)[-1] == ("grpo.math.prompts", "math.jsonl")
    assert len(_inputs(stub)) == len(_inputs(recipe)) + 1
    grpo["math"].initial = "models/granite"
    assert _inputs(stub)[-1] == ("grpo.math.initial", "models/granite")


def test_an_image_is_needed_to_launch(here: Any) -> None:
    with pytest.raises(LaunchError, match="cluster.options.container_image is not set.*--target gpu"):
        options_of(on_docker(here, options={}))


@given(run=st.from_regex(NAME, fullmatch=True), stage=st.from_regex(NAME, fullmatch=True), attempt=st.integers(1, 10**6))
def test_names_are_ones_that_docker_takes_and_host_names_begin_well(run: str, stage: str, attempt: int) -> None:
    job = StageJob(run=run, stage=stage, run_dir=f"/r/{run}", stage_dir=f"/r/{run}/stages/{stage}", command=[], environment={})
    name = Containers.name(object.__new__(Containers), job, attempt)
    assert re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+", name)  # the daemon's own pattern (daemon/names)
    assert name[-32:][0].isalnum()
    other = Containers.name(object.__new__(Containers), StageJob(**{**vars(job), "stage_dir": "/other"}), attempt)
    assert name != other


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="process ids of its own need root and unshare")
def test_as_process_1_the_wrapper_hears_sigterm(here: Any, tmp_path: Path) -> None:
    """A shell as process 1 would drop it: the kernel keeps signals without a handler from the first process of a namespace."""
    made = containers(here, options={**OPTIONS, "python": sys.executable})
    program = (
        "import signal, time; signal.signal(signal.SIGTERM, lambda *_: print('saves', flush=True) or exit(75)); print('on'); "
        "time.sleep(60)"
    )
    job = StageJob(run="r", stage="a", run_dir=str(tmp_path), stage_dir=str(tmp_path), command=[], environment={})
    job = made.job(StageJob(**{**vars(job), "command": [sys.executable, "-uc", program]}))
    job.write()
    command = f"{' '.join(made.command(job, 1))} 2>&1 | tee /dev/null; exit ${{PIPESTATUS[0]}}"  # as nemo-run goes on
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": CODE}
    isolate = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", command]
    with subprocess.Popen(isolate, env=environment) as process:
        deadline = time.monotonic() + 30
        while not job.log.exists() or "\non\n" not in job.log.read_text():
            assert time.monotonic() < deadline, "it did not begin"
            time.sleep(0.02)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert Path(f"/proc/{children[0]}/cmdline").read_bytes().split(b"\0")[1:3] == [b"-m", b"launchers.wrapper"]
        os.kill(int(children[0]), 15)
        assert process.wait(20) == 75
    assert "saves" in job.log.read_text()
    rows = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert next(row for row in rows if row["event"] == "started")["pid"] == 1
    assert rows[-1]["exit_code"] == 75
