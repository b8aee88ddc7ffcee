"""Cleaning as Slurm jobs: what is submitted, and that running what was submitted gives the bytes of a local run.

A stand-in for sbatch keeps the scripts; the test then runs every task of them as Slurm would. Slurm itself is not here: limits, queues
and the shared file system are unproven by this.
"""

import json
import os
import stat
import subprocess
from pathlib import Path

import dill
import pytest

from data_prep.clean.executors import quiet
from data_prep.clean.slurm import Slurm, submit
from data_prep.errors import DataError
from tests.data_prep.clean import planted
from tests.data_prep.clean.planted import mixed, published
from tests.data_prep.helpers import tree

SBATCH = """#!/bin/sh
number=$(ls "$JOBS" | grep -c '\\.sh$')
number=$((number + 1))
for last; do :; done
cp "$last" "$JOBS/$number.sh"
echo "$@" > "$JOBS/$number.args"
echo "Submitted batch job $number"
"""
SCONTROL = "#!/bin/sh\necho node1\n"
SRUN = '#!/bin/sh\nwhile [ "$1" != launch_pickled_pipeline ]; do shift; done\nexec "$@"\n'


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Folder of the submitted scripts."""
    commands, jobs = tmp_path / "commands", tmp_path / "jobs"
    commands.mkdir()
    jobs.mkdir()
    for name, content in (("sbatch", SBATCH), ("scontrol", SCONTROL), ("srun", SRUN)):
        (commands / name).write_text(content)
        (commands / name).chmod((commands / name).stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("JOBS", str(jobs))
    return jobs


def arrays(jobs):
    """Scripts of array jobs in the order of submission; the jobs that only add up datatrove's statistics are left out."""
    scripts = sorted(jobs.glob("*.sh"), key=lambda path: int(path.stem))
    return [path for path in scripts if "launch_pickled_pipeline" in path.read_text()]


def as_task(number):
    return {**os.environ, "SLURM_ARRAY_TASK_ID": str(number), "SLURM_NODELIST": "node1", "RUN_OFFSET": "0"}


def run_tasks(folder, monkeypatch):
    """All tasks of a stage, as `launch_pickled_pipeline` runs them."""
    for number in range(len(json.loads((folder / "ranks_to_run.json").read_text()))):
        for key, value in as_task(number).items():
            monkeypatch.setenv(key, value)
        executor = dill.loads((folder / "executor.pik").read_bytes())  # noqa: S301 - written by this test
        with quiet():
            executor.run()
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")


def test_running_what_was_submitted_gives_the_bytes_of_a_local_run(tmp_path, cluster, monkeypatch):
    texts = mixed()
    planted.cleaned(tmp_path / "local", texts, **published())
    planted.write(tmp_path / "slurm", texts)
    made = planted.recipe(tmp_path / "slurm", texts, **published())
    root, inputs = tmp_path / "slurm" / "data", planted.inputs(tmp_path / "slurm", made)
    options = Slurm(partition="cpu", account="team", time="01:00:00", tasks_at_once=7, memory_gb=3)
    submitted = submit(made, root, inputs, options)
    assert [stage for stage, _ in submitted] == ["filter", "exact", "near", "removals", "apply"]
    scripts = arrays(cluster)
    assert [job for _, job in submitted] == [path.stem for path in scripts]

    before = None
    for path, tasks in zip(scripts, (3, 1, 14, 1, 3), strict=True):
        script, arguments = path.read_text(), path.with_suffix(".args").read_text()
        for option in ("partition=cpu", "account=team", "time=01:00:00", "mem-per-cpu=3G", "cpus-per-task=1"):
            assert f"#SBATCH --{option}\n" in script
        assert f"#SBATCH --array=0-{tasks - 1}%{min(7, tasks)}\n" in script
        assert "#SBATCH --qos" not in script
        assert "export HF_HUB_OFFLINE=1" in script
        assert ("--dependency" in arguments) == (before is not None)
        if before is not None:
            assert f"--dependency=afterok:{before}" in arguments
        before = path.stem
    # The first task by its script, as Slurm starts it; the others from the same pickle in this process, because each start costs a second.
    done = subprocess.run(["bash", str(scripts[0])], env=as_task(0), capture_output=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert (root / "clean" / "code_a" / "filtered" / "00000.json").exists()
    for stage, _ in submitted:
        run_tasks(next(root.glob(f"clean/.work/*/{stage}")), monkeypatch)
    # The end is here; it does no stage again.
    monkeypatch.setattr("data_prep.clean.executors.InProcess.run", None)
    planted.run(tmp_path / "slurm", made)
    assert tree(root) == tree(tmp_path / "local" / "data")
    assert submit(made, root, inputs, options) == []


def test_what_is_complete_is_not_submitted(tmp_path, cluster, monkeypatch):
    texts = {"web_a": ["a text of some words"], "best": ["another one"]}
    planted.write(tmp_path, texts)
    made = planted.recipe(tmp_path, texts)
    inputs = planted.inputs(tmp_path, made)
    submit(made, tmp_path / "data", inputs, Slurm(partition="cpu"))
    run_tasks(next(tmp_path.glob("data/clean/.work/*/filter")), monkeypatch)
    again = submit(made, tmp_path / "data", inputs, Slurm(partition="cpu"))
    assert [stage for stage, _ in again] == ["exact", "near", "removals", "apply"]


def test_refusals(tmp_path, monkeypatch):
    planted.write(tmp_path, {"web_a": ["text"]})
    made = planted.recipe(tmp_path, {"web_a": ["text"]})
    inputs = planted.inputs(tmp_path, made)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="no command sbatch"):
        submit(made, tmp_path / "data", inputs, Slurm(partition="cpu"))
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    with pytest.raises(DataError, match="cluster.options.partition is null"):
        submit(made, tmp_path / "data", inputs, Slurm(partition=None))
    assert not Path(tmp_path / "data").exists()
