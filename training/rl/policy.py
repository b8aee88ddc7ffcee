"""The model that learns: Megatron's train_step with the DAPO loss, and forward passes for log-probabilities, its own or the reference's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import megatron.training.training as upstream
import torch
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.rerun_state_machine import RerunDataIterator, RerunMode, get_rerun_state_machine
from megatron.core.utils import get_model_config, unwrap_model
from megatron.training import get_args

from recipes.posttrain import Grpo
from training.rl import losses
from training.rl.batch import MicroBatch
from training.rl.health import Tally
from training.rl.logprobs import token_logprobs


def computes_loss() -> bool:
    """This rank is on the last pipeline stage."""
    return mpu.is_pipeline_last_stage(ignore_virtual=True)


class ReferenceWeights:
    """The frozen model of the KL term: a second set of this rank's weights in host memory, swapped in for a forward pass."""

    def __init__(self, model: list[Any], checkpoint: Path) -> None:
        """Collective. Reads the weights of `checkpoint` (an iter_* folder of any layout) and leaves the model as it is."""
        self._parameters = [p.data for chunk in unwrap_model(model) for p in chunk.parameters()]
        before = [p.clone() for p in self._parameters]
        (core,) = unwrap_model(model)
        # Loads into the model's own tensors where it can; what it returns says all of it.
        loaded = dist_checkpointing.load({"model": core.sharded_state_dict()}, str(checkpoint))["model"]
        missing = {name for name, _ in core.named_parameters()} - set(loaded)
        if missing:
            raise RuntimeError(f"{checkpoint} lacks {sorted(missing)[0]}: it is no checkpoint of this model")
        core.load_state_dict(loaded, strict=False)
        self._weights = [p.to("cpu", copy=True) for p in self._parameters]
        self._restore(before)

    def _restore(self, weights: Sequence[torch.Tensor]) -> None:
        for parameter, weight in zip(self._parameters, weights, strict=True):
            parameter.copy_(weight)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model is the reference inside; afterwards it is itself again, bit for bit."""
        own = [p.clone() for p in self._parameters]
        self._restore(self._weights)
        try:
            yield
        finally:
            self._restore(own)


class Policy:
    """Model, optimizer and scheduler of one rank."""

    def __init__(self, model: list[Any], optimizer: Any, scheduler: Any, settings: Grpo) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self._settings = settings
        self._config = get_model_config(model[0])
        # What Megatron's own train() would set up.
        self._config.grad_scale_func = optimizer.scale_loss
        self._config.timers = None
        self._config.finalize_model_grads_func = finalize_model_grads
        if get_args().overlap_grad_reduce:
            self._config.no_sync_func = model[0].no_sync

    def logprobs(self, batches: Sequence[MicroBatch], length: int) -> list[torch.Tensor] | None:
        """Log-probabilities of the response tokens, [B, T] of each micro batch, by a forward pass; None off the last pipeline stage.

        Collective over the replica. Draws no random numbers and leaves the model in training mode.
        """

        def forward(iterator: Iterator[MicroBatch], model: Any) -> tuple[torch.Tensor, Any]:
            batch = next(iterator)
            return model(batch.tokens, batch.position_ids, None), partial(self._report_logprobs, batch)

        rerun = get_rerun_state_machine()
        mode = rerun.get_mode()
        rerun.set_mode(RerunMode.DISABLED)
        for chunk in self.model:
            chunk.eval()
        try:
            with torch.no_grad():
                reports = get_forward_backward_func()(
                    forward_step_func=forward,
                    data_iterator=iter(batches),
                    model=self.model,
                    num_microbatches=len(batches),
                    seq_length=length,
                    micro_batch_size=len(batches[0].tokens),
                    decoder_seq_length=length,
                    forward_only=True,
                )
        finally:
            for chunk in self.model:
                chunk.train()
            rerun.set_mode(mode)
        return [report["logprobs"] for report in reports] if computes_loss() else None

    def _report_logprobs(self, batch: MicroBatch, logits: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logprobs, _ = token_logprobs(logits, batch.targets, batch.response, self._settings.rollout.temperature)
        return logprobs.new_zeros(()), {"logprobs": logprobs}

    def train(
        self, batches: Sequence[MicroBatch], length: int, *, global_tokens: int, step: int, tally: Tally
    ) -> tuple[float | None, bool]:
        """One optimizer step on this rank's micro batches; returns (gradient norm before clipping, the update was skipped).

        `global_tokens` counts the loss tokens of all ranks' micro batches; `tally` gets this rank's part of the health numbers.
        """
        args = get_args()
        args.seq_length = args.decoder_seq_length = length
        result = upstream.train_step(
            partial(self._forward, global_tokens=global_tokens, micro_batches=len(batches), tally=tally),
            RerunDataIterator(iter(batches)),
            self.model,
            self.optimizer,
            self.scheduler,
            self._config,
            get_forward_backward_func(),
            iteration=step,
        )
        # (losses, skipped, should_checkpoint, should_exit, exit_code, grad_norm, ...)
        return (None if result[5] is None else float(result[5])), bool(result[1])

    def _forward(
        self, iterator: Iterator[MicroBatch], model: Any, *, global_tokens: int, micro_batches: int, tally: Tally
    ) -> tuple[torch.Tensor, Any]:
        batch = next(iterator)
        output = model(batch.tokens, batch.position_ids, None)
        # Megatron divides the loss by the number of micro batches and averages gradients over data parallelism: both are taken back,
        # because `global_tokens` counts all of them already.
        scale = micro_batches * mpu.get_data_parallel_world_size()
        return output, partial(self._loss, batch, global_tokens=global_tokens, scale=scale, tally=tally)

    def _loss(
        self, batch: MicroBatch, logits: torch.Tensor, *, global_tokens: int, scale: int, tally: Tally
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        settings = self._settings
        new, entropy = token_logprobs(logits, batch.targets, batch.response, settings.rollout.temperature)
        if batch.old is None:
            tally.add_gap(batch.rollout, new, batch.response)
        old = new.detach() if batch.old is None else batch.old
        result = losses.dapo_token_losses(new, old, batch.advantages, clip_low=settings.clip_low, clip_high=settings.clip_high)
        values = result.loss
        if batch.reference is not None:
            divergence = losses.k3_divergence(new, batch.reference)
            values = values + settings.kl_coefficient * divergence
            tally.add("divergence", divergence, batch.mask)
        tally.add("loss", values, batch.mask)
        tally.add("entropy", entropy, batch.mask)
        tally.add("clipped_low", result.clipped_low, batch.mask)
        tally.add("clipped_high", result.clipped_high, batch.mask)
        tally.sums["loss_tokens"] += float(batch.mask.sum())
        share = losses.token_share(values, batch.mask, global_tokens)
        return share * scale, {"rl loss": share.detach().view(1)}
