"""Packed sequences as Megatron's data set, their batches on a rank, and the forward step through them.

Megatron's thd format: the micro batch is one sequence, hidden states are [T, 1, H], and `cu_seqlens` tells attention and rotary
embedding where samples begin. Transformer Engine takes it on GPUs, model/attention.py on CPU. Megatron's own `--sft` wants other data.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state as mpu

from data_prep.sft_manifest import PackedSequences, lay_out
from training import data, documents
from training.forward import forward_batch


class EpochDataset(torch.utils.data.Dataset):
    """`epochs` times all sequences, each epoch in an order of its own, then empty ones up to `length`.

    The order is a function of seed and epoch alone, so that the number of consumed sequences says all about the position. The empty
    sequences fill up the last batch and have no loss, so that every sample counts exactly `epochs` times.
    """

    def __init__(self, sequences: PackedSequences, *, seed: int, epochs: int, length: int) -> None:
        self.sequences, self.seed, self.epochs, self.length = sequences, seed, epochs, length
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.length

    def number(self, index: int) -> int | None:
        """Which sequence is at `index`; None: an empty one."""
        epoch, place = divmod(index, len(self.sequences))
        if epoch >= self.epochs:
            return None
        if epoch != self._epoch:
            self._order = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(len(self.sequences))
            self._epoch = epoch
        return int(self._order[place])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        number = self.number(int(index))
        return empty_sequence(self.sequences) if number is None else self.sequences[number]


def empty_sequence(sequences: PackedSequences) -> dict[str, np.ndarray]:
    """A sequence of padding, without loss."""
    manifest = sequences.manifest
    return lay_out([], manifest.seq_length_tokens, manifest.multiple_tokens, manifest.pad_id)


def get_batch(data_iterator: Any, vp_stage: int | None = None) -> dict[str, Any]:
    """The next micro batch of this rank: tokens, labels, position_ids [1, T/cp] int64, loss_mask [1, T/cp] float32, and `packed`.

    Every pipeline stage needs it, for the bounds of the samples. With context parallelism a rank holds its zig-zag pieces of each sample.
    """
    sample = next(data_iterator)
    recorder = data.recorder
    if recorder is not None and mpu.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage):
        recorder.add(sample)
    if sample["tokens"].size(0) != 1:
        raise ValueError(
            f"a micro batch of {sample['tokens'].size(0)} packed sequences; parallel.micro_batch_samples must be 1"
        )
    batch, packed = documents.on_this_rank({key: sample[key] for key in data.BATCH_KEYS}, sample["bounds"][0])
    return {**batch, "packed": packed}


def forward_step(data_iterator: Any, model: Any) -> tuple[torch.Tensor, partial]:
    """One micro batch through `model`; the second value maps its output to the sum of the losses and their number.

    Megatron divides by the number of loss tokens of the global batch (--calculate-per-token-loss).
    """
    return forward_batch(get_batch, data_iterator, model)
