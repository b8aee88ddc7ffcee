"""Facts of Slurm that the launcher relies on."""

import pytest

pytestmark = pytest.mark.slurm


def submit(slurm, command: str, *options: str) -> str:
    return slurm.run("sbatch", "--parsable", f"--output={slurm.root}/%j.out", *options, f"--wrap={command}")


def running(slurm, job: str) -> None:
    slurm._until(lambda: slurm.run("squeue", "-h", "-o", "%T", "-j", job) == "RUNNING", 30, f"job {job} to run")


def test_an_afterok_chain_runs_in_order(slurm):
    log, ids = slurm.root / "order", []
    for name in "abc":
        ids.append(submit(slurm, f"echo {name} >> {log}", *([f"--dependency=afterok:{ids[-1]}"] if ids else [])))
    assert set(slurm.wait(ids).values()) == {"COMPLETED"}
    assert log.read_text().split() == ["a", "b", "c"]


def test_a_failure_cancels_descendants(slurm):
    ids = [submit(slurm, "sleep 1; exit 3")]
    for _ in range(2):
        ids.append(submit(slurm, "true", f"--dependency=afterok:{ids[-1]}", "--kill-on-invalid-dep=yes"))
    assert list(map(slurm.wait(ids).get, ids)) == ["FAILED", "CANCELLED", "CANCELLED"]


def test_requeue_counts_and_keeps_dependents(slurm):
    job = submit(slurm, '[ "$SLURM_RESTART_COUNT" = 1 ] || sleep 60', "--requeue")
    child = submit(slurm, "true", f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes")
    running(slurm, job)
    slurm.requeue(job)
    assert set(slurm.wait([job, child]).values()) == {"COMPLETED"}


def test_gpus_are_visible(slurm):
    job = submit(slurm, "echo $CUDA_VISIBLE_DEVICES", "--gres=gpu:2")
    assert slurm.wait([job])[job] == "COMPLETED"
    assert len((slurm.root / f"{job}.out").read_text().strip().split(",")) == 2


def test_a_controller_restart_keeps_a_running_job(slurm):
    job = submit(slurm, "sleep 4")
    running(slurm, job)
    slurm.restart_controller()
    assert slurm.wait([job])[job] == "COMPLETED"
