"""Python runs this at its start where this folder is on PYTHONPATH: makes a stage of a drill slow, or preempts it inside a save.

The launcher hands its own PYTHONPATH on to the stages, and `cluster.options.environment` what to do:

    DRILL_STEP_SECONDS=0.3          every step takes so much longer, without using a CPU
    DRILL_WAITS=foundation/4        step 4 of the stage ends when SIGTERM has come
    DRILL_SAVES=foundation/4=TERM   when rank 0 has written its part of the checkpoint of step 4, the job is sent SIGTERM as a preemption
                                    does, and the save goes on once the signal is there
    DRILL_SAVES=foundation/4=REQUEUE    the job is requeued there, and the save stands still until Slurm kills it, with the files of an
                                    unfinished checkpoint on the disk
    DRILL_SAVES=foundation/4=LIMIT  the save stands still, so that the job is there when its time limit passes

Several are joined by commas. A file drill-iter_*.done in the stage's folder says that a save was disturbed: it is only the first time.
"""

import contextlib
import importlib.abc
import importlib.machinery
import os
import subprocess
import sys
import time
from pathlib import Path

TARGETS = {"training.hooks", "megatron.core.dist_checkpointing.strategies.filesystem_async"}


class Patch(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads the targets as Python does, then changes them."""

    def __init__(self):
        self.inner = {}

    def find_spec(self, name, path=None, target=None):
        if name not in TARGETS or name in self.inner:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        self.inner[name], spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self.inner[spec.name].create_module(spec)

    def exec_module(self, module):
        self.inner[module.__name__].exec_module(module)
        (slow_steps if module.__name__ == "training.hooks" else disturb_saves)(module)


def words(variable):
    return [word for word in os.environ.get(variable, "").split(",") if word]


def slow_steps(module):
    seconds = float(os.environ.get("DRILL_STEP_SECONDS", "0"))
    waits = words("DRILL_WAITS")
    log = module.PhaseHooks.training_log

    def training_log(self, loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs):
        result = log(self, loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs)
        time.sleep(seconds)
        if f"{self.stage_dir.name}/{iteration}" in waits:
            wait_for_sigterm()
        return result

    module.PhaseHooks.training_log = training_log


def disturb_saves(module):
    drills = dict(word.split("=") for word in words("DRILL_SAVES"))
    writer = module.FileSystemWriterAsync
    write = writer.write_preloaded_data

    def write_and_be_disturbed(*args, write_bucket, **kwargs):
        result = write(*args, write_bucket=write_bucket, **kwargs)
        folder = Path(write_bucket[0]).parent  # STAGE/checkpoints/iter_0000004
        stage = folder.parents[1]
        what = drills.get(f"{stage.name}/{int(folder.name.removeprefix('iter_'))}")
        if what and os.environ["RANK"] == "0":
            with contextlib.suppress(FileExistsError):
                (stage / f"drill-{folder.name}.done").touch(exist_ok=False)
                disturb(what)
        return result

    writer.write_preloaded_data = staticmethod(write_and_be_disturbed)


def wait_for_sigterm():
    from megatron.training.global_vars import get_signal_handler

    while not get_signal_handler()._signal_received:
        time.sleep(0.02)


def disturb(what):
    job = os.environ["SLURM_JOB_ID"]
    if what == "TERM":
        subprocess.run(["scancel", "--signal=TERM", job], check=True)
        wait_for_sigterm()
        return
    if what == "REQUEUE":
        subprocess.run(["scontrol", "requeue", job], check=True)
    print(f"drill: the save stands still ({what})", flush=True)
    time.sleep(600)


if "training.stage" in sys.orig_argv:
    sys.meta_path.insert(0, Patch())
