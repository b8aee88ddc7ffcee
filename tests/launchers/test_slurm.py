"""Submitting a chain, with a stand-in for sbatch, squeue and scancel; tests/slurm has the real ones."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from launchers import slurm, slurm_client
from launchers.chain import Launch
from launchers.errors import LaunchError
from launchers.journal import Journal
from recipes.schema import Recipe


class Cluster:
    """Counts job ids up; refuses the stage `broken`."""

    def __init__(self) -> None:
        self.jobs: dict[str, str] = {}
        self.after: dict[str, str | None] = {}
        self.cancelled: list[str] = []
        self.broken: str | None = None
        self.python = sys.executable
        self.last = 100

    def job_name(self, stage: str) -> str:
        return f"quarry.run.{stage}"

    def submit(self, job: Any, attempt: int, dependency: str | None) -> str:
        if job.stage == self.broken:
            raise LaunchError("sbatch: error: Batch job submission failed: Invalid account")
        self.last += 1
        self.jobs[self.job_name(job.stage)] = str(self.last)
        self.after[job.stage] = dependency
        return str(self.last)

    def live_jobs(self, names: Any) -> dict[str, str]:
        return {name: self.jobs[name] for name in names if name in self.jobs}

    def cancel(self, jobs: Any) -> None:
        self.cancelled += reversed(list(jobs))
        self.jobs = {name: job for name, job in self.jobs.items() if job not in jobs}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    stand_in = Cluster()
    monkeypatch.setattr(slurm, "scripts", lambda launch, code: stand_in)
    monkeypatch.setattr(slurm_client, "live_jobs", stand_in.live_jobs)
    monkeypatch.setattr(slurm_client, "cancel", stand_in.cancel)
    return stand_in


def launch(harness: Any, **options: Any) -> Launch:
    kind = {**harness.dict()["cluster"], "kind": "slurm", "options": {"account": "a", "partition": "p"}}
    recipe = Recipe.model_validate(harness.dict(cluster=kind))
    return Launch(recipe=recipe, run_name="run", **options)


def events(made: Launch, *wanted: str) -> list[tuple[str, str | None]]:
    rows = Journal.read(Path(made.run.journal)).rows
    return [(row["event"], row.get("stage") or row.get("job")) for row in rows if row["event"] in wanted]


def test_everything_is_submitted_each_after_the_one_before(harness: Any, cluster: Cluster) -> None:
    made = launch(harness)
    assert made.start() == 0
    assert cluster.after == {"data": None, "a": "101", "b": "102", "merged": "103", "c": "104", "hf": "105"}
    written = events(made, "intent", "submitted")
    assert written == [pair for stage in cluster.after for pair in (("intent", stage), ("submitted", stage))]


def test_launching_again_attaches(harness: Any, cluster: Cluster) -> None:
    launch(harness).start()
    before = dict(cluster.jobs)
    assert launch(harness).start() == 0
    assert cluster.jobs == before
    assert cluster.last == 106


def test_a_submission_that_fails_half_way_cancels_what_went_before(harness: Any, cluster: Cluster) -> None:
    cluster.broken = "merged"
    made = launch(harness)
    with pytest.raises(
        LaunchError, match=r"stage 'merged' could not be submitted: .*Invalid account.*cancelled .*101, 102, 103"
    ):
        made.start()
    assert cluster.cancelled == ["103", "102", "101"]
    assert events(made, "submission_failed", "cancel") == [
        ("submission_failed", "merged"),
        ("cancel", "103"),
        ("cancel", "102"),
        ("cancel", "101"),
    ]
    cluster.broken = None
    assert launch(harness).start() == 0
    assert cluster.after["hf"] == "108"


def test_what_is_missing_behind_live_jobs_is_submitted(harness: Any, cluster: Cluster) -> None:
    """The launcher was killed after the third submission."""
    launch(harness).start()
    for stage in ("merged", "c", "hf"):
        del cluster.jobs[cluster.job_name(stage)]
    assert launch(harness).start() == 0
    assert (cluster.after["merged"], cluster.after["c"], cluster.after["hf"]) == ("103", "107", "108")
    assert cluster.cancelled == []


def test_behind_a_job_that_is_gone_everything_is_submitted_anew(harness: Any, cluster: Cluster) -> None:
    """A job that waits for one that Slurm has forgotten would start at once."""
    launch(harness).start()
    del cluster.jobs[cluster.job_name("b")]
    assert launch(harness).start() == 0
    assert cluster.cancelled == ["104", "105", "106"]
    assert (cluster.after["b"], cluster.after["merged"], cluster.after["hf"]) == ("102", "107", "109")


def test_a_job_that_was_submitted_but_not_written_down_is_adopted(harness: Any, cluster: Cluster) -> None:
    cluster.jobs[cluster.job_name("data")] = "7"
    cluster.jobs[cluster.job_name("a")] = "8"
    made = launch(harness)
    assert made.start() == 0
    assert cluster.after["b"] == "8"
    rows = Journal.read(Path(made.run.journal)).rows
    assert [(row["stage"], row["job"]) for row in rows if row.get("adopted")] == [("a", "8")]


def test_without_an_account_nothing_is_written_to_slurm(harness: Any, cluster: Cluster) -> None:
    kind = {**harness.dict()["cluster"], "kind": "slurm", "options": {}}
    with pytest.raises(LaunchError, match=r"cluster.options.account is not set"):
        Launch(recipe=Recipe.model_validate(harness.dict(cluster=kind)), run_name="run").start()
    assert cluster.jobs == {}
