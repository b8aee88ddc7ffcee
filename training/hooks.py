"""The one place where Quarry reaches into megatron.training: each replaced function, and why.

megatron.training is no stable API, so all of it is here and the version is pinned. Replaced in `megatron.training.training`:

- `get_optimizer_param_scheduler`: the recipe's learning rate in tokens instead of Megatron's schedules;
- `load_checkpoint`: on a first start, the position (step, consumed samples) and Adam's betas and epsilon are this stage's. Megatron's
  own `--override-ckpt-iteration` refuses when the batch size changes, and a load takes betas and epsilon from the checkpoint;
- `save_checkpoint`: never a second save of the same step; old checkpoints go once a newer one is whole;
- `training_log`: exact metrics of every logged step;
- `train`: held-out losses before the first step, and the recorder of samples where it is asked for;
- `setup_model_and_optimizer`: keeps hold of the model for the held-out losses at the end.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron.training.training as upstream
import torch
from megatron.core.num_microbatches_calculator import get_current_global_batch_size, update_num_microbatches
from megatron.training import get_args, print_rank_0
from megatron.training.utils import is_last_rank

from training import data, recorder, startup
from training.exit_codes import SuspiciousResult
from training.handoff import latest_step
from training.metrics import MetricsLog
from training.scheduler import TokenScheduler


class PhaseHooks:
    """State of one phase inside a rank, and the functions that stand in for Megatron's."""

    def __init__(
        self,
        *,
        stage_dir: Path,
        learning_rate: Callable[[int], float],
        first_start: bool,
        tokens_before: int,
        keep_checkpoints: int,
        at_first_start: Callable[[PhaseHooks], None],
    ) -> None:
        self.stage_dir = stage_dir
        self.learning_rate = learning_rate
        self.first_start = first_start
        self.tokens_before = tokens_before
        self.keep_checkpoints = keep_checkpoints
        self.at_first_start = at_first_start
        self.metrics = MetricsLog(stage_dir)
        self.model: list[Any] = []
        self.optimizer: Any = None
        self.scheduler: TokenScheduler | None = None
        self.loaded_step = self.last_logged_step = 0
        self.final_loss: float | None = None
        self.saved_step: int | None = None
        """The last save that was begun."""
        self.trained = False

    def install(self) -> None:
        self._setup = upstream.setup_model_and_optimizer
        self._load = upstream.load_checkpoint
        self._save = upstream.save_checkpoint
        self._log = upstream.training_log
        self._train = upstream.train
        upstream.setup_model_and_optimizer = self.setup_model_and_optimizer
        upstream.get_optimizer_param_scheduler = self.get_optimizer_param_scheduler
        upstream.load_checkpoint = self.load_checkpoint
        upstream.save_checkpoint = self.save_checkpoint
        upstream.training_log = self.training_log
        upstream.train = self.train

    def setup_model_and_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        startup.mark("process groups")
        self.model, self.optimizer, scheduler = self._setup(*args, **kwargs)
        startup.mark("model")
        self.loaded_step = self.last_logged_step = get_args().iteration
        if is_last_rank():
            self.metrics.start(self.loaded_step)
        return self.model, self.optimizer, scheduler

    def get_optimizer_param_scheduler(self, optimizer: Any) -> TokenScheduler:
        args = get_args()
        upstream.update_train_iters(args)  # Megatron's own function does this on the way
        self.scheduler = TokenScheduler(
            optimizer, self.learning_rate, seq_length_tokens=args.seq_length, weight_decay=args.weight_decay
        )
        self.scheduler.ignore_stored_position = self.first_start
        return self.scheduler

    def load_checkpoint(self, model: Any, optimizer: Any, scheduler: Any, *args: Any, **kwargs: Any) -> tuple[int, int]:
        startup.mark("model")
        hyper = [(group["betas"], group["eps"]) for group in optimizer.param_groups]
        step, flops = self._load(model, optimizer, scheduler, *args, **kwargs)
        startup.mark("checkpoint")
        if not self.first_start:
            return step, flops
        for group, (betas, eps) in zip(optimizer.param_groups, hyper, strict=True):
            group["betas"], group["eps"] = betas, eps
        megatron_args = get_args()
        megatron_args.consumed_train_samples = 0
        megatron_args.skipped_train_samples = 0
        megatron_args.consumed_valid_samples = 0
        update_num_microbatches(consumed_samples=0, verbose=False)
        print_rank_0(
            f"> hand-off: weights and moments of step {step}; step, samples, schedule and RNG of this stage start at 0"
        )
        return 0, 0

    def save_checkpoint(self, iteration: int, *args: Any, **kwargs: Any) -> None:
        checkpoints = self.stage_dir / "checkpoints"
        if iteration in (latest_step(checkpoints), self.saved_step):
            return
        megatron_args = get_args()
        asynchronous = megatron_args.async_save
        # Behind the last step there is nothing to go on with, and Megatron has ended the writer.
        megatron_args.async_save = asynchronous and not self.trained
        try:
            self._save(iteration, *args, **kwargs)
        finally:
            megatron_args.async_save = asynchronous
        self.saved_step = iteration
        torch.distributed.barrier()
        # An asynchronous save is not whole yet: what it replaces goes when the next one is begun.
        if torch.distributed.get_rank() == 0 and latest_step(checkpoints) is not None:
            prune(checkpoints, self.keep_checkpoints)

    def train(self, forward_step_func: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        startup.mark("data set")
        if self.first_start:
            self.at_first_start(self)
        startup.mark("held-out losses")
        if recorder.asked_for():
            data.recorder = recorder.SampleRecorder(self.stage_dir, self.loaded_step)
        self.metrics.start_clock()
        try:
            return self._train(forward_step_func, model, *args, **kwargs)
        finally:
            self.trained = True
            data.recorder = None  # what follows are held-out samples

    def training_log(
        self, loss_dict: dict, total_loss_dict: dict, learning_rate: Any, iteration: int, *args: Any, **kwargs: Any
    ) -> Any:
        result = self._log(loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs)
        if data.recorder is not None:
            data.recorder.commit(iteration, skipped=bool(args[2]))
        megatron_args = get_args()
        logged = iteration % megatron_args.log_interval == 0 or iteration == megatron_args.train_iters
        startup.mark("first step")
        if is_last_rank():
            startup.report(self.stage_dir, iteration)
        if not is_last_rank() or not logged:
            return result  # reading the loss waits for the GPU: not on steps that nobody looks at
        # Positional after `iteration`: loss_scale, report_memory_flag, skipped_iter, grad_norm.
        skipped, grad_norm = bool(args[2]), args[3]
        loss = float(loss_dict["lm loss"])
        seconds = self.metrics.lap() / (iteration - self.last_logged_step)
        self.last_logged_step = iteration
        if not math.isfinite(loss) and not skipped:
            raise SuspiciousResult(
                f"training loss is {loss} at step {iteration} (gradient norm {grad_norm}); the last checkpoint is of step "
                f"{latest_step(self.stage_dir / 'checkpoints')}: look at the data and the learning rate before resuming from it"
            )
        self.final_loss = loss
        samples = megatron_args.consumed_train_samples
        tokens = samples * megatron_args.seq_length
        step_tokens = get_current_global_batch_size() * megatron_args.seq_length
        self.metrics.append_step(
            step=iteration,
            consumed_samples=samples,
            stage_tokens=tokens,
            total_tokens=self.tokens_before + tokens,
            loss=loss,
            # The rate that this step was taken with; Megatron's scheduler has moved on already.
            lr=self.learning_rate(tokens - step_tokens),
            grad_norm=None if grad_norm is None else float(grad_norm),
            seconds=seconds,
            tokens_per_second=step_tokens / seconds if seconds else None,
            skipped=skipped,
            time=time.time(),
        )
        return result


def prune(checkpoints: Path, keep: int) -> list[Path]:
    """Delete whole checkpoints older than the `keep` newest; returns what was deleted. Never touches the one that the tracker names."""
    newest = latest_step(checkpoints)
    assert newest is not None
    steps = sorted(
        (int(p.name.removeprefix("iter_")), p) for p in checkpoints.glob("iter_*") if p.name.removeprefix("iter_").isdigit()
    )
    older = [path for step, path in steps if step < newest]
    gone = older[: max(0, len(older) - (keep - 1))]
    for path in gone:
        # Renamed first: a half-deleted folder must not look like a checkpoint.
        doomed = path.with_name(f".deleting_{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)
    return gone
