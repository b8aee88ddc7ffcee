"""A chain of stages on a real Slurm through `quarry launch cluster=slurm`: what clusters do to it, and that its numbers do not change.

One local run of the same recipe is the reference: a drill that a chain must survive ends with its losses, bit for bit. Drills that must
stop a chain begin behind the reference's first stage, so that nothing is trained for them twice. All share one cluster and run beside
each other where that spares waiting: a requeued job waits 5 s for Slurm's credential to expire, a time limit a minute.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.data_prep.helpers import tree
from tests.slurm.bench import LIMIT_SECONDS, ON_N1, QUARRY, SLURM, STAGES, Bench, decisions, drill, journal
from tests.slurm.cleaning import COPIES, CleaningJobs
from tests.slurm.cleaning import STAGES as CLEANING_STAGES

pytestmark = [pytest.mark.slurm, pytest.mark.multirank]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """The reference run, which trains while Slurm boots."""
    bench = Bench(tmp_path_factory.mktemp("chain"))
    yield bench
    bench.close()


@pytest.fixture(scope="module")
def bench(begun: Bench, slurm) -> Bench:
    return begun.ready(slurm)


@pytest.fixture(scope="module")
def limited(bench: Bench) -> Path:
    """A run in slices of its time limit. It sleeps most of the time, so it begins first and is looked at last.

    Slurm looks at limits every 30 s: the signal for 1 s before the limit of 60 s comes 29 to 59 s after the start.
    """
    limit = ("cluster.options.time='00:01:00'", "cluster.options.signal_seconds_before_limit=1")
    return bench.submit(
        "limited", ON_N1, *limit, *drill(waits="foundation/4", saves="foundation/8=LIMIT"), "--to", "foundation"
    )


@pytest.fixture(scope="module")
def cleaning(bench: Bench) -> CleaningJobs:
    """The jobs of a cleaning, which run beside the first chain."""
    return CleaningJobs(bench)


@pytest.mark.usefixtures("begun")
def test_facts_of_slurm_that_the_launcher_relies_on(slurm) -> None:
    """An afterok chain runs in order; a failure cancels all behind it; a requeue counts and keeps what waits; GPUs are visible."""

    def submit(command: str, *options: str) -> str:
        return slurm.run("sbatch", "--parsable", f"--output={slurm.root}/%j.out", *options, f"--wrap={command}")

    def behind(job: str, command: str) -> str:
        return submit(command, f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes")

    requeued = submit('[ "$SLURM_RESTART_COUNT" = 1 ] || sleep 60', "--requeue")
    kept = behind(requeued, "true")
    order = slurm.root / "order"
    chain = [submit(f"echo a >> {order}")]
    chain += [behind(chain[-1], f"echo b >> {order}")]
    chain += [behind(chain[-1], f"echo c >> {order}")]
    failing = [submit("sleep 1; exit 3")]
    failing += [behind(failing[-1], "true")]
    failing += [behind(failing[-1], "true")]
    gpus = submit("echo $CUDA_VISIBLE_DEVICES", "--gres=gpu:2")
    slurm.until(lambda: slurm.run("squeue", "-h", "-o", "%T", "-j", requeued) == "RUNNING", 60, f"job {requeued} to run")
    slurm.requeue(requeued)
    states = slurm.wait([requeued, kept, *chain, *failing, gpus], timeout_s=90)
    assert [states[job] for job in failing] == ["FAILED", "CANCELLED", "CANCELLED"]
    assert {states[job] for job in (requeued, kept, *chain, gpus)} == {"COMPLETED"}
    assert order.read_text().split() == ["a", "b", "c"]
    assert len((slurm.root / f"{gpus}.out").read_text().strip().split(",")) == 2


@pytest.mark.usefixtures("cleaning")
def test_submitted_at_once_it_runs_to_the_end_and_equals_the_local_chain(bench: Bench, limited: Path) -> None:
    run = bench.submit("whole")
    jobs = bench.jobs(run)
    assert list(jobs) == ["data", *STAGES]
    for stage, before in zip(STAGES, ("data", *STAGES), strict=False):
        shown = bench.slurm.run("scontrol", "show", "job", jobs[stage])
        assert f"Dependency=afterok:{jobs[before]}" in shown, shown
    bench.finish(run)
    assert "nothing to start" in bench.quarry(*bench.command("whole", *SLURM))[1]
    assert bench.jobs(run) == jobs, "a finished run submits nothing"


def test_what_clusters_do_leaves_the_numbers_alone(bench: Bench) -> None:
    """One chain through a restarted controller, a requeue by an operator, a rank killed with -9 and a node taken down."""
    run = bench.submit("drilled", *drill(seconds=0.3))
    bench.wait_for_step(run, "foundation", 2)
    bench.slurm.restart_controller()
    bench.wait_for_step(run, "foundation", 6)
    assert len(journal(run, "started", "foundation")) == 1, "a running job must not notice the controller"
    bench.slurm.requeue(bench.jobs(run)["foundation"])
    bench.wait_for_step(run, "capability", 6)
    ranks = [p for p in psutil.process_iter() if {"training.stage", str(run), "capability"} <= set(_cmdline(p))]
    max(ranks, key=lambda p: p.pid).send_signal(signal.SIGKILL)
    bench.wait(lambda: len(journal(run, "started", "capability")) == 2, run)
    bench.wait_for_step(run, "capability", 10)
    node = bench.node_of(run, "capability")
    bench.slurm.run("scontrol", "update", f"nodename={node}", "state=down", "reason=drill")
    bench.wait(lambda: len(journal(run, "started", "capability")) == 3, run)
    bench.slurm.resume(node)
    bench.finish(run)
    assert decisions(run, "foundation") == ["again", "next"]
    assert decisions(run, "capability")[0] == "again"
    assert len(journal(run, "started", "foundation")) == 2
    assert len(journal(run, "started", "capability")) == 3, "a lost node's job is started again"


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_preempted_inside_a_save_and_a_node_whose_slurmd_dies(bench: Bench) -> None:
    """Its launcher was killed between two submissions, too.

    SIGTERM comes when rank 0 has written its tensors of a checkpoint but not the rest: that save is finished, and the stage goes on from
    there. Later the job is requeued inside a save and killed before it is whole: it goes on from the checkpoint before.
    """
    name = "preempted"
    run = bench.after_foundation(name)
    saves = "capability/4=TERM,capability/8=REQUEUE"
    arguments = bench.command(name, *SLURM, "--accept-changes", *drill(seconds=0.4, saves=saves))
    launcher = subprocess.Popen(
        [QUARRY, *arguments], cwd=bench.home, env=bench.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while len(journal(run, "submitted")) < 2:
        assert launcher.poll() is None
        time.sleep(0.002)
    launcher.kill()
    launcher.wait()
    assert len(journal(run, "submitted")) < len(STAGES), "killed too late"
    code, output = bench.quarry(*arguments)
    assert code == 0, output
    names = [line.split()[1] for line in bench.alive(run)]
    assert len(names) == len(set(names)), f"a stage was submitted twice: {names}"

    bench.wait_for_step(run, "capability", 10)  # behind both saves
    node = bench.node_of(run, "capability")
    bench.slurm.node_down(node)
    bench.wait(lambda: len(journal(run, "started", "capability")) == 4, run)
    bench.slurm.node_up(node)
    bench.finish(run)
    preempted, killed, lost, finished = journal(run, "decision", "capability")
    assert (preempted["decision"], preempted["reason"]) == ("again", "saved at step 5, to be resumed")
    assert killed["step"] == 5, "the checkpoint of step 8 was not whole"
    assert lost["step"] >= 8
    assert all("without a trace" in row["reason"] for row in (killed, lost))
    assert finished["decision"] == "next"


def test_a_cleaning_as_jobs_equals_the_local_one(cleaning: CleaningJobs) -> None:
    """`quarry clean --slurm`: five stages as arrays, each after the one before; then the same command writes the end."""
    assert list(cleaning.jobs) == list(CLEANING_STAGES), cleaning.output
    cleaning.wait(LIMIT_SECONDS)
    # Two shards and one bucket; what is about all documents at once is one task.
    assert list(cleaning.finished_tasks().values()) == [2, 1, 1, 1, 2], cleaning.explain()
    for options in (["--slurm"], ["data.root='copies of text/local'"]):
        code, output = cleaning.quarry(*options)
        assert code == 0, output
        assert "job " not in output, "nothing is left to submit"
    assert cleaning.removed("local") == COPIES
    assert tree(cleaning.folder / "data") == tree(cleaning.folder / "local")


def test_a_time_limit_is_only_the_end_of_a_slice(bench: Bench, limited: Path) -> None:
    """Three slices of one stage: the signal before Slurm's own limit, the limit itself inside a save that does not end, the end."""
    bench.finish(limited, STAGES[:1])
    # On a machine that is slow beyond measure a signal may come before the first step: such a slice more does no harm.
    *slices, last = journal(limited, "decision", "foundation")
    assert "saved at step 4, to be resumed" in [row["reason"] for row in slices]
    assert ["killed at the limit" in row["reason"] for row in slices if row["step"] == 4][-1]
    assert last["decision"] == "next"


def test_what_must_stop_a_chain_stops_it(bench: Bench) -> None:
    """All at once: each run stops where its fault is, `quarry status` has the reason, and nothing behind it starts."""

    def launch(name: str, *more: str) -> Path:
        return bench.submit(name, ON_N1, *more, "--accept-changes")

    data, rotten_data = str(bench.home / "data"), str(bench.home / "rotten_data")
    shutil.copytree(data, rotten_data, symlinks=True)
    bench.after_foundation("rotten", (data, rotten_data))
    rotten = launch("rotten", f"data.root={rotten_data}")
    # Held until the data job has found everything in order: the file goes bad behind it.
    bench.slurm.run("scontrol", "hold", bench.jobs(rotten)["capability"])

    bench.after_foundation("nan")
    nan = launch("nan", *(f"phase.capability.schedule.{key}" for key in ("power_amplitude=1e30", "max_lr=1e30", "jump=drill")))

    full = bench.after_foundation("full")
    unfinished = full / "stages" / "capability" / "checkpoints" / "iter_0000004"
    unfinished.mkdir(parents=True)
    for name in ("__0_0.distcp", "__1_0.distcp"):  # what rank 0 and 1 will write; /dev/full gives the kernel's own error
        (unfinished / name).symlink_to("/dev/full")
    launch("full")

    damaged = bench.after_foundation("damaged")
    checkpoint = max(
        (damaged / "stages" / "foundation" / "checkpoints").rglob("*.distcp"), key=lambda path: path.stat().st_size
    )
    flip(checkpoint)
    launch("damaged")

    # A first stage of another model, under a recipe.json that hides it from the launcher: the job must see it.
    foreign = bench.after_foundation("foreign", ('"residual_multiplier": 0.7', '"residual_multiplier": 0.6'))
    launch("foreign", "model.residual_multiplier=0.6")

    bench.wait(lambda: bench.state(bench.jobs(rotten)["data"]) == "COMPLETED", rotten)
    view = max((Path(rotten_data) / "views" / "capability").glob("*.bin"), key=lambda path: path.stat().st_size)
    flip(view)
    bench.slurm.run("scontrol", "release", bench.jobs(rotten)["capability"])

    # Only the environment and the Python of a job: no linter and no login node can know that they are wrong.
    wrong_value = bench.after_foundation("wrong_value")
    launch("wrong_value", "+cluster.options.environment.QUARRY_HANG_SECONDS=soon")
    no_python = bench.after_foundation("no_python")
    launch("no_python", "cluster.options.python=/nowhere/bin/python")

    bench.assert_stopped(nan, "capability", "found NaN in ", "at step")
    bench.assert_stopped(full, "capability", "no space left on a disk", str(full / "stages" / "capability" / "checkpoints"))
    bench.assert_stopped(damaged, "capability", "refused", checkpoint.name, "was altered")
    bench.assert_stopped(
        foreign, "capability", "refused", "model.residual_multiplier is 0.7 in the hand-off of 'foundation', 0.6"
    )
    bench.assert_stopped(rotten, "capability", "refused", view.name, "the content was altered or swapped")
    bench.assert_stopped(wrong_value, "data", "refused: QUARRY_HANG_SECONDS is 'soon'")
    bench.assert_stopped(no_python, "data", "ended with exit code 2 before the stage could say why")
    assert any("/nowhere/bin/python: No such file" in path.read_text() for path in no_python.rglob("log-*.out"))


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
