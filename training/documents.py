"""Documents that do not see each other in pre-training: the batch of a phase with `documents_apart`.

The data set (training/blend.py) says of every token its place in its document. Here a micro batch becomes one packed sequence in which
each document, or the part of it that the sample holds, is a sequence of its own: Megatron's thd format, as in fine-tuning.

Context parallelism cuts each document into 2 * cp pieces. So each gets room for a multiple of 2 * cp tokens, and the packed sequence
grows by what that adds; no token of the sample is moved out of it or lost, so that the ledger and the losses are those of any other
layout. Padding lies behind a document, where causal attention shows it to nobody, and has no loss.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state as mpu
from megatron.core.packed_seq_params import PackedSeqParams

from data_prep.sft_packing import padded
from model.packing import zigzag_positions
from recipes import document_packing

POSITIONS_KEY = "document_positions"
"""Of a sample: the place of every token in its document's part, [s] int32. 0 begins a document."""


def positions_and_loss_mask(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of a sample's s + 1 tokens, in parts of documents of `lengths` [n] int: places in the parts [s] int32, and loss mask [s] float32.

    The mask is 0 where the label, the token that comes next, begins another document. A part may be empty.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    positions = np.arange(ends[-1], dtype=np.int32)
    positions -= np.repeat((ends - lengths).astype(np.int32), lengths)
    return positions[:-1], (positions[1:] != 0).astype(np.float32)


def grain_tokens(args: Any) -> int:
    """What the length of a packed sequence is a multiple of in the layout and precision of Megatron's `args`."""
    return document_packing.grain_tokens(
        args.seq_length,
        context=args.context_parallel_size,
        sequence_parallel=args.tensor_model_parallel_size if args.sequence_parallel else 1,
        fp8=args.fp8_recipe if args.fp8 else None,
    )


def pack(sample: dict[str, torch.Tensor], multiple: int, grain: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A micro batch as one packed sequence of T tokens, and the bounds of its documents, [n+1] int32 from 0 to T.

    sample: tokens, labels [b, s] int64, loss_mask [b, s] float32 and the documents' positions [b, s] int32, on the host. Returns tokens,
    labels, position_ids [1, T] int64 and loss_mask [1, T] float32; each document takes up a multiple of `multiple` tokens, and T is the
    next multiple of `grain`, itself one of `multiple`. What is left at the end is a piece of its own. Padding is token 0.
    """
    positions = sample[POSITIONS_KEY].numpy().reshape(-1)
    starts = np.flatnonzero(positions == 0)
    lengths = np.diff(starts, append=len(positions))
    bounds = np.concatenate([[0], np.cumsum(padded(lengths, multiple))])
    total = int(padded(bounds[-1:], grain)[0])
    if total > bounds[-1]:
        bounds = np.append(bounds, total)
    packed: dict[str, torch.Tensor] = {}
    if total == len(positions):
        packed |= {key: sample[key].reshape(1, -1) for key in ("tokens", "labels", "loss_mask")}
    else:
        for key in ("tokens", "labels", "loss_mask"):
            flat = sample[key].numpy().reshape(-1)
            spread = np.zeros(total, dtype=flat.dtype)
            for start, length, place in zip(starts.tolist(), lengths.tolist(), bounds.tolist(), strict=False):
                spread[place : place + length] = flat[start : start + length]
            packed[key] = torch.from_numpy(spread)[None]
    packed["position_ids"] = torch.from_numpy(np.arange(total) - np.repeat(bounds[:-1], np.diff(bounds)))[None]
    return packed, torch.from_numpy(bounds.astype(np.int32))


def on_this_rank(
    batch: dict[str, torch.Tensor], bounds: torch.Tensor, *, restart_positions: bool = True
) -> tuple[dict[str, torch.Tensor], PackedSeqParams]:
    """This context-parallel rank's part [1, T/cp] of a packed batch [1, T], on its device, and what attention is told of the sequences.

    `bounds` [n+1] int32 on the host: where the sequences begin, each a multiple of 2 * cp tokens long. Without `restart_positions`
    RoPE counts on over the whole batch.
    """
    ranks = mpu.get_context_parallel_world_size()
    if ranks > 1:
        places = zigzag_positions(bounds.tolist(), ranks, mpu.get_context_parallel_rank())
        batch = {key: value[:, places] for key, value in batch.items()}
    batch = {key: value.cuda(non_blocking=True) for key, value in batch.items()}
    # Megatron's rotary embedding takes positions of the whole batch for those of the sequences when there are as many as tokens, and
    # makes as many as the longest sequence has.
    longest = int((bounds[1:] - bounds[:-1]).max()) if restart_positions else int(bounds[-1])
    starts = bounds.to(torch.int32).cuda(non_blocking=True)
    return batch, PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts, max_seqlen_q=longest, max_seqlen_kv=longest
    )
