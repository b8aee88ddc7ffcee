"""Rewards from a plan (training/rewards) inside the loop, started by the command as a user does."""

import json
import os
import subprocess
import sys

import pytest

from tests.training.rl.factory import prepare, rows
from training.rl.job import Job

pytestmark = pytest.mark.multirank

PLAN = {
    "domains": {
        "even": {"parts": [{"reward": "training.rl.demo:Counting"}]},
        "*": {"parts": [{"reward": "format", "options": {"pattern": "[0-9>]*"}}]},
    },
    "workers": 1,
}


def log(stage):
    return (stage / "log.txt").read_text()


def command(stage):
    with open(stage / "log.txt", "a") as output:
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "training.rl.grpo", "--stage-dir", str(stage)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=300,
        ).returncode


def with_rewards(stage, plan):
    Job.read(stage / "job.json").model_copy(update={"rewards": plan}).write(stage / "job.json")
    return stage


def test_a_plan_scores_the_samples_of_each_replica(tmp_path):
    stage = with_rewards(prepare(tmp_path / "stage", "dp2", steps=1, samples_per_prompt=4, record_samples=40), PLAN)
    assert command(stage) == 0, log(stage)[-3000:]
    (row,) = rows(stage)
    assert row["reward_per_domain"]["odd"] == 1.0  # whatever the model writes consists of digits and marks
    assert row["reward_per_domain"]["even"] < 0.5
    samples = [json.loads(line) for line in (stage / "rollouts" / "step_0000001.jsonl").read_text().splitlines()]
    assert len(samples) == 40
    from training.rl.demo import _score

    for sample in samples:
        assert sample["reward"] == (1.0 if sample["domain"] == "odd" else _score(sample["completion"], sample["reference"]))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({}, "job.json: rewards is empty"),
        ({"domains": {"even": PLAN["domains"]["even"]}}, "domain is 'odd', the plan has even; add it"),
        ({"domains": {"*": {"parts": [{"reward": "countng"}]}}}, "no reward is called 'countng'"),
        ({"domains": {"*": {"parts": [{"reward": "json_schema"}]}}}, "reference"),
    ],
)
def test_rewards_that_cannot_work_are_refused_before_any_rank_starts(tmp_path, capsys, plan, message):
    from training.rl.grpo import run_stage

    assert run_stage(with_rewards(prepare(tmp_path / "stage", "single"), plan)) == 78
    assert message in capsys.readouterr().err
