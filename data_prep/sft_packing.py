"""Best fit decreasing: samples into sequences of a fixed length, so that little of a sequence is padding.

Longest sample first, each into the fullest sequence that still has room; a new sequence when none has. Deterministic: samples of equal
length keep their order, and of sequences with equal room the one that was filled last is taken. The memory is a few numbers per sample,
never its tokens. Best fit decreasing needs, asymptotically, at most 11/9 of the
sequences of the best packing (Johnson 1974); on lengths as of chat data it leaves less than a percent empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """bounds int64 [P+1]; samples int64 [N], a permutation: sequence p holds samples[bounds[p]:bounds[p+1]], in this order."""

    bounds: np.ndarray
    samples: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1


def padded(lengths: np.ndarray, multiple: int) -> np.ndarray:
    """Lengths rounded up to `multiple` tokens, int64."""
    return -(-lengths.astype(np.int64) // multiple) * multiple


def pack(lengths: np.ndarray, capacity_tokens: int, multiple_tokens: int = 1) -> Packing:
    """Sequences of at most `capacity_tokens`, from samples of `lengths` [N] tokens that each take up a multiple of `multiple_tokens`.

    ValueError when the capacity is no multiple, or a sample is empty or does not fit (callers refuse or cut those before).
    """
    if capacity_tokens % multiple_tokens:
        raise ValueError(f"a sequence of {capacity_tokens} tokens is no multiple of {multiple_tokens}")
    units = padded(np.asarray(lengths), multiple_tokens) // multiple_tokens
    capacity = capacity_tokens // multiple_tokens
    if len(units) and (units.min() < 1 or units.max() > capacity):
        raise ValueError(
            f"lengths of {int(np.min(lengths))} to {int(np.max(lengths))} tokens for sequences of {capacity_tokens}"
        )
    order = np.argsort(-units, kind="stable")
    sequence = np.empty(len(units), dtype=np.int64)
    with_room: dict[int, list[int]] = {}  # units left -> sequences that have exactly so many
    rooms = 0  # bit r is set where with_room[r] is not empty: the tightest fit is its lowest bit from the sample's length on
    opened = 0
    for place, length in enumerate(units[order].tolist()):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            stack = with_room[room]
            chosen = stack.pop()
            if not stack:
                rooms &= ~(1 << room)
        else:
            room, chosen = capacity, opened
            opened += 1
        sequence[place] = chosen
        left = room - length
        if left:
            with_room.setdefault(left, []).append(chosen)
            rooms |= 1 << left
    by_sequence = np.argsort(sequence, kind="stable")
    bounds = np.zeros(opened + 1, dtype=np.int64)
    np.cumsum(np.bincount(sequence, minlength=opened), out=bounds[1:])
    return Packing(bounds, order[by_sequence].astype(np.int64))
