"""Held-out loss per category, on the same sequences of the same length in every stage, so that it compares across boundaries."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state as mpu
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
from megatron.core.utils import get_model_config, unwrap_model
from megatron.training import get_args

from data_prep.manifest import HeldoutManifest
from recipes.schema import Model
from training.forward import forward_step


def read_sequences(prefix: Path, count: int, length_tokens: int) -> np.ndarray:
    """The first `count` sequences of `length_tokens` + 1 tokens of a data set's documents laid end to end, [n, length + 1] int64.

    n < count when the set is smaller.
    """
    dataset = IndexedDataset(str(prefix))
    wanted = count * length_tokens + 1
    pieces, have = [], 0
    for index in range(len(dataset)):
        pieces.append(dataset[index])
        have += len(pieces[-1])
        if have >= wanted:
            break
    stream = np.concatenate(pieces).astype(np.int64) if pieces else np.zeros(0, np.int64)
    n = min(count, (len(stream) - 1) // length_tokens)
    if n <= 0:
        raise ValueError(
            f"held-out set {prefix} has {len(stream)} tokens, fewer than one sequence of {length_tokens}: raise data.heldout_percent"
        )
    return np.stack([stream[i * length_tokens : (i + 1) * length_tokens + 1] for i in range(n)])


def _batches(rows: np.ndarray, micro_batch_samples: int) -> Iterator[dict[str, torch.Tensor]]:
    positions = torch.arange(rows.shape[1] - 1).expand(micro_batch_samples, -1)
    for start in range(0, len(rows), micro_batch_samples):
        chunk = torch.from_numpy(rows[start : start + micro_batch_samples])
        mask = torch.ones(chunk.shape[0], chunk.shape[1] - 1)
        # A row of -1 pads the last batch of a rank: it counts for nothing.
        mask[chunk[:, 0] < 0] = 0.0
        chunk = chunk.clamp(min=0)
        yield {
            "tokens": chunk[:, :-1].contiguous(),
            "labels": chunk[:, 1:].contiguous(),
            "loss_mask": mask,
            "position_ids": positions,
        }


def evaluate(model: list[Any], manifest: HeldoutManifest, data_root: Path, samples_per_category: int) -> dict[str, float]:
    """Mean loss in nats per token of each category of `manifest`; the same value on every rank.

    Collective over all ranks. Draws no random numbers and leaves the model in training mode.
    """
    args = get_args()
    length = manifest.seq_length_tokens
    dp_size, dp_rank = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
    # On CPU one large micro batch is fastest; on a GPU the recipe's micro batch is what is known to fit.
    micro = min(8, samples_per_category) if args.distributed_backend == "gloo" else args.micro_batch_size
    losses: dict[str, float] = {}
    with evaluation_mode(model):
        for category, entry in manifest.categories.items():
            rows = read_sequences(data_root / entry.prefix, samples_per_category, length)
            micro_batches = micro_batches_per_rank(model, len(rows), micro)
            padded = np.full((micro_batches * micro * dp_size, length + 1), -1, dtype=np.int64)
            padded[: len(rows)] = rows
            own = padded[dp_rank::dp_size]
            iterators = [_batches(own, micro) for _ in model]
            losses[category] = mean_loss(model, iterators, forward_step, micro_batches, micro, length)
    return losses


@contextlib.contextmanager
def evaluation_mode(model: list[Any]) -> Iterator[None]:
    """Neither dropout nor timers nor the rerun state machine; as before afterwards, in training mode."""
    config, rerun = get_model_config(model[0]), get_rerun_state_machine()
    rerun_mode = rerun.get_mode()
    rerun.set_mode(RerunMode.DISABLED)
    timers, config.timers = config.timers, None
    for chunk in model:
        chunk.eval()
    try:
        yield
    finally:
        for chunk in model:
            chunk.train()
        config.timers = timers
        rerun.set_mode(rerun_mode)


def micro_batches_per_rank(model: list[Any], samples: int, micro_batch_samples: int) -> int:
    """How many micro batches each data-parallel rank takes, so that all take as many and `samples` fit."""
    # The interleaved schedule takes micro batches in groups of one per pipeline rank.
    group = mpu.get_pipeline_model_parallel_world_size() if len(model) > 1 else 1
    return -(-samples // (mpu.get_data_parallel_world_size() * micro_batch_samples * group)) * group


def mean_loss(
    model: list[Any],
    iterators: list[Iterator[dict[str, torch.Tensor]]],
    forward_step: Callable[..., Any],
    micro_batches: int,
    micro_batch_samples: int,
    length_tokens: int,
) -> float:
    """Mean loss in nats per token of the loss mask over what all ranks draw, without gradients; `iterators`: one for each model chunk."""
    with torch.no_grad():
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(model) > 1 else iterators[0],
            model=model,
            num_microbatches=micro_batches,
            seq_length=length_tokens,
            micro_batch_size=micro_batch_samples,
            decoder_seq_length=length_tokens,
            forward_only=True,
        )
    total = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
    for report in reports:
        total += report["lm loss"].double()
    # Ranks of earlier pipeline stages hold zeros; tensor-parallel ranks hold equal values and sit in groups of their own.
    torch.distributed.all_reduce(total, group=mpu.get_data_parallel_group(with_context_parallel=True))
    torch.distributed.all_reduce(total, group=mpu.get_pipeline_model_parallel_group())
    return (total[0] / total[1]).item()


@contextlib.contextmanager
def rope_base(model: list[Any], recipe_model: Model, base: float) -> Iterator[None]:
    """Run the model with another RoPE base, to compare a loss across a boundary that changes it."""
    chunks = [chunk for chunk in unwrap_model(model) if hasattr(chunk, "rotary_pos_emb")]
    own = [chunk.rotary_pos_emb for chunk in chunks]
    try:
        for chunk, stock in zip(chunks, own, strict=True):
            chunk.rotary_pos_emb = RotaryEmbedding(
                kv_channels=recipe_model.head_dim,
                rotary_percent=1.0,
                rotary_base=base,
                use_cpu_initialization=stock.inv_freq.device.type == "cpu",
                cp_group=stock.cp_group,
            )
        yield
    finally:
        for chunk, stock in zip(chunks, own, strict=True):
            chunk.rotary_pos_emb = stock
