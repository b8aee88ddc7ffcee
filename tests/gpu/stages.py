"""Stages by the real command on a GPU or, on the same machine, on its CPU."""

import json
import os
import subprocess
import sys

WIDER = {"hidden_size": 512, "ffn_hidden_size": 1024, "num_attention_heads": 8, "num_query_groups": 4, "head_dim": 64}
"""FP8 needs dimensions divisible by 16 and, for blockwise scaling, by 128."""
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
"""The CPU backend refuses where it sees a GPU."""


def run_stage(run, stage, *, cpu=False):
    """`python -m training.stage` to its end; returns (exit code, end of its output)."""
    command = [sys.executable, "-W", "ignore", "-m", "training.stage", "--run-dir", str(run), "--stage", stage]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(NO_GPU if cpu else {})}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    return done.returncode, done.stdout[-2000:] + done.stderr[-6000:]


def rows(run, stage, name="metrics.jsonl"):
    return [json.loads(line) for line in (run / "stages" / stage / name).read_text().splitlines()]
