"""Runs of the counting task on real ranks, for tests."""

import json
import os
import subprocess
import sys
import time

from training.files import read_json_lines
from training.rl.demo import make_job
from training.rl.job import Initial

PROGRAM = """
import sys
from pathlib import Path
from training import fast_import
from training.rl.demo import reward
from training.rl.grpo import run_stage
fast_import.leave(run_stage(Path(sys.argv[1]), reward))
"""
SMALL = {"samples_per_prompt": 8, "micro_batch_samples": 20}
"""80 samples a step."""


def prepare(folder, layout, *, initial=None, **settings):
    """A stage folder with its job; `initial` is (stage folder, step)."""
    folder.mkdir(parents=True)
    start = Initial(checkpoints=str(initial[0] / "checkpoints"), step=initial[1]) if initial else None
    make_job(folder / "inputs", layout, initial=start, **(SMALL | settings)).write(folder / "job.json")
    if initial:  # the digest of a job holds the paths of its inputs' content only
        assert (initial[0] / "checkpoints").is_dir()
    return folder


def start(stage_dir):
    """The stage command in the background; its output is appended to log.txt."""
    with open(stage_dir / "log.txt", "a") as log:
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, str(stage_dir)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def run(stage_dir):
    """The stage command to its end; returns the exit code."""
    return start(stage_dir).wait(timeout=300)


def log(stage_dir):
    return (stage_dir / "log.txt").read_text()


def rows(stage_dir):
    return read_json_lines(stage_dir / "metrics.jsonl")


CLOCK = ("seconds", "rollout_seconds", "train_seconds", "tokens_per_second", "time")


def exact(stage_dir):
    """What must be equal bit for bit: everything but the clock."""
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows(stage_dir)]


def wait_for_step(stage_dir, step, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        done = rows(stage_dir)
        if done and done[-1]["step"] >= step:
            return done[-1]["step"]
        assert process.poll() is None, log(stage_dir)[-3000:]
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached: {log(stage_dir)[-3000:]}")


def sampler_state(stage_dir, step):
    return json.loads((stage_dir / "sampler" / f"step_{step:07d}.json").read_text())
