"""Cleaning as Slurm jobs: what is submitted, and that running what was submitted gives the bytes of a local run.

A stand-in for sbatch keeps the scripts; the test then runs every task of them as Slurm would. On a real Slurm: tests/slurm/test_chain.py.
"""

import json
import os
import stat
import subprocess
from pathlib import Path

import dill
import pytest

from data_prep.clean.array_job import ArrayJob
from data_prep.clean.executors import quiet
from data_prep.clean.slurm import Slurm, submit
from data_prep.clean.submitted import note_jobs, noted_jobs, refuse_while_jobs_run
from data_prep.errors import DataError
from data_prep.prepare import prepare
from tests.data_prep import helpers
from tests.data_prep.clean import planted
from tests.data_prep.clean.planted import mixed, published
from tests.data_prep.clean.test_clean_command import quarry, small
from tests.data_prep.helpers import tree

SBATCH = """#!/bin/sh
number=$(ls "$JOBS" | grep -c '\\.sh$')
number=$((number + 1))
for last; do :; done
cp "$last" "$JOBS/$number.sh"
echo "$@" > "$JOBS/$number.args"
if [ "$number" = "$REFUSED" ]; then echo "sbatch: error: no such partition" >&2; rm "$JOBS/$number.sh"; exit 1; fi
echo "Submitted batch job $number on cluster big"
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
    """Scripts of array jobs in the order of submission."""
    return sorted(jobs.glob("*.sh"), key=lambda path: int(path.stem))


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
    folder = tmp_path / "on $HOME 100%a slurm"
    planted.write(folder, texts)
    made = planted.recipe(folder, texts, **published())
    root, inputs = folder / "data", planted.inputs(folder, made)
    options = Slurm("cpu", "01:00:00", account="team", qos="low", constraint="cpu|big", tasks_at_once=7, memory_gb=3)
    submitted = submit(made, root, inputs, options)
    assert [stage for stage, _ in submitted] == ["filter", "exact", "near", "removals", "apply"]
    scripts = arrays(cluster)
    assert [job for _, job in submitted] == [path.stem for path in scripts]
    assert noted_jobs(root) == submitted

    before = None
    for path, tasks in zip(scripts, (3, 1, 14, 1, 3), strict=True):
        script, arguments = path.read_text(), path.with_suffix(".args").read_text()
        for option in ("partition=cpu", "account=team", "time=01:00:00", "mem-per-cpu=3G", "cpus-per-task=1", "qos=low"):
            assert f"#SBATCH --{option}\n" in script
        assert f"#SBATCH --array=0-{tasks - 1}%{min(7, tasks)}\n" in script
        assert "#SBATCH --constraint=cpu|big\n" in script
        assert "#SBATCH --reservation" not in script
        # Paths may hold anything on the command line, nothing in an #SBATCH line; %% is Slurm's spelling of %.
        assert str(folder) not in "".join(line for line in script.splitlines() if line.startswith("#"))
        assert f"--output={tmp_path}/on $HOME 100%%a slurm/data/clean/.work/" in arguments
        assert "--kill-on-invalid-dep=yes" in arguments
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
    assert noted_jobs(root) == []
    # The end is here; it does no stage again.
    monkeypatch.setattr("data_prep.clean.executors.InProcess.run", None)
    planted.run(folder, made)
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
    assert "--dependency" not in (cluster / f"{again[0][1]}.args").read_text()


def test_a_large_stage_is_several_arrays_and_the_next_waits_for_all(tmp_path, cluster):
    def job(name, after=()):
        return ArrayJob(
            [], tasks=5, time="1", partition="p", max_array_size=2, job_name=name, after=after, logging_dir=str(tmp_path / name)
        )

    (tmp_path / "one" / "completions").mkdir(parents=True)
    for done in ("00000", "00003"):
        (tmp_path / "one" / "completions" / done).touch()
    one = job("one")
    one.launch_job()
    assert one.job_ids == ["1", "2"]
    assert json.loads((tmp_path / "one" / "ranks_to_run.json").read_text()) == [1, 2, 4]
    two = job("two", tuple(one.job_ids))
    two.launch_job()
    written = [(cluster / f"{number}.args").read_text() for number in range(1, 6)]
    dependencies = [[word for word in line.split() if word.startswith("--dependency")] for line in written]
    assert dependencies == [
        [],
        ["--dependency=afterany:1"],
        ["--dependency=afterok:1:2"],
        ["--dependency=afterok:1:2,afterany:3"],
        ["--dependency=afterok:1:2,afterany:4"],
    ]
    assert ["RUN_OFFSET=1" in line for line in written] == [False, True, False, True, False]


@pytest.mark.parametrize("refused", [1, 3])
def test_a_refusal_of_sbatch_says_why_and_what_was_submitted_before(tmp_path, cluster, monkeypatch, refused):
    texts = {"web_a": ["a text of some words"], "best": ["another one"]}
    planted.write(tmp_path, texts)
    made = planted.recipe(tmp_path, texts)
    monkeypatch.setenv("REFUSED", str(refused))
    with pytest.raises(DataError) as refusal:
        submit(made, tmp_path / "data", planted.inputs(tmp_path, made), Slurm(partition="nope", account="team"))
    message = str(refusal.value)
    assert (
        f"refused the job clean-{('filter', '', 'near')[refused - 1]}: sbatch: error: no such partition; asked for" in message
    )
    assert "cluster.options.partition=nope cluster.options.time=24:00:00 cluster.options.account=team --memory-gb 8" in message
    assert ("jobs 1, 2 were submitted before" in message) == (refused == 3)
    assert ("scancel 1 2" in message) == (refused == 3)
    assert noted_jobs(tmp_path / "data") == ([] if refused == 1 else [("filter", "1"), ("exact", "2")])


class TestBesideLiveJobs:
    """Nobody touches the root while its jobs may write."""

    @pytest.fixture
    def root(self, tmp_path):
        work = tmp_path / "data" / "clean" / ".work" / ("0" * 16)
        note_jobs(work, [("filter", "11"), ("near", "12")], {"filter": 1, "near": 2})
        return tmp_path / "data"

    @pytest.fixture
    def squeue(self, tmp_path, monkeypatch):
        """Writes a stand-in that runs the given shell."""
        (tmp_path / "commands").mkdir()
        monkeypatch.setenv("PATH", str(tmp_path / "commands"))

        def make(shell):
            path = tmp_path / "commands" / "squeue"
            path.write_text(f"#!/bin/sh\n{shell}\n")
            path.chmod(0o755)

        return make

    def test_it_is_refused_until_the_last_has_ended(self, root, squeue, tmp_path):
        squeue(f"echo $* > {tmp_path}/asked; echo 7; echo 12; echo 12")
        with pytest.raises(DataError, match=r"wait or run: 12; wait until `squeue -j 12` .*scancel 12"):
            refuse_while_jobs_run(root)
        assert "--name=clean-filter,clean-near " in (tmp_path / "asked").read_text()
        squeue("echo 7")
        refuse_while_jobs_run(root)

    def test_unknown_is_refused_too(self, root, squeue):
        with pytest.raises(DataError, match=r"11, 12\), and whether .* no command squeue here.*remove .*slurm_jobs.json"):
            refuse_while_jobs_run(root)
        squeue("echo no controller >&2; exit 1")
        with pytest.raises(DataError, match="squeue failed: no controller; if you know"):
            refuse_while_jobs_run(root)

    def test_nobody_is_asked_without_a_job_or_when_all_tasks_are_done(self, root, squeue, tmp_path):
        refuse_while_jobs_run(tmp_path / "other")
        work = next((root / "clean" / ".work").iterdir())
        for task, left in (
            ("filter/completions/00000", ["12"]),
            ("near/completions/00000", ["12"]),
            ("near/completions/00001", []),
        ):
            (work / task).parent.mkdir(parents=True, exist_ok=True)
            (work / task).touch()
            assert [job for _, job in noted_jobs(root)] == left
        refuse_while_jobs_run(root)

    def test_clean_and_prep_leave_the_root_alone(self, root, squeue, tmp_path):
        squeue("echo 11")
        writing = root / "clean" / "web_a" / ".00000.jsonl.17.tmp"
        writing.parent.mkdir()
        writing.touch()
        for run in (lambda: quarry(*small(root)), lambda: prepare(helpers.recipe(tmp_path))):
            with pytest.raises(DataError, match="wait or run: 11"):
                run()
        assert writing.exists()


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


def test_the_command_refuses_what_is_no_slurm_before_it_reads_anything(tmp_path):
    with pytest.raises(DataError, match=r"--slurm with cluster 'local', which is no Slurm; add cluster=slurm"):
        quarry(*small(tmp_path / "data"), "--slurm")
    with pytest.raises(DataError, match=r"cluster.options.qos: .*'a b' would not reach Slurm as it is"):
        quarry(*small(tmp_path / "data"), "cluster=slurm", "cluster.options.qos='a b'", "--slurm")
    assert not Path(tmp_path / "data").exists()
