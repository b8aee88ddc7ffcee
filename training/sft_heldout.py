"""Loss on held-out answers by source, over packed sequences: what fine-tuning is to lower."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine

from data_prep.sft_manifest import PackedSequences, SftManifest
from training.sft_data import empty_sequence, forward_step


def evaluate_answers(model: list[Any], config: Any, manifest: SftManifest, data_root: Path) -> dict[str, float]:
    """Mean loss in nats per token that an assistant wrote, of each held-out set of `manifest`; the same value on every rank.

    Collective over all ranks. Draws no random numbers and leaves the model in training mode.
    """
    rerun = get_rerun_state_machine()
    rerun_mode = rerun.get_mode()
    rerun.set_mode(RerunMode.DISABLED)
    timers, config.timers = config.timers, None
    for chunk in model:
        chunk.eval()
    losses: dict[str, float] = {}
    try:
        for source, packs in manifest.heldout.items():
            losses[source] = _mean_loss(model, PackedSequences(manifest, data_root, packs))
    finally:
        for chunk in model:
            chunk.train()
        config.timers = timers
        rerun.set_mode(rerun_mode)
    return losses


def _mean_loss(model: list[Any], sequences: PackedSequences) -> float:
    # The interleaved schedule takes micro batches in groups of one per pipeline rank.
    group = mpu.get_pipeline_model_parallel_world_size() if len(model) > 1 else 1
    ranks, rank = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
    each = -(-len(sequences) // (ranks * group)) * group
    iterators = [_batches(sequences, range(rank, each * ranks, ranks)) for _ in model]
    length = sequences.manifest.seq_length_tokens
    with torch.no_grad():
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(model) > 1 else iterators[0],
            model=model,
            num_microbatches=each,
            seq_length=length,
            micro_batch_size=1,
            decoder_seq_length=length,
            forward_only=True,
        )
    total = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
    for report in reports:
        total += report["lm loss"].double()
    # Ranks of earlier pipeline stages hold zeros; tensor-parallel ranks hold equal values and sit in groups of their own.
    torch.distributed.all_reduce(total, group=mpu.get_data_parallel_group(with_context_parallel=True))
    torch.distributed.all_reduce(total, group=mpu.get_pipeline_model_parallel_group())
    return (total[0] / total[1]).item()


def _batches(sequences: PackedSequences, numbers: range) -> Iterator[dict[str, torch.Tensor]]:
    """Micro batches of one sequence; numbers beyond the last give empty ones, which count for nothing."""
    for number in numbers:
        sequence = sequences[number] if number < len(sequences) else empty_sequence(sequences)
        yield {key: torch.from_numpy(value).unsqueeze(0) for key, value in sequence.items()}
