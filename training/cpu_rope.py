"""Rotary embedding of packed samples at once instead of sample by sample, which on a CPU is a sixth of a step over many short documents.

Without Transformer Engine's kernel, Megatron-LM 0.19.2 takes every sample of a packed sequence out, rotates it and copies it back, for
queries and keys of every layer, and backward the same. Here the angles of all tokens are gathered and everything is rotated once, by
Megatron's own function for whole sequences: the same products and sums, element by element.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils

from model.packing import zigzag_positions

_one_by_one = rope_utils._apply_rotary_pos_emb_thd


def rotate(t: torch.Tensor, cu_seqlens: torch.Tensor, freqs: torch.Tensor, *, cp_group: Any, **options: Any) -> torch.Tensor:
    """`t` [T/cp, heads, d] with each sample's positions counted from its own start; what Megatron's `_apply_rotary_pos_emb_thd` returns.

    cu_seqlens: bounds of the samples over all T tokens [n + 1]; freqs: angles [longest, 1, 1, d].
    """
    bounds = cu_seqlens.tolist()
    if freqs.size(0) == bounds[-1]:  # one angle for each packed token: Megatron's other case
        return _one_by_one(t, cu_seqlens, freqs, cp_group=cp_group, **options)
    places = _places(bounds, cp_group.size(), cp_group.rank()).to(freqs.device)
    return rope_utils._apply_rotary_pos_emb_bshd(t.unsqueeze(1), freqs[places], **options).squeeze(1)


def _places(bounds: list[int], ranks: int, rank: int) -> torch.Tensor:
    """Each token's place in its own sample, [T/ranks] int64, of the tokens of `rank` in zig-zag order."""
    edges = torch.tensor(bounds)
    return zigzag_positions(bounds, ranks, rank) - torch.repeat_interleave(edges[:-1], edges.diff() // ranks)


def install() -> None:
    """Make Megatron rotate packed samples so. Idempotent."""
    rope_utils._apply_rotary_pos_emb_thd = rotate
