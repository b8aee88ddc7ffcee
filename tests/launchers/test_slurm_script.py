"""Batch scripts: golden texts of the real thing (8B on 64 nodes of 8 H100, pyxis), and that nothing hostile gets into one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from launchers import stage_job
from launchers.errors import LaunchError
from launchers.journal import Journal
from launchers.slurm_script import SlurmScripts, nodes_of, options_of
from recipes.compose import compose
from recipes.schema import Recipe

GOLDEN = Path(__file__).parent / "golden"
CLUSTER = (
    "cluster=slurm",
    "cluster.options.account=research_llm",
    "cluster.options.partition=batch",
    "cluster.options.qos=normal",
    "cluster.options.exclusive=true",
    "cluster.options.mem='0'",
    "cluster.options.container_image=/images/quarry.sqsh",
    "cluster.options.container_mounts=['/scratch:/scratch','/datasets:/datasets:ro']",
    "+cluster.options.environment.NCCL_DEBUG=WARN",
    "cluster.options.srun_args=['--mpi=pmix']",
)


@pytest.fixture(scope="module")
def nemo_run(tmp_path_factory: pytest.TempPathFactory) -> object:
    os.environ["NEMORUN_HOME"] = str(tmp_path_factory.mktemp("nemo"))
    from launchers.nemo_import import import_nemo_run

    return import_nemo_run()


def made(nemo_run: object, recipe: Recipe, folder: Path) -> SlurmScripts:
    nemo_run.config.set_nemorun_home(str(folder / "run" / ".nemo-run"))  # type: ignore[attr-defined]
    return SlurmScripts(nemo_run, recipe, folder / "run")


def neutral(text: str, scripts: SlurmScripts) -> str:
    """The script without the folders of this machine."""
    for path, name in (
        (scripts.run_dir, "/shared/runs/run"),
        (scripts.run_dir.parent, "/shared/runs"),
        (scripts.code, "/shared/quarry"),
    ):
        text = text.replace(str(path), name)
    text = text.replace(f"{scripts.workdir}:{scripts.workdir}", "/shared/work:/shared/work").replace(
        scripts.workdir, "/shared/work"
    )
    return text.replace(sys.executable, "/shared/python")


@pytest.mark.parametrize("stage", ["data", "foundation", "long_512k", "merge_512k"])
def test_golden_script_of_8b_on_64_nodes(stage: str, nemo_run: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = compose([*CLUSTER, "data.root=/scratch/data"])
    scripts = made(nemo_run, recipe, tmp_path)
    job = (
        stage_job.data_job(recipe, tmp_path / "run")
        if stage == "data"
        else stage_job.stage_job(recipe, tmp_path / "run", stage)
    )
    text = neutral(scripts.script(job, 1, None), scripts)
    golden = GOLDEN / f"{stage}.sh"
    if os.environ.get("QUARRY_WRITE_GOLDEN") == "1":
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text(), f"set QUARRY_WRITE_GOLDEN=1 to write {golden.name} anew, and read the difference"
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_the_default_curriculum_takes_the_nodes_of_its_layout() -> None:
    recipe = compose(list(CLUSTER))
    assert nodes_of(recipe, "foundation") == recipe.phase["foundation"].parallel.gpus // 8 == 64
    assert nodes_of(recipe, "merge_32k") == nodes_of(recipe, "data") == 1


@pytest.mark.parametrize("key", ["account", "partition"])
def test_what_a_launch_needs_is_asked_for(key: str) -> None:
    recipe = compose([word for word in CLUSTER if f".{key}=" not in word])
    with pytest.raises(LaunchError, match=rf"cluster.options.{key} is not set"):
        options_of(recipe)


@pytest.mark.parametrize("name", ["run dir", "run$(id)", "run;id", "run'"])
def test_a_folder_that_a_shell_would_read_is_refused(name: str, nemo_run: object, tmp_path: Path) -> None:
    recipe = compose(list(CLUSTER))
    with pytest.raises(LaunchError, match="the folder of the run"):
        SlurmScripts(nemo_run, recipe, tmp_path / name)


@pytest.mark.parametrize(
    ("code", "restarts", "reason", "requeued"),
    [
        (0, 0, "None", False),
        (1, 0, "None", False),
        (78, 0, "None", False),
        (75, 0, "None", True),
        (75, 3, "None", True),
        (75, 200, "None", False),
        # -1: Slurm ends the batch script while srun runs: at the time limit, or for scancel.
        (-1, 0, "TimeLimit", True),
        (-1, 200, "TimeLimit", False),
        (-1, 0, "None", False),
        (1, 0, "TimeLimit", False),
    ],
)
def test_only_the_decided_exit_code_and_a_time_limit_are_requeued(
    code: int, restarts: int, reason: str, requeued: bool, nemo_run: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs the generated script with stand-ins for srun and scontrol; a failure that is not requeued is in the journal."""
    monkeypatch.chdir(tmp_path)
    recipe = compose([word for word in CLUSTER if "container" not in word])
    job = stage_job.data_job(recipe, tmp_path / "run")
    text = made(nemo_run, recipe, tmp_path).script(job, 1, None)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tmp_path / "run").mkdir(exist_ok=True)
    ends = f"exit {code}" if code >= 0 else "exec > /dev/null 2>&1; kill -TERM $PPID; sleep 2"
    (tools / "srun").write_text(f'#!/bin/bash\n[[ "$*" == *hostname* ]] && {{ echo 127.0.0.1; exit 0; }}\n{ends}\n')
    (tools / "scontrol").write_text(
        f'#!/bin/bash\ncase $1:$2 in requeue:*) echo "$2" > {tmp_path}/requeued;; show:hostnames) echo node1;; '
        f'show:job) printf "   JobState=COMPLETING Reason={reason}\\n   StdOut=/runs/x/out/a.txt\\n";; esac\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    environment = {"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1"}
    environment |= {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
    done = subprocess.run(["bash"], input=text, text=True, env=environment, capture_output=True, check=False)
    assert done.returncode == (code if code >= 0 else -signal.SIGTERM), done.stderr
    assert (tmp_path / "requeued").exists() is requeued
    journal = Journal.read(tmp_path / "run" / "journal.jsonl").rows
    if requeued or code == 0 or (code < 0 and reason == "None"):
        assert journal == []
    else:
        (row,) = journal
        assert datetime.fromisoformat(row.pop("time")).tzinfo is not None
        expected = {"event": "job_failed", "stage": "data", "job": "7", "exit_code": code if code > 0 else 75}
        assert row == {**expected, "output": "/runs/x/out"}


def test_ports_stay_below_the_ephemeral_ones(nemo_run: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = compose(list(CLUSTER))
    text = made(nemo_run, recipe, tmp_path).script(stage_job.data_job(recipe, tmp_path / "run"), 1, None)
    found = re.search(r"MASTER_PORT=\$\(\( (\d+) \+ SLURM_JOB_ID % (\d+) \)\)", text)
    assert found
    assert sum(map(int, found.groups())) <= 32768
