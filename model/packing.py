"""Which tokens of packed samples a context-parallel rank holds: each sample's own zig-zag pieces, one sample after the other.

The order is Transformer Engine's (thd_get_partitioned_indices) and that of Megatron's rotary embedding for packed samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch


def zigzag_positions(bounds: Sequence[int], ranks: int, rank: int) -> torch.Tensor:
    """Places [T/ranks] int64, in 0..T, that `rank` of `ranks` holds of samples that begin at `bounds` [n+1], from 0 to T.

    A sample is cut into 2 * ranks pieces, of which a rank has pieces rank and 2 * ranks - 1 - rank. ValueError for a sample whose length
    is no multiple of 2 * ranks.
    """
    if ranks == 1:
        return torch.arange(bounds[-1])
    pieces = []
    for start, end in itertools.pairwise(bounds):
        piece, rest = divmod(end - start, 2 * ranks)
        if rest:
            raise ValueError(
                f"a packed sample of {end - start} tokens does not divide into 2 x {ranks} pieces; pad it when packing"
            )
        for number in (rank, 2 * ranks - 1 - rank):
            pieces.append(torch.arange(start + number * piece, start + (number + 1) * piece))
    return torch.cat(pieces)
