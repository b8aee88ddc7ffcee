"""Loss on held-out answers by source, over packed sequences: what fine-tuning is to lower."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu

from data_prep.sft_manifest import PackedSequences, SftManifest
from training import heldout
from training.sft_data import empty_sequence, forward_step


def evaluate_answers(model: list[Any], manifest: SftManifest, data_root: Path) -> dict[str, float]:
    """Mean loss in nats per token that an assistant wrote, of each held-out set of `manifest`; the same value on every rank.

    Collective over all ranks. Draws no random numbers and leaves the model in training mode.
    """
    ranks, rank = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
    losses: dict[str, float] = {}
    with heldout.evaluation_mode(model):
        for source, packs in manifest.heldout.items():
            sequences = PackedSequences(manifest, data_root, packs)
            each = heldout.micro_batches_per_rank(model, len(sequences), 1)
            iterators = [_batches(sequences, range(rank, each * ranks, ranks)) for _ in model]
            losses[source] = heldout.mean_loss(model, iterators, forward_step, each, 1, manifest.seq_length_tokens)
    return losses


def _batches(sequences: PackedSequences, numbers: range) -> Iterator[dict[str, torch.Tensor]]:
    """Micro batches of one sequence; numbers beyond the last give empty ones, which count for nothing."""
    for number in numbers:
        sequence = sequences[number] if number < len(sequences) else empty_sequence(sequences)
        yield {key: torch.from_numpy(value).unsqueeze(0) for key, value in sequence.items()}
