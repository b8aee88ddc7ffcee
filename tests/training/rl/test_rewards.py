"""Rewards from a plan (training/rewards) inside the loop, whose ranks torchrun starts: no function of another process reaches them."""

import json
import os
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.training.rl.factory import drive, prepare, rows
from training.rl.job import Job
from training.rl.state import SamplerState

pytestmark = pytest.mark.multirank

PLAN = {
    "domains": {
        "even": {"parts": [{"reward": "training.rl.demo:Counting"}]},
        "*": {"parts": [{"reward": "format", "options": {"pattern": "[0-9>]*"}}]},
    },
    "workers": 1,
}


TORCHRUN = """
import sys
from pathlib import Path
from training import stage
program = ["-m", "training.rl.grpo", "--stage-dir", sys.argv[1], "--rank"]
sys.exit(stage.torchrun(2, "parallel.gpus", program, stage_dir=Path(sys.argv[1]), grace_seconds=None))
"""
"""As on GPUs, though these ranks are on the CPU."""


def with_rewards(stage, plan):
    Job.read(stage / "job.json").model_copy(update={"rewards": plan}).write(stage / "job.json")
    return stage


def run(stage):
    command = [sys.executable, "-W", "ignore", "-c", TORCHRUN, str(stage)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_failed_scores_teach_nothing_and_too_many_stop_every_rank(tmp_path):
    """In one run: the guard judges a domain only once it has seen more samples of it than the first step gives."""
    domains = {"*": {"parts": [{"reward": "tests.training.rl.failing:Sometimes"}]}}
    plan = {
        "domains": domains,
        "workers": 1,
        "max_failure_share": 0.01,
        "failure_window_samples": 40,
        "failure_min_samples": 21,
    }
    settings = {"steps": 9, "samples_per_prompt": 4, "record_samples": 40, "save_interval_steps": 1}
    stage = with_rewards(prepare(tmp_path / "stage", "dp2", **settings), plan)
    log = tmp_path / "log.txt"
    assert drive(log, stage, stage) == [17, 17], log.read_text()[-4000:]
    output = log.read_text()
    assert "no rewards to learn from: domain '" in output
    assert "OSError: not this one" in output
    first, *_ = rows(stage)
    assert 0.05 < first["failed_reward_share"] < 0.95
    samples = [json.loads(line) for line in (stage / "rollouts" / "step_0000001.jsonl").read_text().splitlines()]
    for sample in samples:
        assert (sample["reward"] is None) == (sample["completion"][:1] in tuple("02468"))
        assert sample["reward"] is not None or sample["advantage"] == 0
    assert any(sample["reward"] for sample in samples)
    # The second run resumes behind the step that the guard stopped: without the failures of before it would judge none of its first steps.
    assert f"resume from step {len(rows(stage))} of" in output
    stops = re.findall(r"stopped: step (\d+): .* (\d+) of the last (\d+) rewards failed", output)
    assert len(stops) == 2
    assert stops[0] == stops[1]


WINDOWS = st.lists(st.fixed_dictionaries({"a": st.lists(st.sampled_from([None, "x", "y"]), max_size=6)}), max_size=4)


@given(WINDOWS)
def test_failures_seen_outlive_a_resume_in_any_number_of_replicas(windows):
    state = SamplerState(seed=0, step=1, prompt_position=0, consumed_tokens=0, failures=windows)
    for replica, window in enumerate(windows):
        assert state.failures_of(replica, len(windows)) == window
    merged = state.failures_of(0, len(windows) + 1)
    assert sorted(map(str, merged.get("a", []))) == sorted(str(entry) for window in windows for entry in window["a"])
    # The newest of every replica stand behind all that is older.
    last = merged.get("a", [])[len(merged.get("a", [])) - sum(bool(window["a"]) for window in windows) :]
    assert sorted(map(str, last)) == sorted(str(window["a"][-1]) for window in windows if window["a"])


def test_a_plan_scores_the_samples_of_each_replica(tmp_path):
    stage = with_rewards(prepare(tmp_path / "stage", "dp2", steps=1, samples_per_prompt=4, record_samples=40), PLAN)
    done = run(stage)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (stage / "result.json").exists()
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
