"""Runs of the counting task on real ranks, for tests. One process makes them all, one after another."""

import json
import shutil
from pathlib import Path

from tests.training import interruption, stage_server
from training.files import read_json_lines
from training.rl.demo import make_job
from training.rl.job import Initial, Job

SMALL = {"samples_per_prompt": 8, "micro_batch_samples": 20}
"""80 samples a step."""


def prepare(folder, layout, *, initial=None, **settings):
    """A stage folder with its job; `initial` is (stage folder, step), which may be made later."""
    folder.mkdir(parents=True)
    start = Initial(checkpoints=str(initial[0] / "checkpoints"), step=initial[1]) if initial else None
    make_job(folder / "inputs", layout, initial=start, **(SMALL | settings)).write(folder / "job.json")
    return folder


def drive(log, *runs):
    """Run each of `runs` in a process of its own and return their exit codes, in order; its output goes to the file `log`.

    A run is a stage folder; with `:kill=STEP`, a rank is ended with SIGKILL once that step is logged; with `:stop=STEP`, the stage is asked
    to stop; with `:job=FILE`, that file of the folder becomes job.json first.
    """
    codes = log.with_suffix(".codes")
    process = stage_server.start([str(codes), *map(str, runs)], log, program="tests.training.rl.factory:_drive")
    assert process.wait(timeout=540) == 0, log.read_text()[-4000:]
    return json.loads(codes.read_text())


def _drive(arguments):
    from training.rl.demo import reward
    from training.rl.grpo import run_stage

    result, *runs = arguments
    codes = []
    for run in runs:
        name, _, what = run.partition(":")
        folder, (verb, _, argument) = Path(name), what.partition("=")
        if verb == "job":
            shutil.copy(folder / argument, folder / "job.json")
        elif verb:
            interruption.start(folder / "metrics.jsonl", int(argument), verb)
        own = Job.read(folder / "job.json").rewards
        codes.append(run_stage(folder, None if own else reward))
        print(f"{run}: exit code {codes[-1]}", flush=True)
    Path(result).write_text(json.dumps(codes))
    return 0


def rows(stage_dir):
    return read_json_lines(stage_dir / "metrics.jsonl")


CLOCK = ("seconds", "rollout_seconds", "train_seconds", "tokens_per_second", "time")


def exact(stage_dir):
    """What must be equal bit for bit: everything but the clock."""
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows(stage_dir)]
