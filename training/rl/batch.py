"""From samples to the micro batches of one rank: [B, T] tensors of next-token prediction with the mask on response tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from training.rl.prompts import Sample

LENGTH_MULTIPLE = 8
"""Sequences are padded to a multiple of this: sequence parallelism cuts them over up to 8 tensor-parallel ranks."""


@dataclass
class MicroBatch:
    """T is one less than the padded length: position t predicts token t + 1."""

    tokens: torch.Tensor
    """int64 [B, T]"""
    targets: torch.Tensor
    """int64 [B, T], the tokens one place on."""
    position_ids: torch.Tensor
    """int64 [B, T]"""
    response: torch.Tensor
    """float32 [B, T], 1 where the target is a response token."""
    mask: torch.Tensor
    """float32 [B, T], `response` without what overlong filtering leaves out: what enters the loss."""
    rollout: torch.Tensor
    """float32 [B, T], the rollout's log-probabilities where `response` is set."""
    advantages: torch.Tensor
    """float32 [B]"""
    old: torch.Tensor | None = None
    """float32 [B, T], log-probabilities of the policy that sampled; None: those of this very forward pass (on-policy)."""
    reference: torch.Tensor | None = None
    """float32 [B, T], log-probabilities of the frozen reference; None: no KL term."""


def padded_length(samples: Sequence[Sample]) -> int:
    """Positions that hold the longest of `samples` as inputs, rounded up to LENGTH_MULTIPLE."""
    longest = max(len(s.prompt.ids) + len(s.completion_ids) for s in samples) - 1
    return -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def collate(
    samples: Sequence[Sample], advantages: Sequence[float], length: int, *, filter_overlong: bool, device: torch.device | int
) -> MicroBatch:
    """Right-padded to `length` positions; causal attention keeps padding out of everything before it."""
    shape = (len(samples), length)
    sequence = np.zeros((len(samples), length + 1), np.int64)
    response, mask, rollout = (np.zeros(shape, np.float32) for _ in range(3))
    for row, sample in enumerate(samples):
        prompt, end = len(sample.prompt.ids), len(sample.prompt.ids) + len(sample.completion_ids)
        sequence[row, :prompt] = sample.prompt.ids
        sequence[row, prompt:end] = sample.completion_ids
        # The first response token is predicted at the last position of the prompt.
        response[row, prompt - 1 : end - 1] = 1.0
        rollout[row, prompt - 1 : end - 1] = sample.logprobs
        if not (filter_overlong and sample.truncated):
            mask[row, prompt - 1 : end - 1] = 1.0
    tokens = torch.from_numpy(sequence)

    def put(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return MicroBatch(
        tokens=tokens[:, :-1].contiguous().to(device),
        targets=tokens[:, 1:].contiguous().to(device),
        position_ids=torch.arange(length, device=device).expand(shape).contiguous(),
        response=put(response),
        mask=put(mask),
        rollout=put(rollout),
        advantages=torch.tensor(list(advantages), dtype=torch.float32, device=device),
    )


def tokens_in_loss(samples: Sequence[Sample], *, filter_overlong: bool) -> int:
    """What the token losses of `samples` are divided by."""
    return sum(len(s.completion_ids) for s in samples if not (filter_overlong and s.truncated))
